# /// script
# requires-python = ">=3.10,<3.13"
# dependencies = ["torch==2.13.0", "numpy<2", "tyro", "tensorboard", "tqdm"]
# ///
"""LAPO, stage 3 of 5: clone a policy in the latent action space (paper section 4.2).

The frozen IDM of stage 2 labels every transition with a latent action, the continuous one before quantisation; a policy that
sees o_t alone learns to predict it:

    loss    MSE(pi(o_t), IDM(o_{t-1}, o_t, o_{t+1}))

Still no true action anywhere. The labels are computed once, to RUN_DIR/latents.npy, and read from there at every epoch.

Reads data/ENV_ID and runs/ENV_ID__lapo_pretrain__SEED/checkpoint.pt, writes runs/ENV_ID__lapo_bc__SEED/checkpoint.pt (policy and IDM).
    python lapo_bc.py --env-id bossfight
Next:
    python lapo_decode.py --env-id bossfight           (few labels, no environment)
    python lapo_finetune_ppo.py --env-id bossfight     (reinforcement learning)
"""

import contextlib
import copy
import fcntl
import hashlib
import json
import math
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
import zipfile
from dataclasses import asdict, dataclass
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.optim as optim
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm, trange

FORMAT_VERSION = 2  # of checkpoints
DATA_FORMAT_VERSION = 1  # of datasets
NOT_COMPARED = {"resume", "overwrite", "verify", "track", "wandb_project_name", "wandb_entity", "checkpoint_seconds"}  # may change when a run goes on
# numbers in checkpoints that networks are built from
SIZES = {"scale", "idm_scale", "policy_scale", "vq_num_codebooks", "vq_num_slots", "vq_dim"}
LOCKS = []  # open files, locked as long as this process lives


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
    """run the networks' forward pass in bfloat16 (parameters and loss stay float32); default: if that is faster on this machine"""
    track: bool = False
    """if toggled, this experiment is also tracked with Weights and Biases (`pip install wandb`)"""
    wandb_project_name: str = "lapo"
    """the wandb's project name"""
    wandb_entity: str | None = None
    """the entity (team) of wandb's project"""
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
    pretrain_checkpoint: str | None = None
    """the checkpoint of lapo_pretrain.py; default RUNS_DIR/ENV_ID__lapo_pretrain__SEED/checkpoint.pt"""
    allow_unfinished: bool = False
    """take the checkpoint of an unfinished run, too"""

    num_updates: int = 60_000
    """gradient steps"""
    batch_size: int = 128
    """transitions per step"""
    learning_rate: float = 2e-4
    """Adam's peak learning rate: 0.01x to 1x over the warm-up, then linearly to 0"""
    warmup_updates: int = 1000
    """length of the warm-up"""
    policy_scale: float = 4.0
    """width of the policy's IMPALA-CNN: 16, 32, 32 channels times this"""
    patch_size: Literal[1, 2, 4] = 1
    """pixels a side of the patches that the policy folds into channels; 1: the paper's, 2: twice the speed for the same width"""
    eval_every: int = 1000
    """updates between evaluations on test frames"""
    eval_frames: int = 4096
    """test frames in an evaluation"""


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


def allocate(path, dtype, shape):
    """A new memory-mapped .npy with its place on the disk taken, so that a full one shows now and not as a crash while writing."""
    try:
        array = np.lib.format.open_memmap(path, "w+", dtype, shape)
        with open(path, "r+b") as f:
            os.posix_fallocate(f.fileno(), 0, os.fstat(f.fileno()).st_size)
    except OSError as e:
        gb = np.dtype(dtype).itemsize * math.prod(shape) / 1e9
        sys.exit(f"error: {path} cannot be made ({e.strerror}), it takes {gb:.3g} GB: make room there, then run it again, without --overwrite")
    return array


def get_windows(frames, t, device):
    """Windows around t (B,) -> (B, 9, 64, 64) float in [-0.5, 0.5], channels-last: o_{t-1}, o_t, o_{t+1} stacked on channels."""
    # frames t-1, t, t+1 lie side by side in the file, so a view that overlaps itself makes each window a single copy of 36 KB
    triples = np.lib.stride_tricks.as_strided(frames, (len(frames) - 2, 3, 64, 64, 3), (frames.strides[0], *frames.strides))
    window = torch.cat(torch.from_numpy(triples[t - 1]).to(device).unbind(1), dim=-1)  # (B, 64, 64, 9) uint8
    return torch.add(torch.tensor(-0.5, device=device), window.permute(0, 3, 1, 2), alpha=1 / 255)  # x / 255 - 0.5 in one pass


def mean_and_std(array, chunk=65_536):
    """Mean and standard deviation of the rows of a memory-mapped array (N, D), two tensors (D,), read chunk by chunk."""
    sample = torch.from_numpy(array[:: max(1, len(array) // chunk)].copy())
    return sample.mean(0), sample.std(0) + 1e-6


def refuse_bad_numbers(run_dir, update, batch, numbers):
    """Ends the process before a loss or gradient that is not finite reaches the parameters or a checkpoint; notes the batch."""
    write_aside(run_dir / "bad_batch.json", lambda f: f.write(json.dumps({"update": update, "indices": np.asarray(batch).tolist()}).encode()))
    found = ", ".join(f"{name} {value}" for name, value in numbers.items())
    sys.exit(
        f"error: update {update} met numbers that are not finite ({found}); its batch is in {run_dir}/bad_batch.json, the checkpoint of the last "
        "good update is intact: lower the learning rate or try --no-bf16, with --overwrite, or (pretraining, cloning) look at these frames"
    )


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
    require(args, num_updates=1, batch_size=1, eval_every=1, eval_frames=1)
    data_dir = Path(args.data_dir or f"data/{args.env_id}")
    run_dir = Path(args.runs_dir) / f"{args.env_id}__{args.exp_name}__{args.seed}"
    if (run_dir / "results.json").exists() and not args.overwrite:
        sys.exit(f"error: {run_dir} already holds a finished run: add --overwrite to replace it, or choose another --exp-name or --seed")
    pretrain_path = args.pretrain_checkpoint or Path(args.runs_dir) / f"{args.env_id}__lapo_pretrain__{args.seed}" / "checkpoint.pt"
    made_by = f"python lapo_pretrain.py --env-id {args.env_id}" + same_place(args, "data_dir", "runs_dir", "seed")
    pretrained = load_checkpoint(pretrain_path, "lapo_pretrain", args, made_by, ("idm",))
    pretrain_args = pretrained["meta"]["args"]
    idm = load_network(
        lambda: IDM(pretrain_args["idm_scale"], num_latents(pretrain_args), pretrain_args["patch_size"]), pretrained["idm"], pretrain_path, made_by
    )
    latent_dim = idm.head.out_features
    data_meta = load_meta(data_dir, args.env_id)
    if args.verify:
        verify_dataset(data_dir, data_meta)
    train_frames, train_t = load_frames(data_dir, "train", data_meta)
    test_frames, test_t = load_frames(data_dir, "test", data_meta)
    for split, t in (("train", train_t), ("test", test_t)):
        if len(t) < args.batch_size:
            sys.exit(f"error: --batch-size {args.batch_size} exceeds the {len(t)} {split} windows of {data_dir}: lower it or collect more frames")

    inputs = {"--pretrain-checkpoint": checksum(pretrain_path), "--data-dir": checksum(data_dir / "meta.json")}
    writer, state = start_run(run_dir, args, inputs)

    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    device = (torch.accelerator.current_accelerator(check_available=True) if args.cuda else None) or torch.device("cpu")
    start_time = time.time() - (state["meta"]["wall_seconds"] if state else 0)

    idm = idm.to(device).to(memory_format=torch.channels_last).eval().requires_grad_(False)
    policy = LatentPolicy(args.policy_scale, latent_dim, args.patch_size).to(device).to(memory_format=torch.channels_last)
    optimizer = optim.Adam(policy.parameters(), lr=args.learning_rate, fused=True)

    trial, trial_obs = copy.deepcopy(policy), torch.from_numpy(train_frames[:16].copy()).to(device)

    def trial_step(autocast):
        with autocast:
            z = trial(trial_obs)
        z.square().mean().backward()

    autocast = choose_precision(args, device, trial_step)
    origin = provenance(args, device)
    print(f"{args.env_id}: {run_dir}, {origin['device_name']}, {'bfloat16' if args.bf16 else 'float32'}")

    def lr_factor(update):
        w = args.warmup_updates
        return float(np.interp(update, [0, w, max(w + 1, args.num_updates)], [0.01, 1.0, 0.0]))

    meta = {
        "stage": "lapo_bc", "env_id": args.env_id, "num_levels": data_meta["num_levels"], "start_level": data_meta["start_level"],
        "demonstrator": data_meta.get("demonstrator"), "data_dir": str(data_dir), "args": asdict(args), "pretrain_args": pretrain_args,
        "command": this_command(),
    }  # fmt: skip
    rng, checkpointer = np.random.default_rng(args.seed), Checkpointer(args.checkpoint_seconds)
    modules = {"policy": policy, "optimizer": optimizer}
    first_update, curve, labelled = 0, [], 0
    if state:
        with refusing_damage(run_dir / "resume.pt"):
            for name, module in modules.items():
                module.load_state_dict(state[name])
            set_rng_state(state["rng"], rng)
            first_update, curve, labelled = (state["meta"][k] for k in ("step", "curve", "labelled"))

    def save(step, labelled):
        if step:  # the IDM travels along: decoding and fine-tuning label transitions with it
            states = {"policy": policy.state_dict(), "idm": idm.state_dict(), "latent_mean": latent_mean, "latent_std": latent_std}
            save_checkpoint(run_dir / "checkpoint.pt", {**meta, "updates": step, "unfinished": step < args.num_updates}, **states)
        # this last: a run that goes on from here writes the other file again
        states = {name: module.state_dict() for name, module in modules.items()}
        progress_meta = {"step": step, "curve": curve, "labelled": labelled, "inputs": inputs, "wall_seconds": time.time() - start_time}
        writer.flush()
        save_checkpoint(run_dir / "resume.pt", {**meta, **progress_meta}, rng=get_rng_state(rng), **states)
        checkpointer.saved(run_dir)

    @torch.inference_mode()
    def label(frames, ts, out, start=0, save=None):
        """IDM latents of the windows around ts, written to out (len(ts), latent_dim)."""
        for i in trange(start, len(ts), 512, unit="batch", desc="label", mininterval=1, leave=False):
            with autocast:
                out[i : i + 512] = idm(get_windows(frames, ts[i : i + 512], device)).cpu().numpy()
            forget_pages(frames)
            if save and checkpointer.due():
                out.flush()
                save(0, i + 512)
        return out

    latents_path, shape = run_dir / "latents.npy", (len(train_t), latent_dim)  # in order of train_t
    try:
        train_z = np.lib.format.open_memmap(latents_path, "r+") if labelled else None
    except (OSError, ValueError):
        train_z = None
    if train_z is None or (train_z.shape, train_z.dtype) != (shape, np.float32):  # nothing labelled yet, or the file is gone
        labelled, train_z = 0, allocate(latents_path, np.float32, shape)
    label(train_frames, train_t, train_z, labelled, None if first_update else save)  # its states are of update 0
    train_z.flush()
    labelled = len(train_t)
    latent_mean, latent_std = mean_and_std(train_z)
    test_t = np.sort(np.random.default_rng(0).permutation(test_t)[: args.eval_frames])
    test_z = torch.from_numpy(label(test_frames, test_t, np.zeros((len(test_t), latent_dim), dtype=np.float32)))
    mean_mse = F.mse_loss(latent_mean.expand_as(test_z), test_z).item()

    @torch.inference_mode()
    def evaluate():
        """MSE(pi(o_t), z_t) on test frames."""
        with autocast:
            z = [policy(torch.from_numpy(test_frames[t]).to(device)).cpu() for t in np.array_split(test_t, -(-len(test_t) // 512))]
        return F.mse_loss(torch.cat(z), test_z).item()

    progress = tqdm(range(first_update, args.num_updates), initial=first_update, total=args.num_updates, unit="update", desc="clone", mininterval=1)
    for update in progress:
        optimizer.param_groups[0]["lr"] = args.learning_rate * lr_factor(update)
        i = torch.randint(len(train_t), (args.batch_size,)).numpy()
        with autocast:
            z = policy(torch.from_numpy(train_frames[train_t[i]]).to(device))
        loss = F.mse_loss(z, torch.from_numpy(train_z[i]).to(device))
        optimizer.zero_grad()
        loss.backward()
        grad_norm = nn.utils.get_total_norm([p.grad for p in policy.parameters() if p.grad is not None])
        if not torch.isfinite(grad_norm + loss.detach()):
            refuse_bad_numbers(run_dir, update, train_t[i], {"loss": loss.item(), "gradient norm": grad_norm.item()})
        optimizer.step()

        step = update + 1
        if step % 50 == 0 or step == 1:
            forget_pages(train_frames)
            forget_pages(train_z)
            writer.add_scalar("losses/latent_mse", loss.item(), step)
            writer.add_scalar("charts/learning_rate", optimizer.param_groups[0]["lr"], step)
            writer.add_scalar("charts/SPS", (progress.format_dict["rate"] or 0) * args.batch_size, step)
        if step % args.eval_every == 0 or step == args.num_updates:
            test_mse = evaluate()
            writer.add_scalar("test/latent_mse", test_mse, step)
            writer.add_scalar("test/mean_latent_mse", mean_mse, step)
            curve.append({"update": step, "train/latent_mse": loss.item(), "test/latent_mse": test_mse, "test/mean_latent_mse": mean_mse})
            progress.set_postfix_str(f"test MSE {test_mse:.3g} (mean latent {mean_mse:.3g})")
        if checkpointer.due() or step == args.num_updates:
            save(step, labelled)
    if first_update == args.num_updates:  # interrupted after the last update
        test_mse = evaluate()

    wall = time.time() - start_time
    results = {
        "stage": "lapo_bc", "env_id": args.env_id, "seed": args.seed, "updates": args.num_updates, "test/latent_mse": test_mse,
        "test/mean_latent_mse": mean_mse, "curve": curve, "samples_per_second": round(args.num_updates * args.batch_size / wall, 1),
        "wall_seconds": round(wall, 1), **origin,
    }  # fmt: skip
    write_aside(run_dir / "results.json", lambda f: f.write(json.dumps(results, indent=2).encode()))
    (run_dir / "resume.pt").unlink(missing_ok=True)
    writer.close()
    print(f"latent MSE on test frames {test_mse:.3g}, predicting the mean latent {mean_mse:.3g}")
    places = same_place(args, "data_dir"), same_place(args, "runs_dir", "seed")
    print(f"wrote {run_dir}; next: python lapo_decode.py --env-id {args.env_id}{places[0]}{places[1]}")
    print(f"or: python lapo_finetune_ppo.py --env-id {args.env_id}{places[1]}")
