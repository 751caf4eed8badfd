"""Mutated checkpoints, shards and metas: a clean load or one sentence, within time and memory. benchmark/fuzz.py runs more of them."""

import faulthandler
import os
import sys
import time

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmark"))
import fuzz  # noqa: E402


def test_mutated_files_load_or_are_refused():
    """A few hundred mutated files, every kind of file under every kind of mutation, end in a clean load or in one sentence."""
    rounds = max(len(mutations) for _, _, mutations in fuzz.KINDS.values())
    results = fuzz.fuzz(cases=max(300, rounds * len(fuzz.KINDS)), seed=1)
    assert not results["defects"]
    assert results["cases"] == sum(sum(count.values()) for count in results["kinds"].values()) >= 300
    for kind, count in results["kinds"].items():
        assert count["refused"] >= 10 and count["bad"] == 0, kind
    assert sum(count["clean"] for count in results["kinds"].values()) >= 30


def test_unchanged_files_load(tmp_path):
    """The valid files that the mutations start from load, so that a refusal is due to the mutation."""
    originals = fuzz.make_originals(tmp_path)
    with fuzz.quietly():
        for kind, (path, read, _) in fuzz.KINDS.items():
            assert path in originals
            assert fuzz.attempt(read, tmp_path) == ("clean", ""), kind
            for module in (fuzz.collect, fuzz.bc, fuzz.decode, fuzz.pretrain):
                while module.LOCKS:
                    module.LOCKS.pop().close()


def test_same_case_same_file(tmp_path):
    """A case's number and the seed make the same file again."""
    originals = fuzz.make_originals(tmp_path)
    for case in range(0, 200, 7):
        (path, _, _), mutation = fuzz.KINDS[fuzz.plan(case)[0]], fuzz.plan(case)[1]
        first, again, other = (mutation(fuzz.random.Random(f"{seed} {case}"), originals[path], originals) for seed in (0, 0, 1))
        assert first == again, mutation.__name__


@pytest.mark.parametrize("fault", ["traceback", "two lines", "other exit", "memory", "hang", "crash", "code"])
def test_the_harness_notices(monkeypatch, fault):
    """A loader that raises, exits otherwise, takes memory, hangs, crashes or runs code is reported, case by case, and the run goes on."""

    def bad(path, *_):
        if fault == "traceback":
            raise KeyError("meta")
        if fault in ("two lines", "other exit"):
            sys.exit("error: one\ntwo" if fault == "two lines" else 1)
        if fault == "memory":
            bytearray(b"x") * (300 << 20)
        elif fault == "hang":
            time.sleep(60)
        elif fault == "crash":
            faulthandler.disable()  # pytest's would print this process's stack
            os.abort()
        elif fault == "code":
            os.mkdir("boom")
        sys.exit("error: refused")

    monkeypatch.setattr(fuzz.collect, "load_checkpoint", bad)
    results = fuzz.fuzz(cases=[0, 6, 8], seed=1, seconds=1.0)
    assert results["kinds"]["demonstrator"]["bad"] == 2 and results["kinds"]["actions"]["bad"] == 0
    words = {"traceback": "KeyError", "two lines": "exit", "other exit": "exit", "memory": "MB of memory", "hang": "took", "crash": "exit code -6"}
    for defect in results["defects"]:
        assert defect["kind"] == "demonstrator" and words.get(fault, "ran code") in defect["what"], defect
