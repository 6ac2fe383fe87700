"""The sweep launcher, with submitit's local executor and with stand-ins for Slurm's commands; runs that are real."""

import contextlib
import itertools
import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support import ROOT, TINY, assert_same_rows, result_of, rows

import ppo_robust_plr_minigrid as script

sys.path.insert(0, str(ROOT / "benchmarks"))
import launch

COMMAND = f"python {script.__name__}.py {TINY[script.__name__]} --checkpoint-interval 1"


def start(out: Path, *flags: str, command: str = COMMAND, **env: str) -> subprocess.Popen:
    words = [sys.executable, "benchmarks/launch.py", "--out", str(out), "--command", command, *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, cwd=ROOT, env=env, start_new_session=True, **pipes)


def finish(process: subprocess.Popen, status: int = 0) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == status and not err, err
    return out


def wait_for(condition) -> None:
    deadline = time.time() + 120
    while not condition():
        assert time.time() < deadline
        time.sleep(0.005)


def pids(*words: str) -> list[int]:
    """Of the processes that have these words in their command lines."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            if all(word in path.read_bytes().replace(b"\0", b" ").decode() for word in words):
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
    return {cells[0]: cells[1:] for cells in (re.split(r"\s{2,}", line) for line in lines[header + 1 : -1])}


def commands(run_dir: Path) -> list[str]:
    """What was started for a run: "--run-dir" or "--resume", in order."""
    lines = (run_dir / "job.log").read_text().splitlines()
    return [re.search(r"--run-dir|--resume", line)[0] for line in lines if line.startswith("$ ")]


def assert_same_run(run_dir: Path, expected: Path) -> None:
    assert result_of(run_dir)["fingerprint"] == result_of(expected)["fingerprint"]
    assert_same_rows(run_dir / "progress.csv", expected / "progress.csv")


@pytest.fixture
def out(tmp_path):
    yield tmp_path / "sweep"
    kill(*pids(str(tmp_path)))  # after a test that failed


# ---- before anything starts ------------------------------------------------------------------------------------------


def test_a_dry_run_prints_the_commands_and_starts_nothing(out):
    values = ["--values", "env_id=bigfish,starpilot", "anneal-lr=True,False", "--seeds", "3", "1"]
    head = "torchrun --nproc-per-node 2 ppo_plr_procgen.py"
    printed = finish(start(out, *values, "--dry-run", command=f"{head} --num-envs 8")).splitlines()
    expected = []
    for game, anneal, seed in itertools.product(("bigfish", "starpilot"), (True, False), (3, 1)):
        flags = f"--env-id {game} {'--anneal-lr' if anneal else '--no-anneal-lr'} --seed {seed}"
        name = f"env_id={game},anneal_lr={anneal},seed={seed}"
        expected.append(f"{head} --num-envs 8 {flags} --run-dir {out}/{name}")
    assert printed == expected and not out.exists()

    names = [Path(line.split()[-1]).name for line in expected]
    for name, file in zip(names, ("result.json", "checkpoint.pt", "args.json")):
        (out / name).mkdir(parents=True)
        (out / name / file).touch()
    printed = finish(start(out, *values, "--dry-run", command=f"{head} --num-envs 8")).splitlines()
    assert printed[0] == f"# {out}/{names[0]}: finished"
    assert printed[1] == f"{head} --resume {out}/{names[1]}"
    assert printed[2:] == expected[2:]


BAD = {
    "--seeds 1 2 1": "--seeds 1 2 1 must be different numbers",
    "--seeds -1": "--seeds -1 must be different numbers of at least 0",
    "--values env_id": "--values env_id must be NAME=VALUE,VALUE,...",
    "--values env_id=a/b": "--values env_id=a/b must be NAME=VALUE,VALUE,...",
    "--values env_id=": "--values env_id= must be NAME=VALUE,VALUE,...",
    "--values gamma=1,1": "--values gamma=1,1 must name each flag and each value once",
    "--values gamma=1 gamma=0": "--values gamma=0 must name each flag and each value once",
    "--values seed=1,2": "--values seed=1,2 must name each flag and each value once, and leave the seed to --seeds",
    "--values num-envs=4,8": "--command must be without --num-envs",
    "--at-most -1": "--at-most -1 must be at least 0",
    "--max-restarts -1": "--max-restarts -1 must be at least 0",
    "--minutes 0": "--minutes 0 must be at least 1",
    "--executor slurm --minutes 5": "--signal-seconds 300 must be less than --minutes 5",
    "--executor slurm": "--executor slurm must be started where Slurm's sbatch and srun are",
    "--sbatch account=me": "--sbatch account=me must be KEY=VALUE, as in account=me, and with --executor slurm",
    "--executor slurm --sbatch account": "--sbatch account must be KEY=VALUE",
    "--executor condor": "condor",
    "--command python": '--command "python" must start a script that exists',
    "--command python|nothing.py": '--command "python nothing.py" must start a script that exists',
    "--command nothing|ppo_plr_procgen.py": '--command "nothing ppo_plr_procgen.py" must start a script that exists',
    "--command python|'ppo_plr_procgen.py": "must start a script that exists",
    "--command python|ppo_plr_procgen.py|--seed=3": "--command must be without --seed=3",
    "--command python|ppo_plr_procgen.py|--run_dir|x": "--command must be without --run_dir",
}


def refusal(monkeypatch, capsys, *flags: str) -> str:
    monkeypatch.setattr(sys, "argv", ["launch.py", *flags])
    with pytest.raises(SystemExit) as stop:
        launch.main()
    message = capsys.readouterr().err
    assert stop.value.code == 2 and (message.count("\n") == 1 or not message.startswith("error: "))
    return message


@pytest.mark.parametrize("flags", BAD)
def test_bad_flags_are_refused_by_name(flags, out, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    words = [word.replace("|", " ") for word in flags.split()]
    message = refusal(monkeypatch, capsys, "--out", str(out), "--command", COMMAND, *words)
    assert BAD[flags] in message and not out.exists()


def test_a_folder_that_cannot_be_used_is_refused(out, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (tmp_path / "file").touch()
    message = refusal(monkeypatch, capsys, "--out", str(tmp_path / "file"), "--command", COMMAND)
    assert f"--out {tmp_path}/file cannot be written: Not a directory" in message
    (out / "seed=1").mkdir(parents=True)
    (out / "seed=1/job.log").write_text("# python ppo_plr_procgen.py --gamma 0.9 --seed 1\n")
    message = refusal(monkeypatch, capsys, "--out", str(out), "--command", "python ppo_plr_procgen.py")
    assert f"--out {out} must be another folder: in it, seed=1 is 'python ppo_plr_procgen.py --gamma 0.9" in message
    assert [path.name for path in (out / "seed=1").iterdir()] == ["job.log"]


# ---- on this machine -------------------------------------------------------------------------------------------------


def test_a_sweep_runs_to_its_end_and_a_second_launch_starts_nothing(out, finished_run):
    printed = finish(start(out, "--seeds", "1", "2", "--at-most", "2"))
    assert_same_run(out / "seed=1", finished_run(script))
    assert result_of(out / "seed=2")["fingerprint"] != result_of(out / "seed=1")["fingerprint"]
    finished = table(printed)
    assert list(finished) == ["seed=1", "seed=2"] and printed.splitlines()[-1] == "2 finished"
    for name, cells in finished.items():
        last = rows(out / name / "progress.csv")[-1]
        assert cells[:2] == ["finished", "960 of 960"] and int(cells[3]) == int(last["wall_seconds"])
        returns = [row["episodic_return"] for row in rows(out / name / "progress.csv")]
        assert float(cells[2]) == [x for x in returns if x == x][-1]
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert table(finish(start(out, "--seeds", "1", "2", "--at-most", "2"))) == finished
    assert table(finish(start(out, "--table", command=""))) == finished
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}


def test_a_run_killed_with_9_goes_on_to_the_same_end(out, finished_run):
    """First with submitit's processes above it, then alone."""
    launcher, run_dir = start(out), out / "seed=1"
    wait_for((run_dir / "progress.csv").exists)
    kill(*pids("submitit.", str(out)), *pids(f"--run-dir {run_dir}"))
    wait_for(lambda: pids(f"--resume {run_dir}"))
    kill(*pids(f"--resume {run_dir}"))
    printed = finish(launcher)
    assert_same_run(run_dir, finished_run(script))
    assert commands(run_dir) == ["--run-dir", "--resume", "--resume"]
    assert printed.count("seed=1: stopped\n") == 2 and table(printed)["seed=1"][0] == "finished"


def test_a_run_outlives_its_launcher_and_the_next_one_waits_for_it(out, finished_run):
    launcher, run_dir = start(out), out / "seed=1"
    wait_for((run_dir / "progress.csv").exists)
    (training,) = pids(f"--run-dir {run_dir}")
    os.kill(training, signal.SIGSTOP)
    kill(launcher.pid, *pids("submitit.", str(out)))
    launcher.wait()
    second = start(out)
    assert finish(start(out, "--dry-run")) == f"# {run_dir}: running\n"
    os.kill(training, signal.SIGCONT)
    assert table(finish(second))["seed=1"][0] == "finished"
    assert_same_run(run_dir, finished_run(script))
    assert commands(run_dir) == ["--run-dir"]


def test_ctrl_c_stops_a_sweep_with_a_checkpoint_and_the_next_launch_goes_on(out, finished_run):
    command = COMMAND.replace("--checkpoint-interval 1", "--checkpoint-interval 0")
    launcher, run_dir = start(out, "--seeds", "1", "2", command=command), out / "seed=1"
    wait_for((run_dir / "progress.csv").exists)
    os.killpg(launcher.pid, signal.SIGINT)  # as a terminal does
    stopped = table(finish(launcher, 1))
    assert [cells[0] for cells in stopped.values()] == ["stopped", "waiting"]
    checkpoint = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    assert checkpoint["global_step"] == rows(run_dir / "progress.csv")[-1]["global_step"]
    assert not (out / "seed=2/args.json").exists()
    finish(start(out, command=command))
    assert_same_run(run_dir, finished_run(script))
    assert commands(run_dir) == ["--run-dir", "--resume"]


def test_a_run_that_fails_says_why_and_the_next_launch_would_try_it_again(out):
    flags = ["--values", "temperature=-1,hot", "--at-most", "2"]
    why = {name: cells[-1] for name, cells in table(finish(start(out, *flags), 1)).items()}
    assert why["temperature=-1,seed=1"] == "--temperature -1.0 must be above 0."
    assert "--temperature" in why["temperature=hot,seed=1"] and "hot" in why["temperature=hot,seed=1"]
    states = {name: cells[0] for name, cells in table(finish(start(out, "--table", command=""))).items()}
    assert states == dict.fromkeys(why, "failed")
    for line, name in zip(finish(start(out, *flags, "--dry-run")).splitlines(), why, strict=True):
        assert line.startswith("python ") and line.endswith(f"--run-dir {out}/{name}")
        assert commands(out / name) == ["--run-dir"]  # and was not tried twice by this one


@pytest.mark.parametrize("devices", [None, "1,2"])
def test_a_run_that_is_killed_again_and_again_fails_and_sees_the_gpus_that_its_launcher_sees(
    devices, out, tmp_path, monkeypatch
):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    names = "'CUDA_VISIBLE_DEVICES', 'OMP_NUM_THREADS'"
    text = f"import os\nprint([os.environ.get(x) for x in ({names})], flush=True)\nos.kill(os.getpid(), 9)\n"
    (tmp_path / "die.py").write_text(text)
    env = {"CUDA_VISIBLE_DEVICES": devices} if devices else {}
    flags = "--max-restarts", "2", "--cpus", "3"
    printed = finish(start(out, *flags, command=f"python {tmp_path}/die.py", **env), 1)
    assert table(printed)["seed=1"] == ["failed", "it was killed 3 times"]
    assert commands(out / "seed=1") == ["--run-dir"] * 3
    assert (out / "seed=1/job.log").read_text().count(f"{[devices, '3']}\n") == 3


# ---- on Slurm: stand-ins for its commands, which run submitit's batch file and keep a queue of files -----------------

SLURM = {
    "sbatch": """#!{python}
import os, re, subprocess, sys
tasks = re.search(r"--array=0-(\\d+)", open(sys.argv[1]).read())
for i in range(int(tasks[1]) + 1):
    env = os.environ | dict(SLURM_JOB_ID=f"9{{i}}", SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID=str(i))
    open(f"{queue}/7_{{i}}", "w").write("RUNNING")
    loop = f"while bash {{sys.argv[1]}}; rm {queue}.again_7_{{i}}; do true; done; rm {queue}/7_{{i}}"
    subprocess.Popen(["bash", "-c", loop], env=env, stdout=-3, stderr=-3, start_new_session=True)
print("Submitted batch job 7")
""",
    "srun": """#!/bin/bash
while [[ $1 == --* ]]; do if [[ $1 == --output || $1 == --error ]]; then shift; fi; shift; done
exec "$@"
""",
    "squeue": """#!/bin/bash
if [[ $2 == --jobs ]]; then cat {queue}/$3; exit; fi
for file in $(ls {queue}); do echo "$file $(cat {queue}/$file)"; done
""",
    "scontrol": "#!/bin/bash\n[[ $1 == requeue ]] && touch {queue}.again_$2\n",
}


def test_on_slurm_a_preempted_job_requeues_itself_and_a_cancelled_one_does_not(out, finished_run, tmp_path):
    queue, tools = tmp_path / "queue", tmp_path / "bin"
    queue.mkdir()
    tools.mkdir()
    for name, text in SLURM.items():
        (tools / name).write_text(text.format(python=sys.executable, queue=queue))
        (tools / name).chmod(stat.S_IRWXU)
    flags = "--executor slurm --seeds 1 2 --cpus 1 --minutes 9 --at-most 2 --sbatch partition=gpu".split()

    def launched() -> list[str]:
        return [cells[0] for cells in table(finish(start(out, *flags, PATH=f"{tools}:{os.environ['PATH']}"))).values()]

    def job(run_dir: Path) -> int:
        (training,) = pids(f" {run_dir}")
        return int(re.search(r"PPid:\s+(\d+)", Path(f"/proc/{training}/status").read_text())[1])

    assert launched() == ["running", "running"]
    assert launched() == ["running", "running"]
    (batch,) = (path.read_text() for path in out.glob("submitit/*_submission.sh"))
    for line in ("array=0-1%2", "signal=USR1@300", "requeue", "partition=gpu", "cpus-per-task=1", "time=9"):
        assert f"#SBATCH --{line}\n" in batch
    for name, number, state in (("seed=1", signal.SIGUSR1, "RUNNING"), ("seed=2", signal.SIGTERM, "COMPLETING")):
        wait_for((out / name / "progress.csv").exists)
        (queue / f"7_{name == 'seed=2':d}").write_text(state)
        os.kill(job(out / name), number)
    wait_for(lambda: not list(queue.iterdir()))
    assert commands(out / "seed=1") == ["--run-dir", "--resume"]
    assert commands(out / "seed=2") == ["--run-dir"] and not (out / "seed=2/result.json").exists()
    assert_same_run(out / "seed=1", finished_run(script))
    printed = finish(start(out, *flags, "--dry-run")).splitlines()
    assert printed == [f"# {out}/seed=1: finished", f"python {script.__name__}.py --resume {out}/seed=2"]
