"""Your own videos, or those published with LAPO's paper, as a dataset that the stages read.

VIDEOS is a film or a folder, searched with its subfolders, that holds one kind of
    films                   mp4, webm, gif, mkv, ...: a stream of frames each, but for cuts
    folders of images       png or jpg: a folder is a film, its frames are ordered by the numbers in names
    {train,test}/INT.npz    the paper's: obs (N, 64, 64, 3) uint8; ta, done and rewards (N,)

    python import_videos.py films --env-id my_game
    python import_videos.py films --env-id my_game --every 2 --crop 0 40 640 440 --labels labels.csv
    python import_videos.py expert_data/bossfight --env-id bossfight  # the paper's
Writes data/ENV_ID as collect_expert_data.py does: frames and first; with --labels actions, -1 where a frame
has none; of the paper's also rewards and returns. What was interrupted goes on with the same command, film by
film: import.json notes which are in frames.npy.
"""

import csv
import errno
import hashlib
import json
import os
import re
import shutil
import sys
import zipfile
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import av
import numpy as np
import tyro
from av.video.reformatter import VideoReformatter
from filelock import FileLock
from PIL import Image, ImageOps
from tqdm import tqdm

from lapo_bc import write_whole

FILMS = ".mp4 .webm .gif .mkv .mov .avi .m4v .mpg .mpeg .mts .m2ts .ts .wmv .flv .ogv .3gp".split()
KINDS = {"films": FILMS, "images": [".png", ".jpg", ".jpeg"], "npz": [".npz"]}
HEADER, FRAME = 128, 64 * 64 * 3  # bytes of frames.npy: before its rows, and of a row


@dataclass
class Args:
    # what
    videos: tyro.conf.Positional[str]  # a film, or a folder of films, of folders of images or of npz files
    env_id: str = "my_videos"  # name of the dataset, as folders can have it
    seed: int = 1  # seed of the films' order, hence of the split
    # data
    data_dir: str | None = None  # where the dataset goes; default data/ENV_ID
    labels: str | None = None  # actions of all or some frames: a CSV file of columns video,frame,action
    skip_bad: bool = False  # leave out films that cannot be read, and list them
    overwrite: bool = False  # replace the dataset, or begin an interrupted one anew
    # method
    size: Literal[64] = 64  # pixels a side: the networks take no other
    crop: tuple[int, int, int, int] | None = None  # LEFT TOP WIDTH HEIGHT as shown; default the whole picture
    every: int = 1  # keep each Nth frame
    cut_threshold: float = 0.25  # mean change of a frame that begins a new stream, of 1; from 1 on, none does
    num_test_frames: int = 4096  # size of the test split: the last films that have so many frames


def find_films(args):
    """{name: path} of all films in the dataset's order; a film's name is its path in VIDEOS."""
    root, found = Path(args.videos), {}
    files, root = ([root], root.parent) if root.is_file() else (sorted(root.rglob("*")), root)
    for p in files:
        kind = [kind for kind, suffixes in KINDS.items() if p.suffix.lower() in suffixes and p.is_file()]
        if kind and not any(part.startswith(".") for part in p.relative_to(root).parts):
            found.setdefault(kind[0], []).append(p)
    if len(found) != 1:
        what = " and ".join(f"{kind} ({paths[0].name})" for kind, paths in found.items())
        sys.exit(f"error: {args.videos} holds {what or 'no films, or is not there'}: expected one of {KINDS}")
    ((kind, paths),) = found.items()
    paths = [p.parent for p in paths] if kind == "images" else paths
    names = {p.relative_to(root).as_posix(): p for p in paths}
    if kind == "npz":
        if {p.parent.name for p in paths} != {"train", "test"} or not all(p.stem.isdecimal() for p in paths):
            what = ", ".join(list(names)[:3])
            sys.exit(f"error: {args.videos} holds {what} ...: expected train/INT.npz and test/INT.npz alone")
        place = {name: (p.parent.name == "test", p.parent, int(p.stem)) for name, p in names.items()}
    else:  # shuffled by hashes: a film more or less does not move the others
        place = {name: hashlib.blake2b(f"{args.seed} {name}".encode()).digest() for name in names}
    return {name: names[name] for name in sorted(names, key=place.get)}


def read_labels(path, films):
    """{film: {frame: action}} of a CSV file, and the names of the actions, None where they are numbers."""
    labels = {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            reader = csv.DictReader(f, skipinitialspace=True, restval="")
            for row in reader:
                video, frame, action = (row[key].strip() for key in ("video", "frame", "action"))
                video = Path(video).as_posix()
                if video not in films or not frame.isdecimal():
                    raise ValueError(f"line {reader.line_num}: frame {frame!r} of {video!r}")
                labels.setdefault(video, {})[int(frame)] = action
        actions = sorted({action for found in labels.values() for action in found.values()})
        named = not any(re.fullmatch(r"[-+.\d]*", action) for action in actions)
        index = {action: i if named else int(action) for i, action in enumerate(actions)}
        if not 0 <= min(index.values(), default=-1) <= max(index.values()) <= 126:
            raise ValueError(f"{len(index)} actions {', '.join(actions[:5])} ...")
    except (OSError, ValueError, KeyError, csv.Error) as e:
        what = "columns video (a path in VIDEOS), frame (from 0) and action (all 0 to 126, or all names)"
        sys.exit(f"error: --labels {path} is unusable ({e}): expected {what}")
    labels = {video: {t: index[action] for t, action in found.items()} for video, found in labels.items()}
    return labels, actions if named else None


def open_npz(path):
    """Of an npz the file obs.npy, at its first row, and ta, done and rewards (N,)."""
    z = zipfile.ZipFile(path)
    ta, done, rewards = (np.lib.format.read_array(z.open(f"{x}.npy")) for x in ("ta", "done", "rewards"))
    f = z.open("obs.npy")
    np.lib.format.read_magic(f)
    shape, _, dtype = np.lib.format.read_array_header_1_0(f)
    shapes, N = [shape, ta.shape, done.shape, rewards.shape], len(ta)
    if shapes != [(N, 64, 64, 3), (N,), (N,), (N,)] or dtype != np.uint8:
        raise ValueError(f"obs {dtype}, ta, done, rewards are {shapes}, not (N, 64, 64, 3) uint8 and (N,)")
    if N and not 0 <= ta.min() <= ta.max() <= 126:
        raise ValueError(f"ta is {ta.min()} to {ta.max()}, not actions from 0 to 126")
    return f, ta, done.astype(bool), rewards


def shrink(frame, args, to_rgb, to_small):
    """An av.VideoFrame of any size as it is shown, cropped, averaged by area: (64, 64, 3) uint8."""
    if frame.rotation or args.crop:  # phones note a rotation, in degrees counterclockwise
        x = to_rgb.reformat(frame, format="rgb24", threads=1).to_ndarray()
        x = np.rot90(x, frame.rotation // 90)  # (H, W, 3)
        left, top, width, height = args.crop or (0, 0, x.shape[1], x.shape[0])
        if not (0 <= left < left + width <= x.shape[1] and 0 <= top < top + height <= x.shape[0]):
            raise ValueError(f"--crop {args.crop} is not inside its {x.shape[1]} x {x.shape[0]} pixels")
        x = np.ascontiguousarray(x[top : top + height, left : left + width])
        frame = av.VideoFrame.from_ndarray(x, format="rgb24")
    small = to_small.reformat(frame, args.size, args.size, "rgb24", interpolation="AREA", threads=1)
    return small.to_ndarray()


def open_film(path, args):
    """About how many frames a film gives, and an iterator over them: every Nth, (64, 64, 3) uint8."""
    if path.suffix == ".npz":
        f, ta, *_ = open_npz(path)
        return len(ta), (np.frombuffer(f.read(FRAME), dtype=np.uint8).reshape(64, 64, 3) for _ in ta)
    if path.is_dir():
        files = [p for p in path.iterdir() if p.suffix.lower() in KINDS["images"] and p.name[0] != "."]
        files.sort(key=lambda p: re.sub(r"\d+", lambda number: number[0].zfill(20), p.name))
        images = (ImageOps.exif_transpose(Image.open(p)).convert("RGB") for p in files[:: args.every])
        N, frames = len(files), (av.VideoFrame.from_ndarray(np.asarray(image)) for image in images)
    else:
        film = av.open(str(path))
        stream = film.streams.best("video")
        if stream is None:
            raise ValueError("no video in it")
        stream.thread_type = "AUTO"  # decodes on all cores
        N = stream.frames or (film.duration or 0) / av.time_base * (stream.average_rate or 0)
        frames = islice(film.decode(stream), 0, None, args.every)
    own = VideoReformatter(), VideoReformatter()  # a film keeps its tables: up to twice as fast
    return int(N) // args.every, (shrink(frame, args, *own) for frame in frames)


def keep_rows(f, N):
    """Makes f, an open frames.npy, hold its first N rows and no more, on the disk. Its header fits all N."""
    f.seek(0)
    np.lib.format.write_array_header_1_0(f, {"descr": "|u1", "fortran_order": False, "shape": (N, 64, 64, 3)})
    assert f.tell() == HEADER
    f.truncate(HEADER + N * FRAME)
    f.flush()
    os.fsync(f.fileno())
    f.seek(0, os.SEEK_END)


def append_film(f, path, bar, args):
    """Appends a film's frames to f. Returns their number, and the indices of those that begin a stream."""
    (_, frames), last, jumps = open_film(path, args), [], []
    while chunk := list(islice(frames, 256)):
        x = np.stack([*(last or chunk[:1]), *chunk])  # (1 + n, 64, 64, 3): the frame before comes first
        f.write(x[1:])
        change = np.maximum(x[1:], x[:-1]) - np.minimum(x[1:], x[:-1])
        jumps.append(change.reshape(len(chunk), -1).mean(1, dtype=np.float32) / 255)
        last = chunk[-1:]
        bar.update(len(chunk))
    jumps = np.concatenate(jumps)  # (N,), 0 to 1: how much a frame differs from the one before it
    if path.suffix == ".npz":
        # some say that done[t] ends an episode with step t, some that it begins one with frame t; the
        # pictures decide: over these rows they jump more from t to t + 1, or from t - 1 to t
        done = open_npz(path)[2]
        begins = np.flatnonzero(done) + (jumps[2:][done[1:-1]].sum() > jumps[1:-1][done[1:-1]].sum())
    else:
        begins = np.flatnonzero((jumps >= args.cut_threshold) & (args.cut_threshold < 1))
    return {"num_frames": len(jumps), "first": [0, *(int(t) for t in begins if 0 < t < len(jumps))]}


def append_films(films, state, data_dir, args):
    """Appends the films that state does not know to train/frames.npy, and notes them, after a look at all."""

    def bad(name, e):
        if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise e  # it is the dataset that cannot be written
        state["skipped"][name] = why = " ".join((str(e) or f"no frames, {type(e).__name__}").split())
        if not args.skip_bad:
            sys.exit(f"error: {films[name]} is unusable ({why}): mend it, remove it, or add --skip-bad")

    known, estimates = sum(film["num_frames"] for film in state["films"].values()), {}
    todo = [name for name in films if name not in state["films"] | state["skipped"]]
    for name in tqdm(todo, "look at the films", unit="film", delay=2, leave=False):
        try:
            N, frames = open_film(films[name], args)
            next(frames)
            estimates[name] = N
        except Exception as e:  # FFmpeg, Pillow and zlib raise many kinds
            bad(name, e)
    if not state["films"]:
        for old in [data_dir / "meta.json", *data_dir.glob("train/*.npy"), *data_dir.glob("test/*.npy")]:
            old.unlink(missing_ok=True)
        for split in ("train", "test"):
            (data_dir / split).mkdir(exist_ok=True)
    write_whole(data_dir / "import.json", json.dumps(state))
    bar = tqdm(total=known + sum(estimates.values()), initial=known, unit="frame")
    with bar, open(data_dir / "train" / "frames.npy", "r+b" if state["films"] else "w+b") as f:
        keep_rows(f, known)
        for name in estimates:
            bar.set_postfix_str(name)
            try:
                state["films"][name] = append_film(f, films[name], bar, args)
                known += state["films"][name]["num_frames"]
            except Exception as e:
                bad(name, e)
            keep_rows(f, known)
            write_whole(data_dir / "import.json", json.dumps(state))


def arrays_of(films, state, labels, args):
    """The arrays beside the frames, {name: (N,)}, of all films one after another."""
    N, start = sum(film["num_frames"] for film in state["films"].values()), 0
    arrays = {"first": np.zeros(N, dtype=bool), "actions": np.full(N, -1, dtype=np.int8)}
    arrays |= {"rewards": np.zeros(N, dtype=np.float32), "returns": np.full(N, np.nan, dtype=np.float32)}
    for name, film in state["films"].items():
        n = film["num_frames"]
        first, actions, rewards, returns = (x[start : start + n] for x in arrays.values())
        start += n
        first[film["first"]] = True
        for t, action in labels.get(name, {}).items():
            if t // args.every >= n:
                found = f"frame {t} of {name}, which ends before frame {n * args.every}"
                sys.exit(f"error: --labels {args.labels} has {found}: expected frames counted from 0")
            if t % args.every == 0:
                actions[t // args.every] = action
        if films[name].suffix == ".npz":
            _, actions[:], _, rewards[:] = open_npz(films[name])
            for a, b in zip(film["first"][1:], film["first"][2:]):  # not of the first and last: cut off
                returns[a:b] = rewards[a:b].sum()
    kinds = 4 if any(p.suffix == ".npz" for p in films.values()) else 2 if labels else 1
    return dict(islice(arrays.items(), kinds))


def finish(films, state, labels, action_names, data_dir, args):
    """Cuts the test split off train/frames.npy, and writes the arrays beside the frames, then meta.json."""
    arrays = arrays_of(films, state, labels, args)
    counts = {name: film["num_frames"] for name, film in state["films"].items()}
    N, n_test = sum(counts.values()), 0
    for name, n in reversed(counts.items()):
        fits = n_test < args.num_test_frames and n_test + n <= N // 2
        if not (films[name].parent.name == "test" if "returns" in arrays else fits):
            break
        n_test += n
    n_test = n_test or min(args.num_test_frames, N // 2)  # no whole film in half of the frames: a film's end
    arrays["first"][N - n_test : N - n_test + 1] = True
    splits, in_split = {"train": slice(0, N - n_test), "test": slice(N - n_test, N)}, {}
    for split, part in splits.items():
        first = arrays["first"][part]
        windows = (~first[1:-1] & ~first[2:]).sum()
        if windows < 2:
            found = f"{len(first)} of {N} frames, {windows} windows of three successive ones"
            sys.exit(f"error: the {split} split has {found}, expected 2: see --every, --cut-threshold")
        inside = np.diff(np.clip(np.cumsum([0, *counts.values()]), part.start, part.stop)).tolist()
        in_split[split] = {"num_frames": len(first), "films": {k: n for k, n in zip(counts, inside) if n}}

    with open(data_dir / "train" / "frames.npy", "r+b") as f:
        if "split" not in state:  # noted before train's rows go: an interruption in between is harmless
            with open(data_dir / "test" / "frames.npy", "w+b") as g:
                f.seek(HEADER + (N - n_test) * FRAME)
                g.seek(HEADER)
                shutil.copyfileobj(f, g, 256 * FRAME)
                keep_rows(g, n_test)
            write_whole(data_dir / "import.json", json.dumps(state | {"split": N - n_test}))
        keep_rows(f, N - n_test)
    for split, part in splits.items():
        for name, array in arrays.items():
            np.save(data_dir / split / f"{name}.npy", array[part])
    os.sync()  # all is on the disk before meta.json makes it a dataset

    meta = {"format_version": 1, "identity": os.urandom(16).hex(), "env_id": args.env_id, "seed": args.seed}
    meta |= {"num_levels": 0, "start_level": 0, "splits": in_split, "skipped": state["skipped"]}
    if "actions" in arrays:
        meta["num_actions"] = len(action_names) if action_names else int(arrays["actions"].max()) + 1
    meta |= {"action_names": action_names} if action_names else {}
    if "returns" in arrays:
        returns = arrays["returns"][splits["train"]][arrays["first"][splits["train"]]]  # one an episode
        returns = returns[~np.isnan(returns)].astype(float)
        if len(returns) > 1:
            stderr = returns.std(ddof=1) / len(returns) ** 0.5
            score = {"return_mean": returns.mean(), "return_stderr": stderr, "episodes": len(returns)}
            meta["demonstrator"] = score
    write_whole(data_dir / "meta.json", json.dumps(meta | {"args": vars(args)}, indent=2))
    (data_dir / "import.json").unlink()
    labelled, streams = (arrays.get("actions", np.array(-1)) >= 0).sum(), arrays["first"].sum()
    print(f"{data_dir}: {N:,} frames, {labelled:,} labelled, in {streams:,} streams of {len(counts):,} films")
    for name, why in state["skipped"].items():
        print(f"left out: {name} ({why})")


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    if re.search(r"[/:\s]", args.env_id) or not args.env_id.strip("."):
        sys.exit(f"error: --env-id {args.env_id!r} names folders: leave out slashes, colons and white space")
    if min(args.every, args.num_test_frames) < 1 or not args.cut_threshold > 0:
        sys.exit("error: --every and --num-test-frames must be 1 or more, --cut-threshold more than 0")
    films = find_films(args)
    if any(p.suffix == ".npz" for p in films.values()) and (args.crop or args.labels or args.every > 1):
        sys.exit("error: npz files hold labelled 64x64 frames: leave out --crop, --labels and --every")
    labels, action_names = read_labels(args.labels, films) if args.labels else ({}, None)

    data_dir = Path(args.data_dir or f"data/{args.env_id}")
    lock = FileLock(data_dir / ".lock")
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except OSError as e:
        sys.exit(f"error: {data_dir} is another process's, or read-only ({e}): see --data-dir")
    if (data_dir / "meta.json").exists() and not args.overwrite:
        sys.exit(f"error: {data_dir} holds a dataset: add --overwrite to replace it, or see --data-dir")
    flags = {k: v for k, v in vars(args).items() if k not in ("data_dir", "overwrite", "skip_bad")}
    state = {"args": flags, "films": {}, "skipped": {}}
    if (data_dir / "import.json").exists() and not args.overwrite:
        state = json.loads((data_dir / "import.json").read_text())
        changed = {k: v for k, v in state["args"].items() if json.dumps(v) != json.dumps(flags.get(k))}
        in_order = [name for name in films if name not in state["skipped"]][: len(state["films"])]
        if changed or in_order != list(state["films"]):
            began = changed or "other films, or in another order"
            sys.exit(f"error: the import in {data_dir} began with {began}: keep to it, or --overwrite it")
        print(f"going on in {data_dir} after {len(state['films'])} of {len(films)} films")
    try:
        if "split" not in state:
            append_films(films, state, data_dir, args)
        finish(films, state, labels, action_names, data_dir, args)
    except OSError as e:
        sys.exit(f"error: {data_dir} cannot be written ({e}): make room, 12.3 kB a frame, and start it again")
    except KeyboardInterrupt:
        print("\nstopped; the same command, without --overwrite, goes on after the last whole film")
        sys.exit(130)
    where = f" --data-dir {args.data_dir}" if args.data_dir else ""
    print(f"next: python lapo_pretrain.py --env-id {args.env_id}{where}")
