"""Your own videos, or those published with LAPO's paper, as a dataset that the stages read.

VIDEOS is a film or a folder, searched with its subfolders, that holds one kind of
    films                   mp4, webm, gif, mkv, ...: a stream of frames each, but for cuts
    folders of images       png or jpg: a folder is a film, its frames are ordered by the numbers in names
    {train,test}/INT.npz    the paper's: obs (N, 64, 64, 3) uint8; ta, done and rewards (N,)

    python -m tools.import_videos films --env-id my_game
    python -m tools.import_videos films --env-id my_game --every 2 --crop 0 40 640 440 --labels labels.csv
    python -m tools.import_videos expert_data/bossfight --env-id bossfight  # the paper's
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

from collect_expert_data import make_env, play_at_random, score
from lapo_bc import refuse
from tools.loading import write_whole

FILMS = ".mp4 .webm .gif .mkv .mov .avi .m4v .mpg .mpeg .mts .m2ts .ts .wmv .flv .ogv .3gp".split()
KINDS = {"films": FILMS, "images": [".png", ".jpg", ".jpeg"], "npz": [".npz"]}
HEADER = 128  # bytes of frames.npy before its rows
FRAME = 64 * 64 * 3  # bytes of a row
PROCGEN_GAMES = (
    "bigfish bossfight caveflyer chaser climber coinrun dodgeball fruitbot "
    "heist jumper leaper maze miner ninja plunder starpilot"
).split()


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


# ---- What there is ----


def kind_of(path):
    """The kind of videos that a file belongs to, or None."""
    for kind, suffixes in KINDS.items():
        if path.suffix.lower() in suffixes:
            return kind
    return None


def find_films(args):
    """{name: path} of all films in the dataset's order; a film's name is its path in VIDEOS."""
    root = Path(args.videos)
    if root.is_file():
        files = [root]
        root = root.parent
    else:
        files = sorted(root.rglob("*"))
    found = {}  # paths of each kind
    for path in files:
        hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
        kind = kind_of(path)
        if kind and path.is_file() and not hidden:
            found.setdefault(kind, []).append(path)
    if len(found) != 1:
        what = " and ".join(f"{kind} ({paths[0].name})" for kind, paths in found.items())
        refuse(f"{args.videos} holds {what or 'no films, or is not there'}: expected one of {KINDS}")
    kind, paths = found.popitem()
    if kind == "images":
        paths = [path.parent for path in paths]
    films = {path.relative_to(root).as_posix(): path for path in paths}
    if kind == "npz":
        check_npz(films, args.videos)
        order = sorted(films, key=lambda name: place_of_npz(films[name]))
    else:
        order = sorted(films, key=lambda name: place_of_film(name, args.seed))
    return {name: films[name] for name in order}


def check_npz(films, videos):
    """Refuses npz files that lie otherwise than the paper's."""
    splits = {path.parent.name for path in films.values()}
    if splits != {"train", "test"} or not all(path.stem.isdecimal() for path in films.values()):
        what = ", ".join(list(films)[:3])
        refuse(f"{videos} holds {what} ...: expected train/INT.npz and test/INT.npz alone")


def place_of_npz(path):
    return path.parent.name == "test", path.parent, int(path.stem)


def place_of_film(name, seed):
    """Shuffles by hashes: a film more or less does not move the others."""
    return hashlib.blake2b(f"{seed} {name}".encode()).digest()


def read_rows(path, films):
    """{film: {frame: action}} of a CSV file, actions as text. Raises ValueError, KeyError or OSError."""
    labels = {}
    with open(path, newline="", encoding="utf-8-sig") as f:
        reader = csv.DictReader(f, skipinitialspace=True, restval="")
        for row in reader:
            video = Path(row["video"].strip()).as_posix()
            frame = row["frame"].strip()
            action = row["action"].strip()
            if video not in films or not frame.isdecimal():
                raise ValueError(f"line {reader.line_num}: frame {frame!r} of {video!r}")
            labels.setdefault(video, {})[int(frame)] = action
    return labels


def index_actions(labels):
    """{text: index} of the actions in labels, and their names, None where they are numbers."""
    actions = sorted({action for frames in labels.values() for action in frames.values()})
    names = None
    if any(re.fullmatch(r"[-+.\d]*", action) for action in actions):
        index = {action: int(action) for action in actions}
    else:
        names = actions
        index = {action: i for i, action in enumerate(actions)}
    if not index or min(index.values()) < 0 or max(index.values()) > 126:
        raise ValueError(f"{len(index)} actions {', '.join(actions[:5])} ...")
    return index, names


def read_labels(path, films):
    """{film: {frame: action}} of a CSV file, and the names of the actions, None where they are numbers."""
    try:
        labels = read_rows(path, films)
        index, names = index_actions(labels)
    except (OSError, ValueError, KeyError, csv.Error) as e:
        what = "columns video (a path in VIDEOS), frame (from 0) and action (all 0 to 126, or all names)"
        refuse(f"--labels {path} is unusable ({e}): expected {what}")
    for frames in labels.values():
        for t, action in frames.items():
            frames[t] = index[action]
    return labels, names


# ---- Reading films ----


def open_npz(path):
    """Of an npz the file obs.npy, at its first row, and ta, done and rewards (N,)."""
    z = zipfile.ZipFile(path)
    ta = np.lib.format.read_array(z.open("ta.npy"))
    done = np.lib.format.read_array(z.open("done.npy"))
    rewards = np.lib.format.read_array(z.open("rewards.npy"))
    f = z.open("obs.npy")
    np.lib.format.read_magic(f)
    shape, _, dtype = np.lib.format.read_array_header_1_0(f)
    N = len(ta)
    shapes = [shape, ta.shape, done.shape, rewards.shape]
    if shapes != [(N, 64, 64, 3), (N,), (N,), (N,)] or dtype != np.uint8:
        raise ValueError(f"obs {dtype}, ta, done, rewards are {shapes}, not (N, 64, 64, 3) uint8 and (N,)")
    if N and not 0 <= ta.min() <= ta.max() <= 126:
        raise ValueError(f"ta is {ta.min()} to {ta.max()}, not actions from 0 to 126")
    return f, ta, done.astype(bool), rewards


class Shrinker:
    """An av.VideoFrame of any size as it is shown, cropped, averaged by area -> (64, 64, 3) uint8."""

    def __init__(self, args):
        self.args = args
        self.to_rgb = VideoReformatter()  # a film keeps its tables: up to twice as fast
        self.to_small = VideoReformatter()

    def __call__(self, frame):
        if frame.rotation or self.args.crop:
            frame = self.turn_and_crop(frame)
        size = self.args.size
        small = self.to_small.reformat(frame, size, size, "rgb24", interpolation="AREA", threads=1)
        return small.to_ndarray()

    def turn_and_crop(self, frame):
        x = self.to_rgb.reformat(frame, format="rgb24", threads=1).to_ndarray()
        x = np.rot90(x, frame.rotation // 90)  # (H, W, 3); phones note it in degrees counterclockwise
        if self.args.crop:
            left, top, width, height = self.args.crop
            H, W, _ = x.shape
            if not (0 <= left < left + width <= W and 0 <= top < top + height <= H):
                raise ValueError(f"--crop {self.args.crop} is not inside its {W} x {H} pixels")
            x = x[top : top + height, left : left + width]
        return av.VideoFrame.from_ndarray(np.ascontiguousarray(x), format="rgb24")


def read_npz(f, N):
    for _ in range(N):
        yield np.frombuffer(f.read(FRAME), dtype=np.uint8).reshape(64, 64, 3)


def read_images(files):
    for path in files:
        image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        yield av.VideoFrame.from_ndarray(np.asarray(image))


def by_number(path):
    """Sorts 2.png before 10.png."""
    return re.sub(r"\d+", lambda number: number[0].zfill(20), path.name)


def open_film(path, args):
    """About how many frames a film gives, and an iterator over them: every Nth, (64, 64, 3) uint8."""
    if path.suffix == ".npz":
        f, ta, _, _ = open_npz(path)
        return len(ta), read_npz(f, len(ta))
    if path.is_dir():
        files = [p for p in path.iterdir() if kind_of(p) == "images" and not p.name.startswith(".")]
        files.sort(key=by_number)
        N = len(files)
        frames = read_images(files[:: args.every])
    else:
        film = av.open(str(path))
        stream = film.streams.best("video")
        if stream is None:
            raise ValueError("no video in it")
        stream.thread_type = "AUTO"  # decodes on all cores
        N = stream.frames
        if not N:
            N = (film.duration or 0) / av.time_base * (stream.average_rate or 0)
        frames = islice(film.decode(stream), 0, None, args.every)
    return int(N) // args.every, map(Shrinker(args), frames)


# ---- Writing the dataset ----


def keep_rows(f, N):
    """Makes f, an open frames.npy, hold its first N rows and no more, on the disk. Its header fits all N."""
    f.seek(0)
    header = {"descr": "|u1", "fortran_order": False, "shape": (N, 64, 64, 3)}
    np.lib.format.write_array_header_1_0(f, header)
    assert f.tell() == HEADER
    f.truncate(HEADER + N * FRAME)
    f.flush()
    os.fsync(f.fileno())
    f.seek(0, os.SEEK_END)


def find_begins(path, jumps, args):
    """Frames of a film at which a stream begins; jumps (N,) say how much each differs from the one before."""
    if path.suffix != ".npz":
        if args.cut_threshold >= 1:
            return []
        return np.flatnonzero(jumps >= args.cut_threshold)
    # some say that done[t] ends an episode with step t, some that it begins one with frame t; the
    # pictures decide: over these rows they jump more from t to t + 1, or from t - 1 to t
    _, _, done, _ = open_npz(path)
    inside = done[1:-1]
    after = jumps[2:][inside].sum()
    before = jumps[1:-1][inside].sum()
    begins = np.flatnonzero(done)
    if after > before:
        begins = begins + 1
    return begins


def append_film(f, path, bar, args):
    """Appends a film's frames to f. Returns their number, and the indices of those that begin a stream."""
    _, frames = open_film(path, args)
    last = []  # the frame before the chunk
    jumps = []
    while chunk := list(islice(frames, 256)):
        x = np.stack([*(last or chunk[:1]), *chunk])  # (1 + n, 64, 64, 3)
        f.write(x[1:])
        before = x[:-1]
        after = x[1:]
        change = np.maximum(before, after) - np.minimum(before, after)
        jumps.append(change.mean((1, 2, 3), dtype=np.float32) / 255)
        last = chunk[-1:]
        bar.update(len(chunk))
    jumps = np.concatenate(jumps)  # (N,), 0 to 1
    N = len(jumps)
    begins = [int(t) for t in find_begins(path, jumps, args) if 0 < t < N]
    return {"num_frames": N, "first": [0, *begins]}


def leave_out(name, e, films, state, args):
    """Notes a film that cannot be read; without --skip-bad the import ends there."""
    if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        raise e  # it is the dataset that cannot be written
    why = str(e) or f"no frames, {type(e).__name__}"
    state["skipped"][name] = " ".join(why.split())
    if not args.skip_bad:
        why = state["skipped"][name]
        # as the exit status, which is printed once the bars are gone
        sys.exit(f"error: {films[name]} is unusable ({why}): mend it, remove it, or add --skip-bad")


def look_at_films(films, state, args):
    """About how many frames each film has that state does not know: {name: N}. All must open."""
    estimates = {}
    todo = [name for name in films if name not in state["films"] and name not in state["skipped"]]
    for name in tqdm(todo, "look at the films", unit="film", delay=2, leave=False):
        try:
            N, frames = open_film(films[name], args)
            next(frames)
            estimates[name] = N
        except Exception as e:  # FFmpeg, Pillow and zlib raise many kinds
            leave_out(name, e, films, state, args)
    return estimates


def append_films(films, state, data_dir, args):
    """Appends the films that state does not know to train/frames.npy, and notes them, after a look at all."""
    estimates = look_at_films(films, state, args)
    if not state["films"]:
        old = [data_dir / "meta.json", *data_dir.glob("train/*.npy"), *data_dir.glob("test/*.npy")]
        for path in old:
            path.unlink(missing_ok=True)
        for split in ("train", "test"):
            (data_dir / split).mkdir(exist_ok=True)
    write_whole(data_dir / "import.json", json.dumps(state))
    known = sum(film["num_frames"] for film in state["films"].values())
    bar = tqdm(total=known + sum(estimates.values()), initial=known, unit="frame")
    mode = "r+b" if state["films"] else "w+b"
    with bar, open(data_dir / "train" / "frames.npy", mode) as f:
        keep_rows(f, known)
        for name in estimates:
            bar.set_postfix_str(name)
            try:
                state["films"][name] = append_film(f, films[name], bar, args)
                known += state["films"][name]["num_frames"]
            except Exception as e:
                leave_out(name, e, films, state, args)
            keep_rows(f, known)
            write_whole(data_dir / "import.json", json.dumps(state))


def actions_of(name, n, labels, args):
    """The actions (n,) of a film's frames, -1: no label."""
    actions = np.full(n, -1, dtype=np.int8)
    for t, action in labels.get(name, {}).items():
        if t // args.every >= n:
            found = f"frame {t} of {name}, which ends before frame {n * args.every}"
            refuse(f"--labels {args.labels} has {found}: expected frames counted from 0")
        if t % args.every == 0:
            actions[t // args.every] = action
    return actions


def arrays_of(films, state, labels, args):
    """The arrays beside the frames, {name: (N,)}, of all films one after another."""
    arrays = {"first": [], "actions": [], "rewards": [], "returns": []}
    for name, film in state["films"].items():
        n = film["num_frames"]
        first = np.zeros(n, dtype=bool)
        first[film["first"]] = True
        arrays["first"].append(first)
        if films[name].suffix != ".npz":
            arrays["actions"].append(actions_of(name, n, labels, args))
            continue
        _, ta, _, rewards = open_npz(films[name])
        returns = np.full(n, np.nan, dtype=np.float32)
        for a, b in zip(film["first"][1:], film["first"][2:]):  # not of the first and last: cut off
            returns[a:b] = rewards[a:b].sum()
        arrays["actions"].append(ta.astype(np.int8))
        arrays["rewards"].append(rewards.astype(np.float32))
        arrays["returns"].append(returns)
    if not labels and not arrays["rewards"]:
        arrays["actions"] = []
    return {name: np.concatenate(parts) for name, parts in arrays.items() if parts}


def count_test_frames(films, counts, args):
    """How many of the last frames are the test split, of films {name: frames}: those of whole films."""
    N = sum(counts.values())
    n_test = 0
    for name in reversed(counts):
        if films[name].suffix == ".npz":  # the paper's own split
            belongs = films[name].parent.name == "test"
        else:
            belongs = n_test < args.num_test_frames and n_test + counts[name] <= N // 2
        if not belongs:
            break
        n_test += counts[name]
    return n_test or min(args.num_test_frames, N // 2)  # no whole film in half of the frames: a film's end


def describe_split(part, counts, first):
    """Of a split, the rows `part` of all: frames, and those of each film; refuses one without windows."""
    own = first[part]
    windows = (~own[1:-1] & ~own[2:]).sum()
    if windows < 2:
        split = "test" if part.start else "train"
        found = f"{part.stop - part.start} of {len(first)} frames, {windows} windows of three successive ones"
        refuse(f"the {split} split has {found}, expected 2: see --every, --cut-threshold")
    ends = np.clip(np.cumsum([0, *counts.values()]), part.start, part.stop)
    inside = {name: int(n) for name, n in zip(counts, np.diff(ends)) if n}
    return {"num_frames": part.stop - part.start, "films": inside}


def move_test_frames(state, data_dir, n_train, n_test):
    """Cuts the test split off train/frames.npy."""
    with open(data_dir / "train" / "frames.npy", "r+b") as f:
        if "split" not in state:  # noted before train's rows go: an interruption in between is harmless
            with open(data_dir / "test" / "frames.npy", "w+b") as g:
                f.seek(HEADER + n_train * FRAME)
                g.seek(HEADER)
                shutil.copyfileobj(f, g, 256 * FRAME)
                keep_rows(g, n_test)
            write_whole(data_dir / "import.json", json.dumps({**state, "split": n_train}))
        keep_rows(f, n_train)


def score_episodes(first, returns):
    """The demonstrator's score in meta.json, of returns (N,) that stand at each frame of an episode."""
    of_episodes = returns[first].astype(float)
    return score(of_episodes[~np.isnan(of_episodes)])


def score_random_play(env_id):
    """Random play's score in meta.json, on all levels of one of Procgen's games; later scores call it 0."""
    env = make_env(env_id, num_envs=64, num_levels=0, start_level=0, seed=1)
    returns = play_at_random(env, 200, np.random.default_rng(1))
    env.close()
    return {**score(returns), "returns": returns.tolist()}


def finish(films, state, labels, action_names, data_dir, args):
    """Cuts the test split off train/frames.npy, and writes the arrays beside the frames, then meta.json."""
    arrays = arrays_of(films, state, labels, args)
    first = arrays["first"]
    counts = {name: film["num_frames"] for name, film in state["films"].items()}
    n_test = count_test_frames(films, counts, args)
    n_train = len(first) - n_test
    first[n_train : n_train + 1] = True
    splits = {"train": slice(0, n_train), "test": slice(n_train, len(first))}
    meta = {"format_version": 1, "env_id": args.env_id, "seed": args.seed, "num_levels": 0, "start_level": 0}
    meta["splits"] = {split: describe_split(part, counts, first) for split, part in splits.items()}
    meta["skipped"] = state["skipped"]
    num_labelled = 0
    if "actions" in arrays:
        num_labelled = (arrays["actions"] >= 0).sum()
        meta["num_actions"] = int(arrays["actions"].max()) + 1
    if action_names:
        meta["num_actions"] = len(action_names)
        meta["action_names"] = action_names
    if "returns" in arrays:
        meta["demonstrator"] = score_episodes(first[:n_train], arrays["returns"][:n_train])
        if args.env_id in PROCGEN_GAMES:
            meta["random"] = score_random_play(args.env_id)

    move_test_frames(state, data_dir, n_train, n_test)
    for split, part in splits.items():
        for name, array in arrays.items():
            np.save(data_dir / split / f"{name}.npy", array[part])
    os.sync()  # all is on the disk before meta.json makes it a dataset
    write_whole(data_dir / "meta.json", json.dumps({**meta, "args": vars(args)}, indent=2))
    (data_dir / "import.json").unlink()
    streams = f"{first.sum():,} streams of {len(counts):,} films"
    print(f"{data_dir}: {len(first):,} frames, {num_labelled:,} labelled, in {streams}")
    for name, why in state["skipped"].items():
        print(f"left out: {name} ({why})")


def open_state(films, data_dir, args):
    """What import.json notes of an interrupted import, or an empty note; refuses other flags and films."""
    path = data_dir / "import.json"
    flags = {**vars(args)}
    for name in ("data_dir", "overwrite", "skip_bad"):
        del flags[name]
    flags = json.loads(json.dumps(flags))  # as they are read
    if not path.exists() or args.overwrite:
        return {"args": flags, "films": {}, "skipped": {}}
    state = json.loads(path.read_text())
    began = {name: value for name, value in state["args"].items() if value != flags.get(name)}
    in_order = [name for name in films if name not in state["skipped"]]
    if in_order[: len(state["films"])] != list(state["films"]):
        began = began or "other films, or in another order"
    if began:
        refuse(f"the import in {data_dir} began with {began}: keep to it, or --overwrite it")
    print(f"going on in {data_dir} after {len(state['films'])} of {len(films)} films")
    return state


def main(args):
    if re.search(r"[/:\s]", args.env_id) or not args.env_id.strip("."):
        refuse(f"--env-id {args.env_id!r} names folders: leave out slashes, colons and white space")
    if min(args.every, args.num_test_frames) < 1 or not args.cut_threshold > 0:
        refuse("--every and --num-test-frames must be 1 or more, --cut-threshold more than 0")
    films = find_films(args)
    of_paper = any(path.suffix == ".npz" for path in films.values())
    if of_paper and (args.crop or args.labels or args.every > 1):
        refuse("npz files hold labelled 64x64 frames: leave out --crop, --labels and --every")
    labels = {}
    action_names = None
    if args.labels:
        labels, action_names = read_labels(args.labels, films)

    data_dir = Path(args.data_dir or f"data/{args.env_id}")
    lock = FileLock(data_dir / ".lock")
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except OSError as e:
        refuse(f"{data_dir} is another process's, or read-only ({e}): see --data-dir")
    if (data_dir / "meta.json").exists() and not args.overwrite:
        refuse(f"{data_dir} holds a dataset: add --overwrite to replace it, or see --data-dir")
    state = open_state(films, data_dir, args)
    try:
        if "split" not in state:
            append_films(films, state, data_dir, args)
        finish(films, state, labels, action_names, data_dir, args)
    except OSError as e:
        refuse(f"{data_dir} cannot be written ({e}): make room, 12.3 kB a frame, and start it again")
    except KeyboardInterrupt:
        print("\nstopped; the same command, without --overwrite, goes on after the last whole film")
        sys.exit(130)
    where = f" --data-dir {args.data_dir}" if args.data_dir else ""
    print(f"next: python lapo_pretrain.py --env-id {args.env_id}{where}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
