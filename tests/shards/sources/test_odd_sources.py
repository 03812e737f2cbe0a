"""Sources with odd names, repeated keys and damaged files: named, never lost in silence."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from manifests import UserError
from shards.sources import SourceSample, find_source
from shards.sources.classes import ClassList
from shards.sources.folder import folder_key
from shards.tar import KEY, MAX_KEY, clean_key

CLASSES = ClassList(names=("wolf", "ant", "bee"), folders=("n9", "n1", "n5"), templates=())


WriteTar = Callable[[Path, list[tuple[str, bytes]]], None]


@pytest.fixture
def write_tar() -> WriteTar:
    from io import BytesIO
    from tarfile import TarInfo
    from tarfile import open as open_tar

    def write(path: Path, members: list[tuple[str, bytes]]) -> None:
        with open_tar(path, "w") as tar:
            for name, data in members:
                info = TarInfo(name)
                info.size = len(data)
                tar.addfile(info, BytesIO(data))

    return write


def read(data: Path, classes: ClassList = CLASSES, shard_size: int = 1000) -> list[SourceSample]:
    """All samples of a source, through plan and pieces."""
    plan = find_source(str(data), classes, shard_size)
    samples = [sample for piece in plan.pieces for sample in piece.samples(classes)]
    assert len(samples) == plan.samples == sum(piece.count for piece in plan.pieces)
    return samples


@pytest.mark.parametrize("content", [b"", b"hello", b"\x1f\x8b" + bytes(600), b"PK\3\4" + bytes(600)])
def test_a_file_that_is_no_tar(tmp_path: Path, content: bytes) -> None:
    """Not a tar, or a compressed one: refused by name."""
    (tmp_path / "odd.tar").write_bytes(content)
    with pytest.raises(UserError, match=r"odd\.tar"):
        find_source(str(tmp_path), CLASSES, 10)


def test_duplicate_keys(tmp_path: Path, write_tar: WriteTar) -> None:
    """A key that occurs twice is refused, in one tar, over two, and where only cleaning makes two names one."""
    write_tar(tmp_path / "a.tar", [("x.jpg", b""), ("x.cls", b"0"), ("y.jpg", b"")])
    write_tar(tmp_path / "b.tar", [("z.jpg", b""), ("x.jpg", b"")])
    with pytest.raises(UserError, match=r"b\.tar: key 'x' occurs twice"):
        find_source(str(tmp_path), CLASSES, 10)
    write_tar(tmp_path / "b.tar", [("d/e.jpg", b""), ("d-e.jpg", b"")])
    with pytest.raises(UserError, match=r"b\.tar: key 'd-e' occurs twice"):
        find_source(str(tmp_path), CLASSES, 10)
    (tmp_path / "b.tar").unlink()
    write_tar(tmp_path / "a.tar", [("x.jpg", b""), ("x.jpg", b"")])
    with pytest.raises(UserError, match=r"a\.tar: key 'x' occurs twice"):
        find_source(str(tmp_path), CLASSES, 10)
    assert [piece.count for piece in find_source(str(tmp_path), CLASSES, 10, "place").pieces] == [2]
    for name in ("n1/k.jpg", "n1/k.png"):
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(b"")
    with pytest.raises(UserError, match=r"n1/k\.\w+: key 'n1-k' occurs twice"):
        find_source(str(tmp_path / "folder"), CLASSES, 10)


def test_problems_of_tar_samples(tmp_path: Path, write_tar: WriteTar) -> None:
    """A label that is missing, no number or outside the list, and a sample without an image: each recorded with its
    own reason.
    """
    members = [
        ("good.jpg", b"data"), ("good.cls", b" 2\n"),
        ("high.jpg", b"data"), ("high.cls", b"3"),
        ("low.jpg", b"data"), ("low.cls", b"-1"),
        ("word.jpg", b"data"), ("word.cls", b"ant"),
        ("bytes.jpg", b"data"), ("bytes.cls", b"\xff\xfe"),
        ("bare.jpg", b"data"),
        ("blind.cls", b"1"), ("blind.txt", b"a caption"),
        ("upper.JPG", b"data"), ("upper.CLS", b"1"),
    ]  # fmt: skip
    write_tar(tmp_path / "a.tar", members)
    samples = {s.key: s for s in read(tmp_path)}
    reasons = {
        "high": "label 3 is outside the class list (0 to 2)", "low": "label -1 is outside the class list (0 to 2)",
        "word": "label b'ant' is not an integer", "bytes": r"label b'\xff\xfe' is not an integer",
        "bare": "no label (KEY.cls)",
        "blind": "no image among the members (cls, txt)", "good": None, "upper": None,
    }  # fmt: skip
    assert {key: s.problem for key, s in samples.items()} == reasons
    assert samples["good"].label == 2 and samples["upper"].label == 1 and samples["upper"].data == b"data"
    assert samples["high"].label is None


@pytest.mark.parametrize(
    "strays",
    [
        [("._a.jpg", b"apple"), ("._b.jpg", b"apple"), ("README", b"hello"), ("d/.cls", b"1")],
        [(".jpg", b"data"), (".cls", b"1")],
        [("./.jpg", b"data"), ("./.cls", b"1")],
    ],
)
def test_stray_members_never_become_keys_that_break_the_contract(
    tmp_path: Path, write_tar: WriteTar, strays: list
) -> None:  # type: ignore[type-arg]
    """What macOS and careless tools put into tars (``._x.jpg``, files without a stem or extension) is passed over,
    recorded or refused.
    """
    write_tar(tmp_path / "a.tar", [("a.jpg", b"data"), ("a.cls", b"0"), *strays])
    try:
        samples = read(tmp_path)
    except UserError as error:
        assert "a.tar" in str(error)
        return
    assert all(KEY.match(s.key) or s.problem for s in samples)
    assert "a" in [s.key for s in samples if s.problem is None]


def test_clean_key() -> None:
    """Any name becomes a key of the contract; long ones stay distinct and short enough for a tar header."""
    names = [
        "n01440764/n01440764_10026",
        "a b",
        "ä/ö.x",
        "",
        "x" * 79,
        "x" * 200,
        "x" * 199 + "y",
        "../../etc/passwd",
        "a\nb",
        "名前",
    ]
    keys = [clean_key(name) for name in names]
    assert keys[0] == "n01440764-n01440764_10026" and keys[4] == "x" * 79
    assert len(set(keys[4:7])) == 3
    assert all(
        re.fullmatch(r"[A-Za-z0-9_-]+", key) and len(key) <= MAX_KEY
        for key, name in zip(keys, names, strict=True)
        if name
    )
    assert folder_key("n01440764/n01440764_10026.JPEG") == "n01440764-n01440764_10026"
