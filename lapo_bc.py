# /// script
# requires-python = ">=3.10,<3.13"
# dependencies = ["torch==2.13.0", "procgen-mirror==0.10.7", "gym==0.26.2", "numpy<2", "tyro", "tensorboard", "tqdm"]
# ///
"""LAPO, stage 3 of 5: clone a policy in the latent action space (paper section 4.2).

The frozen IDM of stage 2 labels every transition with a latent action, the continuous one before quantisation; a policy that
sees o_t alone learns to predict it:

    loss    MSE(pi(o_t), IDM(o_{t-1}, o_t, o_{t+1}))

Still no true action anywhere. The labels are computed once, to RUN_DIR/latents.npy, and read from there at every epoch.

Reads data/ENV_ID and runs/ENV_ID__lapo_pretrain__SEED/checkpoint.pt, writes runs/ENV_ID__lapo_bc__SEED/checkpoint.pt (policy and IDM).
    python lapo_bc.py --env-id bossfight
Next:
    python lapo_decode.py --env-id bossfight           (few labels, no environment)
    python lapo_finetune_ppo.py --env-id bossfight     (reinforcement learning)
"""

import json
import mmap
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
from procgen.env import ENV_NAMES
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm, trange

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
    """run the networks' forward pass in bfloat16 (faster where the processor knows it; parameters and loss stay float32)"""
    track: bool = False
    """if toggled, this experiment is also tracked with Weights and Biases (`pip install wandb`)"""
    wandb_project_name: str = "lapo"
    """the wandb's project name"""
    wandb_entity: str | None = None
    """the entity (team) of wandb's project"""
    runs_dir: str = "runs"
    """where run folders (TensorBoard logs, checkpoint.pt, results.json) are made"""
    overwrite: bool = False
    """replace a finished run of the same name"""

    env_id: str = "bossfight"
    """the Procgen game, one of the 16"""
    data_dir: str | None = None
    """the dataset of collect_expert_data.py; default data/ENV_ID"""
    pretrain_checkpoint: str | None = None
    """the checkpoint of lapo_pretrain.py; default RUNS_DIR/ENV_ID__lapo_pretrain__SEED/checkpoint.pt"""

    num_updates: int = 60_000
    """gradient steps"""
    batch_size: int = 128
    """transitions per step"""
    learning_rate: float = 2e-4
    """Adam's peak learning rate: 0.01x to 1x over the warm-up, then linearly to 0"""
    warmup_updates: int = 1000
    """length of the warm-up"""
    policy_scale: float = 4.0
    """width of the policy's IMPALA-CNN: 16, 32, 32 channels times this"""
    eval_every: int = 1000
    """updates between evaluations on test frames and checkpoints"""
    eval_frames: int = 4096
    """test frames in an evaluation"""


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


def forget_pages(array):
    """What was read of a memory-mapped array leaves this process's memory; it stays in the system's page cache."""
    array.base.madvise(mmap.MADV_DONTNEED)


def get_windows(frames, t, device):
    """Windows around t (B,) -> (B, 9, 64, 64) float in [-0.5, 0.5], channels-last: o_{t-1}, o_t, o_{t+1} stacked on channels."""
    # frames t-1, t, t+1 lie side by side in the file, so a view that overlaps itself makes each window a single copy of 36 KB
    triples = np.lib.stride_tricks.as_strided(frames, (len(frames) - 2, 3, 64, 64, 3), (frames.strides[0], *frames.strides))
    window = torch.cat(torch.from_numpy(triples[t - 1]).to(device).unbind(1), dim=-1)  # (B, 64, 64, 9) uint8
    return torch.add(torch.tensor(-0.5, device=device), window.permute(0, 3, 1, 2), alpha=1 / 255)  # x / 255 - 0.5 in one pass


def mean_and_std(array, chunk=65_536):
    """Mean and standard deviation of the rows of a memory-mapped array (N, D), two tensors (D,), read chunk by chunk."""
    n, total, squares = len(array), 0.0, 0.0
    for i in range(0, n, chunk):
        x = array[i : i + chunk].astype(np.float64)
        total, squares = total + x.sum(0), squares + np.square(x).sum(0)
        forget_pages(array)
    mean = total / n
    return torch.from_numpy(mean).float(), torch.from_numpy(np.sqrt(np.maximum(squares / n - mean**2, 0)) + 1e-6).float()


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    if args.env_id not in ENV_NAMES:
        sys.exit(f"error: --env-id {args.env_id} is not a Procgen game: choose one of {', '.join(ENV_NAMES)}")
    require(args, num_updates=1, batch_size=1, eval_every=1, eval_frames=1)
    data_dir = Path(args.data_dir or f"data/{args.env_id}")
    run_dir = Path(args.runs_dir) / f"{args.env_id}__{args.exp_name}__{args.seed}"
    if (run_dir / "results.json").exists() and not args.overwrite:
        sys.exit(f"error: {run_dir} already holds a finished run: add --overwrite to replace it, or choose another --exp-name or --seed")
    pretrain_path = args.pretrain_checkpoint or Path(args.runs_dir) / f"{args.env_id}__lapo_pretrain__{args.seed}" / "checkpoint.pt"
    pretrained = load_checkpoint(pretrain_path, "lapo_pretrain", args.env_id, f"python lapo_pretrain.py --env-id {args.env_id}", ("idm",))
    data_meta = load_meta(data_dir, args.env_id)
    train_frames, train_t = load_frames(data_dir, "train", data_meta)
    test_frames, test_t = load_frames(data_dir, "test", data_meta)
    for split, t in (("train", train_t), ("test", test_t)):
        if len(t) < args.batch_size:
            sys.exit(f"error: --batch-size {args.batch_size} exceeds the {len(t)} {split} windows of {data_dir}: lower it or collect more frames")

    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    device = torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.bf16)
    start_time = time.time()

    pretrain_args = pretrained["meta"]["args"]
    latent_dim = pretrain_args["vq_num_codebooks"] * pretrain_args["vq_num_slots"] * pretrain_args["vq_dim"]
    idm = IDM(pretrain_args["idm_scale"], latent_dim).to(device).to(memory_format=torch.channels_last)
    idm.load_state_dict(pretrained["idm"])
    idm.eval().requires_grad_(False)
    policy = LatentPolicy(args.policy_scale, latent_dim).to(device).to(memory_format=torch.channels_last)
    optimizer = optim.Adam(policy.parameters(), lr=args.learning_rate, fused=True)
    writer = make_writer(run_dir, args)

    def lr_factor(update):
        if update < args.warmup_updates:
            return 0.01 + 0.99 * update / args.warmup_updates
        return 1 - (update - args.warmup_updates) / max(1, args.num_updates - args.warmup_updates)

    @torch.inference_mode()
    def label(frames, ts, out):
        """IDM latents of the windows around ts, written to out (len(ts), latent_dim)."""
        for i in trange(0, len(ts), 512, unit="batch", desc="label", mininterval=1, leave=False):
            with autocast:
                out[i : i + 512] = idm(get_windows(frames, ts[i : i + 512], device)).cpu().numpy()
            forget_pages(frames)
        return out

    train_z = np.lib.format.open_memmap(run_dir / "latents.npy", "w+", np.float32, (len(train_t), latent_dim))  # in order of train_t
    label(train_frames, train_t, train_z)
    latent_mean, latent_std = mean_and_std(train_z)
    test_t = np.sort(np.random.default_rng(0).permutation(test_t)[: args.eval_frames])
    test_z = torch.from_numpy(label(test_frames, test_t, np.zeros((len(test_t), latent_dim), dtype=np.float32)))
    mean_mse = F.mse_loss(latent_mean.expand_as(test_z), test_z).item()

    @torch.inference_mode()
    def evaluate():
        """MSE(pi(o_t), z_t) on test frames."""
        with autocast:
            z = [policy(torch.from_numpy(test_frames[t]).to(device)).cpu() for t in np.array_split(test_t, -(-len(test_t) // 512))]
        return F.mse_loss(torch.cat(z), test_z).item()

    meta = {
        "stage": "lapo_bc", "env_id": args.env_id, "num_levels": data_meta["num_levels"], "start_level": data_meta["start_level"],
        "demonstrator": data_meta.get("demonstrator"), "data_dir": str(data_dir), "args": asdict(args), "pretrain_args": pretrain_args,
    }  # fmt: skip
    rng = np.random.default_rng(args.seed)
    curve = []
    progress = tqdm(range(args.num_updates), unit="update", desc="clone", mininterval=1)
    for update in progress:
        optimizer.param_groups[0]["lr"] = args.learning_rate * lr_factor(update)
        i = rng.integers(len(train_t), size=args.batch_size)
        with autocast:
            z = policy(torch.from_numpy(train_frames[train_t[i]]).to(device))
        loss = F.mse_loss(z, torch.from_numpy(train_z[i]).to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        step = update + 1
        if step % 50 == 0 or step == 1:
            forget_pages(train_frames)
            forget_pages(train_z)
            writer.add_scalar("losses/latent_mse", loss.item(), step)
            writer.add_scalar("charts/learning_rate", optimizer.param_groups[0]["lr"], step)
            writer.add_scalar("charts/SPS", (progress.format_dict["rate"] or 0) * args.batch_size, step)
        if step % args.eval_every == 0 or step == args.num_updates:
            test_mse = evaluate()
            writer.add_scalar("test/latent_mse", test_mse, step)
            writer.add_scalar("test/mean_latent_mse", mean_mse, step)
            curve.append({"update": step, "train/latent_mse": loss.item(), "test/latent_mse": test_mse, "test/mean_latent_mse": mean_mse})
            # the IDM travels along: decoding and fine-tuning label transitions with it
            states = {"policy": policy.state_dict(), "idm": idm.state_dict(), "latent_mean": latent_mean, "latent_std": latent_std}
            save_checkpoint(run_dir / "checkpoint.pt", {**meta, "updates": step}, **states)
            progress.set_postfix_str(f"test MSE {test_mse:.3g} (mean latent {mean_mse:.3g})")

    wall = time.time() - start_time
    results = {
        "stage": "lapo_bc", "env_id": args.env_id, "seed": args.seed, "updates": args.num_updates, "test/latent_mse": test_mse,
        "test/mean_latent_mse": mean_mse, "curve": curve, "samples_per_second": round(args.num_updates * args.batch_size / wall, 1),
        "wall_seconds": round(wall, 1), "device": str(device), "torch": torch.__version__,
        "command": "python " + " ".join(sys.argv), "args": asdict(args),
    }  # fmt: skip
    (run_dir / "results.json").write_text(json.dumps(results, indent=2))
    writer.close()
    print(f"latent MSE on test frames {test_mse:.3g}, predicting the mean latent {mean_mse:.3g}")
    print(f"wrote {run_dir}; next: python lapo_decode.py --env-id {args.env_id}, or python lapo_finetune_ppo.py --env-id {args.env_id}")
