"""Two processes with gloo: the same numbers as one, the same networks on both, NaN, and one that dies."""

import json  # noqa: I001
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    ROOT, TOY, bc, link_tree, load, pretrain, process, run_dir, same,
)  # fmt: skip
from test_data import replay, split_args


@pytest.fixture(scope="module")
def two(pipeline, tmp_path_factory):
    """The working directory of tests/rank.py's two processes, and what each of them ended with."""
    cwd = link_tree(pipeline.cwd, tmp_path_factory.mktemp("ranks") / "work")
    ranks = [process("tests/rank", "ranks", cwd=cwd, WORLD_SIZE="2", RANK=str(rank)) for rank in range(2)]
    errors = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    return cwd, [load(cwd / f"rank{rank}.pt") for rank in range(2)], errors


def test_an_update_of_two_halves(two):
    """The gradient is the mean of both halves', codebooks move by the sums over the whole batch."""
    torch.manual_seed(0)
    idm, vq, fdm = pretrain.IDM(0.25, 16), pretrain.VQ(2, 4, 2, 64, 0.05, 0.999), pretrain.FDM(16, 4)
    lapo, windows, losses = pretrain.LAPO(idm, vq, fdm), torch.rand(16, 9, 64, 64) - 0.5, []
    vq.eval()  # its codes stay while both halves are computed
    for half in windows.split(8):
        prediction, vq_loss, _ = lapo(half)
        losses.append(F.mse_loss(prediction, half[:, 6:]) + vq_loss)
    (sum(losses) / 2).backward()
    vq.train()(idm(windows))
    assert not torch.equal(vq.codes, pretrain.VQ(2, 4, 2, 64, 0.05, 0.999).codes)
    for rank in two[1]:
        for name, p in lapo.named_parameters():
            torch.testing.assert_close(rank["update"]["grads"][name], p.grad, atol=1e-6, rtol=1e-4)
        for name, x in vq.state_dict().items():
            torch.testing.assert_close(rank["update"]["vq"][name], x, atol=1e-6, rtol=0)


def test_what_all_processes_know(two):
    """PPO's averaged gradients; mean and deviation of all latents, from pieces of unequal length."""
    for rank in two[1]:
        for a, none, c in rank["averaged"]:
            assert (a == 0.5).all() and none is None and c == 6.5
        mean, std = rank["moments"]
        torch.testing.assert_close(mean, rank["z"].mean(0))
        torch.testing.assert_close(std, rank["z"].std(0, correction=0), rtol=1e-3, atol=2e-6)


def test_both_end_with_the_same_networks(two):
    """Parameters and codebooks are equal after every stage; statistics of batches are each process's."""
    cwd, (a, b), _ = two
    for stage in ("lapo_pretrain", "ppo_procgen", "lapo_bc", "lapo_finetune_ppo"):
        saved = load(cwd / "two" / run_dir(stage).name / "checkpoint.pt")
        assert saved["processes"] == 2 and a[stage].keys() == b[stage].keys() != set()
        for name in a[stage]:
            mine, other = a[stage][name], b[stage][name]
            running = {key for key in mine if "running_" in key}
            assert (name == "fdm") == any(not torch.equal(mine[key], other[key]) for key in running)
            assert all(torch.equal(mine[key], other[key]) for key in mine.keys() - running)
            assert name not in saved or same(saved[name], mine)
    known = load(cwd / "two" / run_dir("lapo_pretrain").name / "checkpoint.pt")["idm"]
    assert not same(known, load(cwd / run_dir("lapo_pretrain") / "checkpoint.pt")["idm"])
    idm, frames = bc.IDM(0.25, 16), bc.load_dataset(split_args(cwd / "data" / "dodgeball"))[1]
    idm.load_state_dict(known)
    z = bc.label(idm.eval(), frames, frames.windows, "cpu", torch.autocast("cpu", enabled=False))
    policy = a["lapo_bc"]["policy"]
    torch.testing.assert_close(policy["mean"], z.mean(0), atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(policy["std"], z.std(0), atol=1e-5, rtol=1e-3)


def test_each_writes_a_whole_dataset(two):
    """A shard's rows replay with its meta.json, alone it is a dataset, together they are one."""
    frames, windows = [], 0
    for rank in range(2):
        shard = two[0] / "shards" / f"shard-{rank}"
        frames.append(replay(shard, json.loads((shard / "meta.json").read_text())["splits"]["test"]))
        _, train, test = pretrain.load_dataset(split_args(shard))
        assert (len(train.first), len(test.first)) == (1000, 200)
        windows += len(train.windows)
    assert not (frames[0] == frames[1]).all()
    assert len(pretrain.load_dataset(split_args(two[0] / "shards"))[1].windows) == windows


def test_one_ranks_nan_stops_all(two):
    """Both end; one of them says why, in a sentence; nothing is written."""
    cwd, ranks, errors = two
    assert [rank["nan"] for rank in ranks] == [1, 1] and "not finite at update 1" in errors[0]
    assert "error:" not in errors[1] and "Traceback" not in "".join(errors)
    assert not list((cwd / "nan").rglob("*.pt"))


def test_torchrun(pipeline, tmp_path):
    """kill -9 of a process ends the others; the same command goes on, and finishes."""
    link_tree(pipeline.cwd / "data", tmp_path / "data")
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc_per_node=2"]
    flags = ["lapo_pretrain", *TOY["lapo_pretrain"], "--num-updates", "60", "--eval-every", "60"]
    command, pipe = [*torchrun, str(ROOT / "tests" / "rank.py"), *flags], subprocess.PIPE
    env = os.environ | {"SAVE_SECONDS": "0"}
    running = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=pipe, stderr=pipe, text=True)
    folder = tmp_path / run_dir("lapo_pretrain")
    while not (folder / "resume.pt").exists():
        assert running.poll() is None
        time.sleep(0.05)
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    ranks = [pid for pid in map(int, children) if b"rank.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    running.communicate(timeout=60)
    assert running.returncode != 0 and not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    assert 0 < load(folder / "resume.pt")["step"] < 60
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.count("wrote runs/") == 1, done.stderr
    assert load(folder / "checkpoint.pt")["processes"] == 2
    assert 0 < done.stderr.count("pretrain:") <= 3  # no bar in a file: a line a minute
