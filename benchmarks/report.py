"""Tables and pictures of training runs beside the published numbers, from their small files alone.

    python benchmarks/report.py           # benchmarks/results/REPORT.md, pictures, README's tables
    python benchmarks/report.py runs/A runs/B --out /tmp/ab   # of any runs, also unfinished ones

Runs of one length stand side by side; what they lack of the published ones stands above the table.
"""

import functools
import itertools
import re
from collections import defaultdict
from collections.abc import Container, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import plots
import tyro
from collect import settings, whose
from common import ROOT, RUNS, UNSEEN, markdown, refuse
from runs import (
    MAZES,
    NAMES,
    PROCGEN,
    SEVEN,
    SHOWN,
    WORST_CASE,
    Run,
    Section,
    published_rates,
    read_run,
    sections,
)
from scipy import stats


@dataclass
class Args:
    run_dirs: Annotated[
        tuple[Path, ...], tyro.conf.Positional
    ] = ()  # none: benchmarks/results/runs
    out: Path = RUNS.parent  # folder for REPORT.md and pictures/


# ---- statistics ----------------------------------------------------------------------------------


class Sample(NamedTuple):
    """n independent runs by their mean and standard deviation (ddof 1)."""

    mean: float
    std: float
    n: int


def sample(values: Iterable[float]) -> Sample:
    x = np.array(list(values), float)
    return Sample(x.mean(), x.std(ddof=1) if len(x) > 1 else np.nan, len(x))


def welch(a: Sample, b: Sample) -> float:
    """Two-sided p value of Welch's t-test for equal means; nan without two runs, or spread."""
    if min(a.n, b.n) < 2 or a.std == b.std == 0:
        return np.nan
    return stats.ttest_ind_from_stats(*a, *b, equal_var=False).pvalue


def iqm(values: np.ndarray) -> float:
    """Interquartile mean: without the lowest and the highest quarter (Agarwal et al. 2021)."""
    return stats.trim_mean(np.ravel(values), 0.25)


def bootstrap_interval(strata: list[np.ndarray], paired: bool = False) -> tuple[float, float]:
    """95 % percentile interval of the IQM over all strata (games, mazes), each an array (runs,).

    Runs are drawn again with replacement: within each stratum (Agarwal et al. 2021), or `paired`,
    where a run is in every stratum (a policy plays all mazes), the same ones in all. (nan, nan)
    from fewer than five runs: too few to say.
    """
    if min(map(len, strata)) < 5:
        return np.nan, np.nan

    def statistic(*drawn: np.ndarray, axis: int) -> np.ndarray:
        return stats.trim_mean(np.concatenate(drawn, axis), 0.25, axis)

    how = {"n_resamples": 5000, "method": "percentile", "paired": paired}
    result = stats.bootstrap(strata, statistic, rng=np.random.default_rng(0), **how)
    return tuple(result.confidence_interval)


def normalized_returns(returns: dict[str, np.ndarray], uniform: dict[str, float]) -> np.ndarray:
    """The PLR paper's score of each run in percent (runs,): its return over the uniform baseline's
    mean, averaged over the games. By game: returns (runs,); uniform's mean over its runs."""
    return 100 * np.mean([returns[game] / uniform[game] for game in returns], axis=0)


def published_return(game: str, method: str) -> Sample:
    """The PLR paper's std has ddof 0, and one digit."""
    row = PROCGEN[game, method]
    n = int(row["runs"])
    return Sample(row["mean"], row["std"] * (n / (n - 1)) ** 0.5, n)


# ---- tables --------------------------------------------------------------------------------------


def number(x: float, digits: int, sign: str = "") -> str:
    return f"{round(x, 9):{sign}.{digits}f}".replace("-", "−")


def plus_minus(mean: float, spread: float, digits: int) -> str:
    """The spread is left out where there is none."""
    text = number(mean, digits)
    return text if np.isnan(spread) else f"{text} ± {number(spread, digits)}"


def with_interval(strata: list[np.ndarray], digits: int, paired: bool = False) -> str:
    """IQM over all strata, and its interval."""
    low, high = bootstrap_interval(strata, paired)
    text = number(iqm(np.concatenate(strata)), digits)
    return text if np.isnan(low) else f"{text} [{number(low, digits)}, {number(high, digits)}]"


def gap(a: Sample, b: Sample, digits: int, p_digits: int = 3) -> str:
    """Of their means, and Welch's p."""
    p = welch(a, b)
    text = number(a.mean - b.mean, digits, "+")
    if np.isnan(p):
        return text
    return text + (", p < 0.001" if p < 0.001 else f", p {number(p, p_digits)}")


# Does the first curriculum beat the second?
QUESTIONS = (
    ("plr", "uniform"),
    ("plr", "dr"),
    ("robust_plr", "dr"),
    ("robust_plr", "plr"),
    ("accel", "dr"),
    ("accel", "robust_plr"),
)
BASELINES = ("uniform", "dr")
OF_CURRICULA = {
    "curriculum", "replay_prob", "buffer_size", "score", "gate_unsolved", "score_transform",
    "temperature", "staleness_coef", "replay_schedule", "rho", "nu", "alpha", "num_edits",
    "accel_base",
}  # fmt: skip
TOO_FEW = "not enough runs to say"
# what README's table is of, by their files: the papers' tasks, and the one at its top. All other
# questions are in REPORT.md only
OF_README = ("procgen_2M", "mazes_1.6M", "mazes_8.2M", "mazes_of_41_x_41_cells_225_blocks_0.82M")


def without_curriculum(run: Run) -> dict[str, Any]:
    return {name: x for name, x in settings(run.args).items() if name not in OF_CURRICULA}


def difference_of_means(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """a, b (runs,): the difference of their means, and its 95 % interval by Welch's t; nan without
    two runs of each, or spread."""
    difference = a.mean() - b.mean()
    if min(len(a), len(b)) < 2 or a.std() == b.std() == 0:
        return difference, np.nan, np.nan
    interval = stats.ttest_ind(a, b, equal_var=False).confidence_interval()
    return difference, interval.low, interval.high


def within_seeds(a: dict[int, float], b: dict[int, float]) -> tuple[float, float]:
    """By seed: 95 % interval of the mean difference (paired t). Runs of one seed begin with the
    same network and the same levels, DR and PLR are one run until replay begins. nan for other
    seeds, without two of them, or spread."""
    differences = [a[seed] - b[seed] for seed in a.keys() & b.keys()]
    if a.keys() != b.keys() or len(a) < 2 or np.std(differences) == 0:
        return np.nan, np.nan
    interval = stats.ttest_1samp(differences, 0).confidence_interval()
    return interval.low, interval.high


def answer(low: float, high: float) -> str:
    if low > 0:
        return "yes"
    return "no: worse" if high < 0 else TOO_FEW


def is_different(low: float, high: float) -> str:
    """Of ours minus another's, or ours changed; that they are equal no interval says."""
    if low > 0:
        return "yes: ours is better"
    return "yes: ours is worse" if high < 0 else TOO_FEW


def foreign(run: Run) -> int:
    """0: of our scripts as they are, 1: with something changed, 2: of another's code."""
    return 1 if whose(run.args).startswith("ours ") else 2 * bool(whose(run.args))


def same_implementation(a: Run, b: Run) -> bool:
    return a.implementation == b.implementation


def to_be_compared(better: Run, baseline: Run) -> bool:
    """Two curricula of one implementation, or ours and another's of one curriculum; other settings
    equal. Ours first: as it is, then with something changed."""
    curricula = better.args["curriculum"], baseline.args["curriculum"]
    if same_implementation(better, baseline):
        alike = without_curriculum(better) == without_curriculum(baseline)
        return alike and curricula in QUESTIONS
    alike = settings(better.args) == settings(baseline.args)
    return alike and curricula[0] == curricula[1] and foreign(better) < foreign(baseline)


def question(
    section: Section, measured: str, better: Run, baseline: Run, brief: bool
) -> tuple[str, str]:
    """Of two variants, by a run of each: where, and what is asked. The settings that both have
    stand in the first, or not at all if it is to be brief; nor does the buffer's size then."""
    names = better.variant.split(", "), baseline.variant.split(", ")
    shared = [x for x in names[0] if x in names[1]]
    of_levels = ("num_walls ", "maze_size ") if section.levels else ()  # the title has them
    of_all = ", ".join(x for x in section.common.split(", ") if not x.startswith(of_levels))
    measured = "" if section.title.startswith(measured) else measured
    common = () if brief else (of_all, *shared)
    where = ", ".join(x for x in (section.title, *common, measured) if x)
    if brief:
        shared += [x for words in names for x in words if x.startswith("buffer_size ")]
    a, b = (", ".join(x for x in words if x not in shared) for words in names)
    if same_implementation(better, baseline):
        return where, f"does {a} beat {b}?"
    return where, f"is our {a} different from {b}?"


def questions(section: Section, brief: bool = False) -> list[list[str]]:
    """A row for each comparison of two curricula that the finished runs of one length allow, other
    settings equal: at equal steps and, where they differ, at equal gradient updates. And one for
    each curriculum of ours and of another implementation, at equal steps. A row begins with the two
    parts of its `question`."""
    rows = []
    digits = 2 if section.kind == "Procgen" else 3
    for task in section.tasks:
        found = section.of_task(task).items()
        found = [(name, runs) for name, runs in found if all(run.finished for run in runs)]
        for (better, runs), (baseline, others) in itertools.permutations(found, 2):
            if not to_be_compared(runs[0], others[0]):
                continue
            pair = runs[0].args["curriculum"], others[0].args["curriculum"]
            if brief and same_implementation(runs[0], others[0]) and pair[1] not in BASELINES:
                continue
            same = same_implementation(runs[0], others[0])
            counts = [run.last.get("gradient_updates", np.nan) for run in (*runs, *others)]
            updates = f"{min(counts):,.0f} updates"
            final = [[run.score for run in x] for x in (runs, others)]
            both = (*runs, *others)
            has_unseen = all(run.unseen.size for run in both)
            evaluated_at = {tuple(run.evaluations.get("global_step", ())) for run in both}
            scores = {}  # of the runs, by what they were measured on and what was equal
            if runs[0].args["total_timesteps"] == others[0].args["total_timesteps"]:
                scores[task, "steps"] = final
                random_mazes = {run.worst_mazes for run in both}
                if len(random_mazes) == 1 and 0 not in random_mazes:
                    of_random = [[run.random_mazes for run in x] for x in (runs, others)]
                    scores["random mazes", "steps"] = of_random
                if has_unseen:
                    last = [[run.solved["Unseen"] for run in x] for x in (runs, others)]
                    scores["unseen mazes", "steps"] = last
                if has_unseen and len(evaluated_at) == 1:
                    mean = [[run.unseen.mean() for run in x] for x in (runs, others)]
                    scores["unseen mazes, mean of the evaluations", "steps"] = mean
            elif same and max(counts) < 1.05 * min(counts):
                scores[task, updates] = final
            if same and max(counts) > 1.05 * min(counts):
                at = [[run.score_at(min(counts)) for run in x] for x in (runs, others)]
                scores[task, updates] = at
                if has_unseen:
                    of_unseen = functools.partial(Run.score_at, names=[UNSEEN])
                    at = [[of_unseen(run, min(counts)) for run in x] for x in (runs, others)]
                    scores["unseen mazes", updates] = at
            if brief and section.levels and {measured for measured, _ in scores} != {task}:
                scores = {key: x for key, x in scores.items() if key[0] != task}
            elif brief:
                scores = {key: x for key, x in scores.items() if key[0] == task}
            if brief and runs[0].implementation:  # not ours
                scores = {key: x for key, x in scores.items() if key[1] == "steps"}
            known = {better, baseline} <= section.published.keys()
            for (measured, equal), (a, b) in scores.items():
                if np.isnan([*a, *b]).any():
                    continue  # evaluated too late to say
                difference, *interval = difference_of_means(np.array(a), np.array(b))
                row = [*question(section, measured, runs[0], others[0], brief), equal]
                row += [f"{len(a)}, {len(b)}", number(difference, digits, "+")]
                paired = np.nan, np.nan
                if same:
                    seeds = [[run.args["seed"] for run in x] for x in (runs, others)]
                    paired = within_seeds(dict(zip(seeds[0], a)), dict(zip(seeds[1], b)))
                row += [interval_cell(*x, digits) for x in (interval, paired)]
                known_here = known and (measured, equal) == (task, "steps")
                row += [published_gap(section, task, *pair) if known_here else "–"]
                rows.append([*row, (answer if same else is_different)(*interval)])
    return rows


def interval_cell(low: float, high: float, digits: int) -> str:
    low_and_high = number(low, digits, "+"), number(high, digits, "+")
    return "–" if np.isnan(low) else f"[{', '.join(low_and_high)}]"


def published_score(section: Section, task: str, curriculum: str) -> Sample:
    if section.kind == "Procgen":
        return published_return(task, curriculum)
    return sample(published_rates(curriculum).mean(0))


def published_gap(section: Section, task: str, better: str, baseline: str) -> str:
    digits = (1, 2) if section.kind == "Procgen" else (3, 3)
    theirs = [published_score(section, task, curriculum) for curriculum in (better, baseline)]
    return gap(*theirs, *digits)


def questions_table(found: Iterable[Section], brief: bool = False) -> str:
    """Brief: only what has an interval, and a baseline or another implementation, without the
    settings, the interval within seeds and the published numbers; of the usual mazes dcd's mean
    only, of others no mean of dcd's where there is more; of another implementation's own curricula
    only at equal steps."""
    head = ["question", "at equal", "runs", "difference", "95 % interval", "within seeds"]
    head += ["published", "answer"]
    rows = [row for section in found for row in questions(section, brief)]
    if not brief:
        rows = [[f"{where}: {asked}", *cells] for where, asked, *cells in rows]
        return markdown([head, *rows]) if rows else ""
    rows = [[*row[:6], row[8]] for row in rows if row[5] != "–"]
    table = [["where", *head[:5], head[7]]]
    for where in dict.fromkeys(row[0] for row in rows):
        of_it = [cells for place, *cells in rows if place == where]
        table += [[where if cells is of_it[0] else "", *cells] for cells in of_it]
    return markdown(table, left=2) if rows else ""


def beside_published(section: Section) -> str:
    """Our scores minus the published ones, where the runs are as long."""
    rows = [["ours − published", "difference"]]
    digits = (2, 2) if section.kind == "Procgen" else (3, 3)
    for task in section.tasks if section.is_as_long else ():
        for name, runs in section.of_task(task).items():
            if name in section.published and all(run.finished for run in runs):
                ours = sample(run.score for run in runs)
                theirs = published_score(section, task, section.published[name])
                rows.append([f"{task}: {name}", gap(ours, theirs, *digits)])
    return markdown(rows) if rows[1:] else ""


def returns_cell(runs: list[Run], *kinds: str) -> str:
    """Of the mean return on test or train levels, or of the first kind's minus the second's."""
    values = [np.array([run.last[f"{kind}_return"] for run in runs]) for kind in kinds]
    means = values[0] if len(kinds) == 1 else values[0] - values[1]
    variances = [runs[0].last[f"{kind}_return_std"] ** 2 for kind in kinds]
    of_episodes = (sum(variances) / runs[0].last["episodes"]) ** 0.5
    return plus_minus(means.mean(), means.std() if len(runs) > 1 else of_episodes, 2)


def procgen_returns(section: Section) -> str:
    rows = [["game", "curriculum", "training levels", "unseen levels", "gap", "unseen, paper"]]
    for game in section.tasks:
        for name, runs in section.of_task(game).items():
            kinds = ["train"], ["test"], ["train", "test"]
            paper = PROCGEN.get((game, section.published.get(name, "")))
            text = plus_minus(paper["mean"], paper["std"], 1) if paper else "–"
            rows.append([game, name, *(returns_cell(runs, *x) for x in kinds), text])
    return markdown(rows, left=2)


def procgen_summary(section: Section) -> str:
    """The paper's: returns over uniform's, over the games that both have, as many runs of each."""
    rows = [["% of uniform's return", "mean over games", "IQM", "paper, these games", "paper, all"]]
    every = {game: section.of_task(game) for game in section.tasks}
    for name in section.evaluated:
        games = [game for game in every if {name, "uniform"} <= every[game].keys()]
        baseline = {x: np.mean([run.score for run in every[x]["uniform"]]) for x in games}
        if not games or min(baseline.values()) <= 0:
            continue
        n = min(len(every[game][name]) for game in games)
        returns = {x: np.array([run.score for run in every[x][name][:n]]) for x in games}
        normalised = normalized_returns(returns, baseline)
        spread = normalised.std() if n > 1 else np.nan
        strata = [100 * returns[game] / baseline[game] for game in games]
        cells = [plus_minus(normalised.mean(), spread, 1), with_interval(strata, 1), "–", "–"]
        if name in section.published:
            method = section.published[name]
            means = {game: PROCGEN[game, method]["mean"] for game in games}
            theirs = {game: PROCGEN[game, "uniform"]["mean"] for game in games}
            cells[2] = number(normalized_returns(means, theirs), 1)
            row = PROCGEN["normalized_percent", method]
            cells[3] = plus_minus(row["mean"], row["std"], 1)
        rows.append([name, *cells])
    return markdown(rows) if rows[1:] else ""


def rates_cell(rates: Iterable[float]) -> str:
    """Over runs: mean ± standard error."""
    x = np.array([rate for rate in rates if not np.isnan(rate)])
    return plus_minus(x.mean(), stats.sem(x) if len(x) > 1 else np.nan, 3) if len(x) else "–"


LACKING = """
† In these runs the maze lacked a block, in our evaluation and in that of jaxued's networks (code
from c44dc72 on, mended in 197db68): Maze2's shortest path was 52 cells, not 56, and one room of
SixteenRoomsFewerDoors had a second door. The mean of dcd's seven has this Maze2 in it.
"""


def maze_rates(section: Section) -> str:
    names = dict.fromkeys(maze for run in section.runs for maze in run.solved)
    mazes = sorted(names, key=lambda maze: maze not in SEVEN)  # dcd's first
    lacking = {maze for run in section.runs for maze in run.lacking}
    named = [f"{maze} †" if maze in lacking else maze for maze in mazes]
    columns = [["share of episodes solved", *named]]
    for name in dict.fromkeys([*section.published, *section.evaluated]):
        runs = section.evaluated.get(name, [])
        if runs:
            rates = [[run.solved.get(maze, np.nan) for run in runs] for maze in mazes]
            columns.append([name, *map(rates_cell, rates)])
        if name in section.published:
            curriculum = section.published[name]
            known = [[x] if (x, curriculum) in MAZES else [] for x in mazes]
            cells = [rates_cell(published_rates(curriculum, x).ravel()) for x in known]
            columns.append([f"{name}, dcd", *cells])
    return markdown(zip(*columns)) + (LACKING if lacking else "")


def maze_summary(found: list[Section]) -> str:
    """Every curriculum and length in a row, dcd's below; what ours lack above."""
    text = ""
    rows = [["method, steps", "gradient updates", "mean of dcd's 7 mazes", "IQM of dcd's 7 mazes"]]
    rows[0].append("mean of dcd's 7, last quarter of the evaluations")
    for section in found:
        text += section.shortcomings()
        for name, runs in section.evaluated.items():
            updates = np.mean([run.last.get("gradient_updates", np.nan) for run in runs])
            rates = [np.array([run.solved.get(maze, np.nan) for run in runs]) for maze in SEVEN]
            known = not np.isnan(rates).any()
            middle = with_interval(rates, 3, paired=True) if known else "–"
            means = [rates_cell([getattr(run, x) for run in runs]) for x in ("score", "late_score")]
            rows.append(
                [f"{name}, {section.length}", f"{updates:,.0f}", means[0], middle, means[1]]
            )
    for curriculum in SHOWN["Mazes"]:
        rates = published_rates(curriculum)
        middle = with_interval(list(rates), 3, paired=True)
        name = f"{NAMES[curriculum]}, dcd: 250M, 10 runs"
        rows.append([name, "–", rates_cell(rates.mean(0)), middle, "–"])
    return text + markdown(rows)


# what a curriculum replays, by column of progress.csv: title, digits
OF_REPLAYS = {
    "replay": ("share of rollouts", 2),
    "solved_rate": ("episodes solved", 2),
    "walls_replayed": ("blocks", 1),
    "shortest_path_replayed": ("shortest path", 1),
    "effective_levels": ("effective levels, exp(entropy)", 1),
    "score_mean": ("mean score of the buffer", 3),
    "staleness_mean": ("mean staleness", 0),
}


def late_mean(run: Run, column: str) -> float:
    """Over the iterations in the last quarter of the run, for the solved rate the replayed ones."""
    late = run.progress["global_step"] > 0.75 * run.progress["global_step"][-1]
    values = run.progress.get(column, np.full(len(late), np.nan))[late]
    if column == "solved_rate":
        values = values[run.progress["replay"][late] == 1]
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else np.nan


def replays_table(section: Section) -> str:
    """What the curricula of one length replay, and their buffers; mean and standard error over
    the runs."""
    rows = [
        ["replayed levels, last quarter of the run", *(title for title, _ in OF_REPLAYS.values())]
    ]
    for name, runs in section.evaluated.items():
        if any(run.progress["replay"].any() for run in runs):
            row = [name]
            for column, (_, digits) in OF_REPLAYS.items():
                found = sample(late_mean(run, column) for run in runs)
                row.append(plus_minus(found.mean, found.std / found.n**0.5, digits))
            rows.append(row)
    return markdown(rows) if rows[1:] else ""


# ---- the report ----------------------------------------------------------------------------------

FIRST = """\
# Training runs beside the published numbers

Written by `python benchmarks/report.py` from the folders in `runs/`; do not edit. Runs of one
length stand side by side. What they lack of the published 10 runs, 25M steps (mazes: 250M) and 100
episodes stands once above their tables, and holds for every number below it.

**Procgen.** Return per episode of the final policy, stochastic; ± is the standard deviation over
runs (ddof 0), as in Table 2 of the PLR paper, and of a single run the standard error over its
episodes. % of uniform's: each run's return over the uniform baseline's mean, averaged over the
games; IQM: over games and runs together.

**Mazes.** Share of episodes solved zero-shot, stochastic policy; ± is the standard error over runs
(ddof 1). Of a single run's 100 episodes in a maze the standard error is up to 0.05, and one run may
always solve a maze that another never does. dcd's columns are computed from its per-seed results.
IQM: over mazes and runs together. One checkpoint of one run says little: the last column has the
mean over the evaluations in the last quarter of the run. Of what is replayed there 200 iterations
of a run are kept, 50 of its last quarter.

[95 % intervals], from five runs on: bootstrap; in Procgen runs are drawn anew within each game, in
mazes whole runs, since one run plays all mazes. Of a question: Welch's t. Within seeds: paired t,
where both sides have the same seeds; runs of one seed begin with the same network and levels, and
DR and PLR are one run until replay begins. The answer is by the former. p: Welch's t-test,
two-sided, not corrected for the number of tests; the paper's follow from rounded numbers. Where a
curriculum has finished runs, those that go on are in the pictures only. Robust PLR's new levels are
steps without updates.
"""


def place_of(start: dict[str, Any]) -> str:
    return f"{start.get('commit', 'unknown')} on {start.get('machine', 'unknown')}"


def places_of(starts: list[dict[str, Any]]) -> list[str]:
    """Where a run's slices ran; those that follow one another at one place together."""
    places = []
    for place, group in itertools.groupby(starts, place_of):
        first, *others = group
        step = first.get("from_step", 0)
        after = f" from step {step:,}" if step else ""
        count = f" in {len(others) + 1} slices" if others else ""
        places.append(f"{place}{after}{count}")
    return places


def origin_of(run: Run) -> str:
    starts = run.origin.get("starts", [{"command": "not recorded"}])
    steps = f"{run.last['global_step']:,.0f} steps"
    if not run.finished:
        last = run.progress["global_step"][-1] if run.progress else 0
        steps = f"{last:,.0f} of {run.args['total_timesteps']:,} steps, unfinished"
    made = f"`{starts[0]['command']}`; commit {', then '.join(places_of(starts))}; {steps}."
    return f"- **{run.name}**: {made} {run.origin.get('note', '')}".strip() + "\n"


def report(
    run_dirs: Iterable[Path], of_readme: Container[str] | None = None
) -> tuple[str, dict[str, plots.Figure], dict[str, str]]:
    """REPORT.md, its pictures by name, and the tables of README.md by name. `of_readme`: the
    sections, by their files, that the table of questions there is of; all if None."""
    runs = [read_run(run_dir) for run_dir in sorted(run_dirs)]
    found = sections(runs)
    shown = [section for section in found if of_readme is None or section.file in of_readme]
    blocks = {"questions": questions_table(shown, brief=True)}
    rates = {curriculum: published_rates(curriculum) for curriculum in SHOWN["Mazes"]}
    pictures = {}
    text = FIRST
    for section in found:
        if section.kind == "Procgen":
            drawn = {"": plots.procgen_returns(section, PROCGEN)}
            tables = [procgen_returns(section), procgen_summary(section)]
            tables += [questions_table([section]), beside_published(section)]
        else:
            drawn = {"": plots.maze_curves(section, SEVEN, rates)}
            rates_of_mazes = maze_rates(section) if section.evaluated else ""
            tables = [rates_of_mazes, questions_table([section]), beside_published(section)]
        if section.kind == "Mazes":
            drawn["_unseen"] = plots.unseen_curves(section)
            drawn["_by_maze"] = plots.maze_bars(section, SEVEN, rates)
            if any(run.worst_case for run in section.runs):
                drawn["_worst_case"] = plots.worst_case(section, WORST_CASE)
            tables.insert(1, maze_summary([section]).removeprefix(section.shortcomings()))
            tables.append(replays_table(section))
            drawn["_complexity"] = plots.complexity(section)
            drawn["_score_correlations"] = plots.score_correlations(section)
        made: dict[str, list[str]] = defaultdict(list)
        for run in section.runs:
            made[run.made].append(run.variant)
        code = "; ".join(f"{', '.join(dict.fromkeys(x))}: {how}" for how, x in made.items())
        common = f"All with {section.common}. " if section.common else ""
        text += f"\n## {section.title}\n\n{common}{code}.\n"
        for part, figure in drawn.items():
            if figure is None:
                continue
            name = f"{section.file}{part}.png"
            pictures[name] = figure
            text += f"\n![{section.title}{part.replace('_', ' ')}](pictures/{name})\n"
        block = section.shortcomings() + "\n".join(x for x in tables if x)
        blocks[section.file] = block
        text += f"\n{block}" if block else ""
    return f"{text}\n## The runs\n\n{''.join(map(origin_of, runs))}", pictures, blocks


def with_tables(readme: str, blocks: dict[str, str]) -> str:
    """What stands between <!-- report: NAME --> and <!-- end --> replaced by that block."""

    def replaced(match: re.Match) -> str:
        if match[2] not in blocks:
            refuse(f"README.md has a table {match[2]}, which must be one of {', '.join(blocks)}.")
        return f"{match[1]}\n\n{blocks[match[2]]}\n{match[3]}"

    pattern = r"(<!-- report: (\S+) -->)\n.*?(<!-- end -->)"
    return re.sub(pattern, replaced, readme, flags=re.DOTALL)


def main() -> None:
    args = tyro.cli(Args)
    for run_dir in args.run_dirs:
        if not (run_dir / "args.json").exists():
            refuse(f"RUN-DIRS {run_dir} must be a run's directory: it has no args.json.")
    run_dirs = args.run_dirs or [path.parent for path in RUNS.glob("*/args.json")]
    text, pictures, blocks = report(run_dirs, OF_README)
    committed = args.out.resolve() == RUNS.parent
    folder = args.out / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png") if committed else ():
        old.unlink()
    for name, figure in pictures.items():
        figure.savefig(folder / name, dpi=100)
    (args.out / "REPORT.md").write_text(text)
    if committed and not args.run_dirs:
        readme = ROOT / "README.md"
        readme.write_text(with_tables(readme.read_text(), blocks))
    print(args.out / "REPORT.md")


if __name__ == "__main__":
    main()
