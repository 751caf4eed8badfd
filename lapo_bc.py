"""LAPO, stage 3: clone a policy in the latent action space (paper section 4.2).

The frozen IDM of stage 2 labels every transition with a latent action, the continuous one before
quantisation; a policy that sees o_t alone learns to predict it. No true action anywhere.
    loss    MSE((pi(o_t) - m) / s, (IDM(o_{t-1}, o_t, o_{t+1}) - m) / s)
m and s are the latents' mean and standard deviation, by dimension. The paper regresses latents as they are
(--no-standardize-latents); ours have deviations of 0.003 to 0.04, and a policy that regresses such numbers
ends with collapsed features (docs/lapo_bc.md).

    python lapo_bc.py --env-id bossfight                                      # the paper's scale
    torchrun --standalone --nproc_per_node=8 lapo_bc.py --env-id bossfight   # 8 GPUs
    python lapo_bc.py --env-id coinrun --num-updates 500 --policy-scale 1     # toy
Reads data/ENV_ID and RUNS_DIR/ENV_ID__lapo_pretrain__SEED/checkpoint.pt,
writes RUNS_DIR/ENV_ID__lapo_bc__SEED/checkpoint.pt: the policy, and the IDM for the next stages.
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
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import tyro
from filelock import FileLock
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
    pretrain_checkpoint: str | None = None  # default: RUNS_DIR/ENV_ID__lapo_pretrain__SEED/checkpoint.pt
    allow_unfinished: bool = False  # take the checkpoint of an unfinished run, too
    # method and optimisation
    standardize_latents: bool = True  # regress every dimension in units of its deviation; the paper: raw
    policy_scale: float = 4.0  # width of the policy's IMPALA-CNN: 16, 32, 32 channels times this
    num_updates: int = 60_000  # gradient steps
    batch_size: int = 128  # transitions per step
    learning_rate: float = 2e-4  # Adam's peak rate: from 0.01x to 1x over the warm-up, then linearly to 0
    warmup_updates: int = 1000  # length of the warm-up
    eval_every: int = 1000  # updates between evaluations on 1,024 test frames
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
        return self.network(obs.permute(0, 3, 1, 2).float() / 255 - 0.5)  # (B, 256)

    def forward(self, obs):
        return self.mean + self.std * self.head(self.features(obs)).float()


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


def load_checkpoint(path, made_by, parts, args):
    """A finished checkpoint of this game with these parts, on the CPU; refuses all else in one sentence."""
    unfinished = Path(path).with_name("resume.pt")
    if unfinished.exists() and not unfinished.with_name("results.json").exists():
        path = unfinished
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        found = [checkpoint[key] for key in ("env_id", "format_version", *parts)][:2]
        if found != [args.env_id, FORMAT_VERSION]:
            raise ValueError(f"game and format {found}, expected {[args.env_id, FORMAT_VERSION]}")
    except Exception as e:  # the unpickler raises many kinds, some with pages of advice
        why = repr(e) if isinstance(e, (OSError, KeyError, ValueError)) else type(e).__name__
        sys.exit(f"error: {path} is unusable ({why}): `python {made_by}.py --env-id {args.env_id}` makes one")
    if path == unfinished and not args.allow_unfinished:
        sys.exit(f"error: {path.parent} is unfinished: `{checkpoint['command']}`, or --allow-unfinished")
    return checkpoint


def latent_moments(z):
    """Mean and standard deviation (latent_dim,) of the latents z (n, latent_dim) of all processes."""
    counts, means, variances = zip(*gathered((len(z), z.mean(0), z.var(0, correction=0))))
    weights = torch.tensor(counts)[:, None] / sum(counts)  # (processes, 1)
    means, variances = torch.stack(means), torch.stack(variances)  # (processes, latent_dim)
    mean = (weights * means).sum(0)
    variance = (weights * (variances + (means - mean) ** 2)).sum(0)
    return mean, variance.sqrt() + 1e-6


def effective_rank(features):
    """Directions in which features (n, 256) vary: exp of the entropy of their covariance's eigenvalues.

    The eigenvalues are normalised to sum to 1 (Roy & Vetterli 2007).
    """
    variances = torch.linalg.svdvals(features - features.mean(0)) ** 2
    return torch.special.entr(variances / variances.sum().clamp(min=1e-30)).sum().exp().item()


@torch.no_grad()
def fold_moments(policy, mean, std):
    """Gives a policy that regressed raw latents the buffers of the others; forward returns the same."""
    policy.head.weight /= std[:, None]
    policy.head.bias.sub_(mean).div_(std)
    policy.mean.copy_(mean)
    policy.std.copy_(std)


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
    if min(args.num_updates, args.batch_size, args.eval_every) < 1 or args.batch_size % WORLD_SIZE:
        what = f"must be 1 or more, --batch-size {args.batch_size} a multiple of the {WORLD_SIZE} processes"
        sys.exit(f"error: --num-updates, --batch-size and --eval-every {what}")
    default = f"{args.runs_dir}/{args.env_id}__lapo_pretrain__{args.seed}/checkpoint.pt"
    pretrained = load_checkpoint(args.pretrain_checkpoint or default, "lapo_pretrain", ["idm", "fdm"], args)
    data, frames, windows = load_dataset(args)
    run = Run(args, inputs=[pretrained["identity"], data.get("identity")])
    run.meta |= {"pretrain_args": pretrained["args"], "data": data}
    device = (torch.accelerator.current_accelerator(True) if args.cuda else None) or torch.device("cpu")

    latent_dim, patch = len(pretrained["idm"]["head.bias"]), pretrained["args"]["patch_size"]
    differences = pretrained["args"].get("idm_differences", False)
    idm = IDM(pretrained["args"]["idm_scale"], latent_dim, patch, differences)
    idm.load_state_dict(pretrained["idm"])
    idm = idm.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    torch.manual_seed(args.seed)
    policy = LatentPolicy(args.policy_scale, latent_dim, patch).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(policy.parameters(), lr=args.learning_rate, fused=True)
    t_test = np.random.default_rng(0).permutation(windows["test"])[:1024]
    obs_test = torch.from_numpy(frames["test"][t_test]).to(device)  # (1024, 64, 64, 3)
    autocast = choose_precision(args, device, lambda: policy(obs_test[:16]).square().mean().backward())
    state = run.restore(policy=policy, optimizer=optimizer, idm=idm)

    # labels: the IDM's latents, computed once; with several processes each labels its windows and learns them
    t_train = windows["train"][RANK::WORLD_SIZE]
    labels = run.dir / ("latents.pt" if WORLD_SIZE == 1 else f"latents-{RANK}-of-{WORLD_SIZE}.pt")
    if not state or not labels.exists():
        z_train = []
        for t in tqdm(np.split(t_train, range(512, len(t_train), 512)), "label", unit="batch"):
            with torch.inference_mode(), autocast:
                z_train.append(idm(get_windows(frames["train"], t, device)).cpu())
            run.leave_if_stopped()
        write_whole(labels, torch.cat(z_train))
    z_train = torch.load(labels, mmap=True, weights_only=True)  # (n, latent_dim)
    mean, std = (x.to(device) for x in latent_moments(z_train))  # (latent_dim,)
    if args.standardize_latents:
        policy.mean.copy_(mean)
        policy.std.copy_(std)
    with torch.no_grad(), autocast:
        z_test = idm(get_windows(frames["test"], t_test, device))  # (1024, latent_dim)

    done, curve = state.get("step", 0), state.get("curve", [])
    warmed_up = [0, args.warmup_updates, max(args.warmup_updates + 1, args.num_updates)]
    steps = tqdm(range(done + 1, args.num_updates + 1), "clone", args.num_updates, initial=done)
    for step in steps:
        lr = args.learning_rate * float(np.interp(step - 1, warmed_up, [0.01, 1.0, 0.0]))
        optimizer.param_groups[0]["lr"] = lr
        i = torch.randint(len(z_train), (args.batch_size // WORLD_SIZE,))
        with autocast:
            z = policy(torch.from_numpy(frames["train"][t_train[i]]).to(device))
        loss = F.mse_loss(z / policy.std, z_train[i].to(device) / policy.std)  # the mean cancels
        optimizer.zero_grad()
        loss.backward()
        loss = average(loss, policy.parameters())
        if not torch.isfinite(loss):
            sys.exit(f"error: loss {loss.item()} at update {step}: lower --learning-rate, or try --no-bf16")
        optimizer.step()

        if RANK == 0 and (step % 50 == 0 or step == 1):
            run.writer.add_scalar("losses/latent_mse", loss.item(), step)
            run.writer.add_scalar("charts/learning_rate", lr, step)
            run.writer.add_scalar("charts/SPS", step * args.batch_size / (time.time() - run.began), step)
        if RANK == 0 and (step % args.eval_every == 0 or step == args.num_updates):
            with torch.no_grad(), autocast:
                features = policy.features(obs_test).float()  # (1024, 256)
                z = policy(obs_test)
            unexplained = F.mse_loss(z / std, z_test / std).item()  # share of the variance
            point = {"update": step, "train/latent_mse": loss.item()}
            point["test/r2"] = 1 - unexplained  # the mean over dimensions
            point["test/effective_rank"] = effective_rank(features)
            curve.append(point)
            for name in ("test/r2", "test/effective_rank"):
                run.writer.add_scalar(name, point[name], step)
            steps.set_postfix_str(f"test R² {point['test/r2']:.3f}, rank {point['test/effective_rank']:.1f}")
        if run.due() or step == args.num_updates:
            run.save(step, curve=curve)
    if not args.standardize_latents:
        fold_moments(policy, mean, std)
    run.finish(**(curve or [{}])[-1], curve=curve)
    print(f"next: lapo_decode.py or lapo_finetune_ppo.py --env-id {args.env_id} --runs-dir {args.runs_dir}")
