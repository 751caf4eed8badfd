"""How undecided a demonstrator is, over what its actions do rather than over the actions.

    python benchmark/effects.py coinrun fruitbot maze miner climber bigfish

Many of Procgen's 15 actions do the same. From each of 160 saved states of the demonstrator's play every
action is tried: actions whose next frames agree in every pixel are one effect. Entropies are in nats; all
numbers are means over states. Where a demonstrator is undecided, a policy that regresses latents learns the
mean of several effects.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from collect_expert_data import Agent, make_env  # noqa: E402


@dataclass
class Args:
    games: tyro.conf.Positional[tuple[str, ...]]  # with a demonstrator in experts/
    seed: int = 1  # of the games and of the demonstrator's actions
    num_envs: int = 16  # games played at once, each from another level or moment
    num_moments: int = 10  # states saved of each
    steps_between: int = 25  # steps from one saved state to the next


def demonstrator(game):
    """The agent of experts/GAME.pt, and the levels that it knows."""
    expert = torch.load(ROOT / "experts" / f"{game}.pt", weights_only=True)
    actions = len(expert["agent"]["actor.bias"])
    agent = Agent(expert["args"]["scale"], expert["args"]["patch_size"], actions)
    agent.load_state_dict(expert["agent"])
    return agent.eval(), (expert["num_levels"], expert["start_level"])


def effects(trial, state):
    """For each action the number (15,) of its effect: equal numbers, equal next frames."""
    trial.callmethod("set_state", [state] * 15)
    trial.observe()
    trial.act(np.arange(15, dtype=np.int32))
    frames = trial.observe()[1]["rgb"].reshape(15, -1)
    return np.unique(frames, axis=0, return_inverse=True)[1].ravel()


def entropy(p):
    return -(p * np.log(p + 1e-12)).sum()


@torch.inference_mode()
def measure(game, args):
    """Means over states: effects, entropy of actions, entropy of effects, likeliest effect's probability."""
    agent, levels = demonstrator(game)
    env = make_env(game, args.num_envs, *levels, args.seed)
    trial = make_env(game, 15, *levels, args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    found = []
    for step in range(1, args.num_moments * args.steps_between + 1):
        obs = torch.from_numpy(env.observe()[1]["rgb"].copy())
        probabilities = agent(obs)[0].softmax(-1)  # (E, 15)
        if step % args.steps_between == 0:
            for state, p in zip(env.callmethod("get_state"), probabilities.double().numpy()):
                effect = effects(trial, state)
                p_effect = np.bincount(effect, weights=p)
                found.append((len(p_effect), entropy(p), entropy(p_effect), p_effect.max()))
        action = torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
        env.act(action.numpy().astype(np.int32))
    return np.mean(found, axis=0)


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    print("| game | effects | entropy of actions | entropy of effects | the likeliest effect's probability |")
    print("|---|---|---|---|---|")
    for game in args.games:
        count, of_actions, of_effects, likeliest = measure(game, args)
        print(f"| {game} | {count:.1f} | {of_actions:.2f} | {of_effects:.2f} | {likeliest:.2f} |", flush=True)
