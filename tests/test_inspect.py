"""lapo_inspect.py on the toy pipeline: the numbers behind its pictures, the pictures, what it does without labels or VQ, what it refuses."""

import base64
import html
import io
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ENV_ID, TOY, collect, inline, link_tree, pretrain, replace, run_dir, snapshot
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lapo_inspect

STEPS, CODES, STARTS = 4, 5, 2
TOY_INSPECT = f"--env-id {ENV_ID} --no-cuda --no-bf16 --rollout-steps {STEPS} --num-codes {CODES} --num-starts {STARTS} --start-steps 3".split()
OUT = run_dir("lapo_inspect")


def inspect(cwd, *flags):
    """Runs lapo_inspect.py in this process: its globals, its results.json, its report.html and its folder."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        found = inline(monkeypatch, cwd, "lapo_inspect", *TOY_INSPECT, *flags)
    results, page = json.loads((cwd / OUT / "results.json").read_text()), (cwd / OUT / "report.html").read_text()
    return SimpleNamespace(**found | {"results": results, "page": page, "folder": cwd / OUT})


@pytest.fixture(scope="module")
def work(pipeline, tmp_path_factory):
    """What the report is made from: dataset and pretraining run by hard links, beside them an agent's film."""
    cwd = tmp_path_factory.mktemp("inspect")
    link_tree(pipeline.data, cwd / "data" / ENV_ID)
    link_tree(pipeline.checkpoints["lapo_pretrain"].parent, cwd / run_dir("lapo_pretrain"))
    (cwd / run_dir("lapo_decode")).mkdir()
    Image.new("RGB", (8, 8)).save(cwd / run_dir("lapo_decode") / "lapo_decoder.gif")
    return cwd


@pytest.fixture(scope="module")
def report(work):
    return inspect(work)


@pytest.fixture(scope="module")
def networks(work):
    """The pretrained networks, built by lapo_pretrain.py's classes, and test frames with their actions."""
    checkpoint = torch.load(work / run_dir("lapo_pretrain") / "checkpoint.pt", weights_only=True)
    idm, vq, fdm = pretrain.IDM(0.25, 16), pretrain.VQ(2, 4, 2, 64, 0.05, 0.999), pretrain.FDM(16, 4)
    for name, network in {"idm": idm, "vq": vq, "fdm": fdm}.items():
        network.load_state_dict(checkpoint[name])
        network.eval().requires_grad_(False)
    data = work / "data" / ENV_ID / "test"
    return SimpleNamespace(idm=idm, vq=vq, fdm=fdm, **{name: np.load(data / f"{name}.npy") for name in ("frames", "first", "actions")})


def predict(n, t):
    """lapo_pretrain.py's predictions for the windows around t, the windows, and their codes."""
    windows = pretrain.get_windows(n.frames, t, torch.device("cpu"))
    with torch.no_grad():
        prediction, _, _, codes, _ = pretrain.predict(n.idm, n.vq, n.fdm, windows, torch.autocast("cpu", enabled=False))
    return prediction, windows, codes.flatten(1).numpy()


def test_code_action_table(report, networks):
    """Every window is counted once, under its own true action; lifts compare with the action's share of all windows; the highest is the match."""
    codes, t = report.results["codes"], report.t
    table = np.array(codes["actions"])
    assert table.shape == (CODES, 15) and table.sum() == len(t) == report.results["windows"]
    assert table.sum(0).tolist() == np.bincount(networks.actions[t], minlength=15).tolist()
    assert table.sum(1).tolist() == codes["windows"] == sorted(codes["windows"], reverse=True)
    for g, a in np.ndindex(table.shape):
        assert table[g, a] == ((report.group == g) & (networks.actions[t] == a)).sum()
        expected = table[g].sum() * table[:, a].sum() / table.sum()
        assert codes["lift"][g][a] == pytest.approx((table[g, a] + 20) / (expected + 20))
    assert codes["matched_action"] == np.argmax(codes["lift"], axis=1).tolist()
    assert all(1 < chance < 2 for chance in codes["shuffled_lift"])


def test_lift_of_independent_and_of_dependent_actions():
    """Where groups have the same mix of actions every lift is 1; an action found in one group only has the highest lift there."""
    totals = np.array([30, 60, 90] + [0] * 12)
    assert lapo_inspect.lift(totals // np.array([[3], [2]]), totals) == pytest.approx(1)
    table = np.array([[300, 0, 10] + [0] * 12, [0, 300, 10] + [0] * 12])
    lifts = lapo_inspect.lift(table, table.sum(0))
    assert lifts.argmax(1).tolist() == [0, 1] and lifts[0, 0] == pytest.approx(320 / 170) and lifts[0, 1] < 0.2 and lifts[0, 3] == 1


def test_a_code_is_a_real_window_of_its_group(report, networks):
    """The code that stands for a group is that of one of its windows, the one nearest to the group's mean; the latents are lapo_pretrain's."""
    _, windows, codes = predict(networks, report.t)
    assert np.array_equal(report.codes, codes)
    with torch.no_grad():
        z = networks.vq(networks.idm(windows))[0].numpy()
    np.testing.assert_allclose(report.latents, z, atol=1e-5)
    for g, (nearest, joint) in enumerate(zip(report.results["codes"]["nearest_window"], report.results["codes"]["joint_code"])):
        mine = np.flatnonzero(report.group == g)
        distance = np.linalg.norm(z[mine] - z[mine].mean(0), axis=1)
        i = np.searchsorted(report.t, nearest)
        assert report.group[i] == g and joint == codes[i].tolist() and distance[list(mine).index(i)] == pytest.approx(distance.min(), abs=1e-5)


def test_use_of_codebooks(report, networks):
    """Perplexity is the VQ's own, over all windows at once; joint codes are counted as tuples."""
    _, windows, codes = predict(networks, report.t)
    with torch.no_grad():
        perplexity = networks.vq(networks.idm(windows))[3]
    assert report.results["perplexity"] == pytest.approx(perplexity.tolist(), rel=1e-4)
    assert report.results["joint_codes"] == len({tuple(c) for c in codes.tolist()})


def test_rollout_errors(report, networks):
    """The error at length 1 is the one-step FDM loss, later ones come from fed-back predictions; copying compares with o_t; stretches stay apart."""
    starts, (own, other, copy) = report.apart, report.results["rollout_mse"].values()
    assert len(starts) == report.results["rollout_stretches"] > 10 and np.diff(np.sort(starts)).min() >= STEPS + 2
    assert not any(networks.first[t : t + STEPS + 1].any() for t in starts)  # o_{t-1} ... o_{t+T} are of one episode
    prediction, windows, _ = predict(networks, starts)
    assert own[0] == pytest.approx(F.mse_loss(prediction, windows[:, 6:]).item(), rel=1e-4)
    assert own[0] != other[0]
    before, now = windows[:, :3], windows[:, 3:6]
    for step in range(STEPS):
        _, true, _ = predict(networks, starts + step)
        z = networks.vq(networks.idm(true))[0]
        before, now = now, networks.fdm(torch.cat([before, now], dim=1), z)
        assert own[step] == pytest.approx(F.mse_loss(now, true[:, 6:]).item(), rel=1e-3)
        difference = networks.frames[starts].astype(float) - networks.frames[starts + step + 1]
        assert copy[step] == pytest.approx(((difference / 255) ** 2).mean(), rel=1e-4)


def test_dreams_and_games(report, networks):
    """Dream and game start from one frame; dreams hold the code's latent; games hold the matched action from the same saved state."""
    dream, game = report.kinds["dream"], report.kinds["game"]
    assert dream.shape == game.shape == (STARTS, CODES, STEPS + 1, 64, 64, 3)
    assert (dream[:, :, 0] == game[:, :, 0]).all() and (dream[:, :1, 0] == dream[:, :, 0]).all()
    env = collect.make_env(ENV_ID, CODES, 16, 0, seed=9)  # other games than the script's
    for s, e in enumerate(report.starts):
        last, now = (torch.from_numpy(x[e]).permute(2, 0, 1)[None] / 255 - 0.5 for x in (report.before, report.now))
        for g, t in enumerate(report.results["codes"]["nearest_window"]):
            _, windows, _ = predict(networks, np.array([t]))
            with torch.no_grad():
                expected = networks.fdm(torch.cat([last, now], dim=1), networks.vq(networks.idm(windows))[0])[0]
            difference = dream[s, g, 1].astype(int) - ((expected.clamp(-0.5, 0.5) + 0.5) * 255).permute(1, 2, 0).numpy()
            assert np.abs(difference).max() <= 1
        collect.set_env_state(env, [report.states[e]] * CODES)
        over = np.zeros(CODES, dtype=bool)
        for step in range(1, STEPS + 1):
            env.act(np.array(report.results["codes"]["matched_action"], dtype=np.int32))
            _, obs, first = env.observe()
            over |= first
            assert (game[s, ~over, step] == obs["rgb"][~over]).all()
            assert (game[s, over, step] == game[s, over, step - 1] // np.where(first[over], 2, 1)[:, None, None, None]).all()
    env.close()


def test_pictures(report):
    """The film has a frame per step and a column per code; the strip a row per dream and per game; names are in the margins, pictures unscaled."""
    gif, strip = Image.open(report.folder / "rollouts.gif"), Image.open(report.folder / "rollouts.png")
    assert gif.n_frames == STEPS + 1
    columns = STARTS * 4  # steps 0, 1, 2, 4
    for image, across, pairs, side in ((gif, CODES, STARTS, 2 * 64 + 4), (strip, columns, CODES, 64 + 4)):
        assert 30 < image.width - across * side < 130 and 20 < image.height - 2 * pairs * side - 10 * (pairs - 1) < 70
    left, top = strip.width - columns * 68, strip.height - 2 * CODES * 68 - 10 * (CODES - 1)
    pixels = np.asarray(strip)
    assert (pixels[top : top + 64, left : left + 64] == report.kinds["dream"][0, 0, 0]).all()
    y, x = top + 68 * 3 + 10, left + 68 * 7  # second code's game, second start, last step
    assert (pixels[y : y + 64, x : x + 64] == report.kinds["game"][1, 1, STEPS]).all()


def test_report_stands_alone(report, work):
    """Every picture in the folder is in the report, byte for byte; the report refers to nothing outside itself, and nothing else was written."""
    embedded = re.findall(r'<img alt="[^"]+" src="data:image/(png|gif);base64,([^"]+)">', report.page)
    names = {"latents.png", "codes.png", "codebooks.png", "rollouts.gif", "rollouts.png", "error.png", "lapo_decoder.gif"}
    assert {p.name for p in report.folder.iterdir()} == names | {"report.html", "results.json", ".lock"}
    assert {base64.b64decode(data) for _, data in embedded} == {(report.folder / name).read_bytes() for name in names}
    assert report.page.count("<img") == len(embedded) == len(names)
    assert not re.search(r"(src|href)\s*=\s*[\"']?(?!data:)\w|url\(|@import|https?:", report.page)
    assert report.results["missing"] == [] and "Not in this report" not in report.page
    space = json.loads((work / run_dir("lapo_pretrain") / "results.json").read_text())["latent_space"]
    for column in ("trained", "untrained_idm", "shuffled_actions"):
        assert all(f"<td>{value:.3f}</td>" in report.page for value in space[column].values())


def test_without_labels_and_results(work, tmp_path):
    """Without actions.npy and the pretraining run's results.json the report is made, shows no game, and says what is missing and why."""
    link_tree(work, tmp_path)
    (tmp_path / "data" / ENV_ID / "test" / "actions.npy").unlink()
    (tmp_path / run_dir("lapo_pretrain") / "results.json").unlink()
    (tmp_path / run_dir("lapo_decode") / "lapo_decoder.gif").unlink()
    report = inspect(tmp_path, "--overwrite", "--rollout-steps", "24")  # an env's stream has 25 frames
    missing = report.results["missing"]
    assert [re.findall(r"[a-z_]+\.(?:npy|json|gif)", m) for m in missing[:2]] == [["actions.npy"], ["results.json"]] and len(missing) == 4
    assert "rollout-steps" in missing[2] and "lapo_decoder.gif" in missing[3] and all(html.escape(m) in report.page for m in missing)
    assert report.results["codes"]["actions"] is None and list(report.kinds) == ["dream"]
    assert "without labels no code has a matched action" in report.page
    assert not (report.folder / "codes.png").exists() and not (report.folder / "error.png").exists()


def test_without_vq(work, tmp_path, monkeypatch):
    """A --no-vq checkpoint has its continuous latents grouped, and no codebooks."""
    link_tree(work / "data", tmp_path / "data")
    inline(monkeypatch, tmp_path, "lapo_pretrain", *TOY["lapo_pretrain"], "--no-vq", "--num-updates", "1")
    report = inspect(tmp_path)
    checkpoint = torch.load(tmp_path / run_dir("lapo_pretrain") / "checkpoint.pt", weights_only=True)
    idm = pretrain.IDM(0.25, 16)
    idm.load_state_dict(checkpoint["idm"])
    frames = np.load(tmp_path / "data" / ENV_ID / "test" / "frames.npy")
    with torch.no_grad():
        np.testing.assert_allclose(report.latents, idm(pretrain.get_windows(frames, report.t, torch.device("cpu"))).numpy(), atol=1e-5)
    assert report.results["joint_codes"] is None and report.results["perplexity"] is None and sum(report.results["codes"]["windows"]) == len(report.t)
    assert any("--no-vq" in m for m in report.results["missing"]) and "mutual information" not in report.page


@pytest.mark.parametrize(
    "content, says",
    [
        (None, "has not been finished"),
        ('{"latent_space": null}', "had no labels"),
        ("{}", "KeyError"),
        ('{"latent_space": {"trained": {"nmi": "x"}}}', "ValueError"),
        ("[" * 100_000, "RecursionError"),
    ],
)
def test_latent_space_that_cannot_be_shown(tmp_path, content, says):
    """A results.json that is missing, without numbers or damaged gives the reason instead."""
    if content:
        (tmp_path / "results.json").write_text(content)
    space, why = lapo_inspect.read_latent_space(tmp_path / "results.json")
    assert space is None and says in why and str(tmp_path) in why


def change_tensors(name, change):
    def spoil(cwd):
        path = cwd / run_dir("lapo_pretrain") / "checkpoint.pt"
        checkpoint = torch.load(path, weights_only=True)
        change(checkpoint)
        path.unlink()
        torch.save(checkpoint, path)

    return pytest.param(spoil, [], ["lapo_pretrain__1/checkpoint.pt", "lapo_pretrain.py"], id=name)


@pytest.mark.parametrize(
    "spoil, flags, says",
    [
        (None, ["--env-id", "pong"], ["pong__lapo_pretrain__1", "lapo_pretrain.py --env-id pong"]),
        (None, ["--num-codes", "0"], ["--num-codes is 0", "at least 1"]),
        (None, ["--pretrain-checkpoint", "none.pt"], ["none.pt", "lapo_pretrain.py"]),
        (None, ["--data-dir", "nowhere"], ["nowhere", "collect_expert_data.py"]),
        (None, ["--env-id", "maze", "--pretrain-checkpoint", run_dir("lapo_pretrain") / "checkpoint.pt"], [ENV_ID, "expected maze"]),
        (lambda cwd: (cwd / OUT / "results.json").write_text("{}"), [], [str(OUT), "--overwrite"]),
        (lambda cwd: replace(cwd / "data" / ENV_ID / "test" / "actions.npy", np.full(400, 15, dtype=np.int8)), [], ["actions.npy", "0 to 14"]),
        (lambda cwd: replace(cwd / "data" / ENV_ID / "test" / "first.npy", np.ones(400, dtype=bool)), [], [f"data/{ENV_ID}", "at least 2"]),
        change_tensors("no fdm", lambda c: c.pop("fdm")),
        change_tensors("other width", lambda c: c["meta"]["args"].update(fdm_width=8)),
        change_tensors("no width", lambda c: c["meta"]["args"].pop("fdm_width")),
        change_tensors("float64", lambda c: c["fdm"].update({k: v.double() for k, v in c["fdm"].items() if v.is_floating_point()})),
        change_tensors("nan", lambda c: c["idm"]["head.bias"].fill_(float("nan"))),
    ],
)
def test_errors(work, tmp_path, monkeypatch, spoil, flags, says):
    """Bad flags and files are refused in one sentence that names them and says how to mend it; no report is written."""
    link_tree(work / "data", tmp_path / "data")
    link_tree(work / run_dir("lapo_pretrain"), tmp_path / run_dir("lapo_pretrain"))
    (tmp_path / OUT).mkdir()
    if spoil:
        spoil(tmp_path)
    before = snapshot(tmp_path)
    with pytest.raises(SystemExit) as caught:
        inline(monkeypatch, tmp_path, "lapo_inspect", *TOY_INSPECT, *flags)
    message = caught.value.code
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message
    assert all(str(part) in message for part in says), message
    after = snapshot(tmp_path)
    after.pop(OUT / ".lock", None)
    assert after == before


@pytest.mark.parametrize("action, dx, dy", [(a, a // 3 - 1, 1 - a % 3) for a in range(9)])
def test_arrows_point_where_the_action_goes(action, dx, dy):
    """In an agent's film an arrow's head is wide and its tail thin, right and down as in the picture; no move is a dot in the middle."""
    picture = collect.draw_action(np.full((192, 192, 3), 99, dtype=np.uint8), action)
    assert picture.shape == (192, 192, 3) and (picture[42:] == 99).all() and (picture[:, 42:] == 99).all()
    black = (picture == 0).all(-1)
    assert black[22, 22]
    if dx == dy == 0:
        assert black[7:38, 7:38].sum() < 90
    else:
        x, y = np.array([dx, dy]) / np.hypot(dx, dy)

        def there(along, across):
            return black[int(round(22 + along * y + across * x)), int(round(22 + along * x - across * y))]

        assert there(11, 0) and there(2, 6) and there(2, -6) and there(-11, 0) and not there(-5, 6) and not there(-5, -6)


def test_films_show_the_actions(tmp_path):
    """An agent's film carries each playing game's action in its own corner; a game that has given its episodes is dark and shows its return."""
    env = collect.make_env(ENV_ID, 2, 16, 0, seed=1)
    actions, film = [7, 0], tmp_path / "film.gif"
    collect.evaluate(lambda obs, episode: np.array(actions, dtype=np.int32)[episode], env, 2, film)
    env.close()
    gif = Image.open(film)
    assert gif.size == (2 * 196, 192)
    first = np.asarray(gif.convert("RGB")).astype(int)
    plain = np.full((192, 192, 3), 99, dtype=np.uint8)
    for game, action in enumerate(actions):
        mark = collect.draw_action(plain, action)
        ink = (mark != 99).all(-1)
        assert np.abs(first[:, 196 * game + 2 : 196 * game + 194][ink] - mark[ink]).mean() < 20  # GIFs have few colours
    gif.seek(gif.n_frames - 1)
    last = np.asarray(gif.convert("RGB")).astype(int)
    corners = [last[6:39, x + 6 : x + 39].min(-1) > 240 for x in (2, 198)]  # white discs
    assert sorted(last[150:, x : x + 192].mean() < 0.6 * first[150:, x : x + 192].mean() for x in (2, 198)) == [False, True]
    assert sorted((last[80:112, x + 70 : x + 122].min(-1) > 240).sum() > 30 for x in (2, 198)) == [False, True]  # white digits
    assert sorted(corner.mean() > 0.4 for corner in corners) == [False, True]  # one game is still playing


def test_pretraining_draws_what_it_learns(pipeline, tmp_path, monkeypatch):
    """TensorBoard gets three pictures as training goes on; the rollouts begin with the one-step predictions and stand beside the true frames."""
    link_tree(pipeline.data, tmp_path / "data" / ENV_ID)
    found = SimpleNamespace(**inline(monkeypatch, tmp_path, "lapo_pretrain", *TOY["lapo_pretrain"], "--no-bf16"))
    folder = tmp_path / run_dir("lapo_pretrain")
    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    assert set(events.Tags()["images"]) == {"pictures/predictions", "pictures/latents", "pictures/rollouts"}
    for tag in events.Tags()["images"]:
        assert events.Images(tag)[-1].step == 6 and events.Images(tag)[0].step == 3
        last = np.asarray(Image.open(io.BytesIO(events.Images(tag)[-1].encoded_image_string)))
        assert np.array_equal(last, np.asarray(Image.open(folder / f"{tag.split('/')[1]}.png")))
    assert 0 < json.loads((folder / "results.json").read_text())["picture_seconds"]

    t = found.rollout_t
    assert len(t) == 8 and np.isin(t, found.test_t).all() and (np.diff(t) == 1).all()
    sheet = np.asarray(Image.open(folder / "rollouts.png"))
    cells = sheet[23:, -68 * 4 :].reshape(-1, 68, 4, 68, 3).swapaxes(1, 2)[:, :, :64, :64]  # (2 + K, steps 1, 2, 4, 8, 64, 64, 3)
    assert len(cells) == 2 + min(8, len(np.unique(found.codes["test"], axis=0)))
    windows = pretrain.get_windows(found.test_frames, t, torch.device("cpu"))
    found.trained.eval()
    with torch.no_grad():
        first = found.predict(*found.networks, windows[:1], found.autocast)[0]
        second = found.fdm(torch.cat([windows[:1, 3:6], first], dim=1), found.vq(found.idm(windows))[0][1:2])
    for column, k in enumerate((1, 2, 4, 8)):
        assert np.array_equal(cells[0, column], found.test_frames[t[0] + k])
    for column, prediction in enumerate((first, second)):
        assert np.abs(cells[1, column].astype(int) - pretrain.to_pixels(prediction[0]).astype(int)).max() <= 1
