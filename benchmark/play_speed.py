"""Is one frame of the dream made in time? lapo_play.py's step (FDM, real game, both pictures) at several widths, thread counts and precisions.

    python benchmark/play_speed.py

The weights are random, as speed does not depend on them. Every round times each form for --frames frames, so that other work on the machine
meets all of them alike. Writes benchmark/results/play-speed.json: {"device_name", "cores", "load_average" (of the last minute), "torch", "rounds",
"frames", "rows": [{"shapes", "threads", "precision", "milliseconds" (median of a frame), "milliseconds_95" (95 of 100 take less),
"frames_per_second" (of the median)}]}.
"""

import json
import os
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from lapo_play import FDM, STAY, World, make_env  # noqa: E402

SHAPES = {"quickstart": (32, 8), "paper": (128, 24)}  # latent_dim, fdm_width


@dataclass
class Args:
    threads: tuple[int, ...] = (1, 2)
    """counts of threads to compare; lapo_play.py uses 1"""
    rounds: int = 5
    """rounds over all forms"""
    frames: int = 30
    """frames of each form in a round"""
    out: str = str(ROOT / "benchmark" / "results" / "play-speed.json")
    """where the JSON goes"""


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    seconds = {}  # (shapes, threads, precision) -> seconds of every frame
    worlds = {}
    for name, (latent_dim, width) in SHAPES.items():
        fdm = FDM(latent_dim, width).to(memory_format=torch.channels_last).eval()
        worlds[name] = World(fdm, lambda level: make_env("coinrun", 1, 0, 0, level)), torch.randn(1, latent_dim)
    for _ in range(args.rounds):
        for name, (world, z) in worlds.items():
            for threads in args.threads:
                torch.set_num_threads(threads)
                for precision in ("float32", "bfloat16"):
                    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
                        for frame in range(args.frames + 3):
                            began = time.perf_counter()
                            world.step(z, STAY)
                            world.pictures()
                            if frame >= 3:  # warm
                                seconds.setdefault((name, threads, precision), []).append(time.perf_counter() - began)
    rows = []
    for (name, threads, precision), times in seconds.items():
        median, slow = 1000 * np.median(times), 1000 * np.percentile(times, 95)
        rows.append({"shapes": name, "threads": threads, "precision": precision})
        rows[-1] |= {"milliseconds": round(median, 2), "milliseconds_95": round(slow, 2), "frames_per_second": round(1000 / median, 1)}
        print(f"{name:10s} {threads} threads {precision:8s}: {median:7.1f} ms (95%: {slow:7.1f}), {1000 / median:6.1f} frames/s")
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(": ")[1] for line in cpuinfo if line.startswith("model name")), platform.machine())
    results = {"device_name": cpu, "cores": os.cpu_count(), "load_average": os.getloadavg()[0], "torch": torch.__version__}
    Path(args.out).write_text(json.dumps({**results, "rounds": args.rounds, "frames": args.frames, "rows": rows}, indent=1) + "\n")
    print(f"wrote {args.out}")
