"""Recurrent PPO + Robust Prioritized Level Replay (PLR-perp) on mazes, in one file.

    python ppo_robust_plr_minigrid.py                    # Robust PLR with the published settings
    python ppo_robust_plr_minigrid.py --curriculum plr   # PLR: also learns on new levels
    python ppo_robust_plr_minigrid.py --curriculum dr    # domain randomisation: new levels only
    python ppo_robust_plr_minigrid.py --curriculum accel --num-walls 0  # published: see README
    python ppo_robust_plr_minigrid.py --env-id MiniGrid-MultiRoom-N4-S5-v0  # any MiniGrid
    python ppo_robust_plr_minigrid.py --resume runs/RUN  # from the last checkpoint on
    torchrun --nproc-per-node 8 ppo_robust_plr_minigrid.py  # several GPUs, one curriculum
    python ppo_robust_plr_minigrid.py --evaluate runs/RUN --eval-episodes 1000 --capture-video

Robust PLR: Jiang et al., "Replay-Guided Adversarial Environment Design", 2021 (arXiv 2110.02439),
Algorithm 1. PLR: arXiv 2010.03934. ACCEL: Parker-Holder et al., "Evolving Curricula with
Regret-Based Environment Design", 2022 (arXiv 2203.01302). PPO and the names in this file: CleanRL.
Defaults: the 25-block configuration of dcd (github.com/facebookresearch/dcd).

To train on another environment, read Args, Agent, train() and make_envs(); what stands below the
banner "machinery" can stay as it is. A rollout starts fresh episodes, all on replayed levels or
all on new ones. Its end and a time limit count 0 from there on, as in dcd, and an episode that is
cut off is not scored. With --bootstrap-timeouts the critic's value counts at both, and the cut
episode is scored too (not by max_mc, learnability and regret, which need whole ones).
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the rest is imported is no error

import contextlib
import ctypes
import datetime
import errno
import fcntl
import functools
import importlib.util
import io
import itertools
import json
import math
import os
import re
import shlex
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import tyro
from minigrid.core.grid import Grid
from minigrid.core.world_object import Goal, Wall
from minigrid.envs.babyai.core import roomgrid_level
from minigrid.minigrid_env import MiniGridEnv
from PIL import Image, ImageDraw
from torch import Tensor, nn, optim
from torch.utils.data import default_convert
from torch.utils.tensorboard import SummaryWriter

from plr_sampler import LevelSampler

# gym's, of -v0 environments with a -v1
warnings.filterwarnings("ignore", ".*is out of date", DeprecationWarning)
# BabyAI's, "Sampling rejected" for each draft of a level that it throws away
roomgrid_level.print = lambda *words: None

SCORES = (
    "max_mc", "positive_value_loss", "value_l1", "gae",
    "one_step_td_error", "policy_entropy", "least_confidence", "min_margin",
    "learnability", "mna", "regret",
)  # fmt: skip
# levels (reset seeds) below are for training, those from here on for evaluation
FIRST_TEST_LEVEL = 2**30
FIRST_EDITED_LEVEL = 2**31  # from here on: mazes that were made by edits, with --curriculum accel
REPLAY_ONLY = ("robust_plr", "accel")  # the curricula that learn on replayed levels only
# "image" (N, width, height, 3) uint8 and "direction" (N,) int64, as MiniGrid gives them
Obs = dict[str, Tensor]


@dataclass
class Args:
    # Experiment
    exp_name: str = os.path.basename(__file__)[: -len(".py")]  # part of the default run_dir's name
    seed: int = 1  # decides everything random; evaluation has random streams of its own
    torch_deterministic: bool = True  # choose deterministic kernels; the CPU's always are
    cuda: bool = True  # train on the GPU if there is one
    track: bool = False  # log to Weights and Biases too: WANDB_PROJECT, WANDB_ENTITY name where
    run_dir: str | None = None  # default: runs/{env_id}__{exp_name}__{seed}__{time}
    checkpoint_interval: int = 50  # iterations between checkpoints (0: at the start and the end)
    resume: str | None = None  # go on with the run in this directory; --total-timesteps may grow

    # Environment
    env_id: str = "maze"  # mazes as tensors, or a registered MiniGrid environment's reset seeds
    num_walls: int = 25  # blocks placed in a maze, with replacement (DR beside ACCEL: 60, varied)
    vary_num_walls: bool = False  # draw each maze's number of blocks from 0 to --num-walls
    maze_size: int = 15  # cells along a side of a maze, border included
    max_steps: int | None = None  # time limit (mazes: 250; other environments: their own, or less)
    redraw_direction: bool = False  # draw the start direction at every reset, as dcd; mazes only
    compass: bool = True  # off: the agent's direction input is constant, as in dcd's training

    # PPO (dcd's 25-block configurations)
    total_timesteps: int = 250_000_000  # environment steps in full iterations, new levels included
    learning_rate: float = 1e-4  # of Adam
    num_envs: int = 32  # environments played side by side, on all GPUs together
    num_steps: int = 256  # steps per rollout: at least the time limit, to finish episodes
    anneal_lr: bool = False  # let the learning rate fall linearly to 0
    gamma: float = 0.995  # discount
    gae_lambda: float = 0.95  # lambda of the generalized advantage estimation
    num_minibatches: int = 1  # minibatches per epoch, each of whole environments
    update_epochs: int = 5  # epochs per rollout
    clip_coef: float = 0.2  # clip range of the policy ratio and of the value
    ent_coef: float = 0.01  # weight of the entropy bonus (the 60-block configurations: 0)
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # bound on the norm of the gradient
    target_kl: float | None = None  # end an iteration's epochs once approx_kl exceeds this
    bootstrap_timeouts: bool = False  # at a time limit and a rollout's end, count the value, not 0

    # Robust PLR
    # robust_plr, accel: learn on replayed levels only; plr: on all; dr: on new ones, no replay.
    # accel edits replayed mazes too, at first those of --num-walls (0: empty rooms)
    curriculum: Literal["robust_plr", "plr", "dr", "accel"] = "robust_plr"
    replay_prob: float = 0.5  # probability of a rollout on replayed levels, after --rho
    buffer_size: int = 4000  # levels kept for replay
    # estimate of a level's regret; the formulas stand at LEVEL SCORES in train(). regret is no
    # estimate but the true one, of mazes: what the others can be measured by
    score: Literal[SCORES] = "max_mc"
    gate_unsolved: bool = False  # levels never solved score 0: where many cannot be solved
    score_transform: Literal["constant", "max", "eps_greedy", "rank", "power", "softmax"] = "rank"
    temperature: float = 0.1  # of the transform (PLR's beta): lower is greedier
    staleness_coef: float = 0.3  # share of replay by staleness (PLR's rho)
    # P(replay): proportionate: min(fill, replay_prob); fixed: replay_prob
    replay_schedule: Literal["proportionate", "fixed"] = "proportionate"
    rho: float = 0.5  # fill of the buffer before any level is replayed
    nu: float | None = None  # 1 - replay_prob, as the Procgen script names it
    alpha: float = 1.0  # weight of a new score in a level's running mean (1: the last one counts)

    # ACCEL
    num_edits: int = 5  # cells drawn for the edit of a level, with replacement
    # the levels to edit. batch: that which each environment's replay rollout began with; lowest,
    # highest: the 4 of these with the lowest or highest mean return, num_envs / 4 children of each.
    # dcd's released code selects by lowest return minus value loss and calls it "easy"; until a fix
    # in 2023 it edited one level only, environment 0's
    accel_base: Literal["batch", "lowest", "highest"] = "batch"

    # Evaluation
    eval_interval: int = 250  # iterations between evaluations (0: only at the end)
    eval_episodes: int = 100  # episodes in each evaluation environment
    capture_video: bool = False  # write a GIF of an episode in each evaluation maze
    # --evaluate and the end of a run: the solved rate in the worst of so many random mazes (60
    # blocks, whatever the run's). 10000 as published: two minutes on 2 cores with a trained agent
    eval_worst: int = 0
    evaluate: str | None = None  # only evaluate the run in this directory, with its flags

    # Speed
    # bf16: faster on CPUs with AMX, slower on those that have neither it nor AVX512-BF16; on a GPU
    # it acts in bf16 and learns in tf32
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    compile: bool = False  # torch.compile the step of the mazes and the network's, to act
    cuda_graphs: bool = True  # on a GPU: launch recorded work at once; off to debug
    profile: bool = False  # print the phases' shares of time; trace the last iteration
    batch_size: int = field(init=False)
    minibatch_size: int = field(init=False)
    num_iterations: int = field(init=False)

    def __post_init__(self):
        self.batch_size = self.num_envs * self.num_steps
        self.minibatch_size = self.batch_size // max(self.num_minibatches, 1)
        self.num_iterations = self.total_timesteps // max(self.batch_size, 1)
        if self.env_id == "maze" and self.max_steps is None:
            self.max_steps = 250


def head(size: int, std: float) -> nn.Sequential:
    layers = nn.Sequential(nn.Linear(256, 32), nn.Tanh(), nn.Linear(32, size))
    for layer, gain in ((layers[0], math.sqrt(2)), (layers[2], std)):
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.constant_(layer.bias, 0.0)
    return layers


def pack_episodes(begins: Tensor) -> Tensor:
    """Sequence packing: each environment's episodes in one row, with a one-step gap between two in
    which the LSTM forgets, so that one call takes them all.

    begins (T, N) bool: obs[t] begins an episode, as obs[0] does everywhere. Returns the position
    step * N + row of each step, (T * N,) int64. The rows are as long as `packed_length` says.
    """
    T, N = begins.shape
    gaps_before = begins.long().cumsum(0) - 1
    step = torch.arange(T, device=begins.device)[:, None] + gaps_before
    row = torch.arange(N, device=begins.device)
    return (step * N + row).flatten()


def packed_length(begins: np.ndarray, multiple: int) -> int:
    """Of the rows of `pack_episodes`, begins (T, N) bool, rounded up to a multiple."""
    length = len(begins) + int(begins.sum(axis=0).max()) - 1
    return math.ceil(length / multiple) * multiple


class Agent(nn.Module):
    """dcd's network: a convolution, an LSTM of 256, a policy and a value head."""

    def __init__(self, envs: gym.vector.VectorEnv, precision: str = "fp32"):
        super().__init__()
        self.view = envs.single_observation_space["image"].shape
        w, h, c = self.view
        self.bf16 = precision == "bf16"
        self.num_actions = int(envs.single_action_space.n)
        self.conv = nn.Conv2d(c, 16, kernel_size=3)
        self.direction = nn.Embedding(4, 5)
        nn.init.uniform_(self.direction.weight, -0.5, 0.5)  # as the weights of dcd's linear layer
        inputs = 16 * (w - 2) * (h - 2) + 5 + 1  # convolution, direction, the mark of a gap
        # padded to a multiple of 32 (AMX tiles): bf16 is faster so
        self.lstm = nn.LSTM(math.ceil(inputs / 32) * 32, 256)
        for name, parameter in self.lstm.named_parameters():
            if "weight" in name:
                nn.init.orthogonal_(parameter, 1.0)
            else:
                nn.init.constant_(parameter, 0.0)
        # The last input is 1 in a gap between packed episodes, where the gates i and f are
        # sigmoid(-1e4) = 0, which resets the state; saturated, so these weights are never trained.
        self.lstm.weight_ih_l0.data[: 2 * 256, -1] = -1e4
        self.actor = head(self.num_actions, std=0.01)
        self.critic = head(1, std=1.0)
        self.step_weights: list[Tensor] = []

    def conv_matrix(self) -> tuple[Tensor, Tensor]:
        """The convolution of pixels / 10 as a matrix product, faster for so few pixels: weight
        (75, 144) and bias (144,) for 5 x 5 views."""
        w, h, c = self.view
        one_hot = torch.eye(w * h * c, device=self.conv.weight.device)
        one_hot = one_hot.view(-1, w, h, c).permute(0, 3, 1, 2)  # "bwhc" -> "bcwh"
        weight = nn.functional.conv2d(one_hot, self.conv.weight / 10.0).flatten(1)
        return weight, self.conv.bias.repeat_interleave((w - 2) * (h - 2))

    @torch.no_grad()
    def prepare_to_act(self) -> None:
        """Makes what `act` multiplies by, once per rollout: weight and bias of the convolution, of
        the LSTM (gates i, f, o, g), of the heads' first and of their second layer."""
        conv, conv_bias = self.conv_matrix()
        inputs = conv.shape[1] + 5
        lstm = torch.cat((self.lstm.weight_ih_l0[:, :inputs], self.lstm.weight_hh_l0), dim=1)
        i, f, g, o = lstm.chunk(4)
        lstm = torch.cat((i, f, o, g)).t().contiguous()
        i, f, g, o = (self.lstm.bias_ih_l0 + self.lstm.bias_hh_l0).chunk(4)
        lstm_bias = torch.cat((i, f, o, g))
        weights = [conv, conv_bias, lstm, lstm_bias]
        if self.bf16:
            weights = [x.bfloat16() for x in weights]
        actor, critic = self.actor, self.critic
        first = torch.cat((actor[0].weight, critic[0].weight)).t().contiguous()
        first_bias = torch.cat((actor[0].bias, critic[0].bias))
        second = torch.block_diag(actor[2].weight, critic[2].weight).t().contiguous()
        second_bias = torch.cat((actor[2].bias, critic[2].bias))
        weights += [first, first_bias, second, second_bias]
        if not self.step_weights:
            self.step_weights = weights
        for fixed, x in zip(self.step_weights, weights):
            fixed.copy_(x)

    @torch.no_grad()
    def act(
        self, obs: Obs, state: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
        """A step of N environments. state (2, N, 256): h and c; noise (N, actions) of Exp(1).

        Returns action (N,), value (N,), normalised logits (N, actions) and the next h and c.
        """
        conv, conv_bias, lstm, lstm_bias, *heads = self.step_weights
        first, first_bias, second, second_bias = heads
        h, c = state
        with torch.autocast(conv.device.type, torch.bfloat16, enabled=self.bf16):
            x = torch.relu(torch.addmm(conv_bias, obs["image"].flatten(1).float(), conv))
            x = torch.cat((x, self.direction(obs["direction"]), h), dim=1)
            gates = torch.addmm(lstm_bias, x, lstm).float()
        i, f, o = torch.sigmoid(gates[:, : 3 * 256]).chunk(3, dim=1)
        g = torch.tanh(gates[:, 3 * 256 :])
        c = f * c + i * g
        h = o * torch.tanh(c)
        hidden = torch.tanh(torch.addmm(first_bias, h, first))
        out = torch.addmm(second_bias, hidden, second)
        logits = out[:, :-1].log_softmax(-1)
        # Exponential race (Gumbel-max without logarithms): argmax p / E is a sample of p
        action = (logits.exp() / noise).argmax(-1)
        return action, out[:, -1], logits, (h, c)

    def evaluate_actions(
        self, image: Tensor, direction: Tensor, begins: Tensor, length: int, action: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A whole rollout, to learn from: image (T, N, 5, 5, 3), direction, begins and action
        (T, N), and the `packed_length` -> log-probability, entropy and value (T, N)."""
        position = pack_episodes(begins)
        conv, conv_bias = self.conv_matrix()
        # bf16 on CPUs only: a GPU's autocast runs LSTMs in float16, which is too coarse
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16 and not image.is_cuda):
            pixels = image.flatten(0, 1).flatten(1).float()
            x = torch.relu(torch.addmm(conv_bias, pixels, conv))
            x = torch.cat((x, self.direction(direction.flatten()).to(x.dtype)), dim=1)
            x = nn.functional.pad(x, (0, self.lstm.input_size - x.shape[1]))
            gap = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)[-1]
            packed = gap.repeat(length * image.shape[1], 1).index_copy_(0, position, x)
            hidden, _ = self.lstm(packed.view(length, -1, len(gap)))
        hidden = hidden.flatten(0, 1).float()
        logits = self.actor(hidden).index_select(0, position).log_softmax(-1)
        logits = logits.view(*action.shape, -1)
        logprob = logits.gather(-1, action[..., None]).squeeze(-1)
        entropy = -(logits.exp() * logits).sum(-1)
        value = self.critic(hidden).squeeze(-1).index_select(0, position).view(action.shape)
        return logprob, entropy, value


def make_agent(envs: gym.vector.VectorEnv, args: Args) -> Agent:
    return Agent(envs, args.precision)


def ppo_loss(
    agent: Agent,
    args: Args,
    mb_images: Tensor,
    mb_directions: Tensor,
    mb_begins: Tensor,
    length: int,
    mb_actions: Tensor,
    mb_logprobs: Tensor,
    mb_advantages: Tensor,
    mb_returns: Tensor,
    mb_values: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's loss of a minibatch of whole environments, or of this process's part of it: mb_images
    (T, M, 5, 5, 3), the others (T, M), the advantages normalised; length: `packed_length`.
    Returns the loss, and what is logged of it."""
    newlogprob, entropy, newvalue = agent.evaluate_actions(
        mb_images, mb_directions, mb_begins, length, mb_actions
    )
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
    return loss, {
        "value_loss": v_loss.detach(),
        "policy_loss": pg_loss.detach(),
        "entropy": entropy_loss.detach(),
        "old_approx_kl": old_approx_kl,
        "approx_kl": approx_kl,
        "clipfrac": clipfrac,
    }


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
    optimizer = make_optimizer(agent, args, device)
    sampler = make_sampler(args)
    editor = Editor(args, envs) if args.curriculum == "accel" else None

    # ---- storage on the device: this process's environments ----
    next_obs, _ = envs.reset(seed=0)  # every later observation is copied to these tensors
    images = next_obs["image"].new_zeros((T, *next_obs["image"].shape))  # of the same dtype
    directions = torch.zeros((T, n), dtype=torch.int64, device=device)
    begins = torch.zeros((T, n), device=device)  # 1: images[t] begins an episode
    actions = torch.zeros((T, n), dtype=torch.int64, device=device)
    logits = torch.zeros((T, n, agent.num_actions), device=device)  # normalised: log-probabilities
    logprobs = torch.zeros((T, n), device=device)
    values = torch.zeros((T + 1, n), device=device)  # values[T]: of what follows the rollout
    noise = torch.zeros((N, agent.num_actions), device=device)  # the same in every process
    next_begins = torch.ones(n, device=device)
    lstm_state = torch.zeros((2, n, 256), device=device)  # h and c
    own_rewards = torch.zeros((T, n), device=device)
    next_timeouts = torch.zeros(n, device=device)  # 1: a time limit ended the episode before
    final_values = torch.zeros((T, n), device=device)  # of what followed a time limit
    step_on_device = torch.zeros(1, dtype=torch.int64, device=device)
    b_targets = torch.zeros((3, T, N), device=device)  # advantages, returns, values, of all
    losses = torch.zeros(len(LOSSES), device=device)  # summed over the minibatches

    # ---- storage on the CPU: all environments ----
    dones = np.zeros((T, N), bool)  # dones[t], set before step t: obs[t] begins an episode
    levels = np.zeros((T, N), np.int64)  # levels[t]: the level that obs[t] belongs to
    run.storage = {"images": images, "directions": directions, "actions": actions}
    run.storage |= {"logits": logits, "values": values, "rewards": own_rewards, "levels": levels}

    @functools.partial(maybe_compile, args=args)
    def decide_and_step() -> None:
        """A step of the policy and of the environments, which goes into the storage."""
        state = lstm_state * (1.0 - next_begins[:, None])
        action, value, logit, next_state = agent.act(next_obs, state, noise[own])
        seen = ((images, next_obs["image"]), (directions, next_obs["direction"]))
        decided = ((actions, action), (logits, logit), (values, value))
        for storage, x in (*seen, (begins, next_begins), *decided):
            storage.index_copy_(0, step_on_device, x[None])
        phase("environment")
        obs, reward, terminations, truncations, _ = envs.step(action)
        own_rewards.index_copy_(0, step_on_device, reward[None])
        step_on_device.add_(1)
        overwrite(next_obs, obs)
        next_begins.copy_(terminations | truncations)
        next_timeouts.copy_(truncations & ~terminations)
        lstm_state.copy_(torch.stack(next_state))

    @functools.partial(CudaGraph, enabled=run.graphs and isinstance(envs, MazeEnvs))
    def act_and_step() -> None:
        noise.exponential_()
        decide_and_step()

    @functools.partial(CudaGraph, enabled=run.graphs and WORLD == 1)  # without communication
    @deterministic_gradients(args)
    def learn(mb_envs: Tensor, *, length: int) -> Tensor:
        """A step of the optimizer, from the rollouts of the environments mb_envs; approx_kl."""
        mb_advantages, mb_returns, mb_values = b_targets[:, :, mb_envs]
        mb_advantages = (mb_advantages - mb_advantages.mean()) / (mb_advantages.std() + 1e-8)
        mine, mb_inds = part_of_minibatch(mb_envs, n)
        seen = (images[:, mb_inds], directions[:, mb_inds], begins[:, mb_inds], length)
        decided = (actions[:, mb_inds], logprobs[:, mb_inds])
        targets = (mb_advantages[:, mine], mb_returns[:, mine], mb_values[:, mine])
        loss, parts = ppo_loss(agent, args, *seen, *decided, *targets)
        optimizer.zero_grad()
        loss.backward()
        all_reduce_gradients(agent)
        grad_norm = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
        optimizer.step()
        parts["grad_norm"] = grad_norm / WORLD
        losses.add_(torch.stack([parts[name] for name in LOSSES]))
        return parts["approx_kl"]

    # ---- start, or go on where the checkpoint is ----
    run.parts = {"agent": agent, "optimizer": optimizer, "sampler": sampler}
    run.parts |= {"editor": editor} if editor else {}
    run.totals = {"gradient_updates": 0, "untrained_steps": 0}
    run.restore(envs, own)

    for iteration in run.iterations(envs):
        if args.anneal_lr:
            frac = 1.0 - (iteration - 1.0) / args.num_iterations
            optimizer.param_groups[0]["lr"].fill_(frac * args.learning_rate)

        # ---- rollout ----
        # ACCEL: after a replay rollout one on new levels that are edits of what it replayed, (N,)
        children = editor.children(sampler) if editor else None
        # Algorithm 1: otherwise the decision d, one for all environments
        replay = children is None and sampler.decide_replay()
        # d = 0: a new level for each environment. d = 1: a level each from the buffer, by P_replay
        next_done = np.ones(N, bool)
        sampler.drop(next_done)  # the episodes that the last rollout cut off
        next_levels = sampler.next_levels(next_done, replay, children)  # (N,) int64
        overwrite(next_obs, envs.reset(seed=next_levels[own].tolist())[0])
        next_begins.fill_(1.0)
        agent.prepare_to_act()
        final_values.zero_()
        step_on_device.zero_()
        for step in range(0, args.num_steps):
            phase("inference")
            dones[step] = next_done
            levels[step] = next_levels
            act_and_step()
            phase("transfer")
            next_done = to_numpy(next_begins) > 0  # (N,) bool
            if next_done.any():
                if args.bootstrap_timeouts:
                    final_value = agent.act(next_obs, lstm_state, noise[own])[1]
                    final_values[step] = next_timeouts * final_value
                phase("sampler")
                # d = 0: the same level again. d = 1: another one (after the last step too, as dcd)
                again = None if replay else next_levels
                next_levels = sampler.next_levels(next_done, replay, again)
            if next_done[own].any():  # Gymnasium refuses a reset of none
                phase("environment")
                options = {"reset_mask": next_done[own]}
                overwrite(next_obs, envs.reset(seed=next_levels[own].tolist(), options=options)[0])

        # ---- advantages (GAE), of all environments ----
        phase("rest")
        ended = np.concatenate((dones[1:], next_done[None]))  # (T, N): step t ended its episode
        rewards = to_numpy(own_rewards)
        finished = finished_episodes(args, rewards, ended)
        sampler.record_returns(levels[ended], finished["return"])  # for three scores
        logprobs.copy_(logits.gather(-1, actions[..., None]).squeeze(-1))
        if args.bootstrap_timeouts:
            values[T] = agent.act(next_obs, lstm_state, noise[own])[1]
        b_values = to_numpy(values[:-1])
        deltas, advantages = gae(args, rewards, to_numpy(values), to_numpy(final_values), ended)
        returns = advantages + b_values
        run.require_finite("an advantage", advantages)

        # ---- LEVEL SCORES (Algorithm 1: the score S, then the buffer's update) ----
        # step_scores (T, N): the sampler averages them over each episode. Yours is one more line.
        best_returns = sampler.best_returns(levels).astype(np.float32)  # so far on the level
        probs = logits.exp()
        step_scores = {
            "max_mc": best_returns - b_values,  # regret, estimated
            "positive_value_loss": advantages.clip(min=0),
            "value_l1": np.abs(advantages),
            "gae": advantages,
            "one_step_td_error": np.abs(deltas),
            "policy_entropy": to_numpy(-(probs * logits).sum(-1) / math.log(agent.num_actions)),
            "least_confidence": to_numpy(1 - probs.amax(-1)),
            "min_margin": to_numpy(1 + probs.topk(2).values.diff(dim=-1).squeeze(-1)),
            "learnability": sampler.learnability(levels),
            "mna": negative_advantages(args, deltas, ended, device) * (best_returns > 0),
            "regret": true_regret(args, levels, ended, finished["return"], editor),
        }
        scores = step_scores[args.score] * (best_returns > 0 if args.gate_unsolved else 1)
        phase("sampler")
        sampler.update(levels, scores, ended, score_tails=not needs_whole_episodes(args))
        if editor and replay:
            editor.choose_parents(levels[0], levels[ended], finished["return"])

        # ---- update (PPO; Algorithm 1: if d = 1, update the policy) ----
        phase("update")
        b_targets.copy_(torch.from_numpy(np.stack((advantages, returns, b_values))))
        losses.zero_()
        updates = 0
        learns = replay or args.curriculum not in REPLAY_ONLY  # else there is nothing to compute
        for epoch in range(args.update_epochs if learns else 0):
            for mb_envs in deal_environments(N, args.num_minibatches):
                length = packed_length(dones[:, mb_envs], 1 if device.type == "cpu" else 32)
                approx_kl = learn(mb_envs.to(device), length=length)
                updates += 1
            if args.target_kl is not None and gather(approx_kl[None]).sum() > args.target_kl:
                break
        run.totals["gradient_updates"] += updates
        run.totals["untrained_steps"] += 0 if learns else args.batch_size

        # ---- log, evaluate, save ----
        row = log_row(run, losses, updates, finished, sampler, returns, b_values)
        row |= score_correlations(args, step_scores, levels, ended)
        run.log_iteration(row | level_metrics(args, sampler, levels[dones], replay, editor))
        if run.evaluation_due():
            run.log_evaluation(evaluate(agent, args, device, run.video()))
            run.log_pictures(lambda: level_pictures(args, sampler, run.iteration, editor))
        run.end_iteration(envs)
    run.finish(envs, lambda: evaluate(agent, args, device))


# ---- advantages, level scores --------------------------------------------------------------------


def gae(
    args: Args,
    rewards: np.ndarray,
    values: np.ndarray,
    final_values: np.ndarray,
    ended: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """TD errors and advantages (T, N) float32. rewards (T, N), values (T + 1, N), final_values
    (T, N): what counts after the end of an episode, ended (T, N) bool: the step ended one."""
    nextnonterminal = 1.0 - ended.astype(np.float32)
    nextvalues = values[1:] * nextnonterminal + final_values
    deltas = rewards + args.gamma * nextvalues - values[:-1]
    advantages = np.zeros_like(deltas)
    lastgaelam = np.zeros_like(deltas[0])
    for t in reversed(range(len(deltas))):
        lastgaelam = deltas[t] + args.gamma * args.gae_lambda * nextnonterminal[t] * lastgaelam
        advantages[t] = lastgaelam
    return deltas, advantages


def negative_advantages(
    args: Args, deltas: np.ndarray, ended: np.ndarray, device: torch.device
) -> np.ndarray:
    """Maximised negative advantages, Mead et al. 2026 (arXiv 2601.14957), without their factor
    (1 if the level was ever solved, else 0): TD errors (T, N), ended (T, N) bool -> (T, N) float32,
    at least 0.

    Of step t, with K steps to the end of its episode or of the rollout: n-step advantages that are
    never above 0, G_0 = 0, G_n = min(0, G_(n-1) + gamma^(n-1) delta_(t+n-1)), mixed as in GAE,
    (1 - lambda) (G_1 + lambda G_2 + ... + lambda^(K-2) G_(K-1)) + lambda^(K-1) G_K, and negated.
    That is minus the sum of lambda^(n-1) (G_n - G_(n-1)).
    """
    T = len(deltas)
    delta = torch.from_numpy(deltas).to(device)
    goes_on = torch.from_numpy(~ended).to(device).float()
    g = torch.zeros_like(delta)
    in_episode = torch.ones_like(delta)  # 1: step t + n belongs to the episode of step t
    mixed = torch.zeros_like(delta)
    for n in range(longest_episode(ended)):
        rest = slice(T - n)  # the steps t for which there is a step t + n
        before = g[rest]
        g = torch.addcmul(before, in_episode[rest], delta[n:], value=args.gamma**n).clamp_(max=0)
        mixed[rest].add_(g - before, alpha=args.gae_lambda**n)
        in_episode = in_episode[rest] * goes_on[n:]
    return (-mixed).clamp(min=0).cpu().numpy()  # not below 0 by rounding


def longest_episode(ended: np.ndarray) -> int:
    """Steps of it, ended (T, N) bool; the rollout ends one everywhere."""
    lasts = np.concatenate((ended[:-1], np.ones_like(ended[:1]))).T.ravel()
    return int(np.diff(np.flatnonzero(lasts), prepend=-1).max())


def true_regret(
    args: Args,
    levels: np.ndarray,
    ended: np.ndarray,
    returns: np.ndarray,
    editor: "Editor | None" = None,
) -> np.ndarray:
    """Of each step's maze, (T, N) float64: the best possible return minus the mean return of its
    episodes that ended in the rollout. 0 for a maze that cannot be solved in time; nan where the
    best possible return is not known: in registered environments, or where episodes on one maze
    start in different directions.

    levels (T, N) int64, ended (T, N) bool, returns: those of levels[ended].
    """
    if args.env_id != "maze" or args.redraw_direction:
        return np.full(levels.shape, np.nan)
    played, which = np.unique(levels, return_inverse=True)
    best = best_possible_returns(mazes_of(args, played, editor), args.max_steps)
    regrets = best - mean_returns(played, levels[ended], returns)
    return regrets[which].reshape(levels.shape)


def best_possible_returns(mazes: "Mazes", max_steps: int) -> np.ndarray:
    """(n,) float32, by `fewest_actions`: of an agent that sees the whole maze, so more than one
    that has to search can hope for. 0 where the goal cannot be reached in time."""
    actions = fewest_actions(mazes)
    in_time = (actions >= 0) & (actions <= max_steps)
    return np.where(in_time, 1 - 0.9 * (actions / max_steps), 0).astype(np.float32)


def score_correlations(
    args: Args, step_scores: dict[str, np.ndarray], levels: np.ndarray, ended: np.ndarray
) -> dict[str, float]:
    """More of a row of progress.csv, for mazes: how each score, (T, N), ranks the levels of the
    rollout's first 256 environments beside true regret. Spearman's rank correlation.

    A level's score is the mean over its whole episodes of the mean over their steps. nan: all
    levels are equal, or there is no buffer that remembers returns.
    """
    if args.env_id != "maze":
        return {}
    ended = ended[:, :256].T.ravel()  # one environment after another
    lasts = ended | (np.arange(len(ended)) % len(levels) == len(levels) - 1)
    ends = np.flatnonzero(lasts)
    starts = np.append(0, ends[:-1] + 1)
    whole = ended[ends]
    played, level = np.unique(levels[:, :256].T.ravel()[ends[whole]], return_inverse=True)
    of_levels = {}
    for name, x in step_scores.items():
        sums = np.add.reduceat(x[:, :256].T.ravel(), starts)
        means = (sums / (ends - starts + 1))[whole]
        of_levels[name] = np.bincount(level, means) / np.bincount(level)
    regret = of_levels.pop("regret")
    correlations = {name: rank_correlation(x, regret) for name, x in of_levels.items()}
    if args.curriculum == "dr":
        correlations |= dict.fromkeys(("max_mc", "learnability", "mna"), math.nan)
    return {f"curriculum/correlation_{name}": x for name, x in correlations.items()}


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's, of (n,) and (n,): Pearson's of the ranks, ties sharing theirs. nan if all of x or
    all of y are equal."""
    x, y = centred_ranks(x), centred_ranks(y)
    norm = math.sqrt((x @ x) * (y @ y))
    return float(x @ y / norm) if norm else math.nan


def centred_ranks(x: np.ndarray) -> np.ndarray:
    """(n,) float64, 0 on average; what differs by less than 1e-6 or so, by rounding, is equal."""
    _, which, counts = np.unique(x.round(6), return_inverse=True, return_counts=True)
    mean_ranks = np.cumsum(counts) - (counts - 1) / 2
    return mean_ranks[which] - (len(x) + 1) / 2


# ---- curriculum, minibatches, log ----------------------------------------------------------------


def make_sampler(args: Args) -> LevelSampler:
    options = {
        "num_envs": args.num_envs,
        "seed": args.seed,
        "level_space": FIRST_TEST_LEVEL,
    }
    if args.curriculum == "dr":  # no buffer: every level is a new one
        return LevelSampler(curriculum="uniform", **options)
    return LevelSampler(
        buffer_size=args.buffer_size,
        score_transform=args.score_transform,
        temperature=args.temperature,
        staleness_coef=args.staleness_coef,
        replay_schedule=args.replay_schedule,
        rho=args.rho,
        nu=1 - args.replay_prob if args.nu is None else args.nu,
        alpha=args.alpha,
        **options,
    )


def deal_environments(N: int, num_minibatches: int) -> Tensor:
    """(num_minibatches, N / num_minibatches) int64, a minibatch's environments in each row: of
    every num_minibatches environments in a row each gets one, so equally many of each process."""
    groups = torch.arange(0, N, num_minibatches)[:, None]
    order = torch.rand(len(groups), num_minibatches).argsort(dim=1)
    return (groups + order).T


def part_of_minibatch(mb_envs: Tensor, n: int) -> tuple[Any, Tensor]:
    """Which environments of a minibatch are this process's, and where these are in its own storage
    (T, n). All of them, where they are, without torchrun."""
    if WORLD == 1:
        return slice(None), mb_envs
    mine = mb_envs // n == RANK
    return mine, mb_envs[mine] - RANK * n


def overwrite(fixed: Obs, obs: Obs) -> None:
    """Copies an observation to where a CUDA graph reads it; nothing to do if it is there."""
    for key, x in obs.items():
        fixed[key].copy_(x)


def finished_episodes(args: Args, rewards: np.ndarray, ended: np.ndarray) -> dict[str, np.ndarray]:
    """rewards (T, N) float32, ended (T, N) bool -> return and length of the episodes that ended,
    in order of time and environment."""
    if needs_whole_episodes(args) and not ended.any(axis=0).all():
        # check_environment tried a few levels; this one has a longer time limit
        say_once(f"a level was not scored: its time limit is above --num-steps {args.num_steps}")
    none_before = np.zeros(rewards.shape[1])
    returns, _ = running_sums(none_before, rewards, ended)
    lengths, _ = running_sums(none_before, np.ones_like(rewards), ended)
    return {"return": returns[ended], "length": lengths[ended]}


def describe(args: Args) -> str:
    return f"{args.env_id}, {args.curriculum}"


def notes(run: "Run", sampler: LevelSampler) -> list[str]:
    """For the line on the screen."""
    updates = f"{run.totals['gradient_updates']:,} updates"
    fill = sampler.num_seen / max(len(sampler.levels), 1)
    if run.args.curriculum in REPLAY_ONLY and fill < run.args.rho:
        updates += f", filling the level buffer: {fill:.0%} of {run.args.rho:.0%}"
    return [updates]


def log_row(
    run: "Run",
    losses: Tensor,
    updates: int,
    finished: dict[str, np.ndarray],
    sampler: LevelSampler,
    returns: np.ndarray,
    values: np.ndarray,
) -> dict[str, float]:
    """A row of progress.csv, whose columns lack the group ("charts/"); nan: nothing to measure.

    `Run.log_iteration` adds charts/SPS, and charts/gradient_updates and charts/untrained_steps:
    optimizer steps, and environment steps that nothing was learned from, so far.
    """
    run.notes = notes(run, sampler)
    return {
        # of the episodes that ended in this iteration: mean return, mean length, the share with a
        # return above 0 (a short episode makes room for another: easy levels count more), how many
        "charts/episodic_return": mean_or_nan(finished["return"]),
        "charts/episodic_length": mean_or_nan(finished["length"]),
        "charts/solved_rate": mean_or_nan(finished["return"] > 0),
        "charts/episodes": len(finished["return"]),
        "charts/learning_rate": float(run.parts["optimizer"].param_groups[0]["lr"]),
        # value_loss, policy_loss, entropy, grad_norm (before clipping), old_approx_kl, approx_kl,
        # clipfrac (share of samples beyond the clip range): means over the minibatches
        **{f"losses/{name}": x for name, x in run.mean_losses(losses, updates).items()},
        # of the returns by the values; 1 is perfect
        "losses/explained_variance": explained_variance(values, returns),
        # see LevelSampler.metrics; seen_share is the buffer's fill
        **{f"curriculum/{name}": x for name, x in sampler.metrics().items()},
    }


def level_metrics(
    args: Args,
    sampler: LevelSampler,
    levels: np.ndarray,
    replay: bool,
    editor: "Editor | None" = None,
) -> dict[str, float]:
    """More of a row of progress.csv. levels (n,): of the episodes that began in the rollout."""
    scores = sampler.scores[sampler.seen]
    if not len(scores):
        scores = np.zeros(1)
    metrics = {
        "curriculum/replay": int(replay),  # 1: the rollout replayed levels, 0: it played new ones
        # quantiles of the scores in the buffer
        "curriculum/score_q10": float(np.percentile(scores, 10)),
        "curriculum/score_q50": float(np.percentile(scores, 50)),
        "curriculum/score_q90": float(np.percentile(scores, 90)),
    }
    if args.env_id != "maze":
        return metrics
    # What the mazes of the first 256 episodes are like: walls, cells from the agent to the goal
    # where there is a path, share with a path. New and edited ones count once, replayed ones as
    # often as they were drawn; the columns of the other kinds are nan.
    played, counts = np.unique(levels[:256], return_counts=True)
    if not replay:
        counts = np.ones_like(counts)
    mazes = mazes_of(args, played, editor)
    paths = shortest_paths(mazes).repeat(counts)
    walls = mazes.walls.sum((1, 2)).repeat(counts)
    solvable = paths > 0
    of_mazes = {"walls": walls, "shortest_path": paths[solvable], "solvable": solvable}
    kind = "replayed" if replay else "edited" if played[-1] >= FIRST_EDITED_LEVEL else "new"
    kinds = ("new", "replayed", "edited") if editor else ("new", "replayed")
    for name, x in of_mazes.items():
        for column in kinds:
            metrics[f"curriculum/{name}_{column}"] = mean_or_nan(x) if column == kind else math.nan
    if editor:
        # how often in a row a level was edited, 0 if never: means over the replayed ones and over
        # the buffer; and how many levels have been made by edits so far
        lineage = editor.lineage(played).repeat(counts)
        metrics["curriculum/lineage_replayed"] = mean_or_nan(lineage) if replay else math.nan
        of_buffer = editor.lineage(sampler.levels[sampler.seen])
        metrics["curriculum/lineage_buffer"] = mean_or_nan(of_buffer)
        metrics["curriculum/children"] = editor.next_level - FIRST_EDITED_LEVEL
    return metrics


def level_pictures(
    args: Args, sampler: LevelSampler, iteration: int, editor: "Editor | None" = None
) -> dict[str, np.ndarray]:
    """(H, W, 3) uint8 of four levels each: the highest scores, the likeliest to be replayed, and
    freshly drawn ones."""
    rng = np.random.default_rng([args.seed, 3, iteration])
    levels = {"fresh": rng.integers(FIRST_TEST_LEVEL, size=4)}
    best = min(4, sampler.num_seen)
    if best:
        scores = np.where(sampler.seen, sampler.scores, -np.inf)
        levels["highest_score"] = sampler.levels[np.argsort(-scores)[:best]]
        levels["highest_weight"] = sampler.levels[np.argsort(-sampler.weights())[:best]]
    envs = make_envs(args, 1, torch.device("cpu"))
    if editor:
        editor.serve(envs)
    scores = dict(zip(sampler.levels.tolist(), sampler.scores.tolist()))
    pictures = {}
    for name, group in levels.items():
        frames = []
        for level in group.tolist():
            envs.reset(seed=[level])
            score = f"score {scores[level]:.3f}" if level in scores else "no score"
            frames.append(with_caption(envs.frame(), f"level {level}\n{score}"))
        height = max(len(frame) for frame in frames)  # a level's size may depend on its seed
        frames = [np.pad(x, ((0, height - len(x)), (0, 0), (0, 0))) for x in frames]
        pictures[f"levels/{name}"] = np.concatenate(frames, axis=1)
    return pictures


def with_caption(frame: np.ndarray, text: str) -> np.ndarray:
    """(H, W, 3) uint8 -> two lines of text below it."""
    picture = Image.new("RGB", (frame.shape[1], frame.shape[0] + 36))
    picture.paste(Image.fromarray(frame))
    ImageDraw.Draw(picture).text((4, frame.shape[0] + 4), text, fill="white")
    return np.asarray(picture)


# ---- levels and environments ---------------------------------------------------------------------

TILE = 24  # pixels along a cell's side in pictures
VIEW = 5  # the agent sees VIEW x VIEW cells, itself in the middle of the last row
# A cell as MiniGrid shows it: object, colour, state, packed with a zero byte into one int32, which
# gathers faster
CELLS = np.array([[1, 0, 0, 0], [2, 5, 0, 0], [8, 1, 0, 0]], np.uint8)
EMPTY, WALL, GOAL = CELLS.view(np.int32)[:, 0].tolist()
AHEAD = ((0, 1), (1, 0), (0, -1), (-1, 0))  # (row, column) of a step east, south, west, north

# The published evaluation mazes, without their border: > agent facing east, # wall, G goal, g one
# of the possible goals
MAZES = """
SixteenRooms  Labyrinth     Labyrinth2    Maze          Maze2
...#..#..#... ............. >#........... .....#>...#.. ...#.#....#..
.>.......#... .###########. .#.#########. .###.####.##. .#.#.####...#
...#..#...... .#.........#. .#.#.......#. .#........... .#........#..
#.###.##.###. .#.#######.#. .#.#.#####.#. .########.### .########.###
...#......... .#.#.....#.#. .#.#.#...#.#. ........#.... ...#..#.#.#.G
......#..#... .#.#.###.#.#. ...#.#.#.#.#. ######.#####. ##.#.##.#.#..
##.#.##.###.# .#.#.#G#.#.#. ####.#G#.#.#. ....#..#..... >#.#....#.##.
...#.....#... .#.#.#.#.#.#. ...#.###.#.#. .##...##.#### .#.##.###..#.
...#..#...... .#...#...#.#. .#.#.....#.#. ..#.#..#...#. .#..#..###.#.
.####.##.#.## .#########.#. .#.#######.#. #.#.##.###.#. .##.##.#.#.#.
...#..#..#... .....#.....#. .#.........#. #.#..#...#... .#...#.#.#.#.
......#....G. ####.#.#####. .###########. #.##.###.###. .#.#.#.#.#.#.
...#.....#... >....#....... ............. ...#..G#.#... ...#...#.....

SmallCorridor SixteenRoomsFewerDoors Maze3
............. ...#.....#...          ...>#.#......
.#.#.#.#.#.#. .>....#..#...          .####.#.####.
.#.#.#.#.#.#. ...#..#..#...          .#....#.#....
.#.#.#.#.#.#. ####.##.###.#          ...####.#.#.#
.#.#.#.#.#.#. ...#..#......          ##.#....#.#..
.#g#g#g#g#g#. ......#..#...          ...#.##.#.##.
>###########. #.#####.#####          .#.#.#..#..#G
.#g#g#g#g#g#. ...#..#..#...          .#.#.#.###.##
.#.#.#.#.#.#. ...#.........          .#...#.#.#...
.#.#.#.#.#.#. ##.##.##.####          .###.#.#.###.
.#.#.#.#.#.#. ...#..#..#...          .#...#.#...#.
.#.#.#.#.#.#. ......#....G.          .#.###.#.#.#.
............. ...#..#..#...          .#...#...#...

LargeCorridor
...................
.#.#.#.#.#.#.#.#.#.
.#.#.#.#.#.#.#.#.#.
.#.#.#.#.#.#.#.#.#.
.#.#.#.#.#.#.#.#.#.
.#.#.#.#.#.#.#.#.#.
.#.#.#.#.#.#.#.#.#.
.#.#.#.#.#.#.#.#.#.
.#g#g#g#g#g#g#g#g#.
>#################.
.#g#g#g#g#g#g#g#g#.
.#.#.#.#.#.#.#.#.#.
.#.#.#.#.#.#.#.#.#.
.#.#.#.#.#.#.#.#.#.
.#.#.#.#.#.#.#.#.#.
.#.#.#.#.#.#.#.#.#.
.#.#.#.#.#.#.#.#.#.
.#.#.#.#.#.#.#.#.#.
...................
"""


def parse_mazes(text: str) -> dict[str, np.ndarray]:
    """Name -> (height, width) characters, of mazes drawn side by side under their names."""
    mazes = {}
    for block in text.strip().split("\n\n"):
        names, *rows = [line.split() for line in block.splitlines()]
        for i, name in enumerate(names):
            mazes[name] = np.array([list(row[i]) for row in rows])
    return mazes


NAMED_MAZES = parse_mazes(MAZES)


class Mazes(NamedTuple):
    """n levels. Cells are (row, column), the border not counted; directions 0 east, 1 south, 2
    west, 3 north."""

    walls: np.ndarray  # (n, height, width) bool
    goal: np.ndarray  # (n, 2) int64
    agent: np.ndarray  # (n, 2) int64
    direction: np.ndarray  # (n,) int64


def concatenate(mazes: list[Mazes]) -> Mazes:
    return Mazes(*[np.concatenate(parts) for parts in zip(*mazes)])


def random_integers(levels: np.ndarray, count: int) -> np.ndarray:
    """(n,) int64 -> (n, count) uint64 below 2**32, decided by each level alone: SplitMix64 (Steele
    et al. 2014)."""
    z = np.zeros((len(levels), count), np.uint64)
    for index in (levels[:, None], np.arange(count)):  # of the level; of the draw
        z += (index + 1).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return z >> np.uint64(32)


def random_mazes(levels: np.ndarray, size: int, num_walls: int, vary: bool = False) -> Mazes:
    """The maze of each level: blocks anywhere, the goal anywhere, the agent anywhere else, no block
    under those two."""
    n = len(levels)
    side = size - 2
    cells = side**2
    draws = random_integers(levels, num_walls + 4)

    def below(column: Any, bound: int) -> np.ndarray:
        return (draws[:, column] * np.uint64(bound) >> np.uint64(32)).astype(np.int64)

    goal = below(0, cells)
    agent = below(1, cells - 1)
    agent += agent >= goal
    direction = below(2, 4)
    blocks = below(slice(4, None), cells)  # (n, num_walls)
    if vary:  # the first 0 to num_walls of them; the others go to a cell that is cut off
        blocks[np.arange(num_walls) >= below(3, num_walls + 1)[:, None]] = cells
    rows = np.arange(n)
    walls = np.zeros((n, cells + 1), bool)
    walls[rows[:, None], blocks] = True
    walls[rows, goal] = False
    walls[rows, agent] = False
    return Mazes(
        walls[:, :cells].reshape(n, side, side),
        np.stack((goal // side, goal % side), axis=1),
        np.stack((agent // side, agent % side), axis=1),
        direction,
    )


def mazes_of(args: Args, levels: np.ndarray, editor: "Editor | None" = None) -> Mazes:
    """The mazes of levels (n,) int64, edited ones by their editor. ValueError if it lacks one."""
    mazes = random_mazes(levels, args.maze_size, args.num_walls, args.vary_num_walls)
    edited = levels >= FIRST_EDITED_LEVEL
    if editor:
        rows = editor.rows_of(levels[edited])
        for part, kept in zip(mazes, editor.mazes):
            part[edited] = kept[rows]
    return mazes


def named_maze(name: str, episode: int) -> Mazes:
    """One of NAMED_MAZES. Where it has several possible goals, the episodes take turns."""
    text = NAMED_MAZES[name]
    goals = np.argwhere(np.isin(text, ("G", "g")))
    goal = goals[episode % len(goals)]
    return Mazes((text == "#")[None], goal[None], np.argwhere(text == ">"), np.zeros(1, np.int64))


def perfect_maze(size: int, seed: int) -> Mazes:
    """A maze with one path between any two cells (depth-first search); agent and goal in random
    different cells."""
    rng = np.random.default_rng([size, seed])
    walls = np.ones((size - 2, size - 2), bool)
    path = [(0, 0)]
    while path:
        r, c = path[-1]
        walls[r, c] = False
        closed = []  # the cells two steps away that are not open yet
        for dr, dc in AHEAD:
            row, column = r + 2 * dr, c + 2 * dc
            if 0 <= min(row, column) and max(row, column) < size - 2 and walls[row, column]:
                closed.append((row, column))
        if closed:
            path.append(closed[rng.integers(len(closed))])
            walls[(r + path[-1][0]) // 2, (c + path[-1][1]) // 2] = False
        else:
            path.pop()
    cells = 2 * np.argwhere(~walls[::2, ::2])
    goal, agent = rng.permutation(cells)[:2]
    return Mazes(walls[None], goal[None], agent[None], rng.integers(4, size=1))


def shortest_paths(mazes: Mazes) -> np.ndarray:
    """(n,) int64 cells to go from the agent to the goal, by flood fill of all mazes at once; -1 if
    there is no path."""
    rows = np.arange(len(mazes.walls))
    free = ~mazes.walls
    reached = np.zeros_like(free)
    reached[rows, mazes.agent[:, 0], mazes.agent[:, 1]] = True
    steps = np.full(len(rows), -1)
    for distance in itertools.count():
        at_goal = reached[rows, mazes.goal[:, 0], mazes.goal[:, 1]]
        steps[(steps < 0) & at_goal] = distance
        grown = reached.copy()
        grown[:, 1:] |= reached[:, :-1]
        grown[:, :-1] |= reached[:, 1:]
        grown[:, :, 1:] |= reached[:, :, :-1]
        grown[:, :, :-1] |= reached[:, :, 1:]
        grown &= free
        if (grown == reached).all():
            return steps
        reached = grown


def fewest_actions(mazes: Mazes) -> np.ndarray:
    """(n,) int64 actions (left, right or forward) to take the agent to the goal, by flood fill over
    cells and directions of all mazes at once, one bit a maze; -1 if there is no path."""
    n, height, width = mazes.walls.shape
    rows = np.arange(n)
    word = rows // 64
    bit = np.uint64(1) << (rows % 64).astype(np.uint64)
    walls = np.pad(mazes.walls, ((0, -n % 64), (0, 0), (0, 0))).transpose(1, 2, 0)
    free = ~np.packbits(walls, axis=2, bitorder="little").view(np.uint64)  # (height, width, words)
    reached = np.zeros((4, *free.shape), np.uint64)  # by direction
    np.bitwise_or.at(reached, (mazes.direction, *mazes.agent.T, word), bit)
    actions = np.full(n, -1)
    for number in itertools.count():
        at_goal = (reached[:, *mazes.goal.T, word] & bit).any(axis=0)
        actions[(actions < 0) & at_goal] = number
        grown = reached | reached[[3, 0, 1, 2]] | reached[[1, 2, 3, 0]]  # right, left
        grown[0, :, 1:] |= reached[0, :, :-1]
        grown[1, 1:] |= reached[1, :-1]
        grown[2, :, :-1] |= reached[2, :, 1:]
        grown[3, :-1] |= reached[3, 1:]
        grown &= free
        if (actions >= 0).all() or (grown == reached).all():
            return actions
        reached = grown


def maze_view(cells: Tensor, position: Tensor, direction: Tensor, view: Tensor) -> Tensor:
    """(N, VIEW, VIEW, 3) uint8: what each agent sees, by column and row like MiniGrid's images."""
    seen = cells.take(position[:, None] + view.index_select(0, direction))  # (N, VIEW * VIEW)
    seen[:, VIEW // 2 * VIEW + VIEW - 1] = EMPTY  # MiniGrid does not show what the agent stands on
    return seen.view(torch.uint8).view(-1, VIEW, VIEW, 4)[..., :3]


class MazeEnvs(gym.vector.VectorEnv):
    """N mazes stepped at once on any device: a Gymnasium VectorEnv of tensors, without autoreset.

    Equal to MiniGridEnvs with agent_view_size=5 and see_through_walls=True. `reset` starts seed[i],
    or options["mazes"][i], in environment i where options["reset_mask"][i]. actions (N,) int64,
    rewards (N,) float32. Observations are overwritten by the next reset or step.

    direction_keys (N,) int64: each reset draws the start direction anew, decided by the
    environment's key and how many resets it has had, instead of the level's. compass: whether the
    observed direction is the agent's; else it is 0.
    """

    def __init__(
        self,
        num_envs: int,
        device: torch.device,
        size: int = 15,
        max_steps: int = 250,
        num_walls: int = 25,
        vary_num_walls: bool = False,
        cuda_graphs: bool = False,
        direction_keys: np.ndarray | None = None,
        compass: bool = True,
    ):
        self.num_envs = num_envs
        self.device = device
        self.max_steps = max_steps
        self.single_observation_space = gym.spaces.Dict(
            {
                "direction": gym.spaces.Discrete(4),
                "image": gym.spaces.Box(0, 255, (VIEW, VIEW, 3), np.uint8),
            }
        )
        self.single_action_space = gym.spaces.Discrete(7)
        batch = gym.vector.utils.batch_space
        self.observation_space = batch(self.single_observation_space, num_envs)
        self.action_space = batch(self.single_action_space, num_envs)
        self.metadata = {"autoreset_mode": gym.vector.AutoresetMode.DISABLED}
        # all maps one after another, each in VIEW - 1 cells of wall, so that no view leaves it
        self.width = size - 2 + 2 * (VIEW - 1)
        shape = (num_envs, self.width**2)
        self.cells = torch.full(shape, WALL, dtype=torch.int32, device=device)
        self.position = torch.zeros(num_envs, dtype=torch.int64, device=device)  # in all cells
        self.direction = torch.zeros(num_envs, dtype=torch.int64, device=device)
        self.steps = torch.zeros(num_envs, dtype=torch.float64, device=device)
        self.first_cells = torch.arange(num_envs, device=device) * self.width**2
        # by direction and action (left, right, forward, four that do nothing)
        turned = [(d + turn) % 4 for d in range(4) for turn in (-1, 1, 0, 0, 0, 0, 0)]
        ahead = [row * self.width + column for row, column in AHEAD]
        moved = [ahead[d] * (action == 2) for d in range(4) for action in range(7)]
        self.turned = torch.tensor(turned, device=device)  # (28,)
        self.moved = torch.tensor(moved, device=device)  # (28,)
        self.view = torch.tensor([self.view_cells(ahead, d) for d in range(4)], device=device)
        self.generate = functools.partial(
            random_mazes, size=size, num_walls=num_walls, vary=vary_num_walls
        )
        # starts of levels, and in which row of these tables a level's is
        rows = max(8192, num_envs)
        self.start_cells = torch.empty((rows, self.width**2), dtype=torch.int32, device=device)
        self.start_position = torch.empty(rows, dtype=torch.int64, device=device)
        self.start_direction = torch.empty(rows, dtype=torch.int64, device=device)
        self.row_of_level: dict[int, int] = {}
        self.cuda_graphs = cuda_graphs
        self._begin = CudaGraph(self._begin, enabled=cuda_graphs)
        # the observation, which each reset and step overwrites
        self.image = torch.zeros((num_envs, VIEW, VIEW, 3), dtype=torch.uint8, device=device)
        seen_direction = self.direction if compass else torch.zeros_like(self.direction)
        self.obs = {"image": self.image, "direction": seen_direction}
        self.direction_keys = direction_keys
        self.resets = np.zeros(num_envs, np.int64)

    @staticmethod
    def view_cells(ahead: list[int], d: int) -> list[int]:
        """Where the VIEW * VIEW cells are that an agent of direction d sees, from its own."""
        right = ahead[(d + 1) % 4]
        cells = []
        for column in range(VIEW):
            for row in range(VIEW):
                cells.append(ahead[d] * (VIEW - 1 - row) + right * (column - VIEW // 2))
        return cells

    def encode(self, mazes: Mazes) -> tuple[Tensor, Tensor, Tensor]:
        """n level starts: cells (n, width * width) int32, position in the map and direction (n,)
        int64."""
        border = VIEW - 1
        rows = np.arange(len(mazes.walls))
        cells = np.full((len(rows), self.width, self.width), WALL, np.int32)
        cells[:, border:-border, border:-border][~mazes.walls] = EMPTY
        cells[rows, border + mazes.goal[:, 0], border + mazes.goal[:, 1]] = GOAL
        agent = (border + mazes.agent[:, 0]) * self.width + border + mazes.agent[:, 1]
        cells = cells.reshape(len(rows), self.width**2)
        return torch.from_numpy(cells), torch.from_numpy(agent), torch.from_numpy(mazes.direction)

    def _store(self, first_row: int, mazes: Mazes) -> None:
        rows = slice(first_row, first_row + len(mazes.walls))
        cells, position, direction = self.encode(mazes)
        self.start_cells[rows] = cells.to(self.device)
        self.start_position[rows] = position.to(self.device)
        self.start_direction[rows] = direction.to(self.device)

    def _rows_of(self, levels: list[int]) -> list[int]:
        """Where the starts of these levels are in the tables; makes those that are not there."""
        new = [level for level in dict.fromkeys(levels) if level not in self.row_of_level]
        if len(self.row_of_level) + len(new) > len(self.start_cells):
            self.row_of_level = {}
            new = list(dict.fromkeys(levels))
        if new:
            first_row = len(self.row_of_level)
            self._store(first_row, self.generate(np.array(new)))
            self.row_of_level |= zip(new, range(first_row, first_row + len(new)))
        return [self.row_of_level[level] for level in levels]

    def get_state(self) -> list[int]:
        """What the start directions depend on: the number of resets, by environment."""
        return self.resets.tolist()

    def set_state(self, resets: list[int]) -> None:
        self.resets[:] = resets

    def _begin(self, rows: Tensor, direction: Tensor | None = None) -> None:
        """Starts what is in row rows[i] of the tables in environment i, nothing where that is -1:
        (N,) int64; direction (N,) int64 instead of the tables'. Work of a fixed shape, as a CUDA
        graph wants it."""
        begins = rows >= 0
        rows = rows.clamp(min=0)
        if direction is None:
            direction = self.start_direction.index_select(0, rows)
        position = self.start_position.index_select(0, rows) + self.first_cells
        start_cells = self.start_cells.index_select(0, rows)
        cells = torch.where(begins[:, None], start_cells, self.cells)
        self.cells.copy_(cells)
        self.position.copy_(torch.where(begins, position, self.position))
        self.direction.copy_(torch.where(begins, direction, self.direction))
        self.steps.mul_(~begins)
        self.image.copy_(maze_view(self.cells, self.position, self.direction, self.view))

    def reset(self, *, seed: Any = None, options: dict | None = None) -> tuple[Obs, dict]:
        options = options or {}
        mask = options.get("reset_mask", np.ones(self.num_envs, bool))
        rows = np.full(self.num_envs, -1)
        if "mazes" in options:
            self.row_of_level = {}
            self._store(0, Mazes(*[part[mask] for part in options["mazes"]]))
            rows[mask] = np.arange(np.count_nonzero(mask))
        else:
            if seed is None:
                seed = self.np_random.integers(FIRST_TEST_LEVEL)
            levels = np.asarray(seed)
            if levels.ndim == 0:
                levels = levels + np.arange(self.num_envs)
            rows[mask] = self._rows_of(levels[mask].tolist())
        self.resets += mask
        start = [rows]
        if self.direction_keys is not None:
            draws = random_integers(self.direction_keys + self.resets, 1)[:, 0]
            start.append((draws >> np.uint64(30)).astype(np.int64))  # the 2 highest bits of 32
        self._begin(*[torch.from_numpy(x).to(self.device) for x in start])
        return self.obs, {}

    def step(self, actions: Tensor) -> tuple[Obs, Tensor, Tensor, Tensor, dict]:
        actions = torch.as_tensor(actions, device=self.device)
        what = torch.add(actions, self.direction, alpha=7)
        wanted = self.position + self.moved.take(what)
        # an agent that stays finds its own cell: empty, or the goal
        found = self.cells.take(wanted)
        terminated = found == GOAL
        self.position.copy_(torch.where(found == WALL, self.position, wanted))
        self.direction.copy_(self.turned.take(what))
        self.steps.add_(1)
        reward = 1 - 0.9 * (self.steps / self.max_steps)  # float64 here, as in Python
        reward = (reward * terminated).float()
        self.image.copy_(maze_view(self.cells, self.position, self.direction, self.view))
        return self.obs, reward, terminated, self.steps >= self.max_steps, {}

    def frame(self) -> np.ndarray:
        """(H, W, 3) uint8: the first environment as the package draws it."""
        edge = VIEW - 2  # walls beyond the border
        row, column = divmod(int(self.position[0]), self.width)
        cells = self.cells[0].view(self.width, -1)[edge:-edge, edge:-edge].cpu().numpy()
        grid = Grid(*cells.shape)
        for r, c in np.argwhere(cells != EMPTY).tolist():
            grid.set(c, r, Goal() if cells[r, c] == GOAL else Wall())
        agent = (column - edge, row - edge)
        seen = np.zeros(cells.shape, bool)
        for cell in (self.view[self.direction[0]] + self.position[0]).tolist():
            r, c = divmod(cell, self.width)
            if edge <= min(r, c) and max(r, c) < self.width - edge:
                seen[c - edge, r - edge] = True
        return grid.render(TILE, agent, int(self.direction[0]), highlight_mask=seen)


class TensorEnvs(gym.vector.VectorWrapper):
    """A package's environments as the training loop sees them: tensors, and no mission, as the
    agent does not read. compass: whether the direction is the agent's; else it is 0."""

    def __init__(self, envs: gym.vector.VectorEnv, device: torch.device, compass: bool = True):
        super().__init__(envs)
        self.device = device
        self.compass = compass

    def observe(self, obs: dict[str, Any]) -> Obs:
        seen = {key: torch.from_numpy(obs[key]).to(self.device) for key in ("image", "direction")}
        if not self.compass:
            seen["direction"] = torch.zeros_like(seen["direction"])
        return seen

    def reset(self, *, seed: Any = None, options: dict | None = None) -> tuple[Obs, dict]:
        obs, infos = self.env.reset(seed=seed, options=options)
        return self.observe(obs), infos

    def step(self, actions: Tensor) -> tuple[Obs, Tensor, Tensor, Tensor, dict]:
        obs, *results, infos = self.env.step(actions.cpu().numpy())
        results = [torch.from_numpy(x).to(self.device) for x in results]
        reward, terminated, truncated = results
        return self.observe(obs), reward.float(), terminated, truncated, infos

    def frame(self) -> np.ndarray:
        return self.env.envs[0].unwrapped.get_frame(highlight=True, tile_size=TILE)


def make_minigrid(
    env_id: str,
    num_envs: int,
    device: torch.device,
    max_steps: int | None = None,
    compass: bool = True,
    **options: Any,
) -> TensorEnvs:
    without_autoreset = {"autoreset_mode": gym.vector.AutoresetMode.DISABLED}
    wrappers = []
    if max_steps is not None:
        wrappers = [functools.partial(gym.wrappers.TimeLimit, max_episode_steps=max_steps)]
    envs = gym.make_vec(
        env_id,
        num_envs,
        "sync",
        vector_kwargs=without_autoreset,
        wrappers=wrappers,
        **options,
    )
    return TensorEnvs(envs, device, compass)


def make_envs(args: Args, num_envs: int, device: torch.device) -> gym.vector.VectorEnv:
    """To train on something else, return another VectorEnv without autoreset, whose reset seed is
    the level."""
    if args.env_id != "maze":
        return make_minigrid(args.env_id, num_envs, device, args.max_steps, args.compass)
    direction_keys = None
    if args.redraw_direction:  # one key for each environment of all processes
        keys = np.random.default_rng([args.seed, 4]).integers(2**62, size=args.num_envs)
        direction_keys = keys[RANK * num_envs : (RANK + 1) * num_envs]
    return MazeEnvs(
        num_envs,
        device,
        args.maze_size,
        args.max_steps,
        args.num_walls,
        args.vary_num_walls,
        args.cuda_graphs and device.type == "cuda",
        direction_keys,
        args.compass,
    )


# ---- edited mazes (ACCEL) ------------------------------------------------------------------------

SYMBOLS = (EMPTY, WALL, GOAL)  # what an edit may leave in a cell; the agent is not among them


def edit_mazes(mazes: Mazes, num_edits: int, rng: np.random.Generator) -> Mazes:
    """A child of each maze (n of them), by the operator of ACCEL's released code.

    Of num_edits cells, drawn with replacement, each distinct one is cleared, of the goal and the
    agent too, and gets one of SYMBOLS. A goal takes the place of the one before. At last a missing
    goal, then a missing agent is placed on a free cell. All draws are uniform. The start direction
    stays.
    """
    n, height, width = mazes.walls.shape
    rows = np.arange(n)
    walls = mazes.walls.reshape(n, height * width).copy()
    goal = mazes.goal[:, 0] * width + mazes.goal[:, 1]  # -1: none at the moment
    agent = mazes.agent[:, 0] * width + mazes.agent[:, 1]
    cells = rng.integers(height * width, size=(n, num_edits))
    symbols = rng.choice(SYMBOLS, size=(n, num_edits))
    for k in range(num_edits):
        cell, symbol = cells[:, k], symbols[:, k]
        first = (cells[:, :k] != cell[:, None]).all(axis=1)  # not drawn before
        walls[rows[first], cell[first]] = symbol[first] == WALL
        goal[first & (goal == cell)] = -1
        agent[first & (agent == cell)] = -1
        goal = np.where(first & (symbol == GOAL), cell, goal)
    place_missing(goal, agent, walls, rng)
    place_missing(agent, goal, walls, rng)
    return Mazes(
        walls.reshape(n, height, width),
        np.stack((goal // width, goal % width), axis=1),
        np.stack((agent // width, agent % width), axis=1),
        mazes.direction.copy(),
    )


def place_missing(
    what: np.ndarray, other: np.ndarray, walls: np.ndarray, rng: np.random.Generator
) -> None:
    """Where what (n,) int64 is -1, makes it a free cell: no wall in walls (n, cells) bool, and not
    the cell of the other (n,) int64. If no cell is free, a wall gives way."""
    missing = np.flatnonzero(what < 0)
    order = rng.random((len(missing), walls.shape[1]))
    order[walls[missing]] -= 1.0  # walls come after all free cells
    taken = other[missing] >= 0
    order[taken, other[missing][taken]] = -2.0
    what[missing] = order.argmax(axis=1)
    walls[missing, what[missing]] = False


class Editor:
    """ACCEL's: chooses which replayed levels to edit, makes their children, and keeps the mazes of
    edited levels by their numbers, from FIRST_EDITED_LEVEL on.

    In every process of torchrun it does the same.
    """

    def __init__(self, args: Args, envs: "MazeEnvs"):
        self.args = args
        self.rng = np.random.default_rng([args.seed, 5])
        self.parents = np.zeros(0, np.int64)  # (N,) levels to edit next; none if (0,)
        self.next_level = FIRST_EDITED_LEVEL
        # what is kept of n edited levels, ascending
        side = args.maze_size - 2
        self.levels = np.zeros(0, np.int64)  # (n,)
        self.edits = np.zeros(0, np.int64)  # (n,) how many edits made it from a random maze
        cells = np.zeros((0, 2), np.int64)
        self.mazes = Mazes(np.zeros((0, side, side), bool), cells, cells, self.levels)
        self.serve(envs)

    def serve(self, envs: "MazeEnvs") -> None:
        """From now on a reset of envs to an edited level starts it."""
        envs.generate = functools.partial(mazes_of, self.args, editor=self)

    def choose_parents(self, started: np.ndarray, levels: np.ndarray, returns: np.ndarray) -> None:
        """After a replay rollout. started (N,): the level that each environment began with;
        levels, returns (episodes,): of those that were finished, on any level.

        lowest, highest: of the distinct levels in started 4 (all if fewer, one for N below 4) by
        their mean return, 0 before an episode is finished; ties in order of environment.
        """
        N = len(started)
        if self.args.accel_base == "batch":
            self.parents = started.copy()
            return
        _, first = np.unique(started, return_index=True)
        distinct = started[np.sort(first)]
        means = mean_returns(distinct, levels, returns)
        order = means if self.args.accel_base == "lowest" else -means
        chosen = distinct[np.argsort(order, kind="stable")[: 4 if N >= 4 else 1]]
        self.parents = chosen[np.arange(N) * len(chosen) // N]

    def children(self, sampler: LevelSampler) -> np.ndarray | None:
        """After a replay rollout: (N,) int64, a new level for each parent. Else None. Forgets
        edited levels that are no longer in the buffer nor played."""
        if not len(self.parents):
            return None
        parents = self.parents
        made = edit_mazes(mazes_of(self.args, parents, self), self.args.num_edits, self.rng)
        edits = self.lineage(parents) + 1
        children = self.next_level + np.arange(len(parents))
        kept = np.isin(self.levels, np.concatenate((sampler.levels, sampler.playing)))
        self.levels = np.concatenate((self.levels[kept], children))
        self.edits = np.concatenate((self.edits[kept], edits))
        self.mazes = concatenate([Mazes(*[part[kept] for part in self.mazes]), made])
        self.next_level += len(parents)
        self.parents = np.zeros(0, np.int64)
        return children

    def rows_of(self, levels: np.ndarray) -> np.ndarray:
        """Where edited levels (n,) are kept, (n,) int64. ValueError for one that is not."""
        rows = self.levels.searchsorted(levels)
        known = np.append(self.levels, -1)[rows] == levels
        if not known.all():
            raise ValueError(f"level {levels[~known][0]} is not among the edited mazes")
        return rows

    def lineage(self, levels: np.ndarray) -> np.ndarray:
        """How many edits in a row made each of levels (n,), (n,) int64; 0: a random maze."""
        edits = np.zeros(len(levels), np.int64)
        edited = levels >= FIRST_EDITED_LEVEL
        edits[edited] = self.edits[self.rows_of(levels[edited])]
        return edits

    def state_dict(self) -> dict[str, Any]:
        walls, goal, agent, direction = self.mazes
        cells = (self.args.maze_size - 2) ** 2
        return {
            "rng": self.rng.bit_generator.state,
            "parents": self.parents,
            "next_level": self.next_level,
            "levels": self.levels,
            "edits": self.edits,
            "walls": np.packbits(walls.reshape(len(walls), cells), axis=1),  # a bit for each
            "goal": goal.astype(np.uint8),
            "agent": agent.astype(np.uint8),
            "direction": direction.astype(np.uint8),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict()`, arrays in any library's tensors."""
        self.rng.bit_generator.state = state["rng"]
        self.parents = np.asarray(state["parents"]).copy()
        self.next_level = state["next_level"]
        self.levels = np.asarray(state["levels"]).copy()
        self.edits = np.asarray(state["edits"]).copy()
        side = self.args.maze_size - 2
        walls = np.unpackbits(np.asarray(state["walls"]), axis=1, count=side**2)
        cells = [np.asarray(state[x]).astype(np.int64) for x in ("goal", "agent", "direction")]
        self.mazes = Mazes(walls.reshape(-1, side, side).astype(bool), *cells)


def mean_returns(wanted: np.ndarray, levels: np.ndarray, returns: np.ndarray) -> np.ndarray:
    """Of each of the wanted levels (n,), over its episodes: levels, returns (episodes,). (n,)
    float64, 0 where there is none."""
    _, which = np.unique(np.concatenate((wanted, levels)), return_inverse=True)
    episodes = which[len(wanted) :]
    totals = np.bincount(episodes, returns, minlength=which.max() + 1)
    counts = np.bincount(episodes, minlength=which.max() + 1)
    return (totals / counts.clip(min=1))[which[: len(wanted)]]


# ---- evaluation ----------------------------------------------------------------------------------

SHOWN = {"solved": "solved_mean"}  # of an evaluation, on the screen
UNSEEN = "Unseen"  # the run's own kind of mazes: not part of the means


def add_frame(film: list[Image.Image] | None, envs: gym.vector.VectorEnv) -> None:
    if film is not None:
        with optional("filming"):
            film.append(Image.fromarray(envs.frame()))


def acting(
    agent: Agent,
    envs: gym.vector.VectorEnv,
    next_obs: Obs,
    state: Tensor,
    generator: torch.Generator | None = None,
) -> Callable[[], Tensor]:
    """A function that takes a step of the stochastic policy and of N environments: next_obs and
    state (2, N, 256) are overwritten; reward and done, (2, N) float32, are what it returns, until
    its next call."""
    noise = state.new_zeros((envs.num_envs, agent.num_actions))
    outcome = state.new_zeros((2, envs.num_envs))

    def act_and_step() -> Tensor:
        action, _, _, next_state = agent.act(
            next_obs, state, noise.exponential_(generator=generator)
        )
        obs, reward, terminations, truncations, _ = envs.step(action)
        overwrite(next_obs, obs)
        state.copy_(torch.stack(next_state))
        return torch.stack((reward, (terminations | truncations).float()), out=outcome)

    agent.prepare_to_act()
    return CudaGraph(act_and_step, enabled=isinstance(envs, MazeEnvs) and envs.cuda_graphs)


def play(
    agent: Agent,
    envs: gym.vector.VectorEnv,
    reset: dict[str, Any],
    film: list[Image.Image] | None = None,
) -> np.ndarray:
    """Plays one episode in each environment to its end with the stochastic policy: returns (N,)
    float64. reset: what starts the episodes (again, uncounted, where done). film: a list for the
    first one's frames."""
    next_obs, _ = envs.reset(**reset)
    state = torch.zeros((2, envs.num_envs, 256), device=next_obs["direction"].device)
    act_and_step = acting(agent, envs, next_obs, state)
    playing = np.ones(envs.num_envs, bool)
    returns = np.zeros(envs.num_envs)
    add_frame(film, envs)
    while playing.any():
        reward, done = act_and_step().cpu().numpy()
        if playing[0]:
            add_frame(film, envs)
        returns += reward * playing
        done = done > 0
        playing &= ~done
        if done.any():
            options = reset.get("options", {}) | {"reset_mask": done}
            obs, _ = envs.reset(**reset | {"options": options})
            overwrite(next_obs, obs)
    return returns


def evaluation_environments(
    args: Args, device: torch.device
) -> Iterator[tuple[str, gym.vector.VectorEnv, dict]]:
    """Name, eval_episodes environments, and their reset, to levels that are the same for every run:
    named and perfect mazes, time limit 2 * size ** 2, two of the package's, and random mazes made
    as the run's are but never trained on; for another --env-id its reset seeds never trained on,
    the same levels where few differ (DoorKey-5x5: 48)."""
    n = args.eval_episodes
    levels = {"seed": list(range(FIRST_TEST_LEVEL, FIRST_TEST_LEVEL + n))}
    if args.env_id != "maze":
        envs = make_minigrid(args.env_id, n, device, args.max_steps, args.compass)
        yield args.env_id, envs, levels
        return
    for name in (*NAMED_MAZES, "PerfectMaze21"):
        if name == "PerfectMaze21":
            mazes = concatenate([perfect_maze(21, k) for k in range(n)])
        else:
            mazes = concatenate([named_maze(name, k) for k in range(n)])
        size = mazes.walls.shape[1] + 2
        graphs = args.cuda_graphs and device.type == "cuda"
        options = {"cuda_graphs": graphs, "compass": args.compass}
        envs = MazeEnvs(n, device, size, max_steps=2 * size**2, **options)
        yield name, envs, {"options": {"mazes": mazes}}
    for name in ("SimpleCrossingS11N5", "FourRooms"):
        options = {"compass": args.compass, "agent_view_size": VIEW}
        envs = make_minigrid(f"MiniGrid-{name}-v0", n, device, **options)
        yield name, envs, levels
    yield UNSEEN, make_envs(replace(args, redraw_direction=False), n, device), levels


def evaluate(
    agent: Agent, args: Args, device: torch.device, video: Path | None = None
) -> dict[str, Any]:
    """Plays eval_episodes episodes in each evaluation environment, with a random stream of its own.
    video: folder for GIFs of first episodes.

    Returns the share of episodes solved (a return above 0) and the mean return in each, their
    means over the environments but UNSEEN, the interquartile mean (IQM) of the shares, and every
    episode's return.
    """
    returns: dict[str, np.ndarray] = {}
    with own_random_stream(args, device):
        for name, envs, reset in evaluation_environments(args, device):
            film = [] if video else None
            returns[name] = play(agent, envs, reset, film)
            envs.close()
            if video:  # the start, and every second frame up to the last
                file_name = name.replace("/", "_")
                frames = film[:1] + film[:0:-2][::-1]
                write_gif(video / f"{file_name}.gif", frames, milliseconds=100)
    solved = {name: float((x > 0).mean()) for name, x in returns.items()}
    counted = [name for name in solved if name != UNSEEN]
    rates = np.sort([solved[name] for name in counted])
    quarter = len(rates) // 4
    return {
        "solved_mean": float(rates.mean()),
        "solved_iqm": float(rates[quarter : len(rates) - quarter].mean()),
        "return_mean": float(np.mean([returns[name] for name in counted])),
        **{f"solved_{name}": x for name, x in solved.items()},
        **{f"return_{name}": float(x.mean()) for name, x in returns.items()},
        "episodes": {name: x.tolist() for name, x in returns.items()},
    }


# The worst case, as Rutherford et al. 2024 ("No Regrets", arXiv 2408.15099) measure it: a policy's
# solved rate in those random mazes that it solves least often.

WORST_PERCENT = (0.01, 0.1, 1, 2, 5, 10, 20, 50, 100)  # alpha: the share of the mazes, in percent
WORST_EPISODES = 10  # in each maze, to choose by and once more to measure


def solvable_levels(n: int, size: int, num_walls: int) -> np.ndarray:
    """(n,) int64: the first of the test levels whose mazes have a path from the agent to the goal,
    of twice as many."""
    found = []
    for first in range(0, 2 * n, 10_000):  # so many at once
        levels = FIRST_TEST_LEVEL + np.arange(first, min(first + 10_000, 2 * n))
        paths = shortest_paths(random_mazes(levels, size, num_walls))
        found.append(levels[paths > 0])
    return np.concatenate(found)[:n]


def play_levels(
    agent: Agent,
    envs: gym.vector.VectorEnv,
    levels: np.ndarray,
    generator: torch.Generator | None = None,
) -> np.ndarray:
    """Plays an episode of each of levels (n,), in their order: a finished environment gets the next
    one. Returns (n,) float64."""
    returns = np.zeros(len(levels))
    episode = np.arange(envs.num_envs)  # what each environment plays, an index of levels
    begun = envs.num_envs
    next_obs, _ = envs.reset(seed=levels[episode % len(levels)].tolist())
    state = torch.zeros((2, envs.num_envs, 256), device=next_obs["direction"].device)
    act_and_step = acting(agent, envs, next_obs, state, generator)
    playing = episode < len(levels)
    while playing.any():
        reward, done = act_and_step().cpu().numpy()
        returns[episode[playing]] += reward[playing]
        done = (done > 0) & playing
        if done.any():
            count = np.count_nonzero(done)
            episode[done] = begun + np.arange(count)
            begun += count
            playing = episode < len(levels)
            begins = done & playing
            seed = levels[np.where(playing, episode, 0)].tolist()
            obs, _ = envs.reset(seed=seed, options={"reset_mask": begins})
            overwrite(next_obs, obs)
            state.mul_(torch.from_numpy(~begins).to(state.device)[:, None])
    return returns


def worst_cases(
    first: np.ndarray, second: np.ndarray, percents: Iterable[float] = WORST_PERCENT
) -> list[dict[str, float]]:
    """first, second (mazes, episodes) bool, solved or not, of independent episodes -> for each
    alpha the solved rate in the worst alpha % of the mazes. Which those are, the first episodes say
    (in a tie, the maze that comes first); how well they are solved, the second: of the episodes
    that chose them, the rate is too low. An alpha of less than one maze is left out.
    """
    worst_first = np.argsort(first.mean(1), kind="stable")
    rows = []
    for percent in percents:
        mazes = int(round(len(first) * percent / 100, 6))
        if mazes == 0:
            continue
        chosen = worst_first[:mazes]
        row = {"alpha_percent": percent, "mazes": mazes, "episodes": second[chosen].size}
        row["solved_rate"] = float(second[chosen].mean())
        row["rate_when_chosen"] = float(first[chosen].mean())
        rows.append(row)
    return rows


def evaluate_worst(
    agent: Agent, args: Args, device: torch.device, directory: Path, global_step: int
) -> None:
    """--eval-worst: a table on the screen and in worst_case.csv. The mazes are as published, the
    same for every run: 60 blocks placed with replacement in 13 x 13 cells, time limit 250."""
    if args.eval_worst == 0:
        return
    options = {"size": 15, "num_walls": 60}
    levels = solvable_levels(args.eval_worst, **options)
    episodes = levels.repeat(WORST_EPISODES)
    on_cpu = device.type == "cpu"
    # what stays in a core's cache, or fills a GPU
    num_envs = min(256 if on_cpu else 4096, len(episodes))
    graphs = args.cuda_graphs and not on_cpu
    options |= {"cuda_graphs": graphs, "compass": args.compass}

    def play_set(number: int) -> np.ndarray:
        """(mazes, WORST_EPISODES) bool: solved or not."""
        generator = None  # a GPU's CUDA graphs know its default one only
        if on_cpu:
            seed = np.random.default_rng([args.seed, 2, number]).integers(2**62)
            generator = torch.Generator().manual_seed(int(seed))
        envs = MazeEnvs(num_envs, device, **options)
        returns = play_levels(agent, envs, episodes, generator)
        return returns.reshape(-1, WORST_EPISODES) > 0

    began = time.time()
    threads = torch.get_num_threads()
    at_once = min(2, threads) if on_cpu else 1
    torch.set_num_threads(threads // at_once)  # faster than one set after the other on all of them
    with own_random_stream(args, device), ThreadPoolExecutor(at_once) as pool:
        first, second = pool.map(play_set, (1, 2))
    torch.set_num_threads(threads)
    rows = worst_cases(first, second)
    path = directory / "worst_case.csv"
    path.unlink(missing_ok=True)
    seconds = time.time() - began
    say(f"{len(levels):,} random mazes, {WORST_EPISODES} episodes in each, twice: {seconds:.0f} s")
    say("worst %     mazes  solved  (in the episodes that chose them)")
    for row in rows:
        shares = f"{row['solved_rate']:7.3f} {row['rate_when_chosen']:8.3f}"
        say(f"{row['alpha_percent']:7g} {row['mazes']:9,} {shares}")
        append_row(path, {"global_step": global_step} | row)


FINAL_EVALUATIONS = (evaluate_worst,)  # at the end of a run and by --evaluate


# ---- flags that cannot work ----------------------------------------------------------------------


def check_args(args: Args) -> None:
    """Refuses what cannot work, with one sentence and exit status 2."""
    check_common_args(args)
    require(args, ["buffer_size", "max_steps"], lambda x: x >= 1, "at least 1")
    require(args, ["num_walls"], lambda x: 0 <= x < 2**63, "at least 0 and below 2**63")
    require(args, ["nu", "replay_prob"], lambda x: 0 <= x <= 1, "between 0 and 1")
    require(args, ["maze_size"], lambda x: 5 <= x <= 255, "between 5 and 255")
    require(args, ["num_edits"], lambda x: 1 <= x <= 1000, "between 1 and 1000")
    require(args, ["eval_worst"], lambda x: 0 <= x <= 10**6, f"between 0 and {10**6}")
    parts = f"a divisor of --num-envs {args.num_envs}"
    if WORLD > 1:
        parts += f" / {WORLD} processes"
    require(args, ["num_minibatches"], lambda x: args.num_envs // WORLD % x == 0, parts)
    if args.minibatch_size == 1:
        why = "2 are needed to normalise their advantages"
        refuse(f"--num-minibatches {args.num_minibatches} leaves 1 sample in a minibatch: {why}.")
    check_curriculum(args)
    if not args.evaluate:
        check_budget(args)
    time_limit = args.max_steps
    if args.env_id != "maze":
        if args.curriculum == "accel":
            refuse(
                f"--env-id {args.env_id} must be maze: --curriculum accel edits no other levels."
            )
        of_mazes = ["num_walls", "vary_num_walls", "maze_size", "redraw_direction", "eval_worst"]
        require_default(args, [*of_mazes, "compile"], "--env-id maze")
        why = "regret needs the best possible return, which is known of --env-id maze only"
        require(args, ["score"], lambda x: x != "regret", f"another: {why}")
        longest = check_environment(args.env_id)
        own = f"at most {longest}, the time limit of --env-id {args.env_id}"
        require(args, ["max_steps"], lambda x: x <= longest, own)
        time_limit = args.max_steps or longest
    if args.env_id == "maze":
        most = (args.maze_size - 2) ** 2 - 2
        cells = f"the cells of --maze-size {args.maze_size} but two"
        require(args, ["num_walls"], lambda x: x <= most, f"at most {most}, {cells}")
    if args.curriculum == "dr":
        return
    all_envs = f"at least --num-envs {args.num_envs}"
    require(args, ["buffer_size"], lambda x: x >= args.num_envs, all_envs)
    if args.score == "regret":
        why = "left out: --score regret knows the best possible return from one direction only"
        require(args, ["redraw_direction"], lambda x: not x, why)
    if args.score in ("mna", "learnability"):
        gate = f"left out: --score {args.score} has that gate"
        require(args, ["gate_unsolved"], lambda x: not x, gate)
    if args.score in ("gae", "max_mc"):
        another = f"another: --score {args.score} can be negative"
        require(args, ["score_transform"], lambda x: x != "power", another)
    if needs_whole_episodes(args) and not args.evaluate:
        why = "an episode that is cut off is not scored"
        if args.bootstrap_timeouts:
            why = f"{args.score} needs whole episodes"
        limit = f"at least {time_limit}, the time limit: {why}"
        require(args, ["num_steps"], lambda x: x >= time_limit, limit)


def needs_whole_episodes(args: Args) -> bool:
    """Whether an episode that the end of a rollout cuts off is one that is never scored."""
    of_returns = args.score in ("max_mc", "learnability", "regret")
    return args.curriculum != "dr" and (of_returns or not args.bootstrap_timeouts)


def check_curriculum(args: Args) -> None:
    """Every flag of the curriculum does something, or is refused by its own name."""
    if args.curriculum != "accel":
        require_default(args, ["num_edits", "accel_base"], "--curriculum accel")
    if args.curriculum == "dr":
        flags = ["replay_prob", "nu", "buffer_size", "score", "score_transform", "temperature"]
        flags += ["staleness_coef", "replay_schedule", "rho", "alpha", "gate_unsolved"]
        require_default(args, flags, "--curriculum robust_plr, plr or accel")
        return
    if args.nu is None:
        allowed, name = args.replay_prob > 0, f"--replay-prob {args.replay_prob} must be above 0"
    else:
        only_nu = "another without --nu, which is 1 - replay_prob"
        same = functools.partial(math.isclose, 1 - args.nu)
        require(args, ["replay_prob"], lambda x: x == 0.5 or same(x), only_nu)
        allowed, name = args.nu < 1, f"--nu {args.nu} must be below 1"
    if args.curriculum in REPLAY_ONLY and not allowed:
        refuse(f"{name}: {args.curriculum} learns from replayed levels only.")


def check_budget(args: Args) -> None:
    first = args.batch_size * (3 if args.profile else 1)
    why = "--num-envs x --num-steps, three times with --profile"
    if args.curriculum in REPLAY_ONLY:
        fill = max(1, math.ceil(args.rho * args.buffer_size))
        first = max(first, args.batch_size * (1 + math.ceil(fill / args.num_envs)))
        why = f"{args.curriculum} learns nothing before the buffer holds --rho x --buffer-size"
        why += f" = {fill} levels"
    require(args, ["total_timesteps"], lambda x: x >= first, f"at least {first}: {why}")


def check_environment(env_id: str) -> int:
    """Refuses what is not a MiniGrid environment whose reset seed decides the level; returns the
    longest time limit of ten levels."""
    starts = {}
    time_limit = 0
    try:
        env = gym.make(env_id)
        most = env.spec.max_episode_steps or math.inf
        space = env.observation_space
        env = env.unwrapped
        if not isinstance(env, MiniGridEnv):
            raise TypeError(f"it is a {type(env).__name__}")
        if not isinstance(space, gym.spaces.Dict) or not {"image", "direction"} <= set(space):
            raise TypeError("its observations are no dictionaries with an image and a direction")
        for level in (*range(10), *range(10)):
            direction = env.reset(seed=level)[0]["direction"]
            start = (env.grid.encode().tobytes(), direction, tuple(env.agent_pos))
            if starts.setdefault(level, start) != start:
                raise ValueError("two resets with one seed, which must decide the level, differ")
            time_limit = max(time_limit, min(env.max_steps, most))
        if len(set(starts.values())) == 1:
            raise ValueError("its levels are all alike, so there is nothing to choose from")
    except Exception as error:  # or not registered: Gymnasium knows what was perhaps meant
        why = (str(error) or repr(error)).splitlines()[0]
        refuse(f"--env-id {env_id} must be maze or a registered MiniGrid environment: {why}")
    return time_limit


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
