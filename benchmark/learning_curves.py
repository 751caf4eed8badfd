"""Do the optimisations change what is learned? Learning curves of the plain form and of the scripts', same seeds, side by side.

    python benchmark/learning_curves.py        # about nine minutes on two CPU cores; needs the quickstart's dataset

Pretraining sees the same batches in the same order, in float32 without any optimisation and as lapo_pretrain.py does it; PPO plays
16 levels of coinrun, where the two forms part ways within a few frames (sampled actions), so only their courses can be compared.
Writes benchmark/results/learning-curves.{json,png}.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import torch
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark")]
import throughput  # noqa: E402

import lapo_pretrain as pretrain  # noqa: E402

FAST = {"bf16": True, "fused": True, "inplace": True}
MICRO = 128 if throughput.device.type == "cpu" else None
PRETRAIN = {"plain": {"gather": True}, "ours": {"gather": True, "channels_last": True, "constant_map": True, **FAST}}
PPO = {"plain": {}, "ours": {"layout": "channels_last", "gym3": True, "micro": MICRO, **FAST}}


@dataclass
class Args:
    data_dir: str = "runs/quickstart/data/coinrun"
    """the dataset for pretraining, `make quickstart` makes it"""
    env_id: str = "coinrun"
    """the game, of the dataset and for PPO"""
    num_updates: int = 300
    """updates of pretraining, at the quickstart's shapes"""
    num_frames: int = 20_480
    """frames of PPO, IMPALA x0.5, 64 games x 64 steps, 8 minibatches"""
    seeds: tuple[int, ...] = (1, 2)
    """seeds of each"""
    out: str = str(ROOT / "benchmark" / "results" / "learning-curves")
    """where .json and .png go"""


def smooth(values, n):
    """Means over n neighbours, (len // n,)."""
    values = np.array(values)[: len(values) // n * n]
    return values.reshape(-1, n).mean(1)


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    frames, ts = pretrain.load_frames(args.data_dir, "train", pretrain.load_meta(args.data_dir, args.env_id))
    curves = {"pretrain": {}, "ppo": {}}
    for seed in args.seeds:
        for name in ("plain", "ours"):
            start, losses, returns = time.time(), [], []
            step = throughput.pretrain_step(throughput.SHAPES["quickstart"], frames, ts, losses, seed, **PRETRAIN[name])
            for _ in range(args.num_updates):
                step()
            curves["pretrain"].setdefault(name, []).append(smooth(losses, 20).tolist())
            seconds = time.time() - start
            s = SimpleNamespace(env_id=args.env_id, num_levels=16, scale=0.5, num_steps=64, num_minibatches=8)
            step, means, start = throughput.ppo_step(s, returns, seed, **PPO[name]), [], time.time()
            for _ in range(args.num_frames // 4096):
                step()
                means.append(float(np.mean(returns[-100:])) if returns else None)  # no episode has ended yet
            curves["ppo"].setdefault(name, []).append(means)
            end = f"FDM loss {curves['pretrain'][name][-1][-1]:.2e} ({seconds:.0f} s), PPO's return {means[-1]:.2f} ({time.time() - start:.0f} s)"
            print(f"seed {seed}, {name:5s}: {end}", flush=True)
    notes = {"seeds": args.seeds, "num_updates": args.num_updates, "num_frames": args.num_frames, "env_id": args.env_id}
    Path(f"{args.out}.json").write_text(json.dumps({"torch": torch.__version__, "device": str(throughput.device), **notes, "curves": curves}))

    fig, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for name, color in (("plain", "#D55E00"), ("ours", "#0072B2")):  # two colours that colour-blind readers tell apart, and two line styles
        for i, seed in enumerate(args.seeds):
            style = {"color": color, "ls": "--" if name == "plain" else "-", "alpha": 0.9, "lw": 1.5, "label": name if i == 0 else None}
            loss, means = curves["pretrain"][name][i], curves["ppo"][name][i]
            axes[0].plot(np.arange(1, len(loss) + 1) * 20, loss, **style)
            axes[1].plot(np.arange(1, len(means) + 1) * 4096, np.array(means, dtype=float), **style)
    axes[0].set(title="pretraining, quickstart's shapes, same batches", xlabel="update", ylabel="FDM loss (mean squared error)", yscale="log")
    axes[1].set(title="PPO, IMPALA x0.5, 16 levels of coinrun", xlabel="frames", ylabel="mean return of the last 100 episodes")
    for axis in axes:
        axis.legend(title=f"{len(args.seeds)} seeds each")
    fig.savefig(f"{args.out}.png", dpi=110)
    print(f"wrote {args.out}.json and .png")
