"""PPO on Procgen, with the details of CleanRL's ppo_procgen.py: trains LAPO's demonstrators, and is the
paper's baseline "PPO from scratch" (section 6.1).

    python ppo_procgen.py --env-id bossfight                                      # the paper's scale
    torchrun --standalone --nproc_per_node=8 ppo_procgen.py --env-id bossfight    # 8 GPUs
    python ppo_procgen.py --env-id coinrun --scale 0.5 --total-timesteps 500000   # toy
    python ppo_procgen.py --env-id bossfight --exp-name ppo_from_scratch --scale 4 --num-steps 64
        --ent-coef 0.0025 --total-timesteps 4000000           # the baseline to lapo_finetune_ppo.py
Writes RUNS_DIR/ENV_ID__EXP_NAME__SEED/checkpoint.pt, the agent, which collect_expert_data.py lets play. See
docs/ppo_procgen.md.
"""

import atexit
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import gymnasium
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import tyro
from filelock import FileLock, Timeout
from gymnasium.wrappers.utils import RunningMeanStd
from torch.distributions.categorical import Categorical
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

FORMAT_VERSION = 5  # of checkpoints
SAVE_SECONDS = 60  # between the states from which an interrupted run goes on
# flags that are no arguments of the method
PLACES = "runs_dir overwrite cuda track wandb_project_name wandb_entity".split()
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
    num_levels: int = 0  # number of levels to play, 0: all of them
    start_level: int = 0  # the first of them
    # method
    scale: float = 1.0  # width of the IMPALA-CNN: 16, 32, 32 channels times this
    patch_size: int = 1  # P: patches of P x P pixels are folded into channels (not in the paper)
    gamma: float = 0.999  # the discount factor
    gae_lambda: float = 0.95  # the lambda of the generalised advantage estimation
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
    eval_episodes: int = 200  # episodes over which the final agent is scored
    # run
    runs_dir: str = "runs"  # where run folders are made
    overwrite: bool = False  # begin anew; else a finished run is kept, and an unfinished one goes on
    track: bool = False  # send the same logs to Weights & Biases
    wandb_project_name: str = "lapo"  # its project
    wandb_entity: str | None = None  # its team; default: your own
    cuda: bool = True  # use CUDA, or another accelerator that torch knows, where there is one
    bf16: tyro.conf.DisallowNone[bool | None] = None  # forward passes in bfloat16; default: on CUDA GPUs


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


class RewardNormalizer:
    """Rewards divided by the running deviation of the discounted return, clipped to +-10 (gym's wrapper)."""

    def __init__(self, num_envs, gamma):
        self.gamma = gamma
        self.returns = np.zeros(num_envs)
        self.stats = RunningMeanStd()  # of this process's games

    def __call__(self, reward, done):
        self.returns = self.returns * self.gamma + reward
        self.stats.update(self.returns)
        self.returns[done] = 0.0
        return np.clip(reward / np.sqrt(self.stats.var + 1e-8), -10, 10)


def compute_gae(rewards, values, dones, next_value, next_done, gamma, gae_lambda):
    """Generalised advantage estimation (Schulman et al. 2016). All (T, E); dones[t]: obs[t] is a first."""
    advantages = torch.zeros_like(rewards)
    lastgaelam = 0
    for t in reversed(range(len(rewards))):
        if t == len(rewards) - 1:
            nextnonterminal = 1.0 - next_done
            nextvalues = next_value
        else:
            nextnonterminal = 1.0 - dones[t + 1]
            nextvalues = values[t + 1]
        delta = rewards[t] + gamma * nextvalues * nextnonterminal - values[t]
        lastgaelam = delta + gamma * gae_lambda * nextnonterminal * lastgaelam
        advantages[t] = lastgaelam
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
    v_loss = 0.5 * v_loss.mean()

    entropy_loss = action_dist.entropy().mean()
    loss = pg_loss - args.ent_coef * entropy_loss + args.vf_coef * v_loss
    metrics = {
        "policy_loss": pg_loss.detach(),
        "value_loss": v_loss.detach(),
        "entropy": entropy_loss.detach(),
        "approx_kl": ((ratio - 1) - logratio).mean().detach(),  # http://joschu.net/blog/kl-approx.html
        "clipfrac": ((ratio - 1.0).abs() > args.clip_coef).float().mean(),
    }
    return loss, metrics


def average_gradients(parameters):
    """Makes every gradient the mean over all processes."""
    for p in parameters:
        if p.grad is not None:
            dist.all_reduce(p.grad)
            p.grad /= WORLD_SIZE


def main(args):
    device, autocast = start(args)
    folder, resumed = open_folder(args)
    began = time.time() - resumed.get("seconds", 0)
    T = args.num_steps
    E = args.num_envs // WORLD_SIZE  # games of this process
    batch_size = T * args.num_envs  # frames in a rollout of all processes
    num_iterations = max(1, args.total_timesteps // batch_size)
    done = resumed.get("iteration", 0)
    seed = args.seed + RANK + WORLD_SIZE * done  # a resumed run plays new episodes
    env = make_env(args.env_id, E, args.num_levels, args.start_level, seed)

    # agent
    torch.manual_seed(args.seed)  # the same on all processes
    agent = Agent(args.scale, args.patch_size, env.num_actions)
    agent = agent.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    normalize_reward = RewardNormalizer(E, args.gamma)
    torch.manual_seed(seed)  # from here on every process draws its own

    # storage
    obs = torch.zeros((T, E, 64, 64, 3), dtype=torch.uint8, device=device)  # a quarter of float storage
    actions = torch.zeros((T, E), dtype=torch.long, device=device)
    logprobs = torch.zeros((T, E), device=device)
    rewards = torch.zeros((T, E), device=device)
    dones = torch.zeros((T, E), device=device)
    values = torch.zeros((T, E), device=device)

    if resumed:
        agent.load_state_dict(resumed["agent"])
        optimizer.load_state_dict(resumed["optimizer"])
        vars(normalize_reward.stats).update(resumed["reward_stats"])
    episode_returns = deque(resumed.get("episode_returns", []), maxlen=100)
    curve = resumed.get("curve", [])
    if RANK == 0:
        writer = make_writer(args, folder, done * batch_size)
    micro_batch_size = 128 if device.type == "cpu" else batch_size  # 128: what fits a CPU's caches
    _, frames, _ = env.observe()
    next_obs = torch.tensor(frames["rgb"], device=device)  # (E, 64, 64, 3) uint8
    next_done = torch.zeros(E, device=device)
    episode_return = np.zeros(E)
    saved = time.time()
    iterations = range(done, num_iterations)
    progress = tqdm(iterations, "PPO", num_iterations, initial=done, disable=RANK > 0, **BAR)
    for iteration in progress:
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - iteration / num_iterations)

        # rollout
        for t in range(T):
            obs[t] = next_obs
            dones[t] = next_done
            with torch.inference_mode(), autocast:
                logits, values[t] = agent(next_obs)
                action_dist = Categorical(logits=logits)
                actions[t] = action_dist.sample()
                logprobs[t] = action_dist.log_prob(actions[t])
            env.act(actions[t].cpu().numpy().astype(np.int32))
            reward, frames, first = env.observe()
            next_obs = torch.tensor(frames["rgb"], device=device)
            next_done = torch.tensor(first, dtype=torch.float32, device=device)
            rewards[t] = torch.from_numpy(normalize_reward(reward, first)).float()
            episode_return += reward
            episode_returns.extend(episode_return[first].tolist())
            episode_return[first] = 0

        # advantages
        with torch.inference_mode(), autocast:
            _, next_value = agent(next_obs)
        advantages = compute_gae(rewards, values, dones, next_value, next_done, args.gamma, args.gae_lambda)
        returns = advantages + values

        # update
        b_obs = obs.flatten(0, 1)
        b_actions = actions.flatten()
        b_logprobs = logprobs.flatten()
        b_advantages = advantages.flatten()
        b_returns = returns.flatten()
        b_values = values.flatten()
        logged = []
        for _ in range(args.update_epochs):
            for mb in torch.randperm(T * E, device=device).chunk(args.num_minibatches):
                mb_advantages = b_advantages[mb]
                mb_advantages = (mb_advantages - mb_advantages.mean()) / (mb_advantages.std() + 1e-8)
                optimizer.zero_grad()
                for i, adv in zip(mb.split(micro_batch_size), mb_advantages.split(micro_batch_size)):
                    with autocast:
                        logits, newvalue = agent(b_obs[i])
                    rollout = b_actions[i], b_logprobs[i], adv, b_returns[i], b_values[i]
                    loss, metrics = ppo_loss(logits, newvalue, *rollout, args)
                    (loss * len(i) / len(mb)).backward()  # adds up to the gradient of the minibatch's mean
                    logged.append(metrics)
                if WORLD_SIZE > 1:
                    average_gradients(agent.parameters())
                nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                optimizer.step()

        check_finite(agent, iteration + 1)
        if RANK == 0:
            step = (iteration + 1) * batch_size
            if episode_returns:
                mean_return = float(np.mean(episode_returns))
                curve.append((step, mean_return))
                writer.add_scalar("charts/episodic_return", mean_return, step)
                progress.set_postfix_str(f"return {mean_return:.2f}", refresh=False)
            writer.add_scalar("charts/SPS", step / (time.time() - began), step)
            writer.add_scalar("charts/learning_rate", optimizer.param_groups[0]["lr"], step)
            for name in logged[0]:
                value = torch.stack([metrics[name] for metrics in logged]).mean()
                writer.add_scalar(f"losses/{name}", value.item(), step)
            explained_variance = 1 - (b_returns - b_values).var() / b_returns.var()
            writer.add_scalar("losses/explained_variance", explained_variance.item(), step)
        if RANK == 0 and (time.time() - saved > SAVE_SECONDS or iteration + 1 == num_iterations):
            stats = vars(normalize_reward.stats).items()
            state = {
                "agent": agent.state_dict(),
                "optimizer": optimizer.state_dict(),
                "reward_stats": {name: float(value) for name, value in stats},
                "episode_returns": list(episode_returns),
                "iteration": iteration + 1,
                "curve": curve,
                "seconds": time.time() - began,
            }
            save(folder / "resume.pt", {**describe(args), **state})
            saved = time.time()
    env.close()

    if RANK == 0:
        writer.close()
        torch.manual_seed(args.seed + 1000)
        num_envs = min(args.num_envs, args.eval_episodes)
        env = make_env(args.env_id, num_envs, args.num_levels, args.start_level, args.seed + 1000)
        with autocast:
            returns = evaluate(lambda obs: agent(obs)[0], env, args.eval_episodes, device)
        played = {"num_levels": args.num_levels, "start_level": args.start_level, "returns": returns.tolist()}
        results = {
            "return_mean": float(returns.mean()),
            "return_stderr": float(returns.std(ddof=1) / len(returns) ** 0.5),
            "episodes": len(returns),
            "frames": num_iterations * batch_size,
            "curve": curve,
        }
        networks = {"agent": agent.state_dict(), **played}
        finish(folder, args, time.time() - began, networks, {**results, **played})
        print("return {return_mean:.2f} +- {return_stderr:.2f}".format(**results))
        expert = f"--expert-checkpoint {folder}/checkpoint.pt"
        print(f"next: collect_expert_data.py --env-id {args.env_id} {expert}")
    if WORLD_SIZE > 1:
        dist.destroy_process_group()


# ---- Games, evaluation, run-keeping: nobody has to read on ----


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


@torch.inference_mode()
def evaluate(policy, env, num_episodes, device):
    """Returns (num_episodes,) of games with actions drawn from softmax(policy(obs)), (B, A).

    An env that ends its episode begins the next in line; every episode counts, however long.
    """
    episode = np.arange(env.num)  # the one that each env plays
    running = np.zeros(env.num)
    returns = np.full(num_episodes, np.nan)
    progress = tqdm(total=num_episodes, desc="play", unit="episode", leave=False, **BAR)
    _, frames, _ = env.observe()
    while np.isnan(returns).any():
        logits = policy(torch.tensor(frames["rgb"], device=device))
        action = Categorical(logits=logits).sample()
        env.act(action.cpu().numpy().astype(np.int32))
        reward, frames, first = env.observe()
        running += reward
        for e in np.flatnonzero(first):
            if episode[e] < num_episodes:
                returns[episode[e]] = running[e]
                progress.update()
            episode[e] = episode.max() + 1
            running[e] = 0
    progress.close()
    env.close()
    return returns


def refuse(sentence):
    """Ends the process, and says why; of several processes one says it."""
    if RANK == 0:
        tqdm.write(f"error: {sentence}", file=sys.stderr)  # clears the progress bar first
    sys.exit(1)


def start(args):
    """Joins torchrun's processes. Returns this process's device, and the autocast of its forward passes."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the process at once, without a traceback
    sizes = (args.num_steps, args.num_envs, args.num_minibatches, args.update_epochs, args.eval_episodes - 1)
    if min(sizes) < 1:
        refuse("--num-steps, --num-envs, --num-minibatches, --update-epochs start at 1, --eval-episodes at 2")
    if args.num_envs % WORLD_SIZE or args.num_steps * args.num_envs // WORLD_SIZE % args.num_minibatches:
        rollout = f"{args.num_steps} steps x {args.num_envs} envs / {WORLD_SIZE} processes"
        refuse(f"--num-minibatches {args.num_minibatches} does not divide {rollout}")
    make_env(args.env_id, 1, args.num_levels, args.start_level, args.seed).close()  # or refuses --env-id
    device = torch.device("cpu")
    if args.cuda and torch.accelerator.is_available():
        torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", 0)))
        device = torch.accelerator.current_accelerator()
    if WORLD_SIZE > 1:
        dist.init_process_group()
    bf16 = args.bf16
    if bf16 is None:
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return device, torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def run_folder(args, name):
    """RUNS_DIR/ENV_ID__NAME__SEED: one folder, also of a world whose name has a slash."""
    return Path(args.runs_dir) / f"{args.env_id}__{name}__{args.seed}".replace("/", "-")


def open_folder(args):
    """The run folder, this process's until it ends, and the state of an unfinished run in it, else {}."""
    folder = run_folder(args, args.exp_name)
    if RANK == 0:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        atexit.register(lock.release)  # it is held as long as something refers to it
        try:
            lock.acquire(blocking=False)
        except Timeout:
            refuse(f"another process works in {folder}: wait, or choose another --exp-name")
        if args.overwrite:
            for name in ("results.json", "checkpoint.pt", "resume.pt"):
                (folder / name).unlink(missing_ok=True)
    if WORLD_SIZE > 1:
        dist.barrier()
    if (folder / "results.json").exists():
        refuse(f"{folder} holds a finished run: --overwrite it, or choose another --exp-name")
    if not (folder / "resume.pt").exists():
        return folder, {}
    resumed = torch.load(folder / "resume.pt", map_location="cpu", weights_only=True)
    for name, value in vars(args).items():
        if name not in PLACES and value != resumed["args"][name]:
            was = f"--{name.replace('_', '-')} {resumed['args'][name]}"
            refuse(f"{folder} holds an unfinished run with {was}: repeat that, or --overwrite it")
    return folder, resumed


def make_writer(args, folder, step):
    """TensorBoard's writer, for logs after `step`; with --track Weights & Biases gets the same."""
    if args.track:
        try:
            import wandb
        except ImportError:
            refuse("--track needs Weights & Biases: `pip install wandb`, then `wandb login`")
        wandb.init(
            project=args.wandb_project_name,
            entity=args.wandb_entity,
            name=folder.name,
            config=vars(args),
            sync_tensorboard=True,
        )
    return SummaryWriter(folder, purge_step=step + 1)


def check_finite(network, step):
    """Ends the process before NaN gets into a saved state."""
    if not all(p.isfinite().all() for p in network.parameters()):
        refuse(f"parameters are not finite at update {step}: lower --learning-rate, or try --no-bf16")


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


def save(path, content):
    """A whole file or none, also after kill -9: written aside, then renamed."""
    torch.save(content, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def finish(folder, args, seconds, networks, results):
    """checkpoint.pt, for the next stage, and last results.json, which makes the run a finished one."""
    save(folder / "checkpoint.pt", {**describe(args), **networks})
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
    (folder / "resume.pt").unlink(missing_ok=True)
    print(f"wrote {folder}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
