"""Shared by the tests: the five scripts as modules, toy-size flags, ways to run a script, and one toy run of the whole pipeline."""

import contextlib
import fcntl
import hashlib
import importlib
import io
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: the same order of sums in this process and in the scripts it starts
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
STAGES = ("collect_expert_data", "lapo_pretrain", "lapo_bc", "lapo_decode", "lapo_finetune_ppo")
collect, pretrain, bc, decode, finetune = (importlib.import_module(name) for name in STAGES)

ENV_ID = "dodgeball"  # short episodes under random play, fast to draw
TOY = {
    "collect_expert_data": "--num-levels 16 --total-timesteps 1024 --num-envs 16 --num-steps 32 --scale 0.25 --num-train-frames 2000 "
    "--num-test-frames 400 --eval-episodes 8",
    "lapo_pretrain": "--num-updates 6 --batch-size 16 --idm-scale 0.25 --fdm-width 4 --vq-dim 2 --eval-every 3 --eval-windows 64",
    "lapo_bc": "--num-updates 6 --batch-size 16 --policy-scale 0.25 --warmup-updates 2",
    "lapo_decode": "--num-labels 16 32 --table-labels 32 --num-draws 2 --eval-episodes 4 --bc-updates 4 --decoder-updates 100",
    "lapo_finetune_ppo": "--total-timesteps 2048 --num-envs 16 --num-steps 32 --action-head-warmup 512 600 --value-head-warmup 512 600 "
    "--linear-warmup 600 700 --decoder-frames 500 4000 --eval-episodes 4",
}
TOY = {stage: f"--env-id {ENV_ID} --no-cuda --no-bf16 {flags}".split() for stage, flags in TOY.items()}


def run_dir(stage, seed=1):
    """The run folder that a script makes by default, relative to the working directory."""
    return Path(f"runs/{ENV_ID}__{stage}__{seed}")


def tensors(path):
    """Every tensor of a checkpoint, {"part.name": tensor}."""
    flat = {}
    for part, state in torch.load(path, map_location="cpu", weights_only=True).items():
        if isinstance(state, torch.Tensor):
            flat[part] = state
        elif part != "meta":
            flat |= {f"{part}.{name}": tensor for name, tensor in state.items()}
    assert flat
    return flat


def same_tensors(a, b):
    """Whether two checkpoints hold the same tensors bit for bit."""
    a, b = tensors(a), tensors(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def snapshot(folder):
    """{file: hash of its bytes} of a folder."""
    return {p.relative_to(folder): hashlib.blake2b(p.read_bytes()).digest() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def link_tree(source, target):
    """A copy of a folder by hard links: to change a file there, replace it, never write into it."""
    for path in Path(source).rglob("*"):
        if path.is_file():
            (Path(target) / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            os.link(path, Path(target) / path.relative_to(source))
    return Path(target)


def replace(path, content):
    """Gives a file of a link_tree new bytes (or an array, or text) without touching the original."""
    path.unlink()
    if isinstance(content, np.ndarray):
        np.save(path, content)
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def start(stage, *flags, cwd):
    """Runs a script as a user would, in a process of its own."""
    command = [sys.executable, str(ROOT / f"{stage}.py"), *map(str, flags)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def inline(monkeypatch, cwd, stage, *flags):
    """Runs a script in this process, which saves the seconds of importing torch. Returns its globals.

    As with a process of its own, its locks and signal handlers end with it, and an OSError becomes the sentence that its sys.excepthook prints.
    """
    handlers, locks = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}, []
    flock, thread_hook = fcntl.flock, threading.excepthook

    def locking(file, operation):
        locks.append(file)
        flock(file, operation)

    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "argv", [f"{stage}.py", *map(str, flags)])
    monkeypatch.setattr(fcntl, "flock", locking)
    try:
        return runpy.run_path(str(ROOT / f"{stage}.py"), run_name="__main__")
    except OSError as e:
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            sys.excepthook(type(e), e, e.__traceback__)
        sys.exit(stderr.getvalue().removesuffix("\n"))
    finally:
        torch.backends.cudnn.deterministic = False
        sys.excepthook, threading.excepthook = sys.__excepthook__, thread_hook
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for lock in locks:
            lock.close()


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    """All five stages at toy size, one after the other with the default paths, and the fine-tuning's two baselines. Read only."""
    cwd = tmp_path_factory.mktemp("pipeline")
    stdout = {}
    for stage in STAGES:
        done = start(stage, *TOY[stage], cwd=cwd)
        assert done.returncode == 0, done.stderr
        stdout[stage] = done.stdout
    baselines = {f"lapo_finetune_ppo_{flag.replace('-', '_')}": f"--{flag}" for flag in ("no-sl", "from-scratch")}
    for flag in baselines.values():
        with pytest.MonkeyPatch.context() as monkeypatch:
            inline(monkeypatch, cwd, "lapo_finetune_ppo", *TOY["lapo_finetune_ppo"], flag)
    checkpoints = {name: cwd / run_dir(name) / "checkpoint.pt" for name in (*STAGES, *baselines)}
    results = {name: json.loads((path.parent / "results.json").read_text()) for name, path in checkpoints.items()}
    return SimpleNamespace(cwd=cwd, data=cwd / "data" / ENV_ID, stdout=stdout, results=results, checkpoints=checkpoints)
