"""Levels as people met them in use: memory, Procgen's options, environments that are not fit,
packages that are not there, pictures."""

import gc
import importlib.util
import os
import shutil
import sys
import threading
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import support
import torch
from gymnasium.envs.registration import EnvSpec
from minigrid.core.grid import Grid
from minigrid.core.mission import MissionSpace
from minigrid.core.world_object import Goal, Wall
from minigrid.envs.babyai.core import roomgrid_level
from minigrid.minigrid_env import MiniGridEnv
from minigrid.wrappers import ImgObsWrapper
from packaging.requirements import Requirement
from PIL import Image
from support import ROOT, TINY, assert_refused, main

import ppo_plr_procgen as procgen_script
import ppo_robust_plr_minigrid as maze_script
from plr_sampler import LevelSampler, ranks
from ppo_plr_procgen import ProcgenLevels

CPU = torch.device("cpu")
HAVE_PROCGEN = importlib.util.find_spec("procgen") or importlib.util.find_spec("procgen_gym")
needs_procgen = pytest.mark.skipif(not HAVE_PROCGEN, reason="no wheel of Procgen here")
LAST_LEVEL = 2**31 - 2
MODES = [("bigfish", "hard"), ("leaper", "extreme"), ("heist", "memory"), ("miner", "memory")]


# ---- Procgen's memory (A4) -----------------------------------------------------------------------


class AnyAction:
    """In the agent's place."""

    def get_action_and_value(self, obs):
        return (torch.randint(15, (len(obs),)),)


def resident_bytes():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@needs_procgen
def test_new_levels_take_no_memory():
    """A new game for each, as before, took 10.7 KB: 32 MB."""
    envs = ProcgenLevels(1, "starpilot", "easy", 0)
    for level in range(300):
        envs.make_level_start(level)
    before = resident_bytes()
    for level in range(1000, 4000):
        envs.make_level_start(level)
    assert resident_bytes() - before < 3e6


@needs_procgen
def test_no_game_is_made_for_a_level_or_an_evaluation(monkeypatch):
    made = []
    libenv = pytest.importorskip("gym3.libenv")
    init = libenv.CEnv.__init__

    def counting(self, *args, **kwargs):
        made.append(kwargs)
        init(self, *args, **kwargs)

    monkeypatch.setattr(libenv.CEnv, "__init__", counting)
    envs = ProcgenLevels(8, "fruitbot", "easy", 1)
    for first in range(0, 160, 8):
        envs.reset(seed=first)
    assert len(made) == 2  # the games played, and the maker of starts
    args = procgen_script.Args(env_id="fruitbot", eval_episodes=2, env_threads=1)
    procgen_script.evaluate(AnyAction(), args, CPU)
    after_one = len(made)
    assert after_one > 2
    for _ in range(3):
        procgen_script.evaluate(AnyAction(), args, CPU)
    assert len(made) == after_one


@needs_procgen
def test_a_game_that_the_garbage_collector_closes_stops_nobody(monkeypatch):
    """It may do so while another game is made, and both wanted one lock: nothing moved again. Any
    reference cycle leads there, such as a caught exception's."""
    cffi = pytest.importorskip("cffi.api")
    load = cffi._make_ffi_library
    collected = []

    def collect_and_load(*args):  # with the lock held
        collected.append(gc.collect())
        return load(*args)

    def make_lose_and_make():
        envs = ProcgenLevels(1, "fruitbot", "easy", 0)
        envs.itself = envs
        del envs
        monkeypatch.setattr(cffi, "_make_ffi_library", collect_and_load)
        ProcgenLevels(1, "fruitbot", "easy", 0)

    gc.disable()
    thread = threading.Thread(target=make_lose_and_make, daemon=True)
    try:
        thread.start()
        thread.join(30)
    finally:
        gc.enable()
    assert not thread.is_alive()
    assert collected[0] > 0


def fresh_game(game, mode, level, **options):
    """One that has never played another level."""
    settings = {"num_levels": 1, "start_level": level, "rand_seed": 7, "num_threads": 0}
    settings |= {"env_name": game, "distribution_mode": mode}
    return procgen_script.load_procgen()(num=1, **settings, **options)


def played_otherwise(envs, game, mode, level, steps=200):
    """In how many steps the level's start, as made by `envs`, plays otherwise than a fresh game;
    and whether the episode ended."""
    expected = fresh_game(game, mode, level)
    for k in (1, 2, 3):  # what the maker made before
        envs.make_level_start((level + k) % LAST_LEVEL)
    state = envs.make_level_start(level)
    envs.procgen.call_c_func("set_state", 0, state, len(state))
    rng = np.random.default_rng(level)
    # a reset gives the observation alone
    differing = not np.array_equal(*(x.observe()[1]["rgb"] for x in (envs.procgen, expected)))
    for _ in range(steps):
        action = rng.integers(15, size=1).astype(np.int32)
        envs.procgen.act(action)
        expected.act(action)
        rewards, obs, first = envs.procgen.observe()
        expected_rewards, expected_obs, expected_first = expected.observe()
        same = rewards[0] == expected_rewards[0] and first[0] == expected_first[0]
        if first[0] or expected_first[0]:
            return differing + (not same), True
        differing += not (same and np.array_equal(obs["rgb"], expected_obs["rgb"]))
    return differing, False


def assert_made_starts_are_exact(game, mode, levels):
    envs = ProcgenLevels(1, game, mode, 0)
    for level in levels:
        assert played_otherwise(envs, game, mode, level)[0] == 0, f"{game}, {mode}: level {level}"
    once = envs.make_level_start(levels[0])
    envs.make_level_start(levels[1])
    assert envs.make_level_start(levels[0]) == once


@needs_procgen
@pytest.mark.slow
@pytest.mark.parametrize("game", procgen_script.GAMES)
def test_a_made_start_plays_like_a_fresh_game(game):
    assert_made_starts_are_exact(game, "easy", [0, 7, 2**30 + 5, LAST_LEVEL])


@needs_procgen
@pytest.mark.slow
@pytest.mark.parametrize("game, mode", MODES)
def test_a_made_start_plays_like_a_fresh_game_in_the_other_modes(game, mode):
    assert_made_starts_are_exact(game, mode, [*range(12), 2**30 + 5, LAST_LEVEL])


@needs_procgen
def test_episodes_end_alike_and_miner_needs_what_is_done_for_it():
    """Shows that the comparison can fail: without its special case, miner keeps the number of
    diamonds of the level before."""
    envs = ProcgenLevels(1, "miner", "easy", 0)
    levels = range(100, 112)
    ends = [played_otherwise(envs, "miner", "easy", level, 400) for level in levels]
    assert sum(differing for differing, _ in ends) == 0
    assert sum(ended for _, ended in ends) >= 6
    fresh = [fresh_game("miner", "easy", level).get_state()[0] for level in levels]
    assert [envs.make_level_start(level)[-8:-4] for level in levels] == [x[-8:-4] for x in fresh]
    envs.env_id = "another"
    assert [envs.make_level_start(level)[-8:-4] for level in levels] != [x[-8:-4] for x in fresh]


@needs_procgen
@pytest.mark.parametrize(
    "seed",
    [2**31 - 1, 2**31 - 2, -1, 2**40, [0, -1], [2**31 - 1, 0], np.array([5, 2**31])],
    ids=str,
)
def test_a_seed_that_is_no_level_is_refused_with_a_sentence(seed):
    envs = ProcgenLevels(2, "bigfish", "easy", 1)
    start, _ = envs.reset(seed=[2**31 - 2, 0])  # the last one, and the first
    start = start.copy()
    with pytest.raises(ValueError, match=r"Procgen's levels are 0 to 2\*\*31 - 2, a seed of .* is"):
        envs.reset(seed=seed)
    assert np.array_equal(envs.procgen.observe()[1]["rgb"], start)


# ---- Procgen's options (D21) ---------------------------------------------------------------------


OTHER = {"use_backgrounds": False, "restrict_themes": True, "center_agent": False}
FLAGS = {
    "use_backgrounds": "--no-use-backgrounds",
    "restrict_themes": "--restrict-themes",
    "center_agent": "--no-center-agent",
}


@needs_procgen
@pytest.mark.parametrize("name", OTHER)
def test_an_option_is_another_picture_of_the_same_game(name):
    args = procgen_script.Args(env_id="coinrun", env_threads=1)
    other = procgen_script.Args(env_id="coinrun", env_threads=1, **{name: OTHER[name]})
    rng = np.random.default_rng(0)
    for make in (procgen_script.make_envs, procgen_script.evaluation_envs):
        envs = [make(x, 8, CPU) for x in (args, other)]
        starts = []
        for x in (*envs, *envs):  # in turn: neither has the other's starts
            starts.append(x.reset(seed=0)[0].copy())
        assert np.array_equal(starts[0], starts[2]) and np.array_equal(starts[1], starts[3])
        assert (starts[0] != starts[1]).any()
        for level in range(8):
            game = fresh_game("coinrun", "easy", level, **{name: OTHER[name]})
            assert np.array_equal(starts[1][level], game.observe()[1]["rgb"][0])
        for _ in range(60):
            actions = rng.integers(15, size=8)
            (_, rewards, ends, *_), (_, other_rewards, other_ends, *_) = (
                x.step(actions) for x in envs
            )
            assert np.array_equal(rewards, other_rewards) and np.array_equal(ends, other_ends)
            if ends.any():
                for x in envs:
                    x.reset(seed=20, options={"reset_mask": ends})


@pytest.mark.slow
@needs_procgen
def test_options_reach_training_and_evaluation_and_stay_the_runs(monkeypatch, tmp_path, capsys):
    made = []
    init = ProcgenLevels.__init__

    def watched(self, *args, **options):
        made.append({name: options.get(name) for name in OTHER})
        init(self, *args, **options)

    monkeypatch.setattr(ProcgenLevels, "__init__", watched)
    run_dir = tmp_path / "run"
    flags = f"{TINY['ppo_plr_procgen']} {' '.join(FLAGS.values())} --total-timesteps 192"
    main(procgen_script, monkeypatch, f"{flags} --run-dir {run_dir}")
    assert len(made) >= 2 and all(x == OTHER for x in made)
    args = support.json.loads((run_dir / "args.json").read_text())
    assert {name: args[name] for name in OTHER} == OTHER
    for name, value in OTHER.items():
        flag = f"--{'no-' if value else ''}{name.replace('_', '-')}"  # as it is by default
        with pytest.raises(SystemExit) as stop:
            main(procgen_script, monkeypatch, f"--resume {run_dir} --total-timesteps 384 {flag}")
        message = capsys.readouterr().err
        assert stop.value.code == 2 and message.count("\n") == 1
        refused = f"--{name.replace('_', '-')} {not value} must be {value}, as in the run to resume"
        assert refused in message


# ---- environments that are not fit (B12, C16) ----------------------------------------------------


class Room(MiniGridEnv):
    """The agent anywhere in an empty room."""

    def __init__(self, **kwargs):
        super().__init__(MissionSpace(lambda: ""), grid_size=9, max_steps=50, **kwargs)

    def _gen_grid(self, width, height):
        self.grid = Grid(width, height)
        self.agent_pos, self.agent_dir = (int(self.np_random.integers(1, 8)), 1), 0
        self.mission = ""


class PlainImage(Room):
    """Its observation is an image, in no dictionary."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.observation_space = gym.spaces.Box(0, 255, (7, 7, 3), np.uint8)

    def gen_obs(self):
        return super().gen_obs()["image"]


class FailsLater(Room):
    """On some levels only."""

    def _gen_grid(self, width, height):
        super()._gen_grid(width, height)
        if self.np_random.random() < 0.3:
            raise FileNotFoundError("no file\nof this level")


NO_DICTIONARY = "its observations are no dictionaries with an image and a direction"
UNFIT = {
    "MiniGrid-WFC-MazeSimple-v0": "No such file or directory",  # the package lacks its pattern
    "FailsLater-v0": "no file",
    "PlainImage-v0": NO_DICTIONARY,
    "Wrapped-v0": NO_DICTIONARY,
    "MiniGrid-Empty-16x16-v0": "its levels are all alike",
}


@pytest.mark.parametrize("env_id", UNFIT)
def test_an_environment_that_cannot_be_trained_on_is_refused(env_id, monkeypatch, tmp_path, capsys):
    makers = {"PlainImage-v0": PlainImage, "FailsLater-v0": FailsLater}
    makers["Wrapped-v0"] = lambda **kwargs: ImgObsWrapper(Room(**kwargs))
    for name, maker in makers.items():
        monkeypatch.setitem(gym.registry, name, EnvSpec(name, entry_point=maker))
    sentence = f"--env-id {env_id} must be maze or a registered MiniGrid environment: "
    flags = f"--env-id {env_id} --num-steps 1024"
    assert_refused(maze_script, monkeypatch, tmp_path, capsys, flags, sentence)
    monkeypatch.undo()
    for name, maker in makers.items():
        monkeypatch.setitem(gym.registry, name, EnvSpec(name, entry_point=maker))
    assert_refused(maze_script, monkeypatch, tmp_path, capsys, flags, UNFIT[env_id])


# ---- packages (D19, D20) -------------------------------------------------------------------------


def test_without_procgen_its_script_says_where_there_is_one(monkeypatch, tmp_path, capsys):
    for package in ("procgen", "procgen_gym", "procgen_gym.env"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as stop:
        main(procgen_script, monkeypatch, f"{TINY['ppo_plr_procgen']} --run-dir {tmp_path}/run")
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1
    assert message.startswith("error: Procgen is not installed: pip install -r requirements.txt")
    assert "Linux on x86-64, Python 3.11 to 3.13" in message and "apt-get" not in message


@pytest.mark.parametrize(
    "python, system, machine, expected",
    [
        ("3.11", "linux", "x86_64", ["procgen-mirror"]),
        ("3.12", "linux", "x86_64", ["procgen-mirror"]),
        ("3.13", "linux", "x86_64", ["procgen-gym"]),
        ("3.14", "linux", "x86_64", []),
        ("3.12", "linux", "aarch64", []),
        ("3.12", "darwin", "arm64", []),
        ("3.13", "darwin", "x86_64", []),
    ],
)
def test_only_where_there_is_a_wheel_procgen_is_required(python, system, machine, expected):
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = [Requirement(line) for line in lines if not line.startswith("#")]
    place = {"python_version": python, "sys_platform": system, "platform_machine": machine}
    asked = [x.name for x in required if x.marker is None or x.marker.evaluate(place)]
    assert [name for name in asked if "procgen" in name] == expected
    assert {"torch", "numpy", "gymnasium", "minigrid", "tyro"} <= set(asked)


@needs_procgen
@pytest.mark.skipif(not importlib.util.find_spec("procgen"), reason="stands in for procgen-gym")
def test_procgen_gyms_interface_serves_as_well(monkeypatch):
    """The package for Python 3.13, played here by the one for earlier ones."""
    from procgen import ProcgenGym3Env

    class Games:
        _handle = "the games"

        def __init__(self, **options):
            self.game = ProcgenGym3Env(**options)
            self.game._reuse_arrays = True
            self._lib = self
            self.act, self.call_c_func = self.game.act, self.game.call_c_func

        def libenv_observe(self, handle):
            assert handle == self._handle
            self.reward, self.obs, self.first = self.game.observe()

        def get_reward_buf(self):
            return self.reward

        def get_ob_bufs(self):
            return self.obs

        def get_first_buf(self):
            return self.first.astype(np.uint8)

    class ProcgenVecEnv:
        def __init__(self, num_envs, **options):
            self._clib = Games(num=num_envs, **options)
            self.get_state = self._clib.game.get_state

    expected = ProcgenLevels(3, "fruitbot", "easy", 1)
    stand_in = type(sys)("procgen_gym.env")
    stand_in.ProcgenVecEnv = ProcgenVecEnv
    monkeypatch.setitem(sys.modules, "procgen", None)
    monkeypatch.setitem(sys.modules, "procgen_gym", type(sys)("procgen_gym"))
    monkeypatch.setitem(sys.modules, "procgen_gym.env", stand_in)
    envs = ProcgenLevels(3, "fruitbot", "easy", 1)
    assert isinstance(envs.procgen, ProcgenVecEnv)
    assert not isinstance(expected.procgen, ProcgenVecEnv)
    rng = np.random.default_rng(0)
    obs, expected_obs = (x.reset(seed=9)[0] for x in (envs, expected))
    ended = 0
    for _ in range(150):
        assert np.array_equal(obs, expected_obs)
        actions = rng.integers(15, size=3)
        (obs, *row, _), (expected_obs, *expected_row, _) = (
            x.step(actions) for x in (envs, expected)
        )
        for a, b in zip(row, expected_row):
            assert np.array_equal(a, b) and a.dtype == b.dtype
        ended += row[1].sum()
        if row[1].any():
            for x in (envs, expected):
                x.reset(seed=30, options={"reset_mask": row[1]})
    assert ended > 0
    assert envs.level_start(3) == expected.level_start(3)


def test_babyais_prints_stay_off_the_screen(monkeypatch, capsys):
    def resets():
        envs = maze_script.make_minigrid("BabyAI-GoToImpUnlock-v0", 2, CPU)
        for level in range(0, 12, 2):
            envs.reset(seed=[level, level + 1])
        return capsys.readouterr().out

    assert resets() == ""
    monkeypatch.delattr(roomgrid_level, "print")
    assert "Sampling rejected" in resets()  # so there was something to keep off


# ---- pictures (E) --------------------------------------------------------------------------------


class Package(MiniGridEnv):
    """The package's own environment on one given maze: it draws what `MazeEnvs.frame` must."""

    def __init__(self, maze):
        self.maze = maze
        size = maze.walls.shape[1] + 2
        super().__init__(
            MissionSpace(lambda: ""), grid_size=size, see_through_walls=True, agent_view_size=5
        )

    def _gen_grid(self, width, height):
        self.grid = Grid(width, height)
        self.grid.wall_rect(0, 0, width, height)
        for row, column in np.argwhere(self.maze.walls[0]):
            self.grid.set(column + 1, row + 1, Wall())
        self.grid.set(self.maze.goal[0, 1] + 1, self.maze.goal[0, 0] + 1, Goal())
        self.agent_pos = (int(self.maze.agent[0, 1]) + 1, int(self.maze.agent[0, 0]) + 1)
        self.agent_dir = int(self.maze.direction[0])
        self.mission = ""


def test_a_picture_shows_the_agents_view_as_the_package_does():
    directions = set()
    for level in range(6):
        maze = maze_script.random_mazes(np.array([level]), 9, 10)
        envs = maze_script.MazeEnvs(2, CPU, size=9)  # the first one is drawn
        pair = maze_script.concatenate([maze, maze_script.random_mazes(np.array([99]), 9, 10)])
        envs.reset(options={"mazes": pair})
        package = Package(maze)
        package.reset()
        for action in (2, 1, 2, 1, 2, 1, 2):
            frame = envs.frame()
            expected = package.get_frame(highlight=True, tile_size=maze_script.TILE)
            assert np.array_equal(frame, expected)
            assert not np.array_equal(frame, package.get_frame(False, maze_script.TILE))
            directions.add(package.agent_dir)
            *_, done = envs.step(torch.tensor([action, 6]))[:3]
            package.step(action)
            if done[0]:
                break
    assert directions == {0, 1, 2, 3}


@pytest.mark.parametrize("steps", [9, 10])  # every second frame: an even and an odd number of them
def test_a_film_begins_with_the_start(steps, monkeypatch, tmp_path):
    maze = maze_script.named_maze("Labyrinth", 0)
    envs = maze_script.MazeEnvs(1, CPU, 15, max_steps=steps)
    reset = {"options": {"mazes": maze}}
    monkeypatch.setattr(
        maze_script, "evaluation_environments", lambda *args: iter([("Maze", envs, reset)])
    )
    envs.reset(**reset)
    start = envs.frame()
    agent = maze_script.Agent(envs)
    agent.actor[2].bias.data[1] = 100.0  # it turns right, and so no frame is like the one before
    maze_script.evaluate(agent, maze_script.Args(eval_episodes=1), CPU, tmp_path)
    frames = []
    with Image.open(tmp_path / "Maze.gif") as film:
        assert film.size == (360, 360)
        for i in range(film.n_frames):
            film.seek(i)
            frames.append(np.asarray(film.convert("RGB"), float))
    assert abs(frames[0] - start).max() < 50 < abs(frames[-1] - start).max()
    assert 2 <= len(frames) <= 6


@pytest.mark.parametrize("env_id, width", [("maze", 360), ("MiniGrid-Empty-Random-5x5-v0", 120)])
def test_pictures_of_levels_have_a_caption_that_fits(env_id, width):
    args = maze_script.Args(env_id=env_id)
    sampler = LevelSampler(buffer_size=8, num_envs=2, seed=1, rho=0.0)
    levels = [2**30 - 1, 2**30 - 2]
    sampler.next_levels(np.ones(2, bool), levels=levels)
    sampler.update_scores(levels, [1234.5678, -0.125])
    pictures = maze_script.level_pictures(args, sampler, 7)
    assert set(pictures) == {"levels/highest_score", "levels/highest_weight", "levels/fresh"}
    picture = pictures["levels/highest_score"]
    assert picture.dtype == np.uint8 and picture.shape == (width + 36, 2 * width, 3)
    envs = maze_script.make_envs(args, 1, CPU)
    captions = []
    for i, level in enumerate(levels):
        part = picture[:, i * width : (i + 1) * width]
        envs.reset(seed=[level])
        assert np.array_equal(part[:width], envs.frame())
        captions.append(part[width:])
        assert captions[-1].max() > 200 and captions[-1][:, -2:].max() == 0  # nothing is cut off
        rows = captions[-1].max(axis=(1, 2)) > 200
        assert rows[:18].any() and rows[18:-2].any() and not rows[-2:].any()  # two lines
    assert not np.array_equal(*captions)


# ---- a report of runs that were not evaluated (C16) ----------------------------------------------


@pytest.mark.parametrize("source", ["starpilot_plr_2M_seed1", "mazes_dr_60M_seed1_precision=bf16"])
@pytest.mark.parametrize(
    "log",
    ["no log", *(pytest.param(x, marks=pytest.mark.slow) for x in ("a header", "an empty file"))],
)
def test_a_run_without_an_evaluation_stands_in_a_report(source, log, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    report = pytest.importorskip("report")
    run_dir = tmp_path / "run"
    committed = ROOT / "benchmarks" / "results" / "runs" / source
    ignored = shutil.ignore_patterns("result.json", "evaluation*")
    shutil.copytree(committed, run_dir, ignore=ignored)
    header = (committed / "evaluations.csv").read_text().splitlines(keepends=True)[0]
    if log != "no log":
        (run_dir / "evaluations.csv").write_text(header if log == "a header" else "")
    monkeypatch.setattr(sys, "argv", ["report.py", str(run_dir), "--out", str(tmp_path / "out")])
    report.main()
    text = (tmp_path / "out" / "REPORT.md").read_text()
    assert "- **run**: " in text and ", unfinished." in text and "nan" not in text
    assert list((tmp_path / "out" / "pictures").glob("*.png"))


def test_a_result_that_has_no_evaluation_is_refused_in_a_sentence(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    report = pytest.importorskip("report")
    run_dir = tmp_path / "run"
    committed = ROOT / "benchmarks" / "results" / "runs" / "starpilot_plr_2M_seed1"
    shutil.copytree(committed, run_dir, ignore=shutil.ignore_patterns("result.json"))
    (run_dir / "result.json").write_text('{"evaluation": null, "global_step": 1}')
    monkeypatch.setattr(sys, "argv", ["report.py", str(run_dir), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        report.main()
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1
    assert message.startswith(f"error: RUN-DIRS {run_dir} has a file that cannot be read: ")


# ---- a deviation that is listed in the README ----------------------------------------------------


def test_of_equal_scores_the_smaller_index_ranks_first():
    assert ranks(np.array([1.0, 2.0, 2.0, 1.0, 3.0])).tolist() == [4, 2, 3, 5, 1]
    many = ranks(np.repeat([0.0, 5.0], 40))  # long enough for a sort that is not stable
    assert many[40:].tolist() == list(range(1, 41)) and many[:40].tolist() == list(range(41, 81))
