"""Plain PPO in CleanRL's order and names, on any Gymnasium environment with flat observations and discrete actions.

It knows nothing of levels. `cleanrl_plr.patch` makes PPO + PLR of it, and shows where those lines go in your script:

    cd tests/integrations
    patch -o cleanrl_ppo_plr.py cleanrl_ppo.py cleanrl_plr.patch     # or, to change the file itself: git apply
    PYTHONPATH=../.. python cleanrl_ppo_plr.py                       # needs gymnasium, torch and plr_sampler.py

The patched script asks of the environment that the seed of a reset decides its level: `tests/test_levels.py` checks it.
"""

from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import nn, optim
from torch.distributions.categorical import Categorical


@dataclass
class Args:
    env_id: str = "combination_locks:CombinationLock-v0"  # a registered environment, or module:Id
    seed: int = 1
    total_timesteps: int = 16_384
    learning_rate: float = 3e-3
    num_envs: int = 8
    num_steps: int = 64
    gamma: float = 0.95
    gae_lambda: float = 0.95
    num_minibatches: int = 4
    update_epochs: int = 8
    clip_coef: float = 0.2
    ent_coef: float = 0.0
    vf_coef: float = 0.5
    max_grad_norm: float = 0.5


class Agent(nn.Module):
    def __init__(self, envs):
        super().__init__()
        inputs, actions = int(np.prod(envs.single_observation_space.shape)), int(envs.single_action_space.n)
        self.critic = nn.Sequential(nn.Linear(inputs, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
        self.actor = nn.Sequential(
            nn.Linear(inputs, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, actions)
        )

    def get_value(self, x):
        return self.critic(x).flatten()

    def get_action_and_value(self, x, action=None):
        probs = Categorical(logits=self.actor(x))
        action = probs.sample() if action is None else action
        return action, probs.log_prob(action), probs.entropy(), self.get_value(x)


args = tyro.cli(Args)
batch_size = args.num_envs * args.num_steps
torch.manual_seed(args.seed)
envs = gym.make_vec(
    args.env_id,
    num_envs=args.num_envs,
    vectorization_mode="sync",
    vector_kwargs={"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP},
)
agent = Agent(envs)
optimizer = optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5)

# storage
obs = torch.zeros((args.num_steps, args.num_envs) + envs.single_observation_space.shape)
actions, logprobs, rewards, dones, values = torch.zeros((5, args.num_steps, args.num_envs))

global_step = 0
next_obs, _ = envs.reset(seed=args.seed)
next_obs, next_done = torch.tensor(next_obs), torch.zeros(args.num_envs)

for iteration in range(1, args.total_timesteps // batch_size + 1):
    for step in range(args.num_steps):
        global_step += args.num_envs
        obs[step] = next_obs
        dones[step] = next_done
        with torch.no_grad():
            action, logprobs[step], _, values[step] = agent.get_action_and_value(next_obs)
        actions[step] = action
        next_obs, reward, terminations, truncations, infos = envs.step(action.numpy())
        next_done = np.logical_or(terminations, truncations)
        rewards[step] = torch.tensor(reward)
        next_obs, next_done = torch.tensor(next_obs), torch.tensor(next_done).float()

    # advantages (GAE)
    with torch.no_grad():
        next_value = agent.get_value(next_obs)
        advantages, lastgaelam = torch.zeros_like(rewards), 0
        for t in reversed(range(args.num_steps)):
            last = t == args.num_steps - 1
            nextnonterminal = 1.0 - (next_done if last else dones[t + 1])
            nextvalues = next_value if last else values[t + 1]
            delta = rewards[t] + args.gamma * nextvalues * nextnonterminal - values[t]
            advantages[t] = lastgaelam = delta + args.gamma * args.gae_lambda * nextnonterminal * lastgaelam
        returns = advantages + values

    # update
    b_obs = obs.reshape((-1,) + envs.single_observation_space.shape)
    b_logprobs, b_actions, b_advantages, b_returns = (x.reshape(-1) for x in (logprobs, actions, advantages, returns))
    for _epoch in range(args.update_epochs):
        for mb_inds in torch.randperm(batch_size).chunk(args.num_minibatches):
            _, newlogprob, entropy, newvalue = agent.get_action_and_value(b_obs[mb_inds], b_actions[mb_inds])
            ratio = (newlogprob - b_logprobs[mb_inds]).exp()
            mb_advantages = b_advantages[mb_inds]
            mb_advantages = (mb_advantages - mb_advantages.mean()) / (mb_advantages.std() + 1e-8)
            pg_loss1 = -mb_advantages * ratio
            pg_loss2 = -mb_advantages * ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
            pg_loss = torch.max(pg_loss1, pg_loss2).mean()
            v_loss = 0.5 * ((newvalue - b_returns[mb_inds]) ** 2).mean()
            loss = pg_loss - args.ent_coef * entropy.mean() + args.vf_coef * v_loss
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
            optimizer.step()

    print(f"step {global_step}: {rewards.sum() / dones.sum().clamp(min=1):.2f} per episode")

envs.close()
