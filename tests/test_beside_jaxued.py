"""benchmarks/beside_jaxued.py: jaxued's network and mazes are what our evaluation plays; what it
saves becomes a run's rows.

What needs jaxued is skipped unless JAXUED is its source tree and JAXUED_PYTHON a Python with its
packages.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from support import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import beside_jaxued
from common import read_csv

import ppo_robust_plr_minigrid as ours

JAXUED = os.environ.get("JAXUED", "")
PYTHON = os.environ.get("JAXUED_PYTHON", "")

# Plays the actions (T, N) in the levels of data.npz with jaxued's network of random parameters.
PLAY = """
import runpy, sys
import jax, jax.numpy as jnp, numpy as np
import jaxued_process
jaxued_process.substitute_modules()
script = runpy.run_path(sys.argv[1] + "/examples/maze_plr.py", run_name="script")
data = np.load("data.npz")
Maze, Level = script["Maze"], script["Level"]
env = Maze(max_height=13, max_width=13, agent_view_size=5, normalize_obs=True)
levels = Level.stack([Level.from_str(text) for text in data["levels"].tolist()])
N = len(data["levels"])
key = jax.random.PRNGKey(0)
network = script["ActorCritic"](7)
state = script["ActorCritic"].initialize_carry((N,))
reset = jax.vmap(env.reset_to_level, (None, 0, None))
step = jax.jit(jax.vmap(env.step_env, (None, 0, 0, None)))
obs, env_state = reset(key, levels, env.default_params)
one_step = lambda obs: (jax.tree_util.tree_map(lambda x: x[None], obs), jnp.zeros((1, N), bool))
params = network.init(key, one_step(obs), state)
noise = jax.random.normal(key, (10**6,))  # no bias is 0, no two gates are alike
params = jax.tree_util.tree_map(lambda x: x + 0.1 * noise[: x.size].reshape(x.shape), params)
act = jax.jit(network.apply)
found = {name: [] for name in ("image", "direction", "reward", "done", "logits", "value")}
for actions in data["actions"]:
    state, pi, value = act(params, one_step(obs), state)
    found["image"].append(obs.image)
    found["direction"].append(obs.agent_dir)
    found["logits"].append(jax.nn.log_softmax(pi.logits[0]))
    found["value"].append(value[0])
    obs, env_state, reward, done, _ = step(key, env_state, actions, env.default_params)
    found["reward"].append(reward)
    found["done"].append(done)
arrays = {name: np.stack(x) for name, x in found.items()}
np.savez("played.npz", **arrays, **jaxued_process.flat(params))
"""


def text_of(mazes: ours.Mazes, i: int) -> str:
    cells = np.where(mazes.walls[i], "#", ".")
    cells[tuple(mazes.goal[i])] = "G"
    cells[tuple(mazes.agent[i])] = ">v<^"[mazes.direction[i]]
    return "\n".join("".join(row) for row in cells)


@pytest.mark.slow
@pytest.mark.skipif(not (JAXUED and PYTHON), reason="needs JAXUED and JAXUED_PYTHON")
def test_jaxueds_network_and_mazes_are_the_same_here(tmp_path):
    small = [name for name, text in ours.NAMED_MAZES.items() if text.shape == (13, 13)]
    named = [ours.named_maze(name, 0) for name in small]
    mazes = ours.concatenate([*named, ours.random_mazes(np.arange(53), 15, 25)])
    N = len(mazes.walls)
    rng = np.random.default_rng(0)
    actions = rng.choice(7, p=[0.15, 0.15, 0.5, 0.05, 0.05, 0.05, 0.05], size=(250, N))
    levels = [text_of(mazes, i) for i in range(N)]
    np.savez(tmp_path / "data.npz", levels=levels, actions=actions)
    path = os.pathsep.join((str(ROOT / "benchmarks"), f"{JAXUED}/src"))
    command = [PYTHON, "-c", PLAY, JAXUED]
    subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, check=True)
    theirs = dict(np.load(tmp_path / "played.npz"))

    params = {name: x for name, x in theirs.items() if name.startswith("params/")}
    agent = beside_jaxued.JaxuedAgent(params)
    envs = ours.MazeEnvs(N, torch.device("cpu"))
    obs, _ = envs.reset(options={"mazes": mazes})
    state = torch.zeros((2, N, 256))
    playing = np.ones(N, bool)
    far = {"logits": 0.0, "value": 0.0, "reward": 0.0}
    for t in range(len(actions)):
        image = np.rint(10 * theirs["image"][t]).astype(int)
        assert (obs["image"].numpy() == image)[playing].all()
        assert (obs["direction"].numpy() == theirs["direction"][t])[playing].all()
        _, value, logits, next_state = agent.act(obs, state, torch.ones(N, 7))
        state = torch.stack(next_state)
        obs, reward, terminated, truncated, _ = envs.step(torch.from_numpy(actions[t]))
        for name, x in {"logits": logits, "value": value, "reward": reward}.items():
            difference = np.abs(x.numpy() - theirs[name][t])[playing]
            far[name] = max(far[name], difference.max(initial=0))
        done = (terminated | truncated).numpy()
        assert (done == theirs["done"][t])[playing].all()
        playing &= ~done
    assert theirs["reward"].max() > 0 and not playing.any()
    print(f"{N} mazes, {len(actions)} steps; largest differences: {far}")
    assert max(far.values()) < 1e-4
    assert theirs["logits"].std() > 0.1 and theirs["value"].std() > 0.1  # they do depend on it


# ---- without jaxued ------------------------------------------------------------------------------


def saved_block() -> dict[str, np.ndarray]:
    """Two updates of two environments, a buffer of at most three levels: a new rollout of four
    steps, then a replayed one."""
    dones = np.zeros((2, 4, 2), bool)
    rewards = np.zeros((2, 4, 2), np.float32)
    dones[0, 1, 0] = dones[0, 3, 1] = dones[1, 2] = True
    rewards[0, 1, 0] = 0.75
    rewards[1, 2] = 0.5, 0.0
    walls = np.zeros((2, 13, 13), bool)
    walls[0, 0, 1] = walls[1, 1, :] = True  # a block to go around; a wall from side to side
    levels = {"wall_map": walls, "goal_pos": np.array([[2, 0], [0, 2]], np.uint32)}
    levels |= {"agent_pos": np.zeros((2, 2), np.uint32), "agent_dir": np.zeros(2, np.uint8)}
    return {
        "seen/dones": dones,
        "seen/rewards": rewards,
        "seen/replay": np.array([False, True]),
        "seen/size": np.array([0, 2]),
        "seen/scores": np.array([[-np.inf] * 3, [0.25, 0.75, -np.inf]], np.float32),
        "seen/weights": np.array([[0, 0, 0], [0.5, 0.5, 0]], np.float32),
        "seen/staleness": np.array([[0, 0, 0], [1, 4, 9]]),
        **{f"{kind}/{name}": x for kind in ("new", "replayed") for name, x in levels.items()},
    }


def test_the_rows_of_a_block_by_hand():
    block = saved_block()
    args = ours.Args(num_envs=2, num_steps=4, buffer_size=3)
    new = beside_jaxued.row_of(args, block, 0)
    assert (new["episodic_return"], new["episodic_length"], new["episodes"]) == (0.375, 3, 2)
    assert (new["solved_rate"], new["replay"], new["seen_share"]) == (0.5, 0, 0)
    replayed = beside_jaxued.row_of(args, block, 1)
    assert (replayed["episodic_return"], replayed["episodic_length"]) == (0.25, 3)
    assert (replayed["replay"], replayed["seen_share"]) == (1, 2 / 3)
    assert replayed["effective_levels"] == pytest.approx(2)
    assert (replayed["score_mean"], replayed["score_max"], replayed["score_q50"]) == (
        0.5,
        0.75,
        0.5,
    )
    assert (replayed["staleness_mean"], replayed["staleness_max"]) == (2.5, 4)
    # positions are (x, y): from the corner right by two, around the block; down by two, walled off
    mazes = beside_jaxued.mazes_of(block, "replayed")
    assert mazes == {"walls_replayed": 7, "shortest_path_replayed": 4, "solvable_replayed": 0.5}
    block["seen/replay"][:] = True
    assert np.isnan(list(beside_jaxued.mazes_of(block, "new").values())).all()


def two_blocks() -> list[dict[str, np.ndarray]]:
    """Of two updates each, with a network of zeros; ten seconds and four of CPU time a block."""
    shapes = {"Conv_0/kernel": (3, 3, 3, 16), "Conv_0/bias": (16,)}
    shapes |= {"scalar_embed/kernel": (4, 5), "scalar_embed/bias": (5,)}
    for gate in "ifgo":
        shapes[f"OptimizedLSTMCell_0/i{gate}/kernel"] = (149, 256)
        shapes[f"OptimizedLSTMCell_0/h{gate}/kernel"] = (256, 256)
        shapes[f"OptimizedLSTMCell_0/h{gate}/bias"] = (256,)
    for head, size in (("actor", 7), ("critic", 1)):
        shapes |= {f"{head}0/kernel": (256, 32), f"{head}0/bias": (32,)}
        shapes |= {f"{head}1/kernel": (32, size), f"{head}1/bias": (size,)}
    params = {f"params/{name}": np.zeros(shape, np.float32) for name, shape in shapes.items()}
    now = beside_jaxued.time.time()
    return [
        saved_block() | params | {"time": now + 10 * i, "cpu_time": 4 * i, "state/0": np.array([i])}
        for i in (1, 2)
    ]


@pytest.fixture
def small_run(tmp_path, monkeypatch):
    """Of four updates in two blocks: its Args, our settings, what each evaluation returns."""
    sizes = {"num_envs": 2, "num_steps": 4, "total_timesteps": 32, "buffer_size": 3}
    settings = ours.Args(**sizes, update_epochs=5, num_minibatches=2)
    paths = dict.fromkeys(("jaxued", "python", "run_dir"), tmp_path)
    args = beside_jaxued.Args(**paths, commit="0f8f128", seed=3, eval_interval=2)
    played = {"solved_mean": 0.25, "episodes": {"Maze": [0.0]}}
    monkeypatch.setattr(beside_jaxued, "BLOCK", 2)
    monkeypatch.setattr(ours, "evaluate", lambda agent, *_: played)
    return args, settings, played


def test_a_block_becomes_the_rows_of_a_run(tmp_path, monkeypatch, small_run):
    args, settings, played = small_run
    monkeypatch.setattr(beside_jaxued, "blocks", lambda *_: iter(two_blocks()))
    beside_jaxued.train(args, settings)
    rows = read_csv(tmp_path / "progress.csv")
    assert [row["global_step"] for row in rows] == ["8", "16", "24", "32"]
    # 5 epochs of 2 minibatches on what was replayed; none on the 8 steps of each new rollout
    assert [row["gradient_updates"] for row in rows] == ["0", "10", "10", "20"]
    assert [row["untrained_steps"] for row in rows] == ["8", "8", "16", "16"]
    assert [row["walls_new"] for row in rows] == ["nan", "7", "nan", "7"]
    evaluations = read_csv(tmp_path / "evaluations.csv")
    assert [row["global_step"] for row in evaluations] == ["16", "32"]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["evaluation"] == played and result["implementation"] == "jaxued 0f8f128"
    assert (result["global_step"], result["gradient_updates"], result["seed"]) == (32, 20, 3)
    assert result["steps_per_cpu_second"] == 16 / 4 and float(rows[-1]["SPS"]) == 1.6


def test_a_run_that_was_stopped_goes_on(tmp_path, monkeypatch, small_run):
    args, settings, _ = small_run
    first, second = two_blocks()

    def stopped(*_):
        yield first
        raise KeyboardInterrupt

    monkeypatch.setattr(beside_jaxued, "blocks", stopped)
    with pytest.raises(KeyboardInterrupt):
        beside_jaxued.train(args, settings)
    assert beside_jaxued.kept_step(tmp_path) == 16 and not (tmp_path / "result.json").exists()
    ours.append_row(tmp_path / "progress.csv", {"global_step": 24})  # and was killed within a block
    asked = []

    def the_rest(_, flags):
        asked.append(flags[flags.index("--num_updates") + 1])
        yield second

    monkeypatch.setattr(beside_jaxued, "blocks", the_rest)
    beside_jaxued.train(args, settings)
    assert asked == ["2"]
    rows = read_csv(tmp_path / "progress.csv")
    assert [row["global_step"] for row in rows] == ["8", "16", "24", "32"]
    assert [row["gradient_updates"] for row in rows] == ["0", "10", "10", "20"]
    assert [row["untrained_steps"] for row in rows] == ["8", "8", "16", "16"]
    assert [row["global_step"] for row in read_csv(tmp_path / "evaluations.csv")] == ["16", "32"]
    assert json.loads((tmp_path / "result.json").read_text())["gradient_updates"] == 20
    with np.load(tmp_path / "checkpoint.npz") as checkpoint:
        assert checkpoint["global_step"] == 32 and checkpoint["state/0"] == second["state/0"]


@pytest.mark.slow
@pytest.mark.skipif(not (JAXUED and PYTHON), reason="needs JAXUED and JAXUED_PYTHON")
def test_jaxued_goes_on_bit_for_bit(tmp_path):
    def run(name: str, total_timesteps: int) -> dict[str, np.ndarray]:
        script = str(ROOT / "benchmarks" / "beside_jaxued.py")
        command = [sys.executable, script, JAXUED, "--python", PYTHON, "--commit", "0"]
        command += ["--total-timesteps", str(total_timesteps), "--run-dir", str(tmp_path / name)]
        subprocess.run([*command, "--buffer-size", "64", "--eval-episodes", "1"], check=True)
        return dict(np.load(tmp_path / name / "checkpoint.npz"))

    run("slices", 81920)
    slices, whole = run("slices", 163840), run("whole", 163840)
    assert slices.keys() == whole.keys() and len(whole) > 100
    assert all((x == slices[name]).all() for name, x in whole.items())


@pytest.mark.parametrize(
    "flags, named",
    [
        ("--total-timesteps 3e6", "--total-timesteps 3000000 must be a multiple of 81920"),
        ("--curriculum dr --buffer-size 10", "--buffer-size 10 does nothing"),
        ("--eval-interval 15", "--eval-interval 15 must be a multiple of 10"),
        ("", "must be jaxued's source tree"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, monkeypatch, capsys, flags, named):
    where = f"{tmp_path} --python python --run-dir {tmp_path}/run"
    monkeypatch.setattr(
        sys, "argv", ["beside_jaxued.py", *where.split(), *flags.split(), "--commit", "1"]
    )
    with pytest.raises(SystemExit) as stop:
        beside_jaxued.main()
    assert stop.value.code == 2 and named in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags, named",
    [
        ("--seed 2", "--seed 2 must be 1, as the run in"),
        ("--commit 2", "--commit 2 must be 1, as the run in"),
        ("--total-timesteps 81920", "--total-timesteps 81920 must be more than the 81920 steps"),
    ],
)
def test_a_run_is_not_continued_as_another(tmp_path, monkeypatch, capsys, flags, named):
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "maze_plr.py").touch()
    before = {"seed": 1, "implementation": "jaxued 1"}
    before = beside_jaxued.asdict(ours.Args()) | before
    (tmp_path / "args.json").write_text(json.dumps(before))
    np.savez(tmp_path / "checkpoint.npz", global_step=81920)
    where = f"{tmp_path} --python python --run-dir {tmp_path} --commit 1"
    monkeypatch.setattr(sys, "argv", ["beside_jaxued.py", *where.split(), *flags.split()])
    with pytest.raises(SystemExit) as stop:
        beside_jaxued.main()
    assert stop.value.code == 2 and named in capsys.readouterr().err
    assert json.loads((tmp_path / "args.json").read_text()) == before
