"""A look inside the latent actions: one HTML report from a checkpoint of lapo_pretrain.py and its dataset.

It shows latents in 2-D, their k-means groups against true actions, the use of the codebooks, what probes read
from latents, every group's latent held in the FDM beside the real game ("dreams"), how prediction error
grows, how much latents are worth to the FDM, and films of the agents where decoding or fine-tuning has run.
The captions in inspect_latents.html say what to look for.

Most windows have a joint code, N x H codes, of their own. So k-means makes groups of latents; the one nearest
to the centre stands for a group. True actions only name things here: without them the report is shorter.

    python -m tools.inspect_latents --env-id bossfight
Reads data/ENV_ID and RUNS_DIR/ENV_ID__lapo_pretrain__SEED/checkpoint.pt,
writes RUNS_DIR/ENV_ID__inspect_latents__SEED/: report.html, its pictures, and results.json with its numbers.
"""

import base64
import functools
import io
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from string import Template
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, normalized_mutual_info_score
from sklearn.neural_network import MLPClassifier
from sklearn.preprocessing import StandardScaler
from sklearn.utils.class_weight import compute_sample_weight
from tqdm import tqdm

from lapo_bc import BAR, get_windows, load_checkpoint, load_dataset, refuse
from lapo_decode import evaluate, load_labels, make_env
from lapo_pretrain import FDM, linear_probe, other_windows, scheduled_rate
from tools.loading import (
    ACTIONS,
    MOVES,
    STAY,
    action_names,
    autocast_of,
    describe,
    encode,
    find_device,
    load_agent,
    load_lapo,
    new_lapo,
    open_folder,
    stage_folder,
    write_results,
    write_whole,
)

# Okabe and Ito's; MARKERS are of another number: 40 different pairs
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333", "#F0E442"]
MARKERS = "osD^vP*X<>"
GREY = "#999999"


@dataclass
class Args:
    # what
    env_id: str = "bossfight"  # a Procgen game, a gymnasium world, or the name of your own videos
    exp_name: str = Path(__file__).stem  # the run folder is RUNS_DIR/ENV_ID__EXP_NAME__SEED
    seed: int = 1  # seed of the runs that it looks at, of k-means and of the games
    # data
    data_dir: str | None = None  # the dataset; default data/ENV_ID
    pretrain_checkpoint: str | None = None  # default: RUNS_DIR/ENV_ID__lapo_pretrain__SEED/checkpoint.pt
    # report
    num_groups: int = 8  # k-means groups of latents
    eval_windows: int = 4096  # test windows, and training windows for the probes
    rollout_steps: int = 16  # length of the rollouts
    num_starts: int = 2  # situations in the game from which the groups' latents are rolled out
    action_updates: int = 0  # also train an FDM on true actions for so many updates: what is one worth to it?
    # run
    runs_dir: str = "runs"  # where run folders are made, and the stages' lie
    overwrite: bool = False  # replace the report in the run folder
    cuda: bool = True  # use CUDA, or another accelerator that torch knows, where there is one


# ---- Numbers ----


def group_latents(latents, num_groups, seed):
    """k-means of latents (n, latent_dim): groups (n,), 0 the largest; those nearest to centres (G,)."""
    num_groups = min(num_groups, len(np.unique(latents.round(4), axis=0)))
    kmeans = KMeans(num_groups, n_init=10, random_state=seed).fit(latents)
    sizes = np.bincount(kmeans.labels_, minlength=num_groups)
    order = np.argsort(-sizes, kind="stable")
    group = np.argsort(order)[kmeans.labels_]
    nearest = kmeans.transform(latents)[:, order].argmin(0)
    return group, nearest


def accuracy_by_shift(z, t, actions, episode):
    """How well latents z (n, latent_dim) of windows around t (n,) tell labels of frames t + k: {k: accuracy}.

    Balanced accuracies of linear_probe, k from -8 to 8 frames, within an episode. Labels that a recording
    wrote k frames late are told best at k.
    """
    found = {}
    for k in range(-8, 9):
        shifted = np.clip(t + k, 0, len(actions) - 1)
        inside = episode[shifted] == episode[t]
        labels = np.where(inside, actions[shifted], -1)
        known = labels[labels >= 0]
        half = known[: len(known) // 2]  # what linear_probe is fitted on
        if len(half) >= 20 and np.ptp(half) > 0:
            found[k] = linear_probe(z, labels)
    return found


def say_shift(found):
    """What accuracy_by_shift says of the labels, in a sentence."""
    best = max(found, key=found.get)
    here = found.get(0, 0)
    told = f"{found[best]:.2f} at {best:+d} frames, {here:.2f} at 0"
    if best == 0 or found[best] < here + 0.05:
        return f"The labels are aligned, as far as latents tell: no clear peak but at 0 ({told})."
    late = "late" if best > 0 else "early"
    return f"The labels seem to be {abs(best)} frames {late} ({told}): move them, and import again."


def count_pairs(group, actions, num_groups, num_actions):
    """How many windows (G, A) have a group and an action; -1 is no label."""
    table = np.zeros((num_groups, num_actions), dtype=int)
    for g, a in zip(group, actions):
        if a >= 0:
            table[g, a] += 1
    return table


def lift(counts, totals, few=20):
    """How much more frequent actions are in groups (..., A) than in all windows (A,), rare ones damped."""
    expected = counts.sum(-1, keepdims=True) * totals / totals.sum()
    return (counts + few) / (expected + few)  # else an action that fell into a group twice would win


def lifts_by_chance(table, rng):
    """What the highest lift of a group (G,) stays below in 95 of 100 shuffles of the actions."""
    totals = table.sum(0)
    bounds = []
    for size in table.sum(1):
        shuffled = rng.multivariate_hypergeometric(totals, size, size=1000)
        highest = lift(shuffled, totals).max(1)
        bounds.append(np.quantile(highest, 0.95))
    return bounds


def codebook_usage(codes, num_codes):
    """Windows x slots (N, K) that use a code, of codes (n, N, H)."""
    counts = []
    for n in range(codes.shape[1]):
        mine = codes[:, n].ravel()
        counts.append(np.bincount(mine, minlength=num_codes))
    return np.stack(counts)


def purity(cluster, actions):
    """The share of windows (n,) that have their cluster's commonest action."""
    total = 0
    for c in np.unique(cluster):
        counts = np.bincount(actions[cluster == c])
        total += counts.max()
    return total / len(cluster)


def latent_space_metrics(z_train, z_test, codes_test, actions_train, actions_test):
    """What latents (n, latent_dim) and codes (n, N, H) tell of actions (n,): fit on train, measured on test.

    -1 is no label; codes are None with --no-vq.
    """
    scaler = StandardScaler().fit(z_train)
    known = actions_test >= 0
    x_train = scaler.transform(z_train[actions_train >= 0])
    y_train = actions_train[actions_train >= 0]
    x_test = scaler.transform(z_test[known])
    y_test = actions_test[known]
    weight = compute_sample_weight("balanced", y_train)
    probes = {
        "linear_probe": LogisticRegression(max_iter=300),
        "mlp_probe": MLPClassifier((256,), alpha=0.1, max_iter=60, random_state=0),
    }
    metrics = {}
    for name, probe in probes.items():
        with warnings.catch_warnings(action="ignore"):  # no convergence; guesses of actions that do not occur
            probe.fit(x_train, y_train, sample_weight=weight)
            metrics[name] = float(balanced_accuracy_score(y_test, probe.predict(x_test)))

    num_clusters = min(y_train.max() + 1, len(x_train))
    cluster = KMeans(num_clusters, n_init=4, random_state=0).fit(x_train).predict(x_test)
    metrics["cluster_purity"] = purity(cluster, y_test)
    if codes_test is not None:
        slots = codes_test[known].reshape(len(y_test), -1)  # (n, N * H)
        nmi = [normalized_mutual_info_score(y_test, slot) for slot in slots.T]
        metrics["nmi"] = float(np.mean(nmi))
        metrics["nmi_best_slot"] = float(np.max(nmi))
    return metrics


@torch.inference_mode()
def rollout(fdm, before, now, z):
    """The FDM's frames (B, T, 3, 64, 64) after o_{t-1}, o_t (B, 3, 64, 64) and latents (B, T, latent_dim)."""
    predictions = []
    for step in range(z.shape[1]):
        frames = torch.cat([before, now], dim=1)
        before = now
        now = fdm(frames, z[:, step])  # it goes on from its own
        predictions.append(now)
    return torch.stack(predictions, dim=1)


@torch.inference_mode()
def rollout_errors(lapo, frames, T, device):
    """Mean squared errors {name: (W, T)} over up to 128 stretches o_{t-1} ... o_{t+T} within one episode."""
    N = len(frames.first)
    starts = np.arange(1, N - T, T + 2)
    t = starts[:, None] + np.arange(T)
    whole = np.isin(t, frames.windows).all(1)
    t = np.random.default_rng(0).permutation(t[whole])[:128]  # (W, T)
    if len(t) < 2:
        return {}
    W = len(t)
    quantised = encode(lapo, frames, t.ravel(), device).quantised
    z = torch.from_numpy(quantised).to(device)
    z = z.view(W, T, -1)  # (W, T, latent_dim)
    windows = get_windows(frames, t.ravel(), device)
    windows = windows.view(W, T, 9, 64, 64)
    before, now, after = windows.split(3, dim=2)  # (W, T, 3, 64, 64)
    start = (before[:, 0], now[:, 0])
    guesses = {
        "forward dynamics model": rollout(lapo.fdm, *start, z),
        "the same, another stretch's latents": rollout(lapo.fdm, *start, z.roll(1, 0)),
        "copying the first frame": now[:, :1],
    }
    errors = {}
    for name, frames in guesses.items():
        squares = (frames - after).square()
        errors[name] = squares.mean((2, 3, 4)).cpu().numpy()
    return errors


def fit_fdm(p, frames, t, z, num_updates, device):
    """An FDM trained as pretraining's args p say, but given z (n, D), true actions, at times t (n,)."""
    p = {**p, "num_updates": num_updates}
    torch.manual_seed(p["seed"])
    action_dim = z.shape[1]
    fdm = FDM(action_dim, p["fdm_width"], p["predict_change"], p["patch_size"])
    fdm = fdm.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(fdm.parameters(), lr=p["learning_rate"])
    autocast = autocast_of(p["bf16"], device)
    schedule = SimpleNamespace(**p)
    for step in tqdm(range(1, num_updates + 1), "FDM on true actions", **BAR):
        i = torch.randint(len(t), (p["batch_size"],)).numpy()
        windows = get_windows(frames, t[i], device)
        given = torch.from_numpy(z[i]).to(device)
        with autocast:
            prediction = fdm(windows[:, :6], given)
        loss = F.mse_loss(prediction, windows[:, 6:])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(fdm.parameters(), p["max_grad_norm"])
        optimizer.param_groups[0]["lr"] = scheduled_rate(step, schedule)
        optimizer.step()
    return fdm.eval()


@torch.inference_mode()
def mean_loss(fdm, frames, t, z, device):
    """The FDM's loss at times t (n,) given z (n, D)."""
    n = len(t)
    total = 0.0
    for i in np.split(np.arange(n), range(512, n, 512)):
        windows = get_windows(frames, t[i], device)
        given = torch.from_numpy(z[i]).to(device)
        prediction = fdm(windows[:, :6], given)
        loss = F.mse_loss(prediction, windows[:, 6:])
        total += loss.item() * len(i)
    return total / n


def worth(fdm, frames, t, z, episode, device):
    """The FDM's loss at times t (n,) of episodes (n,) given z (n, D), and what other windows' z add to it.

    any_window, same_episode: shares of the loss that the z of whatever window, or of another one of the same
    episode, costs more. The second is what z tells of the step, not of the level.
    """
    shuffled = np.random.default_rng(0).permutation(len(t))
    own = mean_loss(fdm, frames, t, z, device)
    any_window = mean_loss(fdm, frames, t, z[shuffled], device)
    same_episode = mean_loss(fdm, frames, t, z[other_windows(episode)], device)
    return {
        "loss": own,
        "any_window": any_window / own - 1,
        "same_episode": same_episode / own - 1,
    }


def variance_between(z, groups):
    """The share of z's variance (n, latent_dim) that lies between groups (n,): 1 if they tell z."""
    mean = z.mean(0)
    between = 0.0
    for g in np.unique(groups):
        mine = z[groups == g]
        distance = np.square(mine.mean(0) - mean).sum()
        between += len(mine) * distance
    total = np.square(z - mean).sum()
    return float(between / total)


# ---- Games ----


def hold(env, state, actions, T):
    """Holds actions[i] in the i-th game, all from one state: frames (E, T + 1, 64, 64, 3), who ended (E,)."""
    env.callmethod("set_state", [state] * env.num)
    pictures = [env.observe()[1]["rgb"].copy()]
    over = np.zeros(env.num, dtype=bool)
    for _ in range(T):
        env.act(np.resize(actions, env.num).astype(np.int32))
        _, obs, first = env.observe()
        picture = obs["rgb"].copy()
        last = pictures[-1]
        picture[first] = last[first] // 2  # the episode's last one, darkened
        picture[over] = last[over]
        pictures.append(picture)
        over |= first
    return np.stack(pictures, axis=1), over


def find_starts(env, actions, num_starts, T, rng):
    """Where moves, held, lead furthest apart, after 40 actions: states, o_{t-1}, o_t (S, 64, 64, 3)."""
    for _ in range(40):
        before = env.observe()[1]["rgb"].copy()
        env.act(rng.choice(actions, env.num).astype(np.int32))
    _, obs, first = env.observe()
    now = obs["rgb"].copy()
    states = env.callmethod("get_state")
    moves = min(len(MOVES), env.num_actions)
    apart = np.zeros(env.num)
    for e in range(env.num):
        pictures, over = hold(env, states[e], range(moves), T)
        if first[e] or over.any():  # o_{t-1} is of another episode, or a move ends this one
            continue
        halfway = pictures[:moves, (T + 1) // 2]
        apart[e] = halfway.std(0).mean()
    best = np.argsort(-apart, kind="stable")[:num_starts]
    best_states = [states[e] for e in best]
    return best_states, before[best], now[best]


def find_lively(frames, t, num_starts):
    """Where nobody can play: o_{t-1}, o_t (S, 64, 64, 3) of windows t in which much changes."""
    before = frames[t - 1]  # (n, 64, 64, 3)
    now = frames[t]
    change = np.abs(now.astype(np.int16) - before)
    change = change.mean((1, 2, 3))  # (n,)
    order = np.argsort(-change, kind="stable")
    apart = max(1, len(t) // (4 * num_starts))  # spread over the upper quarter
    chosen = order[::apart][:num_starts]
    return before[chosen], now[chosen]


def film_agent(agent, env, names, generator, num_frames=300):
    """Four games of an agent side by side, as images; names are the actions'."""
    steps = []  # of every step {game: (its frame, its action)}, without games that are over

    def policy(obs, episode):
        logits = agent(obs)
        probs = logits.softmax(-1)
        action = torch.multinomial(probs, 1, generator=generator).squeeze(-1)
        shown = zip(obs.cpu().numpy(), action.tolist())
        steps.append(dict(zip(episode.tolist(), shown)))
        return F.one_hot(action, logits.shape[1]).log()  # which evaluate() can only take as it is

    returns = evaluate(policy, env, 4, generator)
    steps.append({})  # all are over
    film = []
    last = {}
    for step in steps[:num_frames]:
        last.update(step)
        games = []
        for e in range(4):
            frame, action = last[e]
            if e in step:
                games.append(draw_action(frame, action, names))
            else:
                games.append(draw_return(frame, returns[e]))
            games.append(np.full((192, 4, 3), 255, dtype=np.uint8))  # between the games
        film.append(Image.fromarray(np.concatenate(games, axis=1)))
    return film


def enlarge(frame):
    return Image.fromarray(frame).resize((192, 192), Image.NEAREST)


def draw_action(frame, action, names):
    """A frame (64, 64, 3), enlarged, with the action taken."""
    image = enlarge(frame)
    pen = ImageDraw.Draw(image)
    pen.ellipse((4, 4, 40, 40), fill="white", outline="black")
    sign = str(action)
    if names == ACTIONS:
        sign = "↙←↖↓•↑↘→↗DAWSQE"[action]
    font = ImageFont.truetype(findfont("DejaVu Sans:bold"), 28)  # it has arrows
    pen.text((22, 22), sign, fill="black", anchor="mm", font=font)
    return np.asarray(image)


def draw_return(frame, value):
    """The last frame (64, 64, 3) of a game that is over, enlarged and dark, with its return."""
    image = enlarge(frame // 2)
    pen = ImageDraw.Draw(image)
    font = ImageFont.truetype(findfont("DejaVu Sans:bold"), 40)
    style = {"fill": "white", "stroke_width": 3, "stroke_fill": "black"}
    pen.text((96, 96), f"{value:g}", anchor="mm", font=font, **style)
    return np.asarray(image)


# ---- Pictures ----


def to_floats(frames, device):
    """Frames (..., 64, 64, 3) uint8 as the networks see them, (..., 3, 64, 64) in [-0.5, 0.5]."""
    x = torch.from_numpy(frames).to(device)
    return x.movedim(-1, -3) / 255 - 0.5


def to_pixels(x):
    """Images (..., 3, 64, 64) float in [-0.5, 0.5] -> (..., 64, 64, 3) uint8."""
    x = (x.clamp(-0.5, 0.5) + 0.5) * 255
    return x.round().byte().movedim(-3, -1).cpu().numpy()


def to_png(fig):
    buffer = io.BytesIO()
    fig.savefig(buffer, dpi=100, format="png", bbox_inches="tight")
    plt.close(fig)
    return buffer.getvalue()


def to_gif(images, milliseconds):
    first, *rest = [image.quantize(128, dither=Image.Dither.NONE) for image in images]
    buffer = io.BytesIO()
    first.save(buffer, "gif", save_all=True, append_images=rest, duration=milliseconds, loop=0)
    return buffer.getvalue()


def tile(pictures, margin):
    """Pictures (R, C, 64, 64, 3) as one (R * side, C * side, 3), side = 64 + 2 * margin, white in between."""
    R, C = pictures.shape[:2]
    side = 64 + 2 * margin
    image = np.full((R, side, C, side, 3), 255, dtype=np.uint8)
    inside = slice(margin, margin + 64)
    image[:, inside, :, inside] = pictures.swapaxes(1, 2)
    return image.reshape(R * side, C * side, 3)


def without_axes(ax):
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def plot_grid(pictures, rows, columns, together, inches):
    """Pictures (R, C, 64, 64, 3) uint8 in a grid with names, `together` rows close to each other."""
    R, C = pictures.shape[:2]
    strips = []
    between = np.full((10, 68 * C, 3), 255, dtype=np.uint8)
    for r in range(0, R, together):
        strips.append(tile(pictures[r : r + together], 2))
        strips.append(between)
    image = np.concatenate(strips)
    width = 1.2 + inches * C
    height = 0.8 + inches * len(image) / 68
    fig, ax = plt.subplots(figsize=(width, height), layout="constrained")
    ax.imshow(image, interpolation="nearest")
    ax.set_xticks(68 * np.arange(C) + 34, columns)
    r = np.arange(R)
    tops = 68 * r + 10 * (r // together)
    ax.set_yticks(tops + 34, rows)
    ax.xaxis.tick_top()
    without_axes(ax)
    return fig


def plot_points(ax, z, kind, names, colors, markers):
    """Latents z (n, latent_dim) on their two principal components, by kind (n,); returns them (n, 2)."""
    z = np.pad(z, ((0, 0), (0, 1)))  # a column of zeros: the latent may have one dimension only
    with np.errstate(invalid="ignore"):  # latents that are all the same have no variance
        pca = PCA(2, random_state=0).fit(z)
    xy = pca.transform(z)
    share = np.nan_to_num(pca.explained_variance_ratio_)
    counts = np.bincount(kind)
    for k in np.argsort(-counts, kind="stable"):  # rare ones on top
        if counts[k] == 0:
            continue
        mine = xy[kind == k]
        ax.scatter(
            mine[:, 0],
            mine[:, 1],
            s=20,
            color=colors[k % len(colors)],
            marker=markers[k % len(markers)],
            alpha=0.6,
            linewidths=0,
            label=f"{names[k]} ({counts[k] / len(z):.1%})",
        )
    low, high = np.percentile(xy, [0.2, 99.8], axis=0)  # (2,) each
    margin = 0.06 * (high - low) + 1e-6
    ax.set_xlim(low[0] - margin[0], high[0] + margin[0])
    ax.set_ylim(low[1] - margin[1], high[1] + margin[1])
    ax.set_xlabel(f"1st principal component ({share[0]:.0%} of the variance)")
    ax.set_ylabel(f"2nd principal component ({share[1]:.0%})")
    ax.legend(fontsize=9, markerscale=1.5, ncol=3, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    return xy


def plot_by_action(ax, z, actions, names):
    """Latents in 2-D by true action (n,), -1 or None without labels.

    Of Procgen's actions the moves: the colour is horizontal, the marker vertical.
    """
    if actions is None:
        actions = np.full(len(z), -1)
    if names == ACTIONS:
        actions = np.where(actions < len(MOVES), actions, STAY)
        names = list(MOVES)
        names[STAY] += " or a button"
        colors = np.repeat(["#D55E00", GREY, "#0072B2"], 3).tolist()
        markers = list("vo^" * 3)
    else:
        colors = np.resize(COLORS, len(names)).tolist()
        markers = np.resize(list(MARKERS), len(names)).tolist()
    kind = np.where(actions < 0, len(names), actions)
    names = [*names, "no label"]
    colors.append("#BBBBBB")
    markers.append(".")
    plot_points(ax, z, kind, names, colors, markers)
    ax.set_title("by true action")


def plot_latents(z, group, names, actions, called):
    """Latents (n, latent_dim) in 2-D, by true action, called so, and by group (n,)."""
    fig, axes = plt.subplots(1, 2, figsize=(13, 6.5), layout="constrained")
    plot_by_action(axes[0], z, actions, called)
    xy = plot_points(axes[1], z, group, names, COLORS, MARKERS)
    for g in range(len(names)):
        box = {"boxstyle": "round,pad=0.2", "fc": "white", "ec": COLORS[g % len(COLORS)], "lw": 2}
        median = np.median(xy[group == g], axis=0)
        axes[1].annotate(str(g), median, ha="center", va="center", bbox=box)
    axes[1].set_title("by group")
    return fig


def plot_table(table, lifts, names, called):
    """Windows of groups and actions (G, A), their lifts as colours, each row's highest framed; totals."""
    counts = np.vstack([table, table.sum(0)])
    ones = np.ones(len(called))  # of all windows
    shades = np.log2(np.vstack([lifts, ones]))
    height = 1.6 + 0.5 * len(table)
    fig, ax = plt.subplots(figsize=(13, height), layout="constrained")
    image = ax.imshow(shades, cmap="PuOr_r", vmin=-2, vmax=2, aspect="auto")
    centred = {"ha": "center", "va": "center", "fontsize": 9}
    for (g, a), count in np.ndenumerate(counts):
        color = "white" if abs(shades[g, a]) > 1.3 else "black"
        ax.text(a, g, f"{count:,}", color=color, **centred)
    for g, a in enumerate(lifts.argmax(1)):
        corner = (a - 0.47, g - 0.45)
        frame = plt.Rectangle(corner, 0.94, 0.9, fill=False, ec="black", lw=2)
        ax.add_patch(frame)
    ax.axhline(len(table) - 0.5, color="black", lw=1)
    ax.set_xticks(range(len(called)), called, rotation=30, ha="right")
    ax.set_yticks(range(len(counts)), [*names, "all windows"])
    ax.set_title("Test windows by group and true action")
    bar = fig.colorbar(image, ax=ax, extend="both", ticks=range(-2, 3), pad=0.01)
    bar.set_label("log2 of the lift")
    return fig


def plot_codebooks(usage, perplexity):
    """Shares of the codes of each codebook (N, K), most used first."""
    num_codes = usage.shape[1]
    fig, ax = plt.subplots(figsize=(9, 4.5), layout="constrained")
    for n, share in enumerate(usage):
        used = (share > 0).sum()
        label = f"codebook {n}: {used} codes used, perplexity {perplexity[n]:.1f}"
        color = COLORS[n % len(COLORS)]
        marker = MARKERS[n % len(MARKERS)]
        falling = np.sort(share)[::-1]
        ax.plot(falling, marker=marker, ms=4, color=color, label=label)
    ax.axhline(1 / num_codes, color="#333333", ls="--", label=f"all alike (1/{num_codes})")
    ax.set(xlabel="code, most used first", ylabel="share of windows × slots", ylim=(0, None))
    ax.legend()
    return fig


def plot_shifts(found):
    """Accuracies {k: accuracy} of labels k frames later."""
    fig, ax = plt.subplots(figsize=(9, 3.5), layout="constrained")
    ax.plot(found.keys(), found.values(), "o-", color=COLORS[0])
    ax.axvline(0, color=GREY, ls=":")
    ax.set_xlabel("frames by which the label comes later than the latent")
    ax.set_ylabel("balanced accuracy")
    return fig


def plot_errors(curves):
    """Errors {name: (W, T)} against the number of steps, with the 95% confidence interval of the mean."""
    fig, ax = plt.subplots(figsize=(9, 5.5), layout="constrained")
    styles = zip(COLORS, ("o-", "s--", "^:"))
    for (name, errors), (color, style) in zip(curves.items(), styles):
        steps = np.arange(1, errors.shape[1] + 1)
        mean = errors.mean(0)
        stderr = errors.std(0, ddof=1) / np.sqrt(len(errors))
        half = 1.96 * stderr
        low = mean - half
        high = mean + half
        ax.plot(steps, mean, style, color=color, label=name)
        ax.fill_between(steps, low, high, color=color, alpha=0.25, linewidth=0)
    ax.set(xlabel="steps predicted, each from the predictions before it", ylim=(0, None))
    ax.set_ylabel("mean squared error per pixel and channel (black 0, white 1)")
    ax.legend()
    return fig


def film_dreams(grid, kinds, names, called):
    """Images of grid (S, kinds, G, T + 1, 64, 64, 3): a column a group, one image a step."""
    S, K, G, steps = grid.shape[:4]
    rows = []
    for s in range(S):
        rows += [f"start {s + 1}\n{kind}" for kind in kinds]
    columns = []
    for name, action in zip(names, called):
        columns.append(f"{name}\n{action}")
    film = []
    for step in range(steps):
        pictures = grid[:, :, :, step].reshape(S * K, G, 64, 64, 3)
        fig = plot_grid(pictures, rows, columns, K, 1.36)
        fig.supxlabel(f"step {step}")
        png = io.BytesIO(to_png(fig))
        film.append(Image.open(png).convert("RGB"))
    durations = [200] * steps
    durations[0] = 1000
    durations[-1] = 1500
    return to_gif(film, durations)


def strip_dreams(grid, kinds, names, called):
    """The same as one picture: groups under each other, steps 0, 1, 2, 4, ... from left to right."""
    S, K, G, steps = grid.shape[:4]
    T = steps - 1
    powers = {2**i for i in range(T.bit_length())}
    shown = sorted({0, T, *powers})
    columns = []
    for s in range(S):
        columns += [f"start {s + 1}\nstep {step}" for step in shown]
    rows = []
    for name, action in zip(names, called):
        for kind in kinds:
            rows.append(name if kind == "dream" else action)
    pictures = grid[:, :, :, shown].transpose(2, 1, 0, 3, 4, 5, 6)  # (G, kinds, S, steps, 64, 64, 3)
    pictures = pictures.reshape(G * K, S * len(shown), 64, 64, 3)
    return to_png(plot_grid(pictures, rows, columns, K, 0.68))


# ---- The page ----


@functools.cache
def load_page():
    """The head of inspect_latents.html, and its sections {name: text}."""
    text = Path(__file__).with_suffix(".html").read_text()
    head, *rest = text.split("<!-- ")
    return head, dict(text.split(" -->\n", 1) for text in rest)


def to_html(table):
    """The rows of an HTML table, of rows of cells."""
    rows = []
    for row in table:
        cells = "".join(f"<td>{cell}</td>" for cell in row)
        rows.append(f"<tr>{cells}</tr>")
    return "".join(rows)


def section(name, folder, pictures=None, **values):
    """A section of the page with values and pictures {file: bytes}, which also go to the folder."""
    images = ""
    for file, picture in (pictures or {}).items():
        (folder / file).write_bytes(picture)
        data = base64.b64encode(picture).decode()
        images += f'<img alt="{file}" src="data:image/{file[-3:]};base64,{data}">\n'
    _, sections = load_page()
    return Template(sections[name]).substitute(values, pictures=images)


def main(args):
    counts = args.num_groups, args.rollout_steps, args.num_starts, args.eval_windows - 1
    if min(counts) < 1:
        refuse("--num-groups, --rollout-steps and --num-starts start at 1, --eval-windows at 2")
    plt.switch_backend("Agg")
    began = time.time()
    T = args.rollout_steps
    folder = open_folder(args)
    path = args.pretrain_checkpoint or stage_folder(args, "lapo_pretrain") / "checkpoint.pt"
    pretrained = load_checkpoint(path, "lapo_pretrain", args.env_id)
    data, train, test = load_dataset(args)
    actions_train = load_labels(train, "actions")  # (N,), -1: no label; None: there is no file
    actions_test = load_labels(test, "actions")
    labelled = actions_train is not None and actions_test is not None
    if labelled:  # own videos may have labels in one split alone
        labelled = bool((actions_train >= 0).any() and (actions_test >= 0).any())
    if args.action_updates and not labelled:
        refuse("--action-updates needs true actions, and this dataset has no actions.npy: leave it out")
    device = find_device(args.cuda)
    lapo = load_lapo(pretrained, device)
    agents = {
        "lapo_decode": load_agent("lapo_decode", args, device),
        "lapo_finetune_ppo": load_agent("lapo_finetune_ppo", args, device),
    }
    folder.mkdir(parents=True, exist_ok=True)

    # 1. latents and their groups
    rng = np.random.default_rng(0)
    t_train = np.sort(rng.permutation(train.windows)[: args.eval_windows])
    t = np.sort(rng.permutation(test.windows)[: args.eval_windows])
    actions = action_names(data)
    labels = None
    if labelled:
        labels = actions_test[t]  # (n,)
    encoded = encode(lapo, test, t, device)
    latents = encoded.quantised
    group, chosen = group_latents(latents, args.num_groups, args.seed)
    n = len(t)
    G = len(chosen)
    names = [f"group {g}" for g in range(G)]
    what = "quantised latent actions" if lapo.vq else "continuous latent actions (trained with --no-vq)"
    picture = to_png(plot_latents(latents, group, names, labels, actions))
    report = [section("latents", folder, {"latents.png": picture}, what=what, windows=n)]
    groups = {
        "windows": np.bincount(group).tolist(),
        "nearest_window": t[chosen].tolist(),
    }
    results = {"windows": n, "latent_space": None, "codes_used": None, "groups": groups}

    # 2. groups and true actions
    called = [""] * G  # a group's action, with a question mark if its lift may be chance
    if labelled:
        table = count_pairs(group, labels, G, len(actions))
        lifts = lift(table, table.sum(0))
        matched = lifts.argmax(1)
        chance = lifts_by_chance(table, rng)
        rows = []
        for g, a in enumerate(matched):
            best = lifts[g, a]
            called[g] = actions[a]
            if best <= chance[g]:
                called[g] += "?"
            share = groups["windows"][g] / n
            name = f"{names[g]} ({share:.0%})"
            rows.append(f"{name}: {called[g]} {best:.2f}, by chance {chance[g]:.2f}")
        picture = to_png(plot_table(table, lifts, rows, actions))
        report.append(section("groups", folder, {"groups.png": picture}))
        groups["actions"] = table.tolist()
        groups["lift"] = lifts.tolist()
        groups["shuffled_lift"] = chance
        groups["matched_action"] = matched.tolist()

    # 3. codebooks
    if lapo.vq:
        used = codebook_usage(encoded.codes, lapo.vq.K)  # (N, K)
        usage = used / used.sum(1, keepdims=True)
        entropy = -(usage * np.log(usage + 1e-10)).sum(1)
        perplexity = np.exp(entropy)
        _, joint = np.unique(encoded.codes, axis=0, return_counts=True)
        picture = to_png(plot_codebooks(usage, perplexity))
        values = {
            "num_codes": lapo.vq.K,
            "slots": lapo.vq.H,
            "windows": n,
            "joint": len(joint),
            "most": f"{joint.max() / n:.1%}",
        }
        report.append(section("codebooks", folder, {"codebooks.png": picture}, **values))
        results["codes_used"] = (used > 0).sum(1).tolist()
        results["perplexity"] = perplexity.tolist()
        results["joint_codes"] = len(joint)

    # 4. what latents tell of the true action, beside two controls
    if labelled:
        labels_train = actions_train[t_train]
        z_train = encode(lapo, train, t_train, device).z
        untrained = new_lapo(pretrained["args"]).to(device, memory_format=torch.channels_last)
        fresh = encode(untrained, test, t, device)
        fresh_train = encode(untrained, train, t_train, device).z
        shuffled_train = np.random.default_rng(0).permutation(labels_train)
        shuffled = np.random.default_rng(0).permutation(labels)
        latents_trained = (z_train, encoded.z, encoded.codes)
        latents_fresh = (fresh_train, fresh.z, fresh.codes)
        space = {
            "trained": latent_space_metrics(*latents_trained, labels_train, labels),
            "untrained_idm": latent_space_metrics(*latents_fresh, labels_train, labels),
            "shuffled_actions": latent_space_metrics(*latents_trained, shuffled_train, shuffled),
        }
        rows = [["", *space]]
        for metric in space["trained"]:
            cells = [f"{found[metric]:.3f}" for found in space.values()]
            rows.append([metric, *cells])
        chance = 1 / len(np.unique(labels[labels >= 0]))
        values = {
            "table": to_html(rows),
            "windows": n,
            "chance": f"{chance:.3f}",
            "shift": "",
        }
        pictures = {}
        shifts = accuracy_by_shift(encoded.z, t, actions_test, np.cumsum(test.first))
        if shifts:
            values["shift"] = say_shift(shifts)
            pictures["shifts.png"] = to_png(plot_shifts(shifts))
            print(values["shift"])
        report.append(section("latent_space", folder, pictures, **values))
        results["latent_space"] = {**space, "chance": chance, "windows": n}
        results["accuracy_by_shift"] = shifts

    # 5. every group's latent held in the FDM, and its matched action in the game, where there is one
    playable = bool(data.get("demonstrator"))
    levels = data["num_levels"], data["start_level"]
    tried = n
    if playable:
        tried = max(16, G, args.num_starts)
        env = make_env(args.env_id, tried, *levels, args.seed)
        often = labels[labels >= 0] if labelled else np.arange(env.num_actions)
        states, before, now = find_starts(env, often, args.num_starts, T, rng)
    else:
        before, now = find_lively(test, t, args.num_starts)
    S = len(now)
    before = to_floats(before, device).repeat_interleave(G, 0)  # (S * G, 3, 64, 64)
    now = to_floats(now, device).repeat_interleave(G, 0)
    z = torch.from_numpy(latents[chosen]).to(device)  # (G, latent_dim)
    z = z.repeat(S, 1)  # (S * G, latent_dim)
    held = z[:, None].expand(-1, T, -1)  # (S * G, T, latent_dim)
    dreams = rollout(lapo.fdm, before, now, held)  # (S * G, T, 3, 64, 64)
    dreams = torch.cat([now[:, None], dreams], dim=1)
    dreams = to_pixels(dreams)
    kinds = {"dream": dreams.reshape(S, G, T + 1, 64, 64, 3)}
    if labelled and playable:
        games = []
        for state in states:
            pictures, _ = hold(env, state, matched, T)
            games.append(pictures[:G])
        kinds["game"] = np.stack(games)
    if playable:
        env.close()
    grid = np.stack(list(kinds.values()), axis=1)  # (S, dream and game, G, T + 1, 64, 64, 3)
    pictures = {
        "rollouts.gif": film_dreams(grid, kinds, names, called),
        "rollouts.png": strip_dreams(grid, kinds, names, called),
    }
    report.append(section("rollouts", folder, pictures, tried=tried))

    # 6. prediction error against the rollout's length
    curves = rollout_errors(lapo, test, T, device)
    results["rollout_mse"] = {}
    for name, errors in curves.items():
        results["rollout_mse"][name] = errors.mean(0).tolist()
    if curves:
        picture = to_png(plot_errors(curves))
        stretches = len(curves["forward dynamics model"])
        report.append(section("error", folder, {"error.png": picture}, stretches=stretches))

    # 7. what latents are worth to the FDM, and true actions to one that is trained on them
    episode = np.cumsum(test.first)[t]  # (n,)
    values = {"the latent": worth(lapo.fdm, test, t, latents, episode, device)}
    if args.action_updates:
        onehot = np.eye(len(actions), dtype=np.float32)
        windows = train.windows[actions_train[train.windows] >= 0]
        z = onehot[actions_train[windows]]
        fdm = fit_fdm(pretrained["args"], train, windows, z, args.action_updates, device)
        known = labels >= 0
        z = onehot[labels[known]]
        where = (t[known], z, episode[known])
        values["the true action"] = worth(fdm, test, *where, device)
    rows = [["given", "loss", "any other window's", "another's of its episode"]]
    for name, value in values.items():
        loss = f"{value['loss']:.2e}"
        any_window = f"{value['any_window']:+.1%}"
        same_episode = f"{value['same_episode']:+.1%}"
        rows.append([name, loss, any_window, same_episode])
    variance = variance_between(encoded.z, episode)
    by_chance = variance_between(rng.permutation(encoded.z), episode)
    shown = {
        "table": to_html(rows),
        "updates": args.action_updates,
        "variance_between_episodes": f"{variance:.0%}",
        "by_chance": f"{by_chance:.0%}",
    }
    report.append(section("worth", folder, **shown))
    results["worth"] = {**values, "variance_between_episodes": variance, "by_chance": by_chance}

    # 8. the agents play
    for stage, agent in agents.items():
        if agent and playable:
            env = make_env(args.env_id, 4, *levels, args.seed + 1000)
            generator = torch.Generator(device).manual_seed(args.seed)
            film = to_gif(film_agent(agent, env, actions, generator), 1000 // 15)
            report.append(section("agent", folder, {f"{stage}.gif": film}, stage=stage))

    parts = {
        "groups": labelled,
        "codebooks": lapo.vq,
        "latent_space": labelled,
        "error": curves,
        **agents,
    }
    results["missing"] = [name for name, part in parts.items() if not part]
    results |= describe(args, "inspect_latents")
    head, _ = load_page()
    missing = ", ".join(results["missing"]) or "nothing"
    head = Template(head).substitute({**results, "missing": missing}, checkpoint=path)
    write_whole(folder / "report.html", head + "".join(report))
    write_results(folder, began, results)
    print(f"wrote {folder}/report.html, which opens in a browser")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
