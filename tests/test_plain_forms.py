"""Every optimisation against the plain form that it replaces: same loss, same gradients, same batches, same memory for more data."""

import json
import subprocess
import sys
from types import MethodType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ENV_ID, ROOT, TOY, bc, collect, decode, finetune, inline, pretrain

HYPER = SimpleNamespace(clip_coef=0.2, clip_vloss=True, ent_coef=0.01, vf_coef=0.5)


def gradients(module):
    return torch.cat([p.grad.float().flatten() for p in module.parameters() if p.grad is not None])


def relative(a, b):
    """How far a is from b, |a - b| / |b|."""
    return float(torch.linalg.vector_norm(torch.as_tensor(a) - torch.as_tensor(b)) / torch.linalg.vector_norm(torch.as_tensor(b)))


def random_frames(n, seed=0):
    """Smooth frames (n, 64, 64, 3) uint8: a network's gradients on noise would drown in rounding."""
    coarse = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return (F.interpolate(coarse, size=64, mode="bilinear") * 255).byte().permute(0, 2, 3, 1).contiguous().numpy()


def plain_fdm(fdm):
    """The FDM with its first layer as the paper writes it: latents broadcast over the image."""

    def first_conv(self, frames, z):
        return self.down_convs[0](torch.cat([frames, z[:, :, None, None].expand(-1, -1, 64, 64)], dim=1))

    fdm.first_conv = MethodType(first_conv, fdm)
    return fdm


@pytest.mark.parametrize(
    "use_vq, bf16, tolerance, gradient_tolerance", [(False, False, 1e-5, 2e-3), (True, False, 1e-5, 2e-3), (False, True, 2e-2, 2e-1)]
)
def test_pretraining_loss(use_vq, bf16, tolerance, gradient_tolerance):
    """get_windows, channels-last, the 3x3 map and bfloat16 give the loss and gradients of plain float32 convolutions on plain arrays.

    The quantiser computes in float32 in every run; in bfloat16 it is left out here, since rounding may decide which code is nearest.
    """
    frames, t = random_frames(40), np.arange(1, 33)
    losses, grads = [], []
    for plain in (True, False):
        torch.manual_seed(0)
        idm, vq, fdm = pretrain.IDM(1, 32), pretrain.VQ(2, 4, 4, 64, 0.05, 0.999), pretrain.FDM(32, 8)
        if plain:
            fdm = plain_fdm(fdm)
            stacked = np.concatenate([frames[t - 1], frames[t], frames[t + 1]], axis=-1).transpose(0, 3, 1, 2)
            windows = torch.from_numpy(np.ascontiguousarray(stacked)).float() / 255 - 0.5
        else:
            idm, fdm = idm.to(memory_format=torch.channels_last), fdm.to(memory_format=torch.channels_last)
            windows = pretrain.get_windows(frames, t, "cpu")
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16 and not plain)
        prediction, vq_loss, *_ = pretrain.predict(idm, vq if use_vq else None, fdm, windows, autocast)
        loss = F.mse_loss(prediction, windows[:, 6:]) + vq_loss
        loss.backward()
        losses.append(loss.item())
        grads.append(torch.cat([gradients(idm), gradients(fdm)]))
    assert losses[1] == pytest.approx(losses[0], rel=tolerance)
    assert relative(grads[1], grads[0]) < gradient_tolerance


@pytest.mark.parametrize("module", [pretrain, bc, decode])
def test_windows_equal_the_plain_ones(module, tmp_path):
    """get_windows from a memory-mapped file gives concatenated frames / 255 - 0.5, channels-last, for any order of t, doubles included."""
    np.save(tmp_path / "frames.npy", random_frames(50))
    frames = np.lib.format.open_memmap(tmp_path / "frames.npy", mode="r")
    t = np.array([48, 1, 17, 17, 30])
    windows = module.get_windows(frames, t, "cpu")
    plain = np.concatenate([frames[t - 1], frames[t], frames[t + 1]], axis=-1).transpose(0, 3, 1, 2)
    torch.testing.assert_close(windows, torch.from_numpy(plain.copy()).float() / 255 - 0.5, rtol=0, atol=1e-7)
    assert windows.is_contiguous(memory_format=torch.channels_last)


def ppo_batch(n, seed=0):
    """Observations (n, 64, 64, 3) uint8 and the rest of a PPO minibatch, all (n,)."""
    g = torch.Generator().manual_seed(seed)
    rest = (torch.randn(n, generator=g) for _ in range(4))  # log-probabilities near those of an even policy, advantages, returns, values
    logprobs, advantages, returns, values = rest
    return torch.from_numpy(random_frames(n)), (torch.randint(15, (n,), generator=g), logprobs * 0.1 - 2.7, advantages, returns, values)


@pytest.mark.parametrize("bf16, tolerance, gradient_tolerance", [(False, 1e-5, 1e-4), (True, 2e-2, 5e-2)])
def test_ppo_loss(bf16, tolerance, gradient_tolerance):
    """uint8 storage, channels-last, bfloat16 and micro-batches give the loss and gradients of a float32 minibatch in one piece."""
    obs, batch = ppo_batch(50)
    torch.manual_seed(0)
    agent = collect.Agent(0.5)
    hidden = agent.network((obs.float() / 255 - 0.5).permute(0, 3, 1, 2).contiguous())
    plain, _ = collect.ppo_loss(agent.actor(hidden), agent.critic(hidden).squeeze(-1), *batch, HYPER)
    plain.backward()
    expected = gradients(agent)
    agent = agent.to(memory_format=torch.channels_last)
    agent.zero_grad()
    total = 0.0
    for i in torch.arange(50).split(16):  # 16, 16, 16, 2
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits, value = agent(obs[i])
        loss, _ = collect.ppo_loss(logits, value, *(x[i] for x in batch), HYPER)
        (loss * len(i) / 50).backward()
        total += loss.item() * len(i) / 50
    assert total == pytest.approx(plain.item(), rel=tolerance)
    assert relative(gradients(agent), expected) < gradient_tolerance


def test_ppo_loss_against_its_definition():
    """ppo_loss is CleanRL's, one frame at a time; what it logs is what it says."""
    _, (actions, logprobs, advantages, returns, values) = ppo_batch(20)
    g = torch.Generator().manual_seed(1)
    logits, new = torch.randn(20, 15, generator=g), torch.randn(20, generator=g)
    loss, logged = finetune.ppo_loss(logits, new, actions, logprobs, advantages, returns, values, HYPER)
    pg, v, entropy, kl, clipped = [], [], [], [], []
    for i in range(20):
        p = logits[i].double().softmax(0)
        ratio = float(p[actions[i]] / logprobs[i].double().exp())
        a, old, target = float(advantages[i]), float(values[i]), float(returns[i])
        pg.append(max(-a * ratio, -a * min(max(ratio, 0.8), 1.2)))
        near = old + min(max(float(new[i]) - old, -0.2), 0.2)
        v.append(0.5 * max((float(new[i]) - target) ** 2, (near - target) ** 2))
        entropy.append(float(-(p * p.log()).sum()))
        kl.append(ratio - 1 - np.log(ratio))
        clipped.append(abs(ratio - 1) > 0.2)
    expected = [np.mean(x) for x in (pg, v, entropy, kl, clipped)]
    assert logged.tolist() == pytest.approx(expected, rel=1e-4)
    assert loss.item() == pytest.approx(expected[0] - 0.01 * expected[2] + 0.5 * expected[1], rel=1e-4)


def test_micro_batches_do_not_change_a_run(tmp_path, monkeypatch):
    """A whole PPO run in pieces of 50 and in one piece ends at the same weights, up to what Adam makes of rounding (float32, few updates)."""
    weights = []
    for size in (50, 100_000):
        flags = ["--num-train-frames", "0", "--no-bf16", "--micro-batch-size", size, "--exp-name", f"micro_{size}"]
        inline(monkeypatch, tmp_path, "collect_expert_data", *TOY["collect_expert_data"], *flags)
        path = tmp_path / "runs" / f"{ENV_ID}__micro_{size}__1" / "checkpoint.pt"
        weights.append(torch.cat([w.flatten() for w in torch.load(path, weights_only=True)["model"].values()]))
    assert 0 < relative(weights[0], weights[1]) < 1e-2


def test_stored_features_equal_recomputed_ones():
    """Fine-tuning on stored features of the frozen convolutions gives the logits and gradients of running them again, here without autocast."""
    obs, batch = ppo_batch(32)
    torch.manual_seed(0)
    agent = finetune.Agent(0.5, 1, 8, (16,)).to(memory_format=torch.channels_last)
    for frozen in (agent.network.conv, agent.frozen_fc, agent.latent_head, agent.decoder):
        frozen.requires_grad_(False)
    torch.nn.init.normal_(agent.actor.weight, std=0.1)
    with torch.inference_mode():
        stored = torch.cat([agent.features(obs[i : i + 8]) for i in range(0, 32, 8)])
    results = []
    for x in (agent.features(obs), stored.clone()):
        agent.zero_grad()
        logits, value = agent(x)
        loss, _ = finetune.ppo_loss(logits, value, *batch, HYPER)
        loss.backward()
        results.append((loss.item(), gradients(agent)))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-5)
    assert relative(results[1][1], results[0][1]) < 1e-4


@pytest.mark.parametrize("bf16, tolerance", [(False, 1e-5), (True, 2e-2)])
def test_cloning_loss(bf16, tolerance):
    """Cloning on labels computed beforehand, in other batches, is cloning on the IDM's output of the moment; uint8 HWC frames are float CHW ones."""
    frames, t = random_frames(40), np.arange(1, 33)
    torch.manual_seed(0)
    idm, policy = bc.IDM(1, 32).eval().requires_grad_(False), bc.LatentPolicy(0.5, 32)
    torch.nn.init.normal_(idm.head.weight, std=0.5)
    windows = bc.get_windows(frames, t, "cpu").contiguous()
    plain = F.mse_loss(policy.head(policy.network(windows[:, 3:6].contiguous())), idm(windows))
    plain.backward()
    expected = gradients(policy)
    policy.zero_grad()
    idm, policy = idm.to(memory_format=torch.channels_last), policy.to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        labels = torch.cat([idm(bc.get_windows(frames, chunk, "cpu")) for chunk in np.array_split(t, 3)])
        z = policy(torch.from_numpy(frames[t]))
    loss = F.mse_loss(z, labels)
    loss.backward()
    assert loss.item() == pytest.approx(plain.item(), rel=tolerance)
    assert relative(gradients(policy), expected) < 10 * tolerance


def test_fused_adam():
    """Ten steps of fused Adam are ten steps of the plain one."""
    after = []
    for fused in (False, True):
        torch.manual_seed(0)
        policy = bc.LatentPolicy(0.25, 8)
        optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3, fused=fused)
        obs = torch.from_numpy(random_frames(8))
        for _ in range(10):
            optimizer.zero_grad()
            policy(obs).pow(2).mean().backward()
            optimizer.step()
        after.append(torch.cat([p.detach().flatten() for p in policy.parameters()]))
    assert relative(after[1], after[0]) < 1e-5


def test_mean_and_std_in_chunks(tmp_path):
    """Chunk by chunk and all at once agree; the last chunk may be short."""
    np.save(tmp_path / "z.npy", np.random.default_rng(0).normal(3, 2, (1000, 8)).astype(np.float32))
    z = np.lib.format.open_memmap(tmp_path / "z.npy", mode="r")
    mean, std = bc.mean_and_std(z, chunk=64)
    np.testing.assert_allclose(mean, z.mean(0), rtol=1e-5)
    np.testing.assert_allclose(std, z.std(0) + 1e-6, rtol=1e-5)


def test_memory_does_not_grow_with_the_dataset(tmp_path):
    """benchmark/memory.py: pretraining reads ten times the (sparse) frames, 1.2 GB, and cloning three times as many, in the same memory."""
    out = tmp_path / "memory.json"
    flags = "--num-updates 120 --batch-size 16 --pretrain-frames 10000 100000 --bc-frames 10000 30000".split()
    done = subprocess.run([sys.executable, ROOT / "benchmark" / "memory.py", *flags, "--out", out], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    for stage in ("lapo_pretrain", "lapo_bc"):
        small, large = (row["peak_memory_mb"] for row in rows if row["stage"] == stage)
        assert small > 100 and abs(large - small) < 100


def test_throughput_benchmark_runs(tmp_path):
    """benchmark/throughput.py measures, prints and writes its rows; rows of stages that were not measured stay."""
    out = tmp_path / "t.json"
    out.write_text(json.dumps({"rows": [{"stage": "clone", "shapes": "paper", "rate": 7}]}))
    flags = "--rounds 1 --seconds 0.01 --num-frames 256 --stages env load".split()
    done = subprocess.run([sys.executable, ROOT / "benchmark" / "throughput.py", *flags, "--out", out], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [row["stage"] for row in rows] == ["load"] * 8 + ["clone"] + ["env"] * 2
    assert rows[8] == {"stage": "clone", "shapes": "paper", "rate": 7}
    assert all(row["rate"] > 0 and row["ratio_to_plain"] > 0 for row in rows if row["stage"] != "clone")
