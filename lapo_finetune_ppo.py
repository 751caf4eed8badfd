"""LAPO, stage 5: fine-tune the cloned latent policy with PPO and an online decoder (paper 4.3, 6.1-6.3).

    RL+SL (default)   logits = (action head + decoder(latent policy)) / 2; the decoder learns the actions
                      from the agent's own transitions, which the IDM labels with latents
    --no-sl           the action head alone: the paper's "RL, no SL", or after --no-vq its "no VQ"

    python lapo_finetune_ppo.py --env-id bossfight                                # the paper's scale
    torchrun --standalone --nproc_per_node=8 lapo_finetune_ppo.py --env-id bossfight   # 8 GPUs
    python lapo_finetune_ppo.py --env-id coinrun --total-timesteps 245760         # toy
Reads RUNS_DIR/ENV_ID__lapo_bc__SEED/checkpoint.pt, writes RUNS_DIR/ENV_ID__EXP_NAME__SEED/checkpoint.pt.
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
import torch.nn.functional as F
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
    bc_checkpoint: str | None = None  # of lapo_bc.py; default RUNS_DIR/ENV_ID__lapo_bc__SEED/checkpoint.pt
    allow_unfinished: bool = False  # take the checkpoint of an unfinished run, too
    # method
    sl: bool = True  # the online decoder; --no-sl is the paper's ablation
    gamma: float = 0.999  # the discount factor
    gae_lambda: float = 0.95  # the lambda of the generalised advantage estimation
    norm_adv: bool = True  # normalise the advantages per minibatch
    clip_coef: float = 0.2  # the surrogate clipping coefficient
    clip_vloss: bool = True  # clip the value loss too, as in the PPO paper's code
    ent_coef: float = 0.0025  # coefficient of the entropy bonus
    vf_coef: float = 0.5  # coefficient of the value loss
    decoder_hidden: tuple[int, ...] = (192, 128, 64)  # hidden widths of the decoder
    decoder_frames: tuple[int, int] = (10_000, 400_000)  # frames in which it is refit, on all pairs so far
    decoder_every_update_until: int = 50_000  # frames up to which that is every update, then every 20th
    decoder_epochs: int = 3  # epochs of a refit
    decoder_batch_size: int = 512  # batch size of a refit
    decoder_learning_rate: float = 1e-3  # Adam's learning rate in a refit
    label_smoothing: float = 0.05  # label smoothing of the decoder's cross-entropy
    # optimisation
    total_timesteps: int = 4_000_000  # frames of training
    num_envs: int = 64  # parallel games
    num_steps: int = 64  # steps in each game per rollout
    num_minibatches: int = 8  # minibatches per epoch
    update_epochs: int = 3  # epochs over each rollout
    learning_rate: float = 1e-2  # Adam's base rate; the parts' shares of it follow, and fall to 0 at the end
    action_head_warmup: tuple[int, int] = (35_000, 50_000)  # frames in which the action head's rises to 1/4
    value_head_warmup: tuple[int, int] = (25_000, 50_000)  # frames in which the value head's rises to 1/4
    linear_warmup: tuple[int, int] = (50_000, 200_000)  # frames in which the last Linear's rises to 1/10
    max_grad_norm: float = 0.5  # the maximum norm of the gradient
    eval_episodes: int = 200  # episodes over which the final agent, and random play, are scored
    # run
    runs_dir: str = "runs"  # where run folders are made
    overwrite: bool = False  # replace the run in the run folder; else a finished one is kept, another goes on
    checkpoint_seconds: float = 60.0  # seconds between checkpoints from which an interrupted run goes on
    cuda: bool = True  # use CUDA, or another accelerator that torch knows, where there is one
    bf16: tyro.conf.DisallowNone[bool | None] = None  # convolutions in bfloat16; default: if faster here


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
    """Inverse dynamics model: o_{t-1}, o_t, o_{t+1} (B, 9, 64, 64) -> continuous latent (B, latent_dim).

    differences (not in the paper): it sees o_t - o_{t-1} and o_{t+1} - o_t alone, hence no scenery.
    """

    def __init__(self, scale, latent_dim, patch_size=1, differences=False):
        super().__init__()
        self.differences = differences
        self.network = ImpalaCNN(6 if differences else 9, scale, patch_size)
        self.head = nn.Linear(256, latent_dim)

    def see(self, x):
        return x[:, 3:] - x[:, :6] if self.differences else x

    def forward(self, x):
        return self.head(self.network(self.see(x))).float()


class Decoder(nn.Module):
    """MLP from latents (B, latent_dim), standardised by the training latents' moments, to logits (B, A)."""

    def __init__(self, latent_dim, hidden, num_actions=15):
        super().__init__()
        self.register_buffer("mean", torch.zeros(latent_dim))
        self.register_buffer("std", torch.ones(latent_dim))
        widths = [latent_dim, *hidden]
        layers = [layer for i, o in zip(widths, widths[1:]) for layer in (nn.Linear(i, o), nn.ReLU())]
        self.mlp = nn.Sequential(*layers, nn.Linear(widths[-1], num_actions))

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
        """Takes the weights of the cloned LatentPolicy, its state_dict(); the Linear(., 256) twice."""
        self.load_state_dict(policy, strict=False)  # network, head and critic: what has the same names there
        self.frozen_fc.load_state_dict(self.network.fc.state_dict())
        self.decoder.mean.copy_(policy["mean"])
        self.decoder.std.copy_(policy["std"])

    def features(self, obs, autocast):
        """Observations (B, 64, 64, 3) uint8 -> (B, 32 * scale * (8 / P)^2), all that runs in autocast."""
        with autocast:  # HWC memory seen as (B, 3, 64, 64) is channels-last already: no copy
            return self.network.conv(obs.permute(0, 3, 1, 2).float() / 255 - 0.5).float()

    def forward(self, features):
        """Logits (B, A), values (B,) (paper section 6.1); the decoder's logits are 0 until its first fit."""
        hidden = torch.relu(self.network.fc(features))  # (B, 256)
        logits = rl_logits = self.actor(hidden)
        if self.sl:
            z = self.head(torch.relu(self.frozen_fc(features)))  # (B, latent_dim), standardised
            decoder_logits = self.decoder(self.decoder.mean + self.decoder.std * z)
            logits = (rl_logits + decoder_logits) / 2
        return logits, self.critic(hidden).squeeze(-1)


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


@torch.inference_mode()
def label_rollout(idm, obs, dones, actions, autocast):
    """The IDM's latents (n, latent_dim) of windows within one episode, and their true actions (n,).

    The window obs[t], obs[t + 1], obs[t + 2] of obs (T + 2, E, 64, 64, 3) explains actions[t] (T, E);
    dones[t] (T + 1, E) says that obs[t + 1] begins an episode.
    """
    z, a = [], []
    for t, e in (part.T for part in (dones[:-1] + dones[1:] == 0).nonzero().split(512)):
        window = torch.cat([obs[t, e], obs[t + 1, e], obs[t + 2, e]], dim=-1)  # (B, 64, 64, 9) uint8
        with autocast:
            z.append(idm(window.permute(0, 3, 1, 2).float() / 255 - 0.5))
        a.append(actions[t, e])
    return torch.cat(z).cpu(), torch.cat(a).cpu()


def fit_decoder(decoder, z, actions, args):
    """Fits the decoder anew on latents z (n, latent_dim), actions (n,). Returns the last epoch's accuracy."""
    for layer in decoder.mlp:
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    decoder.requires_grad_(True)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=args.decoder_learning_rate)
    for _ in range(args.decoder_epochs):
        correct = 0
        for batch in torch.randperm(len(z), device=z.device).split(args.decoder_batch_size):
            logits = decoder(z[batch])
            correct += (logits.argmax(-1) == actions[batch]).sum().item()
            loss = F.cross_entropy(logits, actions[batch], label_smoothing=args.label_smoothing)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()  # last, so that PPO's clipping sees none of these gradients
    decoder.requires_grad_(False)
    return correct / len(z)


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
    warmups = args.action_head_warmup, args.value_head_warmup, args.linear_warmup
    if not all(0 <= start < end < args.total_timesteps for start, end in warmups):
        sys.exit(f"error: warm-ups must rise and end before {args.total_timesteps} frames, not be {warmups}")
    default = f"{args.runs_dir}/{args.env_id}__lapo_bc__{args.seed}/checkpoint.pt"
    cloned = load_checkpoint(args.bc_checkpoint or default, "lapo_bc", ["policy", "idm", "data"], args)
    pretrain_args, data = cloned["pretrain_args"], cloned["data"]
    levels = data["num_levels"], data["start_level"]
    (start, end), early = args.decoder_frames, args.decoder_every_update_until
    updates = range(batch_size, num_iterations * batch_size, batch_size)  # not after the last one
    refits = [s for s in updates if start <= s <= end and (s <= early or s // batch_size % 20 == 0)]
    if args.sl and not refits:
        sys.exit(f"error: --decoder-frames {start} {end} hold no update but the last: widen them, or --no-sl")
    env = make_env(args.env_id, E, *levels, args.seed + RANK)
    run = Run(args, inputs=[cloned["identity"]])
    run.meta |= {"pretrain_args": pretrain_args, "bc_args": cloned["args"], "data": data}
    device = (torch.accelerator.current_accelerator(True) if args.cuda else None) or torch.device("cpu")

    latent_dim, patch = len(cloned["idm"]["head.bias"]), pretrain_args["patch_size"]
    idm = IDM(pretrain_args["idm_scale"], latent_dim, patch, pretrain_args.get("idm_differences", False))
    idm.load_state_dict(cloned["idm"])
    idm = idm.to(device, memory_format=torch.channels_last)
    torch.manual_seed(args.seed)
    sizes = cloned["args"]["policy_scale"], patch, latent_dim, args.decoder_hidden
    agent = FinetunedAgent(*sizes, args.sl, A := env.num_actions)
    agent.load_policy(cloned["policy"])
    agent = agent.to(device, memory_format=torch.channels_last)
    groups = [  # what is trained, with its warm-up's frames and the share of the base rate at their end
        {"params": agent.actor.parameters(), "warmup": args.action_head_warmup, "peak": 0.25},
        {"params": agent.critic.parameters(), "warmup": args.value_head_warmup, "peak": 0.25},
        {"params": agent.network.fc.parameters(), "warmup": args.linear_warmup, "peak": 0.1},
    ]
    optimizer = torch.optim.Adam(groups, lr=0.0, eps=1e-5, fused=True)
    normalize_reward = RewardNormalizer(E, args.gamma)
    next_obs, next_done = torch.tensor(env.observe()[1]["rgb"], device=device), torch.ones(E, device=device)
    autocast = choose_precision(args, device, lambda: agent.network(next_obs.permute(0, 3, 1, 2) / 255))

    # storage
    obs = torch.zeros((T, E, 64, 64, 3), dtype=torch.uint8, device=device)  # a quarter of float storage
    features = torch.zeros((T, E, agent.network.fc.in_features), device=device)  # of frozen convolutions
    actions = torch.zeros((T, E), dtype=torch.long, device=device)
    logprobs, rewards, dones, values = (torch.zeros((T, E), device=device) for _ in range(4))
    episode_return = np.zeros(E)
    # o_{t-1} of a rollout's first window is the last observation of the rollout before. Before the very first
    # there is none, and this one a fake: next_done, 1 there, keeps the window out of the decoder's pairs
    last_obs = next_obs
    state = run.restore(agent=agent, optimizer=optimizer, normalize_reward=normalize_reward)
    ended, curve, pairs = (state.get(key, []) for key in ("ended", "curve", "pairs"))
    if "env" in state:  # not if other processes than now played the games
        env.callmethod("set_state", state["env"])
        next_obs, next_done, last_obs = (state[k].to(device) for k in ("next_obs", "next_done", "last_obs"))
        episode_return, normalize_reward.returns = (np.array(state[k]) for k in ("episode_return", "returns"))

    first_iteration = state.get("step", 0) // batch_size
    bar = {"total": num_iterations, "initial": first_iteration, "unit": "frame", "unit_scale": batch_size}
    progress = tqdm(range(first_iteration, num_iterations), "PPO", **bar)
    for iteration in progress:
        for group in optimizer.param_groups:
            ends, shares = [*group["warmup"], args.total_timesteps], [0.0, group["peak"], 0.0]
            group["lr"] = args.learning_rate * float(np.interp(iteration * batch_size, ends, shares))

        # rollout
        for t in range(T):
            obs[t], dones[t] = next_obs, next_done
            with torch.inference_mode():
                features[t] = agent.features(next_obs, autocast)
                logits, values[t] = agent(features[t])
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
        with torch.inference_mode():
            next_value = agent(agent.features(next_obs, autocast))[1]
        advantages = compute_gae(rewards, values, dones, next_value, next_done, args.gamma, args.gae_lambda)
        returns = advantages + values

        # update
        b_features, b_actions, b_logprobs = features.flatten(0, 1), actions.flatten(), logprobs.flatten()
        b_advantages, b_returns, b_values = advantages.flatten(), returns.flatten(), values.flatten()
        logged = []
        for _ in range(args.update_epochs):
            for mb in torch.randperm(T * E, device=device).chunk(args.num_minibatches):
                mb_advantages = b_advantages[mb]
                if args.norm_adv:
                    mb_advantages = (mb_advantages - mb_advantages.mean()) / (mb_advantages.std() + 1e-8)
                logits, newvalue = agent(b_features[mb])
                batch = b_actions[mb], b_logprobs[mb], mb_advantages, b_returns[mb], b_values[mb]
                loss, stats = ppo_loss(logits, newvalue, *batch, args)
                optimizer.zero_grad()
                loss.backward()
                average(loss, agent.parameters())
                logged.append(stats)
                norm = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                if not torch.isfinite(norm):
                    sys.exit(f"error: gradient norm {norm.item()}: lower --learning-rate, or try --no-bf16")
                optimizer.step()

        # decoder: the IDM labels what was played, and it is refit on all of these latents and actions
        step = (iteration + 1) * batch_size
        if args.sl and step <= refits[-1]:
            stream = torch.cat([last_obs[None], obs, next_obs[None]])  # (T + 2, E, 64, 64, 3)
            found = label_rollout(idm, stream, torch.vstack([dones, next_done]), actions, autocast)
            pairs += gathered(found)  # of all processes
            if step in refits and RANK == 0:
                accuracy = fit_decoder(agent.decoder, *(torch.cat(x).to(device) for x in zip(*pairs)), args)
                run.writer.add_scalar("decoder/accuracy", accuracy, step)
            if step in refits:
                fitted = {name: x.cpu() for name, x in agent.decoder.state_dict().items()}
                agent.decoder.load_state_dict(gathered(fitted)[0])
            pairs = pairs if RANK == 0 and step < refits[-1] else []  # of no use after the last fit
        last_obs = obs[-1].clone()

        if RANK == 0:  # logs, of its games and minibatches
            if ended:
                curve.append((step, float(np.mean(ended[-100:]))))
                run.writer.add_scalar("charts/episodic_return", curve[-1][1], step)
                progress.set_postfix_str(f"return {curve[-1][1]:.2f}")
            run.writer.add_scalar("charts/SPS", step / (time.time() - run.began), step)
            for name, group in zip(("action_head", "value_head", "linear"), optimizer.param_groups):
                run.writer.add_scalar(f"charts/learning_rate_{name}", group["lr"], step)
            explained_variance = 1 - (b_returns - b_values).var() / b_returns.var()
            names = ("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac", "explained_variance")
            for name, value in zip(names, [*torch.stack(logged).mean(0), explained_variance]):
                run.writer.add_scalar(f"losses/{name}", value.item(), step)
        if run.due() or iteration == num_iterations - 1:
            own = {"env": env.callmethod("get_state"), "next_obs": next_obs, "next_done": next_done}
            own |= {"episode_return": episode_return.tolist(), "returns": normalize_reward.returns.tolist()}
            run.save(step, own | {"last_obs": last_obs}, ended=ended[-100:], curve=curve, pairs=pairs)
    env.close()

    # returns of the agent, and of random play on the same levels
    generator = torch.Generator(device).manual_seed(args.seed + RANK)
    play = [make_env(args.env_id, min(E, n), *levels, args.seed + 1000 + RANK) for _ in range(2)]
    returns = evaluate(lambda obs, _: agent(agent.features(obs, autocast))[0], play[0], n, generator, run)
    at_random = evaluate(lambda obs, _: torch.zeros(len(obs), A, device=device), play[1], n, generator, run)
    returns, at_random, n = *(np.concatenate(gathered(x)) for x in (returns, at_random)), args.eval_episodes
    results = {"return_mean": float(returns.mean()), "return_stderr": float(returns.std(ddof=1) / n**0.5)}
    results |= {"episodes": n, "random_mean": float(at_random.mean()), "frames": num_iterations * batch_size}
    best, worst = data["demonstrator"]["return_mean"], at_random.mean()
    results["relative_to_demonstrator"] = share = float((returns.mean() - worst) / (best - worst or np.nan))
    run.finish(**results, returns=returns.tolist(), curve=curve[:: 1 + len(curve) // 1000])
    print(f"return {returns.mean():.2f} +- {results['return_stderr']:.2f}, {share:.2f} of the demonstrator's")
    print(f"next: tensorboard --logdir {args.runs_dir}")
