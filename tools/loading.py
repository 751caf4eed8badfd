"""What the tools share: actions' names, networks from checkpoints, latents, run folders."""

import json
import os
import shlex
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from gymnasium import registry

from lapo_bc import LatentPolicy, get_windows, load_checkpoint, refuse, run_folder
from lapo_decode import Decoder
from lapo_finetune_ppo import FinetunedAgent
from lapo_pretrain import FDM, IDM, LAPO, VQ

# Procgen's actions 0-8 are 3 * (right + 1) + (up + 1); 9-14 are buttons
MOVES = ["left down", "left", "left up", "down", "stay", "up", "right down", "right", "right up"]
ACTIONS = MOVES + [f"button {letter}" for letter in "DAWSQE"]
STAY = MOVES.index("stay")


def action_names(data):
    """What to call the actions of a dataset, from its meta.json."""
    env_id = data["env_id"]
    of_gymnasium = env_id in registry or ":" in env_id
    if data.get("demonstrator") and data.get("num_actions") == len(ACTIONS) and not of_gymnasium:  # Procgen's
        return ACTIONS
    if data.get("action_names"):
        return data["action_names"]
    return [f"action {a}" for a in range(data.get("num_actions", 0))]


def find_device(cuda):
    """The accelerator that torch knows, if it is wanted and there is one, else the CPU."""
    if cuda and torch.accelerator.is_available():
        return torch.accelerator.current_accelerator()
    return torch.device("cpu")


def autocast_of(bf16, device):
    """The autocast of a stage's --bf16; None: on CUDA GPUs that have it."""
    if bf16 is None:
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def stage_folder(args, stage):
    """Where the run of a stage lies that has its default name."""
    return run_folder(args, stage)


def new_lapo(p):
    """IDM, VQ and FDM as pretraining with the arguments p begins with them, on the CPU."""
    torch.manual_seed(p["seed"])
    latent_dim = p["vq_num_codebooks"] * p["vq_num_slots"] * p["vq_dim"]
    idm = IDM(p["idm_scale"], latent_dim, p["patch_size"])
    vq = None
    if p["vq"]:
        sizes = [p[f"vq_{name}"] for name in ("num_codebooks", "num_slots", "dim", "num_codes")]
        vq = VQ(*sizes, p["vq_commitment"], p["vq_decay"])
    fdm = FDM(latent_dim, p["fdm_width"], p["predict_change"], p["patch_size"])
    return LAPO(idm, vq, fdm).eval()


def load_lapo(pretrained, device):
    """IDM, VQ and FDM of a checkpoint of lapo_pretrain.py."""
    lapo = new_lapo(pretrained["args"])
    lapo.idm.load_state_dict(pretrained["idm"])
    lapo.fdm.load_state_dict(pretrained["fdm"])
    if lapo.vq is not None:
        lapo.vq.load_state_dict(pretrained["vq"])
    return lapo.to(device, memory_format=torch.channels_last)


def load_idm(cloned, device):
    """The IDM in a checkpoint of lapo_bc.py, frozen."""
    p = cloned["pretrain_args"]
    latent_dim = len(cloned["idm"]["head.bias"])
    idm = IDM(p["idm_scale"], latent_dim, p["patch_size"])
    idm.load_state_dict(cloned["idm"])
    return idm.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


def load_policy(cloned, device):
    """The latent policy of a checkpoint of lapo_bc.py, frozen."""
    latent_dim = len(cloned["policy"]["mean"])
    patch_size = cloned["pretrain_args"]["patch_size"]
    policy = LatentPolicy(cloned["args"]["policy_scale"], latent_dim, patch_size)
    policy.load_state_dict(cloned["policy"])
    return policy.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


def load_agent(stage, args, device):
    """The agent of lapo_decode or lapo_finetune_ppo: (B, 64, 64, 3) uint8 -> logits (B, A); None before."""
    path = stage_folder(args, stage) / "checkpoint.pt"
    if not path.exists():
        return None
    checkpoint = load_checkpoint(path, stage, args.env_id)
    p = checkpoint["args"]
    policy_scale = checkpoint["bc_args"]["policy_scale"]
    patch_size = checkpoint["pretrain_args"]["patch_size"]
    if stage == "lapo_finetune_ppo":
        latent_dim = len(checkpoint["agent"]["head.bias"])
        num_actions = len(checkpoint["agent"]["actor.bias"])
        sizes = policy_scale, patch_size, latent_dim, p["decoder_hidden"]
        agent = FinetunedAgent(*sizes, p["sl"], num_actions)
        agent.load_state_dict(checkpoint["agent"])
        agent.to(device)
        return lambda obs: agent(agent.features(obs, nullcontext()))[0]
    latent_dim = len(checkpoint["decoder"]["mean"])
    num_actions = len(list(checkpoint["decoder"].values())[-1])
    policy = LatentPolicy(policy_scale, latent_dim, patch_size)
    policy.load_state_dict(checkpoint["policy"])
    decoder = Decoder(latent_dim, p["decoder_hidden"], num_actions)
    decoder.load_state_dict(checkpoint["decoder"])
    agent = torch.nn.Sequential(policy, decoder).to(device)
    return lambda obs: agent(obs) / p["temperature"]


class Encoded(NamedTuple):
    """The latents of n windows, on the CPU."""

    z: np.ndarray  # (n, latent_dim), as the IDM says them
    quantised: np.ndarray  # (n, latent_dim), as the FDM is given them: z with --no-vq
    codes: np.ndarray | None  # (n, N, H), None with --no-vq


@torch.inference_mode()
def encode(lapo, frames, t, device):
    """The latents of the windows around t (n,)."""
    z = []
    quantised = []
    codes = []
    for batch in np.split(t, range(512, len(t), 512)):
        z.append(lapo.idm(get_windows(frames, batch, device)))
        if lapo.vq is not None:
            straight_through, _, index, _ = lapo.vq(z[-1])
            quantised.append(straight_through)
            codes.append(index)
    z = torch.cat(z).cpu().numpy()
    if lapo.vq is None:
        return Encoded(z, z, None)
    return Encoded(z, torch.cat(quantised).cpu().numpy(), torch.cat(codes).cpu().numpy())


def open_folder(args):
    """The run folder RUNS_DIR/ENV_ID__EXP_NAME__SEED of a tool, unless it is finished and to be kept."""
    folder = stage_folder(args, args.exp_name)
    if (folder / "results.json").exists() and not args.overwrite:
        refuse(f"{folder} is finished: add --overwrite, or choose another --exp-name")
    return folder


def describe(args, tool):
    """What results.json says of a tool's run."""
    code = Path(__file__).parent
    flags = [flag for flag in sys.argv[1:] if flag != "--overwrite"]
    return {
        "stage": tool,
        "env_id": args.env_id,
        "args": vars(args),
        "command": shlex.join(["python", "-m", f"tools.{tool}", *flags]),
        "commit": subprocess.getoutput(f"git -C '{code}' describe --always --dirty 2>/dev/null"),
    }


def write_results(folder, began, results):
    """results.json, written last: it makes the run a finished one."""
    results = {**results, "wall_seconds": round(time.time() - began, 1)}
    write_whole(folder / "results.json", json.dumps(results, indent=2))


def write_whole(path, text):
    """A whole file or none, also after kill -9: written aside, flushed to the disk, then renamed."""
    aside = Path(f"{path}.tmp")
    with open(aside, "w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(aside, path)
