"""The quickstart: its refusals, its report, and the demonstrators that it plays."""

import contextlib
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ENV_ID, ROOT, STAGES, TOY, collect

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
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((runs / "results.json").read_text())
    assert results["stage_seconds"] == {stage: pipeline.results[stage]["wall_seconds"] for stage in STAGES[:4]}
    assert results["wall_seconds"] == pytest.approx(sum(results["stage_seconds"].values()))
    assert (results["env_id"], results["seed"], results["n_labels"], results["bf16"]) == (ENV_ID, 1, 32, False)
    assert results["rows"] == pipeline.results["lapo_decode"]["rows"]
    assert [r["method"] for r in results["rows"]] == ["random", "bc_from_scratch", "lapo_decoder", "demonstrator"]
    assert all(r.keys() >= COLUMNS for r in results["rows"])
    assert (runs / "report.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    done = subprocess.run([*command, "--seed", "7"], capture_output=True, text=True)
    assert done.returncode == 1 and "holds no finished run" in done.stderr and "collect_expert_data.py" in done.stderr


def copy_quickstart(folder, python):
    """quickstart.sh and coinrun's demonstrator in a folder of their own, and a script that it takes for Python."""
    (folder / "experts").mkdir()
    shutil.copy(ROOT / "experts" / "coinrun.pt", folder / "experts")
    shutil.copy(ROOT / "quickstart.sh", folder)
    (folder / "toy-python").write_text(python)
    (folder / "toy-python").chmod(0o755)


def test_what_is_finished_is_skipped_or_made_anew(tmp_path):
    """A finished stage is skipped while the pipeline is unfinished; a finished pipeline is made anew, nothing of the last one is taken for it."""
    # notes what it is asked to run; makes its results.json, unless it is to end as one that SIGTERM stopped; bash alone may get SIGTERM, too
    python = """#!/bin/sh
        echo "$1" >> started
        if [ "$1" = "$STOP" ]; then exit 143; fi
        if [ "$1" = "$STOP_BASH" ]; then kill -TERM $PPID; fi
        folder=runs/quickstart/coinrun__2
        if [ "$1" != report.py ]; then folder=$folder/coinrun__${1%.py}__2; fi
        mkdir -p $folder && touch $folder/results.json
    """
    copy_quickstart(tmp_path, python)

    def go(**stop):
        (tmp_path / "started").unlink(missing_ok=True)
        env = {**os.environ, "SEED": "2", "PYTHON": "./toy-python", "STOP": "", "STOP_BASH": "", **stop}
        done = subprocess.run(["./quickstart.sh"], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert ("the same command goes on" in done.stderr) == (done.returncode == 143), done.stderr
        return done.returncode, (tmp_path / "started").read_text().split()

    collect, pretrain, bc, decode, report = scripts = [f"{name}.py" for name in (*STAGES[:4], "report")]
    assert go(STOP=bc) == (143, [collect, pretrain, bc])
    assert go() == (0, [bc, decode, report])
    assert go(STOP_BASH=pretrain) == (143, [collect, pretrain])
    assert go() == (0, [bc, decode, report])
    assert go() == (0, scripts)


def in_a_terminal(command, cwd, press_ctrl_c_after=None):
    """Runs a command on a pseudo-terminal, as a user's shell would. Returns (exit status, what the terminal showed)."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(cwd)  # a new terminal has 0 columns and rows: tqdm draws nothing there
        os.execvpe("sh", ["sh", "-c", f"stty cols 200 rows 50 && exec {command}"], {**os.environ, "SEED": "1", "PYTHON": "./toy-python"})
    shown = b""
    with contextlib.suppress(OSError):  # Linux's end of file on a terminal whose other side is closed
        while data := os.read(terminal, 4096):
            shown += data
            if press_ctrl_c_after and re.search(press_ctrl_c_after, shown):
                os.write(terminal, b"\x03")
                press_ctrl_c_after = None
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), shown.decode()


def test_ctrl_c_stops_the_pipeline_and_the_same_command_goes_on(tmp_path):
    """Ctrl-C in the second stage: saved, 130, no third stage. The same command skips the first, goes on with the second, and finishes."""
    toy = {stage: " ".join(TOY[stage]).replace(f"--env-id {ENV_ID} ", "") for stage in STAGES[1:4]}
    toy["collect_expert_data"] = "--no-cuda --no-bf16 --num-envs 16 --num-train-frames 2000 --num-test-frames 400 --eval-episodes 8"
    toy["lapo_pretrain"] += " --num-updates 400 --eval-every 200"
    cases = "".join(f'{stage}.py) set -- "$@" {flags} ;;\n' for stage, flags in toy.items())  # the last of two equal flags holds
    copy_quickstart(tmp_path, f'#!/bin/sh\ncase "$1" in\n{cases}esac\nexec {sys.executable} "$@"\n')
    for name in (*toy, "report"):
        shutil.copy(ROOT / f"{name}.py", tmp_path)

    status, shown = in_a_terminal("./quickstart.sh", tmp_path, press_ctrl_c_after=rb"pretrain: +[1-9]\d*%")
    assert status == 130, shown
    assert "stopped and saved in" in shown and "stopped in lapo_pretrain.py: the same command goes on" in shown
    assert "lapo_bc.py" not in shown
    runs = tmp_path / "runs" / "quickstart" / "coinrun__1"
    updates = torch.load(runs / "coinrun__lapo_pretrain__1" / "resume.pt", weights_only=True)["meta"]["step"]
    assert 0 < updates < 400

    status, shown = in_a_terminal("./quickstart.sh", tmp_path)
    assert status == 0, shown
    assert "== collect_expert_data.py is finished" in shown and "going on with the unfinished run" in shown
    assert (runs / "report.png").exists() and (runs / "results.json").exists()


@pytest.mark.parametrize("path", EXPERTS, ids=lambda p: p.stem)
def test_a_shipped_demonstrator(path):
    """At most 3 MB, with the commands, seeds, frames and return over 200 episodes beside it; and it plays as well as that says."""
    assert path.stat().st_size <= 3e6
    card = json.loads(path.with_suffix(".json").read_text())
    assert card["episodes"] >= 200 and card["commands"] and card["frames"] > 0 and card["seeds"]
    checkpoint = collect.load_checkpoint(path, "collect_expert_data", SimpleNamespace(env_id=path.stem, allow_unfinished=False), "make", ("model",))
    meta = checkpoint["meta"]
    assert (meta["num_levels"], meta["start_level"]) == (card["num_levels"], card["start_level"])
    agent = collect.Agent(meta["args"]["scale"]).to(memory_format=torch.channels_last)
    agent.load_state_dict(checkpoint["model"])
    generator, rng, scores = torch.Generator().manual_seed(0), np.random.default_rng(0), {}

    @torch.inference_mode()
    def play(obs, episode):
        return torch.multinomial(agent(torch.as_tensor(obs))[0].softmax(-1), 1, generator=generator).squeeze(-1).numpy().astype(np.int32)

    for name, act in (("demonstrator", play), ("random", lambda obs, episode: rng.integers(0, 15, len(obs), dtype=np.int32))):
        env = collect.make_env(path.stem, 50, meta["num_levels"], meta["start_level"], 123)
        scores[name] = collect.evaluate(act, env, 50)
        env.close()
    stderr = scores["demonstrator"].std(ddof=1) / 50**0.5
    assert abs(scores["demonstrator"].mean() - card["return_mean"]) < 4 * np.hypot(stderr, card["return_stderr"])
    assert scores["demonstrator"].mean() - scores["random"].mean() > 0.7 * (card["return_mean"] - card["random_mean"])
