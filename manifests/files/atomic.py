"""Local files that appear whole or not at all: temporary name, fsync, rename."""

from __future__ import annotations

import os
import re
import socket
import threading
from collections.abc import Callable
from pathlib import Path

HOST = re.sub(r"[^A-Za-z0-9_-]", "-", socket.gethostname()) or "host"


def write_file(path: Path, data: bytes | memoryview, place: Callable[[Path, Path], bool | None]) -> bool:
    """``place(temporary, path)`` gives the finished file its name; False: the name was taken, and that file stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{HOST}.{os.getpid()}-{threading.get_ident()}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        placed = place(temporary, path) is not False
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself must survive a power cut
    finally:
        os.close(folder)
    return placed


def link(temporary: Path, path: Path) -> bool:
    """A second name for the file, which the file system refuses when there is one already."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links: not exclusive, and nothing depends on that
        if path.exists():
            return False
        os.replace(temporary, path)
    return True
