"""Why does the paper's decoder stop improving with more labels? Every step from frame to action, scored on held-out frames.

    python benchmark/why_it_stalls.py --env-id coinrun --seeds 1 2 3      # after benchmark/experiments.sh small offline coinrun 1 2 3

The demonstrator acts at random, so what counts is the probability that a step gives the action it took: mean cross-entropy (nats)
on test frames, which no label comes from. Twice: of the 15 actions, and of what they do, as some do the same (found by trying all of them
from the same states). Against the number of labels:

    idm latent          decoder(IDM(o_{t-1}, o_t, o_{t+1})): sees what happened next. Its floor is what the latent does not tell.
    policy latent       the paper's: the same decoder on pi(o_t), the mean of the latents that may follow o_t. The gap to the line above
                        is what is lost by averaging before decoding, and by not knowing what happens next.
    averaged after      the decoder labels 65,536 frames, a second one learns them from the policy's features (--pseudo-labels):
                        decodes before averaging
    two steps           the same, and the decoder sees z_t and z_{t+1} (--latent-steps 2)
    policy features     a decoder of the policy's latent and features, on the labels alone (--decoder-features): does not need the latent
                        to tell the action
    latent and features the same with the IDM's latent beside them: what the latent tells beyond o_t. Cannot act, as it sees the future
    labels spread       the paper's, on labels spread over the latents (--choose-labels spread)
    fine-tuned          policy features, then the whole policy through that decoder on the labels (--finetune all), ten passes and at
                        least 200 updates
    from scratch        cloning, a policy of the same size on the labels alone, as long

Two lines do not depend on labels: the demonstrator's own entropy, below which nothing gets that sees only o_t; and what would be left of it
for somebody who knew the game's state and saw o_{t+1} without loss, by the simulator.

Decoders on labels have as many updates as cross-validation on them asks for, at most 800; those that learn 65,536 decoded frames, which
do not run out, have 1,500. Writes benchmark/results/why-it-stalls-ENV_ID.{json,png}.
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
from sklearn.cluster import kmeans_plusplus
from tqdm import tqdm

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import lapo_decode as stage  # noqa: E402
from collect_expert_data import Agent, get_env_state, set_env_state  # noqa: E402

LOOKS = {
    "frequencies of actions": ("#999999", ":", None), "idm latent": ("#009E73", "-", "s"), "policy latent": ("#0072B2", "-", "o"),
    "labels spread": ("#D55E00", "--", "D"),
    "averaged after": ("#56B4E9", "--", "v"), "two steps": ("#E69F00", "--", "P"), "policy features": ("#CC79A7", "-", "^"),
    "latent and features": ("#F0E442", "-", "p"),
    "fine-tuned": ("#000000", "-", "*"), "from scratch": ("#999999", "-", "X"),
}  # fmt: skip


@dataclass
class Args:
    env_id: str = "coinrun"
    """the Procgen game"""
    seeds: tuple[int, ...] = (1,)
    """the seeds of the runs"""
    runs_dir: str = str(ROOT / "runs" / "small")
    """where the runs of lapo_bc.py lie"""
    data_dir: str | None = None
    """the dataset; default RUNS_DIR/data/ENV_ID"""
    num_labels: tuple[int, ...] = (16, 64, 256, 1024, 4096)
    """label counts"""
    num_draws: int = 2
    """draws of the labels"""
    expert_checkpoint: str | None = None
    """the demonstrator; default experts/ENV_ID.pt"""
    num_states: int = 1024
    """situations of its play in which all actions are tried"""
    out: str = str(ROOT / "benchmark" / "results")
    """where JSON and picture go"""


@torch.no_grad()
def encode(bc_path, data_dir, data_meta, split):
    """(IDM latents z_t, z_t beside z_{t+1}, policy latents, those beside features, actions) of a split's windows; frames, t, policy."""
    cloned = torch.load(bc_path, weights_only=True)
    pretrain_args, args = cloned["meta"]["pretrain_args"], cloned["meta"]["args"]
    latent_dim = stage.num_latents(pretrain_args)
    idm = stage.IDM(pretrain_args["idm_scale"], latent_dim)
    idm.load_state_dict(cloned["idm"])
    policy = stage.LatentPolicy(args["policy_scale"], latent_dim)
    policy.load_state_dict(cloned["policy"])
    idm, policy = (network.eval().to(memory_format=torch.channels_last) for network in (idm, policy))
    frames, t = stage.load_frames(data_dir, split, data_meta)
    chunks = np.array_split(t, -(-len(t) // 512))
    with torch.autocast("cpu", torch.bfloat16):
        z = torch.cat([idm(stage.get_windows(frames, c, "cpu")) for c in tqdm(chunks, desc=f"IDM, {split}", unit="batch", leave=False)])
        seen = torch.cat(
            [stage.policy_outputs(policy, torch.from_numpy(frames[c]), True) for c in tqdm(chunks, desc=f"policy, {split}", leave=False)]
        )
    mean, std = cloned["latent_mean"], cloned["latent_std"]
    z, latent = (z - mean) / std, (seen[:, :latent_dim] - mean) / std
    follows = torch.from_numpy(np.append(np.diff(t) == 1, False))  # is the next window that of t + 1?
    z_next = torch.where(follows[:, None], z.roll(-1, 0), 0)
    actions = torch.from_numpy(stage.load_actions(data_dir, split, data_meta)[t].astype(np.int64))
    return (z, torch.cat([z, z_next], 1), latent, seen, actions), frames, t, policy


@torch.no_grad()
def try_actions(env_id, expert_path, data_meta, num_states, held=4):
    """From situations of the demonstrator's play, every action tried in the simulator, from the same saved state.

    Returns the demonstrator's probabilities (S, 15); which actions lead to the same next frame (S, 15), named by the first of them; and
    which do the same in every situation, also when held for `held` steps: groups (15,), named by the first.
    """
    expert = torch.load(expert_path, weights_only=True)
    agent = Agent(expert["meta"]["args"]["scale"]).eval()
    agent.load_state_dict(expert["model"])
    levels = data_meta["num_levels"], data_meta["start_level"]
    env, trial = stage.make_env(env_id, 16, *levels, 1), stage.make_env(env_id, 15, *levels, 1)
    probabilities, same_frame, same = [], [], np.ones((15, 15), dtype=bool)
    progress = tqdm(total=num_states, desc="trying all actions", unit="state")
    for step in itertools.count():
        shares = agent(torch.from_numpy(env.observe()[1]["rgb"]))[0].softmax(-1)
        if step % 8 == 7:
            for state, share in zip(get_env_state(env), shares):
                set_env_state(trial, [state] * 15)
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
    return torch.stack(probabilities), torch.from_numpy(np.array(same_frame)), torch.from_numpy(same.argmax(1))


def merged(probabilities, groups):
    """Probabilities (n, 15) of actions -> those of groups (15,) of actions; a group stands where its first action did."""
    return torch.zeros_like(probabilities).index_add_(1, groups, probabilities)


def entropies(probabilities, same_frame):
    """The demonstrator's entropy, and the one left to somebody who also knows which actions the next frame allows; nats, means over states."""
    log = probabilities.clamp_min(1e-12).log()
    allowed = torch.zeros_like(probabilities).scatter_add_(1, same_frame, probabilities).gather(1, same_frame)
    return -(probabilities * log).sum(1).mean().item(), -(probabilities * (log - allowed.clamp_min(1e-12).log())).sum(1).mean().item()


@torch.no_grad()
def logits_of(decoder, x):
    return decoder(x)


def cross_entropy(logits, actions, groups):
    """Mean negative log-probability (nats) of the actions (n,) taken, and of what they do: of their groups (15,)."""
    p = logits.double().softmax(-1)
    return [-share.gather(1, a[:, None]).log().mean().item() for share, a in ((p, actions), (merged(p, groups), groups[actions]))]


def learned_from_frames(model, obs, actions, obs_test):
    """Logits on held-out frames (n, 64, 64, 3) of a network trained on frames and actions: ten passes and at least 200 updates."""
    autocast = torch.autocast("cpu", torch.bfloat16)
    updates = max(200, -(-10 * len(obs) // 64))
    model = stage.fit(model.to(memory_format=torch.channels_last), obs, actions, updates, 5e-4, 64, stage.Args(), autocast)
    with torch.no_grad(), autocast:
        return torch.cat([model(chunk).float() for chunk in obs_test.split(512)])


def best_updates(build, x, actions, updates, *how):
    """The number of updates, among `updates` and its quarters down to 1/64, after which build()'s decoders do best on labels they have not seen."""
    candidates = sorted({max(1, updates >> i) for i in (0, 2, 4, 6)})
    loss = dict.fromkeys(candidates, 0.0)
    for held_out in torch.randperm(len(x), device=x.device).chunk(min(5, len(x))):
        kept = torch.ones(len(x), dtype=torch.bool, device=x.device)
        kept[held_out] = False
        for candidate in candidates:
            decoder = stage.fit(build(), x[kept], actions[kept], candidate, *how)
            with torch.no_grad():
                loss[candidate] += F.cross_entropy(decoder(x[held_out]), actions[held_out], reduction="sum").item()
    return min(candidates, key=loss.get)


def learned(x, actions, how):
    """A decoder fitted on inputs x (n, ...) and actions (n,), with cross-validated updates."""
    build = partial(stage.Decoder, x.shape[1], (192, 128, 64))
    return stage.fit(build(), x, actions, best_updates(build, x, actions, 800, *how), *how)


def draw_report(report, path):
    """The picture of a why-it-stalls-ENV_ID.json: cross-entropy of what the actions do, against the number of labels."""
    x, each = report["num_labels"], {name: np.array(y).reshape(-1, len(report["num_labels"])) for name, y in report["each"]["effects"].items()}
    fig, ax = plt.subplots(figsize=(7.6, 4.6))
    for name, (color, line, marker) in LOOKS.items():
        ax.plot(x, each[name].mean(0), line, color=color, marker=marker, ms=5, label=name)
        ax.fill_between(x, each[name].min(0), each[name].max(0), color=color, alpha=0.12, lw=0)
    for key, line, label in (("demonstrator_entropy", "--", "demonstrator's entropy"), ("entropy_given_next_frame", ":", "left by the next frame")):
        ax.axhline(report[key]["effects"], color="black", ls=line, lw=1, label=label)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:,.0f}")
    effects, draws = len(set(report["groups"])), np.shape(report["each"]["effects"]["idm latent"])[1]
    title = f"{report['env_id']}, 15 actions with {effects} effects (seeds: {len(report['seeds'])}, draws: {draws})"
    ax.set(xlabel="labelled frames", ylabel="cross-entropy of what the action does (nats)", title=title)
    ax.set_ylim(0, 1.2 * each["frequencies of actions"].max())
    ax.legend(fontsize=7.5, loc="center left", bbox_to_anchor=(1, 0.5))
    text = (
        "Held-out frames; lower is better; bands: lowest to highest. Lines that leave the picture overfit. Look for the gap from green to dark blue."
    )
    fig.text(0.5, -0.02, text, ha="center", va="top", fontsize=8)
    fig.savefig(path, dpi=90, bbox_inches="tight")


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    data_dir = Path(args.data_dir or Path(args.runs_dir) / "data" / args.env_id)
    data_meta = stage.load_meta(data_dir, args.env_id)
    how = (1e-3, 512, stage.Args(), torch.autocast("cpu", enabled=False))
    expert_path = Path(args.expert_checkpoint or ROOT / "experts" / f"{args.env_id}.pt")
    if not expert_path.exists():
        sys.exit(f"error: no demonstrator at {expert_path}: name the one that made the data with --expert-checkpoint")
    probabilities, same_frame, groups = try_actions(args.env_id, expert_path, data_meta, args.num_states)
    floors = [entropies(probabilities, same_frame), entropies(merged(probabilities, groups), groups[same_frame])]
    losses = {name: np.zeros((2, len(args.seeds), args.num_draws, len(args.num_labels))) for name in LOOKS}

    for i, seed in enumerate(args.seeds):
        bc_path = Path(args.runs_dir) / f"{args.env_id}__lapo_bc__{seed}" / "checkpoint.pt"
        if not bc_path.exists():
            sys.exit(f"error: no checkpoint at {bc_path}: make it with `benchmark/experiments.sh small offline {args.env_id} {seed}`")
        (z, z2, _, seen, actions), frames, t, policy = encode(bc_path, data_dir, data_meta, "train")
        (z_test, _, latent_test, seen_test, actions_test), frames_test, t_test, _ = encode(bc_path, data_dir, data_meta, "test")
        obs_test = torch.from_numpy(frames_test[t_test])
        scale = torch.load(bc_path, weights_only=True)["meta"]["args"]["policy_scale"]
        mean, std = seen.mean(0), seen.std(0) + 1e-3
        seen, seen_test = (seen - mean) / std, (seen_test - mean) / std
        torch.manual_seed(seed)
        for draw in range(args.num_draws):
            order = torch.from_numpy(np.random.default_rng([seed, draw]).permutation(len(actions)))
            pool = order[:8192]
            picked = pool[kmeans_plusplus(z[pool].numpy(), min(1024, len(pool)), random_state=draw)[1]]
            spread = torch.cat([picked, order[~torch.isin(order, picked)]])
            for j, n in enumerate(tqdm(args.num_labels, desc=f"seed {seed}, draw {draw}", unit="count")):
                p = order[:n]

                frequencies = (torch.bincount(actions[p], minlength=15) + 1) / (n + 15)
                of_idm, of_both = learned(z[p], actions[p], how), learned(z2[p], actions[p], how)
                of_features = learned(seen[p], actions[p], how)
                logits = {
                    "frequencies of actions": frequencies.log().expand(len(actions_test), -1),
                    "idm latent": logits_of(of_idm, z_test),
                    "policy latent": logits_of(of_idm, latent_test),
                    "labels spread": logits_of(learned(z[spread[:n]], actions[spread[:n]], how), latent_test),
                    "policy features": logits_of(of_features, seen_test),
                    "latent and features": logits_of(learned(torch.cat([z, seen], 1)[p], actions[p], how), torch.cat([z_test, seen_test], 1)),
                }
                for name, first, x in (("averaged after", of_idm, z), ("two steps", of_both, z2)):
                    second = stage.fit(stage.Decoder(seen.shape[1], (192, 128, 64)), seen, logits_of(first, x).softmax(-1), 1500, *how)
                    logits[name] = logits_of(second, seen_test)
                of_features.mean.copy_(mean)  # from here on it sees what the policy computes as it is
                of_features.std.copy_(std)
                tuned = stage.DecodedPolicy(copy.deepcopy(policy), of_features, True)
                for name, network in (("fine-tuned", tuned), ("from scratch", stage.ScratchPolicy(scale))):
                    logits[name] = learned_from_frames(network, torch.from_numpy(frames[t[p]]), actions[p], obs_test)
                for name, of_actions in logits.items():
                    losses[name][:, i, draw, j] = cross_entropy(of_actions, actions_test, groups)

    path, of = Path(args.out) / f"why-it-stalls-{args.env_id}", ("actions", "effects")
    report = {
        "env_id": args.env_id, "seeds": args.seeds, "num_labels": args.num_labels, "test_frames": len(actions_test), "torch": torch.__version__,
        "states": len(probabilities), "groups": groups.tolist(),
        "demonstrator_entropy": {k: round(floor[0], 4) for k, floor in zip(of, floors)},
        "entropy_given_next_frame": {k: round(floor[1], 4) for k, floor in zip(of, floors)},
        "cross_entropy": {k: {name: losses[name][i].mean((0, 1)).round(4).tolist() for name in LOOKS} for i, k in enumerate(of)},
        "each": {k: {name: losses[name][i].round(4).tolist() for name in LOOKS} for i, k in enumerate(of)},
    }  # fmt: skip
    Path(f"{path}.json").write_text(json.dumps(report))
    draw_report(report, f"{path}.png")
    for k, name in zip(of, ("the action", "what the action does")):
        floor = f"the demonstrator's entropy {report['demonstrator_entropy'][k]}, the next frame leaves {report['entropy_given_next_frame'][k]}"
        print(f"\ncross-entropy of {name}; {floor}")
        print(f"{'labels':24s}" + "".join(f"{n:8d}" for n in args.num_labels))
        for line, values in report["cross_entropy"][k].items():
            print(f"{line:24s}" + "".join(f"{x:8.3f}" for x in values))
    print(f"wrote {path}.json and .png")
