"""benchmarks/throughput.py and peers.py: what they make of files, of measurements and of failures.
No speed is asserted."""

import signal
import sys
from pathlib import Path

import pytest
from support import HUNG, ROOT

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


@pytest.mark.parametrize("key", throughput.GPU_SETTINGS, ids=", ".join)
def test_settings_for_a_gpu_are_flags_of_their_script_with_enough_iterations(key):
    setting = throughput.GPU_SETTINGS[key]
    script = {"procgen": ppo_plr_procgen, "mazes": ppo_robust_plr_minigrid}[setting.script]
    args = throughput.tyro.cli(script.Args, args=throughput.argv(setting, Path("run")))
    script.check_args(args)
    assert args.num_iterations == setting.iterations > throughput.UNMEASURED + 2
    what, how = key
    assert args.cuda_graphs == (not how.endswith("no graphs"))
    assert args.compile == ("compile" in how) and args.precision == how[:4]
    assert set(throughput.SHARED) <= set(throughput.GPU_SETTINGS)


@pytest.mark.slow
def test_on_a_gpu_runs_are_in_this_process_and_some_share_it(tmp_path, monkeypatch, capsys):
    mazes = "--maze-size 7 --num-walls 6 --max-steps 20 --buffer-size 12 --rho 0.3"
    mazes += " --replay-schedule fixed"
    procgen = "--env-id fruitbot --num-minibatches 2 --update-epochs 1"
    settings = {
        ("mazes", "fp32"): throughput.Setting("mazes", 4, mazes, 16),
        ("mazes", "fp32, no graphs"): throughput.Setting(
            "mazes", 4, f"{mazes} --no-cuda-graphs", 16
        ),
        ("mazes", "wrong"): throughput.Setting("mazes", 4, "--rho 2", 16),
        ("Procgen", "fp32"): throughput.Setting("procgen", 4, procgen, 5),
    }
    monkeypatch.setattr(throughput, "GPU_SETTINGS", settings)
    monkeypatch.setattr(throughput, "SHARED", (("mazes", "fp32"),))
    monkeypatch.setattr(throughput, "SHARED_SECONDS", 2.0)
    monkeypatch.setattr(throughput, "SHARED_START", HUNG)
    monkeypatch.setattr(throughput, "NUM_STEPS", 24)
    before = ppo_robust_plr_minigrid.evaluate, signal.getsignal(signal.SIGTERM), sys.argv
    flags = f"--gpu --several 2 --commit abcdefg --out {tmp_path}"
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["throughput.py", *flags.split()])
        throughput.main()
    after = ppo_robust_plr_minigrid.evaluate, signal.getsignal(signal.SIGTERM), sys.argv
    assert before == after
    rows = throughput.read_csv(tmp_path / "throughput.csv")
    keys = [(row["what"], row["how"]) for row in rows]
    assert keys == [*settings, ("mazes", "fp32, 2 processes")]
    speeds = {key: float(row["steps_per_second"]) for key, row in zip(keys, rows)}
    assert [key for key, speed in speeds.items() if not speed > 0] == [("mazes", "wrong")]
    kinds = sorted(float(rows[0][name]) for name in ("on_new_levels", "on_replayed_levels"))
    assert kinds[0] <= speeds["mazes", "fp32"] <= kinds[1]
    new, replayed = map(int, rows[0]["iterations"].split("+"))
    assert new + replayed == 16 - throughput.UNMEASURED and rows[3]["iterations"] == "2"
    text = (tmp_path / "throughput.md").read_text()
    printed = capsys.readouterr().out
    assert text in printed and printed.count(" steps/s, ") == len(rows)
    assert "- mazes, wrong failed: --rho 2.0 must be between 0 and 1.\n" in text
    assert "commit abcdefg on " in text and "- mazes, fp32: `--maze-size 7 " in text
    assert text.count(" x without graphs |") == text.count(" x one process |") == 1


@pytest.mark.slow
def test_of_processes_that_share_a_gpu_one_that_fails_says_why():
    setting = throughput.Setting("mazes", 4, "--rho 2", 16)
    with pytest.raises(RuntimeError, match="--rho 2.0 must be between 0 and 1"):
        throughput.share(setting, 1, seconds=1.0, limit=HUNG)


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
