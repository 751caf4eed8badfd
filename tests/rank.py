"""A process of its own: `python rank.py SCRIPT flags...` runs a stage that saves every SAVE_SECONDS.

`python rank.py ranks` is one of two processes, with torchrun's variables set: it computes what is below, runs
the stages that know torchrun, one after another, and saves what this rank ended with.
"""

import importlib
import itertools
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
RANK = int(os.environ.get("RANK", 0))
MORE = {
    "ppo_procgen": "--num-envs 64 --num-steps 8 --num-levels 0".split(),
    "collect_expert_data": ["--data-dir", "shards"],
}


def update(pretrain):
    """Gradients and codebooks after this rank's half of a batch."""
    torch.manual_seed(0)
    idm, vq, fdm = pretrain.IDM(0.25, 16), pretrain.VQ(2, 4, 2, 64, 0.05, 0.999), pretrain.FDM(16, 4)
    model = pretrain.DistributedDataParallel(pretrain.LAPO(idm, vq, fdm), forward_sync_buffers=False)
    windows = (torch.rand(16, 9, 64, 64) - 0.5)[8 * RANK : 8 * RANK + 8]
    prediction, vq_loss, _ = model(windows)
    (F.mse_loss(prediction, windows[:, 6:]) + vq_loss).backward()
    return {"grads": {name: p.grad for name, p in model.module.named_parameters()}, "vq": vq.state_dict()}


def averaged(module):
    """What average_gradients makes of two gradients, 0 and 1, 4 and 9; between them is one of none."""
    a, b, c = (torch.nn.Parameter(torch.zeros(shape)) for shape in ((2, 3), (4,), ()))
    a.grad, c.grad = torch.full((2, 3), float(RANK)), torch.tensor(float(2 + RANK) ** 2)
    module.average_gradients([a, b, c])
    return [a.grad, b.grad, c.grad]


def run(script, *flags):
    """A stage; what its exit status is where it refuses."""
    module = importlib.import_module(script)
    module.SAVE_SECONDS = float(os.environ.get("SAVE_SECONDS", 60))
    sys.argv = [f"{script}.py", *flags]
    try:
        module.main(tyro.cli(module.Args))
    except SystemExit as e:
        return e.code


def ranks():
    from conftest import TOY, bc, finetune, ppo, pretrain

    init, destroy, numbers = dist.init_process_group, dist.destroy_process_group, itertools.count()
    ended = {}

    def meet():
        init("gloo", init_method=f"file://{Path.cwd()}/meet{next(numbers)}", rank=RANK, world_size=2)

    def part():
        ended.update(sys._getframe(1).f_locals)  # of main()
        destroy()

    dist.init_process_group, dist.destroy_process_group = meet, part
    meet()
    torch.manual_seed(0)
    z = torch.randn(1000, 3) * torch.tensor([0.003, 1.0, 40.0]) + torch.tensor([5.0, 0.0, -1.0])
    found = {"update": update(pretrain), "averaged": [averaged(ppo), averaged(finetune)], "z": z}
    found["moments"] = bc.latent_moments(z.split([700, 300])[RANK])
    destroy()
    for stage in ("lapo_pretrain", "ppo_procgen", "collect_expert_data", "lapo_bc", "lapo_finetune_ppo"):
        run(stage, *TOY[stage], "--runs-dir", "two", *MORE.get(stage, ()))
        networks = {name: x for name, x in ended.items() if name in ("idm", "vq", "fdm", "policy", "agent")}
        found[stage] = {name: network.state_dict() for name, network in networks.items()}
        ended.clear()
    if RANK == 1:
        mse_loss = F.mse_loss
        F.mse_loss = lambda *args: mse_loss(*args) * torch.nan
    found["nan"] = run("lapo_pretrain", *TOY["lapo_pretrain"], "--runs-dir", "nan")
    torch.save(found, f"rank{RANK}.pt")


if __name__ == "__main__":
    if sys.argv[1:] == ["ranks"]:
        ranks()
    else:
        sys.exit(run(*sys.argv[1:]))
