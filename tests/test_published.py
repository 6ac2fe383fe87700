"""What was copied from the papers and their code: tables, defaults, lists, initialisations. Each
was compared with its source; here no entry can change unnoticed."""

import hashlib
import math
import sys
from dataclasses import fields
from typing import get_args

import numpy as np
import pytest
import torch
from support import ROOT

import ppo_plr_procgen as procgen
import ppo_robust_plr_minigrid as minigrid
from plr_sampler import LevelSampler

sys.path.insert(0, str(ROOT / "benchmarks"))
import reproduce

CPU = torch.device("cpu")


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


@pytest.mark.parametrize(
    "file, expected",
    [
        ("benchmarks/paper/mazes_25_blocks.csv", "6a3b21a72ef257fc"),  # dcd's results
        ("benchmarks/paper/mazes_worst_case.csv", "fda74a6d5019396c"),
        ("benchmarks/paper/procgen_easy.csv", "68eb21f954f1188b"),  # PLR, Table 2
        ("tests/data/level_sampler_golden.json", "bbc7fcdb96a0ab0d"),
    ],
)
def test_published_numbers_are_as_they_were_compared(file, expected):
    assert digest((ROOT / file).read_bytes()) == expected


def test_evaluation_mazes_stay_the_same():
    """The nine published ones are in test_minigrid.py."""
    perfect = [minigrid.perfect_maze(21, k) for k in range(100)]
    assert (
        digest(b"".join(part.tobytes() for maze in perfect for part in maze)) == "82a6080fb4f1dcc4"
    )
    args = minigrid.Args(eval_episodes=2)
    found = {name: reset for name, _, reset in minigrid.evaluation_environments(args, CPU)}
    for a, b in zip(found["PerfectMaze21"]["options"]["mazes"], zip(*perfect[:2])):
        np.testing.assert_array_equal(a, np.concatenate(b))
    worst = minigrid.random_mazes(np.arange(100), 15, 60, True)
    assert digest(b"".join(part.tobytes() for part in worst)) == "915428ed928c35ff"


OF_BOTH = {
    "num_steps": 256,
    "gae_lambda": 0.95,
    "clip_coef": 0.2,
    "vf_coef": 0.5,
    "ent_coef": 0.01,
    "max_grad_norm": 0.5,
    "anneal_lr": False,
    "target_kl": None,
    "score_transform": "rank",
    "temperature": 0.1,
    "replay_schedule": "proportionate",
    "alpha": 1.0,
    "eval_episodes": 100,
}
# PLR, Table 3, and level-replay's command for Procgen
OF_PROCGEN = OF_BOTH | {
    "total_timesteps": 25_000_000,
    "learning_rate": 5e-4,
    "num_envs": 64,
    "gamma": 0.999,
    "num_minibatches": 8,
    "update_epochs": 3,
    "num_levels": 200,
    "start_level": 0,
    "distribution_mode": "easy",
    "curriculum": "plr",
    "score": "value_l1",
    "staleness_coef": 0.1,
    "rho": 1.0,
    "stitch_episodes": False,
    "reward_norm_gamma": 0.99,
    "augment": "none",
    "encoder": "impala",
}
# dcd's mg_25b_robust_plr.json
OF_MAZES = OF_BOTH | {
    "total_timesteps": 250_000_000,
    "learning_rate": 1e-4,
    "num_envs": 32,
    "gamma": 0.995,
    "num_minibatches": 1,
    "update_epochs": 5,
    "num_walls": 25,
    "maze_size": 15,
    "curriculum": "robust_plr",
    "score": "max_mc",
    "replay_prob": 0.5,
    "buffer_size": 4000,
    "staleness_coef": 0.3,
    "rho": 0.5,
    "num_edits": 5,
    "bootstrap_timeouts": False,
}
OF_SAMPLER = {
    "level_space": 2**31 - 1,
    "curriculum": "plr",
    "score_transform": "rank",
    "temperature": 0.1,
    "eps": 0.05,
    "staleness_coef": 0.1,
    "staleness_transform": "power",
    "staleness_temperature": 1.0,
    "replay_schedule": "proportionate",
    "rho": 1.0,
    "nu": 0.5,
    "alpha": 1.0,
    "stitch_episodes": False,
}


@pytest.mark.parametrize(
    "flags, expected",
    [(procgen.Args, OF_PROCGEN), (minigrid.Args, OF_MAZES), (LevelSampler, OF_SAMPLER)],
)
def test_defaults_are_the_published_settings(flags, expected):
    defaults = {field.name: field.default for field in fields(flags)}
    assert {name: defaults[name] for name in expected} == expected


def test_games_and_their_modes():
    extreme = {"chaser", "dodgeball", "leaper", "starpilot"}
    memory = {"caveflyer", "dodgeball", "heist", "jumper", "maze", "miner"}
    games = {"bigfish", "bossfight", "climber", "coinrun", "fruitbot", "ninja", "plunder"}
    games |= extreme | memory
    assert len(games) == 16 == len(procgen.GAMES)
    modes = {"easy": games, "hard": games, "extreme": extreme, "memory": memory}
    assert {mode: set(names) for mode, names in procgen.GAMES_WITH_MODE.items()} == modes
    assert set(get_args(reproduce.Game)) == games


def assert_orthogonal(weight: torch.Tensor, gain: float) -> None:
    """Of the shorter side: rows, or columns, at right angles and of length gain."""
    if weight.shape[0] > weight.shape[1]:
        weight = weight.t()
    expected = gain**2 * torch.eye(len(weight))
    torch.testing.assert_close(weight @ weight.t(), expected, atol=1e-5, rtol=1e-4)


def test_networks_begin_as_published():
    """The heads and the LSTM of dcd, the heads of CleanRL; and their sizes."""
    agent = minigrid.Agent(minigrid.MazeEnvs(1, CPU))
    for head, gain in ((agent.actor, 0.01), (agent.critic, 1.0)):
        assert_orthogonal(head[0].weight.detach(), math.sqrt(2))
        assert_orthogonal(head[2].weight.detach(), gain)
        assert not head[0].bias.any() and not head[2].bias.any()
    assert_orthogonal(agent.lstm.weight_hh_l0.detach(), 1.0)
    assert_orthogonal(agent.lstm.weight_ih_l0.detach()[:, :-1], 1.0)  # but the mark of a gap
    assert not agent.lstm.bias_ih_l0.any() and not agent.lstm.bias_hh_l0.any()
    direction = agent.direction.weight.detach().abs()
    assert 0.4 < direction.max() <= 0.5
    assert sum(parameter.numel() for parameter in agent.parameters()) == 445_212

    args = procgen.Args()
    agent = procgen.Agent(procgen.make_envs(args, 1, CPU))
    assert_orthogonal(agent.actor.weight.detach(), 0.01)
    assert_orthogonal(agent.critic.weight.detach(), 1.0)
    assert sum(parameter.numel() for parameter in agent.parameters()) == 626_256
