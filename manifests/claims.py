"""Who is making which shard: small advisory files below ``work/`` of a run directory, on any machine that sees it.

They let several workers and commands, on several machines, share the shards of a run without talking to each other, and
they let ``status`` say what is running and what failed. Nothing depends on them being right: only a shard's part file
says that it is done, so two workers at one shard cost time but never correctness. Two clocks are never compared: a
claim is dead when its process is dead, or when its content has not changed for `SILENT` seconds of the observer's own
monotonic clock.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import secrets
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import pydantic

from .errors import UserError
from .files.atomic import HOST
from .files.store import Store, alive

R = TypeVar("R")

FOLDER = "work"
BEAT = 5.0  # seconds between two heartbeats
SILENT = 60.0  # seconds without a heartbeat until others take over
_NAME = re.compile(r"(?P<kind>running|failed)-(?P<shard>[0-9]{6,})\.json")


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A shard in the making, as its worker last wrote it."""

    shard: int
    host: str
    machine: str  # boot id and process namespace, in which `pid` is unique
    pid: int
    worker: str  # drawn at random for each process, because process ids are used again
    beat: int = 0  # number of heartbeats so far
    samples: int = 0  # samples of this shard that are done
    verified: int = 0
    rejected: int = 0
    rate: float = 0.0  # samples per second of this worker, waiting excluded; 0: not known yet


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A shard that could not be made."""

    shard: int
    tries: int
    reason: str
    host: str


@dataclass(frozen=True)
class Board:
    """Which shards have a claim or a failure. The files' contents are read by `read_claim` and `read_failure`."""

    running: frozenset[int]
    failed: frozenset[int]


def look(store: Store) -> Board:
    """Read the board from one listing; ignores files of other names."""
    found = [match for name in store.names(FOLDER) if (match := _NAME.fullmatch(name))]
    kinds = {
        kind: frozenset(int(match["shard"]) for match in found if match["kind"] == kind)
        for kind in ("running", "failed")
    }
    return Board(kinds["running"], kinds["failed"])


def read_claim(store: Store, shard: int) -> Claim | None:
    """Read a claim; None when the file is gone or is no claim."""
    return _read(store, _file("running", shard), Claim)


def claim_age(store: Store, shard: int) -> float:
    """Seconds since a claim was last written, by the store's clock and this machine's; 0 when it is gone."""
    try:
        return max(time.time() - store.modified(_file("running", shard)), 0.0)
    except FileNotFoundError:
        return 0.0


def read_failure(store: Store, shard: int) -> Failure | None:
    return _read(store, _file("failed", shard), Failure)


def record_failure(store: Store, shard: int, reason: str) -> None:
    """Count one more failed try of a shard."""
    before = read_failure(store, shard)
    failure = Failure(shard=shard, tries=(before.tries if before else 0) + 1, reason=reason, host=HOST)
    store.write(_file("failed", shard), _encode(failure))


def forget(store: Store, shard: int) -> None:
    """Remove the record of a shard's failures, because it is done or is to be tried anew."""
    store.remove(_file("failed", shard))


def clear(store: Store) -> None:
    """Remove every claim and failure of a complete run. A worker killed after its last file leaves its claim behind."""
    board = look(store)
    for kind, shards in (("running", board.running), ("failed", board.failed)):
        for shard in shards:
            store.remove(_file(kind, shard))
    store.remove_empty(FOLDER)


class Claims:
    """One worker's claims. As a context it writes heartbeats, and releases all claims at the end."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._worker = secrets.token_hex(8)
        self._mine: dict[int, Claim] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._seen: dict[int, tuple[Claim, float]] = {}  # claims of others, and when each last changed

    def __enter__(self) -> Claims:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join(BEAT)
        for shard in list(self._mine):
            self.release(shard)
        self._store.remove_empty(FOLDER)

    @property
    def mine(self) -> frozenset[int]:
        """Shards that this worker has claimed and not yet released."""
        return frozenset(self._mine)

    def take(self, shard: int) -> bool:
        """Claim a shard; False when another worker was faster."""
        claim = Claim(shard=shard, host=HOST, machine=_MACHINE, pid=os.getpid(), worker=self._worker)
        if not self._store.create(_file("running", shard), _encode(claim)):
            return False
        with self._lock:
            self._mine[shard] = claim
        return True

    def take_over(self, shard: int) -> bool:
        """Claim a shard whose worker seems dead, and count that as a failed try.

        Returns False when the worker may be alive, or when another one was faster.
        """
        name = _file("running", shard)
        try:
            content = self._store.read(name)
            claim = _decode(content, Claim)
            if (claim is not None and not self._is_dead(claim)) or self._store.read(name) != content:
                return False
        except FileNotFoundError:
            return False
        self._store.remove(name)
        if not self.take(shard):
            return False
        if claim is not None:
            record_failure(self._store, shard, f"its worker on {claim.host} (process {claim.pid}) died or fell silent")
        return True

    def update(self, shard: int, *, samples: int, verified: int, rejected: int, rate: float) -> None:
        """Set what the next heartbeat will say."""
        with self._lock:
            if shard in self._mine:
                self._mine[shard] = dataclasses.replace(
                    self._mine[shard], samples=samples, verified=verified, rejected=rejected, rate=rate
                )

    def release(self, shard: int) -> None:
        """Give a claim up, unless another worker has it by now."""
        # if the store is out of reach, others find the claim silent and take it over
        with self._lock, contextlib.suppress(OSError, UserError):
            self._mine.pop(shard, None)
            claim = read_claim(self._store, shard)
            if claim is not None and claim.worker == self._worker:
                self._store.remove(_file("running", shard))

    def _is_dead(self, claim: Claim) -> bool:
        if claim.machine == _MACHINE and not alive(claim.pid):
            return True
        now = time.monotonic()
        before, since = self._seen.get(claim.shard, (None, now))
        if before != claim:
            self._seen[claim.shard] = (claim, now)
            return False
        return now - since > SILENT

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            with self._lock:
                for shard, claim in self._mine.items():
                    self._mine[shard] = dataclasses.replace(claim, beat=claim.beat + 1)
                    # a missed heartbeat is harmless; if the store is broken, writing the shard will say so
                    with contextlib.suppress(OSError, UserError):
                        self._store.write(_file("running", shard), _encode(self._mine[shard]))


def _this_machine() -> str:
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # not Linux
        return f"{HOST} {uuid.getnode():x}"


_MACHINE = _this_machine()


def _file(kind: str, shard: int) -> str:
    return f"{FOLDER}/{kind}-{shard:06d}.json"


def _encode(record: Claim | Failure) -> bytes:
    return (json.dumps(dataclasses.asdict(record)) + "\n").encode()


def _read(store: Store, name: str, kind: type[R]) -> R | None:
    try:
        return _decode(store.read(name), kind)
    except FileNotFoundError:
        return None


def _decode(data: bytes, kind: type[R]) -> R | None:
    try:
        return pydantic.TypeAdapter(kind).validate_json(data)
    except pydantic.ValidationError:
        return None
