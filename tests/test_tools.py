"""lapo_inspect.py, lapo_play.py and benchmark/ on the toy pipeline: numbers, pictures, pages, tables."""

import base64
import csv
import http.client
import json
import re
import threading
from http.server import ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import plot
import pytest
import torch
import torch.nn.functional as F
from conftest import ENV_ID, OLD, RUNS, TOY, inline, link_tree, load, pretrain, refusal, results_of, run_dir

import lapo_inspect
import lapo_play

INSPECT = f"--env-id {ENV_ID} --no-cuda --rollout-steps 4 --num-groups 5 --action-updates 4".split()
PLAY = f"--env-id {ENV_ID} --num-windows 300 --num-labels 200 --num-groups 3 --port 0".split()


def inspect(cwd, *flags):
    """Runs lapo_inspect.py in this process: its globals, its results.json, its report.html and its folder."""
    found, folder = inline(cwd, "lapo_inspect", *INSPECT, *flags), cwd / run_dir("lapo_inspect")
    more = {"results": results_of(cwd, "lapo_inspect"), "page": (folder / "report.html").read_text()}
    return SimpleNamespace(**found | more | {"folder": folder, "cwd": cwd})


@pytest.fixture(scope="module")
def report(pipeline, tmp_path_factory):
    return inspect(link_tree(pipeline.cwd, tmp_path_factory.mktemp("tools") / "work"))


@pytest.fixture(scope="module")
def networks(pipeline):
    """The pretrained networks, built by lapo_pretrain.py's classes, and the test split."""
    idm, vq, fdm = pretrain.IDM(0.25, 16), pretrain.VQ(2, 4, 2, 64, 0.05, 0.999), pretrain.FDM(16, 4)
    checkpoint, arrays = load(pipeline.checkpoints["lapo_pretrain"]), ("frames", "first", "actions")
    for name, network in (("idm", idm), ("vq", vq), ("fdm", fdm)):
        network.load_state_dict(checkpoint[name])
        network.eval().requires_grad_(False)
    arrays = {name: np.load(pipeline.data / "test" / f"{name}.npy") for name in arrays}
    return SimpleNamespace(idm=idm, vq=vq, fdm=fdm, **arrays)


def test_groups_and_codes(report, networks):
    """Every window is counted once, under its own true action; latents and perplexity are lapo_pretrain's."""
    groups, t = report.results["groups"], report.t["test"]
    z, _, codes, perplexity = networks.vq(networks.idm(pretrain.get_windows(networks.frames, t, "cpu")))
    np.testing.assert_allclose(report.latents, z.numpy(), atol=1e-5)
    assert report.results["perplexity"] == pytest.approx(perplexity.tolist(), rel=1e-4)
    assert report.results["joint_codes"] == len({tuple(code) for code in codes.flatten(1).tolist()})
    table = np.array(groups["actions"])
    assert table.shape == (5, 15) and table.sum() == len(t) == report.results["windows"]
    assert groups["windows"] == table.sum(1).tolist() == sorted(groups["windows"], reverse=True)
    for g, a in np.ndindex(table.shape):
        assert table[g, a] == ((report.group == g) & (networks.actions[t] == a)).sum()
        expected = table[g].sum() * table[:, a].sum() / table.sum()
        assert groups["lift"][g][a] == pytest.approx((table[g, a] + 20) / (expected + 20))
    assert groups["matched_action"] == np.argmax(groups["lift"], axis=1).tolist()


def test_rollout_errors(networks):
    """The first error is the one-step FDM loss, later ones are of fed-back predictions; copying holds o_t."""
    windows = np.flatnonzero(~networks.first[1:-1] & ~networks.first[2:]) + 1
    args = networks.idm, networks.vq, networks.fdm, networks.frames, windows, 4, torch.device("cpu")
    own, other, copying = lapo_inspect.rollout_errors(*args).values()
    t = np.arange(1, len(networks.frames) - 4, 4 + 2)  # stretches that do not overlap, each of one episode
    t = np.array([s for s in t if not networks.first[s : s + 5].any()])
    assert own.shape == copying.shape == (len(t), 4) and len(t) > 10
    before, now, _ = pretrain.get_windows(networks.frames, t, "cpu").split(3, dim=1)
    for step in range(4):
        true = pretrain.get_windows(networks.frames, t + step, "cpu")
        before, now = now, networks.fdm(torch.cat([before, now], dim=1), networks.vq(networks.idm(true))[0])
        assert own[:, step].mean() == pytest.approx(F.mse_loss(now, true[:, 6:]).item(), rel=1e-3)
        assert own[:, step].mean() != other[:, step].mean()
        difference = (networks.frames[t].astype(float) - networks.frames[t + step + 1]) / 255
        assert copying[:, step].mean() == pytest.approx((difference**2).mean(), rel=1e-3)


def test_what_latents_are_worth(networks):
    """Losses with other windows' latents, computed plainly; nothing where all are alike; variance shares."""
    t, episodes = np.arange(1, len(networks.frames) - 1), np.cumsum(networks.first)
    t = t[~networks.first[t] & ~networks.first[t + 1]]
    windows = pretrain.get_windows(networks.frames, t, "cpu")
    z = networks.vq(networks.idm(windows))[0]
    losses = []
    for order in (
        np.arange(len(t)),
        np.random.default_rng(0).permutation(len(t)),
        pretrain.others(episodes[t]),
    ):
        losses.append(F.mse_loss(networks.fdm(windows[:, :6], z[order]), windows[:, 6:]).item())
    found = lapo_inspect.worth(networks.fdm, networks.frames, t, z.numpy(), episodes[t], "cpu")
    assert found["loss"] == pytest.approx(losses[0], rel=1e-4)
    assert (1 + found["any_window"]) * losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert (1 + found["same_episode"]) * losses[0] == pytest.approx(losses[2], rel=1e-4)
    alike = lapo_inspect.worth(
        networks.fdm, networks.frames, t, z.numpy()[:1].repeat(len(t), 0), episodes[t], "cpu"
    )
    assert alike["any_window"] == alike["same_episode"] == 0
    groups = np.arange(900) % 3
    noise = np.random.default_rng(0).normal(size=(900, 4))
    assert lapo_inspect.variance_between(np.eye(4)[groups], groups) == pytest.approx(1)
    assert lapo_inspect.variance_between(noise, groups) < 0.02


def test_an_fdm_of_true_actions():
    """It learns what the action moves, so that another action costs it most of what it predicts."""
    rng, p = np.random.default_rng(0), vars(pretrain.Args(predict_change=True, fdm_width=4, patch_size=4))
    actions = rng.integers(3, size=240)
    frames = np.zeros((242, 64, 64, 3), dtype=np.uint8)
    frames[2:] += (actions * 90).astype(np.uint8)[:, None, None, None]  # o_{t+1} shows a_t
    z, t = np.eye(3, dtype=np.float32)[actions], np.arange(1, 241)
    p |= {"batch_size": 32, "learning_rate": 3e-3, "bf16": False}
    fdm = lapo_inspect.fit_fdm(p, frames, t, z, 150, torch.device("cpu"))
    found = lapo_inspect.worth(fdm, frames, t, z, t // 20, "cpu")
    assert found["any_window"] > 1 and found["same_episode"] > 1


def test_latent_space_metrics():
    """Latents and codes that name the action score 1; shuffled actions leave next to nothing; and lifts."""
    table = np.array([[300, 0, 10] + [0] * 12, [0, 300, 10] + [0] * 12])
    lifts = lapo_inspect.lift(table, table.sum(0))
    assert lifts.argmax(1).tolist() == [0, 1] and lifts[0, :4] == pytest.approx([320 / 170, 20 / 170, 1, 1])
    rng, encoded = np.random.default_rng(0), {}
    actions = {split: rng.integers(6, size=300) for split in ("train", "test")}
    for split, a in actions.items():
        z = 9 * np.eye(6)[a] + 0.1 * rng.normal(size=(300, 6))
        encoded[split] = z.astype(np.float32), None, np.stack([a, a // 2], axis=-1)[:, :, None]
    out = lapo_inspect.latent_space_metrics(encoded, actions)
    assert out["linear_probe"] == out["mlp_probe"] == out["nmi_best_slot"] == 1
    p = [np.bincount(actions["test"] // k) / 300 for k in (1, 2)]
    whole, half = (-(q * np.log(q)).sum() for q in p)  # entropies; a code that is a function of the action
    assert out["nmi"] == pytest.approx((1 + half / ((whole + half) / 2)) / 2) and out["cluster_purity"] > 0.9
    out = lapo_inspect.latent_space_metrics(encoded, {s: rng.permutation(a) for s, a in actions.items()})
    assert max(out["linear_probe"], out["mlp_probe"], out["cluster_purity"]) < 0.35 and out["nmi"] < 0.1


def test_report_stands_alone(report):
    """Every picture in the folder is in the report, byte for byte; it refers to nothing outside itself."""
    embedded = re.findall(r'src="data:image/(?:png|gif);base64,([^"]+)"', report.page)
    names = "latents.png groups.png codebooks.png rollouts.gif rollouts.png error.png lapo_decode.gif".split()
    names += ["lapo_finetune_ppo.gif"]
    found = {path.name for path in report.folder.iterdir()}
    assert found == {*names, "report.html", "results.json"}
    assert {base64.b64decode(x) for x in embedded} == {(report.folder / name).read_bytes() for name in names}
    assert not re.search(r"(src|href)\s*=\s*[\"']?(?!data:)\w|url\(|@import|https?:", report.page)
    assert report.results["missing"] == []
    for given in ("the latent", "the true action"):
        assert f"{report.results['worth'][given]['loss']:.2e}" in report.page
    for of in ("trained", "untrained_idm", "shuffled_actions"):
        assert all(f"{x:.3f}" in report.page for x in report.results["latent_space"][of].values())
    assert "finished report" in refusal(report.cwd, "lapo_inspect", *INSPECT)


def test_report_without_labels_and_vq(pipeline, tmp_path):
    """Without labels, VQ and agents the report is made from what there is, and says what is missing."""
    link_tree(pipeline.data, tmp_path / "data" / ENV_ID)
    (tmp_path / "data" / ENV_ID / "test" / "actions.npy").unlink()
    inline(tmp_path, "lapo_pretrain", *TOY["lapo_pretrain"], "--no-vq", "--num-updates", "1")
    assert "--action-updates" in refusal(tmp_path, "lapo_inspect", *INSPECT)
    more = "--num-starts 1 --rollout-steps 24 --action-updates 0".split()
    report = inspect(tmp_path, *more)  # an env's stream has 25 frames
    wanted = {"groups", "codebooks", "latent_space", "error", "lapo_decode", "lapo_finetune_ppo"}
    assert set(report.results["missing"]) == wanted and all(name in report.page for name in wanted)
    assert list(report.kinds) == ["dream"] and not (report.folder / "groups.png").exists()


@pytest.fixture
def play(pipeline, monkeypatch):
    """Runs lapo_play.py in this process up to serving; returns its globals."""
    monkeypatch.setattr(ThreadingHTTPServer, "serve_forever", lambda self: None)
    return lambda *flags: inline(pipeline.cwd, "lapo_play", *PLAY, *flags)


def new_env(level):
    return lapo_play.make_env(ENV_ID, 1, 16, 0, 1 + level)


def test_worlds(networks):
    """A dream's step is the FDM's on its own last two frames; the real game is Procgen's, to its end."""
    z, world, env = torch.randn(3, 1, 16), lapo_play.World(networks.fdm, new_env), new_env(0)
    frames = [env.observe()[1]["rgb"][0]]
    env.act(np.array([4], dtype=np.int32))  # stay
    frames = [lapo_play.to_input(obs) for obs in (*frames, env.observe()[1]["rgb"][0])]
    for k in range(3):
        world.step(z[k], None)
        frames.append(networks.fdm(torch.cat(frames[-2:], dim=1), z[k]).clamp(-0.5, 0.5))
        torch.testing.assert_close(world.dream[1], frames[-1])
    np.testing.assert_array_equal(world.pictures()[1], world.start)  # without an action the game stands still
    world.wake()
    torch.testing.assert_close(torch.cat(world.dream), torch.cat(frames[:2]))
    assert world.frame == 3 and world.errors() == [0, 0]
    done = False
    while not done and world.frame < 400:
        last = env.observe()[1]["rgb"][0]
        np.testing.assert_array_equal(world.pictures()[1], last)
        env.act(np.array([7], dtype=np.int32))
        world.step(z[0], 7)
        done = env.observe()[2][0]
        assert world.over == done
    assert done
    np.testing.assert_array_equal(world.pictures()[1], last)


def test_playing(play):
    """Arrows give the dream their action's latent, the game that action; numbers a group's, and its move."""
    script = play()
    world, env, keys = script["world"], new_env(0), script["keys"]
    env.act(np.array([4], dtype=np.int32))
    assert len(keys) == 3 + 15
    held = (["ArrowRight"], ("action", 7)), ([], ("action", 4)), (["2"], ("group", 1)), (["d"], ("action", 9))
    for k, (pressed, key) in enumerate(held):
        before, (z, action, name) = torch.cat(world.dream, dim=1), keys[key]
        z = torch.from_numpy(z)[None]
        torch.testing.assert_close(script["vq"](z)[0], z)  # made of codes
        answer = script["respond"](pressed, "")
        with torch.inference_mode():
            torch.testing.assert_close(world.dream[1], script["fdm"](before, z).clamp(-0.5, 0.5))
        env.act(np.array([action], dtype=np.int32))
        np.testing.assert_array_equal(world.real[1], env.observe()[1]["rgb"][0])
        assert answer["frame"] == k + 1 and answer["held"] == name and answer["errors"] == world.errors()
    assert script["respond"](["d"], "wake")["errors"][0] == 0 and world.frame == 4
    script["respond"]([], "next")
    assert world.level == 1 and world.frame == 0

    script = play("--num-labels", "0")  # numbers move the dream, arrows nothing; the real game stands still
    first = script["respond"](["ArrowRight"], "")
    answer = script["respond"](["1"], "")
    assert (first["frame"], first["held"]) == (0, "nothing") and answer["frame"] == 1
    assert answer["dream"] != first["dream"] and answer["real"] == first["real"]


def test_server(monkeypatch, play):
    """On this machine alone, by its own names: the page, steps, and a refusal of other pages and paths."""
    server = play()["server"]
    port = server.server_port
    with pytest.raises(SystemExit, match="cannot be used"):
        play("--port", port)
    monkeypatch.undo()
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def request(path, method="POST", **headers):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request(method, path, None, headers)
        response = connection.getresponse()
        return response.status, response.read().decode()

    for host in ("127.0.0.1", "localhost"):
        status, page = request("/", "GET", Host=f"{host}:{port}")
        assert status == 200 and f'"game": "{ENV_ID}"' in page
        assert not re.search(r"https?://|src=|@import|{CONFIG}", page)
    begun = json.loads(request("/step?keys=&command=restart")[1])
    moved = json.loads(request("/step?keys=ArrowRight,ArrowUp&command=")[1])
    assert begun["frame"] == 0 and begun["dream"] == begun["real"] and moved["held"] == "right up"
    assert len(base64.b64decode(moved["dream"])) == 64 * 64 * 3 and moved["dream"] != begun["dream"]
    for headers in ({"Host": "evil.example"}, {"Host": "127.0.0.1"}, {"Origin": "http://evil.example"}):
        assert request("/step", **headers)[0] == 403
    assert request("/../../etc/passwd")[0] == request("/step", "GET")[0] == request("/", "POST")[0] == 404
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("tool, flags", [("lapo_inspect", INSPECT), ("lapo_play", PLAY)])
def test_refusals(pipeline, tool, flags):
    """Tools refuse what stages refuse, by the same functions, and flags that cannot work."""
    flags = [*flags, *["--exp-name", "fresh"] * (tool == "lapo_inspect")]
    assert "lapo_pretrain.py" in refusal(pipeline.cwd, tool, *flags, "--seed", "7")
    assert "collect_expert_data.py" in refusal(pipeline.cwd, tool, *flags, "--data-dir", "nowhere")
    assert "--num-groups" in refusal(pipeline.cwd, tool, *flags, "--num-groups", "0")


def rows(path):
    return list(csv.DictReader(path.open(newline="")))


def test_results_to_tables_and_pictures(pipeline, report, tmp_path):
    """Every result is one row with results.json's numbers, collected once or twice; plot.py draws them."""
    for _ in range(2):
        inline(report.cwd, "benchmark/collect_results", "--runs-dir", report.cwd / "runs", "--out", tmp_path)
        found = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert found == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    table = {(row["method"], row["n_labels"]): row for row in rows(tmp_path / "runs.csv")}
    tuned = {name for name in RUNS if "finetune" in name}
    offline = {(m, n) for m in ("lapo_decoder", "cloning_from_scratch") for n in ("16", "32")}
    assert set(table) == offline | {(method, "") for method in ("demonstrator", "random", *tuned)}
    for name in tuned:
        wanted, row = pipeline.results[name], table[name, ""]
        assert row["frames"] == "2048" and float(row["return_mean"]) == pytest.approx(wanted["return_mean"])
        assert np.mean(plot.returns_of(row)) == pytest.approx(wanted["return_mean"], abs=1e-2)
    for wanted in pipeline.results["lapo_decode"]["curve"]:
        draws = plot.returns_of(table[wanted["method"], str(wanted["n_labels"])])
        assert [d.mean() for d in draws] == pytest.approx(wanted["draws"], abs=1e-2)
    for row in rows(tmp_path / "latent_space.csv"):
        assert float(row["nmi"]) == report.results["latent_space"][row["of"]]["nmi"]
    inline(tmp_path, "benchmark/plot", "--results", tmp_path, "--scale", "runs", "--resamples", "50")
    pictures = list(tmp_path.glob("*.png"))
    assert pictures and all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    assert any("demonstrator" in path.read_text() for path in tmp_path.glob("*.md"))


def test_shares():
    """Shares of the demonstrator and their mean over games, on returns that do not vary."""
    rows = []
    for game, method, x in zip("aaabbb", ["random", "demonstrator", "vpt"] * 2, (1, 11, 6, -2, 2, 1)):
        row = {"env_id": game, "method": method, "n_labels": "", "returns": f"{x} {x}|{x} {x}"}
        rows += [row | {"seed": seed} for seed in (1, 2)]
    scores = plot.Scores(rows, 50)
    assert scores.interval("a", "vpt", "") == (6, 6, 6, 2, 8) and scores.relative("b", 1) == 0.75
    assert scores.over_games("vpt", "") == (0.625,) * 3 and scores.over_games("rl_sl", "") is None


def test_throughput(tmp_path):
    """throughput.py measures, prints and writes its rows; rows of stages that were not measured stay."""
    out, kept = tmp_path / "t.json", {"stage": "clone", "shapes": "paper", "rate": 7}
    out.write_text(json.dumps({"rows": [kept]}))
    stages = ["env", "load"] if OLD else ["load"]  # procgen's dictionaries end with Python 3.12
    flags = ["--rounds", "1", "--seconds", "0.01", "--no-bf16", "--stages", *stages]
    inline(tmp_path, "benchmark/throughput", *flags, "--shapes", "64 games", "batch 32", "--out", out)
    found = json.loads(out.read_text())["rows"]
    assert kept in found and {row["stage"] for row in found} == {"clone", *stages}
    assert all(row["rate"] > 0 and row["ratio_to_plain"] > 0 for row in found if row != kept)
