"""The quickstart: its refusals, its report, and the demonstrators that it plays."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ENV_ID, ROOT, collect

EXPERTS = sorted((ROOT / "experts").glob("*.pt"))
COLUMNS = {"method", "return_mean", "return_stderr", "episodes", "relative_return", "relative_to_demonstrator"}


def test_a_game_without_demonstrator(tmp_path):
    """One sentence that names the games there are and the command that trains one; nothing is run."""
    shutil.copy(ROOT / "quickstart.sh", tmp_path)
    shutil.copytree(ROOT / "experts", tmp_path / "experts")
    done = subprocess.run(["bash", "quickstart.sh", "chaser"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and not (tmp_path / "runs").exists()
    assert done.stderr.startswith("error:") and EXPERTS[0].stem in done.stderr
    assert "collect_expert_data.py --env-id chaser --num-train-frames 0" in done.stderr


def test_the_report(pipeline, tmp_path):
    """report.py draws the picture and copies the decoder's table, with the stages' seconds and their sum."""
    runs = tmp_path / "runs"
    shutil.copytree(pipeline.cwd / "runs", runs)
    command = [sys.executable, str(ROOT / "report.py"), "--env-id", ENV_ID, "--runs-dir", str(runs), "--data-dir", str(pipeline.data)]
    done = subprocess.run([*command, "--stage-seconds", "lapo_bc.py", "2", "lapo_decode.py", "3"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((runs / "results.json").read_text())
    assert results["stage_seconds"] == {"lapo_bc.py": 2, "lapo_decode.py": 3} and results["wall_seconds"] == 5
    assert (results["env_id"], results["seed"], results["n_labels"]) == (ENV_ID, 1, 32)
    assert results["rows"] == pipeline.results["lapo_decode"]["rows"]
    assert [r["method"] for r in results["rows"]] == ["random", "bc_from_scratch", "lapo_decoder", "demonstrator"]
    assert all(r.keys() >= COLUMNS for r in results["rows"])
    assert (runs / "report.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    done = subprocess.run([*command, "--seed", "7"], capture_output=True, text=True)
    assert done.returncode == 1 and "holds no finished run" in done.stderr and "lapo_pretrain.py" in done.stderr


@pytest.mark.parametrize("path", EXPERTS, ids=lambda p: p.stem)
def test_a_shipped_demonstrator(path):
    """At most 3 MB, with the commands, seeds, frames and return over 200 episodes beside it; and it plays as well as that says."""
    assert path.stat().st_size <= 3e6
    card = json.loads(path.with_suffix(".json").read_text())
    assert card["episodes"] >= 200 and card["commands"] and card["frames"] > 0 and card["seeds"]
    checkpoint = collect.load_checkpoint(path, "collect_expert_data", path.stem, "make", ("model",))
    meta = checkpoint["meta"]
    assert (meta["num_levels"], meta["start_level"]) == (card["num_levels"], card["start_level"])
    agent = collect.Agent(meta["args"]["scale"]).to(memory_format=torch.channels_last)
    agent.load_state_dict(checkpoint["model"])
    generator, rng, scores = torch.Generator().manual_seed(0), np.random.default_rng(0), {}

    @torch.inference_mode()
    def play(obs):
        return torch.multinomial(agent(torch.as_tensor(obs))[0].softmax(-1), 1, generator=generator).squeeze(-1).numpy().astype(np.int32)

    for name, act in (("demonstrator", play), ("random", lambda obs: rng.integers(0, 15, len(obs), dtype=np.int32))):
        env = collect.make_env(path.stem, 50, meta["num_levels"], meta["start_level"], 123)
        scores[name] = collect.evaluate(act, env, 50)
        env.close()
    stderr = scores["demonstrator"].std(ddof=1) / 50**0.5
    assert abs(scores["demonstrator"].mean() - card["return_mean"]) < 4 * np.hypot(stderr, card["return_stderr"])
    assert scores["demonstrator"].mean() - scores["random"].mean() > 0.7 * (card["return_mean"] - card["random_mean"])
