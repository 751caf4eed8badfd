"""Bad input: one sentence that says what is wrong and how to mend it, exit status 1, nothing touched."""

import io  # noqa: I001
import json
import shutil

import numpy as np
import pytest
from conftest import (
    ENV_ID, ENV_NAMES, FRESH, INPUT, READERS, STAGES, TOY, files_of, load, refusal, replace, run_dir,
)  # fmt: skip


@pytest.fixture
def refuse(work):
    """Runs a script that must refuse: its sentence, after checking that no file changed, came or went."""

    def run(stage, *flags):
        before = files_of(work)
        message = refusal(work, stage, *TOY[stage], *FRESH, *flags)
        assert files_of(work) == before and not (work / run_dir("fresh")).exists()
        return message

    return run


def test_unknown_game(refuse, work):
    """An --env-id that is no game: all games are named; no run folder is left."""
    message = refuse("ppo_procgen", "--env-id", "pong")
    assert "--env-id pong" in message and set(ENV_NAMES) <= set(message.replace(",", "").split())
    for stage in STAGES[1:]:
        assert "pong" in refuse(stage, "--env-id", "pong")
    assert not list(work.glob("*/*pong*"))


@pytest.mark.parametrize("stage", INPUT)
def test_bad_checkpoints(refuse, work, pipeline, stage):
    """Missing, empty, garbage, truncated, of another stage, game, format: the way to a good one is named."""
    flag, maker = INPUT[stage]
    good, whole = load(pipeline.checkpoints[maker]), pipeline.checkpoints[maker].read_bytes()
    bad = {
        "garbage": np.random.default_rng(0).bytes(1000),
        "empty": b"",
        "truncated": whole[: len(whole) // 2],
        "list": [1, 2],
        "old": {**good, "format_version": 4},
        "fruitbot": {**good, "env_id": "fruitbot"},
        "nowhere": None,
    }
    for name, content in bad.items():
        replace(work / f"{name}.pt", content)
    paths = [*(work / f"{name}.pt" for name in bad), work / run_dir(stage)]
    for path in [*paths, *(pipeline.checkpoints[s] for s in ("ppo_procgen", "lapo_bc") if s != maker)]:
        message = refuse(stage, flag, path)
        assert str(path) in message and f"`python {maker}.py --env-id {ENV_ID}`" in message, path
    assert "'fruitbot'" in refuse(stage, flag, work / "fruitbot.pt")
    replace(work / run_dir(maker) / "checkpoint.pt", None)  # the default's run is not finished
    replace(work / run_dir(maker) / "resume.pt", good)
    message = refuse(stage)
    assert str(run_dir(maker) / "checkpoint.pt") in message and f"`python {maker}.py" in message


def stored(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def test_bad_datasets(refuse, work):
    """Missing, truncated, of other shapes, types or games: the folder and the way to a good one are named."""
    data = work / "data" / ENV_ID
    meta, frames = json.loads((data / "meta.json").read_text()), (data / "train/frames.npy").read_bytes()
    for path, content, words in (
        ("train/frames.npy", frames[: len(frames) // 2], ""),
        ("train/frames.npy", b"no frames here", ""),
        ("train/frames.npy", b"", ""),
        ("train/frames.npy", stored(np.zeros((2000, 64, 64, 3), dtype=np.float16)), "float16"),
        ("test/frames.npy", None, "frames.npy"),
        ("train/first.npy", stored(np.zeros(1999, dtype=bool)), "(2000, 64, 64, 3)"),
        ("train/first.npy", stored(np.ones(2000, dtype=bool)), "0 windows"),
        ("train/first.npy", stored(np.zeros(2000, dtype=bool))[:1000], ""),
        ("test/first.npy", b"", ""),
        ("test/first.npy", None, "first.npy"),
        ("meta.json", "{half", ""),
        ("meta.json", "[]", ""),
        ("meta.json", json.dumps({**meta, "env_id": "fruitbot"}), "fruitbot"),
        ("meta.json", None, "meta.json"),
    ):
        kept = (data / path).read_bytes()
        replace(data / path, content)
        message = refuse("lapo_pretrain")
        assert words in message and f"data/{ENV_ID}" in message and "collect_expert_data.py" in message, path
        replace(data / path, kept)
    for content in (b"", stored(np.zeros(1999, dtype=np.int8)), stored(np.full(2000, 15)), None):
        kept = (data / "train/actions.npy").read_bytes()
        replace(data / "train/actions.npy", content)
        message = refuse("lapo_decode")
        assert f"data/{ENV_ID}/train" in message and "actions" in message
        replace(data / "train/actions.npy", kept)
    replace(data / "meta.json", json.dumps({**meta, "demonstrator": {}}))
    assert "meta.json" in refuse("lapo_decode")  # nobody can play it: tools/score_labels.py
    for reader in READERS:
        message = refuse(reader, "--data-dir", "nowhere")
        assert "nowhere" in message and "collect_expert_data.py" in message
    shutil.rmtree(data / "test")
    assert f"data/{ENV_ID}" in refuse("lapo_bc")


@pytest.mark.parametrize(
    "stage, flags",
    [
        ("ppo_procgen", "--num-minibatches 7"),
        ("ppo_procgen", "--num-envs 0"),
        ("collect_expert_data", "--num-test-frames 47"),
        ("collect_expert_data", "--demonstrator value_iteration"),
        ("lapo_pretrain", "--eval-windows 1"),
        ("lapo_bc", "--batch-size 0"),
        ("lapo_decode", "--num-labels 32 3000"),
        ("lapo_decode", "--num-labels 0 32"),
        ("lapo_decode", "--num-draws 1"),
        ("lapo_finetune_ppo", "--num-minibatches 7"),
        ("lapo_finetune_ppo", "--total-timesteps 600"),
        ("lapo_finetune_ppo", "--decoder-frames 1600 4000"),  # the last update alone
    ],
)
def test_impossible_flags(refuse, stage, flags):
    """A flag that cannot work is refused by its name or its value."""
    message, (flag, *values) = refuse(stage, *flags.split()), flags.split()
    assert flag in message or flag[5:] in message or all(value in message for value in values)
