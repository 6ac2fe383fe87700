"""The PLR authors' level-replay with our settings, as a run that collect.py and report.py read.

    python benchmarks/beside_level_replay.py PATH/level-replay PATH/baselines --curriculum plr
        --env-id starpilot --seed 1 --total-timesteps 2015232 --precision bf16
        --run-dir runs/level-replay_plr_1 --commit ccecf45
    python benchmarks/beside_level_replay.py PATH/level-replay PATH/baselines
        --resume runs/level-replay_plr_1

PATH/level-replay is facebookresearch/level-replay, PATH/baselines openai/baselines: source trees,
neither installed nor changed; pip install scipy tqdm pandas cloudpickle "numpy<2" beside our
requirements. Its train.py runs in this process, set to our Args by its flags. Around it

- `Procgen` stands for its fork of Procgen, whose environments can be put on a level: ours can;
- TensorFlow, gym_minigrid and its own MiniGrid environments, imported but not used, are empty;
- with --precision bf16 the convolutions and the layer after them are computed as ours are;
- its evaluation after each update is left out; instead its network plays our evaluation, on the
  same levels, each --eval-interval updates;
- `Recorder` stands for its log: it writes progress.csv, evaluations.csv, and a checkpoint every
  few updates, from which --resume goes on as if nothing had been.

One process a core: OMP_NUM_THREADS=1. Ctrl-C ends it after a checkpoint.
"""

import contextlib
import importlib
import io
import json
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal
from unittest.mock import MagicMock

import numpy as np
import torch
import tyro
from common import log_start, refuse
from torch import Tensor, nn

import ppo_plr_procgen as ours

EMPTY = ("tensorflow", "gym_minigrid", "gym_minigrid.wrappers", "custom_envs")


@dataclass
class Args:
    level_replay: Annotated[Path, tyro.conf.Positional]  # its source tree
    baselines: Annotated[Path, tyro.conf.Positional]  # openai/baselines' source tree
    run_dir: Path = Path()  # a new folder for the run
    resume: Path | None = None  # or a run to go on with, by its own flags
    commit: str = "unknown"  # of level-replay's tree, for the record: it may be no checkout
    env_id: str = ours.Args.env_id  # this and the next seven: as our script's
    curriculum: Literal["plr", "uniform"] = "plr"
    seed: int = 1
    total_timesteps: int = 2_015_232
    num_envs: int = ours.Args.num_envs
    num_steps: int = ours.Args.num_steps
    num_minibatches: int = ours.Args.num_minibatches
    precision: Literal["fp32", "bf16"] = "fp32"
    eval_interval: int = 20
    eval_episodes: int = ours.Args.eval_episodes
    checkpoint_interval: int = 5


def flags_of(args: ours.Args, iterations: int) -> list[str]:
    """level-replay's, for our settings."""
    flags = {
        "lr": args.learning_rate,
        "eps": 1e-5,
        "gamma": args.gamma,
        "gae_lambda": args.gae_lambda,
        "entropy_coef": args.ent_coef,
        "value_loss_coef": args.vf_coef,
        "max_grad_norm": args.max_grad_norm,
        "seed": args.seed,
        "num_processes": args.num_envs,
        "num_steps": args.num_steps,
        "ppo_epoch": args.update_epochs,
        "num_mini_batch": args.num_minibatches,
        "clip_param": args.clip_coef,
        "num_env_steps": iterations * args.batch_size,
        "env_name": args.env_id,
        "distribution_mode": args.distribution_mode,
        "num_train_seeds": args.num_levels,
        "log_interval": 1,
        "level_replay_strategy": args.score if args.curriculum == "plr" else "random",
        "level_replay_score_transform": args.score_transform,
        "level_replay_temperature": args.temperature,
        "level_replay_schedule": args.replay_schedule,
        "level_replay_rho": args.rho,
        "level_replay_nu": args.nu,
        "level_replay_alpha": args.alpha,
        "staleness_coef": args.staleness_coef,
    }
    return [word for name, x in flags.items() for word in (f"--{name}", str(x))]


# ---- what stands around its train.py -------------------------------------------------------------


class Procgen:
    """The interface of level-replay's fork of Procgen, by our ProcgenLevels: `seed` puts one
    environment on a level, `observe` shows all, an info names the level just played."""

    def __init__(self, num_envs: int, env_name: str, distribution_mode: str, **_: Any):
        from gym import spaces  # the dead package, which baselines expects

        args = ours.Args(env_id=env_name, distribution_mode=distribution_mode)
        self.envs = ours.make_envs(args, num_envs, torch.device("cpu"))
        self.num_envs = num_envs
        self.observation_space = spaces.Dict({"rgb": spaces.Box(0, 255, (64, 64, 3), np.uint8)})
        self.action_space = spaces.Discrete(15)
        self.levels = np.zeros(num_envs, np.int64)
        self.actions = np.zeros(num_envs, np.int32)

    def seed(self, level: int, index: int) -> None:
        self.levels[index] = level
        only = np.arange(self.num_envs) == index
        self.envs.reset(seed=self.levels.tolist(), options={"reset_mask": only})

    def observe(self) -> dict[str, np.ndarray]:
        return {"rgb": self.envs.procgen.observe()[1]["rgb"]}

    reset = observe  # every environment is on its level by then

    def step_async(self, actions: np.ndarray) -> None:
        self.actions = actions.astype(np.int32)

    def step_wait(self) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, list[dict]]:
        obs, rewards, done, *_ = self.envs.step(self.actions)
        infos = [{"level_seed": level} for level in self.levels.tolist()]
        return {"rgb": obs}, rewards.copy(), done.copy(), infos


class PlayedByOurEvaluation:
    """Its network as our evaluation plays agents."""

    def __init__(self, actor_critic: nn.Module):
        self.actor_critic = actor_critic

    def get_action_and_value(self, obs: Tensor) -> tuple[Tensor]:
        pixels = obs.permute(0, 3, 1, 2).float() / 255.0
        _, action, *_ = self.actor_critic.act(pixels, None, None)
        return (action.squeeze(-1),)


def compute_in_bf16(base: nn.Module) -> None:
    """As our Agent.hidden does; the heads stay in float32."""

    def in_bf16(layer: nn.Module, last: bool) -> Callable[[Tensor], Tensor]:
        forward = layer.forward

        def wrapped(x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                y = forward(x)
            return y.float() if last else y

        return wrapped

    base.to(memory_format=torch.channels_last)
    for layer in (base.layer1, base.layer2, base.layer3, base.fc):
        layer.forward = in_bf16(layer, last=layer is base.fc)


class Recorder:
    """In the place of its log; and what it has made so far: `parts`."""

    def __init__(self, args: Args, settings: ours.Args, checkpoint: dict[str, Any] | None):
        self.args = args
        self.settings = settings
        self.checkpoint = checkpoint
        self.iteration = checkpoint["iteration"] if checkpoint else 0
        self.wall_before = checkpoint["wall_seconds"] if checkpoint else 0.0
        self.began = self.last_time = time.time()
        self.parts: dict[str, Any] = {}
        self.finished: list[dict[str, float]] = []  # episodes since the last row
        self.evaluation: dict[str, Any] = checkpoint["evaluation"] if checkpoint else {}
        self.stopped = False

    # what train.py calls

    def __call__(self, **_: Any) -> "Recorder":
        return self

    def log(self, stats: dict[str, Any]) -> None:
        """After an update."""
        now = time.time()
        step = self.iteration * self.settings.batch_size
        wall_seconds = self.wall_before + now - self.began
        row = {"global_step": step, "wall_seconds": wall_seconds} | self.row(stats)
        row["SPS"] = self.settings.batch_size / (now - self.last_time)
        ours.append_row(self.args.run_dir / "progress.csv", row)
        line = f"step {step:,}: return {row['episodic_return']:.2f}, {row['SPS']:,.0f} steps/s"
        last = self.iteration == self.settings.num_iterations
        if last or self.iteration % self.args.eval_interval == 0:
            agent = PlayedByOurEvaluation(self.parts["actor_critic"])
            self.evaluation = ours.evaluate(agent, self.settings, torch.device("cpu"))
            columns = {k: x for k, x in self.evaluation.items() if k != "episodes"}
            times = {"global_step": step, "wall_seconds": wall_seconds}
            ours.append_row(self.args.run_dir / "evaluations.csv", times | columns)
            line += f", on unseen levels {self.evaluation['test_return']:.2f}"
        ours.say(line)
        if last or self.stopped or self.iteration % self.args.checkpoint_interval == 0:
            self.save(wall_seconds)
        if self.stopped and not last:
            raise KeyboardInterrupt
        self.last_time = time.time()

    def log_level_weights(self, weights: Any) -> None:
        pass

    def log_final_test_eval(self, stats: Any) -> None:
        pass

    # what it makes of that

    def row(self, stats: dict[str, Any]) -> dict[str, float]:
        """Columns of progress.csv, as our script's."""
        of_episodes = {
            "episodic_return": ours.mean_or_nan(np.array([x["r"] for x in self.finished])),
            "episodic_length": ours.mean_or_nan(np.array([x["l"] for x in self.finished])),
            "episodes": len(self.finished),
            "value_loss": stats["value_loss"],
            "policy_loss": stats["pg_loss"],
            "entropy": stats["dist_entropy"],
        }
        self.finished.clear()
        sampler = self.parts["sampler"]
        seen = sampler.unseen_seed_weights == 0
        if not seen.any():
            return of_episodes | dict.fromkeys(CURRICULUM, 0.0)
        p = sampler.sample_weights()[seen]
        entropy = -(p * np.log(np.maximum(p, 1e-300))).sum()
        scores = sampler.seed_scores[seen]
        staleness = sampler.seed_staleness[seen]
        values = (
            seen.mean(),
            np.exp(entropy),
            scores.mean(),
            scores.max(),
            staleness.mean(),
            staleness.max(),
        )
        return of_episodes | dict(zip(CURRICULUM, map(float, values)))

    def save(self, wall_seconds: float) -> None:
        """All that the next update depends on."""
        rollouts, envs = self.parts["rollouts"], self.parts["envs"]
        monitor, normalize = envs.venv.venv, envs.venv
        rms = normalize.ret_rms
        starts = ("obs", "masks", "bad_masks", "recurrent_hidden_states")
        state = {
            "global_step": self.iteration * self.settings.batch_size,
            "iteration": self.iteration,
            "wall_seconds": wall_seconds,
            "agent": self.parts["actor_critic"].state_dict(),
            "optimizer": self.parts["ppo"].optimizer.state_dict(),
            "sampler": {k: x for k, x in vars(self.parts["sampler"]).items() if k in OF_SAMPLER},
            "rollouts": {name: getattr(rollouts, name)[0].clone() for name in starts},
            "games": envs.raw_venv.envs.get_state(),
            "levels": envs.raw_venv.levels,
            "episodes": (monitor.eprets, monitor.eplens),
            "rewards": (normalize.ret, rms.mean, rms.var, rms.count),
            "random": (random.getstate(), np.random.get_state(), torch.get_rng_state()),
            "evaluation": self.evaluation,
        }
        path = self.args.run_dir / "checkpoint.pt"
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    def restore(self) -> None:
        """When train.py has made everything and is about to begin."""
        state = self.checkpoint
        if state is None:
            return
        rollouts, envs = self.parts["rollouts"], self.parts["envs"]
        monitor, normalize = envs.venv.venv, envs.venv
        self.parts["actor_critic"].load_state_dict(state["agent"])
        self.parts["ppo"].optimizer.load_state_dict(state["optimizer"])
        vars(self.parts["sampler"]).update(state["sampler"])
        for name, x in state["rollouts"].items():
            getattr(rollouts, name)[0].copy_(x)
        envs.raw_venv.envs.set_state(state["games"])
        envs.raw_venv.levels = state["levels"]
        monitor.eprets, monitor.eplens = state["episodes"]
        rms = normalize.ret_rms
        normalize.ret, rms.mean, rms.var, rms.count = state["rewards"]
        of_python, of_numpy, of_torch = state["random"]
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        torch.set_rng_state(of_torch)


# columns of progress.csv on the curriculum
CURRICULUM = (
    "seen_share",
    "effective_levels",
    "score_mean",
    "score_max",
    "staleness_mean",
    "staleness_max",
)
# what changes of its sampler
OF_SAMPLER = (
    "unseen_seed_weights",
    "seed_scores",
    "partial_seed_scores",
    "partial_seed_steps",
    "seed_staleness",
    "next_seed_index",
)


def load_train(args: Args) -> ModuleType:
    """level-replay's train.py as a module, not yet run."""
    np.float, np.bool = float, np.bool_  # which NumPy no longer has, or not always
    for name in EMPTY:
        sys.modules[name] = MagicMock()
    sys.modules["gym_minigrid.wrappers"] = ModuleType("gym_minigrid.wrappers")  # import *
    sys.path[:0] = [str(args.level_replay.resolve()), str(args.baselines.resolve())]
    sys.modules.pop("test", None)  # Python's own: train.py imports its evaluation from a test.py
    with contextlib.redirect_stderr(io.StringIO()):  # gym prints a notice
        import procgen

        procgen.ProcgenEnv = Procgen
        train = importlib.import_module("train")
        importlib.import_module("baselines.common.running_mean_std")
    for name in EMPTY:  # nobody else shall find them
        del sys.modules[name]
    return train


def run_train(args: Args, recorder: Recorder) -> None:
    train = load_train(args)
    parts = recorder.parts

    def make_lr_venv(**options: Any) -> tuple[Any, Any]:
        parts["envs"], parts["sampler"] = made = original["make_lr_venv"](**options)
        monitor = parts["envs"].venv.venv
        step_wait = monitor.step_wait

        def noting() -> tuple:
            obs, rewards, done, infos = step_wait()
            recorder.finished += [x["episode"] for x in infos if "episode" in x]
            return obs, rewards, done, infos

        monitor.step_wait = noting
        return made

    def model_for_env_name(*given: Any) -> nn.Module:
        parts["actor_critic"] = model = original["model_for_env_name"](*given)
        if args.precision == "bf16":
            compute_in_bf16(model.base)
        return model

    class RolloutStorage(train.RolloutStorage):
        def to(self, device: torch.device) -> None:
            super().to(device)
            parts["rollouts"] = self
            recorder.restore()

    class PPO(train.algo.PPO):
        def __init__(self, *given: Any, **options: Any):
            super().__init__(*given, **options)
            parts["ppo"] = self

        def update(self, rollouts: Any) -> tuple[float, float, float]:
            recorder.iteration += 1
            return super().update(rollouts)

    original = {name: getattr(train, name) for name in ("make_lr_venv", "model_for_env_name")}
    train.make_lr_venv = make_lr_venv
    train.model_for_env_name = model_for_env_name
    train.RolloutStorage = RolloutStorage
    train.algo.PPO = PPO
    train.FileWriter = recorder
    train.evaluate = lambda *_, **__: [0.0]
    settings = recorder.settings
    ours.choose_device(settings)  # and the memory-allocator settings that our script has
    left = settings.num_iterations - recorder.iteration
    words = [*flags_of(settings, left), "--no_cuda", "--disable_checkpoint"]
    flags = train.parser.parse_args(words)
    train.train(flags, train.generate_seeds(flags.num_train_seeds))


# ---- the run -------------------------------------------------------------------------------------


def settings_of(args: Args) -> ours.Args:
    same = ("env_id", "curriculum", "seed", "total_timesteps", "num_envs", "num_steps")
    same += ("num_minibatches", "precision", "eval_interval", "eval_episodes")
    same += ("checkpoint_interval",)
    chosen: dict[str, Any] = {name: getattr(args, name) for name in same}
    chosen |= {"exp_name": "level-replay", "run_dir": str(args.run_dir)}
    return ours.Args(cuda=False, env_threads=1, **chosen)


def begin(args: Args) -> tuple[Args, dict[str, Any] | None]:
    """The run's flags and checkpoint, its folder made or looked through."""
    for path, file in ((args.level_replay, "train.py"), (args.baselines, "baselines/logger.py")):
        if not (path / file).exists():
            refuse(f"{path} must be a source tree with {file}.")
    checkpoint = load_run(args) if args.resume else None
    settings = settings_of(args)
    ours.check_args(settings)
    if checkpoint is None:
        if args.run_dir.exists():
            refuse(f"--run-dir {args.run_dir} must be a new folder.")
        args.run_dir.mkdir(parents=True)
        written = asdict(settings) | {"implementation": f"level-replay {args.commit}"}
        (args.run_dir / "args.json").write_text(json.dumps(written, indent=2))
    else:
        for name in ("progress.csv", "evaluations.csv"):
            ours.cut_rows(args.run_dir / name, checkpoint["global_step"])
    log_start(args.run_dir, __file__, checkpoint["global_step"] if checkpoint else 0)
    return args, checkpoint


def load_run(args: Args) -> dict[str, Any]:
    """The checkpoint of the run in --resume, whose flags replace those in args."""
    if (args.resume / "result.json").exists():
        refuse(f"--resume {args.resume} is finished: its result.json is there.")
    try:
        # what our own Recorder.save wrote, generators' states among it
        checkpoint = torch.load(args.resume / "checkpoint.pt", weights_only=False)
        saved = json.loads((args.resume / "args.json").read_text())
        saved["commit"] = saved["implementation"].split()[1]
    except Exception as error:  # whatever a damaged file makes of torch.load
        why = (str(error) or repr(error)).splitlines()[0]
        refuse(f"--resume {args.resume} is not a run that can be loaded: {why}")
    for f in fields(Args):
        if f.name in ("run_dir", "resume") or f.name not in saved:
            continue
        given = getattr(args, f.name)
        if given not in (f.default, saved[f.name]):
            flag = f"--{f.name.replace('_', '-')} {given}"
            refuse(f"{flag} must be {saved[f.name]}, as in the run to resume.")
        setattr(args, f.name, saved[f.name])
    args.run_dir = args.resume
    return checkpoint


def main() -> None:
    args, checkpoint = begin(tyro.cli(Args))
    settings = settings_of(args)
    recorder = Recorder(args, settings, checkpoint)

    def stop(number: int, _: Any) -> None:
        recorder.stopped = True
        signal.signal(number, signal.SIG_DFL)  # a second one ends it at once
        ours.say("finishing this update, then saving; again to stop now")

    if recorder.iteration < settings.num_iterations:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)
        try:
            run_train(args, recorder)
        except KeyboardInterrupt:
            ours.say(f"stopped; to go on: --resume {args.run_dir}")
            return
        agent = recorder.parts["actor_critic"].state_dict()
    else:  # a run that was killed after its last checkpoint has only its result left to write
        agent = checkpoint["agent"]
    result = {
        "env_id": args.env_id,
        "curriculum": args.curriculum,
        "seed": args.seed,
        "implementation": f"level-replay {args.commit}",
        "global_step": recorder.iteration * settings.batch_size,
        "wall_seconds": recorder.wall_before + time.time() - recorder.began,
        "torch": torch.__version__,
        "fingerprint": ours.fingerprint(agent),
        "evaluation": recorder.evaluation,
    }
    ours.write_file(args.run_dir / "result.json", result)
    ours.say(f"done: {args.run_dir}/result.json")


if __name__ == "__main__":
    main()
