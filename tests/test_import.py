"""tools/import_videos.py: films, folders of images and the paper's npz files become datasets."""

import json
import os
import shutil
from types import SimpleNamespace

import av
import numpy as np
import pytest
from conftest import bc, contents_of, files_of, inline, killed, refusal
from filelock import FileLock
from PIL import Image

SCRIPT, DATA = "tools/import_videos", "data/my_videos"
CODECS = {".mkv": ("ffv1", "bgr0"), ".mp4": ("libx264", "yuv420p"), ".gif": ("gif", "bgr8")}


def moving(N, seed=0, size=(64, 64)):
    """A white square on black that moves left, right, up or down by 4 pixels: (N, H, W, 3) uint8."""
    rng, frames, corner = np.random.default_rng(seed), np.zeros((N, *size, 3), dtype=np.uint8), [24, 24]
    for t in range(N):
        frames[t, corner[0] : corner[0] + 12, corner[1] : corner[1] + 12] = 255
        corner = np.clip(corner + np.array([(0, 4), (0, -4), (4, 0), (-4, 0)])[rng.integers(4)], 0, 48)
    return frames


def write_film(path, frames):
    """A film, or a folder of images where the path has no suffix. Returns its frames."""
    (path.parent if path.suffix else path).mkdir(parents=True, exist_ok=True)
    for t, x in enumerate(() if path.suffix else frames):
        Image.fromarray(x).save(path / f"{t}.png")
    if path.suffix:
        (codec, pix_fmt), film = CODECS[path.suffix], av.open(str(path), "w")
        stream = film.add_stream(codec, rate=30)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pix_fmt
        for x in frames:
            film.mux(stream.encode(av.VideoFrame.from_ndarray(x, format="rgb24").reformat(format=pix_fmt)))
        film.mux(stream.encode(None))
        film.close()
    return frames


def run(cwd, *flags):
    """Imports cwd/films: meta.json, arrays of both splits one after another, films, where streams begin."""
    inline(cwd, SCRIPT, "films", *flags)
    meta, arrays = json.loads((cwd / DATA / "meta.json").read_text()), {}
    assert sorted(p.name for p in (cwd / DATA).iterdir()) == [".lock", "meta.json", "test", "train"]
    for name in {p.stem for p in (cwd / DATA).glob("t*/*.npy")}:
        parts = [np.load(cwd / DATA / split / f"{name}.npy") for split in ("train", "test")]
        assert [len(x) for x in parts] == [split["num_frames"] for split in meta["splits"].values()]
        arrays[name] = np.concatenate(parts)
    films = [name for split in meta["splits"].values() for name in split["films"]]
    begins = np.flatnonzero(arrays["first"]).tolist()
    return SimpleNamespace(meta=meta, films=films, begins=begins, **arrays)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("suffix", CODECS)
def test_films(tmp_path, suffix, every):
    """All frames are there, in order; of the only film the end is the test split; the stages can read it."""
    kept = write_film(tmp_path / f"films/a{suffix}", moving(31))[::every]
    got, N = run(tmp_path, "--every", every, "--num-test-frames", 5), len(kept)
    assert got.frames.shape == kept.shape and not hasattr(got, "actions")
    errors = np.abs(got.frames.astype(int) - kept).mean((1, 2, 3))
    assert errors.max() < {".mkv": 0.01, ".gif": 0.1, ".mp4": 2}[suffix]
    assert got.begins == [0, N - 5] and got.meta["splits"]["test"]["films"] == {f"a{suffix}": 5}
    _, train, test = bc.load_dataset(SimpleNamespace(env_id="my_videos", data_dir=tmp_path / DATA))
    assert np.array_equal(train[train.windows], got.frames[1 : N - 6]) and len(test.windows) == 3


def test_images(tmp_path):
    """128x128 becomes the means of 2x2 blocks, a crop is its part; 2.png comes before 10.png."""
    noise = np.random.default_rng(0).integers(0, 256, (12, 128, 128, 3), dtype=np.uint8)
    write_film(tmp_path / "films/a", noise)
    got = run(tmp_path, "--cut-threshold", 1)
    assert np.abs(got.frames - noise.reshape(12, 64, 2, 64, 2, 3).mean((2, 4))).max() <= 1
    got = run(tmp_path, "--crop", 30, 50, 64, 64, "--overwrite", "--cut-threshold", 1)
    assert np.array_equal(got.frames, noise[:, 50:114, 30:94])


def test_cuts(tmp_path):
    """A stream begins where the picture changes by the threshold or more, and nowhere else."""
    write_film(tmp_path / "films/a.mkv", np.concatenate([moving(10), 255 - moving(8), moving(14)]))
    assert run(tmp_path, "--num-test-frames", 4).begins == [0, 10, 18, 28]
    assert run(tmp_path, "--num-test-frames", 4, "--cut-threshold", 1, "--overwrite").begins == [0, 28]


def test_whole_films_are_the_test_split(tmp_path):
    """Of several films, the last in the seed's order; each film is in one split and a stream."""
    names, orders = [f"{i}/{i}.mkv" for i in range(6)], set()
    films = {x: write_film(tmp_path / "films" / x, moving(8 + i, i)) for i, x in enumerate(names)}
    for seed in range(1, 4):
        got = run(tmp_path, "--seed", seed, "--num-test-frames", 14, "--overwrite")
        assert len(got.meta["splits"]["test"]["films"]) == 2 and sorted(got.films) == sorted(films)
        assert np.array_equal(got.frames, np.concatenate([films[name] for name in got.films]))
        assert got.begins == np.cumsum([0, *(len(films[name]) for name in got.films)])[:-1].tolist()
        orders.add(tuple(got.films))
    assert len(orders) == 3


@pytest.mark.parametrize("names", [None, ["jump", "left", "right"]])
def test_labels(tmp_path, names):
    """An action stands at its frame of the film, also with --every; other frames have -1."""
    lines, t = ["frame,video,action"], np.arange(20)
    actions = {"a.mkv": np.where(t % 5, t % 3, -1), "b/c.mkv": np.where(t % 4, (t + 1) % 3, -1)}
    for name in actions:
        write_film(tmp_path / "films" / name, moving(20))
        lines += [f"{t},{name},{names[a] if names else a}" for t, a in enumerate(actions[name]) if a >= 0]
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    for every in (1, 2):
        got = run(tmp_path, "--labels", "labels.csv", "--every", every, "--overwrite")
        wanted = np.concatenate([actions[name][::every] for name in got.films])
        assert got.actions.dtype == np.int8 and np.array_equal(got.actions, wanted)
    assert got.meta["num_actions"] == 3 and got.meta.get("action_names") == names


@pytest.mark.parametrize("done_is_first", [False, True])
def test_the_papers_npz(tmp_path, done_is_first):
    """Arrays come out as they went in, for both meanings of done; only whole episodes have a return."""
    rng, first, wanted = np.random.default_rng(0), np.isin(np.arange(40), [0, 7, 15, 30]), []
    done = first if done_is_first else np.roll(first, -1)
    for file in ("train/0", "train/2", "train/10", "test/0"):
        obs = rng.integers(0, 20, (40, 64, 64, 3)) + np.cumsum(first)[:, None, None, None] * 70
        obs, ta, rewards = obs.astype(np.uint8), rng.integers(15, size=40), rng.random(40)
        path, returns = tmp_path / f"films/{file}.npz", np.full(40, np.nan)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, obs=obs, ta=ta, done=done, rewards=rewards, logits=np.zeros(3))
        returns[7:15], returns[15:30] = rewards[7:15].sum(), rewards[15:30].sum()
        wanted.append(dict(frames=obs, first=first, actions=ta, rewards=rewards, returns=returns))
    got = run(tmp_path)
    for name in wanted[0]:
        np.testing.assert_allclose(getattr(got, name), np.concatenate([x[name] for x in wanted]), 1e-5)
    returns = np.array([x["returns"][[7, 15]] for x in wanted[:3]])
    score = {"return_mean": returns.mean(), "return_stderr": returns.std(ddof=1) / 6**0.5, "episodes": 6}
    assert got.meta["demonstrator"] == pytest.approx(score)
    assert got.meta["splits"]["test"]["num_frames"] == 40 and got.meta["num_actions"] == got.actions.max() + 1


def test_interrupted(tmp_path):
    """Killed at any of its steps, an import goes on with the same command and ends as one that was not."""
    for i in range(3):
        write_film(tmp_path / f"films/{i}.mkv", moving(10 + i, i))
    flags = ["--num-test-frames", 4]
    run(tmp_path, *flags)
    (tmp_path / "data").rename(tmp_path / "whole")
    fsyncs = [(os, "fsync", n) for n in (1, 4, 8, 9, 10, 11, 12)]
    for owner, name, n in [(np, "stack", 1), (np, "stack", 3), (os, "sync", 1), *fsyncs]:
        killed(tmp_path, SCRIPT, "films", *flags, owner=owner, name=name, n=n)
        if n == 10:
            assert "'every': 1" in refusal(tmp_path, SCRIPT, "films", *flags, "--every", 2)
        run(tmp_path, *flags)
        assert contents_of(tmp_path / "data", ".npy") == contents_of(tmp_path / "whole", ".npy"), (name, n)
        shutil.rmtree(tmp_path / "data")


def test_bad_films(tmp_path):
    """The first bad film ends the import, which goes on when it is mended; or all are left out and listed."""
    for i in range(3):
        write_film(tmp_path / f"films/{i}", moving(10 + i, i))
    good = (tmp_path / "films/2/7.png").read_bytes()
    (tmp_path / "films/2/7.png").write_bytes(good[:100])  # seen when it is read
    assert "films/2 is unusable" in refusal(tmp_path, SCRIPT, "films")
    (tmp_path / "films/2/7.png").write_bytes(good)
    assert len(run(tmp_path).first) == 10 + 11 + 12
    (tmp_path / "films/2/7.png").write_bytes(good[:100])
    (tmp_path / "films/1/0.png").write_bytes(b"")  # seen at the first look
    got = run(tmp_path, "--overwrite", "--skip-bad")
    assert sorted(got.meta["skipped"]) == ["1", "2"] and len(got.first) == 10


def test_refusals(tmp_path, monkeypatch):
    """Every error is one sentence, and the dataset that is there stays as it is."""
    for name, N in {"films/a.mkv": 20, "mixed/a.mkv": 5, "mixed/b": 3, "short/a.mkv": 5}.items():
        write_film(tmp_path / name, moving(N))
    (tmp_path / "none").mkdir()
    for name, size in {"x/train": 0, "x/test": 0, "y/train": 32, "y/test": 32, "broken": 0}.items():
        (tmp_path / name).mkdir(parents=True)
        obs = {"obs": np.zeros((9, size, size, 3), dtype=np.uint8)} if size else {}
        np.savez(tmp_path / name / "0.npz", ta=np.zeros(9), done=np.zeros(9), rewards=np.zeros(9), **obs)
    (tmp_path / "broken/0.npz").rename(tmp_path / "broken/b.mp4")
    run(tmp_path)
    before = files_of(tmp_path / "data")
    cases = {  # flags, or rows of the labels: words of the sentence
        "nowhere": "not there", "none": "no films", "mixed": "images (0.png)", "broken": "b.mp4 is unusable",
        "x": "obs.npy", "y": "(9, 32, 32, 3)", "x --every 2": "npz", "x/train": "test/INT.npz",
        "films --crop 9 9 9 99": "not inside its 64 x 64", "films --every 0": "--every",
        "films --env-id a/b": "'a/b'", "films --env-id a:b": "a:b", "films --labels no": "no ",
        "b.mkv,1,1": "b.mkv", "a.mkv,1.5,1": "'1.5'", "a.mkv,1,-1": "-1", "a.mkv,1,127": "127",
        "a.mkv,1,2\na.mkv,2,up": "up", "a.mkv,1": "''", "": "0 actions", "films --cut-threshold 0": "1 or",
    }  # fmt: skip
    for flags, words in cases.items():
        (tmp_path / "labels.csv").write_text(f"video,frame,action\n{flags}")
        flags = "films --labels labels.csv" if "," in flags or not flags else flags
        assert words in refusal(tmp_path, SCRIPT, *flags.split(), "--overwrite"), flags
        assert files_of(tmp_path / "data") == before, flags
    assert "--overwrite" in refusal(tmp_path, SCRIPT, "films")
    with FileLock(tmp_path / DATA / ".lock"):
        assert "another process" in refusal(tmp_path, SCRIPT, "films", "--overwrite")
    assert files_of(tmp_path / "data") == before
    (tmp_path / "late.csv").write_text("video,frame,action\na.mkv,20,1")
    assert "frame 20 of a.mkv" in refusal(tmp_path, SCRIPT, "films", "--env-id", "b", "--labels", "late.csv")
    assert "windows" in refusal(tmp_path, SCRIPT, "short", "--env-id", "c")
    monkeypatch.setattr(shutil, "copyfileobj", lambda *_: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
    assert "12.3 kB" in refusal(tmp_path, SCRIPT, "films", "--env-id", "d")


def test_from_films_to_latents(tmp_path):
    """What reads datasets reads films: pretraining, its probe, and the report; nobody can play them."""
    lines = ["video,frame,action"]
    for i in range(2):
        write_film(tmp_path / f"films/{i}", moving(90, seed=i))
        lines += [f"{i},{t},{'left' if t % 2 else 'right'}" for t in range(80)]
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    run(tmp_path, "--labels", "labels.csv")
    small = "--env-id my_videos --no-cuda --patch-size 4 --num-updates 2 --batch-size 8 --no-vq"
    inline(tmp_path, "lapo_pretrain", *small.split(), *"--idm-scale 0.25 --fdm-width 4".split())
    flags = "--env-id my_videos --rollout-steps 2 --eval-windows 128"
    inline(tmp_path, "tools/inspect_latents", *flags.split())
    results = json.loads((tmp_path / "runs/my_videos__inspect_latents__1/results.json").read_text())
    assert {"codebooks", "lapo_decode", "lapo_finetune_ppo"} <= set(results["missing"])
    for tool in ("tools/play_dream", "ppo_procgen"):
        assert "my_videos" in refusal(tmp_path, tool, "--env-id", "my_videos")
