"""The checks that the paper's readers ask for: runs them, collects their rows, draws them.

    benchmark/experiments.sh small stochastic FrozenLake-v1 1 2 3   # or bottleneck, transfer, delay, video
    python benchmark/questions.py                                   # draws all rows that there are

A question compares variants of LAPO at the quickstart's size: other games (altered.py), flags of pretraining,
or videos. Each has a folder in runs/questions; what is finished is skipped. Writes benchmark/results/
questions.csv, a row a number; questions-QUESTION.png, a dot a seed, lines through their means; and
questions.md, means with 95% intervals (Student's t over seeds: wide with three).
"""

import csv
import json
import shlex
import subprocess
import sys
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from filelock import FileLock
from scipy import stats
from sklearn.isotonic import IsotonicRegression
from sklearn.metrics import mutual_info_score
from tqdm import tqdm

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark")]
from altered import altered_games  # noqa: E402

import lapo_decode as decode  # noqa: E402
import lapo_inspect as inspect  # noqa: E402
from first import cluster  # noqa: E402

RUNS, RESULTS = Path("runs/questions"), ROOT / "benchmark" / "results"
KEYS = ["question", "env_id", "variant", "seed", "measure", "n_labels"]
FLAGS = {  # of the stages: experiments.sh's, half as much cloning and online play, label counts of our own
    "collect_expert_data": "--expert-checkpoint experts/coinrun.pt --num-train-frames 65536 "
    "--num-test-frames 8192 --num-envs 16",  # in few games, so that a time limit cuts off few episodes
    "lapo_pretrain": "--num-updates 2000 --batch-size 32 --learning-rate 5e-4 --warmup-updates 500 "
    "--patch-size 2 --idm-scale 1 --fdm-width 16 --vq-dim 4 --predict-change",
    "lapo_bc": "--num-updates 2500 --batch-size 64 --learning-rate 1e-3 --warmup-updates 50 --policy-scale 1",
    "lapo_decode": "--num-labels 16 64 128 512 --num-draws 4 --eval-episodes 120 --temperature 0.5 "
    "--decoder-updates 200 --cloning-updates 500 --cloning-learning-rate 3e-3 --policy-batch-size 64",
    "lapo_finetune_ppo": "--total-timesteps 81920 --action-head-warmup 7000 10000 "
    "--value-head-warmup 5000 10000 --linear-warmup 10000 40000",
    "ppo_procgen": "--total-timesteps 81920 --num-steps 64 --ent-coef 0.0025 --learning-rate 5e-4 "
    "--no-anneal-lr --scale 1 --patch-size 2 --num-levels 16",
}
LAKE = {  # what the small world has of its own, quickstart.sh's
    "collect_expert_data": "--demonstrator value_iteration --num-levels 16 --num-train-frames 4096 "
    "--num-test-frames 4096 --num-envs 32",
    "lapo_pretrain": "--num-updates 600 --batch-size 32 --learning-rate 1e-3 --warmup-updates 100 "
    "--idm-differences --no-vq --vq-num-codebooks 1 --vq-num-slots 1 --vq-dim 4 --patch-size 2 "
    "--idm-scale 0.5 --fdm-width 8 --predict-change",
    "lapo_bc": "--num-updates 1200 --batch-size 64 --learning-rate 1e-3 --warmup-updates 50 "
    "--policy-scale 0.5",
    "lapo_finetune_ppo": "--total-timesteps 20480 --num-envs 16 --action-head-warmup 1750 2500 "
    "--value-head-warmup 1250 2500 --linear-warmup 2500 10000 --decoder-frames 2500 400000",
    "ppo_procgen": FLAGS["ppo_procgen"]
    .replace("81920", "20480 --num-envs 16")
    .replace("--scale 1", "--scale 0.5"),
}
RATES, DELAYS, FRAMES = (0, 0.1, 0.25, 0.5), (0, 1, 2, 4), (2048, 16384, 65536, 131072)
SIZES = {  # codebooks x slots x codes, 2x4x64 the paper's: flags; latents have 32 dimensions in all
    "1x1x8, 3 bits": "--vq --vq-num-codebooks 1 --vq-num-slots 1 --vq-num-codes 8 --vq-dim 32",
    "1x1x64, 6 bits": "--vq --vq-num-codebooks 1 --vq-num-slots 1 --vq-num-codes 64 --vq-dim 32",
    "1x2x16, 8 bits": "--vq --vq-num-codebooks 1 --vq-num-slots 2 --vq-num-codes 16 --vq-dim 16",
    "2x4x64, 48 bits": "--vq --vq-num-codebooks 2 --vq-num-slots 4 --vq-num-codes 64 --vq-dim 4",
    "no VQ": "--no-vq --vq-num-codebooks 2 --vq-num-slots 4 --vq-dim 4",
    "no VQ, untrained": "--no-vq --vq-num-codebooks 2 --vq-num-slots 4 --vq-dim 4 --num-updates 1",
}
WORLDS = {
    "its own": {},
    "other levels": {"start_level": 1000},
    "no background": {"use_backgrounds": False},
    "plain colours": {"use_monochrome_assets": True},
    "other themes, harder levels": {"distribution_mode": "hard"},
}
CPU = torch.device("cpu")
# What Procgen's actions do on coinrun: down and the buttons change 2% of next frames at most, up 20%
EFFECT = torch.tensor([1, 1, 2, 4, 4, 5, 7, 7, 8, 4, 4, 4, 4, 4, 4])


@dataclass
class Args:
    question: tyro.conf.Positional[str] = ""  # see above; none: draw what there is
    env_id: tyro.conf.Positional[str] = "coinrun"  # coinrun; stochastic, bottleneck: FrozenLake-v1, too
    seeds: tyro.conf.Positional[tuple[int, ...]] = (1, 2, 3)  # the videos are seed 1's, but in `video`


# Runs


def folder(env_id, variant):
    return RUNS / env_id / variant.replace(",", "").replace(" ", "-")


def run(env_id, variant, stage, seed, *flags, altered=()):
    """results.json of a stage's run in the variant's folder, and where it lies; made if it is not there."""
    path = folder(env_id, variant) / f"{env_id}__{stage}__{seed}" / "results.json"
    own = (LAKE if env_id == "FrozenLake-v1" else {}).get(stage, FLAGS[stage])
    command = [f"{stage}.py", "--env-id", env_id, "--seed", seed, "--runs-dir", path.parent.parent]
    if stage not in ("collect_expert_data", "lapo_decode"):  # these are in float32 anyway
        command.append("--no-bf16")  # or each machine would take what is faster there
    command = [*map(str, command), *own.split(), *map(str, flags)]
    path.parent.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.parent.parent / f".{path.parent.name}.lock"):  # another question may need the same run
        if not path.exists():
            wrapped = ["benchmark/altered.py", *altered, *command] if altered else command
            print("==", shlex.join(["python", *wrapped]), flush=True)
            subprocess.run([sys.executable, *wrapped], check=True)
    results = json.loads(path.read_text())
    if results["command"] != shlex.join(["python", *command]):
        sys.exit(f"error: {path} was made with other flags than today's: move its folder away")
    return results | {"path": path.parent}


def lapo(env_id, variant, seed, data_dir, pretrain="", bc="", decode="", labels=None, altered=()):
    """A variant's stages on videos, decoded with labels of these or others: {stage: results}."""
    made, data = {"data_dir": data_dir}, ("--data-dir", data_dir)
    made["pretrain"] = run(env_id, variant, "lapo_pretrain", seed, *data, *pretrain.split())
    made["bc"] = run(env_id, variant, "lapo_bc", seed, *data, *bc.split())
    return made | {"decode": decoded(env_id, variant, seed, made, labels or data_dir, decode, altered)}


def decoded(env_id, variant, seed, made, data_dir, flags="", altered=()):
    """results.json of lapo_decode.py in a variant's games, with its labels, for a latent policy."""
    flags = "--data-dir", data_dir, "--bc-checkpoint", made["bc"]["path"] / "checkpoint.pt", *flags.split()
    return run(env_id, variant, "lapo_decode", seed, *flags, altered=altered)


def collected(env_id, variant, flags="", altered=(), seed=1):
    """The dataset of a variant: the demonstrator's play in its games."""
    data_dir = folder(env_id, variant) / f"data-{seed}"
    flags = "--data-dir", data_dir, *flags.split()
    run(env_id, variant, "collect_expert_data", seed, *flags, altered=altered)
    if altered and not (data_dir / "test" / "happened.npy").exists():
        sys.exit(f"error: {data_dir} lacks happened.npy, as it was interrupted: delete {data_dir.parent}")
    return data_dir


def online(env_id, variant, seed, made, altered=(), stages=("lapo_finetune_ppo", "ppo_procgen")):
    """Returns after RL in a variant's games, with LAPO's policy and from scratch: {measure: return}."""
    flags = {"lapo_finetune_ppo": ("--bc-checkpoint", made["bc"]["path"] / "checkpoint.pt")}
    names = {"lapo_finetune_ppo": "RL + SL", "ppo_procgen": "PPO from scratch"}
    rl = {names[of]: run(env_id, variant, of, seed, *flags.get(of, ()), altered=altered) for of in stages}
    return {name: results["return_mean"] for name, results in rl.items()}


# What they are asked


def load(made):
    """Frames and windows of a variant's dataset; its IDM, the same untrained, its VQ."""
    env_id, path = made["pretrain"]["env_id"], made["pretrain"]["path"] / "checkpoint.pt"
    _, frames, windows = decode.load_dataset(SimpleNamespace(env_id=env_id, data_dir=made["data_dir"]))
    pretrained = torch.load(path, weights_only=True)
    idm, vq, _ = inspect.build_networks(pretrained["args"], CPU, pretrained)
    return frames, windows, idm, inspect.build_networks(pretrained["args"], CPU)[0], vq


def some(windows, seed, train, test):
    """So many windows of each split: {split: (n,)}."""
    sizes, rng = {"train": train, "test": test}, np.random.default_rng(seed)
    return {split: rng.permutation(windows[split])[:n] for split, n in sizes.items()}


def latents(idm, frames, t):
    """z_t at t {split: (n,)}: {split: (n, latent_dim)}."""
    return {s: torch.from_numpy(inspect.encode(idm, None, frames[s], t[s], CPU)[0]) for s in t}


def labels(frames, t):
    """The actions that were meant at t {split: (n,)}."""
    return {split: torch.from_numpy(frames[split].labels("actions")[t[split]]).long() for split in t}


def played(made):
    """Returns of a variant's decoded policy, of cloning, random play and the demonstrator in its games."""
    names = {"lapo_decoder": "LAPO + decoder", "cloning_from_scratch": "cloning"}
    found = {(names[row["method"]], row["n_labels"]): row["return_mean"] for row in made["decode"]["curve"]}
    return found | {"random": made["decode"]["random"]["return_mean"], "demonstrator": demonstrator(made)}


def demonstrator(made):
    """The mean return in the training videos, of episodes that began early enough to end in them."""
    data = json.loads((made["data_dir"] / "meta.json").read_text())
    games, limit = data["splits"]["train"]["num_envs"], 1000 if data["env_id"] == "coinrun" else 100
    first, returns = (np.load(made["data_dir"] / "train" / f"{name}.npy") for name in ("first", "returns"))
    first, returns = (of.reshape(games, -1)[:, :-limit] for of in (first, returns))
    return float(returns[first].mean())


def learned(made):
    """How well a variant predicts; what its latents tell of what was meant and carried out: bits, purity."""
    frames, windows, idm, untrained, vq = load(made)
    t, last = some(windows, 0, 2048, 2048), made["pretrain"]
    moved = {split: (frames[split][t[split]] != frames[split][t[split] + 1]).any((1, 2, 3)) for split in t}
    effect = EFFECT if last["env_id"] == "coinrun" else torch.arange(15)
    meant = done = {split: effect[actions] for split, actions in labels(frames, t).items()}
    paths = {split: frames[split].folders[0] / "happened.npy" for split in t}
    if paths["test"].exists():
        done = {split: effect[torch.from_numpy(np.load(paths[split])[t[split]]).long()] for split in t}
    if last["env_id"] != "coinrun":  # a wall's is no move
        done = {split: torch.where(torch.from_numpy(moved[split]), done[split], 4) for split in t}
    z = latents(idm, frames, t)
    found = {"loss": last["test/fdm_loss"], "loss of copying": last["test/copy_last_frame_loss"]}
    found["not as meant"] = (done["test"] != meant["test"]).float().mean().item()
    fresh = latents(untrained, frames, t)
    for name, of in {"meant": meant, "carried out": done}.items():
        found |= {f"bits, {name}": bits(z, of), f"bits, {name}, untrained IDM": bits(fresh, of)}
    found["bits of meant in carried out"] = mutual_info_score(meant["test"], done["test"]) / np.log(2)
    if vq:  # in use: as if slots were independent of each other, so at most this
        slots = vq(z["test"])[2].flatten(1).T.numpy()
        found["bits in use"] = sum(stats.entropy(np.bincount(slot), base=2) for slot in slots)
        found["bits, carried out, quantised"] = bits({split: vq(z[split])[0] for split in t}, done)
    actions, moved = meant["test"].numpy(), moved["test"]
    shuffled, clusters = actions.copy(), len(np.unique(actions)) + (not moved.all())  # one that stands still
    shuffled[moved] = np.random.default_rng(0).permutation(actions[moved])
    for name, of in {"meant": actions, "shuffled": shuffled}.items():
        found[f"purity, {name}"] = float(cluster(z["test"], clusters, of, moved)[2])
    return found


def bits(x, classes):
    """What inputs {split: (n, D)} tell of classes {split: (n,)}, at least: entropy - a decoder's loss."""
    torch.manual_seed(0)
    decoder = fit_decoder(x["train"], classes["train"], label_smoothing=0.0)
    with torch.no_grad():
        loss = F.cross_entropy(decoder(x["test"]), classes["test"]).item()
    return stats.entropy(classes["test"].bincount(), base=2) - loss / np.log(2)


def fit_decoder(x, actions, label_smoothing=0.05):
    """LAPO's decoder, of inputs (n, D) and actions (n,), as lapo_decode.py fits it."""
    decoder = decode.Decoder(x.shape[1], (192, 128, 64))
    decoder.mean.copy_(x.mean(0))
    decoder.std.copy_(x.std(0).clamp(min=0.01 * x.std(0).max()) + 1e-6)  # codes may hardly ever change
    args = SimpleNamespace(weight_decay=1e-2, label_smoothing=label_smoothing)
    return decode.fit(decoder, x.__getitem__, actions, 200, 1e-3, 512, args, nullcontext())


@torch.no_grad()
def accuracy(decoder, x, actions):
    """How often what a decoder holds most probable has the effect of the actions, on test windows."""
    effects = torch.zeros(len(x["test"]), 15).index_add(1, EFFECT, decoder(x["test"]).softmax(1))
    return (effects.argmax(1) == EFFECT[actions["test"]]).float().mean().item()


def commonest(actions):
    """The share of the commonest effect on test windows."""
    return EFFECT[actions["test"]].bincount().max().item() / len(actions["test"])


def stochastic(env_id, seed):
    kind = "--random" if env_id == "FrozenLake-v1" else "--sticky"
    for rate in RATES:
        variant, altered = ("as it is", ()) if rate == 0 else (f"{kind[2:]} {rate}", (kind, str(rate)))
        few = "--no-cloning" * (env_id == "coinrun" and rate > 0)  # it is long, no better than blind play
        data = collected(env_id, variant, altered=altered)
        made = lapo(env_id, variant, seed, data, decode=few, altered=altered)
        found = learned(made) | {"blind play": play(made, 0, seed, **{kind[2:]: rate})}
        yield rate, found | played(made) | online(env_id, variant, seed, made, altered)


def bottleneck(env_id, seed):
    data, more = collected(env_id, "as it is"), "--no-cloning --num-labels 16 64 128 512 2048"
    for size in [of for of in SIZES if env_id != "coinrun" or of != "1x1x64, 6 bits"]:  # it is long there
        if same := env_id == "coinrun" and size == "2x4x64, 48 bits":  # coinrun's as it is
            made = lapo(env_id, "as it is", seed, data)
            made["decode"] = decoded(env_id, size, seed, made, data, more)
        else:
            made = lapo(env_id, size, seed, data, SIZES[size], decode=more)
        rl = online(env_id, "as it is" if same else size, seed, made, stages=["lapo_finetune_ppo"])
        yield size, learned(made) | played(made) | rl


def transfer(env_id, seed):
    """A latent policy in other worlds: decoded there with labels from home, fine-tuned there; blind play."""
    own = lapo(env_id, "as it is", seed, collected(env_id, "as it is"))
    labeller = None
    for world, options in WORLDS.items():
        made, variant, altered = own, "as it is", ()
        if options:
            variant, altered = world, ("--options", json.dumps(options))
            made = own | {"data_dir": collected(env_id, world, altered=altered)}
            few = own["data_dir"], "--no-cloning --num-labels 512"
            made["decode"] = decoded(env_id, world, seed, own, *few, altered)
        frames, windows, idm, untrained, _ = load(made)
        t = some(windows, seed, 2048, 4096)
        z, actions, guess = latents(idm, frames, t), labels(frames, t), latents(untrained, frames, t)
        of_this = fit_decoder(z["train"], actions["train"])
        labeller = labeller or of_this  # the first world is its own
        found = {"accuracy, its own world's labels": accuracy(labeller, z, actions)}
        found["accuracy, this world's labels"] = accuracy(of_this, z, actions)
        of_this = fit_decoder(guess["train"], actions["train"])
        found["accuracy, this world's labels, untrained IDM"] = accuracy(of_this, guess, actions)
        found["accuracy, commonest action"] = commonest(actions)
        found["blind play"] = play(own, 0, seed, options=options)
        yield world, found | played(made) | online(env_id, variant, seed, made, altered)


def delay(env_id, seed):
    """An action that shows k steps late: what latents tell of it, what that costs, what mends it."""
    for k in DELAYS:
        variant, altered, few = "as it is", (), ""
        if k:
            variant, altered, few = f"delay {k}", ("--delay", str(k)), "--num-labels 512"
        data = collected(env_id, variant, altered=altered)
        made = lapo(env_id, variant, seed, data, decode=few, altered=altered)
        yield k, played(made) | late(made, k, seed)


def late(made, k, seed):
    """Accuracies of decoders with 512 labels that see several latents, or pi's; returns with two of them."""
    cloned = torch.load(made["bc"]["path"] / "checkpoint.pt", weights_only=True)
    frames, windows, idm, _, _ = load(made)
    policy, steps = new_policy(cloned), np.arange(-k, k + 1)
    policy.load_state_dict(cloned["policy"])
    inside = {split: t[np.isin(t[:, None] + steps, t).all(1)] for split, t in windows.items()}  # one episode
    t = some(inside, seed, 512, 2048)
    near, actions = {split: (t[split][:, None] + steps).ravel() for split in t}, labels(frames, t)
    z, pi = latents(idm, frames, near), {split: act(policy, frames[split], near[split]) for split in t}
    found, decoders, now = {"accuracy, commonest action": commonest(actions)}, {}, slice(k, k + 1)
    inputs = {"z_t": (z, now), "z_t+k": (z, slice(2 * k, None)), "z_t to z_t+k": (z, slice(k, None))}
    inputs |= {"pi(o_t)": (pi, now), "pi(o_t-k) to pi(o_t)": (pi, slice(k + 1))}
    for name, (of, which) in inputs.items():
        x = {split: of[split].view(len(t[split]), 2 * k + 1, -1)[:, which].flatten(1) for split in t}
        torch.manual_seed(seed)
        decoders[name] = fit_decoder(x["train"], actions["train"])
        found[f"accuracy from {name}"] = accuracy(decoders[name], x, actions)
    found["decoder of pi(o_t)", 512] = play(made, k, seed, lambda obs, _: decoders["pi(o_t)"](policy(obs)))
    if k:
        recalled = recall(policy, decoders["pi(o_t-k) to pi(o_t)"], k)
        found["decoder of pi at several steps", 512] = play(made, k, seed, recalled)
        ahead = clone_ahead(cloned, made, frames, windows, k, seed)
        found["pi of later latents", 512] = play(made, k, seed, lambda obs, _: decoders["z_t+k"](ahead(obs)))
    return found


def new_policy(cloned):
    """A latent policy of the sizes of a checkpoint of lapo_bc.py, untrained."""
    sizes = cloned["args"]["policy_scale"], len(cloned["policy"]["mean"])
    return decode.LatentPolicy(*sizes, cloned["pretrain_args"]["patch_size"])


@torch.no_grad()
def act(policy, frames, t):
    """pi(o_t) of times t (n,): (n, latent_dim)."""
    pieces = np.split(t, range(512, len(t), 512))
    return torch.cat([policy(torch.from_numpy(frames[piece])) for piece in pieces])


def recall(policy, decoder, k):
    """A policy (obs, episode) -> logits that decodes pi of the last k + 1 steps, at first of fewer."""
    past = {}

    def act(obs, episode):
        for e, z in zip(episode, policy(obs)):
            past[e] = [*past.get(e, [z] * (k + 1))[1:], z]
        return decoder(torch.stack([torch.cat(past[e]) for e in episode]))

    return act


def clone_ahead(cloned, made, frames, windows, k, seed):
    """A policy cloned as lapo_bc.py does, but on the latents z_{t+k} that its own actions will cause."""
    z = torch.load(made["bc"]["path"] / "latents.pt", weights_only=True)
    t, a = windows["train"], cloned["args"]
    now = np.flatnonzero(np.isin(t[:, None] + np.arange(k + 1), t).all(1))
    torch.manual_seed(seed)
    policy = new_policy(cloned).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(policy.parameters())
    for update in tqdm(range(a["num_updates"]), f"clone z_t+{k}"):
        warmed_up = [0, a["warmup_updates"], a["num_updates"]]
        optimizer.param_groups[0]["lr"] = a["learning_rate"] * np.interp(update, warmed_up, [0.01, 1, 0])
        i = now[torch.randint(len(now), (a["batch_size"],)).numpy()]
        loss = F.mse_loss(policy(torch.from_numpy(frames["train"][t[i]])), z[np.searchsorted(t, t[i] + k)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return policy.eval()


def play(made, k, seed, policy=None, options=None, **how):
    """The mean return of 120 episodes in games altered like that; of blind play, if there is no policy."""
    data = json.loads((made["data_dir"] / "meta.json").read_text())
    often = np.bincount(np.load(made["data_dir"] / "train" / "actions.npy"), minlength=15)
    policy = policy or (lambda obs, _: torch.from_numpy(often).log().expand(len(obs), 15) / 2)
    with altered_games(options or {}, delay=k, **how):
        env = decode.make_env(data["env_id"], 60, data["num_levels"], data["start_level"], seed)
    run, rng = SimpleNamespace(leave_if_stopped=lambda: None), torch.Generator().manual_seed(seed)
    return float(decode.evaluate(lambda *x: policy(*x) / 0.5, env, 120, rng, run).mean())


def video(env_id, seed):
    """More frames, of more games, with the same updates, and with updates in proportion; the same labels."""
    own = collected(env_id, "as it is")
    for frames in FRAMES:
        videos, part = f"{frames} frames", frames / 65536
        if part == 1:  # the only one whose cloning, random play and demonstrator are taken
            found = played(lapo(env_id, "as it is", seed, own))
            yield frames, found | {("in proportion", 128): found[FEW]}
            continue
        games = max(1, frames // 4096)  # as long as the others
        flags = f"--num-train-frames {frames} --num-envs {games}"
        data = collected(env_id, videos, flags, seed=seed)
        how = {"decode": "--no-cloning --num-labels 128", "labels": own}
        found = played(lapo(env_id, videos, seed, data, **how))
        warmups = [f"--warmup-updates {updates * min(1, part):.0f}" for updates in (500, 50)]
        longer = [f"--num-updates {updates * part:.0f} {w}" for updates, w in zip((2000, 2500), warmups)]
        also = played(lapo(env_id, f"{videos}, in proportion", seed, data, *longer, **how))
        yield frames, {FEW: found[FEW], ("in proportion", 128): also[FEW]}


QUESTIONS = {f.__name__: f for f in (stochastic, bottleneck, transfer, delay, video)}


def ask(question, env_id, seed):
    """Rows of questions.csv: one seed's answers."""
    for variant, found in QUESTIONS[question](env_id, seed):
        for key, value in found.items():
            measure, n_labels = key if isinstance(key, tuple) else (key, "")
            yield dict(zip(KEYS, map(str, (question, env_id, variant, seed, measure, n_labels)))), value


def add(row, path):
    """Adds a row to questions.csv, or replaces it."""
    with FileLock(RUNS / ".lock"):  # another question may write
        rows = read(path) | {tuple(row[key] for key in KEYS): row}
        writer = csv.DictWriter(text := StringIO(), [*KEYS, "value"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows.values())
        decode.write_whole(path, text.getvalue())


def read(path):
    """Rows of questions.csv by their KEYS; {} where there is none yet."""
    rows = csv.DictReader(path.open(newline="")) if path.exists() else ()
    return {tuple(row[key] for key in KEYS): row for row in rows}


# Pictures


class Answers:
    """Rows of a question in one game: of a variant, measure and n_labels the seeds' numbers."""

    def __init__(self, rows):
        self.found = defaultdict(dict)
        for row in rows:
            self.found[row["variant"], row["measure"], row["n_labels"]][row["seed"]] = float(row["value"])
        self.variants = list(dict.fromkeys(row["variant"] for row in rows))

    def of(self, variant, measure, n=""):
        """A number a seed: (seeds,)."""
        return np.array([value for _, value in sorted(self.found[str(variant), measure, str(n)].items())])

    def shares(self, variant, measure, n=""):
        """The same as shares of the demonstrator's return above random play, in the variant's games."""
        games = variant if len(self.of(variant, "random")) else 65536  # of video's variants one has them
        low, high = (self.of(games, end).mean() for end in ("random", "demonstrator"))
        return (self.of(variant, measure, n) - low) / (high - low)

    def labels_for(self, variant, share):
        """Labels that a seed's decoder needs for a share, by a line that never falls; inf if too few."""
        counts = sorted(int(n) for v, m, n in self.found if (v, m) == (str(variant), "LAPO + decoder"))
        curves = np.transpose([self.shares(variant, "LAPO + decoder", n) for n in counts])  # (seeds, counts)
        curves = [IsotonicRegression().fit_transform(counts, curve) for curve in curves]
        return np.array([2 ** np.interp(share, curve, np.log2(counts), right=np.inf) for curve in curves])


def interval(values):
    """Mean of a number a seed ± half of its 95% interval, as text; not of one seed or infinite ones."""
    if np.isinf(values).any():
        return "; ".join(f"{value:.3g}" for value in values)
    if len(values) < 2:
        return f"{np.mean(values):.3g}" if len(values) else ""
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return f"{np.mean(values):.3g} ± {half:.2g}"


def draw(ax, x, values, color, label):
    """A line through the means of values, [(seeds,)] at x, or medians of labels, and a dot a seed."""
    middle = np.median if label.startswith("labels") else np.mean
    there = [(at, np.nan_to_num(of, posinf=NEVER)) for at, of in zip(x, values) if len(of)]
    ax.plot([at for at, _ in there], [middle(v) for _, v in there], color=color, marker="o", label=label)
    for at, of_seeds in there:
        ax.scatter([at] * len(of_seeds), of_seeds, s=10, color=color, alpha=0.6, zorder=3)


NEVER = 4096  # where a picture has what more than 2,048 labels may reach
PREDICTION = "prediction, squared error", [("loss", ""), ("loss of copying", "")]
TOLD = [f"bits, {of}{control}" for of in ("meant", "carried out") for control in ("", ", untrained IDM")]
TOLD.append("bits of meant in carried out")
RL, PPO, BLIND = ("RL + SL", ""), ("PPO from scratch", ""), ("blind play", "")
FEW, MANY = ("LAPO + decoder", 128), ("LAPO + decoder", 512)
ENDS = ("demonstrator", ""), ("random", "")  # whose returns fall with the others'
MENDED = [(f"decoder of pi{x}", 512) for x in ("(o_t)", " at several steps")] + [("pi of later latents", 512)]
LABELS = ("its own world's labels", "this world's labels", "this world's labels, untrained IDM")
COMMONEST = ("accuracy, commonest action", "")
SEEN = ("z_t", "z_t+k", "z_t to z_t+k", "pi(o_t)", "pi(o_t-k) to pi(o_t)")
PANELS = {  # question: what x is, panels [(title, [(measure, n_labels)])]
    "stochastic": (
        "rate of random actions (FrozenLake), of sticky ones (coinrun)",
        [
            PREDICTION,
            ("latents tell of actions, bits", [(x, "") for x in TOLD]),
            ("play", [FEW, ("cloning", 128), RL, PPO, BLIND]),
        ],
    ),
    "bottleneck": (
        "codebooks x slots x codes",
        [
            PREDICTION,
            ("bits", [("bits in use", ""), ("bits, carried out", ""), ("bits, carried out, quantised", "")]),
            ("k-means and actions", [("purity, meant", ""), ("purity, shuffled", "")]),
            ("play", [FEW, RL]),
            (f"labels for a share ({NEVER:,}: never)", [("labels for 0.5", ""), ("labels for 0.8", "")]),
        ],
    ),
    "transfer": (
        "",
        [
            ("return", [MANY, RL, PPO, *ENDS, BLIND]),
            ("the IDM as a labeller", [*((f"accuracy, {x}", "") for x in LABELS), COMMONEST]),
        ],
    ),
    "delay": (
        "steps until an action shows",
        [
            ("what tells a_t, 512 labels", [*((f"accuracy from {x}", "") for x in SEEN), COMMONEST]),
            ("return", [MANY, ("cloning", 512), *MENDED, *ENDS]),
        ],
    ),
    "video": ("frames of video", [("play", [FEW, ("in proportion", 128)])]),
}
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#999999", "#56B4E9"]  # Okabe and Ito


def numbers(answers, variant, title, measure, n):
    """What a panel shows of a variant: (seeds,)."""
    if measure.startswith("labels for"):
        return answers.labels_for(variant, float(measure.split()[-1]))
    return (answers.shares if title == "play" else answers.of)(variant, measure, n)


def plot(question, games, path):
    """A question's picture: a row a game {env_id: Answers}, a column a panel."""
    label, panels = PANELS[question]
    size = 5 * len(panels), 4.2 * len(games)
    fig, axes = plt.subplots(len(games), len(panels), figsize=size, squeeze=False, layout="constrained")
    for row, (env_id, answers) in zip(axes, games.items()):
        x = [float(v) if v[-1].isdigit() else i for i, v in enumerate(answers.variants)]  # or names
        for ax, (title, lines) in zip(row, panels):
            for color, (measure, n) in zip(COLORS, lines):
                values = [numbers(answers, v, title, measure, n) for v in answers.variants]
                name = f"{measure}, {n} labels" if n else measure
                if question == "video":
                    name += slope(x, values)
                draw(ax, x, values, color, name)
            if question == "video":
                cloning = answers.shares(65536, "cloning", 128).mean()
                ax.axhline(cloning, color=COLORS[1], ls="--", label="cloning, 128 labels")
                ax.set_xscale("log", base=2)
            if title == "play":
                ax.axhline(1, color="#333333", ls=":", lw=1)
                title = "share of the demonstrator's return"
            if measure.startswith("labels for"):
                ax.set_yscale("log", base=2)
            ax.set(title=f"{env_id}: {title}", xlabel=label)
            if question != "video":
                ax.set_xticks(x, [v.replace(", ", ",\n") for v in answers.variants], fontsize=8)
            ax.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=2)
    fig.savefig(path, dpi=90, bbox_inches="tight")


def slope(x, values):
    """What doubling x adds to values [(seeds,)] at x, as text: a line a seed, the mean of their slopes."""
    slopes = [stats.linregress(np.log2(x), of_seed).slope for of_seed in zip(*values)]
    return f" ({interval(np.array(slopes))} a doubling)"


def table(question, env_id, answers):
    """Means with 95% intervals as Markdown: a row a measure, a column a variant; shares as drawn."""
    lines = [f"\n## {question}, {env_id}\n", "| | " + " | ".join(answers.variants) + " |"]
    lines.append("|---" * (1 + len(answers.variants)) + "|")
    rows = [(measure, "", measure, n) for measure, n in dict.fromkeys((m, n) for _, m, n in answers.found)]
    for title, drawn in PANELS[question][1]:
        if title == "play" or title.startswith("labels"):
            rows += [(f"{title}: {measure}", title, measure, n) for measure, n in drawn]
    for name, title, measure, n in rows:
        values = [numbers(answers, v, title, measure, n) for v in answers.variants]
        name += f", {n} labels" * bool(n)
        if question == "video" and title:
            name += slope(list(map(float, answers.variants)), values)
        lines.append(f"| {name} | " + " | ".join(map(interval, values)) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    args, path = tyro.cli(Args, description=__doc__), RESULTS / "questions.csv"
    if args.question and args.question not in QUESTIONS:
        sys.exit(f"error: {args.question} is none of {', '.join(QUESTIONS)}")
    small = ["FrozenLake-v1"] * (args.question in ("stochastic", "bottleneck"))
    if args.env_id not in ("coinrun", *small):
        sys.exit(f"error: ENV_ID is {args.env_id}, expected {' or '.join(['coinrun', *small])}")
    failed = 0
    for seed in args.seeds if args.question else ():
        try:
            for row, value in ask(args.question, args.env_id, seed):
                add(row | {"value": f"{value:.4g}"}, path)
        except subprocess.CalledProcessError as e:  # the stage has said why
            failed = e.returncode
            if failed != 1:
                sys.exit(failed)  # it was stopped: so are the other seeds
    rows, tables = read(path), []
    for question in QUESTIONS:
        mine = [row for row in rows.values() if row["question"] == question]
        games = {row["env_id"]: None for row in mine}
        for env_id in games:
            games[env_id] = Answers([row for row in mine if row["env_id"] == env_id])
            tables.append(table(question, env_id, games[env_id]))
        if games:
            plot(question, games, RESULTS / f"questions-{question}.png")
    (RESULTS / "questions.md").write_text("Means over seeds ± half of a 95% interval.\n" + "".join(tables))
    sys.exit(failed)
