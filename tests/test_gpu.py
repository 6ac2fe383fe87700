"""Both scripts on a GPU, where CUDA graphs replay what Python would launch kernel by kernel.

    python -m pytest tests/test_gpu.py --device cuda -p no:xdist -o addopts=-q -s --tb=short
    python -m pytest tests/test_gpu.py --device cpu-check -p no:xdist -o addopts=-q -s --tb=short

The second one needs no GPU: the same checks of the code path without graphs, smaller for Procgen.
Without --device all are skipped. Everything runs in this process: a GPU machine can take ten
seconds to start another. Evaluation is replaced by a stub where it is not what is checked.
"""

import contextlib
import functools
import gc
import importlib.util
import io
import json
import math
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from support import assert_same_rows, result_of, rows

import ppo_plr_procgen
import ppo_robust_plr_minigrid


def is_skipped(device: str) -> bool:
    return device == "cpu" or device == "cuda" and not torch.cuda.is_available()


pytestmark = pytest.mark.skipif(
    "is_skipped(config.getoption('device'))", reason="needs --device cuda and a GPU"
)
HAVE_PROCGEN = importlib.util.find_spec("procgen") or importlib.util.find_spec("procgen_gym")
needs_procgen = pytest.mark.skipif(not HAVE_PROCGEN, reason="needs Procgen")
PROCGEN = pytest.param(ppo_plr_procgen, marks=needs_procgen, id="procgen")
MAZES = pytest.param(ppo_robust_plr_minigrid, id="mazes")

# iterations, once its buffer is filled to rho, almost all replay, so the mazes learn
MAZES_FLAGS = "--num-envs 16 --num-steps 64 --max-steps 60 --maze-size 9 --num-walls 15"
MAZES_FLAGS += " --buffer-size 64 --rho 0.3 --replay-schedule fixed --replay-prob 0.8"
SMALL = {
    ppo_plr_procgen: "--env-id starpilot --num-envs 16 --num-steps 64 --num-minibatches 4"
    " --update-epochs 2",
    ppo_robust_plr_minigrid: MAZES_FLAGS,
}
TINY = {
    ppo_plr_procgen: "--env-id starpilot --num-envs 4 --num-steps 16 --num-minibatches 2"
    " --update-epochs 1",
    ppo_robust_plr_minigrid: MAZES_FLAGS,
}
MEGABYTE = 2**20
BOUNDS = {ppo_plr_procgen: 4096, ppo_robust_plr_minigrid: 1024}  # megabytes of a small run
real_evaluate = ppo_robust_plr_minigrid.evaluate


@pytest.fixture(params=[PROCGEN, MAZES])
def script(request):
    return request.param


@pytest.fixture(scope="module", autouse=True)
def without_evaluation():
    stubs = {
        ppo_plr_procgen: {"train_return": 0.0, "test_return": 0.0, "episodes": {}},
        ppo_robust_plr_minigrid: {"solved_mean": 0.0, "episodes": {}},
    }
    with pytest.MonkeyPatch.context() as patch:
        for script, evaluation in stubs.items():
            patch.setattr(script, "evaluate", functools.partial(lambda x, *_: x, evaluation))
        patch.setattr(ppo_robust_plr_minigrid, "level_pictures", lambda *_: {})
        yield


# ---- a table of the tests ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table():
    lines: list[tuple[str, float, float]] = []
    yield lines
    print("\n\n  seconds  peak MB  test")
    for name, seconds, peak in lines:
        print(f"  {seconds:7.1f}  {peak:7.0f}  {name}")
    print(f"  {sum(seconds for _, seconds, _ in lines):7.1f}           all, on {gpu_name()}")


@pytest.fixture(autouse=True)
def measured(request, table):
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    yield
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    table.append((request.node.name, time.perf_counter() - began, peak / MEGABYTE))


def gpu_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"


# ---- starting a script in this process -----------------------------------------------------------


def start(script, flags: str, run_dir: Path) -> None:
    """main() with these flags. What ends it early fails the test, with what it said."""
    gc.collect()  # graphs and storage of the last run
    torch.use_deterministic_algorithms(False)  # what one that failed may have left
    printed = io.StringIO()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    handlers = {number: signal.getsignal(number) for number in numbers}
    sys.argv = [f"{script.__name__}.py", *flags.split()]
    try:
        # what a GPU session shows of its output is short
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            script.main()
    except SystemExit:
        errors = [path.read_text() for path in run_dir.glob("error_*.txt")]
        pytest.fail("\n".join((flags, printed.getvalue(), *errors)), pytrace=False)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if "--compile" in flags:  # not before: the script sets what compiling reads at its import
            torch.compiler.reset()


class Trainer:
    """Runs of a few iterations, with flags that come before all others."""

    def __init__(self, flags: dict, folder: Path):
        self.flags = flags
        self.folder = folder
        self.count = 0

    def steps(self, script, iterations: int, flags: str = "") -> int:
        return iterations * tyro.cli(script.Args, args=flags.split()).batch_size

    def train(self, script, iterations: int, more: str = "", flags: str | None = None) -> Path:
        """A new run's directory. flags: instead of those that come first."""
        self.count += 1
        run_dir = self.folder / str(self.count)
        flags = self.flags[script] if flags is None else flags
        flags += f" {more}"
        steps = self.steps(script, iterations, flags)
        flags += f" --total-timesteps {steps} --run-dir {run_dir}"
        start(script, f"{flags} --eval-interval 0 --checkpoint-interval 0", run_dir)
        return run_dir

    @functools.cache  # noqa: B019
    def once(self, script, iterations: int, more: str = "") -> Path:
        """Such a run, made the first time it is asked for."""
        return self.train(script, iterations, more)

    def resume(self, script, run_dir: Path, iterations: int, flags: str) -> None:
        steps = self.steps(script, iterations, flags)
        start(script, f"--resume {run_dir} --total-timesteps {steps}", run_dir)


@pytest.fixture(scope="module")
def trainer(pytestconfig, tmp_path_factory):
    on_gpu = pytestconfig.getoption("device") == "cuda"
    return Trainer(SMALL if on_gpu else TINY, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def device(pytestconfig):
    return torch.device("cuda" if pytestconfig.getoption("device") == "cuda" else "cpu")


def hide_gpu(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.cuda, "is_available", lambda: False)


def assert_same_run(run_dir: Path, expected: Path) -> None:
    assert_same_rows(run_dir / "progress.csv", expected / "progress.csv")
    assert result_of(run_dir)["fingerprint"] == result_of(expected)["fingerprint"]


def rows_with_updates(run_dir: Path) -> list[dict[str, float]]:
    """Those of the iterations that learned something: all of Procgen's."""
    found = []
    before = 0
    for row in rows(run_dir / "progress.csv"):
        updates = row.get("gradient_updates", before + 1)
        if updates > before:
            found.append(row)
        before = updates
    return found


# ---- the same run --------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_recorded_run_equals_the_plain_one(precision, script, trainer):
    recorded = trainer.once(script, 6, f"--precision {precision}")
    plain = trainer.train(script, 6, f"--precision {precision} --no-cuda-graphs")
    assert rows_with_updates(recorded)
    assert_same_run(recorded, plain)


@pytest.mark.parametrize(
    "script, flags",
    [
        pytest.param(ppo_plr_procgen, "--augment ucb", marks=needs_procgen, id="ucb"),
        pytest.param(ppo_robust_plr_minigrid, "--curriculum accel", id="accel"),
    ],
)
def test_what_is_launched_beside_the_graphs_is_the_same(script, flags, trainer):
    recorded = trainer.once(script, 6, f"--precision fp32 {flags}")
    plain = trainer.train(script, 6, f"--precision fp32 {flags} --no-cuda-graphs")
    assert rows_with_updates(recorded)
    assert_same_run(recorded, plain)
    usual = trainer.once(script, 6, "--precision fp32")
    assert result_of(usual)["fingerprint"] != result_of(recorded)["fingerprint"]


def test_the_same_command_twice_is_the_same_run(script, trainer):
    again = trainer.train(script, 6, "--precision fp32")
    assert_same_run(again, trainer.once(script, 6, "--precision fp32"))
    other = trainer.train(script, 6, "--precision fp32 --seed 2")
    assert result_of(other)["fingerprint"] != result_of(again)["fingerprint"]


def test_a_run_resumed_half_way_equals_the_uninterrupted_one(script, trainer):
    run_dir = trainer.train(script, 3, "--precision fp32")
    trainer.resume(script, run_dir, 6, trainer.flags[script])
    assert_same_run(run_dir, trainer.once(script, 6, "--precision fp32"))


@pytest.mark.parametrize("first", ["gpu", "cpu"])
def test_a_checkpoint_goes_on_on_the_other_device(first, script, trainer, monkeypatch):
    """As on a machine without a GPU; not bit for bit, but with what the optimizer knew."""
    flags = f"{TINY[script]} --learning-rate 3e-4"
    if first == "cpu":
        hide_gpu(monkeypatch)
    run_dir = trainer.train(script, 4, flags=flags)
    before = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    on_first = result_of(run_dir)["device"]
    monkeypatch.undo()
    if first == "gpu":
        hide_gpu(monkeypatch)
    trainer.resume(script, run_dir, 8, flags)
    checkpoint = torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=True)
    monkeypatch.undo()
    result = result_of(run_dir)
    assert not torch.cuda.is_available() or on_first != result["device"]
    assert result["global_step"] == 2 * before["global_step"] == trainer.steps(script, 8, flags)
    progress = rows(run_dir / "progress.csv")
    assert len(progress) == 8
    assert [row["learning_rate"] for row in progress] == pytest.approx([3e-4] * 8, rel=1e-5)
    group = checkpoint["optimizer"]["param_groups"][0]
    assert float(group["lr"]) == pytest.approx(3e-4, rel=1e-5)
    updates = checkpoint["totals"].get("gradient_updates", 8 * 2)  # TINY: 2 for Procgen
    updates_before = before["totals"].get("gradient_updates", 4 * 2)
    assert updates > updates_before > 0
    for state, expected in ((before, updates_before), (checkpoint, updates)):
        counts = {float(x["step"]) for x in state["optimizer"]["state"].values()}
        assert counts == {expected}


# ---- every path ----------------------------------------------------------------------------------

ALL = "--target-kl 0.001 --anneal-lr --profile"
PROCGEN_PATHS = [f"--score {name}" for name in ppo_plr_procgen.SCORES]
PROCGEN_PATHS += ["--curriculum uniform", "--curriculum sequential", "--stitch-episodes", ALL]
PROCGEN_PATHS += ["--encoder impoola", "--augment crop --precision bf16"]
MAZES_PATHS = [f"--score {name}" for name in ppo_robust_plr_minigrid.SCORES]
MAZES_PATHS += ["--curriculum plr", "--curriculum dr", "--precision tf32", ALL]
MAZES_PATHS += ["--bootstrap-timeouts", "--bootstrap-timeouts --score positive_value_loss"]
MAZES_PATHS += ["--curriculum accel --num-walls 0", "--redraw-direction", "--no-compass"]


def cases():
    for flags in PROCGEN_PATHS:
        yield pytest.param(ppo_plr_procgen, flags, marks=needs_procgen, id=f"procgen {flags}")
    for flags in MAZES_PATHS:
        yield pytest.param(ppo_robust_plr_minigrid, flags, id=f"mazes {flags}")


@pytest.mark.parametrize("script, flags", list(cases()))
def test_every_score_and_curriculum_runs(script, flags, trainer):
    replays = "--num-levels 8" if script is ppo_plr_procgen else "--rho 0.2 --replay-prob 1"
    iterations = 5 if "accel" in flags else 3  # nothing is learned on the children
    if "--curriculum dr" in flags:
        maze = "--num-envs 16 --num-steps 64 --max-steps 60 --maze-size 9 --num-walls 15"
        run_dir = trainer.train(script, iterations, flags=f"{maze} {flags}")
    else:
        run_dir = trainer.train(script, iterations, f"{replays} {flags}")
    learned = rows_with_updates(run_dir)
    assert len(rows(run_dir / "progress.csv")) == iterations
    assert len(learned) >= 2
    for row in learned:
        for name in script.LOSSES:
            assert math.isfinite(row[name])
        assert row["grad_norm"] > 0
    if "--profile" in flags:
        assert (run_dir / "trace_0.json.gz").stat().st_size > 1000


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_both_precisions_learn(precision, trainer):
    """Empty mazes of 5 x 5 cells: solved in 13% of the episodes at first, in 99% after these."""
    flags = "--maze-size 7 --num-walls 0 --max-steps 40 --num-steps 64 --num-envs 64"
    flags += f" --curriculum dr --learning-rate 1e-3 --precision {precision}"
    run_dir = trainer.train(ppo_robust_plr_minigrid, 40, flags=flags)
    solved = [row["solved_rate"] for row in rows(run_dir / "progress.csv")]
    assert np.mean(solved[:3]) < 0.5
    assert np.mean(solved[-5:]) > 0.85


# ---- environments, evaluation, memory ------------------------------------------------------------


@pytest.mark.parametrize("graphs", [False, True], ids=["plain", "graphs"])
def test_mazes_step_alike_on_both_devices(graphs, device):
    make = functools.partial(ppo_robust_plr_minigrid.MazeEnvs, size=9, max_steps=40, num_walls=15)
    graphs = graphs and device.type == "cuda"
    ours = make(32, device, cuda_graphs=graphs)
    expected = make(32, torch.device("cpu"))
    rng = np.random.default_rng(0)
    levels = rng.integers(1000, size=32)
    reset = {"seed": levels.tolist()}
    episodes = 0
    for _ in range(200):
        obs, _ = ours.reset(**reset)
        expected_obs, _ = expected.reset(**reset)
        for key, x in expected_obs.items():
            assert torch.equal(obs[key].cpu(), x)
        actions = torch.from_numpy(rng.integers(3, size=32))
        obs, *results, _ = ours.step(actions.to(device))
        expected_obs, *expected_results, _ = expected.step(actions)
        for key, x in expected_obs.items():
            assert torch.equal(obs[key].cpu(), x)
        for x, y in zip(results, expected_results, strict=True):
            assert x.dtype == y.dtype
            assert torch.equal(x.cpu(), y)
        _, terminations, truncations = expected_results
        done = (terminations | truncations).numpy()
        episodes += np.count_nonzero(done)
        levels = rng.integers(1000, size=32)
        reset = {"seed": levels.tolist(), "options": {"reset_mask": done}}
    assert episodes > 32 * 4


class DrawnOnCPU(ppo_plr_procgen.Draws):
    def uniform(self, *args):
        return super().uniform(*args).to(self.images_device)

    def integers(self, *args):
        return super().integers(*args).to(self.images_device)

    def normal(self, *args):
        return super().normal(*args).to(self.images_device)


@pytest.mark.parametrize("name", ppo_plr_procgen.AUGMENTATIONS)
def test_augmentations_are_alike_on_both_devices(name, device):
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), np.uint8))
    found = []
    for images in (x, x.to(device)):
        torch.manual_seed(1)
        draws = DrawnOnCPU(len(x), slice(None), torch.device("cpu"))
        draws.images_device = images.device
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            augmented = ppo_plr_procgen.AUGMENTATIONS[name](images, draws)
        found.append(augmented.float().cpu())
    assert not torch.equal(found[0], x.float())
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-2)  # of 255


@needs_procgen
def test_page_locked_observations_are_the_same(device):
    if device.type == "cpu":
        pytest.skip("a CPU locks no pages")
    make = functools.partial(ppo_plr_procgen.ProcgenLevels, 16, "starpilot", "easy", 4)
    ours = make(page_lock=True)
    expected = make(page_lock=False)
    rng = np.random.default_rng(0)
    reset = {"seed": list(range(16))}
    on_device = torch.zeros((16, 64, 64, 3), dtype=torch.uint8, device=device)
    for _ in range(100):
        obs, _ = ours.reset(**reset)
        expected_obs, _ = expected.reset(**reset)
        assert np.array_equal(obs, expected_obs)
        actions = rng.integers(15, size=16).astype(np.int32)
        obs, reward, done, _, _ = ours.step(actions)
        on_device.copy_(torch.from_numpy(obs), non_blocking=True)
        expected_obs, expected_reward, expected_done, _, _ = expected.step(actions)
        assert np.array_equal(obs, expected_obs)
        assert np.array_equal(on_device.cpu().numpy(), expected_obs)
        assert np.array_equal(reward, expected_reward)
        assert np.array_equal(done, expected_done)
        levels = rng.integers(200, size=16).tolist()
        reset = {"seed": levels, "options": {"reset_mask": done.copy()}}
    ours.close()
    expected.close()


@needs_procgen
def test_page_locked_environments_can_be_made_again_and_again(device):
    if device.type == "cpu":
        pytest.skip("a CPU locks no pages")
    first = None
    for _ in range(20):
        envs = ppo_plr_procgen.ProcgenLevels(16, "starpilot", "easy", 4, page_lock=True)
        obs, _ = envs.reset(seed=list(range(16)))
        first = obs.copy() if first is None else first
        assert np.array_equal(torch.from_numpy(obs).to(device).cpu().numpy(), first)
        envs.close()


def test_an_evaluation_with_graphs_equals_one_without(trainer, monkeypatch):
    script = ppo_robust_plr_minigrid
    run_dir = trainer.once(script, 6, "--precision fp32")
    monkeypatch.setattr(script, "evaluate", real_evaluate)
    episodes = []
    for graphs in ("--cuda-graphs", "--no-cuda-graphs"):
        start(script, f"--evaluate {run_dir} --eval-episodes 2 {graphs}", run_dir)
        (path,) = run_dir.glob("evaluation_*.json")
        episodes.append(json.loads(path.read_text())["episodes"])
        path.unlink()  # the next may be of the same second
    assert len(episodes[0]) == 13
    assert all(len(returns) == 2 for returns in episodes[0].values())
    assert episodes[0] == episodes[1]


def test_memory_does_not_grow(script, trainer, monkeypatch):
    noted = {}
    end_iteration = script.Run.end_iteration

    def noting(run, envs) -> None:
        end_iteration(run, envs)
        now = torch.cuda.memory_allocated()
        noted[run.iteration] = (now / MEGABYTE, torch.cuda.max_memory_allocated() / MEGABYTE)

    monkeypatch.setattr(script.Run, "end_iteration", noting)
    trainer.train(script, 40, "--learning-rate 1e-6")  # episodes stay as long as they are
    for i in (10, 40):
        print(
            f"\n{script.__name__}, iteration {i}: {noted[i][0]:.1f} MB, peak {noted[i][1]:.1f} MB"
        )
    assert noted[40][0] <= noted[10][0] + 8
    assert noted[40][1] <= 1.1 * noted[10][1] + 16  # a rare length of the mazes is recorded late
    assert noted[40][1] < BOUNDS[script]


def test_the_same_compiled_command_twice_is_the_same_run(trainer):
    """The last one: compiling takes longest."""
    flags = "--precision bf16 --compile"
    runs = [trainer.train(ppo_robust_plr_minigrid, 6, flags) for _ in range(2)]
    assert rows_with_updates(runs[0])
    assert_same_run(*runs)
