"""How fast is every stage, and what does each optimisation buy? The plain form against the script's.

    python benchmark/throughput.py                          # every stage
    python benchmark/throughput.py --stages pretrain load   # only these; other stages' rows in the file stay
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 python benchmark/throughput.py   # as a CPU without bf16

All variants of a stage run in one process and take turns, so that whatever else the machine does hits them
alike; a rate is the median over the rounds. A row with a "+" adds one optimisation to the row above; the row
with a "=" is what the script does. Bfloat16 is timed where the scripts choose it, on CUDA GPUs, and with
--bf16: on a CPU without it a single step can take minutes.

Writes benchmark/results/throughput-DEVICE.json; DEVICE is, on a CPU, its threads and bf16, avx2 or avx512.
"rate" counts windows or frames per second, "gflop" is the work of one (multiply and add: 2), "share_of_peak"
is rate x gflop / the best matrix product in the row's precision.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
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
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import lapo_bc as bc  # noqa: E402
import lapo_finetune_ppo as finetune  # noqa: E402
import lapo_pretrain as pretrain  # noqa: E402
import ppo_procgen as ppo  # noqa: E402

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
PLAIN, LAYOUT = "plain: float32, contiguous", ["bfloat16", "channels-last"]
ADAM = ["fused Adam", "in-place operations"]
VARIANTS = {  # the plain form, and what is added to it, one after the other; with all of it, the script's
    "pretrain": [f"{PLAIN}, broadcast z, DataLoader", *LAYOUT, "z on a 3x3 map", "one copy of frames", *ADAM],
    "load": ["plain: DataLoader", "2 workers", "one copy of frames"],
    "clone": [f"{PLAIN}, DataLoader, labels anew", *LAYOUT, "labels once", "one copy of frames", *ADAM],
    "ppo": [f"{PLAIN}, minibatch in one piece", *LAYOUT, "micro-batches", *ADAM],
    "finetune": [f"{PLAIN}, features anew", *LAYOUT, "stored features", *ADAM],
    "env": ["plain: ProcgenEnv, a dictionary per game", "ProcgenGym3Env"],
}


@dataclass
class Args:
    stages: tuple[str, ...] = tuple(VARIANTS)  # what to measure
    shapes: tuple[str, ...] = ()  # only these shapes, by their names in SHAPES, e.g. quickstart; default: all
    bf16: tyro.conf.DisallowNone[bool | None] = None  # forward passes in bfloat16; default: on CUDA GPUs
    rounds: int = 5  # turns of every variant; its rate is the median over them
    seconds: float = 2.0  # the least duration of a turn
    out: str | None = None  # where the JSON goes; default benchmark/results/throughput-DEVICE.json


def seconds(work, repeats=1):
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def best_rate(product, flops):
    """GFLOP/s of a matrix product, a function, at its fastest."""
    seconds(product)
    repeats = math.ceil(0.1 / seconds(product))
    least = min(seconds(product, repeats) / repeats for _ in range(5))
    return flops / least / 1e9


@torch.inference_mode()
def measure_peaks():
    """The best matrix product, GFLOP/s, by precision: a @ b, or a 1x1 convolution if that is faster."""
    sizes = (256, 1024, 2048)
    if device.type == "cuda":
        sizes = (4096, 8192)
    best = {"float32": 0.0, "bfloat16": 0.0}
    for precision in best:
        dtype = getattr(torch, precision)
        for n in sizes:
            a = torch.rand(n, n, device=device, dtype=dtype)
            b = torch.rand(n, n, device=device, dtype=dtype)
            image = a.view(1, 32, n // 32, n).permute(0, 3, 1, 2)  # (1, n, 32, n / 32), channels-last
            kernel = b.view(n, n, 1, 1)
            for product in (partial(torch.mm, a, b), partial(F.conv2d, image, kernel)):
                best[precision] = max(best[precision], best_rate(product, 2 * n**3))
                if best[precision] < 0.2 * best["float32"]:  # given up: the device has no instructions for it
                    return best
    return best


def plain_windows(frames, ts):
    """Windows around times ts (B,), one by one: (B, 9, 64, 64)."""
    windows = []
    for t in ts:
        window = np.concatenate(frames[t - 1 : t + 2], axis=-1).transpose(2, 0, 1)
        windows.append(torch.from_numpy(window).float() / 255 - 0.5)
    return torch.stack(windows)


def plain_batches(s, num_workers=0):
    collate = partial(plain_windows, s.frames)
    how = {"shuffle": True, "drop_last": True, "collate_fn": collate, "num_workers": num_workers}
    while True:
        yield from DataLoader(s.ts, s.batch, **how)


def plain_first_conv(self, frames, z):
    """FDM.first_conv as the paper writes it: the latent broadcast over the image."""
    z = z[:, :, None, None].expand(-1, -1, *frames.shape[2:])
    return self.down_convs[0](torch.cat([frames, z], dim=1))


def plain_block(self, x):
    """ResidualBlock.forward without in-place operations."""
    return x + self.conv1(torch.relu(self.conv0(torch.relu(x))))


def layout(on):
    return torch.channels_last if "channels-last" in on else torch.contiguous_format


def prepare(network, on):
    """Moves a network and its inputs to their memory layout; gives the plain form its plain blocks."""

    def to_layout(module, inputs):  # no copy of inputs that have the layout already
        return inputs[0].contiguous(memory_format=layout(on))

    for module in network.modules():  # every script has its own classes of these names
        if type(module).__name__ == "ImpalaCNN":
            module.conv.register_forward_pre_hook(to_layout)
        if type(module).__name__ == "ResidualBlock" and "in-place operations" not in on:
            module.forward = MethodType(plain_block, module)
    return network.to(device, memory_format=layout(on))


def draw(s):
    """Times of a batch of windows (B,)."""
    return s.ts[torch.randint(len(s.ts), (s.batch,)).numpy()]


def pretrain_step(s, on, autocast):
    """An update of lapo_pretrain.py."""
    latent_dim = 2 * 4 * s.vq_dim
    idm = pretrain.IDM(s.idm_scale, latent_dim, s.patch_size)
    vq = pretrain.VQ(2, 4, s.vq_dim, 64, 0.05, 0.999)
    fdm = pretrain.FDM(latent_dim, s.fdm_width, patch_size=s.patch_size)
    if "z on a 3x3 map" not in on:
        fdm.first_conv = MethodType(plain_first_conv, fdm)
    lapo = prepare(pretrain.LAPO(idm, vq, fdm), on)
    optimizer = torch.optim.Adam(lapo.parameters(), fused="fused Adam" in on)
    batches = plain_batches(s)

    def step():
        if "one copy of frames" in on:
            windows = pretrain.get_windows(s.frames, draw(s), device)
        else:
            windows = next(batches).to(device, memory_format=layout(on))
        with autocast:
            prediction, vq_loss, _ = lapo(windows)
        loss = F.mse_loss(prediction, windows[:, 6:]) + vq_loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(lapo.parameters(), 2.0)
        optimizer.step()

    return step


def load_step(s, on, autocast):
    """A batch of float windows (B, 9, 64, 64)."""
    batches = plain_batches(s, num_workers=2 if "2 workers" in on else 0)
    if "one copy of frames" in on:
        return lambda: pretrain.get_windows(s.frames, draw(s), device)
    return lambda: next(batches).to(device)


def clone_step(s, on, autocast):
    """An update of lapo_bc.py, with its share of the labelling."""
    latent_dim = 2 * 4 * s.vq_dim
    idm = prepare(bc.IDM(s.idm_scale, latent_dim, s.patch_size).requires_grad_(False), on)
    policy = prepare(bc.LatentPolicy(s.policy_scale, latent_dim, s.patch_size), on)
    optimizer = torch.optim.Adam(policy.parameters(), fused="fused Adam" in on)
    labels = torch.zeros(s.batch, latent_dim)
    share = math.ceil(s.batch * s.labels)  # windows to label for an update, where that is done once
    batches = plain_batches(s)

    def step():
        with autocast:
            if "one copy of frames" in on:
                z = policy(torch.from_numpy(s.frames[draw(s)]).to(device))
            else:
                windows = next(batches).to(device)
                z = policy.head(policy.network(windows[:, 3:6])).float()
            if "labels once" in on:
                idm(bc.get_windows(s.frames, draw(s)[:share], device))
                target = labels.to(device)
            else:
                target = idm(windows)
        loss = F.mse_loss(z, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def ppo_updates(agent, forward, n, on):
    """PPO's update on a minibatch of n, a function; forward(inputs) -> logits (n, 15) and values (n,)."""
    params = [p for p in agent.parameters() if p.requires_grad]
    micro_batch_size = n
    if "micro-batches" in on and device.type == "cpu":
        micro_batch_size = 128
    actions = torch.zeros(n, dtype=torch.long, device=device)
    logprobs, advantages, returns, values = torch.zeros(4, n, device=device)
    optimizer = torch.optim.Adam(params, fused="fused Adam" in on)

    def update(inputs):
        optimizer.zero_grad()
        for i in torch.randperm(n, device=device).split(micro_batch_size):
            logits, newvalue = forward(inputs[i])
            rollout = actions[i], logprobs[i], advantages[i], returns[i], values[i]
            loss, _ = ppo.ppo_loss(logits, newvalue, *rollout, ppo.Args)
            (loss * len(i) / n).backward()
        nn.utils.clip_grad_norm_(params, 0.5)
        optimizer.step()

    return update


def ppo_step(s, on, autocast):
    """The update of ppo_procgen.py on a minibatch."""
    agent = prepare(ppo.Agent(1.0), on)
    obs = torch.from_numpy(s.frames[: s.batch].copy()).to(device)
    update = ppo_updates(agent, autocast(agent.forward), s.batch, on)
    return lambda: update(obs)


def finetune_step(s, on, autocast):
    """What lapo_finetune_ppo.py does with a minibatch's frames, without the game: acting, three updates."""
    agent = prepare(finetune.FinetunedAgent(4.0, 1, 128, (192, 128, 64)), on)
    obs = torch.from_numpy(s.frames[: s.batch].copy()).to(device)
    stored = "stored features" in on

    @autocast
    def features(obs):
        return agent.features(obs, nullcontext())

    def forward(inputs):
        return agent(inputs if stored else features(inputs))

    update = ppo_updates(agent, forward, s.batch, on)

    def step():
        with torch.no_grad():
            acting = torch.cat([features(x) for x in obs.split(64)])  # 64 games
            agent(acting)
        for _ in range(3):
            update(acting if stored else obs)

    return step


def env_step(s, on, autocast):
    """A step of Procgen's games."""
    action = np.arange(s.batch, dtype=np.int32) % 15
    env = ppo.make_env("coinrun", s.batch, 0, 0, 1)  # silences gym, too
    if "ProcgenGym3Env" not in on:
        from procgen import ProcgenEnv

        env = ProcgenEnv(num_envs=s.batch, env_name="coinrun", distribution_mode="easy", rand_seed=1)
        return lambda: env.step(action)
    return lambda: (env.act(action), env.observe())


BUILDERS = {
    "pretrain": pretrain_step,
    "load": load_step,
    "clone": clone_step,
    "ppo": ppo_step,
    "finetune": finetune_step,
    "env": env_step,
}


def build(stage, s, on):
    """A variant's step, after a warm-up, and its row without rates."""
    precision = "bfloat16" if "bfloat16" in on else "float32"
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")
    torch.manual_seed(0)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step = BUILDERS[stage](s, on, autocast)
    with FlopCounterMode(display=False) as counter:
        step()  # this is the warm-up, too
    name = on[-1]
    if len(on) > 1:
        name = f"+ {name}"
    gflop = round(counter.get_total_flops() / s.batch / 1e9, 4)
    row = {"stage": stage, "shapes": s.name, "variant": name, "precision": precision, "gflop": gflop}
    peak = torch.cuda.max_memory_allocated() - before
    if peak:
        row["gpu_memory_gb"] = round(peak / 1e9, 3)
    return step, row


def measure(stage, shapes, frames, bf16, peaks, args):
    """The rows of a stage; its variants take turns."""
    ts = np.arange(1, len(frames) - 1)  # the windows' times
    s = SimpleNamespace(name=shapes, frames=frames, ts=ts, **SHAPES[stage, shapes])
    options = [option for option in VARIANTS[stage] if bf16 or option != "bfloat16"]
    steps = []
    rows = []
    for k in range(1, len(options) + 1):
        step, row = build(stage, s, options[:k])
        steps.append(step)
        rows.append({**row, "rounds": []})
    rows[-1]["variant"] += " (= the script)"
    repeats = [math.ceil(args.seconds / seconds(step)) for step in steps]
    for _ in range(args.rounds):
        for step, n, row in zip(steps, repeats, rows):
            row["rounds"].append(round(n * s.batch / seconds(step, n), 2))
    for row in rows:
        row["rate"] = median(row["rounds"])
        ratio = median(a / b for a, b in zip(row["rounds"], rows[0]["rounds"]))  # of the same round
        share = row["gflop"] * row["rate"] / peaks[row["precision"]]
        row["ratio_to_plain"] = round(ratio, 2)
        row["share_of_peak"] = round(share, 3) or None
        row["commit"] = commit()
        of_peak = f"{share:6.0%}" if share else ""
        print(f"{stage:9s}{row['variant']:60s}{row['rate']:10.1f}/s{ratio:7.2f}{of_peak}", flush=True)
    return rows


def commit():
    return subprocess.getoutput(f"git -C '{HERE}' describe --always --dirty")


def device_name(peaks, count):
    """A GPU's name, or a CPU's number of threads or processes and its kind."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    if peaks["bfloat16"] > peaks["float32"]:
        return f"cpu{count}-bf16"
    return f"cpu{count}-{torch.backends.cpu.get_cpu_capability()}"


def print_table(todo, rows):
    """For docs/performance.md."""
    print("\n| stage, shapes | plain, per s | script, per s | ratio | share of peak |\n|---|---|---|---|---|")
    for key in todo:
        mine = [row for row in rows if (row["stage"], row["shapes"]) == key]
        plain = mine[0]
        script = mine[-1]
        share = ""
        if script["share_of_peak"]:
            share = f"{script['share_of_peak']:.0%} of {script['precision']}'s"
        rates = f"{plain['rate']:.4g} | {script['rate']:.4g} | **{script['ratio_to_plain']:.2f}**"
        print(f"| {', '.join(key)} | {rates} | {share} |")


def main(args):
    unknown = {*args.stages, *args.shapes}.difference(*SHAPES)
    if unknown:
        sys.exit(f"error: unknown --stages or --shapes {', '.join(unknown)}: choose of {list(SHAPES)}")
    todo = []
    for stage, shapes in SHAPES:
        if stage in args.stages and (not args.shapes or shapes in args.shapes):
            todo.append((stage, shapes))
    bf16 = args.bf16
    if bf16 is None:
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    peaks = measure_peaks()
    name = device_name(peaks, torch.get_num_threads())
    about = {
        "device": name,
        "imitated": "ATEN_CPU_CAPABILITY" in os.environ or "ONEDNN_MAX_CPU_ISA" in os.environ,
        "torch": torch.__version__,
        "peak_gflops": {key: round(peak, 1) for key, peak in peaks.items()},
    }
    print(f"{about}, commit {commit()}")
    out = Path(args.out or HERE / "results" / f"throughput-{name.lower().replace(' ', '-')}.json")
    rows = []
    if out.exists():
        rows = json.loads(out.read_text())["rows"]
    with tempfile.TemporaryDirectory() as folder:
        noise = np.random.default_rng(0).integers(256, size=(8192, 64, 64, 3), dtype=np.uint8)
        np.save(f"{folder}/frames.npy", noise)
        frames = np.load(f"{folder}/frames.npy", mmap_mode="r")
        for key in todo:
            new = measure(*key, frames, bf16, peaks, args)
            rows = [row for row in rows if (row["stage"], row["shapes"]) != key] + new
            out.write_text(json.dumps({**about, "rows": rows}, indent=1))
    print_table(todo, rows)
    print(f"\nwrote {out}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
