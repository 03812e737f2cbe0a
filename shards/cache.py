"""Whole tars of remote runs on the local disk, within a bound.

Files are named by what they hold, appear complete or not at all, and are shared by all processes of a machine.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from manifests import Store, UserError
from manifests.files.cache import cache_folder, lock, writing_cache
from manifests.rows import TarRecord

PAUSES = (0.0, 1.0, 2.0)  # seconds before each attempt at fetching a tar: connections break
FRESH = 60  # seconds; a tar that is in use is marked as used this often


class TarCache:
    """Remote tars on the local disk, at most ``limit`` bytes together; the one unused for longest goes first."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.folder = cache_folder("tars")
        self.store = Store(self.folder)
        self.store.remove_stale_temporaries()

    def read_range(self, source: Store, tar: TarRecord, offset: int, size: int) -> bytes:
        """Bytes of a tar, fetching it first where it is not here. Raises UserError as `fetch` does."""
        while True:
            name = self.fetch(source, tar)
            try:
                with open(
                    self.folder / name, "rb", buffering=0
                ) as file:  # not held: a tar that has gone would still fill the disk
                    return os.pread(file.fileno(), size, offset)
            except FileNotFoundError:  # another process made room in between
                continue

    def fetch(self, source: Store, tar: TarRecord) -> str:
        """Fetch a tar unless it is here, and return its name in the cache.

        It gets that name only after its size and sha256 were compared.

        Several processes that want the same tar fetch it once. Raises UserError naming the URL when it is missing,
        cannot be read, is not the one that the manifest describes, or does not fit; naming the cache folder when that
        cannot be written.
        """
        name = f"{tar.sha256}.tar"
        if self._is_here(name, tar.size):
            return name
        if tar.size > self.limit:
            raise UserError(
                f"{source.where(tar.name)}: {tar.size:,} bytes do not fit into a cache of {self.limit:,}; "
                "raise cache_gb"
            )
        with lock(self.folder, tar.sha256[:2]):
            if not self._is_here(name, tar.size):
                data = _download(source, tar)
                with lock(self.folder, "room"), writing_cache(self.folder):
                    self._make_room(tar.size)
                    self.store.write(name, data)
        return name

    def drop(self, tar: TarRecord) -> Path:
        """Forget a tar that the local disk has damaged, and say where it lay."""
        path = self.folder / f"{tar.sha256}.tar"
        path.unlink(missing_ok=True)
        return path

    def _is_here(self, name: str, size: int) -> bool:
        path = self.folder / name
        try:
            found = path.stat()
        except FileNotFoundError:
            return False
        if time.time() - found.st_mtime > FRESH:
            with suppress(OSError):  # gone meanwhile, or somebody else's: whoever reads it will see
                os.utime(path)
        return found.st_size == size

    def _make_room(self, size: int) -> None:
        files = sorted(self._held())
        total = sum(held for _, held, _ in files)
        for _, held, path in files:
            if total + size <= self.limit:
                break
            path.unlink(missing_ok=True)
            total -= held

    def _held(self) -> Iterator[tuple[int, int, Path]]:
        """(last use, bytes, path) of every tar in the cache. Others may remove some meanwhile."""
        for path in self.folder.glob("*.tar"):
            with suppress(FileNotFoundError):
                found = path.stat()
                yield found.st_mtime_ns, found.st_size, path


def _download(source: Store, tar: TarRecord) -> bytes:
    where, why = source.where(tar.name), ""
    for pause in PAUSES:
        time.sleep(pause)
        try:
            data = source.read(tar.name)
        except FileNotFoundError as error:
            raise UserError(f"{where}: missing; restore it, or run `make shards` again") from error
        if len(data) != tar.size:
            why = f"{len(data)} bytes, the manifest says {tar.size} (truncated or replaced)"
        elif hashlib.sha256(data).hexdigest() != tar.sha256:
            why = "its sha256 is not the one in the manifest (altered or damaged)"
        else:
            return data
    raise UserError(f"{where}: {why}; tried {len(PAUSES)} times")
