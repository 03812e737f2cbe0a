"""Tars: ours are plain WebDataset to the byte; those of others are read without trusting them."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from manifests import UserError
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
    """A tar by the standard library, of regular files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def test_same_samples_same_bytes() -> None:
    """No times, owners or names of this machine: two writers give one tar, and nothing in a header depends on who wrote it."""
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
    """Its own decoders give label, logits and image of our DAD shards, the same as ShardDataset's."""
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
    """USTAR, GNU and PAX headers, long names, folders, upper-case extensions, keys with folders as webdataset has them."""
    long = "d" * 60 + "/" + "f" * 70
    data = make_tar([("./a/b.JPG", b"1"), ("./a/b.cls", b"2"), (f"{long}.jpg", b"3"), ("ünï.jpg", b"4")], format=form)
    assert read(data) == {"a/b": {"jpg": b"1", "cls": b"2"}, long: {"jpg": b"3"}, "ünï": {"jpg": b"4"}}


def test_split_name() -> None:
    """The key ends at the first dot of the last part of the path."""
    for name, expected in {
        "a.jpg": ("a", "jpg"), "a.logits.npy": ("a", "logits.npy"), "d.e/b.c.NPY": ("d.e/b", "c.npy"), "./x.cls": ("x", "cls"),
        "noext": ("noext", ""), "/abs/x.jpg": ("/abs/x", "jpg"),
    }.items():  # fmt: skip
        assert split_name(name) == expected


def test_index_agrees_with_reading_and_reading_may_start_anywhere() -> None:
    data, extents = build()
    index = list(index_tar(io.BytesIO(data), "t.tar"))
    assert [(offset, sample.key) for offset, sample in index] == [(extents[key].offset, key) for key in SAMPLES]
    for _, sample in index:  # labels are read, nothing else is
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
    """Absolute and climbing names, links, devices, pickles and modules: nothing is written, followed or run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    secret, target = tmp_path / "secret.txt", tmp_path / "pwned"
    secret.write_text("password")
    trap = pickle.dumps(Trap(target))
    regular = [
        (f"{tmp_path}/abs.jpg", b"1"), ("../../climb.jpg", b"2"), ("..", b"3"), ("a/../../x.jpg", b"4"), ("k.pkl", trap),
        ("k.pickle", trap), ("k.pyd", trap), ("k.pth", trap), ("k.pt", trap), ("k.npy", trap), ("k.py", b"import os; os.mkdir('pwned')"),
        ("site.pth", b"import os"), ("sitecustomize.py", b"open('pwned', 'w')"), ("n.jpg\0.exe", b"5"),
    ]  # fmt: skip
    buffer = io.BytesIO(make_tar(regular))
    with tarfile.open(fileobj=buffer, mode="a") as tar:
        for name, kind, link in (
            ("l.jpg", tarfile.SYMTYPE, str(secret)), ("h.jpg", tarfile.LNKTYPE, str(secret)), ("c.jpg", tarfile.CHRTYPE, ""),
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
    """A member of gigabytes is passed over unread; its sample has it as empty."""
    monkeypatch.setattr(tar_module, "MAX_MEMBER", 1000)
    assert read(make_tar([("a.jpg", bytes(1001)), ("a.cls", b"1"), ("b.jpg", bytes(1000))])) == {
        "a": {"jpg": b"", "cls": b"1"}, "b": {"jpg": bytes(1000)}}  # fmt: skip


def test_neighbours_of_one_name_are_two_samples() -> None:
    """Writers that count anew in every class: a second member of the same ending begins the next sample."""
    data = make_tar([("a.jpg", b"1"), ("a.cls", b"1"), ("a.JPG", b"2"), ("a.cls", b"0"), ("b.jpg", b"3")])
    samples = [(sample.key, sample.members) for _, sample in iterate_tar(io.BytesIO(data), "t.tar")]
    assert samples == [("a", {"jpg": b"1", "cls": b"1"}), ("a", {"jpg": b"2", "cls": b"0"}), ("b", {"jpg": b"3"})]


def many() -> tuple[bytes, list[int]]:
    """A tar of 6 samples of two members, and where the headers are."""
    data = make_tar(
        [(f"s{n}.{ext}", bytes(300 * n + 1)) for n in range(6) for ext in ("jpg", "cls")], format=tarfile.USTAR_FORMAT
    )
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return data, [member.offset for member in tar]


@pytest.mark.parametrize("field", [0, 50, 100, 124, 136, 150, 156, 257, 345, 511])
@pytest.mark.parametrize("header", [0, 1, 5, 11])
def test_a_damaged_header_anywhere(header: int, field: int) -> None:
    """One bit of a header, in a name, a size, the checksum, the unused end: the tar is refused, no sample is lost in silence."""
    data, headers = many()
    damaged = bytearray(data)
    damaged[headers[header] + field] ^= 0x10
    with pytest.raises(UserError, match=r"t\.tar: not a readable tar"):
        read(bytes(damaged))


@pytest.mark.parametrize("header", [0, 1, 5, 11])
def test_a_wiped_header(header: int) -> None:
    """A header overwritten with zeros looks like the end of the archive, but samples follow: refused, not taken for the end."""
    data, headers = many()
    for blocks in (1, 2):
        damaged = bytearray(data)
        damaged[headers[header] : headers[header] + 512 * blocks] = bytes(512 * blocks)
        if header < 11:
            with pytest.raises(UserError, match=r"t\.tar"):
                read(bytes(damaged))
        else:  # nothing but the last member's zeros follows: no reader can tell, the manifest's checksum does
            assert len(read(bytes(damaged))) == 6


def test_two_tars_in_one_file() -> None:
    """`cat a.tar b.tar`: the second is read too or the file is refused, but it is not lost in silence."""
    first, second = make_tar([("a.jpg", b"1")]), make_tar([("b.jpg", b"2")])
    try:
        found = read(first + second)
    except UserError as error:
        assert "t.tar" in str(error)
    else:
        assert set(found) == {"a", "b"}


def test_truncated_tars() -> None:
    """Cut inside a header or a member, between members or samples, or before the zeros at the end: refused. One block of them will do."""
    data, headers = many()
    end = len(data.rstrip(b"\0"))
    padded = headers[-1] + 512 + 3 * 512  # the last member holds 1501 bytes
    for cut in (
        1,
        100,
        511,
        513,
        headers[3] + 100,
        headers[3] + 512 + 10,
        *headers[1:],
        headers[6] + 600,
        end - 5,
        padded,
        padded + 511,
    ):
        for function in (read, lambda part: list(index_tar(io.BytesIO(part), "t.tar"))):
            with pytest.raises(UserError, match=r"t\.tar: not a readable tar"):
                function(data[:cut])
    assert len(read(data[: padded + 512])) == len(read(data)) == 6


@pytest.mark.parametrize(
    "data", [b"", b"x", b"hello" * 200, bytes(100), b"\x1f\x8b\x08" + bytes(2000), b"PK\3\4" + bytes(2000)]
)
def test_files_that_are_no_tar(data: bytes) -> None:
    with pytest.raises(UserError, match=r"t\.tar: not a readable tar \(.*\); is it whole, and uncompressed\?"):
        read(data)


def test_compressed_tars_are_refused(tmp_path: Path) -> None:
    """A .tar.gz under the name .tar: offsets would mean nothing."""
    import gzip

    with pytest.raises(UserError, match="uncompressed"):
        read(gzip.compress(many()[0]))


def test_an_empty_tar_has_no_samples() -> None:
    assert read(make_tar([])) == {} and read(TarWriter().close()) == {}


def test_random_damage_never_crashes() -> None:
    """Bits flipped and fields rewritten with valid checksums, in USTAR, GNU and PAX tars: samples or a UserError, nothing else."""
    rng = np.random.default_rng(0)
    long = [("n" * 150 + f"{n}.jpg", bytes(100)) for n in range(3)]
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        data = make_tar(
            [("a.jpg", bytes(10)), ("b.cls", b"1")] + (long if form != tarfile.USTAR_FORMAT else []), format=form
        )
        for _ in range(400):
            damaged = bytearray(data)
            block = 512 * int(rng.integers(len(data) // 512 - 4))
            for _ in range(int(rng.integers(1, 5))):
                damaged[block + int(rng.integers(512))] = int(rng.integers(256))
            if rng.random() < 0.7:
                damaged[block + 148 : block + 156] = b" " * 8
                damaged[block + 148 : block + 156] = b"%06o\0 " % sum(damaged[block : block + 512])
            try:
                read(bytes(damaged))
            except UserError as error:
                assert "\n" not in str(error)


def test_altered_samples_are_refused() -> None:
    """A sample read by its extent: any flipped bit, a short read, the sample of another extent."""
    data, extents = build()
    extent = extents["B_2"]
    piece = bytearray(data[extent.offset : extent.offset + extent.size])
    for at in (0, 300, 512, 1500, extent.size - 1):
        piece[at] ^= 4
        with pytest.raises(
            UserError, match=rf"t\.tar: the sample at byte {extent.offset} is not the one that was written"
        ):
            parse_sample(bytes(piece), extent, "t.tar")
        piece[at] ^= 4
    with pytest.raises(UserError, match=rf"t\.tar: ends inside the sample at byte {extent.offset} \(truncated\)"):
        parse_sample(bytes(piece[:-1]), extent, "t.tar")
    other = extents["a-1"]
    with pytest.raises(UserError, match="not the one that was written"):
        parse_sample(
            data[other.offset : other.offset + other.size], Extent(other.offset, other.size, extent.crc32), "t.tar"
        )


HANGS = """
import sys, zlib
from manifests import UserError
from shards.tar import Extent, parse_sample
data = open(sys.argv[1], "rb").read()
try:
    parse_sample(data, Extent(0, len(data), zlib.crc32(data)), "t.tar")
except UserError as error:
    print("refused", error)
"""


def header_with_size(size: bytes) -> bytes:
    """A header whose size field is ``size``, with a valid checksum, and a block of data."""
    block = bytearray(tarfile.TarInfo("k.jpg").tobuf(tarfile.USTAR_FORMAT))
    block[124:136] = size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + bytes(512)


@pytest.mark.parametrize("content", [b"not a header at all".ljust(1024, b"."), bytes(1024), b"short"])
def test_extents_that_hold_no_sample(content: bytes) -> None:
    """A hostile manifest may name any bytes with their right crc32: a UserError that names the tar."""
    with pytest.raises(UserError, match=r"t\.tar"):
        parse_sample(content, Extent(0, len(content), zlib.crc32(content)), "t.tar")


def test_a_negative_size_does_not_hang(tmp_path: Path, forked: Callable[..., Any]) -> None:
    """A member of size -512 (tar's base-256 numbers allow it) would make a reader step back for ever."""
    import subprocess

    (tmp_path / "t").write_bytes(header_with_size(b"\xff" * 10 + b"\xfe\x00"))
    try:
        told = forked(f"import resource; resource.setrlimit(resource.RLIMIT_CPU, (8, 8))\n{HANGS}", tmp_path / "t")
    except subprocess.TimeoutExpired:
        pytest.fail("hangs")
    assert told.returncode == 0 and told.stdout.startswith("refused t.tar"), told
