"""Runs that stop, go on, or must not: resume, signals, kill -9, locks, a full disk, losses not finite."""

import fcntl  # noqa: I001
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    ADAM_STEP, ENV_ID, FRESH, INPUT, NOW, READERS, ROOT, RUNS, STAGES, TOY, command, inline, interrupted,
    kill, link_tree, load, refusal, replace, results_of, run_dir, same_tensors, scalars, snapshot, start,
)  # fmt: skip

# of results.json and meta.json: differ between equal runs
PASSING = {"wall_seconds", "command", "identity", "checkpoint_seconds", "data", "commit"}
FSYNC = {"owner": os, "name": "fsync"}  # of every file that is written whole
STOP_AT = {  # in the middle of the work
    "ppo_procgen": dict(ADAM_STEP, n=30),
    "collect_expert_data": dict(owner=os, name="pwrite", n=1000),
    "lapo_pretrain": dict(ADAM_STEP, n=2),
    "lapo_bc": dict(ADAM_STEP, n=3),
    "lapo_decode": dict(owner=torch.optim.AdamW, name="step", n=300),
    "lapo_finetune_ppo": dict(ADAM_STEP, n=30),
}


def inputs(pipeline, folder, stage):
    """What a stage reads, in a folder of its own: the dataset and the runs of the stages before it."""
    (folder / "runs").mkdir(parents=True)
    if stage != "collect_expert_data":
        link_tree(pipeline.cwd / "data", folder / "data")
    for other in STAGES[: STAGES.index(stage)]:
        link_tree(pipeline.cwd / run_dir(other), folder / run_dir(other))
    return folder


def now(stage):
    """The flag that saves whenever that is possible, for stages that have it: decoding always does."""
    return [] if stage == "lapo_decode" else NOW


def read(path):
    """A results.json or meta.json without what differs between equal runs."""
    return json.loads(path.read_text(), object_hook=lambda d: {k: d[k] for k in d.keys() - PASSING})


def age_events(folder):
    """Older names for a stopped run's TensorBoard files: they are read by name, which is their second."""
    aged = "events.out.tfevents.000"
    for path in sorted(folder.glob("events.out.tfevents.*")):
        if not path.name.startswith(aged):
            path.rename(folder / f"{aged}{1000 + len(list(folder.glob(aged + '*')))}")


def assert_same_run(again, reference, name):
    """Asserts that two working directories hold the same finished run, apart from times."""
    folder, known = again / run_dir(name), reference / run_dir(name)
    assert read(folder / "results.json") == read(known / "results.json")
    assert scalars(folder) == scalars(known)
    assert not (folder / "resume.pt").exists() and not list(again.rglob("*.tmp"))
    if name != "collect_expert_data":
        assert same_tensors(folder / "checkpoint.pt", known / "checkpoint.pt")
        return
    for path in (reference / "data").rglob("*.npy"):
        assert (again / path.relative_to(reference)).read_bytes() == path.read_bytes(), path.name
    meta = f"data/{ENV_ID}/meta.json"
    assert read(again / meta) == read(reference / meta)


@pytest.mark.parametrize("name", [name for name in RUNS if name != "collect_expert_data"])
def test_resumed_equals_uninterrupted(pipeline, tmp_path, capsys, name):
    """Stopped by Ctrl-C, then killed while it writes a file, it ends as if nothing had been, bit for bit."""
    stage, more = RUNS[name]
    cwd, flags = inputs(pipeline, tmp_path / "work", stage), [*TOY[stage], *more, *now(stage)]
    folder = cwd / run_dir(name)
    assert interrupted(cwd, stage, *flags, **STOP_AT[stage]) == 130
    assert f"goes on with: {command(stage, *flags)}\n" in capsys.readouterr().out
    age_events(folder)
    saved = load(folder / "resume.pt")
    assert interrupted(cwd, stage, *flags, **FSYNC, n=2, action=kill) == "killed"
    assert list(cwd.rglob("*.tmp")) and not (folder / "results.json").exists()
    assert load(folder / "resume.pt")["step"] >= saved["step"]
    age_events(folder)
    capsys.readouterr()
    inline(cwd, stage, *flags)
    assert f"going on in {run_dir(name)}" in capsys.readouterr().out
    assert_same_run(cwd, pipeline.cwd, name)


def test_a_stopped_collection_begins_anew(pipeline, tmp_path):
    """Stopped in its middle it leaves no dataset; the same command then makes it as if nothing had been."""
    stage, cwd = "collect_expert_data", inputs(pipeline, tmp_path / "work", "collect_expert_data")
    assert interrupted(cwd, stage, *TOY[stage], **STOP_AT[stage]) == 130
    assert "no whole dataset" in refusal(cwd, "lapo_pretrain", *TOY["lapo_pretrain"])
    age_events(cwd / run_dir(stage))
    inline(cwd, stage, *TOY[stage])
    assert_same_run(cwd, pipeline.cwd, stage)


def process(stage, *flags, cwd):
    """A script in a process of its own, as soon as its resume.pt is there."""
    script = [sys.executable, str(ROOT / f"{stage}.py"), *flags]
    started = subprocess.Popen(script, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (cwd / run_dir("fresh") / "resume.pt").exists() and started.poll() is None:
        time.sleep(0.02)
    return started


def test_sigterm_to_a_process(tmp_path):
    """SIGTERM: saved, status 143, and the command that goes on. Before that, what a reader needs, no more."""
    flags = [*TOY["ppo_procgen"], *FRESH, *NOW, "--total-timesteps", "1000000"]
    running = process("ppo_procgen", *flags, "--overwrite", cwd=tmp_path)
    running.send_signal(signal.SIGTERM)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 143 and not list(tmp_path.rglob("*.tmp")), err
    assert out.split("\n\n")[0].splitlines() == [f"run {run_dir('fresh')}", f"{ENV_ID}: cpu, float32"]
    assert "Gym" not in err and "Traceback" not in err and "Warning" not in err
    (line,) = re.findall(r"goes on with: python (.*)", out)
    assert shlex.split(line) == [str(ROOT / "ppo_procgen.py"), *flags]
    step = load(tmp_path / run_dir("fresh") / "resume.pt")["step"]
    assert interrupted(tmp_path, "ppo_procgen", *flags, **ADAM_STEP, n=1) == 130
    assert 0 < step < load(tmp_path / run_dir("fresh") / "resume.pt")["step"] == step + 512


def test_kill_9_and_a_second_process(pipeline, tmp_path):
    """While a process runs, another is refused; after kill -9 files are whole, and the run goes on."""
    flags = [*TOY["lapo_pretrain"], *FRESH, "--num-updates", "60"]
    cwd, reference = (inputs(pipeline, tmp_path / name, "lapo_pretrain") for name in ("killed", "reference"))
    running = process("lapo_pretrain", *flags, *NOW, cwd=cwd)
    running.send_signal(signal.SIGSTOP)
    second = start("lapo_pretrain", *flags, cwd=cwd)
    running.kill()
    assert running.wait(60) == -signal.SIGKILL
    assert second.returncode == 1 and len(second.stderr.splitlines()) == 1
    assert second.stderr.startswith("error: ") and "another process" in second.stderr
    assert 0 < load(cwd / run_dir("fresh") / "resume.pt")["step"] < 60
    age_events(cwd / run_dir("fresh"))
    for folder in (cwd, reference):
        inline(folder, "lapo_pretrain", *flags)
    assert_same_run(cwd, reference, "fresh")


@pytest.mark.parametrize("stage", STAGES)
def test_one_process_a_folder(work, stage):
    """A run folder in another process's hands is refused, unchanged, and so is a dataset."""
    collects = stage == "collect_expert_data"
    flags = [*TOY[stage], *FRESH, *["--data-dir", "fresh"] * collects]
    for folder in [run_dir("fresh"), *[Path("fresh")] * collects]:
        (work / folder).mkdir(exist_ok=True)
        before = snapshot(work)
        with open(work / folder / ".lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for more in ([], ["--overwrite"]):
                message = refusal(work, stage, *flags, *more)
                assert "another process" in message and str(folder) in message
        assert snapshot(work) == before


def unfinish(folder, **changes):
    """Makes a finished run, in a link_tree, look like one that was stopped."""
    (folder / "results.json").unlink()
    (folder / "checkpoint.pt").rename(folder / "resume.pt")
    replace(folder / "resume.pt", load(folder / "resume.pt") | {"step": 0} | changes)


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "collect_expert_data"])
def test_what_a_run_refuses(work, stage):
    """A finished run without --overwrite; an unfinished one with other arguments, or an input made anew."""
    before = snapshot(work)
    message = refusal(work, stage, *TOY[stage])
    assert "finished run" in message and "--overwrite" in message and snapshot(work) == before
    unfinish(work / run_dir(stage))
    flag = "learning_rate" if stage in ("lapo_pretrain", "lapo_bc") else "eval_episodes"
    was = load(work / run_dir(stage) / "resume.pt")["args"][flag]
    before = snapshot(work)
    message = refusal(work, stage, *TOY[stage], f"--{flag.replace('_', '-')}", "9")
    assert f"{{'{flag}': {was}}}" in message and "--overwrite" in message
    changes = {}
    if stage in INPUT:
        path = work / run_dir(INPUT[stage][1]) / "checkpoint.pt"
        changes[path] = load(path) | {"identity": "another"}
    if stage in READERS:
        path = work / "data" / ENV_ID / "meta.json"
        changes[path] = json.dumps(json.loads(path.read_text()) | {"identity": "another"})
    for path, content in changes.items():
        kept = path.read_bytes()
        replace(path, content)
        message = refusal(work, stage, *TOY[stage])
        assert "'inputs'" in message and "--overwrite" in message
        replace(path, kept)
    assert snapshot(work) == before


def test_overwrite(work, capsys):
    """--overwrite replaces a finished run, and begins an unfinished one afresh, also with other arguments."""
    found = [results_of(work, "lapo_pretrain")]
    for updates in ("2", "1"):
        inline(work, "lapo_pretrain", *TOY["lapo_pretrain"], "--overwrite", "--num-updates", updates)
        found.append(results_of(work, "lapo_pretrain"))
        unfinish(work / run_dir("lapo_pretrain"), step=1)
    assert "going on" not in capsys.readouterr().out and len({results["identity"] for results in found}) == 3
    assert [results["args"]["num_updates"] for results in found] == [6, 2, 1]


@pytest.mark.parametrize("stage", INPUT)
def test_unfinished_checkpoints(work, stage):
    """An unfinished input is refused with the command that finishes it, and taken with --allow-unfinished."""
    made_by = INPUT[stage][1]
    unfinish(work / run_dir(made_by))
    flags = [*TOY[stage], *FRESH, *["--data-dir", "fresh"] * (stage == "collect_expert_data")]
    message = refusal(work, stage, *flags)
    assert str(run_dir(made_by)) in message and "unfinished" in message and "--allow-unfinished" in message
    assert f"`{command(made_by, *TOY[made_by])}`" in message and not (work / run_dir("fresh")).exists()
    inline(work, stage, *flags, "--allow-unfinished")
    assert results_of(work, "fresh")["stage"] == stage


def test_a_dataset_of_another_run_is_not_replaced(work):
    """It is refused without --overwrite; with it, a collection that is killed leaves no dataset."""
    flags, before = [*TOY["collect_expert_data"], *FRESH], snapshot(work / "data")
    message = refusal(work, "collect_expert_data", *flags)
    assert f"data/{ENV_ID}" in message and "--overwrite" in message and snapshot(work / "data") == before
    stop = dict(STOP_AT["collect_expert_data"], action=kill)
    assert interrupted(work, "collect_expert_data", *flags, "--overwrite", **stop) == "killed"
    assert "no whole dataset" in refusal(work, "lapo_pretrain", *TOY["lapo_pretrain"], *FRESH)


@pytest.fixture
def tmpfs(tmp_path):
    """A small file system in memory, and a function that sets its size in MB."""
    folder = tmp_path / "tmpfs"
    folder.mkdir()

    def mount(options):
        return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True)

    if mount("size=16m").returncode:
        pytest.skip("this process may not mount a file system")
    yield folder, lambda megabytes: mount(f"remount,size={megabytes}m")
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's
def test_full_disk(pipeline, tmpfs):
    """Without room for the dataset, or a save, what was saved stays whole; with room again, it goes on."""
    (cwd, resize), stage = tmpfs, "collect_expert_data"
    shutil.copytree(pipeline.cwd / run_dir("ppo_procgen"), cwd / run_dir("ppo_procgen"))
    assert "No space left" in refusal(cwd, stage, *TOY[stage])
    assert not (cwd / "data" / ENV_ID / "meta.json").exists()
    resize(64)
    age_events(cwd / run_dir(stage))
    inline(cwd, stage, *TOY[stage])
    assert_same_run(cwd, pipeline.cwd, stage)

    flags, saved = [*TOY["lapo_pretrain"], *NOW], cwd / run_dir("lapo_pretrain") / "resume.pt"
    assert interrupted(cwd, "lapo_pretrain", *flags, **ADAM_STEP, n=2) == 130
    before, free = saved.read_bytes(), os.statvfs(cwd)
    (cwd / "ballast").write_bytes(bytes(free.f_bavail * free.f_bsize))
    with pytest.raises((SystemExit, OSError), match="No space left"):
        inline(cwd, "lapo_pretrain", *flags)
    assert saved.read_bytes() == before
    (cwd / "ballast").unlink()
    inline(cwd, "lapo_pretrain", *flags)
    assert same_tensors(saved.with_name("checkpoint.pt"), pipeline.checkpoints["lapo_pretrain"])


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "collect_expert_data"])
def test_losses_that_are_not_finite(pipeline, tmp_path, monkeypatch, stage):
    """The run ends in a sentence before the step; what was saved stays as it was."""
    cwd, nan = inputs(pipeline, tmp_path / "work", stage), torch.tensor(torch.nan)
    if stage != "lapo_decode":
        assert interrupted(cwd, stage, *TOY[stage], *NOW, **STOP_AT[stage]) == 130
    before = snapshot(cwd, ".pt")
    if stage == "lapo_decode":
        monkeypatch.setattr(F, "cross_entropy", lambda *args, **kwargs: nan)
    elif stage in ("lapo_pretrain", "lapo_bc"):
        mse_loss = F.mse_loss
        monkeypatch.setattr(F, "mse_loss", lambda *args: mse_loss(*args) * nan)
    else:
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: nan)
    message = refusal(cwd, stage, *TOY[stage], *now(stage))
    assert "nan" in message and "learning" in message and "--no-bf16" in message
    assert snapshot(cwd, ".pt") == before


def test_a_dead_idm(work, monkeypatch):
    """Pretraining ends where the IDM's last ReLU is shut for all windows: no gradient would open it again."""
    monkeypatch.setattr(torch.nn.Flatten, "forward", lambda self, x: -x.flatten(1).abs())  # before that ReLU
    message = refusal(work, "lapo_pretrain", *TOY["lapo_pretrain"], *FRESH)
    assert "dead at update 3" in message and "--learning-rate" in message
    assert not (work / run_dir("fresh") / "results.json").exists()
