# /// script
# requires-python = ">=3.10,<3.13"
# dependencies = ["torch==2.13.0", "procgen-mirror==0.10.7", "gym==0.26.2", "numpy<2", "tyro", "tensorboard", "tqdm", "pillow", "scikit-learn>=1.7"]
# ///
"""LAPO, stage 4 of 5, offline: a handful of action labels turns the latent policy into one that plays (paper section 6.4).

    decoder        d(IDM(o_{t-1}, o_t, o_{t+1})) -> a_t, fitted on n labelled transitions
    policy         a ~ d(pi(o_t))

For every label count n and several draws of the labelled frames, plays it beside behaviour cloning from scratch on the same
labels (same network, same loss), and beside acting at random and the demonstrator. Flags whose help begins with "ours" are not the paper's.

Reads data/ENV_ID and runs/ENV_ID__lapo_bc__SEED/checkpoint.pt, writes runs/ENV_ID__lapo_decode__SEED/{results.json,checkpoint.pt}.
    python lapo_decode.py --env-id bossfight
Next:
    python lapo_finetune_ppo.py --env-id bossfight
"""

import contextlib
import copy
import fcntl
import hashlib
import json
import os
import platform
import random
import shlex
import signal
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import asdict, dataclass
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Literal

import gym_notices.notices
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.optim as optim
import tyro
from PIL import Image, ImageDraw, ImageFont
from sklearn.cluster import kmeans_plusplus
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

gym_notices.notices.notices.clear()  # else procgen's import of gym prints four lines about gym's future
from procgen import ProcgenGym3Env  # noqa: E402
from procgen.env import ENV_NAMES  # noqa: E402

FORMAT_VERSION = 2  # of checkpoints
DATA_FORMAT_VERSION = 1  # of datasets
NOT_COMPARED = {"resume", "overwrite", "verify", "track", "wandb_project_name", "wandb_entity", "checkpoint_seconds"}  # may change when a run goes on
# numbers in checkpoints that networks are built from
SIZES = {"scale", "idm_scale", "policy_scale", "vq_num_codebooks", "vq_num_slots", "vq_dim"}
LOCKS = []  # open files, locked as long as this process lives

# Mean returns of a random policy and of the paper's expert, Procgen easy mode, all levels (paper, appendix)
PAPER_SCORES = {
    "bigfish": (0.8743, 36.3362), "bossfight": (0.0462, 11.6344), "caveflyer": (2.5971, 9.1836), "chaser": (0.6632, 9.9557),
    "climber": (2.2243, 10.2336), "coinrun": (2.7048, 9.9325), "dodgeball": (0.6130, 13.4866), "fruitbot": (-2.5330, 29.9253),
    "heist": (3.0759, 9.6853), "jumper": (3.4105, 8.4602), "leaper": (2.5105, 7.4083), "maze": (4.2726, 9.9693),
    "miner": (1.2514, 11.8926), "ninja": (2.5600, 9.4746), "plunder": (4.3207, 11.4605), "starpilot": (1.5252, 66.9863),
}  # fmt: skip


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
    """run the IMPALA-CNNs' forward pass in bfloat16 (parameters and loss stay float32); default: if that is faster on this machine"""
    track: bool = False
    """if toggled, this experiment is also tracked with Weights and Biases (`pip install wandb`)"""
    wandb_project_name: str = "lapo"
    """the wandb's project name"""
    wandb_entity: str | None = None
    """the entity (team) of wandb's project"""
    capture_video: bool = False
    """write a GIF of LAPO + decoder (n = table_labels, first draw) to the run folder, with the actions it takes"""
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
    num_levels: int | None = None
    """number of Procgen levels to play on, 0: all of them; default: those of the dataset"""
    start_level: int | None = None
    """the first level, if num_levels > 0; default: that of the dataset"""
    data_dir: str | None = None
    """the dataset of collect_expert_data.py; default data/ENV_ID"""
    verify: bool = False
    """check every file of the dataset against its checksum first (sizes and headers are always checked)"""
    bc_checkpoint: str | None = None
    """the checkpoint of lapo_bc.py; default RUNS_DIR/ENV_ID__lapo_bc__SEED/checkpoint.pt"""
    allow_unfinished: bool = False
    """take the checkpoint of an unfinished run, too"""

    num_labels: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
    """the label counts n of the curve"""
    table_labels: int = 256
    """the label count n of the table, one of num_labels"""
    num_draws: int = 5
    """draws of the labelled frames; every row is the mean over them"""
    eval_episodes: int = 100
    """episodes per method and label count, spread over the draws; random play gets at least 100"""
    num_envs: int = 64
    """the most games played in parallel"""

    temperature: float = 1.0
    """actions are sampled from softmax(logits / temperature), for LAPO and for behaviour cloning alike"""
    decoder_hidden: tuple[int, ...] = (192, 128, 64)
    """hidden widths of the decoder"""
    decoder_updates: int = 200
    """gradient steps of a decoder; many overfit a handful of labels, and with thousands 800 do better (README, Beyond the paper)"""
    decoder_features: bool = False
    """ours: the decoder sees the policy's 256 features beside its latent, and learns from both on the labelled frames, not from the IDM's latent"""
    finetune: Literal["none", "head", "all"] = "none"
    """ours: then train the policy through the decoder on the labels: its last two layers (head), or all of them"""
    finetune_updates: int = 200
    """gradient steps of that"""
    finetune_epochs: int = 0
    """at least so many passes over the labels, if that takes more steps than finetune_updates"""
    finetune_learning_rate: float = 1e-4
    """Adam's learning rate for that, linearly to 0"""
    pseudo_labels: bool = False
    """ours: the decoder labels up to 65,536 training frames with probabilities, and a second one, on the policy's features, learns from those"""
    pseudo_updates: int = 1500
    """gradient steps of that second decoder"""
    latent_steps: int = 1
    """ours, with --pseudo-labels: the first decoder sees the IDM's latents z_t ... z_{t+k-1}, for actions that show late"""
    choose_labels: Literal["random", "spread"] = "random"
    """ours: label frames drawn at random, or spread over the IDM's latents by k-means++ (up to 1,024 of them, the rest at random)"""
    bc: bool = True
    """play behaviour cloning from scratch, too"""
    decoder_learning_rate: float = 1e-3
    """Adam's learning rate for a decoder, linearly to 0"""
    bc_updates: int = 1000
    """gradient steps of behaviour cloning from scratch; few learn little more than how often each action is taken, many overfit"""
    bc_epochs: int = 0
    """at least so many passes over the labels, if that takes more steps than bc_updates"""
    bc_learning_rate: float = 5e-4
    """Adam's learning rate for behaviour cloning from scratch, linearly to 0"""
    bc_batch_size: int = 128
    """the largest batch of behaviour cloning from scratch, and of fine-tuning on the labels; the decoder's is 512"""
    label_smoothing: float = 0.05
    """label smoothing of both"""
    weight_decay: float = 1e-2
    """decoupled weight decay (AdamW) of both"""


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


class LatentPolicy(nn.Module):
    """pi(o_t): observations (B, 64, 64, 3) uint8 -> latent action (B, latent_dim). The value head waits for fine-tuning."""

    def __init__(self, scale, latent_dim, patch_size=1):
        super().__init__()
        self.network = ImpalaCNN(3, scale, patch_size)
        self.head = nn.Linear(256, latent_dim)
        self.critic = nn.Linear(256, 1)

    def forward(self, obs):
        # HWC memory seen as (B, 3, 64, 64) is channels-last already: no copy
        return self.head(self.network(obs.permute(0, 3, 1, 2).float() / 255 - 0.5)).float()


class Decoder(nn.Module):
    """MLP from latents (B, latent_dim), standardised by the training latents' mean and deviation, to action logits (B, 15)."""

    def __init__(self, latent_dim, hidden, num_actions=15):
        super().__init__()
        self.register_buffer("mean", torch.zeros(latent_dim))
        self.register_buffer("std", torch.ones(latent_dim))
        widths = [latent_dim, *hidden]
        layers = [layer for i, o in zip(widths, widths[1:]) for layer in (nn.Linear(i, o), nn.ReLU())]
        self.mlp = nn.Sequential(*layers, nn.Linear(widths[-1], num_actions))

    def forward(self, z):
        return self.mlp((z - self.mean) / self.std)


def policy_outputs(policy, obs, features):
    """Observations (B, 64, 64, 3) uint8 -> pi(o_t) (B, latent_dim), and beside it, if asked for, the features (B, 256) that it is made from."""
    x = policy.network(obs.permute(0, 3, 1, 2).float() / 255 - 0.5)
    z = policy.head(x).float()
    return torch.cat([z, x.float()], dim=1) if features else z


class DecodedPolicy(nn.Module):
    """Observations (B, 64, 64, 3) uint8 -> action logits (B, 15), through the cloned policy and a decoder, which computes in float32."""

    def __init__(self, policy, decoder, features):
        super().__init__()
        self.policy, self.decoder, self.features = policy, decoder, features

    def forward(self, obs):
        x = policy_outputs(self.policy, obs, self.features)
        with torch.autocast(obs.device.type, enabled=False):
            return self.decoder(x)


class ScratchPolicy(nn.Module):
    """Behaviour cloning's policy: observations (B, 64, 64, 3) uint8 -> action logits (B, 15), of the latent policy's size."""

    def __init__(self, scale, patch_size=1, num_actions=15):
        super().__init__()
        self.network = ImpalaCNN(3, scale, patch_size)
        self.actor = nn.Linear(256, num_actions)

    def forward(self, obs):
        return self.actor(self.network(obs.permute(0, 3, 1, 2).float() / 255 - 0.5)).float()


def load_vectors(checkpoint, names, size, path, made_by):
    """The named vectors (size,) of a checkpoint; refuses, in one sentence, what is no such thing."""
    for name in names:
        vector = checkpoint[name]
        if not isinstance(vector, torch.Tensor) or (vector.shape, vector.dtype, vector.layout) != ((size,), torch.float32, torch.strided):
            sys.exit(f"error: {name} in {path} is not {size} float32 numbers: make it again with `{made_by}`")
    return [checkpoint[name] for name in names]


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


def load_checkpoint(path, stage, args, made_by, parts=()):
    """Reads a checkpoint and refuses, in one sentence, what is not one of a finished run of `stage` for this game."""
    if not Path(path).is_file():
        sys.exit(f"error: no checkpoint at {path}: make it with `{made_by}`, or name another one")
    try:
        checkpoint = read_tensors(path)
        meta = checkpoint["meta"]
        if not isinstance(checkpoint, dict) or not isinstance(meta, dict):
            raise ValueError("it holds no dictionary")
    except Exception as e:
        sys.exit(f"error: {path} cannot be read as a checkpoint ({type(e).__name__}): make it again with `{made_by}`")
    for key, want in (("format_version", FORMAT_VERSION), ("stage", stage), ("env_id", args.env_id)):
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
    if meta.get("unfinished") and not args.allow_unfinished:
        sys.exit(f"error: {path} is of an unfinished run: finish it with `{first_line(meta.get('command'))}`, or add --allow-unfinished")
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


def draw_action(picture, action):
    """A picture (192, 192, 3) uint8 with the action taken on seeing it in the upper left corner: an arrow, a dot for none, a button's letter."""
    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image)
    draw.ellipse((4, 4, 40, 40), fill="white", outline="black")
    dx, dy = action // 3 - 1, 1 - action % 3  # Procgen's actions 0-8 are 3 * (right + 1) + (up + 1), 9-14 buttons; pictures count downwards
    if action > 8:
        draw.text((22, 22), "DAWSQE"[action - 9], fill="black", anchor="mm", font=ImageFont.load_default(24))
    elif dx == dy == 0:
        draw.ellipse((18, 18, 26, 26), fill="black")
    else:
        x, y = np.array([dx, dy]) * 14 / np.hypot(dx, dy)  # half the arrow; its head is a triangle from half way on
        draw.line((22 - x, 22 - y, 22 + x / 2, 22 + y / 2), fill="black", width=4)
        draw.polygon([(22 + x, 22 + y), (22 - y * 0.7, 22 + x * 0.7), (22 + y * 0.7, 22 - x * 0.7)], fill="black")
    return np.asarray(image)


def draw_return(picture, value):
    """A picture (192, 192, 3) uint8 with an episode's return in the middle."""
    image = Image.fromarray(picture)
    font = ImageFont.load_default(40)
    ImageDraw.Draw(image).text((96, 96), f"{value:g}", fill="white", anchor="mm", font=font, stroke_width=3, stroke_fill="black")
    return np.asarray(image)


def evaluate(act, env, num_episodes, gif=None):
    """Returns (num_episodes,) of games in which act(obs (B, 64, 64, 3), episode (B,)) takes the actions (B,) of the episodes of these numbers.

    An env that ends its episode begins the next in line, so that none waits for the slowest before the last one has begun; every episode
    counts, however long. The film shows episodes 0 to 3.
    """
    episode, started = np.arange(env.num), env.num
    running, returns, film, shown = np.zeros(env.num), np.full(num_episodes, np.nan), [], {}
    progress = tqdm(total=num_episodes, unit="episode", desc="play", mininterval=1, leave=False)
    while np.isnan(returns).any():
        obs = env.observe()[1]["rgb"]
        playing = np.flatnonzero(episode < num_episodes)
        action = np.zeros(env.num, dtype=np.int32)
        action[playing] = act(obs[playing], episode[playing])
        if gif and len(film) < 600 and (episode[:4] < 4).any():
            for e, picture in enumerate(obs[:4].repeat(3, axis=1).repeat(3, axis=2)):  # (192, 192, 3)
                if episode[e] == e:
                    shown[e] = draw_action(picture, action[e])
            film.append(np.concatenate([np.pad(shown[e], ((0, 0), (2, 2), (0, 0)), constant_values=255) for e in shown], axis=1))
        env.act(action)
        reward, _, first = env.observe()
        running += reward
        for e in np.flatnonzero(first):
            if episode[e] < num_episodes:
                returns[episode[e]] = running[e]
                progress.update()
            if episode[e] == e and e in shown:
                shown[e] = draw_return(shown[e] // 2, running[e])  # stays to the film's end
            episode[e], running[e] = started, 0
            started += 1
    progress.close()
    if gif:
        import imageio  # comes with procgen

        imageio.mimsave(gif, film, duration=1000 / 15, loop=0)
    return returns


def fit(model, x, actions, updates, learning_rate, batch_size, args, autocast):
    """Cross-entropy on inputs (n, ...) and actions (n,) or their probabilities (n, 15), in shuffled epochs; the step size falls linearly to 0."""
    optimizer = optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=learning_rate, weight_decay=args.weight_decay)
    smoothing = args.label_smoothing if actions.dim() == 1 else 0.0  # probabilities are smooth as they are
    batch_size, queue = min(batch_size, len(x)), torch.empty(0, dtype=torch.long)
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - update / updates)
        if len(queue) < batch_size:
            queue = torch.randperm(len(x))
        batch, queue = queue[:batch_size], queue[batch_size:]
        with autocast:
            logits = model(x[batch])
        loss = F.cross_entropy(logits.float(), actions[batch], label_smoothing=smoothing)
        if not torch.isfinite(loss):
            sys.exit(f"error: update {update} of {type(model).__name__} on {len(x)} labels met loss {loss.item()}: lower its learning rate")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def mean_and_stderr(x):
    return float(np.mean(x)), float(np.std(x, ddof=1) / np.sqrt(len(x)))


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


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    if args.env_id not in ENV_NAMES:
        sys.exit(f"error: --env-id {args.env_id} is not a Procgen game: choose one of {', '.join(ENV_NAMES)}")
    require(args, num_draws=2, eval_episodes=1, num_envs=1, decoder_updates=1, bc_updates=1, bc_batch_size=1, finetune_updates=1, latent_steps=1)
    data_dir = Path(args.data_dir or f"data/{args.env_id}")
    run_dir = Path(args.runs_dir) / f"{args.env_id}__{args.exp_name}__{args.seed}"
    if (run_dir / "results.json").exists() and not args.overwrite:
        sys.exit(f"error: {run_dir} already holds a finished run: add --overwrite to replace it, or choose another --exp-name or --seed")
    bc_path = args.bc_checkpoint or Path(args.runs_dir) / f"{args.env_id}__lapo_bc__{args.seed}" / "checkpoint.pt"
    parts = ("policy", "idm", "latent_mean", "latent_std")
    made_by = f"python lapo_bc.py --env-id {args.env_id}" + same_place(args, "data_dir", "runs_dir", "seed")
    cloned = load_checkpoint(bc_path, "lapo_bc", args, made_by, parts)
    pretrain_args, bc_args = cloned["meta"].get("pretrain_args"), cloned["meta"]["args"]
    idm = load_network(
        lambda: IDM(pretrain_args["idm_scale"], num_latents(pretrain_args), pretrain_args["patch_size"]), cloned["idm"], bc_path, made_by
    )
    latent_dim = idm.head.out_features
    policy = load_network(lambda: LatentPolicy(bc_args["policy_scale"], latent_dim, bc_args["patch_size"]), cloned["policy"], bc_path, made_by)
    latent_mean, latent_std = load_vectors(cloned, ("latent_mean", "latent_std"), latent_dim, bc_path, made_by)
    data_meta = load_meta(data_dir, args.env_id)
    if args.verify:
        verify_dataset(data_dir, data_meta)
    demonstrator = data_meta.get("demonstrator") if isinstance(data_meta.get("demonstrator"), dict) else {}
    if not all(isinstance(demonstrator.get(key), (int, float)) for key in ("return_mean", "return_stderr", "episodes")):
        sys.exit(f"error: {data_dir}/meta.json lacks demonstrator, the score to compare with: add its return_mean, return_stderr and episodes")
    frames, valid_t = load_frames(data_dir, "train", data_meta)
    if args.latent_steps > 1 and not args.pseudo_labels:
        sys.exit(f"error: --latent-steps {args.latent_steps} without --pseudo-labels: the policy predicts z_t alone, so add --pseudo-labels")
    if args.temperature <= 0:
        sys.exit(f"error: --temperature is {args.temperature}, expected more than 0: 1 samples from the logits as they are")
    if len(set(args.num_labels)) < len(args.num_labels):
        sys.exit(f"error: --num-labels {args.num_labels} names a count twice: name each once")
    if args.table_labels not in args.num_labels:
        sys.exit(f"error: --table-labels {args.table_labels} is not among --num-labels {args.num_labels}: add it there")
    if not 1 <= min(args.num_labels) <= max(args.num_labels) <= len(valid_t):
        found = f"{data_dir} has {len(valid_t)} labelled windows"
        sys.exit(f"error: --num-labels {args.num_labels} asks for more labels than exist: {found}; ask for fewer or collect more")
    labels = load_actions(data_dir, "train", data_meta)
    num_levels = data_meta["num_levels"] if args.num_levels is None else args.num_levels
    start_level = data_meta["start_level"] if args.start_level is None else args.start_level

    inputs = {"--bc-checkpoint": checksum(bc_path), "--data-dir": checksum(data_dir / "meta.json")}
    writer, state = start_run(run_dir, args, inputs)

    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    device = (torch.accelerator.current_accelerator(check_available=True) if args.cuda else None) or torch.device("cpu")
    trial = ScratchPolicy(bc_args["policy_scale"], bc_args["patch_size"]).to(device).to(memory_format=torch.channels_last)
    trial_obs = torch.from_numpy(frames[:16].copy()).to(device)

    def trial_step(autocast):
        with autocast:
            logits = trial(trial_obs)
        logits.square().mean().backward()

    autocast = choose_precision(args, device, trial_step)
    origin = provenance(args, device)
    print(f"{args.env_id}: {run_dir}, {origin['device_name']}, {'bfloat16' if args.bf16 else 'float32'}")
    no_autocast = torch.autocast(device.type, enabled=False)
    start_time = time.time() - (state["meta"]["wall_seconds"] if state else 0)

    idm, policy = (network.to(device).to(memory_format=torch.channels_last).eval().requires_grad_(False) for network in (idm, policy))

    def play(policies, episodes, draw, gif=None):
        """Returns (len(policies), episodes) of policies, obs (B, 64, 64, 3) -> logits (B, 15), that sample from softmax(logits / temperature).

        All of them play in one batch of environments: first the episodes of the first policy, then the second's, ...
        """
        seed = args.seed * 1000 + draw
        generator = torch.Generator(device).manual_seed(seed)

        @torch.inference_mode()
        def act(obs, episode):
            if checkpointer.stop:
                save()  # and end; this draw's episodes are lost
            obs, logits = torch.as_tensor(obs, device=device), torch.zeros(len(obs), 15, device=device)
            for p in np.unique(episode // episodes):
                mine = torch.from_numpy(episode // episodes == p).to(device)
                with autocast:
                    logits[mine] = policies[p](obs[mine])
            return torch.multinomial((logits / args.temperature).softmax(-1), 1, generator=generator).squeeze(-1).cpu().numpy().astype(np.int32)

        env = make_env(args.env_id, min(args.num_envs, len(policies) * episodes), num_levels, start_level, seed)
        returns = evaluate(act, env, len(policies) * episodes, gif)
        env.close()
        return returns.reshape(len(policies), episodes)

    @torch.no_grad()
    def idm_latents(t, steps=1):
        """IDM latents z_t ... z_{t+steps-1} of frames t (n,) side by side, (n, steps * latent_dim); their mean beyond the episode's end."""
        z, inside = [], np.ones(len(t), dtype=bool)
        for k in range(steps):
            inside &= np.isin(t + k, valid_t)
            with autocast:
                chunks = np.array_split(np.where(inside, t + k, t), -(-len(t) // 512))
                z.append(torch.cat([idm(get_windows(frames, c, device)) for c in chunks]))
            z[-1][torch.from_numpy(~inside)] = latent_mean
        return torch.cat(z, dim=1)

    @torch.no_grad()
    def outputs_of_policy(t):
        """Latents and features of frames t (n,), (n, latent_dim + 256)."""
        with autocast:
            chunks = np.array_split(t, -(-len(t) // 512))
            return torch.cat([policy_outputs(policy, torch.from_numpy(frames[c]).to(device), True) for c in chunks])

    def choose(order, draw):
        """The frames to label, first those to label first: as drawn, or up to 1,024 of the first 8,192 spread over their latents."""
        if args.choose_labels == "random":
            return order
        pool = order[:8192]
        z = ((idm_latents(pool) - latent_mean) / latent_std).cpu().numpy()
        picked = pool[kmeans_plusplus(z, min(1024, len(pool), max(args.num_labels)), random_state=draw)[1]]
        return np.concatenate([picked, order[~np.isin(order, picked)]])

    def new_decoder(mean, std):
        decoder = Decoder(len(mean), args.decoder_hidden).to(device)
        decoder.mean.copy_(mean)
        decoder.std.copy_(std)
        return decoder

    latent_mean, latent_std = latent_mean.to(device), latent_std.to(device)
    features = args.decoder_features or args.pseudo_labels  # does the decoder that plays see them?
    if features:  # frames without labels say how to standardise them, and are what pseudo-labels are for
        unlabelled = np.random.default_rng(args.seed).permutation(valid_t)[: 65_536 if args.pseudo_labels else 4096]
        seen = outputs_of_policy(unlabelled)  # (n, latent_dim + 256)
        seen_mean, seen_std = seen.mean(0), seen.std(0) + 1e-3
        unlabelled_z = idm_latents(unlabelled, args.latent_steps) if args.pseudo_labels else None
    how = (args.decoder_learning_rate, 512, args, no_autocast)

    # n labelled transitions of draw d: the first n of its permutation, so more labels contain fewer
    methods = ("lapo_decoder", "bc_from_scratch")[: 1 + args.bc]
    plan = [(n, method) for n in args.num_labels for method in methods]
    episodes_per_draw, checkpointer = -(-args.eval_episodes // args.num_draws), Checkpointer(args.checkpoint_seconds)
    meta = {
        "stage": "lapo_decode", "env_id": args.env_id, "num_levels": num_levels, "start_level": start_level, "n_labels": args.table_labels,
        "args": asdict(args), "bc_args": bc_args, "pretrain_args": pretrain_args,
    }  # fmt: skip
    played = []  # one entry a draw: returns (episodes_per_draw,) of plan[0], plan[1], ...
    if state:
        with refusing_damage(run_dir / "resume.pt"):
            played = state["meta"]["played"]
            set_rng_state(state["rng"])
    rng_state = get_rng_state()  # at the beginning of the draw

    def save():
        """What an interrupted run goes on from: all draws that are done."""
        progress_meta = {"step": 0, "played": played, "inputs": inputs, "wall_seconds": time.time() - start_time}
        writer.flush()
        save_checkpoint(run_dir / "resume.pt", {**meta, **progress_meta}, rng=rng_state)
        checkpointer.saved(run_dir)

    for draw in range(len(played), args.num_draws):
        torch.manual_seed(args.seed * 1000 + draw)
        order = np.random.default_rng([args.seed, draw]).permutation(valid_t)
        t = choose(order, draw)[: max(args.num_labels)]
        actions = torch.from_numpy(labels[t].astype(np.int64)).to(device)  # (n,)
        obs = torch.from_numpy(frames[t]).to(device)  # (n, 64, 64, 3)
        if args.decoder_features and not args.pseudo_labels:
            x, mean, std = outputs_of_policy(t), seen_mean, seen_std
        else:
            x, mean, std = idm_latents(t, args.latent_steps), latent_mean.repeat(args.latent_steps), latent_std.repeat(args.latent_steps)
        policies = []
        for n, method in tqdm(plan, unit="policy", desc=f"draw {draw + 1} of {args.num_draws}: fit", leave=False):
            if checkpointer.stop:
                save()
            if method == "lapo_decoder":
                decoder = fit(new_decoder(mean, std), x[:n], actions[:n], args.decoder_updates, *how)
                if args.pseudo_labels:  # decode what the IDM saw, then average over what may follow o_t, instead of the other way round
                    with torch.no_grad():
                        soft = decoder(unlabelled_z).softmax(-1)  # (65536, 15)
                    decoder = fit(new_decoder(seen_mean, seen_std), seen, soft, args.pseudo_updates, *how)
                decoded = DecodedPolicy(policy, decoder, features)
                if args.finetune != "none":
                    decoded.policy = copy.deepcopy(policy)
                    for part in [decoded.policy] if args.finetune == "all" else [decoded.policy.network.fc, decoded.policy.head]:
                        part.requires_grad_(True)
                    updates = max(args.finetune_updates, -(-args.finetune_epochs * n // args.bc_batch_size))
                    fit(decoded, obs[:n], actions[:n], updates, args.finetune_learning_rate, args.bc_batch_size, args, autocast)
                policies.append(decoded)
                if (n, draw) == (args.table_labels, 0):
                    save_checkpoint(run_dir / "checkpoint.pt", meta, policy=decoded.policy.state_dict(), decoder=decoder.state_dict())
            else:
                scratch = ScratchPolicy(bc_args["policy_scale"], bc_args["patch_size"]).to(device).to(memory_format=torch.channels_last)
                updates = max(args.bc_updates, -(-args.bc_epochs * n // args.bc_batch_size))
                policies.append(fit(scratch, obs[:n], actions[:n], updates, args.bc_learning_rate, args.bc_batch_size, args, autocast))
        film = run_dir / "lapo_decoder.gif" if args.capture_video and draw == 0 else None
        played.append(play(policies, episodes_per_draw, draw, film).tolist())
        print(f"draw {draw + 1} of {args.num_draws}: " + ", ".join(f"{method} {n}: {np.mean(r):.2f}" for (n, method), r in zip(plan, played[-1])))
        rng_state = get_rng_state()
        if checkpointer.due():
            save()
    returns = {(method, n): [of_draw[i] for of_draw in played] for i, (n, method) in enumerate(plan)}  # (num_draws, episodes_per_draw) each
    curve = []

    random_returns = play([lambda obs: torch.zeros(len(obs), 15, device=device)], max(100, args.eval_episodes), args.num_draws)[0]
    paper_random, paper_expert = PAPER_SCORES[args.env_id]

    def row(method, mean, stderr, episodes, **more):
        return {
            "method": method, **more, "return_mean": mean, "return_stderr": stderr, "episodes": episodes,
            "relative_return": (mean - paper_random) / (paper_expert - paper_random),
            "relative_to_demonstrator": (mean - random_returns.mean()) / (demonstrator["return_mean"] - random_returns.mean()),
        }  # fmt: skip

    for (method, n), r in returns.items():
        draws = np.mean(r, axis=1)  # the draw of the labels is the larger noise: the standard error is over draws
        curve.append(row(method, *mean_and_stderr(draws), int(np.size(r)), n_labels=n, draws=draws.tolist(), returns=r))
        for key in ("return_mean", "relative_return", "relative_to_demonstrator"):
            writer.add_scalar(f"{method}/{key}", curve[-1][key], n)
    table = [
        row("random", *mean_and_stderr(random_returns), len(random_returns), returns=random_returns.tolist()),
        *sorted((c for c in curve if c["n_labels"] == args.table_labels), key=lambda c: c["method"]),  # bc_from_scratch, lapo_decoder
        row("demonstrator", demonstrator["return_mean"], demonstrator["return_stderr"], demonstrator["episodes"]),
    ]
    wall = time.time() - start_time
    results = {
        "stage": "lapo_decode", "env_id": args.env_id, "seed": args.seed, "num_levels": num_levels, "start_level": start_level,
        "n_labels": args.table_labels, "num_draws": args.num_draws, "rows": table, "curve": curve, "wall_seconds": round(wall, 1),
        **origin,
    }  # fmt: skip
    write_aside(run_dir / "results.json", lambda f: f.write(json.dumps(results, indent=2).encode()))
    (run_dir / "resume.pt").unlink(missing_ok=True)
    writer.close()
    for title, rows in ((f"every label count, mean over {args.num_draws} draws", curve), (f"{args.table_labels} labels", table)):
        print(f"\n{args.env_id}, {title}")
        print(f"{'method':16s} {'labels':>6s} {'return':>16s} {'episodes':>9s} {'relative return':>16s} {'relative to demonstrator':>25s}")
        for r in rows:
            score = f"{r['return_mean']:8.2f} +- {r['return_stderr']:4.2f} {r['episodes']:9d} {r['relative_return']:16.2f}"
            print(f"{r['method']:16s} {r.get('n_labels', ''):6} {score} {r['relative_to_demonstrator']:25.2f}")
    print(f"wrote {run_dir}; next: python lapo_finetune_ppo.py --env-id {args.env_id}" + same_place(args, "runs_dir", "seed"))
