"""A forward dynamics model to play in: fine-tuned on its own predictions, for tools.play_dream.

Pretraining shows the FDM real frames alone. A dream goes on from its own, and soon leaves what the FDM knows.
Here the frozen IDM labels the frames of a stretch with latents, and the FDM alone learns to follow them:

    z_t        = VQ(IDM(o_{t-1}, o_t, o_{t+1}))                        frozen
    o^_{t+1}   = clamp(FDM(o^_{t-1}, o^_t, z_t))                       from two real frames with noise on them
    loss       = mean MSE(o^_{t+1}, o_{t+1}) over --unroll-steps predictions in a row

A dream goes on in the next update, without gradient to the last one, for up to --max-stretch updates, a
number that grows from 1. --play-frames adds frames of random play: players go where no demonstrator goes.

    python -m tools.steady_dream --env-id bossfight --play-frames 32768
    python -m tools.play_dream --env-id bossfight --pretrain-checkpoint PATH  # of its checkpoint.pt
Reads data/ENV_ID and RUNS_DIR/ENV_ID__lapo_pretrain__SEED/checkpoint.pt, writes a checkpoint of the same
kind, results.json and logs to RUNS_DIR/ENV_ID__steady_dream__SEED.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from lapo_bc import BAR, get_windows, load_checkpoint, load_dataset, refuse, save
from lapo_decode import make_env
from tools.loading import (
    ACTIONS,
    action_names,
    describe,
    find_device,
    load_lapo,
    open_folder,
    stage_folder,
    write_results,
)
from tools.play_dream import play_held_keys


@dataclass
class Args:
    # what
    env_id: str = "bossfight"  # a Procgen game, a gymnasium world, or the name of your own videos
    exp_name: str = Path(__file__).stem  # the run folder is RUNS_DIR/ENV_ID__EXP_NAME__SEED
    seed: int = 1  # seed of the pretraining run, and of the draws
    # data
    data_dir: str | None = None  # the dataset; default data/ENV_ID
    pretrain_checkpoint: str | None = None  # default: RUNS_DIR/ENV_ID__lapo_pretrain__SEED/checkpoint.pt
    play_frames: int = 0  # frames of random play beside the training split's; Procgen's games only
    # method and optimisation
    unroll_steps: int = 6  # predictions in a row through which an update's gradient flows
    max_stretch: int = 8  # updates for which a dream goes on at most, at the end of the training
    noise: float = 0.1  # the greatest deviation of the normal noise on a dream's two real frames
    num_updates: int = 1500  # gradient steps
    batch_size: int = 16  # dreams in an update
    learning_rate: float = 3e-4  # Adam's rate at first, falls linearly to 0
    max_grad_norm: float = 2.0  # the maximum norm of the gradient
    eval_steps: int = 36  # frames of the test dreams whose errors are taken before and after
    # run
    runs_dir: str = "runs"  # where run folders are made, and the pretraining run lies
    overwrite: bool = False  # replace the run in the run folder
    cuda: bool = True  # use CUDA, or another accelerator that torch knows, where there is one


def find_stretches(frames, num_steps):
    """Whether num_steps windows in a row, of one episode, begin at t: (N + num_steps,) bool."""
    N = frames.starts[-1]
    is_window = np.zeros(N + 2 * num_steps, dtype=bool)
    is_window[frames.windows] = True
    whole = np.lib.stride_tricks.sliding_window_view(is_window, num_steps)
    return whole.all(1)


def add_random_play(train, data, args):
    """Makes frames of 64 games under random keys the split's last shard. No action is kept."""
    if action_names(data) != ACTIONS or args.play_frames < 1024:
        refuse(f"--play-frames {args.play_frames}: at least 1024, of Procgen's games, or 0")
    env = make_env(args.env_id, 64, data["num_levels"], data["start_level"], args.seed + 2000)
    rng = np.random.default_rng(args.seed + 2000)
    num_steps = args.play_frames // 64
    obs, _, t = play_held_keys(env, rng, num_steps)
    env.close()
    N = train.starts[-1]
    train.shards.append(obs)
    train.starts = np.append(train.starts, N + len(obs))
    train.windows = np.append(train.windows, N + t)


def add_noise(frames, most, rng):
    """Two frames (B, 6, 64, 64) with normal noise, of a deviation up to `most` that each pair draws."""
    deviation = rng.uniform(0, most, size=(len(frames), 1, 1, 1))
    noise = deviation * rng.normal(size=frames.shape)
    noisy = frames + torch.from_numpy(noise).to(frames)
    return noisy.clamp(-0.5, 0.5)


def unroll(fdm, frames, z, targets):
    """Losses (K,) of K predictions in a row from frames (B, 6, 64, 64), and the two frames they end with.

    z is (B, K, latent_dim), targets are (B, K, 3, 64, 64). Predictions are clamped where they go on.
    """
    losses = []
    for k in range(z.shape[1]):
        prediction = fdm(frames, z[:, k])
        losses.append(F.mse_loss(prediction, targets[:, k]))
        frames = torch.cat([frames[:, 3:], prediction.clamp(-0.5, 0.5)], dim=1)
    return torch.stack(losses), frames


def main(args):
    counts = args.unroll_steps, args.max_stretch, args.num_updates, args.batch_size, args.eval_steps
    if min(counts) < 1:
        refuse("--unroll-steps, --max-stretch, --num-updates, --batch-size and --eval-steps start at 1")
    path = args.pretrain_checkpoint or stage_folder(args, "lapo_pretrain") / "checkpoint.pt"
    pretrained = load_checkpoint(path, "lapo_pretrain", args.env_id)
    data, train, test = load_dataset(args)
    if args.play_frames:
        add_random_play(train, data, args)
    B = args.batch_size
    K = args.unroll_steps
    begins = find_stretches(train, K)
    starts = np.flatnonzero(begins)
    if len(starts) == 0:
        refuse(f"--unroll-steps {K}: no episode is so long")
    folder = open_folder(args)
    folder.mkdir(parents=True, exist_ok=True)
    began = time.time()
    device = find_device(args.cuda)
    lapo = load_lapo(pretrained, device).requires_grad_(False)  # in evaluation mode, as it plays
    lapo.fdm.requires_grad_(True)
    optimizer = torch.optim.Adam(lapo.fdm.parameters(), lr=args.learning_rate)
    before = score(lapo, test, args.eval_steps, device)

    writer = SummaryWriter(folder)
    t = np.zeros(B, dtype=np.int64)  # where each dream is
    left = np.zeros(B, dtype=np.int64)  # updates for which it goes on
    frames = torch.zeros(B, 6, 64, 64, device=device)  # its last two
    for step in tqdm(range(1, args.num_updates + 1), "steady", **BAR):
        rng = np.random.default_rng([args.seed, step])
        progress = (step - 1) / args.num_updates
        anew = (left == 0) | ~begins[t]
        stretch = 1 + int(progress * args.max_stretch)
        t[anew] = rng.choice(starts, anew.sum())
        left[anew] = rng.integers(1, stretch + 1, anew.sum())
        windows = get_windows(train, (t[:, None] + np.arange(K)).ravel(), device)  # (B * K, 9, 64, 64)
        with torch.no_grad():
            _, z, _, _ = lapo.encode(windows)
        windows = windows.view(B, K, 9, 64, 64)
        frames[anew] = add_noise(windows[anew, 0, :6], args.noise, rng)

        z = z.view(B, K, -1)
        losses, frames = unroll(lapo.fdm, frames, z, windows[:, :, 6:])
        loss = losses.mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(lapo.fdm.parameters(), args.max_grad_norm)
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - progress)
        optimizer.step()
        frames = frames.detach()
        t += K
        left -= 1
        if step % 50 == 0 or step == 1:
            if not loss.isfinite():
                refuse(f"the loss is not finite at update {step}: lower --learning-rate")
            writer.add_scalar("losses/fdm_loss", loss.item(), step)
    writer.close()

    save(folder / "checkpoint.pt", {**pretrained, "fdm": lapo.fdm.state_dict()})
    scores = {"before": before, "after": score(lapo, test, args.eval_steps, device)}
    write_results(folder, began, {**describe(args, Path(__file__).stem), "scores": scores})
    print(f"wrote {folder}")
    for when, found in scores.items():
        for name, errors in found.items():
            print(f"{when}, {name}: mean squared error {errors[-1]:.4f} after {args.eval_steps} test frames")


@torch.inference_mode()
def score(lapo, test, num_steps, device):
    """Mean squared errors of test dreams under their true latents, and of their first frame, by step."""
    stretches = np.flatnonzero(find_stretches(test, num_steps))
    t = np.random.default_rng(0).permutation(stretches)[:64]
    if len(t) == 0:
        return {}
    windows = get_windows(test, (t[:, None] + np.arange(num_steps)).ravel(), device)
    _, z, _, _ = lapo.encode(windows)
    z = z.view(len(t), num_steps, -1)
    windows = windows.view(len(t), num_steps, 9, 64, 64)
    targets = windows[:, :, 6:]
    dreamed, _ = unroll(lapo.fdm, windows[:, 0, :6], z, targets)
    first = windows[:, :1, 3:6]
    held = (first - targets).square().mean((0, 2, 3, 4))
    return {"dream": dreamed.tolist(), "first frame": held.tolist()}


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
