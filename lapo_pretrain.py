# /// script
# requires-python = ">=3.10,<3.13"
# dependencies = ["torch==2.13.0", "procgen-mirror==0.10.7", "gym==0.26.2", "numpy<2", "tyro", "tensorboard", "tqdm", "pillow"]
# ///
"""LAPO, stage 2 of 5: learn latent actions from frames alone (paper section 4.1, figure 2).

    inverse dynamics model   z_t     = VQ(IDM(o_{t-1}, o_t, o_{t+1}))     sees the next frame, may pass on only z_t
    forward dynamics model   o^_{t+1} = FDM(o_{t-1}, o_t, z_t)            sees the past and z_t
    loss                     MSE(o^_{t+1}, o_{t+1}) + VQ commitment loss

z_t has to say what the past does not: what the demonstrator did. No action, reward or return is read for training. Where the
label files exist, a linear probe reports (on test windows, on detached latents) how well the true action can be read from the latent.

Reads data/ENV_ID (collect_expert_data.py), writes runs/ENV_ID__lapo_pretrain__SEED/checkpoint.pt.
    python lapo_pretrain.py --env-id bossfight
Next:
    python lapo_bc.py --env-id bossfight
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
from PIL import Image
from procgen.env import ENV_NAMES
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
    """run the networks' forward pass in bfloat16 (faster where the processor knows it; parameters, VQ and loss stay float32)"""
    track: bool = False
    """if toggled, this experiment is also tracked with Weights and Biases (`pip install wandb`)"""
    wandb_project_name: str = "lapo"
    """the wandb's project name"""
    wandb_entity: str | None = None
    """the entity (team) of wandb's project"""
    capture_video: bool = False
    """write a GIF of test frames (left) and their predictions (right) to the run folder"""
    runs_dir: str = "runs"
    """where run folders (TensorBoard logs, checkpoint.pt, results.json) are made"""
    overwrite: bool = False
    """replace a finished run of the same name"""

    env_id: str = "bossfight"
    """the Procgen game, one of the 16"""
    data_dir: str | None = None
    """the dataset of collect_expert_data.py; default data/ENV_ID"""

    num_updates: int = 50_000
    """gradient steps"""
    batch_size: int = 128
    """windows (o_{t-1}, o_t, o_{t+1}) per step"""
    learning_rate: float = 3e-4
    """Adam's peak learning rate: 0.1x to 1x over the warm-up, then linearly to 0.01x"""
    warmup_updates: int = 50
    """length of the warm-up"""
    max_grad_norm: float = 2.0
    """the maximum norm of the gradient"""

    idm_scale: float = 4.0
    """width of the IDM's IMPALA-CNN: 16, 32, 32 channels times this"""
    fdm_width: int = 24
    """base width of the FDM's U-Net"""
    predict_change: bool = False
    """the FDM predicts o_{t+1} - o_t, starting from zero, instead of o_{t+1} (not in the paper; saves learning to copy)"""
    vq: bool = True
    """quantise the latents (paper: yes; --no-vq is its ablation)"""
    vq_num_codebooks: int = 2
    """N, codebooks"""
    vq_num_slots: int = 4
    """H, code vectors that each codebook gives to a latent"""
    vq_dim: int = 16
    """D, dimensions of a code; the latent has N x H x D of them"""
    vq_num_codes: int = 64
    """K, codes per codebook"""
    vq_commitment: float = 0.05
    """weight of the VQ (commitment) loss"""
    vq_decay: float = 0.999
    """decay of the codebooks' moving averages"""

    eval_every: int = 1000
    """updates between evaluations on test windows (loss, probe, pictures) and checkpoints"""
    eval_windows: int = 2048
    """test windows in an evaluation; the probe is fitted on as many training windows"""


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


class VQ(nn.Module):
    """Vector quantisation with EMA codebooks (van den Oord et al. 2017, appendix A.1): N codebooks of K codes, each shared by H slots.

    Takes latents (B, N*H*D) and returns (straight-through quantised latents (B, N*H*D), commitment loss, code indices (B, N, H),
    perplexity of each codebook (N,)). The latent is laid out as (N*D, H): slot h of codebook n is column h of rows n*D .. n*D+D-1.
    The codebooks move in training mode only, and not by gradients. Computes in float32.
    """

    def __init__(self, num_codebooks, num_slots, dim, num_codes, commitment, decay, eps=1e-5):
        super().__init__()
        self.N, self.H, self.D, self.K = num_codebooks, num_slots, dim, num_codes
        self.commitment, self.decay, self.eps = commitment, decay, eps
        codes = (torch.rand(num_codebooks, num_codes, dim) * 2 - 1) * 5 / num_codes
        self.register_buffer("codes", codes)  # (N, K, D)
        self.register_buffer("ema_count", torch.ones(num_codebooks, num_codes))
        self.register_buffer("ema_sum", codes.clone())

    def forward(self, z):
        z = z.float()
        x = z.view(-1, self.N, self.D, self.H).permute(1, 0, 3, 2).flatten(1, 2)  # (N, B*H, D)
        distance = x.pow(2).sum(-1, keepdim=True) - 2 * x @ self.codes.mT + self.codes.pow(2).sum(-1).unsqueeze(1)  # (N, B*H, K)
        index = distance.argmin(-1)  # (N, B*H)
        quantised = self.codes.gather(1, index.unsqueeze(-1).expand(-1, -1, self.D))  # (N, B*H, D)
        onehot = F.one_hot(index, self.K).float()  # (N, B*H, K)
        if self.training:
            with torch.no_grad():
                self.ema_count.lerp_(onehot.sum(1), 1 - self.decay)
                self.ema_sum.lerp_(onehot.mT @ x, 1 - self.decay)
                total = self.ema_count.sum(-1, keepdim=True)
                count = (self.ema_count + self.eps) / (total + self.K * self.eps) * total  # Laplace smoothing
                self.codes.copy_(self.ema_sum / count.unsqueeze(-1))
        usage = onehot.mean(1)
        perplexity = torch.exp(-(usage * (usage + 1e-10).log()).sum(-1))
        quantised = quantised.view(self.N, -1, self.H, self.D).permute(1, 0, 3, 2).reshape(z.shape)
        loss = self.commitment * F.mse_loss(z, quantised)
        return z + (quantised - z).detach(), loss, index.view(self.N, -1, self.H).transpose(0, 1), perplexity


class FDM(nn.Module):
    """Forward dynamics model, a U-Net: frames (B, 6, 64, 64) o_{t-1}, o_t and latents (B, latent_dim) -> o^_{t+1} (B, 3, 64, 64)."""

    def __init__(self, latent_dim, width, predict_change=False):
        super().__init__()
        b, self.predict_change = width, predict_change
        down, up = [b, 2 * b, 4 * b, 8 * b, 16 * b], [16 * b, 8 * b, 4 * b, 2 * b, b, b]
        self.down_convs = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1) for i, o in zip([6 + latent_dim] + down[:-1], down))
        self.down_blocks = nn.ModuleList(nn.Sequential(nn.BatchNorm2d(o), ResidualBlock(o, o // 2), nn.MaxPool2d(2), nn.ReLU()) for o in down)
        self.bottleneck = nn.Conv2d(16 * b, 32 * b, kernel_size=2)  # 2x2 -> 1x1
        up_inputs = [32 * b + latent_dim] + [2 * w for w in down[::-1]]
        self.up_blocks = nn.ModuleList(
            nn.Sequential(nn.ConvTranspose2d(i, o, kernel_size=2, stride=2), nn.BatchNorm2d(o), ResidualBlock(o, o // 2), nn.ReLU())
            for i, o in zip(up_inputs, up)
        )
        self.head = nn.Sequential(nn.Conv2d(b + 6, b, 3, padding=1), ResidualBlock(b, b // 2), nn.ReLU(), nn.Conv2d(b, 3, 1))
        if predict_change:
            nn.init.zeros_(self.head[-1].weight)
            nn.init.zeros_(self.head[-1].bias)

    def first_conv(self, frames, z):
        """down_convs[0] on frames with z broadcast over the image as further channels: the same numbers, without the image of z.

        A convolution of a constant map has nine distinct values (corners, edges, inside), so z is convolved on a 3x3 map and stretched.
        """
        conv, n = self.down_convs[0], frames.shape[-1] - 2
        m = F.conv2d(z[:, :, None, None].expand(-1, -1, 3, 3), conv.weight[:, 6:], conv.bias, padding=1)  # (B, b, 3, 3)
        m = torch.cat([m[..., :1], m[..., 1:2].expand(-1, -1, -1, n), m[..., 2:]], dim=3)
        m = torch.cat([m[:, :, :1], m[:, :, 1:2].expand(-1, -1, n, -1), m[:, :, 2:]], dim=2)  # (B, b, 64, 64)
        return F.conv2d(frames, conv.weight[:, :6], padding=1) + m

    def forward(self, frames, z):
        skips = []
        x = self.down_blocks[0](self.first_conv(frames, z))
        for conv, block in zip(self.down_convs[1:], self.down_blocks[1:]):
            skips.append(x)
            x = block(conv(x))
        skips.append(x)
        skips.append(z[:, :, None, None].to(x.dtype))
        x = torch.relu(self.bottleneck(x))
        for block in self.up_blocks:
            x = block(torch.cat([x, skips.pop()], dim=1))
        x = self.head(torch.cat([x, frames.to(x.dtype)], dim=1)).float()
        return frames[:, 3:] + x if self.predict_change else torch.tanh(x) / 2


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


def predict(idm, vq, fdm, windows, autocast):
    """Windows (B, 9, 64, 64) -> prediction o^_{t+1} (B, 3, 64, 64), VQ loss, continuous latent (B, latent_dim), codes, perplexities (N,).

    vq is None in the no-VQ ablation.
    """
    with autocast:
        z = idm(windows)
    with torch.autocast(windows.device.type, enabled=False):
        quantised, vq_loss, codes, perplexity = vq(z) if vq else (z, torch.zeros((), device=z.device), None, None)
    with autocast:
        return fdm(windows[:, :6], quantised), vq_loss, z, codes, perplexity


def linear_probe(z, actions, z_test, actions_test):
    """Balanced accuracy of reading the true action from the latent, by class-balanced ridge regression on one-hot actions, and chance."""
    mean, std = z.mean(0), z.std(0) + 1e-6
    x, x_test = (F.pad((a - mean) / std, (0, 1), value=1.0).double() for a in (z, z_test))
    onehot = F.one_hot(actions, 15).double()
    weight = (onehot / onehot.sum(0).clamp(min=1)).sum(1, keepdim=True)  # every class counts the same
    gram = x.mT @ (weight * x) + 1e-3 * torch.eye(x.shape[1], dtype=x.dtype)
    guess = (x_test @ torch.linalg.solve(gram, x.mT @ (weight * onehot))).argmax(-1)
    recalls = [(guess[actions_test == a] == a).double().mean() for a in actions_test.unique()]
    return float(torch.stack(recalls).mean()), 1 / len(recalls)


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    if args.env_id not in ENV_NAMES:
        sys.exit(f"error: --env-id {args.env_id} is not a Procgen game: choose one of {', '.join(ENV_NAMES)}")
    require(args, num_updates=1, batch_size=1, eval_every=1, eval_windows=1)
    data_dir = Path(args.data_dir or f"data/{args.env_id}")
    run_dir = Path(args.runs_dir) / f"{args.env_id}__{args.exp_name}__{args.seed}"
    if (run_dir / "results.json").exists() and not args.overwrite:
        sys.exit(f"error: {run_dir} already holds a finished run: add --overwrite to replace it, or choose another --exp-name or --seed")
    data_meta = load_meta(data_dir, args.env_id)
    train_frames, train_t = load_frames(data_dir, "train", data_meta)
    test_frames, test_t = load_frames(data_dir, "test", data_meta)
    for split, t in (("train", train_t), ("test", test_t)):
        if len(t) < args.batch_size:
            sys.exit(f"error: --batch-size {args.batch_size} exceeds the {len(t)} {split} windows of {data_dir}: lower it or collect more frames")
    labels = {}  # for the probe only
    for split in ("train", "test"):
        if (data_dir / split / "actions.npy").exists():
            labels[split] = load_array(data_dir, split, "actions", (data_meta["splits"][split]["num_frames"],), np.int8)

    writer = make_writer(run_dir, args)

    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    device = torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.bf16)
    start_time = time.time()

    latent_dim = args.vq_num_codebooks * args.vq_num_slots * args.vq_dim
    idm = IDM(args.idm_scale, latent_dim).to(device).to(memory_format=torch.channels_last)
    vq = VQ(args.vq_num_codebooks, args.vq_num_slots, args.vq_dim, args.vq_num_codes, args.vq_commitment, args.vq_decay).to(device)
    fdm = FDM(latent_dim, args.fdm_width, args.predict_change).to(device).to(memory_format=torch.channels_last)
    networks = (idm, vq if args.vq else None, fdm)
    params = [*idm.parameters(), *fdm.parameters()]
    optimizer = optim.Adam(params, lr=args.learning_rate, fused=True)

    def lr_factor(update):
        if update < args.warmup_updates:
            return 0.1 + 0.9 * update / args.warmup_updates
        return 1 - 0.99 * (update - args.warmup_updates) / max(1, args.num_updates - args.warmup_updates)

    eval_rng = np.random.default_rng(0)
    eval_t = {s: np.sort(eval_rng.permutation(t)[: args.eval_windows]) for s, t in (("train", train_t), ("test", test_t))}
    # for the pictures: the test windows that change most, where there is something to predict
    change = np.array([np.abs(test_frames[t + 1].astype(np.int16) - test_frames[t]).mean() for t in eval_t["test"]])
    picture_t = eval_t["test"][np.argsort(-change, kind="stable")][:: max(1, len(change) // 48)][:12]  # spread over the upper quarter

    @torch.no_grad()
    def evaluate():
        """Losses on test windows beside copying the last frame, the probe where labels exist, and a strip of predictions."""
        for module in (idm, vq, fdm):
            module.eval()
        out, z = {}, {}
        for split, frames in (("test", test_frames), ("train", train_frames)):
            if split == "train" and len(labels) < 2:
                break  # training windows serve the probe only
            fdm_loss, copy_loss, latents = [], [], []
            for t in np.array_split(eval_t[split], max(1, len(eval_t[split]) // args.batch_size)):
                windows = get_windows(frames, t, device)
                if split == "train":
                    with autocast:
                        latents.append(idm(windows))
                    continue
                prediction, _, latent, _, _ = predict(*networks, windows, autocast)
                latents.append(latent)
                fdm_loss.append(F.mse_loss(prediction, windows[:, 6:]).item() * len(t))
                copy_loss.append(F.mse_loss(windows[:, 3:6], windows[:, 6:]).item() * len(t))
            z[split] = torch.cat(latents).cpu()
            if split == "test":
                out = {"test/fdm_loss": sum(fdm_loss) / len(z[split]), "test/copy_last_frame_loss": sum(copy_loss) / len(z[split])}
        if len(labels) == 2:
            a = {s: torch.from_numpy(labels[s][eval_t[s]].astype(np.int64)) for s in labels}
            out["probe/balanced_accuracy"], out["probe/chance"] = linear_probe(z["train"], a["train"], z["test"], a["test"])
        windows = get_windows(test_frames, picture_t, device)
        prediction = predict(*networks, windows, autocast)[0]
        rows = [windows[:, 3:6], windows[:, 6:], prediction, (prediction - windows[:, 6:]).abs() * 2 - 0.5]  # o_t, o_{t+1}, o^_{t+1}, 2 |error|
        rows = [F.pad(row.clamp(-0.5, 0.5), (1, 1, 1, 1), value=0.5) for row in rows]  # a white frame around each
        strip = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)  # (3, 4 * 66, 12 * 66)
        for module in (idm, vq, fdm):
            module.train()
        return out, ((strip + 0.5) * 255).byte().cpu(), z["test"]

    meta = {
        "stage": "lapo_pretrain", "env_id": args.env_id, "num_levels": data_meta["num_levels"], "start_level": data_meta["start_level"],
        "data_dir": str(data_dir), "args": asdict(args),
    }  # fmt: skip
    rng = np.random.default_rng(args.seed)
    curve = []
    progress = tqdm(range(args.num_updates), unit="update", desc="pretrain", mininterval=1)
    for update in progress:
        optimizer.param_groups[0]["lr"] = args.learning_rate * lr_factor(update)
        windows = get_windows(train_frames, train_t[rng.integers(len(train_t), size=args.batch_size)], device)
        prediction, vq_loss, z, _, perplexity = predict(*networks, windows, autocast)
        fdm_loss = F.mse_loss(prediction, windows[:, 6:])
        loss = fdm_loss + vq_loss
        optimizer.zero_grad()
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(params, args.max_grad_norm)
        optimizer.step()

        step = update + 1
        if step % 50 == 0 or step == 1:
            forget_pages(train_frames)
            writer.add_scalar("losses/fdm_loss", fdm_loss.item(), step)
            writer.add_scalar("losses/copy_last_frame_loss", F.mse_loss(windows[:, 3:6], windows[:, 6:]).item(), step)
            writer.add_scalar("losses/vq_loss", vq_loss.item(), step)
            writer.add_scalar("losses/grad_norm", grad_norm.item(), step)
            for n, p in enumerate(perplexity.tolist() if args.vq else []):
                writer.add_scalar(f"codebook/perplexity_{n}", p, step)
            writer.add_scalar("charts/learning_rate", optimizer.param_groups[0]["lr"], step)
            writer.add_scalar("charts/SPS", (progress.format_dict["rate"] or 0) * args.batch_size, step)
        if step % args.eval_every == 0 or step == args.num_updates:
            out, strip, z_test = evaluate()
            for name, value in out.items():
                writer.add_scalar(name, value, step)
            writer.add_image("predictions/o_t__o_t+1__prediction__error", strip, step)
            curve.append({"update": step, "train/fdm_loss": fdm_loss.item(), **out})
            if args.vq:
                curve[-1]["perplexity"] = perplexity.tolist()
            save_checkpoint(run_dir / "checkpoint.pt", {**meta, "updates": step}, idm=idm.state_dict(), vq=vq.state_dict(), fdm=fdm.state_dict())
            shown = {k.split("/")[1]: f"{v:.2e}" if "loss" in k else f"{v:.2f}" for k, v in out.items()}
            progress.set_postfix(shown)

    # what a report needs: the strip, and test latents in order of eval_t["test"]
    Image.fromarray(strip.permute(1, 2, 0).numpy()).save(run_dir / "predictions.png")
    np.save(run_dir / "test_latents.npy", z_test.numpy())
    np.save(run_dir / "test_windows.npy", eval_t["test"])
    if args.capture_video:
        films = []
        for module in (idm, vq, fdm):
            module.eval()
        for t in np.array_split(test_t[:256], 8):  # the first env's frames, in order
            with torch.no_grad():
                windows = get_windows(test_frames, t, device)
                both = torch.cat([windows[:, 6:], predict(*networks, windows, autocast)[0].clamp(-0.5, 0.5)], dim=3)  # (B, 3, 64, 128)
            films.append(((both + 0.5) * 255).byte().cpu().permute(0, 2, 3, 1).numpy())
        film = [Image.fromarray(frame).resize((384, 192), Image.NEAREST) for frame in np.concatenate(films)]
        film[0].save(run_dir / "predictions.gif", save_all=True, append_images=film[1:], duration=1000 // 15, loop=0)
    wall = time.time() - start_time
    results = {
        "stage": "lapo_pretrain", "env_id": args.env_id, "seed": args.seed, "updates": args.num_updates, **out, "curve": curve,
        "samples_per_second": round(args.num_updates * args.batch_size / wall, 1), "wall_seconds": round(wall, 1), "device": str(device),
        "torch": torch.__version__, "command": "python " + " ".join(sys.argv), "args": asdict(args),
    }  # fmt: skip
    (run_dir / "results.json").write_text(json.dumps(results, indent=2))
    writer.close()
    print(f"FDM loss on test frames {out['test/fdm_loss']:.2e}, copying the last frame {out['test/copy_last_frame_loss']:.2e}")
    print(f"wrote {run_dir}; next: python lapo_bc.py --env-id {args.env_id}")
