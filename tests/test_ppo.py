"""The parts of PPO against slow definitions, schedules, and the paper's settings as defaults."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import bc, collect, decode, finetune, ppo, pretrain


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
    """Rewards over the deviation of all discounted returns so far (and 1e-4 of a unit normal), clipped.

    A copy by state_dict goes on with the same numbers.
    """
    rng, E, gamma = np.random.default_rng(0), 256, 0.9
    normalize, running, history, clipped = ppo.RewardNormalizer(E, gamma), np.zeros(E), [], 0
    for step in range(30):
        reward = rng.normal(size=E) + 1000 * (rng.random(E) < 1 / E)  # rare and large: the clip is reached
        done = rng.random(E) < 0.1
        running = gamma * running + reward
        history.extend(running)
        n, mean = len(history) + 1e-4, sum(history) / (len(history) + 1e-4)
        var = (1e-4 * (1 + mean**2) + sum((r - mean) ** 2 for r in history)) / n
        scaled = reward / np.sqrt(var + 1e-8)
        clipped += (abs(scaled) > 10).sum()
        if step == 15:
            before, normalize = normalize, ppo.RewardNormalizer(E, gamma)
            normalize.load_state_dict(before.state_dict())
            normalize.returns = before.returns  # of this process's games: runs save them apart
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
    loss, logged = ppo.ppo_loss(logits, new, actions, logprobs, advantages, returns, values, args)
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
    assert logged.tolist() == pytest.approx(expected, rel=1e-4)
    assert loss.item() == pytest.approx(expected[0] - 0.01 * expected[2] + 0.5 * expected[1], rel=1e-4)


PAPER = {
    ppo: dict(total_timesteps=50_000_000, gamma=0.999, gae_lambda=0.95, clip_coef=0.2),
    collect: dict(num_train_frames=80 * 32_768, num_test_frames=32_768),
    pretrain: dict(
        learning_rate=3e-4, batch_size=128, num_updates=50_000, warmup_updates=50, max_grad_norm=2.0,
        idm_scale=4, fdm_width=24, vq=True, vq_num_codebooks=2, vq_num_slots=4, vq_dim=16, vq_num_codes=64,
        vq_commitment=0.05, vq_decay=0.999, predict_change=False, patch_size=1,
    ),
    bc: dict(
        learning_rate=2e-4, batch_size=128, num_updates=60_000, warmup_updates=1000, policy_scale=4,
    ),
    decode: dict(num_labels=tuple(2**i for i in range(4, 14)), decoder_hidden=(192, 128, 64)),
    finetune: dict(
        total_timesteps=4_000_000, num_envs=64, num_steps=64, num_minibatches=8, update_epochs=3, gamma=0.999,
        gae_lambda=0.95, clip_coef=0.2, clip_vloss=True, ent_coef=0.0025, vf_coef=0.5, max_grad_norm=0.5,
        learning_rate=1e-2, sl=True, action_head_warmup=(35_000, 50_000), value_head_warmup=(25_000, 50_000),
        linear_warmup=(50_000, 200_000), decoder_hidden=(192, 128, 64), decoder_frames=(10_000, 400_000),
        decoder_every_update_until=50_000, decoder_epochs=3, decoder_batch_size=512,
        decoder_learning_rate=1e-3, label_smoothing=0.05,
    ),
}  # fmt: skip


@pytest.mark.parametrize("module", PAPER, ids=lambda module: module.__name__)
def test_defaults_are_the_papers_settings(module):
    """Every number that the paper or its authors' code gives is the default of its flag."""
    args = vars(module.Args())
    assert {name: args[name] for name in PAPER[module]} == PAPER[module]
