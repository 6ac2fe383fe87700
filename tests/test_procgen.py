"""ppo_plr_procgen.py: levels, numbers, failures."""

import copy
import functools

import gymnasium as gym
import numpy as np
import pytest
import support
import torch
from support import (
    LENGTHS,
    REWARDS,
    Corridor,
    PlainPPO,
    TableAgent,
    assert_trained_like,
    best_returns,
    gae_backwards,
    result_of,
    returns_by_hand,
    rows,
    scores_by_hand,
    steps_since_start,
    td_errors,
    watch_sampler,
)

import ppo_plr_procgen as script

TINY = support.TINY[script.__name__]
main = functools.partial(support.main, script)
NOTHING = {"train_return": 0.0, "test_return": 0.0, "episodes": {}}


# ---- levels --------------------------------------------------------------------------------------

Procgen = script.load_procgen()


def level_seeds(games: Procgen) -> list[int]:
    """The level that each game says it plays."""
    if hasattr(games, "get_info"):
        return [info["level_seed"] for info in games.get_info()]
    return games._clib.get_info_bufs()["level_seed"].tolist()  # on Python 3.13


def fresh_episode(
    game: str, mode: str, level: int, actions: np.ndarray
) -> list[tuple[np.ndarray, float, bool]]:
    """(observation, reward, done) per step of an environment that has never played anything but
    this level."""
    env = Procgen(
        num=1,
        env_name=game,
        distribution_mode=mode,
        num_levels=1,
        start_level=level,
        rand_seed=7,
        num_threads=0,
    )
    steps = [(env.observe()[1]["rgb"][0].copy(), 0.0, False)]
    for action in actions:
        env.act(np.array([action]))
        reward, obs, first = env.observe()
        steps.append((obs["rgb"][0].copy(), float(reward[0]), bool(first[0])))
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
        expected = [
            fresh_episode(game, mode, level, actions[:, i]) for i, level in enumerate(levels)
        ]
        for i in range(4):
            assert np.array_equal(obs[i], expected[i][0][0]), (
                f"{game}: level {levels[i]} starts differently"
            )
        for t in range(num_steps):
            playing = level_seeds(envs.procgen)
            obs, rewards, terminations, _, _ = envs.step(actions[t])
            for i in range(4):
                if t + 1 < len(expected[i]):
                    assert playing[i] == levels[i]
                    assert (rewards[i], terminations[i]) == expected[i][t + 1][1:], (
                        f"{game}, step {t}"
                    )
                    if not terminations[i]:
                        assert np.array_equal(obs[i], expected[i][t + 1][0]), (
                            f"{game}: level {levels[i]}, step {t}"
                        )
    envs.close()


@pytest.mark.parametrize("game", script.GAMES)
def test_a_reset_starts_exactly_the_level_whatever_was_played_before(game):
    assert_levels_are_exact(game, "easy")


@pytest.mark.parametrize(
    "game, mode", [("bigfish", "hard"), ("leaper", "extreme"), ("heist", "memory")]
)
def test_levels_are_exact_in_the_other_modes(game, mode):
    assert_levels_are_exact(game, mode)


def test_procgens_own_reset_leaks_state_in_dodgeball():
    """The reason for set_state; also shows that such a comparison can fail."""
    differing, rng = 0, np.random.default_rng(0)
    for level in range(4):
        options = {
            "env_name": "dodgeball",
            "distribution_mode": "easy",
            "num_levels": 1,
            "start_level": level,
        }
        env = Procgen(num=1, rand_seed=7, num_threads=0, **options)
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
    by_list = envs.reset(seed=[10, 11, 12])[0].copy()  # the next reset or step overwrites it
    by_int, _ = envs.reset(seed=10)
    assert by_int in envs.observation_space and np.array_equal(by_list, by_int)
    before = envs.step(np.zeros(3, np.int64))[0].copy()
    assert not np.array_equal(before, by_list)
    after, _ = envs.reset(seed=[5, 5, 5], options={"reset_mask": np.array([True, False, True])})
    assert np.array_equal(after[1], before[1]) and np.array_equal(after[0], after[2])
    assert not np.array_equal(after[0], before[0])
    envs.close()


@pytest.mark.parametrize(
    "curriculum",
    ["plr", *(pytest.param(x, marks=pytest.mark.slow) for x in ("uniform", "sequential"))],
)
def test_observed_levels_are_the_samplers_assignments(curriculum, monkeypatch, tmp_path):
    observed = []

    class Watched(script.ProcgenLevels):
        def step(self, actions):
            observed.append(level_seeds(self.procgen))
            return super().step(actions)

    monkeypatch.setattr(script, "ProcgenLevels", Watched)
    monkeypatch.setattr(script, "evaluate", lambda *args: NOTHING)
    rollouts = watch_sampler(script, monkeypatch)
    more = f"--env-id bossfight --num-steps 48 --total-timesteps 384 --curriculum {curriculum}"
    flags = support.tiny(script, more)
    main(monkeypatch, f"{flags} --run-dir {tmp_path}/run")
    assigned = np.concatenate([rollout.levels for rollout in rollouts])
    assert observed == assigned.tolist()
    assert rollouts[-1].sampler.counts["completed"] >= 5 and len(np.unique(assigned)) > 1


def test_evaluation_levels_are_fixed_distinct_and_never_trained_on():
    args = script.Args(seed=3, num_levels=200, start_level=50)
    levels = script.evaluation_levels(args)
    test_levels, train_levels = levels[:100], levels[100:]
    assert np.array_equal(
        levels, script.evaluation_levels(script.Args(seed=3, num_levels=200, start_level=50))
    )
    assert not np.array_equal(
        levels, script.evaluation_levels(script.Args(seed=4, num_levels=200, start_level=50))
    )
    assert (
        len(set(levels)) == 200
        and test_levels.min() >= script.FIRST_TEST_LEVEL
        and test_levels.max() < 2**31
    )
    assert train_levels.min() >= 50 and train_levels.max() < 250
    few = script.evaluation_levels(script.Args(num_levels=3))[100:]
    assert sorted(set(few)) == [0, 1, 2] and np.bincount(few).min() >= 33
    unbounded = script.evaluation_levels(script.Args(num_levels=0, curriculum="uniform"))
    assert unbounded[100:].max() < script.FIRST_TEST_LEVEL <= unbounded[:100].min()


# ---- numbers, on an environment small enough to do by hand ---------------------------------------


class ImageCorridor(Corridor):
    image_shape = 64, 64, 3


class Table(TableAgent):
    def acting_copy(self):
        return copy.deepcopy(self).requires_grad_(False)

    def get_value(self, x):
        return self.look_up(x)[1]

    def get_action_and_value(self, x, action=None, **noise):
        log_p, values = self.look_up(x)
        probs = torch.distributions.Categorical(logits=log_p)
        action = probs.sample() if action is None else action
        return action, probs.log_prob(action), probs.entropy(), values, probs.logits


def scaled_rewards(levels: np.ndarray, dones: np.ndarray, gamma: float) -> np.ndarray:
    """[T, N] of a run's first rollout, in plain loops."""
    scaled, t_of, discounted, samples = (
        np.zeros(levels.shape),
        steps_since_start(dones),
        np.zeros(levels.shape[1]),
        [],
    )
    for step in range(len(levels)):
        reward = REWARDS[levels[step] % 3, t_of[step]]
        discounted = discounted * gamma + reward
        samples += discounted.tolist()
        # the running variance starts as 1e-4 observations of mean 0 and variance 1
        count = len(samples) + 1e-4
        mean = sum(samples) / count
        variance = (sum(x * x for x in samples) + 1e-4) / count - mean**2
        scaled[step] = np.clip(reward / np.sqrt(variance + 1e-8), -10, 10)
        discounted = np.where(dones[step], 0.0, discounted)
    return scaled


@pytest.mark.parametrize("score", script.Args.__annotations__["score"].__args__)
def test_each_score_by_hand(score, monkeypatch, tmp_path):
    rollouts = watch_sampler(script, monkeypatch)
    monkeypatch.setattr(script, "Agent", Table)
    monkeypatch.setattr(script, "make_envs", lambda args, num_envs, device: ImageCorridor(num_envs))
    flags = "--num-envs 3 --num-steps 14 --total-timesteps 42 --num-minibatches 2 --gamma 0.9"
    flags += " --gae-lambda 0.8"
    flags += f" --num-levels 6 --eval-episodes 3 --reward-norm-gamma 0.95 --score {score}"
    flags += f" --run-dir {tmp_path}/run"
    main(monkeypatch, flags)
    levels, step_scores, dones, *_ = rollouts[0]
    assert 5 < dones.sum() < dones.size and not dones[-1].all()  # several episodes, and tails
    rewards = scaled_rewards(levels, dones, 0.95)
    # a time limit would count as an end
    values, deltas = td_errors(levels, dones, rewards, 0.9, cut=~dones)
    best, _ = best_returns(levels, dones, rewards)
    expected = scores_by_hand(levels, dones, values, deltas, 0.9 * 0.8, best)
    returns = returns_by_hand(levels, dones, rewards)
    variances = {level: np.var(returns[level][-10:]) for level in returns}
    assert max(variances.values()) > 0.01
    expected["learnability"] = np.vectorize(lambda level: variances.get(level, 0.0))(levels)
    expected = expected[score]
    np.testing.assert_allclose(step_scores, expected, rtol=1e-5, atol=1e-5)


def test_episode_statistics_equal_a_wrapper_step_by_step():
    """Over two rollouts: sums of episodes that go on, and rewards scaled as NormalizeReward does,
    without its centring, clipped."""
    T, N, gamma, rng = 7, 3, 0.9, np.random.default_rng(0)
    statistics = script.EpisodeStatistics(N, gamma)
    rms = gym.wrappers.utils.RunningMeanStd()
    discounted, raw, scaled_sum, length = (np.zeros(N) for _ in range(4))
    for _ in range(2):
        rewards = rng.normal(size=(T, N)).astype(np.float32) * rng.choice([1, 9], (T, N))
        rewards[0, 0] *= 1000 * (rewards[0, 0] > 0)
        rewards, ended = rewards.astype(np.float32), rng.random((T, N)) < 0.3
        expected, episodes = np.zeros((T, N)), []
        for t in range(T):
            discounted = discounted * gamma + rewards[t]
            rms.update(discounted)
            expected[t] = np.clip(rewards[t] / np.sqrt(rms.var + 1e-8), -10, 10)
            discounted[ended[t]] = 0
            raw, scaled_sum, length = raw + rewards[t], scaled_sum + expected[t], length + 1
            for i in np.flatnonzero(ended[t]):
                episodes.append((raw[i], length[i], scaled_sum[i]))
                raw[i] = scaled_sum[i] = length[i] = 0
        # as a checkpoint would
        other = script.EpisodeStatistics(N, gamma)
        other.load_state_dict(statistics.state_dict())
        scaled, finished = statistics.add(rewards, ended)
        np.testing.assert_array_equal(other.add(rewards, ended)[0], scaled)
        assert scaled.dtype == np.float32 and len(episodes) > 2
        np.testing.assert_allclose(scaled, expected, rtol=1e-5)
        names = "return", "length", "scaled_return"
        for name, column in zip(names, zip(*episodes), strict=True):
            np.testing.assert_allclose(finished[name], column, rtol=1e-5, atol=1e-5)
        for name, x in (("return", raw), ("scaled_return", scaled_sum), ("length", length)):
            np.testing.assert_allclose(statistics.sums[name], x, rtol=1e-5, atol=1e-5)


def test_rewards_are_clipped_and_an_episode_goes_on_in_the_next_rollout():
    statistics = script.EpisodeStatistics(2, 0.5)
    no, yes = [False, False], [True, False]
    rewards = np.array([[1, 2], [3, 4]], np.float32)
    _, finished = statistics.add(rewards, np.array([no, no]))
    assert all(len(x) == 0 for x in finished.values())
    _, finished = statistics.add(rewards, np.array([no, yes]))
    assert finished["return"].tolist() == [8] and finished["length"].tolist() == [4]
    assert statistics.sums["return"].tolist() == [0, 12]
    assert statistics.sums["discounted_return"].tolist() == [0, 4 + (2 + (4 + 2 / 2) / 2) / 2]
    quiet = script.EpisodeStatistics(2, 0.5)
    quiet.add(np.zeros((100, 2), np.float32), np.zeros((100, 2), bool))
    scaled, _ = quiet.add(np.array([[50, -50]], np.float32), np.array([no]))
    assert (abs(scaled) <= 10).all() and scaled[0, 0] == -scaled[0, 1] > 9


def test_the_parts_of_a_minibatch_are_all_of_it(monkeypatch):
    T, N = 5, 6
    mb_inds = torch.randperm(T * N, generator=torch.Generator().manual_seed(0))[:14]
    mine, where = script.part_of_minibatch(mb_inds, N)
    assert mb_inds[mine].tolist() == where.tolist() == mb_inds.tolist()
    monkeypatch.setattr(script, "WORLD", 2)
    whole, seen = torch.arange(T * N).view(T, N), []
    for rank in range(2):
        monkeypatch.setattr(script, "RANK", rank)
        mine, where = script.part_of_minibatch(mb_inds, N)
        own = whole[:, rank * 3 : (rank + 1) * 3].flatten()  # the storage of this process
        assert own[where].tolist() == mb_inds[mine].tolist()
        seen += own[where].tolist()
    assert sorted(seen) == sorted(mb_inds.tolist())


LARGE = {
    "near 88": [88, 88, 87],
    "at 100": [100, 100, 99],
    "about -110": [-110, -110.5, -109, -110, -111, -110.2, *[-112] * 9],
    "far apart": [-2000, 3000, 2999, 0, 2998.5, -5000],
    "all alike": [1e4] * 15,
    "ordinary": np.linspace(-1, 1, 15).tolist(),
}


@pytest.mark.parametrize("noisy", [True, False])
@pytest.mark.parametrize("logits", LARGE)
def test_actions_are_drawn_with_the_policys_probabilities(logits, noisy):
    torch.manual_seed(0)
    wanted = np.resize(LARGE[logits], 15) * (np.arange(15) < len(LARGE[logits]))
    agent, n = script.Agent(script.make_envs(script.Args(), 1, torch.device("cpu"))), 50_000
    agent.hidden = lambda x: torch.zeros(len(x), 256)
    agent.actor.bias.data.copy_(torch.from_numpy(wanted))
    noise = torch.empty(n, 15).exponential_() if noisy else None
    with torch.no_grad():
        action, logprob, entropy, _, got = agent.get_action_and_value(torch.zeros(n), noise=noise)
    p = np.exp(wanted - wanted.max())
    p /= p.sum()
    # normalised, to what float32 holds of the logits' sum
    np.testing.assert_allclose(got[0].exp(), p, atol=1e-6 + 2**-23 * abs(wanted).max())
    share = np.bincount(action, minlength=15) / n
    assert (abs(share - p) <= 5 * np.sqrt(p * (1 - p) / n)).all(), share
    torch.testing.assert_close(got.gather(-1, action[:, None])[:, 0], logprob)
    assert entropy.isfinite().all()


def test_one_ppo_update_equals_a_plain_implementation(monkeypatch, tmp_path):
    calls, permutations, start, next_values = [], [], {}, []
    randperm = torch.randperm

    class Watched(script.Agent):
        def __init__(self, *args):
            super().__init__(*args)
            start.update(copy.deepcopy(self.state_dict()))

        def get_action_and_value(self, x, action=None, **noise):
            out = super().get_action_and_value(x, action, **noise)
            if action is None:
                calls.append((x.clone(), *(y.clone() for y in out)))
            return out

        def get_value(self, x):
            next_values.append(super().get_value(x))
            return next_values[-1]

    def recorded(*args, **kwargs):
        permutations.append(randperm(*args, **kwargs))
        return permutations[-1]

    monkeypatch.setattr(script, "Agent", Watched)
    rollouts = watch_sampler(script, monkeypatch)
    monkeypatch.setattr(script, "make_envs", lambda args, num_envs, device: ImageCorridor(num_envs))
    monkeypatch.setattr(torch, "randperm", recorded)
    flags = "--num-envs 2 --num-steps 12 --total-timesteps 24 --num-minibatches 2"
    flags += " --update-epochs 2 --gamma 0.9"
    flags += " --gae-lambda 0.8 --clip-coef 0.02 --ent-coef 0.05 --vf-coef 0.7 --max-grad-norm 0.3"
    flags += " --eval-episodes 1"
    main(monkeypatch, f"{flags} --learning-rate 0.01 --run-dir {tmp_path}/run")

    # the rollout: rewards by hand, values as recorded, GAE by the textbook's backward recursion in
    # numpy
    obs, actions, logprobs, _, values, _ = (torch.stack(x) for x in zip(*calls[:12]))
    levels, _, dones, *_ = rollouts[0]
    rewards = scaled_rewards(levels, dones, 0.99)
    v = np.vstack((values.detach().numpy(), next_values[0].detach().numpy()))
    advantages = gae_backwards(rewards, v, dones, 0.9, 0.8)
    returns = torch.tensor(advantages + v[:-1]).float().flatten()
    b_adv, b_values = torch.tensor(advantages).float().flatten(), values.flatten()
    b_obs, b_actions, b_logprobs = obs.flatten(0, 1), actions.flatten(), logprobs.flatten()

    monkeypatch.undo()
    agent = script.Agent(ImageCorridor(1))
    agent.load_state_dict(start)
    plain = PlainPPO(agent.parameters(), 0.01, clip=0.02, ent_coef=0.05, vf_coef=0.7, max_norm=0.3)
    for permutation in permutations[:2]:
        for index in (permutation[:12], permutation[12:]):
            hidden = agent.hidden(b_obs[index])
            log_p, value = torch.log_softmax(agent.actor(hidden), -1), agent.critic(hidden)[:, 0]
            old = b_actions[index], b_logprobs[index], b_values[index]
            plain.step(log_p, value, *old, b_adv[index], returns[index])

    names = [name for name, _ in agent.named_parameters()]
    assert_trained_like(plain, names, start, tmp_path / "run", atol=2e-5)


def test_evaluation_plays_each_level_once_to_its_end_and_leaves_the_training_stream_alone(
    monkeypatch,
):
    made, whole_resets = [], []

    class Noted(ImageCorridor):
        def reset(self, *, seed, options=None):
            if options is None:
                whole_resets.extend(seed)
            return super().reset(seed=seed, options=options)

    def make(args, num_envs, device):
        made.append(Noted(num_envs))
        return made[-1]

    monkeypatch.setattr(script, "make_envs", make)
    monkeypatch.setattr(script, "EVALUATION_ENVS", {})
    args = script.Args(env_id="bigfish", eval_episodes=150, num_levels=40)
    before = torch.get_rng_state()
    result = script.evaluate(Table(None), args, torch.device("cpu"))
    assert torch.equal(before, torch.get_rng_state())
    episodes = result["episodes"]
    assert [envs.num_envs for envs in made] == [150]  # for both chunks
    played = episodes["test_levels"] + episodes["train_levels"]
    assert whole_resets[: len(played)] == played  # then it looks for flawed levels
    for part in ("test", "train"):
        expected = [
            REWARDS[level % 3][: LENGTHS[level % 3]].sum() for level in episodes[f"{part}_levels"]
        ]
        assert episodes[f"{part}_returns"] == expected
        assert result[f"{part}_return"] == pytest.approx(np.mean(expected))
        assert result[f"{part}_return_std"] == pytest.approx(np.std(expected))
    assert result["generalization_gap"] == pytest.approx(
        result["train_return"] - result["test_return"]
    )


class Bandit(Corridor):
    """Four steps; action 2 gives 1. Return 1 by chance, 4 at best. This is all that a fork has to
    write."""

    image_shape = 16, 16, 3  # small, as the network is slow

    def step(self, actions):
        self.t += 1
        done = self.t == 4
        return (
            self.look(),
            (np.asarray(actions) == 2).astype(np.float32),
            done,
            np.zeros_like(done),
            {},
        )


@pytest.mark.slow
def test_it_learns_on_another_environment(monkeypatch, tmp_path):
    monkeypatch.setattr(script, "make_envs", lambda args, num_envs, device: Bandit(num_envs))
    flags = "--num-envs 8 --num-steps 32 --total-timesteps 2560 --num-minibatches 2"
    flags += " --num-levels 6 --eval-episodes 4"
    main(monkeypatch, f"{flags} --learning-rate 0.001 --run-dir {tmp_path}/run")
    returns = [row["episodic_return"] for row in rows(tmp_path / "run/progress.csv")]
    assert returns[0] < 2 and returns[-1] > 3


# ---- whole runs ----------------------------------------------------------------------------------


def test_a_finished_run(finished_run):
    """What is Procgen's alone; the rest is in test_both_scripts.py."""
    progress, episodes = (
        rows(finished_run(script) / "progress.csv"),
        result_of(finished_run(script))["evaluation"]["episodes"],
    )
    assert all(row["entropy"] > 0 for row in progress) and progress[-1]["replay_share"] > 0
    assert len(episodes["test_returns"]) == len(episodes["train_returns"]) == 2


# ---- failures ------------------------------------------------------------------------------------


def test_missing_system_libraries_are_named(monkeypatch, tmp_path, capsys):
    def no_library(*args, **options):
        raise OSError("libGL.so.1: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(script.ProcgenLevels, "__init__", no_library)
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, f"{TINY} --run-dir {tmp_path}/run")
    message = capsys.readouterr().err
    assert (
        stop.value.code == 2
        and "libGL.so.1" in message
        and "apt-get install libgl1 libglib2.0-0" in message
    )
