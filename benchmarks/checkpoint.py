"""What a checkpoint costs: seconds and size of each, and its share of the run at the default interval.

    python benchmarks/checkpoint.py --out benchmarks/results/checkpoint

Runs both scripts in their default shape with a checkpoint after every iteration. What passes between two rows of
progress.csv and is not an iteration is the checkpoint and the writing of the row.
"""

import csv
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import tyro
from sampler import cpu_name, markdown, write_csv

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ppo_plr_procgen
import ppo_robust_plr_minigrid

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Args:
    iterations: int = 8
    """iterations of each run; the first is left out"""
    precision: str = "bf16"
    """of ppo_plr_procgen.py, whose iterations are long"""
    out: Path | None = None
    """folder for checkpoint.md and checkpoint.csv"""


def measure(script, flags: list[str], iterations: int) -> dict[str, str]:
    """Runs `script` with a checkpoint after each iteration; medians over the iterations."""
    defaults = script.Args()
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        flags = [*flags, "--total-timesteps", str(iterations * defaults.batch_size), "--checkpoint-interval", "1"]
        flags += ["--eval-interval", "0", "--eval-episodes", "1", "--run-dir", str(run_dir)]
        subprocess.run([sys.executable, f"{script.__name__}.py", *flags], cwd=ROOT, check=True)
        with open(run_dir / "progress.csv") as file:
            rows = [{key: float(row[key]) for key in ("wall_seconds", "SPS")} for row in csv.DictReader(file)]
        size = (run_dir / "checkpoint.pt").stat().st_size
    iteration = [defaults.batch_size / row["SPS"] for row in rows]
    cost = [b["wall_seconds"] - a["wall_seconds"] - s for a, b, s in zip(rows[1:], rows[2:], iteration[2:])]
    seconds, interval = median(cost), defaults.checkpoint_interval
    return {
        "script": f"{script.__name__}.py",
        "MB": f"{size / 1e6:.1f}",
        "seconds per checkpoint": f"{seconds:.4f}",
        "range": f"{min(cost):.4f} to {max(cost):.4f}",
        "seconds per iteration": f"{median(iteration[1:]):.3f}",
        "default interval": str(interval),
        "share of the run": f"{seconds / (interval * median(iteration[1:])):.3%}",
    }


def main() -> None:
    args = tyro.cli(Args)
    procgen = measure(ppo_plr_procgen, ["--precision", args.precision], args.iterations)
    mazes = measure(ppo_robust_plr_minigrid, ["--rho", "0.01"], 4 * args.iterations)  # replays at once
    text = markdown([procgen, mazes])
    text += f"\n\n{cpu_name()}, {torch.get_num_threads()} torch threads; PyTorch {torch.__version__}.\n"
    print(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "checkpoint.md").write_text(text)
        write_csv(args.out / "checkpoint.csv", [procgen, mazes])


if __name__ == "__main__":
    main()
