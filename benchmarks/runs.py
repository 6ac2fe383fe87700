"""Runs as report.py shows them: read from their files, those of one length side by side; and the
published numbers that belong there."""

import itertools
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from collect import kind_of, millions, settings, whose
from common import ROOT, UNSEEN, read_csv, read_text, refuse

NAMES = {"uniform": "uniform", "sequential": "sequential", "dr": "DR", "plr": "PLR"}
NAMES |= {"robust_plr": "Robust PLR", "accel": "ACCEL"}
# with --augment ucb: more columns of the PLR paper's Table 2, and what they are in procgen_easy.csv
UCB_NAMES = {"uniform": "UCB-DrAC", "plr": "UCB-DrAC + PLR"}
UCB_METHODS = {"UCB-DrAC": "ucb-drac", "UCB-DrAC + PLR": "ucb-drac+plr"}
COLORS = {"uniform": "0.45", "DR": "0.45", "sequential": "C2", "PLR": "C0", "Robust PLR": "C3"}
COLORS |= {"UCB-DrAC": "teal", "UCB-DrAC + PLR": "navy"}
MORE_COLORS = ("C1", "C4", "C6", "C9", "C8", "C5")  # of variants with other settings
LENGTHS = {"Procgen": 25_000_000, "Mazes": 250_000_000}  # published: 10 runs, 100 episodes each
SHOWN = {"Procgen": ["uniform", "plr"], "Mazes": ["dr", "plr", "robust_plr"]}  # and their methods


# ---- published numbers ---------------------------------------------------------------------------


def read_paper(file: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Published rows by (game or maze, method)."""
    rows = read_csv(ROOT / "benchmarks" / "paper" / file)
    for row in rows:
        for key, x in row.items():
            row[key] = float(x) if re.fullmatch(r"[\d.]+", x) else x
    return {tuple(row.values())[:2]: row for row in rows}


PROCGEN = read_paper("procgen_easy.csv")
MAZES = read_paper("mazes_25_blocks.csv")
WORST_CASE = read_paper("mazes_worst_case.csv")
SEVEN = list(dict.fromkeys(maze for maze, _ in MAZES))


def published_rates(curriculum: str, mazes: Iterable[str] = SEVEN) -> np.ndarray:
    """dcd's shares of episodes solved (mazes, runs)."""
    runs = [f"run_{i}" for i in range(1, 11)]
    return np.array([[MAZES[maze, curriculum][run] for run in runs] for maze in mazes])


# ---- runs ----------------------------------------------------------------------------------------


@dataclass
class Run:
    name: str
    args: dict[str, Any]
    origin: dict[str, Any]  # run.json
    progress: dict[str, np.ndarray]  # the csv files' columns
    evaluations: dict[str, np.ndarray]
    worst_case: dict[str, np.ndarray]
    finished: bool
    last: dict[str, Any]  # the last evaluation; with global_step (0: none yet), episodes
    variant: str  # as the tables call it

    def __post_init__(self):
        procgen = kind_of(self.args) == "procgen"
        other = "Mazes" if self.args["env_id"] == "maze" else self.args["env_id"]
        self.kind = "Procgen" if procgen else other
        self.length = millions(self.args["total_timesteps"])
        self.task = self.args["env_id"]
        self.levels = ""  # " of 25 x 25 cells, 78 blocks"; of the usual 15, 25 nothing is said
        if self.kind == "Mazes":
            self.task = "mean of dcd's 7"
            # ACCEL's own number is what it begins to edit
            blocks = 60 if self.args["curriculum"] == "accel" else self.args["num_walls"]
            side = self.args.get("maze_size", 15)
            unusual = [f"{side} x {side} cells"] if side != 15 else []
            unusual += [f"{blocks} blocks"] if blocks != 25 else []
            self.levels = f" of {', '.join(unusual)}" if unusual else ""
        commits = [start.get("commit", "unknown") for start in self.origin.get("starts", [{}])]
        compiled = ", compiled" if self.args["compile"] else ""
        code = " and ".join(dict.fromkeys(commits))
        self.made = f"{self.args['precision']}{compiled}, code of {code}"
        # "" of our scripts as they are; see whose() in collect.py
        self.implementation = self.args.get("implementation", "")
        if self.implementation:
            self.made = f"{self.implementation}, started by code of {code}"
        # evaluation mazes that were not as published, but lacked a block
        self.lacking = self.origin.get("mazes_lacking_a_block", [])
        # by maze
        rates = {key[7:]: x for key, x in self.last.items() if key.startswith("solved_")}
        self.solved = {maze: x for maze, x in rates.items() if maze not in ("mean", "iqm")}

    @property
    def score(self) -> float:
        """What curricula are compared by: the return on unseen levels, the mean of dcd's mazes, or
        the solved rate in the environment's levels."""
        if self.kind == "Procgen":
            return self.last["test_return"]
        if self.kind == "Mazes":
            return float(np.mean([self.solved.get(maze, np.nan) for maze in SEVEN]))
        return self.last["solved_mean"]

    @property
    def random_mazes(self) -> float:
        """Solved rate over all the random mazes of --eval-worst."""
        alphas = self.worst_case["alpha_percent"].tolist()
        return float(self.worst_case["solved_rate"][alphas.index(100)])

    @property
    def worst_mazes(self) -> int:
        """How many these are; 0: not measured."""
        return int(max(self.worst_case.get("mazes", [0])))

    @property
    def unseen(self) -> np.ndarray:
        """The solved rate in mazes of the run's own kind that it never trains on, by evaluation.
        Empty where it was not measured."""
        return self.evaluations.get(UNSEEN, np.zeros(0))

    def score_at(self, gradient_updates: float, names: Sequence[str] = ()) -> float:
        """The score after so many gradient updates, between two evaluations (nan before the first
        one); not of Procgen. `names`: the mean of these columns instead."""
        of_seven = [f"solved_{maze}" for maze in SEVEN]
        names = names or (of_seven if self.kind == "Mazes" else ["solved_mean"])
        scores = np.mean([self.evaluations[name] for name in names], axis=0)
        updates = self.evaluations["gradient_updates"]
        return float(np.interp(gradient_updates, updates, scores, left=np.nan))

    @property
    def late_score(self) -> float:
        """Mean of dcd's mazes over the evaluations in the last quarter of the run so far: one
        checkpoint of one run says little. nan if there are none."""
        steps = self.evaluations.get("global_step", np.zeros(0))
        nothing = np.full(len(steps), np.nan)
        rates = np.array([self.evaluations.get(f"solved_{maze}", nothing) for maze in SEVEN])
        late = rates[:, steps > 0.75 * self.last["global_step"]]
        return float(late.mean()) if late.size else np.nan


def read_columns(path: Path) -> dict[str, np.ndarray]:
    """nan where a cell is empty: a later version of the script no longer has the column."""
    rows = read_csv(path)
    names = rows[0] if rows else ()
    return {name: np.array([float(row[name] or "nan") for row in rows]) for name in names}


def read_run(run_dir: Path) -> Run:
    try:
        args = json.loads((run_dir / "args.json").read_text())
        evaluations = read_columns(run_dir / "evaluations.csv")
        result = json.loads(read_text(run_dir / "result.json") or "{}")
        found = [{key: column[-1] for key, column in evaluations.items()}]
        if result:
            found = [result["evaluation"] | result]
        found[0]["episodes"] = args["eval_episodes"]
        for file in run_dir.glob("evaluation_*.json"):  # by --evaluate
            later = json.loads(file.read_text())
            later["episodes"] = later["args"]["eval_episodes"]
            if settings(later["args"]) == settings(args):
                # earlier scripts did not write at which step
                keys = result.keys() & {"global_step", "gradient_updates"}
                found.append({key: result[key] for key in keys} | later)
        last = max(found, key=lambda x: (x.get("global_step", 0), x["episodes"]))
        others = settings(args)
        method = NAMES[args["curriculum"]]
        if others.get("augment") == "ucb" and args["curriculum"] in UCB_NAMES:
            method = UCB_NAMES[args["curriculum"]]
            del others["augment"]
        if whose(args).startswith("ours "):
            method += whose(args).removeprefix("ours")
        elif whose(args):
            method = f"{whose(args)}'s {method}"
        names = [f"{key} {x}" for key, x in others.items() if key not in ("precision", "compile")]
        origin = json.loads(read_text(run_dir / "run.json") or "{}")
        progress = read_columns(run_dir / "progress.csv")
        variant = ", ".join([method, *names])
        last = {"global_step": 0} | last
        name = run_dir.resolve().name
        worst_case = read_columns(run_dir / "worst_case.csv")
        columns = progress, evaluations, worst_case
        return Run(name, args, origin, *columns, bool(result), last, variant)
    except (OSError, ValueError, KeyError, TypeError) as error:
        refuse(f"RUN-DIRS {run_dir} has a file that cannot be read: {error!r}.")


@dataclass
class Section:
    """Runs of one length on one kind of levels."""

    kind: str  # Procgen, Mazes, or the environment
    levels: str  # as in Mazes of 60 blocks
    length: str  # as in 25M
    variants: dict[str, list[Run]]
    # settings that are not the papers' but all the runs'; the variants' names are without them
    common: str = ""

    def __post_init__(self):
        self.title = f"{self.kind}{self.levels}, {self.length} steps"
        levels = self.levels.replace(",", "").replace(" ", "_")
        self.file = f"{self.kind.lower()}{levels}_{self.length}"
        self.runs = [run for runs in self.variants.values() for run in runs]
        # Of each variant the finished runs, or, where none is, those that have been evaluated.
        self.evaluated: dict[str, list[Run]] = {}
        for name, runs in self.variants.items():
            finished = [run for run in runs if run.finished]
            members = finished or [run for run in runs if run.last["global_step"]]
            if members:
                self.evaluated[name] = members
        # Variant -> curriculum of published numbers; none beside runs with other settings only.
        shown = {NAMES[curriculum]: curriculum for curriculum in SHOWN.get(self.kind, [])}
        shown |= {name: x for name, x in UCB_METHODS.items() if name in self.variants}
        self.published = shown if shown.keys() & self.variants.keys() and not self.common else {}
        self.is_as_long = self.length == millions(LENGTHS.get(self.kind, 0))
        others = [name for name in self.variants if name not in COLORS]
        self.colors = COLORS | dict(zip(others, itertools.cycle(MORE_COLORS)))

    def of_task(self, task: str) -> dict[str, list[Run]]:
        """The evaluated runs of a game, or of the mazes, by variant."""
        runs = {x: [run for run in self.evaluated[x] if run.task == task] for x in self.evaluated}
        return {name: members for name, members in runs.items() if members}

    @property
    def tasks(self) -> list[str]:
        return sorted({run.task for runs in self.evaluated.values() for run in runs})

    def shortcomings(self) -> str:
        """What the numbers lack of 10 runs, the published steps, 100 episodes."""
        found = []
        if self.kind not in LENGTHS:
            return ""
        for name, runs in self.evaluated.items():
            number_of = Counter(run.task for run in runs)
            steps = [run.last["global_step"] for run in runs]
            reached = dict.fromkeys(millions(step) for step in (min(steps), max(steps)))
            episodes = min(run.last["episodes"] for run in runs)
            least = min(run.args["eval_episodes"] for run in runs)  # during the training
            enough = 0.99 * LENGTHS[self.kind]
            lacks = {
                f"{len(number_of)} of 16 games": self.kind == "Procgen" and len(number_of) < 16,
                f"runs: {min(number_of.values())}": min(number_of.values()) < 10,
                f"steps: {' to '.join(reached)}": min(steps) < enough,
                "unfinished": not all(run.finished for run in runs),
                f"episodes: {episodes}": episodes < 100,
                f"episodes in the curves: {least}": least < min(episodes, 100),
            }
            words = ", ".join(words for words, lacking in lacks.items() if lacking)
            found += [f"{name} ({words})"] if words else []
        return f"**Less than published:** {'; '.join(found)}.\n\n" if found else ""


def sections(runs: list[Run]) -> list[Section]:
    """Procgen first, the longest first. Two runs of one experiment and seed are told apart by what
    made them. Robust PLR with as many gradient updates as the other curricula stands with those,
    which have half its steps."""

    def experiment(x: Run) -> tuple:
        return x.kind, x.length, x.variant, x.task, x.args["seed"]

    times = Counter(map(experiment, runs))
    twice = {key[:3] for key, n in times.items() if n > 1}
    for run in runs:
        if (run.kind, run.length, run.variant) in twice:
            run.variant += f", {run.made}"
    times = Counter(map(experiment, runs))
    same = [run.name for run in runs if times[experiment(run)] > 1]
    if same:
        refuse(f"RUN-DIRS {' and '.join(same)} are one experiment and seed: choose one.")
    baselines = [run for run in runs if run.args["curriculum"] != "robust_plr"]
    grouped: dict[tuple[str, str, str], list[Run]] = defaultdict(list)
    for run in runs:
        steps = run.args["total_timesteps"]
        alike = [x for x in baselines if (x.kind, x.levels) == (run.kind, run.levels)]
        others = [x.args["total_timesteps"] for x in alike]
        halves = [x for x in others if 2 <= steps / x < 2.3]
        length = run.length
        if run.args["curriculum"] == "robust_plr" and halves and steps not in others:
            run.variant += f", {run.length} steps"
            length = millions(max(halves))
        grouped[run.kind, run.levels, length].append(run)
    order = list(NAMES.values())
    found = []
    for (kind, levels, length), members in grouped.items():
        members.sort(key=lambda x: (len(x.variant), x.variant))
        members.sort(key=lambda x: order.index(NAMES[x.args["curriculum"]]))
        names = [[f"{key} {x}" for key, x in settings(run.args).items()] for run in members]
        common = [x for x in names[0] if all(x in others for others in names[1:])]
        common = [x for x in common if x in members[0].variant.split(", ")]  # not precision
        variants: dict[str, list[Run]] = defaultdict(list)
        for run in members:
            run.variant = ", ".join(x for x in run.variant.split(", ") if x not in common)
            variants[run.variant].append(run)
        found.append(Section(kind, levels, length, dict(variants), ", ".join(common)))

    def order_of(x: Section) -> tuple:
        return x.kind != "Procgen", x.kind, x.levels, -float(x.length[:-1])

    return sorted(found, key=order_of)
