"""The networks: sizes, the quantiser against a slow copy, what the FDM sees, decoders, the probe."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import bc, decode, finetune, ppo, pretrain
from sklearn.linear_model import Ridge

N, H, D, K = 2, 4, 16, 64  # codebooks, slots, dimensions, codes
FLOAT32 = torch.autocast("cpu", enabled=False)


def make_vq(decay=0.999):
    torch.manual_seed(0)
    return pretrain.VQ(N, H, D, K, commitment=0.05, decay=decay)


def slow_vq(z, codes):
    """Nearest codes, one vector at a time: quantised latents (B, N*H*D), indices (B, N, H); float64 numpy."""
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


def count(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def test_parameter_counts():
    """The paper's numbers; a fine-tuned agent has those of one from scratch, and its frozen branch."""
    assert count(pretrain.IDM(4, 128)) == 3_685_376 and count(pretrain.FDM(128, 24)) == 7_814_139
    assert count(bc.LatentPolicy(4, 128)) == 3_682_177
    assert count(ppo.Agent(4)) == 3_653_136 and count(ppo.Agent(1)) == 626_256
    agent = finetune.FinetunedAgent(4, 1, 128, (192, 128, 64))
    assert count(agent.network, agent.actor, agent.critic) == 3_653_136
    assert count(agent) == 3_653_136 + count(agent.frozen_fc, agent.head, agent.decoder)
    assert count(agent.frozen_fc, agent.head) == 8192 * 256 + 256 + 256 * 128 + 128


def test_vq_initial_codes():
    """Codes start uniform in +-5/K: bounded by it, with its variance, and different between codebooks."""
    codes = make_vq().codes
    assert codes.shape == (N, K, D) and not torch.equal(codes[0], codes[1])
    assert 0.98 * 5 / K < codes.abs().max() <= 5 / K and codes.mean().abs() < 0.1 * 5 / K
    torch.testing.assert_close(codes.var(), torch.tensor((5 / K) ** 2 / 3), rtol=0.05, atol=0)


def test_vq_against_slow_version():
    """Codes, quantised latents, loss and perplexity equal those found one vector at a time."""
    vq, z = make_vq().eval(), torch.randn(32, N * H * D) * 0.1
    out, loss, index, perplexity = vq(z)
    quantised, slow_index = slow_vq(z.double().numpy(), vq.codes.double().numpy())
    assert np.array_equal(index.numpy(), slow_index)
    assert all(len(np.unique(slow_index[:, n])) > 10 for n in range(N))  # so that a wrong layout would show
    np.testing.assert_allclose(out.numpy(), quantised, atol=1e-7)
    np.testing.assert_allclose(loss.item(), 0.05 * ((z.numpy() - quantised) ** 2).mean(), rtol=1e-5)
    for n in range(N):
        usage = np.bincount(slow_index[:, n].reshape(-1), minlength=K) / slow_index[:, n].size
        entropy = -sum(u * np.log(u) for u in usage if u)
        np.testing.assert_allclose(perplexity[n].item(), np.exp(entropy), rtol=1e-5)


@pytest.mark.parametrize("decay", [0.999, 0.9])
def test_vq_moving_averages(decay):
    """Counts, sums, codes follow the EMA, Laplace-smoothed; a step quantises with the codes before it.

    In eval mode none of them moves.
    """
    vq = make_vq(decay).eval()
    before = {k: v.clone() for k, v in vq.state_dict().items()}
    vq(torch.randn(16, N * H * D))
    assert all(torch.equal(before[k], v) for k, v in vq.train().state_dict().items())
    codes = vq.codes.double().numpy().copy()
    counts, sums = np.ones((N, K)), codes.copy()
    for _ in range(5):
        z = torch.randn(16, N * H * D) * 0.1
        out = vq(z)[0]
        quantised, index = slow_vq(z.double().numpy(), codes)
        np.testing.assert_allclose(out.numpy(), quantised, atol=1e-6)
        grid, before = z.double().numpy().reshape(-1, N, D, H), codes.copy()
        for n in range(N):
            for k in range(K):
                mine = [grid[b, n, :, h] for b, h in zip(*np.nonzero(index[:, n] == k))]
                counts[n, k] = decay * counts[n, k] + (1 - decay) * len(mine)
                sums[n, k] = decay * sums[n, k] + (1 - decay) * np.sum(mine, axis=0)
            smoothed = (counts[n] + 1e-5) / (counts[n].sum() + K * 1e-5) * counts[n].sum()
            codes[n] = sums[n] / smoothed[:, None]
        assert np.abs(codes - before).max() > 1e-4  # there was something to follow
        np.testing.assert_allclose(vq.ema_count.numpy(), counts, rtol=1e-5)
        np.testing.assert_allclose(vq.ema_sum.numpy(), sums, atol=1e-6)
        np.testing.assert_allclose(vq.codes.numpy(), codes, atol=1e-6)


def test_vq_gradients():
    """Straight through; the loss pulls with 0.05 * 2 (z - code) / numel; no gradient reaches the codes."""
    vq = make_vq().train()
    z, w = (torch.randn(8, N * H * D) * 0.1).requires_grad_(), torch.randn(8, N * H * D)
    code = slow_vq(z.detach().double().numpy(), vq.codes.double().numpy())[0]
    out, loss, _, _ = vq(z)
    assert torch.equal(torch.autograd.grad((out * w).sum(), z, retain_graph=True)[0], w)
    want = 0.05 * 2 * (z.detach().numpy() - code) / z.numel()
    np.testing.assert_allclose(torch.autograd.grad(loss, z)[0].numpy(), want, rtol=1e-4, atol=1e-9)
    assert not list(vq.parameters())


def test_vq_computes_in_float32():
    """In a bfloat16 run predict() quantises in float32: the FDM is given the codebook's own values."""
    torch.manual_seed(0)
    idm, vq, given = pretrain.IDM(0.25, 128), make_vq().eval(), []

    def fdm(frames, z):
        given.append(z)
        return frames[:, 3:]

    with torch.autocast("cpu", torch.bfloat16):
        _, loss, z, _ = pretrain.predict(idm, vq, fdm, torch.rand(4, 9, 64, 64) - 0.5)
    assert z.dtype == loss.dtype == given[0].dtype == torch.float32
    want = slow_vq(z.detach().double().numpy(), vq.codes.double().numpy())[0]
    np.testing.assert_allclose(given[0].detach().numpy(), want, atol=1e-6)


def test_predict_change_starts_at_copying():
    """With predict_change an untrained FDM returns o_t exactly, whatever the latent; otherwise not."""
    torch.manual_seed(0)
    frames, z = torch.rand(4, 6, 64, 64) - 0.5, torch.randn(4, 8)
    assert torch.equal(pretrain.FDM(8, 4, predict_change=True)(frames, z), frames[:, 3:])
    assert not torch.allclose(pretrain.FDM(8, 4)(frames, z), frames[:, 3:], atol=0.1)


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_fdm_against_the_papers_words(patch_size):
    """The U-Net written out: z joined twice, skips, head, and no activation after the bottleneck.

    The bottleneck's outputs are mostly negative here, so that a ReLU behind it would show.
    """
    torch.manual_seed(0)
    fdm = pretrain.FDM(8, 4, patch_size=patch_size).eval()
    torch.nn.init.normal_(fdm.bottleneck.bias, mean=-0.5)
    frames, z = torch.rand(2, 6, 64, 64) - 0.5, torch.randn(2, 8)

    def broadcast(size):
        return z[:, :, None, None].expand(-1, -1, size, size)

    def residual(block, x):
        return x + block.conv1(F.relu(block.conv0(F.relu(x))))

    patches, skips = F.pixel_unshuffle(frames, patch_size), []
    x = torch.cat([patches, broadcast(64 // patch_size)], dim=1)
    for conv, (norm, block, *_) in zip(fdm.down_convs, fdm.down_blocks):
        x = F.relu(F.max_pool2d(residual(block, norm(conv(x))), 2))
        skips.append(x)
    assert x.shape[2:] == (2, 2) and len(skips) == {1: 5, 2: 4, 4: 3}[patch_size]
    x = fdm.bottleneck(x)
    assert x.shape == (2, 2 * skips[-1].shape[1], 1, 1) and 0.5 < (x < 0).float().mean() < 1
    skips.append(broadcast(1))
    for up, norm, block, _ in fdm.up_blocks:
        x = F.relu(residual(block, norm(up(torch.cat([x, skips.pop()], dim=1)))))
    conv, block, _, last = fdm.head
    x = last(F.relu(residual(block, conv(torch.cat([x, patches], dim=1)))))
    torch.testing.assert_close(fdm(frames, z), torch.tanh(F.pixel_shuffle(x, patch_size)) / 2)


def obs_to_input(obs):
    """(B, 64, 64, 3) uint8 -> (B, 3, 64, 64) in [-0.5, 0.5]."""
    return torch.from_numpy(obs.numpy().transpose(0, 3, 1, 2).astype(np.float32) / 255 - 0.5)


def test_networks_normalise_uint8_frames():
    """Networks that take uint8 frames (B, 64, 64, 3) feed x / 255 - 0.5, channels first, to convolutions."""
    obs = torch.randint(256, (2, 64, 64, 3), dtype=torch.uint8)
    x = obs_to_input(obs)
    policy, agent = bc.LatentPolicy(0.25, 8), ppo.Agent(0.25)
    tuned = finetune.FinetunedAgent(0.25, 1, 8, (16,))
    torch.testing.assert_close(policy(obs), policy.head(policy.network(x)))  # mean 0, deviation 1
    torch.testing.assert_close(agent(obs)[0], agent.actor(agent.network(x)))
    torch.testing.assert_close(tuned.features(obs, FLOAT32), tuned.network.conv(x))


def separable(n, seed, dim=8):
    """Latents (n, dim) around 15 well separated centres, and the centre's number as the action."""
    rng = np.random.default_rng(seed)
    actions = rng.integers(15, size=n)
    centres = np.random.default_rng(0).normal(size=(15, dim)) * 5
    return (centres[actions] + rng.normal(size=(n, dim)) * 0.1).astype(np.float32), actions


def test_linear_probe():
    """Ridge regression on class-weighted +-1 targets, first half to second: perfect, chance, in between."""
    z, a = separable(900, 1, 16)
    assert pretrain.linear_probe(z, a) == 1
    rng = np.random.default_rng(0)
    assert pretrain.linear_probe(z, rng.permutation(a)) < 0.2
    z = z + 6 * rng.normal(size=z.shape).astype(np.float32)
    x = (z - z[:450].mean(0)) / z[:450].std(0)
    weights = 450 / 15 / np.bincount(a[:450])[a[:450]]
    ridge = Ridge().fit(x[:450], 2 * np.eye(15)[a[:450]] - 1, sample_weight=weights)
    guess, true = ridge.predict(x[450:]).argmax(1), a[450:]
    want = np.mean([(guess[true == c] == c).mean() for c in range(15)])
    assert 0.2 < want < 0.99
    np.testing.assert_allclose(pretrain.linear_probe(z, a), want, atol=1e-3)


def test_measures_on_test_windows(monkeypatch):
    """measure(): losses over windows in pieces, what other latents cost, active units."""
    torch.manual_seed(0)
    idm, vq, fdm = pretrain.IDM(0.25, 16), pretrain.VQ(2, 4, 2, 64, 0.05, 0.999), pretrain.FDM(16, 4)
    torch.nn.ModuleList([vq, fdm]).eval()
    vq.codes.mul_(1000)  # large: that latents matter to a new FDM
    idm.head.weight.data.mul_(1000)
    coarse = np.random.default_rng(0).integers(256, size=(530, 8, 8, 3)).astype(np.uint8)
    frames, t = coarse.repeat(8, axis=1).repeat(8, axis=2), np.arange(1, 529)  # pieces of 512 and 16
    episode = t // 100
    found, z = pretrain.measure(idm, vq, fdm, frames, t, episode, "cpu", FLOAT32)
    windows = pretrain.get_windows(frames, t, "cpu")
    with torch.no_grad():
        loss = F.mse_loss(pretrain.predict(idm, vq, fdm, windows)[0], windows[:, 6:]).item()
        other = torch.zeros(())
        for piece in (slice(0, 512), slice(512, 528)):  # latents of others of the same episode
            q = vq(idm(windows[piece]))[0]
            order = pretrain.others(episode[piece])
            assert (episode[piece][order] == episode[piece]).all() and sorted(order) == [*range(len(order))]
            assert (order != np.arange(len(order))).all()
            guess = fdm(windows[piece, :6], q[order])
            other += F.mse_loss(guess, windows[piece, 6:]) * len(order) / 528
        active = (idm.network.conv(windows) > 0).float().mean().item()
        np.testing.assert_allclose(z, idm(windows).numpy(), atol=1e-6)
    copied = ((frames[1:529] / 255 - frames[2:530] / 255) ** 2).mean()
    wanted = [loss, copied, other.item() / loss - 1, active]
    names = "fdm_loss", "copy_last_frame_loss", "other_latent_cost", "idm_active_share"
    names = [f"test/{name}" for name in names]
    assert [found[name] for name in names] == pytest.approx(wanted, rel=1e-4, abs=1e-6) and 0.1 < active < 1
    assert wanted[2] > 2e-5
    monkeypatch.setattr(torch.nn.Flatten, "forward", lambda self, x: -x.flatten(1).abs())  # before its ReLU
    found, _ = pretrain.measure(idm, vq, fdm, frames, t[:8], episode[:8], "cpu", FLOAT32)
    assert found["test/idm_active_share"] == 0


@pytest.mark.parametrize("sl", [True, False])
def test_logits_of_the_finetuned_agent(sl):
    """(RL logits + decoder logits) / 2, the decoder's of the cloned policy's latent; without, RL logits.

    All are 0 at first; PPO's own start at CleanRL's 0.01.
    """
    torch.manual_seed(0)
    policy, obs = bc.LatentPolicy(0.25, 8), torch.randint(256, (4, 64, 64, 3), dtype=torch.uint8)
    policy.mean.normal_()
    policy.std.uniform_(0.001, 0.1)
    agent = finetune.FinetunedAgent(0.25, 1, 8, (16,), sl)
    agent.load_policy(policy.state_dict())
    features = agent.features(obs, FLOAT32)
    assert (agent(features)[0] == 0).all()
    np.testing.assert_allclose(ppo.Agent(0.25).actor.weight.detach().norm(dim=1).numpy(), 0.01, rtol=1e-4)
    for layer in (agent.actor, agent.decoder.mlp[-1]):
        torch.nn.init.normal_(layer.weight)
    rl_logits, decoder_logits = agent.actor(policy.network(obs_to_input(obs))), agent.decoder(policy(obs))
    wanted = (rl_logits + decoder_logits) / 2 if sl else rl_logits
    torch.testing.assert_close(agent(features)[0], wanted)


def test_latent_policy_is_in_units_of_its_latents():
    """forward = mean + std * head; folding moments into a raw policy leaves its outputs as they are."""
    policy, obs = bc.LatentPolicy(0.25, 8), torch.randint(256, (4, 64, 64, 3), dtype=torch.uint8)
    raw, mean, std = policy(obs), torch.randn(8), torch.rand(8) + 0.01
    policy.mean.copy_(mean)
    policy.std.copy_(std)
    torch.testing.assert_close(policy(obs), mean + std * raw)
    policy.mean.zero_()
    policy.std.fill_(1)
    bc.fold_moments(policy, mean, std)
    assert torch.equal(policy.mean, mean) and torch.equal(policy.std, std)
    torch.testing.assert_close(policy(obs), raw)


def test_moments_of_several_processes(monkeypatch):
    """Mean and deviation of all latents, from pieces of unequal length."""
    z = torch.randn(1000, 3) * torch.tensor([0.003, 1.0, 40.0]) + torch.tensor([5.0, 0.0, -1.0])
    pieces = z.split([700, 200, 100])
    found = [(len(piece), piece.mean(0), piece.var(0, correction=0)) for piece in pieces]
    monkeypatch.setattr(bc, "gathered", lambda x: found)
    mean, std = bc.latent_moments(pieces[0])
    torch.testing.assert_close(mean, z.mean(0))
    torch.testing.assert_close(std, z.std(0, correction=0), rtol=1e-3, atol=2e-6)


def test_effective_rank():
    """The number of directions where all vary alike, their perplexity else; 1 where nothing varies."""
    basis = torch.linalg.qr(torch.randn(256, 256))[0]
    x = torch.randn(20_000, 256)
    assert bc.effective_rank(x[:, :12] @ basis[:12] + 7) == pytest.approx(12, rel=0.01)
    scales = torch.tensor([3.0, 1.0])  # variances 0.9, 0.1
    assert bc.effective_rank(x[:, :2] * scales @ basis[:2]) == pytest.approx(np.exp(0.325), rel=0.02)
    assert bc.effective_rank(torch.ones(64, 256)) == pytest.approx(1)


def test_decoder_standardises_latents():
    """The decoder is an MLP with the widths given, on latents minus their mean over their deviation."""
    decoder = finetune.Decoder(8, (192, 128, 64))
    widths = [tuple(m.weight.shape) for m in decoder.mlp if hasattr(m, "weight")]
    assert widths == [(192, 8), (128, 192), (64, 128), (15, 64)]
    decoder.mean.fill_(3.0)
    decoder.std.fill_(2.0)
    z = torch.randn(4, 8)
    torch.testing.assert_close(decoder(z), decoder.mlp((z - 3) / 2))


def test_online_decoder_refit_starts_afresh():
    """fit_decoder forgets the former weights, learns what can be learnt, says how well, and stays frozen."""
    names = "decoder_learning_rate", "decoder_epochs", "decoder_batch_size", "label_smoothing"
    args = SimpleNamespace(**dict(zip(names, (1e-3, 3, 512, 0.05))))
    z, a = map(torch.from_numpy, separable(8000, 1))
    decoder, again = (finetune.Decoder(8, (192, 128, 64)) for _ in range(2))
    for fitted in (decoder, again):
        torch.manual_seed(0)
        accuracy = finetune.fit_decoder(fitted, z, a, args)
    assert all(torch.equal(p, q) for p, q in zip(decoder.parameters(), again.parameters()))
    z_test, a_test = map(torch.from_numpy, separable(500, 2))
    assert accuracy > 0.9 and (decoder(z_test).argmax(-1) == a_test).float().mean() > 0.95
    assert not any(p.requires_grad for p in decoder.parameters())
    args.decoder_epochs = 1
    assert finetune.fit_decoder(decoder, z, a[torch.randperm(len(a))], args) < 0.15  # nothing to be learnt


def test_offline_fit(monkeypatch):
    """fit() nears the least cross-entropy that smoothed labels allow; its rate falls linearly to 0."""
    rates, step = [], torch.optim.AdamW.step

    def noting(self):
        rates.append(self.param_groups[0]["lr"])
        step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", noting)
    args = SimpleNamespace(weight_decay=1e-2, label_smoothing=0.05)
    z, a = map(torch.from_numpy, separable(256, 1))
    z_test, a_test = map(torch.from_numpy, separable(500, 2))
    torch.manual_seed(0)
    decoder = decode.fit(decode.Decoder(8, (64,)), z.__getitem__, a, 200, 1e-2, 64, args, FLOAT32)
    assert not decoder.training and (decoder(z_test).argmax(-1) == a_test).float().mean() > 0.95
    loss = F.cross_entropy(decoder(z_test), a_test, label_smoothing=0.05)
    right, wrong = 0.95 + 0.05 / 15, 0.05 / 15
    floor = -right * np.log(right) - 14 * wrong * np.log(wrong)  # entropy of a smoothed label
    assert floor < loss < floor + 0.1
    np.testing.assert_allclose(rates, 1e-2 * (1 - np.arange(200) / 200))
    args.cloning_updates, args.cloning_epochs = 10, 3
    args.cloning_learning_rate, args.policy_batch_size = 1e-2, 64
    decode.fit_policy(decoder, z, a, args, FLOAT32)  # 3 epochs are more than 10 updates
    assert len(rates) == 200 + 3 * 256 // 64
