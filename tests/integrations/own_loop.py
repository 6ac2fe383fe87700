"""PLR in a loop of your own: the three ways to feed the sampler, and one sampler for many workers.

    PYTHONPATH=. python tests/integrations/own_loop.py     # needs numpy, gymnasium and plr_sampler.py

What to copy: plr_sampler.py, and from here the function that looks like your loop. `act` and `value` stand for a policy
and its value function; the environment is one whose reset seed is its level (tests/test_levels.py checks yours).
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import gymnasium as gym
import numpy as np
from plr_sampler import LevelSampler, StepScorer

import combination_locks  # noqa: F401  registers the environment

N, T, GAMMA, LAMBDA = 4, 64, 0.95, 0.95  # environments, steps per rollout


def make_envs() -> gym.vector.VectorEnv:
    options = {"autoreset_mode": gym.vector.AutoresetMode.DISABLED}
    return gym.make_vec("CombinationLock-v0", N, "sync", vector_kwargs=options)


def act(obs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(n, 18) -> (n,): the digit on show, else any."""
    return np.where(obs[:, 6:10].any(1), obs[:, 6:10].argmax(1), rng.integers(4, size=len(obs)))


def value(obs: np.ndarray) -> np.ndarray:
    """(n, 18) -> (n,): the number of digits that are left."""
    return obs[:, :6].sum(1)


def whole_rollouts(sampler: LevelSampler, rollouts: int) -> None:
    """You keep a rollout of T steps, as PPO does: `update` takes (T, N) levels, step scores and ends."""
    envs, rng, everywhere = make_envs(), np.random.default_rng(1), np.ones(N, bool)
    levels = sampler.next_levels(everywhere)
    obs, _ = envs.reset(seed=levels.tolist())
    for _ in range(rollouts):
        played, values, rewards, dones = [], [], [], []
        for _ in range(T):
            played.append(levels)
            values.append(value(obs))
            obs, reward, terminations, truncations, _ = envs.step(act(obs, rng))
            rewards.append(reward)
            dones.append(terminations | truncations)
            if dones[-1].any():
                levels = sampler.next_levels(dones[-1])
                obs, _ = envs.reset(seed=levels.tolist(), options={"reset_mask": dones[-1]})
        advantages, later, next_value = np.zeros((T, N)), np.zeros(N), value(obs)
        for t in reversed(range(T)):
            delta = rewards[t] + GAMMA * next_value * ~dones[t] - values[t]
            advantages[t] = later = delta + GAMMA * LAMBDA * ~dones[t] * later
            next_value = values[t]
        sampler.update(played, np.abs(advantages), dones)


def step_by_step(sampler: LevelSampler, steps: int) -> list[tuple]:
    """You keep no rollout: `StepScorer` takes what one step gives, and scores episodes as they end."""
    scorer = StepScorer(sampler, gamma=GAMMA, gae_lambda=LAMBDA)
    envs, rng, episodes = make_envs(), np.random.default_rng(1), []
    levels = sampler.next_levels(np.ones(N, bool))
    obs, _ = envs.reset(seed=levels.tolist())
    for _ in range(steps):
        values = value(obs)
        obs, rewards, terminations, truncations, _ = envs.step(act(obs, rng))
        dones = terminations | truncations
        next_values = value(obs) * ~terminations  # a truncated episode's last observation has a value
        ended = scorer.step(levels, values, next_values, rewards, dones)
        episodes += ended.tolist()  # (env, level, steps, mean score, maximum, True, return) of each episode that ended
        if dones.any():
            levels = sampler.next_levels(dones)
            obs, _ = envs.reset(seed=levels.tolist(), options={"reset_mask": dones})
    return episodes


def play(env: gym.Env, level: int, rng: np.random.Generator) -> float:
    """One episode with a score of your own: here, the share of it that went wrong."""
    obs, _ = env.reset(seed=level)
    length, total, done = value(obs[None])[0], 0.0, False
    while not done:
        obs, reward, terminated, truncated, _ = env.step(act(obs[None], rng)[0])
        total, done = total + reward, terminated or truncated
    return 1 - total / length


def many_workers(sampler: LevelSampler, episodes: int) -> None:
    """N workers in threads, each at its own pace: one lock around the one sampler, finished scores by `update_scores`.

    In processes, let one process own the sampler and send it (worker, level, score): rllib_robust_plr.py does so.
    """
    lock = threading.Lock()

    def work(i: int) -> None:
        env, rng, me = gym.make("CombinationLock-v0"), np.random.default_rng(i), np.arange(N) == i
        with lock:
            level = int(sampler.next_levels(me)[i])
        for _ in range(episodes):
            score = play(env, level, rng)
            with lock:
                sampler.update_scores([level], [score])
                level = int(sampler.next_levels(me)[i])

    with ThreadPoolExecutor(N) as workers:
        list(workers.map(work, range(N)))


if __name__ == "__main__":
    for feed, size in ((whole_rollouts, 20), (step_by_step, 1000), (many_workers, 200)):
        sampler = LevelSampler(buffer_size=100, num_envs=N, seed=1, rho=0.5, replay_schedule="fixed", nu=0.5)
        feed(sampler, size)
        print(feed.__name__, sampler.metrics())
