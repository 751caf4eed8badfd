"""Bad input: one sentence that says what is wrong and how to mend it, exit status 1, nothing touched."""

import json  # noqa: I001
import os

import numpy as np
import pytest
import torch
from conftest import (
    ENV_ID, ENV_NAMES, FRESH, INPUT, READERS, STAGES, TOY, link_tree, load, refusal, replace, run_dir,
    snapshot,
)  # fmt: skip


@pytest.fixture
def refuse(work):
    """Runs a script that must refuse: its sentence, after checking that no file changed, came or went."""

    def run(stage, *flags):
        before = snapshot(work)
        message = refusal(work, stage, *TOY[stage], *FRESH, *flags)
        assert snapshot(work) == before and not (work / run_dir("fresh")).exists()
        return message

    return run


def test_unknown_game(refuse):
    """The script that needs nothing but a game refuses an unknown --env-id with the names of all games."""
    message = refuse("ppo_procgen", "--env-id", "pong")
    assert "--env-id pong" in message and set(ENV_NAMES) <= set(message.replace(",", "").split())


@pytest.mark.parametrize("stage", INPUT)
def test_bad_checkpoints(refuse, work, pipeline, stage):
    """Missing, empty, garbage, truncated, of another stage, game, format: the way to a good one is named."""
    flag, maker = INPUT[stage]
    good, whole = load(pipeline.checkpoints[maker]), pipeline.checkpoints[maker].read_bytes()
    garbage = np.random.default_rng(0).bytes(1000)
    bad = {"garbage": garbage, "empty": b"", "truncated": whole[: len(whole) // 2], "text": b"no pickle"}
    for name, content in bad.items():
        (work / f"{name}.pt").write_bytes(content)
    bad |= {"list": [1, 2], "old": {**good, "format_version": 4}, "fruitbot": {**good, "env_id": "fruitbot"}}
    for name in ("list", "old", "fruitbot"):
        torch.save(bad[name], work / f"{name}.pt")
    paths = [work / f"{name}.pt" for name in ("nowhere", *bad)]
    for path in [*paths, *(pipeline.checkpoints[s] for s in STAGES if s != maker)]:
        message = refuse(stage, flag, path)
        assert str(path) in message and f"`python {maker}.py --env-id {ENV_ID}`" in message, path
    assert "'fruitbot'" in refuse(stage, flag, work / "fruitbot.pt")
    if stage != "collect_expert_data":  # whose toy flags name the checkpoint
        message = refuse(stage, "--seed", "7")
        assert str(run_dir(maker, 7) / "checkpoint.pt") in message and f"{maker}.py" in message


def test_bad_datasets(refuse, work):
    """Missing, truncated, of other shapes, types or games: the folder and the way to a good one are named."""
    data = work / "data" / ENV_ID
    kept, meta = link_tree(data, work / "kept"), json.loads((data / "meta.json").read_text())
    frames = (data / "train" / "frames.npy").read_bytes()
    np.save(work / "short.npy", np.zeros(1999, dtype=bool))
    np.save(work / "alone.npy", np.ones(2000, dtype=bool))
    np.save(work / "float.npy", np.zeros((2000, 64, 64, 3), dtype=np.float16))
    for path, content, words in (
        ("train/frames.npy", frames[: len(frames) // 2], ""),
        ("train/frames.npy", b"no frames here", ""),
        ("train/frames.npy", (work / "float.npy").read_bytes(), "float16"),
        ("test/frames.npy", None, "frames.npy"),
        ("train/first.npy", (work / "short.npy").read_bytes(), "(2000, 64, 64, 3)"),
        ("train/first.npy", (work / "alone.npy").read_bytes(), "0 windows"),
        ("test/first.npy", None, "first.npy"),
        ("meta.json", "{half", ""),
        ("meta.json", "[]", ""),
        ("meta.json", json.dumps({**meta, "env_id": "fruitbot"}), "fruitbot"),
        ("meta.json", None, "meta.json"),
    ):
        (data / path).unlink() if content is None else replace(data / path, content)
        message = refuse("lapo_pretrain")
        assert words in message and f"data/{ENV_ID}" in message and "collect_expert_data.py" in message, path
        (data / path).unlink(missing_ok=True)
        os.link(kept / path, data / path)
    for reader in READERS:
        message = refuse(reader, "--data-dir", "nowhere")
        assert "nowhere" in message and "collect_expert_data.py" in message


@pytest.mark.parametrize(
    "stage, flags",
    [
        ("ppo_procgen", "--num-minibatches 7"),
        ("ppo_procgen", "--num-envs 0"),
        ("collect_expert_data", "--num-test-frames 47"),
        ("lapo_pretrain", "--eval-windows 1"),
        ("lapo_pretrain", "--sync-batch-norm"),
        ("lapo_bc", "--batch-size 0"),
        ("lapo_decode", "--num-labels 32 3000"),
        ("lapo_decode", "--num-labels 0 32"),
        ("lapo_finetune_ppo", "--num-minibatches 7"),
        ("lapo_finetune_ppo", "--total-timesteps 600"),
        ("lapo_finetune_ppo", "--decoder-frames 1600 4000"),  # the last update alone
    ],
)
def test_impossible_flags(refuse, stage, flags):
    """A flag that cannot work is refused by its name or its value."""
    message, (flag, *values) = refuse(stage, *flags.split()), flags.split()
    assert flag in message or flag[5:] in message or all(value in message for value in values)
