"""jaxued's maze_plr.py as it is, in this process: what beside_jaxued.py starts.

Not a command of its own, and with jaxued's Python: no package of ours. Its arguments are the
script, a checkpoint and the script's flags. In this process only

- orbax.checkpoint's manager writes what the script saves after each block, its train state, as
  numpy arrays to BLOCK.npz in the folder it runs in, with what was seen of each update;
- the first block begins with the checkpoint's state, if there is one: random key and train state
  as an earlier process left them (the script can save its train state, and not go on from it);
- two functions also tell what they are given: LevelSampler.sample_replay_decision, of the buffer
  before each update, and compute_max_returns, of the rollout;
- optax.adam has a constant learning rate, as our default: the script's falls linearly with the
  gradient updates;
- wandb does nothing.
"""

import os
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SEEN: dict[str, list[Any]] = {}  # since the last block, of each update
STATE: list[Any] = []  # the arrays of (random key, train state) after the last block


def note(**values: Any) -> None:
    for name, x in values.items():
        SEEN.setdefault(name, []).append(np.asarray(x))


def flat(tree: Any) -> dict[str, np.ndarray]:
    """The arrays of a tree of dicts and dataclasses, by their path: params/Conv_0/kernel."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    words = [[str(getattr(key, "key", getattr(key, "name", key))) for key in x] for x, _ in leaves]
    return {"/".join(path): np.asarray(x) for path, (_, x) in zip(words, leaves)}


class Saver:
    """Stands for orbax's CheckpointManager."""

    def __init__(self, *args: Any, **options: Any):
        pass

    def save(self, block: int, args: Any) -> None:
        jax.effects_barrier()  # all that the updates have told is there
        state = args
        arrays = {f"seen/{name}": np.stack(x) for name, x in SEEN.items()}
        SEEN.clear()
        arrays |= flat(state.params)
        arrays |= {f"state/{i}": np.asarray(x) for i, x in enumerate(STATE)}
        arrays |= {f"new/{name}": x for name, x in flat(state.dr_last_level_batch).items()}
        arrays |= {f"replayed/{k}": x for k, x in flat(state.replay_last_level_batch).items()}
        with open("block.tmp", "wb") as file:
            np.savez(file, time=time.time(), cpu_time=time.process_time(), **arrays)
        os.replace("block.tmp", f"{block}.npz")
        print(f"BLOCK {block}", flush=True)

    def wait_until_finished(self) -> None:
        pass


class Config(dict):
    as_dict = dict.copy


def substitute_modules() -> None:
    """wandb and orbax.checkpoint: the script finds these instead."""

    def nothing(*args: Any, **options: Any) -> None:
        pass

    def init(config: dict[str, Any], **options: Any) -> None:
        wandb.config = Config(config)

    wandb = ModuleType("wandb")
    wandb.init = init
    wandb.define_metric = wandb.log = wandb.Image = wandb.Video = nothing
    sys.modules["wandb"] = wandb
    checkpoint = ModuleType("orbax.checkpoint")
    checkpoint.CheckpointManager = Saver
    checkpoint.CheckpointManagerOptions = dict
    checkpoint.args = SimpleNamespace(StandardSave=lambda state: state)
    orbax = ModuleType("orbax")
    orbax.checkpoint = checkpoint
    sys.modules |= {"orbax": orbax, "orbax.checkpoint": checkpoint}


def substitute_functions(learning_rate: float) -> None:
    """In the modules that the script imports them from."""
    import optax
    from jaxued import level_sampler, utils

    adam = optax.adam
    optax.adam = lambda learning_rate_schedule=None, **options: adam(
        **options | {"learning_rate": learning_rate}
    )
    max_returns = utils.compute_max_returns
    decide = level_sampler.LevelSampler.sample_replay_decision

    def compute_max_returns(dones: jax.Array, rewards: jax.Array) -> jax.Array:
        jax.debug.callback(note, dones=dones, rewards=rewards, ordered=True)  # (T, N)
        return max_returns(dones, rewards)

    def sample_replay_decision(self: Any, sampler: dict[str, Any], rng: jax.Array) -> jax.Array:
        replay = decide(self, sampler, rng)
        told = {name: sampler[name] for name in ("scores", "size")}
        told["staleness"] = sampler["episode_count"] - sampler["timestamps"]
        weights = jnp.where(sampler["size"] > 0, self.level_weights(sampler), 0.0)
        jax.debug.callback(note, **told, weights=weights, replay=replay, ordered=True)
        return replay

    utils.compute_max_returns = compute_max_returns
    level_sampler.LevelSampler.sample_replay_decision = sample_replay_decision


def go_on_at(checkpoint: Path) -> None:
    """The script's train_and_eval_step begins there if it exists, and leaves its state in STATE."""
    compiled = jax.jit

    def jit(function: Callable[..., Any], *args: Any, **options: Any) -> Callable[..., Any]:
        step = compiled(function, *args, **options)
        if getattr(function, "__name__", "") != "train_and_eval_step":
            return step

        def train_and_eval_step(state: Any, nothing: None) -> Any:
            if not STATE and checkpoint.exists():
                leaves, tree = jax.tree_util.tree_flatten(state)
                with np.load(checkpoint) as kept:
                    leaves = [jnp.asarray(kept[f"state/{i}"]) for i in range(len(leaves))]
                state = tree.unflatten(leaves)
            state, metrics = step(state, nothing)
            STATE[:] = jax.tree_util.tree_leaves(state)
            return state, metrics

        return train_and_eval_step

    jax.jit = jit


def main() -> None:
    script, checkpoint, *flags = sys.argv[1:]
    script = Path(script)
    sys.path.insert(0, str(script.parents[1] / "src"))
    substitute_modules()
    rate = float(flags[flags.index("--lr") + 1])
    substitute_functions(rate)
    go_on_at(Path(checkpoint))
    sys.argv = [str(script), *flags]
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
