"""PLR without a change to the training code: a vector environment that plays PLR's levels.

    sampler = LevelSampler(buffer_size=4000, num_envs=envs.num_envs, seed=1)
    envs = PLRVectorEnv(envs, sampler, value, gamma=0.999, gae_lambda=0.95)

What to copy: this file and plr_sampler.py. `envs` is Gymnasium's SyncVectorEnv or AsyncVectorEnv of
environments whose reset seed is their level; other vector wrappers go around PLRVectorEnv. The loop
sees the same environments in the same autoreset mode; the seed that it resets with is not used. An
episode is scored as a whole when it ends (PLR, arXiv 2010.03934, Algorithm 4), before its
environment's next level is drawn. Example: cleanrl_unchanged.py.
"""

from collections.abc import Callable
from copy import deepcopy
from multiprocessing.connection import wait
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import concatenate, create_empty_array, iterate
from numpy import ndarray
from plr_sampler import LevelSampler, require, value_l1


def learnability(returns: ndarray) -> float:
    """p (1 - p) of the returns (k,), p the share above 0 (Rutherford et al. 2024, 2408.15099)."""
    # Laplace's rule: a level is not taken for solved or hopeless because of one episode.
    p = ((returns > 0).sum() + 1) / (len(returns) + 2)
    return p * (1 - p)


class PLRVectorEnv(gym.vector.VectorWrapper):
    """Starts every episode on the sampler's next level and scores it when it ends.

    value: V(s), a batch of n <= batch_size observations -> (n,). One with a state has a method
    `reset()`, called where an episode starts; then it gets that episode's observations in order.
    score: of the steps, from an episode's (advantages, deltas, regrets), (steps,) each, as in
    StepScorer; without a value one number, from the level's last returns, at most ten, (k,).
    check: refuses an environment that is not fit for PLR, by three resets. False if the first
    observations of levels are alike. infos["plr_level"] (N,) is the level of each observation.
    """

    def __init__(
        self,
        envs: gym.vector.VectorEnv,
        sampler: LevelSampler,
        value: Callable[[Any], Any] | None = None,
        gamma: float = 0.999,
        gae_lambda: float = 0.95,
        score: Callable | None = None,
        batch_size: int = 1024,
        check: bool = True,
    ):
        super().__init__(envs)
        n = envs.num_envs
        message = f"the sampler has num_envs={sampler.num_envs}, but there are {n} environments"
        require(sampler.num_envs == n, message)
        self.autoreset_mode = AutoresetMode(envs.metadata["autoreset_mode"])
        self.curriculum = sampler
        self.value = value
        self.gamma = gamma
        self.gae_lambda = gae_lambda
        self.score = score or (learnability if value is None else value_l1)
        self.batch_size = batch_size
        self._to_check = check
        self._begun = False
        self._over = np.zeros(n, bool)  # the episode has ended, the next has not started
        # Of each environment's episode; observations only with a value, one more than rewards.
        self._obs: list[list] = [[] for _ in range(n)]
        self._rewards: list[list[float]] = [[] for _ in range(n)]
        self._returns: dict[int, list[float]] = {}  # of each level, without a value

    def reset(self, *, seed: Any = None, options: dict | None = None) -> tuple[Any, dict]:
        """Starts the next levels, everywhere or where options["reset_mask"] (N,) bool says. What
        was in progress there is dropped: it is never scored."""
        options = dict(options or {})
        mask = options.pop("reset_mask", np.ones(self.num_envs, bool))
        require(self._begun or mask.all(), "the first reset must be of all environments")
        if self.autoreset_mode == AutoresetMode.NEXT_STEP and self._begun and self._over.any():
            # Without it Gymnasium's workers would still do the reset that is due, on no level.
            safe = getattr(self.env.unwrapped, "shared_memory", True)
            require(safe, "an episode is over: step before you reset, or use shared_memory=True")
        if self._to_check:
            self._check_fit()
            self._to_check = False
        self.curriculum.drop(mask & ~self._over)
        self._begun = True
        return self._start(mask, options)

    def step(self, actions: Any) -> tuple[Any, ndarray, ndarray, ndarray, dict]:
        """One step, in the environments' autoreset mode."""
        require(self._begun, "reset the environments before the first step")
        starting = self._over.copy()  # in NEXT_STEP mode
        if self.autoreset_mode == AutoresetMode.DISABLED:
            require(not starting.any(), f"episodes are over, reset where they are: {starting}")
        levels = self.curriculum.playing.copy()
        obs, rewards, terminations, truncations, infos = self._call(levels, self.env.step, actions)
        infos |= {"plr_level": levels, "_plr_level": np.ones(self.num_envs, bool)}
        dones = terminations | truncations
        reached = list(iterate(self.env.observation_space, obs))  # s' of each environment
        same_step = self.autoreset_mode == AutoresetMode.SAME_STEP
        if same_step and dones.any():
            reached = [infos["final_obs"][i] if dones[i] else reached[i] for i in range(len(dones))]
            infos["final_info"] |= {"plr_level": levels.copy(), "_plr_level": dones.copy()}
        for i in np.flatnonzero(~starting):
            self._rewards[i].append(float(rewards[i]))
            if self.value is not None:
                self._obs[i].append(deepcopy(reached[i]))
        if dones.any():
            self._score(np.flatnonzero(dones), terminations)
        self._over = dones & (not same_step)
        starting = dones if same_step else starting
        if starting.any():
            # Gymnasium has started these by itself, on no level of ours.
            obs, start_infos = self._start(starting, {})
            infos = replace_infos(infos, start_infos, starting)
        return obs, rewards, terminations, truncations, infos

    def _start(self, mask: ndarray, options: dict) -> tuple[Any, dict]:
        """Starts an episode in each environment of mask (N,) bool, on the level drawn for it."""
        levels = self.curriculum.next_levels(mask)
        options["reset_mask"] = mask.copy()
        obs, infos = self._call(levels, self.env.reset, seed=levels.tolist(), options=options)
        starts = list(iterate(self.env.observation_space, obs))
        for i in np.flatnonzero(mask):
            self._obs[i] = [deepcopy(starts[i])]
            self._rewards[i] = []
        self._over[mask] = False
        return obs, infos | {"plr_level": levels, "_plr_level": np.ones(self.num_envs, bool)}

    def _score(self, ends: ndarray, terminations: ndarray) -> None:
        """Scores the episodes that have ended in environments `ends` (k,)."""
        levels = self.curriculum.playing[ends]
        if self.value is not None:
            # Of the last observation only where the episode was truncated.
            known = [self._obs[i][: len(self._rewards[i]) + (not terminations[i])] for i in ends]
            values = self._values(known, levels)
        scores = []
        for k, i in enumerate(ends):
            level = int(levels[k])
            rewards = np.array(self._rewards[i])
            self.curriculum.record_returns([level], [rewards.sum()])
            if self.value is not None:
                scores.append(self._mean_score(level, rewards, values[k]))
            else:
                returns = self._returns.pop(level, [])[-9:] + [float(rewards.sum())]
                self._returns[level] = returns
                scores.append(self.score(np.array(returns)))
        self.curriculum.update_scores(levels, scores)
        while len(self._returns) > 2 * (len(self.curriculum.levels) + self.num_envs):
            del self._returns[next(iter(self._returns))]  # played longest ago

    def _mean_score(self, level: int, rewards: ndarray, values: ndarray) -> float:
        """Over an episode's steps: rewards (steps,), values (steps,), one more if truncated."""
        steps = len(rewards)
        next_values = np.append(values[1:], 0.0)[:steps]  # 0 after a terminal state
        values = values[:steps]
        deltas = rewards + self.gamma * next_values - values
        advantages = np.zeros(steps)
        advantage = 0.0
        for t in reversed(range(steps)):
            advantage = deltas[t] + self.gamma * self.gae_lambda * advantage
            advantages[t] = advantage
        regrets = self.curriculum.best_returns(level) - values
        return float(np.mean(self.score(advantages, deltas, regrets)))

    def _values(self, episodes: list[list], levels: ndarray) -> list[ndarray]:
        """V of the observations of episodes on levels (k,): (steps,) float64 each."""
        space = self.env.single_observation_space
        has_state = hasattr(self.value, "reset")
        values = []
        for sequence in episodes if has_state else [sum(episodes, [])]:
            if has_state:
                self.value.reset()
            for start in range(0, len(sequence), self.batch_size):
                batch = sequence[start : start + self.batch_size]
                obs = concatenate(space, batch, create_empty_array(space, len(batch)))
                values.append(np.asarray(self.value(obs), np.float64))
                message = f"value of {len(batch)} observations has shape {values[-1].shape}"
                require(values[-1].shape == (len(batch),), f"{message}, not ({len(batch)},)")
        ends = np.cumsum([len(episode) for episode in episodes])
        values = np.split(np.concatenate(values), ends[:-1])
        for level, v in zip(levels, values):
            require(np.isfinite(v).all(), f"value is not finite on level {level}")
        return values

    def _check_fit(self) -> None:
        """Refuses an environment if a level does not start the same each time, or all do."""
        sampler = self.curriculum
        levels = sampler.levels if sampler.fixed else np.arange(min(1024, sampler.level_space))
        levels = levels[: max(self.num_envs, 2)]
        unfit = f"{self.env} is not fit for PLR: "
        first = {}
        for shift in (0, 1, 0):  # each level after another one and in another environment
            seeds = np.resize(np.roll(levels, shift), self.num_envs)
            obs, _ = self._call(seeds, self.env.reset, seed=seeds.tolist())
            for level, start in zip(seeds.tolist(), iterate(self.env.observation_space, obs)):
                same = data_equivalence(first.setdefault(level, deepcopy(start)), start, True)
                require(same, f"{unfit}level {level} starts in two ways. Is the seed used?")
        _, start = first.popitem()
        alike = first and all(data_equivalence(start, x, True) for x in first.values())
        require(not alike, f"{unfit}levels start alike. If they differ later on: check=False")

    def _call(self, levels: ndarray, function: Callable, *args: Any, **kwargs: Any) -> Any:
        """Calls the environments' reset or step; RuntimeError that names a worker that has died."""
        try:
            return function(*args, **kwargs)
        except Exception as error:
            workers = getattr(self.env.unwrapped, "processes", [])
            ended = wait([worker.sentinel for worker in workers], timeout=1) if workers else []
            if not ended:
                raise
            i = [worker.sentinel for worker in workers].index(ended[0])
            workers[i].join(1)
            message = f"the worker of environment {i} died (exit code {workers[i].exitcode})"
            for worker in workers:
                worker.kill()
            self.env.unwrapped.closed = True  # close() would wait for the dead
            raise RuntimeError(f"{message} on level {levels[i]}: {error!r}") from error

    def state_dict(self) -> dict:
        """All but the environments' state: after loading, a reset drops what was in progress."""
        own = deepcopy({"over": self._over, "returns": self._returns})
        return {"sampler": self.curriculum.state_dict(), **own}

    def load_state_dict(self, state: dict) -> None:
        self.curriculum.load_state_dict(state["sampler"])
        self._over = np.array(state["over"])
        self._returns = deepcopy(state["returns"])
        self._begun = False


def replace_infos(infos: dict, new: dict, mask: ndarray) -> dict:
    """infos, but of the environments in mask (N,) bool what `new` says; final_... stay."""
    for key in infos.keys() - {"final_obs", "final_info"}:
        if f"_{key}" in infos:
            infos[f"_{key}"] &= ~mask
    for key, value in new.items():
        if isinstance(value, dict):
            infos[key] = replace_infos(infos.get(key, {}), value, mask)
        elif key.startswith("_") and key[1:] in new:
            infos[key] = infos.get(key, False) | value
        elif key in infos:
            infos[key][mask] = value[mask]
        else:
            infos[key] = value
    return infos
