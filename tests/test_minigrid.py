"""ppo_robust_plr_minigrid.py: mazes against the minigrid package, the network, the algorithm,
evaluation, failures."""

import copy
import functools
import hashlib
import io
import shutil
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import support
import torch
import tyro
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from minigrid.core.grid import Grid
from minigrid.core.mission import MissionSpace
from minigrid.core.world_object import Goal, Wall
from minigrid.minigrid_env import MiniGridEnv
from PIL import Image
from scipy import stats
from support import (
    LENGTHS,
    REWARDS,
    Corridor,
    PlainPPO,
    TableAgent,
    assert_ledger_balances,
    assert_trained_like,
    best_returns,
    gae_backwards,
    mna_by_hand,
    result_of,
    rows,
    scores_by_hand,
    steps_since_start,
    td_errors,
    watch_sampler,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo_robust_plr_minigrid as script

CPU = torch.device("cpu")
TINY = support.TINY[script.__name__]
main = functools.partial(support.main, script)
EVALUATIONS = [*script.NAMED_MAZES, "PerfectMaze21", "SimpleCrossingS11N5", "FourRooms", "Unseen"]


@pytest.fixture
def no_evaluation(monkeypatch):
    monkeypatch.setattr(script, "evaluate", lambda *args: {"solved_mean": 0.0, "episodes": {}})


# ---- mazes against the package -------------------------------------------------------------------


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


def assert_same_as_package(
    mazes: script.Mazes, envs: script.MazeEnvs, num_actions: int, seed: int
) -> int:
    """Plays random actions in `envs`, already reset to `mazes`, and in the package; returns the
    number of goals."""
    n, rng = len(mazes.goal), np.random.default_rng(seed)
    limits = torch.as_tensor(envs.max_steps).expand(n).tolist()
    oracles = [
        Oracle(script.Mazes(*(part[i : i + 1] for part in mazes)), limits[i]) for i in range(n)
    ]
    expected = [oracle.reset()[0] for oracle in oracles]
    obs, goals = envs.reset(options={"mazes": mazes})[0], 0
    for _ in range(num_actions):
        assert (obs["image"].numpy() == [e["image"] for e in expected]).all()
        assert obs["direction"].tolist() == [e["direction"] for e in expected]
        actions = rng.choice(7, n, p=[0.2, 0.15, 0.45, 0.05, 0.05, 0.05, 0.05])
        obs, *result, _ = envs.step(torch.from_numpy(actions))
        expected, *expected_result, _ = zip(
            *(oracle.step(int(a)) for oracle, a in zip(oracles, actions))
        )
        for got, want in zip(result, expected_result):
            assert got.tolist() == np.array(want, got.numpy().dtype).tolist()
        # the terminal observation too
        assert (obs["image"].numpy() == [e["image"] for e in expected]).all()
        done = (result[1] | result[2]).numpy()
        goals += int(result[1].sum())
        if done.any():
            obs, _ = envs.reset(options={"mazes": mazes, "reset_mask": done})
            expected = [
                oracle.reset()[0] if d else e for oracle, e, d in zip(oracles, expected, done)
            ]
    return goals


@pytest.mark.parametrize(
    "vary, num_walls", [pytest.param(False, 25, marks=pytest.mark.slow), (True, 60)]
)
def test_random_mazes_equal_the_package(vary, num_walls):
    mazes = script.random_mazes(np.arange(60), 15, num_walls, vary)
    envs = script.MazeEnvs(60, CPU, 15, 250)
    assert assert_same_as_package(mazes, envs, 300, seed=0) > 10


def join(mazes):
    return script.Mazes(*map(np.concatenate, zip(*mazes)))


def test_named_and_perfect_mazes_equal_the_package():
    for name in (*script.NAMED_MAZES, "PerfectMaze21"):
        maze = [
            script.named_maze(name, k) if name in script.NAMED_MAZES else script.perfect_maze(21, k)
            for k in (1, 3)
        ]
        envs = script.MazeEnvs(2, CPU, maze[0].walls.shape[1] + 2, 450)
        assert_same_as_package(join(maze), envs, 150, seed=1)


@pytest.mark.parametrize("size", [5, 13, 51, 101])
def test_other_sizes_equal_the_package(size):
    if size > 20:
        mazes = join([script.perfect_maze(size, seed) for seed in range(2)])
    else:
        mazes = script.random_mazes(np.arange(20), size, 4 if size == 5 else 60)
    assert_same_as_package(
        mazes, script.MazeEnvs(len(mazes.goal), CPU, size, 2 * size**2), 60, seed=size
    )


def test_a_maze_is_decided_by_its_level_alone():
    pinned = hashlib.sha256(
        b"".join(part.tobytes() for part in script.random_mazes(np.arange(100), 15, 25))
    )
    # another maze for a level would be another meaning of every checkpoint
    assert pinned.hexdigest()[:16] == "10673243f90695cc"
    levels = np.array([7, 2**30 - 1, 0, 7, 123456])
    mazes = script.random_mazes(levels, 15, 25)
    for i, level in enumerate(levels):
        alone = script.random_mazes(np.array([level]), 15, 25)
        assert all(np.array_equal(part[i], other[0]) for part, other in zip(mazes, alone))
    assert not np.array_equal(mazes.walls[0], mazes.walls[1])


@pytest.mark.parametrize(
    "size, num_walls, vary", [(15, 25, False), (15, 60, True), (7, 23, False), (15, 0, False)]
)
def test_random_mazes_are_what_they_should_be(size, num_walls, vary):
    n, cells = 20000, (size - 2) ** 2
    mazes = script.random_mazes(np.arange(n), size, num_walls, vary)
    rows = np.arange(n)
    assert mazes.walls.shape == (n, size - 2, size - 2)
    assert not mazes.walls[rows, mazes.goal[:, 0], mazes.goal[:, 1]].any()
    assert not mazes.walls[rows, mazes.agent[:, 0], mazes.agent[:, 1]].any()
    assert (mazes.goal != mazes.agent).any(1).all()
    walls = mazes.walls.sum((1, 2))
    assert walls.max() <= num_walls
    # k blocks anywhere, with replacement, cover cells * (1 - (1 - 1 / cells) ** k); two of the
    # cells are cleared
    blocks = np.arange(num_walls + 1) if vary else np.array([num_walls])
    expected = ((cells - 2) * (1 - (1 - 1 / cells) ** blocks)).mean()
    assert abs(walls.mean() - expected) < 5 * walls.std() / np.sqrt(n) + 1e-9
    for part, count in (
        (mazes.goal @ [size - 2, 1], cells),
        (mazes.agent @ [size - 2, 1], cells),
        (mazes.direction, 4),
    ):
        share = np.bincount(part, minlength=count) / n
        assert abs(share - 1 / count).max() < 6 * np.sqrt(1 / count / n)


def walk(mazes: script.Mazes, i: int) -> int:
    """Cells from agent to goal of maze i by an ordinary queue, -1 if it cannot be reached."""
    queue, seen = [(tuple(mazes.agent[i]), 0)], {tuple(mazes.agent[i])}
    for (r, c), distance in queue:
        if (r, c) == tuple(mazes.goal[i]):
            return distance
        for cell in ((r + 1, c), (r - 1, c), (r, c + 1), (r, c - 1)):
            inside = all(0 <= x < side for x, side in zip(cell, mazes.walls[i].shape))
            if inside and not mazes.walls[i][cell] and cell not in seen:
                seen.add(cell)
                queue.append((cell, distance + 1))
    return -1


def test_shortest_paths_equal_a_plain_search():
    mazes = script.random_mazes(np.arange(300), 11, 40)
    paths = script.shortest_paths(mazes)
    assert paths.tolist() == [walk(mazes, i) for i in range(300)]
    assert (paths < 0).any() and paths.max() > 15


def turn_and_go(mazes: script.Mazes, i: int) -> list[int] | None:
    """Actions (0 left, 1 right, 2 forward) from agent to goal of maze i, as few as there can be, by
    an ordinary queue."""
    start = (tuple(mazes.agent[i].tolist()), int(mazes.direction[i]))
    queue, seen = [(start, [])], {start}
    for ((r, c), d), actions in queue:
        if (r, c) == tuple(mazes.goal[i]):
            return actions
        ahead = [(r, c + 1), (r + 1, c), (r, c - 1), (r - 1, c)][d]
        inside = all(0 <= x < side for x, side in zip(ahead, mazes.walls[i].shape))
        cell = ahead if inside and not mazes.walls[i][ahead] else (r, c)
        for action, state in enumerate((((r, c), (d - 1) % 4), ((r, c), (d + 1) % 4), (cell, d))):
            if state not in seen:
                seen.add(state)
                queue.append((state, [*actions, action]))
    return None


@pytest.mark.parametrize("count, size, num_walls", [(300, 11, 40), (65, 15, 25), (1, 5, 0)])
def test_fewest_actions_equal_a_plain_search(count, size, num_walls):
    mazes = script.random_mazes(np.arange(count), size, num_walls)
    found = [turn_and_go(mazes, i) for i in range(count)]
    expected = [-1 if actions is None else len(actions) for actions in found]
    assert script.fewest_actions(mazes).tolist() == expected
    assert num_walls < 40 or (-1 in expected and max(expected) > 20)


def test_fewest_actions_in_the_published_mazes():
    names = [name for name in script.NAMED_MAZES if name != "LargeCorridor"]
    for maze in [script.perfect_maze(21, 3), *(script.named_maze(name, 1) for name in names)]:
        assert script.fewest_actions(maze).tolist() == [len(turn_and_go(maze, 0))]


def test_who_follows_the_fewest_actions_in_the_package_has_the_best_possible_return():
    limit, solved, late = 20, 0, 0
    mazes = script.random_mazes(np.arange(40), 11, 40)
    best = script.best_possible_returns(mazes, limit)
    for i in range(40):
        env = Oracle(script.Mazes(*(part[i : i + 1] for part in mazes)), limit)
        env.reset()
        total, over = 0.0, False
        actions = turn_and_go(mazes, i)
        for action in actions or []:
            if not over:
                _, reward, terminated, truncated, _ = env.step(action)
                total, over = total + reward, terminated or truncated
        assert np.float32(total) == best[i]
        assert actions is None or over
        solved += total > 0
        late += actions is not None and total == 0
    assert solved > 20 and late > 0 and (best == 0).sum() > late


def test_perfect_mazes_have_one_path_between_any_two_cells():
    for size in (9, 21, 51):
        maze = script.perfect_maze(size, 5)
        free = ~maze.walls[0]
        passages = (free[1:] & free[:-1]).sum() + (free[:, 1:] & free[:, :-1]).sum()
        assert passages == free.sum() - 1  # a tree, if connected: and it is
        reach = [
            script.Mazes(maze.walls, np.array([cell]), maze.agent, maze.direction)
            for cell in np.argwhere(free)
        ]
        paths = script.shortest_paths(script.Mazes(*map(np.concatenate, zip(*reach[:200]))))
        assert (paths >= 0).all()
        assert script.shortest_paths(maze)[0] > 0


def test_named_mazes_are_the_published_ones():
    """Every cell, beside tests/data/mazes, and the lengths of their shortest paths."""
    files = sorted((Path(__file__).parent / "data" / "mazes").glob("*.txt"))
    assert [path.stem for path in files] == sorted(script.NAMED_MAZES)
    for path in files:
        rows = ["".join(row) for row in script.NAMED_MAZES[path.stem]]
        assert rows == path.read_text().split(), path.stem
    paths = {
        name: script.shortest_paths(script.named_maze(name, 0))[0] for name in script.NAMED_MAZES
    }
    assert paths == {
        "SixteenRooms": 20,
        "Labyrinth": 96,
        "Labyrinth2": 96,
        "Maze": 40,
        "Maze2": 56,
        "SmallCorridor": 13,
        "SixteenRoomsFewerDoors": 22,
        "Maze3": 39,
        "LargeCorridor": 19,
    }


def test_corridors_take_turns_through_their_goals():
    goals = {tuple(script.named_maze("SmallCorridor", episode).goal[0]) for episode in range(20)}
    assert len(goals) == 10 and (script.NAMED_MAZES["SmallCorridor"] == "g").sum() == 10


def test_the_gymnasium_interface_of_mazes():
    envs = script.MazeEnvs(3, CPU)
    assert envs.metadata["autoreset_mode"] == gym.vector.AutoresetMode.DISABLED
    obs, infos = envs.reset(seed=5)
    assert infos == {} and envs.observation_space.contains(
        {key: value.numpy() for key, value in obs.items()}
    )
    start = {key: value.clone() for key, value in envs.reset(seed=[5, 6, 7])[0].items()}
    assert all(torch.equal(obs[key], start[key]) for key in obs)
    envs.reset()  # levels of its own choice
    envs.reset(seed=[5, 6, 7])
    # the next reset or step overwrites it
    before = {k: x.clone() for k, x in envs.step(envs.action_space.sample())[0].items()}
    again = envs.reset(seed=[1, 6, 1], options={"reset_mask": np.array([False, True, False])})[0]
    assert (
        torch.equal(again["image"][1], start["image"][1])
        and again["direction"][1] == start["direction"][1]
    )
    assert torch.equal(again["image"][::2], before["image"][::2])
    assert envs.steps.tolist() == [1, 0, 1]
    again = {key: value.clone() for key, value in again.items()}
    nobody = envs.reset(seed=[5, 6, 7], options={"reset_mask": np.zeros(3, bool)})[0]
    assert all(torch.equal(nobody[key], again[key]) for key in again) and envs.steps.tolist() == [
        1,
        0,
        1,
    ]


def test_level_starts_are_kept_and_forgotten_without_anyone_noticing():
    envs, fresh = script.MazeEnvs(64, CPU), script.MazeEnvs(64, CPU)
    for first in (0, 64, *range(10**6, 10**6 + 64 * 140, 64), 0):
        levels = list(range(first, first + 64))
        obs = envs.reset(seed=levels)[0]
        assert len(envs.row_of_level) <= 8192 == len(envs.start_cells)
    assert len(envs.row_of_level) < 8192 - 64  # it was emptied meanwhile
    assert torch.equal(obs["image"], fresh.reset(seed=levels)[0]["image"])
    assert torch.equal(envs.cells, fresh.cells)
    # mazes that are given take the place of levels
    fresh.reset(options={"mazes": script.random_mazes(np.arange(900, 964), 15, 25)})
    assert not torch.equal(envs.cells, fresh.cells)
    assert torch.equal(obs["image"], fresh.reset(seed=levels)[0]["image"])
    assert torch.equal(envs.cells, fresh.cells)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_mazes_equal_eager_ones():
    eager, compiled = (script.MazeEnvs(8, CPU, max_steps=30) for _ in range(2))
    compiled_step = torch.compile(compiled.step)
    rng, levels = np.random.default_rng(0), list(range(8))
    eager.reset(seed=levels)
    compiled.reset(seed=levels)
    for _ in range(40):
        actions = torch.from_numpy(rng.integers(7, size=8))
        a, b = eager.step(actions), compiled_step(actions)
        assert torch.equal(a[0]["image"], b[0]["image"]) and all(
            torch.equal(x, y) for x, y in zip(a[1:4], b[1:4])
        )
        if (done := (a[2] | a[3]).numpy()).any():
            eager.reset(seed=levels, options={"reset_mask": done})
            compiled.reset(seed=levels, options={"reset_mask": done})


@pytest.mark.parametrize(
    "env_id, view", [("MiniGrid-MultiRoom-N4-S5-v0", 7), ("MiniGrid-FourRooms-v0", 5)]
)
def test_registered_environments_play_the_level_that_is_their_seed(env_id, view):
    envs = script.make_minigrid(env_id, 3, CPU, agent_view_size=view)
    rng, starts = np.random.default_rng(0), {}
    for levels in ([3, 4, 5], [4, 3, 3]):
        obs, _ = envs.reset(seed=levels)
        for i, level in enumerate(levels):
            env = gym.make(env_id, agent_view_size=view).unwrapped
            expected, _ = env.reset(seed=level)
            assert (obs["image"][i].numpy() == expected["image"]).all() and obs["direction"][
                i
            ] == expected["direction"]
            assert (
                starts.setdefault(level, env.grid.encode().tobytes()) == env.grid.encode().tobytes()
            )
        for _ in range(20):
            obs, reward, terminated, truncated, _ = envs.step(
                torch.from_numpy(rng.integers(3, size=3))
            )
            if (done := (terminated | truncated).numpy()).any():
                envs.reset(seed=levels, options={"reset_mask": done})
    assert reward.dtype == torch.float32 and obs["image"].shape == (3, view, view, 3)
    assert len(set(starts.values())) == 3


def test_pictures_are_the_packages():
    maze = script.named_maze("SixteenRooms", 0)
    envs = script.MazeEnvs(2, CPU, 15)  # the first one is drawn
    envs.reset(options={"mazes": join([maze, script.named_maze("Maze", 0)])})
    oracle = Oracle(maze, 100)
    oracle.reset()
    for action in (2, 2, 1, 2):
        expected = oracle.get_frame(highlight=True, tile_size=24)
        assert np.array_equal(envs.frame(), expected)
        envs.step(torch.tensor([action, 2]))
        oracle.step(action)
    assert envs.frame().shape == (360, 360, 3)


# ---- the LSTM over whole episodes ----------------------------------------------------------------


def step_by_step(agent, images, directions, starts):
    """What `act` gives for a rollout: actions (T, N), log-probabilities of all actions (T, N, 7),
    values (T, N) and hidden states (T, N, 256)."""
    agent.prepare_to_act()
    outputs, state = [], torch.zeros(2, starts.shape[1], 256)
    for t in range(len(starts)):
        keep = torch.from_numpy(~starts[t]).float()[:, None]
        obs = {"image": images[t], "direction": directions[t]}
        action, value, logits, state = agent.act(obs, state * keep, torch.rand(len(keep), 7) + 0.1)
        outputs.append((action, logits, value, state[0]))
        state = torch.stack(state)
    return [torch.stack(x) for x in zip(*outputs)]


def in_rows(agent, images, directions, starts, actions, multiple=1):
    """What `evaluate_actions` gives, the hidden states (length * N, 256) of all places in its rows,
    and where in them the steps are."""
    hidden = []
    hook = agent.lstm.register_forward_hook(lambda _, inputs, outputs: hidden.append(outputs[0]))
    begins = torch.from_numpy(starts).float()  # as the script stores them
    length = script.packed_length(starts, multiple)
    outputs = agent.evaluate_actions(images, directions, begins, length, actions)
    hook.remove()
    return outputs, hidden[0].flatten(0, 1).float(), script.pack_episodes(begins)


@torch.no_grad()
def assert_rows_equal_steps(agent, images, directions, starts, multiple=1):
    actions, logits, values, expected = step_by_step(agent, images, directions, starts)
    outputs, hidden, where = in_rows(agent, images, directions, starts, actions, multiple)
    assert torch.allclose(hidden[where].view(expected.shape), expected, atol=1e-5)
    logprobs = logits.gather(-1, actions[..., None])[..., 0]
    entropies = -(logits.exp() * logits).sum(-1)
    for got, wanted in zip(outputs, (logprobs, entropies, values), strict=True):
        assert torch.allclose(got, wanted, atol=1e-5)


def first_steps(*shape, share, seed):
    """(T, N): which steps begin an episode: the first ones, and a share of the others."""
    starts = np.random.default_rng(seed).random(shape) < share
    starts[0] = True
    return starts


def random_rollout(T, N, view=5):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 9, (T, N, view, view, 3), generator=generator, dtype=torch.uint8)
    return images, torch.randint(0, 4, (T, N), generator=generator)


# the view of registered environments, which do not let the script choose theirs
class SevenBySeven:
    single_observation_space = {"image": gym.spaces.Box(0, 255, (7, 7, 3), np.uint8)}
    single_action_space = gym.spaces.Discrete(7)


@pytest.fixture(scope="module")
def agent():
    torch.manual_seed(0)
    return script.Agent(script.MazeEnvs(1, CPU))


def test_rows_equal_steps_with_a_done_in_every_position(agent):
    T = 9
    # every pattern of dones
    starts = np.array([[t == 0 or bool(bits >> t & 1) for bits in range(2**T)] for t in range(T)])
    assert_rows_equal_steps(agent, *random_rollout(T, 2**T), starts)


@pytest.mark.parametrize("share", [0, 0.01, 0.1, 0.5, 1])
def test_rows_equal_steps_in_long_rollouts(agent, share):
    starts = first_steps(256, 8, share=share, seed=1)
    # on a GPU, lengths are rounded up
    for multiple in (1, 32):
        assert_rows_equal_steps(agent, *random_rollout(256, 8), starts, multiple)


@given(
    arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 6))), st.sampled_from([1, 3, 4, 32])
)
def test_rows_hold_every_step_of_an_episode_in_its_order_and_a_free_step_between_two(
    begins, multiple
):
    begins[0] = True
    T, N = begins.shape
    where = script.pack_episodes(torch.from_numpy(begins))
    assert where.dtype == torch.int64
    assert torch.equal(where, script.pack_episodes(torch.from_numpy(begins).float()))
    step, row = (x.reshape(T, N) for x in np.divmod(where.numpy(), N))
    assert len(set(where.tolist())) == T * N
    assert (row == np.arange(N)).all() and (step[0] == 0).all()  # each environment's own row
    assert (np.diff(step, axis=0) == 1)[~begins[1:]].all()
    assert (np.diff(step, axis=0) >= 2)[begins[1:]].all()
    # the rows are as long as the longest one, rounded up
    length = script.packed_length(begins, multiple)
    assert length % multiple == 0 and length - multiple <= step.max() < length


def test_rows_equal_steps_in_another_view():
    torch.manual_seed(0)
    agent, starts = script.Agent(SevenBySeven), first_steps(32, 8, share=0.1, seed=1)
    images, directions = random_rollout(32, 8, view=7)
    assert_rows_equal_steps(agent, images, directions, starts)
    with torch.no_grad():
        features = agent.conv(images.flatten(0, 1).permute(0, 3, 1, 2) / 10).flatten(1)
        weight, bias = agent.conv_matrix()
        assert torch.allclose(
            images.flatten(0, 1).flatten(1).float() @ weight + bias, features, atol=1e-5
        )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nothing_passes_from_one_episode_of_a_row_to_the_next(precision):
    torch.manual_seed(0)
    agent = script.Agent(script.MazeEnvs(1, CPU), precision)
    starts = first_steps(64, 8, share=0.1, seed=2)
    images, directions = random_rollout(64, 8)
    actions = torch.zeros((64, 8), dtype=torch.int64)
    _, hidden, where = in_rows(agent, images, directions, starts, actions, multiple=32)
    free = torch.ones(len(hidden), dtype=bool).index_fill(0, where, False)
    assert free.sum() > 10 and (hidden[free] == 0).all()
    # steps of episodes that begin in the second half
    late = torch.from_numpy(starts[32:].cumsum(0) > 0)
    hidden[where].view(64, 8, 256)[32:][late].pow(2).sum().backward()
    shut = agent.lstm.weight_ih_l0.grad[:, -1]
    assert (shut == 0).all() and agent.lstm.weight_hh_l0.grad.abs().max() > 0
    gradient = agent.lstm.weight_hh_l0.grad.clone()
    agent.zero_grad()
    # what came before those episodes does not matter, to their gradients neither
    images[:32] = 9 - images[:32]
    for t in range(32, 64):
        images[t][~late[t - 32]] = 0
    _, hidden, where = in_rows(agent, images, directions, starts, actions, multiple=32)
    hidden[where].view(64, 8, 256)[32:][late].pow(2).sum().backward()
    assert torch.equal(agent.lstm.weight_hh_l0.grad, gradient)


# ---- numbers, on an environment small enough to do by hand ---------------------------------------


class TensorCorridor(Corridor):
    """The end of level 1 is a time limit."""

    image_shape = 5, 5, 3

    def __init__(self, num_envs: int):
        super().__init__(num_envs)
        image = self.single_observation_space
        self.single_observation_space = gym.spaces.Dict(
            {"direction": gym.spaces.Discrete(4), "image": image}
        )

    def look(self):
        image = torch.from_numpy(super().look())
        return {"image": image, "direction": torch.zeros(self.num_envs, dtype=torch.int64)}

    def step(self, actions):
        obs, rewards, done, _, infos = super().step(actions)
        limit = done & (self.level == 1)
        return (
            obs,
            torch.from_numpy(rewards).float(),
            torch.from_numpy(done & ~limit),
            torch.from_numpy(limit),
            infos,
        )


class Table(TableAgent):
    def prepare_to_act(self):
        pass

    @torch.no_grad()
    def act(self, obs, state, noise):
        log_p, value = self.look_up(obs["image"])
        return (log_p.exp() / noise).argmax(-1), value, log_p, tuple(state.clone())

    def evaluate_actions(self, image, direction, begins, length, action):
        log_p, value = self.look_up(image)
        return log_p.gather(-1, action[..., None])[..., 0], log_p.sum(-1), value


@pytest.fixture
def corridor(monkeypatch, no_evaluation):
    """The script with TensorCorridor and Table: what every rollout gave to the sampler, and what it
    answered."""
    monkeypatch.setattr(script, "Agent", Table)
    monkeypatch.setattr(
        script, "make_envs", lambda args, num_envs, device: TensorCorridor(num_envs)
    )
    monkeypatch.setattr(script, "check_environment", lambda env_id: 5)
    monkeypatch.setattr(script, "level_pictures", lambda *args: {})
    return watch_sampler(script, monkeypatch)


CORRIDOR = "--env-id corridor --num-envs 3 --num-steps 14 --buffer-size 8 --checkpoint-interval 0"


@pytest.mark.parametrize("bootstrap", [False, True])
@pytest.mark.parametrize("score", [x for x in script.SCORES if x != "regret"])
def test_each_score_by_hand(score, bootstrap, corridor, monkeypatch, tmp_path):
    flags = f"{CORRIDOR} --curriculum plr --seed 4 --total-timesteps 42 --gamma 0.9"
    flags += f" --gae-lambda 0.8 --score {score}"
    main(monkeypatch, f"{flags} --run-dir {tmp_path}/run" + " --bootstrap-timeouts" * bootstrap)
    # of three new levels, played again and again
    levels, step_scores, dones, episodes, *_ = corridor[0]
    assert dones.sum() > 5 and not dones[-1].all() and (levels == levels[0]).all()
    assert set(levels[0] % 3) == {0, 1, 2}
    rewards = REWARDS[levels % 3, steps_since_start(dones)]
    cut = ((levels % 3 == 1) | ~dones) & bootstrap  # at a time limit and at the rollout's end
    values, deltas = td_errors(levels, dones, rewards, 0.9, cut)
    best, _ = best_returns(levels, dones, rewards)
    expected = scores_by_hand(levels, dones, values, deltas, 0.9 * 0.8, best)
    solved = np.vectorize(lambda level: best[level] > 0)(levels)
    assert solved.any() and not solved.all()
    expected["mna"] = mna_by_hand(deltas, dones, 0.9, 0.8) * solved
    # every episode on a level has the same return, so there is nothing to learn from
    expected["learnability"] = np.zeros(levels.shape)
    np.testing.assert_allclose(step_scores, expected[score], rtol=1e-5, atol=1e-5)
    # episodes that the rollout cuts off are scored only where their values are bootstrapped, and
    # never by what is made of returns
    ended = episodes.complete.all()
    assert ended == (not bootstrap or score in ("max_mc", "learnability"))
    assert (
        episodes.complete.sum() == dones.sum()
        and (~episodes.complete).sum() == (~ended) * (~dones[-1]).sum()
    )


def test_a_gate_leaves_nothing_of_a_level_that_was_never_solved(corridor, monkeypatch, tmp_path):
    flags = f"{CORRIDOR} --curriculum plr --seed 4 --total-timesteps 42 --score max_mc"
    for gate in ("", " --gate-unsolved"):
        main(monkeypatch, f"{flags}{gate} --run-dir {tmp_path}/run{gate.strip()}")
    (levels, scores, *_), (same_levels, gated, *_) = corridor
    assert (levels == same_levels).all()
    solved = levels % 3 != 1
    assert (gated[solved] == scores[solved]).all() and (scores[~solved] != 0).all()
    assert (gated[~solved] == 0).all()


@given(st.integers(0, 2**32 - 1), st.sampled_from([0, 0.9, 1]), st.sampled_from([0, 0.8, 1]))
def test_mna_equals_plain_loops(seed, gamma, lam):
    rng = np.random.default_rng(seed)
    T, N = rng.integers(1, 20), rng.integers(1, 4)
    deltas = rng.normal(size=(T, N)).astype(np.float32)
    ended = rng.random((T, N)) < rng.choice([0, 0.2, 1])
    args = script.Args(gamma=gamma, gae_lambda=lam)
    got = script.negative_advantages(args, deltas, ended, CPU)
    expected = mna_by_hand(deltas, ended, gamma, lam)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert (got >= 0).all()


def test_mna_by_hand():
    """gamma 1/2, lambda 1/4: G is -1, then min(0, -1 + 4/2) = 0, then 0 - 8/4 = -2."""
    args = script.Args(gamma=0.5, gae_lambda=0.25)
    deltas = np.array([[-1], [4], [-8]], np.float32)
    ended = np.array([[0], [0], [1]], bool)
    first = 0.75 * 1 + 0.75 * 0.25 * 0 + 0.25**2 * 2
    second = 0.75 * 0 + 0.25 * 4
    got = script.negative_advantages(args, deltas, ended, CPU)
    assert got[:, 0].tolist() == [first, second, 8]


def test_max_mc_takes_the_best_return_so_far_of_each_level(corridor, monkeypatch, tmp_path):
    given, fade = [], np.random.default_rng(0).uniform(0.2, 2, 100000)

    class Fading(TensorCorridor):  # no two episodes give the same return
        def step(self, actions):
            obs, reward, *rest = super().step(actions)
            given.append(reward.numpy() * fade[len(given)])
            return obs, torch.from_numpy(given[-1]).float(), *rest

    monkeypatch.setattr(script, "make_envs", lambda args, num_envs, device: Fading(num_envs))
    flags = (
        f"{CORRIDOR} --curriculum plr --total-timesteps {42 * 40} --rho 0.5 --learning-rate 1e-9"
    )
    main(monkeypatch, f"{flags} --run-dir {tmp_path}/run")
    best, replayed, beaten = {}, 0, 0
    for k, (levels, step_scores, dones, _, draws, _) in enumerate(corridor):
        rewards = np.array(given[14 * k : 14 * (k + 1)])
        best, worse = best_returns(levels, dones, rewards, best)
        values, deltas = td_errors(levels, dones, rewards, 1, cut=np.zeros_like(dones))
        expected = scores_by_hand(levels, dones, values, deltas, 1, best)["max_mc"]
        # of what the rollout cuts off, nothing is scored
        ended = np.cumsum(dones[::-1], axis=0)[::-1] > 0
        np.testing.assert_allclose(step_scores[ended], expected[ended], rtol=1e-4, atol=1e-5)
        replayed += draws[0][0]
        beaten += worse
    assert replayed > 10 and beaten > 50


def test_the_curriculum_equals_a_simulation(corridor, monkeypatch, tmp_path):
    """One decision per rollout, minimum fill, replay share, draws, scores and eviction, against
    plain dictionaries."""
    update = script.LevelSampler.update

    def noise(levels):  # so that levels of one kind differ
        return (levels * 2654435761 % 2**32) / 2**32

    def noisy(self, levels, step_scores, dones, **kwargs):
        return update(self, levels, step_scores + noise(levels), dones, **kwargs)

    monkeypatch.setattr(script.LevelSampler, "update", noisy)
    flags = f"{CORRIDOR} --total-timesteps {42 * 250} --update-epochs 1 --replay-prob 0.4"
    flags += " --rho 0.75 --temperature 0.7"
    main(monkeypatch, f"{flags} --staleness-coef 0.3 --run-dir {tmp_path}/run")
    buffer, age, new, decisions, outcome = {}, {}, {}, [], {"evicted": 0, "rejected": 0}

    def weights():
        ranked = sorted(buffer, key=lambda level: -buffer[level])
        by_score = {level: (1 / rank) ** (1 / 0.7) for rank, level in enumerate(ranked, 1)}
        total, ages = sum(by_score.values()), sum(age[x] for x in buffer)
        return {
            x: 0.7 * by_score[x] / total + 0.3 * (age[x] / ages if ages else 1 / len(buffer))
            for x in buffer
        }

    for levels, step_scores, dones, _, draws, sampler in corridor:
        replay = draws[0][0]
        assert {flag for flag, _ in draws} == {replay}, (
            "one decision for all environments and the whole rollout"
        )
        if len(buffer) < 6:
            assert not replay
        else:
            decisions.append(replay)
        # after the last step too, though that is never played
        starts = np.vstack((np.ones((1, 3), bool), dones))
        assert len(draws) == (starts.sum() if replay else 3)
        drawn_levels = iter(draws)
        for step, i in np.argwhere(starts):  # the order in which the script asks
            # a new level is played repeatedly
            level = next(drawn_levels)[1] if replay or step == 0 else levels[0, i]
            assert step == 14 or level == levels[step, i]
            assert (level in buffer) == replay
            if replay:  # as in dcd: of the buffer, draws for replay alone make the others older,
                age |= {x: age[x] + 1 for x in buffer} | {int(level): 0}
            elif level not in new:
                new[int(level)] = len(new)
        candidates = {}
        for i in range(3):
            begin = 0
            # an episode that the rollout cuts off is not scored
            for step in np.flatnonzero(dones[:, i]):
                score = step_scores[begin : step + 1, i].mean()
                (buffer if replay else candidates)[int(levels[step, i])] = score
                begin = step + 1
        for level, score in candidates.items():
            if len(buffer) == 8:
                p = weights()
                worst = min(buffer, key=lambda x: p[x])
                if buffer[worst] > score:
                    outcome["rejected"] += 1
                    continue
                del buffer[worst]
                outcome["evicted"] += 1
            # and a new one enters by how many came since
            buffer[level], age[level] = (score, len(new) - new[level] - 1)
    assert dict(zip(sampler.levels.tolist(), sampler.scores.tolist())) == pytest.approx(buffer)
    assert {key: sampler.counts[key] for key in outcome} == outcome and outcome["evicted"] > 10
    p = weights()
    np.testing.assert_allclose(
        sampler.weights(), [p[level] for level in sampler.levels.tolist()], rtol=1e-6
    )
    assert abs(np.mean(decisions) - 0.4) < 0.12 and len(decisions) > 200
    logged = rows(tmp_path / "run/progress.csv")
    assert [row["replay"] for row in logged[-len(decisions) :]] == decisions
    assert logged[-1]["seen_share"] == 1 and logged[-1]["evicted"] == outcome["evicted"]
    for row in logged:
        assert_ledger_balances(row)


@pytest.mark.parametrize(
    "curriculum", ["robust_plr", *(pytest.param(x, marks=pytest.mark.slow) for x in ("plr", "dr"))]
)
def test_what_is_learned_from(curriculum, no_evaluation, monkeypatch, tmp_path):
    """Robust PLR leaves everything that learns bit-equal on new levels, and runs the network for
    acting only."""
    prints, unrolled, write_file = [], [], script.write_file

    class Watched(script.Agent):
        def evaluate_actions(self, *args):
            unrolled[-1] += 1
            return super().evaluate_actions(*args)

    class Spy(script.LevelSampler):
        def decide_replay(self):
            unrolled.append(0)
            return super().decide_replay()

    def watch(path, content):  # a checkpoint at the start, and after each iteration
        if path.name == "checkpoint.pt":
            prints.append(
                (
                    script.fingerprint(content["agent"]),
                    script.fingerprint(content["optimizer"]["state"]),
                )
            )
        write_file(path, content)

    monkeypatch.setattr(script, "write_file", watch)
    monkeypatch.setattr(script, "Agent", Watched)
    monkeypatch.setattr(script, "LevelSampler", Spy)
    flags = support.tiny(script, f"--curriculum {curriculum} --total-timesteps {30 * 96}")
    flags += " --checkpoint-interval 1"
    main(monkeypatch, f"{flags} --run-dir {tmp_path}/run")
    logged = rows(tmp_path / "run/progress.csv")
    replays = [bool(row["replay"]) for row in logged]
    assert any(replays) == (curriculum != "dr") and not all(replays)
    learned = [replay or curriculum != "robust_plr" for replay in replays]
    changed = [(a[0] != b[0], a[1] != b[1]) for a, b in zip(prints, prints[1:])]
    assert changed == [(learn, learn) for learn in learned]
    assert unrolled == [2 * learn for learn in learned]  # 2 epochs of 1 minibatch
    updates, untrained = (
        np.cumsum([2 * learn for learn in learned]),
        np.cumsum([96 * (not learn) for learn in learned]),
    )
    assert [row["gradient_updates"] for row in logged] == updates.tolist()
    assert [row["untrained_steps"] for row in logged] == untrained.tolist()
    for row, replay, learn in zip(logged, replays, learned):
        kind, other = ("replayed", "new") if replay else ("new", "replayed")
        assert row[f"walls_{kind}"] > 0 and np.isnan(row[f"walls_{other}"])
        assert np.isnan(row["policy_loss"]) != learn


def test_one_update_equals_a_plain_implementation(no_evaluation, monkeypatch, tmp_path):
    """2 epochs x 2 minibatches of environments, clipping active, episodes ending inside, the LSTM
    step by step."""
    acts, steps, draws, start = [], [], [], {}
    rand = torch.rand

    class Watched(script.Agent):
        def __init__(self, *args):
            super().__init__(*args)
            start.update(copy.deepcopy(self.state_dict()))

        def act(self, obs, *args):
            out = super().act(obs, *args)
            acts.append(
                (obs["image"].clone(), obs["direction"].clone(), *(x.clone() for x in out[:3]))
            )
            return out

    class Spied(script.MazeEnvs):
        def step(self, actions):
            out = super().step(actions)
            steps.append([x.clone() for x in out[1:4]])
            return out

    def recorded(*args, **kwargs):
        draws.append(rand(*args, **kwargs))
        return draws[-1]

    monkeypatch.setattr(script, "Agent", Watched)
    monkeypatch.setattr(script, "MazeEnvs", Spied)
    monkeypatch.setattr(torch, "rand", recorded)
    flags = "--curriculum dr --num-envs 4 --num-steps 120 --total-timesteps 480 --maze-size 5"
    flags += " --num-walls 0 --max-steps 30"
    flags += " --num-minibatches 2 --update-epochs 2 --gamma 0.9 --gae-lambda 0.8"
    flags += " --clip-coef 0.002 --ent-coef 0.05"
    flags += " --vf-coef 0.7 --max-grad-norm 0.3 --learning-rate 0.003 --seed 4"
    main(monkeypatch, f"{flags} --run-dir {tmp_path}/run")

    images, directions, actions, values, logits = (torch.stack(x) for x in zip(*acts[:120]))
    logprobs = torch.log_softmax(logits, -1).gather(-1, actions[..., None])[..., 0]
    rewards, terminated, truncated = (torch.stack(x).numpy() for x in zip(*steps[:120]))
    dones = terminated | truncated
    assert terminated.sum() > 2 and truncated.sum() > 1
    # the reference's time limits: nothing after the last step
    v = np.vstack((values.numpy(), np.zeros(4)))
    advantages = gae_backwards(rewards, v, dones, 0.9, 0.8)
    advantages, returns = (
        torch.tensor(advantages).float(),
        torch.tensor(advantages + v[:-1]).float(),
    )

    monkeypatch.undo()
    agent = script.Agent(script.MazeEnvs(1, CPU))
    agent.load_state_dict(start)
    parameters = dict(agent.named_parameters())
    plain = PlainPPO(
        parameters.values(), 0.003, clip=0.002, ent_coef=0.05, vf_coef=0.7, max_norm=0.3
    )
    for draw in draws[:2]:  # of environments 0 and 1 each minibatch gets one, and of 2 and 3
        first = (draw[:, 0] > draw[:, 1]).long()
        for index in (first + torch.tensor([0, 2]), 1 - first + torch.tensor([0, 2])):
            hidden, state = [], (torch.zeros(2, 256), torch.zeros(2, 256))
            for t in range(120):
                if t:
                    state = tuple(x * torch.tensor(~dones[t - 1][index])[:, None] for x in state)
                x = torch.relu(agent.conv(images[t, index].permute(0, 3, 1, 2) / 10)).flatten(1)
                x = torch.cat((x, agent.direction(directions[t, index])), dim=1)
                w, *more = [
                    parameters[f"lstm.{name}_l0"]
                    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
                ]
                # not the inputs between episodes
                state = torch.lstm_cell(x, state, w[:, : x.shape[1]], *more)
                hidden.append(state[0])
            hidden = torch.stack(hidden)
            log_p, value = torch.log_softmax(agent.actor(hidden), -1), agent.critic(hidden)[..., 0]
            old = actions[:, index], logprobs[:, index], values[:, index]
            plain.step(log_p, value, *old, advantages[:, index], returns[:, index])
    assert_trained_like(plain, list(parameters), start, tmp_path / "run", atol=3e-5)
    trained = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["agent"][
        "lstm.weight_ih_l0"
    ]
    # the inputs without a feature, and the one between episodes
    untouched = slice(x.shape[1], None)
    assert torch.equal(trained[:, untouched], start["lstm.weight_ih_l0"][:, untouched])


# the first three: beyond what exp() holds, where an overflow would give other shares
LARGE = {
    "near 88": [88, 88, 87, 0, 0, 0, 0],
    "at 100": [100, 100, 99, 0, 0, 0, 0],
    "about -110": [-110, -110.5, -109, -110, -111, -110.2, -112],
    "far apart": [-2000, 3000, 2999, 0, 2998.5, -5000, 1],
    "all alike": [1e4] * 7,
    "ordinary": [-1, -0.7, -0.3, 0, 0.3, 0.7, 1],
}


@pytest.mark.parametrize("logits", LARGE)
def test_actions_are_drawn_with_the_policys_probabilities(agent, logits):
    torch.manual_seed(0)
    agent, n = copy.deepcopy(agent), 20_000
    images, directions = torch.ones((n, 5, 5, 3), dtype=torch.uint8), torch.zeros(n).long()
    with torch.no_grad():
        agent.actor[2].weight.zero_()
        agent.actor[2].bias.copy_(torch.tensor(LARGE[logits]))
    agent.prepare_to_act()
    obs, noise = {"image": images, "direction": directions}, torch.empty(n, 7).exponential_()
    action, value, got, _ = agent.act(obs, torch.zeros(2, n, 256), noise)
    p = np.exp(np.array(LARGE[logits]) - max(LARGE[logits]))
    p /= p.sum()
    np.testing.assert_allclose(got[0].exp(), p, atol=1e-6)  # normalised
    share = np.bincount(action, minlength=7) / n
    assert (abs(share - p) <= 5 * np.sqrt(p * (1 - p) / n)).all(), share
    # learning sees the same
    rollout = [x[None, :500] for x in (images, directions, torch.ones(n), action)]
    rollout.insert(3, 1)  # the length
    logprob, _, value_again = (x[0] for x in agent.evaluate_actions(*rollout))
    torch.testing.assert_close(got.gather(-1, action[:, None])[:500, 0], logprob)
    torch.testing.assert_close(value[:500], value_again)


# ---- minibatches and episodes --------------------------------------------------------------------


def test_every_environment_is_dealt_once_and_each_process_equally_many():
    torch.manual_seed(0)
    dealt = torch.stack([script.deal_environments(12, 3) for _ in range(2000)])
    assert dealt.shape == (2000, 3, 4)
    assert (dealt.flatten(1).sort().values == torch.arange(12)).all()
    # of every three environments in a row each minibatch gets one, and any of them
    assert (dealt // 3 == torch.arange(4)).all()
    for k in range(3):
        share = (dealt % 3 == k).float().mean(0)  # (minibatch, group)
        assert (share - 1 / 3).abs().max() < 5 * np.sqrt(2 / 9 / 2000)
    one = script.deal_environments(4, 1)
    assert one.tolist() == [[0, 1, 2, 3]]


def test_the_parts_of_a_minibatch_are_all_of_it(monkeypatch):
    mb_envs = torch.tensor([5, 0, 3, 7])
    mine, where = script.part_of_minibatch(mb_envs, 8)
    assert mb_envs[mine].tolist() == where.tolist() == mb_envs.tolist()
    monkeypatch.setattr(script, "WORLD", 2)
    seen = []
    for rank in range(2):
        monkeypatch.setattr(script, "RANK", rank)
        mine, where = script.part_of_minibatch(mb_envs, 4)
        assert mb_envs[mine].tolist() == (where + 4 * rank).tolist()
        assert where.min() >= 0 and where.max() < 4
        seen += mb_envs[mine].tolist()
    assert sorted(seen) == [0, 3, 5, 7]


def test_finished_episodes_by_hand():
    rewards = np.array([[0, 0.5, 1], [0.25, 0, 2], [0, 0.125, 3], [1, 1, 4]], np.float32)
    ended = np.array([[0, 1, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0]], bool)
    args = script.Args(num_steps=4, curriculum="dr")
    finished = script.finished_episodes(args, rewards, ended)
    # in order of time and environment; what the rollout cuts off is none
    assert finished["return"].tolist() == [0.5, 0.25, 0.125, 1]
    assert finished["length"].tolist() == [1, 2, 2, 1]


@pytest.mark.parametrize("replay", [False, True])
def test_what_is_said_of_mazes_is_of_the_first_256_episodes(replay):
    args = script.Args(num_walls=60)
    levels = np.append(np.arange(256) % 100, np.arange(5000, 5300))
    counted = levels[:256] if replay else np.arange(100)  # new ones count once
    mazes = script.random_mazes(counted, 15, 60)
    paths = script.shortest_paths(mazes)
    metrics = script.level_metrics(args, script.make_sampler(args), levels, replay)
    kind, other = ("replayed", "new") if replay else ("new", "replayed")
    assert metrics[f"curriculum/walls_{kind}"] == pytest.approx(mazes.walls.sum((1, 2)).mean())
    assert metrics[f"curriculum/solvable_{kind}"] == pytest.approx((paths > 0).mean())
    assert metrics[f"curriculum/shortest_path_{kind}"] == pytest.approx(paths[paths > 0].mean())
    assert (paths < 0).any() and metrics["curriculum/replay"] == replay
    assert all(np.isnan(metrics[f"curriculum/{x}_{other}"]) for x in ("walls", "solvable"))


def scores_of_mazes(num_walls=60, replayed=False):
    """Args, levels and ends [T, N] of a rollout, the finished episodes' returns."""
    rng = np.random.default_rng(0)
    args = script.Args(num_walls=num_walls)
    ended = rng.random((50, 20)) < 0.1
    levels = np.zeros((50, 20), np.int64)
    for t in range(50):
        fresh = ended[t - 1] if t and replayed else t == 0
        levels[t] = np.where(fresh, rng.integers(40, size=20), levels[t - 1])
    returns = rng.choice([0, 0.5, 0.25], ended.sum()).astype(np.float32)
    return args, levels, ended, returns


def test_true_regret_by_hand():
    args, levels, ended, returns = scores_of_mazes(replayed=True)
    mazes = script.mazes_of(args, np.arange(40))
    regret = script.true_regret(args, levels, ended, returns)
    unsolvable = 0
    for level in np.unique(levels):
        actions = turn_and_go(mazes, level)
        best = 0 if actions is None else 1 - 0.9 * len(actions) / 250
        mine = returns[levels[ended] == level]
        expected = best - (mine.mean() if len(mine) else 0)
        np.testing.assert_allclose(regret[levels == level], expected, atol=1e-6)
        unsolvable += actions is None
    assert unsolvable


def test_a_perfect_agent_has_no_regret_and_an_unsolvable_maze_leaves_none():
    levels = np.tile(np.arange(40), (2, 1))
    ended = np.array([[False] * 40, [True] * 40])
    args = script.Args(num_walls=60)
    best = script.best_possible_returns(script.mazes_of(args, np.arange(40)), 250)
    assert (best == 0).any() and (best > 0).any()
    assert (script.true_regret(args, levels, ended, best) == 0).all()
    assert script.true_regret(args, levels, ended, 0 * best)[0].tolist() == best.tolist()


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=0, max_size=30))
def test_rank_correlation_equals_scipys(pairs):
    x, y = np.array(pairs, float).reshape(-1, 2).T
    if len(np.unique(x)) < 2 or len(np.unique(y)) < 2:
        expected = np.nan
    else:
        expected = stats.spearmanr(x, y).statistic
    assert script.rank_correlation(x / 7, y) == pytest.approx(expected, nan_ok=True)
    noise = 1e-10 * np.arange(len(x))  # rounding makes no ranks of ties
    assert script.rank_correlation(x / 7 + noise, y) == pytest.approx(expected, nan_ok=True)


def test_how_well_each_score_follows_true_regret():
    args, levels, ended, returns = scores_of_mazes(replayed=True)
    regret = script.true_regret(args, levels, ended, returns)
    noisy = regret + np.random.default_rng(1).normal(size=regret.shape)
    step_scores = {"regret": regret, "gae": 3 * regret - 1, "value_l1": -regret, "max_mc": noisy}
    step_scores["min_margin"] = np.ones(regret.shape)
    correlations = script.score_correlations(args, step_scores, levels, ended)
    found = {name.removeprefix("curriculum/correlation_"): x for name, x in correlations.items()}
    of_levels: dict[int, list] = {}  # the noisy score of its whole episodes, and true regret
    for i in range(20):
        begin = 0
        for t in np.flatnonzero(ended[:, i]):
            pair = noisy[begin : t + 1, i].mean(), regret[t, i]
            of_levels.setdefault(levels[t, i], []).append(pair)
            begin = t + 1
    means = np.array([np.mean(pairs, axis=0) for pairs in of_levels.values()])
    expected = {"gae": 1, "value_l1": -1, "max_mc": stats.spearmanr(*means.T).statistic}
    expected["min_margin"] = np.nan
    assert found == pytest.approx(expected, nan_ok=True)
    assert 0.1 < found["max_mc"] < 0.9 and means.shape[0] < ended.sum()


# ---- evaluation ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_evaluation_plays_each_environment_and_leaves_the_training_stream_alone(agent):
    before = torch.get_rng_state()
    result = script.evaluate(agent, script.Args(eval_episodes=1), CPU)
    assert torch.equal(before, torch.get_rng_state())
    assert list(result["episodes"]) == EVALUATIONS
    assert all(len(returns) == 1 for returns in result["episodes"].values())


def test_what_an_evaluation_says_of_known_returns(agent, monkeypatch):
    returns = iter(np.random.default_rng(0).choice([0.0, 0.2, 0.9], (13, 3)))
    monkeypatch.setattr(script, "play", lambda *args: next(returns))
    result = script.evaluate(agent, script.Args(eval_episodes=3), CPU)
    played = np.array([result["episodes"][name] for name in EVALUATIONS])
    assert (played == np.random.default_rng(0).choice([0.0, 0.2, 0.9], (13, 3))).all()
    rates = (played > 0).mean(1)
    assert [result[f"solved_{name}"] for name in EVALUATIONS] == rates.tolist()
    assert [result[f"return_{name}"] for name in EVALUATIONS] == played.mean(1).tolist()
    rates, played = rates[:12], played[:12]  # those that are the same for every run
    assert result["solved_mean"] == pytest.approx(rates.mean())
    assert result["solved_iqm"] == pytest.approx(np.sort(rates)[3:9].mean())
    assert result["return_mean"] == pytest.approx(played.mean()) and len(set(rates)) > 2


@pytest.mark.slow
def test_videos_change_nothing(agent, brief, tmp_path):
    args = script.Args(eval_episodes=3)
    result = script.evaluate(agent, args, CPU, tmp_path)
    assert script.evaluate(agent, args, CPU)["episodes"] == result["episodes"]
    assert {path.stem for path in tmp_path.iterdir()} == set(EVALUATIONS)
    with Image.open(tmp_path / "Labyrinth.gif") as video:
        assert video.size == (360, 360) and 5 < video.n_frames <= 10  # every second one of 20 steps


def test_no_episode_is_left_out_and_none_counts_twice():
    """Levels that end early do not count more: a first-to-finish evaluation would see mostly
    those."""
    envs = TensorCorridor(3)
    returns = script.play(Table(), envs, {"seed": [0, 1, 2]})
    assert returns.tolist() == [REWARDS[kind, : LENGTHS[kind]].sum() for kind in range(3)]
    assert len(envs.started) > 3  # the short ones went on, uncounted


def test_unseen_mazes_are_of_the_runs_own_kind():
    options = {"maze_size": 9, "max_steps": 40, "redraw_direction": True, "num_envs": 2}
    args = script.Args(num_walls=30, vary_num_walls=True, eval_episodes=50, **options)
    *_, (name, envs, reset) = script.evaluation_environments(args, CPU)
    assert (name, envs.max_steps, min(reset["seed"])) == ("Unseen", 40, script.FIRST_TEST_LEVEL)
    envs.reset(**reset)
    mazes = script.random_mazes(np.array(reset["seed"]), 9, 30, True)
    cells, position, direction = envs.encode(mazes)
    assert torch.equal(envs.cells, cells) and torch.equal(envs.direction, direction)
    assert torch.equal(envs.position - envs.first_cells, position)
    assert mazes.walls.shape == (50, 7, 7) and len(set(mazes.walls.sum((1, 2)))) > 10


def test_time_limits_of_the_evaluation():
    *mazes, _, _, (_, unseen, _) = environments = list(
        script.evaluation_environments(script.Args(eval_episodes=2), CPU)
    )
    assert unseen.max_steps == 250
    limits, packages = {name: envs.max_steps for name, envs, _ in mazes}, environments[-3:-1]
    assert limits.pop("LargeCorridor") == limits.pop("PerfectMaze21") == 882 and set(
        limits.values()
    ) == {450}
    assert [package.env.call("max_steps")[0] for _, package, _ in packages] == [484, 100]
    assert all(
        package.single_observation_space["image"].shape == (5, 5, 3) for _, package, _ in packages
    )
    assert not any(
        env.unwrapped.see_through_walls for _, package, _ in packages for env in package.env.envs
    )


# ---- whole runs ----------------------------------------------------------------------------------


def test_a_finished_run(finished_run):
    """What is the mazes' alone; the rest is in test_both_scripts.py."""
    run_dir = finished_run(script)
    progress, evaluations, result = (
        rows(run_dir / "progress.csv"),
        rows(run_dir / "evaluations.csv"),
        result_of(run_dir),
    )
    assert {row["replay"] for row in progress} == {0, 1}
    assert (
        evaluations[0]["gradient_updates"]
        == progress[-1]["gradient_updates"]
        == result["gradient_updates"]
        > 0
    )
    assert {f"solved_{name}" for name in (*EVALUATIONS, "mean", "iqm")} <= evaluations[0].keys()
    assert list(result["evaluation"]["episodes"]) == EVALUATIONS
    events = EventAccumulator(str(run_dir)).Reload()
    tags = events.Tags()
    assert {"charts/gradient_updates", "eval/solved_mean"} <= set(tags["scalars"])
    expected = {
        f"{x}_{kind}"
        for x in ("walls", "shortest_path", "solvable")
        for kind in ("new", "replayed")
    }
    expected |= set("score_q10 score_q50 score_q90 replay evicted rejected".split())
    expected |= {"correlation_max_mc", "correlation_value_l1", "correlation_mna"}
    assert all(f"correlation_{x}" in progress[0] for x in script.SCORES if x != "regret")
    assert {f"curriculum/{name}" for name in expected} <= set(tags["scalars"])
    assert set(tags["images"]) == {"levels/fresh", "levels/highest_score", "levels/highest_weight"}
    picture = Image.open(io.BytesIO(events.Images("levels/highest_score")[0].encoded_image_string))
    assert picture.size == (4 * 7 * 24, 7 * 24 + 36)
    checkpoint = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    assert checkpoint["totals"]["gradient_updates"] == result["gradient_updates"]


@pytest.mark.slow
def test_flags_of_the_optimisation(no_evaluation, monkeypatch, tmp_path):
    flags = f"{TINY} --curriculum plr --total-timesteps 384 --learning-rate 0.003"
    logged = {}
    for name in (
        "",
        "--anneal-lr",
        "--update-epochs 4 --target-kl 1e-9",
        "--precision bf16",
        "--num-minibatches 2",
    ):
        main(monkeypatch, f"{flags} {name} --run-dir {tmp_path}/run{len(logged)}")
        logged[name] = rows(tmp_path / f"run{len(logged)}/progress.csv")
    rates = [row["learning_rate"] for row in logged["--anneal-lr"]]
    np.testing.assert_allclose(rates, 0.003 * np.array([1, 0.75, 0.5, 0.25]), rtol=1e-4)
    # with --target-kl 2 epochs of 4
    assert [x[-1]["gradient_updates"] for x in logged.values()] == [8, 8, 8, 8, 16]
    # the third is the first again
    assert len({result_of(tmp_path / f"run{i}")["fingerprint"] for i in range(5)}) == 4
    assert abs(logged["--precision bf16"][0]["entropy"] - logged[""][0]["entropy"]) < 0.01


@pytest.mark.slow
@pytest.mark.parametrize(
    "env_id",
    [pytest.param("MiniGrid-MultiRoom-N2-S4-v0", marks=pytest.mark.slow), "MiniGrid-LavaGapS5-v0"],
)
def test_a_registered_environment_trains_and_is_evaluated_on_unseen_levels(
    env_id, monkeypatch, tmp_path
):
    flags = f"--env-id {env_id} --num-envs 4 --num-steps 104 --total-timesteps 2496"
    flags += " --buffer-size 8 --rho 0.25"
    main(monkeypatch, f"{flags} --eval-episodes 3 --capture-video --run-dir {tmp_path}/run")
    progress, result = rows(tmp_path / "run/progress.csv"), result_of(tmp_path / "run")
    assert {row["replay"] for row in progress} == {0, 1} and "walls_new" not in progress[0]
    assert list(result["evaluation"]["episodes"]) == [env_id]
    assert (
        len(result["evaluation"]["episodes"][env_id]) == 3
        and f"solved_{env_id}" in result["evaluation"]
    )
    checkpoint = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    levels = checkpoint["sampler"]["arrays"]["levels"]
    assert levels.max() < script.FIRST_TEST_LEVEL and (levels >= 0).sum() >= 2
    assert list((tmp_path / "run/videos").glob("*/*.gif"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "env_id, seeds, distinct, seen",
    [
        ("MiniGrid-DoorKey-5x5-v0", 1000, 48, 100),
        ("MiniGrid-SimpleCrossingS9N3-v0", 2000, 786, 78),
    ],
)
def test_of_some_environments_few_levels_differ(env_id, seeds, distinct, seen):
    env = gym.make(env_id).unwrapped
    starts = []
    for seed in (*range(seeds), *range(script.FIRST_TEST_LEVEL, script.FIRST_TEST_LEVEL + 100)):
        env.reset(seed=seed)
        starts.append((env.grid.encode().tobytes(), env.agent_dir, tuple(env.agent_pos)))
    known = set(starts[:seeds])
    assert len(known) == distinct and sum(start in known for start in starts[seeds:]) == seen


@pytest.mark.slow
def test_it_learns(no_evaluation, monkeypatch, tmp_path):
    """Small open mazes: the goal is found by chance at first, and soon on purpose."""
    flags = (
        "--curriculum dr --maze-size 5 --num-walls 1 --max-steps 16 --num-envs 32 --num-steps 16"
    )
    flags += " --learning-rate 0.003 --total-timesteps 12288 --num-minibatches 4"
    main(monkeypatch, f"{flags} --run-dir {tmp_path}/run")
    returns = [row["episodic_return"] for row in rows(tmp_path / "run/progress.csv")]
    assert np.mean(returns[:3]) < 0.5 and np.mean(returns[-3:]) > 0.7


# ---- failures ------------------------------------------------------------------------------------


def test_what_is_allowed():
    for flags in (
        "--num-steps 128 --curriculum dr",  # nothing is scored
        # cut episodes are scored
        "--num-steps 128 --bootstrap-timeouts --score positive_value_loss",
        "--score-transform power --score value_l1",
        "--maze-size 5 --num-walls 7",
        "--env-id MiniGrid-ObstructedMaze-1Dl-v0 --num-steps 288",
        "--nu 0.7 --replay-prob 0.3",  # 1 - 0.7 is not 0.3 in floats
    ):
        script.check_args(tyro.cli(script.Args, args=flags.split()))
    assert script.make_sampler(script.Args(nu=0.2)).nu == 0.2
