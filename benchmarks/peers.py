"""The two peers that throughput.py runs beside our scripts, unchanged: CleanRL's, jaxued's.

Not a command of its own. CleanRL needs what requirements.txt installs; jaxued its own environment:

    git clone https://github.com/vwxyzjn/cleanrl
    git clone https://github.com/DramaCow/jaxued
    python -m venv jax
    jax/bin/pip install "jax[cpu]" flax optax chex distrax orbax-checkpoint gymnax
"""

import contextlib
import io
import math
import os
import runpy
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

BLOCK = 32  # jaxued's updates from one evaluation, and logged line, to the next


def read_lines(
    command: list[str], env: dict[str, str], limit: float, needed: str
) -> list[tuple[float, str]]:
    """(seconds, line) of what a process prints, until it ends or the limit is reached. `needed`:
    how the lines that count begin; without two, an error with what the process said."""
    lines = []
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as errors:
        pipes = {"stdout": subprocess.PIPE, "stderr": errors, "text": True}
        # the peers write where they are
        with subprocess.Popen(command, cwd=folder, env=os.environ | env, **pipes) as process:
            timer = threading.Timer(limit, process.kill)
            timer.start()
            for line in process.stdout:
                lines.append((time.perf_counter(), line.strip()))
            timer.cancel()
        errors.seek(0)
        if sum(line.startswith(needed) for _, line in lines) < 2:
            said = errors.read().strip().rpartition("\n")[2]
            raise RuntimeError(f"it did not get far within {limit:.0f} s: {said}")
    return lines


# ---- CleanRL -------------------------------------------------------------------------------------
# It is written for gym 0.23, whose wrappers return four values per step and know vector
# environments. With the gym of today these stand in for them and do the same work; they take less
# than a thousandth of its time.


class Wrapper:
    """What it does not have itself comes from the environment inside."""

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
    def __init__(self, env, f):
        super().__init__(env)
        self.f = f

    def reset(self):
        return self.f(self.env.reset())

    def step(self, action):
        obs, rewards, dones, infos = self.env.step(action)
        return self.f(obs), rewards, dones, infos


class RecordEpisodeStatistics(Wrapper):
    def __init__(self, env):
        super().__init__(env)
        self.start = time.perf_counter()

    def reset(self):
        self.returns = np.zeros(self.num_envs, np.float32)
        self.lengths = np.zeros(self.num_envs, np.int32)
        return self.env.reset()

    def step(self, action):
        obs, rewards, dones, infos = self.env.step(action)
        self.returns += rewards
        self.lengths += 1
        infos = list(infos)
        for i in np.flatnonzero(dones):
            seconds = round(time.perf_counter() - self.start, 6)
            episode = {"r": self.returns[i], "l": self.lengths[i], "t": seconds}
            infos[i] = infos[i] | {"episode": episode}
            self.returns[i] = 0
            self.lengths[i] = 0
        return obs, rewards, dones, infos


class NormalizeReward(Wrapper):
    """Rewards over the standard deviation of the discounted return, by its running moments."""

    def __init__(self, env, gamma=0.99, epsilon=1e-8):
        super().__init__(env)
        self.gamma = gamma
        self.epsilon = epsilon
        self.mean = 0.0
        self.var = 1.0
        self.count = 1e-4
        self.returns = np.zeros(self.num_envs)

    def step(self, action):
        obs, rewards, dones, infos = self.env.step(action)
        self.returns = self.returns * self.gamma + rewards
        count = len(self.returns)
        total = self.count + count
        delta = self.returns.mean() - self.mean
        squares = self.var * self.count + self.returns.var() * count
        self.var = (squares + delta**2 * self.count * count / total) / total
        self.mean += delta * count / total
        self.count = total
        self.returns[dones] = 0.0
        return obs, rewards / np.sqrt(self.var + self.epsilon), dones, infos


class TransformReward(Wrapper):
    def __init__(self, env, f):
        super().__init__(env)
        self.f = f

    def step(self, action):
        obs, rewards, dones, infos = self.env.step(action)
        return obs, self.f(rewards), dones, infos


def run_cleanrl(path: str, argv: list[str]) -> None:
    """Runs CleanRL's script unchanged, in this process."""
    with contextlib.redirect_stderr(io.StringIO()):  # gym prints a notice
        import gym
    wrappers = TransformObservation, RecordEpisodeStatistics, NormalizeReward, TransformReward
    for wrapper in wrappers:
        setattr(gym.wrappers, wrapper.__name__, wrapper)
    sys.argv = [path, *argv]
    runpy.run_path(path, run_name="__main__")


def cleanrl(path: Path, num_steps: int, limit: float) -> float:
    """Steps/s on starpilot with 64 environments, by the arrival of the line that ends each
    iteration, the first one left out: the script's own SPS counts from the process's start."""
    batch = 64 * num_steps
    code = "import sys, peers; peers.run_cleanrl(sys.argv[1], sys.argv[2:])"
    command = [sys.executable, "-u", "-c", code, str(path.resolve()), "--env-id", "starpilot"]
    command += ["--num-envs", "64", "--num-steps", str(num_steps), "--no-track"]
    command += ["--total-timesteps", str(3 * batch)]
    env = {"PYTHONPATH": str(Path(__file__).resolve().parent)}
    lines = read_lines(command, env, limit, "SPS:")
    ends = [seconds for seconds, line in lines if line.startswith("SPS:")]
    return (len(ends) - 1) * batch / (ends[-1] - ends[0])


# ---- jaxued --------------------------------------------------------------------------------------

# What jaxued's script finds as wandb: it prints when a block of updates has ended.
WANDB = """
def init(config, **kwargs):
    pass

def nothing(*args, **kwargs):
    pass

define_metric = Image = Video = nothing

def log(row):
    print("LOG", int(row["num_updates"]), int(row["level_sampler/size"]), flush=True)
"""


def jaxued(path: Path, python: str, num_steps: int, limit: float) -> float:
    """Steps/s with 32 environments, from one logged line to another after the buffer's fill (half
    of 4,000 levels). The first block is not measured in any case, nor the second: that takes about
    as much longer than the third as compiling does. The evaluation after each block (8 mazes, 1
    attempt) is inside: half a percent of the time."""
    unmeasured = max(2, math.ceil(0.5 * 4000 / 32 / BLOCK))
    flags = {"num_updates": BLOCK * (unmeasured + 3), "eval_freq": BLOCK, "eval_num_attempts": 1}
    flags |= {"num_steps": num_steps, "num_train_envs": 32, "level_buffer_capacity": 4000}
    flags |= {"minimum_fill_ratio": 0.5, "replay_prob": 0.5, "checkpoint_save_interval": 0}
    command = [python, "-u", str(path.resolve() / "examples/maze_plr.py")]
    for name, value in flags.items():
        command += [f"--{name}", str(value)]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "wandb.py").write_text(WANDB)
        env = {"PYTHONPATH": os.pathsep.join((folder, str(path.resolve() / "src")))}
        lines = read_lines(command, env, limit, "LOG ")
    logged = [(seconds, *map(int, line.split()[1:])) for seconds, line in lines if "LOG " in line]
    filled = [line for line in logged[1:] if line[2] >= 0.5 * 4000]
    if len(filled) < 2:
        raise RuntimeError(f"no block of jaxued's after the fill within {limit:.0f} s: {logged}")
    updates = filled[-1][1] - filled[0][1]
    return updates * 32 * num_steps / (filled[-1][0] - filled[0][0])
