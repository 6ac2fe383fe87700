"""Several processes, one run: gloo on the CPU, what every rank holds and how it compares with one
process.

Most of these groups are processes forked for it (`ranks`): torchrun's own start takes each rank
five seconds. What torchrun does itself, ending a group and starting it again, is tested with it.
"""

import contextlib
import functools
import os
import re
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support import (
    HALF,
    HUNG,
    ROOT,
    TINY,
    Process,
    assert_ledger_balances,
    assert_same_rows,
    made_once,
    main,
    result_of,
    rows,
    tiny,
)

import ppo_plr_procgen
import ppo_robust_plr_minigrid

pytestmark = pytest.mark.slow  # whole files: two minutes of processor time together

NOTHING = {"train_return": 0.0, "test_return": 0.0, "solved_mean": 0.0, "episodes": {}}
NO_EVALUATION = f"s.evaluate = lambda *_: {NOTHING}"
# Notes, for every rank, what it holds after each update.
NOTE = """
fingerprint = s.fingerprint
def noting(state):
    if "agent" in state:
        with open(f"{notes}/{{s.WORLD}}_{{s.RANK}}", "a") as file:
            print(fingerprint(state["sampler"]), fingerprint(state["agent"]), file=file)
    return fingerprint(state)
s.fingerprint = noting"""


def torchrun(
    processes: int, script, flags: str, directory: Path, prelude: str = "", options: str = ""
):
    """The script, after the prelude, as torchrun starts it."""
    wrapper = directory / "wrapper.py"
    imports = f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport {script.__name__} as s"
    wrapper.write_text(f"{imports}\n{prelude}\ns.main()")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
    ]
    command += [*options.split(), str(wrapper), *flags.split()]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=HUNG)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # no rank is left behind
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def ranks(
    processes: int,
    script,
    flags: str,
    directory: Path,
    prelude: str = NO_EVALUATION,
    status: int = 0,
) -> list[str]:
    """The same to the end, in processes forked for it, which find each other as those of torchrun
    do: what each said on stderr."""
    store = dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=HUNG)
    )
    env = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    env |= {"WORLD_SIZE": str(processes), "TORCHELASTIC_RESTART_COUNT": "0"}
    group = [
        Process(
            script, flags, directory / f"rank{k}", prelude, RANK=str(k), LOCAL_RANK=str(k), **env
        )
        for k in range(processes)
    ]
    try:
        ends = [process.wait() for process in group]
    finally:
        for process in group:
            process.kill_after(0)  # no rank is left behind
    for done in ends:
        assert done.returncode == status, done.stderr
    return [done.stderr for done in ends]


def assert_same_run_but_for_rounding(a, b) -> None:
    for left, right in zip(rows(a / "progress.csv"), rows(b / "progress.csv"), strict=True):
        for column in left.keys() - {"wall_seconds", "SPS"}:
            assert left[column] == pytest.approx(right[column], rel=1e-3, abs=1e-5, nan_ok=True), (
                column
            )


@pytest.fixture(scope="session")
def played(shared):
    """played(script, processes): the directory of a tiny run, `run`, and of what each rank noted,
    made once."""

    @functools.cache
    def played(script, processes: int) -> Path:
        def make(directory: Path) -> None:
            directory.mkdir()
            flags = f"{TINY[script.__name__]} --checkpoint-interval 1 --run-dir {directory}/run"
            ranks(processes, script, flags, directory, NO_EVALUATION + NOTE.format(notes=directory))

        return made_once(shared / f"played_{script.__name__}_{processes}", make)

    return played


@pytest.mark.parametrize(
    "script, processes",
    [(ppo_plr_procgen, 2), (ppo_robust_plr_minigrid, 2), (ppo_robust_plr_minigrid, 4)],
)
def test_several_processes_play_the_run_of_one(processes, script, played, finished_run):
    """The same levels in the same order, on every rank; parameters that differ by rounding; a
    ledger that balances."""
    directory, run_dir = played(script, processes), played(script, processes) / "run"
    notes = [
        (directory / f"{processes}_{rank}").read_text().splitlines() for rank in range(processes)
    ]
    progress = rows(run_dir / "progress.csv")
    assert all(note[: len(progress) + 1] == notes[0][: len(progress) + 1] for note in notes)
    assert len(set(notes[0])) == len(progress) + 1  # the start, and after each iteration
    assert result_of(run_dir)["processes"] == processes
    for row in progress:
        assert_ledger_balances(row)
        assert row["in_progress"] == 4
    assert_same_run_but_for_rounding(run_dir, finished_run(script))


@pytest.mark.parametrize(
    "more, updates", [("", 4), ("--num-minibatches 1 --target-kl 1e-9 --update-epochs 3", 2)]
)
def test_the_first_updates_parameters_are_those_of_one_process(
    more, updates, script, brief, monkeypatch, tmp_path
):
    """Two epochs of two minibatches; or one minibatch and three epochs, of which all ranks leave
    out the last."""
    flags = f"{TINY[script.__name__]} --update-epochs 2 --num-minibatches 2 --score policy_entropy "
    if script is ppo_plr_procgen:
        flags += f"--total-timesteps 96 {more}"
    else:  # plr learns at once
        flags += f"--curriculum plr --total-timesteps 96 --bootstrap-timeouts {more}"
    main(script, monkeypatch, f"{flags} --run-dir {tmp_path}/1")
    ranks(2, script, f"{flags} --run-dir {tmp_path}/2", tmp_path)
    one, two = (torch.load(tmp_path / f"{k}/checkpoint.pt", weights_only=True) for k in (1, 2))
    for name, parameter in one["agent"].items():
        torch.testing.assert_close(two["agent"][name], parameter, rtol=0, atol=1e-5)
    for name, array in one["sampler"]["arrays"].items():
        np.testing.assert_allclose(two["sampler"]["arrays"][name], array, rtol=1e-4, atol=1e-5)
    assert one["optimizer"]["state"][0]["step"] == two["optimizer"]["state"][0]["step"] == updates


@pytest.mark.slow
@pytest.mark.parametrize("script", [ppo_robust_plr_minigrid])
def test_a_killed_rank_restarts_the_group_from_the_checkpoint(script, played, tmp_path):
    kill = f"""
{NO_EVALUATION}
update, calls = s.LevelSampler.update, []
def dying(*args, **kwargs):
    calls.append(0)
    if len(calls) == 3 and s.RANK == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), 9)
    return update(*args, **kwargs)
s.LevelSampler.update = dying"""
    flags = f"{TINY[script.__name__]} --checkpoint-interval 1 --run-dir {tmp_path}/run"
    done = torchrun(2, script, flags, tmp_path, kill, "--max-restarts=1")
    assert done.returncode == 0 and "exitcode: -9" in done.stderr, done.stderr
    whole = played(script, 2) / "run"
    assert result_of(tmp_path / "run")["fingerprint"] == result_of(whole)["fingerprint"]
    assert_same_rows(tmp_path / "run/progress.csv", whole / "progress.csv")


def test_a_run_may_resume_on_another_number_of_processes(
    script, finished_run, brief, monkeypatch, tmp_path
):
    flags = TINY[script.__name__]
    steps = int(re.search(r"--total-timesteps (\d+)", flags)[1])
    main(script, monkeypatch, f"{flags} {HALF[script]} --run-dir {tmp_path}/run")
    ranks(2, script, f"--resume {tmp_path}/run --total-timesteps {steps}", tmp_path)
    assert_same_run_but_for_rounding(tmp_path / "run", finished_run(script))


def test_several_processes_edit_the_mazes_of_one(brief_run, tmp_path):
    script = ppo_robust_plr_minigrid
    more = "--curriculum accel --accel-base lowest"
    ranks(2, script, f"{tiny(script, more)} --run-dir {tmp_path}/run", tmp_path)
    one, two = brief_run(script, more), tmp_path / "run"
    assert_same_run_but_for_rounding(two, one)
    states = [torch.load(x / "checkpoint.pt", weights_only=True)["editor"] for x in (one, two)]
    assert script.fingerprint(states[0]) == script.fingerprint(states[1])
    assert states[0]["next_level"] > script.FIRST_EDITED_LEVEL
    assert result_of(two)["processes"] == 2


def test_start_directions_that_are_drawn_anew_are_those_of_one_process(
    brief_run, brief, monkeypatch, tmp_path
):
    """Of two processes, and of one that goes on where two were."""
    script = ppo_robust_plr_minigrid
    flags = f"{TINY[script.__name__]} --redraw-direction"
    ranks(2, script, f"{flags} --run-dir {tmp_path}/two", tmp_path)
    assert_same_run_but_for_rounding(tmp_path / "two", brief_run(script, "--redraw-direction"))
    ranks(2, script, f"{flags} {HALF[script]} --run-dir {tmp_path}/half", tmp_path)
    main(script, monkeypatch, f"--resume {tmp_path}/half --total-timesteps 960")
    assert_same_run_but_for_rounding(tmp_path / "half", brief_run(script, "--redraw-direction"))


def test_an_episode_may_end_in_one_process_only(monkeypatch, tmp_path):
    """Gymnasium refuses a reset of no environment."""
    script = ppo_robust_plr_minigrid
    flags = "--env-id MiniGrid-LavaGapS5-v0 --num-envs 2 --num-steps 100 --buffer-size 4"
    flags += " --curriculum plr --total-timesteps 400"
    monkeypatch.setattr(script, "evaluate", lambda *args: NOTHING)
    main(script, monkeypatch, f"{flags} --run-dir {tmp_path}/one")
    ranks(2, script, f"{flags} --run-dir {tmp_path}/two", tmp_path)
    assert_same_run_but_for_rounding(tmp_path / "two", tmp_path / "one")


def test_errors_of_all_processes_are_in_the_directory_that_the_first_has_chosen(tmp_path):
    script = ppo_robust_plr_minigrid
    prelude = f"""
import time
os.chdir("{tmp_path}")
clock = time.time
time.time = lambda: clock() + 100 * s.RANK
def fail(*args, **kwargs):
    raise OSError(f"process {{s.RANK}} fails")
s.LevelSampler.update = fail"""
    said = ranks(2, script, TINY[script.__name__], tmp_path, prelude, status=1)
    (run_dir,) = (tmp_path / "runs").iterdir()
    for k in range(2):
        assert f"process {k} fails" in (run_dir / f"error_{k}.txt").read_text()
    assert f"--resume runs/{run_dir.name}\n" in said[0]


@pytest.mark.parametrize("script", [ppo_robust_plr_minigrid])
def test_bad_input_is_refused_once(script, tmp_path):
    done = torchrun(2, script, "--num-envs 3", tmp_path)
    expected = "error: --num-envs 3 must be a multiple of torchrun's 2 processes.\n"
    assert done.returncode != 0 and done.stderr.count(expected) == 1
