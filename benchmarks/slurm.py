"""launch.py's runs on Slurm: a job array with an element for each run.

Slurm signals a job before its time is over; `job.work` then has the training write its checkpoint
and puts the job back into the queue.
"""

import getpass
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

LAUNCH = Path(__file__).resolve().with_name("launch.py")
SBATCH = {"time": "24:00:00", "signal": "USR1@300", "open-mode": "append"}
BATCH = """\
#!/bin/bash
#SBATCH --requeue
{options}
trap : TERM  # a job that is ended waits for its checkpoint
export SRUN_CPUS_PER_TASK=${{SLURM_CPUS_PER_TASK:-1}}
runs=({runs})
srun {launch} --work "${{runs[$SLURM_ARRAY_TASK_ID]}}"
"""


def is_here() -> bool:
    return bool(shutil.which("sbatch") and shutil.which("srun"))


def queue() -> dict[str, str]:
    """This user's jobs in Slurm's queue: id -> state."""
    if shutil.which("squeue") is None:
        return {}
    command = ["squeue", "--noheader", "--array", "--user", getpass.getuser(), "--format=%i %T"]
    lines = subprocess.check_output(command, text=True).splitlines()
    return dict(line.split() for line in lines)


def batch_script(out: Path, names: list[str], at_most: int, sbatch: tuple[str, ...]) -> str:
    """What sbatch is given: the runs of these names as one job array."""
    options = SBATCH | {"job-name": out.name, "output": f"{out}/slurm_%A_%a.log"}
    options |= dict(option.split("=", 1) for option in sbatch)
    options["array"] = f"0-{len(names) - 1}" + (f"%{at_most}" if at_most else "")
    return BATCH.format(
        options="\n".join(f"#SBATCH --{name}={value}" for name, value in options.items()),
        runs=shlex.join(names),
        launch=shlex.join([sys.executable, str(LAUNCH), "--out", str(out)]),
    )


def submit(out: Path, names: list[str], at_most: int, sbatch: tuple[str, ...]) -> list[str]:
    """Hands them to Slurm. Returns their job ids."""
    batch = out / "batch.sh"
    batch.write_text(batch_script(out, names, at_most, sbatch))
    printed = subprocess.check_output(["sbatch", "--parsable", str(batch)], text=True)
    array = printed.strip().partition(";")[0]
    return [f"{array}_{i}" for i in range(len(names))]


def this_job() -> str:
    """Of an array, that this process runs in; nothing but _ outside."""
    names = ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID")
    return "_".join(os.environ.get(name, "") for name in names)


def requeue() -> None:
    """Puts this job back into the queue, unless it has been cancelled or Slurm does so itself."""
    job = this_job()
    state = subprocess.check_output(["squeue", "-h", "--jobs", job, "--format=%T"], text=True)
    # After scancel, or where Slurm requeues what it preempts, the state is COMPLETING by now.
    if state.strip() == "RUNNING":
        subprocess.run(["scontrol", "requeue", job], check=True)
