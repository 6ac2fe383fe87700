"""What the benchmarks share: paths, refusals, the machine's name, Markdown tables, csv files."""

import csv
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "benchmarks" / "results" / "runs"  # small copies of training runs
UNSEEN = "solved_Unseen"  # a column of the mazes' evaluations.csv
SCRIPTS = {"procgen": "ppo_plr_procgen", "mazes": "ppo_robust_plr_minigrid"}
sys.path.insert(0, str(ROOT))  # the scripts can be imported, each by whoever needs it


def refuse(reason: str) -> NoReturn:
    print(f"error: {reason}", file=sys.stderr)
    raise SystemExit(2)


def cpu_name() -> str:
    """Model and number of usable cores."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model}, {cores} cores"


def commit_and_machine(script: Path) -> str:
    """A commit ends in "+changes" if the script or the sampler beside it differs from it. In a copy
    without git's folder it is what the environment variable COMMIT says."""

    def output_of(*command: str) -> str:
        if shutil.which(command[0]) is None:
            return ""
        done = subprocess.run(command, cwd=script.parent, capture_output=True, text=True)
        return done.stdout.strip()

    commit = output_of("git", "rev-parse", "--short=7", "HEAD")
    commit = commit or os.environ.get("COMMIT", "unknown")
    if output_of("git", "status", "--porcelain", "--", script.name, "plr_sampler.py"):
        commit += "+changes"
    query = "nvidia-smi", "--query-gpu=name", "--format=csv,noheader"
    gpus = Counter(output_of(*query).splitlines())
    names = [f"{count} {name}" for name, count in gpus.items()]
    return f"commit {commit} on {cpu_name()}, {' and '.join(names) or 'no GPU'}"


def log_start(run_dir: Path, driver: str, from_step: int = 0) -> None:
    """Adds this process, a slice of a run, to its job.log as collect.py reads it."""
    command = shlex.join(["python", *sys.argv])
    lines = [
        f"# {commit_and_machine(Path(driver).resolve())}",
        f"$ {command}",
        "training on 1 CPU thread",
    ]
    lines += [f"continuing at step {from_step:,}"] if from_step else []
    with open(run_dir / "job.log", "a") as log:
        log.writelines(f"{line}\n" for line in lines)


def markdown(rows: Iterable[Iterable[str]], left: int = 1) -> str:
    """A table; the first row is its header, the first `left` columns are words."""
    lines = [list(row) for row in rows]
    lines.insert(1, ["---" if i < left else "---:" for i in range(len(lines[0]))])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{x:.5g}" if isinstance(x, float) else x for k, x in row.items()})


def read_text(path: Path) -> str:
    """Nothing if there is no such file."""
    return path.read_text(errors="replace") if path.exists() else ""


def read_csv(path: Path) -> list[dict[str, str]]:
    """Its rows, but for half a row at the end, which a run is writing."""
    text = read_text(path)
    return list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))
