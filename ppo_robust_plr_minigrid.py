"""Recurrent PPO + Robust Prioritized Level Replay (PLR-perp) on mazes, in one file.

    python ppo_robust_plr_minigrid.py                                  # Robust PLR with the published settings
    python ppo_robust_plr_minigrid.py --curriculum plr                 # PLR: also learns on new levels
    python ppo_robust_plr_minigrid.py --curriculum dr                  # baseline: domain randomisation, new levels only
    python ppo_robust_plr_minigrid.py --env-id MiniGrid-MultiRoom-N4-S5-v0       # any registered MiniGrid environment
    python ppo_robust_plr_minigrid.py --resume runs/RUN                # goes on where the run's last checkpoint is
    torchrun --nproc-per-node 8 ppo_robust_plr_minigrid.py             # several GPUs or machines, one curriculum
    python ppo_robust_plr_minigrid.py --evaluate runs/RUN --eval-episodes 1000 --capture-video

Robust PLR: "Replay-Guided Adversarial Environment Design" (Jiang et al. 2021, arXiv 2110.02439), Algorithm 1. PLR:
arXiv 2010.03934. PPO: CleanRL. Defaults: the released 25-block configuration; README.md lists deviations, logged keys.

A rollout starts fresh episodes, all on replayed levels or all on new ones. Its end and a time limit count 0 from there
on, as in dcd, and an episode that is cut off is not scored. With --bootstrap-timeouts the critic's value counts at
both, and the cut episode is scored too (not by max_mc, which needs whole ones).
"""

import contextlib
import ctypes
import heapq
import importlib.util
import io
import itertools
import json
import math
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import tyro
from minigrid.core.grid import Grid
from minigrid.core.world_object import Goal, Wall
from minigrid.minigrid_env import MiniGridEnv
from PIL import Image
from torch import Tensor, nn, optim
from torch.utils.data import default_convert
from torch.utils.tensorboard import SummaryWriter

from plr_sampler import LevelSampler

# The published evaluation mazes, without their border: > agent facing east, # wall, G goal, g one of the possible goals
MAZES = """
SixteenRooms  Labyrinth     Labyrinth2    Maze          Maze2         SmallCorridor SixteenRoomsFewerDoors Maze3
...#..#..#... ............. >#........... .....#>...#.. ...#.#....#.. ............. ...#.....#...          ...>#.#......
.>.......#... .###########. .#.#########. .###.####.##. .#.#.####...# .#.#.#.#.#.#. .>....#..#...          .####.#.####.
...#..#...... .#.........#. .#.#.......#. .#........... .#........#.. .#.#.#.#.#.#. ...#..#..#...          .#....#.#....
#.###.##.###. .#.#######.#. .#.#.#####.#. .########.### .########.### .#.#.#.#.#.#. ####.##.###.#          ...####.#.#.#
...#......... .#.#.....#.#. .#.#.#...#.#. ........#.... ...#..#.#.#.G .#.#.#.#.#.#. ...#..#......          ##.#....#.#..
......#..#... .#.#.###.#.#. ...#.#.#.#.#. ######.#####. ##.#.##.#.#.. .#g#g#g#g#g#. ......#..#...          ...#.##.#.##.
##.#.##.###.# .#.#.#G#.#.#. ####.#G#.#.#. ....#..#..... >#.#....#.##. >###########. #.#####.#####          .#.#.#..#..#G
...#.....#... .#.#.#.#.#.#. ...#.###.#.#. .##...##.#### .#.##.###..#. .#g#g#g#g#g#. ...#..#..#...          .#.#.#.###.##
...#..#...... .#...#...#.#. .#.#.....#.#. ..#.#..#...#. .#..#..###.#. .#.#.#.#.#.#. ...#.........          .#...#.#.#...
.####.##.#.## .#########.#. .#.#######.#. #.#.##.###.#. .##.##.#.#.#. .#.#.#.#.#.#. ##.##.##.####          .###.#.#.###.
...#..#..#... .....#.....#. .#.........#. #.#..#...#... .#...#.#.#.#. .#.#.#.#.#.#. ...#..#..#...          .#...#.#...#.
......#....G. ####.#.#####. .###########. #.##.###.###. .#.#.#.#.#.#. .#.#.#.#.#.#. ......#....G.          .#.###.#.#.#.
...#.....#... >....#....... ............. ...#..G#.#... ...#...#..... ............. ...#..#..#...          .#...#...#...
"""
half = ["." * 19, *["." + "#." * 9] * 7, "." + "#g" * 8 + "#."]  # of LargeCorridor, like SmallCorridor
NAMED_MAZES = {"LargeCorridor": [*half, ">" + "#" * 17 + ".", *half[::-1]]}  # name -> (height, width) characters
NAMED_MAZES |= {name: rows for name, *rows in zip(*map(str.split, MAZES.strip().splitlines()))}
NAMED_MAZES = {name: np.array([list(row) for row in rows]) for name, rows in NAMED_MAZES.items()}

warnings.filterwarnings("ignore", ".*is out of date", DeprecationWarning)  # gym's, of -v0 environments with a -v1
SCORES = "max_mc positive_value_loss value_l1 gae one_step_td_error policy_entropy least_confidence min_margin".split()
FORMAT = "ppo_robust_plr_minigrid 3"  # of checkpoint.pt
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's: process, processes
FREE_ON_RESUME = "total_timesteps checkpoint_interval capture_video track profile resume evaluate".split()
FIRST_TEST_LEVEL = 2**30  # levels (reset seeds) below are for training, those from here on for evaluation
Obs = dict[str, Tensor]  # "image" (N, height, width, 3) uint8 and "direction" (N,) int64, as MiniGrid gives them


@dataclass
class Args:
    # Experiment
    exp_name: str = os.path.basename(__file__)[: -len(".py")]  # part of the default run directory's name
    seed: int = 1  # decides everything random; evaluation has random streams of its own
    torch_deterministic: bool = True  # choose deterministic kernels; the CPU's always are
    cuda: bool = True  # train on the GPU if there is one
    track: bool = False  # also log to Weights and Biases; WANDB_PROJECT and WANDB_ENTITY name the project and team
    run_dir: str | None = None  # where the run's files go; runs/{env_id}__{exp_name}__{seed}__{time} if not given
    checkpoint_interval: int = 50  # iterations between checkpoints (0: only at the start and the end)
    resume: str | None = None  # continue the run in this directory exactly, with its flags; --total-timesteps may grow

    # Environment
    env_id: str = "maze"  # random mazes as tensors, or a registered MiniGrid environment, with levels = reset seeds
    num_walls: int = 25  # wall blocks placed in a maze, with replacement (the ACCEL paper: 60 with --vary-num-walls)
    vary_num_walls: bool = False  # draw each maze's number of blocks uniformly from 0 to --num-walls
    maze_size: int = 15  # cells along a side of a maze, border included
    max_steps: int = 250  # time limit of an episode in a maze; registered environments keep theirs

    # PPO (dcd's 25-block configurations)
    total_timesteps: int = 250_000_000  # environment steps of the whole run, new levels included, in full iterations
    learning_rate: float = 1e-4  # of Adam
    num_envs: int = 32  # environments played side by side, on all GPUs together
    num_steps: int = 256  # steps of each environment per rollout: at least the time limit, to finish episodes
    anneal_lr: bool = False  # let the learning rate fall linearly to 0
    gamma: float = 0.995  # discount
    gae_lambda: float = 0.95  # lambda of the generalized advantage estimation
    num_minibatches: int = 1  # minibatches per epoch, each of whole environments
    update_epochs: int = 5  # epochs per rollout
    clip_coef: float = 0.2  # clip range of the policy ratio and of the value
    ent_coef: float = 0.01  # weight of the entropy bonus (the 60-block configurations: 0)
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # bound on the norm of the gradient
    target_kl: float | None = None  # stop an iteration's epochs once the approximate KL divergence exceeds this
    bootstrap_timeouts: bool = False  # at a time limit and the rollout's end, count the critic's value instead of 0

    # Robust PLR
    curriculum: Literal["robust_plr", "plr", "dr"] = "robust_plr"  # learn on replayed levels, on all, on new ones only
    replay_prob: float = 0.5  # probability that a rollout replays levels from the buffer, once that is filled to --rho
    buffer_size: int = 4000  # levels kept for replay
    score: Literal[tuple(SCORES)] = "max_mc"  # what is left to learn on a level; formulas at "level scores" below
    score_transform: Literal["constant", "max", "eps_greedy", "rank", "power", "softmax"] = "rank"  # PLR's h
    temperature: float = 0.1  # of the transform (PLR's beta): lower is greedier
    staleness_coef: float = 0.3  # share of replay by staleness (PLR's rho)
    replay_schedule: Literal["proportionate", "fixed"] = "proportionate"  # P(replay) = fill up to --replay-prob, or it
    rho: float = 0.5  # fill of the buffer before any level is replayed
    nu: float | None = None  # probability of a rollout on new levels, 1 - replay_prob, as the Procgen script names it
    alpha: float = 1.0  # weight of a level's new score in its running mean (1: the last score counts)

    # Evaluation
    eval_interval: int = 250  # iterations between evaluations (0: only at the end)
    eval_episodes: int = 100  # episodes in each evaluation environment
    capture_video: bool = False  # write a GIF of an episode in each evaluation maze
    evaluate: str | None = None  # only evaluate the run in this directory. Other flags default to that run's

    # Speed
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"  # bf16: faster on CPUs with AMX; a GPU learns in tf32 with it
    compile: bool = False  # torch.compile the step of the mazes and the acting network's; the update is not
    profile: bool = False  # print each phase's share of the time; trace the last iteration, for ui.perfetto.dev
    batch_size: int = field(init=False)
    num_iterations: int = field(init=False)

    def __post_init__(self):
        self.batch_size = self.num_envs * self.num_steps
        self.num_iterations = self.total_timesteps // max(self.batch_size, 1)
        if self.nu is not None:
            self.replay_prob = 1 - self.nu


def refuse(reason: str, status: int = 2) -> None:
    time.sleep(30 * (RANK > 0 and status == 2))  # rank 0 says it, and torchrun ends the others
    print(f"error: {reason}", file=sys.stderr)
    raise SystemExit(status)


def check_args(args: Args) -> None:
    """Refuses what cannot work, with one sentence and exit status 2."""

    def require(names: str, allowed: Callable[[Any], bool], what: str) -> None:
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not allowed(value):
                refuse(f"--{name.replace('_', '-')} {value} must be {what}.")

    require("total_timesteps num_envs num_steps num_minibatches", lambda x: x >= 1, "at least 1")
    require("update_epochs eval_episodes buffer_size max_steps", lambda x: x >= 1, "at least 1")
    counts = "seed num_walls checkpoint_interval eval_interval ent_coef vf_coef"
    require(counts, lambda x: 0 <= x < 2**63, "at least 0 and below 2**63")
    require("learning_rate temperature max_grad_norm clip_coef target_kl", lambda x: 0 < x < math.inf, "above 0")
    require("gamma gae_lambda nu replay_prob staleness_coef rho", lambda x: 0 <= x <= 1, "between 0 and 1")
    require("alpha", lambda x: 0 < x <= 1, "above 0 and at most 1")
    require("maze_size", lambda x: 5 <= x <= 255, "between 5 and 255")
    require("num_envs", lambda x: x % WORLD == 0, f"a multiple of torchrun's {WORLD} processes")
    parts = f"a divisor of --num-envs {args.num_envs}" + f" / {WORLD} processes" * (WORLD > 1)
    require("num_minibatches", lambda x: args.num_envs // WORLD % x == 0, parts)
    first, why = args.batch_size * (3 if args.profile else 1), "--num-envs x --num-steps, three times with --profile"
    if args.curriculum == "robust_plr":
        require("replay_prob", lambda x: x > 0, "above 0: robust_plr learns from replayed levels only")
        fill = math.ceil(args.rho * args.buffer_size)
        first = max(first, args.batch_size * (1 + math.ceil(fill / args.num_envs)))
        why = f"robust_plr learns nothing before the buffer holds --rho x --buffer-size = {fill} levels"
    require("total_timesteps", lambda x: x >= first, f"at least {first}: {why}")
    time_limit = args.max_steps if args.env_id == "maze" else check_environment(args.env_id)
    if args.env_id == "maze":
        most = (args.maze_size - 2) ** 2 - 2
        require("num_walls", lambda x: x <= most, f"at most {most}, the cells of --maze-size {args.maze_size} but two")
    if args.curriculum == "dr":
        return
    require("buffer_size", lambda x: x >= args.num_envs, f"at least --num-envs {args.num_envs}")
    if args.score in ("gae", "max_mc"):
        require("score_transform", lambda x: x != "power", f"another: --score {args.score} can be negative")
    if args.score == "max_mc" or not args.bootstrap_timeouts:
        why = "max_mc needs whole episodes" if args.bootstrap_timeouts else "an episode that is cut off is not scored"
        require("num_steps", lambda x: x >= time_limit, f"at least {time_limit}, the time limit: {why}")


def check_environment(env_id: str) -> int:
    """Refuses what is not a MiniGrid environment whose reset seed decides the level; returns its time limit."""
    try:
        env = gym.make(env_id).unwrapped
        if not isinstance(env, MiniGridEnv):
            raise TypeError(f"it is a {type(env).__name__}")
    except Exception as error:  # or not registered, for which Gymnasium knows what was perhaps meant, or its own
        why = (str(error) or repr(error)).splitlines()[0]
        refuse(f"--env-id {env_id} must be maze or a registered MiniGrid environment: {why}")
    starts, time_limit = {}, 0
    for level in (*range(10), *range(10)):
        direction = env.reset(seed=level)[0]["direction"]
        start = (env.grid.encode().tobytes(), direction, tuple(env.agent_pos))
        if starts.setdefault(level, start) != start:
            refuse(f"--env-id {env_id} starts differently after two resets with one seed: that must decide the level.")
        time_limit = max(time_limit, env.max_steps)  # some depend on the level
    return time_limit


# ---- levels and environments ----------------------------------------------------------------------------------------


VIEW = 5  # the agent sees VIEW x VIEW cells, itself in the middle of the last row
# a cell as MiniGrid shows it: object, colour, state, packed with a zero byte into one int32, which gathers faster
EMPTY, WALL, GOAL = np.array([[1, 0, 0, 0], [2, 5, 0, 0], [8, 1, 0, 0]], np.uint8).view(np.int32)[:, 0].tolist()
AHEAD = ((0, 1), (1, 0), (0, -1), (-1, 0))  # (row, column) of a step east, south, west, north


class Mazes(NamedTuple):
    """n levels. Cells are (row, column), the border not counted; directions 0 east, 1 south, 2 west, 3 north."""

    walls: np.ndarray  # (n, height, width) bool
    goal: np.ndarray  # (n, 2) int64
    agent: np.ndarray  # (n, 2) int64
    direction: np.ndarray  # (n,) int64


def random_integers(levels: np.ndarray, count: int) -> np.ndarray:
    """(n,) int64 -> (n, count) uint64 below 2**32, decided by each level alone: SplitMix64 (Steele et al. 2014)."""
    z = np.zeros((len(levels), count), np.uint64)
    for index in (levels[:, None], np.arange(count)):  # of the level; of the draw
        z += (index + 1).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return z >> np.uint64(32)


def random_mazes(levels: np.ndarray, size: int, num_walls: int, vary: bool = False) -> Mazes:
    """The maze of each level: blocks anywhere, the goal anywhere, the agent anywhere else, no block under those two."""
    n, side, cells = len(levels), size - 2, (size - 2) ** 2
    draws = random_integers(levels, num_walls + 4)

    def below(column: Any, bound: int) -> np.ndarray:
        return (draws[:, column] * np.uint64(bound) >> np.uint64(32)).astype(np.int64)

    goal, agent, direction = below(0, cells), below(1, cells - 1), below(2, 4)
    agent += agent >= goal
    blocks = below(slice(4, None), cells)  # (n, num_walls)
    if vary:  # the first 0 to num_walls of them; the others go to a cell that is cut off
        blocks[np.arange(num_walls) >= below(3, num_walls + 1)[:, None]] = cells
    rows, walls = np.arange(n), np.zeros((n, cells + 1), bool)
    walls[rows[:, None], blocks] = True
    walls[rows, goal] = walls[rows, agent] = False
    walls = walls[:, :cells].reshape(n, side, side)
    return Mazes(walls, np.stack((goal // side, goal % side), 1), np.stack((agent // side, agent % side), 1), direction)


def named_maze(name: str, episode: int) -> Mazes:
    """One of NAMED_MAZES. Where it has several possible goals, the episodes take turns through them."""
    text = NAMED_MAZES[name]
    goals = np.argwhere(np.isin(text, ("G", "g")))
    goal = goals[episode % len(goals)]
    return Mazes((text == "#")[None], goal[None], np.argwhere(text == ">"), np.zeros(1, np.int64))


def perfect_maze(size: int, seed: int) -> Mazes:
    """A maze with one path between any two cells (depth-first search); agent and goal in random different cells."""
    rng = np.random.default_rng([size, seed])
    walls, path = np.ones((size - 2, size - 2), bool), [(0, 0)]
    while path:
        r, c = path[-1]
        walls[r, c] = False
        steps = [(r + 2 * dr, c + 2 * dc) for dr, dc in AHEAD]
        closed = [(r, c) for r, c in steps if 0 <= min(r, c) and max(r, c) < size - 2 and walls[r, c]]
        if closed:
            path.append(closed[rng.integers(len(closed))])
            walls[(r + path[-1][0]) // 2, (c + path[-1][1]) // 2] = False
        else:
            path.pop()
    goal, agent = rng.permutation(2 * np.argwhere(~walls[::2, ::2]))[:2]
    return Mazes(walls[None], goal[None], agent[None], rng.integers(4, size=1))


def shortest_paths(mazes: Mazes) -> np.ndarray:
    """(n,) int64 cells to go from the agent to the goal, by flood fill of all mazes at once; -1 if there is no path."""
    rows = np.arange(len(mazes.walls))
    free = np.pad(~mazes.walls, ((0, 0), (1, 1), (1, 1)))
    reached = np.zeros_like(free)
    reached[rows, mazes.agent[:, 0] + 1, mazes.agent[:, 1] + 1] = True
    steps = np.full(len(rows), -1)
    for distance in itertools.count():
        steps[(steps < 0) & reached[rows, mazes.goal[:, 0] + 1, mazes.goal[:, 1] + 1]] = distance
        around = [np.roll(reached, shift, axis) for shift in (-1, 1) for axis in (1, 2)]  # the borders are not free
        grown = free & np.logical_or.reduce([reached, *around])
        if (grown == reached).all():
            return steps
        reached = grown


def maze_view(cells: Tensor, position: Tensor, direction: Tensor, view: Tensor) -> Tensor:
    """(N, VIEW, VIEW, 3) uint8: what each agent sees, by column and row like MiniGrid's images."""
    seen = cells.take(position[:, None] + view.index_select(0, direction))  # (N, VIEW * VIEW)
    seen[:, VIEW // 2 * VIEW + VIEW - 1] = EMPTY  # MiniGrid does not show what the agent stands on
    return seen.view(torch.uint8).view(-1, VIEW, VIEW, 4)[..., :3]


def maze_step(
    actions: Tensor, cells: Tensor, position: Tensor, direction: Tensor, steps: Tensor,
    max_steps: int, turned: Tensor, moved: Tensor, view: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """A step of N mazes, see MazeEnvs: as a function of tensors, which torch.compile can take whole."""
    what = torch.add(actions, direction, alpha=7)
    direction = turned.take(what)
    wanted = position + moved.take(what)
    found = cells.take(wanted)  # an agent that stays finds its own cell: empty, until it reached the goal
    position = torch.where(found == WALL, position, wanted)
    terminated = found == GOAL
    steps = steps + 1
    reward = ((1 - 0.9 * (steps / max_steps)) * terminated).float()  # float64 until here, as in Python
    image = maze_view(cells, position, direction, view)
    return image, position, direction, steps, reward, terminated, steps >= max_steps


class MazeEnvs(gym.vector.VectorEnv):
    """N mazes stepped at once on any device: a Gymnasium VectorEnv of tensors, without autoreset. Equal to MiniGridEnvs
    with agent_view_size=5 and see_through_walls=True. `reset` starts seed[i], or options["mazes"][i], in environment i
    where options["reset_mask"][i]. actions (N,) int64, rewards (N,) float32."""

    def __init__(
        self, num_envs: int, device: torch.device, size: int = 15, max_steps: int = 250,
        num_walls: int = 25, vary_num_walls: bool = False, compile: bool = False,
    ):  # fmt: skip
        self.num_envs, self.device, self.max_steps = num_envs, device, max_steps
        image = gym.spaces.Box(0, 255, (VIEW, VIEW, 3), np.uint8)
        self.single_observation_space = gym.spaces.Dict({"direction": gym.spaces.Discrete(4), "image": image})
        self.single_action_space = gym.spaces.Discrete(7)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)
        self.metadata = {"autoreset_mode": gym.vector.AutoresetMode.DISABLED}
        # all maps one after another, each with VIEW - 1 cells of wall around it so that no view leaves it
        self.width = width = size - 2 + 2 * (VIEW - 1)
        self.cells = torch.full((num_envs, width * width), WALL, dtype=torch.int32, device=device)
        self.position, self.direction = torch.zeros((2, num_envs), dtype=torch.int64, device=device)  # in all cells
        self.steps = torch.zeros(num_envs, dtype=torch.float64, device=device)
        # by direction and action (left, right, forward, four that do nothing): turned, moved (28,); view (4, 25)
        ahead = [row * width + column for row, column in AHEAD]
        turned = [(d + turn) % 4 for d in range(4) for turn in (-1, 1, 0, 0, 0, 0, 0)]
        moved = [ahead[d] * (action == 2) for d in range(4) for action in range(7)]
        view = [[ahead[d] * (VIEW - 1 - row) + ahead[(d + 1) % 4] * (column - VIEW // 2)
                 for column in range(VIEW) for row in range(VIEW)] for d in range(4)]  # fmt: skip
        self.tables = [torch.tensor(x, device=device) for x in (turned, moved, view)]
        self.maze_step = torch.compile(maze_step, options={"size_asserts": False}) if compile else maze_step
        self.generate = lambda levels: random_mazes(levels, size, num_walls, vary_num_walls)
        self.known: dict[int, tuple[Tensor, ...]] = {}  # level starts already made, at most 8192 and this reset's

    def encode(self, mazes: Mazes) -> list[Tensor]:
        """Cells (n, width * width) int32, position in the map (n,) and direction (n,) int64 of n level starts."""
        border, rows = VIEW - 1, np.arange(len(mazes.walls))
        cells = np.full((len(rows), self.width, self.width), WALL, np.int32)
        cells[:, border:-border, border:-border][~mazes.walls] = EMPTY
        cells[rows, border + mazes.goal[:, 0], border + mazes.goal[:, 1]] = GOAL
        agent = (border + mazes.agent[:, 0]) * self.width + border + mazes.agent[:, 1]
        return [torch.from_numpy(x) for x in (cells.reshape(-1, self.width**2), agent, mazes.direction)]

    def reset(self, *, seed: Any = None, options: dict | None = None) -> tuple[Obs, dict]:
        options = options or {}
        rows = np.flatnonzero(options.get("reset_mask", np.ones(self.num_envs, bool)))
        if "mazes" in options:
            start = self.encode(Mazes(*(part[rows] for part in options["mazes"])))
        else:
            seed = self.np_random.integers(FIRST_TEST_LEVEL) if seed is None else seed
            levels = (np.arange(seed, seed + self.num_envs) if np.ndim(seed) == 0 else np.asarray(seed))[rows].tolist()
            new = [level for level in dict.fromkeys(levels) if level not in self.known]
            if len(self.known) + len(new) > 8192:
                self.known, new = {}, list(dict.fromkeys(levels))
            if new:
                self.known |= zip(new, zip(*self.encode(self.generate(np.array(new)))))
            start = [torch.stack(x) for x in zip(*map(self.known.get, levels))]
            start = start or self.encode(self.generate(rows))  # of no environment at all
        start, rows = [x.to(self.device) for x in start], torch.from_numpy(rows).to(self.device)
        self.cells[rows], self.position[rows], self.steps[rows] = start[0], start[1] + rows * self.width**2, 0
        self.direction = self.direction.index_copy(0, rows, start[2])  # not in place: `step` has given it away
        image = maze_view(self.cells, self.position, self.direction, self.tables[2])
        return {"image": image, "direction": self.direction}, {}

    def step(self, actions: Tensor) -> tuple[Obs, Tensor, Tensor, Tensor, dict]:
        state = (self.cells, self.position, self.direction, self.steps, self.max_steps, *self.tables)
        state = self.maze_step(torch.as_tensor(actions, device=self.device), *state)
        image, self.position, self.direction, self.steps, *results = state
        return {"image": image, "direction": self.direction}, *results, {}

    def frame(self) -> np.ndarray:
        """(H, W, 3) uint8: the first environment as the package draws it."""
        edge, (row, column) = VIEW - 2, divmod(int(self.position[0]), self.width)  # walls beyond the border
        cells = self.cells[0].view(self.width, -1)[edge:-edge, edge:-edge].cpu().numpy()
        grid = Grid(*cells.shape)
        for r, c in np.argwhere(cells != EMPTY).tolist():
            grid.set(c, r, Goal() if cells[r, c] == GOAL else Wall())
        return grid.render(8, (column - edge, row - edge), int(self.direction[0]))


class TensorEnvs(gym.vector.VectorWrapper):
    """A package's environments as the training loop sees them: tensors, and no mission, as the agent does not read."""

    def __init__(self, envs: gym.vector.VectorEnv, device: torch.device):
        super().__init__(envs)
        self.device = device

    def observe(self, obs: dict[str, Any]) -> Obs:
        return {key: torch.from_numpy(obs[key]).to(self.device) for key in ("image", "direction")}

    def reset(self, *, seed: Any = None, options: dict | None = None) -> tuple[Obs, dict]:
        obs, infos = self.env.reset(seed=seed, options=options)
        return self.observe(obs), infos

    def step(self, actions: Tensor) -> tuple[Obs, Tensor, Tensor, Tensor, dict]:
        obs, *results, infos = self.env.step(actions.cpu().numpy())
        reward, terminated, truncated = (torch.from_numpy(x).to(self.device) for x in results)
        return self.observe(obs), reward.float(), terminated, truncated, infos

    def frame(self) -> np.ndarray:
        return self.env.envs[0].unwrapped.get_frame(highlight=False, tile_size=8)


def make_minigrid(env_id: str, num_envs: int, device: torch.device, **options: Any) -> TensorEnvs:
    off = {"autoreset_mode": gym.vector.AutoresetMode.DISABLED}
    return TensorEnvs(gym.make_vec(env_id, num_envs, "sync", vector_kwargs=off, **options), device)


def make_envs(args: Args, num_envs: int, device: torch.device) -> gym.vector.VectorEnv:
    """To train on something else, return another VectorEnv with autoreset off whose reset seed is the level."""
    if args.env_id != "maze":
        return make_minigrid(args.env_id, num_envs, device)
    return MazeEnvs(num_envs, device, args.maze_size, args.max_steps, args.num_walls, args.vary_num_walls, args.compile)


# ---- network --------------------------------------------------------------------------------------------------------


def head(size: int, std: float) -> nn.Sequential:
    layers = nn.Sequential(nn.Linear(256, 32), nn.Tanh(), nn.Linear(32, size))
    for layer, gain in ((layers[0], math.sqrt(2)), (layers[2], std)):
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.constant_(layer.bias, 0.0)
    return layers


def episode_rows(starts: np.ndarray) -> tuple[int, np.ndarray]:
    """Lays the episodes of a rollout one after another into N rows of about the same length, for one call of the LSTM.
    A step is left free between two, in which it forgets (see Agent). starts: (T, N) bool, obs[t] begins an episode.
    Returns the length L of the rows and the place l * N + row of each step in them, (T * N,) int64."""
    T, N = starts.shape
    first = np.flatnonzero(starts.T | (np.arange(T) == 0))  # steps of each episode, one environment after another
    length = np.diff(np.append(first, T * N))
    longest_first = np.argsort(-length, kind="stable")
    rows, put = [(0, row) for row in range(N)], []  # a heap of (steps taken, row)
    for steps in length[longest_first].tolist():  # each to the row that is the shortest so far
        put.append(heapq.heapreplace(rows, (rows[0][0] + steps + 1, rows[0][1])))
    t, row = np.array(put)[longest_first.argsort()].repeat(length, axis=0).T  # of its episode's start, for each step
    place = (t + np.arange(T * N) - first.repeat(length)) * N + row
    return max(rows)[0] - 1, place.reshape(N, T).T.ravel()


class Agent(nn.Module):
    def __init__(self, envs: gym.vector.VectorEnv, precision: str = "fp32"):
        super().__init__()
        h, w, c = self.view = envs.single_observation_space["image"].shape
        self.bf16 = precision == "bf16"
        self.conv = nn.Conv2d(c, 16, kernel_size=3)
        self.direction = nn.Embedding(4, 5)
        nn.init.uniform_(self.direction.weight, -0.5, 0.5)  # as the weights of dcd's linear layer
        inputs = 16 * (h - 2) * (w - 2) + 5 + 1  # of convolution and direction; the last input: 1 between two episodes
        self.lstm = nn.LSTM(math.ceil(inputs / 32) * 32, 256)  # zeros in between: bf16 is faster in whole tiles
        for name, parameter in self.lstm.named_parameters():
            nn.init.orthogonal_(parameter, 1.0) if "weight" in name else nn.init.constant_(parameter, 0.0)
        # that shuts the gates i and f: c = 0, h = 0, and no gradient passes, not even to these weights, so they stay
        self.lstm.weight_ih_l0.data[: 2 * 256, -1] = -1e4
        self.actor = head(int(envs.single_action_space.n), std=0.01)
        self.critic = head(1, std=1.0)

    def conv_matrix(self) -> list[Tensor]:
        """The convolution of pixels / 10 as a matrix, faster for so few: weight (75, 144), bias (144,)."""
        h, w, c = self.view
        pixels = torch.eye(h * w * c, device=self.conv.weight.device).view(-1, h, w, c).permute(0, 3, 1, 2)  # "bcwh"
        weight = nn.functional.conv2d(pixels, self.conv.weight / 10.0).flatten(1)
        return [weight, self.conv.bias.repeat_interleave((h - 2) * (w - 2))]

    def step_weights(self) -> list[Tensor]:
        """For `act`, once per rollout: weight and bias of the convolution, the LSTM (i, f, o, g), the heads' layers."""
        with torch.no_grad():
            weights = self.conv_matrix()
            lstm = torch.cat((self.lstm.weight_ih_l0[:, : weights[0].shape[1] + 5], self.lstm.weight_hh_l0), dim=1)
            for x in (lstm, self.lstm.bias_ih_l0 + self.lstm.bias_hh_l0):
                i, f, g, o = x.chunk(4)
                weights.append(torch.cat((i, f, o, g)).t().contiguous())
            weights = [x.bfloat16() for x in weights] if self.bf16 else weights  # what `act` does in autocast
            first, second = zip(self.actor[::2], self.critic[::2])
            for layers, join in ((first, torch.cat), (second, lambda x: torch.block_diag(*x))):
                weights += [join([x.weight for x in layers]).t().contiguous(), torch.cat([x.bias for x in layers])]
            return weights

    @torch.no_grad()
    def act(self, obs: Obs, state: tuple[Tensor, ...], weights: list[Tensor], clocks: Tensor) -> tuple[Any, ...]:
        """A step of N environments: action, value (N,), logits (N, actions) not normalised, state h and c (N, 256)."""
        conv, conv_bias, lstm, lstm_bias, first, first_bias, second, second_bias = weights
        with torch.autocast(conv.device.type, torch.bfloat16, enabled=self.bf16):
            x = torch.relu(torch.addmm(conv_bias, obs["image"].flatten(1).float(), conv))
            x = torch.cat((x, self.direction(obs["direction"]), state[0]), dim=1)
            gates = torch.addmm(lstm_bias, x, lstm).float()
        i, f, o = torch.sigmoid(gates[:, : 3 * 256]).chunk(3, dim=1)
        c = f * state[1] + i * torch.tanh(gates[:, 3 * 256 :])
        h = o * torch.tanh(c)
        out = torch.addmm(second_bias, torch.tanh(torch.addmm(first_bias, h, first)), second)
        logits = out[:, :-1]
        # of clocks that ring after times of Exp(1) / p, the first is each with probability p
        return (logits.exp() / clocks).argmax(-1), out[:, -1], logits, (h, c)

    def unroll(self, image: Tensor, direction: Tensor, starts: np.ndarray) -> tuple[Tensor, Tensor]:
        """A whole rollout, to learn: (T, N, 5, 5, 3), (T, N), (T, N) -> the LSTM's outputs in `episode_rows` (P, 256);
        where in them each step is (T * N,). bf16 on CPUs only: a GPU's autocast runs LSTMs in float16, too coarse."""
        length, where = episode_rows(starts)
        where, (conv, conv_bias) = torch.from_numpy(where).to(image.device), self.conv_matrix()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16 and not image.is_cuda):
            x = torch.relu(torch.addmm(conv_bias, image.flatten(0, 1).flatten(1).float(), conv))
            x = torch.cat((x, self.direction(direction.flatten()).to(x.dtype)), dim=1)
            x = nn.functional.pad(x, (0, self.lstm.input_size - x.shape[1]))
            free = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)[-1]  # the input between two episodes
            rows = free.repeat(length * starts.shape[1], 1).index_copy_(0, where, x).view(length, -1, len(free))
            return self.lstm(rows)[0].flatten(0, 1).float(), where

    def evaluate_actions(self, hidden: Tensor, where: Tensor, action: Tensor) -> tuple[Tensor, ...]:
        """hidden (P, 256) and where (B,) from `unroll`, action (B,) -> log-probability, entropy and value (B,)."""
        logits = self.actor(hidden).index_select(0, where).log_softmax(-1)
        logprob = logits.gather(-1, action[:, None]).squeeze(-1)
        return logprob, -(logits.exp() * logits).sum(-1), self.critic(hidden).squeeze(-1).index_select(0, where)


# ---- curriculum metrics and evaluation ------------------------------------------------------------------------------


def level_metrics(args: Args, sampler: LevelSampler, levels: np.ndarray, replay: bool) -> dict[str, float]:
    """Quantiles of the buffer's scores; for mazes, what the levels (n,) of at most 1024 episodes are like, by kind."""
    scores = sampler.scores[sampler.seen]
    metrics = {f"score_q{q}": float(np.percentile(scores, q)) if len(scores) else 0.0 for q in (10, 50, 90)}
    if args.env_id == "maze":
        played, each = np.unique(levels[:1024], return_inverse=True)
        each = each if replay else slice(None)  # a replayed level counts as often as it was drawn
        mazes = random_mazes(played, args.maze_size, args.num_walls, args.vary_num_walls)
        paths, walls = shortest_paths(mazes)[each], mazes.walls.sum((1, 2))[each]
        solvable = paths > 0
        for name, x in (("walls", walls), ("shortest_path", paths[solvable]), ("solvable", solvable)):
            mean = float(x.mean()) if x.size else math.nan
            metrics |= {f"{name}_new": math.nan if replay else mean, f"{name}_replayed": mean if replay else math.nan}
    return metrics


def play(agent: Agent, envs: gym.vector.VectorEnv, reset: dict[str, Any], film: list | None = None) -> np.ndarray:
    """Plays one episode in each environment to its end with the stochastic policy: returns (N,) float64. reset: what
    starts the episodes (again, uncounted, where done). film: a list for the first one's frames."""
    obs, _ = envs.reset(**reset)
    state = tuple(torch.zeros((envs.num_envs, 256), device=obs["direction"].device) for _ in range(2))
    clocks = torch.zeros((envs.num_envs, int(envs.single_action_space.n)), device=obs["direction"].device)
    playing, returns, weights = np.ones(envs.num_envs, bool), np.zeros(envs.num_envs), agent.step_weights()
    while playing.any():
        action, _, _, state = agent.act(obs, state, weights, clocks.exponential_())
        obs, reward, terminations, truncations, _ = envs.step(action)
        if film is not None and playing[0]:
            film.append(Image.fromarray(envs.frame()))
        returns += reward.cpu().numpy() * playing
        playing &= ~(done := (terminations | truncations).cpu().numpy())
        if done.any():
            obs, _ = envs.reset(**reset | {"options": reset.get("options", {}) | {"reset_mask": done}})
    return returns


def evaluation_environments(args: Args, device: torch.device) -> Iterator[tuple[str, gym.vector.VectorEnv, dict]]:
    """Name, eval_episodes environments, and their reset to levels that are the same for every run: named and perfect
    mazes, time limit 2 * size ** 2, and two of the package's; for another --env-id its levels never trained on."""
    n = args.eval_episodes
    levels = {"seed": list(range(FIRST_TEST_LEVEL, FIRST_TEST_LEVEL + n))}
    if args.env_id != "maze":
        yield args.env_id, make_minigrid(args.env_id, n, device), levels
        return
    for name in (*NAMED_MAZES, "PerfectMaze21"):
        mazes = [named_maze(name, k) if name in NAMED_MAZES else perfect_maze(21, k) for k in range(n)]
        mazes = Mazes(*map(np.concatenate, zip(*mazes)))
        size = mazes.walls.shape[1] + 2
        yield name, MazeEnvs(n, device, size, 2 * size**2), {"options": {"mazes": mazes}}
    for name in ("SimpleCrossingS11N5", "FourRooms"):
        yield name, make_minigrid(f"MiniGrid-{name}-v0", n, device, agent_view_size=VIEW), levels


def evaluate(agent: Agent, args: Args, device: torch.device, video: Path | None = None) -> dict[str, Any]:
    """Plays eval_episodes episodes in each evaluation environment, with a random stream of its own. Solved: a return
    above 0. IQM: the mean of the environments' middle half. video: folder for GIFs of first episodes."""
    returns: dict[str, np.ndarray] = {}
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(int(np.random.default_rng([args.seed, 2]).integers(2**62)))
        for name, envs, reset in evaluation_environments(args, device):
            returns[name] = play(agent, envs, reset, film := [] if video else None)
            envs.close()
            if video:
                video.mkdir(parents=True, exist_ok=True)
                film = film[::-2][::-1]  # every second frame, the last one included
                film[0].save(video / f"{name}.gif", save_all=True, append_images=film[1:], duration=100, loop=0)
    solved = {name: float((x > 0).mean()) for name, x in returns.items()}
    rates, quarter = np.sort(list(solved.values())), len(solved) // 4
    result = {"solved_mean": float(rates.mean()), "solved_iqm": float(rates[quarter : len(rates) - quarter].mean())}
    result |= {"return_mean": float(np.mean(list(returns.values())))} | {f"solved_{k}": x for k, x in solved.items()}
    result |= {f"return_{name}": float(x.mean()) for name, x in returns.items()}
    return result | {"episodes": {name: x.tolist() for name, x in returns.items()}}


def level_pictures(args: Args, sampler: LevelSampler, iteration: int) -> dict[str, np.ndarray]:
    """(H, W, 3) uint8 of four levels each: the highest scores, the likeliest to be replayed, and freshly drawn ones."""
    levels = {"fresh": np.random.default_rng([args.seed, 3, iteration]).integers(FIRST_TEST_LEVEL, size=4)}
    if best := min(4, sampler.num_seen):
        levels["highest_score"] = sampler.levels[np.argsort(np.where(sampler.seen, -sampler.scores, np.inf))[:best]]
        levels["highest_weight"] = sampler.levels[np.argsort(-sampler.weights())[:best]]
    envs = make_envs(args, 1, torch.device("cpu"))
    frames = {name: [envs.frame() for level in x.tolist() if envs.reset(seed=[level])] for name, x in levels.items()}
    return {name: np.concatenate(pictures, axis=1) for name, pictures in frames.items()}


# ---- run directory --------------------------------------------------------------------------------------------------


def fingerprint(state: Any) -> str:
    """SHA-256 of a nested state. Two runs with the same fingerprint are the same run."""
    state = default_convert(state)
    text = json.dumps(state, sort_keys=True, default=lambda x: sha256(x.cpu().numpy().tobytes()).hexdigest())
    return sha256(text.encode()).hexdigest()


def write_file(path: Path, content: Any) -> None:
    """bytes; else .pt for torch.load(weights_only=True), or JSON. A crash leaves the old file or the new one."""
    if path.suffix == ".pt":
        torch.save(default_convert(content), buffer := io.BytesIO())
        content = buffer.getvalue()
    with open(path.with_suffix(".tmp"), "wb") as file:
        file.write(content if isinstance(content, bytes) else json.dumps(content, indent=2).encode())
        file.flush()
        os.fsync(file.fileno())
    os.replace(path.with_suffix(".tmp"), path)


def cut_rows(path: Path, global_step: int) -> None:
    """Leaves a CSV file's rows up to global_step. Those after it, and one that was cut short, will be written again."""
    header, *lines = path.read_bytes().splitlines(keepends=True) if path.exists() else [b""]
    kept = [line for line in lines if line.endswith(b"\n") and int(line.split(b",")[0]) <= global_step]
    write_file(path, (header + b"".join(kept)) if kept else b"")


def make_run_dir(args: Args) -> Path:
    default = f"runs/{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}"
    run_dir = Path(args.resume or args.run_dir or default)
    if RANK == 0 and not args.resume and (run_dir / "progress.csv").exists():
        refuse(f"--run-dir {run_dir} already holds a run: choose another directory, or --resume {run_dir}.")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if RANK == 0:
            write_file(run_dir / "args.json", asdict(args))
    except OSError as error:
        refuse(f"--run-dir {run_dir} cannot be written: {error.strerror}.")
    return run_dir


def load_run(flag: str, run_dir: Path) -> tuple[Args, dict[str, Any]]:
    """The flags of the run in --evaluate or --resume RUN_DIR, changed by the command line; its checkpoint."""
    try:
        checkpoint = torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=True)
        if checkpoint["format"] != FORMAT:
            raise ValueError(f"the format of its checkpoint is {checkpoint['format']!r}, this script's is {FORMAT!r}")
        saved = {f.name: checkpoint["args"][f.name] for f in fields(Args) if f.init and f.name in checkpoint["args"]}
        defaults = Args(**saved)
    except Exception as error:  # whatever a damaged file makes of torch.load
        refuse(f"--{flag} {run_dir} is not a run that can be loaded: {(str(error) or repr(error)).splitlines()[0]}")
    args = replace(tyro.cli(Args, default=defaults), **{flag: str(run_dir)})  # and derives the sizes anew
    if flag == "resume":
        for name, value in saved.items():
            if getattr(args, name) != value and name not in FREE_ON_RESUME:
                refuse(f"--{name.replace('_', '-')} {getattr(args, name)} must be {value}, as in the run to resume.")
        # a run that was killed after its last checkpoint has only its result left to write
        if args.num_iterations < checkpoint["iteration"] + (run_dir / "result.json").exists():
            refuse(f"--total-timesteps {args.total_timesteps} must be raised: {run_dir} is finished.")
    return args, checkpoint


def choose_device(args: Args) -> torch.device:
    torch.backends.cudnn.deterministic = args.torch_deterministic
    # without these, cuDNN's LSTM and compiled kernels need not repeat bit for bit
    os.environ |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:2", "TORCHINDUCTOR_DETERMINISTIC": "1"} | os.environ
    # cuDNN would use TF32 by default: fp32 means fp32 here. With bf16 it is what a GPU learns in
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.precision != "fp32"
    cuda = args.cuda and torch.cuda.is_available()
    if WORLD > 1:
        store, *_ = next(dist.rendezvous("env://"))  # a restarted group would find the last one's addresses in it
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=RANK, world_size=WORLD)
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        return torch.device("cuda", torch.cuda.current_device())
    with contextlib.suppress(AttributeError, OSError):
        # glibc hands large tensors back to the kernel: keeping the memory makes the update up to twice as fast
        for option, value in ((-4, 0), (-1, -1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(option, value)
    return torch.device("cpu")


def evaluate_run(args: Args, checkpoint: dict[str, Any]) -> None:
    """--evaluate RUN_DIR: prints and writes an evaluation of a saved run. Flags that are not given are that run's."""
    path = Path(args.evaluate, f"evaluation_{int(time.time())}.json")
    device = choose_device(args)
    agent = Agent(make_envs(args, 1, device), args.precision).to(device)
    agent.load_state_dict(checkpoint["agent"])
    result = evaluate(agent, args, device, path.parent / "videos" / path.stem if args.capture_video else None)
    write_file(path, result | checkpoint["totals"] | {"global_step": checkpoint["global_step"], "args": asdict(args)})
    print("\n".join(f"{key}: {value:.3f}" for key, value in result.items() if key.startswith("solved_")))
    print(f"{args.eval_episodes} episodes in each environment, every one in {path}")


# ---- torchrun -------------------------------------------------------------------------------------------------------
# A rank plays its part of the environments. Rewards, ends of episodes and values are shared, and from there on every
# rank does the same for all N environments: GAE, scores, curriculum. Gradients are added up.


def share(x: Tensor) -> Tensor:
    """(..., n) of this rank's environments -> (..., N) of all ranks'."""
    if WORLD == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(WORLD)]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts, dim=-1)


def add_gradients(agent: nn.Module) -> None:
    if WORLD > 1:
        gradients = [p.grad for p in agent.parameters()]
        dist.all_reduce(flat := torch.cat([x.reshape(-1) for x in gradients]))  # one message
        for x, total in zip(gradients, flat.split([x.numel() for x in gradients])):
            x.copy_(total.view(x.shape))


# ---- training -------------------------------------------------------------------------------------------------------


def main() -> None:
    args, checkpoint = tyro.cli(Args), None
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and Path(args.run_dir or "", "checkpoint.pt").exists():
        args.resume = args.resume or args.run_dir  # torchrun --max-restarts has started it again
    if args.evaluate or args.resume:
        args, checkpoint = load_run("evaluate" if args.evaluate else "resume", Path(args.evaluate or args.resume))
    check_args(args)
    if args.evaluate:
        return evaluate_run(args, checkpoint)
    if args.track and importlib.util.find_spec("wandb") is None:
        refuse("--track needs Weights and Biases: pip install wandb.")
    run_dir = make_run_dir(args)
    threading.excepthook = lambda _: None  # TensorBoard's: what its writing thread meets, the next write says
    try:
        train(args, run_dir, checkpoint)
        if WORLD > 1:  # gloo's threads have aborted a process as it ended, after its work: leave without them
            sys.stdout.flush()
            os._exit(0)
    except Exception as error:  # a full disk, a dead environment, a loss that is not finite
        with contextlib.suppress(OSError):
            (run_dir / f"error_{RANK}.txt").write_text(traceback.format_exc())
        what = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(":. ")
        refuse(f"{what}. {run_dir}/error_{RANK}.txt has details; to go on: --resume {run_dir}", status=1)


def train(args: Args, run_dir: Path, checkpoint: dict[str, Any] | None) -> None:
    # ==== setup ====
    if RANK == 0:
        if args.track:
            import wandb

            wandb.init(sync_tensorboard=True, config=asdict(args), name=run_dir.name, dir=run_dir, save_code=True)
        writer = SummaryWriter(run_dir, purge_step=checkpoint["global_step"] + 1 if checkpoint else None)
        table = "\n".join(f"|{key}|{value}|" for key, value in asdict(args).items())
        writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}")
    device = choose_device(args)
    device_name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    torch.manual_seed(args.seed)  # network, actions, minibatches; sampler and evaluation have streams of their own
    T, N, n = args.num_steps, args.num_envs, args.num_envs // WORLD
    here = slice(RANK * n, (RANK + 1) * n)  # this rank's environments: all N of them without torchrun
    envs = make_envs(args, n, device)
    agent = Agent(envs, args.precision).to(device)
    act = torch.compile(agent.act) if args.compile else agent.act
    optimizer = optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    names = "num_envs seed score_transform temperature staleness_coef replay_schedule rho alpha".split()
    options = {name: getattr(args, name) for name in names} | {"level_space": FIRST_TEST_LEVEL}
    plr = {"buffer_size": args.buffer_size, "nu": 1 - args.replay_prob}  # dr has no buffer: every level is a new one
    sampler = LevelSampler(**options, **({"curriculum": "uniform"} if args.curriculum == "dr" else plr))

    # ==== storage: T = num_steps, N = num_envs, n of them on this rank ====
    num_actions = int(envs.single_action_space.n)
    images = torch.zeros((T, n) + envs.single_observation_space["image"].shape, dtype=torch.uint8, device=device)
    directions, actions = torch.zeros((2, T, n), dtype=torch.int64, device=device)
    logits = torch.zeros((T, n, num_actions), device=device)  # float32, after the rollout log-probabilities
    rollout = torch.zeros((2, T + 1, n), device=device)  # float32; the last row is of what follows the rollout
    own_rewards, own_values = rollout
    dones = np.zeros((T, N), bool)  # dones[t], set before step t: obs[t] begins an episode
    levels = np.zeros((T, N), np.int64)  # levels[t]: the level that obs[t] belongs to
    clocks = torch.zeros((N, num_actions), device=device)  # noise that decides the actions, the same on every rank

    def run_state() -> dict[str, Any]:
        """What the fingerprint is taken of: all that training has made, and all that decides how it would go on."""
        cuda_rng = torch.cuda.get_rng_state() if device.type == "cuda" else None
        state = {"agent": agent.state_dict(), "optimizer": optimizer.state_dict(), "sampler": sampler.state_dict()}
        return state | {"torch_rng": torch.get_rng_state(), "cuda_rng": cuda_rng}

    profiler, running, spent = torch.profiler.profile(), contextlib.ExitStack(), Counter()  # seconds by phase

    def phase(name: str) -> None:
        """With --profile: what follows, the GPU's work included, is this phase's time and a range of the trace."""
        if args.profile and iteration > 1:  # the first one warms up
            if device.type == "cuda":
                torch.cuda.synchronize()
            running.close()  # and with it the phase before
            start = time.perf_counter()
            running.callback(lambda: spent.update({name: time.perf_counter() - start}))
            if last:  # and traced: a range costs some 15 us
                running.enter_context(torch.profiler.record_function(name))

    def log(path: Path, row: dict[str, Any]) -> None:
        """A row for TensorBoard and, its names without their group, for a CSV file; the first row makes the header."""
        for key, value in row.items():
            if not math.isnan(value):
                writer.add_scalar(key, value, global_step)
        columns = {"global_step": global_step, "wall_seconds": time.time() - start_time}
        columns |= {key.split("/")[1]: value for key, value in row.items()}
        with open(path, "a") as file:
            cells = (f"{x:.6g}" if isinstance(x, float) else str(x) for x in columns.values())
            file.writelines(",".join(x) + "\n" for x in ([columns, cells] if file.tell() == 0 else [cells]))

    def mean(x: Tensor) -> Tensor:
        """This rank's part of the mean over a minibatch of all ranks."""
        return x.sum() / (args.batch_size // args.num_minibatches)

    def save_checkpoint() -> None:
        """Every rollout starts fresh episodes, so there are no environments to save."""
        state = run_state()
        mark = torch.tensor([int(fingerprint(state)[:15], 16)])
        if (share(mark) != mark).any():
            raise RuntimeError(f"the ranks' states differ after iteration {iteration}")
        state |= {"seconds": [time.time() - start_time, train_seconds], "global_step": global_step, "format": FORMAT}
        state |= {"iteration": iteration, "args": asdict(args), "totals": totals}
        if RANK == 0:
            write_file(run_dir / "checkpoint.pt", state)

    def require_finite(x: Tensor, what: str) -> None:
        """Ends the run, with what led there in a file; the last checkpoint is from before."""
        if not x.isfinite().all():
            what_led = {"images": images, "directions": directions, "actions": actions, "logits": logits}
            what_led |= {"rewards": own_rewards, "values": own_values, "levels": levels, "agent": agent.state_dict()}
            write_file(run_dir / f"failed_{RANK}.pt", what_led)
            raise FloatingPointError(f"{what} of iteration {iteration} is not finite, see failed_{RANK}.pt")

    # ==== start or resume ====
    iteration, global_step, train_seconds, start_time = 0, 0, 0.0, time.time()  # train_seconds: without evaluation
    totals = {"gradient_updates": 0, "untrained_steps": 0}
    if checkpoint:
        for name, part in (("agent", agent), ("optimizer", optimizer), ("sampler", sampler)):
            part.load_state_dict(checkpoint[name])
        torch.set_rng_state(checkpoint["torch_rng"])
        if device.type == "cuda" and checkpoint["cuda_rng"] is not None:
            torch.cuda.set_rng_state(checkpoint["cuda_rng"])
        iteration, global_step, (seconds, train_seconds) = map(checkpoint.get, ("iteration", "global_step", "seconds"))
        start_time, totals = start_time - seconds, checkpoint["totals"]
        for name in ("progress.csv", "evaluations.csv") if RANK == 0 else ():
            cut_rows(run_dir / name, global_step)
        (run_dir / "result.json").unlink(missing_ok=True)

    stopped: list[int] = []  # signals: the first ends the run after its iteration, a second one at once
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, _: stopped.append(number) or signal.signal(number, signal.SIG_DFL))
    if not checkpoint:
        save_checkpoint()
    if RANK == 0:
        print(f"{args.env_id}, {args.curriculum}, seed {args.seed}: {run_dir}\ntraining on {device_name}", flush=True)
    shown_at, evaluation, stopping = (global_step, train_seconds), None, False  # shown_at: at the last printed line

    while iteration < args.num_iterations and not stopping:
        iteration += 1
        iteration_start, last = time.time(), iteration == args.num_iterations
        if args.profile and last:
            shares = (f"{name} {x:.4g} s ({x / spent.total():.1%})" for name, x in spent.most_common())
            print(f"profile to iteration {iteration - 1}, rank {RANK}: {', '.join(shares)}", flush=True)
            profiler.start()
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = (1 - (iteration - 1) / args.num_iterations) * args.learning_rate

        # ==== rollout ====
        # Algorithm 1: sample the replay decision d, one for all environments
        replay = sampler.decide_replay()
        # d = 0: a new level from the generator for each environment. d = 1: a level each from the buffer, by P_replay
        sampler.drop(next_done := np.ones(N, bool))  # the episodes that the last rollout cut off
        next_levels = sampler.next_levels(next_done, replay)  # (N,) int64
        next_obs, _ = envs.reset(seed=next_levels[here].tolist())
        lstm_state = tuple(torch.zeros((n, 256), device=device) for _ in range(2))
        step_weights = agent.step_weights()
        episode_return, episode_length = np.zeros(N), np.zeros(N, np.int64)
        finished: list[tuple[float, int]] = []  # (return, length) of the episodes that ended
        for step in range(args.num_steps):
            global_step += args.num_envs
            phase("inference")
            images[step], directions[step] = next_obs["image"], next_obs["direction"]
            dones[step], levels[step] = next_done, next_levels
            noise = clocks.exponential_()[here]
            actions[step], own_values[step], logits[step], lstm_state = act(next_obs, lstm_state, step_weights, noise)
            phase("environment")
            next_obs, reward, terminations, truncations, _ = envs.step(actions[step])
            own_rewards[step] = reward
            phase("transfer")
            transfer = share(torch.stack((reward, (terminations | truncations).float()))).cpu().numpy()  # one per step
            phase("rest")
            next_done = transfer[1] > 0  # (N,) bool, of all ranks
            episode_return += transfer[0]
            episode_length += 1
            if next_done.any():
                if args.bootstrap_timeouts and (timeouts := truncations & ~terminations).any():
                    final_value = act(next_obs, lstm_state, step_weights, noise)[1]
                    own_rewards[step] += args.gamma * final_value * timeouts
                phase("sampler")
                finished += zip(episode_return[next_done].tolist(), episode_length[next_done].tolist())
                sampler.record_returns(next_levels[next_done], episode_return[next_done])
                episode_return[next_done] = episode_length[next_done] = 0
                # d = 0: the same level again. d = 1: another one from the buffer (after the last step too, as in dcd)
                next_levels = sampler.next_levels(next_done, replay, None if replay else next_levels)
                phase("environment")
                next_obs, _ = envs.reset(seed=next_levels[here].tolist(), options={"reset_mask": next_done[here]})
                keep = torch.from_numpy(~next_done[here]).to(device)[:, None]
                lstm_state = tuple(x * keep for x in lstm_state)

        # ==== advantages (GAE) ====
        phase("rest")
        logits = logits.log_softmax(-1)  # of the whole rollout at once
        logprobs = logits.gather(-1, actions[..., None]).squeeze(-1)
        ended = np.concatenate((dones[1:], next_done[None]))  # (T, N): step t ended its episode
        ends = torch.from_numpy(ended).float()
        if args.bootstrap_timeouts:
            own_values[T] = act(next_obs, lstm_state, step_weights, noise)[1]
        rewards, values = share(rollout).cpu()
        rewards, next_values, values = rewards[:-1], values[1:] * (1 - ends), values[:-1]
        deltas = rewards + args.gamma * next_values - values
        advantages, lastgaelam, decay = torch.zeros_like(rewards), 0.0, args.gamma * args.gae_lambda * (1 - ends)
        for t in reversed(range(args.num_steps)):
            advantages[t] = lastgaelam = deltas[t] + decay[t] * lastgaelam
        returns = advantages + values
        require_finite(advantages, "an advantage")

        # ==== level scores (Algorithm 1: the score S and the buffer's update, neither of which needs the policy's) ====
        # (T, N), averaged over each episode by the sampler. Yours is one more line: everything above is at hand.
        if args.score == "max_mc":  # regret, estimated with the best return so far on the level
            step_scores = torch.from_numpy(sampler.best_returns(levels)).float() - values
        elif args.score == "positive_value_loss":
            step_scores = advantages.clamp(min=0)
        elif args.score == "value_l1":
            step_scores = advantages.abs()
        elif args.score == "gae":
            step_scores = advantages
        elif args.score == "one_step_td_error":
            step_scores = deltas.abs()
        elif args.score == "policy_entropy":
            step_scores = share(-(logits.exp() * logits).sum(-1) / math.log(num_actions))
        elif args.score == "least_confidence":
            step_scores = share(1 - logits.exp().amax(-1))
        elif args.score == "min_margin":
            step_scores = share(1 - logits.exp().topk(2).values.diff(dim=-1).abs().squeeze(-1))
        cut_too = args.bootstrap_timeouts and args.score != "max_mc"
        phase("sampler")
        sampler.update(levels, step_scores.cpu().numpy(), ended, score_tails=cut_too)

        # ==== optimise (PPO; Algorithm 1: if d = 1, update the policy) ====
        phase("update")
        # Robust PLR learns nothing from new levels, so nothing is computed for them.
        learn = replay or args.curriculum != "robust_plr"
        losses, updates, M = torch.zeros(7, device=device), 0, args.num_minibatches  # summed, read once
        advantages, returns, values = torch.stack((advantages, returns, values)).to(device)
        for _epoch in range(args.update_epochs if learn else 0):
            # of every M environments in a row, each minibatch gets one: equally many of each rank
            for mb_envs in (torch.rand(N // M, M).argsort(dim=1) + torch.arange(0, N, M)[:, None]).T:
                mb_advantages = advantages[:, mb_envs]
                mb_advantages = (mb_advantages - mb_advantages.mean()) / (mb_advantages.std() + 1e-8)
                own = mb_envs // n == RANK  # this rank's part of the minibatch
                mb_envs, mb_advantages = mb_envs[own], mb_advantages[:, own].reshape(-1)
                mb_returns, mb_values = returns[:, mb_envs].reshape(-1), values[:, mb_envs].reshape(-1)
                mb_inds = mb_envs - RANK * n  # among this rank's environments
                mb_actions, mb_logprobs = actions[:, mb_inds].reshape(-1), logprobs[:, mb_inds].reshape(-1)
                unrolled = agent.unroll(images[:, mb_inds], directions[:, mb_inds], dones[:, mb_envs.numpy()])
                newlogprob, entropy, newvalue = agent.evaluate_actions(*unrolled, mb_actions)
                logratio = newlogprob - mb_logprobs
                ratio = logratio.exp()
                pg_loss1 = -mb_advantages * ratio
                pg_loss2 = -mb_advantages * ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
                pg_loss = mean(torch.max(pg_loss1, pg_loss2))
                v_change = (newvalue - mb_values).clamp(-args.clip_coef, args.clip_coef)
                v_loss_clipped = (mb_values + v_change - mb_returns) ** 2
                v_loss = 0.5 * mean(torch.max((newvalue - mb_returns) ** 2, v_loss_clipped))
                entropy_loss = mean(entropy)
                loss = pg_loss - args.ent_coef * entropy_loss + v_loss * args.vf_coef
                optimizer.zero_grad()
                loss.backward()
                add_gradients(agent)
                grad_norm = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                optimizer.step()
                with torch.no_grad():  # approx_kl: http://joschu.net/blog/kl-approx.html
                    old_approx_kl, approx_kl = mean(-logratio), mean((ratio - 1) - logratio)
                    clipfrac = mean(((ratio - 1).abs() > args.clip_coef).float())
                    parts = (v_loss, pg_loss, entropy_loss, old_approx_kl, approx_kl, clipfrac, grad_norm / WORLD)
                    losses += torch.stack(parts).detach()
                    updates += 1
            if args.target_kl is not None and share(approx_kl[None]).sum() > args.target_kl:
                break
        totals["gradient_updates"] += updates
        totals["untrained_steps"] += 0 if learn else args.batch_size

        # ==== log ====
        losses = share(losses[:, None]).sum(-1) / max(updates, 1)
        require_finite(losses, "a loss or gradient")  # waits for the device: the clock stops after the work is done
        phase("rest")
        curriculum = sampler.metrics() | level_metrics(args, sampler, levels[dones], replay)
        seconds = time.time() - iteration_start
        train_seconds += seconds
        names = ("value_loss", "policy_loss", "entropy", "old_approx_kl", "approx_kl", "clipfrac", "grad_norm")
        mean_return, mean_length = np.mean(finished, axis=0).tolist() if finished else (math.nan, math.nan)
        row = {
            "charts/episodic_return": mean_return,
            "charts/episodic_length": mean_length,
            "charts/solved_rate": float(np.mean([x > 0 for x, _ in finished])) if finished else math.nan,
            "charts/episodes": len(finished),
            "charts/learning_rate": optimizer.param_groups[0]["lr"],
            "charts/SPS": args.batch_size / seconds,
            **{f"charts/{name}": value for name, value in totals.items()},
            **{f"losses/{name}": value if updates else math.nan for name, value in zip(names, losses.tolist())},
            "losses/explained_variance": float(1 - (returns - values).var() / returns.var().clamp(min=1e-12)),
            "curriculum/replay": int(replay),
            **{f"curriculum/{name}": value for name, value in curriculum.items()},
        }
        if args.profile and last:
            profiler.stop()
            profiler.export_chrome_trace(str(run_dir / f"trace_{RANK}.json.gz"))
        if RANK == 0:
            log(run_dir / "progress.csv", row)

        # ==== evaluate ====
        if RANK == 0 and (last or (args.eval_interval and iteration % args.eval_interval == 0)):
            video = run_dir / "videos" / f"step_{global_step}" if args.capture_video else None
            evaluation = evaluate(agent, args, device, video)
            scalars = {f"eval/{k}": x for k, x in (totals | evaluation).items() if k != "episodes"}
            log(run_dir / "evaluations.csv", scalars)
            for name, picture in level_pictures(args, sampler, iteration).items():
                writer.add_image(f"levels/{name}", picture, global_step, dataformats="HWC")

        # ==== checkpoint ====
        stopping = bool(share(torch.tensor([len(stopped)])).any()) and not last
        if last or stopping or (args.checkpoint_interval and iteration % args.checkpoint_interval == 0):
            save_checkpoint()
        if RANK == 0 and (last or iteration == 1 or train_seconds - shown_at[1] > 10):
            left = int((time.time() - start_time) / iteration * (args.num_iterations - iteration) / 60)  # minutes
            pace = (global_step - shown_at[0]) / (train_seconds - shown_at[1])
            line = f"step {global_step:,} ({iteration / args.num_iterations:.1%}) | {left // 60}h{left % 60:02d}m left"
            line += f" | {pace:,.0f} steps/s | {totals['gradient_updates']:,} updates | train return {mean_return:.2f}"
            print(line + (f" | evaluation: solved {evaluation['solved_mean']:.2f}" if evaluation else ""), flush=True)
            shown_at = (global_step, train_seconds)

    envs.close()
    if WORLD > 1:
        dist.destroy_process_group()
    if RANK > 0:
        return
    writer.close()
    if stopping:
        print(f"Stopped by a signal. To go on: python {sys.argv[0]} --resume {run_dir}", flush=True)
        raise SystemExit(130 if signal.SIGINT in stopped else 0)
    evaluation = evaluation or evaluate(agent, args, device)
    result = {"env_id": args.env_id, "curriculum": args.curriculum, "seed": args.seed, "global_step": global_step}
    result |= totals | {"steps_per_second": global_step / train_seconds, "wall_seconds": time.time() - start_time}
    result |= {"device": device_name, "processes": WORLD, "torch": torch.__version__}
    result |= {"fingerprint": fingerprint(run_state()), "evaluation": evaluation}
    write_file(run_dir / "result.json", result)
    print(f"done: {run_dir}/result.json, fingerprint {result['fingerprint'][:16]}", flush=True)


if __name__ == "__main__":
    main()
