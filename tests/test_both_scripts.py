"""What both scripts promise alike."""

import gzip
import json
import re

import gymnasium as gym
import numpy as np
import pytest
import tyro
from minigrid.core.grid import Grid
from minigrid.core.mission import MissionSpace
from minigrid.minigrid_env import MiniGridEnv
from PIL import Image
from support import ROOT, SCRIPTS, TINY, assert_refused, assert_same_rows, result_of, rows, train

import ppo_plr_procgen
import ppo_robust_plr_minigrid


@pytest.fixture(params=SCRIPTS, ids=lambda script: script.__name__)
def script(request):
    return request.param


def test_the_readmes_commands_are_valid(script):
    commands = re.findall(rf"python {script.__name__}\.py((?: [^\n`|#']*)?)", (ROOT / "README.md").read_text())
    commands += re.findall(rf"python {script.__name__}\.py([^\n#]*)", script.__doc__)
    assert len(commands) > 8
    for flags in commands:
        if "--help" not in flags:
            script.check_args(tyro.cli(script.Args, args=flags.split()))


WATCHED = {
    ppo_plr_procgen: "--eval-interval 1 --eval-episodes 3 --env-threads 3",
    ppo_robust_plr_minigrid: "--eval-interval 5 --eval-episodes 2",
}


def test_the_same_seed_is_the_same_run_whatever_evaluation_video_tracking_profile_threads_and_hash_seed(
    script, finished_run, tmp_path
):
    (tmp_path / "wandb.py").write_text("def init(**options): print('tracked', options['name'])")
    flags = f"{TINY[script.__name__]} {WATCHED[script]} --capture-video --checkpoint-interval 1 --track --profile"
    again = train(script, flags, tmp_path / "again", PYTHONHASHSEED="4", PYTHONPATH=str(tmp_path))
    assert "tracked again" in again["stdout"]
    assert again["fingerprint"] == result_of(finished_run(script))["fingerprint"]
    assert_same_rows(finished_run(script) / "progress.csv", tmp_path / "again/progress.csv")
    run_dir = tmp_path / "again"
    evaluations = rows(run_dir / "evaluations.csv")
    videos = sorted((run_dir / "videos").rglob("*.gif"))
    per_evaluation, size = (1, (256, 256)) if script is ppo_plr_procgen else (12, (120, 120))
    assert len(evaluations) > 1 and len(videos) == per_evaluation * len(evaluations)
    with Image.open(videos[-1]) as video:
        assert video.n_frames > 5 and video.size == size
        frames = [np.asarray(video.convert("RGB")) for _ in (video.seek(i) for i in range(video.n_frames))]
    assert not np.array_equal(frames[0], frames[-1])
    # the profile: seconds and shares of phases, which are also ranges of the trace, of the last iteration only
    parts = re.findall(r"(\w+) ([\d.e-]+) s \(([\d.]+)%\)", again["stdout"])
    phases = {"environment", "inference", "transfer", "sampler", "update", "rest"}
    assert {name for name, *_ in parts} == phases
    total, seconds = sum(float(x) for _, x, _ in parts), [row["wall_seconds"] for row in rows(run_dir / "progress.csv")]
    assert 0 < total < seconds[-1] - seconds[0]  # of neither the first iteration nor the last
    assert all(abs(float(share) - 100 * float(x) / total) < 0.06 for _, x, share in parts)
    with gzip.open(run_dir / "trace_0.json.gz") as file:
        names = [x["name"] for x in json.load(file)["traceEvents"] if x.get("cat") == "user_annotation"]
    assert phases <= set(names) and names.count("update") == 1  # one iteration
    assert names.count("inference") == int(re.search(r"--num-steps (\d+)", flags)[1])


@pytest.mark.parametrize("kind", ["a finished", "an unfinished"])
def test_a_directory_that_holds_a_run_is_refused_and_left_as_it_was(
    kind, script, finished_run, tmp_path, monkeypatch, capsys
):
    run_dir = finished_run(script)
    if kind == "an unfinished":
        (tmp_path / "progress.csv").write_bytes((run_dir / "progress.csv").read_bytes())
        run_dir = tmp_path
    before = {path.name: path.read_bytes() for path in run_dir.iterdir() if path.is_file()}
    flags = f"{TINY[script.__name__]} --run-dir {run_dir}"
    assert_refused(script, monkeypatch, tmp_path, capsys, flags, "already holds a run")
    assert before == {path.name: path.read_bytes() for path in run_dir.iterdir() if path.is_file()}


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "pickle"])
def test_evaluating_a_damaged_checkpoint_says_so(damage, script, finished_run, tmp_path, monkeypatch, capsys):
    data = (finished_run(script) / "checkpoint.pt").read_bytes()
    harmful = b"cos\nsystem\n(S'touch " + str(tmp_path / "hacked").encode() + b"'\ntR."
    damaged = {"truncated": data[: len(data) // 2], "empty": b"", "garbage": b"not a checkpoint", "pickle": harmful}
    (tmp_path / "args.json").write_bytes((finished_run(script) / "args.json").read_bytes())
    (tmp_path / "checkpoint.pt").write_bytes(damaged[damage])
    assert_refused(script, monkeypatch, tmp_path, capsys, f"--evaluate {tmp_path}", "is not a run that can be loaded")
    assert not (tmp_path / "hacked").exists()


# ---- bad input -------------------------------------------------------------------------------------------------------


class Moody(MiniGridEnv):
    """Its seed does not decide its level."""

    def __init__(self, **kwargs):
        super().__init__(MissionSpace(lambda: ""), grid_size=9, max_steps=50, **kwargs)

    def _gen_grid(self, width, height):
        self.grid = Grid(width, height)
        self.agent_pos, self.agent_dir, self.mission = tuple(np.random.randint(1, 8, 2)), 0, ""


class Growing(Moody):
    """Its time limit depends on the level."""

    def _gen_grid(self, width, height):
        super()._gen_grid(width, height)
        self.agent_pos, self.max_steps = (1, 1), 300 if self.np_random.random() < 0.5 else 50


def broken():
    raise AssertionError


BAD = {
    None: {  # refused by both
        "--num-envs 0": "--num-envs 0 must be at least 1",
        "--seed -1": "--seed -1 must be at least 0",
        "--seed 99999999999999999999": "must be at least 0 and below 2**63",
        "--alpha 0": "--alpha 0.0 must be above 0 and at most 1",
        "--run-dir /dev/null/run": "--run-dir /dev/null/run cannot be written: Not a directory",
        "--evaluate /nonexistent": "--evaluate /nonexistent is not a run that can be loaded",
        "--track": "--track needs Weights and Biases",
        "--num-envs many": "--num-envs",
        "--no-such-flag": "--no-such-flag",
    },
    ppo_plr_procgen: {
        "--env-id bigfsh": "invalid choice 'bigfsh'",
        "--env-id bigfish --distribution-mode memory": "--distribution-mode memory does not exist for bigfish",
        "--num-steps -3": "--num-steps -3 must be at least 1",
        "--num-minibatches 7": "--num-minibatches 7 must be a divisor of --num-envs x --num-steps = 16384",
        "--num-minibatches 16384": "must be a divisor of --num-envs x --num-steps = 16384 and less than that",
        "--update-epochs 0": "--update-epochs 0 must be at least 1",
        "--eval-episodes 0": "--eval-episodes 0 must be at least 1",
        "--total-timesteps 16383": "--total-timesteps 16383 must be at least 16384: --num-envs x --num-steps",
        "--profile --total-timesteps 40000": "--total-timesteps 40000 must be at least 49152: --num-envs x --num-steps",
        "--learning-rate nan": "--learning-rate nan must be above 0",
        "--gamma 1.5": "--gamma 1.5 must be between 0 and 1",
        "--temperature 0": "--temperature 0.0 must be above 0",
        "--target-kl -1": "--target-kl -1.0 must be above 0",
        "--ent-coef -1": "--ent-coef -1.0 must be at least 0",
        "--checkpoint-interval -1": "--checkpoint-interval -1 must be at least 0",
        "--vf-coef inf": "--vf-coef inf must be at least 0 and below 2**63",
        "--num-levels 0": "--curriculum plr must be uniform or sequential with --num-levels 0",
        "--num-levels 0 --curriculum uniform --start-level 5": "--start-level 5 must be 0 with --num-levels 0",
        "--start-level 1073741824": "--start-level 1073741824 must be at most 1073741624",
        "--score gae --score-transform power": "power must be another: --score gae can be negative",
        "--score max_mc --score-transform power": "power must be another: --score max_mc can be negative",
        "--score nonsense": "--score",
    },
    ppo_robust_plr_minigrid: {
        "--env-id mase": "--env-id mase must be maze or a registered MiniGrid environment: Environment `mase` doesn",
        "--env-id MiniGrid-MultiRom-N4-S5-v0": "Did you mean: `MiniGrid-MultiRoom-N4-S5`",
        "--env-id CartPole-v1": "CartPole-v1 must be maze or a registered MiniGrid environment: it is a CartPoleEnv",
        "--env-id Moody-v0": "--env-id Moody-v0 starts differently after two resets with one seed",
        "--num-walls 168": "--num-walls 168 must be at most 167, the cells of --maze-size 15 but two",
        "--maze-size 4": "--maze-size 4 must be between 5 and 255",
        "--num-minibatches 5": "--num-minibatches 5 must be a divisor of --num-envs 32",
        "--buffer-size 31": "--buffer-size 31 must be at least --num-envs 32",
        "--num-steps 249": "--num-steps 249 must be at least 250, the time limit: an episode that is cut off",
        "--num-steps 249 --bootstrap-timeouts": "must be at least 250, the time limit: max_mc needs whole",
        "--env-id MiniGrid-LavaCrossingS9N1-v0": "--num-steps 256 must be at least 324, the time limit",
        "--curriculum dr --total-timesteps 8191": "--total-timesteps 8191 must be at least 8192: --num-envs x",
        "--curriculum dr --profile --total-timesteps 20000": "must be at least 24576: --num-envs x --num-steps",
        "--total-timesteps 500000": "must be at least 524288: robust_plr learns nothing before the buffer holds --rho",
        "--replay-prob 0": "--replay-prob 0.0 must be above 0: robust_plr learns from replayed levels only",
        "--env-id Broken-v0": "--env-id Broken-v0 must be maze or a registered MiniGrid environment: AssertionError()",
        "--env-id Growing-v0": "--num-steps 256 must be at least 300, the time limit",
        "--replay-prob 1.5": "--replay-prob 1.5 must be between 0 and 1",
        "--nu 2": "--nu 2.0 must be between 0 and 1",
        "--learning-rate 0": "--learning-rate 0.0 must be above 0",
        "--max-steps 0": "--max-steps 0 must be at least 1",
        "--score-transform power": "--score-transform power must be another: --score max_mc can be negative",
        "--curriculum uniform": "--curriculum",
    },
}


@pytest.mark.parametrize("flags", BAD[None])
def test_bad_input_is_refused_by_both(flags, script, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)
    assert_refused(script, monkeypatch, tmp_path, capsys, flags, BAD[None][flags])


@pytest.mark.parametrize("script, flags", [(script, flags) for script in SCRIPTS for flags in BAD[script]])
def test_bad_input_is_refused(script, flags, monkeypatch, tmp_path, capsys):
    for name, maker in (("Moody-v0", Moody), ("Growing-v0", Growing), ("Broken-v0", broken)):
        monkeypatch.setitem(gym.registry, name, gym.envs.registration.EnvSpec(name, entry_point=maker))
    assert_refused(script, monkeypatch, tmp_path, capsys, flags, BAD[script][flags])
