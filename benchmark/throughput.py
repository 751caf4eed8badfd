"""How fast is every stage, and what does each optimisation buy? The plain form against the script's.

    python benchmark/throughput.py                          # every stage
    python benchmark/throughput.py --stages pretrain load   # only these; other stages' rows in the file stay
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 python benchmark/throughput.py   # as a CPU without bf16

All variants of a stage run in one process and take turns, so that whatever else the machine does hits them
alike; a rate is the median over the rounds. A row with a "+" adds one optimisation to the row above; the row
with a "=" is what the script does. Bfloat16 is timed only where the scripts choose it (choose_precision, on a
step of the script's form with few samples): on a CPU without it a single step can take minutes.

Writes benchmark/results/throughput-DEVICE.json; DEVICE is, on a CPU, its threads and bf16 or avx2, avx512:
{"device", "imitated", "torch", "peak_gflops", "rows": [{"stage", "shapes", "variant", "unit", "precision",
"gflop", "rounds", "rate", "ratio_to_plain", "share_of_peak", "commit"}]}. gflop is the counted work (multiply
and add: 2) of a unit, share_of_peak that times the rate / the best matrix product in the row's precision.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from types import MethodType, SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from procgen import ProcgenEnv
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import collect_expert_data as collect  # noqa: E402
import lapo_bc as bc  # noqa: E402
import lapo_finetune_ppo as finetune  # noqa: E402
import lapo_pretrain as pretrain  # noqa: E402

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # CUDA_VISIBLE_DEVICES= hides a GPU
PAPER = dict(patch_size=1, idm_scale=4, fdm_width=24, vq_dim=16, policy_scale=4)
QUICKSTART = dict(patch_size=2, idm_scale=1, fdm_width=16, vq_dim=4, policy_scale=1)
SHAPES = {  # labels: windows that lapo_bc.py labels, once, per sample that it trains on
    ("pretrain", "paper"): dict(PAPER, batch=128),
    ("pretrain", "quickstart"): dict(QUICKSTART, batch=32),
    ("load", "batch 128"): dict(batch=128),
    ("load", "batch 32"): dict(batch=32),
    ("clone", "paper"): dict(PAPER, batch=128, labels=2_621_440 / (60_000 * 128)),
    ("clone", "quickstart"): dict(QUICKSTART, batch=64, labels=65_536 / (5000 * 64)),
    ("ppo", "IMPALA x1"): dict(batch=2048),
    ("finetune", "policy x4"): dict(batch=512),
    ("env", "64 games"): dict(batch=64),
}
PLAIN = {
    "pretrain": "plain: float32, contiguous, broadcast latents, DataLoader",
    "load": "plain: DataLoader",
    "clone": "plain: float32, contiguous, DataLoader, IDM at every update",
    "ppo": "plain: float32, contiguous, minibatch in one piece",
    "finetune": "plain: float32, contiguous, frozen layers at every update",
    "env": "plain: ProcgenEnv, a dictionary per game",
}
LAYOUT, ADAM = ["bfloat16", "channels-last"], ["fused Adam", "in-place operations"]
ADDED = {  # one after the other; with all of them it is the script's form
    "pretrain": [*LAYOUT, "latents on a 3x3 map", "one copy of frames", *ADAM],
    "load": ["2 workers", "one copy of frames"],
    "clone": [*LAYOUT, "labels once", "one copy of frames", *ADAM],
    "ppo": [*LAYOUT, "micro-batches", *ADAM],
    "finetune": [*LAYOUT, "stored features", "micro-batches", *ADAM],
    "env": ["ProcgenGym3Env"],
}
HYPER = SimpleNamespace(clip_coef=0.2, clip_vloss=True, ent_coef=0.01, vf_coef=0.5)


@dataclass
class Args:
    stages: tuple[str, ...] = tuple(PLAIN)
    """what to measure, of pretrain, load, clone, ppo, finetune, env"""
    shapes: tuple[str, ...] = ()
    """only these shapes, by their names in SHAPES, e.g. quickstart; default: all"""
    bf16: tyro.conf.DisallowNone[bool | None] = None
    """time bfloat16 or leave it out; default: as the scripts choose on this machine"""
    rounds: int = 5
    """turns of every variant; its rate is the median over them"""
    seconds: float = 2.0
    """the least duration of a turn"""
    out: str | None = None
    """where the JSON goes; default benchmark/results/throughput-DEVICE.json"""


def seconds(work, repeats=1):
    sync = torch.cuda.synchronize if device.type == "cuda" else bool
    sync()
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    sync()
    return time.perf_counter() - start


@torch.inference_mode()
def measure_peaks():
    """The best matrix product, GFLOP/s, by precision: a @ b, or a 1x1 convolution if that is faster."""
    best = {"float32": 0.0, "bfloat16": 0.0}
    for precision in best:
        for n in (256, 1024, 2048) if device.type == "cpu" else (4096, 8192):
            a, b = (torch.rand(n, n, device=device, dtype=getattr(torch, precision)) for _ in range(2))
            image = a.view(1, 32, n // 32, n).permute(0, 3, 1, 2)  # (1, n, 32, n / 32), channels-last
            for product in (partial(torch.mm, a, b), partial(F.conv2d, image, b.view(n, n, 1, 1))):
                product()
                repeats = math.ceil(0.1 / seconds(product))
                least = min(seconds(product, repeats) / repeats for _ in range(5))
                best[precision] = max(best[precision], 2 * n**3 / least / 1e9)
                if best[precision] < 0.2 * best["float32"]:  # given up: the device has no instructions for it
                    return best
    return best


class Windows(Dataset):
    """The obvious Dataset: window i as float (9, 64, 64)."""

    def __len__(self):
        return len(ts)

    def __getitem__(self, i):
        window = np.concatenate(frames[ts[i] - 1 : ts[i] + 2], axis=-1)
        return torch.from_numpy(window.transpose(2, 0, 1)).float() / 255 - 0.5


def plain_batches(n, num_workers=0):
    while True:
        yield from DataLoader(Windows(), n, shuffle=True, drop_last=True, num_workers=num_workers)


def plain_first_conv(self, frames, z):
    """down_convs[0] as the paper writes it: the latent broadcast over the image."""
    z = z[:, :, None, None].expand(-1, -1, *frames.shape[2:])
    return self.down_convs[0](torch.cat([frames, z], dim=1))


def plain_block(self, x):
    """ResidualBlock without in-place operations."""
    return x + self.conv1(torch.relu(self.conv0(torch.relu(x))))


def layout(on):
    return torch.channels_last if "channels-last" in on else torch.contiguous_format


def prepare(network, on):
    """Moves a network and its inputs to their memory layout; gives the plain form its plain blocks."""
    network.to(device).to(memory_format=layout(on))
    for module in network.modules():  # every script has its own classes of these names
        if type(module).__name__ == "ImpalaCNN":  # no copy of inputs that have the layout already
            module.conv.register_forward_pre_hook(lambda _, x: x[0].contiguous(memory_format=layout(on)))
        if type(module).__name__ == "ResidualBlock" and "in-place operations" not in on:
            module.forward = MethodType(plain_block, module)
    return network


def pretrain_step(s, on):
    """An update of lapo_pretrain.py."""
    latent_dim = 2 * 4 * s.vq_dim
    idm = prepare(pretrain.IDM(s.idm_scale, latent_dim, s.patch_size), on)
    vq = pretrain.VQ(2, 4, s.vq_dim, 64, 0.05, 0.999).to(device)
    fdm = prepare(pretrain.FDM(latent_dim, s.fdm_width, patch_size=s.patch_size), on)
    if "latents on a 3x3 map" not in on:
        fdm.first_conv = MethodType(plain_first_conv, fdm)
    params, batches = [*idm.parameters(), *fdm.parameters()], plain_batches(s.batch)
    optimizer = torch.optim.Adam(params, lr=3e-4, fused="fused Adam" in on)

    def step(autocast):
        if "one copy of frames" in on:
            windows = pretrain.get_windows(frames, ts[rng.integers(len(ts), size=s.batch)], device)
        else:
            windows = next(batches).to(device, memory_format=layout(on))
        prediction, vq_loss, *_ = pretrain.predict(idm, vq, fdm, windows, autocast)
        loss = F.mse_loss(prediction, windows[:, 6:]) + vq_loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(params, 2.0)
        optimizer.step()
        return s.batch

    return step


def load_step(s, on):
    """A batch of float windows (B, 9, 64, 64)."""
    batches = plain_batches(s.batch, num_workers=2 if "2 workers" in on else 0)

    def step(autocast):
        if "one copy of frames" in on:
            return len(pretrain.get_windows(frames, ts[rng.integers(len(ts), size=s.batch)], device))
        return len(next(batches).to(device))

    return step


def clone_step(s, on):
    """An update of lapo_bc.py, with its share of the labelling."""
    latent_dim = 2 * 4 * s.vq_dim
    idm = prepare(bc.IDM(s.idm_scale, latent_dim, s.patch_size).requires_grad_(False), on)
    policy = prepare(bc.LatentPolicy(s.policy_scale, latent_dim, s.patch_size), on)
    optimizer = torch.optim.Adam(policy.parameters(), lr=2e-4, fused="fused Adam" in on)
    latents, batches = np.zeros((len(ts), latent_dim), dtype=np.float32), plain_batches(s.batch)

    def step(autocast):
        i = rng.integers(len(ts), size=s.batch)
        windows = None if "one copy of frames" in on else next(batches).to(device)
        with autocast:
            if "one copy of frames" in on:
                z = policy(torch.from_numpy(frames[ts[i]]).to(device))
            else:
                z = policy.head(policy.network(windows[:, 3:6])).float()
            if "labels once" in on:
                target = torch.from_numpy(latents[i]).to(device)
                idm(bc.get_windows(frames, ts[i[: math.ceil(s.batch * s.labels)]], device))
            else:
                target = idm(windows)
        loss = F.mse_loss(z, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return s.batch

    return step


def ppo_update(forward, inputs, on, params, optimizer):
    """PPO's update on one minibatch; forward(inputs) -> logits (B, 15) and values (B,)."""
    n = len(inputs)
    piece = 128 if "micro-batches" in on and device.type == "cpu" else n
    actions, others = torch.zeros(n, dtype=torch.long, device=device), torch.zeros(4, n, device=device)
    optimizer.zero_grad()
    for i in torch.randperm(n, device=device).split(piece):
        loss, _ = finetune.ppo_loss(*forward(inputs[i]), actions[i], *others[:, i], HYPER)
        (loss * len(i) / n).backward()
    nn.utils.clip_grad_norm_(params, 0.5)
    optimizer.step()


def ppo_step(s, on):
    """The update of collect_expert_data.py on a minibatch."""
    agent, obs = prepare(collect.Agent(1.0), on), torch.from_numpy(frames[: s.batch].copy()).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=5e-4, eps=1e-5, fused="fused Adam" in on)

    def step(autocast):
        ppo_update(autocast(agent.forward), obs, on, agent.parameters(), optimizer)
        return s.batch

    return step


def finetune_step(s, on):
    """What lapo_finetune_ppo.py does with a minibatch's frames, without the game: acting, three updates."""
    agent = prepare(finetune.Agent(4.0, 1, 128, (192, 128, 64)), on)
    for frozen in (agent.network.conv, agent.frozen_fc, agent.latent_head, agent.decoder):
        frozen.requires_grad_(False)
    trained = [p for p in agent.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-3, eps=1e-5, fused="fused Adam" in on)
    obs = torch.from_numpy(frames[: s.batch].copy()).to(device)

    def step(autocast):
        features = autocast(agent.features)
        with torch.no_grad():
            stored = torch.cat([features(x) for x in obs.split(64)])  # 64 games
            agent(stored), agent.decoder_logits(stored)
        for _ in range(3):
            if "stored features" in on:
                ppo_update(agent, stored, on, trained, optimizer)
            else:
                ppo_update(lambda x: agent(features(x)), obs, on, trained, optimizer)
        return s.batch

    return step


def env_step(s, on):
    """A hundred steps of Procgen's games."""
    actions = rng.integers(15, size=(100, s.batch)).astype(np.int32)
    if "ProcgenGym3Env" in on:
        env = finetune.make_env("coinrun", s.batch, 0, 0, 1)
    else:
        env = ProcgenEnv(num_envs=s.batch, env_name="coinrun", distribution_mode="easy", rand_seed=1)

    def step(autocast):
        for action in actions:
            if "ProcgenGym3Env" in on:
                env.act(action)
                env.observe()
            else:
                env.step(action)
        return actions.size

    return step


def measure(stage, shapes):
    """The rows of a stage; its variants take turns."""
    build, s, options = globals()[f"{stage}_step"], SHAPES[stage, shapes], ADDED[stage]
    chosen = SimpleNamespace(bf16=args.bf16)
    print(f"\n{stage}, {shapes}", flush=True)
    if "bfloat16" in options:
        pretrain.choose_precision(chosen, device, build(SimpleNamespace(**dict(s, batch=16)), options))
        options = options if chosen.bf16 else options[1:]
    steps, rows = [], []
    for k in range(len(options) + 1):
        on = options[:k]
        autocast = torch.autocast(device.type, torch.bfloat16, enabled="bfloat16" in on)
        torch.manual_seed(0)
        steps.append(partial(build(SimpleNamespace(**s), on), autocast))
        with FlopCounterMode(display=False) as counter:  # this is the warm-up, too
            units = steps[-1]()
        row = {"stage": stage, "shapes": shapes, "variant": f"+ {on[-1]}" if on else PLAIN[stage]}
        row |= {"unit": "frames" if stage in ("ppo", "finetune", "env") else "samples", "units": units}
        row |= {"precision": "bfloat16" if "bfloat16" in on else "float32", "rounds": []}
        rows.append({**row, "gflop": round(counter.get_total_flops() / units / 1e9, 4)})
    rows[-1]["variant"] += " (= the script)"
    repeats = [math.ceil(args.seconds / seconds(step)) for step in steps]
    for _ in range(args.rounds):
        for step, n, row in zip(steps, repeats, rows):
            row["rounds"].append(round(n * row["units"] / seconds(step, n), 2))
    for row in rows:
        row["rate"] = median(row["rounds"])
        ratio = median(a / b for a, b in zip(row["rounds"], rows[0]["rounds"]))  # of the same round
        share = row["gflop"] * row["rate"] / peaks[row["precision"]]
        row |= {"ratio_to_plain": round(ratio, 2), "share_of_peak": round(share, 3) or None, "commit": commit}
        end = f"{ratio:7.2f}" + f"{share:6.0%}" * (share > 0)
        print(f"{row['variant']:58s}{row['rate']:10.1f} {row['unit']}/s{end}", flush=True)
    return rows


def print_table(rows):
    """The plain form and the script's, a line per stage and shapes, for the README."""
    print("\n| stage, shapes | plain, per s | ours | ratio | share of the peak |\n|---|---|---|---|---|")
    for row in rows:
        if row["variant"].startswith("plain"):
            plain = row
        if "(=" in row["variant"]:
            share = f"{row['share_of_peak']:.0%} of {row['precision']}'s" if row["share_of_peak"] else ""
            rates = f"{plain['rate']:.4g} {row['unit']} | {row['rate']:.4g} | **{row['ratio_to_plain']:.2f}**"
            print(f"| {row['stage']}, {row['shapes']} | {rates} | {share} |")


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    todo = [key for key in SHAPES if key[0] in args.stages and (not args.shapes or key[1] in args.shapes)]
    if unknown := {*args.stages, *args.shapes}.difference(*SHAPES):
        known = "; ".join(f"{stage}, {shapes}" for stage, shapes in SHAPES)
        sys.exit(f"error: unknown --stages or --shapes {' '.join(unknown)}: choose of {known}")
    root, rng = Path(__file__).resolve().parent, np.random.default_rng(0)
    describe = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, cwd=root, capture_output=True, text=True).stdout.strip()
    peaks, threads = measure_peaks(), torch.get_num_threads()
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
        slug = name.lower().replace(" ", "-")
    else:
        info = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
        model = [line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")]
        name = f"{model[0] if model else 'CPU'}, {threads} threads"
        bf16 = peaks["bfloat16"] > peaks["float32"]
        slug = f"cpu{threads}-{'bf16' if bf16 else torch.backends.cpu.get_cpu_capability().lower()}"
    about = {"device": name, "imitated": bool({"ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA"} & {*os.environ})}
    about |= {"torch": torch.__version__, "peak_gflops": {key: round(peak, 1) for key, peak in peaks.items()}}
    print(f"{about}, commit {commit}")
    out = Path(args.out or root / "results" / f"throughput-{slug}.json")

    with tempfile.TemporaryDirectory() as folder:
        frames = np.lib.format.open_memmap(f"{folder}/frames.npy", "w+", np.uint8, (8192, 64, 64, 3))
        frames[:] = rng.integers(256, size=frames.shape, dtype=np.uint8)
        frames.flush()
        frames = np.lib.format.open_memmap(f"{folder}/frames.npy", "r")
        ts = np.arange(1, len(frames) - 1)
        for key in todo:
            fresh = measure(*key)
            rows = json.loads(out.read_text())["rows"] if out.exists() else []
            rows = [row for row in rows if (row["stage"], row["shapes"]) != key] + fresh
            rows.sort(key=lambda row: list(SHAPES).index((row["stage"], row["shapes"])))
            out.parent.mkdir(exist_ok=True)
            out.write_text(json.dumps({**about, "rows": rows}, indent=1))
    print_table(rows)
    print(f"\nwrote {out}")
