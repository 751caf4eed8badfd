"""LAPO, stage 4, offline: a handful of action labels makes the latent policy play (paper section 6.4).

    decoder    d(IDM(o_{t-1}, o_t, o_{t+1})) -> a_t    cross-entropy on n labelled transitions
    policy     a ~ d(pi(o_t))                          pi from stage 3, which saw no labels
    cloning    a ~ f(o_t), from scratch                the baseline: same labels, same CNN, same loss

Both are fitted and play for every n and several draws of the labelled frames. Their returns are printed
beside those of random play and of the demonstrator. An interrupted run goes on after its last whole draw.

    python lapo_decode.py --env-id bossfight                                       # the paper's scale
    python lapo_decode.py --env-id coinrun --num-labels 32 256 --eval-episodes 20  # toy
Reads data/ENV_ID and RUNS_DIR/ENV_ID__lapo_bc__SEED/checkpoint.pt, writes
RUNS_DIR/ENV_ID__lapo_decode__SEED/results.json and checkpoint.pt: the policy, and the decoder that was fitted
on the most labels of the first draw. See docs/lapo_decode.md.
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
from importlib.util import find_spec
from pathlib import Path

import gymnasium
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from filelock import FileLock, Timeout
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

FORMAT_VERSION = 5  # of checkpoints
# flags that are no arguments of the method
PLACES = "data_dir bc_checkpoint runs_dir overwrite cuda track wandb_project_name wandb_entity".split()
# progress: a bar in a terminal, a line a minute in a file
BAR = {} if sys.stderr.isatty() else {"mininterval": 60, "bar_format": "{l_bar}{r_bar}\n"}
RANK = int(os.environ.get("RANK", 0))  # torchrun sets both
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))


@dataclass
class Args:
    # what
    env_id: str = "bossfight"  # a Procgen game, or a gymnasium world
    exp_name: str = Path(__file__).stem  # the run folder is RUNS_DIR/ENV_ID__EXP_NAME__SEED
    seed: int = 1  # seed of the experiment
    # data
    data_dir: str | None = None  # the dataset; default data/ENV_ID
    bc_checkpoint: str | None = None  # of lapo_bc.py; default RUNS_DIR/ENV_ID__lapo_bc__SEED/checkpoint.pt
    # method
    num_labels: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
    """the label counts n: this many training frames come with their true action"""
    num_draws: int = 5  # draws of the labelled frames; results are means over them
    eval_episodes: int = 100  # episodes per method and n, over all draws
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
    overwrite: bool = False  # begin anew; else a finished run is kept, and an unfinished one goes on
    track: bool = False  # send the same logs to Weights & Biases
    wandb_project_name: str = "lapo"  # its project
    wandb_entity: str | None = None  # its team; default: your own
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


class IDM(nn.Module):
    """Inverse dynamics model: o_{t-1}, o_t, o_{t+1} (B, 9, 64, 64) -> continuous latent (B, latent_dim)."""

    def __init__(self, scale, latent_dim, patch_size=1):
        super().__init__()
        self.network = ImpalaCNN(9, scale, patch_size)
        self.head = nn.Linear(256, latent_dim)

    def forward(self, windows):
        return self.head(self.network(windows)).float()


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
        x = obs.permute(0, 3, 1, 2).float() / 255 - 0.5
        return self.network(x)  # (B, 256)

    def forward(self, obs):
        return self.mean + self.std * self.head(self.features(obs)).float()


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


def get_windows(frames, t, device):
    """Windows around t (B,): o_{t-1}, o_t, o_{t+1} as (B, 9, 64, 64) in [-0.5, 0.5], channels-last."""
    triples = frames[t[:, None] + np.array([-1, 0, 1])]  # (B, 3, 64, 64, 3) uint8
    triples = torch.from_numpy(triples).to(device)
    windows = torch.cat(triples.unbind(1), dim=-1)  # (B, 64, 64, 9)
    return windows.permute(0, 3, 1, 2).float() / 255 - 0.5


@torch.no_grad()
def apply_to_windows(network, frames, t, device, autocast):
    """What a network makes of the windows around t (n,), in batches: (n, ...)."""
    outputs = []
    for batch in np.split(t, range(512, len(t), 512)):
        with autocast:
            outputs.append(network(get_windows(frames, batch, device)))
    return torch.cat(outputs)


def fit_classifier(
    model, inputs, targets, updates, learning_rate, batch_size, label_smoothing, weight_decay, autocast
):
    """Trains model(inputs(i)) -> logits of targets[i] on n labels: i (B,), targets (n,) or (n, A).

    Minimises the cross-entropy by AdamW, whose learning rate falls linearly to 0. Batches come from shuffled
    epochs; what is left of an epoch is dropped.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    batch_size = min(batch_size, len(targets))
    batches_per_epoch = len(targets) // batch_size
    for update in range(updates):
        if update % batches_per_epoch == 0:
            epoch = torch.randperm(len(targets)).split(batch_size)
        i = epoch[update % batches_per_epoch]
        with autocast:
            logits = model(inputs(i))
        loss = F.cross_entropy(logits.float(), targets[i], label_smoothing=label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - update / updates)
        optimizer.step()
    if not all(p.isfinite().all() for p in model.parameters()):  # before NaN gets into a saved state
        refuse(f"parameters are not finite on {len(targets)} labels: lower the learning rate, or --no-bf16")
    return model


def fit_lapo_decoder(policy, z, actions, num_actions, args):
    """The decoder d of LAPO, fitted on n labels; d(pi(o_t)) is what plays (section 6.4).

    d learns a_t from z (n, latent_dim), the IDM's continuous latents: the IDM saw o_{t+1}, and so what was
    done. It plays on pi(o_t), which was cloned on such latents; pi brings the mean and std of them all.
    """
    decoder = Decoder(z.shape[1], args.decoder_hidden, num_actions).to(z.device)
    decoder.mean.copy_(policy.mean)
    decoder.std.copy_(policy.std)
    return fit_classifier(
        decoder,
        lambda i: z[i],
        actions,
        updates=args.decoder_updates,
        learning_rate=args.decoder_learning_rate,
        batch_size=512,
        label_smoothing=args.label_smoothing,
        weight_decay=args.weight_decay,
        autocast=torch.autocast(z.device.type, enabled=False),  # float32
    )


def fit_cloning(policy, obs, actions, args, autocast):
    """The baseline: trains policy(o_t) -> logits of a_t on n labels, observations (n, 64, 64, 3)."""
    updates_of_epochs = math.ceil(args.cloning_epochs * len(obs) / args.policy_batch_size)
    return fit_classifier(
        policy,
        lambda i: obs[i],
        actions,
        updates=max(args.cloning_updates, updates_of_epochs),
        learning_rate=args.cloning_learning_rate,
        batch_size=args.policy_batch_size,
        label_smoothing=args.label_smoothing,
        weight_decay=args.weight_decay,
        autocast=autocast,
    )


def main(args):
    device, autocast = start(args)
    default = run_folder(args, "lapo_bc") / "checkpoint.pt"
    cloned = load_checkpoint(args.bc_checkpoint or default, "lapo_bc", args.env_id)
    data, train, actions, labelled = load_labelled_frames(args)
    folder, resumed = open_folder(args)
    began = time.time() - resumed.get("seconds", 0)
    writer = make_writer(args, folder, 0)

    # the frozen networks of stages 2 and 3
    pretrain_args = cloned["pretrain_args"]
    patch_size = pretrain_args["patch_size"]
    policy_scale = cloned["args"]["policy_scale"]
    latent_dim = len(cloned["idm"]["head.bias"])
    num_actions = data["num_actions"]
    idm = IDM(pretrain_args["idm_scale"], latent_dim, patch_size)
    idm.load_state_dict(cloned["idm"])
    idm = idm.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    policy = LatentPolicy(policy_scale, latent_dim, patch_size)
    policy.load_state_dict(cloned["policy"])
    policy = policy.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)

    # what every draw fits and lets play
    methods = ["lapo_decoder"]
    if args.cloning:
        methods.append("cloning_from_scratch")
    plan = [(n, method) for n in args.num_labels for method in methods]
    most = max(args.num_labels)
    num_episodes = math.ceil(args.eval_episodes / args.num_draws)  # of a policy
    played = resumed.get("played", [])  # returns (len(plan), num_episodes) of each draw that is done
    decoder_state = resumed.get("decoder")
    for draw in range(len(played), args.num_draws):
        seed = args.seed * 1000 + draw
        torch.manual_seed(seed)
        # the n labelled windows are the first n of the draw's permutation: more labels contain fewer
        t = np.random.default_rng([args.seed, draw]).permutation(labelled)[:most]
        obs = torch.from_numpy(train[t]).to(device)  # (n, 64, 64, 3) uint8
        labels = torch.from_numpy(actions[t]).long().to(device)  # (n,)
        z = apply_to_windows(idm, train, t, device, autocast)  # (n, latent_dim)

        policies = []
        for n, method in tqdm(
            plan, f"draw {draw + 1} of {args.num_draws}: fit", unit="policy", leave=False, **BAR
        ):
            if method == "lapo_decoder":
                decoder = fit_lapo_decoder(policy, z[:n], labels[:n], num_actions, args)
                policies.append(nn.Sequential(policy, decoder))
                if draw == 0 and n == most:
                    decoder_state = decoder.state_dict()  # for checkpoint.pt
            else:  # f: pi's network, with A logits for a latent
                network = LatentPolicy(policy_scale, num_actions, patch_size)
                network = network.to(device, memory_format=torch.channels_last)
                policies.append(fit_cloning(network, obs[:n], labels[:n], args, autocast))
        returns = play(policies, num_episodes, seed, data, args, device, autocast)
        played.append(returns.tolist())
        state = {"played": played, "decoder": decoder_state, "seconds": time.time() - began}
        save(folder / "resume.pt", {**describe(args), **state})

    results = report_returns(plan, np.array(played), data)
    for row in results["curve"]:
        writer.add_scalar(f"{row['method']}/return_mean", row["return_mean"], row["n_labels"])
    writer.close()
    networks = {"policy": policy.state_dict(), "decoder": decoder_state}
    origin = {"pretrain_args": pretrain_args, "bc_args": cloned["args"], "data": data}
    finish(folder, args, time.time() - began, {**networks, **origin}, {**results, **origin})
    print(f"next: python lapo_finetune_ppo.py --env-id {args.env_id} --runs-dir {args.runs_dir}")


# ---- Games, results, data, run-keeping: nobody has to read on ----


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
def evaluate(policy, env, num_episodes, generator):
    """Returns (num_episodes,) of games with actions drawn from softmax(policy(obs, episode)), (B, A).

    An env that ends its episode begins the next in line; every episode counts, however long.
    """
    episode = np.arange(env.num)  # the one that each env plays
    running = np.zeros(env.num)
    returns = np.full(num_episodes, np.nan)
    progress = tqdm(total=num_episodes, desc="play", unit="episode", leave=False, **BAR)
    _, frames, _ = env.observe()
    while np.isnan(returns).any():
        playing = np.flatnonzero(episode < num_episodes)
        obs = torch.from_numpy(frames["rgb"][playing]).to(generator.device)  # (B, 64, 64, 3) uint8
        probs = policy(obs, episode[playing]).softmax(-1)
        action = np.zeros(env.num, dtype=np.int32)
        action[playing] = torch.multinomial(probs, 1, generator=generator).squeeze(-1).cpu()
        env.act(action)
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


def play(policies, num_episodes, seed, data, args, device, autocast):
    """Returns (len(policies), num_episodes): all play in one batch of games, one after another."""
    total = len(policies) * num_episodes
    num_envs = min(args.num_envs, total)
    env = make_env(args.env_id, num_envs, data["num_levels"], data["start_level"], seed)
    generator = torch.Generator(device).manual_seed(seed)

    def logits_of_players(obs, episode):
        player = episode // num_episodes  # (B,): the policy whose episode it is
        logits = torch.zeros(len(obs), data["num_actions"], device=device)
        for p in np.unique(player):
            mine = torch.from_numpy(player == p).to(device)
            with autocast:
                logits[mine] = policies[p](obs[mine]).float()
        return logits / args.temperature

    returns = evaluate(logits_of_players, env, total, generator)
    return returns.reshape(len(policies), num_episodes)


def report_returns(plan, played, data):
    """Prints returns (num_draws, len(plan), episodes) as a table; gives the rows, as results.json has them.

    A result is the mean over draws of the mean return of a draw's episodes. Which frames were labelled
    matters more than luck in play, and a draw's episodes share it: its standard error is over draws.
    """
    curve = []
    for (n, method), returns in zip(plan, played.swapaxes(0, 1)):  # (num_draws, episodes)
        draws = returns.mean(1)
        row = {
            "method": method,
            "n_labels": n,
            "return_mean": draws.mean(),
            "return_stderr": draws.std(ddof=1) / len(draws) ** 0.5,
            "episodes": returns.size,
            "draws": draws.tolist(),
            "returns": returns.tolist(),
        }
        curve.append(row)
    random = {"method": "random", **data["random"]}
    demonstrator = {"method": "demonstrator", **data["demonstrator"]}
    low = random["return_mean"]
    high = demonstrator["return_mean"]
    print(f"\n{data['env_id']}: means over {len(played)} draws of the labels, +- their standard error")
    print(f"{'method':20s} labels return +- stderr  of demonstrator")
    for row in [*curve, random, demonstrator]:
        share = (row["return_mean"] - low) / (high - low or math.nan)
        row["relative_to_demonstrator"] = share
        score = f"{row['return_mean']:8.2f} +- {row['return_stderr']:5.2f} {share:16.2f}"
        print(f"{row['method']:20s} {row.get('n_labels', ''):6} {score}")
    return {"num_draws": len(played), "curve": curve, "random": random, "demonstrator": demonstrator}


class Frames:
    """The frames (N, 64, 64, 3) uint8 of a split, those of its shards in a row, and the windows in them."""

    def __init__(self, folders):
        self.folders = folders
        self.shards = [np.load(folder / "frames.npy", mmap_mode="r") for folder in folders]
        firsts = [np.load(folder / "first.npy").astype(bool) for folder in folders]
        for folder, shard, first in zip(folders, self.shards, firsts):
            if shard.shape != (len(first), 64, 64, 3) or shard.dtype != np.uint8:
                raise ValueError(f"{folder} has frames {shard.shape} {shard.dtype}, first {first.shape}")
        self.starts = np.cumsum([0, *map(len, firsts)])
        self.first = np.concatenate(firsts)  # (N,): this frame does not follow from the one before
        self.first[self.starts[:-1]] = True
        # t-1, t, t+1 lie in one episode if neither t nor t+1 begins one
        self.windows = np.flatnonzero(~self.first[1:-1] & ~self.first[2:]) + 1
        if len(self.windows) < 2:
            raise ValueError(f"{folders[0]} has {len(self.windows)} windows")

    def __getitem__(self, t):
        """Rows t, an array of integers of any shape (...) -> (..., 64, 64, 3)."""
        if len(self.shards) == 1:
            return self.shards[0][t]
        shard_of = np.searchsorted(self.starts, t, side="right") - 1
        rows = np.empty((*t.shape, 64, 64, 3), dtype=np.uint8)
        for s in np.unique(shard_of):
            mine = shard_of == s
            rows[mine] = self.shards[s][t[mine] - self.starts[s]]
        return rows


def load_labels(frames, name):
    """actions, rewards or returns (N,) of a split, or None where there are none."""
    paths = [folder / f"{name}.npy" for folder in frames.folders]
    if not all(path.exists() for path in paths):
        return None
    return np.concatenate([np.load(path) for path in paths])


def load_dataset(args):
    """meta.json (of the first shard), and the Frames of the train and the test split."""
    data_dir = Path(args.data_dir or f"data/{args.env_id.replace('/', '-')}")
    shards = sorted(data_dir.glob("shard-*")) or [data_dir]
    try:
        meta = json.loads((shards[0] / "meta.json").read_text())  # written last
        if meta["env_id"] != args.env_id:
            raise ValueError(f"it is of {meta['env_id']}")
        train = Frames([shard / "train" for shard in shards])
        test = Frames([shard / "test" for shard in shards])
    except (OSError, EOFError, ValueError, TypeError, KeyError) as e:
        again = f"`python collect_expert_data.py --env-id {args.env_id}` or tools.import_videos makes one"
        refuse(f"{data_dir} is no whole dataset of {args.env_id} ({e}): {again}; see --data-dir")
    return meta, train, test


def load_actions(frames, num_actions):
    """A split's actions (N,), -1 where frame t has no label a_t, and the windows that have one (n,)."""
    try:
        actions = load_labels(frames, "actions")
        right = len(actions) == len(frames.first) and -1 <= actions.min() <= actions.max() < num_actions
    except (OSError, EOFError, ValueError, TypeError):  # TypeError: there are none
        right = False
    if not right:
        expected = f"{len(frames.first)} actions of 0 to {num_actions - 1}"
        refuse(f"{frames.folders[0]}/actions.npy is missing, or not {expected}: make the dataset again")
    return actions, frames.windows[actions[frames.windows] >= 0]


def load_labelled_frames(args):
    """meta.json of a game that can be played, the train split's Frames, its actions, its labelled windows."""
    data, train, _ = load_dataset(args)
    if not data.get("demonstrator") or not data.get("random"):
        missing = f"{train.folders[0].parent}/meta.json lacks returns of the demonstrator or of random play"
        again = f"collect again, `python collect_expert_data.py --env-id {args.env_id}`"
        refuse(f"{missing}: {again} (nobody can play your own videos)")
    actions, labelled = load_actions(train, data["num_actions"])
    counts = args.num_labels or [0]
    if min(counts) < 1 or max(counts) > len(labelled):
        refuse(f"--num-labels {args.num_labels}: this dataset has 1 to {len(labelled)} labelled windows")
    return data, train, actions, labelled


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
    """Returns the device, and the autocast of forward passes."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the process at once, without a traceback
    if WORLD_SIZE > 1:
        refuse("decoding trains small networks in one process: `python lapo_decode.py`, no torchrun")
    counts = args.num_draws - 1, args.eval_episodes, args.num_envs, args.policy_batch_size
    if min(*counts, args.decoder_updates, args.cloning_updates) < 1 or args.temperature <= 0:
        least = "--num-draws 2, --eval-episodes, --num-envs, --policy-batch-size and all updates 1"
        refuse(f"a flag is too small: at least {least}, and --temperature more than 0")
    device = torch.device("cpu")
    if args.cuda and torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
    return device, torch.autocast(device.type, torch.bfloat16, enabled=args.bf16)


def run_folder(args, name):
    """RUNS_DIR/ENV_ID__NAME__SEED: one folder, also of a world whose name has a slash."""
    return Path(args.runs_dir) / f"{args.env_id}__{name}__{args.seed}".replace("/", "-")


def open_folder(args, places=PLACES):
    """The run folder, this process's until it ends, and the state of an unfinished run in it, else {}."""
    folder = run_folder(args, args.exp_name)
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
    if (folder / "results.json").exists():
        refuse(f"{folder} holds a finished run: --overwrite it, or choose another --exp-name")
    if not (folder / "resume.pt").exists():
        return folder, {}
    resumed = torch.load(folder / "resume.pt", map_location="cpu", weights_only=True)
    for name, value in vars(args).items():
        if name not in places and value != resumed["args"][name]:
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
