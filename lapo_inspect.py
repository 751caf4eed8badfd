# /// script
# requires-python = ">=3.10,<3.13"
# dependencies = [
#   "torch==2.13.0", "procgen-mirror==0.10.7", "gym==0.26.2", "numpy<2", "tyro", "tensorboard", "tqdm", "pillow", "scikit-learn>=1.7", "matplotlib",
# ]
# ///
"""A look inside the latent actions: one HTML report with every picture in it, from a checkpoint of lapo_pretrain.py and its dataset.

    latents.png         latents of test frames in 2-D, by true action and by code
    codes.png           code x action table: which true actions does a code go with?
    codebooks.png       how evenly the codebooks' entries are used
    rollouts.gif, .png  every code held in the forward dynamics model, beside the real game under the action of its highest lift
    error.png           prediction error against the length of a rollout

A code of the VQ is a tuple of N x H indices, one per codebook and slot, and there are K^(N H) of them: with the paper's settings almost every
window has its own. So "code" means a group here: k-means on the quantised latents makes --num-codes of them, and a group stands for the real
joint code nearest to its centre, which is what the forward dynamics model is given in the rollouts. Where no more joint codes
than groups occur, each group is one code. Without VQ (--no-vq) the continuous latents are grouped in the same way.

True actions only name things here. Without actions.npy the report lacks what needs them, and says so.

Reads data/ENV_ID and runs/ENV_ID__lapo_pretrain__SEED/{checkpoint.pt,results.json}, writes runs/ENV_ID__lapo_inspect__SEED/report.html.
    python lapo_inspect.py --env-id bossfight
"""

import base64
import html
import io
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
import tyro
from matplotlib.colors import LogNorm
from PIL import Image
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA

from collect_expert_data import get_env_state, set_env_state
from lapo_bc import load_checkpoint, load_network, num_latents
from lapo_decode import make_env
from lapo_pretrain import (
    FDM,
    IDM,
    VQ,
    contact_sheet,
    first_line,
    get_windows,
    load_actions,
    load_frames,
    load_meta,
    lock_folder,
    one_sentence,
    plot_latents,
    provenance,
    require,
    same_place,
    to_pixels,
    write_aside,
)

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Procgen's actions 0-8 are 3 * (right + 1) + (up + 1); 9-14 are buttons
ACTIONS = ["left down", "left", "left up", "down", "stay", "up", "right down", "right", "right up", *(f"button {b}" for b in "DAWSQE")]
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333", "#F0E442"]  # Okabe and Ito
MARKERS = "osD^vP*X<>"  # of another length than COLORS: 40 different pairs
FEW = 20  # windows added to both sides of a lift
MARGIN = 0.02  # between probes' accuracies that count as different
METRICS = {
    "linear_probe": "linear probe, balanced accuracy", "mlp_probe": "MLP probe, balanced accuracy",
    "nmi": "mutual information of action and a slot's index (normalised), mean over slots", "nmi_best_slot": "the same, best slot",
    "cluster_purity": "purity of 15 k-means clusters",
}  # fmt: skip
STYLE = """
body { font: 16px/1.5 sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222 }
figure { margin: 0 } img { max-width: 100%; display: block; margin-bottom: 1em } figcaption, p { max-width: 62em }
table { border-collapse: collapse; margin: 1em 0 } td, th { border-bottom: 1px solid #ccc; padding: 0.2em 0.8em; text-align: left }
"""
# what stands under the pictures: a heading, then the caption
CAPTIONS = {
    "latents": """1. The latent space
The {what} of {windows:,} test windows, as the forward dynamics model is given them, on their two principal components (axes are cut at the
outermost 0.2% of the points on each side). Look for true actions in places of their own (left; colour: left, right or neither, marker: down, up
or neither): then the latent tells what was done. If every colour is everywhere, these two directions tell other things, such as the camera's
motion; other directions may still tell the action (section 4). Right: the same points by code, that is by k-means group, the key to the pictures
below; boxed numbers stand at the groups' medians. Groups are apart because k-means makes them so: only the left picture is evidence.""",
    "codes": """2. Codes and true actions
Rows: codes, that is {groups} groups of latents by k-means ({found}). Columns: true actions. Numbers: test windows. Lift: how many times more
windows than if code and action had nothing to do with each other, with {few} added to both numbers so that rare actions do not win by luck;
orange: above 1, violet: below. Framed: the action with the highest lift, taken as the code's match in section 5; it need not be the code's most
frequent one. Look for one strong orange cell in a row; a pale row is a code that does not tell the action. In many games buttons do nothing, and
a code matched to one means "no move" there; actions with the same effect share their codes.""",
    "codebooks": """3. Use of the codebooks
How often each of the K = {num_codes} entries of each codebook is used in {windows:,} test windows × {slots} slots, most used first. Perplexity is
exp(entropy): {num_codes} if all are used alike, 1 if the codebook has collapsed to one entry. Look for many used entries; even use is not needed.
A joint code is the tuple of all slots: {found}.""",
    "latent_space": """4. What latents tell of the true action
Measured by lapo_pretrain.py on {windows:,} test windows; the probes read the continuous latents. Every number lies between 0 and 1; guessing
without looking gives the probes {chance:.3f}. Controls: the IDM as it was before training (a random network passes on much of what it sees, so
this one is hard to beat), and the trained latents with their actions shuffled. Look for "trained" clearly above both controls; less than {margin}
apart counts as equal, as rare actions make these numbers noisy. {verdict}""",
    "rollouts": """5. Codes held in the forward dynamics model
Start: {steps} random actions{drawn} into a game on the dataset's levels; of {candidates} such games the {starts} in which the nine moves, each
held, lead furthest apart in the real game. From the last two frames on, the forward dynamics model is given one code's latent at every step, and
its own predictions as frames ("dream"). Film: a column a code, at a third of the game's speed. Strip below it: the same, codes under each other,
steps from left to right. {game} Look for codes that differ from each other: dreams that are the same for every code ignore it. Where the game has
inertia, a code may stand for a motion (falling, say) rather than for the action taken now. Pictures blur with time, as each step adds errors to
the frames that the next one sees.""",
    "error": """6. How prediction error grows
The forward dynamics model starts from two true frames and goes on from its own predictions, given at every step the latent that the IDM reads
from the true frames. Lines: mean over {stretches} stretches of test frames, drawn at random, that do not overlap, each within an episode. Bands:
95% confidence interval of that mean. After 1 step the error is {fdm[0]:.2e} (copying {copy[0]:.2e}), after {steps} {fdm[1]:.2e} (copying
{copy[1]:.2e}). Look for a line far below copying, and far below another stretch's latents: that gap is what the latents are worth.""",
    "agent": """The agent plays: {run}
{path}: up to four games of its evaluation side by side. In their corners the action taken: an arrow, a dot for none, a button's letter; darkened:
over, with its return. Look for moves that make sense where the hero stands.""",
}


@dataclass
class Args:
    exp_name: str = os.path.basename(__file__)[: -len(".py")]
    """the name of this experiment; the run folder is RUNS_DIR/ENV_ID__EXP_NAME__SEED"""
    seed: int = 1
    """seed of the runs it looks at, of the choice of windows, of k-means and of the games"""
    cuda: bool = True
    """if toggled, cuda is used when there is one"""
    bf16: bool = False
    """run the networks' forward pass in bfloat16, for a processor that knows it"""
    runs_dir: str = "runs"
    """where run folders are made, and the pretraining run lies"""
    overwrite: bool = False
    """replace a finished run of the same name"""

    env_id: str = "bossfight"
    """the Procgen game, one of the 16"""
    data_dir: str | None = None
    """the dataset of collect_expert_data.py; default data/ENV_ID"""
    pretrain_checkpoint: str | None = None
    """the checkpoint of lapo_pretrain.py; default RUNS_DIR/ENV_ID__lapo_pretrain__SEED/checkpoint.pt"""
    allow_unfinished: bool = False
    """take the checkpoint of an unfinished run, too"""

    num_codes: int = 8
    """groups of latents that the report calls codes"""
    eval_windows: int = 4096
    """test windows whose latents are grouped and shown"""
    rollout_steps: int = 16
    """length of the rollouts"""
    rollout_windows: int = 256
    """stretches of test frames in the figure of prediction errors; no two of them overlap"""
    num_starts: int = 2
    """situations from which the codes are rolled out"""
    start_steps: int = 40
    """actions that lead into those situations, drawn at random, where there are labels as often as the demonstrator takes them"""


def read_latent_space(path):
    """METRICS of the trained latents and of their controls from a pretraining run's results.json, and why there are none, one of them None."""
    try:
        space = json.loads(Path(path).read_text())["latent_space"]
        if space is None:
            return None, f"{path} holds none: the dataset had no labels when it was made"
        columns = {name: {m: float(space[name][m]) for m in METRICS if m in space[name]} for name in ("trained", "untrained_idm", "shuffled_actions")}
        return columns | {"chance": float(space["chance"]), "windows": int(space["windows"])}, None
    except OSError:
        return None, f"{path} does not exist: the pretraining run has not been finished"
    except Exception as e:  # anything may stand there
        return None, f"{path} cannot be read as numbers of the latent space ({type(e).__name__}: {first_line(e)})"


def lift(counts, totals):
    """How much more often actions occur in groups, counts (..., 15), than over all windows, totals (15,): (count + FEW) / (expected count + FEW).

    Without the FEW windows on both sides, an action that is rare and fell into a group once or twice would win.
    """
    expected = counts.sum(-1, keepdims=True) * totals / totals.sum()
    return (counts + FEW) / (expected + FEW)


def plot_table(table, lifts, matched, names):
    """Counts (K, 15) with their lifts as colours, the matched actions framed, the totals below."""
    fig, ax = plt.subplots(figsize=(13, 1.6 + 0.5 * len(table)), layout="constrained")
    image = ax.imshow(np.vstack([lifts, np.ones(15)]), cmap="PuOr_r", norm=LogNorm(1 / 4, 4), aspect="auto")
    for (g, a), count in np.ndenumerate(np.vstack([table, table.sum(0)])):
        dark = g < len(table) and not 0.4 < lifts[g, a] < 2.5
        ax.text(a, g, f"{count:,}", ha="center", va="center", fontsize=9, color="white" if dark else "black")
    for g, a in enumerate(matched):
        ax.add_patch(plt.Rectangle((a - 0.47, g - 0.45), 0.94, 0.9, fill=False, ec="black", lw=2))
    ax.axhline(len(table) - 0.5, color="black", lw=1)
    ax.set_xticks(range(15), ACTIONS, rotation=30, ha="right")
    ax.set_yticks(range(len(table) + 1), [*names, "all windows"])
    ax.set(xlabel="true action", ylabel="code (share of windows)", title="Test windows by code and true action")
    bar = fig.colorbar(image, ax=ax, extend="both", ticks=[1 / 4, 1 / 2, 1, 2, 4], format=lambda x, _: f"{x:g}×", pad=0.01)
    bar.ax.minorticks_off()
    bar.set_label(f"lift: (windows + {FEW})\n/ (windows by chance + {FEW})")
    return fig


def plot_codebooks(usage, perplexity):
    """Shares of the entries of each codebook (N, K), most used first."""
    num_codebooks, num_codes = usage.shape
    fig, axes = plt.subplots(1, num_codebooks, figsize=(13, 3.6), layout="constrained", squeeze=False, sharey=True)
    for n, (ax, share) in enumerate(zip(axes[0], usage)):
        ax.bar(range(num_codes), np.sort(share)[::-1], color=COLORS[0], width=0.9, label="measured")
        ax.axhline(1 / num_codes, color="#D55E00", ls="--", label=f"all alike (1/{num_codes})")
        ax.set(title=f"codebook {n}: {(share > 0).sum()} of {num_codes} entries used, perplexity {perplexity[n]:.1f}")
        ax.set(xlabel="entry of the codebook, most used first", ylabel="share of windows × slots" if n == 0 else "")
        ax.legend()
    return fig


def plot_errors(curves):
    """Mean squared errors {name: (windows, T)} against the number of steps, with the 95% confidence interval of the mean."""
    fig, ax = plt.subplots(figsize=(9, 5.5), layout="constrained")
    for (name, mse), color, style in zip(curves.items(), (COLORS[0], COLORS[1], COLORS[6]), ("o-", "s--", "^:")):
        steps, mean, half = np.arange(1, mse.shape[1] + 1), mse.mean(0), 1.96 * mse.std(0, ddof=1) / np.sqrt(len(mse))
        ax.plot(steps, mean, style, color=color, label=name)
        ax.fill_between(steps, mean - half, mean + half, color=color, alpha=0.25, linewidth=0)
    ax.set(xlabel="steps predicted, each from the predictions before it", ylabel="mean squared error per pixel and channel (black 0, white 1)")
    ax.set(title=f"Prediction error of rollouts ({len(mse)} stretches of test frames)", ylim=(0, None), xlim=(0.5, mse.shape[1] + 0.5))
    ax.legend()
    return fig


def to_table(head, rows):
    """An HTML table of strings."""
    lines = ["".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row) for tag, row in [("th", head), *(("td", row) for row in rows)]]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    require(args, num_codes=1, eval_windows=2, rollout_steps=1, rollout_windows=2, num_starts=1, start_steps=1)
    data_dir = Path(args.data_dir or f"data/{args.env_id}")
    run_dir = Path(args.runs_dir) / f"{args.env_id}__{args.exp_name}__{args.seed}"
    if (run_dir / "results.json").exists() and not args.overwrite:
        sys.exit(f"error: {run_dir} already holds a finished run: add --overwrite to replace it, or choose another --exp-name or --seed")
    pretrain_path = Path(args.pretrain_checkpoint or Path(args.runs_dir) / f"{args.env_id}__lapo_pretrain__{args.seed}" / "checkpoint.pt")
    made_by = f"python lapo_pretrain.py --env-id {args.env_id}" + same_place(args, "data_dir", "runs_dir", "seed")
    pretrained = load_checkpoint(pretrain_path, "lapo_pretrain", args, made_by, ("idm", "vq", "fdm"))
    p = pretrained["meta"]["args"]
    vq_shape = ("vq_num_codebooks", "vq_num_slots", "vq_dim", "vq_num_codes", "vq_commitment", "vq_decay")
    idm = load_network(lambda: IDM(p["idm_scale"], num_latents(p), p["patch_size"]), pretrained["idm"], pretrain_path, made_by)
    vq = load_network(lambda: VQ(*(p[key] for key in vq_shape)), pretrained["vq"], pretrain_path, made_by) if p.get("vq", True) else None
    fdm = load_network(lambda: FDM(num_latents(p), p["fdm_width"], p["predict_change"], p["patch_size"]), pretrained["fdm"], pretrain_path, made_by)
    data_meta = load_meta(data_dir, args.env_id)
    frames, test_t = load_frames(data_dir, "test", data_meta)
    if len(test_t) < 2:
        sys.exit(f"error: {data_dir} has {len(test_t)} test windows, expected at least 2: collect more frames, see --num-test-frames")
    labels = load_actions(data_dir, "test", data_meta) if (data_dir / "test" / "actions.npy").exists() else None

    sys.excepthook = one_sentence
    lock_folder(run_dir)
    for name in ("results.json", "report.html", "latents.png", "codes.png", "codebooks.png", "rollouts.gif", "rollouts.png", "error.png"):
        (run_dir / name).unlink(missing_ok=True)

    device = torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")
    origin = provenance(args, device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.bf16)
    start_time, rng, T = time.time(), np.random.default_rng(args.seed), args.rollout_steps
    for network in (idm, fdm, *([vq] if vq else [])):
        network.to(device).to(memory_format=torch.channels_last).eval()

    def finite(x):
        """x, or one sentence if it holds numbers that are not finite."""
        if not torch.isfinite(x).all():
            sys.exit(f"error: the networks in {pretrain_path} make numbers that are not finite: make it again with `{made_by} --overwrite`")
        return x

    @torch.inference_mode()
    def encode(t):
        """Latents of the windows around t (n,) as the FDM is given them (n, latent_dim), and their codes (n, N * H), None without VQ."""
        z, codes = [], []
        for chunk in np.array_split(t, -(-len(t) // 256)):
            with autocast:
                z.append(idm(get_windows(frames, chunk, device)))
            if vq:
                z[-1], _, index, _ = vq(z[-1])
                codes.append(index.flatten(1))
        return finite(torch.cat(z)), torch.cat(codes).cpu().numpy() if vq else None

    @torch.inference_mode()
    def rollout(before, now, z):
        """Frames that the FDM predicts after o_{t-1}, o_t (B, 3, 64, 64) from latents z (B, T, latent_dim), each from its own predictions."""
        predictions = []
        for step in range(z.shape[1]):
            with autocast:
                predictions.append(fdm(torch.cat([before, now], dim=1), z[:, step]))
            before, now = now, predictions[-1]
        return finite(torch.stack(predictions, dim=1))  # (B, T, 3, 64, 64)

    sections, missing = [], []  # the report: HTML, and what it lacks

    def show(key, pictures, more="", **values):
        """A section of the report: CAPTIONS[key] with values put in, and pictures {name: figure or bytes}, which also go to the run folder."""
        heading, caption = (html.escape(part) for part in CAPTIONS[key].format(**values).split("\n", 1))
        images = ""
        for name, picture in pictures.items():
            if not isinstance(picture, bytes):
                buffer = io.BytesIO()
                picture.savefig(buffer, dpi=100, format="png")
                plt.close(picture)
                picture = buffer.getvalue()
            write_aside(run_dir / name, lambda f, data=picture: f.write(data))
            print(f"wrote {run_dir / name}")
            images += f'<img alt="{heading}" src="data:image/{name[-3:]};base64,{base64.b64encode(picture).decode()}">'
        sections.append(f"<h2>{heading}</h2><figure>{images}<figcaption>{caption}</figcaption></figure>{more}")

    # 1. latents of test windows and their groups, most frequent first
    t = np.sort(rng.permutation(test_t)[: args.eval_windows])
    z, codes = encode(t)
    latents = z.cpu().numpy()
    joint, joint_counts = np.unique(codes if vq else latents, axis=0, return_counts=True)
    kmeans = KMeans(min(args.num_codes, len(joint)), n_init=10, random_state=args.seed).fit(latents)
    order = np.argsort(-np.bincount(kmeans.labels_), kind="stable")
    group = np.argsort(order)[kmeans.labels_]  # (n,)
    sizes = np.bincount(group)  # (K,)
    distance = kmeans.transform(latents)[:, order[: len(sizes)]]  # (n, K)
    chosen = np.where(group[:, None] == np.arange(len(sizes)), distance, np.inf).argmin(0)  # (K,): each group's window nearest to its centre
    actions = None if labels is None else labels[t]
    padded = np.pad(latents, ((0, 0), (0, 1)))  # a column of zeros: the latent may have one dimension only
    pca = PCA(2, random_state=args.seed).fit(padded)
    picture = plot_latents(pca.transform(padded), np.nan_to_num(pca.explained_variance_ratio_), group, actions)
    what = "quantised latent actions" if vq else "continuous latent actions (trained with --no-vq)"
    show("latents", {"latents.png": picture}, what=what, windows=len(t))

    # 2. codes and true actions
    found = "without VQ there are no joint codes"
    if vq:
        found = f"{len(joint):,} different joint codes occur in {len(t):,} windows, the most frequent one in {joint_counts.max() / len(t):.1%}"
    table = lifts = matched = chance = None
    called = [""] * len(sizes)  # the names of the matched actions
    if labels is None:
        missing.append(f"true actions beside the codes, and the real game beside the rollouts: {data_dir}/test/actions.npy does not exist")
    else:
        table = np.zeros((len(sizes), 15), dtype=int)
        np.add.at(table, (group, actions), 1)
        lifts, totals = lift(table, table.sum(0)), table.sum(0)
        matched, best = lifts.argmax(1), lifts.max(1)
        shuffled = [rng.multivariate_hypergeometric(totals, n, size=1000) for n in sizes]  # rows of the table, (1000, 15) each
        chance = np.array([np.quantile(lift(s, totals).max(1), 0.95) for s in shuffled])
        called = [ACTIONS[a] + "?" * bool(best[g] <= chance[g]) for g, a in enumerate(matched)]
        head = ["code", "windows", "matched action", "lift", "95% of shuffles", "joint code of the window nearest to the centre" if vq else ""]
        rows = [
            [g, sizes[g], called[g], f"{best[g]:.2f}", f"{chance[g]:.2f}", " ".join(map(str, codes[chosen[g]])) if vq else ""]
            for g in range(len(sizes))
        ]
        note = (
            "<p>95% of shuffles: what the highest lift stays below in 95 of 100 shuffles of the actions over the windows. No higher than that: the "
            "action has a question mark. Neighbouring windows resemble each other, which shuffles ignore: a little higher means nothing either.</p>"
        )
        names = [f"code {g} ({size / len(t):.0%})" for g, size in enumerate(sizes)]
        picture = plot_table(table, lifts, matched, names)
        show("codes", {"codes.png": picture}, to_table(head, rows) + note, found=found, groups=len(sizes), few=FEW)

    # 3. codebooks
    perplexity = None
    if vq:
        used = codes.reshape(len(t), vq.N, vq.H)
        usage = np.stack([np.bincount(used[:, n].ravel(), minlength=vq.K) for n in range(vq.N)]) / used[:, 0].size  # (N, K)
        perplexity = np.exp(-(usage * np.log(usage + 1e-10)).sum(1))
        show("codebooks", {"codebooks.png": plot_codebooks(usage, perplexity)}, num_codes=vq.K, slots=vq.H, windows=len(t), found=found)
    else:
        missing.append("the use of the codebooks: this checkpoint was trained with --no-vq")

    # 4. probes and mutual information, measured at the end of pretraining
    space, why = read_latent_space(pretrain_path.parent / "results.json")
    if space:
        columns = ("trained", "untrained_idm", "shuffled_actions")
        measured = [m for m in METRICS if all(m in space[c] for c in columns)]  # without VQ there is no mutual information with codes
        rows = [[METRICS[m], *(f"{space[c][m]:.3f}" for c in columns)] for m in measured]
        below = [METRICS[m] for m in measured if space["trained"][m] < max(space[c][m] for c in columns[1:]) + MARGIN]
        verdict = f"Here it is not in: {'; '.join(below)}." if below else "Here it is, in every row."
        numbers = to_table(["", "trained", "untrained IDM", "actions shuffled"], rows)
        show("latent_space", {}, numbers, windows=space["windows"], chance=space["chance"], margin=MARGIN, verdict=verdict)
    else:
        missing.append(f"the probes' numbers and their controls: {why}")

    # 5. every code held for T steps, in the FDM and, as its matched action, in the game
    env = make_env(args.env_id, max(16, len(sizes), args.num_starts), data_meta["num_levels"], data_meta["start_level"], args.seed)

    def play(state, actions):
        """Every game set to one state, and actions[i] held in the i-th: pictures (E, T + 1, 64, 64, 3) uint8, and which episodes ended."""
        set_env_state(env, [state] * env.num)
        pictures, over = [env.observe()[1]["rgb"].copy()], np.zeros(env.num, dtype=bool)
        for _ in range(T):
            env.act(np.resize(actions, env.num).astype(np.int32))
            _, observation, first = env.observe()
            picture = observation["rgb"].copy()
            picture[over] = pictures[-1][over]
            picture[first & ~over] = pictures[-1][first & ~over] // 2  # the last one of the episode, darkened
            over |= first
            pictures.append(picture)
        return np.stack(pictures, axis=1), over

    now, first, steps = env.observe()[1]["rgb"].copy(), np.ones(env.num, dtype=bool), 0
    while steps < args.start_steps or (~first).sum() < args.num_starts:
        env.act(rng.choice(15, size=env.num, p=None if labels is None else totals / len(t)).astype(np.int32))
        before, (_, observation, first) = now, env.observe()
        now, steps = observation["rgb"].copy(), steps + 1
    # of the games whose last two frames are of one episode, those in which it matters most what one does, and no move ends the episode
    states, candidates, differences = get_env_state(env), np.flatnonzero(~first), []
    for e in candidates:
        pictures, over = play(states[e], range(9))
        differences.append(0 if over.any() else pictures[:9, (T + 1) // 2].std(0).mean())
    starts = candidates[np.argsort(-np.array(differences), kind="stable")[: args.num_starts]]
    both = torch.from_numpy(np.stack([before[starts], now[starts]])).to(device)  # (2, S, 64, 64, 3)
    both = (both.movedim(-1, 2).float() / 255 - 0.5).repeat_interleave(len(sizes), dim=1)  # (2, S * K, 3, 64, 64)
    held = z[chosen].repeat(len(starts), 1)[:, None].expand(-1, T, -1)  # (S * K, T, latent_dim)
    dreams = to_pixels(torch.cat([both[1][:, None], rollout(*both, held)], dim=1)).reshape(len(starts), len(sizes), T + 1, 64, 64, 3)
    kinds = {"dream": dreams}
    if labels is not None:
        kinds["game"] = np.stack([play(states[e], matched)[0][: len(sizes)] for e in starts])
    env.close()
    grid = np.stack(list(kinds.values()))  # (dream or game, S, K, T + 1, 64, 64, 3)
    above = [f"code {g}" + (f"\n{called[g]}\nlift {best[g]:.1f}" if labels is not None else "") for g in range(len(sizes))]
    by_start = grid.swapaxes(0, 1).reshape(-1, len(sizes), T + 1, 64, 64, 3)
    film = []
    for step in range(T + 1):
        beside = [f"start {s + 1}\n{kind}\nstep {step:0{len(str(T))}}" for s in range(len(starts)) for kind in kinds]
        film.append(contact_sheet(by_start[:, :, step], beside, above, 2, len(kinds)).quantize(128, dither=Image.Dither.NONE))
    gif, strip = io.BytesIO(), io.BytesIO()
    film[0].save(gif, "gif", save_all=True, append_images=film[1:], duration=[1000] + [200] * (T - 1) + [1500], loop=0)
    shown = sorted({0, T, *(2**i for i in range(T.bit_length()) if 2**i < T)})  # steps 0, 1, 2, 4, ...
    by_code = grid[:, :, :, shown].transpose(2, 0, 1, 3, 4, 5, 6).reshape(-1, len(starts) * len(shown), 64, 64, 3)
    beside = [f"code {g}\n{kind}" + f": {called[g]}" * (kind == "game") for g in range(len(sizes)) for kind in kinds]
    above = [f"start {s + 1}\nstep {step}" for s in range(len(starts)) for step in shown]
    contact_sheet(by_code, beside, above, 1, len(kinds)).save(strip, "png")
    game = "The real game is not beside it: without labels no code has a matched action."
    if labels is not None:
        game = (
            "Below each dream: the real game from the same state with the code's matched action held, named beside or above it (a question mark: a "
            "lift no higher than by chance); darkened once its episode is over. Look for dreams that move as the game below them does."
        )
    pictures = {"rollouts.gif": gif.getvalue(), "rollouts.png": strip.getvalue()}
    drawn = "" if labels is None else " (as often as the demonstrator takes them)"
    show("rollouts", pictures, starts=len(starts), candidates=len(candidates), steps=steps, drawn=drawn, game=game)

    # 6. prediction error against the rollout's length, from stretches t-1 ... t+T within one episode
    valid = np.zeros(len(frames) + T, dtype=bool)
    valid[test_t] = True
    apart, free = [], np.ones(len(frames) + T, dtype=bool)  # stretches that do not overlap, in random order
    for start in rng.permutation(test_t[np.all([valid[test_t + k] for k in range(T)], axis=0)]):
        if free[start - 1 : start + T + 1].all() and len(apart) < args.rollout_windows:
            apart.append(start)
            free[start - 1 : start + T + 1] = False
    apart = np.array(apart, dtype=np.int64)
    curves = {}
    if len(apart) > 1:
        each = apart[:, None] + np.arange(T)  # t of every step, (W, T)
        z_true = encode(each.ravel())[0].view(len(apart), T, -1)
        z_other = z_true.roll(1, dims=0)
        curves = {"forward dynamics model": [], "the same, given another stretch's latents": [], "copying the first frame": []}
        for some in np.array_split(np.arange(len(apart)), -(-len(apart) // 32)):
            windows = get_windows(frames, each[some].ravel(), device).view(len(some), T, 9, 64, 64)
            start = windows[:, 0, :3], windows[:, 0, 3:6]
            for errors, prediction in zip(curves.values(), (rollout(*start, z_true[some]), rollout(*start, z_other[some]), start[1][:, None])):
                errors.append((prediction - windows[:, :, 6:]).pow(2).mean((2, 3, 4)).cpu().numpy())
        curves = {name: np.concatenate(errors) for name, errors in curves.items()}  # (W, T) each
        ends = [errors.mean(0)[[0, -1]] for errors in curves.values()]
        show("error", {"error.png": plot_errors(curves)}, stretches=len(apart), steps=T, fdm=ends[0], copy=ends[2])
    else:
        missing.append(f"how prediction error grows: fewer than two stretches of {T + 2} test frames lie within an episode; lower --rollout-steps")

    # films of the agent, where later stages made them
    films = {"lapo_decode": "lapo_decoder.gif", "lapo_finetune_ppo": "agent.gif"}
    films = [pretrain_path.parent.parent / f"{args.env_id}__{stage}__{args.seed}" / name for stage, name in films.items()]
    for path in films:
        if path.exists():
            show("agent", {path.name: path.read_bytes()}, run=path.parent.name, path=path)
    if not any(path.exists() for path in films):
        missing.append(f"the agent's film: neither {films[0]} nor {films[1]} exists (those stages make them with --capture-video)")

    wall = time.time() - start_time
    about = {
        "checkpoint": f"{pretrain_path}, {pretrained['meta'].get('updates')} updates", "dataset": f"{data_dir}, {len(frames):,} test frames",
        "levels": f"{data_meta['num_levels']} from number {data_meta['start_level']}" if data_meta["num_levels"] else "all",
        "made by": f"{origin['command']} (commit {origin['commit']}) in {wall:.0f} s on {origin['device_name']}",
    }  # fmt: skip
    lacks = "<h2>Not in this report</h2><ul>" + "".join(f"<li>{html.escape(m)}</li>" for m in missing) + "</ul>" if missing else ""
    title = f"Latent actions of {args.env_id}"
    page = (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style></head><body><h1>{title}</h1>'
        f"{to_table(['', ''], about.items())}{lacks}{''.join(sections)}</body></html>\n"
    )
    write_aside(run_dir / "report.html", lambda f: f.write(page.encode()))
    by_code = {
        "windows": sizes, "joint_code": codes[chosen] if vq else None, "nearest_window": t[chosen], "actions": table, "lift": lifts,
        "matched_action": matched, "shuffled_lift": chance,
    }  # fmt: skip
    results = {
        "stage": "lapo_inspect", "env_id": args.env_id, "seed": args.seed, "windows": len(t), "joint_codes": len(joint) if vq else None,
        "perplexity": perplexity.tolist() if vq else None, "codes": {k: None if v is None else v.tolist() for k, v in by_code.items()},
        "rollout_stretches": len(apart), "rollout_mse": {name: errors.mean(0).tolist() for name, errors in curves.items()},
        "missing": missing, "wall_seconds": round(wall, 1), **origin,
    }  # fmt: skip
    write_aside(run_dir / "results.json", lambda f: f.write(json.dumps(results, indent=2).encode()))
    print(f"wrote {run_dir}/report.html, which opens in a browser")
