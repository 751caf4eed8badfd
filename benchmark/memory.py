"""Does a stage's memory depend on the dataset's size? Peak resident memory of pretraining and cloning on small and huge datasets.

    python benchmark/memory.py          # 65,536 frames against the paper's 8M (98 GB), or 1M (12 GB) for cloning

The frames are sparse files: they take no disk, but every read of them maps pages like any other. Networks are small, so
that the data would show. Writes benchmark/results/memory.json: {"device", "rows": [{"stage", "num_frames", "dataset_gb", "peak_memory_mb", ...}]}.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from lapo_pretrain import DATA_FORMAT_VERSION  # noqa: E402

SMALL = "--env-id coinrun --no-cuda --data-dir data"
FLAGS = {
    "lapo_pretrain": f"{SMALL} --idm-scale 0.25 --fdm-width 4 --eval-windows 256",
    "lapo_bc": f"{SMALL} --policy-scale 0.25 --eval-frames 256",
}


@dataclass
class Args:
    pretrain_frames: tuple[int, ...] = (65_536, 8_000_000)
    """sizes of the training split for pretraining"""
    bc_frames: tuple[int, ...] = (65_536, 1_000_000)
    """sizes of the training split for cloning, which has to label them all"""
    num_updates: int = 500
    """updates of each stage; cloning labels all frames first"""
    batch_size: int = 128
    """batch size of both"""
    out: str = str(ROOT / "benchmark" / "results" / "memory.json")
    """where the JSON goes"""


def make_dataset(folder, num_frames):
    """A dataset of black frames in sparse files, one endless episode."""
    splits = {"train": num_frames, "test": 4096}
    for split, n in splits.items():
        (folder / split).mkdir(parents=True)
        np.lib.format.open_memmap(folder / split / "frames.npy", "w+", np.uint8, (n, 64, 64, 3))
        np.save(folder / split / "first.npy", np.arange(n) == 0)
    meta = {"format_version": DATA_FORMAT_VERSION, "env_id": "coinrun", "num_levels": 0, "start_level": 0}
    (folder / "meta.json").write_text(json.dumps({**meta, "splits": {split: {"num_frames": n} for split, n in splits.items()}}))


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    rows = []
    for num_frames in sorted({*args.pretrain_frames, *args.bc_frames}):
        with tempfile.TemporaryDirectory() as folder:
            make_dataset(Path(folder) / "data", num_frames)
            for stage, sizes in (("lapo_pretrain", args.pretrain_frames), ("lapo_bc", args.bc_frames)):
                if stage == "lapo_bc" and num_frames not in sizes:
                    continue
                updates = args.num_updates if num_frames in sizes else 1  # cloning needs a checkpoint, of one update if nothing else is asked
                command = [
                    sys.executable,
                    str(ROOT / f"{stage}.py"),
                    *FLAGS[stage].split(),
                    "--num-updates",
                    str(updates),
                    "--batch-size",
                    str(args.batch_size),
                ]
                process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
                _, status, usage = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(status)
                if process.returncode:
                    sys.exit(f"error: {' '.join(command)} ended with {process.returncode}, see above")
                if num_frames not in sizes:
                    continue
                gb, peak = round(num_frames * 12_288 / 1e9, 1), usage.ru_maxrss // 1024
                rows.append({"stage": stage, "num_frames": num_frames, "dataset_gb": gb, "num_updates": updates, "peak_memory_mb": peak})
                print(f"{stage:14s} {num_frames:10,d} frames ({gb:6.1f} GB): peak resident memory {peak:6d} MB", flush=True)
    Path(args.out).write_text(json.dumps({"device": "cpu", "torch": torch.__version__, "rows": rows}, indent=1))
    print(f"wrote {args.out}")
