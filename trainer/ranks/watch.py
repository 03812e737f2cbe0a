"""Heartbeats of all ranks of a job: a dead rank is named within seconds, and an error is reported by one rank only.

Without them, a collective waits for a dead rank until its timeout, and then every rank reports an error.
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

# Seconds. SILENCE and DEAF are counted in the rank's own heartbeats, so that a whole job may be suspended.
BEAT = 1.0  # between heartbeats
SILENCE = 10.0  # a rank without a heartbeat for so long counts as dead
DEAF = 30.0  # if the store does not answer for so long, rank 0, which holds it, counts as dead
ROLL_CALL = 3.0  # living ranks answer within this time after a connection broke
COMING = 600.0  # all ranks must arrive within this time
LATE = 15.0  # after this time, each machine says for which ranks it waits
GO_ON = "the others have stopped too; the same command goes on from the last checkpoint"


class Watch:
    """Exchanges heartbeats and the first error through a store. A thread of every rank looks there each second."""

    def __init__(self, place: Place) -> None:
        self.place = place
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            store = open_store(address, port, place)
            # a second connection, because calls of the process group may block the first one
            own = TCPStore(address, port, is_master=False, wait_for_workers=False)
            start = meet(own, place)
        except RuntimeError as error:
            raise UserError(
                f"rank {place.rank}: cannot meet the others at {address}:{port} ({one_line(error)})"
            ) from error
        self.group_store, self._store = PrefixStore(f"group/{start}", store), PrefixStore(f"watch/{start}", own)
        self._lock = threading.Lock()
        self._over = threading.Event()  # set when this rank leaves
        self._heard = False  # whether another rank has reported an error
        # first heartbeat, so that a rank that dies before its thread starts is noticed too
        self._store.set(f"beat/{place.rank}", "0")
        self._beats = 0  # heartbeats sent by the thread
        threading.Thread(target=self._keep_watch, daemon=True).start()
        threading.Thread(target=self._mind_the_store, daemon=True).start()

    def leave(self) -> None:
        """Leave the job without an error. Rank 0 leaves last, because it may hold the store."""
        self._over.set()
        with self._lock:
            self._store.set(f"left/{self.place.rank}", "")
            if self.place.rank == 0:
                self._store.wait([f"left/{other}" for other in range(self.place.world)], timedelta(seconds=60))

    def speaks_first(self, message: str) -> bool:
        """Whether this rank is the first with an error and must report it; the others exit silently."""
        self._over.set()
        # a process group can keep the interpreter from exiting
        hanging = threading.Timer(SILENCE, os._exit, [USER_ERROR])
        hanging.daemon = True
        hanging.start()
        if self._heard:
            return False
        try:
            with self._lock:
                first: bool = self._store.add("errors", 1) == 1
                if first:
                    self._store.set("ended", message)
        except RuntimeError:  # rank 0 held the store and is gone
            return self.place.rank == 1
        if self.place.rank == 0:
            time.sleep(2 * BEAT)  # the store ends with this process; let the others read it first
        return first

    def roll_call(self) -> list[int]:
        """Ranks that no longer answer, after a broken connection or an interrupt."""
        missing = list(range(self.place.world))
        started = time.monotonic()
        try:
            with self._lock:
                self._store.set(f"here/{self.place.rank}", "")
                self._store.set("roll call", "")  # ranks stuck in a collective answer from their watch thread
            while missing and time.monotonic() - started < ROLL_CALL:
                time.sleep(0.1)
                with self._lock:
                    missing = [other for other in missing if not self._store.check([f"here/{other}"])]
        except RuntimeError:
            return [0]
        return missing

    def _keep_watch(self) -> None:
        """Thread: send a heartbeat, check for a reported error and for silent ranks.

        Rank 0 watches all others; all others watch rank 0.
        """
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
            except RuntimeError:  # rank 0 is gone; the main thread may report it already
                if not self._over.wait(ROLL_CALL):
                    _end(self._obituary_of_store())
                return
            if self._heard:
                if not self._over.wait(BEAT / 2):  # the main thread is stuck in a collective
                    _end(None)
                return
            if silent:
                message = obituary(silent)
                _end(message if self.speaks_first(message) else None)

    def _obituary_of_store(self) -> str | None:
        """The message that rank 0 is gone, on one rank of each machine: without a store, ranks cannot agree on one."""
        return obituary([0]) if self.place.rank == 1 or self.place.local_rank == 0 else None

    def _silent(self, others: range, beats: dict[int, tuple[bytes, int]]) -> list[int]:
        """Ranks without a recent heartbeat. ``beats``: each rank's last heartbeat, and this rank's number then."""
        for other in others:
            key = f"beat/{other}"
            value = self._store.get(key) if self._store.check([key]) else b""
            if other not in beats or beats[other][0] != value or self._store.check([f"left/{other}"]):
                beats[other] = (value, self._beats)
        return [other for other, (value, since) in beats.items() if value and (self._beats - since) * BEAT > SILENCE]

    def _mind_the_store(self) -> None:
        """Second thread: end this rank if the first thread hangs because rank 0, which holds the store, is frozen."""
        seen, rounds = 0, 0
        while not self._over.wait(BEAT):
            seen, rounds = self._beats, rounds + 1 if self._beats == seen else 0
            if rounds * BEAT > DEAF:
                _end(self._obituary_of_store())


def open_store(address: str, port: int, place: Place) -> Store:
    """The store in which the ranks meet: torchrun's if it offers one, else rank 0 holds it and the others wait for it.

    This function and `meet` replace torch's rendezvous, which waits in C++, deaf to Ctrl-C and SIGTERM.
    Raises UserError when rank 0 does not come.
    """
    holds = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    patience = Patience(place)
    while not holds and (why := _no_answer(address, port)):
        patience.wait([0], f"{address}:{port}: {why}")
    return TCPStore(address, port, is_master=holds, wait_for_workers=False, timeout=timedelta(seconds=COMING))


def _no_answer(address: str, port: int) -> str | None:
    """Why a connection fails; None when it succeeds."""
    try:
        socket.create_connection((address, port), timeout=1).close()
    except OSError as error:  # includes unknown host names, which may still become known
        return (error.strerror or str(error)).lower()
    return None


def meet(store: Store, place: Place) -> str:
    """Wait for all ranks, and return a name for this start of the job, equal on all ranks and new for every start.

    torchrun's store outlives a restart and still holds the keys of earlier starts, and machines count restarts
    separately. So each rank calls with a random word, rank 0 answers to that word with the name, and the rank confirms.
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
            if store.check([f"call/{other}"]):  # perhaps a call of an earlier start, whose answer nobody reads
                store.set(f"answer/{store.get(f'call/{other}').decode()}", word)
        patience.wait(missing)
    return word


class Patience:
    """Limits how long a rank waits for others. One rank of each machine reports the wait after `LATE` seconds."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.since = time.monotonic()
        self.to_say = place.local_rank == 0

    def wait(self, missing: list[int], why: str = "") -> None:
        """Wait a moment. Raises UserError after `COMING` seconds in all. why: the reason, to be reported with it."""
        waited = time.monotonic() - self.since
        reason = f" ({why})" if why else ""
        if waited > COMING:
            late = f"{_name(missing)} not come in {COMING / 60:.0f} minutes{reason}"
            raise UserError(f"of {self.place.world} ranks, {late}; look at the log of that machine")
        if waited > LATE and self.to_say:
            self.to_say = False
            print(
                f"rank {self.place.rank}: {_name(missing)} not come yet{reason}; waiting", file=sys.stderr, flush=True
            )
        time.sleep(0.05)


def obituary(missing: list[int]) -> str:
    """The message that names dead ranks and the way to go on."""
    return f"{_name(missing)} fallen silent (killed, out of memory, stopped, or the machine is gone); {GO_ON}"


def _name(ranks: list[int]) -> str:
    return f"rank {ranks[0]} has" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} have"


def _end(message: str | None) -> NoReturn:
    if message is not None:
        tqdm.write(f"error: {message}", file=sys.stderr)  # tqdm starts a new line below its bars
        sys.stderr.flush()
    os._exit(USER_ERROR)
