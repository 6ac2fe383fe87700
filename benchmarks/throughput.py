"""Speed of both scripts: environments alone, training, where its time goes, several runs at once; peers beside them.

    python benchmarks/throughput.py --out benchmarks/results/throughput
    python benchmarks/throughput.py --cleanrl PATH/ppo_procgen.py --jaxued PATH --jaxued-python PATH/bin/python
    python benchmarks/throughput.py --scripts mazes --precisions fp32 tf32 bf16 --compile \\
        --mazes-envs 32 512 2048 8192 --at-once 1 4 8 --limit 560 --out "$OUT/throughput"         # on a GPU
    python benchmarks/throughput.py --parts environment                                           # a minute

Training numbers come from the scripts as they are, one process per run, the first iteration (of each kind) dropped. The
contenders take turns (A B A B ...), so that what else the machine does meets all of them. Files are written after every
measurement; one that fails, or for which no time is left, is named in them and stops no other. With the defaults and
both peers some 25 minutes on 2 cores, idle ones.
"""

import csv
import functools
import itertools
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import matplotlib
import numpy as np
import torch
import tyro
from peers import BLOCK, cleanrl, jaxued
from common import cpu_name, write_csv
from common import markdown

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SCRIPTS = {"procgen": "ppo_plr_procgen.py", "mazes": "ppo_robust_plr_minigrid.py"}
PAPER = {"procgen": (64, 25_000_000), "mazes": (32, 250_000_000)}  # environments, steps of a run
PHASES = ("environment", "inference", "transfer", "sampler", "update", "rest")
MOST_ENVS = 1024  # mazes in a minibatch: 256 steps of each take 8 MB in an update
COLUMNS = ["part", "script", "num_envs", "contender", "round", "steps_per_second", "iterations", "replay_share"]
COLUMNS += ["new_seconds", "replay_seconds", "as_run", "step_alone", "step_best", "runs", *PHASES]
COLUMNS += ["wrappers", "evaluation", "jax"]


@dataclass
class Args:
    scripts: tuple[Literal["procgen", "mazes"], ...] = ("procgen", "mazes")
    """which of the two"""
    parts: tuple[Literal["environment", "training", "phases", "at_once"], ...] = ("environment", "training", "phases")
    """what to measure; --at-once adds its own"""
    procgen_envs: tuple[int, ...] = (64,)
    """numbers of Procgen environments; a minibatch is always an eighth of the rollout"""
    mazes_envs: tuple[int, ...] = (32, 512, 4096)
    """numbers of mazes; the peer has 32"""
    game: str = "starpilot"
    """of Procgen, in easy mode"""
    num_steps: int = 256
    """steps of each environment per rollout"""
    precisions: tuple[Literal["fp32", "tf32", "bf16"], ...] = ("fp32", "bf16")
    """of our network; the peers' is fp32"""
    compile: bool = False
    """also run each precision with --compile"""
    at_once: tuple[int, ...] = ()
    """numbers of runs at the same time, of the papers' shapes in the last precision"""
    cuda: bool = True
    """use the GPU if there is one"""
    cleanrl: Path | None = None
    """CleanRL's ppo_procgen.py, to run beside ours"""
    jaxued: Path | None = None
    """a checkout of github.com/DramaCow/jaxued, to run its examples/maze_plr.py beside ours"""
    jaxued_python: str = sys.executable
    """interpreter with jaxued's requirements"""
    rounds: int = 2
    """times that each contender runs"""
    iterations: int = 2
    """iterations measured in each run of Procgen; six times as many of mazes, whose iterations are short"""
    buffer_size: int = 4000
    """mazes kept for replay, and levels that the mazes alone are reset to"""
    rho: float = 0.5
    """fill of that buffer before replay, which is not measured"""
    max_steps: int = 250
    """time limit of an episode in a maze, at most --num-steps"""
    seconds: float = 2.0
    """of one measurement of the environments alone"""
    limit: float = 3600.0
    """seconds for everything; what has not begun by then is left out, and said"""
    out: Path | None = None
    """folder for throughput.md, throughput.csv (every measurement) and throughput.png"""


# ---- environments alone ---------------------------------------------------------------------------------------------


def now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def environment_alone(args: Args, script: str, num_envs: int, compiled: bool) -> dict[str, Any]:
    """Steps with random actions; where episodes end, levels drawn from a set whose starts are known. For mazes also
    `step` by itself: nobody looks whether an episode has ended."""
    rng, steps = np.random.default_rng(0), -50  # the first 50 warm up
    if script == "procgen":
        from ppo_plr_procgen import ProcgenLevels

        num_levels, actions = 200, rng.integers(15, size=(512, num_envs)).astype(np.int32)
        envs = ProcgenLevels(num_envs, args.game, "easy", min(os.cpu_count(), num_envs))
        for level in range(num_levels):
            envs.level_start(level)
        envs.reset(seed=rng.integers(num_levels, size=num_envs))
    else:
        from ppo_robust_plr_minigrid import MazeEnvs

        device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
        envs, num_levels = MazeEnvs(num_envs, device, max_steps=args.max_steps, compile=compiled), args.buffer_size
        actions = torch.from_numpy(rng.integers(7, size=(512, num_envs))).to(device)
        for first in range(0, num_levels, num_envs):
            envs.reset(seed=np.arange(first, first + num_envs) % num_levels)
    start = now()
    while steps <= 0 or now() - start < args.seconds:
        start = now() if steps == 0 else start
        _, _, terminations, truncations, _ = envs.step(actions[steps % len(actions)])
        done = terminations | truncations
        done = done if script == "procgen" else done.cpu().numpy()
        if done.any():
            envs.reset(seed=rng.integers(num_levels, size=num_envs), options={"reset_mask": done})
        steps += 1
    result = {"steps_per_second": steps * num_envs / (now() - start)}
    if script == "procgen":
        envs.close()
        return result
    steps, start, best, rows = 0, now(), 0.0, list(actions)
    while now() - start < args.seconds:
        window = now()
        for row in rows:
            envs.step(row)
        steps, best = steps + len(rows), max(best, len(rows) * num_envs / (now() - window))
    return result | {"step_alone": steps * num_envs / (now() - start), "step_best": best}


# ---- training -------------------------------------------------------------------------------------------------------


def command(args: Args, script: str, num_envs: int, flags: list[str], iterations: int, run_dir: Path) -> list[str]:
    line = [sys.executable, SCRIPTS[script], "--num-envs", str(num_envs), "--num-steps", str(args.num_steps), *flags]
    line += ["--total-timesteps", str(iterations * num_envs * args.num_steps), "--cuda" if args.cuda else "--no-cuda"]
    line += ["--eval-interval", "0", "--eval-episodes", "1", "--checkpoint-interval", "0", "--run-dir", str(run_dir)]
    if script == "procgen":
        return [*line, "--env-id", args.game]
    minibatches = next(k for k in range(-(-num_envs // MOST_ENVS), num_envs + 1) if num_envs % k == 0)
    line += ["--buffer-size", str(max(args.buffer_size, num_envs)), "--num-minibatches", str(minibatches)]
    return [*line, "--max-steps", str(args.max_steps)]


def iteration_seconds(progress: Path, rho: float) -> dict[int, list[float]]:
    """Of a run's iterations on new levels (0) and on replayed ones (1) once rho of the levels are seen, the first of
    each kind dropped. Procgen's iterations are all of kind 1: each learns."""
    rows = list(csv.DictReader(progress.read_text().split("\n")[:-1])) if progress.exists() else []
    seconds: dict[int, list[float]] = {0: [], 1: []}
    for before, row in zip(rows, rows[1:]):
        if float(before["seen_share"]) >= rho:
            taken = float(row["wall_seconds"]) - float(before["wall_seconds"])
            seconds[int(row.get("replay", 1))].append(taken)
    return {kind: x[1:] if "replay" in rows[0] else x for kind, x in seconds.items()} if rows else seconds


def training(
    args: Args, script: str, num_envs: int, flags: list[str], rho: float, iterations: int, limit: float, runs: int = 1
) -> dict[str, Any]:
    """Runs our script, `runs` times at once, until each has enough iterations. Steps/s of one run: of mazes those of
    half and half, from the median iterations on new levels and on replayed ones; as_run: as they came. Summed up."""
    kinds, steps, start = (1,) if script == "procgen" else (0, 1), num_envs * args.num_steps, time.perf_counter()
    flags = [*flags, *(["--rho", str(rho)] if script == "mazes" else [])]

    def enough(x: dict[int, list[float]]) -> bool:  # one iteration of Procgen will do, and two of each kind of mazes
        return sum(map(len, x.values())) >= iterations and min(len(x[kind]) for kind in kinds) >= len(kinds)

    with tempfile.TemporaryDirectory() as folder:
        dirs = [Path(folder) / str(i) for i in range(runs)]
        processes = []
        for i, run_dir in enumerate(dirs):
            total = iterations + 1 if script == "procgen" else 10**6
            line = command(args, script, num_envs, flags, total, run_dir)
            with open(f"{run_dir}.log", "w") as log:
                line += ["--seed", str(i + 1)]
                processes.append(subprocess.Popen(line, cwd=ROOT, stdout=log, stderr=log))
        seconds, alive = [{kind: [] for kind in (0, 1)} for _ in dirs], True
        try:
            while alive and not all(map(enough, seconds)) and time.perf_counter() - start < limit:
                time.sleep(0.5)
                alive = any(process.poll() is None for process in processes)
                seconds = [iteration_seconds(run_dir / "progress.csv", rho) for run_dir in dirs]
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait()
        if any(len(x[kind]) < len(kinds) for x in seconds for kind in kinds):
            said = Path(f"{dirs[0]}.log").read_text()[-2000:]
            raise RuntimeError(f"too few iterations within {limit:.0f} s: {said}")
    result = {"runs": runs, "iterations": sum(len(x) for each in seconds for x in each.values())}
    result["steps_per_second"] = sum(len(kinds) * steps / sum(median(x[k]) for k in kinds) for x in seconds)
    if script == "mazes":
        new, replay = (median(sum((x[k] for x in seconds), [])) for k in kinds)
        result |= {"new_seconds": new, "replay_seconds": replay}
        result["replay_share"] = sum(len(x[1]) for x in seconds) / result["iterations"]
        result["as_run"] = sum(sum(map(len, x.values())) * steps / sum(map(sum, x.values())) for x in seconds)
    return result


def profiled(args: Args, script: str, num_envs: int, flags: list[str], limit: float) -> dict[str, Any]:
    """Seconds per iteration of each phase, as --profile gives them, of iterations that all learn."""
    flags = [*flags, "--profile", *(["--curriculum", "plr", "--rho", "0.01"] if script == "mazes" else [])]
    iterations = args.iterations if script == "procgen" else 6 * args.iterations
    with tempfile.TemporaryDirectory() as folder:
        line = command(args, script, num_envs, flags, iterations + 2, Path(folder) / "run")
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=limit)
    said = re.search(r"profile to iteration \d+, rank 0: (.*)", done.stdout)
    if done.returncode or not said:
        raise RuntimeError(f"{' '.join(line)} failed:\n{done.stdout[-1000:]}{done.stderr[-2000:]}")
    phases = {name: float(x) / iterations for name, x in re.findall(r"(\w+) ([\d.e+-]+) s \(", said[1])}
    speed = num_envs * args.num_steps / sum(phases.values())
    return {"steps_per_second": speed, "iterations": iterations} | {name: phases.get(name, 0.0) for name in PHASES}


# ---- tables and plot ------------------------------------------------------------------------------------------------


def spread(rows: list[dict], key: str = "steps_per_second") -> dict[str, str]:
    values = [row[key] for row in rows]
    return {"steps/s": f"{median(values):,.0f}", "range": f"{min(values):,.0f} to {max(values):,.0f}"}


def grouped(rows: list[dict], part: str) -> dict[tuple[str, int, str], list[dict]]:
    groups: dict[tuple[str, int, str], list[dict]] = {}
    for row in rows:
        if row["part"] == part:
            groups.setdefault((row["script"], row["num_envs"], row["contender"]), []).append(row)
    return groups


def tables(args: Args, rows: list[dict]) -> str:
    text = ""
    if lines := [
        {"environments": f"{n:,} {script}", "": name, **spread(group)}
        | ({"`step` by itself": f"{median(row['step_alone'] for row in group):,.0f}",
            "its best 512 steps": f"{max(row['step_best'] for row in group):,.0f}"}
           if group[0]["step_alone"] else {"`step` by itself": "", "its best 512 steps": ""})
        for (script, n, name), group in grouped(rows, "environment").items()
    ]:  # fmt: skip
        text += f"Environments alone, random actions, with resets:\n\n{markdown(lines)}\n\n"
    lines, groups = [], grouped(rows, "training")
    for (script, n, name), group in groups.items():
        peer = next((x for x in groups if x[:2] == (script, n) and x[2] in ("CleanRL", "jaxued")), None)
        line = {"script": script, "environments": f"{n:,}", "contender": name, **spread(group)}
        speed = median(row["steps_per_second"] for row in group)
        line["ratio to the peer"], line["rounds' ratios"] = "", ""
        if peer:
            ratios = [a["steps_per_second"] / b["steps_per_second"] for a, b in zip(group, groups[peer])]
            line["ratio to the peer"] = f"{speed / median(row['steps_per_second'] for row in groups[peer]):.2f}"
            line["rounds' ratios"] = ", ".join(f"{x:.2f}" for x in ratios)
        hours = PAPER[script][1] / speed / 3600
        line[f"the paper's {' or '.join(f'{x[1] // 10**6}M' for x in PAPER.values())} steps take"] = f"{hours:,.1f} h"
        for kind in ("new", "replay"):
            seconds = [row[f"{kind}_seconds"] for row in group if row[f"{kind}_seconds"] != ""]
            line[f"iteration on {kind} levels" if kind == "new" else "on replayed ones"] = (
                f"{median(seconds):.2f} s" if seconds else ""
            )
        lines.append(line)
    text += f"Training:\n\n{markdown(lines)}\n\n" if lines else ""
    lines = []
    for (script, n, name), group in grouped(rows, "phases").items():
        total = sum(row[phase] for row in group for phase in PHASES)
        line = {"script": script, "environments": f"{n:,}", "": name}
        for phase in ("environment", "inference", "update"):
            alone = n * args.num_steps * len(group) / sum(row[phase] for row in group)
            line[f"{phase} only, steps/s"] = f"{alone:,.0f}"
        line["all, steps/s"] = f"{median(row['steps_per_second'] for row in group):,.0f}"
        lines.append(line | {phase: f"{sum(row[phase] for row in group) / total:.1%}" for phase in PHASES})
    text += f"Where the time goes when every iteration learns:\n\n{markdown(lines)}\n\n" if lines else ""
    lines = []
    for (script, n, name), group in grouped(rows, "at_once").items():
        one = min(group, key=lambda row: row["runs"])
        for row in sorted(group, key=lambda row: row["runs"]):
            line = {"script": script, "environments": f"{n:,}", "": name, "runs at once": str(row["runs"])}
            line["steps/s together"] = f"{row['steps_per_second']:,.0f}"
            ratio = row["steps_per_second"] / one["steps_per_second"]
            lines.append(line | {f"ratio to {one['runs']}": f"{ratio:.2f}"})
    return text + (f"Several runs at once:\n\n{markdown(lines)}\n\n" if lines else "")


def report(args: Args, rows: list[dict], notes: list[str]) -> str:
    gpu = torch.cuda.get_device_name() if args.cuda and torch.cuda.is_available() else "no GPU"
    jax = next((row["jax"] for row in rows if row["jax"]), "")
    text = tables(args, rows)
    text += f"""\
{cpu_name()}, {torch.get_num_threads()} torch threads; {gpu}; PyTorch {torch.__version__}{"; " + jax if jax else ""}.
{args.num_steps} steps per rollout. Procgen: {args.game}, easy, 200 levels, 3 epochs, 8 minibatches. Mazes: 5 epochs,
1 minibatch (of at most {MOST_ENVS:,} environments: more of them beyond), buffer of {args.buffer_size:,} levels.
Environments alone: {args.seconds:g} s per round. "`step` by itself" leaves out looking for ends of episodes, and
resets; its best 512 steps in a row are what the machine does when nobody else uses it.
Training: a process per round, wall clock with logging, without evaluation, first iteration (of each kind) dropped.
Steps/s of mazes: at half of each kind, 2 x steps over the median iterations on new levels and on replayed ones, the
buffer filled to {args.rho:.0%} by 32 environments, to 1% by more. PLR learns on new levels too; its buffer has 5%.
Where the time goes: seconds of each phase from --profile, which waits for the device between phases; a phase's "only"
is steps/s as if it were all. Mazes with --curriculum plr.
"""
    if args.cleanrl:
        share = max((row["wrappers"] for row in rows if row["wrappers"] != ""), default=float("nan"))
        text += (
            "CleanRL: its ppo_procgen.py as it is, fp32, all levels of the game. The stand-ins for gym 0.23's wrappers "
        )
        text += f"take {share:.2%} of its time.\n"
    if args.jaxued:
        shares = [row["evaluation"] for row in rows if row["evaluation"] != ""]
        share = f"{median(shares):.1%} of the time, measured by itself" if shares else "not measured by itself"
        text += (
            f"jaxued: its examples/maze_plr.py as it is, fp32, blocks of {BLOCK} updates after the fill, as they came. "
        )
        text += f"Its evaluation (8 mazes, 1 attempt, pictures) after each block is inside: {share}.\n"
    return text + "".join(f"- {note}\n" for note in notes)


def plot(args: Args, rows: list[dict], path: Path) -> None:
    """A row per script: training steps/s by contender, where the time goes, and both by number of environments."""
    groups, phases = grouped(rows, "training"), grouped(rows, "phases")
    figure, axes = plt.subplots(len(args.scripts), 3, figsize=(15, 3.6 * len(args.scripts)), squeeze=False)
    for script, (left, middle, right) in zip(args.scripts, axes):
        shape = {name: x for (s, n, name), x in groups.items() if (s, n) == (script, PAPER[script][0])}
        for i, (name, group) in enumerate(shape.items()):
            values = [row["steps_per_second"] for row in group]
            left.barh(i, median(values), color="#999999" if name in ("CleanRL", "jaxued") else "#4477aa")
            left.plot([min(values), max(values)], [i, i], color="black", lw=2)
        left.set_yticks(range(len(shape)), shape.keys())
        left.invert_yaxis()
        left.set_title(f"{script}: training, {PAPER[script][0]} environments, steps/s")
        shares = {f"{name}, {n:,}": x for (s, n, name), x in phases.items() if s == script}
        for i, group in enumerate(shares.values()):
            total, end = sum(row[phase] for row in group for phase in PHASES), 0.0
            for color, phase in zip(plt.cm.tab10.colors, PHASES):
                share = sum(row[phase] for row in group) / total
                middle.barh(i, share, left=end, color=color, label=phase if i == 0 else None)
                end += share
        middle.set_yticks(range(len(shares)), shares.keys())
        middle.invert_yaxis()
        middle.set_title("where the time goes when every iteration learns")
        if shares:
            middle.legend(ncols=3, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.08), frameon=False)
        curves: dict[str, list[tuple[int, float]]] = {}
        for part in ("environment", "training"):
            for (s, n, name), group in grouped(rows, part).items():
                if s == script and name not in ("CleanRL", "jaxued"):
                    label = f"environment alone, {name}" if part == "environment" else name
                    curves.setdefault(label, []).append((n, median(row["steps_per_second"] for row in group)))
        for label, points in curves.items():
            right.plot(*zip(*sorted(points)), marker="o", label=label)
        right.set(xscale="log", yscale="log", xlabel="environments", title="steps/s by number of environments")
        right.set_visible(any(len(points) > 1 for points in curves.values()))
        if curves:
            right.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plan(args: Args) -> list[tuple]:
    """What to measure, in order: part, script, environments, contender, function, its inputs (training's end in the
    seconds left, which come last)."""
    options = {}  # name of a contender -> flags
    for compiled in (False, True) if args.compile else (False,):
        for precision in args.precisions:
            options[precision + ", compiled" * compiled] = ["--precision", precision] + ["--compile"] * compiled
    items, fixed = [], ["--replay-schedule", "fixed"]  # replays from the fill on
    if "procgen" in args.scripts:
        count = args.iterations
        for n in args.procgen_envs:
            items.append(("environment", "procgen", n, "ProcgenLevels", environment_alone, args, "procgen", n, False))
            for name, flags in options.items():
                items.append(("training", "procgen", n, name, training, args, "procgen", n, flags, 0.0, count))
                items.append(("phases", "procgen", n, name, profiled, args, "procgen", n, flags))
            if n == PAPER["procgen"][0] and args.cleanrl:
                inputs = args.cleanrl, args.game, n, args.num_steps, count, args.cuda
                items.append(("training", "procgen", n, "CleanRL", cleanrl, *inputs))
    if "mazes" in args.scripts:
        count = 6 * args.iterations
        for n in args.mazes_envs:
            paper = n == PAPER["mazes"][0]
            for name in ("eager", "compiled") if paper else ("eager",):
                items.append(("environment", "mazes", n, name, environment_alone, args, "mazes", n, name == "compiled"))
            for name, flags in options.items():
                how = (flags, args.rho) if paper else ([*flags, *fixed], 0.01)
                items.append(("training", "mazes", n, f"Robust PLR, {name}", training, args, "mazes", n, *how, count))
                items.append(("phases", "mazes", n, name, profiled, args, "mazes", n, flags))
            if paper:
                flags = ["--curriculum", "plr", "--precision", args.precisions[0], *fixed]
                name = f"PLR, {args.precisions[0]}"
                items.append(("training", "mazes", n, name, training, args, "mazes", n, flags, 0.05, count))
            if paper and args.jaxued:
                inputs = args.jaxued, args.jaxued_python, n, args.num_steps, args.buffer_size, args.rho
                items.append(("training", "mazes", n, "jaxued", jaxued, *inputs, args.iterations, args.cuda))
    for script, runs in itertools.product(args.scripts, args.at_once):
        n, name = PAPER[script][0], args.precisions[-1]
        inputs = args, script, n, ["--precision", name, *(fixed if script == "mazes" else [])], 0.01
        count = args.iterations if script == "procgen" else 6 * args.iterations
        items.append(("at_once", script, n, name, functools.partial(training, runs=runs), *inputs, count))
    order = [part for part in ("environment", "training", "phases") if part in args.parts] + ["at_once"]
    return sorted((x for x in items if x[0] in order), key=lambda x: order.index(x[0]))


def main() -> None:
    args, begin = tyro.cli(Args), time.perf_counter()
    rows, notes = [], []
    for i, (part, script, num_envs, name, function, *inputs) in itertools.product(
        range(1, args.rounds + 1), plan(args)
    ):
        if i > 1 and part in ("phases", "at_once"):
            continue
        about = f"{part}, {script}, {num_envs} environments, {name}, round {i}"
        if (left := args.limit - (time.perf_counter() - begin)) <= 0:
            notes.append(f"{about}: left out, --limit {args.limit:g} seconds were over")
            continue
        try:
            row = dict.fromkeys(COLUMNS, "") | {"part": part, "script": script, "num_envs": num_envs, "contender": name}
            row |= {"round": i} | function(*inputs, *([] if part == "environment" else [left]))
            rows.append(row)
            print(f"{about}: {row['steps_per_second']:,.0f} steps/s", file=sys.stderr, flush=True)
        except Exception as error:
            notes.append(f"{about} failed: {(str(error) or repr(error)).splitlines()[0]}")
            print(f"{about} failed: {error}", file=sys.stderr, flush=True)
        if args.out and rows:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "throughput.md").write_text(report(args, rows, notes))
            write_csv(args.out / "throughput.csv", rows)
            plot(args, rows, args.out / "throughput.png")
    print(report(args, rows, notes))


if __name__ == "__main__":
    main()
