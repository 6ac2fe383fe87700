"""PPO + Prioritized Level Replay (PLR) on Procgen, in one file.

    python ppo_plr_procgen.py --env-id bigfish                       # PLR, the paper's settings
    python ppo_plr_procgen.py --env-id bigfish --curriculum uniform  # baseline: levels at random
    python ppo_plr_procgen.py --env-id bigfish --score gae           # another score of a level
    python ppo_plr_procgen.py --env-id bigfish --augment ucb         # UCB-DrAC + PLR
    python ppo_plr_procgen.py --resume runs/RUN                      # from the last checkpoint on
    torchrun --nproc-per-node 8 ppo_plr_procgen.py --env-id bigfish  # several GPUs, one curriculum
    python ppo_plr_procgen.py --evaluate runs/RUN --eval-episodes 1000 --capture-video

PLR: Jiang, Grefenstette, Rocktaeschel, "Prioritized Level Replay", 2021 (arXiv 2010.03934).
PPO and the names in this file: CleanRL's ppo_procgen.py. Network: IMPALA (arXiv 1802.01561).
UCB-DrAC: Raileanu et al., "Automatic Data Augmentation for Generalization in Reinforcement
Learning", 2021 (arXiv 2006.12862).

To train on another environment, read Args, Agent, train() and make_envs(); what stands below the
banner "machinery" can stay as it is. Procgen ends an episode at its time limit and shows neither
that it did nor the last observation: as in the paper, a timeout is a terminal state here.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the rest is imported is no error

import contextlib
import copy
import ctypes
import datetime
import errno
import fcntl
import functools
import importlib.util
import io
import json
import math
import os
import re
import shlex
import struct
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import tyro
from gymnasium.vector.utils import create_empty_array
from PIL import Image
from torch import Tensor, nn, optim
from torch.distributions.categorical import Categorical
from torch.utils.data import default_convert
from torch.utils.tensorboard import SummaryWriter

from plr_sampler import LevelSampler

GAMES = (
    "bigfish", "bossfight", "caveflyer", "chaser", "climber", "coinrun", "dodgeball", "fruitbot",
    "heist", "jumper", "leaper", "maze", "miner", "ninja", "plunder", "starpilot",
)  # fmt: skip
GAMES_WITH_MODE = {
    "easy": GAMES,
    "hard": GAMES,
    "extreme": ("chaser", "dodgeball", "leaper", "starpilot"),
    "memory": ("caveflyer", "dodgeball", "heist", "jumper", "maze", "miner"),
}
OWN_ENVS = ()  # a fork's names of what its make_envs makes: more values of --env-id
SCORES = (
    "value_l1", "gae", "positive_value_loss", "one_step_td_error",
    "policy_entropy", "least_confidence", "min_margin", "max_mc", "learnability",
)  # fmt: skip
# levels below are for training, from here to 2**31 - 1 for testing: no run trains on those
FIRST_TEST_LEVEL = 2**30


@dataclass
class Args:
    # Experiment
    exp_name: str = os.path.basename(__file__)[: -len(".py")]  # part of the default run_dir's name
    seed: int = 1  # decides everything random; evaluation has random streams of its own
    torch_deterministic: bool = True  # choose deterministic kernels; the CPU's always are
    cuda: bool = True  # train on the GPU if there is one
    track: bool = False  # log to Weights and Biases too: WANDB_PROJECT, WANDB_ENTITY name where
    run_dir: str | None = None  # default: runs/{env_id}__{exp_name}__{seed}__{time}
    checkpoint_interval: int = 10  # iterations between checkpoints (0: at the start and the end)
    resume: str | None = None  # go on with the run in this directory; --total-timesteps may grow

    # Environment
    env_id: str = "starpilot"  # one of the 16 Procgen games
    distribution_mode: Literal["easy", "hard", "extreme", "memory"] = "easy"  # the difficulty
    num_levels: int = 200  # size of the training set of levels (0: no bound, uniform or sequential)
    start_level: int = 0  # the first training level
    use_backgrounds: bool = True  # False: black in place of pictures behind the game
    restrict_themes: bool = False  # one look of everything, where a game has several
    center_agent: bool = True  # False: the whole level is in view
    env_threads: int = 0  # Procgen's worker threads (0: one per core); results do not depend on it

    # PPO (PLR paper, Table 3)
    total_timesteps: int = 25_000_000  # environment steps of the run, in full iterations
    learning_rate: float = 5e-4  # of Adam
    num_envs: int = 64  # environments played side by side, on all GPUs together
    num_steps: int = 256  # steps of each environment per rollout
    anneal_lr: bool = False  # let the learning rate fall linearly to 0
    gamma: float = 0.999  # discount
    gae_lambda: float = 0.95  # lambda of the generalized advantage estimation
    num_minibatches: int = 8  # minibatches per epoch
    update_epochs: int = 3  # epochs per rollout
    clip_coef: float = 0.2  # clip range of the policy ratio and of the value
    ent_coef: float = 0.01  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # bound on the norm of the gradient
    target_kl: float | None = None  # end an iteration's epochs once approx_kl exceeds this
    reward_norm_gamma: float = 0.99  # discount of the return that scales rewards; CleanRL: 0.999
    # impoola: one number per channel goes on, which generalises better where the agent is not in
    # the centre; a sixth of the parameters
    encoder: Literal["impala", "impoola"] = "impala"
    # DrAC: the policy and the value shall be the same on augmented images. crop: the best single
    # one in most games; ucb: a bandit chooses among eight. Updates take about twice as long.
    augment: Literal["none", "crop", "ucb"] = "none"

    # PLR
    curriculum: Literal["plr", "uniform", "sequential"] = "plr"  # which level is next
    # estimate of a level's learning potential; the formulas stand at LEVEL SCORES in train()
    score: Literal[SCORES] = "value_l1"
    score_transform: Literal["constant", "max", "eps_greedy", "rank", "power", "softmax"] = "rank"
    temperature: float = 0.1  # of the transform (the paper's beta): lower is greedier
    staleness_coef: float = 0.1  # share of replay by staleness (the paper's rho)
    # P(replay), from rho on until all levels are seen: proportionate: the share of levels seen;
    # fixed: 1 - nu
    replay_schedule: Literal["proportionate", "fixed"] = "proportionate"
    rho: float = 1.0  # share of levels seen before any replay: 1 as released, 0 as in the paper
    nu: float = 0.5  # with the fixed schedule: probability of a new level while there are any
    alpha: float = 1.0  # weight of a new score in a level's running mean (1: the last one counts)
    stitch_episodes: bool = False  # score an episode across rollouts as a whole (Algorithm 4)

    # Evaluation
    eval_interval: int = 50  # iterations between evaluations (0: only at the end)
    eval_episodes: int = 100  # on training levels, and as many on levels never trained on
    capture_video: bool = False  # write a GIF of a test episode at each evaluation
    evaluate: str | None = None  # only evaluate the run in this directory, with its flags

    # Speed
    # bf16: about twice as fast on CPUs with AMX or AVX512-BF16, slower on others
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    compile: bool = False  # torch.compile acting and the loss: a minute at the start, then faster
    cuda_graphs: bool = True  # on a GPU: launch recorded work at once; off to debug
    profile: bool = False  # print the phases' shares of time; trace the last iteration
    batch_size: int = field(init=False)
    minibatch_size: int = field(init=False)
    num_iterations: int = field(init=False)

    def __post_init__(self):
        self.batch_size = self.num_envs * self.num_steps
        self.minibatch_size = self.batch_size // max(self.num_minibatches, 1)
        self.num_iterations = self.total_timesteps // max(self.batch_size, 1)


class ResidualBlock(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv0 = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.conv1 = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv1(torch.relu(self.conv0(torch.relu(x))))


class InputConv2d(nn.Conv2d):
    """A convolution of an image's few channels. A GPU's tensor cores want eight: the others are 0,
    which changes nothing but the time."""

    def forward(self, x: Tensor) -> Tensor:
        if self.in_channels % 8 == 0 or not x.is_cuda:
            return super().forward(x)
        missing = (0, 0, 0, 0, 0, -self.in_channels % 8)  # after the last channel
        x = nn.functional.pad(x, missing)
        weight = nn.functional.pad(self.weight, missing)
        return nn.functional.conv2d(x, weight, self.bias, padding=self.padding)


class ConvSequence(nn.Sequential):
    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(
            InputConv2d(in_channels, out_channels, kernel_size=3, padding=1),
            nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
            ResidualBlock(out_channels),
            ResidualBlock(out_channels),
        )


class Agent(nn.Module):
    """The IMPALA network with a policy and a value head."""

    def __init__(
        self,
        envs: gym.vector.VectorEnv,
        precision: str = "fp32",
        encoder: str = "impala",
    ):
        super().__init__()
        h, w, c = envs.single_observation_space.shape
        self.bf16 = precision == "bf16"
        self.num_actions = int(envs.single_action_space.n)
        if encoder == "impoola":  # Trumpp et al. 2025 (arXiv 2503.05546): global average pooling
            features = (nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            num_features = 32
        else:
            features = (nn.Flatten(), nn.ReLU())
            num_features = 32 * math.ceil(h / 8) * math.ceil(w / 8)
        network = nn.Sequential(
            ConvSequence(c, 16),
            ConvSequence(16, 32),
            ConvSequence(32, 32),
            *features,
            nn.Linear(num_features, 256),
            nn.ReLU(),
        )
        self.network = network.to(memory_format=torch.channels_last)
        self.actor = nn.Linear(256, self.num_actions)
        self.critic = nn.Linear(256, 1)
        for layer, std in ((self.actor, 0.01), (self.critic, 1.0)):
            nn.init.orthogonal_(layer.weight, std)
            nn.init.constant_(layer.bias, 0.0)

    def hidden(self, x: Tensor) -> Tensor:
        """(B, 64, 64, 3), 0 to 255 -> (B, 256) float32. The heads after it are always float32."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            # "bhwc" -> "bchw", which leaves the pixels in channels_last memory
            return self.network(x.permute(0, 3, 1, 2) / 255.0).float()

    def get_value(self, x: Tensor) -> Tensor:
        return self.critic(self.hidden(x)).flatten()

    def get_action_and_value(
        self,
        x: Tensor,
        action: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x (B, 64, 64, 3), 0 to 255; noise (B, actions) of Exp(1) decides the actions if given.

        Returns action, its log-probability, entropy and value, each (B,), and the normalised
        logits (B, actions).
        """
        hidden = self.hidden(x)
        probs = Categorical(logits=self.actor(hidden), validate_args=False)
        if action is None and noise is None:
            action = probs.sample()
        elif action is None:
            # Exponential race (Gumbel-max without logarithms): argmax p / E is a sample of p
            action = (probs.probs / noise).argmax(-1)
        value = self.critic(hidden).flatten()
        return action, probs.log_prob(action), probs.entropy(), value, probs.logits

    def acting_copy(self) -> "Agent":
        """To act with, without gradients: bf16 weights are cast when they are loaded, once per
        rollout, not at every step."""
        acting = copy.deepcopy(self).requires_grad_(False)
        if self.bf16:
            acting.network.bfloat16()
        return acting


def make_agent(envs: gym.vector.VectorEnv, args: Args) -> Agent:
    return Agent(envs, args.precision, args.encoder)


def ppo_loss(
    agent: Agent,
    args: Args,
    mb_obs: Tensor,
    mb_actions: Tensor,
    mb_logprobs: Tensor,
    mb_advantages: Tensor,
    mb_returns: Tensor,
    mb_values: Tensor,
    mb_augmented: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's loss of a minibatch, or of this process's part of it: mb_obs (B, 64, 64, 3), the
    others (B,), the advantages normalised. With mb_augmented, the same images augmented, DrAC's.
    Returns the loss, and what is logged of it."""
    _, newlogprob, entropy, newvalue, logits = agent.get_action_and_value(mb_obs, mb_actions)
    logratio = newlogprob - mb_logprobs
    ratio = logratio.exp()

    with torch.no_grad():
        # calculate approx_kl http://joschu.net/blog/kl-approx.html
        old_approx_kl = mean(-logratio, args)
        approx_kl = mean((ratio - 1) - logratio, args)
        clipfrac = mean(((ratio - 1.0).abs() > args.clip_coef).float(), args)

    # Policy loss
    pg_loss1 = -mb_advantages * ratio
    pg_loss2 = -mb_advantages * torch.clamp(ratio, 1 - args.clip_coef, 1 + args.clip_coef)
    pg_loss = mean(torch.max(pg_loss1, pg_loss2), args)

    # Value loss
    v_loss_unclipped = (newvalue - mb_returns) ** 2
    v_clipped = mb_values + torch.clamp(newvalue - mb_values, -args.clip_coef, args.clip_coef)
    v_loss_clipped = (v_clipped - mb_returns) ** 2
    v_loss = 0.5 * mean(torch.max(v_loss_unclipped, v_loss_clipped), args)

    entropy_loss = mean(entropy, args)
    loss = pg_loss - args.ent_coef * entropy_loss + v_loss * args.vf_coef
    parts = {
        "value_loss": v_loss.detach(),
        "policy_loss": pg_loss.detach(),
        "entropy": entropy_loss.detach(),
        "old_approx_kl": old_approx_kl,
        "approx_kl": approx_kl,
        "clipfrac": clipfrac,
    }
    if mb_augmented is not None:
        clean = (logits.detach(), newvalue.detach())
        g_pi, g_v = drac_terms(agent, args, mb_augmented, mb_actions, *clean)
        loss = loss + DRAC_COEF * (g_pi + g_v)  # J_DrAC = J_PPO - alpha_r (G_pi + G_V)
        parts |= {"augmented_kl": g_pi.detach(), "augmented_value_loss": g_v.detach()}
    return loss, parts


def drac_terms(
    agent: Agent,
    args: Args,
    mb_augmented: Tensor,
    mb_actions: Tensor,
    logits: Tensor,
    values: Tensor,
) -> tuple[Tensor, Tensor]:
    """DrAC's G_pi and G_V: how far the policy and the value on augmented images (B, 64, 64, 3) are
    from those on the clean ones: logits (B, actions), normalised, and values (B,), both constants.

    G_pi is the exact KL(clean || augmented); the authors' code has one sample of its cross entropy.
    As there, G_V is halved and vf_coef does not count for it.
    """
    _, _, _, newvalue, newlogits = agent.get_action_and_value(mb_augmented, mb_actions)
    g_pi = mean((logits.exp() * (logits - newlogits)).sum(-1), args)
    g_v = 0.5 * mean((newvalue - values) ** 2, args)
    return g_pi, g_v


def train(args: Args, run: "Run") -> None:
    # ---- setup: T steps of N environments, n of them in this process (all without torchrun) ----
    device = run.device
    phase = run.profile.phase
    T = args.num_steps
    N = args.num_envs
    n = N // WORLD
    own = slice(RANK * n, (RANK + 1) * n)
    torch.manual_seed(args.seed)  # network, actions, minibatches
    envs = make_envs(args, n, device)
    agent = make_agent(envs, args).to(device)
    acting = agent.acting_copy()
    decide = maybe_compile(acting.get_action_and_value, args)
    loss_of = maybe_compile(ppo_loss, args)
    optimizer = make_optimizer(agent, args, device)
    sampler = make_sampler(args)
    episodes = EpisodeStatistics(N, args.reward_norm_gamma)

    # ---- storage on the device: this process's environments ----
    next_obs = torch.from_numpy(create_empty_array(envs.single_observation_space, n)).to(device)
    obs = next_obs.new_zeros((T, *next_obs.shape))  # of the same dtype
    actions = torch.zeros((T, n), dtype=torch.int64, device=device)
    logprobs = torch.zeros((T, n), device=device)
    logits = torch.zeros((T, n, agent.num_actions), device=device)  # normalised: log-probabilities
    values = torch.zeros((T + 1, n), device=device)  # values[T]: of what follows the rollout
    noise = torch.zeros((N, agent.num_actions), device=device)  # the same in every process
    step_on_device = torch.zeros(1, dtype=torch.int64, device=device)
    b_targets = torch.zeros((3, T * N), device=device)  # advantages, returns, values, of all
    losses = torch.zeros(len(loss_names(args)), device=device)  # summed over the minibatches

    # ---- storage on the CPU: all environments ----
    rewards = np.zeros((T, N), np.float32)
    dones = np.zeros((T, N), bool)  # dones[t], set before step t: obs[t] begins an episode
    levels = np.zeros((T, N), np.int64)  # levels[t]: the level that obs[t] belongs to
    run.storage = {"obs": obs, "actions": actions, "logprobs": logprobs, "values": values}
    run.storage |= {"rewards": rewards, "levels": levels}

    @functools.partial(CudaGraph, enabled=run.graphs)
    def act() -> None:
        """A step of the policy: what it decides for next_obs, and why, goes into the storage."""
        noise.exponential_()
        action, logprob, _, value, logit = decide(next_obs, noise=noise[own])
        decided = ((actions, action), (logprobs, logprob), (logits, logit), (values, value))
        for storage, x in ((obs, next_obs), *decided):
            storage.index_copy_(0, step_on_device, x[None])
        step_on_device.add_(1)

    b_obs = obs.flatten(0, 1)
    b_actions = actions.view(-1)
    b_logprobs = logprobs.view(-1)

    @functools.partial(CudaGraph, enabled=run.graphs and WORLD == 1)  # without communication
    @deterministic_gradients(args)
    def learn(mb_inds: Tensor, *mb_augmented: Tensor) -> Tensor:
        """A step of the optimizer, from the minibatch at mb_inds of the T * N steps; approx_kl."""
        mb_advantages, mb_returns, mb_values = b_targets[:, mb_inds]
        mb_advantages = (mb_advantages - mb_advantages.mean()) / (mb_advantages.std() + 1e-8)
        mine, own_inds = part_of_minibatch(mb_inds, N)
        minibatch = (b_obs[own_inds], b_actions[own_inds], b_logprobs[own_inds])
        targets = (mb_advantages[mine], mb_returns[mine], mb_values[mine])
        loss, parts = loss_of(agent, args, *minibatch, *targets, *mb_augmented)
        optimizer.zero_grad()
        loss.backward()
        all_reduce_gradients(agent)
        grad_norm = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
        optimizer.step()
        parts["grad_norm"] = grad_norm / WORLD
        losses.add_(torch.stack([parts[name] for name in loss_names(args)]))
        return parts["approx_kl"]

    # ---- start the environments, or go on where the checkpoint is ----
    run.parts = {"agent": agent, "optimizer": optimizer, "sampler": sampler, "episodes": episodes}
    run.parts |= make_bandit(args)
    observation = run.restore(envs, own)
    if observation is None:
        observation = start_episodes(run, envs, sampler, own)
    next_obs.copy_(torch.from_numpy(observation))
    next_done = episodes.sums["length"] == 0  # (N,) bool
    next_levels = sampler.playing.copy()  # (N,) int64

    for iteration in run.iterations(envs):
        if args.anneal_lr:
            frac = 1.0 - (iteration - 1.0) / args.num_iterations
            optimizer.param_groups[0]["lr"].fill_(frac * args.learning_rate)

        # ---- rollout ----
        acting.load_state_dict(agent.state_dict())
        step_on_device.zero_()
        for step in range(0, args.num_steps):
            phase("inference")
            dones[step] = next_done
            levels[step] = next_levels
            act()
            phase("transfer")
            action = actions[step].cpu().numpy()
            phase("environment")
            observation, reward, terminations, truncations, _ = envs.step(action)
            phase("rest")
            rewards[step], next_done = gather_numpy(reward, terminations | truncations)
            if next_done.any():  # PLR, Algorithm 1: sample the next levels
                phase("sampler")
                next_levels = sampler.next_levels(next_done)
            if next_done[own].any():  # Gymnasium refuses a reset of none
                phase("environment")
                options = {"reset_mask": next_done[own]}
                observation, _ = envs.reset(seed=next_levels[own].tolist(), options=options)
            phase("transfer")
            next_obs.copy_(torch.from_numpy(observation), non_blocking=True)

        # ---- advantages (GAE), of all environments ----
        phase("rest")
        ended = np.concatenate((dones[1:], next_done[None]))  # (T, N): step t ended its episode
        scaled_rewards, finished = episodes.add(rewards, ended)
        sampler.record_returns(levels[ended], finished["scaled_return"])  # for two scores
        # bootstrap value if not done
        values[T] = acting.get_value(next_obs)
        nextvalues = to_numpy(values[1:])
        b_values = to_numpy(values[:-1])
        nextnonterminal = 1.0 - ended.astype(np.float32)
        deltas = scaled_rewards + args.gamma * nextvalues * nextnonterminal - b_values
        advantages = np.zeros_like(deltas)
        lastgaelam = np.zeros(N, np.float32)
        for t in reversed(range(args.num_steps)):
            lastgaelam = deltas[t] + args.gamma * args.gae_lambda * nextnonterminal[t] * lastgaelam
            advantages[t] = lastgaelam
        returns = advantages + b_values
        run.require_finite("an advantage", advantages)

        # ---- LEVEL SCORES (PLR, eq. 2): how much is there still to learn on each level? ----
        # step_scores (T, N): the sampler averages them over each episode. Yours is one more line.
        if args.score == "value_l1":
            step_scores = np.abs(advantages)
        elif args.score == "gae":
            step_scores = advantages
        elif args.score == "positive_value_loss":
            step_scores = advantages.clip(min=0)
        elif args.score == "one_step_td_error":
            step_scores = np.abs(deltas)
        elif args.score == "policy_entropy":
            step_scores = to_numpy(-(logits.exp() * logits).sum(-1) / math.log(agent.num_actions))
        elif args.score == "least_confidence":
            step_scores = to_numpy(1 - logits.exp().amax(-1))
        elif args.score == "min_margin":
            step_scores = to_numpy(1 + logits.exp().topk(2).values.diff(dim=-1).squeeze(-1))
        elif args.score == "max_mc":  # Robust PLR: best return so far, scaled as it was then, - V
            step_scores = sampler.best_returns(levels).astype(np.float32) - b_values
        elif args.score == "learnability":  # p (1 - p), were the returns 0 and 1
            step_scores = sampler.return_variance(levels)
        phase("sampler")
        sampler.update(levels, step_scores, ended)

        # ---- update (PPO) ----
        phase("update")
        b_targets.copy_(torch.from_numpy(np.stack((advantages, returns, b_values))).flatten(1))
        losses.zero_()
        augmentation = choose_augmentation(run, returns)
        updates = 0
        for epoch in range(args.update_epochs):
            for mb_inds in torch.randperm(T * N, device=device).split(args.minibatch_size):
                approx_kl = learn(mb_inds, *augmented(augmentation, b_obs, mb_inds, N))
                updates += 1
            if args.target_kl is not None and gather(approx_kl[None]).sum() > args.target_kl:
                break

        # ---- log, evaluate, save ----
        run.log_iteration(log_row(run, losses, updates, finished, sampler, returns, b_values))
        if run.evaluation_due():
            run.log_evaluation(evaluate(agent, args, device, run.video()))
        run.end_iteration(envs)
    run.finish(envs, lambda: evaluate(agent, args, device))


# ---- curriculum, episodes, log -------------------------------------------------------------------


def make_sampler(args: Args) -> LevelSampler:
    levels = range(args.start_level, args.start_level + args.num_levels)
    return LevelSampler(
        levels if args.num_levels else None,
        num_envs=args.num_envs,
        seed=args.seed,
        level_space=FIRST_TEST_LEVEL,
        curriculum=args.curriculum,
        score_transform=args.score_transform,
        temperature=args.temperature,
        staleness_coef=args.staleness_coef,
        replay_schedule=args.replay_schedule,
        rho=args.rho,
        nu=args.nu,
        alpha=args.alpha,
        stitch_episodes=args.stitch_episodes,
    )


def start_episodes(
    run: "Run", envs: gym.vector.VectorEnv, sampler: LevelSampler, own: slice
) -> np.ndarray:
    """Everywhere; returns the observations."""
    everywhere = np.ones(sampler.num_envs, bool)
    if run.checkpoint:
        say(
            f"its environments were not saved: {len(everywhere)} episodes are dropped, others start"
        )
    sampler.drop(everywhere)
    run.parts["episodes"].drop()
    observation, _ = envs.reset(seed=sampler.next_levels(everywhere)[own].tolist())
    return observation


class EpisodeStatistics:
    """Returns and lengths of the N episodes in progress, and the scale of the rewards.

    Rewards are divided by the running standard deviation of the discounted return, not centred,
    and clipped to +-10. CleanRL has the wrappers RecordEpisodeStatistics and NormalizeReward for
    this; here it is done after the rollout, for all its steps.
    """

    def __init__(self, num_envs: int, gamma: float):
        self.gamma = gamma
        self.rms = gym.wrappers.utils.RunningMeanStd()  # of the discounted return
        self.sums = {
            "return": np.zeros(num_envs),
            "length": np.zeros(num_envs),
            "discounted_return": np.zeros(num_envs),
            "scaled_return": np.zeros(num_envs),
        }

    def add(self, rewards: np.ndarray, ended: np.ndarray) -> tuple[np.ndarray, dict]:
        """rewards (T, N) float32, ended (T, N) bool -> scaled rewards (T, N) float32, and of the
        episodes that ended, in order of time and environment: return, length, scaled_return."""
        returns = self._sum("return", rewards, ended)
        lengths = self._sum("length", np.ones_like(rewards), ended)
        discounted = self._sum("discounted_return", rewards, ended, self.gamma)
        scale = np.zeros((len(rewards), 1), np.float32)
        for t, (mean, var) in enumerate(zip(discounted.mean(axis=1), discounted.var(axis=1))):
            self.rms.update_from_moments(mean, var, rewards.shape[1])
            scale[t] = np.sqrt(self.rms.var + 1e-8)
        scaled = np.clip(rewards / scale, -10, 10)
        scaled_returns = self._sum("scaled_return", scaled, ended)
        finished = {
            "return": returns[ended],
            "length": lengths[ended],
            "scaled_return": scaled_returns[ended],
        }
        return scaled, finished

    def _sum(self, name: str, x: np.ndarray, ended: np.ndarray, decay: float = 1.0) -> np.ndarray:
        sums, self.sums[name] = running_sums(self.sums[name], x, ended, decay)
        return sums

    def drop(self) -> None:
        """Abandons the episodes in progress; the scale of the rewards stays."""
        self.sums = {name: np.zeros_like(sums) for name, sums in self.sums.items()}

    def state_dict(self) -> dict[str, Any]:
        rms = [float(x) for x in (self.rms.mean, self.rms.var, self.rms.count)]
        return {"sums": self.sums, "rms": rms}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums = {name: np.asarray(x) for name, x in state["sums"].items()}
        self.rms.mean, self.rms.var, self.rms.count = state["rms"]


def part_of_minibatch(mb_inds: Tensor, N: int) -> tuple[Any, Tensor]:
    """Which of the samples t * N + env are of this process's environments, and where these are in
    its own storage (T * n,). All of them, where they are, without torchrun."""
    if WORLD == 1:
        return slice(None), mb_inds
    n = N // WORLD
    t = mb_inds // N
    env = mb_inds % N
    mine = env // n == RANK
    return mine, (t * n + env % n)[mine]


def describe(args: Args) -> str:
    levels = args.num_levels or "unbounded"
    mode = "" if args.env_id in OWN_ENVS else f" ({args.distribution_mode})"
    encoder = "" if args.encoder == "impala" else f", {args.encoder}"
    augment = "" if args.augment == "none" else f", augment {args.augment}"
    return f"{args.env_id}{mode}, {levels} levels, {args.curriculum}{encoder}{augment}"


def loss_names(args: Args) -> tuple[str, ...]:
    return LOSSES if args.augment == "none" else (*LOSSES, "augmented_kl", "augmented_value_loss")


def log_row(
    run: "Run",
    losses: Tensor,
    updates: int,
    finished: dict[str, np.ndarray],
    sampler: LevelSampler,
    returns: np.ndarray,
    values: np.ndarray,
) -> dict[str, float]:
    """A row of progress.csv, whose columns lack the group ("charts/"); nan: nothing to measure."""
    means = run.mean_losses(losses, updates, loss_names(run.args))
    bandit = run.parts["bandit"].metrics() if "bandit" in run.parts else {}
    return {
        # of the episodes that ended in this iteration: mean raw return, mean length, how many
        "charts/episodic_return": mean_or_nan(finished["return"]),
        "charts/episodic_length": mean_or_nan(finished["length"]),
        "charts/episodes": len(finished["return"]),
        "charts/learning_rate": float(run.parts["optimizer"].param_groups[0]["lr"]),
        # value_loss, policy_loss, entropy, grad_norm (before clipping), old_approx_kl, approx_kl,
        # clipfrac (share of samples beyond the clip range): means over the minibatches
        # with --augment: augmented_kl, augmented_value_loss, DrAC's terms before its coefficient
        **{f"losses/{name}": x for name, x in means.items()},
        # of the returns by the values; 1 is perfect
        "losses/explained_variance": explained_variance(values, returns),
        # see LevelSampler.metrics
        **{f"curriculum/{name}": x for name, x in sampler.metrics().items()},
        # with --augment ucb, see AugmentationBandit.metrics
        **{f"augmentation/{name}": x for name, x in bandit.items()},
    }


# ---- data augmentation (DrAC, UCB-DrAC) ----------------------------------------------------------

DRAC_COEF = 0.1  # alpha_r


class Draws:
    """Random parameters of an augmentation, one for each image of a minibatch: drawn for all of it,
    so that any number of processes gives the same run, and returned for the images at `mine`."""

    def __init__(self, num_images: int, mine: Any, device: torch.device):
        self.num_images = num_images
        self.mine = mine
        self.device = device

    def uniform(self, low: float, high: float) -> Tensor:
        """(B,) float32 in [low, high)."""
        x = torch.empty(self.num_images, device=self.device)
        return x.uniform_(low, high)[self.mine]

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """(B, *shape) int64 from low to high, both included."""
        size = (self.num_images, *shape)
        return torch.randint(low, high + 1, size, device=self.device)[self.mine]

    def normal(self, std: float, *shape: int) -> Tensor:
        """(B, *shape) float32."""
        x = torch.empty(self.num_images, *shape, device=self.device)
        return x.normal_(0, std)[self.mine]


# The paper's eight. Each takes images x (B, H, W, 3) uint8 and draws parameters for each of them;
# it returns (B, H, W, 3), 0 to 255, uint8 or float32.


def crop(x: Tensor, draws: Draws) -> Tensor:
    """A part of the image's size, of the image with 12 more pixels on each side, its border's."""
    _, h, w, _ = x.shape
    top = draws.integers(-12, 12)
    left = draws.integers(-12, 12)
    rows = (top[:, None] + torch.arange(h, device=x.device)).clamp(0, h - 1)
    columns = (left[:, None] + torch.arange(w, device=x.device)).clamp(0, w - 1)
    images = torch.arange(len(x), device=x.device)
    return x[images[:, None, None], rows[:, :, None], columns[:, None, :]]


def random_convolution(x: Tensor, draws: Draws) -> Tensor:
    """By a 3x3 kernel from 3 to 3 channels, of Xavier's normal distribution; not clipped."""
    b, h, w, c = x.shape
    kernels = draws.normal((2 / (9 * c + 9 * c)) ** 0.5, c, c, 3, 3)
    if b == 0:  # a process of torchrun may have none of a small minibatch
        return x.float()
    channels = x.permute(0, 3, 1, 2).reshape(1, b * c, h, w).float()
    # a group of channels for each image
    y = nn.functional.conv2d(channels, kernels.flatten(0, 1), padding=1, groups=b)
    return y.view(b, c, h, w).permute(0, 2, 3, 1)


def grayscale(x: Tensor, draws: Draws) -> Tensor:
    luma = x.float() @ x.new_tensor([0.299, 0.587, 0.114], dtype=torch.float32)
    return luma[..., None].expand(x.shape)


def flip(x: Tensor, draws: Draws) -> Tensor:
    """Left to right, every second image. The authors' code flips upside down, by mistake: RAD's
    images, which it was written for, had their channels last."""
    flipped = draws.integers(0, 1) == 1
    return torch.where(flipped[:, None, None, None], x.flip(2), x)


def rotate(x: Tensor, draws: Draws) -> Tensor:
    """By 0, 90, 180 or 270 degrees; square images."""
    turned = torch.stack([x.rot90(quarters, (1, 2)) for quarters in range(4)])
    return turned[draws.integers(0, 3), torch.arange(len(x), device=x.device)]


def cutout(x: Tensor, draws: Draws) -> Tensor:
    return torch.where(cutout_box(x, draws), 0, x)


def cutout_color(x: Tensor, draws: Draws) -> Tensor:
    inside = cutout_box(x, draws)
    color = draws.integers(0, 255, 1, 1, 3).to(x.dtype)
    return torch.where(inside, color, x)


def cutout_box(x: Tensor, draws: Draws) -> Tensor:
    """(B, H, W, 1) bool: in a box of 7 to 21 by 7 to 21 pixels. Where it is follows from its size,
    as in the authors' code: its corner is at row 12 + height, column 24 + width."""
    _, h, w, _ = x.shape
    height = draws.integers(7, 21)[:, None, None, None]
    width = draws.integers(7, 21)[:, None, None, None]
    row = torch.arange(h, device=x.device)[:, None, None] - 12 - height
    column = torch.arange(w, device=x.device)[:, None] - 24 - width
    return (row >= 0) & (row < height) & (column >= 0) & (column < width)


def color_jitter(x: Tensor, draws: Draws) -> Tensor:
    """Brightness, contrast and saturation times 0.6 to 1.4, the hue turned by up to 0.35; the
    contrast before or after the others."""
    contrast = draws.uniform(0.6, 1.4)
    brightness = draws.uniform(0.6, 1.4)[:, None, None]
    saturation = draws.uniform(0.6, 1.4)[:, None, None]
    turn = draws.uniform(-0.5, 0.5)[:, None, None] * (255 / 360)  # as in the authors' code
    first = draws.integers(0, 1) == 1
    rgb = with_contrast(x / 255.0, torch.where(first, contrast, 1.0))
    hue, s, v = rgb_to_hsv(rgb)
    s = (s * saturation).clamp(max=1)
    v = (v * brightness).clamp(max=1)
    rgb = hsv_to_rgb((hue + turn) % 1, s, v)
    return with_contrast(rgb, torch.where(first, 1.0, contrast)) * 255.0


def with_contrast(rgb: Tensor, factor: Tensor) -> Tensor:
    """rgb (B, H, W, 3) from 0 to 1, factor (B,): away from each channel's mean, or towards it."""
    middle = rgb.mean((1, 2), keepdim=True)
    return (middle + (rgb - middle) * factor[:, None, None, None]).clamp(0, 1)


def rgb_to_hsv(rgb: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(..., 3) from 0 to 1 -> hue, saturation, value, each (...) from 0 to 1."""
    r, g, b = rgb.unbind(-1)
    value = rgb.amax(-1)
    chroma = value - rgb.amin(-1)
    width = chroma.clamp(min=1e-8)  # of a gray, hue and saturation are 0
    sixths = torch.where(value == g, (b - r) / width + 2, (r - g) / width + 4)
    sixths = torch.where(value == r, (g - b) / width, sixths)
    return sixths / 6 % 1, chroma / value.clamp(min=1e-8), value


def hsv_to_rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """The inverse: a channel is at its most within a sixth of its own hue, at its least beyond a
    third of the circle from it."""
    own = torch.tensor([5.0, 3.0, 1.0], device=hue.device)
    k = (own + 6 * hue[..., None]) % 6
    lack = torch.minimum(k, 4 - k).clamp(0, 1)
    return value[..., None] * (1 - saturation[..., None] * lack)


AUGMENTATIONS = {
    "crop": crop,
    "random_convolution": random_convolution,
    "grayscale": grayscale,
    "flip": flip,
    "rotate": rotate,
    "cutout": cutout,
    "cutout_color": cutout_color,
    "color_jitter": color_jitter,
}


def augmented(name: str, b_obs: Tensor, mb_inds: Tensor, N: int) -> tuple[Tensor, ...]:
    """Of this process's images in the minibatch, (B, 64, 64, 3) float32; or nothing, for "none".

    It is no part of what is recorded as a CUDA graph: eight graphs would take eight times the
    memory, and a GPU is still at work on the minibatch before while this is launched.
    """
    if name == "none":
        return ()
    mine, own_inds = part_of_minibatch(mb_inds, N)
    draws = Draws(len(mb_inds), mine, b_obs.device)
    return (AUGMENTATIONS[name](b_obs[own_inds], draws).float().contiguous(),)


class AugmentationBandit:
    """UCB-DrAC's choice of the augmentation for each update: f = argmax Q(f) + c sqrt(ln t / N(f)).

    Q is the mean of the last `window` mean returns of the rollouts that followed an update with f,
    0 before there are any; N counts those updates. As in the authors' code, the counts and t start
    at 1, and the returns are GAE's, in the scale of the rewards as they are learned from.
    """

    def __init__(self, exploration: float = 0.1, window: int = 10):
        self.exploration = exploration  # c
        self.window = window
        self.current: str | None = None  # of the last update
        self.counts = dict.fromkeys(AUGMENTATIONS, 1)
        self.returns: dict[str, list[float]] = {name: [] for name in AUGMENTATIONS}

    def choose(self, mean_return: float) -> str:
        """Credits the rollout just played to the last update's augmentation; returns the next."""
        if self.current is not None:
            self.counts[self.current] += 1
            recent = [*self.returns[self.current], mean_return]
            self.returns[self.current] = recent[-self.window :]
        t = sum(self.counts.values()) - len(self.counts) + 1
        bounds = {}
        for name, count in self.counts.items():
            bounds[name] = self.value(name) + self.exploration * math.sqrt(math.log(t) / count)
        self.current = max(bounds, key=bounds.get)
        return self.current

    def value(self, name: str) -> float:
        """Q."""
        returns = self.returns[name]
        return sum(returns) / len(returns) if returns else 0.0

    def metrics(self) -> dict[str, float]:
        """augmentation: the current one's place among AUGMENTATIONS, from 0 on; of each its Q, q_*,
        and N, n_*."""
        row = {"augmentation": list(AUGMENTATIONS).index(self.current)}
        row |= {f"q_{name}": self.value(name) for name in AUGMENTATIONS}
        return row | {f"n_{name}": self.counts[name] for name in AUGMENTATIONS}

    def state_dict(self) -> dict[str, Any]:
        return {"current": self.current, "counts": self.counts, "returns": self.returns}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.current = state["current"]
        self.counts = dict(state["counts"])
        self.returns = {name: list(returns) for name, returns in state["returns"].items()}


def make_bandit(args: Args) -> dict[str, AugmentationBandit]:
    """What --augment ucb adds to the parts of a run that have a state."""
    return {"bandit": AugmentationBandit()} if args.augment == "ucb" else {}


def choose_augmentation(run: "Run", returns: np.ndarray) -> str:
    """For the update after a rollout whose returns are (T, N)."""
    if run.args.augment == "ucb":
        return run.parts["bandit"].choose(float(returns.mean()))
    return run.args.augment


# ---- levels and environments ---------------------------------------------------------------------


MAKERS_LEVEL = 0x01234567  # any, whose bytes are found in a saved state
LAST_LEVEL = 2**31 - 1
LIBRARIES: list[Any] = []  # never unloaded
PROCGEN_OPTIONS = ("use_backgrounds", "restrict_themes", "center_agent")


def load_procgen() -> Callable:
    """Procgen as the package procgen-mirror has it, whose wheels end at Python 3.12. procgen-gym
    has the same games for 3.13, but for a few pixels, and other names for what is used here."""
    if importlib.util.find_spec("procgen"):
        # it imports the dead package gym, which prints a notice
        with contextlib.redirect_stderr(io.StringIO()):
            from procgen import ProcgenGym3Env

        class Procgen(ProcgenGym3Env):
            def __init__(self, num: int, **options: Any):
                super().__init__(num, **options)
                # Looked up now: at its first use cffi takes a lock, which another game that is
                # being made holds if the garbage collector closes this one in the midst of it.
                self.libenv_close = self._c_lib.libenv_close

        return Procgen
    from procgen_gym.env import ProcgenVecEnv

    class ProcgenForPython313(ProcgenVecEnv):
        def __init__(self, num: int, **options: Any):
            super().__init__(num, **options)
            self.call_c_func = self._clib.call_c_func

        def act(self, actions: np.ndarray) -> None:
            self._clib.act(actions)

        def observe(self) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
            games = self._clib
            games._lib.libenv_observe(games._handle)
            first = games.get_first_buf().astype(bool)
            return games.get_reward_buf(), games.get_ob_bufs(), first

    return ProcgenForPython313


class ProcgenLevels(gym.vector.VectorEnv):
    """Procgen as a Gymnasium VectorEnv without autoreset, where a reset's seed is the level played.

        obs, infos = envs.reset(seed=levels, options={"reset_mask": done})  # where done
        obs, rewards, terminations, truncations, infos = envs.step(actions)

    Observations are (N, 64, 64, 3) uint8, those of an environment that is done mean nothing until
    its reset; rewards (N,) float32. The next reset or step overwrites them. A level's start is the
    saved state of a fresh single-level game, and the stock wheel's `set_state` puts any environment
    there. (Procgen's own reset would not: in dodgeball, the last episode leaks into the next.)
    """

    def __init__(
        self,
        num_envs: int,
        env_id: str,
        mode: str,
        num_threads: int,
        page_lock: bool = False,
        **options: bool,  # use_backgrounds, restrict_themes, center_agent
    ):
        make = functools.partial(
            load_procgen(),
            env_name=env_id,
            distribution_mode=mode,
            num_levels=1,
            rand_seed=0,  # Procgen would draw one from the operating system
            **options,
        )
        self.procgen = make(num=num_envs, start_level=0, num_threads=num_threads)
        LIBRARIES.append(getattr(self.procgen, "_c_lib", None))  # its threads may not have ended
        del LIBRARIES[1:]
        # observe() then returns the library's own arrays, which the next step overwrites
        self.procgen._reuse_arrays = True
        self.page_locked = page_lock
        if page_lock:  # in place: a GPU reads the observations from there while others go on
            rgb = self.procgen.observe()[1]["rgb"]
            error = torch.cuda.cudart().cudaHostRegister(rgb.ctypes.data, rgb.nbytes, 0)
            torch.cuda.check_error(error)
        # Level starts are made by one game for all: each one that is closed leaks 11 KB.
        self.maker = make(num=1, start_level=MAKERS_LEVEL, num_threads=0)
        self.makers_start = self.maker.get_state()[0]
        self.level_starts: dict[int, bytes] = {}  # of 4096 levels at most
        self.num_envs = num_envs
        self.env_id = env_id
        self.single_observation_space = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)
        self.single_action_space = gym.spaces.Discrete(15)
        batch = gym.vector.utils.batch_space
        self.observation_space = batch(self.single_observation_space, num_envs)
        self.action_space = batch(self.single_action_space, num_envs)
        self.metadata = {"autoreset_mode": gym.vector.AutoresetMode.DISABLED}

    def reset(self, *, seed: Any = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        if seed is None:
            seed = self.np_random.integers(FIRST_TEST_LEVEL)
        levels = np.asarray(seed)
        if levels.ndim == 0:
            levels = levels + np.arange(self.num_envs)
        if levels.min() < 0 or levels.max() >= LAST_LEVEL:
            raise ValueError(f"Procgen's levels are 0 to 2**31 - 2, a seed of {seed} is not one")
        mask = (options or {}).get("reset_mask", np.ones(self.num_envs, bool))
        for i in np.flatnonzero(mask).tolist():
            state = self.level_start(int(levels[i]))
            self.procgen.call_c_func("set_state", i, state, len(state))
        return self.procgen.observe()[1]["rgb"], {}

    def level_start(self, level: int) -> bytes:
        if level not in self.level_starts:
            if len(self.level_starts) == 4096:
                self.level_starts.clear()
            self.level_starts[level] = self.make_level_start(level)
        return self.level_starts[level]

    def make_level_start(self, level: int) -> bytes:
        """The saved state of a game that begins the level, 21-38 KB.

        Like that of a fresh game with num_levels=1 and start_level=level, in all that is played:
        the maker, back at its own start, is told that its only level is this one and to begin it.
        """
        its_level = struct.pack("<ii", MAKERS_LEVEL, MAKERS_LEVEL + 1)  # first and end of a range
        this_level = struct.pack("<ii", level, level + 1)
        state = self.makers_start.replace(its_level, this_level, 1)
        self.maker.call_c_func("set_state", 0, state, len(state))
        self.maker.act(np.array([-1], np.int32))  # ends the episode, and so begins the next
        self.maker.observe()
        state = self.maker.get_state()[0]
        if self.env_id == "miner":  # which keeps the number of diamonds of the episode before
            state = state[:-8] + bytes(4) + state[-4:]
        return state

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        self.procgen.act(actions)
        rewards, obs, first = self.procgen.observe()
        return obs["rgb"], rewards, first, np.zeros_like(first), {}

    def get_state(self) -> list[Tensor]:
        """Where each environment is, exactly: 21-38 KB each, uint8."""
        states = self.procgen.get_state()
        return [torch.frombuffer(bytearray(state), dtype=torch.uint8) for state in states]

    def set_state(self, states: list[Tensor]) -> np.ndarray:
        """Goes back there, in any process; returns the observations."""
        self.procgen.set_state([bytes(state.numpy()) for state in states])
        return self.procgen.observe()[1]["rgb"]

    def close_extras(self, **kwargs) -> None:
        if self.page_locked:
            rgb = self.procgen.observe()[1]["rgb"]
            torch.cuda.cudart().cudaHostUnregister(rgb.ctypes.data)
        self.procgen.close()
        self.maker.close()


def make_envs(args: Args, num_envs: int, device: torch.device) -> gym.vector.VectorEnv:
    """To train on something else, return another VectorEnv without autoreset, whose reset seed is
    the level."""
    threads = min(args.env_threads or os.cpu_count(), num_envs)
    try:
        return ProcgenLevels(
            num_envs,
            args.env_id,
            args.distribution_mode,
            threads,
            page_lock=device.type == "cuda",
            **{name: getattr(args, name) for name in PROCGEN_OPTIONS},
        )
    except ModuleNotFoundError:
        wheels = "there are wheels for Linux on x86-64, Python 3.11 to 3.13"
        refuse(f"Procgen is not installed: pip install -r requirements.txt; {wheels}.")
    except (ImportError, OSError) as error:
        libraries = "On Debian or Ubuntu: apt-get install libgl1 libglib2.0-0"
        refuse(f"Procgen does not load ({error}). {libraries}")


# ---- evaluation ----------------------------------------------------------------------------------

SHOWN = {"train": "train_return", "test": "test_return"}  # of an evaluation, on the screen
FINAL_EVALUATIONS = ()  # more of them, at the end of a run and by --evaluate


def evaluation_levels(args: Args) -> np.ndarray:
    """(2 * eval_episodes,) int64: test levels, then training levels. The seed decides them; they
    are distinct if there are enough."""
    rng = np.random.default_rng([args.seed, 1])
    num_test_levels = 2**31 - 1 - FIRST_TEST_LEVEL
    test_levels = rng.choice(num_test_levels, args.eval_episodes, replace=False)
    if args.num_levels == 0:
        train_levels = rng.choice(FIRST_TEST_LEVEL, args.eval_episodes, replace=False)
    else:
        train_levels = args.start_level + rng.permutation(args.num_levels)
        train_levels = np.resize(train_levels, args.eval_episodes)
    return np.append(FIRST_TEST_LEVEL + test_levels, train_levels)


EVALUATION_ENVS: dict[tuple, gym.vector.VectorEnv] = {}  # kept: Procgen leaks what is closed


def evaluation_envs(args: Args, num_envs: int, device: torch.device) -> gym.vector.VectorEnv:
    flags = ("env_id", "distribution_mode", "env_threads", *PROCGEN_OPTIONS)
    key = (num_envs, device, *[getattr(args, name) for name in flags])
    if key not in EVALUATION_ENVS:
        EVALUATION_ENVS[key] = make_envs(args, num_envs, device)
    return EVALUATION_ENVS[key]


MOST_TRAINING_LEVELS = 10_000  # that are looked through: a minute, at the first evaluation
FLAWED: dict[tuple, dict[str, np.ndarray]] = {}  # of a process: what `flawed_levels` has found


def flawed_levels(args: Args, envs: gym.vector.VectorEnv) -> dict[str, np.ndarray]:
    """Which of the test levels say nothing about generalization, (eval_episodes,) bool. seen: the
    first observation is that of a training level (procgen's issue 100); none is looked for if the
    training set is unbounded or larger than MOST_TRAINING_LEVELS. one_step: the episode ends with
    its first step, whatever the action (issue 59).
    """
    flags = ("env_id", "distribution_mode", *PROCGEN_OPTIONS, "num_levels", "start_level", "seed")
    key = tuple(getattr(args, name) for name in (*flags, "eval_episodes"))
    if key not in FLAWED:
        test_levels = evaluation_levels(args)[: args.eval_episodes]
        known = set()
        if args.num_levels <= MOST_TRAINING_LEVELS:
            training_levels = args.start_level + np.arange(args.num_levels)
            known = set(first_observations(envs, training_levels))
        seen = [x in known for x in first_observations(envs, test_levels)]
        FLAWED[key] = {"seen": np.array(seen), "one_step": end_at_once(envs, test_levels)}
    return FLAWED[key]


def started(envs: gym.vector.VectorEnv, levels: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Starts all the levels (L,), as many at a time as there are environments: which of them, and
    their first observations."""
    for begin in range(0, len(levels), envs.num_envs):
        chunk = slice(begin, min(begin + envs.num_envs, len(levels)))
        seed = np.resize(levels[chunk], envs.num_envs)
        obs, _ = envs.reset(seed=seed.tolist())
        yield chunk, obs[: chunk.stop - chunk.start]


def first_observations(envs: gym.vector.VectorEnv, levels: np.ndarray) -> list[bytes]:
    """A digest of each level's."""
    return [sha256(x.tobytes()).digest() for _, obs in started(envs, levels) for x in obs]


def end_at_once(envs: gym.vector.VectorEnv, levels: np.ndarray) -> np.ndarray:
    """levels (L,) -> (L,) bool: the episode ends with its first step, whatever the action."""
    ends = np.ones(len(levels), bool)
    for action in range(int(envs.single_action_space.n)):
        left = np.flatnonzero(ends)
        for chunk, obs in started(envs, levels[left]):
            actions = np.full(envs.num_envs, action, np.int32)
            _, _, terminations, truncations, _ = envs.step(actions)
            ends[left[chunk]] = (terminations | truncations)[: len(obs)]
    return ends


def evaluate(
    agent: Agent, args: Args, device: torch.device, video: Path | None = None
) -> dict[str, Any]:
    """Plays an episode on each of `evaluation_levels` to its end: stochastic policy, raw returns,
    a random stream of its own. video: the first test episode as VIDEO.gif.

    Returns the mean returns on training and test levels, their standard deviations, the gap
    between the two, and every episode's level and return. Also how many test levels are
    `flawed_levels` (nan: not looked for), and the mean return on the others, test_return_clean.
    """
    levels = evaluation_levels(args)
    returns = np.zeros(len(levels))
    frames = []
    with own_random_stream(args, device):
        for chunk in np.array_split(np.arange(len(levels)), math.ceil(len(levels) / 256)):
            envs = evaluation_envs(args, len(chunk), device)
            seed = levels[chunk].tolist()
            obs, _ = envs.reset(seed=seed)
            playing = np.arange(len(chunk))  # environments whose episode goes on
            while len(playing):
                if video and chunk[playing[0]] == 0:
                    with optional("filming"):
                        frame = Image.fromarray(obs[0])
                        frames.append(frame.resize((256, 256), Image.Resampling.NEAREST))
                playing_obs = torch.from_numpy(obs[playing]).to(device)
                actions = np.zeros(len(chunk), np.int32)
                actions[playing] = agent.get_action_and_value(playing_obs)[0].cpu().numpy()
                obs, reward, terminations, truncations, _ = envs.step(actions)
                returns[chunk[playing]] += reward[playing]
                done = terminations | truncations
                playing = playing[~done[playing]]
                if done.any():  # again, uncounted: no environment is stepped after its end
                    obs, _ = envs.reset(seed=seed, options={"reset_mask": done})
    if video:  # every second frame, at Procgen's speed
        write_gif(video.with_suffix(".gif"), frames[::2], milliseconds=133)
    test = slice(0, args.eval_episodes)
    train = slice(args.eval_episodes, None)
    flawed = flawed_levels(args, envs)
    looked_for = 0 < args.num_levels <= MOST_TRAINING_LEVELS
    clean = ~(flawed["seen"] | flawed["one_step"])
    return {
        "test_return": float(returns[test].mean()),
        "test_return_std": float(returns[test].std()),
        "train_return": float(returns[train].mean()),
        "train_return_std": float(returns[train].std()),
        "generalization_gap": float(returns[train].mean()) - float(returns[test].mean()),
        "test_return_clean": mean_or_nan(returns[test][clean]),
        "test_levels_seen": int(flawed["seen"].sum()) if looked_for else math.nan,
        "test_levels_one_step": int(flawed["one_step"].sum()),
        "episodes": {
            "test_levels": levels[test].tolist(),
            "test_returns": returns[test].tolist(),
            "train_levels": levels[train].tolist(),
            "train_returns": returns[train].tolist(),
        },
    }


# ---- flags that cannot work ----------------------------------------------------------------------


def check_args(args: Args) -> None:
    """Refuses what cannot work, with one sentence and exit status 2."""
    known = (*GAMES, *OWN_ENVS)
    require(args, ["env_id"], lambda x: x in known, f"one of {', '.join(known)}")
    if args.env_id in OWN_ENVS:
        flags = ["distribution_mode", *PROCGEN_OPTIONS]
        require_default(args, flags, "a Procgen game")
    elif args.env_id not in GAMES_WITH_MODE[args.distribution_mode]:
        modes = [mode for mode, games in GAMES_WITH_MODE.items() if args.env_id in games]
        refuse(
            f"--distribution-mode {args.distribution_mode} does not exist for {args.env_id}:"
            f" choose from {', '.join(modes)}."
        )
    check_common_args(args)
    require(args, ["env_threads"], lambda x: 0 <= x < 2**31, "at least 0 and below 2**31")
    levels = ["num_levels", "start_level"]
    most_levels = f"at least 0 and at most {FIRST_TEST_LEVEL}, where the levels for testing begin"
    require(args, levels, lambda x: 0 <= x <= FIRST_TEST_LEVEL, most_levels)
    require(args, ["reward_norm_gamma", "nu"], lambda x: 0 <= x <= 1, "between 0 and 1")
    rollout = f"--num-envs x --num-steps = {args.batch_size}"
    require(
        args,
        ["num_minibatches"],
        lambda x: args.batch_size % x == 0 and x < args.batch_size,
        f"a divisor of {rollout} and less than that",
    )
    first = args.batch_size * (3 if args.profile else 1)
    require(
        args,
        ["total_timesteps"],
        lambda x: x >= first,
        f"at least {first}: {rollout} is one iteration, --profile needs 3",
    )
    most = FIRST_TEST_LEVEL - args.num_levels
    testing = f"levels from {FIRST_TEST_LEVEL} on are for testing"
    require(args, ["start_level"], lambda x: x <= most, f"at most {most}: {testing}")
    if args.num_levels == 0:
        all_levels = "0 with --num-levels 0, which draws from all levels"
        require(args, ["start_level"], lambda x: x == 0, all_levels)
        baselines = "uniform or sequential with --num-levels 0: plr needs a fixed set"
        require(args, ["curriculum"], lambda x: x != "plr", baselines)
        of_scores = ["score", "score_transform", "temperature", "staleness_coef", "alpha"]
        require_default(args, [*of_scores, "stitch_episodes"], "a fixed set, --num-levels above 0")
    if args.curriculum != "plr":
        for_plr = "--curriculum plr"
        require_default(args, ["rho", "nu", "replay_schedule"], for_plr)
    elif args.rho == 1:
        why = "--rho below 1, since after all levels were seen every episode replays"
        require_default(args, ["replay_schedule", "nu"], why)
    elif args.replay_schedule != "fixed":
        require_default(args, ["nu"], "--replay-schedule fixed")
    if args.score in ("gae", "max_mc"):
        another = f"another: --score {args.score} can be negative"
        require(args, ["score_transform"], lambda x: x != "power", another)


# ---- machinery: the same text in both scripts ----------------------------------------------------

RANK = int(os.environ.get("RANK", 0))  # torchrun's: this process
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # and how many there are
FORMAT = f"{Path(__file__).stem} 5"  # of checkpoint.pt
SAID_ONCE: set[str] = set()  # lines, by say_once
# what a training writes with write_file; evaluation_*.json are other processes'
WRITTEN = ("args.json", "result.json", "*.pt", "*.csv", "wandb_id.txt")
LOSSES = (
    "value_loss",
    "policy_loss",
    "entropy",
    "old_approx_kl",
    "approx_kl",
    "clipfrac",
    "grad_norm",
)
# what may differ when a run is resumed
FREE_ON_RESUME = (
    "total_timesteps",
    "checkpoint_interval",
    "capture_video",
    "track",
    "profile",
    "cuda",
    "cuda_graphs",
    "env_threads",
    "resume",
    "evaluate",
)


class Run:
    """A run's directory, clock, logs and checkpoint. What it writes or shows decides nothing that
    is learned.

    `parts` is all that has a state (state_dict, load_state_dict): saved, restored and hashed in
    one loop. `storage` is what a loss that is not finite came from. `totals` are counts that go
    on after a resume. Process 0 of torchrun alone writes and shows.
    """

    def __init__(self, args: Args, directory: Path, checkpoint: dict[str, Any] | None):
        SAID_ONCE.clear()
        self.args = args
        self.checkpoint = checkpoint
        self.parts: dict[str, Any] = {}
        self.storage: dict[str, Any] = {}
        self.totals: dict[str, int] = {}
        self.notes: list[str] = []  # more for the line on the screen
        self.device = choose_device(args)
        self.dir = Path(gather_objects(str(directory))[0])  # process 0 has chosen it
        self.writer = start_writer(args, self.dir, checkpoint) if RANK == 0 else None
        self.graphs = args.cuda_graphs and self.device.type == "cuda"
        self.profile = Profile(args.profile, self.device)
        self.iteration = 0
        self.train_seconds = 0.0  # of rollouts and updates
        self.began = time.time()
        self.evaluation: dict[str, Any] | None = None  # the last one
        self.evaluation_shown = True
        self.slice_start = (0, 0.0)  # iterations and time when this process began to train
        self.last_report = (0, 0.0)  # steps and train_seconds at the last line on the screen
        self.signals: list[int] = []
        self.stopping = False

    @property
    def global_step(self) -> int:
        return self.iteration * self.args.batch_size

    @property
    def last(self) -> bool:
        return self.iteration == self.args.num_iterations

    def due(self, interval: int) -> bool:
        return self.last or (interval > 0 and self.iteration % interval == 0)

    # the loop

    def iterations(self, envs: gym.vector.VectorEnv) -> Iterator[int]:
        """1, 2, ..., or from the checkpoint on, until the last one or a signal."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, self._on_signal)
        say(f"{describe(self.args)}, seed {self.args.seed}: {self.dir}")
        say(f"training on {device_name(self.device)}")
        if self.device.type == "cpu" and self.args.precision == "bf16" and not has_bf16():
            say("--precision bf16 is slower than fp32 on this CPU: it has no AMX or AVX512-BF16")
        if self.checkpoint is None:
            self.save(envs)
        else:
            say(f"continuing at step {self.global_step:,}")
        T, N = self.args.num_steps, self.args.num_envs
        patience = threading.Timer(
            20.0, say, [f"in the first iteration: {T} steps of {N} environments, then the update"]
        )
        patience.daemon = True
        patience.start()
        self.slice_start = (self.iteration, time.time())
        self.last_report = (self.global_step, self.train_seconds)
        while self.iteration < self.args.num_iterations and not self.stopping:
            self.iteration += 1
            self.began_iteration = time.perf_counter()
            self.profile.begin(self.iteration, self.last)
            yield self.iteration
            patience.cancel()
        patience.cancel()  # a killed run may have had only its result left to write

    def _on_signal(self, number: int, frame: Any) -> None:
        """The first ends the run after its iteration, a second of its kind at once."""
        self.signals.append(number)
        signal.signal(number, signal.SIG_DFL)
        if RANK == 0:  # not by print, which a signal may have interrupted
            text = b"finishing this iteration, and an evaluation if one is due, then saving; "
            text += b"again to stop now\n"
            with contextlib.suppress(OSError):
                os.write(2, text)

    def mean_losses(
        self, losses: Tensor, updates: int, names: tuple[str, ...] = LOSSES
    ) -> dict[str, float]:
        """By name: losses (names,), summed over the updates, once the device has them; nan if
        none."""
        means = gather(losses[:, None]).sum(-1) / max(updates, 1)
        self.require_finite("a loss or gradient", means)  # waits for the device
        self.profile.phase("rest")
        return {name: x if updates else math.nan for name, x in zip(names, means.tolist())}

    def end_iteration(self, envs: gym.vector.VectorEnv) -> None:
        """The checkpoint and a line on the screen, when they are due."""
        signalled = gather(torch.tensor([len(self.signals)])).any()
        self.stopping = bool(signalled) and not self.last
        if self.stopping or self.due(self.args.checkpoint_interval):
            self.save(envs)
        steps = self.global_step - self.last_report[0]
        seconds = self.train_seconds - self.last_report[1]
        if self.last or self.iteration == 1 or seconds > 10:
            self.last_report = (self.global_step, self.train_seconds)
            self._show_progress(steps / seconds)

    def _show_progress(self, steps_per_second: float) -> None:
        share = self.iteration / self.args.num_iterations
        # at the pace since this process began: the slices before may be another machine's
        iterations_before, start = self.slice_start
        pace = (time.time() - start) / (self.iteration - iterations_before)
        minutes_left = int(pace * (self.args.num_iterations - self.iteration) / 60)
        line = [
            f"step {self.global_step:,} ({share:.1%})",
            f"{minutes_left // 60}h{minutes_left % 60:02d}m left",
            f"{steps_per_second:,.0f} steps/s",
        ]
        line += self.notes
        line.append(f"train return {self.episodic_return:.2f}")
        if not self.evaluation_shown:
            shown = [f"{name} {self.evaluation[key]:.2f}" for name, key in SHOWN.items()]
            line.append(f"evaluation: {', '.join(shown)}")
            self.evaluation_shown = True
        say(" | ".join(line))

    def finish(self, envs: gym.vector.VectorEnv, evaluate: Callable[[], dict[str, Any]]) -> None:
        """result.json at the end of the run, or the command that goes on after a signal."""
        envs.close()
        if WORLD > 1:
            dist.destroy_process_group()
        if RANK > 0:
            return
        with optional("TensorBoard"):
            self.writer.close()
        if self.stopping:
            command = shlex.join(["python", sys.argv[0], "--resume", str(self.dir)])
            say(f"Stopped by a signal. To go on: {command}")
            raise SystemExit(130 if signal.SIGINT in self.signals else 0)
        for another in FINAL_EVALUATIONS:
            another(self.parts["agent"], self.args, self.device, self.dir, self.global_step)
        result = {
            "env_id": self.args.env_id,
            "curriculum": self.args.curriculum,
            "seed": self.args.seed,
            "global_step": self.global_step,
            **self.totals,
            "steps_per_second": self.global_step / self.train_seconds,
            "wall_seconds": time.time() - self.began,
            "device": device_name(self.device),
            "processes": WORLD,
            "torch": torch.__version__,
            "fingerprint": fingerprint(self.state()),
            "evaluation": self.evaluation or evaluate(),
        }
        write_file(self.dir / "result.json", result)
        say(f"done: {self.dir}/result.json, fingerprint {result['fingerprint'][:16]}")

    # the log

    def log(self, file: str, row: dict[str, float]) -> None:
        """A row for TensorBoard and, its names without their group, for a CSV file."""
        if RANK > 0:
            return
        with optional("TensorBoard"):
            for key, value in row.items():
                if not math.isnan(value):
                    self.writer.add_scalar(key, value, self.global_step)
        columns = {"global_step": self.global_step, "wall_seconds": time.time() - self.began}
        columns |= {key.split("/")[1]: value for key, value in row.items()}
        with optional(f"writing to {file}"):
            append_row(self.dir / file, columns)

    def log_iteration(self, row: dict[str, float]) -> None:
        """Stops the clock, too: charts/SPS is of rollout and update, without evaluation, log and
        checkpoint."""
        seconds = time.perf_counter() - self.began_iteration
        self.train_seconds += seconds
        self.profile.end(self.last, self.dir)
        self.episodic_return = row["charts/episodic_return"]
        totals = {f"charts/{name}": x for name, x in self.totals.items()}
        self.log("progress.csv", row | totals | {"charts/SPS": self.args.batch_size / seconds})

    def evaluation_due(self) -> bool:
        return RANK == 0 and self.due(self.args.eval_interval)

    def video(self) -> Path | None:
        """Where this iteration's evaluation shows what it plays, if it is asked to."""
        return self.dir / "videos" / f"step_{self.global_step}" if self.args.capture_video else None

    def log_evaluation(self, evaluation: dict[str, Any]) -> None:
        self.evaluation = evaluation
        self.evaluation_shown = False
        scalars = {name: x for name, x in evaluation.items() if name != "episodes"}
        self.log("evaluations.csv", {f"eval/{k}": x for k, x in (self.totals | scalars).items()})

    def log_pictures(self, draw: Callable[[], dict[str, np.ndarray]]) -> None:
        """For TensorBoard: (H, W, 3) uint8 by name."""
        with optional("drawing levels"):
            for name, picture in draw().items():
                self.writer.add_image(name, picture, self.global_step, dataformats="HWC")

    def require_finite(self, what: str, x: Any) -> None:
        """Ends the run, with what led there in a file; the last checkpoint is from before."""
        if torch.as_tensor(x).isfinite().all():
            return
        path = self.dir / f"failed_{RANK}.pt"
        write_file(path, self.storage | {"agent": self.parts["agent"].state_dict()})
        raise FloatingPointError(
            f"{what} of iteration {self.iteration} is not finite, see {path.name}"
        )

    # the checkpoint

    def state(self) -> dict[str, Any]:
        """What the fingerprint is taken of: all that training has made, and all that decides how
        it would go on."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state["torch_rng"] = torch.get_rng_state()
        state["cuda_rng"] = None
        if self.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state()
        return state

    def save(self, envs: gym.vector.VectorEnv) -> None:
        state = self.state()
        digest = torch.tensor([int(fingerprint(state)[:15], 16)])
        if (gather(digest) != digest).any():
            raise RuntimeError(f"the ranks' states differ after iteration {self.iteration}")
        state["envs"] = gather_objects(envs.get_state() if hasattr(envs, "get_state") else None)
        state["iteration"] = self.iteration
        state["global_step"] = self.global_step
        state["totals"] = self.totals
        state["seconds"] = [time.time() - self.began, self.train_seconds]
        state["args"] = asdict(self.args)
        state["format"] = FORMAT
        if RANK == 0:
            write_file(self.dir / "checkpoint.pt", state)

    def restore(self, envs: gym.vector.VectorEnv, own: slice) -> np.ndarray | None:
        """Goes on where the checkpoint is. Returns the observations there, or None if the
        environments are to be started: in a new run, and where they could not be saved."""
        checkpoint = self.checkpoint
        if checkpoint is None:
            return None
        for name, part in self.parts.items():
            part.load_state_dict(checkpoint[name])
        torch.set_rng_state(checkpoint["torch_rng"])
        if self.device.type == "cuda" and checkpoint["cuda_rng"] is not None:
            torch.cuda.set_rng_state(checkpoint["cuda_rng"])
        self.iteration = checkpoint["iteration"]
        self.totals |= checkpoint["totals"]
        wall_seconds, self.train_seconds = checkpoint["seconds"]
        self.began -= wall_seconds
        if RANK == 0:
            cut_rows(self.dir / "progress.csv", self.global_step)
            cut_rows(self.dir / "evaluations.csv", self.global_step)
            (self.dir / "result.json").unlink(missing_ok=True)
        if checkpoint["envs"][0] is None:
            return None
        states = [state for of_rank in checkpoint["envs"] for state in of_rank]
        return envs.set_state(states[own])


class CudaGraph:
    """function(*tensors, **constants) -> tensors, recorded on a GPU and replayed as one launch.

    Launching a kernel from Python takes longer than most of these kernels run. The first two calls
    are plain ones, whose work counts; the third is recorded; from then on its kernels run again,
    on what the tensors hold by then. So the function must do the same to the same memory each time
    and never wait for the device. Its outputs are overwritten by the next call. Each combination
    of constants is recorded on its own. Not enabled, it is the function.
    """

    def __init__(self, function: Callable[..., Any], enabled: bool):
        self.function = function
        self.enabled = enabled
        self.calls: Counter[tuple] = Counter()  # by constants
        self.recorded: dict[tuple, tuple] = {}  # graph, fixed inputs, outputs

    def __call__(self, *inputs: Tensor, **constants: Any) -> Any:
        if not self.enabled:
            return self.function(*inputs, **constants)
        key = tuple(constants.values())
        self.calls[key] += 1
        if self.calls[key] <= 2:
            return self._run_aside(inputs, constants)
        if key not in self.recorded:
            self.recorded[key] = self._record(inputs, constants)
        graph, fixed_inputs, outputs = self.recorded[key]
        for fixed, x in zip(fixed_inputs, inputs):
            fixed.copy_(x, non_blocking=True)
        graph.replay()
        return outputs

    def _run_aside(self, inputs: tuple, constants: dict) -> Any:
        """A plain call on another stream, as capturing wants it of what warms up."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            outputs = self.function(*inputs, **constants)
        torch.cuda.current_stream().wait_stream(stream)
        return outputs

    def _record(self, inputs: tuple, constants: dict) -> tuple:
        fixed_inputs = [x.clone() for x in inputs]
        graph = torch.cuda.CUDAGraph()
        # other threads, TensorBoard's among them, may do as they like meanwhile
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs = self.function(*fixed_inputs, **constants)
        return graph, fixed_inputs, outputs


class Profile:
    """With --profile: seconds by phase, and a trace of the last iteration.

    A phase lasts until the next one begins, the GPU's work included. The process's first iteration
    warms up and is left out of the seconds, as are evaluations and checkpoints.
    """

    def __init__(self, enabled: bool, device: torch.device):
        self.enabled = enabled
        self.device = device
        self.seconds: Counter[str] = Counter()
        self.warm = False
        self.running = False
        self.tracing = False
        self.name = ""  # of the running phase
        self.range: Any = None  # of the trace
        self.profiler = torch.profiler.profile()

    def begin(self, iteration: int, last: bool) -> None:
        self.running = self.enabled and (self.warm or last)
        self.warm = True
        if not (self.enabled and last):
            return
        total = self.seconds.total()
        shares = [f"{k} {x:.4g} s ({x / total:.1%})" for k, x in self.seconds.most_common()]
        say(f"profile to iteration {iteration - 1}, rank {RANK}: {', '.join(shares)}", True)
        self.profiler.start()
        self.tracing = True

    def phase(self, name: str) -> None:
        if not self.running or torch.compiler.is_compiling():
            return
        if self.device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                return  # what is recorded as one graph is one phase
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self.name:
            self.seconds[self.name] += now - self.started
        if self.range is not None:
            self.range.__exit__(None, None, None)
            self.range = None
        if self.tracing and name:
            self.range = torch.profiler.record_function(name)
            self.range.__enter__()
        self.name = name
        self.started = now

    def end(self, last: bool, directory: Path) -> None:
        self.phase("")
        if self.enabled and last:
            self.profiler.stop()
            self.profiler.export_chrome_trace(str(directory / f"trace_{RANK}.json.gz"))


# arrays


def running_sums(
    before: np.ndarray, x: np.ndarray, ended: np.ndarray, decay: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Sums over the steps of each episode: before (N,) of earlier rollouts, x (T, N), ended (T, N)
    bool. Returns the sums up to each step (T, N) float64, and what goes on (N,)."""
    sums = np.zeros(x.shape)
    goes_on = 1.0 - ended
    for t in range(len(x)):
        np.multiply(before, decay, out=sums[t])
        sums[t] += x[t]
        before = sums[t] * goes_on[t]
    return sums, before


def mean_or_nan(x: np.ndarray) -> float:
    return float(x.mean()) if len(x) else math.nan


def explained_variance(values: np.ndarray, returns: np.ndarray) -> float:
    unexplained = torch.from_numpy(returns - values).var()
    return float(1 - unexplained / torch.from_numpy(returns).var().clamp(min=1e-12))


# files and device


def fingerprint(state: Any) -> str:
    """SHA-256 of a nested state. Two runs with the same fingerprint are the same run."""

    def digest(x: Tensor) -> str:
        return sha256(x.cpu().numpy().tobytes()).hexdigest()

    text = json.dumps(default_convert(state), sort_keys=True, default=digest)
    return sha256(text.encode()).hexdigest()


def write_file(path: Path, content: Any) -> None:
    """bytes; else .pt for torch.load(weights_only=True), or JSON, which has null for nan. A crash
    leaves the old file or the new one."""
    if path.suffix == ".pt":
        buffer = io.BytesIO()
        torch.save(default_convert(content), buffer)
        content = buffer.getvalue()
    elif not isinstance(content, bytes):
        content = json.loads(json.dumps(content), parse_constant=lambda nan: None)
        content = json.dumps(content, indent=2).encode()
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)  # a full disk has room again for what the error was
        raise


def append_row(path: Path, columns: dict[str, Any]) -> None:
    """A row of a CSV file; the first one is preceded by the header. A file that an earlier version
    of the script began keeps its columns."""
    header = ""
    if path.exists():
        with open(path, errors="replace") as file:
            header = file.readline().strip()
    names = header.split(",") if header.startswith("global_step,") else list(columns)
    values = [columns.get(name, "") for name in names]
    cells = [f"{x:.6g}" if isinstance(x, float) else str(x) for x in values]
    row = ",".join(cells) + "\n"
    with open(path, "ab", buffering=0) as file:
        size = file.tell()
        if size == 0:
            row = ",".join(columns) + "\n" + row
        written = file.write(row.encode())
        if written < len(row):  # what is missing would be the next row's beginning
            file.truncate(size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def cut_rows(path: Path, global_step: int) -> None:
    """Leaves a CSV file's rows up to global_step. Those after it, and what is not a row, cut short
    by a full disk or a kill, will be written again; a file without its header is set aside."""
    if not path.exists():
        return
    header, *lines = path.read_bytes().splitlines(keepends=True) or [b""]
    if not header.startswith(b"global_step,") or not header.endswith(b"\n"):
        os.replace(path, path.with_name(f"{path.name}.damaged"))
        return
    kept = []
    for line in lines:
        step = line.split(b",")[0]
        whole = line.endswith(b"\n") and line.count(b",") == header.count(b",")
        if whole and step.isdigit() and int(step) <= global_step:
            kept.append(line)
    write_file(path, header + b"".join(kept))


def write_gif(path: Path, frames: list[Image.Image], milliseconds: int) -> None:
    with optional(f"the video {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        more = frames[1:]
        frames[0].save(path, save_all=True, append_images=more, duration=milliseconds, loop=0)


@contextlib.contextmanager
def claimed_run_dir(args: Args) -> Iterator[Path]:
    """The run's directory, which no other process can have meanwhile."""
    directory = Path(args.resume or args.run_dir or default_run_dir(args))
    if RANK > 0:
        yield directory
        return
    quoted = shlex.quote(str(directory))
    flag = f"--{'resume' if args.resume else 'run-dir'} {quoted}"

    def refuse_another_run() -> None:
        if not args.resume and (directory / "progress.csv").exists():
            other = f"choose another directory, or --resume {quoted}"
            refuse(f"{flag} already holds a run: {other}.")

    refuse_another_run()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = lock_file(directory / "lock")
        refuse_another_run()  # that ended before the lock was ours
        for name in WRITTEN:
            for leftover in directory.glob(f"{name}.*.tmp"):  # of a process that was killed
                leftover.unlink()
        write_file(directory / "args.json", asdict(args))
    except BlockingIOError:
        refuse(f"{flag} is in use: another process trains there. Choose another directory.")
    except OSError as error:
        refuse(f"{flag} cannot be written: {error.strerror}.")
    with lock:
        yield directory


def lock_file(path: Path) -> io.TextIOWrapper:
    """The open file: its lock lasts until it is closed, at the latest by the process's end."""
    file = open(path, "a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if isinstance(error, BlockingIOError):
            raise
        # a file system without locks
    return file


def default_run_dir(args: Args) -> Path:
    """One that was not there before: made here, since another run may start in the same second."""
    env_id = args.env_id.replace("/", "_")
    name = f"{env_id}__{args.exp_name}__{args.seed}__{int(time.time())}"
    for suffix in ("", *[f"_{i}" for i in range(2, 1000)]):
        directory = Path("runs", name + suffix)
        try:
            if RANK == 0:
                directory.mkdir(parents=True)
            return directory
        except FileExistsError:
            continue
        except OSError as error:
            refuse(f"--run-dir {directory} cannot be written: {error.strerror}.")
    raise AssertionError("a thousand runs in a second")


def start_writer(args: Args, directory: Path, checkpoint: dict[str, Any] | None) -> SummaryWriter:
    if args.track:
        with optional("Weights and Biases"):
            start_tracking(args, directory)
    # what an earlier process of this run wrote after its last checkpoint does not count
    purge_step = checkpoint["global_step"] + 1 if checkpoint else 0
    writer = SummaryWriter(directory, purge_step=purge_step)
    table = "\n".join(f"|{key}|{value}|" for key, value in asdict(args).items())
    writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}")
    return writer


def start_tracking(args: Args, directory: Path) -> None:
    """One run of Weights and Biases, which a resume goes on with."""
    import wandb

    path = directory / "wandb_id.txt"
    if not path.exists():
        write_file(path, os.urandom(8).hex().encode())
    wandb.init(
        id=path.read_text(),
        resume="allow",
        sync_tensorboard=True,
        config=asdict(args),
        name=directory.name,
        dir=directory,
        save_code=True,
    )


def choose_device(args: Args) -> torch.device:
    torch.backends.cudnn.deterministic = args.torch_deterministic
    # without these, cuDNN's LSTM and compiled kernels need not repeat bit for bit
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:2")
    os.environ.setdefault("TORCHINDUCTOR_DETERMINISTIC", "1")
    # cuDNN would use TF32 by default: fp32 means fp32 here
    torch.backends.cuda.matmul.allow_tf32 = args.precision != "fp32"
    torch.backends.cudnn.allow_tf32 = args.precision != "fp32"
    cuda = args.cuda and torch.cuda.is_available()
    if WORLD > 1:
        join_processes("cpu:gloo,cuda:nccl" if cuda else "gloo")
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        return torch.device("cuda", torch.cuda.current_device())
    with contextlib.suppress(AttributeError, OSError):
        # glibc hands large tensors back to the kernel: the update is up to twice as fast without
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD
    return torch.device("cpu")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"{threads} CPU thread{'s' if threads > 1 else ''}"


def has_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU has instructions for bf16, by any of their names; yes where it is unknown."""
    return not cpuinfo.exists() or "bf16" in cpuinfo.read_text()


def maybe_compile(function: Callable[..., Any], args: Args) -> Callable[..., Any]:
    return torch.compile(function) if args.compile else function


@contextlib.contextmanager
def deterministic_gradients(args: Args) -> Iterator[None]:
    """Compiled max pooling would add gradients in any order. Only where it matters, since it makes
    other operations slower."""
    wanted = args.compile and args.torch_deterministic
    torch.use_deterministic_algorithms(wanted, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def make_optimizer(agent: nn.Module, args: Args, device: torch.device) -> optim.Adam:
    """Adam, whose learning rate is a tensor: what was recorded as a CUDA graph reads it there."""
    cuda = device.type == "cuda"
    dtype = torch.float32 if cuda else torch.float64  # what the fused kernels take
    rate = torch.tensor(args.learning_rate, dtype=dtype, device=device)
    optimizer = optim.Adam(agent.parameters(), lr=rate, eps=1e-5, fused=True, capturable=cuda)

    def keep_options(optimizer: optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        """A checkpoint of another device brings the moments, not the options."""
        if args.anneal_lr:  # where no iteration is left to set it
            optimizer.param_groups[0]["lr"].fill_(float(state["param_groups"][0]["lr"]))
        return state | {"param_groups": optimizer.state_dict()["param_groups"]}

    optimizer.register_load_state_dict_pre_hook(keep_options)
    return optimizer


@contextlib.contextmanager
def own_random_stream(args: Args, device: torch.device) -> Iterator[None]:
    """For an evaluation: the seed decides it, and it leaves training's generators alone."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():
        torch.manual_seed(int(np.random.default_rng([args.seed, 2]).integers(2**62)))
        yield


# torchrun: each process plays its part of the environments. Rewards, ends of episodes and values
# are gathered, and from there on every process does the same for all N environments: GAE, level
# scores, curriculum. Gradients are added up.


def join_processes(backend: str) -> None:
    # torchrun reuses the store after a restart: a prefix keeps the last group's addresses out
    store, *_ = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    # process 0 evaluates while the others wait; torchrun itself notices a process that has died
    timeout = datetime.timedelta(days=7)
    dist.init_process_group(backend, store=store, rank=RANK, world_size=WORLD, timeout=timeout)


def gather(x: Tensor) -> Tensor:
    """(..., n) of this process's environments -> (..., N) of all processes'."""
    if WORLD == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(WORLD)]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts, dim=-1)


def to_numpy(x: Tensor) -> np.ndarray:
    """(..., n) on the device, of this process's environments -> (..., N) of all processes'."""
    return gather(x).cpu().numpy()


def gather_numpy(reward: np.ndarray, done: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n,) of this process's environments -> (N,) float32 and (N,) bool of all processes'."""
    if WORLD == 1:
        return reward, done
    reward, done = gather(torch.from_numpy(np.stack((reward, done)))).numpy()
    return reward, done > 0


def gather_objects(x: Any) -> list[Any]:
    """One of each process."""
    if WORLD == 1:
        return [x]
    objects = [None] * WORLD
    dist.all_gather_object(objects, x)
    return objects


def mean(x: Tensor, args: Args) -> Tensor:
    """This process's part of the mean over a minibatch of all processes."""
    return x.sum() / args.minibatch_size


def all_reduce_gradients(agent: nn.Module) -> None:
    """Adds up the gradients of all processes, in one message."""
    if WORLD == 1:
        return
    gradients = [p.grad for p in agent.parameters()]
    total = torch.cat([x.reshape(-1) for x in gradients])
    dist.all_reduce(total)
    for x, part in zip(gradients, total.split([x.numel() for x in gradients])):
        x.copy_(part.view(x.shape))


# command line


def say(line: str, every_process: bool = False) -> None:
    """A line on the screen. Nothing that is wrong with the screen ends a training."""
    if RANK > 0 and not every_process:
        return
    try:
        try:
            print(line, flush=True)
        except UnicodeError:  # what the screen's encoding lacks, as a path has it
            sys.stdout.buffer.write(f"{line}\n".encode(errors="surrogateescape"))
            sys.stdout.flush()
    except (AttributeError, OSError, ValueError):  # a closed pipe, a full disk: to nowhere
        with contextlib.suppress(AttributeError, OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def optional(what: str) -> Iterator[None]:
    """Of what a training can do without: if it fails, a line says so, once, and the run goes on."""
    try:
        yield
    except Exception as error:
        say_once(f"{what} failed, the run goes on: {type(error).__name__}: {error}")


def say_once(line: str) -> None:
    if line not in SAID_ONCE:
        say(line)
    SAID_ONCE.add(line)


def refuse(reason: str, status: int = 2) -> None:
    """Ends the program with one sentence."""
    if RANK > 0 and status == 2:
        time.sleep(30)  # process 0 says it, and torchrun ends the others
    with contextlib.suppress(OSError):
        print(f"error: {reason}", file=sys.stderr, flush=True)
    raise SystemExit(status)


def require(args: Args, names: list[str], allowed: Callable[[Any], bool], what: str) -> None:
    """Refuses the flags among `names` whose value is not allowed; None always is."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not allowed(value):
            refuse(f"--{name.replace('_', '-')} {value} must be {what}.")


def require_default(args: Args, names: list[str], only_with: str) -> None:
    """Refuses the flags among `names` that were given, though they would do nothing."""
    defaults = {f.name: f.default for f in fields(Args)}
    for name in names:
        value = getattr(args, name)
        if value != defaults[name]:
            refuse(f"--{name.replace('_', '-')} {value} does nothing without {only_with}.")


def check_common_args(args: Args) -> None:
    """Refuses values that neither script can work with."""
    sizes = ["num_envs", "num_steps", "num_minibatches", "update_epochs"]
    sizes += ["total_timesteps", "eval_episodes"]
    require(args, sizes, lambda x: x >= 1, "at least 1")
    most = 10**6
    require(args, ["eval_episodes"], lambda x: x <= most, f"at most {most}")
    counts = ["seed", "checkpoint_interval", "eval_interval", "ent_coef", "vf_coef"]
    require(args, counts, lambda x: 0 <= x < 2**63, "at least 0 and below 2**63")
    positive = ["learning_rate", "temperature", "max_grad_norm", "clip_coef", "target_kl"]
    require(args, positive, lambda x: 0 < x < math.inf, "above 0")
    shares = ["gamma", "gae_lambda", "staleness_coef", "rho"]
    require(args, shares, lambda x: 0 <= x <= 1, "between 0 and 1")
    require(args, ["alpha"], lambda x: 0 < x <= 1, "above 0 and at most 1")
    if args.score_transform not in ("rank", "power", "softmax"):
        require_default(args, ["temperature"], "--score-transform rank, power or softmax")
    processes = f"a multiple of torchrun's {WORLD} processes"
    require(args, ["num_envs"], lambda x: x % WORLD == 0, processes)


def read_flags(default: Args | None = None) -> Args:
    """The command line, in the spellings of sweep tools too: --anneal-lr=True, 25e6."""
    kinds = {f"--{f.name.replace('_', '-')}": f.type for f in fields(Args) if f.init}
    flags = []
    for word in sys.argv[1:]:
        flag, equals, value = word.partition("=")
        flag = flag.replace("_", "-")
        if kinds.get(flag) is bool and value.lower() in ("true", "false"):
            word = flag if value.lower() == "true" else f"--no-{flag[2:]}"
        elif kinds.get(flag) in (int, int | None) and equals:
            word = f"{flag}={whole_number(value)}"
        elif flags and kinds.get(flags[-1].replace("_", "-")) in (int, int | None):
            word = whole_number(word)
        flags.append(word)
    return tyro.cli(Args, args=flags, default=default)


def whole_number(text: str) -> str:
    """25e6, 2.5e+07, 25000000.0 -> 25000000; what is no such number stays as it is."""
    if text.isdigit() or not re.fullmatch(r"\d+(\.\d*)?(e\+?\d+)?", text.lower()):
        return text
    number = float(text)
    return str(int(number)) if number.is_integer() else text


def parse_args() -> tuple[Args, dict[str, Any] | None]:
    """The flags, and the checkpoint of the run in --resume or --evaluate."""
    args = read_flags()
    for name in ("run_dir", "resume", "evaluate"):  # a batch script's variable may be empty
        require(args, [name], lambda x: x != "", "a directory")
    if args.evaluate and args.resume:
        refuse(f"--resume {args.resume} does nothing with --evaluate.")
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"  # by --max-restarts
    if restarted and args.run_dir and Path(args.run_dir, "checkpoint.pt").exists():
        args.resume = args.resume or args.run_dir
    if args.evaluate and WORLD > 1:
        refuse(f"--evaluate {args.evaluate} must be without torchrun: one process plays it all.")
    if args.evaluate:
        return load_run("evaluate", Path(args.evaluate))
    if args.resume:
        return load_run("resume", Path(args.resume))
    return args, None


def load_run(flag: str, directory: Path) -> tuple[Args, dict[str, Any]]:
    """The run's flags, changed by those on the command line; its checkpoint."""
    try:
        path = directory / "checkpoint.pt"
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        found = checkpoint["format"]
        if found != FORMAT:
            why = f"the format of its checkpoint is {found!r}, this script's is {FORMAT!r}"
            raise ValueError(why)
        names = [f.name for f in fields(Args) if f.init and f.name in checkpoint["args"]]
        saved = {name: checkpoint["args"][name] for name in names}
        defaults = Args(**saved)
    except Exception as error:  # whatever a damaged file makes of torch.load
        why = (str(error) or repr(error)).splitlines()[0]
        refuse(f"--{flag} {directory} is not a run that can be loaded: {why}")
    args = read_flags(defaults)
    args = replace(args, **{flag: str(directory)})  # and derives the sizes anew
    if flag == "resume":
        check_resumed_args(args, saved, checkpoint)
    return args, checkpoint


def check_resumed_args(args: Args, saved: dict[str, Any], checkpoint: dict[str, Any]) -> None:
    for name, value in saved.items():
        if name not in FREE_ON_RESUME and getattr(args, name) != value:
            flag = f"--{name.replace('_', '-')} {getattr(args, name)}"
            refuse(f"{flag} must be {value}, as in the run to resume.")
    total = f"--total-timesteps {args.total_timesteps}"
    if args.total_timesteps < saved["total_timesteps"]:
        refuse(f"{total} must be at least {saved['total_timesteps']}, as in the run to resume.")
    if args.anneal_lr and args.total_timesteps != saved["total_timesteps"]:
        refuse(f"{total} must be {saved['total_timesteps']}: --anneal-lr has reached 0 by then.")
    # a run that was killed after its last checkpoint has only its result left to write
    finished = Path(args.resume, "result.json").exists()
    if args.num_iterations < checkpoint["iteration"] + finished:
        refuse(f"{total} must be raised: {args.resume} is finished.")


def evaluate_run(args: Args, checkpoint: dict[str, Any]) -> None:
    """--evaluate RUN: prints and writes an evaluation of a saved run."""
    path = Path(args.evaluate, f"evaluation_{time.time_ns() // 10**6}.json")
    video = path.parent / "videos" / path.stem if args.capture_video else None
    device = choose_device(args)
    agent = make_agent(make_envs(args, 1, device), args).to(device)
    try:
        agent.load_state_dict(checkpoint["agent"])
    except RuntimeError as error:
        lines = str(error).splitlines()
        why = (lines[1:] or [str(error)])[0].strip()  # PyTorch's first line names but the class
        refuse(f"--evaluate {args.evaluate} has another network than these flags make: {why}")
    result = evaluate(agent, args, device, video)
    of_run = {"global_step": checkpoint["global_step"], "args": asdict(args)}
    for name, x in result.items():
        if name != "episodes":
            say(f"{name}: {x:.3f}")
    try:
        write_file(path, result | checkpoint["totals"] | of_run)
        say(f"every episode: {path}")
        for another in FINAL_EVALUATIONS:
            another(agent, args, device, path.parent, checkpoint["global_step"])
    except OSError as error:
        refuse(
            f"--evaluate {args.evaluate} cannot be written: {error.strerror or error}.", status=1
        )


def main() -> None:
    args, checkpoint = parse_args()
    check_args(args)
    if args.evaluate:
        evaluate_run(args, checkpoint)
        return
    if args.track and importlib.util.find_spec("wandb") is None:
        refuse("--track needs Weights and Biases: pip install wandb.")
    # TensorBoard's: the next add_scalar raises again what its writing thread met
    threading.excepthook = lambda _: None
    with claimed_run_dir(args) as directory:
        try:
            run = Run(args, directory, checkpoint)
            directory = run.dir  # process 0 has chosen it
            train(args, run)
        except Exception as error:  # a full disk, a dead environment, a loss that is not finite
            what = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(":. ")
            details = f"{directory}/error_{RANK}.txt has details"
            try:
                (directory / f"error_{RANK}.txt").write_text(traceback.format_exc())
            except OSError:
                details = f"{directory}/error_{RANK}.txt cannot be written"
            again = "there is no checkpoint to go on from"
            if (directory / "checkpoint.pt").exists():
                again = f"to go on: --resume {shlex.quote(str(directory))}"
            refuse(f"{what}. {details}; {again}", status=1)
    if WORLD > 1:  # gloo's threads can abort the interpreter's shutdown: skip it
        with contextlib.suppress(AttributeError, OSError, ValueError):
            sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
