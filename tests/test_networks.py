"""The networks: sizes, the vector quantiser against a slow copy, what the forward dynamics model can see, the probe and the decoders."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import bc, collect, decode, finetune, pretrain

N, H, D, K = 2, 4, 16, 64  # codebooks, slots, dimensions, codes


def make_vq(decay=0.999, seed=0):
    torch.manual_seed(seed)
    return pretrain.VQ(N, H, D, K, commitment=0.05, decay=decay)


def slow_vq(z, codes):
    """Nearest codes one vector at a time: quantised latents (B, N*H*D), indices (B, N, H). z (B, N*H*D), codes (N, K, D), float64 numpy."""
    quantised, index = np.zeros_like(z), np.zeros((len(z), N, H), dtype=int)
    for b in range(len(z)):
        grid, out = z[b].reshape(N * D, H), np.zeros((N * D, H))
        for n in range(N):
            for h in range(H):
                vector = grid[n * D : (n + 1) * D, h]
                index[b, n, h] = min(range(K), key=lambda k: ((vector - codes[n, k]) ** 2).sum())
                out[n * D : (n + 1) * D, h] = codes[n, index[b, n, h]]
        quantised[b] = out.reshape(-1)
    return quantised, index


def parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    "build, count",
    [
        (lambda: pretrain.IDM(4, 128), 3_685_376),
        (lambda: pretrain.FDM(128, 24), 7_814_139),
        (lambda: bc.LatentPolicy(4, 128), 3_682_177),
        (lambda: collect.Agent(4), 3_653_136),
        (lambda: collect.Agent(1), 626_256),
        (lambda: finetune.Agent(4), 3_653_136),
    ],
)
def test_parameter_counts(build, count):
    """The networks have the paper's numbers of parameters."""
    assert parameters(build()) == count


def test_network_shapes():
    """Latents are (B, latent_dim), frames (B, 3, 64, 64), logits (B, 15); the FDM's output lies within +-0.5."""
    torch.manual_seed(0)
    windows, obs = torch.rand(2, 9, 64, 64) - 0.5, torch.randint(256, (2, 64, 64, 3), dtype=torch.uint8)
    z = pretrain.IDM(0.25, 8)(windows)
    out = pretrain.FDM(8, 4)(windows[:, :6], z)
    logits, value = collect.Agent(0.25)(obs)
    assert (z.shape, out.shape, bc.LatentPolicy(0.25, 8)(obs).shape, logits.shape, value.shape) == ((2, 8), (2, 3, 64, 64), (2, 8), (2, 15), (2,))
    assert out.abs().max() <= 0.5 and out.std() > 0


def test_vq_initial_codes():
    """Codes start uniform in +-5/K: bounded by it, with its variance, and different between codebooks."""
    codes = make_vq().codes
    assert codes.shape == (N, K, D) and not torch.equal(codes[0], codes[1])
    assert 0.98 * 5 / K < codes.abs().max() <= 5 / K
    assert codes.mean().abs() < 0.1 * 5 / K
    torch.testing.assert_close(codes.var(), torch.tensor((5 / K) ** 2 / 3), rtol=0.05, atol=0)


def test_vq_against_slow_version():
    """Codes, quantised latents, loss and perplexity equal those found one vector at a time."""
    vq = make_vq().eval()
    z = torch.randn(32, N * H * D) * 0.1
    out, loss, index, perplexity = vq(z)
    quantised, slow_index = slow_vq(z.double().numpy(), vq.codes.double().numpy())
    assert np.array_equal(index.numpy(), slow_index)
    assert all(len(np.unique(slow_index[:, n])) > 10 for n in range(N))  # many codes in use, so that a wrong layout would show
    np.testing.assert_allclose(out.numpy(), quantised, atol=1e-7)
    np.testing.assert_allclose(loss.item(), 0.05 * ((z.numpy() - quantised) ** 2).mean(), rtol=1e-5)
    for n in range(N):
        usage = np.bincount(slow_index[:, n].reshape(-1), minlength=K) / slow_index[:, n].size
        entropy = -sum(u * np.log(u) for u in usage if u)
        np.testing.assert_allclose(perplexity[n].item(), np.exp(entropy), rtol=1e-5)


@pytest.mark.parametrize("decay", [0.999, 0.9])
def test_vq_moving_averages(decay):
    """Over training steps, counts, sums and codes follow the EMA update with Laplace smoothing; each step quantises with the codes before it."""
    vq = make_vq(decay).train()
    codes, count, total = vq.codes.double().numpy().copy(), np.ones((N, K)), vq.codes.double().numpy().copy()
    for step in range(5):
        z = torch.randn(16, N * H * D) * 0.1
        out = vq(z)[0]
        quantised, index = slow_vq(z.double().numpy(), codes)
        np.testing.assert_allclose(out.numpy(), quantised, atol=1e-6)
        before = codes.copy()
        for n in range(N):
            for k in range(K):
                mine = [z[b].double().numpy().reshape(N * D, H)[n * D : (n + 1) * D, h] for b, h in zip(*np.nonzero(index[:, n] == k))]
                count[n, k] = decay * count[n, k] + (1 - decay) * len(mine)
                total[n, k] = decay * total[n, k] + (1 - decay) * np.sum(mine, axis=0)
            smoothed = (count[n] + 1e-5) / (count[n].sum() + K * 1e-5) * count[n].sum()
            codes[n] = total[n] / smoothed[:, None]
        assert np.abs(codes - before).max() > 1e-4  # there was something to follow
        np.testing.assert_allclose(vq.ema_count.numpy(), count, rtol=1e-5)
        np.testing.assert_allclose(vq.ema_sum.numpy(), total, atol=1e-6)
        np.testing.assert_allclose(vq.codes.numpy(), codes, atol=1e-6)


def test_vq_rests_in_eval_mode():
    """In eval mode the codebooks do not move; the same batch in training mode moves them."""
    vq, z = make_vq(), torch.randn(16, N * H * D)
    before = {k: v.clone() for k, v in vq.state_dict().items()}
    vq.eval()(z)
    assert all(torch.equal(before[k], v) for k, v in vq.state_dict().items())
    vq.train()(z)
    assert all(not torch.equal(before[k], v) for k, v in vq.state_dict().items())


def test_vq_gradients():
    """The gradient passes straight through the quantiser, the loss pulls with 0.05 * 2 (z - code) / numel, and no gradient reaches the codes."""
    vq = make_vq().train()
    z = (torch.randn(8, N * H * D) * 0.1).requires_grad_()
    codes = vq.codes.clone()
    w = torch.randn(8, N * H * D)
    out, loss, _, _ = vq(z)
    assert torch.equal(torch.autograd.grad((out * w).sum(), z, retain_graph=True)[0], w)
    code = slow_vq(z.detach().double().numpy(), codes.double().numpy())[0]
    want = 0.05 * 2 * (z.detach().numpy() - code) / z.numel()
    np.testing.assert_allclose(torch.autograd.grad(loss, z)[0].numpy(), want, rtol=1e-4, atol=1e-9)
    assert not list(vq.parameters())


def test_vq_computes_in_float32():
    """A bfloat16 latent is quantised in float32: the output is a codebook's float32 value."""
    vq, z = make_vq().eval(), torch.randn(8, N * H * D).bfloat16()
    out, loss, index, _ = vq(z)
    assert out.dtype == loss.dtype == torch.float32
    want = slow_vq(z.double().numpy(), vq.codes.double().numpy())[0]
    np.testing.assert_allclose(out.numpy(), want, atol=1e-6)


@pytest.mark.parametrize("predict_change", [False, True])
def test_fdm_sees_the_future_through_the_latent_only(predict_change):
    """With the latent held fixed no gradient reaches o_{t+1}; with the IDM attached it does; the IDM itself sees all three frames."""
    torch.manual_seed(0)
    idm, fdm = pretrain.IDM(0.25, 8), pretrain.FDM(8, 4, predict_change)
    if predict_change:
        torch.nn.init.normal_(fdm.head[-1].weight)  # as after training: at zero nothing gets through
    windows = (torch.rand(4, 9, 64, 64) - 0.5).requires_grad_()
    z = idm(windows)
    w = torch.randn(4, 3, 64, 64)
    (held,) = torch.autograd.grad((fdm(windows[:, :6], z.detach()) * w).sum(), windows)
    assert (held[:, 6:] == 0).all()
    assert held[:, :3].abs().max() > 0 and held[:, 3:6].abs().max() > 0
    (attached,) = torch.autograd.grad((fdm(windows[:, :6], z) * w).sum(), windows, retain_graph=True)
    assert attached[:, 6:].abs().max() > 0
    (seen,) = torch.autograd.grad(z.pow(2).sum(), windows)
    assert all(seen[:, c : c + 3].abs().max() > 0 for c in (0, 3, 6))


def test_predict_change_starts_at_copying():
    """With predict_change an untrained FDM returns o_t exactly, whatever the latent; without it, it does not."""
    torch.manual_seed(0)
    frames, z = torch.rand(4, 6, 64, 64) - 0.5, torch.randn(4, 8)
    assert torch.equal(pretrain.FDM(8, 4, predict_change=True)(frames, z), frames[:, 3:])
    assert not torch.allclose(pretrain.FDM(8, 4)(frames, z), frames[:, 3:], atol=0.1)


@pytest.mark.parametrize("size", [64, 5, 3])
def test_fdm_first_conv_is_the_plain_convolution(size):
    """The 3x3 trick equals convolving frames and the broadcast latent together: values, and gradients of weights, bias and inputs."""
    torch.manual_seed(0)
    fdm = pretrain.FDM(8, 4).double()
    conv = fdm.down_convs[0]
    frames, z = torch.randn(3, 6, size, size, dtype=torch.float64, requires_grad=True), torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    plain = conv(torch.cat([frames, z[:, :, None, None].expand(-1, -1, size, size)], dim=1))
    fast = fdm.first_conv(frames, z)
    torch.testing.assert_close(fast, plain, rtol=0, atol=1e-10)
    w, inputs = torch.randn_like(plain), (conv.weight, conv.bias, frames, z)
    for a, b in zip(torch.autograd.grad((fast * w).sum(), inputs), torch.autograd.grad((plain * w).sum(), inputs)):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_fdm_uses_the_latent():
    """Another latent gives another prediction, both through the first layer and through the bottleneck."""
    torch.manual_seed(0)
    fdm = pretrain.FDM(8, 4).eval()
    frames, z = torch.rand(2, 6, 64, 64) - 0.5, torch.randn(2, 8)
    moved = (fdm(frames, z) - fdm(frames, z + 1)).abs().max()
    with torch.no_grad():
        fdm.down_convs[0].weight[:, 6:] = 0  # cut the way through the first layer
        bottleneck = (fdm(frames, z) - fdm(frames, z + 1)).abs().max()
        fdm.up_blocks[0][0].weight[-8:] = 0  # and the way through the bottleneck: nothing is left
        cut = (fdm(frames, z) - fdm(frames, z + 1)).abs().max()
    assert moved > 1e-6 and bottleneck > 1e-6 and cut == 0


def test_networks_normalise_uint8_frames():
    """The networks that take uint8 frames (B, 64, 64, 3) feed x / 255 - 0.5, channels first, to the convolutions."""
    obs = torch.randint(256, (2, 64, 64, 3), dtype=torch.uint8)
    x = torch.from_numpy(obs.numpy().transpose(0, 3, 1, 2).astype(np.float32) / 255 - 0.5)
    policy, scratch, agent, tuned = bc.LatentPolicy(0.25, 8), decode.ScratchPolicy(0.25), collect.Agent(0.25), finetune.Agent(0.25)
    torch.testing.assert_close(policy(obs), policy.head(policy.network(x)))
    torch.testing.assert_close(scratch(obs), scratch.actor(scratch.network(x)))
    torch.testing.assert_close(agent(obs)[0], agent.actor(agent.network(x)))
    torch.testing.assert_close(tuned(tuned.features(obs))[0], tuned.actor(tuned.network(x)))


def test_finetuning_agent_starts_undecided():
    """The action head of the fine-tuning agent starts at exactly zero; that of PPO from scratch does not."""
    obs = torch.randint(256, (4, 64, 64, 3), dtype=torch.uint8)
    agent, scratch = finetune.Agent(0.25, 1, 8, (16,)), finetune.Agent(0.25)
    assert (agent(agent.features(obs))[0] == 0).all()
    assert scratch(scratch.features(obs))[0].abs().max() > 0


def separable(n, seed, dim=8):
    """Latents (n, dim) around 15 well separated centres, and the centre's number as the action."""
    rng = np.random.default_rng(seed)
    actions = rng.integers(15, size=n)
    centres = np.random.default_rng(0).normal(size=(15, dim)) * 5
    return (centres[actions] + rng.normal(size=(n, dim)) * 0.1).astype(np.float32), actions


def both(train, test):
    """Two (latents, actions) as the functions take them: {"train": ..., "test": ...} of each."""
    return ({"train": x, "test": x_test} for x, x_test in zip(train, test))


def test_linear_probe():
    """The probe equals ridge regression with explicit class weights, reads separable actions perfectly, and shuffled ones at chance."""
    z, a = both(separable(600, 1, 16), separable(300, 2, 16))
    assert pretrain.linear_probe(z, a) == 1
    shuffled = {**a, "train": np.random.default_rng(0).permutation(a["train"])}
    assert pretrain.linear_probe(z, shuffled) < 0.2
    z = {split: x + 6 * np.random.default_rng(3).normal(size=x.shape).astype(np.float32) for split, x in z.items()}  # now right, now wrong
    mean, std = z["train"].mean(0), z["train"].std(0)
    x, x_test = ((z[split] - mean) / std for split in z)
    w = 600 / 15 / np.bincount(a["train"], minlength=15)[a["train"]]
    target = 2 * np.eye(15)[a["train"]] - 1
    x = np.c_[x, np.ones(len(x))]
    penalty = 1e-3 * np.diag([1] * 16 + [0])
    coef = np.linalg.solve((x * w[:, None]).T @ x + penalty, (x * w[:, None]).T @ target)
    guess = (np.c_[x_test, np.ones(len(x_test))] @ coef).argmax(1)
    want = np.mean([(guess[a["test"] == c] == c).mean() for c in np.unique(a["test"])])
    assert 0.2 < want < 0.99
    np.testing.assert_allclose(pretrain.linear_probe(z, a), want, atol=1e-3)


def test_latent_space_metrics():
    """Latents and codes that name the action score 1, codes that name every second one less, and shuffled actions leave next to nothing."""
    z, a = both(separable(600, 1, 16), separable(300, 2, 16))
    codes = {split: np.stack([x, x // 2], axis=-1)[:, :, None] for split, x in a.items()}  # (n, 2 codebooks, 1 slot)
    out = pretrain.latent_space_metrics(z, codes, a)
    assert out["linear_probe"] == out["mlp_probe"] == out["cluster_purity"] == out["nmi_best_slot"] == 1
    p, p_half = np.bincount(a["test"]) / 300, np.bincount(a["test"] // 2) / 300
    entropy, entropy_half = (-(q * np.log(q)).sum() for q in (p, p_half))
    half = entropy_half / ((entropy + entropy_half) / 2)  # the code is a function of the action, so it tells all of its own entropy
    np.testing.assert_allclose(out["nmi"], (1 + half) / 2)
    shuffled = {split: np.random.default_rng(0).permutation(x) for split, x in a.items()}
    out = pretrain.latent_space_metrics(z, codes, shuffled)
    assert max(out["linear_probe"], out["mlp_probe"], out["cluster_purity"]) < 0.25 and out["nmi"] < 0.3
    assert "nmi" not in pretrain.latent_space_metrics(z, {"train": None, "test": None}, a)  # no VQ, no codes


def test_decoder_standardises_latents():
    """The decoder is an MLP with the widths given, on latents minus their mean over their deviation."""
    decoder = finetune.Decoder(8, (192, 128, 64))
    assert [tuple(m.weight.shape) for m in decoder.mlp if hasattr(m, "weight")] == [(192, 8), (128, 192), (64, 128), (15, 64)]
    decoder.mean.fill_(3.0)
    decoder.std.fill_(2.0)
    z = torch.randn(4, 8)
    torch.testing.assert_close(decoder(z), decoder.mlp((z - 3) / 2))


def test_online_decoder_refit_starts_afresh():
    """fit_decoder forgets the former weights, learns separable actions, reports its accuracy, and leaves the decoder frozen."""
    args = SimpleNamespace(decoder_learning_rate=1e-3, decoder_epochs=3, decoder_batch_size=512, label_smoothing=0.05)
    z, a = map(torch.from_numpy, separable(8000, 1))
    fitted = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        decoder = finetune.Decoder(8, (192, 128, 64))
        torch.manual_seed(0)
        accuracy = finetune.fit_decoder(decoder, z, a, args)
        fitted.append(decoder)
    assert all(torch.equal(p, q) for p, q in zip(fitted[0].parameters(), fitted[1].parameters()))
    z_test, a_test = map(torch.from_numpy, separable(500, 2))
    assert accuracy > 0.9 and (decoder(z_test).argmax(-1) == a_test).float().mean() > 0.95
    assert not any(p.requires_grad for p in decoder.parameters())
    torch.manual_seed(0)
    args.decoder_epochs = 1
    assert finetune.fit_decoder(decoder, z, a[torch.randperm(len(a))], args) < 0.15  # shuffled labels cannot be learnt


def test_offline_fit():
    """decode.fit learns separable actions and comes near the smallest cross-entropy that smoothed labels allow."""
    args = SimpleNamespace(weight_decay=1e-2, label_smoothing=0.05)
    z, a = map(torch.from_numpy, separable(256, 1))
    z_test, a_test = map(torch.from_numpy, separable(500, 2))
    torch.manual_seed(0)
    autocast = torch.autocast("cpu", enabled=False)
    decoder = decode.fit(decode.Decoder(8, (64,)), z, a, 200, 1e-2, 64, args, autocast)
    assert not decoder.training and (decoder(z_test).argmax(-1) == a_test).float().mean() > 0.95
    loss = F.cross_entropy(decoder(z_test), a_test, label_smoothing=0.05)
    floor = -(0.95 + 0.05 / 15) * np.log(0.95 + 0.05 / 15) - 14 * (0.05 / 15) * np.log(0.05 / 15)  # entropy of a smoothed label
    assert floor < loss < floor + 0.1


def test_offline_fit_on_probabilities():
    """Fitted on probabilities, a decoder gives those, unsmoothed: here every second label is one of two actions, half of the time each."""
    args = SimpleNamespace(weight_decay=0.0, label_smoothing=0.05)
    torch.manual_seed(0)
    z = torch.randn(512, 8)
    wanted = torch.where(z[:, :1] > 0, F.one_hot(torch.tensor(3), 15).float(), (F.one_hot(torch.tensor(4), 15) + F.one_hot(torch.tensor(5), 15)) / 2)
    decoder = decode.fit(decode.Decoder(8, (64,)), z, wanted, 400, 1e-2, 512, args, torch.autocast("cpu", enabled=False))
    sure = z[:, 0].abs() > 0.5
    torch.testing.assert_close(decoder(z).softmax(-1)[sure], wanted[sure], atol=0.05, rtol=0)


def test_decoded_policy():
    """The paper's form is decoder(pi(o)); with features, the decoder sees pi(o) and what its last layer is applied to."""
    torch.manual_seed(0)
    policy, obs = decode.LatentPolicy(0.25, 8), torch.randint(256, (4, 64, 64, 3), dtype=torch.uint8)
    decoder = decode.Decoder(8, (16,))
    torch.testing.assert_close(decode.DecodedPolicy(policy, decoder, False)(obs), decoder(policy(obs)))
    seen = decode.policy_outputs(policy, obs, True)
    assert seen.shape == (4, 8 + 256)
    torch.testing.assert_close(seen[:, :8], policy(obs))
    torch.testing.assert_close(policy.head(seen[:, 8:]), policy(obs))
    wide = decode.Decoder(8 + 256, (16,))
    torch.testing.assert_close(decode.DecodedPolicy(policy, wide, True)(obs), wide(seen))
