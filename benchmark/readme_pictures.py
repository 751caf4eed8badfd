"""README.md's pictures and numbers of the quickstart, from its runs and lapo_inspect.py's report on them, all of which `make pictures` runs.

python benchmark/readme_pictures.py    # runs/quickstart -> docs/{quickstart.png,latents.png,dreams.gif,agent.gif}, results/quickstart.json
"""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from PIL import Image, ImageSequence

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Args:
    env_id: str = "coinrun"
    """the Procgen game"""
    runs_dir: str = str(ROOT / "runs" / "quickstart")
    """where the runs lie"""
    out: str = str(ROOT / "docs")
    """where the pictures go"""
    numbers: str = str(ROOT / "benchmark" / "results" / "quickstart.json")
    """where the numbers go, which a test compares README.md with"""
    film_frames: int = 75
    """the agent's film is cut after so many frames (15 a second)"""


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    runs, out = Path(args.runs_dir), Path(args.out)
    pretrain, inspect, decode = (runs / f"{args.env_id}__{stage}__1" for stage in ("lapo_pretrain", "lapo_inspect", "lapo_decode"))
    copies = {runs / "report.png": "quickstart.png", inspect / "latents.png": "latents.png", inspect / "rollouts.gif": "dreams.gif"}
    film = decode / "lapo_decoder.gif"
    missing = [str(path) for path in (*copies, film, pretrain / "results.json") if not path.exists()]
    if missing:
        sys.exit(f"error: {', '.join(missing)} missing: run `make quickstart`, then `make pictures`")
    results, pretrained = (json.loads((folder / "results.json").read_text()) for folder in (runs, pretrain))
    if (found := results["env_id"]) != args.env_id:
        sys.exit(f"error: the last quickstart in {runs} was {found}'s, expected {args.env_id}'s: run `make quickstart ENV_ID={args.env_id}`")
    results |= {key: pretrained[key] for key in ("latent_space", "picture_seconds", "commit", "device_name")}
    Path(args.numbers).write_text(json.dumps(results))
    out.mkdir(parents=True, exist_ok=True)
    for source, name in copies.items():
        shutil.copyfile(source, out / name)
    with Image.open(film) as gif:
        frames = [frame.copy() for _, frame in zip(range(args.film_frames), ImageSequence.Iterator(gif))]
    frames[0].save(out / "agent.gif", save_all=True, append_images=frames[1:], duration=1000 // 15, loop=0)
    for name in (*copies.values(), "agent.gif"):
        print(f"wrote {out / name} ({(out / name).stat().st_size / 1e6:.2f} MB)")
