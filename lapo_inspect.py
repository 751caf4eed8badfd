# /// script
# requires-python = ">=3.10,<3.13"
# dependencies = ["torch==2.13.0", "procgen-mirror==0.10.7", "gym==0.26.2", "numpy<2", "tyro", "pillow", "scikit-learn>=1.7", "matplotlib"]
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
import contextlib
import fcntl
import html
import io
import json
import os
import platform
import shlex
import subprocess
import sys
import time
import zipfile
from dataclasses import asdict, dataclass
from importlib.metadata import packages_distributions, version
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from matplotlib.colors import LogNorm
from PIL import Image, ImageDraw, ImageFont
from procgen import ProcgenGym3Env
from procgen.env import ENV_NAMES
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FORMAT_VERSION = 1  # of checkpoints and datasets
# numbers in checkpoints that networks are built from
SIZES = {"scale", "idm_scale", "policy_scale", "vq_num_codebooks", "vq_num_slots", "vq_dim"}
LOCKS = []  # open files, locked as long as this process lives
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
    bf16: bool = True
    """run the networks' forward pass in bfloat16 (faster where the processor knows it; parameters and VQ stay float32)"""
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


class ResidualBlock(nn.Module):
    """ReLU, 3x3 convolution, ReLU, 3x3 convolution, plus the input. (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels, hidden):
        super().__init__()
        self.conv0 = nn.Conv2d(channels, hidden, kernel_size=3, padding=1)
        self.conv1 = nn.Conv2d(hidden, channels, kernel_size=3, padding=1)

    def forward(self, x):
        # in place where nobody needs the old values: fewer passes over memory
        return self.conv1(torch.relu_(self.conv0(torch.relu(x)))).add_(x)


class ImpalaCNN(nn.Module):
    """IMPALA-CNN (Espeholt et al. 2018, figure 3 right), (B, C, 64, 64) -> (B, 256), with 16, 32, 32 channels times `scale`."""

    def __init__(self, in_channels, scale):
        super().__init__()
        layers = []
        for channels in (int(16 * scale), int(32 * scale), int(32 * scale)):
            layers += [
                nn.Conv2d(in_channels, channels, kernel_size=3, padding=1),
                nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
                ResidualBlock(channels, channels),
                ResidualBlock(channels, channels),
            ]
            in_channels = channels
        self.conv = nn.Sequential(*layers, nn.Flatten(), nn.ReLU())  # (B, 32 * scale * 8 * 8)
        self.fc = nn.Linear(int(32 * scale) * 8 * 8, 256)

    def forward(self, x):
        return torch.relu(self.fc(self.conv(x)))


class IDM(nn.Module):
    """Inverse dynamics model: frames o_{t-1}, o_t, o_{t+1} stacked on channels (B, 9, 64, 64) -> continuous latent (B, latent_dim)."""

    def __init__(self, scale, latent_dim):
        super().__init__()
        self.network = ImpalaCNN(9, scale)
        self.head = nn.Linear(256, latent_dim)

    def forward(self, x):
        return self.head(self.network(x)).float()


class VQ(nn.Module):
    """Vector quantisation with EMA codebooks (van den Oord et al. 2017, appendix A.1): N codebooks of K codes, each shared by H slots.

    Takes latents (B, N*H*D) and returns (straight-through quantised latents (B, N*H*D), commitment loss, code indices (B, N, H),
    perplexity of each codebook (N,)). The latent is laid out as (N*D, H): slot h of codebook n is column h of rows n*D .. n*D+D-1.
    The codebooks move in training mode only, and not by gradients. Computes in float32.
    """

    def __init__(self, num_codebooks, num_slots, dim, num_codes, commitment, decay, eps=1e-5):
        super().__init__()
        self.N, self.H, self.D, self.K = num_codebooks, num_slots, dim, num_codes
        self.commitment, self.decay, self.eps = commitment, decay, eps
        codes = (torch.rand(num_codebooks, num_codes, dim) * 2 - 1) * 5 / num_codes
        self.register_buffer("codes", codes)  # (N, K, D)
        self.register_buffer("ema_count", torch.ones(num_codebooks, num_codes))
        self.register_buffer("ema_sum", codes.clone())

    def forward(self, z):
        z = z.float()
        x = z.view(-1, self.N, self.D, self.H).permute(1, 0, 3, 2).flatten(1, 2)  # (N, B*H, D)
        distance = x.pow(2).sum(-1, keepdim=True) - 2 * x @ self.codes.mT + self.codes.pow(2).sum(-1).unsqueeze(1)  # (N, B*H, K)
        index = distance.argmin(-1)  # (N, B*H)
        quantised = self.codes.gather(1, index.unsqueeze(-1).expand(-1, -1, self.D))  # (N, B*H, D)
        onehot = F.one_hot(index, self.K).float()  # (N, B*H, K)
        if self.training:
            with torch.no_grad():
                self.ema_count.lerp_(onehot.sum(1), 1 - self.decay)
                self.ema_sum.lerp_(onehot.mT @ x, 1 - self.decay)
                total = self.ema_count.sum(-1, keepdim=True)
                count = (self.ema_count + self.eps) / (total + self.K * self.eps) * total  # Laplace smoothing
                self.codes.copy_(self.ema_sum / count.unsqueeze(-1))
        usage = onehot.mean(1)
        perplexity = torch.exp(-(usage * (usage + 1e-10).log()).sum(-1))
        quantised = quantised.view(self.N, -1, self.H, self.D).permute(1, 0, 3, 2).reshape(z.shape)
        loss = self.commitment * F.mse_loss(z, quantised)
        return z + (quantised - z).detach(), loss, index.view(self.N, -1, self.H).transpose(0, 1), perplexity


class FDM(nn.Module):
    """Forward dynamics model, a U-Net: frames (B, 6, 64, 64) o_{t-1}, o_t and latents (B, latent_dim) -> o^_{t+1} (B, 3, 64, 64)."""

    def __init__(self, latent_dim, width, predict_change=False):
        super().__init__()
        b, self.predict_change = width, predict_change
        down, up = [b, 2 * b, 4 * b, 8 * b, 16 * b], [16 * b, 8 * b, 4 * b, 2 * b, b, b]
        self.down_convs = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1) for i, o in zip([6 + latent_dim] + down[:-1], down))
        self.down_blocks = nn.ModuleList(nn.Sequential(nn.BatchNorm2d(o), ResidualBlock(o, o // 2), nn.MaxPool2d(2), nn.ReLU()) for o in down)
        self.bottleneck = nn.Conv2d(16 * b, 32 * b, kernel_size=2)  # 2x2 -> 1x1
        up_inputs = [32 * b + latent_dim] + [2 * w for w in down[::-1]]
        self.up_blocks = nn.ModuleList(
            nn.Sequential(nn.ConvTranspose2d(i, o, kernel_size=2, stride=2), nn.BatchNorm2d(o), ResidualBlock(o, o // 2), nn.ReLU())
            for i, o in zip(up_inputs, up)
        )
        self.head = nn.Sequential(nn.Conv2d(b + 6, b, 3, padding=1), ResidualBlock(b, b // 2), nn.ReLU(), nn.Conv2d(b, 3, 1))
        if predict_change:
            nn.init.zeros_(self.head[-1].weight)
            nn.init.zeros_(self.head[-1].bias)

    def first_conv(self, frames, z):
        """down_convs[0] on frames with z broadcast over the image as further channels: the same numbers, without the image of z.

        A convolution of a constant map has nine distinct values (corners, edges, inside), so z is convolved on a 3x3 map and stretched.
        """
        conv, n = self.down_convs[0], frames.shape[-1] - 2
        m = F.conv2d(z[:, :, None, None].expand(-1, -1, 3, 3), conv.weight[:, 6:], conv.bias, padding=1)  # (B, b, 3, 3)
        m = torch.cat([m[..., :1], m[..., 1:2].expand(-1, -1, -1, n), m[..., 2:]], dim=3)
        m = torch.cat([m[:, :, :1], m[:, :, 1:2].expand(-1, -1, n, -1), m[:, :, 2:]], dim=2)  # (B, b, 64, 64)
        return F.conv2d(frames, conv.weight[:, :6], padding=1) + m

    def forward(self, frames, z):
        skips = []
        x = self.down_blocks[0](self.first_conv(frames, z))
        for conv, block in zip(self.down_convs[1:], self.down_blocks[1:]):
            skips.append(x)
            x = block(conv(x))
        skips.append(x)
        skips.append(z[:, :, None, None].to(x.dtype))
        x = torch.relu(self.bottleneck(x))
        for block in self.up_blocks:
            x = block(torch.cat([x, skips.pop()], dim=1))
        x = self.head(torch.cat([x, frames.to(x.dtype)], dim=1)).float()
        return frames[:, 3:] + x if self.predict_change else torch.tanh(x) / 2


def require(args, **minimum):
    """Refuses, in one sentence, a flag below its minimum."""
    for name, least in minimum.items():
        if (value := getattr(args, name)) is not None and value < least:
            sys.exit(f"error: --{name.replace('_', '-')} is {value}, expected at least {least}")


def same_place(args, *names):
    """The flags among `names` that are not at their defaults, for a command about what lies at the same place."""
    return "".join(f" --{n.replace('_', '-')} {shlex.quote(str(getattr(args, n)))}" for n in names if getattr(args, n) != getattr(Args, n))


def read_tensors(path):
    """A file of save_checkpoint's. Runs no code from it and takes no more memory than it has bytes; raises some exception if it is something else."""
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
    if any(r.compress_type != zipfile.ZIP_STORED for r in records) or sum(r.file_size for r in records) > os.path.getsize(path):
        raise ValueError("its records are compressed or overlap")
    return torch.load(path, map_location="cpu", weights_only=True)


def first_line(found):
    """What to quote of an error, or of a value in a file, in a sentence."""
    try:
        return " ".join(str(found).split())[:200] or type(found).__name__
    except RecursionError:
        return type(found).__name__


def one_sentence(kind, error, traceback):
    """sys.excepthook: what goes wrong with files (a full disk, a read-only or deleted folder) ends in one sentence, not in a traceback."""
    if issubclass(kind, OSError):
        where = error.filename or "a file of this run"
        print(
            f"error: {where}: {error.strerror or error}; what was saved before is intact: mend that, then run it again, without --overwrite",
            file=sys.stderr,
        )
    else:
        sys.__excepthook__(kind, error, traceback)


def lock_folder(folder):
    """Makes a folder if need be and locks it until this process ends; refuses, in one sentence, what another process is writing to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")
    except OSError as e:
        sys.exit(f"error: the folder {folder} cannot be made or written to ({e.strerror}): choose another, see --runs-dir and --data-dir")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        sys.exit(f"error: another process is at work in {folder}: wait until it ends, or choose another folder (--exp-name, --seed, --data-dir)")
    LOCKS.append(lock)


def load_checkpoint(path, stage, env_id, made_by, parts=()):
    """Reads a checkpoint and refuses, in one sentence, what is not one of `stage` for `env_id`."""
    if not Path(path).is_file():
        sys.exit(f"error: no checkpoint at {path}: make it with `{made_by}`, or name another one")
    try:
        checkpoint = read_tensors(path)
        meta = checkpoint["meta"]
        if not isinstance(checkpoint, dict) or not isinstance(meta, dict):
            raise ValueError("it holds no dictionary")
    except Exception as e:
        sys.exit(f"error: {path} cannot be read as a checkpoint ({type(e).__name__}): make it again with `{made_by}`")
    for key, want in (("format_version", FORMAT_VERSION), ("stage", stage), ("env_id", env_id)):
        if repr(meta.get(key)) != repr(want):
            sys.exit(f"error: {path} has {key} {first_line(meta.get(key))}, expected {want}: make one with `{made_by}`")
    missing = [part for part in parts if part not in checkpoint] + ["args"] * ("args" not in meta)
    missing += [key for key in ("num_levels", "start_level") if type(meta.get(key)) is not int or not 0 <= meta[key] < 2**31]
    for part in ("args", "pretrain_args"):
        sizes = meta.get(part, {})
        if isinstance(sizes, dict):
            wrong = [key for key in SIZES & sizes.keys() if type(sizes[key]) not in (int, float) or not 0 < sizes[key] < 1e6]
            missing += [f"{part}.{key}" for key in sorted(wrong)]
        else:
            missing.append(part)
    if missing:
        sys.exit(f"error: {path} lacks or misstates {', '.join(missing)}: make it again with `{made_by}`")
    done, planned = meta.get("updates"), meta["args"].get("num_updates")
    if type(done) is type(planned) is int and done < planned:
        print(f"warning: {path} is of an unfinished run, after {done} of {planned} updates", file=sys.stderr)
    return checkpoint


def load_network(build, state, path, made_by):
    """build() with a checkpoint's weights; refuses, in one sentence, weights of other shapes or types, before any memory is taken for them."""
    try:
        with torch.device("meta"):
            network = build()
        dtypes = {name: tensor.dtype for name, tensor in network.state_dict().items()}  # float32, but for what batch normalisation counts
        network.load_state_dict(state, assign=True)
        for name, tensor in network.state_dict().items():
            if (tensor.dtype, tensor.layout, tensor.device.type) != (dtypes[name], torch.strided, "cpu"):
                raise ValueError(f"{name} is not a tensor of {dtypes[name]}")
    except Exception as e:
        sys.exit(f"error: the weights in {path} do not fit its arguments ({first_line(e)}): make it again with `{made_by}`")
    return network


def write_aside(path, write):
    """Writes a file next to its place, flushes it to disk, then renames it; what was at `path` stays if that fails."""
    tmp = Path(f"{path}.tmp")
    try:
        with open(tmp, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
        folder = os.open(tmp.parent, os.O_RDONLY)
        os.fsync(folder)  # the new name, too
        os.close(folder)
    except (OSError, RuntimeError) as e:  # torch.save turns a full disk into a RuntimeError
        with contextlib.suppress(OSError):
            tmp.unlink(missing_ok=True)
        why = getattr(e, "strerror", None) or first_line(e)
        sys.exit(f"error: {path} cannot be written ({why}); what was saved before is intact: make room there, then run it again, without --overwrite")


def load_meta(data_dir, env_id):
    """A dataset's meta.json; refuses, in one sentence, what is missing, of another game or of another format."""
    command = f"python collect_expert_data.py --env-id {env_id}" + f" --data-dir {data_dir}" * (str(data_dir) != f"data/{env_id}")
    try:
        meta = json.loads((Path(data_dir) / "meta.json").read_text())
    except OSError:
        sys.exit(f"error: no dataset at {data_dir} (meta.json is missing): make it with `{command}`, or name another with --data-dir")
    except (ValueError, RecursionError):
        sys.exit(f"error: {data_dir}/meta.json is not JSON: collect the dataset again with `{command} --overwrite`")
    if not isinstance(meta, dict):
        sys.exit(f"error: {data_dir}/meta.json holds no dictionary: collect the dataset again with `{command} --overwrite`")
    for key, want in (("format_version", FORMAT_VERSION), ("env_id", env_id)):
        if meta.get(key) != want:
            sys.exit(
                f"error: {data_dir} has {key} {first_line(meta.get(key))}, expected {want}: make it with `{command}`, or choose another --data-dir"
            )
    splits = meta.get("splits") if isinstance(meta.get("splits"), dict) else {}
    sizes = {split: splits[split].get("num_frames") if isinstance(splits.get(split), dict) else None for split in ("train", "test")}
    found = {key: meta.get(key) for key in ("num_levels", "start_level")} | {f"splits.{split}.num_frames": n for split, n in sizes.items()}
    wrong = [key for key, value in found.items() if type(value) is not int or not (3 if "frames" in key else 0) <= value < 2**40]
    wrong += [key for key in ("num_levels", "start_level") if key not in wrong and meta[key] >= 2**31]
    if wrong:
        sys.exit(f"error: {data_dir}/meta.json lacks or misstates {', '.join(wrong)}: collect the dataset again with `{command} --overwrite`")
    return meta


def load_array(data_dir, split, name, shape, dtype):
    """data_dir/split/name.npy memory-mapped; refuses, in one sentence, a missing, truncated or wrong-shaped file."""
    path = Path(data_dir) / split / f"{name}.npy"
    try:
        array = np.lib.format.open_memmap(path, mode="r")  # refuses pickles
    except Exception as e:  # NumPy's parser of headers lets many kinds through
        sys.exit(f"error: {path} is missing or damaged ({first_line(e)}): collect the dataset again with collect_expert_data.py --overwrite")
    size = array.offset + array.nbytes
    if array.shape != shape or array.dtype != dtype or not array.flags.c_contiguous or path.stat().st_size != size:
        found = f"{array.shape} {array.dtype}, expected {shape} {np.dtype(dtype)}, in C order and in {size} bytes"
        sys.exit(f"error: {path} holds {found}: collect the dataset again with collect_expert_data.py --overwrite")
    return array


def load_actions(data_dir, split, meta):
    """The true actions (N,) int8, memory-mapped, each one of 0 .. 14."""
    actions = load_array(data_dir, split, "actions", (meta["splits"][split]["num_frames"],), np.int8)
    if not 0 <= actions.min() <= actions.max() < 15:
        found = f"actions from {actions.min()} to {actions.max()}, expected 0 to 14"
        sys.exit(f"error: {data_dir}/{split}/actions.npy holds {found}: collect the dataset again with collect_expert_data.py --overwrite")
    return actions


def load_frames(data_dir, split, meta):
    """Frames (N, 64, 64, 3) uint8, memory-mapped, and the t of all windows (t-1, t, t+1) that lie within one episode."""
    n = meta["splits"][split]["num_frames"]
    frames = load_array(data_dir, split, "frames", (n, 64, 64, 3), np.uint8)
    first = load_array(data_dir, split, "first", (n,), bool)
    # o_t and o_{t+1} must both succeed the frame before them: a frame with first=True belongs to the new episode
    return frames, np.flatnonzero(~first[1:-1] & ~first[2:]) + 1


def get_windows(frames, t, device):
    """Windows around t (B,) -> (B, 9, 64, 64) float in [-0.5, 0.5], channels-last: o_{t-1}, o_t, o_{t+1} stacked on channels."""
    # frames t-1, t, t+1 lie side by side in the file, so a view that overlaps itself makes each window a single copy of 36 KB
    triples = np.lib.stride_tricks.as_strided(frames, (len(frames) - 2, 3, 64, 64, 3), (frames.strides[0], *frames.strides))
    window = torch.cat(torch.from_numpy(triples[t - 1]).to(device).unbind(1), dim=-1)  # (B, 64, 64, 9) uint8
    return torch.add(torch.tensor(-0.5, device=device), window.permute(0, 3, 1, 2), alpha=1 / 255)  # x / 255 - 0.5 in one pass


def make_env(env_id, num_envs, num_levels, start_level, seed):
    """Procgen, easy mode: act(actions), then observe() -> reward (E,), {"rgb": (E, 64, 64, 3) uint8}, first (E,)."""
    return ProcgenGym3Env(
        num=num_envs,
        env_name=env_id,
        distribution_mode="easy",
        num_levels=num_levels,
        start_level=start_level,
        rand_seed=seed,
        num_threads=min(4, os.cpu_count()),
    )


def get_env_state(env):
    """Snapshots of all games, a list of uint8 tensors."""
    return [torch.frombuffer(bytearray(game), dtype=torch.uint8) for game in env.callmethod("get_state")]


def set_env_state(env, state):
    env.callmethod("set_state", [game.numpy().tobytes() for game in state])


def num_latents(pretrain_args):
    """Dimensions of the latent, N x H x D."""
    return pretrain_args["vq_num_codebooks"] * pretrain_args["vq_num_slots"] * pretrain_args["vq_dim"]


def provenance(args, device):
    """What a result rests on, for results.json: arguments, command, git commit of this script's folder, device and versions."""
    name = platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif Path("/proc/cpuinfo").exists():
        name = next((line.split(": ")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), name)
    try:
        git = ["git", "-C", Path(__file__).resolve().parent, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    except OSError:  # no git here
        commit = None
    packages = {"torch": "torch", "numpy": "numpy", "procgen": packages_distributions()["procgen"][0]}  # a mirror, maybe
    versions = {"python": platform.python_version(), **{name: version(package) for name, package in packages.items()}}
    return {
        "device": str(device), "device_name": name, "threads": torch.get_num_threads(), "commit": commit, "versions": versions,
        "command": "python " + shlex.join(sys.argv), "args": asdict(args),
    }  # fmt: skip


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


def plot_latents(xy, share, group, actions):
    """Latents on their two principal components (n, 2): by true action (colour: horizontal move, marker: vertical move) and by code."""
    fig, axes = plt.subplots(1, 2, figsize=(13, 6.5), layout="constrained", sharex=True, sharey=True)
    lo, hi = np.percentile(xy, [0.2, 99.8], axis=0)
    margin = 0.03 * (hi - lo) + 1e-6
    if actions is None:
        axes[0].scatter(*xy.T, s=24, c="#999999", alpha=0.6, linewidths=0, label="no labels on disk (actions.npy)")
    else:
        move = np.where(actions < 9, actions, 4)  # buttons do not move
        for m in np.argsort(-np.bincount(move, minlength=9)):  # rare ones on top
            color, marker = ("#D55E00", "#999999", "#0072B2")[m // 3], "vo^"[m % 3]
            if (move == m).any():
                label = f"{ACTIONS[m]}{' or a button' if m == 4 and (actions > 8).any() else ''} ({(move == m).mean():.1%})"
                axes[0].scatter(*xy[move == m].T, s=24, c=color, marker=marker, alpha=0.6, linewidths=0, label=label)
    for g in range(group.max() + 1):
        style = {"c": COLORS[g % len(COLORS)], "marker": MARKERS[g % len(MARKERS)]}
        axes[1].scatter(*xy[group == g].T, s=14, alpha=0.6, linewidths=0, label=f"code {g} ({(group == g).mean():.0%})", **style)
    for g in range(group.max() + 1):
        box = {"boxstyle": "round,pad=0.2", "fc": "white", "ec": COLORS[g % len(COLORS)], "lw": 2}
        axes[1].annotate(str(g), np.median(xy[group == g], axis=0), ha="center", va="center", bbox=box)
    for ax, title in zip(axes, ("by true action", "by code (group of latents)")):
        ax.set(title=title, xlabel=f"1st principal component ({share[0]:.0%} of the variance)", ylabel=f"2nd principal component ({share[1]:.0%})")
        ax.set(xlim=(lo[0] - margin[0], hi[0] + margin[0]), ylim=(lo[1] - margin[1], hi[1] + margin[1]))
        ax.legend(fontsize=9, markerscale=1.5, ncol=4, loc="upper center", bbox_to_anchor=(0.5, -0.1))
    return fig


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


def contact_sheet(pictures, rows, columns, zoom, together):
    """Pictures (R, C, 64, 64, 3) uint8 in a grid, so many rows close together, with names on the left and above, as a PIL image."""
    font, side = ImageFont.load_default(13), 64 * zoom + 4
    left = 10 + int(max(font.getlength(line) for name in rows for line in name.split("\n")))
    top = 6 + 17 * max(name.count("\n") + 1 for name in columns)
    down = [top + side * r + 10 * (r // together) for r in range(len(rows))]
    sheet = Image.new("RGB", (left + side * len(columns), down[-1] + side), "white")
    draw = ImageDraw.Draw(sheet)
    for c, name in enumerate(columns):
        draw.multiline_text((left + side * (c + 0.5), top - 4), name, fill="black", font=font, anchor="md", align="center")
    for r, name in enumerate(rows):
        draw.multiline_text((4, down[r] + side / 2), name, fill="black", font=font, anchor="lm")
        for c in range(len(columns)):
            sheet.paste(Image.fromarray(pictures[r, c]).resize((64 * zoom, 64 * zoom), Image.NEAREST), (left + side * c, down[r]))
    return sheet


def to_pixels(x):
    """Images (..., 3, 64, 64) float in [-0.5, 0.5] -> (..., 64, 64, 3) uint8."""
    return ((x.clamp(-0.5, 0.5) + 0.5) * 255).round().byte().movedim(-3, -1).cpu().numpy()


def to_table(head, rows):
    """An HTML table of strings."""
    lines = ["".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row) for tag, row in [("th", head), *(("td", row) for row in rows)]]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    if args.env_id not in ENV_NAMES:
        sys.exit(f"error: --env-id {args.env_id} is not a Procgen game: choose one of {', '.join(ENV_NAMES)}")
    require(args, num_codes=1, eval_windows=2, rollout_steps=1, rollout_windows=2, num_starts=1, start_steps=1)
    data_dir = Path(args.data_dir or f"data/{args.env_id}")
    run_dir = Path(args.runs_dir) / f"{args.env_id}__{args.exp_name}__{args.seed}"
    if (run_dir / "results.json").exists() and not args.overwrite:
        sys.exit(f"error: {run_dir} already holds a finished run: add --overwrite to replace it, or choose another --exp-name or --seed")
    pretrain_path = Path(args.pretrain_checkpoint or Path(args.runs_dir) / f"{args.env_id}__lapo_pretrain__{args.seed}" / "checkpoint.pt")
    made_by = f"python lapo_pretrain.py --env-id {args.env_id}" + same_place(args, "data_dir", "runs_dir", "seed")
    pretrained = load_checkpoint(pretrain_path, "lapo_pretrain", args.env_id, made_by, ("idm", "vq", "fdm"))
    p = pretrained["meta"]["args"]
    vq_shape = ("vq_num_codebooks", "vq_num_slots", "vq_dim", "vq_num_codes", "vq_commitment", "vq_decay")
    idm = load_network(lambda: IDM(p["idm_scale"], num_latents(p)), pretrained["idm"], pretrain_path, made_by)
    vq = load_network(lambda: VQ(*(p[key] for key in vq_shape)), pretrained["vq"], pretrain_path, made_by) if p.get("vq", True) else None
    fdm = load_network(lambda: FDM(num_latents(p), p["fdm_width"], p["predict_change"]), pretrained["fdm"], pretrain_path, made_by)
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
