"""The paper's figures and tables from the CSV files of collect_results.py, the paper's values beside ours.

    python benchmark/plot.py    # *.csv -> {online,offline,means,bars,latents}.png, {tables,summary}.md

Intervals are 95%, by a bootstrap over seeds, draws of the labels and episodes (games stay as they are). With
three seeds they are rough: seeds that differ much make them too narrow, episodes too wide. Of one seed they
know nothing about others. Means over games are interquartile means over all of their runs where every method
has at least eight of them (Agarwal et al. 2021, rliable's method); their intervals also resample random play
and the demonstrator, which the shares are measured by.
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

ONLINE = ("rl_sl", "rl_no_sl", "no_vq", "ppo_from_scratch")
LOOKS = {  # name, colour (Okabe and Ito: survives colour blindness), marker
    "rl_sl": ("LAPO: RL + online decoder", "#0072B2", "o"),
    "rl_no_sl": ("LAPO: RL, no decoder", "#56B4E9", "s"),
    "no_vq": ("LAPO: no decoder, no VQ", "#009E73", "^"),
    "ppo_from_scratch": ("PPO from scratch", "#D55E00", "D"),
    "lapo_decoder": ("LAPO + decoder", "#0072B2", "o"),
    "cloning_from_scratch": ("cloning from scratch", "#D55E00", "D"),
    "random": ("random", "#999999", None),
    "demonstrator": ("demonstrator", "#333333", None),
    "lapo_decode_800_updates": ("LAPO + decoder, 800 updates", "#56B4E9", "s"),
    "lapo_decode_finetuned": ("ours: --finetune", "#CC79A7", "v"),
    "vpt": ("VPT: pseudo-labels, from scratch", "#E69F00", "P"),
    "vpt_lapo": ("ours: VPT from LAPO's networks", "#009E73", "X"),
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
PAPER_SHARE_OFFLINE = 0.57  # of LAPO + decoder with 8,192 labels
PAPER_RETURNS = {  # of LAPO + decoder with 8,192 labels, of PPO from scratch at 4M frames
    "bigfish": (36, 2.6), "bossfight": (10.2, 9.3), "caveflyer": (3.6, 5.2), "chaser": (1.0, 3.6),
    "climber": (5.8, 5.2), "coinrun": (6.7, 9.3), "dodgeball": (14.4, 1.5), "fruitbot": (2.5, 27.6),
    "heist": (9.7, 3.4), "jumper": (7.7, 6.8), "leaper": (2.6, 5.3), "maze": (9.4, 7.5),
    "miner": (9.0, 5.8), "ninja": (6.7, 5.2), "plunder": (4.5, 4.0), "starpilot": (53, 36),
}  # fmt: skip


@dataclass
class Args:
    results: str = str(ROOT / "benchmark" / "results")
    """the folder of the CSV files; figures and tables go there too"""
    scale: str = "small"  # whose runs: small or paper
    resamples: int = 2000  # of the bootstrap


def read(path, scale):
    """A CSV's rows of one scale as dictionaries, numbers as numbers."""

    def number(text):
        try:
            return float(text)
        except ValueError:
            return text

    rows = [row for row in csv.DictReader(path.open(newline="")) if row["scale"] == scale]
    return [{key: text if key == "returns" else number(text) for key, text in row.items()} for row in rows]


def returns_of(row):
    """[(episodes,) of every draw of the labels] of a row of runs.csv."""
    return [np.array(draw.split(), dtype=float) for draw in row["returns"].split("|")]


def resampled(draws, rng):
    """Mean return of a seed's draws, [(episodes,)]; draws and episodes are resampled."""
    return np.mean([rng.choice(draw, len(draw)).mean() for draw in pick(draws, rng)])


def pick(items, rng):
    """As many of the items, drawn with replacement."""
    return [items[i] for i in rng.integers(len(items), size=len(items))]


def resampled_means(seeds, resamples, rng):
    """Bootstrap means (resamples,) of seeds, each a list of draws, each an array of episodes."""
    means = ([resampled(draws, rng) for draws in pick(seeds, rng)] for _ in range(resamples))
    return np.array([np.mean(of_seeds) for of_seeds in means])


class Scores:
    """Scores of methods from runs.csv, on the scale where random play is 0 and the demonstrator 1."""

    def __init__(self, rows, resamples):
        self.resamples, self.groups = resamples, defaultdict(dict)  # of a game, method, n_labels: {seed: row}
        for row in rows:
            self.groups[row["env_id"], row["method"], row["n_labels"]][row["seed"]] = row
        self.games = sorted({env_id for env_id, method, _ in self.groups if method == "demonstrator"})
        self.random, self.demonstrator, self.found, rng = {}, {}, {}, np.random.default_rng(0)
        self.ends = {}  # bootstrap means (resamples,) of 0 and 1 of the shares
        for g in self.games:
            at_random, demonstrator = self.returns(g, "random"), self.returns(g, "demonstrator")
            self.random[g], low = PAPER_SCORES[g][0], np.full(resamples, PAPER_SCORES[g][0])
            if at_random:  # without random play the paper's number stands, and does not vary
                self.random[g], low = np.mean(at_random), resampled_means(at_random, resamples, rng)
            self.demonstrator[g] = np.mean(demonstrator)
            self.ends[g] = low, resampled_means(demonstrator, resamples, rng)

    def returns(self, env_id, method, n_labels=""):
        """[draws] of every seed."""
        return [returns_of(row) for row in self.groups.get((env_id, method, n_labels), {}).values()]

    def label_counts(self, env_id, method):
        return sorted(n for g, m, n in self.groups if (g, m) == (env_id, method) and n != "")

    def interval(self, env_id, method, n_labels=""):
        """Mean return, its 95% interval, number of seeds and of episodes; None if there are no runs."""
        key = env_id, method, n_labels
        if key not in self.found and (seeds := self.returns(*key)):
            means = resampled_means(seeds, self.resamples, np.random.default_rng(0))
            mean, episodes = np.mean([np.mean(draws) for draws in seeds]), sum(map(np.size, sum(seeds, [])))
            self.found[key] = mean, *np.percentile(means, [2.5, 97.5]), len(seeds), episodes
        return self.found.get(key)

    def relative(self, env_id, value):
        """Return -> share of the demonstrator's above random."""
        return (value - self.random[env_id]) / (self.demonstrator[env_id] - self.random[env_id])

    def over_games(self, method, n_labels="", interquartile=False):
        """(Interquartile) mean of the games' shares, its 95% interval; None unless every game has runs."""
        per_game = {g: self.returns(g, method, n_labels) for g in self.games}
        if not all(per_game.values()):
            return None
        rng, samples = np.random.default_rng(0), []

        def centre(values):  # [(seeds,) of every game]
            if interquartile:
                return trim_mean(np.concatenate(values), 0.25)
            return np.mean([of_game.mean() for of_game in values])

        for i in range(self.resamples):
            shares = []
            for g, seeds in per_game.items():
                low, high = (end[i] for end in self.ends[g])
                returns = np.array([resampled(draws, rng) for draws in pick(seeds, rng)])
                shares.append((returns - low) / (high - low))
            samples.append(centre(shares))
        means = {g: np.array([np.mean(draws) for draws in seeds]) for g, seeds in per_game.items()}
        point = centre([self.relative(g, of_seeds) for g, of_seeds in means.items()])
        return point, *np.percentile(samples, [2.5, 97.5])


def style(method, **more):
    """Colour, marker and name of a method, for matplotlib."""
    return dict(zip(("label", "color", "marker"), LOOKS[method])) | more


def panels(n, width, height):
    """A figure of n panels, in two rows if they are more than four: figure, axes."""
    rows = 1 + (n > 4)
    columns = -(-n // rows)
    fig, axes = plt.subplots(
        rows, columns, figsize=(width * columns, height * rows), squeeze=False, layout="constrained"
    )
    for ax in axes.flat[n:]:
        ax.remove()
    return fig, axes.flat[:n]


def save(fig, path, caption):
    fig.text(0.5, -0.02, caption, ha="center", va="top", fontsize=9)
    fig.savefig(path, dpi=110, bbox_inches="tight")


def draw_ends(ax, low, high, at_random=None, demonstrator=None):
    """Lines for random play and the demonstrator, and what to call them."""
    ax.axhline(high, color=LOOKS["demonstrator"][1], ls="--", lw=1.2, label=demonstrator)
    ax.axhline(low, color=LOOKS["random"][1], ls=":", lw=1.2, label=at_random)


def two_axes(ax, scores, env_id):
    """Lines for random play and the demonstrator, and the paper's second axis: 0 random, 1 demonstrator."""
    low, high = scores.random[env_id], scores.demonstrator[env_id]
    draw_ends(ax, low, high, f"random ({low:.1f})", f"demonstrator ({high:.1f})")
    functions = (lambda y: (y - low) / (high - low)), (lambda y: y * (high - low) + low)
    ax.secondary_yaxis("right", functions=functions).set_ylabel("share of the demonstrator's")
    ax.set(title=env_id, ylabel="mean return of an episode")


def plot_online(curves, scores, path):
    """Training return against frames, a panel a game, and the mean over games."""
    games = [g for g in scores.games if any(row["env_id"] == g for row in curves)]
    if not games:
        return
    fig, axes = panels(len(games) + 1, 5.2, 4.4)
    over_games = defaultdict(list)  # method -> [(frames in thousands, mean share)]
    for ax, env_id in zip(axes, games):
        for method in ONLINE:
            runs = defaultdict(dict)
            for row in curves:
                if (row["env_id"], row["method"]) == (env_id, method):
                    runs[row["seed"]][row["frames"]] = row["return"]
            frames = sorted(set.intersection(*map(set, runs.values()))) if runs else []
            if not frames:
                continue
            y = np.array([[run[f] for f in frames] for run in runs.values()])  # (seeds, frames)
            thousands, look = np.array(frames) / 1000, style(method, marker=None)
            look["label"] += f" (seeds: {len(runs)})"
            ax.plot(thousands, y.mean(0), lw=2, **look, zorder=3)
            ax.fill_between(thousands, y.min(0), y.max(0), color=look["color"], alpha=0.18, lw=0)
            over_games[method].append((thousands, scores.relative(env_id, y.mean(0))))
        two_axes(ax, scores, env_id)
        ax.set(title=f"{env_id} (band: lowest to highest seed)", xlabel="thousand frames")
        ax.legend(fontsize=7)
    ax = axes[-1]
    for method, lines in over_games.items():
        if len(lines) == len(games):
            x = lines[0][0]  # other games may have points elsewhere
            y = np.mean([np.interp(x, *line) for line in lines], axis=0)
            ax.plot(x, y, lw=2, **style(method, marker=None))
            ax.plot([], [], " ", label=f"   (paper, 4M frames: {PAPER_SHARES[method]:.2f})")
    draw_ends(ax, 0, 1)
    ax.set(title=f"mean of the games ({len(games)})", xlabel="thousand frames")
    ax.set_ylabel("share of the demonstrator's return above random")
    ax.legend(fontsize=7)
    text = "Online: return of the last 100 training episodes (fewer at the very start). "
    save(fig, path, text + "Do LAPO's lines rise sooner than the orange one?")


def plot_offline(scores, offline, path):
    """Return against the number of labels, a panel a game."""
    games = [g for g in scores.games if any(env_id == g and n != "" for env_id, _, n in scores.groups)]
    if not games:
        return
    fig, axes = panels(len(games), 6.4, 4.6)
    for ax, env_id in zip(axes, games):
        for i, method in enumerate(offline):
            if counts := scores.label_counts(env_id, method):
                y = np.array([scores.interval(env_id, method, n)[:3] for n in counts])
                beside = np.array(counts) * 2 ** (0.12 * i - 0.2)  # so that intervals do not hide each other
                look, spread = style(method), np.maximum(0, [y[:, 0] - y[:, 1], y[:, 2] - y[:, 0]])
                look["label"] += f" (seeds: {scores.interval(env_id, method, counts[-1])[3]})"
                ax.errorbar(beside, y[:, 0], spread, lw=1.8, ms=5, elinewidth=0.8, capsize=2, **look)
        two_axes(ax, scores, env_id)
        (random, expert), paper = PAPER_SCORES[env_id], PAPER_RETURNS[env_id][0]
        low, high = scores.random[env_id], scores.demonstrator[env_id]
        label = f"the paper's share at 8,192 labels ({paper:g} of {expert:.1f})"
        here = low + (paper - random) / (expert - random) * (high - low)
        ax.plot([8192], [here], "*", ms=13, mfc="none", mec=LOOKS["lapo_decoder"][1], label=label)
        ax.set_xlabel("labelled frames")
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter("{x:,.0f}")
        ax.legend(fontsize=7)
    text = "Offline: what labels buy. Bars: 95% bootstrap over seeds, draws of the labels and episodes. "
    save(fig, path, text + "Look for where the lines stop rising.")


def plot_means(scores, offline, path):
    """Share of the demonstrator's return against the number of labels, mean of all games, a line a method."""
    fig, ax = plt.subplots(figsize=(7.5, 4.8), layout="constrained")
    for i, method in enumerate(offline):
        counts = sorted({n for _, m, n in scores.groups if m == method})
        y = {n: found for n in counts if (found := scores.over_games(method, n))}
        if y:
            beside, mean = np.array([*y]) * 2 ** (0.12 * i - 0.2), np.array([*y.values()])
            spread = np.maximum(0, [mean[:, 0] - mean[:, 1], mean[:, 2] - mean[:, 0]])
            ax.errorbar(beside, mean[:, 0], spread, lw=2, ms=6, elinewidth=0.9, capsize=2, **style(method))
    draw_ends(ax, 0, 1, "random", "demonstrator")
    ax.set_title(f"mean of {len(scores.games)} games: {', '.join(scores.games)}", fontsize=10)
    ax.set(xlabel="labelled frames", ylabel="share of the demonstrator's return above random")
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.legend(fontsize=8)
    save(fig, path, "Bars: 95% bootstrap over seeds, draws of the labels and episodes.")


def plot_bars(scores, offline, path):
    """Share of the demonstrator's return, a group a game; the paper's mean over its games beside them."""
    methods = [m for m in (*ONLINE, *offline) if any(key[1] == m for key in scores.groups)]
    if not methods:
        return
    fig, ax = plt.subplots(figsize=(3.4 * (len(scores.games) + 1) + 2, 4.2))
    width, paper = 0.8 / len(methods), PAPER_SHARES | {"lapo_decoder": PAPER_SHARE_OFFLINE}
    for i, method in enumerate(methods):
        name, color, _ = LOOKS[method]
        at = np.arange(len(scores.games) + 1) + (i - (len(methods) - 1) / 2) * width
        hatch = None if method in ONLINE else "//"
        for x, g in zip(at, scores.games):
            n = max(scores.label_counts(g, "lapo_decoder"), default=None) if hatch else ""
            if found := scores.interval(g, method, n):
                mean, low, high = (scores.relative(g, value) for value in found[:3])
                label = name if x == at[0] else None
                ax.bar(x, mean, width * 0.92, color=color, label=label, hatch=hatch, ec="white", lw=0.3)
                spread = [[max(0, mean - low)], [max(0, high - mean)]]
                ax.errorbar(x, mean, spread, color="black", lw=1, capsize=2)
        if method in paper:
            ax.bar(at[-1], paper[method], width * 0.92, color="white", ec=color, lw=1.5)
    ax.axhline(1, color=LOOKS["demonstrator"][1], ls="--", lw=1.2)
    ax.set_xticks(range(len(at)), [*scores.games, "paper: 16 games,\n4M frames / 8,192 labels"])
    ax.set_ylabel("return above random,\nshare of the demonstrator's")
    ax.legend(fontsize=7, ncol=2, loc="upper left", bbox_to_anchor=(1.01, 1))
    text = "Final scores with 95% intervals; hatched: offline, with the most labels. "
    save(fig, path, text + "Open bars: the paper's, on all levels, expert of 50M frames.")


def plot_latents(points, path):
    """Two principal components of test latents; colour and marker: the true action's move."""
    games = sorted({p["env_id"] for p in points})
    if not games:
        return
    fig, axes = panels(len(games), 5.2, 4.4)
    for ax, env_id in zip(axes, games):
        mine = [p for p in points if p["env_id"] == env_id]
        xy = np.array([[p["x"], p["y"]] for p in mine])
        # Procgen's actions 0-8 are 3 * (right + 1) + (up + 1); 9-14 are buttons without a move
        move = np.array([p["action"] if p["action"] < 9 else 4 for p in mine]).astype(int)
        for m in np.unique(move):
            horizontal, color = (("left", "#D55E00"), ("", "#999999"), ("right", "#0072B2"))[m // 3]
            vertical, marker = (("down", "v"), ("", "o"), ("up", "^"))[m % 3]
            name = f"{horizontal} {vertical}".strip() or "stay or a button"
            ax.scatter(*xy[move == m].T, s=18, c=color, marker=marker, alpha=0.65, linewidths=0, label=name)
        first, second = map(float, str(mine[0]["explained"]).split())
        ax.set(title=env_id, xlabel=f"1st principal component ({first:.0%} of variance)")
        ax.set_ylabel(f"2nd principal component ({second:.0%})")
        ax.legend(fontsize=8, ncol=3, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    text = "Continuous latents of test frames (first seed) by the true action, which nobody told the model. "
    save(fig, path, text + "Look for places of one colour.")


def table_head(*cells):
    return [table_row(*cells), "|" + "---|" * len(cells)]


def table_row(*cells):
    return "| " + " | ".join(map(str, cells)) + " |"


def tables(scores, offline, space):
    """Everything above in numbers, as Markdown."""
    head = "game,method,labels,frames online,return,95% interval,seeds,episodes,relative return,"
    head += "share of the demonstrator's,right pseudo-labels,the paper's return (all levels)"
    lines, rows = table_head(*head.split(",")), {(m, n) for _, m, n in scores.groups if n != ""}
    order = ("cloning_from_scratch", "lapo_decoder", *offline[2:])
    rows = [*((m, "") for m in ONLINE), *sorted(rows, key=lambda row: (order.index(row[0]), row[1]))]
    for g in scores.games:
        random, expert = PAPER_SCORES[g]
        paper = {("random", ""): random, ("demonstrator", ""): expert}
        paper |= dict(zip((("lapo_decoder", 8192.0), ("ppo_from_scratch", "")), PAPER_RETURNS[g]))
        for method, n in [("random", ""), ("demonstrator", ""), *rows]:
            if found := scores.interval(g, method, n):
                mean, low, high, seeds, episodes = found
                of_seeds = [*scores.groups[g, method, n].values()]
                frames = of_seeds[0]["frames"] if method in ONLINE else ""
                right = [row["label_accuracy"] for row in of_seeds if row.get("label_accuracy", "") != ""]
                right = f"{np.mean(right):.2f}" if right else ""
                what = g, LOOKS[method][0], n and f"{n:.0f}", frames and f"{frames:.0f}"
                score = f"{mean:.2f}", f"{low:.2f} – {high:.2f}", seeds, episodes
                shares = f"{(mean - random) / (expert - random):.2f}", f"{scores.relative(g, mean):.2f}"
                lines.append(table_row(*what, *score, *shares, right, paper.get((method, n), "")))
    runs = [[len(scores.returns(g, *row)) for g in scores.games] for row in rows]
    fewest = min((sum(of_row) for of_row in runs if all(of_row)), default=0)
    many = fewest >= 8  # the same mean for all methods
    for method, n in rows if len(scores.games) > 1 else ():
        if found := scores.over_games(method, n, many):
            what = "interquartile mean" if many else "mean of the games", LOOKS[method][0], n and f"{n:.0f}"
            lines.append(table_row(*what, *[""] * 6, "{:.2f} ({:.2f} – {:.2f})".format(*found), "", ""))
    head = "game,pretraining,latents,seeds,linear probe,MLP probe,chance,NMI (slots),NMI (best),"
    head += "cluster purity,variance between episodes,variance between actions,"
    head += "cost of another latent,of another action,codes used,IDM active"
    lines += ["", *table_head(*head.split(","))]
    groups, order = defaultdict(list), ("trained", "untrained_idm", "shuffled_actions")
    for row in space:
        groups[row["env_id"], row["run"], order.index(row["of"])].append(row)
    for (g, run, of), rows in sorted(groups.items()):
        metrics = "linear_probe", "mlp_probe", "chance", "nmi", "nmi_best_slot", "cluster_purity"
        metrics = *metrics, "variance_between_episodes", "variance_between_actions"
        metrics = *metrics, "other_latent_cost", "other_action_cost"
        known = [[r[k] for r in rows if r.get(k, "") != ""] for k in metrics]
        values = [f"{np.mean(x):.3f}" if x else "" for x in known]
        used = "; ".join(str(r["codes_used"]) for r in rows if r["codes_used"])
        active = "; ".join(f"{r['idm_active_share']:.1%}" for r in rows if r["idm_active_share"] != "")
        what = g, "no VQ" if run.endswith("no_vq") else "VQ", order[of].replace("_", " "), len(rows)
        lines.append(table_row(*what, *values, used, active))
    return "\n".join(lines) + "\n"


def summary(scores, offline):
    """The table of docs/results.md: the final scores, offline those with the most labels."""
    head = "game", "method", "return (95% interval)", "share of the demonstrator's", "seeds", "episodes"
    lines = table_head(*head, "the paper's return (all levels)")
    order = ("random", "demonstrator", *ONLINE, "cloning_from_scratch", "lapo_decoder", *offline[2:])
    for g in scores.games:
        game, (random, expert) = g, PAPER_SCORES[g]  # its name once
        paper = {"random": f"{random:.2f}", "demonstrator": f"{expert:.2f}"}
        paper |= dict(zip((("lapo_decoder", 8192.0), "ppo_from_scratch"), PAPER_RETURNS[g]))
        for method, share in PAPER_SHARES.items():
            paper[method] = f"{paper.get(method, '')} (share {share:.2f}, 16 games)".strip()
        for method in order:
            n = max(scores.label_counts(g, method), default="")
            if found := scores.interval(g, method, n):
                mean, low, high, seeds, episodes = found
                name = LOOKS[method][0] + (f", {n:,.0f} labels" if n else "")
                score = f"{mean:.2f} ({low:.2f} – {high:.2f})", f"{scores.relative(g, mean):.2f}"
                beside = paper.get((method, n) if n else method, "")
                lines.append(table_row(game, name, *score, seeds, f"{episodes:,}", beside))
                game = ""
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    folder, prefix = Path(args.results), "" if args.scale == "small" else f"{args.scale}-"
    if not (folder / "runs.csv").exists():
        sys.exit(f"error: {folder}/runs.csv is missing: make it with `python benchmark/collect_results.py`")
    names = "runs", "curves", "latent_space", "latents_2d"
    rows, curves, space, points = (read(folder / f"{name}.csv", args.scale) for name in names)
    if not rows:
        sys.exit(f"error: {folder}/runs.csv holds no run of --scale {args.scale}: choose one that it has")
    if strange := sorted({row["method"] for row in rows} - LOOKS.keys()):
        print(f"left out, as only runs named as in experiments.sh are drawn: {', '.join(strange)}")
        rows = [row for row in rows if row["method"] not in strange]
    ours = sorted({row["method"] for row in rows if row["method"].startswith(("lapo_decode_", "vpt"))})
    offline = "lapo_decoder", "cloning_from_scratch", *ours
    scores = Scores(rows, args.resamples)
    for env_id in sorted({row["env_id"] for row in rows} - set(scores.games)):
        print(f"{env_id} is left out: no demonstrator's score, which collect_expert_data.py's run holds")
    for env_id in (g for g in scores.games if not scores.returns(g, "random")):
        print(f"{env_id}: no score of random play, which lapo_decode.py's runs hold; using the paper's")
    plot_online(curves, scores, folder / f"{prefix}online.png")
    plot_offline(scores, offline, folder / f"{prefix}offline.png")
    plot_means(scores, offline, folder / f"{prefix}means.png")
    plot_bars(scores, offline, folder / f"{prefix}bars.png")
    plot_latents(points, folder / f"{prefix}latents.png")
    ran_on = Counter()
    for row in rows:
        device = f"{row['device']} ({row['device_name']})" if row["device_name"] else row["device"]
        ran_on[f"{device}, threads: {row['threads']:.0f}"] += 1
    ran_on = "; ".join(f"{device}: {count}" for device, count in ran_on.items())
    for name, table in (("tables", tables(scores, offline, space)), ("summary", summary(scores, offline))):
        (folder / f"{prefix}{name}.md").write_text(f"Rows of runs.csv by device: {ran_on}\n\n{table}")
    print(
        f"wrote {folder}/{prefix}{{online,offline,means,bars,latents}}.png and {prefix}{{tables,summary}}.md"
    )
