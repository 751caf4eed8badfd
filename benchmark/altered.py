"""Runs a stage in altered games, for questions.py: flags that experiments need, and no user.

    python benchmark/altered.py --sticky 0.25 collect_expert_data.py --env-id coinrun ...

The stage sees the actions that it meant. Where collect_expert_data.py writes those as actions.npy, this adds
happened.npy (N,) int8, the actions that were carried out.
"""

import argparse
import json
import runpy
import sys
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import worlds  # noqa: E402

STAY = 4  # Procgen's action that does nothing


class Altered:
    """Games, as make_env() makes them, that carry out other actions than they are given.

    random, sticky: with this probability a random action is carried out instead, or the last one again.
    delay: an action is carried out so many steps late; an episode begins with STAY.
    """

    def __init__(self, env, seed=0, random=0.0, sticky=0.0, delay=0):
        self.env, self.rng, self.random, self.sticky = env, np.random.default_rng(seed), random, sticky
        self.num_actions = getattr(env, "num_actions", 15)
        self.queue = np.full((env.num, delay + 1), STAY)  # what will be carried out, the next one first
        self.first, self.happened = np.ones(env.num, dtype=bool), []

    def __getattr__(self, name):
        return getattr(self.env, name)

    def observe(self):
        reward, obs, self.first = self.env.observe()
        return reward, obs, self.first

    def act(self, actions):
        self.queue[self.first] = STAY
        self.queue = np.column_stack([self.queue[:, 1:], actions])
        now, draw = self.queue[:, 0], self.rng.random((2, self.num))
        now = np.where(draw[0] < self.random, self.rng.integers(self.num_actions, size=self.num), now)
        if self.happened:
            now = np.where((draw[1] < self.sticky) & ~self.first, self.happened[-1], now)
        self.happened.append(now.astype(np.int32))
        self.env.act(self.happened[-1])


@contextmanager
def altered_games(changes, **how):
    """Games that are made within are Altered, with these changes of their options; gives a list of them."""
    made, modules = [], {"make_worlds": worlds}
    with suppress(ImportError):  # from Python 3.13 on there is none, and no options
        import procgen.env

        modules["ProcgenGym3Env"] = procgen.env

    def make(maker, *which, **options):
        seed = options.get("seed", options.get("rand_seed"))
        made.append(Altered(maker(*which, **options | changes), seed, **how))
        return made[-1]

    with ExitStack() as stack:
        for name, module in modules.items():
            stack.enter_context(mock.patch.object(module, name, partial(make, getattr(module, name))))
        yield made


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--random", type=float, default=0.0, help="how often a random action comes instead")
    parser.add_argument("--sticky", type=float, default=0.0, help="how often the last action comes again")
    parser.add_argument("--delay", type=int, default=0, help="steps until an action is carried out")
    parser.add_argument("--options", type=json.loads, default={}, help="of Procgen's engine, as JSON")
    parser.add_argument("stage", nargs=argparse.REMAINDER, help="a stage and its flags")
    how = vars(parser.parse_args())
    sys.argv = how.pop("stage")
    with altered_games(how.pop("options"), **how) as made:
        stage = runpy.run_path(sys.argv[0], run_name="__main__")
    if sys.argv[0] == "collect_expert_data.py":
        for split, env in zip(("train", "test"), made):
            happened = np.stack(env.happened, 1).ravel().astype(np.int8)
            np.save(stage["data_dir"] / split / "happened.npy", happened)
