"""Is everything that is fast also right on the GPU? One command, a line for each check, exit status 1 if one fails.

    ../shared/gpu/stage minigrid    # or procgen: the packages of one script, to carry (.gpu) to a GPU without a network
    . .gpu/activate && python3 benchmarks/check_gpu.py --out "$OUT/check_gpu"                  # there; under 10 minutes
    python benchmarks/check_gpu.py --quick                             # without the last check, how the two learn
    python benchmarks/check_gpu.py --device cpu --tiny --quick --no-compile     # no GPU: do the checks themselves work?

The truth is float64 on the CPU for networks, the CPU itself for mazes, and another run of the same command for whole
runs. What a CPU run and a GPU run of one command play is not compared: the noise that decides actions comes from the
device's generator. FAIL is a number above its tolerance, or an error; SKIP says what is missing. check_gpu.md and
check_gpu.csv are written after every check, learning_*.csv and .png by the last one.
"""

import contextlib
import functools
import gzip
import importlib
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal
from unittest import mock

import numpy as np
import torch
import tyro
from sampler import cpu_name, markdown, write_csv
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
CPU = torch.device("cpu")
SCRIPTS = {"procgen": ("ppo_plr_procgen", "procgen"), "mazes": ("ppo_robust_plr_minigrid", "minigrid")}  # and package
# Relative errors (norm of the difference / norm) that are allowed: of outputs, and of the gradient as a whole. fp32
# rounds at 6e-8, TF32 at 5e-4, bfloat16 at 4e-3, through 15 layers: outputs come out some ten times as wrong at most.
# Gradients are worse: a share of that size of the ReLUs and maxima falls to the other side, and each takes a whole term
# of a sum with it, which makes the square root of the share. On a CPU: fp32 6e-7 and 2e-5, bfloat16 7e-3 and 7e-2.
AT_MOST = {"fp32": (5e-6, 5e-4), "tf32": (5e-3, 0.08), "bf16": (0.04, 0.2)}
AT_LEAST = {"fp32": 0.0, "tf32": 2e-5, "bf16": 2e-4}  # of the outputs: below, the flag had no effect
COMPILED_LOSSES = 0.01  # relative: the same actions, and the rounding of a few Adam steps
LEARNS_AS_WELL = 0.15  # of fp32's last return: about what seeds differ by
LOSSES = "value_loss policy_loss entropy approx_kl grad_norm".split()
# whole runs: the paper's shapes, a few iterations; with --tiny what a CPU does in a second
RUNS = {
    ("procgen", False): "--num-levels 50 --total-timesteps 98304 --env-threads 2",
    ("procgen", True): "--env-id fruitbot --num-levels 5 --num-envs 4 --num-steps 16 --num-minibatches 2"
    " --update-epochs 1 --total-timesteps 192",
    ("mazes", False): "--buffer-size 128 --rho 0.25 --replay-schedule fixed --total-timesteps 98304",
    ("mazes", True): "--num-envs 4 --num-steps 24 --update-epochs 2 --maze-size 7 --num-walls 6 --max-steps 20"
    " --buffer-size 12 --rho 0.3 --replay-schedule fixed --total-timesteps 768",
}
# one update as large as in the paper, or as --num-envs makes it
UPDATES = {
    ("procgen", False): {"64 x 256": "--total-timesteps 16384"},
    ("procgen", True): {"4 x 16": RUNS["procgen", True] + " --total-timesteps 64"},
    ("mazes", False): {
        "32 x 256": "--curriculum plr --total-timesteps 8192",
        "2048 x 256": "--curriculum plr --num-envs 2048 --num-minibatches 2 --total-timesteps 524288",
    },
    ("mazes", True): {"4 x 24": RUNS["mazes", True] + " --curriculum plr --total-timesteps 96"},
}
LEARNING = {  # settings that are learned within minutes, and for how many steps
    "procgen": ("--env-id starpilot --env-threads 2", 1_000_000),
    "mazes": ("--curriculum dr --maze-size 9 --num-walls 10 --max-steps 60 --num-envs 64 --num-steps 64"
              " --num-minibatches 4 --learning-rate 0.001", 1_000_000),
}  # fmt: skip
# The script as it is, and then the most memory that it held
START = "import resource, sys, torch; script = __import__(sys.argv[1]); sys.argv = sys.argv[1:]; script.main();"
START += "gpu = torch.cuda.is_initialized(); process = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
START += "print('peak bytes', torch.cuda.max_memory_allocated() if gpu else process)"


@dataclass
class Args:
    out: Path | None = None
    """folder for the tables and plots"""
    quick: bool = False
    """do not compare how bf16 and fp32 learn"""
    device: Literal["cuda", "cpu"] = "cuda"
    """where the fast side runs"""
    scripts: tuple[Literal["procgen", "mazes"], ...] = ("procgen", "mazes")
    """one whose package is missing is skipped"""
    precisions: tuple[Literal["fp32", "tf32", "bf16"], ...] = ("fp32", "tf32", "bf16")
    """of the networks and the whole runs"""
    compile: bool = True
    """also check what --compile makes"""
    tiny: bool = False
    """small sizes"""
    learn_steps: int = 0
    """steps of each run in the comparison of learning (0: the script's own number)"""
    learn_seeds: int = 3
    """seeds in it, all at the same time"""
    limit: float = 540.0
    """seconds; what has not begun by then is skipped, and what has not ended fails"""
    jobs: int = 8
    """whole runs at the same time"""


class Skip(Exception):
    """What a check lacks."""


Outcome = tuple[float, float, str]  # measured, the most allowed, what was compared


# ---- mazes ----------------------------------------------------------------------------------------------------------


def maze_rollout(script: ModuleType, device: torch.device, size: int, compile: bool, T: int = 300, N: int = 64) -> list:
    """Random actions, new levels where episodes end: (T, N, ...) on the CPU, the observation before each step (image,
    direction), whether it begins an episode, and after it image, direction, reward, terminated, truncated."""
    rng = np.random.default_rng(0)
    envs = script.MazeEnvs(N, device, size, max_steps=40, num_walls=2 * size, compile=compile)
    (obs, _), start, rows = envs.reset(seed=rng.integers(2**30, size=N)), np.ones(N, bool), []
    for _ in range(T):
        before = [obs["image"], obs["direction"], torch.from_numpy(start)]
        actions = rng.choice(7, size=N, p=[0.2, 0.2, 0.52, 0.02, 0.02, 0.02, 0.02])
        obs, *results, _ = envs.step(torch.from_numpy(actions).to(device))
        rows.append([x.cpu().clone() for x in (*before, obs["image"], obs["direction"], *results)])
        start = (rows[-1][-1] | rows[-1][-2]).numpy()
        if start.any():
            obs, _ = envs.reset(seed=rng.integers(2**30, size=N), options={"reset_mask": start})
    return [torch.stack(x) for x in zip(*rows)]


def same_steps(script: ModuleType, device: torch.device, size: int, compile: bool) -> Outcome:
    """Bit for bit, whatever the device: there is nothing to round but the reward."""
    truth, fast = maze_rollout(script, CPU, size, False), maze_rollout(script, device, size, compile)
    assert all(x.any() for x in truth[-3:]), "no episode was solved, or none timed out: nothing was compared"
    different = sum(int((a != b).sum()) for a, b in zip(truth, fast))
    return different, 0, f"values that differ, of {sum(map(torch.numel, truth)):,} in 300 steps of 64 mazes with resets"


def same_rewards(script: ModuleType, device: torch.device, compile: bool) -> Outcome:
    """The goal reached at every possible step: GPUs divide by a number as they multiply with its reciprocal."""
    different, count = 0, 0
    for limit in (250, 2 * 15**2, 2 * 21**2):  # of training, of evaluation
        rewards, ahead = [], np.tile([0, 1], (limit, 1))
        mazes = script.Mazes(np.zeros((limit, 5, 5), bool), ahead, 0 * ahead, np.zeros(limit, np.int64))
        for where in (CPU, device):
            envs = script.MazeEnvs(limit, where, 7, limit, compile=compile and where is device)
            envs.reset(options={"mazes": mazes})
            envs.steps += torch.arange(limit, device=where)
            rewards.append(envs.step(torch.full((limit,), 2, device=where))[1].cpu())
        assert rewards[0].all(), "a goal was not reached"
        different, count = different + int((rewards[0] != rewards[1]).sum()), count + limit
    return different, 0, f"rewards that differ, of {count:,}"


# ---- networks -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def float64() -> Iterator[None]:
    """What the scripts compute in float32 is float64 here: their tensors by default, and where they say .float()."""
    torch.set_default_dtype(torch.float64)
    try:
        with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def make_agent(name: str, script: ModuleType, precision: str, device: torch.device) -> nn.Module:
    envs = script.make_envs(script.Args(), 1, *[CPU] * (name == "mazes"))
    torch.manual_seed(0)
    agent = script.Agent(envs, precision)
    envs.close()
    with torch.no_grad():  # as made, the policy is uniform, and its errors would not show
        (agent.actor if name == "procgen" else agent.actor[-1]).weight.mul_(1000)
    return agent.to(device, memory_format=torch.channels_last) if name == "procgen" else agent.to(device)


@functools.cache
def minibatch(name: str, script: ModuleType, tiny: bool) -> list[Tensor]:
    """Real observations (first; more than one tensor for mazes), random actions, advantages and returns."""
    if name == "procgen":
        n, rng = (8, np.random.default_rng(0)) if tiny else (64, np.random.default_rng(0))
        envs = script.make_envs(script.Args(), n)
        envs.reset(seed=list(range(n)))
        obs = [torch.stack([torch.from_numpy(envs.step(rng.integers(15, size=n, dtype=np.int32))[0].copy())
                            for _ in range(4 if tiny else 32)]).flatten(0, 1)]  # fmt: skip
        envs.close()
    else:
        obs = maze_rollout(script, CPU, 15, False, *((50, 4) if tiny else (256, 32)))[:3]
    size = len(obs[0]) if name == "procgen" else obs[0][..., 0, 0, 0].numel()
    torch.manual_seed(1)
    return [*obs, torch.randint(7, (size,)), torch.randn(size), torch.randn(size)]


def learn(name: str, agent: nn.Module, data: list[Tensor], device: torch.device) -> list[Tensor]:
    """Log-probabilities, entropies and values (B,) of a minibatch, and each parameter's gradient of a loss like PPO's,
    without its minima and maxima, which would turn a rounding error into another sample's gradient."""
    *obs, actions, advantages, returns = (x.to(device) for x in data)
    if name == "procgen":
        _, logprob, entropy, value, _ = agent.get_action_and_value(obs[0], actions)
    else:
        unrolled = agent.unroll(obs[0], obs[1], data[2].numpy())
        logprob, entropy, value = agent.evaluate_actions(*unrolled, actions)
    ratio = (logprob + 2).exp()  # to a policy with probabilities of exp(-2)
    loss = 0.5 * ((value - returns) ** 2).mean() - (advantages * ratio).mean() - 0.01 * entropy.mean()
    gradients = torch.autograd.grad(loss, list(agent.parameters()))
    return [x.detach().cpu().double() for x in (logprob, entropy, value, *gradients)]


@functools.cache
def truth(name: str, script: ModuleType, tiny: bool) -> list[Tensor]:
    agent = make_agent(name, script, "fp32", CPU).double()  # the same weights: drawn in float32
    with float64():
        return learn(name, agent, minibatch(name, script, tiny), CPU)


def error(fast: list[Tensor], exact: list[Tensor]) -> float:
    """Relative, of tensors as one vector."""
    fast, exact = (torch.cat([x.flatten() for x in tensors]) for tensors in (fast, exact))
    return float((fast - exact).norm() / exact.norm())


def judge(precision: str, parts: dict[str, float]) -> Outcome:
    """The part that is worst by its own tolerance."""
    outputs = [x for part, x in parts.items() if part != "gradient"]
    assert not max(outputs) < AT_LEAST[precision], f"--precision {precision} has no effect: {parts}"
    most = {part: AT_MOST[precision][part == "gradient"] for part in parts}
    worst = max(parts, key=lambda part: math.inf if math.isnan(parts[part]) else parts[part] / most[part])
    text = ", ".join(f"{part} {x:.2g}" for part, x in parts.items())
    return parts[worst], most[worst], f"worst error is the {worst}'s: {text}"


def same_network(name: str, script: ModuleType, args: Args, precision: str, compile: bool) -> Outcome:
    device = choose_device(script, args, precision)
    exact, data = truth(name, script, args.tiny), minibatch(name, script, args.tiny)
    agent = make_agent(name, script, precision, device)
    if compile:
        torch._dynamo.reset()
        agent.network.compile()
    fast, parts = learn(name, agent, data, device), {}
    if name == "procgen":  # acting has a shape of its own
        with torch.no_grad():
            few = [x[:64].to(device) for x in data]
            acting = agent.get_action_and_value(few[0], few[1])[1].cpu().double()
        parts = {"acting": error([acting], [exact[0][:64]])}
    for part, where in (("log-probability", slice(0, 1)), ("entropy", slice(1, 2)), ("value", slice(2, 3))):
        parts[part] = error(fast[where], exact[where])
    return judge(precision, parts | {"gradient": error(fast[3:], exact[3:])})


def same_acting(script: ModuleType, args: Args, precision: str, compile: bool) -> Outcome:
    """`act`, step by step with dones in between, against `unroll` of whole episodes, which is what is learned from."""
    device, data = choose_device(script, args, precision), minibatch("mazes", script, args.tiny)
    agent = make_agent("mazes", script, precision, device)
    unrolled = learn("mazes", agent, data, device)
    torch._dynamo.reset()
    act = torch.compile(agent.act) if compile else agent.act
    images, directions, starts, actions = (x.to(device) for x in data[:4])
    N = images.shape[1]
    state, weights = (torch.zeros((N, 256), device=device),) * 2, agent.step_weights()
    clocks, logits, values = torch.ones((N, 7), device=device), [], []
    for image, direction, start in zip(images, directions, starts):
        state = tuple(x * ~start[:, None] for x in state)
        _, value, logit, state = act({"image": image, "direction": direction}, state, weights, clocks)
        logits.append(logit)
        values.append(value)
    logprobs = torch.cat(logits).log_softmax(-1).gather(-1, actions[:, None])
    fast, exact = [x.cpu().double() for x in (logprobs, torch.cat(values))], truth("mazes", script, args.tiny)
    parts = {"log-probability": error(fast[:1], exact[:1]), "value": error(fast[1:], exact[2:3])}
    return judge(precision, parts | {"to `unroll` on the device": error(fast, [unrolled[0], unrolled[2]])})


# ---- whole runs -----------------------------------------------------------------------------------------------------


def start(script: str, flags: str, log: Path, **env: str) -> subprocess.Popen:
    """The script as a user starts it: what it set in this process's environment, it has to set again."""
    env = {"OMP_NUM_THREADS": "1"} | os.environ | env
    for name in ("CUBLAS_WORKSPACE_CONFIG", "TORCHINDUCTOR_DETERMINISTIC"):
        env.pop(name, None)
    with open(log, "w") as file:
        command = [sys.executable, "-c", START, script, *flags.split()]
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=file)


def end(processes: list[subprocess.Popen], deadline: float) -> None:
    """Waits for all of them until the deadline, then kills what is left."""
    for process in processes:
        try:
            process.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def progress(folder: Path) -> np.ndarray:
    """Rows of progress.csv but a last one that was cut short."""
    lines = (folder / "progress.csv").read_text().rpartition("\n")[0].splitlines()
    return np.genfromtxt(lines, delimiter=",", names=True, ndmin=1)


class Runs:
    """Whole runs of a script, a few at the same time. Each is a dictionary: its result.json, rows of progress.csv,
    log, folder and peak memory; or the reason why there is none, for the checks that need it."""

    def __init__(self, name: str, args: Args, folder: Path, deadline: float):
        self.script, self.args, self.folder, self.deadline = SCRIPTS[name][0], args, folder / name, deadline
        self.folder.mkdir(parents=True, exist_ok=True)
        self.base = "--eval-interval 0 --eval-episodes 2 --checkpoint-interval 0 --torch-deterministic "
        self.base += "--cuda" if args.device == "cuda" else "--no-cuda"
        self.done: dict[str, Any] = {}

    def run(self, wanted: dict[str, str], **env: str) -> None:
        """Name -> flags. env: folders, of which each run gets one of its own."""
        names = list(wanted)
        for some in (names[i : i + self.args.jobs] for i in range(0, len(names), self.args.jobs)):
            logs, processes = [self.folder / f"{name}.log" for name in some], []
            for name, log in zip(some, logs):
                own = {key: f"{value}/{name}" for key, value in env.items()}
                to = "" if "--resume" in wanted[name] else f" --run-dir {self.folder / name}"
                processes.append(start(self.script, f"{self.base} {wanted[name]}{to}", log, **own))
            end(processes, self.deadline)
            for name, process, log in zip(some, processes, logs):
                self.done[name] = self.result(name, process.returncode, log.read_text().strip())

    def result(self, name: str, status: int, log: str) -> dict[str, Any] | Exception:
        if status == -signal.SIGKILL:
            return RuntimeError(f"run {name} had not ended when --limit was over")
        if status:
            return RuntimeError(f"run {name} ended with {status}: {log.splitlines()[-1] if log else ''}")
        folder = self.folder / name
        result = json.loads((folder / "result.json").read_text()) | {"log": log, "folder": folder}
        return result | {"rows": progress(folder), "peak": int(log.split("peak bytes ")[1])}

    def __getitem__(self, name: str) -> dict[str, Any]:
        if isinstance(run := self.done[name], Exception):
            raise run
        return run

    def different(self, names: list[str]) -> Outcome:
        prints = [self[name]["fingerprint"] for name in names]
        return len(set(prints)) - 1, 0, "fingerprints that differ: " + ", ".join(x[:8] for x in prints)


def available(args: Args) -> list[str]:
    return [x for x in args.precisions if x != "tf32" or args.device == "cuda"]


def first_runs(name: str, args: Args, runs: Runs) -> None:
    """All at once, on the first check that needs one."""
    flags, wanted = RUNS[name, args.tiny], {}
    if runs.done:
        return
    for precision in dict.fromkeys(("fp32", *available(args))):
        wanted |= {f"{precision}{again}": f"{flags} --precision {precision}" for again in ("", "_again")}
    wanted |= {"profile": f"{flags} --profile", "half": f"{flags} --total-timesteps {int(flags.split()[-1]) // 2}"}
    if name == "mazes":
        wanted |= {f"plr{again}": f"{flags} --curriculum plr" for again in ("", "_again")}
    runs.run(wanted)


def repeats(name: str, args: Args, runs: Runs, run: str) -> Outcome:
    """The same command twice; and no other precision gives the same, or the flag would do nothing."""
    if run not in (*available(args), "plr"):
        raise Skip("TF32 is the GPU's")
    first_runs(name, args, runs)
    assert name == "procgen" or runs[run]["gradient_updates"] > 0, "nothing was learned"
    others = [runs[other]["fingerprint"] for other in available(args) if other != run]
    assert runs[run]["fingerprint"] not in others, f"{run} is the same run as another"
    return runs.different([run, run + "_again"])


def resumes(name: str, args: Args, runs: Runs) -> Outcome:
    """Half the steps, their evaluation and a last checkpoint, then the rest in a new process."""
    first_runs(name, args, runs)
    steps, half = RUNS[name, args.tiny].split()[-1], runs["half"]["folder"]
    assert runs["half"]["fingerprint"] != runs["fp32"]["fingerprint"], "half a run is the whole run"
    half.rename(runs.folder / "resumed")
    runs.run({"resumed": f"--resume {runs.folder / 'resumed'} --total-timesteps {steps}"})
    return runs.different(["fp32", "resumed"])


def profiles(name: str, args: Args, runs: Runs) -> Outcome:
    first_runs(name, args, runs)
    run = runs["profile"]
    assert "profile to iteration" in run["log"], "no share of any phase was printed"
    with gzip.open(run["folder"] / "trace_0.json.gz") as file:
        events = json.load(file)["traceEvents"]
    kind = "kernel" if args.device == "cuda" else "cpu_op"
    count = sum(event.get("cat") == kind for event in events)
    assert count, f"no event of kind {kind} in the trace"
    *difference, text = runs.different(["fp32", "profile"])
    return *difference, f"{text}; {count:,} events of kind {kind} in the trace"


def compiled_runs(name: str, args: Args, runs: Runs, again: bool) -> Outcome:
    """--compile, each run with a cache of its own: what is tuned by timing must not decide a number."""
    first_runs(name, args, runs)
    if "compiled" not in runs.done:
        flags = RUNS[name, args.tiny] + " --compile" + " --curriculum plr" * (name == "mazes")
        runs.run({"compiled": flags, "compiled_again": flags}, TORCHINDUCTOR_CACHE_DIR=str(runs.folder / "cache"))
    if again:
        return runs.different(["compiled", "compiled_again"])
    rows = [runs[run]["rows"][0] for run in ("compiled", "plr" if name == "mazes" else "fp32")]
    parts = {x: abs(rows[0][x] - rows[1][x]) / max(abs(rows[1][x]), 0.01) for x in LOSSES}
    text = ", ".join(f"{part} {x:.2g}" for part, x in parts.items())
    return max(parts.values()), COMPILED_LOSSES, f"first iteration to the eager one's: {text}"


def memory(name: str, args: Args, runs: Runs, size: str) -> Outcome:
    run = "update_" + size.replace(" ", "")
    runs.run({run: UPDATES[name, args.tiny][size]})
    loss = runs[run]["rows"][0]["grad_norm"]
    assert loss > 0, "nothing was learned"
    what = "peak of PyTorch's GPU memory" if args.device == "cuda" else "peak of the process's memory"
    return runs[run]["peak"] / 2**20, math.inf, f"{what}, MiB; the script, one iteration, fp32"


# ---- learning -------------------------------------------------------------------------------------------------------


def compare_learning(curves: dict[tuple[str, int], np.ndarray]) -> Outcome:
    """curves: (precision, seed) -> rows of progress.csv. Mean train returns of the last quarter of the iterations that
    all runs have reached. That fp32 has learned at all is asked first."""
    length = min(map(len, curves.values()))
    assert length >= 8, f"only {length} iterations: too few to compare"
    means = {}
    for precision in ("fp32", "bf16"):
        returns = [rows["episodic_return"][:length] for (x, _), rows in curves.items() if x == precision]
        means[precision] = [float(np.nanmean(np.stack(returns)[:, part]))
                            for part in (slice(0, length // 4), slice(-(length // 4), None))]  # fmt: skip
    (before, fp32), (_, bf16) = means.values()
    assert fp32 - before > LEARNS_AS_WELL * abs(fp32), f"fp32 learned too little: {before:.3g} to {fp32:.3g}"
    steps = int(next(iter(curves.values()))["global_step"][length - 1])
    text = f"by which bf16's return falls behind: fp32 {before:.3g} to {fp32:.3g}, bf16 to {bf16:.3g}, {steps:,} steps"
    return fp32 - bf16, LEARNS_AS_WELL * abs(fp32), text


def learns_as_well(name: str, args: Args, runs: Runs) -> Outcome:
    """All at the same time, until they are done or the time is: then what they have learned by then."""
    flags, steps = LEARNING[name]
    flags, processes, curves = f"{runs.base} {flags} --total-timesteps {args.learn_steps or steps}", {}, {}
    for seed in range(1, args.learn_seeds + 1):
        for precision in ("fp32", "bf16"):
            folder = runs.folder / f"learn_{precision}_{seed}"
            own = f"{flags} --precision {precision} --seed {seed} --run-dir {folder}"
            processes[precision, seed] = start(runs.script, own, folder.with_suffix(".log")), folder
    end([process for process, _ in processes.values()], runs.deadline)
    for key, (process, folder) in processes.items():
        log = folder.with_suffix(".log").read_text().strip()
        if process.returncode not in (0, -signal.SIGKILL) or not (folder / "progress.csv").exists():
            raise RuntimeError(f"{key} ended with {process.returncode}: {log.splitlines()[-1] if log else ''}")
        curves[key] = progress(folder)
    if args.out:
        plot_learning(name, args.out, curves)
    return compare_learning(curves)


def plot_learning(name: str, out: Path, curves: dict[tuple[str, int], np.ndarray]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows, figure = [], plt.figure(figsize=(7, 4))
    for (precision, seed), curve in curves.items():
        xs, ys = curve["global_step"], curve["episodic_return"]
        rows += [dict(precision=precision, seed=seed, global_step=int(x), episodic_return=y) for x, y in zip(xs, ys)]
        label = precision if seed == 1 else None
        plt.plot(xs, ys, label=label, color={"fp32": "tab:blue", "bf16": "tab:orange"}[precision], alpha=0.7)
    plt.xlabel("environment steps")
    plt.ylabel("train return")
    plt.title(f"{SCRIPTS[name][0]}.py {LEARNING[name][0]}", fontsize=6)
    plt.legend()
    figure.savefig(out / f"learning_{name}.png", dpi=120, bbox_inches="tight")
    plt.close(figure)
    write_csv(out / f"learning_{name}.csv", rows)


# ---- all of them ----------------------------------------------------------------------------------------------------


def choose_device(script: ModuleType, args: Args, precision: str = "fp32") -> torch.device:
    """The script's own, with what it sets for a precision."""
    if precision not in available(args):
        raise Skip("TF32 is the GPU's")
    return script.choose_device(script.Args(precision=precision, cuda=args.device == "cuda"))


def checks(name: str, script: ModuleType, args: Args, runs: Runs) -> Iterator[tuple[str, Callable[[], Outcome]]]:
    """Name and function of each, cheap ones first."""
    kinds = {"eager": False} | ({"compiled": True} if args.compile else {})
    if name == "mazes":
        for size in (15, 7):
            for kind, compile in kinds.items():
                yield f"steps, size {size}, {kind}", lambda size=size, compile=compile: same_steps(
                    script, choose_device(script, args), size, compile)  # fmt: skip
        for kind, compile in kinds.items():
            yield f"every reward, {kind}", lambda c=compile: same_rewards(script, choose_device(script, args), c)
    for precision in args.precisions:
        for kind, compile in kinds.items():
            if name == "procgen" or not compile:  # the mazes' script does not compile its learning
                yield f"network, {precision}, {kind}", functools.partial(
                    same_network, name, script, args, precision, compile)  # fmt: skip
            if name == "mazes":
                yield f"act, {precision}, {kind}", functools.partial(same_acting, script, args, precision, compile)
    for run in (*args.precisions, *["plr"] * (name == "mazes")):
        yield f"run twice, {run}", functools.partial(repeats, name, args, runs, run)
    yield "run, resumed", functools.partial(resumes, name, args, runs)
    yield "run, profiled", functools.partial(profiles, name, args, runs)
    if args.compile:
        yield "run, compiled", functools.partial(compiled_runs, name, args, runs, False)
        yield "run twice, compiled", functools.partial(compiled_runs, name, args, runs, True)
    for size in UPDATES[name, args.tiny]:
        yield f"memory, {size}", functools.partial(memory, name, args, runs, size)
    if not args.quick:
        yield "bf16 learns as well", functools.partial(learns_as_well, name, args, runs)


def perform(check: Callable[[], Outcome], deadline: float) -> dict[str, Any]:
    """A row of the table, whatever happens."""
    begin, numbers = time.monotonic(), {"measured": "", "at most": ""}
    try:
        if begin > deadline:
            raise Skip("no time left")
        measured, most, text = check()
        outcome = "PASS" if measured <= most else "FAIL"  # not a number: FAIL
        numbers = {"measured": f"{measured:.4g}", "at most": "" if most == math.inf else f"{most:.4g}"}
    except Skip as reason:
        outcome, text = "SKIP", str(reason)
    except (Exception, SystemExit) as problem:
        outcome, text = "FAIL", f"{type(problem).__name__}: {problem}".splitlines()[0]
    return {"outcome": outcome, **numbers, "what": text, "seconds": f"{time.monotonic() - begin:.1f}"}


def load(name: str) -> ModuleType:
    """A script whose package is not there cannot be checked; one that is there and does not load is a failure."""
    module, package = SCRIPTS[name]
    if not importlib.util.find_spec(package):
        raise Skip(f"no package {package}: none of this script's checks can run")
    return importlib.import_module(module)


def main() -> None:
    args, rows = tyro.cli(Args), []
    deadline = time.monotonic() + args.limit
    if args.device == "cuda" and not torch.cuda.is_available():
        print("error: --device cuda needs a GPU, and PyTorch sees none: choose --device cpu.", file=sys.stderr)
        raise SystemExit(2)
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else "no GPU used"
    about = f"{gpu}; {cpu_name()}; PyTorch {torch.__version__}; python benchmarks/check_gpu.py {' '.join(sys.argv[1:])}"

    def report(row: dict[str, Any]) -> None:
        rows.append(row)
        numbers = f"{row['measured']} (at most {row['at most']}) " if row["at most"] else f"{row['measured']} ".lstrip()
        print(f"{row['outcome']} {row['check']}: {numbers}{row['what']} [{row['seconds']} s]", flush=True)
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            write_csv(args.out / "check_gpu.csv", rows)
            (args.out / "check_gpu.md").write_text(f"{markdown(rows)}\n\n{about}\n")

    with tempfile.TemporaryDirectory() as folder:
        for name in args.scripts:
            try:
                listed = checks(name, load(name), args, Runs(name, args, Path(folder), deadline))
            except (Exception, SystemExit):
                listed = [("all", functools.partial(load, name))]
            for label, check in listed:
                report({"check": f"{name}: {label}", **perform(check, deadline)})
    counts = Counter(row["outcome"] for row in rows)
    print(f"{counts['PASS']} passed, {counts['FAIL']} failed, {counts['SKIP']} skipped. {about}")
    raise SystemExit(1 if counts["FAIL"] or not counts["PASS"] else 0)  # nothing checked is nothing proved


if __name__ == "__main__":
    main()
