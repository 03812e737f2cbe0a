"""A forked process cannot be told from a fresh interpreter by what goes in, what comes out and how it ends."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from .patience import wait_for
from .processes import launch, run

both = pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "forked"])

ENDS = {
    "": 0,
    "raise SystemExit(7)": 7,
    "raise SystemExit('no such file')": 1,
    "import sys; sys.exit()": 0,
    "1 / 0": 1,
    "raise KeyboardInterrupt": -signal.SIGINT,
    "import os; os._exit(5)": 5,
    "import os; os.kill(os.getpid(), 9)": -signal.SIGKILL,
    "import threading, time; threading.Thread(target=lambda: (time.sleep(0.2), print('late'))).start()": 0,
    "import atexit; atexit.register(print, 'at exit'); raise SystemExit(3)": 3,
    "import os, signal; signal.raise_signal(signal.SIGINT)": -signal.SIGINT,
    "import multiprocessing as m; m.get_context('spawn').Process(target=print, args=('spawned',)).start()": 0,
    "import multiprocessing as m; m.get_context('fork').Process(target=print, args=('forked',)).start()": 0,
}


@pytest.mark.parametrize("program", ENDS)
def test_ends(program: str) -> None:
    """Status, output and the last line of a stack trace, beside those of a fresh interpreter."""
    found = [run("-c", program, fresh=fresh) for fresh in (True, False)]
    assert [told.returncode for told in found] == [ENDS[program]] * 2, found
    assert found[0].stdout == found[1].stdout
    assert found[0].stderr.splitlines()[-1:] == found[1].stderr.splitlines()[-1:]


PLACE = """
import json, os, signal, sys
print(json.dumps([
    sys.argv, os.getcwd(), dict(os.environ), __name__, sys.modules["__main__"].__dict__ is globals(),
    os.getsid(0) == os.getpid(), list(map(str, signal.pthread_sigmask(signal.SIG_BLOCK, []))),
    [str(signal.getsignal(number)) for number in range(1, 32)],
    os.get_blocking(1), [os.isatty(n) for n in range(3)], sorted(os.listdir("/proc/self/fd"), key=int)[:3],
]))
"""


@pytest.mark.parametrize("session", [False, True])
def test_place(tmp_path: Path, session: bool) -> None:
    """Arguments, folder, environment, session and signals."""
    environment = os.environ | {"ONE": "1", "LC_ALL": "C.UTF-8"}
    found = [
        run("-c", PLACE, "a b", "--c", cwd=tmp_path, env=environment, start_new_session=session, fresh=fresh)
        for fresh in (True, False)
    ]
    assert found[0].stdout == found[1].stdout and found[0].returncode == 0, found


@both
def test_modules(tmp_path: Path, fresh: bool) -> None:
    """``-m``: the folder is searched, relative imports work, and the module is ``__main__``."""
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "part.py").write_text("value = 4\n")
    (tmp_path / "room" / "__main__.py").write_text(
        "import sys\nfrom .part import value\n"
        "print(__name__, __package__, value, sys.argv[1:], sys.modules['__main__'].value)\n"
    )
    told = run("-m", "room", "x", cwd=tmp_path, fresh=fresh)
    assert told.stdout == "__main__ room 4 ['x'] 4\n", told.stderr


@both
def test_signals_reach_it(fresh: bool) -> None:
    """A process has its own number, speaks while it runs, stands still on SIGSTOP and ends by the signal it gets."""
    process = launch("-c", "import os, time; print(os.getpid(), flush=True); time.sleep(1000)", fresh=fresh)
    assert process.stdout is not None and int(process.stdout.readline()) == process.pid
    assert process.poll() is None
    process.send_signal(signal.SIGSTOP)
    assert process.poll() is None
    process.send_signal(signal.SIGCONT)
    process.terminate()
    assert process.wait() == process.poll() == -signal.SIGTERM
    assert process.communicate() == ("", "") and process.communicate() == ("", "")
    process.kill()  # of one that has ended: nothing happens


@both
def test_a_group(fresh: bool) -> None:
    """In a session of its own, a process and its children are reached by the number of the process."""
    program = (
        "import subprocess; print(subprocess.Popen(['sleep', '1000']).pid, flush=True); import time; time.sleep(1000)"
    )
    process = launch("-c", program, start_new_session=True, fresh=fresh)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()  # ends when the child, too, has let go of the pipes
    assert process.returncode == -signal.SIGKILL
    wait_for(lambda: _ended(child))


def _ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@both
def test_large_outputs(fresh: bool) -> None:
    """More than a pipe holds, on both streams in turn; nothing is lost, and line ends are Python's."""
    program = "import sys\nfor n in range(3000):\n  print('o' * 99, end='\\r\\n'); print('e' * 99, file=sys.stderr)"
    told = run("-c", program, fresh=fresh)
    assert told.stdout == ("o" * 99 + "\n") * 3000 and told.stderr == ("e" * 99 + "\n") * 3000


def test_what_is_loaded_already() -> None:
    """The point of it: torch is there before the first line runs, with one thread, and without threads of others."""
    told = run(
        "-c",
        "import sys, threading; print('timm' in sys.modules, 'trainer.loop' in sys.modules, threading.active_count())",
    )
    assert told.stdout == ("True True 1\n" if sys.platform == "linux" else "False False 1\n")
    told = run("-c", "import sys; print('torch' in sys.modules)", fresh=True)
    assert told.stdout == "False\n"
