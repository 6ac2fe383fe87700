import functools
from pathlib import Path

import pytest
from support import TINY, train


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """finished_run(script): the directory of a tiny finished run, made once; tests leave it as it was."""

    @functools.cache
    def finished_run(script) -> Path:
        run_dir = tmp_path_factory.mktemp("finished") / "run"
        result = train(script, TINY[script.__name__], run_dir)
        (run_dir / "stdout").write_text(result["stdout"])
        (run_dir / "stderr").write_text(result["stderr"])
        return run_dir

    return finished_run
