# /// script
# requires-python = ">=3.10,<3.13"
# dependencies = ["torch==2.13.0", "procgen-mirror==0.10.7", "gym==0.26.2", "numpy<2", "tyro", "tensorboard", "tqdm", "pillow"]
# ///
"""LAPO, stage 1 of 5: a demonstrator, and the videos of it that LAPO learns from (paper section 5, "Setup").

Trains a Procgen demonstrator with PPO (CleanRL's ppo_procgen.py, same details), or loads one with --expert-checkpoint;
then lets it play and writes what it saw to disk. The frames lie apart from the labels, because LAPO never reads the labels:

    data/<env_id>/meta.json            game, levels, counts, seeds, the demonstrator's mean return, arguments
    data/<env_id>/{train,test}/frames.npy   (N, 64, 64, 3) uint8, consecutive in time
                               first.npy    (N,) bool, True where a frame is not the successor of the one before it
                               actions.npy  (N,) int8, the action a_t taken on seeing frame t          (label)
                               rewards.npy  (N,) float32, the reward that a_t earned                    (label)
                               returns.npy  (N,) float32, return of the frame's episode, NaN if cut off (label)

One game at the paper's scale:      python collect_expert_data.py --env-id bossfight
With the shipped demonstrator:      python collect_expert_data.py --env-id ENV --expert-checkpoint experts/ENV.pt
Next:                               python lapo_pretrain.py --env-id bossfight
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import math
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
    """run the network's forward pass in bfloat16 (parameters stay float32); default: if that is faster on this machine"""
    track: bool = False
    """if toggled, this experiment is also tracked with Weights and Biases (`pip install wandb`)"""
    wandb_project_name: str = "lapo"
    """the wandb's project name"""
    wandb_entity: str | None = None
    """the entity (team) of wandb's project"""
    capture_video: bool = False
    """write a GIF of the demonstrator's first episodes, with the actions it takes, to the run folder"""
    runs_dir: str = "runs"
    """where run folders (TensorBoard logs, checkpoint.pt, results.json) are made"""
    overwrite: bool = False
    """replace a finished run, or a finished dataset, of the same name"""
    resume: bool = False
    """go on with the unfinished run in the run folder, or say that there is none; one with the same arguments goes on by itself"""
    checkpoint_seconds: float = 60.0
    """seconds between checkpoints from which an interrupted run goes on"""

    env_id: str = "bossfight"
    """the Procgen game, one of the 16"""
    num_levels: int | None = None
    """number of Procgen levels to train and play on, 0: all of them; default: those of the expert checkpoint, else 0"""
    start_level: int | None = None
    """the first level, if num_levels > 0; default: that of the expert checkpoint, else 0"""

    expert_checkpoint: str | None = None
    """play this demonstrator instead of training one"""
    init_checkpoint: str | None = None
    """start training from this demonstrator's weights (with a fresh optimiser) instead of random ones"""
    allow_unfinished: bool = False
    """take the checkpoint of an unfinished run, too"""
    total_timesteps: int = 50_000_000
    """frames of PPO training (paper: 50M)"""
    scale: float = 1.0
    """width of the demonstrator's IMPALA-CNN: 16, 32, 32 channels times this"""
    learning_rate: float = 5e-4
    """the learning rate of Adam"""
    num_envs: int = 64
    """parallel games, in training and in collecting"""
    num_steps: int = 256
    """steps in each game per rollout"""
    anneal_lr: bool = False
    """lower the learning rate linearly to 0"""
    gamma: float = 0.999
    """the discount factor"""
    gae_lambda: float = 0.95
    """the lambda of the generalised advantage estimation"""
    num_minibatches: int = 8
    """minibatches per epoch"""
    micro_batch_size: int | None = None
    """a minibatch's gradient is added up over pieces of this size, same numbers; default: 128 on a CPU (fits its cache), all at once on a GPU"""
    update_epochs: int = 3
    """epochs over each rollout"""
    norm_adv: bool = True
    """normalise the advantages per minibatch"""
    clip_coef: float = 0.2
    """the surrogate clipping coefficient"""
    clip_vloss: bool = True
    """clip the value loss too, as in the PPO paper's code"""
    ent_coef: float = 0.01
    """coefficient of the entropy bonus"""
    vf_coef: float = 0.5
    """coefficient of the value loss"""
    max_grad_norm: float = 0.5
    """the maximum norm of the gradient"""

    data_dir: str | None = None
    """where the dataset goes; default data/ENV_ID"""
    num_train_frames: int = 2_621_440
    """frames of the training split (the authors load 80 x 32,768); 0 trains the demonstrator and writes no dataset"""
    num_test_frames: int = 32_768
    """frames of the test split, from rollouts (and, if num_levels is 0, from levels) of its own"""
    eval_episodes: int = 200
    """episodes over which the demonstrator is scored"""


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


class Agent(nn.Module):
    """PPO's actor-critic on an IMPALA-CNN. Observations are (B, 64, 64, 3) uint8, as Procgen hands them out."""

    def __init__(self, scale, num_actions=15):
        super().__init__()
        self.network = ImpalaCNN(3, scale)
        self.actor = nn.Linear(256, num_actions)
        self.critic = nn.Linear(256, 1)
        for head, std in ((self.actor, 0.01), (self.critic, 1.0)):  # CleanRL's layer_init
            nn.init.orthogonal_(head.weight, std)
            nn.init.zeros_(head.bias)

    def forward(self, obs):
        # HWC memory seen as (B, 3, 64, 64) is channels-last already: no copy
        hidden = self.network(obs.permute(0, 3, 1, 2).float() / 255 - 0.5)
        return self.actor(hidden).float(), self.critic(hidden).float().squeeze(-1)  # (B, 15), (B,)


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


def checksum(path):
    """BLAKE2b of a file, read in pieces."""
    digest = hashlib.blake2b()
    with open(path, "rb") as f:
        while piece := f.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


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


def collect(act, env, split_dir, num_frames, progress, resumed=None, save=None):
    """Plays num_frames frames and writes them env by env, so that rows are consecutive in time; memory holds one step of all envs.

    Returns the returns of the episodes that ended. Env e fills rows e*T .. (e+1)*T-1; its first row is marked `first`. save(t, start, first,
    episode_returns) is called after every step, with all before it on disk once sync() has been called; `resumed` is what it was given.
    """
    num_envs, T = env.num, num_frames // env.num
    split_dir.mkdir(parents=True, exist_ok=True)

    def array(name, dtype, *shape):
        path, shape = split_dir / f"{name}.npy", (num_envs * T, *shape)
        if not resumed:
            return allocate(path, dtype, shape)
        try:
            opened = np.lib.format.open_memmap(path, "r+")
        except (OSError, ValueError) as e:
            sys.exit(f"error: {path} is missing or damaged ({e}), so that collecting cannot go on: start afresh with --overwrite")
        if opened.shape != shape or opened.dtype != dtype:
            sys.exit(f"error: {path} has shape {opened.shape}, expected {shape}, so that collecting cannot go on: start afresh with --overwrite")
        return opened

    header, fd = array("frames", np.uint8, 64, 64, 3).offset, os.open(split_dir / "frames.npy", os.O_RDWR)
    per_row = [array(*spec) for spec in (("first", bool), ("actions", np.int8), ("rewards", np.float32), ("returns", np.float32))]
    firsts, actions, rewards, returns = (column.reshape(num_envs, T) for column in per_row)  # views, row e*T + t is [e, t]

    def sync():
        os.fsync(fd)
        for column in per_row:
            column.flush()

    if resumed:
        first_t, start, first, episode_returns = resumed
        for e in range(num_envs):
            returns[e, start[e] :] = np.nan  # of episodes that end after the state was saved
    else:
        first_t, start, first, episode_returns = 0, np.zeros(num_envs, dtype=int), np.ones(num_envs, dtype=bool), []
        returns[:] = np.nan
    progress.update(first_t * num_envs)
    for t in range(first_t, T):
        obs = env.observe()[1]["rgb"]
        action = act(obs)
        firsts[:, t], actions[:, t] = first, action
        for e in range(num_envs):
            # pages of a memory map would count as this process's memory; the file has its place on the disk already
            if os.pwrite(fd, obs[e], header + (e * T + t) * obs[e].nbytes) < obs[e].nbytes:
                raise OSError(errno.ENOSPC, "only part of a frame could be written", str(split_dir / "frames.npy"))
        env.act(action)
        rewards[:, t], _, first = env.observe()
        for e in np.flatnonzero(first):  # an episode ended with this reward
            returns[e, start[e] : t + 1] = rewards[e, start[e] : t + 1].sum()
            episode_returns.append(float(returns[e, t]))
            start[e] = t + 1
        progress.update(num_envs)
        if save:
            save(sync, (t + 1, start, first, episode_returns))
    sync()
    os.close(fd)
    return np.array(episode_returns)


def written_by(path, args):
    """Whether a dataset's meta.json was written by a run with these arguments."""
    try:
        before = json.loads(path.read_text())["args"]
        return all(before[key] == value for key, value in asdict(args).items() if key not in NOT_COMPARED)
    except (OSError, ValueError, TypeError, KeyError):
        return False


def mean_and_stderr(x):
    return float(np.mean(x)), float(np.std(x, ddof=1) / np.sqrt(len(x)))


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
    require(args, num_train_frames=0, num_test_frames=0, eval_episodes=2)
    batch_size = args.num_envs * args.num_steps
    if batch_size % args.num_minibatches:
        sys.exit(f"error: --num-minibatches {args.num_minibatches} does not divide num_envs x num_steps = {batch_size}: choose a divisor")
    data_dir = Path(args.data_dir or f"data/{args.env_id}")
    run_dir = Path(args.runs_dir) / f"{args.env_id}__{args.exp_name}__{args.seed}"
    for split, n in (("train", args.num_train_frames), ("test", args.num_test_frames)):
        if args.num_train_frames and n < 3 * args.num_envs:
            sys.exit(f"error: --num-{split}-frames {n} is less than 3 frames (one window) for each of {args.num_envs} envs: ask for more")
    if args.expert_checkpoint and args.init_checkpoint:
        sys.exit("error: --expert-checkpoint plays and --init-checkpoint trains on: give one of them")
    loaded = None
    if args.expert_checkpoint or args.init_checkpoint:
        command = f"python collect_expert_data.py --env-id {args.env_id}"
        loaded = load_checkpoint(args.expert_checkpoint or args.init_checkpoint, "collect_expert_data", args, command, ("model",))
        args.scale = loaded["meta"]["args"].get("scale")
        demonstrator = load_network(lambda: Agent(args.scale), loaded["model"], args.expert_checkpoint or args.init_checkpoint, command)
    for last in [run_dir / "results.json"] + [data_dir / "meta.json"] * (args.num_train_frames > 0):
        # an unfinished run may have been interrupted after its last file but one, the dataset's meta.json
        own = last.name == "meta.json" and (run_dir / "resume.pt").exists() and written_by(last, args)
        if last.exists() and not own and not args.overwrite:
            sys.exit(f"error: {last.parent} already holds a finished run: add --overwrite to replace it, or choose another place")
    num_levels, start_level = (
        (loaded["meta"][key] if loaded else 0) if given is None else given
        for key, given in (("num_levels", args.num_levels), ("start_level", args.start_level))
    )

    inputs = {"--expert-checkpoint or --init-checkpoint": checksum(args.expert_checkpoint or args.init_checkpoint)} if loaded else {}
    if args.num_train_frames:
        lock_folder(data_dir)
    writer, state = start_run(run_dir, args, inputs)
    if args.num_train_frames and not state:
        (data_dir / "meta.json").unlink(missing_ok=True)  # no meta.json, no dataset: an interrupted one cannot pass for whole

    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    device = (torch.accelerator.current_accelerator(check_available=True) if args.cuda else None) or torch.device("cpu")
    start_time = time.time() - (state["meta"]["wall_seconds"] if state else 0)

    agent = (demonstrator if loaded else Agent(args.scale)).to(device).to(memory_format=torch.channels_last)
    trial_obs = torch.zeros((args.num_envs, 64, 64, 3), dtype=torch.uint8, device=device)

    @torch.inference_mode()
    def trial_step(autocast):
        with autocast:
            agent(trial_obs)

    autocast = choose_precision(args, device, trial_step)
    origin = provenance(args, device)
    print(f"{args.env_id}: {run_dir}, {origin['device_name']}, {'bfloat16' if args.bf16 else 'float32'}")
    meta = {"stage": "collect_expert_data", "env_id": args.env_id, "num_levels": num_levels, "start_level": start_level, "args": asdict(args)}
    meta["command"] = this_command()
    generator, checkpointer = torch.Generator(device).manual_seed(args.seed), Checkpointer(args.checkpoint_seconds)
    # what is done: frames, PPO iterations, (frames, mean return of the last 100 episodes), the demonstrator's returns, the splits written
    done = {"step": 0, "iteration": 0, "curve": [], "scores": None, "splits": {}}
    if state:
        with refusing_damage(run_dir / "resume.pt"):
            done = {key: state["meta"][key] for key in done}
            agent.load_state_dict(state["agent"])
            set_rng_state(state["rng"], generator)
    curve = done["curve"]

    def save(**states):
        """Everything that an interrupted run goes on from."""
        progress_meta = {**done, "inputs": inputs, "wall_seconds": time.time() - start_time}
        writer.flush()
        save_checkpoint(run_dir / "resume.pt", {**meta, **progress_meta}, rng=get_rng_state(generator), agent=agent.state_dict(), **states)
        checkpointer.saved(run_dir)

    num_iterations = 0 if args.expert_checkpoint else max(1, args.total_timesteps // batch_size)
    if done["iteration"] < num_iterations:
        optimizer = optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
        env = make_env(args.env_id, args.num_envs, num_levels, start_level, args.seed)
        normalize_reward = RewardNormalizer(args.num_envs, args.gamma)
        T, E = args.num_steps, args.num_envs
        micro_batch_size = args.micro_batch_size or (128 if device.type == "cpu" else batch_size)
        obs = torch.zeros((T, E, 64, 64, 3), dtype=torch.uint8, device=device)  # a quarter of float storage
        actions = torch.zeros((T, E), dtype=torch.long, device=device)
        logprobs, rewards, dones, values = (torch.zeros((T, E), device=device) for _ in range(4))
        next_obs = torch.tensor(env.observe()[1]["rgb"], device=device)
        next_done = torch.zeros(E, device=device)
        episode_return, recent_returns = np.zeros(E), deque(maxlen=100)
        if done["iteration"]:
            with refusing_damage(run_dir / "resume.pt"):
                optimizer.load_state_dict(state["optimizer"])
                normalize_reward.load_state_dict(state["normalize_reward"])
                set_env_state(env, state["env"])
                next_obs, next_done, episode_return = state["next_obs"].to(device), state["next_done"].to(device), state["episode_return"].numpy()
                recent_returns.extend(state["recent_returns"].tolist())
        progress = tqdm(
            total=num_iterations * batch_size, initial=done["step"], unit="frame", unit_scale=True, desc="PPO", mininterval=1
        )  # fmt: skip

        for iteration in range(done["iteration"], num_iterations):
            if args.anneal_lr:
                optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - iteration / num_iterations)

            # rollout
            for t in range(T):
                obs[t], dones[t] = next_obs, next_done
                with torch.inference_mode(), autocast:
                    logits, values[t] = agent(next_obs)
                    action_dist = Categorical(logits=logits)
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

            with torch.inference_mode(), autocast:
                next_value = agent(next_obs)[1]
            advantages = compute_gae(rewards, values, dones, next_value, next_done, args.gamma, args.gae_lambda)
            returns = advantages + values

            # update
            b_obs, b_actions, b_logprobs = obs.flatten(0, 1), actions.flatten(), logprobs.flatten()
            b_advantages, b_returns, b_values = advantages.flatten(), returns.flatten(), values.flatten()
            logged = []
            for _ in range(args.update_epochs):
                for mb in torch.randperm(batch_size, device=device).chunk(args.num_minibatches):
                    mb_advantages = b_advantages[mb]
                    if args.norm_adv:
                        mb_advantages = (mb_advantages - mb_advantages.mean()) / (mb_advantages.std() + 1e-8)
                    optimizer.zero_grad()
                    for i, adv in zip(mb.split(micro_batch_size), mb_advantages.split(micro_batch_size)):
                        with autocast:
                            logits, newvalue = agent(b_obs[i])
                        loss, stats = ppo_loss(logits, newvalue, b_actions[i], b_logprobs[i], adv, b_returns[i], b_values[i], args)
                        (loss * len(i) / len(mb)).backward()  # gradients add up to those of the minibatch's mean
                        logged.append(stats)
                    grad_norm = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                    if not torch.isfinite(grad_norm):
                        refuse_bad_numbers(run_dir, iteration, mb.cpu(), {"loss": loss.item(), "gradient norm": grad_norm.item()})
                    optimizer.step()

            # logs
            global_step = (iteration + 1) * batch_size
            progress.update(batch_size)
            if recent_returns:
                curve.append((global_step, float(np.mean(recent_returns))))
                writer.add_scalar("charts/episodic_return", curve[-1][1], global_step)
                progress.set_postfix_str(f"return {curve[-1][1]:.2f}")
            writer.add_scalar("charts/SPS", progress.format_dict["rate"] or 0, global_step)
            stats = torch.stack(logged).mean(0).tolist()
            for name, value in zip(("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac"), stats):
                writer.add_scalar(f"losses/{name}", value, global_step)
            explained = 1 - (b_returns - b_values).var() / b_returns.var()
            writer.add_scalar("losses/explained_variance", explained.item(), global_step)
            done["step"], done["iteration"] = global_step, iteration + 1
            if checkpointer.due() or iteration == num_iterations - 1:
                save_checkpoint(
                    run_dir / "checkpoint.pt", {**meta, "frames": global_step, "unfinished": iteration < num_iterations - 1}, model=agent.state_dict()
                )
                running = {"episode_return": torch.tensor(episode_return), "recent_returns": torch.tensor(list(recent_returns), dtype=torch.float64)}
                running |= {"next_obs": next_obs, "next_done": next_done, "env": get_env_state(env)}
                save(optimizer=optimizer.state_dict(), normalize_reward=normalize_reward.state_dict(), **running)
        progress.close()
        env.close()

    @torch.inference_mode()
    def act(obs, episode=None):
        with autocast:
            logits, _ = agent(torch.as_tensor(obs, device=device))
        return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1).cpu().numpy().astype(np.int32)

    if done["scores"] is None:
        env = make_env(args.env_id, min(args.num_envs, args.eval_episodes), num_levels, start_level, args.seed + 1)
        print(f"scoring the demonstrator over {args.eval_episodes} episodes ...")
        generator.manual_seed(args.seed)
        scores = evaluate(act, env, args.eval_episodes, run_dir / "demonstrator.gif" if args.capture_video else None)
        env.close()
        done["scores"] = scores.tolist()
        save()
    mean, stderr = mean_and_stderr(done["scores"])
    paper_random, paper_expert = PAPER_SCORES[args.env_id]
    results = {
        "stage": "collect_expert_data", "env_id": args.env_id, "seed": args.seed, "num_levels": num_levels,
        "start_level": start_level, "frames": num_iterations * batch_size, "return_mean": mean, "return_stderr": stderr,
        "episodes": args.eval_episodes, "returns": done["scores"], "relative_return": (mean - paper_random) / (paper_expert - paper_random),
        "curve": curve[:: max(1, len(curve) // 200)], **origin,
    }  # fmt: skip

    if args.num_train_frames:
        # Held-out levels: the lower half of all seeds for training, the upper half for testing
        restricted = (num_levels, start_level)
        levels = {"train": restricted, "test": restricted} if num_levels else {"train": (2**30, 0), "test": (2**30 - 1, 2**30)}
        for i, (split, num_frames) in enumerate((("train", args.num_train_frames), ("test", args.num_test_frames))):
            if split in done["splits"]:
                continue
            split_levels, split_start = levels[split]
            num_frames -= num_frames % args.num_envs
            generator.manual_seed(args.seed + 2 + i)
            env, resumed = make_env(args.env_id, args.num_envs, split_levels, split_start, args.seed + 2 + i), None
            if state and "collecting" in state and state["meta"]["scores"] is not None and split not in state["meta"]["splits"]:
                with refusing_damage(run_dir / "resume.pt"):
                    set_env_state(env, state["env"])
                    resumed = [state["collecting"][k] for k in ("t", "start", "first", "episode_returns")]
                    resumed = [resumed[0], resumed[1].numpy(), resumed[2].numpy(), resumed[3].tolist()]
                    state = None  # the next split starts at its beginning

            def save_collecting(sync, now, env=env):
                if checkpointer.due():
                    sync()
                    now = {"t": now[0], "start": torch.tensor(now[1]), "first": torch.tensor(now[2]), "episode_returns": torch.tensor(now[3])}
                    save(collecting=now, env=get_env_state(env))

            with tqdm(total=num_frames, unit="frame", unit_scale=True, desc=f"collect {split}") as progress:
                episodes = collect(act, env, data_dir / split, num_frames, progress, resumed, save_collecting)
            env.close()
            split_mean, split_stderr = mean_and_stderr(episodes) if len(episodes) > 1 else (None, None)
            done["splits"][split] = {
                "num_frames": num_frames, "num_envs": args.num_envs, "episodes": len(episodes), "return_mean": split_mean,
                "return_stderr": split_stderr, "num_levels": split_levels, "start_level": split_start, "seed": args.seed + 2 + i,
                "checksums": {path.name: checksum(path) for path in sorted((data_dir / split).glob("*.npy"))},
            }  # fmt: skip
            save()
        dataset_meta = {
            "format_version": DATA_FORMAT_VERSION, "env_id": args.env_id, "distribution_mode": "easy", "num_levels": num_levels,
            "start_level": start_level, "seed": args.seed, "splits": done["splits"], "args": asdict(args),
            "demonstrator": {"return_mean": mean, "return_stderr": stderr, "episodes": args.eval_episodes},
        }  # fmt: skip
        write_aside(data_dir / "meta.json", lambda f: f.write(json.dumps(dataset_meta, indent=2).encode()))

    writer.add_scalar("eval/return_mean", mean, 0)
    results["wall_seconds"] = round(time.time() - start_time, 1)
    write_aside(run_dir / "results.json", lambda f: f.write(json.dumps(results, indent=2).encode()))
    (run_dir / "resume.pt").unlink(missing_ok=True)
    writer.close()
    print(f"demonstrator on {args.env_id}: return {mean:.2f} +- {stderr:.2f} over {args.eval_episodes} episodes")
    following = f" and {data_dir}; next: python lapo_pretrain.py --env-id {args.env_id}{same_place(args, 'data_dir', 'runs_dir', 'seed')}"
    print(f"wrote {run_dir}" + (following if args.num_train_frames else ""))
