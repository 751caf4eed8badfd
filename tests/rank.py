"""One process of a run of several: `python rank.py SCRIPT flags...`, with torchrun's variables set.

Runs a stage and saves what this rank ended with. SIGINT_AT=n: it gets a signal at its nth update; NAN_AT=r:
rank r's losses are not finite. `update` instead of a stage calls the function below.
"""

import os
import runpy
import signal
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RANK, seen = int(os.environ["RANK"]), {}
from conftest import GAMES, games, look  # noqa: E402


class Recorder(getattr(games, GAMES)):
    """Notes what the first games of a process look like at their start."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        seen.setdefault("obs", torch.from_numpy(look(self)[0]))


def interrupt(step=torch.optim.Adam.step, count=[0]):  # noqa: B006
    def stepping(self, *args):
        count[0] += 1
        if count[0] == int(os.environ["SIGINT_AT"]):
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args)

    torch.optim.Adam.step = stepping


def update():
    """Gradients and codebooks after this rank's half of a batch."""
    import lapo_pretrain as pretrain

    pretrain.dist.init_process_group()
    torch.manual_seed(0)
    idm, vq, fdm = pretrain.IDM(0.25, 16), pretrain.VQ(2, 4, 2, 64, 0.05, 0.999), pretrain.FDM(16, 4)
    windows = (torch.rand(16, 9, 64, 64) - 0.5)[8 * RANK : 8 * RANK + 8]
    params = [*idm.parameters(), *fdm.parameters()]
    prediction, vq_loss, *_ = pretrain.predict(idm, vq, fdm, windows)
    loss = F.mse_loss(prediction, windows[:, 6:]) + vq_loss
    loss.backward()
    seen.update(loss=pretrain.average(loss, params), grads=[p.grad for p in params], vq=vq.state_dict())


if __name__ == "__main__":
    script, *sys.argv[1:] = sys.argv[1:]
    if "SIGINT_AT" in os.environ:
        interrupt()
    if os.environ.get("NAN_AT") == os.environ["RANK"]:
        mse_loss = F.mse_loss
        F.mse_loss = lambda *args: mse_loss(*args) * torch.nan
    if script == "update":
        update()
    else:
        setattr(games, GAMES, Recorder)
        sys.argv[0] = f"{script}.py"
        ended = runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
        parts = {name: ended[name] for name in ("idm", "vq", "fdm", "policy", "agent") if name in ended}
        seen |= {name: part.state_dict() for name, part in parts.items()}
    torch.save(seen, f"rank{RANK}.pt")
