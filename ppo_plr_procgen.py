"""PPO + Prioritized Level Replay (PLR) on Procgen, in one file.

    python ppo_plr_procgen.py --env-id bigfish                         # PLR with the paper's settings
    python ppo_plr_procgen.py --env-id bigfish --curriculum uniform    # the baseline: levels drawn uniformly
    python ppo_plr_procgen.py --env-id bigfish --score gae             # another score; write your own at "level scores"
    python ppo_plr_procgen.py --evaluate runs/RUN --eval-episodes 1000 --capture-video
    python ppo_plr_procgen.py --help

PLR: Jiang, Grefenstette, Rocktaeschel, "Prioritized Level Replay", 2021 (arXiv 2010.03934).
PPO and the names in this file: CleanRL's ppo_procgen.py. Network: IMPALA (arXiv 1802.01561).

Procgen ends an episode at its time limit and shows neither that it did nor the last observation: as in the paper, a
timeout is a terminal state here. README.md lists the logged keys and every deviation from the released code.
"""

import contextlib
import csv
import ctypes
import difflib
import functools
import hashlib
import importlib.util
import io
import json
import math
import os
import pickle
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.optim as optim
import tyro
from torch.distributions.categorical import Categorical
from torch.utils.tensorboard import SummaryWriter

from plr_sampler import LevelSampler

# (R_min, R_max) for easy and hard mode, to normalise returns: Cobbe et al. 2020 (arXiv 1912.01588), appendix C
RETURN_RANGE = {
    "bigfish": ((1, 40), (0, 40)), "bossfight": ((0.5, 13), (0.5, 13)), "caveflyer": ((3.5, 12), (2, 13.4)),
    "chaser": ((0.5, 13), (0.5, 14.2)), "climber": ((2, 12.6), (1, 12.6)), "coinrun": ((5, 10), (5, 10)),
    "dodgeball": ((1.5, 19), (1.5, 19)), "fruitbot": ((-1.5, 32.4), (-0.5, 27.2)), "heist": ((3.5, 10), (2, 10)),
    "jumper": ((3, 10), (1, 10)), "leaper": ((3, 10), (1.5, 10)), "maze": ((5, 10), (4, 10)),
    "miner": ((1.5, 13), (1.5, 20)), "ninja": ((3.5, 10), (2, 10)), "plunder": ((4.5, 30), (3, 30)),
    "starpilot": ((2.5, 64), (1.5, 35)),
}  # fmt: skip
GAMES_WITH_MODE = {
    "easy": tuple(RETURN_RANGE),
    "hard": tuple(RETURN_RANGE),
    "extreme": ("chaser", "dodgeball", "leaper", "starpilot"),
    "memory": ("caveflyer", "dodgeball", "heist", "jumper", "maze", "miner"),
}
SIGNED_SCORES = ("gae", "max_mc")
# Levels below are for training, those from here to 2**31 - 1 for testing: no run can train on a test level.
FIRST_TEST_LEVEL = 2**30


@dataclass
class Args:
    # Experiment
    exp_name: str = os.path.basename(__file__)[: -len(".py")]
    """part of the default run directory's name"""
    seed: int = 1
    """decides everything random; evaluation has random streams of its own"""
    torch_deterministic: bool = True
    """choose deterministic kernels; the CPU's always are"""
    cuda: bool = True
    """train on the GPU if there is one"""
    track: bool = False
    """also log to Weights and Biases (pip install wandb; WANDB_PROJECT and WANDB_ENTITY name the project and team)"""
    run_dir: str | None = None
    """where the run's files go; runs/{env_id}__{exp_name}__{seed}__{time} if not given"""
    checkpoint_interval: int = 10
    """iterations between checkpoints (0: only at the end)"""

    # Environment
    env_id: str = "starpilot"
    """one of the 16 Procgen games"""
    distribution_mode: Literal["easy", "hard", "extreme", "memory"] = "easy"
    """Procgen's difficulty. The paper's hard setting: --num-levels 500 --num-envs 128 --total-timesteps 200000000"""
    num_levels: int = 200
    """size of the training set of levels (0: no bound, for --curriculum uniform or sequential)"""
    start_level: int = 0
    """the first training level"""
    env_threads: int = 0
    """Procgen's worker threads (0: one per CPU core). The result does not depend on it"""

    # PPO (PLR paper, Table 3)
    total_timesteps: int = 25_000_000
    """environment steps of the whole run, rounded down to full iterations"""
    learning_rate: float = 5e-4
    """of Adam"""
    num_envs: int = 64
    """environments played side by side"""
    num_steps: int = 256
    """steps of each environment per rollout"""
    anneal_lr: bool = False
    """let the learning rate fall linearly to 0"""
    gamma: float = 0.999
    """discount"""
    gae_lambda: float = 0.95
    """lambda of the generalized advantage estimation"""
    num_minibatches: int = 8
    """minibatches per epoch"""
    update_epochs: int = 3
    """epochs per rollout"""
    clip_coef: float = 0.2
    """clip range of the policy ratio and of the value"""
    ent_coef: float = 0.01
    """weight of the entropy bonus"""
    vf_coef: float = 0.5
    """weight of the value loss"""
    max_grad_norm: float = 0.5
    """bound on the norm of the gradient"""
    target_kl: float | None = None
    """stop an iteration's epochs once the approximate KL divergence exceeds this"""
    reward_norm_gamma: float = 0.99
    """discount of the return whose variance scales the rewards: 0.99 in the released PLR code, 0.999 in CleanRL"""

    # PLR
    curriculum: Literal["plr", "uniform", "sequential"] = "plr"
    """which level an episode starts: prioritized replay, uniformly random, or one after the other"""
    score: Literal[
        "value_l1", "gae", "positive_value_loss", "one_step_td_error", "policy_entropy", "least_confidence",
        "min_margin", "max_mc",
    ] = "value_l1"  # fmt: skip
    """learning potential of a level, averaged over an episode's steps; the formulas are at "level scores" below"""
    score_transform: Literal["constant", "max", "eps_greedy", "rank", "power", "softmax"] = "rank"
    """from scores to replay probabilities (the paper's h)"""
    temperature: float = 0.1
    """of the transform (the paper's beta): lower is greedier"""
    staleness_coef: float = 0.1
    """share of replay by staleness (the paper's rho)"""
    replay_schedule: Literal["proportionate", "fixed"] = "proportionate"
    """replay with the probability of the share of levels seen, or with the fixed probability 1 - nu"""
    rho: float = 1.0
    """share of levels that must be seen before any is replayed. 1: as released; 0: annealed as in the paper's text"""
    nu: float = 0.5
    """with the fixed schedule: probability of a new level while there are any"""
    alpha: float = 1.0
    """weight of a level's new score in its running mean (1: the last score counts)"""
    stitch_episodes: bool = False
    """score an episode that spans rollouts once, as a whole (the paper's Algorithm 4), not each rollout's part"""

    # Evaluation
    eval_interval: int = 50
    """iterations between evaluations (0: only at the end)"""
    eval_episodes: int = 100
    """levels played, once each, in each of the two sets: training levels and levels never trained on"""
    capture_video: bool = False
    """write a GIF of four test episodes at each evaluation"""
    evaluate: str | None = None
    """only evaluate the run in this directory. Other flags default to that run's"""

    # Speed
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """of the network. bf16 doubles the speed of CPUs with AMX or AVX512-BF16 and of GPUs; tf32 is for NVIDIA GPUs"""
    compile: bool = False
    """torch.compile the network"""

    batch_size: int = field(init=False)
    minibatch_size: int = field(init=False)
    num_iterations: int = field(init=False)

    def __post_init__(self):
        self.batch_size = self.num_envs * self.num_steps
        self.minibatch_size = self.batch_size // max(self.num_minibatches, 1)
        self.num_iterations = self.total_timesteps // max(self.batch_size, 1)


def refuse(reason: str) -> None:
    print(f"error: {reason}", file=sys.stderr)
    raise SystemExit(2)


def check_args(args: Args) -> None:
    """Refuses what cannot work, with one sentence and exit status 2."""
    if args.env_id not in RETURN_RANGE:
        near = difflib.get_close_matches(args.env_id, RETURN_RANGE, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(RETURN_RANGE)}."
        refuse(f"--env-id {args.env_id} is not a Procgen game: {hint}")
    if args.env_id not in GAMES_WITH_MODE[args.distribution_mode]:
        modes = ", ".join(mode for mode, games in GAMES_WITH_MODE.items() if args.env_id in games)
        refuse(f"--distribution-mode {args.distribution_mode} does not exist for {args.env_id}: choose from {modes}.")

    def require(names: str, allowed: Callable[[Any], bool], what: str) -> None:
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not allowed(value):
                refuse(f"--{name.replace('_', '-')} {value} must be {what}.")

    sizes = "total_timesteps num_envs num_steps num_minibatches update_epochs eval_episodes"
    require(sizes, lambda x: x >= 1, "at least 1")
    counts = "seed num_levels start_level env_threads checkpoint_interval eval_interval ent_coef vf_coef"
    require(counts, lambda x: 0 <= x < 2**63, "at least 0 and below 2**63")
    require("learning_rate temperature max_grad_norm clip_coef target_kl", lambda x: 0 < x < math.inf, "above 0")
    require("gamma gae_lambda reward_norm_gamma staleness_coef rho nu", lambda x: 0 <= x <= 1, "between 0 and 1")
    require("alpha", lambda x: 0 < x <= 1, "above 0 and at most 1")
    rollout = f"--num-envs x --num-steps = {args.batch_size}"
    require("num_minibatches", lambda x: args.batch_size % x == 0, f"a divisor of {rollout}")
    require("num_minibatches", lambda x: args.batch_size > x, f"less than {rollout}: a minibatch needs two steps")
    require("total_timesteps", lambda x: x >= args.batch_size, f"at least {rollout}, the steps of one iteration")
    most = FIRST_TEST_LEVEL - args.num_levels
    require("start_level", lambda x: x <= most, f"at most {most}: levels from {FIRST_TEST_LEVEL} on are for testing")
    if args.num_levels == 0:
        require("start_level", lambda x: x == 0, "0 with --num-levels 0, which draws from all levels")
        require("curriculum", lambda x: x != "plr", "uniform or sequential with --num-levels 0: plr needs a fixed set")
    if args.curriculum == "plr" and args.score in SIGNED_SCORES:
        require("score_transform", lambda x: x != "power", f"another: --score {args.score} can be negative")


# ---- levels and environments ----------------------------------------------------------------------------------------


class ProcgenLevels(gym.vector.VectorEnv):
    """Procgen as a Gymnasium VectorEnv without autoreset, in which the seed of a reset is exactly the level played.

        obs, infos = envs.reset(seed=levels, options={"reset_mask": done})   # env i starts levels[i] where done[i]
        obs, rewards, terminations, truncations, infos = envs.step(actions)

    Observations are (N, 64, 64, 3) uint8, rewards (N,) float32. What `step` shows of an environment that is done means
    nothing until its reset. The stock wheel can do this: a level's start is the saved state of a fresh single-level
    game, and `set_state` puts any environment there. (Procgen's own reset would not: in dodgeball, state of the last
    episode leaks into the next.)
    """

    def __init__(self, num_envs: int, env_id: str, mode: str, num_threads: int):
        with contextlib.redirect_stderr(io.StringIO()):  # procgen imports the dead package gym, which prints a notice
            from procgen import ProcgenGym3Env

        # rand_seed: Procgen would draw one from the operating system
        make = functools.partial(ProcgenGym3Env, env_name=env_id, distribution_mode=mode, num_levels=1, rand_seed=0)
        self.procgen = make(num=num_envs, start_level=0, num_threads=num_threads)
        self.level_start = functools.lru_cache(maxsize=4096)(  # 21-38 KB and 0.5 ms each
            lambda level: make(num=1, start_level=level, num_threads=0).get_state()[0]
        )
        self.num_envs = num_envs
        self.single_observation_space = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)
        self.single_action_space = gym.spaces.Discrete(15)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)
        self.metadata = {"autoreset_mode": gym.vector.AutoresetMode.DISABLED}

    def reset(self, *, seed: Any = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        if seed is None:
            seed = self.np_random.integers(FIRST_TEST_LEVEL, size=self.num_envs)
        levels = np.arange(seed, seed + self.num_envs) if np.ndim(seed) == 0 else np.asarray(seed)
        mask = (options or {}).get("reset_mask", np.ones(self.num_envs, bool))
        for i in np.flatnonzero(mask).tolist():
            state = self.level_start(int(levels[i]))
            self.procgen.call_c_func("set_state", i, state, len(state))
        return self.procgen.observe()[1]["rgb"], {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        self.procgen.act(actions)
        rewards, obs, first = self.procgen.observe()
        return obs["rgb"], rewards, first, np.zeros_like(first), {}

    def close_extras(self, **kwargs) -> None:
        self.procgen.close()


def make_envs(args: Args, num_envs: int) -> gym.vector.VectorEnv:
    """To train on something else, return another VectorEnv with autoreset off whose reset seed is the level."""
    try:
        threads = args.env_threads or os.cpu_count()
        return ProcgenLevels(num_envs, args.env_id, args.distribution_mode, min(threads, num_envs))
    except (ImportError, OSError) as error:
        refuse(f"Procgen does not load ({error}). On Debian or Ubuntu: apt-get install libgl1 libglib2.0-0")


def evaluation_levels(args: Args) -> np.ndarray:
    """(2 * eval_episodes,) test levels, then training levels: decided by the seed, distinct if there are enough."""
    rng = np.random.default_rng([args.seed, 1])
    test_levels = FIRST_TEST_LEVEL + rng.choice(2**31 - 1 - FIRST_TEST_LEVEL, args.eval_episodes, replace=False)
    train_levels = np.resize(args.start_level + rng.permutation(args.num_levels), args.eval_episodes)
    if args.num_levels == 0:
        train_levels = rng.choice(FIRST_TEST_LEVEL, args.eval_episodes, replace=False)
    return np.concatenate((test_levels, train_levels))


# ---- network --------------------------------------------------------------------------------------------------------


def layer_init(layer: nn.Linear, std: float) -> nn.Linear:
    torch.nn.init.orthogonal_(layer.weight, std)
    torch.nn.init.constant_(layer.bias, 0.0)
    return layer


class ResidualBlock(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv0 = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.conv1 = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv1(torch.relu(self.conv0(torch.relu(x))))


class ConvSequence(nn.Sequential):
    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1),
            nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
            ResidualBlock(out_channels),
            ResidualBlock(out_channels),
        )


class Agent(nn.Module):
    def __init__(self, envs: gym.vector.VectorEnv, precision: str = "fp32"):
        super().__init__()
        h, w, c = envs.single_observation_space.shape
        self.bf16 = precision == "bf16"
        self.network = nn.Sequential(
            ConvSequence(c, 16),
            ConvSequence(16, 32),
            ConvSequence(32, 32),
            nn.Flatten(),
            nn.ReLU(),
            nn.Linear(32 * math.ceil(h / 8) * math.ceil(w / 8), 256),
            nn.ReLU(),
        )
        self.actor = layer_init(nn.Linear(256, envs.single_action_space.n), std=0.01)
        self.critic = layer_init(nn.Linear(256, 1), std=1.0)

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 64, 64, 3) uint8 -> (B, 256) float32. The heads after it are always float32."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            return self.network(x.permute(0, 3, 1, 2) / 255.0).float()  # "bhwc" -> "bchw", in channels_last memory

    def get_value(self, x: torch.Tensor) -> torch.Tensor:
        return self.critic(self.hidden(x)).flatten()

    def get_action_and_value(self, x: torch.Tensor, action: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """x (B, 64, 64, 3) uint8 -> action, log-probability, entropy, value (B,) and logits (B, actions)."""
        hidden = self.hidden(x)
        probs = Categorical(logits=self.actor(hidden), validate_args=False)
        if action is None:
            action = probs.sample()
        return action, probs.log_prob(action), probs.entropy(), self.critic(hidden).flatten(), probs.logits


# ---- evaluation -----------------------------------------------------------------------------------------------------


def evaluate(agent: Agent, args: Args, device: torch.device, video: Path | None = None) -> dict[str, Any]:
    """Plays every evaluation level exactly once to its end, stochastic policy, raw returns, own random stream.

    test_return_normalized is (R - R_min) / (R_max - R_min) with Procgen's constants (easy and hard mode). The paper's
    normalised score divides test_return by the uniform baseline's mean of the same game: benchmarks/ does that.
    """
    levels = evaluation_levels(args)
    returns, frames = np.zeros(len(levels)), []
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(int(np.random.default_rng([args.seed, 2]).integers(2**62)))
        for chunk in np.array_split(np.arange(len(levels)), math.ceil(len(levels) / 256)):
            envs = make_envs(args, len(chunk))
            obs, _ = envs.reset(seed=levels[chunk].tolist())
            playing = np.arange(len(chunk))  # environments whose episode goes on
            while len(playing):
                if video and chunk[0] == 0:  # the first four test episodes, side by side; a finished one stands still
                    frame = obs[: min(4, args.eval_episodes)]
                    over = np.setdiff1d(np.arange(len(frame)), playing)
                    frame[over] = frames[-1][over] if len(over) else frame[over]
                    frames.append(frame)
                actions = np.zeros(len(chunk), np.int32)
                action = agent.get_action_and_value(torch.from_numpy(obs[playing]).to(device))[0]
                actions[playing] = action.cpu().numpy()
                obs, reward, terminations, truncations, _ = envs.step(actions)
                returns[chunk[playing]] += reward[playing]
                playing = playing[~(terminations | truncations)[playing]]
            envs.close()
    if video:
        write_gif(video, frames)
    result: dict[str, Any] = {"episodes": {}}
    for name, part in (("test", slice(0, args.eval_episodes)), ("train", slice(args.eval_episodes, None))):
        result[f"{name}_return"], result[f"{name}_return_std"] = float(returns[part].mean()), float(returns[part].std())
        result["episodes"] |= {f"{name}_levels": levels[part].tolist(), f"{name}_returns": returns[part].tolist()}
    result["generalization_gap"] = result["train_return"] - result["test_return"]
    if args.distribution_mode in ("easy", "hard"):
        low, high = RETURN_RANGE[args.env_id][args.distribution_mode == "hard"]
        result["test_return_normalized"] = (result["test_return"] - low) / (high - low)
    return result


def write_gif(path: Path, frames: list[np.ndarray]) -> None:
    """frames: one (k, 64, 64, 3) uint8 per step. Every second one, its k pictures side by side, at Procgen's speed."""
    from PIL import Image  # comes with tensorboard

    path.parent.mkdir(parents=True, exist_ok=True)
    frames, size = frames[::2], (len(frames[0]) * 128, 128)
    pictures = [
        Image.fromarray(np.concatenate([*frame], axis=1)).resize(size, Image.Resampling.NEAREST) for frame in frames
    ]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=133, loop=0)


# ---- run directory --------------------------------------------------------------------------------------------------


def plain(x: Any) -> Any:
    """Nested state as tensors and Python values only, which torch.load(weights_only=True) reads back."""
    if isinstance(x, dict):
        return {key: plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [plain(value) for value in x]
    if isinstance(x, np.ndarray):
        return torch.from_numpy(x.copy())
    return x.item() if isinstance(x, np.generic) else x


def fingerprint(state: Any) -> str:
    """SHA-256 of a nested state. Two runs with the same fingerprint are the same run."""
    digest = hashlib.sha256()

    def feed(x: Any) -> None:
        if isinstance(x, dict):
            feed([part for key in sorted(x, key=str) for part in (str(key), x[key])])
        elif isinstance(x, list):
            for part in x:
                feed(part)
        else:
            digest.update(x.cpu().contiguous().numpy().tobytes() if isinstance(x, torch.Tensor) else repr(x).encode())

    feed(plain(state))
    return digest.hexdigest()


def write_file(path: Path, data: bytes) -> None:
    """A reader, or a crash, finds the old file or the new one and nothing in between."""
    with open(path.with_suffix(".tmp"), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path.with_suffix(".tmp"), path)


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Adds a row to a CSV file; the first row makes the header."""
    with open(path, "a", newline="") as file:
        table = csv.DictWriter(file, list(row))
        if file.tell() == 0:
            table.writeheader()
        table.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})


def make_run_dir(args: Args) -> Path:
    run_dir = Path(args.run_dir or f"runs/{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}")
    for name, kind in (("result.json", "a finished"), ("progress.csv", "an unfinished")):
        if (run_dir / name).exists():
            refuse(f"--run-dir {run_dir} already holds {kind} run: choose another directory.")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "args.json").write_text(json.dumps(asdict(args), indent=2) + "\n")
    except OSError as error:
        refuse(f"--run-dir {run_dir} cannot be written: {error.strerror}.")
    return run_dir


def choose_device(args: Args) -> torch.device:
    torch.backends.cudnn.deterministic = args.torch_deterministic
    # cuDNN would use TF32 by default: fp32 means fp32 here
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.precision == "tf32"
    if args.cuda and torch.cuda.is_available():
        return torch.device("cuda")
    with contextlib.suppress(AttributeError, OSError):
        # glibc hands every large tensor back to the kernel and gets it again page by page: keeping the memory
        # (M_MMAP_MAX = -4, M_TRIM_THRESHOLD = -1) makes the update up to twice as fast.
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)
        libc.mallopt(-1, -1)
    return torch.device("cpu")


def evaluate_run(args: Args) -> None:
    """--evaluate RUN_DIR: prints and writes an evaluation of a saved run. Flags that are not given are that run's."""
    run_dir = Path(args.evaluate)
    try:
        saved = json.loads((run_dir / "args.json").read_text())
        saved = {f.name: saved[f.name] for f in fields(Args) if f.init and f.name in saved}
        args = tyro.cli(Args, default=Args(**saved))
        check_args(args)
        device = choose_device(args)
        checkpoint = torch.load(run_dir / "checkpoint.pt", map_location=device, weights_only=True)
        agent = Agent(make_envs(args, 1), args.precision).to(device, memory_format=torch.channels_last)
        agent.load_state_dict(checkpoint["agent"])
    except (EOFError, OSError, ValueError, KeyError, TypeError, RuntimeError, pickle.UnpicklingError) as error:
        refuse(f"--evaluate {run_dir} is not a run that can be loaded: {(str(error) or repr(error)).splitlines()[0]}")
    name = f"evaluation_{int(time.time())}"
    result = evaluate(agent, args, device, run_dir / "videos" / f"{name}.gif" if args.capture_video else None)
    write_file(run_dir / f"{name}.json", json.dumps(result | {"args": asdict(args)}, indent=2).encode())
    for key in ("train_return", "test_return"):
        print(f"{key}: {result[key]:.2f} +- {result[key + '_std']:.2f} over {args.eval_episodes} levels, once each")
    print(f"every episode: {run_dir / name}.json")


# ---- training -------------------------------------------------------------------------------------------------------


def main() -> None:
    args = tyro.cli(Args)
    if args.evaluate:
        return evaluate_run(args)
    check_args(args)
    if args.track and importlib.util.find_spec("wandb") is None:
        refuse("--track needs Weights and Biases: pip install wandb.")
    run_dir = make_run_dir(args)

    # ==== setup ====
    if args.track:
        import wandb

        wandb.init(sync_tensorboard=True, config=asdict(args), name=run_dir.name, dir=run_dir, save_code=True)
    writer = SummaryWriter(run_dir)
    table = "\n".join(f"|{key}|{value}|" for key, value in asdict(args).items())
    writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}")
    device = choose_device(args)
    torch.manual_seed(args.seed)  # network, actions, minibatches; sampler and evaluation have streams of their own
    envs = make_envs(args, args.num_envs)
    agent = Agent(envs, args.precision).to(device, memory_format=torch.channels_last)
    if args.compile:
        agent.network.compile()
    optimizer = optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    sampler = LevelSampler(
        range(args.start_level, args.start_level + args.num_levels) if args.num_levels else None,
        num_envs=args.num_envs,
        seed=args.seed,
        level_space=FIRST_TEST_LEVEL,
        **{name: getattr(args, name) for name in "curriculum score_transform temperature staleness_coef".split()},
        **{name: getattr(args, name) for name in "replay_schedule rho nu alpha stitch_episodes".split()},
    )
    return_rms = gym.wrappers.utils.RunningMeanStd()  # of the discounted return, scales the rewards

    # ==== storage: T = num_steps, N = num_envs ====
    T, N, num_actions = args.num_steps, args.num_envs, int(envs.single_action_space.n)
    obs = torch.zeros((T, N) + envs.single_observation_space.shape, dtype=torch.uint8, device=device)
    actions = torch.zeros((T, N), dtype=torch.int64, device=device)
    logprobs = torch.zeros((T, N), device=device)
    logits = torch.zeros((T, N, num_actions), device=device)  # float32, normalised log-probabilities
    rewards = torch.zeros((T, N), device=device)  # float32, normalised
    dones = torch.zeros((T, N), device=device)  # float32; dones[t], set before step t: obs[t] begins an episode
    values = torch.zeros((T, N), device=device)
    levels = np.zeros((T, N), np.int64)  # levels[t]: the level that obs[t] belongs to

    global_step = 0
    next_levels = sampler.next_levels(np.ones(N, bool))  # (N,) int64
    next_obs = torch.from_numpy(envs.reset(seed=next_levels.tolist())[0]).to(device)  # (N, 64, 64, 3) uint8
    next_done = torch.zeros(N, device=device)
    # of the episodes in progress: discounted return (for return_rms), return in scaled rewards (for max_mc)
    discounted_return, scaled_return = np.zeros(N), np.zeros(N)
    episode_return, episode_length = np.zeros(N), np.zeros(N, np.int64)  # raw
    window_returns, window_seconds, window_steps = [], 0.0, 0  # since the last printed line
    start_time, train_seconds, evaluation = time.time(), 0.0, None  # train_seconds: without evaluation and checkpoints

    def run_state() -> dict[str, Any]:
        """What the fingerprint is taken of: all that training has made, and all that decides how it would go on."""
        return {
            "agent": agent.state_dict(),
            "optimizer": optimizer.state_dict(),
            "sampler": sampler.state_dict(),
            "return_rms": [float(return_rms.mean), float(return_rms.var), float(return_rms.count)],
            "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state() if device.type == "cuda" else None,
        }

    what = f"{args.env_id} ({args.distribution_mode}), {args.num_levels or 'unbounded'} levels, {args.curriculum}"
    print(f"{what}, seed {args.seed}: {run_dir}", flush=True)
    if device.type == "cpu":
        why = "No CUDA device" if args.cuda else "--no-cuda"
        print(f"{why}: training on {torch.get_num_threads()} CPU threads. How long it will take:", flush=True)

    for iteration in range(1, args.num_iterations + 1):
        iteration_start = time.time()
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = (1 - (iteration - 1) / args.num_iterations) * args.learning_rate

        # ==== rollout ====
        finished: list[tuple[float, int]] = []  # (raw return, length) of the episodes that ended
        for step in range(args.num_steps):
            global_step += args.num_envs
            obs[step] = next_obs
            dones[step] = next_done
            levels[step] = next_levels
            with torch.no_grad():
                action, logprobs[step], _, values[step], logits[step] = agent.get_action_and_value(next_obs)
            actions[step] = action

            observation, reward, terminations, truncations, _ = envs.step(action.cpu().numpy())
            done = terminations | truncations
            episode_return += reward
            episode_length += 1
            # reward normalisation: by the standard deviation of the discounted return, without centring, clipped
            discounted_return = discounted_return * args.reward_norm_gamma + reward
            return_rms.update(discounted_return)
            reward = np.clip(reward / np.sqrt(return_rms.var + 1e-8), -10, 10)
            scaled_return += reward
            rewards[step] = torch.from_numpy(reward)

            if done.any():
                finished += zip(episode_return[done].tolist(), episode_length[done].tolist())
                sampler.record_returns(next_levels[done], scaled_return[done])
                for statistic in (discounted_return, scaled_return, episode_return, episode_length):
                    statistic[done] = 0
                next_levels = sampler.next_levels(done)  # PLR, Algorithm 1: sample the next levels
                observation, _ = envs.reset(seed=next_levels.tolist(), options={"reset_mask": done})
            next_obs = torch.from_numpy(observation).to(device)
            next_done = torch.from_numpy(done).to(device, torch.float32)

        # ==== advantages (GAE) ====
        with torch.no_grad():
            next_value = agent.get_value(next_obs)
            ends = torch.cat((dones[1:], next_done[None]))  # (T, N): step t ended its episode
            next_values = torch.cat((values[1:], next_value[None])) * (1 - ends)
            deltas = rewards + args.gamma * next_values - values
            advantages = torch.zeros_like(rewards)
            lastgaelam = torch.zeros_like(next_value)
            for t in reversed(range(args.num_steps)):
                advantages[t] = lastgaelam = deltas[t] + args.gamma * args.gae_lambda * (1 - ends[t]) * lastgaelam
            returns = advantages + values

        # ==== level scores (PLR, eq. 2): how much is there still to learn on each level? ====
        # (T, N), averaged over each episode by the sampler. Yours is one more line: everything above is at hand.
        if args.score == "value_l1":
            step_scores = advantages.abs()
        elif args.score == "gae":
            step_scores = advantages
        elif args.score == "positive_value_loss":
            step_scores = advantages.clamp(min=0)
        elif args.score == "one_step_td_error":
            step_scores = deltas.abs()
        elif args.score == "policy_entropy":
            step_scores = -(logits.exp() * logits).sum(-1) / math.log(num_actions)
        elif args.score == "least_confidence":
            step_scores = 1 - logits.exp().amax(-1)
        elif args.score == "min_margin":
            step_scores = 1 - logits.exp().topk(2).values.diff(dim=-1).abs().squeeze(-1)
        elif args.score == "max_mc":  # Robust PLR: best return so far on the level, in the units of the values
            step_scores = torch.from_numpy(sampler.best_returns(levels)).to(values) - values
        sampler.update(levels, step_scores.cpu().numpy(), ends.cpu().numpy())

        # ==== optimise (PPO) ====
        b_obs = obs.reshape((-1,) + envs.single_observation_space.shape)
        b_actions, b_logprobs = actions.reshape(-1), logprobs.reshape(-1)
        b_advantages, b_returns, b_values = advantages.reshape(-1), returns.reshape(-1), values.reshape(-1)
        losses, updates = torch.zeros(6, device=device), 0  # summed over the minibatches, read once
        for _epoch in range(args.update_epochs):
            for mb_inds in torch.randperm(args.batch_size, device=device).split(args.minibatch_size):
                _, newlogprob, entropy, newvalue, _ = agent.get_action_and_value(b_obs[mb_inds], b_actions[mb_inds])
                logratio = newlogprob - b_logprobs[mb_inds]
                ratio = logratio.exp()
                mb_advantages = b_advantages[mb_inds]
                mb_advantages = (mb_advantages - mb_advantages.mean()) / (mb_advantages.std() + 1e-8)
                pg_loss1 = -mb_advantages * ratio
                pg_loss2 = -mb_advantages * ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
                pg_loss = torch.max(pg_loss1, pg_loss2).mean()
                v_change = (newvalue - b_values[mb_inds]).clamp(-args.clip_coef, args.clip_coef)
                v_loss_unclipped = (newvalue - b_returns[mb_inds]) ** 2
                v_loss_clipped = (b_values[mb_inds] + v_change - b_returns[mb_inds]) ** 2
                v_loss = 0.5 * torch.max(v_loss_unclipped, v_loss_clipped).mean()
                entropy_loss = entropy.mean()
                loss = pg_loss - args.ent_coef * entropy_loss + v_loss * args.vf_coef

                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                optimizer.step()
                with torch.no_grad():  # approx_kl: http://joschu.net/blog/kl-approx.html
                    old_approx_kl, approx_kl = -logratio.mean(), ((ratio - 1) - logratio).mean()
                    clipfrac = ((ratio - 1).abs() > args.clip_coef).float().mean()
                    losses += torch.stack((v_loss, pg_loss, entropy_loss, old_approx_kl, approx_kl, clipfrac)).detach()
                    updates += 1
            if args.target_kl is not None and approx_kl > args.target_kl:
                break

        # ==== log ====
        losses = (losses / updates).tolist()  # waits for the device: the clock stops after the work is done
        seconds = time.time() - iteration_start
        train_seconds += seconds
        explained_var = float(1 - (b_returns - b_values).var() / b_returns.var().clamp(min=1e-12))
        names = ("value_loss", "policy_loss", "entropy", "old_approx_kl", "approx_kl", "clipfrac")
        row = {
            "charts/episodic_return": float(np.mean([x for x, _ in finished])) if finished else math.nan,
            "charts/episodic_length": float(np.mean([x for _, x in finished])) if finished else math.nan,
            "charts/episodes": len(finished),
            "charts/learning_rate": optimizer.param_groups[0]["lr"],
            "charts/SPS": args.batch_size / seconds,
            **{f"losses/{name}": value for name, value in zip(names, losses)},
            "losses/explained_variance": explained_var,
            **{f"curriculum/{name}": value for name, value in sampler.metrics().items()},
        }
        for key, value in row.items():
            if not math.isnan(value):
                writer.add_scalar(key, value, global_step)
        columns = {key.split("/")[1]: value for key, value in row.items()}
        when = {"global_step": global_step, "wall_seconds": time.time() - start_time}
        append_row(run_dir / "progress.csv", when | columns)

        # ==== evaluate ====
        last = iteration == args.num_iterations
        if last or (args.eval_interval and iteration % args.eval_interval == 0):
            video = run_dir / "videos" / f"step_{global_step}.gif" if args.capture_video else None
            evaluation = evaluate(agent, args, device, video)
            scalars = {key: value for key, value in evaluation.items() if key != "episodes"}
            for key, value in scalars.items():
                writer.add_scalar(f"eval/{key}", value, global_step)
            append_row(run_dir / "evaluations.csv", when | scalars)

        # ==== checkpoint ====
        if last or (args.checkpoint_interval and iteration % args.checkpoint_interval == 0):
            state = run_state() | {"args": asdict(args), "iteration": iteration, "global_step": global_step}
            torch.save(plain(state), data := io.BytesIO())
            write_file(run_dir / "checkpoint.pt", data.getvalue())

        window_returns += [x for x, _ in finished]
        window_seconds, window_steps = window_seconds + seconds, window_steps + args.batch_size
        if last or iteration == 1 or window_seconds > 10:
            left = (time.time() - start_time) / iteration * (args.num_iterations - iteration)
            parts = [f"step {global_step:,} ({iteration / args.num_iterations:.1%})"]
            parts += [
                f"{left // 3600:.0f}h{left % 3600 // 60:02.0f}m left",
                f"{window_steps / window_seconds:,.0f} steps/s",
            ]
            parts += [f"train return {np.mean(window_returns) if window_returns else math.nan:.2f}"]
            if evaluation:
                parts += [f"evaluation: train {evaluation['train_return']:.2f}, test {evaluation['test_return']:.2f}"]
            print(" | ".join(parts), flush=True)
            window_returns, window_seconds, window_steps = [], 0.0, 0

    result = {"env_id": args.env_id, "curriculum": args.curriculum, "seed": args.seed, "global_step": global_step}
    result |= {"steps_per_second": global_step / train_seconds, "wall_seconds": time.time() - start_time}
    result |= {"device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "torch": torch.__version__}
    result |= {"fingerprint": fingerprint(run_state()), "evaluation": evaluation}
    write_file(run_dir / "result.json", json.dumps(result, indent=2).encode())
    envs.close()
    writer.close()
    print(f"done: {run_dir}/result.json, fingerprint {result['fingerprint'][:16]}", flush=True)


if __name__ == "__main__":
    main()
