"""On a GPU: the CPU's numbers, and every stage runs, stops and goes on. Skipped where there is none."""

import numpy as np  # noqa: I001
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    ADAM_STEP, ENV_ID, STAGES, TOY, finetune, inline, killed, ppo, pretrain, results_of,
)  # fmt: skip

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
FLAGS = {stage: [x for x in flags if x not in ("--no-cuda", "--no-bf16")] for stage, flags in TOY.items()}


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


def pretraining(device):
    idm, fdm = pretrain.IDM(1, 32), pretrain.FDM(32, 8)
    for network in (idm, fdm):
        network.to(device, memory_format=torch.channels_last)
    windows = pretrain.get_windows(random_frames(40), np.arange(1, 33), device)
    return pretrain.LAPO(idm, None, fdm)(windows)[0], windows[:, 6:], idm, fdm


def ppo_agent(device):
    agent = ppo.Agent(1)
    torch.nn.init.normal_(agent.actor.weight, std=0.1)
    agent = agent.to(device, memory_format=torch.channels_last)
    logits, values = agent(torch.from_numpy(random_frames(32)).to(device))
    return torch.cat([logits, values[:, None]], 1), torch.ones(32, 16, device=device), agent


def finetuning(device):
    agent = finetune.FinetunedAgent(1, 1, 32, (16,)).to(device, memory_format=torch.channels_last)
    obs = torch.from_numpy(random_frames(32)).to(device)
    logits, values = agent(agent.features(obs, torch.autocast(obs.device.type, enabled=False)))
    return torch.cat([logits, values[:, None]], 1), torch.ones(32, 16, device=device), agent


@pytest.mark.parametrize("build", [pretraining, ppo_agent, finetuning])
@pytest.mark.parametrize("bf16, tolerance", [(False, 1e-4), (True, 2e-2)])
def test_the_numbers_are_the_cpus(build, bf16, tolerance, monkeypatch):
    """Outputs, loss and gradients on the same batch, against the CPU's in float32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    found = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        with torch.autocast(device, torch.bfloat16, enabled=bf16 and device == "cuda"):
            output, target, *networks = build(device)
        loss = F.mse_loss(output.float(), target)
        loss.backward()
        found.append([x.detach().float().cpu() for x in (output, loss, gradients(*networks))])
    output, loss, gradient = map(relative, found[1], found[0])
    print(f"{build.__name__}, bf16 {bf16}: output {output:.1e}, loss {loss:.1e}, gradient {gradient:.1e}")
    assert max(output, loss) < tolerance and gradient < 10 * tolerance


def test_every_stage(tmp_path):
    for stage in STAGES:
        inline(tmp_path, stage, *FLAGS[stage])
        assert results_of(tmp_path, stage)["device"] == torch.cuda.get_device_name()
    flags = "--rollout-steps 4 --num-groups 5".split()
    inline(tmp_path, "tools/inspect_latents", "--env-id", ENV_ID, *flags)
    flags = "--num-labels 16 --num-draws 2 --eval-episodes 4 --idm-epochs 1 --policy-updates 2".split()
    inline(tmp_path, "vpt", "--env-id", ENV_ID, *flags, "--idm-scale", "0.25", "--policy-scale", "0.25")
    for stage in ("lapo_pretrain", "lapo_finetune_ppo"):  # killed, it goes on to the end
        flags = [*FLAGS[stage], "--exp-name", f"{stage}_killed"]
        killed(tmp_path, stage, *flags, **ADAM_STEP, n=60 if stage == "lapo_finetune_ppo" else 3)
        inline(tmp_path, stage, *flags)
        assert results_of(tmp_path, f"{stage}_killed")["args"]["bf16"] is None  # the GPU's own
