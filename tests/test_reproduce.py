"""benchmarks/reproduce.py and collect.py: which runs they start, what they keep of a run."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

import ppo_plr_procgen
import ppo_robust_plr_minigrid

sys.path.insert(0, str(ROOT / "benchmarks"))
import collect
import reproduce

START = {"command": "python ppo_plr_procgen.py", "commit": "abc1234", "machine": "a machine"}


def call(monkeypatch, capsys, flags: str) -> list[str]:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *flags.split()])
    reproduce.main()
    return capsys.readouterr().out.splitlines()


def refused(capsys, action) -> str:
    with pytest.raises(SystemExit) as stop:
        action()
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.startswith("error: ") and message.count("\n") == 1
    return message


# ---- which runs ----------------------------------------------------------------------------------


def test_procgen_starts_the_papers_320_runs_or_some_of_them(monkeypatch, capsys, tmp_path):
    lines = call(monkeypatch, capsys, f"procgen --out {tmp_path} --dry-run")
    assert len(set(lines)) == 16 * 2 * 10
    names = {line.split(f"{tmp_path}/")[1] for line in lines}
    assert "env_id=ninja,curriculum=uniform,total_timesteps=25000000,seed=10" in names
    assert {line.split()[3] for line in lines} == set(reproduce.get_args(reproduce.Game))
    args = ppo_plr_procgen.Args()  # the rest of the paper's settings are the script's defaults
    assert (args.distribution_mode, args.num_levels, args.eval_episodes) == ("easy", 200, 100)
    flags = "procgen --games leaper bigfish --curricula plr --seeds 3 --total-timesteps 2000000"
    flags += f" --out {tmp_path} --dry-run --values precision=bf16"
    expected = "--curriculum plr --total-timesteps 2000000 --precision bf16 --seed 3 --run-dir"
    lines = call(monkeypatch, capsys, flags)
    assert [line.split(f" {tmp_path}")[0] for line in lines] == [
        f"python ppo_plr_procgen.py --env-id {game} {expected}" for game in ("leaper", "bigfish")
    ]


def test_the_columns_with_ucb_drac_are_two_values_of_augment(monkeypatch, capsys, tmp_path):
    flags = f"procgen --games leaper --seeds 3 --out {tmp_path} --dry-run"
    lines = call(monkeypatch, capsys, f"{flags} --values augment=none,ucb")
    flags = [re.findall("--(?:curriculum|augment) (\\S+)", line) for line in lines]
    columns = [["uniform", "none"], ["uniform", "ucb"], ["plr", "none"], ["plr", "ucb"]]
    assert sorted(flags) == sorted(columns)


def test_mazes_start_dcds_30_runs_or_robust_plr_for_as_many_updates(monkeypatch, capsys, tmp_path):
    lines = call(monkeypatch, capsys, f"mazes --out {tmp_path} --dry-run")
    assert len(set(lines)) == 3 * 10
    assert all("--total-timesteps 250000000 " in line for line in lines)
    flags = f"mazes --gradient-matched --out {tmp_path} --dry-run"
    lines = call(monkeypatch, capsys, flags)
    assert len(lines) == 10
    assert all("--curriculum robust_plr --total-timesteps 500506624 " in line for line in lines)
    flags += " --values precision=bf16 replay-prob=0.8"
    message = refused(capsys, lambda: call(monkeypatch, capsys, flags))
    assert "--values replay-prob=0.8 must not be with --gradient-matched" in message


def test_gradient_matched_means_as_many_replays_as_dr_has_rollouts():
    """Against the committed run: 18,075 updates, 5 in each rollout that replays."""
    run_dir = collect.RUNS / "mazes_robust_plr_60M_seed1_precision=bf16"
    result = json.loads((run_dir / "result.json").read_text())
    rollouts = result["gradient_updates"] // ppo_robust_plr_minigrid.Args().update_epochs
    steps = reproduce.gradient_matched_steps(rollouts * 256 * 32)
    assert abs(steps / result["global_step"] - 1) < 0.02


@pytest.mark.parametrize(
    ("kind", "others"), [("procgen", "minigrid"), ("mazes --gradient-matched", "procgen")]
)
@pytest.mark.slow
def test_neither_kind_needs_the_others_environments(kind, others):
    """Nor has it to import a training script that would."""
    text = f"""import sys
sys.modules[{others!r}] = None
sys.argv = "benchmarks/reproduce.py {kind} --seeds 1 --dry-run".split()
sys.path.insert(0, "benchmarks")
import reproduce
reproduce.main()
"""
    command = [sys.executable, "-c", text]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("python ppo_"), done.stderr


@pytest.mark.slow
def test_a_run_is_trained_copied_and_not_trained_again(tmp_path, monkeypatch, capsys):
    """As a user does it, with the shortest training there is."""
    out = tmp_path / "out"
    flags = f"mazes --curricula dr --seeds 5 --total-timesteps 96 --out {out}"
    flags += f" --results {tmp_path / 'results'} --values num_envs=4 num_steps=24 eval_episodes=1"
    flags += " maze_size=7 num_walls=6 max_steps=20"
    assert call(monkeypatch, capsys, flags)[0].startswith(f"starts {out}/curriculum=dr,")
    (folder,) = (tmp_path / "results").iterdir()
    assert folder.name.startswith("mazes_dr_0.000096M_seed5_num_walls=6_")
    files = {"args.json", "result.json", "run.json", "progress.csv", "evaluations.csv"}
    assert {x.name for x in folder.iterdir()} == files
    (start,) = json.loads((folder / "run.json").read_text())["starts"]
    assert start["command"].startswith("python ppo_robust_plr_minigrid.py --curriculum dr")
    git = ["git", "rev-parse", "--short=7", "HEAD"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert start["commit"].removesuffix("+changes") == (commit or "unknown") and start["machine"]
    assert start["from_step"] == 0
    assert json.loads((folder / "result.json").read_text())["global_step"] == 96
    printed = call(monkeypatch, capsys, flags)
    assert "1 finished" in printed and not any(line.startswith("starts") for line in printed)


# ---- what is kept of a run -----------------------------------------------------------------------


@pytest.fixture
def run_dir(finished_run, tmp_path) -> Path:
    return Path(shutil.copytree(finished_run(ppo_plr_procgen), tmp_path / "run"))


@pytest.mark.slow
def test_a_copy_has_the_results_and_where_they_are_from(run_dir, tmp_path):
    copy = collect.collect(run_dir, tmp_path / "results", start=START, note="slow disk")
    args = json.loads((run_dir / "args.json").read_text())
    assert copy.name == collect.default_name(args) and copy.name.startswith("fruitbot_plr_")
    assert json.loads((copy / "run.json").read_text()) == {"starts": [START], "note": "slow disk"}
    for name in ("result.json", "evaluations.csv", "progress.csv"):
        assert (copy / name).read_text() == (run_dir / name).read_text()
    assert json.loads((copy / "args.json").read_text()) == args | {"run_dir": "run"}
    assert {x.name for x in copy.iterdir()} <= {x.name for x in run_dir.iterdir()} | {"run.json"}
    assert not (copy / "checkpoint.pt").exists()
    (run_dir / "worst_case.csv").write_text("alpha_percent,solved_rate\n100,0.5\n")
    collect.collect(run_dir, tmp_path / "results", start=START, note="slow disk")
    assert (copy / "worst_case.csv").read_text() == "alpha_percent,solved_rate\n100,0.5\n"


def test_job_log_tells_each_slices_commit_machine_and_first_step():
    start = "\n# commit {} on {}\n$ python a.py {} r\n{}\n"
    begun = "training on 2 CPU threads\ncontinuing at step {:,}"
    log = "# python a.py\n"
    log += start.format("1111111", "a CPU, no GPU", "--run-dir", "error: it does not start")
    log += start.format("1111111", "a CPU, no GPU", "--run-dir", "training on 2 CPU threads")
    log += start.format("1111111", "a CPU, no GPU", "--resume", begun.format(96))
    log += start.format("2222222+changes", "b CPU, 1 H200", "--resume", begun.format(123456))
    first = {"command": "python a.py --run-dir r", "commit": "1111111", "machine": "a CPU, no GPU"}
    more = first | {"command": "python a.py --resume r"}
    last = more | {"commit": "2222222+changes", "machine": "b CPU, 1 H200"}
    steps = 0, 96, 123_456
    expected = [start | {"from_step": x} for start, x in zip((first, more, last), steps)]
    assert collect.read_starts(log) == expected


def test_a_later_copy_of_a_run_takes_the_place_of_an_earlier_one(run_dir, tmp_path):
    """Unfinished, finished, and going on to more steps; the copy's files are of one moment."""
    rows = (run_dir / "progress.csv").read_text().splitlines(keepends=True)
    (run_dir / "progress.csv").write_text("".join(rows[:2]))
    result = (run_dir / "result.json").rename(tmp_path / "result.json")
    copy = collect.collect(run_dir, tmp_path / "results", "run", START)
    assert not (copy / "result.json").exists()
    (run_dir / "progress.csv").write_text("".join(rows))
    result.rename(run_dir / "result.json")
    assert collect.collect(run_dir, tmp_path / "results", "run", START) == copy
    assert (copy / "result.json").exists()
    args = json.loads((run_dir / "args.json").read_text()) | {"total_timesteps": 10**6}
    (run_dir / "args.json").write_text(json.dumps(args))
    (run_dir / "result.json").unlink()
    assert collect.collect(run_dir, tmp_path / "results", "run", START) == copy
    assert not (copy / "result.json").exists()
    assert json.loads((copy / "args.json").read_text())["total_timesteps"] == 10**6


def test_another_run_is_not_overwritten(run_dir, tmp_path, capsys):
    results = tmp_path / "results"
    copy = collect.collect(run_dir, results, "run", START)
    before = {file: file.read_text() for file in copy.iterdir()}
    *rows, last = (run_dir / "progress.csv").read_text().splitlines()
    step, seconds, _, *cells = last.split(",")
    changed = ",".join([step, seconds, "7", *cells])
    (run_dir / "progress.csv").write_text("\n".join([*rows, changed, ""]))
    message = refused(capsys, lambda: collect.collect(run_dir, results, "run", START))
    assert f"--name must be another: {copy} holds a different run" in message
    assert {file: file.read_text() for file in copy.iterdir()} == before
    assert collect.collect(run_dir, results, "second", START).name == "second"


def test_a_run_of_unknown_origin_and_a_folder_without_a_run_are_refused(run_dir, tmp_path, capsys):
    results = tmp_path / "results"
    unknown = START | {"commit": ""}
    message = refused(capsys, lambda: collect.collect(run_dir, results, start=unknown))
    assert "--commit, --machine and --command must be given" in message
    assert "has no args.json" in refused(capsys, lambda: collect.collect(tmp_path, results))
    assert not results.exists()


def test_csv_files_are_thinned_to_evenly_spaced_whole_rows():
    rows = [f"{i},{i * i}\n" for i in range(1, 1001)]
    kept = collect.thin("".join(["step,x\n", *rows, "1001,10"])).splitlines(keepends=True)
    assert kept[0] == "step,x\n" and len(kept) == 1 + collect.MAX_ROWS
    assert kept[1] == rows[0] and kept[-1] == rows[-1] and set(kept[1:]) <= set(rows)
    steps = [int(row.split(",")[0]) for row in kept[1:]]
    assert {b - a for a, b in zip(steps, steps[1:])} == {5, 6}
    assert collect.thin("step,x\n1,1\n2,4\n") == "step,x\n1,1\n2,4\n"
    assert collect.thin("") == ""


def test_settings_are_the_flags_that_differ_from_the_papers():
    args = ppo_robust_plr_minigrid.Args(seed=3, curriculum="dr", num_walls=60, precision="bf16")
    assert collect.settings(vars(args)) == {"num_walls": 60, "precision": "bf16"}
    without_graphs = vars(args) | {"cuda_graphs": False}  # the same run, at another speed
    assert collect.settings(without_graphs) == collect.settings(vars(args))
    name = "mazes_dr_250M_seed3_num_walls=60_precision=bf16"
    assert collect.default_name(vars(args)) == name
    args = ppo_plr_procgen.Args(env_id="maze", total_timesteps=24_985_600)
    assert collect.settings(vars(args)) == {}
    assert collect.default_name(vars(args)) == "maze_plr_25M_seed1"
