"""Runs a sweep on this machine or on Slurm; the same command again does what is left to do.

    python benchmarks/launch.py --out runs/sweep --seeds 1 2 3
        --values env_id=bigfish,starpilot curriculum=plr,uniform
        --command "python ppo_plr_procgen.py --total-timesteps 25000000" --dry-run   # 12 commands
    OMP_NUM_THREADS=1 ... --at-most 2       # instead of --dry-run: here, two at a time
    ... --executor slurm --sbatch time=12:00:00 gpus-per-node=1 cpus-per-task=8 partition=gpu
    python benchmarks/launch.py --out runs/sweep --table    # what runs, failed, is finished

A run's directory is named after its settings: runs/sweep/env_id=bigfish,curriculum=plr,seed=1. Its
files are all that is remembered: with result.json it is finished, with checkpoint.pt it is
continued by --resume, else it starts anew. job.log begins with the command, and has each start of
it: commit, machine, what was printed. It is locked while the run's processes live.
"""

import contextlib
import fcntl
import getpass
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from common import commit_and_machine, read_csv, read_text, refuse

# A job array with an element for each run. Slurm signals a job before its time is over; `work` then
# has the training write its checkpoint and puts the job back into the queue.
SBATCH = {"time": "24:00:00", "signal": "USR1@300", "open-mode": "append"}
BATCH = """\
#!/bin/bash
#SBATCH --requeue
{options}
trap : TERM  # a job that is ended waits for its checkpoint
export SRUN_CPUS_PER_TASK=${{SLURM_CPUS_PER_TASK:-1}}
runs=({runs})
srun {launch} --work "${{runs[$SLURM_ARRAY_TASK_ID]}}"
"""


@dataclass
class Args:
    out: Path  # folder of the sweep: a directory for each run
    command: str = ""  # the training command, without the flags that vary
    seeds: tuple[int, ...] = (1,)  # every combination of the values runs with each of them
    values: tuple[str, ...] = ()  # NAME=VALUE,VALUE,... that vary; True, False: --NAME, --no-NAME
    executor: Literal["local", "slurm"] = "local"  # on this machine, or as a Slurm job array
    at_most: int = 0  # runs at the same time (0: one on this machine, any number on Slurm)
    sbatch: tuple[str, ...] = ()  # KEY=VALUE, options of Slurm's sbatch, as in partition=gpu
    dry_run: bool = False  # only print the commands
    table: bool = False  # only print the table of what is in --out
    work: str = ""  # train the run of this name: what a job calls, not a user


# ---- a run's directory ---------------------------------------------------------------------------


def is_running(run_dir: Path) -> bool:
    """Whether job.log is locked. Never on a file system without locks: Slurm's queue has to do."""
    try:
        with open(run_dir / "job.log") as log:
            fcntl.flock(log, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return isinstance(error, BlockingIOError)
    return False


def append(run_dir: Path, line: str) -> None:
    with open(run_dir / "job.log", "a") as log:
        log.write(f"{line}\n")


def command_of(run_dir: Path, start: list[str]) -> list[str]:
    """What starts the run, or goes on with it; `start`: its first command, without --run-dir."""
    if (run_dir / "checkpoint.pt").exists():
        script = [word.endswith(".py") for word in start].index(True)
        return [*start[: script + 1], "--resume", str(run_dir)]
    return [*start, "--run-dir", str(run_dir)]


def look(run_dir: Path, queue: dict[str, str]) -> dict[str, str]:
    """A run's row of the table. `queue` is Slurm's."""
    log = read_text(run_dir / "job.log")
    jobs = re.findall(r"^slurm job (\S+)$", log, re.MULTILINE)
    failed = re.search(r"^failed: (.+)\n(slurm job .+\n)*\Z", log, re.MULTILINE)  # its last words
    state = "stopped" if (run_dir / "checkpoint.pt").exists() else "waiting"
    if (run_dir / "result.json").exists():
        state = "finished"
    elif jobs and jobs[-1] in queue:
        state = queue[jobs[-1]].lower()
    elif is_running(run_dir):
        state = "running"
    elif failed:
        state = "failed"
    steps = last_return = ""
    progress = read_csv(run_dir / "progress.csv")
    if progress:
        total = json.loads((run_dir / "args.json").read_text())["total_timesteps"]
        steps = f"{int(progress[-1]['global_step']):,} of {total:,}"
        returns = [row["episodic_return"] for row in progress]
        last_return = next((x for x in reversed(returns) if x != "nan"), "")
    why = failed[1] if state == "failed" else ""
    return {"run": run_dir.name, "state": state, "steps": steps, "return": last_return, "why": why}


def print_table(rows: list[dict[str, str]]) -> None:
    lines = [list(rows[0]), *(list(row.values()) for row in rows)] if rows else []
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  ".join(x.ljust(width) for x, width in zip(line, widths)).rstrip())
    states = Counter(row["state"] for row in rows)
    print(", ".join(f"{n} {state}" for state, n in states.items()) or "no runs")


# ---- a job: one run, on this machine or on a node ------------------------------------------------


def last_words(output: str) -> str:
    """Why a command failed: what follows "error: ", or is first in tyro's box, or its last line."""
    said = re.findall(r"^error: (.+)", output, re.MULTILINE)
    boxed = re.findall(r"╭.*\n│ (.+?) *│", output)
    return (said or boxed or re.findall(r".*\w.*", output) or ["it printed nothing"])[-1]


def work(run_dir: Path) -> None:
    """Trains to the run's end, or until this process is told to stop."""
    received: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, _: received.append(number))
    # The lock goes with the log, which the training inherits: it lasts as long as that lives.
    log = open(run_dir / "job.log", "ab", buffering=0)
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(log, fcntl.LOCK_EX)  # waits, should another job have this run
    if (run_dir / "result.json").exists():
        return
    start = shlex.split(read_text(run_dir / "job.log").partition("\n")[0])[1:]  # after "#"
    command = command_of(run_dir, start)
    script = next(word for word in command if word.endswith(".py"))
    log.write(f"\n# {commit_and_machine(Path(script))}\n$ {shlex.join(command)}\n".encode())
    command = [sys.executable if word == "python" else word for word in command]
    process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    told = False
    while process.poll() is None:
        # Once, and by a signal that Slurm does not send: to the scripts, a second one of the same
        # kind means at once, without a checkpoint. torchrun passes on SIGINT, unlike SIGUSR1.
        if received and not told:
            process.send_signal(signal.SIGINT)
            told = True
        time.sleep(0.1)
    log.close()
    if (run_dir / "result.json").exists():
        return
    if received and "SLURM_JOB_ID" in os.environ:
        job = "{SLURM_ARRAY_JOB_ID}_{SLURM_ARRAY_TASK_ID}".format(**os.environ)
        state = subprocess.check_output(["squeue", "-h", "--jobs", job, "--format=%T"], text=True)
        # After scancel, or where Slurm requeues what it preempts, the state is COMPLETING by now.
        if state.strip() == "RUNNING":
            subprocess.run(["scontrol", "requeue", job], check=True)
    elif not received:
        output = read_text(run_dir / "job.log").rpartition("\n$ ")[2].partition("\n")[2]
        code = process.returncode
        why = last_words(output) if code >= 0 else f"ended by {signal.Signals(-code).name}"
        append(run_dir, f"\nfailed: {why}")


# ---- the sweep -----------------------------------------------------------------------------------


def plan(args: Args) -> dict[Path, list[str]]:
    """Run directory -> command, without --run-dir. Refuses what cannot work, with one sentence."""
    for option in args.sbatch:
        if args.executor == "local" or not re.fullmatch(r"[\w-]+=.+", option):
            refuse(f"--sbatch {option} must be KEY=VALUE, and with --executor slurm.")
    taken = {"run_dir", "resume", "evaluate", "seed"}
    values: dict[str, list[str]] = {}
    for word in args.values:
        name = word.partition("=")[0].replace("-", "_")
        if name in taken or not re.fullmatch(r"[\w-]+=[^,/\s]+(,[^,/\s]+)*", word):
            refuse(f"--values {word} must be NAME=VALUE,VALUE,..., each NAME once, none the seed.")
        values[name] = word.partition("=")[2].split(",")
        taken.add(name)
    words = shlex.split(args.command)
    scripts = [word for word in words if word.endswith(".py")]
    if not scripts or not Path(scripts[0]).is_file():
        refuse(f'--command "{args.command}" must start a script that exists.')
    for flag in re.findall(r"--(?:no-)?([\w-]+)", args.command):
        if flag.replace("-", "_") in taken:
            refuse(f"--command must be without --{flag}: --out, --seeds and --values set it.")

    runs: dict[Path, list[str]] = {}
    for chosen in itertools.product(*values.values(), map(str, args.seeds)):
        settings = dict(zip([*values, "seed"], chosen))
        start = list(words)
        for name, value in settings.items():
            flag = name.replace("_", "-")
            switches = {"True": [f"--{flag}"], "False": [f"--no-{flag}"]}
            start += switches.get(value, [f"--{flag}", value])
        run_dir = args.out / ",".join(f"{name}={value}" for name, value in settings.items())
        begun = read_text(run_dir / "job.log").partition("\n")[0].removeprefix("# ")
        if begun and begun != shlex.join(start):
            refuse(f"--out {args.out} must be another folder: in it, {run_dir.name} is {begun!r}.")
        runs[run_dir] = start
    return runs


def slurm_queue() -> dict[str, str]:
    """This user's jobs in Slurm's queue: id -> state."""
    if shutil.which("squeue") is None:
        return {}
    command = ["squeue", "--noheader", "--array", "--user", getpass.getuser(), "--format=%i %T"]
    lines = subprocess.check_output(command, text=True).splitlines()
    return dict(line.split() for line in lines)


def submit(args: Args, idle: list[Path]) -> None:
    """Hands the runs to Slurm, as one job array."""
    options = SBATCH | {"job-name": args.out.name, "output": f"{args.out}/slurm_%A_%a.log"}
    options |= dict(option.split("=", 1) for option in args.sbatch)
    options["array"] = f"0-{len(idle) - 1}" + (f"%{args.at_most}" if args.at_most else "")
    text = BATCH.format(
        options="\n".join(f"#SBATCH --{name}={value}" for name, value in options.items()),
        runs=shlex.join(run_dir.name for run_dir in idle),
        launch=shlex.join([sys.executable, str(Path(__file__).resolve()), "--out", str(args.out)]),
    )
    batch = args.out / "batch.sh"
    batch.write_text(text)
    printed = subprocess.check_output(["sbatch", "--parsable", str(batch)], text=True)
    array = printed.strip().partition(";")[0]
    for i, run_dir in enumerate(idle):
        append(run_dir, f"slurm job {array}_{i}")


def run_here(args: Args, idle: list[Path]) -> None:
    """Runs them on this machine, until each has ended. A session of their own keeps Ctrl-C from
    them, which this process passes on, and lets them outlive it."""
    running: list[subprocess.Popen] = []
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # means the same as Ctrl-C
    try:
        while idle or running:
            running = [job for job in running if job.poll() is None]
            while idle and len(running) < max(args.at_most, 1):
                run_dir = idle.pop(0)
                print(f"starts {run_dir}", flush=True)
                command = [sys.executable, __file__, "--out", str(args.out), "--work", run_dir.name]
                running.append(subprocess.Popen(command, start_new_session=True))
            time.sleep(0.2)
    except KeyboardInterrupt:
        print("Stopping what was started here: each run writes its checkpoint.", flush=True)
        for job in running:
            job.terminate()
        for job in running:
            job.wait()


def sweep(args: Args) -> bool:
    """All that this command does. False if runs on this machine are not finished after it."""
    queue = slurm_queue()
    if args.table:
        print_table([look(log.parent, queue) for log in sorted(args.out.glob("*/job.log"))])
        return True
    runs = plan(args)
    states = {run_dir: look(run_dir, queue)["state"] for run_dir in runs}
    idle = [x for x in runs if states[x] in ("waiting", "stopped", "failed")]
    if args.dry_run:
        for run_dir, start in runs.items():
            command = shlex.join(command_of(run_dir, start))
            print(command if run_dir in idle else f"# {run_dir}: {states[run_dir]}")
        return True
    if args.executor == "slurm" and not (shutil.which("sbatch") and shutil.which("srun")):
        refuse("--executor slurm must be started where Slurm's sbatch and srun are.")
    for run_dir in idle:
        run_dir.mkdir(parents=True, exist_ok=True)
        if not read_text(run_dir / "job.log"):
            append(run_dir, f"# {shlex.join(runs[run_dir])}")
    if args.executor == "local":
        run_here(args, idle)
    elif idle:
        submit(args, idle)
        queue = slurm_queue()
    rows = [look(run_dir, queue) for run_dir in runs]
    print_table(rows)
    return args.executor == "slurm" or all(row["state"] == "finished" for row in rows)


def main() -> None:
    args = tyro.cli(Args)
    if args.work:
        work(args.out / args.work)
    elif not sweep(args):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
