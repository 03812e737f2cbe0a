"""How long tests wait for what must come: one number, which a machine ten times slower than usual does not reach.

``PATIENCE=SECONDS`` in the environment changes it. No test passes or fails by being fast: a limit only ends what hangs.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import time
from collections.abc import Callable
from typing import TypeVar

PATIENCE = float(os.environ.get("PATIENCE", 600))  # seconds
PAUSE = 0.005  # seconds between two looks
T = TypeVar("T")
AnyProcess = subprocess.Popen[str] | multiprocessing.process.BaseProcess


def wait_for(condition: Callable[[], T], *processes: AnyProcess, pause: float = PAUSE) -> T:
    """Look again and again until the condition is true, and return what it returned.

    Fails after `PATIENCE`, and when all ``processes`` have ended without it: nobody is left who could bring it about.
    """
    end = time.monotonic() + PATIENCE
    while True:
        over = bool(processes) and not any(map(_alive, processes))  # looked up first: the last act of a process counts
        if found := condition():
            return found
        assert not over, f"ended without it: {[_remains(process) for process in processes]}"
        assert time.monotonic() < end, f"nothing happened in {PATIENCE:.0f} s"
        time.sleep(pause)


def _alive(process: AnyProcess) -> bool:
    return process.poll() is None if isinstance(process, subprocess.Popen) else process.is_alive()


def _remains(process: AnyProcess) -> object:
    """The exit status of a process that has ended, and what it wrote where that was caught."""
    if isinstance(process, subprocess.Popen):
        return process.returncode, *process.communicate(timeout=PATIENCE)
    return process.exitcode
