"""Two processes with gloo: the same numbers as one, the same networks on both; stopping, dying, going on."""

import json  # noqa: I001
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    ENV_ID, FRESH, NOW, ROOT, TOY, collect, link_tree, load, pretrain, run_dir, same_tensors, start,
)  # fmt: skip

MANY = [*TOY["lapo_pretrain"], "--num-updates", "20"]
PPO = [*TOY["ppo_procgen"], "--num-envs", "64", "--num-steps", "8", "--num-levels", "0"]


def launch(script, *flags, cwd, **env):
    """Two processes as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    command, pipe = (
        [sys.executable, str(ROOT / "tests" / "rank.py"), script, *map(str, flags)],
        subprocess.PIPE,
    )
    ranks = [os.environ | env | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    return [subprocess.Popen(command, cwd=cwd, env=e, stdout=pipe, stderr=pipe, text=True) for e in ranks]


def ended(processes):
    """(exit status, stdout, stderr) of each."""
    outputs = [process.communicate(timeout=120) for process in processes]
    return [(process.returncode, *output) for process, output in zip(processes, outputs)]


def run(script, *flags, cwd, **env):
    """What both ranks ended with."""
    done = ended(launch(script, *flags, cwd=cwd, **env))
    assert [status for status, *_ in done] == [0, 0], done
    return [load(cwd / f"rank{rank}.pt") for rank in range(2)]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def data(pipeline, tmp_path_factory):
    """A working directory with the toy dataset, and pretraining by two processes in it."""
    cwd = tmp_path_factory.mktemp("ranks")
    link_tree(pipeline.cwd / "data", cwd / "data")
    return cwd, run("lapo_pretrain", *MANY, cwd=cwd)


def test_an_update_of_two_halves(tmp_path):
    """Gradients and loss are the means of both halves', codebooks move by the sums over the whole batch."""
    ranks = run("update", cwd=tmp_path)
    torch.manual_seed(0)
    idm, vq, fdm = pretrain.IDM(0.25, 16), pretrain.VQ(2, 4, 2, 64, 0.05, 0.999), pretrain.FDM(16, 4)
    windows, losses = torch.rand(16, 9, 64, 64) - 0.5, []
    vq.eval()  # its codes stay while both halves are computed
    for half in windows.split(8):
        prediction, vq_loss, *_ = pretrain.predict(idm, vq, fdm, half)
        losses.append(F.mse_loss(prediction, half[:, 6:]) + vq_loss)
    (sum(losses) / 2).backward()
    vq.train()(idm(windows))
    for rank in ranks:
        assert rank["loss"].item() == pytest.approx(sum(losses).item() / 2, abs=1e-6)
        for grad, p in zip(rank["grads"], [*idm.parameters(), *fdm.parameters()], strict=True):
            torch.testing.assert_close(grad, p.grad, atol=1e-6, rtol=1e-4)
        for name, x in vq.state_dict().items():
            torch.testing.assert_close(rank["vq"][name], x, atol=1e-6, rtol=0)
    assert not torch.equal(vq.codes, pretrain.VQ(2, 4, 2, 64, 0.05, 0.999).codes)


def test_both_end_with_the_same_networks(data):
    """After 20 updates parameters and codebooks are equal; batch normalisation's statistics are local."""
    cwd, (a, b) = data
    assert same(a["idm"], b["idm"]) and same(a["vq"], b["vq"])
    running = {key for key in a["fdm"] if "running_" in key}
    assert same(*({key: x for key, x in rank["fdm"].items() if key not in running} for rank in (a, b)))
    assert running and not same(*({key: rank["fdm"][key] for key in running} for rank in (a, b)))
    saved = load(cwd / run_dir("lapo_pretrain") / "checkpoint.pt")
    assert same(saved["fdm"], a["fdm"]) and "torchrun" in saved["command"]


def test_ppo_plays_different_games_and_learns_one_agent(tmp_path):
    """64 games, each with a seed of its own; both ranks end with the same parameters."""
    a, b = run("ppo_procgen", *PPO, cwd=tmp_path)
    assert same(a["agent"], b["agent"])
    assert len(a["obs"]) == len(b["obs"]) == 32
    assert len({obs.numpy().tobytes() for obs in torch.cat([a["obs"], b["obs"]])}) == 64
    results = json.loads((tmp_path / run_dir("ppo_procgen") / "results.json").read_text())
    assert len(results["returns"]) == results["episodes"] == 8 and results["frames"] == 2048


def test_interrupt_and_resume(data, tmp_path):
    """A signal to one rank stops both at the same update, saved once; going on is bit-exact, or says not."""
    cwd, _ = data
    link_tree(cwd / "data", tmp_path / "data")
    done = ended(launch("lapo_pretrain", *MANY, cwd=tmp_path, SIGINT_AT="7"))
    assert [status for status, *_ in done] == [130, 130]
    resume = tmp_path / run_dir("lapo_pretrain") / "resume.pt"
    assert load(resume)["step"] == 7 and "goes on with: torchrun" in done[0][1] and not done[1][1]
    link_tree(tmp_path, one := tmp_path.with_name(f"{tmp_path.name}-one"))
    run("lapo_pretrain", *MANY, cwd=tmp_path)
    assert same_tensors(resume.with_name("checkpoint.pt"), cwd / run_dir("lapo_pretrain") / "checkpoint.pt")
    alone = start("lapo_pretrain", *MANY, cwd=one)
    assert alone.returncode == 0 and "1 processes, not 2 as before: not bit for bit" in alone.stdout
    three = start("lapo_pretrain", *MANY, *FRESH, cwd=one, WORLD_SIZE="3", RANK="0")
    assert three.stderr.startswith("error: --batch-size 16")


def test_one_ranks_nan_stops_all(data, tmp_path):
    """Both end before the step, with the sentence that one process ends with."""
    link_tree(data[0] / "data", tmp_path / "data")
    done = ended(launch("lapo_pretrain", *MANY, cwd=tmp_path, NAN_AT="1"))
    assert [status for status, *_ in done] == [1, 1] and all("error: loss nan" in err for *_, err in done)


def test_a_rank_that_dies(data, tmp_path):
    """kill -9 of one: the other ends within a minute with one sentence; the same command finishes."""
    link_tree(data[0] / "data", tmp_path / "data")
    flags = [*TOY["lapo_pretrain"], "--num-updates", "40"]
    processes = launch("lapo_pretrain", *flags, *NOW, cwd=tmp_path)
    while not (tmp_path / run_dir("lapo_pretrain") / "resume.pt").exists():
        assert processes[0].poll() is None
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGKILL)
    began = time.time()
    (status, _, err), _ = ended(processes)
    assert status == 1 and time.time() - began < 60
    assert [line for line in err.splitlines() if "lost another" in line] and "Traceback" not in err
    run("lapo_pretrain", *flags, cwd=tmp_path)
    assert (tmp_path / run_dir("lapo_pretrain") / "results.json").exists()


def test_all_stages(pipeline, tmp_path):
    """Collecting, cloning and fine-tuning by two: rows that replay, labels in halves, one agent."""
    for stage in ("ppo_procgen", "lapo_pretrain"):
        link_tree(pipeline.cwd / run_dir(stage), tmp_path / run_dir(stage))
    run("collect_expert_data", *TOY["collect_expert_data"], cwd=tmp_path)
    folder = tmp_path / "data" / ENV_ID
    split = json.loads((folder / "meta.json").read_text())["splits"]["test"]
    names = "frames", "actions", "rewards", "first"
    arrays = [np.load(folder / "test" / f"{name}.npy") for name in names]
    rows = [x.reshape(2, 8, -1, *x.shape[1:]) for x in arrays]  # of both ranks, 8 games each
    for seed, frames, actions, rewards, first in zip(split["seeds"], *rows, strict=True):
        env = collect.make_env(ENV_ID, 8, split["num_levels"], split["start_level"], seed)
        for t in range(frames.shape[1]):
            _, obs, began = env.observe()
            assert np.array_equal(obs["rgb"], frames[:, t]) and np.array_equal(began, first[:, t])
            env.act(actions[:, t].astype(np.int32))
            assert np.array_equal(env.observe()[0], rewards[:, t])
        env.close()
    assert len(set(split["seeds"])) == 2 and not np.array_equal(rows[0][0], rows[0][1])

    a, b = run("lapo_bc", *TOY["lapo_bc"], cwd=tmp_path)
    assert same(a["policy"], b["policy"])
    halves = [load(tmp_path / run_dir("lapo_bc") / f"latents-{rank}-of-2.pt") for rank in range(2)]
    assert len(halves[0]) - len(halves[1]) in (0, 1)
    a, b = run("lapo_finetune_ppo", *TOY["lapo_finetune_ppo"], cwd=tmp_path)
    assert same(a["agent"], b["agent"])
    assert "no torchrun" in start("lapo_decode", *TOY["lapo_decode"], cwd=tmp_path, WORLD_SIZE="2").stderr


def test_torchrun_itself(data, tmp_path):
    """The documented command line."""
    link_tree(data[0] / "data", tmp_path / "data")
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, str(ROOT / "lapo_pretrain.py"), *TOY["lapo_pretrain"]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.count("wrote runs/") == 1, done.stderr
