# /// script
# requires-python = ">=3.10,<3.13"
# dependencies = ["torch==2.13.0", "procgen-mirror==0.10.7", "gym==0.26.2", "numpy<2", "tyro", "tensorboard", "tqdm", "pillow"]
# ///
"""LAPO, stage 5 of 5, online: fine-tune the cloned latent policy with PPO and an online decoder (paper sections 4.3 and 6.1-6.3).

    RL+SL (default)   logits = (action head + decoder(latent policy)) / 2; the decoder learns from the agent's own transitions, labelled by the IDM
    --no-sl           the action head alone, on the cloned features (paper: "RL, no SL"; after lapo_pretrain.py --no-vq its "no-VQ")
    --from-scratch    PPO on a fresh network of the same size

The convolutions of the cloned policy stay frozen, so their features are computed once, in the rollout, and PPO trains on those.

Reads runs/ENV_ID__lapo_bc__SEED/checkpoint.pt, writes runs/ENV_ID__lapo_finetune_ppo[_no_sl|_from_scratch]__SEED/{results.json,checkpoint.pt}.
    python lapo_finetune_ppo.py --env-id bossfight
"""

import contextlib
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
from collections import deque
from dataclasses import asdict, dataclass
from importlib.metadata import packages_distributions, version
from pathlib import Path

import gym_notices.notices
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.optim as optim
import tyro
from PIL import Image, ImageDraw, ImageFont
from torch.distributions.categorical import Categorical
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

gym_notices.notices.notices.clear()  # else procgen's import of gym prints four lines about gym's future
from procgen import ProcgenGym3Env  # noqa: E402
from procgen.env import ENV_NAMES  # noqa: E402

FORMAT_VERSION = 2  # of checkpoints
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
    exp_name: str | None = None
    """the name of this experiment; default lapo_finetune_ppo, with _no_sl or _from_scratch; the run folder is RUNS_DIR/ENV_ID__EXP_NAME__SEED"""
    seed: int = 1
    """seed of the experiment"""
    torch_deterministic: bool = True
    """if toggled, `torch.backends.cudnn.deterministic=True`"""
    cuda: bool = True
    """if toggled, cuda (or another accelerator that torch knows) is used when there is one"""
    bf16: tyro.conf.DisallowNone[bool | None] = None
    """run the convolutions in bfloat16 (parameters, linear layers and losses stay float32); default: if that is faster on this machine"""
    track: bool = False
    """if toggled, this experiment is also tracked with Weights and Biases (`pip install wandb`)"""
    wandb_project_name: str = "lapo"
    """the wandb's project name"""
    wandb_entity: str | None = None
    """the entity (team) of wandb's project"""
    capture_video: bool = False
    """write a GIF of the final policy, with the actions it takes, to the run folder"""
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
    bc_checkpoint: str | None = None
    """the checkpoint of lapo_bc.py; default RUNS_DIR/ENV_ID__lapo_bc__SEED/checkpoint.pt"""
    allow_unfinished: bool = False
    """take the checkpoint of an unfinished run, too"""
    sl: bool = True
    """the online decoder; --no-sl is the paper's ablation"""
    from_scratch: bool = False
    """PPO on a fresh network, all of it trained; reads no checkpoint but for the levels and the width, and none if both are given"""

    total_timesteps: int = 4_000_000
    """frames of training"""
    num_envs: int = 64
    """parallel games"""
    num_steps: int = 64
    """steps in each game per rollout"""
    num_minibatches: int = 8
    """minibatches per epoch"""
    micro_batch_size: int | None = None
    """a minibatch's gradient is added up over pieces of this size, same numbers; default: 128 on a CPU (fits its cache), all at once on a GPU"""
    update_epochs: int = 3
    """epochs over each rollout"""
    gamma: float = 0.999
    """the discount factor"""
    gae_lambda: float = 0.95
    """the lambda of the generalised advantage estimation"""
    norm_adv: bool = True
    """normalise the advantages per minibatch"""
    clip_coef: float = 0.2
    """the surrogate clipping coefficient"""
    clip_vloss: bool = True
    """clip the value loss too"""
    ent_coef: float = 0.0025
    """coefficient of the entropy bonus"""
    vf_coef: float = 0.5
    """coefficient of the value loss"""
    max_grad_norm: float = 0.5
    """the maximum norm of the gradient"""

    learning_rate: float = 1e-2
    """Adam's base rate, of which each part gets a share that rises over its warm-up and then falls linearly to 0 at the end"""
    action_head_warmup: tuple[int, int] = (35_000, 50_000)
    """frames over which the action head's rate rises from 0 to a quarter of the base rate"""
    value_head_warmup: tuple[int, int] = (25_000, 50_000)
    """frames over which the value head's rate rises from 0 to a quarter of the base rate"""
    linear_warmup: tuple[int, int] = (50_000, 200_000)
    """frames over which the rate of the trained Linear(., 256) rises from 0 to a tenth of the base rate"""
    scratch_learning_rate: float = 5e-4
    """Adam's constant rate with --from-scratch (CleanRL's for Procgen)"""
    policy_scale: float | None = None
    """width of the IMPALA-CNN with --from-scratch; default: that of the cloned policy"""

    decoder_hidden: tuple[int, ...] = (192, 128, 64)
    """hidden widths of the decoder"""
    decoder_frames: tuple[int, int] = (10_000, 400_000)
    """frames between which the decoder is refit, from a fresh start, on all (latent, true action) pairs so far"""
    decoder_every_update_until: int = 50_000
    """frames up to which it is refit after every PPO update; then after every 20th"""
    decoder_epochs: int = 3
    """epochs of a refit"""
    decoder_batch_size: int = 512
    """batch size of a refit"""
    decoder_learning_rate: float = 1e-3
    """Adam's learning rate in a refit"""
    label_smoothing: float = 0.05
    """label smoothing of the decoder's cross-entropy"""
    eval_episodes: int = 200
    """episodes over which the final policy, and random play, are scored"""


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


class Agent(nn.Module):
    """PPO's actor-critic; with latent_dim, also the frozen latent policy and the decoder (paper figure 3).

    obs -> network.conv (frozen) -+- frozen_fc -> latent_head (frozen) -> decoder -+- mean -> action logits
                                  '- network.fc (trained) -+- actor ---------------'
                                                           '- critic -> value
    """

    def __init__(self, scale, patch_size=1, latent_dim=None, decoder_hidden=(), num_actions=15):
        super().__init__()
        self.network = ImpalaCNN(3, scale, patch_size)
        self.actor = nn.Linear(256, num_actions)
        self.critic = nn.Linear(256, 1)
        if latent_dim:
            nn.init.zeros_(self.actor.weight)
            self.frozen_fc = nn.Linear(self.network.fc.in_features, 256)
            self.latent_head = nn.Linear(256, latent_dim)
            self.decoder = Decoder(latent_dim, decoder_hidden)
        else:
            nn.init.orthogonal_(self.actor.weight, 0.01)
            nn.init.orthogonal_(self.critic.weight, 1.0)
            nn.init.zeros_(self.critic.bias)
        nn.init.zeros_(self.actor.bias)

    def features(self, obs):
        """(B, 64, 64, 3) uint8 -> (B, 32 * scale * (8 / P)^2). HWC memory seen as (B, 3, 64, 64) is channels-last already: no copy."""
        return self.network.conv(obs.permute(0, 3, 1, 2).float() / 255 - 0.5).float()

    def decoder_logits(self, features):
        return self.decoder(self.latent_head(torch.relu(self.frozen_fc(features))))  # (B, 15)

    def forward(self, features):
        hidden = torch.relu(self.network.fc(features))  # (B, 256)
        return self.actor(hidden), self.critic(hidden).squeeze(-1)  # (B, 15), (B,)


class RewardNormalizer:
    """Divides rewards by the running standard deviation of the discounted return, clipped to +-10 (gym's NormalizeReward)."""

    def __init__(self, num_envs, gamma):
        self.gamma, self.returns = gamma, np.zeros(num_envs)
        self.mean, self.var, self.count = 0.0, 1.0, 1e-4

    def __call__(self, reward, done):
        self.returns = self.returns * self.gamma + reward
        # Chan et al.'s parallel update of mean and variance
        mean, var, n = self.returns.mean(), self.returns.var(), len(self.returns)
        delta, total = mean - self.mean, self.count + n
        self.var = (self.var * self.count + var * n + delta**2 * self.count * n / total) / total
        self.mean, self.count = self.mean + delta * n / total, total
        self.returns[done] = 0.0
        return np.clip(reward / np.sqrt(self.var + 1e-8), -10, 10)

    def state_dict(self):
        return {"returns": torch.tensor(self.returns), "mean": float(self.mean), "var": float(self.var), "count": float(self.count)}

    def load_state_dict(self, state):
        self.returns = state["returns"].numpy().copy()
        self.mean, self.var, self.count = state["mean"], state["var"], state["count"]


def compute_gae(rewards, values, dones, next_value, next_done, gamma, gae_lambda):
    """Generalised advantage estimation (Schulman et al. 2016). All (T, E); dones[t] says that obs[t] begins an episode."""
    advantages = torch.zeros_like(rewards)
    lastgaelam = 0
    for t in reversed(range(len(rewards))):
        nextnonterminal = 1.0 - (next_done if t == len(rewards) - 1 else dones[t + 1])
        nextvalues = next_value if t == len(rewards) - 1 else values[t + 1]
        delta = rewards[t] + gamma * nextvalues * nextnonterminal - values[t]
        advantages[t] = lastgaelam = delta + gamma * gae_lambda * nextnonterminal * lastgaelam
    return advantages


def refuse_bad_numbers(run_dir, update, batch, numbers):
    """Ends the process before a loss or gradient that is not finite reaches the parameters or a checkpoint; notes the batch."""
    write_aside(run_dir / "bad_batch.json", lambda f: f.write(json.dumps({"update": update, "indices": np.asarray(batch).tolist()}).encode()))
    found = ", ".join(f"{name} {value}" for name, value in numbers.items())
    sys.exit(
        f"error: update {update} met numbers that are not finite ({found}); its batch is in {run_dir}/bad_batch.json, the checkpoint of the last "
        "good update is intact: lower the learning rate or try --no-bf16, with --overwrite, or (pretraining, cloning) look at these frames"
    )


def ppo_loss(logits, newvalue, actions, logprobs, advantages, returns, values, args):
    """PPO's clipped loss (Schulman et al. 2017, equation 9) of logits (B, 15) and the rest (B,), a mean; and detached, what is logged of it."""
    action_dist = Categorical(logits=logits)
    logratio = action_dist.log_prob(actions) - logprobs
    ratio = logratio.exp()
    pg_loss = torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)).mean()
    v_loss = (newvalue - returns) ** 2
    if args.clip_vloss:
        v_clipped = values + (newvalue - values).clamp(-args.clip_coef, args.clip_coef)
        v_loss = torch.max(v_loss, (v_clipped - returns) ** 2)
    v_loss, entropy_loss = 0.5 * v_loss.mean(), action_dist.entropy().mean()
    approx_kl = ((ratio - 1) - logratio).mean()  # http://joschu.net/blog/kl-approx.html
    clipfrac = ((ratio - 1.0).abs() > args.clip_coef).float().mean()
    loss = pg_loss - args.ent_coef * entropy_loss + args.vf_coef * v_loss
    return loss, torch.stack([pg_loss, v_loss, entropy_loss, approx_kl, clipfrac]).detach()


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


def checksum(path):
    """BLAKE2b of a file, read in pieces."""
    digest = hashlib.blake2b()
    with open(path, "rb") as f:
        while piece := f.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


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


def lr_share(frames, warmup, peak, total):
    """Share of the base rate after `frames` frames: 0 until warmup[0], linearly to `peak` at warmup[1], linearly to 0 at `total`."""
    return float(np.interp(frames, [*warmup, total], [0.0, peak, 0.0]))


def fit_decoder(decoder, z, actions, args):
    """Re-initialises the decoder and fits it on latents z (n, latent_dim) and the true actions (n,). Returns the last epoch's accuracy."""
    for layer in decoder.mlp:
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    decoder.requires_grad_(True)
    optimizer = optim.Adam(decoder.parameters(), lr=args.decoder_learning_rate)
    for _ in range(args.decoder_epochs):
        correct = 0
        for batch in torch.randperm(len(z), device=z.device).split(args.decoder_batch_size):
            logits = decoder(z[batch])
            correct += (logits.argmax(-1) == actions[batch]).sum().item()
            loss = F.cross_entropy(logits, actions[batch], label_smoothing=args.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    decoder.requires_grad_(False)
    return correct / len(z)


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
    require(args, num_envs=1, num_steps=1, num_minibatches=1, micro_batch_size=1, update_epochs=1)
    require(args, decoder_epochs=1, decoder_batch_size=1, eval_episodes=2)
    batch_size = args.num_envs * args.num_steps
    if batch_size % args.num_minibatches:
        sys.exit(f"error: --num-minibatches {args.num_minibatches} does not divide num_envs x num_steps = {batch_size}: choose a divisor")
    for name in () if args.from_scratch else ("action_head_warmup", "value_head_warmup", "linear_warmup"):
        start, end = getattr(args, name)
        if not 0 <= start < end < args.total_timesteps:
            found = f"--{name.replace('_', '-')} {start} {end}"
            sys.exit(f"error: {found} must rise and end before --total-timesteps {args.total_timesteps}: train longer or shorten it")
    use_decoder = args.sl and not args.from_scratch
    num_iterations = max(1, args.total_timesteps // batch_size)
    # the updates after which the decoder is refit; not the last, as PPO could not adapt the policy to a new decoder any more before it is scored
    refits = [
        i for i, step in enumerate(range(batch_size, num_iterations * batch_size, batch_size))
        if args.decoder_frames[0] <= step <= args.decoder_frames[1] and (step <= args.decoder_every_update_until or (i + 1) % 20 == 0)
    ]  # fmt: skip
    if use_decoder and not refits:
        found = f"--decoder-frames {args.decoder_frames[0]} {args.decoder_frames[1]} hold no PPO update of {batch_size} frames but the last"
        sys.exit(f"error: {found}, so that the decoder would never be fitted: widen them, train longer, or add --no-sl")
    exp_name = args.exp_name or os.path.basename(__file__)[: -len(".py")] + ("_from_scratch" if args.from_scratch else "" if args.sl else "_no_sl")
    run_dir = Path(args.runs_dir) / f"{args.env_id}__{exp_name}__{args.seed}"
    if (run_dir / "results.json").exists() and not args.overwrite:
        sys.exit(f"error: {run_dir} already holds a finished run: add --overwrite to replace it, or choose another --exp-name or --seed")
    policy_scale, patch_size, num_levels, start_level, demonstrator = args.policy_scale, 1, args.num_levels, args.start_level, None
    if not args.from_scratch or policy_scale is None or num_levels is None:
        bc_path = args.bc_checkpoint or Path(args.runs_dir) / f"{args.env_id}__lapo_bc__{args.seed}" / "checkpoint.pt"
        parts = ("policy", "idm", "latent_mean", "latent_std")
        made_by = f"python lapo_bc.py --env-id {args.env_id}" + same_place(args, "runs_dir", "seed")
        cloned = load_checkpoint(bc_path, "lapo_bc", args, made_by, parts)
        if not args.from_scratch or policy_scale is None:
            policy_scale, patch_size = (cloned["meta"]["args"].get(key) for key in ("policy_scale", "patch_size"))
        num_levels = cloned["meta"]["num_levels"] if num_levels is None else num_levels
        start_level = cloned["meta"]["start_level"] if start_level is None else start_level
        demonstrator = cloned["meta"].get("demonstrator")
        if demonstrator and not (isinstance(demonstrator, dict) and isinstance(demonstrator.get("return_mean"), (int, float))):
            sys.exit(f"error: the demonstrator's score in {bc_path} has no return_mean: make it again with `{made_by}`")
        pretrain_args = cloned["meta"].get("pretrain_args")
        idm = load_network(
            lambda: IDM(pretrain_args["idm_scale"], num_latents(pretrain_args), pretrain_args["patch_size"]), cloned["idm"], bc_path, made_by
        )
        latent_dim = idm.head.out_features
        if not args.from_scratch:
            policy = load_network(lambda: LatentPolicy(policy_scale, latent_dim, patch_size), cloned["policy"], bc_path, made_by)
            latent_mean, latent_std = load_vectors(cloned, ("latent_mean", "latent_std"), latent_dim, bc_path, made_by)
    start_level = start_level or 0

    inputs = {} if args.from_scratch else {"--bc-checkpoint": checksum(bc_path)}
    writer, state = start_run(run_dir, args, inputs)

    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    device = (torch.accelerator.current_accelerator(check_available=True) if args.cuda else None) or torch.device("cpu")
    start_time = time.time() - (state["meta"]["wall_seconds"] if state else 0)

    if args.from_scratch:
        agent = Agent(policy_scale, patch_size).to(device).to(memory_format=torch.channels_last)
        optimizer = optim.Adam(agent.parameters(), lr=args.scratch_learning_rate, eps=1e-5, fused=True)
    else:
        agent = Agent(policy_scale, patch_size, latent_dim, args.decoder_hidden).to(device).to(memory_format=torch.channels_last)
        agent.network.load_state_dict(policy.network.state_dict())
        agent.critic.load_state_dict(policy.critic.state_dict())
        agent.frozen_fc.load_state_dict(policy.network.fc.state_dict())
        agent.latent_head.load_state_dict(policy.head.state_dict())
        agent.decoder.mean.copy_(latent_mean)
        agent.decoder.std.copy_(latent_std)
        for frozen in (agent.network.conv, agent.frozen_fc, agent.latent_head, agent.decoder):
            frozen.requires_grad_(False)
        optimizer = optim.Adam(
            [
                {"params": agent.actor.parameters(), "warmup": args.action_head_warmup, "peak": 0.25},
                {"params": agent.critic.parameters(), "warmup": args.value_head_warmup, "peak": 0.25},
                {"params": agent.network.fc.parameters(), "warmup": args.linear_warmup, "peak": 0.1},
            ],
            lr=0.0, eps=1e-5, fused=True,
        )  # fmt: skip
        idm = idm.to(device).to(memory_format=torch.channels_last).eval().requires_grad_(False)
    trained = [p for p in agent.parameters() if p.requires_grad]
    trial_obs = torch.zeros((args.num_envs, 64, 64, 3), dtype=torch.uint8, device=device)

    @torch.inference_mode()
    def trial_step(autocast):
        with autocast:
            agent.features(trial_obs)

    autocast = choose_precision(args, device, trial_step)
    origin = provenance(args, device)
    print(f"{args.env_id}: {run_dir}, {origin['device_name']}, {'bfloat16' if args.bf16 else 'float32'}")
    meta = {"stage": "lapo_finetune_ppo", "env_id": args.env_id, "num_levels": num_levels, "start_level": start_level, "args": asdict(args)}
    if not args.from_scratch:
        meta["pretrain_args"] = pretrain_args
    decoder_ready = False  # until its first fit the decoder's logits count as 0: play is uniformly random
    pairs_z, pairs_a = [], []  # the decoder's data: latents (n, latent_dim) and true actions (n,), 512 windows an entry

    def split_logits(features):
        """(what the decoder adds to the logits (B, 15), the action head's share)."""
        return (agent.decoder_logits(features) / 2 if decoder_ready else 0.0), (0.5 if use_decoder else 1.0)

    env = make_env(args.env_id, args.num_envs, num_levels, start_level, args.seed)
    normalize_reward = RewardNormalizer(args.num_envs, args.gamma)
    T, E = args.num_steps, args.num_envs
    micro_batch_size = args.micro_batch_size or (128 if device.type == "cpu" else batch_size)
    obs = torch.zeros((T, E, 64, 64, 3), dtype=torch.uint8, device=device)
    features = None if args.from_scratch else torch.zeros((T, E, agent.network.fc.in_features), device=device)
    actions = torch.zeros((T, E), dtype=torch.long, device=device)
    offsets = torch.zeros((T, E, 15), device=device)  # the decoder's part of the logits, constant during a PPO update
    logprobs, rewards, dones, values = (torch.zeros((T, E), device=device) for _ in range(4))
    next_obs, next_done = torch.tensor(env.observe()[1]["rgb"], device=device), torch.ones(E, device=device)
    last_obs = next_obs  # o_{t-1} of the rollout's first step
    episode_return, recent_returns, curve, first_iteration = np.zeros(E), deque(maxlen=100), [], 0
    checkpointer = Checkpointer(args.checkpoint_seconds)
    modules = {"agent": agent, "optimizer": optimizer, "normalize_reward": normalize_reward}
    if state:
        with refusing_damage(run_dir / "resume.pt"):
            for name, module in modules.items():
                module.load_state_dict(state[name])
            set_env_state(env, state["env"])
            set_rng_state(state["rng"])
            next_obs, next_done, last_obs = (state[k].to(device) for k in ("next_obs", "next_done", "last_obs"))
            pairs_z, pairs_a = ([x.to(device) for x in state[k]] for k in ("pairs_z", "pairs_a"))
            first_iteration, curve, decoder_ready = (state["meta"][k] for k in ("iteration", "curve", "decoder_ready"))
            episode_return = state["episode_return"].numpy()
            recent_returns.extend(state["recent_returns"].tolist())
    frames = num_iterations * batch_size
    progress = tqdm(total=frames, initial=first_iteration * batch_size, unit="frame", unit_scale=True, desc=exp_name, mininterval=1)

    for iteration in range(first_iteration, num_iterations):
        frames_before = iteration * batch_size
        for group in optimizer.param_groups if not args.from_scratch else []:
            group["lr"] = args.learning_rate * lr_share(frames_before, group["warmup"], group["peak"], args.total_timesteps)

        # rollout
        for t in range(T):
            obs[t], dones[t] = next_obs, next_done
            with torch.inference_mode():
                with autocast:
                    x = agent.features(next_obs)
                if features is not None:
                    features[t] = x
                logits, values[t] = agent(x)
                offsets[t], share = split_logits(x)
                action_dist = Categorical(logits=share * logits + offsets[t])
                actions[t] = action_dist.sample()
                logprobs[t] = action_dist.log_prob(actions[t])
            env.act(actions[t].cpu().numpy().astype(np.int32))
            reward, next_ob, first = env.observe()
            next_obs = torch.tensor(next_ob["rgb"], device=device)
            next_done = torch.tensor(first, dtype=torch.float32, device=device)
            rewards[t] = torch.tensor(normalize_reward(reward, first), dtype=torch.float32, device=device)
            episode_return += reward
            recent_returns.extend(episode_return[first])
            episode_return[first] = 0

        with torch.inference_mode():
            with autocast:
                x = agent.features(next_obs)
            next_value = agent(x)[1]
        advantages = compute_gae(rewards, values, dones, next_value, next_done, args.gamma, args.gae_lambda)
        returns = advantages + values

        # update
        b_inputs = (obs if args.from_scratch else features).flatten(0, 1)
        b_actions, b_logprobs, b_offsets = actions.flatten(), logprobs.flatten(), offsets.flatten(0, 1)
        b_advantages, b_returns, b_values = advantages.flatten(), returns.flatten(), values.flatten()
        logged = []
        for _ in range(args.update_epochs):
            for mb in torch.randperm(batch_size, device=device).chunk(args.num_minibatches):
                mb_advantages = b_advantages[mb]
                if args.norm_adv:
                    mb_advantages = (mb_advantages - mb_advantages.mean()) / (mb_advantages.std() + 1e-8)
                optimizer.zero_grad()
                for i, adv in zip(mb.split(micro_batch_size), mb_advantages.split(micro_batch_size)):
                    x = b_inputs[i]
                    if args.from_scratch:
                        with autocast:
                            x = agent.features(x)
                    logits, newvalue = agent(x)
                    logits = share * logits + b_offsets[i]
                    loss, stats = ppo_loss(logits, newvalue, b_actions[i], b_logprobs[i], adv, b_returns[i], b_values[i], args)
                    (loss * len(i) / len(mb)).backward()  # gradients add up to those of the minibatch's mean
                    logged.append(stats)
                grad_norm = nn.utils.clip_grad_norm_(trained, args.max_grad_norm)
                if not torch.isfinite(grad_norm):
                    refuse_bad_numbers(run_dir, iteration, mb.cpu(), {"loss": loss.item(), "gradient norm": grad_norm.item()})
                optimizer.step()

        # decoder: the IDM labels the rollout's transitions, windows within one episode only
        global_step = (iteration + 1) * batch_size
        if use_decoder and iteration <= refits[-1]:
            stream = torch.cat([last_obs[None], obs, next_obs[None]])  # (T + 2, E, 64, 64, 3); obs[t] is stream[t + 1]
            valid = (dones + torch.cat([dones[1:], next_done[None]]) == 0).nonzero()  # (n, 2): o_t and o_{t+1} continue an episode
            with torch.inference_mode(), autocast:
                for t, e in (chunk.unbind(1) for chunk in valid.split(512)):
                    window = torch.cat([stream[t, e], stream[t + 1, e], stream[t + 2, e]], dim=-1)  # (B, 64, 64, 9) uint8
                    pairs_z.append(idm(window.permute(0, 3, 1, 2).float() / 255 - 0.5))
                    pairs_a.append(actions[t, e])
            if iteration in refits and pairs_z:
                accuracy = fit_decoder(agent.decoder, torch.cat(pairs_z), torch.cat(pairs_a), args)
                decoder_ready = True
                writer.add_scalar("decoder/accuracy", accuracy, global_step)
            if iteration == refits[-1]:
                pairs_z, pairs_a = [], []  # of no use any more
        last_obs = obs[-1].clone()

        # logs
        progress.update(batch_size)
        if recent_returns:
            curve.append((global_step, float(np.mean(recent_returns))))
            writer.add_scalar("charts/episodic_return", curve[-1][1], global_step)
            progress.set_postfix_str(f"return {curve[-1][1]:.2f}")
        writer.add_scalar("charts/SPS", progress.format_dict["rate"] or 0, global_step)
        for name, group in zip(("action_head", "value_head", "linear"), optimizer.param_groups):
            writer.add_scalar(f"charts/learning_rate_{name}", group["lr"], global_step)
        stats = torch.stack(logged).mean(0).tolist()
        for name, value in zip(("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac"), stats):
            writer.add_scalar(f"losses/{name}", value, global_step)
        explained = 1 - (b_returns - b_values).var() / b_returns.var()
        writer.add_scalar("losses/explained_variance", explained.item(), global_step)
        if checkpointer.due() or iteration == num_iterations - 1:
            # first this, then resume.pt: a run that goes on from there writes this file again
            save_checkpoint(
                run_dir / "checkpoint.pt", {**meta, "frames": global_step, "unfinished": iteration < num_iterations - 1}, agent=agent.state_dict()
            )
            states = {name: module.state_dict() for name, module in modules.items()}
            states |= {"next_obs": next_obs, "next_done": next_done, "last_obs": last_obs, "pairs_z": pairs_z, "pairs_a": pairs_a}
            states |= {"env": get_env_state(env), "rng": get_rng_state()}
            states |= {"episode_return": torch.tensor(episode_return), "recent_returns": torch.tensor(list(recent_returns), dtype=torch.float64)}
            progress_meta = {"step": global_step, "iteration": iteration + 1, "decoder_ready": decoder_ready, "curve": curve}
            progress_meta |= {"inputs": inputs, "wall_seconds": time.time() - start_time}
            writer.flush()
            save_checkpoint(run_dir / "resume.pt", {**meta, **progress_meta}, **states)
            checkpointer.saved(run_dir)
    progress.close()
    env.close()

    generator = torch.Generator(device).manual_seed(args.seed)

    def play(logits_of, gif=None):
        """Returns (eval_episodes,) of the policy that samples from softmax(logits_of(obs))."""

        @torch.inference_mode()
        def act(obs, episode):
            if checkpointer.stop:
                checkpointer.saved(run_dir)  # as it was after the last update
            logits = logits_of(torch.as_tensor(obs, device=device))
            return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1).cpu().numpy().astype(np.int32)

        env = make_env(args.env_id, min(args.num_envs, args.eval_episodes), num_levels, start_level, args.seed + 1000)
        returns = evaluate(act, env, args.eval_episodes, gif)
        env.close()
        return returns

    def agent_logits(obs):
        with autocast:
            x = agent.features(obs)
        offset, share = split_logits(x)
        return share * agent(x)[0] + offset

    print(f"scoring the final policy over {args.eval_episodes} episodes ...")
    scores = play(agent_logits, run_dir / "agent.gif" if args.capture_video else None)
    random_mean = play(lambda obs: torch.zeros(len(obs), 15, device=device)).mean()
    mean, stderr = mean_and_stderr(scores)
    paper_random, paper_expert = PAPER_SCORES[args.env_id]
    relative_return = (mean - paper_random) / (paper_expert - paper_random)
    relative_to_demonstrator = float((mean - random_mean) / (demonstrator["return_mean"] - random_mean)) if demonstrator else None
    wall = time.time() - start_time
    results = {
        "stage": "lapo_finetune_ppo", "method": exp_name, "env_id": args.env_id, "seed": args.seed, "num_levels": num_levels,
        "start_level": start_level, "frames": frames, "return_mean": mean, "return_stderr": stderr,
        "episodes": args.eval_episodes, "returns": scores.tolist(), "random_mean": float(random_mean), "relative_return": relative_return,
        "relative_to_demonstrator": relative_to_demonstrator, "curve": curve, "wall_seconds": round(wall, 1),
        "frames_per_second": round(frames / wall, 1), **origin,
    }  # fmt: skip
    write_aside(run_dir / "results.json", lambda f: f.write(json.dumps(results, indent=2).encode()))
    (run_dir / "resume.pt").unlink(missing_ok=True)
    writer.close()
    shown = "" if relative_to_demonstrator is None else f", {relative_to_demonstrator:.2f} of the demonstrator's"
    score = f"{mean:.2f} +- {stderr:.2f} over {args.eval_episodes} episodes"
    print(f"{exp_name} on {args.env_id}: return {score} (relative return {relative_return:.2f}{shown})")
    print(f"wrote {run_dir}; next: tensorboard --logdir {args.runs_dir}")
