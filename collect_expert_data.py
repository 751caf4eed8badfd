"""LAPO, stage 1: videos of a demonstrator, which LAPO learns from (paper section 5, "Setup").

An agent of ppo_procgen.py plays, or a rule. Frames lie apart from labels, which pretraining never reads.

    python collect_expert_data.py --env-id bossfight                                       # the paper's scale
    torchrun --standalone --nproc_per_node=8 collect_expert_data.py --env-id bossfight   # 8 GPUs
    python collect_expert_data.py --env-id coinrun --expert-checkpoint experts/coinrun.pt  # a shipped agent
    python collect_expert_data.py --env-id FrozenLake-v1 --demonstrator value_iteration    # a small world
Writes the returns that the agent got to RUNS_DIR/ENV_ID__collect_expert_data__SEED, and in data/ENV_ID
    meta.json                  game, levels, counts, seeds, the demonstrator's mean return, arguments
    {train,test}/frames.npy    (N, 64, 64, 3) uint8, consecutive in time
                 first.npy     (N,) bool, True where a frame is not the successor of the one before it
                 actions.npy   (N,) int8, the action a_t taken on seeing frame t           (label)
                 rewards.npy   (N,) float32, the reward that a_t earned                    (label)
                 returns.npy   (N,) float32, return of the frame's episode, NaN if cut off (label)
"""

import atexit
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import gymnasium
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import tyro
from filelock import FileLock
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

FORMAT_VERSION = 5  # of checkpoints
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
tqdm = partial(tqdm, disable=RANK > 0)  # one bar, rank 0's


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
    allow_unfinished: bool = False  # take the checkpoint of an unfinished run, too
    # method
    num_train_frames: int = 2_621_440  # frames of the training split (the authors load 80 x 32,768)
    num_test_frames: int = 32_768  # frames of the test split; with all levels, its levels are others
    num_envs: int = 64  # parallel games
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
        hidden = self.network(obs.permute(0, 3, 1, 2).float() / 255 - 0.5)
        return self.actor(hidden).float(), self.critic(hidden).float().squeeze(-1)  # (B, A), (B,)


def value_iteration(world, rng):
    """A move on FrozenLake: the shortest way's, or one in five times any safe one; back only if it must."""
    lake = world.unwrapped
    if not hasattr(lake, "q"):  # a new map
        p, new, r, _ = np.moveaxis([[lake.P[s][a] for a in range(4)] for s in lake.P], -1, 0)  # (S, A, 1)
        lake.q, lake.new, lake.before = np.zeros((len(lake.P), 4)), new[..., 0].astype(int), None
        for _ in lake.P:
            lake.q = (p * (r + 0.95 * lake.q.max(1)[new.astype(int)])).sum(-1)
    q = np.where(lake.new[lake.s] == lake.s, 0, lake.q[lake.s])  # (4,), 0: into a wall or a hole
    ahead = np.where(lake.new[lake.s] == lake.before, 0, q)
    q, lake.before = ahead if ahead.any() else q, lake.s
    return rng.choice(np.flatnonzero(q)) if q.any() and rng.random() < 0.2 else q.argmax()


def linear_rule(world, rng):
    """An action on CartPole: push to where the pole falls."""
    return int(np.dot([0.05, 0.1, 1.0, 0.5], world.unwrapped.state) > 0)


def mean_and_stderr(returns):
    """The mean of returns (n,) and its standard error, as results name them."""
    stderr = np.std(returns, ddof=1) / np.sqrt(len(returns))
    return {"return_mean": float(np.mean(returns)), "return_stderr": float(stderr)}


def make_env(env_id, num_envs, num_levels, start_level, seed):
    """E games: act(actions), observe() -> reward (E,), {"rgb": (E, 64, 64, 3) uint8}, first (E,).

    Procgen's, easy mode. Small worlds, and Procgen's games from Python 3.13 on, are of worlds.py.
    """
    levels = {"num_levels": num_levels, "start_level": start_level}
    if sys.version_info >= (3, 13) or env_id in gymnasium.registry:
        from worlds import make_worlds

        return make_worlds(env_id, num_envs, seed=seed, **levels)
    import gym_notices.notices

    gym_notices.notices.notices.clear()  # else the next import prints four lines about gym's future
    from procgen.env import ENV_NAMES, ProcgenGym3Env

    if env_id not in ENV_NAMES:
        sys.exit(f"error: --env-id {env_id} is none of {', '.join(ENV_NAMES)}, nor a world of gymnasium")
    levels |= {"distribution_mode": "easy", "rand_seed": seed, "num_threads": min(4, os.cpu_count())}
    env = ProcgenGym3Env(num_envs, env_id, **levels)
    env.num_actions = 15
    return env


def collect(act, env, T, folder, run, step):
    """Plays T frames in each of E envs, into folder/*.npy; returns the returns of the episodes that ended.

    Env e fills rows e * T to (e + 1) * T - 1, so that rows are consecutive in time; its first row is marked
    `first`. Envs are numbered over all processes, each of which writes the rows of its own. Memory holds one
    step of all envs. The log counts frames on from `step`.
    """
    E, names = env.num, {"frames": "u1", "first": "?", "actions": "i1", "rewards": "f4", "returns": "f4"}
    for name, dtype in names.items() if RANK == 0 else ():
        folder.mkdir(parents=True, exist_ok=True)
        shape = (WORLD_SIZE * E * T, 64, 64, 3)[: 4 if name == "frames" else 1]
        np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, shape)
        with open(
            folder / f"{name}.npy", "r+b"
        ) as f:  # takes its place: a full disk shows now, not by SIGBUS
            os.posix_fallocate(f.fileno(), 0, os.fstat(f.fileno()).st_size)
    gathered(None)  # from here on the files are there
    arrays = [np.load(folder / f"{name}.npy", mmap_mode="r+") for name in names]
    firsts, actions, rewards, returns = (array.reshape(WORLD_SIZE, E, T)[RANK] for array in arrays[1:])
    returns[:] = np.nan
    start, first, ended = np.zeros(E, dtype=int), np.ones(E, dtype=bool), []
    fd = os.open(folder / "frames.npy", os.O_RDWR)
    for t in tqdm(range(T), f"collect {folder.stem}", unit="frame", unit_scale=E):
        run.leave_if_stopped()
        obs = env.observe()[1]["rgb"]
        action = act(obs)
        firsts[:, t], actions[:, t] = first, action
        for e in range(E):  # written, not mapped: pages of a memory map would count as this process's memory
            row = (RANK * E + e) * T + t
            if os.pwrite(fd, obs[e], arrays[0].offset + row * obs[e].nbytes) < obs[e].nbytes:
                raise OSError("only part of a frame could be written")
        env.act(action)
        rewards[:, t], _, first = env.observe()
        for e in np.flatnonzero(first):  # an episode ended with this reward
            returns[e, start[e] : t + 1] = rewards[e, start[e] : t + 1].sum()
            ended.append(float(returns[e, t]))
            start[e] = t + 1
        if RANK == 0 and ((t + 1) % 100 == 0 or t + 1 == T):
            played = step + (t + 1) * E * WORLD_SIZE
            run.writer.add_scalar("charts/SPS", played / (time.time() - run.began), played)
            if ended:
                run.writer.add_scalar("charts/episodic_return", np.mean(ended[-100:]), played)
    for array in arrays:
        array.flush()  # to the disk, frames too
    os.close(fd)
    return sum(gathered(ended), [])


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


def write_whole(path, content):
    """A whole file or none, text or what torch.save takes: written aside, flushed to disk, then renamed."""
    aside = Path(f"{path}.tmp")
    with open(aside, "wb") as f:
        torch.save(content, f) if path.suffix == ".pt" else f.write(content.encode())
        f.flush()
        os.fsync(f.fileno())
    aside.rename(path)


def gathered(x):
    """The objects x of all processes, on all of them, by rank."""
    found = [x] * WORLD_SIZE
    if WORLD_SIZE > 1:
        dist.all_gather_object(found, x)
    return found


def join_others():
    """Joins the processes that torchrun started: gloo connects their CPUs, nccl their GPUs; one prints."""

    def report(kind, error, trace):
        if issubclass(kind, RuntimeError) and ("gloo" in str(error) or "NCCL" in str(error)):
            print(f"error: rank {RANK} of {WORLD_SIZE} lost another: start them all again", file=sys.stderr)
        else:
            sys.__excepthook__(kind, error, trace)

    sys.excepthook, sys.stdout = report, sys.stdout if RANK == 0 else open(os.devnull, "w")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()
    atexit.register(dist.destroy_process_group)


def claim(folder, args):
    """Makes a run folder this process's: returns its lock, and the state of a stopped run, if there is one.

    Refuses a folder that is in use or finished, and a stopped run with other arguments or inputs.
    """
    lock, resume = FileLock(folder / ".lock"), folder / "resume.pt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except OSError as e:
        sys.exit(f"error: {folder} is another process's, or read-only ({e}): wait, or try another --exp-name")
    for name in ("results.json", "resume.pt") if args.overwrite else ():
        (folder / name).unlink(missing_ok=True)
    if (folder / "results.json").exists():
        sys.exit(f"error: {folder} holds a finished run: --overwrite it, or try another --exp-name or --seed")
    if not resume.exists():
        return lock, {}
    state = torch.load(resume, map_location="cpu", weights_only=True)
    args.bf16 = state["args"]["bf16"] if args.bf16 is None else args.bf16
    free = ("overwrite", "checkpoint_seconds", "allow_unfinished")
    changed = {k: v for k, v in state["args"].items() if v != vars(args).get(k) and k not in free}
    if changed:
        sys.exit(f"error: {folder} began with {changed}: keep it, --overwrite, or new --exp-name")
    return lock, state


class Run:
    """The run folder RUNS_DIR/ENV_ID__EXP_NAME__SEED, one process at a time. Nothing of the method is here.

    Files are whole or absent, also after kill -9 or on a full disk: resume.pt, where a stopped run goes on;
    checkpoint.pt, the networks, for the next stage; results.json, written last.
    """

    def __init__(self, args, inputs=()):
        """A stopped run goes on with the same arguments and inputs, the identities of what it reads."""
        self.args, self.parts, self.state, self.signal = args, {}, {}, 0
        self.dir = Path(args.runs_dir) / f"{args.env_id}__{args.exp_name}__{args.seed}"
        if WORLD_SIZE > 1:
            join_others()
        args.inputs = list(inputs)
        if RANK == 0:
            self.lock, self.state = claim(self.dir, args)
        self.state, args.bf16 = gathered((self.state, args.bf16))[0]
        self.meta = {"format_version": FORMAT_VERSION, "stage": Path(__file__).stem, "env_id": args.env_id}
        start = f"torchrun --standalone --nproc_per_node={WORLD_SIZE} " if WORLD_SIZE > 1 else "python "
        self.meta["command"] = start + shlex.join(arg for arg in sys.argv if arg != "--overwrite")
        self.meta |= {"args": vars(args), "identity": self.state.get("identity", os.urandom(16).hex())}
        self.saved, self.began = time.time(), time.time() - self.state.get("seconds", 0.0)
        if RANK == 0:
            self.writer = SummaryWriter(self.dir, purge_step=self.state.get("step", 0) + 1)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.stop)
        print(f"going on in {self.dir}, in the precision it began with" if self.state else f"run {self.dir}")

    def stop(self, number, frame):
        self.signal = number  # Ctrl-C or SIGTERM: the first asks for a save, a second ends the process
        if WORLD_SIZE == 1:  # torchrun repeats signals by itself, and kills after 30 s
            signal.signal(number, signal.SIG_DFL)

    def leave_if_stopped(self):
        if self.signal:
            print(f"\nstopped; what is saved in {self.dir} goes on with: {self.meta['command']}")
            sys.exit(128 + self.signal)  # 130 or 143, as shells expect: a pipeline stops here

    def restore(self, **parts):
        """Notes what to save, networks and optimizers; a stopped run's are loaded. Returns what was saved."""
        self.parts, ranks = parts, self.state.get("ranks", [])
        for name, part in parts.items():
            if self.state:
                part.load_state_dict(self.state[name])
            elif WORLD_SIZE > 1 and hasattr(part, "eval"):  # the same parameters and codebooks on all ranks
                part.load_state_dict(gathered({key: x.cpu() for key, x in part.state_dict().items()})[0])
        if len(ranks) == WORLD_SIZE:
            self.state |= ranks[RANK]
            torch.set_rng_state(self.state["rng"][0])
            torch.cuda.set_rng_state_all(self.state["rng"][1:])
        elif ranks or WORLD_SIZE > 1:  # every rank draws its own from here on
            torch.manual_seed(self.args.seed + RANK + self.state.get("step", 0))
            print(f"{WORLD_SIZE} processes" + f", not {len(ranks)} as before: not bit for bit" * bool(ranks))
        return self.state

    def due(self):
        """Whether to save: it is time for a rank, or one was sent a signal. All ranks agree."""
        due = torch.tensor([self.signal, time.time() - self.saved > self.args.checkpoint_seconds], dtype=int)
        if WORLD_SIZE > 1:
            dist.all_reduce(due, dist.ReduceOp.MAX)
        self.signal = int(due[0])
        return bool(due.any())

    def save(self, step, own=None, **state):
        """Saves rank 0's parts and `state`, every rank's `own`; then ends the process if it was stopped."""
        rng = [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
        state |= {"step": step, "ranks": gathered((own or {}) | {"rng": rng})}
        state |= {name: part.state_dict() for name, part in self.parts.items()}
        if RANK == 0:
            self.writer.flush()
            write_whole(self.dir / "resume.pt", self.meta | state | {"seconds": time.time() - self.began})
        self.saved = time.time()
        self.leave_if_stopped()

    def finish(self, **results):
        """Writes checkpoint.pt, then results.json: the results, and what they rest on."""
        if RANK > 0:
            return
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
    if args.num_envs < 1 or min(args.num_train_frames, args.num_test_frames) < 3 * args.num_envs:
        sys.exit("error: --num-train-frames and --num-test-frames must be 3 (a window) x --num-envs or more")
    if args.num_envs % WORLD_SIZE:
        sys.exit(f"error: --num-envs {args.num_envs} is no multiple of the {WORLD_SIZE} processes")
    rules = {"FrozenLake-v1": value_iteration, "CartPole-v1": linear_rule}
    rule = rules.get(args.env_id) if args.demonstrator != "ppo" else None
    if rule and rule.__name__ == args.demonstrator:
        expert = {"identity": args.demonstrator, "num_levels": args.num_levels, "start_level": 0}
    elif args.demonstrator != "ppo":
        sys.exit(f"error: --demonstrator {args.demonstrator} cannot play {args.env_id}: try ppo")
    else:
        path = f"{args.runs_dir}/{args.env_id}__ppo_procgen__{args.seed}/checkpoint.pt"
        parts = ["agent", "num_levels", "start_level"]
        expert = load_checkpoint(args.expert_checkpoint or path, "ppo_procgen", parts, args)
    num_levels, start_level = expert["num_levels"], expert["start_level"]
    device = (torch.accelerator.current_accelerator(True) if args.cuda else None) or torch.device("cpu")

    # a data folder is one process's, too; meta.json, written last, makes it a dataset
    data_dir = Path(args.data_dir or f"data/{args.env_id}")
    lock = FileLock(data_dir / ".lock")
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        if RANK == 0:
            lock.acquire(blocking=False)
    except OSError as e:
        sys.exit(f"error: {data_dir} is another process's, or read-only ({e}): see --data-dir")
    if (data_dir / "meta.json").exists() and not args.overwrite:
        sys.exit(f"error: {data_dir} holds a dataset: add --overwrite to replace it, or see --data-dir")
    run = Run(args, inputs=[expert["identity"]])
    run.meta |= {"num_levels": num_levels, "start_level": start_level}
    (data_dir / "meta.json").unlink(missing_ok=True)

    if not rule:
        sizes = expert["args"]["scale"], expert["args"]["patch_size"], len(expert["agent"]["actor.bias"])
        agent = Agent(*sizes)
        agent.load_state_dict(expert["agent"])
        agent = agent.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    autocast, generator = torch.autocast(device.type, torch.bfloat16, args.bf16), torch.Generator(device)
    print(f"{args.env_id}: {device}, {'bfloat16' if args.bf16 else 'float32'}")

    @torch.inference_mode()
    def act(obs):
        if rule:
            return np.array([rule(world, rng) for world in env.envs], dtype=np.int32)
        with autocast:
            logits, _ = agent(torch.as_tensor(obs, device=device))
        action = torch.multinomial(logits.softmax(-1), 1, generator=generator)  # (E, 1)
        return action.squeeze(-1).cpu().numpy().astype(np.int32)

    # a demonstrator of all levels is tested on levels of their own: the upper half of the seeds
    levels = [(num_levels, start_level)] * 2 if num_levels else [(2**30, 0), (2**30 - 1, 2**30)]
    splits, ended, step = {}, {}, 0
    for i, split in enumerate(("train", "test")):
        T = (args.num_train_frames, args.num_test_frames)[i] // args.num_envs
        seed = args.seed + 2 + i + 2 * RANK  # no two rollouts have the same
        if RANK == 0:
            shutil.rmtree(data_dir / split, ignore_errors=True)  # a stopped run's, or overwritten
        env = make_env(args.env_id, args.num_envs // WORLD_SIZE, *levels[i], seed)
        generator.manual_seed(seed)
        rng = np.random.default_rng(seed)
        try:
            ended[split] = collect(act, env, T, data_dir / split, run, step)
        except OSError as e:
            shutil.rmtree(data_dir / split, ignore_errors=True)
            sys.exit(f"error: {data_dir} cannot be written ({e}): make room, 12.3 kB a frame")
        env.close()
        splits[split] = {"num_frames": T * args.num_envs, "num_envs": args.num_envs, "seeds": gathered(seed)}
        splits[split] |= {"num_levels": levels[i][0], "start_level": levels[i][1]}
        step += T * args.num_envs

    # the demonstrator's returns, as its training measured them; if it is unfinished, of what ended here
    returns = expert.get("returns", ended["train"])
    demonstrator = mean_and_stderr(returns) | {"episodes": len(returns)} if len(returns) > 1 else {}
    data = {"format_version": 1, "identity": run.meta["identity"], "env_id": args.env_id, "seed": args.seed}
    data |= {"num_levels": num_levels, "start_level": start_level, "demonstrator": demonstrator}
    data |= {"num_actions": env.num_actions, "splits": splits, "args": vars(args)}
    if RANK == 0:
        write_whole(data_dir / "meta.json", json.dumps(data, indent=2))
    run.finish(**demonstrator, returns=returns)
    print(f"next: lapo_pretrain.py --env-id {args.env_id} --data-dir {data_dir} --runs-dir {args.runs_dir}")
