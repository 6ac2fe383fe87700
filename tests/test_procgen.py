"""ppo_plr_procgen.py: levels, numbers, whole runs, failures."""

import copy
import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn as nn
import tyro
from PIL import Image
from procgen import ProcgenGym3Env
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo_plr_procgen as script

ROOT = Path(__file__).parent.parent
TINY = "--env-id fruitbot --num-envs 4 --num-steps 32 --num-minibatches 2 --update-epochs 1 --total-timesteps 384 "
TINY += "--num-levels 5 --eval-episodes 2"


def run(flags: str, **env: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    command = [sys.executable, "ppo_plr_procgen.py", *flags.split()]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)


def train(flags: str, run_dir: Path, **env: str) -> dict:
    done = run(f"{flags} --run-dir {run_dir}", **env)
    assert done.returncode == 0, done.stderr
    return json.loads((run_dir / "result.json").read_text()) | {"stdout": done.stdout, "stderr": done.stderr}


def main(monkeypatch, flags: str) -> None:
    """The script in this process, so that a test can watch it."""
    torch.set_num_threads(1)
    monkeypatch.setattr(sys, "argv", ["ppo_plr_procgen.py", *flags.split()])
    script.main()


def rows(path: Path) -> list[dict[str, float]]:
    with open(path) as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    result = train(TINY, run_dir)
    (run_dir / "stdout").write_text(result["stdout"])
    (run_dir / "stderr").write_text(result["stderr"])
    return run_dir


def result_of(run_dir: Path) -> dict:
    return json.loads((run_dir / "result.json").read_text())


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


@pytest.mark.parametrize("game", script.RETURN_RANGE)
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

    def get_action_and_value(self, x, action=None):
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
    deltas, advantages = np.zeros((T, N)), np.zeros((T, N))
    for i in range(N):
        for step in range(T):
            if dones[step, i]:
                after = 0.0
            elif step + 1 < T:
                after = values[step + 1, i]
            else:
                after = VALUES[levels[step, i] % 3, t_of[step, i] + 1]
            deltas[step, i] = scaled[step, i] + gamma * after - values[step, i]
        for step in range(T):  # GAE as the sum it stands for: of discounted deltas up to the episode's end
            for k in range(step, T):
                advantages[step, i] += (gamma * lam) ** (k - step) * deltas[k, i]
                if dones[k, i]:
                    break
    return t_of, scaled, values, deltas, advantages


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

        def get_action_and_value(self, x, action=None):
            out = super().get_action_and_value(x, action)
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
    advantages, running = np.zeros((12, 2)), np.zeros(2)
    for t in reversed(range(12)):
        running = rewards[t] + 0.9 * v[t + 1] * ~dones[t] - v[t] + 0.9 * 0.8 * ~dones[t] * running
        advantages[t] = running
    returns = torch.tensor(advantages + v[:-1]).float().flatten()
    b_adv, b_values = torch.tensor(advantages).float().flatten(), values.flatten()
    b_obs, b_actions, b_logprobs = obs.flatten(0, 1), actions.flatten(), logprobs.flatten()

    monkeypatch.undo()
    agent = script.Agent(Corridor(1))
    agent.load_state_dict(start)
    parameters = list(agent.parameters())
    m, s = [torch.zeros_like(p) for p in parameters], [torch.zeros_like(p) for p in parameters]
    step, losses = 0, []
    for permutation in permutations[:2]:
        for index in (permutation[:12], permutation[12:]):
            hidden = agent.hidden(b_obs[index])
            log_p = torch.log_softmax(agent.actor(hidden), -1)
            value = agent.critic(hidden)[:, 0]
            ratio = (log_p.gather(1, b_actions[index, None])[:, 0] - b_logprobs[index]).exp()
            a = (b_adv[index] - b_adv[index].mean()) / (b_adv[index].std() + 1e-8)
            policy_loss = -torch.min(a * ratio, a * torch.clip(ratio, 0.98, 1.02)).mean()
            clipped = b_values[index] + torch.clip(value - b_values[index], -0.02, 0.02)
            errors = torch.stack(((value - returns[index]) ** 2, (clipped - returns[index]) ** 2))
            value_loss = 0.5 * errors.max(0).values.mean()
            entropy = -(log_p.exp() * log_p).sum(-1).mean()
            gradients = torch.autograd.grad(policy_loss - 0.05 * entropy + 0.7 * value_loss, parameters)
            norm = torch.sqrt(sum((g**2).sum() for g in gradients))
            step += 1
            with torch.no_grad():
                for i, g in enumerate(gradients):  # clipping and Adam, as in their papers
                    g = g * min(1.0, 0.3 / (norm + 1e-6))
                    m[i], s[i] = 0.9 * m[i] + 0.1 * g, 0.999 * s[i] + 0.001 * g**2
                    m_hat, s_hat = m[i] / (1 - 0.9**step), s[i] / (1 - 0.999**step)
                    parameters[i] -= 0.01 * m_hat / (s_hat.sqrt() + 1e-5)
            clipfrac = ((ratio - 1).abs() > 0.02).float().mean()
            losses.append([x.item() for x in (value_loss, policy_loss, entropy, clipfrac)])

    trained = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["agent"]
    for name, parameter in agent.named_parameters():
        assert not torch.equal(trained[name], start[name]), f"{name} was not trained"
        torch.testing.assert_close(trained[name], parameter.detach(), rtol=1e-3, atol=2e-5)
    logged = rows(tmp_path / "run/progress.csv")[0]
    columns = ("value_loss", "policy_loss", "entropy", "clipfrac")
    np.testing.assert_allclose([logged[c] for c in columns], np.mean(losses, 0), rtol=1e-3, atol=1e-5)


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
    assert result["test_return_normalized"] == pytest.approx((result["test_return"] - 1) / 39)


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


def test_the_same_seed_is_the_same_run_whatever_evaluation_video_tracking_threads_and_hash_seed(finished, tmp_path):
    more = "--eval-interval 1 --eval-episodes 3 --capture-video --checkpoint-interval 1 --env-threads 3 --track"
    (tmp_path / "wandb.py").write_text("def init(**options): print('tracked', options['name'])")
    again = train(f"{TINY} {more}", tmp_path / "again", PYTHONHASHSEED="4", PYTHONPATH=str(tmp_path))
    assert "tracked again" in again["stdout"]
    assert again["fingerprint"] == result_of(finished)["fingerprint"]
    same = [(a, b) for a, b in zip(rows(finished / "progress.csv"), rows(tmp_path / "again/progress.csv"))]
    for a, b in same:
        for column in a.keys() - {"wall_seconds", "SPS"}:
            assert a[column] == b[column] or np.isnan([a[column], b[column]]).all(), column
    with Image.open(sorted((tmp_path / "again/videos").glob("*.gif"))[0]) as video:
        assert video.n_frames > 5 and video.size == (3 * 128, 128)
        frames = [np.asarray(video.convert("RGB")) for _ in (video.seek(i) for i in range(video.n_frames))]
    assert not np.array_equal(frames[0], frames[-1])


def test_another_seed_curriculum_or_precision_is_another_run(finished, tmp_path):
    prints = {result_of(finished)["fingerprint"]}
    for i, change in enumerate(("--seed 2", "--curriculum uniform", "--precision bf16")):
        prints.add(train(f"{TINY} {change}", tmp_path / str(i))["fingerprint"])
    assert len(prints) == 4


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
    for key in ("train_return", "test_return", "test_return_std", "test_return_normalized"):
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
    assert torch.cuda.is_available() or "No CUDA device: training on 1 CPU threads" in out


def test_evaluate_repeats_the_final_evaluation_and_takes_other_flags(finished):
    done = run(f"--evaluate {finished}")
    assert done.returncode == 0, done.stderr
    (path,) = finished.glob("evaluation_*.json")
    final = result_of(finished)["evaluation"]
    assert json.loads(path.read_text())["episodes"] == final["episodes"]
    assert f"test_return: {final['test_return']:.2f} +- {final['test_return_std']:.2f} over 2 levels" in done.stdout
    path.unlink()
    done = run(f"--evaluate {finished} --eval-episodes 3 --start-level 50 --num-levels 3 --capture-video")
    assert done.returncode == 0, done.stderr
    (path,) = finished.glob("evaluation_*.json")
    assert sorted(json.loads(path.read_text())["episodes"]["train_levels"]) == [50, 51, 52]
    assert list((finished / "videos").glob("evaluation_*.gif"))


def test_the_readmes_commands_are_valid():
    commands = re.findall(r"python ppo_plr_procgen\.py((?: [^\n`|#]*)?)", (ROOT / "README.md").read_text())
    commands += re.findall(r"python ppo_plr_procgen\.py([^\n#]*)", script.__doc__)
    assert len(commands) > 8
    for flags in commands:
        if "--help" not in flags:
            script.check_args(tyro.cli(script.Args, args=flags.split()))


# ---- failures --------------------------------------------------------------------------------------------------------

BAD = {
    "--env-id bigfsh": "--env-id bigfsh is not a Procgen game: did you mean bigfish",
    "--env-id xyz": "--env-id xyz is not a Procgen game: choose from bigfish, bossfight",
    "--env-id bigfish --distribution-mode memory": "--distribution-mode memory does not exist for bigfish",
    "--num-envs 0": "--num-envs 0 must be at least 1",
    "--num-steps -3": "--num-steps -3 must be at least 1",
    "--num-minibatches 7": "--num-minibatches 7 must be a divisor of --num-envs x --num-steps = 16384",
    "--num-minibatches 16384": "--num-minibatches 16384 must be less than",
    "--update-epochs 0": "--update-epochs 0 must be at least 1",
    "--eval-episodes 0": "--eval-episodes 0 must be at least 1",
    "--total-timesteps 16383": "--total-timesteps 16383 must be at least --num-envs x --num-steps = 16384",
    "--learning-rate nan": "--learning-rate nan must be above 0",
    "--gamma 1.5": "--gamma 1.5 must be between 0 and 1",
    "--alpha 0": "--alpha 0.0 must be above 0 and at most 1",
    "--temperature 0": "--temperature 0.0 must be above 0",
    "--target-kl -1": "--target-kl -1.0 must be above 0",
    "--ent-coef -1": "--ent-coef -1.0 must be at least 0",
    "--checkpoint-interval -1": "--checkpoint-interval -1 must be at least 0",
    "--seed -1": "--seed -1 must be at least 0",
    "--seed 99999999999999999999": "must be at least 0 and below 2**63",
    "--vf-coef inf": "--vf-coef inf must be at least 0 and below 2**63",
    "--num-levels 0": "--curriculum plr must be uniform or sequential with --num-levels 0",
    "--num-levels 0 --curriculum uniform --start-level 5": "--start-level 5 must be 0 with --num-levels 0",
    "--start-level 1073741824": "--start-level 1073741824 must be at most 1073741624",
    "--score gae --score-transform power": "--score-transform power must be another: --score gae can be negative",
    "--score max_mc --score-transform power": "--score-transform power must be another: --score max_mc can be negative",
    "--run-dir /dev/null/run": "--run-dir /dev/null/run cannot be written: Not a directory",
    "--evaluate /nonexistent": "--evaluate /nonexistent is not a run that can be loaded",
    "--track": "--track needs Weights and Biases",
    "--score nonsense": "--score",
    "--num-envs many": "--num-envs",
    "--no-such-flag": "--no-such-flag",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_is_refused_before_anything_is_built(flags, monkeypatch, tmp_path, capsys):
    built = []
    monkeypatch.setattr(script, "make_envs", lambda *args: built.append(args))
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, flags)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and BAD[flags] in message
    assert message.startswith("error: ") <= (message.count("\n") == 1)  # ours are one line; tyro draws a box
    assert not built and not list(tmp_path.iterdir())


def test_bad_input_shows_no_traceback():
    done = run("--env-id bigfsh")
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stdout == ""
    assert done.stderr == "error: --env-id bigfsh is not a Procgen game: did you mean bigfish or bossfight?\n"


@pytest.mark.parametrize("kind", ["a finished", "an unfinished"])
def test_a_directory_that_holds_a_run_is_refused_and_left_as_it_was(kind, finished, tmp_path, monkeypatch, capsys):
    if kind == "an unfinished":
        (tmp_path / "progress.csv").write_bytes((finished / "progress.csv").read_bytes())
        finished = tmp_path
    before = {path.name: path.read_bytes() for path in finished.iterdir() if path.is_file()}
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, f"{TINY} --run-dir {finished}")
    assert stop.value.code == 2 and f"already holds {kind} run" in capsys.readouterr().err
    assert before == {path.name: path.read_bytes() for path in finished.iterdir() if path.is_file()}


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "pickle"])
def test_evaluating_a_damaged_checkpoint_says_so(damage, finished, tmp_path, monkeypatch, capsys):
    data = (finished / "checkpoint.pt").read_bytes()
    harmful = b"cos\nsystem\n(S'touch " + str(tmp_path / "hacked").encode() + b"'\ntR."
    (tmp_path / "args.json").write_bytes((finished / "args.json").read_bytes())
    damaged = {"truncated": data[: len(data) // 2], "empty": b"", "garbage": b"not a checkpoint", "pickle": harmful}[
        damage
    ]
    (tmp_path / "checkpoint.pt").write_bytes(damaged)
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, f"--evaluate {tmp_path}")
    assert stop.value.code == 2 and "is not a run that can be loaded" in capsys.readouterr().err
    assert not (tmp_path / "hacked").exists()


def test_missing_system_libraries_are_named(monkeypatch, tmp_path, capsys):
    def no_library(*args):
        raise OSError("libGL.so.1: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(script.ProcgenLevels, "__init__", no_library)
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, f"{TINY} --run-dir {tmp_path}/run")
    message = capsys.readouterr().err
    assert stop.value.code == 2 and "libGL.so.1" in message and "apt-get install libgl1 libglib2.0-0" in message
