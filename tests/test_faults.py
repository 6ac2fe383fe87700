"""What users met: faults of whole runs, each by its kind."""

import errno
import fcntl
import functools
import gzip
import itertools
import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from minigrid.core.grid import Grid
from minigrid.core.mission import MissionSpace
from minigrid.core.world_object import Goal
from minigrid.minigrid_env import MiniGridEnv
from support import (
    HALF,
    HUNG,
    ROOT,
    SCRIPTS,
    TINY,
    Process,
    assert_refused,
    assert_same_rows,
    assert_same_run,
    main,
    result_of,
    rows,
    steps_since_start,
    wait_for,
    watch_sampler,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo_plr_procgen
import ppo_robust_plr_minigrid

SLOW = {"marks": pytest.mark.slow}
# what environments have to do with is done to both scripts, of which one will do for a quick look
EITHER = [ppo_robust_plr_minigrid, pytest.param(ppo_plr_procgen, **SLOW)]
# the machinery is the same text in both, which test_both_scripts.py holds: one of them will do
ONE = [ppo_robust_plr_minigrid]
HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
EVALUATED = "--eval-interval 2 --checkpoint-interval 0"
LOGS = ("progress.csv", "evaluations.csv")
STEPS = {ppo_plr_procgen: 384, ppo_robust_plr_minigrid: 960}  # of the tiny runs
HALF_STEPS = {ppo_plr_procgen: 192, ppo_robust_plr_minigrid: 576}


@pytest.fixture(autouse=True)
def signals_as_before(brief):
    """A run in this process changes what signals do."""
    before = {number: signal.getsignal(number) for number in HANDLED}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    sys.modules.pop("wandb", None)  # those below


def after_updates(script, monkeypatch, count: int, action) -> None:
    """Calls `action` in iteration `count` of the next run in this process, before its update."""
    update = script.LevelSampler.update
    calls = itertools.count(1)

    def watched(sampler, *args, **kwargs):
        if next(calls) == count:
            action()
        return update(sampler, *args, **kwargs)

    monkeypatch.setattr(script.LevelSampler, "update", watched)


def start(script, monkeypatch, words: list[str]) -> None:
    """The script in this process, with words that may hold spaces."""
    torch.set_num_threads(1)
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *words])
    script.main()


# ---- interrupted again and again -----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "seed, script",
    [(0, ppo_plr_procgen), (0, ppo_robust_plr_minigrid), (1, ppo_robust_plr_minigrid)],
)
def test_interrupted_again_and_again_a_run_resumes_to_the_same_end(
    seed, script, brief_run, monkeypatch, tmp_path
):
    """By any signal after one iteration or two, with nothing evaluated before the end."""
    rng = random.Random(seed)
    run_dir = tmp_path / "run"
    flags = f"{TINY[script.__name__]} --run-dir {run_dir}"
    interruptions = 0
    while not (run_dir / "result.json").exists():
        number = rng.choice(HANDLED[:3])
        with monkeypatch.context() as patch:
            iteration = rng.choice((1, 1, 2))
            after_updates(script, patch, iteration, functools.partial(signal.raise_signal, number))
            try:
                main(script, patch, flags)
            except SystemExit as stop:
                assert stop.code == (130 if number == signal.SIGINT else 0)
                interruptions += 1
        flags = f"--resume {run_dir}"
    assert interruptions >= 2
    assert_same_run(run_dir, brief_run(script))


def damaged(kind: str, half: bytes, whole: bytes, rng: random.Random) -> bytes | None:
    """A log file of a run whose checkpoint is at `half`, as `kind` leaves it; None: there is none.

    Its rows up to the checkpoint are those of `half`, what follows is from `whole`.
    """
    header, *first_rows = half.splitlines(keepends=True)
    written = b"".join(whole.splitlines(keepends=True)[1 + len(first_rows) :])
    full = half + written
    return {
        "missing": None,
        "empty": b"",
        "without its header": b"".join(first_rows) + written,
        "cut in its header": full[: rng.randrange(1, len(header))],
        "cut in a row before the checkpoint": half[: rng.randrange(len(header) + 1, len(half))],
        "cut in a row after the checkpoint": full[: rng.randrange(len(half), len(full))],
        "glued where a row was cut": half + written[: rng.randrange(1, 40)] + written,
        "with zeros from a power cut": half + bytes(100),
    }[kind]


LOST = {  # which of the rows up to the checkpoint cannot be had again
    "missing": lambda step, last: True,
    "empty": lambda step, last: True,
    "without its header": lambda step, last: True,
    "cut in its header": lambda step, last: True,
    "cut in a row before the checkpoint": None,  # those from the cut on
    "cut in a row after the checkpoint": lambda step, last: False,
    "glued where a row was cut": lambda step, last: False,
    "with zeros from a power cut": lambda step, last: False,
}
OFTEN = "missing", "cut in a row before the checkpoint", "with zeros from a power cut"


@pytest.mark.parametrize("script", ONE)
@pytest.mark.parametrize(
    "kind", [kind if kind in OFTEN else pytest.param(kind, **SLOW) for kind in LOST]
)
def test_a_log_that_is_cut_anywhere_gets_its_rows_again(
    kind, script, brief_run, monkeypatch, tmp_path
):
    """All from the checkpoint on; those before it are what the file still holds."""
    whole_run = brief_run(script, EVALUATED)
    run_dir = tmp_path / "run"
    shutil.copytree(brief_run(script, f"{EVALUATED} {HALF[script]}"), run_dir)
    rng = random.Random(kind)
    expected = {}
    for name in LOGS:
        whole = (whole_run / name).read_bytes()
        half = (run_dir / name).read_bytes()
        left = damaged(kind, half, whole, rng)
        (run_dir / name).unlink()
        if left is not None:
            (run_dir / name).write_bytes(left)
        header, *lines = whole.splitlines(keepends=True)
        kept = set((left or b"").splitlines(keepends=True))
        of_half = {int(line.split(b",")[0]): line for line in half.splitlines(keepends=True)[1:]}
        has_header = header in kept
        expected[name] = header + b"".join(
            line
            for line in lines
            if int(line.split(b",")[0]) > HALF_STEPS[script]
            or (has_header and of_half[int(line.split(b",")[0])] in kept)
        )
    main(script, monkeypatch, f"--resume {run_dir} --total-timesteps {STEPS[script]}")
    assert result_of(run_dir)["fingerprint"] == result_of(whole_run)["fingerprint"]
    for name in LOGS:
        (tmp_path / name).write_bytes(expected[name])
        assert_same_rows(run_dir / name, tmp_path / name)


def test_a_row_that_a_full_disk_cuts_short_leaves_the_others_whole(script, tmp_path):
    path = tmp_path / "progress.csv"
    row = {"global_step": 96, "wall_seconds": 0.5, "episodic_return": 1.25}
    script.append_row(path, row)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, limits[1]))
    try:
        with pytest.raises(OSError):
            script.append_row(path, row | {"global_step": 192})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    script.append_row(path, row | {"global_step": 288})
    assert [row["global_step"] for row in rows(path)] == [96, 288]


def test_a_file_that_an_earlier_version_began_keeps_its_columns(script, tmp_path):
    path = tmp_path / "evaluations.csv"
    path.write_text("global_step,dropped,solved\n96,1,0.25\n")
    script.append_row(path, {"global_step": 192, "solved": 0.5, "new": 7})
    assert path.read_text() == "global_step,dropped,solved\n96,1,0.25\n192,,0.5\n"


# ---- two at once ---------------------------------------------------------------------------------

WAIT = """
import time
update = s.LevelSampler.update
def patient(*args, **kwargs):
    deadline = time.monotonic() + 20
    while not os.path.exists("{}") and time.monotonic() < deadline:
        time.sleep(0.01)
    return update(*args, **kwargs)
s.LevelSampler.update = patient
"""


@pytest.mark.slow
@pytest.mark.parametrize("script", ONE)
@pytest.mark.parametrize("kind", ["started", "resumed"])
def test_of_two_processes_with_one_directory_one_is_refused(kind, script, brief_run, tmp_path):
    run_dir = tmp_path / "run"
    flags = f"{TINY[script.__name__]} {EVALUATED} --run-dir {run_dir}"
    if kind == "resumed":
        shutil.copytree(brief_run(script, f"{EVALUATED} {HALF[script]}"), run_dir)
        flags = f"--resume {run_dir} --total-timesteps {STEPS[script]}"
    go = tmp_path / "go"
    both = [Process(script, flags, tmp_path / name, WAIT.format(go)) for name in "ab"]
    wait_for(lambda: not all(process.is_alive() for process in both))
    go.touch()
    ends = sorted((process.wait() for process in both), key=lambda done: done.returncode)
    assert [done.returncode for done in ends] == [0, 2], [done.stderr for done in ends]
    assert re.fullmatch("error: .* is in use: another process trains there.*\n", ends[1].stderr)
    assert_same_run(run_dir, brief_run(script, EVALUATED))
    assert not list(run_dir.glob("*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("script", ONE)
def test_two_runs_that_start_in_one_second_have_a_directory_each(script, brief_run, tmp_path):
    clock = f"""
import time
os.chdir("{tmp_path}")
time.time = lambda: 1.7e9 + time.perf_counter() / 1e5
"""
    go = tmp_path / "go"
    prelude = clock + WAIT.format(go)
    flags = [f"{TINY[script.__name__]} --learning-rate {rate}" for rate in (0.001, 0.002)]
    both = [Process(script, x, tmp_path / name, prelude) for x, name in zip(flags, "ab")]
    wait_for(lambda: len(list(tmp_path.glob("runs/*/checkpoint.pt"))) == 2)
    go.touch()
    for process in both:
        done = process.wait()
        assert done.returncode == 0, done.stderr
    run_dirs = sorted((tmp_path / "runs").iterdir())
    rates = set()
    for run_dir in run_dirs:
        rates.add(json.loads((run_dir / "args.json").read_text())["learning_rate"])
        steps = [row["global_step"] for row in rows(run_dir / "progress.csv")]
        assert steps == [row["global_step"] for row in rows(brief_run(script) / "progress.csv")]
        assert (run_dir / "result.json").exists()
    assert len(run_dirs) == 2 and rates == {0.001, 0.002}


@pytest.mark.parametrize("script", ONE)
def test_temporary_files_of_a_killed_process_go_and_those_of_others_stay(
    script, monkeypatch, tmp_path
):
    mine = [tmp_path / f"{name}.4242.tmp" for name in ("checkpoint.pt", "failed_0.pt")]
    others = tmp_path / "thesis.tmp"
    for path in mine:
        path.write_bytes(b"half a file")
    others.write_bytes(b"a chapter")
    flags = f"{TINY[script.__name__]} {HALF[script]} --run-dir {tmp_path}"
    main(script, monkeypatch, flags)
    assert not any(path.exists() for path in mine) and others.read_bytes() == b"a chapter"


def test_what_could_not_be_written_leaves_the_old_file_and_takes_no_room(
    script, monkeypatch, tmp_path
):
    path = tmp_path / "result.json"
    script.write_file(path, {"known": 1.5, "not known": math.nan, "list": [math.inf]})
    old = path.read_text()
    assert json.loads(old) == {"known": 1.5, "not known": None, "list": [None]}

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        script.write_file(path, {"known": 2.5})
    assert list(tmp_path.iterdir()) == [path] and path.read_text() == old


def test_a_profile_of_one_iteration_that_is_left_has_its_phases(
    script, brief_run, monkeypatch, tmp_path
):
    shutil.copytree(brief_run(script, HALF[script]), run_dir := tmp_path / "run")
    steps = HALF_STEPS[script] + 96
    main(script, monkeypatch, f"--resume {run_dir} --total-timesteps {steps} --profile")
    with gzip.open(run_dir / "trace_0.json.gz") as file:
        events = json.load(file)["traceEvents"]
    names = {x["name"] for x in events if x.get("cat") == "user_annotation"}
    assert {"environment", "inference", "sampler", "update"} <= names


def test_an_evaluation_has_no_rollout_to_be_refused_for(brief_run, brief, monkeypatch, tmp_path):
    script = ppo_robust_plr_minigrid
    shutil.copytree(brief_run(script), run_dir := tmp_path / "run")
    main(script, monkeypatch, f"--evaluate {run_dir} --num-steps 1 --total-timesteps 4")
    assert list(run_dir.glob("evaluation_*.json"))


def test_a_start_that_fails_does_not_advise_to_resume(script, monkeypatch, tmp_path, capsys):
    def broken(*args):
        raise ValueError("a fork's mistake")

    monkeypatch.setattr(script, "make_agent", broken)
    with pytest.raises(SystemExit) as stop:
        main(script, monkeypatch, f"{TINY[script.__name__]} --run-dir {tmp_path}/run")
    message = capsys.readouterr().err
    assert stop.value.code == 1 and "a fork's mistake. " in message
    assert message.endswith("has details; there is no checkpoint to go on from\n")


@pytest.mark.parametrize("script", ONE)
def test_a_directory_that_is_moved_away_is_not_said_to_have_details(
    script, monkeypatch, tmp_path, capsys
):
    run_dir = tmp_path / "run"
    move = functools.partial(shutil.move, run_dir, tmp_path / "moved")
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        after_updates(script, patch, 1, move)
        main(script, patch, f"{TINY[script.__name__]} --run-dir {run_dir}")
    message = capsys.readouterr().err
    expected = f"{run_dir}/error_0.txt cannot be written; there is no checkpoint to go on from\n"
    assert stop.value.code == 1 and message.endswith(expected)
    main(script, monkeypatch, f"--resume {tmp_path}/moved")
    assert (tmp_path / "moved/result.json").exists()


def test_an_evaluation_that_cannot_be_written_is_shown(
    script, brief_run, brief, monkeypatch, tmp_path, capsys
):
    shutil.copytree(brief_run(script), run_dir := tmp_path / "run")

    def read_only(path, content):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(script, "write_file", read_only)
    with pytest.raises(SystemExit) as stop:
        main(script, monkeypatch, f"--evaluate {run_dir}")
    printed = capsys.readouterr()
    assert "_mean: " in printed.out or "test_return: " in printed.out
    expected = f"error: --evaluate {run_dir} cannot be written: Read-only file system.\n"
    assert stop.value.code == 1 and printed.err == expected


@pytest.mark.parametrize("script", ONE)
def test_a_file_system_without_locks_is_no_obstacle(script, monkeypatch, tmp_path):
    def no_locks(*args):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    main(script, monkeypatch, f"{TINY[script.__name__]} {HALF[script]} --run-dir {tmp_path}/run")
    assert (tmp_path / "run/result.json").exists()


@pytest.mark.parametrize("script", ONE)
def test_a_directory_is_free_once_its_run_has_ended(script, monkeypatch, tmp_path):
    """In one process, as in a notebook: after a signal, and after an error."""
    run_dir = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        after_updates(script, patch, 1, functools.partial(signal.raise_signal, signal.SIGTERM))
        main(script, patch, f"{TINY[script.__name__]} --run-dir {run_dir}")
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        after_updates(script, patch, 1, functools.partial(fail, "an error"))
        main(script, patch, f"--resume {run_dir}")
    assert stop.value.code == 1
    main(script, monkeypatch, f"--resume {run_dir}")
    assert (run_dir / "result.json").exists()


def fail(what: str, *args, **kwargs):
    raise OSError(what)


# ---- the screen ----------------------------------------------------------------------------------

CLOSED = "read, write = os.pipe()\nos.close(read)\nos.dup2(write, 1)\n"
ASCII = "sys.stdout.reconfigure(encoding='ascii', errors='strict')\n"
SCREENS = {
    "a closed pipe": CLOSED,
    "a full disk": "os.dup2(os.open('/dev/full', os.O_WRONLY), 1)\n",
    "ASCII": ASCII,
    "ASCII in a closed pipe": ASCII + CLOSED,
    "none": "sys.stdout = None\n",
}


@pytest.mark.parametrize("script", ONE)
@pytest.mark.parametrize(
    "kind", [kind if kind == "ASCII" else pytest.param(kind, **SLOW) for kind in SCREENS]
)
def test_nothing_that_is_wrong_with_the_screen_ends_a_run(kind, script, brief_run, tmp_path):
    run_dir = tmp_path / "läuft_走"
    flags = f"{TINY[script.__name__]} {EVALUATED} --run-dir {run_dir}"
    done = Process(script, flags, tmp_path / "printed", SCREENS[kind]).wait()
    assert done.returncode == 0, done.stderr
    assert_same_run(run_dir, brief_run(script, EVALUATED))
    assert kind != "ASCII" or f"done: {run_dir}/result.json" in done.stdout


@pytest.mark.parametrize("script", EITHER)
def test_interrupted_together_with_its_pipe_a_run_saves(script, tmp_path):
    """Ctrl-C reaches `| tee` too, and first."""
    run_dir = tmp_path / "run"
    prelude = f"""
update = s.LevelSampler.update
def interrupted(*args, **kwargs):
    s.LevelSampler.update = update
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, 1)
    os.kill(os.getpid(), {signal.SIGINT.value})
    return update(*args, **kwargs)
s.LevelSampler.update = interrupted
"""
    flags = f"{TINY[script.__name__]} --checkpoint-interval 0 --run-dir {run_dir}"
    done = Process(script, flags, tmp_path / "printed", prelude).wait()
    assert done.returncode == 130 and "Traceback" not in done.stderr, done.stderr
    assert torch.load(run_dir / "checkpoint.pt", weights_only=True)["iteration"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("script", ONE)
@pytest.mark.parametrize("behind", ["| head -1", "> /dev/full", ">&-"])
def test_the_screen_as_a_user_has_it(behind, script, tmp_path):
    """The interpreter's own flush at its end has nothing to say either."""
    flags = f"{TINY[script.__name__]} {HALF[script]} --run-dir {tmp_path}/run"
    nothing = "lambda *args: {'solved_mean': 0.0, 'episodes': {}}"
    code = f"import {script.__name__} as s; s.evaluate = {nothing}; s.main()"
    command = f'{sys.executable} -c "{code}" {flags} {behind}'
    command += '\nexit "${PIPESTATUS[0]}"'
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=HUNG
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/result.json").exists()
    assert "Exception" not in done.stderr and "Error" not in done.stderr, done.stderr


@pytest.mark.parametrize("script", ONE)
def test_a_printed_command_can_be_pasted(script, monkeypatch, tmp_path, capsys):
    run_dir = tmp_path / 'it\'s a "run"; of $HOME'
    words = [*TINY[script.__name__].split(), "--run-dir", str(run_dir)]
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        after_updates(script, patch, 1, functools.partial(signal.raise_signal, signal.SIGTERM))
        start(script, patch, words)
    (command,) = re.findall("To go on: (.*)\n", capsys.readouterr().out)
    _, program, *words = shlex.split(command)
    assert program == f"{script.__name__}.py" and words == ["--resume", str(run_dir)]
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        after_updates(script, patch, 1, functools.partial(fail, "no more"))
        start(script, patch, words)
    (command,) = re.findall("to go on: (.*)\n", capsys.readouterr().err)
    assert shlex.split(command) == ["--resume", str(run_dir)]
    start(script, monkeypatch, shlex.split(command))
    assert (run_dir / "result.json").exists()


@pytest.mark.parametrize("script", EITHER)
def test_a_closed_terminal_ends_a_run_like_sigterm(script, brief_run, monkeypatch, tmp_path):
    run_dir = tmp_path / "run"
    prelude = f"""
update = s.LevelSampler.update
def closed(*args, **kwargs):
    s.LevelSampler.update = update
    os.kill(os.getpid(), {signal.SIGHUP.value})
    return update(*args, **kwargs)
s.LevelSampler.update = closed
"""
    flags = f"{TINY[script.__name__]} {EVALUATED} --run-dir {run_dir}"
    done = Process(script, flags, tmp_path / "printed", prelude).wait()
    assert done.returncode == 0 and f"--resume {run_dir}" in done.stdout, done
    assert len(rows(run_dir / "progress.csv")) == 1
    main(script, monkeypatch, f"--resume {run_dir}")
    assert_same_run(run_dir, brief_run(script, EVALUATED))


@pytest.mark.parametrize("script", ONE)
def test_under_nohup_a_closed_terminal_is_nothing(script, brief_run, monkeypatch, tmp_path):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    after_updates(script, monkeypatch, 1, functools.partial(signal.raise_signal, signal.SIGHUP))
    main(script, monkeypatch, f"{TINY[script.__name__]} {EVALUATED} --run-dir {tmp_path}/run")
    assert_same_run(tmp_path / "run", brief_run(script, EVALUATED))


# ---- decoration ----------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ONE)
@pytest.mark.parametrize("what", ["PIL.Image.Image.save", "PIL.Image.fromarray"])
def test_a_picture_that_fails_is_a_line_on_the_screen(
    what, script, brief_run, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(what, functools.partial(fail, "no such picture"))
    flags = f"{TINY[script.__name__]} --capture-video --run-dir {tmp_path}/run"
    main(script, monkeypatch, flags)
    lines = re.findall(
        "(.*) failed, the run goes on: OSError: no such picture", capsys.readouterr().out
    )
    assert lines and len(lines) == len(set(lines))
    assert_same_run(tmp_path / "run", brief_run(script))


def add_module(monkeypatch, directory: Path, text: str) -> None:
    """wandb, as a package of that text."""
    (directory / "wandb.py").write_text(text)
    monkeypatch.syspath_prepend(directory)


@pytest.mark.parametrize("script", ONE)
@pytest.mark.parametrize(
    "text",
    ["def init(**options): raise ConnectionError('offline')", "raise ConnectionError('offline')"],
)
def test_tracking_that_fails_is_a_line_on_the_screen(
    text, script, brief_run, monkeypatch, tmp_path, capsys
):
    add_module(monkeypatch, tmp_path, text)
    main(script, monkeypatch, f"{TINY[script.__name__]} --track --run-dir {tmp_path}/run")
    assert "failed, the run goes on: ConnectionError: offline" in capsys.readouterr().out
    assert_same_run(tmp_path / "run", brief_run(script))


class Rooms(MiniGridEnv):
    """Its size depends on the level, and from the tenth level on its time limit."""

    def __init__(self, longer: int = 8, **kwargs):
        self.longer = longer
        super().__init__(MissionSpace(lambda: ""), grid_size=9, max_steps=8, **kwargs)

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.width = self.height = 5 + seed % 4
            self.max_steps = self.longer if seed >= 10 else 8
        return super().reset(seed=seed, options=options)

    def _gen_grid(self, width, height):
        self.grid = Grid(width, height)
        self.grid.wall_rect(0, 0, width, height)
        self.put_obj(Goal(), width - 2, height - 2)
        self.mission = ""
        self.place_agent()


def register(monkeypatch, name: str, maker, **options) -> None:
    spec = gym.envs.registration.EnvSpec(name, entry_point=maker, **options)
    monkeypatch.setitem(gym.registry, name, spec)


ROOMS = "--num-envs 4 --num-steps 8 --update-epochs 1 --buffer-size 8 --rho 0.5 --eval-episodes 2"
ROOMS += " --total-timesteps 160"


def test_pictures_of_levels_of_many_sizes_and_of_a_namespaced_environment(monkeypatch, tmp_path):
    script = ppo_robust_plr_minigrid
    register(monkeypatch, "faults/Rooms-v0", Rooms)
    flags = f"{ROOMS} --env-id faults/Rooms-v0 --capture-video --run-dir {tmp_path}/run"
    main(script, monkeypatch, flags)
    assert (tmp_path / "run/result.json").exists()
    assert len(list((tmp_path / "run/videos").rglob("*.gif"))) == 1
    images = EventAccumulator(str(tmp_path / "run")).Reload().Tags()["images"]
    assert {"levels/fresh", "levels/highest_score"} <= set(images)


# ---- a fork that follows the README --------------------------------------------------------------


def toy_picture(level: int, t: int, dtype: str) -> np.ndarray:
    pixels = np.random.default_rng([level, t]).integers(0, 256, (8, 8, 3), np.uint8)
    return pixels if dtype == "uint8" else (pixels / 255).astype(np.float32)


class Toy(gym.Env):
    """A level's pictures are noise that it decides, its length is two to four steps."""

    def __init__(self, dtype: str = "uint8"):
        self.dtype = dtype
        high = 255 if dtype == "uint8" else 1
        self.observation_space = gym.spaces.Box(0, high, (8, 8, 3), np.dtype(dtype))
        self.action_space = gym.spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.level = seed
        self.t = 0
        return toy_picture(self.level, self.t, self.dtype), {}

    def step(self, action):
        self.t += 1
        done = self.t == 2 + self.level % 3
        return toy_picture(self.level, self.t, self.dtype), float(action == 1), done, False, {}


class UnscaledAgent(ppo_plr_procgen.Agent):
    def hidden(self, x):
        return super().hidden(x * 255.0)


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_a_fork_by_the_readmes_steps_trains_on_what_its_environments_show(
    dtype, monkeypatch, tmp_path
):
    script = ppo_plr_procgen
    register(monkeypatch, "Toy-v0", Toy, kwargs={"dtype": dtype})

    def make_envs(args, num_envs, *device):
        off = {"autoreset_mode": gym.vector.AutoresetMode.DISABLED}
        return gym.make_vec("Toy-v0", num_envs, vector_kwargs=off)

    monkeypatch.setattr(script, "make_envs", make_envs)
    if dtype == "float32":
        monkeypatch.setattr(script, "Agent", UnscaledAgent)
    learned = []

    def watched(agent, args, mb_obs, *rest):
        learned.append(mb_obs.clone())
        return loss(agent, args, mb_obs, *rest)

    loss = getattr(script, "ppo_loss", None)
    monkeypatch.setattr(script, "ppo_loss", watched, raising=False)
    rollouts = watch_sampler(script, monkeypatch)
    flags = "--num-envs 4 --num-steps 24 --num-minibatches 2 --update-epochs 1 --num-levels 5"
    flags += " --total-timesteps 288 --eval-episodes 5 --eval-interval 1"
    main(script, monkeypatch, f"{flags} --run-dir {tmp_path}/run")
    levels = np.concatenate([rollout.levels for rollout in rollouts])
    t_of = steps_since_start(np.concatenate([rollout.dones for rollout in rollouts]))
    shown = [toy_picture(*at, dtype) for at in zip(levels.ravel().tolist(), t_of.ravel().tolist())]
    shown = torch.from_numpy(np.stack(shown))
    learned = torch.cat(learned)
    assert learned.dtype == shown.dtype == getattr(torch, dtype)
    pixels = np.stack([np.sort(x.reshape(3, -1, 192).double(), axis=1) for x in (learned, shown)])
    np.testing.assert_array_equal(*pixels)  # of each iteration, in any order
    evaluations = rows(tmp_path / "run/evaluations.csv")
    assert len(evaluations) == 3
    # an episode on level l has 2 + l % 3 steps, whose rewards are 0 or 1
    episodes = result_of(tmp_path / "run")["evaluation"]["episodes"]
    for kind in ("train", "test"):
        longest = 2 + np.array(episodes[f"{kind}_levels"]) % 3
        assert (np.array(episodes[f"{kind}_returns"]) <= longest).all()


def test_a_forks_environment_has_its_name_and_no_mode(monkeypatch, tmp_path, capsys):
    script = ppo_plr_procgen
    register(monkeypatch, "Toy-v0", Toy)

    def make_envs(args, num_envs, *device):
        off = {"autoreset_mode": gym.vector.AutoresetMode.DISABLED}
        return gym.make_vec("Toy-v0", num_envs, vector_kwargs=off)

    flags = "--env-id Toy --num-envs 2 --num-steps 12 --num-minibatches 2 --total-timesteps 24"
    flags += " --eval-episodes 2"
    monkeypatch.setattr(script, "OWN_ENVS", ("Toy",))
    with monkeypatch.context() as patch:
        assert_refused(
            script,
            patch,
            tmp_path,
            capsys,
            f"{flags} --distribution-mode hard",
            "--distribution-mode hard does nothing without a Procgen game",
        )
    monkeypatch.setattr(script, "make_envs", make_envs)
    main(script, monkeypatch, f"{flags} --run-dir {tmp_path}/run")
    assert "Toy, 200 levels, plr, seed 1" in capsys.readouterr().out
    assert result_of(tmp_path / "run")["env_id"] == "Toy"


def test_a_fork_of_the_mazes_keeps_the_images_that_it_is_given(monkeypatch, tmp_path):
    script = ppo_robust_plr_minigrid
    runs = []

    class Fractions(script.MazeEnvs):
        def show(self, obs):
            return {"image": obs["image"] / 16, "direction": obs["direction"]}

        def reset(self, **kwargs):
            obs, infos = super().reset(**kwargs)
            return self.show(obs), infos

        def step(self, actions):
            obs, *rest = super().step(actions)
            return self.show(obs), *rest

    class Watched(script.Run):
        def __init__(self, *args):
            super().__init__(*args)
            runs.append(self)

    def make_envs(args, num_envs, device):
        return Fractions(num_envs, device, args.maze_size, args.max_steps, args.num_walls)

    monkeypatch.setattr(script, "make_envs", make_envs)
    monkeypatch.setattr(script, "Run", Watched)
    flags = f"{TINY[script.__name__]} {HALF[script]} --run-dir {tmp_path}/run"
    main(script, monkeypatch, flags)
    images = runs[0].storage["images"]
    assert images.dtype == torch.float32
    assert set((16 * images).unique().tolist()) == {0, 1, 2, 5, 8}  # MiniGrid's objects, colours


# ---- flags that do what they say -----------------------------------------------------------------


@pytest.mark.parametrize("script", EITHER)
def test_another_length_of_an_annealed_or_a_longer_run_is_refused(
    script, brief_run, monkeypatch, tmp_path, capsys
):
    annealed = brief_run(script, f"--anneal-lr {HALF[script]}")
    more, less = (HALF_STEPS[script] + change for change in (96, -96))
    for run_dir, steps, expected in (
        (annealed, more, f"--total-timesteps {more} must be {HALF_STEPS[script]}: --anneal-lr"),
        (annealed, less, f"--total-timesteps {less} must be at least {HALF_STEPS[script]}"),
        (brief_run(script), STEPS[script] - 96, f"must be at least {STEPS[script]}"),
    ):
        flags = f"--resume {run_dir} --total-timesteps {steps}"
        assert_refused(script, monkeypatch, tmp_path, capsys, flags, expected)


ROOM = "--env-id MiniGrid-Empty-Random-6x6-v0"
USELESS = {  # flags -> the one that does nothing
    ppo_plr_procgen: {
        "--curriculum uniform --nu 0.3": "--nu 0.3",
        "--curriculum sequential --rho 0.5": "--rho 0.5",
        "--curriculum uniform --replay-schedule fixed": "--replay-schedule fixed",
        "--nu 0.3": "--nu 0.3",
        "--rho 0.5 --nu 0.3": "--nu 0.3",
        "--replay-schedule fixed --nu 0.3": "--replay-schedule fixed",
        "--score-transform max --temperature 0.5": "--temperature 0.5",
        "--score-transform constant --temperature 0.5": "--temperature 0.5",
    },
    ppo_robust_plr_minigrid: {
        "--curriculum dr --replay-prob 0.8": "--replay-prob 0.8",
        "--curriculum dr --nu 0.2": "--nu 0.2",
        "--curriculum dr --buffer-size 500": "--buffer-size 500",
        "--curriculum dr --score value_l1": "--score value_l1",
        "--curriculum dr --score-transform softmax": "--score-transform softmax",
        "--curriculum dr --temperature 0.3": "--temperature 0.3",
        "--curriculum dr --staleness-coef 0.5": "--staleness-coef 0.5",
        "--curriculum dr --replay-schedule fixed": "--replay-schedule fixed",
        "--curriculum dr --rho 0.1": "--rho 0.1",
        "--curriculum dr --alpha 0.5": "--alpha 0.5",
        "--curriculum dr --gate-unsolved": "--gate-unsolved True",
        "--num-edits 3": "--num-edits 3",
        "--curriculum plr --accel-base lowest": "--accel-base lowest",
        "--curriculum dr --accel-base highest": "--accel-base highest",
        f"{ROOM} --num-walls 3": "--num-walls 3",
        f"{ROOM} --vary-num-walls": "--vary-num-walls True",
        f"{ROOM} --maze-size 9": "--maze-size 9",
        f"{ROOM} --redraw-direction": "--redraw-direction True",
        "--score-transform eps_greedy --temperature 0.5": "--temperature 0.5",
    },
}


@pytest.mark.parametrize(
    "script, flags", [(script, flags) for script in SCRIPTS for flags in USELESS[script]]
)
def test_a_flag_that_does_nothing_is_refused_by_its_own_name(
    script, flags, monkeypatch, tmp_path, capsys
):
    expected = f"error: {USELESS[script][flags]} does nothing without "
    assert_refused(script, monkeypatch, tmp_path, capsys, flags, expected)


def test_nu_and_replay_prob_are_refused_together_and_each_by_its_own_name(
    monkeypatch, tmp_path, capsys
):
    for flags, expected in {
        "--nu 0.4 --replay-prob 0.9": "--replay-prob 0.9 must be another without --nu",
        "--nu 1": "--nu 1.0 must be below 1: robust_plr learns from replayed levels only",
        "--replay-prob 0": "--replay-prob 0.0 must be above 0: robust_plr",
    }.items():
        script = ppo_robust_plr_minigrid
        assert_refused(script, monkeypatch, tmp_path, capsys, flags, expected)


def test_resume_and_evaluate_are_refused_together(script, brief_run, monkeypatch, tmp_path, capsys):
    flags = f"--evaluate {brief_run(script)} --resume {brief_run(script)}"
    expected = f"--resume {brief_run(script)} does nothing with --evaluate"
    assert_refused(script, monkeypatch, tmp_path, capsys, flags, expected)


def test_max_steps_is_the_time_limit_of_a_registered_environment(monkeypatch, tmp_path, capsys):
    script = ppo_robust_plr_minigrid
    register(monkeypatch, "Rooms-v0", Rooms)
    register(monkeypatch, "Limited-v0", Rooms, max_episode_steps=6)
    flags = f"{ROOMS} --num-steps 5 --env-id Limited-v0"
    expected = "--num-steps 5 must be at least 6, the time limit"
    with monkeypatch.context() as patch:
        assert_refused(script, patch, tmp_path, capsys, flags, expected)
    flags = f"{ROOMS} --env-id Limited-v0 --max-steps 7"
    expected = "--max-steps 7 must be at most 6, the time limit of --env-id Limited-v0"
    with monkeypatch.context() as patch:
        assert_refused(script, patch, tmp_path, capsys, flags, expected)
    flags = f"{ROOMS} --env-id Rooms-v0 --max-steps 3 --eval-interval 1"
    main(script, monkeypatch, f"{flags} --run-dir {tmp_path}/run")
    lengths = [row["episodic_length"] for row in rows(tmp_path / "run/progress.csv")]
    assert max(lengths) <= 3 and min(lengths) > 1


def test_a_level_that_is_longer_than_those_tried_is_said_once_and_not_scored(
    monkeypatch, tmp_path, capsys
):
    script = ppo_robust_plr_minigrid
    register(monkeypatch, "Rooms-v0", Rooms, kwargs={"longer": 60})
    main(script, monkeypatch, f"{ROOMS} --env-id Rooms-v0 --run-dir {tmp_path}/run")
    expected = "a level was not scored: its time limit is above --num-steps 8\n"
    assert capsys.readouterr().out.count(expected) == 1
    progress = rows(tmp_path / "run/progress.csv")
    assert sum(row["dropped"] for row in progress[-1:]) > 0


SPELLINGS = {
    "--anneal-lr=True": ("anneal_lr", True),
    "--anneal_lr=false": ("anneal_lr", False),
    "--no-cuda": ("cuda", False),
    "--cuda=False": ("cuda", False),
    "--total-timesteps 25e6": ("total_timesteps", 25_000_000),
    "--total_timesteps=3.5E6": ("total_timesteps", 3_500_000),
    "--total-timesteps 2.5e+07": ("total_timesteps", 25_000_000),
    "--total-timesteps=5000000.0": ("total_timesteps", 5_000_000),
    "--eval-episodes=1.5e3": ("eval_episodes", 1500),
    "--learning-rate 1e-5": ("learning_rate", 1e-5),
    "--exp-name 25e6": ("exp_name", "25e6"),
}


@pytest.mark.parametrize("flags", SPELLINGS)
def test_the_spellings_of_sweep_tools_are_understood(flags, script, monkeypatch, tmp_path):
    trained = []
    monkeypatch.setattr(script, "train", lambda args, *rest: trained.append(args))
    main(script, monkeypatch, f"{flags} --run-dir {tmp_path}/run")
    name, value = SPELLINGS[flags]
    assert getattr(trained[0], name) == value and type(getattr(trained[0], name)) is type(value)


def test_max_steps_may_be_spelled_so_too(monkeypatch, tmp_path):
    script = ppo_robust_plr_minigrid
    trained = []
    monkeypatch.setattr(script, "train", lambda args, *rest: trained.append(args))
    main(script, monkeypatch, f"--max-steps=1e2 --run-dir {tmp_path}/run")
    assert trained[0].max_steps == 100


REFUSED_NUMBERS = {
    "--total-timesteps 2.55e1": "2.55e1",
    "--total-timesteps=1e400": "1e400",
    "--seed 0.5": "0.5",
    "--num-envs=true": "true",
    "--eval-episodes 9223372036854775807": "--eval-episodes 9223372036854775807 must be at most",
}


@pytest.mark.parametrize("flags", REFUSED_NUMBERS)
def test_a_number_that_cannot_be_is_refused(flags, script, monkeypatch, tmp_path, capsys):
    assert_refused(script, monkeypatch, tmp_path, capsys, flags, REFUSED_NUMBERS[flags])


@pytest.mark.parametrize("flag", ["--num-levels", "--start-level", "--env-threads"])
def test_levels_beyond_all_numbers_are_refused(flag, monkeypatch, tmp_path, capsys):
    for number in (2**63 - 1, 2**63, 2**31):
        flags = f"{flag} {number}"
        expected = f"{flag} {number} must be at least 0 and "
        assert_refused(ppo_plr_procgen, monkeypatch, tmp_path, capsys, flags, expected)


# ---- what is logged elsewhere --------------------------------------------------------------------


@pytest.mark.parametrize("script", ONE)
def test_a_resumed_run_goes_on_in_the_same_run_of_weights_and_biases(script, monkeypatch, tmp_path):
    add_module(monkeypatch, tmp_path, "calls = []\ndef init(**x): calls.append(x)")
    run_dir = tmp_path / "run"
    flags = f"{TINY[script.__name__]} --track --run-dir {run_dir}"
    for command in (flags, f"--resume {run_dir}"):
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            after_updates(script, patch, 1, functools.partial(signal.raise_signal, signal.SIGTERM))
            main(script, patch, command)
    main(script, monkeypatch, f"{TINY[script.__name__]} --track --run-dir {tmp_path}/other")
    first, again, other = sys.modules["wandb"].calls
    assert first["id"] == again["id"] != other["id"] and again["resume"] == "allow"


@pytest.mark.parametrize("script", ONE)
@pytest.mark.slow
def test_pythons_loader_sees_each_point_once_after_a_kill_and_a_resume(
    script, monkeypatch, tmp_path
):
    killed = tmp_path / "killed"

    def snapshot() -> None:
        """What a kill leaves: events on the disk that no checkpoint has."""
        for writer in writers:
            writer.flush()
        shutil.copytree(tmp_path / "run", killed)

    writers = []

    class Watched(script.SummaryWriter):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            writers.append(self)

    flags = f"{TINY[script.__name__]} --eval-interval 1 --checkpoint-interval 2"
    with monkeypatch.context() as patch:
        patch.setattr(script, "SummaryWriter", Watched)
        after_updates(script, patch, 4, snapshot)
        main(script, patch, f"{flags} --run-dir {tmp_path}/run")
    assert [row["global_step"] for row in rows(killed / "progress.csv")] == [96, 192, 288]
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        after_updates(script, patch, 1, functools.partial(signal.raise_signal, signal.SIGTERM))
        main(script, patch, f"--resume {killed}")
    main(script, monkeypatch, f"--resume {killed}")
    events = EventAccumulator(str(killed)).Reload()
    steps = [row["global_step"] for row in rows(killed / "progress.csv")]
    for tag in ("charts/SPS", "losses/value_loss"):
        logged = [event.step for event in events.Scalars(tag)]
        assert logged == sorted(set(logged)) and len(logged) >= 3
    assert [event.step for event in events.Scalars("charts/SPS")] == steps


# ---- several processes ---------------------------------------------------------------------------


def test_no_process_gives_up_on_another_that_evaluates_for_days(script, monkeypatch):
    asked = {}
    monkeypatch.setattr(script, "WORLD", 2)
    monkeypatch.setattr(script.dist, "rendezvous", lambda url: iter([(None, 0, 2)]))
    monkeypatch.setattr(script.dist, "PrefixStore", lambda prefix, store: None)
    monkeypatch.setattr(
        script.dist, "init_process_group", lambda *x, **kwargs: asked.update(kwargs)
    )
    script.choose_device(script.Args(cuda=False))
    assert asked["timeout"].days >= 2


# ---- what a person sees --------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_answered_at_once(number, script, monkeypatch, tmp_path, capfd):
    seen = []

    def interrupt() -> None:
        signal.raise_signal(number)
        seen.append(capfd.readouterr().err)

    after_updates(script, monkeypatch, 1, interrupt)
    with pytest.raises(SystemExit):
        main(script, monkeypatch, f"{TINY[script.__name__]} --run-dir {tmp_path}/run")
    finishing = "finishing this iteration, and an evaluation if one is due, then saving"
    assert seen == [f"{finishing}; again to stop now\n"]


def importing(script, flags: str, **options) -> subprocess.Popen:
    """The script as a user starts it, while it imports."""
    command = [sys.executable, f"{script.__name__}.py", *flags.split()]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )
    maps = Path(f"/proc/{process.pid}/maps")
    wait_for(lambda: process.poll() is not None or "numpy" in maps.read_text())
    return process


def test_ctrl_c_during_the_imports_ends_without_a_traceback(script):
    process = importing(script, "--help")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=HUNG)
    assert process.returncode == -signal.SIGINT and err == ""


@pytest.mark.parametrize("script", ONE)
@pytest.mark.slow
def test_a_shells_background_job_goes_on_after_ctrl_c(script):
    """A shell that runs a script starts `command &` with SIGINT ignored."""
    ignore = functools.partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
    process = importing(script, "--help", preexec_fn=ignore)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=HUNG)
    assert process.returncode == 0 and "--total-timesteps" in out


@pytest.mark.parametrize("script", ONE)
def test_a_resumed_run_says_where_it_goes_on(script, brief_run, monkeypatch, tmp_path, capsys):
    shutil.copytree(brief_run(script, f"{EVALUATED} {HALF[script]}"), tmp_path / "run")
    main(script, monkeypatch, f"--resume {tmp_path}/run --total-timesteps {STEPS[script]}")
    assert f"\ncontinuing at step {HALF_STEPS[script]}\n" in capsys.readouterr().out


def advance_clock(script, monkeypatch) -> None:
    """Each iteration takes a minute, so that each has a line on the screen."""
    now = time.perf_counter
    minutes = itertools.count()
    update = script.LevelSampler.update
    late = [0]

    def slow(*args, **kwargs):
        late[0] = 60 * (1 + next(minutes))
        return update(*args, **kwargs)

    monkeypatch.setattr(script.LevelSampler, "update", slow)
    monkeypatch.setattr(time, "perf_counter", lambda: now() + late[0])


@pytest.mark.parametrize("script", ONE)
def test_an_evaluation_stands_once_in_the_progress_lines(script, monkeypatch, tmp_path, capsys):
    advance_clock(script, monkeypatch)
    flags = f"{TINY[script.__name__]} {EVALUATED} --run-dir {tmp_path}/run"
    main(script, monkeypatch, flags)
    lines = re.findall("step .*", capsys.readouterr().out)
    evaluated = ["evaluation: " in line for line in lines]
    assert evaluated == [False, True] * (STEPS[script] // 96 // 2)


def test_robust_plr_says_why_it_does_not_learn_yet(monkeypatch, tmp_path, capsys):
    script = ppo_robust_plr_minigrid
    advance_clock(script, monkeypatch)
    flags = f"{TINY[script.__name__]} --rho 0.6 --run-dir {tmp_path}/run"
    main(script, monkeypatch, flags)
    lines = re.findall("step .*", capsys.readouterr().out)
    shares = [re.search(r"filling the level buffer: (\d+)% of 60%", line) for line in lines]
    filled = [row["seen_share"] for row in rows(tmp_path / "run/progress.csv")]
    assert len(lines) == len(filled) and filled[0] < 0.6 <= filled[-1]
    for share, fill in zip(shares, filled):
        assert (share and int(share[1])) == (round(100 * fill) if fill < 0.6 else None)


@pytest.mark.parametrize("script", ONE)
def test_a_line_comes_before_a_long_first_iteration_ends(script, monkeypatch, tmp_path, capsys):
    timers = []

    class Soon(threading.Timer):
        def __init__(self, seconds, *args, **kwargs):
            super().__init__(0.0, *args, **kwargs)
            timers.append((seconds, self))

    def listen() -> None:
        for seconds, timer in timers:
            timer.join(60)
        heard.append(capsys.readouterr().out)

    heard = []
    monkeypatch.setattr(threading, "Timer", Soon)
    after_updates(script, monkeypatch, 1, listen)
    flags = f"{TINY[script.__name__]} {HALF[script]} --run-dir {tmp_path}/run"
    main(script, monkeypatch, flags)
    assert "in the first iteration: 24 steps of 4 environments" in heard[0]
    assert all(seconds <= 30 for seconds, _ in timers)
