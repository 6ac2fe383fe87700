"""ACCEL in ppo_robust_plr_minigrid.py: the edit, whose children are made, what is learned from, and
the mazes that are kept."""

import functools
import itertools
from collections import Counter, deque

import numpy as np
import pytest
import support
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import assert_ledger_balances, rows

import ppo_robust_plr_minigrid as script

CPU = torch.device("cpu")
TINY = support.tiny(script, "--curriculum accel")
FIRST = script.FIRST_EDITED_LEVEL
near = functools.partial(pytest.approx, rel=1e-5)  # what a CSV file keeps
main = functools.partial(support.main, script)


@pytest.fixture
def no_evaluation(monkeypatch):
    monkeypatch.setattr(script, "evaluate", lambda *args: {"solved_mean": 0.0, "episodes": {}})


# ---- the edit ------------------------------------------------------------------------------------


def one_maze(walls, goal, agent, direction: int = 0) -> script.Mazes:
    """walls (height, width); goal and agent (row, column)."""
    return script.Mazes(
        np.array(walls, bool)[None], np.array([goal]), np.array([agent]), np.array([direction])
    )


def copies(mazes: script.Mazes, n: int) -> script.Mazes:
    return script.Mazes(*[part.repeat(n, axis=0) for part in mazes])


def outcomes(walls: frozenset, goal: int, agent: int, size: int, num_edits: int) -> Counter:
    """(walls, goal, agent) -> probability, by going through all draws of the operator as
    methods.md 1.1 describes it. Cells are numbers below size."""
    probability = Counter()
    draws = itertools.product(range(size), repeat=num_edits)
    for cells in draws:
        distinct = list(dict.fromkeys(cells))
        for symbols in itertools.product(("wall", "empty", "goal"), repeat=len(distinct)):
            p = size**-num_edits * 3 ** -len(distinct)
            now_walls, now_goal, now_agent = set(walls), goal, agent
            for cell, symbol in zip(distinct, symbols):
                now_walls.discard(cell)
                now_goal = None if now_goal == cell else now_goal
                now_agent = None if now_agent == cell else now_agent
                if symbol == "wall":
                    now_walls.add(cell)
                elif symbol == "goal":
                    now_goal = cell
            free = [x for x in range(size) if x not in now_walls and x != now_agent]
            goals = free if now_goal is None else [now_goal]
            for g in goals:
                free = [x for x in range(size) if x not in now_walls and x != g]
                agents = free if now_agent is None else [now_agent]
                for a in agents:
                    state = (frozenset(now_walls), g, a)
                    probability[state] += p / len(goals) / len(agents)
    return probability


def chi_square(counts: Counter, probability: Counter, n: int) -> float:
    """The statistic's distance from its mean in its standard deviations, states that are expected
    less than 5 times taken together."""
    assert counts.keys() <= probability.keys()
    observed, expected = [0], [0.0]
    for state, p in probability.items():
        if n * p < 5:
            observed[0] += counts[state]
            expected[0] += n * p
        else:
            observed.append(counts[state])
            expected.append(n * p)
    observed, expected = np.array(observed), np.array(expected)
    used = expected > 0
    statistic = ((observed - expected)[used] ** 2 / expected[used]).sum()
    freedom = used.sum() - 1
    return (statistic - freedom) / np.sqrt(2 * freedom)


@pytest.mark.parametrize("num_edits", [1, 2, 3])
def test_children_are_distributed_as_the_operator_says(num_edits):
    """Every outcome of a room of 2 x 3 cells with a wall, by chi-square against all the draws."""
    n = 60_000
    parent = one_maze([[1, 0, 0], [0, 0, 0]], goal=(0, 2), agent=(1, 1))
    children = script.edit_mazes(copies(parent, n), num_edits, np.random.default_rng(1))
    walls = [frozenset(np.flatnonzero(x).tolist()) for x in children.walls.reshape(n, 6)]
    goal = (children.goal @ (3, 1)).tolist()
    agent = (children.agent @ (3, 1)).tolist()
    probability = outcomes(frozenset({0}), 2, 4, 6, num_edits)
    assert sum(probability.values()) == pytest.approx(1)
    assert abs(chi_square(Counter(zip(walls, goal, agent)), probability, n)) < 5


def test_the_size_of_an_edit_of_a_room_of_13_by_13():
    """Hand-computed: a cell is among the 5 drawn with 1 - (168 / 169)^5, and then a wall with 1/3;
    the goal is elsewhere afterwards unless no goal is drawn and its cell is not, or it is drawn
    there or placed there again."""
    n = 40_000
    parent = copies(one_maze(np.zeros((13, 13)), goal=(3, 4), agent=(9, 9)), n)
    children = script.edit_mazes(parent, 5, np.random.default_rng(2))
    drawn = 1 - (168 / 169) ** 5
    walls = children.walls.sum((1, 2))
    assert walls.mean() == pytest.approx(169 * drawn / 3, abs=0.03)
    moved = (children.agent != (9, 9)).any(axis=1).mean()
    assert moved == pytest.approx(drawn, abs=0.004)  # it hardly ever finds its old cell again
    # 87 % of edits draw a goal, if all five cells are distinct
    moved = (children.goal != (3, 4)).any(axis=1).mean()
    assert moved == pytest.approx(1 - (2 / 3) ** 5 * (1 - drawn), abs=0.015)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**31), st.integers(5, 15), st.integers(0, 60), st.integers(1, 5))
def test_a_child_of_a_child_is_two_edits_away(seed, size, num_walls, num_edits):
    num_walls = min(num_walls, (size - 2) ** 2 // 4)
    rng = np.random.default_rng(seed)
    levels = rng.integers(script.FIRST_TEST_LEVEL, size=50)
    start = script.random_mazes(levels, size, num_walls)
    mazes = start
    for generation in (1, 2):
        before = [part.copy() for part in mazes]
        made = script.edit_mazes(mazes, num_edits, rng)
        assert all((a == b).all() for a, b in zip(mazes, before)), "the parent was changed"
        mazes = made
        enough = (size - 2) ** 2 - num_walls > 2 * num_edits + 2  # a cell is always free
        differ = (mazes.walls != start.walls).sum((1, 2))
        assert not enough or (differ <= generation * num_edits).all()
        assert (mazes.direction == start.direction).all()
        rows = np.arange(len(levels))
        for cell in (mazes.goal, mazes.agent):
            assert ((cell >= 0) & (cell < size - 2)).all()
            assert not mazes.walls[rows, cell[:, 0], cell[:, 1]].any()
        assert (mazes.goal != mazes.agent).any(axis=1).all()


def test_without_a_free_cell_a_wall_gives_way():
    walls = np.ones((3, 3))
    walls[0, 0] = walls[0, 1] = 0
    parent = copies(one_maze(walls, goal=(0, 0), agent=(0, 1)), 5000)
    children = script.edit_mazes(parent, 3, np.random.default_rng(3))
    rows = np.arange(5000)
    assert (children.goal != children.agent).any(axis=1).all()
    for cell in (children.goal, children.agent):
        assert not children.walls[rows, cell[:, 0], cell[:, 1]].any()
    full = children.walls.sum((1, 2)) == 7
    assert (children.agent != (0, 1)).any(axis=1)[full].any()  # there it had no free cell


def test_the_start_direction_stays():
    mazes = script.random_mazes(np.arange(100), 9, 10)
    children = script.edit_mazes(mazes, 5, np.random.default_rng(0))
    assert (children.direction == mazes.direction).all() and len(set(children.direction)) == 4


# ---- the editor: parents, numbers, mazes ---------------------------------------------------------


def make_editor(num_envs: int, **flags) -> tuple:
    args = script.Args(curriculum="accel", num_envs=num_envs, num_walls=3, maze_size=7, **flags)
    envs = script.make_envs(args, num_envs, CPU)
    return script.Editor(args, envs), envs, args


def test_a_batch_is_edited_as_it_was_played():
    editor, _, args = make_editor(4, num_edits=1)
    sampler = script.make_sampler(args)
    assert editor.children(sampler) is None
    editor.choose_parents(np.array([7, 5, 7, 6]), np.zeros(0, int), np.zeros(0))
    children = editor.children(sampler)
    assert children.tolist() == [FIRST, FIRST + 1, FIRST + 2, FIRST + 3]
    parents = script.random_mazes(np.array([7, 5, 7, 6]), 7, 3)
    made = script.mazes_of(args, children, editor)
    assert ((parents.walls != made.walls).sum((1, 2)) <= 1).all()
    assert editor.lineage(np.array([FIRST + 3, 7])).tolist() == [1, 0]
    assert editor.children(sampler) is None  # not twice


@pytest.mark.parametrize(
    "base, num_envs, expected",
    [
        ("lowest", 8, [4, 4, 8, 8, 9, 9, 2, 2]),  # 9 was not finished: 0, as 8; 9 came later
        ("highest", 8, [6, 6, 2, 2, 8, 8, 9, 9]),
        ("lowest", 4, [4, 2, 6, 6]),
        ("lowest", 3, [4, 4, 4]),
        ("highest", 3, [6, 6, 6]),
        ("highest", 1, [6]),
    ],
)
def test_the_levels_of_lowest_or_highest_return_are_edited(base, num_envs, expected):
    """By hand. Mean returns: level 6: 0.5, 2: 0.25, 8 and 9: 0, 4: -1; 3 was not the first level of
    any environment."""
    started = np.array([6, 2, 4, 6, 8, 9, 4, 2])[:num_envs]
    levels = np.array([6, 6, 2, 2, 4, 3, 3, 8, 6])
    returns = np.array([0.5, 0.0, 0.5, 0.0, -1.0, 9.0, -9.0, 0.0, 1.0])
    if num_envs == 4:  # three distinct ones: all of them, as equally often as can be
        expected = [4, 4, 2, 6]
    editor, _, _ = make_editor(num_envs, accel_base=base)
    editor.choose_parents(started, levels, returns)
    assert editor.parents.tolist() == expected


def cells_of(envs: script.MazeEnvs) -> np.ndarray:
    """(N, height, width): the map that is played, without what lies beyond its border."""
    edge = script.VIEW - 1
    cells = envs.cells.view(envs.num_envs, envs.width, envs.width)
    return cells[:, edge:-edge, edge:-edge].numpy()


def test_environments_play_edited_mazes_by_their_numbers():
    """Also after their tables were emptied, mixed with random ones, and in pictures."""
    editor, envs, args = make_editor(8)
    sampler = script.make_sampler(args)
    editor.choose_parents(np.arange(8), np.zeros(0, int), np.zeros(0))
    children = editor.children(sampler)
    levels = children.copy()
    levels[::2] = np.arange(4)
    mazes = script.mazes_of(args, levels, editor)
    assert (mazes.walls[::2] == script.random_mazes(np.arange(4), 7, 3).walls).all()
    assert (mazes.walls[1::2] == editor.mazes.walls[1::2]).all()
    for _ in range(2):
        envs.reset(seed=levels.tolist())
        cells = cells_of(envs)
        assert ((cells == script.WALL) == mazes.walls).all()
        assert (np.argwhere(cells == script.GOAL)[:, 1:] == mazes.goal).all()
        row, column = np.divmod(envs.position.numpy() % envs.width**2, envs.width)
        assert (np.stack((row, column), axis=1) - script.VIEW + 1 == mazes.agent).all()
        assert (envs.direction.numpy() == mazes.direction).all()
        envs.row_of_level = {}
    sampler.next_levels(np.ones(8, bool), False, children)
    sampler.update_scores(children, np.arange(8.0))
    drawn = script.level_pictures(args, sampler, 1, editor)["levels/highest_score"]
    with_last = script.make_envs(args, 1, CPU)
    last = script.mazes_of(args, children[-1:], editor)
    with_last.reset(options={"mazes": last})
    side = 7 * script.TILE
    assert (drawn[:side, :side] == with_last.frame()).all()


def test_mazes_leave_with_their_levels_and_a_lost_one_is_named():
    editor, _, args = make_editor(4, buffer_size=6)
    sampler = script.make_sampler(args)
    levels = sampler.next_levels(np.ones(4, bool), False)
    sampler.update_scores(levels, np.ones(4))
    for generation in range(20):
        editor.choose_parents(levels, levels, np.zeros(4))
        levels = editor.children(sampler)
        sampler.next_levels(np.ones(4, bool), False, levels)
        sampler.update_scores(levels, np.full(4, generation + 2.0))
        held = sampler.levels[sampler.levels >= FIRST]
        assert set(held) <= set(editor.levels) and len(editor.levels) <= 6 + 4 + 4
        assert editor.lineage(levels).tolist() == [generation + 1] * 4
    with pytest.raises(ValueError, match=f"level {FIRST} is not among the edited mazes"):
        script.mazes_of(args, np.array([FIRST]), editor)
    with pytest.raises(ValueError, match="is not among the edited mazes"):
        editor.lineage(np.array([editor.next_level]))


def test_the_store_is_restored_and_small():
    """30 bytes a maze in the checkpoint, of 13 x 13 cells 44: its walls are bits."""
    editor, _, args = make_editor(100)
    sampler = script.make_sampler(args)
    editor.choose_parents(np.arange(100), np.zeros(0, int), np.zeros(0))
    editor.children(sampler)
    editor.choose_parents(editor.levels, np.zeros(0, int), np.zeros(0))
    state = script.default_convert(editor.state_dict())  # as a checkpoint has it
    arrays = [state[name] for name in ("levels", "edits", "walls", "goal", "agent", "direction")]
    assert sum(x.nbytes for x in arrays) == 100 * (8 + 8 + 4 + 2 + 2 + 1)
    other, _, _ = make_editor(100, seed=2)
    other.load_state_dict(state)
    assert script.fingerprint(other.state_dict()) == script.fingerprint(editor.state_dict())
    sampler.next_levels(np.ones(100, bool), False, editor.levels)
    assert (other.children(sampler) == editor.children(sampler)).all()
    for a, b in zip(other.mazes, editor.mazes):
        assert a.dtype == b.dtype and (a == b).all()


# ---- training ------------------------------------------------------------------------------------


def shortest_path(maze: script.Mazes) -> int:
    """Breadth-first search over cells; -1 if there is none."""
    start, goal = tuple(maze.agent[0].tolist()), tuple(maze.goal[0].tolist())
    steps, queue = {start: 0}, deque([start])
    while queue:
        r, c = queue.popleft()
        for cell in ((r + 1, c), (r - 1, c), (r, c + 1), (r, c - 1)):
            inside = min(cell) >= 0 and max(cell) < len(maze.walls[0])
            if inside and cell not in steps and not maze.walls[0][cell]:
                steps[cell] = steps[r, c] + 1
                queue.append(cell)
    return steps.get(goal, -1)


@pytest.mark.slow
@pytest.mark.parametrize("base", ["batch", "lowest"])
def test_a_replay_rollout_is_followed_by_one_on_its_children(
    base, no_evaluation, monkeypatch, tmp_path
):
    """Only then; the parents are exactly the levels that were replayed, the children are what is
    played, nothing is learned from them, they enter the buffer, and all of it is logged."""
    rollouts, prints, known = [], [], {}

    class Spy(script.LevelSampler):
        def update(self, levels, step_scores, dones, **kwargs):
            episodes = super().update(levels, step_scores, dones, **kwargs)
            rollouts.append((levels.copy(), np.array(dones), self.levels.copy(), episodes))
            return episodes

    class Watched(script.Editor):
        def choose_parents(self, started, levels, returns):
            super().choose_parents(started, levels, returns)
            rollouts[-1] += (self.parents.copy(),)

        def children(self, sampler):
            children = super().children(sampler)
            if children is not None:
                known.update(zip(children.tolist(), self.edits[-len(children) :].tolist()))
            return children

    of_envs = {}

    def reset(self, *, seed=None, options=None):
        result = of_reset(self, seed=seed, options=options)
        if isinstance(seed, list) and self.num_envs == 4:
            for level, cells in zip(seed, cells_of(self)):
                if level >= FIRST and options is None:  # the start of a rollout
                    of_envs[level] = cells.copy()
        return result

    def watch(path, content):  # a checkpoint at the start, and after each iteration
        if path.name == "checkpoint.pt":
            parts = (content["agent"], content["optimizer"]["state"])
            prints.append([script.fingerprint(part) for part in parts])
        write_file(path, content)

    of_reset, write_file = script.MazeEnvs.reset, script.write_file
    monkeypatch.setattr(script.MazeEnvs, "reset", reset)
    monkeypatch.setattr(script, "write_file", watch)
    monkeypatch.setattr(script, "LevelSampler", Spy)
    monkeypatch.setattr(script, "Editor", Watched)
    flags = f"{TINY} --accel-base {base} --total-timesteps {45 * 96} --checkpoint-interval 1"
    main(monkeypatch, f"{flags} --run-dir {tmp_path}/run")
    logged = rows(tmp_path / "run/progress.csv")

    kinds = []
    for (levels, *_), row in zip(rollouts, logged, strict=True):
        edited = levels[0] >= FIRST
        kind = "replayed" if row["replay"] else "edited" if edited.all() else "new"
        assert kind != "new" or not edited.any()
        kinds.append(kind)
    assert {"new", "replayed", "edited"} == set(kinds) and kinds.count("new") > 5
    for before, kind in itertools.pairwise(kinds):
        assert (before == "replayed") == (kind == "edited")

    parents, number, untrained = None, FIRST, 0
    lineage = Counter()  # 0 for a random maze
    for i, (rollout, row, kind) in enumerate(zip(rollouts, logged, kinds)):
        levels, dones, buffer, episodes, *chosen = rollout
        learned = [a != b for a, b in zip(prints[i], prints[i + 1])]
        assert learned == [kind == "replayed"] * 2
        untrained += 96 * (kind != "replayed")
        assert row["untrained_steps"] == untrained and row["global_step"] == 96 * (i + 1)
        assert_ledger_balances(row)
        if kind == "replayed":
            (parents,) = chosen
            if base == "batch":
                assert (parents == levels[0]).all()
            assert set(parents) <= set(levels[0])
        elif kind == "edited":
            assert not chosen
            assert levels[0].tolist() == list(range(number, number + 4))
            assert (levels == levels[0]).all()  # as new levels are: over and over
            for parent, child in zip(parents.tolist(), levels[0].tolist()):
                lineage[child] = lineage[parent] + 1
                assert known[child] == lineage[child]
            number += 4
            assert set(episodes.level) == set(levels[0])  # scored
        assert row["children"] == number - FIRST
        held = buffer[buffer >= 0].tolist()
        assert row["lineage_buffer"] == near(np.mean([lineage[x] for x in held]))
        starts = np.vstack((np.ones((1, 4), bool), dones[:-1]))
        played = [lineage[x] for x in levels[starts].tolist()]
        if kind == "replayed":
            assert row["lineage_replayed"] == near(np.mean(played))
        else:
            assert np.isnan(row["lineage_replayed"])
        for column in ("new", "replayed", "edited"):
            assert np.isnan(row[f"walls_{column}"]) == (column != kind)
        if kind == "edited":
            of_level = [of_envs[x] for x in levels[0].tolist()]
            walls = [(cells == script.WALL).sum() for cells in of_level]
            assert row["walls_edited"] == near(np.mean(walls))
    assert any(x >= FIRST for x in held) and max(lineage.values()) > 1
    assert logged[-1]["evicted"] > 0 and logged[-1]["rejected"] > 0

    # what the environments played is what the last checkpoint keeps
    state = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["editor"]
    editor, _, args = make_editor(4)
    editor.load_state_dict(state)
    kept = [x for x in held if x >= FIRST]
    mazes = script.mazes_of(args, np.array(kept), editor)
    for k, level in enumerate(kept):
        assert ((of_envs[level] == script.WALL) == mazes.walls[k]).all()
        maze = script.Mazes(*[part[k : k + 1] for part in mazes])
        assert script.shortest_paths(maze)[0] == shortest_path(maze)


@pytest.mark.slow
def test_empty_rooms_are_filled_by_edits(no_evaluation, monkeypatch, tmp_path):
    flags = TINY.replace("--num-walls 6", "--num-walls 0")
    flags = f"{flags} --total-timesteps {60 * 96} --replay-prob 0.8 --run-dir {tmp_path}/run"
    main(monkeypatch, flags)
    logged = rows(tmp_path / "run/progress.csv")
    new = [row["walls_new"] for row in logged if not np.isnan(row["walls_new"])]
    assert set(new) == {0.0}
    assert logged[-1]["lineage_buffer"] > 1
    replayed = [row["walls_replayed"] for row in logged if row["replay"]]
    assert replayed[0] == 0 and np.mean(replayed[-5:]) > 1
