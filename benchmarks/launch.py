"""Runs a sweep on this machine or on Slurm; the same command again does what is left to do.

    python benchmarks/launch.py --out runs/sweep --seeds 1 2 3
        --values env_id=bigfish,starpilot curriculum=plr,uniform
        --command "python ppo_plr_procgen.py --total-timesteps 25000000" --dry-run   # 12 commands
    OMP_NUM_THREADS=1 ... --at-most 2       # instead of --dry-run: here, two at a time
    ... --at-most 2 --minutes 12 --pack packs       # the same for 12 minutes; a file for each run
    ... --at-most 2 --minutes 12 --unpack packs     # goes on with those, on this or another machine
    ... --executor slurm --sbatch time=12:00:00 gpus-per-node=1 cpus-per-task=8 partition=gpu
    python benchmarks/launch.py --out runs/sweep --table    # what runs, failed, is finished

A run's directory is named after its settings: runs/sweep/env_id=bigfish,curriculum=plr,seed=1. Its
files are all that is remembered: with result.json it is finished, with checkpoint.pt it is
continued by --resume, else it starts anew. job.log begins with the command, and has each start of
it: commit, machine, what was printed. It is locked while the run's processes live.
"""

import contextlib
import itertools
import math
import re
import shlex
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import slices
import slurm
import tyro
from common import read_text, refuse
from job import Job, append, command_begun, command_of, look, print_table, work

BEGAN = time.time()  # --minutes count from here
SPARE_SECONDS = 10  # of --minutes, for what follows when all runs have stopped


@dataclass
class Args:
    out: Path  # folder of the sweep: a directory for each run
    command: str = ""  # the training command, without the flags that vary
    seeds: tuple[int, ...] = (1,)  # every combination of the values runs with each of them
    values: tuple[str, ...] = ()  # NAME=VALUE,VALUE,... that vary; True, False: --NAME, --no-NAME
    executor: Literal["local", "slurm"] = "local"  # on this machine, or as a Slurm job array
    at_most: int = 0  # runs at the same time (0: one on this machine, any number on Slurm)
    minutes: float = 0  # stop before so many are over, with checkpoints (0: when all have ended)
    unpack: Path | None = None  # first lay out the runs of this folder, which --pack has made
    pack: Path | None = None  # at last leave a file of at most 16 MB there for each run in --out
    sbatch: tuple[str, ...] = ()  # KEY=VALUE, options of Slurm's sbatch, as in partition=gpu
    dry_run: bool = False  # only print the commands, and for Slurm the batch script
    table: bool = False  # train nothing: print the table of what is in --out
    work: str = ""  # train the run of this name: what a job calls, not a user


def plan(args: Args) -> dict[Path, list[str]]:
    """Run directory -> command, without --run-dir. Refuses what cannot work, with one sentence."""
    for option in args.sbatch:
        if args.executor == "local" or not re.fullmatch(r"[\w-]+=.+", option):
            refuse(f"--sbatch {option} must be KEY=VALUE, and with --executor slurm.")
    if args.minutes and not (0.5 <= args.minutes < math.inf and args.executor == "local"):
        refuse(f"--minutes {args.minutes:g} must be 0.5 or more, or 0, as with --executor slurm.")
    if args.dry_run and args.unpack:
        refuse("--dry-run must be without --unpack, which lays out files.")
    if args.executor == "slurm" and not (args.dry_run or slurm.is_here()):
        refuse("--executor slurm must be started where Slurm's sbatch and srun are.")
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
        begun = command_begun(run_dir)
        if begun and begun != start:
            what = f"{run_dir.name} is {shlex.join(begun)!r}"
            refuse(f"--out {args.out} must be another folder: in it, {what}.")
        runs[run_dir] = start
    return runs


# ---- on this machine -----------------------------------------------------------------------------


def run_here(args: Args, idle: list[Path]) -> None:
    """Runs them on this machine, until each has ended or --minutes are over."""
    end = BEGAN + 60 * args.minutes - SPARE_SECONDS if args.minutes else math.inf
    running: list[Job] = []
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # means the same as Ctrl-C
    with contextlib.suppress(KeyboardInterrupt):
        while (running or idle) and time.time() < end:
            running = [job for job in running if job.process.poll() is None]
            while idle and len(running) < max(args.at_most, 1):
                running.append(Job(idle.pop(0)))
            for job in running:
                job.watch()
                if job.must_stop(end):
                    job.tell()
                    idle.clear()  # there is no time for another run
            time.sleep(0.2)
    for job in running:
        job.tell()
    for job in running:
        job.wait(end)


# ---- the sweep -----------------------------------------------------------------------------------


def start(args: Args, idle: list[Path], runs: dict[Path, list[str]]) -> None:
    """Trains them here, or hands them to Slurm."""
    for run_dir in idle:
        run_dir.mkdir(parents=True, exist_ok=True)
        if not read_text(run_dir / "job.log"):
            append(run_dir, f"# {shlex.join(runs[run_dir])}")
    if args.executor == "local":
        run_here(args, idle)
    elif idle:
        jobs = slurm.submit(args.out, [x.name for x in idle], args.at_most, args.sbatch)
        for run_dir, job in zip(idle, jobs):
            append(run_dir, f"slurm job {job}")


def wanted(args: Args) -> dict[Path, list[str]]:
    """Run directory -> command, without --run-dir."""
    if not args.table:
        return plan(args)
    run_dirs = [log.parent for log in sorted(args.out.glob("*/job.log"))]
    return {run_dir: command_begun(run_dir) for run_dir in run_dirs}


def sweep(args: Args) -> bool:
    """All that this command does. False if runs on this machine are not finished after it."""
    runs = wanted(args)
    if args.unpack:
        slices.unpack(args.unpack, args.out)
        runs = wanted(args)  # refuses, if those that were laid out are of another sweep
    if args.pack and not args.dry_run:
        slices.check_packs(args.pack, runs)
    queue = slurm.queue()
    states = {run_dir: look(run_dir, queue)["state"] for run_dir in runs}
    idle = [x for x in runs if states[x] in ("waiting", "stopped", "failed")]
    if args.dry_run:
        for run_dir, command in runs.items():
            command = shlex.join(command_of(run_dir, command))
            print(command if run_dir in idle else f"# {run_dir}: {states[run_dir]}")
        if args.executor == "slurm" and idle:
            names = [run_dir.name for run_dir in idle]
            print(slurm.batch_script(args.out, names, args.at_most, args.sbatch), end="")
        return True
    if not args.table:
        start(args, idle, runs)
    queue = slurm.queue()
    rows = [look(run_dir, queue) for run_dir in runs]
    print_table(rows)
    complete = all(row["state"] == "finished" for row in rows)
    packed = slices.pack(args.pack, runs) if args.pack else True
    return packed and (complete or args.table or args.executor == "slurm")


def main() -> None:
    args = tyro.cli(Args)
    if args.work:
        work(args.out / args.work)
    elif not sweep(args):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
