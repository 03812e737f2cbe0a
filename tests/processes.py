"""Processes of tests that start with torch and the rooms already imported.

Most of the time of a short ``python -m trainer`` goes into importing its libraries. A server imports them once and
forks for every process that a test asks for. A forked process goes on as the main program of its interpreter, and ends
as every interpreter does: exit statuses, stack traces, `atexit` and joined threads are Python's own. `Forked` looks
like `subprocess.Popen` from outside. A test about starting, or about which modules are loaded, takes ``fresh=True``.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import functools
import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import types
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from .patience import PATIENCE

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("manifests", "shards", "pipeline", "trainer")
LIBRARIES = ("torch", "torchvision", "timm", "open_clip", "pyarrow.parquet", "torch.utils.tensorboard", "s3fs")
FORKS = sys.platform == "linux" and hasattr(os, "pidfd_open")  # elsewhere every process is a fresh interpreter
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
NUMBER = struct.Struct("i")
MESSAGE = 1 << 20  # bytes of arguments and environment, at most
PIPE, DEVNULL = subprocess.PIPE, subprocess.DEVNULL


def launch(
    *arguments: object,
    fresh: bool = False,
    cwd: Path | str = ROOT,
    env: Mapping[str, str] | None = None,
    stdout: int | None = PIPE,
    stderr: int | None = PIPE,
    start_new_session: bool = False,
) -> subprocess.Popen[str]:
    """Start ``python ARGUMENTS``, that is ``-m MODULE …`` or ``-c PROGRAM …``.

    fresh: in an interpreter of its own, which has imported nothing yet.
    """
    words = [str(argument) for argument in arguments]
    environment = dict(os.environ if env is None else env)
    if FORKS and not fresh:
        return Forked(words, str(cwd), environment, stdout, stderr, start_new_session)
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=cwd,
        env=environment,
        stdout=stdout,
        stderr=stderr,
        start_new_session=start_new_session,
        text=True,
    )


def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """`launch`, and wait for the end."""
    process = launch(*arguments, **options)
    try:
        out, err = process.communicate(timeout=PATIENCE)
    except BaseException:
        process.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


class Forked(subprocess.Popen[str]):
    """A process of the server's, with the public methods of Popen in text mode."""

    def __init__(
        self, words: list[str], cwd: str, env: dict[str, str], stdout: int | None, stderr: int | None, session: bool
    ) -> None:
        self.args, self.returncode = words, None  # type: ignore[assignment]
        self.stdin = None
        told, tell = os.pipe()
        (self.stdout, out), (self.stderr, err) = _target(stdout, 1), _target(stderr, 2)
        message = json.dumps({"words": words, "cwd": cwd, "env": env, "session": session}).encode()
        assert len(message) < MESSAGE
        socket.send_fds(server(), [message], [0, out, err, tell])
        for number in {out, err, tell} - {1, 2}:
            os.close(number)
        self._told = open(told, "rb", buffering=0)  # the server writes the process id, then the exit status
        self.pid = self._number(PATIENCE)

    def _number(self, seconds: float) -> int:
        if not select.select([self._told], [], [], seconds)[0]:
            raise subprocess.TimeoutExpired(self.args, seconds)
        data = self._told.read(NUMBER.size)
        assert data, "the server of processes has died"
        return int(NUMBER.unpack(data)[0])

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self.returncode = self._number(PATIENCE if timeout is None else timeout)
            self._told.close()
        return self.returncode

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, sig)

    def communicate(self, input: str | None = None, timeout: float | None = None) -> tuple[str, str]:  # type: ignore[override]
        """What was written to stdout and stderr until both were closed; then wait for the end."""
        assert input is None, "stdin is not connected"
        seconds = PATIENCE if timeout is None else timeout
        deadline = time.monotonic() + seconds
        said: dict[IO[str], list[bytes]] = {}
        with selectors.DefaultSelector() as open_ones:
            for stream in (self.stdout, self.stderr):
                if stream is not None and not stream.closed:
                    open_ones.register(stream, selectors.EVENT_READ)
                    said[stream] = []
            while open_ones.get_map():
                if not (ready := open_ones.select(max(0, deadline - time.monotonic()))):
                    raise subprocess.TimeoutExpired(self.args, seconds)
                for key, _ in ready:
                    data = os.read(key.fd, 1 << 16)
                    said[key.fileobj].append(data)  # type: ignore[index]
                    if not data:
                        open_ones.unregister(key.fileobj)
        self.wait(timeout)
        for stream in said:
            stream.close()
        texts = {
            stream: b"".join(parts).decode().replace("\r\n", "\n").replace("\r", "\n") for stream, parts in said.items()
        }
        return texts.get(self.stdout, ""), texts.get(self.stderr, "")  # type: ignore[arg-type]


def _target(wanted: int | None, standard: int) -> tuple[IO[str] | None, int]:
    """(this end of a pipe, the number that the process gets as its ``standard`` stream)."""
    if wanted == PIPE:
        ours, theirs = os.pipe()
        return open(ours, encoding="utf-8"), theirs
    if wanted == DEVNULL:
        return None, os.open(os.devnull, os.O_WRONLY)
    return None, standard if wanted is None else os.dup(wanted)


_starting = threading.Lock()


def server() -> socket.socket:
    """The connection to this process's server. The first call starts it; it ends when this end closes."""
    with _starting:
        return _start_server(os.getpid())


@functools.cache
def _start_server(_pid: int) -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        theirs.set_inheritable(True)
        process = subprocess.Popen(
            [sys.executable, "-c", f"from tests.processes import serve; serve({theirs.fileno()})"],
            cwd=ROOT,
            env=os.environ | ONE_THREAD,
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # Ctrl-C in the terminal ends pytest, and the server with it
        )

    @atexit.register
    def end() -> None:
        ours.close()
        process.wait()

    return ours


def serve(channel: int) -> None:
    """Fork for every message until the other end closes. Only a forked process returns, when its program ends."""
    faulthandler.enable()
    preload()
    connection = socket.socket(fileno=channel)
    living: dict[int, tuple[int, int]] = {}  # by pidfd: process id, where its end is told
    while True:
        for ended in set(select.select([connection, *living], [], [])[0]) - {connection}:
            pid, tell = living.pop(ended)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            with contextlib.suppress(BrokenPipeError):  # nobody waits for it any more
                os.write(tell, NUMBER.pack(status))
            os.close(tell)
            os.close(ended)
        if not select.select([connection], [], [], 0)[0]:
            continue
        message, numbers, _, _ = socket.recv_fds(connection, MESSAGE, 4)
        if not message:
            for pid, _tell in living.values():
                os.kill(pid, signal.SIGKILL)
            os._exit(0)
        *streams, tell = numbers
        if (pid := os.fork()) == 0:
            for number in (connection.detach(), tell, *living, *(tell for _pid, tell in living.values())):
                os.close(number)
            become(streams, **json.loads(message))
            return
        for number in streams:
            os.close(number)
        living[os.pidfd_open(pid)] = pid, tell
        os.write(tell, NUMBER.pack(pid))


def preload() -> None:
    """Import what commands need. No thread may run afterwards: a lock that it holds would stay taken in every fork."""
    for name in (*LIBRARIES, *ROOMS):
        with contextlib.suppress(ImportError):  # an optional one
            importlib.import_module(name)
    for room in ROOMS:
        for module in pkgutil.walk_packages(sys.modules[room].__path__, f"{room}."):
            if not module.name.endswith("__main__"):
                with contextlib.suppress(
                    Exception
                ):  # of optional packages; who needs the module meets the error itself
                    importlib.import_module(module.name)
    assert threading.active_count() == 1, threading.enumerate()
    gc.collect()
    gc.freeze()  # what is loaded stays in memory that all share


def become(streams: list[int], words: list[str], cwd: str, env: dict[str, str], session: bool) -> None:
    """Take the streams, the folder, the environment and the arguments, and run the program as ``__main__``."""
    for standard, number in enumerate(streams):
        os.dup2(number, standard)
        os.close(number)
    if session:
        os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    kind, program, *rest = words
    sys.argv = [kind, *rest]
    if kind == "-m":
        sys.path[0] = cwd
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        assert kind == "-c", kind
        main = types.ModuleType("__main__")
        sys.modules["__main__"] = main
        exec(compile(program, "<string>", "exec"), main.__dict__)
