"""WebDataset tars by lists, URLs and commands; and large tars cut by bytes without reading every header."""

from __future__ import annotations

import io
import itertools
import tarfile
from pathlib import Path

import fsspec
import pytest

from manifests import RunDir, UserError
from pipeline.generate import make_shards
from pipeline.recipe import load
from shards.sources import ImageSource, SourceSample, find_source, tars
from shards.sources.classes import ClassList, load_classes
from shards.sources.files import expand, without_secrets
from tests.conftest import write_tar

CLASSES = ClassList(names=("wolf", "ant", "bee"), folders=("n9", "n1", "n5"), templates=())


def write(path: Path, keys: list[str], size: int = 700) -> Path:
    """A tar of samples of different sizes, about ``size`` bytes an image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for n, key in enumerate(keys):
            for name, data in (
                (f"{key}.jpg", key.encode() * (1 + (n * size // 7) % size)),
                (f"{key}.cls", str(n % 3).encode()),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def read(plan: ImageSource) -> list[SourceSample]:
    return [sample for piece in plan.pieces for sample in piece.samples(CLASSES)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three tars of four samples."""
    for n in range(3):
        write(tmp_path / "tars" / f"train-{n:06d}.tar", [f"s{n}-{i}" for i in range(4)])
    return tmp_path / "tars"


def test_expand() -> None:
    assert expand("a-{000..002}.tar") == ["a-000.tar", "a-001.tar", "a-002.tar"]
    assert expand("a.tar::s3://b/c-{0..1}.tar") == ["a.tar", "s3://b/c-0.tar", "s3://b/c-1.tar"]
    assert expand("~/a.tar") == [str(Path.home() / "a.tar")]
    assert expand("pipe:cat a.tar | tee ~/b") == ["pipe:cat a.tar | tee ~/b"]


def test_lists_and_urls_name_the_same_samples(folder: Path) -> None:
    """A folder, braces, ``::``, file:// and an object store: the same keys, images and labels, in the same order."""
    memory = fsspec.filesystem("memory")
    for path in folder.iterdir():
        memory.pipe_file(f"/bucket/{path.name}", path.read_bytes())
    expected = read(find_source(str(folder), CLASSES, 3))
    names = "train-{000000..000002}.tar"
    lists = (
        f"{folder}/{names}",
        f"file://{folder}/{names}",
        "memory://bucket",
        f"memory://bucket/{names}",
        f"file://{folder}",
    )
    mixed = "::".join(
        f"{place}/train-00000{n}.tar" for n, place in enumerate((folder, "memory://bucket", f"file://{folder}"))
    )
    assert len(expected) == 12
    for data in (*lists, mixed):
        assert read(find_source(data, CLASSES, 3)) == expected, data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{folder}/train-{000000..000005}.tar", r"train-000003\.tar: no such file"),
        ("{folder}/train-000000.tar::{folder}/a.parquet", r"a list must name tars or Parquet files, all of one kind"),
        ("{folder}/train-000000.zip::{folder}/train-000001.zip", r"a list must name tars or Parquet files"),
        ("memory://nowhere/train-{0..1}.tar", r"memory://nowhere/train-0\.tar: no such file"),
        ("memory://nowhere", r"memory://nowhere: no such file or folder"),
        ("nonsense://x/a.tar", r"nonsense://x"),
    ],
)
def test_lists_that_name_nothing(folder: Path, data: str, message: str) -> None:
    """The first file that is missing, or does not fit, is named in one line."""
    with pytest.raises(UserError, match=message) as caught:
        find_source(data.replace("{folder}", str(folder)), CLASSES, 3)
    assert "\n" not in str(caught.value)


def test_secrets() -> None:
    assert (
        without_secrets("https://me:pass@host/a-{0..3}.tar::s3://bucket/b.tar")
        == "https://host/a-{0..3}.tar::s3://bucket/b.tar"
    )
    assert (
        without_secrets("a.tar::pipe:curl -H token x")
        == without_secrets("{pip,pip}e:curl -H token x")
        == "pipe:(a command, not recorded)"
    )
    assert without_secrets("/data/me@home/a?b.tar") == "/data/me@home/a?b.tar"
    assert without_secrets("https://me:pa/ss@host/a.tar") == "https://host/a.tar"
    signed = "https://host/a.tar?X-Amz-Signature=s3cret::s3://bucket/b.tar?token=s3cret"
    assert without_secrets(signed) == "https://host/a.tar::s3://bucket/b.tar"


def test_the_tars_of_commands_make_the_source(folder: Path) -> None:
    """Other tars, or others inside the first, are another source; how they are fetched is not."""
    one, again, other, fewer = (
        find_source(f"pipe:{command}", CLASSES, 100).fingerprint
        for command in (
            f"cat {folder}/train-00000{{0..2}}.tar", f"cd {folder} && true && cat train-00000{{0..2}}.tar",
            f"cat {folder}/train-00000{{1..2}}.tar", f"cat {folder}/train-00000{{0..1}}.tar",
        )
    )  # fmt: skip
    assert one == again and len({one, other, fewer}) == 3


def test_commands(folder: Path) -> None:
    """``pipe:`` takes a tar from a command's output, one piece a command; braces and ``::`` make several."""
    expected = read(find_source(str(folder), CLASSES, 100))
    plan = find_source(f"pipe:cat {folder}/train-{{000000..000002}}.tar", CLASSES, 100)
    assert read(plan) == expected and len(plan.pieces) == 3 and not plan.exact
    plan = find_source(f"pipe:cat {folder}/train-000000.tar::{folder}/train-000001.tar", CLASSES, 100)
    assert read(plan) == expected[:8]
    one = find_source(f"pipe:cat {folder}/train-000000.tar | cat", CLASSES, 100)
    assert one.exact and one.samples == 4 and read(one) == expected[:4]


FAILING = (
    "exit 3", "cat {folder}/train-000000.tar; exit 3", "(cat {folder}/train-000000.tar; exit 3) | cat",
    "head -c 1500 {folder}/train-000000.tar", "true",
)  # fmt: skip


@pytest.mark.parametrize("command", FAILING)
def test_a_command_that_fails(folder: Path, command: str) -> None:
    """A status other than 0, also before a `|`, is named though the output looked whole; so is an output that is
    cut off, or empty.
    """
    data = f"pipe:{command.format(folder=folder)}"
    with pytest.raises(UserError, match=r"pipe:.*(ended with status 3|not a readable tar)") as caught:
        find_source(data, CLASSES, 100)
    assert "\n" not in str(caught.value)


def test_a_recipe_starts_no_command(world, tmp_path: Path, cli) -> None:  # type: ignore[no-untyped-def]
    """A command inside a recipe file is refused before it runs; on the command line it is the user's own."""
    marker = tmp_path / "ran"
    recipe = tmp_path / "evil.yaml"
    recipe.write_text(world.recipe.read_text().replace(str(world.tars), f"'pipe:touch {marker}'"))
    for command in ("generate", "plan"):
        told = cli(command, "--recipe", recipe, "--out", tmp_path / "run")
        assert "source.data: a recipe is data and starts no commands" in told.error
    with pytest.raises(UserError, match="starts no commands"):
        load(str(recipe), ["batch=1"])
    assert not marker.exists() and not (tmp_path / "run").exists()
    told = cli(
        "generate", "--recipe", world.recipe, "--out", tmp_path / "run", "--data", f"pipe:cat {world.tars}/source-0.tar"
    )
    assert told.status == 0 and "12 samples" in told.out


def test_keys_by_place(tmp_path: Path) -> None:
    """Tars that all count from zero are refused by name; keys=place tells their samples apart, whatever the shard
    size.
    """
    for n in range(3):
        write(tmp_path / f"t{n}.tar", [f"{i:06d}" for i in range(5)])
    with pytest.raises(UserError, match=r"t1\.tar: key '000000' occurs twice .*--set source\.keys=place"):
        find_source(str(tmp_path), CLASSES, 100)
    keys = [sample.key for sample in read(find_source(str(tmp_path), CLASSES, 100, "place"))]
    assert keys == [f"t{n}-{i:06d}" for n in range(3) for i in range(5)]
    assert [sample.key for sample in read(find_source(str(tmp_path), CLASSES, 2, "place"))] == keys


@pytest.mark.parametrize("shard_size", [1, 3, 10, 40])
@pytest.mark.parametrize("keys", ["name", "place"])
def test_ranges_of_bytes_cover_every_sample_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_size: int, keys: str
) -> None:
    """Large tars are cut at any byte, also within an image: every sample is in exactly one piece, with the key that
    it would have had.
    """
    for n, count in enumerate((57, 3, 31)):
        write(tmp_path / f"t{n}.tar", [f"k{n}-{i:03d}" for i in range(count)])
    exact = find_source(str(tmp_path), CLASSES, shard_size, keys)  # type: ignore[arg-type]
    monkeypatch.setattr(tars, "EXACT", 10)
    plan = find_source(str(tmp_path), CLASSES, shard_size, keys)  # type: ignore[arg-type]
    assert exact.exact and not plan.exact and len({piece.name for piece in plan.pieces}) == len(plan.pieces)
    assert read(plan) == read(exact)
    assert shard_size == 40 or len(plan.pieces) >= 10
    assert abs(plan.samples - exact.samples) <= 0.5 * exact.samples
    last = plan.pieces[len(plan.pieces) // 2]
    assert list(last.samples(CLASSES)) == list(last.samples(CLASSES))  # a piece does not depend on those before it


def test_every_cut_of_a_tar_is_exact(tmp_path: Path) -> None:
    """A cut at every multiple of 100 bytes: the two sides together hold each sample once."""
    path = write(tmp_path / "t.tar", [f"k{i}" for i in range(8)])
    whole = [s.key for s in read(find_source(str(path), CLASSES, 100))]
    for cut in range(0, path.stat().st_size + 1, 100):
        pieces = [
            tars.TarPiece(url=str(path), name="", count=4, start=start, stop=stop, first=first)
            for start, stop, first in ((0, cut, 0), (cut, None, None))
        ]
        keys = [sample.key for piece in pieces for sample in piece.samples(CLASSES)]
        assert keys == whole, cut


def test_a_tar_cut_between_members_is_named_by_its_last_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A download that stopped where a member ends: refused when all headers are read, and otherwise by the piece
    that comes to its end.
    """
    path = write(tmp_path / "t.tar", [f"k{i}" for i in range(40)])
    with tarfile.open(path) as tar:
        cut = tar.getmembers()[60].offset
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match=r"t\.tar: not a readable tar \(it stops at byte"):
        find_source(str(path), CLASSES, 10)
    whole = write(tmp_path / "a.tar", [f"a{i}" for i in range(40)])
    monkeypatch.setattr(tars, "EXACT", 10)
    plan = find_source(f"{whole}::{path}", CLASSES, 10)
    with pytest.raises(UserError, match=r"t\.tar: not a readable tar \(it stops at byte"):
        list(plan.pieces[-1].samples(CLASSES))
    assert all(sample.problem is None for piece in plan.pieces[:-1] for sample in piece.samples(CLASSES))


def test_large_sources_are_looked_into_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planning by size reads the headers of the first tar alone, and of the others the first; empty ones and
    repeated counters show.
    """
    for n in range(4):
        write(tmp_path / f"t{n}.tar", [f"{n}-{i}" for i in range(20)])
    monkeypatch.setattr(tars, "EXACT", 10)
    data = bytearray((tmp_path / "t2.tar").read_bytes())
    middle = data.index(b"2-10.jpg")
    data[middle] ^= 0x40  # a damaged header in the middle of a later tar
    (tmp_path / "t2.tar").write_bytes(data)
    plan = find_source(str(tmp_path), CLASSES, 20)
    assert len(plan.pieces) == 4
    with pytest.raises(UserError, match=r"t2\.tar: not a readable tar"):
        list(plan.pieces[2].samples(CLASSES))
    for sample in itertools.chain.from_iterable(plan.pieces[n].samples(CLASSES) for n in (0, 1, 3)):
        assert sample.problem is None
    write(tmp_path / "t3.tar", ["0-0", "x"])
    with pytest.raises(UserError, match=r"t3\.tar: key '0-0' occurs twice"):
        find_source(str(tmp_path), CLASSES, 20)
    write(tmp_path / "t3.tar", [])
    with pytest.raises(UserError, match=r"t3\.tar: holds no samples; leave it out"):
        find_source(str(tmp_path), CLASSES, 20)


def test_a_run_cut_by_bytes_holds_the_same_samples(world, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """A plan that is an estimate (here one sample too many) still ends in one row per source sample."""
    for name, parts in (("a.tar", (0, 1)), ("b.tar", (2,))):
        members = []
        for part in parts:
            with tarfile.open(world.tars / f"source-{part}.tar") as tar:
                members += [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
        write_tar(tmp_path / name, members)
    monkeypatch.setattr(tars, "EXACT", 10)
    recipe = world.load("source.shard_size=5", f"source.data={tmp_path}")
    plan = find_source(recipe.source.data, load_classes(world.clip / "prompts.yaml"), 5)
    assert not plan.exact and plan.samples != 36
    make_shards(recipe, str(tmp_path / "run"))
    run = RunDir(tmp_path / "run")
    assert {
        row["key"]: row["label"] for row in run.manifest()[0].to_pylist()
    } == world.labels and run.info().samples == 36
    make_shards(recipe, str(tmp_path / "run"))  # the same run: nothing is left to do
