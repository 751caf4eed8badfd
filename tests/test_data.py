"""The dataset: alignment against a replay in the simulator, windows against a slow loop, returns."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ENV_ID, collect, ppo, pretrain

NUM_ENVS, T = 8, 120
LEVELS = (8, 3, 7)  # num_levels, start_level, seed
ARRAYS = ("frames", "first", "actions", "rewards", "returns")


def load(split_dir):
    return SimpleNamespace(**{name: np.load(split_dir / f"{name}.npy") for name in ARRAYS})


def fake_run():
    writer = SimpleNamespace(add_scalar=lambda *_: None)
    return SimpleNamespace(writer=writer, began=0.0, leave_if_stopped=lambda: None)


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """960 frames of random play by collect(), as arrays, beside what it was shown."""
    rng, seen = np.random.default_rng(0), []

    def act(obs):
        seen.append(obs.copy())
        return rng.integers(15, size=NUM_ENVS).astype(np.int32)

    split_dir = tmp_path_factory.mktemp("collected") / "train"
    env = collect.make_env(ENV_ID, NUM_ENVS, *LEVELS)
    collect.collect(act, env, T, split_dir, fake_run(), 0)
    env.close()
    return SimpleNamespace(**vars(load(split_dir)), seen=np.array(seen))


def by_env(rows):
    """Rows (N, ...), env by env, as (E, T, ...)."""
    return rows.reshape(NUM_ENVS, T, *rows.shape[1:])


def test_rows(played):
    """Documented shapes and dtypes; env e fills rows e*T .. e*T+T-1 with what it showed."""
    for name, dtype in zip(ARRAYS, (np.uint8, bool, np.int8, np.float32, np.float32)):
        array, shape = getattr(played, name), (64, 64, 3) if name == "frames" else ()
        assert (array.shape, array.dtype) == ((NUM_ENVS * T, *shape), dtype), name
    assert np.array_equal(by_env(played.frames), played.seen.swapaxes(0, 1))
    assert by_env(played.first)[:, 0].all() and not played.first.all()


def test_alignment_in_a_simulator_replay(played):
    """Stepping the stored a_t from the state at row t gives row t's reward and frame t+1; others do not."""
    frames, first, actions, rewards = (by_env(getattr(played, name)) for name in ARRAYS[:4])
    env = collect.make_env(ENV_ID, NUM_ENVS, *LEVELS)
    differing = 0
    for t in range(T - 1):
        assert np.array_equal(env.observe()[1]["rgb"], frames[:, t])
        if t % 10 == 5:
            state = env.callmethod("get_state")
            for other in (0, 2, 6, 8):  # the diagonals
                env.act(np.where(actions[:, t] == other, 4, other).astype(np.int32))
                differing += np.any(env.observe()[1]["rgb"] != frames[:, t + 1], axis=(1, 2, 3)).sum()
                env.callmethod("set_state", state)
        env.act(actions[:, t].astype(np.int32))
        reward, obs, ended = env.observe()
        assert np.array_equal(obs["rgb"], frames[:, t + 1])
        assert np.array_equal(reward, rewards[:, t]) and np.array_equal(ended, first[:, t + 1])
    env.close()
    assert differing > 100  # of 12 * 4 * 8: a shifted action would have been caught
    assert (played.rewards != 0).sum() > 5 and first[:, 1:].sum() > 5


class ScriptedEnv:
    """Two games, episodes of 3 and 5 steps; the reward of step t is t + 1, frames show 100 * game + t."""

    num, lengths = 2, np.array([3, 5])

    def __init__(self):
        self.t, self.actions = 0, []

    def observe(self):
        rgb = np.zeros((2, 64, 64, 3), dtype=np.uint8)
        rgb[0], rgb[1] = self.t, 100 + self.t
        return np.full(2, float(self.t), dtype=np.float32), {"rgb": rgb}, self.t % self.lengths == 0

    def act(self, action):
        self.actions.append(action.tolist())
        self.t += 1

    def close(self):
        pass


def test_collect_on_a_scripted_game(tmp_path):
    """On a game known by heart every row of every file is right; returns are NaN where a game is cut off."""
    folder = tmp_path / "train"
    returned = collect.collect(lambda obs: obs[:, 0, 0, 0] % 15, ScriptedEnv(), 8, folder, fake_run(), 0)
    got, t, nan = load(folder), np.arange(8), np.nan
    assert np.array_equal(got.frames[:, 5, 6, 2], np.r_[t, 100 + t])
    assert np.array_equal(got.actions, np.r_[t, (100 + t) % 15])
    assert np.array_equal(got.rewards, np.r_[t + 1, t + 1])
    assert np.array_equal(np.flatnonzero(got.first), [0, 3, 6, 8, 13])
    wanted = [6, 6, 6, 15, 15, 15, nan, nan, 15, 15, 15, 15, 15, nan, nan, nan]
    np.testing.assert_array_equal(got.returns, wanted)
    assert sorted(returned) == [6, 15, 15]


def test_evaluate_counts_every_episode_once():
    """The next episode goes to the game that is free first; returns are in order; idle games rest."""
    env, asked, how = ScriptedEnv(), [], (torch.Generator(), fake_run())

    def policy(obs, episode):
        asked.append(episode.tolist())
        return F.one_hot(obs[:, 0, 0, 0].long() // 100 + 1, 15).log()

    assert ppo.evaluate(policy, env, 5, *how).tolist() == [1 + 2 + 3, 15, 4 + 5 + 6, 6 + 7 + 8 + 9 + 10, 24]
    assert asked == [[0, 1]] * 3 + [[2, 1]] * 2 + [[2, 3]] + [[4, 3]] * 3 + [[3]]
    assert env.actions == [[1, 2]] * 9 + [[0, 2]]
    assert ppo.evaluate(policy, ScriptedEnv(), 3, *how).tolist() == [6, 15, 15]


def slow_windows(first):
    """The t of all windows (t-1, t, t+1) within one episode, by numbering the episodes."""
    episode = [sum(first[: t + 1]) for t in range(len(first))]
    return [t for t in range(1, len(first) - 1) if episode[t - 1] == episode[t] == episode[t + 1]]


def test_no_window_crosses_an_episode(tmp_path, pipeline):
    """load_dataset's windows equal a slow loop's, on episodes written down here and on the toy data."""
    first = {"train": [1, 0, 0, 0, 1, 0, 1, 1, 0, 0, 1, 0, 0], "test": [1, 0, 0, 0, 0]}
    for split in first:
        (tmp_path / split).mkdir()
        np.save(tmp_path / split / "first.npy", np.array(first[split], dtype=bool))
        np.save(tmp_path / split / "frames.npy", np.zeros((len(first[split]), 64, 64, 3), np.uint8))
    (tmp_path / "meta.json").write_text(json.dumps({"env_id": ENV_ID}))
    _, frames, windows = pretrain.load_dataset(SimpleNamespace(env_id=ENV_ID, data_dir=tmp_path))
    assert windows["train"].tolist() == slow_windows(first["train"]) == [1, 2, 8, 11]
    assert windows["test"].tolist() == [1, 2, 3]
    _, frames, windows = pretrain.load_dataset(SimpleNamespace(env_id=ENV_ID, data_dir=pipeline.data))
    for split in ("train", "test"):
        first = np.load(pipeline.data / split / "first.npy")
        assert windows[split].tolist() == slow_windows(first.tolist())
        assert 0 < len(windows[split]) < len(first) - 2
        assert isinstance(frames[split].open(0), np.memmap) and len(frames[split]) == len(first)


def test_shards(tmp_path, pipeline):
    """A dataset cut into shards has the whole's frames, windows and labels, but for windows over a cut."""
    whole = pretrain.load_dataset(SimpleNamespace(env_id=ENV_ID, data_dir=pipeline.data))
    cuts = {"train": [0, 700, 703, 2000], "test": [0, 130, 260, 400]}
    for s in range(3):
        for split in cuts:
            (tmp_path / f"shard-{s}" / split).mkdir(parents=True)
            for name in ARRAYS:
                rows = np.load(pipeline.data / split / f"{name}.npy")[cuts[split][s] : cuts[split][s + 1]]
                np.save(tmp_path / f"shard-{s}" / split / f"{name}.npy", rows)
        (tmp_path / f"shard-{s}" / "meta.json").write_text(json.dumps(whole[0] | {"identity": f"{s}"}))
    (tmp_path / "other").mkdir()
    (tmp_path / "shard-2").rename(tmp_path / "other" / "shard-2")
    folders = SimpleNamespace(env_id=ENV_ID, data_dir=f"{tmp_path}:{tmp_path}/other")
    meta, frames, windows = pretrain.load_dataset(folders)
    assert meta["identity"] == "0+1+2"
    for split in cuts:
        over = {t for cut in cuts[split][1:-1] for t in (cut - 1, cut)}
        t = np.array([t for t in whole[2][split] if t not in over])
        assert windows[split].tolist() == t.tolist() and len(frames[split]) == cuts[split][-1]
        t = np.random.default_rng(0).permutation(t)[:200]
        assert np.array_equal(frames[split][t], whole[1][split][t])
        got = (pretrain.get_windows(found[split], t, "cpu") for found in (frames, whole[1]))
        assert torch.equal(*got) and np.array_equal(frames[split][t[0]], whole[1][split][t[0]])
        actions = (found[split].labels("actions") for found in (frames, whole[1]))
        assert np.array_equal(*actions)


def test_meta_describes_the_dataset(pipeline):
    """With the actions, meta.json plays every frame, reward and episode start of the test split again."""
    meta = json.loads((pipeline.data / "meta.json").read_text())
    assert [meta[key] for key in ("env_id", "num_levels", "start_level")] == [ENV_ID, 16, 0]
    assert meta["format_version"] == 1 and meta["identity"] and meta["demonstrator"]["episodes"] == 8
    assert {s: meta["splits"][s]["num_frames"] for s in meta["splits"]} == {"train": 2000, "test": 400}
    split, stored = meta["splits"]["test"], load(pipeline.data / "test")
    E, arrays = split["num_envs"], (getattr(stored, name) for name in ARRAYS[:4])
    frames, first, actions, rewards = (x.reshape(E, -1, *x.shape[1:]) for x in arrays)
    env = collect.make_env(ENV_ID, E, split["num_levels"], split["start_level"], *split["seeds"])
    for t in range(frames.shape[1]):
        _, obs, began = env.observe()
        assert np.array_equal(obs["rgb"], frames[:, t]) and np.array_equal(began, first[:, t])
        env.act(actions[:, t].astype(np.int32))
        assert np.array_equal(env.observe()[0], rewards[:, t])
    env.close()
    assert 0 <= actions.min() and actions.max() <= 14 and len(np.unique(actions)) > 5
