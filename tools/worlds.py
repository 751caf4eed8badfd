"""Games for the stages beside procgen's: small worlds of gymnasium, and Procgen's from Python 3.13 on.

The stages' make_env() asks for them. All have the interface of Procgen's ProcgenGym3Env: num, num_actions,
act(actions), observe() -> reward (E,), {"rgb": (E, 64, 64, 3) uint8}, first (E,), callmethod("get_state") and
("set_state", states), close().
"""

import os
import sys

import gymnasium
import numpy as np
from gymnasium.envs.toy_text.frozen_lake import generate_random_map
from PIL import Image

LAKE = "FrozenLake-v1"


class Worlds:
    """Gymnasium worlds with discrete actions, in step, with the interface of Procgen's games.

    MODULE:NAME is a world of another package, as gymnasium names it: minigrid:MiniGrid-Empty-5x5-v0.
    An episode has a key, which gives its level, that is the seed of its reset, and the key of the next one. A
    world's state is the key and the actions since. On FrozenLake a level is a map; one starts anywhere there.
    An episode's last picture is shown as well: the action taken on it only begins the next one.
    """

    def __init__(self, env_id, num, num_levels, start_level, seed):
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # opens no window
        self.env_id = env_id
        self.num = num
        self.start_level = start_level
        self.num_levels = num_levels or 2**31 - 1 - start_level
        self.envs = [self.make() for _ in range(num)]
        self.num_actions = count_actions(self.envs[0])
        self.past = [None] * num  # of each world [key, action, action, ...]
        self.reward = np.zeros(num)
        self.over = np.zeros(num, dtype=bool)  # the picture is its episode's last one
        self.first = np.ones(num, dtype=bool)
        keys = np.random.default_rng(seed).integers(2**62, size=num)
        for e, key in enumerate(keys.tolist()):
            self.begin(e, key)

    def make(self, **options):
        try:
            return gymnasium.make(self.env_id, render_mode="rgb_array", disable_env_checker=True, **options)
        except (gymnasium.error.Error, ImportError) as e:
            sys.exit(f"error: --env-id {self.env_id} cannot be made ({e}): see gymnasium.pprint_registry()")

    def begin(self, e, key, *actions):
        """The e-th world's episode of a key, after these actions."""
        self.past[e] = [key, *actions]
        level = self.start_level + key % self.num_levels
        if self.env_id == LAKE:
            rows = [list(row) for row in generate_random_map(4, seed=level)]
            turned = ["".join(row) for row in np.rot90(rows, level)]
            self.envs[e] = self.make(desc=turned, is_slippery=False)
        self.envs[e].reset(seed=level)
        if self.env_id == LAKE:
            walk(self.envs[e].unwrapped, np.random.default_rng(key))
        self.over[e] = False
        for action in actions:
            _, _, terminated, truncated, _ = self.envs[e].step(action)
            self.over[e] |= terminated or truncated

    def act(self, actions):
        for e, action in enumerate(actions.tolist()):
            self.first[e] = self.over[e]
            self.reward[e] = 0
            if self.over[e]:
                key = self.past[e][0]
                self.begin(e, int(np.random.default_rng(key).integers(2**62)))
            else:
                self.past[e].append(action)
                _, self.reward[e], terminated, truncated, _ = self.envs[e].step(action)
                self.over[e] = terminated or truncated

    def observe(self):
        pictures = np.stack([draw(env) for env in self.envs])
        return self.reward.copy(), {"rgb": pictures}, self.first.copy()

    def callmethod(self, name, states=()):
        """set_state takes every world's state; both it and get_state give them."""
        if name == "set_state":
            for e, state in enumerate(states):
                self.begin(e, *state)
        return [list(past) for past in self.past]

    def close(self):
        """Leaves gymnasium's worlds open: closing them would end pygame, for others too."""


def count_actions(env):
    """How many actions a world has; ends the process if that is no number, or if the world draws nothing."""
    space = env.action_space
    if not isinstance(space, gymnasium.spaces.Discrete):
        sys.exit(f"error: --env-id {env.spec.id} has actions {space}: expected one of n actions (Discrete)")
    if "rgb_array" not in env.metadata.get("render_modes", []):
        sys.exit(f"error: --env-id {env.spec.id} does not draw itself: expected the render mode rgb_array")
    return int(space.n)


def draw(env):
    """What a world shows, (64, 64, 3); FrozenLake as Procgen draws: the hero in the middle of 7 x 7 cells."""
    picture = env.render()
    if env.spec.id == LAKE:
        row, column = divmod(int(env.unwrapped.s), 4)
        picture = np.pad(picture, ((96, 96), (96, 96), (0, 0)))  # 3 black cells of 32 pixels around the map
        picture = picture[32 * row : 32 * row + 224, 32 * column : 32 * column + 224]
    return np.asarray(Image.fromarray(picture).resize((64, 64), Image.BOX))


def walk(lake, rng):
    """Takes FrozenLake's hero up to 15 safe steps away from the start."""
    lake.window_size = (128, 128)  # half of its own: drawn faster
    lake.cell_size = (32, 32)
    for _ in range(rng.integers(16)):
        safe = []
        for outcomes in lake.P[lake.s].values():  # of a move; nothing slips, so there is one
            cell = outcomes[0][1]
            if lake.desc.flat[cell] in b"SF":
                safe.append(cell)
        lake.s = rng.choice(safe)


def value_iteration(env, obs, rng):
    """Moves (E,) on FrozenLake: the shortest way, one in five times any safe one, back only if it must."""
    moves = []
    for world in env.envs:
        lake = world.unwrapped
        if not hasattr(lake, "values"):  # a new map
            solve(lake)
        ahead = lake.after[lake.s]  # (4,): the cells where the moves lead
        values = np.where(ahead == lake.s, 0, lake.values[lake.s])  # 0: into a wall or a hole
        onward = np.where(ahead == lake.before, 0, values)
        if onward.any():
            values = onward
        move = values.argmax()
        if values.any() and rng.random() < 0.2:
            move = rng.choice(np.flatnonzero(values))
        lake.before = lake.s
        moves.append(move)
    return np.array(moves, dtype=np.int32)


def solve(lake):
    """Gives a map the values of moves (S, 4), by value iteration, and the cells (S, 4) where they lead."""
    # (S, 4, 4): probability, next cell, reward, end of each move's one outcome, as nothing slips
    outcomes = np.array([list(moves.values()) for moves in lake.P.values()])[:, :, 0]
    lake.after = outcomes[..., 1].astype(int)
    lake.before = None
    lake.values = np.zeros(lake.after.shape)
    for _ in lake.P:
        lake.values = outcomes[..., 2] + 0.95 * lake.values.max(1)[lake.after]


def linear_rule(env, obs, rng):
    """Actions (E,) on CartPole: push to where the pole falls."""
    states = np.array([world.unwrapped.state for world in env.envs])  # (E, 4)
    return (states @ [0.05, 0.1, 1.0, 0.5] > 0).astype(np.int32)


class ProcgenWorlds:
    """Procgen's games of procgen-gym, easy mode, without gym and gym3: the interface of ProcgenGym3Env."""

    def __init__(self, env_id, num, num_levels, start_level, seed):
        try:
            from procgen_gym.env import ENV_NAMES, ProcgenVecEnv
        except ImportError:
            builds = "Procgen has builds for Linux on x86-64 and Python 3.11 to 3.13 alone"
            sys.exit(f"error: --env-id {env_id} is no world of gymnasium, nor is Procgen installed: {builds}")
        if env_id not in ENV_NAMES:
            sys.exit(f"error: --env-id {env_id} is none of {', '.join(ENV_NAMES)}, nor a world of gymnasium")
        self.games = ProcgenVecEnv(
            num,
            env_id,
            num_levels=num_levels,
            start_level=start_level,
            distribution_mode="easy",
            rand_seed=seed,
            num_threads=min(4, os.cpu_count()),
        )
        self.num = num
        self.num_actions = 15

    def act(self, actions):
        self.games._clib.act(actions)

    def observe(self):
        first, obs, reward, _ = self.games._clib.observe()
        return reward, obs, first.astype(bool)

    def callmethod(self, name, *states):
        return getattr(self.games, name)(*states)

    def close(self):
        self.games.close()


# demonstrators of collect_expert_data.py: rule(env, obs, rng) -> actions (E,)
RULES = {(LAKE, "value_iteration"): value_iteration, ("CartPole-v1", "linear_rule"): linear_rule}


def make_worlds(env_id, num_envs, num_levels, start_level, seed):
    """A gymnasium world, or one of procgen-gym's games: Procgen's, easy mode, without gym and gym3."""
    kind = Worlds if env_id in gymnasium.registry or ":" in env_id else ProcgenWorlds
    return kind(env_id, num_envs, num_levels, start_level, seed)
