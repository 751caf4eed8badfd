"""Bad input: one sentence that says what is wrong and how to mend it, a non-zero exit, and nothing on disk touched."""

import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ENV_ID, STAGES, TOY, collect, finetune, inline, link_tree, replace, run_dir, snapshot, start

OTHER = "fruitbot"
INPUT = {  # stage -> (flag that names its checkpoint, stage that makes it)
    "collect_expert_data": ("--expert-checkpoint", "collect_expert_data"),
    "lapo_pretrain": (None, None),
    "lapo_bc": ("--pretrain-checkpoint", "lapo_pretrain"),
    "lapo_decode": ("--bc-checkpoint", "lapo_bc"),
    "lapo_finetune_ppo": ("--bc-checkpoint", "lapo_bc"),
}
FRESH = ["--exp-name", "fresh"]  # a run folder that is not there yet
READERS = STAGES[1:4]  # of the dataset


@pytest.fixture
def work(pipeline, tmp_path):
    """A copy of the finished toy pipeline's folder (the dataset by hard links)."""
    shutil.copytree(pipeline.cwd / "runs", tmp_path / "work" / "runs")
    link_tree(pipeline.cwd / "data", tmp_path / "work" / "data")
    return tmp_path / "work"


@pytest.fixture
def refuse(work, monkeypatch):
    """Runs a script that must refuse: returns its sentence, after checking its form and that no file changed, came or went."""

    def run(stage, *flags):
        before = snapshot(work)
        with pytest.raises(SystemExit) as caught:
            inline(monkeypatch, work, stage, *TOY[stage], *flags)
        message = caught.value.code
        assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message
        assert snapshot(work) == before
        return message

    return run


def fresh_data(stage, name="elsewhere"):
    """Flags that keep a run away from what is finished."""
    return [*FRESH, "--data-dir", name] if stage == "collect_expert_data" else FRESH


@pytest.mark.parametrize("stage", ["collect_expert_data", "lapo_decode", "lapo_finetune_ppo"])  # the others only read a dataset
def test_unknown_game(refuse, stage):
    """An unknown --env-id is refused with the names of all 16 games."""
    message = refuse(stage, "--env-id", "pong")
    assert "--env-id pong" in message
    assert all(game in message.replace(",", "").split() for game in finetune.PAPER_SCORES) and len(finetune.PAPER_SCORES) == 16


@pytest.mark.parametrize("stage", STAGES)
def test_finished_run_is_not_replaced(refuse, stage):
    """A run folder that holds results is refused without --overwrite."""
    assert "already holds a finished run" in (message := refuse(stage)) and "--overwrite" in message


def test_finished_dataset_is_not_replaced(refuse):
    """A finished dataset is refused without --overwrite, also by a run of another name."""
    assert f"data/{ENV_ID} already holds" in refuse("collect_expert_data", *FRESH)


def test_overwrite_replaces(work, monkeypatch):
    """With --overwrite the finished run is replaced by the new one."""
    folder = work / run_dir("lapo_pretrain")
    inline(monkeypatch, work, "lapo_pretrain", *TOY["lapo_pretrain"], "--overwrite", "--num-updates", "2")
    assert json.loads((folder / "results.json").read_text())["updates"] == 2
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["meta"]["updates"] == 2
    assert len(list(folder.glob("events.out.tfevents.*"))) == 1 and not (folder / "checkpoint.pt.tmp").exists()


@pytest.mark.parametrize("stage", READERS)
def test_missing_dataset(refuse, stage):
    """A missing dataset is refused with the command that makes it."""
    message = refuse(stage, *FRESH, "--data-dir", "nowhere")
    assert "no dataset at nowhere" in message and f"`python collect_expert_data.py --env-id {ENV_ID} --data-dir nowhere`" in message


@pytest.mark.parametrize("stage", [s for s in STAGES if INPUT[s][0]])
def test_bad_checkpoints(refuse, work, pipeline, stage):
    """A checkpoint that is missing, garbage, truncated, of another stage, game or format is refused with the command that makes a good one."""
    flag, maker = INPUT[stage]
    wrong_stage = pipeline.checkpoints[next(s for s in STAGES if s != maker)]
    content = pipeline.checkpoints[maker].read_bytes()
    (work / "garbage.pt").write_bytes(np.random.default_rng(0).bytes(1000))
    (work / "empty.pt").write_bytes(b"")
    (work / "truncated.pt").write_bytes(content[: len(content) // 2])
    torch.save([1, 2], work / "list.pt")
    torch.save({"meta": {"format_version": 0, "stage": maker, "env_id": ENV_ID}}, work / "old.pt")
    command = f"`python {maker}.py --env-id {ENV_ID}`"
    for path, words in (
        ("nowhere.pt", "no checkpoint at nowhere.pt"),
        ("garbage.pt", "cannot be read"),
        ("empty.pt", "cannot be read"),
        ("truncated.pt", "cannot be read"),
        ("list.pt", "cannot be read"),
        ("old.pt", f"has format_version 0, expected {collect.FORMAT_VERSION}"),
        (wrong_stage, f"expected {maker}"),
    ):
        message = refuse(stage, *fresh_data(stage), flag, path)
        assert words in message and command in message, path
    message = refuse(stage, *fresh_data(stage), flag, pipeline.checkpoints[maker], "--env-id", OTHER)
    assert f"has env_id {ENV_ID}, expected {OTHER}" in message and f"--env-id {OTHER}`" in message


@pytest.mark.parametrize("stage", ["lapo_bc", "lapo_decode", "lapo_finetune_ppo"])
def test_missing_default_checkpoint(refuse, stage):
    """Without the stage before it, a script names the file it looked for and the command that makes it."""
    maker = INPUT[stage][1]
    message = refuse(stage, *FRESH, "--seed", "7")
    assert str(run_dir(maker, 7) / "checkpoint.pt") in message and f"`python {maker}.py --env-id {ENV_ID} --seed 7`" in message


@pytest.mark.parametrize("stage", READERS)
def test_bad_datasets(refuse, work, stage):
    """A dataset that is damaged, of another game or of another format is refused, with the file's name and the way to mend it."""
    data = work / "data" / ENV_ID
    kept = link_tree(data, work / "kept")
    meta = json.loads((data / "meta.json").read_text())
    frames = (data / "train" / "frames.npy").read_bytes()
    for path, content, words in (
        ("train/frames.npy", frames[: len(frames) // 2], "train/frames.npy is missing or damaged"),
        ("train/frames.npy", b"", "train/frames.npy is missing or damaged"),
        ("train/frames.npy", b"no frames here", "train/frames.npy is missing or damaged"),
        ("train/first.npy", np.zeros(1999, dtype=bool), "train/first.npy holds (1999,) bool, expected (2000,) bool"),
        ("train/first.npy", np.zeros((2000, 1), dtype=bool), "expected (2000,) bool"),
        ("train/first.npy", np.zeros(2000, dtype=np.uint8), "uint8, expected (2000,) bool"),
        ("meta.json", "{half", "meta.json is not JSON"),
        ("meta.json", "[]", "holds no dictionary"),
        ("meta.json", json.dumps({**meta, "env_id": OTHER}), f"has env_id {OTHER}, expected {ENV_ID}"),
        ("meta.json", json.dumps({**meta, "format_version": 2}), "has format_version 2, expected 1"),
        ("train/actions.npy", np.zeros(1999, dtype=np.int8), "train/actions.npy holds (1999,) int8, expected (2000,) int8"),
    ):
        if path == "train/actions.npy" and stage == "lapo_bc":
            continue  # reads no labels
        replace(data / path, content)
        message = refuse(stage, *FRESH)
        assert words in message and "collect" in message and "collect_expert_data.py" in message, message
        (data / path).unlink()
        os.link(kept / path, data / path)
    (data / "train" / "first.npy").unlink()
    assert "train/first.npy is missing" in refuse(stage, *FRESH)


def test_more_labels_than_windows(refuse, work):
    """Asking for more labels than there are, for none, or for a table at another count is refused, naming flag and numbers."""
    first = np.load(work / "data" / ENV_ID / "train" / "first.npy")
    windows = str((~first[1:-1] & ~first[2:]).sum())
    for counts in (("32", "3000"), ("0", "32")):
        message = refuse("lapo_decode", *FRESH, "--num-labels", *counts)
        assert f"--num-labels ({', '.join(counts)})" in message and windows in message
    assert "--table-labels 64" in refuse("lapo_decode", *FRESH, "--table-labels", "64")
    assert "--pseudo-labels" in refuse("lapo_decode", *FRESH, "--latent-steps", "2")


@pytest.mark.parametrize("stage", ["lapo_pretrain", "lapo_bc"])
def test_batch_larger_than_the_data(refuse, stage):
    """A batch that exceeds the windows of a split is refused with both numbers."""
    assert "--batch-size 100000" in (message := refuse(stage, *FRESH, "--batch-size", "100000")) and "train windows" in message
    assert "test windows" in refuse(stage, *FRESH, "--batch-size", "1000")


def test_sizes_that_do_not_fit(refuse):
    """Minibatches that do not divide the rollout, splits below one window per game, and runs that end in the warm-up are refused."""
    for stage in ("collect_expert_data", "lapo_finetune_ppo"):
        assert "--num-minibatches 7" in (message := refuse(stage, *fresh_data(stage), "--num-minibatches", "7")) and "512" in message
    assert "--num-test-frames 47" in refuse("collect_expert_data", *fresh_data("collect_expert_data"), "--num-test-frames", "47")
    assert "--total-timesteps 700" in refuse("lapo_finetune_ppo", *FRESH, "--total-timesteps", "700")
    assert "--decoder-frames 1600 4000" in refuse("lapo_finetune_ppo", *FRESH, "--decoder-frames", "1600", "4000")  # the last update alone


@pytest.mark.parametrize("stage", ["lapo_pretrain", "lapo_finetune_ppo"])
def test_errors_reach_the_shell(pipeline, stage):
    """As a process, a refusal is exit status 1, one line of its own on stderr, and no traceback."""
    done = start(stage, *TOY[stage], cwd=pipeline.cwd)
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == [done.stderr.splitlines()[-1]]
    assert "Traceback" not in done.stderr


def test_interrupted_collection_is_no_dataset(work, monkeypatch, refuse, pipeline):
    """A collection that dies half way leaves no meta.json, so that pretraining does not take the remains for a dataset."""
    shutil.rmtree(work / "data")  # collecting writes into existing files, which are hard links here
    shutil.copytree(pipeline.data, work / "data" / ENV_ID)

    def die(*args):
        raise KeyboardInterrupt

    flags = ["--expert-checkpoint", pipeline.checkpoints["collect_expert_data"], "--overwrite", "--eval-episodes", "2"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "pwrite", die)
        inline(patch, work, "collect_expert_data", *TOY["collect_expert_data"], *flags)
    assert "no dataset" in refuse("lapo_pretrain", *FRESH)


def test_interrupted_save_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    """A save that dies half way leaves the checkpoint before it whole."""
    path = tmp_path / "checkpoint.pt"
    meta = {"stage": "s", "env_id": "e", "num_levels": 0, "start_level": 0, "args": {}}
    collect.save_checkpoint(path, meta, model={"w": torch.ones(3)})
    before = path.read_bytes()

    def half(value, target):
        target.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", half)
        collect.save_checkpoint(path, meta, model={"w": torch.zeros(3)})
    assert path.read_bytes() == before
    loaded = collect.load_checkpoint(path, "s", SimpleNamespace(env_id="e", allow_unfinished=False), "make")
    assert torch.equal(loaded["model"]["w"], torch.ones(3))
