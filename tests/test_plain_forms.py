"""What makes training fast against the plain form that it replaces: loss, gradients, batches."""

import contextlib
from types import MethodType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import finetune, ppo, pretrain

HYPER = SimpleNamespace(clip_coef=0.2, clip_vloss=True, ent_coef=0.01, vf_coef=0.5)


def gradients(*modules):
    return torch.cat([p.grad.flatten() for m in modules for p in m.parameters() if p.grad is not None])


def relative(a, b):
    """How far a is from b, |a - b| / |b|."""
    return float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b))


def random_frames(n):
    """Smooth frames (n, 64, 64, 3) uint8: a network's gradients on noise would drown in rounding."""
    coarse = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    frames = F.interpolate(coarse, size=64, mode="bilinear") * 255
    return frames.byte().permute(0, 2, 3, 1).contiguous().numpy()


def plain_first_conv(self, frames, z):
    """The FDM's first layer as the paper writes it: latents broadcast over the image."""
    return self.down_convs[0](torch.cat([frames, z[:, :, None, None].expand(-1, -1, 64, 64)], dim=1))


def plain_windows(frames, t):
    stacked = np.concatenate([frames[t - 1], frames[t], frames[t + 1]], axis=-1).transpose(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(stacked)).float() / 255 - 0.5


@pytest.mark.parametrize("use_vq, bf16", [(False, False), (True, False), (False, True)])
def test_pretraining_loss(use_vq, bf16):
    """get_windows, channels-last, the 3x3 map and bfloat16 give the loss and gradients of plain convolutions.

    In bfloat16 the quantiser is left out here, since rounding may decide which code is nearest.
    """
    frames, t = random_frames(40), np.arange(1, 33)
    losses, grads = [], []
    for plain in (True, False):
        torch.manual_seed(0)
        idm, vq, fdm = pretrain.IDM(1, 32), pretrain.VQ(2, 4, 4, 64, 0.05, 0.999), pretrain.FDM(32, 8)
        if plain:
            fdm.first_conv = MethodType(plain_first_conv, fdm)
            windows = plain_windows(frames, t)
        else:
            idm, fdm = (network.to(memory_format=torch.channels_last) for network in (idm, fdm))
            windows = pretrain.get_windows(frames, t, "cpu")
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16 and not plain):
            prediction, vq_loss, *_ = pretrain.predict(idm, vq if use_vq else None, fdm, windows)
        loss = F.mse_loss(prediction, windows[:, 6:]) + vq_loss
        loss.backward()
        losses.append(loss.item())
        grads.append(gradients(idm, fdm))
    assert losses[1] == pytest.approx(losses[0], rel=2e-2 if bf16 else 1e-5)
    assert relative(grads[1], grads[0]) < (2e-1 if bf16 else 2e-3)


def test_windows(tmp_path):
    """o_{t-1}, o_t, o_{t+1} on channels, channels-last, from a memory-mapped file, in any order."""
    np.save(tmp_path / "frames.npy", random_frames(50))
    frames = np.load(tmp_path / "frames.npy", mmap_mode="r")
    t = np.array([48, 1, 17, 17, 30])
    windows = pretrain.get_windows(frames, t, "cpu")
    assert windows.shape == (5, 9, 64, 64) and windows.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(windows, plain_windows(frames, t), rtol=0, atol=1e-7)
    for j in range(3):  # a pixel by hand
        want = frames[47 + j, 20, 30].astype(np.float32) / 255 - 0.5
        np.testing.assert_allclose(windows[0, 3 * j : 3 * j + 3, 20, 30].numpy(), want, atol=1e-6)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("stored_features", [False, True])
def test_ppo_update(stored_features, bf16):
    """Channels-last, bfloat16, micro-batches and stored features give a plain minibatch's loss."""
    g = torch.Generator().manual_seed(0)
    obs, actions = torch.from_numpy(random_frames(50)), torch.randint(15, (50,), generator=g)
    noise, advantages, returns, values = torch.randn(4, 50, generator=g)
    batch = actions, noise * 0.1 - 2.7, advantages, returns, values
    torch.manual_seed(0)
    agent = finetune.FinetunedAgent(0.5, 1, 8, (16,), sl=False) if stored_features else ppo.Agent(0.5)
    torch.nn.init.normal_(agent.actor.weight, std=0.1)
    hidden = agent.network((obs.float() / 255 - 0.5).permute(0, 3, 1, 2).contiguous())
    plain, _ = ppo.ppo_loss(agent.actor(hidden), agent.critic(hidden).squeeze(-1), *batch, HYPER)
    plain.backward()
    expected, total = gradients(agent), 0.0
    agent = agent.to(memory_format=torch.channels_last)
    agent.zero_grad()
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
    with torch.no_grad():
        inputs = agent.features(obs, autocast) if stored_features else obs
    for i in torch.arange(50).split(16):  # 16, 16, 16, 2
        with contextlib.nullcontext() if stored_features else autocast:
            logits, value = agent(inputs[i])
        loss, _ = ppo.ppo_loss(logits, value, *(x[i] for x in batch), HYPER)
        (loss * len(i) / 50).backward()
        total += loss.item() * len(i) / 50
    assert total == pytest.approx(plain.item(), rel=2e-2 if bf16 else 1e-5)
    assert relative(gradients(agent), expected) < (1e-1 if bf16 else 1e-4)
