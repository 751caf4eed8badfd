"""The better half of a dataset's episodes, without the frames on which nothing moves: videos of success.

    python benchmark/curate.py runs/small/data/maze-all runs/small/data/maze

A demonstrator that knows only some of its levels stands before walls in the others, up to the time limit, and
many frames show that. Keeps the episodes whose return is at least the median of the training split, of these
the frames whose next one differs, 65,536 and 8,192 at most. returns.npy stays what the episodes got in whole.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

LIMITS = {"train": 65536, "test": 8192}  # frames of the small scale
ARRAYS = ("frames", "first", "actions", "rewards", "returns")


@dataclass
class Args:
    source: tyro.conf.Positional[Path]  # a dataset of collect_expert_data.py
    target: tyro.conf.Positional[Path]  # where the new one goes


def keep(frames, first, returns, least):
    """Rows (K,) to keep of frames (N, 64, 64, 3), first and returns (N,): see above."""
    good = np.flatnonzero(returns >= least)
    chosen = []
    for rows in np.array_split(good, 1 + len(first) // 4096):  # 50 MB at a time
        after = np.minimum(rows + 1, len(first) - 1)
        moves = frames[rows] != frames[after]
        moves = moves.any((1, 2, 3))
        last = first[after] | (rows == after)
        chosen.append(rows[moves | last])
    return np.concatenate(chosen)


def begins(rows, first):
    """`first` (K,) of the rows that are kept."""
    episode = np.cumsum(first)[rows]
    changes = episode[1:] != episode[:-1]
    return np.append(True, changes)


def main(args):
    if (args.target / "meta.json").exists():
        sys.exit(f"error: {args.target} holds a dataset: remove it, or name another folder")
    if not (args.source / "meta.json").exists():
        sys.exit(f"error: {args.source} holds no dataset: collect_expert_data.py makes one")
    meta = json.loads((args.source / "meta.json").read_text())
    train = args.source / "train"
    first = np.load(train / "first.npy")
    returns = np.load(train / "returns.npy")
    least = float(np.nanmedian(returns[first]))
    for split, limit in LIMITS.items():
        folder = args.source / split
        old = {}
        for name in ARRAYS:
            old[name] = np.load(folder / f"{name}.npy", mmap_mode="r")
        rows = keep(old["frames"], old["first"], old["returns"], least)
        rows = rows[:limit]
        target = args.target / split
        target.mkdir(parents=True, exist_ok=True)
        for name, array in old.items():
            new = array[rows]
            if name == "first":
                new = begins(rows, array)
            np.save(target / f"{name}.npy", new)
        meta["splits"][split]["num_frames"] = len(rows)
        print(f"{split}: {len(rows)} of {len(old['first'])} frames, of episodes with {least:g} or more")
    meta["curated"] = {"source": str(args.source), "least_return": least}
    (args.target / "meta.json").write_text(json.dumps(meta, indent=2))  # last: it makes a dataset


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
