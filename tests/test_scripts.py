"""The five scripts at toy size: the chain, what each run writes, what fine-tuning freezes, labels left alone, and reproducibility."""

import json
import re

import numpy as np
import procgen
import pytest
import torch
import torch.nn.functional as F
from conftest import ENV_ID, STAGES, TOY, bc, decode, finetune, inline, link_tree, run_dir, same_tensors, tensors
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

METHODS = ["random", "bc_from_scratch", "lapo_decoder", "demonstrator"]


def scalars(folder):
    """{tag: {step: value}} of a run folder's TensorBoard file."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def test_stages_chain_with_default_paths(pipeline):
    """Run one after the other with default paths, the five scripts leave results.json and checkpoint.pt of their stage, and name the next command."""
    for name, results in pipeline.results.items():
        stage = next(s for s in STAGES[::-1] if name.startswith(s))
        meta = torch.load(pipeline.checkpoints[name], weights_only=True)["meta"]
        assert (results["stage"], results["env_id"], results["seed"]) == (stage, ENV_ID, 1)
        assert [meta[key] for key in ("stage", "env_id", "num_levels", "start_level", "format_version")] == [stage, ENV_ID, 16, 0, 2]
        assert results["args"] == json.loads(json.dumps(meta["args"])) and results["device"] == "cpu" and results["wall_seconds"] > 0
    for stage, following in zip(STAGES, STAGES[1:]):
        assert f"python {following}.py --env-id {ENV_ID}" in pipeline.stdout[stage]


def test_final_table(pipeline):
    """The last thing lapo_decode prints is the table of four methods, in order, with the numbers of results.json."""
    results = pipeline.results["lapo_decode"]
    assert [r["method"] for r in results["rows"]] == METHODS
    lines = pipeline.stdout["lapo_decode"].splitlines()
    table = [line for line in lines if line.split(" ")[0] in METHODS][-4:]
    for line, row in zip(table, results["rows"]):
        assert line.startswith(row["method"] + " ") and f" {row['return_mean']:.2f} +- {row['return_stderr']:.2f} " in line
        assert re.search(rf" {row['episodes']} +{row['relative_return']:.2f} +{row['relative_to_demonstrator']:.2f}$", line)


def test_results_of_decoding(pipeline):
    """Every label count has both methods' mean over draws, its standard error over draws, and scores relative to paper and demonstrator."""
    results, demonstrator = pipeline.results["lapo_decode"], pipeline.results["collect_expert_data"]
    rows = {r["method"]: r for r in results["rows"]}
    assert [rows["demonstrator"][k] for k in ("return_mean", "return_stderr", "episodes")] == [
        demonstrator[k] for k in ("return_mean", "return_stderr", "episodes")
    ]
    assert rows["random"]["episodes"] >= 100 and rows["demonstrator"]["episodes"] == 8
    assert sorted((c["n_labels"], c["method"]) for c in results["curve"]) == [(n, m) for n in (16, 32) for m in sorted(METHODS[1:3])]
    for c in results["curve"]:
        assert len(c["draws"]) == 2 and c["episodes"] == 4
        assert c["return_mean"] == pytest.approx(np.mean(c["draws"]))
        assert c["return_stderr"] == pytest.approx(abs(c["draws"][0] - c["draws"][1]) / 2)
    random, expert = 0.6130, 13.4866
    low, high = rows["random"]["return_mean"], rows["demonstrator"]["return_mean"]
    for r in results["rows"] + results["curve"]:
        assert r["relative_return"] == pytest.approx((r["return_mean"] - random) / (expert - random))
        assert r["relative_to_demonstrator"] == pytest.approx((r["return_mean"] - low) / (high - low))
    for method in METHODS[1:3]:
        (c,) = (c for c in results["curve"] if (c["n_labels"], c["method"]) == (32, method))
        assert all(rows[method][k] == c[k] for k in ("return_mean", "return_stderr", "relative_return"))


def test_results_of_the_other_stages(pipeline):
    """results.json of the other stages holds the documented numbers, finite and of the run's length."""
    results = pipeline.results
    assert results["collect_expert_data"]["frames"] == 1024 and results["collect_expert_data"]["episodes"] == 8
    meta = json.loads((pipeline.data / "meta.json").read_text())
    assert meta["demonstrator"] == {k: results["collect_expert_data"][k] for k in ("return_mean", "return_stderr", "episodes")}
    assert {s: meta["splits"][s]["num_frames"] for s in meta["splits"]} == {"train": 2000, "test": 400}
    assert [c["update"] for c in results["lapo_pretrain"]["curve"]] == [3, 6]
    for key in ("test/fdm_loss", "test/copy_last_frame_loss", "test/idm_active_share", "probe/balanced_accuracy", "probe/chance"):
        assert np.isfinite(results["lapo_pretrain"][key]) and results["lapo_pretrain"][key] == results["lapo_pretrain"]["curve"][-1][key]
    assert results["lapo_bc"]["updates"] == 6 and 0 < results["lapo_bc"]["test/latent_mse"] < 10
    for name in ("lapo_finetune_ppo", "lapo_finetune_ppo_no_sl", "lapo_finetune_ppo_from_scratch"):
        r = results[name]
        assert (r["method"], r["frames"], r["episodes"]) == (name, 2048, 4)
        assert r["relative_return"] == pytest.approx((r["return_mean"] - 0.6130) / (13.4866 - 0.6130))
        high = results["collect_expert_data"]["return_mean"]
        assert r["relative_to_demonstrator"] == pytest.approx((r["return_mean"] - r["random_mean"]) / (high - r["random_mean"]))


def test_bc_labels_are_the_idms_latents(pipeline):
    """latents.npy holds, window by window, the continuous latent of the pretrained IDM, which the checkpoint carries along unchanged."""
    pretrained, cloned = tensors(pipeline.checkpoints["lapo_pretrain"]), tensors(pipeline.checkpoints["lapo_bc"])
    idm = {k: v for k, v in pretrained.items() if k.startswith("idm.")}
    assert idm and all(torch.equal(v, cloned[k]) for k, v in idm.items())
    frames, t = bc.load_frames(pipeline.data, "train", json.loads((pipeline.data / "meta.json").read_text()))
    latents = np.load(pipeline.cwd / run_dir("lapo_bc") / "latents.npy")
    assert latents.shape == (len(t), 16)
    model = bc.IDM(0.25, 16)
    model.load_state_dict({k[len("idm.") :]: v for k, v in idm.items()})
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        z = torch.cat([model(bc.get_windows(frames, c, "cpu")) for c in np.array_split(t, 4)])
    np.testing.assert_allclose(latents, z.numpy(), atol=2e-3)
    assert latents.std(0).mean() > 1e-3  # unlike each other: a shift by one row would show
    np.testing.assert_allclose(cloned["latent_mean"].numpy(), latents.mean(0), atol=1e-5)
    np.testing.assert_allclose(cloned["latent_std"].numpy(), latents.std(0) + 1e-6, rtol=1e-3)


@pytest.mark.parametrize(
    "flags, trained, decoder_inputs",
    [
        ("--choose-labels spread", (), 16),
        ("--decoder-features --finetune head", ("network.fc.", "head."), 16 + 256),
        ("--pseudo-labels --latent-steps 2 --pseudo-updates 20 --finetune all", ("network.", "head."), 16 + 256),
    ],
)
def test_our_decoders(pipeline, tmp_path, monkeypatch, flags, trained, decoder_inputs):
    """Our forms of decoding run, without cloning if asked, train those layers of the policy that they say, and see what they say."""
    cwd = link_tree(pipeline.cwd, tmp_path / "work")
    inline(monkeypatch, cwd, "lapo_decode", *TOY["lapo_decode"], "--exp-name", "ours", "--no-bc", "--decoder-updates", "20", *flags.split())
    results = json.loads((cwd / run_dir("ours") / "results.json").read_text())
    assert {row["method"] for row in results["curve"]} == {"lapo_decoder"}
    cloned, ours = tensors(pipeline.checkpoints["lapo_bc"]), tensors(cwd / run_dir("ours") / "checkpoint.pt")
    assert len(ours["decoder.mean"]) == decoder_inputs
    for name in (k for k in ours if k.startswith("policy.") and not k.startswith("policy.critic")):
        assert torch.equal(ours[name], cloned[name]) != name.startswith(tuple(f"policy.{part}" for part in trained) or "-"), name


def test_finetuning_on_labels_takes_its_epochs(pipeline, tmp_path, monkeypatch):
    """--finetune-epochs: so many passes over n labels in batches of --bc-batch-size, where that is more than --finetune-updates."""
    cwd, steps, step = link_tree(pipeline.cwd, tmp_path / "work"), [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *args, **kwargs: steps.append(1) or step(self, *args, **kwargs))
    flags = "--exp-name ours --no-bc --decoder-updates 20 --finetune all --finetune-updates 10 --finetune-epochs 4 --bc-batch-size 8"
    inline(monkeypatch, cwd, "lapo_decode", *TOY["lapo_decode"], *flags.split())
    assert len(steps) == 2 * (20 + 10 + 20 + 4 * 32 // 8)  # two draws; decoder and policy on 16 labels, on 32


@pytest.mark.parametrize("name", ["lapo_finetune_ppo", "lapo_finetune_ppo_no_sl"])
def test_finetuning_trains_only_what_it_should(pipeline, name):
    """Convolutions, the frozen Linear and the latent head stay the cloned policy's bit for bit; the other Linear and both heads move."""
    cloned, agent = tensors(pipeline.checkpoints["lapo_bc"]), tensors(pipeline.checkpoints[name])
    frozen = {k: f"policy.{k[len('agent.') :]}" for k in agent if k.startswith("agent.network.conv.")}
    assert len(frozen) == 30  # 3 sequences x 5 convolutions x (weight, bias)
    frozen |= {f"agent.frozen_fc.{p}": f"policy.network.fc.{p}" for p in ("weight", "bias")}
    frozen |= {f"agent.latent_head.{p}": f"policy.head.{p}" for p in ("weight", "bias")}
    frozen |= {"agent.decoder.mean": "latent_mean", "agent.decoder.std": "latent_std"}
    for mine, source in frozen.items():
        assert torch.equal(agent[mine], cloned[source]), mine
    trained = {f"agent.{m}.{p}": f"policy.{m}.{p}" for m in ("network.fc", "critic") for p in ("weight", "bias")}
    for mine, source in trained.items():
        assert not torch.equal(agent[mine], cloned[source]), mine
    for p in ("weight", "bias"):
        assert (agent[f"agent.actor.{p}"] != 0).any()  # it began at 0
    torch.manual_seed(1)
    start = finetune.Agent(0.25, 1, 16, (192, 128, 64)).decoder.state_dict()
    decoder = [k for k in start if k.startswith("mlp.")]
    moved = [not torch.equal(start[k], agent[f"agent.decoder.{k}"]) for k in decoder]
    assert len(decoder) == 8 and (all(moved) if name == "lapo_finetune_ppo" else not any(moved))
    assert decoder + ["mean", "std"] and set(agent) == set(frozen) | set(trained) | {f"agent.decoder.{k}" for k in decoder} | {
        "agent.actor.weight", "agent.actor.bias"
    }  # fmt: skip


def test_ppo_from_scratch_trains_everything(pipeline):
    """PPO from scratch has the size of the cloned policy's network, and every tensor of it has moved."""
    agent = tensors(pipeline.checkpoints["lapo_finetune_ppo_from_scratch"])
    torch.manual_seed(1)
    start = finetune.Agent(0.25).state_dict()
    assert set(agent) == {f"agent.{k}" for k in start}
    assert all(not torch.equal(v, agent[f"agent.{k}"]) for k, v in start.items())


def test_frozen_branch_is_the_cloned_policy(pipeline):
    """The fine-tuned agent's frozen branch computes the cloned policy's latent of an observation."""
    cloned, tuned = (torch.load(pipeline.checkpoints[name], weights_only=True) for name in ("lapo_bc", "lapo_finetune_ppo"))
    policy, agent = bc.LatentPolicy(0.25, 16), finetune.Agent(0.25, 1, 16, (192, 128, 64))
    policy.load_state_dict(cloned["policy"])
    agent.load_state_dict(tuned["agent"])
    obs = torch.from_numpy(np.load(pipeline.data / "test" / "frames.npy")[:32])
    z = policy(obs)
    features = agent.features(obs)
    torch.testing.assert_close(agent.latent_head(torch.relu(agent.frozen_fc(features))), z)
    torch.testing.assert_close(agent.decoder_logits(features), agent.decoder(z))
    assert z.std(0).mean() > 1e-5


def test_finetuning_schedule_in_the_logs(pipeline):
    """The logged learning rates are the warm-ups', and the decoder is refit exactly after the updates within its frames, but the last."""
    logs = scalars(pipeline.cwd / run_dir("lapo_finetune_ppo"))
    for name, warmup, peak in (("action_head", (512, 600), 0.25), ("value_head", (512, 600), 0.25), ("linear", (600, 700), 0.1)):
        rates = logs[f"charts/learning_rate_{name}"]
        assert sorted(rates) == [512, 1024, 1536, 2048]  # after each of 4 updates; the rate is that of the frames before it
        want = [0, 0] + [peak * 1e-2 * (2048 - frames) / (2048 - warmup[1]) for frames in (1024, 1536)]
        np.testing.assert_allclose([rates[s] for s in sorted(rates)], want, rtol=1e-5)
    assert sorted(logs["decoder/accuracy"]) == [512, 1024, 1536]  # not after the last, whose policy is scored
    assert "decoder/accuracy" not in scalars(pipeline.cwd / run_dir("lapo_finetune_ppo_no_sl"))


def test_online_decoder_sees_aligned_transitions_of_one_episode(pipeline, tmp_path, monkeypatch):
    """Each pair of the online decoder is the IDM's latent of three consecutive frames of one game's episode and the action at their middle."""
    frames, actions, firsts = [], [], []

    class Recorder(procgen.ProcgenGym3Env):
        def act(self, action):
            if self.num == 16:
                _, obs, first = self.observe()
                frames.append(obs["rgb"].copy()), firsts.append(first.copy()), actions.append(action.copy())
            super().act(action)

    latents, fitted = {}, []  # bytes of a latent -> bytes of its window; (bytes of a latent, action)

    def watch(module, inputs, output):
        if type(module).__name__ == "IDM":
            windows = ((inputs[0] + 0.5) * 255).round().byte().permute(0, 2, 3, 1).numpy()
            latents.update({z.numpy().tobytes(): w.tobytes() for z, w in zip(output, windows)})
        if type(module).__name__ == "Decoder" and torch.is_grad_enabled():
            fitted.append([inputs[0].detach().clone(), None])

    def cross_entropy(logits, target, **kwargs):
        fitted[-1][1] = target.clone()
        return original(logits, target, **kwargs)

    original = F.cross_entropy
    monkeypatch.setattr(procgen, "ProcgenGym3Env", Recorder)
    monkeypatch.setattr(F, "cross_entropy", cross_entropy)
    handle = torch.nn.modules.module.register_module_forward_hook(watch)
    try:
        flags = ["--bc-checkpoint", pipeline.checkpoints["lapo_bc"], "--no-bf16", "--decoder-epochs", "1", "--eval-episodes", "2"]
        inline(monkeypatch, tmp_path, "lapo_finetune_ppo", *TOY["lapo_finetune_ppo"], *flags)
    finally:
        handle.remove()

    played = len(frames)
    assert played == 2048 // 16
    action_of, windows = {}, 0  # window's bytes -> true actions taken at its middle
    for t in range(1, 1536 // 16 - 1 + 1):  # the decoder is last refit after 1536 frames, and o_{t+1} may be the next rollout's first
        for e in range(16):
            if not firsts[t][e] and not firsts[t + 1][e]:
                windows += 1
                window = np.concatenate([frames[t - 1][e], frames[t][e], frames[t + 1][e]], axis=-1).tobytes()
                action_of.setdefault(window, set()).add(int(actions[t][e]))
    batches = int(np.ceil(windows / 512))
    last_fit = fitted[-batches:]
    z, a = (torch.cat(x) for x in zip(*last_fit))
    assert len(z) == windows  # none lost, none across an episode's end or between rollouts
    assert len(action_of) > 0.9 * windows  # most windows are unlike any other
    for latent, action in zip(z, a.tolist()):
        assert action in action_of[latents[latent.numpy().tobytes()]]


def test_labels_are_not_needed_for_learning(pipeline, tmp_path, monkeypatch):
    """Without actions, rewards and returns on disk, pretraining and cloning run and end in the same tensors, bit for bit."""
    link_tree(pipeline.data, tmp_path / "data" / ENV_ID)
    for split in ("train", "test"):
        for name in ("actions", "rewards", "returns"):
            (tmp_path / "data" / ENV_ID / split / f"{name}.npy").unlink()
    for stage in ("lapo_pretrain", "lapo_bc"):
        inline(monkeypatch, tmp_path, stage, *TOY[stage])
        assert same_tensors(tmp_path / run_dir(stage) / "checkpoint.pt", pipeline.checkpoints[stage]), stage
    with_labels, without = pipeline.results["lapo_pretrain"], json.loads((tmp_path / run_dir("lapo_pretrain") / "results.json").read_text())
    assert "probe/balanced_accuracy" in with_labels and "probe/balanced_accuracy" not in without
    assert with_labels["test/fdm_loss"] == without["test/fdm_loss"]


def test_same_seed_same_dataset(pipeline, tmp_path, monkeypatch):
    """Training the demonstrator and collecting again gives the same files; another seed gives others."""
    arrays = [f"{split}/{name}.npy" for split in ("train", "test") for name in ("frames", "first", "actions", "rewards", "returns")]
    for seed, same in ((1, True), (2, False)):
        inline(monkeypatch, tmp_path, "collect_expert_data", *TOY["collect_expert_data"], "--seed", seed, "--data-dir", f"data{seed}")
        assert same_tensors(tmp_path / run_dir("collect_expert_data", seed) / "checkpoint.pt", pipeline.checkpoints["collect_expert_data"]) == same
        for name in arrays:
            assert ((pipeline.data / name).read_bytes() == (tmp_path / f"data{seed}" / name).read_bytes()) == same, name


@pytest.mark.parametrize("stage", ["lapo_pretrain", "lapo_finetune_ppo"])
def test_same_seed_same_numbers(pipeline, tmp_path, monkeypatch, stage):
    """A second run with the same seed ends in the same tensors and scores; one with another seed does not."""
    link_tree(pipeline.data, tmp_path / "data" / ENV_ID)
    for seed, same in ((1, True), (2, False)):
        flags = ["--seed", seed] + ["--bc-checkpoint", pipeline.checkpoints["lapo_bc"]] * (stage == "lapo_finetune_ppo")
        inline(monkeypatch, tmp_path, stage, *TOY[stage], *flags)
        assert same_tensors(tmp_path / run_dir(stage, seed) / "checkpoint.pt", pipeline.checkpoints[stage]) == same
        again = json.loads((tmp_path / run_dir(stage, seed) / "results.json").read_text())
        assert (again["curve"] == pipeline.results[stage]["curve"]) == same


def test_shipped_demonstrator(pipeline, tmp_path, monkeypatch):
    """--expert-checkpoint plays a demonstrator without training it, on its levels by default; over all levels the splits share none."""
    for folder, flags in (("same", []), ("all", ["--num-levels", "0"])):
        small = f"--env-id {ENV_ID} --no-cuda --num-envs 16 --num-train-frames 64 --num-test-frames 48 --eval-episodes 2 --overwrite".split()
        inline(monkeypatch, tmp_path, "collect_expert_data", *small, *flags, "--data-dir", folder, "--expert-checkpoint",
               pipeline.checkpoints["collect_expert_data"])  # fmt: skip
    metas = {folder: json.loads((tmp_path / folder / "meta.json").read_text()) for folder in ("same", "all")}
    assert json.loads((tmp_path / run_dir("collect_expert_data") / "results.json").read_text())["frames"] == 0
    assert (metas["same"]["num_levels"], metas["same"]["start_level"]) == (16, 0)
    (start, n), (test_start, test_n) = ((s["start_level"], s["num_levels"]) for s in metas["all"]["splits"].values())
    assert start == 0 and start + n <= test_start and test_start + test_n <= 2**31 - 1 and min(n, test_n) > 10**9
    first_frames = [np.load(tmp_path / "all" / split / "frames.npy")[::4] for split in ("train", "test")]
    assert not np.array_equal(first_frames[0][:12], first_frames[1][:12])


def test_decoding_checkpoint_plays(pipeline):
    """The policy of lapo_decode's checkpoint is the cloned one, its decoder standardises by the cloned latents, and it is trained."""
    cloned, decoded = tensors(pipeline.checkpoints["lapo_bc"]), tensors(pipeline.checkpoints["lapo_decode"])
    policy = [k for k in cloned if k.startswith("policy.")]
    assert policy and all(torch.equal(cloned[k], decoded[k]) for k in policy)
    assert torch.equal(decoded["decoder.mean"], cloned["latent_mean"]) and torch.equal(decoded["decoder.std"], cloned["latent_std"])
    decoder = decode.Decoder(16, (192, 128, 64))
    decoder.load_state_dict({k[len("decoder.") :]: v for k, v in decoded.items() if k.startswith("decoder.")})
    valid_t = decode.load_frames(pipeline.data, "train", json.loads((pipeline.data / "meta.json").read_text()))[1]
    t = np.random.default_rng([1, 0]).permutation(valid_t)[:32]  # the first draw of seed 1
    actions = torch.from_numpy(np.load(pipeline.data / "train" / "actions.npy")[t].astype(np.int64))
    z = torch.from_numpy(np.load(pipeline.cwd / run_dir("lapo_bc") / "latents.npy")[np.searchsorted(valid_t, t)])
    losses = [F.cross_entropy(decoder(z), actions.roll(shift)).item() for shift in range(16)]
    assert losses[0] < min(losses[1:]) - 0.1  # fitted on these very pairs: every shift of the labels is worse
