"""Loads what a script loads as it starts, for the processes that are forked from here: see
support.Process."""

import support
import torch._dynamo  # noqa: F401  the first optimizer imports it

# Procgen's pictures, of all games
support.ppo_plr_procgen.ProcgenLevels(1, "bigfish", "easy", 0).close()
