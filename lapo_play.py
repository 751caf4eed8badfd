# /// script
# requires-python = ">=3.10,<3.13"
# dependencies = [
#   "torch==2.13.0", "procgen-mirror==0.10.7", "gym==0.26.2", "numpy<2", "tyro", "tensorboard", "tqdm", "pillow", "scikit-learn>=1.7", "matplotlib",
# ]
# ///
"""Play the dream: the learned world of lapo_pretrain.py under your fingers, on a local web page, with the real game beside it.

    dream      o^_{t+1} = FDM(o^_{t-1}, o^_t, z)      from its own last two frames and the latent z of the key that is held
    real       Procgen, under the true action that the key stands for

Both start from the real game's first two frames; after that the dream sees nothing of it. Arrows and the letters D A W S Q E are Procgen's 15
actions: a few labels (--num-labels) choose a latent for each. Number keys hold the most frequent groups of latents, for which no label is needed.

Reads data/ENV_ID and runs/ENV_ID__lapo_pretrain__SEED/checkpoint.pt; writes nothing. Serves 127.0.0.1 only; Ctrl-C ends it.
    python lapo_play.py --env-id bossfight
"""

import base64
import json
import signal
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import torch
import tyro
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from lapo_bc import load_checkpoint, load_network, num_latents
from lapo_decode import make_env
from lapo_pretrain import FDM, IDM, VQ, first_line, get_windows, load_actions, load_frames, load_meta, require, same_place

# Procgen's actions 0-8 are 3 * (right + 1) + (up + 1); 9-14 are buttons
ACTIONS = ["left down", "left", "left up", "down", "stay", "up", "right down", "right", "right up", *(f"button {b}" for b in "DAWSQE")]
STAY = ACTIONS.index("stay")

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Play the dream</title>
<link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark; --line: #8886; --on: #0072b2; --bad: #d55e00 }
body { font: 16px/1.45 system-ui, sans-serif; max-width: 60rem; margin: 1rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.1rem; margin: 1rem 0 0.3rem } p { margin: 0.3rem 0 }
.worlds { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; margin: 0.8rem 0; max-width: 90vh }
figure { margin: 0 } figcaption { font-size: 0.9rem; margin-top: 0.3rem }
.worlds canvas { width: 100%; aspect-ratio: 1; image-rendering: pixelated; border: 1px solid var(--line); border-radius: 4px; display: block }
.worlds .over { opacity: 0.35 }
#plot { width: 100%; height: 7rem; display: block; border: 1px solid var(--line); border-radius: 4px }
#status { display: flex; flex-wrap: wrap; gap: 0.2rem 2rem; font-variant-numeric: tabular-nums; margin-bottom: 0.5rem }
.keys { display: flex; flex-wrap: wrap; gap: 0.8rem 2rem; align-items: end }
.row { display: flex; gap: 0.3rem; justify-content: center; margin-top: 0.3rem }
.keys p { font-size: 0.85rem; margin: 0 }
button { font: inherit; min-width: 3.2rem; padding: 0.2rem 0.4rem; border: 1px solid var(--line); border-radius: 6px; background: #8882;
  color: inherit; touch-action: none; user-select: none; cursor: pointer }
button small { display: block; font-size: 0.7rem; opacity: 0.75; white-space: nowrap }
button[aria-pressed=true] { background: var(--on); border-color: var(--on); color: #fff }
.dream { color: var(--bad) } .still { opacity: 0.6 } ul { margin: 0.3rem 0; padding-left: 1.2rem }
</style>
</head>
<body>
<h1>Play the dream: <span id="game"></span></h1>
<p id="intro"></p>
<div class="worlds">
<figure><canvas id="dream" width="64" height="64" role="img" aria-label="the dream: frames made by the forward dynamics model"></canvas>
<figcaption><b>Dream.</b> Every frame is made by the forward dynamics model from its own last two frames and the latent of the held
key.</figcaption></figure>
<figure><canvas id="real" width="64" height="64" role="img" aria-label="the real game"></canvas>
<figcaption id="real-caption"></figcaption></figure>
</div>
<div id="status"><span id="held"></span><span id="frame"></span><span id="rate"></span><span id="note" role="alert"></span></div>
<div class="keys" id="keys"></div>
<div id="drift"><h2>How far apart they are</h2>
<canvas id="plot" role="img" aria-label="mean squared difference between dream and real game, over the frames since the start"></canvas>
<p><span class="dream">&#9632; dream</span> against the real game, mean squared difference of pixels in 0 &#8230; 1;
<span class="still">&#9633; the first frame, standing still (dashed)</span>, against the same. Above the dashed line, the dream tells less than no
model at all.</p>
</div>
<h2>What to look for</h2>
<ul>
<li><b>Different keys, different dreams.</b> Restart and hold another key. If every key gives the same dream, the latents carry nothing; if keys
change the background and not the hero, they carry what changes most in the picture, not what was done.</li>
<li><b>The dream drifts</b>, at first because a key is <em>one</em> latent for all situations: the same when running, jumping or against a wall.</li>
<li><b>It blurs</b>, because training rewards the mean of all frames that may follow; and each frame is made from blurred ones, so errors add up,
in the end to stripes and wrong colours.</li>
<li><b>What leaves the picture is forgotten, what enters it is invented:</b> two frames and a latent are all that the model knows. It may run through
walls, or lose its hero.</li>
<li><b>Space wakes it up:</b> the dream goes on from the real game's last two frames. How long until it is lost again?</li>
</ul>
<script>
"use strict";
const CONFIG = {CONFIG};
const $ = id => document.getElementById(id), held = new Set(), buttons = {}, errors = [];
let command = "restart";
const COMMANDS = {r: "restart", n: "next", " ": "wake"};

$("game").textContent = CONFIG.game;
$("intro").textContent = CONFIG.labels
  ? `Hold the keys below. ${CONFIG.labels} action labels chose a latent for each of Procgen's actions; number keys hold frequent latents as they are.`
  : "Hold a number key. Each holds a frequent group of latents; the dream stands still while none is held.";
$("real-caption").innerHTML = CONFIG.labels
  ? "<b>Real game.</b> Procgen, under the true action that the key stands for; for a number key, the move that its latents tell of most."
  : "<b>Real game, standing still.</b> There are no action labels: nothing says which true action a latent stands for, so the game cannot follow.";
$("drift").hidden = !CONFIG.labels;

function addKeys(title, rows) {
  const group = document.createElement("div");
  group.innerHTML = `<p>${title}</p>`;
  for (const row of rows) {
    const line = group.appendChild(document.createElement("div"));
    line.className = "row";
    for (const [key, name, more] of row) {
      const b = buttons[key] = line.appendChild(document.createElement("button"));
      b.textContent = name;
      b.appendChild(document.createElement("small")).textContent = more;
      if (COMMANDS[key]) { b.onclick = () => { command = COMMANDS[key]; b.blur(); }; continue; }
      b.setAttribute("aria-pressed", "false");
      b.onpointerdown = () => press(key, true);
      b.onpointerup = b.onpointerleave = () => press(key, false);
      b.onclick = e => { if (e.detail === 0) press(key, !held.has(key)); };  // by Enter or a screen reader: stays down until the next one
    }
  }
  $("keys").appendChild(group);
}
function press(key, down) {
  if (down) held.add(key); else held.delete(key);
  buttons[key].setAttribute("aria-pressed", String(down));
}
if (CONFIG.labels) {
  addKeys("moves, and pairs of them", [[["ArrowUp", "\\u2191", "up"]],
    [["ArrowLeft", "\\u2190", "left"], ["ArrowDown", "\\u2193", "down"], ["ArrowRight", "\\u2192", "right"]]]);
  addKeys("Procgen's buttons, for games that use them", [CONFIG.buttons.map(b => [b, b.toUpperCase(), ""])]);
}
addKeys("both worlds", [[["r", "R", "restart"], ["n", "N", "next level"], [" ", "Space", "wake up"]]]);
const digits = CONFIG.codes.map(([share, name], i) => [String(i + 1), i + 1, `${share}%${name && " \\u2248 " + name}`]);
addKeys("groups of latents: share of the windows" + (CONFIG.labels ? ", \u2248 the move that most of them tell of" : ""), [digits]);

const keyOf = e => e.key.length === 1 ? e.key.toLowerCase() : e.key;
addEventListener("keydown", e => {
  const key = keyOf(e);
  if (!(key in buttons) || e.ctrlKey || e.metaKey || e.altKey) return;
  e.preventDefault();
  if (COMMANDS[key]) command = COMMANDS[key]; else press(key, true);
});
addEventListener("keyup", e => { const key = keyOf(e); if (held.has(key)) press(key, false); });
addEventListener("blur", () => [...held].forEach(key => press(key, false)));

function draw(canvas, pixels) {
  const rgb = Uint8Array.from(atob(pixels), c => c.charCodeAt(0)), image = new ImageData(64, 64);
  for (let i = 0; i < 4096; i++) { image.data.set(rgb.subarray(3 * i, 3 * i + 3), 4 * i); image.data[4 * i + 3] = 255; }
  canvas.getContext("2d").putImageData(image, 0, 0);
}
function plot() {
  const canvas = $("plot"), c = canvas.getContext("2d"), style = getComputedStyle(document.body);
  canvas.width = canvas.clientWidth * devicePixelRatio;
  canvas.height = canvas.clientHeight * devicePixelRatio;
  const x = canvas.width / Math.max(150, errors.length), top = Math.max(0.01, ...errors.flat());
  c.lineWidth = 2 * devicePixelRatio;
  [["#888", 1, [6, 4]], ["#d55e00", 0, []]].forEach(([color, k, dash]) => {
    c.strokeStyle = color;
    c.setLineDash(dash.map(d => d * devicePixelRatio));
    c.beginPath();
    errors.forEach((e, i) => c.lineTo(i * x, canvas.height * (0.95 - 0.9 * e[k] / top)));
    c.stroke();
  });
  c.fillStyle = style.color;
  c.font = `${12 * devicePixelRatio}px system-ui, sans-serif`;
  c.textAlign = "right";
  c.fillText(`top: ${top.toFixed(3)}, bottom: 0`, canvas.width - 8 * devicePixelRatio, 16 * devicePixelRatio);
  c.textAlign = "left";
  for (let i = 50; i * x < canvas.width; i += 50) c.fillText(`| frame ${i}`, i * x, canvas.height - 8 * devicePixelRatio);
}
async function run() {
  for (;;) {
    const began = performance.now(), query = new URLSearchParams({keys: [...held].join(","), command});
    command = "";
    try {
      const response = await fetch("/step?" + query, {method: "POST"});
      if (!response.ok) throw new Error(await response.text());
      const r = await response.json();
      draw($("dream"), r.dream);
      draw($("real"), r.real);
      $("real").classList.toggle("over", r.over);
      $("held").textContent = "held: " + r.held;
      $("frame").textContent = "frame " + r.frame;
      $("rate").textContent = `${r.rate.toFixed(1)} frames/s (at most ${CONFIG.fps}); the model takes ${r.milliseconds.toFixed(1)} ms a frame`;
      $("note").textContent = r.over ? "The real game's episode is over: R restarts, N takes another level." : "";
      if (r.frame === 0) errors.length = 0;
      if (r.errors && !r.over) errors.push(r.errors);
      plot();
    } catch (e) {
      $("note").textContent = "No answer: " + e.message;
      await new Promise(go => setTimeout(go, 1000));
    }
    await new Promise(go => setTimeout(go, Math.max(0, 1000 / CONFIG.fps - (performance.now() - began))));
  }
}
if (location.hash.startsWith("#demo"))  // #demo or #demo=ArrowRight,ArrowUp holds keys by itself
  for (const key of (location.hash.slice(6) || (CONFIG.labels ? "ArrowRight" : "1")).split(",")) if (key in buttons) press(key, true);
run();
</script>
</body>
</html>
"""


@dataclass
class Args:
    seed: int = 1
    """seed of the pretraining run, of the choice of windows and labels, and of the first level"""
    bf16: bool = False
    """run the networks' forward pass in bfloat16, for a processor that knows it"""
    runs_dir: str = "runs"
    """where the pretraining run lies"""

    env_id: str = "bossfight"
    """the Procgen game, one of the 16"""
    data_dir: str | None = None
    """the dataset of collect_expert_data.py; default data/ENV_ID"""
    pretrain_checkpoint: str | None = None
    """the checkpoint of lapo_pretrain.py; default RUNS_DIR/ENV_ID__lapo_pretrain__SEED/checkpoint.pt"""
    allow_unfinished: bool = False
    """take the checkpoint of an unfinished run, too"""

    num_windows: int = 2048
    """training windows whose latents are looked at to choose those of the keys"""
    num_labels: int = 512
    """how many of these windows' true actions may be read; 0, or no actions.npy: number keys only"""
    num_codes: int = 8
    """groups of latents on the number keys, at most 9"""
    port: int = 8000
    """the page's port on 127.0.0.1, 0: any free one"""
    fps: float = 15.0
    """frames per second at most; Procgen's games are shown at 15"""


def latents_of_actions(z, actions, top=64):
    """The latent that each of Procgen's actions is played with, (15, latent_dim), and the move that each of z (n, latent_dim) tells of most, (n,).

    The labels are those of the first windows. Three classifiers are fitted on them: left or right, up or down, and the button; so a pair that is
    hardly ever pressed learns from its halves. An action's latent is the mean of the `top` ones that they are surest of. (The mean of the action's
    own labelled windows did worse in a trial on coinrun, where most windows show little but how fast the hero was already.)
    """
    every, move = np.arange(9), np.where(actions < 9, actions, STAY)
    parts = (move // 3, every // 3, slice(0, 9)), (move % 3, every % 3, slice(0, 9)), (np.maximum(actions - 8, 0), np.arange(1, 7), slice(9, 15))
    x, score = StandardScaler().fit_transform(z), np.zeros((len(z), len(ACTIONS)))
    for label, wanted, columns in parts:
        if len(np.unique(label)) > 1:
            classifier = LogisticRegression(C=0.1, class_weight="balanced", max_iter=500).fit(x[: len(label)], label)
            log_p = np.zeros((len(z), 7))  # 0, that is no opinion, on what has no label
            log_p[:, classifier.classes_] = classifier.predict_log_proba(x)
            score[:, columns] += log_p[:, wanted]
    seen = np.unique(move)
    return z[np.argsort(-score, axis=0, kind="stable")[:top]].mean(0), seen[score[:, seen].argmax(1)]


def frequent_groups(z, codes, num_groups, seed):
    """Groups of quantised latents z (n, latent_dim), most frequent first: (windows that stand for them (g,), group of each window (n,)).

    A joint code has N x H indices, and most windows have their own (codes (n, N * H); without VQ the latents themselves), so k-means groups them.
    A group is played with the real latent nearest to its centre.
    """
    kmeans = KMeans(min(num_groups, len(np.unique(codes, axis=0))), n_init=4, random_state=seed).fit(z)
    order = np.argsort(-np.bincount(kmeans.labels_), kind="stable")
    return kmeans.transform(z)[:, order].argmin(0), np.argsort(order)[kmeans.labels_]


def to_input(obs):
    """A frame (64, 64, 3) uint8 as the networks see it, (1, 3, 64, 64) in [-0.5, 0.5]; it is channels-last already."""
    return torch.from_numpy(obs).permute(2, 0, 1)[None] / 255 - 0.5


class World:
    """The real game and the dream of it, both from the real game's first two frames: the second comes of no key held."""

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
        """One frame of the dream under latent z (1, latent_dim), and of the real game under an action, or None."""
        self.dream = [self.dream[1], self.fdm(torch.cat(self.dream, dim=1), z).clamp(-0.5, 0.5)]
        self.frame += 1
        if action is not None:
            self.act(action)

    def errors(self):
        """Mean squared difference to the real game's frame: of the dream, and of the first frame, standing still."""
        return [(frame - to_input(self.real[1])).pow(2).mean().item() for frame in (self.dream[1], to_input(self.start))]

    def pictures(self):
        """Dream and real frame, (64, 64, 3) uint8."""
        return ((self.dream[1][0] + 0.5) * 255).round().byte().permute(1, 2, 0).numpy(), self.real[1]


def read_keys(keys, num_codes):
    """The names of the held keys -> ("code", its index) for a number, else ("action", one of Procgen's 15); the first number, then a button, wins."""
    numbers = [str(i + 1) for i in range(num_codes)]
    known = {"ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", *"dawsqe", *numbers}
    for key in keys:
        if key not in known:
            raise ValueError(f"no key is called {key[:20]!r}")
    for key in keys:
        if key in numbers:
            return "code", numbers.index(key)
    for key in keys:
        if key in "dawsqe":
            return "action", 9 + "dawsqe".index(key)
    x, y = (("Arrow" + more in keys) - ("Arrow" + less in keys) for more, less in (("Right", "Left"), ("Up", "Down")))
    return "action", 3 * (x + 1) + (y + 1)


def make_server(port, page, respond):
    """A server on 127.0.0.1: GET / is the page, POST /step?keys=...&command=... is respond(keys, command) as JSON; it opens no file.

    Other pages in the same browser can send requests here, too. Those that come by another name (Host) or from another page (Origin) are refused.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version, server_version, sys_version, timeout = "HTTP/1.1", "lapo_play", "", 60
        disable_nagle_algorithm = True  # which would hold an answer back for 40 ms

        def answer(self, status, body, kind="text/plain"):
            body = body.encode()
            self.send_response(status)
            for name, value in {
                "Content-Type": f"{kind}; charset=utf-8",
                "Content-Length": str(len(body)),
                "Cache-Control": "no-store",
                "X-Content-Type-Options": "nosniff",
                "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
                "img-src data:; frame-ancestors 'none'",
            }.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def handle_request(self):
            host, port = self.headers.get("Host"), self.server.server_address[1]
            if host not in (f"127.0.0.1:{port}", f"localhost:{port}") or self.headers.get("Origin", f"http://{host}") != f"http://{host}":
                return self.answer(403, f"this page answers to http://127.0.0.1:{port} only, and to no other page")
            if self.headers.get("Content-Length", "0") != "0" or "Transfer-Encoding" in self.headers:
                self.close_connection = True  # the body stays unread
                return self.answer(400, "a request has no body here")
            url = urlsplit(self.path)
            if (self.command, self.path) == ("GET", "/"):
                return self.answer(200, page, "text/html")
            if (self.command, url.path) != ("POST", "/step"):
                return self.answer(404, "GET / or POST /step")
            try:
                query = parse_qs(url.query, strict_parsing=bool(url.query), keep_blank_values=True, errors="strict", max_num_fields=2)
                if not query.keys() <= {"keys", "command"} or any(len(values) > 1 for values in query.values()):
                    raise ValueError("expected keys=...&command=..., each once")
                keys = [key for key in query.get("keys", [""])[0].split(",") if key]
                response = respond(keys, query.get("command", [""])[0])
            except ValueError as e:
                return self.answer(400, first_line(e))
            self.answer(200, json.dumps(response), "application/json")

        do_GET = do_POST = handle_request

        def log_message(self, *_):
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, request, client_address):
            if not isinstance(sys.exc_info()[1], OSError):  # a page that was closed is no error
                super().handle_error(request, client_address)

    return Server(("127.0.0.1", port), Handler)


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    signal.signal(signal.SIGINT, lambda *_: sys.exit(0))
    require(args, num_windows=1, num_labels=0, num_codes=1, port=0, fps=1)
    for flag, most in (("num_codes", 9), ("port", 65_535)):
        if getattr(args, flag) > most:
            sys.exit(f"error: --{flag.replace('_', '-')} is {getattr(args, flag)}, expected at most {most}")
    data_dir = Path(args.data_dir or f"data/{args.env_id}")
    path = Path(args.pretrain_checkpoint or Path(args.runs_dir) / f"{args.env_id}__lapo_pretrain__{args.seed}" / "checkpoint.pt")
    made_by = f"python lapo_pretrain.py --env-id {args.env_id}" + same_place(args, "data_dir", "runs_dir", "seed")
    pretrained = load_checkpoint(path, "lapo_pretrain", args, made_by, ("idm", "vq", "fdm"))
    p = pretrained["meta"]["args"]
    vq_shape = ("vq_num_codebooks", "vq_num_slots", "vq_dim", "vq_num_codes", "vq_commitment", "vq_decay")
    idm = load_network(lambda: IDM(p["idm_scale"], num_latents(p), p["patch_size"]), pretrained["idm"], path, made_by)
    vq = load_network(lambda: VQ(*(p[key] for key in vq_shape)), pretrained["vq"], path, made_by) if p.get("vq", True) else None
    fdm = load_network(lambda: FDM(num_latents(p), p["fdm_width"], p["predict_change"], p["patch_size"]), pretrained["fdm"], path, made_by)
    data_meta = load_meta(data_dir, args.env_id)
    frames, valid_t = load_frames(data_dir, "train", data_meta)
    t = np.random.default_rng(args.seed).permutation(valid_t)[: args.num_windows]
    if len(t) < args.num_windows:
        sys.exit(f"error: --num-windows {args.num_windows} exceeds the {len(t)} training windows of {data_dir}: lower it or collect more frames")
    has_labels = args.num_labels > 0 and (data_dir / "train" / "actions.npy").exists()
    if has_labels and args.num_labels > len(t):
        sys.exit(f"error: --num-labels {args.num_labels} exceeds --num-windows {len(t)}: lower it, or raise --num-windows")
    for network in (idm, fdm, *([vq] if vq else [])):
        network.to(memory_format=torch.channels_last).eval()

    # 1. latents of training windows, continuous and as the FDM is given them
    print(f"reading {len(t)} windows of {data_dir} ...", flush=True)

    @torch.inference_mode()
    def quantise(z):
        return vq(z)[0] if vq else z

    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
        z = torch.cat([idm(get_windows(frames, chunk, "cpu")) for chunk in np.array_split(t, -(-len(t) // 256))])  # (n, latent_dim)
    if not torch.isfinite(z).all():
        sys.exit(f"error: the IDM in {path} makes numbers that are not finite: make it again with `{made_by} --overwrite`")
    quantised = quantise(z)

    # 2. the keys' latents: groups on the numbers, actions on the arrows and letters
    joint = (vq(z)[2].flatten(1) if vq else z).numpy()  # (n, N * H)
    chosen, group = frequent_groups(quantised.numpy(), joint, args.num_codes, args.seed)
    print(f"{len(np.unique(joint, axis=0))} different joint {'codes' if vq else 'latents'}, in {len(chosen)} groups on the number keys", flush=True)
    codes = quantised[chosen]  # (g, latent_dim)
    share = np.bincount(group) / len(t)
    if has_labels:
        labels = load_actions(data_dir, "train", data_meta)[t[: args.num_labels]]
        of_action, told = latents_of_actions(z.numpy(), labels)
        moves = quantise(torch.from_numpy(of_action).float())  # (15, latent_dim)
        move_of_code = [int(np.bincount(told[group == g]).argmax()) for g in range(len(codes))]

    # 3. both worlds. One thread makes a frame in time; on a busy machine several wait for each other longer than they work (benchmark/play_speed.py)
    torch.set_num_threads(1)
    levels = data_meta["num_levels"], data_meta["start_level"]
    world = World(fdm, lambda level: make_env(args.env_id, 1, *levels, args.seed + level))
    world.step(codes[:1], None)  # the first one is slow
    if not torch.isfinite(world.dream[1]).all():
        sys.exit(f"error: the FDM in {path} makes numbers that are not finite: make it again with `{made_by} --overwrite`")
    world.restart(0)
    lock, times, took = threading.Lock(), deque(maxlen=31), deque(maxlen=31)

    def respond(keys, command):
        """What the page shows next: both frames after a step under the held keys, or after a command."""
        if command not in ("", "restart", "next", "wake"):
            raise ValueError(f"no command is called {command[:20]!r}")
        kind, i = read_keys(keys, len(codes))
        with lock:
            if command == "wake":
                world.wake()
            elif command:
                world.restart(world.level + (command == "next"))
            elif kind == "code" or has_labels:
                began = time.perf_counter()
                world.step(*(codes[i : i + 1], move_of_code[i] if has_labels else None) if kind == "code" else (moves[i : i + 1], i))
                if times and began - times[-1] > 1:
                    times.clear()
                times.append(began)
                took.append(time.perf_counter() - began)
            dream, real = (base64.b64encode(picture.tobytes()).decode() for picture in world.pictures())
            held = f"code {i + 1}" + (f", real game: {ACTIONS[move_of_code[i]]}" if has_labels else "") if kind == "code" else ACTIONS[i]
            return {
                "dream": dream, "real": real, "frame": world.frame, "over": world.over, "level": world.level,
                "held": held if kind == "code" or has_labels else "nothing", "errors": world.errors() if has_labels else None,
                "rate": (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 0.0,
                "milliseconds": 1000 * float(np.median(took)) if took else 0.0,
            }  # fmt: skip

    config = {
        "game": args.env_id, "labels": args.num_labels if has_labels else 0, "fps": args.fps, "buttons": list("dawsqe"),
        "codes": [[round(100 * s), ACTIONS[move_of_code[g]] if has_labels else ""] for g, s in enumerate(share)],
    }  # fmt: skip
    try:
        server = make_server(args.port, PAGE.replace("{CONFIG}", json.dumps(config)), respond)
    except OSError as e:
        sys.exit(f"error: --port {args.port} on 127.0.0.1 cannot be used ({e.strerror}): choose another one, or 0 for any that is free")
    with server:
        print(f"play at http://127.0.0.1:{server.server_address[1]} (Ctrl-C ends it)", flush=True)
        server.serve_forever()
