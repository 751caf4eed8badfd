"""VPT, the baseline that a practitioner would take (Baker et al. 2022): pseudo-labels, no latent actions.

    inverse model   f(o_{t-1}, o_t, o_{t+1}) -> a_t    cross-entropy on n labelled transitions
    pseudo-labels   p_t = softmax(f(...))              of all transitions
    policy          a ~ pi(o_t)                        cross-entropy to p_t

Ours: --pretrain-checkpoint starts f from LAPO's inverse dynamics model, --bc-checkpoint pi from its latent
policy. Labels, draws, episodes and scores are those of lapo_decode.py.

    python vpt.py --env-id bossfight                                              # the paper's widths
    python vpt.py --env-id coinrun --num-labels 32 256 --idm-scale 1 --policy-scale 1 --policy-updates 500
Reads data/ENV_ID, writes RUNS_DIR/ENV_ID__vpt__SEED/results.json and checkpoint.pt: f and pi of one draw.
"""

import sys
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import tyro
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from lapo_bc import choose_precision
from lapo_decode import (
    IDM,
    WORLD_SIZE,
    LatentPolicy,
    Run,
    fit,
    get_windows,
    load_actions,
    load_checkpoint,
    load_dataset,
    play,
    report_accuracy,
    report_returns,
    test_accuracy,
)


@dataclass
class Args:
    # what
    env_id: str = "bossfight"  # one of Procgen's 16 games, a gymnasium world, or your own videos' name
    exp_name: str = Path(__file__).stem  # the run folder is RUNS_DIR/ENV_ID__EXP_NAME__SEED
    seed: int = 1  # seed of the experiment
    # data
    data_dir: str | None = None  # the dataset, one folder or A:B:C; default data/ENV_ID
    pretrain_checkpoint: str | None = None  # of lapo_pretrain.py: f starts from its IDM, else from scratch
    bc_checkpoint: str | None = None  # of lapo_bc.py: pi starts from its policy, else from scratch
    allow_unfinished: bool = False  # take checkpoints of unfinished runs, too
    # method
    num_labels: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
    """the label counts n: this many training frames come with their true action"""
    num_draws: int = 5  # draws of the labelled frames; results are means over them
    eval_episodes: int = 100  # episodes per n, over all draws; random play gets at least 100
    num_envs: int = 64  # the most games played in parallel
    temperature: float = 1.0  # actions are drawn from softmax(logits / temperature)
    idm_scale: float = 4.0  # width of f's IMPALA-CNN from scratch: 16, 32, 32 channels times this
    policy_scale: float = 4.0  # width of pi's from scratch
    patch_size: int = 1  # P, from scratch: patches of P x P pixels are folded into channels
    # optimisation
    shift: int = 4  # both see frames shifted at random by up to so many pixels, a window's alike
    idm_epochs: int = 30  # passes of f over its n labels
    policy_updates: int = 10_000  # gradient steps of pi, on all frames
    learning_rate: float = 5e-4  # AdamW's learning rate for both, linearly to 0
    batch_size: int = 128  # the largest batch of both
    label_smoothing: float = 0.05  # label smoothing of f; pi learns f's probabilities as they are
    weight_decay: float = 1e-2  # decoupled weight decay (AdamW) of both
    # run
    runs_dir: str = "runs"  # where run folders are made
    overwrite: bool = False  # replace the run in the run folder; else a finished one is kept, another goes on
    cuda: bool = True  # use CUDA, or another accelerator that torch knows, where there is one
    bf16: tyro.conf.DisallowNone[bool | None] = None  # forward passes in bfloat16; default: if faster here


def random_shift(images, pixels):
    """Shifts each of the images (B, H, W, C) by up to +- pixels, edges repeated (Yarats et al. 2021)."""
    if pixels == 0:
        return images
    B, H, W, _ = images.shape
    down, right = torch.randint(-pixels, pixels + 1, (2, B, 1), device=images.device)
    rows = (torch.arange(H, device=images.device) + down).clamp(0, H - 1)  # (B, H)
    columns = (torch.arange(W, device=images.device) + right).clamp(0, W - 1)
    return images[torch.arange(B, device=images.device)[:, None, None], rows[:, :, None], columns[:, None]]


def new_networks(num_actions, pretrained, cloned, args, device):
    """f (B, 9, 64, 64) -> (B, A) and pi (B, 64, 64, 3) -> (B, A): LAPO's networks, A logits for a latent.

    Checkpoints of LAPO, {} for none, bring their convolutions and linear layer; the last layer is new.
    """
    a = {"idm_scale": args.idm_scale, "patch_size": args.patch_size} | pretrained.get("args", {})
    idm = IDM(a["idm_scale"], num_actions, a["patch_size"], a.get("idm_differences", False))
    scale = cloned.get("args", vars(args))["policy_scale"]
    policy = LatentPolicy(scale, num_actions, cloned.get("pretrain_args", vars(args))["patch_size"])
    for network, weights in (idm, pretrained.get("idm")), (policy, cloned.get("policy")):
        if weights:
            learned = {name.removeprefix("network."): x for name, x in weights.items() if "network." in name}
            network.network.load_state_dict(learned)
    return [network.to(device, memory_format=torch.channels_last) for network in (idm, policy)]


@torch.no_grad()
def fit_last_layer(idm, frames, t, actions, windows, autocast):
    """Sets f's last layer by logistic regression on n labels: times (n,), actions (n,).

    Features are standardised by windows around times (m,) that need no label. Each action counts as seen once
    more, at a tenth: one of which there is no label gets a low probability, not none.
    """
    inputs, A = partial(get_windows, frames, device=actions.device), len(idm.head.bias)

    def features(t):
        with autocast:
            pieces = [idm.network(idm.see(inputs(i))) for i in np.split(t, range(512, len(t), 512))]
        return torch.cat(pieces).float().cpu().numpy()  # (n, 256)

    scaler = StandardScaler().fit(features(windows))
    x = np.concatenate([scaler.transform(features(t)), np.zeros((A, 256))])
    weight = np.repeat([1, 0.1], [len(t), A])
    probe = LogisticRegression(C=0.01, max_iter=300)
    with warnings.catch_warnings(action="ignore"):  # no convergence: a start is all it has to be
        probe.fit(x, [*actions.tolist(), *range(A)], weight)
    coef, intercept = probe.coef_ / scaler.scale_, probe.intercept_
    intercept = intercept - coef @ scaler.mean_  # the layer sees features as they are
    if A == 2:  # the logits' difference
        coef, intercept = np.append(0 * coef, coef, 0), np.append(0, intercept)
    idm.head.weight.copy_(torch.from_numpy(coef))
    idm.head.bias.copy_(torch.from_numpy(intercept))


def fit_inverse_model(idm, frames, t, actions, windows, args, autocast):
    """Trains f(windows around t) -> logits of a_t on n labels: times (n,), actions (n,).

    The last layer first: fine-tuning from a random one spoils what LAPO's layers know (Kumar et al. 2022).
    """
    fit_last_layer(idm, frames, t, actions, windows, autocast)

    def inputs(i):
        windows = get_windows(frames, t[i], actions.device).permute(0, 2, 3, 1)  # (B, 64, 64, 9)
        return random_shift(windows, args.shift).permute(0, 3, 1, 2)

    updates = -(-args.idm_epochs * len(t) // min(args.batch_size, len(t)))
    return fit(idm, inputs, actions, updates, args.learning_rate, args.batch_size, args, autocast)


@torch.no_grad()
def pseudo_label(idm, frames, t, device, autocast):
    """f's probabilities (n, A) of the actions at times t (n,)."""
    with autocast:
        pieces = [idm(get_windows(frames, piece, device)) for piece in np.split(t, range(512, len(t), 512))]
    return torch.cat(pieces).softmax(-1)


def fit_policy(policy, frames, t, probabilities, args, autocast):
    """Trains pi(o_t) -> logits of a_t on pseudo-labels: times (n,), probabilities (n, A)."""

    def inputs(i):
        return random_shift(torch.from_numpy(frames[t[i]]).to(probabilities.device), args.shift)

    as_they_are = SimpleNamespace(label_smoothing=0.0, weight_decay=args.weight_decay)
    how = args.policy_updates, args.learning_rate, args.batch_size
    return fit(policy, inputs, probabilities, *how, as_they_are, autocast)


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    if WORLD_SIZE > 1:
        sys.exit("error: VPT trains small networks in one process: `python vpt.py`, no torchrun")
    counts = args.num_draws - 1, args.eval_episodes, args.num_envs, args.batch_size, args.shift + 1
    if min(*counts, args.idm_epochs, args.policy_updates) < 1 or not args.temperature > 0:
        least = "--num-draws 2, --shift 0, other counts 1, --temperature more than 0"
        sys.exit(f"error: a flag is too small, expected at least: {least}")
    pretrained, cloned = {}, {}
    if args.pretrain_checkpoint:
        pretrained = load_checkpoint(args.pretrain_checkpoint, "lapo_pretrain", ["idm"], args)
    if args.bc_checkpoint:
        cloned = load_checkpoint(args.bc_checkpoint, "lapo_bc", ["policy", "pretrain_args"], args)
    data, frames, windows = load_dataset(args)
    demonstrator, A = data.get("demonstrator"), data.setdefault("num_actions", 15)
    actions, labelled = load_actions(frames["train"], windows["train"], A)
    if not demonstrator:
        actions_test, t_test = load_actions(frames["test"], windows["test"], A)
    fewest, most = min(args.num_labels, default=0), max(args.num_labels, default=0)
    if not 1 <= fewest <= most <= len(labelled):
        sys.exit(f"error: --num-labels {args.num_labels}: this dataset has {len(labelled)} labelled windows")
    run = Run(args, inputs=[x.get("identity") for x in (pretrained, cloned, data)])
    run.meta |= {"stage": "vpt", "data": data}
    device = (torch.accelerator.current_accelerator(True) if args.cuda else None) or torch.device("cpu")

    how = A, pretrained, cloned, args, device
    idm, policy = kept = new_networks(*how)  # checkpoint.pt's: most labels, first draw
    few = get_windows(frames["train"], windows["train"][:16], device)
    autocast = choose_precision(args, device, lambda: idm(few).square().mean().backward())
    state = run.restore(idm=idm, policy=policy)

    plan = [(n, args.exp_name) for n in args.num_labels]
    some = windows["train"][:: 1 + len(windows["train"]) // 1024]  # without labels, to standardise features
    num_episodes = -(-args.eval_episodes // args.num_draws)  # of a policy
    scores, right = state.get("scores", []), state.get("right", [])  # of every draw that is done
    for draw in range(len(scores), args.num_draws):
        seed = args.seed * 1000 + draw
        torch.manual_seed(seed)
        # the n labelled windows are the first n of the draw's permutation, as in lapo_decode.py
        t, policies = np.random.default_rng([args.seed, draw]).permutation(labelled)[:most], []
        labels = torch.from_numpy(actions[t]).long().to(device)  # (n,)
        right.append([])
        for n, _ in tqdm(plan, f"draw {draw + 1} of {args.num_draws}: fit", unit="policy", leave=False):
            run.leave_if_stopped()
            idm, policy = new_networks(*how)
            fit_inverse_model(idm, frames["train"], t[:n], labels[:n], some, args, autocast)
            p = pseudo_label(idm, frames["train"], windows["train"], device, autocast)  # (windows, A)
            policies.append(fit_policy(policy, frames["train"], windows["train"], p, args, autocast))
            true, known = actions[windows["train"]], np.isin(windows["train"], labelled)
            right[-1].append(float((p.argmax(-1).cpu().numpy() == true)[known].mean()))
            if draw == 0 and n == most:
                for network, fitted in zip(kept, (idm, policy)):
                    network.load_state_dict(fitted.state_dict())
        if demonstrator:
            score = play(policies, num_episodes, seed, data, device, autocast, run)
        else:
            score = test_accuracy(policies, frames["test"], t_test, actions_test, device)
        scores.append(score.tolist())
        run.save(draw + 1, scores=scores, right=right)
    accuracy = dict(zip(args.num_labels, np.mean(right, 0).round(4).tolist()))
    run.meta["pseudo_label_accuracy"] = accuracy
    print(f"right pseudo-labels, by the number of labels: {accuracy}")
    if demonstrator:
        report_returns(plan, np.array(scores), data, device, autocast, run)
    else:
        report_accuracy(plan, np.array(scores), len(t_test), run)
