"""Do memory, open files or logs grow while a stage trains? The four training loops at toy size, side by side, watched for half an hour.

    python benchmark/soak.py            # 30 minutes on two CPU cores

Toy runs give the loops their inputs; then all four train with more updates than they can make, saving every 20 seconds. At the
end each is asked to stop (SIGTERM), has to save, say how to go on, and exit with 0. Memory is resident memory (VmRSS), its slope is fitted
to the second half. Writes benchmark/results/soak.json and soak.png; the exit status is 1 if a stage ended early or did not stop cleanly.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
import tyro
from tqdm import tqdm

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
ENV_ID = "dodgeball"  # short episodes under random play, fast to draw
ENDLESS = 10**9  # updates or frames
PPO = "--num-envs 16 --num-steps 32"
FLAGS = {
    "collect_expert_data": f"--num-levels 16 --scale 0.25 {PPO}",
    "lapo_pretrain": "--batch-size 16 --idm-scale 0.25 --fdm-width 4 --vq-dim 2 --eval-windows 64",
    "lapo_bc": "--batch-size 16 --policy-scale 0.25",
    "lapo_finetune_ppo": f"{PPO} --decoder-frames 500 20000",
}
INPUTS = {  # short runs with the default paths
    "collect_expert_data": "--total-timesteps 2048 --num-train-frames 4096 --num-test-frames 512 --eval-episodes 16",
    "lapo_pretrain": "--num-updates 20",
    "lapo_bc": "--num-updates 20",
}
SOAK = {  # runs of another name, so that the inputs stay as they are
    "collect_expert_data": f"--exp-name soak_collect --num-train-frames 0 --total-timesteps {ENDLESS}",
    "lapo_pretrain": f"--exp-name soak_pretrain --num-updates {ENDLESS}",
    "lapo_bc": f"--exp-name soak_bc --num-updates {ENDLESS}",
    "lapo_finetune_ppo": f"--exp-name soak_finetune --total-timesteps {ENDLESS}",
}
STYLES = {  # colours that colour-blind people can tell apart
    "collect_expert_data": ("#0072B2", "-"),
    "lapo_pretrain": ("#D55E00", "--"),
    "lapo_bc": ("#009E73", "-."),
    "lapo_finetune_ppo": ("#CC79A7", ":"),
}
PANELS = {"memory_mb": "resident memory (MB)", "open_files": "open files", "tensorboard_mb": "TensorBoard logs (MB)"}


@dataclass
class Args:
    minutes: float = 30.0
    """length of the soak"""
    sample_seconds: float = 10.0
    """seconds between samples"""
    out: str = str(ROOT / "benchmark" / "results" / "soak")
    """where .json and .png go"""


def start(stage, flags, folder):
    """Starts a stage in a folder, its output in a log there."""
    command = [sys.executable, str(ROOT / f"{stage}.py"), "--env-id", ENV_ID, "--no-cuda", *FLAGS[stage].split(), *flags.split()]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with open(folder / f"{stage}.log", "wb") as log:
        return subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT, env=env)


def last_words(stage, folder):
    """The end of a stage's output."""
    return (folder / f"{stage}.log").read_text(errors="replace")[-1000:]


def sample(process, run_dir):
    """Resident memory, open files and size of the TensorBoard logs of a running stage."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    (kilobytes,) = [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:")]
    events = sum(path.stat().st_size for path in run_dir.glob("events.out.tfevents.*"))
    return {"memory_mb": kilobytes / 1024, "open_files": len(os.listdir(f"/proc/{process.pid}/fd")), "tensorboard_mb": events / 1e6}


def wait_until_working(stage, process, run_dir, folder):
    """Waits for a stage's first checkpoint, so that the first sample is of its training."""
    while not (run_dir / "resume.pt").exists():
        if process.poll() is not None:
            sys.exit(f"error: {stage} ended with {process.returncode} before its first checkpoint: {last_words(stage, folder)}")
        time.sleep(0.2)


def watch(processes, run_dirs, folder, args):
    """{stage: [{"minutes", "memory_mb", ...}, ...]}; refuses, in one sentence, a stage that ends early."""
    began, samples = time.time(), {stage: [] for stage in processes}
    for i in tqdm(range(int(args.minutes * 60 / args.sample_seconds)), desc="soak", unit="sample"):
        time.sleep(max(0.0, began + (i + 1) * args.sample_seconds - time.time()))
        for stage, process in processes.items():
            if process.poll() is not None:
                sys.exit(f"error: {stage} ended with {process.returncode} after {i * args.sample_seconds:.0f} s: {last_words(stage, folder)}")
            samples[stage].append({"minutes": (time.time() - began) / 60, **sample(process, run_dirs[stage])})
    return samples


def stop(stage, process, run_dir, folder):
    """Asks a stage to stop; whether it saved, said how to go on and exited with 0, and how many updates it made."""
    process.terminate()
    try:
        code = process.wait(120)
    except subprocess.TimeoutExpired:
        code = None
    resume = run_dir / "resume.pt"
    meta = torch.load(resume, map_location="cpu", weights_only=True)["meta"] if resume.exists() else {"step": 0}
    stopped_well = code == 0 and resume.exists() and "go on with:" in last_words(stage, folder)
    return {"exit_status": code, "saved_and_said_how_to_go_on": stopped_well, "updates": meta.get("iteration", meta["step"])}


def summary(samples):
    """First and last values of each quantity, its slope per hour over the second half, and at most 200 samples."""
    minutes, out = np.array([s["minutes"] for s in samples]), {}
    late = minutes >= minutes[-1] / 2
    for key in PANELS:
        values = np.array([s[key] for s in samples], dtype=float)
        slope = np.polyfit(minutes[late] / 60, values[late], 1)[0] if late.sum() > 1 else 0.0
        out[key] = {"first": round(values[0], 2), "last": round(values[-1], 2), "most": round(values.max(), 2), "slope_per_hour": round(slope, 2)}
    thinned = samples[:: -(-len(samples) // 200)]
    return {**out, "samples": [{key: round(value, 3) for key, value in s.items()} for s in thinned]}


def draw(rows, path):
    fig, axes = plt.subplots(1, len(PANELS), figsize=(12, 3.6))
    for ax, (key, title) in zip(axes, PANELS.items()):
        for stage, row in rows.items():
            colour, style = STYLES[stage]
            ax.plot([s["minutes"] for s in row["samples"]], [s[key] for s in row["samples"]], color=colour, linestyle=style, label=f"{stage}.py")
        ax.set(xlabel="time (minutes)", ylabel=title, ylim=(0, None))
        ax.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="upper center", ncols=len(labels), frameon=False)
    fig.tight_layout(rect=(0, 0, 1, 0.92))
    fig.savefig(path, dpi=150)


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for stage, flags in INPUTS.items():
            print(f"{stage}.py, a short run for its outputs ...", flush=True)
            if start(stage, flags, folder).wait():
                sys.exit(f"error: {stage}.py failed: {last_words(stage, folder)}")
        processes = {stage: start(stage, f"{flags} --checkpoint-seconds 20", folder) for stage, flags in SOAK.items()}
        run_dirs = {stage: folder / "runs" / f"{ENV_ID}__{flags.split()[1]}__1" for stage, flags in SOAK.items()}
        try:
            for stage, process in processes.items():
                wait_until_working(stage, process, run_dirs[stage], folder)
            samples = watch(processes, run_dirs, folder, args)
            endings = {stage: stop(stage, process, run_dirs[stage], folder) for stage, process in processes.items()}
        finally:
            for process in processes.values():
                process.kill()

    rows = {stage: {**endings[stage], **summary(samples[stage])} for stage in SOAK}
    columns = f"{'updates':>9s} {'memory (MB)':>16s} {'MB per hour':>12s} {'open files':>11s} {'TensorBoard (MB)':>17s} {'stopped well':>13s}"
    print(f"\n{'stage':20s} {columns}")
    for stage, row in rows.items():
        memory, files, logs = (row[key] for key in PANELS)
        text = f"{memory['first']:.0f} -> {memory['last']:.0f}"
        ending = "yes" if row["saved_and_said_how_to_go_on"] else f"no ({row['exit_status']})"
        files = f"{files['first']:.0f} -> {files['last']:.0f}"
        print(f"{stage:20s} {row['updates']:9d} {text:>16s} {memory['slope_per_hour']:12.1f} {files:>11s} {logs['last']:17.2f} {ending:>13s}")
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    draw(rows, f"{args.out}.png")
    results = {"minutes": args.minutes, "env_id": ENV_ID, "device": "cpu", "torch": torch.__version__, "stages": rows}
    Path(f"{args.out}.json").write_text(json.dumps(results, indent=1))
    print(f"wrote {args.out}.json and {args.out}.png")
    sys.exit(not all(row["saved_and_said_how_to_go_on"] for row in rows.values()))
