# /// script
# requires-python = ">=3.10,<3.13"
# dependencies = ["torch==2.13.0", "procgen-mirror==0.10.7", "gym==0.26.2", "numpy<2", "tyro", "tensorboard", "tqdm"]
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

import json
import os
import random
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.optim as optim
import tyro
from procgen import ProcgenGym3Env
from procgen.env import ENV_NAMES
from torch.distributions.categorical import Categorical
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

FORMAT_VERSION = 1  # of checkpoints and datasets


@dataclass
class Args:
    exp_name: str = os.path.basename(__file__)[: -len(".py")]
    """the name of this experiment; the run folder is RUNS_DIR/ENV_ID__EXP_NAME__SEED"""
    seed: int = 1
    """seed of the experiment"""
    torch_deterministic: bool = True
    """if toggled, `torch.backends.cudnn.deterministic=True`"""
    cuda: bool = True
    """if toggled, cuda is used when there is one"""
    bf16: bool = True
    """run the network's forward pass in bfloat16 (faster where the processor knows it; parameters stay float32)"""
    track: bool = False
    """if toggled, this experiment is also tracked with Weights and Biases (`pip install wandb`)"""
    wandb_project_name: str = "lapo"
    """the wandb's project name"""
    wandb_entity: str | None = None
    """the entity (team) of wandb's project"""
    capture_video: bool = False
    """write a GIF of the demonstrator's first episodes to the run folder"""
    runs_dir: str = "runs"
    """where run folders (TensorBoard logs, checkpoint.pt, results.json) are made"""
    overwrite: bool = False
    """replace a finished run, or a finished dataset, of the same name"""

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
    """IMPALA-CNN (Espeholt et al. 2018, figure 3 right), (B, C, 64, 64) -> (B, 256), with 16, 32, 32 channels times `scale`."""

    def __init__(self, in_channels, scale):
        super().__init__()
        layers = []
        for channels in (int(16 * scale), int(32 * scale), int(32 * scale)):
            layers += [
                nn.Conv2d(in_channels, channels, kernel_size=3, padding=1),
                nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
                ResidualBlock(channels, channels),
                ResidualBlock(channels, channels),
            ]
            in_channels = channels
        self.conv = nn.Sequential(*layers, nn.Flatten(), nn.ReLU())  # (B, 32 * scale * 8 * 8)
        self.fc = nn.Linear(int(32 * scale) * 8 * 8, 256)

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


def evaluate(act, env, num_episodes, gif=None):
    """Returns of num_episodes episodes, (num_episodes,). Each env gives equally many, so that long episodes count as much as short ones."""
    num_envs = env.num
    quota = -(-num_episodes // num_envs)
    running, returns, film = np.zeros(num_envs), [[] for _ in range(num_envs)], []
    while True:
        playing = np.flatnonzero([len(r) < quota for r in returns])
        if not len(playing):
            break
        obs = env.observe()[1]["rgb"]
        if gif and len(film) < 600:
            film.append(np.concatenate(obs[:4].repeat(3, axis=1).repeat(3, axis=2), axis=1))
        action = np.zeros(num_envs, dtype=np.int32)
        action[playing] = act(obs[playing])  # envs that have given their share idle along, at no cost to the network
        env.act(action)
        reward, _, first = env.observe()
        running += reward
        for e in np.flatnonzero(first):
            returns[e].append(running[e])
            running[e] = 0
    if gif:
        import imageio  # comes with procgen

        imageio.mimsave(gif, film, duration=1000 / 15, loop=0)
    return np.array([r[:quota] for r in returns]).T.reshape(-1)[:num_episodes]  # every env's first, every env's second, ...


def require(args, **minimum):
    """Refuses, in one sentence, a flag below its minimum."""
    for name, least in minimum.items():
        if (value := getattr(args, name)) is not None and value < least:
            sys.exit(f"error: --{name.replace('_', '-')} is {value}, expected at least {least}")


def make_writer(run_dir, args):
    """A fresh run folder with TensorBoard (and, with --track, Weights and Biases) logs and the hyperparameters."""
    if args.track:
        try:
            import wandb
        except ImportError:
            sys.exit("error: --track needs wandb, which is not installed: `pip install wandb`, or leave --track out")
        wandb.init(project=args.wandb_project_name, entity=args.wandb_entity, sync_tensorboard=True, config=vars(args), name=run_dir.name)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        sys.exit(f"error: the run folder {run_dir} cannot be made ({e.strerror}): choose another --runs-dir")
    for old in [run_dir / "results.json", *run_dir.glob("events.out.tfevents.*")]:
        old.unlink(missing_ok=True)
    writer = SummaryWriter(run_dir)
    writer.add_text("hyperparameters", "|param|value|\n|-|-|\n" + "\n".join(f"|{k}|{v}|" for k, v in vars(args).items()))
    return writer


def save_checkpoint(path, meta, **states):
    """Tensors and plain values only (loads with weights_only=True); written aside, then renamed, so never half there."""
    torch.save({"meta": {"format_version": FORMAT_VERSION, **meta}, **states}, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def load_checkpoint(path, stage, env_id, made_by, parts=()):
    """Reads a checkpoint and refuses, in one sentence, what is not one of `stage` for `env_id`."""
    if not Path(path).is_file():
        sys.exit(f"error: no checkpoint at {path}: make it with `{made_by}`, or name another one")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        meta = dict(checkpoint["meta"])
    except Exception as e:
        sys.exit(f"error: {path} cannot be read as a checkpoint ({type(e).__name__}): make it again with `{made_by}`")
    for key, want in (("format_version", FORMAT_VERSION), ("stage", stage), ("env_id", env_id)):
        if meta.get(key) != want:
            sys.exit(f"error: {path} has {key} {meta.get(key)}, expected {want}: make one with `{made_by}`")
    if missing := [part for part in parts if part not in checkpoint] + ["args"] * ("args" not in meta):
        sys.exit(f"error: {path} lacks {', '.join(missing)}: make it again with `{made_by}`")
    return checkpoint


def collect(act, env, split_dir, num_frames, progress):
    """Plays num_frames frames and writes them env by env, so that rows are consecutive in time; memory holds one step of all envs.

    Returns the returns of the episodes that ended. Env e fills rows e*T .. (e+1)*T-1; its first row is marked `first`.
    """
    num_envs, T = env.num, num_frames // env.num
    split_dir.mkdir(parents=True, exist_ok=True)

    def create(name, dtype, *shape):
        return np.lib.format.open_memmap(split_dir / f"{name}.npy", "w+", dtype, (num_envs * T, *shape))

    header, fd = create("frames", np.uint8, 64, 64, 3).offset, os.open(split_dir / "frames.npy", os.O_RDWR)
    per_row = [create(*spec) for spec in (("first", bool), ("actions", np.int8), ("rewards", np.float32), ("returns", np.float32))]
    firsts, actions, rewards, returns = (array.reshape(num_envs, T) for array in per_row)  # views, row e*T + t is [e, t]
    returns[:] = np.nan
    start, episode_returns = np.zeros(num_envs, dtype=int), []
    for t in range(T):
        _, obs, first = env.observe()
        obs = obs["rgb"]
        action = act(obs)
        firsts[:, t], actions[:, t] = first if t else True, action
        for e in range(num_envs):
            os.pwrite(fd, obs[e], header + (e * T + t) * obs[e].nbytes)  # pages of a memory map would count as this process's memory
        env.act(action)
        rewards[:, t], _, first = env.observe()
        for e in np.flatnonzero(first):  # an episode ended with this reward
            returns[e, start[e] : t + 1] = rewards[e, start[e] : t + 1].sum()
            episode_returns.append(float(returns[e, t]))
            start[e] = t + 1
        progress.update(num_envs)
    os.fsync(fd)
    os.close(fd)
    for array in per_row:
        array.flush()
    return np.array(episode_returns)


def mean_and_stderr(x):
    return float(np.mean(x)), float(np.std(x, ddof=1) / np.sqrt(len(x)))


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
    for done in [run_dir / "results.json"] + [data_dir / "meta.json"] * (args.num_train_frames > 0):
        if done.exists() and not args.overwrite:
            sys.exit(f"error: {done.parent} already holds a finished run: add --overwrite to replace it, or choose another place")
    for split, n in (("train", args.num_train_frames), ("test", args.num_test_frames)):
        if args.num_train_frames and n < 3 * args.num_envs:
            sys.exit(f"error: --num-{split}-frames {n} is less than 3 frames (one window) for each of {args.num_envs} envs: ask for more")
    if args.expert_checkpoint and args.init_checkpoint:
        sys.exit("error: --expert-checkpoint plays and --init-checkpoint trains on: give one of them")
    loaded = None
    if args.expert_checkpoint or args.init_checkpoint:
        command = f"python collect_expert_data.py --env-id {args.env_id}"
        loaded = load_checkpoint(args.expert_checkpoint or args.init_checkpoint, "collect_expert_data", args.env_id, command, ("model",))
        args.scale = loaded["meta"]["args"]["scale"]
    num_levels, start_level = (
        (loaded["meta"][key] if loaded else 0) if given is None else given
        for key, given in (("num_levels", args.num_levels), ("start_level", args.start_level))
    )

    writer = make_writer(run_dir, args)

    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    device = torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.bf16)
    start_time = time.time()

    agent = Agent(args.scale).to(device).to(memory_format=torch.channels_last)
    if loaded:
        agent.load_state_dict(loaded["model"])
    meta = {"stage": "collect_expert_data", "env_id": args.env_id, "num_levels": num_levels, "start_level": start_level, "args": asdict(args)}
    curve = []  # (frames, mean return of the last 100 episodes)
    if not args.expert_checkpoint:
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
        episode_return, recent_returns, last_save = np.zeros(E), deque(maxlen=100), time.time()
        num_iterations = max(1, args.total_timesteps // batch_size)
        progress = tqdm(total=num_iterations * batch_size, unit="frame", unit_scale=True, desc="PPO", mininterval=1)

        for iteration in range(num_iterations):
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
                    nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
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
            if time.time() - last_save > 60 or iteration == num_iterations - 1:
                save_checkpoint(run_dir / "checkpoint.pt", {**meta, "frames": global_step}, model=agent.state_dict())
                last_save = time.time()
        progress.close()
        env.close()

    generator = torch.Generator(device).manual_seed(args.seed)

    @torch.inference_mode()
    def act(obs):
        with autocast:
            logits, _ = agent(torch.as_tensor(obs, device=device))
        return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1).cpu().numpy().astype(np.int32)

    env = make_env(args.env_id, min(args.num_envs, args.eval_episodes), num_levels, start_level, args.seed + 1)
    print(f"scoring the demonstrator over {args.eval_episodes} episodes ...")
    scores = evaluate(act, env, args.eval_episodes, run_dir / "demonstrator.gif" if args.capture_video else None)
    env.close()
    mean, stderr = mean_and_stderr(scores)
    writer.add_scalar("eval/return_mean", mean, 0)
    results = {
        "stage": "collect_expert_data", "env_id": args.env_id, "seed": args.seed, "num_levels": num_levels,
        "start_level": start_level, "frames": 0 if args.expert_checkpoint else global_step, "return_mean": mean, "return_stderr": stderr,
        "episodes": args.eval_episodes, "device": str(device), "torch": torch.__version__, "command": "python " + " ".join(sys.argv),
        "args": asdict(args), "curve": curve[:: max(1, len(curve) // 200)],
    }  # fmt: skip

    if args.num_train_frames:
        # Held-out levels: the lower half of all seeds for training, the upper half for testing
        restricted = (num_levels, start_level)
        levels = {"train": restricted, "test": restricted} if num_levels else {"train": (2**30, 0), "test": (2**30 - 1, 2**30)}
        splits = {}
        (data_dir / "meta.json").unlink(missing_ok=True)  # no meta.json, no dataset: an interrupted one cannot pass for whole
        for i, (split, num_frames) in enumerate((("train", args.num_train_frames), ("test", args.num_test_frames))):
            split_levels, split_start = levels[split]
            num_frames -= num_frames % args.num_envs
            env = make_env(args.env_id, args.num_envs, split_levels, split_start, args.seed + 2 + i)
            with tqdm(total=num_frames, unit="frame", unit_scale=True, desc=f"collect {split}") as progress:
                episodes = collect(act, env, data_dir / split, num_frames, progress)
            env.close()
            split_mean, split_stderr = mean_and_stderr(episodes) if len(episodes) > 1 else (None, None)
            splits[split] = {
                "num_frames": num_frames, "num_envs": args.num_envs, "episodes": len(episodes), "return_mean": split_mean,
                "return_stderr": split_stderr, "num_levels": split_levels, "start_level": split_start, "seed": args.seed + 2 + i,
            }  # fmt: skip
        dataset_meta = {
            "format_version": FORMAT_VERSION, "env_id": args.env_id, "distribution_mode": "easy", "num_levels": num_levels,
            "start_level": start_level, "seed": args.seed, "splits": splits, "args": asdict(args),
            "demonstrator": {"return_mean": mean, "return_stderr": stderr, "episodes": args.eval_episodes},
        }  # fmt: skip
        (data_dir / "meta.json.tmp").write_text(json.dumps(dataset_meta, indent=2))
        os.replace(data_dir / "meta.json.tmp", data_dir / "meta.json")

    results["wall_seconds"] = round(time.time() - start_time, 1)
    (run_dir / "results.json").write_text(json.dumps(results, indent=2))
    writer.close()
    print(f"demonstrator on {args.env_id}: return {mean:.2f} +- {stderr:.2f} over {args.eval_episodes} episodes")
    print(f"wrote {run_dir}" + (f" and {data_dir}; next: python lapo_pretrain.py --env-id {args.env_id}" if args.num_train_frames else ""))
