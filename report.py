# /// script
# requires-python = ">=3.10,<3.13"
# dependencies = ["numpy<2", "tyro", "matplotlib"]
# ///
"""The quickstart's one picture and one result file, from what the four stages wrote.

report.png     learning curves, the table as bars, return against label counts, predicted frames, the latents in 2-D
results.json   the table in numbers, and how long each stage took

python report.py --env-id coinrun --seed 1
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NAMES = {"random": "random", "bc_from_scratch": "BC from scratch", "lapo_decoder": "LAPO + decoder", "demonstrator": "demonstrator"}
COLORS = {"random": "#999999", "bc_from_scratch": "#D55E00", "lapo_decoder": "#0072B2", "demonstrator": "#333333"}  # Okabe and Ito
STAGES = ("collect_expert_data", "lapo_pretrain", "lapo_bc", "lapo_decode")


@dataclass
class Args:
    env_id: str = "coinrun"
    """the Procgen game"""
    seed: int = 1
    """the seed of the runs"""
    runs_dir: str | None = None
    """where the runs lie, and report.png and results.json go; default runs/quickstart/ENV_ID__SEED"""
    data_dir: str | None = None
    """the dataset, for the true actions in the map of latents; default RUNS_DIR/data"""


def plot_latents(ax, latents, actions):
    """Test latents (n, latent_dim) on their two principal components; colour: horizontal move, marker: vertical move."""
    x = latents - latents.mean(0)
    _, s, vt = np.linalg.svd(x, full_matrices=False)
    xy, share = x @ vt[:2].T, (s**2 / (s**2).sum())[:2]
    if actions is None:
        ax.scatter(*xy.T, s=6, c="#999999", label="no labels on disk")
    for i, (horizontal, color) in enumerate((("left", "#D55E00"), ("", "#999999"), ("right", "#0072B2"))):
        for j, (vertical, marker) in enumerate((("down", "v"), ("", "o"), ("up", "^"))):
            # Procgen's actions 0-8 are 3 * (x + 1) + (y + 1); 9-14 are buttons without a move
            mine = np.zeros(len(xy), bool) if actions is None else np.where(actions < 9, actions, 4) == 3 * i + j
            if mine.any():
                name = f"{horizontal} {vertical}".strip() or "stay or a button"
                ax.scatter(*xy[mine].T, s=10, c=color, marker=marker, alpha=0.6, linewidths=0, label=name)
    ax.set(title="Continuous latents of test frames (before the VQ), by true action", xlabel=f"1st principal component ({share[0]:.0%} of variance)")
    ax.set_ylabel(f"2nd principal component ({share[1]:.0%})")
    lo, hi = np.percentile(xy, [0.5, 99.5], axis=0)
    ax.set(xlim=(lo[0], hi[0]), ylim=(lo[1], hi[1]))
    ax.legend(fontsize=8, markerscale=1.2, ncol=5, loc="upper center", bbox_to_anchor=(0.5, -0.12))


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    runs = Path(args.runs_dir or f"runs/quickstart/{args.env_id}__{args.seed}")
    data_dir = Path(args.data_dir or runs / "data")
    folders = {stage: runs / f"{args.env_id}__{stage}__{args.seed}" for stage in STAGES}
    for stage, folder in folders.items():
        if not (folder / "results.json").exists():
            command = f"python {stage}.py --env-id {args.env_id} --seed {args.seed} --runs-dir {runs} --data-dir {data_dir}"
            sys.exit(f"error: {folder} holds no finished run: make it with `{command}`")
    collect, pretrain, bc, decode = (json.loads((folder / "results.json").read_text()) for folder in folders.values())
    rows = decode["rows"]

    fig = plt.figure(figsize=(17, 14), layout="constrained")
    levels = f"{decode['num_levels']} levels" if decode["num_levels"] else "all levels"
    fig.suptitle(f"LAPO on {args.env_id} ({levels}, seed {args.seed}): from videos without actions to a policy that plays", fontsize=15)
    grid = fig.add_gridspec(3, 6, height_ratios=[1, 1, 1.15])

    ax = fig.add_subplot(grid[0, :2])
    updates = [c["update"] for c in pretrain["curve"]]
    ax.plot(updates, [c["test/fdm_loss"] for c in pretrain["curve"]], "o-", color="#0072B2", label="forward dynamics model, test frames")
    ax.axhline(pretrain["test/copy_last_frame_loss"], color="#333333", ls="--", label="copying the last frame")
    ax.set(title="1. Pretraining: predicting the next frame", xlabel="updates", yscale="log")
    ax.set_ylabel("mean squared error per pixel and channel (black 0, white 1)")
    ax.legend(fontsize=9)

    ax = fig.add_subplot(grid[0, 2:4])
    if "probe/balanced_accuracy" in pretrain:
        ax.plot(updates, [c["probe/balanced_accuracy"] for c in pretrain["curve"]], "o-", color="#009E73", label="linear probe on the latent")
        ax.axhline(pretrain["probe/chance"], color="#333333", ls="--", label="chance")
    if pretrain["latent_space"]:  # at the end, by another probe
        for of, look, name in (("trained", "s", "same, logistic regression"), ("untrained_idm", "D", "the same of the untrained IDM")):
            ax.plot(updates[-1], pretrain["latent_space"][of]["linear_probe"], look, color="#009E73", mfc="none", ms=9, label=name)
    ax.set(title="Reading the true action (15) from the latent", xlabel="updates", ylabel="balanced accuracy", ylim=(0, None))
    ax.legend(fontsize=9)

    ax = fig.add_subplot(grid[0, 4:])
    updates, mse = [c["update"] for c in bc["curve"]], [c["test/latent_mse"] for c in bc["curve"]]
    ax.plot(updates, mse, "o-", color="#0072B2", label="latent policy, test frames")
    ax.axhline(bc["test/mean_latent_mse"], color="#333333", ls="--", label="predicting the mean latent")
    ax.set(title="2. Cloning the latent policy", xlabel="updates", ylabel="mean squared error per dimension", ylim=(0, None))
    ax.legend(fontsize=9)

    ax = fig.add_subplot(grid[1, :2])
    bars = ax.bar([NAMES[r["method"]] for r in rows], [r["return_mean"] for r in rows], yerr=[r["return_stderr"] for r in rows], capsize=4)
    for bar, r in zip(bars, rows):
        bar.set_color(COLORS[r["method"]])
        place = (bar.get_x() + bar.get_width() / 2, 0.05)
        ax.annotate(f"{r['relative_to_demonstrator']:.0%}", place, ha="center", va="bottom", color="white", fontsize=12)
    ax.set(title=f"3. Playing, with {decode['n_labels']} labels", ylabel="episodic return (mean, standard error)")
    ax.set_xlabel("in white: share of the demonstrator's return above random")
    ax.tick_params(axis="x", labelsize=9)

    ax = fig.add_subplot(grid[1, 2:4])
    for method in ("lapo_decoder", "bc_from_scratch"):
        points = [c for c in decode["curve"] if c["method"] == method]
        n, mean, stderr = (np.array([c[k] for c in points]) for k in ("n_labels", "return_mean", "return_stderr"))
        ax.errorbar(n, mean, stderr, fmt="o-", capsize=3, color=COLORS[method], label=NAMES[method])
    for r, style in ((rows[0], ":"), (rows[-1], "--")):
        ax.axhline(r["return_mean"], color=COLORS[r["method"]], ls=style, label=NAMES[r["method"]])
    ax.set_xscale("log", base=2)
    ax.set_xticks([c["n_labels"] for c in points], [f"{c['n_labels']:,}" for c in points])
    ax.set(
        title=f"Return against label counts (mean of {decode['num_draws']} draws)",
        xlabel="action-labelled frames",
        ylabel="episodic return (mean, standard error over draws)",
    )
    ax.set_ylim(0, 1.35 * rows[-1]["return_mean"])
    ax.legend(fontsize=9, ncol=2, loc="upper center")

    t = np.load(folders["lapo_pretrain"] / "test_windows.npy")
    actions_path = data_dir / "test" / "actions.npy"
    actions = np.load(actions_path, mmap_mode="r")[t] if actions_path.exists() else None
    plot_latents(fig.add_subplot(grid[1, 4:]), np.load(folders["lapo_pretrain"] / "test_latents.npy"), actions)

    ax = fig.add_subplot(grid[2, :])
    strip = plt.imread(folders["lapo_pretrain"] / "predictions.png")
    ax.imshow(strip)
    ax.set(title="What the forward dynamics model makes of two frames and a latent action: 12 test windows in which much changes", xticks=[])
    ax.set_yticks(np.arange(4) * 66 + 33, ["$o_t$", "$o_{t+1}$, true", r"$\hat{o}_{t+1}$, predicted", "|error| × 2\n(black: none)"])
    for spine in ax.spines.values():
        spine.set_visible(False)
    fig.savefig(runs / "report.png", dpi=80)

    seconds = {stage: found["wall_seconds"] for stage, found in zip(STAGES, (collect, pretrain, bc, decode))}
    results = {
        "env_id": args.env_id, "seed": args.seed, "n_labels": decode["n_labels"], "wall_seconds": sum(seconds.values()),
        "stage_seconds": seconds, "bf16": pretrain["args"]["bf16"], "rows": rows, "curve": decode["curve"],
        "torch": decode["versions"]["torch"], "device": decode["device"],
    }  # fmt: skip
    (runs / "results.json").write_text(json.dumps(results, indent=2))
    print(f"wrote {runs}/report.png and {runs}/results.json")
