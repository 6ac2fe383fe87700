"""What the tests of both scripts share: starting a script, reading what it wrote, and PPO written out plainly."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import ppo_plr_procgen
import ppo_robust_plr_minigrid

ROOT = Path(__file__).parent.parent
SCRIPTS = ppo_plr_procgen, ppo_robust_plr_minigrid
TINY = {  # flags of a whole run of a few seconds
    "ppo_plr_procgen": "--env-id fruitbot --num-envs 4 --num-steps 32 --num-minibatches 2 --update-epochs 1"
    " --total-timesteps 384 --num-levels 5 --eval-episodes 2",
    "ppo_robust_plr_minigrid": "--num-envs 4 --num-steps 24 --update-epochs 2 --maze-size 7 --num-walls 6"
    " --max-steps 20 --buffer-size 12 --rho 0.3 --total-timesteps 960 --eval-episodes 1",
}


# ---- starting a script, reading its run directory --------------------------------------------------------------------


def run(script: ModuleType, flags: str, **env: str) -> subprocess.CompletedProcess:
    """The script as a user starts it."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    command = [sys.executable, f"{script.__name__}.py", *flags.split()]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)


def train(script: ModuleType, flags: str, run_dir: Path, **env: str) -> dict:
    done = run(script, f"{flags} --run-dir {run_dir}", **env)
    assert done.returncode == 0, done.stderr
    return result_of(run_dir) | {"stdout": done.stdout, "stderr": done.stderr}


def main(script: ModuleType, monkeypatch: pytest.MonkeyPatch, flags: str) -> None:
    """The script in this process, so that a test can watch it."""
    torch.set_num_threads(1)
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *flags.split()])
    script.main()


def result_of(run_dir: Path) -> dict:
    return json.loads((run_dir / "result.json").read_text())


def rows(path: Path) -> list[dict[str, float]]:
    with open(path) as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def assert_same_rows(a: Path, b: Path) -> None:
    """Equal but for the columns that hold times; nan equals nan."""
    for left, right in zip(rows(a), rows(b), strict=True):
        assert left.keys() == right.keys()
        for column in left.keys() - {"wall_seconds", "SPS"}:
            assert left[column] == right[column] or np.isnan([left[column], right[column]]).all(), column


def assert_refused(script: ModuleType, monkeypatch, directory: Path, capsys, flags: str, expected: str) -> None:
    """One sentence with `expected` in it and exit status 2, before an environment is made or a file is written."""
    built, before = [], sorted(directory.iterdir())
    monkeypatch.setattr(script, "make_envs", lambda *args: built.append(args))
    monkeypatch.chdir(directory)
    with pytest.raises(SystemExit) as stop:
        main(script, monkeypatch, flags)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and expected in message, message
    assert message.count("\n") == 1 or not message.startswith("error: ")  # ours are one line; tyro draws a box
    assert not built and sorted(directory.iterdir()) == before


# ---- PPO written out plainly -----------------------------------------------------------------------------------------


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


def gae_backwards(rewards: np.ndarray, values: np.ndarray, dones: np.ndarray, gamma: float, lam: float) -> np.ndarray:
    """GAE [T, N] by the textbook's recursion; values [T + 1, N]."""
    advantages, running = np.zeros(rewards.shape), np.zeros(rewards.shape[1])
    for t in reversed(range(len(rewards))):
        running = rewards[t] + gamma * values[t + 1] * ~dones[t] - values[t] + gamma * lam * ~dones[t] * running
        advantages[t] = running
    return advantages


class PlainPPO:
    """PPO's loss, gradient clipping and Adam in elementary operations, updating `parameters` in place."""

    def __init__(self, parameters, learning_rate: float, clip: float, ent_coef: float, vf_coef: float, max_norm: float):
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
        value_loss = 0.5 * torch.stack(((value - returns) ** 2, (clipped - returns) ** 2)).max(0).values.mean()
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
