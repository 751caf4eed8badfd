"""Every run's results.json into CSV files that the figures and tables are made of. Rows of runs that are no longer on disk stay.

Start it where the runs were started: their arguments may name the dataset relative to that folder.

    python benchmark/collect_results.py --runs-dir runs/small

runs.csv           one row a result: env_id, method, seed, n_labels, frames, return_mean, return_stderr, episodes, relative_return, ...;
                   `returns` holds every episode's return, draws of the labels separated by |
curves.csv         mean return of the last 100 training episodes against frames, of every online run
latent_space.csv   what latents tell of the true actions, beside the controls, of every pretraining run; and the shares of their variance
                   that lie between episodes and between actions, in the row shuffled_actions with either shuffled
latents_2d.csv     two principal components of some test latents and their true actions, of the first seed of every game
"""

import csv
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from sklearn.decomposition import PCA

ROOT = Path(__file__).resolve().parent.parent
KEYS = {  # file -> what names a row; the rest are values
    "runs.csv": ["scale", "env_id", "method", "seed", "n_labels"],
    "curves.csv": ["scale", "env_id", "method", "seed", "frames"],
    "latent_space.csv": ["scale", "env_id", "run", "seed", "of"],
    "latents_2d.csv": ["scale", "env_id", "row"],
}
VALUES = {
    "runs.csv": (
        "num_levels frames return_mean return_stderr episodes relative_return relative_to_demonstrator device device_name threads commit "
        "wall_seconds returns"
    ).split(),
    "curves.csv": ["return"],
    "latent_space.csv": (
        "linear_probe mlp_probe nmi nmi_best_slot cluster_purity chance windows codes_used idm_active_share "
        "variance_between_episodes variance_between_actions commit"
    ).split(),
    "latents_2d.csv": ["x", "y", "action", "explained"],
}


@dataclass
class Args:
    runs_dir: str = str(ROOT / "runs" / "small")
    """where the runs of an experiment lie; the folder's name is their scale"""
    out: str = str(ROOT / "benchmark" / "results")
    """where the CSV files go"""


def joined(returns):
    """Returns as text, [[draw], [draw]] or [episode, ...]: two decimals at most, draws separated by |."""
    if returns and isinstance(returns[0], list):
        return "|".join(map(joined, returns))
    return " ".join(f"{r:.2f}".rstrip("0").rstrip(".") for r in returns)


def rows_of(run, results, scale):
    """{file: rows} of one run's results.json."""
    scale_and_game = {"scale": scale, "env_id": results["env_id"]}
    name = run.name.split("__")[1]
    common = {**scale_and_game, "seed": results["seed"], **{k: results.get(k) for k in ("num_levels", "device", "device_name", "threads", "commit")}}
    common["wall_seconds"] = results["wall_seconds"]
    rows = {file: [] for file in KEYS}
    if results["stage"] == "collect_expert_data":
        rows["runs.csv"].append({**common, **results, "method": "demonstrator", "relative_to_demonstrator": 1.0})
    elif results["stage"] == "lapo_decode":
        for row in [results["rows"][0], *results["curve"]]:  # random, then each method at each label count
            method = row["method"] if name == "lapo_decode" or row["method"] != "lapo_decoder" else name
            if name == "lapo_decode" or row["method"] == "lapo_decoder":
                rows["runs.csv"].append({**common, **row, "method": method})
    elif results["stage"] == "lapo_finetune_ppo":
        rows["runs.csv"].append({**common, **results, "method": name})
        every = max(1, results["frames"] // 60)  # about 60 points, at the same frames in every seed
        for (before, _), (frames, value) in zip([(0, None), *results["curve"]], results["curve"]):
            if before // every < frames // every:
                rows["curves.csv"].append({**scale_and_game, "method": name, "seed": results["seed"], "frames": frames, "return": round(value, 3)})
    elif results["stage"] == "lapo_pretrain" and results["latent_space"]:
        space = results["latent_space"]
        used = " ".join(map(str, results["codes_used"] or []))
        z, actions, episodes = test_latents(run, results)
        shuffle = np.random.default_rng(0).permutation(len(z))
        for of, order in (("trained", slice(None)), ("shuffled_actions", shuffle), ("untrained_idm", None)):
            more = {"of": of, "run": name}
            if order is not None and actions is not None:
                more |= {"variance_between_episodes": round(variance_between(z, episodes[order]), 4)}
                more |= {"variance_between_actions": round(variance_between(z, actions[order]), 4)}
            if of == "trained":
                more |= {"codes_used": used, "idm_active_share": results.get("test/idm_active_share")}
            rows["latent_space.csv"].append({**common, **{k: space[k] for k in ("chance", "windows")}, **space[of], **more})
        if name == "lapo_pretrain" and actions is not None:
            rows["latents_2d.csv"] = latents_2d(z, actions, scale_and_game)
    for row in rows["runs.csv"]:
        row["returns"] = joined(row["returns"])
        row |= {k: f"{row[k]:.4f}" for k in ("return_mean", "return_stderr", "relative_return", "relative_to_demonstrator") if row.get(k) is not None}
    return rows


def test_latents(run, results):
    """A pretraining run's test latents (n, latent_dim), their true actions (n,) and their episodes (n,); None for both without the dataset."""
    z, t = np.load(run / "test_latents.npy"), np.load(run / "test_windows.npy")
    folder = Path(results["args"]["data_dir"] or f"data/{results['env_id']}") / "test"
    if not (folder / "actions.npy").exists():
        print(f"{folder}/actions.npy is missing: no variances of {run.name}, and the old points of {results['env_id']} in latents_2d.csv")
        return z, None, None
    return z, np.load(folder / "actions.npy", mmap_mode="r")[t], np.cumsum(np.load(folder / "first.npy"))[t]


def variance_between(z, groups):
    """The share of the variance of latents z (n, latent_dim) that lies between groups (n,): 1 if the group tells the latent; above 0 by chance."""
    between = sum((groups == g).sum() * np.square(z[groups == g].mean(0) - z.mean(0)).sum() for g in np.unique(groups))
    return float(between / np.square(z - z.mean(0)).sum())


def latents_2d(z, actions, scale_and_game, count=600):
    """Two principal components of `count` test latents with their true actions."""
    pca = PCA(2, random_state=0).fit(z)
    explained = " ".join(f"{share:.3f}" for share in pca.explained_variance_ratio_)
    some = np.linspace(0, len(z) - 1, min(count, len(z))).astype(int)  # windows are in the order of time, stream after stream
    points = zip(pca.transform(z[some]).round(3).tolist(), actions[some].tolist())
    return [{**scale_and_game, "row": i, "x": x, "y": y, "action": a, "explained": explained} for i, ((x, y), a) in enumerate(points)]


def merge(path, keys, values, new):
    """Writes a CSV of the new rows and of the old ones of other runs; returns how many rows it has."""
    old = list(csv.DictReader(path.open(newline=""))) if path.exists() else []
    new = [{k: "" if row.get(k) is None else str(row[k]) for k in [*keys, *values]} for row in new]

    def run(row):
        return tuple(row[k] for k in keys if k in ("scale", "env_id", "method", "run", "seed"))

    replaced = set(map(run, new))
    rows = {tuple(row.get(k, "") for k in keys): row for row in [*(row for row in old if run(row) not in replaced), *new]}
    order = sorted(rows, key=lambda key: [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in key])
    with path.open("w", newline="") as f:
        writer = csv.DictWriter(f, [*keys, *values], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[key] for key in order)
    return len(rows)


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    runs = sorted(path.parent for path in Path(args.runs_dir).glob("*__*__*/results.json"))
    if not runs:
        sys.exit(f"error: --runs-dir {args.runs_dir} holds no finished run: make some with benchmark/experiments.sh")
    new, first_seed = {file: [] for file in KEYS}, {}
    for run in runs:
        results = json.loads((run / "results.json").read_text())
        rows = rows_of(run, results, Path(args.runs_dir).name)
        if first_seed.setdefault(results["env_id"], results["seed"]) != results["seed"]:
            rows["latents_2d.csv"] = []
        for file in KEYS:
            new[file] += rows[file]
    Path(args.out).mkdir(parents=True, exist_ok=True)
    for file, rows in new.items():
        total = merge(Path(args.out) / file, KEYS[file], VALUES[file], rows)
        print(f"{args.out}/{file}: {total} rows, {len(rows)} of them from {args.runs_dir}")
