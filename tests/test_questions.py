"""benchmark/altered.py: which action is carried out where games are delayed, sticky or random."""

import json
import shlex
from types import SimpleNamespace

import numpy as np
import pytest
from altered import STAY, Altered
from conftest import ROOT, process

E, T = 3, 400


@pytest.fixture
def played():
    """(how, actions (T, E), when episodes begin (T, E)) -> what was carried out (T, E)."""

    def play(actions, first, **how):
        done, steps = [], iter(first)
        env = SimpleNamespace(num=E, observe=lambda: (0, {}, next(steps)), act=done.append)
        games = Altered(env, **how)
        for now in actions:
            games.observe()
            games.act(now)
        assert np.array_equal(np.stack(done), np.stack(games.happened))
        return np.stack(done)

    rng = np.random.default_rng(0)
    actions, first = rng.integers(15, size=(T, E)), rng.random((T, E)) < 0.05
    first[0] = True
    return SimpleNamespace(play=play, actions=actions, first=first)


@pytest.mark.parametrize("k", [0, 1, 3])
def test_delay(played, k):
    """An action is carried out k steps later in its episode; the first k are STAY. Against a slow version."""
    done, since = played.play(played.actions, played.first, delay=k), np.zeros(E, dtype=int)
    for t in range(T):
        since = np.where(played.first[t], 0, since + 1)
        for e in range(E):
            assert done[t, e] == (played.actions[t - k, e] if since[e] >= k else STAY)


def test_sticky_and_random(played):
    """The rates are those asked for; an episode's first action is never another episode's."""
    always = played.play(played.actions, played.first, sticky=1.0)
    assert np.array_equal(always, np.where(played.first, played.actions, np.roll(always, 1, axis=0)))
    for how in ("sticky", "random"):  # 1,200 actions, and one in 15 is the same by luck
        done = played.play(played.actions, played.first, **{how: 0.25})
        assert (done != played.actions).mean() == pytest.approx(0.25 * 14 / 15, abs=0.04)


def test_collects_what_happened(tmp_path):
    """Beside the actions that were meant lie those that were carried out, in the order of the frames.

    Nothing else differs from an unaltered run, its command in results.json neither: questions.py compares it.
    """
    command = f"""collect_expert_data.py --env-id FrozenLake-v1 --demonstrator value_iteration --num-envs 4
        --num-train-frames 256 --num-test-frames 64 --num-random-episodes 4
        --data-dir {tmp_path}/d --runs-dir {tmp_path}""".split()
    running = process("benchmark/altered", "--random", "0.5", *command, cwd=ROOT)
    assert running.wait() == 0, running.stderr.read()
    results = tmp_path / "FrozenLake-v1__collect_expert_data__1" / "results.json"
    assert json.loads(results.read_text())["command"] == shlex.join(["python", *command])
    for split, n in (("train", 256), ("test", 64)):
        meant, happened = (np.load(tmp_path / "d" / split / f"{x}.npy") for x in ("actions", "happened"))
        assert meant.shape == happened.shape == (n,) and happened.dtype == np.int8
        assert (meant == happened).mean() == pytest.approx(0.5 + 0.5 / 4, abs=0.15)
