"""Small worlds of gymnasium, Procgen's games on every Python, and datasets that nobody can play."""

import hashlib  # noqa: I001
import json
import sys

import gymnasium
import numpy as np
import pytest
from conftest import (
    ENV_ID, ENV_NAMES, ROOT, STAGES, TOY, collect, inline, load, ppo, refusal, replace, results_of,
)  # fmt: skip
from gymnasium.envs.toy_text.frozen_lake import generate_random_map
from PIL import Image

from tools.loading import action_names

GAMES_SEEN = json.loads((ROOT / "tests" / "games.json").read_text())


def play(env, num_actions, steps, seed=0):
    """What random play sees: observations, rewards, first, actions, each (steps, E, ...)."""
    rng, rows = np.random.default_rng(seed), []
    for _ in range(steps):
        reward, obs, first = env.observe()
        action = rng.integers(num_actions, size=env.num).astype(np.int32)
        rows.append((obs["rgb"].copy(), np.float32(reward), np.array(first, dtype=bool), action))
        env.act(action)
    return [np.array(part) for part in zip(*rows)]


@pytest.mark.parametrize("game", ENV_NAMES)
def test_procgen_is_the_same_everywhere(game):
    """200 frames of each game, with rewards and ends of episodes, from procgen and from procgen-gym."""
    env = ppo.make_env(game, 4, 16, 0, 1)
    obs, rewards, first, _ = play(env, env.num_actions, 50)
    env.close()
    assert env.num_actions == 15 and first[0].all()
    digests = [hashlib.blake2b(x.tobytes(), digest_size=8).hexdigest() for x in (obs, rewards, first)]
    seen, *rest = GAMES_SEEN[game]
    assert (
        digests[1:] == rest and digests[0] in seen
    )  # two where the packages' Qt draws a few pixels otherwise


def test_worlds_against_a_slow_form():
    """Frames, rewards, ends are those of a world stepped by hand; the action on a last picture is ignored."""
    env = ppo.make_env("CartPole-v1", 3, 5, 100, 7)
    obs, rewards, first, actions = play(env, env.num_actions, 60)
    assert env.num_actions == 2 and obs.shape == (60, 3, 64, 64, 3) and first[1:].sum() > 3
    for e in range(3):
        world, starts, begins, last = gymnasium.make("CartPole-v1", render_mode="rgb_array"), [], True, False
        for t in range(60):
            assert first[t, e] == begins
            if begins:  # which of the five levels looks like this?
                looks = [(world.reset(seed=level), seen(world))[1] for level in range(100, 105)]
                starts.append(next(i for i, x in enumerate(looks) if np.array_equal(x, obs[t, e])))
                world.reset(seed=100 + starts[-1])
                last = False
            assert np.array_equal(seen(world), obs[t, e])
            begins, reward = last, 0
            if not last:
                _, reward, terminated, truncated, _ = world.step(int(actions[t, e]))
                last = terminated or truncated
            assert t == 59 or reward == rewards[t + 1, e]
    assert len(set(starts)) > 1


def seen(world):
    return np.asarray(Image.fromarray(world.render()).resize((64, 64), Image.BOX))


def test_frozen_lake_has_maps_and_starts():
    """A level is gymnasium's map of that seed, turned; one starts on any cell from which one can go on."""
    env = ppo.make_env("FrozenLake-v1", 8, 0, 0, 0)
    corners, starts = set(), set()
    for level in range(8):
        env.start_level, env.num_levels = level, 1
        for key in range(8):
            env.begin(0, key)
            lake = env.envs[0].unwrapped
            assert lake.desc.flat[lake.s] in b"SF"
            starts.add(int(lake.s))
        rows = np.array([list(row) for row in generate_random_map(4, seed=level)])
        assert np.array_equal(lake.desc.astype(str), np.rot90(rows, level)) and len(lake.P[5][0]) == 1
        corners.add(int(np.flatnonzero(lake.desc.ravel() == b"S")[0]))
    assert corners == {0, 3, 12, 15} and len(starts) > 12


@pytest.mark.parametrize(
    "env_id, rule", [("FrozenLake-v1", "value_iteration"), ("CartPole-v1", "linear_rule")]
)
def test_rules_as_demonstrators(tmp_path, env_id, rule):
    """Value iteration always reaches the goal; the linear rule does not let the pole fall in 60 steps."""
    flags = f"--env-id {env_id} --demonstrator {rule} --num-levels 4 --num-envs 2 --num-random-episodes 8"
    flags += " --num-train-frames 120 --num-test-frames 10"
    inline(tmp_path, "collect_expert_data", *flags.split())
    data = tmp_path / "data" / env_id
    meta = json.loads((data / "meta.json").read_text())
    rewards, first = (np.load(data / "train" / f"{name}.npy") for name in ("rewards", "first"))
    assert meta["num_actions"] == {"FrozenLake-v1": 4, "CartPole-v1": 2}[env_id] and meta["num_levels"] == 4
    assert meta["random"]["episodes"] == 8
    if env_id == "FrozenLake-v1":
        assert meta["demonstrator"]["return_mean"] == 1 and meta["demonstrator"]["episodes"] > 5
        assert 0 <= rewards.sum() - meta["demonstrator"]["episodes"] <= 2  # the last rows may end some, too
    else:
        assert first.sum() == 2 and meta["demonstrator"] == {} and rewards[1:].all()
    wrong = refusal(tmp_path, "collect_expert_data", "--env-id", "coinrun", "--demonstrator", rule)
    assert rule in wrong and "coinrun" in wrong


def test_all_stages_in_a_small_world(tmp_path):
    """PPO to fine-tuning on FrozenLake, four actions in every head."""
    short = {
        "ppo_procgen": "--total-timesteps 512 --eval-episodes 2",
        "collect_expert_data": "--demonstrator value_iteration --num-train-frames 320 --num-test-frames 80",
        "lapo_decode": "--num-labels 16",
        "lapo_finetune_ppo": "--total-timesteps 1024",
    }
    for stage, flags in TOY.items():
        flags = [flag.replace(ENV_ID, "FrozenLake-v1") for flag in flags]
        inline(tmp_path, stage, *flags, *short.get(stage, "").split())
    agents = {stage: tmp_path / f"runs/FrozenLake-v1__{stage}__1/checkpoint.pt" for stage in TOY}
    for stage in ("ppo_procgen", "lapo_finetune_ppo"):
        assert len(load(agents[stage])["agent"]["actor.bias"]) == 4
    assert len([*load(agents["lapo_decode"])["decoder"].values()][-1]) == 4


@pytest.mark.parametrize("env_id", ["minigrid:MiniGrid-Empty-5x5-v0", "ale_py:ALE/Breakout-v5"])
def test_worlds_of_other_packages(tmp_path, env_id):
    """gymnasium's MODULE:NAME plays in all stages; a slash in it makes no second folder."""
    flags = (
        f"--env-id {env_id} --no-cuda --num-envs 4 --total-timesteps 64 --num-steps 8 --scale 0.25".split()
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "evaluate", lambda *_: np.ones(2))  # episodes are long there
        inline(tmp_path, "ppo_procgen", *flags, "--patch-size", "4", "--num-minibatches", "4")
    flags = f"--env-id {env_id} --no-cuda --num-envs 4 --num-train-frames 64 --num-test-frames 40"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collect, "play_at_random", lambda *_: np.zeros(2))
        inline(tmp_path, "collect_expert_data", *flags.split())
    short = {
        "lapo_decode": "--num-labels 16 --no-cloning --eval-episodes 2",
        "lapo_finetune_ppo": "--total-timesteps 1024 --eval-episodes 2",
    }
    for stage in STAGES[2:]:
        flags = [flag.replace(ENV_ID, env_id) for flag in TOY[stage]]
        inline(tmp_path, stage, *flags, *short.get(stage, "").split())
    name = env_id.replace("/", "-")
    runs = {f"{name}__{stage}__1" for stage in STAGES}
    assert {path.name for path in (tmp_path / "runs").iterdir()} == runs
    frames = np.load(tmp_path / "data" / name / "train" / "frames.npy")
    assert frames.shape == (64, 64, 64, 3) and frames.std() > 10
    data = json.loads((tmp_path / "data" / name / "meta.json").read_text())
    assert action_names(data)[:2] == ["action 0", "action 1"]  # not Procgen's


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "nowhere:World-v0", "minigrid:World-v0"])
def test_worlds_that_cannot_be_played(tmp_path, env_id):
    """Continuous actions, packages and worlds that are not there: one sentence that names the flag."""
    assert f"--env-id {env_id}" in refusal(tmp_path, "ppo_procgen", "--env-id", env_id)
    assert not (tmp_path / "runs").exists()


def test_where_procgen_has_no_build(tmp_path, monkeypatch):
    """A sentence says so for its games; other worlds play."""
    monkeypatch.setattr(ppo, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "procgen_gym.env", None)  # as if it were not installed
    assert "Linux on x86-64" in refusal(tmp_path, "ppo_procgen", "--env-id", "coinrun")
    assert ppo.make_env("CartPole-v1", 1, 0, 0, 1).num_actions == 2


def test_scores_of_what_nobody_can_play(work):
    """tools/score_labels.py, partly labelled: accuracies on the test split's labels, as counted by hand."""
    data, rng = work / "data" / ENV_ID, np.random.default_rng(0)
    meta = json.loads((data / "meta.json").read_text())
    replace(data / "meta.json", json.dumps(meta | {"demonstrator": {}}))
    for split in ("train", "test"):
        actions = np.load(data / split / "actions.npy")
        actions[rng.random(len(actions)) < 0.7] = -1
        (data / split / "actions.npy").unlink()
        np.save(data / split / "actions.npy", actions)
    flags = f"--env-id {ENV_ID} --num-labels 32 --num-draws 2 --cloning-updates 4 --decoder-updates 20"
    inline(work, "tools/score_labels", *flags.split(), *"--vpt --vpt-updates 2 --vpt-epochs 1".split())
    results = results_of(work, "score_labels")
    rows = {(row["method"], row["n_labels"]): row for row in results["curve"]}
    assert len(rows) == 5
    first = np.load(data / "test" / "first.npy")
    t = np.flatnonzero(~first[1:-1] & ~first[2:]) + 1
    t = t[actions[t] >= 0]
    assert results["num_test_frames"] == len(t) and 30 < len(t) < 150
    share = np.bincount(actions[t], minlength=15) / len(t)
    row = rows["majority_action", 32]
    assert all(np.isclose(share, accuracy).any() for accuracy in row["accuracies"])
    assert np.log(15) - 1 < row["cross_entropy_mean"] < np.log(15) + 1
    assert row["accuracy_mean"] == pytest.approx(np.mean(row["accuracies"]))
    (data / "test" / "actions.npy").unlink()
    assert "data" in refusal(work, "tools/score_labels", *flags.split(), "--overwrite")
