"""Playing the dream: a step of it by hand, the real game beside it, keys, the latents behind them, the server, and the page in a browser."""

import base64
import http.client
import json
import re
import shutil
import signal
import socket
import socketserver
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ENV_ID, ROOT, inline, link_tree, run_dir

import lapo_play as play

FLAGS = f"--env-id {ENV_ID} --num-windows 300 --num-labels 200 --num-codes 3 --port 0".split()
LEVELS = (16, 0)  # of the toy dataset


@pytest.fixture(scope="module")
def server(pipeline):
    """The script serving the toy pipeline's checkpoint in a process of its own: its port. Ctrl-C ends it at once, without a word."""
    command = [sys.executable, str(ROOT / "lapo_play.py"), *FLAGS]
    process = subprocess.Popen(command, cwd=pipeline.cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    said = ""
    while "play at" not in said:
        said = process.stdout.readline()
        assert said, process.stderr.read()
    yield int(re.search(r"http://127\.0\.0\.1:(\d+) ", said)[1])
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 0 and "Traceback" not in stderr


@pytest.fixture
def respond(pipeline, monkeypatch):
    """Runs the script in this process up to serving; returns its globals."""

    def run(*flags, cwd=None):
        monkeypatch.setattr(socketserver.BaseServer, "serve_forever", lambda self: None)
        return inline(monkeypatch, cwd or pipeline.cwd, "lapo_play", *FLAGS, *flags)

    return run


def request(port, path, method="POST", address="127.0.0.1", body=None, **headers):
    """(status, text) of a request."""
    connection = http.client.HTTPConnection(address, port, timeout=20)
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    return response.status, response.read().decode()


def step(port, keys="", command=""):
    """The server's answer to one frame, pictures as arrays."""
    status, text = request(port, f"/step?keys={keys}&command={command}")
    assert status == 200, text
    answer = json.loads(text)
    return answer | {name: np.frombuffer(base64.b64decode(answer[name]), np.uint8).reshape(64, 64, 3) for name in ("dream", "real")}


def new_env(level):
    return play.make_env(ENV_ID, 1, *LEVELS, 1 + level)


def network(width=4, latent_dim=16):
    torch.manual_seed(0)
    return play.FDM(latent_dim, width).eval()


def test_dream_step_is_the_fdms():
    """A step is the forward dynamics model on the dream's own last two frames, of which the first two are the real game's, clamped to pixels."""
    fdm, z = network(), torch.randn(3, 1, 16, generator=torch.Generator().manual_seed(0))
    world, env = play.World(fdm, new_env), new_env(0)
    frames = [env.observe()[1]["rgb"][0]]
    env.act(np.array([4], dtype=np.int32))  # stay
    frames = [torch.from_numpy(obs).permute(2, 0, 1)[None].float() / 255 - 0.5 for obs in (*frames, env.observe()[1]["rgb"][0])]
    for k in range(3):
        world.step(z[k], None)
        with torch.no_grad():
            frames.append(fdm(torch.cat(frames[-2:], dim=1), z[k]).clamp(-0.5, 0.5))
        torch.testing.assert_close(world.dream[1], frames[-1], atol=1e-6, rtol=0)
        assert np.abs(world.pictures()[0] / 255 - 0.5 - frames[-1][0].permute(1, 2, 0).numpy()).max() <= 0.5 / 255 + 1e-6
    assert world.frame == 3 and not torch.equal(frames[-1], frames[-2])
    np.testing.assert_array_equal(world.pictures()[1], world.start)  # without an action the real game stands still
    world.wake()
    torch.testing.assert_close(torch.cat(world.dream), torch.cat(frames[:2]), atol=1e-6, rtol=0)
    assert world.errors() == [0, 0]


def test_real_game_is_procgen():
    """Under a held action the real game is an env stepped by hand, frame by frame; it stops at the episode's end; the same level starts the same."""
    world = play.World(network(), new_env)
    for level in (1, 1, 2):
        world.restart(level)
        env, done, k = new_env(level), False, 0
        env.act(np.array([4], dtype=np.int32))
        while not done and k < 400:
            last = env.observe()[1]["rgb"][0]
            np.testing.assert_array_equal(world.pictures()[1], last)
            env.act(np.array([7], dtype=np.int32))
            world.act(7)
            done, k = env.observe()[2][0], k + 1
            assert world.over == done
        if done:
            world.act(7)
            np.testing.assert_array_equal(world.pictures()[1], last)
    assert done and k > 3


def test_keys_are_procgens_combinations():
    """The keys that spell one of Procgen's 15 combinations stand for the action of its index, whose name says the same."""
    combos = new_env(0).combos
    assert len(combos) == 15
    for action, combo in enumerate(combos):
        keys = [name.lower() if len(name) == 1 else "Arrow" + name.capitalize() for name in combo]
        assert play.read_keys(keys, 0) == play.read_keys(keys[::-1], 0) == ("action", action)
        assert play.ACTIONS[action].removeprefix("button ").lower() == (" ".join(combo).lower() or "stay")


@pytest.mark.parametrize(
    "keys, held",
    [("ArrowRight ArrowLeft", ("action", 4)), ("ArrowUp d", ("action", 9)), ("1", ("code", 0)), ("ArrowUp d 3", ("code", 2))],
)
def test_keys_held_together(keys, held):
    """Opposite arrows cancel out; a number goes before a letter, a letter before arrows."""
    assert play.read_keys(keys.split(), 3) == held


@pytest.mark.parametrize("keys", [["4"], ["ArrowRight", "x"], ["D"], ["Arrow"], ["1" * 1000]])
def test_unknown_keys(keys):
    """A key that is not on the page is refused by its name, in short."""
    with pytest.raises(ValueError, match=f"no key is called '{keys[-1][:20]}'"):
        play.read_keys(keys, 3)


def test_latents_of_actions():
    """Latents that say left or right, up or down in two of their dimensions are found, also for a pair that has no label."""
    rng = np.random.default_rng(0)
    actions = rng.integers(15, size=2000)
    move = np.where(actions < 9, actions, 4)
    z = np.stack([move // 3 - 1, move % 3 - 1, actions == 9, 0 * move], axis=1) + 0.3 * rng.standard_normal((2000, 4))
    labelled = actions[:300][actions[:300] != 0]  # no left down
    z = np.concatenate([z[:300][actions[:300] != 0], z[300:]]).astype(np.float32)
    latents, told = play.latents_of_actions(z, labelled)
    for action, name in enumerate(play.ACTIONS[:9]):
        x, y = ("right" in name) - ("left" in name), ("up" in name) - ("down" in name)
        np.testing.assert_allclose(latents[action, :2], [x, y], atol=0.45, err_msg=name)
    assert latents[9, 2] > 0.8 > 0.5 > np.abs(latents[10:, 2]).max()
    assert (told[:300] == move[actions != 0][: len(told)][:300]).mean() > 0.6 and 0 not in told


def test_frequent_groups():
    """Groups come in order of their size, each with a window of its own near its centre; there are no more of them than joint codes."""
    rng = np.random.default_rng(0)
    which = rng.permutation(np.repeat([0, 1, 2], [20, 100, 50]))
    z = (np.eye(3)[which] + 0.05 * rng.standard_normal((170, 3))).astype(np.float32)
    chosen, group = play.frequent_groups(z, z, 3, 0)
    assert np.bincount(group).tolist() == [100, 50, 20] and which[chosen].tolist() == [1, 2, 0] and group[chosen].tolist() == [0, 1, 2]
    z = np.eye(3, dtype=np.float32)[which]
    assert np.bincount(play.frequent_groups(z, which[:, None], 8, 0)[1]).tolist() == [100, 50, 20]


def test_script_with_labels(pipeline, respond):
    """Arrows give the dream their action's latent, which is made of codes, and the real game that action; numbers a group's latent and a move."""
    script = respond()
    world, env = script["world"], new_env(0)
    vq, codes, moves = script["vq"], script["codes"], script["moves"]
    assert codes.shape == (3, 16) and moves.shape == (15, 16) and 0.99 < script["share"].sum() < 1.01 and (np.diff(script["share"]) <= 0).all()
    for z in (codes, moves):
        torch.testing.assert_close(vq(z)[0], z)
    env.act(np.array([4], dtype=np.int32))
    for k, (keys, z, action) in enumerate(
        ((["ArrowRight"], moves[7:8], 7), ([], moves[4:5], 4), (["2"], codes[1:2], script["move_of_code"][1]), (["d"], moves[9:10], 9))
    ):
        before = torch.cat(world.dream, dim=1)
        answer = script["respond"](keys, "")
        with torch.inference_mode():
            torch.testing.assert_close(world.dream[1], script["fdm"](before, z).clamp(-0.5, 0.5))
        env.act(np.array([action], dtype=np.int32))
        np.testing.assert_array_equal(world.real[1], env.observe()[1]["rgb"][0])
        assert answer["frame"] == k + 1 and play.ACTIONS[action] in answer["held"] and answer["errors"] == world.errors()
    assert script["respond"](["d"], "wake")["errors"][0] == 0 and world.frame == 4
    assert script["respond"]([], "next")["level"] == 1 and world.frame == 0 and script["respond"]([], "restart")["level"] == 1


@pytest.mark.parametrize("how", ["no actions.npy", "no-vq"])
def test_script_without_labels(pipeline, respond, tmp_path, how):
    """Without labels, by their absence or by --num-labels 0: numbers move the dream, arrows nothing, and the real game stands still."""
    cwd, flags = link_tree(pipeline.cwd, tmp_path / "work"), []
    if how == "no-vq":
        flags = ["--num-labels", "0", "--pretrain-checkpoint", "no_vq.pt"]
        checkpoint = torch.load(pipeline.checkpoints["lapo_pretrain"], weights_only=True)
        checkpoint["meta"]["args"]["vq"] = False
        torch.save(checkpoint, cwd / "no_vq.pt")
    else:
        (cwd / "data" / ENV_ID / "train" / "actions.npy").unlink()
    script = respond(*flags, cwd=cwd)
    assert script["config"]["labels"] == 0 and (script["vq"] is None) == (how == "no-vq")
    sizes = np.bincount(script["group"])
    assert len(sizes) <= 3 and (np.diff(sizes) <= 0).all() and torch.equal(script["codes"], script["quantised"][script["chosen"]])
    first = script["respond"]([], "")
    assert script["respond"](["ArrowRight"], "") == first and first["frame"] == 0 and first["held"] == "nothing"
    answer = script["respond"](["1"], "")
    assert answer["frame"] == 1 and answer["dream"] != first["dream"] and answer["real"] == first["real"] and answer["errors"] is None


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--env-id pong", ("pong__lapo_pretrain__1", "lapo_pretrain.py --env-id pong")),
        ("--seed 7", (str(run_dir("lapo_pretrain", 7) / "checkpoint.pt"), f"`python lapo_pretrain.py --env-id {ENV_ID} --seed 7`")),
        (f"--pretrain-checkpoint {run_dir('lapo_bc') / 'checkpoint.pt'}", ("has stage lapo_bc, expected lapo_pretrain",)),
        ("--data-dir nowhere", ("no dataset at nowhere", f"`python collect_expert_data.py --env-id {ENV_ID} --data-dir nowhere`")),
        ("--num-windows 100000", ("--num-windows 100000 exceeds the", "lower it or collect more")),
        ("--num-labels 301", ("--num-labels 301 exceeds --num-windows 300",)),
        ("--num-codes 10", ("--num-codes is 10, expected at most 9",)),
        ("--num-codes 0", ("--num-codes is 0, expected at least 1",)),
        ("--port 65536", ("--port is 65536, expected at most 65535",)),
        ("--fps 0", ("--fps is 0.0, expected at least 1",)),
    ],
)
def test_refusals(respond, flags, words):
    """What cannot work is refused in one sentence that names the flag or file and what to do."""
    with pytest.raises(SystemExit) as caught:
        respond(*flags.split())
    message = caught.value.code
    assert message.startswith("error: ") and "\n" not in message and all(word in message for word in words)


@pytest.mark.parametrize("part", ["idm", "fdm"])
def test_networks_that_are_not_finite(pipeline, respond, tmp_path, part):
    """A checkpoint whose networks make numbers that are not finite is refused before anything is served."""
    checkpoint = torch.load(pipeline.checkpoints["lapo_pretrain"], weights_only=True)
    last = [name for name in checkpoint[part] if name.endswith("bias")][-1]
    checkpoint[part][last].fill_(float("nan"))
    torch.save(checkpoint, tmp_path / "nan.pt")
    with pytest.raises(SystemExit, match=f"error: the {part.upper()} in .*nan.pt makes numbers that are not finite"):
        respond("--pretrain-checkpoint", str(tmp_path / "nan.pt"))


def test_port_in_use(respond, server):
    """A port that is taken is refused."""
    with pytest.raises(SystemExit) as caught:
        respond("--port", str(server))
    assert f"--port {server} on 127.0.0.1 cannot be used (Address already in use)" in caught.value.code


def test_server_plays(server):
    """Over HTTP: restart shows both worlds alike, a held key moves both, and the same keys give the same frames again."""
    played = []
    for _ in range(2):
        start = step(server, command="restart")
        np.testing.assert_array_equal(start["dream"], start["real"])
        assert start["frame"] == 0
        played.append([step(server, "ArrowRight,ArrowUp") for _ in range(3)])
    for k in range(3):
        for name in ("dream", "real"):
            np.testing.assert_array_equal(played[0][k][name], played[1][k][name])
        assert played[0][k]["held"] == "right up" and played[0][k]["frame"] == k + 1
    assert played[1][2]["rate"] > 0 and played[1][2]["milliseconds"] > 0


@pytest.mark.parametrize(
    "status, path, headers",
    [
        (403, "/step", {"Host": "evil.example"}),
        (403, "/step", {"Host": "127.0.0.1"}),
        (403, "/step", {"Origin": "http://evil.example"}),
        (403, "/step", {"Origin": "null"}),
        (400, "/step?keys=Enter", {}),
        (400, "/step?keys=4", {}),
        (400, "/step?keys=1&keys=2", {}),
        (400, "/step?keys=%ff", {}),
        (400, "/step?command=delete", {}),
        (400, "/step?path=/etc/passwd", {}),
        (400, "/step?" + "&".join(["keys=1"] * 50), {}),
        (400, "/step?;", {}),
        (400, "/step", {"body": "keys=1"}),
        (404, "/../../etc/passwd", {}),
        (404, "//etc/passwd", {}),
        (403, "http://evil.example/", {}),
        (404, "/", {}),
    ],
)
def test_server_refuses(server, status, path, headers):
    """Another name or page (403), bad input (400), another path or method (404): one line, and the server goes on."""
    found, text = request(server, path, **headers)
    assert found == status and text and "\n" not in text and "Traceback" not in text
    assert step(server, command="restart")["frame"] == 0


def test_server_serves_the_page_to_this_machine_only(server):
    """GET / is the page, by both names of this machine, with nothing from elsewhere in it; other addresses and methods are refused."""
    for host in ("127.0.0.1", "localhost"):
        status, page = request(server, "/", "GET", Host=f"{host}:{server}")
        assert status == 200 and f'"game": "{ENV_ID}"' in page and not re.search(r"https?://|src=|@import", page)
    assert request(server, "/", "GET", Host="evil.example")[0] == 403
    assert request(server, "/step", "GET")[0] == 404 and request(server, "/", "DELETE")[0] == 501
    for line in (b"nonsense\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\xff\x00\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", server), timeout=20) as connection:
            connection.sendall(line)
            assert re.search(rb"40\d|505", connection.recv(4096))
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", server), timeout=20)  # bound to all addresses, it would answer


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_page_in_a_browser(server, tmp_path):
    """In headless Chromium the page runs: with a key held by itself (#demo) frames advance, and the page shows the key, the rate and no error."""
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--virtual-time-budget=2000", "--dump-dom"]
    done = subprocess.run([*command, f"http://127.0.0.1:{server}/#demo=ArrowRight,ArrowUp"], capture_output=True, text=True, timeout=100)
    text = {name: re.search(rf'<span id="{name}"[^>]*>(.*?)</span>', done.stdout)[1] for name in ("held", "frame", "rate", "note")}
    assert int(text["frame"].split()[1]) >= 10 and text["held"] == "held: right up"
    assert re.match(r"\d+\.\d frames/s \(at most 15\)", text["rate"]) and "No answer" not in text["note"]
    assert done.stdout.count('aria-pressed="true"') == 2
