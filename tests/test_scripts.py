"""The stages end to end at toy size: what they write, what each one trains, labels left alone, schedules."""

import io  # noqa: I001
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    ENV_ID, GAMES, NO_SL, RUNS, STAGES, TOY, bc, decode, finetune, games, inline, link_tree, load, look, ppo,
    pretrain, replace, results_of, run_dir, same, same_networks, scalars,
)  # fmt: skip
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_data import split_args

HOLDS = {  # stage: what its checkpoint holds beside what all hold, what its logs hold, their last step
    "ppo_procgen": ("agent num_levels start_level returns", "charts/learning_rate losses/policy_loss", 2048),
    "collect_expert_data": ("", "charts/episodic_return", 2400),
    "lapo_pretrain": ("idm vq fdm data", "charts/learning_rate losses/fdm_loss codebook/perplexity_1", 6),
    "lapo_bc": ("policy idm pretrain_args data", "losses/latent_mse test/r2 test/effective_rank", 6),
    "lapo_decode": ("policy decoder pretrain_args bc_args data", "lapo_decoder/return_mean", 32),
    "lapo_finetune_ppo": ("agent", "charts/episodic_return losses/explained_variance", 2048),
}
NEXT = dict(zip(STAGES, STAGES[1:]))
FINETUNED = ("lapo_finetune_ppo", NO_SL)


@pytest.mark.parametrize("name", RUNS)
def test_what_a_run_leaves(pipeline, name):
    """results.json, checkpoint.pt and logs say what they are and rest on; the last line what is next."""
    stage, results, folder = RUNS[name][0], pipeline.results[name], pipeline.checkpoints[name].parent
    logs, (parts, tags, last) = scalars(folder), HOLDS[stage]
    found = [results]
    if parts:
        checkpoint = load(folder / "checkpoint.pt")
        assert set(parts.split()) <= checkpoint.keys() and "optimizer" not in checkpoint
        found.append(checkpoint)
    for said in found:
        assert [said[key] for key in ("format_version", "stage", "env_id")] == [5, stage, ENV_ID]
        assert said["command"].startswith(f"python {stage}.py --env-id {ENV_ID} --no-cuda")
        assert said["processes"] == 1 and said["args"].keys() == results["args"].keys()
    assert results["args"]["bf16"] is False and results["args"]["env_id"] == ENV_ID
    assert results["wall_seconds"] > 0 and results["threads"] == 1 and results["torch"] == torch.__version__
    left = {path.name for path in folder.iterdir() if not path.name.startswith("events")}
    assert left - {".lock"} == {"results.json", *(["checkpoint.pt"] if parts else [])}
    assert set(tags.split()) <= logs.keys() and max(values[-1][0] for values in logs.values()) == last
    assert np.isfinite(sum(logs.values(), [])).all()
    *_, wrote, next_line = pipeline.stdout[name].strip().splitlines()
    assert f"wrote {run_dir(name)}" in pipeline.stdout[name]
    assert next_line.startswith("next: ") and f"{NEXT.get(stage, '')}" in next_line


def test_scores(pipeline):
    """Means over episodes, of decoding over draws, and shares of the demonstrator above random play."""
    results, decoded = pipeline.results, pipeline.results["lapo_decode"]
    meta = json.loads((pipeline.data / "meta.json").read_text())
    low, high = (meta[who]["return_mean"] for who in ("random", "demonstrator"))
    for name, episodes in {"collect_expert_data": 8, "ppo_procgen": 8, **dict.fromkeys(FINETUNED, 4)}.items():
        row = results[name]
        assert row["episodes"] == len(row["returns"]) == episodes
        assert row["return_mean"] == pytest.approx(np.mean(row["returns"]))
        assert row["return_stderr"] == pytest.approx(np.std(row["returns"], ddof=1) / episodes**0.5)
        assert name == "collect_expert_data" or row["frames"] == row["curve"][-1][0] == 2048
    assert high == results["ppo_procgen"]["return_mean"] == results["collect_expert_data"]["return_mean"]
    assert all(decoded[who].items() >= meta[who].items() for who in ("random", "demonstrator"))
    found = sorted((row["n_labels"], row["method"]) for row in decoded["curve"])
    assert found == [(n, m) for n in (16, 32) for m in ("cloning_from_scratch", "lapo_decoder")]
    for row in decoded["curve"]:
        draws = [np.mean(returns) for returns in row["returns"]]
        assert len(draws) == decoded["num_draws"] == 2 and row["draws"] == pytest.approx(draws)
        assert row["return_mean"] == pytest.approx(np.mean(draws)) and row["episodes"] == 4
        assert row["return_stderr"] == pytest.approx(abs(draws[0] - draws[1]) / 2)
    printed = pipeline.stdout["lapo_decode"].replace(" ", "")
    for row in (*decoded["curve"], decoded["random"], decoded["demonstrator"], *map(results.get, FINETUNED)):
        share = (row["return_mean"] - low) / (high - low) if high != low else np.nan
        assert row["relative_to_demonstrator"] == pytest.approx(share, nan_ok=True)
        assert "method" not in row or f"{row['return_mean']:.2f}+-{row['return_stderr']:.2f}" in printed


@pytest.fixture(scope="module")
def cloned(pipeline):
    """Frames (N, 64, 64, 3), times (n,) of the windows of the training split, the IDM's latents (n, 16)."""
    frames, first = (np.load(pipeline.data / "train" / f"{name}.npy") for name in ("frames", "first"))
    t, idm = np.flatnonzero(~first[1:-1] & ~first[2:]) + 1, bc.IDM(0.25, 16)
    idm.load_state_dict(load(pipeline.checkpoints["lapo_pretrain"])["idm"])
    with torch.inference_mode():
        z = torch.cat([idm(bc.get_windows(frames, piece, "cpu")) for piece in np.array_split(t, 4)])
    assert z.std(0).mean() > 1e-3  # unlike each other: a shift by one row would show
    return frames, t, z.clone()


def new_policy():
    """As cloning begins with it."""
    torch.manual_seed(1)
    bc.IDM(0.25, 16)
    return bc.LatentPolicy(0.25, 16)


def still(initial, trained):
    return {name for name, x in initial.state_dict().items() if torch.equal(x, trained[name])}


@pytest.mark.parametrize("standardize", [True, False])
def test_cloning_against_a_slow_loop(pipeline, work, cloned, standardize):
    """The policy that is written is what MSE, in units of s or on z itself, gives on each step's draws.

    The IDM stays as it was, m and s are its latents'; all of the policy learns but the critic.
    """
    frames, t, z = cloned
    known = load(pipeline.checkpoints["lapo_bc"])
    if not standardize:
        inline(work, "lapo_bc", *TOY["lapo_bc"], "--no-standardize-latents", "--overwrite")
    checkpoint = load(work / run_dir("lapo_bc") / "checkpoint.pt")
    policy, args = checkpoint["policy"], known["args"]
    assert same(checkpoint["idm"], load(pipeline.checkpoints["lapo_pretrain"])["idm"])
    torch.testing.assert_close(policy["mean"], z.mean(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(policy["std"], z.std(0), atol=2e-6, rtol=1e-3)
    slow, initial = new_policy(), new_policy()  # mean 0, deviation 1
    optimizer = torch.optim.Adam(slow.parameters())
    mean, std = (policy["mean"], policy["std"]) if standardize else (0, 1)
    for step in range(1, args["num_updates"] + 1):
        warmed_up = [1, args["warmup_updates"] + 1, args["num_updates"] + 1]
        optimizer.param_groups[0]["lr"] = args["learning_rate"] * np.interp(step, warmed_up, [0.01, 1, 0])
        i = np.random.default_rng([1, step, 0]).integers(len(z), size=args["batch_size"])
        optimizer.zero_grad()
        F.mse_loss(slow(torch.from_numpy(frames[t[i]])), (z[i] - mean) / std).backward()
        optimizer.step()
    assert still(initial, policy) == {"critic.weight", "critic.bias"}
    written, obs = bc.LatentPolicy(0.25, 16), torch.from_numpy(frames[:64])
    written.load_state_dict(policy)
    torch.testing.assert_close((written(obs) - mean) / std, slow(obs), atol=1e-4, rtol=1e-3)


def test_decoding_learns_from_aligned_labels(pipeline, cloned):
    """The policy is the cloned one; its decoder fits the labelled pairs, shifted ones far worse."""
    _, windows, z = cloned
    policy, decoder = load(pipeline.checkpoints["lapo_bc"])["policy"], decode.Decoder(16, (192, 128, 64))
    checkpoint = load(pipeline.checkpoints["lapo_decode"])
    assert same(checkpoint["policy"], policy)
    decoder.load_state_dict(checkpoint["decoder"])
    assert torch.equal(decoder.mean, policy["mean"]) and torch.equal(decoder.std, policy["std"])
    t = np.random.default_rng([1, 0]).permutation(windows)[:32]  # the first draw of seed 1
    a = torch.from_numpy(np.load(pipeline.data / "train" / "actions.npy")[t].astype(np.int64))
    z = z[np.searchsorted(windows, t)]
    losses = [F.cross_entropy(decoder(z), a.roll(shift)).item() for shift in range(16)]
    assert losses[0] < min(losses[1:]) - 0.1


@pytest.mark.parametrize("name", FINETUNED)
def test_finetuning_trains_only_what_it_should(pipeline, name):
    """The frozen branch stays the cloned policy's bit for bit; the other Linear and both heads move."""
    cloned = load(pipeline.checkpoints["lapo_bc"])["policy"]
    agent = load(pipeline.checkpoints[name])["agent"]
    frozen = {k: k for k in agent if k.startswith("network.conv.")}
    frozen |= {"decoder.mean": "mean", "decoder.std": "std"}
    assert len(frozen) == 30 + 2  # 3 sequences x 5 convolutions x (weight, bias)
    trained = ["actor.weight", "actor.bias"]  # which began at 0
    for p in ("weight", "bias"):
        frozen |= {f"frozen_fc.{p}": f"network.fc.{p}", f"head.{p}": f"head.{p}"}
        trained += [f"network.fc.{p}", f"critic.{p}"]
    assert [k for k, source in frozen.items() if not torch.equal(agent[k], cloned[source])] == []
    assert [k for k in trained if torch.equal(agent[k], cloned.get(k, 0 * agent[k]))] == []
    torch.manual_seed(1)
    finetune.IDM(0.25, 16)  # made first
    initial = finetune.FinetunedAgent(0.25, 1, 16, (192, 128, 64)).decoder.mlp.state_dict()
    moved = [not torch.equal(x, agent[f"decoder.mlp.{k}"]) for k, x in initial.items()]
    assert len(moved) == 8 and (any(moved) if name == NO_SL else all(moved)) == (name != NO_SL)
    assert agent.keys() == {*frozen, *trained, *(f"decoder.mlp.{k}" for k in initial)}


def test_pretraining_against_a_slow_loop(pipeline, cloned):
    """The networks are those that the loss between o^_{t+1} and o_{t+1} gives on the draws of each step.

    All of them have moved, and so has all of PPO's agent.
    """
    frames, t, _ = cloned
    checkpoint = load(pipeline.checkpoints["lapo_pretrain"])
    args = checkpoint["args"]
    torch.manual_seed(1)
    idm, vq, fdm = pretrain.IDM(0.25, 16), pretrain.VQ(2, 4, 2, 64, 0.05, 0.999), pretrain.FDM(16, 4)
    parameters = [*idm.parameters(), *fdm.parameters()]
    optimizer = torch.optim.Adam(parameters)
    for step in range(1, args["num_updates"] + 1):
        warmed_up = np.interp(step, [1, args["warmup_updates"] + 1], [0.1, 1])  # longer than this run
        optimizer.param_groups[0]["lr"] = args["learning_rate"] * warmed_up
        batch = np.random.default_rng([1, step, 0]).choice(t, 16)
        past = torch.from_numpy(np.concatenate([frames[batch - 1], frames[batch]], -1)).permute(0, 3, 1, 2)
        future = torch.from_numpy(frames[batch + 1]).permute(0, 3, 1, 2)
        past, future = past / 255 - 0.5, future / 255 - 0.5
        quantised, vq_loss, _, _ = vq(idm(torch.cat([past, future], dim=1)))
        optimizer.zero_grad()
        (F.mse_loss(fdm(past, quantised), future) + vq_loss).backward()
        torch.nn.utils.clip_grad_norm_(parameters, args["max_grad_norm"])
        optimizer.step()
    torch.manual_seed(1)
    initial = pretrain.IDM(0.25, 16), pretrain.VQ(2, 4, 2, 64, 0.05, 0.999), pretrain.FDM(16, 4)
    assert not any(still(x, checkpoint[name]) for x, name in zip(initial, ("idm", "vq", "fdm")))
    torch.manual_seed(1)
    assert not still(ppo.Agent(0.25), load(pipeline.checkpoints["ppo_procgen"])["agent"])
    for name, network in (("idm", idm), ("vq", vq), ("fdm", fdm)):
        for key, x in network.state_dict().items():
            torch.testing.assert_close(checkpoint[name][key], x, atol=2e-4, rtol=1e-3)


def test_online_decoder_sees_aligned_transitions_of_one_episode(work, monkeypatch):
    """A pair is the IDM's latent of three consecutive frames of an episode and the action at their middle."""
    frames, actions, firsts, window_of, fits, fit_decoder = [], [], [], {}, [], finetune.fit_decoder

    class Recorder(getattr(games, GAMES)):
        def act(self, action):
            if self.num == 16:
                for rows, row in zip((frames, firsts, actions), (*look(self), action)):
                    rows.append(row.copy())
            super().act(action)

    def watch(module, inputs, output):  # bytes of a latent -> bytes of its window
        if type(module).__name__ == "IDM":
            windows = ((inputs[0] + 0.5) * 255).round().byte().permute(0, 2, 3, 1).numpy()
            window_of.update({z.numpy().tobytes(): w.tobytes() for z, w in zip(output, windows)})

    def noting(decoder, z, actions, args):
        fits.append((z, actions.tolist()))
        return fit_decoder(decoder, z, actions, args)

    monkeypatch.setattr(games, GAMES, Recorder)
    monkeypatch.setattr(finetune, "fit_decoder", noting)
    with torch.nn.modules.module.register_module_forward_hook(watch):
        inline(
            work,
            "lapo_finetune_ppo",
            *TOY["lapo_finetune_ppo"],
            *"--exp-name noted --eval-episodes 2".split(),
        )

    assert len(frames) == 2048 // 16
    action_of, windows = {}, 0  # window's bytes -> true actions taken at its middle
    for t in range(1, 1536 // 16):  # the last refit is after 1536 frames, and sees the one that follows them
        for e in np.flatnonzero(~firsts[t] & ~firsts[t + 1]):
            window = np.concatenate([frames[t - 1][e], frames[t][e], frames[t + 1][e]], axis=-1).tobytes()
            action_of.setdefault(window, set()).add(int(actions[t][e]))
            windows += 1
    z, a = fits[-1]
    assert len(z) == windows  # none lost, none across an episode's end or between rollouts
    assert len(action_of) > 0.9 * windows  # most windows are unlike any other
    assert all(action in action_of[window_of[x.numpy().tobytes()]] for x, action in zip(z, a))


def test_pictures_of_predictions(pipeline):
    """Each evaluation logs an image whose upper rows are test frames."""
    folder = pipeline.checkpoints["lapo_pretrain"].parent
    events = EventAccumulator(str(folder))
    events.Reload()
    images = events.Images("test/now_next_predicted")
    assert [image.step for image in images] == [3, 6]
    image = np.asarray(Image.open(io.BytesIO(images[0].encoded_image_string)))
    test = pretrain.load_dataset(split_args(pipeline.data))[2]
    t = np.random.default_rng(0).permutation(test.windows)[:8]
    frames = np.concatenate([np.concatenate(test[t + k], axis=1) for k in (0, 1)])
    assert image.shape == (192, 512, 3) and np.abs(image[:128].astype(int) - frames).max() <= 1


def test_a_collapsed_codebook(work, capsys):
    """A run that ends with one code in use says so."""
    inline(work, "lapo_pretrain", *TOY["lapo_pretrain"], "--vq-num-codes", "1", "--overwrite")
    assert "one code in use (test/perplexity_0, test/perplexity_1)" in capsys.readouterr().out


def test_labels_are_not_needed_for_learning(pipeline, tmp_path):
    """Without actions, rewards and returns on disk, stages 2 and 3 end in the same tensors, bit for bit."""
    link_tree(pipeline.data, tmp_path / "data" / ENV_ID)
    for path in (tmp_path / "data").rglob("*.npy"):
        if path.stem in ("actions", "rewards", "returns"):
            path.unlink()
    for stage in ("lapo_pretrain", "lapo_bc"):
        inline(tmp_path, stage, *TOY[stage])
        assert same_networks(tmp_path / run_dir(stage) / "checkpoint.pt", pipeline.checkpoints[stage]), stage
    without = results_of(tmp_path, "lapo_pretrain")
    assert without["test/fdm_loss"] == pipeline.results["lapo_pretrain"]["test/fdm_loss"]
    assert "probe/balanced_accuracy" not in without


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
