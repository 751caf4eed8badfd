"""LAPO, stage 2: learn latent actions from frames alone (paper section 4.1, figure 2).

    inverse dynamics model   z_t      = VQ(IDM(o_{t-1}, o_t, o_{t+1}))   sees the next frame, passes on z_t
    forward dynamics model   o^_{t+1} = FDM(o_{t-1}, o_t, z_t)           sees the past and z_t
    loss                     MSE(o^_{t+1}, o_{t+1}) + VQ commitment loss

z_t has to say what the past does not: what the demonstrator did. No action or reward is read for training;
where label files exist, a linear probe on test windows shows how well latents tell the action.

    python lapo_pretrain.py --env-id bossfight                                             # the paper's scale
    torchrun --standalone --nproc_per_node=8 lapo_pretrain.py --env-id bossfight   # 8 GPUs
    python lapo_pretrain.py --env-id coinrun --num-updates 500 --idm-scale 1               # toy
Reads data/ENV_ID, writes RUNS_DIR/ENV_ID__lapo_pretrain__SEED/checkpoint.pt.
"""

import atexit
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import tyro
from filelock import FileLock
from sklearn.linear_model import RidgeClassifier
from sklearn.metrics import balanced_accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.utils.benchmark import Timer
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

FORMAT_VERSION = 5  # of checkpoints
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
tqdm = partial(tqdm, disable=RANK > 0)  # one bar, rank 0's


@dataclass
class Args:
    # what
    env_id: str = "bossfight"  # a Procgen game, a gymnasium world, or the name of your own videos
    exp_name: str = Path(__file__).stem  # the run folder is RUNS_DIR/ENV_ID__EXP_NAME__SEED
    seed: int = 1  # seed of the experiment
    # data
    data_dir: str | None = None  # the dataset, one folder or A:B:C; default data/ENV_ID
    # method
    idm_scale: float = 4.0  # width of the IDM's IMPALA-CNN: 16, 32, 32 channels times this
    idm_differences: bool = False  # the IDM sees frames' differences, in training shifted (not in the paper)
    fdm_width: int = 24  # base width of the FDM's U-Net
    patch_size: Literal[1, 2, 4] = 1  # P: patches of P x P pixels are folded into channels (not in the paper)
    predict_change: bool = False  # the FDM predicts o_{t+1} - o_t, from 0 on (not in the paper)
    vq: bool = True  # quantise the latents; --no-vq is the paper's ablation
    vq_num_codebooks: int = 2  # N, codebooks
    vq_num_slots: int = 4  # H, codes that each codebook gives to a latent
    vq_dim: int = 16  # D, dimensions of a code; the latent has N x H x D of them
    vq_num_codes: int = 64  # K, codes in a codebook
    vq_commitment: float = 0.05  # weight of the VQ (commitment) loss
    vq_decay: float = 0.999  # decay of the codebooks' moving averages
    # optimisation
    num_updates: int = 50_000  # gradient steps
    batch_size: int = 128  # windows (o_{t-1}, o_t, o_{t+1}) per step
    learning_rate: float = 3e-4  # Adam's peak rate: from 0.1x to 1x over the warm-up, then linearly to 0.01x
    warmup_updates: int = 50  # length of the warm-up
    max_grad_norm: float = 2.0  # the maximum norm of the gradient
    sync_batch_norm: bool = False  # batch statistics over all processes' GPUs, not over each one's share
    eval_every: int = 1000  # updates between evaluations on test windows
    eval_windows: int = 2048  # test windows in an evaluation
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


class VQ(nn.Module):
    """Vector quantisation with EMA codebooks (van den Oord et al. 2017, appendix A.1), in float32.

    N codebooks of K codes, each shared by H slots. Latents (B, N*H*D) -> straight-through quantised latents,
    commitment loss, indices of codes (B, N, H), perplexity of each codebook (N,). A latent is laid out as
    (N*D, H): slot h of codebook n is column h of rows n*D .. n*D+D-1. Codes move in training mode only.
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
        distance = x.pow(2).sum(-1, keepdim=True) - 2 * x @ self.codes.mT
        distance = distance + self.codes.pow(2).sum(-1).unsqueeze(1)  # squared, (N, B*H, K)
        index = distance.argmin(-1)  # (N, B*H)
        quantised = self.codes.gather(1, index.unsqueeze(-1).expand(-1, -1, self.D))  # (N, B*H, D)
        onehot = F.one_hot(index, self.K).float()  # (N, B*H, K)
        if self.training:
            with torch.no_grad():
                sums = torch.cat([onehot.sum(1).unsqueeze(-1), onehot.mT @ x], dim=-1)  # (N, K, 1 + D)
                if WORLD_SIZE > 1:  # over all processes: codebooks stay the same on all of them
                    dist.all_reduce(sums)
                self.ema_count.lerp_(sums[..., 0], 1 - self.decay)
                self.ema_sum.lerp_(sums[..., 1:], 1 - self.decay)
                total = self.ema_count.sum(-1, keepdim=True)
                count = (self.ema_count + self.eps) / (total + self.K * self.eps) * total  # Laplace smoothing
                self.codes.copy_(self.ema_sum / count.unsqueeze(-1))
        usage = onehot.mean(1)
        perplexity = torch.exp(-(usage * (usage + 1e-10).log()).sum(-1))
        quantised = quantised.view(self.N, -1, self.H, self.D).permute(1, 0, 3, 2).reshape(z.shape)
        loss = self.commitment * F.mse_loss(z, quantised)
        return z + (quantised - z).detach(), loss, index.view(self.N, -1, self.H).transpose(0, 1), perplexity


class FDM(nn.Module):
    """Forward dynamics model, a U-Net: o_{t-1}, o_t (B, 6, 64, 64), z (B, latent_dim) -> (B, 3, 64, 64).

    z is joined to the frames before the first layer, and once more at the bottleneck. patch_size P (1 in the
    paper) folds patches of P x P pixels into channels, C = 6 * P^2: log2(P) levels fewer do.
    """

    def __init__(self, latent_dim, width, predict_change=False, patch_size=1):
        super().__init__()
        b, self.C, self.P, self.predict_change = width, 6 * patch_size**2, patch_size, predict_change
        down = [b, 2 * b, 4 * b, 8 * b, 16 * b][: 6 - patch_size.bit_length()]
        up, top = [*down[::-1], b], down[-1]

        def conv(i, o):
            return nn.Conv2d(i, o, kernel_size=3, padding=1)

        def block(o):
            return nn.BatchNorm2d(o), ResidualBlock(o, o // 2)

        self.down_convs = nn.ModuleList(map(conv, [self.C + latent_dim, *down], down))
        self.down_blocks = nn.ModuleList(nn.Sequential(*block(o), nn.MaxPool2d(2), nn.ReLU()) for o in down)
        self.bottleneck = nn.Conv2d(top, 2 * top, kernel_size=2)  # 2x2 -> 1x1, no activation after it
        self.up_blocks = nn.ModuleList(
            nn.Sequential(nn.ConvTranspose2d(i, o, kernel_size=2, stride=2), *block(o), nn.ReLU())
            for i, o in zip([2 * top + latent_dim, *(2 * w for w in down[::-1])], up)
        )
        self.head = nn.Sequential(
            conv(b + self.C, b), ResidualBlock(b, b // 2), nn.ReLU(), nn.Conv2d(b, self.C // 2, kernel_size=1)
        )
        if predict_change:
            nn.init.zeros_(self.head[-1].weight)
            nn.init.zeros_(self.head[-1].bias)

    def first_conv(self, frames, z):
        """down_convs[0] on the frames and, as further channels, z broadcast over the image.

        Most of a constant map's convolution is alike: z is convolved on a 3x3 map, which is then stretched.
        """
        conv, n = self.down_convs[0], frames.shape[-1] - 2
        m = z[:, :, None, None].expand(-1, -1, 3, 3)
        m = F.conv2d(m, conv.weight[:, self.C :], conv.bias, padding=1)  # (B, b, 3, 3)
        m = torch.cat([m[..., :1], m[..., 1:2].expand(-1, -1, -1, n), m[..., 2:]], dim=3)
        m = torch.cat([m[:, :, :1], m[:, :, 1:2].expand(-1, -1, n, -1), m[:, :, 2:]], dim=2)
        return F.conv2d(frames, conv.weight[:, : self.C], padding=1) + m  # (B, b, 64 / P, 64 / P)

    def forward(self, frames, z):
        patches, skips = F.pixel_unshuffle(frames, self.P), []  # (B, C, 64 / P, 64 / P)
        x = self.down_blocks[0](self.first_conv(patches, z))
        for conv, block in zip(self.down_convs[1:], self.down_blocks[1:]):
            skips.append(x)
            x = block(conv(x))
        skips += [x, z[:, :, None, None].to(x.dtype)]
        x = self.bottleneck(x)  # (B, 32 * b, 1, 1)
        for block in self.up_blocks:
            x = block(torch.cat([x, skips.pop()], dim=1))  # the first joins z
        x = F.pixel_shuffle(self.head(torch.cat([x, patches.to(x.dtype)], dim=1)).float(), self.P)
        return frames[:, 3:] + x if self.predict_change else torch.tanh(x) / 2


def shift(windows, step):
    """Rolls each window (B, 9, 64, 64) by random multiples of `step` pixels, its frames alike."""
    shifts = step * torch.randint(64 // step, (len(windows), 2))
    rolled = [torch.roll(window, by, (1, 2)) for window, by in zip(windows, shifts.tolist())]
    return torch.stack(rolled).contiguous(memory_format=torch.channels_last)


def predict(idm, vq, fdm, windows, order=slice(None)):
    """Windows (B, 9, 64, 64) -> o^_{t+1} (B, 3, 64, 64), VQ loss, z before VQ (B, D), perplexity (N,).

    Without VQ (vq is None, the paper's ablation) the FDM is given the continuous latents. An IDM of
    differences is trained on shifted windows, the FDM not: so latents cannot say where (not in the paper).
    order (B,) gives the FDM other windows' latents, to measure what their own are worth.
    """
    z = idm(shift(windows, 8 * fdm.P) if idm.differences and idm.training else windows)
    quantised, vq_loss, perplexity = z, torch.zeros((), device=z.device), torch.zeros(0)
    if vq:
        with torch.autocast(windows.device.type, enabled=False):  # VQ computes in float32
            quantised, vq_loss, _, perplexity = vq(z)
    return fdm(windows[:, :6], quantised[order]), vq_loss, z, perplexity


def linear_probe(z, actions):
    """Balanced accuracy of ridge regression from latents (n, latent_dim) to true actions (n,), as in LAOM.

    Fitted on the first half of those that have one (not -1), scored on the second; chance is 1 / number of
    actions. For monitoring alone.
    """
    z, actions = z[actions >= 0], actions[actions >= 0]
    half, probe = len(z) // 2, make_pipeline(StandardScaler(), RidgeClassifier(class_weight="balanced"))
    guess = probe.fit(z[:half], actions[:half]).predict(z[half:])
    with warnings.catch_warnings(action="ignore"):  # guesses of actions that do not occur in the second half
        return balanced_accuracy_score(actions[half:], guess)


def others(episode):
    """For windows in order, of episodes (n,), others of the same episode, half of it away: indices (n,)."""
    order = np.arange(len(episode))
    for e in np.unique(episode):
        mine = np.flatnonzero(episode == e)
        order[mine] = np.roll(mine, len(mine) // 2)
    return order


@torch.no_grad()
def measure(idm, vq, fdm, frames, t, episode, device, autocast):
    """Metrics of windows t (n,) of episodes (n,): losses, the share of the IDM's last units that are active.

    other_latent_cost: the share by which another latent of the same episode raises the loss. And all latents.
    """
    sums, z = np.zeros(4), []
    for i in np.split(np.arange(len(t)), range(512, len(t), 512)):
        windows = get_windows(frames, t[i], device)
        with autocast:
            prediction, _, latents, _ = predict(idm, vq, fdm, windows)
            other = predict(idm, vq, fdm, windows, others(episode[i]))[0]
            active = (idm.network.conv(idm.see(windows)) > 0).float().mean()  # 0: dead, latents all the same
        losses = [F.mse_loss(guess, windows[:, 6:]) for guess in (prediction, windows[:, 3:6], other)]
        sums += len(i) / len(t) * np.array([*map(torch.Tensor.item, losses), active.item()])
        z.append(latents.cpu().numpy())
    names = "fdm_loss", "copy_last_frame_loss", "other_latent_cost", "idm_active_share"
    sums[2] = sums[2] / sums[0] - 1
    return {f"test/{name}": x for name, x in zip(names, sums.tolist())}, np.concatenate(z)


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
    if min(args.num_updates, args.batch_size, args.eval_every, args.eval_windows // 2) < 1:
        sys.exit("error: --num-updates, --batch-size and --eval-every start at 1, --eval-windows at 2")
    if args.sync_batch_norm and not (args.cuda and torch.cuda.is_available()):
        sys.exit("error: --sync-batch-norm needs GPUs, and here is none: leave it out")
    if args.batch_size % WORLD_SIZE:
        sys.exit(f"error: --batch-size {args.batch_size} is no multiple of the {WORLD_SIZE} processes")
    data, frames, windows = load_dataset(args)
    run = Run(args, inputs=[data.get("identity")])
    run.meta["data"] = data
    device = (torch.accelerator.current_accelerator(True) if args.cuda else None) or torch.device("cpu")

    # networks
    torch.manual_seed(args.seed)
    latent_dim = args.vq_num_codebooks * args.vq_num_slots * args.vq_dim
    idm = IDM(args.idm_scale, latent_dim, args.patch_size, args.idm_differences)
    idm = idm.to(device, memory_format=torch.channels_last)
    vq_sizes = args.vq_num_codebooks, args.vq_num_slots, args.vq_dim, args.vq_num_codes
    vq = VQ(*vq_sizes, args.vq_commitment, args.vq_decay).to(device)
    fdm = FDM(latent_dim, args.fdm_width, args.predict_change, args.patch_size)
    fdm = nn.SyncBatchNorm.convert_sync_batchnorm(fdm) if args.sync_batch_norm else fdm
    fdm = fdm.to(device, memory_format=torch.channels_last)
    networks, modules = (idm, vq if args.vq else None, fdm), nn.ModuleList([idm, vq, fdm])
    params = [*idm.parameters(), *fdm.parameters()]  # codebooks move by themselves
    optimizer = torch.optim.Adam(params, lr=args.learning_rate, fused=True)
    state = run.restore(idm=idm, vq=vq, fdm=fdm, optimizer=optimizer)

    modules.eval()  # while it is timed, codes and batch normalisation's statistics stay
    few = get_windows(frames["train"], windows["train"][:16], device)
    autocast = choose_precision(args, device, lambda: predict(*networks, few)[0].square().mean().backward())
    modules.train()

    # the windows of all evaluations, and their labels, if there are any, for the probe alone
    t_test = np.sort(np.random.default_rng(0).permutation(windows["test"])[: args.eval_windows])
    episode = np.cumsum(frames["test"].labels("first"))[t_test]
    try:
        actions = frames["test"].labels("actions")[t_test]
    except OSError:
        actions = np.full(1, -1)

    done, curve = state.get("step", 0), state.get("curve", [])
    warmed_up = [0, args.warmup_updates, max(args.warmup_updates + 1, args.num_updates)]
    steps = tqdm(range(done + 1, args.num_updates + 1), "pretrain", args.num_updates, initial=done)
    for step in steps:
        lr = args.learning_rate * float(np.interp(step - 1, warmed_up, [0.1, 1.0, 0.01]))
        optimizer.param_groups[0]["lr"] = lr
        t = windows["train"][torch.randint(len(windows["train"]), (args.batch_size // WORLD_SIZE,))]
        batch = get_windows(frames["train"], t, device)  # o_{t-1}, o_t, o_{t+1}
        with autocast:
            prediction, vq_loss, _, perplexity = predict(*networks, batch)
        fdm_loss = F.mse_loss(prediction, batch[:, 6:])
        loss = fdm_loss + vq_loss
        optimizer.zero_grad()
        loss.backward()
        loss = average(loss, params)
        grad_norm = nn.utils.clip_grad_norm_(params, args.max_grad_norm)
        if not torch.isfinite(loss + grad_norm):
            sys.exit(f"error: loss {loss.item()} at update {step}: lower --learning-rate, or try --no-bf16")
        optimizer.step()

        if RANK == 0 and (step % 50 == 0 or step == 1):
            losses = {"fdm_loss": fdm_loss, "vq_loss": vq_loss, "grad_norm": grad_norm}
            losses["copy_last_frame_loss"] = F.mse_loss(batch[:, 3:6], batch[:, 6:])  # what the FDM must beat
            for name, value in losses.items():
                run.writer.add_scalar(f"losses/{name}", value.item(), step)
            for n, value in enumerate(perplexity.tolist()):
                run.writer.add_scalar(f"codebook/perplexity_{n}", value, step)
            run.writer.add_scalar("charts/learning_rate", lr, step)
            run.writer.add_scalar("charts/SPS", step * args.batch_size / (time.time() - run.began), step)
        if RANK == 0 and (step % args.eval_every == 0 or step == args.num_updates):
            modules.eval()
            test, z = measure(*networks, frames["test"], t_test, episode, device, autocast)
            if (actions >= 0).sum() > 1:
                test["probe/balanced_accuracy"] = linear_probe(z, actions)
            modules.train()
            if test["test/idm_active_share"] == 0:  # its last ReLU is shut, no gradient will open it again
                sys.exit(f"error: the IDM is dead at update {step}: a lower --learning-rate may save it")
            for name, value in test.items():
                run.writer.add_scalar(name, value, step)
            curve.append({"update": step, "train/fdm_loss": fdm_loss.item(), **test})
            steps.set_postfix({name.split("/")[1]: f"{value:.3g}" for name, value in test.items()})
        if run.due() or step == args.num_updates:
            run.save(step, curve=curve)

    last = (curve or [{}])[-1]
    run.finish(**last, curve=curve)
    if (cost := last.get("test/other_latent_cost", 1)) < 0.2:
        print(f"The FDM has little use for latents yet (other_latent_cost {cost:.0%}): more updates may help")
    print(f"next: python lapo_bc.py --env-id {args.env_id} --runs-dir {args.runs_dir}; or lapo_inspect.py")
