"""What choosing levels costs: the time of LevelSampler's draws, updates and buffer insertions.

    python benchmarks/sampler.py
    python benchmarks/sampler.py --out benchmarks/results/sampler      # also writes sampler.csv and sampler.md

A few seconds on one core. Run it on an idle machine.
"""

import csv
import os
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from plr_sampler import LevelSampler

# The published sampler (facebookresearch/level-replay at ccecf45), measured once on 2 cores and not again here:
# microseconds per draw, milliseconds per 256 x 64 update (none measured above 4,000 levels).
PUBLISHED_DRAW = {200: 52, 4_000: 231, 100_000: 6_100, 1_000_000: 71_000}
PUBLISHED_UPDATE = {200: 8.7, 4_000: 35}
T, N = 256, 64  # the paper's rollout on Procgen
EPISODE_LENGTH = 80  # mean length of the episodes made up here: about 260 segments per rollout


@dataclass
class Args:
    num_levels: tuple[int, ...] = (200, 4_000, 100_000, 1_000_000)
    """sizes of the fixed set of levels"""
    buffer_size: int = 4_000
    """size of the buffer that new levels are inserted into"""
    repeats: int = 31
    """rollouts timed per size; the table has their medians"""
    out: Path | None = None
    """folder for sampler.csv and sampler.md"""


def cpu_name() -> str:
    """Model and number of usable cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model}, {cores} cores"


def markdown(rows: list[dict[str, str]]) -> str:
    lines = [list(rows[0]), ["---:"] * len(rows[0])] + [list(row.values()) for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_csv(path: Path, rows: list[dict]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def rollout(rng: np.random.Generator, num_levels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """levels, step_scores and dones, (T, N) each, with a random level per episode."""
    dones = rng.random((T, N)) < 1 / EPISODE_LENGTH
    episode = np.concatenate((np.zeros((1, N), int), dones[:-1].cumsum(0))) + T * np.arange(N)
    return rng.integers(num_levels, size=T * N)[episode], rng.random((T, N)), dones


def time_fixed_set(num_levels: int, repeats: int) -> dict[str, float]:
    """Seconds per draw and per update once every level has been seen."""
    rng = np.random.default_rng(0)
    sampler = LevelSampler(range(num_levels), num_envs=N, seed=1)
    sampler.update_scores(np.arange(num_levels), rng.random(num_levels))
    between, amortised, update = [], [], []
    for _ in range(repeats + 1):
        played = rollout(rng, num_levels)
        t0 = time.perf_counter()
        sampler.update(*played)
        t1 = time.perf_counter()
        sampler.sample()  # the first draw after an update computes the score weights
        t2 = time.perf_counter()
        for _ in range(N - 1):
            sampler.sample()
        t3 = time.perf_counter()
        update.append(t1 - t0)
        between.append((t3 - t2) / (N - 1))
        amortised.append((t3 - t1) / N)
    timings = {"draw": between, "amortised": amortised, "update": update}
    return {name: float(np.median(seconds[1:])) for name, seconds in timings.items()}  # without the warm-up


def time_insertion(buffer_size: int, repeats: int) -> float:
    """Seconds per new level that replaces one in a full buffer, over rollouts with one new level per environment."""
    sampler = LevelSampler(buffer_size=buffer_size, num_envs=N, seed=1)
    seconds = []
    while len(seconds) < repeats + 1:
        levels = sampler.next_levels(np.ones(N, bool), replay=False)
        full, evicted = sampler.num_seen == buffer_size, sampler.counts["evicted"]
        scores = sampler.counts["started"] + np.arange(N)  # higher than all before: none is rejected
        start = time.perf_counter()
        sampler.update_scores(levels, scores)
        if full:
            seconds.append((time.perf_counter() - start) / N)
            assert sampler.counts["evicted"] - evicted == N
    return float(np.median(seconds[1:]))


def main() -> None:
    args = tyro.cli(Args)
    rows = []
    for num_levels in args.num_levels:
        seconds = time_fixed_set(num_levels, args.repeats)
        row = {"levels": num_levels, "draw_us": seconds["draw"] * 1e6, "draw_amortised_us": seconds["amortised"] * 1e6}
        row |= {"update_ms": seconds["update"] * 1e3, "insertion_ms": ""}
        row |= {"published_draw_us": PUBLISHED_DRAW.get(num_levels, "")}
        rows.append(row | {"published_update_ms": PUBLISHED_UPDATE.get(num_levels, "")})
    insertion = time_insertion(args.buffer_size, args.repeats) * 1e3
    rows.append(dict.fromkeys(rows[0], "") | {"levels": args.buffer_size, "insertion_ms": insertion})

    def times(published: float | str, ours: float) -> str:
        return f"{published / ours:,.0f} x" if published else ""

    table = [
        {
            "levels": f"{row['levels']:,}",
            "draw between updates (us)": f"{row['draw_us']:.1f}",
            f"draw, {N} per update (us)": f"{row['draw_amortised_us']:,.1f}",
            "published code's draw (us)": f"{row['published_draw_us']:,}" if row["published_draw_us"] else "",
            "draw ratio": times(row["published_draw_us"], row["draw_amortised_us"]),
            f"{T} x {N} update (ms)": f"{row['update_ms']:.2f}",
            "published code's update (ms)": str(row["published_update_ms"]),
            "update ratio": times(row["published_update_ms"], row["update_ms"]),
        }
        for row in rows[:-1]
    ]
    text = f"""{markdown(table)}

A new level into a full buffer of {args.buffer_size:,}: {insertion:.2f} ms.

{cpu_name()}; Python {platform.python_version()}, NumPy {np.__version__}. Medians of {args.repeats} rollouts, all levels
seen, the paper's settings. "{N} per update" counts the first draw after each update, which computes the weights; the
ratio is to that. Published code: facebookresearch/level-replay at ccecf45, measured on 2 cores, not in this run.
"""
    print(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        write_csv(args.out / "sampler.csv", rows)
        (args.out / "sampler.md").write_text(text)


if __name__ == "__main__":
    main()
