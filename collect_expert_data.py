"""LAPO, stage 1: videos of a demonstrator, which LAPO learns from (paper section 5, "Setup").

An agent of ppo_procgen.py plays, or a rule. Frames lie apart from labels, which pretraining never reads.

    python collect_expert_data.py --env-id bossfight                                       # the paper's scale
    torchrun --standalone --nproc_per_node=8 collect_expert_data.py --env-id bossfight     # 8 GPUs
    python collect_expert_data.py --env-id coinrun --expert-checkpoint experts/coinrun.pt  # a shipped agent
    python collect_expert_data.py --env-id FrozenLake-v1 --demonstrator value_iteration    # a small world
Writes the demonstrator's returns to RUNS_DIR/ENV_ID__collect_expert_data__SEED, and in data/ENV_ID (where
several processes play, each in its own data/ENV_ID/shard-RANK)
    meta.json                  game, levels, counts, seeds, returns of the demonstrator and of random play
    {train,test}/frames.npy    (N, 64, 64, 3) uint8, consecutive in time
                 first.npy     (N,) bool, True where a frame is not the successor of the one before it
                 actions.npy   (N,) int8, the action a_t taken on seeing frame t           (label)
                 rewards.npy   (N,) float32, the reward that a_t earned                    (label)
                 returns.npy   (N,) float32, return of the frame's episode, NaN if cut off (label)
"""

import atexit
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import gymnasium
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import tyro
from filelock import FileLock, Timeout
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

FORMAT_VERSION = 5  # of checkpoints
# progress: a bar in a terminal, a line a minute in a file
BAR = {} if sys.stderr.isatty() else {"mininterval": 60, "bar_format": "{l_bar}{r_bar}\n"}
RANK = int(os.environ.get("RANK", 0))  # torchrun sets both
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))


@dataclass
class Args:
    # what
    env_id: str = "bossfight"  # one of Procgen's 16 games, or a gymnasium world that draws itself
    exp_name: str = Path(__file__).stem  # the run folder is RUNS_DIR/ENV_ID__EXP_NAME__SEED
    seed: int = 1  # seed of the experiment
    # data
    data_dir: str | None = None  # where the dataset goes; default data/ENV_ID
    demonstrator: Literal["ppo", "value_iteration", "linear_rule"] = "ppo"
    """who plays: PPO's agent, on FrozenLake-v1 also value_iteration, on CartPole-v1 linear_rule"""
    num_levels: int = 0  # number of levels that a rule plays, 0: all; an agent plays those of its training
    expert_checkpoint: str | None = None  # default: RUNS_DIR/ENV_ID__ppo_procgen__SEED/checkpoint.pt
    # method
    num_train_frames: int = 2_621_440  # frames of the training split (the authors load 80 x 32,768)
    num_test_frames: int = 32_768  # frames of the test split; with all levels, its levels are others
    num_random_episodes: int = 200  # episodes of random play, whose mean return later stages count from
    num_envs: int = 64  # parallel games, over all processes
    # run
    runs_dir: str = "runs"  # where run folders are made
    overwrite: bool = False  # replace the run in the run folder and the dataset; else both are kept
    cuda: bool = True  # use CUDA, or another accelerator that torch knows, where there is one
    bf16: bool = False  # forward passes in bfloat16


class ResidualBlock(nn.Module):
    """ReLU, 3x3 convolution, ReLU, 3x3 convolution, plus the input. (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels, hidden):
        super().__init__()
        self.conv0 = nn.Conv2d(channels, hidden, kernel_size=3, padding=1)
        self.conv1 = nn.Conv2d(hidden, channels, kernel_size=3, padding=1)

    def forward(self, x):
        # in place where nobody needs the old values: fewer passes over memory
        hidden = torch.relu_(self.conv0(torch.relu(x)))
        return self.conv1(hidden).add_(x)


class ImpalaCNN(nn.Module):
    """IMPALA-CNN (Espeholt et al. 2018, figure 3): (B, C, 64, 64) -> (B, 256).

    Channels are 16, 32, 32 times scale. patch_size P (1 in the paper) folds patches of P x P pixels
    into channels first: (B, C * P^2, 64 / P, 64 / P).
    """

    def __init__(self, in_channels, scale, patch_size=1):
        super().__init__()
        layers = []
        if patch_size > 1:
            layers.append(nn.PixelUnshuffle(patch_size))
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
    """PPO's actor-critic on an IMPALA-CNN: (B, 64, 64, 3) uint8 -> logits (B, A), values (B,)."""

    def __init__(self, scale, patch_size=1, num_actions=15):
        super().__init__()
        self.network = ImpalaCNN(3, scale, patch_size)
        self.actor = nn.Linear(256, num_actions)
        self.critic = nn.Linear(256, 1)
        for head, std in ((self.actor, 0.01), (self.critic, 1.0)):  # CleanRL's layer_init
            nn.init.orthogonal_(head.weight, std)
            nn.init.zeros_(head.bias)

    def forward(self, obs):
        # HWC memory seen as (B, 3, 64, 64) is channels-last already: no copy
        x = obs.permute(0, 3, 1, 2).float() / 255 - 0.5
        hidden = self.network(x)
        return self.actor(hidden).float(), self.critic(hidden).float().squeeze(-1)


def load_agent(expert, device, autocast):
    """PPO's agent as a demonstrator like the rules: its actions (E,) are drawn by torch, from its policy."""
    num_actions = len(expert["agent"]["actor.bias"])
    agent = Agent(expert["args"]["scale"], expert["args"]["patch_size"], num_actions)
    agent.load_state_dict(expert["agent"])
    agent = agent.to(device, memory_format=torch.channels_last).eval()

    @torch.inference_mode()
    def act(env, obs, rng):
        with autocast:
            logits, _ = agent(torch.as_tensor(obs, device=device))  # (E, A)
        action = torch.multinomial(logits.softmax(-1), 1)  # (E, 1)
        return action.squeeze(1).cpu().numpy().astype(np.int32)

    return act


def collect(act, env, T, rng, folder):
    """Plays T frames in each of E games, into folder/*.npy; returns the returns of the episodes that ended.

    Game e fills rows e * T to (e + 1) * T - 1, so that rows are consecutive in time; its first row is marked
    `first`.
    """
    E = env.num
    frames = allocate(folder, (E * T, 64, 64, 3)).reshape(E, T, 64, 64, 3)  # on the disk
    firsts = np.zeros((E, T), dtype=bool)
    actions = np.zeros((E, T), dtype=np.int8)
    rewards = np.zeros((E, T), dtype=np.float32)
    returns = np.full((E, T), np.nan, dtype=np.float32)
    start = np.zeros(E, dtype=int)  # where the games' running episodes began
    ended = []
    first = np.ones(E, dtype=bool)
    _, obs, _ = env.observe()
    for t in tqdm(range(T), f"collect {folder.name}", unit="frame", unit_scale=E, disable=RANK > 0, **BAR):
        frames[:, t] = obs["rgb"]
        firsts[:, t] = first
        action = act(env, obs["rgb"], rng)  # (E,) int32
        actions[:, t] = action
        env.act(action)
        reward, obs, first = env.observe()
        rewards[:, t] = reward
        for e in np.flatnonzero(first):  # an episode ended with this reward
            returns[e, start[e] : t + 1] = rewards[e, start[e] : t + 1].sum()
            ended.append(float(returns[e, t]))
            start[e] = t + 1
    frames.flush()
    labels = {"first": firsts, "actions": actions, "rewards": rewards, "returns": returns}
    for name, array in labels.items():
        np.save(folder / f"{name}.npy", array.reshape(-1))
    return ended


def main(args):
    device, autocast = start(args)
    if args.demonstrator == "ppo":
        default = run_folder(args, "ppo_procgen") / "checkpoint.pt"
        expert = load_checkpoint(args.expert_checkpoint or default, "ppo_procgen", args.env_id)
        act = load_agent(expert, device, autocast)
    else:
        expert = {"num_levels": args.num_levels, "start_level": 0}
        act = find_rule(args)
    folder, data_dir, shard = open_folders(args)
    began = time.time()
    writer = SummaryWriter(folder) if RANK == 0 else None

    levels = {"num_levels": expert["num_levels"], "start_level": expert["start_level"]}
    train_levels = test_levels = levels
    if levels["num_levels"] == 0:  # all: the test split's are others, the upper half of the seeds
        train_levels = {"num_levels": 2**30, "start_level": 0}
        test_levels = {"num_levels": 2**30 - 1, "start_level": 2**30}
    plan = {"train": (args.num_train_frames, train_levels), "test": (args.num_test_frames, test_levels)}
    E = args.num_envs // WORLD_SIZE  # games of this process
    seed = args.seed + 2 + 2 * RANK  # no two rollouts have the same
    played = 0  # frames of all processes
    splits = {}
    ended = {}  # returns
    for split, (num_frames, split_levels) in plan.items():
        T = num_frames // args.num_envs
        env = make_env(args.env_id, E, seed=seed, **split_levels)
        torch.manual_seed(seed)
        rng = np.random.default_rng(seed)
        ended[split] = collect(act, env, T, rng, shard / split)
        env.close()
        splits[split] = {"num_frames": T * E, "num_envs": E, "seeds": [seed], **split_levels}
        played += T * args.num_envs
        seed += 1
        if RANK == 0 and ended[split]:
            writer.add_scalar("charts/episodic_return", np.mean(ended[split]), played)

    # random play on the training levels, whose return later stages call 0; every process finds the same
    num_envs = min(args.num_envs, args.num_random_episodes)
    env = make_env(args.env_id, num_envs, seed=args.seed + 1, **train_levels)
    random_returns = play_at_random(env, args.num_random_episodes, np.random.default_rng(args.seed + 1))
    env.close()

    # the demonstrator's returns are those of its scoring, a rule's those of the episodes that ended above
    returns = expert.get("returns", ended["train"])
    demonstrator = score(returns)
    meta = {
        "format_version": 1,
        "env_id": args.env_id,
        "seed": args.seed,
        **levels,
        "num_actions": env.num_actions,
        "demonstrator": demonstrator,
        "random": {**score(random_returns), "returns": random_returns.tolist()},
        "splits": splits,
        "args": vars(args),
    }
    if WORLD_SIZE > 1:
        dist.barrier()  # no shard is whole before all are
    (shard / "meta.json.tmp").write_text(json.dumps(meta, indent=2))
    os.replace(shard / "meta.json.tmp", shard / "meta.json")  # last: it makes a dataset
    if RANK == 0:
        writer.close()
        finish(folder, args, time.time() - began, {**demonstrator, **levels, "returns": returns})
        where = f"--data-dir {data_dir} --runs-dir {args.runs_dir}"
        print(f"next: lapo_pretrain.py --env-id {args.env_id} {where}")
    if WORLD_SIZE > 1:
        dist.destroy_process_group()


# ---- Random play, games, run-keeping: nobody has to read on ----


def find_rule(args):
    """The rule that plays a small world: rule(env, obs, rng) -> actions (E,)."""
    from tools.worlds import RULES

    if (args.env_id, args.demonstrator) not in RULES:
        refuse(f"--demonstrator {args.demonstrator} cannot play {args.env_id}: try ppo")
    return RULES[args.env_id, args.demonstrator]


def play_at_random(env, num_episodes, rng):
    """Returns (num_episodes,) of games with uniformly drawn actions.

    An env that ends its episode begins the next in line; every episode counts, however long.
    """
    episode = np.arange(env.num)  # the one that each env plays
    running = np.zeros(env.num)
    returns = np.full(num_episodes, np.nan)
    while np.isnan(returns).any():
        env.act(rng.integers(env.num_actions, size=env.num, dtype=np.int32))
        reward, _, first = env.observe()
        running += reward
        for e in np.flatnonzero(first):
            if episode[e] < num_episodes:
                returns[episode[e]] = running[e]
            episode[e] = episode.max() + 1
            running[e] = 0
    return returns


def score(returns):
    """The mean of returns (n,), its standard error and n, as results name them; of fewer than two nothing."""
    if len(returns) < 2:
        return {}
    stderr = np.std(returns, ddof=1) / len(returns) ** 0.5
    return {"return_mean": float(np.mean(returns)), "return_stderr": float(stderr), "episodes": len(returns)}


def make_env(env_id, num_envs, num_levels, start_level, seed):
    """E games: act(actions), observe() -> reward (E,), {"rgb": (E, 64, 64, 3) uint8}, first (E,).

    Procgen's, easy mode. Small worlds, and Procgen's games on Python 3.13, are of tools/worlds.py.
    """
    if find_spec("procgen") and env_id not in gymnasium.registry and ":" not in env_id:
        import gym_notices.notices

        gym_notices.notices.notices.clear()  # else the next import prints four lines about gym's future
        from procgen.env import ENV_NAMES, ProcgenGym3Env

        if env_id not in ENV_NAMES:
            refuse(f"--env-id {env_id} is none of {', '.join(ENV_NAMES)}, nor a world of gymnasium")
        levels = {"num_levels": num_levels, "start_level": start_level, "rand_seed": seed}
        threads = min(4, os.cpu_count())
        env = ProcgenGym3Env(num_envs, env_id, distribution_mode="easy", num_threads=threads, **levels)
        env.num_actions = 15
        return env
    from tools.worlds import make_worlds

    return make_worlds(env_id, num_envs, num_levels, start_level, seed)


def load_checkpoint(path, stage, env_id):
    """What stage.py saved for this game when it finished, on the CPU; all else is refused in a sentence."""
    again = f"`python {stage}.py --env-id {env_id}` makes one"
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        found = [checkpoint["stage"], checkpoint["env_id"], checkpoint["format_version"]]
    except Exception as e:  # a missing or damaged file raises many kinds
        refuse(f"{path} is no checkpoint of a finished run ({type(e).__name__}): {again}")
    expected = [stage, env_id, FORMAT_VERSION]
    if found != expected:
        refuse(f"{path} is of stage, game and format {found}, expected {expected}: {again}")
    return checkpoint


def refuse(sentence):
    """Ends the process, and says why; of several processes one says it."""
    if RANK == 0:
        tqdm.write(f"error: {sentence}", file=sys.stderr)  # clears the progress bar first
    sys.exit(1)


def start(args):
    """Joins torchrun's processes. Returns this process's device, and the autocast of its forward passes."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the process at once, without a traceback
    if min(args.num_envs, args.num_random_episodes - 1) < 1:
        refuse("--num-envs starts at 1, --num-random-episodes at 2")
    if min(args.num_train_frames, args.num_test_frames) < 3 * args.num_envs:
        refuse("--num-train-frames and --num-test-frames start at 3 (a window) x --num-envs")
    if args.num_envs % WORLD_SIZE:
        refuse(f"--num-envs {args.num_envs} is no multiple of the {WORLD_SIZE} processes")
    device = torch.device("cpu")
    if args.cuda and torch.accelerator.is_available():
        torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", 0)))
        device = torch.accelerator.current_accelerator()
    if WORLD_SIZE > 1:
        dist.init_process_group()
    return device, torch.autocast(device.type, torch.bfloat16, enabled=args.bf16)


def run_folder(args, name):
    """RUNS_DIR/ENV_ID__NAME__SEED: one folder, also of a world whose name has a slash."""
    return Path(args.runs_dir) / f"{args.env_id}__{name}__{args.seed}".replace("/", "-")


def open_folders(args):
    """The run folder and the dataset's, these processes' until they end; and where this one writes."""
    folder = run_folder(args, args.exp_name)
    data_dir = Path(args.data_dir or f"data/{args.env_id.replace('/', '-')}")
    metas = list(data_dir.glob("meta.json")) + list(data_dir.glob("shard-*/meta.json"))
    if not args.overwrite:
        if (folder / "results.json").exists():
            refuse(f"{folder} holds a finished run: --overwrite it, or choose another --exp-name")
        if metas:
            refuse(f"{data_dir} holds a dataset: --overwrite it, or choose another --data-dir")
    if RANK == 0:
        for path in (data_dir, folder):
            path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path / ".lock")
            atexit.register(lock.release)  # it is held as long as something refers to it
            try:
                lock.acquire(blocking=False)
            except Timeout:
                refuse(f"another process works in {path}: wait, or choose another --exp-name or --data-dir")
        (folder / "results.json").unlink(missing_ok=True)
        for meta in metas:
            meta.unlink()
        for pattern in ("train", "test", "shard-*"):  # overwritten, or of a collection that was stopped
            for old in data_dir.glob(pattern):
                shutil.rmtree(old, ignore_errors=True)
    if WORLD_SIZE == 1:
        return folder, data_dir, data_dir
    dist.barrier()
    return folder, data_dir, data_dir / f"shard-{RANK}"


def allocate(folder, shape):
    """A new frames.npy of uint8, mapped: a full disk has to show now, or it would end the process later."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < math.prod(shape):
        refuse(f"{folder} has room for {free / 1e9:.1f} of {math.prod(shape) / 1e9:.1f} GB: see --data-dir")
    return np.lib.format.open_memmap(folder / "frames.npy", "w+", np.uint8, shape)


def describe(args):
    """What states, checkpoints and results say of their run."""
    return {
        "format_version": FORMAT_VERSION,
        "stage": Path(__file__).stem,
        "env_id": args.env_id,
        "args": vars(args),
        "command": shlex.join(["python", *(arg for arg in sys.argv if arg != "--overwrite")]),
        "processes": WORLD_SIZE,
    }


def finish(folder, args, seconds, results):
    """results.json, last: it makes the run a finished one."""
    device = torch.backends.cpu.get_cpu_capability()
    if args.cuda and torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    code = Path(__file__).parent
    machine = {
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": subprocess.getoutput(f"git -C '{code}' describe --always --dirty 2>/dev/null"),
        "wall_seconds": round(seconds, 1),
    }
    results = {**results, **machine, **describe(args)}
    (folder / "results.json.tmp").write_text(json.dumps(results, indent=2))
    os.replace(folder / "results.json.tmp", folder / "results.json")
    print(f"wrote {folder}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
