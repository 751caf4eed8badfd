"""Films of a small world in which one sprite acts, with labels: the worked example of docs/own-data.md.

An orange square runs after a ball before a textured background, and takes any of five actions 40% of the
time. The ball flies straight on. Flags add what goes wrong with real films, one by one:
    python -m tools.make_example_films films/example
    python -m tools.make_example_films films/cuts --cuts 15
Writes FOLDER/00.mp4, 01.mp4, ... at 128x128 pixels, and FOLDER/labels.csv of columns video,frame,action: the
action taken on seeing that frame.
"""

import csv
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import av
import numpy as np
import tyro
from PIL import Image, ImageDraw, ImageFont

VIEW = 128  # pixels a side
LOW, HIGH = 16, 96  # where the upper left corners of sprites can be, which have 16 pixels a side
ACTIONS = ["stay", "left", "right", "up", "down"]
MOVES = np.array([(0, 0), (0, -8), (0, 8), (-8, 0), (8, 0)])  # pixels down and to the right


@dataclass
class Args:
    # what
    folder: tyro.conf.Positional[str]  # where the films go
    seed: int = 1  # seed of all that is random in them
    num_films: int = 18  # films, each before a background of its own
    num_actions: int = 256  # actions in a film
    # what goes wrong
    camera: Literal["fixed", "follows", "drifts"] = "fixed"  # follows the acting sprite, or drifts at random
    cuts: int = 0  # hard cuts in a film, each to another scene
    clock: bool = False  # a clock in the picture, of hundredths of a second
    distractors: int = 0  # sprites that move at random
    actors: int = 1  # games side by side in one picture; labels are of the left one
    frames_per_action: Literal[1, 2, 4] = 1  # so many frames show one action: a high frame rate
    label_delay: int = 0  # labels are written so many frames too late


def new_scene(args, rng):
    """A background, twice as wide as the view, and sprites somewhere before it."""
    dots = Image.fromarray(rng.integers(30, 200, (12, 12, 3), dtype=np.uint8))
    places = 8 * rng.integers(2, 13, (2 + args.distractors, 2))
    return SimpleNamespace(
        background=np.asarray(dots.resize((2 * VIEW, 2 * VIEW), Image.BICUBIC)),
        actor=places[0],
        ball=places[1],
        velocity=rng.choice([-4, 4], 2),  # of the ball, pixels a step
        others=places[2:],
        corner=np.array([64, 64]),  # of the view, in the background
    )


def choose_action(scene, rng):
    """Towards the ball along the longer way, but 40% of the time any action."""
    way = scene.ball - scene.actor
    if rng.random() < 0.4:
        return int(rng.integers(len(ACTIONS)))
    if np.abs(way).max() < 8:
        return 0
    return int(np.argmax(MOVES @ way))


def move(scene, action, other_actions, share):
    """Moves the sprites by a share of their step; none leaves its area."""
    scene.actor = np.clip(scene.actor + MOVES[action] // share, LOW, HIGH)
    scene.others = np.clip(scene.others + MOVES[other_actions] // share, LOW, HIGH)
    ahead = scene.ball + scene.velocity // share
    scene.velocity = np.where((ahead < LOW) | (ahead > HIGH), -scene.velocity, scene.velocity)
    scene.ball = scene.ball + scene.velocity // share


def draw(scene, args, time):
    """The camera's view of a scene (128, 128, 3) uint8, at a time in seconds."""
    corner = scene.corner
    if args.camera == "follows":
        corner = corner + scene.actor - 56  # the actor in the middle
    top, left = corner
    picture = Image.fromarray(scene.background[top : top + VIEW, left : left + VIEW])
    pen = ImageDraw.Draw(picture)
    sprites = [(place, "blue", 0) for place in scene.others]
    sprites += [(scene.actor, "orange", 0), (scene.ball, "white", 8)]
    for place, color, radius in sprites:
        y, x = place + 64 - corner
        pen.rounded_rectangle((x, y, x + 15, y + 15), radius, color)
    if args.clock:
        pen.rectangle((0, VIEW - 16, VIEW, VIEW), "black")
        pen.text((32, VIEW - 17), f"{time:07.2f}", "white", ImageFont.load_default(16))
    return np.asarray(picture)


def make_game(args, rng):
    """The pictures of a film (T, 128, 128, 3) and its actions (T,)."""
    pictures = []
    actions = []
    scene_length = args.num_actions // (args.cuts + 1)
    for t in range(args.num_actions):
        if t % scene_length == 0:
            scene = new_scene(args, rng)
        action = choose_action(scene, rng)
        other_actions = rng.integers(len(ACTIONS), size=args.distractors)
        for _ in range(args.frames_per_action):
            time = (len(pictures) + rng.random()) / 10  # no camera is punctual
            pictures.append(draw(scene, args, time))
            actions.append(action)
            move(scene, action, other_actions, args.frames_per_action)
            if args.camera == "drifts":
                scene.corner = np.clip(scene.corner + rng.integers(-4, 5, 2), 32, 96)
    return np.stack(pictures), actions


def write_film(path, pictures, fps):
    """An mp4 of pictures (T, H, W, 3) uint8."""
    with av.open(str(path), "w") as film:
        stream = film.add_stream("libx264", rate=fps, options={"crf": "18"})
        stream.height, stream.width = pictures.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            film.mux(stream.encode(frame))
        film.mux(stream.encode(None))


def main(args):
    folder = Path(args.folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [("video", "frame", "action")]
    for i in range(args.num_films):
        games = []
        for player in range(args.actors):
            rng = np.random.default_rng([args.seed, i, player])
            games.append(make_game(args, rng))
        name = f"{i:02}.mp4"
        pictures = np.concatenate([pictures for pictures, _ in games], axis=2)
        write_film(folder / name, pictures, 10 * args.frames_per_action)
        _, actions = games[0]
        for t, action in enumerate(actions[: len(actions) - args.label_delay]):
            rows.append((name, t + args.label_delay, ACTIONS[action]))
    with open(folder / "labels.csv", "w", newline="") as f:
        csv.writer(f).writerows(rows)
    print(f"wrote {folder}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
