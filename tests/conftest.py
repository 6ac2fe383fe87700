import functools
import importlib
import os
import re
from pathlib import Path

import pytest

# before PyTorch is imported: each core has a test process already
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser):
    parser.addoption(
        "--env-id", help="test_levels.py: a Gymnasium environment, module:Id, or a Procgen game"
    )
    devices = ("cpu", "cuda", "cpu-check")
    what = "test_gpu.py: cuda, or cpu-check for its checks without a GPU; cpu skips them"
    parser.addoption("--device", choices=devices, default="cpu", help=what)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """A process more than cores: many tests wait for a process of their own."""
    return len(os.sched_getaffinity(0)) + 1


def pytest_collection_modifyitems(items):
    """Slow are whole runs of Procgen in processes of their own, what needs a process forked for it,
    and the loops of others."""
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        script = params.get("script", getattr(item.module, "script", None))
        procgen = getattr(script, "__name__", script) == "ppo_plr_procgen"
        names = {*item.fixturenames, *item.function.__code__.co_names}
        forked = names & {"brief_run", "watched_run", "Process"}
        started = procgen and names & {"finished_run", "run"}
        if forked or started or "integrations" in item.path.parts:
            item.add_marker("slow")


@pytest.fixture(params=["ppo_plr_procgen", "ppo_robust_plr_minigrid"])
def script(request):
    """Each of the two scripts, as a module."""
    return importlib.import_module(request.param)


@pytest.fixture
def brief(monkeypatch):
    """The evaluations of this test's runs in this process are short, as those of `support.Process`
    are."""
    # here, as tests/integrations/ runs without what the scripts need
    from support import SCRIPTS, shorten_evaluation

    for script in SCRIPTS:
        shorten_evaluation(script, monkeypatch.setattr)


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
    """One directory of all test processes."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def finished_run(shared):
    """finished_run(script): the directory of a tiny run as a user makes it, made once; tests leave
    it as it was."""
    from support import TINY, made_once, train

    @functools.cache
    def finished_run(script) -> Path:
        name = script.__name__
        return made_once(
            shared / f"finished_{name}", lambda run_dir: train(script, TINY[name], run_dir)
        )

    return finished_run


@pytest.fixture(scope="session")
def brief_run(shared):
    """brief_run(script, flags): the same with more flags and a brief evaluation, in a process
    forked for it."""
    from support import Process, made_once, tiny

    @functools.cache
    def brief_run(script, flags: str = "") -> Path:
        def make(run_dir: Path) -> None:
            command = f"{tiny(script, flags)} --run-dir {run_dir}"
            done = Process(script, command, run_dir).wait()
            assert done.returncode == 0, done.stderr

        return made_once(shared / re.sub(r"\W+", "_", f"brief_{script.__name__}_{flags}"), make)

    return brief_run
