"""Steps per second of the training scripts, as they are; another checkout or the peers beside them.

    python benchmarks/throughput.py                                       # all settings
    python benchmarks/throughput.py --settings procgen-bf16 mazes --rounds 3 --out DIR
    python benchmarks/throughput.py --settings mazes --against ../before  # A/B, in turns
    python benchmarks/throughput.py --cleanrl PATH/ppo_procgen.py
    python benchmarks/throughput.py --jaxued PATH --jaxued-python PATH/bin/python   # see peers.py
    python benchmarks/throughput.py --gpu --cleanrl PATH/ppo_procgen.py   # minutes on a GPU

A process for each run. They take turns (A B A B ...), so that what else the machine does meets all.
A run's speed is the median of SPS in its progress.csv after the first two iterations; of mazes that
of one iteration on new levels and one on replayed ones, which come equally often.

With --gpu all runs but CleanRL's are in this process, one after another, as starting takes longer
there than measuring, and three iterations are left out: CUDA graphs are recorded in these. Then
--several processes share the GPU.
"""

import contextlib
import gc
import importlib
import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import isnan, nan
from pathlib import Path
from statistics import harmonic_mean, median
from typing import Any, NamedTuple
from unittest import mock

import torch
import tyro
from common import ROOT, SCRIPTS, commit_and_machine, markdown, read_csv, refuse, write_csv
from job import last_words
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
BF16 = "--precision bf16"
COMPILED = f"{BF16} --compile"
PLAIN = "--no-cuda-graphs"
# replay begins with the third iteration: 64 levels
GPU_MAZES = "--rho 0.016 --buffer-size 4000 --replay-schedule fixed"
# and with the second
GPU_MANY = "--rho 0.5 --buffer-size 4000 --num-minibatches 2"
FEW_MAZES = "mazes 32 x 256 (paper)"
MANY_MAZES = "mazes 2,048 x 256"
ALL_PROCGEN = "Procgen 64 x 256 (paper)"
# (what, how), in their order: what a limit of time cuts off comes last
GPU_SETTINGS = {
    (FEW_MAZES, "fp32"): Setting("mazes", 32, GPU_MAZES, 40),
    (FEW_MAZES, "bf16"): Setting("mazes", 32, f"{GPU_MAZES} {BF16}", 40),
    (FEW_MAZES, "bf16 + compile"): Setting("mazes", 32, f"{GPU_MAZES} {COMPILED}", 40),
    (ALL_PROCGEN, "fp32"): Setting("procgen", 64, PROCGEN, 8),
    (ALL_PROCGEN, "bf16"): Setting("procgen", 64, f"{PROCGEN} {BF16}", 10),
    (ALL_PROCGEN, "bf16 + compile"): Setting("procgen", 64, f"{PROCGEN} {COMPILED}", 12),
    (MANY_MAZES, "bf16 + compile"): Setting("mazes", 2048, f"{GPU_MANY} {COMPILED}", 18),
    (FEW_MAZES, "fp32, no graphs"): Setting("mazes", 32, f"{GPU_MAZES} {PLAIN}", 20),
    (FEW_MAZES, "bf16, no graphs"): Setting("mazes", 32, f"{GPU_MAZES} {BF16} {PLAIN}", 20),
    (ALL_PROCGEN, "fp32, no graphs"): Setting("procgen", 64, f"{PROCGEN} {PLAIN}", 6),
    (ALL_PROCGEN, "bf16, no graphs"): Setting("procgen", 64, f"{PROCGEN} {BF16} {PLAIN}", 6),
}
SHARED = (FEW_MAZES, "bf16 + compile"), (ALL_PROCGEN, "bf16 + compile")  # of --several
SHARED_SECONDS = 6.0  # measured, once all of them train
SHARED_START = 60.0  # seconds after which all of them must
UNMEASURED = 3  # iterations of a run on a GPU
STUBS = {  # of an evaluation: not measured, but seconds long
    "procgen": {"train_return": 0.0, "test_return": 0.0, "episodes": {}},
    "mazes": {"solved_mean": 0.0, "episodes": {}},
}
NUM_STEPS = 256  # of each environment per iteration
PEERS = {"procgen": "CleanRL", "mazes": "jaxued"}


@dataclass
class Args:
    settings: tuple[str, ...] = ()  # which of SETTINGS, or "what, how" of GPU_SETTINGS (all)
    against: Path | None = None  # another checkout: its scripts run the same settings
    cleanrl: Path | None = None  # CleanRL's ppo_procgen.py, beside ours on Procgen
    jaxued: Path | None = None  # a checkout of github.com/DramaCow/jaxued, beside ours on mazes
    jaxued_python: str = sys.executable  # interpreter with jaxued's requirements
    rounds: int = 2  # times that each of them runs
    limit: float = 1200.0  # seconds for one run
    out: Path | None = None  # folder for throughput.md and .csv (--gpu: results/throughput_gpu)
    gpu: bool = False  # GPU_SETTINGS instead, in this process
    several: int = (
        4  # with --gpu: processes that share the GPU, of mazes, then of Procgen (0: none)
    )
    commit: str | None = None  # with --gpu: what is measured, where git cannot say


def argv(setting: Setting, run_dir: Path) -> list[str]:
    """The flags of one run."""
    steps = setting.iterations * setting.num_envs * NUM_STEPS
    line = f"--num-envs {setting.num_envs} --num-steps {NUM_STEPS} --total-timesteps {steps}"
    line += f" --eval-interval 0 --eval-episodes 1 --checkpoint-interval 0 {setting.flags}"
    return [*line.split(), "--run-dir", str(run_dir)]


def by_kind(rows: list[dict[str, str]]) -> dict[str, list[float]]:
    """SPS of iterations on new levels ("0"), of those on replayed ones ("1"); Procgen's: ""."""
    kinds: dict[str, list[float]] = {}
    for row in rows:
        kinds.setdefault(row.get("replay", ""), []).append(float(row["SPS"]))
    return kinds


def speed_of(run_dir: Path) -> float:
    """Steps/s of a run that has ended."""
    return speed_of_rows(read_csv(run_dir / "progress.csv")[2:])


def speed_of_rows(rows: list[dict[str, str]]) -> float:
    if not rows:
        raise RuntimeError("it has fewer than three iterations")
    return harmonic_mean([median(speeds) for speeds in by_kind(rows).values()])


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


# ---- on a GPU, in this process -------------------------------------------------------------------


def train_here(script_name: str, flags: list[str]) -> None:
    """The script's main() without its evaluation. What ends it early is raised as an error."""
    script = importlib.import_module(SCRIPTS[script_name])
    patches = [mock.patch.object(script, "evaluate", lambda *_: STUBS[script_name])]
    patches.append(mock.patch.object(sys, "argv", [f"{script.__name__}.py", *flags]))
    if script_name == "mazes":
        patches.append(mock.patch.object(script, "level_pictures", lambda *_: {}))
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    handlers = {number: signal.getsignal(number) for number in numbers}
    said = io.StringIO()
    gc.collect()  # graphs and storage of the last run
    torch.use_deterministic_algorithms(False)  # what one that failed may have left
    try:
        with contextlib.ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch)
            stack.enter_context(contextlib.redirect_stdout(said))
            stack.enter_context(contextlib.redirect_stderr(said))
            script.main()
    except SystemExit as stopped:
        raise RuntimeError(last_words(said.getvalue())) from stopped
    finally:
        # the script's own ones hold its tensors
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if "--compile" in flags:  # not before: the script sets what compiling reads at its import
            torch.compiler.reset()


def measure_here(setting: Setting) -> dict[str, Any]:
    """A row of the table, but for its name."""
    on_gpu = torch.cuda.is_available()
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        try:
            train_here(setting.script, argv(setting, run_dir))
        except RuntimeError:
            for path in run_dir.glob("error_*.txt"):
                print(path.read_text(), file=sys.stderr, flush=True)
            raise
        rows = read_csv(run_dir / "progress.csv")[UNMEASURED:]
    kinds = by_kind(rows)
    return {
        "steps_per_second": speed_of_rows(rows),
        "on_new_levels": median(kinds.get("0", [nan])),
        "on_replayed_levels": median(kinds.get("1", [nan])),
        "iterations": "+".join(str(len(kinds[kind])) for kind in sorted(kinds)),
        "peak_mb": torch.cuda.max_memory_allocated() / 2**20 if on_gpu else nan,
        "seconds": time.perf_counter() - began,
    }


def share(setting: Setting, count: int, seconds: float, limit: float) -> list[float]:
    """Steps/s of each of `count` processes, during `seconds` in which all of them train."""
    cores = max(1, (os.cpu_count() or 1) // count)
    code = "import sys, throughput; throughput.train_here(sys.argv[1], sys.argv[2:])"
    long = setting._replace(iterations=1000)  # until it is ended below
    paths = os.pathsep.join((str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")))
    env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": str(cores)}
    folder = Path(tempfile.mkdtemp())
    files = [folder / str(i) / "progress.csv" for i in range(count)]
    processes = []
    for file in files:
        flags = argv(long, file.parent)
        if setting.script == "procgen":
            flags += ["--env-threads", str(cores)]
        command = [sys.executable, "-c", code, setting.script, *flags]
        with open(folder / f"{file.parent.name}.log", "wb") as log:
            # a group each, so that what compiles for it ends with it
            pipes = {"stdout": log, "stderr": subprocess.STDOUT, "process_group": 0}
            processes.append(subprocess.Popen(command, env=env, **pipes))
    try:
        deadline = time.perf_counter() + limit
        while min(len(read_csv(file)) for file in files) <= UNMEASURED:
            for i, process in enumerate(processes):
                if process.poll() is not None:
                    raise RuntimeError(last_words((folder / f"{i}.log").read_text()))
            if time.perf_counter() > deadline:
                raise RuntimeError(f"not all of them train after {limit:.0f} s")
            time.sleep(0.1)
        before = [len(read_csv(file)) for file in files]
        time.sleep(seconds)
        rows = [read_csv(file)[n:] for file, n in zip(files, before)]
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in processes:
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)
    return [speed_of_rows(of_one) for of_one in rows]


def share_row(key: tuple[str, str], args: Args) -> dict[str, Any]:
    """As `measure_here`, of --several processes together."""
    began = time.perf_counter()
    speeds = share(GPU_SETTINGS[key], args.several, SHARED_SECONDS, min(args.limit, SHARED_START))
    return {"steps_per_second": sum(speeds), "seconds": time.perf_counter() - began}


def cleanrl_row(args: Args) -> dict[str, Any]:
    began = time.perf_counter()
    speed = cleanrl(args.cleanrl, NUM_STEPS, args.limit)
    return {"steps_per_second": speed, "seconds": time.perf_counter() - began}


def gpu_contenders(args: Args) -> dict[tuple[str, str], Callable[[], dict[str, Any]]]:
    """(what, how) -> one measurement."""
    found: dict[tuple[str, str], Callable[[], dict[str, Any]]] = {}
    for key, setting in GPU_SETTINGS.items():
        if not args.settings or ", ".join(key) in args.settings:
            found[key] = partial(measure_here, setting)
    for key in SHARED:
        if args.several and key in found:
            what, how = key
            found[what, f"{how}, {args.several} processes"] = partial(share_row, key, args)
    if args.cleanrl:
        found[ALL_PROCGEN, "CleanRL"] = partial(cleanrl_row, args)
    return found


def gpu_ratio(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """To the run it is compared with: the same without graphs, one process, CleanRL to ours."""
    what, how = row["what"], row["how"]
    speeds = {(x["what"], x["how"]): x["steps_per_second"] for x in rows}
    alone = how.rpartition(", ")[0]
    found = []
    for name, other in (
        ("without graphs", f"{how}, no graphs"),
        ("one process", alone if how.endswith("processes") else ""),
        ("CleanRL", "CleanRL" if how != "CleanRL" else ""),
    ):
        if (what, other) in speeds:
            ratio = row["steps_per_second"] / speeds[what, other]
            found.append(f"{ratio:.2f} x {name}")
    return ", ".join(found)


def rounded(x: Any) -> str:
    if isinstance(x, str):
        return x
    return "" if isnan(x) else f"{x:,.0f}"


def gpu_report(args: Args, rows: list[dict[str, Any]], notes: list[str]) -> str:
    """The table of --gpu, and what was measured where."""
    lines = [["", "", "steps/s", "new levels", "replayed", "MB", "iterations", "s", "ratio"]]
    columns = ("steps_per_second", "on_new_levels", "on_replayed_levels", "peak_mb")
    for row in rows:
        line = [row["what"], row["how"]]
        line += [rounded(row[name]) for name in (*columns, "iterations", "seconds")]
        lines.append([*line, gpu_ratio(row, rows)])
    where = commit_and_machine(ROOT / "ppo_plr_procgen.py")
    if args.commit:
        where = f"commit {args.commit} on {where.partition(' on ')[2]}"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    text = f"{markdown(lines, left=2)}\n{where}; {gpu}, PyTorch {torch.__version__}. {NUM_STEPS} "
    text += f"steps per iteration; medians after {UNMEASURED} iterations. Mazes: half of the "
    text += "iterations on new levels, half on replayed ones; iterations: new + replayed. MB: the "
    text += "most that PyTorch had allocated. Several processes: the sum of their steps/s.\n"
    for (what, how), setting in GPU_SETTINGS.items():
        if any((what, how) == (row["what"], row["how"]) for row in rows):
            text += f"- {what}, {how}: `{setting.flags}`\n"
    return text + "".join(f"- {note}\n" for note in notes)


def measure_gpu(args: Args) -> None:
    """Prints and writes each row as soon as it is there: a limit of time loses no more than one."""
    out = args.out or ROOT / "benchmarks" / "results" / "throughput_gpu"
    blank = {"on_new_levels": nan, "on_replayed_levels": nan, "iterations": "", "peak_mb": nan}
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    began = time.perf_counter()
    for (what, how), measured in gpu_contenders(args).items():
        row = {"what": what, "how": how, "steps_per_second": nan} | blank | {"seconds": nan}
        try:
            row |= measured()
        except Exception as error:  # of CUDA, of a compiler: the others are still measured
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            notes.append(f"{what}, {how} failed: {reason}")
            print(notes[-1], flush=True)
            traceback.print_exc(limit=-3)
        rows.append(row)
        shown = [f"{rounded(row['steps_per_second'])} steps/s"]
        if not isnan(row["on_new_levels"]):
            shown.append(f"new {rounded(row['on_new_levels'])}")
            shown.append(f"replayed {rounded(row['on_replayed_levels'])}")
        shown.append(f"{row['seconds']:.1f} s")
        so_far = time.perf_counter() - began
        print(f"{so_far:5.0f} s: {what}, {how}: {', '.join(shown)}", flush=True)
        write_csv(out / "throughput.csv", rows)
        (out / "throughput.md").write_text(gpu_report(args, rows, notes))
    print(gpu_report(args, rows, notes))


def main() -> None:
    args = tyro.cli(Args)
    if args.gpu:
        for name in args.settings:
            if name not in [", ".join(key) for key in GPU_SETTINGS]:
                refuse(f"--settings {name} must be one of GPU_SETTINGS.")
        measure_gpu(args)
        return
    args.settings = args.settings or tuple(SETTINGS)
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
