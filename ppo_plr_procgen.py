"""PPO + Prioritized Level Replay (PLR) on Procgen, in one file.

    python ppo_plr_procgen.py --env-id bigfish                         # PLR with the paper's settings
    python ppo_plr_procgen.py --env-id bigfish --curriculum uniform    # the baseline: levels drawn uniformly
    python ppo_plr_procgen.py --env-id bigfish --score gae             # another score; write your own at "level scores"
    python ppo_plr_procgen.py --resume runs/RUN                        # goes on where the run's last checkpoint is
    torchrun --nproc-per-node 8 ppo_plr_procgen.py --env-id bigfish    # several GPUs or machines, one curriculum
    python ppo_plr_procgen.py --evaluate runs/RUN --eval-episodes 1000 --capture-video

PLR: Jiang, Grefenstette, Rocktaeschel, "Prioritized Level Replay", 2021 (arXiv 2010.03934).
PPO and the names in this file: CleanRL's ppo_procgen.py. Network: IMPALA (arXiv 1802.01561).

Procgen ends an episode at its time limit and shows neither that it did nor the last observation: as in the paper, a
timeout is a terminal state here. README.md lists the logged keys and every deviation from the released code.
"""

import contextlib
import ctypes
import functools
import importlib.util
import io
import json
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import tyro
from PIL import Image
from torch import Tensor, nn, optim
from torch.distributions.categorical import Categorical
from torch.utils.data import default_convert
from torch.utils.tensorboard import SummaryWriter

from plr_sampler import LevelSampler

GAMES = "bigfish bossfight caveflyer chaser climber coinrun dodgeball fruitbot heist jumper leaper maze miner ninja "
GAMES = (GAMES + "plunder starpilot").split()
GAMES_WITH_MODE = {"easy": GAMES, "hard": GAMES, "extreme": "chaser dodgeball leaper starpilot".split()}
GAMES_WITH_MODE["memory"] = "caveflyer dodgeball heist jumper maze miner".split()
SCORES = "value_l1 gae positive_value_loss one_step_td_error policy_entropy least_confidence min_margin max_mc".split()
FORMAT = "ppo_plr_procgen 2"  # of checkpoint.pt
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's: process, processes
FREE_ON_RESUME = "total_timesteps checkpoint_interval capture_video track profile env_threads resume evaluate".split()
FIRST_TEST_LEVEL = 2**30  # levels below are for training, from here to 2**31 - 1 for testing: no run trains on those


@dataclass
class Args:
    # Experiment
    exp_name: str = os.path.basename(__file__)[: -len(".py")]  # part of the default run directory's name
    seed: int = 1  # decides everything random; evaluation has random streams of its own
    torch_deterministic: bool = True  # choose deterministic kernels; the CPU's always are
    cuda: bool = True  # train on the GPU if there is one
    track: bool = False  # also log to Weights and Biases; WANDB_PROJECT and WANDB_ENTITY name the project and team
    run_dir: str | None = None  # where the run's files go; runs/{env_id}__{exp_name}__{seed}__{time} if not given
    checkpoint_interval: int = 10  # iterations between checkpoints (0: only at the start and the end)
    resume: str | None = None  # continue the run in this directory exactly, with its flags; --total-timesteps may grow

    # Environment
    env_id: Literal[tuple(GAMES)] = "starpilot"  # one of the 16 Procgen games
    distribution_mode: Literal["easy", "hard", "extreme", "memory"] = "easy"  # Procgen's difficulty
    num_levels: int = 200  # size of the training set of levels (0: no bound, for --curriculum uniform or sequential)
    start_level: int = 0  # the first training level
    env_threads: int = 0  # Procgen's worker threads (0: one per CPU core). The result does not depend on it

    # PPO (PLR paper, Table 3)
    total_timesteps: int = 25_000_000  # environment steps of the whole run, rounded down to full iterations
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
    target_kl: float | None = None  # stop an iteration's epochs once the approximate KL divergence exceeds this
    reward_norm_gamma: float = 0.99  # discount of the return whose variance scales the rewards; CleanRL has 0.999

    # PLR
    curriculum: Literal["plr", "uniform", "sequential"] = "plr"  # PLR, levels at random, one after the other
    score: Literal[tuple(SCORES)] = "value_l1"  # what is left to learn on a level; formulas at "level scores" below
    score_transform: Literal["constant", "max", "eps_greedy", "rank", "power", "softmax"] = "rank"  # the paper's h
    temperature: float = 0.1  # of the transform (the paper's beta): lower is greedier
    staleness_coef: float = 0.1  # share of replay by staleness (the paper's rho)
    replay_schedule: Literal["proportionate", "fixed"] = "proportionate"  # P(replay) = share seen, or 1 - nu
    rho: float = 1.0  # share of levels to be seen before any is replayed. 1: as released; 0: as in the paper's text
    nu: float = 0.5  # with the fixed schedule: probability of a new level while there are any
    alpha: float = 1.0  # weight of a level's new score in its running mean (1: the last score counts)
    stitch_episodes: bool = False  # score an episode that spans rollouts as a whole (the paper's Algorithm 4)

    # Evaluation
    eval_interval: int = 50  # iterations between evaluations (0: only at the end)
    eval_episodes: int = 100  # on training levels, and on levels never trained on: each level once if there are enough
    capture_video: bool = False  # write a GIF of a test episode at each evaluation
    evaluate: str | None = None  # only evaluate the run in this directory. Other flags default to that run's

    # Speed
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"  # bf16: about twice as fast on CPUs with AMX or AVX512-BF16
    compile: bool = False  # torch.compile the network
    profile: bool = False  # print each phase's share of the time; trace the last iteration, for ui.perfetto.dev
    batch_size: int = field(init=False)
    minibatch_size: int = field(init=False)
    num_iterations: int = field(init=False)

    def __post_init__(self):
        self.batch_size = self.num_envs * self.num_steps
        self.minibatch_size = self.batch_size // max(self.num_minibatches, 1)
        self.num_iterations = self.total_timesteps // max(self.batch_size, 1)


def refuse(reason: str, status: int = 2) -> None:
    time.sleep(30 * (RANK > 0 and status == 2))  # rank 0 says it, and torchrun ends the others
    print(f"error: {reason}", file=sys.stderr)
    raise SystemExit(status)


def check_args(args: Args) -> None:
    """Refuses what cannot work, with one sentence and exit status 2."""
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
    require("num_envs", lambda x: x % WORLD == 0, f"a multiple of torchrun's {WORLD} processes")
    rollout = f"--num-envs x --num-steps = {args.batch_size}"
    divides = f"a divisor of {rollout} and less than that"
    require("num_minibatches", lambda x: args.batch_size % x == 0 and x < args.batch_size, divides)
    first = args.batch_size * (3 if args.profile else 1)
    require("total_timesteps", lambda x: x >= first, f"at least {first}: {rollout} is one iteration, --profile needs 3")
    most = FIRST_TEST_LEVEL - args.num_levels
    require("start_level", lambda x: x <= most, f"at most {most}: levels from {FIRST_TEST_LEVEL} on are for testing")
    if args.num_levels == 0:
        require("start_level", lambda x: x == 0, "0 with --num-levels 0, which draws from all levels")
        require("curriculum", lambda x: x != "plr", "uniform or sequential with --num-levels 0: plr needs a fixed set")
    if args.curriculum == "plr" and args.score in ("gae", "max_mc"):
        require("score_transform", lambda x: x != "power", f"another: --score {args.score} can be negative")


# ---- levels and environments ----------------------------------------------------------------------------------------


class ProcgenLevels(gym.vector.VectorEnv):
    """Procgen as a Gymnasium VectorEnv without autoreset, in which the seed of a reset is exactly the level played.

        obs, infos = envs.reset(seed=levels, options={"reset_mask": done})   # env i starts levels[i] where done[i]
        obs, rewards, terminations, truncations, infos = envs.step(actions)

    Observations are (N, 64, 64, 3) uint8, those of an environment that is done mean nothing until its reset; rewards
    (N,) float32. A level's start is the saved state of a fresh single-level game, and the stock wheel's `set_state`
    puts any environment there. (Procgen's own reset would not: in dodgeball, the last episode leaks into the next.)
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
        seed = self.np_random.integers(FIRST_TEST_LEVEL) if seed is None else seed
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

    def get_state(self) -> list[Tensor]:
        """Where each environment is, exactly: 21-38 KB each, uint8."""
        return [torch.frombuffer(bytearray(state), dtype=torch.uint8) for state in self.procgen.get_state()]

    def set_state(self, states: list[Tensor]) -> np.ndarray:
        """Goes back there, in any process; returns the observations."""
        self.procgen.set_state([bytes(state.numpy()) for state in states])
        return self.procgen.observe()[1]["rgb"]

    def close_extras(self, **kwargs) -> None:
        self.procgen.close()


def to_device(x: np.ndarray, device: torch.device) -> Tensor:
    """To a GPU through page-locked memory, so that nothing waits for the copy."""
    x = torch.from_numpy(x)
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


def make_envs(args: Args, num_envs: int) -> gym.vector.VectorEnv:
    """To train on something else, return another VectorEnv with autoreset off whose reset seed is the level."""
    try:
        threads = min(args.env_threads or os.cpu_count(), num_envs)
        return ProcgenLevels(num_envs, args.env_id, args.distribution_mode, threads)
    except (ImportError, OSError) as error:
        refuse(f"Procgen does not load ({error}). On Debian or Ubuntu: apt-get install libgl1 libglib2.0-0")


def evaluation_levels(args: Args) -> np.ndarray:
    """(2 * eval_episodes,) test levels, then training levels: decided by the seed, distinct if there are enough."""
    rng = np.random.default_rng([args.seed, 1])
    test_levels = FIRST_TEST_LEVEL + rng.choice(2**31 - 1 - FIRST_TEST_LEVEL, args.eval_episodes, replace=False)
    if args.num_levels == 0:
        return np.append(test_levels, rng.choice(FIRST_TEST_LEVEL, args.eval_episodes, replace=False))
    return np.append(test_levels, np.resize(args.start_level + rng.permutation(args.num_levels), args.eval_episodes))


# ---- network --------------------------------------------------------------------------------------------------------


class ResidualBlock(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv0 = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.conv1 = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv1(torch.relu(self.conv0(torch.relu(x))))


class ConvSequence(nn.Sequential):
    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1),
            nn.MaxPool2d(kernel_size=3, stride=2, padding=1), ResidualBlock(out_channels), ResidualBlock(out_channels),
        )  # fmt: skip


class Agent(nn.Module):
    def __init__(self, envs: gym.vector.VectorEnv, precision: str = "fp32"):
        super().__init__()
        h, w, c = envs.single_observation_space.shape
        self.bf16 = precision == "bf16"
        self.network = nn.Sequential(
            ConvSequence(c, 16), ConvSequence(16, 32), ConvSequence(32, 32), nn.Flatten(), nn.ReLU(),
            nn.Linear(32 * math.ceil(h / 8) * math.ceil(w / 8), 256), nn.ReLU(),
        )  # fmt: skip
        self.actor, self.critic = nn.Linear(256, envs.single_action_space.n), nn.Linear(256, 1)
        for layer, std in ((self.actor, 0.01), (self.critic, 1.0)):
            nn.init.orthogonal_(layer.weight, std)
            nn.init.constant_(layer.bias, 0.0)

    def hidden(self, x: Tensor) -> Tensor:
        """(B, 64, 64, 3) uint8 -> (B, 256) float32. The heads after it are always float32."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            return self.network(x.permute(0, 3, 1, 2) / 255.0).float()  # "bhwc" -> "bchw", in channels_last memory

    def get_value(self, x: Tensor) -> Tensor:
        return self.critic(self.hidden(x)).flatten()

    def get_action_and_value(self, x: Tensor, action: Tensor | None = None, clocks: Tensor | None = None) -> tuple:
        """x (B, 64, 64, 3) uint8 -> action, log-probability, entropy, value (B,) and logits (B, actions)."""
        hidden = self.hidden(x)
        probs = Categorical(logits=self.actor(hidden), validate_args=False)
        if action is None:
            # of clocks that ring after times of Exp(1) / p, the first is each with probability p
            action = probs.sample() if clocks is None else (probs.probs / clocks).argmax(-1)
        return action, probs.log_prob(action), probs.entropy(), self.critic(hidden).flatten(), probs.logits


# ---- evaluation -----------------------------------------------------------------------------------------------------


def evaluate(agent: Agent, args: Args, device: torch.device, video: Path | None = None) -> dict[str, Any]:
    """Plays an episode on each of `evaluation_levels` to its end: stochastic policy, raw returns, own random stream."""
    levels = evaluation_levels(args)
    returns, frames = np.zeros(len(levels)), []
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(int(np.random.default_rng([args.seed, 2]).integers(2**62)))
        for chunk in np.array_split(np.arange(len(levels)), math.ceil(len(levels) / 256)):
            envs = make_envs(args, len(chunk))
            obs, _ = envs.reset(seed=levels[chunk].tolist())
            playing = np.arange(len(chunk))  # environments whose episode goes on
            while len(playing):
                if video and chunk[playing[0]] == 0:  # the first test episode
                    frames.append(Image.fromarray(obs[0]).resize((256, 256), Image.Resampling.NEAREST))
                actions = np.zeros(len(chunk), np.int32)
                action = agent.get_action_and_value(torch.from_numpy(obs[playing]).to(device))[0]
                actions[playing] = action.cpu().numpy()
                obs, reward, terminations, truncations, _ = envs.step(actions)
                returns[chunk[playing]] += reward[playing]
                playing = playing[~(terminations | truncations)[playing]]
            envs.close()
    if video:  # every second frame, at Procgen's speed
        video.parent.mkdir(parents=True, exist_ok=True)
        frames[0].save(video, save_all=True, append_images=frames[2::2], duration=133, loop=0)
    result: dict[str, Any] = {"episodes": {}}
    for name, part in (("test", slice(0, args.eval_episodes)), ("train", slice(args.eval_episodes, None))):
        result[f"{name}_return"], result[f"{name}_return_std"] = float(returns[part].mean()), float(returns[part].std())
        result["episodes"] |= {f"{name}_levels": levels[part].tolist(), f"{name}_returns": returns[part].tolist()}
    result["generalization_gap"] = result["train_return"] - result["test_return"]
    return result


# ---- run directory --------------------------------------------------------------------------------------------------


def fingerprint(state: Any) -> str:
    """SHA-256 of a nested state. Two runs with the same fingerprint are the same run."""
    state = default_convert(state)
    text = json.dumps(state, sort_keys=True, default=lambda x: sha256(x.cpu().numpy().tobytes()).hexdigest())
    return sha256(text.encode()).hexdigest()


def write_file(path: Path, content: Any) -> None:
    """bytes; else .pt for torch.load(weights_only=True), or JSON. A crash leaves the old file or the new one."""
    if path.suffix == ".pt":
        torch.save(default_convert(content), buffer := io.BytesIO())
        content = buffer.getvalue()
    with open(path.with_suffix(".tmp"), "wb") as file:
        file.write(content if isinstance(content, bytes) else json.dumps(content, indent=2).encode())
        file.flush()
        os.fsync(file.fileno())
    os.replace(path.with_suffix(".tmp"), path)


def cut_rows(path: Path, global_step: int) -> None:
    """Leaves a CSV file's rows up to global_step. Those after it, and one that was cut short, will be written again."""
    header, *lines = path.read_bytes().splitlines(keepends=True) if path.exists() else [b""]
    kept = [line for line in lines if line.endswith(b"\n") and int(line.split(b",")[0]) <= global_step]
    write_file(path, (header + b"".join(kept)) if kept else b"")


def make_run_dir(args: Args) -> Path:
    default = f"runs/{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}"
    run_dir = Path(args.resume or args.run_dir or default)
    if RANK == 0 and not args.resume and (run_dir / "progress.csv").exists():
        refuse(f"--run-dir {run_dir} already holds a run: choose another directory, or --resume {run_dir}.")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if RANK == 0:
            write_file(run_dir / "args.json", asdict(args))
    except OSError as error:
        refuse(f"--run-dir {run_dir} cannot be written: {error.strerror}.")
    return run_dir


def load_run(flag: str, run_dir: Path) -> tuple[Args, dict[str, Any]]:
    """The flags of the run in --evaluate or --resume RUN_DIR, changed by the command line; its checkpoint."""
    try:
        checkpoint = torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=True)
        if checkpoint["format"] != FORMAT:
            raise ValueError(f"the format of its checkpoint is {checkpoint['format']!r}, this script's is {FORMAT!r}")
        saved = {f.name: checkpoint["args"][f.name] for f in fields(Args) if f.init and f.name in checkpoint["args"]}
        defaults = Args(**saved)
    except Exception as error:  # whatever a damaged file makes of torch.load
        refuse(f"--{flag} {run_dir} is not a run that can be loaded: {(str(error) or repr(error)).splitlines()[0]}")
    args = replace(tyro.cli(Args, default=defaults), **{flag: str(run_dir)})  # and derives the sizes anew
    if flag == "resume":
        for name, value in saved.items():
            if getattr(args, name) != value and name not in FREE_ON_RESUME:
                refuse(f"--{name.replace('_', '-')} {getattr(args, name)} must be {value}, as in the run to resume.")
        # a run that was killed after its last checkpoint has only its result left to write
        if args.num_iterations < checkpoint["iteration"] + (run_dir / "result.json").exists():
            refuse(f"--total-timesteps {args.total_timesteps} must be raised: {run_dir} is finished.")
    return args, checkpoint


def choose_device(args: Args) -> torch.device:
    torch.backends.cudnn.deterministic = args.torch_deterministic
    os.environ.setdefault("TORCHINDUCTOR_DETERMINISTIC", "1")  # compiled kernels are not chosen by timing them
    # cuDNN would use TF32 by default: fp32 means fp32 here
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.precision == "tf32"
    cuda = args.cuda and torch.cuda.is_available()
    if args.torch_deterministic and args.compile and cuda:  # else its max pooling would add gradients in any order
        torch.use_deterministic_algorithms(True, warn_only=True)
    if WORLD > 1:
        store, *_ = next(dist.rendezvous("env://"))  # a restarted group would find the last one's addresses in it
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=RANK, world_size=WORLD)
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        return torch.device("cuda", torch.cuda.current_device())
    with contextlib.suppress(AttributeError, OSError):
        # glibc hands large tensors back to the kernel: keeping the memory makes the update up to twice as fast
        for option, value in ((-4, 0), (-1, -1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(option, value)
    return torch.device("cpu")


def evaluate_run(args: Args, checkpoint: dict[str, Any]) -> None:
    """--evaluate RUN_DIR: prints and writes an evaluation of a saved run. Flags that are not given are that run's."""
    path = Path(args.evaluate, f"evaluation_{int(time.time())}.json")
    device = choose_device(args)
    agent = Agent(make_envs(args, 1), args.precision).to(device, memory_format=torch.channels_last)
    agent.load_state_dict(checkpoint["agent"])
    result = evaluate(agent, args, device, path.parent / "videos" / f"{path.stem}.gif" if args.capture_video else None)
    write_file(path, result | {"global_step": checkpoint["global_step"], "args": asdict(args)})
    for key in ("train_return", "test_return"):
        print(f"{key}: {result[key]:.2f} +- {result[key + '_std']:.2f} over {args.eval_episodes} episodes")
    print(f"every episode: {path}")


# ---- torchrun -------------------------------------------------------------------------------------------------------
# A rank plays its part of the environments. Rewards, ends of episodes and values are shared, and from there on every
# rank does the same for all N environments: reward normalisation, GAE, curriculum. Gradients are added up.


def share(x: Tensor) -> Tensor:
    """(..., n) of this rank's environments -> (..., N) of all ranks'."""
    if WORLD == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(WORLD)]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts, dim=-1)


def add_gradients(agent: nn.Module) -> None:
    if WORLD > 1:
        gradients = [p.grad for p in agent.parameters()]
        dist.all_reduce(flat := torch.cat([x.reshape(-1) for x in gradients]))  # one message
        for x, total in zip(gradients, flat.split([x.numel() for x in gradients])):
            x.copy_(total.view(x.shape))


# ---- training -------------------------------------------------------------------------------------------------------


def main() -> None:
    args, checkpoint = tyro.cli(Args), None
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and Path(args.run_dir or "", "checkpoint.pt").exists():
        args.resume = args.resume or args.run_dir  # torchrun --max-restarts has started it again
    if args.evaluate or args.resume:
        args, checkpoint = load_run("evaluate" if args.evaluate else "resume", Path(args.evaluate or args.resume))
    check_args(args)
    if args.evaluate:
        return evaluate_run(args, checkpoint)
    if args.track and importlib.util.find_spec("wandb") is None:
        refuse("--track needs Weights and Biases: pip install wandb.")
    run_dir = make_run_dir(args)
    threading.excepthook = lambda _: None  # TensorBoard's: what its writing thread meets, the next write says
    try:
        train(args, run_dir, checkpoint)
        if WORLD > 1:  # gloo's threads have aborted a process as it ended, after its work: leave without them
            sys.stdout.flush()
            os._exit(0)
    except Exception as error:  # a full disk, a dead environment, a loss that is not finite
        with contextlib.suppress(OSError):
            (run_dir / f"error_{RANK}.txt").write_text(traceback.format_exc())
        what = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(":. ")
        refuse(f"{what}. {run_dir}/error_{RANK}.txt has details; to go on: --resume {run_dir}", status=1)


def train(args: Args, run_dir: Path, checkpoint: dict[str, Any] | None) -> None:
    # ==== setup ====
    if RANK == 0:
        if args.track:
            import wandb

            wandb.init(sync_tensorboard=True, config=asdict(args), name=run_dir.name, dir=run_dir, save_code=True)
        writer = SummaryWriter(run_dir, purge_step=checkpoint["global_step"] + 1 if checkpoint else None)
        table = "\n".join(f"|{key}|{value}|" for key, value in asdict(args).items())
        writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}")
    device = choose_device(args)
    device_name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    torch.manual_seed(args.seed)  # network, actions, minibatches; sampler and evaluation have streams of their own
    T, N, n = args.num_steps, args.num_envs, args.num_envs // WORLD
    here = slice(RANK * n, (RANK + 1) * n)  # this rank's environments: all N of them without torchrun
    envs = make_envs(args, n)
    agent = Agent(envs, args.precision).to(device, memory_format=torch.channels_last)
    if args.compile:
        agent.network.compile()
    optimizer = optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    names = "num_envs seed curriculum score_transform temperature staleness_coef replay_schedule rho nu alpha"
    options = {name: getattr(args, name) for name in [*names.split(), "stitch_episodes"]}
    training_levels = range(args.start_level, args.start_level + args.num_levels) if args.num_levels else None
    sampler = LevelSampler(training_levels, **options, level_space=FIRST_TEST_LEVEL)
    return_rms = gym.wrappers.utils.RunningMeanStd()  # of the discounted return, scales the rewards

    # ==== storage: T = num_steps, N = num_envs, n of them on this rank ====
    num_actions = int(envs.single_action_space.n)
    obs = torch.zeros((T, n) + envs.single_observation_space.shape, dtype=torch.uint8, device=device)
    actions = torch.zeros((T, n), dtype=torch.int64, device=device)
    logprobs = torch.zeros((T, n), device=device)
    logits = torch.zeros((T, n, num_actions), device=device)  # float32, normalised log-probabilities
    own_values = torch.zeros((T + 1, n), device=device)  # float32; the last row is of what follows the rollout
    rewards = torch.zeros((T, N))  # float32, normalised; on the CPU, like all that is of all ranks' environments
    dones = np.zeros((T, N), bool)  # dones[t], set before step t: obs[t] begins an episode
    levels = np.zeros((T, N), np.int64)  # levels[t]: the level that obs[t] belongs to
    clocks = torch.zeros((N, num_actions), device=device)  # noise that decides actions, the same on every rank
    # of the episodes in progress: return, length; discounted return (for return_rms), scaled return (for max_mc)
    episode_return, episode_length, discounted_return, scaled_return = statistics = np.zeros((4, N))

    def run_state() -> dict[str, Any]:
        """What the fingerprint is taken of: all that training has made, and all that decides how it would go on."""
        cuda_rng = torch.cuda.get_rng_state() if device.type == "cuda" else None
        state = {"agent": agent.state_dict(), "optimizer": optimizer.state_dict(), "sampler": sampler.state_dict()}
        state["return_rms"] = [float(return_rms.mean), float(return_rms.var), float(return_rms.count)]
        return state | {"torch_rng": torch.get_rng_state(), "cuda_rng": cuda_rng}

    profiler, running, spent = torch.profiler.profile(), contextlib.ExitStack(), Counter()  # seconds by phase

    def phase(name: str) -> None:
        """With --profile: what follows, the GPU's work included, is this phase's time and a range of the trace."""
        if args.profile and iteration > 1:  # the first one warms up
            if device.type == "cuda":
                torch.cuda.synchronize()
            running.close()  # and with it the phase before
            start = time.perf_counter()
            running.callback(lambda: spent.update({name: time.perf_counter() - start}))
            if last:  # and traced: a range costs some 15 us
                running.enter_context(torch.profiler.record_function(name))

    def log(path: Path, row: dict[str, Any]) -> None:
        """A row for TensorBoard and, its names without their group, for a CSV file; the first row makes the header."""
        for key, value in row.items():
            if not math.isnan(value):
                writer.add_scalar(key, value, global_step)
        columns = {"global_step": global_step, "wall_seconds": time.time() - start_time}
        columns |= {key.split("/")[1]: value for key, value in row.items()}
        with open(path, "a") as file:
            cells = (f"{x:.6g}" if isinstance(x, float) else str(x) for x in columns.values())
            file.writelines(",".join(x) + "\n" for x in ([columns, cells] if file.tell() == 0 else [cells]))

    def mean(x: Tensor) -> Tensor:
        """This rank's part of the mean over a minibatch of all ranks."""
        return x.sum() / args.minibatch_size

    def save_checkpoint() -> None:
        state = run_state()
        mark = torch.tensor([int(fingerprint(state)[:15], 16)])
        if (share(mark) != mark).any():
            raise RuntimeError(f"the ranks' states differ after iteration {iteration}")
        env_states = [envs.get_state() if hasattr(envs, "get_state") else None] * WORLD
        if WORLD > 1:
            dist.all_gather_object(env_states, env_states[0])
        state |= {"envs": env_states, "statistics": statistics}
        state |= {"seconds": [time.time() - start_time, train_seconds], "global_step": global_step, "format": FORMAT}
        state |= {"iteration": iteration, "args": asdict(args)}
        if RANK == 0:
            write_file(run_dir / "checkpoint.pt", state)

    def require_finite(x: Tensor, what: str) -> None:
        """Ends the run, with what led there in a file; the last checkpoint is from before."""
        if not x.isfinite().all():
            what_led = {"obs": obs, "actions": actions, "logprobs": logprobs, "rewards": rewards, "values": own_values}
            write_file(run_dir / f"failed_{RANK}.pt", what_led | {"levels": levels, "agent": agent.state_dict()})
            raise FloatingPointError(f"{what} of iteration {iteration} is not finite, see failed_{RANK}.pt")

    # ==== start or resume ====
    iteration, global_step, train_seconds, start_time = 0, 0, 0.0, time.time()  # train_seconds: without evaluation
    if checkpoint:
        for name, part in (("agent", agent), ("optimizer", optimizer), ("sampler", sampler)):
            part.load_state_dict(checkpoint[name])
        return_rms.mean, return_rms.var, return_rms.count = checkpoint["return_rms"]
        torch.set_rng_state(checkpoint["torch_rng"])
        if device.type == "cuda" and checkpoint["cuda_rng"] is not None:
            torch.cuda.set_rng_state(checkpoint["cuda_rng"])
        iteration, global_step, (seconds, train_seconds) = map(checkpoint.get, ("iteration", "global_step", "seconds"))
        start_time -= seconds
        for name in ("progress.csv", "evaluations.csv") if RANK == 0 else ():
            cut_rows(run_dir / name, global_step)
        (run_dir / "result.json").unlink(missing_ok=True)
    if checkpoint and checkpoint["envs"][0]:
        next_levels, statistics[:] = sampler.playing.copy(), checkpoint["statistics"]
        next_obs = envs.set_state(sum(checkpoint["envs"], [])[here])
    else:
        if checkpoint and RANK == 0:
            print(f"Its environments could not be saved: {N} episodes are dropped, others start.", flush=True)
        sampler.drop(np.ones(N, bool))
        next_levels = sampler.next_levels(np.ones(N, bool))  # (N,) int64
        next_obs, _ = envs.reset(seed=next_levels[here].tolist())
    next_obs, next_done = to_device(next_obs, device), np.zeros(N, bool)  # (n, 64, 64, 3) uint8

    stopped: list[int] = []  # signals: the first ends the run after its iteration, a second one at once
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, _: stopped.append(number) or signal.signal(number, signal.SIG_DFL))
    if not checkpoint:
        save_checkpoint()
    if RANK == 0:
        what = f"{args.env_id} ({args.distribution_mode}), {args.num_levels or 'unbounded'} levels, {args.curriculum}"
        print(f"{what}, seed {args.seed}: {run_dir}\ntraining on {device_name}", flush=True)
    shown_at, evaluation, stopping = (global_step, train_seconds), None, False  # shown_at: at the last printed line

    while iteration < args.num_iterations and not stopping:
        iteration += 1
        iteration_start, last = time.time(), iteration == args.num_iterations
        if args.profile and last:
            shares = (f"{name} {x:.4g} s ({x / spent.total():.1%})" for name, x in spent.most_common())
            print(f"profile to iteration {iteration - 1}, rank {RANK}: {', '.join(shares)}", flush=True)
            profiler.start()
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = (1 - (iteration - 1) / args.num_iterations) * args.learning_rate

        # ==== rollout ====
        finished: list[tuple[float, int]] = []  # (raw return, length) of the episodes that ended
        for step in range(args.num_steps):
            global_step += args.num_envs
            phase("inference")
            obs[step], dones[step], levels[step] = next_obs, next_done, next_levels
            with torch.no_grad():
                noise = clocks.exponential_()[here]
                action, logprobs[step], _, value, logits[step] = agent.get_action_and_value(next_obs, clocks=noise)
            actions[step], own_values[step] = action, value
            phase("transfer")
            action = action.cpu().numpy()
            phase("environment")
            next_obs, reward, terminations, truncations, _ = envs.step(action)
            phase("rest")
            reward, next_done = share(torch.from_numpy(np.stack((reward, terminations | truncations)))).numpy()  # (N,)
            next_done = next_done > 0
            episode_return += reward
            episode_length += 1
            # reward normalisation: by the standard deviation of the discounted return, without centring, clipped
            discounted_return[:] = discounted_return * args.reward_norm_gamma + reward
            return_rms.update(discounted_return)
            reward = np.clip(reward / np.sqrt(return_rms.var + 1e-8), -10, 10)
            scaled_return += reward
            rewards[step] = torch.from_numpy(reward)
            if next_done.any():
                phase("sampler")
                finished += zip(episode_return[next_done].tolist(), episode_length[next_done].tolist())
                sampler.record_returns(next_levels[next_done], scaled_return[next_done])
                statistics[:, next_done] = 0
                next_levels = sampler.next_levels(next_done)  # PLR, Algorithm 1: sample the next levels
                phase("environment")
                next_obs, _ = envs.reset(seed=next_levels[here].tolist(), options={"reset_mask": next_done[here]})
            phase("transfer")
            next_obs = to_device(next_obs, device)

        # ==== advantages (GAE) ====
        phase("rest")
        with torch.no_grad():
            own_values[T] = agent.get_value(next_obs)
        values = share(own_values).cpu()
        ended = np.concatenate((dones[1:], next_done[None]))  # (T, N): step t ended its episode
        ends = torch.from_numpy(ended).float()
        next_values, values = values[1:] * (1 - ends), values[:-1]
        deltas = rewards + args.gamma * next_values - values
        advantages, lastgaelam, decay = torch.zeros_like(rewards), 0.0, args.gamma * args.gae_lambda * (1 - ends)
        for t in reversed(range(args.num_steps)):
            advantages[t] = lastgaelam = deltas[t] + decay[t] * lastgaelam
        returns = advantages + values
        require_finite(advantages, "an advantage")

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
            step_scores = share(-(logits.exp() * logits).sum(-1) / math.log(num_actions))
        elif args.score == "least_confidence":
            step_scores = share(1 - logits.exp().amax(-1))
        elif args.score == "min_margin":
            step_scores = share(1 - logits.exp().topk(2).values.diff(dim=-1).abs().squeeze(-1))
        elif args.score == "max_mc":  # Robust PLR: best return so far on the level, in the units of the values
            step_scores = torch.from_numpy(sampler.best_returns(levels)).float() - values
        phase("sampler")
        sampler.update(levels, step_scores.cpu().numpy(), ended)

        # ==== optimise (PPO) ====
        phase("update")
        b_obs, b_actions, b_logprobs = obs.flatten(0, 1), actions.reshape(-1), logprobs.reshape(-1)
        b_advantages, b_returns, b_values = torch.stack((advantages, returns, values)).flatten(1).to(device)
        losses, updates = torch.zeros(7, device=device), 0  # summed over the minibatches, read once
        for _epoch in range(args.update_epochs):
            for mb_inds in torch.randperm(args.batch_size, device=device).split(args.minibatch_size):
                mb_advantages = b_advantages[mb_inds]
                mb_advantages = (mb_advantages - mb_advantages.mean()) / (mb_advantages.std() + 1e-8)
                if WORLD > 1:  # this rank's part of the minibatch
                    own = mb_inds % N // n == RANK
                    mb_inds, mb_advantages = mb_inds[own], mb_advantages[own]
                own_inds = mb_inds // N * n + mb_inds % n  # in the (T * n,) of this rank
                _, newlogprob, entropy, newvalue, _ = agent.get_action_and_value(b_obs[own_inds], b_actions[own_inds])
                logratio = newlogprob - b_logprobs[own_inds]
                ratio = logratio.exp()
                pg_loss1 = -mb_advantages * ratio
                pg_loss2 = -mb_advantages * ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
                pg_loss = mean(torch.max(pg_loss1, pg_loss2))
                v_change = (newvalue - b_values[mb_inds]).clamp(-args.clip_coef, args.clip_coef)
                v_loss_clipped = (b_values[mb_inds] + v_change - b_returns[mb_inds]) ** 2
                v_loss = 0.5 * mean(torch.max((newvalue - b_returns[mb_inds]) ** 2, v_loss_clipped))
                entropy_loss = mean(entropy)
                loss = pg_loss - args.ent_coef * entropy_loss + v_loss * args.vf_coef
                optimizer.zero_grad()
                loss.backward()
                add_gradients(agent)
                grad_norm = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                optimizer.step()
                with torch.no_grad():  # approx_kl: http://joschu.net/blog/kl-approx.html
                    old_approx_kl, approx_kl = mean(-logratio), mean((ratio - 1) - logratio)
                    clipfrac = mean(((ratio - 1).abs() > args.clip_coef).float())
                    parts = (v_loss, pg_loss, entropy_loss, old_approx_kl, approx_kl, clipfrac, grad_norm / WORLD)
                    losses += torch.stack(parts).detach()
                    updates += 1
            if args.target_kl is not None and share(approx_kl[None]).sum() > args.target_kl:
                break

        # ==== log ====
        losses = share(losses[:, None]).sum(-1) / updates
        require_finite(losses, "a loss or gradient")  # waits for the device: the clock stops after the work is done
        phase("rest")
        seconds = time.time() - iteration_start
        train_seconds += seconds
        names = ("value_loss", "policy_loss", "entropy", "old_approx_kl", "approx_kl", "clipfrac", "grad_norm")
        mean_return, mean_length = np.mean(finished, axis=0).tolist() if finished else (math.nan, math.nan)
        row = {
            "charts/episodic_return": mean_return,
            "charts/episodic_length": mean_length,
            "charts/episodes": len(finished),
            "charts/learning_rate": optimizer.param_groups[0]["lr"],
            "charts/SPS": args.batch_size / seconds,
            **{f"losses/{name}": value for name, value in zip(names, losses.tolist())},
            "losses/explained_variance": float(1 - (returns - values).var() / returns.var().clamp(min=1e-12)),
            **{f"curriculum/{name}": value for name, value in sampler.metrics().items()},
        }
        if args.profile and last:
            profiler.stop()
            profiler.export_chrome_trace(str(run_dir / f"trace_{RANK}.json.gz"))
        if RANK == 0:
            log(run_dir / "progress.csv", row)

        # ==== evaluate ====
        if RANK == 0 and (last or (args.eval_interval and iteration % args.eval_interval == 0)):
            video = run_dir / "videos" / f"step_{global_step}.gif" if args.capture_video else None
            evaluation = evaluate(agent, args, device, video)
            log(run_dir / "evaluations.csv", {f"eval/{k}": x for k, x in evaluation.items() if k != "episodes"})

        # ==== checkpoint ====
        stopping = bool(share(torch.tensor([len(stopped)])).any()) and not last
        if last or stopping or (args.checkpoint_interval and iteration % args.checkpoint_interval == 0):
            save_checkpoint()
        if RANK == 0 and (last or iteration == 1 or train_seconds - shown_at[1] > 10):
            left = int((time.time() - start_time) / iteration * (args.num_iterations - iteration) / 60)  # minutes
            pace = (global_step - shown_at[0]) / (train_seconds - shown_at[1])
            line = f"step {global_step:,} ({iteration / args.num_iterations:.1%}) | {left // 60}h{left % 60:02d}m left"
            line += f" | {pace:,.0f} steps/s | train return {mean_return:.2f}"
            if evaluation:
                line += f" | evaluation: train {evaluation['train_return']:.2f}, test {evaluation['test_return']:.2f}"
            print(line, flush=True)
            shown_at = (global_step, train_seconds)

    envs.close()
    if WORLD > 1:
        dist.destroy_process_group()
    if RANK > 0:
        return
    writer.close()
    if stopping:
        print(f"Stopped by a signal. To go on: python {sys.argv[0]} --resume {run_dir}", flush=True)
        raise SystemExit(130 if signal.SIGINT in stopped else 0)
    evaluation = evaluation or evaluate(agent, args, device)
    result = {"env_id": args.env_id, "curriculum": args.curriculum, "seed": args.seed, "global_step": global_step}
    result |= {"steps_per_second": global_step / train_seconds, "wall_seconds": time.time() - start_time}
    result |= {"device": device_name, "processes": WORLD, "torch": torch.__version__}
    result |= {"fingerprint": fingerprint(run_state()), "evaluation": evaluation}
    write_file(run_dir / "result.json", result)
    print(f"done: {run_dir}/result.json, fingerprint {result['fingerprint'][:16]}", flush=True)


if __name__ == "__main__":
    main()
