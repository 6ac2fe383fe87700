"""Five environments that PLR cannot be used on, for test_levels.py to find out."""

import gymnasium as gym
import numpy as np


class Counter(gym.Env):
    """Ten steps; the observation is a number drawn at the reset."""

    observation_space = gym.spaces.Box(0, 1, (1,), np.float64)
    action_space = gym.spaces.Discrete(2)
    episodes = 0

    def draw(self, seed):
        return np.random.default_rng(seed).random(1)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.number, self.t = self.draw(seed), 0
        self.episodes += 1
        return self.number, {}

    def step(self, action):
        self.t += 1
        return self.number, self.reward(), self.t == 10, False, {}

    def reward(self):
        return 0.0


class Leaky(Counter):
    """From step 2 on, the reward knows how many episodes came before."""

    def reward(self):
        return float(self.t >= 2 and self.episodes > 1)


class Deaf(Counter):
    """One and the same level, whatever the seed."""

    def draw(self, seed):
        return np.zeros(1)


class Alike(Deaf):
    """One and the same level too, but what is done shows."""

    def step(self, action):
        self.number = self.number + action / 16
        return super().step(action)


class Unseeded(Counter):
    """Another level each time, whatever the seed."""

    def draw(self, seed):
        return np.random.default_rng().random(1)


class Hashed(Counter):
    """Python salts the hash of a text in each process."""

    def draw(self, seed):
        return np.random.default_rng(hash(f"level {seed}") % 2**32).random(1)


for unfit in (Leaky, Deaf, Alike, Unseeded, Hashed):
    gym.register(f"{unfit.__name__}-v0", unfit)
