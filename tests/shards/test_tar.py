"""Tars: ours are plain WebDataset to the byte; we read those of others without trusting them."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards import Extent, TarWriter, iterate_tar
from shards import tar as tar_module
from shards.tar import index_tar, parse_sample, split_name

SAMPLES: dict[str, dict[str, bytes]] = {
    "a-1": {"jpg": b"\xff\xd8" + bytes(700), "cls": b"3", "logits.npy": bytes(512)},
    "B_2": {"jpg": b"", "cls": b"10", "logits.npy": bytes(513)},
    "k" * 80: {"png": bytes(range(256)), "cls": b"0", "logits.npy": b"x"},
}


def build(samples: dict[str, dict[str, bytes]] = SAMPLES) -> tuple[bytes, dict[str, Extent]]:
    writer = TarWriter()
    extents = {key: writer.add(key, members) for key, members in samples.items()}
    assert writer.samples == len(samples)
    return writer.close(), extents


def read(data: bytes, start: int = 0) -> dict[str, dict[str, bytes]]:
    return {sample.key: sample.members for _, sample in iterate_tar(io.BytesIO(data), "t.tar", start)}


def make_tar(members: list[tuple[str, bytes]], **options: Any) -> bytes:
    """A tar of regular files, written by the standard library."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def test_same_samples_same_bytes() -> None:
    """Two writers give one tar: headers hold no times, no owners and no names of this machine."""
    data, extents = build()
    assert build() == (data, extents)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (
                0,
                0,
                0,
                "",
                "",
            ) and member.isreg()


def test_roundtrip_and_extents() -> None:
    """Reading gives what was written, in order; an extent cuts out exactly its sample, whose bytes have its crc32."""
    data, extents = build()
    assert read(data) == SAMPLES and list(read(data)) == list(SAMPLES)
    end = 0
    for key, extent in extents.items():
        assert extent.offset == end and extent.size % 512 == 0
        end = extent.offset + extent.size
        piece = data[extent.offset : end]
        assert zlib.crc32(piece) == extent.crc32
        sample = parse_sample(piece, extent, "t.tar")
        assert sample.key == key and sample.members == SAMPLES[key]
    assert not data[end:].strip(b"\0") and len(data) - end >= 1024


@pytest.mark.parametrize("key", ["", "a.b", "a/b", "../a", "a b", "ä", "a\n", "a\0", "."])
def test_keys_that_the_contract_forbids(key: str) -> None:
    writer = TarWriter()
    with pytest.raises(ValueError, match="does not match"):
        writer.add(key, {"cls": b"1"})
    assert writer.samples == 0 and read(writer.close()) == {}


def test_webdataset_reads_our_tars(tmp_path: Path) -> None:
    """The webdataset library sees the same samples, members and bytes."""
    import webdataset

    (tmp_path / "t.tar").write_bytes(build()[0])
    found = list(webdataset.WebDataset(str(tmp_path / "t.tar"), shardshuffle=False))
    assert {
        sample["__key__"]: {name: value for name, value in sample.items() if not name.startswith("__")}
        for sample in found
    } == SAMPLES


def test_webdataset_decodes_a_finished_run(finished_run: Path) -> None:
    """The library's own decoders give label, logits and image of DAD shards as ShardDataset gives them."""
    import webdataset

    from shards import ShardDataset

    ours = {sample.key: sample for sample in map(ShardDataset(str(finished_run), "dad").__getitem__, range(8))}
    for sample in webdataset.WebDataset(str(finished_run / "dad" / "dad-000000.tar"), shardshuffle=False).decode(
        "rgb8"
    ):
        if (mine := ours.get(sample["__key__"])) is not None:
            assert sample["cls"] == mine.label and np.array_equal(sample["logits.npy"], mine.logits.numpy())
            assert mine.image is not None and np.array_equal(sample["jpg"], mine.image.permute(1, 2, 0).numpy())


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_other_tools(form: int) -> None:
    """USTAR, GNU and PAX headers, long names, folders, upper-case extensions; keys with folders, as in webdataset."""
    long = "d" * 60 + "/" + "f" * 70
    data = make_tar([("./a/b.JPG", b"1"), ("./a/b.cls", b"2"), (f"{long}.jpg", b"3"), ("ünï.jpg", b"4")], format=form)
    assert read(data) == {"a/b": {"jpg": b"1", "cls": b"2"}, long: {"jpg": b"3"}, "ünï": {"jpg": b"4"}}


def test_split_name() -> None:
    """The key ends at the first dot of the last part of the path."""
    for name, expected in {
        "a.jpg": ("a", "jpg"), "a.logits.npy": ("a", "logits.npy"), "d.e/b.c.NPY": ("d.e/b", "c.npy"),
        "./x.cls": ("x", "cls"),
        "noext": ("noext", ""), "/abs/x.jpg": ("/abs/x", "jpg"),
    }.items():  # fmt: skip
        assert split_name(name) == expected


def test_index_agrees_with_reading_and_reading_may_start_anywhere() -> None:
    data, extents = build()
    index = list(index_tar(io.BytesIO(data), "t.tar"))
    assert [(offset, sample.key) for offset, sample in index] == [(extents[key].offset, key) for key in SAMPLES]
    for _, sample in index:  # only labels are read
        assert {name: body for name, body in sample.members.items() if body} == {"cls": SAMPLES[sample.key]["cls"]}
    for n, key in enumerate(SAMPLES):
        assert list(read(data, extents[key].offset)) == list(SAMPLES)[n:]


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.devmajor, info.devminor = kind, target, 1, 3
    return info


def test_hostile_members_are_data_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading writes, follows and runs nothing: absolute and climbing names, links, devices, pickles, modules."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    secret, target = tmp_path / "secret.txt", tmp_path / "pwned"
    secret.write_text("password")
    trap = pickle.dumps(Trap(target))
    regular = [
        (f"{tmp_path}/abs.jpg", b"1"), ("../../climb.jpg", b"2"), ("..", b"3"), ("a/../../x.jpg", b"4"),
        ("k.pkl", trap),
        ("k.pickle", trap), ("k.pyd", trap), ("k.pth", trap), ("k.pt", trap),
        ("k.npy", trap),
        ("k.py", b"import os; os.mkdir('pwned')"),
        ("site.pth", b"import os"), ("sitecustomize.py", b"open('pwned', 'w')"), ("n.jpg\0.exe", b"5"),
    ]  # fmt: skip
    buffer = io.BytesIO(make_tar(regular))
    with tarfile.open(fileobj=buffer, mode="a") as tar:
        for name, kind, link in (
            ("l.jpg", tarfile.SYMTYPE, str(secret)), ("h.jpg", tarfile.LNKTYPE, str(secret)),
            ("c.jpg", tarfile.CHRTYPE, ""),
            ("b.jpg", tarfile.BLKTYPE, ""), ("f.jpg", tarfile.FIFOTYPE, ""), ("d.jpg", tarfile.DIRTYPE, ""),
        ):  # fmt: skip
            tar.addfile(special(name, kind, link))
        last = tarfile.TarInfo("good.jpg")
        last.size = 4
        tar.addfile(last, io.BytesIO(b"data"))
    found = read(buffer.getvalue())
    assert found["good"] == {"jpg": b"data"} and found["k"]["pkl"] == trap
    assert not set("lhcbfd") & set(found) and all(
        b"password" not in v for members in found.values() for v in members.values()
    )
    assert [path.name for path in tmp_path.iterdir()] == ["secret.txt"] and not (
        tmp_path.parent.parent / "climb.jpg"
    ).exists()


def test_members_too_large_to_be_real_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading passes over a member of gigabytes; its sample holds it as empty."""
    monkeypatch.setattr(tar_module, "MAX_MEMBER", 1000)
    assert read(make_tar([("a.jpg", bytes(1001)), ("a.cls", b"1"), ("b.jpg", bytes(1000))])) == {
        "a": {"jpg": b"", "cls": b"1"}, "b": {"jpg": bytes(1000)}}  # fmt: skip


def test_neighbours_of_one_name_are_two_samples() -> None:
    """Some writers count anew in every class: a second member with the same ending begins the next sample."""
    data = make_tar([("a.jpg", b"1"), ("a.cls", b"1"), ("a.JPG", b"2"), ("a.cls", b"0"), ("b.jpg", b"3")])
    samples = [(sample.key, sample.members) for _, sample in iterate_tar(io.BytesIO(data), "t.tar")]
    assert samples == [("a", {"jpg": b"1", "cls": b"1"}), ("a", {"jpg": b"2", "cls": b"0"}), ("b", {"jpg": b"3"})]
