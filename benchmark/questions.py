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

from lapo_bc import LatentPolicy, latent_moments, load_dataset, scheduled_rate  # noqa: E402
from lapo_decode import Decoder, evaluate, fit_classifier, load_labels, make_env  # noqa: E402
from tools.first_report import cluster  # noqa: E402
from tools.loading import encode, load_lapo, load_policy, new_lapo, write_whole  # noqa: E402

RUNS = Path("runs/questions")
RESULTS = ROOT / "benchmark" / "results"
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
    "--no-vq --vq-num-codebooks 1 --vq-num-slots 1 --vq-dim 4 --patch-size 2 "
    "--idm-scale 0.5 --fdm-width 8 --predict-change",
    "lapo_bc": "--num-updates 1200 --batch-size 64 --learning-rate 1e-3 --warmup-updates 50 "
    "--policy-scale 0.5",
    "lapo_finetune_ppo": "--total-timesteps 20480 --num-envs 16 --action-head-warmup 1750 2500 "
    "--value-head-warmup 1250 2500 --linear-warmup 2500 10000 --decoder-frames 2500 400000",
    "ppo_procgen": FLAGS["ppo_procgen"]
    .replace("81920", "20480 --num-envs 16")
    .replace("--scale 1", "--scale 0.5"),
}
RATES = (0, 0.1, 0.25, 0.5)  # of random or sticky actions
DELAYS = (0, 1, 2, 4)  # steps
FRAMES = (2048, 16384, 65536, 131072)  # of video
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


# ---- Runs ----


def folder(env_id, variant):
    return RUNS / env_id / variant.replace(",", "").replace(" ", "-")


def flags_of(env_id, stage):
    if env_id == "FrozenLake-v1" and stage in LAKE:
        return LAKE[stage].split()
    return FLAGS[stage].split()


def run(env_id, variant, stage, seed, *flags, altered=()):
    """results.json of a stage's run in the variant's folder, and where it lies; made if it is not there."""
    runs_dir = folder(env_id, variant)
    run_dir = runs_dir / f"{env_id}__{stage}__{seed}"
    command = [f"{stage}.py", "--env-id", env_id, "--seed", seed, "--runs-dir", runs_dir]
    if stage not in ("collect_expert_data", "lapo_decode"):  # these are in float32 anyway
        command.append("--no-bf16")  # or each machine would take what is faster there
    command = [str(part) for part in [*command, *flags_of(env_id, stage), *flags]]
    runs_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / "results.json"
    with FileLock(runs_dir / f".{run_dir.name}.lock"):  # another question may need the same run
        if not path.exists():
            wrapped = command
            if altered:
                wrapped = ["benchmark/altered.py", *altered, *command]
            print("==", shlex.join(["python", *wrapped]), flush=True)
            subprocess.run([sys.executable, *wrapped], check=True)
    results = json.loads(path.read_text())
    if results["command"] != shlex.join(["python", *command]):
        sys.exit(f"error: {path} was made with other flags than today's: move its folder away")
    return {**results, "path": run_dir}


def lapo(env_id, variant, seed, data_dir, pretrain="", bc="", decode="", labels=None, altered=()):
    """A variant's stages on videos, decoded with labels of these or others: {stage: results}."""
    data = ("--data-dir", data_dir)
    made = {"data_dir": data_dir}
    made["pretrain"] = run(env_id, variant, "lapo_pretrain", seed, *data, *pretrain.split())
    made["bc"] = run(env_id, variant, "lapo_bc", seed, *data, *bc.split())
    made["decode"] = decoded(env_id, variant, seed, made, labels or data_dir, decode, altered)
    return made


def decoded(env_id, variant, seed, made, data_dir, flags="", altered=()):
    """results.json of lapo_decode.py in a variant's games, with its labels, for a latent policy."""
    checkpoint = made["bc"]["path"] / "checkpoint.pt"
    inputs = ("--data-dir", data_dir, "--bc-checkpoint", checkpoint)
    return run(env_id, variant, "lapo_decode", seed, *inputs, *flags.split(), altered=altered)


def collected(env_id, variant, flags="", altered=(), seed=1):
    """The dataset of a variant: the demonstrator's play in its games."""
    data_dir = folder(env_id, variant) / f"data-{seed}"
    flags = ("--data-dir", data_dir, *flags.split())
    run(env_id, variant, "collect_expert_data", seed, *flags, altered=altered)
    if altered and not (data_dir / "test" / "happened.npy").exists():
        sys.exit(f"error: {data_dir} lacks happened.npy, as it was interrupted: delete {data_dir.parent}")
    return data_dir


def fine_tuned(env_id, variant, seed, made, altered=()):
    """{measure: return} after RL in a variant's games with LAPO's policy."""
    checkpoint = made["bc"]["path"] / "checkpoint.pt"
    flags = ("--bc-checkpoint", checkpoint)
    results = run(env_id, variant, "lapo_finetune_ppo", seed, *flags, altered=altered)
    return {"RL + SL": results["return_mean"]}


def online(env_id, variant, seed, made, altered=()):
    """{measure: return} after RL in a variant's games, with LAPO's policy and from scratch."""
    found = fine_tuned(env_id, variant, seed, made, altered)
    results = run(env_id, variant, "ppo_procgen", seed, altered=altered)
    found["PPO from scratch"] = results["return_mean"]
    return found


# ---- What they are asked ----


def read_meta(made):
    return json.loads((made["data_dir"] / "meta.json").read_text())


def load_splits(made):
    """The Frames of a variant's dataset, {split: Frames}."""
    args = SimpleNamespace(env_id=made["pretrain"]["env_id"], data_dir=made["data_dir"])
    _, train, test = load_dataset(args)
    return {"train": train, "test": test}


def load_networks(made):
    """IDM, VQ and FDM of a variant, trained and as they began."""
    pretrained = torch.load(made["pretrain"]["path"] / "checkpoint.pt", weights_only=True)
    return load_lapo(pretrained, CPU), new_lapo(pretrained["args"])


def choose(windows, seed, train, test):
    """So many windows of each split {split: (n,)}: {split: (n,)}."""
    rng = np.random.default_rng(seed)
    t_train = rng.permutation(windows["train"])[:train]
    return {"train": t_train, "test": rng.permutation(windows["test"])[:test]}


def windows_of(frames):
    return {split: frames[split].windows for split in frames}


def latents(networks, frames, t):
    """z_t at t {split: (n,)}: {split: (n, latent_dim)}."""
    found = {}
    for split in t:
        found[split] = torch.from_numpy(encode(networks, frames[split], t[split], CPU).z)
    return found


def labels(frames, t, name="actions"):
    """The actions that were meant at t {split: (n,)}; happened: those that were carried out."""
    found = {}
    for split in t:
        actions = load_labels(frames[split], name)
        found[split] = torch.from_numpy(actions[t[split]]).long()
    return found


def played(made):
    """Returns of a variant's decoded policy, of cloning, random play and the demonstrator in its games."""
    names = {"lapo_decoder": "LAPO + decoder", "cloning_from_scratch": "cloning"}
    found = {}
    for row in made["decode"]["curve"]:
        found[names[row["method"]], row["n_labels"]] = row["return_mean"]
    found["random"] = read_meta(made)["random"]["return_mean"]
    found["demonstrator"] = demonstrator(made)
    return found


def demonstrator(made):
    """The mean return in the training videos, of episodes that began early enough to end in them."""
    data = read_meta(made)
    games = data["splits"]["train"]["num_envs"]
    limit = 1000 if data["env_id"] == "coinrun" else 100
    first = np.load(made["data_dir"] / "train" / "first.npy").reshape(games, -1)[:, :-limit]
    returns = np.load(made["data_dir"] / "train" / "returns.npy").reshape(games, -1)[:, :-limit]
    return float(returns[first].mean())


def learned(made):
    """How well a variant predicts; what its latents tell of what was meant and carried out: bits, purity."""
    frames = load_splits(made)
    networks, untrained = load_networks(made)
    t = choose(windows_of(frames), 0, 2048, 2048)
    coinrun = made["pretrain"]["env_id"] == "coinrun"
    effect = EFFECT if coinrun else torch.arange(15)
    meant = {split: effect[actions] for split, actions in labels(frames, t).items()}
    done = meant
    if load_labels(frames["test"], "happened") is not None:
        done = {split: effect[actions] for split, actions in labels(frames, t, "happened").items()}
    moved = {}
    for split in t:
        before = frames[split][t[split]]
        after = frames[split][t[split] + 1]
        moved[split] = torch.from_numpy((before != after).any((1, 2, 3)))
    if not coinrun:  # a wall's is no move
        done = {split: torch.where(moved[split], done[split], 4) for split in t}

    z = latents(networks, frames, t)
    fresh = latents(untrained, frames, t)
    found = {
        "loss": made["pretrain"]["test/fdm_loss"],
        "loss of copying": made["pretrain"]["test/copy_last_frame_loss"],
        "not as meant": (done["test"] != meant["test"]).float().mean().item(),
    }
    for name, classes in {"meant": meant, "carried out": done}.items():
        found[f"bits, {name}"] = bits(z, classes)
        found[f"bits, {name}, untrained IDM"] = bits(fresh, classes)
    found["bits of meant in carried out"] = mutual_info_score(meant["test"], done["test"]) / np.log(2)
    if networks.vq:
        quantised = {}
        with torch.no_grad():
            for split in t:
                quantised[split], _, codes, _ = networks.vq(z[split])
        found["bits in use"] = bits_in_use(codes.numpy())
        found["bits, carried out, quantised"] = bits(quantised, done)
    found["purity, meant"], found["purity, shuffled"] = purities(
        z["test"].numpy(), meant["test"].numpy(), moved["test"].numpy()
    )
    return found


def bits_in_use(codes):
    """Entropy of codes (n, N, H), as if slots were independent of each other, so at most this."""
    slots = codes.reshape(len(codes), -1).T
    return sum(stats.entropy(np.bincount(slot), base=2) for slot in slots)


def purities(z, actions, moved):
    """Purity of k-means clusters of latents (n, latent_dim) with actions (n,), and with shuffled ones."""
    clusters = len(np.unique(actions))
    if not moved.all():  # one that stands still
        clusters += 1
    shuffled = actions.copy()
    shuffled[moved] = np.random.default_rng(0).permutation(actions[moved])
    _, _, meant, _ = cluster(z, clusters, actions, moved)
    _, _, by_chance, _ = cluster(z, clusters, shuffled, moved)
    return float(meant), float(by_chance)


def bits(x, classes):
    """What inputs {split: (n, D)} tell of classes {split: (n,)}, at least: entropy - a decoder's loss."""
    torch.manual_seed(0)
    decoder = fit_decoder(x["train"], classes["train"], label_smoothing=0.0)
    with torch.no_grad():
        loss = F.cross_entropy(decoder(x["test"]), classes["test"]).item()
    return stats.entropy(classes["test"].bincount(), base=2) - loss / np.log(2)


def fit_decoder(x, actions, label_smoothing=0.05):
    """LAPO's decoder, of inputs (n, D) and actions (n,), as lapo_decode.py fits it."""
    decoder = Decoder(x.shape[1], (192, 128, 64))
    std = x.std(0)
    decoder.mean.copy_(x.mean(0))
    decoder.std.copy_(std.clamp(min=0.01 * std.max()) + 1e-6)  # codes may hardly ever change
    return fit_classifier(
        decoder,
        lambda i: x[i],
        actions,
        updates=200,
        learning_rate=1e-3,
        batch_size=512,
        label_smoothing=label_smoothing,
        weight_decay=1e-2,
        autocast=nullcontext(),
    )


@torch.no_grad()
def accuracy(decoder, x, actions):
    """How often what a decoder holds most probable has the effect of the actions, on test windows."""
    probabilities = decoder(x["test"]).softmax(1)  # (n, 15)
    effects = torch.zeros(len(probabilities), 15).index_add(1, EFFECT, probabilities)
    return (effects.argmax(1) == EFFECT[actions["test"]]).float().mean().item()


def commonest(actions):
    """The share of the commonest effect on test windows."""
    return EFFECT[actions["test"]].bincount().max().item() / len(actions["test"])


def stochastic(env_id, seed):
    """Games that carry out random actions, or the last one again, with some probability."""
    kind = "random" if env_id == "FrozenLake-v1" else "sticky"
    for rate in RATES:
        variant = "as it is"
        altered = ()
        flags = ""
        if rate:
            variant = f"{kind} {rate}"
            altered = (f"--{kind}", str(rate))
            if env_id == "coinrun":
                flags = "--no-cloning"  # it is long, no better than blind play
        data = collected(env_id, variant, altered=altered)
        made = lapo(env_id, variant, seed, data, decode=flags, altered=altered)
        found = learned(made)
        found["blind play"] = play(made, 0, seed, **{kind: rate})
        yield rate, {**found, **played(made), **online(env_id, variant, seed, made, altered)}


def bottleneck(env_id, seed):
    """Other sizes of the codebooks."""
    data = collected(env_id, "as it is")
    flags = "--no-cloning --num-labels 16 64 128 512 2048"
    for size, sizes in SIZES.items():
        if env_id == "coinrun" and size == "1x1x64, 6 bits":  # it is long there
            continue
        variant = size
        if env_id == "coinrun" and size == "2x4x64, 48 bits":  # coinrun's as it is
            variant = "as it is"
            made = lapo(env_id, variant, seed, data)
            made["decode"] = decoded(env_id, size, seed, made, data, flags)
        else:
            made = lapo(env_id, size, seed, data, sizes, decode=flags)
        yield size, {**learned(made), **played(made), **fine_tuned(env_id, variant, seed, made)}


def transfer(env_id, seed):
    """A latent policy in other worlds: decoded there with labels from home, fine-tuned there; blind play."""
    own = lapo(env_id, "as it is", seed, collected(env_id, "as it is"))
    networks, untrained = load_networks(own)
    labeller = None
    for world, options in WORLDS.items():
        made = own
        variant = "as it is"
        altered = ()
        if options:
            variant = world
            altered = ("--options", json.dumps(options))
            flags = "--no-cloning --num-labels 512"
            made = {**own, "data_dir": collected(env_id, world, altered=altered)}
            made["decode"] = decoded(env_id, world, seed, own, own["data_dir"], flags, altered)
        frames = load_splits(made)
        t = choose(windows_of(frames), seed, 2048, 4096)
        actions = labels(frames, t)
        z = latents(networks, frames, t)
        fresh = latents(untrained, frames, t)
        of_this = fit_decoder(z["train"], actions["train"])
        of_fresh = fit_decoder(fresh["train"], actions["train"])
        labeller = labeller or of_this  # the first world is its own
        found = {
            "accuracy, its own world's labels": accuracy(labeller, z, actions),
            "accuracy, this world's labels": accuracy(of_this, z, actions),
            "accuracy, this world's labels, untrained IDM": accuracy(of_fresh, fresh, actions),
            "accuracy, commonest action": commonest(actions),
            "blind play": play(own, 0, seed, options=options),
        }
        yield world, {**found, **played(made), **online(env_id, variant, seed, made, altered)}


def delay(env_id, seed):
    """An action that shows k steps late: what latents tell of it, what that costs, what mends it."""
    for k in DELAYS:
        variant = "as it is"
        altered = ()
        flags = ""
        if k:
            variant = f"delay {k}"
            altered = ("--delay", str(k))
            flags = "--num-labels 512"
        data = collected(env_id, variant, altered=altered)
        made = lapo(env_id, variant, seed, data, decode=flags, altered=altered)
        yield k, {**played(made), **late(made, k, seed)}


def late(made, k, seed):
    """Accuracies of decoders with 512 labels that see several latents, or pi's; returns with two of them."""
    cloned = torch.load(made["bc"]["path"] / "checkpoint.pt", weights_only=True)
    policy = load_policy(cloned, CPU)
    frames = load_splits(made)
    networks, _ = load_networks(made)
    steps = np.arange(-k, k + 1)
    inside = {}  # windows with k others of their episode before and after
    for split, t in windows_of(frames).items():
        inside[split] = t[np.isin(t[:, None] + steps, t).all(1)]
    t = choose(inside, seed, 512, 2048)
    near = {split: (t[split][:, None] + steps).ravel() for split in t}
    actions = labels(frames, t)
    z = latents(networks, frames, near)
    pi = {split: act(policy, frames[split], near[split]) for split in t}
    inputs = {
        "z_t": (z, slice(k, k + 1)),
        "z_t+k": (z, slice(2 * k, None)),
        "z_t to z_t+k": (z, slice(k, None)),
        "pi(o_t)": (pi, slice(k, k + 1)),
        "pi(o_t-k) to pi(o_t)": (pi, slice(k + 1)),
    }
    found = {"accuracy, commonest action": commonest(actions)}
    decoders = {}
    for name, (source, columns) in inputs.items():
        x = {}
        for split in t:
            all_steps = source[split].view(len(t[split]), 2 * k + 1, -1)  # (n, 2k + 1, latent_dim)
            x[split] = all_steps[:, columns].flatten(1)
        torch.manual_seed(seed)
        decoders[name] = fit_decoder(x["train"], actions["train"])
        found[f"accuracy from {name}"] = accuracy(decoders[name], x, actions)
    of_pi = decoders["pi(o_t)"]
    found["decoder of pi(o_t)", 512] = play(made, k, seed, lambda obs, _: of_pi(policy(obs)))
    if k:
        recalled = recall(policy, decoders["pi(o_t-k) to pi(o_t)"], k)
        found["decoder of pi at several steps", 512] = play(made, k, seed, recalled)
        ahead = clone_ahead(cloned, networks, frames["train"], k, seed)
        of_late = decoders["z_t+k"]
        found["pi of later latents", 512] = play(made, k, seed, lambda obs, _: of_late(ahead(obs)))
    return found


@torch.no_grad()
def act(policy, frames, t):
    """pi(o_t) of times t (n,): (n, latent_dim)."""
    pieces = np.split(t, range(512, len(t), 512))
    return torch.cat([policy(torch.from_numpy(frames[piece])) for piece in pieces])


def recall(policy, decoder, k):
    """A policy (obs, episode) -> logits that decodes pi of the last k + 1 steps, at first of fewer."""
    past = {}  # of each episode its last latents

    def decode(obs, episode):
        for e, z in zip(episode, policy(obs)):
            before = past.get(e, [z] * (k + 1))
            past[e] = [*before[1:], z]
        return decoder(torch.stack([torch.cat(past[e]) for e in episode]))

    return decode


def clone_ahead(cloned, networks, frames, k, seed):
    """A policy cloned as lapo_bc.py does, but on the latents z_{t+k} that its own actions will cause."""
    args = SimpleNamespace(**cloned["args"])
    t = frames.windows
    z = torch.from_numpy(encode(networks, frames, t, CPU).z)  # (windows, latent_dim)
    inside = np.isin(t[:, None] + np.arange(k + 1), t).all(1)
    now = np.flatnonzero(inside)
    torch.manual_seed(seed)
    policy = LatentPolicy(args.policy_scale, z.shape[1], cloned["pretrain_args"]["patch_size"])
    policy = policy.to(memory_format=torch.channels_last)
    mean, std = latent_moments(z)
    policy.mean.copy_(mean)
    policy.std.copy_(std)
    optimizer = torch.optim.Adam(policy.parameters())
    for step in tqdm(range(1, args.num_updates + 1), f"clone z_t+{k}"):
        i = now[torch.randint(len(now), (args.batch_size,)).numpy()]
        target = z[np.searchsorted(t, t[i] + k)]
        guess = policy(torch.from_numpy(frames[t[i]]))
        loss = F.mse_loss(guess / std, target / std)
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = scheduled_rate(step, args)
        optimizer.step()
    return policy.eval()


def play(made, k, seed, policy=None, options=None, **how):
    """The mean return of 120 episodes in games altered like that; of blind play, if there is no policy."""
    data = read_meta(made)
    actions = np.load(made["data_dir"] / "train" / "actions.npy")
    often = torch.from_numpy(np.bincount(actions, minlength=15)).log()
    with altered_games(options or {}, delay=k, **how):
        env = make_env(data["env_id"], 60, data["num_levels"], data["start_level"], seed)

    def logits(obs, episode):
        if policy is None:
            return often.expand(len(obs), 15)
        return policy(obs, episode) / 0.5

    return float(evaluate(logits, env, 120, torch.Generator().manual_seed(seed)).mean())


def video(env_id, seed):
    """More frames, of more games, with the same updates, and with updates in proportion; the same labels."""
    own = collected(env_id, "as it is")
    for frames in FRAMES:
        part = frames / 65536
        if part == 1:  # the only one whose cloning, random play and demonstrator are taken
            found = played(lapo(env_id, "as it is", seed, own))
            yield frames, {**found, ("in proportion", 128): found[FEW]}
            continue
        variant = f"{frames} frames"
        games = max(1, frames // 4096)  # as long as the others
        data = collected(env_id, variant, f"--num-train-frames {frames} --num-envs {games}", seed=seed)
        how = {"decode": "--no-cloning --num-labels 128", "labels": own}
        found = played(lapo(env_id, variant, seed, data, **how))
        short = min(1, part)  # no warm-up gets longer
        pretrain = f"--num-updates {2000 * part:.0f} --warmup-updates {500 * short:.0f}"
        bc = f"--num-updates {2500 * part:.0f} --warmup-updates {50 * short:.0f}"
        also = played(lapo(env_id, f"{variant}, in proportion", seed, data, pretrain, bc, **how))
        yield frames, {FEW: found[FEW], ("in proportion", 128): also[FEW]}


QUESTIONS = {
    "stochastic": stochastic,
    "bottleneck": bottleneck,
    "transfer": transfer,
    "delay": delay,
    "video": video,
}


def ask(question, env_id, seed):
    """Rows of questions.csv: one seed's answers."""
    for variant, found in QUESTIONS[question](env_id, seed):
        for key, value in found.items():
            measure, n_labels = key if isinstance(key, tuple) else (key, "")
            row = (question, env_id, variant, seed, measure, n_labels)
            yield dict(zip(KEYS, map(str, row))), value


def add(row, path):
    """Adds a row to questions.csv, or replaces it."""
    with FileLock(RUNS / ".lock"):  # another question may write
        rows = read(path)
        rows[tuple(row[key] for key in KEYS)] = row
        text = StringIO()
        writer = csv.DictWriter(text, [*KEYS, "value"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows.values())
        write_whole(path, text.getvalue())


def read(path):
    """Rows of questions.csv by their KEYS; {} where there is none yet."""
    if not path.exists():
        return {}
    rows = csv.DictReader(path.open(newline=""))
    return {tuple(row[key] for key in KEYS): row for row in rows}


# ---- Pictures ----


class Answers:
    """Rows of a question in one game: of a variant, measure and n_labels the seeds' numbers."""

    def __init__(self, rows):
        self.found = defaultdict(dict)
        for row in rows:
            self.found[row["variant"], row["measure"], row["n_labels"]][row["seed"]] = float(row["value"])
        self.variants = list(dict.fromkeys(row["variant"] for row in rows))

    def of(self, variant, measure, n=""):
        """A number a seed: (seeds,)."""
        of_seeds = self.found[str(variant), measure, str(n)]
        return np.array([of_seeds[seed] for seed in sorted(of_seeds)])

    def shares(self, variant, measure, n=""):
        """The same as shares of the demonstrator's return above random play, in the variant's games."""
        games = variant
        if len(self.of(variant, "random")) == 0:  # of video's variants one has them
            games = 65536
        low = self.of(games, "random").mean()
        high = self.of(games, "demonstrator").mean()
        return (self.of(variant, measure, n) - low) / (high - low)

    def labels_for(self, variant, share):
        """Labels that a seed's decoder needs for a share, by a line that never falls; inf if too few."""
        measure = "LAPO + decoder"
        counts = sorted(int(n) for v, m, n in self.found if v == str(variant) and m == measure)
        of_counts = [self.shares(variant, measure, n) for n in counts]  # of (seeds,) each
        needed = []
        for curve in np.transpose(of_counts):
            curve = IsotonicRegression().fit_transform(counts, curve)
            needed.append(2 ** np.interp(share, curve, np.log2(counts), right=np.inf))
        return np.array(needed)


def interval(values):
    """Mean of a number a seed ± half of its 95% interval, as text; not of one seed or infinite ones."""
    if np.isinf(values).any():
        return "; ".join(f"{value:.3g}" for value in values)
    if len(values) == 0:
        return ""
    if len(values) == 1:
        return f"{np.mean(values):.3g}"
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return f"{np.mean(values):.3g} ± {half:.2g}"


def draw(ax, x, values, color, label):
    """A line through the means of values, [(seeds,)] at x, or medians of labels, and a dot a seed."""
    middle = np.median if label.startswith("labels") else np.mean
    places = []
    middles = []
    for at, of_seeds in zip(x, values):
        if len(of_seeds) == 0:
            continue
        of_seeds = np.nan_to_num(of_seeds, posinf=NEVER)
        places.append(at)
        middles.append(middle(of_seeds))
        ax.scatter([at] * len(of_seeds), of_seeds, s=10, color=color, alpha=0.6, zorder=3)
    ax.plot(places, middles, color=color, marker="o", label=label)


NEVER = 4096  # labels, where a picture has what more than 2,048 may reach
PREDICTION = "prediction, squared error", [("loss", ""), ("loss of copying", "")]
TOLD = [
    ("bits, meant", ""),
    ("bits, meant, untrained IDM", ""),
    ("bits, carried out", ""),
    ("bits, carried out, untrained IDM", ""),
    ("bits of meant in carried out", ""),
]
RL = ("RL + SL", "")
PPO = ("PPO from scratch", "")
BLIND = ("blind play", "")
FEW = ("LAPO + decoder", 128)
MANY = ("LAPO + decoder", 512)
ENDS = [("demonstrator", ""), ("random", "")]  # whose returns fall with the others'
MENDED = [("decoder of pi(o_t)", 512), ("decoder of pi at several steps", 512), ("pi of later latents", 512)]
COMMONEST = ("accuracy, commonest action", "")
LABELS = [
    ("accuracy, its own world's labels", ""),
    ("accuracy, this world's labels", ""),
    ("accuracy, this world's labels, untrained IDM", ""),
    COMMONEST,
]
SEEN = [
    ("accuracy from z_t", ""),
    ("accuracy from z_t+k", ""),
    ("accuracy from z_t to z_t+k", ""),
    ("accuracy from pi(o_t)", ""),
    ("accuracy from pi(o_t-k) to pi(o_t)", ""),
    COMMONEST,
]
PANELS = {  # question: what x is, panels [(title, [(measure, n_labels)])]
    "stochastic": (
        "rate of random actions (FrozenLake), of sticky ones (coinrun)",
        [
            PREDICTION,
            ("what tells how many bits of which action", TOLD),
            ("play", [FEW, ("cloning", 128), RL, PPO, BLIND]),
        ],
    ),
    "bottleneck": (
        "codebooks x slots x codes",
        [
            PREDICTION,
            (
                "bits of information",
                [("bits in use", ""), ("bits, carried out", ""), ("bits, carried out, quantised", "")],
            ),
            ("k-means and actions", [("purity, meant", ""), ("purity, shuffled", "")]),
            ("play", [FEW, RL]),
            (f"labels for a share ({NEVER:,}: never)", [("labels for 0.5", ""), ("labels for 0.8", "")]),
        ],
    ),
    "transfer": (
        "",
        [
            ("return", [MANY, RL, PPO, *ENDS, BLIND]),
            ("the IDM as a labeller", LABELS),
        ],
    ),
    "delay": (
        "steps until an action shows",
        [
            ("what tells a_t, 512 labels", SEEN),
            ("return", [MANY, ("cloning", 512), *MENDED, *ENDS]),
        ],
    ),
    "video": ("frames of video", [("play", [FEW, ("in proportion", 128)])]),
}
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#999999", "#56B4E9"]  # Okabe and Ito


LEGENDS = {  # of measures whose names do not say what they are
    "loss": "the forward model's, on test windows",
    "loss of copying": "copying the last frame",
    "bits, meant": "latents, of the demonstrator's action",
    "bits, meant, untrained IDM": "an untrained IDM's, of the demonstrator's action",
    "bits, carried out": "latents, of the action carried out",
    "bits, carried out, untrained IDM": "an untrained IDM's, of the action carried out",
    "bits of meant in carried out": "the action carried out, of the demonstrator's",
    "bits in use": "entropy of the codes, at most",
    "bits, carried out, quantised": "quantised latents, of the action carried out",
    "purity, meant": "purity with the demonstrator's actions",
    "purity, shuffled": "purity with shuffled actions",
    "labels for 0.5": "labels for half of the demonstrator's return",
    "labels for 0.8": "labels for 0.8 of it",
}


def numbers(answers, variant, title, measure, n):
    """What a panel shows of a variant: (seeds,)."""
    if measure.startswith("labels for"):
        return answers.labels_for(variant, float(measure.split()[-1]))
    if title == "play":
        return answers.shares(variant, measure, n)
    return answers.of(variant, measure, n)


def plot_panel(ax, question, answers, title, lines):
    """Lines [(measure, n_labels)] against the variants."""
    x = []
    for i, variant in enumerate(answers.variants):
        x.append(float(variant) if variant[-1].isdigit() else i)  # or names
    for color, (measure, n) in zip(COLORS, lines):
        values = [numbers(answers, variant, title, measure, n) for variant in answers.variants]
        name = LEGENDS.get(measure, measure)
        if n:
            name += f", {n} labels"
        if question == "video":
            name += slope(x, values)
        draw(ax, x, values, color, name)
        if measure.startswith("labels for"):
            ax.set_yscale("log", base=2)
    if question == "video":
        cloning = answers.shares(65536, "cloning", 128).mean()
        ax.axhline(cloning, color=COLORS[1], ls="--", label="cloning, 128 labels")
        ax.set_xscale("log", base=2)
    else:
        names = [variant.replace(", ", ",\n") for variant in answers.variants]
        ax.set_xticks(x, names, fontsize=8)
    if title == "play":
        ax.axhline(1, color="#333333", ls=":", lw=1)
    ax.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=1 if len(lines) > 2 else 2)


def plot(question, games, path):
    """A question's picture: a row a game {env_id: Answers}, a column a panel."""
    label, panels = PANELS[question]
    size = (5 * len(panels), 4.2 * len(games))
    fig, axes = plt.subplots(len(games), len(panels), figsize=size, squeeze=False, layout="constrained")
    for row, (env_id, answers) in zip(axes, games.items()):
        for ax, (title, lines) in zip(row, panels):
            plot_panel(ax, question, answers, title, lines)
            what = "share of the demonstrator's return" if title == "play" else title
            ax.set_title(f"{env_id}: {what}")
            ax.set_xlabel(label)
    fig.savefig(path, dpi=90, bbox_inches="tight")


def slope(x, values):
    """What doubling x adds to values [(seeds,)] at x, as text: a line a seed, the mean of their slopes."""
    slopes = [stats.linregress(np.log2(x), of_seed).slope for of_seed in zip(*values)]
    return f" ({interval(np.array(slopes))} a doubling)"


def table(question, env_id, answers):
    """Means with 95% intervals as Markdown: a row a measure, a column a variant; shares as drawn."""
    rows = []  # (name, title of the panel, measure, n_labels)
    for measure, n in dict.fromkeys((measure, n) for _, measure, n in answers.found):
        rows.append((measure, "", measure, n))
    _, panels = PANELS[question]
    for title, lines in panels:
        if title == "play" or title.startswith("labels"):
            rows += [(f"{title}: {measure}", title, measure, n) for measure, n in lines]
    text = [f"\n## {question}, {env_id}\n", "| | " + " | ".join(answers.variants) + " |"]
    text.append("|---" * (1 + len(answers.variants)) + "|")
    for name, title, measure, n in rows:
        values = [numbers(answers, variant, title, measure, n) for variant in answers.variants]
        if n:
            name += f", {n} labels"
        if question == "video" and title:
            name += slope([float(variant) for variant in answers.variants], values)
        text.append(f"| {name} | " + " | ".join(map(interval, values)) + " |")
    return "\n".join(text) + "\n"


def draw_all(path):
    """The pictures and tables of all rows that there are."""
    rows = list(read(path).values())
    tables = []
    for question in QUESTIONS:
        mine = [row for row in rows if row["question"] == question]
        games = {}
        for env_id in dict.fromkeys(row["env_id"] for row in mine):
            games[env_id] = Answers([row for row in mine if row["env_id"] == env_id])
            tables.append(table(question, env_id, games[env_id]))
        if games:
            plot(question, games, RESULTS / f"questions-{question}.png")
    text = "Means over seeds ± half of a 95% interval.\n" + "".join(tables)
    (RESULTS / "questions.md").write_text(text)


def main(args):
    path = RESULTS / "questions.csv"
    if args.question and args.question not in QUESTIONS:
        sys.exit(f"error: {args.question} is none of {', '.join(QUESTIONS)}")
    games = ["coinrun"]
    if args.question in ("stochastic", "bottleneck"):
        games.append("FrozenLake-v1")
    if args.env_id not in games:
        sys.exit(f"error: ENV_ID is {args.env_id}, expected {' or '.join(games)}")
    failed = 0
    if args.question:
        for seed in args.seeds:
            try:
                for row, value in ask(args.question, args.env_id, seed):
                    add({**row, "value": f"{value:.4g}"}, path)
            except subprocess.CalledProcessError as e:  # the stage has said why
                failed = e.returncode
                if failed != 1:
                    sys.exit(failed)  # it was stopped: so are the other seeds
    draw_all(path)
    sys.exit(failed)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
