"""Every run's results.json into the CSV files of figures and tables; rows of runs that are gone stay.

    python benchmark/collect_results.py --runs-dir runs/small      # from where the runs were started
    python benchmark/collect_results.py --quickstart runs/quickstart/coinrun__1/results.json bf16

runs.csv           a row a result: env_id, method, seed, n_labels, frames, return_mean, ...; `returns` holds
                   every episode's return, draws of the labels separated by |; label_accuracy: the share of
                   training windows whose most probable pseudo-label of vpt.py is the true action
curves.csv         mean return of the last 100 training episodes against frames, of every online run
pretraining.csv    losses and costs on the test split as pretraining goes on, and its probe
latent_space.csv   what latents tell of the true actions, beside the controls, as lapo_inspect.py found; and
                   the shares of their variance between episodes and between actions (either shuffled in the
                   row shuffled_actions); the costs of giving the FDM another latent, or true action, of
                   the same episode, as shares of its loss
quickstart.json    with --quickstart: results of report.py, each with its "kind" of CPU
"""

import csv
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import lapo_inspect as inspect  # noqa: E402

KEYS = {  # file -> what names a row; the rest are values
    "runs.csv": ["scale", "env_id", "method", "seed", "n_labels"],
    "curves.csv": ["scale", "env_id", "method", "seed", "frames"],
    "pretraining.csv": ["scale", "env_id", "run", "seed", "update"],
    "latent_space.csv": ["scale", "env_id", "run", "seed", "of"],
}
SCORES = ["return_mean", "return_stderr", "relative_to_demonstrator"]
PROBES = ["linear_probe", "mlp_probe", "nmi", "nmi_best_slot", "cluster_purity"]
VARIANCES = ["variance_between_episodes", "variance_between_actions"]
COSTS = ["other_latent_cost", "other_action_cost"]
SPACE = [*PROBES, "chance", "windows", "codes_used", "idm_active_share", *VARIANCES, *COSTS, "commit"]
MONITORED = ["fdm_loss", "copy_last_frame_loss", COSTS[0], "idm_active_share", "balanced_accuracy"]
ORIGIN = ["device", "threads", "commit", "wall_seconds"]
VALUES = {
    "runs.csv": ["num_levels", "frames", *SCORES, "episodes", "label_accuracy", *ORIGIN, "returns"],
    "curves.csv": ["return"],
    "pretraining.csv": MONITORED,
    "latent_space.csv": SPACE,
}


@dataclass
class Args:
    runs_dir: str = str(ROOT / "runs" / "small")  # where the runs of an experiment lie: its scale
    out: str = str(ROOT / "benchmark" / "results")  # where the CSV files go
    quickstart: tuple[tuple[str, str], ...] = ()
    """only add to quickstart.json: a results.json of report.py and its kind of CPU, and so on"""


def joined(returns):
    """Returns as text, [[draw], [draw]] or [episode, ...]: two decimals at most, draws separated by |."""
    if returns and isinstance(returns[0], list):
        return "|".join(map(joined, returns))
    return " ".join(f"{r:.2f}".rstrip("0").rstrip(".") for r in returns)


def rows_of(run, results, scale):
    """{file: rows} of one run's results.json."""
    name, stage = run.name.split("__")[1], results["stage"]
    common = {"scale": scale, "env_id": results["env_id"], "seed": results["args"]["seed"]}
    origin = {key: results.get(key) for key in ORIGIN}
    origin["num_levels"] = results.get("data", results).get("num_levels")
    rows = {file: [] for file in KEYS}
    if stage == "collect_expert_data":
        rows["runs.csv"].append({**results, "method": "demonstrator", "relative_to_demonstrator": 1.0})
    elif stage == "lapo_decode" and name == stage:
        rows["runs.csv"] = [results["random"], *results["curve"]]
    elif stage == "vpt":
        right = results["pseudo_label_accuracy"]
        rows["runs.csv"] = [row | {"label_accuracy": right[str(row["n_labels"])]} for row in results["curve"]]
    elif stage in ("lapo_finetune_ppo", "ppo_procgen") and name != "ppo_procgen":  # that is a demonstrator's
        rows["runs.csv"].append({**results, "method": name})
        every = max(1, results["frames"] // 60)  # about 60 points, at the same frames in every seed
        for (before, _), (frames, value) in zip([(0, None), *results["curve"]], results["curve"]):
            if before // every < frames // every:
                row = {"method": name, "frames": frames, "return": round(value, 3)}
                rows["curves.csv"].append(common | row)
    elif stage == "lapo_pretrain":
        for point in results["curve"]:  # test/fdm_loss comes after train/fdm_loss
            values = {key.split("/")[-1]: f"{value:.4g}" for key, value in point.items()}
            rows["pretraining.csv"].append(common | {"run": name} | values)
    elif stage == "lapo_inspect" and results["latent_space"]:
        space, pretrained = results["latent_space"], run.with_name(run.name.replace("inspect", "pretrain", 1))
        active = json.loads((pretrained / "results.json").read_text())["test/idm_active_share"]
        used = " ".join(map(str, results["codes_used"] or []))
        z, actions, episodes = test_latents(results, pretrained / "checkpoint.pt")
        shuffled = np.random.default_rng(0).permutation(len(z))
        for of, order in (("trained", slice(None)), ("shuffled_actions", shuffled), ("untrained_idm", None)):
            row = {"run": pretrained.name.split("__")[1], "of": of, "commit": results["commit"]}
            if order is not None:
                shares = (
                    round(inspect.variance_between(z, groups[order]), 4) for groups in (episodes, actions)
                )
                row |= dict(zip(VARIANCES, shares))
            if of == "trained":
                row |= {"codes_used": used, "idm_active_share": active}
                for cost, given in zip(COSTS, ("the latent", "the true action")):
                    row[cost] = results["worth"].get(given, {}).get("same_episode")
            more = {key: space[key] for key in ("chance", "windows")}
            rows["latent_space.csv"].append({**common, **more, **space[of], **row})
    of_run = common | origin
    rows["runs.csv"] = [of_run | row | {"returns": joined(row["returns"])} for row in rows["runs.csv"]]
    for row in rows["runs.csv"]:
        row |= {key: f"{row[key]:.4f}" for key in SCORES if row.get(key) is not None}
    return rows


def test_latents(results, checkpoint):
    """Latents (n, latent_dim) of test windows, their true actions (n,) and their episodes (n,)."""
    pretrained, args = torch.load(checkpoint, weights_only=True), SimpleNamespace(**results["args"])
    _, frames, windows = inspect.load_dataset(args)
    t = windows["test"][np.linspace(0, len(windows["test"]) - 1, results["windows"]).astype(int)]
    networks = inspect.build_networks(pretrained["args"], torch.device("cpu"), pretrained)
    z = inspect.encode(*networks[:2], frames["test"], t, torch.device("cpu"))[0]
    folder = Path(args.data_dir or f"data/{args.env_id}") / "test"
    return np.asarray(z), np.load(folder / "actions.npy")[t], np.cumsum(np.load(folder / "first.npy"))[t]


def merge(path, keys, values, new):
    """Writes a CSV of the new rows and of the old ones of other runs; returns how many rows it has."""
    old = list(csv.DictReader(path.open(newline=""))) if path.exists() else []
    new = [{k: "" if row.get(k) is None else str(row[k]) for k in [*keys, *values]} for row in new]

    def run(row):
        return tuple(row[k] for k in keys if k in ("scale", "env_id", "method", "run", "seed"))

    replaced = set(map(run, new))
    rows = {tuple(row[k] for k in keys): row for row in [*(r for r in old if run(r) not in replaced), *new]}

    def order(key):  # numbers as numbers
        return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in key]

    with path.open("w", newline="") as f:
        writer = csv.DictWriter(f, [*keys, *values], extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[key] for key in sorted(rows, key=order))
    return len(rows)


def add_quickstarts(runs, path):
    """Adds runs, (report.py's results.json, kind of CPU), to quickstart.json; prints all of it as a table."""

    def without_returns(values):
        return {key: value for key, value in values.items() if key != "returns"}

    rows = json.loads(path.read_text()) if path.exists() else []
    for results, kind in runs:
        row = {"kind": kind, **json.loads(Path(results).read_text(), object_hook=without_returns)}
        rows.append(row)
    rows = {(row["kind"], row["env_id"], row["seed"]): row for row in rows}  # the last of equal ones
    path.write_text(json.dumps([rows[key] for key in sorted(rows)], indent=1))
    for i, (key, row) in enumerate(sorted(rows.items())):
        seconds = row["stage_seconds"] | {"all": sum(row["stage_seconds"].values())}
        scores = {f"{r['method']}, {r['n_labels']}": r["relative_to_demonstrator"] for r in row["curve"]}
        if i == 0:
            head = ["CPU", "game", "seed", *(f"{stage} (min)" for stage in seconds), *scores]
            print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
        minutes, shares = (f"{s / 60:.1f}" for s in seconds.values()), (f"{s:.2f}" for s in scores.values())
        print("| " + " | ".join([*map(str, key), *minutes, *shares]) + " |")


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    if args.quickstart:
        add_quickstarts(args.quickstart, out / "quickstart.json")
        sys.exit()
    runs = sorted(path.parent for path in Path(args.runs_dir).glob("*__*__*/results.json"))
    if not runs:
        sys.exit(f"error: --runs-dir {args.runs_dir} holds no finished run: make some with experiments.sh")
    new = {file: [] for file in KEYS}
    for run in runs:
        results = json.loads((run / "results.json").read_text())
        rows = rows_of(run, results, Path(args.runs_dir).name)
        for file in KEYS:
            new[file] += rows[file]
    for file, rows in new.items():
        total = merge(out / file, KEYS[file], VALUES[file], rows)
        print(f"{out / file}: {total} rows, {len(rows)} of them from {args.runs_dir}")
