import functools
import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before PyTorch is imported: each core has a test process already


def pytest_addoption(parser):
    parser.addoption("--env-id", help="test_levels.py: a Gymnasium environment, module:Id, or a Procgen game")
    devices = ("cpu", "cuda", "cpu-check")
    what = "test_gpu.py: cuda, or cpu-check for its checks without a GPU; cpu skips them"
    parser.addoption("--device", choices=devices, default="cpu", help=what)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """finished_run(script): the directory of a tiny finished run, made once; tests leave it as it was."""
    from support import TINY, train  # here, as tests/integrations/ runs without what the scripts need

    @functools.cache
    def finished_run(script) -> Path:
        run_dir = tmp_path_factory.mktemp("finished") / "run"
        result = train(script, TINY[script.__name__], run_dir)
        (run_dir / "stdout").write_text(result["stdout"])
        (run_dir / "stderr").write_text(result["stderr"])
        return run_dir

    return finished_run
