"""The results' way from results.json to the tables: every run counted once, intervals that are right, pictures that get drawn."""

import csv
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ENV_ID, ROOT, STAGES, decode, run_dir
from sklearn.linear_model import LinearRegression
from sklearn.metrics import r2_score

sys.path.insert(0, str(ROOT / "benchmark"))
import collect_results  # noqa: E402
import plot  # noqa: E402
import why_it_stalls  # noqa: E402


def script(name, *flags, cwd):
    return subprocess.run([sys.executable, ROOT / "benchmark" / name, *map(str, flags)], cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def results(pipeline, tmp_path_factory):
    """The folder that collect_results.py has written from the toy pipeline."""
    out = tmp_path_factory.mktemp("results")
    done = script("collect_results.py", "--runs-dir", pipeline.cwd / "runs", "--out", out, cwd=pipeline.cwd)
    assert done.returncode == 0, done.stderr
    return out


def rows(path):
    return list(csv.DictReader(path.open(newline="")))


def test_every_result_is_one_row(pipeline, results):
    """Demonstrator, random play, two label counts of two methods, three online runs; the numbers are results.json's."""
    table = {(r["method"], r["n_labels"]): r for r in rows(results / "runs.csv")}
    online = {"lapo_finetune_ppo", "lapo_finetune_ppo_no_sl", "lapo_finetune_ppo_from_scratch"}
    offline = {(m, n) for m in ("lapo_decoder", "bc_from_scratch") for n in ("16", "32")}
    assert set(table) == {("demonstrator", ""), ("random", ""), *offline, *((m, "") for m in online)}
    for method in online:
        wanted, row = pipeline.results[method], table[method, ""]
        assert int(row["frames"]) == wanted["frames"] == 2048 and int(row["episodes"]) == wanted["episodes"]
        assert float(row["return_mean"]) == pytest.approx(wanted["return_mean"], abs=1e-4)
        assert np.mean(plot.returns_of(row)) == pytest.approx(wanted["return_mean"], abs=1e-2)
        assert row["commit"] == (wanted["commit"] or "") and row["device"] == "cpu"
    for wanted in pipeline.results["lapo_decode"]["curve"]:
        draws = plot.returns_of(table[wanted["method"], str(wanted["n_labels"])])
        assert [d.mean() for d in draws] == pytest.approx(wanted["draws"]) and sum(map(len, draws)) == wanted["episodes"]
    space = pipeline.results["lapo_pretrain"]["latent_space"]
    for row in rows(results / "latent_space.csv"):
        assert float(row["linear_probe"]) == space[row["of"]]["linear_probe"] and float(row["nmi"]) == space[row["of"]]["nmi"]
        alive = str(pipeline.results["lapo_pretrain"]["test/idm_active_share"]) if row["of"] == "trained" else ""
        assert row["idm_active_share"] == alive
        assert (row["variance_between_episodes"] == "") == (row["of"] == "untrained_idm")
    assert len(rows(results / "latent_space.csv")) == 3 and len(rows(results / "latents_2d.csv")) == 64
    assert [int(r["frames"]) for r in rows(results / "curves.csv") if r["method"] == "lapo_finetune_ppo"] == [512, 1024, 1536, 2048]


def test_collecting_again_adds_nothing_and_loses_nothing(pipeline, results, tmp_path):
    """The same runs give the same files; rows of runs that are gone stay."""
    before = {path.name: path.read_bytes() for path in results.iterdir()}
    for path in results.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    only = tmp_path / "runs" / run_dir("lapo_bc").name
    only.mkdir(parents=True)
    (only / "results.json").write_bytes((pipeline.cwd / run_dir("lapo_bc") / "results.json").read_bytes())
    for folder in (pipeline.cwd / "runs", tmp_path / "runs"):
        assert script("collect_results.py", "--runs-dir", folder, "--out", tmp_path, cwd=pipeline.cwd).returncode == 0
        assert {name: (tmp_path / name).read_bytes() for name in before} == before
    done = script("collect_results.py", "--runs-dir", tmp_path / "none", "--out", tmp_path, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("error: --runs-dir") and len(done.stderr.splitlines()) == 1


def test_a_rerun_replaces_all_of_its_rows(tmp_path):
    """A run that has fewer points than it had leaves no old ones; other runs stay."""
    path, keys = tmp_path / "curves.csv", collect_results.KEYS["curves.csv"]

    def points(seed, *frames):
        return [{"scale": "small", "env_id": "maze", "method": "rl_sl", "seed": seed, "frames": f, "return": seed} for f in frames]

    collect_results.merge(path, keys, ["return"], points(1, 100, 200, 300) + points(2, 100))
    assert collect_results.merge(path, keys, ["return"], points(1, 150)) == 2
    assert [(r["seed"], r["frames"]) for r in rows(path)] == [("1", "150"), ("2", "100")]


def test_curves_are_thinned_at_the_same_frames_in_every_seed(tmp_path):
    """However late the first episode ends: about 60 points at the paper's scale, the last one among them."""
    found = []
    for start in (1, 2, 7):
        curve = [[4096 * i, 1.0] for i in range(start, 977)]
        results = {"stage": "lapo_finetune_ppo", "env_id": "maze", "seed": start, "frames": 4096 * 976, "curve": curve, "returns": [1.0]}
        made = collect_results.rows_of(tmp_path / "maze__rl_sl__1", results | {"wall_seconds": 1}, "paper")
        found.append([row["frames"] for row in made["curves.csv"]])
    assert found[0] == found[1] == found[2] and 55 <= len(found[0]) <= 61 and found[0][-1] == 4096 * 976


def test_experiments_are_skipped_resumed_and_never_mixed(tmp_path):
    """benchmark/experiments.sh with a Python that only writes results.json: the runs and their order; what is done, stale or of other flags."""
    (tmp_path / "benchmark").mkdir()
    shutil.copy(ROOT / "benchmark" / "experiments.sh", tmp_path / "benchmark")
    python = tmp_path / "python"
    python.write_text(
        f"#!{sys.executable}\n"
        "import json, pathlib, sys\n"
        "flag = lambda name: sys.argv[sys.argv.index(name) + 1]\n"
        "run = pathlib.Path(flag('--runs-dir')) / '__'.join((flag('--env-id'), flag('--exp-name'), flag('--seed')))\n"
        "run.mkdir(parents=True)\n"
        "(run / 'results.json').write_text(json.dumps({'command': 'python ' + ' '.join(sys.argv[1:])}))\n"
    )
    python.chmod(0o755)

    def experiments(*arguments):
        command = ["bash", "benchmark/experiments.sh", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHON": str(python)}, capture_output=True, text=True, timeout=60)
        return done, [line.split("--exp-name ")[1].split()[0] for line in done.stdout.splitlines()]

    done, names = experiments("small", "online", "maze", "1")
    first = ["collect_expert_data", "lapo_pretrain", "lapo_bc", "rl_sl", "rl_no_sl", "ppo_from_scratch"]
    assert names == [*first, "lapo_pretrain_no_vq", "lapo_bc_no_vq", "no_vq"], done.stderr
    assert experiments("small", "all", "maze", "1")[1] == ["lapo_decode", "lapo_decode_800_updates"]  # the rest is done
    assert experiments("small", "offline", "maze", "1", "2")[1] == ["lapo_pretrain", "lapo_bc", "lapo_decode", "lapo_decode_800_updates"]
    pretrained = tmp_path / "runs" / "small" / "maze__lapo_pretrain__1" / "results.json"
    later = pretrained.stat().st_mtime + 1000
    os.utime(pretrained, (later, later))
    done, names = experiments("small", "all", "maze", "1")
    assert done.returncode == 1 and names == [] and "maze__lapo_bc__1" in done.stderr and "older than lapo_pretrain__1" in done.stderr
    pretrained.write_text(pretrained.read_text().replace("--num-updates 2000", "--num-updates 1999"))
    done, _ = experiments("small", "all", "maze", "1")
    assert done.returncode == 1 and "maze__lapo_pretrain__1" in done.stderr and "other flags" in done.stderr


def test_variance_between():
    """1 where the group tells the latent, and what scikit-learn's regression on the groups explains elsewhere."""
    rng = np.random.default_rng(0)
    groups = rng.integers(5, size=400)
    z = rng.normal(size=(5, 3))[groups]
    assert collect_results.variance_between(z, groups) == pytest.approx(1)
    z = z + rng.normal(size=z.shape)
    dummies = np.eye(5)[groups]
    explained = r2_score(z, LinearRegression(fit_intercept=False).fit(dummies, z).predict(dummies), multioutput="variance_weighted")
    assert collect_results.variance_between(z, groups) == pytest.approx(explained)


def test_intervals():
    """The bootstrap's spread is that of a mean: of episodes within a seed, and of seeds where those differ."""
    rng = np.random.default_rng(0)
    one = plot.resampled_means([[rng.normal(3, 2, size=400)]], 2000, rng)
    assert one.mean() == pytest.approx(3, abs=0.3) and one.std() == pytest.approx(2 / 20, rel=0.1)
    seeds = [[np.full(50, level)] for level in (0.0, 1.0, 5.0)]
    assert plot.resampled_means(seeds, 4000, rng).std() == pytest.approx(np.std([0, 1, 5]) / 3**0.5, rel=0.05)
    assert collect_results.joined([[1.0, 2.5], [0.333]]) == "1 2.5|0.33" and collect_results.joined([10.0, 0.0]) == "10 0"


@pytest.mark.filterwarnings("ignore:divide by zero")  # so few episodes that random play may equal the demonstrator
def test_shares_of_the_demonstrator(results):
    """Random play is 0 and the demonstrator 1, in the table as well."""
    scores = plot.Scores(plot.read(results / "runs.csv", "runs"), 100)
    assert scores.relative(ENV_ID, scores.random[ENV_ID]) == 0 and scores.relative(ENV_ID, scores.demonstrator[ENV_ID]) == 1
    mean, low, high, seeds, episodes = scores.interval(ENV_ID, "lapo_decoder", 16.0)
    assert low <= mean <= high and (seeds, episodes) == (1, 4) and scores.interval(ENV_ID, "no_vq") is None
    over, low, high = scores.over_games("lapo_decoder", 16.0)  # one game, one run: its own share
    assert over == pytest.approx(scores.relative(ENV_ID, mean)) and min(low, high) <= over <= max(low, high)
    assert scores.over_games("no_vq") is None


def test_pictures_and_tables(results):
    """plot.py draws from the CSV files alone, and refuses a scale without runs in one sentence."""
    done = script("plot.py", "--results", results, "--scale", "runs", "--resamples", 50, cwd=results)
    assert done.returncode == 0 and "left out" in done.stdout and "lapo_finetune_ppo_no_sl" in done.stdout, done.stderr
    text = (results / "runs-tables.md").read_text()
    assert "| demonstrator |" in text and "untrained idm" in text
    ran_on, _, _, _, *lines = (results / "runs-summary.md").read_text().splitlines()
    assert "cpu (" in ran_on and ran_on.endswith(f"threads: 1: {len(rows(results / 'runs.csv')) - 3}")
    assert [line.split(" | ")[1] for line in lines] == ["random", "demonstrator", "cloning from scratch, 32 labels", "LAPO + decoder, 32 labels"]
    assert lines[0].startswith(f"| {ENV_ID} | random") and lines[1].startswith("|  | demonstrator")
    for name in ("offline", "bars", "latents"):
        assert (results / f"runs-{name}.png").read_bytes().startswith(b"\x89PNG")
    done = script("plot.py", "--results", results, "--scale", "paper", cwd=results)
    assert done.returncode == 1 and "--scale paper" in done.stderr


def test_mean_of_games_with_different_frames(tmp_path):
    """Games whose curves have points at other frames, or fewer of them, are averaged all the same."""
    rows = [{"env_id": g, "method": "demonstrator", "seed": 1.0, "n_labels": "", "returns": "1 1"} for g in ("coinrun", "maze")]
    curves = [{"env_id": "coinrun", "method": "rl_sl", "seed": 1.0, "frames": f, "return": 1.0} for f in (1000.0, 2000.0, 3000.0)]
    curves += [{"env_id": "maze", "method": "rl_sl", "seed": 1.0, "frames": f, "return": 0.0} for f in (1500.0, 2500.0)]
    plot.plot_online(curves, plot.Scores(rows, 10), tmp_path / "online.png")
    assert (tmp_path / "online.png").exists()


def test_best_updates():
    """Cross-validation asks for all updates where labels can be learnt, and for few where they are noise."""
    how = (1e-3, 512, SimpleNamespace(weight_decay=1e-2, label_smoothing=0.05), torch.autocast("cpu", enabled=False))
    rng = np.random.default_rng(0)
    a = torch.from_numpy(rng.integers(15, size=256))
    z = torch.from_numpy(rng.normal(size=(15, 8)).astype(np.float32) * 5)[a]
    torch.manual_seed(0)
    assert why_it_stalls.best_updates(lambda: decode.Decoder(8, (64,)), z, a, 200, *how) == 200
    assert why_it_stalls.best_updates(lambda: decode.Decoder(8, (64,)), z, a[torch.randperm(256)], 200, *how) <= 50


def test_entropies():
    """Against a slow, obvious version; nothing is left if every action gives a frame of its own, everything if all give the same."""
    rng = np.random.default_rng(0)
    p = torch.from_numpy(rng.dirichlet(np.ones(15), size=20))
    same = torch.from_numpy(np.array([[0, 1, 0, 3, 3, 5, 1, 7, 8, 8, 8, 0, 12, 12, 14]] * 20))
    whole = left = 0.0
    for row, classes in zip(p.numpy(), same.numpy()):
        for a in range(15):
            whole -= row[a] * np.log(row[a]) / 20
            left -= row[a] * np.log(row[a] / row[classes == classes[a]].sum()) / 20
    assert why_it_stalls.entropies(p, same) == pytest.approx((whole, left))
    assert why_it_stalls.entropies(p, torch.arange(15).expand(20, -1)) == pytest.approx((whole, 0))
    assert why_it_stalls.entropies(p, torch.zeros_like(same)) == pytest.approx((whole, whole))

    groups, actions, logits = same[0], torch.from_numpy(rng.integers(15, size=20)), p.log()
    wanted = -np.mean([np.log(row[(groups == groups[a]).numpy()].sum()) for row, a in zip(p.numpy(), actions)])
    assert why_it_stalls.cross_entropy(logits, actions, groups) == pytest.approx([-np.log(p.numpy()[range(20), actions]).mean(), wanted])


def test_actions_that_do_the_same():
    """In coinrun the six buttons do what no move does, and the nine moves differ; in fruitbot up and down do nothing, and one button throws."""
    for env_id, wanted in (("coinrun", [*range(9), *[4] * 6]), ("fruitbot", [0, 0, 0, 3, 3, 3, 6, 6, 6, 9, *[3] * 5])):
        levels = {"num_levels": 16, "start_level": 0}
        torch.manual_seed(0)
        probabilities, same_frame, groups = why_it_stalls.try_actions(env_id, ROOT / "experts" / f"{env_id}.pt", levels, 160)
        assert groups.tolist() == wanted and len(probabilities) == len(same_frame) >= 160
        assert torch.allclose(probabilities.sum(1), torch.ones(len(probabilities)))
        first = same_frame.gather(1, same_frame)  # a class is named by its first action, and no group is split
        assert torch.equal(first, same_frame) and torch.equal(same_frame[:, groups], same_frame)


def test_provenance(pipeline):
    """Every results.json says what it rests on."""
    for stage in STAGES:
        results = pipeline.results[stage]
        assert results["versions"].keys() == {"python", "torch", "numpy", "procgen"} and results["threads"] == 1
        assert results["command"].startswith("python ") and f"{stage}.py" in results["command"]
        commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        assert not commit or commit.startswith(results["commit"].removesuffix("-dirty"))
    assert json.dumps(results)
