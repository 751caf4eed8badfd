"""Games for the stages beside procgen's: small worlds of gymnasium, and Procgen's from Python 3.13 on.

The stages' make_env() asks for them. All have the interface of Procgen's ProcgenGym3Env: num, num_actions,
act(actions), observe() -> reward (E,), {"rgb": (E, 64, 64, 3) uint8}, first (E,), callmethod("get_state") and
("set_state", states), close().
"""

import os
import sys
from functools import partial
from types import SimpleNamespace

import gymnasium
import numpy as np
from gymnasium.envs.toy_text.frozen_lake import generate_random_map
from PIL import Image


class Worlds:
    """Gymnasium worlds with discrete actions, in step, with the interface of Procgen's games: seen as drawn.

    An episode has a key, which gives its level, that is the seed of its reset, and the key of the next one. A
    world's state is the key and the actions since. On FrozenLake a level is a map; one starts anywhere there.
    An episode's last picture is shown as well: the action taken on it only begins the next one.
    """

    def __init__(self, env_id, num, num_levels, start_level, seed):
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # opens no window
        self.make = partial(gymnasium.make, env_id, render_mode="rgb_array", disable_env_checker=True)
        self.num, self.start_level, self.num_levels = num, start_level, num_levels or 2**31 - 1 - start_level
        self.envs, self.past, self.lakes = [self.make() for _ in range(num)], [[]] * num, "Lake" in env_id
        self.reward, self.over, self.first = np.zeros(num), np.zeros(num, bool), np.ones(num, bool)
        self.num_actions = int(self.envs[0].action_space.n)
        self.callmethod("set_state", np.random.default_rng(seed).integers(2**62, size=(num, 1)).tolist())

    def begin(self, e, key, *actions):
        self.past[e], level = [key, *actions], self.start_level + key % self.num_levels
        if self.lakes:
            rows = np.rot90([list(row) for row in generate_random_map(4, seed=level)], level)
            self.envs[e] = self.make(desc=["".join(row) for row in rows], is_slippery=False)
        self.envs[e].reset(seed=level)
        if self.lakes:  # some safe steps away from the start
            lake, rng = self.envs[e].unwrapped, np.random.default_rng(key)
            lake.window_size, lake.cell_size = (128, 128), (32, 32)  # half of its own: drawn faster
            for _ in range(rng.integers(16)):
                ahead = [new for ((_, new, *_),) in lake.P[lake.s].values()]
                lake.s = rng.choice([s for s in ahead if lake.desc.flat[s] in b"SF"])
        self.over[e] = any([any(self.envs[e].step(action)[2:4]) for action in actions])

    def act(self, actions):
        for e, action in enumerate(actions.tolist()):
            self.first[e], self.reward[e] = self.over[e], 0
            if self.over[e]:
                self.begin(e, int(np.random.default_rng(self.past[e][0]).integers(2**62)))
            else:
                self.past[e].append(action)
                _, self.reward[e], *ends, _ = self.envs[e].step(action)
                self.over[e] = any(ends)

    def observe(self):
        pictures = [Image.fromarray(env.render()).resize((64, 64), Image.BOX) for env in self.envs]
        return self.reward.copy(), {"rgb": np.stack(pictures)}, self.first.copy()

    def callmethod(self, name, states=()):
        for e, state in enumerate(states):  # set_state
            self.begin(e, *state)
        return [list(past) for past in self.past]  # get_state

    def close(self):
        pass  # theirs end pygame, for others too


def make_worlds(env_id, num_envs, num_levels, start_level, seed):
    """A gymnasium world, or one of procgen-gym's games: Procgen's, easy mode, without gym and gym3."""
    levels = {"num_levels": num_levels, "start_level": start_level}
    if env_id in gymnasium.registry:
        return Worlds(env_id, num_envs, seed=seed, **levels)
    from procgen_gym.env import ENV_NAMES, ProcgenVecEnv

    if env_id not in ENV_NAMES:
        sys.exit(f"error: --env-id {env_id} is none of {', '.join(ENV_NAMES)}, nor a world of gymnasium")
    levels |= {"distribution_mode": "easy", "rand_seed": seed, "num_threads": min(4, os.cpu_count())}
    games = ProcgenVecEnv(num_envs, env_id, **levels)

    def observe():
        first, obs, reward, _ = games._clib.observe()
        return reward, obs, first.astype(bool)

    env = SimpleNamespace(num=num_envs, num_actions=15, act=games._clib.act, observe=observe)
    env.close, env.callmethod = games.close, lambda name, *states: getattr(games, name)(*states)
    return env
