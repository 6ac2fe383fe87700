"""Runs in slices: stopped before --minutes are over, packed, unpacked elsewhere."""

import fcntl
import json
import re
import shlex
import shutil
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from support import ROOT, TINY, Process, assert_same_run, files, main, rows

sys.path.insert(0, str(ROOT / "benchmarks"))
import launch
import slices

COMMAND = ["python", "ppo_plr_procgen.py", "--seed", "1"]
# The run is told to stop in its second iteration, as by a signal.
STOP = """
end_iteration = s.Run.end_iteration
def stop(self, envs):
    if self.iteration == 2:
        self.signals.append(2)
    end_iteration(self, envs)
s.Run.end_iteration = stop
"""
# Does to its run directory what the training scripts do, in iterations that sleep. When it goes on
# it has one iteration left.
SLEEPER = """import signal, sys, time
from pathlib import Path
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
run_dir = Path(flags.get("--run-dir") or flags["--resume"])
kind = flags.get("--kind", "resumed")
iterations = {"quick": 2, "quickly": 2, "resumed": 1}.get(kind, 1000)
seconds = 60 if kind == "slow" else 0.3
told = []
signal.signal(signal.SIGINT, lambda *_: told.append(signal.signal(signal.SIGINT, signal.SIG_DFL)))
checkpoint = run_dir / "checkpoint.pt"
if "--run-dir" in flags:
    (run_dir / "args.json").write_text('{"total_timesteps": 1000}')
    (run_dir / "progress.csv").write_text("global_step,episodic_return\\n")
    checkpoint.write_text("0")
first = int(checkpoint.read_text()) + 1
for i in range(first, first + iterations):
    end = time.time() + seconds
    while time.time() < end:
        time.sleep(0.01)
    with open(run_dir / "progress.csv", "a") as progress:
        progress.write(f"{i},0.5\\n")
    if told:
        checkpoint.write_text(str(i))
        sys.exit(130)
(run_dir / "result.json").write_text("{}")
"""


@pytest.fixture
def packs(tmp_path) -> Path:
    folder = tmp_path / "packs"
    folder.mkdir()
    return folder


def refused(capsys, action) -> str:
    with pytest.raises(SystemExit) as stop:
        action()
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.startswith("error: ") and message.count("\n") == 1
    return message


def states_in(printed: str) -> dict[str, str]:
    """Kind of run -> its state in the table."""
    return dict(re.findall(r"^kind=(\w+),seed=1 +(\w+)", printed, re.MULTILINE))


# ---- --minutes -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_three_runs_at_once_stop_with_checkpoints_before_the_minutes_are_over(
    packs, tmp_path, monkeypatch, capsys
):
    """One is finished soon and makes room; another would take a minute for its iteration. Then all
    go on elsewhere."""
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    began = time.time()
    monkeypatch.setattr(launch, "BEGAN", began)
    out = tmp_path / "out"
    kinds = ("kind=quick,endless,slow,next,quickly",)
    command = f"python {tmp_path}/sleeper.py"
    args = launch.Args(out=out, command=command, values=kinds, at_most=3, minutes=0.5, pack=packs)
    assert not launch.sweep(args)
    assert time.time() < began + 30
    printed = capsys.readouterr().out
    states = states_in(printed)
    stopped = dict.fromkeys(("endless", "slow", "next"), "stopped")
    assert states == {"quick": "finished", "quickly": "waiting"} | stopped
    for kind in ("endless", "next"):
        run_dir = out / f"kind={kind},seed=1"
        last = rows(run_dir / "progress.csv")[-1]
        assert (run_dir / "checkpoint.pt").read_text() == f"{last['global_step']:.0f}"
        assert f"kills {run_dir}" not in printed
    # the first checkpoint stays
    assert (out / "kind=slow,seed=1/checkpoint.pt").read_text() == "0"
    assert f"kills {out}/kind=slow,seed=1, which goes on from its last checkpoint\n" in printed

    shutil.move(out, tmp_path / "gone")
    args = launch.Args(out=out, command=command, values=kinds, at_most=3, unpack=packs)
    assert launch.sweep(args)
    printed = capsys.readouterr().out
    assert states_in(printed) == dict.fromkeys(states, "finished")


# ---- --pack and --unpack -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("brief")
def test_a_run_packed_in_the_middle_and_unpacked_elsewhere_ends_as_the_uninterrupted_one(
    script, brief_run, packs, monkeypatch, tmp_path
):
    run_dir = tmp_path / "here/env_id=a,seed=1"
    command = f"{TINY[script.__name__]} --run-dir {run_dir}"
    done = Process(script, command, tmp_path / "printed", STOP).wait()
    assert done.returncode == 130
    (run_dir / "job.log").write_text("# python script.py\n")
    assert slices.pack(packs, [run_dir, tmp_path / "here/never_begun"])
    (path,) = packs.iterdir()
    assert re.fullmatch(r"[A-Za-z0-9._-]+", path.name)
    kept = {"checkpoint.pt", "args.json", "progress.csv", "job.log"}
    before = files(run_dir)
    shutil.rmtree(tmp_path / "here")

    slices.unpack(packs, tmp_path / "there")
    run_dir = tmp_path / "there/env_id=a,seed=1"
    assert files(run_dir) == {name: before[name] for name in kept}
    assert [x.name for x in run_dir.parent.iterdir()] == [run_dir.name]
    assert len(rows(run_dir / "progress.csv")) == 2
    main(script, monkeypatch, f"--resume {run_dir}")
    assert_same_run(run_dir, brief_run(script))


def make_run(run_dir: Path, steps: int, last: str = "") -> Path:
    """The files of a run with a row for each step."""
    run_dir.mkdir(parents=True)
    (run_dir / "job.log").write_text(f"# {shlex.join(COMMAND)}\nprinted\n")
    (run_dir / "checkpoint.pt").write_bytes(bytes(1000))
    rows = [f"{step},{step}.5\n" for step in range(1, steps + 1)]
    (run_dir / "progress.csv").write_text("".join(["global_step,x\n", *rows, last]))
    return run_dir


def test_unpacking_goes_on_with_what_is_there_and_replaces_no_other_run(packs, tmp_path, capsys):
    slices.pack(packs, [make_run(tmp_path / "a/run", 3)])
    begun = make_run(tmp_path / "begun/run", 2)  # an earlier state of the same run
    slices.unpack(packs, begun.parent)
    assert files(begun) == files(tmp_path / "a/run")
    waiting = tmp_path / "waiting/run"
    waiting.mkdir(parents=True)
    (waiting / "job.log").write_text("# another command that has not begun\n")
    slices.unpack(packs, waiting.parent)
    assert files(waiting) == files(tmp_path / "a/run")
    further = make_run(tmp_path / "further/run", 4)
    other = make_run(tmp_path / "other/run", 1, "2,7.5\n")
    for run_dir in (further, other):
        before = files(run_dir)
        if run_dir is other:
            message = refused(capsys, lambda: slices.unpack(packs, other.parent))
            assert f"--unpack {packs} must go on with what is in --out: {other} is" in message
        else:
            slices.unpack(packs, further.parent)
        assert files(run_dir) == before


def test_unpacking_goes_on_with_a_killed_run(packs, tmp_path, capsys):
    """Its last row was made again elsewhere, with another time or another machine's rounding."""
    slices.pack(packs, [make_run(tmp_path / "a/run", 4)])
    killed = make_run(tmp_path / "killed/run", 2, "3,3.75\n")
    torch.save({"global_step": 3}, killed / "checkpoint.pt")
    assert "is another run" in refused(capsys, lambda: slices.unpack(packs, killed.parent))
    torch.save({"global_step": 2}, killed / "checkpoint.pt")
    whole = (killed / "progress.csv").read_text()
    (killed / "progress.csv").write_text(f"{whole}4")  # and half a row
    slices.unpack(packs, killed.parent)
    assert files(killed) == files(tmp_path / "a/run")


def test_a_killed_run_of_another_command_is_not_replaced(packs, tmp_path, capsys):
    slices.pack(packs, [make_run(tmp_path / "a/run", 4)])
    other = make_run(tmp_path / "other/run", 0, "1,9.5\n")
    torch.save({"global_step": 0}, other / "checkpoint.pt")
    (other / "job.log").write_text("# python train.py --learning-rate 9\n")
    assert "is another run" in refused(capsys, lambda: slices.unpack(packs, other.parent))


def test_a_run_that_trains_is_not_replaced(packs, tmp_path, capsys):
    slices.pack(packs, [make_run(tmp_path / "a/run", 3)])
    begun = make_run(tmp_path / "begun/run", 2)
    with open(begun / "job.log") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        assert "is another run" in refused(capsys, lambda: slices.unpack(packs, begun.parent))


def test_a_folder_that_is_not_of_packs_is_refused_and_nothing_is_laid_out(packs, tmp_path, capsys):
    out = tmp_path / "out"
    message = refused(capsys, lambda: slices.unpack(packs, out))
    assert f"--unpack {packs} must be a folder that --pack has filled" in message
    slices.pack(packs, [make_run(tmp_path / "a/run", 3)])
    whole = (packs / "run.zip").read_bytes()
    damaged = packs / "second.zip"
    for content in (whole[:-30], whole[:50] + b"?" + whole[51:], b""):
        damaged.write_bytes(content)
        message = refused(capsys, lambda: slices.unpack(packs, out))
        assert f"{damaged} is not a pack that can be read: " in message
    for names in (["../checkpoint.pt"], ["run/../x.json"], ["run/job.log"], ["run/x.py"], ["x"]):
        with zipfile.ZipFile(damaged, "w") as file:
            for name in names:
                file.writestr(name, "")
        message = refused(capsys, lambda: slices.unpack(packs, out))
        assert f"{damaged} is not a pack that can be read: " in message
    assert not out.exists() and not (tmp_path / "checkpoint.pt").exists()


def test_a_run_that_is_too_large_is_named_and_its_last_pack_stays(
    packs, tmp_path, monkeypatch, capsys
):
    run_dirs = [make_run(tmp_path / "out" / name, 3) for name in ("large", "small")]
    assert slices.pack(packs, run_dirs)
    before = files(packs)
    monkeypatch.setattr(slices, "MAX_BYTES", 20_000)
    (run_dirs[0] / "checkpoint.pt").write_bytes(np.random.default_rng(0).bytes(20_000))
    (run_dirs[1] / "checkpoint.pt").write_bytes(bytes(20_000))  # compressed it is small
    assert not slices.pack(packs, run_dirs)
    (message,) = capsys.readouterr().err.splitlines()
    assert (
        message
        == f"error: --pack {packs} is without large with 0.0 MB: a file has at most 0.02 MB."
    )
    assert files(packs).keys() == before.keys()
    assert files(packs)["large.zip"] == before["large.zip"]
    assert slices.read_pack(packs / "small.zip")[1]["checkpoint.pt"] == bytes(20_000)


def test_no_pack_takes_the_place_of_another_run_or_of_more_steps(packs, tmp_path, capsys):
    slices.pack(packs, [make_run(tmp_path / "a/run", 3)])
    for steps in (3, 4):
        slices.check_packs(packs, {make_run(tmp_path / f"{steps}/run", steps): COMMAND})
    behind = make_run(tmp_path / "2/run", 2)
    message = refused(capsys, lambda: slices.check_packs(packs, {behind: COMMAND}))
    assert f"--pack {packs} has run.zip with 3 steps: first --unpack {packs}." in message
    other = {behind: [*COMMAND, "--hot"]}
    message = refused(capsys, lambda: slices.check_packs(packs, other))
    assert f"--pack {packs} must be another folder: in it, run.zip is '{shlex.join(COMMAND)}'" in (
        message
    )
    taken = tmp_path / "a/run/job.log"
    message = refused(capsys, lambda: slices.check_packs(taken, {behind: COMMAND}))
    assert f"--pack {taken} cannot be written: " in message


def test_the_table_packs_and_unpacks_without_training(packs, tmp_path, monkeypatch, capsys):
    run_dir = make_run(tmp_path / "a/run", 3)
    (run_dir / "args.json").write_text(json.dumps({"total_timesteps": 9}))
    text = (run_dir / "progress.csv").read_text()
    (run_dir / "progress.csv").write_text(text.replace(",x", ",episodic_return"))
    assert launch.sweep(launch.Args(out=run_dir.parent, table=True, pack=packs))
    args = launch.Args(out=tmp_path / "b", table=True, unpack=packs)
    assert launch.sweep(args)
    assert re.search(r"^run +stopped +3 of 9 +3.5$", capsys.readouterr().out, re.MULTILINE)
    assert files(tmp_path / "b/run") == files(run_dir)
