"""Why does the paper's decoder stop improving with more labels? Every step from frame to action, scored on held-out frames.

    python benchmark/why_it_stalls.py --env-id coinrun --seeds 1 2 3      # after benchmark/experiments.sh small offline coinrun 1 2 3

The demonstrator acts at random, so what counts is the probability that a step gives the action it took: mean cross-entropy (nats)
on test frames, which no label comes from. Against the number of labels:

    idm latent          decoder(IDM(o_{t-1}, o_t, o_{t+1})): sees what happened next. Its floor is what the latent does not tell.
    policy latent       the paper's: the same decoder on pi(o_t), the mean of the latents that may follow o_t. The gap to the line above
                        is what is lost by averaging before decoding, and by not knowing what happens next.
    averaged after      the decoder labels 65,536 frames, a second one learns them from the policy's features (--pseudo-labels):
                        decodes before averaging
    two steps           the same, and the decoder sees z_t and z_{t+1} (--latent-steps 2)
    policy features     a decoder of the policy's latent and features, on the labels alone (--decoder-features): does not need the latent
                        to tell the action
    labels spread       the paper's, on labels spread over the latents (--choose-labels spread)
    fine-tuned          policy features, then the whole policy through that decoder on the labels (--finetune all), ten passes and at
                        least 200 updates
    from scratch        cloning, a policy of the same size on the labels alone, as long

All decoders but those two have as many updates as cross-validation on their labels asks for. Writes
benchmark/results/why-it-stalls-ENV_ID.{json,png}.
"""

import copy
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

LOOKS = {
    "frequencies of actions": ("#999999", ":", None), "idm latent": ("#009E73", "-", "s"), "policy latent": ("#0072B2", "-", "o"),
    "labels spread": ("#D55E00", "--", "D"),
    "averaged after": ("#56B4E9", "--", "v"), "two steps": ("#E69F00", "--", "P"), "policy features": ("#CC79A7", "-", "^"),
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


def cross_entropy(decoder, x, actions):
    with torch.no_grad():
        return F.cross_entropy(decoder(x), actions).item()


def learned_from_frames(model, obs, actions, obs_test, actions_test):
    """Held-out cross-entropy of a network trained on frames (n, 64, 64, 3) and actions (n,): ten passes and at least 200 updates."""
    autocast = torch.autocast("cpu", torch.bfloat16)
    updates = max(200, -(-10 * len(obs) // 64))
    model = stage.fit(model.to(memory_format=torch.channels_last), obs, actions, updates, 5e-4, 64, stage.Args(), autocast)
    with torch.no_grad(), autocast:
        logits = torch.cat([model(chunk).float() for chunk in obs_test.split(512)])
    return F.cross_entropy(logits, actions_test).item()


def best_updates(build, x, actions, updates, *how):
    """The number of updates, among `updates` and its halves down to 1/32, after which build()'s decoders do best on labels they have not seen."""
    candidates = sorted({max(1, updates >> i) for i in range(6)})
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
    return stage.fit(build(), x, actions, best_updates(build, x, actions, 200, *how), *how)


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    data_dir = Path(args.data_dir or Path(args.runs_dir) / "data" / args.env_id)
    data_meta = stage.load_meta(data_dir, args.env_id)
    how = (1e-3, 512, stage.Args(), torch.autocast("cpu", enabled=False))
    losses = {name: np.zeros((len(args.seeds), args.num_draws, len(args.num_labels))) for name in LOOKS}

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
                found = {"frequencies of actions": -frequencies.log()[actions_test].mean().item()}
                decoder = learned(z[p], actions[p], how)
                found |= {
                    "idm latent": cross_entropy(decoder, z_test, actions_test),
                    "policy latent": cross_entropy(decoder, latent_test, actions_test),
                }
                found["labels spread"] = cross_entropy(learned(z[spread[:n]], actions[spread[:n]], how), latent_test, actions_test)
                for name, first, x in (("averaged after", decoder, z), ("two steps", learned(z2[p], actions[p], how), z2)):
                    with torch.no_grad():
                        soft = first(x).softmax(-1)
                    second = stage.fit(stage.Decoder(seen.shape[1], (192, 128, 64)), seen, soft, 1500, *how)
                    found[name] = cross_entropy(second, seen_test, actions_test)
                decoder = learned(seen[p], actions[p], how)
                found["policy features"] = cross_entropy(decoder, seen_test, actions_test)
                decoder.mean.copy_(mean)
                decoder.std.copy_(std)
                tuned = stage.DecodedPolicy(copy.deepcopy(policy), decoder, True)
                for name, network in (("fine-tuned", tuned), ("from scratch", stage.ScratchPolicy(scale))):
                    obs = torch.from_numpy(frames[t[p]])
                    found[name] = learned_from_frames(network, obs, actions[p], obs_test, actions_test)
                for name, loss in found.items():
                    losses[name][i, draw, j] = loss

    fig, ax = plt.subplots(figsize=(7, 4.6))
    for name, (color, line, marker) in LOOKS.items():
        y = losses[name].reshape(-1, len(args.num_labels))
        ax.plot(args.num_labels, y.mean(0), line, color=color, marker=marker, ms=5, label=name)
        ax.fill_between(args.num_labels, y.min(0), y.max(0), color=color, alpha=0.12, lw=0)
    ax.set_xscale("log", base=2)
    ax.set(
        xlabel="labelled frames",
        ylabel="cross-entropy of the demonstrator's action (nats)",
        title=f"{args.env_id}, seeds: {len(args.seeds)}, draws: {args.num_draws}",
    )
    ax.legend(fontsize=8)
    fig.text(
        0.5,
        -0.02,
        "Held-out frames; lower is better; bands: lowest to highest. Look for what goes on falling where the blue line stops.",
        ha="center",
        fontsize=9,
    )
    path = Path(args.out) / f"why-it-stalls-{args.env_id}"
    fig.savefig(f"{path}.png", dpi=110, bbox_inches="tight")
    report = {
        "env_id": args.env_id, "seeds": args.seeds, "num_labels": args.num_labels, "test_frames": len(actions_test), "torch": torch.__version__,
        "cross_entropy": {name: losses[name].mean((0, 1)).round(4).tolist() for name in LOOKS},
        "each": {name: x.round(4).tolist() for name, x in losses.items()},
    }  # fmt: skip
    Path(f"{path}.json").write_text(json.dumps(report))
    print(f"{'labels':24s}" + "".join(f"{n:8d}" for n in args.num_labels))
    for name in LOOKS:
        print(f"{name:24s}" + "".join(f"{x:8.3f}" for x in losses[name].mean((0, 1))))
    print(f"wrote {path}.json and .png")
