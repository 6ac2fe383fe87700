"""Runs a sweep on this machine or on Slurm, and goes on with it: the same command again starts what is left to do.

    python benchmarks/launch.py --out runs/sweep --seeds 1 2 3 --values env_id=bigfish,starpilot curriculum=plr,uniform
        --command "python ppo_plr_procgen.py --total-timesteps 25000000" --dry-run    # prints the 12 commands
    ... --at-most 2 --cpus 1        # instead of --dry-run: here, two at a time with a core each, until all are done
    ... --executor slurm --gpus 1 --cpus 8 --minutes 720 --sbatch partition=gpu       # hands them to Slurm
    python benchmarks/launch.py --out runs/sweep --table                              # what runs, failed, is finished

A run's directory is named after its settings: runs/sweep/env_id=bigfish,curriculum=plr,seed=1. Its files are all that
is remembered: with result.json it is finished, with checkpoint.pt it is continued by --resume, else it starts anew.
job.log has what was started, at which commit and on what machine, and what that printed; it is locked while the run's
processes live.
"""

import contextlib
import csv
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
from typing import Any, Literal, NoReturn

import cloudpickle
import tyro

# What Slurm warns a job with: a signal that the training scripts know, in case that Slurm sends it to them as well.
os.environ.setdefault("SUBMITIT_PREEMPT_SIGNAL", "USR1")
import submitit  # noqa: E402


@dataclass
class Args:
    out: Path  # folder of the sweep: a directory for each run
    command: str = ""  # the training command, without the flags that vary
    seeds: tuple[int, ...] = (1,)  # every combination of the values runs with each of them
    values: tuple[str, ...] = ()  # NAME=VALUE,VALUE,... for each flag that varies; True, False: --NAME, --no-NAME
    executor: Literal["local", "slurm"] = "local"  # where: on this machine, or as a Slurm job array
    at_most: int = 0  # runs at the same time (0: one on this machine, any number on Slurm)
    cpus: int = 0  # CPU cores for each run, also its OMP_NUM_THREADS (0: not set)
    gpus: int = 0  # Slurm: GPUs for each run. On this machine, every run sees all of them
    minutes: int = 1440  # Slurm: time limit of a job; a run that takes longer goes on in the next one
    signal_seconds: int = 300  # Slurm: warn a job so long before its limit; the run needs to end its iteration in time
    sbatch: tuple[str, ...] = ()  # Slurm: KEY=VALUE, any option of sbatch, such as partition=gpu account=me mem=32G
    max_restarts: int = 3  # on this machine: continue a run that was killed so many times
    dry_run: bool = False  # only print the commands
    table: bool = False  # only print the table of what is in --out


def refuse(reason: str) -> NoReturn:
    print(f"error: {reason}", file=sys.stderr)
    raise SystemExit(2)


# ---- a run's directory -----------------------------------------------------------------------------------------------


def is_running(run_dir: Path) -> bool:
    """Whether job.log is locked. Never on a file system without locks: there, Slurm's queue has to do."""
    try:
        with open(run_dir / "job.log") as log:
            fcntl.flock(log, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return isinstance(error, BlockingIOError)
    return False


def read_log(run_dir: Path) -> str:
    return (run_dir / "job.log").read_text(errors="replace") if (run_dir / "job.log").exists() else ""


def append(run_dir: Path, line: str) -> None:
    with open(run_dir / "job.log", "a") as log:
        log.write(f"{line}\n")


def last_words(output: str) -> str:
    """Why a command failed: what it says after "error: ", or in tyro's box, or in its last line."""
    errors = re.findall(r"^error: (.+)", output, re.MULTILINE)
    boxes = [re.sub(r"\s*│\s*", " ", box).strip() for box in re.findall(r"╭.*\n((?:│ [^─].*\n)+)", output)]
    lines = re.findall(r"^.*\w.*", output, re.MULTILINE)
    return (errors or boxes or lines or ["it printed nothing"])[-1]


def commit_and_machine(script: Path) -> str:
    """For job.log. A commit ends in "+changes" if the script or the sampler beside it differs from it."""

    def output_of(*command: str) -> str:
        if shutil.which(command[0]) is None:
            return ""
        return subprocess.run(command, cwd=script.parent, capture_output=True, text=True).stdout.strip()

    commit = output_of("git", "rev-parse", "--short=7", "HEAD") or "unknown"
    if output_of("git", "status", "--porcelain", "--", script.name, "plr_sampler.py"):
        commit += "+changes"
    cores, info = len(os.sched_getaffinity(0)), Path("/proc/cpuinfo").read_text()
    cpu = (re.search(r"^model name\s*: (.+)", info, re.MULTILINE) or [0, "unknown CPU"])[1]
    gpus = Counter(output_of("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines())
    names = [f"{count} {name}" for name, count in gpus.items()]
    return f"commit {commit} on {cpu}, {cores} cores, {' and '.join(names) or 'no GPU'}"


def look(run_dir: Path, queue: dict[str, str]) -> dict[str, str]:
    """A run's row of the table. `queue` is Slurm's."""
    row = dict.fromkeys(("run", "state", "steps", "return", "seconds", "why"), "") | {"run": run_dir.name}
    log = read_log(run_dir)
    slurm_ids = re.findall(r"^slurm job (\S+)$", log, re.MULTILINE)
    failed = re.search(r"^failed: (.+)\n(slurm job .+\n)*\Z", log, re.MULTILINE)  # its last words
    if (run_dir / "result.json").exists():
        row["state"] = "finished"
    elif slurm_ids and slurm_ids[-1] in queue:
        row["state"] = queue[slurm_ids[-1]].lower()
    elif is_running(run_dir):
        row["state"] = "running"
    elif failed:
        row |= {"state": "failed", "why": failed[1]}
    else:
        row["state"] = "stopped" if (run_dir / "checkpoint.pt").exists() else "waiting"
    if (run_dir / "progress.csv").exists():
        with open(run_dir / "progress.csv") as file:
            rows = [x for x in csv.DictReader(file) if None not in x.values()]  # the last one may be half written
        if rows:
            total = json.loads((run_dir / "args.json").read_text())["total_timesteps"]
            row["steps"] = f"{int(rows[-1]['global_step']):,} of {total:,}"
            row["seconds"] = rows[-1]["wall_seconds"].split(".")[0]
            row["return"] = next((x["episodic_return"] for x in rows[::-1] if x["episodic_return"] != "nan"), "")
    return row


def print_table(rows: list[dict[str, str]]) -> None:
    columns = [[key, *(row[key] for row in rows)] for key in (rows[0] if rows else ())]
    for line in zip(*([x.ljust(max(map(len, column))) for x in column] for column in columns)):
        print("  ".join(line).rstrip())
    print(", ".join(f"{n} {state}" for state, n in Counter(row["state"] for row in rows).items()) or "no runs")


# ---- a job: one run, on this machine or on a node --------------------------------------------------------------------


@dataclass(eq=False)
class Job(submitit.helpers.Checkpointable):  # requeued as it is; then it finds the run's checkpoint
    run_dir: Path
    start: list[str]  # the command, without --run-dir
    script: list[str]  # its beginning, up to the script
    env: dict[str, str | None]  # what else is set, or not set, for the command

    def command(self) -> list[str]:
        if (self.run_dir / "checkpoint.pt").exists():
            return [*self.script, "--resume", str(self.run_dir)]
        return [*self.start, "--run-dir", str(self.run_dir)]

    def __call__(self) -> None:
        """submitit calls this. Runs the command to its end, or until this process is told to stop."""
        warning = getattr(signal, f"SIG{submitit.JobEnvironment.USR_SIG}")
        requeue = signal.getsignal(warning)  # submitit's handler: has Slurm start this job again later, and exits
        log = open(self.run_dir / "job.log", "ab", buffering=0)
        with contextlib.suppress(OSError):
            fcntl.flock(log, fcntl.LOCK_EX)  # waits, should another job have this run
        if (self.run_dir / "result.json").exists():
            return
        where = commit_and_machine(Path(self.script[-1]))
        log.write(f"\n# {where}\n$ {shlex.join(self.command())}\n".encode())
        process, received = None, []

        def forward(number: int, _: Any) -> None:
            received.append(number)
            if process and len(received) == 1:  # to the scripts, a second one means: at once, without a checkpoint
                process.terminate()  # by SIGTERM, which torchrun passes on, unlike SIGUSR1

        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, forward)
        command = [sys.executable if word == "python" else word for word in self.command()]
        env = {key: value for key, value in (os.environ | self.env).items() if value is not None}
        # In a session of its own it gets no signals but ours. The lock goes with the log: it lasts as long as this
        # process and its children, even if the one here is killed.
        process = subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)
        if received:
            process.terminate()
        code = process.wait()
        log.close()

        slurm = os.environ["SUBMITIT_EXECUTOR"] == "slurm"  # on this machine, run_here goes on with what was killed
        if (self.run_dir / "result.json").exists() or (code <= 0 and not slurm):
            return
        if not received:
            output = read_log(self.run_dir).rpartition("\n$ ")[2].partition("\n")[2]
            why = last_words(output) if code > 0 else f"ended by {signal.Signals(-code).name if code else 'a signal'}"
            append(self.run_dir, f"\nfailed: {why}")
            sys.exit(why)
        # After scancel, or if Slurm requeues what it preempts by itself, the job's state is COMPLETING by now.
        job_id = submitit.JobEnvironment().job_id
        if slurm and b"RUNNING" in subprocess.check_output(["squeue", "-h", "--jobs", job_id, "--format=%T"]):
            requeue(warning, None)


# ---- the sweep -------------------------------------------------------------------------------------------------------


def plan(args: Args) -> list[Job]:
    """The runs of the sweep. Refuses what cannot work, with one sentence and exit status 2."""
    least = {"at_most": 0, "gpus": 0, "cpus": 0, "minutes": 1, "signal_seconds": 1, "max_restarts": 0}
    for name in least:
        if getattr(args, name) < least[name]:
            refuse(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least {least[name]}.")
    if args.executor == "slurm" and args.signal_seconds >= 60 * args.minutes:
        refuse(f"--signal-seconds {args.signal_seconds} must be less than --minutes {args.minutes}.")
    for option in args.sbatch:
        if args.executor == "local" or not re.fullmatch(r"[\w-]+=.+", option):
            refuse(f"--sbatch {option} must be KEY=VALUE, as in account=me, and with --executor slurm.")
    if not args.seeds or min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds):
        refuse(f"--seeds {' '.join(map(str, args.seeds))} must be different numbers of at least 0.")
    values = {}
    for word in args.values:
        name, options = word.partition("=")[0].replace("-", "_"), word.partition("=")[2].split(",")
        if name == "seed" or name in values or len(set(options)) < len(options):
            refuse(f"--values {word} must name each flag and each value once, and leave the seed to --seeds.")
        if not re.fullmatch(r"[\w-]+=[^,/\s]+(,[^,/\s]+)*", word):
            refuse(f"--values {word} must be NAME=VALUE,VALUE,... without spaces and slashes, as in env_id=maze,miner.")
        values[name] = options
    try:
        words = shlex.split(args.command)
    except ValueError:  # a quotation mark too few
        words = []
    script = [i for i, word in enumerate(words) if word.endswith(".py")][:1]
    if not script or not Path(words[script[0]]).is_file() or not shutil.which(words[0]):
        refuse(f'--command "{args.command}" must start a script that exists, as in "python ppo_plr_procgen.py".')
    for word in words[script[0] + 1 :]:
        name = word.split("=")[0].removeprefix("--no-").removeprefix("--").replace("-", "_")
        if word.startswith("--") and name in {"seed", "run_dir", "resume", "evaluate", *values}:
            refuse(f"--command must be without {word}: it is set from --out, --seeds and --values.")

    jobs = []
    for chosen in itertools.product(*values.values(), map(str, args.seeds)):
        settings, start = dict(zip([*values, "seed"], chosen)), list(words)
        for name, value in settings.items():
            flag = name.replace("_", "-")
            start += {"True": [f"--{flag}"], "False": [f"--no-{flag}"]}.get(value, [f"--{flag}", value])
        run_dir = args.out / ",".join(f"{name}={value}" for name, value in settings.items())
        env: dict[str, str | None] = {"OMP_NUM_THREADS": str(args.cpus)} if args.cpus else {}
        if args.executor == "local":  # where submitit would hide the GPUs
            env["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES")
        jobs.append(Job(run_dir, start, words[: script[0] + 1], env))
        begun = read_log(run_dir)
        if begun and not begun.startswith(f"# {shlex.join(start)}\n"):
            refuse(f"--out {args.out} must be another folder: in it, {run_dir.name} is {begun[2:].splitlines()[0]!r}.")
    return jobs


def slurm_queue() -> dict[str, str]:
    """This user's jobs in Slurm's queue: id -> state."""
    if shutil.which("squeue") is None:
        return {}
    command = ["squeue", "--noheader", "--array", "--user", getpass.getuser(), "--format=%i %T"]
    return dict(line.split() for line in subprocess.check_output(command, text=True).splitlines())


def submit(args: Args, jobs: list[Job]) -> None:
    """Hands the jobs to Slurm, as an array."""
    executor = submitit.SlurmExecutor(args.out / "submitit", max_num_timeout=10**6)
    executor.update_parameters(
        job_name=args.out.name, time=args.minutes, signal_delay_s=args.signal_seconds,
        array_parallelism=args.at_most or len(jobs), gpus_per_node=args.gpus or None, cpus_per_task=args.cpus or None,
        srun_args=[f"--cpus-per-task={args.cpus}"] if args.cpus else None,  # not inherited since Slurm 22.05
        additional_parameters={"requeue": True} | dict(option.split("=", 1) for option in args.sbatch),
    )  # fmt: skip
    for job, handle in zip(jobs, executor.submit_array(jobs)):
        append(job.run_dir, f"slurm job {handle.job_id}")


def run_here(args: Args, waiting: list[Job], running: dict[Job, Any]) -> None:
    """Runs what waits on this machine until each is finished or has failed, and goes on with those that were killed.
    What runs already was started by another launch.py."""
    executor, restarts = submitit.LocalExecutor(args.out / "submitit"), Counter()
    executor.update_parameters(timeout_min=10**6)

    def lives(job: Job) -> bool:
        return bool(running[job] and not running[job].done()) or is_running(job.run_dir)

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # means the same as Ctrl-C
    try:
        while waiting or running:
            for job in [job for job in running if not lives(job)]:
                del running[job]
                state = look(job.run_dir, {})["state"]
                print(f"{job.run_dir.name}: {state}", flush=True)
                restarts[job] += state in ("stopped", "waiting")  # killed
                if restarts[job] > args.max_restarts:
                    append(job.run_dir, f"\nfailed: it was killed {restarts[job]} times")
                elif state in ("stopped", "waiting"):
                    waiting.insert(0, job)
            while waiting and len(running) < (args.at_most or 1):
                job = waiting.pop(0)
                print(shlex.join(job.command()), flush=True)
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # submitit's processes leave Ctrl-C to this one
                running[job] = executor.submit(job)
                signal.signal(signal.SIGINT, signal.default_int_handler)
            time.sleep(0.2)
    except KeyboardInterrupt:
        print("Stopping what was started here: each run ends its iteration and writes its checkpoint.", flush=True)
        running = {job: handle for job, handle in running.items() if handle}
        for handle in running.values():
            if not handle.done():
                os.kill(int(handle.job_id), signal.SIGTERM)  # submitit's process passes it on to the job
        while any(map(lives, running)):
            time.sleep(0.2)


def sweep(args: Args) -> bool:
    """All that this command does. False if runs on this machine are left that have failed or were stopped."""
    if __name__ != "__main__":  # for reproduce_*.py: submitit's processes could not import this module
        cloudpickle.register_pickle_by_value(sys.modules[__name__])
    if args.table:
        queue = slurm_queue()
        print_table([look(path.parent, queue) for path in sorted(args.out.glob("*/job.log"))])
        return True
    jobs = plan(args)
    queue = slurm_queue() if args.executor == "slurm" else {}
    states = {job: look(job.run_dir, queue)["state"] for job in jobs}
    idle = [job for job in jobs if states[job] in ("waiting", "stopped", "failed")]
    if args.dry_run:
        for job in jobs:
            print(shlex.join(job.command()) if job in idle else f"# {job.run_dir}: {states[job]}")
        return True
    if args.executor == "slurm" and not (shutil.which("sbatch") and shutil.which("srun")):
        refuse("--executor slurm must be started where Slurm's sbatch and srun are.")
    try:
        for job in idle:
            job.run_dir.mkdir(parents=True, exist_ok=True)
            if not (job.run_dir / "job.log").exists():
                append(job.run_dir, f"# {shlex.join(job.start)}")
    except OSError as error:
        refuse(f"--out {args.out} cannot be written: {error.strerror}.")
    if args.executor == "local":
        run_here(args, idle, {job: None for job in jobs if states[job] == "running"})
    elif idle:
        submit(args, idle)
        queue = slurm_queue()
    rows = [look(job.run_dir, queue) for job in jobs]
    print_table(rows)
    return args.executor == "slurm" or all(row["state"] == "finished" for row in rows)


def main() -> None:
    if not sweep(tyro.cli(Args)):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
