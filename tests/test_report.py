"""benchmarks/report.py: statistics against cases by hand, SciPy and the papers; what is
committed is what it writes."""

import json
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


# ---- statistics ----------------------------------------------------------------------------------


def test_the_iqm_is_the_mean_of_the_middle_half():
    assert report.iqm(np.array([8, 1, 7, 2, 6, 3, 5, 4])) == np.mean([3, 4, 5, 6])
    assert report.iqm(np.array([[8, 1e9, 7, 2], [6, 3, 5, -1e9]])) == np.mean(
        [3, 5, 6, 7]
    )  # over both axes
    assert report.iqm(np.array([0.0, 10.0, 20.0])) == 10  # fewer than four: nothing to leave out
    assert report.iqm(np.arange(10.0)) == np.arange(2, 8).mean()  # 2.5 from each end: two


def test_the_bootstrap_draws_within_each_stratum_or_whole_runs():
    apart = [np.full(5, 0.1), np.full(6, 0.5), np.full(7, 0.9)]
    assert np.allclose(
        report.bootstrap_interval(apart), report.iqm(np.concatenate(apart))
    )  # nothing to vary
    x = np.arange(
        6.0
    )  # a run is as far above 2.5 in one maze as it is below in the other: whole runs do not vary
    assert np.allclose(report.bootstrap_interval([x, 5 - x], paired=True), 2.5)
    assert np.diff(report.bootstrap_interval([x, 5 - x])) > 1
    together = report.bootstrap_interval([x, x], paired=True)  # as far in both: as of one maze
    assert np.allclose(together, report.bootstrap_interval([x]), atol=0.3)
    assert np.diff(together) > 1.2 * np.diff(report.bootstrap_interval([x, x]))
    assert np.isnan(
        report.bootstrap_interval([np.arange(9.0), np.arange(4.0)])
    ).all()  # too few runs to say


@pytest.mark.parametrize("paired", [False, True])
def test_the_bootstrap_agrees_with_one_written_plainly(paired):
    rng = np.random.default_rng(1)
    strata = [rng.normal(mean, 1, 6) for mean in (0, 2, 5)]
    which = [rng.integers(6, size=(5000, 6)) for _ in strata]
    draws = np.concatenate([x[which[0 if paired else i]] for i, x in enumerate(strata)], 1)
    iqms = np.sort(draws)[:, 4:-4].mean(1)
    assert np.allclose(
        report.bootstrap_interval(strata, paired), np.quantile(iqms, (0.025, 0.975)), atol=0.06
    )
    assert report.bootstrap_interval(strata, paired) == report.bootstrap_interval(strata, paired)


def test_welch_agrees_with_a_case_by_hand_and_with_scipy():
    a, b = np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0, 8.0])
    assert report.sample(a) == (2, 1, 3)
    # t = -3 / sqrt(1/3 + (20/3)/4) = -3 / sqrt(2)
    # degrees of freedom 2**2 / ((1/3)**2 / 2 + (5/3)**2 / 3) = 72 / 17.67
    p = 2 * stats.t.cdf(-3 / np.sqrt(2), 4 / (1 / 18 + 25 / 27))
    assert np.isclose(report.welch(report.sample(a), report.sample(b)), p)
    assert np.isclose(p, stats.ttest_ind(a, b, equal_var=False).pvalue)
    assert np.isnan(report.welch(report.sample(a), report.sample([5.0])))
    # from a published mean and standard deviation of ddof 0
    published = report.published_return("bigfish", "plr")
    assert (published.mean, published.n) == (10.9, 10) and np.isclose(
        published.std, 2.8 * np.sqrt(10 / 9)
    )


def test_normalized_returns_by_hand():
    returns = {"bigfish": np.array([2.0, 6.0]), "leaper": np.array([5.0, 5.0])}
    scores = report.normalized_returns(returns, {"bigfish": 4.0, "leaper": 10.0})
    assert np.allclose(scores, [50, 100])  # (0.5 + 0.5) / 2 and (1.5 + 0.5) / 2
    assert np.isclose(
        report.normalized_returns(returns, {x: y.mean() for x, y in returns.items()}).mean(), 100
    )


@pytest.mark.parametrize("method", ["uniform", "tscl", "mixreg", "ucb-drac", "plr", "ucb-drac+plr"])
def test_the_papers_normalised_returns_follow_from_its_table_to_rounding(method):
    means = {
        x: {game: report.PROCGEN[game, x]["mean"] for game in GAMES} for x in (method, "uniform")
    }

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
    ("curriculum", "mean", "iqm"),
    [("dr", 0.428, 0.367), ("plr", 0.591, 0.673), ("robust_plr", 0.677, 0.815)],
)
def test_the_published_mazes_agree_with_their_summary(curriculum, mean, iqm):
    rates = report.published_rates(curriculum)
    assert rates.shape == (7, 10) and rates.min() >= 0 and rates.max() <= 1
    assert abs(rates.mean() - mean) < 0.0005 and abs(report.iqm(rates) - iqm) < 0.0005
    low, high = report.bootstrap_interval(list(rates), paired=True)
    within = report.bootstrap_interval(
        list(rates)
    )  # the narrower one of independent mazes, which they are not
    assert low < within[0] < iqm < within[1] < high


# ---- the report ----------------------------------------------------------------------------------


def table_of(text: str, first: str, words: int = 2) -> dict[tuple[str, ...], list[str]]:
    """The Markdown table whose header begins with `first`: by a row's first cells, the others."""
    lines = text[text.index(f"| {first} |") :].split("\n\n")[0].splitlines()
    rows = [[x.strip() for x in line.strip("|").split("|")] for line in lines]
    return {tuple(row[:words]): row[words:] for row in rows}


def questions_in(text: str) -> list[str]:
    return [question for (question,) in table_of(text, "question", 1)][2:]


def lacks(text: str) -> list[str]:
    """What stands above the only tables of a report."""
    (line,) = [x for x in text.splitlines() if x.startswith("**Less than published:**")]
    return line.removeprefix("**Less than published:** ").removesuffix(".").split("; ")


def copy_run(
    target, name: str, source: str, evaluation: dict, finished: bool = True, **flags
) -> None:
    """A run that differs from the committed one in flags and in its final evaluation."""
    shutil.copytree(RUNS / source, target / name, ignore=lambda *_: ["run.json"])
    args = json.loads((target / name / "args.json").read_text()) | flags
    (target / name / "args.json").write_text(json.dumps(args))
    for file in (target / name).glob("evaluation_*.json"):
        file.unlink()
    result = json.loads((target / name / "result.json").read_text())
    result |= {
        "global_step": args["total_timesteps"],
        "evaluation": result["evaluation"] | evaluation,
    }
    (target / name / "result.json").write_text(json.dumps(result))
    if not finished:
        (target / name / "result.json").unlink()


def starpilot(
    target, curriculum: str, seed: int, test: float, steps: int = 25_000_000, **more
) -> None:
    scores = {"test_return": test, "train_return": test + 1}
    flags = {"curriculum": curriculum, "seed": seed, "total_timesteps": steps, **more}
    copy_run(target, f"{curriculum}{seed}", "starpilot_plr_2M_seed1", scores, **flags)


@pytest.mark.slow
def test_what_is_committed_is_what_report_writes(tmp_path):
    text, pictures, blocks = report.report(
        [path.parent for path in RUNS.glob("*/args.json")], report.OF_README
    )
    ours = RUNS.parent
    assert (ours / "REPORT.md").read_text() == text, "run python benchmarks/report.py"
    committed = {path.name: path for path in (ours / "pictures").iterdir()}
    assert committed.keys() == pictures.keys(), "run python benchmarks/report.py"
    for name, figure in pictures.items():
        figure.savefig(tmp_path / name, dpi=100)
        images = [Image.open(path).convert("L") for path in (committed[name], tmp_path / name)]
        a, b = (np.asarray(image, float) for image in images)
        assert a.shape == b.shape and (abs(a - b) > 32).mean() < 1e-4, f"{name}: run report.py"
        assert f"(pictures/{name})" in text
    for file in RUNS.glob("*/*.csv"):
        assert file.read_text() == collect.thin(file.read_text()), f"{file} is not thinned"
    readme = (ROOT / "README.md").read_text()
    assert "<!-- report: " in readme
    assert report.with_tables(readme, blocks) == readme, "run python benchmarks/report.py"


def test_a_full_reproduction_stands_beside_the_paper_and_lacks_nothing(tmp_path):
    for seed in range(1, 11):
        starpilot(tmp_path, "uniform", seed, 20.0 + seed % 2)
        starpilot(tmp_path, "plr", seed, 41.0 + seed)
    text, pictures, _ = report.report(tmp_path.iterdir())
    assert list(pictures) == ["procgen_25M.png"] and "## Procgen, 25M steps" in text
    assert lacks(text) == ["uniform (1 of 16 games)", "PLR (1 of 16 games)"]
    rows = table_of(text, "game")
    assert rows["starpilot", "uniform"][1:] == [
        "20.50 ± 0.50",
        "1.00 ± 0.00",
        "26.8 ± 1.5",
    ]  # ddof 0
    assert rows["starpilot", "PLR"] == ["47.50 ± 2.87", "46.50 ± 2.87", "1.00 ± 0.00", "27.9 ± 4.4"]
    rows = table_of(text, "% of uniform's return", 1)
    assert rows["uniform",][0] == "100.0 ± 2.4" and rows["PLR",][0] == "226.8 ± 14.0"  # 46.5 / 20.5
    middle = 100 * stats.trim_mean(41.0 + np.arange(1, 11), 0.25) / 20.5
    assert rows["PLR",][1].startswith(f"{middle:.1f} [")
    assert rows["PLR",][2:] == ["104.1", "128.3 ± 5.8"]
    rows = table_of(text, "question", 2)
    plr = rows["Procgen, 25M steps, starpilot: does PLR beat uniform?", "steps"]
    interval = stats.ttest_ind(
        41.0 + np.arange(1, 11), [20.0, 21.0] * 5, equal_var=False
    ).confidence_interval()
    interval = f"[+{interval.low:.2f}, +{interval.high:.2f}]"
    within = plr.pop(3)
    assert plr == ["10, 10", "+26.00", interval, "+1.1, p 0.49", "yes"] and within != interval
    rows = table_of(text, "ours − published", 1)
    assert rows["starpilot: uniform",][0].startswith("−6.30, p ")
    assert rows["starpilot: PLR",][0].startswith("+18.60, p ")


def test_ucb_drac_stands_beside_its_columns_of_the_paper(tmp_path):
    for seed in (1, 2):
        starpilot(tmp_path, "uniform", seed, 20.0)
        starpilot(tmp_path, "plr", seed, 30.0)
        starpilot(tmp_path / "ucb", "uniform", seed, 25.0, augment="ucb")
        starpilot(tmp_path / "ucb", "plr", seed, 40.0, augment="ucb")
    starpilot(tmp_path / "crop", "plr", 1, 35.0, augment="crop")
    run_dirs = [path.parent for path in tmp_path.rglob("args.json")]
    text, *_ = report.report(run_dirs)
    rows = table_of(text, "game")
    papers = {name: cells[-1] for (game, name), cells in rows.items() if game == "starpilot"}
    assert papers == {
        "uniform": "26.8 ± 1.5",
        "UCB-DrAC": "31.7 ± 2.4",
        "PLR": "27.9 ± 4.4",
        "UCB-DrAC + PLR": "29.6 ± 2.2",
        "PLR, augment crop": "–",
    }
    rows = table_of(text, "% of uniform's return", 1)
    assert rows["UCB-DrAC + PLR",][0] == "200.0 ± 0.0"
    assert rows["UCB-DrAC + PLR",][2:] == ["110.4", "176.4 ± 6.1"]
    assert rows["UCB-DrAC",][2:] == ["118.3", "129.8 ± 8.2"]


def test_what_is_less_than_the_papers_stands_once_above_the_tables(tmp_path):
    for seed in (1, 2):
        starpilot(tmp_path, "uniform", seed, 20.0)
    starpilot(tmp_path, "plr", 1, 30.0, eval_episodes=20)
    starpilot(tmp_path, "plr", 2, 30.0, finished=False)
    text = report.report(tmp_path.iterdir())[0]
    uniform = "uniform (1 of 16 games, runs: 2)"
    assert lacks(text) == [uniform, "PLR (1 of 16 games, runs: 1, episodes: 20)"]
    assert text.count("of 16 games") == 2
    assert text.index("**Less than published:**") < text.index("| game |")
    error = 8.681612753400142 / 20**0.5  # over episodes
    assert table_of(text, "game")["starpilot", "PLR"][1] == f"30.00 ± {error:.2f}"  # one goes on
    assert table_of(text, "% of uniform's return", 1)["PLR",][0] == "150.0"
    shutil.rmtree(tmp_path / "plr1")
    text = report.report(tmp_path.iterdir())[0]
    # none is finished: the last evaluation, 9.36 after 2,015,232 steps
    assert lacks(text) == [uniform, "PLR (1 of 16 games, runs: 1, steps: 2M, unfinished)"]
    assert table_of(text, "game")["starpilot", "PLR"][1] == "9.36 ± 0.87"
    assert table_of(text, "% of uniform's return", 1)["PLR",][0] == "46.8"
    assert "does PLR beat uniform" not in text  # of runs at different steps
    starpilot(tmp_path, "plr", 3, 5.0, steps=2_000_000, temperature=1.0)
    text = report.report([tmp_path / "plr3"])[0]
    assert "All with temperature 1.0. PLR: bf16" in text
    assert lacks(text) == ["PLR (1 of 16 games, runs: 1, steps: 2M)"]
    row = table_of(text, "game")["starpilot", "PLR"]
    assert row[1] == "5.00 ± 0.87" and row[3] == "–"  # the paper's has another temperature
    assert "% of uniform's return" not in text


def test_a_baseline_that_is_not_positive_is_no_unit(tmp_path):
    starpilot(tmp_path, "plr", 1, 30.0)
    starpilot(tmp_path, "uniform", 1, -1.0)
    text = report.report(tmp_path.iterdir())[0]
    assert "% of uniform's return" not in text and "| starpilot | uniform |" in text


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
    text = report.report(tmp_path.iterdir())[0]
    assert table_of(text, "game")["starpilot", "PLR"][1] == "2.00 ± 0.00"


def test_one_experiment_and_seed_twice_is_refused_or_told_apart(tmp_path, capsys):
    starpilot(tmp_path, "plr", 1, 30.0)
    shutil.copytree(tmp_path / "plr1", tmp_path / "again")
    with pytest.raises(SystemExit):
        report.report(tmp_path.iterdir())
    assert "again and plr1 are one experiment and seed" in capsys.readouterr().err
    args = json.loads((tmp_path / "again" / "args.json").read_text())
    (tmp_path / "again" / "args.json").write_text(json.dumps(args | {"precision": "fp32"}))
    starpilot(tmp_path, "plr", 2, 40.0)
    rows = table_of(report.report(tmp_path.iterdir())[0], "game")
    assert rows["starpilot", "PLR, fp32, code of unknown"][1].startswith("30.00 ")
    assert rows["starpilot", "PLR, bf16, code of unknown"][1] == "35.00 ± 5.00"


def test_mazes_stand_beside_dcds_and_robust_plr_with_as_many_updates_beside_the_others(tmp_path):
    runs = [("dr", 1, 250_000_000, 0.2), ("dr", 2, 250_000_000, 0.4)]
    runs += [("robust_plr", 1, 250_000_000, 0.7), ("robust_plr", 2, 500_498_432, 0.9)]
    for curriculum, seed, steps, rate in runs:
        solved = dict.fromkeys((f"solved_{maze}" for maze in report.SEVEN), rate)
        flags = {"seed": seed, "total_timesteps": steps, "eval_episodes": 100}
        source = f"mazes_{curriculum}_60M_seed1_precision=bf16"
        copy_run(tmp_path, f"{curriculum}{seed}", source, solved, **flags)
    text, pictures, _ = report.report(tmp_path.iterdir())
    assert list(pictures) == [
        "mazes_250M.png",
        "mazes_250M_by_maze.png",
        "mazes_250M_complexity.png",
    ]
    rows = table_of(text, "share of episodes solved", 1)
    names = ["DR", "DR, dcd", "PLR, dcd", "Robust PLR", "Robust PLR, dcd", "Robust PLR, 500M steps"]
    assert rows["share of episodes solved",] == names
    published = ["0.036 ± 0.019", "0.281 ± 0.134", "0.592 ± 0.128"]
    ours = ["0.300 ± 0.100", "0.700", "0.900"]  # standard error, ddof 1
    assert rows["Maze",] == [ours[0], *published[:2], ours[1], published[2], ours[2]]
    assert rows["LargeCorridor",][1] == "–"
    rows = table_of(text, "method, steps", 1)
    assert rows["DR, 250M",][:3] == ["36,625", ours[0], "0.300"]
    assert rows["Robust PLR, 250M",][1:3] == ["0.700", "0.700"]
    assert rows["Robust PLR, dcd: 250M, 10 runs",][2].startswith("0.815 [")
    rows = table_of(text, "question", 2)
    question = "Mazes, 250M steps, mean of dcd's 7: does Robust PLR{} beat DR?".format
    few = "not enough runs to say"
    assert rows[question(""), "steps"] == ["1, 2", "+0.400", "–", "–", "+0.249, p 0.015", few]
    # the two runs' evaluations are copies, so their curves do not follow from the final scores
    assert rows[question(""), "18,075 updates"][0] == "1, 2"
    assert (question(", 500M steps"), "steps") not in rows
    assert (question(", 500M steps"), "18,075 updates") in rows
    rows = table_of(text, "ours − published", 1)
    assert rows["mean of dcd's 7: DR",][0].startswith("−0.128, p ")
    assert lacks(text) == [
        "DR (runs: 2)",
        "Robust PLR (runs: 1)",
        "Robust PLR, 500M steps (runs: 1)",
    ]
    assert "| Robust PLR, 500M steps, 250M |" in text


@pytest.mark.parametrize(
    "a, b, said",
    [
        ([0.5, 0.6, 0.7], [0.1, 0.2, 0.3], "yes"),
        ([0.1, 0.2, 0.3], [0.5, 0.6, 0.7], "no: worse"),
        ([0.1, 0.9], [0.1, 0.5], report.TOO_FEW),
        ([0.9], [0.1], report.TOO_FEW),
        ([0.5, 0.5], [0.1, 0.1], report.TOO_FEW),  # without spread there is no interval
    ],
)
def test_a_curriculum_beats_another_only_if_the_interval_says_so(a, b, said):
    difference, low, high = report.difference_of_means(np.array(a), np.array(b))
    assert difference == pytest.approx(np.mean(a) - np.mean(b))
    assert report.answer(low, high) == said
    if len(a) == 3:  # Welch by hand: equal variances 0.01, so 4 degrees of freedom, t = 2.7764
        half = 2.776445 * (0.01 / 3 + 0.01 / 3) ** 0.5
        assert (low, high) == pytest.approx((difference - half, difference + half))


def test_within_seeds_only_where_they_are_the_same():
    a, b = {1: 0.4, 2: 0.9, 3: 0.5}, {3: 0.3, 1: 0.3, 2: 0.6}
    # differences 0.1, 0.3, 0.2: mean 0.2, standard error 0.1 / 3 ** 0.5, t of 2 degrees 4.3027
    half = 4.302653 * 0.1 / 3**0.5
    assert report.within_seeds(a, b) == pytest.approx((0.2 - half, 0.2 + half))
    assert np.isnan(report.within_seeds(a, {1: 0.3, 2: 0.6, 4: 0.3})).all()
    assert np.isnan(report.within_seeds({1: 0.4}, {1: 0.3})).all()
    assert np.isnan(report.within_seeds({1: 0.5, 2: 0.75}, {1: 0.25, 2: 0.5})).all()  # no spread


def test_curricula_with_other_settings_are_not_compared(tmp_path):
    for seed in (1, 2):
        starpilot(tmp_path, "uniform", seed, 20.0 + seed)
        starpilot(tmp_path, "plr", seed, 30.0 + seed, temperature=1.0)
        starpilot(tmp_path / "fast", "plr", seed, 40.0 + seed, num_envs=32)
    text = report.report([path.parent for path in tmp_path.rglob("args.json")])[0]
    # the temperature is PLR's own, the number of environments is not
    assert questions_in(text) == [
        "Procgen, 25M steps, starpilot: does PLR, temperature 1.0 beat uniform?"
    ]


def test_settings_that_all_runs_or_both_of_a_question_have_are_named_once(tmp_path):
    for seed in (1, 2):
        for curriculum, score in ("uniform", 20), ("plr", 30):
            starpilot(tmp_path, curriculum, seed, score + seed, num_envs=32, update_epochs=1)
    dirs = list(tmp_path.iterdir())
    text, _, blocks = report.report(dirs)
    common = "num_envs 32, update_epochs 1"
    assert f"All with {common}. uniform, PLR: bf16" in text
    names = [name for _, name in table_of(text, "game") if name not in ("curriculum", "---")]
    assert names == ["uniform", "PLR"]  # but beside no published number: it has other settings
    assert all(row[-1] == "–" for (_, name), row in table_of(text, "game").items() if name in names)
    asked = f"Procgen, 25M steps, {common}, starpilot: does PLR beat uniform?"
    assert questions_in(text) == [asked]
    briefly = "Procgen, 25M steps, starpilot", "does PLR beat uniform?", "steps"
    row = table_of(blocks["questions"], "where", words=3)[briefly]
    # 4.3027, of 2 degrees of freedom, times the root of 0.5 / 2 + 0.5 / 2
    assert row == ["2, 2", "+10.00", "[+6.96, +13.04]", "yes"]
    assert report.report(dirs[1:])[2]["questions"] == ""  # a single run has no interval
    # with another run the first is all runs' setting, the second that of the two that are compared
    starpilot(tmp_path / "other", "uniform", 1, 20.0, num_envs=32)
    text = report.report([*dirs, tmp_path / "other" / "uniform1"])[0]
    assert "All with num_envs 32. " in text and questions_in(text) == [asked]


@pytest.mark.parametrize(
    "theirs, said",
    [
        (0.1, "yes: ours is better"),
        (0.9, "yes: ours is worse"),
        (0.55, report.TOO_FEW),  # 0 is inside: not "they are equal"
    ],
)
def test_ours_stands_beside_jaxueds(tmp_path, theirs, said):
    source = "mazes_robust_plr_60M_seed1_precision=bf16"
    mark = {"exp_name": "jaxued", "implementation": "jaxued 0f8f128"}
    for seed, off in ((1, -0.02), (2, 0.0), (3, 0.03)):
        for name, mean, flags in (("ours", 0.5, {}), ("jaxued", theirs, mark)):
            solved = {f"solved_{maze}": mean + off for maze in report.SEVEN}
            copy_run(tmp_path, f"{name}_{seed}", source, solved, seed=seed, **flags)
    # one curriculum against another only within an implementation
    copy_run(tmp_path, "dr", "mazes_dr_60M_seed1_precision=bf16", {})
    text = report.report(tmp_path.iterdir())[0]
    rows = table_of(text, "question")
    where = "Mazes, 60M steps, mean of dcd's 7: "
    beside = f"{where}is our Robust PLR different from jaxued's Robust PLR?"
    asked = {question for question, _ in rows if question.startswith("Mazes")}
    assert asked == {beside, f"{where}does Robust PLR beat DR?"}
    assert [equal for question, equal in rows if question == beside] == ["steps"]
    runs, difference, interval, within, published, answer = rows[beside, "steps"]
    assert (runs, within, published, answer) == ("3, 3", "–", "–", said)
    assert float(difference.replace("−", "-")) == pytest.approx(0.5 - theirs)
    half = 2.776445 * (2 * np.var([-0.02, 0, 0.03], ddof=1) / 3) ** 0.5  # Welch's t, by hand
    low, high = (float(x) for x in interval.replace("−", "-").strip("[]").split(", "))
    assert (low, high) == pytest.approx((0.5 - theirs - half, 0.5 - theirs + half), abs=6e-4)
    assert "jaxued's Robust PLR: jaxued 0f8f128, started by code of" in text
    args = json.loads((tmp_path / "jaxued_2" / "args.json").read_text())
    assert collect.default_name(args) == "jaxued_mazes_robust_plr_60M_seed2_precision=bf16"


def test_ours_with_something_changed_stands_between_ours_and_anothers(tmp_path):
    marks = {
        "ours": {},
        "changed": {"implementation": "ours with the tail term"},
        "theirs": {"implementation": "level-replay ccecf45"},
    }
    for name, mark in marks.items():
        for seed in (1, 2):
            starpilot(tmp_path / name, "plr", seed, 20.0 + seed, **mark)
    starpilot(tmp_path / "ours", "uniform", 1, 20.0)
    text = report.report([path.parent for path in tmp_path.rglob("args.json")])[0]
    asked = {question.partition(": ")[2] for question, _ in table_of(text, "question")}
    assert {question for question in asked if "PLR" in question} == {
        "does PLR beat uniform?",
        "is our PLR different from PLR with the tail term?",
        "is our PLR different from level-replay's PLR?",
        "is our PLR with the tail term different from level-replay's PLR?",
    }
    args = json.loads((tmp_path / "changed" / "plr2" / "args.json").read_text())
    assert collect.default_name(args).startswith("ours_with_the_tail_term_starpilot_plr_25M_seed2")


def test_readme_asks_about_jaxueds_own_curricula_at_equal_steps_only():
    found = []  # the cells after the question: at equal steps, at equal updates
    for path in (RUNS.parent / "REPORT.md", ROOT / "README.md"):
        asked = path.read_text().split("beat jaxued's DR? | ")[1:]
        found.append({after.partition(" | ")[0] for after in asked})
    in_report, in_readme = found
    assert in_readme == {"steps"} < in_report
    assert all(cell.endswith(" updates") for cell in in_report - in_readme)


def test_ours_and_jaxueds_with_other_settings_or_lengths_are_not_compared(tmp_path):
    source = "mazes_robust_plr_60M_seed1_precision=bf16"
    mark = {"implementation": "jaxued 0f8f128"}
    copy_run(tmp_path, "ours", source, {})
    copy_run(tmp_path, "jaxued", source, {}, learning_rate=5e-4, **mark)
    copy_run(tmp_path, "longer", source, {}, total_timesteps=60_200_000, **mark)
    assert "different from" not in report.report(tmp_path.iterdir())[0]


def test_where_all_runs_have_played_unseen_mazes_of_their_kind_these_are_asked_about_too(tmp_path):
    last = {("dr", 1): 0.25, ("dr", 2): 0.5, ("plr", 1): 0.5, ("plr", 2): 0.75}
    for (curriculum, seed), rate in last.items():
        source = "mazes_dr_60M_seed1_precision=bf16"
        unseen = {"solved_Unseen": rate}
        name = f"{curriculum}{seed}"
        flags = {"maze_size": 25, "num_walls": 78, "curriculum": curriculum, "seed": seed}
        copy_run(tmp_path, name, source, unseen, **flags)
        path = tmp_path / name / "evaluations.csv"
        header, *rows = path.read_text().splitlines()
        rows = [f"{row},{rate if row is rows[-1] else 0}" for row in rows]
        path.write_text("\n".join([f"{header},solved_Unseen", *rows]) + "\n")
    text, pictures, blocks = report.report(tmp_path.iterdir())
    assert "unseen mazes" in blocks["questions"] and "dcd's 7" not in blocks["questions"]
    asked = table_of(text, "question", 2)
    where = "Mazes of 25 x 25 cells, 78 blocks, 60M steps"
    differences = [
        asked[f"{where}, unseen mazes{part}: does PLR beat DR?", "steps"][1]
        for part in ("", ", mean of the evaluations")
    ]
    assert differences == ["+0.250", f"+{0.25 / len(rows):.3f}"]
    axis = pictures["mazes_of_25_x_25_cells_78_blocks_60M_unseen.png"].axes[0]
    curves = [line.get_ydata()[-1] for line in axis.lines]
    assert sorted(curves) == [0.25, 0.375, 0.5, 0.5, 0.625, 0.75]  # four runs, two means


def test_mazes_of_another_number_of_blocks_are_a_section_of_their_own(tmp_path):
    """ACCEL's number is what its edits begin with: it stands beside 60 blocks, as published."""
    for curriculum, blocks in (("dr", 25), ("robust_plr", 25), ("dr", 60), ("dr", 120)):
        source = f"mazes_{curriculum}_60M_seed1_precision=bf16"
        copy_run(tmp_path, f"{curriculum}_{blocks}", source, {}, num_walls=blocks)
    source = "mazes_robust_plr_60M_seed1_precision=bf16"
    copy_run(tmp_path, "accel", source, {}, curriculum="accel", num_walls=0)
    text, pictures, _ = report.report(tmp_path.iterdir())
    titles = [line[3:] for line in text.splitlines() if line.startswith("## Mazes")]
    others = [f"Mazes of {blocks} blocks, 60M steps" for blocks in (120, 60)]
    assert titles == ["Mazes, 60M steps", *others]
    assert {"mazes_60M.png", "mazes_of_60_blocks_60M.png", "mazes_of_120_blocks_60M.png"} <= (
        pictures.keys()
    )
    of_60 = text.split(f"## {others[1]}")[1]
    assert "ACCEL" in of_60 and "ACCEL" not in text.split(f"## {others[1]}")[0]


def test_scores_at_equal_updates_lie_on_the_curve(tmp_path):
    copy_run(tmp_path, "dr", "mazes_dr_60M_seed1_precision=bf16", {})
    path = tmp_path / "dr" / "evaluations.csv"
    names = [f"solved_{maze}" for maze in report.SEVEN]
    lines = [",".join(["global_step", "gradient_updates", *names])]
    lines += [",".join(map(str, [8192 * x, 10 * x, *[x / 10] * 7])) for x in range(5)]
    path.write_text("\n".join(lines) + "\n")
    run = report.read_run(tmp_path / "dr")
    assert [run.score_at(x) for x in (10, 25)] == pytest.approx([0.1, 0.25])
    assert run.score_at(25, ["solved_Maze"]) == pytest.approx(0.25)
    path.write_text("\n".join([lines[0], *lines[2:]]) + "\n")
    run = report.read_run(tmp_path / "dr")
    assert np.isnan(run.score_at(9)) and run.score_at(10) == pytest.approx(0.1)


def test_runs_that_were_evaluated_too_late_are_not_compared_at_equal_updates(tmp_path):
    asked = "at equal"
    for curriculum in ("dr", "robust_plr"):
        for seed in (1, 2):
            copy_run(
                tmp_path,
                f"{curriculum}{seed}",
                f"mazes_{curriculum}_60M_seed1_precision=bf16",
                {},
                seed=seed,
            )
    assert " updates |" in report.report(tmp_path.iterdir())[0].split(asked)[1]
    path = tmp_path / "dr1" / "evaluations.csv"
    rows = path.read_text().splitlines(keepends=True)
    path.write_text(rows[0] + rows[-1])
    assert " updates |" not in report.report(tmp_path.iterdir())[0].split(asked)[1]


def test_evaluations_at_other_steps_have_no_common_mean(tmp_path):
    for curriculum in ("dr", "plr"):
        name = f"mazes_{curriculum}_0.82M_seed1_num_walls=78_maze_size=25_learning_rate=0.0005"
        name += "_num_minibatches=4" + "_buffer_size=1000" * (curriculum == "plr")
        shutil.copytree(report.RUNS / name, tmp_path / curriculum)
    text = report.report(tmp_path.iterdir())[0]
    assert "unseen mazes: does" in text and "mean of the evaluations: does" in text
    path = tmp_path / "dr" / "evaluations.csv"
    rows = path.read_text().splitlines(keepends=True)
    path.write_text("".join([rows[0], *rows[2:]]))
    text = report.report(tmp_path.iterdir())[0]
    assert "unseen mazes: does" in text and "mean of the evaluations: does" not in text


def test_mazes_that_lacked_a_block_are_marked_and_a_collected_run_keeps_the_mark(tmp_path):
    name = "mazes_dr_1.6M_seed1_learning_rate=0.0005_num_minibatches=4"
    shutil.copytree(report.RUNS / name, tmp_path / "run")
    text = report.report([tmp_path / "run"])[0]
    assert "| Maze2 † |" in text and "| Maze |" in text and "lacked a block" in text
    shutil.copytree(tmp_path / "run", tmp_path / "results" / "run")
    origin = json.loads((tmp_path / "run" / "run.json").read_text())
    for note, start in (("said", origin["starts"][0]), ("", origin["starts"][0])):
        collect.collect(tmp_path / "run", tmp_path / "results", "run", start, note)
        kept = json.loads((tmp_path / "results" / "run" / "run.json").read_text())
        assert kept == origin | {"note": "said"}  # the second time too
    start = origin["starts"][0] | {"commit": "1234567"}  # it went on
    collect.collect(tmp_path / "run", tmp_path / "results", "run", start)
    kept = json.loads((tmp_path / "results" / "run" / "run.json").read_text())
    assert kept == {"starts": [start]}
    (tmp_path / "run" / "run.json").unlink()
    assert "†" not in report.report([tmp_path / "run"])[0]


def test_the_mean_of_runs_goes_as_far_as_most_of_them():
    steps = {"whole": 100, "nearly": 96, "stopped": 20}
    far = report.plots.as_far_as_most(list(steps), steps.__getitem__)
    assert far == ["whole", "nearly"]
    assert report.plots.as_far_as_most(["stopped"], steps.__getitem__) == ["stopped"]


def test_a_brief_table_says_once_where_its_questions_were_asked(monkeypatch):
    of_section = {
        1: [["mazes", "1?", "steps", "2, 2", "+0.1", "[0, 1]", "–", "–", "yes"]],
        2: [
            ["games", "2?", "steps", "1, 1", "+0.2", "–", "–", "–", "no interval"],
            ["games", "3?", "steps", "2, 2", "+0.3", "[0, 1]", "[0, 2]", "+0.4", "yes"],
            ["mazes", "4?", "steps", "2, 2", "+0.5", "[0, 1]", "–", "–", "yes"],
        ],
    }
    monkeypatch.setattr(report, "questions", lambda section, brief: of_section[section])
    lines = report.questions_table([1, 2], brief=True).splitlines()
    rows = [[x.strip() for x in line.strip("|").split("|")] for line in lines[2:]]
    assert [row[:2] for row in rows] == [["mazes", "1?"], ["", "4?"], ["games", "3?"]]
    assert rows[2][2:] == ["steps", "2, 2", "+0.3", "[0, 1]", "yes"]
    lines = report.questions_table([1, 2]).splitlines()
    assert lines[3] == "| games: 2? | steps | 1, 1 | +0.2 | – | – | – | no interval |"


def test_mazes_that_a_curriculum_chose_are_drawn(tmp_path):
    copy_run(tmp_path, "robust_plr", "mazes_robust_plr_60M_seed1_precision=bf16", {})
    path = tmp_path / "robust_plr" / "progress.csv"
    head, *body = path.read_text().splitlines()
    lines = [f"{head},lineage_replayed,lineage_edited", *[f"{line},2.5,nan" for line in body]]
    path.write_text("\n".join(lines) + "\n")
    _, pictures, _ = report.report(tmp_path.iterdir())
    axes = pictures["mazes_60M_complexity.png"].axes
    titles = [axis.get_title() for axis in axes]
    assert titles == list(report.plots.COMPLEXITY.values())
    assert [len(axis.lines) for axis in axes] == [2, 2, 2, 1]  # new and replayed
    assert axes[3].lines[0].get_ydata() == pytest.approx(2.5)


def add_correlations(run_dir) -> None:
    """Two columns in progress.csv: 0.25 where levels were replayed, -0.5 where not; and nan."""
    path = run_dir / "progress.csv"
    head, *body = path.read_text().splitlines()
    replay = head.split(",").index("replay")
    lines = [f"{head},correlation_mna,correlation_gae"]
    for line in body:
        lines.append(f"{line},{0.25 if line.split(',')[replay] == '1' else -0.5},nan")
    path.write_text("\n".join(lines) + "\n")


def test_correlations_are_drawn_where_they_were_measured(tmp_path):
    def drawn() -> list:
        _, pictures, _ = report.report(tmp_path.iterdir())
        return [figure for name, figure in pictures.items() if name.endswith("correlations.png")]

    for curriculum in ("dr", "robust_plr"):
        source = f"mazes_{curriculum}_60M_seed1_precision=bf16"
        copy_run(tmp_path, curriculum, source, {"solved_Maze": 0.5})
    assert drawn() == []
    add_correlations(tmp_path / "robust_plr")
    (figure,) = drawn()
    new, replayed = figure.axes
    assert new.get_title() == "Robust PLR: new levels"
    for axis, value in ((new, -0.5), (replayed, 0.25)):
        lines = [line.get_ydata() for line in axis.lines if len(line.get_ydata()) > 2]
        assert len(lines) == 1 and lines[0] == pytest.approx(value)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["mna", "gae"]
    add_correlations(tmp_path / "dr")  # which replays nothing
    titles = [axis.get_title() for axis in drawn()[0].axes]
    assert titles == ["DR: new levels", "Robust PLR: new levels", "Robust PLR: replayed levels"]


def test_the_worst_case_stands_beside_the_published_curves(tmp_path):
    for seed, rates in ((1, (0.1, 0.5, 0.8)), (2, (0.3, 0.7, 1.0))):
        flags = {"seed": seed, "num_walls": 60, "vary_num_walls": True, "learning_rate": 5e-4}
        copy_run(tmp_path, f"dr{seed}", "mazes_dr_60M_seed1_precision=bf16", {}, **flags)
        copy_run(tmp_path, f"usual{seed}", "mazes_dr_60M_seed1_precision=bf16", {}, seed=seed)
        rows = zip((1, 10, 100), rates)
        lines = ["alpha_percent,solved_rate", *[f"{alpha},{rate}" for alpha, rate in rows]]
        if seed == 1:  # more mazes: an alpha that the other run lacks
            lines.insert(1, "0.1,0")
        (tmp_path / f"dr{seed}" / "worst_case.csv").write_text("\n".join(lines) + "\n")
    text, pictures, _ = report.report(tmp_path.iterdir())
    (name,) = [name for name in pictures if name.endswith("_worst_case.png")]
    assert f"(pictures/{name})" in text
    (axis,) = pictures[name].axes
    pictures[name].draw_without_rendering()
    assert axis.get_position().width > 0.6  # the rest is for the names, however long
    lines = {line.get_label(): line for line in axis.lines}
    label, *others = lines
    assert label.split()[-2:] == ["(2", "runs)"] and len(others) == len(report.WORST_CASE) == 13
    np.testing.assert_allclose(lines[label].get_xydata(), [[1, 0.2], [10, 0.6], [100, 0.9]])
    published = dict(lines["DR, No Regrets"].get_xydata())
    assert published[1] == 0.561 and published[100] == 0.993 and 0.01 not in published
    assert dict(lines["NCC-Reg, NCC"].get_xydata())[0.01] == 0.617
    for line in lines.values():  # a larger share of the mazes is never worse
        assert (np.diff(line.get_ydata()) >= 0).all()


def test_where_all_runs_have_played_random_mazes_these_are_asked_about_too(tmp_path):
    rates = {("dr", 1): 0.25, ("dr", 2): 0.75, ("robust_plr", 1): 0.5, ("robust_plr", 2): 0.625}
    for (curriculum, seed), rate in rates.items():
        source = f"mazes_{curriculum}_60M_seed1_precision=bf16"
        copy_run(tmp_path, f"{curriculum}{seed}", source, {}, seed=seed)
        rows = f"alpha_percent,mazes,solved_rate\n10,5,0.0\n100,50,{rate}\n"
        (tmp_path / f"{curriculum}{seed}" / "worst_case.csv").write_text(rows)
    asked = table_of(report.report(tmp_path.iterdir())[0], "question", 2)
    question = "Mazes, 60M steps, random mazes: does Robust PLR beat DR?"
    runs, difference, interval, within, published, said = asked[question, "steps"]
    # 0.5625 - 0.5; Welch by hand: variances 0.125 and 0.0078125 of two runs each
    degrees = (0.0625 + 0.00390625) ** 2 / (0.0625**2 + 0.00390625**2)
    half = stats.t.ppf(0.975, degrees) * (0.0625 + 0.00390625) ** 0.5
    assert (runs, difference) == ("2, 2", "+0.062")
    assert interval == f"[−{half - 0.0625:.3f}, +{half + 0.0625:.3f}]"
    # within seeds: 0.25 and -0.125, so 0.0625 ± 12.7062 standard errors of 0.1875
    assert within == f"[−{12.7062 * 0.1875 - 0.0625:.3f}, +{12.7062 * 0.1875 + 0.0625:.3f}]"
    assert (published, said) == ("–", report.TOO_FEW)
    of_others = "alpha_percent,mazes,solved_rate\n100,60,0.75\n"
    (tmp_path / "dr2" / "worst_case.csv").write_text(of_others)
    assert "random mazes" not in report.report(tmp_path.iterdir())[0]
    (tmp_path / "dr2" / "worst_case.csv").unlink()
    assert "random mazes" not in report.report(tmp_path.iterdir())[0]


def test_a_run_that_goes_on_can_be_shown(tmp_path):
    """No evaluation yet, half a row in progress.csv."""
    starpilot(tmp_path, "plr", 1, 0.0, finished=False)
    (tmp_path / "plr1" / "evaluations.csv").unlink()
    progress = (tmp_path / "plr1" / "progress.csv").read_text()
    (tmp_path / "plr1" / "progress.csv").write_text(
        "".join(progress.splitlines(True)[:9]) + "147456,99.1,1"
    )
    text, pictures, _ = report.report(tmp_path.iterdir())
    assert "131,072 of 25,000,000 steps, unfinished" in text and list(pictures) == [
        "procgen_25M.png"
    ]


def test_the_command_writes_report_and_pictures(tmp_path, monkeypatch, capsys):
    run_dir = RUNS / "starpilot_five_minutes"
    monkeypatch.setattr(sys, "argv", ["report.py", str(run_dir), "--out", str(tmp_path / "out")])
    report.main()
    assert capsys.readouterr().out == f"{tmp_path}/out/REPORT.md\n"
    assert "## Procgen, 0.15M steps" in (tmp_path / "out" / "REPORT.md").read_text()
    assert Image.open(tmp_path / "out" / "pictures" / "procgen_0.15M.png").size[0] > 1000
    for content, message in (("", "it has no args.json"), ("{", "has a file that cannot be read")):
        (tmp_path / "bad").mkdir(exist_ok=True)
        if content:
            (tmp_path / "bad" / "args.json").write_text(content)
        monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path / "bad")])
        with pytest.raises(SystemExit):
            report.main()
        said = capsys.readouterr().err
        assert f"RUN-DIRS {tmp_path}/bad" in said and message in said


def test_readme_tables_are_replaced_by_name(capsys):
    readme = (
        "a\n<!-- report: mazes -->\nold\n<!-- end -->\nb\n<!-- report: mazes -->\n<!-- end -->\n"
    )
    block = "<!-- report: mazes -->\n\n| new |\n\n<!-- end -->\n"
    assert report.with_tables(readme, {"mazes": "| new |\n"}) == f"a\n{block}b\n{block}"
    with pytest.raises(SystemExit):
        report.with_tables(readme, {"procgen_2M": "| new |\n"})
    assert "a table mazes, which must be one of procgen_2M" in capsys.readouterr().err


def test_the_report_names_where_each_slice_of_a_run_was():
    here, there = (
        {"commit": "1111111", "machine": "a CPU"},
        {"commit": "1111111", "machine": "H200"},
    )
    starts = [here, there | {"from_step": 5000}, there | {"from_step": 7000}]
    starts.append(here | {"from_step": 9000})
    assert report.places_of(starts) == [
        "1111111 on a CPU",
        "1111111 on H200 from step 5,000 in 2 slices",
        "1111111 on a CPU from step 9,000",
    ]
