"""Steps per second of the training scripts, as they are; another checkout or the peers beside them.

    python benchmarks/throughput.py                                       # all settings
    python benchmarks/throughput.py --settings procgen-bf16 mazes --rounds 3 --out DIR
    python benchmarks/throughput.py --settings mazes --against ../before  # A/B, in turns
    python benchmarks/throughput.py --cleanrl PATH/ppo_procgen.py
    python benchmarks/throughput.py --jaxued PATH --jaxued-python PATH/bin/python   # see peers.py

A process for each run. They take turns (A B A B ...), so that what else the machine does meets all.
A run's speed is the median of SPS in its progress.csv after the first two iterations; of mazes that
of one iteration on new levels and one on replayed ones, which come equally often.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import isnan, nan
from pathlib import Path
from statistics import harmonic_mean, median
from typing import NamedTuple

import torch
import tyro
from common import ROOT, SCRIPTS, commit_and_machine, markdown, read_csv, refuse, write_csv
from launch import last_words
from peers import cleanrl, jaxued


class Setting(NamedTuple):
    """What is measured, by name."""

    script: str  # a key of SCRIPTS
    num_envs: int
    flags: str  # all others
    iterations: int


PROCGEN = "--env-id starpilot"
MAZES = "--rho 0.01 --replay-schedule fixed"  # replay begins with the third iteration at the latest
SETTINGS = {
    "procgen": Setting("procgen", 64, PROCGEN, 4),
    "procgen-bf16": Setting("procgen", 64, f"{PROCGEN} --precision bf16", 5),
    "mazes": Setting("mazes", 32, MAZES, 26),
    "mazes-bf16": Setting("mazes", 32, f"{MAZES} --precision bf16", 26),
    "mazes-plr": Setting("mazes", 32, f"{MAZES} --curriculum plr", 14),
    "mazes-512": Setting("mazes", 512, MAZES, 14),
}
NUM_STEPS = 256  # of each environment per iteration
PEERS = {"procgen": "CleanRL", "mazes": "jaxued"}


@dataclass
class Args:
    settings: tuple[str, ...] = tuple(SETTINGS)  # which of SETTINGS
    against: Path | None = None  # another checkout: its scripts run the same settings
    cleanrl: Path | None = None  # CleanRL's ppo_procgen.py, beside ours on Procgen
    jaxued: Path | None = None  # a checkout of github.com/DramaCow/jaxued, beside ours on mazes
    jaxued_python: str = sys.executable  # interpreter with jaxued's requirements
    rounds: int = 2  # times that each of them runs
    limit: float = 1200.0  # seconds for one run
    out: Path | None = None  # folder for throughput.md and throughput.csv


def argv(setting: Setting, run_dir: Path) -> list[str]:
    """The flags of one run."""
    steps = setting.iterations * setting.num_envs * NUM_STEPS
    line = f"--num-envs {setting.num_envs} --num-steps {NUM_STEPS} --total-timesteps {steps}"
    line += f" --eval-interval 0 --eval-episodes 1 --checkpoint-interval 0 {setting.flags}"
    return [*line.split(), "--run-dir", str(run_dir)]


def speed_of(run_dir: Path) -> float:
    """Steps/s of a run that has ended."""
    kinds: dict[str, list[float]] = {}
    for row in read_csv(run_dir / "progress.csv")[2:]:
        kinds.setdefault(row.get("replay", ""), []).append(float(row["SPS"]))
    if not kinds:
        raise RuntimeError("it has fewer than three iterations")
    return harmonic_mean([median(speeds) for speeds in kinds.values()])


def measure(checkout: Path, setting: Setting, limit: float) -> float:
    """Steps/s of a checkout's script in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        command = [sys.executable, f"{SCRIPTS[setting.script]}.py"]
        command += argv(setting, run_dir)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        done = subprocess.run(command, cwd=checkout, timeout=limit, **pipes)
        if done.returncode:
            raise RuntimeError(last_words(done.stdout))
        return speed_of(run_dir)


def contenders(args: Args) -> dict[str, Callable[[], float]]:
    """Name in the table -> one measurement, in the order of their turns."""
    found: dict[str, Callable[[], float]] = {}
    for name in args.settings:
        setting = SETTINGS[name]
        found[name] = partial(measure, ROOT, setting, args.limit)
        if args.against:
            found[f"{name}, against"] = partial(measure, args.against, setting, args.limit)
    scripts = [SETTINGS[name].script for name in args.settings]
    if args.cleanrl and "procgen" in scripts:
        found["CleanRL"] = partial(cleanrl, args.cleanrl, NUM_STEPS, args.limit)
    if args.jaxued and "mazes" in scripts:
        found["jaxued"] = partial(jaxued, args.jaxued, args.jaxued_python, NUM_STEPS, args.limit)
    return found


def table(speeds: dict[str, list[float]]) -> str:
    """Medians over the rounds; ratios of each round to the other checkout's and to the peer's."""
    lines = [["", "steps/s", "rounds", "ratio to --against", "ratio to the peer"]]
    for name, rounds in speeds.items():
        measured = [speed for speed in rounds if not isnan(speed)] or [nan]
        line = [name, f"{median(measured):,.0f}", ", ".join(f"{speed:,.0f}" for speed in rounds)]
        peer = PEERS[SETTINGS[name].script] if name in SETTINGS else ""
        for other in (f"{name}, against", peer):
            pairs = zip(rounds, speeds.get(other, []))
            line.append(", ".join(f"{ours / theirs:.2f}" for ours, theirs in pairs))
        lines.append(line)
    return markdown(lines)


def report(args: Args, speeds: dict[str, list[float]], notes: list[str]) -> str:
    text = f"{table(speeds)}\n{commit_and_machine(ROOT / 'ppo_plr_procgen.py')}; PyTorch "
    text += f"{torch.__version__}, {torch.get_num_threads()} threads; load average at the end "
    text += f"{os.getloadavg()[0]:.1f}. {NUM_STEPS} steps per iteration; a process per round.\n"
    if args.against:
        against = commit_and_machine(args.against.resolve() / "ppo_plr_procgen.py")
        text += f"--against: {against.partition(' on ')[0]}.\n"
    for name in dict.fromkeys(name.partition(",")[0] for name in speeds):
        if name in SETTINGS:
            setting = SETTINGS[name]
            text += f"- {name}: {setting.num_envs} environments, `{setting.flags}`\n"
    return text + "".join(f"- {note}\n" for note in notes)


def main() -> None:
    args = tyro.cli(Args)
    for name in args.settings:
        if name not in SETTINGS:
            refuse(f"--settings {name} must be one of {', '.join(SETTINGS)}.")
    speeds: dict[str, list[float]] = {}
    notes: list[str] = []
    for i in range(1, args.rounds + 1):
        for name, measured in contenders(args).items():
            try:
                speed = measured()
                said = f"{name}, round {i}: {speed:,.0f} steps/s"
            except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
                speed = nan  # so that the others' ratios stay those of one round
                said = f"{name}, round {i} failed: {str(error).splitlines()[0]}"
                notes.append(said)
            speeds.setdefault(name, []).append(speed)
            print(said, file=sys.stderr, flush=True)
            if args.out:  # after each: whatever happens to the next
                rows = [{"contender": x, "steps_per_second": y} for x in speeds for y in speeds[x]]
                write_csv(args.out / "throughput.csv", rows)
                (args.out / "throughput.md").write_text(report(args, speeds, notes))
    print(report(args, speeds, notes))


if __name__ == "__main__":
    main()
