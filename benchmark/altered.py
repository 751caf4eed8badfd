"""Runs a stage in altered games, for questions.py: flags that experiments need, and no user.

    python benchmark/altered.py --sticky 0.25 collect_expert_data.py --env-id coinrun ...

The stage sees the actions that it meant. Where collect_expert_data.py writes those as actions.npy, this adds
happened.npy (N,) int8, the actions that were carried out.
"""

import argparse
import importlib
import json
import sys
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from unittest import mock

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tools import worlds  # noqa: E402

STAY = 4  # Procgen's action that does nothing


class Altered:
    """Games, as make_env() makes them, that carry out other actions than they are given.

    random, sticky: with this probability a random action is carried out instead, or the last one again.
    delay: an action is carried out so many steps late; an episode begins with STAY.
    """

    def __init__(self, env, seed=0, random=0.0, sticky=0.0, delay=0):
        self.env = env
        self.rng = np.random.default_rng(seed)
        self.random = random
        self.sticky = sticky
        self.num_actions = getattr(env, "num_actions", 15)
        self.queue = np.full((env.num, delay + 1), STAY)  # what will be carried out, the next one first
        self.first = np.ones(env.num, dtype=bool)
        self.happened = []  # of each step the actions (E,)

    def __getattr__(self, name):
        return getattr(self.env, name)

    def observe(self):
        reward, obs, self.first = self.env.observe()
        return reward, obs, self.first

    def act(self, actions):
        self.queue[self.first] = STAY
        self.queue = np.column_stack([self.queue[:, 1:], actions])
        now = self.queue[:, 0]
        draw = self.rng.random((2, self.num))
        anything = self.rng.integers(self.num_actions, size=self.num)
        now = np.where(draw[0] < self.random, anything, now)
        if self.happened:
            again = (draw[1] < self.sticky) & ~self.first
            now = np.where(again, self.happened[-1], now)
        self.happened.append(now.astype(np.int32))
        self.env.act(self.happened[-1])


@contextmanager
def altered_games(changes, **how):
    """Games that are made within are Altered, with these changes of their options; gives a list of them."""
    made = []
    make_worlds = worlds.make_worlds

    def altered_worlds(env_id, num_envs, num_levels, start_level, seed):
        levels = {"num_levels": num_levels, "start_level": start_level}
        env = make_worlds(env_id, num_envs, seed=seed, **{**levels, **changes})
        made.append(Altered(env, seed, **how))
        return made[-1]

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(worlds, "make_worlds", altered_worlds))
        with suppress(ImportError):  # from Python 3.13 on there is none, and no options
            import gym_notices.notices

            gym_notices.notices.notices.clear()  # else the next import prints four lines about gym's future
            import procgen.env

            make_procgen = procgen.env.ProcgenGym3Env

            def altered_procgen(num_envs, env_id, **options):
                env = make_procgen(num_envs, env_id, **{**options, **changes})
                made.append(Altered(env, options["rand_seed"], **how))
                return made[-1]

            stack.enter_context(mock.patch.object(procgen.env, "ProcgenGym3Env", altered_procgen))
        yield made


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--random", type=float, default=0.0, help="how often a random action comes instead")
    parser.add_argument("--sticky", type=float, default=0.0, help="how often the last action comes again")
    parser.add_argument("--delay", type=int, default=0, help="steps until an action is carried out")
    parser.add_argument("--options", type=json.loads, default={}, help="of Procgen's engine, as JSON")
    parser.add_argument("stage", nargs=argparse.REMAINDER, help="a stage and its flags")
    how = vars(parser.parse_args())
    sys.argv = how.pop("stage")  # of which results.json tells
    stage = importlib.import_module(Path(sys.argv[0]).stem)
    args = tyro.cli(stage.Args)
    with altered_games(how.pop("options"), **how) as made:
        stage.main(args)
    if sys.argv[0] == "collect_expert_data.py":
        data_dir = Path(args.data_dir or f"data/{args.env_id}")
        for split, env in zip(("train", "test"), made):
            happened = np.stack(env.happened, axis=1)  # (E, T)
            np.save(data_dir / split / "happened.npy", happened.ravel().astype(np.int8))


if __name__ == "__main__":
    main()
