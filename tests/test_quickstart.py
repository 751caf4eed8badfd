"""The quickstart: its refusals, Ctrl-C, its report, and the demonstrators that it plays."""

import contextlib
import json
import os
import pty
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ENV_ID, ROOT, STAGES, TOY, collect, load, ppo

EXPERTS = sorted((ROOT / "experts").glob("*.pt"))
QUICK = STAGES[1:5]


def copy_quickstart(folder, python):
    """quickstart.sh and coinrun's demonstrator in a folder of their own, and a script in Python's place."""
    (folder / "experts").mkdir()
    shutil.copy(ROOT / "experts" / "coinrun.pt", folder / "experts")
    shutil.copy(ROOT / "quickstart.sh", folder)
    (folder / "toy-python").write_text(python)
    (folder / "toy-python").chmod(0o755)


def test_a_game_without_demonstrator(tmp_path):
    """One sentence that names the games there are and the command that trains one; nothing is run."""
    copy_quickstart(tmp_path, "")
    done = subprocess.run(["bash", "quickstart.sh", "chaser"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and not (tmp_path / "runs").exists()
    assert done.stderr.startswith("error:") and "coinrun" in done.stderr
    assert "ppo_procgen.py --env-id chaser" in done.stderr


def in_a_terminal(command, cwd, press_ctrl_c_after=None):
    """Runs a command on a pseudo-terminal, as a shell would: exit status, and what the terminal showed."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(cwd)  # a new terminal has 0 columns and rows: tqdm draws nothing there
        env = {**os.environ, "SEED": "1", "PYTHON": "./toy-python"}
        os.execvpe("sh", ["sh", "-c", f"stty cols 200 rows 50 && exec {command}"], env)
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
    """Ctrl-C in the second stage: 130, no third stage. The same command goes on, and finishes."""
    toy = {stage: " ".join(TOY[stage]).replace(f"--env-id {ENV_ID} ", "") for stage in QUICK}
    toy["collect_expert_data"] = toy["collect_expert_data"].split("--expert-checkpoint")[0]
    toy["lapo_pretrain"] += " --num-updates 100 --eval-every 50"
    # the last of two equal flags holds
    cases = "".join(f'{stage}.py) set -- "$@" {flags} ;;\n' for stage, flags in toy.items())
    copy_quickstart(tmp_path, f'#!/bin/sh\ncase "$1" in\n{cases}esac\nexec {sys.executable} "$@"\n')
    for path in ROOT.glob("*.py"):
        (tmp_path / path.name).write_text(path.read_text().replace("SAVE_SECONDS = 60", "SAVE_SECONDS = 0"))
    shutil.copytree(ROOT / "tools", tmp_path / "tools")

    status, shown = in_a_terminal("./quickstart.sh", tmp_path, press_ctrl_c_after=rb"pretrain: +[1-9]\d*%")
    assert status == 130, shown
    assert "stopped in lapo_pretrain.py: the same command goes on" in shown and "Gym" not in shown
    assert "lapo_bc.py --env-id" not in shown and "Traceback" not in shown
    runs = tmp_path / "runs" / "quickstart" / "coinrun__1"
    assert 0 < load(runs / "coinrun__lapo_pretrain__1" / "resume.pt")["step"] < 100

    status, shown = in_a_terminal("./quickstart.sh", tmp_path)
    assert status == 0, shown
    assert "== collect_expert_data.py is finished" in shown and "Gym" not in shown
    results, found = json.loads((runs / "results.json").read_text()), {}
    for stage in QUICK:
        found[stage] = json.loads((runs / f"coinrun__{stage}__1" / "results.json").read_text())
    assert (runs / "report.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert results["stage_seconds"] == {stage: found[stage]["wall_seconds"] for stage in QUICK}
    assert results["curve"] == found["lapo_decode"]["curve"]


@pytest.mark.parametrize("path", EXPERTS, ids=lambda p: p.stem)
def test_a_shipped_demonstrator(path):
    """At most 3 MB, with commands, seeds, frames and return beside it; and it plays as well as that says."""
    assert path.stat().st_size <= 3e6
    card = json.loads(path.with_suffix(".json").read_text())
    assert card["episodes"] >= 200 and card["commands"] and card["frames"] > 0 and card["seeds"]
    expert = collect.load_checkpoint(path, "ppo_procgen", path.stem)
    levels = {key: expert[key] for key in ("num_levels", "start_level")}
    assert levels.items() <= card.items()
    assert np.mean(expert["returns"]) == pytest.approx(card["return_mean"], abs=1e-3)
    agent = collect.Agent(expert["args"]["scale"], expert["args"]["patch_size"])
    agent = agent.to(memory_format=torch.channels_last)
    agent.load_state_dict(expert["agent"])
    torch.manual_seed(0)
    env = collect.make_env(path.stem, 16, **levels, seed=1123)
    returns = ppo.evaluate(lambda obs: agent(obs)[0], env, 16, "cpu")
    mean, spread = returns.mean(), card["return_stderr"] * card["episodes"] ** 0.5
    assert abs(mean - card["return_mean"]) < 4 * spread / 16**0.5
    assert mean - card["random_mean"] > 0.4 * (card["return_mean"] - card["random_mean"])
