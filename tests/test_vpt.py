"""vpt.py on the toy pipeline: what it starts from, labels and pseudo-labels, a killed run, refusals."""

import collect_results
import torch
from conftest import ENV_ID, inline, killed, load, refusal, results_of, run_dir

import vpt

TOY = f"--env-id {ENV_ID} --no-cuda --no-bf16 --num-labels 16 64 --num-draws 2 --eval-episodes 4".split()
TOY += "--idm-scale 0.25 --policy-scale 0.25 --idm-epochs 3 --policy-updates 8 --batch-size 32".split()
SMALL = dict(idm_scale=0.25, policy_scale=0.25)
FLOAT32 = torch.autocast("cpu", enabled=False)


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
    assert load(work / run_dir("vpt") / "checkpoint.pt")["policy"]["head.weight"].shape == (15, 256)


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
