"""LAPO, stage 5: fine-tune the cloned latent policy with PPO and an online decoder (paper 4.3, 6.1-6.3).

The cloned policy pi, frozen, says which latent action the demonstrator would take. While the agent plays, the
IDM of stage 2 labels its transitions with latents; the agent knows its true actions, so a decoder learns from
these pairs what a latent means. Beside it PPO trains an action head on the reward.
    RL+SL (default)   logits = (action head(o_t) + decoder(pi(o_t))) / 2
    --no-sl           logits = action head(o_t): the paper's "RL, no SL", or after --no-vq its "no VQ"

    python lapo_finetune_ppo.py --env-id bossfight                                     # the paper's scale
    torchrun --standalone --nproc_per_node=8 lapo_finetune_ppo.py --env-id bossfight   # 8 GPUs
    python lapo_finetune_ppo.py --env-id coinrun --total-timesteps 245760              # toy
Reads RUNS_DIR/ENV_ID__lapo_bc__SEED/checkpoint.pt, writes RUNS_DIR/ENV_ID__EXP_NAME__SEED/checkpoint.pt. See
docs/lapo_finetune_ppo.md.
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
import torch.nn.functional as F
import tyro
from filelock import FileLock, Timeout
from gymnasium.wrappers.utils import RunningMeanStd
from torch.distributions.categorical import Categorical
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

FORMAT_VERSION = 5  # of checkpoints
SAVE_SECONDS = 60  # between the states from which an interrupted run goes on
# flags that are no arguments of the method
PLACES = "bc_checkpoint runs_dir overwrite cuda track wandb_project_name wandb_entity".split()
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
    bc_checkpoint: str | None = None  # of lapo_bc.py; default RUNS_DIR/ENV_ID__lapo_bc__SEED/checkpoint.pt
    # method
    sl: bool = True  # the online decoder; --no-sl is the paper's ablation
    decoder_hidden: tuple[int, ...] = (192, 128, 64)  # hidden widths of the decoder
    decoder_frames: tuple[int, int] = (10_000, 400_000)  # frames in which it is refit, on all pairs so far
    decoder_every_update_until: int = 50_000  # frames up to which that is every update, then every 20th
    decoder_epochs: int = 3  # epochs of a refit
    decoder_batch_size: int = 512  # batch size of a refit
    decoder_learning_rate: float = 1e-3  # Adam's learning rate in a refit
    label_smoothing: float = 0.05  # label smoothing of the decoder's cross-entropy
    gamma: float = 0.999  # the discount factor
    gae_lambda: float = 0.95  # the lambda of the generalised advantage estimation
    clip_coef: float = 0.2  # the surrogate clipping coefficient
    clip_vloss: bool = True  # clip the value loss too, as in the PPO paper's code
    ent_coef: float = 0.0025  # coefficient of the entropy bonus
    vf_coef: float = 0.5  # coefficient of the value loss
    # optimisation
    total_timesteps: int = 4_000_000  # frames of training
    num_envs: int = 64  # parallel games, of all processes
    num_steps: int = 64  # steps in each game per rollout
    num_minibatches: int = 8  # minibatches per epoch
    update_epochs: int = 3  # epochs over each rollout
    learning_rate: float = 1e-2  # Adam's base rate; the parts' shares of it follow, and fall to 0 at the end
    action_head_warmup: tuple[int, int] = (35_000, 50_000)  # frames in which the action head's rises to 1/4
    value_head_warmup: tuple[int, int] = (25_000, 50_000)  # frames in which the value head's rises to 1/4
    linear_warmup: tuple[int, int] = (50_000, 200_000)  # frames in which the last Linear's rises to 1/10
    max_grad_norm: float = 0.5  # the maximum norm of the gradient
    eval_episodes: int = 200  # episodes over which the final agent is scored
    # run
    runs_dir: str = "runs"  # where run folders are made
    overwrite: bool = False  # begin anew; else a finished run is kept, and an unfinished one goes on
    track: bool = False  # send the same logs to Weights & Biases
    wandb_project_name: str = "lapo"  # its project
    wandb_entity: str | None = None  # its team; default: your own
    cuda: bool = True  # use CUDA, or another accelerator that torch knows, where there is one
    bf16: tyro.conf.DisallowNone[bool | None] = None  # convolutions in bfloat16; default: on CUDA GPUs


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


class IDM(nn.Module):
    """Inverse dynamics model: o_{t-1}, o_t, o_{t+1} (B, 9, 64, 64) -> continuous latent (B, latent_dim)."""

    def __init__(self, scale, latent_dim, patch_size=1):
        super().__init__()
        self.network = ImpalaCNN(9, scale, patch_size)
        self.head = nn.Linear(256, latent_dim)

    def forward(self, windows):
        return self.head(self.network(windows)).float()


class Decoder(nn.Module):
    """MLP from latents (B, latent_dim), standardised by the training latents' moments, to logits (B, A)."""

    def __init__(self, latent_dim, hidden, num_actions=15):
        super().__init__()
        self.register_buffer("mean", torch.zeros(latent_dim))
        self.register_buffer("std", torch.ones(latent_dim))
        layers = []
        width = latent_dim
        for out in hidden:
            layers += [nn.Linear(width, out), nn.ReLU()]
            width = out
        self.mlp = nn.Sequential(*layers, nn.Linear(width, num_actions))

    def forward(self, z):
        return self.mlp((z - self.mean) / self.std)


class FinetunedAgent(nn.Module):
    """PPO's actor-critic on the frozen convolutions of the cloned policy, whose latent is decoded beside it.

    obs -> network.conv (frozen) -+- frozen_fc -> head (frozen) -> decoder -+- mean -> action logits
                                  '- network.fc (trained) -+- actor --------'
                                                           '- critic -> value
    """

    def __init__(self, scale, patch_size, latent_dim, decoder_hidden, sl=True, num_actions=15):
        super().__init__()
        self.sl = sl  # False: the decoder has no say
        self.network = ImpalaCNN(3, scale, patch_size)
        self.actor = nn.Linear(256, num_actions)
        self.critic = nn.Linear(256, 1)
        self.frozen_fc = nn.Linear(self.network.fc.in_features, 256)
        self.head = nn.Linear(256, latent_dim)
        self.decoder = Decoder(latent_dim, decoder_hidden, num_actions)
        for layer in (self.actor, self.decoder.mlp[-1]):  # logits are 0 before anything is learnt
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        for frozen in (self.network.conv, self.frozen_fc, self.head, self.decoder):
            frozen.requires_grad_(False)

    def load_policy(self, policy):
        """Takes the state_dict() of the cloned LatentPolicy; its Linear(., 256) twice."""
        state = self.state_dict() | policy  # network, head and critic have the same names here
        state["frozen_fc.weight"] = policy["network.fc.weight"]
        state["frozen_fc.bias"] = policy["network.fc.bias"]
        state["decoder.mean"] = state.pop("mean")
        state["decoder.std"] = state.pop("std")
        self.load_state_dict(state)  # raises if the policy has a name that is none of ours

    def features(self, obs, autocast):
        """Observations (B, 64, 64, 3) uint8 -> (B, 32 * scale * (8 / P)^2), all that runs in autocast."""
        # HWC memory seen as (B, 3, 64, 64) is channels-last already: no copy
        x = obs.permute(0, 3, 1, 2).float() / 255 - 0.5
        with autocast:
            return self.network.conv(x).float()

    def forward(self, features):
        """Logits (B, A), values (B,) (paper section 6.1); the decoder's logits are 0 until its first fit."""
        hidden = torch.relu(self.network.fc(features))  # (B, 256)
        logits = self.actor(hidden)
        if self.sl:
            standardised = self.head(torch.relu(self.frozen_fc(features)))  # (B, latent_dim)
            z = self.decoder.mean + self.decoder.std * standardised  # pi(o_t)
            logits = (logits + self.decoder(z)) / 2
        return logits, self.critic(hidden).squeeze(-1)


def fit_decoder(decoder, z, actions, args):
    """Fits the decoder anew on latents z (n, latent_dim), actions (n,). Returns the last epoch's accuracy."""
    for layer in decoder.mlp[::2]:  # between them are ReLUs
        layer.reset_parameters()
    decoder.requires_grad_(True)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=args.decoder_learning_rate)
    for _ in range(args.decoder_epochs):
        correct = 0
        for batch in torch.randperm(len(z), device=z.device).split(args.decoder_batch_size):
            logits = decoder(z[batch])  # (B, A)
            loss = F.cross_entropy(logits, actions[batch], label_smoothing=args.label_smoothing)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()  # last, so that PPO's clipping sees none of these gradients
            correct += (logits.argmax(-1) == actions[batch]).sum()
    decoder.requires_grad_(False)
    return correct.item() / len(z)


def refit_frames(args):
    """The frames after which the decoder is refit: after every update at first, then after every 20th.

    Never after the last update: the agent that is scored has the decoder that it was trained with.
    """
    if not args.sl:
        return []
    batch_size = args.num_steps * args.num_envs
    first, last = args.decoder_frames
    refits = []
    for step in range(batch_size, args.total_timesteps - batch_size + 1, batch_size):
        early = step <= args.decoder_every_update_until
        if first <= step <= last and (early or step % (20 * batch_size) == 0):
            refits.append(step)
    return refits


def scheduled_rate(step, part, args):
    """Adam's rate of a part after `step` frames: 0, over its warm-up to its peak, then linearly to 0."""
    ends = [*vars(args)[f"{part['name']}_warmup"], args.total_timesteps]
    return args.learning_rate * float(np.interp(step, ends, [0.0, part["peak"], 0.0]))


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


def gather_pairs(pairs):
    """The decoder's pairs (z (n, latent_dim), actions (n,)) of every process, in a list."""
    found = [pairs]
    if WORLD_SIZE > 1:
        found = [None] * WORLD_SIZE
        dist.all_gather_object(found, pairs)
    return found


def main(args):
    device, autocast = start(args)
    default = run_folder(args, "lapo_bc") / "checkpoint.pt"
    cloned = load_checkpoint(args.bc_checkpoint or default, "lapo_bc", args.env_id)
    data = cloned["data"]  # the dataset's meta.json: levels, scores of the demonstrator and of random play
    folder, resumed = open_folder(args)
    began = time.time() - resumed.get("seconds", 0)
    T = args.num_steps
    E = args.num_envs // WORLD_SIZE  # games of this process
    batch_size = T * args.num_envs  # frames in a rollout of all processes
    num_iterations = max(1, args.total_timesteps // batch_size)
    done = resumed.get("iteration", 0)
    seed = args.seed + RANK + WORLD_SIZE * done  # a resumed run plays new episodes
    env = make_env(args.env_id, E, data["num_levels"], data["start_level"], seed)

    # the frozen IDM of stage 2, and the agent: the policy of stage 3 with an action head and a decoder
    torch.manual_seed(args.seed)  # the same on all processes
    pretrain_args = cloned["pretrain_args"]
    patch_size = pretrain_args["patch_size"]
    latent_dim = len(cloned["idm"]["head.bias"])
    idm = IDM(pretrain_args["idm_scale"], latent_dim, patch_size)
    idm.load_state_dict(cloned["idm"])
    idm = idm.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    sizes = cloned["args"]["policy_scale"], patch_size, latent_dim, args.decoder_hidden
    agent = FinetunedAgent(*sizes, args.sl, env.num_actions)
    agent.load_policy(cloned["policy"])
    agent = agent.to(device, memory_format=torch.channels_last)

    # what PPO trains; a part's rate rises over --NAME-warmup to its peak, a share of the base rate
    parts = [
        {"name": "action_head", "params": agent.actor.parameters(), "peak": 0.25},
        {"name": "value_head", "params": agent.critic.parameters(), "peak": 0.25},
        {"name": "linear", "params": agent.network.fc.parameters(), "peak": 0.1},
    ]
    optimizer = torch.optim.Adam(parts, lr=0.0, eps=1e-5, fused=True)
    normalize_reward = RewardNormalizer(E, args.gamma)
    torch.manual_seed(seed)  # from here on every process draws its own

    # storage; features are of the frozen convolutions, so that PPO's epochs need not compute them again
    features = torch.zeros((T, E, agent.network.fc.in_features), device=device)
    latents = torch.zeros((T, E, latent_dim), device=device)
    actions = torch.zeros((T, E), dtype=torch.long, device=device)
    logprobs = torch.zeros((T, E), device=device)
    rewards = torch.zeros((T, E), device=device)
    dones = torch.zeros((T, E), device=device)
    values = torch.zeros((T, E), device=device)

    # what the decoder learns from: latents z (n, latent_dim) and true actions (n,) of every rollout so far.
    # They reach 200 MB and have a file of their own, written at every refit: a resumed run lacks later pairs
    refits = refit_frames(args)
    last_refit = max(refits, default=0)
    pairs = []
    pairs_path = folder / "pairs.pt"

    if resumed:
        agent.load_state_dict(resumed["agent"])
        optimizer.load_state_dict(resumed["optimizer"])
        vars(normalize_reward.stats).update(resumed["reward_stats"])
        if refits and refits[0] <= done * batch_size < last_refit:
            pairs = torch.load(pairs_path, weights_only=True)
    episode_returns = deque(resumed.get("episode_returns", []), maxlen=100)
    curve = resumed.get("curve", [])
    if RANK == 0:
        writer = make_writer(args, folder, done * batch_size)
    _, frames, _ = env.observe()
    next_obs = torch.tensor(frames["rgb"], device=device)  # (E, 64, 64, 3) uint8
    next_done = torch.ones(E, device=device)  # all begin an episode
    last_obs = next_obs  # o_{t-1}; this one is none, but windows that begin before an episode do not count
    episode_return = np.zeros(E)
    saved = time.time()
    iterations = range(done, num_iterations)
    progress = tqdm(iterations, "PPO", num_iterations, initial=done, disable=RANK > 0, **BAR)
    for iteration in progress:
        for part in optimizer.param_groups:
            part["lr"] = scheduled_rate(iteration * batch_size, part, args)

        # rollout
        labelling = iteration * batch_size < last_refit  # the decoder will learn from this rollout
        for t in range(T):
            obs = next_obs
            dones[t] = next_done
            with torch.inference_mode():
                features[t] = agent.features(obs, autocast)
                logits, values[t] = agent(features[t])
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
            if labelling:
                window = torch.cat([last_obs, obs, next_obs], dim=-1).permute(0, 3, 1, 2)  # (E, 9, 64, 64)
                with torch.inference_mode(), autocast:
                    latents[t] = idm(window.float() / 255 - 0.5)
            last_obs = obs

        # advantages
        with torch.inference_mode():
            _, next_value = agent(agent.features(next_obs, autocast))
        advantages = compute_gae(rewards, values, dones, next_value, next_done, args.gamma, args.gae_lambda)
        returns = advantages + values

        # update
        b_features = features.flatten(0, 1)
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
                logits, newvalue = agent(b_features[mb])
                rollout = b_actions[mb], b_logprobs[mb], mb_advantages, b_returns[mb], b_values[mb]
                loss, metrics = ppo_loss(logits, newvalue, *rollout, args)
                logged.append(metrics)
                optimizer.zero_grad()
                loss.backward()
                if WORLD_SIZE > 1:
                    average_gradients(agent.parameters())
                nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                optimizer.step()

        # online decoder
        step = (iteration + 1) * batch_size  # frames so far
        if labelling:
            firsts = torch.vstack([dones, next_done])  # (T + 1, E)
            within = firsts[:-1] + firsts[1:] == 0  # (T, E): the window at t lies in one episode
            pairs += gather_pairs((latents[within].cpu(), actions[within].cpu()))
        if step in refits:  # the same decoder on all processes
            if RANK == 0:
                z, true_actions = (torch.cat(x).to(device) for x in zip(*pairs))
                accuracy = fit_decoder(agent.decoder, z, true_actions, args)
                writer.add_scalar("decoder/accuracy", accuracy, step)
                save(pairs_path, pairs)
            if WORLD_SIZE > 1:
                for parameter in agent.decoder.parameters():
                    dist.broadcast(parameter, src=0)

        check_finite(agent, iteration + 1)
        if RANK == 0:
            if episode_returns:
                mean_return = float(np.mean(episode_returns))
                curve.append((step, mean_return))
                writer.add_scalar("charts/episodic_return", mean_return, step)
                progress.set_postfix_str(f"return {mean_return:.2f}", refresh=False)
            writer.add_scalar("charts/SPS", step / (time.time() - began), step)
            for part in optimizer.param_groups:
                writer.add_scalar(f"charts/learning_rate_{part['name']}", part["lr"], step)
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

    # returns on the levels of the data, beside those of random play and the demonstrator
    if RANK == 0:
        writer.close()
        pairs_path.unlink(missing_ok=True)
        torch.manual_seed(args.seed + 1000)
        num_envs = min(args.num_envs, args.eval_episodes)
        env = make_env(args.env_id, num_envs, data["num_levels"], data["start_level"], args.seed + 1000)
        returns = evaluate(
            lambda obs: agent(agent.features(obs, autocast))[0], env, args.eval_episodes, device
        )
        low = data.get("random", {}).get("return_mean", np.nan)  # datasets of films have no scores
        high = data.get("demonstrator", {}).get("return_mean", np.nan)
        origin = {"pretrain_args": pretrain_args, "bc_args": cloned["args"], "data": data}
        results = {
            "return_mean": float(returns.mean()),
            "return_stderr": float(returns.std(ddof=1) / len(returns) ** 0.5),
            "episodes": len(returns),
            "relative_to_demonstrator": (returns.mean() - low) / (high - low or np.nan),
            "frames": num_iterations * batch_size,
            "returns": returns.tolist(),
            "curve": curve,
        }
        networks = {"agent": agent.state_dict(), **origin}
        finish(folder, args, time.time() - began, networks, {**results, **origin})
        print(
            "return {return_mean:.2f} +- {return_stderr:.2f}, "
            "{relative_to_demonstrator:.2f} of the demonstrator's".format(**results)
        )
        print(f"next: tensorboard --logdir {args.runs_dir}")
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
    if args.num_envs % WORLD_SIZE or args.num_steps * args.num_envs // WORLD_SIZE % args.num_minibatches:
        rollout = f"{args.num_steps} steps x {args.num_envs} envs / {WORLD_SIZE} processes"
        refuse(f"--num-minibatches {args.num_minibatches} does not divide {rollout}")
    warmups = args.action_head_warmup, args.value_head_warmup, args.linear_warmup
    if not all(0 <= begin < end < args.total_timesteps for begin, end in warmups):
        refuse(f"the warm-ups {warmups} must rise, and end before --total-timesteps {args.total_timesteps}")
    if args.sl and not refit_frames(args):
        refuse(f"--decoder-frames {args.decoder_frames} hold no update but the last: widen them, or --no-sl")
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
