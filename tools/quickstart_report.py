"""The quickstart's one picture and one result file, from what its four stages wrote.

report.png     learning curves, returns as bars and against label counts, the latents in 2-D, predicted frames
results.json   the returns in numbers, and how long each stage took

    python -m tools.quickstart_report --env-id coinrun --seed 1
"""

import json
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro

from lapo_bc import get_windows, load_checkpoint, load_dataset, refuse
from lapo_decode import load_labels
from tools.inspect_latents import GREY, plot_by_action, tile, to_pixels
from tools.loading import action_names, encode, load_lapo, write_whole

# Okabe and Ito's
BLUE = "#0072B2"
ORANGE = "#D55E00"
DARK = "#333333"
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


def plot_curve(ax, curve, key, name, baseline, baseline_name):
    """A metric against updates, and what it must beat, dashed."""
    updates = [point["update"] for point in curve]
    values = [point[key] for point in curve]
    ax.plot(updates, values, "o-", color=BLUE, label=name)
    ax.axhline(baseline, color=DARK, ls="--", label=baseline_name)
    ax.set_xlabel("updates")
    ax.legend(fontsize=9)


def plot_bars(ax, decode):
    """Returns with 512 labels, or with every number of labels where 512 is none, beside the two ends."""
    curve = sorted(decode["curve"], key=lambda row: (row["n_labels"], row["method"]))
    curve = [row for row in curve if row["n_labels"] == 512] or curve
    rows = [decode["random"], *curve, decode["demonstrator"]]
    names = []
    colors = []
    for row in rows:
        name, color = {**METHODS, **ENDS}[row["method"]]
        if row in curve:
            name += f"\n{row['n_labels']:,} labels"
        names.append(f"{name}\n{row['relative_to_demonstrator']:.0%}")
        colors.append(color)
    means = [row["return_mean"] for row in rows]
    stderrs = [row["return_stderr"] for row in rows]
    ax.bar(range(len(rows)), means, yerr=stderrs, capsize=4, color=colors)
    rotation = 90 if len(rows) > 4 else 0
    ax.set_xticks(range(len(rows)), names, fontsize=9, rotation=rotation)
    ax.set_title("3. Playing")
    ax.set_ylabel("episodic return (mean, standard error)")
    ax.set_xlabel("percent: share of the demonstrator's return above random")


def plot_returns(ax, decode):
    """Returns against the number of labels."""
    for method, (name, color) in METHODS.items():
        rows = [row for row in decode["curve"] if row["method"] == method]
        counts = [row["n_labels"] for row in rows]
        means = [row["return_mean"] for row in rows]
        stderrs = [row["return_stderr"] for row in rows]
        label = name.replace("\n", " ")
        ax.errorbar(counts, means, stderrs, fmt="o-", capsize=3, color=color, label=label)
    for method, (name, color) in ENDS.items():
        ax.axhline(decode[method]["return_mean"], color=color, ls="--", label=name)
    ax.set_xscale("log", base=2)
    counts = sorted({row["n_labels"] for row in decode["curve"]})
    ax.set_xticks(counts, [f"{count:,}" for count in counts])
    ax.set_title(f"Return against label counts (mean of {decode['num_draws']} draws)")
    ax.set_xlabel("labelled frames")
    ax.set_ylabel("episodic return (mean, standard error over draws)")
    ax.margins(y=0.25)
    ax.legend(fontsize=9, ncol=2, loc="upper center")


@torch.no_grad()
def plot_predictions(ax, lapo, frames, t):
    """Predictions of 12 windows of t (n,) in which much changes, spread over the upper quarter."""
    after = frames[t + 1].astype(np.int16)
    change = np.abs(after - frames[t]).mean((1, 2, 3))
    order = np.argsort(change, kind="stable")[::-1]
    apart = max(1, len(t) // 48)
    chosen = t[order][::apart][:12]
    windows = get_windows(frames, chosen, "cpu")
    prediction, _, _ = lapo(windows)
    now = windows[:, 3:6]
    true = windows[:, 6:]
    error = (prediction - true).abs() * 2 - 0.5
    pictures = torch.stack([now, true, prediction, error])  # (4, 12, 3, 64, 64)
    ax.imshow(tile(to_pixels(pictures), 1))
    ax.set_title("What the forward dynamics model makes of two frames and a latent, where much changes")
    names = ["$o_t$", "$o_{t+1}$, true", r"$\hat{o}_{t+1}$, predicted", "|error| × 2\n(black: none)"]
    ax.set_yticks(np.arange(4) * 66 + 33, names)
    ax.set_xticks([])
    ax.spines[:].set_visible(False)


def main(args):
    plt.switch_backend("Agg")
    runs = Path(args.runs_dir or f"runs/quickstart/{args.env_id}__{args.seed}")
    args.data_dir = args.data_dir or f"{runs}/data"
    found = {}
    for stage in STAGES:
        folder = runs / f"{args.env_id}__{stage}__{args.seed}"
        if not (folder / "results.json").exists():
            command = f"python {stage}.py --env-id {args.env_id} --seed {args.seed} --runs-dir {runs}"
            refuse(f"{folder} holds no finished run: `{command} --data-dir {args.data_dir}`")
        found[stage] = json.loads((folder / "results.json").read_text())
    pretrain = found["lapo_pretrain"]
    decode = found["lapo_decode"]
    data, _, test = load_dataset(args)
    path = runs / f"{args.env_id}__lapo_pretrain__{args.seed}" / "checkpoint.pt"
    lapo = load_lapo(load_checkpoint(path, "lapo_pretrain", args.env_id), "cpu")
    t = np.sort(np.random.default_rng(0).permutation(test.windows)[:2048])
    labels = load_labels(test, "actions")
    if labels is not None:
        labels = labels[t]

    fig = plt.figure(figsize=(17, 14), layout="constrained")
    levels = f"{data['num_levels']} levels" if data["num_levels"] else "all levels"
    fig.suptitle(f"LAPO on {args.env_id} ({levels}, seed {args.seed}): from videos to a policy", fontsize=15)
    grid = fig.add_gridspec(3, 3, height_ratios=[1, 1.05, 1.1])

    ax = fig.add_subplot(grid[0, 0])
    copying = pretrain["test/copy_last_frame_loss"]
    name = "forward dynamics model, test frames"
    plot_curve(ax, pretrain["curve"], "test/fdm_loss", name, copying, "copying the last frame")
    ax.set_title("1. Pretraining: predicting the next frame")
    ax.set_ylabel("mean squared error, pixels in 0 … 1")
    ax.set_yscale("log")

    if labels is not None:
        ax = fig.add_subplot(grid[0, 1])
        chance = 1 / len(np.unique(labels))
        name = "linear probe, test frames"
        plot_curve(ax, pretrain["curve"], "probe/balanced_accuracy", name, chance, "chance")
        ax.set_title("Reading the true action from the latent")
        ax.set_ylabel("balanced accuracy")
        ax.set_ylim(0, None)

    ax = fig.add_subplot(grid[0, 2])
    name = "latent policy, test frames"
    plot_curve(ax, found["lapo_bc"]["curve"], "test/r2", name, 0, "predicting the mean latent")
    ax.set_title("2. Cloning the latent policy")
    ax.set_ylabel("share of the latents' variance explained")

    plot_bars(fig.add_subplot(grid[1, 0]), decode)
    plot_returns(fig.add_subplot(grid[1, 1]), decode)
    ax = fig.add_subplot(grid[1, 2])
    latents = encode(lapo, test, t, "cpu").quantised
    plot_by_action(ax, latents, labels, action_names(data))
    ax.set_title("Latents of test frames, by true action")
    plot_predictions(fig.add_subplot(grid[2, :]), lapo, test, t)
    fig.savefig(runs / "report.png", dpi=80, bbox_inches="tight")

    seconds = {stage: results["wall_seconds"] for stage, results in found.items()}
    results = {
        "env_id": args.env_id,
        "seed": args.seed,
        "wall_seconds": round(sum(seconds.values()), 1),
        "stage_seconds": seconds,
        "pretrain": {key: pretrain[key] for key in pretrain if key.startswith(("test/", "probe/"))},
    }
    for key in ("device", "torch", "commit", "curve", "random", "demonstrator"):
        results[key] = decode[key]
    write_whole(runs / "results.json", json.dumps(results, indent=2))
    print(f"wrote {runs}/report.png and {runs}/results.json")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
