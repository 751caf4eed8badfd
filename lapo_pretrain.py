# /// script
# requires-python = ">=3.10,<3.13"
# dependencies = [
#   "torch==2.13.0", "numpy<2", "tyro", "tensorboard", "tqdm", "pillow", "scikit-learn>=1.7", "matplotlib",
# ]
# ///
"""LAPO, stage 2 of 5: learn latent actions from frames alone (paper section 4.1, figure 2).

    inverse dynamics model   z_t     = VQ(IDM(o_{t-1}, o_t, o_{t+1}))     sees the next frame, may pass on only z_t
    forward dynamics model   o^_{t+1} = FDM(o_{t-1}, o_t, z_t)            sees the past and z_t
    loss                     MSE(o^_{t+1}, o_{t+1}) + VQ commitment loss

z_t has to say what the past does not: what the demonstrator did. No action, reward or return is read for training. Where the
label files exist, a linear probe reports (on test windows, on detached latents) how well the true action can be read from the latent.

Reads data/ENV_ID (collect_expert_data.py), writes runs/ENV_ID__lapo_pretrain__SEED/checkpoint.pt.
    python lapo_pretrain.py --env-id bossfight
Next:
    python lapo_bc.py --env-id bossfight
"""

import contextlib
import copy
import fcntl
import hashlib
import json
import mmap
import os
import platform
import random
import shlex
import signal
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from dataclasses import asdict, dataclass
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.optim as optim
import tyro
from PIL import Image, ImageDraw, ImageFont
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.metrics import balanced_accuracy_score, normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix
from sklearn.neural_network import MLPClassifier
from sklearn.preprocessing import StandardScaler
from sklearn.utils.class_weight import compute_sample_weight
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FORMAT_VERSION = 2  # of checkpoints
DATA_FORMAT_VERSION = 1  # of datasets
NOT_COMPARED = {"resume", "overwrite", "verify", "track", "wandb_project_name", "wandb_entity", "checkpoint_seconds"}  # may change when a run goes on
LOCKS = []  # open files, locked as long as this process lives
# Procgen's actions 0-8 are 3 * (right + 1) + (up + 1); 9-14 are buttons
ACTIONS = ["left down", "left", "left up", "down", "stay", "up", "right down", "right", "right up", *(f"button {b}" for b in "DAWSQE")]
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333", "#F0E442"]  # Okabe and Ito
MARKERS = "osD^vP*X<>"  # of another length than COLORS: 40 different pairs


@dataclass
class Args:
    exp_name: str = os.path.basename(__file__)[: -len(".py")]
    """the name of this experiment; the run folder is RUNS_DIR/ENV_ID__EXP_NAME__SEED"""
    seed: int = 1
    """seed of the experiment"""
    torch_deterministic: bool = True
    """if toggled, `torch.backends.cudnn.deterministic=True`"""
    cuda: bool = True
    """if toggled, cuda (or another accelerator that torch knows) is used when there is one"""
    bf16: tyro.conf.DisallowNone[bool | None] = None
    """run the networks' forward pass in bfloat16 (parameters, VQ and loss stay float32); default: if that is faster on this machine"""
    track: bool = False
    """if toggled, this experiment is also tracked with Weights and Biases (`pip install wandb`)"""
    wandb_project_name: str = "lapo"
    """the wandb's project name"""
    wandb_entity: str | None = None
    """the entity (team) of wandb's project"""
    capture_video: bool = False
    """write a GIF of test frames (left) and their predictions (right) to the run folder"""
    runs_dir: str = "runs"
    """where run folders (TensorBoard logs, checkpoint.pt, results.json) are made"""
    overwrite: bool = False
    """replace a finished run of the same name"""
    resume: bool = False
    """go on with the unfinished run in the run folder, or say that there is none; one with the same arguments goes on by itself"""
    checkpoint_seconds: float = 60.0
    """seconds between checkpoints from which an interrupted run goes on"""

    env_id: str = "bossfight"
    """the Procgen game, one of the 16"""
    data_dir: str | None = None
    """the dataset of collect_expert_data.py; default data/ENV_ID"""
    verify: bool = False
    """check every file of the dataset against its checksum first (sizes and headers are always checked)"""

    num_updates: int = 50_000
    """gradient steps"""
    batch_size: int = 128
    """windows (o_{t-1}, o_t, o_{t+1}) per step"""
    learning_rate: float = 3e-4
    """Adam's peak learning rate: 0.1x to 1x over the warm-up, then linearly to 0.01x"""
    warmup_updates: int = 50
    """length of the warm-up"""
    max_grad_norm: float = 2.0
    """the maximum norm of the gradient"""

    idm_scale: float = 4.0
    """width of the IDM's IMPALA-CNN: 16, 32, 32 channels times this"""
    fdm_width: int = 24
    """base width of the FDM's U-Net"""
    patch_size: Literal[1, 2, 4] = 1
    """pixels a side of the patches that the networks fold into channels; 1: the paper's, 2: twice the speed for the same width"""
    predict_change: bool = False
    """the FDM predicts o_{t+1} - o_t, starting from zero, instead of o_{t+1} (not in the paper; saves learning to copy)"""
    vq: bool = True
    """quantise the latents (paper: yes; --no-vq is its ablation)"""
    vq_num_codebooks: int = 2
    """N, codebooks"""
    vq_num_slots: int = 4
    """H, code vectors that each codebook gives to a latent"""
    vq_dim: int = 16
    """D, dimensions of a code; the latent has N x H x D of them"""
    vq_num_codes: int = 64
    """K, codes per codebook"""
    vq_commitment: float = 0.05
    """weight of the VQ (commitment) loss"""
    vq_decay: float = 0.999
    """decay of the codebooks' moving averages"""

    eval_every: int = 1000
    """updates between evaluations on test windows: loss, probe, pictures (left out while they have taken over 2% of the time, but for the last)"""
    eval_windows: int = 2048
    """test windows in an evaluation; the probe is fitted on as many training windows"""


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
    """IMPALA-CNN (Espeholt et al. 2018, figure 3 right), (B, C, 64, 64) -> (B, 256), with 16, 32, 32 channels times `scale`.

    patch_size P (1 in the paper) folds patches of P x P pixels into channels first: (B, C * P^2, 64 / P, 64 / P).
    """

    def __init__(self, in_channels, scale, patch_size=1):
        super().__init__()
        layers = [nn.PixelUnshuffle(patch_size)] if patch_size > 1 else []
        in_channels *= patch_size**2
        for channels in (int(16 * scale), int(32 * scale), int(32 * scale)):
            layers += [
                nn.Conv2d(in_channels, channels, kernel_size=3, padding=1),
                nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
                ResidualBlock(channels, channels),
                ResidualBlock(channels, channels),
            ]
            in_channels = channels
        self.conv = nn.Sequential(*layers, nn.Flatten(), nn.ReLU())  # (B, 32 * scale * (8 / P)^2)
        self.fc = nn.Linear(int(32 * scale) * (8 // patch_size) ** 2, 256)

    def forward(self, x):
        return torch.relu(self.fc(self.conv(x)))


class IDM(nn.Module):
    """Inverse dynamics model: frames o_{t-1}, o_t, o_{t+1} stacked on channels (B, 9, 64, 64) -> continuous latent (B, latent_dim)."""

    def __init__(self, scale, latent_dim, patch_size=1):
        super().__init__()
        self.network = ImpalaCNN(9, scale, patch_size)
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
    """Forward dynamics model, a U-Net: frames (B, 6, 64, 64) o_{t-1}, o_t and latents (B, latent_dim) -> o^_{t+1} (B, 3, 64, 64).

    z is joined to the frames before the first layer, and once more at the bottleneck. patch_size P (1 in the paper) folds patches of
    P x P pixels into channels, C = 6 * P^2, at the first layer and unfolds them after the last, so that log2(P) down and up blocks fewer do.
    """

    def __init__(self, latent_dim, width, predict_change=False, patch_size=1):
        super().__init__()
        b, self.C, self.P, self.predict_change = width, 6 * patch_size**2, patch_size, predict_change
        down = [b, 2 * b, 4 * b, 8 * b, 16 * b][: 6 - patch_size.bit_length()]
        top, up = down[-1], [*down[::-1], b]
        self.down_convs = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1) for i, o in zip([self.C + latent_dim] + down[:-1], down))
        self.down_blocks = nn.ModuleList(nn.Sequential(nn.BatchNorm2d(o), ResidualBlock(o, o // 2), nn.MaxPool2d(2), nn.ReLU()) for o in down)
        self.bottleneck = nn.Conv2d(top, 2 * top, kernel_size=2)  # 2x2 -> 1x1
        up_inputs = [2 * top + latent_dim] + [2 * w for w in down[::-1]]
        self.up_blocks = nn.ModuleList(
            nn.Sequential(nn.ConvTranspose2d(i, o, kernel_size=2, stride=2), nn.BatchNorm2d(o), ResidualBlock(o, o // 2), nn.ReLU())
            for i, o in zip(up_inputs, up)
        )
        self.head = nn.Sequential(nn.Conv2d(b + self.C, b, 3, padding=1), ResidualBlock(b, b // 2), nn.ReLU(), nn.Conv2d(b, self.C // 2, 1))
        if predict_change:
            nn.init.zeros_(self.head[-1].weight)
            nn.init.zeros_(self.head[-1].bias)

    def first_conv(self, frames, z):
        """down_convs[0] on frames with z broadcast over the image as further channels: the same numbers, without the image of z.

        A convolution of a constant map has nine distinct values (corners, edges, inside), so z is convolved on a 3x3 map and stretched.
        """
        conv, n = self.down_convs[0], frames.shape[-1] - 2
        m = F.conv2d(z[:, :, None, None].expand(-1, -1, 3, 3), conv.weight[:, self.C :], conv.bias, padding=1)  # (B, b, 3, 3)
        m = torch.cat([m[..., :1], m[..., 1:2].expand(-1, -1, -1, n), m[..., 2:]], dim=3)
        m = torch.cat([m[:, :, :1], m[:, :, 1:2].expand(-1, -1, n, -1), m[:, :, 2:]], dim=2)  # (B, b, 64 / P, 64 / P)
        return F.conv2d(frames, conv.weight[:, : self.C], padding=1) + m

    def forward(self, frames, z):
        patches, skips = F.pixel_unshuffle(frames, self.P), []  # (B, C, 64 / P, 64 / P)
        x = self.down_blocks[0](self.first_conv(patches, z))
        for conv, block in zip(self.down_convs[1:], self.down_blocks[1:]):
            skips.append(x)
            x = block(conv(x))
        skips.append(x)
        skips.append(z[:, :, None, None].to(x.dtype))
        x = self.bottleneck(x)
        for block in self.up_blocks:
            x = block(torch.cat([x, skips.pop()], dim=1))
        x = F.pixel_shuffle(self.head(torch.cat([x, patches.to(x.dtype)], dim=1)).float(), self.P)
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


def start_run(run_dir, args, inputs):
    """The run folder, locked for this process: its log writer, and the state of an unfinished run with the same arguments or None.

    inputs, {flag: checksum}, is what the run starts from; its states must hold the same.
    """
    if args.resume and args.overwrite:
        sys.exit("error: --resume goes on with a run and --overwrite starts it afresh: give one of them")
    if args.track:
        try:
            import wandb
        except ImportError:
            sys.exit("error: --track needs wandb, which is not installed: `pip install wandb`, or leave --track out")
        wandb.init(project=args.wandb_project_name, entity=args.wandb_entity, sync_tensorboard=True, config=vars(args), name=run_dir.name)
    sys.excepthook = one_sentence
    # what stops the log writer's thread is raised again where something is logged
    threading.excepthook = lambda e: None if issubclass(e.exc_type, OSError) else threading.__excepthook__(e)
    lock_folder(run_dir)
    state, resume_path = None, run_dir / "resume.pt"
    if resume_path.exists() and not args.overwrite:
        mend = "add --overwrite to start afresh, or choose another --exp-name or --seed"
        try:
            state = read_tensors(resume_path)
            meta = state["meta"]
            if type(meta["format_version"]) is int and meta["format_version"] != FORMAT_VERSION:
                found = f"format_version {meta['format_version']}, expected {FORMAT_VERSION}"
                sys.exit(f"error: {resume_path} has {found}: finish the run with the version that began it, {mend}")
            dictionaries = isinstance(meta["args"], dict) and isinstance(meta.setdefault("inputs", inputs), dict)
            if not dictionaries or type(meta["wall_seconds"]) is not float or not 0 <= int(meta["step"]) < 2**62:
                raise ValueError("its description is damaged")
        except Exception as e:
            sys.exit(f"error: {resume_path} cannot be read ({first_line(e)}), so that the unfinished run in its folder cannot go on: {mend}")
        if args.bf16 is None:
            args.bf16 = meta["args"].get("bf16")
            print(f"going on in {'bfloat16' if args.bf16 else 'float32'}, as the run began (on another machine it may be the slower one)")
        now = {key: value for key, value in asdict(args).items() if key not in NOT_COMPARED}
        changed = [key for key, value in now.items() if repr(meta["args"].get(key)) != repr(value)]
        if changed:
            found = ", ".join(f"--{key.replace('_', '-')} {first_line(meta['args'].get(key))} (now {now[key]})" for key in changed)
            sys.exit(f"error: {run_dir} holds an unfinished run with other arguments, {found}: give the same to go on, {mend}")
        changed = [flag for flag in inputs if repr(meta["inputs"].get(flag)) != repr(inputs[flag])]
        if changed:
            sys.exit(f"error: {run_dir} holds an unfinished run, and the file of {' and '.join(changed)} has changed since it began: {mend}")
        print(f"going on with the unfinished run in {run_dir}")
    elif args.resume:
        sys.exit(f"error: --resume, but {run_dir} holds no unfinished run: leave --resume out to start one")
    if not state:
        replaced = [run_dir / "checkpoint.pt"] * args.overwrite
        for old in [*replaced, resume_path, run_dir / "results.json", *run_dir.glob("events.out.tfevents.*")]:
            old.unlink(missing_ok=True)
    writer = SummaryWriter(run_dir, purge_step=int(state["meta"]["step"]) + 1 if state else None)  # what was logged after the state does not count
    if not state:
        writer.add_text("hyperparameters", "|param|value|\n|-|-|\n" + "\n".join(f"|{k}|{v}|" for k, v in vars(args).items()))
    return writer, state


@contextlib.contextmanager
def refusing_damage(path):
    """Turns what goes wrong while a run's state is restored into one sentence."""
    try:
        yield
    except Exception as e:
        sys.exit(f"error: {path} is damaged, so that the unfinished run in its folder cannot go on ({first_line(e)}): start afresh with --overwrite")


def this_command():
    """The command that goes on with this run."""
    return "python " + shlex.join(arg for arg in sys.argv if arg != "--overwrite")


class Checkpointer:
    """Says when to save: every `seconds`, and once SIGINT or SIGTERM has come (which a second time ends the process as usual)."""

    def __init__(self, seconds):
        self.seconds, self.last, self.stop = seconds, time.time(), 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.request)

    def request(self, number, _):
        self.stop = number
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    def due(self):
        return self.stop > 0 or time.time() - self.last >= self.seconds

    def saved(self, run_dir):
        """To be called after saving; ends the process if that was asked for."""
        self.last = time.time()
        if self.stop:
            print(f"\nstopped and saved in {run_dir}; go on with: {this_command()}")
            sys.exit(128 + self.stop)  # 130 or 143, as shells expect: a pipeline stops here


def choose_precision(args, device, work):
    """The autocast of this run, in bfloat16 or float32: as --bf16 or --no-bf16 says, else whichever is faster here. Notes it in args.bf16.

    On a CPU work(autocast), a step of this script's own network on a few samples, is timed in both; that takes less than 3 s.
    """
    autocasts = [torch.autocast(device.type, torch.bfloat16, enabled=enabled) for enabled in (False, True)]

    def seconds(function, *inputs):
        times, end = [], time.perf_counter() + 0.4
        while len(times) < 2 or time.perf_counter() < end:
            start = time.perf_counter()
            function(*inputs)
            times.append(time.perf_counter() - start)
        return min(times[1:])  # the first one warms up

    if args.bf16 is None and device.type != "cpu":
        args.bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    elif args.bf16 is None:
        x = torch.ones(256, 256)
        ratio = seconds(torch.mm, x, x) / seconds(torch.mm, x.bfloat16(), x.bfloat16())
        if ratio > 0.2:  # without bfloat16 instructions it is a hundredth: the script's own step would take minutes
            ratio = seconds(work, autocasts[0]) / seconds(work, autocasts[1])
        args.bf16 = ratio > 1.1
        other = "--no-bf16 to force float32" if args.bf16 else "so float32; --bf16 to force bfloat16"
        print(f"bfloat16: {ratio:.2g}× float32 on this machine ({other})")
    return autocasts[args.bf16]


def get_rng_state(*generators):
    """The states of torch's random generators and of the given numpy or torch ones, as tensors and text."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    given = [json.dumps(g.bit_generator.state) if isinstance(g, np.random.Generator) else g.get_state() for g in generators]
    return {"torch": torch.get_rng_state(), "cuda": cuda, "given": given}


def set_rng_state(state, *generators):
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    for g, given in zip(generators, state["given"]):
        if isinstance(g, np.random.Generator):
            g.bit_generator.state = json.loads(given)
        else:
            g.set_state(given)


def save_checkpoint(path, meta, **states):
    """Tensors and plain values only (loads with weights_only=True); written aside, flushed to disk, then renamed: there is a whole file or none."""
    write_aside(path, lambda f: torch.save({"meta": {"format_version": FORMAT_VERSION, **meta}, **states}, f))


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
    for key, want in (("format_version", DATA_FORMAT_VERSION), ("env_id", env_id)):
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


def checksum(path):
    """BLAKE2b of a file, read in pieces."""
    digest = hashlib.blake2b()
    with open(path, "rb") as f:
        while piece := f.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def verify_dataset(data_dir, meta):
    """Compares every file of a dataset with its checksum in meta.json; refuses, in one sentence, one that has changed."""
    for split in ("train", "test"):
        checksums = meta["splits"][split].get("checksums")
        if not isinstance(checksums, dict):
            sys.exit(f"error: {data_dir}/meta.json holds no checksums for --verify: leave that out, or collect the dataset again")
        for name in ("frames.npy", "first.npy", "actions.npy", "rewards.npy", "returns.npy"):
            path = Path(data_dir) / split / name
            if path.exists():
                if checksum(path) != checksums.get(name):
                    sys.exit(f"error: {path} is not what its checksum in meta.json says: collect the dataset again")
    print(f"{data_dir}: every file is what its checksum says")


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


def forget_pages(array):
    """What was read of a memory-mapped array leaves this process's memory; it stays in the system's page cache."""
    array.base.madvise(mmap.MADV_DONTNEED)


def get_windows(frames, t, device):
    """Windows around t (B,) -> (B, 9, 64, 64) float in [-0.5, 0.5], channels-last: o_{t-1}, o_t, o_{t+1} stacked on channels."""
    # frames t-1, t, t+1 lie side by side in the file, so a view that overlaps itself makes each window a single copy of 36 KB
    triples = np.lib.stride_tricks.as_strided(frames, (len(frames) - 2, 3, 64, 64, 3), (frames.strides[0], *frames.strides))
    window = torch.cat(torch.from_numpy(triples[t - 1]).to(device).unbind(1), dim=-1)  # (B, 64, 64, 9) uint8
    return torch.add(torch.tensor(-0.5, device=device), window.permute(0, 3, 1, 2), alpha=1 / 255)  # x / 255 - 0.5 in one pass


def refuse_bad_numbers(run_dir, update, batch, numbers):
    """Ends the process before a loss or gradient that is not finite reaches the parameters or a checkpoint; notes the batch."""
    write_aside(run_dir / "bad_batch.json", lambda f: f.write(json.dumps({"update": update, "indices": np.asarray(batch).tolist()}).encode()))
    found = ", ".join(f"{name} {value}" for name, value in numbers.items())
    sys.exit(
        f"error: update {update} met numbers that are not finite ({found}); its batch is in {run_dir}/bad_batch.json, the checkpoint of the last "
        "good update is intact: lower the learning rate or try --no-bf16, with --overwrite, or (pretraining, cloning) look at these frames"
    )


def predict(idm, vq, fdm, windows, autocast):
    """Windows (B, 9, 64, 64) -> prediction o^_{t+1} (B, 3, 64, 64), VQ loss, continuous latent (B, latent_dim), codes, perplexities (N,).

    vq is None in the no-VQ ablation.
    """
    with autocast:
        z = idm(windows)
    with torch.autocast(windows.device.type, enabled=False):
        quantised, vq_loss, codes, perplexity = vq(z) if vq else (z, torch.zeros((), device=z.device), None, None)
    with autocast:
        return fdm(windows[:, :6], quantised), vq_loss, z, codes, perplexity


def linear_probe(z, actions):
    """Balanced accuracy of reading the true action from the latent by class-balanced ridge regression: fitted on z["train"], scored on z["test"]."""
    scaler = StandardScaler().fit(z["train"])
    probe = RidgeClassifier(alpha=1e-3, class_weight="balanced").fit(scaler.transform(z["train"]), actions["train"])
    return balanced_accuracy(actions["test"], probe.predict(scaler.transform(z["test"])))


def balanced_accuracy(actions, guess):
    """Mean over the actions that occur of the share guessed right; guessing without looking gives 1 / their number."""
    with warnings.catch_warnings(action="ignore"):  # guesses of actions that do not occur
        return float(balanced_accuracy_score(actions, guess))


def latent_space_metrics(z, codes, actions):
    """What latents z (n, latent_dim) and codes (n, N, H) tell of the actions (n,), by scikit-learn's metrics. Each is {"train": ..., "test": ...}.

    linear_probe, mlp_probe      balanced accuracy of logistic regression and of an MLP with 256 hidden units, fitted on train, scored on test
    nmi                          normalised mutual information between the action and the code of a slot, mean over the N * H slots
    nmi_best_slot                the same of the slot that tells most
    cluster_purity               share of the test latents whose k-means cluster (15, fitted on train) is mostly of their own action
    """
    scaler = StandardScaler().fit(z["train"])
    x = {split: scaler.transform(z[split]) for split in z}
    weight = compute_sample_weight("balanced", actions["train"])
    probes = {"linear_probe": LogisticRegression(max_iter=300), "mlp_probe": MLPClassifier((256,), alpha=0.1, max_iter=60, random_state=0)}
    out = {}
    with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):  # enough is enough
        for name, probe in probes.items():
            guess = probe.fit(x["train"], actions["train"], sample_weight=weight).predict(x["test"])
            out[name] = balanced_accuracy(actions["test"], guess)
        clusters = KMeans(min(15, len(x["train"])), n_init=4, random_state=0).fit(x["train"]).predict(x["test"])
    out["cluster_purity"] = float(contingency_matrix(actions["test"], clusters).max(0).sum() / len(clusters))
    if codes["test"] is not None:
        nmi = [normalized_mutual_info_score(actions["test"], slot) for slot in codes["test"].reshape(len(clusters), -1).T]
        out |= {"nmi": float(np.mean(nmi)), "nmi_best_slot": float(np.max(nmi))}
    return out


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


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    require(args, num_updates=1, batch_size=1, eval_every=1, eval_windows=2)
    data_dir = Path(args.data_dir or f"data/{args.env_id}")
    run_dir = Path(args.runs_dir) / f"{args.env_id}__{args.exp_name}__{args.seed}"
    if (run_dir / "results.json").exists() and not args.overwrite:
        sys.exit(f"error: {run_dir} already holds a finished run: add --overwrite to replace it, or choose another --exp-name or --seed")
    data_meta = load_meta(data_dir, args.env_id)
    if args.verify:
        verify_dataset(data_dir, data_meta)
    train_frames, train_t = load_frames(data_dir, "train", data_meta)
    test_frames, test_t = load_frames(data_dir, "test", data_meta)
    for split, t in (("train", train_t), ("test", test_t)):
        if len(t) < max(2, args.batch_size):
            found = f"{data_dir} has {len(t)} {split} windows"
            sys.exit(f"error: {found}, expected at least --batch-size {args.batch_size}, and 2: lower it or collect more frames")
    inputs = {"--data-dir": checksum(data_dir / "meta.json")}
    labels = {}  # for the probe only
    for split in ("train", "test"):
        if (data_dir / split / "actions.npy").exists():
            labels[split] = load_actions(data_dir, split, data_meta)

    writer, state = start_run(run_dir, args, inputs)
    for name in ("predictions", "latents", "rollouts"):
        (run_dir / f"{name}.png").unlink(missing_ok=True)

    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    device = (torch.accelerator.current_accelerator(check_available=True) if args.cuda else None) or torch.device("cpu")
    start_time = time.time() - (state["meta"]["wall_seconds"] if state else 0)

    latent_dim = args.vq_num_codebooks * args.vq_num_slots * args.vq_dim
    idm = IDM(args.idm_scale, latent_dim, args.patch_size).to(device).to(memory_format=torch.channels_last)
    vq = VQ(args.vq_num_codebooks, args.vq_num_slots, args.vq_dim, args.vq_num_codes, args.vq_commitment, args.vq_decay).to(device)
    fdm = FDM(latent_dim, args.fdm_width, args.predict_change, args.patch_size).to(device).to(memory_format=torch.channels_last)
    networks = (idm, vq if args.vq else None, fdm)
    trained = nn.ModuleList([idm, vq, fdm])
    params = [*idm.parameters(), *fdm.parameters()]
    optimizer = optim.Adam(params, lr=args.learning_rate, fused=True)

    trial, trial_windows = copy.deepcopy(networks), get_windows(train_frames, train_t[:16], device)

    def trial_step(autocast):
        prediction, vq_loss, *_ = predict(*trial, trial_windows, autocast)
        (F.mse_loss(prediction, trial_windows[:, 6:]) + vq_loss).backward()

    autocast = choose_precision(args, device, trial_step)
    origin = provenance(args, device)
    print(f"{args.env_id}: {run_dir}, {origin['device_name']}, {'bfloat16' if args.bf16 else 'float32'}")

    def lr_factor(update):
        w = args.warmup_updates
        return float(np.interp(update, [0, w, max(w + 1, args.num_updates)], [0.1, 1.0, 0.01]))

    eval_rng = np.random.default_rng(0)
    eval_t = {s: np.sort(eval_rng.permutation(t)[: args.eval_windows]) for s, t in (("train", train_t), ("test", test_t))}
    # for the pictures: the test windows that change most, where there is something to predict
    change = np.array([np.abs(test_frames[t + 1].astype(np.int16) - test_frames[t]).mean() for t in eval_t["test"]])
    picture_t = eval_t["test"][np.argsort(-change, kind="stable")][:: max(1, len(change) // 48)][:12]  # spread over the upper quarter

    # and for the picture of rollouts eight in a row, none if no episode is that long
    whole = np.all([np.isin(eval_t["test"] + k, test_t) for k in range(8)], axis=0)
    rollout_t = (eval_t["test"][whole][np.argsort(-change[whole], kind="stable")][:1, None] + np.arange(8)).ravel()  # (8,) or (0,)

    split_frames = {"train": train_frames, "test": test_frames}
    true_actions = {split: labels[split][eval_t[split]] for split in labels}  # int8 (n,)

    @torch.no_grad()
    def encode(split, idm, vq):
        """Latents (n, latent_dim) of eval_t[split]'s windows and their codes (n, N, H), None without VQ."""
        z, codes = [], []
        for t in np.array_split(eval_t[split], -(-len(eval_t[split]) // 512)):
            with autocast:
                z.append(idm(get_windows(split_frames[split], t, device)))
            if vq:
                codes.append(vq(z[-1])[2])
        return torch.cat(z).cpu().numpy(), torch.cat(codes).cpu().numpy() if vq else None

    @torch.no_grad()
    def evaluate():
        """Losses on test windows beside copying the last frame, how much of the IDM is alive, the probe where labels exist; latents and codes.

        Networks in eval mode.
        """
        alive = []  # share in every batch, times its windows
        hook = idm.network.conv.register_forward_hook(lambda module, inputs, x: alive.append((x > 0).float().mean().item() * len(x)))
        fdm_loss, copy_loss, z, codes = 0, 0, [], []
        for t in np.array_split(eval_t["test"], max(1, len(eval_t["test"]) // args.batch_size)):
            windows = get_windows(test_frames, t, device)
            prediction, _, latent, code, _ = predict(*networks, windows, autocast)
            fdm_loss += F.mse_loss(prediction, windows[:, 6:]).item() * len(t) / len(eval_t["test"])
            copy_loss += F.mse_loss(windows[:, 3:6], windows[:, 6:]).item() * len(t) / len(eval_t["test"])
            z.append(latent)
            codes.append(code)
        hook.remove()
        out = {"test/fdm_loss": fdm_loss, "test/copy_last_frame_loss": copy_loss, "test/idm_active_share": sum(alive) / len(eval_t["test"])}
        z, codes = {"test": torch.cat(z).cpu().numpy()}, {"test": torch.cat(codes).cpu().numpy() if args.vq else None}
        if len(labels) == 2:  # what the probe is fitted on
            z["train"], codes["train"] = encode("train", *networks[:2])
            out["probe/balanced_accuracy"], out["probe/chance"] = linear_probe(z, true_actions), 1 / len(np.unique(true_actions["test"]))
        return out, z, codes

    @torch.no_grad()
    def draw(z, codes):
        """Pictures {name: (H, W, 3) uint8} of test windows: predictions, latents (n, latent_dim) in 2-D, and groups of latents held in the FDM.

        Networks in eval mode. lapo_inspect.py draws the same with more care, and says what to look for.
        """
        windows = get_windows(test_frames, picture_t, device)
        prediction = predict(*networks, windows, autocast)[0]
        rows = [windows[:, 3:6], windows[:, 6:], prediction, (prediction - windows[:, 6:]).abs() * 2 - 0.5]  # o_t, o_{t+1}, o^_{t+1}, 2 |error|
        rows = [F.pad(row.clamp(-0.5, 0.5), (1, 1, 1, 1), value=0.5) for row in rows]  # a white frame around each
        strip = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)  # (3, 4 * 66, 12 * 66)
        pictures = {"predictions": ((strip + 0.5) * 255).byte().permute(1, 2, 0).cpu().numpy()}

        z = torch.from_numpy(z).to(device)
        z = vq(z)[0] if args.vq else z  # as the FDM is given them
        points = np.pad(z.cpu().numpy(), ((0, 0), (0, 1)))  # a column of zeros: the latent may have one dimension only
        with np.errstate(invalid="ignore"):  # latents that are all the same have no variance to explain
            pca = PCA(2, random_state=0).fit(points)
        kmeans = KMeans(min(8, len(np.unique(codes if args.vq else points, axis=0))), n_init=1, random_state=0).fit(points)
        order = np.argsort(-np.bincount(kmeans.labels_, minlength=kmeans.n_clusters), kind="stable")  # groups, the most frequent one first
        xy, share = pca.transform(points), np.nan_to_num(pca.explained_variance_ratio_)
        figure = plot_latents(xy, share, np.argsort(order)[kmeans.labels_], true_actions.get("test"))
        figure.canvas.draw()
        pictures["latents"] = np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()
        plt.close(figure)

        if len(rollout_t):
            nearest = kmeans.transform(points).argmin(0)[order]  # (K,): for each group the window nearest to its centre
            held = z[torch.from_numpy(nearest).to(device)]  # (K, latent_dim)
            windows = get_windows(test_frames, rollout_t, device)  # (T, 9, 64, 64)
            with autocast:
                read = idm(windows)
            read = vq(read)[0] if args.vq else read  # (T, latent_dim): from the true frames
            past = windows[:1, :6].expand(1 + len(held), -1, -1, -1)
            shown = []
            for k in range(len(rollout_t)):
                with autocast:
                    now = fdm(past, torch.cat([read[k, None], held]))
                past = torch.cat([past[:, 3:], now], dim=1)  # goes on from its own predictions
                if k + 1 in (1, 2, 4, 8):
                    shown.append(torch.cat([windows[k, None, 6:], now]))  # (2 + K, 3, 64, 64)
            names = ["true frames", "IDM's latents", *(f"code {g} held" for g in range(len(held)))]
            sheet = contact_sheet(to_pixels(torch.stack(shown, dim=1)), names, [f"step {k}" for k in (1, 2, 4, 8)], 1, len(names))
            pictures["rollouts"] = np.asarray(sheet)
        return pictures

    meta = {
        "stage": "lapo_pretrain", "env_id": args.env_id, "num_levels": data_meta["num_levels"], "start_level": data_meta["start_level"],
        "data_dir": str(data_dir), "args": asdict(args), "command": this_command(),
    }  # fmt: skip
    rng = np.random.default_rng(args.seed)
    curve, first_update, collapsed, picture_seconds, checkpointer = [], 0, 0, 0.0, Checkpointer(args.checkpoint_seconds)
    modules = {"idm": idm, "vq": vq, "fdm": fdm, "optimizer": optimizer}
    if state:
        with refusing_damage(run_dir / "resume.pt"):
            for name, module in modules.items():
                module.load_state_dict(state[name])
            set_rng_state(state["rng"], rng)
            curve, first_update = state["meta"]["curve"], state["meta"]["step"]
            picture_seconds = float(state["meta"].get("picture_seconds", 0.0))
    progress = tqdm(
        range(first_update, args.num_updates), initial=first_update, total=args.num_updates, unit="update", desc="pretrain", mininterval=1
    )
    for update in progress:
        optimizer.param_groups[0]["lr"] = args.learning_rate * lr_factor(update)
        t = train_t[torch.randint(len(train_t), (args.batch_size,)).numpy()]
        windows = get_windows(train_frames, t, device)
        prediction, vq_loss, z, batch_codes, perplexity = predict(*networks, windows, autocast)
        fdm_loss = F.mse_loss(prediction, windows[:, 6:])
        loss = fdm_loss + vq_loss
        optimizer.zero_grad()
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(params, args.max_grad_norm)
        if not torch.isfinite(grad_norm + loss.detach()):
            refuse_bad_numbers(run_dir, update, t, {"loss": loss.item(), "gradient norm": grad_norm.item()})
        optimizer.step()

        step = update + 1
        if step % 50 == 0 or step == 1:
            forget_pages(train_frames)
            writer.add_scalar("losses/fdm_loss", fdm_loss.item(), step)
            writer.add_scalar("losses/copy_last_frame_loss", F.mse_loss(windows[:, 3:6], windows[:, 6:]).item(), step)
            writer.add_scalar("losses/vq_loss", vq_loss.item(), step)
            writer.add_scalar("losses/grad_norm", grad_norm.item(), step)
            for n, p in enumerate(perplexity.tolist() if args.vq else []):
                writer.add_scalar(f"codebook/perplexity_{n}", p, step)
            different = len(torch.unique(batch_codes.flatten(1) if args.vq else z.detach().round(decimals=4), dim=0))  # equal to 4 decimals: the same
            writer.add_scalar("codebook/different_latents", different, step)
            collapsed = collapsed + 1 if different < min(2, args.batch_size) or args.vq and perplexity.min() < 1.5 else 0
            if collapsed == 5:
                found = f"{different} different latents in a batch of {args.batch_size}"
                found += f", perplexity {perplexity.min():.2f} of a codebook" if args.vq else ""
                tqdm.write(
                    f"warning: update {step}: the latents have collapsed ({found}), so that they say little: "
                    "try a longer --warmup-updates, a lower --learning-rate or another --seed"
                )
            writer.add_scalar("charts/learning_rate", optimizer.param_groups[0]["lr"], step)
            writer.add_scalar("charts/SPS", (progress.format_dict["rate"] or 0) * args.batch_size, step)
        if step % args.eval_every == 0 or step == args.num_updates:
            trained.eval()
            out, latents, codes = evaluate()
            now = time.time()
            if picture_seconds < 0.02 * (now - start_time) or step == args.num_updates:  # left out while they have taken more of the time
                pictures = draw(latents["test"], codes["test"])
                for name, picture in pictures.items():
                    writer.add_image(f"pictures/{name}", picture, step, dataformats="HWC")
                picture_seconds += time.time() - now
            trained.train()
            for name, value in out.items():
                writer.add_scalar(name, value, step)
            curve.append({"update": step, "train/fdm_loss": fdm_loss.item(), **out})
            if args.vq:
                curve[-1]["perplexity"] = perplexity.tolist()
            shown = {k.split("/")[1]: f"{v:.2e}" if "loss" in k else f"{v:.2f}" for k, v in out.items()}
            progress.set_postfix(shown)
        if checkpointer.due() or step == args.num_updates:
            states = {name: module.state_dict() for name, module in modules.items()}
            progress_meta = {"step": step, "curve": curve, "picture_seconds": picture_seconds}
            progress_meta |= {"inputs": inputs, "wall_seconds": time.time() - start_time}
            # first this, then resume.pt: a run that goes on from there writes this file again
            weights = {name: states[name] for name in ("idm", "vq", "fdm")}
            save_checkpoint(run_dir / "checkpoint.pt", {**meta, "updates": step, "unfinished": step < args.num_updates}, **weights)
            writer.flush()
            save_checkpoint(run_dir / "resume.pt", {**meta, **progress_meta}, rng=get_rng_state(rng), **states)
            checkpointer.saved(run_dir)
    if first_update == args.num_updates:  # interrupted after the last update
        trained.eval()
        out, latents, codes = evaluate()
        pictures = draw(latents["test"], codes["test"])

    # what a report needs: the pictures, and test latents in order of eval_t["test"]
    for name, picture in pictures.items():
        Image.fromarray(picture).save(run_dir / f"{name}.png")
    np.save(run_dir / "test_latents.npy", latents["test"])
    np.save(run_dir / "test_windows.npy", eval_t["test"])
    if args.capture_video:
        films = []
        trained.eval()
        for t in np.array_split(test_t[:256], 8):  # the first env's frames, in order
            with torch.no_grad():
                windows = get_windows(test_frames, t, device)
                both = torch.cat([windows[:, 6:], predict(*networks, windows, autocast)[0].clamp(-0.5, 0.5)], dim=3)  # (B, 3, 64, 128)
            films.append(((both + 0.5) * 255).byte().cpu().permute(0, 2, 3, 1).numpy())
        film = [Image.fromarray(frame).resize((384, 192), Image.NEAREST) for frame in np.concatenate(films)]
        film[0].save(run_dir / "predictions.gif", save_all=True, append_images=film[1:], duration=1000 // 15, loop=0)
    latent_space = None  # needs labels
    if len(labels) == 2 and min(len(np.unique(a)) for a in true_actions.values()) > 1:
        tqdm.write("measuring the latent space beside its controls ...")
        shuffled = {split: np.random.default_rng(0).permutation(a) for split, a in true_actions.items()}
        torch.manual_seed(args.seed)  # the networks as they were before training
        fresh = IDM(args.idm_scale, latent_dim, args.patch_size).to(device).to(memory_format=torch.channels_last).eval()
        fresh_vq = VQ(args.vq_num_codebooks, args.vq_num_slots, args.vq_dim, args.vq_num_codes, args.vq_commitment, args.vq_decay).to(device).eval()
        fresh = {split: encode(split, fresh, fresh_vq if args.vq else None) for split in split_frames}
        latent_space = {
            "trained": latent_space_metrics(latents, codes, true_actions),
            "shuffled_actions": latent_space_metrics(latents, codes, shuffled),
            "untrained_idm": latent_space_metrics(*({split: both[i] for split, both in fresh.items()} for i in (0, 1)), true_actions),
            "chance": out["probe/chance"], "windows": len(true_actions["test"]),
        }  # fmt: skip
    wall = time.time() - start_time
    results = {
        "stage": "lapo_pretrain", "env_id": args.env_id, "seed": args.seed, "updates": args.num_updates, **out, "latent_space": latent_space,
        "codes_used": [len(np.unique(codes["test"][:, n])) for n in range(args.vq_num_codebooks)] if args.vq else None, "curve": curve,
        "samples_per_second": round(args.num_updates * args.batch_size / wall, 1), "wall_seconds": round(wall, 1),
        "picture_seconds": round(picture_seconds, 1), **origin,
    }  # fmt: skip
    write_aside(run_dir / "results.json", lambda f: f.write(json.dumps(results, indent=2).encode()))
    (run_dir / "resume.pt").unlink(missing_ok=True)
    writer.close()
    print(f"FDM loss on test frames {out['test/fdm_loss']:.2e}, copying the last frame {out['test/copy_last_frame_loss']:.2e}")
    print(f"wrote {run_dir}; next: python lapo_bc.py --env-id {args.env_id}" + same_place(args, "data_dir", "runs_dir", "seed"))
