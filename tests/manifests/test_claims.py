"""Claims are advice: one worker of many takes a shard, clocks are never compared, nobody removes another's claim."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from manifests import Store, claims
from manifests.claims import Claim, Claims, clear, forget, look, read_claim, read_failure, record_failure


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A heartbeat every 50 ms, and silence after half a second."""
    monkeypatch.setattr(claims, "BEAT", 0.05)
    monkeypatch.setattr(claims, "SILENT", 0.5)


def elsewhere(store: Store, shard: int, monkeypatch: pytest.MonkeyPatch) -> Claims:
    """A worker on another machine that has claimed a shard and never beats."""
    with monkeypatch.context() as patch:
        patch.setattr(claims, "_MACHINE", "another")
        worker = Claims(store)
        assert worker.take(shard)
    return worker


def test_one_of_many_takes_a_shard(store: Store) -> None:
    workers = [Claims(store) for _ in range(8)]
    taken: list[bool] = []
    threads = [threading.Thread(target=lambda w=worker: taken.append(w.take(3))) for worker in workers]  # type: ignore[misc]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(taken) == 1 and look(store).running == {3}
    (owner,) = (worker for worker in workers if worker.mine == {3})
    for worker in workers:
        worker.release(3)  # only the owner's release counts
        assert bool(look(store).running) == (workers.index(worker) < workers.index(owner))


def test_heartbeats(store: Store, quick: None) -> None:
    """A live worker's claim changes and says how far it is; nobody takes it over; at the end no file is left."""
    with Claims(store) as worker:
        assert worker.take(1)
        worker.update(1, samples=5, verified=3, rejected=1, rate=2.5)
        other, seen = Claims(store), set()
        end = time.monotonic() + 1.2
        while time.monotonic() < end:
            assert not other.take_over(1)
            claim = read_claim(store, 1)
            assert claim is not None
            seen.add(claim.beat)
            time.sleep(0.02)
        assert len(seen) > 5 and (claim.samples, claim.verified, claim.rejected, claim.rate) == (5, 3, 1, 2.5)
    assert not store.exists("work")


def test_a_dead_process_of_this_machine(store: Store) -> None:
    """It is found at once by its process id; its death counts as a failed try of the shard."""
    child = os.fork()
    if not child:
        os._exit(not Claims(store).take(2))
    os.waitpid(child, 0)
    worker = Claims(store)
    assert not worker.take(2) and worker.take_over(2) and worker.mine == {2}
    failure = read_failure(store, 2)
    assert failure is not None and failure.tries == 1 and f"process {child}" in failure.reason


@pytest.mark.parametrize("jump", [-86_400.0, 86_400.0])
def test_a_silent_worker_elsewhere(store: Store, quick: None, monkeypatch: pytest.MonkeyPatch, jump: float) -> None:
    """Others take over after watching the silence for a while, not before, even if this machine's clock jumps."""
    elsewhere(store, 4, monkeypatch)
    worker, now = Claims(store), time.time
    assert not worker.take_over(4)
    monkeypatch.setattr(time, "time", lambda: now() + jump)
    os.utime(store.root + "/work/running-000004.json", (now() + jump, now() + jump))
    assert not worker.take_over(4)
    time.sleep(0.6)
    assert worker.take_over(4)


def test_a_worker_that_comes_back(store: Store, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that slept and lost its claim does not remove the new owner's claim when it releases."""
    asleep, worker = elsewhere(store, 4, monkeypatch), Claims(store)
    worker.take_over(4)
    time.sleep(0.6)
    assert worker.take_over(4)
    asleep.release(4)
    claim = read_claim(store, 4)
    assert claim is not None and claim.pid == os.getpid() and claim.worker != asleep._worker


class Late(Claims):
    """A worker that another one overtakes between reading a dead claim and acting on it."""

    def _is_dead(self, claim: Claim) -> bool:
        dead = super()._is_dead(claim)
        assert Claims(self._store).take_over(claim.shard)
        return dead


def test_one_of_many_takes_over(store: Store) -> None:
    """The others leave the new claim alone, and the death counts once."""
    child = os.fork()
    if not child:
        os._exit(not Claims(store).take(2))
    os.waitpid(child, 0)
    worker = Late(store)
    assert not worker.take_over(2) and not worker.mine
    claim, failure = read_claim(store, 2), read_failure(store, 2)
    assert claim is not None and claim.pid == os.getpid() and failure is not None and failure.tries == 1


def test_what_is_no_claim_is_replaced(store: Store) -> None:
    """A file with a claim's name but other content keeps nobody from the shard; a missing file is no dead worker."""
    worker = Claims(store)
    assert not worker.take_over(2)
    store.write("work/running-000002.json", b"{")
    assert not worker.take(2) and worker.take_over(2) and read_failure(store, 2) is None


def test_failures_are_counted_and_forgotten(store: Store) -> None:
    for reason in ("first", "second"):
        record_failure(store, 5, reason)
    failure = read_failure(store, 5)
    assert failure is not None and (failure.tries, failure.reason) == (2, "second") and look(store).failed == {5}
    forget(store, 5)
    forget(store, 5)
    assert read_failure(store, 5) is None
    record_failure(store, 6, "again")
    Claims(store).take(7)
    clear(store)
    assert not store.exists("work")
