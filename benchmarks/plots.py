"""The pictures of report.py: curves of the runs of one length, published numbers beside them."""

import itertools
import textwrap
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
from common import UNSEEN
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter
from scipy import stats

BAND = {"lw": 8, "alpha": 0.2}  # in a legend
MARKS = {"marker": "o", "ms": 4}
PAPER = {"ls": ":", "lw": 1.5}
CORRELATION = "correlation_"  # columns of progress.csv


def as_far_as_most(items: list, last: Callable[[Any], float]) -> list:
    """Without those that ended early, by their `last` step: the mean of all would end there."""
    enough = 0.95 * np.median([last(item) for item in items])
    return [item for item in items if last(item) >= enough]


def averaged(runs: list, x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    """Columns of evaluations.csv where all runs have some, of those that go as far as most: x's
    mean (points,), y (runs, points)."""
    runs = as_far_as_most(runs, lambda run: run.evaluations["global_step"][-1])
    steps = [run.evaluations["global_step"] for run in runs]
    points = np.unique(np.concatenate(steps))
    points = points[points >= max(s[0] for s in steps)]
    points = points[points <= min(s[-1] for s in steps)]
    at = {
        key: [np.interp(points, s, r.evaluations[key]) for s, r in zip(steps, runs)]
        for key in (x, y)
    }
    return np.mean(at[x], 0), np.array(at[y])


def smoothed(run, key: str, only: np.ndarray | bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Steps and means of a column of progress.csv at each row where it has a value (and `only` is
    true): over the last 50 iterations up to there, or a twentieth of the run if that is more; 5
    iterations of a run of 100 or less."""
    steps = run.progress["global_step"]
    there = np.flatnonzero(~np.isnan(run.progress[key]) & only)
    batch = run.args["batch_size"]
    window = max(50 * batch, steps[-1] / 20) if len(steps) > 100 else 5 * batch
    first = np.searchsorted(steps[there], steps[there] - window, "right")
    total = np.cumsum([0, *run.progress[key][there]])
    rows = np.arange(len(there)) + 1
    return steps[there], (total[rows] - total[first]) / (rows - first)


def draw(axis, lines: list[tuple[np.ndarray, np.ndarray]], **look: Any) -> None:
    """A line for each run; of four and more their mean and standard error, as far as most go."""
    lines = [(x, y) for x, y in lines if len(x)]
    if len(lines) > 3:
        lines = as_far_as_most(lines, lambda line: line[0][-1])
        first = max(x[0] for x, _ in lines)
        grid = np.linspace(first, max(first, min(x[-1] for x, _ in lines)), 200)
        y = np.array([np.interp(grid, *line) for line in lines])
        band(axis, grid, y.mean(0), stats.sem(y), look["color"])
        lines = [(grid, y.mean(0))]
    for line in lines:
        axis.plot(*line, **look)


def panels(count: int, columns: int, width: float, height: float) -> tuple[Figure, list]:
    looks = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}
    matplotlib.rcParams.update(looks | {"grid.alpha": 0.25})
    rows = -(-count // columns)
    size = (width * columns, height * rows + 0.5)
    figure = Figure(figsize=size, layout="constrained")  # not pyplot's, which keeps its figures
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[count:]:
        axis.remove()
    return figure, list(axes.flat[:count])


def finish(figure: Figure, section, looks: dict[str, dict[str, Any]]) -> Figure:
    """Legend and axes of steps. `looks`: what lines mean in every variant, by label."""
    entries = []
    for name, runs in section.variants.items():
        label = f"{name} ({len(runs)} run{'s' * (len(runs) > 1)})"
        entries.append(Line2D([], [], lw=4, label=label, color=section.colors[name]))
    for name in section.published:
        if name not in section.variants:
            entries.append(
                Line2D([], [], lw=4, label=f"{name} (0 runs)", color=section.colors[name])
            )
    for label, look in looks.items():
        entries.append(Line2D([], [], label=label, **({"color": "0.25"} | look)))
    longest = max(len(entry.get_label()) for entry in entries)
    columns = max(1, round(12 * figure.get_figwidth()) // (longest + 7))  # 12 letters in an inch
    figure.legend(handles=entries, loc="outside upper center", ncols=columns, frameon=False)
    for axis in figure.axes:
        if not axis.has_data():
            axis.remove()
        elif axis.get_xlabel() in ("environment steps", "gradient updates"):
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))
            axis.set_xlim(left=0)
    return figure


def band(axis, x: np.ndarray, middle: np.ndarray, spread: np.ndarray, color: str) -> None:
    axis.fill_between(x, middle - spread, middle + spread, color=color, alpha=0.18, lw=0)


def procgen_returns(section, published: dict) -> Figure:
    """A panel for each game, one of the curriculum. `published`: by (game, method)."""
    games = sorted({run.task for run in section.runs})
    columns = min(len(games) + 1, 4)
    width = 5.4 if columns < 4 else 3.6
    figure, axes = panels(len(games) + 1, columns, width, 3.7)
    for name, variant in section.variants.items():
        color = section.colors[name]
        for game, axis in zip(games, axes):
            runs = [run for run in variant if run.task == game]
            for run in runs:
                if run.progress:
                    line = smoothed(run, "episodic_return")
                    axis.plot(
                        *line, color=color, lw=1, ls="--", alpha=0.8 if len(runs) < 3 else 0.3
                    )
            runs = [run for run in runs if run.evaluations]
            if runs:
                x, test = averaged(runs, "global_step", "test_return")
                x, train = averaged(runs, "global_step", "train_return")
                of_episodes = (
                    runs[0].evaluations.get("test_return_std", 0)
                    / runs[0].args["eval_episodes"] ** 0.5
                )
                axis.plot(x, train.mean(0), lw=1.2, mfc="white", color=color, **MARKS)
                axis.plot(x, test.mean(0), lw=2.2, color=color, **MARKS)
                band(axis, x, test.mean(0), test.std(0) if len(test) > 1 else of_episodes, color)
        for run in variant:
            if run.args["curriculum"] == "plr" and run.progress:
                steps = run.progress["global_step"]
                axes[-1].plot(steps, run.progress["effective_levels"], color=color, lw=1.2)
    for game, axis in zip(games, axes):
        rows = [published[game, method] for method in section.published.values()]
        rows.sort(key=lambda row: row["mean"])
        for row in rows:
            name = next(x for x in section.published if section.published[x] == row["method"])
            low, high = row["mean"] - row["std"], row["mean"] + row["std"]
            axis.axhline(row["mean"], color=section.colors[name], **PAPER)
            axis.axhspan(low, high, color=section.colors[name], alpha=0.07, lw=0)
            above = {"va": "bottom" if row is rows[-1] else "top", "fontsize": 8.5}
            place = {"transform": axis.get_yaxis_transform(), "color": section.colors[name]}
            axis.text(0.02, row["mean"], f"{name}, paper", **above, **place)
        axis.set(title=game, xlabel="environment steps", ylabel="return per episode")
    axes[-1].set(title="PLR: effective levels, exp(entropy)", xlabel="environment steps")
    most = max(run.args["num_levels"] for run in section.runs)
    axes[-1].set(yscale="log", ylim=(0.9, max(most, 2)))
    axes[-1].yaxis.set_major_formatter("{x:g}")
    looks = {
        "unseen levels": {"lw": 2.2, **MARKS},
        "training levels": {"lw": 1.2, "mfc": "white", **MARKS},
        "episodes of the training, smoothed": {"lw": 1, "ls": "--", "alpha": 0.8},
        "± std over runs, or s.e. over a run's episodes": BAND,
    }
    if section.published:
        looks["paper: unseen levels, 25M steps, ± std"] = PAPER
    return finish(figure, section, looks)


def unseen_curves(section) -> Figure | None:
    """Left: solved rate in unseen mazes of the runs' own kind, mean, standard error and each run.
    Right: how far away the goal is in the mazes that the runs train on. None if no run has measured
    the former."""
    measured = {
        name: [run for run in variant if run.unseen.size]
        for name, variant in section.variants.items()
    }
    if not any(measured.values()):
        return None
    figure, (rates, paths) = panels(2, 2, 5.4, 3.7)
    styles = {"new": ":", "replayed": "-"}
    for name, runs in measured.items():
        color = section.colors[name]
        for run in runs:
            rates.plot(run.evaluations["global_step"], run.unseen, color=color, lw=0.7, alpha=0.4)
        for kind, style in styles.items():
            key = f"shortest_path_{kind}"
            lines = [smoothed(run, key) for run in runs if key in run.progress]
            draw(paths, lines, color=color, ls=style, lw=1.2)
        if runs:
            x, y = averaged(runs, "global_step", UNSEEN)
            rates.plot(x, y.mean(0), lw=2.2, color=color, **MARKS)
            if len(y) > 1:
                band(rates, x, y.mean(0), stats.sem(y), color)
    rates.set(title="unseen mazes: share of episodes solved", ylim=(0, None))
    paths.set(title="mazes trained on: shortest path to the goal", ylim=(0, None))
    for axis in (rates, paths):
        axis.set_xlabel("environment steps")
    looks: dict[str, dict[str, Any]] = {"mean of the runs, ± s.e.": BAND}
    looks |= {f"{kind} mazes": {"ls": style} for kind, style in styles.items()}
    return finish(figure, section, looks)


def maze_curves(section, mazes: list[str], published: dict[str, np.ndarray]) -> Figure:
    """Evaluations over steps and over updates; the training. `published`: rates by curriculum."""
    figure, axes = panels(4, 2, 5.4, 3.7)
    names = [f"solved_{maze}" for maze in mazes] if section.kind == "Mazes" else ["solved_mean"]
    highest = 0.0
    for name, variant in section.variants.items():
        color = section.colors[name]
        runs = [run for run in variant if run.evaluations]
        for axis, key in zip(axes, ("global_step", "gradient_updates")):
            if runs:
                rates = [averaged(runs, key, column) for column in names]
                x = rates[0][0]
                y = np.mean([rate for _, rate in rates], 0)
                axis.plot(x, y.mean(0), lw=2, color=color, **MARKS)
                if len(y) > 1:
                    band(axis, x, y.mean(0), stats.sem(y), color)
                highest = max(highest, y.mean(0).max())
        logged = [run for run in variant if run.progress]
        for kind, style in enumerate(("-", "--")):  # new levels, replayed ones
            lines = [smoothed(x, "solved_rate", x.progress["replay"] == kind) for x in logged]
            draw(axes[2], lines, color=color, ls=style, lw=1)
        logged = [run.progress for run in logged if run.args["curriculum"] != "dr"]
        lines = [(progress["global_step"], progress["effective_levels"]) for progress in logged]
        draw(axes[3], lines, color=color, lw=1)
    for name, curriculum in section.published.items():
        highest = 1.0
        for axis in axes[:2]:
            axis.axhline(published[curriculum].mean(), color=section.colors[name], **PAPER)
    what = f"mean solved rate, dcd's {len(names)} mazes" if len(names) > 1 else "mean solved rate"
    for axis, x in zip(axes, ("environment steps", "gradient updates")):
        axis.set(title=f"over {x}", xlabel=x, ylabel=what, ylim=(0, 1 if highest > 0.3 else None))
    axes[2].set(
        title="solved rate in training, smoothed", ylim=(0, 1.02), ylabel="share of episodes"
    )
    axes[3].set(title="effective number of levels, exp(entropy)", ylabel="levels", ylim=(0, None))
    for axis in axes[2:]:
        axis.set_xlabel("environment steps")
    looks: dict[str, dict[str, Any]] = {"new levels": {"ls": "-"}, "replayed levels": {"ls": "--"}}
    if max(map(len, section.variants.values())) > 1:
        looks["± s.e. over runs"] = BAND
    if section.published:
        looks["dcd, mean of 10 runs after 250M steps"] = PAPER
    return finish(figure, section, looks)


def score_correlations(section) -> Figure | None:
    """How each level score ranks a rollout's levels beside their true regret, over the training: a
    row for each variant, new levels left, replayed ones right. None if no run has measured it."""
    measured = {}
    for name, variant in section.variants.items():
        runs = [run for run in variant if any(x.startswith(CORRELATION) for x in run.progress)]
        if runs:
            measured[name] = runs
    if not measured:
        return None
    columns = [run.progress for runs in measured.values() for run in runs]
    found = dict.fromkeys(x for progress in columns for x in progress if x.startswith(CORRELATION))
    colors = {column: f"C{i}" for i, column in enumerate(found)}
    figure, axes = panels(2 * len(measured), 2, 5.4, 3.7)
    for row, (name, runs) in enumerate(measured.items()):
        for kind, what in enumerate(("new levels", "replayed levels")):
            axis = axes[2 * row + kind]
            if not any((run.progress["replay"] == kind).any() for run in runs):
                axis.remove()  # domain randomisation replays nothing
                continue
            for column, color in colors.items():
                logged = [run for run in runs if column in run.progress]
                lines = [smoothed(x, column, x.progress["replay"] == kind) for x in logged]
                draw(axis, lines, color=color, lw=1.2)
            axis.axhline(0, color="0.6", lw=0.8)
            axis.set(xlabel="environment steps", ylim=(-1, 1), xlim=(0, None))
            axis.set_title(textwrap.fill(f"{name}: {what}", 54), fontsize="medium")
            axis.set_ylabel("rank correlation with true regret")
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    lines = [
        Line2D([], [], lw=3, color=color, label=column.removeprefix(CORRELATION))
        for column, color in colors.items()
    ]
    figure.legend(handles=lines, loc="outside upper center", ncols=5, frameon=False)
    return figure


COMPLEXITY = {  # columns of progress.csv, by what they are
    "walls": "blocks in a maze",
    "shortest_path": "shortest path to the goal, where there is one",
    "solvable": "share of mazes that can be solved",
    "lineage": "edits since a random maze (ACCEL)",
}


def complexity(section) -> Figure | None:
    """What mazes the curricula choose, over the training: new, replayed and edited ones. None if
    no run has measured it."""
    styles = {"new": ":", "replayed": "-", "edited": "--"}
    lines = defaultdict(list)
    for column in COMPLEXITY:
        for name, (kind, style) in itertools.product(section.variants, styles.items()):
            key = f"{column}_{kind}"
            logged = [run for run in section.variants[name] if key in run.progress]
            found = [smoothed(run, key) for run in logged]
            if any(len(x) for x, _ in found):
                look = {"color": section.colors[name], "ls": style, "lw": 1.2}
                lines[column].append((found, look))
    if not lines:
        return None
    figure, axes = panels(len(lines), 2, 5.4, 3.7)
    for axis, (column, drawn) in zip(axes, lines.items()):
        for found, look in drawn:
            draw(axis, found, **look)
        axis.set(title=COMPLEXITY[column], xlabel="environment steps", ylim=(0, None))
    return finish(figure, section, {name: {"ls": style} for name, style in styles.items()})


def maze_bars(section, mazes: list[str], published: dict[str, np.ndarray]) -> Figure | None:
    """Solved rate in dcd's mazes: of each run, and the published mean with its standard error. None
    if no run was evaluated."""
    if not section.evaluated:
        return None
    figure, (axis,) = panels(1, 1, 11, 4)
    names = list(dict.fromkeys([*section.published, *section.evaluated]))
    width = 0.8 / max(len(names), 1)
    for i, name in enumerate(names):
        color = section.colors[name]
        where = np.arange(len(mazes)) + width * (i - (len(names) - 1) / 2)
        for run in section.evaluated.get(name, []):
            rates = [run.solved.get(maze, np.nan) for maze in mazes]
            axis.plot(where - width / 5, rates, "o", ms=6, color=color, alpha=0.6, mew=0)
        if name in section.published:
            rates = published[section.published[name]]
            axis.plot(where + width / 5, rates, "D", ms=3, color=color, alpha=0.3, mew=0)
            bars = {"fmt": "D", "ms": 4, "mfc": "white", "color": color}
            axis.errorbar(where + width / 5, rates.mean(1), stats.sem(rates, axis=1), **bars)
    axis.set(ylabel="share of episodes solved", ylim=(-0.03, 1.03))
    axis.set_xticks(range(len(mazes)), mazes)
    looks: dict[str, dict[str, Any]] = {"a run": {"ls": "", "marker": "o", "alpha": 0.6, "mew": 0}}
    if section.published:
        looks["dcd after 250M steps: a run"] = {"ls": "", "marker": "D", "ms": 3, "alpha": 0.4}
        looks["mean ± s.e."] = {"ls": "", "marker": "D", "ms": 4, "mfc": "white"}
    return finish(figure, section, looks)


def worst_case(section, published: dict[tuple[str, str], dict[str, Any]]) -> Figure:
    """Solved rate in the worst alpha % of random mazes: what --eval-worst has measured in the
    runs. `published`: rates by (method, source), whose columns are alpha."""
    figure, (axis,) = panels(1, 1, 11, 5)
    for name, members in section.variants.items():
        rates = [x.worst_case for x in members if x.worst_case]
        rates = [dict(zip(x["alpha_percent"], x["solved_rate"])) for x in rates]
        if rates:
            alphas = sorted(set.intersection(*map(set, rates)))
            y = np.array([[x[alpha] for alpha in alphas] for x in rates])
            label = textwrap.fill(f"{name} ({len(y)} run{'s' * (len(y) > 1)})", 34)
            color = section.colors[name]
            axis.plot(alphas, y.mean(0), lw=2.5, zorder=3, color=color, label=label, **MARKS)
            if len(y) > 1:
                band(axis, alphas, y.mean(0), stats.sem(y), color)
    methods, sources = (list(dict.fromkeys(names)) for names in zip(*published))
    for (method, source), row in published.items():
        known = {float(key): x for key, x in row.items() if isinstance(x, float)}
        look = {"ls": ("--", ":")[sources.index(source)], "lw": 1.2}
        look["color"] = matplotlib.colormaps["tab20"](methods.index(method))
        axis.plot(known.keys(), known.values(), label=f"{method}, {source}", **look)
    axis.set(xscale="log", xlabel="alpha %: the worst share of the mazes", ylim=(0, 1.02))
    axis.set(ylabel="share of episodes solved", title=f"{section.title}: the worst mazes")
    axis.xaxis.set_major_formatter("{x:g}")
    figure.legend(loc="outside right upper", frameon=False)
    return figure
