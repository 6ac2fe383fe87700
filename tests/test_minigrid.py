"""ppo_robust_plr_minigrid.py: mazes against the minigrid package, the network, the algorithm, and whole runs."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from minigrid.core.grid import Grid
from minigrid.core.mission import MissionSpace
from minigrid.core.world_object import Goal, Wall
from minigrid.minigrid_env import MiniGridEnv

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import ppo_robust_plr_minigrid as script  # noqa: E402

CPU = torch.device("cpu")


# ---- mazes against the package --------------------------------------------------------------------------------------


class Oracle(MiniGridEnv):
    """The package's own environment, on one given maze."""

    def __init__(self, maze: script.Mazes, max_steps: int):
        self.maze = maze
        _, height, width = maze.walls.shape
        super().__init__(
            MissionSpace(lambda: ""), width=width + 2, height=height + 2, max_steps=max_steps,
            see_through_walls=True, agent_view_size=5,
        )  # fmt: skip

    def _gen_grid(self, width, height):
        self.grid = Grid(width, height)
        self.grid.wall_rect(0, 0, width, height)
        for row, column in np.argwhere(self.maze.walls[0]):
            self.grid.set(column + 1, row + 1, Wall())
        self.grid.set(self.maze.goal[0, 1] + 1, self.maze.goal[0, 0] + 1, Goal())
        self.agent_pos = (int(self.maze.agent[0, 1]) + 1, int(self.maze.agent[0, 0]) + 1)
        self.agent_dir = int(self.maze.direction[0])
        self.mission = ""


def assert_same_as_package(mazes: script.Mazes, envs: script.MazeEnvs, num_actions: int, seed: int) -> int:
    """Plays random actions in `envs`, already reset to `mazes`, and in the package; returns the number of goals."""
    n, rng = len(mazes.goal), np.random.default_rng(seed)
    oracles = [Oracle(script.Mazes(*(part[i : i + 1] for part in mazes)), envs.max_steps) for i in range(n)]
    expected = [oracle.reset()[0] for oracle in oracles]
    obs, goals = envs.reset(options={"mazes": mazes})[0], 0
    for _ in range(num_actions):
        assert (obs["image"].numpy() == [e["image"] for e in expected]).all()
        assert obs["direction"].tolist() == [e["direction"] for e in expected]
        actions = rng.choice(7, n, p=[0.2, 0.15, 0.45, 0.05, 0.05, 0.05, 0.05])
        obs, *result, _ = envs.step(torch.from_numpy(actions))
        expected, *expected_result, _ = zip(*(oracle.step(int(a)) for oracle, a in zip(oracles, actions)))
        for got, want in zip(result, expected_result):
            assert got.tolist() == np.array(want, got.numpy().dtype).tolist()
        assert (obs["image"].numpy() == [e["image"] for e in expected]).all()  # the terminal observation too
        done = (result[1] | result[2]).numpy()
        goals += int(result[1].sum())
        if done.any():
            obs, _ = envs.reset(options={"mazes": mazes, "reset_mask": done})
            expected = [oracle.reset()[0] if d else e for oracle, e, d in zip(oracles, expected, done)]
    return goals


@pytest.mark.parametrize("vary, num_walls", [(False, 25), (True, 60)])
def test_random_mazes_equal_the_package(vary, num_walls):
    mazes = script.random_mazes(np.arange(100), 15, num_walls, vary)
    envs = script.MazeEnvs(100, CPU, 15, 250)
    assert assert_same_as_package(mazes, envs, 300, seed=0) > 20


# ---- the LSTM over segments -----------------------------------------------------------------------------------------


def step_by_step(agent, images, directions, starts):
    state, weights, outputs = (torch.zeros(starts.shape[1], 256),) * 2, agent.step_weights(), []
    for t in range(len(starts)):
        keep = torch.from_numpy(~starts[t]).float()[:, None]
        hidden, state = agent.step(
            {"image": images[t], "direction": directions[t]}, tuple(x * keep for x in state), weights
        )
        outputs.append(hidden)
    return torch.cat(outputs)


def random_rollout(T, N, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 9, (T, N, 5, 5, 3), generator=generator, dtype=torch.uint8)
    return images, torch.randint(0, 4, (T, N), generator=generator)


@pytest.fixture(scope="module")
def agent():
    torch.manual_seed(0)
    return script.Agent(script.MazeEnvs(1, CPU))


def test_segments_equal_steps_with_a_done_in_every_position(agent):
    T = 9
    starts = np.array([[bool(bits >> t & 1) for bits in range(2**T)] for t in range(T)])  # every pattern of dones
    images, directions = random_rollout(T, 2**T)
    with torch.no_grad():
        got = agent.unroll(images, directions, starts)
        assert torch.allclose(got, step_by_step(agent, images, directions, starts), atol=1e-5)


@pytest.mark.parametrize("share", [0, 0.01, 0.1, 0.5, 1])
def test_segments_equal_steps_in_long_rollouts(agent, share):
    starts = np.random.default_rng(1).random((256, 8)) < share
    images, directions = random_rollout(256, 8)
    with torch.no_grad():
        got = agent.unroll(images, directions, starts)
        assert torch.allclose(got, step_by_step(agent, images, directions, starts), atol=1e-5)
