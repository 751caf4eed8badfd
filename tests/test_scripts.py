"""The stages end to end at toy size: what they write, what each one trains, labels left alone, schedules."""

import json  # noqa: I001
from collections import defaultdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    ENV_ID, GAMES, NO_SL, RUNS, STAGES, TOY, bc, decode, finetune, games, inline, link_tree, load, look, ppo,
    pretrain, replace, results_of, run_dir, same_tensors, scalars, tensors,
)  # fmt: skip

HOLDS = {  # stage: what its checkpoint holds beside what all hold, what its logs hold, their last step
    "ppo_procgen": ("agent num_levels start_level", "charts/learning_rate losses/policy_loss", 2048),
    "collect_expert_data": ("num_levels start_level", "charts/episodic_return", 2400),
    "lapo_pretrain": ("idm vq fdm data", "charts/learning_rate losses/fdm_loss codebook/perplexity_1", 6),
    "lapo_bc": (
        "policy idm pretrain_args data",
        "charts/learning_rate losses/latent_mse test/r2 test/effective_rank",
        6,
    ),
    "lapo_decode": ("policy decoder pretrain_args bc_args data", "lapo_decoder/return_mean", 32),
    "lapo_finetune_ppo": ("agent", "charts/episodic_return losses/explained_variance", 2048),
}
NEXT = dict(zip(STAGES, STAGES[1:]))
FINETUNED = ("lapo_finetune_ppo", NO_SL)


@pytest.mark.parametrize("name", RUNS)
def test_what_a_run_leaves(pipeline, name):
    """results.json, checkpoint.pt and logs say what they are and rest on; the last line what is next."""
    stage, results, folder = RUNS[name][0], pipeline.results[name], pipeline.checkpoints[name].parent
    checkpoint, logs, (parts, tags, last) = load(folder / "checkpoint.pt"), scalars(folder), HOLDS[stage]
    assert [checkpoint[key] for key in ("format_version", "stage", "env_id")] == [5, stage, ENV_ID]
    assert set(parts.split()) <= checkpoint.keys() and not {"optimizer", "rng"} & checkpoint.keys()
    assert all(results[key] == checkpoint[key] for key in ("stage", "identity", "command"))
    assert results["args"] == json.loads(json.dumps(checkpoint["args"])) and results["args"]["bf16"] is False
    assert f"{stage}.py --env-id {ENV_ID} --no-cuda" in results["command"]
    assert results["wall_seconds"] > 0 and results["threads"] == 1 and results["torch"] == torch.__version__
    assert not (folder / "resume.pt").exists() and not list(folder.glob("*.tmp"))
    assert set(tags.split()) <= logs.keys() and max(values[-1][0] for values in logs.values()) == last
    assert np.isfinite(sum(logs.values(), [])).all()
    first, *_, next_line = pipeline.stdout[name].strip().splitlines()
    assert first == f"run {run_dir(name)}" and f"{ENV_ID}: cpu, float32" in pipeline.stdout[name]
    assert next_line.startswith("next: ") and f"{NEXT.get(stage, '')}" in next_line


def check_share(row, low, high):
    if "relative_to_demonstrator" in row and high != low:
        assert row["relative_to_demonstrator"] == pytest.approx((row["return_mean"] - low) / (high - low))


def test_scores(pipeline):
    """Means over episodes, of decoding over draws, and shares of the demonstrator."""
    results = pipeline.results
    demonstrator, decoded = results["collect_expert_data"], results["lapo_decode"]
    high = demonstrator["return_mean"]
    for name, episodes in {"collect_expert_data": 8, "ppo_procgen": 8, **dict.fromkeys(FINETUNED, 4)}.items():
        row = results[name]
        assert row["episodes"] == len(row["returns"]) == episodes
        assert row["return_mean"] == pytest.approx(np.mean(row["returns"]))
        assert name == "collect_expert_data" or row["frames"] == row["curve"][-1][0] == 2048
        check_share(row, row.get("random_mean"), high)
    meta = json.loads((pipeline.data / "meta.json").read_text())
    for key in ("return_mean", "return_stderr", "episodes"):
        assert decoded["demonstrator"][key] == meta["demonstrator"][key] == demonstrator[key]
    found = sorted((row["n_labels"], row["method"]) for row in decoded["curve"])
    assert found == [(n, m) for n in (16, 32) for m in ("cloning_from_scratch", "lapo_decoder")]
    for row in decoded["curve"]:
        draws = [np.mean(returns) for returns in row["returns"]]
        assert len(draws) == decoded["num_draws"] == 2 and row["draws"] == pytest.approx(draws)
        assert row["return_mean"] == pytest.approx(np.mean(draws)) and row["episodes"] == 4
        assert row["return_stderr"] == pytest.approx(abs(draws[0] - draws[1]) / 2)
    lines = pipeline.stdout["lapo_decode"].replace(" ", "").splitlines()
    for row in (*decoded["curve"], decoded["random"], decoded["demonstrator"]):
        check_share(row, decoded["random"]["return_mean"], high)
        score = f"{row['return_mean']:.2f}+-{row['return_stderr']:.2f}"
        assert any(line.startswith(row["method"]) and score in line for line in lines)
    assert len(decoded["random"]["returns"]) == 100


def test_pretraining_and_ppo_train_all_of_their_networks(pipeline):
    """Every tensor of IDM, FDM, codebooks and PPO's agent has moved: the gradient reaches them all."""
    torch.manual_seed(1)
    networks = [pretrain.IDM(0.25, 16), pretrain.VQ(2, 4, 2, 64, 0.05, 0.999), pretrain.FDM(16, 4)]
    torch.manual_seed(1)
    networks.append(ppo.Agent(0.25))
    for part, network in zip(("idm", "vq", "fdm", "agent"), networks):
        stage = "ppo_procgen" if part == "agent" else "lapo_pretrain"
        found = tensors(pipeline.checkpoints[stage], part)
        assert found.keys() == network.state_dict().keys()
        assert [name for name, x in network.state_dict().items() if torch.equal(x, found[name])] == []
    results = pipeline.results["lapo_pretrain"]
    assert [row["update"] for row in results["curve"]] == [3, 6]
    for key in ("test/fdm_loss", "test/copy_last_frame_loss", "test/idm_active_share"):
        assert results[key] == results["curve"][-1][key] > 0
    assert 0 <= results["probe/balanced_accuracy"] <= 1


def test_cloning_trains_on_the_idms_latents(pipeline):
    """latents.pt is what the frozen IDM makes of each window; all of the policy learns but the critic."""
    idm, network = tensors(pipeline.checkpoints["lapo_pretrain"], "idm"), bc.IDM(0.25, 16)
    carried = tensors(pipeline.checkpoints["lapo_bc"], "idm")
    assert all(torch.equal(x, carried[name]) for name, x in idm.items())
    frames, first = (np.load(pipeline.data / "train" / f"{name}.npy") for name in ("frames", "first"))
    t = np.flatnonzero(~first[1:-1] & ~first[2:]) + 1
    network.load_state_dict(idm)
    with torch.inference_mode():
        z = torch.cat([network(bc.get_windows(frames, piece, "cpu")) for piece in np.array_split(t, 4)])
    latents = load(pipeline.cwd / run_dir("lapo_bc") / "latents.pt")
    torch.testing.assert_close(latents, z, atol=1e-5, rtol=0)
    assert latents.std(0).mean() > 1e-3  # unlike each other: a shift by one row would show
    policy = tensors(pipeline.checkpoints["lapo_bc"], "policy")
    torch.testing.assert_close(policy["mean"], latents.mean(0), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(policy["std"], latents.std(0), atol=2e-6, rtol=1e-4)
    torch.manual_seed(1)
    initial = bc.LatentPolicy(0.25, 16).state_dict()
    still = {name for name, x in initial.items() if torch.equal(x, policy[name])}
    assert still == {"critic.weight", "critic.bias"}
    network = bc.LatentPolicy(0.25, 16)
    network.load_state_dict(policy)
    frames, first = (np.load(pipeline.data / "test" / f"{name}.npy") for name in ("frames", "first"))
    t = np.random.default_rng(0).permutation(np.flatnonzero(~first[1:-1] & ~first[2:]) + 1)[:1024]
    idm_network, results = bc.IDM(0.25, 16), pipeline.results["lapo_bc"]
    idm_network.load_state_dict(idm)
    with torch.inference_mode():
        z, guess = idm_network(bc.get_windows(frames, t, "cpu")), network(torch.from_numpy(frames[t]))
    unexplained = ((guess - z) / policy["std"]).square().mean().item()
    assert results["test/r2"] == pytest.approx(1 - unexplained, abs=1e-4)


def test_cloning_in_the_papers_raw_form(pipeline, work):
    """--no-standardize-latents: what is written is the policy that MSE on z itself gives."""
    inline(work, "lapo_bc", *TOY["lapo_bc"], *"--exp-name raw --no-standardize-latents".split())
    policy = tensors(work / run_dir("raw") / "checkpoint.pt", "policy")
    kept = tensors(pipeline.checkpoints["lapo_bc"], "policy")
    assert torch.equal(policy["mean"], kept["mean"]) and torch.equal(policy["std"], kept["std"])
    args, data = pipeline.results["lapo_bc"]["args"], pipeline.data / "train"
    frames, z = np.load(data / "frames.npy"), load(pipeline.cwd / run_dir("lapo_bc") / "latents.pt")
    first = np.load(data / "first.npy")
    t = np.flatnonzero(~first[1:-1] & ~first[2:]) + 1
    torch.manual_seed(1)
    slow = bc.LatentPolicy(0.25, 16)  # mean 0, deviation 1: its head makes z itself
    optimizer = torch.optim.Adam(slow.parameters())
    for step in range(args["num_updates"]):
        warmed_up = [0, args["warmup_updates"], max(args["warmup_updates"] + 1, args["num_updates"])]
        optimizer.param_groups[0]["lr"] = args["learning_rate"] * np.interp(step, warmed_up, [0.01, 1, 0])
        i = torch.randint(len(z), (args["batch_size"],))
        optimizer.zero_grad()
        F.mse_loss(slow(torch.from_numpy(frames[t[i]])), z[i]).backward()
        optimizer.step()
    written, obs = bc.LatentPolicy(0.25, 16), torch.from_numpy(frames[:64])
    written.load_state_dict(policy)
    torch.testing.assert_close(written(obs), slow(obs), atol=1e-5, rtol=1e-4)


def test_decoding_learns_from_aligned_labels(pipeline):
    """The kept policy is the cloned one; its decoder fits the labelled pairs, shifted ones far worse."""
    policy, decoder = tensors(pipeline.checkpoints["lapo_bc"], "policy"), decode.Decoder(16, (192, 128, 64))
    kept = tensors(pipeline.checkpoints["lapo_decode"], "policy")
    assert all(torch.equal(x, kept[name]) for name, x in policy.items())
    decoder.load_state_dict(tensors(pipeline.checkpoints["lapo_decode"], "decoder"))
    assert torch.equal(decoder.mean, policy["mean"]) and torch.equal(decoder.std, policy["std"])
    first, actions = (np.load(pipeline.data / "train" / f"{name}.npy") for name in ("first", "actions"))
    windows = np.flatnonzero(~first[1:-1] & ~first[2:]) + 1
    t = np.random.default_rng([1, 0]).permutation(windows)[:32]  # the first draw of seed 1
    z = load(pipeline.cwd / run_dir("lapo_bc") / "latents.pt")[np.searchsorted(windows, t)]
    a = torch.from_numpy(actions[t].astype(np.int64))
    losses = [F.cross_entropy(decoder(z), a.roll(shift)).item() for shift in range(16)]
    assert losses[0] < min(losses[1:]) - 0.1


def test_without_cloning(work):
    inline(work, "lapo_decode", *TOY["lapo_decode"], *"--exp-name alone --no-cloning".split())
    assert {row["method"] for row in results_of(work, "alone")["curve"]} == {"lapo_decoder"}


@pytest.mark.parametrize("name", FINETUNED)
def test_finetuning_trains_only_what_it_should(pipeline, name):
    """The frozen branch stays the cloned policy's bit for bit; the other Linear and both heads move."""
    cloned = tensors(pipeline.checkpoints["lapo_bc"], "policy")
    agent = tensors(pipeline.checkpoints[name], "agent")
    frozen = {k: k for k in agent if k.startswith("network.conv.")}
    assert len(frozen) == 30  # 3 sequences x 5 convolutions x (weight, bias)
    frozen |= {f"frozen_fc.{p}": f"network.fc.{p}" for p in ("weight", "bias")}
    frozen |= {f"head.{p}": f"head.{p}" for p in ("weight", "bias")}
    frozen |= {f"decoder.{p}": p for p in ("mean", "std")}
    assert [k for k, source in frozen.items() if not torch.equal(agent[k], cloned[source])] == []
    trained = [f"{part}.{p}" for part in ("network.fc", "critic") for p in ("weight", "bias")]
    assert [k for k in trained if torch.equal(agent[k], cloned[k])] == []
    assert (agent["actor.weight"] != 0).any() and (agent["actor.bias"] != 0).any()  # they began at 0
    torch.manual_seed(1)
    initial = finetune.FinetunedAgent(0.25, 1, 16, (192, 128, 64)).decoder.mlp.state_dict()
    moved = [not torch.equal(x, agent[f"decoder.mlp.{k}"]) for k, x in initial.items()]
    assert len(moved) == 8 and (any(moved) if name == NO_SL else all(moved)) == (name != NO_SL)
    known = {*frozen, *trained, *(f"decoder.mlp.{k}" for k in initial), "actor.weight", "actor.bias"}
    assert agent.keys() == known


@pytest.mark.parametrize("stage, network", [("lapo_pretrain", "FDM"), ("lapo_bc", "LatentPolicy")])
def test_losses_compare_frames_with_what_belongs_to_them(pipeline, work, monkeypatch, stage, network):
    """The FDM's guess from o_{t-1}, o_t with o_{t+1}; the policy's from o_t with the latent at t."""
    frames, first = (np.load(pipeline.data / "train" / f"{name}.npy") for name in ("frames", "first"))
    t = np.flatnonzero(~first[1:-1] & ~first[2:]) + 1
    belongs = torch.from_numpy(frames[t]), load(work / run_dir("lapo_bc") / "latents.pt")
    if stage == "lapo_pretrain":
        belongs = pretrain.get_windows(frames, t, "cpu").split([6, 3], dim=1)
    known = defaultdict(list)  # some frames occur more than once
    for x, y in zip(*belongs):
        known[x.numpy().tobytes()].append(y)
    given, compared, mse_loss = [], [], F.mse_loss

    def noting(guess, target):
        if guess.requires_grad and len(given) > len(compared):
            compared.append(target)
        return mse_loss(guess, target)

    def watch(module, inputs, output):
        if type(module).__name__ == network and torch.is_grad_enabled():
            given.append(inputs[0].clone())

    monkeypatch.setattr(F, "mse_loss", noting)
    with torch.nn.modules.module.register_module_forward_hook(watch):
        inline(work, stage, *TOY[stage], "--exp-name", "noted")
    assert len(given) == len(compared) == 6 and len(known) > 0.9 * len(t)
    for x, target in zip(torch.cat(given), torch.cat(compared)):
        assert any(
            torch.allclose(y, target, atol=1e-6, rtol=0) for y in known[x.contiguous().numpy().tobytes()]
        )


HEADS = [((512, 600, 2048), (0, 2.5e-3, 0))] * 2


@pytest.mark.parametrize(
    "stage, flags, rates",
    [  # for each group of parameters: the rate is linear between these steps, where it is this
        ("lapo_pretrain", "--num-updates 10 --warmup-updates 4", [((0, 4, 10), (3e-5, 3e-4, 3e-6))]),
        ("lapo_bc", "--num-updates 10 --warmup-updates 4", [((0, 4, 10), (2e-6, 2e-4, 0))]),
        ("ppo_procgen", "--anneal-lr", [((0, 2048), (5e-4, 0))]),
        ("lapo_finetune_ppo", "--no-sl", [*HEADS, ((600, 700, 2048), (0, 1e-3, 0))]),
    ],
)
def test_learning_rates(work, monkeypatch, stage, flags, rates):
    """Adam's rates at every step: linear up over the warm-up, linear down to the end."""
    found, step = [], torch.optim.Adam.step

    def noting(self, *args):
        found.append([group["lr"] for group in self.param_groups])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", noting)
    inline(work, stage, *TOY[stage], *flags.split(), "--exp-name", "rates")
    at = np.arange(10) if stage in ("lapo_pretrain", "lapo_bc") else np.repeat(np.arange(4) * 512, 3 * 8)
    np.testing.assert_allclose(found, np.transpose([np.interp(at, *rate) for rate in rates]), atol=1e-12)


def test_online_decoder_sees_aligned_transitions_of_one_episode(work, monkeypatch):
    """A pair is the IDM's latent of three consecutive frames of an episode and the action at their middle."""
    frames, actions, firsts, latents, fitted, original = [], [], [], {}, [], F.cross_entropy

    class Recorder(getattr(games, GAMES)):
        def act(self, action):
            if self.num == 16:
                for rows, row in zip((frames, firsts, actions), (*look(self), action)):
                    rows.append(row.copy())
            super().act(action)

    def watch(module, inputs, output):  # bytes of a latent -> bytes of its window; latents of every batch
        if type(module).__name__ == "IDM":
            windows = ((inputs[0] + 0.5) * 255).round().byte().permute(0, 2, 3, 1).numpy()
            latents.update({z.numpy().tobytes(): w.tobytes() for z, w in zip(output, windows)})
        if type(module).__name__ == "Decoder" and torch.is_grad_enabled():
            fitted.append([inputs[0].detach().clone(), None])

    def cross_entropy(logits, target, **kwargs):
        fitted[-1][1] = target.clone()
        return original(logits, target, **kwargs)

    monkeypatch.setattr(games, GAMES, Recorder)
    monkeypatch.setattr(F, "cross_entropy", cross_entropy)
    flags = ["--exp-name", "recorded", "--decoder-epochs", "1", "--eval-episodes", "2"]
    with torch.nn.modules.module.register_module_forward_hook(watch):
        inline(work, "lapo_finetune_ppo", *TOY["lapo_finetune_ppo"], *flags)

    assert len(frames) == 2048 // 16
    action_of, windows = {}, 0  # window's bytes -> true actions taken at its middle
    for t in range(1, 1536 // 16):  # the last refit is after 1536 frames, and sees the one that follows them
        for e in np.flatnonzero(~firsts[t] & ~firsts[t + 1]):
            window = np.concatenate([frames[t - 1][e], frames[t][e], frames[t + 1][e]], axis=-1).tobytes()
            action_of.setdefault(window, set()).add(int(actions[t][e]))
            windows += 1
    fitted = [pair for pair in fitted if pair[1] is not None]  # PPO's update runs it, too
    z, a = (torch.cat(x) for x in zip(*fitted[-int(np.ceil(windows / 512)) :]))
    assert len(z) == windows  # none lost, none across an episode's end or between rollouts
    assert len(action_of) > 0.9 * windows  # most windows are unlike any other
    assert all(action in action_of[latents[x.numpy().tobytes()]] for x, action in zip(z, a.tolist()))


def test_labels_are_not_needed_for_learning(pipeline, tmp_path):
    """Without actions, rewards and returns on disk, stages 2 and 3 end in the same tensors, bit for bit."""
    link_tree(pipeline.data, tmp_path / "data" / ENV_ID)
    for path in (tmp_path / "data").rglob("*.npy"):
        if path.stem in ("actions", "rewards", "returns"):
            path.unlink()
    for stage in ("lapo_pretrain", "lapo_bc"):
        inline(tmp_path, stage, *TOY[stage])
        assert same_tensors(tmp_path / run_dir(stage) / "checkpoint.pt", pipeline.checkpoints[stage]), stage
    without = results_of(tmp_path, "lapo_pretrain")
    assert without["test/fdm_loss"] == pipeline.results["lapo_pretrain"]["test/fdm_loss"]
    assert "probe/balanced_accuracy" not in without


@pytest.mark.parametrize("stage", ["lapo_pretrain", "ppo_procgen"])
def test_another_seed_gives_other_numbers(pipeline, work, stage):
    """That the same seed gives the same ones is in test_runs.py."""
    inline(work, stage, *TOY[stage], "--seed", "2")
    assert not same_tensors(work / run_dir(stage, 2) / "checkpoint.pt", pipeline.checkpoints[stage])


def test_demonstrators_of_all_levels_leave_some_for_testing(work):
    """Where the demonstrator has all levels the two splits share none."""
    path = work / run_dir("ppo_procgen") / "checkpoint.pt"
    replace(path, load(path) | {"num_levels": 0})
    small = "--num-train-frames 64 --num-test-frames 48 --data-dir all --exp-name all"
    inline(work, "collect_expert_data", *TOY["collect_expert_data"], *small.split())
    meta = json.loads((work / "all" / "meta.json").read_text())
    (low, n), (low_test, n_test) = ((s["start_level"], s["num_levels"]) for s in meta["splits"].values())
    assert meta["num_levels"] == low == 0 and min(n, n_test) > 1e9
    assert n <= low_test and low_test + n_test <= 2**31 - 1
    assert not np.array_equal(*(np.load(work / "all" / s / "frames.npy")[0] for s in ("train", "test")))
