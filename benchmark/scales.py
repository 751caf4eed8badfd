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
from lapo_inspect import build_networks  # noqa: E402


@dataclass
class Args:
    env_id: str = "maze"  # the game
    seed: int = 1  # the seed of the runs
    runs_dir: str = "runs/small"  # where the runs of lapo_pretrain.py and lapo_bc.py lie
    data_dir: str | None = None  # the dataset; default data/ENV_ID
    pretrain_name: str = "lapo_pretrain"  # --exp-name of the pretraining
    bc_name: str | None = "lapo_bc"  # --exp-name of the cloning
    num_windows: int = 512  # test windows
    allow_unfinished: bool = False  # take the checkpoint of an unfinished run, too


def rms(x):
    return x.detach().float().square().mean().sqrt().item()


def row(name, x, gradient=None):
    """Prints what is known of values x (n, ...) and their gradient."""
    x = x.detach().float().flatten(1)
    alive = (x > 0).any(0).float().mean().item()
    values = [x.mean().item(), x.std(0).median().item(), alive, effective_rank(x)]
    cells = [f"{value:.2g}" for value in values] + ["" if gradient is None else f"{gradient:.1e}"]
    print(f"| {name}, {x.shape[1]} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)

    def checkpoint(name, made_by, parts):
        path = f"{args.runs_dir}/{args.env_id}__{name}__{args.seed}/checkpoint.pt"
        return load_checkpoint(path, made_by, parts, args)

    pretrained = checkpoint(args.pretrain_name, "lapo_pretrain", ["idm", "vq", "fdm"])
    _, frames, windows = load_dataset(args)
    t = np.random.default_rng(0).permutation(windows["test"])[: args.num_windows]
    idm, vq, fdm = build_networks(pretrained["args"], torch.device("cpu"), pretrained)
    batch = get_windows(frames["test"], t, "cpu")
    print("| place, dimensions | mean | deviation | ever active | effective rank | gradient |")
    print("|---|---|---|---|---|---|")

    # pretraining: frames -> IDM -> z -> VQ -> FDM
    conv = idm.network.conv(idm.see(batch))  # (B, C)
    features = torch.relu(idm.network.fc(conv))  # (B, 256)
    z = idm.head(features)  # (B, latent_dim)
    quantised = vq(z)[0] if vq else z
    for x in (conv, features, z):
        x.retain_grad()
    if vq:
        quantised.retain_grad()
    prediction = fdm(batch[:, :6], quantised)
    loss = F.mse_loss(prediction, batch[:, 6:])
    loss.backward()
    n = len(t)  # the loss is a mean over windows: a window's gradient is n times its row
    row("IDM: convolutions", conv, rms(conv.grad) * n)
    row("IDM: features", features, rms(features.grad) * n)
    row("z, before VQ", z, rms(z.grad) * n)
    row("z, given to the FDM", quantised, rms(quantised.grad) * n if vq else None)
    first = fdm.down_convs[0]
    patches = F.pixel_unshuffle(batch[:, :6], fdm.P)
    row("FDM's first layer: from frames", F.conv2d(patches, first.weight[:, : fdm.C], padding=1))
    row("FDM's first layer: from z", quantised @ first.weight[:, fdm.C :].sum((2, 3)).T)
    for name, network in (("IDM", idm), ("FDM", fdm)):
        gradients = torch.cat([p.grad.flatten() for p in network.parameters()])
        print(f"| {name}: parameters, {len(gradients):,} | | | | | {rms(gradients):.1e} |")
    change = (batch[:, 6:] - batch[:, 3:6]).square().mean().item()
    used = [len(codes.unique()) for codes in vq(z)[2].unbind(1)] if vq else "no VQ"  # (B, N, H)
    print(f"\nloss {loss.item():.3g}, of copying {change:.3g}; codes in use {used}")

    # cloning, and what starts from it
    if args.bc_name:
        cloned = checkpoint(args.bc_name, "lapo_bc", ["policy", "pretrain_args"])
        policy = LatentPolicy(
            cloned["args"]["policy_scale"], z.shape[1], cloned["pretrain_args"]["patch_size"]
        )
        fresh = {"fresh policy": LatentPolicy(cloned["args"]["policy_scale"], z.shape[1], fdm.P)}
        policy.load_state_dict(cloned["policy"])
        obs = torch.from_numpy(frames["test"][t])
        for name, network in (("fresh policy", fresh), ("cloned policy", policy)):
            conv = network.network.conv(obs.permute(0, 3, 1, 2).float() / 255 - 0.5)
            row(f"{name}: convolutions", conv)
            row(f"{name}: features (RL's heads, VPT's last layer)", network.features(obs))
        row("decoder's input when fitted: (z - mean) / std", (z - policy.mean) / policy.std)
        row("decoder's input when it plays", (policy(obs) - policy.mean) / policy.std)
