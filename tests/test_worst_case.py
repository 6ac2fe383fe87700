"""--eval-worst: the worst alpha % of random mazes, on policies whose success is known."""

import functools
import shutil

import numpy as np
import pytest
import support
import torch
from support import LENGTHS, REWARDS, assert_refused, result_of, rows
from test_minigrid import Table, TensorCorridor, walk

import ppo_robust_plr_minigrid as script

CPU = torch.device("cpu")
TINY = support.TINY[script.__name__]
main = functools.partial(support.main, script)


# ---- which mazes are the worst, and how bad they are ---------------------------------------------


def test_worst_cases_by_hand():
    """Solved in the first four episodes and in the second: the mazes come worst first as 2 (0, 1),
    0 (1, 3), 3 (1, 0), 1 (4, 2) of 4."""
    first = np.array([[1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1]], bool)
    second = np.array([[1, 1, 1, 0], [0, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]], bool)
    found = script.worst_cases(first, second, (24.9, 25, 50, 75, 99, 100))
    assert [list(row.values()) for row in found] == [
        [25, 1, 4, 1 / 4, 0],
        [50, 2, 8, 4 / 8, 1 / 8],
        [75, 3, 12, 4 / 12, 2 / 12],
        [99, 3, 12, 4 / 12, 2 / 12],
        [100, 4, 16, 6 / 16, 6 / 16],
    ]  # 24.9 % are less than one maze
    assert list(found[0]) == "alpha_percent mazes episodes solved_rate rate_when_chosen".split()


@pytest.mark.parametrize(
    "n, first", [(10_000, 0.01), (9_999, 0.1), (1_000, 0.1), (99, 2), (1, 100)]
)
def test_an_alpha_of_less_than_one_maze_is_left_out(n, first):
    solved = np.ones((n, 10), bool)
    found = script.worst_cases(solved, solved)
    published = [0.01, 0.1, 1, 2, 5, 10, 20, 50, 100]
    assert [row["alpha_percent"] for row in found] == published[published.index(first) :]
    assert [row["mazes"] for row in found] == [
        int(n * a / 100 + 1e-6) for a in published if a >= first
    ]


def test_one_set_used_twice_is_biased_and_a_second_is_not():
    """Of a policy that solves every maze half of the time the worst are solved half of the time."""
    first, second = np.random.default_rng(0).random((2, 20_000, 10)) < 0.5
    for row in script.worst_cases(first, second, (1, 5, 20)):
        error = np.sqrt(0.25 / row["episodes"])
        assert abs(row["solved_rate"] - 0.5) < 5 * error
        assert row["rate_when_chosen"] < 0.5 - 30 * error
    twice = script.worst_cases(first, first, (1,))[0]
    assert twice["solved_rate"] == twice["rate_when_chosen"] < 0.1


SUCCESS = np.array([0.1, 0.6, 1.0])  # in levels 0, 1, 2 of each three


class Coin(TensorCorridor):
    """Solved if the first action is 0, at once; else the episode goes on for 7 more steps."""

    def __init__(self, num_envs, *args, **options):
        super().__init__(num_envs)
        self.device, self.cuda_graphs = CPU, False
        self.solved = np.zeros(num_envs, bool)

    def step(self, actions):
        begins = self.t == 0
        self.solved = np.where(begins, actions.numpy() == 0, self.solved)
        self.t = self.t + 1
        reward = begins & self.solved
        done = torch.from_numpy(reward | (self.t >= 8))
        return self.look(), torch.from_numpy(reward).float(), done, torch.zeros_like(done), {}


class CoinAgent(Table):
    def look_up(self, image):
        p = torch.from_numpy(SUCCESS)[image[..., 0, 0, 0].long() // 16]
        both = torch.stack((p, 1 - p), -1).clamp(min=1e-12)
        return both.log().float(), p.float()


def test_a_policy_whose_success_is_known_has_the_known_rates(monkeypatch, tmp_path, capsys):
    """Failures take eight times as long as successes: whoever counts what ends first is wrong."""
    monkeypatch.setattr(script, "MazeEnvs", Coin)
    agent = CoinAgent()
    agent.num_actions = 2
    levels = script.solvable_levels(900, 15, 60)
    share = np.bincount(levels % 3) / 900
    before = torch.get_rng_state()
    args = script.Args(eval_worst=900)
    script.evaluate_worst(agent, args, CPU, tmp_path, 77)
    assert torch.equal(before, torch.get_rng_state())
    found = {row["alpha_percent"]: row for row in rows(tmp_path / "worst_case.csv")}
    assert list(found) == [1, 2, 5, 10, 20, 50, 100] and share.min() > 0.25
    assert {row["global_step"] for row in found.values()} == {77}
    assert [row["episodes"] for row in found.values()] == [90, 180, 450, 900, 1800, 4500, 9000]
    for alpha in (1, 2, 5, 10, 20):  # mazes of the hard kind only
        rate, n = found[alpha]["solved_rate"], found[alpha]["episodes"]
        assert abs(rate - SUCCESS[0]) < 4.5 * np.sqrt(SUCCESS[0] * (1 - SUCCESS[0]) / n)
    assert found[10]["rate_when_chosen"] == 0  # a third of these are not solved in ten episodes
    half = (share[0] * SUCCESS[0] + (0.5 - share[0]) * SUCCESS[1]) / 0.5
    assert abs(found[50]["solved_rate"] - half) < 0.03
    assert abs(found[100]["solved_rate"] - share @ SUCCESS) < 0.02
    shown = capsys.readouterr().out.splitlines()
    assert "900 random mazes" in shown[0] and len(shown) == 9
    rate = found[100]["solved_rate"]
    assert shown[-1].split() == [
        "100",
        "900",
        f"{rate:.3f}",
        f"{found[100]['rate_when_chosen']:.3f}",
    ]
    # the same again, and others by another seed
    written = (tmp_path / "worst_case.csv").read_bytes()
    script.evaluate_worst(agent, args, CPU, tmp_path, 77)
    assert (tmp_path / "worst_case.csv").read_bytes() == written
    # and the same with both sets at once
    torch.set_num_threads(2)
    script.evaluate_worst(agent, args, CPU, tmp_path, 77)
    assert (tmp_path / "worst_case.csv").read_bytes() == written and torch.get_num_threads() == 2
    torch.set_num_threads(1)
    script.evaluate_worst(agent, script.Args(eval_worst=900, seed=2), CPU, tmp_path, 77)
    assert (tmp_path / "worst_case.csv").read_bytes() != written


# ---- which mazes, and how they are played --------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 60])
def test_the_mazes_are_the_first_test_levels_with_a_path(n):
    levels = script.solvable_levels(n, 15, 60)
    drawn = np.arange(script.FIRST_TEST_LEVEL, script.FIRST_TEST_LEVEL + 2 * n)
    mazes = script.random_mazes(drawn, 15, 60)
    assert levels.tolist() == [x for i, x in enumerate(drawn) if walk(mazes, i) > 0][:n]
    assert len(levels) == n


def test_twice_as_many_are_always_enough():
    levels = script.solvable_levels(5_500, 15, 60)  # more than are drawn at once
    assert len(levels) == 5_500
    # among the first 2 n levels are n with a path, whatever n is
    assert (levels - script.FIRST_TEST_LEVEL < 2 * np.arange(1, 5_501)).all()
    assert levels[:60].tolist() == script.solvable_levels(60, 15, 60).tolist()


class Counting(Table):
    """Its LSTM state is the number of the step in the episode, as the observation is."""

    def act(self, obs, state, noise):
        code = obs["image"][..., 0, 0, 0].long()
        step = state[0, :, 0].long()
        assert (step.clamp(max=5) == code % 16).all()
        action, value, log_p, _ = super().act(obs, state, noise)
        return action, value, log_p, tuple(state + 1)


@pytest.mark.parametrize("num_envs", [1, 2, 5, 11])
def test_each_level_is_played_once_from_a_fresh_state(num_envs):
    levels = np.array([2, 0, 1, 1, 5, 3, 1, 0, 2, 2])
    envs = TensorCorridor(num_envs)
    returns = script.play_levels(Counting(), envs, levels)
    assert returns.tolist() == [REWARDS[x % 3, : LENGTHS[x % 3]].sum() for x in levels]
    started = np.array(envs.started)
    assert started[:10].tolist() == levels.tolist()  # in their order
    assert len(started) == max(10, num_envs)  # and none twice, but in environments too many


# ---- as a user does it ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("brief")
def test_it_ends_a_run_and_changes_nothing_of_it(brief_run, monkeypatch, tmp_path, capsys):
    whole = brief_run(script)
    main(monkeypatch, f"{TINY} --eval-worst 3 --run-dir {tmp_path}/run")
    assert not (whole / "worst_case.csv").exists()
    assert result_of(tmp_path / "run")["fingerprint"] == result_of(whole)["fingerprint"]
    assert "3 random mazes, 10 episodes in each, twice" in capsys.readouterr().out
    path = tmp_path / "run/worst_case.csv"
    expected = [(960, 50, 1, 10), (960, 100, 3, 30)]
    names = "global_step alpha_percent mazes episodes".split()
    assert [tuple(row[x] for x in names) for row in rows(path)] == expected
    # --evaluate plays the same agent in the same mazes with the same random numbers
    shutil.copytree(whole, tmp_path / "again")
    main(monkeypatch, f"--evaluate {tmp_path}/again --eval-worst 3")
    assert (tmp_path / "again/worst_case.csv").read_bytes() == path.read_bytes()
    assert len(capsys.readouterr().out.split("every episode")[1].splitlines()) == 5


def test_what_is_refused(monkeypatch, tmp_path, capsys):
    for flags, expected in {
        "--eval-worst -1": "--eval-worst -1 must be between 0 and 1000000",
        "--eval-worst 1000001": "--eval-worst 1000001 must be between 0 and 1000000",
        "--env-id MiniGrid-LavaGapS5-v0 --eval-worst 5": "--eval-worst 5 does nothing without",
    }.items():
        assert_refused(script, monkeypatch, tmp_path, capsys, flags, expected)
