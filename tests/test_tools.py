"""inspect_latents, play_dream and benchmark/ on the toy pipeline: numbers, pictures, pages, tables."""

import base64
import csv
import http.client
import json
import re
import threading
from types import SimpleNamespace

import av
import numpy as np
import plot
import pytest
import torch
import torch.nn.functional as F
import tyro
from conftest import (
    ENV_ID,
    RUNS,
    TOY,
    inline,
    link_tree,
    load,
    pretrain,
    refusal,
    replace,
    results_of,
    run_dir,
    same,
)
from test_data import split_args

from tools import inspect_latents, play_dream, steady_dream
from tools.loading import load_lapo

INSPECT = f"--env-id {ENV_ID} --no-cuda --rollout-steps 4 --num-groups 5 --action-updates 4".split()
PLAY = f"--env-id {ENV_ID} --num-windows 300 --num-labels 200 --num-groups 3 --port 0".split()


def inspect(cwd, *flags):
    """Runs tools/inspect_latents.py: its results.json, its report.html and its folder."""
    inline(cwd, "tools/inspect_latents", *INSPECT, *flags)
    folder, results = cwd / run_dir("inspect_latents"), results_of(cwd, "inspect_latents")
    return SimpleNamespace(results=results, page=(folder / "report.html").read_text(), folder=folder, cwd=cwd)


@pytest.fixture(scope="module")
def report(pipeline, tmp_path_factory):
    return inspect(link_tree(pipeline.cwd, tmp_path_factory.mktemp("tools") / "work"))


@pytest.fixture(scope="module")
def lapo(pipeline):
    """The pretrained networks."""
    return load_lapo(load(pipeline.checkpoints["lapo_pretrain"]), "cpu").requires_grad_(False)


@pytest.fixture(scope="module")
def test(pipeline):
    """The test split."""
    return pretrain.load_dataset(split_args(pipeline.data))[2]


def test_groups_and_codes(report, lapo, test):
    """Every window is counted once, under its own true action; latents and perplexity are lapo_pretrain's."""
    groups, t, actions = report.results["groups"], test.windows, pretrain.load_labels(test, "actions")
    z, _, codes, perplexity = lapo.vq(lapo.idm(pretrain.get_windows(test, t, "cpu")))
    assert report.results["perplexity"] == pytest.approx(perplexity.tolist(), rel=1e-4)
    assert report.results["joint_codes"] == len({tuple(code) for code in codes.flatten(1).tolist()})
    table = np.array(groups["actions"])
    assert table.shape == (5, 15) and table.sum() == len(t) == report.results["windows"]
    assert groups["windows"] == table.sum(1).tolist() == sorted(groups["windows"], reverse=True)
    group, _ = inspect_latents.group_latents(z.numpy(), 5, 1)
    for g, a in np.ndindex(table.shape):
        assert table[g, a] == ((group == g) & (actions[t] == a)).sum()
        expected = table[g].sum() * table[:, a].sum() / table.sum()
        assert groups["lift"][g][a] == pytest.approx((table[g, a] + 20) / (expected + 20))
    assert groups["matched_action"] == np.argmax(groups["lift"], axis=1).tolist()


def test_rollout_errors(lapo, test):
    """The first error is the one-step FDM loss, later ones are of fed-back predictions; copying holds o_t."""
    own, other, copying = inspect_latents.rollout_errors(lapo, test, 4, torch.device("cpu")).values()
    t = np.arange(1, len(test.first) - 4, 4 + 2)  # stretches that do not overlap, each of one episode
    t = np.array([s for s in t if not test.first[s : s + 5].any()])
    assert own.shape == copying.shape == (len(t), 4) and len(t) > 10
    before, now, _ = pretrain.get_windows(test, t, "cpu").split(3, dim=1)
    for step in range(4):
        true = pretrain.get_windows(test, t + step, "cpu")
        before, now = now, lapo.fdm(torch.cat([before, now], dim=1), lapo.vq(lapo.idm(true))[0])
        assert own[:, step].mean() == pytest.approx(F.mse_loss(now, true[:, 6:]).item(), rel=1e-3)
        assert own[:, step].mean() != other[:, step].mean()
        difference = (test[t].astype(float) - test[t + step + 1]) / 255
        assert copying[:, step].mean() == pytest.approx((difference**2).mean(), rel=1e-3)


def test_what_latents_are_worth(lapo, test):
    """Losses with other windows' latents, computed plainly; nothing where all are alike; variance shares."""
    t, episodes = test.windows, np.cumsum(test.first)
    windows = pretrain.get_windows(test, t, "cpu")
    z, losses = lapo.vq(lapo.idm(windows))[0], []
    shuffled = np.random.default_rng(0).permutation(len(t))
    for order in (np.arange(len(t)), shuffled, pretrain.other_windows(episodes[t])):
        losses.append(F.mse_loss(lapo.fdm(windows[:, :6], z[order]), windows[:, 6:]).item())
    found = inspect_latents.worth(lapo.fdm, test, t, z.numpy(), episodes[t], "cpu")
    costs = [found["loss"] * (1 + cost) for cost in (0, found["any_window"], found["same_episode"])]
    assert costs == pytest.approx(losses, rel=1e-4)
    groups = np.arange(900) % 3
    noise = np.random.default_rng(0).normal(size=(900, 4))
    assert inspect_latents.variance_between(np.eye(4)[groups], groups) == pytest.approx(1)
    assert inspect_latents.variance_between(noise, groups) < 0.02


@pytest.mark.parametrize("late", [0, 3, -2])
def test_labels_that_are_late(late):
    """Latents tell the label best where it was moved to, within episodes, and a sentence says so."""
    rng = np.random.default_rng(0)
    actions = rng.integers(4, size=600)
    z = np.eye(4)[actions] + 0.1 * rng.normal(size=(600, 4))
    found = inspect_latents.accuracy_by_shift(
        z, np.arange(600), np.roll(actions, late), np.arange(600) // 200
    )
    assert found[late] > 0.95 and max(a for k, a in found.items() if k != late) < 0.5
    words = {0: "aligned", 3: "3 frames late", -2: "2 frames early"}[late]
    assert words in inspect_latents.say_shift(found)


def test_report_stands_alone(report):
    """Every picture in the folder is in the report, byte for byte; it refers to nothing outside itself."""
    embedded = re.findall(r'src="data:image/(?:png|gif);base64,([^"]+)"', report.page)
    names = "latents.png groups.png codebooks.png shifts.png rollouts.gif rollouts.png error.png".split()
    names += ["lapo_decode.gif", "lapo_finetune_ppo.gif"]
    found = {path.name for path in report.folder.iterdir()}
    assert found == {*names, "report.html", "results.json"}
    assert {base64.b64decode(x) for x in embedded} == {(report.folder / name).read_bytes() for name in names}
    assert not re.search(r"(src|href)\s*=\s*[\"']?(?!data:)\w|url\(|@import|https?:", report.page)
    assert report.results["missing"] == []
    for given in ("the latent", "the true action"):
        assert f"{report.results['worth'][given]['loss']:.2e}" in report.page
    assert "is finished" in refusal(report.cwd, "tools/inspect_latents", *INSPECT)


def test_report_without_labels_and_vq(pipeline, tmp_path):
    """Without labels, VQ and agents the report is made from what there is, and says what is missing."""
    link_tree(pipeline.data, tmp_path / "data" / ENV_ID)
    (tmp_path / "data" / ENV_ID / "test" / "actions.npy").unlink()
    inline(tmp_path, "lapo_pretrain", *TOY["lapo_pretrain"], "--no-vq", "--num-updates", "1")
    assert "--action-updates" in refusal(tmp_path, "tools/inspect_latents", *INSPECT)
    more = "--num-starts 1 --rollout-steps 24 --action-updates 0".split()
    report = inspect(tmp_path, *more)  # an env's stream has 25 frames
    wanted = {"groups", "codebooks", "latent_space", "error", "lapo_decode", "lapo_finetune_ppo"}
    assert set(report.results["missing"]) == wanted and all(name in report.page for name in wanted)
    assert not (report.folder / "groups.png").exists()


def test_a_table_of_latents(pipeline, tmp_path, lapo, test):
    """A row a window: film, its frame, the IDM's latent, its codes; a film's end may be the test split."""
    cwd = link_tree(pipeline.cwd, tmp_path / "work")
    meta = json.loads((cwd / "data" / ENV_ID / "meta.json").read_text())
    meta["splits"]["train"]["films"] = {"a.mp4": 1500, "b.mp4": 500}
    meta["splits"]["test"]["films"] = {"b.mp4": 400}
    np.save(cwd / "data" / ENV_ID / "train" / "frame.npy", np.arange(2000))
    np.save(cwd / "data" / ENV_ID / "test" / "frame.npy", 7 + 2 * np.arange(len(test.first)))
    replace(cwd / "data" / ENV_ID / "meta.json", json.dumps(meta))
    assert "c.mp4" in refusal(cwd, "tools/export_latents", "--env-id", ENV_ID, "--film", "c.mp4")
    inline(cwd, "tools/export_latents", "--env-id", ENV_ID, "--film", "b.mp4", "--no-cuda")
    folder = cwd / run_dir("export_latents")
    table, found = rows(folder / "latents.csv"), np.load(folder / "latents.npz")
    own = found["split"] == "test"
    assert len(table) == len(own) and own.sum() == len(test.windows) and set(found["film"][own]) == {"b.mp4"}
    assert np.array_equal(found["frame"][own], 7 + 2 * test.windows)
    z = lapo.idm(pretrain.get_windows(test, test.windows, "cpu"))
    np.testing.assert_allclose(found["z"][own], z, atol=1e-5)
    assert [row["codes"].split() for row in table] == found["codes"].reshape(len(table), -1).astype(
        str
    ).tolist()
    with av.open(str(folder / "captions.mp4")) as film:
        assert sum(1 for _ in film.decode(video=0)) == 500 + 400


@pytest.fixture
def play(pipeline, monkeypatch):
    """tools/play_dream.py up to serving: the world, its keys, its server."""
    monkeypatch.chdir(pipeline.cwd)
    return lambda *flags: play_dream.make_game(tyro.cli(play_dream.Args, args=[*PLAY, *map(str, flags)]))


def new_env(level):
    return play_dream.make_env(ENV_ID, 1, 16, 0, 1 + level)


def test_playing(play, lapo):
    """Arrows give the dream their action's latent, the game that action; numbers a group's, and its move."""
    (world, keys, _), env = play(), new_env(0)
    respond = play_dream.make_responder(world, keys, 3, labelled=True)
    env.act(np.array([4], dtype=np.int32))
    assert len(keys) == 3 + 15
    held = (["ArrowRight"], ("action", 7)), ([], ("action", 4)), (["2"], ("group", 1)), (["d"], ("action", 9))
    for k, (pressed, key) in enumerate(held):
        before, (latent, action, name) = torch.cat(world.dream, dim=1), keys[key]
        z = latent(before)
        torch.testing.assert_close(lapo.vq(z)[0], z)  # made of codes
        answer = respond(pressed, "")
        with torch.inference_mode():
            torch.testing.assert_close(world.dream[1], lapo.fdm(before, z).clamp(-0.5, 0.5))
        env.act(np.array([action], dtype=np.int32))
        np.testing.assert_array_equal(world.real[1], env.observe()[1]["rgb"][0])
        assert answer["frame"] == k + 1 and answer["held"] == name and answer["errors"] == world.errors()
    assert respond(["d"], "wake")["errors"][0] == 0 and world.frame == 4
    while not world.over:  # the real game is Procgen's, to its end, and then stands still
        last = env.observe()[1]["rgb"][0]
        env.act(np.array([9], dtype=np.int32))
        respond(["d"], "")
        assert world.over == env.observe()[2][0]
    np.testing.assert_array_equal(world.pictures()[1], last)
    respond([], "next")
    assert world.level == 1 and world.frame == 0

    world, keys, _ = play("--num-labels", "0")  # numbers move the dream, arrows nothing
    respond = play_dream.make_responder(world, keys, 3, labelled=False)
    first, answer = respond(["ArrowRight"], ""), respond(["1"], "")
    assert (first["frame"], first["held"]) == (0, "nothing") and answer["frame"] == 1
    assert answer["dream"] != first["dream"] and answer["real"] == first["real"]


def test_server(pipeline, play):
    """On this machine alone, by its own names: the page, steps, and a refusal of other pages and paths."""
    _, _, server = play()
    port = server.server_port
    assert "cannot be used" in refusal(pipeline.cwd, "tools/play_dream", *PLAY, "--port", port)
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


def test_a_steadier_dream(pipeline, tmp_path, lapo, test):
    """Predictions go on clamped, with their gradient; the FDM alone changes; what is shipped is halved."""
    windows = pretrain.get_windows(test, test.windows[:4].repeat(2), "cpu").view(4, 2, 9, 64, 64)
    z = torch.zeros(4, 2, lapo.vq.N * lapo.vq.H * lapo.vq.D)
    first = lapo.fdm(windows[:, 0, :6], z[:, 0])
    frames = torch.cat([windows[:, 0, 3:6], first.clamp(-0.5, 0.5)], dim=1)
    second = lapo.fdm(frames, z[:, 1])
    losses = [F.mse_loss(first, windows[:, 0, 6:]), F.mse_loss(second, windows[:, 1, 6:])]
    found, last = steady_dream.unroll(lapo.fdm, windows[:, 0, :6], z, windows[:, :, 6:])
    torch.testing.assert_close(found, torch.stack(losses))
    torch.testing.assert_close(last, torch.cat([frames[:, 3:], second.clamp(-0.5, 0.5)], dim=1))
    begins = steady_dream.find_stretches(test, 3)
    for t in np.flatnonzero(begins):
        assert not test.first[t : t + 4].any() and t + 3 < len(test.first)
    assert begins.sum() == sum(np.isin(t + np.arange(3), test.windows).all() for t in test.windows)

    cwd = link_tree(pipeline.cwd, tmp_path / "work")
    flags = f"--env-id {ENV_ID} --no-cuda --num-updates 4 --batch-size 3 --max-stretch 3 --eval-steps 3"
    flags = flags.split()
    inline(cwd, "tools/steady_dream", *flags)
    assert "is finished" in refusal(cwd, "tools/steady_dream", *flags)
    before = load(pipeline.checkpoints["lapo_pretrain"])
    after = load(cwd / run_dir("steady_dream") / "checkpoint.pt")
    assert same(before["idm"], after["idm"]) and same(before["vq"], after["vq"])
    changed = {name for name, value in after["fdm"].items() if not torch.equal(value, before["fdm"][name])}
    assert changed == {name for name, _ in lapo.fdm.named_parameters()}
    scores = results_of(cwd, "steady_dream")["scores"]
    assert scores["after"]["dream"] != scores["before"]["dream"] and len(scores["after"]["dream"]) == 3
    assert scores["after"]["first frame"] == scores["before"]["first frame"]

    inline(cwd, "tools/ship_networks", "--env-id", ENV_ID)
    shipped = load(cwd / "pretrained" / f"{ENV_ID}-dream.pt")
    for part in ("idm", "vq", "fdm"):
        for name, value in after[part].items():
            torch.testing.assert_close(shipped[part][name].to(value.dtype), value, rtol=1e-3, atol=1e-6)
    assert shipped["idm"]["head.weight"].dtype == torch.float16
    made_by = json.loads((cwd / "pretrained" / f"{ENV_ID}.json").read_text())["made_by"]
    assert made_by["steady_dream"]["scores"] == scores and "test/r2" in made_by["lapo_bc"]
    start = ("--bc-checkpoint", f"pretrained/{ENV_ID}-policy.pt", "--overwrite")
    for stage in ("lapo_decode", "lapo_finetune_ppo"):
        inline(cwd, stage, *TOY[stage], *start)
        assert np.isfinite(results_of(cwd, stage)["wall_seconds"])


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
        assert table[name, ""]["frames"] == "2048"
        mean = pytest.approx(pipeline.results[name]["return_mean"], abs=1e-2)
        assert float(table[name, ""]["return_mean"]) == mean == np.mean(plot.returns_of(table[name, ""]))
    for wanted in pipeline.results["lapo_decode"]["curve"]:
        draws = plot.returns_of(table[wanted["method"], str(wanted["n_labels"])])
        assert [d.mean() for d in draws] == pytest.approx(wanted["draws"], abs=1e-2)
    for row in rows(tmp_path / "latent_space.csv"):
        assert float(row["nmi"]) == report.results["latent_space"][row["of"]]["nmi"]
    inline(tmp_path, "benchmark/plot", "--results", tmp_path, "--scale", "runs", "--resamples", "50")
    pictures = list(tmp_path.glob("*.png"))
    assert pictures and all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    assert any("demonstrator" in path.read_text() for path in tmp_path.glob("*.md"))
