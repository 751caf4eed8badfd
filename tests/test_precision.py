"""Precision by measurement: faked timings, forced choices, other devices, resumed runs, old CPUs."""

from types import SimpleNamespace  # noqa: I001

import pytest
import torch
import torch.utils.benchmark
from conftest import (
    ADAM_STEP, ENV_ID, TOY, inline, interrupted, link_tree, load, pretrain, results_of, run_dir, start,
)  # fmt: skip

CPU = torch.device("cpu")


def fake_timer(patch, owner, *least):
    """A Timer with these measurements; what is measured is run once, and its precision noted."""
    times, measured = iter(least), []

    class Timer:
        def __init__(self, stmt, globals, num_threads):
            assert stmt == "work()"
            self.work = globals["work"]

        def blocked_autorange(self, min_run_time):
            assert min_run_time <= 0.5  # of four measurements: three seconds at most, with what warms them up
            self.work()
            measured.append(torch.is_autocast_enabled("cpu"))
            fastest = next(times)
            return SimpleNamespace(times=[3 * fastest, fastest])  # slower where the machine is busy

    patch.setattr(owner, "Timer", Timer)
    return measured


@pytest.mark.parametrize(
    "least, bf16, words",
    [
        ((1.0, 0.5, 1.9, 1.0), True, "bfloat16: 1.9× float32 on this machine (--bf16 or --no-bf16 forces"),
        ((1.0, 0.5, 1.04, 1.0), False, "bfloat16: 1× float32 on this machine"),
        ((1.0, 3.0, 0.5, 1.0), False, "bfloat16: 0.5× float32"),
        ((1.0, 100.0), False, "bfloat16: 0.01× float32"),  # without instructions for it: no step is tried
    ],
)
def test_the_faster_one_is_taken(monkeypatch, capsys, least, bf16, words):
    """A matrix product tells a CPU without bfloat16; else the network's step decides, in both precisions."""
    measured, steps = fake_timer(monkeypatch, pretrain, *least), []
    args = SimpleNamespace(bf16=None, env_id=ENV_ID)
    autocast = pretrain.choose_precision(args, CPU, lambda: steps.append(torch.is_autocast_enabled("cpu")))
    assert args.bf16 is bf16 and steps == [False, True][: len(least) - 2]
    assert measured == [False, True, False, True][: len(least)]
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith(words) and last == f"{ENV_ID}: cpu, {'bfloat16' if bf16 else 'float32'}"
    with autocast:
        assert torch.is_autocast_enabled("cpu") is bf16


OTHERS = [(None, "cuda", True, True), (None, "cuda", False, False), (None, "mps", True, False)]


@pytest.mark.parametrize(
    "flag, device, has, bf16", [(True, "cpu", False, True), (False, "cuda", True, False), *OTHERS]
)
def test_without_measuring(monkeypatch, capsys, flag, device, has, bf16):
    """Flags are taken as they are; CUDA takes bfloat16 where it has it without emulation, others never."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has)
    monkeypatch.setattr(torch, "autocast", lambda device, dtype, enabled: enabled)
    args = SimpleNamespace(bf16=flag, env_id=ENV_ID)
    assert pretrain.choose_precision(args, torch.device(device), None) is args.bf16 is bf16
    assert capsys.readouterr().out == f"{ENV_ID}: {device}, {'bfloat16' if bf16 else 'float32'}\n"


UNFORCED = [flag for flag in TOY["lapo_pretrain"] if flag != "--no-bf16"]
UNFORCED += "--num-updates 2 --batch-size 2 --eval-windows 2".split()  # bfloat16 may be slow here


@pytest.mark.parametrize("begun", [True, False])
def test_a_resumed_run_keeps_its_precision(pipeline, tmp_path, begun):
    """The choice goes into checkpoint and results; going on, nothing is measured."""
    link_tree(pipeline.cwd / "data", tmp_path / "data")
    with pytest.MonkeyPatch.context() as patch:
        fake_timer(patch, torch.utils.benchmark, 1.0, 1.0, 10.0 if begun else 0.1, 1.0)
        assert interrupted(tmp_path, "lapo_pretrain", *UNFORCED, **ADAM_STEP, n=1) == 130
        assert load(tmp_path / run_dir("lapo_pretrain") / "resume.pt")["args"]["bf16"] is begun
        fake_timer(patch, torch.utils.benchmark)  # would fail if it were asked
        inline(tmp_path, "lapo_pretrain", *UNFORCED)
    assert results_of(tmp_path, "lapo_pretrain")["args"]["bf16"] is begun


def test_a_cpu_without_bfloat16(pipeline, tmp_path):
    """As such a CPU, by imitation, a script measures, takes float32, says so, and computes in it."""
    link_tree(pipeline.cwd / "data", tmp_path / "data")
    imitation = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = start("lapo_pretrain", *UNFORCED, cwd=tmp_path, **imitation)
    assert done.returncode == 0, done.stderr
    _, measured, chosen, *_ = done.stdout.splitlines()
    assert "float32 on this machine" in measured and chosen == f"{ENV_ID}: cpu, float32"
    assert results_of(tmp_path, "lapo_pretrain")["args"]["bf16"] is False
