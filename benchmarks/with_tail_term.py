"""Our Procgen script with one thing as level-replay has it: the score of an episode that the end
of a rollout cuts off counts one step more, abs(V'), the value of what follows.

    python benchmarks/with_tail_term.py --env-id starpilot --seed 1 --total-timesteps 2015232
        --precision bf16 --run-dir runs/tail_term_1              # all flags are the script's
    python benchmarks/with_tail_term.py --resume runs/tail_term_1

Is it why level-replay's PLR learns otherwise than ours? args.json says what the run is.
"""

from dataclasses import dataclass, field

import numpy as np
from common import refuse
from numpy import ndarray
from torch import Tensor

import ppo_plr_procgen as script

our_check_args = script.check_args


def with_tail_term(step_scores: ndarray, ended: ndarray, next_values: ndarray) -> ndarray:
    """(T, N), (T, N) bool, V' (N,) -> step scores (T, N), of which the means over the n steps of
    cut-off episodes are (S + abs(V')) / (n + 1), S being the sums of the scores given."""
    n = np.where(ended.any(axis=0), ended[::-1].argmax(axis=0), len(ended))  # (N,)
    in_tail = np.arange(len(ended))[:, None] >= len(ended) - n
    sums = np.where(in_tail, step_scores, 0).sum(axis=0, dtype=np.float64)
    changed = step_scores.astype(np.float64)
    changed[-1] += np.where(n > 0, (n * abs(next_values) - sums) / (n + 1), 0)
    return changed


@dataclass
class Args(script.Args):
    exp_name: str = "with_tail_term"
    implementation: str = field(init=False, default="ours with the tail term")


class Agent(script.Agent):
    def get_value(self, x: Tensor) -> Tensor:
        values = super().get_value(x)
        LevelSampler.next_values = script.to_numpy(values)
        return values


class LevelSampler(script.LevelSampler):
    next_values = np.zeros(0)  # (N,) V' of the last rollout

    def update(self, levels: ndarray, step_scores: ndarray, dones: ndarray) -> np.recarray:
        return super().update(levels, with_tail_term(step_scores, dones, self.next_values), dones)


def check_args(args: Args) -> None:
    if args.score != "value_l1" or args.stitch_episodes or script.WORLD > 1:
        refuse("with_tail_term.py needs --score value_l1, no --stitch-episodes and no torchrun.")
    our_check_args(args)


def main() -> None:
    script.Agent, script.LevelSampler, script.Args = Agent, LevelSampler, Args
    script.check_args = check_args
    script.main()


if __name__ == "__main__":
    main()
