"""Is an environment fit for PLR? Only if a level is the same level each time it is played.

    python -m pytest tests/test_levels.py --env-id MiniGrid-FourRooms-v0    # any of Gymnasium's,
    python -m pytest tests/test_levels.py --env-id my_package:MyEnv-v0      # or of a package,
    python -m pytest tests/test_levels.py --env-id bigfish                  # or a game of Procgen

The seed of a reset is the level. The same level and the same actions must give the same
observations (that of the reset included), rewards and ends: in two processes, after other levels,
and in any place of a vector environment. And not all levels may be the same. Random actions see
what random actions reach. The first difference is named.
"""

import copy
import json
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector.utils import concatenate, create_empty_array

pytestmark = pytest.mark.slow  # whole files: two minutes of processor time together

LEVELS, STEPS, ENVS = list(range(1, 9)), 100, 4
DEFAULT = "MiniGrid-SimpleCrossingS9N1-v0", "dodgeball"
WHAT = "observation", "reward", "termination", "truncation"

# ---- playing levels ------------------------------------------------------------------------------


def is_game(env_id):
    """Procgen's names are in small letters; Gymnasium's have a version."""
    return env_id.islower() and env_id.isalpha()


def make(env_id, num_envs, workers=False):
    """A vector environment without autoreset, in which the seed of a reset is the level."""
    if is_game(env_id):
        import torch

        import ppo_plr_procgen

        args = ppo_plr_procgen.Args(env_id=env_id)
        ppo_plr_procgen.check_args(args)
        return ppo_plr_procgen.make_envs(args, num_envs, torch.device("cpu"))
    if env_id.startswith(("MiniGrid-", "BabyAI-")):
        import minigrid  # noqa: F401  registers them
    options = {"autoreset_mode": gym.vector.AutoresetMode.DISABLED}
    if workers:  # shared memory cannot hold text, such as MiniGrid's mission
        options |= {"shared_memory": False, "context": "spawn"}
    return gym.make_vec(env_id, num_envs, "async" if workers else "sync", vector_kwargs=options)


def one(space, batch, i):
    """Environment i's observation."""
    if isinstance(space, gym.spaces.Dict):
        return {key: one(part, batch[key], i) for key, part in space.items()}
    if isinstance(space, gym.spaces.Tuple):
        return [one(part, x, i) for part, x in zip(space, batch)]
    return batch[i]


def mark(x):
    """A short text that differs where x, nested arrays, differs."""
    if isinstance(x, dict):
        return mark([(key, x[key]) for key in sorted(x)])
    if isinstance(x, (list, tuple)):
        return mark("".join(map(mark, x)))
    x = np.asarray(x)
    data = repr(x.tolist()).encode() if x.dtype == object else x.tobytes()
    return sha256(f"{x.dtype}{x.shape}".encode() + data).hexdigest()[:16]


def play(envs, levels, actions_of=None):
    """One episode of each of levels (N,), side by side: {level: [(observation, reward, ends), ...]}
    as short texts.

    The first entry is the reset. An environment whose episode has ended plays other levels until
    all are done. actions_of: the level whose actions all take; otherwise each has its own.
    """
    space, n = envs.single_action_space, envs.num_envs
    actions = {}
    for level in levels:
        dice = copy.deepcopy(space)
        dice.seed(actions_of or level)
        actions[level] = [dice.sample() for _ in range(STEPS)]
    obs, _ = envs.reset(seed=levels)
    looks = not hasattr(envs, "procgen")
    tracks = {
        level: [[mark(one(envs.single_observation_space, obs, i))]]
        for i, level in enumerate(levels)
    }
    playing = np.ones(n, bool)
    for t in range(STEPS):
        batch = concatenate(
            space, [actions[level][t] for level in levels], create_empty_array(space, n)
        )
        obs, *row, _ = envs.step(batch)  # row: rewards, terminations, truncations, each (N,)
        done = row[1] | row[2]
        for i in np.flatnonzero(playing).tolist():
            # what Procgen shows at the end of an episode means nothing
            seen = mark(one(envs.single_observation_space, obs, i)) if looks or not done[i] else ""
            tracks[levels[i]].append([seen, float(row[0][i]), bool(row[1][i]), bool(row[2][i])])
        playing &= ~done
        if not playing.any():
            break
        if done.any():
            obs, _ = envs.reset(
                seed=[1000 + t + level for level in levels], options={"reset_mask": done}
            )
    return tracks


def play_alone(env_id, actions_of=None):
    tracks = {}
    for level in LEVELS:
        envs = make(env_id, 1)
        tracks |= play(envs, [level], actions_of)
        envs.close()
    return tracks


def play_together(env_id, workers):
    """Every level in each of ENVS places, or of 2 workers, in changing company."""
    num_envs = 2 if workers else ENVS
    envs, tracks = make(env_id, num_envs, workers), []
    for k in range(len(LEVELS)):
        tracks.append(play(envs, [LEVELS[(k + 3 * i) % len(LEVELS)] for i in range(num_envs)]))
    envs.close()
    return tracks


def play_in_turn(env_id):
    envs = make(env_id, 1)
    tracks = [play(envs, [level]) for level in (*LEVELS, *reversed(LEVELS))]
    envs.close()
    return tracks


def record(env_id, way):
    """{how it was played: [tracks, ...]}; way "first" is what the others are compared with."""
    if way == "first":
        return {"first": [play_alone(env_id)], "same actions": [play_alone(env_id, LEVELS[0])]}
    ways = {"in another process": [play_alone(env_id)], "after other levels": play_in_turn(env_id)}
    ways["in a vector environment"] = play_together(env_id, workers=False)
    if not is_game(env_id):
        ways["in a worker process of a vector environment"] = play_together(env_id, workers=True)
    return ways


# ---- the verdict ---------------------------------------------------------------------------------


def recorded(env_id, way, hash_seed):
    """`record` in a new process. Modules are found in the working directory."""
    places = [os.getcwd(), str(Path(__file__).parent), str(Path(__file__).parents[1])]
    path = os.pathsep.join([*places, os.environ.get("PYTHONPATH", "")])
    env = {
        **os.environ,
        "PYTHONHASHSEED": hash_seed,
        "PYTHONPATH": path,
        "PYTHONWARNINGS": "ignore",
    }
    done = subprocess.run(
        [sys.executable, __file__, env_id, way], env=env, capture_output=True, text=True
    )
    if done.returncode:
        reason = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        pytest.fail(f"--env-id {env_id} cannot be played as a level: {reason}", pytrace=False)
    tracks = json.loads(done.stdout.splitlines()[-1])
    return {
        way: [{int(level): x for level, x in part.items()} for part in parts]
        for way, parts in tracks.items()
    }


def problems(env_id):
    """Sentences that say why env_id is not fit for PLR; none if it is."""
    tracks, found = recorded(env_id, "first", "1"), []
    (first,), (alike,) = tracks["first"], tracks["same actions"]
    for way, parts in recorded(env_id, "others", "2").items():
        different = []
        for level, track in ((level, track) for part in parts for level, track in part.items()):
            pairs = zip(first[level], track)
            step = next(
                (t for t, (a, b) in enumerate(pairs) if a != b), min(len(first[level]), len(track))
            )
            if first[level] != track:
                what = next(
                    (name for name, a, b in zip(WHAT, first[level][step], track[step]) if a != b),
                    "length",
                )
                different.append((level, step, what))
        if different:
            level, step, what = min(different)
            when = f"step {step}" if step else "its reset"
            others = len({level for level, *_ in different}) - 1
            more = f" ({others} more of {len(LEVELS)} levels differ)" if others else ""
            found.append(f"level {level} is not the same {way}: the {what} of {when} differs{more}")
    if len({json.dumps(track) for track in alike.values()}) == 1:
        found.append(
            f"levels {LEVELS[0]} to {LEVELS[-1]} are all the same:"
            " the seed of a reset decides nothing"
        )
    return found


def pytest_generate_tests(metafunc):
    if "env_id" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("--env-id")
        metafunc.parametrize("env_id", [chosen] if chosen else DEFAULT)


@pytest.fixture
def no_env_id(request):
    if request.config.getoption("--env-id"):
        pytest.skip("only --env-id is asked about")


def test_a_level_is_the_same_each_time(env_id):
    found = problems(env_id)
    if found:
        pytest.fail(
            f"{env_id} is not fit for PLR.\n" + "\n".join(f"- {sentence}" for sentence in found),
            pytrace=False,
        )


UNFIT = {  # environment: where and what first differs
    "Leaky": (
        "after other levels",
        "level 1 is not the same after other levels: the reward of step 2 differs",
    ),
    "Deaf": ("all the same", "levels 1 to 8 are all the same"),
    "Alike": ("all the same", "levels 1 to 8 are all the same"),
    "Unseeded": (
        "in another process",
        "level 1 is not the same in another process: the observation of its reset",
    ),
    "Hashed": (
        "in another process",
        "level 1 is not the same in another process: the observation of its reset",
    ),
}


@pytest.mark.parametrize(
    "name",
    [name if name == "Leaky" else pytest.param(name, marks=pytest.mark.slow) for name in UNFIT],
)
def test_what_is_unfit_is_found(name, no_env_id):
    where, sentence = UNFIT[name]
    found = problems(f"unfit_levels:{name}-v0")
    assert where in found[0] and sentence in found[0]
    assert not (name == "Leaky" and "in another process" in "".join(found)) and not (
        name in ("Deaf", "Alike") and len(found) > 1
    )


def test_the_command_names_what_differs(no_env_id):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-n",
        "0",
        __file__,
        "--env-id",
        "unfit_levels:Leaky-v0",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.returncode == 1 and UNFIT["Leaky"][1] in done.stdout and "1 failed" in done.stdout
    with pytest.raises(
        pytest.fail.Exception, match="--env-id NoSuch-v0 cannot be played .*doesn't exist"
    ):
        problems("NoSuch-v0")


@pytest.mark.parametrize("name", ["nosuch", "BabyAI-NoSuch-v0", "no_such_package:Env-v0"])
def test_a_name_that_does_not_exist_is_named_in_a_sentence(name, no_env_id):
    with pytest.raises(pytest.fail.Exception) as failed:
        problems(name)
    assert str(failed.value).startswith(f"--env-id {name} cannot be played as a level: ")
    assert str(failed.value).count("\n") == 0 and "Traceback" not in str(failed.value)


@pytest.mark.slow
def test_babyais_levels_are_registered_and_fit(no_env_id):
    assert problems("BabyAI-GoToRedBall-v0") == []


@pytest.mark.parametrize("name", ["MiniGrid-Empty-6x6-v0", "CliffWalking-v1"])
def test_levels_that_differ_by_nothing_but_the_actions_are_all_alike(name, no_env_id):
    (sentence,) = problems(name)
    assert "levels 1 to 8 are all the same" in sentence


if __name__ == "__main__":
    print(json.dumps(record(*sys.argv[1:])))
