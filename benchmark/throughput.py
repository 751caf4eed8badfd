"""How fast is every stage, and what does each optimisation buy? The plain form against the scripts', switched on one by one.

    python benchmark/throughput.py                                  # every stage; about half an hour on two CPU cores
    python benchmark/throughput.py --stages pretrain load           # only these; other stages' rows in the file stay as they are

All variants of a stage run in one process and take turns, so that whatever else the machine does hits them alike; a rate is the median over
the rounds. Rows with a "+" add one optimisation to the row above; the last of them is what the script does. Rows with a "?" add one
thing to that, and are there because it was tried and not adopted.

Writes benchmark/results/throughput-DEVICE.json: {"device", "torch", "commit", "peak_gflops", "rows": [{"stage", "shapes", "variant", "rate",
"unit", "ratio_to_plain", "share_of_peak", "peak_memory_mb", "gflop", "rounds"}]}. share_of_peak is counted work x rate / the matrix product's
measured peak in the variant's precision; gflop is the counted work (multiply and add: 2) per unit, peak_memory_mb the process's peak resident
memory while the variant ran (on a GPU: allocated there).
"""

import ctypes
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
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
STAGES = ("pretrain", "load", "clone", "ppo", "finetune", "env")
SHAPES = {
    "paper": SimpleNamespace(idm_scale=4, fdm_width=24, latents=128, batch=128, policy_scale=4, clone_batch=128),
    "quickstart": SimpleNamespace(idm_scale=1, fdm_width=8, latents=32, batch=32, policy_scale=0.5, clone_batch=64),
    "quickstart-128": SimpleNamespace(idm_scale=1, fdm_width=8, latents=128, batch=128),
}


@dataclass
class Args:
    stages: tuple[str, ...] = STAGES
    """what to measure, of pretrain, load, clone, ppo, finetune, env"""
    shapes: tuple[str, ...] = tuple(SHAPES)
    """shapes for pretraining and cloning"""
    rounds: int = 5
    """turns of every variant; its rate is the median over them"""
    seconds: float = 2.0
    """the least duration of a turn"""
    num_frames: int = 32_768
    """size of the random dataset that is written to a temporary folder, 12,288 bytes a frame"""
    env_id: str = "coinrun"
    """the Procgen game that PPO plays"""
    compile: bool = False
    """try torch.compile too (on two CPU cores it compiles for one to two minutes a network)"""
    out: str | None = None
    """where the JSON goes; default benchmark/results/throughput-DEVICE.json"""


def sync():
    if device.type == "cuda":
        torch.cuda.synchronize()


def reset_peak_memory():
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # what earlier variants freed
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew


def peak_memory_mb():
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() // 2**20
    status = Path("/proc/self/status").read_text() if sys.platform == "linux" else "VmHWM: 0"
    return int(status.split("VmHWM:")[1].split()[0]) // 1024


def alternate(stage, shapes, unit, variants):
    """Measures {name: (step, gflop per unit, dtype)} in turns and returns the rows; step() does some work and says how many units it was."""
    rates, memory, repeats = {name: [] for name in variants}, dict.fromkeys(variants, 0), {}
    for turn in range(args.rounds + 1):
        for name, (step, _, _) in variants.items():
            if turn == 0:  # warm up, and see how often to repeat
                step()
                sync()
                start = time.perf_counter()
                step()
                sync()
                repeats[name] = math.ceil(args.seconds / (time.perf_counter() - start))
                continue
            reset_peak_memory()
            start, n = time.perf_counter(), 0
            for _ in range(repeats[name]):
                n += step()
            sync()
            rates[name].append(n / (time.perf_counter() - start))
            memory[name] = max(memory[name], peak_memory_mb())
    plain = next(iter(variants))
    rows = []
    print(f"\n{stage}, {shapes}", flush=True)
    print(f"{'variant':62s} {unit:>12s} {'ratio':>6s} {'of peak':>8s} {'peak MB':>8s}")
    for name, (_, gflop, dtype) in variants.items():
        rate = median(rates[name])
        ratio = median(a / b for a, b in zip(rates[name], rates[plain]))  # of the same round
        share = rate * gflop / peaks[dtype] if gflop else None
        rows.append(
            {
                "stage": stage, "shapes": shapes, "variant": name, "rate": round(rate, 2), "unit": unit, "ratio_to_plain": round(ratio, 2),
                "share_of_peak": share and round(share, 3), "peak_memory_mb": memory[name], "gflop": gflop and round(gflop, 3),
                "rounds": [round(r, 2) for r in rates[name]],
            }
        )  # fmt: skip
        shown = f"{share:8.0%}" if share else " " * 8
        print(f"{name:62s} {rate:12.1f} {ratio:6.2f} {shown} {memory[name]:8d}", flush=True)
    return rows


def count_gflop(step):
    """Counted work of one step, per unit: convolutions and matrix products, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        n = step()
    return counter.get_total_flops() / n / 1e9


def measure_peaks():
    """The device's best matrix product, GFLOP/s, by precision."""
    best = {}
    for dtype in ("float32", "bfloat16"):
        best[dtype] = 0
        for n in (1024, 2048) if device.type == "cpu" else (4096, 8192):
            a, b = (torch.rand(n, n, dtype=getattr(torch, dtype), device=device) for _ in range(2))
            repeats = max(1, int((1e10 if device.type == "cpu" else 1e13) // n**3))
            for _ in range(5):
                sync()
                start = time.perf_counter()
                for _ in range(repeats):
                    a @ b
                sync()
                best[dtype] = max(best[dtype], 2 * n**3 * repeats / (time.perf_counter() - start) / 1e9)
    return best


class Windows(Dataset):
    """The obvious Dataset: window i as float (9, 64, 64)."""

    def __init__(self, frames, ts):
        self.frames, self.ts = frames, ts

    def __len__(self):
        return len(self.ts)

    def __getitem__(self, i):
        t = self.ts[i]
        window = np.concatenate([self.frames[t - 1], self.frames[t], self.frames[t + 1]], axis=-1)
        return torch.from_numpy(window.transpose(2, 0, 1)).float() / 255 - 0.5, i


def endless(loader):
    while True:
        yield from loader


def plain_first_conv(self, frames, z):
    """down_convs[0] as the paper writes it: the latent broadcast over the image."""
    return self.down_convs[0](torch.cat([frames, z[:, :, None, None].expand(-1, -1, 64, 64)], dim=1))


def plain_block(self, x):
    """ResidualBlock without in-place operations."""
    return x + self.conv1(torch.relu(self.conv0(torch.relu(x))))


def make_plain(*modules):
    for block in (m for module in modules for m in module.modules()):
        if type(block).__name__ == "ResidualBlock":
            block.forward = MethodType(plain_block, block)


def pretrain_step(
    s, frames, ts, losses=None, seed=0, bf16=False, channels_last=False, constant_map=False, gather=False, fused=False, inplace=False,
    compiled=False,
):  # fmt: skip
    """A function that does one update of lapo_pretrain.py; its FDM loss goes to the list `losses`."""
    torch.manual_seed(seed)
    idm = pretrain.IDM(s.idm_scale, s.latents).to(device)
    vq = pretrain.VQ(2, 4, s.latents // 8, 64, 0.05, 0.999).to(device)
    fdm = pretrain.FDM(s.latents, s.fdm_width).to(device)
    if channels_last:
        idm, fdm = idm.to(memory_format=torch.channels_last), fdm.to(memory_format=torch.channels_last)
    if not constant_map:
        fdm.first_conv = MethodType(plain_first_conv, fdm)
    if not inplace:
        make_plain(idm, fdm)
    params = [*idm.parameters(), *fdm.parameters()]
    optimizer = torch.optim.Adam(params, lr=3e-4, fused=fused)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    networks = (torch.compile(idm), vq, torch.compile(fdm)) if compiled else (idm, vq, fdm)
    rng = np.random.default_rng(seed)
    loader = iter(endless(DataLoader(Windows(frames, ts), s.batch, shuffle=True, drop_last=True)))

    def step():
        windows = pretrain.get_windows(frames, ts[rng.integers(len(ts), size=s.batch)], device) if gather else next(loader)[0].to(device)
        if channels_last:
            windows = windows.contiguous(memory_format=torch.channels_last)
        elif gather:
            windows = windows.contiguous()
        prediction, vq_loss, *_ = pretrain.predict(*networks, windows, autocast)
        fdm_loss = F.mse_loss(prediction, windows[:, 6:])
        loss = fdm_loss + vq_loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(params, 2.0)
        optimizer.step()
        if losses is not None:
            losses.append(fdm_loss.item())
        return s.batch

    return step


def clone_step(s, frames, ts, bf16=False, channels_last=False, cached=False, gather=False, fused=False, inplace=False):
    """A function that does one update of lapo_bc.py."""
    torch.manual_seed(0)
    idm = bc.IDM(s.idm_scale, s.latents).to(device).eval().requires_grad_(False)
    policy = bc.LatentPolicy(s.policy_scale, s.latents).to(device)
    if channels_last:
        idm, policy = idm.to(memory_format=torch.channels_last), policy.to(memory_format=torch.channels_last)
    if not inplace:
        make_plain(idm, policy)
    optimizer = torch.optim.Adam(policy.parameters(), lr=2e-4, fused=fused)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    latents = np.zeros((len(ts), s.latents), dtype=np.float32)
    rng = np.random.default_rng(0)
    loader = iter(endless(DataLoader(Windows(frames, ts), s.clone_batch, shuffle=True, drop_last=True)))

    def step():
        if gather:
            i = rng.integers(len(ts), size=s.clone_batch)
            obs = torch.from_numpy(frames[ts[i]]).to(device)
        else:
            windows, i = next(loader)
            windows = windows.to(device)
        with autocast:
            if cached:
                target = torch.from_numpy(latents[i]).to(device)
            else:
                with torch.no_grad():
                    target = idm(windows.contiguous(memory_format=torch.channels_last) if channels_last else windows)
            if gather:
                z = policy(obs)
            else:
                x = windows[:, 3:6]
                x = x.contiguous(memory_format=torch.channels_last) if channels_last else x.contiguous()
                z = policy.head(policy.network(x)).float()
        loss = F.mse_loss(z, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return s.clone_batch

    return step


HYPER = SimpleNamespace(clip_coef=0.2, clip_vloss=True, ent_coef=0.01, vf_coef=0.5)


def ppo_step(s, returns_log=None, seed=0, layout="contiguous", bf16=False, gym3=False, micro=None, fused=False, inplace=False):
    """A function that does a rollout of 64 x s.num_steps frames and three epochs on it; the returns of its episodes go to `returns_log`."""
    torch.manual_seed(seed)
    E, num_steps = 64, s.num_steps
    agent = collect.Agent(s.scale).to(device)
    if layout == "channels_last":
        agent = agent.to(memory_format=torch.channels_last)
    if not inplace:
        make_plain(agent)
    optimizer = torch.optim.Adam(agent.parameters(), lr=5e-4, eps=1e-5, fused=fused)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    normalize_reward = collect.RewardNormalizer(E, 0.999)
    if gym3:
        env = collect.make_env(s.env_id, E, s.num_levels, 0, seed)
        next_obs = torch.tensor(env.observe()[1]["rgb"], device=device)
        obs = torch.zeros((num_steps, E, 64, 64, 3), dtype=torch.uint8, device=device)
    else:  # CleanRL's: a Python dictionary for every environment and step, observations stored as float32
        env = ProcgenEnv(num_envs=E, env_name=s.env_id, distribution_mode="easy", num_levels=s.num_levels, start_level=0, rand_seed=seed)
        next_obs = torch.Tensor(env.reset()["rgb"]).to(device)
        obs = torch.zeros((num_steps, E, 64, 64, 3), device=device)
    state = SimpleNamespace(next_obs=next_obs, next_done=torch.zeros(E, device=device), running=np.zeros(E))
    actions = torch.zeros((num_steps, E), dtype=torch.long, device=device)
    logprobs, rewards, dones, values = (torch.zeros((num_steps, E), device=device) for _ in range(4))

    def forward(x):
        if x.dtype == torch.uint8:
            return agent(x)
        x = x.permute(0, 3, 1, 2) / 255 - 0.5
        hidden = agent.network(x.contiguous() if layout == "contiguous" else x)
        return agent.actor(hidden).float(), agent.critic(hidden).float().squeeze(-1)

    def step():
        for t in range(num_steps):
            obs[t], dones[t] = state.next_obs, state.next_done
            with torch.inference_mode(), autocast:
                logits, values[t] = forward(state.next_obs)
                dist = torch.distributions.Categorical(logits=logits)
                actions[t] = dist.sample()
                logprobs[t] = dist.log_prob(actions[t])
            if gym3:
                env.act(actions[t].cpu().numpy().astype(np.int32))
                reward, ob, done = env.observe()
                state.next_obs = torch.tensor(ob["rgb"], device=device)
            else:
                ob, reward, done, infos = env.step(actions[t].cpu().numpy())
                state.next_obs = torch.Tensor(ob["rgb"]).to(device)
                for info in infos:
                    if "episode" in info:
                        break
            state.next_done = torch.tensor(done, dtype=torch.float32, device=device)
            state.running += reward
            if returns_log is not None:
                returns_log.extend(state.running[np.flatnonzero(done)])
            state.running[np.flatnonzero(done)] = 0
            rewards[t] = torch.tensor(normalize_reward(reward, done), dtype=torch.float32, device=device)
        with torch.inference_mode(), autocast:
            next_value = forward(state.next_obs)[1]
        advantages = collect.compute_gae(rewards, values, dones, next_value, state.next_done, 0.999, 0.95)
        returns = (advantages + values).flatten()
        b_obs, n = obs.flatten(0, 1), num_steps * E
        for _ in range(3):
            for mb in torch.randperm(n, device=device).chunk(s.num_minibatches):
                adv = advantages.flatten()[mb]
                adv = (adv - adv.mean()) / (adv.std() + 1e-8)
                optimizer.zero_grad()
                for i, a in zip(mb.split(micro or n), adv.split(micro or n)):
                    with autocast:
                        logits, newvalue = forward(b_obs[i])
                    batch = (actions.flatten()[i], logprobs.flatten()[i], a, returns[i], values.flatten()[i])
                    loss, _ = collect.ppo_loss(logits, newvalue, *batch, HYPER)
                    (loss * len(i) / len(mb)).backward()
                nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
                optimizer.step()
        return n

    return step


def finetune_step(num_steps, bf16=False, channels_last=False, gym3=False, cached=False, fused=False, inplace=False):
    """A function that does a rollout of 64 x num_steps frames with the cloned policy x4, convolutions frozen, and three epochs of updates on it."""
    torch.manual_seed(0)
    E = 64
    agent = finetune.Agent(4.0, 128, (192, 128, 64)).to(device)
    if channels_last:
        agent = agent.to(memory_format=torch.channels_last)
    for frozen in (agent.network.conv, agent.frozen_fc, agent.latent_head, agent.decoder):
        frozen.requires_grad_(False)
    if not inplace:
        make_plain(agent)
    trained = [p for p in agent.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-3, eps=1e-5, fused=fused)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    normalize_reward = finetune.RewardNormalizer(E, 0.999)
    if gym3:
        env = finetune.make_env(args.env_id, E, 0, 0, 1)
        next_obs = torch.tensor(env.observe()[1]["rgb"], device=device)
    else:
        env = ProcgenEnv(num_envs=E, env_name=args.env_id, distribution_mode="easy", num_levels=0, start_level=0, rand_seed=1)
        next_obs = torch.Tensor(env.reset()["rgb"]).to(device)
    state = SimpleNamespace(next_obs=next_obs, next_done=torch.zeros(E, device=device))
    if cached:
        stored = torch.zeros((num_steps, E, agent.network.fc.in_features), device=device)
    else:
        stored = torch.zeros((num_steps, *next_obs.shape), dtype=next_obs.dtype, device=device)
    actions = torch.zeros((num_steps, E), dtype=torch.long, device=device)
    offsets = torch.zeros((num_steps, E, 15), device=device)
    logprobs, rewards, dones, values = (torch.zeros((num_steps, E), device=device) for _ in range(4))

    def features(x):
        with autocast:
            if channels_last:
                return agent.features(x)
            return agent.network.conv((x.permute(0, 3, 1, 2).float() / 255 - 0.5).contiguous()).float()

    def step():
        for t in range(num_steps):
            dones[t] = state.next_done
            with torch.inference_mode():
                x = features(state.next_obs)
                stored[t] = x if cached else state.next_obs
                logits, values[t] = agent(x)
                offsets[t] = agent.decoder_logits(x) / 2
                dist = torch.distributions.Categorical(logits=logits / 2 + offsets[t])
                actions[t] = dist.sample()
                logprobs[t] = dist.log_prob(actions[t])
            if gym3:
                env.act(actions[t].cpu().numpy().astype(np.int32))
                reward, ob, done = env.observe()
                state.next_obs = torch.tensor(ob["rgb"], device=device)
            else:
                ob, reward, done, infos = env.step(actions[t].cpu().numpy())
                state.next_obs = torch.Tensor(ob["rgb"]).to(device)
                for info in infos:
                    if "episode" in info:
                        break
            state.next_done = torch.tensor(done, dtype=torch.float32, device=device)
            rewards[t] = torch.tensor(normalize_reward(reward, done), dtype=torch.float32, device=device)
        with torch.inference_mode():
            next_value = agent(features(state.next_obs))[1]
        advantages = finetune.compute_gae(rewards, values, dones, next_value, state.next_done, 0.999, 0.95)
        returns, n = (advantages + values).flatten(), num_steps * E
        for _ in range(3):
            for mb in torch.randperm(n, device=device).split(512):
                adv = advantages.flatten()[mb]
                adv = (adv - adv.mean()) / (adv.std() + 1e-8)
                x = stored.flatten(0, 1)[mb]
                if not cached:
                    with torch.no_grad():
                        x = features(x)
                logits, newvalue = agent(x)
                logits = logits / 2 + offsets.flatten(0, 1)[mb]
                b = (actions.flatten()[mb], logprobs.flatten()[mb], adv, returns[mb], values.flatten()[mb])
                optimizer.zero_grad()
                finetune.ppo_loss(logits, newvalue, *b, HYPER)[0].backward()
                nn.utils.clip_grad_norm_(trained, 0.5)
                optimizer.step()
        return n

    return step


def env_step(gym3):
    """A function that steps 64 games a hundred times."""
    actions = np.random.default_rng(0).integers(15, size=(100, 64)).astype(np.int32)
    if gym3:
        env = collect.make_env(args.env_id, 64, 0, 0, 1)
    else:
        env = ProcgenEnv(num_envs=64, env_name=args.env_id, distribution_mode="easy", num_levels=0, start_level=0, rand_seed=1)

    def step():
        for action in actions:
            if gym3:
                env.act(action)
                env.observe()
            else:
                _, _, _, infos = env.step(action)
                for info in infos:
                    if "episode" in info:
                        break
        return 6400

    return step


def cumulative(build, *shared, options):
    """{name: (step, gflop, dtype)}: "plain", then one further option a variant; the bf16 peak counts from the variant that switches bf16 on."""
    variants, chosen, last = {}, {}, None
    for name, extra in options.items():
        here = {**chosen, **extra}
        step = build(*shared, **here)
        gflop = None if extra.get("compiled") else count_gflop(step)
        variants[name] = (step, gflop or variants[last][1], "bfloat16" if here.get("bf16") else "float32")
        if not name.startswith("?"):
            chosen, last = here, name
    return variants


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    for flag, given, known in (("stages", args.stages, STAGES), ("shapes", args.shapes, SHAPES)):
        if unknown := set(given) - set(known):
            sys.exit(f"error: --{flag} {' '.join(unknown)} is unknown: choose of {', '.join(known)}")
    if device.type == "cuda":
        device_name, slug = torch.cuda.get_device_name(), torch.cuda.get_device_name().lower().replace(" ", "-")
    else:
        model = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        device_name, slug = f"{model[0] if model else 'CPU'}, {torch.get_num_threads()} threads", f"cpu{torch.get_num_threads()}"
    root = Path(__file__).resolve().parent
    out = Path(args.out or root / "results" / f"throughput-{slug}.json")
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True).stdout.strip()
    peaks = measure_peaks()
    print(f"{device_name}, torch {torch.__version__}, commit {commit}")
    print("matrix product's peak, GFLOP/s: " + ", ".join(f"{dtype} {peak:.0f}" for dtype, peak in peaks.items()))
    compile_row = {"? torch.compile": {"compiled": True}} if args.compile else {}

    def save(rows):
        """Writes the rows of a stage as soon as they are there; other rows in the file stay."""
        old = json.loads(out.read_text())["rows"] if out.exists() else []
        fresh = {(row["stage"], row["shapes"]) for row in rows}
        rows = [row for row in old if (row["stage"], row.get("shapes")) not in fresh] + [{**row, "commit": commit} for row in rows]
        rows.sort(key=lambda row: (STAGES.index(row["stage"]), [*SHAPES, row["shapes"]].index(row["shapes"])))
        results = {
            "device": device_name, "torch": torch.__version__, "commit": commit, "cores": os.cpu_count(), "rounds": args.rounds,
            "peak_gflops": {dtype: round(peak, 1) for dtype, peak in peaks.items()}, "rows": rows,
        }  # fmt: skip
        out.parent.mkdir(exist_ok=True)
        out.write_text(json.dumps(results, indent=1))

    with tempfile.TemporaryDirectory() as folder:
        frames = np.lib.format.open_memmap(f"{folder}/frames.npy", "w+", np.uint8, (args.num_frames, 64, 64, 3))
        for i in range(0, args.num_frames, 4096):
            frames[i : i + 4096] = np.random.default_rng(i).integers(256, size=frames[i : i + 4096].shape, dtype=np.uint8)
        frames.flush()
        frames = np.lib.format.open_memmap(f"{folder}/frames.npy", mode="r")
        ts = np.arange(1, args.num_frames - 1)
        if "pretrain" in args.stages:
            options = {
                "plain: fp32, eager, contiguous, broadcast, DataLoader": {},
                "+ bf16 autocast": {"bf16": True},
                "+ channels-last": {"channels_last": True},
                "+ constant latent channels on a 3x3 map": {"constant_map": True},
                "+ windows by one strided copy": {"gather": True},
                "+ fused Adam": {"fused": True},
                "+ in-place ReLU and sum (= lapo_pretrain.py)": {"inplace": True},
                **compile_row,
            }
            for name in args.shapes:
                save(alternate("pretrain", name, "samples/s", cumulative(pretrain_step, SHAPES[name], frames, ts, options=options)))
        if "load" in args.stages:
            rng = np.random.default_rng(0)
            triples = np.lib.stride_tricks.as_strided(frames, (len(frames) - 2, 3, 64, 64, 3), (frames.strides[0], *frames.strides))

            def load(n, read):
                return lambda: (read(ts[rng.integers(len(ts), size=n)]), n)[1]

            for n in (128, 32):
                variants = {}
                for workers in (0, 2):
                    loader = iter(endless(DataLoader(Windows(frames, ts), n, shuffle=True, drop_last=True, num_workers=workers)))
                    variants[f"DataLoader, {workers} workers"] = (load(n, lambda t, loader=loader: next(loader)), None, None)
                variants["float windows (= get_windows)"] = (load(n, lambda t: pretrain.get_windows(frames, t, device)), None, None)
                variants["of which the copy from the file, uint8"] = (load(n, lambda t: triples[t - 1]), None, None)
                save(alternate("load", f"windows, batch {n}", "samples/s", variants))
        if "clone" in args.stages:
            options = {
                "plain: fp32, eager, contiguous, IDM at every update, DataLoader": {},
                "+ bf16 autocast": {"bf16": True},
                "+ channels-last": {"channels_last": True},
                "+ the IDM's labels computed once": {"cached": True},
                "+ uint8 frames, one copy each": {"gather": True},
                "+ fused Adam": {"fused": True},
                "+ in-place ReLU and sum (= lapo_bc.py)": {"inplace": True},
            }
            for name in set(args.shapes) & {"paper", "quickstart"}:
                save(alternate("clone", name, "samples/s", cumulative(clone_step, SHAPES[name], frames, ts, options=options)))
    if "ppo" in args.stages:
        options = {
            "plain: CleanRL's, fp32, contiguous": {},
            "+ channels-last strides (CleanRL's permute)": {"layout": "permute"},
            "+ bf16 autocast": {"bf16": True},
            "+ uint8 storage, channels-last weights, gym3": {"gym3": True, "layout": "channels_last"},
            "+ gradients over micro-batches of 128": {"micro": 128 if device.type == "cpu" else None},
            "+ fused Adam": {"fused": True},
            "+ in-place ReLU and sum (= collect_expert_data.py)": {"inplace": True},
        }
        s = SimpleNamespace(env_id=args.env_id, num_levels=0, scale=1.0, num_steps=32, num_minibatches=1)
        save(alternate("ppo", "IMPALA x1, minibatches of 2048, 3 epochs", "frames/s", cumulative(ppo_step, s, options=options)))
    if "finetune" in args.stages:
        options = {
            "plain: CleanRL's, fp32, contiguous": {},
            "+ bf16 autocast": {"bf16": True},
            "+ uint8 storage, channels-last, gym3": {"gym3": True, "channels_last": True},
            "+ the frozen convolutions' features stored": {"cached": True},
            "+ fused Adam": {"fused": True},
            "+ in-place ReLU and sum (= lapo_finetune_ppo.py)": {"inplace": True},
        }
        save(alternate("finetune", "policy x4, minibatches of 512, 3 epochs", "frames/s", cumulative(finetune_step, 8, options=options)))
    if "env" in args.stages:
        variants = {
            "ProcgenEnv, a dictionary per game": (env_step(False), None, None),
            "ProcgenGym3Env (= the scripts)": (env_step(True), None, None),
        }
        save(alternate("env", f"64 games of {args.env_id}", "frames/s", variants))

    print(f"\nwrote {out}")
