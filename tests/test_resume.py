"""Interrupting, resuming and failing: what a long run meets, done to both scripts for real."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from support import (
    HALF,
    ROOT,
    SCRIPTS,
    TINY,
    Process,
    assert_ledger_balances,
    assert_refused,
    assert_same_run,
    files,
    main,
    result_of,
    rows,
    run,
    tiny,
    wait_for,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo_plr_procgen
import ppo_robust_plr_minigrid

pytestmark = pytest.mark.usefixtures("brief")  # evaluations, but for those of `run`
SLOW = {"marks": pytest.mark.slow}
CURRICULA = [(ppo_plr_procgen, "plr"), (ppo_robust_plr_minigrid, "robust_plr")]
# with the returns that the sampler remembers
OTHERS = ("robust_plr --score learnability", "plr --score regret --gate-unsolved")
CURRICULA += [pytest.param(ppo_robust_plr_minigrid, x, **SLOW) for x in OTHERS]
CURRICULA += [pytest.param(ppo_plr_procgen, x, **SLOW) for x in ("sequential",)]
CURRICULA += [pytest.param(ppo_robust_plr_minigrid, x, **SLOW) for x in ("dr", "accel")]
EVALUATED = "--eval-interval 2 --checkpoint-interval 0"
# of what is the same text in both scripts, the one that starts sooner
ONE = pytest.mark.parametrize("script", [ppo_robust_plr_minigrid])


def is_as_large(path: Path, size: float) -> bool:
    return (path.stat().st_size if path.exists() else 0) >= size


# ---- resume --------------------------------------------------------------------------------------


@pytest.mark.parametrize("script, curriculum", CURRICULA)
def test_a_resumed_run_equals_the_uninterrupted_one(
    script, curriculum, brief_run, monkeypatch, tmp_path
):
    whole = brief_run(script, f"{EVALUATED} --curriculum {curriculum}")
    flags = tiny(script, f"{EVALUATED} --curriculum {curriculum} {HALF[script]}")
    main(
        script,
        monkeypatch,
        f"{flags} --run-dir {tmp_path}/half",
    )
    steps = json.loads((whole / "args.json").read_text())["total_timesteps"]
    main(
        script,
        monkeypatch,
        f"--resume {tmp_path}/half --total-timesteps {steps} --checkpoint-interval 3",
    )
    assert_same_run(tmp_path / "half", whole)
    assert json.loads((tmp_path / "half/args.json").read_text())["total_timesteps"] == steps
    seconds = [row["wall_seconds"] for row in rows(tmp_path / "half/progress.csv")]
    assert seconds == sorted(seconds)


@pytest.mark.slow
@pytest.mark.parametrize("script", [ppo_plr_procgen])
def test_killed_and_resumed_as_a_user_does_it(script, finished_run, tmp_path):
    """Nothing in the way of the script: its own evaluation, and a start of Python each time."""
    run_dir, command = (
        tmp_path / "run",
        [sys.executable, f"{script.__name__}.py", *TINY[script.__name__].split()],
    )
    command += ["--checkpoint-interval", "1", "--run-dir", str(run_dir)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for((run_dir / "progress.csv").exists)
    process.kill()
    assert process.wait() == -signal.SIGKILL and not (run_dir / "result.json").exists()
    done = run(script, f"--resume {run_dir}")
    assert done.returncode == 0, done.stderr
    assert_same_run(run_dir, finished_run(script))


@pytest.mark.slow
@ONE
def test_killed_twice_in_its_first_iteration_a_run_resumes_to_the_same_end(
    script, brief_run, monkeypatch, tmp_path
):
    kill = "s.LevelSampler.update = lambda *args, **kwargs: os.kill(os.getpid(), 9)"
    flags, again = (
        f"{TINY[script.__name__]} {EVALUATED} --run-dir {tmp_path}/run",
        f"--resume {tmp_path}/run",
    )
    for command in (flags, again):
        assert (
            Process(script, command, tmp_path / "printed", kill).wait().returncode
            == -signal.SIGKILL
        )
    main(script, monkeypatch, again)
    assert_same_run(tmp_path / "run", brief_run(script, EVALUATED))


@pytest.mark.slow
@ONE
def test_killed_at_any_moment_again_and_again_a_run_resumes_to_the_same_end(
    script, brief_run, tmp_path
):
    expected, rng = brief_run(script, EVALUATED), random.Random(0)
    whole = (expected / "progress.csv").stat().st_size
    run_dir = tmp_path / "run"
    progress = run_dir / "progress.csv"
    new = f"{TINY[script.__name__]} --eval-interval 2 --checkpoint-interval 1"
    returned = []
    while not (run_dir / "result.json").exists():
        resumes = (run_dir / "checkpoint.pt").exists()
        flags = f"--resume {run_dir}" if resumes else f"{new} --run-dir {run_dir}"
        process = Process(script, flags, tmp_path / f"printed_{len(returned)}")
        if len(returned) < 5:
            size = progress.stat().st_size if progress.exists() else 0
            until = size + rng.random() * (whole - size) / 2
            while process.is_alive() and not is_as_large(progress, until):
                time.sleep(0.005)
            process.kill_after(rng.random() * 0.05)
        done = process.wait()
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        returned.append(done.returncode)
    assert returned.count(-signal.SIGKILL) >= 1
    assert_same_run(run_dir, expected)
    events = EventAccumulator(str(run_dir)).Reload().Scalars("charts/SPS")
    assert [event.step for event in events] == [row["global_step"] for row in rows(progress)]


@pytest.mark.parametrize(
    "script, name, status",
    [
        (ppo_robust_plr_minigrid, "SIGTERM", 0),
        (ppo_robust_plr_minigrid, "SIGINT", 130),
        pytest.param(ppo_robust_plr_minigrid, "SIGUSR1", 0, **SLOW),
        (ppo_plr_procgen, "SIGTERM", 0),
    ],
)
def test_a_signal_ends_a_run_after_its_iteration(
    name, status, script, brief_run, monkeypatch, tmp_path
):
    run_dir = tmp_path / "run"
    flags = f"{TINY[script.__name__]} {EVALUATED} --run-dir {run_dir}"
    process = Process(
        script,
        flags,
        tmp_path / "printed",
        f"""
update = s.LevelSampler.update
def signalled(sampler, *args, **kwargs):
    os.kill(os.getpid(), {getattr(signal, name).value})  # in the first iteration
    s.LevelSampler.update = update
    return update(sampler, *args, **kwargs)
s.LevelSampler.update = signalled""",
    )
    done = process.wait()
    assert done.returncode == status, done.stderr
    (flags,) = re.findall(rf"python {script.__name__}.py (--resume .*)", done.stdout)
    at = torch.load(run_dir / "checkpoint.pt", weights_only=True)["global_step"]
    (row,) = rows(run_dir / "progress.csv")
    assert at == row["global_step"] and not (run_dir / "result.json").exists()
    main(script, monkeypatch, flags)
    assert_same_run(run_dir, brief_run(script, EVALUATED))


@ONE
def test_rows_after_the_checkpoint_are_cut_and_none_is_doubled(
    script, brief_run, monkeypatch, tmp_path
):
    whole, flags = brief_run(script, EVALUATED), TINY[script.__name__]
    main(script, monkeypatch, f"{flags} {EVALUATED} {HALF[script]} --run-dir {tmp_path}/half")
    half = files(tmp_path / "half")
    # as a kill leaves them: rows too many, the last one cut short
    for name in ("progress.csv", "evaluations.csv"):
        (tmp_path / "half" / name).write_bytes((whole / name).read_bytes()[: len(half[name]) + 150])
    steps = json.loads((whole / "args.json").read_text())["total_timesteps"]
    main(script, monkeypatch, f"--resume {tmp_path}/half --total-timesteps {steps}")
    assert_same_run(tmp_path / "half", whole)


@pytest.mark.parametrize("annealed", [False, True])
def test_a_run_killed_just_before_its_result_writes_that(
    annealed, script, brief_run, monkeypatch, tmp_path
):
    whole = brief_run(script, f"--anneal-lr {HALF[script]}") if annealed else brief_run(script)
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run/result.json").unlink()
    main(script, monkeypatch, f"--resume {tmp_path}/run")
    assert_same_run(tmp_path / "run", whole)
    assert result_of(tmp_path / "run")["evaluation"] == result_of(whole)["evaluation"]


@pytest.mark.slow
def test_environments_that_cannot_be_saved_start_again_and_the_ledger_says_so(
    monkeypatch, tmp_path
):
    script = ppo_plr_procgen
    monkeypatch.delattr(script.ProcgenLevels, "get_state")
    main(script, monkeypatch, f"{TINY[script.__name__]} {HALF[script]} --run-dir {tmp_path}/run")
    sums = []
    add = script.EpisodeStatistics.add

    def watched(self, *args):
        sums.append(np.stack(list(self.sums.values())))
        return add(self, *args)

    monkeypatch.setattr(script.EpisodeStatistics, "add", watched)
    main(script, monkeypatch, f"--resume {tmp_path}/run --total-timesteps 384")
    assert (sums[0] == 0).all() and (sums[1] != 0).any()  # of other episodes than before
    for row in (progress := rows(tmp_path / "run/progress.csv")):
        assert_ledger_balances(row)
    assert progress[-1]["dropped"] == 4 and len(progress) == 4


# ---- what cannot be resumed ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    ["truncated", "garbage", "malicious", "newer", pytest.param("foreign", **SLOW), "missing"],
)
def test_a_run_that_cannot_be_loaded_is_left_as_it_is(
    damage, script, finished_run, tmp_path, monkeypatch, capsys
):
    run_dir = tmp_path / "run"
    shutil.copytree(finished_run(script), run_dir)
    path, other = run_dir / "checkpoint.pt", SCRIPTS[script is SCRIPTS[0]]
    why = ""
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-2000])
    elif damage == "garbage":
        path.write_bytes(b"not a checkpoint")
    elif damage == "malicious":
        path.write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "hacked").encode() + b"'\ntR.")
    elif damage == "newer":
        torch.save(torch.load(path, weights_only=True) | {"format": f"{script.__name__} 99"}, path)
        why = f"the format of its checkpoint is '{script.__name__} 99', this script's is "
        why += f"'{script.FORMAT}'"
    elif damage == "foreign":
        shutil.copy(finished_run(other) / "checkpoint.pt", path)
        why = f"the format of its checkpoint is '{other.FORMAT}'"
    else:
        path.unlink()
        why = "[Errno 2] No such file"
    before = files(run_dir)
    expected = f"is not a run that can be loaded: {why}"
    assert_refused(script, monkeypatch, tmp_path, capsys, f"--resume {run_dir}", expected)
    assert before == files(run_dir)


def test_flags_that_contradict_the_run_are_refused_by_name(
    script, finished_run, tmp_path, monkeypatch, capsys
):
    run_dir = finished_run(script)
    for flags, expected in {
        "": "must be raised: ",
        "--total-timesteps 9600 --seed 2": "--seed 2 must be 1, as in the run to resume",
        "--total-timesteps 9600 --curriculum plr --learning-rate 0.1": "--learning-rate 0.1 must "
        "be ",
        "--total-timesteps 96": "--total-timesteps 96 must be ",
        "--total-timesteps 9600 --eval-interval 3": "--eval-interval 3 must be ",
    }.items():
        if script is ppo_robust_plr_minigrid:
            flags = flags.replace("--curriculum plr", "--curriculum robust_plr")
        assert_refused(
            script, monkeypatch, tmp_path, capsys, f"--resume {run_dir} {flags}", expected
        )


# ---- faults --------------------------------------------------------------------------------------


def assert_stopped(done: subprocess.CompletedProcess, *expected: str) -> None:
    """One sentence that says what and how to go on, exit status 1."""
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert all(part in line for part in expected), line
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr


@ONE
@pytest.mark.parametrize("kind", ["file size limit", pytest.param("tmpfs", **SLOW)])
def test_a_full_disk_loses_no_more_than_what_is_after_the_last_checkpoint(
    kind, script, brief_run, monkeypatch, tmp_path
):
    size = (brief_run(script) / "checkpoint.pt").stat().st_size
    flags, disk = f"{TINY[script.__name__]} --checkpoint-interval 2", tmp_path / "disk"
    disk.mkdir()
    # room for the checkpoints but not for the logs; then for the first checkpoint alone
    if kind == "tmpfs":
        mount = ["mount", "-t", "tmpfs", "-o", f"size={int(1.5 * size)}", "tmpfs", str(disk)]
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("mounting a tmpfs is not allowed here")
        prelude, expected = "", "No space left on device"
    else:
        expected = "File too large"
        limit = f"resource.RLIMIT_FSIZE, ({int(0.9 * size)}, {int(0.9 * size)})"
        prelude = f"import resource\nresource.setrlimit({limit})"
    try:
        done = Process(
            script, f"{flags} --run-dir {disk}/run", tmp_path / "printed", prelude
        ).wait()
        assert_stopped(done, expected, f"to go on: --resume {disk}/run")
        shutil.copytree(disk / "run", tmp_path / "run")
    finally:
        if kind == "tmpfs":
            subprocess.run(["umount", str(disk)], check=True)
    main(script, monkeypatch, f"--resume {tmp_path}/run")
    assert not list((tmp_path / "run").glob("*.tmp"))
    assert_same_run(tmp_path / "run", brief_run(script))


@ONE
def test_a_deleted_run_directory_is_named(script, tmp_path):
    run_dir = tmp_path / "run"
    prelude = f"""
update = s.LevelSampler.update
def renamed(sampler, *args, **kwargs):
    os.path.exists("{run_dir}") and os.rename("{run_dir}", "{tmp_path}/gone")
    return update(sampler, *args, **kwargs)
s.LevelSampler.update = renamed"""
    done = Process(
        script, f"{TINY[script.__name__]} --run-dir {run_dir}", tmp_path / "printed", prelude
    ).wait()
    assert_stopped(done, "FileNotFoundError", str(run_dir), "no checkpoint to go on from")


@pytest.mark.parametrize(
    "script, cause",
    [
        (ppo_robust_plr_minigrid, "a learning rate of 1e30"),
        (ppo_robust_plr_minigrid, "a reward that is not a number"),
        (ppo_plr_procgen, "a reward that is not a number"),
    ],
)
def test_a_loss_that_is_not_finite_ends_the_run_with_what_led_there(cause, script, tmp_path):
    flags, prelude = f"{TINY[script.__name__]} --checkpoint-interval 1 --run-dir {tmp_path}/run", ""
    if script is ppo_robust_plr_minigrid:
        flags += " --curriculum plr"
    if cause == "a learning rate of 1e30":
        flags, failing = f"{flags} --learning-rate 1e30", 1
    else:
        envs, failing = "ProcgenLevels" if script is ppo_plr_procgen else "MazeEnvs", 3
        calls = int(2.5 * int(re.search(r"--num-steps (\d+)", flags)[1]))
        prelude = f"""
step, calls = s.{envs}.step, []
def poisoned(self, actions):
    obs, reward, *rest = step(self, actions)
    calls.append(0)
    return obs, reward * float("nan") if len(calls) == {calls} else reward, *rest
s.{envs}.step = poisoned"""
    done = Process(script, flags, tmp_path / "printed", prelude).wait()
    assert_stopped(
        done,
        f"to go on: --resume {tmp_path}/run",
        f"of iteration {failing} is not finite",
        "failed_0.pt",
    )
    failed = torch.load(tmp_path / "run/failed_0.pt", weights_only=True)
    assert {"actions", "rewards", "values", "agent"} <= set(failed)
    checkpoint = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    assert checkpoint["iteration"] == failing - 1
    assert failing == 1 or len(rows(tmp_path / "run/progress.csv")) == failing - 1
    assert all(x.isfinite().all() for x in checkpoint["agent"].values())


@pytest.mark.slow
def test_a_procgen_that_dies_loses_nothing(brief_run, monkeypatch, tmp_path):
    """Procgen ends its process at once: here by a state that it cannot read, in the second
    iteration."""
    script = ppo_plr_procgen
    prelude = """
step, calls = s.ProcgenLevels.step, []
def die(self, actions):
    calls.append(0)
    if len(calls) == 30:
        self.procgen.call_c_func("set_state", 0, bytes(10), 10)
    return step(self, actions)
s.ProcgenLevels.step = die"""
    flags = f"{TINY[script.__name__]} --checkpoint-interval 1 --run-dir {tmp_path}/run"
    done = Process(script, flags, tmp_path / "printed", prelude).wait()
    assert (
        done.returncode != 0
        and "Traceback" not in done.stderr
        and len(rows(tmp_path / "run/progress.csv")) == 1
    )
    main(script, monkeypatch, f"--resume {tmp_path}/run")
    assert_same_run(tmp_path / "run", brief_run(script))


class Pictures(gym.Env):
    """Four steps of noise that the seed decides; anywhere, a level is a reset seed."""

    observation_space, action_space = (
        gym.spaces.Box(0, 255, (64, 64, 3), np.uint8),
        gym.spaces.Discrete(4),
    )

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        self.t += 1
        return self.observation_space.sample(), float(action == 2), self.t == 4, False, {}


def test_a_dead_worker_is_noticed(monkeypatch, tmp_path, capsys):
    script, made = ppo_plr_procgen, []

    class Async(gym.vector.AsyncVectorEnv):
        def step(self, actions):
            self.steps = getattr(self, "steps", 0) + 1
            if self.steps == 20:
                os.kill(self.processes[0].pid, signal.SIGKILL)
            return super().step(actions)

    def make_envs(args, num_envs, device):
        off = gym.vector.AutoresetMode.DISABLED
        made.append(Async([Pictures] * num_envs, autoreset_mode=off, shared_memory=False))
        return made[-1]

    monkeypatch.setattr(script, "make_envs", make_envs)
    with pytest.raises(SystemExit) as stop:
        main(script, monkeypatch, f"{TINY[script.__name__]} --run-dir {tmp_path}/run")
    message = capsys.readouterr().err
    assert (
        stop.value.code == 1
        and f"to go on: --resume {tmp_path}/run" in message
        and "Error" in message
    )
    assert "envs." in (tmp_path / "run/error_0.txt").read_text()  # its step, or the reset after it
    for process in made[0].processes:
        process.kill()
    made[0].closed = True  # nothing is left to close
