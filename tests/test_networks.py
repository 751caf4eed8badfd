"""The networks: sizes, the quantiser against a slow copy, what the FDM sees, decoders, the probe."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import bc, decode, finetune, ppo, pretrain
from test_data import split_args

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


@pytest.mark.parametrize("decay", [0.999, 0.9])
def test_vq_against_slow_version(decay):
    """Codes start uniform in +-5/K. What comes out equals what is found one vector at a time.

    Counts, sums and codes follow the EMA, Laplace-smoothed; a step quantises with the codes before it.
    """
    vq = make_vq(decay)
    codes = vq.codes.double().numpy().copy()
    assert codes.shape == (N, K, D) and not list(vq.parameters())
    assert 0.98 * 5 / K < abs(codes).max() <= 5 / K and abs(codes.mean()) < 0.1 * 5 / K
    assert codes.var() == pytest.approx((5 / K) ** 2 / 3, rel=0.05)
    counts, sums = np.ones((N, K)), codes.copy()
    for _ in range(5):
        z = torch.randn(16, N * H * D) * 0.1
        out, loss, index, perplexity = vq(z)
        quantised, slow_index = slow_vq(z.double().numpy(), codes)
        assert np.array_equal(index.numpy(), slow_index)
        assert all(len(np.unique(slow_index[:, n])) > 10 for n in range(N))  # a wrong layout would show
        np.testing.assert_allclose(out.numpy(), quantised, atol=1e-6)
        np.testing.assert_allclose(loss.item(), 0.05 * ((z.numpy() - quantised) ** 2).mean(), rtol=1e-5)
        grid, before = z.double().numpy().reshape(-1, N, D, H), codes.copy()
        for n in range(N):
            for k in range(K):
                mine = [grid[b, n, :, h] for b, h in zip(*np.nonzero(slow_index[:, n] == k))]
                counts[n, k] = decay * counts[n, k] + (1 - decay) * len(mine)
                sums[n, k] = decay * sums[n, k] + (1 - decay) * np.sum(mine, axis=0)
            smoothed = (counts[n] + 1e-5) / (counts[n].sum() + K * 1e-5) * counts[n].sum()
            codes[n] = sums[n] / smoothed[:, None]
            usage = np.bincount(slow_index[:, n].reshape(-1), minlength=K) / slow_index[:, n].size
            entropy = -sum(u * np.log(u) for u in usage if u)
            np.testing.assert_allclose(perplexity[n].item(), np.exp(entropy), rtol=1e-5)
        assert np.abs(codes - before).max() > 1e-4  # there was something to follow
        np.testing.assert_allclose(vq.ema_count.numpy(), counts, rtol=1e-5)
        np.testing.assert_allclose(vq.ema_sum.numpy(), sums, atol=1e-6)
        np.testing.assert_allclose(vq.codes.numpy(), codes, atol=1e-6)


def test_vq_gradients():
    """Straight through; the loss pulls with 0.05 * 2 (z - code) / numel; in eval mode codes stay."""
    vq = make_vq().eval()
    z, w = (torch.randn(8, N * H * D) * 0.1).requires_grad_(), torch.randn(8, N * H * D)
    code, before = slow_vq(z.detach().double().numpy(), vq.codes.double().numpy())[0], vq.codes.clone()
    out, loss, _, _ = vq(z)
    assert torch.equal(torch.autograd.grad((out * w).sum(), z, retain_graph=True)[0], w)
    want = 0.05 * 2 * (z.detach().numpy() - code) / z.numel()
    np.testing.assert_allclose(torch.autograd.grad(loss, z)[0].numpy(), want, rtol=1e-4, atol=1e-9)
    assert torch.equal(vq.codes, before)


def new_lapo():
    torch.manual_seed(0)
    return pretrain.LAPO(pretrain.IDM(0.25, N * H * D), make_vq(), pretrain.FDM(N * H * D, 4))


@pytest.mark.parametrize("vq", [True, False])
def test_the_future_reaches_the_fdm_through_the_latent_only(vq):
    """o_{t+1} sends the loss no gradient but through z, and z does; --no-vq passes z on as it is.

    In a bfloat16 run the quantiser computes in float32: the FDM is given the codebook's own values.
    """
    lapo, windows = new_lapo().eval(), (torch.rand(4, 9, 64, 64) - 0.5).requires_grad_()
    if not vq:
        lapo.vq = None
    (future,) = torch.autograd.grad(lapo(windows)[0].square().sum(), windows)
    assert (future[:, 6:].abs().amax((1, 2, 3)) > 0).all()
    z, quantised, *_ = lapo.encode(windows.detach())
    assert (quantised is z) != vq
    with torch.autocast("cpu", torch.bfloat16):
        low, given, loss, _ = lapo.encode(windows.detach())
    assert low.dtype == loss.dtype == given.dtype == torch.float32
    if vq:
        want = slow_vq(low.detach().double().numpy(), lapo.vq.codes.double().numpy())[0]
        np.testing.assert_allclose(given.detach().numpy(), want, atol=1e-6)
    lapo.idm.forward = lambda windows: z.detach()
    (future,) = torch.autograd.grad(lapo(windows)[0].square().sum(), windows)
    assert (future[:, 6:] == 0).all() and (future[:, :6] != 0).any()


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_fdm_against_the_papers_words(patch_size):
    """The U-Net written out: z joined twice, skips, head, and no activation after the bottleneck.

    The bottleneck's outputs are mostly negative here: a ReLU behind it would show. With predict_change it
    begins as a copy of o_t.
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
    assert torch.equal(pretrain.FDM(8, 4, True, patch_size)(frames, z), frames[:, 3:])


def obs_to_input(obs):
    """(B, 64, 64, 3) uint8 -> (B, 3, 64, 64) in [-0.5, 0.5]."""
    return torch.from_numpy(obs.numpy().transpose(0, 3, 1, 2).astype(np.float32) / 255 - 0.5)


def separable(n, seed, dim=8):
    """Latents (n, dim) around 15 well separated centres, and the centre's number as the action."""
    rng = np.random.default_rng(seed)
    actions = rng.integers(15, size=n)
    centres = np.random.default_rng(0).normal(size=(15, dim)) * 5
    return (centres[actions] + rng.normal(size=(n, dim)) * 0.1).astype(np.float32), actions


def test_linear_probe():
    """Fitted on the first half, scored on the second: perfect, chance, or what labels there are."""
    z, a = separable(900, 1, 16)
    assert pretrain.linear_probe(z, a) == 1
    rng = np.random.default_rng(0)
    assert pretrain.linear_probe(z, rng.permutation(a)) < 0.2
    assert pretrain.linear_probe(np.concatenate([z, 0 * z]), np.r_[a, 0 * a - 1]) == 1


def test_evaluation_on_test_windows(pipeline):
    """Losses, what other latents of the episode cost, active units, the probe: as computed in one piece."""
    test, lapo = pretrain.load_dataset(split_args(pipeline.data))[2], new_lapo()
    lapo.vq.codes.mul_(1000)  # large: that latents matter to a new FDM
    lapo.idm.head.weight.data.mul_(1000)
    found = pretrain.evaluate(lapo, test, 1000, "cpu", FLOAT32)
    assert lapo.training
    lapo.eval()
    t, episode = test.windows, np.cumsum(test.first)[test.windows]
    order = pretrain.other_windows(episode)
    assert (episode[order] == episode).all() and sorted(order) == [*range(len(t))]
    assert (order != np.arange(len(t))).mean() > 0.9
    windows = pretrain.get_windows(test, t, "cpu")
    now, target = windows[:, 3:6], windows[:, 6:]
    with torch.no_grad():
        z = lapo.encode(windows)[1]
        own, other = (F.mse_loss(lapo.fdm(windows[:, :6], x), target).item() for x in (z, z[order]))
        active = (lapo.idm.network.conv(windows) > 0).float().mean().item()
        probe = pretrain.linear_probe(lapo.idm(windows).numpy(), pretrain.load_labels(test, "actions")[t])
        perplexity = lapo.vq(lapo.idm(windows))[3].tolist()
    wanted = [own, F.mse_loss(now, target).item(), other / own - 1, active, probe, *perplexity]
    names = "test/fdm_loss", "test/copy_last_frame_loss", "test/other_latent_cost", "test/idm_active_share"
    found = [
        found[name] for name in (*names, "probe/balanced_accuracy", "test/perplexity_0", "test/perplexity_1")
    ]
    assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6) and 0.1 < active < 1 and abs(wanted[2]) > 2e-5


@pytest.mark.parametrize("sl", [True, False])
def test_logits_of_the_finetuned_agent(sl):
    """(RL logits + decoder logits) / 2, the decoder's of the cloned policy's latent; without, RL logits.

    All are 0 at first; PPO's own start at CleanRL's 0.01. Networks are given frames / 255 - 0.5.
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
    x, ppo_agent = obs_to_input(obs), ppo.Agent(0.25)
    torch.testing.assert_close(features, policy.network.conv(x))
    torch.testing.assert_close(policy(obs), policy.mean + policy.std * policy.head(policy.network(x)))
    torch.testing.assert_close(ppo_agent(obs)[0], ppo_agent.actor(ppo_agent.network(x)))
    torch.testing.assert_close(agent(features)[0], wanted)


def test_effective_rank():
    """The number of directions where all vary alike, their perplexity else; 1 where nothing varies."""
    basis = torch.linalg.qr(torch.randn(256, 256))[0]
    x = torch.randn(20_000, 256)
    assert bc.effective_rank(x[:, :12] @ basis[:12] + 7) == pytest.approx(12, rel=0.01)
    scales = torch.tensor([3.0, 1.0])  # variances 0.9, 0.1
    assert bc.effective_rank(x[:, :2] * scales @ basis[:2]) == pytest.approx(np.exp(0.325), rel=0.02)
    assert bc.effective_rank(torch.ones(64, 256)) == pytest.approx(1)


def test_online_decoder_refit_starts_afresh():
    """fit_decoder forgets the former weights, learns what can be learnt, says how well, and stays frozen."""
    args = finetune.Args(decoder_epochs=3)
    z, a = map(torch.from_numpy, separable(8000, 1))
    decoder = finetune.Decoder(8, (192, 128, 64))
    accuracy = finetune.fit_decoder(decoder, z, a, args)
    assert accuracy > 0.9 and (decoder(z).argmax(-1) == a).float().mean() > 0.95
    assert not any(p.requires_grad for p in decoder.parameters())
    args.decoder_epochs = 1
    assert finetune.fit_decoder(decoder, z, a[torch.randperm(len(a))], args) < 0.15  # nothing to be learnt


def test_offline_decoder():
    """It standardises latents, and comes near the least cross-entropy that smoothed labels allow."""
    args = decode.Args(decoder_hidden=(64,), decoder_updates=200, decoder_learning_rate=1e-2)
    z, a = map(torch.from_numpy, separable(256, 1))
    z_test, a_test = map(torch.from_numpy, separable(500, 2))
    torch.manual_seed(0)
    policy = bc.LatentPolicy(0.25, 8)
    policy.mean.fill_(0.5)
    policy.std.fill_(5.0)
    decoder = decode.fit_lapo_decoder(policy, z, a, 15, args)
    assert torch.equal(decoder(z), decoder.mlp((z - policy.mean) / policy.std))
    assert [tuple(m.weight.shape) for m in decoder.mlp if hasattr(m, "weight")] == [(64, 8), (15, 64)]
    assert (decoder(z_test).argmax(-1) == a_test).float().mean() > 0.95
    right, wrong = 0.95 + 0.05 / 15, 0.05 / 15
    floor = -right * np.log(right) - 14 * wrong * np.log(wrong)  # entropy of a smoothed label
    assert floor < F.cross_entropy(decoder(z_test), a_test, label_smoothing=0.05) < floor + 0.1


def test_cloning_fits(monkeypatch):
    """AdamW's rate falls linearly to 0 over the updates, or over the epochs where those are more."""
    rates, step = [], torch.optim.AdamW.step

    def noting(self):
        rates.append(self.param_groups[0]["lr"])
        step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", noting)
    args = decode.Args(cloning_updates=10, cloning_epochs=3, policy_batch_size=64, cloning_learning_rate=1e-2)
    z, a = map(torch.from_numpy, separable(256, 1))
    decode.fit_cloning(torch.nn.Linear(8, 15), z, a, args, FLOAT32)
    np.testing.assert_allclose(rates, 1e-2 * (1 - np.arange(12) / 12))  # 3 epochs of 4 batches
