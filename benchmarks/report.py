"""Tables and pictures of training runs beside the published numbers, from the runs' small files alone.

    python benchmarks/report.py                              # benchmarks/results/REPORT.md, pictures, README's tables
    python benchmarks/report.py runs/A runs/B --out /tmp/ab  # the same of any run directories, also of runs that go on

Runs of one length stand side by side. A number from fewer runs, steps or episodes than the published one says so.
"""

import csv
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import matplotlib
import numpy as np
import tyro
from collect import millions, settings
from common import ROOT, RUNS, refuse
from scipy import stats

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FuncFormatter, NullFormatter

PAPER = ROOT / "benchmarks" / "paper"
NAMES = {"uniform": "uniform", "sequential": "sequential", "dr": "DR", "plr": "PLR", "robust_plr": "Robust PLR"}
CURRICULA = {name: curriculum for curriculum, name in NAMES.items()}
COLORS = {"uniform": "0.45", "dr": "0.45", "sequential": "C2", "plr": "C0", "robust_plr": "C3"}
MORE_COLORS = ("C1", "C4", "C2", "C6", "C9", "C8", "C5")  # of variants with other settings


@dataclass
class Args:
    run_dirs: Annotated[
        tuple[Path, ...], tyro.conf.Positional
    ] = ()  # run directories; none: all in benchmarks/results/runs
    out: Path = RUNS.parent  # folder for REPORT.md and pictures/


# ---- statistics ------------------------------------------------------------------------------------------------------


class Sample(NamedTuple):
    """n independent runs by their mean and standard deviation (ddof 1)."""

    mean: float
    std: float
    n: int


def sample(values: Iterable[float]) -> Sample:
    x = np.array(list(values), float)
    return Sample(x.mean(), x.std(ddof=1) if len(x) > 1 else np.nan, len(x))


def welch(a: Sample, b: Sample) -> float:
    """Two-sided p value of Welch's t-test for equal means; nan if a sample has a single run or neither has spread."""
    if min(a.n, b.n) < 2 or a.std == b.std == 0:
        return np.nan
    return stats.ttest_ind_from_stats(*a, *b, equal_var=False).pvalue


def iqm(values: np.ndarray) -> float:
    """Interquartile mean: the mean of what is left without the lowest and the highest quarter (Agarwal et al. 2021)."""
    return stats.trim_mean(np.ravel(values), 0.25)


def bootstrap_interval(strata: list[np.ndarray], paired: bool = False, resamples: int = 5000) -> tuple[float, float]:
    """95 % percentile interval of the IQM over all strata (games, mazes), each an array (runs,). Runs are drawn again
    with replacement: within each stratum (Agarwal et al. 2021), or `paired`, where a run is in every stratum (a policy
    plays all mazes), the same ones in all. (nan, nan) from fewer than five runs: too few to say."""
    if min(map(len, strata)) < 5:
        return np.nan, np.nan

    def statistic(*drawn: np.ndarray, axis: int) -> np.ndarray:
        return stats.trim_mean(np.concatenate(drawn, axis), 0.25, axis)

    rng = np.random.default_rng(0)
    result = stats.bootstrap(strata, statistic, n_resamples=resamples, method="percentile", paired=paired, rng=rng)
    return tuple(result.confidence_interval)


def normalized_returns(returns: dict[str, np.ndarray], uniform: dict[str, float]) -> np.ndarray:
    """The PLR paper's score of each run in percent (runs,): its return over the uniform baseline's mean, averaged over
    the games. Arguments by game: returns (runs,), the same number in each; uniform's mean over its runs."""
    return 100 * np.mean([returns[game] / uniform[game] for game in returns], axis=0)


# ---- runs and published numbers --------------------------------------------------------------------------------------


@dataclass
class Run:
    name: str
    args: dict[str, Any]
    started: dict[str, Any]  # run.json
    progress: dict[str, np.ndarray]  # the csv files' columns
    evaluations: dict[str, np.ndarray]
    finished: bool
    steps: int  # at the last evaluation: environment steps, gradient updates (mazes), that evaluation, its episodes
    updates: float
    evaluation: dict[str, Any]
    episodes: int
    variant: str  # as the tables call it

    def __getitem__(self, flag: str) -> Any:
        return self.args[flag]

    @property
    def made(self) -> tuple[str, str]:
        """Precision, commits."""
        commits = dict.fromkeys(start.get("commit", "unknown") for start in self.started.get("starts", [{}]))
        return f"{self['precision']}{', compiled' * self['compile']}", f"code of {' and '.join(commits)}"

    @property
    def kind(self) -> str:
        return {"maze": "Mazes"}.get(self["env_id"], self["env_id"]) if "num_walls" in self.args else "Procgen"


def read_csv(path: Path) -> dict[str, np.ndarray]:
    """Columns as float arrays, nothing if there is no row yet; the last row may be half written."""
    text = path.read_text() if path.exists() else ""
    rows = list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))
    return {key: np.array([float(row[key]) for row in rows]) for key in rows[0]} if rows else {}


def read_run(run_dir: Path) -> Run:
    try:
        args = json.loads((run_dir / "args.json").read_text())
        progress, evaluations = read_csv(run_dir / "progress.csv"), read_csv(run_dir / "evaluations.csv")
        started, result = (
            json.loads((run_dir / name).read_text()) if (run_dir / name).exists() else {}
            for name in ("run.json", "result.json")
        )
        found = [{key: column[-1] for key, column in evaluations.items()} | {"episodes": args["eval_episodes"]}]
        if result:
            found = [result["evaluation"] | result | {"episodes": args["eval_episodes"]}]
        for later in (json.loads(file.read_text()) for file in run_dir.glob("evaluation_*.json")):  # by --evaluate
            if settings(later["args"]) == settings(args):  # earlier scripts did not write at which step
                then = {key: result[key] for key in ("global_step", "gradient_updates") if key in result}
                found.append(then | later | {"episodes": later["args"]["eval_episodes"]})
    except (OSError, ValueError, KeyError) as error:
        refuse(f"RUN-DIRS {run_dir} has a file that cannot be read: {error!r}.")
    last = max(found, key=lambda x: (x.get("global_step", 0), x["episodes"]))
    others = {key: value for key, value in settings(args).items() if key not in ("precision", "compile")}
    return Run(
        run_dir.resolve().name, args, started, progress, evaluations, bool(result), int(last.get("global_step", 0)),
        last.get("gradient_updates", np.nan), last if "global_step" in last else {}, last["episodes"],
        ", ".join([NAMES[args["curriculum"]], *(f"{key} {value}" for key, value in others.items())]),
    )  # fmt: skip


def read_paper(file: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Published rows by (game or maze, method)."""
    with open(PAPER / file, newline="") as text:
        rows = list(csv.reader(text))
    rows = [{key: float(x) if re.fullmatch(r"[\d.]+", x) else x for key, x in zip(rows[0], row)} for row in rows[1:]]
    return {tuple(row.values())[:2]: row for row in rows}


PROCGEN, MAZES = read_paper("procgen_easy.csv"), read_paper("mazes_25_blocks.csv")
for row in MAZES.values():
    row["rates"] = np.array([row.pop(f"run_{i}") for i in range(1, 11)])  # (runs,) share of episodes solved
    row["runs"] = len(row["rates"])
SEVEN = list(dict.fromkeys(maze for maze, _ in MAZES))
PUBLISHED = {"Procgen": PROCGEN["maze", "plr"], "Mazes": MAZES["Maze", "plr"]}  # runs, steps, episodes: as in all rows


class Section(NamedTuple):
    """Runs of one length."""

    kind: str  # Procgen, Mazes, or the environment
    length: str  # as in 25M
    variants: dict[str, list[Run]]

    @property
    def title(self) -> str:
        return f"{self.kind}, {self.length} steps"

    @property
    def file(self) -> str:
        return f"{self.kind.lower()}_{self.length}"

    @property
    def runs(self) -> list[Run]:
        return [run for runs in self.variants.values() for run in runs]

    @property
    def evaluated(self) -> dict[str, list[Run]]:
        """Of each variant the finished runs, or, where none is, those that have been evaluated."""
        found = {}
        for name, runs in self.variants.items():
            finished = [run for run in runs if run.finished]
            if members := finished or [run for run in runs if run.evaluation]:
                found[name] = members
        return found

    @property
    def published(self) -> dict[str, str]:
        """Variant -> curriculum of the published numbers to show: none beside runs with other settings only."""
        curricula = {"Procgen": ["uniform", "plr"], "Mazes": ["dr", "plr", "robust_plr"]}.get(self.kind, [])
        shown = {NAMES[curriculum]: curriculum for curriculum in curricula}
        return shown if shown.keys() & self.variants else {}

    @property
    def columns(self) -> list[str]:
        """Variants of a table, with or without runs here."""
        return list(dict.fromkeys([*self.published, *self.evaluated]))

    @property
    def code(self) -> str:
        """A sentence on what made the runs, for they may not all be of one precision and commit."""
        made: dict[str, list[str]] = {}
        for run in self.runs:
            made.setdefault(", ".join(run.made), []).append(run.variant)
        if len(made) == 1:
            return f"All in {next(iter(made))}."
        return "; ".join(f"{', '.join(dict.fromkeys(names))}: {how}" for how, names in made.items()) + "."

    @property
    def is_as_long_as_published(self) -> bool:
        return bool(self.published) and millions(PUBLISHED[self.kind]["steps"]) == self.length


def sections(runs: list[Run]) -> list[Section]:
    """The longest first. Robust PLR with as many gradient updates stands with the runs that have half its steps."""
    seeds: dict[Any, list[Run]] = {}
    for run in runs:
        key = (run.kind, millions(run["total_timesteps"]), run.variant, run["env_id"], run["seed"])
        seeds.setdefault(key, []).append(run)
    told_apart: dict[Any, set[int]] = defaultdict(set)  # variant -> what of `made` tells two runs of one seed apart
    for same in seeds.values():
        names = " and ".join(run.name for run in same)
        if len({run.made for run in same}) < len(same):
            refuse(f"RUN-DIRS {names} are one experiment with the same seed: choose one.")
        for i in (i for i, words in enumerate(zip(*(run.made for run in same))) if len(set(words)) > 1):
            told_apart[same[0].kind, millions(same[0]["total_timesteps"]), same[0].variant].add(i)
    for run in runs:
        for i in sorted(told_apart[run.kind, millions(run["total_timesteps"]), run.variant]):
            run.variant += f", {run.made[i]}"
    baselines = {(run.kind, run["total_timesteps"]) for run in runs if run["curriculum"] != "robust_plr"}
    grouped: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        steps, others = run["total_timesteps"], [steps for kind, steps in baselines if kind == run.kind]
        length, halves = millions(steps), [x for x in others if 2 <= steps / x < 2.3]
        if run["curriculum"] == "robust_plr" and halves and length not in map(millions, others):
            run.variant += f", {length} steps"
            length = millions(max(halves))
        grouped.setdefault((run.kind, length), []).append(run)
    order = list(NAMES.values())
    result = []
    for (name, length), members in grouped.items():
        variants = sorted({run.variant for run in members}, key=lambda x: (order.index(x.split(",")[0]), len(x), x))
        members = sorted(members, key=lambda run: (run["env_id"], run["seed"], run.name))
        result.append(Section(name, length, {x: [run for run in members if run.variant == x] for x in variants}))
    return sorted(result, key=lambda s: (s.kind != "Procgen", s.kind, -float(s.length[:-1])))


# ---- text ------------------------------------------------------------------------------------------------------------


def number(x: float, digits: int, sign: str = "") -> str:
    return f"{round(x, 9):{sign}.{digits}f}".replace("-", "−")


def table(header: Iterable[str], rows: Iterable[Iterable[str]], left: int = 1) -> str:
    """In Markdown; the first `left` columns are words."""
    lines = [list(header), *map(list, rows)]
    lines.insert(1, ["---" if i < left else "---:" for i in range(len(lines[0]))])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def short_of(runs: list[Run], kind: str, n: int | None = None) -> str:
    """What the cell of a number says of its n runs (default: all of `runs`), as " (1 run, 2M steps)": where they fall
    short of the published number's runs, steps and episodes."""
    n = len(runs) if n is None else n
    published, parts = PUBLISHED.get(kind, {}), []
    if not published or any(run.args.get("distribution_mode", "easy") != "easy" for run in runs):
        published = {"runs": np.inf, "steps": np.inf, "episodes": 0}
    reached = list(dict.fromkeys(millions(steps) for steps in sorted(run.steps for run in runs)))
    if n < published["runs"]:
        parts.append(f"{n} run{'s' * (n > 1)}")
    if min(run.steps for run in runs) < 0.99 * published["steps"]:
        parts.append(f"{reached[0]}{f' to {reached[-1]}' * (len(reached) > 1)} steps")
    if not all(run.finished for run in runs):
        parts.append("unfinished")
    if (least := min(run.episodes for run in runs)) < published["episodes"]:
        parts.append(f"{least} episode{'s' * (least > 1)}")
    return f" ({', '.join(parts)})" if parts else ""


def cell(
    values: list[float], runs: list[Run], section: Section, digits: int, error: bool = False, of_episodes: float = 0
) -> str:
    """Mean ± standard deviation over runs (ddof 0, as in the PLR paper); `error`: standard error (ddof 1). Of a single
    run ± `of_episodes`, its standard error over episodes, if given."""
    if not values:
        return "–"
    if len(values) > 1:
        spread = f" ± {number(np.std(values, ddof=error) / len(values) ** (error / 2), digits)}"
    else:
        spread = f" ± {number(of_episodes, digits)} over its episodes" if of_episodes else ""
    return f"{number(np.mean(values), digits)}{spread}{short_of(runs, section.kind, len(values))}"


def interval(strata: list[np.ndarray], digits: int, paired: bool = False) -> str:
    low, high = bootstrap_interval(strata, paired)
    return "" if np.isnan(low) else f" [{number(low, digits)}, {number(high, digits)}]"


def gap(a: Sample, b: Sample, digits: int, p_digits: int = 3) -> str:
    """Of their means, and Welch's p if both are of several runs."""
    p = welch(a, b)
    p = "" if np.isnan(p) else ", p < 0.001" if p < 0.001 else f", p {number(p, p_digits)}"
    return number(a.mean - b.mean, digits, "+") + p


def published_return(game: str, method: str) -> Sample:
    """The PLR paper's std has ddof 0, and one digit: a p value from it is known to two at most."""
    row, n = PROCGEN[game, method], int(PROCGEN[game, method]["runs"])
    return Sample(row["mean"], row["std"] * (n / (n - 1)) ** 0.5, n)


def difference(
    runs: list[Run],
    other: list[Run] | Sample,
    section: Section,
    values: Callable[[list[Run]], list[float]],
    *digits: int,
) -> str:
    """Of the mean over runs from other runs' or from a published sample. None of runs that still go on: they are at
    different steps."""
    both = [*runs, *(() if isinstance(other, Sample) else other)]
    if not runs or not other or not all(run.finished for run in both):
        return "–"
    a, b = sample(values(runs)), other if isinstance(other, Sample) else sample(values(other))
    return gap(a, b, *digits) + short_of(both, section.kind, min(a.n, b.n))


# ---- Procgen's tables ------------------------------------------------------------------------------------------------


def by_game(runs: list[Run]) -> dict[str, list[Run]]:
    return {game: [run for run in runs if run["env_id"] == game] for game in sorted({run["env_id"] for run in runs})}


def returns_of(runs: list[Run], key: str = "test_return") -> list[float]:
    return [run.evaluation[key] for run in runs]


def episodes_error(run: Run, *kinds: str) -> float:
    """Standard error of its mean return on test or train levels, or of their difference."""
    return sum(run.evaluation[f"{kind}_return_std"] ** 2 / run.episodes for kind in kinds) ** 0.5


def returns_cell(runs: list[Run], section: Section, *kinds: str) -> str:
    """Of the mean return on test or train levels, or of the first kind's minus the second's."""
    if not runs:
        return "–"
    values = [returns_of(runs, f"{kind}_return") for kind in kinds]
    values = list(np.subtract(*values)) if len(kinds) == 2 else values[0]
    return cell(values, runs, section, 2, of_episodes=episodes_error(runs[0], *kinds))


def normalized_cells(found: dict[str, list[Run]], uniform: dict[str, list[Run]], section: Section) -> tuple[str, str]:
    """Mean and IQM over the games that both have; with more runs in some of them, over the first ones of each."""
    games = [game for game in found if game in uniform]
    baseline = {game: np.mean(returns_of(uniform[game])) for game in games}
    if not games or min(baseline.values()) <= 0:
        return "–", "–"
    n = min(len(found[game]) for game in games)
    returns = {game: np.array(returns_of(found[game][:n])) for game in games}
    ratios = [100 * returns[game] / baseline[game] for game in games]
    both = [run for game in games for run in [*found[game][:n], *uniform[game]]]
    note = short_of(both, section.kind, min([n, *(len(uniform[game]) for game in games)]))
    note += f", {len(games)} of 16 games" * (len(games) < 16)
    scores = normalized_returns(returns, baseline)
    mean = number(scores.mean(), 1) + f" ± {number(scores.std(), 1)}" * (n > 1)
    return mean + note, f"{number(iqm(np.array(ratios)), 1)}{interval(ratios, 1)}{note}"


def procgen_table(section: Section) -> str:
    """Test returns and, beside a uniform baseline, the paper's summary of them."""
    found = {name: by_game(runs) for name, runs in section.evaluated.items()}
    games = sorted({game for runs in found.values() for game in runs})
    columns = {"test return": [*games, *(["normalised, % of uniform's", "IQM of that"] if "uniform" in found else [])]}
    for name in section.columns:
        if name in found:
            runs = [found[name].get(game, []) for game in games]
            columns[name] = [returns_cell(members, section, "test") for members in runs]
            if "uniform" in found:
                columns[name] += normalized_cells(found[name], found["uniform"], section)
        if name in section.published:
            rows = [PROCGEN[game, section.published[name]] for game in games]
            columns[f"{name}, paper"] = [f"{row['mean']:.1f} ± {row['std']:.1f}" for row in rows]
            if "uniform" in found:
                every = PROCGEN["normalized_percent", section.published[name]]
                here = 100 * np.mean([row["mean"] / PROCGEN[row["game"], "uniform"]["mean"] for row in rows])
                text = f"{every['mean']:.1f} ± {every['std']:.1f}"
                text = text if len(games) == 16 else f"{here:.1f} in {len(games)} of 16 games, {text} in all"
                columns[f"{name}, paper"] += [text, "–"]
    return table(columns, zip(*columns.values()))


def procgen_differences(section: Section) -> str:
    """Of mean test returns from uniform's; at the paper's length also from the paper's."""
    found = {name: by_game(runs) for name, runs in section.evaluated.items()}
    uniform, others = found.get("uniform", {}), [name for name in found if name != "uniform"]
    if not uniform or not others:
        return ""
    columns = {"difference in test return": list(uniform)}
    for name in others:
        differences = [difference(found[name].get(x, []), runs, section, returns_of, 2) for x, runs in uniform.items()]
        columns[f"{name} − uniform"] = differences
    if "PLR" in others:
        pairs = [[published_return(game, x) for x in ("plr", "uniform")] for game in uniform]
        columns["PLR − uniform, paper"] = [gap(*pair, 1, 2) for pair in pairs]
    for name, curriculum in section.published.items() if section.is_as_long_as_published else ():
        pairs = [(found.get(name, {}).get(game, []), published_return(game, curriculum)) for game in uniform]
        columns[f"{name}, ours − paper"] = [difference(*pair, section, returns_of, 2, 2) for pair in pairs]
    return table(columns, zip(*columns.values()))


def procgen_gaps(section: Section) -> str:
    rows = []
    for name, runs in section.evaluated.items():
        for game, members in by_game(runs).items():
            kinds = (("train",), ("test",), ("train", "test"))
            rows.append([game, name, *(returns_cell(members, section, *x) for x in kinds)])
    header = ["game", "curriculum", "training levels", "unseen levels", "generalisation gap"]
    return table(header, sorted(rows, key=lambda row: row[0]), left=2)


# ---- mazes' tables ---------------------------------------------------------------------------------------------------


def solved(run: Run) -> dict[str, float]:
    """Share of episodes solved, by maze."""
    return {key[7:]: x for key, x in run.evaluation.items() if re.match("solved_(?!mean$|iqm$)", key)}


def mazes_of(section: Section) -> list[str]:
    """dcd's first."""
    runs = [run for runs in section.evaluated.values() for run in runs]
    return sorted(dict.fromkeys(maze for run in runs for maze in solved(run)), key=lambda maze: maze not in SEVEN)


def mean_of_seven(runs: list[Run]) -> list[float]:
    return [np.mean([solved(run)[maze] for maze in SEVEN]) for run in runs]


SUMMARIES = ["gradient updates", "mean of dcd's 7 mazes", "mean of dcd's 7, last quarter of the evaluations"]
SUMMARIES += ["IQM of dcd's 7 mazes", "mean of all mazes", "IQM of all mazes"]


def late_mean(run: Run) -> float:
    """Mean solved rate in dcd's mazes over the evaluations in the last quarter of the run so far: one checkpoint of one
    run says little. nan if there are none."""
    steps = run.evaluations.get("global_step", np.zeros(0))
    rates = [run.evaluations.get(f"solved_{maze}", np.full(len(steps), np.nan)) for maze in SEVEN]
    late = np.array(rates)[:, steps > 0.75 * run.steps]
    return float(late.mean()) if late.size else np.nan


def published_rates(curriculum: str) -> np.ndarray:
    """dcd's shares of episodes solved (7 mazes, runs)."""
    return np.array([MAZES[maze, curriculum]["rates"] for maze in SEVEN])


def maze_summaries(runs: list[Run], section: Section) -> list[str]:
    note = short_of(runs, section.kind)
    cells = [f"{np.mean([run.updates for run in runs]):,.0f}{note}"]
    every = [maze for maze in solved(runs[0]) if all(maze in solved(run) for run in runs)]
    for mazes in (SEVEN, every):
        found = set(mazes) <= set(every)
        rates = np.array([[solved(run)[maze] for run in runs] for maze in mazes if found])  # (mazes, runs)
        cells += [cell(list(rates.mean(0)) if found else [], runs, section, 3, error=True)]
        if mazes is SEVEN:
            late = [x for x in map(late_mean, runs) if not np.isnan(x)]
            shorter = [replace(run, episodes=run["eval_episodes"]) for run in runs]  # evaluations during the training
            cells += [cell(late, shorter, section, 3, error=True)]
        cells += [f"{number(iqm(rates), 3)}{interval(list(rates), 3, paired=True)}{note}" if found else "–"]
    return cells


def rates_text(rates: np.ndarray) -> str:
    """Of published runs (runs,): mean ± standard error."""
    return f"{number(rates.mean(), 3)} ± {number(stats.sem(rates), 3)}"


def published_summaries(curriculum: str) -> list[str]:
    rates = published_rates(curriculum)
    middle = f"{number(iqm(rates), 3)}{interval(list(rates), 3, paired=True)}"
    return ["–", rates_text(rates.mean(0)), "–", middle, "–", "–"]


def maze_table(section: Section) -> str:
    mazes = mazes_of(section)
    columns = {"share of episodes solved": [*mazes, *SUMMARIES]}
    for name in section.columns:
        if runs := section.evaluated.get(name):
            columns[name] = []
            for maze in mazes:
                there = [run for run in runs if maze in solved(run)]
                rates = [solved(run)[maze] for run in there]
                middle = f", IQM {number(iqm(np.array(rates)), 3)}" if len(rates) > 3 else ""
                columns[name].append(cell(rates, there, section, 3, error=True) + middle)
            columns[name] += maze_summaries(runs, section)
        if curriculum := section.published.get(name):
            rows = [MAZES.get((maze, curriculum), {}).get("rates") for maze in mazes]
            texts = ["–" if x is None else f"{rates_text(x)}, IQM {number(iqm(x), 3)}" for x in rows]
            columns[f"{name}, dcd"] = texts + published_summaries(curriculum)
    return table(columns, (row for row in zip(*columns.values()) if set(row[1:]) != {"–"}))


def maze_differences(section: Section) -> str:
    """Of the mean of dcd's mazes, between curricula; at dcd's length also from dcd's."""
    rows, methods = [], {name: sample(published_rates(x).mean(0)) for name, x in section.published.items()}
    names = list(section.evaluated) if methods else []
    for i, a in enumerate(names):
        for b in names[:i]:
            ours = difference(section.evaluated[a], section.evaluated[b], section, mean_of_seven, 3)
            dcd = gap(methods[a], methods[b], 3) if {a, b} <= methods.keys() else "–"
            rows.append([f"{a} − {b}", ours, dcd])
    for name in names if section.is_as_long_as_published else ():
        if name in methods:
            text = difference(section.evaluated[name], methods[name], section, mean_of_seven, 3)
            rows.append([f"{name}, ours − dcd", text, "–"])
    return table(["difference in the mean of dcd's 7 mazes", "ours", "dcd"], rows) if rows else ""


# ---- pictures --------------------------------------------------------------------------------------------------------


def color_of(section: Section, variant: str) -> str:
    others = [name for name in section.variants if name not in CURRICULA]
    return COLORS[CURRICULA[variant]] if variant in CURRICULA else MORE_COLORS[others.index(variant) % len(MORE_COLORS)]


def averaged(runs: list[Run], x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    """Columns of several runs' evaluations.csv, where all have some: mean of x (points,) and y (runs, points)."""
    steps = [run.evaluations["global_step"] for run in runs]
    points = np.unique(np.concatenate(steps))
    points = points[(points >= max(s[0] for s in steps)) & (points <= min(s[-1] for s in steps))]
    x, y = ([np.interp(points, s, run.evaluations[key]) for s, run in zip(steps, runs)] for key in (x, y))
    return np.mean(x, 0), np.array(y)


def smoothed(run: Run, key: str, only: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Steps and means of a column of progress.csv at each row where it has a value (and `only` is true): over the rows
    of the twentieth of the run up to there (a copy has 200 rows of a run at most), 50 iterations at least."""
    steps, values = run.progress["global_step"], run.progress[key]
    there = np.flatnonzero(~np.isnan(values) & (True if only is None else only))
    window = max(50 * run["batch_size"], steps[-1] / 20) if len(steps) > 100 else 5 * run["batch_size"]
    first = np.searchsorted(steps[there], steps[there] - window, "right")
    total, rows = np.cumsum([0, *values[there]]), np.arange(len(there)) + 1
    return steps[there], (total[rows] - total[first]) / (rows - first)


BAND = {"lw": 8, "alpha": 0.2}  # in a legend


def figure_of(panels: int, columns: int, width: float = 4.6, height: float = 3.7) -> tuple[Figure, list[Axes]]:
    rows = -(-panels // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(width * columns, height * rows + 0.5), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[panels:]:
        axis.remove()
    return figure, list(axes.flat[:panels])


def finish(figure: Figure, section: Section, kinds: dict[str, dict[str, Any]]) -> Figure:
    """Legend and axes of steps. `kinds`: what lines mean in every variant, label -> look."""
    labels = {name: f"{name} ({len(runs)} run{'s' * (len(runs) > 1)})" for name, runs in section.variants.items()}
    entries = [Line2D([], [], lw=4, label=label, color=color_of(section, name)) for name, label in labels.items()]
    entries += [Line2D([], [], label=label, **({"color": "0.25"} | look)) for label, look in kinds.items()]
    figure.legend(
        handles=entries, loc="outside upper center", ncols=-(-len(entries) // (1 + len(entries) // 6)), frameon=False
    )
    for axis in figure.axes:
        if axis.get_xlabel() in ("environment steps", "gradient updates"):
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))
            axis.set_xlim(left=0)
    return figure


def procgen_picture(section: Section) -> Figure:
    """A panel for each game, and two of the curriculum."""
    games = sorted({run["env_id"] for run in section.runs})
    few = len(games) < 5
    figure, axes = figure_of(len(games) + 2, 3 if few else 4, *((4.6, 3.7) if few else (3.6, 3.2)))
    *panels, levels, shares = axes
    for name in section.variants:
        color = color_of(section, name)
        for game, panel in zip(games, panels):
            runs = [run for run in section.variants[name] if run["env_id"] == game]
            for run in (run for run in runs if run.progress):
                alpha = 0.8 if len(runs) < 3 else 0.3
                panel.plot(*smoothed(run, "episodic_return"), color=color, lw=1, ls="--", alpha=alpha)
            if runs := [run for run in runs if run.evaluations]:
                x, test = averaged(runs, "global_step", "test_return")
                x, train = averaged(runs, "global_step", "train_return")
                spread = test.std(0)
                if len(runs) == 1:
                    spread = runs[0].evaluations["test_return_std"] / runs[0]["eval_episodes"] ** 0.5
                panel.plot(x, train.mean(0), lw=1.2, marker="o", ms=4, mfc="white", color=color)
                panel.plot(x, test.mean(0), lw=2.2, marker="o", ms=4, color=color)
                panel.fill_between(x, test.mean(0) - spread, test.mean(0) + spread, color=color, alpha=0.18, lw=0)
        for run in (run for run in section.variants[name] if run["curriculum"] == "plr" and run.progress):
            steps, progress = run.progress["global_step"], run.progress
            levels.plot(steps, progress["effective_levels"], color=color, lw=1.2)
            shares.plot(steps, progress["seen_share"], color=color, lw=1.5)
            shares.plot(steps, progress["replay_share"], color=color, lw=1.5, ls=":")
    for game, panel in zip(games, panels):
        rows = sorted(
            (PROCGEN[game, curriculum] for curriculum in section.published.values()), key=lambda row: row["mean"]
        )
        for row in rows:
            color, above = COLORS[row["method"]], "bottom" if row is rows[-1] else "top"
            place = {"transform": panel.get_yaxis_transform(), "va": above, "fontsize": 8.5}
            place["bbox"] = {"fc": "white", "alpha": 0.7, "lw": 0, "pad": 1}
            panel.text(0.02, row["mean"], f"{NAMES[row['method']]}, paper", color=color, **place)
            panel.axhline(row["mean"], color=color, ls=":", lw=1.5)
            panel.axhspan(row["mean"] - row["std"], row["mean"] + row["std"], color=color, alpha=0.07, lw=0)
        panel.set(title=game, xlabel="environment steps", ylabel="return per episode")
    levels.set(title="PLR: effective levels, exp(entropy)", xlabel="environment steps", yscale="log")
    levels.set_ylim(0.9, max([2, *(run["num_levels"] for run in section.runs)]))
    levels.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    levels.yaxis.set_minor_formatter(NullFormatter())
    shares.set(title="PLR: seen (solid), replays (dotted)", xlabel="environment steps", ylim=(-0.03, 1.05))
    shares.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.0%}"))
    kinds = {"unseen levels": {"lw": 2.2, "marker": "o", "ms": 4}}
    kinds |= {"training levels": {"lw": 1.2, "marker": "o", "ms": 4, "mfc": "white"}}
    kinds |= {"episodes of the training, smoothed": {"lw": 1, "ls": "--", "alpha": 0.8}}
    numbers = {len(members) for runs in section.evaluated.values() for members in by_game(runs).values()}
    kinds |= {"± s.e. over episodes": BAND} if 1 in numbers else {}
    kinds |= {"± std over runs": BAND} if numbers - {1} else {}
    if section.published:
        kinds["paper: unseen levels, 25M steps, ± std"] = {"ls": ":", "lw": 1.5}
    return finish(figure, section, kinds)


def maze_picture(section: Section) -> Figure:
    """Solved rate over environment steps and over gradient updates."""
    figure, axes = figure_of(2, 2, 5.4, 4)
    mazes, several = SEVEN if section.kind == "Mazes" else ["mean"], False
    for name in section.variants:
        color = color_of(section, name)
        if runs := [run for run in section.variants[name] if run.evaluations]:
            for axis, x_key in zip(axes, ("global_step", "gradient_updates")):
                rates = [averaged(runs, x_key, f"solved_{maze}") for maze in mazes]
                x, y = rates[0][0], np.mean([rate for _, rate in rates], 0)
                axis.plot(x, y.mean(0), lw=2, marker="o", ms=4, color=color)
                if len(runs) > 1:
                    several, error = True, y.std(0, ddof=1) / len(runs) ** 0.5
                    axis.fill_between(x, y.mean(0) - error, y.mean(0) + error, color=color, alpha=0.2, lw=0)
    for curriculum in section.published.values():
        for axis in axes:
            axis.axhline(published_rates(curriculum).mean(), color=COLORS[curriculum], ls=":", lw=1.5)
    what = "mean solved rate" + f", dcd's {len(mazes)} mazes" * (len(mazes) > 1)
    for axis, x in zip(axes, ("environment steps", "gradient updates")):
        axis.set(title=f"over {x}", xlabel=x, ylabel=what, ylim=(0, 1))
    kinds = {"± s.e. over runs": BAND} if several else {}
    kinds |= {"dcd, mean of 10 runs after 250M steps": {"ls": ":", "lw": 1.5}} if section.published else {}
    return finish(figure, section, kinds)


def maze_bars(section: Section) -> Figure:
    """Solved rate in every maze: runs, their mean, and the published mean with its standard error."""
    columns = section.evaluated
    mazes = mazes_of(section)
    figure, (axis,) = figure_of(1, 1, 11, 4)
    for i, (name, runs) in enumerate(columns.items()):
        color, width = color_of(section, name), 0.8 / len(columns)
        where = np.arange(len(mazes)) + width * (i - (len(columns) - 1) / 2)
        rates = np.array([[solved(run).get(maze, np.nan) for maze in mazes] for run in runs])
        for rate in rates:
            axis.plot(where - width / 5, rate, "o", ms=6, color=color, alpha=0.6, mew=0)
        if len(runs) > 1:
            axis.plot(where - width / 5, rates.mean(0), "_", ms=11, mew=3, color=color)
        curriculum = section.published.get(name)
        rows = {x: MAZES[maze, curriculum]["rates"] for x, maze in zip(where, mazes) if (maze, curriculum) in MAZES}
        for x, published in rows.items():
            axis.plot(np.full(len(published), x + width / 5), published, "D", ms=3, color=color, alpha=0.3, mew=0)
            place = (x + width / 5, published.mean(), stats.sem(published))
            axis.errorbar(*place, fmt="D", ms=4, mfc="white", color=color)
    axis.set(ylabel="share of episodes solved", ylim=(-0.03, 1.03))
    axis.set_xticks(range(len(mazes)), mazes, rotation=25, ha="right")
    axis.set_xlim(-0.5, len(mazes) - 0.5)
    axis.grid(visible=False, axis="x")
    for i in range(0, len(mazes), 2):
        axis.axvspan(i - 0.5, i + 0.5, color="0.96", lw=0, zorder=0)
    kinds = {"a run": {"ls": "", "marker": "o", "alpha": 0.6, "mew": 0}}
    if any(len(runs) > 1 for runs in columns.values()):
        kinds["mean"] = {"ls": "", "marker": "_", "ms": 11, "mew": 3}
    if section.published:
        kinds["dcd after 250M steps: a run"] = {"ls": "", "marker": "D", "ms": 3, "alpha": 0.4, "mew": 0}
        kinds["mean ± s.e."] = {"ls": "", "marker": "D", "ms": 4, "mfc": "white"}
    return finish(figure, section, kinds)


def maze_training_picture(section: Section) -> Figure:
    figure, axes = figure_of(4, 2, 5.4, 3.3)
    rate, paths, scores, effective = axes
    several = max(map(len, section.variants.values()))
    width = 1.5 if several == 1 else 0.8
    for run in (run for run in section.runs if run.progress):
        color, progress = color_of(section, run.variant), run.progress
        for replay, ls, kind in ((0, "-", "new"), (1, ":", "replayed")):
            only = progress["replay"] == replay
            rate.plot(*smoothed(run, "solved_rate", only), color=color, ls=ls, lw=width)
            if f"shortest_path_{kind}" in progress:
                paths.plot(*smoothed(run, f"shortest_path_{kind}", only), color=color, ls=ls, lw=width)
        if run["curriculum"] != "dr":
            steps = progress["global_step"]
            scores.plot(steps, progress["score_q50"], color=color, lw=1)
            scores.fill_between(
                steps, progress["score_q10"], progress["score_q90"], color=color, alpha=0.15 / several, lw=0
            )
            effective.plot(steps, progress["effective_levels"], color=color, lw=1)
    rate.set(title="solved rate in training, smoothed", ylim=(0, 1.02), ylabel="share of episodes")
    paths.set(title="shortest path in the levels, smoothed", ylabel="cells")
    scores.set(
        title="scores in the buffer: median, 10 % to 90 %", ylabel=", ".join({run["score"] for run in section.runs})
    )
    effective.set(title="effective number of levels, exp(entropy)", ylabel="levels", ylim=(0, None))
    for axis in axes:
        axis.set_xlabel("environment steps")
    return finish(figure, section, {"new levels": {"ls": "-"}, "replayed levels": {"ls": ":"}})


def drawn(figure: Figure) -> str:
    """A hash of words, lines, bands and bars, kept in each picture: a test finds the committed ones that are out of
    date."""
    words, points = [x.get_text() for legend in figure.legends for x in legend.get_texts()], []
    for axis in figure.axes:
        words += [axis.get_title(), axis.get_xlabel(), axis.get_ylabel(), *(x.get_text() for x in axis.texts)]
        points += [np.column_stack([np.asarray(x, float) for x in line.get_data()]) for line in axis.lines]
        points += [path.vertices for collection in axis.collections for path in collection.get_paths()]
        points += [patch.get_patch_transform().transform(patch.get_path().vertices) for patch in axis.patches]
    numbers = " ".join(f"{x:.5g}" for x in np.concatenate([x.ravel() for x in points]))
    return hashlib.sha256(f"{words} {numbers}".encode()).hexdigest()


# ---- the report ------------------------------------------------------------------------------------------------------

FIRST = """\
# Training runs beside the published numbers

Written by `python benchmarks/report.py` from the folders in `runs/`; do not edit. Runs of one length stand side by
side. Each cell names where its number falls short of the published one: fewer runs (10), steps (25M in Procgen, 250M in
mazes) or episodes (100).

**Procgen.** Return on unseen levels, final policy, stochastic; mean ± standard deviation over runs (ddof 0), as in
Table 2 of the PLR paper; of a single run ± the standard error over its episodes. Normalised: each run's return over the
uniform baseline's mean, averaged over the games that have both; IQM: over these games and runs together.

**Mazes.** Share of episodes solved zero-shot, stochastic policy; mean ± standard error over runs (ddof 1). Of a single
run's 100 episodes in a maze chance alone makes up to ± 0.05, and one run may always solve a maze that another never
does. dcd's columns are computed from its per-seed results. IQM: in a maze over runs, in the last rows over mazes and
runs together, without the lowest and the highest quarter (of 7 numbers one at each end). One checkpoint of one run says
little: another row has the mean over the evaluations in the last quarter of the run.

[95 % intervals], from five runs on: bootstrap; in Procgen runs are drawn anew within each game, in mazes whole runs,
since one run plays all mazes. p: Welch's t-test, two-sided, not corrected for the number of tests; the paper's follow
from rounded numbers. Where a curriculum has finished runs, those that still go on are left out of its numbers; they are
in the pictures. Robust PLR's new levels are steps without updates.
"""


def runs_table(runs: list[Run]) -> str:
    rows, notes = [], ""
    for run in runs:
        starts = run.started.get("starts", [{}])
        last = run.progress["global_step"][-1] if run.progress else 0
        steps = f"{run.steps:,}" if run.finished else f"{last:,.0f} of {run['total_timesteps']:,}, unfinished"
        known = {key: dict.fromkeys(x.get(key, "not recorded") for x in starts) for key in ("commit", "machine")}
        command = f"`{starts[0].get('command', 'not recorded')}`"
        rows.append([run.name, command, *(", then ".join(x) for x in known.values()), steps])
        notes += f"- {run.name}: {run.started['note']}\n" if "note" in run.started else ""
    header = ["run", "command", "commit", "machine", "environment steps"]
    return table(header, rows, left=4) + f"\n{notes}" * bool(notes)


def summary_of_mazes(found: list[Section]) -> str:
    """Every curriculum and length in a row, dcd's below."""
    found = [section for section in found if section.kind == "Mazes"]
    rows = [[f"{name}, {x.length}", *maze_summaries(runs, x)[:4]] for x in found for name, runs in x.evaluated.items()]
    rows += [[f"{NAMES[x]}, dcd: 250M, 10 runs", *published_summaries(x)[:4]] for x in ("dr", "plr", "robust_plr")]
    return table(["method, environment steps", *SUMMARIES[:4]], rows)


PROCGEN_PARTS = (
    {"": procgen_picture},
    {"": procgen_table, "_differences": procgen_differences, "_gaps": procgen_gaps},
)
MAZES_PARTS = (
    {"": maze_picture, "_by_maze": maze_bars, "_training": maze_training_picture},
    {"": maze_table, "_differences": maze_differences},
)


def report(run_dirs: Iterable[Path]) -> tuple[str, dict[str, Figure], dict[str, str]]:
    """REPORT.md, its pictures by name, and the tables of README.md by name."""
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25})
    runs = [read_run(run_dir) for run_dir in sorted(run_dirs)]
    text, pictures, found = FIRST, {}, sections(runs)
    blocks = {"mazes": summary_of_mazes(found)}
    for section in found:
        draws, makes = PROCGEN_PARTS if section.kind == "Procgen" else MAZES_PARTS
        text += f"\n## {section.title}\n\n{section.code}\n"
        for part, draw in draws.items():
            pictures[f"{section.file}{part}.png"] = draw(section)
            text += f"\n![{section.title}{part.replace('_', ' ')}](pictures/{section.file}{part}.png)\n"
        for part, make in makes.items():
            blocks[f"{section.file}{part}"] = written = make(section)
            text += f"\n{written}" * bool(written)
    return f"{text}\n## The runs\n\n{runs_table(runs)}", pictures, blocks


def with_tables(readme: str, blocks: dict[str, str]) -> str:
    """README.md with what stands between <!-- report: NAME --> and <!-- end --> replaced by the table of that name."""

    def replaced(match: re.Match) -> str:
        if match[2] not in blocks:
            refuse(f"README.md has a table {match[2]} that is none of the report's: {', '.join(blocks)}.")
        return f"{match[1]}\n\n{blocks[match[2]]}\n{match[3]}"

    return re.sub(r"(<!-- report: (\S+) -->)\n.*?(<!-- end -->)", replaced, readme, flags=re.DOTALL)


def main() -> None:
    args = tyro.cli(Args)
    for run_dir in args.run_dirs:
        if not (run_dir / "args.json").exists():
            refuse(f"RUN-DIRS {run_dir} is not a run's directory: it has no args.json.")
    text, pictures, blocks = report(args.run_dirs or [path.parent for path in RUNS.glob("*/args.json")])
    (args.out / "pictures").mkdir(parents=True, exist_ok=True)
    for old in (args.out / "pictures").glob("*.png") if args.out.resolve() == RUNS.parent else ():
        old.unlink()
    for name, figure in pictures.items():
        figure.savefig(args.out / "pictures" / name, dpi=100, metadata={"Drawn": drawn(figure)})
    (args.out / "REPORT.md").write_text(text)
    if args.out.resolve() == RUNS.parent and not args.run_dirs:
        readme = ROOT / "README.md"
        readme.write_text(with_tables(readme.read_text(), blocks))
    print(args.out / "REPORT.md")


if __name__ == "__main__":
    main()
