"""The PLR paper's Procgen table: 16 games x {uniform, plr} x 10 seeds, 25 million steps. Again, it does what is left.

    python benchmarks/reproduce_procgen.py --dry-run                               # prints the 320 commands
    python benchmarks/reproduce_procgen.py --games bigfish leaper --seeds 1 2 3 --at-most 4 --cpus 2  # here, 4 at once
    python benchmarks/reproduce_procgen.py --executor slurm --gpus 1 --cpus 8 --minutes 720 --sbatch partition=gpu
    python benchmarks/reproduce_procgen.py --games ninja --total-timesteps 2000000 --values precision=bf16

Settings are the script's defaults, which are the paper's: easy mode, 200 training levels; at the end the final policy
plays 100 unseen levels, stochastically. launch.py does the work: its flags (--executor slurm, --cpus, ...) are here
too. Finished runs are copied to --results, for report.py; with Slurm, by the same command once more when they are.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import collect
import launch
import tyro

Game = Literal[
    "bigfish", "bossfight", "caveflyer", "chaser", "climber", "coinrun", "dodgeball", "fruitbot",
    "heist", "jumper", "leaper", "maze", "miner", "ninja", "plunder", "starpilot",
]  # fmt: skip


@dataclass
class Args(launch.Args):
    games: tuple[Game, ...] = get_args(Game)
    curricula: tuple[Literal["uniform", "plr"], ...] = ("uniform", "plr")
    seeds: tuple[int, ...] = tuple(range(1, 11))  # the paper: 10 runs
    total_timesteps: int = 25_000_000  # environment steps of each run
    out: Path = Path("runs/reproduce_procgen")  # folder of the run directories
    results: Path = collect.RUNS  # folder for the copies of finished runs
    command: tyro.conf.Suppress[str] = f"python {os.path.relpath(collect.ROOT / 'ppo_plr_procgen.py')}"
    values: tuple[str, ...] = ()  # more flags, as in precision=bf16 compile=True; each of several values: alpha=0.5,1


def main() -> None:
    args = tyro.cli(Args)
    chosen = {"env_id": args.games, "curriculum": args.curricula, "total_timesteps": [str(args.total_timesteps)]}
    args.values = (*(f"{name}={','.join(x)}" for name, x in chosen.items()), *args.values)
    collect.sweep(args, args.results)


if __name__ == "__main__":
    main()
