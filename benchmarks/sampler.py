"""What choosing levels costs: the time of LevelSampler's draws, updates and buffer insertions.

python benchmarks/sampler.py                                      # some seconds on one core
python benchmarks/sampler.py --out benchmarks/results/sampler     # also sampler.csv, sampler.md
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from common import cpu_name, markdown, write_csv

from plr_sampler import LevelSampler

# The published sampler (facebookresearch/level-replay at ccecf45), measured once on 2 cores and not
# here: levels -> microseconds per draw, milliseconds per 256 x 64 update (none at more levels).
PUBLISHED = {200: (52, 8.7), 4_000: (231, 35), 100_000: (6_100, None), 1_000_000: (71_000, None)}
T, N = 256, 64  # the paper's rollout on Procgen
EPISODE_LENGTH = 80  # mean length of the episodes made up here: about 260 segments per rollout
BUFFER = 4_000


@dataclass
class Args:
    repeats: int = 31  # rollouts timed per size; the table has their medians
    out: Path | None = None  # folder for sampler.csv and sampler.md


def rollout(rng: np.random.Generator, num_levels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """levels, step_scores and dones, (T, N) each, with a random level per episode."""
    dones = rng.random((T, N)) < 1 / EPISODE_LENGTH
    episode = np.concatenate((np.zeros((1, N), int), dones[:-1].cumsum(0))) + T * np.arange(N)
    return rng.integers(num_levels, size=T * N)[episode], rng.random((T, N)), dones


def time_fixed_set(num_levels: int, repeats: int) -> dict[str, float]:
    """Draws and updates once every level has been seen."""
    rng = np.random.default_rng(0)
    sampler = LevelSampler(range(num_levels), num_envs=N, seed=1)
    sampler.update_scores(np.arange(num_levels), rng.random(num_levels))
    seconds = []
    for _ in range(repeats + 1):
        played = rollout(rng, num_levels)
        start = time.perf_counter()
        sampler.update(*played)
        updated = time.perf_counter()
        sampler.sample()  # the first draw after an update computes the weights
        first = time.perf_counter()
        for _ in range(N - 1):
            sampler.sample()
        last = time.perf_counter()
        seconds.append([(last - first) / (N - 1), (last - updated) / N, updated - start])
    draw, amortised, update = np.median(seconds[1:], axis=0)  # without the warm-up
    return {"draw_us": draw * 1e6, "draw_amortised_us": amortised * 1e6, "update_ms": update * 1e3}


def time_insertion(repeats: int) -> float:
    """Milliseconds per new level that replaces one in a full buffer, N of them per rollout."""
    sampler = LevelSampler(buffer_size=BUFFER, num_envs=N, seed=1)
    seconds = []
    for i in range(BUFFER // N + 2 + repeats):
        levels = sampler.next_levels(np.ones(N, bool), replay=False)
        scores = i * N + np.arange(N)  # higher than all before: none is rejected
        start = time.perf_counter()
        sampler.update_scores(levels, scores)
        seconds.append((time.perf_counter() - start) / N)
    return float(np.median(seconds[-repeats:])) * 1e3


def main() -> None:
    args = tyro.cli(Args)
    rows = []
    header = ["levels", "draw between updates (us)", f"draw, {N} per update (us)"]
    header += [
        "published code's draw (us)",
        f"{T} x {N} update (ms)",
        "published code's update (ms)",
    ]
    table = [header]
    for num_levels, (published_draw, published_update) in PUBLISHED.items():
        row = {"levels": num_levels} | time_fixed_set(num_levels, args.repeats)
        rows.append(row)
        times = f"{published_draw / row['draw_amortised_us']:.0f} x"
        cells = [f"{num_levels:,}", f"{row['draw_us']:.1f}", f"{row['draw_amortised_us']:,.1f}"]
        cells += [f"{published_draw:,} ({times})", f"{row['update_ms']:.2f}", ""]
        if published_update:
            cells[-1] = f"{published_update} ({published_update / row['update_ms']:.0f} x)"
        table.append(cells)
    insertion = time_insertion(args.repeats)
    text = f"""{markdown(table, left=0)}
A new level into a full buffer of {BUFFER:,}: {insertion:.2f} ms.

{cpu_name()}; NumPy {np.__version__}. Medians of {args.repeats} rollouts, all levels seen.
"{N} per update" counts the first draw after each update, which computes the weights; the published
draw is compared with that. Published code: facebookresearch/level-replay at ccecf45, measured on 2
cores, not in this run.
"""
    print(text)
    if args.out:
        write_csv(args.out / "sampler.csv", rows)
        (args.out / "sampler.md").write_text(text)


if __name__ == "__main__":
    main()
