"""Prioritized Level Replay: which level should be played next?

One class, NumPy only. It knows nothing of environments, networks or logging; copy this file next to any training loop.

    sampler = LevelSampler(levels=range(200), num_envs=64, seed=1)     # a fixed set of levels (PLR on Procgen)
    sampler = LevelSampler(buffer_size=4000, num_envs=32, seed=1)      # a bounded buffer over an unlimited level space

    levels = sampler.next_levels(np.ones(64, bool))                    # (N,) the level each environment starts with
    ...                                                                # a rollout; whenever episodes end:
    levels = sampler.next_levels(done)                                 # (N,) with a new level where done
    ...                                                                # after the rollout, scores and dones (T, N):
    sampler.update(played_levels, step_scores, dones)

Papers: PLR, Jiang et al. 2021 (arXiv 2010.03934); Robust PLR, Jiang et al. 2021 (arXiv 2110.02439).

Names. The PLR paper's rho is `staleness_coef` here and its beta is `temperature`, as in every published code base;
`rho` here is the share of levels that must have been scored before replay may start, as in the released code.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

TRANSFORMS = ("constant", "max", "eps_greedy", "rank", "power", "softmax")
CURRICULA = ("plr", "uniform", "sequential")
SCHEDULES = ("fixed", "proportionate")


def transform(
    x: np.ndarray, kind: str, temperature: float, eps: float = 0.05, offset: float = 0.0, n: int = 0
) -> np.ndarray:
    """h(x) of PLR's eq. 3, not normalised. x: (n,) scores or staleness, never written to; returns (n,) float64 >= 0.

    constant: 1. max: 1 for every maximum. eps_greedy: 1 - eps for the first maximum, and eps / n (n: len(x)) for each.
    rank: (1 / rank) ** (1 / temperature), rank 1 the highest, ties in index order. softmax: exp(x / temperature).
    power: (x + offset) ** (1 / temperature); ValueError for a negative x, whose fractional power does not exist.
    """
    x = np.asarray(x, np.float64)
    w = np.ones_like(x)
    if kind == "max":
        w = (x == x.max()).astype(np.float64)
    elif kind == "eps_greedy":
        w *= eps / (n or x.size)
        w[x.argmax()] += 1 - eps
    elif kind == "rank":
        w[np.argsort(-x, kind="stable")] = np.arange(1, x.size + 1, dtype=np.float64) ** (-1 / temperature)
    elif kind == "power":
        if x.min() < 0:
            raise ValueError(f"the power transform needs scores >= 0, got {x.min():g}: use rank or softmax")
        w = (x + offset) ** (1 / temperature)
    elif kind == "softmax":
        w = np.exp((x - x.max()) / temperature)  # the largest is 1: no overflow
    return w


def normalise(w: np.ndarray) -> np.ndarray:
    """w (n,) >= 0 scaled to sum 1; uniform where every weight is zero, as when all levels are equally stale."""
    total = w.sum()
    return w / total if total > 0 else np.full_like(w, 1 / len(w))


class Episodes(NamedTuple):
    """What `update` scored, in the order it was applied: arrays of one entry per episode segment."""

    env: np.ndarray  # environment index, int64
    level: np.ndarray  # level id, int64
    steps: np.ndarray  # number of steps behind the score, int64
    score: np.ndarray  # mean of the per-step scores, float64
    max_score: np.ndarray  # maximum of the per-step scores, float64
    complete: np.ndarray  # False for a tail that the rollout's end cut off, bool


class LevelSampler:
    """Scores, staleness and replay of levels, for a fixed set or for a bounded buffer.

    Args:
        levels: ids of a fixed set, distinct integers >= 0. None: an unlimited space, of which a buffer keeps the best.
        num_envs: N, number of environments that play at the same time.
        seed: of this sampler's own generator; np.random is never touched.
        buffer_size: K, levels kept from an unlimited space. 0 with `levels`, or for uniform and sequential.
        level_space: an unlimited space's new levels are drawn from [0, level_space).
        curriculum: plr; uniform: any level, each episode; sequential: level after level.
        score_transform, temperature, eps: h and beta of PLR's eq. 3. See `transform`.
        staleness_coef, staleness_transform, staleness_temperature: rho of eq. 5 and h_C of eq. 4.
        replay_schedule: proportionate: replay with the probability of the seen share; fixed: with probability 1 - nu.
            With a buffer, whose new levels never run out, proportionate is capped at 1 - nu.
        rho: share of levels (or of the buffer) that must be seen before any is replayed.
        nu: probability of a new level.
        alpha: weight of a new score in a level's running mean; 1 overwrites.
        stitch_episodes: an episode that spans rollouts counts once, when it ends, by the mean over all its steps (the
            paper's Algorithm 4). False, as in the released code: each rollout's part is a score of its own.

    Public arrays, one entry per level or buffer slot: `levels` int64 (-1: empty slot), `scores` float64, `seen` bool,
    `best_return` float64 (nan: no episode finished yet). `playing` (N,) int64: the level of each environment, -1: none.
    `counts`: started, completed, dropped, replayed, new, evicted, rejected, late.
    Started = completed + in progress + dropped, after every call.
    """

    def __init__(
        self,
        levels: Iterable[int] | None = None,
        *,
        num_envs: int,
        seed: int,
        buffer_size: int = 0,
        level_space: int = 2**31 - 1,
        curriculum: str = "plr",
        score_transform: str = "rank",
        temperature: float = 0.1,
        eps: float = 0.05,
        staleness_coef: float = 0.1,
        staleness_transform: str = "power",
        staleness_temperature: float = 1.0,
        replay_schedule: str = "proportionate",
        rho: float = 1.0,
        nu: float = 0.5,
        alpha: float = 1.0,
        stitch_episodes: bool = False,
    ):
        for name, value, allowed in (
            ("curriculum", curriculum, CURRICULA),
            ("score_transform", score_transform, TRANSFORMS),
            ("staleness_transform", staleness_transform, TRANSFORMS),
            ("replay_schedule", replay_schedule, SCHEDULES),
        ):
            if value not in allowed:
                raise ValueError(f"{name} {value!r} is not one of {', '.join(allowed)}")
        for name, share in (("eps", eps), ("staleness_coef", staleness_coef), ("rho", rho), ("nu", nu)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} {share} is not between 0 and 1")
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha {alpha} is not above 0 and at most 1")
        if min(temperature, staleness_temperature) <= 0:
            raise ValueError(f"temperature {min(temperature, staleness_temperature)} is not above 0")
        if num_envs < 1:
            raise ValueError(f"num_envs {num_envs} is not at least 1")
        self.fixed = levels is not None
        self.levels = np.array(list(levels), np.int64) if self.fixed else np.full(buffer_size, -1, np.int64)
        size = len(self.levels)
        if self.fixed and (buffer_size or not size or self.levels.min() < 0 or len(np.unique(self.levels)) < size):
            raise ValueError("levels must be distinct integers >= 0, at least one, and given without buffer_size")
        if not self.fixed and curriculum == "plr" and buffer_size < 1:
            raise ValueError(f"plr needs a fixed set of levels or a buffer_size above 0, got buffer_size {buffer_size}")

        self.num_envs, self.level_space, self.curriculum = num_envs, level_space, curriculum
        self.score_transform, self.temperature, self.eps = score_transform, temperature, eps
        self.staleness_coef, self.staleness_transform = staleness_coef, staleness_transform
        self.staleness_temperature = staleness_temperature
        self.replay_schedule, self.rho, self.nu = replay_schedule, rho, nu
        self.alpha, self.stitch_episodes = alpha, stitch_episodes
        self.rng = np.random.default_rng(seed)

        self.scores = np.zeros(size)
        self.seen = np.zeros(size, bool)
        self.best_return = np.full(size, np.nan)
        self.playing = np.full(num_envs, -1, np.int64)
        self.counts = dict.fromkeys(
            ("started", "completed", "dropped", "replayed", "new", "evicted", "rejected", "late"), 0
        )
        # Staleness is the number of draws since a level's own last draw. Keeping the time of that draw instead makes a
        # draw O(1): no counter of another level has to move.
        self._clock = 0
        self._drawn_at = np.zeros(size, np.int64)
        self._oldest = 0  # lower bound of _drawn_at over seen levels, tightened by each update
        self._next = 0  # sequential: position of the next level
        self._staged: dict[int, tuple[int, float]] = {}  # new levels in play, not yet scored: (drawn at, best return)
        self._part_level = np.full(num_envs, -1, np.int64)  # stitching: level, sum, maximum and length of open tails
        self._part_sum, self._part_max = np.zeros(num_envs), np.full(num_envs, -np.inf)
        self._part_steps = np.zeros(num_envs, np.int64)
        self._index()

    # ---- which level next? -----------------------------------------------------------------------------------------

    def next_levels(self, done: np.ndarray, replay: bool | None = None, levels: np.ndarray | None = None) -> np.ndarray:
        """Starts an episode in every environment where done (N,) bool; returns (N,) int64, the level each one plays.

        An episode in progress there counts as completed; call `drop` first for one that was abandoned. replay: None
        decides for each episode (PLR); True or False imposes a decision taken for all (Robust PLR, `decide_replay`).
        levels (N,): start these instead of drawing (read where done).
        """
        done = np.asarray(done, bool)
        if done.shape != (self.num_envs,):
            raise ValueError(f"done has shape {done.shape}, expected ({self.num_envs},)")
        for i in np.flatnonzero(done):
            self.counts["completed"] += int(self.playing[i] >= 0)
            self.counts["started"] += 1
            if levels is None:
                self.playing[i] = self.sample(replay)
            else:
                self.playing[i] = levels[i]
                self._drawn(int(levels[i]))
        return self.playing.copy()

    def drop(self, mask: np.ndarray) -> None:
        """Abandons the episodes in progress where mask (N,) bool: counted as dropped, their open tails never scored."""
        mask = np.asarray(mask, bool) & (self.playing >= 0)
        self.counts["dropped"] += int(mask.sum())
        self.playing[mask] = -1
        self._part_level[mask] = -1

    def decide_replay(self) -> bool:
        """The replay decision d of Algorithm 1: True to replay a scored level, False to play a new one."""
        seen = self.num_seen / max(len(self.levels), 1)
        if self.num_seen == 0 or seen < self.rho:
            return False
        if self.fixed and self.num_seen == len(self.levels):
            return True
        if self.replay_schedule == "fixed":
            return bool(self.rng.random() < 1 - self.nu)
        return bool(self.rng.random() < (seen if self.fixed else min(seen, 1 - self.nu)))

    def sample(self, replay: bool | None = None) -> int:
        """Draws one level id. replay as in `next_levels`. Raises ValueError if replay is asked for but none is seen."""
        if self.curriculum == "sequential":
            self._next += 1
            level = self.levels[(self._next - 1) % len(self.levels)] if self.fixed else self._next - 1
        elif self.curriculum == "uniform":
            level = self.rng.choice(self.levels) if self.fixed else self.rng.integers(self.level_space)
        elif self.decide_replay() if replay is None else replay:
            slot = self._sample_replay()
            self.counts["replayed"] += 1
            self._clock += 1
            self._drawn_at[slot] = self._clock
            return int(self.levels[slot])
        elif self.fixed:  # uniform over the unseen, or over all once none is left
            level = self.levels[self.rng.choice(self._unseen if len(self._unseen) else len(self.levels))]
        else:
            level = self.rng.integers(self.level_space)
            while self._slots(np.array([level]))[0] >= 0 or int(level) in self._staged:
                level = self.rng.integers(self.level_space)
        self.counts["new"] += 1
        self._drawn(int(level))
        return int(level)

    def weights(self) -> np.ndarray:
        """P_replay of PLR's eq. 5, (L,) float64: 0 for levels never scored, sum 1 (or 0 before the first score)."""
        p = np.zeros(len(self.levels))
        if self.num_seen:
            score_part, staleness_part = self._score_weights(), self._staleness_weights()
            p[self._seen_slots] = (1 - self.staleness_coef) * score_part + self.staleness_coef * staleness_part
        return p

    def staleness(self) -> np.ndarray:
        """c - C of PLR's eq. 4, (L,) int64: how many draws ago each level was last drawn."""
        return self._clock - self._drawn_at

    def _score_weights(self) -> np.ndarray:
        """P_S of eq. 3 over the seen slots; an unseen level never takes a rank from a seen one."""
        # a score of 0 keeps a chance under power; with staleness mixed in it has one already
        offset = 0.0 if self.staleness_coef > 0 else 1e-3
        scores, n = self.scores[self._seen_slots], len(self.levels) if self.fixed else self.num_seen
        return normalise(transform(scores, self.score_transform, self.temperature, self.eps, offset, n))

    def _staleness_weights(self) -> np.ndarray:
        """P_C of eq. 4 over the seen slots; unseen levels of a fixed set age and take ranks like the others."""
        kind, temperature = self.staleness_transform, self.staleness_temperature
        if self.fixed:
            return normalise(transform(self.staleness(), kind, temperature, self.eps)[self._seen_slots])
        return normalise(transform(self.staleness()[self._seen_slots], kind, temperature, self.eps))

    def _sample_replay(self) -> int:
        """A slot drawn from `weights()`, one part of the mixture at a time: only staleness changes between updates."""
        if self.num_seen == 0:
            raise ValueError("no level has been scored yet, so none can be replayed")
        if self._score_cdf is None:
            self._score_cdf = np.cumsum(self._score_weights())
        if self.rng.random() >= self.staleness_coef:
            return self._seen_slots[self._inverse(self._score_cdf)]
        if self.staleness_transform == "power" and self._clock > self._oldest:
            # Rejection: propose uniformly, accept with (staleness / bound) ** (1 / T). Exact, and O(1) for any L.
            for _ in range(8):
                slots = self._seen_slots[self.rng.integers(self.num_seen, size=32)]
                share = (self._clock - self._drawn_at[slots]) / (self._clock - self._oldest)
                accepted = self.rng.random(32) < share ** (1 / self.staleness_temperature)
                if accepted.any():
                    return slots[accepted.argmax()]
        return self._seen_slots[self._inverse(np.cumsum(self._staleness_weights()))]

    def _inverse(self, cdf: np.ndarray) -> int:
        # the last cdf entry may round to less than 1, and side="right" never lands on a weight of exactly 0
        return min(int(cdf.searchsorted(self.rng.random() * cdf[-1], side="right")), len(cdf) - 1)

    def _drawn(self, level: int) -> None:
        """Marks a level as drawn now; one that the buffer does not hold is staged until its first score."""
        self._clock += 1
        slot = self._slots(np.array([level]))[0]
        if slot >= 0:
            self._drawn_at[slot] = self._clock
        elif self.fixed:
            raise ValueError(f"level {level} is not in this sampler's set of {len(self.levels)} levels")
        elif len(self.levels):
            self._staged[level] = (self._clock, self._staged.get(level, (0, np.nan))[1])

    # ---- what was learned? -----------------------------------------------------------------------------------------

    def update(
        self, levels: np.ndarray, step_scores: np.ndarray, dones: np.ndarray, score_tails: bool = True
    ) -> Episodes:
        """Scores the levels of one rollout (PLR's Algorithm 2); returns what was scored.

        levels: (T, N) int, the level of each step. step_scores: (T, N) float, finite. dones: (T, N), true where that
        step ended its episode (CleanRL's `dones` shifted by one). score_tails=False leaves out the episodes that the
        end of the rollout cuts off. Raises ValueError on other shapes, on nan or infinite scores, on a level that
        changes within an episode, and on a level that a fixed set does not have.
        """
        levels, step_scores = np.asarray(levels, np.int64), np.asarray(step_scores, np.float64)
        dones = np.asarray(dones).astype(bool)
        if not levels.shape == step_scores.shape == dones.shape or levels.shape[1:] != (self.num_envs,):
            shapes = f"{levels.shape}, {step_scores.shape}, {dones.shape}"
            raise ValueError(f"levels, step_scores and dones must share one shape (T, {self.num_envs}), got {shapes}")
        if not np.isfinite(step_scores).all():
            raise ValueError("step_scores holds nan or infinite values")
        num_steps = len(levels)
        level, score, done = levels.T.ravel(), step_scores.T.ravel(), dones.T.ravel()  # (N * T,), one env after another

        # segments: an environment's steps up to a done, or up to the end of the rollout
        last = done.copy()
        last[num_steps - 1 :: num_steps] = True
        ends = np.flatnonzero(last)
        starts = np.concatenate(([0], ends[:-1] + 1))
        env, steps, complete, level_of = starts // num_steps, ends - starts + 1, done[ends], level[starts]
        if (level != np.repeat(level_of, steps)).any():
            raise ValueError("a level changes within an episode: levels[t] must be the level that step t was played on")
        if self.fixed and (self._slots(level_of) < 0).any():
            raise ValueError(f"level {level_of[self._slots(level_of) < 0][0]} is not in this sampler's set of levels")
        sums, maxima = np.add.reduceat(score, starts), np.maximum.reduceat(score, starts)

        if self.stitch_episodes:  # Algorithm 4: an episode's first part waits in _part_* for the rest
            resumed = np.flatnonzero((starts % num_steps == 0) & (self._part_level[env] == level_of))
            sums[resumed] += self._part_sum[env[resumed]]
            steps[resumed] += self._part_steps[env[resumed]]
            maxima[resumed] = np.maximum(maxima[resumed], self._part_max[env[resumed]])
            self._part_level[:] = -1
            tail = ~complete
            self._part_level[env[tail]], self._part_steps[env[tail]] = level_of[tail], steps[tail]
            self._part_sum[env[tail]], self._part_max[env[tail]] = sums[tail], maxima[tail]
        tails = np.flatnonzero(~complete) if score_tails and not self.stitch_episodes else np.empty(0, np.int64)
        order = np.concatenate((np.flatnonzero(complete), tails))
        episodes = Episodes(*(x[order] for x in (env, level_of, steps, sums / steps, maxima, complete)))
        self.update_scores(episodes.level, episodes.score)
        return episodes

    def update_scores(self, levels: np.ndarray, scores: np.ndarray) -> None:
        """Finished scores from anywhere. levels (n,) int and scores (n,) float are applied in their order."""
        levels, scores = np.asarray(levels, np.int64), np.asarray(scores, np.float64)
        if len(self.levels) and len(levels):
            ids, first, inverse, n = np.unique(levels, return_index=True, return_inverse=True, return_counts=True)
            slots = self._slots(ids)
            known = slots >= 0
            if self.fixed and not known.all():
                raise ValueError(f"level {ids[~known][0]} is not in this sampler's set of levels")
            # score <- (1 - alpha) score + alpha m, n times over, in one sum: m counts with (1 - alpha) ** (later ones)
            order = np.argsort(inverse, kind="stable")
            after = np.repeat(np.cumsum(n), n) - 1 - np.arange(len(order))
            m = self.alpha * (1 - self.alpha) ** after * scores[order]
            mixed, kept = np.bincount(inverse[order], m), (1 - self.alpha) ** n
            self.scores[slots[known]] = kept[known] * self.scores[slots[known]] + mixed[known]
            self.seen[slots[known]] = True
            self._index()
            for j in sorted(np.flatnonzero(~known), key=first.__getitem__):  # new levels, in order of appearance
                if int(ids[j]) in self._staged:
                    self._insert(int(ids[j]), kept[j] * scores[first[j]] + mixed[j])
                else:
                    self.counts["late"] += int(n[j])  # evicted or rejected meanwhile: nothing to credit it to
        still = set(self.playing.tolist())
        self._staged = {level: entry for level, entry in self._staged.items() if level in still}
        self._oldest = int(self._drawn_at[self._seen_slots].min(initial=self._clock))

    def _insert(self, level: int, score: float) -> None:
        """A new level takes an empty slot, or that of the lowest replay probability if its score is not higher."""
        drawn_at, best_return = self._staged.pop(level)
        slot = self.num_seen
        if slot == len(self.levels):
            slot = int(self.weights().argmin())
            if self.scores[slot] > score:
                self.counts["rejected"] += 1
                return
            self.counts["evicted"] += 1
        self.levels[slot], self.scores[slot], self.seen[slot] = level, score, True
        self._drawn_at[slot], self.best_return[slot] = drawn_at, best_return
        self._index()

    def record_returns(self, levels: np.ndarray, returns: np.ndarray) -> None:
        """Keeps the best return per level (MaxMC's R_max) of the finished episodes given, levels (n,), returns (n,)."""
        for level, value, slot in zip(np.asarray(levels).tolist(), np.asarray(returns), self._slots(levels)):
            if slot >= 0:
                self.best_return[slot] = np.fmax(self.best_return[slot], value)
            elif level in self._staged:
                self._staged[level] = (self._staged[level][0], float(np.fmax(self._staged[level][1], value)))

    def best_returns(self, levels: np.ndarray, default: float = 0.0) -> np.ndarray:
        """The best return recorded for levels, any shape; `default` where no episode has finished yet."""
        ids, inverse = np.unique(np.asarray(levels, np.int64), return_inverse=True)
        slots = self._slots(ids)
        best = np.array([self._staged.get(level, (0, np.nan))[1] for level in ids.tolist()])
        best[slots >= 0] = self.best_return[slots[slots >= 0]]
        return np.where(np.isnan(best), default, best)[inverse].reshape(np.shape(levels))

    # ---- bookkeeping -----------------------------------------------------------------------------------------------

    @property
    def num_seen(self) -> int:
        return len(self._seen_slots)

    def _slots(self, levels: np.ndarray) -> np.ndarray:
        """The slot of each level in levels (n,), -1 where there is none."""
        if not len(self.levels):
            return np.full(len(levels), -1)
        at = np.minimum(np.searchsorted(self._sorted_levels, levels), len(self.levels) - 1)
        return np.where(self._sorted_levels[at] == levels, self._sorted_slots[at], -1)

    def _index(self) -> None:
        """Rebuilds what is derived from levels, scores and seen."""
        self._sorted_slots = np.argsort(self.levels, kind="stable")
        self._sorted_levels = self.levels[self._sorted_slots]
        self._seen_slots, self._unseen = np.flatnonzero(self.seen), np.flatnonzero(~self.seen)
        self._score_cdf: np.ndarray | None = None

    def metrics(self) -> dict[str, float]:
        """What a curriculum plot needs, all scalars. effective_levels is exp(entropy of P_replay)."""
        p = self.weights()
        p = p[p > 0]
        draws = max(self.counts["replayed"] + self.counts["new"], 1)
        scores, staleness = self.scores[self._seen_slots], self.staleness()[self._seen_slots]
        return {
            "seen_share": self.num_seen / max(len(self.levels), 1),
            "effective_levels": float(np.exp(-(p * np.log(p)).sum())) if len(p) else 0.0,
            "score_mean": float(scores.mean()) if len(p) else 0.0,
            "score_max": float(scores.max()) if len(p) else 0.0,
            "staleness_mean": float(staleness.mean()) if len(p) else 0.0,
            "staleness_max": float(staleness.max()) if len(p) else 0.0,
            "replay_share": self.counts["replayed"] / draws,
            "in_progress": int((self.playing >= 0).sum()),
            **{key: self.counts[key] for key in ("started", "completed", "dropped", "evicted", "rejected", "late")},
        }

    _ARRAYS = ("levels", "scores", "seen", "best_return", "playing", "_drawn_at")
    _ARRAYS += ("_part_level", "_part_sum", "_part_max", "_part_steps")

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the future, generator included: NumPy arrays, numbers and strings only."""
        staged = [(level, drawn_at, best) for level, (drawn_at, best) in self._staged.items()]
        return {
            "arrays": {name: getattr(self, name).copy() for name in self._ARRAYS},
            "staged": np.array(staged, np.float64).reshape(-1, 3),
            "counts": dict(self.counts),
            "clocks": [self._clock, self._oldest, self._next],
            "rng": self.rng.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict()`. Raises ValueError if it comes from a sampler of another shape or level set."""
        arrays = {name: np.asarray(state["arrays"][name]) for name in self._ARRAYS}
        if any(arrays[name].shape != getattr(self, name).shape for name in self._ARRAYS):
            raise ValueError("the state belongs to a sampler with another number of levels or environments")
        if self.fixed and (arrays["levels"] != self.levels).any():
            raise ValueError("the state belongs to a sampler with another set of levels")
        for name in self._ARRAYS:
            getattr(self, name)[:] = arrays[name]
        staged = np.asarray(state["staged"])
        self._staged = {int(level): (int(drawn_at), float(best)) for level, drawn_at, best in staged}
        self.counts = dict(state["counts"])
        self._clock, self._oldest, self._next = state["clocks"]
        self.rng.bit_generator.state = state["rng"]
        self._index()
