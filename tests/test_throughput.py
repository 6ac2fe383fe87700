"""benchmarks/throughput.py and peers.py: what they make of files, of measurements and of failures.
No speed is asserted."""

import sys
from pathlib import Path

import pytest
from support import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import peers
import throughput

import ppo_plr_procgen
import ppo_robust_plr_minigrid


def test_a_speed_is_the_median_after_two_iterations_and_of_mazes_half_of_each_kind(tmp_path):
    progress = tmp_path / "progress.csv"
    progress.write_text("global_step,SPS\n1,1\n2,2\n3,50\n4,60\n5,1000\n6,7")  # half a row is left
    assert throughput.speed_of(tmp_path) == 60
    rows = ["global_step,SPS,replay", "1,9,0", "2,9,0", "3,300,0", "4,100,1", "5,300,0", "6,100,1"]
    progress.write_text("\n".join([*rows, ""]))
    assert throughput.speed_of(tmp_path) == 150  # 2 steps in 1/300 + 1/100 seconds
    progress.write_text("global_step,SPS\n1,1\n2,2\n")
    with pytest.raises(RuntimeError, match="fewer than three iterations"):
        throughput.speed_of(tmp_path)


@pytest.mark.parametrize("name", throughput.SETTINGS)
def test_settings_are_flags_of_their_script_with_enough_iterations(name, monkeypatch):
    """Parsed by the script itself, which is not started."""
    setting = throughput.SETTINGS[name]
    scripts = {"procgen": ppo_plr_procgen, "mazes": ppo_robust_plr_minigrid}
    flags = throughput.argv(setting, Path("run"))
    args = throughput.tyro.cli(scripts[setting.script].Args, args=flags)
    assert args.num_envs == setting.num_envs and args.run_dir == "run"
    assert args.num_iterations == setting.iterations > 3
    assert (args.eval_interval, args.eval_episodes, args.checkpoint_interval) == (0, 1, 0)


def test_a_run_is_measured_and_another_checkout_takes_turns_with_it(tmp_path, monkeypatch, capsys):
    script = "import sys\nfrom pathlib import Path\nrun_dir = Path(sys.argv[-1])\nrun_dir.mkdir()\n"
    text = '(run_dir / "progress.csv").write_text("SPS\\n1\\n1\\n{speed}\\n")\n'
    for folder, speed in (("ours", 300), ("before", 200)):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "ppo_plr_procgen.py"
        path.write_text(script + text.replace("{speed}", str(speed)))
    broken = tmp_path / "before" / "ppo_robust_plr_minigrid.py"
    broken.write_text("raise SystemExit('error: no such flag')")
    (tmp_path / "ours" / broken.name).write_text(script + text.replace("{speed}", "70"))
    monkeypatch.setattr(throughput, "ROOT", tmp_path / "ours")
    flags = f"--settings procgen mazes --against {tmp_path}/before --out {tmp_path}/out"
    monkeypatch.setattr(sys, "argv", ["throughput.py", *flags.split()])
    throughput.main()
    printed = capsys.readouterr()
    turns = [line.partition(":")[0] for line in printed.err.splitlines() if "steps/s" in line]
    names = ["procgen", "procgen, against", "mazes"]
    assert turns == [f"{name}, round {i}" for i in (1, 2) for name in names]
    assert "| procgen | 300 | 300, 300 | 1.50, 1.50 |  |\n" in printed.out
    assert "| mazes | 70 | 70, 70 | nan, nan |  |\n" in printed.out
    assert "- mazes, against, round 2 failed: no such flag\n" in printed.out
    assert "| procgen | 300 | 300, 300 |" in (tmp_path / "out/throughput.md").read_text()
    assert (tmp_path / "out/throughput.csv").read_text().count("\n") == 1 + 8


def test_ratios_to_a_peer_are_of_the_same_round_and_script():
    speeds = {"procgen": [300.0, 360.0], "mazes": [900.0, 800.0], "CleanRL": [100.0, 90.0]}
    text = throughput.table(speeds)
    assert "| procgen | 330 | 300, 360 |  | 3.00, 4.00 |" in text
    assert "| mazes | 850 | 900, 800 |  |  |" in text


def test_a_peer_that_fails_says_what_it_said():
    failing = [sys.executable, "-c", "raise SystemExit('no such game')"]
    with pytest.raises(RuntimeError, match="no such game"):
        peers.read_lines(failing, {}, 60, "SPS:")
    printing = [sys.executable, "-c", "print('SPS: 1\\nother\\nSPS: 2')"]
    lines = peers.read_lines(printing, {}, 60, "SPS:")
    assert [line for _, line in lines] == ["SPS: 1", "other", "SPS: 2"]
