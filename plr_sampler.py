"""Prioritized Level Replay: which level should be played next?

One class, NumPy only. It knows nothing of environments, networks or logging; copy this file next to any training loop.

    sampler = LevelSampler(levels=range(200), num_envs=64, seed=1)     # a fixed set of levels (PLR on Procgen)
    sampler = LevelSampler(buffer_size=4000, num_envs=64, seed=1)      # or a bounded buffer over an unlimited space
    levels = sampler.next_levels(np.ones(64, bool))                    # (N,) the level each environment starts with
    levels = sampler.next_levels(done)                                 # during a rollout: a new one where done
    sampler.update(played_levels, step_scores, dones)                  # after it, from arrays of shape (T, N)
    sampler.step(levels, values, next_values, rewards, dones, ...)     # or after each step, without such arrays
    sampler.update_scores(played_levels, scores)                       # or one score per episode, however you got it

Papers: PLR, Jiang et al. 2021 (arXiv 2010.03934); Robust PLR, Jiang et al. 2021 (arXiv 2110.02439).
Names. The PLR paper's rho is `staleness_coef` here and its beta is `temperature`, as in every published code base;
`rho` here is the share of levels that must have been scored before replay may start, as in the released code.
"""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from numpy import ndarray

TRANSFORMS = ("constant", "max", "eps_greedy", "rank", "power", "softmax")
CHOICES = {"curriculum": ("plr", "uniform", "sequential"), "replay_schedule": ("fixed", "proportionate")}
CHOICES |= {"score_transform": TRANSFORMS, "staleness_transform": TRANSFORMS}
# Records of what was scored, in order. complete: False if a rollout's end cut it off; total_reward: nan but for `step`.
EPISODE = [("env", int), ("level", int), ("steps", int), ("score", float), ("max_score", float), ("complete", bool)]
EPISODE = np.dtype([*EPISODE, ("total_reward", float)])


def require(condition: Any, message: str) -> None:
    if not condition:
        raise ValueError(message)


def transform(x: ndarray, kind: str, temperature: float, eps: float, offset: float, among: ndarray) -> ndarray:
    """Probabilities proportional to h(x), PLR's eq. 3, over `among`: x (n,) float64, among (n,) bool -> (k,) float64.

    constant: 1. max: 1 for every maximum. eps_greedy: 1 - eps for the first maximum, and eps / n for each.
    rank: (1 / rank) ** (1 / temperature), rank 1 the highest, ties in index order. softmax: exp(x / temperature).
    power: (x + offset) ** (1 / temperature), x >= 0: a negative x has no fractional power.
    Entries outside `among` take ranks like the others, unless they are -inf. Uniform where all of h(x) is 0.
    """
    w = np.ones(len(x))
    if kind == "max":
        w = (x == x.max()).astype(float)
    elif kind == "eps_greedy":
        w = eps / len(x) + (1 - eps) * (np.arange(len(x)) == x.argmax())
    elif kind == "rank":
        order = np.argsort(-x)  # several times faster than a stable sort, which only ties need
        if (x[order][1:] == x[order][:-1]).any():
            order = np.argsort(-x, kind="stable")
        w[order] = np.arange(1.0, len(x) + 1) ** (-1 / temperature)
    elif kind == "power":
        w = ((np.maximum(x, 0) + offset) / (x[among].max() + offset or 1)) ** (1 / temperature)  # the largest is 1
    elif kind == "softmax":
        w = np.exp(np.minimum(x - x[among].max(), 0) / temperature)  # the largest is 1: no overflow
    w = w[among]
    return w / w.sum() if w.sum() > 0 else np.full_like(w, 1 / len(w))


@dataclass(eq=False)
class LevelSampler:
    """Scores, staleness and replay of levels, for a fixed set or for a bounded buffer over an unlimited space.

    To read, per level or slot: `levels` int64 (-1: empty), `scores` float64, `seen` bool, `best_return` float64 or nan.
    `playing` (N,) int64: each environment's level, or -1. `counts`: started = completed + in progress + dropped.
    """

    levels: Any = None  # ids of a fixed set: distinct integers >= 0. None: an unlimited space
    _: KW_ONLY
    num_envs: int  # N, environments that play at the same time
    seed: int  # of this sampler's own generator; np.random is never touched
    buffer_size: int = 0  # K, levels kept from an unlimited space (0: none, for uniform and sequential)
    level_space: int = 2**31 - 1  # an unlimited space's new levels are drawn from [0, level_space)
    curriculum: str = "plr"  # plr; uniform: any level each time; sequential: level after level
    score_transform: str = "rank"  # h of eq. 3, one of TRANSFORMS
    temperature: float = 0.1  # beta of eq. 3
    eps: float = 0.05  # of eps_greedy
    staleness_coef: float = 0.1  # rho of eq. 5
    staleness_transform: str = "power"  # h_C of eq. 4
    staleness_temperature: float = 1.0
    replay_schedule: str = "proportionate"  # replay with probability seen share (buffer: at most 1 - nu); fixed: 1 - nu
    rho: float = 1.0  # share of levels (or of the buffer) that must be seen before any is replayed
    nu: float = 0.5  # probability of a new level (on a fixed set, with replay_schedule fixed)
    alpha: float = 1.0  # weight of a new score in a level's running mean; 1 overwrites
    stitch_episodes: bool = False  # score an episode that spans rollouts as a whole (Algorithm 4), not part by part

    def __post_init__(self):
        for name, allowed in CHOICES.items():
            require(getattr(self, name) in allowed, f"{name} {getattr(self, name)!r} is not one of {allowed}")
        for name in ("eps", "staleness_coef", "rho", "nu", "alpha"):
            require(0 <= getattr(self, name) <= 1, f"{name} {getattr(self, name)} is not between 0 and 1")
        for name in ("temperature", "staleness_temperature", "num_envs", "alpha"):
            require(getattr(self, name) > 0, f"{name} {getattr(self, name)} is not above 0")
        self.fixed = self.levels is not None
        levels = np.array(self.levels if self.fixed else [-1] * self.buffer_size)
        size, distinct = len(levels), levels.dtype.kind in "iu" and len(np.unique(levels)) == len(levels)
        valid = distinct and levels.min(initial=0) >= 0 and not self.buffer_size
        require(size or not (self.fixed or self.curriculum == "plr"), "plr needs levels or a buffer_size above 0")
        require(valid or not self.fixed, "levels must be distinct integers >= 0 and come without a buffer_size")
        require(self.fixed or self.level_space > size, f"level_space {self.level_space} must be above {size} levels")
        self.levels = levels.astype(np.int64)
        self.rng = np.random.default_rng(self.seed)
        self.scores, self.seen, self.best_return = np.zeros(size), np.zeros(size, bool), np.full(size, np.nan)
        self.playing = np.full(self.num_envs, -1, np.int64)
        self.counts = dict.fromkeys("started completed dropped replayed new evicted rejected late".split(), 0)
        # Staleness counts the draws since a level's own last draw. Keeping the time of that draw makes a draw O(1).
        self._clock, self._drawn_at, self._next = 0, np.zeros(size, np.int64), 0  # _next: levels dealt, if sequential
        self._staged, self._num_staged = dict[int, tuple[int, float]](), 0  # new, unscored: (its number, best return)
        self._tails = np.full((4, self.num_envs), -1.0)  # stitching: level, steps, sum and maximum of open tails
        self._open: dict[int, list] = {}  # `step`: environment -> (level, value, TD error, reward) of its steps so far
        self._index()

    # ---- which level next? -----------------------------------------------------------------------------------------

    def next_levels(self, done: ndarray, replay: bool | None = None, levels: ndarray | None = None) -> ndarray:
        """Starts an episode in every environment where done (N,) bool; returns (N,) int64, the level each one plays.

        The episode in progress there counts as completed: `drop` it first if it was abandoned. replay: None decides
        for each episode (PLR); a bool imposes one decision (Robust PLR). levels (N,): no draw, start these where done.
        """
        levels = None if levels is None else self._per_env(levels, "levels")
        for i in np.flatnonzero(self._per_env(done, "done")):
            level = self.sample(replay) if levels is None else self._drawn(int(levels[i]))
            self.counts["started"] += 1
            self.counts["completed"] += int(self.playing[i] >= 0)
            self.playing[i] = level
        return self.playing.copy()

    def drop(self, mask: ndarray) -> None:
        """Abandons the episodes in progress where mask (N,) bool: counted as dropped, their open tails never scored."""
        mask = self._per_env(mask, "mask").astype(bool) & (self.playing >= 0)
        self.counts["dropped"] += int(mask.sum())
        for level in {*self.playing[mask].tolist()} - {*self.playing[~mask].tolist()}:
            self._staged.pop(level, None)  # nobody will score it
        self.playing[mask] = self._tails[0, mask] = -1
        self._open = {i: rows for i, rows in self._open.items() if not mask[i]}

    def decide_replay(self) -> bool:
        """The replay decision d of Algorithm 1: True to replay a scored level, False to play a new one."""
        seen = self.num_seen / max(len(self.levels), 1)
        if self.num_seen == 0 or seen < self.rho:
            return False
        fixed = self.replay_schedule == "fixed" or (not self.fixed and seen > 1 - self.nu)
        return (self.fixed and seen == 1) or bool(self.rng.random() < (1 - self.nu if fixed else seen))

    def sample(self, replay: bool | None = None) -> int:
        """Draws one level id. replay as in `next_levels`. Raises ValueError if replay is asked for but none is seen."""
        if self.curriculum != "plr":
            space = len(self.levels) if self.fixed else self.level_space
            i = self._next % space if self.curriculum == "sequential" else self.rng.integers(space)
            self._next, level = self._next + 1, self.levels[i] if self.fixed else i
        elif self.decide_replay() if replay is None else replay:
            slot = self._sample_replay()
            self.counts["replayed"] += 1
            return self._drawn(int(self.levels[slot]), slot)
        elif self.fixed:  # uniform over the unseen, or over all once none is left
            unseen = self._unseen if len(self._unseen) else np.arange(len(self.levels))
            level = self.levels[unseen[self.rng.integers(len(unseen))]]
        else:
            while self._slots(level := self.rng.integers(self.level_space)) >= 0:
                pass
        self.counts["new"] += 1
        return self._drawn(int(level))

    def weights(self) -> ndarray:
        """P_replay of PLR's eq. 5, (L,) float64: 0 for levels never scored, sum 1 (or 0 before the first score)."""
        p, c = np.zeros(len(self.levels)), self.staleness_coef
        if self.num_seen:
            p[self._seen_slots] = (1 - c) * self._score_weights() + c * self._staleness_weights()
        return p

    def staleness(self) -> ndarray:
        """c - C of PLR's eq. 4, (L,) int64: how many draws (of the set's or the buffer's levels) ago each was drawn."""
        return self._clock - self._drawn_at

    def _score_weights(self) -> ndarray:
        """P_S of eq. 3 over the seen slots; an unseen level never takes a rank from a seen one."""
        scores = np.where(self.seen, self.scores, -np.inf)
        offset = 0.0 if self.staleness_coef > 0 else 1e-3  # under power, a score of 0 keeps a chance
        return transform(scores, self.score_transform, self.temperature, self.eps, offset, self.seen)

    def _staleness_weights(self) -> ndarray:
        """P_C of eq. 4 over the seen slots; unseen levels of a fixed set age and take ranks like the others."""
        staleness = np.where(self.levels >= 0, self.staleness(), -np.inf)
        return transform(staleness, self.staleness_transform, self.staleness_temperature, self.eps, 0.0, self.seen)

    def _sample_replay(self) -> int:
        """A slot drawn from `weights()`, one part of the mixture at a time: only staleness changes between updates."""
        require(self.num_seen, "no level has been scored yet, so none can be replayed")
        cdf = self._score_cdf = np.cumsum(self._score_weights()) if self._score_cdf is None else self._score_cdf
        if self.rng.random() < self.staleness_coef:
            if self.staleness_transform == "power" and self._clock > self._oldest:
                # Rejection: propose uniformly, accept with (staleness / bound) ** (1 / T). Exact, and O(1) for any L.
                for _ in range(8):
                    slots = self._seen_slots[self.rng.integers(self.num_seen, size=32)]
                    share = (self._clock - self._drawn_at[slots]) / (self._clock - self._oldest)
                    accepted = self.rng.random(32) < share ** (1 / self.staleness_temperature)
                    if accepted.any():
                        return slots[accepted.argmax()]
            cdf = np.cumsum(self._staleness_weights())
        return self._seen_slots[min(int(cdf.searchsorted(self.rng.random() * cdf[-1], side="right")), len(cdf) - 1)]

    def _drawn(self, level: int, slot: int | None = None) -> int:
        """Marks a level as drawn now; one that the buffer does not hold is staged until its first score."""
        slot = self._slots(level) if slot is None else slot
        if slot >= 0:
            self._clock, self._drawn_at[slot] = self._clock + 1, self._clock + 1
        elif len(self.levels) and level not in self._staged:  # which ages no level of the buffer
            self._staged[level], self._num_staged = (self._num_staged + 1, np.nan), self._num_staged + 1
        return level

    # ---- what was learned? -----------------------------------------------------------------------------------------

    def update(self, levels: ndarray, step_scores: ndarray, dones: ndarray, score_tails: bool = True) -> np.recarray:
        """Scores the levels of one rollout (PLR's Algorithm 2); returns what was scored, records of EPISODE.

        All (T, N): each step's level, its score, and whether it ended its episode (CleanRL's `dones` shifted by one).
        score_tails=False leaves out the episodes that the end of the rollout cuts off.
        ValueError for other shapes, scores not finite, unknown levels, a level that changes.
        """
        levels, step_scores, dones = np.asarray(levels, int), np.asarray(step_scores, float), np.asarray(dones, bool)
        shapes, num_steps = (levels.shape, step_scores.shape, dones.shape), len(levels)
        message = f"levels, step_scores and dones must share one shape (T, {self.num_envs}), got {shapes}"
        require(shapes == ((max(num_steps, 1), self.num_envs),) * 3, message)
        require(np.isfinite(step_scores).all(), "step_scores holds nan or infinite values")
        level, score, done = levels.T.ravel(), step_scores.T.ravel(), dones.T.ravel()  # (N * T,), one env after another
        # segments: an environment's steps up to a done, or up to the end of the rollout
        ends = np.union1d(np.flatnonzero(done), np.arange(num_steps - 1, len(done), num_steps))
        starts = np.append(0, ends[:-1] + 1)
        env, steps, complete, level_of = starts // num_steps, ends - starts + 1, done[ends], level[starts]
        require((level == np.repeat(level_of, steps)).all(), "a level changes within an episode of step_scores")
        self._slots(level_of)  # refuses unknown levels
        sums, maxima = np.add.reduceat(score, starts), np.maximum.reduceat(score, starts)
        if self.stitch_episodes:  # Algorithm 4: an episode's first part waits in _tails for the rest
            level_before, steps_before, sum_before, max_before = self._tails[:, env]
            resumed = (starts % num_steps == 0) & (level_before == level_of)
            sums, steps = sums + resumed * sum_before, steps + (resumed * steps_before).astype(np.int64)
            maxima = np.where(resumed, np.maximum(maxima, max_before), maxima)
            self._tails[0], tail = -1, ~complete
            self._tails[:, env[tail]] = level_of[tail], steps[tail], sums[tail], maxima[tail]
        columns = env, level_of, steps, sums / steps, maxima, complete, np.full(len(ends), np.nan)
        tails = ~complete & (score_tails and not self.stitch_episodes)
        order = np.append(np.flatnonzero(complete), np.flatnonzero(tails))
        episodes = np.rec.fromarrays([x[order] for x in columns], EPISODE)
        self.update_scores(episodes.level, episodes.score)
        still = set(self.playing.tolist())  # forget new levels that were never scored and that nobody plays any more
        self._staged = {level: entry for level, entry in self._staged.items() if level in still}
        return episodes

    def step(
        self, levels: ndarray, values: ndarray, next_values: ndarray, rewards: ndarray, dones: ndarray, *,
        gamma: float, gae_lambda: float, score: Callable = lambda advantages, deltas, regrets: abs(advantages),
    ) -> np.recarray:  # fmt: skip
        """Takes one step of every environment; scores the episodes that it ends, each as a whole (Algorithm 4).

        All (N,), and before `next_levels`. next_values: V(s'), 0 where the episode terminated. score: step scores of
        an episode from its advantages (GAE), TD errors and R_max - V, each (steps,) float64; value_l1 by default.
        """
        given = [self._per_env(x, "each argument") for x in (levels, values, next_values, rewards, dones)]
        levels, values, next_values, rewards, dones = np.array(given, np.float64)
        require(np.isfinite(rewards + values + next_values).all(), "values, next_values or rewards are not finite")
        self._slots(levels.astype(np.int64))  # refuses unknown levels
        require(all(rows[0][0] == levels[i] for i, rows in self._open.items()), "a level changes within an episode")
        deltas = rewards + gamma * next_values - values
        for i, row in enumerate(np.stack((levels, values, deltas, rewards), axis=1).tolist()):
            self._open.setdefault(i, []).append(row)
        episodes = []
        for i in np.flatnonzero(dones).tolist():
            level, (_, value, delta, reward) = int(levels[i]), np.array(self._open.pop(i)).T
            self.record_returns([level], [reward.sum()])
            advantage = [*accumulate(delta[::-1], lambda later, d: d + gamma * gae_lambda * later)][::-1]  # GAE
            step_scores = score(np.array(advantage), delta, self.best_returns(level) - value)
            episodes.append((i, level, len(delta), step_scores.mean(), step_scores.max(), True, reward.sum()))
        episodes = np.array(episodes, EPISODE).view(np.recarray)
        self.update_scores(episodes.level, episodes.score)
        return episodes

    def update_scores(self, levels: ndarray, scores: ndarray) -> None:
        """Finished scores from anywhere, levels (n,), scores (n,), in order; then new levels compete for the buffer."""
        levels, scores = np.asarray(levels, np.int64), np.asarray(scores, np.float64)
        finite = levels.ndim == 1 and levels.shape == scores.shape and np.isfinite(scores).all()
        require(finite, f"scores must be finite, one for each of the {levels.size} levels")
        require(self.score_transform != "power" or (scores >= 0).all(), "power needs scores >= 0: use rank or softmax")
        if not len(self.levels):
            return
        slots, new, old, mean = self._slots(levels), {}, 1 - self.alpha, memoryview(self.scores)  # a view: quicker
        for level, slot, m in zip(levels.tolist(), slots.tolist(), scores.tolist()):
            if slot >= 0:
                mean[slot] = old * mean[slot] + self.alpha * m
            elif level in self._staged:
                new[level] = old * new.get(level, m) + self.alpha * m
            else:
                self.counts["late"] += 1  # evicted or rejected meanwhile: nothing to credit it to
        self.seen[slots[slots >= 0]] = True
        self._index_seen()
        for level, score in new.items():  # take an empty slot, or that of the lowest replay probability
            its_number, best_return = self._staged.pop(level)
            slot = self.num_seen
            if slot == len(self.levels):
                slot = self._lowest = int(self.weights().argmin()) if self._lowest is None else self._lowest
                if self.scores[slot] > score:
                    self.counts["rejected"] += 1
                    continue
                self.counts["evicted"] += 1
            self.levels[slot], self.scores[slot], self.seen[slot] = level, score, True
            # As stale as new levels were drawn since. Did they run the clock, it would be the next one to be evicted.
            self._drawn_at[slot], self.best_return[slot] = self._clock + its_number - self._num_staged, best_return
            self._index_seen()
        if not self.fixed:
            self._index()

    def record_returns(self, levels: ndarray, returns: ndarray) -> None:
        """Keeps the best return per level (MaxMC's R_max) of the finished episodes given, levels (n,), returns (n,)."""
        levels, returns, slots = np.asarray(levels), np.asarray(returns, np.float64), self._slots(levels)
        require(levels.shape == returns.shape, f"returns has shape {returns.shape}, that of levels is {levels.shape}")
        np.fmax.at(self.best_return, slots[slots >= 0], returns[slots >= 0])
        for level, value in zip(levels[slots < 0].tolist(), returns[slots < 0].tolist()):
            if level in self._staged:
                self._staged[level] = (self._staged[level][0], float(np.fmax(self._staged[level][1], value)))

    def best_returns(self, levels: ndarray, default: float = 0.0) -> ndarray:
        """The best return recorded for levels, any shape; `default` where no episode has finished yet."""
        best = np.array(np.append(self.best_return, np.nan)[self._slots(levels)])
        for level, (_, value) in self._staged.items():
            best[np.asarray(levels) == level] = value
        return np.where(np.isnan(best), default, best)

    def _per_env(self, x: ndarray, name: str) -> ndarray:
        require(np.shape(x) == (self.num_envs,), f"{name} has shape {np.shape(x)}, expected ({self.num_envs},)")
        return np.asarray(x)

    def _slots(self, levels: ndarray) -> ndarray:
        """The slot of each level, any shape; -1 where the buffer has none, ValueError where there cannot be one."""
        at = self._sorted_levels.searchsorted(levels)
        found = self._sorted_levels[at] == levels
        unknown = ~found if self.fixed else np.less(levels, 0)
        if unknown.any():
            raise ValueError(f"level {np.asarray(levels)[unknown][0]} is not in this sampler's set")
        return np.where(found, self._sorted_slots[at], -1)

    def _index(self) -> None:
        """Rebuilds what is derived from `levels` and `seen`."""
        self._sorted_slots = np.append(np.argsort(self.levels, kind="stable"), -1)  # the last one is no level's
        self._sorted_levels = np.append(self.levels, np.iinfo(np.int64).max)[self._sorted_slots]
        self._index_seen()

    def _index_seen(self) -> None:
        self._seen_slots, self._unseen = np.flatnonzero(self.seen), np.flatnonzero(~self.seen)
        self.num_seen, self._score_cdf, self._lowest = len(self._seen_slots), None, None  # computed when needed
        self._oldest = int(self._drawn_at[self._seen_slots].min(initial=self._clock))  # a lower bound, also after draws

    def metrics(self) -> dict[str, float]:
        """What a curriculum plot needs, all scalars. effective_levels is exp(entropy of P_replay)."""
        p, scores, staleness = self.weights()[self.seen], self.scores[self.seen], self.staleness()[self.seen]
        return {
            "seen_share": self.num_seen / max(len(self.levels), 1),
            "effective_levels": float(np.exp(-(p * np.log(np.maximum(p, 1e-300))).sum())) if self.num_seen else 0.0,
            "score_mean": float(scores.sum() / max(self.num_seen, 1)),
            "score_max": float(scores.max()) if self.num_seen else 0.0,
            "staleness_mean": float(staleness.sum() / max(self.num_seen, 1)),
            "staleness_max": int(staleness.max(initial=0)),
            "replay_share": self.counts["replayed"] / max(self.counts["replayed"] + self.counts["new"], 1),
            "in_progress": int((self.playing >= 0).sum()),
            **{key: self.counts[key] for key in ("started", "completed", "dropped", "evicted", "rejected", "late")},
        }

    _ARRAYS = ("levels", "scores", "seen", "best_return", "playing", "_drawn_at", "_tails")

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the future, generator included: NumPy arrays, numbers and strings only."""
        return {
            "fixed": self.fixed,
            "arrays": {name: getattr(self, name).copy() for name in self._ARRAYS},
            "staged": np.array([(level, *entry) for level, entry in self._staged.items()], float).reshape(-1, 3),
            "counts": dict(self.counts),
            "clocks": [self._clock, self._oldest, self._next, self._num_staged],
            "rng": self.rng.bit_generator.state,
            **({"open": np.array([(i, *row) for i, rows in self._open.items() for row in rows])} if self._open else {}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict()`. ValueError if it is of a sampler with another shape, level set or version."""
        arrays = {name: np.asarray(array) for name, array in state["arrays"].items()}
        same = state["fixed"] == self.fixed and all(arrays[k].shape == getattr(self, k).shape for k in self._ARRAYS)
        same = same and len(state["clocks"]) == 4 and not (self.fixed and (arrays["levels"] != self.levels).any())
        require(same, "the state is of a sampler with other levels, another number of environments, or an older one")
        for name in self._ARRAYS:
            getattr(self, name)[:] = arrays[name]
        self._index()
        self._staged = {int(level): (int(at), float(best)) for level, at, best in np.asarray(state["staged"])}
        self.counts = dict(state["counts"])
        self._clock, self._oldest, self._next, self._num_staged = state["clocks"]
        self.rng.bit_generator.state = state["rng"]
        rows = np.asarray(state.get("open", ())).tolist()
        self._open = {int(i): [row for j, *row in rows if i == j] for i in {i for i, *_ in rows}}
