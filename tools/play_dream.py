"""Play the dream: the learned world of lapo_pretrain.py under your fingers, with the real game beside it.

    dream    o^_{t+1} = FDM(o^_{t-1}, o^_t, z)    from its own last two frames and the held key's latent z
    real     Procgen, under the true action that the key stands for

Both start from the real game's first two frames; after that the dream sees nothing of it. Arrows and the
letters D A W S Q E are Procgen's 15 actions: when it starts, the game is played at random, and a few of these
frames with their actions (--num-labels) tell which latent an action has in which situation. Number keys hold
the most frequent groups of the dataset's latents, for which no label is needed. The page is play_dream.html.

    make play                                        # coinrun, with the networks in pretrained/
    python -m tools.play_dream --env-id bossfight
Reads data/ENV_ID and RUNS_DIR/ENV_ID__lapo_pretrain__SEED/checkpoint.pt, writes nothing. Ctrl-C ends it.
"""

import base64
import json
import math
import os
import signal
import sys
import threading
import time
import webbrowser
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qsl

import numpy as np
import torch
import tyro
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler

from lapo_bc import get_windows, load_checkpoint, load_dataset, refuse
from lapo_decode import make_env
from tools.inspect_latents import group_latents, to_floats, to_pixels
from tools.loading import ACTIONS, MOVES, STAY, action_names, encode, load_lapo, stage_folder


@dataclass
class Args:
    # what
    env_id: str = "bossfight"  # the Procgen game, one of the 16
    seed: int = 1  # seed of the pretraining run, of the choice of windows and labels, and of the first level
    # data
    data_dir: str | None = None  # the dataset of collect_expert_data.py; default data/ENV_ID
    pretrain_checkpoint: str | None = None  # default: RUNS_DIR/ENV_ID__lapo_pretrain__SEED/checkpoint.pt
    # keys
    num_windows: int = 2048  # training windows whose latents are grouped
    num_labels: int = 512  # frames of random play whose actions are read; 0: number keys only
    num_groups: int = 8  # groups of latents on the number keys, at most 9
    # run
    runs_dir: str = "runs"  # where the pretraining run lies
    port: int = 8000  # the page's port on 127.0.0.1, 0: any free one
    fps: float = 15.0  # frames per second at most; Procgen's games are shown at 15
    open: bool = False  # open the page in a browser, where there is a display


class Key(NamedTuple):
    """What holding a key does."""

    latent: Callable  # the dream's: frames (1, 6, 64, 64) -> z (1, latent_dim)
    action: int | None  # the real game's; None: it stands still
    name: str


class ActionLatents:
    """The latent of an action in a situation, z = g(o_{t-1}, o_t, a): ridge regression on labelled frames.

    The same key means one latent on the ground and another in the air. Features of the situation are those of
    the IDM, shown o_t as the next frame, too. They are multiplied with one-hot parts of the action: left or
    right, up or down, the button. So a pair of keys that is hardly ever pressed learns from its halves.
    """

    def __init__(self, lapo, obs, t, actions):
        """From frames obs (N, 64, 64, 3) uint8, windows t in them (n,) and the actions a_t (n,)."""
        self.lapo = lapo
        self.z = encode(lapo, obs, t, "cpu").z  # (n, latent_dim)
        self.actions = actions
        features = []
        for batch in np.split(t, range(512, len(t), 512)):
            frames = get_windows(obs, batch, "cpu")[:, :6]
            features.append(self.features(frames))
        features = np.concatenate(features)  # (n, 256)
        self.scaler = StandardScaler().fit(features)
        self.ridge = Ridge(alpha=1000)
        self.ridge.fit(self.join(features, actions), self.z)

    @torch.inference_mode()
    def features(self, frames):
        """Frames o_{t-1}, o_t (B, 6, 64, 64) -> (B, 256)."""
        windows = torch.cat([frames, frames[:, 3:]], dim=1)
        return self.lapo.idm.network(windows).numpy()

    def join(self, features, actions):
        """Features of a situation (B, 256), actions (B,) -> inputs of the regression (B, 257 * 14)."""
        move, button = split_actions(actions)
        parts = [np.ones((len(actions), 1)), np.eye(3)[move // 3], np.eye(3)[move % 3], np.eye(7)[button]]
        parts = np.concatenate(parts, axis=1)  # (B, 14)
        scaled = self.scaler.transform(features)
        scaled = np.pad(scaled, ((0, 0), (1, 0)), constant_values=10)  # a constant, little shrunk
        return (scaled[:, :, None] * parts[:, None]).reshape(len(actions), -1)

    @torch.inference_mode()
    def __call__(self, frames, actions):
        """Frames (B, 6, 64, 64), actions (B,) -> quantised latents (B, latent_dim)."""
        z = self.ridge.predict(self.join(self.features(frames), actions))
        z = torch.from_numpy(z).float()
        if self.lapo.vq is None:
            return z
        return self.lapo.vq(z)[0]


def split_actions(actions):
    """Procgen's actions (n,) -> moves, 0 to 8, and buttons, 1 to 6 or 0 for none."""
    move = np.where(actions < len(MOVES), actions, STAY)
    button = np.maximum(actions - len(MOVES) + 1, 0)
    return move, button


def play_held_keys(env, rng, num_steps, held=8):
    """Frames (N, 64, 64, 3) of E games, one after the other, actions (N,), and the windows t among them.

    Random actions, each held for some frames: a demonstrator that never stands still cannot tell what
    standing is.
    """
    actions = rng.integers(len(ACTIONS), size=(env.num, math.ceil(num_steps / held)))
    actions = np.repeat(actions, held, axis=1)[:, :num_steps]  # (E, T)
    obs = np.empty((env.num, num_steps, 64, 64, 3), dtype=np.uint8)
    first = np.empty(actions.shape, dtype=bool)
    for k in range(num_steps):
        _, seen, first[:, k] = env.observe()
        obs[:, k] = seen["rgb"]
        env.act(actions[:, k].astype(np.int32))
    first[:, 0] = True  # the game before it is another one
    first = np.append(first.ravel(), True)
    t = np.flatnonzero(~first[1:-1] & ~first[2:]) + 1  # o_{t-1}, o_t, o_{t+1} are of one episode
    return obs.reshape(-1, 64, 64, 3), actions.ravel(), t


def learn_actions(lapo, env_id, levels, args):
    """The latents of actions, from num_labels frames of random play on the dataset's levels."""
    env = make_env(env_id, 64, *levels, args.seed + 1000)
    rng = np.random.default_rng(args.seed)
    obs, actions, t = play_held_keys(env, rng, num_steps=64)
    env.close()
    t = rng.permutation(t)[: args.num_labels]
    return ActionLatents(lapo, obs, t, actions[t])


def told_moves(of_action, z):
    """The move that each of z (n, latent_dim) tells of (n,).

    Two classifiers are fitted on the labelled latents, left or right and up or down, so a pair of keys that
    is hardly ever pressed learns from its halves.
    """
    move, _ = split_actions(of_action.actions)
    scaler = StandardScaler().fit(of_action.z)
    labelled = scaler.transform(of_action.z)
    scaled = scaler.transform(z)
    score = np.zeros((len(z), len(MOVES)))
    for part in (np.arange(9) // 3, np.arange(9) % 3):  # of each move
        classifier = LogisticRegression(C=0.1, class_weight="balanced", max_iter=500)
        if len(np.unique(part[move])) > 1:
            classifier.fit(labelled, part[move])
            log_p = np.full((len(z), 3), -np.inf)
            log_p[:, classifier.classes_] = classifier.predict_log_proba(scaled)
            score += log_p[:, part]
    return score.argmax(1)


def hold(z, frames):
    """A latent (1, latent_dim) that is the same in every situation."""
    return z


def to_input(obs):
    """A frame (64, 64, 3) uint8 as the networks see it, (1, 3, 64, 64) in [-0.5, 0.5]."""
    return to_floats(obs[None], "cpu")


class World:
    """The real game and the dream of it, both from the game's first two frames; no key made the second."""

    def __init__(self, fdm, new_env):
        self.fdm = fdm
        self.new_env = new_env
        self.env = None
        self.restart(0)

    def restart(self, level):
        """A fresh game, the same one for the same number."""
        if self.env:
            self.env.close()
        self.env = self.new_env(level)
        self.level = level
        self.frame = 0
        self.over = False
        first = self.env.observe()[1]["rgb"][0]
        self.real = [first, first]  # o_{t-1}, o_t
        self.act(STAY)
        self.start = self.real[1]
        self.wake()

    def wake(self):
        """The dream goes on from the real game's last two frames."""
        self.dream = [to_input(obs) for obs in self.real]

    def act(self, action):
        """The real game under a true action; stands still once its episode is over."""
        if self.over:
            return
        self.env.act(np.array([action], dtype=np.int32))
        _, obs, first = self.env.observe()
        self.over = bool(first[0])  # then obs belongs to the next episode
        if not self.over:
            self.real = [self.real[1], obs["rgb"][0]]

    @torch.inference_mode()
    def step(self, key):
        """One frame of the dream under a key's latent, of the real game under its action, if any."""
        frames = torch.cat(self.dream, dim=1)
        prediction = self.fdm(frames, key.latent(frames)).clamp(-0.5, 0.5)
        self.dream = [self.dream[1], prediction]
        self.frame += 1
        if key.action is not None:
            self.act(key.action)

    def errors(self):
        """Mean squared difference to the real game's frame: of the dream, and of the first frame."""
        real = to_input(self.real[1])
        frames = self.dream[1], to_input(self.start)
        return [(frame - real).square().mean().item() for frame in frames]

    def pictures(self):
        """Dream and real frame, (64, 64, 3) uint8."""
        return to_pixels(self.dream[1])[0], self.real[1]


def read_keys(held, num_groups):
    """Held keys -> ("group", its index) for a number, else ("action", one of the 15). Then buttons win."""
    for g in range(num_groups):
        if str(g + 1) in held:
            return "group", g
    for b, button in enumerate("dawsqe"):
        if button in held:
            return "action", len(MOVES) + b
    x = ("ArrowRight" in held) - ("ArrowLeft" in held)
    y = ("ArrowUp" in held) - ("ArrowDown" in held)
    return "action", 3 * (x + 1) + (y + 1)


def choose_keys(lapo, train, of_action, args):
    """The keys' latents: {("group", g) or ("action", a): Key}; the groups' [(percentage, action's name)].

    of_action are ActionLatents, or None where no label may be read.
    """
    t = np.random.default_rng(args.seed).permutation(train.windows)[: args.num_windows]
    print(f"looking at {len(t)} windows ...", flush=True)
    z, quantised, _ = encode(lapo, train, t, "cpu")
    group, chosen = group_latents(quantised, args.num_groups, args.seed)
    shares = np.bincount(group) / len(t)
    keys = {}
    groups = []
    if of_action is not None:
        told = told_moves(of_action, z)
        for a, name in enumerate(ACTIONS):
            keys["action", a] = Key(partial(of_action, actions=np.array([a])), a, name)
    for g, i in enumerate(chosen):
        move = None
        name = ""
        does = f"group {g + 1}"
        if of_action is not None:
            move = int(np.bincount(told[group == g]).argmax())
            name = ACTIONS[move]
            does += f", real game: {name}"
        keys["group", g] = Key(partial(hold, torch.from_numpy(quantised[i])[None]), move, does)
        groups.append((round(100 * shares[g]), name))
    return keys, groups


def make_responder(world, keys, num_groups, labelled):
    """The function (held, command) -> what the page shows next: after a step under held keys or a command."""
    lock = threading.Lock()

    def respond(held, command):
        key = keys.get(read_keys(held, num_groups))
        milliseconds = 0.0
        with lock:
            if command == "wake":
                world.wake()
            elif command == "restart":
                world.restart(world.level)
            elif command == "next":
                world.restart(world.level + 1)
            elif key:
                began = time.perf_counter()
                world.step(key)
                milliseconds = 1000 * (time.perf_counter() - began)
            dream, real = world.pictures()
            return {
                "dream": base64.b64encode(dream.tobytes()).decode(),
                "real": base64.b64encode(real.tobytes()).decode(),
                "frame": world.frame,
                "over": world.over,
                "held": key.name if key else "nothing",
                "milliseconds": milliseconds,
                "errors": world.errors() if labelled else None,
            }

    return respond


def make_server(port, page, respond):
    """A server on 127.0.0.1: GET / is the page, POST /step?keys=...&command=... respond(keys, command), JSON.

    Other pages in the same browser can send requests here, too. Those that come by another name (Host) or
    from another page (Origin) are refused.
    """

    class Handler(BaseHTTPRequestHandler):
        def from_here(self):
            host = self.headers.get("Host")
            port = self.server.server_port
            if host not in (f"127.0.0.1:{port}", f"localhost:{port}"):
                return False
            return self.headers.get("Origin", f"http://{host}") == f"http://{host}"

        def do_GET(self):
            if not self.from_here():
                self.answer(403, "text/plain", "only this machine's own page is answered")
            elif self.path == "/":
                self.answer(200, "text/html", page)
            else:
                self.answer(404, "text/plain", "GET / or POST /step")

        def do_POST(self):
            path, _, query = self.path.partition("?")
            if not self.from_here():
                self.answer(403, "text/plain", "only this machine's own page is answered")
            elif path == "/step":
                query = dict(parse_qsl(query))
                held = query.get("keys", "").split(",")
                content = respond(held, query.get("command"))
                self.answer(200, "application/json", json.dumps(content))
            else:
                self.answer(404, "text/plain", "GET / or POST /step")

        def answer(self, status, kind, body):
            with suppress(ConnectionError):  # the page was closed
                self.send_response(status)
                self.send_header("Content-Type", f"{kind}; charset=utf-8")
                self.end_headers()
                self.wfile.write(body.encode())

        def log_message(self, *_):
            pass

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


def make_game(args):
    """The world, its keys and the server of its page."""
    if min(args.num_windows, args.fps) < 1 or not 1 <= args.num_groups <= 9 or args.num_labels < 0:
        refuse("--num-windows and --fps start at 1, --num-labels at 0, --num-groups is 1 to 9")
    path = args.pretrain_checkpoint or stage_folder(args, "lapo_pretrain") / "checkpoint.pt"
    pretrained = load_checkpoint(path, "lapo_pretrain", args.env_id)
    data, train, _ = load_dataset(args)
    if action_names(data) != ACTIONS:
        refuse(f"--env-id {args.env_id}: the keys are those of Procgen's games, and play no other world")
    lapo = load_lapo(pretrained, "cpu")
    levels = data["num_levels"], data["start_level"]
    of_action = None
    if args.num_labels:
        of_action = learn_actions(lapo, args.env_id, levels, args)
    keys, groups = choose_keys(lapo, train, of_action, args)

    # several threads wait for each other longer than they work
    torch.set_num_threads(1)
    world = World(lapo.fdm, lambda level: make_env(args.env_id, 1, *levels, args.seed + level))
    world.step(keys["group", 0])  # the first one is slow
    world.restart(0)

    num_labels = len(of_action.actions) if of_action else 0
    config = {"game": args.env_id, "labels": num_labels, "fps": args.fps, "groups": groups}
    page = Path(__file__).with_suffix(".html").read_text().replace("{CONFIG}", json.dumps(config))
    respond = make_responder(world, keys, len(groups), labelled=of_action is not None)
    try:
        server = make_server(args.port, page, respond)
    except (OSError, OverflowError) as e:
        refuse(f"--port {args.port} on 127.0.0.1 cannot be used ({e}): another, or 0 for a free one")
    return world, keys, server


def has_display():
    """Whether a browser would have a window; without one it might take the terminal."""
    on_linux = sys.platform.startswith("linux")
    return not on_linux or "DISPLAY" in os.environ or "WAYLAND_DISPLAY" in os.environ


def main(args):
    signal.signal(signal.SIGINT, lambda *_: sys.exit(0))
    _, _, server = make_game(args)
    url = f"http://127.0.0.1:{server.server_port}"
    print(f"play at {url} (Ctrl-C ends it)", flush=True)
    if args.open and has_display():
        webbrowser.open(url)
    server.serve_forever()


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
