"""benchmark/{altered,questions,curate}.py: which action is carried out, which frames are kept, arithmetic."""

import json
import shlex
from types import SimpleNamespace

import curate
import numpy as np
import pytest
import questions
import torch
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
        --num-train-frames 256 --num-test-frames 64 --data-dir {tmp_path}/d --runs-dir {tmp_path}""".split()
    running = process("benchmark/altered", "--random", "0.5", *command, cwd=ROOT)
    assert running.wait() == 0, running.stderr.read()
    results = tmp_path / "FrozenLake-v1__collect_expert_data__1" / "results.json"
    assert json.loads(results.read_text())["command"] == shlex.join(["python", *command])
    for split, n in (("train", 256), ("test", 64)):
        meant, happened = (np.load(tmp_path / "d" / split / f"{x}.npy") for x in ("actions", "happened"))
        assert meant.shape == happened.shape == (n,) and happened.dtype == np.int8
        assert (meant == happened).mean() == pytest.approx(0.5 + 0.5 / 4, abs=0.15)


def test_arithmetic():
    """Shares, labels for a share, the gain of a doubling and intervals, on numbers worked out by hand."""
    lapo = "LAPO + decoder"
    rows = [("random", "", 1), ("demonstrator", "", 11), (lapo, 16, 6), (lapo, 64, 10)]
    rows = [{"variant": "a", "seed": "1", "measure": m, "n_labels": str(n), "value": v} for m, n, v in rows]
    answers = questions.Answers(rows)
    assert answers.shares("a", lapo, 16) == [0.5]
    assert answers.labels_for("a", 0.7) == [32] and answers.labels_for("a", 0.95) == [np.inf]
    doubled = questions.slope([2, 4, 8], [np.array(seeds) for seeds in ([0, 5], [1, 7], [2, 9])])
    assert doubled == " (1.5 ± 6.4 a doubling)"  # 1 and 2: 12.7 x 0.5
    assert questions.interval(np.array([1.0, 2.0, 3.0])) == "2 ± 2.5"  # 4.30 x 1 / sqrt(3)
    assert questions.interval(np.array([32.0, np.inf])) == "32; inf"


def test_demonstrator(tmp_path):
    """Episodes that a time limit may have cut off do not count, or only the short ones of them would."""
    (tmp_path / "train").mkdir()
    first, returns = np.zeros((2, 300), dtype=bool), np.ones((2, 300), dtype=np.float32)
    first[:, [0, 199, 200]], returns[0, :199] = True, 0  # of 300 steps; the last begins with 100 left
    for name, array in {"first": first, "returns": returns}.items():
        np.save(tmp_path / "train" / f"{name}.npy", array.ravel())
    data = {"env_id": "FrozenLake-v1", "splits": {"train": {"num_envs": 2}}}
    (tmp_path / "meta.json").write_text(json.dumps(data))
    assert questions.demonstrator({"data_dir": tmp_path}) == 0.75


def test_what_latents_tell():
    """Bits are those of the classes, or none; accuracy counts what an action does, not its name."""
    torch.manual_seed(0)
    classes = {split: torch.arange(2048) % 4 for split in ("train", "test")}
    told = {split: torch.eye(15)[of] for split, of in classes.items()}
    noise = {split: torch.randn(2048, 15) for split in classes}
    assert questions.bits(told, classes) == pytest.approx(2, abs=0.05)
    assert questions.bits(noise, classes) < 0.05
    actions = {"test": torch.tensor([7, 8, 9, 1])}
    logits = {"test": 9 * torch.eye(15)[[6, 7, 14, 0]]}  # right, too, but one that jumps
    assert questions.accuracy(lambda x: x, logits, actions) == 0.75


def test_recall():
    """A game's last k + 1 latents, the oldest first; a new episode begins with copies of its first."""
    act = questions.recall(lambda obs: obs.float()[:, None], lambda x: x, 2)
    seen = [act(torch.tensor([step, 10 + step]), np.array([7, 8 + (step == 3)])) for step in range(4)]
    assert [x.tolist() for x in seen[2:]] == [[[0, 1, 2], [10, 11, 12]], [[1, 2, 3], [13, 13, 13]]]


def test_experiments_knows_the_questions():
    """experiments.sh passes each question on."""
    script = (ROOT / "benchmark" / "experiments.sh").read_text()
    assert " | ".join(questions.QUESTIONS) + ")" in script


def test_curate():
    """Which rows are kept, and where episodes begin among them, against a slow version."""
    rng, n = np.random.default_rng(0), 3000
    first, rewards = rng.random(n) < 0.05, rng.integers(3, size=n)
    first[0] = True
    starts = np.flatnonzero(first)
    returns = np.repeat(np.add.reduceat(rewards, starts).astype(float), np.diff([*starts, n]))
    returns[starts[-1] :] = np.nan  # cut off
    frames = np.cumsum(rng.random(n) < 0.5).astype(np.uint8)[:, None, None, None]  # half of them stand still
    rows, slow = curate.keep(frames, first, returns, 20), []
    for t in range(starts[-1]):
        if returns[t] >= 20 and (first[t + 1] or frames[t] != frames[t + 1]):
            slow.append((t, not slow or first[slow[-1][0] + 1 : t + 1].any()))
    assert 200 < len(slow) < n / 2 and list(zip(rows, curate.begins(rows, first))) == slow
