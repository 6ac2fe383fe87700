"""benchmarks/with_tail_term.py: the run of our script, but for the scores of cut-off episodes."""

import json
import subprocess
import sys

import numpy as np
import pytest
from support import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import with_tail_term as driver
from common import read_csv

DRIVER = ROOT / "benchmarks" / "with_tail_term.py"
SCRIPT = ROOT / "ppo_plr_procgen.py"
SMALL = "--env-id starpilot --num-envs 8 --num-steps 64 --total-timesteps 1024 --num-levels 8"
SMALL += " --eval-interval 0 --eval-episodes 2 --checkpoint-interval 1"


def test_a_tail_counts_one_step_more_and_nothing_else_changes():
    scores = np.array([[1.0, 5.0, 2.0], [2.0, 6.0, 4.0], [4.0, 7.0, 6.0]], np.float32)
    ended = np.array([[True, False, False], [False, False, False], [False, True, False]])
    values = np.array([-9.0, 100.0, 8.0])
    changed = driver.with_tail_term(scores, ended, values)
    # first: 2 steps of sum 6, and 9: 15 / 3; second: none; third: 3 steps of sum 12, and 8: 20 / 4
    assert changed[1:, 0].mean() == 5.0 and changed[:, 2].mean() == 5.0
    assert (changed[:2] == scores[:2]).all() and (changed[:, 1] == scores[:, 1]).all()
    assert scores[2].tolist() == [4.0, 7.0, 6.0]


def test_the_sampler_gets_the_value_of_what_follows_the_rollout():
    sampler = driver.LevelSampler(range(4), num_envs=2, seed=1)
    levels = np.tile(sampler.next_levels(np.ones(2, bool)), (3, 1))
    ended = np.zeros((3, 2), bool)
    driver.LevelSampler.next_values = np.array([2.0, -3.0])
    scored = sampler.update(levels, np.ones((3, 2)), ended)
    assert scored.score.tolist() == [(3 + 2) / 4, (3 + 3) / 4]


@pytest.mark.slow
def test_only_scores_differ_until_replay_does(tmp_path):
    def first_row(program, name):
        command = [sys.executable, program, *SMALL.split(), "--run-dir", tmp_path / name]
        done = subprocess.run([str(x) for x in command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return read_csv(tmp_path / name / "progress.csv")[0]

    ours, theirs = first_row(SCRIPT, "ours"), first_row(DRIVER, "theirs")
    of_scores = {"score_mean", "score_max", "effective_levels"}
    differs = {name for name in ours if ours[name] != theirs[name]}
    assert "score_mean" in differs <= of_scores | {"wall_seconds", "SPS", "sampler_share"}
    args = json.loads((tmp_path / "theirs" / "args.json").read_text())
    assert args["implementation"] == "ours with the tail term"
    again = subprocess.run(
        [sys.executable, DRIVER, "--resume", tmp_path / "theirs", "--total-timesteps", "1536"],
        capture_output=True,
        text=True,
    )
    assert again.returncode == 0 and "1,536 (100.0%)" in again.stdout, again.stderr


def test_other_scores_are_refused(monkeypatch, capsys):
    for name in ("Agent", "LevelSampler", "Args", "check_args"):
        monkeypatch.setattr(driver.script, name, getattr(driver.script, name))  # put back after
    monkeypatch.setattr(sys, "argv", ["with_tail_term.py", "--score", "gae"])
    with pytest.raises(SystemExit) as stop:
        driver.main()
    assert stop.value.code == 2 and "needs --score value_l1" in capsys.readouterr().err
