"""How well do policies name the actions of your own videos, which nobody can play? Scores on test labels.

    lapo_decoder             d(pi(o_t)), as lapo_decode.py fits it on n labels
    cloning_from_scratch     the baseline: same labels, same CNN, no latents
    majority_action          the labels' frequencies, whatever the frame
    vpt, vpt_lapo (--vpt)    vpt.py's policy from pseudo-labels: from scratch, and from LAPO's networks

Several draws of the n labelled training frames each; accuracy and cross-entropy are of the labelled frames of
the test split. The policies see o_t alone: where one could have acted otherwise, none reaches 1.

    python -m tools.score_labels --env-id my_videos --num-labels 32 128
Reads data/ENV_ID, as import_videos writes it with --labels, and RUNS_DIR/ENV_ID__lapo_bc__SEED/checkpoint.pt,
writes RUNS_DIR/ENV_ID__score_labels__SEED/results.json.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from tqdm import tqdm

import vpt
from lapo_bc import BAR, LatentPolicy, load_checkpoint, load_dataset, refuse
from lapo_decode import apply_to_windows, fit_cloning, fit_lapo_decoder, load_actions
from tools.loading import (
    autocast_of,
    describe,
    find_device,
    load_idm,
    load_policy,
    open_folder,
    stage_folder,
    write_results,
)


@dataclass
class Args:
    # what
    env_id: str = "my_videos"  # the name of your own videos, or another dataset with labels
    exp_name: str = Path(__file__).stem  # the run folder is RUNS_DIR/ENV_ID__EXP_NAME__SEED
    seed: int = 1  # seed of the draws, and of the run of lapo_bc.py
    # data
    data_dir: str | None = None  # the dataset; default data/ENV_ID
    bc_checkpoint: str | None = None  # of lapo_bc.py; default RUNS_DIR/ENV_ID__lapo_bc__SEED/checkpoint.pt
    # method
    num_labels: tuple[int, ...] = (16, 32, 64, 128, 256, 512)
    """the label counts n: this many training frames come with their true action"""
    num_draws: int = 5  # draws of the labelled frames; results are means over them
    cloning: bool = True  # score cloning from scratch, too
    vpt: bool = False  # score policies from pseudo-labels, too, from scratch and from LAPO's networks
    decoder_hidden: tuple[int, ...] = (192, 128, 64)  # hidden widths of the decoder
    # optimisation
    decoder_updates: int = 200  # gradient steps of a decoder
    decoder_learning_rate: float = 1e-3  # AdamW's learning rate for a decoder, linearly to 0
    cloning_updates: int = 1000  # gradient steps of cloning
    cloning_epochs: int = 0  # at least so many passes over the labels, if that is more steps
    cloning_learning_rate: float = 5e-4  # AdamW's learning rate for cloning, linearly to 0
    policy_batch_size: int = 128  # the largest batch of cloning and of VPT; the decoder's is 512
    vpt_epochs: int = 30  # passes of VPT's inverse model over its n labels
    vpt_updates: int = 10_000  # gradient steps of VPT's policy, on all frames
    vpt_learning_rate: float = 5e-4  # AdamW's learning rate for VPT's networks, linearly to 0
    label_smoothing: float = 0.05  # label smoothing of what is fitted on labels
    weight_decay: float = 1e-2  # decoupled weight decay (AdamW) of all
    # run
    runs_dir: str = "runs"  # where run folders are made, and the stages' lie
    overwrite: bool = False  # replace the results in the run folder
    cuda: bool = True  # use CUDA, or another accelerator that torch knows, where there is one
    bf16: tyro.conf.DisallowNone[bool | None] = None  # forward passes in bfloat16; default: on CUDA GPUs


def load_labelled(frames, num_actions):
    """A split's actions (N,), and its windows that have one (n,); refuses a split without any."""
    actions, labelled = load_actions(frames, num_actions)
    if len(labelled) == 0:
        refuse(f"{frames.folders[0]} has no labelled window: import the videos with more --labels")
    return actions, labelled


def majority(labels, num_actions):
    """The policy that plays the actions of labels (n,) as often as they come, everywhere."""
    frequencies = (torch.bincount(labels, minlength=num_actions) + 1) / (len(labels) + num_actions)
    logits = frequencies.log()  # (A,)
    return lambda obs: logits.expand(len(obs), -1)


def vpt_args(cloned, args):
    """vpt.py's arguments, with LAPO's widths."""
    return vpt.Args(
        idm_scale=cloned["pretrain_args"]["idm_scale"],
        policy_scale=cloned["args"]["policy_scale"],
        patch_size=cloned["pretrain_args"]["patch_size"],
        idm_epochs=args.vpt_epochs,
        policy_updates=args.vpt_updates,
        learning_rate=args.vpt_learning_rate,
        batch_size=args.policy_batch_size,
        label_smoothing=args.label_smoothing,
        weight_decay=args.weight_decay,
    )


def fit_vpt(train, t, labels, num_actions, pretrained, cloned, args, autocast):
    """vpt.py's policy, of labels (n,) at times t (n,); checkpoints are {} for networks from scratch."""
    idm, policy = vpt.new_networks(num_actions, pretrained, cloned, args, labels.device)
    unlabelled = train.windows[:: 1 + len(train.windows) // 1024]  # to standardise features
    vpt.fit_inverse_model(idm, train, t, labels, unlabelled, args, autocast)
    probabilities = vpt.pseudo_label(idm, train, train.windows, labels.device, autocast)
    return vpt.fit_policy(policy, train, train.windows, probabilities, args, autocast)


@torch.inference_mode()
def score(policy, frames, t, actions, device):
    """Accuracy and cross-entropy (nats) of a policy on frames t (n,) with actions (N,)."""
    right = 0
    loss = 0.0
    for batch in np.split(t, range(512, len(t), 512)):
        obs = torch.from_numpy(frames[batch]).to(device)  # (B, 64, 64, 3) uint8
        true = torch.from_numpy(actions[batch]).long().to(device)  # (B,)
        logits = policy(obs).float()  # (B, A)
        right += (logits.argmax(-1) == true).sum().item()
        loss += F.cross_entropy(logits, true, reduction="sum").item()
    return right / len(t), loss / len(t)


def mean_and_stderr(x):
    """Of values (n,)."""
    return float(np.mean(x)), float(np.std(x, ddof=1) / np.sqrt(len(x)))


def report_accuracy(plan, scores, num_frames):
    """Prints scores (num_draws, len(plan), 2), accuracies and cross-entropies; gives results.json's rows."""
    rows = []
    print(f"\n{num_frames:,} labelled test frames: means over {len(scores)} draws, +- their standard error")
    for (n, method), (accuracies, losses) in zip(plan, scores.transpose(1, 2, 0)):
        accuracy, accuracy_stderr = mean_and_stderr(accuracies)
        loss, loss_stderr = mean_and_stderr(losses)
        row = {
            "method": method,
            "n_labels": n,
            "accuracies": accuracies.tolist(),
            "losses": losses.tolist(),
            "accuracy_mean": accuracy,
            "accuracy_stderr": accuracy_stderr,
            "cross_entropy_mean": loss,
            "cross_entropy_stderr": loss_stderr,
        }
        rows.append(row)
        found = f"accuracy {accuracy:.3f} +- {accuracy_stderr:.3f}"
        print(f"{method:20s} {n:6}  {found}  cross-entropy {loss:.2f} +- {loss_stderr:.2f}")
    return rows


def main(args):
    if min(args.decoder_updates, args.cloning_updates, args.vpt_updates, args.policy_batch_size) < 1:
        refuse("--policy-batch-size and all updates start at 1")
    if args.num_draws < 2:
        refuse("--num-draws starts at 2, for a standard error")
    began = time.time()
    device = find_device(args.cuda)
    autocast = autocast_of(args.bf16, device)
    folder = open_folder(args)
    path = args.bc_checkpoint or stage_folder(args, "lapo_bc") / "checkpoint.pt"
    cloned = load_checkpoint(path, "lapo_bc", args.env_id)
    data, train, test = load_dataset(args)
    if "num_actions" not in data:
        refuse(f"the dataset of {args.env_id} has no labels: import the videos with --labels")
    num_actions = data["num_actions"]
    actions, labelled = load_labelled(train, num_actions)
    actions_test, t_test = load_labelled(test, num_actions)
    most = max(args.num_labels, default=0)
    if min(args.num_labels, default=0) < 1 or most > len(labelled):
        refuse(f"--num-labels {args.num_labels}: this dataset has {len(labelled)} labelled windows")

    # the networks of stages 2 and 3, frozen
    pretrained = {"idm": cloned["idm"], "args": cloned["pretrain_args"]}
    idm = load_idm(cloned, device)
    policy = load_policy(cloned, device)
    patch_size = cloned["pretrain_args"]["patch_size"]

    methods = ["lapo_decoder"]
    if args.cloning:
        methods.append("cloning_from_scratch")
    if args.vpt:
        methods += ["vpt", "vpt_lapo"]
    methods.append("majority_action")
    plan = [(n, method) for n in args.num_labels for method in methods]
    scores = []  # of every draw [(accuracy, cross-entropy) of each in the plan]
    for draw in range(args.num_draws):
        torch.manual_seed(args.seed * 1000 + draw)
        # the n labelled windows are the first n of the draw's permutation, as in lapo_decode.py
        t = np.random.default_rng([args.seed, draw]).permutation(labelled)[:most]
        obs = torch.from_numpy(train[t]).to(device)  # (n, 64, 64, 3) uint8
        labels = torch.from_numpy(actions[t]).long().to(device)  # (n,)
        z = apply_to_windows(idm, train, t, device, autocast)  # (n, latent_dim)
        found = []
        progress = tqdm(plan, f"draw {draw + 1} of {args.num_draws}", unit="policy", leave=False, **BAR)
        for n, method in progress:
            if method == "lapo_decoder":
                decoder = fit_lapo_decoder(policy, z[:n], labels[:n], num_actions, args)
                player = torch.nn.Sequential(policy, decoder)
            elif method == "cloning_from_scratch":
                network = LatentPolicy(cloned["args"]["policy_scale"], num_actions, patch_size)
                network = network.to(device, memory_format=torch.channels_last)
                player = fit_cloning(network, obs[:n], labels[:n], args, autocast)
            elif method == "majority_action":
                player = majority(labels[:n], num_actions)
            else:
                checkpoints = ({}, {}) if method == "vpt" else (pretrained, cloned)
                how = *checkpoints, vpt_args(cloned, args), autocast
                player = fit_vpt(train, t[:n], labels[:n], num_actions, *how)
            found.append(score(player, test, t_test, actions_test, device))
        scores.append(found)

    rows = report_accuracy(plan, np.array(scores), len(t_test))
    results = {"num_draws": args.num_draws, "num_test_frames": len(t_test), "curve": rows}
    folder.mkdir(parents=True, exist_ok=True)
    write_results(folder, began, {**results, **describe(args, "score_labels")})
    print(f"wrote {folder}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
