"""A run directory: what is done, what is refused, what sealing writes."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from manifests import RunDir, RunInfo, UserError
from manifests.rundir import count_statuses, part_name, tar_name


def info(**changes: Any) -> RunInfo:
    made = RunInfo(
        recipe={"seed": 0}, identity={"seed": 0, "attack.eps": 0.1}, fingerprints={"teacher": "t", "source": "s"},
        classes=["a", "b"], shards=2, samples=4, versions={"torch": "1"},
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


@pytest.fixture
def run(plain_run: Path, tmp_path: Path) -> RunDir:
    return RunDir(shutil.copytree(plain_run, tmp_path / "run"))


@pytest.mark.parametrize("scheme", ["", "memory://"])
def test_info_roundtrip(tmp_path: Path, scheme: str) -> None:
    directory = RunDir(f"{scheme}{tmp_path}/new")
    directory.begin(info())
    assert directory.info() == info()


def test_claim(tmp_path: Path) -> None:
    """The same run may begin again with other versions; another field or fingerprint is refused: name, old and new."""
    directory = RunDir(tmp_path)
    directory.begin(info())
    directory.begin(info(versions={"torch": "2"}))
    assert directory.info().versions == {"torch": "1"}  # what made the first shards
    for changed, message in (
        (info(identity={"seed": 1, "attack.eps": 0.1}), r"seed was 0, now 1; choose another OUT, or set it back"),
        (info(identity={"seed": 0, "attack.eps": 0.2}), r"attack\.eps was 0\.1, now 0\.2"),
        (info(identity={"seed": 0}), r"attack\.eps was 0\.1, now None"),
        (info(identity={"seed": 0, "attack.eps": 0.1, "new": 5}), r"new was None, now 5"),
        (
            info(fingerprints={"teacher": "u", "source": "s"}),
            r"the teacher \(its content's fingerprint\) was 't', now 'u'",
        ),
    ):
        with pytest.raises(UserError, match=message):
            directory.begin(changed)
    assert directory.info() == info()


@pytest.mark.parametrize("scheme", ["", "memory://"])
@pytest.mark.parametrize(
    "name", ["README.md", "gallery.png", "clean/mine.txt", "dad/mine.txt", "manifest/mine.txt", "manifest.parquet"]
)
def test_files_of_others_are_not_overwritten(tmp_path: Path, scheme: str, name: str) -> None:
    """A new run refuses a place that holds one of its names; with a run.json there, the names belong to that run."""
    directory = RunDir(f"{scheme}{tmp_path}")
    directory.check_place()
    directory.store.write("notes.txt", b"")
    directory.check_place()
    directory.store.write(name, b"mine")
    with pytest.raises(UserError, match=rf"{tmp_path}/{name.partition('/')[0]}: is in the way of a new run"):
        directory.check_place()
    directory.write_info(info())
    directory.check_place()
    assert directory.store.read(name) == b"mine"


def test_an_empty_place() -> None:
    with pytest.raises(UserError, match="OUT: the name is empty; name a folder"):
        RunDir("")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged"), (b"{", "damaged"), (b"null", "damaged"), (b"[]", "damaged"), (b"\xff", "damaged"),
        (b'{"format": 2}', "format 2, this version reads format 1"), (b"{}", "format None"),
        (b'{"format": 1, "what": 3}', "damaged"),
    ],
)  # fmt: skip
def test_damaged_run_json(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"run\.json: {message}"):
        RunDir(tmp_path).info()


def test_fields_of_the_wrong_type_in_run_json(run: RunDir) -> None:
    """run.json with text for a number, or a number for a list, is refused as damaged, without a stack trace later."""
    tree = json.loads(run.store.read("run.json"))
    for field, value in (
        ("shards", "five"),
        ("classes", 3),
        ("samples", None),
        ("identity", []),
        ("fingerprints", "x"),
        ("counts", 7),
    ):
        run.store.write("run.json", json.dumps({**tree, field: value}).encode())
        with pytest.raises(UserError, match=r"run\.json"):
            RunDir(run.store.url).info()


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run directory here \(no run\.json\); make one with `make shards OUT="):
        RunDir(tmp_path).info()


def test_a_shard_is_done_when_its_part_and_tars_are_there(run: RunDir) -> None:
    """A shard is done when its part file and the tars it names (size, sha256) are there; the reason names the file."""
    mark = run.info().fingerprint
    assert [run.damage(shard, mark) for shard in range(5)] == [None] * 5
    assert "belongs to another run" in (run.damage(0, "another") or "")
    root = Path(run.store.url)
    part, tar = root / part_name(1), root / tar_name("dad", 2)
    data = tar.read_bytes()
    part.unlink()
    assert run.damage(1, mark) == f"{part}: missing"
    tar.write_bytes(data[:-1])
    assert (run.damage(2, mark) or "").startswith(f"{tar}: {len(data) - 1} bytes, the manifest says {len(data)}")
    tar.write_bytes(data[:-1] + b"\1")
    assert run.damage(2, mark, content=False) is None
    assert (run.damage(2, mark) or "").startswith(f"{tar}: its sha256 is not the one")
    tar.unlink()
    assert run.damage(2, mark, content=False) == f"{tar}: missing"
    assert run.damage(0, mark) is None and run.damage(3, mark) is None


def test_the_manifest_joins_all_parts(run: RunDir) -> None:
    """The manifest has all rows in the order of the shards, the record of every tar, and counts that add up."""
    table, tars = run.manifest()
    parts = [run.part(shard) for shard in range(5)]
    assert table.column("key").to_pylist() == [key for rows, _ in parts for key in rows.column("key").to_pylist()]
    assert tars == [tar for _, record in parts for tar in record.tars] and len(tars) == 10
    counts = run.info().counts or {}
    assert sum(counts.values()) == run.info().samples == table.num_rows == 53 and counts["error"] == 5


def test_sealing_twice_gives_the_same_bytes(run: RunDir) -> None:
    before = {name: run.store.read(name) for name in ("manifest.parquet", "run.json")}
    run.seal(run.info(), range(5))
    assert {name: run.store.read(name) for name in before} == before


def test_manifests_that_do_not_fit(run: RunDir, tmp_path: Path) -> None:
    """A manifest that is missing, edited, of another run or of other length is refused, each with its own reason."""
    whole, sealed = run.store.read("manifest.parquet"), run.info()
    run.store.write("manifest.parquet", whole[:-1] + b"2")
    with pytest.raises(UserError, match="is not the one that was sealed"):
        run.manifest()
    run.store.write("manifest.parquet", whole)
    run.write_info(dataclasses.replace(sealed, identity={"seed": 1}))
    with pytest.raises(UserError, match="belongs to another run"):
        run.manifest()
    run.write_info(dataclasses.replace(sealed, samples=54))
    with pytest.raises(UserError, match=r"holds 53 rows, run\.json says 54"):
        run.manifest()
    run.write_info(dataclasses.replace(sealed, counts=None))
    with pytest.raises(UserError, match=r"not complete yet; `python -m pipeline status"):
        run.manifest()
    run.write_info(sealed)
    Path(run.store.url, "manifest.parquet").unlink()
    with pytest.raises(UserError, match="not complete yet"):
        run.manifest()


def test_names_and_counts() -> None:
    assert part_name(3) == "manifest/part-000003.parquet" and tar_name("dad", 1234567) == "dad/dad-1234567.tar"
    assert count_statuses({"verified": 4310, "rejected": 1688, "error": 1}) == "4,310 verified, 1,688 rejected, 1 error"
    assert count_statuses({}) == "0 verified, 0 rejected, 0 errors"
