"""The index of a stream: mapped, shared, rebuilt when needed; a run of ImageNet's size opens in flat memory."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from manifests.files.cache import cache_folder
from shards import ShardDataset, TrainingReader
from shards.benchmark import write_manifest


def test_arrays_are_views_of_the_mapped_file(plain_run: Path) -> None:
    index = ShardDataset(str(plain_run), "dad").index
    for array in (index.shard, index.label, index.offset, index.size, index.crc32):
        assert not array.flags.owndata and not array.flags.writeable
    assert (cache_folder("indexes") / f"{index.name}.arrow").exists()


@pytest.mark.parametrize("harm", ["cut", "emptied", "removed", "nonsense", "flipped"])
def test_a_damaged_index_is_made_anew(plain_run: Path, harm: str) -> None:
    """Even if one bit of an offset flipped: the cache folder's disk is at fault, and no sound tar gets the blame."""
    expected = ShardDataset(str(plain_run), "clean")
    path = cache_folder("indexes") / f"{expected.index.name}.arrow"
    data = path.read_bytes()
    path.unlink()  # the mapped pages stay as they were
    flipped = bytearray(data)
    flipped[data.index(expected.index.offset.tobytes()) + 8 * 5 + 1] ^= 2
    if harm != "removed":
        harmed = {
            "cut": data[: len(data) // 2],
            "emptied": b"",
            "nonsense": b"ARROW1\0\0" + bytes(1000),
            "flipped": flipped,
        }
        path.write_bytes(harmed[harm])
    found = ShardDataset(str(plain_run), "clean")
    assert np.array_equal(found.index.offset, expected.index.offset) and path.read_bytes() == data


KEEPER = """
import sys, time
from pathlib import Path
import pyarrow as pa
from shards.index import kept_table

def make():
    with open(sys.argv[1], "a") as file:
        file.write("made\\n")
    time.sleep(0.5)
    return pa.table({"n": [1, 2, 3]})

print(kept_table("shared", make).column("n").to_pylist(), Path(sys.argv[2]).stat().st_ino)
"""


def test_processes_that_find_no_index_make_it_once(tmp_path: Path, forked: Callable[..., object]) -> None:
    """One process makes the index, the others use it: nobody replaces a whole file that others may have mapped."""
    arguments = (KEEPER, tmp_path / "made", tmp_path / "indexes" / "shared.arrow")
    with ThreadPoolExecutor(3) as pool:
        result = list(pool.map(lambda _: forked(*arguments, DAD_CACHE=str(tmp_path)).stdout, range(3)))  # type: ignore[attr-defined]
    assert len(set(result)) == 1 and result[0].startswith("[1, 2, 3]") and (tmp_path / "made").read_text() == "made\n"


def test_indexes_that_nobody_reads_are_removed(
    plain_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writing an index removes those that nobody reads; one that is read or mapped stays, however old it is."""
    monkeypatch.setenv("DAD_CACHE", str(tmp_path))
    old, used = (ShardDataset(str(plain_run), stream).index for stream in ("clean", "dad"))
    for index in (old, used):
        os.utime(tmp_path / "indexes" / f"{index.name}.arrow", (0, 0))
    ShardDataset(str(plain_run), "dad")
    write_manifest(tmp_path / "other", 2000, 2)
    new = ShardDataset(str(tmp_path / "other"), "clean").index
    assert {path.stem for path in (tmp_path / "indexes").glob("*.arrow")} == {used.name, new.name}
    assert old.offset[0] == 0


def test_another_manifest_has_another_index(plain_run: Path, make_run: Callable[..., Path], tmp_path: Path) -> None:
    """Runs never see each other's index; a copy of a run shares the index of its original."""
    copy = Path(shutil.copytree(plain_run, tmp_path / "copy"))
    other = make_run(tmp_path / "other", sizes=(9, 12))
    names = [ShardDataset(str(run), "dad").index.name for run in (plain_run, copy, other)]
    assert names[0] == names[1] != names[2]
    assert ShardDataset(str(plain_run), "clean").index.name != names[0]


def test_workers_are_sent_a_path_and_no_data(plain_run: Path) -> None:
    """Without fork, a worker opens the index itself: what it receives does not grow with the run."""
    reader = TrainingReader(str(plain_run), batch_size=7)
    list(reader.batches(0))
    data = pickle.dumps(reader)
    assert len(data) < 4000
    again = pickle.loads(data)
    assert [part.keys for part in next(again.batches(1)).values()] == [
        part.keys for part in next(reader.batches(1)).values()
    ]


PROGRAM = """
import json, os, sys
import numpy as np
from shards import TrainingReader
from shards.benchmark import private_bytes

def child_growth(work):
    # growth of a forked worker's own memory while it reads all of the index and the plan
    receive, send = os.pipe()
    if os.fork() == 0:
        before = private_bytes()
        work()
        os.write(send, str(private_bytes() - before).encode())
        os._exit(0)
    os.wait()
    return int(os.read(receive, 100))

start = private_bytes()
reader = TrainingReader(sys.argv[1], batch_size=1024, streams=("clean",))
opened = private_bytes() - start
plan = reader.plan("clean", 0)
planned = private_bytes() - start
def epochs(numbers):
    for epoch in numbers:
        for step in range(reader.steps):
            reader.indices("clean", epoch, step)
epochs(range(1, 3))
settled = private_bytes()
epochs(range(3, 13))
flat = private_bytes() - settled
index = reader.datasets["clean"].index
def touch():
    for array in (index.shard, index.label, index.offset, index.size, index.crc32, reader.plan("clean", 12).order):
        int(array.astype(np.int64, copy=False)[::100].sum())
    for step in range(0, reader.steps, 10):
        reader.indices("clean", 12, step)
order = plan.order
print(json.dumps({
    "opened": opened, "planned": planned, "flat": flat, "worker": child_growth(touch),
    "steps": reader.steps, "tars": len(index.tars),
    "permutation": bool(np.array_equal(np.sort(order), np.arange(len(order)))),
    "windows": [len(plan.windows), max(map(len, plan.windows))],
    "locality": max(len(np.unique(index.shard[order[a:b]])) for a, b in zip([0, *plan.ends[:-1]], plan.ends)),
}))
"""


@pytest.mark.slow
def test_imagenet_sized_run_in_flat_memory(tmp_path: Path, python: Callable[..., object]) -> None:
    """1,281,167 samples in 1,282 shards take the memory of one plan, whatever the epochs; a worker takes little."""
    samples = 1_281_167
    write_manifest(tmp_path / "run", samples, 1282)
    python(PROGRAM, tmp_path / "run")  # makes the index
    result = python(PROGRAM, tmp_path / "run")
    found = json.loads(result.stdout)  # type: ignore[attr-defined]
    assert found["permutation"] and found["steps"] == samples // 1024 and found["tars"] == 1282
    assert found["windows"] == [81, 16] and found["locality"] == 16
    megabyte = 1 << 20
    assert found["opened"] < 24 * megabyte and found["planned"] < 24 * megabyte + 8 * samples * 3
    assert found["flat"] < 8 * samples * 1.5  # ten more epochs leave at most one plan behind
    assert found["worker"] < 16 * megabyte
