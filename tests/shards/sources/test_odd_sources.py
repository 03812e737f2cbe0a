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
from shards.sources.sample import check_label
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
    with pytest.raises(UserError, match=r"n1/k\.\w+: key 'n1-k' occurs twice in the source; rename one \(.*as one\)$"):
        find_source(str(tmp_path / "folder"), CLASSES, 10)  # no advice to name by place, which folders do not do


def test_an_unsorted_tar_is_told_how_to_pack_it(tmp_path: Path, write_tar: WriteTar) -> None:
    write_tar(tmp_path / "a.tar", [("x.jpg", b""), ("y.jpg", b""), ("x.cls", b"0"), ("y.cls", b"1")])
    with pytest.raises(UserError, match=r"a\.tar: key 'x' occurs twice in the source; .* anew with tar --sort=name$"):
        find_source(str(tmp_path / "a.tar"), CLASSES, 10)


def test_what_a_mac_adds_to_a_tar_is_passed_over(tmp_path: Path, write_tar: WriteTar) -> None:
    """`._NAME` beside every file, and .DS_Store: with or without them, the same samples."""
    members = [("d/x.jpg", b"1"), ("d/x.cls", b"0"), ("d/y.jpg", b"2"), ("d/y.cls", b"1")]
    write_tar(tmp_path / "plain.tar", members)
    hidden = [member for name, data in members for member in ((f"d/._{name[2:]}", b"mac"), (name, data))]
    write_tar(tmp_path / "mac.tar", [("d/.DS_Store", b""), ("._d", b""), *hidden])
    assert read(tmp_path / "mac.tar") == read(tmp_path / "plain.tar")
    assert read(tmp_path / "mac.tar", shard_size=1) == read(tmp_path / "plain.tar")


@pytest.mark.parametrize(
    ("name", "tool"), [("a.tar.gz", "gunzip -c"), ("A.TGZ", "gunzip -c"), ("a.tar.zst", "zstdcat")]
)
def test_compressed_tars_are_named_with_what_unpacks_them(tmp_path: Path, name: str, tool: str) -> None:
    (tmp_path / name).write_bytes(b"\x1f\x8b")
    for data in (tmp_path / name, tmp_path):
        with pytest.raises(UserError, match=rf"{name}: a compressed tar; unpack it, or give --data 'pipe:{tool} "):
            find_source(str(data), CLASSES, 10)


def test_a_file_that_is_no_source(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"x\.jpg: is a file, and no tar or Parquet file; expected "):
        find_source(str(tmp_path / "x.jpg"), CLASSES, 10)


@pytest.mark.parametrize(
    ("names", "pattern"),
    [
        (["train-00.tar", "train-01.tar", "validation-00.tar"], r"train-\{00\.\.01\}\.tar or .*/validation-00\.tar$"),
        (
            ["in1k-train-7.tar", "in1k-train-9.tar", "in1k-val.tar"],
            r"in1k-train-\{7,9\}\.tar or ",
        ),
        (["train-0-of-2.tar", "train-1-of-2.tar", "test.tar"], r"/test\.tar or .*/train-\{0\.\.1\}-of-2\.tar$"),
    ],
)
def test_files_of_several_splits_are_refused_with_their_patterns(
    tmp_path: Path, write_tar: WriteTar, names: list[str], pattern: str
) -> None:
    """They would be taken together. Each pattern that is named reads the files of its split alone."""
    for name in names:
        write_tar(tmp_path / name, [(f"{name.replace('.', '-')}.jpg", b""), (f"{name.replace('.', '-')}.cls", b"0")])
    with pytest.raises(UserError, match=pattern) as caught:
        find_source(str(tmp_path), CLASSES, 10)
    found = [str(caught.value).partition("name them: ")[2].split(" or ")[n] for n in (0, 1)]
    assert sorted(find_source(named, CLASSES, 10).samples for named in found) == [1, 2]


def test_one_split_or_none_is_taken(tmp_path: Path, write_tar: WriteTar) -> None:
    """Letters beside the word make it another: trainees, latest."""
    for name in ("trainees-0.tar", "latest-1.tar", "val-2.tar"):
        write_tar(tmp_path / name, [(f"{name[:-4]}.jpg", b""), (f"{name[:-4]}.cls", b"0")])
    assert find_source(str(tmp_path), CLASSES, 10).samples == 3


@pytest.mark.parametrize("label", [b"1_0", b"", b"1.0", b"\xd9\xa1", b"0x1"])
def test_labels_are_plain_decimal_numbers(label: bytes) -> None:
    assert check_label(label, CLASSES)[0] is None
    assert check_label(True, CLASSES)[0] is None and check_label(b" 2\n", CLASSES) == (2, None)


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
