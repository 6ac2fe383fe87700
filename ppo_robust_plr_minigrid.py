"""Recurrent PPO + Robust Prioritized Level Replay (PLR-perp) on mazes, in one file.

    python ppo_robust_plr_minigrid.py                                  # Robust PLR with the published settings
    python ppo_robust_plr_minigrid.py --curriculum plr                 # PLR: also learns on new levels
    python ppo_robust_plr_minigrid.py --curriculum dr                  # the baseline, domain randomisation: new levels only
    python ppo_robust_plr_minigrid.py --env-id MiniGrid-MultiRoom-N4-S5-v0       # any registered MiniGrid environment
    python ppo_robust_plr_minigrid.py --evaluate runs/RUN --eval-episodes 1000 --capture-video
    python ppo_robust_plr_minigrid.py --help

Robust PLR: Jiang et al., "Replay-Guided Adversarial Environment Design", 2021 (arXiv 2110.02439), Algorithm 1.
PLR: Jiang et al. 2021 (arXiv 2010.03934). PPO and the names in this file: CleanRL. Defaults: the released 25-block
configuration. README.md lists the logged keys and every deviation from the released code.

Every rollout starts new episodes in all environments and is either all replay or all new levels. Time limits: as in the
reference, an episode that its time limit or the end of the rollout cuts off is worth 0 from there on, and one that the
rollout cuts off is not scored. --bootstrap-timeouts puts the value of the state it stopped in there instead, and scores
both (max_mc, which needs an episode's return, only whole ones).
"""

import contextlib
import csv
import ctypes
import difflib
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import pickle
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.optim as optim
import tyro
from minigrid.core.grid import Grid
from minigrid.core.world_object import Goal, Wall
from minigrid.minigrid_env import MiniGridEnv
from torch.utils.tensorboard import SummaryWriter

from plr_sampler import LevelSampler

# Evaluation mazes of the paper, without the border. > agent facing east, # wall, G goal, g one of the possible goals.
NAMED_MAZES = {
    "SixteenRooms": """
        ...#..#..#...
        .>.......#...
        ...#..#......
        #.###.##.###.
        ...#.........
        ......#..#...
        ##.#.##.###.#
        ...#.....#...
        ...#..#......
        .####.##.#.##
        ...#..#..#...
        ......#....G.
        ...#.....#...
    """,
    "SixteenRoomsFewerDoors": """
        ...#.....#...
        .>....#..#...
        ...#..#..#...
        ####.##.###.#
        ...#..#......
        ......#..#...
        #.#####.#####
        ...#..#..#...
        ...#.........
        ##.##.##.####
        ...#..#..#...
        ......#....G.
        ...#..#..#...
    """,
    "Labyrinth": """
        .............
        .###########.
        .#.........#.
        .#.#######.#.
        .#.#.....#.#.
        .#.#.###.#.#.
        .#.#.#G#.#.#.
        .#.#.#.#.#.#.
        .#...#...#.#.
        .#########.#.
        .....#.....#.
        ####.#.#####.
        >....#.......
    """,
    "Labyrinth2": """
        >#...........
        .#.#########.
        .#.#.......#.
        .#.#.#####.#.
        .#.#.#...#.#.
        ...#.#.#.#.#.
        ####.#G#.#.#.
        ...#.###.#.#.
        .#.#.....#.#.
        .#.#######.#.
        .#.........#.
        .###########.
        .............
    """,
    "Maze": """
        .....#>...#..
        .###.####.##.
        .#...........
        .########.###
        ........#....
        ######.#####.
        ....#..#.....
        .##...##.####
        ..#.#..#...#.
        #.#.##.###.#.
        #.#..#...#...
        #.##.###.###.
        ...#..G#.#...
    """,
    "Maze2": """
        ...#.#....#..
        .#.#.####...#
        .#........#..
        .########.###
        ...#..#.#.#.G
        ##.#.##.#.#..
        >#.#....#.##.
        .#.##.###..#.
        .#..#..###.#.
        .##.##.#.#.#.
        .#...#.#.#.#.
        .#.#.#.#.#.#.
        ...#...#.....
    """,
    "Maze3": """
        ...>#.#......
        .####.#.####.
        .#....#.#....
        ...####.#.#.#
        ##.#....#.#..
        ...#.##.#.##.
        .#.#.#..#..#G
        .#.#.#.###.##
        .#...#.#.#...
        .###.#.#.###.
        .#...#.#...#.
        .#.###.#.#.#.
        .#...#...#...
    """,
    "SmallCorridor": """
        .............
        .#.#.#.#.#.#.
        .#.#.#.#.#.#.
        .#.#.#.#.#.#.
        .#.#.#.#.#.#.
        .#g#g#g#g#g#.
        >###########.
        .#g#g#g#g#g#.
        .#.#.#.#.#.#.
        .#.#.#.#.#.#.
        .#.#.#.#.#.#.
        .#.#.#.#.#.#.
        .............
    """,
    "LargeCorridor": """
        ...................
        .#.#.#.#.#.#.#.#.#.
        .#.#.#.#.#.#.#.#.#.
        .#.#.#.#.#.#.#.#.#.
        .#.#.#.#.#.#.#.#.#.
        .#.#.#.#.#.#.#.#.#.
        .#.#.#.#.#.#.#.#.#.
        .#.#.#.#.#.#.#.#.#.
        .#g#g#g#g#g#g#g#g#.
        >#################.
        .#g#g#g#g#g#g#g#g#.
        .#.#.#.#.#.#.#.#.#.
        .#.#.#.#.#.#.#.#.#.
        .#.#.#.#.#.#.#.#.#.
        .#.#.#.#.#.#.#.#.#.
        .#.#.#.#.#.#.#.#.#.
        .#.#.#.#.#.#.#.#.#.
        .#.#.#.#.#.#.#.#.#.
        ...................
    """,
}
# The package's own environments that the agent is also evaluated on, with the training mazes' view
PACKAGE_MAZES = {"SimpleCrossingS11N5": "MiniGrid-SimpleCrossingS11N5-v0", "FourRooms": "MiniGrid-FourRooms-v0"}
SIGNED_SCORES = ("gae", "max_mc")
# Levels (the seeds of resets) below are for training, those from here on for evaluation.
FIRST_TEST_LEVEL = 2**30


@dataclass
class Args:
    # Experiment
    exp_name: str = os.path.basename(__file__)[: -len(".py")]
    """part of the default run directory's name"""
    seed: int = 1
    """decides everything random; evaluation has random streams of its own"""
    torch_deterministic: bool = True
    """choose deterministic kernels; the CPU's always are"""
    cuda: bool = True
    """train on the GPU if there is one"""
    track: bool = False
    """also log to Weights and Biases (pip install wandb; WANDB_PROJECT and WANDB_ENTITY name the project and team)"""
    run_dir: str | None = None
    """where the run's files go; runs/{env_id}__{exp_name}__{seed}__{time} if not given"""
    checkpoint_interval: int = 50
    """iterations between checkpoints (0: only at the end)"""

    # Environment
    env_id: str = "maze"
    """maze: random mazes as tensors. Or a registered MiniGrid environment, whose levels are its reset seeds"""
    num_walls: int = 25
    """wall blocks placed in a maze, with replacement (60 with --vary-num-walls is the ACCEL paper's setting)"""
    vary_num_walls: bool = False
    """draw each maze's number of blocks uniformly from 0 to --num-walls"""
    maze_size: int = 15
    """cells along a side of a maze, border included"""
    max_steps: int = 250
    """time limit of an episode in a maze; registered environments keep theirs"""

    # PPO (dcd's 25-block configurations)
    total_timesteps: int = 250_000_000
    """environment steps of the whole run, new levels included, rounded down to full iterations"""
    learning_rate: float = 1e-4
    """of Adam"""
    num_envs: int = 32
    """environments played side by side"""
    num_steps: int = 256
    """steps of each environment per rollout: at least the time limit, so that every rollout finishes episodes"""
    anneal_lr: bool = False
    """let the learning rate fall linearly to 0"""
    gamma: float = 0.995
    """discount"""
    gae_lambda: float = 0.95
    """lambda of the generalized advantage estimation"""
    num_minibatches: int = 1
    """minibatches per epoch, each of whole environments"""
    update_epochs: int = 5
    """epochs per rollout"""
    clip_coef: float = 0.2
    """clip range of the policy ratio and of the value"""
    ent_coef: float = 0.01
    """weight of the entropy bonus (the 60-block configurations: 0)"""
    vf_coef: float = 0.5
    """weight of the value loss"""
    max_grad_norm: float = 0.5
    """bound on the norm of the gradient"""
    target_kl: float | None = None
    """stop an iteration's epochs once the approximate KL divergence exceeds this"""
    bootstrap_timeouts: bool = False
    """value the state in which a time limit or the rollout's end stops an episode, where the reference counts 0"""

    # Robust PLR
    curriculum: Literal["robust_plr", "plr", "dr"] = "robust_plr"
    """robust_plr learns on replayed levels only, plr also on new ones; dr, domain randomisation, only has new ones"""
    replay_prob: float = 0.5
    """probability that a rollout replays levels from the buffer (1: always, once it is filled to --rho)"""
    buffer_size: int = 4000
    """levels kept for replay"""
    score: Literal[
        "max_mc", "positive_value_loss", "value_l1", "gae", "one_step_td_error", "policy_entropy", "least_confidence",
        "min_margin",
    ] = "max_mc"  # fmt: skip
    """learning potential of a level, averaged over an episode's steps; the formulas are at "level scores" below"""
    score_transform: Literal["constant", "max", "eps_greedy", "rank", "power", "softmax"] = "rank"
    """from scores to replay probabilities (PLR's h)"""
    temperature: float = 0.1
    """of the transform (PLR's beta): lower is greedier"""
    staleness_coef: float = 0.3
    """share of replay by staleness (PLR's rho)"""
    replay_schedule: Literal["proportionate", "fixed"] = "proportionate"
    """replay with the probability of the buffer's fill, --replay-prob at most, or always with --replay-prob"""
    rho: float = 0.5
    """fill of the buffer before any level is replayed"""
    nu: float | None = None
    """probability of a rollout on new levels: another way to say 1 - replay_prob, as in the Procgen script"""
    alpha: float = 1.0
    """weight of a level's new score in its running mean (1: the last score counts)"""

    # Evaluation
    eval_interval: int = 250
    """iterations between evaluations (0: only at the end)"""
    eval_episodes: int = 100
    """episodes in each evaluation environment"""
    capture_video: bool = False
    """write a GIF of an episode in each evaluation maze"""
    evaluate: str | None = None
    """only evaluate the run in this directory. Other flags default to that run's"""

    # Speed
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """of the network. bf16 pays on GPUs and on CPUs with AMX or AVX512-BF16; tf32 is for NVIDIA GPUs"""
    compile: bool = False
    """torch.compile the mazes' step and the network's"""

    batch_size: int = field(init=False)
    num_iterations: int = field(init=False)

    def __post_init__(self):
        self.batch_size = self.num_envs * self.num_steps
        self.num_iterations = self.total_timesteps // max(self.batch_size, 1)
        if self.nu is not None:
            self.replay_prob = 1 - self.nu


def refuse(reason: str) -> None:
    print(f"error: {reason}", file=sys.stderr)
    raise SystemExit(2)


def check_args(args: Args) -> None:
    """Refuses what cannot work, with one sentence and exit status 2."""

    def require(names: str, allowed: Callable[[Any], bool], what: str) -> None:
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not allowed(value):
                refuse(f"--{name.replace('_', '-')} {value} must be {what}.")

    require("total_timesteps num_envs num_steps num_minibatches", lambda x: x >= 1, "at least 1")
    require("update_epochs eval_episodes buffer_size max_steps", lambda x: x >= 1, "at least 1")
    require("seed num_walls checkpoint_interval eval_interval", lambda x: x >= 0, "at least 0")
    require("learning_rate temperature max_grad_norm clip_coef target_kl", lambda x: 0 < x < math.inf, "above 0")
    require("ent_coef vf_coef", lambda x: 0 <= x < math.inf, "at least 0")
    require("gamma gae_lambda nu replay_prob staleness_coef rho", lambda x: 0 <= x <= 1, "between 0 and 1")
    require("alpha", lambda x: 0 < x <= 1, "above 0 and at most 1")
    require("maze_size", lambda x: 5 <= x <= 255, "between 5 and 255")
    require("num_minibatches", lambda x: args.num_envs % x == 0, f"a divisor of --num-envs {args.num_envs}")
    rollout = f"--num-envs x --num-steps = {args.batch_size}"
    require("num_minibatches", lambda x: args.batch_size > x, f"less than {rollout}: a minibatch needs two steps")
    require("total_timesteps", lambda x: x >= args.batch_size, f"at least {rollout}, the steps of one iteration")
    if args.env_id == "maze":
        most = (args.maze_size - 2) ** 2 - 2
        require("num_walls", lambda x: x <= most, f"at most {most}, the cells of --maze-size {args.maze_size} but two")
        time_limit = args.max_steps
    else:
        time_limit = check_environment(args.env_id)
    if args.curriculum == "dr":
        return
    require("buffer_size", lambda x: x >= args.num_envs, f"at least --num-envs {args.num_envs}")
    if args.score in SIGNED_SCORES:
        require("score_transform", lambda x: x != "power", f"another: --score {args.score} can be negative")
    if args.score == "max_mc" or not args.bootstrap_timeouts:
        why = "max_mc needs whole episodes" if args.bootstrap_timeouts else "an episode that is cut off is not scored"
        require("num_steps", lambda x: x >= time_limit, f"at least {time_limit}, the time limit: {why}")


def check_environment(env_id: str) -> int:
    """Refuses what is not a MiniGrid environment whose reset seed decides the level; returns its time limit."""
    known = [name for name, spec in gym.registry.items() if "minigrid" in str(spec.entry_point)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # gym's, of -v0 environments with a -v1
            env = gym.make(env_id)
    except gym.error.Error:
        near = difflib.get_close_matches(env_id, ["maze", *known], n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"choose maze or one like {known[0]}."
        refuse(f"--env-id {env_id} is unknown: {hint}")
    except Exception as error:
        refuse(f"--env-id {env_id} cannot be made: {str(error).splitlines()[0]}")
    if not isinstance(env.unwrapped, MiniGridEnv):
        refuse(f"--env-id {env_id} is not a MiniGrid environment: choose maze or one like {known[0]}.")
    starts = []
    for level in (0, 1, 0):
        obs, _ = env.reset(seed=level)
        starts.append((env.unwrapped.grid.encode().tobytes(), obs["direction"], tuple(env.unwrapped.agent_pos)))
        env.step(0)
    if starts[0] != starts[2]:
        refuse(f"--env-id {env_id} starts differently after two resets with one seed: its seed must decide the level.")
    return env.unwrapped.max_steps


# ---- levels and environments ----------------------------------------------------------------------------------------


class Mazes(NamedTuple):
    """n levels. Cells are (row, column) without the border; directions are MiniGrid's: 0 east, 1 south, 2 west, 3 north."""

    walls: np.ndarray  # (n, height, width) bool
    goal: np.ndarray  # (n, 2) int64
    agent: np.ndarray  # (n, 2) int64
    direction: np.ndarray  # (n,) int64


def random_integers(levels: np.ndarray, count: int) -> np.ndarray:
    """(n,) int64 -> (n, count) uint64 below 2**32, decided by each level alone: SplitMix64 (Steele et al. 2014)."""

    def mix(z: np.ndarray) -> np.ndarray:
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

    golden = np.uint64(0x9E3779B97F4A7C15)
    start = mix((levels.astype(np.uint64) + np.uint64(1)) * golden)
    return mix(start[:, None] + np.arange(1, count + 1, dtype=np.uint64) * golden) >> np.uint64(32)


def random_mazes(levels: np.ndarray, size: int, num_walls: int, vary: bool = False) -> Mazes:
    """The maze of each level: blocks anywhere, the goal anywhere, the agent anywhere else, no block under those two."""
    n, side = len(levels), size - 2
    cells = side * side
    draws = random_integers(levels, num_walls + 4)

    def below(column: Any, bound: int) -> np.ndarray:
        return (draws[:, column] * np.uint64(bound) >> np.uint64(32)).astype(np.int64)

    goal, agent, direction = below(0, cells), below(1, cells - 1), below(2, 4)
    agent += agent >= goal
    blocks = below(slice(4, None), cells)  # (n, num_walls)
    if vary:  # the first 0 to num_walls of them; the others go to a cell that is cut off
        blocks[np.arange(num_walls) >= below(3, num_walls + 1)[:, None]] = cells
    rows = np.arange(n)
    walls = np.zeros((n, cells + 1), bool)
    walls[rows[:, None], blocks] = True
    walls[rows, goal] = walls[rows, agent] = False
    walls = walls[:, :cells].reshape(n, side, side)
    return Mazes(walls, np.stack((goal // side, goal % side), 1), np.stack((agent // side, agent % side), 1), direction)


def named_maze(name: str, episode: int) -> Mazes:
    """One of NAMED_MAZES. Where it has several possible goals, the episodes take turns through them."""
    text = np.array([list(line.strip()) for line in NAMED_MAZES[name].split()])
    goals = np.argwhere(np.isin(text, ("G", "g")))
    goal = goals[episode % len(goals)]
    return Mazes((text == "#")[None], goal[None], np.argwhere(text == ">"), np.zeros(1, np.int64))


def perfect_maze(size: int, seed: int) -> Mazes:
    """A maze with one path between any two cells (depth-first search); agent and goal in random different cells."""
    rng = np.random.default_rng([size, seed])
    side, half = size - 2, (size - 1) // 2
    walls = np.ones((side, side), bool)
    path = [tuple(rng.integers(half, size=2).tolist())]
    walls[2 * path[0][0], 2 * path[0][1]] = False
    while path:
        (r, c), closed = path[-1], []
        for r2, c2 in ((r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)):
            if 0 <= r2 < half and 0 <= c2 < half and walls[2 * r2, 2 * c2]:
                closed.append((r2, c2))
        if not closed:
            path.pop()
            continue
        path.append(closed[rng.integers(len(closed))])
        walls[r + path[-1][0], c + path[-1][1]] = walls[2 * path[-1][0], 2 * path[-1][1]] = False
    ends = rng.choice(half * half, 2, replace=False)
    goal, agent = 2 * np.stack((ends // half, ends % half), 1)
    return Mazes(walls[None], goal[None], agent[None], rng.integers(4, size=1))


def join_mazes(mazes: list[Mazes]) -> Mazes:
    """One batch of all. Smaller ones get walls around them, which nobody in the maze can tell from what is outside."""
    height, width = (max(maze.walls.shape[axis] for maze in mazes) for axis in (1, 2))
    walls = [np.pad(w, ((0, 0), (0, height - w.shape[1]), (0, width - w.shape[2])), constant_values=True)
             for w in (maze.walls for maze in mazes)]  # fmt: skip
    return Mazes(np.concatenate(walls), *(np.concatenate(parts) for parts in list(zip(*mazes))[1:]))


def shortest_paths(mazes: Mazes) -> np.ndarray:
    """(n,) int64 cells to go from the agent to the goal, by flood fill of all mazes at once; -1 if there is no path."""
    rows = np.arange(len(mazes.walls))
    free = np.pad(~mazes.walls, ((0, 0), (1, 1), (1, 1)))
    reached = np.zeros_like(free)
    reached[rows, mazes.agent[:, 0] + 1, mazes.agent[:, 1] + 1] = True
    steps = np.full(len(rows), -1)
    for distance in itertools.count():
        steps[(steps < 0) & reached[rows, mazes.goal[:, 0] + 1, mazes.goal[:, 1] + 1]] = distance
        grown = reached.copy()
        grown[:, 1:] |= reached[:, :-1]
        grown[:, :-1] |= reached[:, 1:]
        grown[:, :, 1:] |= reached[:, :, :-1]
        grown[:, :, :-1] |= reached[:, :, 1:]
        grown &= free
        if (grown == reached).all():
            return steps
        reached = grown


VIEW = 5  # the agent sees VIEW x VIEW cells, itself in the middle of the last row
# a cell as MiniGrid shows it: object, colour, state, packed with a zero byte into one int32, which gathers faster
EMPTY, WALL, GOAL = (
    int(np.array([*cell, 0], np.uint8).view(np.int32)[0]) for cell in ((1, 0, 0), (2, 5, 0), (8, 1, 0))
)
TURNS = (-1, 1, 0, 0, 0, 0, 0)  # of the actions left, right, forward, pick up, drop, toggle, done
AHEAD = ((0, 1), (1, 0), (0, -1), (-1, 0))  # (row, column) of a step east, south, west, north


def maze_view(cells: torch.Tensor, position: torch.Tensor, direction: torch.Tensor, view: torch.Tensor) -> torch.Tensor:
    """(N, VIEW, VIEW, 3) uint8: what each agent sees, by column and row like MiniGrid's images."""
    seen = cells.take(position[:, None] + view.index_select(0, direction))  # (N, VIEW * VIEW)
    seen[:, VIEW // 2 * VIEW + VIEW - 1] = EMPTY  # MiniGrid does not show what the agent stands on
    return seen.view(torch.uint8).view(-1, VIEW, VIEW, 4)[..., :3]


def maze_step(
    actions: torch.Tensor, cells: torch.Tensor, position: torch.Tensor, direction: torch.Tensor, steps: torch.Tensor,
    max_steps: int, turned: torch.Tensor, moved: torch.Tensor, view: torch.Tensor,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """A step of N mazes, see MazeEnvs: as a function of tensors, which torch.compile can take whole."""
    what = torch.add(actions, direction, alpha=7)
    direction = turned.take(what)
    wanted = position + moved.take(what)
    found = cells.take(wanted)  # an agent that does not move finds what it stands on, which is empty
    position = torch.where(found == WALL, position, wanted)
    terminated = found == GOAL
    steps = steps + 1
    reward = (torch.rsub(steps, 1, alpha=0.9 / max_steps) * terminated).float()  # 1 - 0.9 steps / max_steps
    return (
        maze_view(cells, position, direction, view),
        position,
        direction,
        steps,
        reward,
        terminated,
        steps >= max_steps,
    )


class MazeEnvs(gym.vector.VectorEnv):
    """N mazes stepped at once on any device: a Gymnasium VectorEnv without autoreset that takes and gives tensors.

        obs, infos = envs.reset(seed=levels, options={"reset_mask": done})   # env i starts levels[i] where done[i]
        obs, infos = envs.reset(options={"mazes": mazes})                    # or these mazes
        obs, rewards, terminations, truncations, infos = envs.step(actions)

    obs: "image" (N, 5, 5, 3) uint8 and "direction" (N,) int64, equal to those of a MiniGridEnv with agent_view_size=5
    and see_through_walls=True. actions (N,) int64, rewards (N,) float32, the flags (N,) bool.
    """

    def __init__(
        self, num_envs: int, device: torch.device, size: int = 15, max_steps: int = 250, num_walls: int = 25,
        vary_num_walls: bool = False, compile: bool = False,
    ):  # fmt: skip
        self.num_envs, self.device, self.max_steps = num_envs, device, max_steps
        image = gym.spaces.Box(0, 255, (VIEW, VIEW, 3), np.uint8)
        self.single_observation_space = gym.spaces.Dict({"direction": gym.spaces.Discrete(4), "image": image})
        self.single_action_space = gym.spaces.Discrete(7)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)
        self.metadata = {"autoreset_mode": gym.vector.AutoresetMode.DISABLED}
        # All maps lie one after another in `cells`, each with VIEW - 1 cells of wall around it: a place is one number,
        # and no view leaves the map.
        self.width = width = size - 2 + 2 * (VIEW - 1)
        self.cells = torch.full((num_envs, width * width), WALL, dtype=torch.int32, device=device)
        self.position = torch.zeros(num_envs, dtype=torch.int64, device=device)  # index into cells.view(-1)
        self.direction = torch.zeros_like(self.position)
        self.steps = torch.zeros(num_envs, dtype=torch.float64, device=device)
        # by direction and action: the new direction (28,) and the move (28,). By direction: the view (4, 25)
        ahead = [row * width + column for row, column in AHEAD]
        turned = [(d + turn) % 4 for d in range(4) for turn in TURNS]
        moved = [ahead[d] * (action == 2) for d in range(4) for action in range(7)]
        view = [[ahead[d] * (VIEW - 1 - row) + ahead[(d + 1) % 4] * (column - VIEW // 2)
                 for column in range(VIEW) for row in range(VIEW)] for d in range(4)]  # fmt: skip
        self.tables = [torch.tensor(table, device=device) for table in (turned, moved, view)]
        self.maze_step = torch.compile(maze_step) if compile else maze_step
        # Level starts already made: level -> row of `starts`, (cells, position in the map, direction)
        self.generate = lambda levels: random_mazes(levels, size, num_walls, vary_num_walls)
        self.known: dict[int, int] = {}
        self.starts = [torch.zeros((max(8192, num_envs), *x.shape[1:]), dtype=x.dtype, device=device)
                       for x in (self.cells, self.position, self.direction)]  # fmt: skip

    def encode(self, mazes: Mazes) -> list[torch.Tensor]:
        """Cells (n, width * width) int32, position in the map (n,) and direction (n,) int64 of n level starts."""
        n, height, width = mazes.walls.shape
        border, rows = VIEW - 1, np.arange(n)
        cells = np.full((n, self.width, self.width), WALL, np.int32)
        cells[:, border : border + height, border : border + width][~mazes.walls] = EMPTY
        cells[rows, border + mazes.goal[:, 0], border + mazes.goal[:, 1]] = GOAL
        position = (border + mazes.agent[:, 0]) * self.width + border + mazes.agent[:, 1]
        return [torch.from_numpy(x).to(self.device) for x in (cells.reshape(n, -1), position, mazes.direction)]

    def reset(self, *, seed: Any = None, options: dict | None = None) -> tuple[dict[str, torch.Tensor], dict]:
        options = options or {}
        rows = np.flatnonzero(options.get("reset_mask", np.ones(self.num_envs, bool)))
        if "mazes" in options:
            start = self.encode(Mazes(*(part[rows] for part in options["mazes"])))
        else:
            if seed is None:
                seed = self.np_random.integers(FIRST_TEST_LEVEL, size=self.num_envs)
            levels = (np.arange(seed, seed + self.num_envs) if np.ndim(seed) == 0 else np.asarray(seed))[rows].tolist()
            new = [level for level in dict.fromkeys(levels) if level not in self.known]
            if len(self.known) + len(new) > len(self.starts[0]):
                self.known, new = {}, list(dict.fromkeys(levels))
            if new:
                first = len(self.known)
                for kept, made in zip(self.starts, self.encode(self.generate(np.array(new)))):
                    kept[first : first + len(new)] = made
                self.known |= {level: first + k for k, level in enumerate(new)}
            which = torch.tensor([self.known[level] for level in levels], device=self.device)
            start = [kept.index_select(0, which) for kept in self.starts]
        rows = torch.from_numpy(rows).to(self.device)
        self.cells[rows], self.direction[rows], self.steps[rows] = start[0], start[2], 0
        self.position[rows] = start[1] + rows * self.width**2
        image = maze_view(self.cells, self.position, self.direction, self.tables[2])
        return {"image": image, "direction": self.direction.clone()}, {}

    def step(
        self, actions: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor, dict]:
        image, self.position, self.direction, self.steps, reward, terminated, truncated = self.maze_step(
            actions, self.cells, self.position, self.direction, self.steps, self.max_steps, *self.tables
        )
        return {"image": image, "direction": self.direction}, reward, terminated, truncated, {}


class TensorObservations(gym.vector.VectorWrapper):
    """A package's environments as the training loop sees them: tensors in, tensors out."""

    def __init__(self, envs: gym.vector.VectorEnv, device: torch.device):
        super().__init__(envs)
        self.device = device

    def tensors(self, obs: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
        return {key: torch.from_numpy(value).to(self.device) for key, value in obs.items()}

    def reset(self, *, seed: Any = None, options: dict | None = None) -> tuple[dict[str, torch.Tensor], dict]:
        obs, infos = self.env.reset(seed=seed, options=options)
        return self.tensors(obs), infos

    def step(
        self, actions: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor, dict]:
        obs, *rest, infos = self.env.step(actions.cpu().numpy())
        reward, terminated, truncated = (torch.from_numpy(x).to(self.device) for x in rest)
        return self.tensors(obs), reward.float(), terminated, truncated, infos


def make_minigrid(
    env_id: str, num_envs: int, device: torch.device, see_like_mazes: bool = False
) -> gym.vector.VectorEnv:
    """A registered MiniGrid environment. Its mission, a text, is left out: the agent does not read."""

    def wrap(env: gym.Env) -> gym.Env:
        if see_like_mazes:
            env.unwrapped.see_through_walls = True
        return gym.wrappers.FilterObservation(env, ["image", "direction"])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # gym's, of -v0 environments with a -v1
        envs = gym.make_vec(
            env_id,
            num_envs,
            vectorization_mode="sync",
            vector_kwargs={"autoreset_mode": gym.vector.AutoresetMode.DISABLED},
            wrappers=[wrap],
            **({"agent_view_size": VIEW} if see_like_mazes else {}),
        )
    return TensorObservations(envs, device)


def make_envs(args: Args, num_envs: int, device: torch.device) -> gym.vector.VectorEnv:
    """To train on something else, return another VectorEnv with autoreset off whose reset seed is the level."""
    if args.env_id == "maze":
        maze = (args.maze_size, args.max_steps, args.num_walls, args.vary_num_walls, args.compile)
        return MazeEnvs(num_envs, device, *maze)
    return make_minigrid(args.env_id, num_envs, device)


def level_picture(args: Args, level: int) -> np.ndarray:
    """(H, W, 3) uint8, drawn by the package."""
    if args.env_id == "maze":
        return maze_picture(random_mazes(np.array([level]), args.maze_size, args.num_walls, args.vary_num_walls))
    envs = make_minigrid(args.env_id, 1, torch.device("cpu"))
    envs.reset(seed=[level])
    return envs.env.call("get_frame", False, 8)[0]


def maze_picture(maze: Mazes, agent: tuple[int, int] | None = None, direction: int | None = None) -> np.ndarray:
    """(H, W, 3) uint8, 8 pixels a cell, of a batch of one maze; the agent where it starts, or there."""
    _, height, width = maze.walls.shape
    grid = Grid(width + 2, height + 2)
    grid.wall_rect(0, 0, width + 2, height + 2)
    for row, column in np.argwhere(maze.walls[0]).tolist():
        grid.set(column + 1, row + 1, Wall())
    grid.set(int(maze.goal[0, 1]) + 1, int(maze.goal[0, 0]) + 1, Goal())
    row, column = maze.agent[0].tolist() if agent is None else agent
    return grid.render(8, (column + 1, row + 1), int(maze.direction[0] if direction is None else direction))


# ---- network --------------------------------------------------------------------------------------------------------


def layer_init(layer: nn.Linear, std: float) -> nn.Linear:
    torch.nn.init.orthogonal_(layer.weight, std)
    torch.nn.init.constant_(layer.bias, 0.0)
    return layer


def episode_segments(starts: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """Cuts a rollout where episodes begin, so that the LSTM can run over whole episodes instead of step by step.

    starts: (T, N) bool, obs[t] begins an episode. Step t of environment n has the number t * N + n.
    Returns batches of segments of similar length, each (length, segments) int64 step numbers, shorter segments padded
    with their last step; and (T * N,) int64, where each step is among the concatenated, flattened batches.
    """
    T, N = starts.shape
    begins = starts.T.copy()  # (N, T): one environment after another
    begins[:, 0] = True
    first = np.flatnonzero(begins)
    length = np.diff(np.append(first, T * N))
    size_class = np.ceil(np.log(length) / math.log(1.5))  # within a class, the longest is 1.5 times the shortest
    batches, where, offset = [], np.zeros(T * N, np.int64), 0
    for this in np.unique(size_class):
        first_here, length_here = first[size_class == this], length[size_class == this]
        step = first_here + np.minimum(np.arange(length_here.max())[:, None], length_here - 1)
        batch = step % T * N + step // T
        where[batch.ravel()[::-1]] = (
            offset + np.arange(batch.size)[::-1]
        )  # backwards: the step itself beats its padding
        batches.append(batch)
        offset += batch.size
    return batches, where


class Agent(nn.Module):
    def __init__(self, envs: gym.vector.VectorEnv, precision: str = "fp32"):
        super().__init__()
        h, w, c = envs.single_observation_space["image"].shape
        self.bf16, self.view = precision == "bf16", (h, w)
        self.conv = nn.Conv2d(c, 16, kernel_size=3)
        self.direction = nn.Embedding(4, 5)
        self.lstm = nn.LSTM(16 * (h - 2) * (w - 2) + 5, 256)
        for name, parameter in self.lstm.named_parameters():
            nn.init.orthogonal_(parameter, 1.0) if "weight" in name else nn.init.constant_(parameter, 0.0)
        num_actions = int(envs.single_action_space.n)
        self.actor = nn.Sequential(
            layer_init(nn.Linear(256, 32), math.sqrt(2)), nn.Tanh(), layer_init(nn.Linear(32, num_actions), 0.01)
        )
        self.critic = nn.Sequential(
            layer_init(nn.Linear(256, 32), math.sqrt(2)), nn.Tanh(), layer_init(nn.Linear(32, 1), 1.0)
        )

    def features(self, image: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
        """image (B, 5, 5, 3) uint8, direction (B,) int64 -> (B, 149)."""
        x = self.conv(image.permute(0, 3, 1, 2) / 10.0)  # "bwhc" -> "bcwh"
        return torch.cat((torch.relu(x).flatten(1), self.direction(direction)), dim=1)

    def step_weights(self) -> list[torch.Tensor]:
        """The weights as `step` needs them: the same numbers, laid out once per rollout for small batches.

        The convolution becomes a matrix (75, 144) and its bias, the LSTM's weights (149 + 256, 1024) and bias.
        """
        with torch.no_grad():
            (h, w), c = self.view, self.conv.in_channels
            pixels = torch.eye(h * w * c, device=self.conv.weight.device).view(-1, h, w, c).permute(0, 3, 1, 2)
            conv = nn.functional.conv2d(pixels, self.conv.weight / 10.0).flatten(1)
            bias = self.conv.bias.repeat_interleave((h - 2) * (w - 2))
            lstm = torch.cat((self.lstm.weight_ih_l0, self.lstm.weight_hh_l0), dim=1).t().contiguous()
            return [conv, bias, lstm, self.lstm.bias_ih_l0 + self.lstm.bias_hh_l0]

    def step(
        self, obs: dict[str, torch.Tensor], state: tuple[torch.Tensor, torch.Tensor], weights: list[torch.Tensor]
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """One step of N environments, to act: the LSTM's output (N, 256) and its state, h and c (N, 256) float32."""
        conv, conv_bias, lstm, lstm_bias = weights
        with torch.autocast(conv.device.type, torch.bfloat16, enabled=self.bf16):
            x = torch.relu(torch.addmm(conv_bias, obs["image"].flatten(1).float(), conv))
            x = torch.cat((x, self.direction(obs["direction"]), state[0]), dim=1)
            i, f, g, o = torch.addmm(lstm_bias, x, lstm).float().chunk(4, dim=1)
        c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        return h, (h, c)

    def act(self, obs: dict[str, torch.Tensor], state: tuple, weights: list[torch.Tensor]) -> tuple[Any, ...]:
        """`step`, and what the rollout stores: action, log-probability, value (N,), log-probabilities; next state."""
        hidden, state = self.step(obs, state, weights)
        logits = self.actor(hidden).log_softmax(-1)
        # the first of exponential clocks with rates p to ring is drawn with probability p: multinomial without checks
        action = (logits.exp() / torch.empty_like(logits).exponential_()).argmax(-1)
        return action, logits.gather(-1, action[:, None]).squeeze(-1), self.get_value(hidden), logits, state

    def unroll(self, image: torch.Tensor, direction: torch.Tensor, starts: np.ndarray) -> torch.Tensor:
        """A whole rollout, to learn: (T, N, 5, 5, 3), (T, N) and (T, N) bool as `episode_segments` takes it
        -> the LSTM's outputs (T * N, 256) float32, the same as from `step` with a fresh state where starts."""
        batches, where = episode_segments(starts)
        with torch.autocast(image.device.type, torch.bfloat16, enabled=self.bf16):
            x = self.features(image.flatten(0, 1), direction.flatten())
            outputs = []
            for batch in batches:
                index = torch.from_numpy(batch).to(x.device)
                outputs.append(self.lstm(x.index_select(0, index.view(-1)).view(*index.shape, -1))[0].flatten(0, 1))
            return torch.cat(outputs).index_select(0, torch.from_numpy(where).to(x.device)).float()

    def get_value(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.critic(hidden).squeeze(-1)

    def evaluate_actions(self, hidden: torch.Tensor, action: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """hidden (B, 256), action (B,) -> log-probability, entropy and value (B,)."""
        logits = self.actor(hidden).log_softmax(-1)
        logprob = logits.gather(-1, action[:, None]).squeeze(-1)
        return logprob, -(logits.exp() * logits).sum(-1), self.get_value(hidden)


# ---- evaluation -----------------------------------------------------------------------------------------------------


def play(agent: Agent, envs: gym.vector.VectorEnv, record: Callable, **reset: Any) -> np.ndarray:
    """Plays one episode in each environment to its end, stochastic policy: returns (N,). record() is called each step.

    reset: seed, or options with mazes. An environment that is done starts again, but nothing of that counts.
    """
    options = reset.pop("options", {})
    obs, _ = envs.reset(**reset, options=options)
    state = tuple(torch.zeros((envs.num_envs, 256), device=obs["direction"].device) for _ in range(2))
    playing, returns, weights = np.ones(envs.num_envs, bool), np.zeros(envs.num_envs), agent.step_weights()
    while playing.any():
        record(playing)
        action, _, _, _, state = agent.act(obs, state, weights)
        obs, reward, terminations, truncations, _ = envs.step(action)
        returns += reward.cpu().numpy() * playing
        done = (terminations | truncations).cpu().numpy()
        playing &= ~done
        if done.any():
            obs, _ = envs.reset(**reset, options=options | {"reset_mask": done})
    return returns


def evaluation_mazes(episodes: int) -> dict[str, list[Mazes]]:
    """For each evaluation maze, the levels of its episodes: fixed, the same for every run."""
    mazes = {name: [named_maze(name, episode) for episode in range(episodes)] for name in NAMED_MAZES}
    return mazes | {"PerfectMaze21": [perfect_maze(21, seed) for seed in range(episodes)]}


def evaluate(agent: Agent, args: Args, device: torch.device, video: Path | None = None) -> dict[str, Any]:
    """Plays exactly eval_episodes episodes in each evaluation environment; random stream of its own.

    Mazes: NAMED_MAZES and 21 x 21 perfect mazes, time limit 2 * size ** 2, and PACKAGE_MAZES. Other environments: their
    own levels from FIRST_TEST_LEVEL on. Solved means a return above 0. The IQM is over environments: the mean without
    the lowest and the highest quarter.
    """
    episodes, returns, films = args.eval_episodes, {}, []
    levels = list(range(FIRST_TEST_LEVEL, FIRST_TEST_LEVEL + episodes))
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(int(np.random.default_rng([args.seed, 2]).integers(2**62)))
        if args.env_id == "maze":
            by_size: dict[int, dict[str, list[Mazes]]] = {}
            for name, mazes in evaluation_mazes(episodes).items():
                by_size.setdefault(mazes[0].walls.shape[1] + 2, {})[name] = mazes
            for size, group in by_size.items():
                mazes = join_mazes([maze for part in group.values() for maze in part])
                envs = MazeEnvs(len(mazes.goal), device, size, max_steps=2 * size**2)
                films += [[] for _ in group]

                def record(playing: torch.Tensor) -> None:
                    for k, film in enumerate(films[-len(group) :]):  # the first episode in each maze
                        if video and playing[k * episodes]:
                            place = int(envs.position[k * episodes]) % envs.width**2
                            cell = (place // envs.width - VIEW + 1, place % envs.width - VIEW + 1)
                            maze = Mazes(*(part[k * episodes][None] for part in mazes))
                            film.append(maze_picture(maze, cell, int(envs.direction[k * episodes])))

                result = play(agent, envs, record, options={"mazes": mazes})
                returns |= zip(group, result.reshape(len(group), episodes))
            packages = {name: make_minigrid(id, episodes, device, True) for name, id in PACKAGE_MAZES.items()}
        else:
            packages = {args.env_id: make_minigrid(args.env_id, episodes, device)}
        for name, envs in packages.items():
            films.append([])

            def record(playing: torch.Tensor) -> None:
                if video and playing[0]:
                    films[-1].append(envs.env.envs[0].unwrapped.get_frame(False, 8))

            returns[name] = play(agent, envs, record, seed=levels)
            envs.close()
    if video:
        write_gif(video, films)
    solved = {name: float((x > 0).mean()) for name, x in returns.items()}
    rates, quarter = np.sort(list(solved.values())), len(solved) // 4
    result = {"solved_mean": float(rates.mean()), "solved_iqm": float(rates[quarter : len(rates) - quarter].mean())}
    result |= {"return_mean": float(np.mean(list(returns.values())))}
    result |= {f"solved_{name}": rate for name, rate in solved.items()}
    result |= {f"return_{name}": float(x.mean()) for name, x in returns.items()}
    return result | {"episodes": {name: [round(v, 6) for v in x.tolist()] for name, x in returns.items()}}


def write_gif(path: Path, films: list[list[np.ndarray]]) -> None:
    """films: for each maze, one picture (H, W, 3) uint8 per step. Five side by side; one that is over stands still."""
    from PIL import Image  # comes with tensorboard

    path.parent.mkdir(parents=True, exist_ok=True)
    side = max(max(film[0].shape[:2]) for film in films)
    frames = []
    for t in range(0, max(map(len, films)), 2):
        shown = [film[min(t, len(film) - 1)] for film in films]
        shown = [np.pad(p, ((0, side - p.shape[0]), (0, side - p.shape[1]), (0, 0))) for p in shown]
        shown += [np.zeros_like(shown[0])] * (-len(shown) % min(5, len(shown)))
        rows = [np.concatenate(shown[k : k + 5], axis=1) for k in range(0, len(shown), 5)]
        frames.append(Image.fromarray(np.concatenate(rows)).quantize(32))
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100, loop=0)


# ---- run directory --------------------------------------------------------------------------------------------------


def plain(x: Any) -> Any:
    """Nested state as tensors and Python values only, which torch.load(weights_only=True) reads back."""
    if isinstance(x, dict):
        return {key: plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [plain(value) for value in x]
    if isinstance(x, np.ndarray):
        return torch.from_numpy(x.copy())
    return x.item() if isinstance(x, np.generic) else x


def fingerprint(state: Any) -> str:
    """SHA-256 of a nested state. Two runs with the same fingerprint are the same run."""
    digest = hashlib.sha256()

    def feed(x: Any) -> None:
        if isinstance(x, dict):
            feed([part for key in sorted(x, key=str) for part in (str(key), x[key])])
        elif isinstance(x, list):
            for part in x:
                feed(part)
        else:
            digest.update(x.cpu().contiguous().numpy().tobytes() if isinstance(x, torch.Tensor) else repr(x).encode())

    feed(plain(state))
    return digest.hexdigest()


def write_file(path: Path, data: bytes) -> None:
    """A reader, or a crash, finds the old file or the new one and nothing in between."""
    with open(path.with_suffix(".tmp"), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path.with_suffix(".tmp"), path)


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Adds a row to a CSV file; the first row makes the header."""
    with open(path, "a", newline="") as file:
        table = csv.DictWriter(file, list(row))
        if file.tell() == 0:
            table.writeheader()
        table.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})


def make_run_dir(args: Args) -> Path:
    run_dir = Path(args.run_dir or f"runs/{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}")
    for name, kind in (("result.json", "a finished"), ("progress.csv", "an unfinished")):
        if (run_dir / name).exists():
            refuse(f"--run-dir {run_dir} already holds {kind} run: choose another directory.")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "args.json").write_text(json.dumps(asdict(args), indent=2) + "\n")
    except OSError as error:
        refuse(f"--run-dir {run_dir} cannot be written: {error.strerror}.")
    return run_dir


def choose_device(args: Args) -> torch.device:
    torch.backends.cudnn.deterministic = args.torch_deterministic
    # cuDNN would use TF32 by default: fp32 means fp32 here
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.precision == "tf32"
    if args.cuda and torch.cuda.is_available():
        return torch.device("cuda")
    with contextlib.suppress(AttributeError, OSError):
        # glibc hands every large tensor back to the kernel and gets it again page by page: keeping the memory
        # (M_MMAP_MAX = -4, M_TRIM_THRESHOLD = -1) makes the update up to twice as fast.
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)
        libc.mallopt(-1, -1)
    return torch.device("cpu")


def evaluate_run(args: Args) -> None:
    """--evaluate RUN_DIR: prints and writes an evaluation of a saved run. Flags that are not given are that run's."""
    run_dir = Path(args.evaluate)
    try:
        saved = json.loads((run_dir / "args.json").read_text())
        saved = {f.name: saved[f.name] for f in fields(Args) if f.init and f.name in saved}
        args = tyro.cli(Args, default=Args(**saved))
        check_args(args)
        device = choose_device(args)
        checkpoint = torch.load(run_dir / "checkpoint.pt", map_location=device, weights_only=True)
        agent = Agent(make_envs(args, 1, device), args.precision).to(device)
        agent.load_state_dict(checkpoint["agent"])
    except (EOFError, OSError, ValueError, KeyError, TypeError, RuntimeError, pickle.UnpicklingError) as error:
        refuse(f"--evaluate {run_dir} is not a run that can be loaded: {(str(error) or repr(error)).splitlines()[0]}")
    name = f"evaluation_{int(time.time())}"
    result = evaluate(agent, args, device, run_dir / "videos" / f"{name}.gif" if args.capture_video else None)
    write_file(run_dir / f"{name}.json", json.dumps(result | {"args": asdict(args)}, indent=2).encode())
    for key, value in result.items():
        if key.startswith("solved_"):
            print(f"{key}: {value:.3f}")
    print(f"{args.eval_episodes} episodes in each environment")
    print(f"every episode: {run_dir / name}.json")


# ---- training -------------------------------------------------------------------------------------------------------


def main() -> None:
    args = tyro.cli(Args)
    if args.evaluate:
        return evaluate_run(args)
    check_args(args)
    if args.track and importlib.util.find_spec("wandb") is None:
        refuse("--track needs Weights and Biases: pip install wandb.")
    run_dir = make_run_dir(args)

    # ==== setup ====
    if args.track:
        import wandb

        wandb.init(sync_tensorboard=True, config=asdict(args), name=run_dir.name, dir=run_dir, save_code=True)
    writer = SummaryWriter(run_dir)
    table = "\n".join(f"|{key}|{value}|" for key, value in asdict(args).items())
    writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}")
    device = choose_device(args)
    torch.manual_seed(args.seed)  # network, actions, minibatches; sampler and evaluation have streams of their own
    envs = make_envs(args, args.num_envs, device)
    agent = Agent(envs, args.precision).to(device)
    act = torch.compile(agent.act) if args.compile else agent.act
    optimizer = optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    sampler = LevelSampler(
        num_envs=args.num_envs,
        seed=args.seed,
        level_space=FIRST_TEST_LEVEL,
        curriculum="uniform" if args.curriculum == "dr" else "plr",
        buffer_size=0 if args.curriculum == "dr" else args.buffer_size,
        nu=1 - args.replay_prob,
        **{name: getattr(args, name) for name in "score_transform temperature staleness_coef".split()},
        **{name: getattr(args, name) for name in "replay_schedule rho alpha".split()},
    )

    # ==== storage: T = num_steps, N = num_envs ====
    T, N, num_actions = args.num_steps, args.num_envs, int(envs.single_action_space.n)
    images = torch.zeros((T, N) + envs.single_observation_space["image"].shape, dtype=torch.uint8, device=device)
    directions = torch.zeros((T, N), dtype=torch.int64, device=device)
    actions = torch.zeros((T, N), dtype=torch.int64, device=device)
    logprobs = torch.zeros((T, N), device=device)
    logits = torch.zeros((T, N, num_actions), device=device)  # float32, normalised log-probabilities
    rewards = torch.zeros((T, N), device=device)
    values = torch.zeros((T, N), device=device)
    final_values = torch.zeros((T, N), device=device)  # with bootstrap_timeouts: of the state a time limit stopped in
    dones = np.zeros((T, N), bool)  # dones[t], set before step t: obs[t] begins an episode
    levels = np.zeros((T, N), np.int64)  # levels[t]: the level that obs[t] belongs to

    global_step = gradient_updates = untrained_steps = 0
    window_returns, window_seconds, window_steps = [], 0.0, 0  # since the last printed line
    start_time, train_seconds, evaluation = time.time(), 0.0, None  # train_seconds: without evaluation and checkpoints

    def run_state() -> dict[str, Any]:
        """What the fingerprint is taken of: all that training has made, and all that decides how it would go on."""
        return {
            "agent": agent.state_dict(),
            "optimizer": optimizer.state_dict(),
            "sampler": sampler.state_dict(),
            "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state() if device.type == "cuda" else None,
        }

    print(f"{args.env_id}, {args.curriculum}, seed {args.seed}: {run_dir}", flush=True)
    if device.type == "cpu":
        why = "No CUDA device" if args.cuda else "--no-cuda"
        print(f"{why}: training on {torch.get_num_threads()} CPU threads. How long it will take:", flush=True)

    for iteration in range(1, args.num_iterations + 1):
        iteration_start = time.time()
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = (1 - (iteration - 1) / args.num_iterations) * args.learning_rate

        # ==== rollout ====
        # Algorithm 1: the replay decision d, one for all environments; the levels of the rollout; is it trained on?
        replay = sampler.decide_replay()
        learn = replay or args.curriculum != "robust_plr"
        sampler.drop(np.ones(N, bool))  # the episodes that the last rollout cut off
        next_levels = sampler.next_levels(np.ones(N, bool), replay)  # (N,) int64
        next_obs, _ = envs.reset(seed=next_levels.tolist())
        next_done = np.ones(N, bool)
        lstm_state = tuple(torch.zeros((N, 256), device=device) for _ in range(2))
        step_weights = agent.step_weights()
        episode_return, episode_length = np.zeros(N), np.zeros(N, np.int64)
        finished: list[tuple[float, int]] = []  # (return, length) of the episodes that ended
        final_values.zero_()
        for step in range(args.num_steps):
            global_step += args.num_envs
            images[step], directions[step] = next_obs["image"], next_obs["direction"]
            dones[step] = next_done
            levels[step] = next_levels
            with torch.no_grad():
                actions[step], logprobs[step], values[step], logits[step], lstm_state = act(
                    next_obs, lstm_state, step_weights
                )

            next_obs, reward, terminations, truncations, _ = envs.step(actions[step])
            rewards[step] = reward
            # one transfer from the device per step
            reward, next_done = torch.stack((reward, (terminations | truncations).float())).cpu().numpy()
            next_done = next_done > 0
            episode_return += reward
            episode_length += 1

            if next_done.any():
                if args.bootstrap_timeouts and (timeouts := truncations & ~terminations).any():
                    with torch.no_grad():
                        final_value = agent.get_value(agent.step(next_obs, lstm_state, step_weights)[0])
                    final_values[step] = final_value * timeouts
                finished += zip(episode_return[next_done].tolist(), episode_length[next_done].tolist())
                sampler.record_returns(next_levels[next_done], episode_return[next_done])
                episode_return[next_done] = episode_length[next_done] = 0
                # replay: another level from the buffer; new levels: the same level again
                next_levels = sampler.next_levels(next_done, replay, None if replay else next_levels)
                next_obs, _ = envs.reset(seed=next_levels.tolist(), options={"reset_mask": next_done})
                keep = torch.from_numpy(~next_done).to(device)[:, None]
                lstm_state = tuple(x * keep for x in lstm_state)

        # ==== advantages (GAE) ====
        with torch.no_grad():
            ends = (
                torch.from_numpy(np.concatenate((dones[1:], next_done[None]))).to(device).float()
            )  # step t ended its episode
            next_value = torch.zeros(N, device=device)
            if args.bootstrap_timeouts:
                next_value = agent.get_value(agent.step(next_obs, lstm_state, step_weights)[0])
            next_values = torch.cat((values[1:], next_value[None])) * (1 - ends) + final_values
            deltas = rewards + args.gamma * next_values - values
            advantages = torch.zeros_like(rewards)
            lastgaelam = torch.zeros_like(next_value)
            for t in reversed(range(args.num_steps)):
                advantages[t] = lastgaelam = deltas[t] + args.gamma * args.gae_lambda * (1 - ends[t]) * lastgaelam
            returns = advantages + values

        # ==== level scores (Robust PLR, Algorithm 1): how much is there still to learn on each level? ====
        # (T, N), averaged over each episode by the sampler. Yours is one more line: everything above is at hand.
        if args.score == "max_mc":  # regret, from the best return so far on the level: max_mc and value share units
            played, inverse = np.unique(levels, return_inverse=True)
            best = sampler.best_returns(played)[inverse].reshape(levels.shape)
            step_scores = torch.from_numpy(best).to(values) - values
        elif args.score == "positive_value_loss":
            step_scores = advantages.clamp(min=0)
        elif args.score == "value_l1":
            step_scores = advantages.abs()
        elif args.score == "gae":
            step_scores = advantages
        elif args.score == "one_step_td_error":
            step_scores = deltas.abs()
        elif args.score == "policy_entropy":
            step_scores = -(logits.exp() * logits).sum(-1) / math.log(num_actions)
        elif args.score == "least_confidence":
            step_scores = 1 - logits.exp().amax(-1)
        elif args.score == "min_margin":
            step_scores = 1 - logits.exp().topk(2).values.diff(dim=-1).abs().squeeze(-1)
        cut_too = args.bootstrap_timeouts and args.score != "max_mc"
        sampler.update(levels, step_scores.cpu().numpy(), ends.cpu().numpy(), score_tails=cut_too)

        # ==== optimise (PPO): Robust PLR does not learn from new levels, so nothing is computed for them ====
        losses, updates = torch.zeros(6, device=device), 0  # summed over the minibatches, read once
        for _epoch in range(args.update_epochs if learn else 0):
            for mb_envs in torch.randperm(N).split(N // args.num_minibatches):
                mb_inds = mb_envs.to(device)
                b_actions, b_logprobs = actions[:, mb_inds].reshape(-1), logprobs[:, mb_inds].reshape(-1)
                b_advantages, b_returns = advantages[:, mb_inds].reshape(-1), returns[:, mb_inds].reshape(-1)
                b_values = values[:, mb_inds].reshape(-1)
                hidden = agent.unroll(images[:, mb_inds], directions[:, mb_inds], dones[:, mb_envs.numpy()])
                newlogprob, entropy, newvalue = agent.evaluate_actions(hidden, b_actions)
                logratio = newlogprob - b_logprobs
                ratio = logratio.exp()
                b_advantages = (b_advantages - b_advantages.mean()) / (b_advantages.std() + 1e-8)
                pg_loss1 = -b_advantages * ratio
                pg_loss2 = -b_advantages * ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
                pg_loss = torch.max(pg_loss1, pg_loss2).mean()
                v_change = (newvalue - b_values).clamp(-args.clip_coef, args.clip_coef)
                v_loss_unclipped = (newvalue - b_returns) ** 2
                v_loss_clipped = (b_values + v_change - b_returns) ** 2
                v_loss = 0.5 * torch.max(v_loss_unclipped, v_loss_clipped).mean()
                entropy_loss = entropy.mean()
                loss = pg_loss - args.ent_coef * entropy_loss + v_loss * args.vf_coef

                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                optimizer.step()
                with torch.no_grad():  # approx_kl: http://joschu.net/blog/kl-approx.html
                    old_approx_kl, approx_kl = -logratio.mean(), ((ratio - 1) - logratio).mean()
                    clipfrac = ((ratio - 1).abs() > args.clip_coef).float().mean()
                    losses += torch.stack((v_loss, pg_loss, entropy_loss, old_approx_kl, approx_kl, clipfrac)).detach()
                    updates += 1
            if args.target_kl is not None and approx_kl > args.target_kl:
                break
        gradient_updates += updates
        untrained_steps += 0 if learn else args.batch_size

        # ==== log ====
        losses = (
            losses / updates if updates else losses * math.nan
        ).tolist()  # waits for the device, then the clock stops
        seconds = time.time() - iteration_start
        train_seconds += seconds
        explained_var = float(1 - (returns - values).var() / returns.var().clamp(min=1e-12))
        names = ("value_loss", "policy_loss", "entropy", "old_approx_kl", "approx_kl", "clipfrac")
        quantiles = np.quantile(sampler.scores[sampler.seen], (0.1, 0.5, 0.9)) if sampler.seen.any() else [0.0] * 3
        row = {
            "charts/episodic_return": float(np.mean([x for x, _ in finished])) if finished else math.nan,
            "charts/episodic_length": float(np.mean([x for _, x in finished])) if finished else math.nan,
            "charts/solved_rate": float(np.mean([x > 0 for x, _ in finished])) if finished else math.nan,
            "charts/episodes": len(finished),
            "charts/learning_rate": optimizer.param_groups[0]["lr"],
            "charts/SPS": args.batch_size / seconds,
            "charts/gradient_updates": gradient_updates,
            "charts/untrained_steps": untrained_steps,
            **{f"losses/{name}": value for name, value in zip(names, losses)},
            "losses/explained_variance": explained_var,
            "curriculum/replay": int(replay),
            **{f"curriculum/{name}": value for name, value in sampler.metrics().items()},
            **{f"curriculum/score_q{q}": float(value) for q, value in zip((10, 50, 90), quantiles)},
        }
        if args.env_id == "maze":
            mazes = random_mazes(np.unique(levels), args.maze_size, args.num_walls, args.vary_num_walls)
            paths = shortest_paths(mazes)
            shape = (mazes.walls.sum((1, 2)).mean(), paths[paths > 0].mean(), (paths > 0).mean())
            for kind in ("new", "replayed"):
                known = shape if (kind == "replayed") == replay else [math.nan] * 3
                row |= {
                    f"curriculum/{name}_{kind}": float(x)
                    for name, x in zip(("walls", "shortest_path", "solvable"), known)
                }
        for key, value in row.items():
            if not math.isnan(value):
                writer.add_scalar(key, value, global_step)
        columns = {key.split("/")[1]: value for key, value in row.items()}
        when = {"global_step": global_step, "wall_seconds": time.time() - start_time}
        append_row(run_dir / "progress.csv", when | columns)

        # ==== evaluate ====
        last = iteration == args.num_iterations
        if last or (args.eval_interval and iteration % args.eval_interval == 0):
            video = run_dir / "videos" / f"step_{global_step}.gif" if args.capture_video else None
            evaluation = evaluate(agent, args, device, video)
            scalars = {key: value for key, value in evaluation.items() if key != "episodes"}
            for key, value in scalars.items():
                writer.add_scalar(f"eval/{key}", value, global_step)
            append_row(run_dir / "evaluations.csv", when | {"gradient_updates": gradient_updates} | scalars)
            shown = {"fresh": np.random.default_rng([args.seed, 3, iteration]).integers(FIRST_TEST_LEVEL, size=4)}
            if sampler.num_seen:
                for name, x in (
                    ("highest_score", np.where(sampler.seen, sampler.scores, -np.inf)),
                    ("highest_weight", sampler.weights()),
                ):
                    shown[name] = sampler.levels[np.argsort(-x)[: min(4, sampler.num_seen)]]
            for name, ids in shown.items():
                pictures = np.concatenate([level_picture(args, int(level)) for level in ids], axis=1)
                writer.add_image(f"levels/{name}", pictures, global_step, dataformats="HWC")

        # ==== checkpoint ====
        if last or (args.checkpoint_interval and iteration % args.checkpoint_interval == 0):
            state = run_state() | {"args": asdict(args), "iteration": iteration, "global_step": global_step}
            state |= {"gradient_updates": gradient_updates, "untrained_steps": untrained_steps}
            torch.save(plain(state), data := io.BytesIO())
            write_file(run_dir / "checkpoint.pt", data.getvalue())

        window_returns += [x for x, _ in finished]
        window_seconds, window_steps = window_seconds + seconds, window_steps + args.batch_size
        if last or iteration == 1 or window_seconds > 10:
            left = (time.time() - start_time) / iteration * (args.num_iterations - iteration)
            parts = [f"step {global_step:,} ({iteration / args.num_iterations:.1%})", f"{gradient_updates:,} updates"]
            parts += [
                f"{left // 3600:.0f}h{left % 3600 // 60:02.0f}m left",
                f"{window_steps / window_seconds:,.0f} steps/s",
                f"train return {np.mean(window_returns) if window_returns else math.nan:.2f}",
            ]
            if evaluation:
                parts += [f"evaluation: solved {evaluation['solved_mean']:.2f}"]
            print(" | ".join(parts), flush=True)
            window_returns, window_seconds, window_steps = [], 0.0, 0

    result = {"env_id": args.env_id, "curriculum": args.curriculum, "seed": args.seed, "global_step": global_step}
    result |= {"gradient_updates": gradient_updates, "untrained_steps": untrained_steps}
    result |= {"steps_per_second": global_step / train_seconds, "wall_seconds": time.time() - start_time}
    result |= {"device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "torch": torch.__version__}
    result |= {"fingerprint": fingerprint(run_state()), "evaluation": evaluation}
    write_file(run_dir / "result.json", json.dumps(result, indent=2).encode())
    envs.close()
    writer.close()
    print(f"done: {run_dir}/result.json, fingerprint {result['fingerprint'][:16]}", flush=True)


if __name__ == "__main__":
    main()
