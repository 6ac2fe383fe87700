"""benchmarks/check_gpu.py without a GPU: its checks pass on the CPU, and each fails when what it is for is wrong."""

import csv
import math
import os
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support import ROOT, main

sys.path.insert(0, str(ROOT / "benchmarks"))
import check_gpu

import ppo_plr_procgen
import ppo_robust_plr_minigrid

CPU, START = torch.device("cpu"), check_gpu.start
SCRIPTS = {"procgen": ppo_plr_procgen, "mazes": ppo_robust_plr_minigrid}
TINY = check_gpu.Args(device="cpu", tiny=True, jobs=4, learn_seeds=1)
both = pytest.mark.parametrize("name", SCRIPTS)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Scripts run in this process, where PyTorch is loaded already, and leave the evaluation out."""

    def start(script, flags, log, **env):
        with open(log, "w") as file, redirect_stdout(file), redirect_stderr(file):
            main(sys.modules[script], monkeypatch, flags)
            print("peak bytes 1000")
        return SimpleNamespace(returncode=0, wait=lambda seconds: 0)

    monkeypatch.setattr(check_gpu, "start", start)
    result = {"solved_mean": 0.0, "train_return": 0.0, "test_return": 0.0, "episodes": {}}
    for script in SCRIPTS.values():
        monkeypatch.setattr(script, "evaluate", lambda *args: result)


@pytest.fixture
def runs(tmp_path):
    return lambda name: check_gpu.Runs(name, TINY, tmp_path / "runs", time.monotonic() + 300)


def check_all(monkeypatch, flags: str) -> int:
    monkeypatch.setattr(sys, "argv", ["check_gpu.py", *flags.split()])
    with pytest.raises(SystemExit) as stop:
        check_gpu.main()
    return stop.value.code


def outcome(check, *args) -> str:
    return check_gpu.perform(lambda: check(*args), math.inf)["outcome"]


def rows_of(folder) -> list[dict[str, str]]:
    with open(folder / "check_gpu.csv") as file:
        return list(csv.DictReader(file))


# ---- right -----------------------------------------------------------------------------------------------------------


@both
def test_all_checks_pass_on_the_cpu(name, monkeypatch, tmp_path, capsys):
    flags = f"--device cpu --tiny --quick --no-compile --scripts {name} --out {tmp_path}"
    assert check_all(monkeypatch, flags) == 0
    rows = rows_of(tmp_path)
    skipped = [row["check"] for row in rows if row["outcome"] != "PASS"]
    expected = ["network, tf32, eager"] + ["act, tf32, eager"] * (name == "mazes") + ["run twice, tf32"]
    assert skipped == [f"{name}: {check}" for check in expected]
    assert all(row["outcome"] == "SKIP" for row in rows if row["check"] in skipped)
    passed = [row for row in rows if row["at most"]]
    assert len(passed) == (6 if name == "procgen" else 12)
    assert all(float(row["measured"]) <= float(row["at most"]) for row in passed)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(rows) + 1 and all(row["check"] in line for row, line in zip(rows, lines))
    assert all(row["check"] in (tmp_path / "check_gpu.md").read_text() for row in rows)


def test_learning_is_compared_with_curves_and_a_plot(runs, monkeypatch, tmp_path):
    flags = "--curriculum dr --maze-size 5 --num-walls 1 --max-steps 16 --num-envs 4 --num-steps 16"
    monkeypatch.setitem(check_gpu.LEARNING, "mazes", (flags, 640))
    args = check_gpu.Args(device="cpu", out=tmp_path, learn_seeds=1)
    check_gpu.perform(lambda: check_gpu.learns_as_well("mazes", args, runs("mazes")), math.inf)
    lines = (tmp_path / "learning_mazes.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["precision"] + ["fp32"] * 10 + ["bf16"] * 10
    assert (tmp_path / "learning_mazes.png").stat().st_size > 5000


def test_a_run_is_the_script_as_started_by_a_user_and_ends_with_the_time(runs, monkeypatch):
    monkeypatch.setattr(check_gpu, "start", START)
    runs = runs("mazes")
    runs.run({"good": check_gpu.UPDATES["mazes", True]["4 x 24"]})
    assert runs["good"]["peak"] > 2**27 and runs["good"]["gradient_updates"] == 2
    runs.done["bad"] = runs.result("bad", 2, "a line\nerror: --num-envs 0 must be at least 1")
    with pytest.raises(RuntimeError, match="run bad ended with 2: error: --num-envs 0 must be at least 1"):
        runs["bad"]
    runs.deadline = time.monotonic()
    runs.run({"late": check_gpu.RUNS["mazes", True]})
    with pytest.raises(RuntimeError, match="run late had not ended"):
        runs["late"]


# ---- wrong -----------------------------------------------------------------------------------------------------------


def test_a_wrong_kernel_fails(monkeypatch):
    script = ppo_robust_plr_minigrid

    def wrong_by(part: int, error: float):
        def compile(function, **options):
            def step(*inputs):
                results = list(function(*inputs))
                results[part] = (results[part] + error * (results[part] != 0)).to(results[part].dtype)
                return tuple(results)

            return step

        return compile

    for part, error in ((0, 1), (2, 1), (4, 1e-7), (5, -1), (6, -1)):  # image, direction, reward, terminated, truncated
        monkeypatch.setattr(torch, "compile", wrong_by(part, error))
        assert outcome(check_gpu.same_steps, script, CPU, 7, True) == "FAIL", part
        assert (outcome(check_gpu.same_rewards, script, CPU, True) == "FAIL") == (part == 4)
    monkeypatch.setattr(torch, "compile", wrong_by(0, 0))
    assert outcome(check_gpu.same_steps, script, CPU, 7, True) == "PASS"


@both
@pytest.mark.parametrize("wrong", ["a parameter", "not a number", "fp32 for bf16", "bf16 for fp32"])
def test_a_wrong_parameter_or_precision_fails(wrong, name, monkeypatch):
    script, make_agent = SCRIPTS[name], check_gpu.make_agent
    check_gpu.truth(name, script, True)
    precision = "bf16" if wrong == "fp32 for bf16" else "fp32"

    def make_wrong(name, script, precision, device):
        if " for " in wrong:
            return make_agent(name, script, wrong.split()[0], device)
        agent = make_agent(name, script, precision, device)
        with torch.no_grad():
            next(agent.parameters()).mul_(1.0001 if wrong == "a parameter" else math.nan)
        return agent

    monkeypatch.setattr(check_gpu, "make_agent", make_wrong)
    assert outcome(check_gpu.same_network, name, script, TINY, precision, False) == "FAIL"
    if name == "mazes":
        assert outcome(check_gpu.same_acting, script, TINY, precision, False) == "FAIL"


def test_rows_that_forget_an_episodes_end_fail(monkeypatch):
    script, rows = ppo_robust_plr_minigrid, ppo_robust_plr_minigrid.episode_rows
    check_gpu.truth("mazes", script, True)
    monkeypatch.setattr(script, "episode_rows", lambda starts: rows(np.zeros_like(starts)))
    assert outcome(check_gpu.same_network, "mazes", script, TINY, "fp32", False) == "FAIL"
    assert outcome(check_gpu.same_acting, script, TINY, "fp32", False) == "FAIL"


def test_runs_that_do_not_repeat_fail(runs, monkeypatch):
    runs, clip = runs("procgen"), torch.nn.utils.clip_grad_norm_

    def noisy(parameters, most):
        parameters = list(parameters)
        parameters[0].grad += int.from_bytes(os.urandom(4)) * 1e-12
        return clip(parameters, most)

    monkeypatch.setattr(ppo_plr_procgen.nn.utils, "clip_grad_norm_", noisy)
    args = ("procgen", check_gpu.Args(device="cpu", tiny=True, precisions=("fp32",)), runs)
    assert outcome(check_gpu.repeats, *args, "fp32") == "FAIL"
    assert outcome(check_gpu.profiles, *args) == "FAIL"
    assert outcome(check_gpu.resumes, *args) == "FAIL"


def test_runs_that_are_wrong_in_themselves_fail(runs):
    runs, losses = runs("mazes"), np.ones(1, [(name, float) for name in check_gpu.LOSSES])

    def run(fingerprint: str, **other) -> dict:
        return {"fingerprint": fingerprint, "gradient_updates": 1, "rows": losses, "log": "", "folder": None} | other

    def fails(check, *args, **wrong) -> bool:
        runs.done = good | wrong
        return outcome(check, "mazes", TINY, runs, *args) == "FAIL"

    good = {name + again: run(name) for name in ("fp32", "bf16", "compiled") for again in ("", "_again")}
    good |= {"plr": run("plr"), "profile": run("fp32"), "half": run("fp32")}
    repeats, compiled = check_gpu.repeats, check_gpu.compiled_runs
    assert not fails(repeats, "fp32") and not fails(compiled, False) and not fails(compiled, True)
    assert fails(repeats, "fp32", fp32_again=run("other"))
    assert fails(repeats, "fp32", fp32_again=RuntimeError("it ended"))
    assert fails(repeats, "bf16", bf16=run("fp32"), bf16_again=run("fp32"))  # a flag without effect
    assert fails(repeats, "fp32", fp32=run("fp32", gradient_updates=0))
    (off := losses.copy())["entropy"] = 1.02
    assert fails(compiled, False, compiled=run("compiled", rows=off))
    assert fails(compiled, True, compiled_again=run("other"))
    assert fails(check_gpu.resumes)  # half is the whole
    assert fails(check_gpu.profiles)  # nothing printed, no trace


@pytest.mark.filterwarnings("ignore:Mean of empty slice")
def test_learning_by_hand():
    def curve(*returns: float) -> np.ndarray:
        return np.array(list(enumerate(returns)), [("global_step", int), ("episodic_return", float)])

    learned, nothing, worse = curve(0, math.nan, *[5] * 4, 10, 10), curve(*[3] * 8), curve(0, 0, *[5] * 4, 8, 8)
    measured, most, _ = check_gpu.compare_learning({("fp32", 1): learned, ("bf16", 1): worse})
    assert (measured, most) == (2, 1.5)
    for fp32, bf16, expected in (
        (learned, worse, "FAIL"), (worse, learned, "PASS"), (learned, learned[:8], "PASS"), (nothing, nothing, "FAIL"),
        (learned, learned[:7], "FAIL"), (learned, curve(*[math.nan] * 8), "FAIL"),
    ):  # fmt: skip
        assert outcome(check_gpu.compare_learning, {("fp32", 1): fp32, ("bf16", 1): bf16}) == expected


# ---- what comes of it ------------------------------------------------------------------------------------------------


def test_one_failure_stops_no_other_check_and_is_the_exit_status(monkeypatch, tmp_path, capsys):
    def broken():
        raise ValueError("it broke\nat length")

    def listed(*args):
        yield "good", lambda: (1.0, 2.0, "a number")
        yield "broken", broken
        yield "refused", lambda: sys.exit(2)
        yield "not a number", lambda: (math.nan, 2.0, "a number")
        yield "good again", lambda: (1.0, math.inf, "a number")

    monkeypatch.setattr(check_gpu, "checks", listed)
    assert check_all(monkeypatch, f"--device cpu --scripts mazes --out {tmp_path}") == 1
    rows = rows_of(tmp_path)
    assert [row["outcome"] for row in rows] == ["PASS", "FAIL", "FAIL", "FAIL", "PASS"]
    assert rows[1]["what"] == "ValueError: it broke"
    assert "FAIL mazes: broken: ValueError: it broke [" in capsys.readouterr().out
    # nothing is begun after the limit, and nothing checked is no success
    assert check_all(monkeypatch, f"--device cpu --scripts mazes --limit -1 --out {tmp_path}") == 1
    assert {(row["outcome"], row["what"]) for row in rows_of(tmp_path)} == {("SKIP", "no time left")}


def test_a_script_without_its_package_is_skipped(monkeypatch, tmp_path):
    find_spec = check_gpu.importlib.util.find_spec
    monkeypatch.setattr(check_gpu.importlib.util, "find_spec", lambda x: find_spec(x) if x == "minigrid" else None)
    monkeypatch.setattr(check_gpu, "checks", lambda *args: [("good", lambda: (1, 2, ""))])
    assert check_all(monkeypatch, f"--device cpu --out {tmp_path}") == 0
    rows = rows_of(tmp_path)
    assert [(row["check"], row["outcome"]) for row in rows] == [("procgen: all", "SKIP"), ("mazes: good", "PASS")]
    assert "no package procgen" in rows[0]["what"]


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert check_all(monkeypatch, "") == 2
    message = "error: --device cuda needs a GPU, and PyTorch sees none: choose --device cpu.\n"
    assert capsys.readouterr() == ("", message)
