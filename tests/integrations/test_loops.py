"""The sampler in loops of one's own, in a CleanRL script that was patched, and in Stable-Baselines3."""

import math
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from plr_sampler import LevelSampler

import combination_locks  # noqa: F401  registers the environment
import own_loop

HERE = Path(__file__).parent
SETTINGS = {"buffer_size": 4000, "replay_schedule": "fixed", "rho": 0.0, "nu": 0.5}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of worker processes


def assert_replayed_share(counts, nu):
    """Of the draws since the first score (all that follow a first draw per environment and the first update's)."""
    draws = counts["replayed"] + counts["new"]
    assert abs(counts["replayed"] / draws - (1 - nu)) < 4.5 * math.sqrt(nu * (1 - nu) / draws)


def assert_balanced(sampler):
    counts = sampler.counts
    assert counts["started"] == counts["completed"] + (sampler.playing >= 0).sum() + counts["dropped"]


def assert_it_learned(sampler, before, greedy):
    """On the levels with a recent score, unsolved ones score higher; locks that show their digits are solved.

    before: counts at the first update; greedy(obs) -> action of the trained policy.
    """
    assert_balanced(sampler)
    assert_replayed_share({key: sampler.counts[key] - before[key] for key in before}, SETTINGS["nu"])
    env, rows = gym.make("CombinationLock-v0"), []
    for slot in np.flatnonzero(sampler.seen & (sampler.staleness() < 1000)).tolist():
        obs, _ = env.reset(seed=int(sampler.levels[slot]))
        over = False
        while not over:
            obs, _, over, _, info = env.step(int(greedy(obs)))
        rows.append((sampler.scores[slot], info["opened"], env.unwrapped.shown))
    scores, solved, shown = (np.array(x) for x in zip(*rows))
    solved = solved.astype(bool)
    assert 100 < solved.sum() < len(solved) - 100 and solved[shown].mean() > 0.9  # 4 ** -n by chance, n from 2 to 6
    assert scores[~solved].mean() > 1.5 * scores[solved].mean()


# ---- loops of one's own ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feed, size", [(own_loop.whole_rollouts, 12), (own_loop.step_by_step, 600)])
def test_both_ways_to_feed_steps(feed, size):  # (R12)
    sampler = LevelSampler(num_envs=own_loop.N, seed=1, **SETTINGS)
    episodes = feed(sampler, size)
    assert_balanced(sampler)
    assert sampler.counts["completed"] > 300 and sampler.num_seen > 100 and sampler.counts["late"] == 0
    env, scores = gym.make("CombinationLock-v0"), {True: [], False: []}
    for level, score in zip(sampler.levels[sampler.seen].tolist(), sampler.scores[sampler.seen].tolist()):
        env.reset(seed=level)
        scores[bool(env.unwrapped.shown)].append(score)
    assert np.mean(scores[False]) > 1.5 * np.mean(scores[True])  # the policy solves locks that show their digits
    if episodes:
        assert len(episodes) == sampler.counts["completed"] and {env for env, *_ in episodes} == {0, 1, 2, 3}


def test_one_sampler_serves_many_workers():  # (R1)
    sampler = LevelSampler(num_envs=own_loop.N, seed=1, **SETTINGS)
    own_loop.many_workers(sampler, 300)
    assert_balanced(sampler)
    assert sampler.counts["completed"] == own_loop.N * 300 and (sampler.playing >= 0).all()
    # whatever the order, every score has arrived: a lock without digits on show fails more often than not
    assert sampler.num_seen == sampler.counts["new"] - len(set(sampler.playing.tolist()) - set(sampler.levels.tolist()))
    assert sampler.counts["late"] == 0 and len(sampler._candidates) <= own_loop.N


# ---- CleanRL ---------------------------------------------------------------------------------------------------------


def patched(directory):
    shutil.copy(HERE / "cleanrl_ppo.py", directory)
    command = ["git", "apply", str(HERE / "cleanrl_plr.patch")]
    subprocess.run(command, cwd=directory, check=True, env={"GIT_CEILING_DIRECTORIES": str(directory.parent)})
    return directory / "cleanrl_ppo.py"


def test_the_patch_is_small_and_applies(tmp_path):
    lines = (HERE / "cleanrl_plr.patch").read_text().splitlines()
    added, removed = (sum(x[:1] == sign and x[:3] != 3 * sign for x in lines) for sign in "+-")
    assert added <= 20 and removed <= 2
    assert (
        "LevelSampler" not in (HERE / "cleanrl_ppo.py").read_text() and "LevelSampler" in patched(tmp_path).read_text()
    )
    if shutil.which("patch"):
        command = [
            "patch",
            "-o",
            str(tmp_path / "other.py"),
            str(HERE / "cleanrl_ppo.py"),
            str(HERE / "cleanrl_plr.patch"),
        ]
        subprocess.run(command, check=True)
        assert (tmp_path / "other.py").read_text() == (tmp_path / "cleanrl_ppo.py").read_text()


@pytest.mark.slow
def test_patched_cleanrl_learns_with_plr(tmp_path, monkeypatch):
    pytest.importorskip("tyro")
    script, counts, update = patched(tmp_path), [], LevelSampler.update
    monkeypatch.setattr(LevelSampler, "update", lambda s, *x: (update(s, *x), counts.append(dict(s.counts)))[0])
    monkeypatch.setattr(sys, "argv", [str(script)])
    run = runpy.run_path(str(script), run_name="__main__")
    agent, sampler = run["agent"], run["sampler"]
    assert {name: getattr(sampler, name) for name in SETTINGS} == SETTINGS and len(counts) == 32
    assert_it_learned(sampler, counts[0], lambda obs: agent.actor(torch.tensor(obs)).argmax())


def test_plain_cleanrl_runs(monkeypatch, capsys):
    pytest.importorskip("tyro")
    monkeypatch.setattr(sys, "argv", ["cleanrl_ppo.py", "--total-timesteps", "1024"])
    runpy.run_path(str(HERE / "cleanrl_ppo.py"), run_name="__main__")
    assert capsys.readouterr().out.count("per episode") == 2


# ---- Stable-Baselines3 -----------------------------------------------------------------------------------------------


class Spy(gym.Wrapper):
    """Says in every step's info which level the environment in the worker is on, and what its start looked like."""

    def reset(self, *, seed=None, options=None):
        self.start, info = super().reset(seed=seed, options=options)
        self.level = seed
        return self.start, info

    def step(self, action):
        *row, info = super().step(action)
        return *row, {**info, "level": self.level, "start": self.start}


def spied_minigrid():
    from minigrid.wrappers import ImgObsWrapper

    import sb3_plr

    env = gym.make("MiniGrid-Empty-Random-6x6-v0", max_steps=7)  # ends by truncation, now and then at the goal
    return sb3_plr.LevelStart(Spy(gym.wrappers.FlattenObservation(ImgObsWrapper(env))))


@pytest.mark.parametrize("kind", ["DummyVecEnv", "SubprocVecEnv"])
def test_every_worker_plays_the_level_it_was_given(kind):  # (R1, R8)
    vec_env = pytest.importorskip("stable_baselines3.common.vec_env")
    import sb3_plr

    class Watch(sb3_plr.PLRCallback):
        def _on_step(self):
            assigned, infos = self.playing.tolist(), self.locals["infos"]
            assert [info["level"] for info in infos] == assigned
            for i, info in enumerate(infos):
                starts.setdefault(assigned[i], info["start"])
                assert (info["start"] == starts[assigned[i]]).all()
            for i in np.flatnonzero(self.locals["dones"]):
                begun.append((self.sampler.playing[i], self.locals["new_obs"][i].copy()))
            assert_balanced(self.sampler)
            return super()._on_step()

        def _on_rollout_end(self):
            buffer = self.model.rollout_buffer
            assert (buffer.episode_starts[1:] == np.array(self.dones)[:-1]).all()
            assert (
                buffer.returns == buffer.advantages + buffer.values
            ).all() and buffer.advantages.any()  # GAE is done
            rollouts.append((np.array(self.levels), np.abs(buffer.advantages), np.array(self.dones)))
            super()._on_rollout_end()

    starts, begun, rollouts = {}, [], []
    settings = {"num_envs": 3, "seed": 1, "buffer_size": 8, "level_space": 40, "rho": 0.5}
    sampler = LevelSampler(**settings)
    envs = sb3_plr.LevelVecEnv(getattr(vec_env, kind)([spied_minigrid] * 3), sampler)
    model = sb3_plr.PPO("MlpPolicy", envs, n_steps=40, batch_size=60, n_epochs=1, seed=1, device="cpu")
    model.learn(240, callback=Watch(sampler))
    model.learn(120, callback=Watch(sampler))  # resets the environments: what was in progress is dropped
    envs.close()
    assert sampler.counts["dropped"] == 3 and sampler.counts["completed"] >= 3 * 360 // 3 // 7 - 3
    assert sampler.counts["replayed"] > 10 and len(rollouts) == 3
    fresh = spied_minigrid()
    for level, obs in begun:  # what the policy sees first is the level's start, not what the worker's own reset made
        assert (fresh.reset(options={"level": level})[0] == obs).all()
    known = {}
    for levels, scores, dones in rollouts:
        for episode in LevelSampler(range(40), num_envs=3, seed=1).update(levels, scores, dones):
            known[episode.level] = episode.score
    assert all(known[level] == score for level, score in zip(sampler.levels[sampler.seen], sampler.scores))


def test_a_sampler_of_another_number_of_environments_is_refused():
    vec_env = pytest.importorskip("stable_baselines3.common.vec_env")
    import sb3_plr

    sentence = "the sampler has num_envs=3, but there are 2 environments"
    venv = vec_env.DummyVecEnv([spied_minigrid] * 2)
    three, two = (LevelSampler(range(9), num_envs=n, seed=1) for n in (3, 2))
    with pytest.raises(ValueError, match=sentence):
        sb3_plr.LevelVecEnv(venv, three)
    envs = sb3_plr.LevelVecEnv(venv, two)
    model = sb3_plr.PPO("MlpPolicy", envs, n_steps=8, batch_size=8, seed=1, device="cpu")
    with pytest.raises(ValueError, match=sentence):
        model.learn(16, callback=sb3_plr.PLRCallback(three))
    assert two.counts["completed"] == 0
    model.learn(16, callback=sb3_plr.PLRCallback(two))
    assert two.counts["started"] >= 2


@pytest.mark.slow
def test_stable_baselines3_learns_with_plr():
    vec_env = pytest.importorskip("stable_baselines3.common.vec_env")
    import sb3_plr

    sampler, counts = LevelSampler(num_envs=8, seed=1, **SETTINGS), []

    class Watch(sb3_plr.PLRCallback):
        def _on_rollout_end(self):
            super()._on_rollout_end()
            counts.append(dict(sampler.counts))

    make = [lambda: sb3_plr.LevelStart(gym.make("CombinationLock-v0"))] * 8
    envs, options = sb3_plr.LevelVecEnv(vec_env.DummyVecEnv(make), sampler), {"learning_rate": 3e-3, "gamma": 0.95}
    model = sb3_plr.PPO("MlpPolicy", envs, n_steps=64, batch_size=128, n_epochs=8, seed=1, device="cpu", **options)
    model.learn(16384, callback=Watch(sampler))
    assert_it_learned(sampler, counts[0], lambda obs: model.predict(obs, deterministic=True)[0])
