"""The networks of finished runs as two small files in half precision, and a page of what made them.

    pretrained/ENV_ID-dream.pt     IDM, VQ, and the FDM of tools.steady_dream, as lapo_pretrain.py saves them
    pretrained/ENV_ID-policy.pt    latent policy and IDM, as lapo_bc.py saves them
    pretrained/ENV_ID.json         commands, commits and scores

    python -m tools.ship_networks --env-id coinrun --runs-dir runs/play
Reads RUNS_DIR/ENV_ID__{lapo_pretrain,steady_dream,lapo_bc}__SEED.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import tyro

from lapo_bc import load_checkpoint, refuse, save
from tools.loading import stage_folder, write_whole

ABOUT = ("command", "commit", "device", "threads", "torch", "wall_seconds")


@dataclass
class Args:
    env_id: str = "coinrun"  # the game
    seed: int = 1  # the seed of the runs
    runs_dir: str = "runs"  # where the runs lie
    out: str = "pretrained"  # where the files go


def halve(networks):
    """Matrices and kernels in half precision. Vectors stay: small, and some need float32's range."""
    halved = {}
    for name, tensor in networks.items():
        if tensor.is_floating_point() and tensor.ndim > 1:
            tensor = tensor.half()
        halved[name] = tensor
    return halved


def ship(checkpoint, parts, path):
    """Writes a checkpoint whose networks, the named parts, are halved."""
    networks = {part: halve(checkpoint[part]) for part in parts if part in checkpoint}
    save(path, {**checkpoint, **networks})
    print(f"wrote {path} ({path.stat().st_size / 1e6:.2f} MB)")


def describe_run(folder):
    """What results.json of a run says of its making, and its scores."""
    try:
        results = json.loads((folder / "results.json").read_text())
    except OSError:
        refuse(f"{folder} is no finished run: see --runs-dir")
    about = {name: results[name] for name in ABOUT if name in results}
    scores = {name: value for name, value in results.items() if "/" in name or name == "scores"}
    return {**about, **scores}


def main(args):
    folders = {name: stage_folder(args, name) for name in ("lapo_pretrain", "steady_dream", "lapo_bc")}
    made_by = {name: describe_run(folder) for name, folder in folders.items()}
    dream = load_checkpoint(folders["steady_dream"] / "checkpoint.pt", "lapo_pretrain", args.env_id)
    cloned = load_checkpoint(folders["lapo_bc"] / "checkpoint.pt", "lapo_bc", args.env_id)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    ship(dream, ("idm", "vq", "fdm"), out / f"{args.env_id}-dream.pt")
    ship(cloned, ("policy", "idm"), out / f"{args.env_id}-policy.pt")
    page = {"env_id": args.env_id, "made_by": made_by}
    write_whole(out / f"{args.env_id}.json", json.dumps(page, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
