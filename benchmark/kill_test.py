"""Does a run that is killed, again and again, end like one that was not? SIGKILL at random moments, then the same command once more.

    python benchmark/kill_test.py       # 100 kills, 20 of each stage, on two CPU cores

Every stage first runs uninterrupted at toy size, saving after every update. The same command then runs in a folder of its own, where it
is killed at a random moment of its work (after its imports) and started again until it ends. After every kill:

    whole       checkpoint.pt, resume.pt, results.json and meta.json load if they are there; a dataset with a meta.json has all its rows
                and the checksums that meta.json names
    not lost    resume.pt has come no less far than before the kill, checkpoint.pt is not behind it, and the next start goes on from it

After every completed run all its files equal the uninterrupted run's: tensors bit for bit, numbers exactly (but for times), and the
dataset byte for byte. Writes benchmark/results/kill-test.json; the exit status is 1 if anything was lost, half-written or different.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
ENV_ID = "dodgeball"  # short episodes under random play, fast to draw
COMMON = f"--env-id {ENV_ID} --no-cuda --checkpoint-seconds 0"
FINETUNE = (
    "--total-timesteps 8192 --num-envs 16 --num-steps 32 --action-head-warmup 512 600 --value-head-warmup 512 600 --linear-warmup 600 700 "
    "--decoder-frames 500 6000 --eval-episodes 8"
)
# run name -> flags; {collect_expert_data} and the like are the folders of the uninterrupted runs before it
FLAGS = {
    "collect_expert_data": "--num-levels 16 --total-timesteps 4096 --num-envs 16 --num-steps 32 --scale 0.25 --num-train-frames 8000 "
    "--num-test-frames 400 --eval-episodes 8",
    "lapo_pretrain": "--data-dir {collect_expert_data}/data --num-updates 60 --batch-size 16 --idm-scale 0.25 --fdm-width 4 --vq-dim 2 "
    "--eval-every 10 --eval-windows 64",
    "lapo_bc": "--data-dir {collect_expert_data}/data --pretrain-checkpoint {lapo_pretrain}/run/checkpoint.pt --num-updates 200 --batch-size 16 "
    "--policy-scale 0.25 --warmup-updates 20 --eval-every 40",
    "lapo_decode": "--data-dir {collect_expert_data}/data --bc-checkpoint {lapo_bc}/run/checkpoint.pt --num-labels 16 32 64 --table-labels 32 "
    "--num-draws 4 --eval-episodes 16 --bc-updates 10 --decoder-updates 100",
    "lapo_finetune_ppo": "--bc-checkpoint {lapo_bc}/run/checkpoint.pt " + FINETUNE,
    "lapo_finetune_ppo_no_sl": "--no-sl --bc-checkpoint {lapo_bc}/run/checkpoint.pt " + FINETUNE,
    "lapo_finetune_ppo_from_scratch": "--from-scratch --bc-checkpoint {lapo_bc}/run/checkpoint.pt " + FINETUNE,
}
STAGES = ("collect_expert_data", "lapo_pretrain", "lapo_bc", "lapo_decode", "lapo_finetune_ppo")
TIMES = {"wall_seconds", "picture_seconds", "samples_per_second", "frames_per_second"}  # differ from run to run


@dataclass
class Args:
    kills_per_stage: int = 20
    """kills of each stage; fine-tuning's three forms take turns, run by run"""
    seed: int = 1
    """seed of the moments"""
    stages: tuple[str, ...] = STAGES
    """the stages to kill"""
    jobs: int = 2
    """stages killed side by side"""
    out: str = str(ROOT / "benchmark" / "results" / "kill-test.json")
    """where the JSON goes"""


@dataclass
class Tally:
    """What happened to one stage."""

    counts: Counter = field(default_factory=Counter)
    completed: Counter = field(default_factory=Counter)  # runs by name
    problems: list = field(default_factory=list)

    def note(self, kind, what):
        self.counts[kind] += 1
        self.problems.append(f"{kind}: {what}")


def start(name, work, folder, log):
    """Starts a stage in a folder of its own, at the head of a process group."""
    script = next(stage for stage in STAGES if name.startswith(stage))
    flags = f"{COMMON} {FLAGS[name]}".format(**{stage: work / "uninterrupted" / stage for stage in STAGES}).split()
    paths = ["--runs-dir", "runs", *(["--data-dir", "data"] if script == "collect_expert_data" else [])]
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "run").is_symlink():
        (folder / "run").symlink_to(f"runs/{ENV_ID}__{name}__1")
    command = [sys.executable, str(ROOT / f"{script}.py"), *flags, *paths]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}  # one order of sums; a killed process has said all it had to say
    with open(log, "wb") as f:
        return subprocess.Popen(command, cwd=folder, stdout=f, stderr=subprocess.STDOUT, env=env, start_new_session=True)


def wait_until_working(process, folder, seconds=300):
    """Waits until a stage has its run folder and opens its log, which is what it does after its imports and checks."""
    deadline = time.time() + seconds
    while process.poll() is None and not list((folder / "run").glob(f"events.out.tfevents.*.{process.pid}.*")):
        if time.time() > deadline:
            os.killpg(process.pid, signal.SIGKILL)
            sys.exit(f"error: a stage did not begin to work within {seconds} seconds, its folder is {folder}")
        time.sleep(0.02)


def load(path):
    """What a file holds: tensors and values, JSON, or bytes."""
    if path.suffix == ".pt":
        return torch.load(path, map_location="cpu", weights_only=True)
    return json.loads(path.read_text()) if path.suffix == ".json" else path.read_bytes()


def same(a, b):
    """Whether two things that load() returned are equal, bit for bit, times aside."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a.keys() - TIMES)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def outputs(folder):
    """{name: path} of what a run leaves behind. A resume.pt next to results.json only means a kill between the last two acts."""
    paths = {path.relative_to(folder): path for kind in ("runs", "data") for path in (folder / kind).rglob("*") if path.is_file()}
    return {str(name): path for name, path in paths.items() if path.name not in (".lock", "resume.pt") and "tfevents" not in path.name}


def compare(folder, uninterrupted, tally, what):
    """Notes every file of a completed run that is not the uninterrupted run's."""
    found, wanted = outputs(folder), outputs(uninterrupted)
    for name in sorted(found.keys() ^ wanted.keys()):
        tally.note("mismatches", f"{what}: {name} is {'left over' if name in found else 'missing'}")
    for name in sorted(found.keys() & wanted.keys()):
        if not same(load(found[name]), load(wanted[name])):
            tally.note("mismatches", f"{what}: {name} differs")


def how_far(state):
    """How far the run that a resume.pt goes on with has come, in an order that only grows."""
    meta = state["meta"]
    scored, splits, t = meta.get("scores") is not None, len(meta.get("splits", ())), state.get("collecting", {"t": 0})["t"]
    return meta.get("iteration", 0), meta["step"], meta.get("labelled", 0), len(meta.get("played", ())), scored, splits, t


def check_dataset(data_dir, meta, tally, what):
    """Notes what a dataset that counts as finished lacks."""
    for split, info in meta["splits"].items():
        for name in ("frames", "first", "actions", "rewards", "returns"):
            path = data_dir / split / f"{name}.npy"
            if not path.exists() or len(np.load(path, mmap_mode="r")) != info["num_frames"]:
                tally.note("half_written", f"{what}: meta.json is there, but {split}/{name}.npy is short")
            elif hashlib.blake2b(path.read_bytes()).hexdigest() != info["checksums"][path.name]:
                tally.note("half_written", f"{what}: meta.json is there, but {split}/{name}.npy has another checksum")


def check_killed(folder, before, tally, what):
    """Checks what a kill left behind, and returns how far the run has come (None: nothing saved yet)."""
    loaded = {}
    for path in (folder / "run" / "checkpoint.pt", folder / "run" / "resume.pt", folder / "run" / "results.json", folder / "data" / "meta.json"):
        try:
            loaded[path.name] = load(path) if path.exists() else None
        except Exception as e:
            tally.note("half_written", f"{what}: {path.name} cannot be read ({type(e).__name__})")
            loaded[path.name] = None
    if loaded["meta.json"]:
        check_dataset(folder / "data", loaded["meta.json"], tally, what)
    tally.counts["kills_while_writing"] += any(folder.glob("*/**/*.tmp"))
    tally.counts["kills_with_unfinished_dataset"] += (folder / "data" / "train" / "frames.npy").exists() and not loaded["meta.json"]
    if loaded["results.json"]:  # killed after its last act
        return None
    after = how_far(loaded["resume.pt"]) if loaded["resume.pt"] else None
    if before and (not after or after < before):
        tally.note("lost", f"{what}: resume.pt was at {before}, now at {after}")
    trained, saved = (loaded["resume.pt"] or {"meta": {"step": 0}})["meta"]["step"], (loaded["checkpoint.pt"] or {"meta": {}})["meta"]
    if trained > saved.get("updates", saved.get("frames", 0)):
        tally.note("lost", f"{what}: resume.pt is at step {trained}, checkpoint.pt behind it")
    return after


def kill_stage(stage, work, seconds, args, progress):
    """Runs of a stage, killed and started again, until it has had its share of kills; then the last one ends in peace. Returns a Tally."""
    tally, rng, names = Tally(), random.Random(f"{args.seed} {stage}"), [name for name in FLAGS if name.startswith(stage)]
    runs = 0
    while tally.counts["kills"] < args.kills_per_stage and tally.counts["failed_starts"] < 3:
        name, before = names[runs % len(names)], None
        folder, log = work / f"{name}_{runs}", work / f"{name}_{runs}.log"
        while True:
            what = f"{name}, run {runs}, kill {tally.counts['kills'] + 1}"
            process = start(name, work, folder, log)
            wait_until_working(process, folder)
            try:
                process.wait(rng.uniform(0, seconds[name] / 2) if tally.counts["kills"] < args.kills_per_stage else None)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                tally.counts["too_late"] += process.wait() != -signal.SIGKILL
            finished = (folder / "run" / "results.json").exists()
            if process.returncode not in (0, -signal.SIGKILL) or (process.returncode == 0 and not finished):
                last_line = log.read_text(errors="replace").strip().splitlines()[-1].replace(str(work), "WORK")
                tally.note("failed_starts", f"{what}: ended with {process.returncode}: {last_line}")
                break
            if before and "going on with the unfinished run" not in log.read_text(errors="replace"):
                tally.note("lost", f"{what}: started afresh, though there was a resume.pt")
            if process.returncode == 0:
                break
            tally.counts["kills"] += 1
            progress.update()
            before = check_killed(folder, before, tally, what)
            if finished:
                break
        if finished:
            tally.completed[name] += 1
            compare(folder, work / "uninterrupted" / name, tally, f"{name}, run {runs}")
        shutil.rmtree(folder)
        runs += 1
    return tally


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    if unknown := set(args.stages) - set(STAGES):
        sys.exit(f"error: --stages {' '.join(unknown)}: choose among {', '.join(STAGES)}")
    start_time = time.time()
    with tempfile.TemporaryDirectory() as folder:
        work, seconds = Path(folder).resolve(), {}
        last = max(map(STAGES.index, args.stages))
        for name in tqdm([n for n in FLAGS if any(n.startswith(stage) for stage in STAGES[: last + 1])], desc="uninterrupted", unit="run"):
            log = work / f"{name}.log"
            process = start(name, work, work / "uninterrupted" / name, log)
            wait_until_working(process, work / "uninterrupted" / name)
            began = time.time()
            if process.wait():
                sys.exit(f"error: {name} ended with {process.returncode} without being killed: {log.read_text(errors='replace')[-2000:]}")
            seconds[name] = time.time() - began
        with tqdm(total=args.kills_per_stage * len(args.stages), unit="kill", desc="kills") as progress, ThreadPoolExecutor(args.jobs) as pool:
            tallies = dict(zip(args.stages, pool.map(lambda stage: kill_stage(stage, work, seconds, args, progress), args.stages)))

    total, completed = Counter(), Counter()
    for tally in tallies.values():
        total.update(tally.counts)
        completed.update(tally.completed)
    print(f"\n{'run':32s} {'seconds of work':>16s} {'completed':>10s}")
    for name, n in completed.items():
        print(f"{name:32s} {seconds[name]:16.1f} {n:10d}")
    kinds = ("kills", "kills_while_writing", "kills_with_unfinished_dataset", "too_late", "lost", "mismatches", "half_written", "failed_starts")
    print(f"\n{'':32s}" + "".join(f"{stage.removeprefix('lapo_'):>20s}" for stage in tallies))
    for kind in kinds:
        print(f"{kind:32s}" + "".join(f"{tally.counts[kind]:20d}" for tally in tallies.values()))
    problems = [problem for tally in tallies.values() for problem in tally.problems]
    results = {
        "kills": total["kills"], "stages": {f"{stage}.py": tally.counts["kills"] for stage, tally in tallies.items()},
        **{kind: total[kind] for kind in kinds[1:]}, "completed_runs": dict(completed), "problems": problems, "seed": args.seed,
        "wall_seconds": round(time.time() - start_time), "torch": torch.__version__, "device": "cpu",
    }  # fmt: skip
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(json.dumps(results, indent=1))
    print("\n" + "\n".join([*problems, f"wrote {args.out}"]))
    sys.exit(bool(problems))
