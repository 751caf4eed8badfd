"""LAPO, stage 4, offline: a handful of action labels makes the latent policy play (paper section 6.4).

    decoder    d(IDM(o_{t-1}, o_t, o_{t+1})) -> a_t    cross-entropy on n labelled transitions
    policy     a ~ d(pi(o_t))                          pi from stage 3, which saw no labels
    cloning    a ~ f(o_t), from scratch                the baseline: same labels, same CNN, same loss

Plays both for every n and several draws of the labelled frames, beside random play and the demonstrator. On
your own videos, which nobody can play, labels of the test split tell how often each names the right action.

    python lapo_decode.py --env-id bossfight                                       # the paper's scale
    python lapo_decode.py --env-id coinrun --num-labels 32 256 --eval-episodes 20  # toy
Reads data/ENV_ID and RUNS_DIR/ENV_ID__lapo_bc__SEED/checkpoint.pt,
writes RUNS_DIR/ENV_ID__lapo_decode__SEED/results.json and checkpoint.pt: policy and decoder of one draw.
"""

import atexit
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import gymnasium
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
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
    env_id: str = "bossfight"  # one of Procgen's 16 games, a gymnasium world, or your own videos' name
    exp_name: str = Path(__file__).stem  # the run folder is RUNS_DIR/ENV_ID__EXP_NAME__SEED
    seed: int = 1  # seed of the experiment
    # data
    data_dir: str | None = None  # the dataset, one folder or A:B:C; default data/ENV_ID
    bc_checkpoint: str | None = None  # of lapo_bc.py; default RUNS_DIR/ENV_ID__lapo_bc__SEED/checkpoint.pt
    allow_unfinished: bool = False  # take the checkpoint of an unfinished run, too
    # method
    num_labels: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
    """the label counts n: this many training frames come with their true action"""
    num_draws: int = 5  # draws of the labelled frames; results are means over them
    eval_episodes: int = 100  # episodes per method and n, over all draws; random play gets at least 100
    num_envs: int = 64  # the most games played in parallel
    temperature: float = 1.0  # actions are drawn from softmax(logits / temperature), LAPO's and cloning's
    decoder_hidden: tuple[int, ...] = (192, 128, 64)  # hidden widths of the decoder
    cloning: bool = True  # play cloning from scratch, too
    # optimisation
    decoder_updates: int = 200  # gradient steps of a decoder; for thousands of labels 800 do better
    decoder_learning_rate: float = 1e-3  # AdamW's learning rate for a decoder, linearly to 0
    cloning_updates: int = 1000  # gradient steps of cloning
    cloning_epochs: int = 0  # at least so many passes over the labels, if that is more steps
    cloning_learning_rate: float = 5e-4  # AdamW's learning rate for cloning, linearly to 0
    policy_batch_size: int = 128  # the largest batch of cloning; the decoder's is 512
    label_smoothing: float = 0.05  # label smoothing of the decoder and of cloning
    weight_decay: float = 1e-2  # decoupled weight decay (AdamW) of the decoder and of cloning
    # run
    runs_dir: str = "runs"  # where run folders are made
    overwrite: bool = False  # replace the run in the run folder; else a finished one is kept, another goes on
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


class LatentPolicy(nn.Module):
    """pi(o_t): observations (B, 64, 64, 3) uint8 -> latent action (B, latent_dim).

    The head's outputs are in units of the latents' standard deviation around their mean, which are buffers.
    """

    def __init__(self, scale, latent_dim, patch_size=1):
        super().__init__()
        self.network = ImpalaCNN(3, scale, patch_size)
        self.head = nn.Linear(256, latent_dim)
        self.critic = nn.Linear(256, 1)  # for fine-tuning
        # of the latents that it was cloned on; decoders use them, too
        self.register_buffer("mean", torch.zeros(latent_dim))
        self.register_buffer("std", torch.ones(latent_dim))

    def features(self, obs):
        # HWC memory seen as (B, 3, 64, 64) is channels-last already: no copy
        return self.network(obs.permute(0, 3, 1, 2).float() / 255 - 0.5)  # (B, 256)

    def forward(self, obs):
        return self.mean + self.std * self.head(self.features(obs)).float()


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


def fit(model, inputs, actions, updates, learning_rate, batch_size, args, autocast):
    """Minimises the cross-entropy of model(inputs(i)) on n labels: indices i (B,), actions (n,) or (n, A).

    Batches come from shuffled epochs, what is left of one is dropped; the learning rate falls linearly to 0.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=args.weight_decay)
    batch_size, queue = min(batch_size, len(actions)), torch.empty(0, dtype=torch.long)
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - update / updates)
        if len(queue) < batch_size:
            queue = torch.randperm(len(actions))
        batch, queue = queue[:batch_size], queue[batch_size:]
        with autocast:
            logits = model(inputs(batch))
        loss = F.cross_entropy(logits.float(), actions[batch], label_smoothing=args.label_smoothing)
        if not torch.isfinite(loss):
            why = f"loss {loss.item()} on {len(actions)} labels"
            sys.exit(f"error: {why}: lower the learning rate, or try --no-bf16")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def fit_policy(policy, obs, actions, args, autocast):
    """Cloning: trains policy(o_t) -> logits of a_t on n labels, observations (n, 64, 64, 3)."""
    updates = max(args.cloning_updates, math.ceil(args.cloning_epochs * len(obs) / args.policy_batch_size))
    how = updates, args.cloning_learning_rate, args.policy_batch_size
    return fit(policy, obs.__getitem__, actions, *how, args, autocast)


def fit_lapo(policy, z, actions, num_actions, args):
    """LAPO with n labels: fits a decoder d and returns the policy d(pi(o_t)) (section 6.4).

    d learns a_t from z (n, latent_dim), the IDM's continuous latents: the IDM saw o_{t+1}, and so what was
    done. It plays on pi(o_t), which was cloned on such latents; pi brings the mean and std of them all.
    """
    decoder = Decoder(z.shape[1], args.decoder_hidden, num_actions).to(z.device)
    decoder.mean.copy_(policy.mean)
    decoder.std.copy_(policy.std)
    how = args.decoder_updates, args.decoder_learning_rate, 512
    fit(decoder, z.__getitem__, actions, *how, args, torch.autocast(z.device.type, enabled=False))  # float32
    return nn.Sequential(policy, decoder)


def mean_and_stderr(returns):
    """The mean of returns (n,) and its standard error, as results name them."""
    stderr = np.std(returns, ddof=1) / np.sqrt(len(returns))
    return {"return_mean": float(np.mean(returns)), "return_stderr": float(stderr)}


class Frames:
    """A split's frames (N, 64, 64, 3) in the frames.npy of its shards, each mapped when first asked for."""

    def __init__(self, folders, lengths):
        self.folders, self.starts = folders, np.cumsum([0, *lengths])
        self.open = lru_cache(256)(lambda s: np.load(folders[s] / "frames.npy", mmap_mode="r"))

    def __len__(self):
        return int(self.starts[-1])

    def __getitem__(self, t):
        """Rows t, an array of integers of any shape (...) -> (..., 64, 64, 3) uint8."""
        if len(self.folders) == 1:
            return self.open(0)[t]
        t = np.asarray(t)
        shards = np.searchsorted(self.starts, t, side="right") - 1
        rows = np.empty((*t.shape, 64, 64, 3), dtype=np.uint8)
        for s in np.unique(shards):
            rows[shards == s] = self.open(s)[t[shards == s] - self.starts[s]]
        return rows

    def labels(self, name):
        """actions, rewards or returns (N,) of all shards. Raises OSError where there are none."""
        return np.concatenate([np.load(folder / f"{name}.npy", mmap_mode="r") for folder in self.folders])


def load_dataset(args):
    """meta.json of a dataset (of its first shard), Frames {split: (N, 64, 64, 3)} and windows {split: t}."""
    data_dir, frames, windows = str(args.data_dir or f"data/{args.env_id}"), {}, {}
    folders = map(Path, data_dir.split(os.pathsep))  # one, or several: /disk1/coinrun:/disk2/coinrun
    shards = [shard for folder in folders for shard in sorted(folder.glob("shard-*")) or [folder]]
    try:
        metas = [json.loads((shard / "meta.json").read_text()) for shard in shards]
        for split in ("train", "test"):
            firsts = [np.load(shard / split / "first.npy") for shard in shards]
            frames[split] = Frames([shard / split for shard in shards], list(map(len, firsts)))
            # t-1, t, t+1 lie in one episode: a frame with first=True belongs to the new one
            t = [np.flatnonzero(~first[1:-1] & ~first[2:]) + 1 for first in firsts]
            windows[split] = np.concatenate([t + start for t, start in zip(t, frames[split].starts)])
            for s, (meta, first) in enumerate(zip(metas, firsts)):  # of files their heads alone
                found = meta["env_id"], (x := frames[split].open(s)).shape, str(x.dtype)
                if found != (args.env_id, (len(first), 64, 64, 3), "uint8") or len(windows[split]) < 2:
                    raise ValueError(f"{shards[s] / split} is {found}, {len(windows[split])} windows")
    except (OSError, ValueError, TypeError, KeyError) as e:
        again = f"`python collect_expert_data.py --env-id {args.env_id}` or import_videos.py makes one"
        sys.exit(f"error: {data_dir} is no whole dataset of {args.env_id} ({e}): {again}; see --data-dir")
    return metas[0] | {"identity": "+".join(meta.get("identity", "") for meta in metas)}, frames, windows


def get_windows(frames, t, device):
    """Windows around t (B,): o_{t-1}, o_t, o_{t+1} as (B, 9, 64, 64) in [-0.5, 0.5], channels-last."""
    triples = torch.from_numpy(frames[t[:, None] + np.arange(-1, 2)]).to(device)  # (B, 3, 64, 64, 3) uint8
    window = torch.cat(triples.unbind(1), dim=-1)  # (B, 64, 64, 9) uint8
    return torch.add(torch.tensor(-0.5, device=device), window.permute(0, 3, 1, 2), alpha=1 / 255)


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


def play(policies, num_episodes, seed, data, device, autocast, run):
    """Returns (len(policies), num_episodes): all play in one batch of games, one after another."""

    def policy(obs, episode):
        logits = torch.zeros(len(obs), data["num_actions"], device=device)
        for p in np.unique(episode // num_episodes):
            mine = torch.from_numpy(episode // num_episodes == p).to(device)
            with autocast:
                logits[mine] = policies[p](obs[mine]).float()
        return logits / run.args.temperature

    n, generator = len(policies) * num_episodes, torch.Generator(device).manual_seed(seed)
    levels = data["num_levels"], data["start_level"]
    env = make_env(run.args.env_id, min(run.args.num_envs, n), *levels, seed)
    return evaluate(policy, env, n, generator, run).reshape(len(policies), num_episodes)


@torch.inference_mode()
def test_accuracy(policies, frames, t, actions, device):
    """Accuracy and cross-entropy (nats) of the P policies on frames t (n,) with actions (n,): (P, 2)."""
    sums = 0
    for piece in np.split(t, range(512, len(t), 512)):
        obs, true = (
            torch.from_numpy(frames[piece]).to(device),
            torch.from_numpy(actions[piece]).long().to(device),
        )
        logits = torch.stack([policy(obs) for policy in policies])  # (P, B, A)
        losses = F.cross_entropy(
            logits.permute(1, 2, 0), true[:, None].expand(-1, len(policies)), reduction="none"
        )
        sums += torch.stack([(logits.argmax(-1) == true).sum(1), losses.sum(0)], dim=1)
    return sums / len(t)


def report_accuracy(plan, scores, num_frames, run):
    """Prints and writes accuracies and cross-entropies: scores (num_draws, len(plan), 2)."""
    rows = []
    print(f"\n{num_frames:,} labelled test frames: means over {len(scores)} draws, +- their standard error")
    for (n, method), (accuracies, losses) in zip(plan, scores.transpose(1, 2, 0)):
        row = {"method": method, "n_labels": n, "accuracies": accuracies.tolist(), "losses": losses.tolist()}
        row["accuracy_mean"], row["accuracy_stderr"] = mean_and_stderr(accuracies).values()
        row["cross_entropy_mean"], row["cross_entropy_stderr"] = mean_and_stderr(losses).values()
        print(
            "{method:20s} {n_labels:6}  accuracy {accuracy_mean:.3f} +- {accuracy_stderr:.3f}  cross-entropy "
            "{cross_entropy_mean:.2f} +- {cross_entropy_stderr:.2f}".format(**row)
        )
        rows.append(row)
    run.finish(num_draws=len(scores), num_test_frames=num_frames, curve=rows)


def report_returns(plan, played, data, device, autocast, run):
    """Prints and writes returns (num_draws, len(plan), episodes), beside random play and the demonstrator.

    A result is the mean over draws of the mean return of a draw's episodes. Which frames were labelled
    matters more than luck in play, and a draw's episodes share it: its standard error is over draws.
    """
    num_episodes, seed = max(100, run.args.eval_episodes), run.args.seed * 1000 + len(played)
    how = num_episodes, seed, data, device, autocast, run
    at_random = play([lambda obs: torch.zeros(len(obs), data["num_actions"], device=device)], *how)[0]
    rows = []
    for (n, method), returns in zip(plan, played.swapaxes(0, 1)):  # (num_draws, episodes)
        row = {"method": method, "n_labels": n, "episodes": returns.size, "returns": returns.tolist()}
        row |= mean_and_stderr(returns.mean(1)) | {"draws": returns.mean(1).tolist()}
        rows.append(row)
        run.writer.add_scalar(f"{method}/return_mean", row["return_mean"], n)
    random = {"method": "random", **mean_and_stderr(at_random), "episodes": len(at_random)}
    ends = random | {"returns": at_random.tolist()}, {"method": "demonstrator", **data["demonstrator"]}
    worst, best = (end["return_mean"] for end in ends)
    print(f"\n{run.args.env_id}: means over {len(played)} draws of the labels, +- their standard error")
    print(f"{'method':20s} labels return +- stderr  of demonstrator")
    for row in (*rows, *ends):
        row["relative_to_demonstrator"] = (row["return_mean"] - worst) / (best - worst or math.nan)
        score = "{return_mean:8.2f} +- {return_stderr:5.2f} {relative_to_demonstrator:16.2f}"
        print(f"{row['method']:20s} {row.get('n_labels', ''):6} {score.format(**row)}")
    run.finish(num_draws=len(played), curve=rows, random=ends[0], demonstrator=ends[1])


def load_actions(frames, windows, num_actions):
    """A split's actions (N,), -1 where frame t has no label a_t, and the windows that have one (n,)."""
    try:
        actions = frames.labels("actions")
        if len(actions) != len(frames) or not -1 <= actions.min() <= actions.max() < num_actions:
            raise ValueError(f"{len(actions)} of {actions.min()} to {actions.max()}")
        if not (actions[windows] >= 0).any():
            raise ValueError("no window has a label")
    except (OSError, ValueError, EOFError) as e:
        path, wanted = frames.folders[0] / "actions.npy", f"{len(frames)} actions of 0 to {num_actions - 1}"
        sys.exit(f"error: {path} is not {wanted} ({e}): make the dataset again")
    return actions, windows[actions[windows] >= 0]


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
    if WORLD_SIZE > 1:
        sys.exit("error: decoding trains small networks in one process: `python lapo_decode.py`, no torchrun")
    counts = args.num_draws - 1, args.eval_episodes, args.num_envs, args.policy_batch_size
    if min(*counts, args.decoder_updates, args.cloning_updates) < 1 or not args.temperature > 0:
        least = "--num-draws 2, --eval-episodes, --num-envs, --policy-batch-size and all updates 1"
        sys.exit(f"error: a flag is too small: {least}, --temperature more than 0")
    default = f"{args.runs_dir}/{args.env_id}__lapo_bc__{args.seed}/checkpoint.pt"
    cloned = load_checkpoint(args.bc_checkpoint or default, "lapo_bc", ["policy", "idm"], args)
    data, frames, windows = load_dataset(args)
    demonstrator, A = data.get("demonstrator"), data.setdefault("num_actions", 15)
    actions, labelled = load_actions(frames["train"], windows["train"], A)
    if not demonstrator:
        actions_test, t_test = load_actions(frames["test"], windows["test"], A)
    fewest, most = min(args.num_labels, default=0), max(args.num_labels, default=0)
    if not 1 <= fewest <= most <= len(labelled):
        sys.exit(f"error: --num-labels {args.num_labels}: this dataset has {len(labelled)} labelled windows")
    run = Run(args, inputs=[cloned["identity"], data.get("identity")])
    run.meta |= {"pretrain_args": cloned["pretrain_args"], "bc_args": cloned["args"], "data": data}
    device = (torch.accelerator.current_accelerator(True) if args.cuda else None) or torch.device("cpu")

    # the networks of stages 2 and 3, frozen
    latent_dim, patch = len(cloned["idm"]["head.bias"]), cloned["pretrain_args"]["patch_size"]
    differences = cloned["pretrain_args"].get("idm_differences", False)
    idm = IDM(cloned["pretrain_args"]["idm_scale"], latent_dim, patch, differences)
    idm.load_state_dict(cloned["idm"])
    idm = idm.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    policy = LatentPolicy(cloned["args"]["policy_scale"], latent_dim, patch)
    policy.load_state_dict(cloned["policy"])
    policy = policy.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    autocast = torch.autocast(device.type, torch.bfloat16, args.bf16)
    print(f"{args.env_id}: {device}, {'bfloat16' if args.bf16 else 'float32'}")

    kept = Decoder(latent_dim, args.decoder_hidden, A)  # checkpoint.pt's: most labels, first draw
    state = run.restore(policy=policy, decoder=kept)

    methods = ["lapo_decoder", *["cloning_from_scratch"] * args.cloning]
    methods += [] if demonstrator else ["majority_action"]
    plan = [(n, method) for n in args.num_labels for method in methods]
    num_episodes = math.ceil(args.eval_episodes / args.num_draws)  # of a policy
    played = state.get("played", [])  # for every draw that is done: returns (len(plan), num_episodes)
    for draw in range(len(played), args.num_draws):
        seed = args.seed * 1000 + draw
        torch.manual_seed(seed)
        # the n labelled windows are the first n of the draw's permutation: more labels contain fewer
        t = np.random.default_rng([args.seed, draw]).permutation(labelled)[:most]
        obs = torch.from_numpy(frames["train"][t]).to(device)  # (n, 64, 64, 3) uint8
        pieces = np.split(t, range(512, len(t), 512))  # of which the IDM makes z (n, latent_dim)
        with autocast:
            z = torch.cat([idm(get_windows(frames["train"], piece, device)) for piece in pieces])
        labels = torch.from_numpy(actions[t]).long().to(device)  # (n,)
        policies = []
        for n, method in tqdm(plan, f"draw {draw + 1} of {args.num_draws}: fit", unit="policy", leave=False):
            run.leave_if_stopped()
            if method == "lapo_decoder":
                policies.append(fit_lapo(policy, z[:n], labels[:n], A, args))
                if draw == 0 and n == most:
                    kept.load_state_dict(policies[-1][1].state_dict())
            elif method == "cloning_from_scratch":  # f(o_t): pi's network, with A logits for a latent
                new = LatentPolicy(cloned["args"]["policy_scale"], A, patch)
                new = new.to(device, memory_format=torch.channels_last)
                policies.append(fit_policy(new, obs[:n], labels[:n], args, autocast))
            else:  # the majority action of these n labels: their frequencies, everywhere
                frequencies = (torch.bincount(labels[:n], minlength=A) + 1) / (n + A)
                policies.append(partial(lambda logits, obs: logits.expand(len(obs), -1), frequencies.log()))
        if demonstrator:
            scores = play(policies, num_episodes, seed, data, device, autocast, run)
        else:
            scores = test_accuracy(policies, frames["test"], t_test, actions_test, device)
        played.append(scores.tolist())
        run.save(draw + 1, played=played)
    if not demonstrator:
        report_accuracy(plan, np.array(played), len(t_test), run)
    else:
        report_returns(plan, np.array(played), data, device, autocast, run)
        print(f"next: python lapo_finetune_ppo.py --env-id {args.env_id} --runs-dir {args.runs_dir}")
