"""The picture of `make first`: what LAPO learned in a small world, where an action can be seen.

first.png      latents in 2-D in clusters, the next frame that each cluster's latent makes, returns
results.json   the clusters' purity and mutual information with the action, and the returns, in numbers

k-means makes a cluster for each action, and one more if there are steps in which nothing moves. True actions
only colour, name and count. Purity and mutual information are of the steps that move something.

    python first.py --env-id FrozenLake-v1 --seed 1
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro
from sklearn.cluster import KMeans
from sklearn.metrics import normalized_mutual_info_score

from lapo_bc import get_windows, load_checkpoint, load_dataset
from lapo_inspect import (
    COLORS,
    MARKERS,
    action_names,
    build_networks,
    encode,
    load_labels,
    plot_points,
    to_pixels,
)

NAMES = {"FrozenLake-v1": ["left", "down", "right", "up"], "CartPole-v1": ["push left", "push right"]}
BARS = {
    "random": ("random\nplay", "#999999"),
    "cloning_from_scratch": ("cloning\nfrom scratch", "#D55E00"),
    "lapo_decoder": ("LAPO\n+ decoder", "#0072B2"),
    "demonstrator": ("demon-\nstrator", "#333333"),
}


@dataclass
class Args:
    env_id: str = "FrozenLake-v1"  # the world
    seed: int = 1  # the seed of the runs
    runs_dir: str | None = None  # where the runs lie; default runs/quickstart/ENV_ID__SEED
    data_dir: str | None = None  # the dataset; default RUNS_DIR/data


def cluster(z, num_clusters, actions, moved):
    """k-means of latents z (n, latent_dim): clusters (n,), windows nearest to their centres, purity, NMI.

    The last two compare with true actions (n,), where something moved (n,).
    """
    kmeans = KMeans(num_clusters, n_init=10, random_state=0).fit(z)
    mine, true = kmeans.labels_[moved], actions[moved]
    purity = sum(np.bincount(true[mine == c]).max() for c in np.unique(mine)) / len(mine)
    return kmeans.labels_, kmeans.transform(z).argmin(0), purity, normalized_mutual_info_score(true, mine)


@torch.inference_mode()
def next_frames(fdm, windows, z):
    """The FDM's next frames of windows (n, 9, 64, 64) under each of C latents z: (n, C, 3, 64, 64)."""
    return torch.stack([fdm(windows[:, :6], latent.expand(len(windows), -1)) for latent in z], dim=1)


def plot_frames(ax, now, predicted, names):
    """Rows: frames (R, 3, 64, 64) beside what they become under C latents (R, C, 3, 64, 64)."""
    tiles = np.concatenate([to_pixels(now)[:, None], to_pixels(predicted)], axis=1)  # (R, 1 + C, 64, 64, 3)
    tiles = np.pad(tiles, [(0, 0), (0, 0), (2, 2), (2, 2), (0, 0)], constant_values=255)
    ax.imshow(tiles.transpose(0, 2, 1, 3, 4).reshape(68 * len(tiles), -1, 3))
    ax.set_xticks(68 * np.arange(1 + len(names)) + 34, ["now", *names])
    ax.set_yticks([])
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_xlabel("The forward dynamics model's next frame under each cluster's latent action")


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    runs = Path(args.runs_dir or f"runs/quickstart/{args.env_id}__{args.seed}")
    args.data_dir, args.allow_unfinished = args.data_dir or f"{runs}/data", False
    path = runs / f"{args.env_id}__lapo_decode__{args.seed}" / "results.json"
    if not path.exists():
        sys.exit(f"error: {path} is not there: `SEED={args.seed} ./quickstart.sh {args.env_id}` makes it")
    decode = json.loads(path.read_text())
    data, frames, windows = load_dataset(args)
    path = runs / f"{args.env_id}__lapo_pretrain__{args.seed}" / "checkpoint.pt"
    pretrained = load_checkpoint(path, "lapo_pretrain", ["idm", "vq", "fdm"], args)
    idm, vq, fdm = build_networks(pretrained["args"], "cpu", pretrained)

    t = np.random.default_rng(0).permutation(windows["test"])[:1024]
    actions, names = load_labels(frames, {"test": t})["test"], NAMES.get(args.env_id) or action_names(data)
    seen, A = frames["test"][t[:, None] + [0, 1]], len(names)  # o_t, o_{t+1} (n, 2, 64, 64, 3)
    moved, z = (seen[:, 0] != seen[:, 1]).any((1, 2, 3)), encode(idm, vq, frames["test"], t, "cpu")[1]
    C = A + (not moved.all())
    clusters, nearest, purity, nmi = cluster(z, C, actions, moved)
    called = [np.bincount(np.where(moved, actions, A)[clusters == c]).argmax() for c in range(C)]

    fig = plt.figure(figsize=(17, 5.8), layout="constrained")
    grid = fig.add_gridspec(1, 3, width_ratios=[1, 1.35, 0.75])
    ax = fig.add_subplot(grid[0])
    colors, markers = [*COLORS[:A], "#999999"], [*MARKERS[:A], "."]
    plot_points(ax, z, np.where(moved, actions, A), [*names, "nothing moves"], colors, markers)
    ax.set_title(f"Latent actions of {len(t):,} steps, learned without labels;\ncolours: the true actions")
    order = np.argsort(called, kind="stable")
    few = get_windows(frames["test"], t[:256], "cpu")
    predicted = next_frames(fdm, few, torch.from_numpy(z[nearest[order]]))  # (n, C, 3, 64, 64)
    best = predicted.std(1).mean((1, 2, 3)).argsort(descending=True)[:64:16]  # where it matters most
    shown = [[*names, "nothing"][called[c]] for c in order]
    plot_frames(fig.add_subplot(grid[1]), few[best, 3:6], predicted[best], shown)

    ax, n = fig.add_subplot(grid[2]), max(row["n_labels"] for row in decode["curve"])
    rows = [
        decode["random"],
        *(row for row in decode["curve"] if row["n_labels"] == n),
        decode["demonstrator"],
    ]
    rows = {row["method"]: row for row in rows}
    rows = {method: rows[method] for method in BARS if method in rows}
    means, stderrs = ([row[key] for row in rows.values()] for key in ("return_mean", "return_stderr"))
    labels, colors = zip(*(BARS[method] for method in rows))
    ax.bar(labels, means, yerr=stderrs, capsize=4, color=colors)
    ax.set(title=f"Playing, with {n} action labels", ylabel="episodic return (mean, standard error)")
    fig.savefig(runs / "first.png", dpi=80, bbox_inches="tight")

    results = {"purity": purity, "nmi": nmi, "windows": len(t), "moved": float(moved.mean())}
    results |= {
        "share": rows["lapo_decoder"]["relative_to_demonstrator"],
        "labels": n,
        "rows": [*rows.values()],
    }
    stages = ("collect_expert_data", "lapo_pretrain", "lapo_bc", "lapo_decode")
    paths = [runs / f"{args.env_id}__{stage}__{args.seed}" / "results.json" for stage in stages]
    seconds = [json.loads(path.read_text())["wall_seconds"] for path in paths]
    results |= {"stage_seconds": dict(zip(stages, seconds)), "wall_seconds": sum(seconds)}
    results |= {key: decode[key] for key in ("env_id", "device", "threads", "torch", "commit")}
    (runs / "results.json").write_text(json.dumps(results | {"seed": args.seed}, indent=2))
    print(f"clusters: purity {purity:.3f}, NMI {nmi:.3f} ({moved.mean():.0%} of the steps move something)")
    print(f"{n} labels: {results['share']:.2f} of the demonstrator; {sum(seconds):.0f} s of stages")
    print(f"wrote {runs}/first.png and results.json")
