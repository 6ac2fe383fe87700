"""Copies what is worth keeping of a run, some tens of kilobytes, for report.py.

    python benchmarks/collect.py runs/sweep/*     # of launch.py: job.log says what made them
    python benchmarks/collect.py runs/RUN --commit e1df0a7 --machine "2 cores of an AMD EPYC"
        --command "python ppo_robust_plr_minigrid.py --run-dir runs/RUN"       # started by hand

Into a folder of benchmarks/results/runs: args.json, result.json, evaluation_*.json (but for paths),
evaluations.csv, progress.csv and, if there is one, worst_case.csv with at most 200 of their rows,
evenly spaced, and run.json: of each slice, a start that got to train, the command, commit, machine
and the step it goes on from. A run that goes on may be copied too, and again later.
"""

import functools
import importlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from common import RUNS, SCRIPTS, read_csv, read_text, refuse

MAX_ROWS = 200
# Flags that do not make a run another experiment, or that its copy's name says in another way.
NO_SETTINGS = """exp_name seed torch_deterministic cuda track run_dir checkpoint_interval resume
env_threads env_id total_timesteps curriculum eval_interval eval_episodes eval_worst capture_video
evaluate batch_size minibatch_size num_iterations profile cuda_graphs""".split()


@dataclass
class Args:
    run_dirs: Annotated[tuple[Path, ...], tyro.conf.Positional]  # run directories
    results: Path = RUNS  # folder for the copies
    name: str = ""  # the copy's name in it, for a single run; else game, curriculum, steps, seed
    commit: str = ""  # the commit of the code that ran, for runs without job.log
    machine: str = ""  # what they ran on
    command: str = ""  # what started them
    note: str = ""  # what a reader of the result must know


@functools.cache
def defaults(kind: str) -> dict[str, Any]:
    """Of the flags of a script, which is imported only if such a run is there: each needs
    environments that the other does not."""
    return vars(importlib.import_module(SCRIPTS[kind]).Args())


def kind_of(args: dict[str, Any]) -> str:
    return "mazes" if "num_walls" in args else "procgen"


def settings(args: dict[str, Any]) -> dict[str, Any]:
    """The flags in a run's args.json that differ from the defaults, the papers' settings. One that
    is None, as max_steps of a registered environment, is left to the environment."""
    usual = defaults(kind_of(args))
    names = [name for name in args if name in usual and name not in NO_SETTINGS]
    return {name: args[name] for name in names if args[name] not in (usual[name], None)}


def millions(steps: float) -> str:
    """2,015,232 -> 2M, 24,985,600 -> 25M, 500,498,432 -> 500M: two digits."""
    return f"{float(f'{steps / 1e6:.2g}'):.6f}".rstrip("0").rstrip(".") + "M"


def whose(args: dict[str, Any]) -> str:
    """Whose code made a run: "" is our scripts as they are; "jaxued" of what args.json calls
    "jaxued COMMIT"; "ours with ..." of a driver that changes something of ours."""
    implementation = args.get("implementation", "")
    return implementation if implementation.startswith("ours ") else implementation.split(" ")[0]


def default_name(args: dict[str, Any]) -> str:
    # Procgen has a maze, too
    game = "mazes" if args["env_id"] == "maze" and kind_of(args) == "mazes" else args["env_id"]
    if "implementation" in args:
        game = f"{whose(args).replace(' ', '_')}_{game}"
    parts = [game, args["curriculum"], millions(args["total_timesteps"]), f"seed{args['seed']}"]
    return "_".join([*parts, *(f"{name}={value}" for name, value in settings(args).items())])


def read_starts(log: str) -> list[dict[str, Any]]:
    """Command, commit, machine and first step of each slice of a run, from its job.log."""
    starts: list[dict[str, Any]] = []
    begins = re.compile(r"^# commit (\S+) on (.+)\n\$ (.+)\n", re.MULTILINE)
    _, *found = begins.split(log)
    for commit, machine, command, printed in zip(*(found[i::4] for i in range(4))):
        goes_on = re.search(r"^continuing at step ([\d,]+)$", printed, re.MULTILINE)
        step = int(goes_on[1].replace(",", "")) if goes_on else 0
        start = {"command": command, "commit": commit, "machine": machine, "from_step": step}
        if "training on " in printed:  # the script's first line
            starts.append(start)
    return starts


def thin(text: str) -> str:
    """A csv file with at most MAX_ROWS of its rows, the first and the last among them; half a row
    at its end is cut."""
    header, *rows = text[: text.rfind("\n") + 1].splitlines(keepends=True) or [""]
    if len(rows) > MAX_ROWS:
        kept = [round(i * (len(rows) - 1) / (MAX_ROWS - 1)) for i in range(MAX_ROWS)]
        rows = [rows[i] for i in kept]
    return "".join([header, *rows])


def rows_of(run_dir: Path) -> dict[str, dict[str, str]]:
    """progress.csv by global_step, but for the times."""
    rows = {row["global_step"]: row for row in read_csv(run_dir / "progress.csv")}
    for row in rows.values():
        del row["wall_seconds"], row["SPS"]
    return rows


def collect(
    run_dir: Path,
    results: Path,
    name: str = "",
    start: dict[str, str] | None = None,
    note: str = "",
) -> Path:
    """Copies one run to results/name. `start`: command, commit and machine if it has no job.log."""
    try:
        args = json.loads((run_dir / "args.json").read_text())
    except (OSError, ValueError):
        refuse(f"RUN-DIRS {run_dir} must be a run's directory: it has no args.json to read.")
    starts = read_starts(read_text(run_dir / "job.log"))
    if not starts and start and all(start.values()):
        starts = [start]
    if not starts:
        refuse(f"--commit, --machine and --command must be given: {run_dir} has no job.log.")
    target = results / (name or default_name(args))
    if not rows_of(target).items() <= rows_of(run_dir).items():  # it may have gone on since
        refuse(f"--name must be another: {target} holds a different run than {run_dir}.")
    files: dict[str, str] = {}
    for file in sorted(run_dir.glob("*.json")):
        paths = r'("(run_dir|evaluate|resume)": )"[^"]*"'
        files[file.name] = re.sub(paths, rf'\1"{run_dir.resolve().name}"', file.read_text())
    for csv_name in ("progress.csv", "evaluations.csv"):
        files[csv_name] = thin(read_text(run_dir / csv_name))
    if (run_dir / "worst_case.csv").exists():
        files["worst_case.csv"] = thin(read_text(run_dir / "worst_case.csv"))
    known = json.loads(read_text(target / "run.json") or "{}")
    # if it went on, what was noted may no longer hold
    origin: dict[str, Any] = known if known.get("starts") == starts else {"starts": starts}
    if note:
        origin["note"] = note
    files["run.json"] = json.dumps(origin, indent=2) + "\n"
    target.mkdir(parents=True, exist_ok=True)
    for old in (*target.glob("*.json"), *target.glob("*.csv")):
        old.unlink()
    for file_name, text in files.items():
        (target / file_name).write_text(text)
    return target


def main() -> None:
    args = tyro.cli(Args)
    if args.name and len(args.run_dirs) > 1:
        refuse(f"--name {args.name} must be for a single run, not for {len(args.run_dirs)}.")
    for run_dir in args.run_dirs:
        start = {"command": args.command, "commit": args.commit, "machine": args.machine}
        print(collect(run_dir, args.results, args.name, start, args.note))


if __name__ == "__main__":
    main()
