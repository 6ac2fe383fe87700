"""What both scripts promise alike."""

import copy
import difflib
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro
from minigrid.core.grid import Grid
from minigrid.core.mission import MissionSpace
from minigrid.minigrid_env import MiniGridEnv
from PIL import Image
from support import (
    HALF,
    HUNG,
    ROOT,
    SCRIPTS,
    TINY,
    assert_ledger_balances,
    assert_refused,
    assert_same_rows,
    files,
    made_once,
    main,
    result_of,
    rows,
    run,
    tiny,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo_plr_procgen
import ppo_robust_plr_minigrid


def steps_of(script) -> list[int]:
    """The global steps of a tiny run's iterations."""
    envs, steps, total = (
        int(re.search(rf"--{name} (\d+)", TINY[script.__name__])[1])
        for name in ("num-envs", "num-steps", "total-timesteps")
    )
    return list(range(envs * steps, total + 1, envs * steps))


def test_the_readmes_commands_are_valid(script):
    commands = re.findall(
        rf"python {script.__name__}\.py((?: [^\n`|#']*)?)", (ROOT / "README.md").read_text()
    )
    commands += re.findall(rf"python {script.__name__}\.py([^\n#]*)", script.__doc__)
    assert len(commands) > 8
    for flags in commands:
        if "--help" not in flags:
            script.check_args(tyro.cli(script.Args, args=flags.split()))


# ---- whole runs ----------------------------------------------------------------------------------


def test_a_run_directory_holds_what_it_should(script, finished_run):
    run_dir = finished_run(script)
    args, result, steps = (
        json.loads((run_dir / "args.json").read_text()),
        result_of(run_dir),
        steps_of(script),
    )
    assert args["batch_size"] == steps[0] and args["total_timesteps"] == steps[-1]
    progress, evaluations = rows(run_dir / "progress.csv"), rows(run_dir / "evaluations.csv")
    assert [row["global_step"] for row in progress] == steps
    for row in progress:
        assert_ledger_balances(row)
        assert 0 <= row["seen_share"] <= 1
    # of this iteration alone: not counted from the start
    for before, row in zip(progress, progress[1:]):
        assert steps[0] / row["SPS"] <= row["wall_seconds"] - before["wall_seconds"] + 0.01
    assert len(evaluations) == 1 and evaluations[0]["global_step"] == steps[-1]
    for key, value in result["evaluation"].items():
        assert key == "episodes" or evaluations[0][key] == pytest.approx(value, rel=1e-4, abs=1e-5)
    assert re.fullmatch("[0-9a-f]{64}", result["fingerprint"]) and result["steps_per_second"] > 0
    events = EventAccumulator(str(run_dir)).Reload()
    tags = set(events.Tags()["scalars"])
    assert {"charts/SPS", "charts/learning_rate", "losses/value_loss", "losses/approx_kl"} <= tags
    assert {
        "curriculum/seen_share",
        "curriculum/effective_levels",
        "curriculum/replay_share",
    } <= tags
    assert [event.step for event in events.Scalars("charts/SPS")] == steps
    checkpoint = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    assert checkpoint["global_step"] == steps[-1] and checkpoint["iteration"] == len(steps)
    assert set(checkpoint["sampler"]["arrays"]) >= {"scores", "seen"}
    assert not list(run_dir.glob("*.tmp"))


def test_what_a_person_sees(script, finished_run):
    out, err = ((finished_run(script) / name).read_text() for name in ("stdout", "stderr"))
    if script is ppo_plr_procgen:
        assert "fruitbot (easy), 5 levels, plr, seed 1" in out
        middle, last = "", r"evaluation: train \S+, test \S+"
    else:
        assert "maze, robust_plr, seed 1" in out
        middle, last = r"\d+ updates \| ", r"evaluation: solved \S+"
    line = rf"step {steps_of(script)[-1]} \(100\.0%\) \| 0h00m left \| [\d,]+ steps/s \| {middle}"
    assert (
        re.search(rf"{line}train return \S+ \| {last}", out)
        and "Gym has been unmaintained" not in out + err
    )
    assert torch.cuda.is_available() or "training on 1 CPU thread\n" in out


@pytest.mark.parametrize(
    "flags, slow",
    [
        ("fma avx512_vnni avx512f", True),
        ("avx512_vnni avx512_bf16", False),
        ("amx_bf16 amx_tile", False),
        (None, False),  # it cannot be read: not on Linux
    ],
)
def test_bf16_on_a_cpu_that_lacks_it_is_slow_and_said_to_be(script, tmp_path, flags, slow):
    cpuinfo = tmp_path / "cpuinfo"
    if flags:
        cpuinfo.write_text(f"model name : a CPU\nflags : {flags}\n")
    assert script.has_bf16(cpuinfo) is not slow


@pytest.mark.parametrize("precision, slow", [("bf16", True), ("bf16", False), ("fp32", True)])
def test_what_is_said_of_it(script, tmp_path, monkeypatch, capsys, precision, slow):
    monkeypatch.setattr(script, "has_bf16", lambda: not slow)
    monkeypatch.setattr(script.signal, "signal", lambda *_: None)
    run = script.Run.__new__(script.Run)
    run.args = script.Args(precision=precision, total_timesteps=0)
    run.dir, run.device, run.checkpoint = tmp_path, torch.device("cpu"), {}
    run.iteration, run.train_seconds, run.signals = 0, 0.0, []
    assert list(run.iterations(None)) == []
    out = capsys.readouterr().out
    assert "training on" in out
    assert ("bf16 is slower" in out) is (slow and precision == "bf16")


def test_the_time_left_is_by_the_pace_of_this_process(script, monkeypatch, capsys):
    goes_on = script.Run.__new__(script.Run)
    goes_on.args = SimpleNamespace(num_iterations=100, batch_size=10)
    goes_on.notes, goes_on.evaluation_shown, goes_on.episodic_return = [], True, 0.5
    goes_on.began = 0.0  # slices of a slower machine: 40 iterations in 86,400 s
    goes_on.slice_start = (40, 86_400.0)
    goes_on.iteration = 50
    monkeypatch.setattr(script.time, "time", lambda: 87_000.0)
    goes_on._show_progress(7.0)
    line = "step 500 (50.0%) | 0h50m left | 7 steps/s | train return 0.50\n"  # 50 more, 60 s each
    assert capsys.readouterr().out == line


CHANGES = {
    ppo_plr_procgen: ("", "--seed 2", "--curriculum uniform", "--precision bf16"),
    ppo_robust_plr_minigrid: (
        "",
        "--seed 2",
        "--curriculum plr",
        "--curriculum dr",
        "--score value_l1",
        "--bootstrap-timeouts",
    ),
}

# the baselines' curricula differ from the first level on, those of mazes once levels are replayed
BRIEF = {
    ppo_plr_procgen: "--total-timesteps 96",
    ppo_robust_plr_minigrid: HALF[ppo_robust_plr_minigrid],
}


@pytest.mark.slow
def test_another_seed_curriculum_precision_or_score_is_another_run(script, tmp_path, monkeypatch):
    nothing = {"train_return": 0.0, "test_return": 0.0, "solved_mean": 0.0, "episodes": {}}
    monkeypatch.setattr(script, "evaluate", lambda *args: nothing)
    prints = set()
    for i, change in enumerate(CHANGES[script]):
        flags = tiny(script, f"{BRIEF[script]} {change}")
        main(script, monkeypatch, f"{flags} --run-dir {tmp_path}/{i}")
        prints.add(result_of(tmp_path / str(i))["fingerprint"])
    assert len(prints) == len(CHANGES[script])


@pytest.mark.slow
def test_evaluate_repeats_the_final_evaluation(script, finished_run, monkeypatch, tmp_path, capsys):
    """Without any other flag, of a run that another process made."""
    shutil.copytree(finished_run(script), run_dir := tmp_path / "run")
    main(script, monkeypatch, f"--evaluate {run_dir}")
    (path,) = run_dir.glob("evaluation_*.json")
    result, written = result_of(run_dir), json.loads(path.read_text())
    final = result["evaluation"]
    assert all(written[key] == value for key, value in final.items())
    assert all(
        written[key] == result[key] for key in {"global_step", "gradient_updates"} & result.keys()
    )
    if script is ppo_plr_procgen:
        assert any(final["episodes"]["test_returns"] + final["episodes"]["train_returns"])
    scalars = [f"{name}: {x:.3f}" for name, x in final.items() if name != "episodes"]
    assert capsys.readouterr().out.splitlines() == [*scalars, f"every episode: {path}"]


def test_one_process_evaluates(script, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(script, "WORLD", 2)
    expected = "--evaluate runs/a must be without torchrun: one process plays it all."
    assert_refused(script, monkeypatch, tmp_path, capsys, "--evaluate runs/a", expected)


def test_evaluate_takes_other_flags(script, finished_run, brief, monkeypatch, tmp_path, capsys):
    shutil.copytree(finished_run(script), run_dir := tmp_path / "run")
    levels = "--start-level 50 --num-levels 3" if script is ppo_plr_procgen else ""
    main(script, monkeypatch, f"--evaluate {run_dir} --eval-episodes 3 --capture-video {levels}")
    (path,) = run_dir.glob("evaluation_*.json")
    episodes, videos = (
        json.loads(path.read_text())["episodes"],
        len(list((run_dir / "videos").rglob("*.gif"))),
    )
    if script is ppo_plr_procgen:
        assert sorted(episodes["train_levels"]) == [50, 51, 52] and videos == 1
    else:
        assert (
            all(len(returns) == 3 for returns in episodes.values())
            and videos == len(episodes) == 13
        )
    assert capsys.readouterr().out.endswith(f"every episode: {path}\n")


@pytest.mark.parametrize("kind", ["a finished", "an unfinished"])
def test_a_directory_that_holds_a_run_is_refused_and_left_as_it_was(
    kind, script, finished_run, tmp_path, monkeypatch, capsys
):
    run_dir = finished_run(script)
    if kind == "an unfinished":
        (tmp_path / "progress.csv").write_bytes((run_dir / "progress.csv").read_bytes())
        run_dir = tmp_path
    before, flags = files(run_dir), f"{TINY[script.__name__]} --run-dir {run_dir}"
    assert_refused(script, monkeypatch, tmp_path, capsys, flags, "already holds a run")
    assert before == files(run_dir)


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "pickle"])
def test_evaluating_a_damaged_checkpoint_says_so(
    damage, script, finished_run, tmp_path, monkeypatch, capsys
):
    data = (finished_run(script) / "checkpoint.pt").read_bytes()
    harmful = b"cos\nsystem\n(S'touch " + str(tmp_path / "hacked").encode() + b"'\ntR."
    damaged = {
        "truncated": data[: len(data) // 2],
        "empty": b"",
        "garbage": b"not a checkpoint",
        "pickle": harmful,
    }
    (tmp_path / "args.json").write_bytes((finished_run(script) / "args.json").read_bytes())
    (tmp_path / "checkpoint.pt").write_bytes(damaged[damage])
    assert_refused(
        script,
        monkeypatch,
        tmp_path,
        capsys,
        f"--evaluate {tmp_path}",
        "is not a run that can be loaded",
    )
    assert not (tmp_path / "hacked").exists()


# ---- a run that is watched -----------------------------------------------------------------------


@pytest.fixture
def watched_run(script, shared) -> Path:
    """The finished run once more, with everything that only watches it, in another process with
    another hash seed."""

    def make(run_dir: Path) -> None:
        tracker = run_dir.with_suffix(".wandb")
        tracker.mkdir(exist_ok=True)
        (tracker / "wandb.py").write_text("def init(**options): print('tracked', options['name'])")
        flags = f"{TINY[script.__name__]} --run-dir {run_dir} --capture-video"
        flags += " --checkpoint-interval 1 --track --profile"
        if script is ppo_plr_procgen:
            flags += " --eval-interval 2 --eval-episodes 1 --env-threads 3"
        else:
            flags += " --eval-interval 5 --eval-episodes 2"
        path = os.pathsep.join(map(str, (tracker, ROOT, Path(__file__).parent)))
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "4", "PYTHONPATH": path}
        code = f"import support, {script.__name__} as s\nsupport.shorten_evaluation(s)\ns.main()"
        command = [sys.executable, "-c", code, *flags.split()]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=HUNG)
        assert done.returncode == 0, done.stderr
        (run_dir / "stdout").write_text(done.stdout)

    return made_once(shared / f"watched_{script.__name__}", make)


def test_the_same_seed_is_the_same_run_whatever_watches_it_and_whatever_threads_and_hash_seed(
    script, finished_run, watched_run
):
    assert result_of(watched_run)["fingerprint"] == result_of(finished_run(script))["fingerprint"]
    assert_same_rows(finished_run(script) / "progress.csv", watched_run / "progress.csv")


def test_tracking_names_the_run(watched_run):
    assert f"tracked {watched_run.name}" in (watched_run / "stdout").read_text()


def test_each_evaluation_has_its_videos(script, watched_run):
    evaluations, videos = (
        rows(watched_run / "evaluations.csv"),
        sorted((watched_run / "videos").rglob("*.gif")),
    )
    procgen = script is ppo_plr_procgen
    per_evaluation, size, milliseconds = (1, (256, 256), 130) if procgen else (13, (360, 360), 100)
    assert len(evaluations) == 2 and len(videos) == 2 * per_evaluation
    last = next(x for x in videos[::-1] if procgen or x.stem == "SmallCorridor")
    with Image.open(last) as video:
        assert video.size == size
        frames, duration = [], 0
        for i in range(video.n_frames):
            video.seek(i)
            frames.append(np.asarray(video.convert("RGB")))
            duration += video.info["duration"]
    # equal frames in a row are one frame that lasts
    assert duration > 5 * milliseconds and (procgen or duration == 11 * milliseconds)
    assert not np.array_equal(frames[0], frames[-1])


PHASES = {"environment", "inference", "transfer", "sampler", "update", "rest"}


def test_a_profile_is_the_seconds_and_shares_of_all_phases(watched_run):
    parts = re.findall(r"(\w+) ([\d.e-]+) s \(([\d.]+)%\)", (watched_run / "stdout").read_text())
    assert {name for name, *_ in parts} == PHASES
    total, progress = sum(float(x) for _, x, _ in parts), rows(watched_run / "progress.csv")
    # of neither the first iteration nor the last
    assert 0 < total < progress[-1]["wall_seconds"] - progress[0]["wall_seconds"]
    assert all(abs(float(share) - 100 * float(x) / total) < 0.06 for _, x, share in parts)


def test_a_trace_has_the_phases_of_the_last_iteration(script, watched_run):
    with gzip.open(watched_run / "trace_0.json.gz") as file:
        names = [
            x["name"] for x in json.load(file)["traceEvents"] if x.get("cat") == "user_annotation"
        ]
    assert PHASES <= set(names) and names.count("update") == 1  # one iteration
    assert (
        names.count("inference") == json.loads((watched_run / "args.json").read_text())["num_steps"]
    )


# ---- small parts ---------------------------------------------------------------------------------

YES, NO = True, False


def test_running_sums_go_on_from_one_rollout_to_the_next(script):
    x = np.array([[1, 10], [2, 20], [3, 30]], np.float32)
    ended = np.array([[NO, YES], [YES, NO], [NO, NO]])
    sums, goes_on = script.running_sums(np.array([100.0, 5.0]), x, ended)
    assert sums.tolist() == [[101, 15], [103, 20], [3, 50]] and goes_on.tolist() == [3, 50]
    sums, goes_on = script.running_sums(goes_on, x[:1], np.array([[YES, NO]]))
    assert sums.tolist() == [[4, 60]] and goes_on.tolist() == [0, 60] and sums.dtype == np.float64
    sums, goes_on = script.running_sums(np.array([8.0, 4.0]), x, ended, decay=0.5)
    assert sums.tolist() == [[5, 12], [4.5, 20], [3, 40]] and goes_on.tolist() == [3, 40]


def parameters(values) -> torch.nn.Module:
    agent = torch.nn.Linear(2, 1)
    agent.weight.data[:] = torch.tensor(values)
    return agent


def test_an_optimizer_takes_the_moments_of_a_checkpoint_and_keeps_its_own_options(script):
    def step(agent, optimizer):
        optimizer.zero_grad()
        agent(torch.tensor([[1.0, -2.0]])).sum().backward()
        optimizer.step()

    cpu = torch.device("cpu")
    first = parameters([0.5, 0.25])
    before = script.make_optimizer(first, script.Args(learning_rate=0.3), cpu)
    for _ in range(3):
        step(first, before)
    state = copy.deepcopy(before.state_dict())
    for group in state["param_groups"]:  # of a GPU, and of other times
        group |= {"lr": torch.tensor(0.3), "capturable": True, "fused": None, "eps": 0.1}
        group |= {"betas": (0.1, 0.1), "weight_decay": 7.0}
    second = parameters(first.weight.tolist()[0])
    second.bias.data.copy_(first.bias)
    after = script.make_optimizer(second, script.Args(learning_rate=0.01), cpu)
    options = {k: x for k, x in after.param_groups[0].items() if k != "params"}
    rate = after.param_groups[0]["lr"]
    after.load_state_dict(state)
    assert {k: x for k, x in after.param_groups[0].items() if k != "params"} == options
    assert after.param_groups[0]["params"] == list(second.parameters())
    assert float(rate) == 0.01 and after.param_groups[0]["capturable"] is False
    for old, new in zip(before.state.values(), after.state.values(), strict=True):
        assert old.keys() == new.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(old[key], new[key]) for key in old) and new["step"] == 3
    # and goes on like the first one at the new rate
    before.param_groups[0]["lr"].fill_(0.01)
    after.param_groups[0]["lr"].fill_(0.01)
    step(first, before)
    step(second, after)
    assert torch.equal(first.weight, second.weight) and torch.equal(first.bias, second.bias)


def test_a_cuda_graph_is_two_plain_calls_a_record_and_replays_for_each_constant(
    script, monkeypatch
):
    """Without a GPU: what would run on it is counted. test_gpu.py has the real one."""
    log = []

    class Recorded:  # what a CUDAGraph does: the same again, on its fixed inputs
        def __init__(self, replay):
            self.replay = replay

    def aside(self, inputs, constants):
        log.append(("plain", *constants.values()))
        return self.function(*inputs, **constants)

    def record(self, inputs, constants):
        log.append(("record", *constants.values()))
        fixed = [x.clone() for x in inputs]
        outputs = torch.zeros(2)

        def replay():
            log.append(("replay", *constants.values()))
            outputs.copy_(self.function(*fixed, **constants))

        return Recorded(replay), fixed, outputs

    monkeypatch.setattr(script.CudaGraph, "_run_aside", aside)
    monkeypatch.setattr(script.CudaGraph, "_record", record)

    def multiply(x, *, by):
        return x * by

    graph = script.CudaGraph(multiply, enabled=True)
    for i, by in enumerate((2, 2, 3, 2, 2, 3, 3, 2)):
        x = torch.tensor([1.0, i])
        assert torch.equal(graph(x, by=by), x * by)
        assert x.tolist() == [1, i]
    expected = [("plain", 2), ("plain", 2), ("plain", 3), ("record", 2), ("replay", 2)]
    expected += [("replay", 2), ("plain", 3), ("record", 3), ("replay", 3), ("replay", 2)]
    assert log == expected
    del log[:]
    plain = script.CudaGraph(multiply, enabled=False)
    assert [float(plain(torch.tensor(4.0), by=k)) for k in range(5)] == [0, 4, 8, 12, 16]
    assert not log and not plain.calls


# ---- bad input -----------------------------------------------------------------------------------


class Moody(MiniGridEnv):
    """Its seed does not decide its level."""

    def __init__(self, **kwargs):
        super().__init__(MissionSpace(lambda: ""), grid_size=9, max_steps=50, **kwargs)

    def _gen_grid(self, width, height):
        self.grid = Grid(width, height)
        self.agent_pos, self.agent_dir, self.mission = tuple(np.random.randint(1, 8, 2)), 0, ""


class Growing(Moody):
    """Its time limit depends on the level."""

    def _gen_grid(self, width, height):
        super()._gen_grid(width, height)
        self.agent_pos = (int(self.np_random.integers(1, 8)), 1)
        self.max_steps = 300 if self.np_random.random() < 0.5 else 50


def broken():
    raise AssertionError


BAD = {
    None: {  # refused by both
        "--num-envs 0": "--num-envs 0 must be at least 1",
        "--seed -1": "--seed -1 must be at least 0",
        "--seed 99999999999999999999": "must be at least 0 and below 2**63",
        "--alpha 0": "--alpha 0.0 must be above 0 and at most 1",
        "--run-dir=": "--run-dir  must be a directory",
        "--resume=": "--resume  must be a directory",
        "--evaluate=": "--evaluate  must be a directory",
        "--run-dir /dev/null/run": "--run-dir /dev/null/run cannot be written: Not a directory",
        "--evaluate /nonexistent": "--evaluate /nonexistent is not a run that can be loaded",
        "--track": "--track needs Weights and Biases",
        "--num-envs many": "--num-envs",
        "--no-such-flag": "--no-such-flag",
    },
    ppo_plr_procgen: {
        "--env-id bigfsh": "--env-id bigfsh must be one of bigfish, bossfight,",
        "--env-id bigfish --distribution-mode memory": "--distribution-mode memory does not exist "
        "for bigfish",
        "--num-steps -3": "--num-steps -3 must be at least 1",
        "--num-minibatches 7": "--num-minibatches 7 must be a divisor of --num-envs x --num-steps "
        "= 16384",
        "--num-minibatches 16384": "must be a divisor of --num-envs x --num-steps = 16384 and "
        "less than that",
        "--update-epochs 0": "--update-epochs 0 must be at least 1",
        "--eval-episodes 0": "--eval-episodes 0 must be at least 1",
        "--total-timesteps 16383": "--total-timesteps 16383 must be at least 16384: --num-envs x "
        "--num-steps",
        "--profile --total-timesteps 40000": "--total-timesteps 40000 must be at least 49152: "
        "--num-envs x --num-steps",
        "--learning-rate nan": "--learning-rate nan must be above 0",
        "--gamma 1.5": "--gamma 1.5 must be between 0 and 1",
        "--temperature 0": "--temperature 0.0 must be above 0",
        "--target-kl -1": "--target-kl -1.0 must be above 0",
        "--ent-coef -1": "--ent-coef -1.0 must be at least 0",
        "--checkpoint-interval -1": "--checkpoint-interval -1 must be at least 0",
        "--vf-coef inf": "--vf-coef inf must be at least 0 and below 2**63",
        "--num-levels 0": "--curriculum plr must be uniform or sequential with --num-levels 0",
        "--num-levels 0 --curriculum uniform --start-level 5": "--start-level 5 must be 0 with "
        "--num-levels 0",
        "--start-level 1073741824": "--start-level 1073741824 must be at most 1073741624",
        "--score gae --score-transform power": "power must be another: --score gae can be negative",
        "--score max_mc --score-transform power": "power must be another: --score max_mc can be "
        "negative",
        "--score nonsense": "--score",
        "--curriculum uniform --score gae --score-transform power": "power must be another: "
        "--score gae can be negative",
        "--num-levels 0 --curriculum uniform --temperature 0.5": "--temperature 0.5 does nothing "
        "without a fixed set, --num-levels above 0",
        "--num-levels 0 --curriculum sequential --score gae": "--score gae does nothing without",
    },
    ppo_robust_plr_minigrid: {
        "--env-id mase": "--env-id mase must be maze or a registered MiniGrid environment: "
        "Environment `mase` doesn",
        "--env-id MiniGrid-MultiRom-N4-S5-v0": "Did you mean: `MiniGrid-MultiRoom-N4-S5`",
        "--env-id CartPole-v1": "CartPole-v1 must be maze or a registered MiniGrid environment: "
        "it is a CartPoleEnv",
        "--env-id Moody-v0": "two resets with one seed, which must decide the level, differ",
        "--num-walls 168": "--num-walls 168 must be at most 167, the cells of --maze-size 15 but "
        "two",
        "--maze-size 4": "--maze-size 4 must be between 5 and 255",
        "--num-minibatches 5": "--num-minibatches 5 must be a divisor of --num-envs 32",
        "--buffer-size 31": "--buffer-size 31 must be at least --num-envs 32",
        "--num-steps 249": "--num-steps 249 must be at least 250, the time limit: an episode that "
        "is cut off",
        "--num-steps 249 --bootstrap-timeouts": "must be at least 250, the time limit: max_mc "
        "needs whole",
        "--env-id MiniGrid-LavaCrossingS9N1-v0": "--num-steps 256 must be at least 324, the time "
        "limit",
        "--curriculum dr --total-timesteps 8191": "--total-timesteps 8191 must be at least 8192: "
        "--num-envs x",
        "--curriculum dr --profile --total-timesteps 20000": "must be at least 24576: --num-envs "
        "x --num-steps",
        "--total-timesteps 500000": "must be at least 524288: robust_plr learns nothing before "
        "the buffer holds --rho",
        "--rho 0 --total-timesteps 16383": "must be at least 16384: robust_plr learns nothing "
        "before the buffer holds --rho x --buffer-size = 1 levels",
        "--replay-prob 0": "--replay-prob 0.0 must be above 0: robust_plr learns from replayed "
        "levels only",
        "--curriculum accel --replay-prob 0": "--replay-prob 0.0 must be above 0: accel learns "
        "from replayed levels only",
        "--curriculum accel --total-timesteps 500000": "must be at least 524288: accel learns "
        "nothing before the buffer holds --rho",
        "--curriculum accel --env-id MiniGrid-Empty-Random-6x6-v0": "--env-id "
        "MiniGrid-Empty-Random-6x6-v0 must be maze: --curriculum accel edits no other levels",
        "--curriculum accel --num-edits 0": "--num-edits 0 must be between 1 and 1000",
        "--curriculum accel --accel-base easy": "--accel-base",
        "--env-id Broken-v0": "--env-id Broken-v0 must be maze or a registered MiniGrid "
        "environment: AssertionError()",
        "--env-id Growing-v0": "--num-steps 256 must be at least 300, the time limit",
        "--replay-prob 1.5": "--replay-prob 1.5 must be between 0 and 1",
        "--nu 2": "--nu 2.0 must be between 0 and 1",
        "--learning-rate 0": "--learning-rate 0.0 must be above 0",
        "--max-steps 0": "--max-steps 0 must be at least 1",
        "--score-transform power": "--score-transform power must be another: --score max_mc can "
        "be negative",
        "--score regret --env-id MiniGrid-MultiRoom-N4-S5-v0": "--score regret must be another: "
        "regret needs the best possible return, which is known of --env-id maze only",
        "--score regret --redraw-direction": "--redraw-direction True must be left out: "
        "--score regret knows the best possible return from one direction only.",
        "--score mna --gate-unsolved": "--gate-unsolved True must be left out: --score mna has "
        "that gate",
        "--score learnability --gate-unsolved": "--gate-unsolved True must be left out: --score "
        "learnability has that gate",
        "--env-id MiniGrid-LavaGapS5-v0 --num-steps 104 --compile": "--compile True does nothing "
        "without --env-id maze",
        "--num-steps 249 --bootstrap-timeouts --score regret": "the time limit: regret needs whole",
        "--curriculum uniform": "--curriculum",
    },
}


@pytest.mark.parametrize("flags", BAD[None])
def test_bad_input_is_refused_by_both(flags, script, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)
    assert_refused(script, monkeypatch, tmp_path, capsys, flags, BAD[None][flags])


@pytest.mark.parametrize(
    "script, flags", [(script, flags) for script in SCRIPTS for flags in BAD[script]]
)
def test_bad_input_is_refused(script, flags, monkeypatch, tmp_path, capsys):
    for name, maker in (("Moody-v0", Moody), ("Growing-v0", Growing), ("Broken-v0", broken)):
        monkeypatch.setitem(
            gym.registry, name, gym.envs.registration.EnvSpec(name, entry_point=maker)
        )
    assert_refused(script, monkeypatch, tmp_path, capsys, flags, BAD[script][flags])


@pytest.mark.slow
def test_bad_input_shows_no_traceback():
    done = run(ppo_robust_plr_minigrid, "--env-id CartPole-v1")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    expected = "error: --env-id CartPole-v1 must be maze or a registered MiniGrid environment: it"
    assert done.stderr.startswith(expected)


# ---- the same text -------------------------------------------------------------------------------


def machinery(script) -> str:
    """What follows the banner of a script, to its end."""
    _, text = re.split(
        "^# ---- machinery: the same text in both scripts.*$",
        Path(script.__file__).read_text(),
        flags=re.MULTILINE,
    )
    return text


def test_the_machinery_is_the_same_text_in_both_scripts():
    texts = [machinery(script).splitlines(keepends=True) for script in SCRIPTS]
    assert len(texts[0]) > 50
    assert "".join(difflib.unified_diff(*texts, *(script.__name__ for script in SCRIPTS))) == ""
