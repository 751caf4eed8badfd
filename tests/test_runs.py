"""Runs that stop, go on, or must not: kill -9, Ctrl-C, locks, other arguments, NaN."""

import json  # noqa: I001
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    ADAM_STEP, ENV_ID, FRESH, INPUT, READERS, RUNS, STAGES, TOY, contents_of, files_of, finetune, inline,
    killed, link_tree, load, ppo, process, refusal, results_of, run_dir, same_networks,
)  # fmt: skip
from filelock import FileLock

STOP_AT = {  # in the middle of the work
    "ppo_procgen": dict(ADAM_STEP, n=60),
    "lapo_pretrain": dict(ADAM_STEP, n=3),
    "lapo_bc": dict(ADAM_STEP, n=3),
    "lapo_decode": dict(owner=torch.optim.AdamW, name="step", n=215),
    "lapo_finetune_ppo": dict(ADAM_STEP, n=60),
}


def inputs(pipeline, folder, stage):
    """What a stage reads, in a folder of its own: the dataset and the runs of the stages before it."""
    (folder / "runs").mkdir(parents=True)
    if stage != "collect_expert_data":
        link_tree(pipeline.cwd / "data", folder / "data")
    for other in STAGES[: STAGES.index(stage)]:
        link_tree(pipeline.cwd / run_dir(other), folder / run_dir(other))
    return folder


def how_far(folder):
    """What of its work an unfinished run has done."""
    state = load(folder / "resume.pt")
    return state.get("step") or state.get("iteration") or len(state["played"])


def assert_whole(cwd, name, reference):
    """Asserts that a finished run has all that a run has that was never stopped, and that it is finite."""
    results, known = results_of(cwd, name), reference.results[name]
    assert results.keys() == known.keys() and np.shape(results["curve"]) == np.shape(known["curve"])
    assert "NaN" not in json.dumps(results)
    here, there = load(cwd / run_dir(name) / "checkpoint.pt"), load(reference.checkpoints[name])
    assert here.keys() == there.keys()
    for part in {"agent", "policy", "decoder", "idm", "vq", "fdm"} & here.keys():
        assert here[part].keys() == there[part].keys()
        assert all(x.isfinite().all() for x in here[part].values())


def spoil(patch):
    """Makes every loss NaN."""
    for owner, name in ((F, "mse_loss"), (F, "cross_entropy")):
        loss = getattr(owner, name)
        patch.setattr(owner, name, lambda *args, of=loss, **how: of(*args, **how) * torch.nan)
    for module in (ppo, finetune):
        patch.setattr(module, "ppo_loss", lambda *args, of=module.ppo_loss: (of(*args)[0] * torch.nan, {}))


@pytest.mark.parametrize("name", [name for name in RUNS if name != "collect_expert_data"])
def test_the_life_of_a_run(pipeline, tmp_path, name):
    """Killed at work, then before a saved file is renamed, the same command goes on from what is saved.

    Pretraining and cloning end bit for bit as if nothing had been. In between other arguments are refused,
    but no other places; NaN ends it, and what is saved stays. Finished, it is refused without --overwrite,
    which removes what is there at once: a run that dies leaves no old checkpoint behind.
    """
    stage, flags = RUNS[name]
    cwd, flags = inputs(pipeline, tmp_path / "work", stage), [*TOY[stage], *flags]
    folder = cwd / run_dir(name)
    killed(cwd, stage, *flags, **STOP_AT[stage])
    first, before = how_far(folder), files_of(cwd)
    flag = "learning_rate" if stage in ("lapo_pretrain", "lapo_bc") else "eval_episodes"
    was = f"--{flag.replace('_', '-')} {load(folder / 'resume.pt')['args'][flag]}"
    message = refusal(cwd, stage, *flags, was.split()[0], "9")
    assert was in message and "--overwrite" in message and files_of(cwd) == before
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch)
        message = refusal(cwd, stage, *flags)
    assert "not finite" in message and "learning" in message and "--no-bf16" in message
    assert {path: before[path] for path in before if path.name == "resume.pt"} == files_of(cwd, "resume.pt")

    places = ["--runs-dir", "./runs/"]
    places += ["--data-dir", f"{cwd}/data/{ENV_ID}"] if stage in READERS else []
    places += [INPUT[stage][0], cwd / run_dir(INPUT[stage][1]) / "checkpoint.pt"] if stage in INPUT else []
    killed(cwd, stage, *flags, *places, owner=torch, name="save", n=3 if name == "lapo_finetune_ppo" else 2)
    assert list(folder.glob("*.tmp"))  # written aside, and not yet renamed
    assert how_far(folder) > first and not (folder / "results.json").exists()
    inline(cwd, stage, *flags)
    assert_whole(cwd, name, pipeline)
    assert not (folder / "resume.pt").exists()
    if stage in ("lapo_pretrain", "lapo_bc"):
        assert same_networks(folder / "checkpoint.pt", pipeline.checkpoints[name])
        assert results_of(cwd, name)["curve"] == pipeline.results[name]["curve"]
    if stage == "lapo_decode":  # the draw that was done before
        rows = zip(results_of(cwd, name)["curve"], pipeline.results[name]["curve"])
        assert all(row["returns"][0] == known["returns"][0] for row, known in rows)

    before = files_of(cwd)
    message = refusal(cwd, stage, *flags)
    assert "finished run" in message and "--overwrite" in message and files_of(cwd) == before
    killed(cwd, stage, *flags, "--overwrite", **dict(STOP_AT[stage], n=1))
    assert not {"results.json", "checkpoint.pt", "resume.pt"} & {path.name for path in folder.iterdir()}


def test_a_stopped_collection_begins_anew(pipeline, tmp_path):
    """Killed in its middle it leaves no dataset; the same command then makes it as if nothing had been."""
    stage, cwd = "collect_expert_data", inputs(pipeline, tmp_path / "work", "collect_expert_data")
    killed(cwd, stage, *TOY[stage], owner=np, name="save", n=6)  # in the test split
    assert "no whole dataset" in refusal(cwd, "lapo_pretrain", *TOY["lapo_pretrain"])
    inline(cwd, stage, *TOY[stage])
    assert contents_of(cwd / "data", ".npy") == contents_of(pipeline.cwd / "data", ".npy")
    assert results_of(cwd, stage)["returns"] == pipeline.results[stage]["returns"]
    other = [*TOY[stage], *FRESH]  # a dataset of another run is not replaced without --overwrite
    before = files_of(cwd / "data")
    message = refusal(cwd, stage, *other)
    assert f"data/{ENV_ID}" in message and "--overwrite" in message and files_of(cwd / "data") == before
    killed(cwd, stage, *other, "--overwrite", owner=np, name="save", n=3)
    assert "no whole dataset" in refusal(cwd, "lapo_pretrain", *TOY["lapo_pretrain"], *FRESH)


def saving(*flags, cwd):
    """A pretraining that saves all the time, in a process of its own, as soon as it has saved."""
    running = process("tests/rank", "lapo_pretrain", *flags, cwd=cwd, SAVE_SECONDS="0")
    while not (cwd / run_dir("fresh") / "resume.pt").exists() and running.poll() is None:
        time.sleep(0.02)
    return running


def test_processes(pipeline, tmp_path):
    """Ctrl-C ends a process without traceback; while one runs, another is refused; kill -9 loses nothing."""
    flags = [*TOY["lapo_pretrain"], *FRESH, "--num-updates", "40", "--eval-every", "40"]
    cwd, whole = (inputs(pipeline, tmp_path / name, "lapo_pretrain") for name in ("killed", "whole"))
    running = saving(*flags, cwd=cwd)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode in (130, -signal.SIGINT) and "Traceback" not in err, err
    step = how_far(cwd / run_dir("fresh"))

    running = saving(*flags, cwd=cwd)
    while how_far(cwd / run_dir("fresh")) == step and running.poll() is None:
        time.sleep(0.02)
    running.send_signal(signal.SIGSTOP)
    for more in ([], ["--overwrite"]):
        message = refusal(cwd, "lapo_pretrain", *flags, *more)
        assert "another process" in message and str(run_dir("fresh")) in message
    running.kill()
    assert running.wait(60) == -signal.SIGKILL
    assert 0 < step < how_far(cwd / run_dir("fresh")) < 40
    for folder in (cwd, whole):
        inline(folder, "lapo_pretrain", *flags)
    assert same_networks(*(folder / run_dir("fresh") / "checkpoint.pt" for folder in (cwd, whole)))


@pytest.mark.parametrize("stage", STAGES)
def test_one_process_a_folder(work, stage):
    """A run folder in another process's hands is refused, unchanged, and so is a dataset."""
    collects = stage == "collect_expert_data"
    flags = [*TOY[stage], *FRESH, *(["--data-dir", "fresh"] if collects else [])]
    for folder in [run_dir("fresh"), Path("fresh")] if collects else [run_dir("fresh")]:
        (work / folder).mkdir(exist_ok=True)
        with FileLock(work / folder / ".lock"):
            before = files_of(work)
            for more in ([], ["--overwrite"]):
                message = refusal(work, stage, *flags, *more)
                assert "another process" in message and str(folder) in message
            assert files_of(work) == before


def test_a_dead_idm(work, monkeypatch):
    """Pretraining ends where the IDM's last ReLU is shut for all windows: no gradient would open it again."""
    monkeypatch.setattr(torch.nn.Flatten, "forward", lambda self, x: -x.flatten(1).abs())  # before that ReLU
    message = refusal(work, "lapo_pretrain", *TOY["lapo_pretrain"], *FRESH)
    assert "dead at update 3" in message and "--learning-rate" in message
    assert not (work / run_dir("fresh") / "results.json").exists()


def test_tracking(pipeline, tmp_path, monkeypatch):
    """--track gives Weights & Biases scalars, pictures, arguments; without wandb a sentence says so."""
    flags = [*TOY["lapo_pretrain"], *FRESH, "--track"]
    cwd = inputs(pipeline, tmp_path / "there", "lapo_pretrain")
    running = process("lapo_pretrain", *flags, cwd=cwd, WANDB_MODE="offline", WANDB_DIR=str(cwd))
    _, err = running.communicate(timeout=120)
    assert running.returncode == 0, err
    (log,) = cwd.glob("wandb/offline-run-*/run-*.wandb")
    content = log.read_bytes()
    expected = "losses/fdm_loss", "test/now_next_predicted", f"{ENV_ID}__fresh__1", "vq_num_codes"
    assert [word for word in expected if word.encode() not in content] == []
    monkeypatch.setitem(sys.modules, "wandb", None)  # as where it is not installed
    assert "pip install wandb" in refusal(cwd, "lapo_pretrain", *flags, "--overwrite")
