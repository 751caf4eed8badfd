"""The dataset: alignment against a replay in the simulator, windows against a slow loop, returns."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ENV_ID, collect, decode, ppo, pretrain

NOBODY = np.empty(0)
ARRAYS = ("frames", "first", "actions", "rewards", "returns")


def replay(data_dir, split):
    """Asserts that the test split, which meta.json describes, is what the simulator shows and gives.

    Stepping the stored a_t from frame t gives row t's reward and frame t+1; other actions do not.
    """
    stored, E = load(data_dir / "test"), split["num_envs"]
    arrays = (getattr(stored, name) for name in ARRAYS[:4])
    frames, first, actions, rewards = (x.reshape(E, -1, *x.shape[1:]) for x in arrays)
    env = collect.make_env(ENV_ID, E, split["num_levels"], split["start_level"], *split["seeds"])
    differing = 0
    for t in range(frames.shape[1] - 1):
        _, obs, began = env.observe()
        assert np.array_equal(obs["rgb"], frames[:, t]) and np.array_equal(began, first[:, t])
        if t == 5:
            state = env.callmethod("get_state")
            for other in (0, 2, 6, 8):  # the diagonals
                env.act(np.where(actions[:, t] == other, 4, other).astype(np.int32))
                differing += np.any(env.observe()[1]["rgb"] != frames[:, t + 1], axis=(1, 2, 3)).sum()
                env.callmethod("set_state", state)
        env.act(actions[:, t].astype(np.int32))
        assert np.array_equal(env.observe()[0], rewards[:, t])
    env.close()
    assert differing > 2 * E  # of 4 * E: a shifted action would have been caught
    return frames


def load(split_dir):
    return SimpleNamespace(**{name: np.load(split_dir / f"{name}.npy") for name in ARRAYS})


class ScriptedEnv:
    """Two games, episodes of 3 and 5 steps; the reward of step t is t + 1, frames show 100 * game + t."""

    num, num_actions, lengths = 2, 15, np.array([3, 5])

    def __init__(self):
        self.t, self.actions, self.observed = 0, [], 0

    def observe(self):
        self.observed += 1
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
    returned = collect.collect(lambda e, obs, _: obs[:, 0, 0, 0] % 15, ScriptedEnv(), 8, 0, folder)
    got, t, nan = load(folder), np.arange(8), np.nan
    for name, dtype in zip(ARRAYS, (np.uint8, bool, np.int8, np.float32, np.float32)):
        array, shape = getattr(got, name), (64, 64, 3) if name == "frames" else ()
        assert (array.shape, array.dtype) == ((16, *shape), dtype), name
    assert np.array_equal(got.frames[:, 5, 6, 2], np.r_[t, 100 + t])
    assert np.array_equal(got.actions, np.r_[t, (100 + t) % 15])
    assert np.array_equal(got.rewards, np.r_[t + 1, t + 1])
    assert np.array_equal(np.flatnonzero(got.first), [0, 3, 6, 8, 13])
    wanted = [6, 6, 6, 15, 15, 15, nan, nan, 15, 15, 15, 15, 15, nan, nan, nan]
    np.testing.assert_array_equal(got.returns, wanted)
    assert sorted(returned) == [6, 15, 15]


def test_play_counts_every_episode_once():
    """The next episode goes to the game that is free first; returns are in order; a step is seen once."""
    env, asked, wanted = ScriptedEnv(), [], [1 + 2 + 3, 15, 4 + 5 + 6, 6 + 7 + 8 + 9 + 10, 24]

    def policy(obs, episode=NOBODY):
        asked.append(episode.tolist())
        return F.one_hot(obs[:, 0, 0, 0].long() // 100 + 1, 15).log()

    assert decode.evaluate(policy, env, 5, torch.Generator()).tolist() == wanted
    assert asked == [[0, 1]] * 3 + [[2, 1]] * 2 + [[2, 3]] + [[4, 3]] * 3 + [[3]]
    assert env.actions == [[1, 2]] * 9 + [[0, 2]] and env.observed == env.t + 1 == 11  # idle games rest
    assert decode.evaluate(policy, ScriptedEnv(), 3, torch.Generator()).tolist() == wanted[:2] + [15]
    assert collect.play_at_random(ScriptedEnv(), 5, np.random.default_rng(0)).tolist() == wanted
    env = ScriptedEnv()
    assert ppo.evaluate(policy, env, 5, "cpu").tolist() == wanted
    assert env.actions == [[1, 2]] * 10 and env.observed == env.t + 1


def slow_windows(first):
    """The t of all windows (t-1, t, t+1) within one episode, by numbering the episodes."""
    episode = [sum(first[: t + 1]) for t in range(len(first))]
    return [t for t in range(1, len(first) - 1) if episode[t - 1] == episode[t] == episode[t + 1]]


def split_args(data_dir):
    return SimpleNamespace(env_id=ENV_ID, data_dir=data_dir)


@pytest.mark.parametrize("dtype", [bool, np.uint8])
def test_no_window_crosses_an_episode(tmp_path, pipeline, dtype):
    """load_dataset's windows equal a slow loop's, on episodes written down here and on the toy data."""
    first = {"train": [1, 0, 0, 0, 1, 0, 1, 1, 0, 0, 1, 0, 0], "test": [1, 0, 0, 0, 0]}
    for split in first:
        (tmp_path / split).mkdir()
        np.save(tmp_path / split / "first.npy", np.array(first[split], dtype=dtype))
        np.save(tmp_path / split / "frames.npy", np.zeros((len(first[split]), 64, 64, 3), np.uint8))
    (tmp_path / "meta.json").write_text(json.dumps({"env_id": ENV_ID}))
    _, train, test = pretrain.load_dataset(split_args(tmp_path))
    assert train.windows.tolist() == slow_windows(first["train"]) == [1, 2, 8, 11]
    assert test.windows.tolist() == [1, 2, 3]
    for split, frames in zip(first, pretrain.load_dataset(split_args(pipeline.data))[1:]):
        first = np.load(pipeline.data / split / "first.npy")
        assert frames.windows.tolist() == slow_windows(first.tolist())
        assert 0 < len(frames.windows) < len(first) - 2 and np.array_equal(frames.first, first)
        assert isinstance(frames.shards[0], np.memmap)


def test_shards(tmp_path, pipeline):
    """A dataset cut into shards has the whole's frames, windows and labels, but for windows over a cut."""
    meta, *whole = pretrain.load_dataset(split_args(pipeline.data))
    cuts = {"train": [0, 700, 703, 2000], "test": [0, 130, 260, 400]}
    for s in range(3):
        for split in cuts:
            (tmp_path / f"shard-{s}" / split).mkdir(parents=True)
            for name in ARRAYS:
                rows = np.load(pipeline.data / split / f"{name}.npy")[cuts[split][s] : cuts[split][s + 1]]
                np.save(tmp_path / f"shard-{s}" / split / f"{name}.npy", rows)
        (tmp_path / f"shard-{s}" / "meta.json").write_text(json.dumps(meta))
    _, *shards = pretrain.load_dataset(split_args(tmp_path))
    for split, one, several in zip(cuts, whole, shards):
        over = {t for cut in cuts[split][1:-1] for t in (cut - 1, cut)}
        t = np.array([t for t in one.windows if t not in over])
        assert several.windows.tolist() == t.tolist()
        t = np.random.default_rng(0).permutation(t)[:200]
        assert np.array_equal(several[t], one[t]) and several[t[0]].shape == (64, 64, 3)
        assert torch.equal(*(pretrain.get_windows(found, t, "cpu") for found in (several, one)))
        assert np.array_equal(pretrain.load_labels(several, "actions"), pretrain.load_labels(one, "actions"))
    (tmp_path / "shard-1/train/actions.npy").unlink()
    assert pretrain.load_labels(pretrain.load_dataset(split_args(tmp_path))[1], "actions") is None


def test_meta_describes_the_dataset(pipeline):
    """With the actions, meta.json plays every frame, reward and episode start of the test split again."""
    meta = json.loads((pipeline.data / "meta.json").read_text())
    assert [meta[key] for key in ("env_id", "num_levels", "start_level")] == [ENV_ID, 16, 0]
    assert meta["format_version"] == 1 and meta["num_actions"] == 15
    assert meta["demonstrator"]["episodes"] == 8
    assert meta["random"]["episodes"] == len(meta["random"]["returns"]) == 16
    assert meta["random"]["return_mean"] == pytest.approx(np.mean(meta["random"]["returns"]))
    assert {s: meta["splits"][s]["num_frames"] for s in meta["splits"]} == {"train": 2000, "test": 400}
    replay(pipeline.data, meta["splits"]["test"])
    actions = np.load(pipeline.data / "train" / "actions.npy")
    assert 0 <= actions.min() and actions.max() <= 14 and len(np.unique(actions)) > 5
