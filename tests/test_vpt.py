"""vpt.py on the toy pipeline: what it starts from, labels and pseudo-labels, a killed run, refusals."""

import collect_results
import numpy as np
import pytest
import torch
from conftest import ENV_ID, decode, inline, killed, load, refusal, results_of, run_dir, same
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from test_data import split_args

import vpt

TOY = f"--env-id {ENV_ID} --no-cuda --no-bf16 --num-labels 16 64 --num-draws 2 --eval-episodes 4".split()
TOY += "--idm-scale 0.25 --policy-scale 0.25 --idm-epochs 3 --policy-updates 8 --batch-size 32".split()
SMALL = dict(idm_scale=0.25, policy_scale=0.25)
FLOAT32 = torch.autocast("cpu", enabled=False)


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
    """Killed in the second draw it goes on; a row a count; the networks are the last count's, of draw 0."""
    killed(work, "vpt", *TOY, owner=torch.optim.AdamW, name="step", n=40)
    (before,) = load(work / run_dir("vpt") / "resume.pt")["played"]
    inline(work, "vpt", *TOY)
    results = results_of(work, "vpt")
    assert [(row["method"], row["n_labels"]) for row in results["curve"]] == [("vpt", 16), ("vpt", 64)]
    assert [row["returns"][0] for row in results["curve"]] == before and results["stage"] == "vpt"
    assert results["demonstrator"] == pipeline.results["lapo_decode"]["demonstrator"]
    shares = results["pseudo_label_accuracy"]
    assert shares.keys() == {"16", "64"} and all(0 < share < 1 for share in shares.values())
    rows = collect_results.rows_of_scores(work / run_dir("vpt"), results)
    rows = [(row["method"], row["n_labels"], row["label_accuracy"]) for row in rows]
    assert rows == [("vpt", 16, shares["16"]), ("vpt", 64, shares["64"])]
    # the same fit by hand
    train = decode.load_dataset(split_args(pipeline.data))[1]
    args = vpt.Args(**SMALL, idm_epochs=3, policy_updates=8, batch_size=32)
    t = np.random.default_rng([1, 0]).permutation(train.windows)[:64]  # lapo_decode.py's, of seed 1
    torch.manual_seed(1000)
    for n in (16, 64):
        idm, policy = vpt.new_networks(15, {}, {}, args, "cpu")
        labels = torch.from_numpy(train.labels("actions")[t[:n]]).long()
        some = train.windows[:: 1 + len(train.windows) // 1024]
        vpt.fit_inverse_model(idm, train, t[:n], labels, some, args, FLOAT32)
        p = vpt.pseudo_label(idm, train, train.windows, "cpu", FLOAT32)
        vpt.fit_policy(policy, train, train.windows, p, args, FLOAT32)
    saved = load(work / run_dir("vpt") / "checkpoint.pt")
    assert same(saved["idm"], idm.state_dict()) and same(saved["policy"], policy.state_dict())


@pytest.mark.parametrize("num_actions", [2, 15])
def test_last_layer(num_actions):
    """It is scikit-learn's logistic regression on standardised features; nothing below it moves."""
    rng = np.random.default_rng(0)
    frames, t = rng.integers(256, size=(200, 64, 64, 3)).astype(np.uint8), np.arange(1, 199)
    torch.manual_seed(0)
    idm, _ = vpt.new_networks(num_actions, {}, {}, vpt.Args(**SMALL), "cpu")
    before = {name: x.clone() for name, x in idm.network.state_dict().items()}
    actions = torch.from_numpy(rng.integers(2, size=60))  # of 15, two occur
    vpt.fit_last_layer(idm, frames, t[:60], actions, t, FLOAT32)
    assert same(idm.network.state_dict(), before)
    with torch.no_grad():
        x = idm.network(vpt.get_windows(frames, t, "cpu")).numpy()
    scaler = StandardScaler().fit(x)
    seen = np.concatenate([scaler.transform(x[:60]), np.zeros((num_actions, 256))])
    probe = LogisticRegression(C=0.01, max_iter=300)
    weight = np.repeat([1, 0.1], [60, num_actions])
    probe.fit(seen, [*actions.tolist(), *range(num_actions)], sample_weight=weight)
    found = vpt.pseudo_label(idm, frames, t, "cpu", FLOAT32).numpy()
    np.testing.assert_allclose(found, probe.predict_proba(scaler.transform(x)), atol=1e-4)


def test_starts_from_lapo(pipeline):
    """f and pi begin as LAPO's networks up to their last layer; new ones otherwise, of the flags' sizes."""
    pretrained, cloned = (load(pipeline.checkpoints[stage]) for stage in ("lapo_pretrain", "lapo_bc"))
    networks = vpt.new_networks(9, pretrained, cloned, vpt.Args(), "cpu")
    for network, weights in zip(networks, (pretrained["idm"], cloned["policy"])):
        assert all(
            torch.equal(p, weights[name]) for name, p in network.named_parameters() if "network" in name
        )
        assert network.head.weight.shape == (9, 256)
    _, policy = vpt.new_networks(9, pretrained, {}, vpt.Args(policy_scale=0.5, patch_size=4), "cpu")
    assert policy.network.conv[1].weight.shape[:2] == (8, 3 * 16)


def test_refuses(work):
    """What cannot work is refused by the flag's or the file's name."""
    assert "nowhere.pt" in refusal(work, "vpt", *TOY, "--pretrain-checkpoint", "nowhere.pt")
    pretrained = run_dir("lapo_pretrain") / "checkpoint.pt"
    assert "lapo_bc.py" in refusal(work, "vpt", *TOY, "--bc-checkpoint", pretrained)
    assert "--num-labels" in refusal(work, "vpt", *TOY, "--num-labels", "3000")
    assert "--shift" in refusal(work, "vpt", *TOY, "--shift", "-1")
    assert not (work / run_dir("vpt")).exists()
