"""The dataset: its alignment against a replay in the simulator, windows against a slow loop, returns, and memory while collecting."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ENV_ID, ROOT, bc, collect, decode, pretrain
from tqdm import tqdm

NUM_ENVS, T = 8, 120
LEVELS = (8, 3, 7)  # num_levels, start_level, seed


def load(split_dir):
    return SimpleNamespace(**{name: np.load(split_dir / f"{name}.npy") for name in ("frames", "first", "actions", "rewards", "returns")})


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """960 frames of random play by collect(), as arrays, beside the observations it was given and the returns it gave back."""
    rng, seen = np.random.default_rng(0), []

    def act(obs):
        seen.append(obs.copy())
        return rng.integers(15, size=NUM_ENVS).astype(np.int32)

    split_dir = tmp_path_factory.mktemp("collected") / "train"
    env = collect.make_env(ENV_ID, NUM_ENVS, *LEVELS)
    returned = collect.collect(act, env, split_dir, NUM_ENVS * T + 5, tqdm(disable=True))  # 5 more than divide: left out
    env.close()
    return SimpleNamespace(**vars(load(split_dir)), seen=np.array(seen), returned=returned)


def by_env(rows):
    """Rows (N, ...), env by env, as (E, T, ...)."""
    return rows.reshape(NUM_ENVS, T, *rows.shape[1:])


def test_dataset_shapes(played):
    """The five arrays have the documented shapes and dtypes, and the rows that do not fill every env are left out."""
    n = NUM_ENVS * T
    assert (played.frames.shape, played.frames.dtype) == ((n, 64, 64, 3), np.uint8)
    for name, dtype in (("first", bool), ("actions", np.int8), ("rewards", np.float32), ("returns", np.float32)):
        array = getattr(played, name)
        assert (array.shape, array.dtype) == ((n,), dtype), name


def test_alignment_in_a_simulator_replay(played):
    """Stepping the stored a_t from the simulator's state at row t gives row t's reward and, bit for bit, frame t+1; others do not."""
    frames, first, actions, rewards = map(by_env, (played.frames, played.first, played.actions, played.rewards))
    env = collect.make_env(ENV_ID, NUM_ENVS, *LEVELS)
    differing = 0
    for t in range(T - 1):
        _, obs, _ = env.observe()
        assert np.array_equal(obs["rgb"], frames[:, t])
        if t % 10 == 5:
            state = env.callmethod("get_state")
            for other in (0, 2, 6, 8):  # down-left, up-left, down-right, up-right: moves of the player
                env.act(np.where(actions[:, t] == other, 4, other).astype(np.int32))
                differing += np.any(env.observe()[1]["rgb"] != frames[:, t + 1], axis=(1, 2, 3)).sum()
                env.callmethod("set_state", state)
        env.act(actions[:, t].astype(np.int32))
        reward, obs, ended = env.observe()
        assert np.array_equal(obs["rgb"], frames[:, t + 1])
        assert np.array_equal(reward, rewards[:, t])
        assert np.array_equal(ended, first[:, t + 1])
    env.close()
    assert differing > 100  # of 12 * 4 * 8: the action shows in the next frame, so a shifted one would have been caught
    assert (played.rewards != 0).sum() > 5 and first[:, 1:].sum() > 5


def test_rows_are_env_major(played):
    """Env e fills rows e*T .. e*T+T-1 with what it showed, step by step, and the joins between envs are marked first."""
    assert np.array_equal(by_env(played.frames), played.seen.swapaxes(0, 1))
    assert by_env(played.first)[:, 0].all() and not played.first.all()


def test_returns_are_sums_over_whole_episodes(played):
    """returns.npy is the sum of the episode's rewards, NaN where the recording cuts the episode off; collect() returns those of whole episodes."""
    want, whole = np.full((NUM_ENVS, T), np.nan), []
    first, rewards = by_env(played.first), by_env(played.rewards)
    for e in range(NUM_ENVS):
        starts = [t for t in range(T) if first[e, t]]
        for a, b in zip(starts, starts[1:]):
            want[e, a:b] = sum(float(rewards[e, t]) for t in range(a, b))
            whole.append(want[e, a])
    got = by_env(played.returns)
    known = ~np.isnan(want)
    np.testing.assert_allclose(got[known], want[known], atol=1e-5)
    # the last episode of an env is cut off, unless its last row happens to end it, which no later row can tell
    last_ended = [e for e in range(NUM_ENVS) if np.isnan(want[e, -1]) and not np.isnan(got[e, -1])]
    for e in range(NUM_ENVS):
        if e not in last_ended:
            assert np.isnan(got[e][np.isnan(want[e])]).all()
    assert len(last_ended) <= 1 and known.any() and (~known).any()
    assert len(played.returned) == len(whole) + len(last_ended)
    if not last_ended:
        np.testing.assert_allclose(sorted(played.returned), sorted(whole), atol=1e-5)


class ScriptedEnv:
    """Two games whose episodes last 3 and 5 steps; the reward of step t is t + 1, the frame shows env number and t."""

    num, lengths = 2, np.array([3, 5])

    def __init__(self):
        self.t = 0

    def observe(self):
        rgb = np.zeros((2, 64, 64, 3), dtype=np.uint8)
        rgb[0], rgb[1] = self.t, 100 + self.t
        return np.full(2, float(self.t), dtype=np.float32), {"rgb": rgb}, self.t % self.lengths == 0

    def act(self, action):
        self.t += 1


def test_collect_on_a_scripted_game(tmp_path):
    """On a game known by heart every row of every file is right, through episode ends and the cut at the end of the recording."""
    env = ScriptedEnv()
    returned = collect.collect(lambda obs: obs[:, 0, 0, 0] % 15, env, tmp_path / "train", 2 * 8, tqdm(disable=True))
    got, t, nan = load(tmp_path / "train"), np.arange(8), np.nan
    assert np.array_equal(got.frames[:, 5, 6, 2], np.r_[t, 100 + t])
    assert np.array_equal(got.actions, np.r_[t, (100 + t) % 15])
    assert np.array_equal(got.rewards, np.r_[t + 1, t + 1])
    assert np.array_equal(np.flatnonzero(got.first), [0, 3, 6, 8, 13])
    np.testing.assert_array_equal(got.returns, [6, 6, 6, 15, 15, 15, nan, nan, 15, 15, 15, 15, 15, nan, nan, nan])
    assert sorted(returned) == [6, 15, 15]


def slow_windows(first):
    """The t of all windows (t-1, t, t+1) within one episode, by numbering the episodes."""
    episode = [sum(first[: t + 1]) for t in range(len(first))]
    return [t for t in range(1, len(first) - 1) if episode[t - 1] == episode[t] == episode[t + 1]]


def write_dataset(data_dir, first):
    (data_dir / "train").mkdir(parents=True)
    np.save(data_dir / "train" / "first.npy", np.array(first, dtype=bool))
    np.save(data_dir / "train" / "frames.npy", np.random.default_rng(0).integers(256, size=(len(first), 64, 64, 3)).astype(np.uint8))
    return {"splits": {"train": {"num_frames": len(first)}}}


@pytest.mark.parametrize("module", [pretrain, bc, decode])
def test_no_window_crosses_an_episode(module, tmp_path, pipeline):
    """load_frames' windows equal a slow loop's, on written-down episodes and on the toy dataset, and none is lost."""
    first = [1, 0, 0, 0, 1, 0, 1, 1, 0, 0, 1, 0, 0]  # episodes of 4, 2, 1, 3 and 3 frames
    frames, t = module.load_frames(tmp_path, "train", write_dataset(tmp_path, first))
    assert t.tolist() == slow_windows(first) == [1, 2, 8, 11]
    meta = json.loads((pipeline.data / "meta.json").read_text())
    for split in ("train", "test"):
        first = np.load(pipeline.data / split / "first.npy")
        frames, t = module.load_frames(pipeline.data, split, meta)
        assert t.tolist() == slow_windows(first.tolist()) and 0 < len(t) < len(first) - 2
        assert isinstance(frames, np.memmap) and len(frames) == len(first)


@pytest.mark.parametrize("module", [pretrain, bc, decode])
def test_windows_stack_three_frames(module):
    """get_windows gives o_{t-1}, o_t, o_{t+1} on channels 0-2, 3-5, 6-8, as x / 255 - 0.5."""
    frames = np.random.default_rng(0).integers(256, size=(10, 64, 64, 3)).astype(np.uint8)
    t = np.array([1, 8, 4])
    windows = module.get_windows(frames, t, "cpu")
    assert windows.shape == (3, 9, 64, 64) and windows.dtype == torch.float32
    for i, s in enumerate(t):
        for j, row in enumerate((s - 1, s, s + 1)):
            for c in range(3):
                np.testing.assert_allclose(windows[i, 3 * j + c].numpy(), frames[row, :, :, c] / 255 - 0.5, atol=1e-6)


@pytest.mark.parametrize("split", ["train", "test"])
def test_dataset_can_be_played_again_from_its_meta(pipeline, split):
    """meta.json and actions.npy alone reproduce every frame, reward and episode start of the demonstrator's recording."""
    meta = json.loads((pipeline.data / "meta.json").read_text())["splits"][split]
    stored, E = load(pipeline.data / split), meta["num_envs"]
    assert len(stored.frames) == meta["num_frames"] == len(stored.first)
    frames, first, actions, rewards = (x.reshape(E, -1, *x.shape[1:]) for x in (stored.frames, stored.first, stored.actions, stored.rewards))
    env = collect.make_env(ENV_ID, E, meta["num_levels"], meta["start_level"], meta["seed"])
    for t in range(frames.shape[1]):
        _, obs, began = env.observe()
        assert np.array_equal(obs["rgb"], frames[:, t]) and np.array_equal(began, first[:, t])
        env.act(actions[:, t].astype(np.int32))
        assert np.array_equal(env.observe()[0], rewards[:, t])
    env.close()
    assert 0 <= actions.min() and actions.max() <= 14 and len(np.unique(actions)) > 5


class LengthsEnv:
    """Three games; episodes of game e have the given lengths, over and over; every step earns 1, plus 100 times the game's number at the end."""

    num, lengths = 3, ((2, 7), (5, 1), (3, 3))

    def __init__(self):
        self.step, self.episode, self.ended, self.reward, self.actions = [0] * 3, [0] * 3, np.ones(3, bool), np.zeros(3), []

    def observe(self):
        rgb = np.zeros((3, 64, 64, 3), dtype=np.uint8)
        rgb[1], rgb[2] = 1, 2  # the frame shows the game's number
        return self.reward.copy(), {"rgb": rgb}, self.ended.copy()

    def act(self, action):
        self.actions.append(action)
        for e in range(3):
            self.step[e] += 1
            self.ended[e] = self.step[e] == self.lengths[e][self.episode[e] % 2]
            self.reward[e] = 1 + 100 * e * self.ended[e]
            if self.ended[e]:
                self.step[e], self.episode[e] = 0, self.episode[e] + 1


def test_evaluate_counts_every_episode_once():
    """evaluate() hands the next episode to the env that is free first; returns are in the episodes' order; idle envs are not asked."""
    env, asked = LengthsEnv(), []

    def act(obs, episode):
        asked.append(episode.tolist())
        return obs[:, 0, 0, 0].astype(np.int32) + 1

    assert collect.evaluate(act, env, 6).tolist() == [2, 105, 203, 7, 203, 101]
    assert asked == [[0, 1, 2]] * 2 + [[3, 1, 2]] + [[3, 1, 4]] * 2 + [[3, 5, 4]] + [[3]] * 3
    assert [a.tolist() for a in env.actions] == [[1, 2, 3]] * 6 + [[1, 0, 0]] * 3
    assert collect.evaluate(act, LengthsEnv(), 4).tolist() == [2, 105, 203, 7]


def test_collecting_keeps_memory_flat(tmp_path):
    """Collecting 40,000 frames (490 MB on disk) needs hardly more memory than collecting 4,000."""
    code = """
import sys
from pathlib import Path
import numpy as np
from tqdm import tqdm
from collect_expert_data import collect, make_env
rng = np.random.default_rng(0)
for n in (4_000, 40_000):
    env = make_env(sys.argv[2], 16, 0, 0, 1)
    collect(lambda obs: rng.integers(15, size=16).astype(np.int32), env, Path(sys.argv[1]), n, tqdm(disable=True))
    env.close()
    frames = Path(sys.argv[1]) / "frames.npy"
    size = frames.stat().st_size
    frames.unlink()
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))  # the largest resident size so far, kB
    print(size, int(peak.split()[1]) * 1024)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path, ENV_ID], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (small, before), (large, after) = ([int(x) for x in line.split()] for line in done.stdout.splitlines())
    assert large - small > 440e6
    assert after - before < 60e6
