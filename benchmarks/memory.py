"""Memory of Procgen's levels: resident size while one process begins many and evaluates often.

python benchmarks/memory.py                                    # some minutes on one core
python benchmarks/memory.py --out benchmarks/results/memory    # also memory.csv, memory.md

Linux only: the resident size is what /proc says.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from common import ROOT, commit_and_machine, markdown, write_csv

import ppo_plr_procgen as script

# Measured once at 363b3db, which made a game for each level and for each evaluation and closed it
BEFORE = "10.7 KB for each new level (2.1 GB for 200,000) and 4 MB for each evaluation"
NUM_ENVS = 8


@dataclass
class Args:
    env_id: str = "starpilot"
    levels: int = 200_000  # starts made in one ProcgenLevels, none twice
    every: int = 20_000  # levels between two rows of the table
    evaluations: int = 30  # of 100 + 100 episodes, random actions
    out: Path | None = None  # folder for memory.csv and memory.md


class RandomAgent:
    """In the network's place, whose memory is not asked about."""

    def get_action_and_value(self, obs: torch.Tensor) -> tuple[torch.Tensor]:
        return (torch.randint(15, (len(obs),)),)


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def of_levels(args: Args) -> list[dict[str, Any]]:
    """The cache of 4,096 starts, 21-38 KB each, is full after the first row."""
    envs = script.ProcgenLevels(NUM_ENVS, args.env_id, "easy", 1)
    rows = [{"what": "levels", "count": 0, "resident_mb": resident_mb()}]
    for first in range(0, args.levels, NUM_ENVS):
        envs.reset(seed=first)
        count = first + NUM_ENVS
        if count % args.every == 0:
            rows.append({"what": "levels", "count": count, "resident_mb": resident_mb()})
    envs.close()
    return rows


def of_evaluations(args: Args) -> list[dict[str, Any]]:
    settings = script.Args(env_id=args.env_id, env_threads=1)
    rows = []
    for count in range(1, args.evaluations + 1):
        script.evaluate(RandomAgent(), settings, torch.device("cpu"))
        if count == 1 or count % 5 == 0:
            rows.append({"what": "evaluations", "count": count, "resident_mb": resident_mb()})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [[rows[0]["what"], "resident size (MB)"]]
    for row in rows:
        lines.append([f"{row['count']:,}", f"{row['resident_mb']:,.1f}"])
    return markdown(lines, left=0)


def main() -> None:
    args = tyro.cli(Args)
    torch.set_num_threads(1)
    levels = of_levels(args)
    evaluations = of_evaluations(args)
    text = f"""New levels of {args.env_id} begun in one process, {NUM_ENVS} environments:

{table(levels)}
The first row's cache of level starts is empty, from the second on it is full.
Evaluations after these, 100 + 100 episodes each:

{table(evaluations)}
At 363b3db: {BEFORE}.
{commit_and_machine(ROOT / "ppo_plr_procgen.py")}.
"""
    print(text)
    if args.out:
        write_csv(args.out / "memory.csv", levels + evaluations)
        (args.out / "memory.md").write_text(text)


if __name__ == "__main__":
    main()
