"""jaxued's maze_plr.py with our settings, as a run that collect.py and report.py read like ours.

    python benchmarks/beside_jaxued.py PATH/jaxued --python PATH/jax/bin/python --curriculum dr
        --total-timesteps 5e6 --seed 1 --run-dir runs/jaxued_dr_1 --commit 0f8f128

How to install both is in peers.py.

The script itself is not changed: jaxued_process.py runs it, and says what is substituted around it.
What its flags set is set to the defaults of our Args, or to the flags below. DR is the same script
that never replays and learns on new levels (not maze_dr.py, whose episodes go on from rollout to
rollout and whose levels change after each episode: ours do as maze_plr.py's). Each --eval-interval
updates its network plays our evaluation, the same mazes with the same random stream; `JaxuedAgent`
takes its parameters, since its heads have ReLU where ours have tanh.

One process a core: OMP_NUM_THREADS=1 XLA_FLAGS="--xla_cpu_multi_thread_eigen=false
intra_op_parallelism_threads=1" taskset -c CORE python benchmarks/beside_jaxued.py ...
The same command again goes on at the last checkpoint (one a block), a larger --total-timesteps
further: jaxued then begins with the state that it had left, its random key in it.
"""

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from common import log_start, read_csv, refuse
from torch import Tensor, nn

import ppo_robust_plr_minigrid as ours

BLOCK = 10  # jaxued's updates from one saved state to the next
# our script's flags that this one has too: what a run keeps, and what may change when it goes on
KEPT = ("curriculum", "seed", "learning_rate", "num_minibatches", "num_walls", "buffer_size")
EVALUATION = ("eval_interval", "eval_episodes", "eval_worst")


@dataclass
class Args:
    jaxued: Annotated[Path, tyro.conf.Positional]  # its source tree
    python: Path  # the Python that has its packages
    run_dir: Path  # folder for the run: a new one, or one with a checkpoint to go on
    commit: str  # of jaxued's tree, for the record: it may be no checkout
    curriculum: Literal["robust_plr", "plr", "dr"] = "robust_plr"
    total_timesteps: float = 5e6  # environment steps, in full updates: a multiple of BLOCK
    seed: int = 1
    learning_rate: float = ours.Args.learning_rate  # this and the next three: as our script's
    num_minibatches: int = ours.Args.num_minibatches
    num_walls: int = ours.Args.num_walls
    buffer_size: int = ours.Args.buffer_size
    eval_interval: int = 20  # updates from one evaluation to the next, a multiple of BLOCK
    eval_episodes: int = ours.Args.eval_episodes  # in each maze
    eval_worst: int = 0  # at the end, as our script's


class JaxuedAgent(nn.Module):
    """jaxued's network as our evaluation plays agents: `prepare_to_act`, `act`, `num_actions`."""

    num_actions = 7

    def __init__(self, arrays: dict[str, np.ndarray]):
        """arrays: its parameters by path, as `jaxued_process.flat` names them. A Flax kernel is
        (inputs, outputs), a convolution's (height, width, inputs, outputs)."""
        super().__init__()
        self.conv = nn.Conv2d(3, 16, kernel_size=3)
        self.direction = nn.Embedding(4, 5)
        self.lstm = nn.LSTMCell(16 * 3 * 3 + 5, 256)
        self.actor = nn.Sequential(nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, self.num_actions))
        self.critic = nn.Sequential(nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 1))
        named = {name.removeprefix("params/"): torch.from_numpy(x) for name, x in arrays.items()}
        gates = [f"OptimizedLSTMCell_0/{{}}{gate}/kernel" for gate in "ifgo"]
        state = {
            "conv.weight": named["Conv_0/kernel"].permute(3, 2, 0, 1),
            "conv.bias": named["Conv_0/bias"],
            "direction.weight": named["scalar_embed/kernel"] + named["scalar_embed/bias"],
            "lstm.weight_ih": torch.cat([named[gate.format("i")] for gate in gates], 1).t(),
            "lstm.weight_hh": torch.cat([named[gate.format("h")] for gate in gates], 1).t(),
            "lstm.bias_ih": torch.zeros(4 * 256),  # Flax has one bias
            "lstm.bias_hh": torch.cat(
                [named[f"OptimizedLSTMCell_0/h{gate}/bias"] for gate in "ifgo"]
            ),
        }
        for head in ("actor", "critic"):
            for layer in (0, 1):
                theirs = f"{head}{layer}"
                state[f"{head}.{2 * layer}.weight"] = named[f"{theirs}/kernel"].t()
                state[f"{head}.{2 * layer}.bias"] = named[f"{theirs}/bias"]
        self.load_state_dict(state)

    def prepare_to_act(self) -> None:
        pass

    @torch.no_grad()
    def act(
        self, obs: dict[str, Tensor], state: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
        """As our Agent's: image (N, 5, 5, 3), direction (N,), state (2, N, 256), noise (N, 7) ->
        action, value, normalised logits, the next h and c."""
        pixels = obs["image"].permute(0, 3, 1, 2) / 10.0
        x = torch.relu(self.conv(pixels)).permute(0, 2, 3, 1).flatten(1)  # Flax: channels last
        x = torch.cat((x, self.direction(obs["direction"])), dim=1)
        h, c = self.lstm(x, tuple(state))
        logits = self.actor(h).log_softmax(-1)
        action = (logits.exp() / noise).argmax(-1)
        return action, self.critic(h).squeeze(-1), logits, (h, c)


def flags_of(args: ours.Args, num_updates: int) -> list[str]:
    """jaxued's, for our settings."""
    flags = {
        "seed": args.seed,
        "lr": args.learning_rate,
        "max_grad_norm": args.max_grad_norm,
        "num_updates": num_updates,
        "num_steps": args.num_steps,
        "num_train_envs": args.num_envs,
        "num_minibatches": args.num_minibatches,
        "gamma": args.gamma,
        "epoch_ppo": args.update_epochs,
        "clip_eps": args.clip_coef,
        "gae_lambda": args.gae_lambda,
        "entropy_coeff": args.ent_coef,
        "critic_coeff": args.vf_coef,
        "score_function": "MaxMC",
        "prioritization": "rank",
        # DR replays nothing: the least that holds a batch
        "level_buffer_capacity": args.num_envs if args.curriculum == "dr" else args.buffer_size,
        "replay_prob": 0.0 if args.curriculum == "dr" else args.replay_prob,
        "staleness_coeff": args.staleness_coef,
        "temperature": args.temperature,
        "minimum_fill_ratio": args.rho,
        "n_walls": args.num_walls,
        "checkpoint_save_interval": 1,
        "eval_freq": BLOCK,
        "eval_levels": "SixteenRooms",  # its own evaluation as small as can be
        "eval_num_attempts": 1,
    }
    words = [word for name, x in flags.items() for word in (f"--{name}", str(x))]
    learns = "no-" if args.curriculum == "robust_plr" else ""  # on new levels
    return [*words, f"--{learns}exploratory_grad_updates"]


def blocks(args: Args, flags: list[str]) -> Iterator[dict[str, np.ndarray]]:
    """Starts jaxued and yields what it saves, block after block."""
    process = Path(__file__).resolve().with_name("jaxued_process.py")
    script = args.jaxued.resolve() / "examples" / "maze_plr.py"
    checkpoint = (args.run_dir / "checkpoint.npz").resolve()
    command = [args.python.absolute(), "-u", process, script, checkpoint, *flags]
    with tempfile.TemporaryDirectory() as folder, open(args.run_dir / "jaxued.log", "w") as log:
        pipes = {"stdout": subprocess.PIPE, "stderr": log, "text": True, "cwd": folder}
        with subprocess.Popen([str(word) for word in command], **pipes) as running:
            try:
                for line in running.stdout:
                    if line.startswith("BLOCK "):
                        path = Path(folder, f"{line.split()[1]}.npz")
                        yield dict(np.load(path))
                        path.unlink()
            finally:
                running.kill()
        if running.returncode:
            refuse(f"{script} ended with {running.returncode}: {args.run_dir}/jaxued.log says why.")


def mazes_of(block: dict[str, np.ndarray], kind: str) -> dict[str, float]:
    """Columns of progress.csv on the last batch of new or replayed levels, as our script's."""
    columns = {f"{name}_{kind}": np.nan for name in ("walls", "shortest_path", "solvable")}
    if (block["seen/replay"] == (kind == "replayed")).any():
        walls, goal, agent, direction = (
            block[f"{kind}/{name}"] for name in ("wall_map", "goal_pos", "agent_pos", "agent_dir")
        )
        rows_first = [x[:, ::-1].astype(np.int64) for x in (goal, agent)]  # theirs: (x, y)
        paths = ours.shortest_paths(ours.Mazes(walls, *rows_first, direction.astype(np.int64)))
        found = (walls.sum((1, 2)), paths[paths > 0], paths > 0)
        columns = {name: ours.mean_or_nan(x) for name, x in zip(columns, found)}
    return columns


def row_of(args: ours.Args, block: dict[str, np.ndarray], i: int) -> dict[str, float]:
    """Columns of progress.csv for update i of a block; the buffer is the one before the update."""
    finished = ours.finished_episodes(args, block["seen/rewards"][i], block["seen/dones"][i])
    size = 0 if args.curriculum == "dr" else int(block["seen/size"][i])
    scores, weights, staleness = (
        block[f"seen/{name}"][i, :size] for name in ("scores", "weights", "staleness")
    )
    entropy = -(weights * np.log(np.maximum(weights, 1e-30))).sum()
    quantiles = np.percentile(scores, (10, 50, 90)) if size else np.zeros(3)
    return {
        "episodic_return": ours.mean_or_nan(finished["return"]),
        "episodic_length": ours.mean_or_nan(finished["length"]),
        "solved_rate": ours.mean_or_nan(finished["return"] > 0),
        "episodes": len(finished["return"]),
        "seen_share": size / args.buffer_size,
        "effective_levels": float(np.exp(entropy)) if size else 0.0,
        "score_mean": float(scores.mean()) if size else 0.0,
        "score_max": float(scores.max(initial=-np.inf)) if size else 0.0,
        "staleness_mean": float(staleness.mean()) if size else 0.0,
        "staleness_max": int(staleness.max(initial=0)),
        "replay": int(block["seen/replay"][i]),
        **{f"score_{name}": float(x) for name, x in zip(("q10", "q50", "q90"), quantiles)},
    }


def keep(args: Args, block: dict[str, np.ndarray], step: int) -> None:
    """The checkpoint: jaxued's state after the block."""
    state = {name: x for name, x in block.items() if name.startswith("state/")}
    temporary = args.run_dir / "checkpoint.tmp.npz"
    np.savez_compressed(temporary, global_step=step, **state)
    os.replace(temporary, args.run_dir / "checkpoint.npz")


def kept_step(run_dir: Path) -> int:
    """Environment steps of the checkpoint; 0 without one."""
    path = run_dir / "checkpoint.npz"
    if not path.exists():
        return 0
    with np.load(path) as checkpoint:
        return int(checkpoint["global_step"])


def train(args: Args, settings: ours.Args) -> None:
    """jaxued's training, and progress.csv, evaluations.csv and result.json on the way."""
    device = torch.device("cpu")
    step = kept_step(args.run_dir)
    for name in ("progress.csv", "evaluations.csv"):
        ours.cut_rows(args.run_dir / name, step)
    last = (read_csv(args.run_dir / "progress.csv") or [{}])[-1]
    totals = {name: int(last.get(name, 0)) for name in ("gradient_updates", "untrained_steps")}
    began = time.time() - float(last.get("wall_seconds", 0))
    times = [(time.time(), 0.0)]  # at each block's end, and jaxued's CPU time
    block_steps = BLOCK * settings.batch_size
    num_blocks = (settings.total_timesteps - step) // block_steps
    for block in blocks(args, flags_of(settings, BLOCK * num_blocks)):
        times.append((float(block["time"]), float(block["cpu_time"])))
        wall = {"wall_seconds": times[-1][0] - began}
        speed = {"SPS": block_steps / (times[-1][0] - times[-2][0])}
        mazes = mazes_of(block, "new") | mazes_of(block, "replayed")
        for i in range(BLOCK):
            step += settings.batch_size
            row = row_of(settings, block, i)
            learns = row["replay"] or args.curriculum != "robust_plr"
            if learns:
                totals["gradient_updates"] += settings.update_epochs * settings.num_minibatches
            else:
                totals["untrained_steps"] += settings.batch_size
            row |= mazes if i == BLOCK - 1 else dict.fromkeys(mazes, np.nan)
            row = {"global_step": step} | wall | row | totals | speed
            ours.append_row(args.run_dir / "progress.csv", row)
        ours.say(f"step {step:,}: solved {row['solved_rate']:.2f}, {speed['SPS']:,.0f} steps/s")
        at_end = step >= settings.total_timesteps
        if at_end or step % (args.eval_interval * settings.batch_size) == 0:
            arrays = {name: x for name, x in block.items() if name.startswith("params/")}
            np.savez(args.run_dir / "params.npz", **arrays)
            agent = JaxuedAgent(arrays)
            evaluation = ours.evaluate(agent, settings, device)
            columns = {name: x for name, x in evaluation.items() if name != "episodes"}
            row = {"global_step": step} | wall | totals | columns
            ours.append_row(args.run_dir / "evaluations.csv", row)
            ours.say(f"step {step:,}: evaluation {evaluation['solved_mean']:.3f}")
        if not at_end:
            keep(args, block, step)
    seconds, cpu_seconds = np.diff(times, axis=0).T  # of each block; the first two compile
    steady = slice(min(2, num_blocks - 1), None)
    ours.evaluate_worst(agent, settings, device, args.run_dir, step)
    result = {
        "env_id": settings.env_id,
        "curriculum": args.curriculum,
        "seed": args.seed,
        "implementation": f"jaxued {args.commit}",
        "global_step": step,
        **totals,
        "steps_per_second": block_steps / float(np.median(seconds[steady])),
        "steps_per_cpu_second": block_steps / float(np.median(cpu_seconds[steady])),
        "cpu_seconds_to_compile": float((cpu_seconds[:2] - np.median(cpu_seconds[steady])).sum()),
        "wall_seconds": time.time() - began,
        "evaluation": evaluation,
    }
    ours.write_file(args.run_dir / "result.json", result)
    keep(args, block, step)  # now, so that a run stopped before does its last block again
    ours.say(f"done: {args.run_dir}/result.json, {result['steps_per_second']:,.0f} steps/s")


def check_run_dir(args: Args) -> None:
    """Refuses a run directory of another run, or one with no more to do."""
    if not args.run_dir.exists():
        return
    step = kept_step(args.run_dir)
    if not step:
        refuse(f"--run-dir {args.run_dir} must be a new folder, or have a checkpoint.npz.")
    before = json.loads((args.run_dir / "args.json").read_text())
    before["commit"] = before["implementation"].removeprefix("jaxued ")
    for name in (*KEPT, "commit"):
        value = getattr(args, name)
        if value != before[name]:
            flag = f"--{name.replace('_', '-')}"
            refuse(f"{flag} {value} must be {before[name]}, as the run in {args.run_dir} has it.")
    if args.total_timesteps <= step:
        total = int(args.total_timesteps)
        refuse(f"--total-timesteps {total} must be more than the {step} steps of {args.run_dir}.")


def main() -> None:
    args = tyro.cli(Args)
    chosen: dict[str, Any] = {name: getattr(args, name) for name in (*KEPT, *EVALUATION)}
    total = int(args.total_timesteps)
    run_dir = str(args.run_dir)
    settings = ours.Args(exp_name="jaxued", total_timesteps=total, run_dir=run_dir, **chosen)
    if settings.num_iterations % BLOCK or settings.num_iterations < BLOCK:
        steps = BLOCK * settings.batch_size
        near = max(1, round(total / steps)) * steps
        refuse(f"--total-timesteps {total} must be a multiple of {steps}, as {near}.")
    if args.eval_interval < BLOCK or args.eval_interval % BLOCK:
        refuse(f"--eval-interval {args.eval_interval} must be a multiple of {BLOCK}.")
    if args.curriculum == "dr" and args.buffer_size != ours.Args.buffer_size:
        refuse(f"--buffer-size {args.buffer_size} does nothing with --curriculum dr.")
    if not (args.jaxued / "examples" / "maze_plr.py").exists():
        refuse(f"JAXUED {args.jaxued} must be jaxued's source tree, with examples/maze_plr.py.")
    written = asdict(settings) | {"implementation": f"jaxued {args.commit}"}
    check_run_dir(args)
    args.run_dir.mkdir(parents=True, exist_ok=True)
    try:
        lock = ours.lock_file(args.run_dir / "lock")
    except BlockingIOError:
        refuse(f"--run-dir {args.run_dir} is in use: another process trains there.")
    with lock:
        ours.write_file(args.run_dir / "args.json", written)
        log_start(args.run_dir, __file__, kept_step(args.run_dir))
        train(args, settings)


if __name__ == "__main__":
    main()
