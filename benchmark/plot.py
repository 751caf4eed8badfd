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


class Scores:
    """Scores of methods from runs.csv, on the scale where random play is 0 and the demonstrator 1."""

    def __init__(self, rows, resamples):
        self.resamples, self.groups = resamples, defaultdict(dict)  # of a game, method, n_labels: {seed: row}
        for row in rows:
            self.groups[row["env_id"], row["method"], row["n_labels"]][row["seed"]] = row
        self.games = sorted({env_id for env_id, method, _ in self.groups if method == "demonstrator"})
        self.found, self.random, self.demonstrator = {}, {}, {}
        for g in self.games:
            at_random = self.interval(g, "random") or PAPER_SCORES[g]
            self.random[g], self.demonstrator[g] = at_random[0], self.interval(g, "demonstrator")[0]

    def returns(self, env_id, method, n_labels=""):
        """[draws] of every seed."""
        return [returns_of(row) for row in self.groups.get((env_id, method, n_labels), {}).values()]

    def label_counts(self, env_id, method):
        return sorted(n for g, m, n in self.groups if (g, m) == (env_id, method) and n != "")

    def bootstrap(self, *key):
        """Means (resamples,) with seeds, draws and episodes of a game, method and n_labels drawn again."""
        if key not in self.found:
            seeds, rng = self.returns(*key), np.random.default_rng(zlib.crc32(repr(key).encode()))
            again = ([resampled(draws, rng) for draws in pick(seeds, rng)] for _ in range(self.resamples))
            self.found[key] = np.array([np.mean(of_seeds) for of_seeds in again])
        return self.found[key]

    def interval(self, *key):
        """Mean return, its 95% interval, number of seeds and of episodes; None if there are no runs."""
        if seeds := self.returns(*key):
            mean, episodes = np.mean([np.mean(draws) for draws in seeds]), sum(map(np.size, sum(seeds, [])))
            return mean, *np.percentile(self.bootstrap(*key), [2.5, 97.5]), len(seeds), episodes

    def relative(self, env_id, value):
        """Return -> share of the demonstrator's above random."""
        return (value - self.random[env_id]) / (self.demonstrator[env_id] - self.random[env_id])

    def over_games(self, *key):
        """Mean of the games' shares of a method, n_labels; its 95% interval; None unless all have runs."""
        if not all(self.returns(g, *key) for g in self.games):
            return None
        shares, again = [self.relative(g, self.interval(g, *key)[0]) for g in self.games], []
        for g in self.games:
            low = self.bootstrap(g, "random") if self.returns(g, "random") else self.random[g]
            again.append((self.bootstrap(g, *key) - low) / (self.bootstrap(g, "demonstrator") - low))
        return np.mean(shares), *np.percentile(np.mean(again, 0), [2.5, 97.5])


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


def table(head, rows):
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in [head, ["---"] * len(head), *rows])


def number(x):
    """Two decimals, with a minus sign (and no −0.00)."""
    return f"{round(x, 2) + 0.0:.2f}".replace("-", "−")


def with_interval(found):
    """(mean, low, high, ...) as text; of None nothing."""
    return f"{number(found[0])} ({number(found[1])} – {number(found[2])})" if found else ""


def first_worth(pretraining, *key):
    """The update of a game, run and seed from which on another latent costs a fifth of the loss, as text."""
    points = [p for p in pretraining if (p["env_id"], p["run"], p["seed"]) == key]
    late = [p["update"] for p in points if p["other_latent_cost"] >= 0.2]
    return f"{min(late):,.0f}" if late else f"> {max(p['update'] for p in points):,.0f}" if points else ""


def tables(scores, offline, space, pretraining):
    """All numbers as Markdown; README.md and docs/results.md have the first four tables from here."""
    games, counts = scores.games, sorted({n for _, _, n in scores.groups if n != ""})
    name, labels = {m: LOOKS[m][0] for m in LOOKS}, {n: f"{n:,.0f}" for n in counts}

    def head(*key):
        return ["mean (95% interval)", *(f"{g} ({len(scores.returns(g, *key))})" for g in games)]

    def shares(*key):
        found = [scores.interval(g, *key) for g in games]
        each = [number(scores.relative(g, of_game[0])) if of_game else "" for g, of_game in zip(games, found)]
        return [with_interval(scores.over_games(*key)), *each]

    def right(env_id, method, n):
        """The share of right pseudo-labels, mean of seeds; only VPT makes any."""
        seeds = [row["label_accuracy"] for row in scores.groups.get((env_id, method, n), {}).values()]
        return f"{np.mean(seeds):.2f}" if seeds and "" not in seeds else ""

    yield "## Mean of the games, shares of the demonstrator's return above random play"
    rows = [[name[m], *(with_interval(scores.over_games(m, n)) for n in counts)] for m in offline]
    yield table(["labels", *labels.values()], rows)
    yield "## Every game; in brackets the seeds of the last method"
    rows = [[labels[n], name[m], *shares(m, n)] for n in counts for m in offline]
    yield table(["labels", "", *head(offline[-1], counts[-1] if counts else "")], rows)
    yield "## Online, the same; the seeds are those of RL with the online decoder"
    rows = [[name[m], *shares(m), number(PAPER_SHARES[m])] for m in ONLINE]
    yield table(["", *head("rl_sl"), "the paper's (16 games, 4M frames)"], rows)
    yield "## Right pseudo-labels, from LAPO's networks / from scratch"
    rows = [
        [labels[n], *(f"{right(g, 'vpt_lapo', n)} / {right(g, 'vpt', n)}" for g in games)] for n in counts
    ]
    yield table(["labels", *games], rows)
    yield "## Returns; relative return: on the paper's scale, its expert's"
    rows, keys = [], [(m, "") for m in ("random", "demonstrator", *ONLINE)]
    for g in games:
        random, expert = PAPER_SCORES[g]
        paper = {"random": random, "demonstrator": expert, "ppo_from_scratch": PAPER_RETURNS[g][1]}
        for m, n in [*keys, *((m, n) for m in offline for n in counts)]:
            if found := scores.interval(g, m, n):
                frames = (
                    [f"{row['frames']:.0f}" for row in scores.groups[g, m, n].values()]
                    if m in ONLINE
                    else [""]
                )
                what = g, name[m], labels.get(n, ""), *frames[:1], with_interval(found), *found[3:]
                rows.append([*what, number((found[0] - random) / (expert - random)), paper.get(m, "")])
    what = "game", "method", "labels", "frames", "return (95% interval)", "seeds", "episodes"
    yield table([*what, "relative return", "the paper's return (all levels)"], rows)
    yield "## What latents tell of the action; means of seeds"
    groups, order = defaultdict(list), ("trained", "untrained_idm", "shuffled_actions")
    for row in space:
        groups[row["env_id"], row["run"], order.index(row["of"])].append(row)
    rows = []
    for (g, run, of), seeds in sorted(groups.items()):
        known = [[row[key] for row in seeds if row[key] != ""] for key in MEANINGS]
        means = [f"{np.mean(x):.3g}" if x else "" for x in known]
        used = "; ".join(str(row["codes_used"]) for row in seeds if row["codes_used"])
        late = [first_worth(pretraining, g, run, row["seed"]) for row in seeds if of == 0]
        what = g, "no VQ" if run.endswith("no_vq") else "VQ", order[of].replace("_", " "), len(seeds)
        rows.append([*what, *means, "; ".join(late), used])
    what = "game", "pretraining", "latents", "seeds", *MEANINGS.values()
    yield table([*what, "updates until another latent costs 20%", "codes used"], rows)


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    folder, prefix = Path(args.results), "" if args.scale == "small" else f"{args.scale}-"
    if not (folder / "runs.csv").exists():
        sys.exit(f"error: {folder}/runs.csv is missing: make it with `python benchmark/collect_results.py`")
    names = "runs", "curves", "latent_space", "pretraining"
    rows, curves, space, pretraining = (read(folder / f"{name}.csv", args.scale) for name in names)
    if not rows:
        sys.exit(f"error: {folder}/runs.csv holds no run of --scale {args.scale}: choose one that it has")
    if strange := sorted({row["method"] for row in rows} - LOOKS.keys()):
        print(f"left out, as only runs named as in experiments.sh are drawn: {', '.join(strange)}")
        rows = [row for row in rows if row["method"] not in strange]
    offline = [m for m in OFFLINE if any(row["method"] == m for row in rows)]
    scores = Scores(rows, args.resamples)
    for env_id in sorted({row["env_id"] for row in rows} - set(scores.games)):
        print(f"{env_id} is left out: no demonstrator's score, which collect_expert_data.py's run holds")
    for env_id in (g for g in scores.games if not scores.returns(g, "random")):
        print(f"{env_id}: no score of random play, which lapo_decode.py's runs hold; using the paper's")
    plot_online(curves, scores, folder / f"{prefix}online.png")
    plot_offline(scores, offline, folder / f"{prefix}offline.png")
    plot_means(scores, offline, folder / f"{prefix}means.png")
    ran_on = Counter(f"{row['device']}, threads: {row['threads']:.0f}" for row in rows)
    ran_on = "; ".join(f"{device}: {count}" for device, count in ran_on.items())
    text = "\n\n".join(
        [f"Rows of runs.csv by device: {ran_on}", *tables(scores, offline, space, pretraining)]
    )
    (folder / f"{prefix}tables.md").write_text(text + "\n")
    print(f"wrote {folder}/{prefix}{{online,offline,means}}.png and {prefix}tables.md")
