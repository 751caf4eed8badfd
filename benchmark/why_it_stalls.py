"""Why does the paper's decoder stop improving with more labels? Every step from frame to action, scored.

    benchmark/experiments.sh small offline coinrun 1 2 3                    # makes the runs
    python benchmark/why_it_stalls.py --env-id coinrun --seeds 1 2 3

The demonstrator acts at random, so what counts is the probability that a step gives the action it took: mean
cross-entropy (nats) on test frames, which no label comes from. Twice: of the 15 actions, and of what they do,
as some do the same (found by trying all of them from the same states). Against the number of labels:

    idm latent           decoder(IDM(o_{t-1}, o_t, o_{t+1})), which sees what happened next
    policy latent        the paper's: the same decoder on pi(o_t), the mean of latents that may follow o_t.
                         The gap: averaging before decoding, and not knowing what happens next
    policy features      a decoder of the policy's latent and features (as --finetune begins)
    latent and features  the same with the IDM's latent beside them: what that tells beyond o_t. Cannot act
    fine-tuned           policy features, then all of the policy on the labels (--finetune)
    from scratch         cloning, a policy of the same size on the labels alone, as long

Two lines do not depend on labels: the demonstrator's own entropy, below which nothing gets that sees only
o_t; and what is left of it if one knows the game's state and sees o_{t+1} without loss, by the simulator.
Decoders have as many updates as cross-validation on their labels asks for, at most 800.
Writes benchmark/results/why-it-stalls-ENV_ID.{json,png}.
"""

import copy
import itertools
import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from tqdm import tqdm

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import lapo_decode as stage  # noqa: E402
from ppo_procgen import Agent  # noqa: E402

LOOKS = {
    "frequencies of actions": ("#999999", ":", None),
    "idm latent": ("#009E73", "-", "s"),
    "policy latent": ("#0072B2", "-", "o"),
    "policy features": ("#CC79A7", "-", "^"),
    "latent and features": ("#F0E442", "-", "p"),
    "fine-tuned": ("#000000", "-", "*"),
    "from scratch": ("#999999", "-", "X"),
}


@dataclass
class Args:
    env_id: str = "coinrun"  # the Procgen game
    seeds: tuple[int, ...] = (1,)  # the seeds of the runs
    runs_dir: str = str(ROOT / "runs" / "small")  # where the runs of lapo_bc.py lie
    data_dir: str | None = None  # the dataset; default RUNS_DIR/data/ENV_ID
    num_labels: tuple[int, ...] = (16, 64, 256, 1024, 4096)  # label counts
    num_draws: int = 2  # draws of the labels
    expert_checkpoint: str | None = None  # the demonstrator; default experts/ENV_ID.pt
    num_states: int = 1024  # situations of its play in which all actions are tried
    out: str = str(ROOT / "benchmark" / "results")  # where JSON and picture go
    allow_unfinished: bool = False  # take checkpoints of unfinished runs, too


@torch.no_grad()
def in_pieces(network, load, t, autocast):
    """network(load(t)) for times t (n,), 512 at a time."""
    with autocast:
        return torch.cat([network(load(piece)) for piece in np.split(t, range(512, len(t), 512))])


def encode(cloned, frames, t, autocast):
    """At t (n,): standardised latents (n, latent_dim) of IDM and policy; the policy's outputs; the policy."""
    latent_dim, pretrain_args = len(cloned["idm"]["head.bias"]), cloned["pretrain_args"]
    idm = stage.IDM(pretrain_args["idm_scale"], latent_dim, pretrain_args["patch_size"])
    idm.load_state_dict(cloned["idm"])
    policy = stage.LatentPolicy(cloned["args"]["policy_scale"], latent_dim, pretrain_args["patch_size"])
    policy.load_state_dict(cloned["policy"])
    idm, policy = (network.eval().to(memory_format=torch.channels_last) for network in (idm, policy))
    see = stage.DecodedPolicy(policy, torch.nn.Identity(), features=True)  # pi(o_t), and what it is made of
    z = in_pieces(idm, partial(stage.get_windows, frames, device="cpu"), t, autocast)
    seen = in_pieces(see, lambda t: torch.from_numpy(frames[t]), t, autocast)
    z, latent = ((x - policy.mean) / policy.std for x in (z, seen[:, :latent_dim]))
    return z, latent, seen, policy


@torch.no_grad()
def try_actions(env_id, expert_path, levels, num_states, held=4):
    """In S situations of the demonstrator's play, all actions tried in the simulator, from the same state.

    Returns the demonstrator's probabilities (S, 15); which actions lead to the same next frame (S, 15), named
    by the first of them; and which do the same everywhere, also when held for `held` steps: groups (15,).
    """
    expert = torch.load(expert_path, weights_only=True)
    agent = Agent(expert["args"]["scale"], expert["args"]["patch_size"]).eval()
    agent.load_state_dict(expert["agent"])
    env, trial = (stage.make_env(env_id, n, levels["num_levels"], levels["start_level"], 1) for n in (16, 15))
    probabilities, same_frame, same = [], [], np.ones((15, 15), dtype=bool)
    progress = tqdm(total=num_states, desc="trying all actions", unit="state")
    for step in itertools.count():
        shares = agent(torch.from_numpy(env.observe()[1]["rgb"]))[0].softmax(-1)
        if step % 8 == 7:
            for state, share in zip(env.callmethod("get_state"), shares):
                trial.callmethod("set_state", [state] * 15)
                equal = np.ones((15, 15), dtype=bool)
                for i in range(held):
                    trial.act(np.arange(15, dtype=np.int32))
                    frames = trial.observe()[1]["rgb"]
                    equal &= (frames[:, None] == frames[None]).all((2, 3, 4))
                    if i == 0:
                        same_frame.append(equal.argmax(1))  # the first action that leads to the same frame
                same &= equal
                probabilities.append(share)
                progress.update()
        if len(probabilities) >= num_states:
            break
        env.act(torch.multinomial(shares, 1).squeeze(-1).numpy().astype(np.int32))
    progress.close()
    same_frame = torch.from_numpy(np.array(same_frame))
    return torch.stack(probabilities), same_frame, torch.from_numpy(same.argmax(1))


def merged(probabilities, groups):
    """Probabilities (n, 15) of actions -> of their groups (15,), which stand where their first action did."""
    return torch.zeros_like(probabilities).index_add_(1, groups, probabilities)


def entropies(probabilities, same_frame):
    """The demonstrator's entropy (nats), and what the knowledge of the next frame leaves of it."""
    log = probabilities.clamp_min(1e-12).log()
    allowed = torch.zeros_like(probabilities).scatter_add_(1, same_frame, probabilities).gather(1, same_frame)
    left = log - allowed.clamp_min(1e-12).log()
    return tuple(-(probabilities * x).sum(1).mean().item() for x in (log, left))


def cross_entropy(logits, actions, groups):
    """Mean negative log-probability (nats) of actions (n,), and of what they do: of their groups (15,)."""
    p = logits.double().softmax(-1)
    both = (p, actions), (merged(p, groups), groups[actions])
    return [-share.gather(1, action[:, None]).log().mean().item() for share, action in both]


def best_updates(build, x, actions, updates, fit):
    """After how many updates, of `updates` / 1, 4, 16, 64, build()'s decoders do best on labels not seen."""
    candidates = sorted({max(1, updates >> i) for i in (0, 2, 4, 6)})
    loss = dict.fromkeys(candidates, 0.0)
    for held_out in torch.randperm(len(x)).chunk(min(5, len(x))):
        kept = torch.ones(len(x), dtype=torch.bool)
        kept[held_out] = False
        for candidate in candidates:
            decoder = fit(build(), x[kept], actions[kept], candidate)
            with torch.no_grad():
                logits = decoder(x[held_out])
            loss[candidate] += F.cross_entropy(logits, actions[held_out], reduction="sum").item()
    return min(candidates, key=loss.get)


def draw_report(report, path):
    """The picture of a report: cross-entropy of what actions do, against the number of labels."""
    x, (fig, ax) = report["num_labels"], plt.subplots(figsize=(7.6, 4.6))
    each = {name: np.array(y).reshape(-1, len(x)) for name, y in report["each"]["effects"].items()}
    for name, (color, line, marker) in LOOKS.items():
        ax.plot(x, each[name].mean(0), line, color=color, marker=marker, ms=5, label=name)
        ax.fill_between(x, each[name].min(0), each[name].max(0), color=color, alpha=0.12, lw=0)
    entropy, left = (report[key]["effects"] for key in ("demonstrator_entropy", "entropy_given_next_frame"))
    ax.axhline(entropy, color="black", ls="--", lw=1, label="demonstrator's entropy")
    ax.axhline(left, color="black", ls=":", lw=1, label="left by the next frame")
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:,.0f}")
    effects, draws = len(set(report["groups"])), np.shape(report["each"]["effects"]["idm latent"])[1]
    count = f"(seeds: {len(report['seeds'])}, draws: {draws})"
    ax.set_title(f"{report['env_id']}, 15 actions with {effects} effects {count}")
    ax.set(xlabel="labelled frames", ylabel="cross-entropy of what the action does (nats)")
    ax.set_ylim(0, 1.2 * each["frequencies of actions"].max())
    ax.legend(fontsize=7.5, loc="center left", bbox_to_anchor=(1, 0.5))
    text = "Held-out frames; lower is better; bands: lowest to highest. Lines that leave the picture overfit."
    text += " Look for the gap from green to dark blue."
    fig.text(0.5, -0.02, text, ha="center", va="top", fontsize=8)
    fig.savefig(path, dpi=90, bbox_inches="tight")


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    args.data_dir = args.data_dir or f"{args.runs_dir}/data/{args.env_id}"
    data, frames, windows = stage.load_dataset(args)
    actions = {}
    for split, t in windows.items():
        actions[split] = torch.from_numpy(np.load(f"{args.data_dir}/{split}/actions.npy")[t].astype(np.int64))
    expert_path = Path(args.expert_checkpoint or ROOT / "experts" / f"{args.env_id}.pt")
    if not expert_path.exists():
        sys.exit(f"error: no demonstrator at {expert_path}: name the data's with --expert-checkpoint")
    probabilities, same_frame, groups = try_actions(args.env_id, expert_path, data, args.num_states)
    groups_of = merged(probabilities, groups), groups[same_frame]
    floors = {"actions": entropies(probabilities, same_frame), "effects": entropies(*groups_of)}
    losses = {name: np.zeros((2, len(args.seeds), args.num_draws, len(args.num_labels))) for name in LOOKS}
    defaults = stage.Args()

    def test_obs(t):
        return torch.from_numpy(frames["test"][t])

    def fit(decoder, x, actions, updates):
        float32 = torch.autocast("cpu", enabled=False)
        return stage.fit(decoder, x.__getitem__, actions, updates, 1e-3, 512, defaults, float32)

    def fit_well(x, actions):
        build = partial(stage.Decoder, x.shape[1], defaults.decoder_hidden)
        return fit(build(), x, actions, best_updates(build, x, actions, 800, fit))

    for i, seed in enumerate(args.seeds):
        bc_path = f"{args.runs_dir}/{args.env_id}__lapo_bc__{seed}/checkpoint.pt"
        cloned = stage.load_checkpoint(bc_path, "lapo_bc", ["policy", "idm", "pretrain_args"], args)
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=cloned["args"]["bf16"])
        z, _, seen, policy = encode(cloned, frames["train"], windows["train"], autocast)
        z_test, latent_test, seen_test, _ = encode(cloned, frames["test"], windows["test"], autocast)
        mean, std = seen.mean(0), seen.std(0) + 1e-3
        seen, seen_test = (seen - mean) / std, (seen_test - mean) / std
        torch.manual_seed(seed)
        for draw in range(args.num_draws):
            order = np.random.default_rng([seed, draw]).permutation(len(windows["train"]))
            for j, n in enumerate(tqdm(args.num_labels, desc=f"seed {seed}, draw {draw}", unit="count")):
                p, a = torch.from_numpy(order[:n]), actions["train"][order[:n]]
                of_latent, of_features = fit_well(z[p], a), fit_well(seen[p], a)
                of_both = fit_well(torch.cat([z, seen], 1)[p], a)
                frequencies = (torch.bincount(a, minlength=15) + 1) / (n + 15)
                with torch.no_grad():
                    logits = {
                        "frequencies of actions": frequencies.log().expand(len(z_test), -1),
                        "idm latent": of_latent(z_test),
                        "policy latent": of_latent(latent_test),
                        "policy features": of_features(seen_test),
                        "latent and features": of_both(torch.cat([z_test, seen_test], 1)),
                    }
                of_features.mean.copy_(mean)  # from here on it sees what the policy computes as it is
                of_features.std.copy_(std)
                sizes = cloned["args"]["policy_scale"], cloned["pretrain_args"]["patch_size"]
                decoded = stage.DecodedPolicy(copy.deepcopy(policy), of_features, True)
                scratch = stage.LatentPolicy(sizes[0], 15, sizes[1])
                on_frames = {"fine-tuned": decoded, "from scratch": scratch}
                obs = torch.from_numpy(frames["train"][windows["train"][order[:n]]])
                for name, network in on_frames.items():
                    network = network.to(memory_format=torch.channels_last)
                    how = max(200, 10 * n // 64), 5e-4, 64  # ten passes
                    stage.fit(network, obs.__getitem__, a, *how, defaults, autocast)
                    logits[name] = in_pieces(network, test_obs, windows["test"], autocast)
                for name, of_actions in logits.items():
                    losses[name][:, i, draw, j] = cross_entropy(of_actions, actions["test"], groups)

    report = {"env_id": args.env_id, "seeds": args.seeds, "num_labels": args.num_labels}
    report |= {"test_frames": len(windows["test"]), "states": len(probabilities), "groups": groups.tolist()}
    for i, name in enumerate(("demonstrator_entropy", "entropy_given_next_frame")):
        report[name] = {of: round(floor[i], 4) for of, floor in floors.items()}
    report |= {"cross_entropy": {}, "each": {}}
    for i, of in enumerate(floors):
        report["each"][of] = {name: loss[i].round(4).tolist() for name, loss in losses.items()}
        means = {name: loss[i].mean((0, 1)).round(4).tolist() for name, loss in losses.items()}
        report["cross_entropy"][of] = means
    path = Path(args.out) / f"why-it-stalls-{args.env_id}"
    Path(f"{path}.json").write_text(json.dumps(report))
    draw_report(report, f"{path}.png")
    for of in floors:
        entropy, left = report["demonstrator_entropy"][of], report["entropy_given_next_frame"][of]
        print(f"\ncross-entropy of {of}; the demonstrator's entropy {entropy}, the next frame leaves {left}")
        for line, values in {"labels": args.num_labels, **report["cross_entropy"][of]}.items():
            print(f"{line:24s}" + "".join(f"{x:9.4g}" for x in values))
    print(f"wrote {path}.json and .png")
