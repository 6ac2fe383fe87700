"""What the tests of both scripts share: starting a script, its run directory, an environment done
by hand, plain PPO."""

import csv
import fcntl
import importlib
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch

import ppo_plr_procgen
import ppo_robust_plr_minigrid

ROOT = Path(__file__).parent.parent
SCRIPTS = ppo_plr_procgen, ppo_robust_plr_minigrid
HUNG = 900  # seconds after which something hangs: less is what a shared machine may take
TINY = {  # flags of a whole run of a second or two, in which episodes end and levels are replayed
    "ppo_plr_procgen": "--env-id fruitbot --num-envs 4 --num-steps 24 --num-minibatches 2"
    " --update-epochs 1 --total-timesteps 384 --num-levels 5 --rho 0.2 --eval-episodes 2",
    "ppo_robust_plr_minigrid": "--num-envs 4 --num-steps 24 --update-epochs 2 --maze-size 7"
    " --num-walls 6 --max-steps 20 --buffer-size 12 --rho 0.3 --total-timesteps 960"
    " --eval-episodes 1",
}


def tiny(script: ModuleType, more: str = "") -> str:
    """TINY and more flags; without those that a baseline's curriculum refuses."""
    flags = TINY[script.__name__]
    if re.search("--curriculum (uniform|sequential|dr)", more):
        flags = re.sub(r" --(rho|buffer-size) \S+", "", flags)
    return f"{flags} {more}"


HALF = {ppo_plr_procgen: "--total-timesteps 192", ppo_robust_plr_minigrid: "--total-timesteps 576"}


# ---- starting a script ---------------------------------------------------------------------------
# Three ways. `run` is the user's; importing PyTorch and loading Procgen's pictures takes it five
# seconds. `Process` forks a process that has done both: one that may be killed, and that costs half
# a second. `main` is for what a test watches.


def run(script: ModuleType, flags: str, **env: str) -> subprocess.CompletedProcess:
    """The script as a user starts it."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    command = [sys.executable, f"{script.__name__}.py", *flags.split()]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=HUNG)


def train(script: ModuleType, flags: str, run_dir: Path, **env: str) -> None:
    """`run` to the end, what it printed in the run directory's stdout and stderr."""
    done = run(script, f"{flags} --run-dir {run_dir}", **env)
    assert done.returncode == 0, done.stderr
    (run_dir / "stdout").write_text(done.stdout)
    (run_dir / "stderr").write_text(done.stderr)


def main(script: ModuleType, monkeypatch: pytest.MonkeyPatch, flags: str) -> None:
    """The script in this process, so that a test can watch it."""
    torch.set_num_threads(1)
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *flags.split()])
    script.main()


class Process:
    """A script in a process of its own, after `prelude`, in which s is the script and evaluations
    are brief."""

    def __init__(self, script: ModuleType, flags: str, output: Path, prelude: str = "", **env: str):
        self.printed = [Path(f"{output}{suffix}") for suffix in (".out", ".err")]
        for path in self.printed:
            path.write_text("")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["warm"])
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(Path(__file__).parent)]))
            forkserver.ensure_running()
        env = {"OMP_NUM_THREADS": "1", **env}
        self.process = context.Process(
            target=in_child, args=(script.__name__, flags, self.printed, prelude, env)
        )
        self.process.start()

    def is_alive(self) -> bool:
        return self.process.is_alive()

    def kill_after(self, seconds: float) -> None:
        """With SIGKILL, unless it ends before."""
        self.process.join(seconds)
        self.process.kill()

    def wait(self) -> subprocess.CompletedProcess:
        """Its exit status (-9: killed) and what it printed."""
        self.process.join(300)
        if self.process.is_alive():
            self.process.kill()
            raise TimeoutError(self.printed[1].read_text())
        return subprocess.CompletedProcess(
            [], self.process.exitcode, *(path.read_text() for path in self.printed)
        )


def in_child(name: str, flags: str, printed: list[Path], prelude: str, env: dict[str, str]) -> None:
    for number, path in enumerate(printed, 1):
        os.dup2(os.open(path, os.O_WRONLY), number)
    os.environ.update(env)
    os.chdir(ROOT)
    torch.set_num_threads(1)
    sys.argv = [f"{name}.py", *flags.split()]
    # it reads torchrun's environment variables
    script = importlib.reload(importlib.import_module(name))
    shorten_evaluation(script)
    exec(prelude, {"s": script, "os": os, "sys": sys})
    script.main()


def shorten_evaluation(script: ModuleType, patch: Callable = setattr) -> None:
    """Mazes: at most 20 steps in each evaluation environment instead of up to 882, and everything
    else as it is."""
    if not hasattr(script, "evaluation_environments"):
        return
    environments = script.evaluation_environments

    def brief(*args: Any) -> Iterator[tuple[str, gym.vector.VectorEnv, dict]]:
        for name, envs, reset in environments(*args):
            if isinstance(envs, script.MazeEnvs):
                envs.max_steps = 20
            else:
                envs.env.set_attr("max_steps", 20)
            yield name, envs, reset

    patch(script, "evaluation_environments", brief)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.time() + HUNG
    while not condition():
        assert time.time() < deadline
        time.sleep(0.005)


def made_once(directory: Path, make: Callable[[Path], None]) -> Path:
    """`directory`, made by the first of the test processes that asks for it; the others wait."""
    with open(directory.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (directory / "complete").exists():
            shutil.rmtree(directory, ignore_errors=True)
            make(directory)
            (directory / "complete").touch()
    return directory


# ---- a run directory -----------------------------------------------------------------------------


def result_of(run_dir: Path) -> dict:
    return json.loads((run_dir / "result.json").read_text())


def rows(path: Path) -> list[dict[str, float]]:
    with open(path) as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def assert_ledger_balances(row: dict[str, float]) -> None:
    assert row["started"] == row["completed"] + row["in_progress"] + row["dropped"]


def assert_same_rows(a: Path, b: Path) -> None:
    """Equal but for the columns that hold times; nan equals nan."""
    for left, right in zip(rows(a), rows(b), strict=True):
        assert left.keys() == right.keys()
        for column in left.keys() - {"wall_seconds", "SPS"}:
            assert left[column] == right[column] or np.isnan([left[column], right[column]]).all(), (
                column
            )


def assert_same_run(run_dir: Path, expected: Path) -> None:
    assert result_of(run_dir)["fingerprint"] == result_of(expected)["fingerprint"]
    assert_same_rows(run_dir / "progress.csv", expected / "progress.csv")
    assert_same_rows(run_dir / "evaluations.csv", expected / "evaluations.csv")


def assert_refused(
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    directory: Path,
    capsys,
    flags: str,
    expected: str,
) -> None:
    """One sentence with `expected` in it and exit status 2, before an environment is made or a file
    is written."""
    built, before = [], sorted(directory.iterdir())
    monkeypatch.setattr(script, "make_envs", lambda *args: built.append(args))
    monkeypatch.chdir(directory)
    with pytest.raises(SystemExit) as stop:
        main(script, monkeypatch, flags)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and expected in message, message
    # ours are one line; tyro draws a box
    assert message.count("\n") == 1 or not message.startswith("error: ")
    assert not built and sorted(directory.iterdir()) == before


# ---- what the sampler is told and asked ----------------------------------------------------------


class Rollout(NamedTuple):
    levels: np.ndarray  # (T, N)
    step_scores: np.ndarray  # (T, N)
    dones: np.ndarray  # (T, N) bool
    episodes: Any  # what `update` gave back
    draws: list[tuple[bool | None, int]]  # (replay, level) of each `sample` since the update before
    sampler: Any


def watch_sampler(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[Rollout]:
    """A list that gets an entry at each of the script's updates of its sampler."""
    rollouts, draws = [], []

    class Spy(script.LevelSampler):
        def next_levels(self, done, replay=None, levels=None):
            playing = super().next_levels(done, replay, levels)
            if levels is None:
                draws.extend((replay, level) for level in playing[done].tolist())
            return playing

        def update(self, levels, step_scores, dones, **kwargs):
            episodes = super().update(levels, step_scores, dones, **kwargs)
            done = np.array(dones).astype(bool)
            rollouts.append(
                Rollout(levels.copy(), np.array(step_scores), done, episodes, draws[:], self)
            )
            draws.clear()
            return episodes

    monkeypatch.setattr(script, "LevelSampler", Spy)
    return rollouts


# ---- an environment small enough to do by hand ---------------------------------------------------

# level l % 3 ends after this many steps; level 1's end may be a time limit
LENGTHS = np.array([3, 1, 5])
REWARDS = np.array(
    [[1.0, 0.0, 2.0, 0, 0, 0], [-1.5, 0, 0, 0, 0, 0], [0.0, 0.5, 0.0, -0.25, 3.0, 0]]
)
VALUES = np.array(
    [[0.3, -0.2, 0.9, 2.2, 0, 0], [0.1, 1.7, 0, 0, 0, 0], [0.7, 0.6, 0.1, 1.2, -0.4, 3.3]]
)
LOGITS = np.random.default_rng(0).normal(size=(3, 6, 7))


class Corridor(gym.vector.VectorEnv):
    """Rewards and lengths by level; actions do nothing. The first pixel says where one is: 16 *
    (level % 3) + step."""

    image_shape: tuple[int, int, int]

    def __init__(self, num_envs: int):
        self.num_envs, self.started = num_envs, []
        self.image_space = self.single_observation_space = gym.spaces.Box(
            0, 255, self.image_shape, np.uint8
        )
        self.single_action_space = gym.spaces.Discrete(LOGITS.shape[-1])
        self.level, self.t = np.zeros(num_envs, int), np.zeros(num_envs, int)

    def look(self) -> Any:
        image = np.zeros((self.num_envs, *self.image_shape), np.uint8)
        image[:, 0, 0, 0] = 16 * self.level + self.t
        return image

    def reset(self, *, seed: Any = None, options: dict | None = None) -> tuple[Any, dict]:
        mask = (options or {}).get("reset_mask", np.ones(self.num_envs, bool))
        if isinstance(seed, int):  # as Gymnasium has it
            seed = list(range(seed, seed + self.num_envs))
        # a registered Gymnasium environment takes nothing else
        assert all(type(level) is int for level in seed)
        self.started += np.array(seed)[mask].tolist()
        self.level[mask], self.t[mask] = np.array(seed)[mask] % 3, 0
        return self.look(), {}

    def step(self, actions: Any) -> tuple[Any, ...]:
        rewards = REWARDS[self.level, self.t]
        # a finished one may be stepped on: nothing it shows counts
        self.t = np.minimum(self.t + 1, 5)
        done = self.t >= LENGTHS[self.level]
        return self.look(), rewards, done, np.zeros_like(done), {}


class TableAgent(torch.nn.Module):
    """An agent of the corridor whose values and logits are known."""

    def __init__(self, envs: Any = None, precision: str = "fp32", encoder: str = "impala"):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.num_actions = LOGITS.shape[-1]

    def look_up(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images [...] -> log-probabilities [..., actions] and values [...]."""
        code = image[..., 0, 0, 0].long()
        logits, values = (
            torch.tensor(x).float()[code // 16, code % 16] + self.weight for x in (LOGITS, VALUES)
        )
        return logits.log_softmax(-1), values


def steps_since_start(dones: np.ndarray) -> np.ndarray:
    """Position [T, N] of each step in its episode."""
    t_of, t = np.zeros(dones.shape, int), np.zeros(dones.shape[1], int)
    for step in range(len(dones)):
        t_of[step] = t
        t = np.where(dones[step], 0, t + 1)
    return t_of


def td_errors(
    levels: np.ndarray, dones: np.ndarray, rewards: np.ndarray, gamma: float, cut: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Values and TD errors [T, N] of the corridor, in plain loops. Where an episode ends or the
    rollout does, the next state counts only if it is `cut` off there."""
    kind, t_of, deltas = levels % 3, steps_since_start(dones), np.zeros(dones.shape)
    values = VALUES[kind, t_of]
    for step, i in np.ndindex(*dones.shape):
        # of the state that the step leads to, reset or not
        after = VALUES[kind[step, i], t_of[step, i] + 1]
        if (dones[step, i] or step == len(dones) - 1) and not cut[step, i]:
            after = 0.0
        deltas[step, i] = rewards[step, i] + gamma * after - values[step, i]
    return values, deltas


def best_returns(
    levels: np.ndarray, dones: np.ndarray, rewards: np.ndarray, best: dict[int, float] | None = None
) -> tuple[dict[int, float], int]:
    """level -> best return of a whole episode, from `best` on; and how many episodes were worse
    than one before."""
    best, worse = {} if best is None else best, 0
    for i in range(dones.shape[1]):
        begin = 0
        for step in np.flatnonzero(dones[:, i]):
            level, total = int(levels[step, i]), rewards[begin : step + 1, i].sum()
            worse += total < best.get(level, -np.inf)
            best[level] = max(best.get(level, -np.inf), total)
            begin = step + 1
    return best, worse


def scores_by_hand(
    levels: np.ndarray,
    dones: np.ndarray,
    values: np.ndarray,
    deltas: np.ndarray,
    decay: float,
    best: dict[int, float],
) -> dict[str, np.ndarray]:
    """Every level score per step [T, N]; decay is gamma times lambda."""
    logits = LOGITS[levels % 3, steps_since_start(dones)]
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    largest = np.sort(p)[..., ::-1]
    advantages = gae_as_a_sum(deltas, dones, decay)
    return {
        "max_mc": np.vectorize(lambda level: best.get(level, 0.0))(levels) - values,
        "positive_value_loss": np.maximum(advantages, 0),
        "value_l1": np.abs(advantages),
        "gae": advantages,
        "one_step_td_error": np.abs(deltas),
        "policy_entropy": -(p * np.log(p)).sum(-1) / np.log(p.shape[-1]),
        "least_confidence": 1 - largest[..., 0],
        "min_margin": 1 - (largest[..., 0] - largest[..., 1]),
    }


def mna_by_hand(deltas: np.ndarray, dones: np.ndarray, gamma: float, lam: float) -> np.ndarray:
    """Maximised negative advantages [T, N] of each step, in plain loops."""
    scores = np.zeros_like(deltas)
    T, N = deltas.shape
    for t, i in np.ndindex(T, N):
        end = next(k for k in range(t, T) if dones[k, i] or k == T - 1)
        g, mixed = 0.0, 0.0
        for k in range(t, end + 1):
            g = min(0.0, g + gamma ** (k - t) * deltas[k, i])
            mixed += lam ** (k - t) * g * (1 if k == end else 1 - lam)
        scores[t, i] = -mixed
    return scores


def returns_by_hand(
    levels: np.ndarray, dones: np.ndarray, rewards: np.ndarray
) -> dict[int, list[float]]:
    """level -> the returns of its finished episodes, in order of time and environment."""
    returns, sums = {}, np.zeros(levels.shape[1])
    for step in range(len(levels)):
        sums += rewards[step]
        for i in np.flatnonzero(dones[step]):
            returns.setdefault(int(levels[step, i]), []).append(sums[i])
            sums[i] = 0.0
    return returns


# ---- PPO written out plainly ---------------------------------------------------------------------


def gae_as_a_sum(deltas: np.ndarray, dones: np.ndarray, decay: float) -> np.ndarray:
    """GAE [T, N] as what it stands for: the sum of discounted TD errors up to the episode's end."""
    advantages = np.zeros_like(deltas)
    T, N = deltas.shape
    for i in range(N):
        for t in range(T):
            for k in range(t, T):
                advantages[t, i] += decay ** (k - t) * deltas[k, i]
                if dones[k, i]:
                    break
    return advantages


def gae_backwards(
    rewards: np.ndarray, values: np.ndarray, dones: np.ndarray, gamma: float, lam: float
) -> np.ndarray:
    """GAE [T, N] by the textbook's recursion; values [T + 1, N]."""
    advantages, running = np.zeros(rewards.shape), np.zeros(rewards.shape[1])
    for t in reversed(range(len(rewards))):
        running = (
            rewards[t]
            + gamma * values[t + 1] * ~dones[t]
            - values[t]
            + gamma * lam * ~dones[t] * running
        )
        advantages[t] = running
    return advantages


def assert_trained_like(
    plain: "PlainPPO", names: list[str], start: dict, run_dir: Path, atol: float
) -> None:
    """The run's one update moved every parameter to where `plain` has it, and logged the means of
    plain's losses."""
    trained = torch.load(run_dir / "checkpoint.pt", weights_only=True)["agent"]
    for name, parameter in zip(names, plain.parameters, strict=True):
        assert not torch.equal(trained[name], start[name]), f"{name} was not trained"
        torch.testing.assert_close(trained[name], parameter.detach(), rtol=1e-3, atol=atol)
    logged, expected = rows(run_dir / "progress.csv")[0], np.mean(plain.losses, 0)
    assert expected[3] > 0.01  # the clipping was active
    columns = "value_loss", "policy_loss", "entropy", "clipfrac"
    np.testing.assert_allclose(
        [logged[column] for column in columns], expected, rtol=2e-3, atol=1e-4
    )


class PlainPPO:
    """PPO's loss, gradient clipping and Adam in elementary operations, updating `parameters` in
    place."""

    def __init__(
        self,
        parameters,
        learning_rate: float,
        clip: float,
        ent_coef: float,
        vf_coef: float,
        max_norm: float,
    ):
        self.parameters, self.learning_rate, self.clip = list(parameters), learning_rate, clip
        self.ent_coef, self.vf_coef, self.max_norm = ent_coef, vf_coef, max_norm
        self.m, self.s = ([torch.zeros_like(p) for p in self.parameters] for _ in range(2))
        self.losses = []  # per step: value, policy, entropy, clipped fraction

    def step(self, log_p, value, action, old_logprob, old_value, advantage, returns) -> None:
        """One minibatch of any shape [...]; log_p [..., actions]."""
        clip = self.clip
        ratio = (log_p.gather(-1, action[..., None])[..., 0] - old_logprob).exp()
        a = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        policy_loss = -torch.min(a * ratio, a * torch.clip(ratio, 1 - clip, 1 + clip)).mean()
        clipped = old_value + torch.clip(value - old_value, -clip, clip)
        value_loss = (
            0.5
            * torch.stack(((value - returns) ** 2, (clipped - returns) ** 2)).max(0).values.mean()
        )
        entropy = -(log_p.exp() * log_p).sum(-1).mean()
        loss = policy_loss - self.ent_coef * entropy + self.vf_coef * value_loss
        gradients = torch.autograd.grad(loss, self.parameters)
        norm = torch.sqrt(sum((g**2).sum() for g in gradients))
        clipfrac = ((ratio - 1).abs() > clip).float().mean()
        self.losses.append([x.item() for x in (value_loss, policy_loss, entropy, clipfrac)])
        t = len(self.losses)
        with torch.no_grad():
            for p, g, m, s in zip(self.parameters, gradients, self.m, self.s):  # as in their papers
                g = g * min(1.0, self.max_norm / (norm + 1e-6))
                m.mul_(0.9).add_(0.1 * g)
                s.mul_(0.999).add_(0.001 * g**2)
                p -= self.learning_rate * m / (1 - 0.9**t) / ((s / (1 - 0.999**t)).sqrt() + 1e-5)
