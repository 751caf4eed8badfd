"""Your own videos, or those published with LAPO's paper, as a dataset that the stages read.

VIDEOS is a film or a folder, searched with its subfolders. Of these kinds it reads one
    films      mp4, webm, gif, mkv, ...: a stream of frames each, but for cuts
    images     png, jpg, webp, ...: a folder is a film, its frames are ordered by the numbers in names
    npz        the paper's {train,test}/INT.npz: obs (N, 64, 64, 3) uint8; ta, done and rewards (N,)
    parquet    {train,test}-*.parquet, as Hugging Face has them: observation, action, reward, done, truncated

    python -m tools.import_videos films --env-id my_game
    python -m tools.import_videos films --env-id my_game --fps 10 --crop 0 40 640 440 --labels labels.csv
    python -m tools.import_videos expert_data/bossfight --env-id bossfight  # the paper's
Writes data/ENV_ID as collect_expert_data.py does: frames and first; frame, the number of each in its film;
with --labels actions, -1 where a frame has none; of npz and parquet files also rewards and returns. What was
interrupted goes on with the same command, film by film: import.jsonl notes which are in frames.npy.
"""

import csv
import errno
import hashlib
import json
import os
import re
import shutil
import sys
from collections import defaultdict
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal
from unicodedata import normalize

import numpy as np
import tyro
from filelock import FileLock
from tqdm import tqdm

from collect_expert_data import make_env, play_at_random, score
from lapo_bc import BAR, refuse
from tools.loading import write_whole
from tools.reading_videos import FRAME, by_number, kind_of, open_film, split_of, steps_of

KINDS = ["films", "images", "npz", "parquet"]
LABELLED = ["npz", "parquet"]
NOTES = "import.jsonl"
HEADER = 128  # bytes of frames.npy before its rows
PROCGEN_GAMES = (
    "bigfish bossfight caveflyer chaser climber coinrun dodgeball fruitbot "
    "heist jumper leaper maze miner ninja plunder starpilot"
).split()


@dataclass
class Args:
    # what
    videos: tyro.conf.Positional[str]  # a film, or a folder of films, of folders of images or of npz files
    kind: Literal["films", "images", "npz", "parquet"] | None = None  # default: what VIDEOS holds most of
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
    fps: float | None = None  # or keep what is on the screen so many times a second
    cut_threshold: float = 0.25  # mean change of a frame that begins a new stream, of 1; from 1 on, none does
    num_test_frames: int = 4096  # size of the test split: the last films that have so many frames


# ---- What there is ----


def list_files(root, left_out):
    """All files in root and its folders, also linked ones, each folder once; left_out gets the others."""
    files = []
    folders = [root]
    links = []  # come last: a film is named by the folder in which it lies
    seen = set()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        if folder.resolve() in seen:
            left_out["links to folders that are read already"].append(folder.name)
            continue
        seen.add(folder.resolve())
        try:
            paths = sorted(folder.iterdir())
        except OSError:
            left_out["folders that cannot be opened"].append(folder.name)
            continue
        for path in paths:
            if path.name.startswith("."):
                left_out["hidden"].append(path.name)
            elif path.is_dir():
                (links if path.is_symlink() else folders).append(path)
            elif path.is_file():
                files.append(path)
            else:
                left_out["broken links"].append(path.name)
    return files


def choose_kind(found):
    """The kind in {kind: files} that has most bytes; images beside films are posters unless they are many."""
    sizes = {kind: sum(path.stat().st_size for path in paths) for kind, paths in found.items()}
    largest = max(sizes, key=sizes.get)
    if largest in ("films", "images") and {"films", "images"} <= found.keys():
        return "images" if len(found["images"]) > 100 * len(found["films"]) else "films"
    return largest


def find_films(args):
    """The kind of videos, {name: path} in the dataset's order, and what is left out: {what: [names]}.

    A film's name is its path in VIDEOS.
    """
    root = Path(args.videos)
    left_out = defaultdict(list)
    if root.is_dir():
        files = list_files(root, left_out)
    else:
        files = [root] if root.is_file() else []
        root = root.parent
    found = defaultdict(list)
    for path in files:
        kind = kind_of(path)
        if kind:
            found[kind].append(path)
        else:
            left_out["of other kinds"].append(path.name)
    kind = args.kind or (choose_kind(found) if found else None)
    if kind not in found:
        what = " and ".join(found) or "nothing that can be read, or is not there"
        refuse(f"{args.videos} holds {what}: expected {kind or ', '.join(KINDS)}")
    paths = found.pop(kind)
    for other in found:
        name = f"{other}, which --kind {other} reads"
        left_out[name] = [path.name for path in found[other]]
    if kind == "images":
        if Path(args.videos).is_file():
            refuse(f"{args.videos} is a single image: give the folder that holds the frames of a film")
        paths = [path.parent for path in paths]
    if kind in LABELLED:
        paths = choose_splits(kind, paths, left_out, args.videos)
    films = {path.relative_to(root).as_posix(): path for path in paths}
    if kind in LABELLED:
        order = sorted(films, key=lambda name: place_of_file(films[name]))
    else:
        order = sorted(films, key=lambda name: place_of_film(name, args.seed))
    return kind, {name: films[name] for name in order}, left_out


def choose_splits(kind, paths, left_out, videos):
    """The npz or parquet files of the train and the test split; refuses those of several games."""
    splits = {split_of(path) for path in paths}
    if kind == "npz" and splits != {"train", "test"}:
        what = ", ".join(path.name for path in paths[:3])
        refuse(f"{videos} holds {what} ...: expected train/INT.npz and test/INT.npz alone")
    if splits != {None}:
        others = [path for path in paths if not split_of(path)]
        paths = [path for path in paths if split_of(path)]
        if others:
            left_out[f"{kind} files that are not named train or test"] = [path.name for path in others]
    games = set()
    for path in paths:
        folder = path.parent
        if folder.name in ("train", "test"):
            folder = folder.parent
        games.add(folder.as_posix())
    if len(games) > 1:
        what = ", ".join(sorted(games)[:3])
        refuse(f"{videos} holds {kind} files of {len(games)} games ({what} ...): give the folder of one")
    return paths


def place_of_file(path):
    return split_of(path) == "test", path.parent, by_number(path)


def place_of_film(name, seed):
    """Shuffles by hashes: a film more or less does not move the others."""
    name = normalize("NFC", name)  # file systems compose accents in two ways
    return hashlib.blake2b(f"{seed} {name}".encode(errors="surrogateescape")).digest()


def read_rows(path, films):
    """{film: {frame: action}} of a CSV file, actions as text. Raises ValueError, KeyError or OSError."""
    labels = {}
    names = {normalize("NFC", name): name for name in films}
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as f:
        reader = csv.DictReader(f, skipinitialspace=True, restval="")
        for row in reader:
            video = Path(row["video"].strip()).as_posix()
            if video not in films:
                video = names.get(normalize("NFC", video), video)
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


def append_film(f, path, bar, args):
    """Appends a film's frames to f. Returns what the dataset has to know of it, see read_notes."""
    notes = {}
    _, frames = open_film(path, args, notes)
    last = []  # the picture before the chunk
    jumps = []
    begins = []
    numbers = []
    while chunk := list(islice(frames, 256)):
        pictures = [frame.picture for frame in chunk]
        x = np.stack([*(last or pictures[:1]), *pictures])  # (1 + n, 64, 64, 3)
        f.write(x[1:])
        before = x[:-1]
        after = x[1:]
        change = np.maximum(before, after) - np.minimum(before, after)
        jumps.append(change.mean((1, 2, 3), dtype=np.float32) / 255)
        begins += [frame.begins for frame in chunk]
        numbers += [frame.number for frame in chunk]
        last = pictures[-1:]
        bar.update(len(chunk))
    jumps = np.concatenate(jumps)  # (N,), 0 to 1: how much each frame differs from the one before
    film = {"num_frames": len(jumps), **notes}
    steps = steps_of(path)
    if not steps:
        film["numbers"] = numbers  # others have one a row
    if steps and steps.done is not None:
        # some say that done[t] ends an episode with frame t, some that it begins one with frame t
        inside = steps.done[1:-1]
        film["jump_after"] = float(jumps[2:][inside].sum())
        film["jump_before"] = float(jumps[1:-1][inside].sum())
        return film
    if args.cut_threshold < 1:
        begins = begins | (jumps >= args.cut_threshold)
    film["first"] = [0, *(int(t) for t in np.flatnonzero(begins) if t)]
    return film


def leave_out(name, e, films, state, args):
    """Notes a film that cannot be read; without --skip-bad the import ends there."""
    if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        raise e  # it is the dataset that cannot be written
    why = str(e) or f"no frames, {type(e).__name__}"
    state["skipped"][name] = " ".join(why.split())
    if not args.skip_bad:
        why = state["skipped"][name]
        # as the exit status, which is printed once the bars are gone
        path = printable(films[name])
        sys.exit(f"error: {path} is unusable ({printable(why)}): mend it, remove it, or add --skip-bad")


def look_at_films(films, state, args):
    """About how many frames each film has that state does not know: {name: N}. All must open."""
    estimates = {}
    notes = {}
    todo = [name for name in films if name not in state["films"] and name not in state["skipped"]]
    for name in tqdm(todo, "look at the films", unit="film", delay=2, leave=False, **BAR):
        try:
            N, frames = open_film(films[name], args, notes)
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
    write_notes(state, data_dir)
    known = sum(film["num_frames"] for film in state["films"].values())
    bar = tqdm(total=known + sum(estimates.values()), initial=known, unit="frame", **BAR)
    mode = "r+b" if state["films"] else "w+b"
    with bar, open(data_dir / "train" / "frames.npy", mode) as f:
        keep_rows(f, known)
        for name in estimates:
            bar.set_postfix_str(printable(name))
            try:
                state["films"][name] = append_film(f, films[name], bar, args)
                known += state["films"][name]["num_frames"]
                note = {"film": name, **state["films"][name]}
            except Exception as e:
                leave_out(name, e, films, state, args)
                note = {"skipped": name, "why": state["skipped"][name]}
            keep_rows(f, known)
            append_note(note, data_dir)


def actions_of(name, film, labels, args):
    """The actions (n,) of a film's frames, -1: no label."""
    actions = np.full(film["read"], -1, dtype=np.int8)  # of all that it has
    for t, action in labels.get(name, {}).items():
        if t >= len(actions):
            found = f"frame {t} of {name}, which has {len(actions)} frames"
            refuse(f"--labels {args.labels} has {found}: expected frames counted from 0")
        actions[t] = action
    return actions[film["numbers"]]


def begins_of(done, done_is_first):
    """Frames that begin an episode, of done (N,)."""
    begins = np.flatnonzero(done)
    if not done_is_first:
        begins = begins + 1
    return [0, *(int(t) for t in begins if 0 < t < len(done))]


def arrays_of(films, state, labels, args):
    """The arrays beside the frames, {name: (N,)}, of all films one after another."""
    arrays = {"first": [], "frame": [], "actions": [], "rewards": [], "returns": []}
    with_done = [film for film in state["films"].values() if "first" not in film]
    # the pictures decide what done means: whether they jump more from t - 1 to t, or from t to t + 1
    jump_before = sum(film["jump_before"] for film in with_done)
    done_is_first = jump_before > sum(film["jump_after"] for film in with_done)
    for name, film in state["films"].items():
        n = film["num_frames"]
        steps = steps_of(films[name])
        begins = film["first"] if "first" in film else begins_of(steps.done, done_is_first)
        first = np.zeros(n, dtype=bool)
        first[begins] = True
        arrays["first"].append(first)
        arrays["frame"].append(np.array(film.get("numbers", range(n)), dtype=np.int32))
        if labels:
            arrays["actions"].append(actions_of(name, film, labels, args))
        if steps:
            returns = np.full(n, np.nan, dtype=np.float32)
            if steps.done is not None:
                for a, b in zip(begins[1:], begins[2:]):  # not of the first and last: cut off
                    returns[a:b] = steps.rewards[a:b].sum()
            arrays["actions"].append(steps.actions)
            arrays["rewards"].append(steps.rewards)
            arrays["returns"].append(returns)
    arrays = {name: np.concatenate(parts) for name, parts in arrays.items() if parts}
    if not labels and "actions" in arrays and arrays["actions"].max() < 0:
        del arrays["actions"]
    if "rewards" in arrays and np.isnan(arrays["rewards"]).all():
        del arrays["rewards"], arrays["returns"]
    return arrays


def count_test_frames(films, counts, args):
    """How many of the last frames are the test split, of films {name: frames}: those of whole films."""
    N = sum(counts.values())
    n_test = 0
    splits = {split_of(path) for path in films.values()}
    for name in reversed(counts):
        if splits == {"train", "test"}:  # of npz and parquet files
            belongs = split_of(films[name]) == "test"
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
            append_note({"split": n_train}, data_dir)
        keep_rows(f, n_train)


def score_episodes(first, returns):
    """The demonstrator's score in meta.json, of returns (N,) that stand at each frame of an episode."""
    of_episodes = returns[first].astype(float)
    return score(of_episodes[~np.isnan(of_episodes)])


def score_random_play(env_id):
    """Random play's score in meta.json, on all levels of one of Procgen's games; later scores call it 0."""
    try:
        env = make_env(env_id, num_envs=64, num_levels=0, start_level=0, seed=1)
    except ImportError as e:
        print(f"random play is not scored, so that nobody can compare scores with it: {e}")
        return {}
    returns = play_at_random(env, 200, np.random.default_rng(1))
    env.close()
    return {**score(returns), "returns": returns.tolist()}


def finish(kind, films, left_out, state, labels, action_names, data_dir, args):
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
        if args.env_id in PROCGEN_GAMES:
            meta["num_actions"] = 15
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
    (data_dir / NOTES).unlink()
    streams = f"{first.sum():,} streams of {len(counts):,} films"
    print(f"{data_dir}: {len(first):,} frames, {num_labelled:,} labelled, in {streams} (--kind {kind})")
    print_losses(state, left_out)


def print_losses(state, left_out):
    """What the dataset does not hold of the films, and what else was left out, why and how many."""
    causes = {
        "lost": "of its frames cannot be decoded: a new stream begins after them",
        "broken": "place at which its file cannot be read any further: what follows is left out",
        "missing": "numbers are missing in the names of its images: a new stream begins after them",
        "repeated": "frames are there again, as its own rate is lower than --fps",
    }
    for name, film in state["films"].items():
        for cause, sentence in causes.items():
            if film[cause]:
                print(f"{printable(name)}: {film[cause]:,} {sentence}")
    for name, why in state["skipped"].items():
        print(f"left out: {printable(name)} ({printable(why)})")
    for what, names in left_out.items():
        some = ", ".join(printable(name) for name in names[:3])
        more = ", ..." if len(names) > 3 else ""
        print(f"left out: {len(names):,} {what} ({some}{more})")


def printable(name):
    """A file's name, whose bytes need not be UTF-8."""
    return os.fsencode(name).decode(errors="backslashreplace")


# ---- Notes of an import that is under way ----


def append_note(note, data_dir):
    """A line more in import.jsonl, on the disk."""
    with open(data_dir / NOTES, "a") as f:
        f.write(json.dumps(note) + "\n")
        f.flush()
        os.fsync(f.fileno())


def write_notes(state, data_dir):
    """import.jsonl anew, of all that state knows."""
    lines = [{"args": state["args"]}]
    lines += [{"film": name, **film} for name, film in state["films"].items()]
    lines += [{"skipped": name, "why": why} for name, why in state["skipped"].items()]
    write_whole(data_dir / NOTES, "".join(json.dumps(line) + "\n" for line in lines))


def read_notes(path):
    """The state of an import, of import.jsonl: a last line that was cut off is none.

    Of each film: num_frames; first, the frames that begin a stream, or with done how much the pictures jump;
    numbers, which of its frames they are; and what open_film notes.
    """
    whole, _, _ = path.read_text().rpartition("\n")
    state = {"films": {}, "skipped": {}}
    for line in whole.splitlines():
        note = json.loads(line)
        if "film" in note:
            state["films"][note.pop("film")] = note
        elif "skipped" in note:
            state["skipped"][note["skipped"]] = note["why"]
        else:
            state.update(note)  # args or split
    return state


def open_state(films, data_dir, args):
    """What import.jsonl notes of an interrupted import, or an empty note; refuses other flags and films."""
    flags = {**vars(args)}
    for name in ("data_dir", "overwrite", "skip_bad"):
        del flags[name]
    flags = json.loads(json.dumps(flags))  # as they are read
    if not (data_dir / NOTES).exists() or args.overwrite:
        return {"args": flags, "films": {}, "skipped": {}}
    state = read_notes(data_dir / NOTES)
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
    if args.fps is not None and (args.every > 1 or not 0 < args.fps < float("inf")):
        refuse(f"--fps {args.fps} --every {args.every}: expected one of both, --fps in frames a second")
    kind, films, left_out = find_films(args)
    if kind in LABELLED and (args.crop or args.labels or args.every > 1):
        refuse(f"{kind} files hold labelled frames: leave out --crop, --labels and --every")
    if kind != "films" and args.fps:
        refuse(f"{kind} have no times: leave out --fps, or take --every")
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
        finish(kind, films, left_out, state, labels, action_names, data_dir, args)
    except OSError as e:
        refuse(f"{data_dir} cannot be written ({e}): make room, 12.3 kB a frame, and start it again")
    except KeyboardInterrupt:
        print("\nstopped; the same command, without --overwrite, goes on after the last whole film")
        sys.exit(130)
    where = f" --data-dir {args.data_dir}" if args.data_dir else ""
    print(f"next: python lapo_pretrain.py --env-id {args.env_id}{where}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
