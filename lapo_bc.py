"""LAPO, stage 3: clone a policy in the latent action space (paper section 4.2).

The frozen IDM of stage 2 labels every transition with a latent action, the continuous one before
quantisation; a policy that sees o_t alone learns to predict it. No true action anywhere.
    loss    MSE((pi(o_t) - m) / s, (IDM(o_{t-1}, o_t, o_{t+1}) - m) / s)
m and s are the latents' mean and standard deviation, by dimension. The paper regresses latents as they are
(--no-standardize-latents); ours have deviations of 0.0008 to 0.07, and a policy that regresses the smaller of
these ends with collapsed features (docs/lapo_bc.md).

    python lapo_bc.py --env-id bossfight                                      # the paper's scale
    torchrun --standalone --nproc_per_node=8 lapo_bc.py --env-id bossfight    # 8 GPUs
    python lapo_bc.py --env-id coinrun --num-updates 500 --policy-scale 1     # toy
Reads data/ENV_ID and RUNS_DIR/ENV_ID__lapo_pretrain__SEED/checkpoint.pt, writes
RUNS_DIR/ENV_ID__lapo_bc__SEED/checkpoint.pt: the policy, and the IDM for the next stages.
"""

import atexit
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import tyro
from filelock import FileLock, Timeout
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

FORMAT_VERSION = 5  # of checkpoints
SAVE_SECONDS = 60  # between the states from which an interrupted run goes on
# flags that are no arguments of the method
PLACES = "data_dir pretrain_checkpoint runs_dir overwrite cuda track wandb_project_name wandb_entity".split()
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
    pretrain_checkpoint: str | None = None  # default: RUNS_DIR/ENV_ID__lapo_pretrain__SEED/checkpoint.pt
    # method and optimisation
    standardize_latents: bool = True  # regress every dimension in units of its deviation; the paper: raw
    policy_scale: float = 4.0  # width of the policy's IMPALA-CNN: 16, 32, 32 channels times this
    num_updates: int = 60_000  # gradient steps
    batch_size: int = 128  # transitions per step, over all processes
    learning_rate: float = 2e-4  # Adam's peak rate: from 0.01x to 1x over the warm-up, then linearly to 0
    warmup_updates: int = 1000  # length of the warm-up
    eval_every: int = 1000  # updates between evaluations on 1,024 test frames
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


def get_windows(frames, t, device):
    """Windows around t (B,): o_{t-1}, o_t, o_{t+1} as (B, 9, 64, 64) in [-0.5, 0.5], channels-last."""
    triples = frames[t[:, None] + np.array([-1, 0, 1])]  # (B, 3, 64, 64, 3) uint8
    triples = torch.from_numpy(triples).to(device)
    windows = torch.cat(triples.unbind(1), dim=-1)  # (B, 64, 64, 9)
    return windows.permute(0, 3, 1, 2).float() / 255 - 0.5


@torch.no_grad()
def label(idm, frames, t, device, autocast):
    """The latent actions (n, latent_dim) that the IDM sees in the windows around t (n,), on the CPU."""
    latents = []
    for batch in tqdm(np.split(t, range(512, len(t), 512)), "label", unit="batch", disable=RANK > 0, **BAR):
        with autocast:
            z = idm(get_windows(frames, batch, device))
        latents.append(z.cpu())
    return torch.cat(latents)


def latent_moments(z):
    """Mean and standard deviation (latent_dim,) of the latents z (n, latent_dim) of all processes."""
    z = z.double()
    sums = torch.stack([torch.ones_like(z).sum(0), z.sum(0), z.square().sum(0)])  # (3, latent_dim)
    if WORLD_SIZE > 1:
        dist.all_reduce(sums)
    n, total, squares = sums
    mean = total / n
    variance = (squares / n - mean**2).clamp(min=0)
    return mean.float(), variance.sqrt().float() + 1e-6


def effective_rank(features):
    """Directions in which features (n, 256) vary: exp of the entropy of their covariance's eigenvalues.

    The eigenvalues are normalised to sum to 1 (Roy & Vetterli 2007).
    """
    variances = torch.linalg.svdvals(features - features.mean(0)) ** 2
    shares = variances / variances.sum().clamp(min=1e-30)
    return torch.special.entr(shares).sum().exp().item()


@torch.no_grad()
def fold_moments(policy, mean, std):
    """Gives a policy that regressed raw latents the buffers of the others; forward returns the same."""
    policy.head.weight /= std[:, None]
    policy.head.bias.sub_(mean).div_(std)
    policy.mean.copy_(mean)
    policy.std.copy_(std)


def scheduled_rate(step, args):
    """Adam's rate at update `step`: from 0.01x to 1x over the warm-up, then linearly to 0."""
    ends = [0, args.warmup_updates, max(args.warmup_updates + 1, args.num_updates)]
    return args.learning_rate * float(np.interp(step - 1, ends, [0.01, 1.0, 0.0]))


def main(args):
    device, autocast = start(args)
    default = run_folder(args, "lapo_pretrain") / "checkpoint.pt"
    pretrained = load_checkpoint(args.pretrain_checkpoint or default, "lapo_pretrain", args.env_id)
    data, train, test = load_dataset(args)
    folder, resumed = open_folder(args)
    began = time.time() - resumed.get("seconds", 0)

    # the frozen IDM of stage 2, and a new policy
    torch.manual_seed(args.seed)  # the same on all processes
    pretrain_args = pretrained["args"]
    patch_size = pretrain_args["patch_size"]
    latent_dim = len(pretrained["idm"]["head.bias"])
    idm = IDM(pretrain_args["idm_scale"], latent_dim, patch_size)
    idm.load_state_dict(pretrained["idm"])
    idm = idm.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    policy = LatentPolicy(args.policy_scale, latent_dim, patch_size)
    policy = policy.to(device, memory_format=torch.channels_last)
    policy.critic.requires_grad_(False)  # has no part in the loss
    optimizer = torch.optim.Adam(policy.parameters(), lr=args.learning_rate, fused=True)

    # labels, computed once; with several processes each labels its share of the windows and learns those
    t_train = train.windows[RANK::WORLD_SIZE]
    z_train = label(idm, train, t_train, device, autocast)  # (n, latent_dim)
    mean, std = latent_moments(z_train)
    mean, std = mean.to(device), std.to(device)  # (latent_dim,)
    if args.standardize_latents:
        policy.mean.copy_(mean)
        policy.std.copy_(std)
    t_test = np.random.default_rng(0).permutation(test.windows)[:1024]
    obs_test = torch.from_numpy(test[t_test]).to(device)  # (1024, 64, 64, 3) uint8
    z_test = label(idm, test, t_test, device, autocast).to(device)

    if resumed:
        policy.load_state_dict(resumed["policy"])
        optimizer.load_state_dict(resumed["optimizer"])
    done = resumed.get("step", 0)
    curve = resumed.get("curve", [])
    model = policy
    if WORLD_SIZE > 1:  # averages gradients
        model = DistributedDataParallel(policy, forward_sync_buffers=False)
    if RANK == 0:
        writer = make_writer(args, folder, done)
    saved = time.time()
    updates = range(done + 1, args.num_updates + 1)
    progress = tqdm(updates, "clone", args.num_updates, initial=done, disable=RANK > 0, **BAR)
    for step in progress:
        # draws that depend on the step alone: a resumed run draws what an uninterrupted one does
        rng = np.random.default_rng([args.seed, step, RANK])
        i = rng.integers(len(t_train), size=args.batch_size // WORLD_SIZE)
        obs = torch.from_numpy(train[t_train[i]]).to(device)  # (B, 64, 64, 3) uint8
        target = z_train[i].to(device)  # (B, latent_dim)

        with autocast:
            z = model(obs)
        # in units of each dimension's deviation: predicting the mean costs 1 (raw latents: std is 1)
        loss = F.mse_loss(z / policy.std, target / policy.std)
        optimizer.zero_grad()
        loss.backward()
        lr = scheduled_rate(step, args)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()

        if step % 50 == 0 or step == 1:
            check_finite(policy, step)
            if RANK == 0:
                writer.add_scalar("losses/latent_mse", loss.item(), step)
                writer.add_scalar("charts/learning_rate", lr, step)
                writer.add_scalar("charts/SPS", step * args.batch_size / (time.time() - began), step)
        if RANK == 0 and (step % args.eval_every == 0 or step == args.num_updates):
            check_finite(policy, step)
            metrics = evaluate(policy, obs_test, z_test, std, autocast)
            for name, value in metrics.items():
                writer.add_scalar(name, value, step)
            curve.append({"update": step, "train/latent_mse": loss.item(), **metrics})
            explained, rank = metrics["test/r2"], metrics["test/effective_rank"]
            progress.set_postfix_str(f"test R² {explained:.3f}, effective rank {rank:.1f}", refresh=False)
        if RANK == 0 and time.time() - saved > SAVE_SECONDS:
            check_finite(policy, step)
            state = {"policy": policy.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"step": step, "curve": curve, "seconds": time.time() - began}
            save(folder / "resume.pt", {**describe(args), **state})
            saved = time.time()

    check_finite(policy, args.num_updates)
    if not args.standardize_latents:
        fold_moments(policy, mean, std)
    if RANK == 0:
        writer.close()
        networks = {"policy": policy.state_dict(), "idm": pretrained["idm"]}
        networks |= {"pretrain_args": pretrain_args, "data": data}
        finish(folder, args, time.time() - began, networks, {**curve[-1], "curve": curve})
        rank = curve[-1]["test/effective_rank"]
        if rank < 8:
            print(f"The features span only {rank:.1f} of 256 directions: what starts from them will be weak")
        print(f"next: python lapo_decode.py --env-id {args.env_id} --runs-dir {args.runs_dir}")
    if WORLD_SIZE > 1:
        del model  # first: freed after the process group, DDP can wait for its threads forever
        dist.destroy_process_group()


# ---- Data, evaluation, run-keeping: nobody has to read on ----


@torch.no_grad()
def evaluate(policy, obs, z, std, autocast):
    """Metrics on test observations (n, 64, 64, 3) with latents z (n, latent_dim), std those of training."""
    with autocast:
        features = policy.features(obs).float()  # (n, 256)
        guess = policy(obs)
    unexplained = F.mse_loss(guess / std, z / std).item()  # share of the variance, the mean over dimensions
    return {"test/r2": 1 - unexplained, "test/effective_rank": effective_rank(features)}


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
    """Joins torchrun's processes. Returns this process's device, and the autocast of its forward passes."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the process at once, without a traceback
    if min(args.num_updates, args.batch_size, args.eval_every) < 1:
        refuse("--num-updates, --batch-size and --eval-every start at 1")
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
