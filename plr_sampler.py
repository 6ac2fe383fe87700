"""Prioritized Level Replay: which level should be played next?

NumPy only. It knows nothing of environments and networks; copy this file next to any training loop.

    sampler = LevelSampler(levels=range(200), num_envs=64, seed=1)  # a fixed set of levels
    sampler = LevelSampler(buffer_size=4000, num_envs=64, seed=1)  # or a buffer, unlimited levels
    levels = sampler.next_levels(np.ones(64, bool))  # (N,) the level each environment starts with
    levels = sampler.next_levels(done)  # during a rollout: a new one where done
    sampler.update(played_levels, step_scores, dones)  # after it, from arrays of shape (T, N)
    sampler.update_scores(played_levels, scores)  # or one score per episode, however you got it

The sampler also remembers returns: of each level the best and the last few, from which come the
best return (`best_returns`, for MaxMC) and learnability, as scores for either of the two above:

    sampler.record_returns(ended_levels, returns)  # (n,) each: of the episodes that have ended
    sampler.update_scores(ended_levels, sampler.learnability(ended_levels))

For a loop that keeps no rollout, StepScorer at the end of this file scores episodes step by step.

Papers: PLR, Jiang et al. 2021 (arXiv 2010.03934); Robust PLR, Jiang et al. 2021 (arXiv 2110.02439).
Names: the PLR paper's rho is `staleness_coef` here and its beta is `temperature`, as in every
published code base; `rho` here is the share of levels that must have been scored before replay may
start, as in the released code.
"""

import functools
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy import ndarray

TRANSFORMS = ("constant", "max", "eps_greedy", "rank", "power", "softmax")
CHOICES = {
    "curriculum": ("plr", "uniform", "sequential"),
    "replay_schedule": ("fixed", "proportionate"),
    "score_transform": TRANSFORMS,
    "staleness_transform": TRANSFORMS,
}

# An episode that was scored, or the part of one that lies in a rollout.
EPISODE = np.dtype(
    [
        ("env", np.int64),
        ("level", np.int64),
        ("steps", np.int64),
        ("score", np.float64),  # mean over its steps
        ("max_score", np.float64),
        ("complete", np.bool_),  # False if the end of a rollout cut it off
        ("total_reward", np.float64),  # nan but from StepScorer
    ]
)


class NewLevel(NamedTuple):
    """A level that the buffer does not hold: drawn, not yet scored."""

    number: int  # 1 for the first new level that was drawn
    best_return: float = np.nan  # nan before an episode has finished
    episodes: int = 0  # that have finished
    returns: tuple[float, ...] = ()  # the last ones


def require(condition: Any, message: str) -> None:
    """Raises ValueError with this message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def as_levels(levels: Any) -> ndarray:
    """Level ids, any shape -> int64 of that shape, exactly; ValueError for what is no level id.

    A float is refused where its precision may have cost digits: float64 from 2**53 on.
    """
    levels = np.asarray(levels)
    if levels.size == 0:
        return levels.astype(np.int64)
    message = "levels must be integers from 0 to 2**63 - 1"
    require(levels.dtype.kind in "iuf", f"{message}, not {levels.dtype}")
    largest = 2**63 - 1
    valid = levels >= 0
    if levels.dtype.kind == "f":
        largest = min(largest, 2 ** (np.finfo(levels.dtype).nmant + 1) - 1)
        valid &= levels == np.floor(levels)
    valid &= levels <= largest
    if not valid.all():
        raise ValueError(f"{message}, not {levels[~valid][0]} ({levels.dtype})")
    return levels.astype(np.int64)


def layout(state: Any) -> Any:
    """Keys and types of a nested state; an array's is its dtype, a tensor's that of its array."""
    if isinstance(state, dict):
        return {key: layout(value) for key, value in state.items()}
    if hasattr(state, "__array__"):
        return np.asarray(state).dtype
    return type(state)


def transform(
    x: ndarray, kind: str, temperature: float, eps: float, offset: float, among: ndarray
) -> ndarray:
    """Probabilities proportional to h(x), PLR's eq. 3, over the entries `among` x.

    x (n,), among (k,) indices in order -> (k,) float64 that sum to 1; uniform if all h(x) are 0.

    constant:   1
    max:        1 for every maximum
    eps_greedy: 1 - eps for the first maximum, and eps / n for each
    rank:       (1 / rank) ** (1 / temperature), rank 1 the highest, ties in index order
    power:      (x + offset) ** (1 / temperature), x >= 0: a negative x has no fractional power
    softmax:    exp(x / temperature)

    The entries that are not `among` take ranks too, unless -inf, and count in eps_greedy's n.
    """
    y = x[among]
    if kind == "constant":
        w = np.ones(len(y))
    elif kind == "max":
        w = (y == y.max()).astype(np.float64)
    elif kind == "eps_greedy":
        w = np.full(len(y), eps / len(x))
        w[y.argmax()] += 1 - eps
    elif kind == "rank":
        w = rank_weights(len(x), temperature)[ranks(x)[among] - 1]
    elif kind == "power":
        y = np.maximum(y, 0) + offset
        largest = y.max()
        if largest > 0:
            y /= largest  # at most 1: no overflow
        w = y ** (1 / temperature)
    else:
        w = np.exp((y - y.max()) / temperature)  # at most 1: no overflow
    total = w.sum()
    if total > 0:
        return w / total
    return np.full(len(w), 1 / len(w))


@functools.lru_cache(maxsize=8)
def rank_weights(n: int, temperature: float) -> ndarray:
    """(1 / rank) ** (1 / temperature) of the ranks 1 to n, (n,) float64: a power takes its time."""
    return np.arange(1.0, n + 1) ** (-1 / temperature)


def ranks(x: ndarray) -> ndarray:
    """The rank of each of x (n,) -> (n,) int64: 1 the highest, ties in index order."""
    order = np.argsort(-x)  # several times faster than a stable sort, which only ties need
    if (x[order][1:] == x[order][:-1]).any():
        order = np.argsort(-x, kind="stable")
    rank = np.empty(len(x), np.int64)
    rank[order] = np.arange(1, len(x) + 1)
    return rank


def invert(cdf: ndarray, u: ndarray) -> ndarray:
    """Inverse transform sampling: the first index where cdf (n,) exceeds u times its total.

    u in [0, 1), any shape -> int64 of that shape. u * total stays below total when rounded, too.
    """
    return cdf.searchsorted(u * cdf[-1], side="right")


def lookup(levels: ndarray, known: ndarray, order: ndarray) -> ndarray:
    """Where each of levels is in known (n,), any shape -> int64 of that shape; -1: not there.

    known is sorted; order (n,) int64 says where each of it was before.
    """
    if len(known) == 0:
        return np.full(levels.shape, -1)
    at = known.searchsorted(levels)
    at = np.minimum(at, len(known) - 1)
    return np.where(known[at] == levels, order[at], -1)


def spread(function: Callable[[ndarray], ndarray], levels: ndarray) -> ndarray:
    """function of levels, (n,) -> (n,), at levels of any shape; it is asked once where a level
    stands many times in a row, as each environment's does in (T, N)."""
    by_env = levels.T.ravel()
    first = np.append(True, by_env[1:] != by_env[:-1])[: len(by_env)]
    run = np.cumsum(first) - 1
    return function(by_env[first])[run].reshape(levels.T.shape).T


def split_episodes(levels: ndarray, step_scores: ndarray, dones: ndarray) -> np.recarray:
    """Cuts a rollout into episodes and parts of episodes, one environment after another.

    levels int64, step_scores float64, dones bool, (T, N) each -> records of EPISODE, whose `score`
    is still the sum over the steps. ValueError if a level changes within an episode.
    """
    num_steps = len(levels)
    level = levels.T.ravel()  # (N * T,), one environment after another
    score = step_scores.T.ravel()
    done = dones.T.ravel()
    last_steps = np.arange(num_steps - 1, len(done), num_steps)  # of each environment
    ends = np.union1d(np.flatnonzero(done), last_steps)
    starts = np.append(0, ends[:-1] + 1)
    episodes = np.recarray(len(ends), EPISODE)
    episodes.env = starts // num_steps
    episodes.level = level[starts]
    episodes.steps = ends - starts + 1
    episodes.score = np.add.reduceat(score, starts)
    episodes.max_score = np.maximum.reduceat(score, starts)
    episodes.complete = done[ends]
    episodes.total_reward = np.nan
    same = level == np.repeat(episodes.level, episodes.steps)
    require(same.all(), "a level changes within an episode of step_scores")
    return episodes


@dataclass(eq=False)
class LevelSampler:
    """Scores, staleness and replay of levels: of a fixed set, or of a bounded buffer over many.

    To read, per level of the set or slot of the buffer, (L,): `levels` int64 (-1: empty slot),
    `scores` float64, `seen` bool (has been scored), `best_return` float64 (nan before the first),
    `episodes` int64 that have finished.
    `playing` (N,) int64: each environment's level, or -1.
    `counts`: started = completed + in progress + dropped, at any time.
    """

    # ---- options ----
    levels: Any = None  # ids of a fixed set: distinct integers >= 0. None: an unlimited space
    _: KW_ONLY
    num_envs: int  # N, environments that play at the same time
    seed: int  # of this sampler's own generator; np.random is never touched
    buffer_size: int = 0  # K, levels kept from an unlimited space (0: none, for the baselines)
    level_space: int = 2**31 - 1  # an unlimited space's new levels are drawn from [0, level_space)
    curriculum: str = "plr"  # or the baselines uniform: any level; sequential: level after level
    score_transform: str = "rank"  # h of eq. 3, one of TRANSFORMS
    temperature: float = 0.1  # beta of eq. 3
    eps: float = 0.05  # of eps_greedy
    staleness_coef: float = 0.1  # rho of eq. 5
    staleness_transform: str = "power"  # h_C of eq. 4
    staleness_temperature: float = 1.0
    # fixed: replay with probability 1 - nu; proportionate: with the seen share, and from a buffer
    # at most with 1 - nu
    replay_schedule: str = "proportionate"
    rho: float = 1.0  # share of the levels or slots that must be seen before any is replayed
    nu: float = 0.5  # probability of a new level
    # weight of a new score in a level's running mean, which begins at 0 (in a buffer: at the first
    # score); 1 overwrites
    alpha: float = 1.0
    stitch_episodes: bool = False  # score an episode that spans rollouts as a whole (Algorithm 4)
    returns_kept: int = 10  # returns remembered of each level, the last ones, for learnability

    def __post_init__(self):
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            require(value in allowed, f"{name} {value!r} is not one of {allowed}")
        for name in ("eps", "staleness_coef", "rho", "nu", "alpha"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"{name} {value} is not between 0 and 1")
        for name in ("temperature", "staleness_temperature", "num_envs", "alpha", "returns_kept"):
            value = getattr(self, name)
            require(value > 0, f"{name} {value} is not above 0")
        self.fixed = self.levels is not None
        if self.fixed:
            self.levels = as_levels(self.levels)
            distinct = len(np.unique(self.levels)) == len(self.levels) > 0
            require(distinct, "levels must be distinct, and one at least")
            require(self.buffer_size == 0, "levels of a fixed set come without a buffer_size")
        else:
            self.levels = np.array([-1] * self.buffer_size, np.int64)
        size = len(self.levels)
        if not self.fixed:
            message = f"level_space {self.level_space} must be above {size} levels and below 2**63"
            require(size < self.level_space < 2**63, message)
        message = "plr needs levels or a buffer_size above 0"
        require(size or self.curriculum != "plr", message)

        self.rng = np.random.default_rng(self.seed)
        self.scores = np.zeros(size)
        self.seen = np.zeros(size, bool)
        self.best_return = np.full(size, np.nan)
        self.episodes = np.zeros(size, np.int64)
        # The last returns, nan where there are fewer: that of a level's k-th episode (from 0) is in
        # column k % returns_kept.
        self._returns = np.full((size, self.returns_kept), np.nan)
        self.playing = np.full(self.num_envs, -1, np.int64)
        kinds = (
            "started",  # episodes
            "completed",
            "dropped",  # abandoned by `drop`
            "replayed",  # levels drawn for replay
            "new",  # and others
            "evicted",  # levels that made room in the buffer
            "rejected",  # that found none, as every level there was worth more
            "late",  # scores of levels that had been evicted or rejected meanwhile
        )
        self.counts = dict.fromkeys(kinds, 0)
        # Staleness is the number of draws since a level's own: the clock now minus the clock then.
        self._clock = 0
        self._drawn_at = np.zeros(size, np.int64)
        self._next = 0  # levels dealt so far, if sequential
        self._candidates: dict[int, NewLevel] = {}  # they wait for their first score
        self._num_candidates = 0  # that there ever were
        # Stitching: of each environment's episode in progress when the last rollout ended.
        self._tail_level = np.full(self.num_envs, -1, np.int64)  # -1: none
        self._tail_steps = np.zeros(self.num_envs, np.int64)
        self._tail_sum = np.zeros(self.num_envs)
        self._tail_max = np.zeros(self.num_envs)
        self._index()

    # ---- which level next? (PLR, Algorithm 1) ----------------------------------------------------

    def next_levels(
        self, done: ndarray, replay: bool | None = None, levels: ndarray | None = None
    ) -> ndarray:
        """Starts an episode in every environment where done (N,) bool.

        Returns (N,) int64, the level that each environment plays now. The episode in progress where
        done counts as completed: `drop` it first if it was abandoned. replay: None decides for each
        episode (PLR); a bool imposes one decision (Robust PLR), but not on the baselines, which
        never replay. levels (N,): no draw, start these.
        ValueError for other shapes, unknown levels, and if replay is asked for but none is seen.
        """
        done = self._per_env(done, "done").astype(bool)
        if levels is not None:
            started = as_levels(self._per_env(levels, "levels")[done])
            self._mark_drawn(started)
        elif done.any():
            started = self._sample(int(done.sum()), replay)
        else:
            return self.playing.copy()
        self.counts["started"] += len(started)
        self.counts["completed"] += int((self.playing[done] >= 0).sum())
        self.playing[done] = started
        return self.playing.copy()

    def drop(self, mask: ndarray) -> None:
        """Abandons the episodes in progress where mask (N,) bool: what followed the last `update`
        is never scored."""
        mask = self._per_env(mask, "mask").astype(bool) & (self.playing >= 0)
        self.counts["dropped"] += int(mask.sum())
        still_playing = set(self.playing[~mask].tolist())
        for level in set(self.playing[mask].tolist()) - still_playing:
            self._candidates.pop(level, None)  # nobody will score it
        self.playing[mask] = -1
        self._tail_level[mask] = -1

    def decide_replay(self) -> bool:
        """The replay decision d: True to replay a scored level, False to play a new one."""
        return bool(self._decide_replays(1)[0])

    def _decide_replays(self, k: int) -> ndarray:
        """k decisions, (k,) bool; certain ones take no random number."""
        probability = self._replay_probability()
        if probability in (0, 1):
            return np.full(k, probability == 1)
        return self.rng.random(k) < probability

    def _replay_probability(self) -> float:
        seen = self.num_seen / max(len(self.levels), 1)
        if self.num_seen == 0 or seen < self.rho:
            return 0.0
        if self.fixed and seen == 1:
            return 1.0  # no level is new any more
        if self.replay_schedule == "fixed":
            return 1 - self.nu
        if self.fixed:
            return seen
        return min(seen, 1 - self.nu)

    def sample(self, replay: bool | None = None) -> int:
        """Draws one level id. replay as in `next_levels`. ValueError if there is none to replay."""
        return int(self._sample(1, replay)[0])

    def _sample(self, k: int, replay: bool | None) -> ndarray:
        """k level ids (k,) int64, as k single draws: the decisions, then replays, then new ones."""
        if self.curriculum != "plr":
            return self._sample_baseline(k)
        replays = self._decide_replays(k) if replay is None else np.full(k, bool(replay))
        num_replays = int(replays.sum())
        levels = np.empty(k, np.int64)
        if num_replays > 0:
            levels[replays] = self._sample_replay(num_replays)
        if num_replays < k:
            levels[~replays] = self._sample_new(k - num_replays)
        return levels

    def _sample_baseline(self, k: int) -> ndarray:
        """All levels in order, or uniformly drawn."""
        space = len(self.levels) if self.fixed else self.level_space
        if self.curriculum == "sequential":
            levels = (self._next + np.arange(k)) % space
        else:
            levels = self.rng.integers(space, size=k)
        if self.fixed:
            levels = self.levels[levels]
        self._next += k
        self.counts["new"] += k
        self._mark_drawn(levels)
        return levels

    def _sample_new(self, k: int) -> ndarray:
        """Uniform over what the buffer does not hold; over a fixed set's unseen levels, or all."""
        if self.fixed:
            choices = self._unseen
            if len(choices) == 0:
                choices = np.arange(len(self.levels))
            levels = self.levels[choices[self.rng.integers(len(choices), size=k)]]
        else:
            levels = np.empty(0, np.int64)
            while len(levels) < k:
                more = self.rng.integers(self.level_space, size=k - len(levels))
                levels = np.append(levels, more[self._slots(more) < 0])
        self.counts["new"] += k
        self._mark_drawn(levels)
        return levels

    def _sample_replay(self, k: int) -> ndarray:
        """From `weights()`: by staleness with probability staleness_coef, else by score.

        One after another: each draw ages the other levels.
        """
        require(self.num_seen, "no level has been scored yet, so none can be replayed")
        if self._score_cdf is None:  # only updates change it
            self._score_cdf = np.cumsum(self._score_weights())
        part, u = self.rng.random((k, 2)).T
        slots = self._seen_slots[invert(self._score_cdf, u)]
        start = 0
        for i in np.flatnonzero(part < self.staleness_coef):
            self._reset_staleness(slots[start:i])
            cdf = np.cumsum(self._staleness_weights())
            slots[i] = self._seen_slots[invert(cdf, u[i])]
            start = i
        self._reset_staleness(slots[start:])
        self.counts["replayed"] += k
        return self.levels[slots]

    def weights(self) -> ndarray:
        """P_replay of PLR's eq. 5, (L,) float64: 0 for unseen levels, sum 1 (0 if all are)."""
        p = np.zeros(len(self.levels))
        c = self.staleness_coef
        if self.num_seen:
            mixture = (1 - c) * self._score_weights() + c * self._staleness_weights()
            p[self._seen_slots] = mixture
        return p

    def _score_weights(self) -> ndarray:
        """P_S of eq. 3 over the seen slots; no unseen level takes a rank from a seen one."""
        x = np.where(self.seen, self.scores, -np.inf)
        kind = self.score_transform
        offset = 0.0 if self.staleness_coef > 0 else 1e-3  # power: a score of 0 keeps a chance
        return transform(x, kind, self.temperature, self.eps, offset, self._seen_slots)

    def _staleness_weights(self) -> ndarray:
        """P_C of eq. 4 over the seen slots; a fixed set's unseen levels take ranks like others."""
        x = self.staleness().astype(np.float64)
        if not self.fixed:
            x[self._unseen] = -np.inf  # empty slots
        kind = self.staleness_transform
        return transform(x, kind, self.staleness_temperature, self.eps, 0.0, self._seen_slots)

    def staleness(self) -> ndarray:
        """c - C of eq. 4, (L,) int64: how many draws of the set's or buffer's levels ago."""
        return self._clock - self._drawn_at

    def _mark_drawn(self, levels: ndarray) -> None:
        """Marks levels (k,) as drawn, one after another; what the buffer lacks is a candidate."""
        slots = self._slots(levels)
        self._reset_staleness(slots[slots >= 0])
        if len(self.levels) == 0:
            return
        for level in levels[slots < 0].tolist():
            if level not in self._candidates:
                self._num_candidates += 1
                self._candidates[level] = NewLevel(self._num_candidates)

    def _reset_staleness(self, slots: ndarray) -> None:
        """Each draw of slots (k,) is a tick of the clock; a slot keeps the tick of its last."""
        self._drawn_at[slots] = self._clock + np.arange(1, len(slots) + 1)
        self._clock += len(slots)

    # ---- what was learned? (PLR, Algorithm 2) ----------------------------------------------------

    def update(
        self, levels: ndarray, step_scores: ndarray, dones: ndarray, score_tails: bool = True
    ) -> np.recarray:
        """Scores the levels of one rollout; returns what was scored, records of EPISODE.

        All (T, N): each step's level, its score, and whether it ended its episode (CleanRL's
        `dones` shifted by one). score_tails=False leaves out episodes that the end cuts off.
        ValueError for other shapes, scores not finite, unknown levels, a level that changes.
        """
        levels = as_levels(levels)
        step_scores = np.asarray(step_scores, np.float64)
        dones = np.asarray(dones, bool)
        shapes = (levels.shape, step_scores.shape, dones.shape)
        shape = (max(len(levels), 1), self.num_envs)
        message = f"levels, step_scores and dones must share one shape (T, {self.num_envs})"
        require(shapes == (shape, shape, shape), f"{message}, got {shapes}")
        require(np.isfinite(step_scores).all(), "step_scores holds nan or infinite values")

        episodes = split_episodes(levels, step_scores, dones)
        self._slots(episodes.level)  # refuses unknown levels
        if self.stitch_episodes:
            self._stitch(episodes)
        episodes.score /= episodes.steps
        complete = episodes[episodes.complete]
        tails = episodes[~episodes.complete]
        if self.stitch_episodes or not score_tails:
            tails = tails[:0]
        episodes = np.concatenate((complete, tails)).view(np.recarray)
        self.update_scores(episodes.level, episodes.score)

        still_playing = set(self.playing.tolist())
        for level in set(self._candidates) - still_playing:
            del self._candidates[level]  # nobody will score it
        return episodes

    def _stitch(self, episodes: np.recarray) -> None:
        """Algorithm 4: joins the parts of an episode that earlier rollouts cut off to its rest."""
        first = np.append(True, episodes.env[1:] != episodes.env[:-1])  # of its environment
        resumed = first & (episodes.level == self._tail_level[episodes.env])
        env = episodes.env[resumed]
        episodes.steps[resumed] += self._tail_steps[env]
        episodes.score[resumed] += self._tail_sum[env]
        maximum = np.maximum(episodes.max_score[resumed], self._tail_max[env])
        episodes.max_score[resumed] = maximum
        cut = episodes[~episodes.complete]
        self._tail_level[:] = -1
        self._tail_level[cut.env] = cut.level
        self._tail_steps[cut.env] = cut.steps
        self._tail_sum[cut.env] = cut.score
        self._tail_max[cut.env] = cut.max_score

    def update_scores(self, levels: ndarray, scores: ndarray) -> None:
        """Finished scores from anywhere, in order; then new levels compete for the buffer.

        levels (n,) integers, scores (n,): the mean over an episode's steps, or any other.
        ValueError for other shapes, unknown levels, scores not finite, or below 0 for `power`.
        """
        levels = as_levels(levels)
        scores = np.asarray(scores, np.float64)
        message = f"scores must be finite, one for each of the {levels.size} levels"
        require(levels.ndim == 1 and levels.shape == scores.shape, message)
        require(np.isfinite(scores).all(), message)
        if self.score_transform == "power":
            require((scores >= 0).all(), "power needs scores >= 0: use rank or softmax")
        if len(self.levels) == 0:
            return
        slots = self._slots(levels)
        first_scores: dict[int, float] = {}  # of candidates
        old = 1 - self.alpha
        for level, slot, score in zip(levels.tolist(), slots.tolist(), scores.tolist()):
            if slot >= 0:
                self.scores[slot] = old * self.scores[slot] + self.alpha * score
            elif level in self._candidates:
                mean = first_scores.get(level, score)
                first_scores[level] = old * mean + self.alpha * score
            else:
                self.counts["late"] += 1  # evicted or rejected meanwhile: nothing to credit it to
        self.seen[slots[slots >= 0]] = True
        self._index_seen()
        for level, score in first_scores.items():
            self._insert(level, score)
        if not self.fixed:
            self._index()

    def _insert(self, level: int, score: float) -> None:
        """A candidate takes an empty slot, else the slot of lowest replay probability.

        It is rejected if that slot's score is higher.
        """
        candidate = self._candidates.pop(level)
        slot = self.num_seen
        if slot == len(self.levels):
            if self._lowest is None:
                self._lowest = int(self.weights().argmin())
            slot = self._lowest
            if self.scores[slot] > score:
                self.counts["rejected"] += 1
                return
            self.counts["evicted"] += 1
        self.levels[slot] = level
        self.scores[slot] = score
        self.seen[slot] = True
        self.best_return[slot] = candidate.best_return
        self.episodes[slot] = candidate.episodes
        self._returns[slot] = np.nan
        kept = np.arange(candidate.episodes)[-self.returns_kept :]
        self._returns[slot, kept % self.returns_kept] = candidate.returns
        # Its staleness is the number of new levels drawn after it: their draws do not advance the
        # buffer's clock.
        self._drawn_at[slot] = self._clock - (self._num_candidates - candidate.number)
        self._index_seen()

    def record_returns(self, levels: ndarray, returns: ndarray) -> None:
        """Remembers the returns of finished episodes: of each level the best and the last ones.

        levels (n,) integers, returns (n,), in order of time. ValueError for other shapes and
        unknown levels. A level that the buffer neither holds nor awaits is left out.
        """
        levels = as_levels(levels)
        returns = np.asarray(returns, np.float64)
        message = f"returns has shape {returns.shape}, not (n,) as levels: {levels.shape}"
        require(levels.ndim == 1 and levels.shape == returns.shape, message)
        order = np.argsort(levels, kind="stable")  # level after level, each in order of time
        levels, returns = levels[order], returns[order]
        slots = self._slots(levels)
        held = slots >= 0
        self._record_held(slots[held], returns[held])
        new_levels, first = np.unique(levels[~held], return_index=True)
        for level, its_returns in zip(new_levels.tolist(), np.split(returns[~held], first[1:])):
            if level in self._candidates:
                number, best, episodes, kept = self._candidates[level]
                best = float(np.fmax(best, np.fmax.reduce(its_returns)))
                episodes += len(its_returns)
                kept = (*kept, *its_returns.tolist())[-self.returns_kept :]
                self._candidates[level] = NewLevel(number, best, episodes, kept)

    def _record_held(self, slots: ndarray, returns: ndarray) -> None:
        """slots (n,), those of one level in a row, returns (n,)."""
        np.fmax.at(self.best_return, slots, returns)
        _, first, run = np.unique(slots, return_index=True, return_inverse=True)
        number = self.episodes[slots] + np.arange(len(slots)) - first[run]
        # of those that share a column, the last stays
        self._returns[slots, number % self.returns_kept] = returns
        np.add.at(self.episodes, slots, 1)

    def best_returns(self, levels: ndarray, default: float = 0.0) -> ndarray:
        """The best return recorded for levels, any shape, as float64 of that shape.

        `default` where no episode has finished yet. ValueError for unknown levels.
        """
        return spread(functools.partial(self._best_returns, default=default), as_levels(levels))

    def _best_returns(self, levels: ndarray, default: float) -> ndarray:
        slots = self._slots(levels)
        best = np.append(self.best_return, np.nan)[slots]  # slot -1: nan
        new = slots < 0
        if self._candidates and new.any():
            known = np.array(list(self._candidates))
            returns = [candidate.best_return for candidate in self._candidates.values()]
            order = np.argsort(known)
            best[new] = np.append(returns, np.nan)[lookup(levels[new], known[order], order)]
        return np.where(np.isnan(best), default, best)

    def learnability(self, levels: ndarray) -> ndarray:
        """p (1 - p), levels of any shape -> float64 of that shape: a score for returns that say
        success (above 0) or failure.

        p is the success rate over the episodes that are remembered of the level, the last
        `returns_kept`; 0 before there are two. SFL, Rutherford et al. 2024 (arXiv 2408.15099), who
        play up to 10 episodes with one policy; here the policy learns between them. ValueError for
        unknown levels.
        """
        return spread(self._learnability, as_levels(levels))

    def _learnability(self, levels: ndarray) -> ndarray:
        returns = self._last_returns(levels)
        successes = (returns > 0).sum(axis=1)
        failures = (returns <= 0).sum(axis=1)
        return successes * failures / np.maximum(successes + failures, 1) ** 2

    def return_variance(self, levels: ndarray) -> ndarray:
        """How the returns that are remembered of a level vary: what `learnability` becomes where
        returns say more than success or failure. Levels of any shape -> float64 of that shape.

        The variance (with 1 / n) of the last `returns_kept` returns; for returns of 0 and 1 it is
        p (1 - p). 0 before there are two. NCC, Monette et al. 2025 (arXiv 2505.20659), takes their
        standard deviation, weighted by a normal density at their mean. ValueError for unknown
        levels.
        """
        return spread(self._return_variance, as_levels(levels))

    def _return_variance(self, levels: ndarray) -> ndarray:
        returns = self._last_returns(levels)
        known = ~np.isnan(returns)
        episodes = np.maximum(known.sum(axis=1), 1)
        mean = np.where(known, returns, 0).sum(axis=1) / episodes
        deviations = np.where(known, returns - mean[:, None], 0)
        return (deviations**2).sum(axis=1) / episodes

    def _last_returns(self, levels: ndarray) -> ndarray:
        """(n,) -> (n, returns_kept), in no order; nan where there are fewer."""
        slots = self._slots(levels)
        held = slots >= 0
        returns = np.full((len(levels), self.returns_kept), np.nan)
        returns[held] = self._returns[slots[held]]
        for i in np.flatnonzero(~held).tolist():
            candidate = self._candidates.get(int(levels[i]))
            if candidate is not None:
                returns[i, : len(candidate.returns)] = candidate.returns
        return returns

    # ---- state -----------------------------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        """What a curriculum plot needs: scalars; the last six are `counts` since the start."""
        p = self.weights()[self.seen]
        scores = self.scores[self.seen]
        staleness = self.staleness()[self.seen]
        entropy = -(p * np.log(np.maximum(p, 1e-300))).sum()
        drawn = self.counts["replayed"] + self.counts["new"]
        return {
            "seen_share": self.num_seen / max(len(self.levels), 1),
            # over how many levels replay is spread: exp(entropy of P_replay)
            "effective_levels": float(np.exp(entropy)) if self.num_seen else 0.0,
            # of the levels seen; staleness in draws
            "score_mean": float(scores.sum() / max(self.num_seen, 1)),
            "score_max": float(scores.max()) if self.num_seen else 0.0,
            "staleness_mean": float(staleness.sum() / max(self.num_seen, 1)),
            "staleness_max": int(staleness.max(initial=0)),
            # of all draws so far
            "replay_share": self.counts["replayed"] / max(drawn, 1),
            # episodes now: started = completed + dropped + in_progress
            "in_progress": int((self.playing >= 0).sum()),
            "started": self.counts["started"],
            "completed": self.counts["completed"],
            "dropped": self.counts["dropped"],
            "evicted": self.counts["evicted"],
            "rejected": self.counts["rejected"],
            "late": self.counts["late"],
        }

    _ARRAYS = ("levels", "scores", "seen", "best_return", "episodes", "_returns", "playing")
    _ARRAYS += ("_drawn_at", "_tail_level", "_tail_steps", "_tail_sum", "_tail_max")

    def state_dict(self) -> dict[str, Any]:
        """All that changes, generator included: arrays, numbers and strings only. The options are
        not among it: load it into a sampler made with the same."""
        candidates = self._candidates.values()
        returns = np.full((len(candidates), self.returns_kept), np.nan)
        for row, new in zip(returns, candidates):
            row[: len(new.returns)] = new.returns
        return {
            "fixed": self.fixed,
            "arrays": {name: getattr(self, name).copy() for name in self._ARRAYS},
            "candidates": {
                "levels": np.array(list(self._candidates), np.int64),
                "numbers": np.array([new.number for new in candidates], np.int64),
                "best_returns": np.array([new.best_return for new in candidates], np.float64),
                "episodes": np.array([new.episodes for new in candidates], np.int64),
                "returns": returns,
            },
            "counts": dict(self.counts),
            "clock": self._clock,
            "next": self._next,
            "num_candidates": self._num_candidates,
            "rng": self.rng.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict()`, arrays in any library's tensors.

        ValueError, before anything is changed, if it is of another sampler or of another version.
        """
        message = "the state is not of this version, or its sampler had other levels or num_envs"
        require(layout(state) == layout(self.state_dict()), message)
        require(state["fixed"] == self.fixed, message)
        arrays = {name: np.asarray(array) for name, array in state["arrays"].items()}
        for name in self._ARRAYS:
            require(arrays[name].shape == getattr(self, name).shape, message)
        if self.fixed:
            require((arrays["levels"] == self.levels).all(), message)
        columns = [np.asarray(column).tolist() for column in state["candidates"].values()]
        require(len(set(map(len, columns))) == 1, message)

        self.rng.bit_generator.state = state["rng"]
        for name in self._ARRAYS:
            getattr(self, name)[:] = arrays[name]
        self._index()
        self._candidates = {}
        for level, number, best_return, episodes, returns in zip(*columns):
            kept = tuple(returns[: min(episodes, self.returns_kept)])
            self._candidates[level] = NewLevel(number, best_return, episodes, kept)
        self.counts = dict(state["counts"])
        self._clock = state["clock"]
        self._next = state["next"]
        self._num_candidates = state["num_candidates"]

    def _per_env(self, x: Any, name: str) -> ndarray:
        x = np.asarray(x)
        require(x.shape == (self.num_envs,), f"{name} has shape {x.shape}, not ({self.num_envs},)")
        return x

    def _slots(self, levels: ndarray) -> ndarray:
        """The slot of each level, int64 of any shape -> int64; -1 where the buffer has none.

        ValueError where a fixed set has none.
        """
        slots = lookup(levels, self._sorted_levels, self._sorted_slots)
        unknown = slots < 0
        if self.fixed and unknown.any():
            raise ValueError(f"level {levels[unknown][0]} is not in this sampler's set")
        return slots

    def _index(self) -> None:
        """Rebuilds what is derived from `levels` and `seen`."""
        self._sorted_slots = np.argsort(self.levels)
        self._sorted_levels = self.levels[self._sorted_slots]
        self._index_seen()

    def _index_seen(self) -> None:
        """Rebuilds what is derived from `seen` and `scores`."""
        self._seen_slots = np.flatnonzero(self.seen)
        self._unseen = np.flatnonzero(~self.seen)
        self.num_seen = len(self._seen_slots)
        self._score_cdf = None  # computed when needed
        self._lowest = None


def value_l1(advantages: ndarray, deltas: ndarray, regrets: ndarray) -> ndarray:
    """PLR's eq. 2, the magnitude of the advantages: (steps,) each."""
    return abs(advantages)


@dataclass(eq=False)
class StepScorer:
    """Scores whole episodes for a loop that keeps no rollout (PLR's Algorithm 4).

        scorer = StepScorer(sampler, gamma=0.999, gae_lambda=0.95)
        episodes = scorer.step(levels, values, next_values, rewards, dones)
        levels = sampler.next_levels(dones)

    `score` gives the scores of an episode's steps from its advantages (GAE), TD errors and
    regrets R_max - V, each (steps,) float64.
    """

    sampler: LevelSampler
    gamma: float
    gae_lambda: float
    score: Callable[[ndarray, ndarray, ndarray], ndarray] = value_l1

    def __post_init__(self):
        # Per environment, of the steps of its episode so far: (value, TD error, reward) each.
        self._steps: list[list[tuple]] = [[] for _ in range(self.sampler.num_envs)]
        self._levels = np.full(self.sampler.num_envs, -1, np.int64)  # -1: no step yet

    def step(
        self,
        levels: ndarray,
        values: ndarray,
        next_values: ndarray,
        rewards: ndarray,
        dones: ndarray,
    ) -> np.recarray:
        """Takes one step of every environment and scores the levels of the episodes that it ends.

        All (N,). next_values: V(s'), 0 where the episode terminated. Returns records of EPISODE.
        ValueError for other shapes, values not finite, unknown levels, a level that changes.
        """
        per_env = self.sampler._per_env
        levels = as_levels(per_env(levels, "levels"))
        values = per_env(values, "values").astype(np.float64)
        next_values = per_env(next_values, "next_values").astype(np.float64)
        rewards = per_env(rewards, "rewards").astype(np.float64)
        dones = per_env(dones, "dones").astype(bool)
        deltas = rewards + self.gamma * next_values - values
        require(np.isfinite(deltas).all(), "values, next_values or rewards are not finite")
        self.sampler._slots(levels)  # refuses unknown levels
        same = (self._levels == levels) | (self._levels < 0)
        require(same.all(), "a level changes within an episode")

        self._levels = levels.copy()
        rows = zip(values.tolist(), deltas.tolist(), rewards.tolist())
        for steps, row in zip(self._steps, rows):
            steps.append(row)
        ended = []
        for i in np.flatnonzero(dones).tolist():
            ended.append(self._end(i))
        episodes = np.array(ended, EPISODE).view(np.recarray)
        self.sampler.update_scores(episodes.level, episodes.score)
        self._forget(dones)
        return episodes

    def _end(self, env: int) -> tuple:
        """The record of the episode that has ended there; its return counts in its own R_max."""
        level = int(self._levels[env])
        values, deltas, rewards = np.array(self._steps[env]).T
        total_reward = rewards.sum()
        self.sampler.record_returns([level], [total_reward])
        advantages = np.zeros(len(deltas))
        advantage = 0.0
        for t in reversed(range(len(deltas))):
            advantage = deltas[t] + self.gamma * self.gae_lambda * advantage
            advantages[t] = advantage
        regrets = self.sampler.best_returns(level) - values
        scores = self.score(advantages, deltas, regrets)
        return env, level, len(deltas), scores.mean(), scores.max(), True, total_reward

    def drop(self, mask: ndarray) -> None:
        """Abandons the episodes in progress where mask (N,) bool, here and in the sampler."""
        self.sampler.drop(mask)
        self._forget(np.asarray(mask, bool))

    def _forget(self, mask: ndarray) -> None:
        self._levels[mask] = -1
        for i in np.flatnonzero(mask):
            self._steps[i] = []

    def state_dict(self) -> dict[str, ndarray]:
        """The episodes in progress: levels and num_steps (N,) int64, steps (n, 3) float64."""
        rows = [row for steps in self._steps for row in steps]  # one environment after another
        return {
            "levels": self._levels.copy(),
            "num_steps": np.array([len(steps) for steps in self._steps]),
            "steps": np.array(rows, np.float64).reshape(-1, 3),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict()`; the sampler has a state of its own. ValueError for others."""
        message = "the state is not of a StepScorer with this number of environments"
        require(layout(state) == layout(self.state_dict()), message)
        levels = np.asarray(state["levels"])
        num_steps = np.asarray(state["num_steps"])
        require(levels.shape == num_steps.shape == self._levels.shape, message)
        steps = np.asarray(state["steps"])
        require(steps.shape == (num_steps.sum(), 3), message)
        rows = [tuple(row) for row in steps.tolist()]
        self._levels = levels.copy()
        ends = np.cumsum(num_steps)
        for i, (start, end) in enumerate(zip(ends - num_steps, ends)):
            self._steps[i] = rows[start:end]
