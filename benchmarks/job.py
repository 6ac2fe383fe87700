"""A run of launch.py: its directory, its row of the table, the process that trains it."""

import contextlib
import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from pathlib import Path

import slurm
from common import commit_and_machine, read_csv, read_text


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


def command_begun(run_dir: Path) -> list[str]:
    """The command that job.log begins with; nothing if it was never started."""
    return shlex.split(read_text(run_dir / "job.log").partition("\n")[0].removeprefix("# "))


def command_of(run_dir: Path, start: list[str]) -> list[str]:
    """What starts the run, or goes on with it; `start`: its first command, without --run-dir."""
    if (run_dir / "checkpoint.pt").exists():
        script = [word.endswith(".py") for word in start].index(True)
        return [*start[: script + 1], "--resume", str(run_dir)]
    return [*start, "--run-dir", str(run_dir)]


# ---- the table -----------------------------------------------------------------------------------


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


# ---- the process that trains, on this machine or on a node ---------------------------------------


def last_words(output: str) -> str:
    """Why a command failed: what follows "error: ", or is first in tyro's box, or its last line."""
    said = re.findall(r"^error: (.+)", output, re.MULTILINE)
    boxed = re.findall(r"╭.*\n│ (.+?) *│", output)
    return (said or boxed or re.findall(r".*\w.*", output) or ["it printed nothing"])[-1]


def work(run_dir: Path) -> None:
    """Trains to the run's end; on SIGTERM or SIGUSR1 to the next checkpoint; on SIGINT no more."""
    received: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, lambda number, _: received.append(number))
    # The lock goes with the log, which the training inherits: it lasts as long as that lives.
    log = open(run_dir / "job.log", "ab", buffering=0)
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(log, fcntl.LOCK_EX)  # waits, should another job have this run
    if (run_dir / "result.json").exists():
        return
    command = command_of(run_dir, command_begun(run_dir))
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
        if signal.SIGINT in received:  # torchrun's processes are in its group
            os.killpg(process.pid, signal.SIGKILL)
        time.sleep(0.1)
    log.close()
    if (run_dir / "result.json").exists():
        return
    jobs = re.findall(r"^slurm job (\S+)$", read_text(run_dir / "job.log"), re.MULTILINE)
    if received and jobs and jobs[-1] == slurm.this_job():  # not one that only starts a launcher
        slurm.requeue()
    elif not received:
        output = read_text(run_dir / "job.log").rpartition("\n$ ")[2].partition("\n")[2]
        code = process.returncode
        why = last_words(output) if code >= 0 else f"ended by {signal.Signals(-code).name}"
        append(run_dir, f"\nfailed: {why}")


# ---- and who waits for it ------------------------------------------------------------------------


EXIT_SECONDS = 3  # a training's checkpoint and the end of its process


class Job:
    """A process of `work` on this machine. A session of its own keeps Ctrl-C from it, which the
    launcher passes on, and lets it outlive the launcher."""

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir
        self.modified = modified_time(run_dir / "progress.csv")
        self.row_time = time.time()  # of the last row; before there is one, of the start
        self.has_row = False  # of this slice
        self.iterations: deque[float] = deque(maxlen=20)  # seconds between its last rows
        self.told = False
        print(f"starts {run_dir}", flush=True)
        command = [sys.executable, slurm.LAUNCH, "--out", run_dir.parent, "--work", run_dir.name]
        self.process = subprocess.Popen(command, start_new_session=True)

    def watch(self) -> None:
        """Notices a new row of progress.csv. The first one's time includes the start."""
        modified = modified_time(self.run_dir / "progress.csv")
        if modified != self.modified:
            if self.has_row:
                self.iterations.append(time.time() - self.row_time)
            self.has_row = True
            self.modified = modified
            self.row_time = time.time()

    def must_stop(self, end: float) -> bool:
        """In this iteration: another one, as long as the longest lately, would be over too late.
        Before the first row its iteration is taken to be half done."""
        if not self.has_row and not self.has_begun():
            return time.time() > end - EXIT_SECONDS  # a signal would kill it: it may yet begin
        longest = max([*self.iterations, time.time() - self.row_time])
        return self.row_time + 2 * longest > end - EXIT_SECONDS

    def has_begun(self) -> bool:
        """Whether the script, started last, has said on what it trains: it heeds signals now."""
        printed = read_text(self.run_dir / "job.log").rpartition("\n$ ")[2]
        return "\ntraining on " in printed

    def tell(self) -> None:
        if not self.told:
            print(f"stops {self.run_dir} after its iteration, with a checkpoint", flush=True)
            self.process.terminate()
            self.told = True

    def wait(self, end: float) -> None:
        """Until `end`, by the clock; then it is killed, and its last checkpoint stays."""
        try:
            self.process.wait(max(end - time.time(), 0.0))
        except subprocess.TimeoutExpired:
            print(f"kills {self.run_dir}, which goes on from its last checkpoint", flush=True)
            self.process.send_signal(signal.SIGINT)
            self.process.wait()


def modified_time(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0
