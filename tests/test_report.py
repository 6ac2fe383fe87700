"""benchmarks/report.py: statistics against cases by hand, SciPy and the papers; what is committed is up to date."""

import json
import re
import shutil
import sys

import numpy as np
import pytest
from PIL import Image
from scipy import stats
from support import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import collect
import report

RUNS = ROOT / "benchmarks" / "results" / "runs"
GAMES = sorted({game for game, _ in report.PROCGEN if game != "normalized_percent"})


@pytest.fixture(autouse=True)
def close_figures():
    yield
    report.plt.close("all")


# ---- statistics ------------------------------------------------------------------------------------------------------


def test_the_iqm_is_the_mean_of_the_middle_half():
    assert report.iqm(np.array([8, 1, 7, 2, 6, 3, 5, 4])) == np.mean([3, 4, 5, 6])
    assert report.iqm(np.array([[8, 1e9, 7, 2], [6, 3, 5, -1e9]])) == np.mean([3, 5, 6, 7])  # over both axes
    assert report.iqm(np.array([0.0, 10.0, 20.0])) == 10  # fewer than four: nothing to leave out
    assert report.iqm(np.arange(10.0)) == np.arange(2, 8).mean()  # 2.5 from each end: two


def test_the_bootstrap_draws_within_each_stratum_or_whole_runs():
    apart = [np.full(5, 0.1), np.full(6, 0.5), np.full(7, 0.9)]
    assert np.allclose(report.bootstrap_interval(apart), report.iqm(np.concatenate(apart)))  # nothing to vary
    x = np.arange(6.0)  # a run is as far above 2.5 in one maze as it is below in the other: whole runs do not vary
    assert np.allclose(report.bootstrap_interval([x, 5 - x], paired=True), 2.5)
    assert np.diff(report.bootstrap_interval([x, 5 - x])) > 1
    together = report.bootstrap_interval([x, x], paired=True)  # as far in both: as of one maze
    assert np.allclose(together, report.bootstrap_interval([x]), atol=0.3)
    assert np.diff(together) > 1.2 * np.diff(report.bootstrap_interval([x, x]))
    assert np.isnan(report.bootstrap_interval([np.arange(9.0), np.arange(4.0)])).all()  # too few runs to say


@pytest.mark.parametrize("paired", [False, True])
def test_the_bootstrap_agrees_with_one_written_plainly(paired):
    rng = np.random.default_rng(1)
    strata = [rng.normal(mean, 1, 6) for mean in (0, 2, 5)]
    which = [rng.integers(6, size=(5000, 6)) for _ in strata]
    draws = np.concatenate([x[which[0 if paired else i]] for i, x in enumerate(strata)], 1)
    iqms = np.sort(draws)[:, 4:-4].mean(1)
    assert np.allclose(report.bootstrap_interval(strata, paired), np.quantile(iqms, (0.025, 0.975)), atol=0.06)
    assert report.bootstrap_interval(strata, paired) == report.bootstrap_interval(strata, paired)


def test_welch_agrees_with_a_case_by_hand_and_with_scipy():
    a, b = np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0, 8.0])
    assert report.sample(a) == (2, 1, 3)
    # t = -3 / sqrt(1/3 + (20/3)/4) = -3 / sqrt(2); degrees of freedom 2**2 / ((1/3)**2 / 2 + (5/3)**2 / 3) = 72/17.67
    p = 2 * stats.t.cdf(-3 / np.sqrt(2), 4 / (1 / 18 + 25 / 27))
    assert np.isclose(report.welch(report.sample(a), report.sample(b)), p)
    assert np.isclose(p, stats.ttest_ind(a, b, equal_var=False).pvalue)
    assert np.isnan(report.welch(report.sample(a), report.sample([5.0])))
    # from a published mean and standard deviation of ddof 0
    published = report.published_return("bigfish", "plr")
    assert (published.mean, published.n) == (10.9, 10) and np.isclose(published.std, 2.8 * np.sqrt(10 / 9))


def test_normalized_returns_by_hand():
    returns = {"bigfish": np.array([2.0, 6.0]), "leaper": np.array([5.0, 5.0])}
    scores = report.normalized_returns(returns, {"bigfish": 4.0, "leaper": 10.0})
    assert np.allclose(scores, [50, 100])  # (0.5 + 0.5) / 2 and (1.5 + 0.5) / 2
    assert np.isclose(report.normalized_returns(returns, {x: y.mean() for x, y in returns.items()}).mean(), 100)


@pytest.mark.parametrize("method", ["uniform", "tscl", "mixreg", "ucb-drac", "plr", "ucb-drac+plr"])
def test_the_papers_normalised_returns_follow_from_its_table_to_rounding(method):
    means = {x: {game: report.PROCGEN[game, x]["mean"] for game in GAMES} for x in (method, "uniform")}

    def score(shift: float) -> float:
        """With the method's means so much higher and uniform's lower."""
        returns = {game: np.array([mean + shift]) for game, mean in means[method].items()}
        return report.normalized_returns(
            returns, {game: mean - shift for game, mean in means["uniform"].items()}
        ).item()

    published = report.PROCGEN["normalized_percent", method]["mean"]
    assert len(GAMES) == 16 and published == {"plr": 128.3, "uniform": 100.0}.get(method, published)
    assert abs(score(0) - published) < 0.5 and score(-0.05) <= published <= score(0.05)


@pytest.mark.parametrize(
    ("curriculum", "mean", "iqm"), [("dr", 0.428, 0.367), ("plr", 0.591, 0.673), ("robust_plr", 0.677, 0.815)]
)
def test_the_published_mazes_agree_with_their_summary(curriculum, mean, iqm):
    rates = report.published_rates(curriculum)
    assert rates.shape == (7, 10) and rates.min() >= 0 and rates.max() <= 1
    assert abs(rates.mean() - mean) < 0.0005 and abs(report.iqm(rates) - iqm) < 0.0005
    low, high = report.bootstrap_interval(list(rates), paired=True)
    within = report.bootstrap_interval(list(rates))  # the narrower one of independent mazes, which they are not
    assert low < within[0] < iqm < within[1] < high


# ---- the report ------------------------------------------------------------------------------------------------------


def table_of(text: str, first: str) -> dict[str, list[str]]:
    """The Markdown table whose header begins with `first`: by the first cell of each row, the others."""
    lines = text[text.index(f"| {first} |") :].split("\n\n")[0].splitlines()
    rows = [[x.strip() for x in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in rows}


def copy_run(target, name: str, source: str, evaluation: dict, finished: bool = True, **flags) -> None:
    """A run that differs from the committed one in flags and in its final evaluation."""
    shutil.copytree(RUNS / source, target / name, ignore=lambda *_: ["run.json"])
    args = json.loads((target / name / "args.json").read_text()) | flags
    (target / name / "args.json").write_text(json.dumps(args))
    for file in (target / name).glob("evaluation_*.json"):
        file.unlink()
    result = json.loads((target / name / "result.json").read_text())
    result |= {"global_step": args["total_timesteps"], "evaluation": result["evaluation"] | evaluation}
    (target / name / "result.json").write_text(json.dumps(result))
    if not finished:
        (target / name / "result.json").unlink()


def starpilot(target, curriculum: str, seed: int, test: float, steps: int = 25_000_000, **more) -> None:
    scores = {"test_return": test, "train_return": test + 1}
    flags = {"curriculum": curriculum, "seed": seed, "total_timesteps": steps, **more}
    copy_run(target, f"{curriculum}{seed}", "starpilot_plr_2M_seed1", scores, **flags)


def test_what_is_committed_is_what_report_writes():
    text, pictures, blocks = report.report([path.parent for path in RUNS.glob("*/args.json")])
    assert (RUNS.parent / "REPORT.md").read_text() == text, "run python benchmarks/report.py"
    readme = (ROOT / "README.md").read_text()
    assert report.with_tables(readme, blocks) == readme, "run python benchmarks/report.py"
    assert {"mazes", "procgen_2M", "procgen_2M_gaps"} == set(re.findall(r"<!-- report: (\S+) -->", readme))
    assert {path.name for path in (RUNS.parent / "pictures").iterdir()} == set(pictures), "run report.py"
    for file in RUNS.glob("*/*.csv"):
        assert file.read_text() == collect.thin(file.read_text()), f"{file} is not thinned"
    for name, figure in pictures.items():
        committed = Image.open(RUNS.parent / "pictures" / name).text["Drawn"]
        assert committed == report.drawn(figure) and f"(pictures/{name})" in text, "run python benchmarks/report.py"


def test_a_full_reproduction_stands_unmarked_beside_the_paper(tmp_path):
    for seed in range(1, 11):
        starpilot(tmp_path, "uniform", seed, 20.0 + seed % 2)
        starpilot(tmp_path, "plr", seed, 41.0 + seed)
    text, pictures, _ = report.report(tmp_path.iterdir())
    assert list(pictures) == ["procgen_25M.png"] and "## Procgen, 25M steps" in text
    rows = table_of(text, "test return")
    assert rows["test return"] == ["uniform", "uniform, paper", "PLR", "PLR, paper"]
    assert rows["starpilot"] == ["20.50 ± 0.50", "26.8 ± 1.5", "46.50 ± 2.87", "27.9 ± 4.4"]  # ddof 0
    uniform, _, plr, paper = rows["normalised, % of uniform's"]
    assert uniform == "100.0 ± 2.4, 1 of 16 games" and plr == "226.8 ± 14.0, 1 of 16 games"  # 46.5 / 20.5
    assert paper == "104.1 in 1 of 16 games, 128.3 ± 5.8 in all"
    middle = 100 * stats.trim_mean(41.0 + np.arange(1, 11), 0.25) / 20.5
    assert rows["IQM of that"][2].startswith(f"{middle:.1f} [")
    rows = table_of(text, "difference in test return")
    assert rows["starpilot"][:2] == ["+26.00, p < 0.001", "+1.1, p 0.49"]
    assert rows["starpilot"][2].startswith("−6.30, p ") and rows["starpilot"][3].startswith("+18.60, p ")
    assert table_of(text, "game")["starpilot"][1:] == ["47.50 ± 2.87", "46.50 ± 2.87", "1.00 ± 0.00"]


def test_a_number_from_less_than_the_papers_says_so(tmp_path):
    for seed in (1, 2):
        starpilot(tmp_path, "uniform", seed, 20.0)
    starpilot(tmp_path, "plr", 1, 30.0, eval_episodes=20)
    starpilot(tmp_path, "plr", 2, 30.0, finished=False)
    rows = table_of(report.report(tmp_path.iterdir())[0], "test return")
    assert rows["starpilot"][0] == "20.00 ± 0.00 (2 runs)"
    error = 8.681612753400142 / 20**0.5  # over episodes
    assert rows["starpilot"][2] == f"30.00 ± {error:.2f} over its episodes (1 run, 20 episodes)"  # and one goes on
    assert rows["normalised, % of uniform's"][2] == "150.0 (1 run, 20 episodes), 1 of 16 games"
    shutil.rmtree(tmp_path / "plr1")
    text = report.report(tmp_path.iterdir())[0]
    rows = table_of(text, "test return")
    # none is finished: the last evaluation, 9.36 after 2,015,232 steps
    assert rows["starpilot"][2] == "9.36 ± 0.87 over its episodes (1 run, 2M steps, unfinished)"
    assert rows["normalised, % of uniform's"][2] == "46.8 (1 run, 2M to 25M steps, unfinished), 1 of 16 games"
    assert table_of(text, "difference in test return")["starpilot"][0] == "–"  # of runs at different steps
    starpilot(tmp_path, "plr", 3, 5.0, steps=2_000_000, temperature=1.0)
    rows = table_of(report.report([tmp_path / "plr3"])[0], "test return")
    assert rows == {
        "test return": ["PLR, temperature 1.0"], "---": ["---:"],
        "starpilot": ["5.00 ± 0.87 over its episodes (1 run, 2M steps)"],
    }  # fmt: skip


def test_a_baseline_with_less_than_the_papers_marks_what_is_measured_by_it(tmp_path):
    for seed in range(1, 11):
        starpilot(tmp_path, "plr", seed, 30.0)
    starpilot(tmp_path, "uniform", 1, 20.0, finished=False)
    rows = table_of(report.report(tmp_path.iterdir())[0], "test return")
    assert rows["starpilot"][2] == "30.00 ± 0.00"
    note = "(1 run, 2M to 25M steps, unfinished), 1 of 16 games"
    assert rows["normalised, % of uniform's"][2] == f"320.5 ± 0.0 {note}"  # 30 / 9.36
    shutil.rmtree(tmp_path / "uniform1")
    starpilot(tmp_path, "uniform", 1, -1.0)
    assert table_of(report.report(tmp_path.iterdir())[0], "test return")["normalised, % of uniform's"][2] == "–"


def test_the_evaluation_of_the_last_step_with_the_most_episodes_counts(tmp_path):
    starpilot(tmp_path, "plr", 1, 30.0)
    args = json.loads((tmp_path / "plr1" / "args.json").read_text())
    for i, (step, episodes, value) in enumerate(
        [(2_000_000, 5000, 1.0), (25_000_000, 1000, 2.0), (25_000_000, 5, 3.0)]
    ):
        later = {
            "global_step": step,
            "test_return": value,
            "train_return": 0,
            "args": args | {"eval_episodes": episodes},
        }
        later |= {"test_return_std": 0.0, "train_return_std": 0.0}
        (tmp_path / "plr1" / f"evaluation_{i}.json").write_text(json.dumps(later))
    assert table_of(report.report(tmp_path.iterdir())[0], "test return")["starpilot"][1] == "2.00 (1 run)"


def test_one_experiment_and_seed_twice_is_refused_or_told_apart(tmp_path, capsys):
    starpilot(tmp_path, "plr", 1, 30.0)
    shutil.copytree(tmp_path / "plr1", tmp_path / "again")
    with pytest.raises(SystemExit):
        report.report(tmp_path.iterdir())
    assert "again and plr1 are one experiment with the same seed" in capsys.readouterr().err
    args = json.loads((tmp_path / "again" / "args.json").read_text())
    (tmp_path / "again" / "args.json").write_text(json.dumps(args | {"precision": "fp32"}))
    starpilot(tmp_path, "plr", 2, 40.0)
    rows = table_of(report.report(tmp_path.iterdir())[0], "test return")
    both = dict(zip(rows["test return"], rows["starpilot"]))
    assert both["PLR, fp32"].startswith("30.00") and both["PLR, bf16"] == "35.00 ± 5.00 (2 runs)"


def test_mazes_stand_beside_dcds_and_robust_plr_with_as_many_updates_beside_the_others(tmp_path):
    for curriculum, steps, rates in (
        ("dr", 250_000_000, (0.2, 0.4)), ("robust_plr", 250_000_000, (0.7,)), ("robust_plr", 500_498_432, (0.9,)),
    ):  # fmt: skip
        for seed, rate in enumerate(rates, 1):
            solved = dict.fromkeys((f"solved_{maze}" for maze in report.SEVEN), rate)
            flags = {"seed": seed, "total_timesteps": steps, "eval_episodes": 100}
            source = f"mazes_{curriculum}_60M_seed1_precision=bf16"
            copy_run(tmp_path, f"{curriculum}{steps}_{seed}", source, solved, **flags)
    text, pictures, blocks = report.report(tmp_path.iterdir())
    assert list(pictures) == ["mazes_250M.png", "mazes_250M_by_maze.png", "mazes_250M_training.png"]
    rows = table_of(text, "share of episodes solved")
    names = ["DR", "DR, dcd", "PLR, dcd", "Robust PLR", "Robust PLR, dcd", "Robust PLR, 500M steps"]
    assert rows["share of episodes solved"] == names
    published = ["0.036 ± 0.019, IQM 0.012", "0.281 ± 0.134, IQM 0.142", "0.592 ± 0.128, IQM 0.647"]
    ours = ["0.300 ± 0.100 (2 runs)", "0.700 (1 run)", "0.900 (1 run)"]  # standard error, ddof 1
    assert rows["Maze"] == [ours[0], *published[:2], ours[1], published[2], ours[2]]
    assert rows["mean of dcd's 7 mazes"][0] == ours[0] and rows["IQM of dcd's 7 mazes"][3] == "0.700 (1 run)"
    assert rows["IQM of dcd's 7 mazes"][0] == "0.300 (2 runs)"
    assert rows["LargeCorridor"][1] == "–" and rows["gradient updates"][0] == "36,625 (2 runs)"
    rows = table_of(text, "difference in the mean of dcd's 7 mazes")
    assert rows["Robust PLR − DR"] == ["+0.400 (1 run)", "+0.249, p 0.015"]
    assert rows["DR, ours − dcd"][0].startswith("−0.128, p ")
    assert "| Robust PLR, 500M steps, 250M |" in blocks["mazes"] and "| Robust PLR, dcd: 250M, 10" in blocks["mazes"]


def test_a_run_that_goes_on_can_be_shown(tmp_path):
    """No evaluation yet, half a row in progress.csv."""
    starpilot(tmp_path, "plr", 1, 0.0, finished=False)
    (tmp_path / "plr1" / "evaluations.csv").unlink()
    progress = (tmp_path / "plr1" / "progress.csv").read_text()
    (tmp_path / "plr1" / "progress.csv").write_text("".join(progress.splitlines(True)[:9]) + "147456,99.1,1")
    text, pictures, _ = report.report(tmp_path.iterdir())
    assert "131,072 of 25,000,000, unfinished" in text and list(pictures) == ["procgen_25M.png"]


def test_the_command_writes_report_and_pictures(tmp_path, monkeypatch, capsys):
    run_dir = RUNS / "starpilot_five_minutes"
    monkeypatch.setattr(sys, "argv", ["report.py", str(run_dir), "--out", str(tmp_path / "out")])
    report.main()
    assert capsys.readouterr().out == f"{tmp_path}/out/REPORT.md\n"
    assert "## Procgen, 0.15M steps" in (tmp_path / "out" / "REPORT.md").read_text()
    assert Image.open(tmp_path / "out" / "pictures" / "procgen_0.15M.png").size[0] > 1000
    for content, message in (("", "has no args.json"), ("{", "has a file that cannot be read")):
        (tmp_path / "bad").mkdir(exist_ok=True)
        if content:
            (tmp_path / "bad" / "args.json").write_text(content)
        monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path / "bad")])
        with pytest.raises(SystemExit):
            report.main()
        message_there = capsys.readouterr().err
        assert f"RUN-DIRS {tmp_path}/bad" in message_there and message.removeprefix("has ") in message_there


def test_readme_tables_are_replaced_by_name(capsys):
    readme = "a\n<!-- report: mazes -->\nold\n<!-- end -->\nb\n<!-- report: mazes -->\n<!-- end -->\n"
    block = "<!-- report: mazes -->\n\n| new |\n\n<!-- end -->\n"
    assert report.with_tables(readme, {"mazes": "| new |\n"}) == f"a\n{block}b\n{block}"
    with pytest.raises(SystemExit):
        report.with_tables(readme, {"procgen_2M": "| new |\n"})
    assert "a table mazes that is none of the report's: procgen_2M" in capsys.readouterr().err
