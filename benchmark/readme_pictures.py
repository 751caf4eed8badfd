"""The documentation's pictures: of a quickstart, and of the report of tools/inspect_latents.py on it.

make pictures    # runs/quickstart/coinrun__1 -> docs/{quickstart.png,latents.png,dreams.gif,agent.gif}
"""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from PIL import Image, ImageSequence

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Args:
    env_id: str = "coinrun"  # the Procgen game
    seed: int = 1  # the seed of the runs
    runs_dir: str = str(ROOT / "runs" / "quickstart" / "coinrun__1")  # where the runs lie
    out: str = str(ROOT / "docs")  # where the pictures go
    film_frames: int = 75  # the agent's film is cut after so many frames (15 a second)


def cut_film(source, target, num_frames):
    """The first frames of a GIF."""
    with Image.open(source) as gif:
        shown = zip(range(num_frames), ImageSequence.Iterator(gif))
        frames = [frame.copy() for _, frame in shown]
    durations = [frame.info["duration"] for frame in frames]
    frames[0].save(target, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def main(args):
    runs = Path(args.runs_dir)
    out = Path(args.out)
    report = runs / f"{args.env_id}__inspect_latents__{args.seed}"
    sources = {
        "quickstart.png": runs / "report.png",
        "latents.png": report / "latents.png",
        "dreams.gif": report / "rollouts.gif",
        "agent.gif": report / "lapo_decode.gif",
    }
    missing = [str(path) for path in sources.values() if not path.exists()]
    if missing:
        sys.exit(f"error: {', '.join(missing)} missing: run `make quickstart`, then `make pictures`")
    out.mkdir(parents=True, exist_ok=True)
    for name, source in sources.items():
        if name == "agent.gif":
            cut_film(source, out / name, args.film_frames)
        else:
            shutil.copyfile(source, out / name)
        megabytes = (out / name).stat().st_size / 1e6
        print(f"wrote {out / name} ({megabytes:.2f} MB)")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
