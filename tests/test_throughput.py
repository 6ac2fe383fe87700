"""benchmarks/throughput.py: what it makes of the scripts' files and of its own measurements."""

import sys

import pytest
from support import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import peers
import throughput
from throughput import COLUMNS, PHASES, Args


def progress(path, kinds, seen):
    """A row every (1 + 10 * kind) seconds after the last, as mazes write them; without kinds, as Procgen does."""
    lines, wall = [("wall_seconds,seen_share,replay" if kinds else "wall_seconds,seen_share")], 0.0
    for i, share in enumerate(seen):
        wall += 1 + 10 * kinds[i] if kinds else i + 1
        lines.append(f"{wall},{share}" + (f",{kinds[i]}" if kinds else ""))
    path.write_text("\n".join(lines) + "\n99,0.5")  # the last line is being written
    return path


def test_iterations_count_from_the_fill_on_and_the_first_of_each_kind_does_not(tmp_path):
    path = progress(tmp_path / "progress.csv", [0, 0, 1, 0, 1, 1, 0], [0.1, 0.5, 0.5, 0.6, 0.6, 0.6, 0.6])
    assert throughput.iteration_seconds(path, 0.5) == {0: [1.0], 1: [11.0, 11.0]}
    assert throughput.iteration_seconds(path, 0.9) == {0: [], 1: []}
    path = progress(tmp_path / "progress.csv", None, [0.1, 0.2, 0.3])
    assert throughput.iteration_seconds(path, 0) == {0: [], 1: [2.0, 3.0]}  # of Procgen all but the run's first
    assert throughput.iteration_seconds(tmp_path / "none.csv", 0) == {0: [], 1: []}


def test_the_plan_has_every_contender_once_and_several_runs_last():
    args = Args(compile=True, at_once=(1, 4), cleanrl=ROOT, jaxued=ROOT)
    items = throughput.plan(args)
    names = [(part, script, n, name) for part, script, n, name, *_ in items]
    assert [part for part, *_ in names] == sorted(
        (part for part, *_ in names), key=["environment", "training", "phases", "at_once"].index
    )
    training = [name for part, script, n, name in names if (part, script, n) == ("training", "mazes", 32)]
    how = ("fp32", "bf16", "fp32, compiled", "bf16, compiled")
    assert training == [*(f"Robust PLR, {x}" for x in how), "PLR, fp32", "jaxued"]
    assert [name for part, script, _, name in names if (part, script) == ("training", "procgen")] == [*how, "CleanRL"]
    assert names.count(("at_once", "procgen", 64, "bf16")) == 2 and len(set(names)) == len(names) - 2


def test_ratios_shares_and_left_out_measurements_are_in_the_tables(tmp_path):
    rows = []
    for part, name, i, speed, more in (
        ("training", "fp32", 1, 300.0, {}), ("training", "CleanRL", 1, 100.0, {"wrappers": 0.001}),
        ("training", "fp32", 2, 360.0, {}), ("training", "CleanRL", 2, 120.0, {"wrappers": 0.002}),
        ("phases", "fp32", 1, 200.0, dict.fromkeys(PHASES, 1.0) | {"update": 5.0}),
        ("at_once", "fp32", 1, 300.0, {"runs": 1}), ("at_once", "fp32", 1, 750.0, {"runs": 4}),
    ):  # fmt: skip
        row = {"part": part, "script": "procgen", "num_envs": 64, "contender": name, "round": i}
        rows.append(dict.fromkeys(COLUMNS, "") | row | {"steps_per_second": speed} | more)
    text = throughput.report(Args(cleanrl=ROOT), rows, ["at_once: left out"])
    assert "| procgen | 64 | fp32 | 330 | 300 to 360 | 3.00 | 3.00, 3.00 |" in text
    assert "| 10.0% | 10.0% | 10.0% | 10.0% | 50.0% | 10.0% |" in text and "| 4 | 750 | 2.50 |" in text
    assert "0.20% of its time" in text and "- at_once: left out\n" in text
    throughput.plot(Args(), rows, tmp_path / "throughput.png")
    assert (tmp_path / "throughput.png").stat().st_size > 10_000


def test_a_peer_that_fails_says_what_it_said():
    with pytest.raises(RuntimeError, match="no such game"):
        peers.read_lines([sys.executable, "-c", "raise SystemExit('no such game')"], {}, 60, "SPS:")
    lines = peers.read_lines([sys.executable, "-c", "print('SPS: 1'); print('other'); print('SPS: 2')"], {}, 60, "SPS:")
    assert [line for _, line in lines] == ["SPS: 1", "other", "SPS: 2"]
