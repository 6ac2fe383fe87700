"""The two peers that throughput.py runs beside our scripts, unchanged: CleanRL's ppo_procgen.py, jaxued's maze_plr.py.

Not a command of its own. CleanRL needs what requirements.txt installs; jaxued an environment of its own:

    git clone https://github.com/vwxyzjn/cleanrl && git clone https://github.com/DramaCow/jaxued
    python -m venv jax && jax/bin/pip install "jax[cpu]" flax optax chex distrax orbax-checkpoint gymnax
"""

import contextlib
import io
import json
import math
import os
import runpy
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

BLOCK = 32  # jaxued's updates from one evaluation, and logged line, to the next


def read_lines(command: list[str], env: dict[str, str], limit: float, needed: str) -> list[tuple[float, str]]:
    """(seconds, line) of what a process prints, until it ends or the limit is reached. needed: how the lines that count
    begin; without any, an error with what the process said."""
    lines = []
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as errors:  # peers write where they are
        pipes = {"stdout": subprocess.PIPE, "stderr": errors, "text": True}
        with subprocess.Popen(command, cwd=folder, env=os.environ | env, **pipes) as process:
            timer = threading.Timer(limit, process.kill)
            timer.start()
            for line in process.stdout:
                lines.append((time.perf_counter(), line.strip()))
            timer.cancel()
        errors.seek(0)
        if sum(line.startswith(needed) for _, line in lines) < 2:
            raise RuntimeError(f"{' '.join(command)} did not get far within {limit:.0f} s:\n{errors.read()[-3000:]}")
    return lines


# ---- CleanRL --------------------------------------------------------------------------------------------------------


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


def cleanrl(path: Path, game: str, num_envs: int, num_steps: int, iterations: int, cuda: bool, limit: float) -> dict:
    """Timed by the arrival of the line that ends each iteration: its own SPS counts from the start of the process.
    wrappers: the share of the run that the stand-ins for gym's wrappers take."""
    total = (iterations + 1) * num_envs * num_steps
    command = [sys.executable, "-u", "-c", "import sys, peers; peers.run_cleanrl(sys.argv[1], sys.argv[2:])"]
    command += [str(path.resolve()), "--env-id", game, "--num-envs", str(num_envs), "--num-steps", str(num_steps)]
    command += ["--no-track", "--total-timesteps", str(total), "--cuda" if cuda else "--no-cuda"]
    here = str(Path(__file__).resolve().parent)
    env = {"PYTHONPATH": os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])}
    lines = read_lines(command, env, limit, "SPS:")
    ends = [seconds for seconds, line in lines if line.startswith("SPS:")]
    share = [float(line.split()[1]) for _, line in lines if line.startswith("WRAPPERS")]
    speed = (len(ends) - 1) * num_envs * num_steps / (ends[-1] - ends[0])
    return {"steps_per_second": speed, "iterations": len(ends) - 1, "wrappers": share[0] if share else ""}


# ---- jaxued ---------------------------------------------------------------------------------------------------------

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
    here = {"jax": f"JAX {jax.__version__} on {jax.devices()[0].device_kind}"}
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


def jaxued(
    path: Path, python: str, num_envs: int, num_steps: int, buffer: int, rho: float, blocks: int, cuda: bool,
    limit: float,
) -> dict[str, Any]:  # fmt: skip
    """Time from one logged line to another, after the buffer's fill. The first two blocks are not measured in any case:
    the second takes about as much longer than the third as compiling does."""
    unmeasured = max(2, math.ceil(rho * buffer / num_envs / BLOCK))
    command = [python, "-u", str(path.resolve() / "examples/maze_plr.py"), "--checkpoint_save_interval", "0"]
    for name, value in (
        ("num_updates", BLOCK * (unmeasured + blocks)), ("eval_freq", BLOCK), ("eval_num_attempts", 1),
        ("num_steps", num_steps), ("num_train_envs", num_envs), ("level_buffer_capacity", buffer),
        ("minimum_fill_ratio", rho), ("replay_prob", 0.5),
    ):  # fmt: skip
        command += [f"--{name}", str(value)]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "wandb.py").write_text(WANDB)
        env = {"PYTHONPATH": os.pathsep.join((folder, str(path.resolve() / "src")))}
        lines = read_lines(command, env | ({} if cuda else {"JAX_PLATFORMS": "cpu"}), limit, "LOG ")
    logged = [{"time": t} | json.loads(line[4:]) for t, line in lines if line.startswith("LOG ")][1:]
    filled = [line for line in logged if line["levels"] >= rho * buffer]
    if len(filled) < 2:
        raise RuntimeError(f"no block of jaxued's after the fill within {limit:.0f} s: {logged}")
    first, last = filled[0], filled[-1]
    count, seconds = last["updates"] - first["updates"], last["time"] - first["time"]
    result = {"steps_per_second": count * num_envs * num_steps / seconds, "iterations": count, "jax": first["jax"]}
    result |= {"replay_share": (last["replays"] - first["replays"]) / count}
    evaluation = [float(line.split()[1]) for _, line in lines if line.startswith("EVALUATION ")]
    return result | {"evaluation": evaluation[0] * count / BLOCK / seconds if evaluation else ""}
