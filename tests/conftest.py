"""Shared by the tests: the stages as modules, toy flags, ways to run a script, one toy run of all stages."""

import contextlib
import gc
import importlib
import io
import itertools
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: sums in the same order here and in the scripts it starts
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark")]

import pytest  # noqa: E402
import torch  # noqa: E402
import tyro  # noqa: E402
from filelock import BaseFileLock, FileLock  # noqa: E402
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402
from torch.utils.tensorboard import SummaryWriter  # noqa: E402

if OLD := sys.version_info < (3, 13):
    importlib.import_module("gym_notices.notices").notices.clear()  # gym's lines about its future
games = importlib.import_module("procgen.env" if OLD else "procgen_gym.env")  # whence Procgen's games come
ENV_NAMES, GAMES = games.ENV_NAMES, "ProcgenGym3Env" if OLD else "CLibenv"  # the class to watch them by
torch.set_num_threads(1)
STAGES = "ppo_procgen collect_expert_data lapo_pretrain lapo_bc lapo_decode lapo_finetune_ppo".split()
ppo, collect, pretrain, bc, decode, finetune = (importlib.import_module(name) for name in STAGES)

ENV_ID = "dodgeball"  # short episodes under random play, fast to draw
ROLLOUT = "--total-timesteps 2048 --num-envs 16 --num-steps 32"
TOY = {
    "ppo_procgen": f"{ROLLOUT} --num-levels 16 --scale 0.25 --eval-episodes 8",
    "collect_expert_data": "--num-envs 16 --num-train-frames 2000 --num-test-frames 400 "
    f"--num-random-episodes 16 --expert-checkpoint runs/{ENV_ID}__ppo_procgen__1/checkpoint.pt",
    "lapo_pretrain": "--num-updates 6 --batch-size 16 --idm-scale 0.25 --fdm-width 4 --vq-dim 2 "
    "--eval-every 3 --eval-windows 64",
    "lapo_bc": "--num-updates 6 --batch-size 16 --policy-scale 0.25 --warmup-updates 2 --eval-every 3",
    "lapo_decode": "--num-labels 16 32 --num-draws 2 --eval-episodes 4 --cloning-updates 4 "
    "--decoder-updates 100",
    "lapo_finetune_ppo": f"{ROLLOUT} --action-head-warmup 512 600 --value-head-warmup 512 600 "
    "--linear-warmup 600 700 --decoder-frames 500 4000 --eval-episodes 4",
}
TOY = {stage: f"--env-id {ENV_ID} --no-cuda --no-bf16 {flags}".split() for stage, flags in TOY.items()}
NO_SL = "lapo_finetune_ppo_no_sl"
RUNS = {stage: (stage, []) for stage in STAGES} | {NO_SL: (STAGES[-1], ["--no-sl", "--exp-name", NO_SL])}
FRESH = ["--exp-name", "fresh"]  # a run folder that is not there yet
INPUT = {  # stage: the flag that names its checkpoint, the stage that makes it
    "collect_expert_data": ("--expert-checkpoint", "ppo_procgen"),
    "lapo_bc": ("--pretrain-checkpoint", "lapo_pretrain"),
    "lapo_decode": ("--bc-checkpoint", "lapo_bc"),
    "lapo_finetune_ppo": ("--bc-checkpoint", "lapo_bc"),
}
READERS = ("lapo_pretrain", "lapo_bc", "lapo_decode")  # of the dataset


def run_dir(name, seed=1):
    """The run folder that a script makes by default, relative to the working directory."""
    return Path(f"runs/{ENV_ID}__{name}__{seed}")


def results_of(cwd, name):
    return json.loads((cwd / run_dir(name) / "results.json").read_text())


def load(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def same(a, b):
    """Whether two state dicts are the same bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def same_networks(a, b):
    """Whether two checkpoints hold the same networks bit for bit."""
    a, b = load(a), load(b)
    networks = {"agent", "idm", "vq", "fdm", "policy", "decoder"} & a.keys()
    return networks and all(same(a[name], b[name]) for name in networks)


def scalars(folder):
    """{tag: [(step, value), ...]} of a run folder's TensorBoard files."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def files_of(folder, suffix=""):
    """{file: whether it is another or was written, in numbers} of a folder, without locks."""
    files = [p for p in Path(folder).rglob(f"*{suffix}") if p.is_file() and p.name != ".lock"]
    return {p.relative_to(folder): (p.stat().st_ino, p.stat().st_size, p.stat().st_mtime_ns) for p in files}


def contents_of(folder, suffix=""):
    """{file: its bytes} of a folder, without locks."""
    return {path: (Path(folder) / path).read_bytes() for path in files_of(folder, suffix)}


def link_tree(source, target):
    """A copy of a folder by hard links: to change a file there, replace it, never write into it."""
    return Path(shutil.copytree(source, target, copy_function=os.link))


def replace(path, content):
    """Gives a file of a link_tree other content: bytes, text, what torch.save takes, or none."""
    path.unlink(missing_ok=True)
    if isinstance(content, dict | list):
        torch.save(content, path)
    elif content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def process(script, *flags, cwd, **env):
    """A process of its own that runs a script."""
    script = [sys.executable, str(ROOT / f"{script}.py"), *map(str, flags)]
    pipe = subprocess.PIPE
    return subprocess.Popen(script, cwd=cwd, env=os.environ | env, stdout=pipe, stderr=pipe, text=True)


def inline(cwd, script, *flags, save_seconds=60):
    """Runs a script in this process, which saves the seconds of importing torch. Returns its globals.

    As with a process of its own, its locks and logs end with it.
    """
    opened = []

    def noting(method):
        def noted(self, *args, **kwargs):
            opened.append(self)
            return method(self, *args, **kwargs)

        return noted

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [f"{script}.py", *map(str, flags)])
        patch.setattr(signal, "signal", lambda *_: None)  # pytest keeps its own
        patch.setattr(BaseFileLock, "acquire", noting(BaseFileLock.acquire))
        patch.setattr(SummaryWriter, "__init__", noting(SummaryWriter.__init__))
        module = importlib.import_module(script.replace("/", "."))
        if hasattr(module, "SAVE_SECONDS"):
            patch.setattr(module, "SAVE_SECONDS", save_seconds)
        try:
            if script.startswith("benchmark/") or not hasattr(module, "main"):
                return runpy.run_path(module.__file__, run_name="__main__")
            module.main(tyro.cli(module.Args, description=module.__doc__))
            return vars(module)
        finally:
            for thing in opened:
                thing.release(force=True) if isinstance(thing, BaseFileLock) else thing.close()
            gc.collect()  # closes Procgen's games here: while others are opened it would wait for itself


def refusal(cwd, script, *flags):
    """The sentence with which a script refuses, after checking its form."""
    with contextlib.redirect_stderr(io.StringIO()) as err, pytest.raises(SystemExit) as caught:
        inline(cwd, script, *flags)
    if isinstance(caught.value.code, str):
        print(caught.value.code, file=err)
    else:
        assert caught.value.code == 1
    (message,) = re.findall(r"error: .*", err.getvalue())  # behind tqdm's bar, where there is one
    assert "Traceback" not in err.getvalue()
    return message


def look(env):
    """What an instance of GAMES shows: observations (E, 64, 64, 3), first (E,)."""
    seen = env.observe()
    obs, first = (seen[1], seen[2]) if len(seen) == 3 else (seen[1], seen[0])
    return obs["rgb"].copy(), first.astype(bool)


class Killed(BaseException):
    """As kill -9: nothing catches it."""


def killed(cwd, stage, *flags, owner, name, n):
    """Runs a script in this process, always saving, up to the end of the nth call of owner.name."""
    original, calls = getattr(owner, name), itertools.count(1)

    def counting(*args, **kwargs):
        result = original(*args, **kwargs)
        if next(calls) == n:
            raise Killed
        return result

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, name, counting)
        inline(cwd, stage, *flags, save_seconds=0)


ADAM_STEP = {"owner": torch.optim.Adam, "name": "step"}


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist's
def pytest_cmdline_main(config):
    """With -n, a file's tests stay in one worker, so that its fixtures are made once."""
    if config.getoption("numprocesses", None) and config.option.dist == "no":
        config.option.dist = "loadfile"


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    """All stages at toy size with the default paths, and fine-tuning without decoder. Read only.

    The first worker of pytest-xdist that needs it makes it, the others wait and share it.
    """
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    cwd = shared / "pipeline"
    with FileLock(shared / "pipeline.lock"):
        if not (cwd / "stdout.json").exists():
            cwd.mkdir()
            stdout = {}
            for name, (stage, flags) in RUNS.items():
                with contextlib.redirect_stdout(io.StringIO()) as out:
                    inline(cwd, stage, *TOY[stage], *flags)
                stdout[name] = out.getvalue()
            (cwd / "stdout.json").write_text(json.dumps(stdout))
    stdout = json.loads((cwd / "stdout.json").read_text())
    checkpoints = {name: cwd / run_dir(name) / "checkpoint.pt" for name in RUNS}
    results = {name: results_of(cwd, name) for name in RUNS}
    data = cwd / "data" / ENV_ID
    return SimpleNamespace(cwd=cwd, data=data, stdout=stdout, checkpoints=checkpoints, results=results)


@pytest.fixture
def work(pipeline, tmp_path):
    """The finished toy pipeline's folder by hard links."""
    return link_tree(pipeline.cwd, tmp_path / "work")
