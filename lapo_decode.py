# /// script
# requires-python = ">=3.10,<3.13"
# dependencies = ["torch==2.13.0", "procgen-mirror==0.10.7", "gym==0.26.2", "numpy<2", "tyro", "tensorboard", "tqdm"]
# ///
"""LAPO, stage 4 of 5, offline: a handful of action labels turns the latent policy into one that plays (paper section 6.4).

    decoder        d(IDM(o_{t-1}, o_t, o_{t+1})) -> a_t, fitted on n labelled transitions
    policy         a ~ d(pi(o_t))

For every label count n and several draws of the labelled frames, plays it beside behaviour cloning from scratch on the same
labels (same network, same loss), and beside acting at random and the demonstrator.

Reads data/ENV_ID and runs/ENV_ID__lapo_bc__SEED/checkpoint.pt, writes runs/ENV_ID__lapo_decode__SEED/{results.json,checkpoint.pt}.
    python lapo_decode.py --env-id bossfight
Next:
    python lapo_finetune_ppo.py --env-id bossfight
"""

import json
import os
import random
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.optim as optim
import tyro
from procgen import ProcgenGym3Env
from procgen.env import ENV_NAMES
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

FORMAT_VERSION = 1  # of checkpoints and datasets

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
    """if toggled, cuda is used when there is one"""
    bf16: bool = True
    """run the IMPALA-CNNs' forward pass in bfloat16 (faster where the processor knows it; parameters and loss stay float32)"""
    track: bool = False
    """if toggled, this experiment is also tracked with Weights and Biases (`pip install wandb`)"""
    wandb_project_name: str = "lapo"
    """the wandb's project name"""
    wandb_entity: str | None = None
    """the entity (team) of wandb's project"""
    capture_video: bool = False
    """write a GIF of LAPO + decoder (n = table_labels, first draw) to the run folder"""
    runs_dir: str = "runs"
    """where run folders (TensorBoard logs, checkpoint.pt, results.json) are made"""
    overwrite: bool = False
    """replace a finished run of the same name"""

    env_id: str = "bossfight"
    """the Procgen game, one of the 16"""
    num_levels: int | None = None
    """number of Procgen levels to play on, 0: all of them; default: those of the dataset"""
    start_level: int | None = None
    """the first level, if num_levels > 0; default: that of the dataset"""
    data_dir: str | None = None
    """the dataset of collect_expert_data.py; default data/ENV_ID"""
    bc_checkpoint: str | None = None
    """the checkpoint of lapo_bc.py; default RUNS_DIR/ENV_ID__lapo_bc__SEED/checkpoint.pt"""

    num_labels: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
    """the label counts n of the curve"""
    table_labels: int = 256
    """the label count n of the table, one of num_labels"""
    num_draws: int = 5
    """draws of the labelled frames; every row is the mean over them"""
    eval_episodes: int = 100
    """episodes per method and label count, spread over the draws; random and demonstrator rows have at least 100 too"""
    num_envs: int = 50
    """the most games played in parallel"""

    temperature: float = 1.0
    """actions are sampled from softmax(logits / temperature), for LAPO and for behaviour cloning alike"""
    decoder_hidden: tuple[int, ...] = (192, 128, 64)
    """hidden widths of the decoder"""
    decoder_updates: int = 200
    """gradient steps of a decoder; many overfit a handful of labels"""
    decoder_learning_rate: float = 1e-3
    """Adam's learning rate for a decoder, linearly to 0"""
    bc_updates: int = 1000
    """gradient steps of behaviour cloning from scratch; few learn little more than how often each action is taken, many overfit"""
    bc_learning_rate: float = 5e-4
    """Adam's learning rate for behaviour cloning from scratch, linearly to 0"""
    bc_batch_size: int = 128
    """the largest batch of behaviour cloning from scratch; the decoder's is 512"""
    label_smoothing: float = 0.05
    """label smoothing of both"""
    weight_decay: float = 1e-2
    """decoupled weight decay (AdamW) of both"""


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


class IDM(nn.Module):
    """Inverse dynamics model: frames o_{t-1}, o_t, o_{t+1} stacked on channels (B, 9, 64, 64) -> continuous latent (B, latent_dim)."""

    def __init__(self, scale, latent_dim):
        super().__init__()
        self.network = ImpalaCNN(9, scale)
        self.head = nn.Linear(256, latent_dim)

    def forward(self, x):
        return self.head(self.network(x)).float()


class LatentPolicy(nn.Module):
    """pi(o_t): observations (B, 64, 64, 3) uint8 -> latent action (B, latent_dim). The value head waits for fine-tuning."""

    def __init__(self, scale, latent_dim):
        super().__init__()
        self.network = ImpalaCNN(3, scale)
        self.head = nn.Linear(256, latent_dim)
        self.critic = nn.Linear(256, 1)

    def forward(self, obs):
        # HWC memory seen as (B, 3, 64, 64) is channels-last already: no copy
        return self.head(self.network(obs.permute(0, 3, 1, 2).float() / 255 - 0.5)).float()


class Decoder(nn.Module):
    """MLP from latents (B, latent_dim), standardised by the training latents' mean and deviation, to action logits (B, 15)."""

    def __init__(self, latent_dim, hidden, num_actions=15):
        super().__init__()
        self.register_buffer("mean", torch.zeros(latent_dim))
        self.register_buffer("std", torch.ones(latent_dim))
        widths = [latent_dim, *hidden]
        layers = [layer for i, o in zip(widths, widths[1:]) for layer in (nn.Linear(i, o), nn.ReLU())]
        self.mlp = nn.Sequential(*layers, nn.Linear(widths[-1], num_actions))

    def forward(self, z):
        return self.mlp((z - self.mean) / self.std)


class ScratchPolicy(nn.Module):
    """Behaviour cloning's policy: observations (B, 64, 64, 3) uint8 -> action logits (B, 15), of the latent policy's size."""

    def __init__(self, scale, num_actions=15):
        super().__init__()
        self.network = ImpalaCNN(3, scale)
        self.actor = nn.Linear(256, num_actions)

    def forward(self, obs):
        return self.actor(self.network(obs.permute(0, 3, 1, 2).float() / 255 - 0.5)).float()


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


def save_checkpoint(path, meta, **states):
    """Tensors and plain values only (loads with weights_only=True); written aside, then renamed, so never half there."""
    torch.save({"meta": {"format_version": FORMAT_VERSION, **meta}, **states}, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def load_meta(data_dir, env_id):
    """A dataset's meta.json; refuses, in one sentence, what is missing, of another game or of another format."""
    command = f"python collect_expert_data.py --env-id {env_id}"
    try:
        meta = json.loads((Path(data_dir) / "meta.json").read_text())
    except (FileNotFoundError, NotADirectoryError):
        sys.exit(f"error: no dataset at {data_dir} (meta.json is missing): make it with `{command}`, or name another with --data-dir")
    except ValueError:
        sys.exit(f"error: {data_dir}/meta.json is not JSON: collect the dataset again with `{command} --overwrite`")
    if not isinstance(meta, dict):
        sys.exit(f"error: {data_dir}/meta.json holds no dictionary: collect the dataset again with `{command} --overwrite`")
    for key, want in (("format_version", FORMAT_VERSION), ("env_id", env_id)):
        if meta.get(key) != want:
            sys.exit(f"error: {data_dir} has {key} {meta.get(key)}, expected {want}: make one with `{command}`, or name another with --data-dir")
    missing = [key for key in ("num_levels", "start_level", "splits") if key not in meta]
    if missing:
        sys.exit(f"error: {data_dir}/meta.json lacks {', '.join(missing)}: collect the dataset again with `{command} --overwrite`")
    return meta


def load_array(data_dir, split, name, shape, dtype):
    """data_dir/split/name.npy memory-mapped; refuses, in one sentence, a missing, truncated or wrong-shaped file."""
    path = Path(data_dir) / split / f"{name}.npy"
    try:
        array = np.lib.format.open_memmap(path, mode="r")  # refuses pickles
    except (OSError, ValueError, EOFError) as e:
        why = str(e).splitlines()[0]
        sys.exit(f"error: {path} is missing or damaged ({why}): collect the dataset again with collect_expert_data.py --overwrite")
    if array.shape != shape or array.dtype != dtype:
        found = f"{array.shape} {array.dtype}, expected {shape} {np.dtype(dtype)}"
        sys.exit(f"error: {path} holds {found}: collect the dataset again with collect_expert_data.py --overwrite")
    return array


def load_frames(data_dir, split, meta):
    """Frames (N, 64, 64, 3) uint8, memory-mapped, and the t of all windows (t-1, t, t+1) that lie within one episode."""
    n = meta["splits"][split]["num_frames"]
    frames = load_array(data_dir, split, "frames", (n, 64, 64, 3), np.uint8)
    first = load_array(data_dir, split, "first", (n,), bool)
    # o_t and o_{t+1} must both succeed the frame before them: a frame with first=True belongs to the new episode
    return frames, np.flatnonzero(~first[1:-1] & ~first[2:]) + 1


def get_windows(frames, t, device):
    """Windows around t (B,) -> (B, 9, 64, 64) float in [-0.5, 0.5], channels-last: o_{t-1}, o_t, o_{t+1} stacked on channels."""
    # frames t-1, t, t+1 lie side by side in the file, so a view that overlaps itself makes each window a single copy of 36 KB
    triples = np.lib.stride_tricks.as_strided(frames, (len(frames) - 2, 3, 64, 64, 3), (frames.strides[0], *frames.strides))
    window = torch.cat(torch.from_numpy(triples[t - 1]).to(device).unbind(1), dim=-1)  # (B, 64, 64, 9) uint8
    return torch.add(torch.tensor(-0.5, device=device), window.permute(0, 3, 1, 2), alpha=1 / 255)  # x / 255 - 0.5 in one pass


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


def fit(model, x, actions, updates, learning_rate, batch_size, args, autocast):
    """Cross-entropy on labelled inputs (n, ...), n label counts at a time, in shuffled epochs; the step size falls linearly to 0."""
    optimizer = optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=args.weight_decay)
    batch_size, queue = min(batch_size, len(x)), torch.empty(0, dtype=torch.long)
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - update / updates)
        if len(queue) < batch_size:
            queue = torch.randperm(len(x))
        batch, queue = queue[:batch_size], queue[batch_size:]
        with autocast:
            logits = model(x[batch])
        loss = F.cross_entropy(logits.float(), actions[batch], label_smoothing=args.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def mean_and_stderr(x):
    return float(np.mean(x)), float(np.std(x, ddof=1) / np.sqrt(len(x)))


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    if args.env_id not in ENV_NAMES:
        sys.exit(f"error: --env-id {args.env_id} is not a Procgen game: choose one of {', '.join(ENV_NAMES)}")
    require(args, num_draws=2, eval_episodes=1, num_envs=1, decoder_updates=1, bc_updates=1, bc_batch_size=1)
    data_dir = Path(args.data_dir or f"data/{args.env_id}")
    run_dir = Path(args.runs_dir) / f"{args.env_id}__{args.exp_name}__{args.seed}"
    if (run_dir / "results.json").exists() and not args.overwrite:
        sys.exit(f"error: {run_dir} already holds a finished run: add --overwrite to replace it, or choose another --exp-name or --seed")
    bc_path = args.bc_checkpoint or Path(args.runs_dir) / f"{args.env_id}__lapo_bc__{args.seed}" / "checkpoint.pt"
    parts = ("policy", "idm", "latent_mean", "latent_std")
    cloned = load_checkpoint(bc_path, "lapo_bc", args.env_id, f"python lapo_bc.py --env-id {args.env_id}", parts)
    data_meta = load_meta(data_dir, args.env_id)
    if "demonstrator" not in data_meta:
        sys.exit(f"error: {data_dir}/meta.json lacks demonstrator, the score to compare with: add its return_mean, return_stderr and episodes")
    frames, valid_t = load_frames(data_dir, "train", data_meta)
    if args.temperature <= 0:
        sys.exit(f"error: --temperature is {args.temperature}, expected more than 0: 1 samples from the logits as they are")
    if len(set(args.num_labels)) < len(args.num_labels):
        sys.exit(f"error: --num-labels {args.num_labels} names a count twice: name each once")
    if args.table_labels not in args.num_labels:
        sys.exit(f"error: --table-labels {args.table_labels} is not among --num-labels {args.num_labels}: add it there")
    if not 1 <= min(args.num_labels) <= max(args.num_labels) <= len(valid_t):
        found = f"{data_dir} has {len(valid_t)} labelled windows"
        sys.exit(f"error: --num-labels {args.num_labels} asks for more labels than exist: {found}; ask for fewer or collect more")
    labels = load_array(data_dir, "train", "actions", (len(frames),), np.int8)
    num_levels = data_meta["num_levels"] if args.num_levels is None else args.num_levels
    start_level = data_meta["start_level"] if args.start_level is None else args.start_level

    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    device = torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.bf16)
    no_autocast = torch.autocast(device.type, enabled=False)
    start_time = time.time()

    pretrain_args, policy_scale = cloned["meta"]["pretrain_args"], cloned["meta"]["args"]["policy_scale"]
    latent_dim = pretrain_args["vq_num_codebooks"] * pretrain_args["vq_num_slots"] * pretrain_args["vq_dim"]
    idm = IDM(pretrain_args["idm_scale"], latent_dim).to(device).to(memory_format=torch.channels_last)
    idm.load_state_dict(cloned["idm"])
    idm.eval().requires_grad_(False)
    policy = LatentPolicy(policy_scale, latent_dim).to(device).to(memory_format=torch.channels_last)
    policy.load_state_dict(cloned["policy"])
    policy.eval().requires_grad_(False)
    writer = make_writer(run_dir, args)

    def play(logits_of, num_episodes, draw, gif=None):
        """Returns (num_episodes,) of sampling from softmax(logits_of(obs) / temperature); methods meet the same levels at the same draw."""
        seed = args.seed * 1000 + draw
        generator = torch.Generator(device).manual_seed(seed)

        @torch.inference_mode()
        def act(obs):
            logits = logits_of(torch.as_tensor(obs, device=device))
            return torch.multinomial((logits / args.temperature).softmax(-1), 1, generator=generator).squeeze(-1).cpu().numpy().astype(np.int32)

        env = make_env(args.env_id, min(args.num_envs, num_episodes), num_levels, start_level, seed)
        returns = evaluate(act, env, num_episodes, gif)
        env.close()
        return returns

    def lapo_logits(obs):
        with autocast:
            z = policy(obs)
        return decoder(z)

    def scratch_logits(obs):
        with autocast:
            return scratch(obs)

    # n labelled transitions of draw d: the first n of its permutation, so more labels contain fewer
    curve, episodes_per_draw = [], -(-args.eval_episodes // args.num_draws)
    returns = {}  # (method, n) -> (num_draws, episodes_per_draw)
    progress = tqdm(total=args.num_draws * len(args.num_labels), unit="draw", desc="decode")
    for draw in range(args.num_draws):
        t = np.random.default_rng([args.seed, draw]).permutation(valid_t)[: max(args.num_labels)]
        actions = torch.from_numpy(labels[t].astype(np.int64)).to(device)  # (n,)
        obs = torch.from_numpy(frames[t]).to(device)  # (n, 64, 64, 3)
        with torch.inference_mode(), autocast:
            z = torch.cat([idm(get_windows(frames, c, device)) for c in np.array_split(t, -(-len(t) // 512))])  # (n, latent_dim)
        z = z.clone()
        for n in args.num_labels:
            decoder = Decoder(latent_dim, args.decoder_hidden).to(device)
            decoder.mean.copy_(cloned["latent_mean"])
            decoder.std.copy_(cloned["latent_std"])
            fit(decoder, z[:n], actions[:n], args.decoder_updates, args.decoder_learning_rate, 512, args, no_autocast)
            film = run_dir / "lapo_decoder.gif" if args.capture_video and (n, draw) == (args.table_labels, 0) else None
            returns.setdefault(("lapo_decoder", n), []).append(play(lapo_logits, episodes_per_draw, draw, film))
            if (n, draw) == (args.table_labels, 0):
                meta = {
                    "stage": "lapo_decode", "env_id": args.env_id, "num_levels": num_levels, "start_level": start_level, "n_labels": n,
                    "args": asdict(args), "bc_args": cloned["meta"]["args"], "pretrain_args": pretrain_args,
                }  # fmt: skip
                save_checkpoint(run_dir / "checkpoint.pt", meta, policy=policy.state_dict(), decoder=decoder.state_dict())
            scratch = ScratchPolicy(policy_scale).to(device).to(memory_format=torch.channels_last)
            fit(scratch, obs[:n], actions[:n], args.bc_updates, args.bc_learning_rate, args.bc_batch_size, args, autocast)
            returns.setdefault(("bc_from_scratch", n), []).append(play(scratch_logits, episodes_per_draw, draw))
            progress.update()
            progress.set_postfix_str(", ".join(f"{m} {n}: {np.mean(returns[m, n]):.2f}" for m in ("lapo_decoder", "bc_from_scratch")))
    progress.close()

    random_returns = play(lambda obs: torch.zeros(len(obs), 15, device=device), max(100, args.eval_episodes), args.num_draws)
    demonstrator = data_meta["demonstrator"]
    paper_random, paper_expert = PAPER_SCORES[args.env_id]

    def row(method, mean, stderr, episodes, **more):
        return {
            "method": method, **more, "return_mean": mean, "return_stderr": stderr, "episodes": episodes,
            "relative_return": (mean - paper_random) / (paper_expert - paper_random),
            "relative_to_demonstrator": (mean - random_returns.mean()) / (demonstrator["return_mean"] - random_returns.mean()),
        }  # fmt: skip

    for (method, n), r in returns.items():
        draws = np.mean(r, axis=1)  # the draw of the labels is the larger noise: the standard error is over draws
        curve.append(row(method, *mean_and_stderr(draws), int(np.size(r)), n_labels=n, draws=draws.tolist()))
        for key in ("return_mean", "relative_return", "relative_to_demonstrator"):
            writer.add_scalar(f"{method}/{key}", curve[-1][key], n)
    table = [
        row("random", *mean_and_stderr(random_returns), len(random_returns)),
        *sorted((c for c in curve if c["n_labels"] == args.table_labels), key=lambda c: c["method"]),  # bc_from_scratch, lapo_decoder
        row("demonstrator", demonstrator["return_mean"], demonstrator["return_stderr"], demonstrator["episodes"]),
    ]
    wall = time.time() - start_time
    results = {
        "stage": "lapo_decode", "env_id": args.env_id, "seed": args.seed, "num_levels": num_levels, "start_level": start_level,
        "n_labels": args.table_labels, "num_draws": args.num_draws, "rows": table, "curve": curve, "wall_seconds": round(wall, 1),
        "device": str(device), "torch": torch.__version__, "command": "python " + " ".join(sys.argv), "args": asdict(args),
    }  # fmt: skip
    (run_dir / "results.json").write_text(json.dumps(results, indent=2))
    writer.close()
    for title, rows in ((f"every label count, mean over {args.num_draws} draws", curve), (f"{args.table_labels} labels", table)):
        print(f"\n{args.env_id}, {title}")
        print(f"{'method':16s} {'labels':>6s} {'return':>16s} {'episodes':>9s} {'relative return':>16s} {'relative to demonstrator':>25s}")
        for r in rows:
            score = f"{r['return_mean']:8.2f} +- {r['return_stderr']:4.2f} {r['episodes']:9d} {r['relative_return']:16.2f}"
            print(f"{r['method']:16s} {r.get('n_labels', ''):6} {score} {r['relative_to_demonstrator']:25.2f}")
    print(f"wrote {run_dir}; next: python lapo_finetune_ppo.py --env-id {args.env_id}")
