"""Runs that stop, go on, or must not: resuming, signals, locks, full disks, numbers that are not finite."""

import contextlib
import errno
import fcntl
import itertools
import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ENV_ID, ROOT, STAGES, TOY, collect, inline, link_tree, replace, run_dir, same_tensors, snapshot, start
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

NOW = ["--checkpoint-seconds", "0"]  # save whenever that is possible
FRESH = ["--exp-name", "fresh"]  # a run folder that is not there yet
FRESH_DIR = run_dir("fresh")
VARIANTS = {stage: (stage, []) for stage in STAGES}
VARIANTS |= {f"lapo_finetune_ppo_{flag.replace('-', '_')}": ("lapo_finetune_ppo", [f"--{flag}"]) for flag in ("no-sl", "from-scratch")}
READERS = STAGES[1:4]  # of the dataset
# in results.json and meta.json: differ between equal runs
TIMES = {"wall_seconds", "picture_seconds", "samples_per_second", "frames_per_second", "command", "checkpoint_seconds"}


@pytest.fixture
def work(pipeline, tmp_path):
    """The finished toy pipeline by hard links: scripts replace files there, never write into them."""
    return link_tree(pipeline.cwd, tmp_path / "work")


def inputs(pipeline, folder, name):
    """What the run `name` reads, in a folder of its own: the dataset and the runs of the other stages."""
    stage = VARIANTS[name][0]
    folder.mkdir(parents=True)
    if stage != "collect_expert_data":
        link_tree(pipeline.cwd / "data", folder / "data")
        for other in STAGES[: STAGES.index(stage)]:
            link_tree(pipeline.cwd / run_dir(other), folder / run_dir(other))
    return folder


def run(cwd, stage, *flags, stop_after=None, stop_at="resume.pt", patch=None):
    """Runs a script in this process. True if it was stopped: as by a kill, right after `stop_at` has been written for the `stop_after`th time.

    patch(monkeypatch) prepares more.
    """
    count, os_replace = 0, os.replace

    def replacing(source, target):
        nonlocal count
        os_replace(source, target)
        count += Path(target).name == stop_at
        if Path(target).name == stop_at and count == stop_after:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(os, "replace", replacing)
        if patch:
            patch(monkeypatch)
        try:
            inline(monkeypatch, cwd, stage, *flags)
        except KeyboardInterrupt:
            return True
    return False


def refused(*args, **kwargs):
    """The sentence with which a run refuses, after checking its form."""
    with pytest.raises(SystemExit) as caught:
        run(*args, **kwargs)
    message = caught.value.code
    assert isinstance(message, str) and message.startswith("error: ") and len(message.splitlines()) == 1, message
    return message


def without_times(tree):
    """A results.json or meta.json without what differs between equal runs."""
    if isinstance(tree, dict):
        return {key: without_times(value) for key, value in tree.items() if key not in TIMES}
    return [without_times(value) for value in tree] if isinstance(tree, list) else tree


def scalars(folder):
    """{tag: [(step, value), ...]} of a run folder's TensorBoard files, without the rates."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"] if tag != "charts/SPS"}


def age_events(folder, number):
    """Gives a stopped run's TensorBoard file an older name. Files are read by name, which starts with the second they were made in."""
    for path in folder.glob("events.out.tfevents.*"):
        if not path.name.startswith("events.out.tfevents.000"):
            path.rename(folder / f"events.out.tfevents.000{number:07d}")


def assert_same_run(again, reference, name):
    """Asserts that two working directories hold the same run `name`, apart from times."""
    folder, known = again / run_dir(name), reference / run_dir(name)
    assert same_tensors(folder / "checkpoint.pt", known / "checkpoint.pt")
    assert [without_times(json.loads((f / "results.json").read_text())) for f in (folder, known)][0] == without_times(
        json.loads((known / "results.json").read_text())
    )
    assert scalars(folder) == scalars(known)
    for path in [*known.glob("*.npy"), *known.glob("*.png")]:
        assert (folder / path.name).read_bytes() == path.read_bytes(), path.name
    assert not list(folder.glob("resume.pt")) and not list(folder.rglob("*.tmp"))
    if name == "collect_expert_data":
        for path in (reference / "data").rglob("*.npy"):
            assert (again / path.relative_to(reference)).read_bytes() == path.read_bytes(), path.name
        metas = [without_times(json.loads((cwd / "data" / ENV_ID / "meta.json").read_text())) for cwd in (again, reference)]
        assert metas[0] == metas[1]


@pytest.mark.parametrize("name", VARIANTS)
def test_resumed_equals_uninterrupted(pipeline, tmp_path, name):
    """A run that is killed after each of its saves (collecting: the first five, then every 40th) ends as one that never was: same tensors,
    results, logs and files, bit for bit."""
    stage, flags = VARIANTS[name]
    cwd = inputs(pipeline, tmp_path / "work", name)
    stops = itertools.chain([1] * 5, itertools.repeat(40 if stage == "collect_expert_data" else 1))
    for number, stop_after in enumerate(stops):
        assert number < 30, "the run does not get on"
        if not run(cwd, stage, *TOY[stage], *flags, *NOW, stop_after=stop_after):
            break
        age_events(cwd / run_dir(name), number)
    assert number >= (2 if stage == "lapo_decode" else 4)  # decoding saves after each draw of the labels
    assert_same_run(cwd, pipeline.cwd, name)


INPUTS = [("lapo_pretrain", None), ("lapo_bc", "lapo_pretrain"), ("lapo_decode", "lapo_bc"), ("lapo_finetune_ppo", "lapo_bc")]


@pytest.mark.parametrize("stage, before", INPUTS, ids=[stage for stage, _ in INPUTS])
def test_other_inputs_do_not_go_on(work, stage, before):
    """An unfinished run is refused once the checkpoint or the dataset that it began with has been made anew, and goes on with the old ones."""
    flags = [*TOY[stage], *FRESH] + ["--num-draws", "4"] * (stage == "lapo_decode")
    assert run(work, stage, *flags, *NOW, stop_after=1)
    changes = {"--data-dir": work / "data" / ENV_ID / "meta.json"} if stage != "lapo_finetune_ppo" else {}
    if before:
        changes |= {f"--{before.removeprefix('lapo_')}-checkpoint": work / run_dir(before) / "checkpoint.pt"}
    for flag, path in changes.items():
        content = path.read_bytes()
        if path.name == "meta.json":
            replace(path, content + b"\n")
        else:
            checkpoint = torch.load(path, weights_only=True)
            checkpoint["meta"]["seed"] = 2
            path.unlink()
            torch.save(checkpoint, path)
        known = snapshot(work)
        message = refused(work, stage, *flags)
        assert f"the file of {flag} has changed" in message and "--overwrite" in message and snapshot(work) == known
        replace(path, content)
    assert run(work, stage, *flags, *NOW, stop_after=1)
    path = work / FRESH_DIR / "resume.pt"
    state = torch.load(path, weights_only=True)
    del state["meta"]["inputs"]  # a run of before they were noted
    torch.save(state, path)
    assert run(work, stage, *flags, *NOW, stop_after=1)


def test_unfinished_checkpoints_are_refused(work):
    """A checkpoint of an unfinished run is refused with the command that finishes it, and taken with --allow-unfinished."""
    for stage, following in zip(STAGES, STAGES[1:4]):
        if stage == "collect_expert_data":
            continue  # its readers find no finished dataset
        flags = [*TOY[stage], *NOW, "--overwrite"]
        assert run(work, stage, *flags, stop_after=9 if stage == "lapo_bc" else 3)
        message = refused(work, following, *TOY[following], *FRESH)
        assert "is of an unfinished run" in message and f"{stage}.py --env-id" in message and "--allow-unfinished" in message
        assert "--overwrite" not in message.split("--allow-unfinished")[0].replace("--overwrite to", "")
        assert not run(work, following, *TOY[following], "--exp-name", f"{following}_anyway", "--allow-unfinished")
        assert not run(work, stage, *TOY[stage])


def test_commands_lead_to_where_the_run_lies(work, capsys):
    """The commands in messages hold the folders and the seed that differ from the defaults."""
    (work / "runs").rename(work / "my runs")
    (work / "data").rename(work / "my data")
    places = ["--runs-dir", "my runs", "--data-dir", f"my data/{ENV_ID}"]
    known = f"--data-dir 'my data/{ENV_ID}' --runs-dir 'my runs'"
    run(work, "lapo_bc", *TOY["lapo_bc"], *FRESH, *places)
    out = capsys.readouterr().out
    assert f"lapo_decode.py --env-id {ENV_ID} {known}\n" in out and f"lapo_finetune_ppo.py --env-id {ENV_ID} --runs-dir 'my runs'\n" in out
    message = refused(work, "lapo_decode", *TOY["lapo_decode"], *places, "--seed", "3")
    assert f"`python lapo_bc.py --env-id {ENV_ID} {known} --seed 3`" in message


def kill_after_first_save(monkeypatch):
    """This process gets a SIGTERM when the first resume.pt is there."""
    replacing, sent = os.replace, []

    def replace_and_kill(source, target):
        replacing(source, target)
        if Path(target).name == "resume.pt" and not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))

    monkeypatch.setattr(os, "replace", replace_and_kill)


@pytest.mark.parametrize("stage", STAGES)
def test_sigterm_ends_with_the_command_to_go_on(pipeline, tmp_path, capsys, stage):
    """SIGTERM ends a run with status 143 and the command that goes on, which holds for a shell and does not start afresh."""
    cwd = inputs(pipeline, tmp_path / "work", stage)
    (cwd / "runs").mkdir(exist_ok=True)
    (cwd / "runs").rename(cwd / "my runs")
    flags = [*TOY[stage], *NOW, "--runs-dir", "my runs"]
    with pytest.raises(SystemExit) as caught:
        run(cwd, stage, *flags, "--overwrite", patch=kill_after_first_save)
    assert caught.value.code == 128 + signal.SIGTERM
    (command,) = re.findall(r"go on with: python (.*)", capsys.readouterr().out)
    script, *rest = shlex.split(command)
    assert Path(script).name == f"{stage}.py" and rest == flags
    step = torch.load(cwd / "my runs" / run_dir(stage).name / "resume.pt", weights_only=True)["meta"]["step"]
    assert run(cwd, stage, *shlex.split(command)[1:], stop_after=1)
    assert "going on with the unfinished run" in capsys.readouterr().out
    assert torch.load(cwd / "my runs" / run_dir(stage).name / "resume.pt", weights_only=True)["meta"]["step"] >= step


def test_sigterm_to_a_process(work, tmp_path):
    """As a process: SIGTERM ends it after its update with status 143, and the printed command finishes the run."""
    flags = [*TOY["lapo_pretrain"], *FRESH, *NOW, "--num-updates", "150"]
    with subprocess.Popen(
        [sys.executable, ROOT / "lapo_pretrain.py", *flags], cwd=work, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as p:
        deadline = time.time() + 60
        while not (work / FRESH_DIR / "resume.pt").exists() and time.time() < deadline:
            time.sleep(0.02)
        p.send_signal(signal.SIGTERM)
        out, err = p.communicate(timeout=60)
    assert p.returncode == 143, err
    assert "Traceback" not in err and not list((work / FRESH_DIR).glob("*.tmp"))
    assert torch.load(work / FRESH_DIR / "resume.pt", weights_only=True)["meta"]["step"] < 150
    (command,) = re.findall(r"go on with: python (.*)", out)
    done = subprocess.run([sys.executable, *shlex.split(command)], cwd=work, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads((work / FRESH_DIR / "results.json").read_text())["updates"] == 150


def test_other_arguments_do_not_go_on(work):
    """An unfinished run is refused with the list of arguments that differ; --overwrite starts afresh; --resume needs something to go on with."""
    flags = [*TOY["lapo_pretrain"], *FRESH]
    assert run(work, "lapo_pretrain", *flags, *NOW, stop_after=2)
    before = snapshot(work)
    message = refused(work, "lapo_pretrain", *flags, "--learning-rate", "0.001", "--max-grad-norm", "1")
    assert "--learning-rate 0.0003 (now 0.001)" in message and "--max-grad-norm 2.0 (now 1.0)" in message and "--overwrite" in message
    assert "--batch-size" not in message and snapshot(work) == before
    assert run(work, "lapo_pretrain", *flags, *NOW, "--resume", stop_after=1)
    assert torch.load(work / FRESH_DIR / "resume.pt", weights_only=True)["meta"]["step"] == 3
    assert run(work, "lapo_pretrain", *flags, *NOW, "--learning-rate", "0.001", "--overwrite", stop_after=1)
    assert torch.load(work / FRESH_DIR / "resume.pt", weights_only=True)["meta"]["step"] == 1
    assert "give one of them" in refused(work, "lapo_pretrain", *flags, "--resume", "--overwrite")
    message = refused(work, "lapo_pretrain", *TOY["lapo_pretrain"], "--exp-name", "other", "--resume")
    assert "--resume" in message and "no unfinished run" in message


@pytest.mark.parametrize("stage", STAGES)
def test_second_process_is_refused(work, stage):
    """What another process is writing to is refused in a sentence, unchanged, be it the run folder or the dataset."""
    flags = [*TOY[stage], *FRESH, *(["--data-dir", "fresh"] if stage == "collect_expert_data" else [])]
    for folder in [FRESH_DIR] + [Path("fresh")] * (stage == "collect_expert_data"):
        assert run(work, stage, *flags, *NOW, stop_after=1)
        with open(work / folder / ".lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            before = snapshot(work)
            for more in ([], ["--overwrite"]):
                message = refused(work, stage, *flags, *more)
                assert "another process" in message and str(folder) in message
            assert snapshot(work) == before


@pytest.mark.parametrize("stage", STAGES)
def test_folder_that_cannot_be_made(work, pipeline, stage):
    """A run folder that cannot be made is refused in a sentence that names it."""
    (work / "file").write_text("no folder")
    flags = ["--runs-dir", "file/runs"] + (["--data-dir", "fresh"] if stage == "collect_expert_data" else [])
    flags += ["--pretrain-checkpoint", pipeline.checkpoints["lapo_pretrain"]] * (stage == "lapo_bc")
    flags += ["--bc-checkpoint", pipeline.checkpoints["lapo_bc"]] * (stage in ("lapo_decode", "lapo_finetune_ppo"))
    assert "file/runs" in refused(work, stage, *TOY[stage], *flags)
    assert (work / "file").read_text() == "no folder"


@contextlib.contextmanager
def small_disk(limit):
    """No file of this process can grow beyond `limit` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_run_goes_on_after_a_full_disk(pipeline, tmp_path):
    """A run whose disk fills up says so; with room again, the same command ends as if nothing had been."""
    cwd = inputs(pipeline, tmp_path / "work", "lapo_pretrain")
    flags = [*TOY["lapo_pretrain"], *NOW]
    assert run(cwd, "lapo_pretrain", *flags, stop_after=2)
    age_events(cwd / run_dir("lapo_pretrain"), 0)
    before = {name: (cwd / run_dir("lapo_pretrain") / name).read_bytes() for name in ("resume.pt", "checkpoint.pt")}
    assert "cannot be written" in refused(cwd, "lapo_pretrain", *flags, patch=lambda m: m.setattr(os, "fsync", full))
    assert {name: (cwd / run_dir("lapo_pretrain") / name).read_bytes() for name in before} == before
    age_events(cwd / run_dir("lapo_pretrain"), 1)
    assert not run(cwd, "lapo_pretrain", *flags)
    assert_same_run(cwd, pipeline.cwd, "lapo_pretrain")


@pytest.fixture
def tmpfs(tmp_path):
    """A small file system in memory, at a folder of its own."""
    folder = tmp_path / "tmpfs"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("this process may not mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("stage", STAGES)
def test_disk_that_fills_up(pipeline, tmp_path, tmpfs, stage):
    """On a file system without any room left: one sentence, what was saved is intact; with room again, the run ends as if nothing had been."""
    cwd = inputs(pipeline, tmp_path / "work", stage)
    (tmpfs / run_dir(stage).name).mkdir()
    (cwd / "runs").mkdir(exist_ok=True)
    (cwd / run_dir(stage)).symlink_to(tmpfs / run_dir(stage).name)
    assert run(cwd, stage, *TOY[stage], *NOW, stop_after=2)
    age_events(cwd / run_dir(stage), 0)
    before = {path.name: path.read_bytes() for path in (cwd / run_dir(stage)).glob("*.pt")}
    free = os.statvfs(tmpfs)
    (tmpfs / "ballast").write_bytes(bytes(free.f_bavail * free.f_bsize))
    assert "No space left" in refused(cwd, stage, *TOY[stage], *NOW)
    assert {path.name: path.read_bytes() for path in (cwd / run_dir(stage)).glob("*.pt")} == before
    (tmpfs / "ballast").unlink()
    age_events(cwd / run_dir(stage), 1)
    assert not run(cwd, stage, *TOY[stage], *NOW)
    assert_same_run(cwd, pipeline.cwd, stage)


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync"])
def test_full_disk_while_collecting(work, call):
    """A disk without room for the dataset is one sentence, at once or while writing, and there is no meta.json afterwards."""

    def patch(monkeypatch):
        original = getattr(os, call)
        # fsync also serves checkpoints, which are not what this is about
        monkeypatch.setattr(os, call, lambda fd, *a: full() if os.readlink(f"/proc/self/fd/{fd}").endswith(".npy") else original(fd, *a))

    flags = [*FRESH, "--data-dir", "fresh", "--expert-checkpoint", work / run_dir("collect_expert_data") / "checkpoint.pt", "--eval-episodes", "2"]
    message = refused(work, "collect_expert_data", *TOY["collect_expert_data"], *NOW, *flags, patch=patch)
    assert "No space left" in message and "run it again, without --overwrite" in message
    assert not (work / "fresh" / "meta.json").exists()
    assert not run(work, "collect_expert_data", *TOY["collect_expert_data"], *NOW, *flags)  # with room again
    assert (work / "fresh" / "meta.json").exists()


@pytest.mark.parametrize("stage", [s for s in STAGES if s != "lapo_decode"])
def test_numbers_that_are_not_finite(pipeline, tmp_path, stage):
    """A loss or gradient that is not finite ends the run in a sentence with the update; the batch is noted, what was saved stays as it was."""
    cwd = inputs(pipeline, tmp_path / "work", stage)
    assert run(cwd, stage, *TOY[stage], *NOW, stop_after=7 if stage == "lapo_bc" else 1)  # cloning labels first, and saves then too
    step = torch.load(cwd / run_dir(stage) / "resume.pt", weights_only=True)["meta"]["step"]
    before = {name: data for name, data in snapshot(cwd).items() if name.suffix in (".pt", ".npy")}

    def patch(monkeypatch):
        nan = torch.tensor(torch.nan)
        if stage in ("lapo_pretrain", "lapo_bc"):
            mse_loss = F.mse_loss
            monkeypatch.setattr(F, "mse_loss", lambda *a: mse_loss(*a) * nan)
        else:
            monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: nan)

    message = refused(cwd, stage, *TOY[stage], *NOW, patch=patch)
    update, size = (step, 16) if stage in ("lapo_pretrain", "lapo_bc") else (1, 512 // 8)
    assert f"update {update} " in message and "nan" in message and "not finite" in message
    noted = json.loads((cwd / run_dir(stage) / "bad_batch.json").read_text())
    assert noted["update"] == update and len(noted["indices"]) == size
    assert {name: data for name, data in snapshot(cwd).items() if name.suffix in (".pt", ".npy")} == before


def test_decoder_loss_that_is_not_finite(pipeline, tmp_path):
    """A decoder or a cloned policy whose loss is not finite ends decoding in a sentence."""
    cwd = inputs(pipeline, tmp_path / "work", "lapo_decode")
    nan = torch.tensor(torch.nan)
    message = refused(cwd, "lapo_decode", *TOY["lapo_decode"], patch=lambda m: m.setattr(F, "cross_entropy", lambda *a, **k: nan))
    assert "Decoder" in message and "nan" in message and "learning rate" in message


def test_collapsed_codebook_is_reported(work, capsys):
    """Codebooks of a single code have perplexity 1: pretraining warns, once, and says what to try."""
    flags = ["--vq-num-codes", "1", "--num-updates", "250", "--batch-size", "2", "--eval-every", "1000"]
    run(work, "lapo_pretrain", *TOY["lapo_pretrain"], *FRESH, *flags)
    shown = capsys.readouterr()
    (warning,) = [line for line in (shown.out + shown.err).splitlines() if "warning: update" in line]
    assert "collapsed" in warning and "1.00" in warning and "try" in warning and "--" in warning


@pytest.mark.parametrize("flags", [[], ["--no-vq"]], ids=["vq", "no-vq"])
def test_dead_idm_is_reported(work, capsys, flags):
    """An IDM that gives every window the same latent uses a code per slot, so perplexities look fine: pretraining warns, and shows what is dead."""
    flags = [*flags, "--num-updates", "250", "--batch-size", "4", "--eval-every", "1000"]

    def kill_the_idm(monkeypatch):
        monkeypatch.setattr(torch.nn.Flatten, "forward", lambda self, x: -x.flatten(1).abs())  # before the last ReLU of its convolutions

    run(work, "lapo_pretrain", *TOY["lapo_pretrain"], *FRESH, *flags, patch=kill_the_idm)
    shown = capsys.readouterr()
    (warning,) = [line for line in (shown.out + shown.err).splitlines() if "warning: update" in line]
    assert "collapsed (1 different latents in a batch of 4" in warning and "--warmup-updates" in warning
    assert json.loads((work / FRESH_DIR / "results.json").read_text())["test/idm_active_share"] == 0


@pytest.mark.parametrize("version", [0, 99])
def test_other_format_versions_are_named(work, version):
    """A checkpoint, a state to resume from or a dataset of another format version is refused with the version found and the one expected."""
    path = work / run_dir("lapo_pretrain") / "checkpoint.pt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["meta"]["format_version"] = version
    torch.save(checkpoint, work / "other.pt")
    words = f"has format_version {version}, expected {collect.FORMAT_VERSION}"
    assert f"other.pt {words}" in refused(work, "lapo_bc", *TOY["lapo_bc"], *FRESH, "--pretrain-checkpoint", "other.pt")

    assert run(work, "lapo_pretrain", *TOY["lapo_pretrain"], *FRESH, *NOW, stop_after=1)
    state = torch.load(work / FRESH_DIR / "resume.pt", weights_only=True)
    state["meta"]["format_version"] = version
    torch.save(state, work / FRESH_DIR / "resume.pt")
    assert f"resume.pt {words}" in refused(work, "lapo_pretrain", *TOY["lapo_pretrain"], *FRESH)

    meta_path = work / "data" / ENV_ID / "meta.json"
    replace(meta_path, json.dumps({**json.loads(meta_path.read_text()), "format_version": version}))
    for stage in READERS:
        assert f"has format_version {version}, expected {collect.DATA_FORMAT_VERSION}" in refused(work, stage, *TOY[stage], "--exp-name", "unread")


def test_refusal_of_a_lock_reaches_the_shell(work):
    """As processes: while one runs, a second one on the same folder ends with status 1 and one line, and the first one finishes."""
    flags = [*TOY["lapo_pretrain"], *FRESH, *NOW, "--num-updates", "100"]
    with subprocess.Popen(
        [sys.executable, ROOT / "lapo_pretrain.py", *flags], cwd=work, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as first:
        deadline = time.time() + 60
        while not (work / FRESH_DIR / "resume.pt").exists() and time.time() < deadline:
            time.sleep(0.02)
        first.send_signal(signal.SIGSTOP)  # it stays there as long as the second one needs
        second = start("lapo_pretrain", *flags, cwd=work)
        first.send_signal(signal.SIGCONT)
        assert first.wait(120) == 0
    assert second.returncode == 1 and "another process" in second.stderr.splitlines()[-1] and "Traceback" not in second.stderr
