"""How clean the test levels of each Procgen game are: those that begin like a training level, and
those that end with their first step, whatever is done. 16 games take about five minutes.

    python benchmarks/levels.py     # easy mode: benchmarks/results/test_levels/easy_200.md
    python benchmarks/levels.py --mode hard --num-levels 500 --games coinrun maze
"""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import tyro
from common import RUNS, SCRIPTS, markdown, refuse, write_csv
from reproduce import Game

script = importlib.import_module(SCRIPTS["procgen"])

FIRST = """\
Written by `python benchmarks/levels.py`; do not edit. Procgen, {mode} mode, training levels 0
to {last}, {test} test levels as an evaluation draws them with --seed 1. Seen: the first observation
equals a training level's, to the pixel. One step: the episode ends with its first step, whatever
the action. ± is one standard error of the share.

"""


@dataclass
class Args:
    games: tuple[Game, ...] = get_args(Game)
    mode: Literal["easy", "hard"] = "easy"
    num_levels: int = 200  # training levels
    test_levels: int = 1000  # drawn as an evaluation with as many episodes draws them
    out: Path = RUNS.parent / "test_levels"  # folder for the table, as .md and .csv


def share(count: int, of: int) -> str:
    p = count / of
    return f"{100 * p:.1f} ± {100 * (p * (1 - p) / of) ** 0.5:.1f}" if count else "0"


def look_through(game: str, args: Args) -> dict[str, Any]:
    settings = script.Args(
        env_id=game,
        distribution_mode=args.mode,
        num_levels=args.num_levels,
        eval_episodes=args.test_levels,
    )
    envs = script.make_envs(settings, 100, torch.device("cpu"))
    flawed = script.flawed_levels(settings, envs)
    training_levels = np.arange(args.num_levels)
    starts = script.first_observations(envs, training_levels)
    row = {
        "game": game,
        "test_levels": args.test_levels,
        "seen": int(flawed["seen"].sum()),
        "one_step": int(flawed["one_step"].sum()),
        "training_levels": args.num_levels,
        "distinct_training_levels": len(set(starts)),
        "one_step_training": int(script.end_at_once(envs, training_levels).sum()),
    }
    envs.close()
    return row


def main() -> None:
    args = tyro.cli(Args)
    if not 0 < args.num_levels <= script.MOST_TRAINING_LEVELS:
        most = f"at least 1 and at most {script.MOST_TRAINING_LEVELS}"
        refuse(f"--num-levels {args.num_levels} must be {most}.")
    rows = []
    table = [["% of levels", "test: seen", "test: one step", "training: one step"]]
    for game in args.games:
        row = look_through(game, args)
        counts = [share(row[x], args.test_levels) for x in ("seen", "one_step")]
        table.append([game, *counts, share(row["one_step_training"], args.num_levels)])
        rows.append(row)
        print(row, flush=True)
    path = args.out / f"{args.mode}_{args.num_levels}"
    write_csv(path.with_suffix(".csv"), rows)
    first = FIRST.format(mode=args.mode, last=args.num_levels - 1, test=args.test_levels)
    path.with_suffix(".md").write_text(first + markdown(table))
    print(path.with_suffix(".md"))


if __name__ == "__main__":
    main()
