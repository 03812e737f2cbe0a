"""Remote runs over a real HTTP server: a bounded cache that processes share, damage, broken connections."""

from __future__ import annotations

import http.server
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from manifests import RunDir, Store, UserError
from manifests.rows import TarRecord
from shards import ShardDataset, TrainingReader
from shards.cache import PAUSES, TarCache
from tests.chaos.faulty_store import FaultyProxy

from ..patience import PATIENCE, wait_for
from ..processes import launch

pytest.importorskip("aiohttp", reason="fsspec's http:// needs aiohttp")


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder; counts whole-file requests by name; may cut the first answers for a name in the middle."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.fetched: Counter[str] = Counter()
        self.cuts: dict[str, int] = {}
        self.folder = folder
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.SimpleHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        self.server.fetched[name] += 1
        if self.server.cuts.get(name, 0) > 0:
            self.server.cuts[name] -= 1
            data = (self.server.folder / name).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
        else:
            super().do_GET()

    def log_message(self, *_arguments: object) -> None:
        pass


@pytest.fixture
def server(plain_run: Path, tmp_path: Path) -> Iterator[Server]:
    served = Server(Path(shutil.copytree(plain_run, tmp_path / "served")))
    yield served
    served.shutdown()
    served.server_close()


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("shards.cache.PAUSES", (0.0, 0.01, 0.02))
    return tmp_path / "cache"


def tars_of(run: Path) -> list[TarRecord]:
    return RunDir(run).manifest()[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_batches_over_http(server: Server, plain_run: Path, workers: int) -> None:
    """A remote run reads as a local one; every tar travels once, in the first epoch."""
    far = TrainingReader(server.url, batch_size=7, seed=1, window=2)
    near = TrainingReader(str(plain_run), batch_size=7, seed=1, window=2)
    far.check()
    server.fetched.clear()  # fsspec asks whether a file exists by GET
    for epoch in range(2):
        for a, b in zip(far.batches(epoch, workers=workers), near.batches(epoch), strict=True):
            for stream in a:
                assert a[stream].keys == b[stream].keys and torch.equal(a[stream].images, b[stream].images)
    tars = {name: count for name, count in server.fetched.items() if name.endswith(".tar")}
    assert set(tars.values()) == {1} and len(tars) == 10


def test_read_ahead(server: Server) -> None:
    """Tars of the next window are fetched before a sample of them is asked for."""
    reader = TrainingReader(server.url, batch_size=1, streams=("clean",), window=1)
    batches = reader.batches(0)
    next(batches)
    plan = reader.plan("clean", 0)
    wanted = [f"clean/clean-{int(plan.windows[n][0]):06d}.tar" for n in (0, 1)]
    wait_for(lambda: all(server.fetched[name] for name in wanted))
    assert sum(count for name, count in server.fetched.items() if "tar" in name) == 2


def test_several_processes_fetch_a_tar_once(server: Server, plain_run: Path) -> None:
    program = (
        "import sys\nfrom manifests import RunDir, Store\nfrom shards.cache import TarCache\n"
        "source, cache = Store(sys.argv[1]), TarCache(1 << 30)\n"
        "for tar in RunDir(sys.argv[2]).manifest()[1]: print(cache.fetch(source, tar))\n"
    )
    processes = [launch("-c", program, server.url, plain_run) for _ in range(3)]
    told = [process.communicate(timeout=PATIENCE)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0] and len(set(told)) == 1
    assert set(server.fetched.values()) == {1} and len(server.fetched) == len(tars_of(plain_run))


def test_the_bound_holds_and_the_oldest_goes(plain_run: Path, cache_folder: Path) -> None:
    """Room is made by what was not used for longest; a file that is being read stays readable."""
    source, tars = Store(plain_run), tars_of(plain_run)
    cache = TarCache(3 * max(tar.size for tar in tars))
    for n, tar in enumerate(tars):
        cache.fetch(source, tar)
        os.utime(cache_folder / "tars" / f"{tar.sha256}.tar", ns=(n * 10**9, n * 10**9))
        held = list((cache_folder / "tars").glob("*.tar"))
        assert sum(path.stat().st_size for path in held) <= cache.limit
    assert {path.stem for path in held} == {tar.sha256 for tar in tars[-len(held) :]} and len(held) >= 3
    small = TarCache(tars[0].size)
    data = (plain_run / tars[0].name).read_bytes()
    for offset in range(0, 2000, 500):  # two tars that push each other out
        assert small.read_range(source, tars[0], offset, 500) == data[offset : offset + 500]
        if tars[1].size <= small.limit:
            small.fetch(source, tars[1])


def test_tars_that_made_room_give_their_blocks_back(plain_run: Path, cache_folder: Path) -> None:
    """No process that has read them keeps them open: the bound is one on the disk, not on names."""
    source, tars = Store(plain_run), tars_of(plain_run)
    cache = TarCache(max(tar.size for tar in tars))
    for tar in tars:
        cache.read_range(source, tar, 0, 512)
    held = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert len(list((cache_folder / "tars").glob("*.tar"))) == 1 and not [
        name for name in held if str(cache_folder) in name
    ]


def test_a_cache_that_is_too_small_is_refused(server: Server) -> None:
    with pytest.raises(UserError, match=r"three windows of 2 shards take .* GiB.*raise cache_gb, or lower window"):
        TrainingReader(server.url, batch_size=7, window=2, cache_gb=1e-6)
    two_windows = sum(
        sum(tar.size for tar in tars_of(server.folder) if tar.name.startswith(stream)) for stream in ("clean", "dad")
    )
    with pytest.raises(UserError, match=r"three windows of 2 shards"):
        TrainingReader(server.url, batch_size=7, window=2, cache_gb=0.9 * two_windows / 2**30)
    tar = tars_of(server.folder)[0]
    with pytest.raises(UserError, match="do not fit into a cache of 100; raise cache_gb"):
        TarCache(100).fetch(Store(server.url), tar)


def test_the_smallest_cache_fetches_every_tar_once(make_run: Callable[..., Path], tmp_path: Path) -> None:
    """Workers stand a window apart, and two streams end their windows at different steps: no tar in use is evicted."""
    server = Server(make_run(tmp_path / "many", sizes=(12,) * 20))
    sizes = sorted((tar.size for tar in tars_of(server.folder)), reverse=True)
    reader = TrainingReader(server.url, batch_size=4, window=2, cache_gb=sum(sizes[:12]) / 2**30)
    for _ in reader.batches(0, workers=4):
        time.sleep(0.01)
    server.shutdown()
    server.server_close()
    tars = {name: count for name, count in server.fetched.items() if name.endswith(".tar")}
    assert set(tars.values()) == {1} and len(tars) == 40


def test_tars_that_vanish_while_room_is_made(plain_run: Path, cache_folder: Path) -> None:
    """A listed file is gone, because somebody cleans the folder: nothing is left to count or to remove."""
    source, tars = Store(plain_run), tars_of(plain_run)
    cache = TarCache(max(tar.size for tar in tars))
    cache.fetch(source, tars[0])
    (cache_folder / "tars" / "gone.tar").symlink_to(cache_folder / "nowhere")
    assert cache.read_range(source, tars[1], 0, 512) == Store(plain_run).read_range(tars[1].name, 0, 512)


def test_a_full_disk_says_what_to_lower(
    plain_run: Path, small_disk: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the tars and of the index: one line with the folder, cache_gb and DAD_CACHE."""
    disk = small_disk("size=32k")
    monkeypatch.setenv("DAD_CACHE", str(disk))
    cache = TarCache(1 << 30)
    wanted = (
        rf"^{disk}/\w+: cannot keep a cache here \(No space left on device\); .*cache_gb, "
        "or set DAD_CACHE"
    )
    with pytest.raises(UserError, match=wanted):
        for tar in tars_of(plain_run):
            cache.fetch(Store(plain_run), tar)
    (disk / "rest").write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize))
    with pytest.raises(UserError, match=wanted):
        ShardDataset(str(plain_run), "clean")


def test_a_connection_that_breaks_once(server: Server) -> None:
    """Half an answer is no tar: it is fetched again."""
    tar = tars_of(server.folder)[0]
    server.cuts[tar.name] = 1
    TarCache(1 << 30).fetch(Store(server.url), tar)
    assert server.fetched[tar.name] == 2


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("harm", ["flip", "truncate", "remove", "cut"])
def test_remote_damage_is_named(
    server: Server, cache_folder: Path, harm: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tar that is not the manifest's never gets a name in the cache; reading stops with its URL, from any worker."""
    monkeypatch.setattr("manifests.files.store.PAUSES", (0.05, None))
    name = "clean/clean-000002.tar"
    path = server.folder / name
    data = bytearray(path.read_bytes())
    if harm == "flip":
        data[700] ^= 1
        path.write_bytes(data)
    elif harm == "truncate":
        path.write_bytes(data[:1024])
    elif harm == "remove":
        path.unlink()
    else:
        server.cuts[name] = 10 * len(PAUSES)
    digest = next(tar.sha256 for tar in tars_of(server.folder) if tar.name == name)
    with pytest.raises(UserError, match=f"^{server.url}/{name}: ") as caught:
        list(TrainingReader(server.url, batch_size=7, window=2).batches(0, workers=workers))
    assert "\n" not in str(caught.value) and not (cache_folder / "tars" / f"{digest}.tar").exists()


def test_an_unwritable_cache_says_which_variable(
    plain_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DAD_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="DAD_CACHE"):
        TrainingReader(str(plain_run), batch_size=7)


def test_a_cached_tar_that_the_disk_has_damaged_is_fetched_again(
    server: Server, cache_folder: Path, plain_run: Path
) -> None:
    """The remote is whole: a reader does not fail for ever, and does not blame the remote."""
    cache = TarCache(1 << 30)
    dataset = ShardDataset(server.url, "clean", cache=cache)
    expected = dataset[0]
    (tar,) = (cache_folder / "tars").glob("*.tar")
    data = bytearray(tar.read_bytes())
    data[600] ^= 1
    tar.write_bytes(data)
    again = dataset[0]
    assert again.image is not None and expected.image is not None and torch.equal(again.image, expected.image)
    assert server.fetched["clean/clean-000000.tar"] == 2
    assert tar.read_bytes() == (plain_run / "clean" / "clean-000000.tar").read_bytes()


def test_few_requests_before_the_first_step(object_store: FaultyProxy, plain_run: Path) -> None:
    """A run that this machine has opened before costs run.json and one listing a stream, however many tars it has."""
    store = Store("s3://bucket")
    for path in plain_run.rglob("*.*"):
        store.write(f"few/{path.relative_to(plain_run)}", path.read_bytes())
    TrainingReader("s3://bucket/few", batch_size=7, window=2)
    before = object_store.seen["forwarded"]
    reader = TrainingReader("s3://bucket/few", batch_size=7, window=2)
    opened = object_store.seen["forwarded"]
    reader.check()
    checked = object_store.seen["forwarded"]
    assert opened - before <= 4 and checked - opened == 2  # each stream reads run.json, whose size s3fs asks for first
    store.write("few/dad/dad-000002.tar", b"short")
    with pytest.raises(UserError, match=r"s3://bucket/few/dad/dad-000002\.tar: 5 bytes, the manifest says"):
        reader.check()
    store.remove("few/clean/clean-000004.tar")
    with pytest.raises(UserError, match=r"s3://bucket/few/clean/clean-000004\.tar: missing"):
        reader.check()


def test_a_server_that_lists_nothing(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A web server forbids listings: files are compared one by one, and it is not asked for a listing again."""
    monkeypatch.setattr(Handler, "list_directory", lambda handler, _path: handler.send_error(403))
    reader = TrainingReader(server.url, batch_size=7, window=2)
    server.fetched.clear()
    reader.check()
    assert server.fetched["clean/"] + server.fetched["clean"] <= 2  # the latter is redirected to the former
    (server.folder / "dad" / "dad-000001.tar").write_bytes(b"short")
    with pytest.raises(UserError, match=r"dad-000001\.tar: 5 bytes, the manifest says"):
        reader.check()
