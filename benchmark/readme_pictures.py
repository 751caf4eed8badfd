"""The documentation's pictures: of a quickstart, and of lapo_inspect.py's report on it.

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


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    runs, out = Path(args.runs_dir), Path(args.out)
    inspect = runs / f"{args.env_id}__lapo_inspect__{args.seed}"
    copies = {"quickstart.png": runs / "report.png", "latents.png": inspect / "latents.png"}
    copies["dreams.gif"], film = inspect / "rollouts.gif", inspect / "lapo_decode.gif"
    missing = [str(path) for path in (*copies.values(), film) if not path.exists()]
    if missing:
        sys.exit(f"error: {', '.join(missing)} missing: run `make quickstart`, then `make pictures`")
    out.mkdir(parents=True, exist_ok=True)
    for name, source in copies.items():
        shutil.copyfile(source, out / name)
    with Image.open(film) as gif:
        frames = [frame.copy() for _, frame in zip(range(args.film_frames), ImageSequence.Iterator(gif))]
    durations = [frame.info["duration"] for frame in frames]
    frames[0].save(out / "agent.gif", save_all=True, append_images=frames[1:], duration=durations, loop=0)
    for name in (*copies, "agent.gif"):
        print(f"wrote {out / name} ({(out / name).stat().st_size / 1e6:.2f} MB)")
