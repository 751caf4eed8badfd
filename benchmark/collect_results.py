"""Every run's results.json into the CSV files of figures and tables; rows of runs that are gone stay.

    python benchmark/collect_results.py --runs-dir runs/small      # from where the runs were started
    python benchmark/collect_results.py --quickstart runs/quickstart/coinrun__1/results.json bf16

runs.csv           a row a result: env_id, method, seed, n_labels, frames, return_mean, ...; `returns` holds
                   every episode's return, draws of the labels separated by |; label_accuracy: the share of
                   training windows whose most probable pseudo-label of vpt.py is the true action
curves.csv         mean return of the last 100 training episodes against frames, of every online run
pretraining.csv    losses and costs on the test split as pretraining goes on, and its probe
latent_space.csv   what latents tell of the true actions, beside the controls, as tools/inspect_latents.py
                   found; and the shares of their variance between episodes and between actions (either
                   shuffled in the row shuffled_actions); the costs of giving the FDM another latent, or true
                   action, of the same episode, as shares of its loss
quickstart.json    with --quickstart: results of tools/quickstart_report.py, each with its "kind" of CPU
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
from lapo_bc import load_dataset  # noqa: E402
from lapo_decode import load_labels  # noqa: E402
from tools.inspect_latents import variance_between  # noqa: E402
from tools.loading import encode, load_lapo  # noqa: E402

KEYS = {  # file -> what names a row; the rest are values
    "runs.csv": ["scale", "env_id", "method", "seed", "n_labels"],
    "curves.csv": ["scale", "env_id", "method", "seed", "frames"],
    "pretraining.csv": ["scale", "env_id", "run", "seed", "update"],
    "latent_space.csv": ["scale", "env_id", "run", "seed", "of"],
}
RUN_KEYS = ("scale", "env_id", "method", "run", "seed")  # of them, what names a run
SCORES = ["return_mean", "return_stderr", "relative_to_demonstrator"]
ORIGIN = ["device", "threads", "commit", "wall_seconds"]
PROBES = ["linear_probe", "mlp_probe", "nmi", "nmi_best_slot", "cluster_purity"]
VARIANCES = ["variance_between_episodes", "variance_between_actions"]
COSTS = ["other_latent_cost", "other_action_cost"]
VALUES = {
    "runs.csv": ["num_levels", "frames", *SCORES, "episodes", "label_accuracy", *ORIGIN, "returns"],
    "curves.csv": ["return"],
    "pretraining.csv": [
        "fdm_loss",
        "copy_last_frame_loss",
        "other_latent_cost",
        "idm_active_share",
        "balanced_accuracy",
    ],
    "latent_space.csv": [
        *PROBES,
        "chance",
        "windows",
        "codes_used",
        "idm_active_share",
        *VARIANCES,
        *COSTS,
        "commit",
    ],
}


@dataclass
class Args:
    runs_dir: str = str(ROOT / "runs" / "small")  # where the runs of an experiment lie
    scale: str | None = None  # what the rows call it; default: the folder's name
    out: str = str(ROOT / "benchmark" / "results")  # where the CSV files go
    quickstart: tuple[tuple[str, str], ...] = ()
    """only add to quickstart.json: a results.json of quickstart_report and its kind of CPU, and so on"""


def join_returns(returns):
    """Returns as text, [[draw], [draw]] or [episode, ...]: two decimals at most, draws separated by |."""
    if returns and isinstance(returns[0], list):
        return "|".join(join_returns(draw) for draw in returns)
    return " ".join(f"{r:.2f}".rstrip("0").rstrip(".") for r in returns)


def rows_of_scores(run, results):
    """Rows of runs.csv of one run."""
    name = run.name.split("__")[1]
    stage = results["stage"]
    if stage == "collect_expert_data":
        rows = [{**results, "method": "demonstrator", "relative_to_demonstrator": 1.0}]
    elif stage == "lapo_decode" and name == stage:
        rows = [results["random"], *results["curve"]]
    elif stage == "vpt":
        right = results["pseudo_label_accuracy"]
        rows = [{**row, "label_accuracy": right[str(row["n_labels"])]} for row in results["curve"]]
    elif is_online(run, results):
        rows = [{**results, "method": name}]
    else:
        return []
    origin = {key: results.get(key) for key in ORIGIN}
    origin["num_levels"] = results.get("data", results).get("num_levels")
    found = []
    for row in rows:
        row = {**origin, **row, "returns": join_returns(row["returns"])}
        for key in SCORES:
            if row.get(key) is not None:
                row[key] = f"{row[key]:.4f}"
        found.append(row)
    return found


def is_online(run, results):
    """Whether it is RL, but not a demonstrator's."""
    name = run.name.split("__")[1]
    return results["stage"] in ("lapo_finetune_ppo", "ppo_procgen") and name != "ppo_procgen"


def rows_of_curve(run, results):
    """Rows of curves.csv of one run: about 60 points, at the same frames in every seed."""
    if not is_online(run, results):
        return []
    name = run.name.split("__")[1]
    every = max(1, results["frames"] // 60)
    rows = []
    before = 0
    for frames, value in results["curve"]:
        if before // every < frames // every:
            rows.append({"method": name, "frames": frames, "return": round(value, 3)})
        before = frames
    return rows


def rows_of_pretraining(run, results):
    """Rows of pretraining.csv of one run."""
    if results["stage"] != "lapo_pretrain":
        return []
    rows = []
    for point in results["curve"]:
        row = {"run": run.name.split("__")[1]}
        for key, value in point.items():  # test/fdm_loss comes after train/fdm_loss
            row[key.split("/")[-1]] = f"{value:.4g}"
        rows.append(row)
    return rows


def rows_of_latent_space(run, results):
    """Rows of latent_space.csv of one report."""
    space = results.get("latent_space")
    if results["stage"] != "inspect_latents" or not space:
        return []
    pretraining = run.with_name(run.name.replace("inspect_latents", "lapo_pretrain", 1))
    z, actions, episodes = latents_of_test(results, pretraining / "checkpoint.pt")
    shuffled = np.random.default_rng(0).permutation(len(z))
    rows = {}
    for of in ("trained", "shuffled_actions", "untrained_idm"):
        rows[of] = {"of": of, "run": pretraining.name.split("__")[1], "commit": results["commit"]}
        rows[of] |= {"chance": space["chance"], "windows": space["windows"], **space[of]}
    for of, order in (("trained", np.arange(len(z))), ("shuffled_actions", shuffled)):
        rows[of]["variance_between_episodes"] = round(variance_between(z, episodes[order]), 4)
        rows[of]["variance_between_actions"] = round(variance_between(z, actions[order]), 4)
    trained = rows["trained"]
    last = json.loads((pretraining / "results.json").read_text())
    trained["idm_active_share"] = last["test/idm_active_share"]
    trained["codes_used"] = " ".join(map(str, results["codes_used"] or []))
    for cost, given in zip(COSTS, ("the latent", "the true action")):
        trained[cost] = results["worth"].get(given, {}).get("same_episode")
    return list(rows.values())


def latents_of_test(results, checkpoint):
    """Latents (n, latent_dim) of test windows, their true actions (n,) and their episodes (n,)."""
    pretrained = torch.load(checkpoint, weights_only=True)
    _, _, test = load_dataset(SimpleNamespace(**results["args"]))
    chosen = np.linspace(0, len(test.windows) - 1, results["windows"]).astype(int)
    t = test.windows[chosen]
    lapo = load_lapo(pretrained, torch.device("cpu"))
    z = encode(lapo, test, t, torch.device("cpu")).z
    return z, load_labels(test, "actions")[t], np.cumsum(test.first)[t]


READERS = {
    "runs.csv": rows_of_scores,
    "curves.csv": rows_of_curve,
    "pretraining.csv": rows_of_pretraining,
    "latent_space.csv": rows_of_latent_space,
}


def sortable(key):
    """Orders keys (text, ...), numbers as numbers."""
    order = []
    for part in key:
        number = int(part) if part.isdigit() else 0
        order.append((not part.isdigit(), number, part))
    return order


def merge(path, keys, values, new):
    """Writes a CSV of the new rows and of the old ones of other runs; returns how many rows it has."""

    def run_of(row):
        return tuple(row[key] for key in keys if key in RUN_KEYS)

    texts = []
    for row in new:
        text = {}
        for key in (*keys, *values):
            value = row.get(key)
            text[key] = "" if value is None else str(value)
        texts.append(text)
    replaced = {run_of(row) for row in texts}
    old = []
    if path.exists():
        old = csv.DictReader(path.open(newline=""))
    rows = {}
    for row in [row for row in old if run_of(row) not in replaced] + texts:
        rows[tuple(row[key] for key in keys)] = row
    with path.open("w", newline="") as f:
        writer = csv.DictWriter(f, [*keys, *values], extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for key in sorted(rows, key=sortable):
            writer.writerow(rows[key])
    return len(rows)


def without_returns(values):
    return {key: value for key, value in values.items() if key != "returns"}


def add_quickstarts(runs, path):
    """Adds runs, (results.json, kind of CPU), to quickstart.json, and prints all of it as a table."""
    rows = json.loads(path.read_text()) if path.exists() else []
    for results, kind in runs:
        new = json.loads(Path(results).read_text(), object_hook=without_returns)
        rows.append({"kind": kind, **new})
    rows = {(row["kind"], row["env_id"], row["seed"]): row for row in rows}  # the last of equal ones
    ordered = [rows[key] for key in sorted(rows)]
    path.write_text(json.dumps(ordered, indent=1))
    head = None
    for row in ordered:
        seconds = row["stage_seconds"]
        seconds = {**seconds, "all": sum(seconds.values())}
        scores = {f"{r['method']}, {r['n_labels']}": r["relative_to_demonstrator"] for r in row["curve"]}
        if head is None:
            head = ["CPU", "game", "seed"] + [f"{stage} (min)" for stage in seconds] + list(scores)
            print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
        cells = [row["kind"], row["env_id"], str(row["seed"])]
        cells += [f"{s / 60:.1f}" for s in seconds.values()]
        cells += [f"{score:.2f}" for score in scores.values()]
        print("| " + " | ".join(cells) + " |")


def main(args):
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    if args.quickstart:
        add_quickstarts(args.quickstart, out / "quickstart.json")
        return
    paths = sorted(Path(args.runs_dir).glob("*__*__*/results.json"))
    if not paths:
        sys.exit(f"error: --runs-dir {args.runs_dir} holds no finished run: make some with experiments.sh")
    new = {file: [] for file in KEYS}
    for path in paths:
        results = json.loads(path.read_text())
        common = {"env_id": results["env_id"], "seed": results["args"]["seed"]}
        common["scale"] = args.scale or Path(args.runs_dir).name
        for file, read in READERS.items():
            for row in read(path.parent, results):
                new[file].append({**row, **common})
    for file, rows in new.items():
        total = merge(out / file, KEYS[file], VALUES[file], rows)
        print(f"{out / file}: {total} rows, {len(rows)} of them from {args.runs_dir}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
