"""CombinationLock-v0: a toy in which some levels are learned soon and others hardly ever. Tests train on it in seconds.

The seed of a reset is the level, a lock of two to six digits, to be dialled one per step. A right digit gives 1, a
wrong one ends the episode. Half of the locks show the next digit; the others show nothing but their own code.
"""

import gymnasium as gym
import numpy as np


class CombinationLock(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (18,), np.float32)  # left to dial: 6, next digit: 4, code: 8
    action_space = gym.spaces.Discrete(4)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.digits = self.np_random.integers(4, size=self.np_random.integers(2, 7)).tolist()
        self.shown, self.code = self.np_random.random() < 0.5, self.np_random.choice([-1, 1], size=8)
        return self.look(), {}

    def step(self, action):
        right = int(action) == self.digits.pop(0)
        return self.look(), float(right), not (right and self.digits), False, {"opened": right and not self.digits}

    def look(self):
        left, digit = np.zeros(6), np.zeros(4)
        left[: len(self.digits)] = 1
        digit[self.digits[:1]] = self.shown
        return np.concatenate((left, digit, self.code)).astype(np.float32)


gym.register("CombinationLock-v0", CombinationLock)
