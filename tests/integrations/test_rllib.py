"""rllib_robust_plr.py against real Ray workers. R1 to R13 are the requirements that an RLlib user's thread comes to.

Skipped where Ray is not installed (see tests/integrations/requirements.txt). Other failures to import it are errors.
"""

import copy
import importlib.util
import os
import signal
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

if importlib.util.find_spec("ray") is None:
    pytest.skip("Ray is not installed: pip install -r tests/integrations/requirements.txt", allow_module_level=True)

import gymnasium as gym
import numpy as np
import ray
import torch
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.tune import register_env

import rllib_robust_plr as rllib

HERE = Path(__file__).parent
ROOM = {"id": "MiniGrid-Empty-Random-5x5-v0", "max_steps": 16}


@pytest.fixture(scope="module")
def cluster():
    """A Ray of this test run's own, whose workers find this file, the integration and plr_sampler.py."""
    paths = {"PYTHONPATH": os.pathsep.join(map(str, (HERE, HERE.parent.parent))), "RAY_DEDUP_LOGS": "0"}
    before = {name: os.environ.get(name) for name in paths}
    os.environ.update(paths)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    memory = 100 * 2**20
    ray.init("local", num_cpus=4, include_dashboard=False, object_store_memory=memory, log_to_driver=False)
    yield
    ray.shutdown()
    torch.set_num_threads(threads)
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


# ---- what the tests watch --------------------------------------------------------------------------------------------


class HalfIcy(gym.Wrapper):
    """Odd levels are icy: three of four moves go astray, decided by level and actions so far, so that nobody can learn
    them by heart. It shows: observations are negative there. Kills its own process once there is a `kill_file`."""

    def __init__(self, env: gym.Env, kill_file: str | None = None):
        super().__init__(env)
        self.kill_file, self.steps = kill_file, 0
        self.observation_space = gym.spaces.Box(-26, 26, (147,))

    def reset(self, *, seed=None, options=None):
        self.history = [seed or 0]
        self.icy = self.history[0] % 2
        obs, info = self.env.reset(seed=seed, options=options)
        return -obs if self.icy else obs, info

    def step(self, action):
        self.steps += 1
        if self.kill_file and self.steps % 5 == 0 and os.path.exists(self.kill_file):
            try:
                os.unlink(self.kill_file)
            except FileNotFoundError:
                pass  # another environment was faster
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        self.history.append(int(action))
        if self.icy and (rng := np.random.default_rng(self.history)).random() < 0.75:
            action = rng.integers(3)
        obs, *rest = self.env.step(action)
        return -obs if self.icy else obs, *rest


def half_icy(config: dict) -> gym.Env:
    return rllib.AssignedLevel(HalfIcy(rllib.make_env(ROOM).env, **config))


class Witness(rllib.GlobalSampler):
    """Writes down every assignment."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.assigned = []

    def start_episode(self, env, cut):
        level = super().start_episode(env, cut)
        self.assigned.append((env, level))
        return level

    def take_assigned(self):
        assigned, self.assigned = self.assigned, []
        return assigned


class Watched(rllib.RobustPLR):
    """Keeps what an iteration saw. `before_round(number, env_runners)` is called before each round of fragments."""

    before_round = staticmethod(lambda number, env_runners: None)

    def rollout(self):
        self.rounds = 0
        fragments, self.lost = super().rollout()
        self.parts = {}  # episode -> its fragments, before the learner changes them
        for fragment in copy.deepcopy(fragments):
            self.parts.setdefault(fragment.id_, []).append(fragment)
        return fragments, self.lost

    def sample(self, env_runners, fresh):
        self.before_round(self.rounds, env_runners)
        self.rounds += 1
        return super().sample(env_runners, fresh)

    def played(self, fragments):
        self.last_played = super().played(fragments)
        return self.last_played

    def levels(self) -> dict[str, np.ndarray]:
        return ray.get(self.sampler.levels.remote())


class Ledger:
    """Counts the episodes of all env runners again, from the assignments and the scores alone."""

    def __init__(self):
        self.started = self.completed = self.dropped = 0
        self.open = 0  # of the iteration before, to be dropped by the next one

    def train(self, algorithm: Watched) -> tuple[dict, list[tuple[int, int]]]:
        """One iteration: (result["curriculum"], [(environment, level) of each start]). R1, R3: the counts are right."""
        curriculum = algorithm.train()["curriculum"]
        assigned, played = ray.get(algorithm.sampler.take_assigned.remote()), algorithm.last_played
        lost = sum(env in algorithm.lost for env, _ in assigned) - sum(p.env in algorithm.lost for p in played)
        self.started += len(assigned)
        self.completed += len(played)
        self.dropped += self.open + lost
        self.open = len(assigned) - len(played) - lost
        counted = {name: curriculum[name] for name in ("started", "completed", "dropped", "in_progress")}
        assert counted == dict(zip(counted, (self.started, self.completed, self.dropped, self.open)))
        # R8: every episode starts as its assigned level does in an environment of the test's own
        fresh = HalfIcy(rllib.make_env(ROOM).env)
        for parts in algorithm.parts.values():
            info = parts[0].get_infos(0)
            assert (info["env"], info["level"]) in assigned
            assert (parts[0].get_observations(0) == fresh.reset(seed=int(info["level"]))[0]).all()
        return curriculum, assigned


@pytest.fixture
def build(cluster, monkeypatch):
    """build(env_config, env runners, environments each, steps of an iteration, sampler's settings): an algorithm."""
    monkeypatch.setattr(rllib, "GlobalSampler", Witness)
    register_env("half-icy", half_icy)
    built = []

    def build(env_config: dict, env_runners: int, envs: int, batch: int, **curriculum) -> Watched:
        config = rllib.config().environment("half-icy", env_config=env_config)
        config.env_runners(num_env_runners=env_runners, num_envs_per_env_runner=envs, rollout_fragment_length=16)
        config.training(train_batch_size_per_learner=batch, minibatch_size=128)
        config.evaluation(evaluation_interval=10**6, evaluation_duration=3)
        config.curriculum(**{**config.level_sampler, **curriculum})
        built.append(Watched(config=config))
        return built[0]

    yield build
    for algorithm in built:
        algorithm.stop()


def learner_state(algorithm: Watched) -> dict[str, np.ndarray]:
    """Everything that an update changes: parameters, Adam's moments and steps, KL coefficient, weight version."""
    learner = algorithm.learner_group._learner
    state = {f"module {k}": v for k, v in learner.module[DEFAULT_MODULE_ID].state_dict().items()}
    for optimizer in learner._named_optimizers.values():
        for i, moments in optimizer.state_dict()["state"].items():
            state |= {f"optimizer {i} {k}": v for k, v in moments.items()}
    state["version"] = learner._weights_seq_no
    state["kl"] = learner.curr_kl_coeffs_per_module[DEFAULT_MODULE_ID]
    return {k: torch.as_tensor(v).detach().numpy().copy() for k, v in state.items()}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a)


def assert_scored_as_uncut(algorithm: Watched) -> int:
    """R5, after an iteration on new levels, where the network is still the one that acted and each level's best return
    is its only one: MaxMC of each episode in one pass. Returns the largest number of fragments that one came in."""
    whole = [parts for parts in algorithm.parts.values() if parts[-1].is_done]
    module = algorithm.learner_group._learner.module[DEFAULT_MODULE_ID]
    for parts, played in zip(whole, algorithm.last_played, strict=True):
        obs = np.concatenate([part.get_observations()[: len(part)] for part in parts])
        with torch.no_grad():
            values = module.compute_values({Columns.OBS: torch.from_numpy(obs)})
        total = sum(part.get_return() for part in parts)
        assert (played.steps, played.episode_return) == (len(obs), pytest.approx(total))
        assert played.score == pytest.approx(total - values.mean().item(), abs=1e-5)
    return max(map(len, whole))


# ---- against real workers --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_training(build, monkeypatch, tmp_path):
    algorithm = build({}, env_runners=2, envs=8, batch=1024, buffer_size=64, nu=0.25)

    def by_kind() -> tuple[list[float], list[float]]:
        """(share of recent episodes solved, mean score in the buffer), each of plain levels and of icy ones."""
        last, known = [p for played in history[-6:] for p in played], algorithm.levels()
        solved = [np.mean([p.episode_return > 0 for p in last if p.level % 2 == icy]) for icy in (0, 1)]
        return solved, [known["score"][known["level"] % 2 == icy].mean() for icy in (0, 1)]

    def learned() -> bool:
        """Plain levels are solved, icy ones are not, and the curriculum scores those higher."""
        solved, score = by_kind()
        return solved[0] > 0.9 and solved[1] < solved[0] - 0.2 and score[1] > 1.5 * score[0]

    ledger, backward, replays, history, fragments = Ledger(), [], [], [], 1
    plain_backward = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda *a, **k: (backward.append(1), plain_backward(*a, **k))[1])
    while len(history) < 12 or (not learned() and len(history) < 40):
        known, before = set(algorithm.levels()["level"].tolist()), learner_state(algorithm)
        backward.clear()
        curriculum, assigned = ledger.train(algorithm)
        replay = curriculum["replay"] == 1
        replays += [replay] if len(known) >= 32 else []  # rho
        # R7: one decision for all environments
        assert {env for env, _ in assigned} == set(range(16))
        assert all((level in known) == replay for _, level in assigned)
        # R6: no backward pass and no update on new levels, both on replayed ones
        assert same(before, learner_state(algorithm)) == (not backward) == (not replay)
        fragments = fragments if replay else max(fragments, assert_scored_as_uncut(algorithm))
        # R4
        assert curriculum["advantage_mean"] == pytest.approx(np.mean([p.mean_advantage for p in algorithm.last_played]))
        assert all(p.mean_advantage <= p.max_advantage for p in algorithm.last_played)
        history.append(algorithm.last_played)
    assert fragments > 1
    # R9: every environment of every env runner asks the one actor
    name = rllib.sampler_name(algorithm.trial_id)
    actors = algorithm.env_runner_group.foreach_env_runner(
        lambda env_runner: [env.get_wrapper_attr("sampler")._actor_id for env in env_runner.env.unwrapped.envs],
        local_env_runner=False,
    )
    assert sum(actors, []) == [ray.get_actor(name)._actor_id] * 16 == [algorithm.sampler._actor_id] * 16
    # the replayed share matches the setting
    assert abs(np.mean(replays) - 0.75) < 5 * np.sqrt(0.75 * 0.25 / len(replays))
    assert learned(), by_kind()
    # evaluation leaves it alone, and the checkpoint holds it
    assert algorithm.evaluate()["env_runners"]["num_episodes"] >= 3
    assert ray.get(algorithm.sampler.take_assigned.remote()) == []
    path = algorithm.save_to_path(tmp_path / "checkpoint")
    saved, parameters = ray.get(algorithm.sampler.get_state.remote()), learner_state(algorithm)
    ledger_then = copy.copy(ledger)
    ledger.train(algorithm)
    algorithm.restore_from_path(path)
    np.testing.assert_equal(ray.get(algorithm.sampler.get_state.remote()), saved)
    assert same(parameters, learner_state(algorithm))
    ledger_then.train(algorithm)


def test_a_checkpoint_of_another_number_of_environments_is_refused(build):
    algorithm = build({}, env_runners=1, envs=2, batch=128, buffer_size=20)
    before = ray.get(algorithm.sampler.get_state.remote())
    state = algorithm.get_state()
    state["level_sampler"] = rllib.GlobalSampler(6, seed=1, buffer_size=20).get_state()
    with pytest.raises(ValueError, match="sampler has 6 environments, here are 2: .*num_env_runners x num_envs_per"):
        algorithm.set_state(state)
    np.testing.assert_equal(ray.get(algorithm.sampler.get_state.remote()), before)


@pytest.mark.slow
def test_killed_env_runners(build, tmp_path):
    """R10: of three env runners, one gets a SIGKILL in the middle of an episode, and one is killed by Ray."""
    kill_file = tmp_path / "kill"
    algorithm = build({"kill_file": str(kill_file)}, env_runners=3, envs=2, batch=384, buffer_size=20, rho=0.2)
    ledger, killed = Ledger(), []

    def kill(number: int, env_runners: list[int]) -> None:
        if number == 1:
            kill_file.touch()
        elif number == 2:
            killed.extend({1, 2, 3}.difference(env_runners))
            killed.append(env_runners[0])
            ray.kill(algorithm.env_runner_group._worker_manager._actors[env_runners[0]], no_restart=False)

    for _ in range(2):
        ledger.train(algorithm)
    before = algorithm.levels()
    dropped = ledger.dropped + ledger.open
    algorithm.before_round = kill
    ledger.train(algorithm)
    algorithm.before_round = Watched.before_round
    assert len(set(killed)) == len(killed) == 2
    assert sorted(algorithm.lost) == sorted(env for index in killed for env in (2 * index - 2, 2 * index - 1))
    assert ledger.dropped > dropped
    # only what was scored has changed, and the third env runner played on
    scored = {p.level for p in algorithm.last_played}
    after = algorithm.levels()
    kept = [(level, score) for level, score in zip(after["level"], after["score"]) if level not in scored]
    assert set(kept) <= set(zip(before["level"], before["score"]))
    assert {p.env for p in algorithm.last_played} - set(algorithm.lost)
    # both come back, under the same sampler, and the ledger balances all the way
    deadline = time.monotonic() + 120
    envs = set()
    while envs != set(range(6)):
        assert time.monotonic() < deadline, f"after 120 s, only environments {envs} play"
        envs = {env for env, _ in ledger.train(algorithm)[1]}
    assert algorithm.lost == []


# ---- its parts, without workers --------------------------------------------------------------------------------------


def fragments_of(lengths: list[int], rewards: list[float], values: list[float], info: dict) -> list[SingleAgentEpisode]:
    """An episode as an env runner cuts it; the sum of observation t is values[t]."""
    observations = [np.array([v - 1, 1.0], np.float32) for v in values]
    episode, fragments = SingleAgentEpisode(), []
    episode.add_env_reset(observations[0], info)
    steps = iter(range(len(rewards)))
    for i, length in enumerate(lengths):
        for t in [next(steps) for _ in range(length)]:
            episode.add_env_step(observations[t + 1], 0, rewards[t], {}, terminated=t == len(rewards) - 1)
        following = episode.cut(len_lookback_buffer=1) if i < len(lengths) - 1 else None
        fragments.append(episode.to_numpy())
        episode = following
    return fragments


def played(monkeypatch, fragments: list[SingleAgentEpisode], returns: list) -> list[rllib.Played]:
    """RobustPLR.played with a critic that adds up the observation; `returns` gets what the sampler is told."""
    monkeypatch.setattr(rllib.ray, "get", lambda x: x)
    critic = SimpleNamespace(is_stateful=lambda: False, compute_values=lambda batch: batch[Columns.OBS].sum(-1))
    learner = SimpleNamespace(device="cpu", module={DEFAULT_MODULE_ID: SimpleNamespace(unwrapped=lambda: critic)})
    best = lambda levels, got: returns.append((levels, got)) or np.array(got)  # noqa: E731
    algorithm = SimpleNamespace(
        config=SimpleNamespace(gamma=0.5, lambda_=0.5),
        sampler=SimpleNamespace(best_returns=SimpleNamespace(remote=best)),
        learner_group=SimpleNamespace(
            foreach_learner=lambda f, **_: SimpleNamespace(result_or_errors=[SimpleNamespace(get=lambda: f(learner))])
        ),
    )
    return rllib.RobustPLR.played(algorithm, fragments)


@pytest.mark.parametrize("lengths", [[6], [2, 4], [3, 2, 1], [1] * 6], ids=str)
def test_an_episode_scores_the_same_however_it_is_cut(monkeypatch, lengths):
    """R4, R5, R13, against advantages worked out by hand: gamma = lambda = 0.5, dense rewards."""
    rewards, values = [0.0, 0, 1, 0, 0, 2], [1.0, 0, 1, 2, 0, 1, 4]
    by_hand = [-0.8408203125, 0.63671875, 0.546875, -1.8125, 0.75, 1.0]
    episode = fragments_of(lengths, rewards, values, {"level": 7, "env": 3})
    other = fragments_of([1, 1], [1.0, 1.0], [0.0, 0, 0], {"level": 8, "env": 4})
    unfinished = fragments_of([1, 1], [1.0, 1.0], [0.0, 0, 0], {"level": 9, "env": 5})[:1]
    told = []
    got = played(monkeypatch, episode[:1] + other + unfinished + episode[1:], told)
    assert told == [([7, 8], [3.0, 2.0])]
    assert got[0] == pytest.approx((3, 7, 6, 3 - 5 / 6, np.mean(by_hand), 1.0, 3.0), abs=1e-9)
    assert [p.level for p in got] == [7, 8]
    truncated = rllib.gae(np.array(rewards), np.array(values), False, 0.5, 0.5)
    assert truncated[-1] == 3 and truncated[4] == 0.5 + 0.25 * 3


def test_an_environment_without_assigned_levels_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="no assigned level"):
        played(monkeypatch, fragments_of([1], [0.0], [0.0, 0.0], {}), [])


def test_the_ledger_is_right_whatever_happens():
    """R1, R2, R10 over 5,000 events: starts, ends, late deliveries, cut episodes, lost env runners, new iterations."""
    rng, sampler = np.random.default_rng(1), rllib.GlobalSampler(6, seed=1, buffer_size=9, rho=0.2, level_space=99)
    playing, ended, counts = {}, [], Counter()  # environment -> level; [(environment, level)] not scored yet

    def lose(envs):
        counts["dropped"] += sum(env in playing for env in envs) + sum(env in envs for env, _ in ended)
        for env in envs:
            playing.pop(env, None)
        ended[:] = [e for e in ended if e[0] not in envs]

    for event in rng.choice("start end deliver lose iteration".split(), 5_000, p=[0.45, 0.35, 0.14, 0.03, 0.03]):
        env = int(rng.integers(6))
        if event == "start":
            counts["started"] += 1
            counts["dropped"] += env in playing
            playing[env] = sampler.start_episode(env, cut=env in playing)
        elif event == "end" and env in playing:
            ended.append((env, playing.pop(env)))
        elif event == "deliver":
            delivered, ended[:] = [e for e in ended if e[0] % 2 == env % 2], [e for e in ended if e[0] % 2 != env % 2]
            counts["completed"] += len(delivered)
            if delivered:
                sampler.score(*map(list, zip(*delivered)), rng.random(len(delivered)).tolist())
        elif event == "lose":
            envs = [0, 1, 2] if env < 3 else [3, 4, 5]
            lose(envs)
            sampler.drop(envs)
        elif event == "iteration":
            lose(range(6))
            sampler.start_iteration()
        m = sampler.metrics()
        assert [m[k] for k in ("started", "completed", "dropped")] == [
            counts[k] for k in ("started", "completed", "dropped")
        ]
        assert m["in_progress"] == len(playing) + len(ended) == m["started"] - m["completed"] - m["dropped"]
    assert min(counts.values()) > 300


@pytest.mark.parametrize("nu", [0.2, 0.5])
def test_the_share_of_replay_is_the_setting(nu):
    """R7: all environments of an iteration share the decision, and 1 - nu of the iterations replay."""
    sampler = rllib.GlobalSampler(4, seed=3, buffer_size=8, rho=0.5, nu=nu, replay_schedule="fixed")
    decisions = []
    for _ in range(1000):
        known, replay = set(sampler.levels()["level"].tolist()), sampler.start_iteration()
        levels = [sampler.start_episode(env, False) for env in range(4)]
        assert [level in known for level in levels] == [replay] * 4
        sampler.score(list(range(4)), levels, [1.0] * 4)
        decisions += [replay] if len(known) >= 4 else []
    assert abs(np.mean(decisions) - (1 - nu)) < 5 * np.sqrt(nu * (1 - nu) / len(decisions))


def test_evaluation_environments_play_the_seed_they_are_given():
    env, plain = rllib.make_env(ROOM), HalfIcy(rllib.make_env(ROOM).env)
    obs, info = env.reset(seed=12)
    assert (obs == plain.reset(seed=12)[0]).all() and "level" not in info


def test_values_of_a_recurrent_module_are_those_of_the_whole_episode():
    """An LSTM sees the steps one after the other, from its initial state."""
    lstm = torch.nn.LSTM(2, 3, batch_first=True)

    class Module:
        is_stateful = staticmethod(lambda: True)
        get_initial_state = staticmethod(lambda: {"h": np.zeros(3, np.float32), "c": np.zeros(3, np.float32)})

        def compute_values(self, batch):
            state = tuple(batch[Columns.STATE_IN][key][None] for key in ("h", "c"))
            return lstm(batch[Columns.OBS], state)[0].sum(-1)

    learner = SimpleNamespace(device="cpu", module={DEFAULT_MODULE_ID: SimpleNamespace(unwrapped=Module)})
    obs = np.random.default_rng(1).random((5, 2), np.float32)
    state, expected = None, []
    with torch.no_grad():
        for t in range(5):
            out, state = lstm(torch.from_numpy(obs[t : t + 1]), state)
            expected.append(out.sum().item())
    assert rllib.values_of(learner, [obs])[0] == pytest.approx(expected, abs=1e-6)
