"""How fast could the scripts be: FLOPs and bytes counted, the bound, the fraction that is reached, what the rest is.

    python benchmarks/roofline.py --out benchmarks                                       # writes benchmarks/roofline.md
    python benchmarks/roofline.py --out benchmarks --precisions fp32 tf32 bf16 --mazes-envs 32 2048           # on a GPU
    python benchmarks/roofline.py --out benchmarks --scripts procgen                   # where minigrid is not installed

Two minutes on an idle core. Counts are of the operators that the scripts run in one iteration on the CPU; times
are from runs with --profile and their traces. Each machine has files in results/roofline; roofline.md shows all.
"""

import bisect
import contextlib
import functools
import gzip
import importlib
import io
import json
import os
import platform
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple
from unittest import mock

import throughput
import torch
import tyro
from sampler import cpu_name, markdown, write_csv
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ppo_plr_procgen import refuse

SCRIPTS = {"procgen": "ppo_plr_procgen", "mazes": "ppo_robust_plr_minigrid"}
PHASES = ("inference", "environment", "transfer", "update", "sampler", "rest")
T = 256  # steps of a rollout in the papers
LEARNT = {"procgen": 3, "mazes": 5 / 2}  # times that a step is learnt from: epochs; of mazes, those on replayed levels
OBSERVATION = {"procgen": 64 * 64 * 3, "mazes": 5 * 5 * 3 + 8}  # bytes
# Data sheet of the H200 SXM: FLOP/s, dense, and bytes/s. Procgen's steps/s beside it and the targets are issue 5's.
H200 = {"fp32": 67e12, "tf32": 494e12, "bf16": 989e12, "memory": 4.8e12, "transfer": 64e9}
H200_PROCGEN = 500_000
TARGETS = {("procgen", 64): 60_000, ("mazes", 32): 150_000, ("mazes", 2048): 1_500_000}  # steps/s
OUTSIDE = {"cpu_op": "*outside operators: Python, NumPy, autograd*", "kernel": "*no kernel: the GPU waits*"}


@dataclass
class Args:
    scripts: tuple[Literal["procgen", "mazes"], ...] = ("procgen", "mazes")
    """which of the two"""
    precisions: tuple[Literal["fp32", "tf32", "bf16"], ...] = ("fp32", "bf16")
    """of the network; tf32 is for GPUs"""
    mazes_envs: tuple[int, ...] = (32,)
    """numbers of mazes, counted and run"""
    counted_envs: tuple[int, ...] = (2048,)
    """numbers of mazes that are only counted"""
    procgen_steps: int = 0
    """steps of Procgen's rollouts in the run, with minibatches of the paper's size, or one (0: 256 on a GPU, else 8)"""
    mazes_steps: int = 256
    """steps of the mazes' rollouts"""
    iterations: int = 0
    """iterations of each run: the first warms up, the last is traced (0: 10 on a GPU, else 3 of Procgen, 6 of mazes)"""
    seconds: float = 0.1
    """of one window of a measurement of the machine"""
    cuda: bool = True
    """use the GPU if there is one"""
    out: Path | None = None
    """folder for roofline.md, and for results/roofline/ with each machine's tables"""


# ---- count ----------------------------------------------------------------------------------------------------------


class Work(NamedTuple):
    """Of a phase, per environment step: calls by (operator, FLOPs, bytes); FLOPs, bytes; the least bytes; calls with
    the paper's minibatches."""

    operators: Counter
    flops: float
    bytes: float
    fused: float
    calls: float


class Count(TorchDispatchMode):
    """Counts calls by (phase, operator, FLOPs, bytes, bytes of a layer's output), while there is a phase.

    FLOPs are PyTorch's, of convolutions and matrix products; those of the fused LSTM, which PyTorch does not count, are
    by hand. Bytes are of an operator's inputs and outputs, as if nothing stayed in a cache; of tables that are gathered
    from, of what is gathered. Views are free. What is broadcast counts once.
    """

    GATHERS = {"index", "index_select", "gather", "embedding", "take"}  # read of their first input what they return
    WRITES = {"copy_", "fill_", "zero_", "exponential_", "index_put_"}  # do not read what they write
    LAYERS = {"convolution", "addmm", "embedding", "mkldnn_rnn_layer"}  # forward passes of layers with weights

    def __init__(self, phase: str | None = None):
        super().__init__()
        self.phase, self.calls, self.parameters = phase, Counter(), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self.phase is None:
            return out
        name = func._overloadpacket.__name__
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        schema = zip(func._schema.arguments, args)
        written = [x for arg, value in schema if arg.alias_info and arg.alias_info.is_write for x in tree_leaves(value)]
        memory = {x.untyped_storage().data_ptr() for x in inputs}
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.numel()]
        made = [x for x in made if x.untyped_storage().data_ptr() not in memory]
        if not made and not written or name in ("detach", "empty", "empty_like", "empty_strided"):
            return out
        if name in self.GATHERS:
            inputs[0] = made[0] if made else written[0]
        elif name == "max_pool2d_with_indices_backward":
            del inputs[1]  # the forward's input, of which it takes the shape
        elif name in self.WRITES:
            inputs = inputs[1:]
            written = [tree_leaves(args[2])[0]] if name == "index_put_" else written
        if name == "_fused_adam_":
            self.parameters = sum(x.numel() for x in args[0])
        if name.startswith("mkldnn_rnn_layer"):
            steps, n, _ = inputs[0].shape
            flops = 2 * steps * n * (inputs[1].numel() + inputs[2].numel()) * (2 if "backward" in name else 1)
        elif func._overloadpacket in flop_registry:
            flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
        else:
            flops = 0
        traffic = sum(map(size_of, inputs + written + made))
        kept = size_of(made[0]) if name in self.LAYERS and made else 0
        self.calls[self.phase, name, flops, traffic, kept] += 1
        return out


def size_of(x: Tensor) -> int:
    """Bytes; what is expanded from fewer counts as these."""
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


class Enough(Exception):
    """Ends a run that has been counted."""


def settings(name: str, num_envs: int, steps: int) -> dict[str, Any]:
    """Flags of a run in which every iteration learns. Minibatches: 2048 steps of Procgen, at most 1024 mazes."""
    flags = {"num_envs": num_envs, "num_steps": steps, "profile": True}
    flags |= {"eval_interval": 0, "eval_episodes": 1, "checkpoint_interval": 0}
    if name == "procgen":
        return flags | {"num_minibatches": max(1, 8 * steps // T)}
    flags |= {"curriculum": "plr", "replay_schedule": "fixed", "rho": 0.005, "buffer_size": max(4000, num_envs)}
    return flags | {"num_minibatches": -(-num_envs // 1024), "max_steps": min(250, steps)}


def count(name: str, precision: str, num_envs: int, steps: int) -> dict[str, Work]:
    """The work of inference, environment and update: of the script's second iteration, on the CPU, with one epoch."""
    counter, script, handlers = (
        Count(),
        importlib.import_module(SCRIPTS[name]),
        {x: signal.getsignal(x) for x in signal.valid_signals()},
    )

    @contextlib.contextmanager
    def record_function(phase: str):  # what the script marks its phases with
        if phase == "rest" and any(key[0] == "update" for key in counter.calls):
            raise Enough
        counter.phase = phase
        yield

    flags = settings(name, num_envs, steps) | {"update_epochs": 1, "cuda": False}
    flags["total_timesteps"] = 2 * num_envs * steps  # the last iteration is the one with ranges
    args = script.Args(**flags, precision="bf16" if precision == "bf16" else "fp32")
    patches = {"record_function": record_function, "profile": mock.MagicMock()}
    with tempfile.TemporaryDirectory() as folder, mock.patch.multiple("torch.profiler", **patches):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Enough), counter:
            script.train(args, Path(folder), None)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, handlers[number])
    work = {}
    for phase in ("inference", "environment", "update"):
        mine, times = [(*key[1:], x) for key, x in counter.calls.items() if key[0] == phase], 1.0
        flops, traffic, kept = (sum(key[i] * key[4] for key in mine) / args.batch_size for i in (1, 2, 3))
        calls, fused = sum(key[4] for key in mine) / args.batch_size, traffic
        if phase == "inference":  # weights are read for each step of all environments
            fused = OBSERVATION[name] + counter.parameters * (2 if precision == "bf16" else 4) / num_envs
        elif phase == "update":
            # layers' outputs: written, read. Weights: read forward and backward. They and Adam's moments: read, written
            size = num_envs * T / settings(name, num_envs, T)["num_minibatches"]
            fused, times = OBSERVATION[name] + 2 * kept + 8 * 4 * counter.parameters / size, LEARNT[name]
            calls *= args.batch_size / args.num_minibatches / size  # as many per minibatch
        operators = Counter()
        for operator, *each, _, number in mine:
            operators[operator, *each] += number * times / args.batch_size
        work[phase] = Work(operators, flops * times, traffic * times, fused * times, calls * times)
    return work


def seconds_by_operator(work: Work, peak: float, bandwidth: float) -> Counter:
    """Per environment step: each call takes as long as its FLOPs or its bytes do by themselves."""
    seconds = Counter()
    for (operator, flops, traffic), calls in work.operators.items():
        seconds[operator] += calls * max(flops / peak, traffic / bandwidth)
    return seconds


def bounds(
    name: str, precision: str, work: dict[str, Work], rates: dict[str, float], alone: float | None
) -> dict[str, dict[str, float]]:
    """By phase, seconds per environment step: bound (FLOPs, or the least bytes; the environment's is it alone),
    operators (each by itself), calls (as many of the smallest). rates: FLOP/s by precision, bytes/s, seconds a call."""
    result, peak, memory = {}, rates[precision], rates["memory"]
    for phase, x in work.items():
        result[phase] = {"bound": max(x.flops / peak, x.fused / memory), "calls": x.calls * rates.get("call", 0.0)}
        result[phase]["operators"] = seconds_by_operator(x, peak, memory).total()
    if alone is not None:
        result["environment"] |= {"bound": alone} | ({"operators": alone} if name == "procgen" else {})
    if name == "procgen" and "transfer" in rates:  # to the GPU the observation, back the action (int64)
        seconds = (OBSERVATION[name] + 8) / rates["transfer"]
        result["transfer"] = {"bound": seconds, "operators": seconds, "calls": 0.0}
    return result


def in_sequence(bound: dict[str, dict[str, float]], overlapped: bool = False) -> float:
    """Steps/s at the bound. Overlapped: the environment steps while others of it are acted on."""
    x = Counter({phase: seconds["bound"] for phase, seconds in bound.items()})
    acting, environment = x["inference"] + x["transfer"], x["environment"]
    return 1 / ((max(acting, environment) if overlapped else acting + environment) + x["update"])


# ---- measure --------------------------------------------------------------------------------------------------------


def per_call(function: Callable[[], Any], seconds: float) -> float:
    """Seconds of a call, over a window of at least so many seconds."""
    function()
    calls, taken = 1, 0.0
    while taken < seconds:
        calls, start = 2 * calls, throughput.now()
        for _ in range(calls):
            function()
        taken = throughput.now() - start
    return taken / calls


@torch.no_grad()
def machine(args: Args, device: torch.device, windows: dict[str, list[float]]) -> None:
    """Adds a window of each: FLOP/s by precision, bytes/s of memory and to the GPU, seconds of the least operator."""
    gpu, measured = device.type == "cuda", {}
    side = 8192 if gpu else 1024
    for precision in args.precisions:
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        a = torch.randn((side, side), device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
        multiply = functools.partial(torch.mm, a, a, out=torch.empty_like(a))
        measured[precision] = 2 * side**3 / per_call(multiply, args.seconds)
    a = torch.ones(2**29 if gpu else 2**26, device=device)
    b = torch.ones_like(a)
    measured["memory"] = 2 * size_of(a) / per_call(lambda: b.copy_(a), args.seconds)
    one = torch.ones(1, device=device)
    measured["call"] = per_call(lambda: one.add_(1), args.seconds)
    if gpu:
        host = torch.ones(2**26).pin_memory()
        to = torch.empty(2**26, device=device)
        measured["transfer"] = size_of(host) / per_call(lambda: to.copy_(host, True), args.seconds)
    for key, value in measured.items():
        windows[key].append(value)


def environment_alone(args: Args, name: str, num_envs: int) -> float:
    """Seconds per environment step of random actions: of Procgen with resets, of mazes `step` by itself."""
    options = throughput.Args(seconds=args.seconds, cuda=args.cuda)
    alone = [throughput.environment_alone(options, name, num_envs, False) for _ in range(3)]
    return 1 / max(x.get("step_alone", x["steps_per_second"]) for x in alone)


def profile_line(text: str) -> tuple[int, dict[str, float]]:
    """Of what a run with --profile prints: iterations that were timed, and the seconds of each phase in all of them."""
    found = re.findall(r"^profile to iteration (\d+), rank 0: (.*)$", text, re.MULTILINE)
    if len(found) != 1:
        raise ValueError(f"{len(found)} lines of --profile in {text[-2000:]!r}")
    phases = {phase: float(x) for phase, x in re.findall(r"(\w+) ([-+.\de]+) s \(", found[0][1])}
    return int(found[0][0]) - 1, phases


def time_inside(events: list[dict[str, Any]]) -> tuple[str, dict[str, Counter]]:
    """Of a Chrome trace: "kernel" or "cpu_op"; by phase, seconds of each without those it calls, and outside of all."""
    events = sorted((e for e in events if e.get("ph") == "X"), key=lambda e: (e["ts"], -e["dur"]))
    kind = "kernel" if any(e.get("cat") == "kernel" for e in events) else "cpu_op"
    kinds = {"kernel", "gpu_memcpy", "gpu_memset"} if kind == "kernel" else {kind}
    ranges = [e for e in events if e.get("cat") == "user_annotation" and e["name"] in PHASES]
    starts, seconds, open_by = [e["ts"] for e in ranges], defaultdict(Counter), defaultdict(list)
    for e in ranges:
        seconds[e["name"]][OUTSIDE[kind]] += e["dur"] / 1e6
    for e in events:
        i = bisect.bisect(starts, e["ts"]) - 1
        if e.get("cat") not in kinds or i < 0 or e["ts"] >= ranges[i]["ts"] + ranges[i]["dur"]:
            continue
        phase, callers = seconds[ranges[i]["name"]], open_by[e["tid"]]
        while callers and callers[-1][0] <= e["ts"]:
            callers.pop()
        name = re.sub(r"^(void )?(at::native::|aten::)?", "", e["name"])[:60]
        phase[name] += e["dur"] / 1e6
        phase[callers[-1][1] if callers else OUTSIDE[kind]] -= e["dur"] / 1e6
        callers.append((e["ts"] + e["dur"], name))
    return kind, seconds


def run(args: Args, name: str, precision: str, num_envs: int, steps: int, iterations: int) -> dict[str, Any]:
    """A run of the script with --profile: seconds per environment step by phase, and its trace's time_inside."""
    flags = settings(name, num_envs, steps) | {"total_timesteps": iterations * num_envs * steps, "precision": precision}
    command = [sys.executable, f"{SCRIPTS[name]}.py", "--cuda" if args.cuda else "--no-cuda"]
    for flag, value in flags.items():
        command += [f"--{flag.replace('_', '-')}"] + ([] if value is True else [str(value)])
    with tempfile.TemporaryDirectory() as folder:
        command += ["--run-dir", folder]
        start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, cwd=throughput.ROOT, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
        after, seconds = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - start
        cores = (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / seconds
        with gzip.open(f"{folder}/trace_0.json.gz") as file:
            kind, inside = time_inside(json.load(file)["traceEvents"])
    timed, phases = profile_line(done.stdout)
    traced = sum(x for phase in inside.values() for x in phase.values()) / (sum(phases.values()) / timed)
    per_step = {phase: x / (timed * num_envs * steps) for phase, x in phases.items()}
    per_step["update"] *= 0.5 if name == "mazes" else 1  # every iteration of this run learns
    result = {"seconds": per_step, "inside": inside, "kind": kind, "steps": steps, "timed": timed}
    return result | {"traced": traced, "cores": cores}


# ---- tables ---------------------------------------------------------------------------------------------------------


HEAD = """# Roofline: how fast could it be

Text and numbers are written by `python benchmarks/roofline.py --out benchmarks`. Everything is **per environment
step**: one is acted on once and learnt from in 3 epochs (Procgen), or in 5 epochs of half of the iterations (mazes,
Robust PLR). Rollouts of 256 steps; 64 environments of Procgen, 8 minibatches; mazes: one minibatch, of at most 1,024.

- **MFLOP**: convolutions and matrix products. PyTorch does not count its fused LSTM: by hand 2 x weights x steps, twice
  that backward, padding and free steps included. **MB by operator**: inputs and outputs of all operators, not fused,
  nothing in a cache. **MB fused**: the least: the observation, each layer's output written once forward and read once
  backward, weights and Adam's moments once per minibatch; for acting the observation and the weights.
- Microseconds. **bound**: FLOPs / peak or MB fused / bandwidth, the longer one; the environment's is itself alone,
  random actions, mazes without resets. **by operator**: the same for each operator with its own bytes, added up: the
  best that unfused operators do without caches. **calls alone**: as many of the smallest operator. **reached**: bound /
  measured.
- Counted in the script's second iteration on the CPU, whose operators are a GPU's but for the LSTM's; Procgen's and
  those of many mazes in a shorter rollout. The policy is random then and episodes of mazes are long: a trained one's
  have more free steps between them. The LSTM learns in one call of some 270 steps that wait for each other: neither the
  bound nor the calls know that.
"""


def number(x: float) -> str:
    return f"{x:,.0f}" if x >= 1000 else f"{x:.3g}"


def largest(seconds: Counter) -> str:
    """Those with 3% or more, at most five, and their shares."""
    total, most = seconds.total(), seconds.most_common(5)
    return ", ".join(f"{name.replace('|', '/')} {x / total:.0%}" for name, x in most if x > 0.03 * total)


def script_text(
    name: str, num_envs: int, counted: dict, runs: dict, rates: dict[str, float], alone: float
) -> tuple[str, list[dict]]:
    """A script's section, and its table's rows as numbers. counted and runs: what `count` and `run` return."""
    totals, rows, inside, overlap = [], [], [], name == "procgen" and "transfer" in rates
    for precision, measured in runs.items():
        work, bound = counted[precision], bounds(name, precision, counted[precision], rates, alone)
        top, speed = in_sequence(bound), 1 / sum(measured["seconds"].values())
        total = {"precision": precision, "bound, steps/s": number(top)}
        total |= {"environment overlapped": number(in_sequence(bound, True))} if overlap else {}
        totals.append(total | {"measured, steps/s": number(speed), "reached": f"{speed / top:.0%}"})
        for phase in PHASES:
            x, us = work.get(phase, Work(Counter(), 0, 0, 0, 0)), Counter(bound.get(phase, {}))
            row = {"script": name, "environments": num_envs, "precision": precision, "phase": phase}
            row |= {"MFLOP": x.flops / 1e6, "MB fused": x.fused / 1e6, "MB by operator": x.bytes / 1e6}
            row |= {"bound": us["bound"] * 1e6, "by operator": us["operators"] * 1e6, "calls alone": us["calls"] * 1e6}
            rows.append(row | {"measured": measured["seconds"].get(phase, 0.0) * 1e6})
            spent = measured["inside"][phase]
            share = spent.total() / sum(x.total() for x in measured["inside"].values())
            if share > 0.02:
                where = {"precision": precision, "phase": phase, "share of the iteration": f"{share:.1%}"}
                inside.append(where | {"of that": largest(spent)})
    shown = []
    for row in rows:
        cells = {k: number(x) if isinstance(x, float) else x for k, x in list(row.items())[2:]}
        reached = f"{row['bound'] / row['measured']:.0%}" if row["bound"] and row["measured"] else ""
        shown.append({k: "" if x in (0, "0") else x for k, x in cells.items()} | {"reached": reached})
    first = next(iter(runs.values()))
    traced, cores = (", ".join(f"{x[k]:.2f} ({key})" for key, x in runs.items()) for k in ("traced", "cores"))
    what = {"cpu_op": "the operators (without those that they call)", "kernel": "the kernels"}[first["kind"]]
    halved = ", 'update' is half of theirs" if name == "mazes" else ""
    halved += ". In 'rest' the values after the rollout weigh more than in one of 256 steps" * (first["steps"] < T)
    text = f"""
### {SCRIPTS[name]}.py, {num_envs:,} environments (alone {1 / alone:,.0f} steps/s)

{markdown(totals)}

{markdown(shown)}

Measured over {first["timed"]} iterations of {num_envs:,} x {first["steps"]} steps that all learn{halved}.
Processor time per second of the whole run: {cores}.
What the rest is, from the trace of one more iteration, which took {traced} times as long; phases with 2% of the time or
more, and in each {what} with 3% or more:

{markdown(inside)}
"""
    return text, rows


def machine_text(args: Args, windows: dict[str, list[float]], loads: tuple[float, float]) -> str:
    gpu = torch.cuda.get_device_name() if args.cuda else "no GPU"
    units = {"memory": (1e9, "GB/s of memory, a large copy"), "call": (1e-6, "us, the smallest operator called")}
    units |= {"transfer": (1e9, "GB/s to the GPU, page-locked")}
    lines, tries = [], len(windows["memory"])
    for key, values in windows.items():
        unit, what = units.get(key, (1e9, f"GFLOP/s in {key}, a large matrix product"))
        low, middle, high = (number(x / unit) for x in (min(values), median(values), max(values)))
        lines.append({"measured on it": what, "lowest": low, "median": middle, "highest": high})
    about = f"Load average {loads[0]:.1f} at the start, {loads[1]:.1f} at the end: "
    about += "idle when it began." if loads[0] < 0.5 else "**others computed beside it**, which disturbs every time."
    return f"""## {gpu if args.cuda else cpu_name()}

{cpu_name()}, {torch.get_num_threads()} torch threads; {gpu}; PyTorch {torch.__version__}, Python \
{platform.python_version()}. {about}
The bounds are of the best of {tries} windows, spread over the run: a median is none while others compute.

{markdown(lines)}
"""


def sheet_text(counted: dict[tuple[str, int, str], dict[str, Work]]) -> str:
    """The bound of one H200 by its data sheet, beside the targets, and the operators that would take the time there."""
    rows, costs = [], []
    both = {"fp32": ("fp32", "tf32"), "bf16": ("bf16",), "tf32": ()}  # tf32 has fp32's FLOPs and bytes
    counted = {(*key, precision): work for (*key, same), work in counted.items() for precision in both[same]}
    for (name, num_envs, precision), work in counted.items():
        bound = bounds(name, precision, work, H200, 1 / H200_PROCGEN if name == "procgen" else None)
        top, by_operator = in_sequence(bound), 1 / sum(x["operators"] for x in bound.values())
        target, calls = TARGETS.get((name, num_envs)), sum(x.calls for x in work.values())
        row = {"script": f"{name}, {num_envs:,}", "precision": precision}
        row |= {"FLOPs, us": number(sum(x.flops for x in work.values()) / H200[precision] * 1e6)}
        row |= {"bytes fused, us": number(sum(x.fused for x in work.values()) / H200["memory"] * 1e6)}
        row |= {"bytes by operator, us": number(sum(x.bytes for x in work.values()) / H200["memory"] * 1e6)}
        costs.append({key: row[key] for key in ("script", "precision")})
        row |= {"bound, steps/s": number(top), "by operator, steps/s": number(by_operator)}
        row |= {"environment overlapped": number(in_sequence(bound, True)) if name == "procgen" else ""}
        row |= {"target": number(target) if target else "", "target / bound": f"{target / top:.1%}" if target else ""}
        rows.append(row | {"us per call at the target": number(1e6 / target / calls) if target else ""})
        for phase in ("inference", "update"):
            seconds = seconds_by_operator(work[phase], H200[precision], H200["memory"])
            costs[-1] |= {phase: f"{seconds.total() * 1e6:.3g} us: {largest(seconds)}"}
        costs[-1]["calls per step of all, acting + environment"] = number(
            (work["inference"].calls + work["environment"].calls) * num_envs
        )
    return f"""## One H200: not measured, from data sheets

67 TFLOP/s fp32, 494 tf32, 989 bf16 (dense), 4.8 TB/s, and {OBSERVATION["procgen"] + 8:,} bytes per step of Procgen (the
observation in, the action out) over PCIe at 64 GB/s: no program reaches these. Procgen itself at {H200_PROCGEN:,}
steps/s, a figure of issue 5. Steps/s in sequence; "overlapped": Procgen steps while other environments are acted on.
"us per call at the target": what it leaves for each operator, if nothing else took time. Launching one from Python
takes some 5 us: where less is left, it needs CUDA graphs or fewer operators.

{markdown(rows)}

The operators with the most time, each by itself at those rates:

{markdown(costs)}
"""


def main() -> None:
    args = tyro.cli(Args)
    args.cuda = args.cuda and torch.cuda.is_available()
    if "tf32" in args.precisions and not args.cuda:
        refuse("--precisions tf32 must be fp32 or bf16 without a GPU.")
    if args.iterations in (1, 2):
        refuse(f"--iterations {args.iterations} must be at least 3: one warms up, one is traced.")
    device, load = torch.device("cuda" if args.cuda else "cpu"), os.getloadavg()[0]
    counted, ran, alone, windows = {}, defaultdict(dict), {}, defaultdict(list)
    for name in args.scripts:
        steps = args.mazes_steps if name == "mazes" else args.procgen_steps or (T if args.cuda else 8)
        iterations = args.iterations or (10 if args.cuda else {"procgen": 3, "mazes": 6}[name])
        for num_envs in [64] if name == "procgen" else dict.fromkeys((*args.mazes_envs, *args.counted_envs)):
            for precision in args.precisions:
                print(f"{name}, {num_envs} environments, {precision}", file=sys.stderr, flush=True)
                few = min(steps, 8 if name == "procgen" else T if num_envs <= 64 else 16)  # are enough to count
                counted[name, num_envs, precision] = count(name, precision, num_envs, few)
                if name == "procgen" or num_envs in args.mazes_envs:
                    for _ in range(3):
                        machine(args, device, windows)
                    ran[name, num_envs][precision] = run(args, name, precision, num_envs, steps, iterations)
            if (name, num_envs) in ran:
                alone[name, num_envs] = environment_alone(args, name, num_envs)
    rates, numbers = {key: (min if key == "call" else max)(x) for key, x in windows.items()}, []
    text = machine_text(args, windows, (load, os.getloadavg()[0]))
    for (name, num_envs), runs in ran.items():
        work = {precision: counted[name, num_envs, precision] for precision in runs}
        section, rows = script_text(name, num_envs, work, runs, rates, alone[name, num_envs])
        text, numbers = text + section, numbers + rows
    sheet = sheet_text(counted)
    print(f"{HEAD}\n{text}\n{sheet}")
    if args.out:
        folder = args.out / "results" / "roofline"
        folder.mkdir(parents=True, exist_ok=True)
        device_name = torch.cuda.get_device_name() if args.cuda else "cpu"
        parts = [device_name, *(args.scripts if len(args.scripts) < len(SCRIPTS) else ())]
        file = folder / re.sub(r"\W+", "_", " ".join(parts)).lower()
        write_csv(file.with_suffix(".csv"), numbers)
        file.with_suffix(".md").write_text(text)
        last = folder / "data_sheet.txt"  # counts do not depend on the machine: one of both scripts is kept
        if len(args.scripts) == len(SCRIPTS) or not last.exists():
            last.write_text(sheet)
        sections = [path.read_text() for path in (*sorted(folder.glob("*.md")), last)]
        (args.out / "roofline.md").write_text("\n".join([HEAD, *sections]))


if __name__ == "__main__":
    main()
