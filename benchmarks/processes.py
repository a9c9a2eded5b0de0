"""Starting tasks in fresh processes.

Imports nothing heavy: on Linux a child's ``ru_maxrss`` can start at its parent's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


class TaskFailed(RuntimeError):
    """A task ended with an error; its own output went to the terminal."""


def run_task(
    name: str,
    *,
    cache: Path | None = None,
    module: str = "benchmarks.tasks",
    threads: int | None = None,
    **arguments: Any,
) -> dict[str, Any]:
    """Run one task of :mod:`benchmarks.tasks` and return its answer.

    Parameters
    ----------
    cache : Path, optional
        ``REGRAFT_CACHE`` of the process.
    module : str
        Where the task is, if elsewhere.
    threads : int, optional
        ``OMP_NUM_THREADS`` of the process.

    Returns
    -------
    dict
        The answer, with ``seconds_process``: the whole process, start and imports included.
    """
    environment = dict(os.environ)
    if cache is not None:
        environment["REGRAFT_CACHE"] = str(cache)
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", module, name],
        input=json.dumps(arguments),
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
        check=False,
    )
    if done.returncode != 0:
        raise TaskFailed(f"The task {name} ended with exit code {done.returncode}.")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**answer, "seconds_process": time.perf_counter() - started}


def drop_from_memory(folder: Path) -> bool:
    """Ask the system to forget its in-memory copies of the files below ``folder``.

    Returns False where the system cannot be asked.
    """
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(handle)
    return True
