"""The quickstart's one picture and one result file, from what its four stages wrote.

report.png     learning curves, returns as bars and against label counts, the latents in 2-D, predicted frames
results.json   the returns in numbers, and how long each stage took

    python report.py --env-id coinrun --seed 1
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro

from lapo_bc import get_windows, load_checkpoint, load_dataset
from lapo_inspect import action_names, build_networks, encode, load_labels, plot_by_action, to_pixels
from lapo_pretrain import predict

BLUE, ORANGE, GREEN, DARK, GREY = "#0072B2", "#D55E00", "#009E73", "#333333", "#999999"  # Okabe and Ito's
METHODS = {
    "cloning_from_scratch": ("cloning\nfrom scratch", ORANGE),
    "lapo_decoder": ("LAPO\n+ decoder", BLUE),
}
ENDS = {"random": ("random", GREY), "demonstrator": ("demonstrator", DARK)}
STAGES = ("collect_expert_data", "lapo_pretrain", "lapo_bc", "lapo_decode")


@dataclass
class Args:
    env_id: str = "coinrun"  # the Procgen game
    seed: int = 1  # the seed of the runs
    runs_dir: str | None = None  # where the runs lie; default runs/quickstart/ENV_ID__SEED
    data_dir: str | None = None  # the dataset; default RUNS_DIR/data


def plot_curve(ax, curve, key, baseline, names, **labels):
    """A metric against updates, and what it must beat, dashed."""
    ax.plot([c["update"] for c in curve], [c[key] for c in curve], "o-", color=BLUE, label=names[0])
    ax.axhline(baseline, color=DARK, ls="--", label=names[1])
    ax.set(xlabel="updates", **labels)
    ax.legend(fontsize=9)


def plot_bars(ax, decode):
    """Returns with 512 labels, or with every number of labels where 512 is none, beside the two ends."""
    curve = sorted(decode["curve"], key=lambda row: (row["n_labels"], row["method"]))
    curve = [row for row in curve if row["n_labels"] == 512] or curve
    rows = [decode["random"], *curve, decode["demonstrator"]]
    names, colors = zip(*((METHODS | ENDS)[row["method"]] for row in rows))
    counts = [f"\n{row['n_labels']:,} labels" if row in curve else "" for row in rows]
    shares = [f"\n{row['relative_to_demonstrator']:.0%}" for row in rows]
    names = [name + count + share for name, count, share in zip(names, counts, shares)]
    means, stderrs = ([row[key] for row in rows] for key in ("return_mean", "return_stderr"))
    ax.bar(range(len(rows)), means, yerr=stderrs, capsize=4, color=colors)
    ax.set_xticks(range(len(rows)), names, fontsize=9, rotation=90 * (len(rows) > 4))
    ax.set(title="3. Playing", ylabel="episodic return (mean, standard error)")
    ax.set_xlabel("percent: share of the demonstrator's return above random")


def plot_returns(ax, decode):
    """Returns against the number of labels."""
    for method, (name, color) in METHODS.items():
        rows = [row for row in decode["curve"] if row["method"] == method]
        n, mean, stderr = ([row[key] for row in rows] for key in ("n_labels", "return_mean", "return_stderr"))
        ax.errorbar(n, mean, stderr, fmt="o-", capsize=3, color=color, label=name.replace("\n", " "))
    for method, (name, color) in ENDS.items():
        ax.axhline(decode[method]["return_mean"], color=color, ls="--", label=name)
    ax.set_xscale("log", base=2)
    ax.set_xticks(n, [f"{count:,}" for count in n])
    ax.set(
        title=f"Return against label counts (mean of {decode['num_draws']} draws)", xlabel="labelled frames"
    )
    ax.set_ylabel("episodic return (mean, standard error over draws)")
    ax.margins(y=0.25)
    ax.legend(fontsize=9, ncol=2, loc="upper center")


@torch.no_grad()
def plot_predictions(ax, networks, frames, t):
    """Predictions of 12 windows of t (n,) in which much changes, spread over the upper quarter."""
    change = [np.abs(frames[i + 1].astype(int) - frames[i]).mean() for i in t]
    t = t[np.argsort(change, kind="stable")[::-1]][:: max(1, len(t) // 48)][:12]
    windows = get_windows(frames, t, "cpu")
    prediction, true = predict(*networks, windows)[0], windows[:, 6:]
    rows = torch.stack([windows[:, 3:6], true, prediction, (prediction - true).abs() * 2 - 0.5])
    tiles = np.pad(to_pixels(rows), [(0, 0), (0, 0), (1, 1), (1, 1), (0, 0)], constant_values=255)
    ax.imshow(tiles.transpose(0, 2, 1, 3, 4).reshape(4 * 66, -1, 3))
    ax.set_title("What the forward dynamics model makes of two frames and a latent, where much changes")
    names = ["$o_t$", "$o_{t+1}$, true", r"$\hat{o}_{t+1}$, predicted", "|error| × 2\n(black: none)"]
    ax.set_yticks(np.arange(4) * 66 + 33, names)
    ax.set_xticks([])
    ax.spines[:].set_visible(False)


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    runs = Path(args.runs_dir or f"runs/quickstart/{args.env_id}__{args.seed}")
    args.data_dir = args.data_dir or f"{runs}/data"
    found = {}
    for stage in STAGES:
        folder = runs / f"{args.env_id}__{stage}__{args.seed}"
        if not (folder / "results.json").exists():
            command = f"python {stage}.py --env-id {args.env_id} --seed {args.seed} --runs-dir {runs}"
            sys.exit(f"error: {folder} holds no finished run: `{command} --data-dir {args.data_dir}`")
        found[stage] = json.loads((folder / "results.json").read_text())
    _, pretrain, bc, decode = found.values()
    data, frames, windows = load_dataset(args)
    path = runs / f"{args.env_id}__lapo_pretrain__{args.seed}" / "checkpoint.pt"
    pretrained = load_checkpoint(path, "lapo_pretrain", ["idm", "vq", "fdm"], args)
    networks = build_networks(pretrained["args"], "cpu", pretrained)
    t = np.sort(np.random.default_rng(0).permutation(windows["test"])[:2048])
    labels = load_labels(frames, {"test": t}).get("test")

    fig = plt.figure(figsize=(17, 14), layout="constrained")
    levels = f"{data['num_levels']} levels" if data["num_levels"] else "all levels"
    fig.suptitle(f"LAPO on {args.env_id} ({levels}, seed {args.seed}): from videos to a policy", fontsize=15)
    grid = fig.add_gridspec(3, 3, height_ratios=[1, 1.05, 1.1])
    names = "forward dynamics model, test frames", "copying the last frame"
    pixels = {"title": "1. Pretraining: predicting the next frame", "yscale": "log"}
    pixels["ylabel"] = "mean squared error, pixels in 0 … 1"
    copy_loss = pretrain["test/copy_last_frame_loss"]
    plot_curve(fig.add_subplot(grid[0, 0]), pretrain["curve"], "test/fdm_loss", copy_loss, names, **pixels)
    if labels is not None:
        accuracy = {"title": "Reading the true action from the latent", "ylabel": "balanced accuracy"}
        chance, names = 1 / len(np.unique(labels)), ("linear probe, test frames", "chance")
        key, ax = "probe/balanced_accuracy", fig.add_subplot(grid[0, 1])
        plot_curve(ax, pretrain["curve"], key, chance, names, ylim=(0, None), **accuracy)
    names = "latent policy, test frames", "predicting the mean latent"
    cloning = {"title": "2. Cloning the latent policy", "ylabel": "share of the latents' variance explained"}
    ax = fig.add_subplot(grid[0, 2])
    plot_curve(ax, bc["curve"], "test/r2", 0, names, **cloning)
    plot_bars(fig.add_subplot(grid[1, 0]), decode)
    plot_returns(fig.add_subplot(grid[1, 1]), decode)
    ax = fig.add_subplot(grid[1, 2])
    plot_by_action(ax, encode(*networks[:2], frames["test"], t, "cpu")[1], labels, action_names(data))
    ax.set_title("Latents of test frames, by true action")
    plot_predictions(fig.add_subplot(grid[2, :]), networks, frames["test"], t)
    fig.savefig(runs / "report.png", dpi=80, bbox_inches="tight")

    seconds = {stage: results["wall_seconds"] for stage, results in found.items()}
    results = {"env_id": args.env_id, "seed": args.seed, "bf16": pretrain["args"]["bf16"]}
    results |= {key: decode[key] for key in ("device", "torch", "commit", "curve", "random", "demonstrator")}
    results |= {"wall_seconds": round(sum(seconds.values()), 1), "stage_seconds": seconds}
    results["pretrain"] = {key: pretrain[key] for key in pretrain if key.startswith(("test/", "probe/"))}
    (runs / "results.json").write_text(json.dumps(results, indent=2))
    print(f"wrote {runs}/report.png and {runs}/results.json")
