"""The papers' experiments, a run for each setting and seed. Again, it does what is left to do.

    python benchmarks/reproduce.py procgen --dry-run       # prints the paper's 320 commands
    python benchmarks/reproduce.py procgen --games bigfish leaper --seeds 1 2 3 --at-most 4
    python benchmarks/reproduce.py procgen --executor slurm --sbatch gpus-per-node=1 partition=gpu
    python benchmarks/reproduce.py procgen --values augment=none,ucb    # UCB-DrAC, + PLR as well
    python benchmarks/reproduce.py mazes --at-most 5       # dcd's 30 runs, 5 at a time
    python benchmarks/reproduce.py mazes --gradient-matched         # Robust PLR, as many updates
    python benchmarks/reproduce.py mazes --total-timesteps 60000000 --values precision=bf16

Settings are the scripts' defaults: the papers'. launch.py does the work, and its flags are here
too. Finished runs are copied to --results, for report.py; after Slurm, by the same command again.
"""

import importlib
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import launch
import tyro
from collect import collect
from common import ROOT, RUNS, SCRIPTS, refuse

Game = Literal[
    "bigfish", "bossfight", "caveflyer", "chaser", "climber", "coinrun", "dodgeball", "fruitbot",
    "heist", "jumper", "leaper", "maze", "miner", "ninja", "plunder", "starpilot",
]  # fmt: skip
SHAPE = {"num_envs", "num_steps", "replay_prob", "rho", "buffer_size"}


@dataclass
class Paper(launch.Args):
    seeds: tuple[int, ...] = tuple(range(1, 11))  # the papers: 10 runs
    results: Path = RUNS  # folder for the copies of finished runs
    command: tyro.conf.Suppress[str] = ""
    values: tuple[str, ...] = ()  # more flags, as in precision=bf16; several values: alpha=0.5,1


@dataclass
class Procgen(Paper):
    """The PLR paper's table: 16 games x {uniform, plr} x 10 seeds, 25 million steps."""

    games: tuple[Game, ...] = get_args(Game)
    curricula: tuple[Literal["uniform", "plr"], ...] = ("uniform", "plr")
    total_timesteps: int = 25_000_000  # environment steps of each run
    out: Path = Path("runs/reproduce_procgen")  # folder of the run directories


@dataclass
class Mazes(Paper):
    """dcd's 25-block mazes: {dr, plr, robust_plr} x 10 seeds, 250 million steps."""

    curricula: tuple[Literal["dr", "plr", "robust_plr"], ...] = ("dr", "plr", "robust_plr")
    total_timesteps: int = 250_000_000  # environment steps of each run
    gradient_matched: bool = False
    """instead, robust_plr until it has as many gradient updates as dr after --total-timesteps"""
    out: Path = Path("runs/reproduce_mazes")  # folder of the run directories


def gradient_matched_steps(total_timesteps: int) -> int:
    """Steps of a robust_plr run that is expected to optimise as often as dr does in
    `total_timesteps`: two rollouts for each of dr's, since a half of them replays, and those that
    fill half of the buffer first, a level per environment."""
    script = importlib.import_module(SCRIPTS["mazes"]).Args(total_timesteps=total_timesteps)
    fill = math.ceil(script.rho * script.buffer_size / script.num_envs)
    rollouts = total_timesteps // (script.num_envs * script.num_steps)
    return (fill + math.ceil(rollouts / script.replay_prob)) * script.num_envs * script.num_steps


def main() -> None:
    args = tyro.cli(Procgen | Mazes)
    kind = "procgen" if isinstance(args, Procgen) else "mazes"
    if kind == "mazes" and args.gradient_matched:
        for word in args.values:
            if word.partition("=")[0].replace("-", "_") in SHAPE:
                refuse(
                    f"--values {word} must not be with --gradient-matched: it needs the default."
                )
        args.curricula = ("robust_plr",)
        args.total_timesteps = gradient_matched_steps(args.total_timesteps)
    chosen = [f"env_id={','.join(args.games)}"] if kind == "procgen" else []
    chosen.append(f"curriculum={','.join(args.curricula)}")
    chosen.append(f"total_timesteps={args.total_timesteps}")
    args.values = (*chosen, *args.values)
    args.command = f"python {os.path.relpath(ROOT / SCRIPTS[kind])}.py"
    complete = launch.sweep(args)
    if not args.dry_run and not args.table:
        finished = sorted(args.out.glob("*/result.json"))
        for result in finished:
            collect(result.parent, args.results)
        print(f"{len(finished)} finished runs are in {args.results}: python benchmarks/report.py")
    if not complete:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
