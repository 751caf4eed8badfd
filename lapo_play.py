"""Play the dream: the learned world of lapo_pretrain.py under your fingers, with the real game beside it.

    dream    o^_{t+1} = FDM(o^_{t-1}, o^_t, z)    from its own last two frames and the held key's latent z
    real     Procgen, under the true action that the key stands for

Both start from the real game's first two frames; after that the dream sees nothing of it. Arrows and the
letters D A W S Q E are Procgen's 15 actions: a few labels (--num-labels) choose a latent for each. Number
keys hold the most frequent groups of latents, for which no label is needed. The page is lapo_play.html.

    python lapo_play.py --env-id bossfight
Reads data/ENV_ID and RUNS_DIR/ENV_ID__lapo_pretrain__SEED/checkpoint.pt, writes nothing. Ctrl-C ends it.
"""

import base64
import json
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl

import numpy as np
import torch
import tyro
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from lapo_bc import load_checkpoint, load_dataset
from lapo_decode import make_env
from lapo_inspect import ACTIONS, STAY, action_names, build_networks, encode, group_latents, load_labels


@dataclass
class Args:
    # what
    env_id: str = "bossfight"  # the Procgen game, one of the 16
    seed: int = 1  # seed of the pretraining run, of the choice of windows and labels, and of the first level
    # data
    data_dir: str | None = None  # the dataset of collect_expert_data.py; default data/ENV_ID
    pretrain_checkpoint: str | None = None  # default: RUNS_DIR/ENV_ID__lapo_pretrain__SEED/checkpoint.pt
    allow_unfinished: bool = False  # take the checkpoint of an unfinished run, too
    # keys
    num_windows: int = 2048  # training windows whose latents are looked at to choose those of the keys
    num_labels: int = 512  # windows whose true actions may be read; 0: number keys only
    num_groups: int = 8  # groups of latents on the number keys, at most 9
    # run
    runs_dir: str = "runs"  # where the pretraining run lies
    port: int = 8000  # the page's port on 127.0.0.1, 0: any free one
    fps: float = 15.0  # frames per second at most; Procgen's games are shown at 15


def latents_of_actions(z, actions, top=64):
    """Latents to play actions with (15, latent_dim); the move that each of z (n, latent_dim) tells of (n,).

    actions are the first windows' labels. Three classifiers are fitted on them: left or right, up or down,
    and the button; so a pair that is hardly ever pressed learns from its halves. An action's latent is the
    mean of the `top` ones that they are surest of. (The mean of its own labelled windows did worse in
    a trial on coinrun, where most windows show little but how fast the hero was already.)
    """
    move, every, button = np.where(actions < 9, actions, STAY), np.arange(9), np.maximum(actions - 8, 0)
    parts = [(move // 3, every // 3, slice(0, 9)), (move % 3, every % 3, slice(0, 9))]
    parts.append((button, np.arange(1, 7), slice(9, 15)))
    x, score = StandardScaler().fit_transform(z), np.zeros((len(z), 15))
    for label, wanted, columns in parts:
        if len(np.unique(label)) > 1:
            classifier = LogisticRegression(C=0.1, class_weight="balanced", max_iter=500)
            classifier.fit(x[: len(label)], label)
            log_p = np.zeros((len(z), 7))  # 0, that is no opinion, on what has no label
            log_p[:, classifier.classes_] = classifier.predict_log_proba(x)
            score[:, columns] += log_p[:, wanted]
    seen = np.unique(move)
    surest = np.argsort(-score, axis=0, kind="stable")[:top]  # (top, 15)
    return z[surest].mean(0), seen[score[:, seen].argmax(1)]


def to_input(obs):
    """A frame (64, 64, 3) uint8 as the networks see it, (1, 3, 64, 64) in [-0.5, 0.5]."""
    return torch.from_numpy(obs).permute(2, 0, 1)[None] / 255 - 0.5


class World:
    """The real game and the dream of it, both from the game's first two frames; no key made the second."""

    def __init__(self, fdm, new_env):
        self.fdm, self.new_env, self.env = fdm, new_env, None
        self.restart(0)

    def restart(self, level):
        """A fresh game, the same one for the same number."""
        if self.env:
            self.env.close()
        self.env, self.level, self.frame, self.over = self.new_env(level), level, 0, False
        self.real = [self.env.observe()[1]["rgb"][0]] * 2  # o_{t-1}, o_t
        self.act(STAY)
        self.start = self.real[1]
        self.wake()

    def wake(self):
        """The dream goes on from the real game's last two frames."""
        self.dream = [to_input(obs) for obs in self.real]

    def act(self, action):
        """The real game under a true action; stands still once its episode is over."""
        if not self.over:
            self.env.act(np.array([action], dtype=np.int32))
            _, obs, first = self.env.observe()
            self.over = bool(first[0])  # then obs belongs to the next episode
            if not self.over:
                self.real = [self.real[1], obs["rgb"][0]]

    @torch.inference_mode()
    def step(self, z, action):
        """One frame of the dream under latent z (1, latent_dim), of the real game under an action, if any."""
        self.dream = [self.dream[1], self.fdm(torch.cat(self.dream, dim=1), z).clamp(-0.5, 0.5)]
        self.frame += 1
        if action is not None:
            self.act(action)

    def errors(self):
        """Mean squared difference to the real game's frame: of the dream, and of the first frame."""
        real = to_input(self.real[1])
        return [(frame - real).pow(2).mean().item() for frame in (self.dream[1], to_input(self.start))]

    def pictures(self):
        """Dream and real frame, (64, 64, 3) uint8."""
        return ((self.dream[1][0] + 0.5) * 255).round().byte().permute(1, 2, 0).numpy(), self.real[1]


def read_keys(keys, num_groups):
    """Held keys -> ("group", its index) for a number, else ("action", one of the 15). Then buttons win."""
    for g in range(num_groups):
        if str(g + 1) in keys:
            return "group", g
    for b, button in enumerate("dawsqe"):
        if button in keys:
            return "action", 9 + b
    x, y = ("ArrowRight" in keys) - ("ArrowLeft" in keys), ("ArrowUp" in keys) - ("ArrowDown" in keys)
    return "action", 3 * (x + 1) + (y + 1)


def make_server(port, page, respond):
    """A server on 127.0.0.1: GET / is the page, POST /step?keys=...&command=... respond(keys, command), JSON.

    Other pages in the same browser can send requests here, too. Those that come by another name (Host) or
    from another page (Origin) are refused.
    """

    class Handler(BaseHTTPRequestHandler):
        def answer(self):
            host, (path, _, query) = self.headers.get("Host"), self.path.partition("?")
            known = [f"{name}:{self.server.server_port}" for name in ("127.0.0.1", "localhost")]
            if host not in known or self.headers.get("Origin", f"http://{host}") != f"http://{host}":
                status, kind, body = (
                    403,
                    "text/plain",
                    f"only http://{known[0]} is answered, and no other page",
                )
            elif (self.command, self.path) == ("GET", "/"):
                status, kind, body = 200, "text/html", page
            elif (self.command, path) == ("POST", "/step"):
                query = dict(parse_qsl(query))
                body = json.dumps(respond(query.get("keys", "").split(","), query.get("command")))
                status, kind = 200, "application/json"
            else:
                status, kind, body = 404, "text/plain", "GET / or POST /step"
            with suppress(ConnectionError):  # the page was closed
                self.send_response(status)
                self.send_header("Content-Type", f"{kind}; charset=utf-8")
                self.end_headers()
                self.wfile.write(body.encode())

        do_GET = do_POST = answer

        def log_message(self, *_):
            pass

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    signal.signal(signal.SIGINT, lambda *_: sys.exit(0))
    if min(args.num_windows, args.fps) < 1 or not 1 <= args.num_groups <= 9 or args.num_labels < 0:
        sys.exit("error: --num-windows and --fps start at 1, --num-labels at 0, --num-groups is 1 to 9")
    default = f"{args.runs_dir}/{args.env_id}__lapo_pretrain__{args.seed}/checkpoint.pt"
    path = args.pretrain_checkpoint or default
    pretrained = load_checkpoint(path, "lapo_pretrain", ["idm", "vq", "fdm"], args)
    data, frames, windows = load_dataset(args)
    if action_names(data) is not ACTIONS:
        sys.exit(
            f"error: --env-id {args.env_id}: the keys are those of Procgen's games, and play no other world"
        )
    idm, vq, fdm = build_networks(pretrained["args"], "cpu", pretrained)

    # the keys' latents: of groups on the numbers, of actions on arrows and letters
    t = np.random.default_rng(args.seed).permutation(windows["train"])[: args.num_windows]
    print(f"looking at {len(t)} windows ...", flush=True)
    z, quantised, _ = encode(idm, vq, frames["train"], t, "cpu")
    group, chosen = group_latents(quantised, args.num_groups, args.seed)
    labels = load_labels(frames, {"train": t[: args.num_labels]}) if args.num_labels else {}
    share, names = np.bincount(group) / len(t), [""] * len(chosen)
    # what a key does: the dream's latent, the real game's action or None, and its name
    keys = {("group", g): (quantised[i], None, f"group {g + 1}") for g, i in enumerate(chosen)}
    if labels:
        of_action, told = latents_of_actions(z, labels["train"])
        of_action = torch.from_numpy(of_action)
        of_action = (vq(of_action)[0] if vq else of_action).numpy()  # (15, latent_dim)
        keys |= {("action", a): (of_action[a], a, name) for a, name in enumerate(ACTIONS)}
        for g, i in enumerate(chosen):
            move = int(np.bincount(told[group == g]).argmax())
            names[g] = ACTIONS[move]
            keys["group", g] = quantised[i], move, f"group {g + 1}, real game: {names[g]}"

    # both worlds; several threads wait for each other longer than they work
    torch.set_num_threads(1)
    levels = data["num_levels"], data["start_level"]
    world = World(fdm, lambda level: make_env(args.env_id, 1, *levels, args.seed + level))
    world.step(torch.from_numpy(quantised[:1]), None)  # the first one is slow
    world.restart(0)
    lock = threading.Lock()

    def respond(held, command):
        """What the page shows next: both frames after a step under the held keys, or after a command."""
        key, milliseconds = read_keys(held, len(chosen)), 0.0
        z, action, name = keys.get(key, (None, None, "nothing"))
        with lock:
            if command == "wake":
                world.wake()
            elif command in ("restart", "next"):
                world.restart(world.level + (command == "next"))
            elif z is not None:
                began = time.perf_counter()
                world.step(torch.from_numpy(z)[None], action)
                milliseconds = 1000 * (time.perf_counter() - began)
            dream, real = (base64.b64encode(picture.tobytes()).decode() for picture in world.pictures())
            answer = {"dream": dream, "real": real, "frame": world.frame, "over": world.over, "held": name}
            errors = world.errors() if labels else None
            return answer | {"milliseconds": milliseconds, "errors": errors}

    config = {"game": args.env_id, "labels": len(labels.get("train", ())), "fps": args.fps}
    config["groups"] = [[round(100 * s), name] for s, name in zip(share, names)]
    page = Path(__file__).with_suffix(".html").read_text().replace("{CONFIG}", json.dumps(config))
    try:
        server = make_server(args.port, page, respond)
    except (OSError, OverflowError) as e:
        sys.exit(f"error: --port {args.port} on 127.0.0.1 cannot be used ({e}): another, or 0 for a free one")
    print(f"play at http://127.0.0.1:{server.server_port} (Ctrl-C ends it)", flush=True)
    server.serve_forever()
