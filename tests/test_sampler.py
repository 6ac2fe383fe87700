"""LevelSampler against the published numbers, slow plain-Python versions of its rules, and known defects.

Marks such as (D6) or (S3) name the defect of an earlier code base that a test would catch. R1 to R13 are what users of
other training loops asked for; R6 and R9 concern the scripts: test_minigrid.py (what new levels may not change) and
test_torchrun.py (one curriculum, whatever the number of processes). tests/integrations/ has them with real workers.
"""

import copy
import io
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import gae_as_a_sum

from plr_sampler import TRANSFORMS, LevelSampler, StepScorer, invert

GOLDEN = json.loads((Path(__file__).parent / "data" / "level_sampler_golden.json").read_text())
SETTINGS = (
    "score_transform",
    "temperature",
    "eps",
    "staleness_coef",
    "staleness_transform",
    "staleness_temperature",
)
RANK = {"staleness_coef": 0.0, "temperature": 1.0}
COUNTS = ("evicted", "rejected", "late")
BUFFER = {"rho": 0.5, "level_space": 100}
KINDS = {"fixed": {}, "buffer": BUFFER, "stitched": {**BUFFER, "stitch_episodes": True}}
KINDS["sequential"] = {"curriculum": "sequential"}
SEEDS = st.integers(0, 2**32 - 1)
repeatable = settings(derandomize=True, deadline=None, max_examples=60, database=None)


# ---- helpers ---------------------------------------------------------------------------------------------------------


def fixed(size=6, envs=1, **options):
    return LevelSampler(range(size), num_envs=envs, **{"seed": 1, **options})


def buffer(size=6, envs=1, **options):
    return LevelSampler(buffer_size=size, num_envs=envs, **{"seed": 1, **options})


def make(kind, **options):
    new = fixed if kind in ("fixed", "sequential") else buffer
    return new(**{**KINDS[kind], **options})


def fill(s, levels, scores):
    """Plays each of levels once, then scores them."""
    for level in levels:
        s.next_levels(np.ones(s.num_envs, bool), levels=np.full(s.num_envs, level))
    s.update_scores(levels, scores)
    return s


def play(s, levels, scores, dones, **options):
    """One rollout of a single environment."""
    return s.update(*(np.array(x)[:, None] for x in (levels, scores, dones)), **options)


def known(s):
    return dict(zip(s.levels[s.seen].tolist(), s.scores[s.seen].tolist()))


def balanced(s):
    return (
        s.counts["started"] == s.counts["completed"] + (s.playing >= 0).sum() + s.counts["dropped"]
    )


class Loop:
    """Episodes of random length, in rollouts of `steps` steps; `drop` is the share dropped after each rollout."""

    def __init__(self, sampler, seed=0, steps=8, end=0.3, drop=0.0, low=0.0, **update):
        self.s, self.rng = sampler, np.random.default_rng(seed)
        self.steps, self.end, self.drop, self.low, self.update = steps, end, drop, low, update
        self.rows, self.draws, self.completed, self.dropped = [], [], 0, 0

    def start(self, mask):
        before, after = self.s.playing.copy(), self.s.next_levels(mask)
        assert (after == np.where(mask, self.s.playing, before)).all() and after.min() >= 0
        self.draws += after[mask].tolist()

    def step(self):
        """One step of every environment. Returns the rollout's arrays and its episodes at its end, None before."""
        n = self.s.num_envs
        self.start(self.s.playing < 0)
        done = self.rng.random(n) < self.end
        self.rows.append((self.s.playing.copy(), self.rng.uniform(self.low, 1, n), done))
        self.start(done)
        self.completed += int(done.sum())
        if len(self.rows) < self.steps:
            return None
        arrays = [np.array(x) for x in zip(*self.rows)]
        episodes = self.s.update(*arrays, **self.update)
        mask = self.rng.random(n) < self.drop
        self.s.drop(mask)
        self.rows, self.dropped = [], self.dropped + int(mask.sum())
        return arrays, episodes

    def rollout(self):
        return next(result for result in iter(self.step, 0) if result is not None)


def slow_segments(levels, scores, dones, parts, stitch=False, score_tails=True):
    """(env, level, steps, mean, max, complete) per segment, step by step; parts keeps the open ones if stitched."""
    finished, tails = [], []
    for i in range(len(levels[0])):
        part = parts.pop(i, [])
        for t in range(len(levels)):
            part.append(scores[t][i])
            if dones[t][i]:
                finished.append((i, levels[t][i], len(part), fmean(part), max(part), True))
                part = []
        if part and stitch:
            parts[i] = part
        elif part and score_tails:
            tails.append((i, levels[-1][i], len(part), fmean(part), max(part), False))
    return finished + tails


def slow_weights(score, age, coef, temperature, age_temperature):
    """Rank scores and power staleness over the levels of score, a dict: level -> probability."""
    ranked = sorted(score, key=score.get, reverse=True)
    w = {level: (1 / (k + 1)) ** (1 / temperature) for k, level in enumerate(ranked)}
    c = {level: age[level] ** (1 / age_temperature) for level in score}
    c = c if any(c.values()) else dict.fromkeys(c, 1)
    return {x: (1 - coef) * w[x] / sum(w.values()) + coef * c[x] / sum(c.values()) for x in score}


def tick(age, level):
    for other in age:
        age[other] += 1
    age[level] = 0


class SlowBuffer:
    """The buffer's rules on dicts: known levels are scored first, then new ones compete in order of appearance. Draws
    of its levels age the others; a new one enters as old as new ones were drawn since."""

    def __init__(self, size, alpha, *weighting):
        self.size, self.alpha, self.weighting = size, alpha, weighting
        self.score, self.age, self.slot, self.staged, self.counts = (
            {},
            {},
            {},
            {},
            dict.fromkeys(COUNTS, 0),
        )

    def drawn(self, level):
        if level in self.score:
            tick(self.age, level)
        elif level not in self.staged:
            self.staged = {other: since + 1 for other, since in self.staged.items()} | {level: 0}

    def mix(self, old, scores):
        for m in scores:
            old = (1 - self.alpha) * old + self.alpha * m
        return old

    def update(self, scored, playing):
        fresh = {}
        for level, m in scored:
            if level in self.score:
                self.score[level] = self.mix(self.score[level], [m])
            elif level in self.staged:
                fresh.setdefault(level, []).append(m)
            else:
                self.counts["late"] += 1
        for level, (first, *rest) in fresh.items():
            self.insert(level, self.mix(first, rest))
        self.staged = {
            x: since for x, since in self.staged.items() if x not in fresh and x in playing
        }

    def insert(self, level, score):
        if len(self.score) == self.size:
            p = slow_weights(self.score, self.age, *self.weighting)
            worst = min(p, key=lambda x: (p[x], self.slot[x]))
            self.counts["rejected" if self.score[worst] > score else "evicted"] += 1
            if self.score[worst] > score:
                return
            del self.score[worst], self.age[worst]
        self.slot[level] = self.slot.pop(worst) if len(self.slot) == self.size else len(self.slot)
        self.score[level], self.age[level] = score, self.staged[level]


# ---- the published numbers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case", GOLDEN["weights"], ids=lambda c: f"{c['score_transform']}-{c['staleness_transform']}"
)
def test_published_weights(case):
    s = fixed(len(case["scores"]), **{name: case[name] for name in SETTINGS})
    s.scores[:], s.seen[:], s._clock = case["scores"], ~np.array(case["unseen"], bool), 100
    s._drawn_at[:] = 100 - np.array(case["staleness"], int)
    s._index()
    np.testing.assert_allclose(s.weights(), case["weights"], rtol=0, atol=1e-6)


def golden_scores(strategy, rollout):
    if "advantages" in rollout:
        return (
            np.abs(rollout["advantages"])
            if strategy == "value_l1"
            else np.array(rollout["advantages"])
        )
    logits = np.array(rollout["logits"])
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    if strategy == "policy_entropy":
        return -(p * np.log(p)).sum(-1) / np.log(p.shape[-1])
    first, second = np.moveaxis(np.sort(p)[..., :-3:-1], -1, 0)
    return 1 - first + (second if strategy == "min_margin" else 0)


@pytest.mark.parametrize(
    "case", GOLDEN["rollouts"], ids=lambda c: f"{c['strategy']}-{c['alpha']}-{c['num_envs']}"
)
def test_published_scores(case):
    s = fixed(case["num_levels"], case["num_envs"], alpha=case["alpha"])
    for rollout in case["rollouts"]:
        s.update(rollout["levels"], golden_scores(case["strategy"], rollout), rollout["dones"])
        np.testing.assert_allclose(s.scores, rollout["seed_scores"], rtol=0, atol=1e-6)
        assert s.seen.tolist() == rollout["seen"]


# ---- replay distribution ---------------------------------------------------------------------------------------------

LEVELS = st.lists(
    st.tuples(st.integers(0, 50), st.booleans(), st.integers(0, 99)), min_size=1, max_size=12
)


def with_levels(rows, **options):
    s = fixed(len(rows), **options)
    scores, seen, ages = zip(*rows)
    s.scores[:], s.seen[:], s._clock, s._drawn_at[:] = scores, seen, 100, 100 - np.array(ages)
    s._index()
    return s


@pytest.mark.parametrize("kind", TRANSFORMS)
@pytest.mark.parametrize("staleness_kind", TRANSFORMS)
@given(LEVELS, st.sampled_from([0.0, 0.3, 1.0]), st.sampled_from([0.1, 1.0]))
@settings(repeatable, max_examples=15)
def test_weights_sum_to_1_over_seen_levels_only(kind, staleness_kind, rows, coef, t):
    options = {
        "score_transform": kind,
        "staleness_transform": staleness_kind,
        "staleness_coef": coef,
        "temperature": t,
    }
    s = with_levels(rows, **options)
    p = s.weights()
    assert (
        math.isclose(p.sum(), s.seen.any(), abs_tol=1e-9)
        and (p >= 0).all()
        and (p[~s.seen] == 0).all()
    )


@given(LEVELS)
@repeatable
def test_rank_ignores_monotone_rescaling(rows):
    base = with_levels(rows).weights()
    for rescale in (lambda x: 3 * x - 70, lambda x: x**3, lambda x: math.exp(x / 10)):
        np.testing.assert_array_equal(
            with_levels([(rescale(x), *rest) for x, *rest in rows]).weights(), base
        )


def test_softmax_is_over_seen_levels_and_never_overflows():
    want = np.array([1, 0, math.e, math.e]) / (1 + 2 * math.e)
    for scale in (1, 1e-1, 1e4):
        rows = [
            (x * scale, seen, 0)
            for x, seen in ((4e3, True), (9e9, False), (4e3 + 1, True), (4e3 + 1, True))
        ]
        p = with_levels(
            rows, score_transform="softmax", temperature=scale, staleness_coef=0
        ).weights()
        np.testing.assert_allclose(p, want, atol=1e-9)
    rows = [(0, True, 4000), (0, False, 99999), (0, True, 4001), (0, True, 4001)]
    np.testing.assert_allclose(
        with_levels(rows, staleness_coef=1, staleness_transform="softmax").weights(), want
    )


@pytest.mark.parametrize("scale", [1e40, 1.0, 1e-40])
def test_power_of_extreme_scores_is_finite(scale):
    s = fixed(3, score_transform="power", temperature=0.1, staleness_coef=0.1)
    s.update_scores([0, 1], [10 * scale, scale])
    p = s._score_weights()
    np.testing.assert_allclose(p, [1 / (1 + 1e-10), 1e-10 / (1 + 1e-10)], rtol=1e-6)


def test_a_negative_score_is_refused_by_power_before_anything_moves():
    s = fill(buffer(1, score_transform="power"), [5], [1.0])
    s.next_levels([True], levels=[6])
    before = s.state_dict()
    with pytest.raises(ValueError, match="power"):
        s.update_scores([5, 6], [-1.0, 2.0])
    np.testing.assert_equal(s.state_dict(), before)


def test_all_zero_power_weights_are_uniform_over_seen_only():
    # published: uniform over all levels, unseen ones included
    s = fixed(4, score_transform="power", staleness_coef=0.5)
    s.update_scores([1, 3], [0, 0])
    assert s.weights().tolist() == [0, 0.5, 0, 0.5]


EVOLVING = [
    (0.0, 1.0, 1.0),
    (0.1, 0.5, 1.0),
    (0.5, 1.0, 0.5),
    (1.0, 1.0, 1.0),
    (1.0, 1.0, 2.0),
    (1.0, 1.0, 0.25),
]


@pytest.mark.parametrize("coef, temperature, age_temperature", EVOLVING)
def test_draws_follow_weights_while_staleness_evolves(coef, temperature, age_temperature):
    s = fixed(
        8, staleness_coef=coef, temperature=temperature, staleness_temperature=age_temperature
    )
    score = dict(enumerate(np.random.default_rng(0).normal(size=8).tolist()))
    s.update_scores(list(score), list(score.values()))
    age = dict.fromkeys(score, 0)
    hits, mean, variance = np.zeros((3, 8))
    for k in range(4000):
        if k % 100 == 50:  # the same scores again: what is kept between updates is rebuilt
            s.update_scores(list(score), list(score.values()))
        p = np.array([*slow_weights(score, age, coef, temperature, age_temperature).values()])
        assert np.abs(s.weights() - p).max() < 1e-12
        level = s.sample(replay=True)
        tick(age, level)
        assert s.staleness().tolist() == list(age.values())
        hits[level], mean, variance = hits[level] + 1, mean + p, variance + p * (1 - p)
    assert (np.abs(hits - mean) < 4.5 * np.sqrt(variance)).all()


FROZEN = [  # (staleness_coef, score and staleness transform, their temperatures)
    (0.7, "rank", "power", 2.0, 0.5),
    (1.0, "rank", "power", 1.0, 1.0),
    (0.0, "rank", "power", 2.0, 1.0),
    (0.5, "power", "rank", 1.0, 2.0),
    (0.3, "softmax", "softmax", 20.0, 30.0),
    (0.5, "eps_greedy", "constant", 1.0, 1.0),
]


@pytest.mark.parametrize("coef, kind, staleness_kind, temperature, age_temperature", FROZEN)
def test_draws_follow_frozen_weights(coef, kind, staleness_kind, temperature, age_temperature):
    """Pearson's chi-square of 10,000 draws, 4 standard deviations from its mean at most."""
    rng, n = np.random.default_rng(0), 10_000
    rows = [(x, x > 5, int(age)) for x, age in zip(rng.permutation(60), rng.integers(0, 100, 60))]
    transforms = {"score_transform": kind, "staleness_transform": staleness_kind}
    temperatures = {"temperature": temperature, "staleness_temperature": age_temperature}
    s = with_levels(rows, staleness_coef=coef, eps=0.3, **transforms, **temperatures)
    p, drawn_at, hits = s.weights(), s._drawn_at.copy(), np.zeros(60)
    for _ in range(n):
        hits[s.sample(replay=True)] += 1
        s._clock, s._drawn_at[:] = 100, drawn_at
    assert hits[p == 0].sum() == 0 and (p == 0).sum() >= 6
    big = n * p >= 5
    got, want = (np.append(x[big], x[~big].sum()) for x in (hits, n * p))
    assert ((got - want) ** 2 / np.maximum(want, 1e-9)).sum() < big.sum() + 4 * np.sqrt(
        2 * big.sum()
    )


def test_no_draw_falls_on_a_weight_of_0_at_the_edges():
    """The generator's largest and smallest number, on weights that end and begin with 0."""
    largest = 1 - 2**-53
    for size in (3, 7, 49, 1000):
        weights = np.random.default_rng(size).random(size)
        weights[[0, -1]] = 0
        assert invert(np.cumsum(weights), np.array([0.0, largest])).tolist() == [1, size - 2]


@pytest.mark.parametrize("kind", ["fixed", "buffer", "sequential"])
@given(
    SEEDS,
    st.sampled_from([None, True, False]),
    st.sampled_from(TRANSFORMS),
    st.sampled_from([0.0, 0.4, 1.0]),
)
@settings(repeatable, max_examples=40)
def test_many_levels_are_drawn_as_one_by_one(kind, seed, replay, staleness_kind, coef):
    """The same levels, and the same state after it, generator included; also from a level space that is nearly full.

    Decisions come first, then the levels to be replayed, then the new ones."""
    options = {
        "staleness_transform": staleness_kind,
        "staleness_coef": coef,
        "rho": 0.2,
        "nu": seed % 3 / 2,
    }
    options |= {"replay_schedule": ("fixed", "proportionate")[seed % 2], "temperature": 1.0}
    if kind == "buffer":
        options |= {"level_space": (8, 1000, 2**40)[seed % 3]}
    s, rng = make(kind, size=6, envs=30, seed=seed, **options), np.random.default_rng(seed)
    fill(s, range(seed % 5 + 1), rng.random(seed % 5 + 1))
    s.playing[::7] = -1
    for levels in (None, rng.integers(6, size=30), None):
        one_by_one, mask = copy.deepcopy(s), rng.random(30) < 0.7
        s.next_levels(mask, replay, levels)
        decisions = np.full(30, bool(replay))
        if replay is None and levels is None and kind != "sequential":
            decisions[mask] = [one_by_one.decide_replay() for _ in range(mask.sum())]
        for i in (*np.flatnonzero(mask & decisions), *np.flatnonzero(mask & ~decisions)):
            one_by_one.next_levels(np.arange(30) == i, bool(decisions[i]), levels)
        np.testing.assert_equal(s.state_dict(), one_by_one.state_dict())
        np.testing.assert_array_equal(s.weights(), one_by_one.weights())


def test_staleness_counts_draws():
    loop = Loop(fixed(envs=3), drop=0.2)
    age, used = dict.fromkeys(range(6), 0), 0
    for _ in range(400):
        loop.step()
        for level in loop.draws[used:]:
            tick(age, level)
        used = len(loop.draws)
        assert loop.s.staleness().tolist() == list(age.values())


def test_new_levels_compete_with_the_buffer_not_with_each_other():
    """They aged the whole buffer, so that each new level was the next one's victim and old levels stayed for ever."""
    rng, every, changed = np.random.default_rng(0), np.ones(10, bool), []
    s = fill(
        buffer(100, 10, staleness_coef=0.3, level_space=10**6),
        range(100),
        rng.uniform(0.0, 0.5, 100),
    )
    for _ in range(
        50
    ):  # as Robust PLR on mazes: a rollout replays, the next plays new levels, each several times
        for replay in (True, False):
            s.drop(every)
            levels, before = s.next_levels(every, replay), s.levels.copy()
            for _ in range(4):
                s.next_levels(every, replay, None if replay else levels)
            s.update_scores(levels, rng.uniform(0.0, 0.5, 10))
        changed.append((s.levels != before).sum())
    assert np.mean(changed) > 2  # it was 1.2


# ---- no leaks, exact resume ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_samplers_share_nothing_and_leave_np_random_alone(kind):
    np.random.seed(5)
    alone = [Loop(make(kind, envs=3, seed=seed), seed) for seed in (1, 2)]
    mixed = copy.deepcopy(alone)
    for loop in alone:
        [loop.step() for _ in range(150)]
    [loop.step() for _ in range(150) for loop in mixed]
    assert [loop.draws for loop in mixed] == [loop.draws for loop in alone]
    assert np.random.random() == np.random.RandomState(5).random()


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_repeats_the_draws_and_another_does_not(
    kind,
):  # (S9) thread order used to decide the draws
    loops = [Loop(make(kind, envs=3, seed=seed)) for seed in (1, 1, 2)]
    [loop.rollout() for loop in loops for _ in range(20)]
    assert loops[0].draws == loops[1].draws and (
        loops[1].draws != loops[2].draws or kind == "sequential"
    )


def through_torch(state):
    def tensors(x):
        if isinstance(x, dict):
            return {key: tensors(value) for key, value in x.items()}
        return torch.from_numpy(x) if isinstance(x, np.ndarray) else x

    file = io.BytesIO()
    torch.save(tensors(state), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("through", [copy.deepcopy, through_torch], ids=["deepcopy", "torch"])
@pytest.mark.parametrize("kind", KINDS)
@given(SEEDS, st.integers(0, 90))
@settings(repeatable, max_examples=12)
def test_a_restored_sampler_continues_the_same(kind, through, seed, steps):
    a = Loop(make(kind, envs=3, alpha=0.5, seed=seed), seed, drop=0.2)
    for _ in range(steps):
        a.step()
        a.s.record_returns(a.draws[-1:], a.rng.normal(size=1))
    saved = a.s.state_dict()
    b, before = copy.deepcopy(a), copy.deepcopy(saved)
    b.s = make(kind, envs=3, alpha=0.5, seed=seed + 1)
    b.s.load_state_dict(through(saved))
    for _ in range(30):
        a.step(), b.step()
    assert a.draws == b.draws
    np.testing.assert_equal(b.s.state_dict(), a.s.state_dict())
    np.testing.assert_equal(b.s.best_return, a.s.best_return)
    np.testing.assert_equal(saved, before)  # and what was saved has not moved


# ---- scoring ---------------------------------------------------------------------------------------------------------


@given(
    SEEDS,
    st.integers(1, 12),
    st.integers(1, 5),
    st.sampled_from([1.0, 0.5, 0.1]),
    st.booleans(),
    st.booleans(),
)
@settings(repeatable, max_examples=150)
def test_update_equals_plain_loops(seed, steps, envs, alpha, stitch, tails):
    s = fixed(4, envs, seed=seed, alpha=alpha, stitch_episodes=stitch, curriculum="uniform")
    loop, parts, score = Loop(s, seed, steps, seed % 11 / 10, low=-1.0, score_tails=tails), {}, {}
    for _ in range(4):
        arrays, episodes = loop.rollout()
        want = slow_segments(*arrays, parts, stitch, tails)
        got = np.array([list(episode)[:6] for episode in episodes], float).reshape(-1, 6)
        np.testing.assert_allclose(got, np.array(want, float).reshape(-1, 6), atol=1e-12)
        for _, level, _, mean, *_ in want:
            score[level] = (1 - alpha) * score.get(level, 0.0) + alpha * mean
        assert known(s) == pytest.approx(score, abs=1e-12) and s.seen.sum() == len(score)


def test_update_returns_a_record_per_segment():  # done in order: env 0 twice, env 1 once, then the tails
    levels = [[0, 2], [0, 2], [1, 2], [1, 3], [5, 3]]
    scores = [[1, 4], [3, 5], [-2, 9], [-4, 1], [7, 0]]
    dones = [[0, 0], [1, 0], [0, 1], [1, 0], [0, 0]]
    got = fixed(6, 2).update(levels, torch.tensor(scores), torch.tensor(dones))
    assert [episode.tolist()[:5] for episode in got] == [
        (0, 0, 2, 2, 3), (0, 1, 2, -3, -2), (1, 2, 3, 6, 9), (0, 5, 1, 7, 7), (1, 3, 2, 0.5, 1),
    ]  # fmt: skip
    assert (
        got.complete.tolist() == [True, True, True, False, False]
        and np.isnan(got.total_reward).all()
    )


def test_a_tail_has_just_its_own_steps():  # (D1) one term too many at a tail; (S6) all rows of a larger array
    s = fixed()
    episodes = play(s, [0, 0, 0, 1, 1], [9, 9, 9, 0.2, 0.4], [0, 0, 1, 0, 0])
    assert episodes.steps.tolist() == [3, 2] and s.scores[:2] == pytest.approx([9, 0.3])


def test_a_score_of_0_counts_as_seen():  # (D2) a tail scored 0 left its level unseen
    s = fixed()
    play(s, [2, 2], [0, 0], [0, 0])
    assert s.seen.tolist() == [False, False, True, False, False, False]


def test_max_leaves_the_scores_alone():  # (D3) -inf written into the live scores, nan after the next update
    s = fixed(score_transform="max", staleness_transform="max", alpha=0.5)
    for level in (2, 3):
        play(s, [level], [1.0], [1])
        assert s.weights()[~s.seen].sum() == 0 and s.sample(replay=True) in (2, 3)
    assert s.scores.tolist() == [0, 0, 0.5, 0.5, 0, 0] and s._score_weights().tolist() == [0.5, 0.5]


@pytest.mark.parametrize("alpha, want", [(1.0, 6.0), (0.5, 4.90625)])
def test_one_level_in_several_envs_is_scored_in_order(
    alpha, want
):  # (D12) the last write won, whatever it was
    s = fixed(1, 3, alpha=alpha)
    s.update(
        np.zeros((2, 3)), [[1, 3, 4], [2, 9, 5]], [[1, 0, 1], [1, 0, 1]]
    )  # 1, 2, 4, 5, then the tail's 6
    assert s.scores[0] == want


@pytest.mark.parametrize("kind", ["fixed", "buffer"])
def test_unseen_levels_and_empty_slots_take_no_rank(
    kind,
):  # (dcd) their zeros outranked negative scores
    s = fill(make(kind, **RANK), [3, 5], [-2.0, -1.0])
    p = dict(zip(s.levels.tolist(), s.weights()))
    assert (p[3], p[5]) == pytest.approx((1 / 3, 2 / 3))


def test_empty_slots_take_no_rank_of_staleness():  # a fixed set's unseen levels do, as published
    s = buffer(6, staleness_coef=1.0, staleness_transform="rank")
    for level in (3, 5, 3, 5, 3):  # the last draw was of 3; empty slots were never drawn
        fill(s, [level], [0.0])
    assert s.weights()[:2] == pytest.approx((1 / 3, 2 / 3))


def test_scores_are_means_and_cut_episodes_weigh_by_steps():  # (R5, S3) sums for finished episodes, means for others
    score = np.random.default_rng(0).uniform(size=100)
    for cuts in ([], [1], [37, 38, 90]):
        s = fixed(stitch_episodes=True)
        for part in np.split(np.arange(100), cuts):
            episodes = play(s, [4] * len(part), score[part], part == 99)
            assert s.seen[4] == (part[-1] == 99)
        assert s.scores[4] == pytest.approx(score.mean(), abs=1e-12)
        assert episodes.steps.tolist() == [100] and episodes.max_score[0] == score.max()


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_environment_is_scored(kind):  # (S4) arrays sized without some environments
    s = make(kind, size=64, envs=64)
    s.next_levels(np.ones(64, bool), levels=np.arange(64))
    s.update([np.arange(64)] * 2, [np.arange(64)] * 2, [[0] * 64, [1] * 64])
    assert known(s) == dict(enumerate(range(64)))


# ---- step by step ----------------------------------------------------------------------------------------------------

GAE = {"gamma": 0.9, "gae_lambda": 0.8}
STEP_SCORES = {  # of (advantages, TD errors, R_max - V)
    "value_l1": lambda advantages, deltas, regrets: np.abs(advantages),
    "gae": lambda advantages, deltas, regrets: advantages,
    "positive_value_loss": lambda advantages, deltas, regrets: np.maximum(advantages, 0),
    "one_step_td_error": lambda advantages, deltas, regrets: np.abs(deltas),
    "max_mc": lambda advantages, deltas, regrets: regrets,
}


def steps_of(scorer, levels, values, next_values, rewards, dones):
    """Feeds rows (T, N) one by one; the records of all episodes that ended."""
    rows = zip(*(np.asarray(x) for x in (levels, values, next_values, rewards, dones)))
    return np.concatenate([scorer.step(*row) for row in rows]).view(np.recarray)


def test_a_six_step_episode_by_hand():  # (R4)
    s = fixed(3, 2)
    levels, dones = [[2, 1]] * 6, [[0, 0]] * 5 + [[1, 0]]
    values = np.array([[1, 0], [2, 0], [0, 0], [4, 0], [2, 0], [2, 0]], np.float32)
    next_values = np.array(
        [[2, 0], [0, 0], [4, 0], [2, 0], [2, 0], [0, 0]], np.float32
    )  # the last one: terminated
    rewards = np.array([[0, 9], [1, 9], [0, 9], [-1, 9], [1, 9], [3, 9]], np.float32)
    # TD errors with gamma = 1/2: 0, -1, 2, -4, 0, 1; advantages with gamma * lambda = 1/4, from the end:
    # 1, 0.25, -3.9375, 1.015625, -0.74609375, -0.1865234375
    scorer = StepScorer(s, gamma=0.5, gae_lambda=0.5)
    (episode,) = steps_of(scorer, levels, values, next_values, rewards, dones)
    mean = (1 + 0.25 + 3.9375 + 1.015625 + 0.74609375 + 0.1865234375) / 6
    assert episode.tolist() == (0, 2, 6, pytest.approx(mean), pytest.approx(3.9375), True, 4)
    assert (
        s.scores[2] == pytest.approx(mean)
        and s.seen.tolist() == [False, False, True]
        and s.best_returns([2]) == 4
    )
    (episode,) = scorer.step(
        [2, 1], [0, 0], [0, 7], [0, 0], [0, 1]
    )  # truncated: its own next value counts
    assert episode.tolist()[:3] == (1, 1, 7) and episode.total_reward == 54
    last = (
        0.5 * 7
    )  # and the six before have TD error 9 each: advantages 12 - 3 / 4 ** k + 3.5 / 4 ** k, k steps left
    want = [last, *(12 * (1 - 0.25**k) + last * 0.25**k for k in range(1, 7))]
    assert episode.score == pytest.approx(np.mean(want)) and episode.max_score == pytest.approx(
        max(want)
    )


@pytest.mark.parametrize("score", STEP_SCORES)
@given(
    SEEDS,
    st.integers(1, 40),
    st.integers(1, 4),
    st.floats(0.05, 1),
    st.lists(st.integers(1, 39), max_size=3),
)
@settings(repeatable, max_examples=20)
def test_step_by_step_equals_the_whole_rollout(score, seed, steps, envs, end, saves):  # (R5, R13)
    """Also when the sampler goes through a checkpoint in the middle of episodes, as between rollouts of any length."""
    rng = np.random.default_rng(seed)
    values, next_values, rewards = rng.normal(size=(3, steps, envs))
    dones, terminated = rng.random((steps, envs)) < end, rng.random((steps, envs)) < 0.5
    dones[-1] = True
    next_values[:-1] = np.where(
        dones[:-1], next_values[:-1], values[1:]
    )  # after a truncation: of the last observation
    next_values[dones & terminated] = 0
    deltas = rewards + GAE["gamma"] * next_values - values
    advantages = gae_as_a_sum(deltas, dones, GAE["gamma"] * GAE["gae_lambda"])
    first = np.vstack((np.zeros(envs, int), np.cumsum(dones, axis=0)[:-1]))
    levels = first % 2 * envs + np.arange(envs)  # two levels for each environment, in turn
    whole, online = fixed(2 * envs, envs, alpha=0.7), fixed(2 * envs, envs, alpha=0.7)
    regrets, total = np.zeros((steps, envs)), np.zeros(envs)
    for t, i in itertools.product(range(steps), range(envs)):
        total[i] += rewards[t, i]
        if dones[t, i]:
            whole.record_returns([levels[t, i]], total[[i]])
            played = first[:, i] == first[t, i]
            regrets[played, i] = whole.best_returns(levels[t, i]) - values[played, i]
            total[i] = 0
    want = whole.update(levels, STEP_SCORES[score](advantages, deltas, regrets), dones)
    got, scorer = [], StepScorer(online, **GAE, score=STEP_SCORES[score])
    for t in range(steps):
        if t in saves:
            state, open_episodes = (
                through_torch(online.state_dict()),
                through_torch(scorer.state_dict()),
            )
            online = fixed(2 * envs, envs, alpha=0.7, seed=7)
            online.load_state_dict(state)
            scorer = StepScorer(online, **GAE, score=STEP_SCORES[score])
            scorer.load_state_dict(open_episodes)
        got += scorer.step(levels[t], values[t], next_values[t], rewards[t], dones[t]).tolist()
    assert all(
        a[:3] == b[:3] for a, b in zip(sorted(got, key=lambda x: x[0]), want.tolist(), strict=True)
    )
    numbers = [
        [episode[3:5] for episode in x] for x in (sorted(got, key=lambda x: x[0]), want.tolist())
    ]
    np.testing.assert_allclose(*numbers, rtol=0, atol=1e-6)
    np.testing.assert_allclose(online.scores, whole.scores, rtol=0, atol=1e-6)
    np.testing.assert_allclose(online.best_return, whole.best_return)
    assert (
        sum(episode[6] for episode in got) == pytest.approx(rewards.sum())
        and "open" not in online.state_dict()
    )
    assert len(scorer.state_dict()["steps"]) == 0  # nothing is left of episodes that have ended


def test_steps_are_value_l1_unless_told_otherwise():
    a, b = fixed(), fixed()
    row = [0], [1.0], [0.0], [0.3], [True]
    told = StepScorer(b, **GAE, score=STEP_SCORES["value_l1"])
    assert StepScorer(a, **GAE).step(*row).tolist() == told.step(*row).tolist()
    assert a.scores[0] == pytest.approx(0.7)


def test_new_levels_enter_the_buffer_step_by_step():
    s = buffer(4, 3, nu=0.5, rho=0.5)
    s.next_levels(np.ones(3, bool))
    rng, scorer = np.random.default_rng(0), StepScorer(s, **GAE)
    for _ in range(500):
        done = rng.random(3) < 0.3
        scorer.step(s.playing, *rng.random((3, 3)), done)
        s.next_levels(done)
        assert balanced(s) and len(s._candidates) <= 3
        assert (scorer.state_dict()["num_steps"][done] == 0).all()
    assert s.seen.all() and s.counts["evicted"] > 10 and s.counts["replayed"] > 100
    assert (
        s.counts["late"] < 0.1 * s.counts["completed"]
    )  # replayed in one environment, evicted because of another


def test_dropped_steps_are_never_scored():  # (R10)
    s = fixed(3, 2)
    s.next_levels([True, True], levels=[0, 1])
    scorer = StepScorer(s, gamma=1.0, gae_lambda=1.0)
    scorer.step([0, 1], [0, 0], [0, 0], [9, 1], [0, 0])
    scorer.drop([True, False])  # in the sampler too
    assert s.counts["dropped"] == 1 and s.playing.tolist() == [-1, 1]
    s.next_levels([True, False], levels=[0, 0])
    episodes = scorer.step([0, 1], [0, 0], [0, 0], [1, 1], [1, 1])
    assert episodes.steps.tolist() == [1, 2] and s.scores.tolist() == [1, 1.5, 0]
    assert s.best_returns([0, 1]).tolist() == [1, 2] and balanced(s)


def test_dropped_new_levels_are_forgotten():  # (R11) for those who report finished scores only
    s = buffer(3, 2)
    for k in range(100):
        s.next_levels([True, True])
        s.update_scores(s.playing[:1], [k])
        s.drop([False, True])
    assert (
        len(s._candidates) == 0
        and s.counts["dropped"] == 100
        and s.counts["late"] == 0
        and balanced(s)
    )


# ---- ledger ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("envs", [1, 2, 10, 64])
@pytest.mark.parametrize("kind, drop", [("fixed", 0.0), ("buffer", 0.2)])
def test_ledger_balances_at_every_step(kind, drop, envs):  # (R1, R2)
    s = make(kind, envs=envs, level_space=10**6)
    loop = Loop(s, end=0.6, drop=drop)
    while loop.completed < 4_000:
        loop.step()
        got = [s.counts[name] for name in ("started", "completed", "dropped")]
        assert balanced(s) and got == [len(loop.draws), loop.completed, loop.dropped]
    m = s.metrics()
    assert m["started"] == m["completed"] + m["in_progress"] + m["dropped"]


def test_totals_are_the_same_for_1_and_10_environments():  # (R3)
    lengths = np.random.default_rng(0).integers(1, 9, 1000)
    for envs in (1, 10):
        ends = np.cumsum(lengths.reshape(envs, -1), 1) - 1
        dones = np.zeros((ends.max() + 8, envs), bool)
        np.put_along_axis(dones, ends.T, True, 0)
        s = fixed(5, envs)
        rows = [s.next_levels(np.ones(envs, bool)), *map(s.next_levels, dones)]
        episodes = s.update(rows[:-1], np.ones(dones.shape), dones)
        assert s.counts["completed"] == episodes.complete.sum() == 1000
        assert (
            s.counts["started"] == 1000 + envs
            and episodes.steps[episodes.complete].sum() == lengths.sum()
        )


def test_a_dropped_episode_is_never_scored():  # (R10)
    s = fixed(3, 2, stitch_episodes=True)
    s.next_levels([True, True], levels=[0, 1])
    s.update([[0, 1]] * 2, [[9, 1]] * 2, [[0, 0]] * 2)
    s.drop([True, False])
    assert s.playing.tolist() == [-1, 1] and balanced(s)
    s.next_levels([True, False], levels=[0, 0])
    assert s.update([[0, 1]], [[1, 1]], [[1, 1]]).steps.tolist() == [
        1,
        3,
    ] and s.scores.tolist() == [1, 1, 0]


def test_a_drop_in_mid_rollout_loses_no_finished_episode():
    s = buffer(4, 2)
    a, b = s.next_levels([True, True]).tolist()
    c = s.next_levels([True, False])[0]  # a is finished, its score still to come
    s.drop([False, True])
    d = s.next_levels([False, True])[1]
    s.update([[a, b], [c, d]], np.ones((2, 2)), [[1, 1], [0, 0]])
    assert {a, c, d} <= set(s.levels.tolist()) and balanced(s)


# ---- which level next ------------------------------------------------------------------------------------------------


def share(s, n=8000):
    return sum(s.decide_replay() for _ in range(n)) / n


@pytest.mark.parametrize("schedule", ["fixed", "proportionate"])
@pytest.mark.parametrize("kind", ["fixed", "buffer"])
@pytest.mark.parametrize("nu, rho", [(0.5, 0.0), (0.5, 0.5), (0.2, 0.3), (0.0, 1.0), (1.0, 0.2)])
def test_replay_share(schedule, kind, nu, rho):
    s = make(kind, size=10, nu=nu, rho=rho, replay_schedule=schedule)
    assert share(s) == 0
    for level in range(10):
        fill(s, [level], [0.5])
        seen = (level + 1) / 10
        want = 1 - nu if schedule == "fixed" else seen if kind == "fixed" else min(seen, 1 - nu)
        want = 1.0 if kind == "fixed" and seen == 1 else want if seen >= rho else 0.0
        assert abs(share(s, 2000) - want) <= 4.5 * math.sqrt(want * (1 - want) / 2000)


def test_realised_replay_share():
    loop = Loop(buffer(20, 4, nu=0.5, rho=0.5), end=1.0)
    [loop.step() for _ in range(200)]
    before = dict(loop.s.counts)
    [loop.step() for _ in range(1000)]
    assert abs((loop.s.counts["replayed"] - before["replayed"]) / 4000 - 0.5) < 4.5 * math.sqrt(
        0.25 / 4000
    )


def test_one_decision_serves_a_whole_rollout():  # (R7)
    s = fill(buffer(4, 16, rho=0.5, seed=3), range(4), [1, 2, 3, 4])
    decisions = set()
    for _ in range(20):
        replay = s.decide_replay()
        started = s.next_levels(np.ones(16, bool), replay=replay)
        assert (np.isin(started, s.levels) == replay).all()
        decisions.add(replay)
    assert decisions == {True, False}


def test_explicit_levels_start_only_where_done():  # (R8)
    s = fill(buffer(4, 3), [10, 11], [1, 2])
    s.next_levels([True] * 3, levels=[10, 11, 12])
    assert s.next_levels([True, False, True], levels=[77, 88, 99]).tolist() == [77, 11, 99]
    assert s.staleness()[:2].tolist() == [1, 0] and s.counts["replayed"] == s.counts["new"] == 0
    s.update([[77, 11, 99]], [[1, 1, 1]], [[0, 0, 0]])
    assert known(s) == {10: 1, 11: 1, 77: 1, 99: 1}


def test_fixed_set_deals_unseen_levels_until_all_are_seen():
    loop = Loop(fixed(30, 4))  # rho = 1, proportionate: the published Procgen setting
    while not loop.s.seen.all():
        unseen, used = set(np.flatnonzero(~loop.s.seen).tolist()), len(loop.draws)
        loop.rollout()
        assert set(loop.draws[used:]) <= unseen
    assert loop.s.counts["replayed"] == 0
    loop.rollout()
    assert loop.s.counts["replayed"] > 0


def test_sequential_deals_levels_in_order_and_uniform_all_alike():
    s = LevelSampler([5, 3, 8], num_envs=2, seed=1, curriculum="sequential")
    assert [s.next_levels([True, True]).tolist() for _ in range(3)] == [[5, 3], [8, 5], [3, 8]]
    s = fixed(5, curriculum="uniform")
    assert np.abs(np.bincount([s.sample() for _ in range(5000)]) - 1000).max() < 4.5 * math.sqrt(
        5000 * 0.16
    )


SPACES = {"set": {"levels": range(5)}, "buffer": {"buffer_size": 5}, "no buffer": {}}
COMBINATIONS = [
    *itertools.product(SPACES, ("plr", "uniform", "sequential"), ("fixed", "proportionate"))
]


@pytest.mark.parametrize(
    "space, curriculum, schedule", [c for c in COMBINATIONS if c[:2] != ("no buffer", "plr")]
)
def test_every_combination_runs_on_after_all_levels_are_seen(space, curriculum, schedule):
    # (S1) a public method called one that did not exist; (S2) default settings failed once all levels were seen
    s = LevelSampler(
        **SPACES[space], num_envs=3, seed=1, curriculum=curriculum, replay_schedule=schedule
    )
    loop = Loop(s, drop=0.1)
    for _ in range(40):
        loop.rollout()
        s.record_returns(s.playing[s.playing >= 0], np.ones((s.playing >= 0).sum()))
        s.update_scores(s.levels[s.seen], s.scores[s.seen])
        s.load_state_dict(s.state_dict())
        assert (
            math.isclose(s.weights().sum(), s.seen.any())
            and s.best_returns(np.array(loop.draws)).max() <= 1
        )
        assert (
            isinstance(s.decide_replay(), bool) and s.sample() >= 0 and (s.staleness() >= 0).all()
        )
        assert all(np.isscalar(x) and np.isfinite(x) for x in s.metrics().values())
    assert s.seen.all() and balanced(s) and (s.counts["replayed"] > 0) == (curriculum == "plr")


def test_metrics():
    s = fill(buffer(4, staleness_coef=1.0), [7, 8], [1.0, 3.0])
    m = s.metrics()
    assert (m["seen_share"], m["score_mean"], m["score_max"], m["staleness_max"]) == (
        0.5,
        2.0,
        3.0,
        1,
    )
    assert (
        m["effective_levels"] == pytest.approx(1)
        and m["staleness_mean"] == 0.5
        and m["replay_share"] == 0
    )


# ---- buffer ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "alpha, weighting", [(1.0, (0.3, 0.1, 1.0)), (0.5, (0.1, 1.0, 2.0)), (0.5, (1.0, 1.0, 1.0))]
)
def test_buffer_equals_a_plain_simulation(alpha, weighting, seed):
    names = ("staleness_coef", "temperature", "staleness_temperature")
    s = buffer(6, 3, seed=seed, alpha=alpha, level_space=30, rho=0.5, **dict(zip(names, weighting)))
    loop, slow, used = Loop(s, seed, drop=0.2, low=-1.0), SlowBuffer(6, alpha, *weighting), 0
    for _ in range(120):
        arrays, _ = loop.rollout()
        for level in loop.draws[used:]:
            slow.drawn(level)
        used = len(loop.draws)
        slow.update(
            [(level, mean) for _, level, _, mean, *_ in slow_segments(*arrays, {})],
            s.playing.tolist(),
        )
        assert (
            known(s) == pytest.approx(slow.score, abs=1e-12)
            and {k: s.counts[k] for k in COUNTS} == slow.counts
        )
        assert s.staleness()[s.seen].tolist() == [
            slow.age[level] for level in s.levels[s.seen].tolist()
        ]
    assert min(slow.counts["evicted"], slow.counts["rejected"]) > 5


def full(**options):
    """A buffer of 3 whose lowest replay probability is level 12's: equal staleness weights, lowest score."""
    return fill(
        buffer(3, **{**RANK, "staleness_transform": "constant", **options}),
        [10, 11, 12],
        [3.0, 2.0, 1.0],
    )


@pytest.mark.parametrize("score, count", [(0.9, "rejected"), (1.0, "evicted"), (1.1, "evicted")])
def test_a_new_level_needs_a_score_at_least_as_high(score, count):
    s = fill(full(), [20], [score])
    assert (s.counts[count], (20 in s.levels), (12 in s.levels)) == (
        1,
        count == "evicted",
        count == "rejected",
    )


def test_the_lowest_replay_probability_is_evicted_not_the_lowest_score():
    s = full(staleness_coef=1.0, staleness_transform="power")
    s.next_levels(
        [True], levels=[10]
    )  # the youngest, least probable now, though its score is the highest
    assert fill(s, [20], [2.5]).levels.tolist() == [10, 11, 12] and s.counts["rejected"] == 1
    s.next_levels([True], levels=[10])
    assert fill(s, [20], [3.5]).levels.tolist() == [20, 11, 12]


@pytest.mark.parametrize("score, gone", [(9.0, 12), (0.0, 20)], ids=["evicted", "rejected"])
def test_a_late_score_changes_nothing(
    score, gone
):  # (R11, D6) it overwrote the level that had taken the slot
    s = fill(full(), [20], [score])
    before = s.state_dict()
    s.update_scores([gone, gone], [42.0, 43.0])
    s.record_returns([gone], [42.0])
    before["counts"]["late"] += 2
    np.testing.assert_equal(s.state_dict(), before)


@pytest.mark.parametrize("score", [0.0, -0.5])
def test_a_new_level_with_a_score_of_0_or_less_enters(
    score,
):  # (D8) such tails stayed staged for ever
    s = buffer(3)
    level = s.next_levels([True])[0]
    play(s, [level] * 2, [score] * 2, [0, 0])
    assert known(s) == {level: score} and len(s._candidates) == 0


@pytest.mark.parametrize("kind", ["buffer", "stitched"])
def test_memory_is_bounded_and_ids_are_unique(kind):  # (R11)
    s = make(kind, envs=4, nu=0.9)
    loop = Loop(s, steps=4, end=0.5, drop=0.2)
    for _ in range(600):
        loop.rollout()
        kept = s.levels[s.levels >= 0]
        assert len(s._candidates) <= 4 and not set(kept.tolist()) & set(s._candidates)
        assert len(np.unique(kept)) == len(kept)
    assert s.counts["new"] > 2400 and s.counts["evicted"] > 40


def test_a_new_level_in_play_may_be_dealt_again():  # a small level space would leave none, and a loop without end
    s, draws = fill(buffer(3, 8, level_space=4), [0, 1, 2], [1, 1, 1]), iter([0, 1, 2, 3] * 8)
    s.rng = SimpleNamespace(integers=lambda n, size: np.array(list(itertools.islice(draws, size))))
    assert s.next_levels(np.ones(8, bool), replay=False).tolist() == [3] * 8


def test_new_levels_are_never_in_the_buffer():
    s = buffer(8, level_space=12)
    for k in range(300):
        level = s.sample(replay=False)
        assert 0 <= level < 12 and level not in s.levels
        s.update_scores([level], [k])


def test_no_level_is_not_a_level():
    s = buffer(3)
    for call in (lambda: play(s, [-1], [0.5], [1]), lambda: s.next_levels([True], levels=[-1])):
        with pytest.raises(ValueError, match="level"):
            call()
    assert not s.seen.any() and s.num_seen == 0 and balanced(s)


# ---- large level ids -------------------------------------------------------------------------------------------------

# They went through float64, which has no 2**53 + 1, and searchsorted makes float64 of uint64 beside int64.
LARGE = [2**53, 2**53 + 1, 2**53 + 2, 2**62 + 1, 2**63 - 2, 2**63 - 1]


@pytest.mark.parametrize("dtype", [np.int64, np.uint64])
@pytest.mark.parametrize("kind", ["fixed", "buffer"])
@pytest.mark.parametrize("feed", ["update", "stitched", "update_scores", "StepScorer"])
def test_large_levels_stay_apart(kind, dtype, feed):
    levels, scores = np.array(LARGE, dtype), np.arange(6.0)
    space = {"levels": levels} if kind == "fixed" else {"buffer_size": 6}
    s = LevelSampler(**space, num_envs=6, seed=1, stitch_episodes=feed == "stitched", alpha=0.5)
    s.next_levels(np.ones(6, bool), levels=levels)
    assert s.playing.tolist() == LARGE
    s.record_returns(levels, scores - 1)
    if feed == "update":
        s.update([levels], [scores], np.ones((1, 6)))
    elif feed == "stitched":
        s.update([levels], [scores], np.zeros((1, 6)))
        s.update([levels], [scores], np.ones((1, 6)))
    elif feed == "update_scores":
        s.update_scores(levels, scores)
    else:
        scorer = StepScorer(s, gamma=0.0, gae_lambda=0.0)
        scorer.step(levels, np.zeros(6), np.zeros(6), scores, np.zeros(6))
        saved, scorer = through_torch(scorer.state_dict()), StepScorer(s, gamma=0.0, gae_lambda=0.0)
        scorer.load_state_dict(saved)
        assert (
            scorer.step(levels, np.zeros(6), np.zeros(6), scores, np.ones(6)).level.tolist()
            == LARGE
        )
    alpha = 0.5 if kind == "fixed" else 1  # a new level's first score is its mean
    assert known(s) == dict(zip(LARGE, (alpha * scores).tolist())) and s.counts["late"] == 0
    best = scores - 1 if feed != "StepScorer" else np.maximum(scores - 1, 2 * scores)
    assert s.best_returns(levels[None], -9.0).tolist() == [best.tolist()]
    assert s.best_returns(levels[1], -9.0) == best[1]


def test_a_tail_is_not_resumed_by_the_next_large_level():
    s = LevelSampler(LARGE, num_envs=1, seed=1, stitch_episodes=True)
    play(s, [2**53 + 1], [5.0], [0])
    assert play(s, [2**53], [1.0], [1]).steps.tolist() == [1]


@pytest.mark.parametrize("kind", ["buffer", "stitched"])
def test_a_large_level_space_is_scored_and_restored(kind):
    small, a = (
        Loop(make(kind, size=50, envs=8, level_space=n), steps=4, score_tails=False)
        for n in (2**31, 2**62)
    )
    for _ in range(60):
        small.rollout(), a.rollout()
    for count in ("late", "evicted", "completed"):
        assert (
            a.s.counts[count] == pytest.approx(small.s.counts[count], rel=0.2)
            and a.s.counts[count] > 50
        )
    b = copy.deepcopy(a)
    b.s = make(kind, size=50, envs=8, level_space=2**62, seed=2)
    b.s.load_state_dict(through_torch(a.s.state_dict()))
    assert len(a.s._candidates) > 0
    for _ in range(10):
        a.rollout(), b.rollout()
    assert a.draws == b.draws
    np.testing.assert_equal(b.s.state_dict(), a.s.state_dict())


@pytest.mark.parametrize("kind", ["fixed", "buffer"])
@pytest.mark.parametrize(
    "bad", ["negative", "uint64", "beyond", "half", "nan", "rounded", "float32", "bool", "text"]
)
def test_what_is_no_level_is_refused(kind, bad):
    """uint64 numbers from 2**63 on became negative, halves the level below, nan -2**63."""
    values = {
        "negative": [-1],
        "uint64": np.array([2**63], np.uint64),
        "beyond": [2**64],
        "half": [0.5],
    }
    values |= {"nan": [math.nan], "rounded": [2.0**53], "float32": np.array([2**24], np.float32)}
    values |= {"bool": [True], "text": ["1"]}
    level = values[bad]
    s = fill(make(kind, size=3), [0, 1], [1.0, 2.0])
    scorer, row = StepScorer(s, **GAE), ([0.0], [0.0], [0.0], [False])
    calls = [
        lambda: s.next_levels([True], levels=level), lambda: s.update([level], [[1.0]], [[True]]),
        lambda: s.update_scores(level, [1.0]), lambda: s.record_returns(level, [1.0]), lambda: s.best_returns(level),
        lambda: scorer.step(level, *row), lambda: LevelSampler(level, num_envs=1, seed=1),
    ]  # fmt: skip
    before = copy.deepcopy((s.state_dict(), scorer.state_dict()))
    for call in calls:
        with pytest.raises(
            ValueError, match="levels must be integers from 0 to 2\\*\\*63 - 1, not"
        ):
            call()
    np.testing.assert_equal((s.state_dict(), scorer.state_dict()), before)


def test_levels_may_come_as_floats_that_are_integers():
    s = fixed(3)
    play(s, [2.0, 2.0], [0.5, 1.5], [0, 1])
    s.record_returns(np.array([2], np.float32), [3.0])
    assert known(s) == {2: 1.0} and s.best_returns([2.0]) == 3.0


# ---- MaxMC -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fixed", "buffer"])
def test_best_return_is_the_highest_so_far(kind):
    s = fill(make(kind, size=3), [0, 1], [1, 1])
    s.record_returns(np.array([0, 1, 0]), np.array([-5.0, -2.0, -3.0]))
    s.record_returns(np.array([0]), np.array([-4.0]))
    assert s.best_returns(np.array([[0, 1], [2, 0]]), default=-9.0).tolist() == [[-3, -2], [-9, -3]]
    assert s.best_returns(np.array([2])).tolist() == [0]


def test_best_returns_of_candidates_and_of_the_buffer_at_once():
    s = fill(buffer(20, 8, level_space=100), range(0, 40, 2), range(20))
    candidates = [71, 3, 33, 5, 97, 51, 49, 1]
    s.next_levels(np.ones(8, bool), levels=candidates)
    best = {level: -level / 7 for level in (*range(0, 40, 4), *candidates[:-1])}
    s.record_returns(list(best), list(best.values()))
    levels = np.random.default_rng(0).integers(100, size=(30, 40))
    want = [[best.get(level, 9.0) for level in row] for row in levels.tolist()]
    assert s.best_returns(levels, 9.0).tolist() == want
    assert (
        s.best_returns(levels[0, 0], 9.0) == want[0][0] and s.best_returns([], 9.0).tolist() == []
    )


def test_best_return_follows_the_level():
    s = full()
    s.record_returns([10, 11, 12], [1.0, 2.0, 3.0])
    s.next_levels([True], levels=[20])
    s.record_returns([20], [-7.0])  # before its first score
    s.next_levels([True], levels=[20])
    assert s.best_returns(np.array([20])) == s.best_returns([20]) == s.best_returns(20) == -7
    s.update_scores([20], [9.0])
    fill(s, [21], [9.0])
    assert 12 not in s.levels and 11 not in s.levels
    assert s.best_returns(np.array([10, 11, 12, 20, 21]), -1.0).tolist() == [1, -1, -1, -7, -1]


@pytest.mark.parametrize("options", [{"stitch_episodes": True}, {}], ids=["stitched", "no tails"])
def test_best_return_of_an_episode_that_spans_rollouts(options):  # (R13)
    s = buffer(3, **options)
    level = s.next_levels([True])
    play(s, [level[0]] * 2, [1.0, 2.0], [0, 0], score_tails=False)
    assert s.best_returns(level, -9.0) == -9 and level not in s.levels
    s.record_returns(level, [-4.0])  # the whole episode's return, at its end
    play(s, [level[0]] * 2, [3.0, -10.0], [0, 1], score_tails=False)
    assert s.best_returns(level, -9.0) == s.best_return[0] == -4 and level in s.levels


def play_and_record(s, level, returns, score=None):
    """A new or replayed episode on the level for each of returns, then its score."""
    for x in returns:
        s.next_levels([True], levels=[level])
        s.record_returns([level], [x])
    if score is not None:
        s.update_scores([level], [score])


def test_learnability_by_hand():
    s = buffer(3)
    play_and_record(s, 7, [0.0, 0.9, 0.0, 0.5])  # a candidate
    assert s.learnability([7]) == 0.5 * 0.5
    s.update_scores([7], [1.0])  # in the buffer
    assert s.learnability([7]) == 0.25 and s.episodes[s.levels == 7] == 4
    play_and_record(s, 7, [0.7, 0.6, -1.0, 0.1])
    assert s.learnability(7) == pytest.approx(5 / 8 * 3 / 8)
    play_and_record(s, 7, [0.2] * 6)  # the last ten have 9 successes
    assert s.learnability(7) == pytest.approx(0.9 * 0.1) and s.episodes[s.levels == 7] == 14
    play_and_record(s, 8, [0.3])
    levels = np.array([[7, 8, 7], [9, 7, 7]])  # one episode, and none, say nothing
    want = [[0.09, 0, 0.09], [0, 0.09, 0.09]]
    np.testing.assert_allclose(s.learnability(levels), want)
    assert s.learnability(levels).dtype == np.float64 and s.learnability([]).shape == (0,)


def test_the_variance_of_returns_by_hand_and_as_learnability():
    s = fixed(3, returns_kept=4)
    s.record_returns([0, 1, 0, 0, 1, 0, 0], [9.0, 0.0, 1.0, 2.0, 1.0, 3.0, 6.0])
    assert s.return_variance([0, 1, 2]).tolist() == [3.5, 0.25, 0]  # of 1, 2, 3, 6: mean 3
    s.record_returns([1, 1], [1.0, 1.0])
    assert s.return_variance(1) == s.learnability(1) == 0.75 * 0.25


def test_a_loop_of_ones_own_scores_by_learnability():
    s = buffer(3)
    for level, returns in ((1, [0, 0, 1]), (2, [0, 1]), (3, [1, 1])):
        play_and_record(s, level, returns)
        s.update_scores([level], s.learnability([level]))
    assert dict(zip(s.levels.tolist(), s.scores.round(6).tolist())) == {
        1: pytest.approx(2 / 9), 2: 0.25, 3: 0,
    }  # fmt: skip


def test_returns_are_evicted_rejected_and_dropped_with_their_level():
    s = full()
    s.record_returns([10, 10, 11, 12], [0.0, 1.0, 1.0, 1.0])
    play_and_record(s, 20, [1.0, 0.0, 0.0], score=9.0)
    play_and_record(s, 21, [0.0, 1.0], score=9.0)
    held = s.levels.tolist()
    want = {20: 2 / 9, 21: 0.25, 10: 0.25, 11: 0, 12: 0}
    np.testing.assert_allclose(s.learnability(s.levels), [want[level] for level in held])
    gone = [level for level in want if level not in held]
    assert gone and (s.learnability(gone) == 0).all()
    play_and_record(s, 30, [0.0, 1.0], score=-5.0)  # rejected
    s.next_levels([True], levels=[31])
    s.record_returns([31, 31], [0.0, 1.0])
    assert s.learnability([30, 31]).tolist() == [0, 0.25]
    s.drop([True])
    s.next_levels([True], levels=[31])
    assert s.learnability([31]) == 0


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(["fixed", "buffer"]),
    st.integers(1, 4),
    st.sampled_from([copy.deepcopy, through_torch]),
)
@settings(max_examples=20, deadline=None)
def test_remembered_returns_equal_plain_lists(seed, kind, kept, through):
    """Through recordings of many episodes at once, entry into the buffer, eviction, and a state
    restored at every round."""
    rng = np.random.default_rng(seed)
    s = make(kind, size=4, envs=3, returns_kept=kept)
    memory: dict[int, list[float]] = {}
    for _ in range(12):
        playing = s.next_levels(np.ones(3, bool))
        new = make(kind, size=4, envs=3, returns_kept=kept)
        new.load_state_dict(through(s.state_dict()))
        np.testing.assert_equal(new.state_dict(), s.state_dict())
        s = new
        levels = rng.choice(playing, rng.integers(0, 12))
        returns = rng.choice([-1.0, 0.0, 0.5, 1.0], len(levels))
        s.record_returns(levels, returns)
        for level, value in zip(levels.tolist(), returns.tolist()):
            memory.setdefault(level, []).append(value)
        for level in playing.tolist():
            last = memory.get(level, [])[-kept:]
            p = np.mean(np.array(last) > 0) if last else 0
            assert s.learnability(level) == pytest.approx(p * (1 - p))
            assert s.return_variance(level) == pytest.approx(np.var(last) if last else 0)
        s.update_scores(playing, rng.normal(size=3))
        s.update(playing[None], np.zeros((1, 3)), np.zeros((1, 3)), score_tails=False)
        held = set(s.levels.tolist()) if kind == "buffer" else memory.keys()
        memory = {level: x for level, x in memory.items() if level in held}
        for level, episodes in zip(s.levels.tolist(), s.episodes.tolist()):
            assert episodes == len(memory.get(level, []))
            best = max(memory.get(level, []), default=-9)
            assert level < 0 or s.best_returns(level, -9) == best


# ---- ergonomics ------------------------------------------------------------------------------------------------------

BAD_OPTIONS = [
    *(
        ({name: "nope"}, name)
        for name in ("curriculum", "score_transform", "staleness_transform", "replay_schedule")
    ),
    *(
        ({name: bad}, name)
        for name in ("eps", "staleness_coef", "rho", "nu", "alpha")
        for bad in (-0.1, 1.1, math.nan)
    ),
    *(
        ({name: bad}, name)
        for name in ("temperature", "staleness_temperature", "num_envs")
        for bad in (0, -1)
    ),
    *(({"levels": bad}, "levels") for bad in ([], [1, 1], [-1, 2], [0.5, 1.5], None)),
    ({"alpha": 0.0}, "alpha"),
    ({"buffer_size": 3}, "buffer_size"),
    ({"levels": None, "buffer_size": -3}, "buffer_size"),
    (
        {"levels": None, "buffer_size": 8, "level_space": 8},
        "level_space",
    ),  # no new level could ever be found
    (
        {"levels": None, "buffer_size": 8, "level_space": 2**63},
        "level_space",
    ),  # int64 cannot hold all of them
]


@pytest.mark.parametrize("options, name", BAD_OPTIONS, ids=str)
def test_bad_options_are_named(options, name):
    with pytest.raises(ValueError, match=name):
        LevelSampler(**{"levels": range(3), "num_envs": 2, "seed": 1, **options})


ZEROS, DONE = np.zeros((3, 2)), np.ones((3, 2))
NAN_TAIL = np.array([[1, 1], [1, 1], [1, np.nan]])
MT19937 = np.random.MT19937(1).state


def changed(s, part, name, value):
    """The sampler's state with one array replaced, or left out."""
    state = s.state_dict()
    state[part][name] = value
    if value is None:
        del state[part][name]
    return state


BAD_CALLS = {
    "done": ("done", lambda s: s.next_levels([True])),
    "done scalar": ("done", lambda s: s.next_levels(True)),
    "explicit levels": ("levels", lambda s: s.next_levels([True, True], levels=[0])),
    "explicit levels, none done": ("levels", lambda s: s.next_levels([False, False], levels=[0])),
    "drop": ("shape", lambda s: s.drop([True])),
    "update envs": ("levels.*shape", lambda s: s.update(ZEROS[:, :1], ZEROS[:, :1], ZEROS[:, :1])),
    "update 1-d": ("levels.*shape", lambda s: s.update(ZEROS[0], ZEROS[0], ZEROS[0])),
    "update no steps": ("levels.*shape", lambda s: s.update(ZEROS[:0], ZEROS[:0], ZEROS[:0])),
    "update scores": ("step_scores.*shape", lambda s: s.update(ZEROS, ZEROS[:2], DONE)),
    "update dones": ("dones.*shape", lambda s: s.update(ZEROS, ZEROS, DONE[:2])),
    "update nan": ("scores.*nan", lambda s: s.update(ZEROS, NAN_TAIL, DONE)),
    "update inf": ("scores.*nan", lambda s: s.update(ZEROS, ZEROS + np.inf, DONE)),
    "update nan tail": ("scores.*nan", lambda s: s.update(ZEROS, NAN_TAIL, ZEROS)),
    "update nan tail left out": (
        "scores.*nan",
        lambda s: s.update(ZEROS, NAN_TAIL, ZEROS, score_tails=False),
    ),
    "level changes": ("level changes", lambda s: s.update([[0, 0], [0, 1], [0, 1]], ZEROS, ZEROS)),
    "update_scores": ("scores", lambda s: s.update_scores([0, 1], [0.5])),
    "update_scores 2-d": ("scores", lambda s: s.update_scores([[0, 1]], [[0.5, 0.5]])),
    "record_returns": ("returns", lambda s: s.record_returns([0, 1], [0.5])),
    "replay": ("replay", lambda s: s.next_levels([True, True], replay=True)),
    # (S5) the score of an unknown level landed on the last level
    "unknown start": ("level 7", lambda s: s.next_levels([True, True], levels=[7, 7])),
    "unknown episode": ("level 7", lambda s: s.update([[2, 7]], [[1, 1]], [[0, 1]])),
    "unknown tail": (
        "level 7",
        lambda s: s.update([[2, 7]], [[1, 1]], [[0, 0]], score_tails=False),
    ),
    "unknown score": ("level 7", lambda s: s.update_scores([0, 7], [1.0, 1.0])),
    "unknown return": ("level 7", lambda s: s.record_returns([7], [1.0])),
    "unknown best return": ("level 7", lambda s: s.best_returns([7])),
    "other state": (
        "state",
        lambda s: s.load_state_dict(make("fixed", size=3, envs=1).state_dict()),
    ),
    "other levels": (
        "state",
        lambda s: s.load_state_dict(LevelSampler([0, 1, 3], num_envs=2, seed=1).state_dict()),
    ),
    "no state": ("state", lambda s: s.load_state_dict({})),
    "an older state": (
        "state",
        lambda s: s.load_state_dict({**s.state_dict(), "staged": np.zeros((0, 3))}),
    ),
    "part of a state": (
        "state",
        lambda s: s.load_state_dict(changed(s, "arrays", "_tail_sum", None)),
    ),
    "other types": (
        "state",
        lambda s: s.load_state_dict(changed(s, "arrays", "_tail_level", np.full(2, -1.0))),
    ),
    "other shape": (
        "state",
        lambda s: s.load_state_dict(changed(s, "arrays", "scores", np.zeros(2))),
    ),
    "other generator": ("state", lambda s: s.load_state_dict({**s.state_dict(), "rng": MT19937})),
    "torn candidates": (
        "state",
        lambda s: s.load_state_dict(changed(s, "candidates", "levels", np.arange(2))),
    ),
    "state of a set": ("state", lambda s: buffer(3, 2).load_state_dict(s.state_dict())),
}


@pytest.mark.parametrize("name", BAD_CALLS)
@pytest.mark.parametrize("stitch", [False, True], ids=["", "stitched"])
def test_bad_calls_are_named_and_change_nothing(name, stitch):
    message, call = BAD_CALLS[name]
    s = fixed(3, 2, stitch_episodes=stitch)
    s.update([[2, 2]], [[1, 1]], [[0, 0]], score_tails=False)  # leaves open tails if stitched
    before = s.state_dict()
    with pytest.raises(ValueError, match=message):
        call(s)
    np.testing.assert_equal(s.state_dict(), before)


BAD_STEPS = {
    "shape": ("shape", lambda x: x.step([2], [0], [0], [0], [0])),
    "nan": ("finite", lambda x: x.step([2, 2], [0, 0], [0, math.nan], [0, 0], [0, 0])),
    "infinite": ("finite", lambda x: x.step([2, 2], [0, 0], [0, 0], [0, math.inf], [0, 0])),
    "unknown": ("level 7", lambda x: x.step([2, 7], [0, 0], [0, 0], [0, 0], [0, 0])),
    "level changes": ("level changes", lambda x: x.step([2, 1], [0, 0], [0, 0], [0, 0], [0, 0])),
    "drop": ("shape", lambda x: x.drop([True])),
    "other state": ("state", lambda x: x.load_state_dict(StepScorer(fixed(3), **GAE).state_dict())),
    "state of the sampler": ("state", lambda x: x.load_state_dict(x.sampler.state_dict())),
    "state cut short": (
        "state",
        lambda x: x.load_state_dict({**x.state_dict(), "steps": np.zeros((1, 3))}),
    ),
}


@pytest.mark.parametrize("name", BAD_STEPS)
def test_bad_steps_are_named_and_change_nothing(name):
    message, call = BAD_STEPS[name]
    scorer = StepScorer(fixed(3, 2), **GAE)
    scorer.step([2, 2], [0, 0], [0, 0], [0, 0], [0, 0])  # leaves open episodes
    before = scorer.state_dict(), scorer.sampler.state_dict()
    with pytest.raises(ValueError, match=message):
        call(scorer)
    np.testing.assert_equal((scorer.state_dict(), scorer.sampler.state_dict()), before)


@pytest.mark.parametrize(
    "kind, want", [("max", [0, 0, 0.5, 0.5]), ("eps_greedy", [1 / 19, 0, 17 / 19, 1 / 19])]
)
def test_the_stalest_of_the_seen_levels_is_the_maximum(kind, want):
    """It was that of all levels: with an unseen one the stalest, all seen levels were alike."""
    rows = [(0, True, 4), (0, False, 99), (0, True, 7), (0, True, 7)]
    s = with_levels(rows, staleness_coef=1.0, staleness_transform=kind, eps=0.2)
    np.testing.assert_allclose(s.weights(), want)


def test_power_refuses_negative_scores():
    s = fixed(score_transform="power")
    with pytest.raises(ValueError, match="power"):
        play(s, [0], [-1.0], [1])
    assert not s.seen.any()


def test_the_sampler_needs_numpy_only():  # (R12)
    code = "import sys, plr_sampler; sys.exit(bool({'torch', 'gym', 'gymnasium', 'procgen'} & {*sys.modules}))"
    root = Path(__file__).resolve().parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
