"""LAPO, stage 4, offline: a handful of action labels makes the latent policy play (paper section 6.4).

    decoder    d(IDM(o_{t-1}, o_t, o_{t+1})) -> a_t    cross-entropy on n labelled transitions
    policy     a ~ d(pi(o_t))                          pi from stage 3, which saw no labels
    cloning    a ~ f(o_t), from scratch                the baseline: same labels, same CNN, same loss

Plays both for every n and several draws of the labelled frames, beside random play and the demonstrator.

    python lapo_decode.py --env-id bossfight                                       # the paper's scale
    python lapo_decode.py --env-id coinrun --num-labels 32 256 --eval-episodes 20  # toy
Reads data/ENV_ID and RUNS_DIR/ENV_ID__lapo_bc__SEED/checkpoint.pt,
writes RUNS_DIR/ENV_ID__lapo_decode__SEED/results.json and checkpoint.pt: policy and decoder of one draw.
"""

import copy
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gym_notices.notices
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from filelock import FileLock
from torch.utils.benchmark import Timer
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

gym_notices.notices.notices.clear()  # else procgen's import of gym prints four lines about gym's future
from procgen import ProcgenGym3Env  # noqa: E402
from procgen.env import ENV_NAMES  # noqa: E402

FORMAT_VERSION = 3  # of checkpoints
SCORE = ("return_mean", "return_stderr", "episodes")
# Mean returns of a random policy and of the paper's expert, Procgen easy mode, all levels (paper, appendix)
PAPER_SCORES = {
    "bigfish": (0.8743, 36.3362), "bossfight": (0.0462, 11.6344), "caveflyer": (2.5971, 9.1836),
    "chaser": (0.6632, 9.9557), "climber": (2.2243, 10.2336), "coinrun": (2.7048, 9.9325),
    "dodgeball": (0.6130, 13.4866), "fruitbot": (-2.5330, 29.9253), "heist": (3.0759, 9.6853),
    "jumper": (3.4105, 8.4602), "leaper": (2.5105, 7.4083), "maze": (4.2726, 9.9693),
    "miner": (1.2514, 11.8926), "ninja": (2.5600, 9.4746), "plunder": (4.3207, 11.4605),
    "starpilot": (1.5252, 66.9863),
}  # fmt: skip


@dataclass
class Args:
    # what
    env_id: str = "bossfight"
    """the Procgen game, one of the 16"""
    exp_name: str = os.path.basename(__file__)[: -len(".py")]
    """the name of this experiment; the run folder is RUNS_DIR/ENV_ID__EXP_NAME__SEED"""
    seed: int = 1
    """seed of the experiment"""
    # data
    data_dir: str | None = None
    """the dataset of collect_expert_data.py; default data/ENV_ID"""
    bc_checkpoint: str | None = None
    """the checkpoint of lapo_bc.py; default RUNS_DIR/ENV_ID__lapo_bc__SEED/checkpoint.pt"""
    allow_unfinished: bool = False
    """take the checkpoint of an unfinished run, too"""
    # method
    num_labels: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
    """the label counts n: this many training frames come with their true action"""
    num_draws: int = 5
    """draws of the labelled frames; results are means over them"""
    eval_episodes: int = 100
    """episodes per method and label count, spread over the draws; random play gets at least 100"""
    num_envs: int = 64
    """the most games played in parallel"""
    temperature: float = 1.0
    """actions are sampled from softmax(logits / temperature), for LAPO and for cloning alike"""
    decoder_hidden: tuple[int, ...] = (192, 128, 64)
    """hidden widths of the decoder"""
    decoder_features: bool = False
    """ours: the decoder learns from pi(o_t) and the 256 features behind it, not from the IDM's latent"""
    finetune: Literal["none", "head", "all"] = "none"
    """ours: then train decoder and policy as one on the labels, the policy's last two layers (head) or all"""
    cloning: bool = True
    """play cloning from scratch, too"""
    # optimisation
    decoder_updates: int = 200
    """gradient steps of a decoder; many overfit a handful of labels, for thousands 800 do better"""
    decoder_learning_rate: float = 1e-3
    """AdamW's learning rate for a decoder, linearly to 0"""
    finetune_updates: int = 200
    """gradient steps of --finetune"""
    finetune_epochs: int = 0
    """at least so many passes over the labels, if that takes more steps than finetune_updates"""
    finetune_learning_rate: float = 1e-4
    """AdamW's learning rate for --finetune, linearly to 0"""
    cloning_updates: int = 1000
    """gradient steps of cloning; few learn little more than how often each action is taken, many overfit"""
    cloning_epochs: int = 0
    """at least so many passes over the labels, if that takes more steps than cloning_updates"""
    cloning_learning_rate: float = 5e-4
    """AdamW's learning rate for cloning, linearly to 0"""
    policy_batch_size: int = 128
    """the largest batch of cloning and of --finetune; the decoder's is 512"""
    label_smoothing: float = 0.05
    """label smoothing of all three"""
    weight_decay: float = 1e-2
    """decoupled weight decay (AdamW) of all three"""
    # run
    runs_dir: str = "runs"
    """where run folders are made"""
    overwrite: bool = False
    """replace the run in the run folder; without it a finished one is kept, an unfinished one goes on"""
    checkpoint_seconds: float = 60.0
    """seconds between checkpoints from which an interrupted run goes on; they lie between two draws"""
    cuda: bool = True
    """use CUDA, or another accelerator that torch knows, where there is one"""
    bf16: tyro.conf.DisallowNone[bool | None] = None
    """forward passes in bfloat16 (parameters and losses stay float32); default: if that is faster here"""


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
    """IMPALA-CNN (Espeholt et al. 2018, figure 3): (B, C, 64, 64) -> (B, 256).

    Channels are 16, 32, 32 times scale. patch_size P (1 in the paper) folds patches of P x P pixels
    into channels first: (B, C * P^2, 64 / P, 64 / P).
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
    """Inverse dynamics model: o_{t-1}, o_t, o_{t+1} (B, 9, 64, 64) -> continuous latent (B, latent_dim)."""

    def __init__(self, scale, latent_dim, patch_size=1):
        super().__init__()
        self.network = ImpalaCNN(9, scale, patch_size)
        self.head = nn.Linear(256, latent_dim)

    def forward(self, x):
        return self.head(self.network(x)).float()


class LatentPolicy(nn.Module):
    """pi(o_t): observations (B, 64, 64, 3) uint8 -> latent action (B, latent_dim)."""

    def __init__(self, scale, latent_dim, patch_size=1):
        super().__init__()
        self.network = ImpalaCNN(3, scale, patch_size)
        self.head = nn.Linear(256, latent_dim)
        self.critic = nn.Linear(256, 1)  # for fine-tuning
        # of the latents that it was cloned on, for decoders
        self.register_buffer("mean", torch.zeros(latent_dim))
        self.register_buffer("std", torch.ones(latent_dim))

    def forward(self, obs):
        # HWC memory seen as (B, 3, 64, 64) is channels-last already: no copy
        return self.head(self.network(obs.permute(0, 3, 1, 2).float() / 255 - 0.5)).float()


class Decoder(nn.Module):
    """MLP from latents (B, latent_dim), standardised by the training latents' moments, to logits (B, 15)."""

    def __init__(self, latent_dim, hidden, num_actions=15):
        super().__init__()
        self.register_buffer("mean", torch.zeros(latent_dim))
        self.register_buffer("std", torch.ones(latent_dim))
        widths = [latent_dim, *hidden]
        layers = [layer for i, o in zip(widths, widths[1:]) for layer in (nn.Linear(i, o), nn.ReLU())]
        self.mlp = nn.Sequential(*layers, nn.Linear(widths[-1], num_actions))

    def forward(self, z):
        return self.mlp((z - self.mean) / self.std)


class DecodedPolicy(nn.Module):
    """d(pi(o_t)): observations (B, 64, 64, 3) uint8 -> logits (B, 15); features: d sees those of pi, too."""

    def __init__(self, policy, decoder, features):
        super().__init__()
        self.policy, self.decoder, self.features = policy, decoder, features

    def forward(self, obs):
        x = self.policy.network(obs.permute(0, 3, 1, 2).float() / 255 - 0.5)  # (B, 256)
        z = self.policy.head(x).float()
        with torch.autocast(obs.device.type, enabled=False):
            return self.decoder(torch.cat([z, x.float()], dim=1) if self.features else z)


class ScratchPolicy(nn.Module):
    """Cloning's f(o_t), as large as pi: observations (B, 64, 64, 3) uint8 -> logits (B, 15)."""

    def __init__(self, scale, patch_size=1, num_actions=15):
        super().__init__()
        self.network = ImpalaCNN(3, scale, patch_size)
        self.actor = nn.Linear(256, num_actions)

    def forward(self, obs):
        return self.actor(self.network(obs.permute(0, 3, 1, 2).float() / 255 - 0.5)).float()


def fit(model, x, actions, updates, epochs, learning_rate, batch_size, args, autocast):
    """Minimises the cross-entropy of model(x) on n labels: inputs x (n, ...), actions (n,).

    Batches come from shuffled epochs, what is left of one is dropped; the learning rate falls linearly to 0.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=args.weight_decay)
    updates = max(updates, math.ceil(epochs * len(x) / batch_size))
    batch_size, queue = min(batch_size, len(x)), torch.empty(0, dtype=torch.long)
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - update / updates)
        if len(queue) < batch_size:
            queue = torch.randperm(len(x))
        batch, queue = queue[:batch_size], queue[batch_size:]
        with autocast:
            logits = model(x[batch])
        loss = F.cross_entropy(logits.float(), actions[batch], label_smoothing=args.label_smoothing)
        if not torch.isfinite(loss):
            found = f"loss {loss.item()} at update {update} of {type(model).__name__} on {len(x)} labels"
            sys.exit(f"error: {found}: lower its learning rate, or try --no-bf16")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def fit_lapo(policy, x, mean, std, obs, actions, args, autocast):
    """LAPO with n labels: fits a decoder d and returns the policy d(pi(o_t)) (section 6.4).

    d learns a_t from x (n, ...), the IDM's continuous latents: the IDM saw o_{t+1}, and so what was done. It
    plays on pi(o_t), which was cloned on such latents. Their mean and std are given: n labels are too few.
    Ours: with --decoder-features x is what pi made of o_t; with --finetune d and pi then learn on as one.
    """
    decoder = Decoder(len(mean), args.decoder_hidden).to(x.device)
    decoder.mean.copy_(mean)
    decoder.std.copy_(std)
    how = args.decoder_updates, 0, args.decoder_learning_rate, 512
    fit(decoder, x, actions, *how, args, torch.autocast(x.device.type, enabled=False))  # in float32
    decoded = DecodedPolicy(copy.deepcopy(policy), decoder, args.decoder_features)
    if args.finetune != "none":
        head = nn.ModuleList([decoded.policy.network.fc, decoded.policy.head])
        (decoded.policy if args.finetune == "all" else head).requires_grad_(True)
        how = args.finetune_updates, args.finetune_epochs, args.finetune_learning_rate, args.policy_batch_size
        fit(decoded, obs, actions, *how, args, autocast)
    return decoded


def mean_and_stderr(x):
    return float(np.mean(x)), float(np.std(x, ddof=1) / np.sqrt(len(x)))


def load_dataset(args):
    """meta.json of a dataset, frames {split: (N, 64, 64, 3) uint8}, memory-mapped, and windows {split: t}."""
    data_dir, frames, windows = Path(args.data_dir or f"data/{args.env_id}"), {}, {}
    try:
        meta = json.loads((data_dir / "meta.json").read_text())
        for split in ("train", "test"):
            frames[split] = np.load(data_dir / split / "frames.npy", mmap_mode="r")
            first = np.load(data_dir / split / "first.npy")
            # t-1, t, t+1 lie in one episode: a frame with first=True belongs to the new one
            windows[split] = np.flatnonzero(~first[1:-1] & ~first[2:]) + 1
            found = meta["env_id"], frames[split].shape, str(frames[split].dtype)
            if found != (args.env_id, (len(first), 64, 64, 3), "uint8") or len(windows[split]) < 2:
                raise ValueError(f"{split} is {found}, {len(windows[split])} windows")
    except (OSError, ValueError, TypeError, KeyError) as e:
        again = f"`python collect_expert_data.py --env-id {args.env_id}` makes one, --data-dir names another"
        sys.exit(f"error: {data_dir} is no whole dataset of {args.env_id} ({e}): {again}")
    return meta, frames, windows


def get_windows(frames, t, device):
    """Windows around t (B,): o_{t-1}, o_t, o_{t+1} as (B, 9, 64, 64) in [-0.5, 0.5], channels-last."""
    # frames t-1, t, t+1 lie side by side: in a view that overlaps itself a window is one copy of 36 KB
    strides = (frames.strides[0], *frames.strides)
    triples = np.lib.stride_tricks.as_strided(frames, (len(frames) - 2, 3, 64, 64, 3), strides)
    window = torch.cat(torch.from_numpy(triples[t - 1]).to(device).unbind(1), dim=-1)  # (B, 64, 64, 9) uint8
    return torch.add(torch.tensor(-0.5, device=device), window.permute(0, 3, 1, 2), alpha=1 / 255)


def make_env(env_id, num_envs, num_levels, start_level, seed):
    """Procgen, easy: act(actions), observe() -> reward (E,), {"rgb": (E, 64, 64, 3) uint8}, first (E,)."""
    levels = {"distribution_mode": "easy", "num_levels": num_levels, "start_level": start_level}
    return ProcgenGym3Env(num_envs, env_id, rand_seed=seed, num_threads=min(4, os.cpu_count()), **levels)


def evaluate(act, env, num_episodes):
    """Returns (num_episodes,) of games in which act(obs (B, 64, 64, 3), episode (B,)) takes the actions.

    An env that ends its episode begins the next in line; every episode counts, however long.
    """
    episode, running, returns = np.arange(env.num), np.zeros(env.num), np.full(num_episodes, np.nan)
    progress = tqdm(total=num_episodes, unit="episode", desc="play", leave=False)
    while np.isnan(returns).any():
        playing, action = np.flatnonzero(episode < num_episodes), np.zeros(env.num, dtype=np.int32)
        action[playing] = act(env.observe()[1]["rgb"][playing], episode[playing])
        env.act(action)
        reward, _, first = env.observe()
        running += reward
        for e in np.flatnonzero(first):
            if episode[e] < num_episodes:
                returns[episode[e]] = running[e]
                progress.update()
            episode[e], running[e] = episode.max() + 1, 0
    progress.close()
    return returns


def play(policies, num_episodes, seed, data, device, autocast, run):
    """Returns (len(policies), num_episodes): all play in one batch of games, one after another."""
    generator = torch.Generator(device).manual_seed(seed)
    num_envs = min(run.args.num_envs, len(policies) * num_episodes)
    env = make_env(run.args.env_id, num_envs, data["num_levels"], data["start_level"], seed)

    @torch.inference_mode()
    def act(obs, episode):
        run.leave_if_stopped()
        obs, logits = torch.as_tensor(obs, device=device), torch.zeros(len(obs), 15, device=device)
        for p in np.unique(episode // num_episodes):
            mine = torch.from_numpy(episode // num_episodes == p).to(device)
            with autocast:
                logits[mine] = policies[p](obs[mine])
        probs = (logits / run.args.temperature).softmax(-1)
        return torch.multinomial(probs, 1, generator=generator).squeeze(-1).cpu().numpy()

    returns = evaluate(act, env, len(policies) * num_episodes)
    env.close()
    return returns.reshape(len(policies), num_episodes)


def load_checkpoint(path, made_by, parts, args):
    """A finished checkpoint of this game with these parts, on the CPU; refuses all else in one sentence."""
    unfinished = Path(path).with_name("resume.pt")
    if unfinished.exists() and not unfinished.with_name("results.json").exists():
        path = unfinished
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        found = [checkpoint[key] for key in ("env_id", "format_version", *parts)][:2]
        if found != [args.env_id, FORMAT_VERSION]:
            raise ValueError(f"game and format {found}, expected {[args.env_id, FORMAT_VERSION]}")
    except Exception as e:  # the unpickler raises many kinds, some with pages of advice
        why = repr(e) if isinstance(e, (OSError, KeyError, ValueError)) else type(e).__name__
        sys.exit(f"error: {path} is unusable ({why}): `python {made_by}.py --env-id {args.env_id}` makes one")
    if path == unfinished and not args.allow_unfinished:
        sys.exit(f"error: {path.parent} is unfinished: `{checkpoint['command']}`, or --allow-unfinished")
    return checkpoint


def choose_precision(args, device, step):
    """The autocast: as --[no-]bf16 says, else bfloat16 if step(), on a few samples, is faster in it here."""
    autocasts = [torch.autocast(device.type, torch.bfloat16, enabled=enabled) for enabled in (False, True)]

    def seconds(work, autocast=autocasts[0]):
        with autocast:
            timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
            return min(timer.blocked_autorange(min_run_time=0.3).times)

    if args.bf16 is None and device.type != "cpu":
        args.bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    elif args.bf16 is None:
        x, y = torch.ones(256, 256), torch.ones(256, 256, dtype=torch.bfloat16)
        ratio = seconds(lambda: x @ x) / seconds(lambda: y @ y)
        if ratio > 0.2:  # without bfloat16 instructions it is a hundredth, and a step would take minutes
            ratio = seconds(step, autocasts[0]) / seconds(step, autocasts[1])
        args.bf16 = ratio > 1.1
        other = "--no-bf16 to force float32" if args.bf16 else "so float32; --bf16 to force bfloat16"
        print(f"bfloat16: {ratio:.2g}× float32 on this machine ({other})")
    print(f"{args.env_id}: {device}, {'bfloat16' if args.bf16 else 'float32'}")
    return autocasts[args.bf16]


def write_whole(path, content):
    """A whole file or none, text or what torch.save takes: written aside, flushed to disk, then renamed."""
    aside = Path(f"{path}.tmp")
    with open(aside, "wb") as f:
        torch.save(content, f) if path.suffix == ".pt" else f.write(content.encode())
        f.flush()
        os.fsync(f.fileno())
    aside.rename(path)


class Run:
    """The run folder RUNS_DIR/ENV_ID__EXP_NAME__SEED, one process at a time. Nothing of the method is here.

    Files are whole or absent, also after kill -9 or on a full disk: resume.pt, where a stopped run goes on;
    checkpoint.pt, the networks, for the next stage; results.json, written last.
    """

    def __init__(self, args, inputs=()):
        """A stopped run goes on with the same arguments and inputs, the identities of what it reads."""
        self.args, self.parts, self.state, self.signal = args, {}, {}, 0
        self.dir = Path(args.runs_dir) / f"{args.env_id}__{args.exp_name}__{args.seed}"
        self.lock, other = FileLock(self.dir / ".lock"), "choose another --exp-name or --seed"
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            self.lock.acquire(blocking=False)
        except OSError as e:
            sys.exit(f"error: {self.dir} is in another process's hands, or read-only ({e}): wait, or {other}")
        for name in ("results.json", "resume.pt") if args.overwrite else ():
            (self.dir / name).unlink(missing_ok=True)
        if (self.dir / "results.json").exists():
            sys.exit(f"error: {self.dir} holds a finished run: add --overwrite to replace it, or {other}")
        args.inputs, free = list(inputs), ("overwrite", "checkpoint_seconds", "allow_unfinished")
        if (self.dir / "resume.pt").exists():
            self.state = torch.load(self.dir / "resume.pt", map_location="cpu", weights_only=True)
            before = self.state["args"]
            args.bf16 = before["bf16"] if args.bf16 is None else args.bf16
            changed = {k: v for k, v in before.items() if v != vars(args).get(k) and k not in free}
            if changed:
                sys.exit(
                    f"error: {self.dir} was begun with {changed}: keep to it, add --overwrite or {other}"
                )
        self.meta = {"format_version": FORMAT_VERSION, "stage": Path(__file__).stem, "env_id": args.env_id}
        self.meta["command"] = "python " + shlex.join(arg for arg in sys.argv if arg != "--overwrite")
        self.meta |= {"args": vars(args), "identity": self.state.get("identity", uuid.uuid4().hex)}
        self.saved, self.began = time.time(), time.time() - self.state.get("seconds", 0.0)
        self.writer = SummaryWriter(self.dir, purge_step=self.state.get("step", 0) + 1)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.stop)
        print(f"going on in {self.dir}, in the precision it began with" if self.state else f"run {self.dir}")

    def stop(self, number, frame):
        self.signal = number  # Ctrl-C or SIGTERM: the first asks for a save, a second ends the process
        signal.signal(number, signal.SIG_DFL)

    def leave_if_stopped(self):
        if self.signal:
            print(f"\nstopped; what is saved in {self.dir} goes on with: {self.meta['command']}")
            sys.exit(128 + self.signal)  # 130 or 143, as shells expect: a pipeline stops here

    def restore(self, **parts):
        """Notes what to save, networks and optimizers; a stopped run's are loaded. Returns what was saved."""
        self.parts = parts
        if self.state:
            for name, part in parts.items():
                part.load_state_dict(self.state[name])
            torch.set_rng_state(self.state["rng"][0])
            torch.cuda.set_rng_state_all(self.state["rng"][1:])
        return self.state

    def due(self):
        return self.signal or time.time() - self.saved > self.args.checkpoint_seconds

    def save(self, step, **state):
        """Saves the parts and `state`, tensors and plain values; then ends the process if it was stopped."""
        state |= {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"step": step, "rng": [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]}
        self.writer.flush()
        write_whole(self.dir / "resume.pt", self.meta | state | {"seconds": time.time() - self.began})
        self.saved = time.time()
        self.leave_if_stopped()

    def finish(self, **results):
        """Writes checkpoint.pt, then results.json: the results, and what they rest on."""
        networks = {name: part.state_dict() for name, part in self.parts.items() if hasattr(part, "eval")}
        write_whole(self.dir / "checkpoint.pt", self.meta | networks)
        on_gpu, here = self.args.cuda and torch.cuda.is_available(), Path(__file__).resolve().parent
        device = torch.cuda.get_device_name() if on_gpu else torch.backends.cpu.get_cpu_capability()
        commit = subprocess.getoutput(f"git -C '{here}' describe --always --dirty 2>/dev/null")
        results |= {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}
        results |= {"commit": commit, "wall_seconds": round(time.time() - self.began, 1), **self.meta}
        write_whole(self.dir / "results.json", json.dumps(results, indent=2))
        (self.dir / "resume.pt").unlink(missing_ok=True)
        self.writer.close()
        print(f"wrote {self.dir}")


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    if args.env_id not in ENV_NAMES:
        sys.exit(f"error: --env-id {args.env_id} is no Procgen game: choose one of {', '.join(ENV_NAMES)}")
    counts = args.num_draws - 1, args.eval_episodes, args.num_envs, args.policy_batch_size
    updates = args.decoder_updates, args.finetune_updates, args.cloning_updates
    if min(*counts, *updates) < 1 or not args.temperature > 0:
        least = "--num-draws 2, --eval-episodes, --num-envs, --policy-batch-size and all updates 1"
        sys.exit(f"error: a flag is too small: {least}, --temperature more than 0")
    default = f"{args.runs_dir}/{args.env_id}__lapo_bc__{args.seed}/checkpoint.pt"
    parts = ["policy", "idm", "pretrain_args"]
    cloned = load_checkpoint(args.bc_checkpoint or default, "lapo_bc", parts, args)
    data, frames, windows = load_dataset(args)
    frames, windows, demonstrator = frames["train"], windows["train"], data.get("demonstrator") or {}
    path = Path(args.data_dir or f"data/{args.env_id}") / "train" / "actions.npy"
    try:
        actions = np.load(path)  # a_t was taken on seeing frame t
        found = actions.shape, str(actions.dtype), actions.min() >= 0 and actions.max() < 15
        if found != ((len(frames),), "int8", True):
            raise ValueError(f"{found[:2]}, {actions.min()} to {actions.max()}")
    except (OSError, ValueError, EOFError) as e:
        again = f"collect the dataset again, `python collect_expert_data.py --env-id {args.env_id}`"
        sys.exit(f"error: {path} is not {len(frames)} int8 actions of 0 to 14 ({e}): {again}")
    fewest, most = min(args.num_labels, default=0), max(args.num_labels, default=0)
    if not 1 <= fewest <= most <= len(windows) or len(set(args.num_labels)) < len(args.num_labels):
        wanted = f"each count once, from 1 to {len(windows)}, the windows of this dataset"
        sys.exit(f"error: --num-labels {args.num_labels}, expected {wanted}")
    if not demonstrator.keys() >= set(SCORE):
        wanted = f"demonstrator with {', '.join(SCORE)}, the score to compare with"
        sys.exit(f"error: the dataset's meta.json has no {wanted}: add it, or collect the dataset again")
    run = Run(args, inputs=[cloned["identity"], data.get("identity")])
    run.meta |= {"pretrain_args": cloned["pretrain_args"], "bc_args": cloned["args"], "data": data}
    device = (torch.accelerator.current_accelerator(True) if args.cuda else None) or torch.device("cpu")

    # the networks of stages 2 and 3, frozen
    latent_dim, patch = len(cloned["idm"]["head.bias"]), cloned["pretrain_args"]["patch_size"]
    idm = IDM(cloned["pretrain_args"]["idm_scale"], latent_dim, patch)
    idm.load_state_dict(cloned["idm"])
    idm = idm.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    policy = LatentPolicy(cloned["args"]["policy_scale"], latent_dim, patch)
    policy.load_state_dict(cloned["policy"])
    policy = policy.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)

    def new_scratch():
        scratch = ScratchPolicy(cloned["args"]["policy_scale"], patch)
        return scratch.to(device, memory_format=torch.channels_last)

    def load_obs(t):
        return torch.from_numpy(frames[t]).to(device)  # (B, 64, 64, 3) uint8

    trial, few = new_scratch(), load_obs(windows[:16])
    autocast = choose_precision(args, device, lambda: trial(few).mean().backward())
    latent_and_features = DecodedPolicy(policy, nn.Identity(), True)

    @torch.no_grad()
    def decoder_inputs(t):
        """What a decoder learns from at times t (n,): (n, latent_dim), with --decoder-features 256 more."""
        pieces = np.array_split(t, math.ceil(len(t) / 512))
        with autocast:
            if args.decoder_features:
                return torch.cat([latent_and_features(load_obs(piece)) for piece in pieces])
            return torch.cat([idm(get_windows(frames, piece, device)) for piece in pieces])

    mean, std = policy.mean, policy.std  # of the latents that stage 3 cloned
    if args.decoder_features:  # frames without labels say how to standardise features
        x = decoder_inputs(np.random.default_rng(args.seed).permutation(windows)[:4096])
        mean, std = x.mean(0), x.std(0) + 1e-3
    decoder = Decoder(len(mean), args.decoder_hidden)
    kept = DecodedPolicy(copy.deepcopy(policy), decoder, args.decoder_features)  # for checkpoint.pt
    state = run.restore(policy=kept.policy, decoder=kept.decoder)

    methods = ["lapo_decoder", "cloning_from_scratch"] if args.cloning else ["lapo_decoder"]
    plan = [(n, method) for n in args.num_labels for method in methods]
    num_episodes = math.ceil(args.eval_episodes / args.num_draws)  # of a policy
    played = state.get("played", [])  # for every draw that is done: returns (len(plan), num_episodes)
    for draw in range(len(played), args.num_draws):
        seed = args.seed * 1000 + draw
        torch.manual_seed(seed)
        # the n labelled windows are the first n of the draw's permutation: more labels contain fewer
        t = np.random.default_rng([args.seed, draw]).permutation(windows)[:most]
        x, obs = decoder_inputs(t), load_obs(t)
        labels = torch.from_numpy(actions[t].astype(np.int64)).to(device)  # (n,)
        policies = []
        for n, method in tqdm(plan, f"draw {draw + 1} of {args.num_draws}: fit", unit="policy", leave=False):
            run.leave_if_stopped()
            if method == "lapo_decoder":
                policies.append(fit_lapo(policy, x[:n], mean, std, obs[:n], labels[:n], args, autocast))
                if draw == 0 and n == most:
                    kept.load_state_dict(policies[-1].state_dict())
            else:
                how = args.cloning_updates, args.cloning_epochs, args.cloning_learning_rate
                how = *how, args.policy_batch_size, args, autocast
                policies.append(fit(new_scratch(), obs[:n], labels[:n], *how))
        played.append(play(policies, num_episodes, seed, data, device, autocast, run).tolist())
        if run.due() or draw == args.num_draws - 1:
            run.save(draw + 1, played=played)
    policies = [lambda obs: torch.zeros(len(obs), 15, device=device)]
    num_episodes, seed = max(100, args.eval_episodes), args.seed * 1000 + args.num_draws
    random_returns = play(policies, num_episodes, seed, data, device, autocast, run)[0]

    # A result is the mean over draws of the mean return of a draw's episodes. Which frames were labelled
    # matters more than luck in play, and all episodes of a draw share it: its standard error is over draws.
    rows = []
    for (n, method), returns in zip(plan, np.swapaxes(played, 0, 1)):  # (num_draws, num_episodes)
        draws = returns.mean(1)
        row = {"method": method, "n_labels": n, **dict(zip(SCORE, (*mean_and_stderr(draws), returns.size)))}
        rows.append(row | {"draws": draws.tolist(), "returns": returns.tolist()})
    score = dict(zip(SCORE, (*mean_and_stderr(random_returns), num_episodes)))
    rows.append({"method": "random", **score, "returns": random_returns.tolist()})
    rows.append({"method": "demonstrator", **{key: demonstrator[key] for key in SCORE}})
    paper_random, paper_expert = PAPER_SCORES[args.env_id]
    random_mean, demonstrator_mean = rows[-2]["return_mean"], rows[-1]["return_mean"]
    print(f"\n{args.env_id}: means over {args.num_draws} draws of the labels, +- their standard error")
    print(f"{'method':20s} labels return +- stderr  of expert  of demonstrator")
    for row in rows:  # relative: 0 is random play, 1 the paper's expert, or the demonstrator of this dataset
        method, n, mean = row["method"], row.get("n_labels", ""), row["return_mean"]
        row["relative_return"] = (mean - paper_random) / (paper_expert - paper_random)
        row["relative_to_demonstrator"] = (mean - random_mean) / (demonstrator_mean - random_mean or math.nan)
        relative = f"{row['relative_return']:10.2f} {row['relative_to_demonstrator']:16.2f}"
        print(f"{method:20s} {n:6} {mean:8.2f} +- {row['return_stderr']:5.2f} {relative}")
    for row in rows[:-2]:
        for key in ("return_mean", "relative_return", "relative_to_demonstrator"):
            run.writer.add_scalar(f"{row['method']}/{key}", row[key], row["n_labels"])
    run.finish(num_draws=args.num_draws, curve=rows[:-2], random=rows[-2], demonstrator=rows[-1])
    print(f"next: python lapo_finetune_ppo.py --env-id {args.env_id} --runs-dir {args.runs_dir}")
