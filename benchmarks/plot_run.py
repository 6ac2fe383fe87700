"""One picture of one or more runs: returns on the left, the curriculum on the right.

    python benchmarks/plot_run.py runs/RUN --out run.png
    python benchmarks/plot_run.py runs/PLR runs/UNIFORM --out comparison.png      # a colour for each run
    python benchmarks/plot_run.py runs/RUN --copy-to benchmarks/results           # what is worth committing of a run

It reads args.json, progress.csv and evaluations.csv, also of a run that goes on.
"""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib
import numpy as np
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FuncFormatter, NullFormatter

MAX_ROWS, MAX_BYTES = 500, 20_000  # of progress.csv and of result.json in a copy


@dataclass
class Args:
    run_dirs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """run directories"""
    out: Path | None = None
    """the picture's file"""
    smooth: int = 5
    """iterations whose episodes the line of the train return averages"""
    copy_to: Path | None = None
    """folder for a small copy of each run, DIR/RUN: its json and csv files, progress.csv with at most 500 rows"""


def read_csv(path: Path) -> dict[str, np.ndarray]:
    """Columns as float arrays; none if there is no row yet."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return {key: np.array([float(row[key]) for row in rows]) for key in rows[0]} if rows else {}


def smoothed(progress: dict[str, np.ndarray], window: int) -> np.ndarray:
    """Mean return of the episodes that ended in the last `window` rows."""
    total = np.cumsum(np.nan_to_num(progress["episodic_return"]) * progress["episodes"])
    count = np.cumsum(progress["episodes"])
    for sums in (total, count):
        sums[window:] -= sums[:-window].copy()
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def plot(run_dirs: tuple[Path, ...], out: Path, window: int) -> None:
    runs = [json.loads((run_dir / "args.json").read_text()) for run_dir in run_dirs]
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True})
    plt.rcParams.update({"grid.alpha": 0.25, "axes.titlesize": 12, "legend.frameon": False, "legend.fontsize": 10})
    figure, axes = plt.subplot_mosaic(
        [["return", "effective"], ["return", "share"]], figsize=(12, 5.4), width_ratios=(3, 2), layout="constrained"
    )
    several, last_step = len(runs) > 1, 0
    # one run: a colour for each quantity; several: a colour for each run, a dash for each quantity
    styles = {"train": ("C0", "-"), "eval train": ("C1", "--"), "eval test": ("C2", "-."), "curriculum": ("C0", "-")}
    names = ("env_id", "curriculum", "score", "seed", "precision")
    shared = {name for name in names if len({run[name] for run in runs}) == 1}
    labels = [
        ", ".join(f"{name} {run[name]}" if name == "seed" else str(run[name]) for name in names if name not in shared)
        for run in runs
    ]
    if len(set(labels)) < len(labels):
        labels = [run_dir.resolve().name for run_dir in run_dirs]
    for i, (run_dir, run) in enumerate(zip(run_dirs, runs)):
        progress, evaluations = read_csv(run_dir / "progress.csv"), read_csv(run_dir / "evaluations.csv")
        if not progress:
            continue
        steps = progress["global_step"]
        last_step = max(last_step, int(steps[-1]))
        style = {key: {"color": f"C{i}" if several else color, "ls": ls} for key, (color, ls) in styles.items()}

        returns = axes["return"]
        returns.plot(steps, progress["episodic_return"], lw=0.8, alpha=0.35, color=style["train"]["color"])
        returns.plot(steps, smoothed(progress, window), lw=2, **style["train"])
        for kind in ("train", "test") if evaluations else ():
            mean = evaluations[f"{kind}_return"]
            error = evaluations[f"{kind}_return_std"] / np.sqrt(run["eval_episodes"])
            look = style[f"eval {kind}"]
            marker = {"marker": "o", "mfc": "white"} if kind == "train" else {"marker": "s"}
            returns.plot(evaluations["global_step"], mean, lw=2, ms=5, **marker, **look)
            returns.fill_between(
                evaluations["global_step"], mean - error, mean + error, alpha=0.2, lw=0, color=look["color"]
            )

        # without PLR every level of the set is as likely as the next: P_replay is not what was drawn from
        effective = progress["effective_levels"]
        if run["curriculum"] != "plr":
            effective = np.full(len(steps), float(run["num_levels"] or np.nan))
        axes["effective"].plot(steps, effective, lw=2, **style["curriculum"])
        axes["share"].plot(steps, progress["seen_share"], lw=2, color=style["curriculum"]["color"])
        axes["share"].plot(steps, progress["replay_share"], lw=2, ls=":", color=f"C{i if several else 3}")

    def line(key: str, **more) -> Line2D:
        color, ls = styles[key]
        return Line2D([], [], color="0.3" if several else color, ls=ls, lw=2, **more)

    handles = {
        f"training episodes, mean of {window} iterations": line("train"),
        "evaluation, training levels": line("eval train", marker="o", mfc="white", ms=5),
        "evaluation, test levels": line("eval test", marker="s", ms=5),
    }
    if several:
        handles = {label: Line2D([], [], color=f"C{i}", lw=6) for i, label in enumerate(labels)} | handles
    axes["return"].legend(handles.values(), handles, loc="upper left")
    axes["return"].set(title="return per episode (bands: standard error)", xlabel="environment steps")
    axes["effective"].set(title="effective number of levels, exp(entropy)", yscale="log")
    axes["effective"].set_ylim(0.9, 1.3 * max([axes["effective"].get_ylim()[1], *(run["num_levels"] for run in runs)]))
    axes["effective"].yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes["effective"].yaxis.set_minor_formatter(NullFormatter())
    axes["share"].set(title="share of levels seen, share of replays", xlabel="environment steps", ylim=(-0.03, 1.05))
    color = "0.3" if several else None
    handles = {
        "levels seen": Line2D([], [], color=color or "C0", lw=2),
        "replays among all draws so far": Line2D([], [], color=color or "C3", ls=":", lw=2),
    }
    axes["share"].legend(handles.values(), handles, loc="lower right")
    axes["share"].yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.0%}"))
    for axis in axes.values():
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.set_xlim(left=0)
    axes["effective"].tick_params(labelbottom=False)
    run = runs[0]
    parts = [f"{name} {run[name]}" if name == "seed" else str(run[name]) for name in names if name in shared]
    figure.suptitle(", ".join([*parts, f"{last_step:,} steps"]), fontsize=14)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=100)
    print(out)


def copy(run_dir: Path, target: Path) -> None:
    """args.json (its run_dir shortened to the name), evaluations.csv, progress.csv thinned to evenly spaced rows, and
    result.json, without the single episodes where they make it large."""
    target.mkdir(parents=True, exist_ok=True)
    args = json.loads((run_dir / "args.json").read_text())
    args["run_dir"] = run_dir.resolve().name
    (target / "args.json").write_text(json.dumps(args, indent=2) + "\n")
    (target / "evaluations.csv").write_bytes((run_dir / "evaluations.csv").read_bytes())
    header, *rows = (run_dir / "progress.csv").read_text().splitlines(keepends=True)
    keep = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), MAX_ROWS)).round().astype(int)) if rows else []
    (target / "progress.csv").write_text("".join([header, *(rows[i] for i in keep)]))
    if (run_dir / "result.json").exists():
        text = (run_dir / "result.json").read_text()
        if len(text) > MAX_BYTES:
            result = json.loads(text)
            del result["evaluation"]["episodes"]
            text = json.dumps(result, indent=2) + "\n"
        (target / "result.json").write_text(text)
    print(target)


def main() -> None:
    args = tyro.cli(Args)
    if args.out:
        plot(args.run_dirs, args.out, args.smooth)
    for run_dir in args.run_dirs if args.copy_to else ():
        copy(run_dir, args.copy_to / run_dir.resolve().name)


if __name__ == "__main__":
    main()
