"""tools/import_videos.py: films, folders of images, npz and parquet files become datasets."""

import io
import json
import os
import shutil
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import bc, contents_of, files_of, inline, killed, refusal
from filelock import FileLock
from PIL import Image

from tools import import_videos, reading_videos
from tools import make_example_films as films

SCRIPT, DATA = "tools/import_videos", "data/my_videos"
CODECS = {".mkv": ("ffv1", "bgr0"), ".mp4": ("libx264", "yuv420p"), ".gif": ("gif", "bgr8")}


def moving(N, seed=0, size=(64, 64)):
    """A white square on black that moves left, right, up or down by 4 pixels: (N, H, W, 3) uint8."""
    rng, frames, corner = np.random.default_rng(seed), np.zeros((N, *size, 3), dtype=np.uint8), [24, 24]
    for t in range(N):
        frames[t, corner[0] : corner[0] + 12, corner[1] : corner[1] + 12] = 255
        corner = np.clip(corner + np.array([(0, 4), (0, -4), (4, 0), (-4, 0)])[rng.integers(4)], 0, 48)
    return frames


def write_film(path, frames, times=None, turn=None, gop=12):
    """A film, or a folder of images where the path has no suffix. Returns its frames.

    times in milliseconds, default 30 frames a second; turn: as set_display_rotation takes it.
    """
    (path.parent if path.suffix else path).mkdir(parents=True, exist_ok=True)
    for t, x in enumerate(() if path.suffix else frames):
        Image.fromarray(x).save(path / f"{t}.png")
    if path.suffix:
        (codec, pix_fmt), film = CODECS[path.suffix], av.open(str(path), "w")
        stream = film.add_stream(codec, rate=30)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pix_fmt
        stream.gop_size = gop
        if turn:
            stream.set_display_rotation(*turn)
        if frames.shape[3] == 4:
            stream.pix_fmt = pix_fmt = "bgra"
        if times is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for t, x in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(x, format="rgb24" if x.shape[2] == 3 else "rgba")
            frame = frame.reformat(format=pix_fmt)
            if times is not None:
                frame.pts, frame.time_base = int(times[t]), Fraction(1, 1000)
            film.mux(stream.encode(frame))
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


def noise(N, seed=0, channels=3):
    """Pictures without any likeness: (N, 64, 64, channels) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (N, 64, 64, channels), dtype=np.uint8)


def on_black(x):
    return (x[..., :3] * (x[..., 3:] / 255)).round()


def draw(kind, t):
    """An image of one kind, and what it shows."""
    x = noise(1, t, channels=4 if kind == "alpha" else 3)[0]
    if kind == "16 bits":
        grey = np.full((64, 64), 1000 * t, dtype=np.uint16)
        return Image.fromarray(grey), np.repeat((grey / 257).round()[..., None], 3, axis=2)
    if kind == "palette":
        image = Image.fromarray(np.uint8(x[..., 0] > 99), "L").convert("P")
        image.putpalette([200, 30, 40, 255, 255, 255])
        image.info["transparency"] = 0
        return image, np.repeat(255 * (x[..., :1] > 99), 3, axis=2)
    return Image.fromarray(x), on_black(x) if kind == "alpha" else x


@pytest.mark.parametrize("kind", ["16 bits", "alpha", "palette", "mixed"])
def test_images_as_they_are_shown(tmp_path, kind):
    """16 bits are scaled to 8, what is transparent is black, and every still format is read, in order."""
    (tmp_path / "films").mkdir()
    suffixes, shown = [".png", ".webp", ".bmp", ".tiff"] if kind == "mixed" else [".png"], []
    for t in range(40):
        image, x = draw(kind, t)
        image.save(tmp_path / f"films/{t}{suffixes[t % len(suffixes)]}", lossless=True)
        shown.append(x)
    got = run(tmp_path, "--cut-threshold", 1)
    assert got.frames.shape == (40, 64, 64, 3) and np.abs(got.frames - np.stack(shown)).max() <= 1


def test_gaps_between_images(tmp_path, capsys):
    """A stream begins where numbers are missing, by the steps of the names; the last lines say so."""
    write_film(tmp_path / "films/a", moving(40))
    for t in (*range(1, 40, 2), 6):
        (tmp_path / f"films/a/{t}.png").unlink()
    (tmp_path / "films/a/12.png").rename(tmp_path / "films/a/12.unknown")
    assert run(tmp_path, "--num-test-frames", 4).begins == [0, 3, 5, 14]
    out = capsys.readouterr().out
    assert "a: 2 numbers are missing" in out and "left out: 1 of other kinds (12.unknown)" in out


def test_films_as_they_are_shown(tmp_path):
    """In all eight orientations of a display matrix, and on black where they are transparent."""
    x = np.zeros((4, 64, 64, 3), dtype=np.uint8)
    x[:, :16, :32] = 255
    turns = {f"{i}.mp4": (90 * (i % 4), i > 3) for i in range(8)}
    for name, turn in turns.items():
        write_film(tmp_path / "films" / name, x, turn=turn)
    clear = write_film(tmp_path / "films/clear.mkv", noise(4, channels=4))
    got = run(tmp_path, "--cut-threshold", 1)
    for i, name in enumerate(got.films):
        shown = on_black(clear)
        if name in turns:
            degrees, mirrored = turns[name]
            shown = np.rot90(x, degrees // 90, axes=(1, 2))
            shown = shown[:, :, ::-1] if mirrored else shown
        assert np.abs(got.frames[4 * i : 4 * i + 4] - shown.astype(int)).mean() < 3, name


def write_labels(path, film, N):
    """Labels that number a film's frames."""
    path.write_text("video,frame,action\n" + "\n".join(f"{film},{t},{t}" for t in range(N)))


def test_frames_by_time(tmp_path, capsys):
    """--fps takes what is on the screen at each tick; a gap begins a stream; labels keep their frames."""
    steps = [33, 34, 33] * 8 + [150, 20, 30, 100, 250, 3000, *[13] * 40, 300, 100]
    times = np.cumsum([0, *steps])
    gap = steps.index(3000) + 1
    x = write_film(tmp_path / "films/a.mkv", noise(len(times)), times)
    write_labels(tmp_path / "labels.csv", "a.mkv", len(times))
    flags = ["--cut-threshold", 1, "--labels", "labels.csv", "--num-test-frames", 5]
    got = run(tmp_path, "--fps", 10, *flags)
    wanted = []
    for part in (times[:gap], times[gap:]):
        ticks = np.arange(part[0], part[-1] + 1, 100)
        wanted.append(np.searchsorted(times, ticks + 9, side="right") - 1)
    numbers = np.concatenate(wanted)
    assert np.array_equal(got.actions, numbers) and np.array_equal(got.frame, numbers)
    assert np.abs(got.frames - x[numbers].astype(int)).max() <= 1
    assert got.begins == [0, len(wanted[0]), len(numbers) - 5]
    repeated = (np.diff(numbers) == 0).sum()
    assert repeated > 2 and f"a.mkv: {repeated} frames are there again" in capsys.readouterr().out


def test_a_damaged_place(tmp_path, capsys):
    """What can be decoded is kept, with its labels; a stream begins after the loss, which is named."""
    base = noise(1)[0]
    x = np.stack([np.roll(base, 2 * t, axis=1) for t in range(120)])
    write_film(tmp_path / "films/a.mp4", x, gop=20)
    film = bytearray((tmp_path / "films/a.mp4").read_bytes())
    middle = len(film) // 2
    film[middle : middle + 4096] = noise(1).tobytes()[:4096]
    (tmp_path / "films/a.mp4").write_bytes(film)
    write_labels(tmp_path / "labels.csv", "a.mp4", 120)
    got = run(tmp_path, "--labels", "labels.csv", "--cut-threshold", 1, "--num-test-frames", 9)
    lost = 120 - len(got.first)
    assert 0 < lost < 30 and got.actions[0] == 0 and got.actions[-1] == 119
    jumps = np.flatnonzero(np.diff(got.actions) > 1) + 1
    assert len(jumps) and set(jumps) < set(got.begins)
    errors = np.abs(got.frames - x[got.actions].astype(int)).mean((1, 2, 3))
    whole = errors < 1.5 * errors[:20].max()  # around the loss some are smeared
    assert whole[: jumps[0]].all() and whole[-40:].all()
    assert f"a.mp4: {lost} of its frames cannot be decoded" in capsys.readouterr().out


def test_what_is_found(tmp_path, capsys):
    """Linked folders are followed, names are any bytes, accents compose as they like; all else is listed."""
    names = ["a.mkv", ".hidden.mkv", os.fsdecode(b"\xe9.mkv"), "e\u0301.mkv", "../elsewhere/b.mkv"]
    for name in names:
        write_film(tmp_path / "films" / name, moving(8))
    (tmp_path / "films/more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/loop").symlink_to(tmp_path / "films")
    (tmp_path / "films/gone.mkv").symlink_to(tmp_path / "nowhere")
    (tmp_path / "films/notes.txt").write_text("")
    Image.fromarray(moving(1)[0]).save(tmp_path / "films/a.jpg")
    write_labels(tmp_path / "labels.csv", "\u00e9.mkv", 8)
    got = run(tmp_path, "--labels", "labels.csv")
    assert sorted(got.films) == sorted([*names[:1], *names[2:4], "more/b.mkv"])
    row = 8 * got.films.index("e\u0301.mkv")
    assert got.actions[row : row + 8].tolist() == [*range(8)] and (got.actions >= 0).sum() == 8
    out = capsys.readouterr().out
    for words in ("hidden (.hidden.mkv)", "read already (loop)", "broken links (gone.mkv)", "(--kind films)",
                  "of other kinds (notes.txt)", "which --kind images reads (a.jpg)"):  # fmt: skip
        assert words in out
    assert "1 frames" in refusal(tmp_path, SCRIPT, "films", "--kind", "images", "--overwrite")


def test_cuts(tmp_path):
    """A stream begins where the picture changes by the threshold or more, and nowhere else."""
    write_film(tmp_path / "films/a.mkv", np.concatenate([moving(10), 255 - moving(8), moving(14)]))
    assert run(tmp_path, "--num-test-frames", 4).begins == [0, 10, 18, 28]
    assert run(tmp_path, "--num-test-frames", 4, "--cut-threshold", 1, "--overwrite").begins == [0, 28]


def test_whole_films_are_the_test_split(tmp_path, monkeypatch):
    """Of several films, the last in the seed's order; each film is in one split and a stream.

    The notes are written whole once, not once a film.
    """
    write_whole = import_videos.write_whole
    names, orders, written = [f"{i}/{i}.mkv" for i in range(6)], set(), []
    monkeypatch.setattr(import_videos, "write_whole", lambda *x: (written.append(x[0].name), write_whole(*x)))
    films = {x: write_film(tmp_path / "films" / x, moving(8 + i, i)) for i, x in enumerate(names)}
    for seed in range(1, 4):
        got = run(tmp_path, "--seed", seed, "--num-test-frames", 14, "--overwrite")
        assert len(got.meta["splits"]["test"]["films"]) == 2 and sorted(got.films) == sorted(films)
        assert np.array_equal(got.frames, np.concatenate([films[name] for name in got.films]))
        assert got.begins == np.cumsum([0, *(len(films[name]) for name in got.films)])[:-1].tolist()
        orders.add(tuple(got.films))
    assert len(orders) == 3 and written == ["import.jsonl", "meta.json"] * 3


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


def arrow_of(x, form):
    """Pictures (N, H, W, 3) as a column of a parquet file."""
    if form in ("lists", "fixed"):
        kind = pa.uint8() if form == "lists" else pa.int64()
        for size in x.shape[:0:-1]:
            kind = pa.list_(kind, -1 if form == "lists" else size)
        return pa.array(x.tolist(), kind)
    files = []
    for picture in x:
        f = io.BytesIO()
        Image.fromarray(picture).save(f, "PNG")
        files.append(f.getvalue() if form == "bytes" else {"bytes": f.getvalue(), "path": None})
    return files


@pytest.mark.parametrize("done_is_first", [False, True])
@pytest.mark.parametrize("form", ["npz", "lists", "fixed", "bytes", "struct"])
def test_npz_and_parquet(tmp_path, capsys, form, done_is_first):
    """Arrays come out as they went in, for both meanings of done; only whole episodes have a return."""
    first, wanted, files = np.isin(np.arange(40), [0, 7, 15, 30]), [], ["train/9", "train/10", "test/0"]
    done = first if done_is_first else np.roll(first, -1)
    early = np.arange(40) < 10
    for i, file in enumerate([*files, "validation/0"]):
        rng = np.random.default_rng(i)
        x = rng.integers(0, 15, (40, 64, 64, 3)) + np.cumsum(first)[:, None, None, None] * 60
        x, actions, rewards = x.astype(np.uint8), rng.integers(15, size=40), rng.random(40, dtype=np.float32)
        path, returns = tmp_path / "films" / file, np.full(40, np.nan)
        path.parent.mkdir(parents=True, exist_ok=True)
        returns[7:15], returns[15:30] = rewards[7:15].sum(), rewards[15:30].sum()
        wanted.append(dict(frames=x, first=first, actions=actions, rewards=rewards, returns=returns))
        if form != "npz":
            columns = {"action": actions, "reward": rewards, "done": done & early, "truncated": done & ~early}
            table = pa.table({"observation": arrow_of(x, form), **columns})
            pq.write_table(table, f"{path.parent}-{path.name}.parquet", row_group_size=7)
        elif file in files:
            np.savez_compressed(
                f"{path}.npz", obs=x, ta=actions, done=done, rewards=rewards, logits=np.zeros(3)
            )
    got = run(tmp_path)
    for name in wanted[0]:
        arrays = [x[name] for x in wanted[:3]]
        np.testing.assert_allclose(getattr(got, name), np.concatenate(arrays), 1e-5)
    end, sign = (".npz", "/") if form == "npz" else (".parquet", "-")
    assert got.films == [file.replace("/", sign) + end for file in files]
    returns = np.array([x["returns"][[7, 15]] for x in wanted[:2]])
    score = {"return_mean": returns.mean(), "return_stderr": returns.std(ddof=1) / 4**0.5, "episodes": 4}
    assert got.meta["demonstrator"] == pytest.approx(score)
    assert got.meta["splits"]["test"]["num_frames"] == 40 and got.meta["num_actions"] == got.actions.max() + 1
    assert ("train or test (validation-0.parquet)" in capsys.readouterr().out) == (form != "npz")


def test_parquet_is_streamed(tmp_path):
    """A part of a row group is in memory: Arrow takes 16 bytes a number."""
    table = pa.table({"observation": arrow_of(noise(200), "lists")})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=200)
    del table
    before = pa.total_allocated_bytes()
    frames = reading_videos.read_parquet(tmp_path / "a.parquet")
    most = max(pa.total_allocated_bytes() - before for _ in frames)
    assert 0 < most < 16 * 100 * 64 * 64 * 3


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
        if (tmp_path / DATA / "import.jsonl").exists():
            with open(tmp_path / DATA / "import.jsonl", "a") as f:
                f.write('{"film": "0.mk')  # a line that was cut off
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
    for name, N in {"films/a.mkv": 20, "twice/b": 3, "float/b": 3, "short/a.mkv": 5}.items():
        write_film(tmp_path / name, moving(N))
    shutil.copy(tmp_path / "twice/b/0.png", tmp_path / "twice/b/0.bmp")
    Image.fromarray(np.ones((64, 64), dtype=np.float32)).save(tmp_path / "float/b/0.tiff")
    (tmp_path / "float/b/0.png").unlink()
    for name, column in {"p/a/train-0": "screen", "p/b/train-0": "screen", "q/test-0": "observation"}.items():
        (tmp_path / name).parent.mkdir(parents=True)
        pq.write_table(pa.table({column: [[[1, 2]]]}), tmp_path / f"{name}.parquet")
    (tmp_path / "none").mkdir()
    for name, size in {"x/train": 0, "x/test": 0, "y/train": 32, "y/test": 32, "broken": 0}.items():
        (tmp_path / name).mkdir(parents=True)
        obs = {"obs": np.zeros((9, size, size, 3), dtype=np.uint8)} if size else {}
        np.savez(tmp_path / name / "0.npz", ta=np.zeros(9), done=np.zeros(9), rewards=np.zeros(9), **obs)
    (tmp_path / "broken/0.npz").rename(tmp_path / "broken/b.mp4")
    run(tmp_path)
    before = files_of(tmp_path / "data")
    cases = {  # flags, or rows of the labels: words of the sentence
        "nowhere": "not there", "none": "nothing", "twice": "0.bmp and 0.png", "broken": "b.mp4 is unusable",
        "float": "floating-point", "twice/b/0.png": "single image", "p": "2 games", "p/a": "expected observ",
        "q": "shape (1, 2)", "films --kind npz": "expected npz", "films --fps 0": "--fps 0",
        "films --fps 9 --every 2": "one of both", "twice --fps 9": "images have no times",
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


def test_example_films(tmp_path):
    """A frame's label, found delay frames later, moves the orange sprite on; every cut begins a stream."""
    delay = 2
    flags = "films --num-films 2 --num-actions 60 --cuts 2 --label-delay"
    inline(tmp_path, "tools/make_example_films", *flags.split(), delay)
    got = run(tmp_path, "--labels", "films/labels.csv", "--cut-threshold", 0.1, "--num-test-frames", 60)
    assert got.begins == [0, 20, 40, 60, 80, 100] and len(got.frames) == 120
    orange = np.abs(got.frames - np.array([255.0, 165, 0])).max(3) < 50  # (N, 64, 64)
    places = [2 * np.argwhere(mask).min(0) for mask in orange]
    moves = dict(zip(films.ACTIONS, films.MOVES))
    seen = []
    for t in range(119):
        whole = orange[t].sum() == orange[t + 1].sum() == 64  # nothing before it
        if whole and (t + 1) % 20 and t % 60 + delay < 60:
            action = got.meta["action_names"][got.actions[t + delay]]
            expected = np.clip(places[t] + moves[action], films.LOW, films.HIGH)
            assert np.array_equal(places[t + 1], expected), t
            seen.append(action)
    assert set(seen) == set(films.ACTIONS) and len(seen) > 30
    assert (got.actions < 0).sum() == 2 * delay
