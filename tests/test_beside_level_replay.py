"""benchmarks/beside_level_replay.py: what stands around the authors' code does what that expects;
what their code computes is what our script computes, but for the documented deviations.

What needs it is skipped unless LEVEL_REPLAY and BASELINES are the two source trees;
LEVEL_REPLAY_PYTHON is a Python with our requirements, scipy, tqdm, pandas and cloudpickle.
"""

import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import beside_level_replay as beside
from collect import read_starts
from common import log_start, read_csv

import ppo_plr_procgen as ours

TREES = [os.environ.get(name, "") for name in ("LEVEL_REPLAY", "BASELINES")]
PYTHON = os.environ.get("LEVEL_REPLAY_PYTHON", sys.executable)
DRIVER = ROOT / "benchmarks" / "beside_level_replay.py"
with_their_code = pytest.mark.skipif(not all(TREES), reason="needs LEVEL_REPLAY and BASELINES")
SMALL = "--total-timesteps 4096 --num-envs 16 --num-steps 64 --num-minibatches 8 --seed 3"
SMALL += " --eval-interval 2 --eval-episodes 4 --checkpoint-interval 1 --commit ccecf45"

# After each of its updates, computes from the raw rewards, values and levels what our script makes
# of them, and compares: scaled rewards, advantages, scores. argv: the trees, then the driver's.
COMPARE = """
import json
import numpy as np, torch
import beside_level_replay as beside
import ppo_plr_procgen as ours
from with_tail_term import with_tail_term
args, _ = beside.begin(beside.tyro.cli(beside.Args))
settings = beside.settings_of(args)
T, N = settings.num_steps, settings.num_envs
recorder = beside.Recorder(args, settings, None)
statistics = ours.EpisodeStatistics(N, settings.reward_norm_gamma)
sampler = ours.make_sampler(settings)
played = []  # of each step: raw rewards, dones, levels
compared = {"updates": 0, "episodes": 0, "tails": 0, "scored": 0}

class Noting(beside.Procgen):
    def step_wait(self):
        levels = self.levels.copy()
        if sampler.playing.min() < 0:
            sampler.next_levels(np.ones(N, bool), levels=levels)
        obs, rewards, done, infos = super().step_wait()
        played.append((rewards, done, levels))
        return obs, rewards, done, infos

def compare(rollouts):
    rewards, ended, levels = (np.stack(x) for x in zip(*played))
    played.clear()
    scaled, _ = statistics.add(rewards, ended)
    theirs = rollouts.rewards[..., 0].numpy()
    np.testing.assert_allclose(scaled, theirs, rtol=1e-5, atol=1e-6)
    assert (rollouts.level_seeds[..., 0].numpy() == levels).all()
    values = rollouts.value_preds[..., 0].numpy()
    advantages = np.zeros((T, N))
    last = np.zeros(N)
    for t in reversed(range(T)):
        left = 1.0 - ended[t]
        delta = theirs[t] + settings.gamma * values[t + 1] * left - values[t]
        last = delta + settings.gamma * settings.gae_lambda * left * last
        advantages[t] = last
    np.testing.assert_allclose(
        advantages, (rollouts.returns - rollouts.value_preds)[:T, :, 0], rtol=1e-3, atol=2e-5
    )
    step_scores = np.abs(advantages)
    compared["tails"] += int((~ended[-1]).sum())
    step_scores = with_tail_term(step_scores, ended, values[T])
    sampler.update(levels, step_scores, ended)
    compared["episodes"] += int(ended.sum())

class Sampling(beside.Recorder):
    def log(self, stats):  # after the update of the sampler
        compare(self.parts["rollouts"])
        theirs = self.parts["sampler"]
        seen = theirs.unseen_seed_weights == 0
        assert (sampler.seen == seen).all()
        scores = sampler.scores[seen], theirs.seed_scores[seen]
        np.testing.assert_allclose(*scores, rtol=1e-3, atol=2e-5)
        compared["updates"] += 1
        compared["scored"] = int(seen.sum())
        # which levels are being played now: for what is scored next
        sampler.next_levels(np.ones(N, bool), levels=self.parts["envs"].raw_venv.levels)
        super().log(stats)

    def save(self, wall_seconds):
        pass

beside.Procgen = Noting
recorder.__class__ = Sampling
beside.run_train(args, recorder)
print(json.dumps(compared))
"""


def run(command, **options):
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=300, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@with_their_code
def test_their_rewards_advantages_and_scores_are_ours_but_for_one_term(tmp_path):
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT / 'benchmarks'}:{ROOT}",
        "OMP_NUM_THREADS": "1",
    }
    flags = [*TREES, *SMALL.split(), "--run-dir", tmp_path / "run"]
    said = run([PYTHON, "-c", COMPARE, *flags], env=environment)
    compared = json.loads(said.splitlines()[-1])
    assert compared["updates"] == 4 and compared["tails"] > 40 and compared["episodes"] > 20
    assert compared["scored"] > 40


@pytest.mark.slow
@with_their_code
@pytest.mark.parametrize("curriculum", ["plr", "uniform"])
def test_their_run_in_slices_ends_as_the_uninterrupted_one(tmp_path, curriculum):
    flags = [*SMALL.split(), "--curriculum", curriculum]
    run([PYTHON, DRIVER, *TREES, *flags, "--run-dir", tmp_path / "whole"])
    command = [PYTHON, DRIVER, *TREES, *flags, "--run-dir", tmp_path / "slices"]
    slices = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, text=True)
    assert slices.stdout.readline().startswith("step 1,024")
    slices.send_signal(signal.SIGTERM)
    said, _ = slices.communicate(timeout=300)
    assert "to go on: --resume" in said and not (tmp_path / "slices" / "result.json").exists()
    run([PYTHON, DRIVER, *TREES, "--resume", tmp_path / "slices"])
    whole, parts = (
        json.loads((tmp_path / x / "result.json").read_text()) for x in ("whole", "slices")
    )
    assert parts["fingerprint"] == whole["fingerprint"]
    assert parts["evaluation"] == whole["evaluation"]
    assert (whole["global_step"], whole["curriculum"]) == (4096, curriculum)
    rows = [read_csv(tmp_path / x / "progress.csv") for x in ("whole", "slices")]
    for row in rows[0] + rows[1]:
        del row["wall_seconds"], row["SPS"]
    assert rows[0] == rows[1] and len(rows[0]) == 4


def test_procgen_as_their_code_expects_it():
    pytest.importorskip("gym", reason="comes with procgen-mirror, whose wheels end at Python 3.12")
    games = beside.Procgen(
        3, "starpilot", "easy", num_levels=1, start_level=0, paint_vel_info=False
    )
    try:
        for index, level in enumerate((7, 8, 9)):
            games.seed(level, index)
        started = games.reset()["rgb"].copy()
        ended = np.zeros(3, bool)
        while not ended[1]:
            games.step_async(np.full(3, 4))
            _, rewards, ended, infos = games.step_wait()
            assert [x["level_seed"] for x in infos] == games.levels.tolist()  # just played
        before = games.observe()["rgb"].copy()
        games.seed(7, 1)
        after = games.observe()["rgb"]
        assert (after[1] == started[0]).all()  # the level's start, in another environment
        assert (after[[0, 2]] == before[[0, 2]]).all()  # and nowhere else
        assert games.levels.tolist() == [7, 7, 9] and rewards.dtype == np.float32
    finally:
        games.envs.close()


def test_a_row_of_progress_says_what_ours_does(tmp_path):
    args = beside.Args(tmp_path, tmp_path, tmp_path)
    recorder = beside.Recorder(args, beside.settings_of(args), None)
    stats = {"value_loss": 0.5, "pg_loss": -0.1, "dist_entropy": 2.0}
    sampler = SimpleNamespace(
        unseen_seed_weights=np.array([0.0, 1.0, 0.0, 0.0]),
        seed_scores=np.array([0.2, 0.0, 0.6, 0.1]),
        seed_staleness=np.array([4.0, 9.0, 0.0, 2.0]),
        sample_weights=lambda: np.array([0.5, 0.0, 0.5, 0.0]),
    )
    recorder.parts["sampler"] = sampler
    recorder.finished = [{"r": 1.0, "l": 10}, {"r": 4.0, "l": 30}]
    row = recorder.row(stats)
    assert (row["episodic_return"], row["episodic_length"], row["episodes"]) == (2.5, 20, 2)
    assert (row["value_loss"], row["policy_loss"], row["entropy"]) == (0.5, -0.1, 2.0)
    assert row["seen_share"] == 0.75 and row["effective_levels"] == pytest.approx(2)
    assert row["score_mean"] == pytest.approx(0.3) and row["score_max"] == 0.6
    assert (row["staleness_mean"], row["staleness_max"]) == (2.0, 4.0)
    sampler.unseen_seed_weights[:] = 1  # uniform levels have no scores
    row = recorder.row(stats)
    assert row["episodes"] == 0 and np.isnan(row["episodic_return"])
    assert [row[name] for name in beside.CURRICULUM] == [0.0] * 6


def test_a_log_of_slices_is_read_by_collect(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["driver.py", "--seed", "1"])
    log_start(tmp_path, beside.__file__)
    monkeypatch.setattr(sys, "argv", ["driver.py", "--resume", "a run"])
    log_start(tmp_path, beside.__file__, 98_304)
    first, second = read_starts((tmp_path / "job.log").read_text())
    assert (first["command"], first["from_step"]) == ("python driver.py --seed 1", 0)
    assert (second["command"], second["from_step"]) == ("python driver.py --resume 'a run'", 98_304)
    assert first["commit"] == second["commit"] and "cores" in first["machine"]


def test_our_evaluation_plays_their_network():
    seen = {}

    def act(pixels, state, masks):
        seen["pixels"] = pixels
        return None, torch.tensor([[3], [5]]), None, None

    agent = beside.PlayedByOurEvaluation(SimpleNamespace(act=act))
    obs = torch.arange(2 * 64 * 64 * 3, dtype=torch.int64).remainder(256).to(torch.uint8)
    obs = obs.view(2, 64, 64, 3)
    (action,) = agent.get_action_and_value(obs)
    assert action.tolist() == [3, 5]
    assert seen["pixels"].shape == (2, 3, 64, 64)
    assert seen["pixels"][1, 2, 5, 7] == obs[1, 5, 7, 2] / 255.0


@pytest.mark.parametrize(
    "flags, named",
    [
        ("--run-dir {}/run", "must be a source tree with train.py"),
        ("--resume {}", "is not a run that can be loaded: [Errno 2] No such file"),
        ("", "--run-dir . must be a new folder"),
        ("--run-dir {}", "must be a new folder"),
        ("--run-dir {}/run --num-minibatches 3", "--num-minibatches 3 must be a divisor"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, monkeypatch, capsys, flags, named):
    trees = [tmp_path / "level-replay", tmp_path / "baselines"]
    if "source tree" not in named:
        for tree, file in zip(trees, ("train.py", "baselines/logger.py")):
            (tree / file).parent.mkdir(parents=True)
            (tree / file).touch()
    words = flags.format(tmp_path).split()
    monkeypatch.setattr(sys, "argv", ["beside_level_replay.py", *map(str, trees), *words])
    with pytest.raises(SystemExit) as stop:
        beside.main()
    assert stop.value.code == 2 and named in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def a_run(path, seed=3):
    """As a kill between the last checkpoint and result.json leaves it."""
    args = beside.Args(path, path, path, seed=seed, total_timesteps=16384, commit="ccecf45")
    written = beside.asdict(beside.settings_of(args)) | {"implementation": "level-replay ccecf45"}
    path.mkdir()
    (path / "args.json").write_text(json.dumps(written))
    evaluation = {"test_return": 2.5}
    agent = {"weight": torch.ones(2)}
    state = {"iteration": 1, "global_step": 16384, "wall_seconds": 9.0, "evaluation": evaluation}
    torch.save(state | {"agent": agent}, path / "checkpoint.pt")
    return agent


def resume(path, trees, monkeypatch, *flags):
    for tree, file in zip(trees, ("train.py", "baselines/logger.py")):
        (tree / file).parent.mkdir(parents=True, exist_ok=True)
        (tree / file).touch()
    words = [*trees, "--resume", path, *flags]
    monkeypatch.setattr(sys, "argv", ["beside_level_replay.py", *map(str, words)])
    beside.main()


def test_only_the_result_is_left_to_write(tmp_path, monkeypatch):
    agent = a_run(tmp_path / "run")
    resume(tmp_path / "run", (tmp_path / "a", tmp_path / "b"), monkeypatch)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["evaluation"] == {"test_return": 2.5} and result["global_step"] == 16384
    assert result["fingerprint"] == ours.fingerprint(agent)
    assert (result["seed"], result["implementation"]) == (3, "level-replay ccecf45")


def test_a_resume_that_cannot_work_is_refused(tmp_path, monkeypatch, capsys):
    trees = tmp_path / "a", tmp_path / "b"
    a_run(tmp_path / "run")

    def refused(*flags):
        with pytest.raises(SystemExit) as stop:
            resume(tmp_path / "run", trees, monkeypatch, *flags)
        assert stop.value.code == 2
        return capsys.readouterr().err

    assert "--seed 4 must be 3, as in the run to resume" in refused("--seed", "4")
    assert "--precision bf16 must be fp32" in refused("--precision", "bf16")
    whole = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    (tmp_path / "run" / "checkpoint.pt").write_bytes(whole[:200])
    assert f"--resume {tmp_path / 'run'} is not a run that can be loaded" in refused()
    (tmp_path / "run" / "checkpoint.pt").write_bytes(whole)
    resume(tmp_path / "run", trees, monkeypatch)
    assert "is finished" in refused()
