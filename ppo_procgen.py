"""PPO on Procgen, with the details of CleanRL's ppo_procgen.py: trains LAPO's demonstrators, and is the
paper's baseline "PPO from scratch" (section 6.1).

    python ppo_procgen.py --env-id bossfight                                      # the paper's scale
    torchrun --standalone --nproc_per_node=8 ppo_procgen.py --env-id bossfight   # 8 GPUs
    python ppo_procgen.py --env-id coinrun --scale 0.5 --total-timesteps 500000   # toy
    python ppo_procgen.py --env-id bossfight --exp-name ppo_from_scratch --scale 4 --num-steps 64
        --ent-coef 0.0025 --total-timesteps 4000000           # the baseline to lapo_finetune_ppo.py
Writes RUNS_DIR/ENV_ID__EXP_NAME__SEED/checkpoint.pt, the agent, which collect_expert_data.py lets play.
"""

import atexit
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import gymnasium
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import tyro
from filelock import FileLock
from gymnasium.wrappers.utils import RunningMeanStd
from torch.distributions.categorical import Categorical
from torch.utils.benchmark import Timer
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
    num_levels: int = 0  # number of levels to play, 0: all of them
    start_level: int = 0  # the first of them
    # method
    scale: float = 1.0  # width of the IMPALA-CNN: 16, 32, 32 channels times this
    patch_size: int = 1  # P: patches of P x P pixels are folded into channels (not in the paper)
    gamma: float = 0.999  # the discount factor
    gae_lambda: float = 0.95  # the lambda of the generalised advantage estimation
    norm_adv: bool = True  # normalise the advantages per minibatch
    clip_coef: float = 0.2  # the surrogate clipping coefficient
    clip_vloss: bool = True  # clip the value loss too, as in the PPO paper's code
    ent_coef: float = 0.01  # coefficient of the entropy bonus
    vf_coef: float = 0.5  # coefficient of the value loss
    # optimisation
    total_timesteps: int = 50_000_000  # frames of training
    num_envs: int = 64  # parallel games
    num_steps: int = 256  # steps in each game per rollout
    num_minibatches: int = 8  # minibatches per epoch
    update_epochs: int = 3  # epochs over each rollout
    learning_rate: float = 5e-4  # Adam's learning rate
    anneal_lr: bool = False  # lower the learning rate linearly to 0
    max_grad_norm: float = 0.5  # the maximum norm of the gradient
    eval_episodes: int = 200  # episodes over which the final agent, and random play, are scored
    # run
    runs_dir: str = "runs"  # where run folders are made
    overwrite: bool = False  # replace the run in the run folder; else a finished one is kept, another goes on
    checkpoint_seconds: float = 60.0  # seconds between checkpoints from which an interrupted run goes on
    cuda: bool = True  # use CUDA, or another accelerator that torch knows, where there is one
    bf16: tyro.conf.DisallowNone[bool | None] = None  # forward passes in bfloat16; default: if faster here


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


class RewardNormalizer:
    """Rewards divided by the running deviation of the discounted return, clipped to +-10 (gym's wrapper)."""

    def __init__(self, num_envs, gamma):
        self.gamma, self.returns, self.stats = gamma, np.zeros(num_envs), RunningMeanStd()

    def __call__(self, reward, done):
        self.returns = self.returns * self.gamma + reward
        self.stats.update(np.concatenate(gathered(self.returns)))  # of the games of all processes
        self.returns[done] = 0.0
        return np.clip(reward / np.sqrt(self.stats.var + 1e-8), -10, 10)

    def state_dict(self):
        return {key: float(x) for key, x in vars(self.stats).items()}

    def load_state_dict(self, state):
        vars(self.stats).update(state)


def compute_gae(rewards, values, dones, next_value, next_done, gamma, gae_lambda):
    """Generalised advantage estimation (Schulman et al. 2016). All (T, E); dones[t]: obs[t] is a first."""
    advantages = torch.zeros_like(rewards)
    lastgaelam = 0
    for t in reversed(range(len(rewards))):
        nextnonterminal = 1.0 - (next_done if t == len(rewards) - 1 else dones[t + 1])
        nextvalues = next_value if t == len(rewards) - 1 else values[t + 1]
        delta = rewards[t] + gamma * nextvalues * nextnonterminal - values[t]
        advantages[t] = lastgaelam = delta + gamma * gae_lambda * nextnonterminal * lastgaelam
    return advantages


def ppo_loss(logits, newvalue, actions, logprobs, advantages, returns, values, args):
    """PPO's loss (Schulman et al. 2017, equation 9) of logits (B, A) and the rest (B,), and what to log."""
    action_dist = Categorical(logits=logits, validate_args=False)  # the loop refuses NaN
    logratio = action_dist.log_prob(actions) - logprobs
    ratio = logratio.exp()
    clipped_ratio = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    pg_loss = torch.max(-advantages * ratio, -advantages * clipped_ratio).mean()
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


@torch.inference_mode()
def evaluate(policy, env, num_episodes, generator, run):
    """Returns (num_episodes,) of games with actions drawn from softmax(policy(obs, episode)), (B, A).

    An env that ends its episode begins the next in line; every episode counts, however long.
    """
    episode, running, returns = np.arange(env.num), np.zeros(env.num), np.full(num_episodes, np.nan)
    progress = tqdm(total=num_episodes, unit="episode", desc="play", leave=False)
    while np.isnan(returns).any():
        run.leave_if_stopped()
        playing, action = np.flatnonzero(episode < num_episodes), np.zeros(env.num, dtype=np.int32)
        obs = torch.from_numpy(env.observe()[1]["rgb"][playing]).to(generator.device)
        probs = policy(obs, episode[playing]).softmax(-1)
        action[playing] = torch.multinomial(probs, 1, generator=generator).squeeze(-1).cpu().numpy()
        env.act(action)
        reward, _, first = env.observe()
        running += reward
        for e in np.flatnonzero(first):
            if episode[e] < num_episodes:
                returns[episode[e]] = running[e]
                progress.update()
            episode[e], running[e] = episode.max() + 1, 0
    progress.close()
    env.close()
    return returns


def average(loss, params):
    """Averages the gradients over all processes, in place, and returns the mean loss: one all-reduce."""
    loss, grads = loss.detach(), [p.grad for p in params if p.grad is not None]
    if WORLD_SIZE > 1:
        flat = torch.cat([loss.view(1), *(grad.flatten() for grad in grads)])
        dist.all_reduce(flat)
        loss, *means = (flat / WORLD_SIZE).split([1, *(grad.numel() for grad in grads)])
        for grad, mean in zip(grads, means):
            grad.copy_(mean.view(grad.shape))
    return loss


def choose_precision(args, device, step):
    """The autocast: as --[no-]bf16 says, else bfloat16 if step(), on a few samples, is faster in it here."""

    def speedup(work):  # of bfloat16
        seconds = []
        for enabled in (False, True):
            with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
                timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
                seconds.append(min(timer.blocked_autorange(min_run_time=0.3).times))
        return seconds[0] / seconds[1]

    if args.bf16 is None and device.type != "cpu":
        args.bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    elif args.bf16 is None:
        ratio = speedup(lambda: torch.ones(256, 256) @ torch.ones(256, 256))
        ratio = speedup(step) if ratio > 0.2 else ratio  # 0.01: no instructions, a step would take minutes
        args.bf16 = gathered(ratio > 1.1)[0]
        print(f"bfloat16: {ratio:.2g}× float32 on this machine (--bf16 or --no-bf16 forces one)")
    print(f"{args.env_id}: {device}, {'bfloat16' if args.bf16 else 'float32'}")
    return torch.autocast(device.type, torch.bfloat16, enabled=args.bf16)


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
    T, E = args.num_steps, args.num_envs // WORLD_SIZE  # the games of this process
    n = len(range(RANK, args.eval_episodes, WORLD_SIZE))  # its share of the episodes
    if min(T, E, args.num_minibatches, args.update_epochs, n, args.eval_episodes - 1) < 1:
        sys.exit("error: --num-steps, -envs, -minibatches, --update-epochs: 1 or more, --eval-episodes: 2")
    batch_size, num_iterations = T * args.num_envs, max(1, args.total_timesteps // (T * args.num_envs))
    if args.num_envs % WORLD_SIZE or T * E % args.num_minibatches:
        rollout = f"{T} steps x {args.num_envs} envs / {WORLD_SIZE} processes"
        sys.exit(f"error: --num-minibatches {args.num_minibatches} does not divide {rollout}")
    levels = args.num_levels, args.start_level
    env = make_env(args.env_id, E, *levels, args.seed + RANK)
    run = Run(args)
    run.meta |= {"num_levels": args.num_levels, "start_level": args.start_level}
    device = (torch.accelerator.current_accelerator(True) if args.cuda else None) or torch.device("cpu")

    torch.manual_seed(args.seed)
    agent = Agent(args.scale, args.patch_size, A := env.num_actions)
    agent = agent.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    normalize_reward = RewardNormalizer(E, args.gamma)
    next_obs, next_done = torch.tensor(env.observe()[1]["rgb"], device=device), torch.zeros(E, device=device)
    autocast = choose_precision(args, device, lambda: agent(next_obs)[0].square().mean().backward())

    # storage
    obs = torch.zeros((T, E, 64, 64, 3), dtype=torch.uint8, device=device)  # a quarter of float storage
    actions = torch.zeros((T, E), dtype=torch.long, device=device)
    logprobs, rewards, dones, values = (torch.zeros((T, E), device=device) for _ in range(4))
    episode_return = np.zeros(E)
    state = run.restore(agent=agent, optimizer=optimizer, normalize_reward=normalize_reward)
    ended, curve = state.get("ended", []), state.get("curve", [])
    if "env" in state:  # not if other processes than now played the games
        env.callmethod("set_state", state["env"])
        next_obs, next_done = state["next_obs"].to(device), state["next_done"].to(device)
        episode_return, normalize_reward.returns = (np.array(state[k]) for k in ("episode_return", "returns"))

    micro_batch_size = 128 if device.type == "cpu" else batch_size
    first_iteration = state.get("step", 0) // batch_size
    bar = {"total": num_iterations, "initial": first_iteration, "unit": "frame", "unit_scale": batch_size}
    progress = tqdm(range(first_iteration, num_iterations), "PPO", **bar)
    for iteration in progress:
        lr = args.learning_rate * (1 - iteration / num_iterations if args.anneal_lr else 1.0)
        optimizer.param_groups[0]["lr"] = lr

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
            ended += episode_return[first].tolist()
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
            for mb in torch.randperm(T * E, device=device).chunk(args.num_minibatches):
                mb_advantages = b_advantages[mb]
                if args.norm_adv:
                    mb_advantages = (mb_advantages - mb_advantages.mean()) / (mb_advantages.std() + 1e-8)
                optimizer.zero_grad()
                for i, adv in zip(mb.split(micro_batch_size), mb_advantages.split(micro_batch_size)):
                    with autocast:
                        logits, newvalue = agent(b_obs[i])
                    batch = b_actions[i], b_logprobs[i], adv, b_returns[i], b_values[i]
                    loss, stats = ppo_loss(logits, newvalue, *batch, args)
                    (loss * len(i) / len(mb)).backward()  # adds up to the gradient of the minibatch's mean
                    logged.append(stats)
                average(loss, agent.parameters())
                norm = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                if not torch.isfinite(norm):
                    sys.exit(f"error: gradient norm {norm.item()}: lower --learning-rate, or try --no-bf16")
                optimizer.step()

        step = (iteration + 1) * batch_size
        if RANK == 0:  # logs, of its games and minibatches
            if ended:
                curve.append((step, float(np.mean(ended[-100:]))))
                run.writer.add_scalar("charts/episodic_return", curve[-1][1], step)
                progress.set_postfix_str(f"return {curve[-1][1]:.2f}")
            run.writer.add_scalar("charts/SPS", step / (time.time() - run.began), step)
            run.writer.add_scalar("charts/learning_rate", lr, step)
            explained_variance = 1 - (b_returns - b_values).var() / b_returns.var()
            names = ("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac", "explained_variance")
            for name, value in zip(names, [*torch.stack(logged).mean(0), explained_variance]):
                run.writer.add_scalar(f"losses/{name}", value.item(), step)
        if run.due() or iteration == num_iterations - 1:
            own = {"env": env.callmethod("get_state"), "next_obs": next_obs, "next_done": next_done}
            own |= {"episode_return": episode_return.tolist(), "returns": normalize_reward.returns.tolist()}
            run.save(step, own, ended=ended[-100:], curve=curve)
    env.close()

    # returns of the agent, and of random play on the same levels
    generator = torch.Generator(device).manual_seed(args.seed + RANK)
    play = [make_env(args.env_id, min(E, n), *levels, args.seed + 1000 + RANK) for _ in range(2)]
    with autocast:
        returns = evaluate(lambda obs, _: agent(obs)[0], play[0], n, generator, run)
    at_random = evaluate(lambda obs, _: torch.zeros(len(obs), A, device=device), play[1], n, generator, run)
    returns, at_random, n = *(np.concatenate(gathered(x)) for x in (returns, at_random)), args.eval_episodes
    run.meta["returns"] = returns.tolist()  # in the checkpoint, too
    results = {"return_mean": float(returns.mean()), "return_stderr": float(returns.std(ddof=1) / n**0.5)}
    results |= {"episodes": n, "random_mean": float(at_random.mean()), "frames": num_iterations * batch_size}
    run.finish(**results, curve=curve[:: 1 + len(curve) // 1000])
    print("return {return_mean:.2f} +- {return_stderr:.2f}, random play {random_mean:.2f}".format(**results))
    print(f"next: collect_expert_data.py --env-id {args.env_id} --expert-checkpoint {run.dir}/checkpoint.pt")
