"""The one place that opens paths and URLs: a file is there whole or not at all."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from manifests import Store, Unwritable, UserError


@pytest.fixture(params=["local", "memory", "file-url"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """The same tests for a local path, a memory:// URL and a file:// URL."""
    urls = {
        "local": str(tmp_path / "s"),
        "memory": f"memory://{tmp_path.name}/s",
        "file-url": f"file://{tmp_path / 's'}",
    }
    return Store(urls[request.param])


def test_reads_what_was_written(store: Store) -> None:
    """Whole, in ranges, as size and sha256; replaced by a second write; listed without folders above."""
    data = os.urandom(5000)
    assert not store.exists("a/b.bin") and store.names("a") == []
    store.write("a/b.bin", b"old")
    store.write("a/b.bin", data)
    store.write("a/a.bin", b"")
    assert store.exists("a/b.bin") and store.read("a/b.bin") == data and store.size("a/b.bin") == 5000
    assert store.sha256("a/b.bin") == hashlib.sha256(data).hexdigest()
    assert store.names("a") == ["a.bin", "b.bin"]
    assert abs(store.modified("a/b.bin") - time.time()) < 60
    with store.open("a/b.bin") as file:
        file.seek(100)
        assert file.read(7) == data[100:107]
    assert store.where("a/b.bin") == f"{store}/a/b.bin"


def test_ranges(store: Store) -> None:
    """`read_range` gives exactly the bytes asked for, fewer at the end, and FileNotFoundError without a file."""
    store.write("x", bytes(range(256)) * 20)
    for offset, size in ((0, 10), (250, 300), (5110, 10), (5119, 1)):
        assert store.read_range("x", offset, size) == (bytes(range(256)) * 20)[offset : offset + size]
    assert store.read_range("x", 5110, 100) == (bytes(range(256)) * 20)[5110:]
    for read in (lambda: store.read_range("y", 0, 1), lambda: store.read("y"), lambda: store.size("y")):
        with pytest.raises(FileNotFoundError):
            read()


def test_a_trailing_slash_does_not_matter(tmp_path: Path) -> None:
    Store(f"{tmp_path}/").write("x", b"1")
    assert Store(tmp_path).read("x") == b"1" and str(Store(f"{tmp_path}/")) == str(tmp_path)


def test_the_root_and_whole_stores() -> None:
    """The slash of "/" and "scheme://" is no trailing slash."""
    assert (
        str(Store("/")) == "/"
        and Store("/").where("x") == "/x"
        and Store("/").exists()
        and Store("/").exists(__file__[1:])
    )
    Store("memory://").write("at-the-top", b"1")
    assert Store("memory://").read("at-the-top") == b"1" == Store("memory:///").read("at-the-top")
    assert not Path("memory:").exists()


def test_writable_or_not(store: Store, tmp_path: Path, small_disk: Callable[[str], Path]) -> None:
    """The check leaves nothing behind; a folder that is not there yet is judged by the folder above it."""
    store.check_writable()
    assert not store.exists() and not any(path for path in tmp_path.iterdir() if path.name != "disk")
    store.write("x", b"")
    store.check_writable()
    assert store.names("") == ["x"]
    for url in (tmp_path / "file", tmp_path / "file" / "run"):
        (tmp_path / "file").touch()
        with pytest.raises(Unwritable, match=f"{url}/: cannot write here"):
            Store(url).check_writable()
    disk = small_disk("size=64k")
    small_disk("remount,ro")
    with pytest.raises(Unwritable, match=f"{disk}/a/b/: cannot write here"):
        Store(disk / "a" / "b").check_writable()


def test_one_creates(store: Store) -> None:
    """`create` never replaces a file, and says whose it is."""
    assert store.create("x", b"first") and not store.create("x", b"second") and store.read("x") == b"first"


def test_readers_never_see_a_part_of_a_file(tmp_path: Path) -> None:
    """While a file is written over and over, whoever reads it sees one version whole, and only its name is listed."""
    store = Store(tmp_path)
    versions = [bytes([n]) * 2_000_000 for n in range(2)]
    store.write("x", versions[0])
    stop = threading.Event()
    torn: list[int] = []

    def look() -> None:
        while not stop.is_set():
            if store.read("x") not in versions or store.names("") != ["x"]:
                torn.append(1)

    readers = [threading.Thread(target=look) for _ in range(2)]
    for reader in readers:
        reader.start()
    for n in range(30):
        store.write("x", versions[n % 2])
    stop.set()
    for reader in readers:
        reader.join()
    assert not torn


def test_full_disk_leaves_what_was_there(small_disk: Callable[[str], Path]) -> None:
    """No room: a UserError that says so and names the file; the old file is whole, the temporary one is gone."""
    disk = small_disk("size=256k")
    store = Store(disk)
    store.write("x", b"old")
    with pytest.raises(UserError, match=r"disk/x: the disk is full; free some space") as caught:
        store.write("x", bytes(1_000_000))
    assert "\n" not in str(caught.value)
    assert store.read("x") == b"old" and [path.name for path in disk.iterdir()] == ["x"]
    store.write("x", bytes(100_000))
    assert store.size("x") == 100_000


def test_read_only_places(small_disk: Callable[[str], Path]) -> None:
    """A disk that becomes read-only: a UserError naming the file; what was there stays readable."""
    store = Store(small_disk("size=64k"))
    store.write("a/x", b"old")
    small_disk("remount,ro")
    for name in ("a/x", "b/y"):
        with pytest.raises(UserError, match=f"disk/{name}: cannot write here"):
            store.write(name, b"new")
    assert store.read("a/x") == b"old" and store.names("a") == ["x"] and not store.exists("b")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to any folder")
def test_folders_without_permission(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o555)
    with pytest.raises(UserError, match="cannot write here"):
        Store(tmp_path / "closed").write("x", b"")
    assert list((tmp_path / "closed").iterdir()) == []


def test_a_file_in_place_of_a_folder(tmp_path: Path) -> None:
    """A path that leads through a file, or is one: a UserError that names it, nothing changed."""
    (tmp_path / "file").write_text("text")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=str(root)):
            Store(root).write("x", b"")
    assert (tmp_path / "file").read_text() == "text"


LIMITED = """
import resource, signal, sys
from manifests import Store, UserError
store = Store(sys.argv[1])
store.write("x", b"old")
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    store.write("x", bytes(5000))
except (UserError, OSError):
    print("refused")
print(store.names(""), store.read("x"), len(list(__import__("pathlib").Path(sys.argv[1]).iterdir())))
"""


def test_a_limit_on_file_sizes(tmp_path: Path, forked: Callable[..., Any]) -> None:
    """A file larger than `ulimit -f` or the file system allows: an error, the old file whole, nothing left behind."""
    told = forked(LIMITED, tmp_path)
    assert told.stdout == "refused\n['x'] b'old' 1\n", told.stderr[-500:]


@pytest.mark.parametrize("url", ["nonsense://x/run", "s3://bucket/run"])
def test_urls_that_cannot_be_opened(url: str) -> None:
    """A protocol that fsspec does not know, or whose package is missing, is refused in one line that names the URL."""
    if url.startswith("s3"):
        try:
            import s3fs  # noqa: F401
        except ImportError:
            pass
        else:
            pytest.skip("s3fs is installed: the URL could be opened")
    with pytest.raises(UserError, match=url):
        Store(url)


def test_links_and_folders(tmp_path: Path) -> None:
    """A link counts as what it leads to, with the size of that; one to nothing, or round in circles, as nothing."""
    (tmp_path / "d" / "below").mkdir(parents=True)
    (tmp_path / "x").write_bytes(b"123")
    for name, target in (("file", "../x"), ("folder", "below"), ("nothing", "gone"), ("circle", "circle")):
        (tmp_path / "d" / name).symlink_to(target)
    store = Store(tmp_path)
    assert store.sizes("d") == {"file": 3} and store.folders("d") == ["below", "folder"] and store.folders("gone") == []


def test_stale_temporaries(tmp_path: Path) -> None:
    """Temporary files are not listed; those of this host's dead processes are removed, all other files stay."""
    from manifests.files.atomic import HOST

    names = [f".x.tar.{HOST}.{pid}.tmp" for pid in (2**22 + 5, os.getpid())] + [
        ".x.tar.elsewhere.7.tmp",
        ".hidden",
        "x.tmp",
    ]
    (tmp_path / "d").mkdir()
    for name in names:
        (tmp_path / "d" / name).write_bytes(b"")
    store = Store(tmp_path)
    assert store.names("d") == [".hidden", "x.tmp"]
    store.remove_stale_temporaries()
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == sorted(names[1:])
    Store(tmp_path / "nowhere").remove_stale_temporaries()
    Store("memory://nowhere").remove_stale_temporaries()
