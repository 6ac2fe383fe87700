"""--redraw-direction and --no-compass: what dcd's runs had in effect."""

import functools
import shutil

import numpy as np
import pytest
import support
import torch
from support import assert_same_run, result_of

import ppo_robust_plr_minigrid as script

CPU = torch.device("cpu")
TINY = support.TINY[script.__name__]
HALF = support.HALF[script]
main = functools.partial(support.main, script)
REDRAW = "--redraw-direction --eval-interval 2 --checkpoint-interval 0"


# ---- the start direction -------------------------------------------------------------------------


def redrawing(num_envs: int, first: int = 0, seed: int = 1) -> script.MazeEnvs:
    keys = np.random.default_rng(seed).integers(2**62, size=first + num_envs)[first:]
    return script.MazeEnvs(num_envs, CPU, direction_keys=keys)


def test_each_reset_draws_a_direction_and_keeps_the_rest_of_the_level():
    plain, envs = script.MazeEnvs(100, CPU), redrawing(100)
    levels = list(range(100))
    plain.reset(seed=levels)
    drawn = []
    for _ in range(60):
        obs, _ = envs.reset(seed=levels)
        drawn.append(obs["direction"].numpy().copy())
        assert torch.equal(envs.cells, plain.cells)
        assert torch.equal(envs.position, plain.position)
    drawn = np.array(drawn)

    def chi_square(counts: np.ndarray) -> float:
        expected = counts.sum() / counts.size
        return float(((counts - expected) ** 2 / expected).sum())

    # 0.9999 quantiles of 3 and of 15 degrees of freedom
    assert chi_square(np.bincount(drawn.ravel(), minlength=4)) < 21.1
    next_resets = np.bincount((4 * drawn[:-1] + drawn[1:]).ravel(), minlength=16)
    assert chi_square(next_resets) < 44.3
    neighbours = np.bincount((4 * drawn[:, :-1] + drawn[:, 1:]).ravel(), minlength=16)
    assert chi_square(neighbours) < 44.3
    of_levels = np.bincount((4 * plain.direction.numpy() + drawn).ravel(), minlength=16)
    for counts in of_levels.reshape(4, 4):  # whatever the level's own direction is
        assert chi_square(counts) < 21.1
    # the agent sees in the direction that was drawn
    seen = script.maze_view(envs.cells, envs.position, envs.direction, plain.view)
    assert torch.equal(seen, envs.image)


def test_a_reset_of_some_leaves_the_others_and_their_next_draws_alone():
    a, b = redrawing(4), redrawing(4)
    levels = [5, 6, 7, 8]
    a.reset(seed=levels)
    b.reset(seed=levels)
    for _ in range(5):  # of environments 0 and 2 only
        before = a.direction.clone()
        a.reset(seed=levels, options={"reset_mask": np.array([True, False, True, False])})
        assert torch.equal(a.direction[1::2], before[1::2])
    a.reset(seed=levels)
    b.reset(seed=levels)
    assert torch.equal(a.direction[1::2], b.direction[1::2])
    assert a.get_state() == [7, 2, 7, 2] and b.get_state() == [2, 2, 2, 2]


def test_parts_of_the_environments_draw_what_all_draw():
    whole, parts = redrawing(8), [redrawing(4), redrawing(4, first=4)]
    rng = np.random.default_rng(0)
    for _ in range(20):
        mask = rng.random(8) < 0.5
        whole.reset(seed=list(range(8)), options={"reset_mask": mask})
        for k, part in enumerate(parts):
            own = slice(4 * k, 4 * k + 4)
            part.reset(seed=list(range(8))[own], options={"reset_mask": mask[own]})
        assert torch.equal(whole.direction, torch.cat([part.direction for part in parts]))


def test_the_state_is_all_that_the_next_draws_depend_on():
    envs, other = redrawing(50), redrawing(50)
    for _ in range(7):
        envs.reset(seed=list(range(50)))
    other.set_state(envs.get_state())
    for _ in range(3):
        for x in (envs, other):
            x.reset(seed=list(range(50)))
        assert torch.equal(envs.direction, other.direction)
    later = envs.direction.clone()
    envs.reset(seed=list(range(50)))
    assert not torch.equal(envs.direction, later)


def test_environments_are_made_with_the_keys_of_this_process(monkeypatch):
    args = script.Args(redraw_direction=True, num_envs=8)
    keys = script.make_envs(args, 8, CPU).direction_keys
    monkeypatch.setattr(script, "RANK", 1)
    assert (script.make_envs(args, 4, CPU).direction_keys == keys[4:]).all()
    assert len(set(keys.tolist())) == 8
    monkeypatch.setattr(script, "RANK", 0)
    another = script.make_envs(script.Args(redraw_direction=True, num_envs=8, seed=2), 8, CPU)
    assert (another.direction_keys != keys).all()
    assert script.make_envs(script.Args(num_envs=8), 8, CPU).direction_keys is None


@pytest.mark.slow
@pytest.mark.usefixtures("brief")
def test_a_run_that_redraws_resumes_to_the_same_end(brief_run, monkeypatch, tmp_path):
    whole = brief_run(script, REDRAW)
    usual = brief_run(script, "--eval-interval 2 --checkpoint-interval 0")
    assert result_of(whole)["fingerprint"] != result_of(usual)["fingerprint"]
    main(monkeypatch, f"{TINY} {REDRAW} {HALF} --run-dir {tmp_path}/half")
    forgetful = shutil.copytree(tmp_path / "half", tmp_path / "forgetful")
    steps = result_of(whole)["global_step"]
    main(monkeypatch, f"--resume {tmp_path}/half --total-timesteps {steps}")
    assert_same_run(tmp_path / "half", whole)
    # without what was saved of the environments it would be another run
    monkeypatch.setattr(script.MazeEnvs, "set_state", lambda self, states: None)
    main(monkeypatch, f"--resume {forgetful} --total-timesteps {steps}")
    assert result_of(forgetful)["fingerprint"] != result_of(whole)["fingerprint"]


# ---- the compass ---------------------------------------------------------------------------------


def test_without_a_compass_only_the_observed_direction_differs():
    usual, blind = (script.MazeEnvs(30, CPU, compass=compass) for compass in (True, False))
    rng = np.random.default_rng(0)
    for envs in (usual, blind):
        envs.reset(seed=list(range(30)))
    turned = 0
    for _ in range(40):
        actions = torch.from_numpy(rng.integers(3, size=30))
        (obs, *results, _), (blind_obs, *blind_results, _) = (
            x.step(actions) for x in (usual, blind)
        )
        assert torch.equal(obs["image"], blind_obs["image"])
        assert blind_obs["direction"].tolist() == [0] * 30
        assert all(torch.equal(a, b) for a, b in zip(results, blind_results))
        turned += int((obs["direction"] > 0).sum())
    assert turned > 500
    assert (blind.reset(seed=list(range(30)))[0]["direction"] == 0).all()
    assert blind.direction.any()


@pytest.mark.parametrize("env_id", ["maze", "MiniGrid-LavaGapS5-v0"])
def test_there_is_none_in_training_and_in_no_evaluation(env_id):
    args = script.Args(env_id=env_id, compass=False, eval_episodes=20)
    environments = [(envs, reset) for _, envs, reset in script.evaluation_environments(args, CPU)]
    assert len(environments) == (13 if env_id == "maze" else 1)
    levels = {"seed": list(range(20))}
    environments.append((script.make_envs(args, 20, CPU), levels))
    left = torch.zeros(20, dtype=torch.int64)
    for envs, reset in environments:
        assert (envs.reset(**reset)[0]["direction"] == 0).all()
        assert (envs.step(left)[0]["direction"] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("more", ["", "--env-id MiniGrid-LavaGapS5-v0 --num-steps 104"])
def test_a_run_without_a_compass_learns_nothing_of_directions(more, monkeypatch, tmp_path):
    monkeypatch.setattr(script, "evaluate", lambda *args: {"solved_mean": 0.0, "episodes": {}})
    flags = "--num-envs 4 --buffer-size 12 --curriculum plr --total-timesteps 832"
    flags += " --maze-size 7 --num-walls 6 --max-steps 20 --num-steps 24" if not more else ""
    trained = {}
    for compass in ("", "--no-compass"):
        run_dir = tmp_path / f"run{compass}"
        main(monkeypatch, f"{flags} {more} {compass} --run-dir {run_dir}")
        agent = torch.load(run_dir / "checkpoint.pt", weights_only=True)["agent"]
        trained[compass] = agent["direction.weight"]
    torch.manual_seed(1)
    args = script.Args(env_id=more.split()[1] if more else "maze")
    start = script.Agent(script.make_envs(args, 1, CPU)).direction.weight
    changed = {key: (weight != start).any(1).tolist() for key, weight in trained.items()}
    assert changed == {"": [True] * 4, "--no-compass": [True, False, False, False]}
