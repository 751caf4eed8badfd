"""The paper's figures and tables from the CSV files of collect_results.py, the paper's values beside ours.

    python benchmark/plot.py    # *.csv -> {online,offline,means}.png, tables.md

Intervals are 95%, by a bootstrap over seeds, draws of the labels and episodes (games stay as they are). With
three seeds they are rough: seeds that differ much make them too narrow, episodes too wide. Of one seed they
know nothing about others. Those of means over games also resample random play and the demonstrator, which the
shares are measured by.
"""

import csv
import sys
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent

ONLINE = ("rl_sl", "rl_no_sl", "no_vq", "ppo_from_scratch")
OFFLINE = ("cloning_from_scratch", "vpt", "lapo_decoder", "vpt_lapo")
PAPERS_STAR = "the paper's share at 8,192 labels (its return, of its expert's)"
LOOKS = {  # name, colour (Okabe and Ito: survives colour blindness), marker
    "rl_sl": ("LAPO: RL + online decoder", "#0072B2", "o"),
    "rl_no_sl": ("LAPO: RL, no decoder", "#56B4E9", "s"),
    "no_vq": ("LAPO: no decoder, no VQ", "#009E73", "^"),
    "ppo_from_scratch": ("PPO from scratch", "#D55E00", "D"),
    "cloning_from_scratch": ("cloning from scratch", "#D55E00", "D"),
    "vpt": ("VPT from scratch", "#E69F00", "P"),
    "lapo_decoder": ("LAPO, the paper's decoder", "#0072B2", "o"),
    "vpt_lapo": ("ours: VPT from LAPO", "#009E73", "X"),
    "random": ("random", "#999999", None),
    "demonstrator": ("demonstrator", "#333333", None),
}
# Mean returns of a random policy and of the paper's expert, Procgen easy mode, all levels (paper, appendix)
PAPER_SCORES = {
    "bigfish": (0.8743, 36.3362), "bossfight": (0.0462, 11.6344), "caveflyer": (2.5971, 9.1836),
    "chaser": (0.6632, 9.9557), "climber": (2.2243, 10.2336), "coinrun": (2.7048, 9.9325),
    "dodgeball": (0.6130, 13.4866), "fruitbot": (-2.5330, 29.9253), "heist": (3.0759, 9.6853),
    "jumper": (3.4105, 8.4602), "leaper": (2.5105, 7.4083), "maze": (4.2726, 9.9693),
    "miner": (1.2514, 11.8926), "ninja": (2.5600, 9.4746), "plunder": (4.3207, 11.4605),
    "starpilot": (1.5252, 66.9863),
}  # fmt: skip
# Read off the paper's figures (all levels, expert of 50M frames); shares of the expert: means of 16 games
PAPER_SHARES = {"rl_sl": 1.00, "rl_no_sl": 0.93, "no_vq": 0.81, "ppo_from_scratch": 0.44}  # at 4M frames
PAPER_RETURNS = {  # of LAPO + decoder with 8,192 labels, of PPO from scratch at 4M frames
    "bigfish": (36, 2.6), "bossfight": (10.2, 9.3), "caveflyer": (3.6, 5.2), "chaser": (1.0, 3.6),
    "climber": (5.8, 5.2), "coinrun": (6.7, 9.3), "dodgeball": (14.4, 1.5), "fruitbot": (2.5, 27.6),
    "heist": (9.7, 3.4), "jumper": (7.7, 6.8), "leaper": (2.6, 5.3), "maze": (9.4, 7.5),
    "miner": (9.0, 5.8), "ninja": (6.7, 5.2), "plunder": (4.5, 4.0), "starpilot": (53, 36),
}  # fmt: skip
MEANINGS = {  # columns of latent_space.csv
    "linear_probe": "linear probe", "mlp_probe": "MLP probe", "chance": "chance", "nmi": "NMI (slots)",
    "nmi_best_slot": "NMI (best)", "cluster_purity": "cluster purity",
    "variance_between_episodes": "variance between episodes",
    "variance_between_actions": "variance between actions", "other_latent_cost": "cost of another latent",
    "other_action_cost": "of another action", "idm_active_share": "IDM active",
}  # fmt: skip


@dataclass
class Args:
    results: str = str(ROOT / "benchmark" / "results")
    """the folder of the CSV files; figures and tables go there too"""
    scale: str = "small"  # whose runs: small or paper
    resamples: int = 2000  # of the bootstrap


def to_number(text):
    try:
        return float(text)
    except ValueError:
        return text


def read(path, scale):
    """A CSV's rows of one scale as dictionaries, numbers as numbers."""
    rows = []
    for row in csv.DictReader(path.open(newline="")):
        if row["scale"] == scale:
            rows.append({key: text if key == "returns" else to_number(text) for key, text in row.items()})
    return rows


def returns_of(row):
    """[(episodes,) of every draw of the labels] of a row of runs.csv."""
    return [np.array(draw.split(), dtype=float) for draw in row["returns"].split("|")]


def pick(items, rng):
    """As many of the items, drawn with replacement."""
    return [items[i] for i in rng.integers(len(items), size=len(items))]


def resampled(draws, rng):
    """Mean return of a seed's draws, [(episodes,)]; draws and episodes are resampled."""
    means = []
    for draw in pick(draws, rng):
        again = rng.choice(draw, len(draw))
        means.append(again.mean())
    return np.mean(means)


class Scores:
    """Scores of methods from runs.csv, on the scale where random play is 0 and the demonstrator 1."""

    def __init__(self, rows, resamples):
        self.resamples = resamples
        self.groups = defaultdict(dict)  # of a game, method, n_labels: {seed: row}
        for row in rows:
            self.groups[row["env_id"], row["method"], row["n_labels"]][row["seed"]] = row
        self.games = sorted({env_id for env_id, method, _ in self.groups if method == "demonstrator"})
        self.found = {}  # bootstraps
        self.random = {}
        self.demonstrator = {}
        for g in self.games:
            at_random = self.interval(g, "random") or PAPER_SCORES[g]
            self.random[g] = at_random[0]
            self.demonstrator[g] = self.interval(g, "demonstrator")[0]

    def returns(self, env_id, method, n_labels=""):
        """[draws] of every seed."""
        of_seeds = self.groups.get((env_id, method, n_labels), {})
        return [returns_of(row) for row in of_seeds.values()]

    def label_counts(self, env_id, method):
        return sorted(n for g, m, n in self.groups if (g, m) == (env_id, method) and n != "")

    def bootstrap(self, *key):
        """Means (resamples,) with seeds, draws and episodes of a game, method and n_labels drawn again."""
        if key not in self.found:
            seeds = self.returns(*key)
            rng = np.random.default_rng(zlib.crc32(repr(key).encode()))
            means = []
            for _ in range(self.resamples):
                of_seeds = [resampled(draws, rng) for draws in pick(seeds, rng)]
                means.append(np.mean(of_seeds))
            self.found[key] = np.array(means)
        return self.found[key]

    def interval(self, *key):
        """Mean return, its 95% interval, number of seeds and of episodes; None if there are no runs."""
        seeds = self.returns(*key)
        if not seeds:
            return None
        mean = np.mean([np.mean(draws) for draws in seeds])
        low, high = np.percentile(self.bootstrap(*key), [2.5, 97.5])
        episodes = sum(len(draw) for draws in seeds for draw in draws)
        return mean, low, high, len(seeds), episodes

    def relative(self, env_id, value):
        """Return -> share of the demonstrator's above random."""
        return (value - self.random[env_id]) / (self.demonstrator[env_id] - self.random[env_id])

    def over_games(self, *key):
        """Mean of the games' shares of a method, n_labels; its 95% interval; None unless all have runs."""
        shares = []
        again = []  # of every game (resamples,)
        for g in self.games:
            found = self.interval(g, *key)
            if not found:
                return None
            shares.append(self.relative(g, found[0]))
            low = self.random[g]
            if self.returns(g, "random"):
                low = self.bootstrap(g, "random")
            high = self.bootstrap(g, "demonstrator")
            again.append((self.bootstrap(g, *key) - low) / (high - low))
        low, high = np.percentile(np.mean(again, axis=0), [2.5, 97.5])
        return np.mean(shares), low, high


def style(method):
    """Colour, marker and name of a method, for matplotlib."""
    label, color, marker = LOOKS[method]
    return {"label": label, "color": color, "marker": marker}


def panels(n, width, height):
    """A figure of n panels, in two rows if they are more than four: figure, axes."""
    rows = 2 if n > 4 else 1
    columns = -(-n // rows)
    size = (width * columns, height * rows)
    fig, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for ax in axes.flat[n:]:
        ax.remove()
    return fig, axes.flat[:n]


def save(fig, path, caption):
    fig.text(0.5, -0.02, caption, ha="center", va="top", fontsize=9)
    fig.savefig(path, dpi=110, bbox_inches="tight")


def share_legend(fig, axes):
    """One legend over all panels, of what any of them shows."""
    entries = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels()):
            entries.setdefault(label, handle)
    fig.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=4, fontsize=11)


def draw_ends(ax, low, high, at_random=None, demonstrator=None):
    """Lines for random play and the demonstrator, and what to call them."""
    ax.axhline(high, color=LOOKS["demonstrator"][1], ls="--", lw=1.2, label=demonstrator)
    ax.axhline(low, color=LOOKS["random"][1], ls=":", lw=1.2, label=at_random)


def draw_intervals(ax, counts, intervals, i, **look):
    """Means with their intervals, [(mean, low, high, ...)], of the i-th method against label counts."""
    mean = np.array([found[0] for found in intervals])
    low = np.array([found[1] for found in intervals])
    high = np.array([found[2] for found in intervals])
    spread = np.maximum(0, [mean - low, high - mean])
    beside = np.array(counts) * 2 ** (0.12 * i - 0.2)  # so that intervals do not hide each other
    ax.errorbar(beside, mean, spread, capsize=2, **look)


def count_labels(ax):
    ax.set_xlabel("labelled frames")
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:,.0f}")


def two_axes(ax, scores, env_id):
    """Lines for random play and the demonstrator, and the paper's second axis: 0 random, 1 demonstrator."""
    low = scores.random[env_id]
    high = scores.demonstrator[env_id]
    draw_ends(ax, low, high, "random play", "demonstrator")
    functions = (lambda y: (y - low) / (high - low)), (lambda y: y * (high - low) + low)
    ax.secondary_yaxis("right", functions=functions).set_ylabel("share of the demonstrator's")
    ax.set_title(env_id)
    ax.set_ylabel("mean return of an episode")


def curve_of(curves, env_id, method):
    """Frames (F,) that all seeds have, and returns (seeds, F) of an online run; None without any."""
    runs = defaultdict(dict)  # of each seed {frames: return}
    for row in curves:
        if row["env_id"] == env_id and row["method"] == method:
            runs[row["seed"]][row["frames"]] = row["return"]
    if not runs:
        return None
    frames = sorted(set.intersection(*map(set, runs.values())))
    if not frames:
        return None
    returns = [[run[f] for f in frames] for run in runs.values()]
    return np.array(frames), np.array(returns)


EARLY = 64  # thousand frames: up to there only episodes that end early have ended


def plot_curve(ax, thousands, y, **look):
    """A line, faint where it is of episodes that end early."""
    early = thousands <= EARLY
    ax.plot(thousands[early], y[early], lw=1, alpha=0.3, color=look["color"])
    ax.plot(thousands[~early], y[~early], lw=2, zorder=3, **look)


def plot_online(curves, scores, path):
    """Training return against frames, a panel a game, and the mean over games."""
    with_curves = {row["env_id"] for row in curves}
    games = [g for g in scores.games if g in with_curves]
    if not games:
        return
    fig, axes = panels(len(games) + 1, 5.2, 4.4)
    over_games = defaultdict(list)  # method -> [(frames in thousands, mean share)]
    for ax, env_id in zip(axes, games):
        for method in ONLINE:
            found = curve_of(curves, env_id, method)
            if found is None:
                continue
            thousands = found[0] / 1000
            y = found[1]  # (seeds, frames)
            label, color, _ = LOOKS[method]
            plot_curve(ax, thousands, y.mean(0), color=color, label=label)
            late = thousands > EARLY
            band = y[:, late]
            ax.fill_between(thousands[late], band.min(0), band.max(0), color=color, alpha=0.18, lw=0)
            over_games[method].append((thousands, scores.relative(env_id, y.mean(0))))
        two_axes(ax, scores, env_id)
        ax.set_xlabel("thousand frames")
    plot_online_mean(axes[-1], over_games, len(games))
    share_legend(fig, axes)
    text = "Online: return of the last 100 training episodes; band: lowest to highest seed. "
    text += f"Faint: up to {EARLY} thousand frames only episodes that end early have ended.\n"
    save(fig, path, text + "Do LAPO's lines rise sooner than the orange one?")


def plot_online_mean(ax, over_games, num_games):
    """The mean of all games, of lines {method: [(frames in thousands, share)]}."""
    for method, lines in over_games.items():
        if len(lines) == num_games:
            x, _ = lines[0]  # other games may have points elsewhere
            shares = [np.interp(x, *line) for line in lines]
            label, color, _ = LOOKS[method]
            plot_curve(ax, x, np.mean(shares, axis=0), color=color, label=label)
    draw_ends(ax, 0, 1)
    ax.set_title(f"mean of the games ({num_games})")
    ax.set_xlabel("thousand frames")
    ax.set_ylabel("share of the demonstrator's return above random")


def paper_share(env_id, value):
    """The share of the paper's expert's return above random play."""
    random, expert = PAPER_SCORES[env_id]
    return (value - random) / (expert - random)


def plot_offline(scores, offline, path):
    """Return against the number of labels, a panel a game."""
    with_labels = {env_id for env_id, _, n in scores.groups if n != ""}
    games = [g for g in scores.games if g in with_labels]
    if not games:
        return
    fig, axes = panels(len(games), 6.4, 4.6)
    for ax, env_id in zip(axes, games):
        for i, method in enumerate(offline):
            counts = scores.label_counts(env_id, method)
            if not counts:
                continue
            intervals = [scores.interval(env_id, method, n) for n in counts]
            draw_intervals(ax, counts, intervals, i, lw=1.8, ms=5, elinewidth=0.8, **style(method))
        two_axes(ax, scores, env_id)
        paper, _ = PAPER_RETURNS[env_id]
        _, expert = PAPER_SCORES[env_id]
        low = scores.random[env_id]
        high = scores.demonstrator[env_id]
        here = low + paper_share(env_id, paper) * (high - low)
        ax.plot([8192], [here], "*", ms=13, mfc="none", mec=LOOKS["lapo_decoder"][1], label=PAPERS_STAR)
        ax.annotate(
            f"{paper:g} of {expert:.1f}", (8192, here), (-8, 6), textcoords="offset points", ha="right"
        )
        count_labels(ax)
    share_legend(fig, axes)
    text = "Offline: what labels buy. Bars: 95% bootstrap over seeds, draws of the labels and episodes. "
    save(fig, path, text + "Look for where the lines stop rising.")


def plot_means(scores, offline, path):
    """Share of the demonstrator's return against the number of labels, mean of all games, a line a method."""
    fig, ax = plt.subplots(figsize=(7.5, 4.8), layout="constrained")
    for i, method in enumerate(offline):
        counts = []
        intervals = []
        for n in sorted({n for _, m, n in scores.groups if m == method}):
            found = scores.over_games(method, n)
            if found:
                counts.append(n)
                intervals.append(found)
        if counts:
            draw_intervals(ax, counts, intervals, i, lw=2, ms=6, elinewidth=0.9, **style(method))
    draw_ends(ax, 0, 1, "random", "demonstrator")
    ax.set_title(f"mean of {len(scores.games)} games: {', '.join(scores.games)}", fontsize=10)
    ax.set_ylabel("share of the demonstrator's return above random")
    count_labels(ax)
    ax.legend(fontsize=8)
    save(fig, path, "Bars: 95% bootstrap over seeds, draws of the labels and episodes.")


def to_table(head, rows):
    """A Markdown table."""
    lines = []
    for row in [head, ["---"] * len(head), *rows]:
        cells = " | ".join(map(str, row))
        lines.append(f"| {cells} |")
    return "\n".join(lines)


def number(x):
    """Two decimals, with a minus sign (and no −0.00)."""
    return f"{round(x, 2) + 0.0:.2f}".replace("-", "−")


def with_interval(found):
    """(mean, low, high, ...) as text; of None nothing."""
    if not found:
        return ""
    return f"{number(found[0])} ({number(found[1])} – {number(found[2])})"


def first_worth(pretraining, *key):
    """The update of a game, run and seed from which on another latent costs a fifth of the loss, as text."""
    updates = []
    late = []
    for point in pretraining:
        if (point["env_id"], point["run"], point["seed"]) == key:
            updates.append(point["update"])
            if point["other_latent_cost"] >= 0.2:
                late.append(point["update"])
    if late:
        return f"{min(late):,.0f}"
    return f"> {max(updates):,.0f}" if updates else ""


class Tables:
    """All numbers as Markdown tables; README.md has the first, docs/results.md the third and fourth."""

    def __init__(self, scores, offline):
        self.scores = scores
        self.offline = offline
        self.games = scores.games
        self.counts = sorted({n for _, _, n in scores.groups if n != ""})
        self.names = {method: look[0] for method, look in LOOKS.items()}

    def head(self, *key):
        """Columns of shares; in brackets the seeds of a method, n_labels."""
        columns = ["mean (95% interval)"]
        for g in self.games:
            columns.append(f"{g} ({len(self.scores.returns(g, *key))})")
        return columns

    def shares(self, *key):
        """A method's, n_labels' shares: their mean, and each game's."""
        cells = [with_interval(self.scores.over_games(*key))]
        for g in self.games:
            found = self.scores.interval(g, *key)
            cells.append(number(self.scores.relative(g, found[0])) if found else "")
        return cells

    def of_means(self):
        rows = []
        for method in self.offline:
            cells = [with_interval(self.scores.over_games(method, n)) for n in self.counts]
            rows.append([self.names[method], *cells])
        head = [f"{n:,.0f}" for n in self.counts]
        return to_table(["labels", *head], rows)

    def of_games(self):
        rows = []
        for n in self.counts:
            for method in self.offline:
                rows.append([f"{n:,.0f}", self.names[method], *self.shares(method, n)])
        last = (self.offline[-1], self.counts[-1] if self.counts else "")
        return to_table(["labels", "", *self.head(*last)], rows)

    def of_online(self):
        rows = []
        for method in ONLINE:
            rows.append([self.names[method], *self.shares(method), number(PAPER_SHARES[method])])
        return to_table(["", *self.head("rl_sl"), "the paper's (16 games, 4M frames)"], rows)

    def right(self, env_id, method, n):
        """The share of right pseudo-labels, mean of seeds; only VPT makes any."""
        rows = self.scores.groups.get((env_id, method, n), {}).values()
        seeds = [row["label_accuracy"] for row in rows]
        if not seeds or "" in seeds:
            return ""
        return f"{np.mean(seeds):.2f}"

    def of_pseudo_labels(self):
        rows = []
        for n in self.counts:
            cells = []
            for g in self.games:
                cells.append(f"{self.right(g, 'vpt_lapo', n)} / {self.right(g, 'vpt', n)}")
            rows.append([f"{n:,.0f}", *cells])
        return to_table(["labels", *self.games], rows)

    def of_returns(self):
        keys = [(method, "") for method in ("random", "demonstrator", *ONLINE)]
        for method in self.offline:
            keys += [(method, n) for n in self.counts]
        rows = []
        for g in self.games:
            random, expert = PAPER_SCORES[g]
            paper = {"random": random, "demonstrator": expert, "ppo_from_scratch": PAPER_RETURNS[g][1]}
            for method, n in keys:
                found = self.scores.interval(g, method, n)
                if not found:
                    continue
                mean, _, _, seeds, episodes = found
                labels = f"{n:,.0f}" if n else ""
                frames = ""
                if method in ONLINE:
                    first = next(iter(self.scores.groups[g, method, n].values()))
                    frames = f"{first['frames']:.0f}"
                row = [g, self.names[method], labels, frames, with_interval(found), seeds, episodes]
                rows.append([*row, number(paper_share(g, mean)), paper.get(method, "")])
        head = ["game", "method", "labels", "frames", "return (95% interval)", "seeds", "episodes"]
        return to_table([*head, "relative return", "the paper's return (all levels)"], rows)


def table_of_raw(scores, raw, offline):
    """LAPO cloned on raw latents -> on standardised ones, shares; the mean's difference with its interval."""
    keys = [("rl_sl", ""), ("rl_no_sl", "")]
    for method in offline:
        keys += [(method, n) for n in scores.label_counts(scores.games[0], method)]
    rows = []
    for method, n in keys:
        cells = []
        differences = []
        again = []  # of every game (resamples,)
        for g in scores.games:
            before = raw.interval(g, method, n)
            after = scores.interval(g, method, n)
            if not (before and after):
                continue
            low = scores.relative(g, before[0])
            high = scores.relative(g, after[0])
            cells.append(f"{number(low)} → {number(high)}")
            differences.append(high - low)
            change = scores.bootstrap(g, method, n) - raw.bootstrap(g, method, n)
            again.append(change / (scores.demonstrator[g] - scores.random[g]))
        if len(cells) == len(scores.games):
            low, high = np.percentile(np.mean(again, axis=0), [2.5, 97.5])
            labels = f"{n:,.0f}" if n else ""
            rows.append([LOOKS[method][0], labels, with_interval((np.mean(differences), low, high)), *cells])
    return to_table(["", "labels", "difference of the means (95% interval)", *scores.games], rows)


def table_of_latents(space, pretraining):
    """What latents tell of the action; means of seeds."""
    order = ("trained", "untrained_idm", "shuffled_actions")
    groups = defaultdict(list)
    for row in space:
        groups[row["env_id"], row["run"], order.index(row["of"])].append(row)
    rows = []
    for (g, run, of), seeds in sorted(groups.items()):
        means = []
        for key in MEANINGS:
            known = [row[key] for row in seeds if row[key] != ""]
            means.append(f"{np.mean(known):.3g}" if known else "")
        used = [str(row["codes_used"]) for row in seeds if row["codes_used"]]
        late = []
        if order[of] == "trained":
            late = [first_worth(pretraining, g, run, row["seed"]) for row in seeds]
        kind = "no VQ" if run.endswith("no_vq") else "VQ"
        row = [g, kind, order[of].replace("_", " "), len(seeds), *means]
        rows.append([*row, "; ".join(late), "; ".join(used)])
    head = ["game", "pretraining", "latents", "seeds", *MEANINGS.values()]
    return to_table([*head, "updates until another latent costs 20%", "codes used"], rows)


def tables(scores, raw, offline, space, pretraining):
    """The text of tables.md."""
    make = Tables(scores, offline)
    text = [
        "## Mean of the games, shares of the demonstrator's return above random play",
        make.of_means(),
        "## Every game; in brackets the seeds of the last method",
        make.of_games(),
        "## Online, the same; the seeds are those of RL with the online decoder",
        make.of_online(),
        "## Right pseudo-labels, from LAPO's networks / from scratch",
        make.of_pseudo_labels(),
        "## Returns; relative return: on the paper's scale, its expert's",
        make.of_returns(),
        "## What latents tell of the action; means of seeds",
        table_of_latents(space, pretraining),
    ]
    if raw.groups:
        lapo = [method for method in offline if method in ("lapo_decoder", "vpt_lapo")]
        text += ["## Cloned on raw → on standardised latents", table_of_raw(scores, raw, lapo)]
    return text


def main(args):
    folder = Path(args.results)
    prefix = "" if args.scale == "small" else f"{args.scale}-"
    if not (folder / "runs.csv").exists():
        sys.exit(f"error: {folder}/runs.csv is missing: make it with `python benchmark/collect_results.py`")
    rows = read(folder / "runs.csv", args.scale)
    curves = read(folder / "curves.csv", args.scale)
    space = read(folder / "latent_space.csv", args.scale)
    pretraining = read(folder / "pretraining.csv", args.scale)
    if not rows:
        sys.exit(f"error: {folder}/runs.csv holds no run of --scale {args.scale}: choose one that it has")
    methods = {row["method"] for row in rows}
    strange = sorted(methods - LOOKS.keys())
    if strange:
        print(f"left out, as only runs named as in experiments.sh are drawn: {', '.join(strange)}")
        rows = [row for row in rows if row["method"] not in strange]
    offline = [method for method in OFFLINE if method in methods]
    scores = Scores(rows, args.resamples)
    raw = Scores(read(folder / "runs.csv", "raw") if args.scale == "small" else [], args.resamples)
    for env_id in sorted({row["env_id"] for row in rows}):
        if env_id not in scores.games:
            print(f"{env_id} is left out: no demonstrator's score, which collect_expert_data.py's run holds")
        elif not scores.returns(env_id, "random"):
            print(f"{env_id}: no score of random play, which lapo_decode.py's runs hold; using the paper's")
    plot_online(curves, scores, folder / f"{prefix}online.png")
    plot_offline(scores, offline, folder / f"{prefix}offline.png")
    plot_means(scores, offline, folder / f"{prefix}means.png")
    ran_on = Counter(f"{row['device']}, threads: {row['threads']:.0f}" for row in rows)
    devices = "; ".join(f"{device}: {count}" for device, count in ran_on.items())
    text = [f"Rows of runs.csv by device: {devices}", *tables(scores, raw, offline, space, pretraining)]
    (folder / f"{prefix}tables.md").write_text("\n\n".join(text) + "\n")
    print(f"wrote {folder}/{prefix}{{online,offline,means}}.png and {prefix}tables.md")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
