"""The parts of PPO against slow definitions, the learning rate schedules, and the paper's settings as defaults."""

import ast
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, bc, collect, decode, finetune, pretrain

SCORES = """bigfish 0.8743 36.3362 heist 3.0759 9.6853 bossfight 0.0462 11.6344 jumper 3.4105 8.4602 caveflyer 2.5971 9.1836
leaper 2.5105 7.4083 chaser 0.6632 9.9557 maze 4.2726 9.9693 climber 2.2243 10.2336 miner 1.2514 11.8926 coinrun 2.7048 9.9325
ninja 2.5600 9.4746 dodgeball 0.6130 13.4866 plunder 4.3207 11.4605 fruitbot -2.5330 29.9253 starpilot 1.5252 66.9863""".split()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("module", [collect, finetune])
def test_gae_against_its_definition(module, seed):
    """The advantage is sum_l (gamma lambda)^l delta_{t+l} up to the episode's end, in O(T^2), with episodes ending anywhere."""
    rng = np.random.default_rng(seed)
    T, E, gamma, lam = 20, 5, 0.99, 0.9
    rewards, values, next_value = rng.normal(size=(T, E)), rng.normal(size=(T, E)), rng.normal(size=E)
    dones, next_done = rng.random((T, E)) < 0.2, rng.random(E) < 0.5
    all_values, ends = np.r_[values, next_value[None]], np.r_[dones, next_done[None]]  # ends[t + 1]: the step at t was its episode's last
    want = np.zeros((T, E))
    for e in range(E):
        for t in range(T):
            for s in range(t, T):
                bootstrap = 0 if ends[s + 1, e] else all_values[s + 1, e]
                want[t, e] += (gamma * lam) ** (s - t) * (rewards[s, e] + gamma * bootstrap - values[s, e])
                if ends[s + 1, e]:
                    break
    tensors = (torch.tensor(x, dtype=torch.float64) for x in (rewards, values, dones, next_value, next_done))
    np.testing.assert_allclose(module.compute_gae(*tensors, gamma, lam).numpy(), want, atol=1e-12)


@pytest.mark.parametrize("module", [collect, finetune])
def test_reward_normalizer_against_full_history(module):
    """Rewards are divided by the deviation of all discounted returns so far (with 1e-4 of a pseudo-count of mean 0, variance 1), clipped to +-10."""
    rng, E, gamma = np.random.default_rng(0), 256, 0.9
    normalize, running, history, clipped = module.RewardNormalizer(E, gamma), np.zeros(E), [], 0
    for step in range(30):
        reward = rng.normal(size=E) + 1000 * (rng.random(E) < 1 / E)  # rare and large, so that the clip is reached
        done = rng.random(E) < 0.1
        for e in range(E):
            running[e] = gamma * running[e] + reward[e]
        history.extend(running)
        mean = sum(history) / (1e-4 + len(history))
        var = (1e-4 * (1 + mean**2) + sum((r - mean) ** 2 for r in history)) / (1e-4 + len(history))
        scaled = reward / np.sqrt(var + 1e-8)
        clipped += (abs(scaled) > 10).sum()
        np.testing.assert_allclose(normalize(reward, done), np.clip(scaled, -10, 10), rtol=1e-9, atol=1e-12)
        running[done] = 0
    assert clipped > 3


def test_finetuning_learning_rate_shares():
    """A part's share of the base rate is 0 until its warm-up, rises linearly to its peak, and falls linearly to 0 at the end."""
    args = finetune.Args()
    total = args.total_timesteps
    for warmup, start, end, peak in (
        (args.action_head_warmup, 35_000, 50_000, 0.25),
        (args.value_head_warmup, 25_000, 50_000, 0.25),
        (args.linear_warmup, 50_000, 200_000, 0.1),
    ):
        at = [0, start // 2, start, (start + end) // 2, end, (end + total) // 2, total]
        got = [finetune.lr_share(x, warmup, peak, total) for x in at]
        np.testing.assert_allclose(got, [0, 0, 0, peak / 2, peak, peak / 2, 0], atol=1e-12)


def test_finetuning_peaks():
    """The optimiser gives the action head and the value head a quarter of the base rate and the trained Linear a tenth."""
    source = (ROOT / "lapo_finetune_ppo.py").read_text()
    groups = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Dict):
            group = {k.value: v for k, v in zip(node.keys, node.values) if isinstance(k, ast.Constant)}
            if {"params", "warmup", "peak"} <= group.keys():
                groups[ast.unparse(group["params"])] = (ast.unparse(group["warmup"]), group["peak"].value)
    assert groups == {
        "agent.actor.parameters()": ("args.action_head_warmup", 0.25),
        "agent.critic.parameters()": ("args.value_head_warmup", 0.25),
        "agent.network.fc.parameters()": ("args.linear_warmup", 0.1),
    }


@pytest.mark.parametrize("module, floor, last", [(pretrain, 0.1, 0.01), (bc, 0.01, 0.0)])
def test_learning_rate_schedules(module, floor, last):
    """Pretraining warms up from 0.1 to 1 and falls to 0.01, cloning from 0.01 to 1 and to 0, over the published numbers of updates."""
    tree = ast.parse((ROOT / f"{module.__name__}.py").read_text())
    (function,) = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "lr_factor"]
    args = module.Args()
    namespace = {"args": args}
    exec(compile(ast.Module([function], []), "lr_factor", "exec"), namespace)
    warmup, total = args.warmup_updates, args.num_updates
    assert (warmup, total) == {"lapo_pretrain": (50, 50_000), "lapo_bc": (1000, 60_000)}[module.__name__]
    at = [0, warmup // 2, warmup, (warmup + total) // 2, total]
    np.testing.assert_allclose([namespace["lr_factor"](x) for x in at], [floor, (1 + floor) / 2, 1, (1 + last) / 2, last], atol=1e-12)


PAPER = {
    collect: {"total_timesteps": 50_000_000, "num_train_frames": 80 * 32_768, "gamma": 0.999, "gae_lambda": 0.95, "clip_coef": 0.2},
    pretrain: {
        "learning_rate": 3e-4, "batch_size": 128, "num_updates": 50_000, "warmup_updates": 50, "max_grad_norm": 2.0, "idm_scale": 4, "fdm_width": 24,
        "vq": True, "vq_num_codebooks": 2, "vq_num_slots": 4, "vq_dim": 16, "vq_num_codes": 64, "vq_commitment": 0.05, "vq_decay": 0.999,
        "predict_change": False,
    },
    bc: {"learning_rate": 2e-4, "batch_size": 128, "num_updates": 60_000, "warmup_updates": 1000, "policy_scale": 4},
    decode: {"num_labels": tuple(2**i for i in range(4, 14)), "decoder_hidden": (192, 128, 64)},
    finetune: {
        "total_timesteps": 4_000_000, "num_envs": 64, "num_steps": 64, "num_minibatches": 8, "update_epochs": 3, "gamma": 0.999, "gae_lambda": 0.95,
        "clip_coef": 0.2, "clip_vloss": True, "ent_coef": 0.0025, "vf_coef": 0.5, "max_grad_norm": 0.5, "learning_rate": 1e-2, "sl": True,
        "action_head_warmup": (35_000, 50_000), "value_head_warmup": (25_000, 50_000), "linear_warmup": (50_000, 200_000),
        "decoder_hidden": (192, 128, 64), "decoder_frames": (10_000, 400_000), "decoder_every_update_until": 50_000, "decoder_epochs": 3,
        "decoder_batch_size": 512, "decoder_learning_rate": 1e-3, "label_smoothing": 0.05,
    },
}  # fmt: skip


@pytest.mark.parametrize("module", PAPER)
def test_defaults_are_the_papers_settings(module):
    """Every number that the paper or its authors' code gives is the default of its flag."""
    args = vars(module.Args())
    assert {k: args[k] for k in PAPER[module]} == PAPER[module]


@pytest.mark.parametrize("module", [decode, finetune])
def test_paper_scores(module):
    """The random and expert returns are the paper's, for all 16 games."""
    assert module.PAPER_SCORES == {g: (float(r), float(e)) for g, r, e in zip(SCORES[::3], SCORES[1::3], SCORES[2::3])}
    assert sorted(module.PAPER_SCORES) == sorted(module.ENV_NAMES)


def test_evaluation_standard_error():
    """The demonstrator's standard error is the sample deviation over the square root of the episodes, and unknown for one."""
    mean, stderr = collect.mean_and_stderr(np.array([1.0, 2.0, 6.0]))
    assert mean == 3.0 and np.isclose(stderr, np.sqrt((4 + 1 + 9) / 2) / np.sqrt(3))
    assert np.isnan(collect.mean_and_stderr(np.array([1.0]))[1])


def test_fit_lowers_its_learning_rate_to_zero():
    """decode.fit's AdamW starts at the given rate and falls linearly, the last of n updates at 1/n of it."""
    rates, step = [], torch.optim.AdamW.step
    torch.optim.AdamW.step = lambda self, *a, **k: (rates.append(self.param_groups[0]["lr"]), step(self, *a, **k))[1]
    try:
        z, a = torch.randn(20, 8), torch.randint(15, (20,))
        args = SimpleNamespace(weight_decay=0.0, label_smoothing=0.0)
        decode.fit(decode.Decoder(8, (16,)), z, a, 4, 0.1, 16, args, torch.autocast("cpu", enabled=False))
    finally:
        torch.optim.AdamW.step = step
    np.testing.assert_allclose(rates, [0.1, 0.075, 0.05, 0.025])
