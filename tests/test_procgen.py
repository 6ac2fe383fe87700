"""ppo_plr_procgen.py: levels, numbers, whole runs, failures."""

import copy
import functools
import json
import re
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import support
import torch
import torch.nn as nn
from procgen import ProcgenGym3Env
from support import PlainPPO, gae_as_a_sum, gae_backwards, result_of, rows
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo_plr_procgen as script

TINY = support.TINY[script.__name__]
run, train, main = (functools.partial(function, script) for function in (support.run, support.train, support.main))


@pytest.fixture
def finished(finished_run) -> Path:
    return finished_run(script)


# ---- levels ----------------------------------------------------------------------------------------------------------


def fresh_episode(game: str, mode: str, level: int, actions: np.ndarray) -> list[tuple[np.ndarray, float, bool]]:
    """(observation, reward, done) per step of an environment that has never played anything but this level."""
    env = ProcgenGym3Env(
        num=1, env_name=game, distribution_mode=mode, num_levels=1, start_level=level, rand_seed=7, num_threads=0
    )
    steps = [(env.observe()[1]["rgb"][0], 0.0, False)]
    for action in actions:
        env.act(np.array([action]))
        reward, obs, first = env.observe()
        steps.append((obs["rgb"][0], float(reward[0]), bool(first[0])))
        if first[0]:
            break
    return steps


def assert_levels_are_exact(game: str, mode: str, num_steps: int = 120) -> None:
    rng = np.random.default_rng(0)
    envs = script.ProcgenLevels(4, game, mode, 2)
    envs.reset(seed=rng.integers(1000, size=4))
    for levels in ([3, 77, 2**30 + 5, 2**31 - 2], [77, 3, 3, 12345]):
        for _ in range(60):  # any history, with resets at any moment
            *_, terminations, _, _ = envs.step(rng.integers(15, size=4))
            mask = terminations | (rng.random(4) < 0.02)
            if mask.any():
                envs.reset(seed=rng.integers(1000, size=4), options={"reset_mask": mask})
        first_half = np.array([True, True, False, False])
        envs.reset(seed=levels, options={"reset_mask": first_half})
        obs, _ = envs.reset(seed=levels, options={"reset_mask": ~first_half})
        actions = rng.integers(15, size=(num_steps, 4))
        expected = [fresh_episode(game, mode, level, actions[:, i]) for i, level in enumerate(levels)]
        for i in range(4):
            assert np.array_equal(obs[i], expected[i][0][0]), f"{game}: level {levels[i]} starts differently"
        for t in range(num_steps):
            level_seeds = [info["level_seed"] for info in envs.procgen.get_info()]
            obs, rewards, terminations, _, _ = envs.step(actions[t])
            for i in range(4):
                if t + 1 < len(expected[i]):
                    assert level_seeds[i] == levels[i]
                    assert (rewards[i], terminations[i]) == expected[i][t + 1][1:], f"{game}, step {t}"
                    if not terminations[i]:
                        assert np.array_equal(obs[i], expected[i][t + 1][0]), f"{game}: level {levels[i]}, step {t}"
    envs.close()


@pytest.mark.parametrize("game", script.GAMES)
def test_a_reset_starts_exactly_the_level_whatever_was_played_before(game):
    assert_levels_are_exact(game, "easy")


@pytest.mark.parametrize("game, mode", [("bigfish", "hard"), ("leaper", "extreme"), ("heist", "memory")])
def test_levels_are_exact_in_the_other_modes(game, mode):
    assert_levels_are_exact(game, mode)


def test_procgens_own_reset_leaks_state_in_dodgeball():
    """The reason for set_state; also shows that such a comparison can fail."""
    differing, rng = 0, np.random.default_rng(0)
    for level in range(4):
        options = {"env_name": "dodgeball", "distribution_mode": "easy", "num_levels": 1, "start_level": level}
        env = ProcgenGym3Env(num=1, rand_seed=7, num_threads=0, **options)
        first = np.zeros(1, bool)
        while not first[0]:
            env.act(rng.integers(15, size=1))
            _, obs, first = env.observe()
        actions = rng.integers(15, size=200)
        for t, (expected, _, done) in enumerate(fresh_episode("dodgeball", "easy", level, actions)):
            if done:
                break
            if not np.array_equal(env.observe()[1]["rgb"][0], expected):
                differing += 1
                break
            env.act(actions[t : t + 1])
    assert differing > 0


def test_the_gymnasium_interface_of_procgen_levels():
    envs = script.ProcgenLevels(3, "bigfish", "easy", 1)
    assert envs.metadata["autoreset_mode"] == gym.vector.AutoresetMode.DISABLED
    by_list, _ = envs.reset(seed=[10, 11, 12])
    by_int, _ = envs.reset(seed=10)
    assert by_int in envs.observation_space and np.array_equal(by_list, by_int)
    before = envs.step(np.zeros(3, np.int64))[0]
    after, _ = envs.reset(seed=[5, 5, 5], options={"reset_mask": np.array([True, False, True])})
    assert np.array_equal(after[1], before[1]) and np.array_equal(after[0], after[2])
    assert not np.array_equal(after[0], before[0])
    envs.close()


@pytest.mark.parametrize("curriculum", ["plr", "uniform", "sequential"])
def test_observed_levels_are_the_samplers_assignments(curriculum, monkeypatch, tmp_path):
    observed, assigned, samplers = {}, [], []

    class Watched(script.ProcgenLevels):
        def step(self, actions):
            observed.setdefault(self, []).append([info["level_seed"] for info in self.procgen.get_info()])
            return super().step(actions)

    class Spy(script.LevelSampler):
        def update(self, levels, step_scores, dones, **kwargs):
            samplers.append(self)
            assigned.extend(levels.tolist())
            return super().update(levels, step_scores, dones, **kwargs)

    monkeypatch.setattr(script, "ProcgenLevels", Watched)
    monkeypatch.setattr(script, "LevelSampler", Spy)
    main(
        monkeypatch, f"{TINY} --num-steps 96 --total-timesteps 1152 --curriculum {curriculum} --run-dir {tmp_path}/run"
    )
    assert next(iter(observed.values())) == assigned
    assert samplers[0].counts["completed"] >= 5 and len({level for row in assigned for level in row}) > 1


def test_evaluation_levels_are_fixed_distinct_and_never_trained_on():
    args = script.Args(seed=3, num_levels=200, start_level=50)
    levels = script.evaluation_levels(args)
    test_levels, train_levels = levels[:100], levels[100:]
    assert np.array_equal(levels, script.evaluation_levels(script.Args(seed=3, num_levels=200, start_level=50)))
    assert not np.array_equal(levels, script.evaluation_levels(script.Args(seed=4, num_levels=200, start_level=50)))
    assert len(set(levels)) == 200 and test_levels.min() >= script.FIRST_TEST_LEVEL and test_levels.max() < 2**31
    assert train_levels.min() >= 50 and train_levels.max() < 250
    few = script.evaluation_levels(script.Args(num_levels=3))[100:]
    assert sorted(set(few)) == [0, 1, 2] and np.bincount(few).min() >= 33
    unbounded = script.evaluation_levels(script.Args(num_levels=0, curriculum="uniform"))
    assert unbounded[100:].max() < script.FIRST_TEST_LEVEL <= unbounded[:100].min()


# ---- numbers, on an environment small enough to do by hand -----------------------------------------------------------

LENGTHS = (3, 1, 5)  # level l % 3 ends after this many steps
REWARDS = np.array([[1.0, 0.0, 2.0, 0, 0], [-1.5, 0, 0, 0, 0], [0.0, 0.5, 0.0, -0.25, 3.0]])
VALUES = np.array([[0.3, -0.2, 0.9, 0, 0], [0.1, 0, 0, 0, 0], [0.7, 0.6, 0.0, 1.2, -0.4]])
LOGITS = np.random.default_rng(0).normal(size=(3, 5, 4))


class Corridor(gym.vector.VectorEnv):
    """Rewards and lengths by level; actions do nothing. The first pixel says where one is: 16 * (level % 3) + step."""

    def __init__(self, num_envs: int):
        self.num_envs, self.started = num_envs, []
        self.single_observation_space = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)
        self.single_action_space = gym.spaces.Discrete(4)
        self.level, self.t = np.zeros(num_envs, int), np.zeros(num_envs, int)

    def look(self) -> np.ndarray:
        obs = np.zeros((self.num_envs, 64, 64, 3), np.uint8)
        obs[:, 0, 0, 0] = 16 * self.level + self.t
        return obs

    def reset(self, *, seed=None, options=None):
        mask = (options or {}).get("reset_mask", np.ones(self.num_envs, bool))
        assert all(type(level) is int for level in seed)  # a registered Gymnasium environment takes nothing else
        self.started += np.asarray(seed)[mask].tolist()
        self.level[mask], self.t[mask] = np.asarray(seed)[mask] % 3, 0
        return self.look(), {}

    def step(self, actions):
        rewards = REWARDS[self.level, self.t]
        self.t += 1
        done = self.t >= np.array(LENGTHS)[self.level]
        self.t = np.minimum(self.t, 4)  # a finished one may be stepped on: nothing it shows counts
        return self.look(), rewards, done, np.zeros_like(done), {}


class Table(nn.Module):
    """An agent whose values and logits are known."""

    def __init__(self, envs, precision="fp32"):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def network(self, x):
        code = x[:, 0, 0, 0].long()
        values, logits = torch.tensor(VALUES).float(), torch.tensor(LOGITS).float()
        return values[code // 16, code % 16] + self.weight, logits[code // 16, code % 16] + self.weight

    def get_value(self, x):
        return self.network(x)[0]

    def get_action_and_value(self, x, action=None, clocks=None):
        values, logits = self.network(x)
        probs = torch.distributions.Categorical(logits=logits)
        action = probs.sample() if action is None else action
        return action, probs.log_prob(action), probs.entropy(), values, probs.logits


def by_hand(levels, dones, gamma, lam, norm_gamma):
    """Per step of one rollout from its start, in plain loops: position in episode, scaled reward, value, delta, GAE."""
    T, N = levels.shape
    t_of, scaled = np.zeros((T, N), int), np.zeros((T, N))
    t, discounted, samples = np.zeros(N, int), np.zeros(N), []
    for step in range(T):
        t_of[step] = t
        reward = REWARDS[levels[step] % 3, t]
        discounted = discounted * norm_gamma + reward
        samples += discounted.tolist()
        count = len(samples) + 1e-4  # the running variance starts as 1e-4 observations of mean 0 and variance 1
        mean = sum(samples) / count
        variance = (sum(x * x for x in samples) + 1e-4) / count - mean**2
        scaled[step] = np.clip(reward / np.sqrt(variance + 1e-8), -10, 10)
        t, discounted = np.where(dones[step], 0, t + 1), np.where(dones[step], 0.0, discounted)
    values = VALUES[levels % 3, t_of]
    deltas = np.zeros((T, N))
    for i in range(N):
        for step in range(T):
            if dones[step, i]:
                after = 0.0
            elif step + 1 < T:
                after = values[step + 1, i]
            else:
                after = VALUES[levels[step, i] % 3, t_of[step, i] + 1]
            deltas[step, i] = scaled[step, i] + gamma * after - values[step, i]
    return t_of, scaled, values, deltas, gae_as_a_sum(deltas, dones, gamma * lam)


@pytest.mark.parametrize("score", script.Args.__annotations__["score"].__args__)
def test_each_score_by_hand(score, monkeypatch, tmp_path):
    seen = []

    class Spy(script.LevelSampler):
        def update(self, levels, step_scores, dones, **kwargs):
            seen.append((levels.copy(), np.array(step_scores), np.array(dones).astype(bool)))
            return super().update(levels, step_scores, dones, **kwargs)

    monkeypatch.setattr(script, "LevelSampler", Spy)
    monkeypatch.setattr(script, "Agent", Table)
    monkeypatch.setattr(script, "make_envs", lambda args, num_envs: Corridor(num_envs))
    flags = "--num-envs 3 --num-steps 14 --total-timesteps 42 --num-minibatches 2 --gamma 0.9 --gae-lambda 0.8"
    flags += f" --num-levels 6 --eval-episodes 3 --reward-norm-gamma 0.95 --score {score} --run-dir {tmp_path}/run"
    main(monkeypatch, flags)
    levels, step_scores, dones = seen[0]
    assert 5 < dones.sum() < dones.size and not dones[-1].all()  # several episodes, and tails
    t_of, scaled, values, deltas, advantages = by_hand(levels, dones, 0.9, 0.8, 0.95)
    logits = LOGITS[levels % 3, t_of]
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    best = {}  # level -> best whole-episode return, in scaled rewards
    for i in range(3):
        total = 0.0
        for step in range(14):
            total += scaled[step, i]
            if dones[step, i]:
                best[levels[step, i]], total = max(best.get(levels[step, i], -np.inf), total), 0.0
    expected = {
        "value_l1": np.abs(advantages),
        "gae": advantages,
        "positive_value_loss": np.maximum(advantages, 0),
        "one_step_td_error": np.abs(deltas),
        "policy_entropy": -(p * np.log(p)).sum(-1) / np.log(4),
        "least_confidence": 1 - p.max(-1),
        "min_margin": 1 - (np.sort(p)[..., -1] - np.sort(p)[..., -2]),
        "max_mc": np.vectorize(lambda level: best.get(level, 0.0))(levels) - values,
    }[score]
    np.testing.assert_allclose(step_scores, expected, rtol=1e-5, atol=1e-5)


def test_one_ppo_update_equals_a_plain_implementation(monkeypatch, tmp_path):
    calls, permutations, start, spied = [], [], {}, []
    randperm = torch.randperm

    class Watched(script.Agent):
        def __init__(self, *args):
            super().__init__(*args)
            start.update(copy.deepcopy(self.state_dict()))

        def get_action_and_value(self, x, action=None, clocks=None):
            out = super().get_action_and_value(x, action, clocks)
            if action is None:
                calls.append((x.clone(), *(y.clone() for y in out)))
            return out

        def get_value(self, x):
            spied.append(super().get_value(x))
            return spied[-1]

    class Spy(script.LevelSampler):
        def update(self, levels, step_scores, dones, **kwargs):
            spied.append((levels.copy(), np.array(dones).astype(bool)))
            return super().update(levels, step_scores, dones, **kwargs)

    def recorded(*args, **kwargs):
        permutations.append(randperm(*args, **kwargs))
        return permutations[-1]

    monkeypatch.setattr(script, "Agent", Watched)
    monkeypatch.setattr(script, "LevelSampler", Spy)
    monkeypatch.setattr(script, "make_envs", lambda args, num_envs: Corridor(num_envs))
    monkeypatch.setattr(torch, "randperm", recorded)
    flags = "--num-envs 2 --num-steps 12 --total-timesteps 24 --num-minibatches 2 --update-epochs 2 --gamma 0.9"
    flags += " --gae-lambda 0.8 --clip-coef 0.02 --ent-coef 0.05 --vf-coef 0.7 --max-grad-norm 0.3 --eval-episodes 1"
    main(monkeypatch, f"{flags} --learning-rate 0.01 --run-dir {tmp_path}/run")

    # the rollout: rewards by hand, values as recorded, GAE by the textbook's backward recursion in numpy
    obs, actions, logprobs, _, values, _ = (torch.stack(x) for x in zip(*calls[:12]))
    next_value, (levels, dones) = spied[0].detach().numpy(), spied[1]
    _, rewards, *_ = by_hand(levels, dones, 0.9, 0.8, 0.99)
    v = np.vstack((values.detach().numpy(), next_value))
    advantages = gae_backwards(rewards, v, dones, 0.9, 0.8)
    returns = torch.tensor(advantages + v[:-1]).float().flatten()
    b_adv, b_values = torch.tensor(advantages).float().flatten(), values.flatten()
    b_obs, b_actions, b_logprobs = obs.flatten(0, 1), actions.flatten(), logprobs.flatten()

    monkeypatch.undo()
    agent = script.Agent(Corridor(1))
    agent.load_state_dict(start)
    plain = PlainPPO(agent.parameters(), 0.01, clip=0.02, ent_coef=0.05, vf_coef=0.7, max_norm=0.3)
    for permutation in permutations[:2]:
        for index in (permutation[:12], permutation[12:]):
            hidden = agent.hidden(b_obs[index])
            log_p, value = torch.log_softmax(agent.actor(hidden), -1), agent.critic(hidden)[:, 0]
            old = b_actions[index], b_logprobs[index], b_values[index]
            plain.step(log_p, value, *old, b_adv[index], returns[index])

    trained = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["agent"]
    for name, parameter in agent.named_parameters():
        assert not torch.equal(trained[name], start[name]), f"{name} was not trained"
        torch.testing.assert_close(trained[name], parameter.detach(), rtol=1e-3, atol=2e-5)
    logged = rows(tmp_path / "run/progress.csv")[0]
    columns = ("value_loss", "policy_loss", "entropy", "clipfrac")
    np.testing.assert_allclose([logged[c] for c in columns], np.mean(plain.losses, 0), rtol=1e-3, atol=1e-5)


def test_evaluation_plays_each_level_once_to_its_end_and_leaves_the_training_stream_alone(monkeypatch):
    made = []

    def make(args, num_envs):
        made.append(Corridor(num_envs))
        return made[-1]

    monkeypatch.setattr(script, "make_envs", make)
    args = script.Args(env_id="bigfish", eval_episodes=150, num_levels=40)
    before = torch.get_rng_state()
    result = script.evaluate(Table(None), args, torch.device("cpu"))
    assert torch.equal(before, torch.get_rng_state())
    episodes = result["episodes"]
    assert [len(envs.started) for envs in made] == [150, 150]  # in two chunks
    assert sum((envs.started for envs in made), []) == episodes["test_levels"] + episodes["train_levels"]
    for part in ("test", "train"):
        expected = [REWARDS[level % 3][: LENGTHS[level % 3]].sum() for level in episodes[f"{part}_levels"]]
        assert episodes[f"{part}_returns"] == expected
        assert result[f"{part}_return"] == pytest.approx(np.mean(expected))
        assert result[f"{part}_return_std"] == pytest.approx(np.std(expected))
    assert result["generalization_gap"] == pytest.approx(result["train_return"] - result["test_return"])


class Bandit(Corridor):
    """Four steps; action 2 gives 1. Return 1 by chance, 4 at best. This is all that a fork has to write."""

    def step(self, actions):
        self.t += 1
        done = self.t == 4
        return self.look(), (np.asarray(actions) == 2).astype(np.float32), done, np.zeros_like(done), {}


def test_it_learns_on_another_environment(monkeypatch, tmp_path):
    monkeypatch.setattr(script, "make_envs", lambda args, num_envs: Bandit(num_envs))
    flags = "--num-envs 8 --num-steps 32 --total-timesteps 2560 --num-minibatches 2 --num-levels 6 --eval-episodes 4"
    main(monkeypatch, f"{flags} --learning-rate 0.001 --run-dir {tmp_path}/run")
    returns = [row["episodic_return"] for row in rows(tmp_path / "run/progress.csv")]
    assert returns[0] < 2 and returns[-1] > 3


# ---- whole runs ------------------------------------------------------------------------------------------------------


def test_another_seed_curriculum_or_precision_is_another_run(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "evaluate", lambda *args: {"train_return": 0.0, "test_return": 0.0, "episodes": {}})
    prints = {result_of(finished)["fingerprint"]}
    changes = ("", "--seed 2", "--curriculum uniform", "--precision bf16")
    for i, change in enumerate(changes):
        main(monkeypatch, f"{TINY} {change} --run-dir {tmp_path}/{i}")
        prints.add(result_of(tmp_path / str(i))["fingerprint"])
    assert len(prints) == len(changes)  # the first is the same run once more


def test_a_run_directory_holds_what_it_should(finished):
    args, result = json.loads((finished / "args.json").read_text()), result_of(finished)
    assert args["env_id"] == "fruitbot" and args["num_levels"] == 5 and args["batch_size"] == 128
    progress, evaluations = rows(finished / "progress.csv"), rows(finished / "evaluations.csv")
    assert [row["global_step"] for row in progress] == [128, 256, 384]
    for row in progress:
        assert row["started"] == row["completed"] + row["in_progress"] + row["dropped"]
        assert 0 <= row["seen_share"] <= 1 and row["entropy"] > 0
    for before, row in zip(progress, progress[1:]):  # of this iteration alone: not counted from the start
        assert 128 / row["SPS"] <= row["wall_seconds"] - before["wall_seconds"] + 0.01
    assert len(evaluations) == 1 and evaluations[0]["global_step"] == 384
    for key in ("train_return", "test_return", "test_return_std"):
        assert evaluations[0][key] == pytest.approx(result["evaluation"][key], rel=1e-4, abs=1e-5)
    assert len(result["evaluation"]["episodes"]["test_returns"]) == 2
    assert re.fullmatch("[0-9a-f]{64}", result["fingerprint"]) and result["steps_per_second"] > 0
    events = EventAccumulator(str(finished)).Reload()
    tags = set(events.Tags()["scalars"])
    assert {"charts/SPS", "charts/learning_rate", "losses/value_loss", "losses/approx_kl", "eval/test_return"} <= tags
    assert {"curriculum/seen_share", "curriculum/effective_levels", "curriculum/replay_share"} <= tags
    assert [event.step for event in events.Scalars("charts/SPS")] == [128, 256, 384]
    checkpoint = torch.load(finished / "checkpoint.pt", weights_only=True)
    assert checkpoint["global_step"] == 384 and set(checkpoint["sampler"]["arrays"]) >= {"scores", "seen"}
    assert not list(finished.glob("*.tmp"))


def test_what_a_person_sees(finished):
    out, err = (finished / "stdout").read_text(), (finished / "stderr").read_text()
    assert "fruitbot (easy), 5 levels, plr, seed 1" in out
    line = (
        r"step 384 \(100\.0%\) \| 0h00m left \| [\d,]+ steps/s \| train return \S+ \| evaluation: train \S+, test \S+"
    )
    assert re.search(line, out) and "Gym has been unmaintained" not in out + err
    assert torch.cuda.is_available() or "training on 1 CPU threads" in out


def test_evaluate_repeats_the_final_evaluation_and_takes_other_flags(finished):
    done = run(f"--evaluate {finished}")
    assert done.returncode == 0, done.stderr
    (path,) = finished.glob("evaluation_*.json")
    final = result_of(finished)["evaluation"]
    written = json.loads(path.read_text())
    assert written["episodes"] == final["episodes"] and written["global_step"] == result_of(finished)["global_step"]
    assert f"test_return: {final['test_return']:.2f} +- {final['test_return_std']:.2f} over 2 episodes" in done.stdout
    path.unlink()
    done = run(f"--evaluate {finished} --eval-episodes 3 --start-level 50 --num-levels 3 --capture-video")
    assert done.returncode == 0, done.stderr
    (path,) = finished.glob("evaluation_*.json")
    assert sorted(json.loads(path.read_text())["episodes"]["train_levels"]) == [50, 51, 52]
    assert list((finished / "videos").glob("evaluation_*.gif"))


# ---- failures --------------------------------------------------------------------------------------------------------


def test_bad_input_shows_no_traceback():
    done = run("--env-id bigfish --distribution-mode memory")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: --distribution-mode memory does not exist for bigfish: choose from easy, hard.\n"


def test_missing_system_libraries_are_named(monkeypatch, tmp_path, capsys):
    def no_library(*args):
        raise OSError("libGL.so.1: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(script.ProcgenLevels, "__init__", no_library)
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, f"{TINY} --run-dir {tmp_path}/run")
    message = capsys.readouterr().err
    assert stop.value.code == 2 and "libGL.so.1" in message and "apt-get install libgl1 libglib2.0-0" in message
