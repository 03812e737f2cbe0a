"""Signs of life of all ranks of a job: a rank that dies is named in seconds, and an error of one is told once.

A collective by itself would wait for a dead rank until its timeout, and every rank would report an error of its own.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import uuid
from datetime import timedelta
from typing import NoReturn

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]
from tqdm import tqdm

from manifests import UserError, one_line
from manifests.command import USER_ERROR

from .place import Place

BEAT = 1.0  # seconds between signs of life
SILENCE = 10.0  # seconds without one, after which a rank is taken for dead; counted in own beats, so that a job may be suspended whole
DEAF = 30.0  # likewise, without any word from the store, after which rank 0, which holds it, is taken for dead
ROLL_CALL = 3.0  # seconds in which the living answer after a connection broke
COMING = 600.0  # seconds in which all ranks must have come
LATE = 15.0  # seconds after which a machine says for whom it waits
GO_ON = "the others have stopped too; the same command goes on from the last checkpoint"


class Watch:
    """Signs of life of all ranks, and word of the first error, in a store that a thread of each looks at every second."""

    def __init__(self, place: Place) -> None:
        self.place = place
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            store = open_store(address, port, place)
            # A connection of its own: a call of the group that waits would hold up the other one.
            own = TCPStore(address, port, is_master=False, wait_for_workers=False)
            start = meet(own, place)
        except RuntimeError as error:
            raise UserError(
                f"rank {place.rank}: cannot meet the others at {address}:{port} ({one_line(error)})"
            ) from error
        self.group_store, self._store = PrefixStore(f"group/{start}", store), PrefixStore(f"watch/{start}", own)
        self._lock = threading.Lock()
        self._over = threading.Event()  # this rank is leaving
        self._heard = False  # that another rank has reported an error
        self._store.set(
            f"beat/{place.rank}", "0"
        )  # of a rank that dies before the thread's first one, silence is noticed too
        self._beats = 0  # rounds of the thread
        threading.Thread(target=self._keep_watch, daemon=True).start()
        threading.Thread(target=self._mind_the_store, daemon=True).start()

    def leave(self) -> None:
        """Leave in good order. Rank 0, which may hold the store, goes last."""
        self._over.set()
        with self._lock:
            self._store.set(f"left/{self.place.rank}", "")
            if self.place.rank == 0:
                self._store.wait([f"left/{other}" for other in range(self.place.world)], timedelta(seconds=60))

    def speaks_first(self, message: str) -> bool:
        """Whether this rank is the first to meet an error, and so the one to report it; the others end without a word."""
        self._over.set()
        hanging = threading.Timer(SILENCE, os._exit, [USER_ERROR])  # a process group may not let the interpreter end
        hanging.daemon = True
        hanging.start()
        if self._heard:
            return False
        try:
            with self._lock:
                first: bool = self._store.add("errors", 1) == 1
                if first:
                    self._store.set("ended", message)
        except RuntimeError:  # rank 0 held the store, and is gone
            return self.place.rank == 1
        if self.place.rank == 0:
            time.sleep(2 * BEAT)  # the store goes with this process; let the others hear first
        return first

    def roll_call(self) -> list[int]:
        """Ranks that do not answer any more, after a connection broke or an interrupt came."""
        missing = list(range(self.place.world))
        started = time.monotonic()
        try:
            with self._lock:
                self._store.set(f"here/{self.place.rank}", "")
                self._store.set(
                    "roll call", ""
                )  # the threads of those answer who wait in a collective for a rank that does not come
            while missing and time.monotonic() - started < ROLL_CALL:
                time.sleep(0.1)
                with self._lock:
                    missing = [other for other in missing if not self._store.check([f"here/{other}"])]
        except RuntimeError:
            return [0]
        return missing

    def _keep_watch(self) -> None:
        """The thread: show life, listen for an error, look for ranks that fell silent: rank 0 for any, all for rank 0."""
        others = range(1, self.place.world) if self.place.rank == 0 else range(1)
        beats: dict[int, tuple[bytes, int]] = {}
        while not self._over.wait(BEAT):
            self._beats += 1
            try:
                with self._lock:
                    self._store.set(f"beat/{self.place.rank}", str(self._beats))
                    self._heard = self._store.check(["ended"])
                    if self._store.check(["roll call"]):
                        self._store.set(f"here/{self.place.rank}", "")
                    silent = self._silent(others, beats)
            except RuntimeError:  # the store is gone, and rank 0 with it; the main thread may have met that already
                if not self._over.wait(ROLL_CALL):
                    _end(self._obituary_of_store())
                return
            if self._heard:
                if not self._over.wait(BEAT / 2):  # the main thread hangs in a collective
                    _end(None)
                return
            if silent:
                message = obituary(silent)
                _end(message if self.speaks_first(message) else None)

    def _obituary_of_store(self) -> str | None:
        """What is said of rank 0 where no store can settle who says it: by one rank of each machine."""
        return obituary([0]) if self.place.rank == 1 or self.place.local_rank == 0 else None

    def _silent(self, others: range, beats: dict[int, tuple[bytes, int]]) -> list[int]:
        """Ranks that have shown no life for long. ``beats``: the last sign of each, and the own beat at which it was new."""
        for other in others:
            key = f"beat/{other}"
            value = self._store.get(key) if self._store.check([key]) else b""
            if other not in beats or beats[other][0] != value or self._store.check([f"left/{other}"]):
                beats[other] = (value, self._beats)
        return [other for other, (value, since) in beats.items() if value and (self._beats - since) * BEAT > SILENCE]

    def _mind_the_store(self) -> None:
        """A second thread, for the first may wait for ever for the store of a rank 0 that is frozen, or cut off."""
        seen, rounds = 0, 0
        while not self._over.wait(BEAT):
            seen, rounds = self._beats, rounds + 1 if self._beats == seen else 0
            if rounds * BEAT > DEAF:
                _end(self._obituary_of_store())


def open_store(address: str, port: int, place: Place) -> Store:
    """The store in which the ranks meet. It is torchrun's, where torchrun says so, else rank 0 holds it and the others wait for it.

    torch's own rendezvous waits in C++, where neither Ctrl-C nor SIGTERM is heard: for the store here, for the ranks in `meet`.
    Raises UserError when rank 0 does not come.
    """
    holds = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    patience = Patience(place)
    while not holds and (why := _no_answer(address, port)):
        patience.wait([0], f"{address}:{port}: {why}")
    return TCPStore(address, port, is_master=holds, wait_for_workers=False, timeout=timedelta(seconds=COMING))


def _no_answer(address: str, port: int) -> str | None:
    """Why nobody is there yet, or None."""
    try:
        socket.create_connection((address, port), timeout=1).close()
    except OSError as error:  # also for a name that is not known, which may become so
        return (error.strerror or str(error)).lower()
    return None


def meet(store: Store, place: Place) -> str:
    """Wait for all ranks, and return a name for this start of the job: the same on all ranks, and of no other start.

    torchrun's store outlives a restart, with all that the ranks before have left in it, and restarts are counted by each machine for
    itself. So each rank calls with a word of its own; rank 0 answers it with the word and the name, and is told that it was heard.
    Raises UserError when a rank does not come.
    """
    word = uuid.uuid4().hex
    patience = Patience(place)
    if place.rank != 0:
        store.set(f"call/{place.rank}", word)
        answer = f"answer/{word}"
        while not store.check([answer]):
            patience.wait([0])
        name: str = store.get(answer).decode()
        store.set(f"heard/{name}/{place.rank}", "")
        return name
    missing = list(range(1, place.world))
    while missing := [other for other in missing if not store.check([f"heard/{word}/{other}"])]:
        for other in missing:
            if store.check([f"call/{other}"]):  # perhaps one of an earlier start, whom nobody hears
                store.set(f"answer/{store.get(f'call/{other}').decode()}", word)
        patience.wait(missing)
    return word


class Patience:
    """Of a rank that waits for others to come. After a while one rank of each machine says so; in the end it gives up."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.since = time.monotonic()
        self.to_say = place.local_rank == 0

    def wait(self, missing: list[int], why: str = "") -> None:
        """For a moment. Raises UserError when it has been too long. why: what was seen of the missing, or rather not."""
        waited = time.monotonic() - self.since
        reason = f" ({why})" if why else ""
        if waited > COMING:
            told = f"{_name(missing)} not come in {COMING / 60:.0f} minutes{reason}"
            raise UserError(f"of {self.place.world} ranks, {told}; look at the log of that machine")
        if waited > LATE and self.to_say:
            self.to_say = False
            print(
                f"rank {self.place.rank}: {_name(missing)} not come yet{reason}; waiting", file=sys.stderr, flush=True
            )
        time.sleep(0.05)


def obituary(missing: list[int]) -> str:
    return f"{_name(missing)} fallen silent (killed, out of memory, stopped, or the machine is gone); {GO_ON}"


def _name(ranks: list[int]) -> str:
    return f"rank {ranks[0]} has" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} have"


def _end(message: str | None) -> NoReturn:
    if message is not None:
        tqdm.write(f"error: {message}", file=sys.stderr)  # on a line of its own, below whatever a bar has written
        sys.stderr.flush()
    os._exit(USER_ERROR)
