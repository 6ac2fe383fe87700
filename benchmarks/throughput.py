"""Training steps per second of ppo_plr_procgen.py, where the time goes, and CleanRL's ppo_procgen.py beside it.

    python benchmarks/throughput.py
    python benchmarks/throughput.py --cleanrl ../cleanrl/cleanrl/ppo_procgen.py --out benchmarks/results/throughput
    python benchmarks/throughput.py --precisions fp32 bf16 tf32 --num-envs 64 256 --compile         # on a GPU

Every number comes from the training scripts as they are, one process per run, first iteration dropped. The contenders
take turns (A B A B ...), so that what else the machine does meets all of them. Run it on an idle machine.
"""

import contextlib
import io
import itertools
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np
import torch
import tyro
from sampler import cpu_name, markdown, write_csv

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


@dataclass
class Args:
    env_id: str = "starpilot"
    """the game, in easy mode"""
    num_envs: tuple[int, ...] = (64,)
    """numbers of environments; a minibatch is always an eighth of the rollout"""
    num_steps: int = 256
    """steps of each environment per rollout"""
    precisions: tuple[Literal["fp32", "tf32", "bf16"], ...] = ("fp32", "bf16")
    """of our network; CleanRL's is fp32"""
    compile: bool = False
    """also run each precision with --compile"""
    cuda: bool = True
    """use the GPU if there is one"""
    cleanrl: Path | None = None
    """CleanRL's ppo_procgen.py, to run beside ours"""
    rounds: int = 3
    """times that each contender runs"""
    iterations: int = 4
    """iterations measured in each run, after one of warm-up"""
    out: Path | None = None
    """folder for throughput.md, throughput.csv (each round) and phases.csv (each iteration)"""


# ---- our script -----------------------------------------------------------------------------------------------------


def our_flags(args: Args, flags: list[str], num_envs: int, run_dir: str) -> list[str]:
    total = (args.iterations + 1) * num_envs * args.num_steps
    flags = flags + ["--env-id", args.env_id, "--total-timesteps", str(total), "--num-envs", str(num_envs)]
    flags += ["--num-steps", str(args.num_steps), "--run-dir", run_dir, "--cuda" if args.cuda else "--no-cuda"]
    return flags + ["--eval-interval", "0", "--eval-episodes", "1", "--checkpoint-interval", "0"]


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout


def our_steps_per_second(args: Args, flags: list[str], num_envs: int) -> float:
    """From one iteration's row of progress.csv to a later one's, logging included, as CleanRL is measured."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = folder + "/run"
        run([sys.executable, "ppo_plr_procgen.py", *our_flags(args, flags, num_envs, run_dir)])
        progress = np.genfromtxt(run_dir + "/progress.csv", delimiter=",", names=True)
    first, last = progress[[0, -1]][["global_step", "wall_seconds"]].tolist()
    return (last[0] - first[0]) / (last[1] - first[1])


def our_phases(argv: list[str]) -> None:
    """Runs our script in this process with clocks where its phases meet; prints a line of seconds per iteration.

    The clocks wait for the GPU, which costs nothing where the script waits for it anyway: after acting and after the
    minibatches. No number of the script changes.
    """
    import ppo_plr_procgen as script

    spent, reached = Counter(), {}

    def now() -> float:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter()

    def clock(owner: type, name: str, phase: str, when=lambda: True) -> None:
        inner = getattr(owner, name)

        def timed(*args, **kwargs):
            reached[name, "start"] = start = now()
            try:
                return inner(*args, **kwargs)
            finally:
                reached[name, "end"] = end = now()
                if when():
                    spent[phase] += end - start

        setattr(owner, name, timed)

    clock(script.ProcgenLevels, "step", "environment")
    clock(script.ProcgenLevels, "reset", "environment")
    clock(script.Agent, "get_action_and_value", "acting", when=lambda: not torch.is_grad_enabled())
    clock(script.Agent, "get_value", "bootstrap")
    clock(script.SummaryWriter, "add_scalar", "logging")
    for method in ("next_levels", "record_returns", "best_returns", "update", "metrics"):
        clock(script.LevelSampler, method, "sampler")
    metrics = script.LevelSampler.metrics

    def end_of_iteration(sampler: script.LevelSampler) -> dict[str, float]:
        result = metrics(sampler)
        previous, reached["iteration"] = reached.get("iteration"), now()
        if previous:
            rollout = reached["get_value", "start"] - previous
            before = sum(spent[name] for name in ("environment", "acting", "sampler", "logging"))
            before -= sum(reached[name, "end"] - reached[name, "start"] for name in ("update", "metrics"))
            phases = {name: spent[name] for name in ("environment", "acting", "sampler", "logging")}
            phases["rest of rollout"] = rollout - before
            phases["advantages and scores"] = reached["update", "start"] - reached["get_value", "start"]
            phases["update"] = reached["metrics", "start"] - reached["update", "end"]
            print("PHASES " + json.dumps(phases), flush=True)
        spent.clear()
        return result

    script.LevelSampler.metrics = end_of_iteration
    sys.argv = ["ppo_plr_procgen.py", *argv]
    script.main()


def environment_only(args: Args, num_envs: int, seconds: float = 3.0) -> float:
    """Steps per second of ProcgenLevels with random actions on 200 levels, resets included."""
    from ppo_plr_procgen import ProcgenLevels

    rng = np.random.default_rng(0)
    envs = ProcgenLevels(num_envs, args.env_id, "easy", num_threads=min(os.cpu_count(), num_envs))
    for level in range(200):
        envs.level_start(level)
    envs.reset(seed=rng.integers(200, size=num_envs))
    steps, start = -20, None
    while start is None or time.perf_counter() - start < seconds:
        if steps == 0:
            start = time.perf_counter()
        _, _, done, _, _ = envs.step(rng.integers(15, size=num_envs))
        if done.any():
            envs.reset(seed=rng.integers(200, size=num_envs), options={"reset_mask": done})
        steps += 1
    end = time.perf_counter()
    envs.close()
    return steps * num_envs / (end - start)


# ---- CleanRL's script -----------------------------------------------------------------------------------------------


class Wrapper:
    """gym 0.23's Wrapper: what it does not have itself comes from the environment inside."""

    def __init__(self, env):
        self.env = env
        self.num_envs = getattr(env, "num_envs", 1)

    def __getattr__(self, name: str):
        return getattr(self.env, name)

    def reset(self):
        return self.env.reset()

    def step(self, action):
        return self.env.step(action)


class TransformObservation(Wrapper):
    inside = 0.0  # seconds inside ProcgenEnv.step: this wrapper is the innermost one

    def __init__(self, env, f):
        super().__init__(env)
        self.f = f

    def reset(self):
        return self.f(self.env.reset())

    def step(self, action):
        start = time.perf_counter()
        obs, rewards, dones, infos = self.env.step(action)
        TransformObservation.inside += time.perf_counter() - start
        return self.f(obs), rewards, dones, infos


class RecordEpisodeStatistics(Wrapper):
    def __init__(self, env):
        super().__init__(env)
        self.start = time.perf_counter()

    def reset(self):
        self.returns, self.lengths = np.zeros(self.num_envs, np.float32), np.zeros(self.num_envs, np.int32)
        return self.env.reset()

    def step(self, action):
        obs, rewards, dones, infos = self.env.step(action)
        self.returns += rewards
        self.lengths += 1
        infos = list(infos)
        for i in np.flatnonzero(dones):
            seconds = round(time.perf_counter() - self.start, 6)
            infos[i] = infos[i] | {"episode": {"r": self.returns[i], "l": self.lengths[i], "t": seconds}}
            self.returns[i] = self.lengths[i] = 0
        return obs, rewards, dones, infos


class NormalizeReward(Wrapper):
    """Rewards over the standard deviation of the discounted return, as a running mean and variance see it."""

    def __init__(self, env, gamma=0.99, epsilon=1e-8):
        super().__init__(env)
        self.gamma, self.epsilon = gamma, epsilon
        self.mean, self.var, self.count, self.returns = 0.0, 1.0, 1e-4, np.zeros(self.num_envs)

    def step(self, action):
        obs, rewards, dones, infos = self.env.step(action)
        self.returns = self.returns * self.gamma + rewards
        mean, var, count = self.returns.mean(), self.returns.var(), len(self.returns)
        delta, total = mean - self.mean, self.count + count
        m2 = self.var * self.count + var * count + delta**2 * self.count * count / total
        self.mean, self.var, self.count = self.mean + delta * count / total, m2 / total, total
        self.returns[dones] = 0.0
        return obs, rewards / np.sqrt(self.var + self.epsilon), dones, infos


class TransformReward(Wrapper):
    outside = 0.0  # seconds inside the whole stack's step: this wrapper is the outermost one

    def __init__(self, env, f):
        super().__init__(env)
        self.f = f

    def step(self, action):
        start = time.perf_counter()
        obs, rewards, dones, infos = self.env.step(action)
        result = obs, self.f(rewards), dones, infos
        TransformReward.outside += time.perf_counter() - start
        return result


def run_cleanrl(path: str, argv: list[str]) -> None:
    """Runs CleanRL's script unchanged. It is written for gym 0.23, whose wrappers return 4 values per step and know
    vector environments; with the gym of today these stand in for them and do the same work."""
    with contextlib.redirect_stderr(io.StringIO()):  # gym prints a notice
        import gym
    for wrapper in (TransformObservation, RecordEpisodeStatistics, NormalizeReward, TransformReward):
        setattr(gym.wrappers, wrapper.__name__, wrapper)
    sys.argv = [path, *argv]
    start = time.perf_counter()
    runpy.run_path(path, run_name="__main__")
    shim = TransformReward.outside - TransformObservation.inside
    print("WRAPPERS", shim / (time.perf_counter() - start), flush=True)


def cleanrl_steps_per_second(args: Args, num_envs: int) -> tuple[float, float]:
    """Timed by the arrival of the line that ends each iteration: its own SPS counts from the start of the process.
    Also returns the share of the run spent in the stand-ins for gym's wrappers."""
    batch_size = num_envs * args.num_steps
    flags = ["--env-id", args.env_id, "--num-envs", str(num_envs), "--num-steps", str(args.num_steps), "--no-track"]
    flags += ["--total-timesteps", str((args.iterations + 1) * batch_size), "--cuda" if args.cuda else "--no-cuda"]
    code = "import sys, throughput; throughput.run_cleanrl(sys.argv[1], sys.argv[2:])"
    command = [sys.executable, "-u", "-c", code, str(args.cleanrl.resolve()), *flags]
    here = str(Path(__file__).resolve().parent)
    path = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    ends, share = [], 0.0
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as errors:  # it writes runs/ where it is
        pipes = {"stdout": subprocess.PIPE, "stderr": errors, "text": True}
        with subprocess.Popen(command, cwd=folder, env=os.environ | {"PYTHONPATH": path}, **pipes) as process:
            for line in process.stdout:
                if line.startswith("SPS:"):
                    ends.append(time.perf_counter())
                elif line.startswith("WRAPPERS"):
                    share = float(line.split()[1])
        if process.returncode or len(ends) != args.iterations + 1:
            errors.seek(0)
            sys.exit(f"{' '.join(command)} failed:\n{errors.read()[-4000:]}")
    return args.iterations * batch_size / (ends[-1] - ends[0]), share


# ---- tables ---------------------------------------------------------------------------------------------------------


def main() -> None:
    args = tyro.cli(Args)
    contenders = {}
    for compiled, precision in itertools.product((False, True) if args.compile else (False,), args.precisions):
        flags = ["--precision", precision] + ["--compile"] * compiled
        contenders[f"ours, {precision}{', compiled' if compiled else ''}"] = flags
    if args.cleanrl:
        contenders["CleanRL"] = None
    baseline = "CleanRL" if args.cleanrl else next(iter(contenders))
    gpu = torch.cuda.get_device_name() if args.cuda and torch.cuda.is_available() else "no GPU"
    rounds, phases, totals, wrapper_shares = [], [], [], []

    for num_envs in args.num_envs:
        speeds = {name: [] for name in contenders}
        for i in range(1, args.rounds + 1):
            for name, flags in contenders.items():
                if flags is None:
                    speed, share = cleanrl_steps_per_second(args, num_envs)
                    wrapper_shares.append(share)
                else:
                    speed = our_steps_per_second(args, flags, num_envs)
                speeds[name].append(speed)
                rounds.append({"num_envs": num_envs, "contender": name, "round": i, "steps_per_second": speed})
                print(f"{num_envs} environments, round {i}: {name} {speed:,.0f} steps/s", file=sys.stderr, flush=True)
        for name, values in speeds.items():
            ratios = [a / b for a, b in zip(values, speeds[baseline])]
            row = {"environments": str(num_envs), "contender": name, "steps/s": f"{median(values):,.0f}"}
            row["range"] = f"{min(values):,.0f} to {max(values):,.0f}"
            row[f"ratio to {baseline}"] = f"{median(values) / median(speeds[baseline]):.2f}"
            totals.append(row | {"range of the rounds' ratios": f"{min(ratios):.2f} to {max(ratios):.2f}"})

        for name, flags in contenders.items():
            if flags is None:
                continue
            with tempfile.TemporaryDirectory() as folder:
                code = "import sys; sys.path.insert(0, 'benchmarks'); import throughput; "
                code += "throughput.our_phases(sys.argv[1:])"
                lines = run([sys.executable, "-c", code, *our_flags(args, flags, num_envs, folder + "/run")])
            for line in lines.splitlines():
                if line.startswith("PHASES"):
                    phases.append({"num_envs": num_envs, "contender": name} | json.loads(line[len("PHASES ") :]))
    parts = []
    for num_envs, (name, flags) in itertools.product(args.num_envs, contenders.items()):
        if flags is None:
            continue
        rows = [row for row in phases if (row["num_envs"], row["contender"]) == (num_envs, name)]
        seconds = {phase: median(row[phase] for row in rows) for phase in list(rows[0])[2:]}
        steps, total = num_envs * args.num_steps, sum(seconds.values())
        row = {"environments": str(num_envs), "script": name}
        for phase in ("environment", "acting", "update"):
            row[f"{phase} only, steps/s"] = f"{steps / seconds[phase]:,.0f}"
        row |= {"all, steps/s": f"{steps / total:,.0f}"}
        parts.append(row | {phase: f"{value / total:.2%}" for phase, value in seconds.items()})

    text = f"{markdown(totals)}\n\n{markdown(parts)}\n\n"
    for num_envs in args.num_envs:
        text += f"{num_envs} environments alone, random actions: {environment_only(args, num_envs):,.0f} steps/s.\n"
    text += f"""
{args.env_id}, easy, 200 levels (CleanRL: all levels), {args.num_steps} steps per rollout, 8 minibatches, 3 epochs.
{cpu_name()}, {torch.get_num_threads()} torch threads; {gpu}; PyTorch {torch.__version__}.
First table: medians of {args.rounds} runs of {args.iterations} iterations after one of warm-up, in turns; wall clock,
with logging, without evaluation. Second table: our script with clocks between its phases, medians of {args.iterations}
iterations: steps per second as if that phase were all, then each phase's share of the time.
"""
    if wrapper_shares:
        text += f"Stand-ins for gym 0.23's wrappers: {max(wrapper_shares):.2%} of CleanRL's time at most.\n"
    print(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "throughput.md").write_text(text)
        write_csv(args.out / "throughput.csv", rounds)
        write_csv(args.out / "phases.csv", phases)


if __name__ == "__main__":
    main()
