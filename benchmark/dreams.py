"""How long a dream stays a picture of its game, and near it: keys held for 100 frames from 32 starts.

Every checkpoint of lapo_pretrain.py or tools.steady_dream dreams under the keys of tools.play_dream, beside
the real game from the same states under the same keys. The starts are levels' first frames and up to 31
frames of "right" after them.

    nearest    mean squared error of the last picture to the nearest training frame, of all and of 4,096 drawn
               ones: is it a picture of the game? Beside it the real game's last picture, and test frames
    followed   median over starts of the frames until the dream's error to the real game is above that of the
               first frame, held; the real game's whole time where it never is
    error      mean squared error to the real game after 8, 16 and 32 frames, and that of the first frame

    python benchmark/dreams.py --checkpoints runs/.../checkpoint.pt pretrained/coinrun-dream.pt
Writes benchmark/results/dreams.json.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lapo_bc import load_checkpoint, load_dataset  # noqa: E402
from lapo_decode import make_env  # noqa: E402
from tools import play_dream  # noqa: E402
from tools.inspect_latents import to_floats, to_pixels  # noqa: E402
from tools.loading import MOVES, STAY, load_lapo  # noqa: E402

KEYS = ["stay", "right", "left", "up", "right up", "left up"]  # of coinrun, each held all the time
RIGHT = MOVES.index("right")
SHOWN = (8, 16, 32)  # frames whose errors are kept


@dataclass
class Args:
    checkpoints: tuple[str, ...]  # of the same IDM: before, after
    env_id: str = "coinrun"  # the Procgen game
    seed: int = 1  # of the starts, of the mixed keys, and of the random play that keys are learned from
    data_dir: str | None = None  # the dataset; default data/ENV_ID
    num_labels: int = 512  # labelled frames of random play that keys are learned from
    num_starts: int = 32  # states of the game
    num_frames: int = 100  # frames of a dream
    test_frames: int = 512  # real frames beside the dreams' last ones
    out: str = str(ROOT / "benchmark" / "results" / "dreams.json")  # where the numbers go
    pictures: str | None = None  # also a PNG: of each key, four starts after 10, 30 and 100 frames


def play(env, actions):
    """Frames (E, T + 1, 64, 64, 3) under actions (E, T), and how many are of the first episode (E,)."""
    frames = [env.observe()[1]["rgb"].copy()]
    whole = np.ones(env.num, dtype=bool)
    lasted = np.ones(env.num, dtype=np.int64)
    for action in actions.T:
        env.act(action.astype(np.int32))
        _, obs, first = env.observe()
        frames.append(obs["rgb"].copy())
        whole &= ~first.astype(bool)
        lasted += whole
    return np.stack(frames, axis=1), lasted


@torch.inference_mode()
def dream(fdm, latents, before, now, actions):
    """The dream's frames (E, T, 3, 64, 64) under actions (E, T), as tools.play_dream makes them."""
    before = to_floats(before, "cpu")
    now = to_floats(now, "cpu")
    dreamed = []
    for action in actions.T:
        frames = torch.cat([before, now], dim=1)
        prediction = fdm(frames, latents(frames, action))
        before = now
        now = prediction.clamp(-0.5, 0.5)
        dreamed.append(now)
    return torch.stack(dreamed, dim=1)


def compare(dreamed, real, lasted):
    """How long a dream (E, T, 3, 64, 64) follows the real frames (E, T + 1, 64, 64, 3), and its errors."""
    real = to_floats(real, "cpu")
    error = (dreamed - real[:, 1:]).square().mean((2, 3, 4))  # (E, T)
    still = (real[:, :1] - real[:, 1:]).square().mean((2, 3, 4))
    T = error.shape[1]
    alive = np.arange(1, T + 1) < lasted[:, None]
    passed = (error > still).numpy() & alive
    followed = np.where(passed.any(1), passed.argmax(1), lasted - 1)
    row = {"followed": float(np.median(followed)), "followed_mean": round(float(followed.mean()), 1)}
    for frame in SHOWN:
        both = alive[:, frame - 1]
        row[f"error_{frame}"] = error[both, frame - 1].mean().item()
        row[f"first_frame_error_{frame}"] = still[both, frame - 1].mean().item()
    return row


def nearest(queries, train):
    """Mean squared errors of images (n, 3, 64, 64) to the nearest of 4,096 drawn frames and of all (n,)."""
    x = queries.flatten(1)
    norms = x.square().sum(1)[:, None]
    best = torch.full((len(x),), torch.inf)
    order = np.random.default_rng(0).permutation(len(train.first))
    for start in range(0, len(order), 4096):
        y = to_floats(train[np.sort(order[start : start + 4096])], "cpu").flatten(1)
        squares = norms - 2 * x @ y.T + y.square().sum(1)
        best = torch.minimum(best, squares.amin(1) / x.shape[1])
        if start == 0:
            few = best
    return few, best


def main(args):
    torch.set_num_threads(1)
    data, train, test = load_dataset(args)
    rng = np.random.default_rng(args.seed)
    E = args.num_starts

    # the real game: the starts, and what follows from them under each key
    levels = data["num_levels"], data["start_level"]
    env = make_env(args.env_id, E, *levels, args.seed)
    runs = np.arange(E)[:, None] >= np.arange(E, 0, -1)  # the e-th game runs in the last e frames
    frames, _ = play(env, np.where(runs, RIGHT, STAY))
    before = frames[:, -2]
    states = env.callmethod("get_state")
    held = {name: np.full((E, args.num_frames), MOVES.index(name)) for name in KEYS}
    mixed = rng.choice([MOVES.index(name) for name in KEYS], (E, args.num_frames // 10 + 1))
    held["mixed"] = np.repeat(mixed, 10, axis=1)[:, : args.num_frames]
    real = {}
    for name, actions in held.items():
        env.callmethod("set_state", states)
        real[name] = play(env, actions)

    # the dreams
    queries = {("test", ""): to_floats(test[rng.permutation(len(test.first))[: args.test_frames]], "cpu")}
    for name, (obs, _) in real.items():
        queries["real", name] = to_floats(obs[:, -1], "cpu")
    rows = []
    pictures = []
    for path in args.checkpoints:
        lapo = load_lapo(load_checkpoint(path, "lapo_pretrain", args.env_id), "cpu")
        latents = play_dream.learn_actions(lapo, args.env_id, levels, args)
        for name, actions in held.items():
            obs, lasted = real[name]
            dreamed = dream(lapo.fdm, latents, before, obs[:, 0], actions)
            rows.append({"of": path, "key": name, **compare(dreamed, obs, lasted)})
            queries[path, name] = dreamed[:, -1]
            shown = [dreamed[e, k] for e in range(0, E, E // 4) for k in (9, 29, args.num_frames - 1)]
            pictures.append(torch.cat(shown, dim=2))
    few, best = nearest(torch.cat(list(queries.values())), train)
    sizes = [len(images) for images in queries.values()]
    ends = {}
    for key, a, b in zip(queries, few.split(sizes), best.split(sizes)):
        ends[key] = {"nearest_of_4096": a.mean().item(), "nearest": b.mean().item()}
    for row in rows:
        row |= ends[row["of"], row["key"]]
    for name in held:
        rows.append({"of": "the real game", "key": name, **ends["real", name]})
    rows.append({"of": "test frames", "key": "", **ends["test", ""]})
    for row in rows:
        print({name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()})
    if args.pictures:
        Image.fromarray(to_pixels(torch.cat(pictures, dim=1))).save(args.pictures)
    commit = subprocess.getoutput(f"git -C '{ROOT}' describe --always --dirty")
    about = {name: value for name, value in vars(args).items() if name not in ("out", "pictures")}
    Path(args.out).write_text(json.dumps({"args": about, "commit": commit, "rows": rows}, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
