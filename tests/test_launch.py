"""The sweep launcher, here and with stand-ins for Slurm's commands; the runs are real."""

import contextlib
import itertools
import os
import re
import signal
import stat
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import HUNG, ROOT, TINY, assert_same_rows, result_of, rows, wait_for

import ppo_robust_plr_minigrid as script

sys.path.insert(0, str(ROOT / "benchmarks"))
import job
import launch
import slurm

STEPS = re.search(r"--total-timesteps (\d+)", TINY[script.__name__])[1]
COMMAND = f"python {script.__name__}.py {TINY[script.__name__]} --checkpoint-interval 0"
# The script, without an evaluation. Its first start of a run waits in its first iteration until it
# gets a signal, as long as there is a file {hold}: a run is over before a test can send one.
HELD = """import sys, time
from pathlib import Path
sys.path.insert(0, "{root}")
import {name} as s

class Held(s.Run):
    def end_iteration(self, envs):
        while Path("{hold}").exists() and not self.checkpoint and not self.signals:
            time.sleep(0.005)
        super().end_iteration(envs)

s.Run = Held
s.evaluate = lambda *args: {{"solved_mean": 0.0, "episodes": {{}}}}
s.main()
"""


def start(out: Path, *flags: str, command: str = COMMAND, **env: str) -> subprocess.Popen:
    words = [sys.executable, "benchmarks/launch.py", "--out", str(out), "--command", command]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*words, *flags], cwd=ROOT, env=env, start_new_session=True, **pipes)


def finish(process: subprocess.Popen, status: int = 0) -> str:
    out, err = process.communicate(timeout=HUNG)
    assert process.returncode == status and not err, err
    return out


def pids(*words: str) -> list[int]:
    """Of the processes that have these words in their command lines."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            line = path.read_bytes().replace(b"\0", b" ").decode()
            if all(word in line for word in words):
                found.append(int(path.parent.name))
    return found


def kill(*processes: int) -> None:
    for pid in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def table(text: str) -> dict[str, list[str]]:
    """Run -> its other columns, which are separated by two spaces or more."""
    lines = text.splitlines()
    (header,) = [i for i, line in enumerate(lines) if line.startswith("run ")]
    cells = [re.split(r"\s{2,}", line) for line in lines[header + 1 : -1]]
    return {first: others for first, *others in cells}


def states(text: str) -> list[str]:
    return [cells[0] for cells in table(text).values()]


def commands(run_dir: Path) -> list[str]:
    """What was started for a run: "--run-dir" or "--resume", in order."""
    lines = re.findall(r"^\$ .*", (run_dir / "job.log").read_text(), re.MULTILINE)
    return [re.search("--run-dir|--resume", line)[0] for line in lines]


def assert_same_run(run_dir: Path, expected: Path) -> None:
    assert result_of(run_dir)["fingerprint"] == result_of(expected)["fingerprint"]
    assert_same_rows(run_dir / "progress.csv", expected / "progress.csv")


@pytest.fixture
def out(tmp_path):
    yield tmp_path / "sweep"
    kill(*pids(str(tmp_path)))  # after a test that failed


@pytest.fixture
def held(tmp_path):
    """The command whose runs are held, and the file that holds them."""
    hold, path = tmp_path / "hold", tmp_path / f"{script.__name__}.py"
    path.write_text(HELD.format(root=ROOT, name=script.__name__, hold=hold))
    hold.touch()
    return COMMAND.replace(path.name, str(path)), hold


# ---- before anything starts ----------------------------------------------------------------------


def test_a_dry_run_prints_the_commands_and_starts_nothing(out, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    head = "torchrun --nproc-per-node 2 ppo_plr_procgen.py --num-envs 8"
    values = ("env_id=bigfish,starpilot", "anneal-lr=True,False")
    args = launch.Args(out=out, command=head, values=values, seeds=(3, 1), dry_run=True)
    expected = []
    for game, anneal, seed in itertools.product(("bigfish", "starpilot"), (True, False), (3, 1)):
        flags = f"--env-id {game} {'--anneal-lr' if anneal else '--no-anneal-lr'} --seed {seed}"
        name = f"env_id={game},anneal_lr={anneal},seed={seed}"
        expected.append(f"{head} {flags} --run-dir {out}/{name}")
    assert launch.sweep(args) and capsys.readouterr().out.splitlines() == expected
    assert launch.sweep(replace(args, pack=out / "packs", minutes=5))
    assert capsys.readouterr().out.splitlines() == expected
    assert launch.sweep(replace(args, executor="slurm", sbatch=("partition=gpu",)))
    printed = capsys.readouterr().out
    batch = slurm.batch_script(out, [Path(x.split()[-1]).name for x in expected], 0, args.sbatch)
    batch = batch.replace("#SBATCH --array", "#SBATCH --partition=gpu\n#SBATCH --array")
    assert printed == "\n".join(expected) + "\n" + batch
    assert not out.exists()

    names = [Path(line.split()[-1]).name for line in expected]
    for name, file in zip(names, ("result.json", "checkpoint.pt", "args.json")):
        (out / name).mkdir(parents=True)
        (out / name / file).touch()
    launch.sweep(args)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"# {out}/{names[0]}: finished"
    assert printed[1] == head.removesuffix(" --num-envs 8") + f" --resume {out}/{names[1]}"
    assert printed[2:] == expected[2:]


BAD = {
    "--values env_id": "--values env_id must be NAME=VALUE,VALUE,...",
    "--values env_id=a/b": "--values env_id=a/b must be NAME=VALUE,VALUE,...",
    "--values env_id=": "--values env_id= must be NAME=VALUE,VALUE,...",
    "--values gamma=1 gamma=0": "--values gamma=0 must be NAME=VALUE,VALUE,..., each NAME once",
    "--values seed=1,2": "--values seed=1,2 must be NAME=VALUE,VALUE,...",
    "--values num-envs=4,8": "--command must be without --num-envs",
    "--executor slurm": "--executor slurm must be started where Slurm's sbatch and srun are",
    "--sbatch account=me": "--sbatch account=me must be KEY=VALUE, and with --executor slurm",
    "--executor slurm --sbatch account": "--sbatch account must be KEY=VALUE",
    "--minutes 0.4": "--minutes 0.4 must be 0.5 or more, or 0",
    "--minutes nan": "--minutes nan must be 0.5 or more, or 0",
    "--minutes 9 --executor slurm": "--minutes 9 must be 0.5 or more, or 0, as with --executor",
    "--dry-run --unpack packs": "--dry-run must be without --unpack, which lays out files",
    "--unpack packs": "--unpack packs must be a folder that --pack has filled",
    "--pack README.md": "--pack README.md cannot be written: File exists",
    "--executor condor": "condor",
    "--command python": '--command "python" must start a script that exists',
    "--command python|nothing.py": '--command "python nothing.py" must start a script that exists',
    "--command python|ppo_plr_procgen.py|--seed=3": "--command must be without --seed",
    "--command python|ppo_plr_procgen.py|--run_dir|x": "--command must be without --run_dir",
}


def refusal(monkeypatch, capsys, *flags: str) -> str:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["launch.py", *flags])
    with pytest.raises(SystemExit) as stop:
        launch.main()
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert message.count("\n") == 1 or not message.startswith("error: ")
    return message


@pytest.mark.parametrize("flags", BAD)
def test_bad_flags_are_refused_by_name(flags, out, monkeypatch, capsys):
    words = [word.replace("|", " ") for word in flags.split()]
    message = refusal(monkeypatch, capsys, "--out", str(out), "--command", COMMAND, *words)
    assert BAD[flags] in message and not out.exists()


def test_a_folder_with_another_sweep_is_refused(out, monkeypatch, capsys):
    (out / "seed=1").mkdir(parents=True)
    begun = "python ppo_plr_procgen.py --gamma 0.9 --seed 1"
    (out / "seed=1/job.log").write_text(f"# {begun}\n")
    flags = "--out", str(out), "--command", "python ppo_plr_procgen.py"
    message = refusal(monkeypatch, capsys, *flags)
    assert f"--out {out} must be another folder: in it, seed=1 is '{begun}'" in message
    assert [path.name for path in (out / "seed=1").iterdir()] == ["job.log"]


def test_a_failed_command_is_quoted():
    assert job.last_words("steps\nerror: --temperature must be above 0.\n") == (
        "--temperature must be above 0."
    )
    box = "╭─ Error ─╮\n│ Unrecognized options: --hot │\n│ ─── │\n│ For help, -h │\n╰──╯\n"
    assert job.last_words(box) == "Unrecognized options: --hot"
    assert job.last_words("Traceback\n  x\nValueError: no\n\n") == "ValueError: no"
    assert job.last_words("") == "it printed nothing"


# ---- on this machine -----------------------------------------------------------------------------


@pytest.mark.slow
def test_ctrl_c_leaves_a_checkpoint_and_the_same_command_goes_on_to_the_end(
    out, held, finished_run
):
    command, hold = held
    launcher = start(out, "--seeds", "1", "2", command=command)
    run_dir = out / "seed=1"
    wait_for((run_dir / "progress.csv").exists)
    os.killpg(launcher.pid, signal.SIGINT)  # as a terminal does
    assert states(finish(launcher, 1)) == ["stopped", "waiting"]
    checkpoint = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    assert checkpoint["global_step"] == rows(run_dir / "progress.csv")[-1]["global_step"]
    assert not (out / "seed=2/args.json").exists()

    hold.unlink()
    printed = finish(start(out, "--seeds", "1", "2", "--at-most", "2", command=command))
    finished = table(printed)
    assert list(finished) == ["seed=1", "seed=2"] and printed.splitlines()[-1] == "2 finished"
    assert commands(run_dir) == ["--run-dir", "--resume"]
    assert_same_run(run_dir, finished_run(script))
    assert result_of(out / "seed=2")["fingerprint"] != result_of(run_dir)["fingerprint"]
    for name, cells in finished.items():
        returns = [row["episodic_return"] for row in rows(out / name / "progress.csv")]
        assert cells[:2] == ["finished", f"{STEPS} of {STEPS}"]
        assert float(cells[2]) == [x for x in returns if x == x][-1]  # the last that is not nan

    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert table(finish(start(out, "--seeds", "1", "2", command=command))) == finished
    assert table(finish(start(out, "--table", command=""))) == finished
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}


@pytest.mark.slow
def test_a_run_outlives_its_launcher_and_goes_on_after_kill_9(out, held, finished_run):
    command = held[0].replace("interval 0", "interval 1")
    launcher = start(out, command=command)
    run_dir = out / "seed=1"
    wait_for((run_dir / "progress.csv").exists)
    (training,) = pids(f"--run-dir {run_dir}")
    os.kill(training, signal.SIGSTOP)
    kill(launcher.pid, *pids("--work", str(out)))
    launcher.wait()
    assert states(finish(start(out, command=command), 1)) == ["running"]  # it is left alone
    kill(training)
    # from the checkpoint of its start, or of the iteration that it was held in
    assert states(finish(start(out, command=command))) == ["finished"]
    assert commands(run_dir) == ["--run-dir", "--resume"]
    assert_same_run(run_dir, finished_run(script))


def test_a_run_that_fails_says_why_and_the_next_launch_would_try_it_again(out, tmp_path):
    (tmp_path / "die.py").write_text("import os, sys\nos.kill(os.getpid(), int(sys.argv[2]))\n")
    command = f"python {tmp_path}/die.py"
    printed = finish(start(out, "--values", "signal=9,0", "--at-most", "2", command=command), 1)
    failed = table(printed)
    assert failed["signal=9,seed=1"] == ["failed", "ended by SIGKILL"]
    assert failed["signal=0,seed=1"] == ["failed", "it printed nothing"]
    printed = finish(start(out, "--values", "signal=9,0", "--dry-run", command=command))
    for line, name in zip(printed.splitlines(), failed, strict=True):
        assert line.startswith(command) and line.endswith(f"--run-dir {out}/{name}")
        assert commands(out / name) == ["--run-dir"]  # and was not tried twice by the first


@pytest.mark.parametrize("handed_over", [False, True])
def test_a_job_is_put_back_into_the_queue_by_its_own_run_only(handed_over, monkeypatch, tmp_path):
    """Not by those of a launcher that somebody has started inside another job."""
    (tmp_path / "sleeper.py").write_text("import time\ntime.sleep(60)\n")
    (tmp_path / "run").mkdir()
    log = f"# python {tmp_path}/sleeper.py\n" + "slurm job 77_3\n" * handed_over
    (tmp_path / "run/job.log").write_text(log)
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "77")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    requeued = []
    monkeypatch.setattr(slurm, "requeue", lambda: requeued.append(1))
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    handlers = {number: signal.getsignal(number) for number in numbers}
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGUSR1)).start()
    try:
        job.work(tmp_path / "run")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert bool(requeued) == handed_over


# ---- on Slurm: stand-ins for its commands, which run the batch file and keep a queue of files ----

SLURM = {
    "sbatch": """#!{python}
import os, re, subprocess, sys
tasks = re.search(r"--array=0-(\\d+)", open(sys.argv[2]).read())
for i in range(int(tasks[1]) + 1):
    env = os.environ | dict(SLURM_JOB_ID=f"9{{i}}")
    env |= dict(SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID=str(i))
    open(f"{queue}/7_{{i}}", "w").write("RUNNING")
    again = f"rm {queue}.again_7_{{i}}"
    loop = f"while bash {{sys.argv[2]}}; {{again}}; do true; done; rm {queue}/7_{{i}}"
    subprocess.Popen(["bash", "-c", loop], env=env, stdout=-3, stderr=-3, start_new_session=True)
print(7)
""",
    "srun": '#!/bin/bash\nexec "$@"\n',
    "squeue": """#!/bin/bash
if [[ $2 == --jobs ]]; then cat {queue}/$3; exit; fi
for file in $(ls {queue}); do echo "$file $(cat {queue}/$file)"; done
""",
    "scontrol": "#!/bin/bash\n[[ $1 == requeue ]] && touch {queue}.again_$2\n",
}


@pytest.mark.slow
def test_on_slurm_a_preempted_job_requeues_itself_and_a_cancelled_one_does_not(
    out, held, finished_run, tmp_path
):
    command, _ = held
    queue = tmp_path / "queue"
    tools = tmp_path / "bin"
    queue.mkdir()
    tools.mkdir()
    for name, text in SLURM.items():
        (tools / name).write_text(text.format(python=sys.executable, queue=queue))
        (tools / name).chmod(stat.S_IRWXU)
    flags = "--executor slurm --seeds 1 2 --at-most 2 --sbatch partition=gpu time=9".split()
    env = {"PATH": f"{tools}:{os.environ['PATH']}"}
    assert states(finish(start(out, *flags, command=command, **env))) == ["running", "running"]
    assert states(finish(start(out, *flags, command=command, **env))) == [
        "running",
        "running",
    ]  # not twice
    batch = (out / "batch.sh").read_text()
    for option in ("array=0-1%2", "signal=USR1@300", "partition=gpu", "time=9", "requeue"):
        assert batch.count(f"#SBATCH --{option}\n") == 1
    for i, number, state in ((0, signal.SIGUSR1, "RUNNING"), (1, signal.SIGTERM, "COMPLETING")):
        run_dir = out / f"seed={i + 1}"
        wait_for((run_dir / "progress.csv").exists)
        (queue / f"7_{i}").write_text(state)
        (job,) = pids("--work", run_dir.name, str(out))
        os.kill(job, number)
    wait_for(lambda: not list(queue.iterdir()))
    assert commands(out / "seed=1") == ["--run-dir", "--resume"]
    assert commands(out / "seed=2") == ["--run-dir"]
    assert not (out / "seed=2/result.json").exists()
    assert_same_run(out / "seed=1", finished_run(script))
    printed = finish(start(out, *flags, "--dry-run", command=command)).splitlines()
    assert printed[0] == f"# {out}/seed=1: finished"
    assert printed[1] == f"python {tmp_path}/{script.__name__}.py --resume {out}/seed=2"
