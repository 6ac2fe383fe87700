"""Copies what is worth keeping of a run, some tens of kilobytes, into benchmarks/results/runs, for report.py.

    python benchmarks/collect.py runs/sweep/*       # of launch.py or reproduce_*.py, which ran with a known commit
    python benchmarks/collect.py runs/RUN --commit e1df0a7 --machine "2 cores of an AMD EPYC" \\
        --command "python ppo_robust_plr_minigrid.py --curriculum dr --run-dir runs/RUN"      # of a run started by hand

args.json, result.json and evaluation_*.json (but for paths), evaluations.csv and progress.csv with at most 200 of their
rows, evenly spaced, and run.json: command, commit and machine of each start, from job.log or from the flags. A run that
goes on may be copied too, and again later: the copy says how far it is.
"""

import csv
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import launch
import tyro
from launch import refuse

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import ppo_plr_procgen  # noqa: E402
import ppo_robust_plr_minigrid  # noqa: E402

RUNS = ROOT / "benchmarks" / "results" / "runs"
MAX_ROWS = 200
# flags that do not make a run another experiment, or that a copy's name and the report's tables say in another way
NO_SETTINGS = set("exp_name seed torch_deterministic cuda track run_dir checkpoint_interval resume env_threads".split())
NO_SETTINGS |= set("env_id total_timesteps curriculum eval_interval eval_episodes capture_video evaluate".split())
NO_SETTINGS |= set("batch_size minibatch_size num_iterations profile".split())


@dataclass
class Args:
    run_dirs: Annotated[tuple[Path, ...], tyro.conf.Positional]  # run directories
    results: Path = RUNS  # folder for the copies
    name: str = ""  # the copy's name in it, for a single run; else it is made of game, curriculum, steps and seed
    commit: str = ""  # the commit of the code that ran, for runs without job.log
    machine: str = ""  # what they ran on
    command: str = ""  # what started them
    note: str = ""  # what a reader of the result must know


def settings(args: dict[str, Any]) -> dict[str, Any]:
    """The flags of a run's args.json by which it differs from the defaults, the papers' settings."""
    script = ppo_robust_plr_minigrid if "num_walls" in args else ppo_plr_procgen
    defaults = vars(script.Args())
    return {key: args[key] for key in args if key in defaults.keys() - NO_SETTINGS and args[key] != defaults[key]}


def millions(steps: float) -> str:
    """2,015,232 -> 2M, 24,985,600 -> 25M, 500,498,432 -> 500M: two digits."""
    return f"{float(f'{steps / 1e6:.2g}'):.6f}".rstrip("0").rstrip(".") + "M"


def default_name(args: dict[str, Any]) -> str:
    game = "mazes" if args["env_id"] == "maze" and "num_walls" in args else args["env_id"]  # Procgen has a maze, too
    parts = [game, args["curriculum"], millions(args["total_timesteps"]), f"seed{args['seed']}"]
    return "_".join([*parts, *(f"{key}={value}" for key, value in settings(args).items())])


def read_starts(log: str) -> list[dict[str, str]]:
    """Command, commit and machine of a run's first start and of each later one at another commit or machine."""
    starts = []
    for commit, machine, command in re.findall(r"^# commit (\S+) on (.+)\n\$ (.+)", log, re.MULTILINE):
        if not starts or (commit, machine) != (starts[-1]["commit"], starts[-1]["machine"]):
            starts.append({"command": command, "commit": commit, "machine": machine})
    return starts


def thin(text: str, most: float = MAX_ROWS) -> str:
    """A csv file with at most so many of its rows, the first and the last among them; half a row at its end is cut."""
    header, *rows = text[: text.rfind("\n") + 1].splitlines(keepends=True) or [""]
    if len(rows) > most:
        rows = [rows[round(i * (len(rows) - 1) / (most - 1))] for i in range(most)]
    return "".join([header, *rows])


def rows_of(run_dir: Path) -> dict[str, tuple[str, ...]]:
    """progress.csv by global_step, but for the times."""
    file = run_dir / "progress.csv"
    rows = csv.DictReader(thin(file.read_text(), math.inf).splitlines() if file.exists() else [])
    times = ("wall_seconds", "SPS")
    return {row["global_step"]: tuple(f"{key}={x}" for key, x in row.items() if key not in times) for row in rows}


def same_run(run_dir: Path, target: Path) -> bool:
    """Whether `target` holds nothing or an older copy of this run, also of when it was to be shorter: then all rows of
    the copy are the run's."""
    return not (target / "args.json").exists() or rows_of(target).items() <= rows_of(run_dir).items()


def collect(run_dir: Path, results: Path, name: str = "", start: dict[str, str] | None = None, note: str = "") -> Path:
    """Copies one run to results/name. `start` has command, commit and machine of a run that has no job.log."""
    try:
        args = json.loads((run_dir / "args.json").read_text())
    except (OSError, ValueError):
        refuse(f"RUN-DIRS {run_dir} is not a run's directory: it has no args.json that can be read.")
    starts = read_starts(launch.read_log(run_dir)) or ([start] if start and all(start.values()) else [])
    if not starts:
        refuse(f"--commit, --machine and --command must be given: {run_dir} has no job.log that tells them.")
    target = results / (name or default_name(args))
    if not same_run(run_dir, target):
        refuse(f"--name must be another: {target} holds a different run than {run_dir}.")
    files = {}
    for file in sorted(run_dir.glob("*.json")):
        paths = r'("(run_dir|evaluate|resume)": )"[^"]*"'
        files[file.name] = re.sub(paths, rf'\1"{run_dir.resolve().name}"', file.read_text())
    for file in ("progress.csv", "evaluations.csv"):
        files[file] = thin((run_dir / file).read_text() if (run_dir / file).exists() else "")
    files["run.json"] = json.dumps({"starts": starts} | ({"note": note} if note else {}), indent=2) + "\n"
    target.mkdir(parents=True, exist_ok=True)
    for old in (*target.glob("*.json"), *target.glob("*.csv")):
        old.unlink()
    for file, text in files.items():
        (target / file).write_text(text)
    return target


def sweep(args: launch.Args, results: Path) -> None:
    """launch.py's work, then copies of all its runs that are finished. Refuses before it, if a copy would replace a run
    of another folder: a run of the same name, as of the same flags on another machine."""
    for job in [] if args.table else launch.plan(args):
        script = ppo_robust_plr_minigrid if "minigrid" in args.command else ppo_plr_procgen
        target = results / default_name(vars(tyro.cli(script.Args, args=job.start[len(job.script) :])))
        if not same_run(job.run_dir, target):
            refuse(f"--results {results} must be another folder: {target.name} in it is of another training.")
    complete = launch.sweep(args)
    if not args.dry_run and not args.table:
        finished = [path.parent for path in sorted(args.out.glob("*/result.json"))]
        copies = [collect(run_dir, results) for run_dir in finished]
        print(f"{len(copies)} finished runs are in {results}. Their tables: python benchmarks/report.py")
    if not complete:
        raise SystemExit(1)


def main() -> None:
    args = tyro.cli(Args)
    if args.name and len(args.run_dirs) > 1:
        refuse(f"--name {args.name} must be for a single run, not for {len(args.run_dirs)}.")
    for run_dir in args.run_dirs:
        start = {"command": args.command, "commit": args.commit, "machine": args.machine}
        print(collect(run_dir, args.results, args.name, start, args.note))


if __name__ == "__main__":
    main()
