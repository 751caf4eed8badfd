"""vpt.py on the toy pipeline: what it starts from, labels and pseudo-labels, resume, refusals."""

import json

import collect_results
import numpy as np
import pytest
import torch
from conftest import (
    ENV_ID,
    decode,
    inline,
    interrupted,
    load,
    refusal,
    replace,
    run_dir,
    same_tensors,
    tensors,
)
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import vpt

TOY = f"--env-id {ENV_ID} --no-cuda --no-bf16 --num-labels 16 64 --num-draws 2 --eval-episodes 4".split()
TOY += "--idm-scale 0.25 --policy-scale 0.25 --idm-epochs 3 --policy-updates 8 --batch-size 32".split()
FLOAT32 = torch.autocast("cpu", enabled=False)
LAPO = ["--pretrain-checkpoint", run_dir("lapo_pretrain") / "checkpoint.pt"]
LAPO += ["--bc-checkpoint", run_dir("lapo_bc") / "checkpoint.pt"]


def test_random_shift():
    """Every image is a crop of itself with its edges repeated; all shifts occur; channels move alike."""
    torch.manual_seed(0)
    images = torch.randint(256, (400, 6, 7, 2), dtype=torch.uint8)
    shifted, seen = vpt.random_shift(images, 2).numpy(), set()
    assert shifted.dtype == np.uint8 and torch.equal(vpt.random_shift(images, 0), images)
    for image, found in zip(images.numpy(), shifted):
        padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode="edge")
        crops = {(y, x): padded[y : y + 6, x : x + 7] for y in range(5) for x in range(5)}
        (where,) = [at for at, crop in crops.items() if np.array_equal(crop, found)]
        seen.add(where)
    assert len(seen) == 25


def test_scores_of_the_same_labels(pipeline, work):
    """A row a count, scored as decoding scores them; the networks kept are the last count's, of draw 0."""
    inline(work, "vpt", *TOY)
    results = json.loads((work / run_dir("vpt") / "results.json").read_text())
    assert [(row["method"], row["n_labels"]) for row in results["curve"]] == [("vpt", 16), ("vpt", 64)]
    assert results["stage"] == "vpt"
    assert results["demonstrator"] == pipeline.results["lapo_decode"]["demonstrator"]
    collected = collect_results.rows_of(work / run_dir("vpt"), results, "small")["runs.csv"]
    worst, best = (results[end]["return_mean"] for end in ("random", "demonstrator"))
    for row in results["curve"]:
        assert row["episodes"] == 4 and row["return_mean"] == pytest.approx(np.mean(row["returns"]))
        assert row["relative_to_demonstrator"] == pytest.approx((row["return_mean"] - worst) / (best - worst))
    shares = results["pseudo_label_accuracy"]
    assert shares.keys() == {"16", "64"} and all(0 < share < 1 for share in shares.values())
    collected = [(row["method"], row["n_labels"], row["label_accuracy"]) for row in collected]
    assert collected == [("vpt", 16, shares["16"]), ("vpt", 64, shares["64"])]
    # the same fit by hand
    _, frames, windows = decode.load_dataset(vpt.Args(env_id=ENV_ID, data_dir=str(pipeline.data)))
    actions = frames["train"].labels("actions")
    args = vpt.Args(idm_scale=0.25, policy_scale=0.25, idm_epochs=3, policy_updates=8, batch_size=32)
    t = np.random.default_rng([1, 0]).permutation(windows["train"])[:64]  # lapo_decode.py's, of seed 1
    torch.manual_seed(1000)
    for n in (16, 64):
        idm, policy = vpt.new_networks(15, {}, {}, args, "cpu")
        labels = torch.from_numpy(actions[t[:n]]).long()
        some = windows["train"][:: 1 + len(windows["train"]) // 1024]
        vpt.fit_inverse_model(idm, frames["train"], t[:n], labels, some, args, FLOAT32)
        p = vpt.pseudo_label(idm, frames["train"], windows["train"], "cpu", FLOAT32)
        vpt.fit_policy(policy, frames["train"], windows["train"], p, args, FLOAT32)
    for name, network in (("idm", idm), ("policy", policy)):
        kept = tensors(work / run_dir("vpt") / "checkpoint.pt", name)
        assert all(torch.equal(x, kept[key]) for key, x in network.state_dict().items())


def test_inverse_model_and_policy_learn(pipeline):
    """f tells actions that its windows show, pseudo-labels lie at their times, pi learns probabilities."""
    args = vpt.Args(
        idm_scale=0.25, policy_scale=0.25, shift=1, idm_epochs=30, policy_updates=60, batch_size=64
    )
    args.learning_rate = 5e-3
    rng, shown = np.random.default_rng(0), np.array([0, 3, 7])
    frames, kind = np.zeros((300, 64, 64, 3), dtype=np.uint8), rng.integers(3, size=300)
    frames += (kind * 100).astype(np.uint8)[:, None, None, None]
    t = np.arange(1, 299)
    torch.manual_seed(0)
    idm, policy = vpt.new_networks(15, {}, {}, args, "cpu")
    labels = torch.from_numpy(shown[kind[t[:100] + 1]])  # what the frame after says: pi cannot know
    vpt.fit_inverse_model(idm, frames, t[:100], labels, t, args, FLOAT32)
    p = vpt.pseudo_label(idm, frames, t, "cpu", FLOAT32)
    assert p.shape == (298, 15) and (p.argmax(1).numpy() == shown[kind[t + 1]]).mean() > 0.98
    p = torch.zeros(298, 15)
    p[:, 0], p[:, 3] = 0.75, 0.25
    vpt.fit_policy(policy, frames, t, p, args, FLOAT32)
    with torch.no_grad():
        found = policy(torch.from_numpy(frames[t])).softmax(-1)
    assert torch.allclose(found.mean(0)[[0, 3]], torch.tensor([0.75, 0.25]), atol=0.05)


@pytest.mark.parametrize("num_actions", [2, 15])
def test_last_layer(num_actions):
    """It is scikit-learn's logistic regression on standardised features; nothing below it moves."""
    rng, args = np.random.default_rng(0), vpt.Args(idm_scale=0.25, policy_scale=0.25)
    frames, t = rng.integers(256, size=(200, 64, 64, 3)).astype(np.uint8), np.arange(1, 199)
    torch.manual_seed(0)
    idm, _ = vpt.new_networks(num_actions, {}, {}, args, "cpu")
    before = {name: x.clone() for name, x in idm.network.state_dict().items()}
    actions = torch.from_numpy(rng.integers(2, size=60))  # of 15, two occur
    vpt.fit_last_layer(idm, frames, t[:60], actions, t, FLOAT32)
    assert all(torch.equal(x, before[name]) for name, x in idm.network.state_dict().items())
    with torch.no_grad():
        x = idm.network(vpt.get_windows(frames, t, "cpu")).numpy()
    scaler = StandardScaler().fit(x)
    seen = np.concatenate([scaler.transform(x[:60]), np.zeros((num_actions, 256))])
    weight = np.repeat([1, 0.1], [60, num_actions])
    probe = LogisticRegression(C=0.01, max_iter=300)
    probe.fit(seen, [*actions.tolist(), *range(num_actions)], sample_weight=weight)
    found = vpt.pseudo_label(idm, frames, t, "cpu", FLOAT32).numpy()
    np.testing.assert_allclose(found, probe.predict_proba(scaler.transform(x)), atol=1e-4)
    assert (found[:60].argmax(1) == actions.numpy()).mean() > 0.7
    vpt.fit_last_layer(idm, frames, t[:5], torch.zeros(5, dtype=torch.long), t, FLOAT32)  # one action alone
    found = vpt.pseudo_label(idm, frames, t, "cpu", FLOAT32).numpy()
    assert (found.argmax(1) == 0).all() and (found > 1e-3).all()


def test_starts_from_lapo(pipeline):
    """f and pi begin as LAPO's networks up to their last layer; new ones otherwise, of the flags' sizes."""
    pretrained, cloned = (load(pipeline.checkpoints[stage]) for stage in ("lapo_pretrain", "lapo_bc"))
    idm, policy = vpt.new_networks(9, pretrained, cloned, vpt.Args(), "cpu")
    for network, weights in ((idm, pretrained["idm"]), (policy, cloned["policy"])):
        for name, x in network.network.state_dict().items():
            assert torch.equal(x, weights[f"network.{name}"])
        assert network.head.weight.shape == (9, 256)
    of_differences = {"args": pretrained["args"] | {"idm_differences": True, "patch_size": 2}}
    idm, policy = vpt.new_networks(9, of_differences, {}, vpt.Args(policy_scale=0.5, patch_size=4), "cpu")
    assert idm.differences and idm.network.conv[1].in_channels == 6 * 4  # patches of 2 x 2 pixels
    assert policy.network.conv[1].in_channels == 3 * 16 and policy.network.conv[1].out_channels == 8


def test_goes_on_as_if_never_stopped(work):
    """Stopped in the second draw and started again, it ends with the same results and networks."""
    flags = [*TOY, *map(str, LAPO)]
    inline(work, "vpt", *flags, "--exp-name", "whole")
    flags += ["--exp-name", "stopped"]
    stop = {"owner": torch.optim.AdamW, "name": "step", "n": 40}
    assert interrupted(work, "vpt", *flags, **stop) == 130
    inline(work, "vpt", *flags)
    whole, stopped = (
        json.loads((work / run_dir(x) / "results.json").read_text()) for x in ("whole", "stopped")
    )
    for row, again in zip(whole["curve"], stopped["curve"], strict=True):
        assert row["returns"] == again["returns"]
    assert whole["pseudo_label_accuracy"] == stopped["pseudo_label_accuracy"]
    assert same_tensors(*(work / run_dir(x) / "checkpoint.pt" for x in ("whole", "stopped")))


def test_your_own_videos(work):
    """Where nobody can play, the policies are scored on the test split's labels."""
    meta = work / "data" / ENV_ID / "meta.json"
    replace(meta, json.dumps(json.loads(meta.read_text()) | {"demonstrator": {}}))
    inline(work, "vpt", *TOY)
    results = json.loads((work / run_dir("vpt") / "results.json").read_text())
    assert [row["n_labels"] for row in results["curve"]] == [16, 64]
    assert all(0 < row["accuracy_mean"] < 1 for row in results["curve"])


def test_refuses(work):
    """What cannot work is refused by the flag's or the file's name."""
    assert "nowhere.pt" in refusal(work, "vpt", *TOY, "--pretrain-checkpoint", "nowhere.pt")
    assert "lapo_bc.py" in refusal(work, "vpt", *TOY, "--bc-checkpoint", str(LAPO[1]))  # pretraining's
    assert "--num-labels" in refusal(work, "vpt", *TOY, "--num-labels", "3000")
    assert "--shift" in refusal(work, "vpt", *TOY, "--shift", "-1")
    assert not (work / run_dir("vpt")).exists()
