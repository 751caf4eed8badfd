"""Where one network's output is another's input or target: how large it is, how many directions it has.

    python benchmark/scales.py --env-id maze --runs-dir runs/small --data-dir runs/small/data/maze

A row is a place, measured on test windows: its mean, the standard deviation over windows (median over
dimensions), the share of units that are ever above 0, the effective rank (lapo_bc.py explains it), and the
gradient of the loss there (root mean square over windows and dimensions; of parameters, beside Adam's epsilon
of 1e-8).
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lapo_bc import LatentPolicy, effective_rank, get_windows, load_checkpoint, load_dataset  # noqa: E402
from tools.loading import load_lapo, load_policy  # noqa: E402


@dataclass
class Args:
    env_id: str = "maze"  # the game
    seed: int = 1  # the seed of the runs
    runs_dir: str = "runs/small"  # where the runs of lapo_pretrain.py and lapo_bc.py lie
    data_dir: str | None = None  # the dataset; default data/ENV_ID
    pretrain_name: str = "lapo_pretrain"  # --exp-name of the pretraining
    bc_name: str | None = "lapo_bc"  # --exp-name of the cloning
    num_windows: int = 512  # test windows


def rms(x):
    return x.detach().float().square().mean().sqrt().item()


def print_row(name, x, gradient=None):
    """Prints what is known of values x (n, ...) and their gradient."""
    x = x.detach().float().flatten(1)
    mean = x.mean().item()
    deviation = x.std(0).median().item()
    alive = (x > 0).any(0).float().mean().item()
    cells = [f"{value:.2g}" for value in (mean, deviation, alive, effective_rank(x))]
    if gradient is None:
        cells.append("")
    else:
        cells.append(f"{gradient:.1e}")
    text = " | ".join(cells)
    print(f"| {name}, {x.shape[1]} | {text} |")


def measure_pretraining(lapo, windows):
    """Rows from frames to IDM, z, VQ and FDM; the latents z (n, latent_dim) before VQ."""
    n = len(windows)  # the loss is a mean over windows: a window's gradient is n times its row
    idm = lapo.idm
    conv = idm.network.conv(windows)  # (n, C)
    features = torch.relu(idm.network.fc(conv))  # (n, 256)
    z = idm.head(features)  # (n, latent_dim)
    quantised = z
    codes = "no VQ"
    if lapo.vq:
        quantised, _, index, _ = lapo.vq(z)  # index (n, N, H)
        codes = [len(used.unique()) for used in index.unbind(1)]
    for x in (conv, features, z, quantised):
        x.retain_grad()
    frames = windows[:, :6]
    target = windows[:, 6:]
    loss = F.mse_loss(lapo.fdm(frames, quantised), target)
    loss.backward()
    places = {
        "IDM: convolutions": conv,
        "IDM: features": features,
        "z, before VQ": z,
        "z, given to the FDM": quantised,
    }
    for name, x in places.items():
        print_row(name, x, n * rms(x.grad))

    first = lapo.fdm.down_convs[0]
    C = lapo.fdm.frame_channels
    patches = F.pixel_unshuffle(frames, lapo.fdm.patch_size)
    of_frames = F.conv2d(patches, first.weight[:, :C], padding=1)
    of_z = first.weight[:, C:].sum((2, 3))  # (width, latent_dim), inside the image
    print_row("FDM's first layer: from frames", of_frames)
    print_row("FDM's first layer: from z", quantised @ of_z.T)
    for name, network in (("IDM", idm), ("FDM", lapo.fdm)):
        gradients = [p.grad.flatten() for p in network.parameters()]
        gradients = torch.cat(gradients)
        print(f"| {name}: parameters, {len(gradients):,} | | | | | {rms(gradients):.1e} |")
    copying = F.mse_loss(windows[:, 3:6], target).item()
    return z, f"loss {loss.item():.3g}, of copying {copying:.3g}; codes in use {codes}"


@torch.no_grad()
def measure_cloning(cloned, obs, z):
    """Rows of the latent policy, and of what starts from it; obs (n, 64, 64, 3), z (n, latent_dim)."""
    policy = load_policy(cloned, "cpu")
    sizes = cloned["args"]["policy_scale"], z.shape[1], cloned["pretrain_args"]["patch_size"]
    fresh = LatentPolicy(*sizes)
    x = obs.permute(0, 3, 1, 2).float() / 255 - 0.5
    for name, network in (("fresh policy", fresh), ("cloned policy", policy)):
        conv = network.network.conv(x)
        print_row(f"{name}: convolutions", conv)
        print_row(f"{name}: features (RL's heads, VPT's last layer)", network.features(obs))
    fitted = (z - policy.mean) / policy.std
    played = (policy(obs) - policy.mean) / policy.std
    print_row("decoder's input when fitted: (z - mean) / std", fitted)
    print_row("decoder's input when it plays", played)


def main(args):
    runs = Path(args.runs_dir)
    path = runs / f"{args.env_id}__{args.pretrain_name}__{args.seed}" / "checkpoint.pt"
    pretrained = load_checkpoint(path, "lapo_pretrain", args.env_id)
    _, _, test = load_dataset(args)
    t = np.random.default_rng(0).permutation(test.windows)[: args.num_windows]
    lapo = load_lapo(pretrained, "cpu")
    print("| place, dimensions | mean | deviation | ever active | effective rank | gradient |")
    print("|---|---|---|---|---|---|")
    z, losses = measure_pretraining(lapo, get_windows(test, t, "cpu"))
    if args.bc_name:
        path = runs / f"{args.env_id}__{args.bc_name}__{args.seed}" / "checkpoint.pt"
        cloned = load_checkpoint(path, "lapo_bc", args.env_id)
        obs = torch.from_numpy(test[t])  # (n, 64, 64, 3) uint8
        measure_cloning(cloned, obs, z.detach())
    print(f"\n{losses}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
