"""PLR on cleanrl_ppo.py as it is: whatever vector environment it makes becomes a PLRVectorEnv.

    cd tests/integrations
    PYTHONPATH=../.. python cleanrl_unchanged.py     # takes cleanrl_ppo.py's flags

The evaluator is the script's own critic, asked once more; the last line says what that costs. In a
script that you may change, these are the two lines after its envs:

    sampler = LevelSampler(buffer_size=4000, num_envs=args.num_envs, seed=args.seed)
    envs = PLRVectorEnv(envs, sampler, value, gamma=args.gamma, gae_lambda=args.gae_lambda)
"""

import importlib.util
import time
from pathlib import Path

import gymnasium as gym
import torch
from plr_sampler import LevelSampler

from plr_vector_env import PLRVectorEnv

SETTINGS = {"buffer_size": 4000, "replay_schedule": "fixed", "rho": 0.0, "nu": 0.5}

spec = importlib.util.spec_from_file_location("cleanrl_ppo", Path(__file__).parent / "cleanrl_ppo.py")
script = importlib.util.module_from_spec(spec)
seconds = 0.0  # that the evaluator took


def value(obs):
    """(n, ...) -> (n,): the critic as it is now."""
    global seconds
    start = time.process_time()
    with torch.no_grad():
        values = script.agent.get_value(torch.as_tensor(obs))
    seconds += time.process_time() - start
    return values


def make_vec(*args, **kwargs):
    envs = gymnasium_make_vec(*args, **kwargs)
    sampler = LevelSampler(num_envs=envs.num_envs, seed=script.args.seed, **SETTINGS)
    settings = {"gamma": script.args.gamma, "gae_lambda": script.args.gae_lambda}
    return PLRVectorEnv(envs, sampler, value, **settings)


gymnasium_make_vec = gym.make_vec
gym.make_vec = make_vec
start = time.process_time()
try:
    spec.loader.exec_module(script)
finally:
    gym.make_vec = gymnasium_make_vec
total = time.process_time() - start
agent = script.agent
sampler = script.envs.curriculum
print(sampler.metrics())
print(f"the second evaluation: {seconds:.2f} of {total:.2f} s of processor time")
