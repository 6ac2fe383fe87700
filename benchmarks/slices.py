"""A run as one file of at most 16 MB, to go on with it later or elsewhere: --pack and --unpack.

It is a zip of RUN/checkpoint.pt, the json and csv files and job.log. What only people look at
(TensorBoard's events, videos, traces) stays behind.
"""

import re
import shlex
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

from common import read_text, refuse
from job import is_running

MAX_BYTES = 16 * 10**6
PACKED = re.compile(r"checkpoint\.pt|job\.log|[\w-]+\.(json|csv)")  # names of a run's files


def steps_in(progress: str) -> int:
    """global_step, the first column, of a progress.csv's last whole row."""
    rows = progress[: progress.rfind("\n") + 1].splitlines()[1:]
    return int(rows[-1].split(",")[0]) if rows else 0


# ---- a pack --------------------------------------------------------------------------------------


def pack_path(folder: Path, run_dir: Path) -> Path:
    """Without the = and , of a run's name, which not every service takes."""
    return folder / f"{re.sub('[^A-Za-z0-9.-]+', '_', run_dir.name)}.zip"


def write_pack(path: Path, run_dir: Path) -> int:
    """Returns its bytes. The run may go on meanwhile: rows after its checkpoint are made again, so
    the csv files are read after that, and result.json only if it was there before."""
    names = [x.name for x in run_dir.iterdir() if PACKED.fullmatch(x.name)]
    names.sort(key=lambda name: name != "checkpoint.pt")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name in names:
            file.writestr(f"{run_dir.name}/{name}", (run_dir / name).read_bytes())
    return path.stat().st_size


def read_pack(path: Path) -> tuple[str, dict[str, bytes]]:
    """The run's name, and its files by name."""
    try:
        with zipfile.ZipFile(path) as file:
            members = [member.split("/") for member in file.namelist()]
            (run,) = {run for run, _ in members}
            if run in ("", ".", "..") or not all(PACKED.fullmatch(name) for _, name in members):
                raise ValueError("it has files that are not a run's")
            found = {name: file.read(f"{run}/{name}") for _, name in members}
            for name in ("checkpoint.pt", "job.log"):
                if name not in found:
                    raise ValueError(f"it has no {name}")
    except Exception as error:  # whatever a damaged file makes of zipfile
        refuse(f"{path} is not a pack that can be read: {str(error) or repr(error)}.")
    return run, found


# ---- --unpack and --pack -------------------------------------------------------------------------


def unpack(folder: Path, out: Path) -> None:
    """Lays the runs of `folder` out in `out`; those that are as far there are left alone. Refuses,
    before it writes, to put one in the place of another."""
    behind = []
    paths = sorted(folder.glob("*.zip"))
    for path in paths:
        run, found = read_pack(path)
        progress = found.get("progress.csv", b"").decode(errors="replace")
        here = read_text(out / run / "progress.csv")
        if (out / run / "checkpoint.pt").exists() and steps_in(here) >= steps_in(progress):
            continue
        begun = found["job.log"].decode(errors="replace").partition("\n")[0]
        same = begun == read_text(out / run / "job.log").partition("\n")[0]
        goes_on = progress.startswith(here) or same and is_continued(out / run, progress)
        if is_running(out / run) or not goes_on:
            refuse(
                f"--unpack {folder} must go on with what is in --out: {out / run} is another run "
                f"than {path.name}."
            )
        behind.append(path)
    if not paths:
        refuse(f"--unpack {folder} must be a folder that --pack has filled: it has no zip file.")
    out.mkdir(parents=True, exist_ok=True)
    for path in behind:
        run, found = read_pack(path)
        with tempfile.TemporaryDirectory(dir=out) as aside:
            new = Path(aside, "new")
            new.mkdir()
            for name, content in found.items():
                (new / name).write_bytes(content)
            if (out / run).exists():
                (out / run).rename(Path(aside, "old"))
            new.rename(out / run)
    print(f"unpacked {len(behind)} of {len(paths)} runs, the others are as far in {out}")


def is_continued(run_dir: Path, progress: str) -> bool:
    """Whether progress.csv in a pack goes on with that in run_dir up to the last checkpoint there:
    what a kill left after it was made again elsewhere."""
    import torch  # takes seconds

    try:
        path = run_dir / "checkpoint.pt"
        step = torch.load(path, map_location="cpu", weights_only=True)["global_step"]
        header, *rows = read_text(run_dir / "progress.csv").splitlines(keepends=True)
        whole = [row for row in rows if row.endswith("\n")]
        kept = [row for row in whole if int(row.partition(",")[0]) <= step]
    except Exception:  # there is none, or whatever a damaged file makes of torch.load
        return False
    return progress.startswith("".join([header, *kept]))


def check_packs(folder: Path, runs: dict[Path, list[str]]) -> None:
    """Refuses a folder in which a pack would take the place of another run, or of more steps.
    `runs`: run directory -> the command that job.log begins with."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        refuse(f"--pack {folder} cannot be written: {error.strerror}.")
    for run_dir, command in runs.items():
        path = pack_path(folder, run_dir)
        if not path.exists():
            continue
        _, found = read_pack(path)
        begun = found["job.log"].decode(errors="replace").partition("\n")[0].removeprefix("# ")
        if begun != shlex.join(command):
            refuse(f"--pack {folder} must be another folder: in it, {path.name} is {begun!r}.")
        steps = steps_in(found.get("progress.csv", b"").decode(errors="replace"))
        if steps > steps_in(read_text(run_dir / "progress.csv")):
            refuse(
                f"--pack {folder} has {path.name} with {steps:,} steps: first --unpack {folder}."
            )


def pack(folder: Path, run_dirs: Iterable[Path]) -> bool:
    """A file for each run that has begun. False if one is too large."""
    sizes = []
    too_large = []
    for run_dir in run_dirs:
        if not (run_dir / "checkpoint.pt").exists():
            continue
        path = pack_path(folder, run_dir)
        temporary = path.with_suffix(".tmp")
        size = write_pack(temporary, run_dir)
        if size > MAX_BYTES:
            temporary.unlink()
            too_large.append(f"{run_dir.name} with {size / 10**6:.1f} MB")
        else:
            temporary.replace(path)
            sizes.append(size)
    largest = max(sizes, default=0)
    print(f"packed {len(sizes)} runs into {folder}, the largest has {largest / 10**6:.1f} MB")
    if too_large:
        most = f"at most {MAX_BYTES / 10**6:g} MB"
        what = f"--pack {folder} is without {', '.join(too_large)}: a file has {most}."
        print(f"error: {what}", file=sys.stderr)
    return not too_large
