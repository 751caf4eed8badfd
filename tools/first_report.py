"""The picture of `make first`: what LAPO learned in a small world, where an action can be seen.

first.png      latents in 2-D in clusters, the next frame that each cluster's latent makes, returns
results.json   the clusters' purity and mutual information with the action, and the returns, in numbers

k-means makes a cluster for each action, and one more if there are steps in which nothing moves. True actions
only colour, name and count. Purity and mutual information are of the steps that move something.

    python -m tools.first_report --env-id FrozenLake-v1 --seed 1
"""

import json
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro
from sklearn.cluster import KMeans
from sklearn.metrics import normalized_mutual_info_score

from lapo_bc import get_windows, load_checkpoint, load_dataset, refuse
from lapo_decode import load_labels
from tools.inspect_latents import COLORS, GREY, MARKERS, plot_points, purity, tile, to_pixels, without_axes
from tools.loading import action_names, encode, load_lapo, write_whole

NAMES = {"FrozenLake-v1": ["left", "down", "right", "up"], "CartPole-v1": ["push left", "push right"]}
STAGES = ("collect_expert_data", "lapo_pretrain", "lapo_bc", "lapo_decode")
BARS = {
    "random": ("random\nplay", GREY),
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
    mine = kmeans.labels_[moved]
    true = actions[moved]
    nearest = kmeans.transform(z).argmin(0)
    nmi = normalized_mutual_info_score(true, mine)
    return kmeans.labels_, nearest, purity(mine, true), nmi


@torch.inference_mode()
def next_frames(fdm, windows, z):
    """The FDM's next frames of windows (n, 9, 64, 64) under each of C latents z: (n, C, 3, 64, 64)."""
    frames = windows[:, :6]
    predictions = []
    for latent in z:
        given = latent.expand(len(frames), -1)
        predictions.append(fdm(frames, given))
    return torch.stack(predictions, dim=1)


def plot_clusters(ax, z, actions, moved, names):
    """Latents (n, latent_dim) in 2-D by action (n,), steps that moved nothing (n,) in grey."""
    A = len(names)
    kind = np.where(moved, actions, A)
    names = [*names, "nothing moves"]
    colors = [*COLORS[:A], GREY]
    markers = [*MARKERS[:A], "."]
    plot_points(ax, z, kind, names, colors, markers)
    ax.set_title(f"Latent actions of {len(z):,} steps, learned without labels;\ncolours: the true actions")


def plot_frames(ax, now, predicted, names):
    """Rows: frames (R, 3, 64, 64) beside what they become under C latents (R, C, 3, 64, 64)."""
    pictures = torch.cat([now[:, None], predicted], dim=1)  # (R, 1 + C, 3, 64, 64)
    ax.imshow(tile(to_pixels(pictures), 2))
    columns = ["now", *names]
    ax.set_xticks(68 * np.arange(len(columns)) + 34, columns)
    ax.set_yticks([])
    ax.xaxis.tick_top()
    without_axes(ax)
    ax.set_xlabel("The forward dynamics model's next frame under each cluster's latent action")


def plot_returns(ax, rows, num_labels):
    """Returns as bars, of rows {method: row} of lapo_decode.py's results."""
    labels = [BARS[method][0] for method in rows]
    colors = [BARS[method][1] for method in rows]
    means = [row["return_mean"] for row in rows.values()]
    stderrs = [row["return_stderr"] for row in rows.values()]
    ax.bar(labels, means, yerr=stderrs, capsize=4, color=colors)
    ax.set_title(f"Playing, with {num_labels} action labels")
    ax.set_ylabel("episodic return (mean, standard error)")


def main(args):
    plt.switch_backend("Agg")
    runs = Path(args.runs_dir or f"runs/quickstart/{args.env_id}__{args.seed}")
    args.data_dir = args.data_dir or f"{runs}/data"
    folders = {stage: runs / f"{args.env_id}__{stage}__{args.seed}" for stage in STAGES}
    path = folders["lapo_decode"] / "results.json"
    if not path.exists():
        refuse(f"{path} is not there: `SEED={args.seed} ./quickstart.sh {args.env_id}` makes it")
    decode = json.loads(path.read_text())
    data, _, test = load_dataset(args)
    pretrained = load_checkpoint(folders["lapo_pretrain"] / "checkpoint.pt", "lapo_pretrain", args.env_id)
    lapo = load_lapo(pretrained, "cpu")

    # latents, their clusters, and which action each of them is
    t = np.random.default_rng(0).permutation(test.windows)[:1024]
    actions = load_labels(test, "actions")[t]
    names = NAMES.get(args.env_id) or action_names(data)
    A = len(names)
    moved = (test[t] != test[t + 1]).any((1, 2, 3))  # (n,)
    z = encode(lapo, test, t, "cpu").quantised  # (n, latent_dim)
    C = A if moved.all() else A + 1
    clusters, nearest, cluster_purity, nmi = cluster(z, C, actions, moved)
    kind = np.where(moved, actions, A)
    called = np.zeros(C, dtype=int)  # each cluster's commonest action
    for c in range(C):
        called[c] = np.bincount(kind[clusters == c]).argmax()
    order = np.argsort(called, kind="stable")

    # the next frames, where the choice of a latent matters most
    windows = get_windows(test, t[:256], "cpu")
    predicted = next_frames(lapo.fdm, windows, torch.from_numpy(z[nearest[order]]))  # (n, C, 3, 64, 64)
    spread = predicted.std(1).mean((1, 2, 3))
    best = spread.argsort(descending=True)[:64:16]
    columns = [[*names, "nothing"][kind] for kind in called[order]]

    # returns with the most labels
    n = max(row["n_labels"] for row in decode["curve"])
    found = {"random": decode["random"], "demonstrator": decode["demonstrator"]}
    for row in decode["curve"]:
        if row["n_labels"] == n:
            found[row["method"]] = row
    rows = {method: found[method] for method in BARS if method in found}

    fig = plt.figure(figsize=(17, 5.8), layout="constrained")
    grid = fig.add_gridspec(1, 3, width_ratios=[1, 1.35, 0.75])
    plot_clusters(fig.add_subplot(grid[0]), z, actions, moved, names)
    plot_frames(fig.add_subplot(grid[1]), windows[best, 3:6], predicted[best], columns)
    plot_returns(fig.add_subplot(grid[2]), rows, n)
    fig.savefig(runs / "first.png", dpi=80, bbox_inches="tight")

    seconds = {}
    for stage, folder in folders.items():
        seconds[stage] = json.loads((folder / "results.json").read_text())["wall_seconds"]
    total = sum(seconds.values())
    share = rows["lapo_decoder"]["relative_to_demonstrator"]
    moving = float(moved.mean())
    results = {
        "purity": cluster_purity,
        "nmi": nmi,
        "windows": len(t),
        "moved": moving,
        "share": share,
        "labels": n,
        "rows": list(rows.values()),
        "stage_seconds": seconds,
        "wall_seconds": total,
        "seed": args.seed,
    }
    for key in ("env_id", "device", "threads", "torch", "commit"):
        results[key] = decode[key]
    write_whole(runs / "results.json", json.dumps(results, indent=2))
    print(f"clusters: purity {cluster_purity:.3f}, NMI {nmi:.3f} ({moving:.0%} of the steps move something)")
    print(f"{n} labels: {share:.2f} of the demonstrator; {total:.0f} s of stages")
    print(f"wrote {runs}/first.png and results.json")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
