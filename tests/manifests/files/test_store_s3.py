"""The same store on a real S3 server that fails: a file is whole or not there; a read succeeds or one line says why."""

from __future__ import annotations

import os
import threading
import uuid

import pytest

from manifests import Store, Unreachable, Unwritable, UserError

from ...chaos.faulty_store import FaultyProxy

BUSY = {"503": 0.12, "cut answer": 0.06, "cut request": 0.06}


@pytest.fixture
def store(object_store: FaultyProxy) -> Store:
    return Store(f"s3://bucket/{uuid.uuid4().hex}")


def test_listings_are_never_from_a_cache(store: Store) -> None:
    """What another client writes or removes is seen at once, in listings, sizes and ranges."""
    other = Store(store.url + "/")
    assert store.names("a") == [] and not store.exists("a/x")
    other.fs.pipe_file(f"{other.root}/a/x", b"123")
    assert store.sizes("a") == {"x": 3} and store.exists("a/x") and store.read_range("a/x", 1, 9) == b"23"
    store.write("a/x", b"12345")
    assert store.size("a/x") == 5 and store.read("a/x") == b"12345"
    store.remove("a/x")
    store.remove("a/x")
    assert store.names("a") == []


def test_one_of_many_creates(store: Store) -> None:
    """Of eight clients that create one file at once, one succeeds and its content stays; repeating it is no refusal."""
    answers: list[tuple[bool, bytes]] = []
    contents = [bytes([n]) for n in range(8)]
    threads = [threading.Thread(target=lambda c=c: answers.append((store.create("x", c), c))) for c in contents]  # type: ignore[misc]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [store.read("x")] == [content for made, content in answers if made]
    assert store.create("x", store.read("x")) and not store.create("x", b"else")


def test_a_busy_store(store: Store, object_store: FaultyProxy, faults: dict[str, float]) -> None:
    """503s and cut connections in both directions: every operation gives in the end what it should."""
    faults |= BUSY
    before = object_store.seen.copy()
    for n in range(25):
        data = os.urandom(20_000)
        store.write(f"d/{n}", data)
        assert store.read(f"d/{n}") == data and store.size(f"d/{n}") == len(data)
    assert len(store.names("d")) == 25
    assert all(object_store.seen[fault] > before[fault] for fault in BUSY), object_store.seen


def test_a_cut_upload_is_never_seen(store: Store, faults: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every upload is cut in the middle: one line names the URL; the old content is there, a new name is not."""
    monkeypatch.setattr("manifests.files.store.PAUSES", (None,))
    monkeypatch.setattr(type(store.fs), "retries", 1)
    store.write("old", b"old")
    faults["cut request"] = 1.0
    for name in ("old", "new"):
        with pytest.raises(Unwritable, match=f"{store}/{name}: ") as caught:
            store.write(name, bytes(100_000))
        assert "\n" not in str(caught.value)
    faults.clear()
    assert store.read("old") == b"old" and store.names("") == ["old"]


def test_a_store_that_does_not_answer(store: Store, faults: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors of reading and of writing differ: one concerns a file, the other the place."""
    monkeypatch.setattr("manifests.files.store.PAUSES", (None,))
    monkeypatch.setattr(type(store.fs), "retries", 1)
    faults["503"] = 1.0
    for read in (lambda: store.read("x"), lambda: store.size("x"), lambda: store.names("")):
        with pytest.raises(Unreachable, match=f"{store}/x?: the store refuses or cannot be reached"):
            read()
    for write in (lambda: store.write("x", b""), lambda: store.create("x", b""), lambda: store.remove("x")):
        with pytest.raises(Unwritable, match=f"{store}/x: the store refuses or cannot be reached"):
            write()


def test_no_such_bucket(object_store: FaultyProxy) -> None:
    store = Store("s3://no-such-bucket/run")
    assert store.names("a") == [] and not store.exists("x")
    with pytest.raises(UserError, match="s3://no-such-bucket/run/x: cannot write here"):
        store.write("x", b"")


def test_a_store_survives_a_fork(store: Store) -> None:
    """Loader workers are forks: each opens its own connection."""
    store.write("x", b"content")
    assert store.read("x") == b"content"
    child = os.fork()
    if not child:
        os._exit(store.read_range("x", 0, 3) != b"con" or store.read("x") != b"content")
    assert os.waitpid(child, 0)[1] == 0 and store.read("x") == b"content"
