"""A look inside the latent actions: one HTML report from a checkpoint of lapo_pretrain.py and its dataset.

Latents in 2-D, their k-means groups against true actions, the use of the codebooks, what probes read from
latents, every group's latent held in the FDM beside the real game ("dreams"), how prediction error grows, how
much latents are worth to the FDM, the agent's film where decoding or fine-tuning has run. Captions, what to
look for: lapo_inspect.html.

Most windows have a joint code, N x H codes, of their own. So k-means makes groups of latents; the one nearest
to the centre stands for a group. True actions only name things here: without them the report is shorter.

    python lapo_inspect.py --env-id bossfight
Reads data/ENV_ID and RUNS_DIR/ENV_ID__lapo_pretrain__SEED/checkpoint.pt,
writes RUNS_DIR/ENV_ID__lapo_inspect__SEED/: report.html, its pictures, and results.json with its numbers.
"""

import base64
import io
import json
import shlex
import subprocess
import sys
import time
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from string import Template
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from gymnasium import registry
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

from lapo_bc import LatentPolicy, get_windows, load_checkpoint, load_dataset, write_whole
from lapo_decode import Decoder, evaluate, make_env
from lapo_finetune_ppo import FinetunedAgent
from lapo_pretrain import FDM, IDM, VQ, others

plt.switch_backend("Agg")
# Procgen's actions 0-8 are 3 * (right + 1) + (up + 1); 9-14 are buttons
MOVES = ["left down", "left", "left up", "down", "stay", "up", "right down", "right", "right up"]
ACTIONS, STAY = [*MOVES, *(f"button {b}" for b in "DAWSQE")], MOVES.index("stay")
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333", "#F0E442"]
MARKERS = "osD^vP*X<>"  # of another length than COLORS (Okabe and Ito's): 40 different pairs
PAGE = Path(__file__).with_suffix(".html").read_text().split("<!-- ")  # its head, then sections
SECTIONS = dict(section.split(" -->\n", 1) for section in PAGE[1:])


@dataclass
class Args:
    # what
    env_id: str = "bossfight"  # a Procgen game, a gymnasium world, or the name of your own videos
    exp_name: str = Path(__file__).stem  # the run folder is RUNS_DIR/ENV_ID__EXP_NAME__SEED
    seed: int = 1  # seed of the runs that it looks at, of k-means and of the games
    # data
    data_dir: str | None = None  # the dataset of collect_expert_data.py; default data/ENV_ID
    pretrain_checkpoint: str | None = None  # default: RUNS_DIR/ENV_ID__lapo_pretrain__SEED/checkpoint.pt
    allow_unfinished: bool = False  # take checkpoints of unfinished runs, too
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


def build_networks(p, device, trained=None):
    """IDM, VQ (on the CPU; None with --no-vq) and FDM of pretraining's args p: trained, or as they began."""
    torch.manual_seed(p["seed"])
    N, H, D, K = (p[f"vq_{size}"] for size in ("num_codebooks", "num_slots", "dim", "num_codes"))
    idm = IDM(p["idm_scale"], N * H * D, p["patch_size"], p.get("idm_differences", False))
    vq = VQ(N, H, D, K, p["vq_commitment"], p["vq_decay"])
    fdm = FDM(N * H * D, p["fdm_width"], p["predict_change"], p["patch_size"])
    for name, network in {"idm": idm, "vq": vq, "fdm": fdm}.items() if trained else ():
        network.load_state_dict(trained[name])
    idm, fdm = (network.eval().to(device, memory_format=torch.channels_last) for network in (idm, fdm))
    return idm, vq.eval() if p["vq"] else None, fdm


@torch.inference_mode()
def encode(idm, vq, frames, t, device):
    """Windows around t (n,): latents (n, latent_dim), what of them the FDM is given, codes (n, N, H)."""
    pieces = np.split(t, range(512, len(t), 512))
    z = torch.cat([idm(get_windows(frames, piece, device)).cpu() for piece in pieces])
    quantised, _, codes, _ = vq(z) if vq else (z, None, None, None)
    return z.numpy(), quantised.numpy(), codes.numpy() if vq else None


@torch.inference_mode()
def rollout(fdm, before, now, z):
    """The FDM's frames (B, T, 3, 64, 64) after o_{t-1}, o_t (B, 3, 64, 64) and latents (B, T, latent_dim)."""
    predictions = []
    for step in range(z.shape[1]):
        predictions.append(fdm(torch.cat([before, now], dim=1), z[:, step]))
        before, now = now, predictions[-1]  # it goes on from its own
    return torch.stack(predictions, dim=1)


def load_labels(frames, t):
    """The true actions {split: (n,)} at t {split: (n,)}, -1: no label; {} where there is no label file."""
    try:
        return {split: frames[split].labels("actions")[t[split]] for split in t}
    except FileNotFoundError:
        return {}


def action_names(data):
    """What to call the actions of a dataset, from its meta.json."""
    if data.get("demonstrator") and data["env_id"] not in registry:  # Procgen
        return ACTIONS
    return data.get("action_names") or [f"action {a}" for a in range(data.get("num_actions", 0))]


def latent_space_metrics(encoded, actions):
    """What latents, {split: encode(...)}, tell of actions {split: (n,)}: fit on train, measured on test."""
    known = {split: actions[split] >= 0 for split in actions}
    scaler = StandardScaler().fit(encoded["train"][0])
    x = {split: scaler.transform(encoded[split][0][known[split]]) for split in encoded}
    actions = {split: actions[split][known[split]] for split in actions}
    weight, codes = compute_sample_weight("balanced", actions["train"]), encoded["test"][2]
    metrics, mlp = {}, MLPClassifier((256,), alpha=0.1, max_iter=60, random_state=0)
    for name, probe in {"linear_probe": LogisticRegression(max_iter=300), "mlp_probe": mlp}.items():
        with warnings.catch_warnings(action="ignore"):  # no convergence; guesses of actions that do not occur
            guess = probe.fit(x["train"], actions["train"], sample_weight=weight).predict(x["test"])
            metrics[name] = float(balanced_accuracy_score(actions["test"], guess))
    group = (
        KMeans(min(actions["train"].max() + 1, len(x["train"])), n_init=4, random_state=0)
        .fit(x["train"])
        .predict(x["test"])
    )
    most = [np.bincount(actions["test"][group == g]).max() for g in np.unique(group)]
    metrics["cluster_purity"] = sum(most) / len(group)
    if codes is not None:
        slots = codes[known["test"]].reshape(len(actions["test"]), -1).T  # (N * H, n)
        nmi = [normalized_mutual_info_score(actions["test"], slot) for slot in slots]
        metrics |= {"nmi": float(np.mean(nmi)), "nmi_best_slot": float(np.max(nmi))}
    return metrics


def group_latents(latents, num_groups, seed):
    """k-means of latents (n, latent_dim): groups (n,), 0 the largest; those nearest to centres (G,)."""
    num_groups = min(num_groups, len(np.unique(latents.round(4), axis=0)))
    kmeans = KMeans(num_groups, n_init=10, random_state=seed).fit(latents)
    order = np.argsort(-np.bincount(kmeans.labels_, minlength=num_groups), kind="stable")
    return np.argsort(order)[kmeans.labels_], kmeans.transform(latents)[:, order].argmin(0)


def lift(counts, totals, few=20):
    """How much more frequent actions are in groups (..., A) than in all windows (A,), rare ones damped."""
    expected = counts.sum(-1, keepdims=True) * totals / totals.sum()
    return (counts + few) / (expected + few)  # else an action that fell into a group twice would win


@torch.inference_mode()
def rollout_errors(idm, vq, fdm, frames, windows, T, device):
    """Mean squared errors {name: (W, T)} over up to 128 stretches o_{t-1} ... o_{t+T} within one episode."""
    t = np.arange(1, len(frames) - T, T + 2)[:, None] + np.arange(T)
    t = np.random.default_rng(0).permutation(t[np.isin(t, windows).all(1)])[:128]  # (W, T)
    if len(t) < 2:
        return {}
    z = torch.from_numpy(encode(idm, vq, frames, t.ravel(), device)[1]).to(device).view(*t.shape, -1)
    before, now, after = get_windows(frames, t.ravel(), device).view(*t.shape, 9, 64, 64).split(3, dim=2)
    guesses = {"forward dynamics model": rollout(fdm, before[:, 0], now[:, 0], z)}
    guesses["the same, another stretch's latents"] = rollout(fdm, before[:, 0], now[:, 0], z.roll(1, 0))
    guesses["copying the first frame"] = now[:, :1]
    return {name: (x - after).pow(2).mean((2, 3, 4)).cpu().numpy() for name, x in guesses.items()}


def fit_fdm(p, frames, t, z, num_updates, device):
    """An FDM trained as pretraining's args p say, but given z (n, D), true actions, at times t (n,)."""
    torch.manual_seed(p["seed"])
    fdm = FDM(z.shape[1], p["fdm_width"], p["predict_change"], p["patch_size"])
    fdm = fdm.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(fdm.parameters(), lr=p["learning_rate"])
    warmed_up = [0, p["warmup_updates"], max(p["warmup_updates"] + 1, num_updates)]
    for update in tqdm(range(num_updates), "FDM on true actions"):
        optimizer.param_groups[0]["lr"] = p["learning_rate"] * np.interp(update, warmed_up, [0.1, 1.0, 0.01])
        i = torch.randint(len(t), (p["batch_size"],)).numpy()
        batch = get_windows(frames, t[i], device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bool(p["bf16"])):
            prediction = fdm(batch[:, :6], torch.from_numpy(z[i]).to(device))
        optimizer.zero_grad()
        F.mse_loss(prediction, batch[:, 6:]).backward()
        torch.nn.utils.clip_grad_norm_(fdm.parameters(), p["max_grad_norm"])
        optimizer.step()
    return fdm.eval()


@torch.inference_mode()
def worth(fdm, frames, t, z, episode, device):
    """The FDM's loss at times t (n,) of episodes (n,) given z (n, D), and what other windows' z add to it.

    any_window, same_episode: shares of the loss that the z of whatever window, or of another one of the same
    episode, costs more. The second is what z tells of the step, not of the level.
    """
    losses = []
    for order in (np.arange(len(t)), np.random.default_rng(0).permutation(len(t)), others(episode)):
        losses.append(0.0)
        for i in np.split(np.arange(len(t)), range(512, len(t), 512)):
            batch = get_windows(frames, t[i], device)
            guess = fdm(batch[:, :6], torch.from_numpy(z[order[i]]).to(device))
            losses[-1] += F.mse_loss(guess, batch[:, 6:]).item() * len(i) / len(t)
    own, any_window, same_episode = losses
    return {"loss": own, "any_window": any_window / own - 1, "same_episode": same_episode / own - 1}


def variance_between(z, groups):
    """The share of z's variance (n, latent_dim) that lies between groups (n,): 1 if they tell z."""
    mean, groups = z.mean(0), [z[groups == g] for g in np.unique(groups)]
    between = sum(len(group) * np.square(group.mean(0) - mean).sum() for group in groups)
    return float(between / np.square(z - mean).sum())


def hold(env, state, actions, T):
    """Holds actions[i] in the i-th game, all from one state: frames (E, T + 1, 64, 64, 3), who ended (E,)."""
    env.callmethod("set_state", [state] * env.num)
    pictures, over = [env.observe()[1]["rgb"].copy()], np.zeros(env.num, dtype=bool)
    for _ in range(T):
        env.act(np.resize(actions, env.num).astype(np.int32))
        _, obs, first = env.observe()
        picture, last = obs["rgb"].copy(), pictures[-1]
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
    now, states, apart = obs["rgb"].copy(), env.callmethod("get_state"), []
    moves = min(9, env.num_actions)
    for e in range(env.num):
        pictures, over = hold(env, states[e], range(moves), T)
        # not if o_{t-1} is of another episode, or a move ends this one
        apart.append(0 if first[e] or over.any() else pictures[:moves, (T + 1) // 2].std(0).mean())
    best = np.argsort(-np.array(apart), kind="stable")[:num_starts]
    return [states[e] for e in best], before[best], now[best]


def load_agent(stage, args, device):
    """The agent of a stage that has run, None before that: (B, 64, 64, 3) uint8 -> logits (B, 15)."""
    path = Path(f"{args.runs_dir}/{args.env_id}__{stage}__{args.seed}/checkpoint.pt")
    if not path.exists():
        return None
    c = load_checkpoint(path, stage, ["bc_args", "pretrain_args"], args)
    a, scale, patch_size = c["args"], c["bc_args"]["policy_scale"], c["pretrain_args"]["patch_size"]
    if stage == "lapo_finetune_ppo":
        latent_dim = len(c["agent"]["head.bias"])
        sizes = scale, patch_size, latent_dim, a["decoder_hidden"]
        agent = FinetunedAgent(*sizes, a["sl"], len(c["agent"]["actor.bias"]))
        agent.load_state_dict(c["agent"])
        agent.to(device)
        return lambda obs: agent(agent.features(obs, nullcontext()))[0]
    policy = LatentPolicy(scale, len(c["policy"]["mean"]), patch_size)
    decoder = Decoder(len(c["decoder"]["mean"]), a["decoder_hidden"], len([*c["decoder"].values()][-1]))
    policy.load_state_dict(c["policy"])
    decoder.load_state_dict(c["decoder"])
    agent = torch.nn.Sequential(policy, decoder).to(device)
    return lambda obs: agent(obs) / a["temperature"]


def film_agent(agent, env, names, seed, device, num_frames=300):
    """Four games of an agent side by side, as images; names are the actions'."""
    generator, steps, last, film = torch.Generator(device).manual_seed(seed), [], {}, []

    def policy(obs, episode):
        logits = agent(obs)
        action = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)
        steps.append(dict(zip(episode.tolist(), zip(obs.cpu().numpy(), action.tolist()))))
        return F.one_hot(action, logits.shape[1]).log()  # which evaluate() can only take as it is

    returns = evaluate(policy, env, 4, generator, SimpleNamespace(leave_if_stopped=lambda: None))
    for step in [*steps, {}][:num_frames]:
        last |= step
        games = [draw(*last[e], names, None if e in step else returns[e]) for e in range(4)]
        film.append(Image.fromarray(np.concatenate(games, axis=1)))
    return film


def draw(obs, action, names, final=None):
    """A frame (64, 64, 3), enlarged, with the action taken; once the game is over: dark, with its return."""
    image = Image.fromarray(obs if final is None else obs // 2).resize((192, 192), Image.NEAREST)
    pen, font = ImageDraw.Draw(image), findfont("DejaVu Sans:bold")  # it has arrows
    if final is None:
        pen.ellipse((4, 4, 40, 40), fill="white", outline="black")
        sign = "↙←↖↓•↑↘→↗DAWSQE"[action] if names is ACTIONS else f"{action}"
        font = ImageFont.truetype(font, 28)
        pen.text((22, 22), sign, fill="black", anchor="mm", font=font)
    else:
        style = {"fill": "white", "stroke_width": 3, "stroke_fill": "black"}
        pen.text((96, 96), f"{final:g}", anchor="mm", font=ImageFont.truetype(font, 40), **style)
    return np.pad(np.asarray(image), ((0, 0), (2, 2), (0, 0)), constant_values=255)


def to_pixels(x):
    """Images (..., 3, 64, 64) float in [-0.5, 0.5] -> (..., 64, 64, 3) uint8."""
    return ((x.clamp(-0.5, 0.5) + 0.5) * 255).round().byte().movedim(-3, -1).cpu().numpy()


def to_png(fig):
    buffer = io.BytesIO()
    fig.savefig(buffer, dpi=100, format="png", bbox_inches="tight")
    plt.close(fig)
    return buffer.getvalue()


def to_gif(images, milliseconds):
    images, buffer = [image.quantize(128, dither=Image.Dither.NONE) for image in images], io.BytesIO()
    images[0].save(buffer, "gif", save_all=True, append_images=images[1:], duration=milliseconds, loop=0)
    return buffer.getvalue()


def plot_grid(pictures, rows, columns, together, inches):
    """Pictures (R, C, 64, 64, 3) uint8 in a grid with names, `together` rows close to each other."""
    R, C = pictures.shape[:2]
    tiles = np.pad(pictures, [(0, 0), (0, 0), (2, 2), (2, 2), (0, 0)], constant_values=255)
    tiles = tiles.transpose(0, 2, 1, 3, 4).reshape(-1, 68 * together, 68 * C, 3)
    tiles = np.pad(tiles, [(0, 0), (0, 10), (0, 0), (0, 0)], constant_values=255).reshape(-1, 68 * C, 3)
    fig, ax = plt.subplots(figsize=(1.2 + inches * C, 0.8 + inches * len(tiles) / 68), layout="constrained")
    ax.imshow(tiles, interpolation="nearest")
    ax.set_xticks(68 * np.arange(C) + 34, columns)
    ax.set_yticks([68 * r + 10 * (r // together) + 34 for r in range(R)], rows)
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return fig


def plot_points(ax, z, kind, names, colors, markers):
    """Latents z (n, latent_dim) on their two principal components, by kind (n,); returns them (n, 2)."""
    z = np.pad(z, ((0, 0), (0, 1)))  # a column of zeros: the latent may have one dimension only
    with np.errstate(invalid="ignore"):  # latents that are all the same have no variance
        pca = PCA(2, random_state=0).fit(z)
    xy, share = pca.transform(z), np.nan_to_num(pca.explained_variance_ratio_)
    for k in np.argsort(-np.bincount(kind), kind="stable"):  # rare ones on top
        if (mine := kind == k).any():
            color, marker = colors[k % len(colors)], markers[k % len(markers)]
            label = f"{names[k]} ({mine.mean():.1%})"
            ax.scatter(*xy[mine].T, s=20, color=color, marker=marker, alpha=0.6, linewidths=0, label=label)
    (left, down), (right, up) = np.percentile(xy, [0.2, 99.8], axis=0) + [[-1e-6], [1e-6]]
    ax.set(xlim=(left, right), ylim=(down, up))
    ax.set_xlabel(f"1st principal component ({share[0]:.0%} of the variance)")
    ax.set_ylabel(f"2nd principal component ({share[1]:.0%})")
    ax.legend(fontsize=9, markerscale=1.5, ncol=3, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    return xy


def plot_by_action(ax, z, actions, names):
    """Latents in 2-D by true action (n,); of Procgen's the moves: colour horizontal, marker vertical."""
    actions = np.full(len(z), -1) if actions is None else actions
    if names is ACTIONS:
        kind, names = (
            np.where(actions < 9, actions, STAY),
            [x + " or a button" * (x == "stay") for x in MOVES],
        )
        colors, markers = np.repeat(["#D55E00", "#999999", "#0072B2"], 3), "vo^" * 3
    else:
        kind, colors, markers = actions, np.resize(COLORS, len(names)), np.resize([*MARKERS], len(names))
    kind, names = np.where(actions < 0, len(names), kind), [*names, "no label"]
    plot_points(ax, z, kind, names, [*colors, "#BBBBBB"], [*markers, "."])
    ax.set_title("by true action")


def plot_latents(z, group, names, actions, called):
    """Latents (n, latent_dim) in 2-D, by true action, called so, and by group (n,)."""
    fig, axes = plt.subplots(1, 2, figsize=(13, 6.5), layout="constrained")
    plot_by_action(axes[0], z, actions, called)
    xy = plot_points(axes[1], z, group, names, COLORS, MARKERS)
    for g, color in zip(range(len(names)), np.resize(COLORS, len(names))):
        box = {"boxstyle": "round,pad=0.2", "fc": "white", "ec": color, "lw": 2}
        axes[1].annotate(str(g), np.median(xy[group == g], axis=0), ha="center", va="center", bbox=box)
    axes[1].set_title("by group")
    return fig


def plot_table(table, lifts, names, called):
    """Windows of groups and actions (G, A), their lifts as colours, each row's highest framed; totals."""
    fig, ax = plt.subplots(figsize=(13, 1.6 + 0.5 * len(table)), layout="constrained")
    colors = np.log2(np.vstack([lifts, np.ones(len(called))]))
    image = ax.imshow(colors, cmap="PuOr_r", vmin=-2, vmax=2, aspect="auto")
    for (g, a), count in np.ndenumerate(np.vstack([table, table.sum(0)])):
        color = "white" if abs(colors[g, a]) > 1.3 else "black"
        ax.text(a, g, f"{count:,}", ha="center", va="center", fontsize=9, color=color)
    for g, a in enumerate(lifts.argmax(1)):
        ax.add_patch(plt.Rectangle((a - 0.47, g - 0.45), 0.94, 0.9, fill=False, ec="black", lw=2))
    ax.axhline(len(table) - 0.5, color="black", lw=1)
    ax.set_xticks(range(len(called)), called, rotation=30, ha="right")
    ax.set_yticks(range(len(table) + 1), [*names, "all windows"])
    ax.set_title("Test windows by group and true action")
    fig.colorbar(image, ax=ax, extend="both", ticks=range(-2, 3), pad=0.01, label="log2 of the lift")
    return fig


def plot_codebooks(usage, perplexity):
    """Shares of the codes of each codebook (N, K), most used first."""
    fig, ax = plt.subplots(figsize=(9, 4.5), layout="constrained")
    for n, share in enumerate(usage):
        label = f"codebook {n}: {(share > 0).sum()} codes used, perplexity {perplexity[n]:.1f}"
        ax.plot(np.sort(share)[::-1], MARKERS[n % 10] + "-", ms=4, color=COLORS[n % 8], label=label)
    ax.axhline(1 / len(share), color="#333333", ls="--", label=f"all alike (1/{len(share)})")
    ax.set(xlabel="code, most used first", ylabel="share of windows × slots", ylim=(0, None))
    ax.legend()
    return fig


def plot_errors(curves):
    """Errors {name: (W, T)} against the number of steps, with the 95% confidence interval of the mean."""
    fig, ax = plt.subplots(figsize=(9, 5.5), layout="constrained")
    for (name, mse), color, style in zip(curves.items(), COLORS, ("o-", "s--", "^:")):
        steps, mean = np.arange(1, mse.shape[1] + 1), mse.mean(0)
        half = 1.96 * mse.std(0, ddof=1) / np.sqrt(len(mse))
        ax.plot(steps, mean, style, color=color, label=name)
        ax.fill_between(steps, mean - half, mean + half, color=color, alpha=0.25, linewidth=0)
    ax.set(xlabel="steps predicted, each from the predictions before it", ylim=(0, None))
    ax.set_ylabel("mean squared error per pixel and channel (black 0, white 1)")
    ax.legend()
    return fig


def to_html(table):
    """The rows of an HTML table, of rows of cells."""
    return "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in table)


def section(name, folder, pictures=None, **values):
    """A section of lapo_inspect.html with values and pictures {file: bytes}, which also go to the folder."""
    images = ""
    for file, picture in (pictures or {}).items():
        (folder / file).write_bytes(picture)
        data = base64.b64encode(picture).decode()
        images += f'<img alt="{file}" src="data:image/{file[-3:]};base64,{data}">\n'
    return Template(SECTIONS[name]).substitute(values, pictures=images)


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    if min(args.num_groups, args.rollout_steps, args.num_starts, args.eval_windows - 1) < 1:
        sys.exit("error: --num-groups, --rollout-steps and --num-starts start at 1, --eval-windows at 2")
    began, T, rng = time.time(), args.rollout_steps, np.random.default_rng(0)
    folder = Path(args.runs_dir) / f"{args.env_id}__{args.exp_name}__{args.seed}"
    if (folder / "results.json").exists() and not args.overwrite:
        sys.exit(f"error: {folder} holds a finished report: add --overwrite, or choose another --exp-name")
    path = f"{args.runs_dir}/{args.env_id}__lapo_pretrain__{args.seed}/checkpoint.pt"
    path = args.pretrain_checkpoint or path
    pretrained = load_checkpoint(path, "lapo_pretrain", ["idm", "vq", "fdm"], args)
    data, frames, windows = load_dataset(args)
    device = (torch.accelerator.current_accelerator(True) if args.cuda else None) or torch.device("cpu")
    agents = {stage: load_agent(stage, args, device) for stage in ("lapo_decode", "lapo_finetune_ppo")}
    idm, vq, fdm = build_networks(pretrained["args"], device, pretrained)
    if args.action_updates and not load_labels(frames, windows):
        sys.exit(
            "error: --action-updates needs true actions, and this dataset has no actions.npy: leave it out"
        )
    folder.mkdir(parents=True, exist_ok=True)

    # 1. latents and their groups
    t = {split: np.sort(rng.permutation(windows[split])[: args.eval_windows]) for split in windows}
    labels, actions = load_labels(frames, t), action_names(data)
    encoded = {split: encode(idm, vq, frames[split], t[split], device) for split in t}
    _, latents, codes = encoded["test"]
    group, chosen = group_latents(latents, args.num_groups, args.seed)
    n, G, sizes = len(latents), len(chosen), np.bincount(group)
    names = [f"group {g}" for g in range(G)]
    picture = {"latents.png": to_png(plot_latents(latents, group, names, labels.get("test"), actions))}
    what = "quantised latent actions" if vq else "continuous latent actions (trained with --no-vq)"
    report = [section("latents", folder, picture, what=what, windows=n)]
    results = {"windows": n, "latent_space": None, "codes_used": None}
    results["groups"] = {"windows": sizes.tolist(), "nearest_window": t["test"][chosen].tolist()}

    # 2. groups and true actions
    called = [""] * G
    if labels:
        table, known = np.zeros((G, len(actions)), dtype=int), labels["test"] >= 0
        np.add.at(table, (group[known], labels["test"][known]), 1)
        totals, lifts = table.sum(0), lift(table, table.sum(0))
        matched, best = lifts.argmax(1), lifts.max(1)
        shuffled = [
            lift(rng.multivariate_hypergeometric(totals, size, size=1000), totals) for size in table.sum(1)
        ]
        chance = [np.quantile(lifts.max(1), 0.95) for lifts in shuffled]
        called = [actions[a] + "?" * int(best[g] <= chance[g]) for g, a in enumerate(matched)]
        names_and_lifts = zip(names, sizes / n, called, best, chance)
        rows = [f"{name} ({s:.0%}): {a} {b:.2f}, by chance {c:.2f}" for name, s, a, b, c in names_and_lifts]
        picture = {"groups.png": to_png(plot_table(table, lifts, rows, actions))}
        report.append(section("groups", folder, picture))
        results["groups"] |= {"actions": table.tolist(), "lift": lifts.tolist(), "shuffled_lift": chance}
        results["groups"]["matched_action"] = matched.tolist()

    # 3. codebooks
    if vq:
        used = np.stack([np.bincount(codes[:, i].ravel(), minlength=vq.K) for i in range(vq.N)])  # (N, K)
        usage, joint = used / used.sum(1, keepdims=True), np.unique(codes, axis=0, return_counts=True)[1]
        perplexity = np.exp(-(usage * np.log(usage + 1e-10)).sum(1))
        picture = {"codebooks.png": to_png(plot_codebooks(usage, perplexity))}
        values = {"num_codes": vq.K, "slots": vq.H, "joint": len(joint), "most": f"{joint.max() / n:.1%}"}
        report.append(section("codebooks", folder, picture, windows=n, **values))
        results |= {"codes_used": (used > 0).sum(1).tolist(), "perplexity": perplexity.tolist()}
        results["joint_codes"] = len(joint)

    # 4. what latents tell of the true action, beside two controls
    if labels:
        untrained = build_networks(pretrained["args"], device)[:2]
        untrained = {split: encode(*untrained, frames[split], t[split], device) for split in t}
        shuffled = {split: np.random.default_rng(0).permutation(labels[split]) for split in labels}
        of = {"trained": (encoded, labels), "untrained_idm": (untrained, labels)}
        of["shuffled_actions"] = encoded, shuffled
        space = {name: latent_space_metrics(*both) for name, both in of.items()}
        table = [["", *space], *([m, *(f"{space[name][m]:.3f}" for name in space)] for m in space["trained"])]
        table, chance = to_html(table), 1 / len(np.unique(labels["test"][labels["test"] >= 0]))
        report.append(section("latent_space", folder, table=table, windows=n, chance=f"{chance:.3f}"))
        results["latent_space"] = space | {"chance": chance, "windows": n}

    # 5. every group's latent held in the FDM, and its matched action in the game, where there is one
    levels, S, tried, states = (data["num_levels"], data["start_level"]), args.num_starts, n, None
    if data.get("demonstrator"):
        env, tried = make_env(args.env_id, max(16, G, S), *levels, args.seed), max(16, G, S)
        states, *start = find_starts(env, labels.get("test", np.arange(env.num_actions)), S, T, rng)
    else:  # test windows in which much changes, spread over the upper quarter
        pairs = frames["test"][t["test"][:, None] + [-1, 0]].astype(np.int16)  # (n, 2, 64, 64, 3)
        lively = np.argsort(-np.abs(pairs[:, 1] - pairs[:, 0]).mean((1, 2, 3)), kind="stable")
        start = pairs[lively[:: max(1, n // (4 * S))][:S]].astype(np.uint8).swapaxes(0, 1)
    S = len(start[0])
    start = [torch.from_numpy(obs).to(device).movedim(-1, 1) / 255 - 0.5 for obs in start]
    start = [frame.repeat_interleave(G, 0) for frame in start]  # o_{t-1}, o_t (S * G, 3, 64, 64)
    z = torch.from_numpy(latents[chosen]).to(device).repeat(S, 1)  # (S * G, latent_dim)
    dreams = torch.cat([start[1][:, None], rollout(fdm, *start, z[:, None].expand(-1, T, -1))], dim=1)
    kinds = {"dream": to_pixels(dreams).reshape(-1, G, T + 1, 64, 64, 3)}
    if labels and states:
        kinds["game"] = np.stack([hold(env, state, matched, T)[0][:G] for state in states])
    if states:
        env.close()
    grid = np.stack([*kinds.values()], axis=1)  # (S, dream and game, G, T + 1, 64, 64, 3)
    film, rows = [], [f"start {s + 1}\n{kind}" for s in range(S) for kind in kinds]
    for step in range(T + 1):
        columns = [f"{name}\n{action}" for name, action in zip(names, called)]
        fig = plot_grid(grid[:, :, :, step].reshape(-1, G, 64, 64, 3), rows, columns, len(kinds), 1.36)
        fig.supxlabel(f"step {step}")
        film.append(Image.open(io.BytesIO(to_png(fig))).convert("RGB"))
    shown = sorted({0, T, *(2**i for i in range(T.bit_length()))})
    strip = grid[:, :, :, shown].swapaxes(0, 2).reshape(G * len(kinds), -1, 64, 64, 3)
    rows = [name if kind == "dream" else action for name, action in zip(names, called) for kind in kinds]
    columns = [f"start {s + 1}\nstep {step}" for s in range(S) for step in shown]
    strip = to_png(plot_grid(strip, rows, columns, len(kinds), 0.68))
    pictures = {"rollouts.gif": to_gif(film, [1000] + [200] * (T - 1) + [1500]), "rollouts.png": strip}
    report.append(section("rollouts", folder, pictures, tried=tried))

    # 6. prediction error against the rollout's length
    curves = rollout_errors(idm, vq, fdm, frames["test"], windows["test"], T, device)
    results["rollout_mse"] = {name: errors.mean(0).tolist() for name, errors in curves.items()}
    if curves:
        picture = {"error.png": to_png(plot_errors(curves))}
        report.append(section("error", folder, picture, stretches=len(curves["copying the first frame"])))

    # 7. what latents are worth to the FDM, and true actions to one that is trained on them
    episode = np.cumsum(frames["test"].labels("first"))[t["test"]]
    value = {"the latent": worth(fdm, frames["test"], t["test"], latents, episode, device)}
    if args.action_updates:
        a, known, onehot = load_labels(frames, windows)["train"], labels["test"] >= 0, np.eye(len(actions))
        onehot = onehot.astype(np.float32)
        data_of_actions = frames["train"], windows["train"][a >= 0], onehot[a[a >= 0]]
        of_actions = fit_fdm(pretrained["args"], *data_of_actions, args.action_updates, device)
        test = t["test"][known], onehot[labels["test"][known]], episode[known]
        value["the true action"] = worth(of_actions, frames["test"], *test, device)
    table = [["given", "loss", "any other window's", "another's of its episode"]]
    for name, v in value.items():
        table.append([name, f"{v['loss']:.2e}", f"{v['any_window']:+.1%}", f"{v['same_episode']:+.1%}"])
    z = encoded["test"][0]
    value |= {"variance_between_episodes": variance_between(z, episode)}
    value |= {"by_chance": variance_between(rng.permutation(z), episode)}
    shares = {name: f"{value[name]:.0%}" for name in ("variance_between_episodes", "by_chance")}
    report.append(section("worth", folder, table=to_html(table), updates=args.action_updates, **shares))
    results["worth"] = value

    # 8. the agents play
    for stage, agent in agents.items():
        if agent and states:
            env = make_env(args.env_id, 4, *levels, args.seed + 1000)
            film = to_gif(film_agent(agent, env, actions, args.seed, device), 1000 // 15)
            report.append(section("agent", folder, {f"{stage}.gif": film}, stage=stage))

    there = {"groups": labels, "codebooks": vq, "latent_space": labels, "error": curves, **agents}
    missing = [name for name, found in there.items() if not found]
    here, command = Path(__file__).resolve().parent, "python " + shlex.join(sys.argv)
    commit = subprocess.getoutput(f"git -C '{here}' describe --always --dirty 2>/dev/null")
    results |= {"stage": "lapo_inspect", "env_id": args.env_id, "args": vars(args), "missing": missing}
    results |= {"command": command, "commit": commit, "wall_seconds": round(time.time() - began, 1)}
    head = Template(PAGE[0]).substitute(
        results | {"missing": ", ".join(missing) or "nothing"}, checkpoint=path
    )
    write_whole(folder / "report.html", head + "".join(report))
    write_whole(folder / "results.json", json.dumps(results, indent=2))
    print(f"wrote {folder}/report.html, which opens in a browser")
