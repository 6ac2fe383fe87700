"""dcd's 25-block mazes: {dr, plr, robust_plr} x 10 seeds, 250 million steps each. Again, it does what is left.

    python benchmarks/reproduce_mazes.py --dry-run                               # prints the 30 commands
    python benchmarks/reproduce_mazes.py --seeds 1 2 3 4 5 --at-most 5 --cpus 3  # here, 5 at once, also on one GPU
    python benchmarks/reproduce_mazes.py --gradient-matched --at-most 5          # robust_plr, as many gradient updates
    python benchmarks/reproduce_mazes.py --curricula robust_plr dr --seeds 2 --total-timesteps 60000000 --at-most 2

Settings are the script's defaults, which are dcd's; at the end, 100 episodes in each evaluation maze. launch.py does
the work: its flags (--executor slurm, --cpus, ...) are here too. Finished runs are copied to --results, for report.py;
with Slurm, by the same command once more when they are finished.
"""

import os
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Literal

import collect
import launch
import tyro


@dataclass
class Args(launch.Args):
    curricula: tuple[Literal["dr", "plr", "robust_plr"], ...] = ("dr", "plr", "robust_plr")
    seeds: tuple[int, ...] = tuple(range(1, 11))  # dcd: 10 runs
    total_timesteps: int = 250_000_000  # environment steps of each run
    gradient_matched: bool = False
    """instead, robust_plr until it has about as many gradient updates as dr and plr after --total-timesteps"""
    out: Path = Path("runs/reproduce_mazes")  # folder of the run directories
    results: Path = collect.RUNS  # folder for the copies of finished runs
    command: tyro.conf.Suppress[str] = f"python {os.path.relpath(collect.ROOT / 'ppo_robust_plr_minigrid.py')}"
    values: tuple[str, ...] = ()  # more flags, as in precision=bf16 compile=True; each of several values: alpha=0.5,1


def gradient_matched_steps(total_timesteps: int) -> int:
    """Steps of a robust_plr run that is expected to optimise as often as dr does in `total_timesteps`: two rollouts for
    each of dr's, since a half of them replays, and those that fill half of the buffer first, a level per environment.
    """
    script = collect.ppo_robust_plr_minigrid.Args(total_timesteps=total_timesteps)
    fill = ceil(script.rho * script.buffer_size / script.num_envs)
    return (fill + ceil(script.num_iterations / script.replay_prob)) * script.batch_size


def main() -> None:
    args = tyro.cli(Args)
    if args.gradient_matched:
        for word in args.values:
            if word.split("=")[0].replace("-", "_") in ("num_envs", "num_steps", "replay_prob", "rho", "buffer_size"):
                launch.refuse(f"--values {word} must not be with --gradient-matched, which knows the default only.")
        args.curricula, args.total_timesteps = ("robust_plr",), gradient_matched_steps(args.total_timesteps)
    chosen = f"curriculum={','.join(args.curricula)}", f"total_timesteps={args.total_timesteps}"
    args.values = (*chosen, *args.values)
    collect.sweep(args, args.results)


if __name__ == "__main__":
    main()
