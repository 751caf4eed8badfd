"""PPO against slow definitions and plain forms, schedules, precision, the paper's settings as defaults."""

import json
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, bc, collect, decode, finetune, ppo, pretrain


@pytest.mark.parametrize("seed", range(3))
def test_gae_against_its_definition(seed):
    """The advantage is sum_l (gamma lambda)^l delta_{t+l} up to the episode's end, wherever episodes end."""
    rng = np.random.default_rng(seed)
    T, E, gamma, lam = 20, 5, 0.99, 0.9
    rewards, values, next_value = rng.normal(size=(T, E)), rng.normal(size=(T, E)), rng.normal(size=E)
    dones, next_done = rng.random((T, E)) < 0.2, rng.random(E) < 0.5
    after = np.r_[values, next_value[None]][1:]
    ends = np.r_[dones, next_done[None]][1:]  # the step at t was its episode's last
    want = np.zeros((T, E))
    for e in range(E):
        for t in range(T):
            for s in range(t, T):
                delta = rewards[s, e] + gamma * (0 if ends[s, e] else after[s, e]) - values[s, e]
                want[t, e] += (gamma * lam) ** (s - t) * delta
                if ends[s, e]:
                    break
    tensors = (torch.tensor(x, dtype=torch.float64) for x in (rewards, values, dones, next_value, next_done))
    np.testing.assert_allclose(ppo.compute_gae(*tensors, gamma, lam).numpy(), want, atol=1e-12)


def test_reward_normalizer_against_full_history():
    """Rewards over the deviation of all discounted returns so far (and 1e-4 of a unit normal), clipped."""
    rng, E, gamma = np.random.default_rng(0), 256, 0.9
    normalize, running, history, clipped = ppo.RewardNormalizer(E, gamma), np.zeros(E), [], 0
    for _ in range(30):
        reward = rng.normal(size=E) + 1000 * (rng.random(E) < 1 / E)  # rare and large: the clip is reached
        done = rng.random(E) < 0.1
        running = gamma * running + reward
        history.extend(running)
        n, mean = len(history) + 1e-4, sum(history) / (len(history) + 1e-4)
        var = (1e-4 * (1 + mean**2) + sum((r - mean) ** 2 for r in history)) / n
        scaled = reward / np.sqrt(var + 1e-8)
        clipped += (abs(scaled) > 10).sum()
        np.testing.assert_allclose(normalize(reward, done), np.clip(scaled, -10, 10), rtol=1e-9, atol=1e-12)
        running[done] = 0
    assert clipped > 3


@pytest.mark.parametrize("clip_vloss", [True, False])
def test_ppo_loss_sample_by_sample(clip_vloss):
    """The clipped loss equals a sum over samples, and so do the numbers that are logged."""
    g = torch.Generator().manual_seed(0)
    n, args = 64, SimpleNamespace(clip_coef=0.2, clip_vloss=clip_vloss, ent_coef=0.01, vf_coef=0.5)
    logits, actions = torch.randn(n, 15, generator=g), torch.randint(15, (n,), generator=g)
    new, advantages, returns, values, noise = torch.randn(5, n, generator=g)
    logprobs = logits.log_softmax(-1)[torch.arange(n), actions] + 0.3 * noise
    loss, metrics = ppo.ppo_loss(logits, new, actions, logprobs, advantages, returns, values, args)
    pg, v, entropy, kl, clipped = [], [], [], [], []
    for i in range(n):
        p = logits[i].double().softmax(-1)
        ratio = float(p[actions[i]] / logprobs[i].double().exp())
        a, old, target = float(advantages[i]), float(values[i]), float(returns[i])
        pg.append(max(-a * ratio, -a * min(max(ratio, 0.8), 1.2)))
        near = old + min(max(float(new[i]) - old, -0.2), 0.2)
        errors = [(float(new[i]) - target) ** 2, (near - target) ** 2]
        v.append(0.5 * (max(errors) if clip_vloss else errors[0]))
        entropy.append(float(-(p * p.log()).sum()))
        kl.append(ratio - 1 - np.log(ratio))
        clipped.append(abs(ratio - 1) > 0.2)
    expected = [np.mean(x) for x in (pg, v, entropy, kl, clipped)]
    assert 0.1 < expected[4] < 0.9
    names = "policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac"
    assert [metrics[name].item() for name in names] == pytest.approx(expected, rel=1e-4)
    assert loss.item() == pytest.approx(expected[0] - 0.01 * expected[2] + 0.5 * expected[1], rel=1e-4)


def test_learning_rates():
    """Linear up over the warm-up, then linear down; of fine-tuning's parts, after so many frames."""
    args = SimpleNamespace(learning_rate=2.0, warmup_updates=4, num_updates=10)
    rates = [pretrain.scheduled_rate(step, args) for step in range(1, 11)]
    np.testing.assert_allclose(rates, np.interp(np.arange(10), (0, 4, 10), (0.2, 2, 0.02)))
    args, part = finetune.Args(learning_rate=2.0, total_timesteps=2048), {"name": "linear", "peak": 0.25}
    args.linear_warmup = (512, 600)
    rates = [finetune.scheduled_rate(step, part, args) for step in (0, 512, 556, 600, 1324, 2048)]
    np.testing.assert_allclose(rates, [0, 0, 0.25, 0.5, 0.25, 0])


@pytest.mark.parametrize("module", [ppo, collect, pretrain, bc, decode, finetune], ids=lambda m: m.__name__)
def test_defaults_are_the_papers_settings(module):
    """Every number that the paper or its authors' code gives is its flag's default: tests/paper.json."""
    args = json.loads(json.dumps(vars(module.Args())))
    wanted = json.loads((ROOT / "tests" / "paper.json").read_text())[module.__name__]
    assert {name: args[name] for name in wanted} == wanted


@pytest.mark.parametrize("bf16, enabled", [(None, False), (True, True), (False, False)])
def test_precision(monkeypatch, bf16, enabled):
    """On a CPU float32, unless --bf16 asks for bfloat16. (On GPUs: test_cuda.py.)"""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    for module in (ppo, pretrain, bc, finetune):
        device, autocast = module.start(module.Args(env_id="coinrun", bf16=bf16, cuda=False))
        with autocast:
            assert device.type == "cpu" and torch.is_autocast_enabled("cpu") is enabled
