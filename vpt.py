"""VPT, the baseline that a practitioner would take (Baker et al. 2022): pseudo-labels, no latent actions.

    inverse model   f(o_{t-1}, o_t, o_{t+1}) -> a_t    cross-entropy on n labelled transitions
    pseudo-labels   p_t = softmax(f(...))              of all transitions
    policy          a ~ pi(o_t)                        cross-entropy to p_t

Ours: --pretrain-checkpoint starts f from LAPO's inverse dynamics model, --bc-checkpoint pi from its latent
policy. Labels, draws, episodes and scores are those of lapo_decode.py.

    python vpt.py --env-id bossfight                                              # the paper's widths
    python vpt.py --env-id coinrun --num-labels 32 256 --idm-scale 1 --policy-scale 1 --policy-updates 500
Reads data/ENV_ID, writes RUNS_DIR/ENV_ID__vpt__SEED/results.json and checkpoint.pt: f and pi that were fitted
on the most labels of the first draw. See docs/vpt.md.
"""

import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from lapo_decode import (
    BAR,
    FORMAT_VERSION,
    IDM,
    WORLD_SIZE,
    LatentPolicy,
    apply_to_windows,
    fit_classifier,
    get_windows,
    load_checkpoint,
    load_labelled_frames,
    make_writer,
    open_folder,
    play,
    refuse,
    report_returns,
    save,
)

# flags that are no arguments of the method
PLACES = "data_dir runs_dir overwrite cuda track wandb_project_name wandb_entity".split()


@dataclass
class Args:
    # what
    env_id: str = "bossfight"  # a Procgen game, or a gymnasium world
    exp_name: str = Path(__file__).stem  # the run folder is RUNS_DIR/ENV_ID__EXP_NAME__SEED
    seed: int = 1  # seed of the experiment
    # data
    data_dir: str | None = None  # the dataset; default data/ENV_ID
    pretrain_checkpoint: str | None = None  # of lapo_pretrain.py: f starts from its IDM, else from scratch
    bc_checkpoint: str | None = None  # of lapo_bc.py: pi starts from its policy, else from scratch
    # method
    num_labels: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
    """the label counts n: this many training frames come with their true action"""
    num_draws: int = 5  # draws of the labelled frames; results are means over them
    eval_episodes: int = 100  # episodes per n, over all draws
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
    overwrite: bool = False  # begin anew; else a finished run is kept, and an unfinished one goes on
    track: bool = False  # send the same logs to Weights & Biases
    wandb_project_name: str = "lapo"  # its project
    wandb_entity: str | None = None  # its team; default: your own
    cuda: bool = True  # use CUDA, or another accelerator that torch knows, where there is one
    bf16: tyro.conf.DisallowNone[bool | None] = None  # forward passes in bfloat16; default: on CUDA GPUs


def random_shift(images, pixels):
    """Shifts each of the images (B, H, W, C) by up to +- pixels, edges repeated (Yarats et al. 2021)."""
    if pixels == 0:
        return images
    B, H, W, _ = images.shape
    device = images.device
    down, right = torch.randint(-pixels, pixels + 1, (2, B, 1), device=device)
    rows = (torch.arange(H, device=device) + down).clamp(0, H - 1)  # (B, H)
    columns = (torch.arange(W, device=device) + right).clamp(0, W - 1)  # (B, W)
    return images[torch.arange(B, device=device)[:, None, None], rows[:, :, None], columns[:, None]]


@torch.no_grad()
def fit_last_layer(idm, frames, t, actions, windows, autocast):
    """Sets f's last layer by logistic regression on n labels: times (n,), actions (n,).

    Features are standardised by windows around times (m,) that need no label. Each action counts as seen once
    more, at a tenth: one of which there is no label gets a low probability, not none.
    """
    num_actions = len(idm.head.bias)

    def features(t):
        x = apply_to_windows(idm.network, frames, t, actions.device, autocast)
        return x.float().cpu().numpy()  # (n, 256)

    scaler = StandardScaler().fit(features(windows))
    x = np.concatenate([scaler.transform(features(t)), np.zeros((num_actions, 256))])
    y = np.concatenate([actions.cpu().numpy(), np.arange(num_actions)])
    weight = np.repeat([1, 0.1], [len(t), num_actions])
    probe = LogisticRegression(C=0.01, max_iter=300)
    with warnings.catch_warnings(action="ignore"):  # no convergence: a start is all it has to be
        probe.fit(x, y, weight)
    coef = probe.coef_ / scaler.scale_  # (A, 256): the layer sees features as they are
    intercept = probe.intercept_ - coef @ scaler.mean_  # (A,)
    if num_actions == 2:  # scikit-learn has one row then, the logits' difference
        coef = np.concatenate([0 * coef, coef])
        intercept = np.append(0, intercept)
    idm.head.weight.copy_(torch.from_numpy(coef))
    idm.head.bias.copy_(torch.from_numpy(intercept))


def fit_inverse_model(idm, frames, t, actions, windows, args, autocast):
    """Trains f(windows around t) -> logits of a_t on n labels: times (n,), actions (n,).

    The last layer first: fine-tuning from a random one spoils what LAPO's layers know (Kumar et al. 2022).
    """
    fit_last_layer(idm, frames, t, actions, windows, autocast)

    def inputs(i):
        images = get_windows(frames, t[i], actions.device).permute(0, 2, 3, 1)  # (B, 64, 64, 9)
        return random_shift(images, args.shift).permute(0, 3, 1, 2)

    return fit_classifier(
        idm,
        inputs,
        actions,
        updates=math.ceil(args.idm_epochs * len(t) / min(args.batch_size, len(t))),
        learning_rate=args.learning_rate,
        batch_size=args.batch_size,
        label_smoothing=args.label_smoothing,
        weight_decay=args.weight_decay,
        autocast=autocast,
    )


def pseudo_label(idm, frames, t, device, autocast):
    """f's probabilities (n, A) of the actions at times t (n,)."""
    return apply_to_windows(idm, frames, t, device, autocast).softmax(-1)


def fit_policy(policy, frames, t, probabilities, args, autocast):
    """Trains pi(o_t) -> logits of a_t on pseudo-labels: times (n,), probabilities (n, A)."""

    def inputs(i):
        obs = torch.from_numpy(frames[t[i]]).to(probabilities.device)  # (B, 64, 64, 3) uint8
        return random_shift(obs, args.shift)

    return fit_classifier(
        policy,
        inputs,
        probabilities,
        updates=args.policy_updates,
        learning_rate=args.learning_rate,
        batch_size=args.batch_size,
        label_smoothing=0.0,  # f's was smoothed
        weight_decay=args.weight_decay,
        autocast=autocast,
    )


def main(args):
    device, autocast = start(args)
    pretrained = {}
    cloned = {}
    if args.pretrain_checkpoint:
        pretrained = load_checkpoint(args.pretrain_checkpoint, "lapo_pretrain", args.env_id)
    if args.bc_checkpoint:
        cloned = load_checkpoint(args.bc_checkpoint, "lapo_bc", args.env_id)
    data, train, actions, labelled = load_labelled_frames(args)
    folder, resumed = open_folder(args, PLACES)
    began = time.time() - resumed.get("seconds", 0)
    writer = make_writer(args, folder, 0)

    known = actions[train.windows] >= 0  # windows whose true action is in the dataset
    unlabelled = train.windows[:: 1 + len(train.windows) // 1024]  # to standardise features
    most = max(args.num_labels)
    num_episodes = math.ceil(args.eval_episodes / args.num_draws)  # of a policy
    played = resumed.get("played", [])  # returns (len(num_labels), num_episodes) of each draw that is done
    accuracies = resumed.get("accuracies", [])  # of their pseudo-labels (len(num_labels),)
    networks = resumed.get("networks")
    for draw in range(len(played), args.num_draws):
        seed = args.seed * 1000 + draw
        torch.manual_seed(seed)
        # the n labelled windows are the first n of the draw's permutation, as in lapo_decode.py
        t = np.random.default_rng([args.seed, draw]).permutation(labelled)[:most]
        labels = torch.from_numpy(actions[t]).long().to(device)  # (n,)

        policies = []
        draw_accuracies = []
        description = f"draw {draw + 1} of {args.num_draws}: fit"
        for n in tqdm(args.num_labels, description, unit="n", leave=False, **BAR):
            idm, policy = new_networks(data["num_actions"], pretrained, cloned, args, device)
            fit_inverse_model(idm, train, t[:n], labels[:n], unlabelled, args, autocast)
            probabilities = pseudo_label(idm, train, train.windows, device, autocast)  # (windows, A)
            fit_policy(policy, train, train.windows, probabilities, args, autocast)
            policies.append(policy)
            guesses = probabilities.argmax(-1).cpu().numpy()
            right = guesses == actions[train.windows]
            draw_accuracies.append(float(right[known].mean()))
            if draw == 0 and n == most:
                networks = {"idm": idm.state_dict(), "policy": policy.state_dict()}  # for checkpoint.pt
        returns = play(policies, num_episodes, seed, data, args, device, autocast)
        played.append(returns.tolist())
        accuracies.append(draw_accuracies)
        state = {
            **describe(args),
            "played": played,
            "accuracies": accuracies,
            "networks": networks,
            "seconds": time.time() - began,
        }
        save(folder / "resume.pt", state)

    accuracy = dict(zip(args.num_labels, np.mean(accuracies, 0).round(4).tolist()))
    print(f"right pseudo-labels, by the number of labels: {accuracy}")
    plan = [(n, args.exp_name) for n in args.num_labels]
    results = report_returns(plan, np.array(played), data)
    for row in results["curve"]:
        writer.add_scalar(f"{args.exp_name}/return_mean", row["return_mean"], row["n_labels"])
    writer.close()
    results = {**results, "pseudo_label_accuracy": accuracy, "data": data}
    finish(folder, args, time.time() - began, {**networks, "data": data}, results)


# ---- Networks of LAPO, run-keeping: nobody has to read on ----


def new_networks(num_actions, pretrained, cloned, args, device):
    """f (B, 9, 64, 64) -> (B, A) and pi (B, 64, 64, 3) -> (B, A): LAPO's networks, A logits for a latent.

    LAPO's checkpoints, {} for none, bring their sizes and all layers but the last, which is new.
    """
    if pretrained:
        sizes = pretrained["args"]
        idm = IDM(sizes["idm_scale"], num_actions, sizes["patch_size"])
        idm.network.load_state_dict(impala_cnn(pretrained["idm"]))
    else:
        idm = IDM(args.idm_scale, num_actions, args.patch_size)
    if cloned:
        patch_size = cloned["pretrain_args"]["patch_size"]
        policy = LatentPolicy(cloned["args"]["policy_scale"], num_actions, patch_size)
        policy.network.load_state_dict(impala_cnn(cloned["policy"]))
    else:
        policy = LatentPolicy(args.policy_scale, num_actions, args.patch_size)
    idm = idm.to(device, memory_format=torch.channels_last)
    policy = policy.to(device, memory_format=torch.channels_last)
    return idm, policy


def impala_cnn(state):
    """The part of an IDM's or a policy's state dict that is its ImpalaCNN's."""
    return {key.removeprefix("network."): x for key, x in state.items() if key.startswith("network.")}


def start(args):
    """Returns the device, and the autocast of forward passes."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the process at once, without a traceback
    if WORLD_SIZE > 1:
        refuse("VPT trains small networks in one process: `python vpt.py`, no torchrun")
    counts = args.num_draws - 1, args.eval_episodes, args.num_envs, args.batch_size, args.shift + 1
    if min(*counts, args.idm_epochs, args.policy_updates) < 1 or args.temperature <= 0:
        least = "--num-draws 2, --shift 0, other counts 1"
        refuse(f"a flag is too small: at least {least}, and --temperature more than 0")
    device = torch.device("cpu")
    if args.cuda and torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
    bf16 = args.bf16
    if bf16 is None:
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return device, torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def describe(args):
    """What states, checkpoints and results say of their run."""
    return {
        "format_version": FORMAT_VERSION,
        "stage": Path(__file__).stem,
        "env_id": args.env_id,
        "args": vars(args),
        "command": shlex.join(["python", *(arg for arg in sys.argv if arg != "--overwrite")]),
        "processes": WORLD_SIZE,
    }


def finish(folder, args, seconds, networks, results):
    """checkpoint.pt, for the next stage, and last results.json, which makes the run a finished one."""
    save(folder / "checkpoint.pt", {**describe(args), **networks})
    device = torch.backends.cpu.get_cpu_capability()
    if args.cuda and torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    code = Path(__file__).parent
    machine = {
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": subprocess.getoutput(f"git -C '{code}' describe --always --dirty 2>/dev/null"),
        "wall_seconds": round(seconds, 1),
    }
    results = {**results, **machine, **describe(args)}
    (folder / "results.json.tmp").write_text(json.dumps(results, indent=2))
    os.replace(folder / "results.json.tmp", folder / "results.json")
    (folder / "resume.pt").unlink(missing_ok=True)
    print(f"wrote {folder}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
