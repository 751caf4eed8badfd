"""The better half of a dataset's episodes, without the frames on which nothing moves: videos of success.

    python benchmark/curate.py runs/small/data/maze-all runs/small/data/maze

A demonstrator that knows only some of its levels stands before walls in the others, up to the time limit, and
many frames show that. Keeps the episodes whose return is at least the median of the training split, of these
the frames whose next one differs, 65,536 and 8,192 at most. returns.npy stays what the episodes got in whole.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

LIMITS = {"train": 65536, "test": 8192}  # frames of the small scale


@dataclass
class Args:
    source: tyro.conf.Positional[Path]  # a dataset of collect_expert_data.py
    target: tyro.conf.Positional[Path]  # where the new one goes


def keep(frames, first, returns, least):
    """Rows (K,) to keep of frames (N, 64, 64, 3), first and returns (N,): see above."""
    kept = []
    for part in np.array_split(np.flatnonzero(returns >= least), 1 + len(first) // 4096):  # 50 MB at a time
        after = np.minimum(part + 1, len(first) - 1)
        moves = (frames[part] != frames[after]).any((1, 2, 3))
        kept.append(part[moves | first[after] | (part == after)])
    return np.concatenate(kept)


def begins(rows, first):
    """`first` (K,) of the rows that are kept."""
    episode = np.cumsum(first)[rows]
    return np.append(True, episode[1:] != episode[:-1])


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    if (args.target / "meta.json").exists():
        sys.exit(f"error: {args.target} holds a dataset: remove it, or name another folder")
    if not (args.source / "meta.json").exists():
        sys.exit(f"error: {args.source} holds no dataset: collect_expert_data.py makes one")
    meta = json.loads((args.source / "meta.json").read_text())
    first, returns = (np.load(args.source / "train" / f"{name}.npy") for name in ("first", "returns"))
    least = float(np.nanmedian(returns[first]))
    for split, limit in LIMITS.items():
        names = "frames", "first", "actions", "rewards", "returns"
        old = {name: np.load(args.source / split / f"{name}.npy", mmap_mode="r") for name in names}
        rows = keep(old["frames"], old["first"], old["returns"], least)[:limit]
        new = {name: old[name][rows] for name in names}
        new["first"] = begins(rows, old["first"])
        (args.target / split).mkdir(parents=True, exist_ok=True)
        for name, array in new.items():
            np.save(args.target / split / f"{name}.npy", array)
        meta["splits"][split]["num_frames"] = len(rows)
        print(f"{split}: {len(rows)} of {len(old['first'])} frames, of episodes with {least:g} or more")
    meta |= {"identity": os.urandom(16).hex(), "curated": {"source": meta["identity"], "least_return": least}}
    (args.target / "meta.json").write_text(json.dumps(meta, indent=2))  # last: it makes a dataset
