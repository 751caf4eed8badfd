"""What do two processes buy? Samples a second in updates of pretraining and of PPO, with one and with two.

    python benchmark/scaling.py                        # processes of one thread each, in float32
    python benchmark/scaling.py --bf16                 # the same with forward passes in bfloat16
    python benchmark/scaling.py --shapes quickstart    # only these; other rows in the file stay

The global batch stays the same: each of two processes takes half of it. An update is the stage's, on random
frames in memory: networks, loss, averaged gradients, VQ's sums, clipping, Adam. Acting, the disk, evaluation
and saving are left out. PPO's paper: IMPALA x1, minibatches of 2,048; its quickstart: as the shipped
demonstrator was trained, x0.5 and 512.

Writes benchmark/results/scaling-DEVICE.json; DEVICE is, on a CPU, the processes and bf16, avx2 or avx512.
Both groups of processes stay alive and take turns.
"""

import json
import math
import os
import socket
import sys
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import tyro
from throughput import HERE, SHAPES, commit, device, device_name, measure_peaks, ppo, pretrain, seconds
from torch.nn.parallel import DistributedDataParallel

WORLD_SIZE = pretrain.WORLD_SIZE  # from the environment, at import: see start_group
UPDATES = {
    ("pretrain", "paper"): SHAPES["pretrain", "paper"],
    ("pretrain", "quickstart"): SHAPES["pretrain", "quickstart"],
    ("ppo", "paper"): {**SHAPES["ppo", "IMPALA x1"], "scale": 1.0},
    ("ppo", "quickstart"): {"batch": 512, "scale": 0.5},
}


@dataclass
class Args:
    stages: tuple[str, ...] = ("pretrain", "ppo")  # what to measure
    shapes: tuple[str, ...] = ("paper", "quickstart")  # at which shapes
    processes: int = 2  # how many are compared with one
    bf16: bool = False  # forward passes in bfloat16; default: float32, on every machine
    rounds: int = 5  # turns of both groups; rates and ratios of the same round are medians over them
    seconds: float = 10.0  # the least duration of a turn
    out: str | None = None  # where the JSON goes; default benchmark/results/scaling-DEVICE.json


def pretrain_update(s, frames, autocast):
    """This process's share of an update of lapo_pretrain.py, as a function."""
    latent_dim = 2 * 4 * s.vq_dim
    idm = pretrain.IDM(s.idm_scale, latent_dim, s.patch_size)
    vq = pretrain.VQ(2, 4, s.vq_dim, 64, 0.05, 0.999)
    fdm = pretrain.FDM(latent_dim, s.fdm_width, patch_size=s.patch_size)
    lapo = pretrain.LAPO(idm, vq, fdm).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(lapo.parameters(), lr=3e-4, fused=True)
    model = lapo
    if WORLD_SIZE > 1:
        model = DistributedDataParallel(lapo, forward_sync_buffers=False)

    def update():
        t = torch.randint(1, len(frames) - 1, (s.batch // WORLD_SIZE,)).numpy()
        windows = pretrain.get_windows(frames, t, device)
        with autocast:
            prediction, vq_loss, _ = model(windows)
        loss = F.mse_loss(prediction, windows[:, 6:]) + vq_loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(lapo.parameters(), 2.0)
        optimizer.step()

    return update


def ppo_update(s, frames, autocast):
    """The same of ppo_procgen.py, in micro-batches."""
    agent = ppo.Agent(s.scale).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(agent.parameters(), lr=3e-4, fused=True)
    n = s.batch // WORLD_SIZE
    obs = torch.from_numpy(frames[:n]).to(device)
    actions = torch.zeros(n, dtype=torch.long, device=device)
    logprobs, advantages, returns, values = torch.zeros(4, n, device=device)
    micro_batch_size = 128 if device.type == "cpu" else n

    def update():
        optimizer.zero_grad()
        for i in torch.randperm(n, device=device).split(micro_batch_size):
            with autocast:
                logits, newvalue = agent(obs[i])
            rollout = actions[i], logprobs[i], advantages[i], returns[i], values[i]
            loss, _ = ppo.ppo_loss(logits, newvalue, *rollout, ppo.Args)
            (loss * len(i) / n).backward()
        if WORLD_SIZE > 1:
            ppo.average_gradients(agent.parameters())
        nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
        optimizer.step()

    return update


def work(pipe, stage, shapes, bf16):
    """A process of a group. Asked for n updates, it answers with their seconds."""
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if WORLD_SIZE > 1:
        dist.init_process_group()
    torch.manual_seed(0)
    frames = np.random.default_rng(0).integers(256, size=(4096, 64, 64, 3), dtype=np.uint8)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    builders = {"pretrain": pretrain_update, "ppo": ppo_update}
    update = builders[stage](SimpleNamespace(**UPDATES[stage, shapes]), frames, autocast)
    while n := pipe.recv():
        pipe.send(seconds(update, n))
    if WORLD_SIZE > 1:
        dist.destroy_process_group()


def start_group(world_size, *arguments):
    """Starts a group of processes, which import this file and the stages with their ranks; their pipes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        os.environ["MASTER_PORT"] = str(free.getsockname()[1])
    os.environ["WORLD_SIZE"] = str(world_size)
    context = get_context("spawn")
    pipes = []
    for rank in range(world_size):
        os.environ["RANK"] = str(rank)
        os.environ["LOCAL_RANK"] = str(rank)
        ours, theirs = context.Pipe()
        context.Process(target=work, args=(theirs, *arguments), daemon=True).start()
        theirs.close()  # so that recv below fails if the process does
        pipes.append(ours)
    return pipes


def take_turn(pipes, n):
    """The seconds of n updates of a group."""
    for pipe in pipes:
        pipe.send(n)
    return max(pipe.recv() for pipe in pipes)


def measure(stage, shapes, args):
    """The rows of one process and of several, which take turns."""
    batch = UPDATES[stage, shapes]["batch"]
    precision = "bfloat16" if args.bf16 else "float32"
    rows = []
    groups = []
    repeats = []
    for count in (1, args.processes):
        row = {"stage": stage, "shapes": shapes, "precision": precision, "processes": count, "rounds": []}
        rows.append(row)
        groups.append(start_group(count, stage, shapes, args.bf16))
    for pipes in groups:
        take_turn(pipes, 2)  # the warm-up
        duration = take_turn(pipes, 2) / 2
        repeats.append(math.ceil(args.seconds / duration))
    for _ in range(args.rounds):
        for row, pipes, n in zip(rows, groups, repeats):
            row["rounds"].append(round(n * batch / take_turn(pipes, n), 2))
    for pipes in groups:
        for pipe in pipes:
            pipe.send(0)  # the end
    for row in rows:
        ratio = median(a / b for a, b in zip(row["rounds"], rows[0]["rounds"]))  # of the same round
        row["rate"] = round(median(row["rounds"]), 2)
        row["ratio_to_one"] = round(ratio, 2)
        row["torch"] = torch.__version__
        row["commit"] = commit()
        print(row, flush=True)
    return rows


def same_measurement(a, b):
    return all(a[key] == b[key] for key in ("stage", "shapes", "precision"))


def main(args):
    todo = [(stage, shapes) for stage, shapes in UPDATES if stage in args.stages and shapes in args.shapes]
    if not todo or any(UPDATES[key]["batch"] % args.processes for key in todo):
        sys.exit(f"error: choose of {list(UPDATES)}, and --processes that divide their batches")
    if device.type == "cuda" and torch.cuda.device_count() < args.processes:
        sys.exit(f"error: --processes {args.processes} take as many GPUs, not {torch.cuda.device_count()}")
    name = device_name(measure_peaks(), args.processes)
    out = Path(args.out or HERE / "results" / f"scaling-{name.lower().replace(' ', '-')}.json")
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes, as torchrun has it

    rows = []
    if out.exists():
        rows = json.loads(out.read_text())["rows"]
    table = []
    for key in todo:
        one, several = measure(*key, args)
        rows = [row for row in rows if not same_measurement(row, one)] + [one, several]
        out.write_text(json.dumps({"device": name, "rows": rows}, indent=1))
        rates = f"{one['rate']:.4g} | {several['rate']:.4g} | **{several['ratio_to_one']:.2f}**"
        table.append(f"| {', '.join(key)} | {rates} |")
    print(f"\n| stage, shapes | 1 process, per s | {args.processes} processes | ratio |")  # for docs/scale.md
    print("|---" * 4 + "|", *table, f"\nwrote {out}", sep="\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
