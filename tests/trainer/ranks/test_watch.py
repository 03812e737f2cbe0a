"""Ranks meet in a store that an earlier start of the job may have left full of words."""

from __future__ import annotations

import re
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from manifests import UserError
from trainer.ranks import watch
from trainer.ranks.place import Place
from trainer.ranks.watch import Watch, meet


def connect(server: TCPStore) -> TCPStore:
    return TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)


def start(server: TCPStore, world: int) -> list[str]:
    """What each rank of a job takes for the name of its start."""
    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(lambda rank: meet(connect(server), Place(rank, world, rank)), range(world)))


def test_all_ranks_of_a_start_meet_and_no_others() -> None:
    """Started again with more, then with fewer ranks, beside a store's memory of all starts before."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    names = [start(server, world) for world in (3, 5, 2)]
    assert [len(set(each)) for each in names] == [1, 1, 1]
    assert len({each[0] for each in names}) == 3


@pytest.mark.parametrize(("here", "missing"), [(0, "rank 2 has"), (1, "rank 0 has")])
def test_a_rank_that_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch, here: int, missing: str) -> None:
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setattr(watch, "COMING", 0.5)
    server.set("call/2", "of an earlier start")
    with ThreadPoolExecutor(2) as pool:
        other = pool.submit(meet, connect(server), Place(1, 3, 1)) if here == 0 else None
        with pytest.raises(UserError, match=f"of 3 ranks, {missing} not come"):
            meet(connect(server), Place(here, 3, here))
        assert other is None or other.result()


@pytest.mark.parametrize("here", [0, 1])
def test_a_rank_alone_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch, here: int) -> None:
    """Whether it holds the store or looks for it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.setattr(watch, "COMING", 0.5)
    with pytest.raises(UserError, match=f"of 2 ranks, rank {1 - here} has not come"):
        Watch(Place(here, 2, here))


def test_it_says_for_whom_a_machine_waits(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """One rank of each machine says it once, long before it gives up, and names the host that cannot be found."""
    monkeypatch.setenv("MASTER_ADDR", "rank-0.invalid")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setattr(watch, "COMING", 1.0)
    monkeypatch.setattr(watch, "LATE", 0.1)
    why = r"\(rank-0\.invalid:29500: .*(not known|resol|no address).*\)"
    for local_rank in (0, 1):
        with pytest.raises(UserError, match=rf"of 4 ranks, rank 0 has not come in 0 minutes {why}; look"):
            Watch(Place(2 + local_rank, 4, local_rank))
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and re.fullmatch(rf"rank 2: rank 0 has not come yet {why}; waiting", lines[0]), lines


def test_a_port_that_is_taken_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        with pytest.raises(
            UserError, match=rf"^rank 0: cannot meet the others at 127\.0\.0\.1:{taken.getsockname()[1]} \(.*listen"
        ):
            Watch(Place(0, 2, 0))
