"""Robust PLR in RLlib: PPO on RLlib's current API stack, one LevelSampler for all env runners. Ray 2.60.

    pip install "ray[rllib]==2.60.0" "minigrid==3.2.0" torch
    PYTHONPATH=. python tests/integrations/rllib_robust_plr.py     # MiniGrid, 2 env runners with 8 environments each

What to copy: this file and plr_sampler.py, next to each other. Change `make_env`, where the seed of a reset must be its
level, and the settings at the end of the file. Robust PLR: Jiang et al. 2021 (arXiv 2110.02439), Algorithm 1.

- One sampler: `GlobalSampler` is a named Ray actor. Every environment of every env runner asks it for a level at each
  reset, so its counts are sums over all of them. Scores come back through the algorithm alone.
- One replay decision per training iteration. Each iteration starts fresh episodes, so it is all replay or all new.
- No learning on new levels: `training_step` does not call the learner group then. Nothing is computed and thrown away,
  and parameters, Adam's moments, KL coefficient and weight version stay as they are. `model.eval()` would stop none of
  it: it only switches layers such as dropout, and the learner switches back. (An env-to-module connector with a state
  of its own, such as MeanStdFilter, is updated while acting: it sees new levels too.)
- An episode may span any number of rollout fragments of its iteration. It is scored once, whole, when it has ended,
  by the value function of the network that acted. What the iteration's end cuts off is dropped, never scored.
- `Played` has each episode's mean and max advantage, result["curriculum"] their means and the sampler's totals.
- An env runner that dies loses its episodes in progress and those on their way to the learner: they count as dropped
  and no score changes. RLlib restarts it, and the run goes on with the others meanwhile. If nobody delivers anything
  for more iterations in a row than `num_consecutive_env_runner_failures_tolerance` allows, the run ends with an error.
- The sampler is part of the algorithm's checkpoint, which is refused with another number of environments (env runners
  x num_envs_per_env_runner). Evaluation env runners do not ask it: they play random levels.

Not repeatable to the bit: which environment asks first depends on the machine's timing.
"""

from functools import partial
from typing import Any, NamedTuple

import gymnasium as gym
import minigrid  # noqa: F401  registers the environments
import numpy as np
import ray
import torch
import tree  # dm_tree, a dependency of RLlib: observations may be nested
from minigrid.wrappers import ImgObsWrapper
from numpy import ndarray
from plr_sampler import LevelSampler
from ray.rllib.algorithms.ppo import PPO, PPOConfig
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.core.learner.learner import Learner
from ray.rllib.env.env_runner import EnvRunner
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.utils.metrics import ENV_RUNNER_RESULTS, LEARNER_RESULTS, NUM_ENV_STEPS_SAMPLED_LIFETIME
from ray.tune import register_env

# ---- one sampler for everybody ---------------------------------------------------------------------------------------


class GlobalSampler:
    """The run's only LevelSampler. As a Ray actor it takes one call at a time, so that every count is a global sum.

    An episode is completed when its score has arrived, not when its environment has ended it: an env runner that dies
    takes along what it had not delivered. Environments are numbered over all env runners, 0 to num_envs - 1.
    """

    def __init__(self, num_envs: int, **settings: Any):
        self.sampler = LevelSampler(num_envs=num_envs, **settings)
        self.envs, self.replay = np.arange(num_envs), False
        # (N,) int64: episodes that LevelSampler counts as completed, since their environment has started another one,
        # less those that were scored. -1: scored, and the next one has not started.
        self.unscored = np.zeros(num_envs, np.int64)

    def start_iteration(self) -> bool:
        """Abandons what is in progress and makes the replay decision of Algorithm 1 for all environments."""
        self.drop(self.envs.tolist())
        self.replay = self.sampler.decide_replay()
        return self.replay

    def start_episode(self, env: int, cut: bool) -> int:
        """The level of the episode that environment env starts now. cut: its last one did not end."""
        mask = self.envs == env
        if cut:
            self.sampler.drop(mask)
        self.unscored += mask & (self.sampler.playing >= 0)
        return int(self.sampler.next_levels(mask, self.replay)[env])

    def best_returns(self, levels: list[int], returns: list[float]) -> ndarray:
        """Takes in the whole returns (n,) of episodes on levels (n,); gives each level's best one so far, float64."""
        self.sampler.record_returns(levels, returns)
        return self.sampler.best_returns(np.array(levels))

    def score(self, envs: list[int], levels: list[int], scores: list[float]) -> None:
        """Completes episodes, one entry each: where it was played, its level, its score."""
        np.subtract.at(self.unscored, envs, 1)
        self.sampler.update_scores(levels, scores)

    def drop(self, envs: list[int]) -> None:
        """Counts as dropped all that these environments have started and that was not scored."""
        mask = np.isin(self.envs, envs)
        self.sampler.drop(mask)
        unscored = int(self.unscored[mask].sum())
        self.sampler.counts["completed"] -= unscored
        self.sampler.counts["dropped"] += unscored
        self.unscored[mask] = 0

    def metrics(self) -> dict[str, float]:
        """LevelSampler's, where started = completed + in_progress + dropped, and completed is what was scored."""
        metrics, unscored = self.sampler.metrics(), int(self.unscored.sum())
        metrics["completed"] -= unscored
        metrics["in_progress"] += unscored
        return metrics

    def levels(self) -> dict[str, ndarray]:
        """What is known of each level seen: its id, score and probability of replay, arrays (num_seen,)."""
        known = {"level": self.sampler.levels, "score": self.sampler.scores, "p": self.sampler.weights()}
        return {name: array[self.sampler.seen] for name, array in known.items()}

    def get_state(self) -> dict[str, Any]:
        return {"sampler": self.sampler.state_dict(), "unscored": self.unscored.copy()}

    def set_state(self, state: dict[str, Any]) -> None:
        self.sampler.load_state_dict(state["sampler"])
        self.unscored[:] = state["unscored"]


def require_as_many(saved: int, here: int) -> None:
    """The sampler knows what each environment plays, so a checkpoint is for as many of them."""
    if saved != here:
        raise ValueError(
            f"the checkpoint's sampler has {saved} environments, here are {here}: restore it with the same"
            " num_env_runners x num_envs_per_env_runner"
        )


def sampler_name(trial_id: str) -> str:
    """The actor's name: Ray Tune may run several trials in one cluster, each with a sampler of its own."""
    return f"level-sampler-{trial_id}"


# ---- every episode's level comes from it -----------------------------------------------------------------------------


class AssignedLevel(gym.Wrapper):
    """Plays at each reset the level that the sampler assigns; `info` of the reset says which, and in which environment.

    Without a sampler (evaluation) it changes nothing.
    """

    sampler, index = None, -1  # the actor, and this environment's number: set by `AssignLevels`
    running = False

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        if self.sampler is None:
            return self.env.reset(seed=seed, options=options)
        level = ray.get(self.sampler.start_episode.remote(self.index, cut=self.running))
        self.running = True
        obs, info = self.env.reset(seed=level, options=options)
        return obs, info | {"level": level, "env": self.index}

    def step(self, action: Any) -> tuple:
        obs, reward, terminated, truncated, info = self.env.step(action)
        self.running = not (terminated or truncated)
        return obs, reward, terminated, truncated, info


class AssignLevels(RLlibCallback):
    """Connects each environment of an env runner to the sampler, also when the env runner was restarted."""

    def on_environment_created(
        self, *, env_runner: EnvRunner, env: gym.vector.VectorEnv, env_context, **_: Any
    ) -> None:
        if not env_runner.config.in_evaluation:
            first = max(env_context.worker_index - 1, 0) * env.num_envs  # env runners count from 1; 0 is the local one
            env.set_attr("index", list(range(first, first + env.num_envs)))
            env.set_attr("sampler", ray.get_actor(sampler_name(env_runner.tune_trial_id)))


def make_env(config: dict) -> gym.Env:
    """Yours may be any Gymnasium environment whose `reset(seed=level)` decides the level."""
    env = gym.wrappers.FlattenObservation(ImgObsWrapper(gym.make(**config)))
    env = gym.wrappers.TransformObservation(env, lambda obs: obs.astype(np.float32) / 10, gym.spaces.Box(0, 26, (147,)))
    env = gym.wrappers.TransformAction(env, int, gym.spaces.Discrete(3))  # left, right, forward are all it takes here
    return AssignedLevel(env)


register_env("assigned-levels", make_env)


# ---- what was there to learn? ----------------------------------------------------------------------------------------


class Played(NamedTuple):
    """An episode that has ended, from its first step to its last, whatever fragments it came in."""

    env: int
    level: int
    steps: int
    score: float
    mean_advantage: float
    max_advantage: float
    episode_return: float  # undiscounted, of the whole episode


def gae(rewards: ndarray, values: ndarray, terminated: bool, gamma: float, lambda_: float) -> ndarray:
    """Advantages (T,) of a whole episode from rewards (T,) and values (T + 1,), the last of its last observation."""
    next_values = values[1:].copy()
    next_values[-1] *= not terminated  # a time limit is no end: bootstrap from there, as RLlib's learner does
    deltas = rewards + gamma * next_values - values[:-1]
    advantages, running = np.zeros(len(rewards)), 0.0
    for t in reversed(range(len(rewards))):
        advantages[t] = running = deltas[t] + gamma * lambda_ * running
    return advantages


def level_score(advantages: ndarray, values: ndarray, best_return: float) -> float:
    """MaxMC: the best return on this level so far - V, mean over the steps. advantages (T,), values (T,), float64.

    Positive value loss is `np.maximum(advantages, 0).mean()`. Your own is one line as well.
    """
    return float((best_return - values).mean())


def values_of(learner: Learner, observations: list) -> list[ndarray]:
    """V of whole episodes, observations (T + 1, ...) each -> (T + 1,) float64 each. Runs where the learner is."""
    module = learner.module[DEFAULT_MODULE_ID].unwrapped()
    values = []
    for obs in observations:
        batch = {Columns.OBS: tree.map_structure(lambda x: torch.as_tensor(x, device=learner.device), obs)}
        if module.is_stateful():  # a recurrent module takes (1, T + 1, ...), from the state that an episode starts with
            batch[Columns.STATE_IN] = tree.map_structure(torch.as_tensor, module.get_initial_state())
            batch = tree.map_structure(lambda x: x[None].to(learner.device), batch)
        with torch.no_grad():
            values.append(module.compute_values(batch).double().cpu().numpy().reshape(-1))
    return values


# ---- the algorithm ---------------------------------------------------------------------------------------------------


class RobustPLRConfig(PPOConfig):
    def __init__(self, algo_class: type | None = None):
        super().__init__(algo_class=algo_class or RobustPLR)
        self.callbacks(AssignLevels)  # your own: .callbacks([AssignLevels, Yours])
        self.level_sampler: dict[str, Any] = {}

    def curriculum(self, **settings: Any) -> "RobustPLRConfig":
        """LevelSampler's arguments, but for num_envs and seed: `buffer_size`, `nu`, `temperature`, ..."""
        self.level_sampler = settings
        return self


class RobustPLR(PPO):
    """PPO that learns from replayed levels only (Algorithm 1), for single-agent environments."""

    @classmethod
    def get_default_config(cls) -> RobustPLRConfig:
        return RobustPLRConfig()

    def setup(self, config: RobustPLRConfig) -> None:
        num_envs = max(config.num_env_runners, 1) * config.num_envs_per_env_runner
        self.num_sampler_envs = num_envs
        actor = ray.remote(num_cpus=0)(GlobalSampler).options(name=sampler_name(self.trial_id))  # refuses a second one
        self.sampler = actor.remote(num_envs, seed=config.seed or 0, **config.level_sampler)
        self.failures = 0  # iterations in a row without any fragment
        super().setup(config)

    def training_step(self) -> None:
        # Algorithm 1: sample the replay decision d, one for all environments
        replay = ray.get(self.sampler.start_iteration.remote())
        # d = 0: new levels from the generator. d = 1: levels from the buffer, by P_replay. Collect the trajectories
        fragments, lost = self.rollout()
        # the score S and the buffer's update, neither of which needs the policy's
        played = self.played(fragments)
        if played:
            ray.get(self.sampler.score.remote(*map(list, zip(*((p.env, p.level, p.score) for p in played)))))
        ray.get(self.sampler.drop.remote(lost))
        # d = 1: update the policy
        if replay and fragments:
            self.learn(fragments)
        self.log(replay, played)

    def rollout(self) -> tuple[list[SingleAgentEpisode], list[int]]:
        """The iteration's fragments of fresh episodes, in order, and the environments whose env runner was lost."""
        # Before each rollout, not after each update: an env runner restarted unnoticed has its initial weights.
        self.env_runner_group.sync_weights(from_worker_or_learner_group=self.learner_group, inference_only=True)
        fragments, lost, steps, fresh = [], [], 0, True
        alive = self.env_runner_group.healthy_worker_ids()  # empty if the local env runner does the work
        while steps < self.config.total_train_batch_size:
            results = self.sample(alive, fresh)
            if results:
                self.metrics.aggregate([metrics for _, _, metrics in results], key=ENV_RUNNER_RESULTS)
            new = [fragment for _, episodes, _ in results for fragment in episodes]
            fragments, steps, fresh = fragments + new, steps + sum(map(len, new)), False
            answered = [index for index, _, _ in results]
            for index in set(alive).difference(answered):  # died, or did not answer in time
                first = (index - 1) * self.config.num_envs_per_env_runner
                lost += range(first, first + self.config.num_envs_per_env_runner)
            alive = [index for index in alive if index in answered]
            if not results:
                break
        self.failures = 0 if fragments else self.failures + 1
        if self.failures > self.config.num_consecutive_env_runner_failures_tolerance:
            raise RuntimeError(f"no env runner returned anything in {self.failures} iterations: see the errors above")
        return fragments, lost

    def sample(self, env_runners: list[int], fresh: bool) -> list[tuple]:
        """(index, fragments, metrics) of each of these env runners that answers; fresh: first, start new episodes."""

        def sample(env_runner: EnvRunner) -> tuple:
            return env_runner.worker_index, env_runner.sample(force_reset=fresh), env_runner.get_metrics()

        return self.env_runner_group.foreach_env_runner(
            sample,
            local_env_runner=self.config.num_env_runners == 0,
            remote_worker_ids=env_runners,
            timeout_seconds=self.config.sample_timeout_s,
        )

    def played(self, fragments: list[SingleAgentEpisode]) -> list[Played]:
        """Puts the fragments of each episode together and scores those that have ended."""
        parts: dict[str, list[SingleAgentEpisode]] = {}
        for fragment in fragments:
            parts.setdefault(fragment.id_, []).append(fragment)
        whole = [episode for episode in parts.values() if episode[-1].is_done]
        if not whole:
            return []

        def joined(*arrays: ndarray) -> ndarray:  # a fragment starts with the observation that ended the one before
            return np.concatenate([x[:-1] for x in arrays[:-1]] + [arrays[-1]])

        observations = [tree.map_structure(joined, *(f.get_observations() for f in episode)) for episode in whole]
        evaluate = partial(values_of, observations=observations)
        results = self.learner_group.foreach_learner(evaluate, remote_actor_ids=[0])  # all hold the same module
        rewards = [np.concatenate([fragment.get_rewards() for fragment in episode]) for episode in whole]
        infos = [episode[0].get_infos(0) for episode in whole]
        if not all("level" in info for info in infos):
            raise ValueError(
                "an episode has no assigned level: wrap the environment in AssignedLevel, use AssignLevels"
            )
        levels, returns = [int(info["level"]) for info in infos], [float(r.sum()) for r in rewards]
        best_returns = ray.get(self.sampler.best_returns.remote(levels, returns))
        played = []
        for i, values in enumerate(results.result_or_errors[0].get()):
            a = gae(rewards[i], values, whole[i][-1].is_terminated, self.config.gamma, self.config.lambda_)
            score = level_score(a, values[:-1], best_returns[i])
            summary = len(a), score, float(a.mean()), float(a.max()), returns[i]
            played.append(Played(int(infos[i]["env"]), levels[i], *summary))
        return played

    def learn(self, fragments: list[SingleAgentEpisode]) -> None:
        """PPO's update, as in PPO.training_step."""
        sampled = self.metrics.peek((ENV_RUNNER_RESULTS, NUM_ENV_STEPS_SAMPLED_LIFETIME), default=0)
        results = self.learner_group.update(
            episodes=fragments,
            timesteps={NUM_ENV_STEPS_SAMPLED_LIFETIME: sampled},
            num_epochs=self.config.num_epochs,
            minibatch_size=self.config.minibatch_size,
            shuffle_batch_per_epoch=self.config.shuffle_batch_per_epoch,
        )
        self.metrics.aggregate(results, key=LEARNER_RESULTS)

    def log(self, replay: bool, played: list[Played]) -> None:
        """result["curriculum"]: the decision, this iteration's advantages, and the sampler's totals."""
        logged = {"replay": int(replay), "episodes": len(played), **ray.get(self.sampler.metrics.remote())}
        if played:
            logged["advantage_mean"] = np.mean([p.mean_advantage for p in played])  # over episodes
            logged["advantage_max"] = np.mean([p.max_advantage for p in played])
            logged["return_replayed" if replay else "return_new"] = np.mean([p.episode_return for p in played])
        for key, value in logged.items():
            self.metrics.log_value(("curriculum", key), value, window=1)

    def get_state(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return super().get_state(*args, **kwargs) | {"level_sampler": ray.get(self.sampler.get_state.remote())}

    def set_state(self, state: dict[str, Any]) -> None:
        if "level_sampler" in state:
            require_as_many(len(state["level_sampler"]["unscored"]), self.num_sampler_envs)
        super().set_state(state)
        if "level_sampler" in state:
            ray.get(self.sampler.set_state.remote(state["level_sampler"]))

    def cleanup(self) -> None:
        super().cleanup()
        ray.kill(self.sampler)  # frees the name


# ---- settings --------------------------------------------------------------------------------------------------------


def config(**env_config: Any) -> RobustPLRConfig:
    return (
        RobustPLRConfig()
        .environment("assigned-levels", env_config=env_config)
        .env_runners(num_env_runners=2, num_envs_per_env_runner=8, rollout_fragment_length=64)
        .fault_tolerance(restart_failed_env_runners=True)
        .training(
            train_batch_size_per_learner=2048,
            minibatch_size=256,
            num_epochs=10,
            lr=1e-3,
            gamma=0.99,
            lambda_=0.9,
            entropy_coeff=0.01,
            clip_param=0.2,
            vf_clip_param=1.0,
            use_kl_loss=False,
            grad_clip=0.5,
        )
        .rl_module(model_config={"fcnet_hiddens": [128, 64], "fcnet_activation": "relu"})
        .curriculum(buffer_size=128, rho=0.5, nu=0.5, replay_schedule="fixed", staleness_coef=0.3, temperature=1.0)
        .debugging(seed=1, log_level="ERROR")
    )


if __name__ == "__main__":
    ray.init(include_dashboard=False, object_store_memory=200 * 2**20)
    algorithm = config(id="MiniGrid-Empty-Random-6x6-v0", max_steps=40).build_algo()
    for iteration in range(30):
        c = algorithm.train()["curriculum"]
        shown = "replay return_replayed return_new advantage_mean advantage_max started completed in_progress dropped"
        print(iteration, *(f"{name}={c[name]:.3g}" for name in shown.split() if name in c), flush=True)
    algorithm.stop()
