"""PLR in Stable-Baselines3: its PPO on a curriculum of levels. Stable-Baselines3 2.9, Gymnasium, MiniGrid.

    pip install "stable-baselines3==2.9.2" "minigrid==3.2.0"
    PYTHONPATH=. python tests/integrations/sb3_plr.py      # MiniGrid, 8 environments in 8 processes, a few minutes

What to copy: this file and plr_sampler.py, next to each other. Change `make_env`, where the seed of a reset must be its
level, and the settings at the end of the file. PLR: Jiang et al. 2021 (arXiv 2010.03934).

- `LevelStart` wraps each environment, in its worker. Stable-Baselines3's workers reset an environment by themselves in
  the step that ends its episode, before anybody can say which level comes next. The wrapper leaves that reset out.
- `LevelVecEnv` wraps the vector environment, inside any VecNormalize or VecFrameStack. It asks the sampler for the next
  level of each environment that is done and starts it there, in the same step: no level is a step late.
- `PLRCallback` scores levels at the end of each rollout, with the advantages of Stable-Baselines3's own buffer.

Evaluate in other environments (EvalCallback with `make_env` and levels that were not trained on).
"""

from typing import Any

import gymnasium as gym
import minigrid  # noqa: F401  registers the environments
import numpy as np
from minigrid.wrappers import ImgObsWrapper
from plr_sampler import LevelSampler
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv, VecEnvWrapper


def make_env(env_id: str = "MiniGrid-SimpleCrossingS9N1-v0") -> gym.Env:
    """An environment whose reset(seed) decides its level."""
    return gym.wrappers.FlattenObservation(ImgObsWrapper(gym.make(env_id)))


class LevelStart(gym.Wrapper):
    """Starts an episode only when it is told its level: reset(options={"level": level})."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if options and "level" in options:
            return self.env.reset(seed=int(options["level"]))
        return self.last_obs, {}  # the worker's own reset, at the end of an episode

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        self.last_obs, *rest = self.env.step(action)
        return self.last_obs, *rest


def require_as_many(sampler: LevelSampler, envs: VecEnv) -> None:
    if sampler.num_envs != envs.num_envs:
        raise ValueError(f"the sampler has num_envs={sampler.num_envs}, but there are {envs.num_envs} environments")


class LevelVecEnv(VecEnvWrapper):
    """Every episode starts on the sampler's next level. venv: environments wrapped in LevelStart, N of them."""

    def __init__(self, venv: VecEnv, sampler: LevelSampler):
        super().__init__(venv)
        require_as_many(sampler, venv)
        self.sampler = sampler

    def reset(self) -> Any:
        everywhere = np.ones(self.num_envs, bool)
        self.sampler.drop(everywhere)
        self.venv.set_options([{"level": level} for level in self.sampler.next_levels(everywhere).tolist()])
        return self.venv.reset()

    def step_wait(self) -> tuple[Any, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        obs, rewards, dones, infos = self.venv.step_wait()
        levels = self.sampler.next_levels(dones)
        for i in np.flatnonzero(dones).tolist():
            ((start, self.reset_infos[i]),) = self.env_method("reset", options={"level": levels[i]}, indices=i)
            for whole, part in ((obs[key], start[key]) for key in start) if isinstance(obs, dict) else ((obs, start),):
                whole[i] = part
        return obs, rewards, dones, infos


class PLRCallback(BaseCallback):
    """Scores the levels of each rollout (PLR, eq. 2), logs the curriculum."""

    def __init__(self, sampler: LevelSampler):
        super().__init__()
        self.sampler = sampler

    def _init_callback(self) -> None:
        require_as_many(self.sampler, self.training_env)

    def _on_rollout_start(self) -> None:
        self.levels, self.dones, self.playing = [], [], self.sampler.playing.copy()

    def _on_step(self) -> bool:
        # LevelVecEnv has started the next episodes already: this step was played on the levels from before
        self.levels.append(self.playing)
        self.dones.append(self.locals["dones"])
        self.playing = self.sampler.playing.copy()
        return True

    def _on_rollout_end(self) -> None:
        step_scores = np.abs(self.model.rollout_buffer.advantages)  # (T, N): GAE is done, value_l1; or yours
        self.sampler.update(self.levels, step_scores, self.dones)
        for name, value in self.sampler.metrics().items():
            self.logger.record(f"curriculum/{name}", value)


if __name__ == "__main__":
    sampler = LevelSampler(buffer_size=1000, num_envs=8, seed=1, rho=0.1, replay_schedule="fixed", nu=0.5)
    envs = LevelVecEnv(SubprocVecEnv([lambda: LevelStart(Monitor(make_env()))] * sampler.num_envs), sampler)
    model = PPO("MlpPolicy", envs, n_steps=256, batch_size=256, seed=1, device="cpu", verbose=1)
    model.learn(500_000, callback=PLRCallback(sampler))
    model.save("sb3_plr")  # the curriculum's part of a checkpoint: sampler.state_dict()
