"""Pictures, a table beside the published numbers, and small copies of runs of ppo_robust_plr_minigrid.py.

    python benchmarks/plot_mazes.py runs/robust_plr runs/plr runs/dr --out benchmarks/results/mazes_20M

--out gets curves.png (evaluation mazes), curriculum.png (training), table.md (final evaluations; runs that differ in
their seed only share a column) and CURRICULUM_seedSEED/ (each run's json and csv files: a run for this script, too).
For a finished run, the newest evaluation_*.json (from --evaluate) replaces the evaluation in result.json.
"""

import csv
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

MAX_BYTES = 400_000  # of progress.csv in a copy
NAMES = {"dr": "DR", "plr": "PLR", "robust_plr": "Robust PLR"}
# Solved rate after 250M steps, 25 blocks, 10 seeds, 100 episodes a maze, mean and standard error (ddof 1), computed
# from the per-seed results in results/minigrid_ood of github.com/facebookresearch/dcd
PUBLISHED = {
    "SixteenRooms": ("0.903 ± 0.048", "0.958 ± 0.042", "0.834 ± 0.086"),
    "Labyrinth": ("0.183 ± 0.115", "0.343 ± 0.145", "0.538 ± 0.142"),
    "Labyrinth2": ("0.204 ± 0.116", "0.372 ± 0.136", "0.590 ± 0.142"),
    "Maze": ("0.036 ± 0.019", "0.281 ± 0.134", "0.592 ± 0.128"),
    "Maze2": ("0.046 ± 0.019", "0.407 ± 0.139", "0.383 ± 0.139"),
    "SimpleCrossingS11N5": ("0.798 ± 0.071", "0.956 ± 0.026", "0.941 ± 0.025"),
    "SmallCorridor": ("0.824 ± 0.073", "0.818 ± 0.059", "0.859 ± 0.026"),
    "mean of the 7 published mazes": ("0.428 ± 0.046", "0.591 ± 0.066", "0.677 ± 0.078"),
    "IQM of the 7 published mazes": ("0.367", "0.673", "0.815"),
}
UNNAMED = set("seed curriculum exp_name run_dir track cuda checkpoint_interval capture_video evaluate".split())
UNNAMED |= set("total_timesteps num_iterations batch_size eval_interval eval_episodes".split())  # in labels


@dataclass
class Args:
    run_dirs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """run directories"""
    out: Path
    """folder for the pictures, the table and the copies"""
    smooth: int = 50
    """iterations that the lines of curriculum.png average, where single rollouts differ"""


def read_csv(path: Path) -> dict[str, np.ndarray]:
    """Columns as float arrays; none if there is no row yet."""
    rows = list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []
    return {key: np.array([float(row[key]) for row in rows]) for key in rows[0]} if rows else {}


def read_run(run_dir: Path) -> dict[str, Any]:
    """A run's files; of its last evaluation, if any: "solved" (by maze), "episodes", "source" and "at" which point."""
    run = {"args": json.loads((run_dir / "args.json").read_text()), "finished": (run_dir / "result.json").exists()}
    run |= {"progress": read_csv(run_dir / "progress.csv"), "evaluations": read_csv(run_dir / "evaluations.csv")}
    evaluation = {key: column[-1] for key, column in run["evaluations"].items()}
    run["at"] = evaluation | {"steps_per_second": 1 / np.mean(1 / run["progress"]["SPS"])}
    run |= {"source": "last row of evaluations.csv", "episodes": run["args"]["eval_episodes"]}
    if run["finished"]:
        run["at"] = json.loads((run_dir / "result.json").read_text())
        evaluation, run["source"] = run["at"]["evaluation"], "result.json"
        if later := max(run_dir.glob("evaluation_*.json"), key=lambda x: int(x.stem[11:]), default=None):
            evaluation, run["source"] = json.loads(later.read_text()), later.name
        run["episodes"] = len(next(iter(evaluation["episodes"].values())))
    run["solved"] = {x[7:]: evaluation[x] for x in evaluation if re.match("solved_(?!mean$|iqm$)", x)}
    return run


def plot(runs: list[dict[str, Any]], out: Path, smooth: int) -> None:
    plt.switch_backend("agg")
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25})
    curves, (over_steps, over_updates) = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    curriculum, axes = plt.subplots(2, 2, figsize=(11, 7.4), sharex=True, layout="constrained")
    solved, paths, scores, effective = axes.flat
    handles = [Line2D([], [], color=f"C{i}", lw=4, label=run["label"]) for i, run in enumerate(runs)]
    for i, run in enumerate(runs):
        color, progress, evaluations = f"C{i}", run["progress"], run["evaluations"]
        steps = progress["global_step"]
        for axis, x in ((over_steps, "global_step"), (over_updates, "gradient_updates")) if evaluations else ():
            axis.plot(evaluations[x], evaluations["solved_mean"], color=color, marker="o", ms=4)
        for replay, ls, kind in ((0, "-", "new"), (1, ":", "replayed")):
            for axis, key in ((solved, "solved_rate"), (paths, f"shortest_path_{kind}")):
                if key in progress:  # at each such rollout: the mean of those in the `smooth` iterations up to it
                    there = np.flatnonzero((progress["replay"] == replay) & ~np.isnan(progress[key]))
                    first = np.searchsorted(steps[there], steps[there] - smooth * run["args"]["batch_size"], "right")
                    total, rows = np.cumsum([0, *progress[key][there]]), np.arange(len(there)) + 1
                    axis.plot(steps[there], (total[rows] - total[first]) / (rows - first), color=color, ls=ls)
        if run["args"]["curriculum"] != "dr":
            scores.plot(steps, progress["score_q50"], color=color)
            scores.fill_between(steps, progress["score_q10"], progress["score_q90"], color=color, alpha=0.2, lw=0)
            effective.plot(steps, progress["effective_levels"], color=color)
    over_steps.set(xlabel="environment steps", ylabel="mean solved rate, evaluation mazes", ylim=(0, None))
    over_updates.set(xlabel="gradient updates")
    solved.set(title=f"solved rate in training (mean of {smooth} iterations)", ylim=(0, 1))
    paths.set(title=f"shortest path of the levels (mean of {smooth} iterations)")
    scores.set(title="level scores: median, 10 % to 90 % quantile", xlabel="environment steps")
    effective.set(title="effective number of levels, exp(entropy)", xlabel="environment steps", ylim=(0, None))
    kinds = [Line2D([], [], color="0.3", ls=ls, label=f"{x} levels") for x, ls in (("new", "-"), ("replayed", ":"))]
    for figure, name, entries in ((curves, "curves.png", handles), (curriculum, "curriculum.png", handles + kinds)):
        for axis in figure.axes:
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))
            axis.set_xlim(left=0)
        figure.legend(handles=entries, loc="outside upper center", ncols=min(len(entries), 5), frameon=False)
        figure.savefig(out / name, dpi=110)


def copy(run_dir: Path, target: Path, batch_size: int) -> str:
    """Writes a run's json files (paths shortened to its name) and csv files; says if progress.csv is thinned."""
    target.mkdir(parents=True, exist_ok=True)
    for file in run_dir.glob("*.json"):
        short = re.sub(r'("(run_dir|evaluate)": )"[^"]*"', rf'\1"{run_dir.resolve().name}"', file.read_text())
        (target / file.name).write_text(short)
    for file in run_dir.glob("*.csv"):
        header, *rows = file.read_text().splitlines(keepends=True)
        k = 1 + file.stat().st_size // MAX_BYTES if file.name == "progress.csv" else 1
        (target / file.name).write_text("".join([header, *rows[(len(rows) - 1) % k :: k]]))  # with the last row
    k = round(np.diff(read_csv(target / "progress.csv")["global_step"], prepend=0)[-1] / batch_size)
    return f"<!-- {target.name}/progress.csv is thinned: a row for every {k} iterations -->\n" if k > 1 else ""


def summary(statistic: str, rates: np.ndarray) -> str:
    """Of (mazes, runs): the mean with its standard error over runs, or the IQM over both."""
    x = rates.mean(0) if statistic == "mean" else np.sort(rates.ravel())[(q := rates.size // 4) : rates.size - q]
    return f"{x.mean():.3f}" + (f" ± {x.std(ddof=1) / len(x) ** 0.5:.3f}" if statistic == "mean" and len(x) > 1 else "")


def table(runs: list[dict[str, Any]]) -> str:
    columns: dict[str, dict[str, list[float]]] = {}  # header -> maze -> solved rate of each run
    details = ["| run | environment steps | gradient updates | steps/s | evaluation |", "|---|---:|---:|---:|---|"]
    for run in (run for run in runs if run["solved"]):
        at, state = run["at"], "" if run["finished"] else "unfinished, "
        header = f"{run['setting']}, ours, {state}{at['global_step'] / 1e6:.3g}M steps, {run['episodes']} episodes"
        for maze, rate in run["solved"].items():
            columns.setdefault(header, {}).setdefault(maze, []).append(rate)
        numbers = f"{at['global_step']:,.0f} | {at['gradient_updates']:,.0f} | {at['steps_per_second']:,.0f}"
        details.append(f"| {run['label']} | {state}{numbers} | {run['source']} |")
    seeds = [len(next(iter(column.values()))) for column in columns.values()]
    headers = [f"{header}, {n} seed{'s' if n > 1 else ''}" for header, n in zip(columns, seeds)]
    headers += [f"{name}, published, 250M steps, 100 episodes, 10 seeds" for name in NAMES.values()]
    mazes = list(dict.fromkeys(maze for column in columns.values() for maze in column))
    both = [maze for maze in PUBLISHED if maze in mazes]
    rows = [(maze, "mean", [maze]) for maze in mazes]
    for name, chosen in ((f"the {len(both)} published mazes", both), (f"all {len(mazes)} mazes", mazes)):
        rows += [(f"{statistic} of {name}", statistic, chosen) for statistic in ("mean", "IQM")]
    lines = [
        "Share of episodes solved in each maze, ± standard error over seeds. IQM: over mazes and seeds together.\n"
    ]
    lines += [f"| maze | {' | '.join(headers)} |", "|---" + "|---:" * len(headers) + "|"]
    for name, statistic, chosen in rows:
        known = [[column[maze] for maze in chosen if maze in column] for column in columns.values()]
        cells = [summary(statistic, np.array(rates)) if len(rates) == len(chosen) else "-" for rates in known]
        lines.append(f"| {name} | {' | '.join([*cells, *PUBLISHED.get(name, '---')])} |")
    return "\n".join([*lines, "", *details, ""])


def main() -> None:
    args = tyro.cli(Args)
    runs = [read_run(run_dir) for run_dir in args.run_dirs]
    differ = [x for x in runs[0]["args"] if x not in UNNAMED and len({str(r["args"].get(x)) for r in runs}) > 1]
    for run, x in ((run, run["args"]) for run in runs):
        others = [f"{name} {x.get(name)}" for name in differ]
        run["setting"] = ", ".join([NAMES[x["curriculum"]], *others])
        run["label"] = f"{run['setting']}, seed {x['seed']}"
        run["folder"] = "_".join([x["curriculum"], f"seed{x['seed']}", *others]).replace(" ", "_")
    notes = [copy(x, args.out / run["folder"], run["args"]["batch_size"]) for x, run in zip(args.run_dirs, runs)]
    plot(runs, args.out, args.smooth)
    (args.out / "table.md").write_text("".join(notes) + table(runs))
    print(args.out)


if __name__ == "__main__":
    main()
