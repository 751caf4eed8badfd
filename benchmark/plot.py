"""The paper's figures and tables, redrawn from the CSV files of collect_results.py, with the paper's own values beside ours.

    python benchmark/plot.py        # benchmark/results/*.csv -> benchmark/results/{online,offline,bars,latents}.png, {tables,summary}.md

Intervals are 95%, by a bootstrap over seeds, draws of the labels and episodes (games stay as they are). With three seeds they are rough: seeds
that differ much make them too narrow, episodes too wide. Of one seed they know nothing about other seeds. Means over games are interquartile
means over all of their runs where every method has at least eight of them (Agarwal et al. 2021, rliable's method); their intervals also
resample random play and the demonstrator, which the shares are measured by.
"""

import csv
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import tyro
from scipy.stats import trim_mean

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
NAMES = {
    "rl_sl": "LAPO: RL + online decoder", "rl_no_sl": "LAPO: RL, no decoder", "no_vq": "LAPO: no decoder, no VQ",
    "ppo_from_scratch": "PPO from scratch", "lapo_decoder": "LAPO + decoder", "bc_from_scratch": "cloning from scratch",
    "random": "random", "demonstrator": "demonstrator", "lapo_decode_800_updates": "LAPO + decoder, 800 updates",
}  # fmt: skip
COLORS = {  # Okabe and Ito: survives colour blindness
    "rl_sl": "#0072B2", "rl_no_sl": "#56B4E9", "no_vq": "#009E73", "ppo_from_scratch": "#D55E00",
    "lapo_decoder": "#0072B2", "bc_from_scratch": "#D55E00", "random": "#999999", "demonstrator": "#333333",
    "lapo_decode_800_updates": "#56B4E9", "lapo_decode_features_finetuned": "#CC79A7",
}  # fmt: skip
MARKERS = {"rl_sl": "o", "rl_no_sl": "s", "no_vq": "^", "ppo_from_scratch": "D", "lapo_decoder": "o", "bc_from_scratch": "D"}
MARKERS |= {"lapo_decode_800_updates": "s", "lapo_decode_features_finetuned": "v"}
OURS = [("#E69F00", "P"), ("#009E73", "X"), ("#000000", "*"), ("#F0E442", "p")]  # for other lapo_decode_* runs
ONLINE = ("rl_sl", "rl_no_sl", "no_vq", "ppo_from_scratch")
# Read off the paper's figures, all levels, expert of 50M frames (mean of 16 games, 3 seeds, relative to the paper's expert)
PAPER_ONLINE = {"rl_sl": 1.00, "rl_no_sl": 0.93, "no_vq": 0.81, "ppo_from_scratch": 0.44}
PAPER_OFFLINE = {16: 0.05, 256: 0.50, 1024: 0.57, 8192: 0.57}
PAPER_8192 = {  # return of LAPO + decoder at 8,192 labels
    "bigfish": 36, "bossfight": 10.2, "caveflyer": 3.6, "chaser": 1.0, "climber": 5.8, "coinrun": 6.7, "dodgeball": 14.4, "fruitbot": 2.5,
    "heist": 9.7, "jumper": 7.7, "leaper": 2.6, "maze": 9.4, "miner": 9.0, "ninja": 6.7, "plunder": 4.5, "starpilot": 53,
}  # fmt: skip
PAPER_SCRATCH = {
    "bigfish": 2.6, "bossfight": 9.3, "caveflyer": 5.2, "chaser": 3.6, "climber": 5.2, "coinrun": 9.3, "dodgeball": 1.5, "fruitbot": 27.6,
    "heist": 3.4, "jumper": 6.8, "leaper": 5.3, "maze": 7.5, "miner": 5.8, "ninja": 5.2, "plunder": 4.0, "starpilot": 36,
}  # fmt: skip
# Mean returns of a random policy and of the paper's expert, Procgen easy mode, all levels (paper, appendix)
PAPER_SCORES = {
    "bigfish": (0.8743, 36.3362), "bossfight": (0.0462, 11.6344), "caveflyer": (2.5971, 9.1836), "chaser": (0.6632, 9.9557),
    "climber": (2.2243, 10.2336), "coinrun": (2.7048, 9.9325), "dodgeball": (0.6130, 13.4866), "fruitbot": (-2.5330, 29.9253),
    "heist": (3.0759, 9.6853), "jumper": (3.4105, 8.4602), "leaper": (2.5105, 7.4083), "maze": (4.2726, 9.9693),
    "miner": (1.2514, 11.8926), "ninja": (2.5600, 9.4746), "plunder": (4.3207, 11.4605), "starpilot": (1.5252, 66.9863),
}  # fmt: skip


@dataclass
class Args:
    results: str = str(ROOT / "benchmark" / "results")
    """the folder of the CSV files; figures and tables.md go there too"""
    scale: str = "small"
    """whose runs: small or paper"""
    resamples: int = 2000
    """of the bootstrap"""


def read(path, scale):
    """A CSV's rows of one scale as dictionaries, numbers as numbers."""

    def number(text):
        try:
            return float(text)
        except ValueError:
            return text

    return [{k: v if k == "returns" else number(v) for k, v in row.items()} for row in csv.DictReader(path.open(newline="")) if row["scale"] == scale]


def returns_of(row):
    """[(episodes,) of every draw of the labels] of a row of runs.csv."""
    return [np.array(draw.split(), dtype=float) for draw in row["returns"].split("|")]


def pick(items, rng):
    """As many of the items, drawn with replacement."""
    return [items[i] for i in rng.integers(len(items), size=len(items))]


def resampled_means(seeds, resamples, rng):
    """Bootstrap means (resamples,) of seeds, each a list of draws, each an array of episodes: resamples all three levels."""
    return np.array(
        [np.mean([np.mean([rng.choice(d, len(d)).mean() for d in pick(draws, rng)]) for draws in pick(seeds, rng)]) for _ in range(resamples)]
    )


class Scores:
    """Scores of methods from runs.csv, on the scale where random play is 0 and the demonstrator 1."""

    def __init__(self, rows, resamples):
        self.groups, self.resamples = defaultdict(dict), resamples  # (env_id, method, n_labels) -> {seed: row}
        for row in rows:
            self.groups[row["env_id"], row["method"], row["n_labels"]][row["seed"]] = row
        self.games = sorted({env_id for env_id, method, _ in self.groups if method == "demonstrator"})
        self.random = {g: np.mean(self.returns(g, "random")) if self.returns(g, "random") else PAPER_SCORES[g][0] for g in self.games}
        self.demonstrator = {g: np.mean(self.returns(g, "demonstrator")) for g in self.games}
        rng, ends = np.random.default_rng(0), {}
        for key in ((g, method) for g in self.games for method in ("random", "demonstrator")):
            seeds = self.returns(*key)  # without random play the paper's number stands, and does not vary
            ends[key] = resampled_means(seeds, resamples, rng) if seeds else np.full(resamples, self.random[key[0]])
        self.ends, self.found = ends, {}  # (resamples,) bootstrap means of 0 and 1 of the shares; intervals, as they take time

    def returns(self, env_id, method, n_labels=""):
        """[draws] of every seed."""
        return [returns_of(row) for row in self.groups.get((env_id, method, n_labels), {}).values()]

    def interval(self, env_id, method, n_labels=""):
        """Mean return, its 95% interval, number of seeds and of episodes; None if there are no runs."""
        key = env_id, method, n_labels
        if key not in self.found:
            seeds = self.returns(*key)
            self.found[key] = None
            if seeds:
                low, high = np.percentile(resampled_means(seeds, self.resamples, np.random.default_rng(0)), [2.5, 97.5])
                mean, episodes = np.mean([np.mean(draws) for draws in seeds]), sum(len(d) for draws in seeds for d in draws)
                self.found[key] = mean, low, high, len(seeds), episodes
        return self.found[key]

    def relative(self, env_id, value):
        """Return -> share of the demonstrator's above random."""
        return (value - self.random[env_id]) / (self.demonstrator[env_id] - self.random[env_id])

    def over_games(self, method, n_labels="", interquartile=False):
        """(Interquartile) mean over games of the share of the demonstrator's return, and its 95% interval; None unless every game has runs."""
        per_game = {g: self.returns(g, method, n_labels) for g in self.games}
        if not all(per_game.values()):
            return None
        rng = np.random.default_rng(0)

        def centre(values):
            return trim_mean(np.concatenate(values), 0.25) if interquartile else np.mean([v.mean() for v in values])

        samples = []
        for i in range(self.resamples):
            shares = []
            for g, seeds in per_game.items():
                low, high = self.ends[g, "random"][i], self.ends[g, "demonstrator"][i]
                runs = np.array([np.mean([rng.choice(d, len(d)).mean() for d in pick(draws, rng)]) for draws in pick(seeds, rng)])
                shares.append((runs - low) / (high - low))
            samples.append(centre(shares))
        point = centre([self.relative(g, np.array([np.mean(draws) for draws in seeds])) for g, seeds in per_game.items()])
        return point, *np.percentile(samples, [2.5, 97.5])


def style(method, ours):
    """Colour, marker and name of a method; `ours` lists the runs of lapo_decode.py with other flags."""
    color, marker = COLORS.get(method), MARKERS.get(method)
    if color is None:
        color, marker = OURS[ours.index(method) % len(OURS)]
    return {"color": color, "marker": marker, "label": NAMES.get(method, f"ours: {method.removeprefix('lapo_decode_').replace('_', ' ')}")}


def two_axes(ax, scores, env_id):
    """Lines for random play and the demonstrator, and the paper's second axis: 0 random, 1 demonstrator."""
    low, high = scores.random[env_id], scores.demonstrator[env_id]
    ax.axhline(high, color=COLORS["demonstrator"], ls="--", lw=1.2, label=f"demonstrator ({high:.1f})")
    ax.axhline(low, color=COLORS["random"], ls=":", lw=1.2, label=f"random ({low:.1f})")
    ax.secondary_yaxis("right", functions=(lambda y: (y - low) / (high - low), lambda y: y * (high - low) + low)).set_ylabel(
        "share of the demonstrator's"
    )
    ax.set_ylabel("mean return of an episode")


def plot_online(curves, scores, path):
    """Training return against frames, a panel a game, and the mean over games."""
    games = [g for g in scores.games if any(row["env_id"] == g for row in curves)]
    if not games:
        return
    fig, axes = plt.subplots(1, len(games) + 1, figsize=(5.2 * (len(games) + 1), 4.4), squeeze=False, layout="constrained")
    over_games = defaultdict(list)  # method -> [(frames, seeds x frames relative)]
    for ax, env_id in zip(axes[0], games):
        for method in ONLINE:
            runs = defaultdict(dict)
            for row in curves:
                if (row["env_id"], row["method"]) == (env_id, method):
                    runs[row["seed"]][row["frames"]] = row["return"]
            frames = sorted(set.intersection(*map(set, runs.values()))) if runs else []
            if not frames:
                continue
            y = np.array([[run[f] for f in frames] for run in runs.values()])  # (seeds, frames)
            thousands, look = np.array(frames) / 1000, style(method, [])
            look |= {"marker": None, "label": f"{look['label']} (seeds: {len(runs)})"}
            ax.plot(thousands, y.mean(0), lw=2, **look, zorder=3)
            ax.fill_between(thousands, y.min(0), y.max(0), color=COLORS[method], alpha=0.18, lw=0)
            over_games[method].append((thousands, scores.relative(env_id, y.mean(0))))
        two_axes(ax, scores, env_id)
        ax.set(title=f"{env_id} (band: lowest to highest seed)", xlabel="thousand frames")
        ax.legend(fontsize=7)
    ax = axes[0, -1]
    for method, games_y in over_games.items():
        if len(games_y) == len(games):
            x = games_y[0][0]  # frames, in thousands; other games may have points elsewhere
            y = np.mean([np.interp(x, *points) for points in games_y], axis=0)
            ax.plot(x, y, lw=2, **(style(method, []) | {"marker": None}))
            ax.plot([], [], " ", label=f"   (paper, 4M frames: {PAPER_ONLINE[method]:.2f})")
    ax.axhline(1, color=COLORS["demonstrator"], ls="--", lw=1.2)
    ax.axhline(0, color=COLORS["random"], ls=":", lw=1.2)
    ax.set(title=f"mean of the games ({len(games)})", xlabel="thousand frames", ylabel="share of the demonstrator's return above random")
    ax.legend(fontsize=7)
    text = "Online: return of the last 100 training episodes (fewer at the very start). Do LAPO's lines rise sooner than the orange one?"
    caption(fig, text)
    fig.savefig(path, dpi=110, bbox_inches="tight")


def plot_offline(scores, ours, path):
    """Return against the number of labels, a panel a game."""
    games = [g for g in scores.games if any(env_id == g and n != "" for env_id, _, n in scores.groups)]
    if not games:
        return
    fig, axes = plt.subplots(1, len(games), figsize=(6.4 * len(games), 4.6), squeeze=False, layout="constrained")
    for ax, env_id in zip(axes[0], games):
        for i, method in enumerate(("lapo_decoder", "bc_from_scratch", *ours)):
            counts = sorted(n for g, m, n in scores.groups if (g, m) == (env_id, method) and n != "")
            if not counts:
                continue
            y = np.array([scores.interval(env_id, method, n)[:3] for n in counts])
            beside = np.array(counts) * 2 ** (0.12 * i - 0.2)  # so that intervals do not hide each other
            look, spread = style(method, ours), np.maximum(0, [y[:, 0] - y[:, 1], y[:, 2] - y[:, 0]])
            look["label"] += f" (seeds: {scores.interval(env_id, method, counts[-1])[3]})"
            ax.errorbar(beside, y[:, 0], spread, lw=1.8, ms=5, elinewidth=0.8, capsize=2, **look)
        two_axes(ax, scores, env_id)
        random, expert = PAPER_SCORES[env_id]
        ours_at = scores.random[env_id] + (PAPER_8192[env_id] - random) / (expert - random) * (scores.demonstrator[env_id] - scores.random[env_id])
        ax.plot(
            [8192],
            [ours_at],
            "*",
            ms=13,
            mfc="none",
            mec="#0072B2",
            label=f"the paper's share at 8,192 labels ({PAPER_8192[env_id]:g} of {expert:.1f})",
        )
        ax.set(title=env_id, xlabel="labelled frames")
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter("{x:,.0f}")
        ax.legend(fontsize=7)
    caption(fig, "Offline: what labels buy. Bars: 95% bootstrap over seeds, draws of the labels and episodes. Look for where the lines stop rising.")
    fig.savefig(path, dpi=110, bbox_inches="tight")


def plot_bars(scores, ours, path):
    """Share of the demonstrator's return, a group a game; the paper's mean over its games beside them."""
    most = {g: max((n for e, m, n in scores.groups if (e, m) == (g, "lapo_decoder") and n != ""), default=None) for g in scores.games}
    methods = [m for m in (*ONLINE, "lapo_decoder", "bc_from_scratch", *ours) if any(key[1] == m for key in scores.groups)]
    if not methods:
        return
    fig, ax = plt.subplots(figsize=(3.4 * (len(scores.games) + 1) + 2, 4.2))
    width = 0.8 / len(methods)
    for i, method in enumerate(methods):
        offline = method not in ONLINE
        look = style(method, ours)
        for x, g in enumerate(scores.games):
            found = scores.interval(g, method, most[g] if offline else "")
            if found:
                mean, low, high = (scores.relative(g, v) for v in found[:3])
                at = x + (i - (len(methods) - 1) / 2) * width
                name, hatch = (look["label"] if x == 0 else None), ("//" if offline else None)
                ax.bar(at, mean, width * 0.92, color=look["color"], label=name, hatch=hatch, ec="white", lw=0.3)
                ax.errorbar(at, mean, [[max(0, mean - low)], [max(0, high - mean)]], color="black", lw=1, capsize=2)
        at = len(scores.games) + (i - (len(methods) - 1) / 2) * width
        if (paper := PAPER_ONLINE.get(method) or (PAPER_OFFLINE[8192] if method == "lapo_decoder" else None)) is not None:
            ax.bar(at, paper, width * 0.92, color="white", ec=look["color"], lw=1.5)
    ax.axhline(1, color=COLORS["demonstrator"], ls="--", lw=1.2)
    ax.set_xticks(range(len(scores.games) + 1), [*scores.games, "paper: 16 games,\n4M frames / 8,192 labels"])
    ax.set_ylabel("return above random,\nshare of the demonstrator's")
    ax.legend(fontsize=7, ncol=2, loc="upper left", bbox_to_anchor=(1.01, 1))
    text = "Final scores with 95% intervals; hatched: offline, with the most labels. Open bars: the paper's, on all levels, expert of 50M frames."
    caption(fig, text)
    fig.savefig(path, dpi=110, bbox_inches="tight")


def plot_latents(points, path):
    """Two principal components of test latents, coloured by the true action's horizontal move, shaped by its vertical one."""
    games = sorted({p["env_id"] for p in points})
    if not games:
        return
    fig, axes = plt.subplots(1, len(games), figsize=(5.2 * len(games), 4.4), squeeze=False, layout="constrained")
    for ax, env_id in zip(axes[0], games):
        mine = [p for p in points if p["env_id"] == env_id]
        xy, action = np.array([[p["x"], p["y"]] for p in mine]), np.array([p["action"] for p in mine]).astype(int)
        for i, (horizontal, color) in enumerate((("left", "#D55E00"), ("", "#999999"), ("right", "#0072B2"))):
            for j, (vertical, marker) in enumerate((("down", "v"), ("", "o"), ("up", "^"))):
                # Procgen's actions 0-8 are 3 * (x + 1) + (y + 1); 9-14 are buttons without a move
                here = np.where(action < 9, action, 4) == 3 * i + j
                if here.any():
                    name = f"{horizontal} {vertical}".strip() or "stay or a button"
                    ax.scatter(*xy[here].T, s=18, c=color, marker=marker, alpha=0.65, linewidths=0, label=name)
        share = [float(s) for s in str(mine[0]["explained"]).split()]
        ax.set(title=env_id, xlabel=f"1st principal component ({share[0]:.0%} of variance)", ylabel=f"2nd principal component ({share[1]:.0%})")
        ax.legend(fontsize=8, ncol=3, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    caption(fig, "Continuous latents of test frames (first seed) by the true action, which nobody told the model. Look for places of one colour.")
    fig.savefig(path, dpi=110, bbox_inches="tight")


def caption(fig, text):
    fig.text(0.5, -0.02, text, ha="center", va="top", fontsize=9)


def table_row(*cells):
    return "| " + " | ".join(map(str, cells)) + " |"


def tables(scores, ours, space):
    """Everything above in numbers, as Markdown."""
    head = "game | method | labels | frames online | return | 95% interval | seeds | episodes | relative return | share of the demonstrator's"
    lines = [f"| {head} | the paper's return (all levels) |", "|" + "---|" * 11]
    offline = sorted(
        {(m, n) for _, m, n in scores.groups if n != ""}, key=lambda key: (("bc_from_scratch", "lapo_decoder", *ours).index(key[0]), key[1])
    )
    for g in scores.games:
        random, expert = PAPER_SCORES[g]
        paper = {("random", ""): random, ("demonstrator", ""): expert}
        paper |= {("ppo_from_scratch", ""): PAPER_SCRATCH[g], ("lapo_decoder", 8192.0): PAPER_8192[g]}
        for method, n in [*((m, "") for m in ("random", "demonstrator", *ONLINE)), *offline]:
            if found := scores.interval(g, method, n):
                mean, low, high, seeds, episodes = found
                frames = next(iter(scores.groups[g, method, n].values()))["frames"] if method in ONLINE else ""
                what = g, style(method, ours)["label"], n and f"{n:.0f}", frames and f"{frames:.0f}"
                score = f"{mean:.2f}", f"{low:.2f} – {high:.2f}", seeds, episodes, f"{(mean - random) / (expert - random):.2f}"
                lines.append(table_row(*what, *score, f"{scores.relative(g, mean):.2f}", paper.get((method, n), "")))
    rows = [*((m, "") for m in ONLINE), *offline] if len(scores.games) > 1 else []
    runs = [sum(len(scores.returns(g, *row)) for g in scores.games) for row in rows if all(scores.returns(g, *row) for g in scores.games)]
    many = min(runs, default=0) >= 8  # the same mean for all methods
    for method, n in rows:
        if found := scores.over_games(method, n, many):
            share = "{:.2f} ({:.2f} – {:.2f})".format(*found)
            what = "interquartile mean" if many else "mean of the games"
            lines.append(table_row(what, style(method, ours)["label"], n and f"{n:.0f}", *[""] * 6, share, ""))
    head = "game, pretraining, latents, seeds, linear probe, MLP probe, chance, NMI (slots), NMI (best), cluster purity, variance between episodes,"
    head += " variance between actions, codes used, IDM active"
    lines += ["", table_row(*head.split(", ")), "|" + "---|" * 14]
    groups, order = defaultdict(list), ("trained", "untrained_idm", "shuffled_actions")
    for row in space:
        groups[row["env_id"], row["run"], row["of"]].append(row)
    for (g, run, of), rows in sorted(groups.items(), key=lambda item: (*item[0][:2], order.index(item[0][2]))):
        metrics = ("linear_probe", "mlp_probe", "chance", "nmi", "nmi_best_slot", "cluster_purity")
        metrics += ("variance_between_episodes", "variance_between_actions")
        values = [f"{np.mean([r[k] for r in rows]):.3f}" if rows[0].get(k, "") != "" else "" for k in metrics]
        used = "; ".join(str(r["codes_used"]) for r in rows if r["codes_used"])
        active = "; ".join(f"{r['idm_active_share']:.1%}" for r in rows if r.get("idm_active_share", "") != "")
        lines.append(table_row(g, "no VQ" if run.endswith("no_vq") else "VQ", of.replace("_", " "), len(rows), *values, used, active))
    return "\n".join(lines) + "\n"


def summary(scores, ours):
    """README.md's table: the final scores, offline those with the most labels."""
    head = ("game", "method", "return (95% interval)", "share of the demonstrator's", "seeds", "episodes", "the paper's return (all levels)")
    lines = [table_row(*head), "|" + "---|" * len(head)]
    for g in scores.games:
        random, expert = PAPER_SCORES[g]
        paper = {("random", ""): f"{random:.2f}", ("demonstrator", ""): f"{expert:.2f}", ("ppo_from_scratch", ""): PAPER_SCRATCH[g]}
        paper |= {(m, ""): f"{paper.get((m, ''), '')} (share {share:.2f}, 16 games)".strip() for m, share in PAPER_ONLINE.items()}
        paper["lapo_decoder", 8192.0] = PAPER_8192[g]
        game = g  # once
        for method in ("random", "demonstrator", *ONLINE, "bc_from_scratch", "lapo_decoder", *ours):
            n = max((n for env_id, m, n in scores.groups if (env_id, m) == (g, method) and n != ""), default="")
            if found := scores.interval(g, method, n):
                mean, low, high, seeds, episodes = found
                name = style(method, ours)["label"] + (f", {n:,.0f} labels" if n else "")
                score = f"{mean:.2f} ({low:.2f} – {high:.2f})", f"{scores.relative(g, mean):.2f}", seeds, f"{episodes:,}"
                lines.append(table_row(game, name, *score, paper.get((method, n), "")))
                game = ""
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    folder = Path(args.results)
    if not (folder / "runs.csv").exists():
        sys.exit(f"error: {folder}/runs.csv is missing: make it with `python benchmark/collect_results.py`")
    rows, curves, space, points = (read(folder / f"{name}.csv", args.scale) for name in ("runs", "curves", "latent_space", "latents_2d"))
    if not rows:
        sys.exit(f"error: {folder}/runs.csv holds no run of --scale {args.scale}: choose one that it has")
    ours = sorted({row["method"] for row in rows if row["method"].startswith("lapo_decode_")})
    if strange := sorted({row["method"] for row in rows} - NAMES.keys() - set(ours)):
        print(f"left out, as only runs named as in experiments.sh and lapo_decode_* are drawn: {', '.join(strange)}")
        rows = [row for row in rows if row["method"] not in strange]
    scores = Scores(rows, args.resamples)
    for env_id in sorted({row["env_id"] for row in rows} - set(scores.games)):
        print(f"{env_id} is left out: no demonstrator's score, which collect_expert_data.py's run holds")
    for env_id in (g for g in scores.games if not scores.returns(g, "random")):
        print(f"{env_id}: no score of random play, which lapo_decode.py's runs hold; using the paper's, of all levels")
    prefix = "" if args.scale == "small" else f"{args.scale}-"
    plot_online(curves, scores, folder / f"{prefix}online.png")
    plot_offline(scores, ours, folder / f"{prefix}offline.png")
    plot_bars(scores, ours, folder / f"{prefix}bars.png")
    plot_latents(points, folder / f"{prefix}latents.png")
    ran_on = Counter(f"{row['device']} ({row['device_name']}), threads: {row['threads']:.0f}" for row in rows)
    ran_on = "Rows of runs.csv by device: " + "; ".join(f"{device}: {count}" for device, count in ran_on.items()) + "\n\n"
    (folder / f"{prefix}tables.md").write_text(ran_on + tables(scores, ours, space))
    (folder / f"{prefix}summary.md").write_text(ran_on + summary(scores, ours))
    print(f"wrote {folder}/{prefix}{{online,offline,bars,latents}}.png, {prefix}tables.md and {prefix}summary.md")
