"""LAPO, stage 2: learn latent actions from frames alone (paper section 4.1, figure 2).

    inverse dynamics model   z_t      = VQ(IDM(o_{t-1}, o_t, o_{t+1}))   sees the next frame, passes on z_t
    forward dynamics model   o^_{t+1} = FDM(o_{t-1}, o_t, z_t)           sees the past and z_t
    loss                     MSE(o^_{t+1}, o_{t+1}) + VQ commitment loss

z_t has to say what the past does not: what the demonstrator did. No action or reward is read for training;
where the dataset has actions, a linear probe on test windows shows how well latents tell them.

    python lapo_pretrain.py --env-id bossfight                                             # the paper's scale
    torchrun --standalone --nproc_per_node=8 lapo_pretrain.py --env-id bossfight           # 8 GPUs
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
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import tyro
from filelock import FileLock, Timeout
from sklearn.linear_model import RidgeClassifier
from sklearn.metrics import balanced_accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

FORMAT_VERSION = 5  # of checkpoints
SAVE_SECONDS = 60  # between the states from which an interrupted run goes on
# flags that are no arguments of the method
PLACES = "data_dir runs_dir overwrite cuda track wandb_project_name wandb_entity".split()
# progress: a bar in a terminal, a line a minute in a file
BAR = {} if sys.stderr.isatty() else {"mininterval": 60, "bar_format": "{l_bar}{r_bar}\n"}
RANK = int(os.environ.get("RANK", 0))  # torchrun sets both
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))


@dataclass
class Args:
    # what
    env_id: str = "bossfight"  # a Procgen game, a gymnasium world, or the name of your own videos
    exp_name: str = Path(__file__).stem  # the run folder is RUNS_DIR/ENV_ID__EXP_NAME__SEED
    seed: int = 1  # seed of the experiment
    # data
    data_dir: str | None = None  # the dataset; default data/ENV_ID
    # method
    idm_scale: float = 4.0  # width of the IDM's IMPALA-CNN: 16, 32, 32 channels times this
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
    batch_size: int = 128  # windows (o_{t-1}, o_t, o_{t+1}) per step, over all processes
    learning_rate: float = 3e-4  # Adam's peak rate: from 0.1x to 1x over the warm-up, then linearly to 0.01x
    warmup_updates: int = 50  # length of the warm-up
    max_grad_norm: float = 2.0  # the maximum norm of the gradient
    eval_every: int = 1000  # updates between evaluations on test windows
    eval_windows: int = 2048  # test windows in an evaluation
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


class IDM(nn.Module):
    """Inverse dynamics model: o_{t-1}, o_t, o_{t+1} (B, 9, 64, 64) -> continuous latent (B, latent_dim)."""

    def __init__(self, scale, latent_dim, patch_size=1):
        super().__init__()
        self.network = ImpalaCNN(9, scale, patch_size)
        self.head = nn.Linear(256, latent_dim)

    def forward(self, windows):
        return self.head(self.network(windows)).float()


class VQ(nn.Module):
    """Vector quantisation with EMA codebooks (van den Oord et al. 2017, appendix A.1), in float32.

    N codebooks of K codes, each shared by H slots. Latents (B, N*H*D) -> straight-through quantised latents,
    commitment loss, indices of codes (B, N, H), perplexity of each codebook (N,). A latent is laid out as
    (N*D, H): slot h of codebook n is column h of rows n*D .. n*D+D-1. Codes move in training mode only.
    """

    def __init__(self, num_codebooks, num_slots, dim, num_codes, commitment, decay):
        super().__init__()
        self.N = num_codebooks
        self.H = num_slots
        self.D = dim
        self.K = num_codes
        self.commitment = commitment
        self.decay = decay
        codes = (torch.rand(num_codebooks, num_codes, dim) * 2 - 1) * 5 / num_codes
        self.register_buffer("codes", codes)  # (N, K, D)
        self.register_buffer("ema_count", torch.ones(num_codebooks, num_codes))
        self.register_buffer("ema_sum", codes.clone())

    def forward(self, z):
        x = z.view(-1, self.N, self.D, self.H)
        x = x.permute(1, 0, 3, 2).flatten(1, 2)  # (N, B*H, D)
        # squared distance to every code
        norms = x.pow(2).sum(-1, keepdim=True)  # (N, B*H, 1)
        code_norms = self.codes.pow(2).sum(-1).unsqueeze(1)  # (N, 1, K)
        distance = norms - 2 * x @ self.codes.mT + code_norms  # (N, B*H, K)
        index = distance.argmin(-1)  # (N, B*H)
        quantised = self.codes.gather(1, index.unsqueeze(-1).expand(-1, -1, self.D))  # (N, B*H, D)
        onehot = F.one_hot(index, self.K).float()  # (N, B*H, K)
        if self.training:
            self.move_codes(x, onehot)
        usage = onehot.mean(1)  # (N, K)
        perplexity = torch.special.entr(usage).sum(-1).exp()
        quantised = quantised.view(self.N, -1, self.H, self.D)
        quantised = quantised.permute(1, 0, 3, 2).reshape(z.shape)  # (B, N*H*D)
        loss = self.commitment * F.mse_loss(z, quantised)
        straight_through = z + (quantised - z).detach()
        index = index.view(self.N, -1, self.H).transpose(0, 1)  # (B, N, H)
        return straight_through, loss, index, perplexity

    @torch.no_grad()
    def move_codes(self, x, onehot):
        """Moving averages of how often a code was used, and of the latents that used it."""
        count = onehot.sum(1)  # (N, K)
        total = onehot.mT @ x  # (N, K, D)
        if WORLD_SIZE > 1:  # over all processes: codebooks stay the same on all of them
            dist.all_reduce(count)
            dist.all_reduce(total)
        self.ema_count.lerp_(count, 1 - self.decay)
        self.ema_sum.lerp_(total, 1 - self.decay)
        n = self.ema_count.sum(-1, keepdim=True)
        smoothed = (self.ema_count + 1e-5) / (n + self.K * 1e-5) * n  # Laplace smoothing
        self.codes.copy_(self.ema_sum / smoothed.unsqueeze(-1))


class FDM(nn.Module):
    """Forward dynamics model, a U-Net: o_{t-1}, o_t (B, 6, 64, 64), z (B, latent_dim) -> (B, 3, 64, 64).

    z is joined to the frames before the first layer, and once more at the bottleneck. patch_size P (1 in the
    paper) folds patches of P x P pixels into channels, so that log2(P) levels fewer lead to 2x2.
    """

    def __init__(self, latent_dim, width, predict_change=False, patch_size=1):
        super().__init__()
        self.patch_size = patch_size
        self.predict_change = predict_change
        self.frame_channels = 6 * patch_size**2
        num_levels = {1: 5, 2: 4, 4: 3}[patch_size]
        widths = [width * 2**level for level in range(num_levels)]  # width .. 16 * width

        self.down_convs = nn.ModuleList()
        self.down_blocks = nn.ModuleList()
        channels = self.frame_channels + latent_dim
        for out in widths:
            self.down_convs.append(nn.Conv2d(channels, out, kernel_size=3, padding=1))
            block = [nn.BatchNorm2d(out), ResidualBlock(out, out // 2), nn.MaxPool2d(2), nn.ReLU()]
            self.down_blocks.append(nn.Sequential(*block))
            channels = out

        # 2x2 -> 1x1, no activation after it
        self.bottleneck = nn.Conv2d(channels, 2 * channels, kernel_size=2)

        self.up_blocks = nn.ModuleList()
        channels = 2 * channels
        skips = [latent_dim, *reversed(widths)]
        for skip, out in zip(skips, [*reversed(widths), width]):
            up = nn.ConvTranspose2d(channels + skip, out, kernel_size=2, stride=2)
            block = [up, nn.BatchNorm2d(out), ResidualBlock(out, out // 2), nn.ReLU()]
            self.up_blocks.append(nn.Sequential(*block))
            channels = out

        self.head = nn.Sequential(
            nn.Conv2d(width + self.frame_channels, width, kernel_size=3, padding=1),
            ResidualBlock(width, width // 2),
            nn.ReLU(),
            nn.Conv2d(width, self.frame_channels // 2, kernel_size=1),
        )
        if predict_change:
            nn.init.zeros_(self.head[-1].weight)
            nn.init.zeros_(self.head[-1].bias)

    def first_conv(self, frames, z):
        """down_convs[0] on the frames and, as further channels, z broadcast over the image.

        A 3x3 convolution of a constant map has nine different values: corners, edges, inside. So z is
        convolved on a 3x3 map, whose middle is then stretched: the same function at a fraction of the cost
        of what would be the U-Net's most expensive layer.
        """
        conv = self.down_convs[0]
        inside = frames.shape[-1] - 2
        z_map = z[:, :, None, None].expand(-1, -1, 3, 3)
        z_map = F.conv2d(z_map, conv.weight[:, self.frame_channels :], conv.bias, padding=1)
        left, middle, right = z_map.split(1, dim=3)  # of (B, width, 3, 3)
        z_map = torch.cat([left, middle.expand(-1, -1, -1, inside), right], dim=3)
        top, middle, bottom = z_map.split(1, dim=2)
        z_map = torch.cat([top, middle.expand(-1, -1, inside, -1), bottom], dim=2)
        return F.conv2d(frames, conv.weight[:, : self.frame_channels], padding=1) + z_map

    def forward(self, frames, z):
        patches = F.pixel_unshuffle(frames, self.patch_size)  # (B, 6 * P^2, 64 / P, 64 / P)
        x = self.down_blocks[0](self.first_conv(patches, z))
        skips = [x]
        for conv, block in zip(self.down_convs[1:], self.down_blocks[1:]):
            x = block(conv(x))
            skips.append(x)
        x = self.bottleneck(x)  # (B, 32 * width, 1, 1)
        skips.append(z[:, :, None, None].to(x.dtype))
        for block in self.up_blocks:
            x = block(torch.cat([x, skips.pop()], dim=1))
        x = self.head(torch.cat([x, patches.to(x.dtype)], dim=1)).float()
        x = F.pixel_shuffle(x, self.patch_size)  # (B, 3, 64, 64)
        if self.predict_change:
            return frames[:, 3:] + x
        return torch.tanh(x) / 2


class LAPO(nn.Module):
    """IDM, VQ and FDM: windows (B, 9, 64, 64) -> o^_{t+1} (B, 3, 64, 64), VQ loss, perplexity (N,)."""

    def __init__(self, idm, vq, fdm):
        super().__init__()
        self.idm = idm
        self.vq = vq
        self.fdm = fdm

    def encode(self, windows):
        """The latents before and after quantisation (B, latent_dim), VQ loss, perplexity (N,)."""
        z = self.idm(windows)
        if self.vq is None:  # the paper's ablation: the FDM is given the continuous latents
            return z, z, torch.zeros((), device=z.device), torch.zeros(0)
        with torch.autocast(z.device.type, enabled=False):  # VQ computes in float32
            quantised, vq_loss, _, perplexity = self.vq(z)
        return z, quantised, vq_loss, perplexity

    def forward(self, windows):
        _, quantised, vq_loss, perplexity = self.encode(windows)
        prediction = self.fdm(windows[:, :6], quantised)  # the future reaches it through z alone
        return prediction, vq_loss, perplexity


def get_windows(frames, t, device):
    """Windows around t (B,): o_{t-1}, o_t, o_{t+1} as (B, 9, 64, 64) in [-0.5, 0.5], channels-last."""
    triples = frames[t[:, None] + np.array([-1, 0, 1])]  # (B, 3, 64, 64, 3) uint8
    triples = torch.from_numpy(triples).to(device)
    windows = torch.cat(triples.unbind(1), dim=-1)  # (B, 64, 64, 9)
    return windows.permute(0, 3, 1, 2).float() / 255 - 0.5


def scheduled_rate(step, args):
    """Adam's rate at update `step`: from 0.1x to 1x over the warm-up, then linearly to 0.01x."""
    ends = [0, args.warmup_updates, max(args.warmup_updates + 1, args.num_updates)]
    return args.learning_rate * float(np.interp(step - 1, ends, [0.1, 1.0, 0.01]))


def main(args):
    device, autocast = start(args)
    data, train, test = load_dataset(args)
    folder, resumed = open_folder(args)
    began = time.time() - resumed.get("seconds", 0)

    # networks
    torch.manual_seed(args.seed)  # the same on all processes
    latent_dim = args.vq_num_codebooks * args.vq_num_slots * args.vq_dim
    idm = IDM(args.idm_scale, latent_dim, args.patch_size)
    vq = None
    if args.vq:
        vq_sizes = args.vq_num_codebooks, args.vq_num_slots, args.vq_dim, args.vq_num_codes
        vq = VQ(*vq_sizes, args.vq_commitment, args.vq_decay)
    fdm = FDM(latent_dim, args.fdm_width, args.predict_change, args.patch_size)
    lapo = LAPO(idm, vq, fdm).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(lapo.parameters(), lr=args.learning_rate, fused=True)

    if resumed:
        lapo.load_state_dict(resumed["lapo"])
        optimizer.load_state_dict(resumed["optimizer"])
    done = resumed.get("step", 0)
    curve = resumed.get("curve", [])
    model = lapo
    if WORLD_SIZE > 1:  # averages gradients; codebooks have their own all-reduce, batch statistics none
        model = DistributedDataParallel(lapo, forward_sync_buffers=False)
    if RANK == 0:
        writer = make_writer(args, folder, done)
    saved = time.time()
    updates = range(done + 1, args.num_updates + 1)
    progress = tqdm(updates, "pretrain", args.num_updates, initial=done, disable=RANK > 0, **BAR)
    for step in progress:
        # draws that depend on the step alone: a resumed run draws what an uninterrupted one does
        rng = np.random.default_rng([args.seed, step, RANK])
        t = rng.choice(train.windows, args.batch_size // WORLD_SIZE)
        windows = get_windows(train, t, device)  # (B, 9, 64, 64)

        with autocast:
            prediction, vq_loss, perplexity = model(windows)
        fdm_loss = F.mse_loss(prediction, windows[:, 6:])
        loss = fdm_loss + vq_loss
        optimizer.zero_grad()
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(lapo.parameters(), args.max_grad_norm)
        lr = scheduled_rate(step, args)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()

        if step % 50 == 0 or step == 1:
            check_finite(lapo, step)
            if RANK == 0:
                copy_last_frame_loss = F.mse_loss(windows[:, 3:6], windows[:, 6:])  # what the FDM must beat
                writer.add_scalar("losses/fdm_loss", fdm_loss.item(), step)
                writer.add_scalar("losses/vq_loss", vq_loss.item(), step)
                writer.add_scalar("losses/grad_norm", grad_norm.item(), step)
                writer.add_scalar("losses/copy_last_frame_loss", copy_last_frame_loss.item(), step)
                for n, value in enumerate(perplexity.tolist()):
                    writer.add_scalar(f"codebook/perplexity_{n}", value, step)
                writer.add_scalar("charts/learning_rate", lr, step)
                writer.add_scalar("charts/SPS", step * args.batch_size / (time.time() - began), step)
        if RANK == 0 and (step % args.eval_every == 0 or step == args.num_updates):
            check_finite(lapo, step)
            metrics = evaluate(lapo, test, args.eval_windows, device, autocast)
            for name, value in metrics.items():
                writer.add_scalar(name, value, step)
            writer.add_image("test/now_next_predicted", draw_predictions(lapo, test, device, autocast), step)
            curve.append({"update": step, "train/fdm_loss": fdm_loss.item(), **metrics})
            shown = {name.split("/")[1]: f"{value:.3g}" for name, value in metrics.items()}
            progress.set_postfix(shown, refresh=False)
            if metrics["test/idm_active_share"] == 0:  # no gradient will open its last ReLU again
                refuse(f"the IDM is dead at update {step}: a lower --learning-rate may save it")
        if RANK == 0 and time.time() - saved > SAVE_SECONDS:
            check_finite(lapo, step)
            state = {"lapo": lapo.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"step": step, "curve": curve, "seconds": time.time() - began}
            save(folder / "resume.pt", {**describe(args), **state})
            saved = time.time()

    check_finite(lapo, args.num_updates)
    if RANK == 0:
        writer.close()
        networks = {"idm": idm.state_dict(), "fdm": fdm.state_dict(), "data": data}
        if args.vq:
            networks["vq"] = vq.state_dict()
        finish(folder, args, time.time() - began, networks, {**curve[-1], "curve": curve})
        cost = curve[-1]["test/other_latent_cost"]
        if cost < 0.2:
            print(f"The FDM hardly uses latents yet (other_latent_cost {cost:.0%}): more updates may help")
        collapsed = [name for name, value in curve[-1].items() if "perplexity" in name and value < 2]
        if collapsed:
            print(f"Hardly more than one code in use ({', '.join(collapsed)}): try more slots, or --no-vq")
        print(f"next: python lapo_bc.py --env-id {args.env_id} --runs-dir {args.runs_dir}")
    if WORLD_SIZE > 1:
        del model  # first: freed after the process group, DDP can wait for its threads forever
        dist.destroy_process_group()


# ---- Data, evaluation, run-keeping: nobody has to read on ----


@torch.no_grad()
def evaluate(lapo, test, num_windows, device, autocast):
    """Metrics of test windows, networks in evaluation mode; docs/lapo_pretrain.md explains them."""
    some = np.random.default_rng(0).permutation(test.windows)[:num_windows]
    t = np.sort(some)
    episode = np.cumsum(test.first)[t]
    rows = []  # of each window, three losses and the share of active units
    latents = []
    perplexities = []
    lapo.eval()
    for i in np.split(np.arange(len(t)), range(512, len(t), 512)):
        windows = get_windows(test, t[i], device)
        frames = windows[:, :6]
        target = windows[:, 6:]
        with autocast:
            z, quantised, _, perplexity = lapo.encode(windows)
            prediction = lapo.fdm(frames, quantised)
            other = lapo.fdm(frames, quantised[other_windows(episode[i])])
            units = lapo.idm.network.conv(windows)
        guesses = prediction, windows[:, 3:6], other
        losses = [(guess - target).square().mean((1, 2, 3)) for guess in guesses]  # (B,) each
        active = (units > 0).float().mean(1)
        rows.append(torch.stack([*losses, active]))
        latents.append(z)
        perplexities.append(perplexity)
    lapo.train()
    fdm_loss, copy_loss, other_loss, active_share = torch.cat(rows, dim=1).mean(1).tolist()
    metrics = {
        "test/fdm_loss": fdm_loss,
        "test/copy_last_frame_loss": copy_loss,
        "test/other_latent_cost": other_loss / fdm_loss - 1,
        "test/idm_active_share": active_share,  # 0: dead, latents all the same
    }
    for n, codes in enumerate(torch.stack(perplexities).mean(0).tolist()):
        metrics[f"test/perplexity_{n}"] = codes  # of codebook n, 1: one code for all windows
    actions = load_labels(test, "actions")
    if actions is not None and (actions[t] >= 0).sum() > 1:
        z = torch.cat(latents).cpu().numpy()  # (n, latent_dim)
        metrics["probe/balanced_accuracy"] = linear_probe(z, actions[t])
    return metrics


@torch.no_grad()
def draw_predictions(lapo, test, device, autocast):
    """An image (3, 192, 64 n) of n = 8 test windows, a column each: o_t, o_{t+1}, o^_{t+1}."""
    t = np.random.default_rng(0).permutation(test.windows)[:8]
    windows = get_windows(test, t, device)
    lapo.eval()
    with autocast:
        prediction, _, _ = lapo(windows)
    lapo.train()
    now = windows[:, 3:6]
    following = windows[:, 6:]
    rows = torch.stack([now, following, prediction])  # (3, 8, 3, 64, 64)
    image = rows.permute(2, 0, 3, 1, 4)
    image = image.reshape(3, 192, -1) + 0.5
    return image.clamp(0, 1)


def other_windows(episode):
    """For windows in order, of episodes (n,), others of the same episode, half of it away: indices (n,)."""
    order = np.arange(len(episode))
    for e in np.unique(episode):
        mine = np.flatnonzero(episode == e)
        order[mine] = np.roll(mine, len(mine) // 2)
    return order


def linear_probe(z, actions):
    """Balanced accuracy of ridge regression from latents (n, latent_dim) to true actions (n,), as in LAOM.

    Fitted on the first half of those that have one (not -1), scored on the second; chance is 1 / number of
    actions. For monitoring alone.
    """
    z = z[actions >= 0]
    actions = actions[actions >= 0]
    half = len(z) // 2
    probe = make_pipeline(StandardScaler(), RidgeClassifier(class_weight="balanced"))
    probe.fit(z[:half], actions[:half])
    with warnings.catch_warnings(action="ignore"):  # guesses of actions that do not occur in the second half
        guess = probe.predict(z[half:])
        return float(balanced_accuracy_score(actions[half:], guess))


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


def refuse(sentence):
    """Ends the process, and says why; of several processes one says it."""
    if RANK == 0:
        tqdm.write(f"error: {sentence}", file=sys.stderr)  # clears the progress bar first
    sys.exit(1)


def start(args):
    """Joins torchrun's processes. Returns this process's device, and the autocast of its forward passes."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the process at once, without a traceback
    if min(args.num_updates, args.batch_size, args.eval_every, args.eval_windows // 2) < 1:
        refuse("--num-updates, --batch-size and --eval-every start at 1, --eval-windows at 2")
    if args.batch_size % WORLD_SIZE:
        refuse(f"--batch-size {args.batch_size} is no multiple of the {WORLD_SIZE} processes")
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
