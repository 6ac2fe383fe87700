"""Speed of ppo_robust_plr_minigrid.py: its mazes alone, whole training, more environments, and jaxued beside it.

    python benchmarks/throughput_minigrid.py --out benchmarks/results/throughput_minigrid
    python benchmarks/throughput_minigrid.py --jaxued ../jaxued --jaxued-python ../jax/bin/python --sweep-seconds 1800
    python benchmarks/throughput_minigrid.py --skip-training --num-envs 32 4096                 # the mazes alone

Training numbers come from the scripts as they are, one process per run, buffer filled, first iteration of each kind
dropped. The contenders take turns (A B A B ...). Files are written after every measurement; one that fails is named in
them and stops no other. The defaults with --jaxued take about a quarter of an hour on 2 cores, idle ones.
"""

import csv
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import torch
import tyro
from sampler import cpu_name, markdown, write_csv

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ppo_robust_plr_minigrid as script

PAPER_ENVS = 32  # environments in the paper's shape
MOST_ENVS = 1024  # environments in a minibatch: 256 steps of each take 8 MB in an update
BLOCK = 32  # jaxued's updates from one evaluation, and logged line, to the next
THREADS = torch.get_num_threads()  # PyTorch's default
LIMIT = 600.0  # seconds after which a run of the comparisons is stopped

# What jaxued's script finds as wandb. Prints when a block of updates has ended and how many of them were replays, which
# is in the caller's variables; after the last block it times the evaluation and its pictures by themselves.
WANDB = """
import json, sys, time
import jax

def init(config, **kwargs):
    globals()["config"] = config

def nothing(*args, **kwargs):
    pass

define_metric = Image = Video = nothing

def log(row):
    here = {"time": time.perf_counter(), "jax": f"JAX {jax.__version__} on {jax.devices()[0].device_kind}"}
    log_eval = sys._getframe(1)
    info = log_eval.f_locals["train_state_info"]["info"]
    here |= {"updates": int(row["num_updates"]), "replays": int(info["num_replay_updates"])}
    here |= {"levels": int(row["level_sampler/size"])}
    print("LOG " + json.dumps(here), flush=True)
    if here["updates"] >= config["num_updates"]:
        time_evaluation(log_eval.f_back.f_locals)

def time_evaluation(main):
    def evaluate(rng, train_state):
        states, *rest = jax.vmap(main["eval"], (0, None))(jax.random.split(rng, 1), train_state)
        states = jax.tree_util.tree_map(lambda x: x[0], states)
        return rest, jax.vmap(jax.vmap(main["env_renderer"].render_state, (0, None)), (0, None))(
            states, main["env_params"])
    evaluate = jax.jit(evaluate)
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(evaluate(jax.random.PRNGKey(0), main["runner_state"][1]))
    print("EVALUATION", time.perf_counter() - start, flush=True)
"""


@dataclass
class Args:
    num_envs: tuple[int, ...] = (32, 128, 512, 1024, 4096)
    """numbers of environments, of the mazes alone and of training; the comparisons have 32"""
    num_steps: int = 256
    """steps of each environment per rollout"""
    max_steps: int = 250
    """time limit of an episode, at most --num-steps"""
    buffer_size: int = 4000
    """levels kept for replay, and levels that the mazes alone are reset to"""
    rho: float = 0.5
    """fill of the buffer before replay, which is not measured"""
    precisions: tuple[Literal["fp32", "tf32", "bf16"], ...] = ("fp32",)
    """of our network; the first one for PLR and more environments. jaxued's is fp32"""
    compile: bool = False
    """also run each precision with --compile"""
    cuda: bool = True
    """use the GPU if there is one"""
    jaxued: Path | None = None
    """a checkout of github.com/DramaCow/jaxued, to run its examples/maze_plr.py beside ours"""
    jaxued_python: str = sys.executable
    """interpreter with jaxued's requirements"""
    jaxued_blocks: int = 2
    """blocks of 32 updates measured in each of its runs, after those that compile and fill the buffer"""
    rounds: int = 2
    """times that each contender runs"""
    iterations: int = 16
    """iterations in each of our runs after the buffer's fill, at least"""
    env_seconds: float = 2.0
    """time of one measurement of the mazes alone"""
    sweep_seconds: float = 90.0
    """for training with each of --num-envs, together; what would take longer than is left is skipped (0: none)"""
    skip_training: bool = False
    """only the mazes alone"""
    skip_env: bool = False
    """only training"""
    out: Path | None = None
    """folder for throughput.md and throughput.csv (each round)"""


def now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def environment_only(args: Args, envs: script.MazeEnvs, threads: int) -> dict[str, Any]:
    """Steps with random actions; where episodes end, levels drawn from a set whose starts are known."""
    torch.set_num_threads(threads)
    rng, n, num_levels = np.random.default_rng(0), envs.num_envs, args.buffer_size
    actions = torch.from_numpy(rng.integers(7, size=(512, n))).to(envs.device)
    for first in range(0, num_levels, n):
        envs.reset(seed=np.arange(first, first + n) % num_levels)
    steps, start = -50, None  # the first 50 warm up
    while start is None or now() - start < args.env_seconds:
        if steps == 0:
            start = now()
        _, _, terminations, truncations, _ = envs.step(actions[steps % len(actions)])
        done = (terminations | truncations).cpu().numpy()
        if done.any():
            envs.reset(seed=rng.integers(num_levels, size=n), options={"reset_mask": done})
        steps += 1
    result = {"steps_per_second": steps * n / (now() - start)}
    steps, start, best, rows = 0, now(), 0.0, list(actions)
    while now() - start < args.env_seconds / 2:  # `step` by itself: nobody looks whether an episode has ended
        window = now()
        for row in rows:
            envs.step(row)
        steps, best = steps + len(rows), max(best, len(rows) * n / (now() - window))
    result |= {"step_alone": steps * n / (now() - start), "step_best": best}
    torch.set_num_threads(THREADS)
    return result


def train(args: Args, flags: list[str], num_envs: int, rho: float, iterations: int, limit: float) -> dict[str, Any]:
    """Runs our script until its progress.csv has enough iterations after the buffer's fill, then stops it. Steps/s are
    those of half and half, from the median iterations on new levels and on replayed ones; as_run: as they came."""
    steps = num_envs * args.num_steps
    command = [sys.executable, "ppo_robust_plr_minigrid.py", "--num-envs", str(num_envs), *flags, "--rho", str(rho)]
    command += ["--num-steps", str(args.num_steps), "--max-steps", str(args.max_steps)]
    command += ["--total-timesteps", str(10**6 * steps), "--cuda" if args.cuda else "--no-cuda"]
    command += ["--eval-interval", "0", "--eval-episodes", "1", "--checkpoint-interval", "0"]
    start, seconds = time.perf_counter(), {0: [], 1: []}  # of iterations on new levels (0) and on replayed ones (1)
    with tempfile.TemporaryDirectory() as folder, open(folder + "/log", "w+") as log:
        progress = Path(folder) / "run" / "progress.csv"
        command += ["--run-dir", str(progress.parent)]
        process = subprocess.Popen(command, cwd=Path(script.__file__).parent, stdout=log, stderr=log)
        try:
            while min(map(len, seconds.values())) < 3 or sum(map(len, seconds.values())) < iterations:
                if process.poll() is not None:
                    raise RuntimeError(f"{' '.join(command)} ended:\n{Path(log.name).read_text()[-3000:]}")
                if time.perf_counter() - start > limit:
                    break
                time.sleep(0.5)
                lines = progress.read_text().split("\n")[:-1] if progress.exists() else []
                rows, seconds = list(csv.DictReader(lines)), {0: [], 1: []}
                for before, row in zip(rows, rows[1:]):
                    if float(before["seen_share"]) >= rho:
                        taken = float(row["wall_seconds"]) - float(before["wall_seconds"])
                        seconds[int(row["replay"])].append(taken)
        finally:
            process.terminate()
            process.wait()
    new, replay = seconds[0][1:], seconds[1][1:]
    if min(len(new), len(replay)) < 2:
        raise RuntimeError(f"too few iterations of each kind after the buffer's fill within {limit:.0f} s")
    count, halves = len(new) + len(replay), {"new_seconds": median(new), "replay_seconds": median(replay)}
    result = {"steps_per_second": 2 * steps / sum(halves.values()), **halves}
    result |= {"as_run": count * steps / (sum(new) + sum(replay)), "replay_share": len(replay) / count}
    return result | {"iterations": count}


def train_jaxued(args: Args, seed: int) -> dict[str, Any]:
    """Time from one logged line to another, after the buffer's fill. The first two blocks are not measured in any case:
    the second takes about as much longer than the third as compiling does."""
    unmeasured = max(2, math.ceil(args.rho * args.buffer_size / PAPER_ENVS / BLOCK))
    path = args.jaxued.resolve()
    command = [args.jaxued_python, "-u", str(path / "examples/maze_plr.py"), "--checkpoint_save_interval", "0"]
    for name, value in (
        ("num_updates", BLOCK * (unmeasured + args.jaxued_blocks)), ("eval_freq", BLOCK), ("eval_num_attempts", 1),
        ("seed", seed), ("num_steps", args.num_steps), ("level_buffer_capacity", args.buffer_size),
        ("minimum_fill_ratio", args.rho), ("replay_prob", 0.5),
    ):  # fmt: skip
        command += [f"--{name}", str(value)]
    logged, evaluation = [], None
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as errors:
        (Path(folder) / "wandb.py").write_text(WANDB)
        env = os.environ | {"PYTHONPATH": os.pathsep.join((folder, str(path / "src")))}
        env |= {} if args.cuda else {"JAX_PLATFORMS": "cpu"}
        pipes = {"stdout": subprocess.PIPE, "stderr": errors, "text": True}
        with subprocess.Popen(command, cwd=folder, env=env, **pipes) as process:
            timer = threading.Timer(LIMIT, process.kill)
            timer.start()
            for line in process.stdout:
                if line.startswith("LOG "):
                    logged.append(json.loads(line[4:]))
                    print("  jaxued:", line[4:].strip(), file=sys.stderr, flush=True)
                elif line.startswith("EVALUATION "):
                    evaluation = float(line.split()[1])
            timer.cancel()
        errors.seek(0)
        filled = [line for line in logged[1:] if line["levels"] >= args.rho * args.buffer_size]
        if len(filled) < 2:
            raise RuntimeError(f"{' '.join(command)}: no block after the fill, {logged}\n{errors.read()[-3000:]}")
    first, last = filled[0], filled[-1]
    count, seconds = last["updates"] - first["updates"], last["time"] - first["time"]
    speed = count * PAPER_ENVS * args.num_steps / seconds
    result = {"steps_per_second": speed, "as_run": speed, "iterations": count, "jax": first["jax"]}
    result |= {"replay_share": (last["replays"] - first["replays"]) / count}
    return result | {"evaluation_share": evaluation * count / BLOCK / seconds if evaluation else ""}


COLUMNS = ["part", "num_envs", "contender", "round", "steps_per_second", "new_seconds", "replay_seconds", "as_run"]
COLUMNS += ["step_alone", "step_best", "replay_share", "iterations", "evaluation_share", "jax"]


def table(rows: list[dict], part: str, baseline: Callable[[dict], bool], name: str) -> str:
    rows = [row for row in rows if row["part"] == part]
    base = [row["steps_per_second"] for row in rows if baseline(row)]
    groups, lines = {}, []
    for row in rows:
        groups.setdefault((row["num_envs"], row["contender"]), []).append(row)
    for (num_envs, contender), group in groups.items():
        values = [row["steps_per_second"] for row in group]
        line = {"environments": f"{num_envs:,}", "contender": contender, "steps/s": f"{median(values):,.0f}"}
        line["range"] = f"{min(values):,.0f} to {max(values):,.0f}"
        line[f"ratio to {name}"] = f"{median(values) / median(base):.2f}" if base else ""
        if part == "mazes alone":
            line["`step` by itself"] = f"{median(row['step_alone'] for row in group):,.0f}"
            line["its best 512 steps"] = f"{max(row['step_best'] for row in group):,.0f}"
        else:
            for kind in ("new", "replay"):
                seconds = [row[f"{kind}_seconds"] for row in group if row[f"{kind}_seconds"] != ""]
                line[f"{kind}, s"] = f"{median(seconds):.2f}" if seconds else ""
            line["as run, steps/s"] = f"{median(row['as_run'] for row in group):,.0f}"
            line["replay share"] = f"{np.mean([row['replay_share'] for row in group]):.0%}"
            line["iterations"] = str(sum(row["iterations"] for row in group))
        lines.append(line)
    return f"{part.capitalize()}:\n\n{markdown(lines)}\n\n" if lines else ""


def report(args: Args, rows: list[dict], notes: list[str]) -> str:
    eager, least = f"eager, threads: {THREADS}", min(args.num_envs)
    against = "jaxued" if args.jaxued else f"Robust PLR, {args.precisions[0]}"
    text = table(rows, "mazes alone", lambda x: (x["num_envs"], x["contender"]) == (PAPER_ENVS, eager), "32, eager")
    text += table(rows, "training", lambda x: x["contender"] == against, against)
    text += table(rows, "training with more environments", lambda x: x["num_envs"] == least, str(least))
    gpu = torch.cuda.get_device_name() if args.cuda and torch.cuda.is_available() else "no GPU"
    jax = [row for row in rows if row["jax"]]
    text += f"""\
{cpu_name()}, {THREADS} torch threads; {gpu}; PyTorch {torch.__version__}{"; " + jax[0]["jax"] if jax else ""}.
{args.num_steps} steps per rollout, 5 epochs, 1 minibatch (of at most {MOST_ENVS:,} environments: more of them beyond),
replay probability 0.5, buffer of {args.buffer_size:,} or, if more, the number of environments.
Mazes alone: random actions, {args.env_seconds:g} s per round; where episodes end, any of {args.buffer_size:,} levels.
"`step` by itself" leaves out looking for ends of episodes, and resets; its best 512 steps in a row are what the machine
does when nobody else uses it.
Training: a process per round, after the buffer's fill, wall clock with logging. "new, s" and "replay, s": median
iteration on new levels and on replayed ones; "steps/s": at half of each, 2 x {args.num_steps} x environments over their
sum, whatever the share was among those measured; "as run": as they came. Robust PLR first fills its buffer to
{args.rho:.0%}; PLR, which learns on new levels too, to 5%; the runs with more environments to 1%.
"""
    if args.jaxued:
        shares = [row["evaluation_share"] for row in jax if row["evaluation_share"] != ""]
        share = f"{median(shares):.1%} of the time, measured by itself" if shares else "not measured by itself"
        text += f"""\
jaxued: its examples/maze_plr.py as it is, in the same shape, blocks of {BLOCK} updates after the fill, "as run" only.
Its evaluation (8 mazes, 1 attempt, pictures) after each block is inside: {share}.
"""
    return text + "".join(f"- {note}\n" for note in notes)


def main() -> None:
    args = tyro.cli(Args)
    rows, notes = [], []

    def save() -> str:
        text = report(args, rows, notes)
        if args.out and rows:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "throughput.md").write_text(text)
            write_csv(args.out / "throughput.csv", rows)
        return text

    def measure(part: str, num_envs: int, contender: str, i: int, function: Callable[..., dict], *inputs: Any) -> dict:
        """Adds a row, writes everything so far; an error is only noted."""
        about = f"{part}, {num_envs} environments, {contender}, round {i}"
        try:
            row = dict.fromkeys(COLUMNS, "") | {"part": part, "num_envs": num_envs, "contender": contender, "round": i}
            row |= function(*inputs)
            rows.append(row)
            print(f"{about}: {row['steps_per_second']:,.0f} steps/s", file=sys.stderr, flush=True)
        except Exception as error:
            row = None
            notes.append(f"{about} failed: {(str(error) or repr(error)).splitlines()[0]}")
            print(f"{about} failed: {error}", file=sys.stderr, flush=True)
        save()
        return row or {}

    device = script.choose_device(script.Args(cuda=args.cuda))
    makers = {}
    for n in sorted({PAPER_ENVS, *args.num_envs}) if not args.skip_env else ():
        for compiled in (False, True) if n == PAPER_ENVS else (False,):
            envs = script.MazeEnvs(n, device, max_steps=args.max_steps, compile=compiled)
            for threads in sorted({1, THREADS}) if n == PAPER_ENVS else (THREADS,):
                makers[n, f"{'compiled' if compiled else 'eager'}, threads: {threads}"] = envs, threads
    for i in range(1, args.rounds + 1):
        for (n, name), (envs, threads) in makers.items():
            measure("mazes alone", n, name, i, environment_only, args, envs, threads)

    if not args.skip_training:
        buffer = ["--buffer-size", str(args.buffer_size)]
        short = ["--replay-schedule", "fixed", *buffer, "--precision", args.precisions[0]]
        contenders = {}
        for compiled in (False, True) if args.compile else (False,):
            for precision in args.precisions:
                flags = [*buffer, "--precision", precision] + ["--compile"] * compiled
                contenders[f"Robust PLR, {precision}{', compiled' if compiled else ''}"] = flags, args.rho
        contenders[f"PLR, {args.precisions[0]}"] = ["--curriculum", "plr", *short], 0.05
        for i in range(1, args.rounds + 1):
            for name, (flags, rho) in contenders.items():
                inputs = [*flags, "--seed", str(i)], PAPER_ENVS, rho, args.iterations, LIMIT
                measure("training", PAPER_ENVS, name, i, train, args, *inputs)
            if args.jaxued:
                measure("training", PAPER_ENVS, "jaxued", i, train_jaxued, args, i)

        end, per_env = time.perf_counter() + args.sweep_seconds, 0.0
        for n in sorted(args.num_envs) if args.sweep_seconds > 0 else ():
            left = end - time.perf_counter()
            if (expected := 4 * per_env * n) > left:  # about eight iterations until there are three of each kind
                notes.append(f"training, {n} environments: skipped, would take {expected:.0f} s, {left:.0f} s are left")
                continue
            minibatches = next(k for k in range(-(-n // MOST_ENVS), n + 1) if n % k == 0)
            flags = [*short, "--buffer-size", str(max(args.buffer_size, n)), "--num-minibatches", str(minibatches)]
            row = measure("training with more environments", n, "Robust PLR", 1, train, args, flags, n, 0.01, 6, left)
            per_env = (row["new_seconds"] + row["replay_seconds"]) / n if row else per_env
    print(save())


if __name__ == "__main__":
    main()
