"""PLR without a change to the training code: levels, scores and counts of PLRVectorEnv."""

import ast
import os
import re
import runpy
import signal
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from plr_sampler import LevelSampler

import combination_locks  # noqa: F401  registers the environment
import own_loop
from plr_vector_env import PLRVectorEnv, learnability

HERE = Path(__file__).parent
MODES = list(AutoresetMode)
GAMMA, LAMBDA = 0.9, 0.8


class Walk(gym.Env):
    """Shows its level and its step. A level of 3 n + k takes n % 5 + 1 steps of reward k; every
    second one is truncated there, the others terminate. Without a seed it is on no level."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        self.level = -1 if seed is None else seed
        self.t = 0
        return self.look(), {"level": self.level, "start": {"name": f"level {self.level}"}}

    def step(self, action):
        assert self.t < length(self.level)
        self.t += 1
        end = self.t == length(self.level)
        terminated = end and not truncates(self.level)
        truncated = end and truncates(self.level)
        return self.look(), float(self.level % 3), terminated, truncated, {"t": self.t}

    def look(self):
        return np.array([self.level, self.t], np.float64)


def length(level):
    return level // 3 % 5 + 1


def truncates(level):
    return level % 2 == 1


def value(obs):
    """(n, 2) -> (n,)"""
    return np.sin(obs[:, 0] + 2 * obs[:, 1])


def expected_score(level):
    """By GAE's definition, a sum over the later TD errors, with the truncated end bootstrapped."""
    steps = length(level)
    v = np.sin(level + 2 * np.arange(steps + 1))
    v[steps] *= truncates(level)
    deltas = level % 3 + GAMMA * v[1:] - v[:-1]
    total = 0.0
    for t in range(steps):
        weights = (GAMMA * LAMBDA) ** np.arange(steps - t)
        total += abs((weights * deltas[t:]).sum())
    return total / steps


def make(mode, n=3, kind=SyncVectorEnv, env=Walk, **kwargs):
    return kind([env] * n, autoreset_mode=mode, **kwargs)


def plr(envs, sampler, v=value, **kwargs):
    return PLRVectorEnv(envs, sampler, v, gamma=GAMMA, gae_lambda=LAMBDA, **kwargs)


def assert_balanced(sampler):
    counts = sampler.counts
    in_progress = (sampler.playing >= 0).sum()
    assert counts["started"] == counts["completed"] + in_progress + counts["dropped"]


def play(envs, steps, every_step=lambda *x: None, abandon=10**9):
    """A loop that knows Gymnasium's autoreset modes and no levels."""
    obs, infos = envs.reset(seed=1)
    assert (infos["plr_level"] == obs[:, 0]).all()
    actions = np.zeros(envs.num_envs, int)
    for step in range(1, steps + 1):
        obs, rewards, terminations, truncations, infos = envs.step(actions)
        every_step(obs, rewards, terminations, truncations, infos)
        dones = terminations | truncations
        if step % abandon == 0:
            obs, infos = envs.reset()
        elif envs.metadata["autoreset_mode"] == AutoresetMode.DISABLED:
            if step % 50 == 0:
                dones[0] = True  # abandons an episode
            if dones.any():
                before = obs
                obs, infos = envs.reset(options={"reset_mask": dones})
                assert (obs[~dones] == before[~dones]).all()
                assert (obs[dones, 1] == 0).all()
        assert (infos["plr_level"] == obs[:, 0]).all()


# ---- levels, scores, counts ----------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [SyncVectorEnv, AsyncVectorEnv])
@pytest.mark.parametrize("steps", [300, 1500])
def test_every_step_is_on_the_level_that_was_assigned(mode, kind, steps):
    """Three environments: up to 4,500 steps together."""
    settings = {"num_envs": 3, "seed": 1, "rho": 0.2, "replay_schedule": "fixed"}
    sampler = LevelSampler(range(40), **settings)
    envs = plr(make(mode, kind=kind), sampler)
    scored = []
    update_scores = sampler.update_scores

    def spy(levels, scores):
        scored.extend(zip(levels.tolist(), scores))
        update_scores(levels, scores)

    sampler.update_scores = spy
    evaluated = []
    envs.value = lambda obs: (evaluated.extend(obs.tolist()), value(obs))[1]
    ended = [0]
    playing = [np.empty(0)]

    def every_step(obs, rewards, terminations, truncations, infos):
        dones = terminations | truncations
        ended[0] += dones.sum()
        assert (infos["plr_level"] == sampler.playing).all()
        assert (obs[:, 0] == sampler.playing).all()
        assert_balanced(sampler)
        if mode == AutoresetMode.SAME_STEP and dones.any():
            assert (infos["_final_obs"] == dones).all()
            final = np.stack(infos["final_obs"][dones])
            assert (final[:, 0] == playing[0][dones]).all()
            assert (infos["final_info"]["plr_level"][dones] == playing[0][dones]).all()
            assert (infos["final_info"]["t"][dones] == [length(x) for x in final[:, 0]]).all()
        playing[0] = sampler.playing.copy()

    reset = envs.reset

    def reset_and_remember(**kwargs):
        result = reset(**kwargs)
        playing[0] = sampler.playing.copy()
        return result

    envs.reset = reset_and_remember
    play(envs, steps, every_step, abandon=97)
    envs.close()
    assert len(scored) == ended[0] and ended[0] > steps / 2
    finished_now = int(envs._over.sum())  # counted when the next episode starts
    assert sampler.counts["completed"] + finished_now == ended[0]
    assert sampler.counts["dropped"] > 5 and sampler.counts["replayed"] > steps / 10
    for level, score in scored:
        assert score == pytest.approx(expected_score(level), abs=1e-12)
    at = 0
    for level, _ in scored:  # each episode's own observations, in order
        steps = length(level) + truncates(level)
        assert evaluated[at : at + steps] == [[level, t] for t in range(steps)]
        at += steps
    assert at == len(evaluated)


@pytest.mark.parametrize("mode", MODES)
def test_workers_without_shared_memory(mode):
    sampler = LevelSampler(range(40), num_envs=3, seed=1, rho=0.2)
    envs = plr(make(mode, kind=AsyncVectorEnv, shared_memory=False), sampler)
    play(envs, 300)
    for level in sampler.levels[sampler.seen].tolist():
        assert sampler.scores[level] == pytest.approx(expected_score(level))
    if mode == AutoresetMode.NEXT_STEP:
        while not envs._over.any():
            envs.step(np.zeros(3, int))
        with pytest.raises(ValueError, match="step before you reset"):
            envs.reset()
    envs.close()


@pytest.mark.parametrize("mode", MODES)
def test_the_loop_sees_what_gymnasium_shows(mode):
    """Against the bare environments, which go from level to level by themselves."""

    class NextLevel(Walk):
        level = 0

        def reset(self, *, seed=None, options=None):
            return super().reset(seed=self.level + 1 if seed is None else seed)

    sampler = LevelSampler(num_envs=1, seed=1, curriculum="sequential")
    sampler.next_levels(np.ones(1, bool))  # 0
    sampler.next_levels(np.ones(1, bool), levels=[0])
    wrapped = plr(make(mode, 1, env=NextLevel), sampler)
    bare = make(mode, 1, env=NextLevel)
    reset = {"obs": bare.reset(seed=1)[0], "wrapped": wrapped.reset(seed=7)[0]}
    assert (reset["obs"] == reset["wrapped"]).all()
    for _ in range(200):
        result = wrapped.step(np.zeros(1, int))
        plain = bare.step(np.zeros(1, int))
        infos = result[-1]
        final_info = infos.get("final_info", {})
        for part in (infos, final_info):
            part.pop("plr_level", None)
            part.pop("_plr_level", None)
        ended = plain[2] | plain[3]
        if mode == AutoresetMode.SAME_STEP and ended.any():
            for infos in (result[-1], plain[-1]):  # an array of arrays
                infos["final_obs"] = infos["final_obs"].tolist()
        for key in list(infos):
            if f"_{key}" in infos and not infos[f"_{key}"].any():  # of the start on no level
                del infos[key], infos[f"_{key}"]
        assert data_equivalence(result, plain, exact=True)
        if mode == AutoresetMode.DISABLED and ended.any():
            mask = {"reset_mask": ended}
            bare.reset(options=dict(mask))
            wrapped.reset(options=dict(mask))


def test_scores_and_draws_are_those_of_the_loop_that_uses_a_step_scorer():
    settings = {"buffer_size": 60, "num_envs": own_loop.N, "seed": 1, "rho": 0.5}
    by_hand = LevelSampler(**settings)
    episodes = own_loop.step_by_step(by_hand, 500)
    sampler = LevelSampler(**settings)
    envs = gym.make_vec("CombinationLock-v0", own_loop.N, vector_kwargs={"autoreset_mode": "SameStep"})
    envs = PLRVectorEnv(envs, sampler, own_loop.value, own_loop.GAMMA, own_loop.LAMBDA)
    rng = np.random.default_rng(1)
    obs, _ = envs.reset(seed=3)
    for _ in range(500):
        obs, *_ = envs.step(own_loop.act(obs, rng))
    assert len(episodes) == sampler.counts["completed"] > 300
    assert sampler.counts == by_hand.counts and sampler.counts["replayed"] > 100
    assert (sampler.levels == by_hand.levels).all()
    assert (sampler.playing == by_hand.playing).all()
    np.testing.assert_allclose(sampler.scores, by_hand.scores, atol=1e-12)


class Scripted(LevelSampler):
    """Starts the levels that it is told."""

    def next_levels(self, done, replay=None, levels=None):
        return super().next_levels(done, levels=self.script)


def test_scores_are_those_of_the_patched_script(tmp_path, monkeypatch):
    """On its trajectory, with its critic: all episodes that began in the rollout that they end
    in. Of the others the patched script scores each part."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("tyro")
    from test_loops import patched

    torch.set_num_threads(1)
    rollouts = []
    update = LevelSampler.update

    def spy(sampler, levels, scores, dones):
        run = sys._getframe(1).f_globals
        critic = {name: x.clone() for name, x in run["agent"].critic.state_dict().items()}
        episodes = update(sampler, levels, scores, dones)
        rollouts.append((critic, levels.copy(), run["actions"].numpy().copy(), dones, episodes))
        return episodes

    script = patched(tmp_path)
    monkeypatch.setattr(LevelSampler, "update", spy)
    monkeypatch.setattr(sys, "argv", [str(script), "--total-timesteps", "4096"])
    run = runpy.run_path(str(script), run_name="__main__")
    monkeypatch.undo()
    agent, args = run["agent"], run["args"]

    n = args.num_envs
    all_levels = np.concatenate([levels for _, levels, *_ in rollouts])
    known = np.unique(np.append(all_levels, run["sampler"].playing))
    sampler = Scripted(known, num_envs=n, seed=1)
    envs = gym.make_vec(args.env_id, n, vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP})

    def critic(obs):
        with torch.no_grad():
            return agent.get_value(torch.tensor(obs))

    envs = PLRVectorEnv(envs, sampler, critic, args.gamma, args.gae_lambda)
    sampler.script = all_levels[0]
    envs.reset()
    compared = 0
    step = 0
    for k, (parameters, _, actions, dones, records) in enumerate(rollouts):
        agent.critic.load_state_dict(parameters)
        mine = [[] for _ in range(n)]
        for t in range(args.num_steps):
            step += 1
            sampler.script = run["sampler"].playing
            if step < len(all_levels):
                sampler.script = all_levels[step]
            playing = sampler.playing.copy()
            _, _, terminations, truncations, _ = envs.step(actions[t].astype(int))
            ended = terminations | truncations
            assert (ended == dones[t].astype(bool)).all()
            for i in np.flatnonzero(ended):
                level = int(playing[i])
                mine[i].append((level, sampler.scores[np.searchsorted(known, level)]))
            # two environments on one level in one step: the later one's score is the level's
            for level in set(playing[ended].tolist()):
                same = [i for i in np.flatnonzero(ended) if playing[i] == level]
                for i in same[:-1]:
                    mine[i][-1] = (level, None)
        for i in range(n):
            theirs = records[(records.env == i) & records.complete]
            assert len(theirs) == len(mine[i])
            for j, (record, (level, score)) in enumerate(zip(theirs, mine[i])):
                assert record.level == level
                whole = j > 0 or k == 0
                if whole and score is not None:
                    assert score == pytest.approx(record.score, abs=1e-6)
                    compared += 1
    assert compared > 800


# ---- evaluators and scores -----------------------------------------------------------------------


def test_batches_are_as_large_as_the_evaluator_likes():
    sizes = []

    def small(obs):
        sizes.append(len(obs))
        return value(obs)

    scores = []
    for settings in ({"batch_size": 2, "v": small}, {}):
        sampler = LevelSampler(range(40), num_envs=3, seed=1)
        play(plr(make(AutoresetMode.SAME_STEP), sampler, **settings), 200)
        scores.append(sampler.scores)
    assert set(sizes) == {1, 2}
    assert (scores[0] == scores[1]).all()


def test_the_readmes_recurrent_evaluator():
    torch = pytest.importorskip("torch")
    blocks = re.findall("```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    names = {"torch": torch, "np": np}
    exec(next(block for block in blocks if "class RecurrentValue" in block), names)

    class Agent(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = torch.nn.LSTM(2, 4)
            self.critic = torch.nn.Linear(4, 1)

    torch.manual_seed(1)
    agent = Agent().double()
    sampler = LevelSampler(range(40), num_envs=3, seed=1)
    score = {"score": lambda advantages, deltas, regrets: -regrets}  # values, but for a constant
    evaluator = names["RecurrentValue"](agent)
    play(plr(make(AutoresetMode.NEXT_STEP), sampler, evaluator, batch_size=2, **score), 200)
    assert sampler.num_seen > 20
    for level in np.flatnonzero(sampler.seen).tolist():
        obs = [[level, t] for t in range(length(level))]
        with torch.no_grad():
            hidden, _ = agent.lstm(torch.tensor(obs, dtype=torch.float64))
            values = agent.critic(hidden)
        best = length(level) * (level % 3)
        assert sampler.scores[level] == pytest.approx(values.mean().item() - best)


def test_without_a_value_levels_are_scored_by_their_success_rates():
    assert learnability(np.array([1.0])) == pytest.approx(2 / 3 * 1 / 3)
    assert learnability(np.array([0.0, 2.0, -1.0])) == pytest.approx(2 / 5 * 3 / 5)
    sampler = LevelSampler(range(12), num_envs=2, seed=1)
    envs = PLRVectorEnv(make(AutoresetMode.NEXT_STEP, 2), sampler)
    play(envs, 2000)
    for level, score in enumerate(sampler.scores):  # ten returns of level % 3 each
        p = 11 / 12 if level % 3 else 1 / 12
        assert score == pytest.approx(p * (1 - p))
    assert envs._obs[0] == [] or len(envs._obs[0]) == 1

    sampler = LevelSampler(buffer_size=5, num_envs=2, seed=1, rho=0.2)
    seen = []
    envs = PLRVectorEnv(
        make(AutoresetMode.SAME_STEP, 2),
        sampler,
        score=lambda returns: seen.append(len(returns)) or returns.max(),
    )
    play(envs, 1000)
    assert set(seen) > {1, 2, 3} and max(seen) <= 10
    assert len(envs._returns) <= 14
    for level, score in zip(sampler.levels.tolist(), sampler.scores):
        assert score == length(level) * (level % 3)


class Words(gym.Env):
    """A lock's digits in a dictionary, as a mission and a picture would be."""

    observation_space = gym.spaces.Dict(
        {"image": gym.spaces.Box(0, 255, (2, 2), np.uint8), "left": gym.spaces.Discrete(9)}
    )
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.image = self.np_random.integers(256, size=(2, 2), dtype=np.uint8)
        self.left = 3
        return {"image": self.image, "left": self.left}, {}

    def step(self, action):
        self.left -= 1
        return {"image": self.image, "left": self.left}, 1.0, False, self.left == 0, {}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [SyncVectorEnv, AsyncVectorEnv])
def test_dictionary_observations(mode, kind):
    sampler = LevelSampler(range(9), num_envs=2, seed=1)

    def by_image(obs):
        assert obs["image"].dtype == np.uint8 and obs["image"].shape[1:] == (2, 2)
        return obs["image"].sum((1, 2)) + obs["left"]

    score = {"score": lambda advantages, deltas, regrets: deltas}
    envs = PLRVectorEnv(make(mode, 2, kind, Words), sampler, by_image, gamma=1.0, **score)
    envs.reset()
    for _ in range(60):
        _, _, terminations, truncations, infos = envs.step(np.zeros(2, int))
        if truncations.any() and mode == AutoresetMode.SAME_STEP:
            assert infos["final_obs"][truncations][0]["left"] == 0
        if truncations.any() and mode == AutoresetMode.DISABLED:
            envs.reset(options={"reset_mask": truncations})
    envs.close()
    assert sampler.num_seen == 9
    assert (sampler.scores == 0).all()  # the reward is the digit fewer, up to the truncated end


# ---- errors --------------------------------------------------------------------------------------


class IgnoresItsSeed(Walk):
    def reset(self, *, seed=None, options=None):
        return super().reset(seed=int(np.random.default_rng().integers(10**6)))


class Alike(Walk):
    def look(self):
        return np.zeros(2)


def test_an_environment_that_is_not_fit_is_refused():
    sampler = LevelSampler(range(40), num_envs=3, seed=1)
    for env, sentence in ((IgnoresItsSeed, "starts in two ways"), (Alike, "levels start alike")):
        with pytest.raises(ValueError, match=f"SyncVectorEnv.* is not fit for PLR: .*{sentence}"):
            plr(make(AutoresetMode.SAME_STEP, env=env), sampler).reset()
    plr(make(AutoresetMode.SAME_STEP, env=Alike), sampler, check=False).reset()
    assert_balanced(sampler)
    one = LevelSampler([17], num_envs=3, seed=1)
    plr(make(AutoresetMode.SAME_STEP), one).reset()
    alone = LevelSampler(range(40), num_envs=1, seed=1)
    with pytest.raises(ValueError, match="levels start alike"):
        plr(make(AutoresetMode.SAME_STEP, 1, env=Alike), alone).reset()


@pytest.mark.parametrize(
    "bad, sentence",
    [
        (lambda obs: value(obs)[:, None], r"value of 1 observations has shape \(1, 1\), not \(1,\)"),
        (lambda obs: value(obs).mean(), r"value of 1 observations has shape \(\), not \(1,\)"),
        (lambda obs: value(obs) * np.nan, "value is not finite on level 0"),
        (lambda obs: value(obs) / 0.0, "value is not finite on level 0"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_a_value_of_wrong_shape_or_not_finite_is_refused(bad, sentence):
    sampler = LevelSampler([0], num_envs=1, seed=1)
    envs = plr(make(AutoresetMode.SAME_STEP, 1), sampler, bad)
    envs.reset()
    with pytest.raises(ValueError, match=sentence):
        envs.step(np.zeros(1, int))
    assert sampler.num_seen == 0
    assert_balanced(sampler)


class Fails(Walk):
    def step(self, action):
        assert action == 0, "no such action"
        return super().step(action)


def test_a_worker_that_dies_is_named():
    sampler = LevelSampler([9, 10, 12], num_envs=3, seed=1)
    envs = plr(make(AutoresetMode.NEXT_STEP, kind=AsyncVectorEnv), sampler)
    envs.reset()
    level = sampler.playing[1]
    os.kill(envs.unwrapped.processes[1].pid, signal.SIGKILL)
    sentence = rf"worker of environment 1 died \(exit code -9\) on level {level}"
    with pytest.raises(RuntimeError, match=sentence):
        envs.step(np.zeros(3, int))
    envs.close()  # no second error
    for worker in envs.unwrapped.processes:
        worker.join(5)
        assert not worker.is_alive()

    envs = plr(make(AutoresetMode.SAME_STEP, kind=AsyncVectorEnv, env=Fails), sampler)
    envs.reset()  # with new workers
    assert sampler.counts["dropped"] == 3
    assert_balanced(sampler)
    with pytest.raises(RuntimeError, match="environment 2 died .* on level .*no such action"):
        envs.step(np.array([0, 0, 1]))
    envs.close()


def test_what_the_loop_may_not_do_is_refused():
    sampler = LevelSampler(range(40), num_envs=3, seed=1)
    with pytest.raises(ValueError, match="num_envs=3, but there are 2"):
        plr(make(AutoresetMode.SAME_STEP, 2), sampler)
    envs = plr(make(AutoresetMode.DISABLED), sampler)
    with pytest.raises(ValueError, match="reset the environments before the first step"):
        envs.step(np.zeros(3, int))
    with pytest.raises(ValueError, match="the first reset must be of all"):
        envs.reset(options={"reset_mask": np.array([True, False, False])})
    envs.reset()
    with pytest.raises(ValueError, match="episodes are over, reset where they are"):
        for _ in range(9):
            envs.step(np.zeros(3, int))


# ---- state, and the whole ------------------------------------------------------------------------


@pytest.mark.parametrize("v", [value, None])
@pytest.mark.parametrize("mode", MODES)
def test_a_restored_state_goes_on_as_the_saved_one(v, mode):
    def build():
        sampler = LevelSampler(buffer_size=9, num_envs=3, seed=1, rho=0.3)
        return plr(make(mode), sampler, v)

    saved = build()
    play(saved, 301)
    state = saved.state_dict()
    play(saved, 100)
    restored = build()
    restored.load_state_dict(state)
    with pytest.raises(ValueError, match="reset the environments before"):
        restored.step(np.zeros(3, int))
    play(restored, 100)
    np.testing.assert_equal(saved.state_dict(), restored.state_dict())
    assert saved.curriculum.counts["dropped"] > 0
    assert_balanced(restored.curriculum)


def run_unchanged(monkeypatch, flags):
    torch = pytest.importorskip("torch")
    pytest.importorskip("tyro")
    torch.set_num_threads(1)
    monkeypatch.setattr(sys, "argv", ["cleanrl_unchanged.py", *flags])
    return runpy.run_path(str(HERE / "cleanrl_unchanged.py"), run_name="__main__")


def test_cleanrl_runs_unchanged(monkeypatch, capsys):
    make_vec = gym.make_vec
    run = run_unchanged(monkeypatch, ["--total-timesteps", "1024"])
    assert gym.make_vec is make_vec
    out = capsys.readouterr().out
    assert out.count("per episode") == 2 and "the second evaluation: " in out
    sampler = run["sampler"]
    assert_balanced(sampler)
    assert sampler.num_seen > 50 and sampler.counts["replayed"] > 50


@pytest.mark.slow
def test_unchanged_cleanrl_learns_with_plr(monkeypatch):
    test_loops = pytest.importorskip("test_loops")
    torch = pytest.importorskip("torch")
    nothing = dict.fromkeys(LevelSampler(range(1), num_envs=1, seed=1).counts, 0)
    run = run_unchanged(monkeypatch, [])
    agent = run["agent"]
    greedy = lambda obs: agent.actor(torch.tensor(obs)).argmax()  # noqa: E731
    test_loops.assert_it_learned(run["sampler"], nothing, greedy)


def test_the_file_is_small_and_needs_numpy_and_gymnasium_only():
    text = (HERE / "plr_vector_env.py").read_text()
    assert len(text.splitlines()) < 250
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"gymnasium", "numpy", "plr_sampler"}
