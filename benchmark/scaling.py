"""What do two processes buy? Samples a second in updates of pretraining and of PPO, with one and with two.

    python benchmark/scaling.py                        # processes of one thread each, in float32
    python benchmark/scaling.py --bf16                 # the same with forward passes in bfloat16
    python benchmark/scaling.py --shapes quickstart    # only these; other rows in the file stay

The global batch stays the same: each of two processes takes half of it. An update is the stage's, on random
frames in memory: networks, loss, all-reduces (`average`, VQ's sums, `Run.due`), clipping, Adam. Acting, where
PPO gathers the rewards of every step, the disk, evaluation and saving are left out. PPO's paper: IMPALA x1,
minibatches of 2,048; its quickstart: as the shipped demonstrator was trained, x0.5 and 512.

Writes benchmark/results/scaling-DEVICE.json; DEVICE is, on a CPU, the processes and bf16, avx2 or avx512.
Both groups of processes stay alive and take turns. "communication" is the share of the time in all-reduces,
the mean over the processes; waiting there for a slower one counts. A GPU's queue is emptied around them.
"""

import json
import math
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import tyro
from throughput import SHAPES, device, measure_peaks, ppo, pretrain, seconds

LAST, WORLD_SIZE = torch.channels_last, pretrain.WORLD_SIZE  # from the environment, at import: see start
SHAPES = {key: SHAPES[key] for key in SHAPES if key[0] == "pretrain"} | {
    ("ppo", "paper"): SHAPES["ppo", "IMPALA x1"] | {"scale": 1.0},
    ("ppo", "quickstart"): {"batch": 512, "scale": 0.5},
}


@dataclass
class Args:
    stages: tuple[str, ...] = ("pretrain", "ppo")  # what to measure
    shapes: tuple[str, ...] = ("paper", "quickstart")  # at which shapes
    processes: int = 2  # how many are compared with one
    bf16: bool = False  # forward passes in bfloat16; default: float32, on every machine
    rounds: int = 5  # turns of both groups; rates, ratios of the same round and shares are medians over them
    seconds: float = 10.0  # the least duration of a turn
    out: str | None = None  # where the JSON goes; default benchmark/results/scaling-DEVICE.json


def pretrain_losses(s, frames, autocast):
    """What lapo_pretrain.py trains, and how its loss comes about in this process's share of an update."""
    idm = pretrain.IDM(s.idm_scale, 8 * s.vq_dim, s.patch_size).to(device, memory_format=LAST)
    vq = pretrain.VQ(2, 4, s.vq_dim, 64, 0.05, 0.999).to(device)
    fdm = pretrain.FDM(8 * s.vq_dim, s.fdm_width, patch_size=s.patch_size).to(device, memory_format=LAST)
    run = SimpleNamespace(signal=0, saved=math.inf, args=pretrain.Args)  # never due

    def losses():
        t = torch.randint(1, len(frames) - 1, (s.batch // WORLD_SIZE,)).numpy()
        batch = pretrain.get_windows(frames, t, device)
        with autocast:
            prediction, vq_loss, *_ = pretrain.predict(idm, vq, fdm, batch)
        yield F.mse_loss(prediction, batch[:, 6:]) + vq_loss
        pretrain.Run.due(run)

    return [*idm.parameters(), *fdm.parameters()], losses


def ppo_losses(s, frames, autocast):
    """The same of ppo_procgen.py: the losses of the micro-batches of its share of a minibatch."""
    agent, n = ppo.Agent(s.scale).to(device, memory_format=LAST), s.batch // WORLD_SIZE
    obs, actions = torch.from_numpy(frames[:n]).to(device), torch.zeros(n, dtype=torch.long, device=device)
    others = torch.zeros(4, n, device=device)  # logprobs, advantages, returns, values

    def losses():
        for i in torch.randperm(n, device=device).split(128 if device.type == "cpu" else n):
            with autocast:
                logits, newvalue = agent(obs[i])
            loss, _ = ppo.ppo_loss(logits, newvalue, actions[i], *others[:, i], ppo.Args)
            yield loss * len(i) / n

    return list(agent.parameters()), losses


def work(pipe, stage, shapes, bf16):
    """A process of a group. Asked for n updates, it answers with their seconds, and those in all-reduces."""
    if WORLD_SIZE > 1:
        pretrain.join_others()
    all_reduce, inside = dist.all_reduce, []

    def timed(*arguments):
        seconds(lambda: None)  # what a GPU still has to do
        inside.append(seconds(lambda: all_reduce(*arguments)))

    dist.all_reduce = timed
    torch.manual_seed(0)
    frames = np.random.default_rng(0).integers(256, size=(4096, 64, 64, 3), dtype=np.uint8)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    shapes = SimpleNamespace(**SHAPES[stage, shapes])
    params, losses = globals()[f"{stage}_losses"](shapes, frames, autocast)
    optimizer = torch.optim.Adam(params, lr=3e-4, fused=True)

    def update():
        optimizer.zero_grad()
        for loss in losses():
            loss.backward()
        pretrain.average(loss, params)
        nn.utils.clip_grad_norm_(params, 2.0)
        optimizer.step()

    while n := pipe.recv():
        pipe.send((seconds(update, n), sum(inside)))
        inside.clear()


def start(world_size, *arguments):
    """Starts a group of processes, which import this file and the stages with their ranks; their pipes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    pipes = [get_context("spawn").Pipe() for _ in range(world_size)]
    for rank, (_, theirs) in enumerate(pipes):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        get_context("spawn").Process(target=work, args=(theirs, *arguments), daemon=True).start()
        theirs.close()  # so that recv below fails if the process does
    return [ours for ours, _ in pipes]


def measure(stage, shapes):
    """The rows of one process and of several, which take turns."""

    def turn(pipes, n):  # n updates: their seconds, and the share of them in all-reduces
        for pipe in pipes:
            pipe.send(n)
        found = [pipe.recv() for pipe in pipes]
        return max(total for total, _ in found), mean(inside / total for total, inside in found)

    batch, precision = SHAPES[stage, shapes]["batch"], "bfloat16" if args.bf16 else "float32"
    row, counts = {"stage": stage, "shapes": shapes, "precision": precision}, (1, args.processes)
    rows = [{**row, "processes": count, "rounds": [], "communication": []} for count in counts]
    groups = [start(count, stage, shapes, args.bf16) for count in counts]
    once = [[turn(pipes, 2)[0] / 2 for pipes in groups] for _ in range(2)][1]  # after a warm-up
    for _ in range(args.rounds):
        for row, pipes, duration in zip(rows, groups, once):
            n = math.ceil(args.seconds / duration)
            total, share = turn(pipes, n)
            row["rounds"].append(round(n * batch / total, 2))
            row["communication"].append(round(share, 4))
    for pipe in sum(groups, []):
        pipe.send(0)  # the end
    for row in rows:
        ratio = median(a / b for a, b in zip(row["rounds"], rows[0]["rounds"]))  # of the same round
        row |= {"rate": round(median(row["rounds"]), 2), "ratio_to_one": round(ratio, 2)}
        row |= {"communication": round(median(row["communication"]), 4)}
        row |= {"torch": torch.__version__, "commit": commit}
        print(row, flush=True)
    return rows


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    todo = [key for key in SHAPES if key[0] in args.stages and key[1] in args.shapes]
    if not todo or any(SHAPES[key]["batch"] % args.processes for key in todo):
        sys.exit(f"error: choose of {list(SHAPES)}, and --processes that divide their batches")
    if device.type == "cuda" and torch.cuda.device_count() < args.processes:
        sys.exit(f"error: --processes {args.processes} take as many GPUs, not {torch.cuda.device_count()}")
    here, peaks = Path(__file__).resolve().parent, measure_peaks()
    commit = subprocess.getoutput(f"git -C '{here}' describe --always --dirty")
    kind = "bf16" if peaks["bfloat16"] > peaks["float32"] else torch.backends.cpu.get_cpu_capability()
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"cpu{args.processes}-{kind}"
    out = Path(args.out or here / "results" / f"scaling-{name.lower().replace(' ', '-')}.json")
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes, as torchrun has it

    table = []
    for key in todo:
        one, several = new = measure(*key)
        rows = json.loads(out.read_text())["rows"] if out.exists() else []
        rows = [row for row in rows if any(row[k] != one[k] for k in ("stage", "shapes", "precision"))] + new
        out.write_text(json.dumps({"device": name, "rows": rows}, indent=1))
        rates = f"{one['rate']:.4g} | {several['rate']:.4g} | **{several['ratio_to_one']:.2f}**"
        table.append(f"| {', '.join(key)} | {rates} | {several['communication']:.0%} |")
    columns = f"stage, shapes | 1 process, per s | {args.processes} processes | ratio | communication"
    print("", f"| {columns} |", "|---" * 5 + "|", *table, f"\nwrote {out}", sep="\n")  # for docs/scale.md
