"""benchmarks/beside_jaxued.py: jaxued's network and mazes are what our evaluation plays.

Skipped unless JAXUED is its source tree and JAXUED_PYTHON a Python with its packages.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from support import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import beside_jaxued

import ppo_robust_plr_minigrid as ours

JAXUED = os.environ.get("JAXUED", "")
PYTHON = os.environ.get("JAXUED_PYTHON", "")

# Plays the actions (T, N) in the levels of data.npz with jaxued's network of random parameters.
PLAY = """
import runpy, sys
import jax, jax.numpy as jnp, numpy as np
import jaxued_process
jaxued_process.substitute_modules()
script = runpy.run_path(sys.argv[1] + "/examples/maze_plr.py", run_name="script")
data = np.load("data.npz")
Maze, Level = script["Maze"], script["Level"]
env = Maze(max_height=13, max_width=13, agent_view_size=5, normalize_obs=True)
levels = Level.stack([Level.from_str(text) for text in data["levels"].tolist()])
N = len(data["levels"])
key = jax.random.PRNGKey(0)
network = script["ActorCritic"](7)
state = script["ActorCritic"].initialize_carry((N,))
reset = jax.vmap(env.reset_to_level, (None, 0, None))
step = jax.jit(jax.vmap(env.step_env, (None, 0, 0, None)))
obs, env_state = reset(key, levels, env.default_params)
one_step = lambda obs: (jax.tree_util.tree_map(lambda x: x[None], obs), jnp.zeros((1, N), bool))
params = network.init(key, one_step(obs), state)
noise = jax.random.normal(key, (10**6,))  # no bias is 0, no two gates are alike
params = jax.tree_util.tree_map(lambda x: x + 0.1 * noise[: x.size].reshape(x.shape), params)
act = jax.jit(network.apply)
found = {name: [] for name in ("image", "direction", "reward", "done", "logits", "value")}
for actions in data["actions"]:
    state, pi, value = act(params, one_step(obs), state)
    found["image"].append(obs.image)
    found["direction"].append(obs.agent_dir)
    found["logits"].append(jax.nn.log_softmax(pi.logits[0]))
    found["value"].append(value[0])
    obs, env_state, reward, done, _ = step(key, env_state, actions, env.default_params)
    found["reward"].append(reward)
    found["done"].append(done)
arrays = {name: np.stack(x) for name, x in found.items()}
np.savez("played.npz", **arrays, **jaxued_process.flat(params))
"""


def text_of(mazes: ours.Mazes, i: int) -> str:
    cells = np.where(mazes.walls[i], "#", ".")
    cells[tuple(mazes.goal[i])] = "G"
    cells[tuple(mazes.agent[i])] = ">v<^"[mazes.direction[i]]
    return "\n".join("".join(row) for row in cells)


@pytest.mark.slow
@pytest.mark.skipif(not (JAXUED and PYTHON), reason="needs JAXUED and JAXUED_PYTHON")
def test_jaxueds_network_and_mazes_are_the_same_here(tmp_path):
    small = [name for name, text in ours.NAMED_MAZES.items() if text.shape == (13, 13)]
    named = [ours.named_maze(name, 0) for name in small]
    mazes = ours.concatenate([*named, ours.random_mazes(np.arange(53), 15, 25)])
    N = len(mazes.walls)
    rng = np.random.default_rng(0)
    actions = rng.choice(7, p=[0.15, 0.15, 0.5, 0.05, 0.05, 0.05, 0.05], size=(250, N))
    levels = [text_of(mazes, i) for i in range(N)]
    np.savez(tmp_path / "data.npz", levels=levels, actions=actions)
    path = os.pathsep.join((str(ROOT / "benchmarks"), f"{JAXUED}/src"))
    command = [PYTHON, "-c", PLAY, JAXUED]
    subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, check=True)
    theirs = dict(np.load(tmp_path / "played.npz"))

    params = {name: x for name, x in theirs.items() if name.startswith("params/")}
    agent = beside_jaxued.JaxuedAgent(params)
    envs = ours.MazeEnvs(N, torch.device("cpu"))
    obs, _ = envs.reset(options={"mazes": mazes})
    state = torch.zeros((2, N, 256))
    playing = np.ones(N, bool)
    far = {"logits": 0.0, "value": 0.0, "reward": 0.0}
    for t in range(len(actions)):
        image = np.rint(10 * theirs["image"][t]).astype(int)
        assert (obs["image"].numpy() == image)[playing].all()
        assert (obs["direction"].numpy() == theirs["direction"][t])[playing].all()
        _, value, logits, next_state = agent.act(obs, state, torch.ones(N, 7))
        state = torch.stack(next_state)
        obs, reward, terminated, truncated, _ = envs.step(torch.from_numpy(actions[t]))
        for name, x in {"logits": logits, "value": value, "reward": reward}.items():
            difference = np.abs(x.numpy() - theirs[name][t])[playing]
            far[name] = max(far[name], difference.max(initial=0))
        done = (terminated | truncated).numpy()
        assert (done == theirs["done"][t])[playing].all()
        playing &= ~done
    assert theirs["reward"].max() > 0 and not playing.any()
    print(f"{N} mazes, {len(actions)} steps; largest differences: {far}")
    assert max(far.values()) < 1e-4
    assert theirs["logits"].std() > 0.1 and theirs["value"].std() > 0.1  # they do depend on it
