"""Parquet files of encoded images as a source: rows, label numbers, and what is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from manifests import UserError
from shards.sources import SourceSample, find_source
from shards.sources import parquet as parquet_source
from shards.sources.classes import ClassList, imagenet_classes
from shards.sources.sample import SLACK

CLASSES = ClassList(names=("wolf", "ant", "bee"), folders=("n9", "n1", "n5"), templates=())
WriteHub = Callable[..., None]


def read(data: Path | str, shard_size: int = 1000, keys: str = "name") -> list[SourceSample]:
    plan = find_source(str(data), CLASSES, shard_size, keys)  # type: ignore[arg-type]
    samples = [sample for piece in plan.pieces for sample in piece.samples(CLASSES)]
    assert len(samples) == plan.samples and plan.exact and plan.kind == "Parquet"
    return samples


@pytest.mark.parametrize("shard_size", [1, 7, 10, 25, 100])
@pytest.mark.parametrize("group", [1, 10, 1000])
def test_pieces_cover_every_row_once(tmp_path: Path, write_hub: WriteHub, shard_size: int, group: int) -> None:
    """Row ranges that begin and end anywhere in and across row groups: together every row once, in order, each as
    it was written.
    """
    rows = [(f"image {n}".encode(), f"{n}.JPEG", n % 3) for n in range(61)]
    write_hub(tmp_path / "a.parquet", rows[:40], group=group)
    write_hub(tmp_path / "b.parquet", rows[40:], group=group)
    plan = find_source(str(tmp_path), CLASSES, shard_size)
    parts = [list(piece.samples(CLASSES)) for piece in reversed(plan.pieces)]
    assert [len(part) for part in parts] == [piece.count for piece in reversed(plan.pieces)]
    assert all(0 < len(part) <= SLACK * shard_size for part in parts)
    assert [(s.data, f"{s.key}.JPEG", s.label) for part in reversed(parts) for s in part] == rows
    assert len({piece.name for piece in plan.pieces}) == len(plan.pieces)


def test_keys_by_name_and_by_place(tmp_path: Path, write_hub: WriteHub) -> None:
    """A key is the row's path without its ending; a row without a path, or keys=place, takes file and row number."""
    rows = [(b"a", "d/x.y.JPEG", 0), (b"b", None, 1), (b"c", "", 2)]
    write_hub(tmp_path / "train-0.parquet", rows)
    assert [s.key for s in read(tmp_path)[1:]] == ["train-0-000001", "train-0-000002"]
    assert read(tmp_path)[0].key.startswith("d-x-y-")  # a dot is no character of a key, so its hash follows
    assert [s.key for s in read(tmp_path, keys="place")] == [f"train-0-00000{n}" for n in range(3)]
    assert {s.key for s in read(tmp_path, 1, keys="place")} == {s.key for s in read(tmp_path, 3, keys="place")}


def test_repeated_paths(tmp_path: Path, write_hub: WriteHub) -> None:
    """The same path twice is refused with the way out, within a file and over two; keys=place is that way out."""
    write_hub(tmp_path / "a.parquet", [(b"a", "0.png", 0), (b"b", "1.png", 1)])
    write_hub(tmp_path / "b.parquet", [(b"c", "1.png", 0)])
    with pytest.raises(UserError, match=r"b\.parquet: key '1' occurs twice .*source\.keys=place"):
        find_source(str(tmp_path), CLASSES, 10)
    assert len({s.key for s in read(tmp_path, keys="place")}) == 3


def test_bad_rows_are_recorded(tmp_path: Path, write_hub: WriteHub) -> None:
    """No bytes, no label, a label outside the list: each a problem of that row alone."""
    rows = [
        (None, "a.png", 0),
        (b"", "b.png", 0),
        (b"x", "c.png", None),
        (b"x", "d.png", -1),
        (b"x", "e.png", 3),
        (b"x", "f.png", 2),
    ]
    write_hub(tmp_path / "a.parquet", rows)
    problems = [s.problem for s in read(tmp_path)]
    assert problems[:2] == ["the row holds no image bytes"] * 2 and problems[5] is None
    assert problems[2] is not None and problems[2].startswith("no label")
    assert problems[3:5] == [f"label {n} is outside the class list (0 to 2)" for n in (-1, 3)]


@pytest.mark.parametrize("names", [("bee", "wolf", "ant"), ("n5", "n9", "n1")])
def test_label_numbers_follow_the_names(tmp_path: Path, write_hub: WriteHub, names: tuple[str, ...]) -> None:
    """A file whose own numbering is another one, by class name or by wnid, is mapped through the names; label -1
    stays no label.
    """
    rows = [(b"x", "bee.png", 0), (b"x", "wolf.png", 1), (b"x", "ant.png", 2), (b"x", "none.png", -1)]
    write_hub(tmp_path / "a.parquet", rows, names)
    samples = read(tmp_path)
    assert all(CLASSES.names[s.label] == s.key for s in samples[:3] if s.label is not None)
    assert samples[3].label is None and samples[3].problem


def test_synonyms_keep_their_numbers(tmp_path: Path, write_hub: WriteHub) -> None:
    """imagenet-1k on the Hub names 'tench, Tinca tinca' what the class list calls 'tench': as many classes, so the
    numbers hold.
    """
    write_hub(tmp_path / "a.parquet", [(b"x", "0.png", 2)], ("wolf, Canis lupus", "ant, emmet", "bee"))
    assert read(tmp_path)[0].label == 2


@pytest.mark.parametrize("known", [CLASSES.names, CLASSES.folders])
def test_one_name_spelt_otherwise_in_another_order_is_refused(
    tmp_path: Path, write_hub: WriteHub, known: tuple[str, ...]
) -> None:
    """No set of names to map by, and a name that both know at another number: taking the numbers would mislabel
    every image.
    """
    write_hub(tmp_path / "a.parquet", [(b"x", "0.png", 0)], (known[1], known[0], f"{known[2]}s"))
    with pytest.raises(
        UserError, match=rf"a\.parquet: its label 0 is '{known[1]}', number 1 of the class list; .*'{known[2]}s'"
    ) as caught:
        find_source(str(tmp_path), CLASSES, 10)
    assert "\n" not in str(caught.value)


def test_an_underscore_is_a_space(tmp_path: Path, write_hub: WriteHub) -> None:
    """`pine_tree` is `pine tree`: mapped by name, as if they were spelt alike."""
    classes = ClassList(names=("wolf", "pine tree", "bee"), folders=("n9", "n1", "n5"), templates=())
    write_hub(tmp_path / "a.parquet", [(b"x", "0.png", 0)], ("pine_tree", "bee", "wolf"))
    (piece,) = find_source(str(tmp_path), classes, 10).pieces
    assert [sample.label for sample in piece.samples(classes)] == [1]


def test_imagenet_as_the_hub_names_it() -> None:
    """WordNet's synonyms beside open_clip's curated names (700 of them equal the first synonym): one order, so the
    numbers hold.
    """
    from timm.data import ImageNetInfo

    known = ImageNetInfo("imagenet-1k")
    synonyms = [known.index_to_description(n) for n in range(1000)]
    for names in (synonyms, [name.split(",")[0] for name in synonyms]):
        features = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        schema = pa.schema([("label", pa.int64())], metadata={"huggingface": json.dumps(features)})
        assert parquet_source.label_map(schema, "label", imagenet_classes(), "a.parquet") is None


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts what this process reads, which only Linux tells")
def test_a_piece_reads_no_more_than_it_must(tmp_path: Path, write_hub: WriteHub) -> None:
    """Pieces are whole row groups where these fit a shard; in a larger group, reading ends with the piece."""
    rows = [(os.urandom(1000), f"{n}.png", 0) for n in range(8000)]  # 8 MB, in pages of 1024 rows
    write_hub(tmp_path / "a.parquet", rows, group=600)
    pieces = find_source(str(tmp_path), CLASSES, 1000).pieces
    assert [(piece.start, piece.count) for piece in pieces[:3]] == [(0, 600), (600, 600), (1200, 600)]  # type: ignore[attr-defined]
    write_hub(tmp_path / "a.parquet", rows, group=1024)  # a little more than fits: no tiny pieces in between
    assert {piece.count for piece in find_source(str(tmp_path), CLASSES, 1000).pieces} == {1024, 8000 % 1024}
    write_hub(tmp_path / "a.parquet", rows, group=8000)
    pieces = find_source(str(tmp_path), CLASSES, 1000).pieces
    before = bytes_read()
    assert len(list(pieces[0].samples(CLASSES))) == 1000
    assert bytes_read() - before < 4_000_000


def bytes_read() -> int:
    """That this process has read, from files and caches (Linux)."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_another_number_of_classes(tmp_path: Path, write_hub: WriteHub) -> None:
    write_hub(tmp_path / "a.parquet", [(b"x", "0.png", 0)], ("wolf", "ant"))
    with pytest.raises(UserError, match=r"a\.parquet: names 2 classes, the class list 3"):
        find_source(str(tmp_path), CLASSES, 10)


@pytest.mark.parametrize(
    "metadata", [b"{", b"[]", b'{"info": 3}', b'{"info": {"features": {"label": {"dtype": "int64"}}}}']
)
def test_odd_metadata_name_nothing(tmp_path: Path, metadata: bytes) -> None:
    """Metadata that are no `datasets` features are passed over: numbers are taken as they are."""
    table = pa.table({"image": pa.array([b"x"]), "label": pa.array([1])}).replace_schema_metadata(
        {b"huggingface": metadata}
    )
    pq.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path)[0].label == 1


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
@pytest.mark.parametrize(("image", "label"), [("image", "label"), ("img", "fine_label"), ("jpg", "cls")])
def test_plain_binary_columns(tmp_path: Path, kind: pa.DataType, image: str, label: str) -> None:
    """Images as a plain column of bytes, small or large offsets, under the names that are in use; other columns are
    left alone.
    """
    table = pa.table({"id": ["a", "b"], image: pa.array([b"x", b"y"], kind), label: pa.array([2, 0], pa.int32())})
    pq.write_table(table, tmp_path / "a.parquet")
    assert [(s.key, s.data, s.label) for s in read(tmp_path)] == [("a-000000", b"x", 2), ("a-000001", b"y", 0)]


@pytest.mark.parametrize(
    "table",
    [
        {"label": [0]},
        {"image": [b"x"]},
        {"image": ["a path"], "label": [0]},
        {"image": [b"x"], "label": ["wolf"]},
        {"image": [{"path": "a.png"}], "label": [0]},
    ],
)
def test_missing_columns(tmp_path: Path, table: dict[str, list[object]]) -> None:
    """Without images or integer labels: refused in one line that names the file and what columns it has."""
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    with pytest.raises(
        UserError, match=r"a\.parquet: needs an image column .*integer label column .*; it has "
    ) as caught:
        find_source(str(tmp_path), CLASSES, 10)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cut", [0, 3, 200, -1])
def test_a_file_that_is_cut_off(tmp_path: Path, write_hub: WriteHub, cut: int) -> None:
    """Half a download has no footer: refused by name when planning."""
    write_hub(tmp_path / "a.parquet", [(b"x" * 500, f"{n}.png", 0) for n in range(20)])
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(data[:cut])
    with pytest.raises(UserError, match=r"a\.parquet: not a readable Parquet file") as caught:
        find_source(str(tmp_path), CLASSES, 10)
    assert "\n" not in str(caught.value)


def test_damage_in_the_middle_is_named(tmp_path: Path, write_hub: WriteHub) -> None:
    """A page overwritten with zeros: the footer still plans, reading names the file; no row comes out wrong in
    silence.
    """
    rows = [(bytes([n]) * 3000, f"{n}.png", 0) for n in range(40)]
    write_hub(tmp_path / "a.parquet", rows)
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    place = pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(2).column(0).data_page_offset
    data[place : place + 200] = bytes(200)
    (tmp_path / "a.parquet").write_bytes(data)
    plan = find_source(str(tmp_path), CLASSES, 100, "place")
    with pytest.raises(UserError, match=r"a\.parquet: damaged near row \d+") as caught:
        list(plan.pieces[0].samples(CLASSES))
    assert "\n" not in str(caught.value)


def test_a_large_source_is_planned_from_its_footers(
    tmp_path: Path, write_hub: WriteHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond EXACT rows only the first file's names are compared; counts stay exact."""
    write_hub(tmp_path / "a.parquet", [(b"a", "0.png", 0), (b"b", "1.png", 1)])
    write_hub(tmp_path / "b.parquet", [(b"c", "1.png", 0)])
    monkeypatch.setattr(parquet_source, "EXACT", 2)
    assert len(read(tmp_path)) == 3
    write_hub(tmp_path / "a.parquet", [(b"a", "0.png", 0), (b"b", "0.png", 1)])
    with pytest.raises(UserError, match=r"a\.parquet: key '0' occurs twice"):
        find_source(str(tmp_path), CLASSES, 10)


def test_fingerprint(tmp_path: Path, write_hub: WriteHub) -> None:
    """Another file name or number of rows makes another source; another folder does not."""
    rows = [(b"x" * 100, f"{n}.png", 0) for n in range(5)]
    for folder in ("one", "two", "three", "four"):
        (tmp_path / folder).mkdir()
        write_hub(tmp_path / folder / "a.parquet", rows[:4] if folder == "three" else rows)
    (tmp_path / "four" / "a.parquet").rename(tmp_path / "four" / "b.parquet")
    prints = [
        find_source(str(tmp_path / folder), CLASSES, 10).fingerprint for folder in ("one", "two", "three", "four")
    ]
    assert prints[0] == prints[1] and len(set(prints)) == 3


def test_by_url(tmp_path: Path, write_hub: WriteHub) -> None:
    """The same files through an object store, listed or by name with braces."""
    import fsspec

    write_hub(tmp_path / "train-0.parquet", [(b"a", "0.png", 0)], CLASSES.names)
    write_hub(tmp_path / "train-1.parquet", [(b"b", "1.png", 1)], CLASSES.names)
    memory = fsspec.filesystem("memory")
    for path in tmp_path.iterdir():
        memory.pipe_file(f"/hub/{path.name}", path.read_bytes())
    memory.pipe_file("/hub/dataset_infos.json", json.dumps({}).encode())
    for data in (
        "memory://hub",
        "memory://hub/train-{0..1}.parquet",
        f"memory://hub/train-0.parquet::{tmp_path}/train-1.parquet",
    ):
        assert read(data) == read(tmp_path), data
