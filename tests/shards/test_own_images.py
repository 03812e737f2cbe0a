"""Runs that store labels only, with the user's own images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from manifests import RunDir, UserError
from manifests.files.cache import cache_folder
from manifests.rows import encode_table
from shards import ShardDataset, TrainingReader, iterate_tar
from shards.canvas import load_canvas
from shards.own_images import OwnImages
from tests.hub import LAYOUTS, write_layout
from tests.world import draw_pictures, jpeg, write_tar

MakeRun = Callable[..., Path]
SIZES = (9, 12)


@pytest.fixture
def run(make_run: MakeRun, tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", sizes=SIZES, images=False)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """The user's tars: other tars than the run's shards, in another order, with images that are not of the run, and
    not square.
    """
    keys = [f"s{shard}-{n:02d}" for shard, size in enumerate(SIZES) for n in range(size)]
    images = {
        key: jpeg(picture[:, :, :24])
        for key, picture in zip([*keys, "extra"], draw_pictures(len(keys) + 1), strict=True)
    }
    order = sorted(images, key=lambda key: key[::-1])
    folder = tmp_path / "own"
    folder.mkdir()
    for number in range(4):
        members = [member for key in order[number::4] for member in ((f"{key}.cls", b"0"), (f"{key}.jpg", images[key]))]
        write_tar(folder / f"mine-{number}.tar", members)
    return folder


def test_images_join_their_labels(run: Path, own: Path) -> None:
    """Every key gets the canvas of its own image, whatever tar it lies in; labels and logits stay the run's."""
    by_key = {}
    for path in own.glob("*.tar"):
        with open(path, "rb") as file:
            by_key |= {sample.key: load_canvas(sample.members["jpg"], 8) for _, sample in iterate_tar(file, str(path))}
    bare, joined = ShardDataset(str(run), "clean"), ShardDataset(str(run), "clean", images=own)
    assert len(joined) == len(bare) > 15
    for n in range(len(bare)):
        assert bare[n].image is None and joined[n].image is not None
        assert (
            joined[n].key == bare[n].key
            and joined[n].label == bare[n].label
            and torch.equal(joined[n].logits, bare[n].logits)
        )
        assert torch.equal(joined[n].image, by_key[bare[n].key])  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [0, 2])
def test_training_from_own_images(run: Path, own: Path, workers: int) -> None:
    reader = TrainingReader(str(run), batch_size=5, streams=("clean",), images=own)
    for batch in reader.batches(0, workers=workers):
        assert batch["clean"].images.shape == (5, 3, 8, 8)


def test_the_join_is_kept(run: Path, own: Path) -> None:
    """The second opening reads no tar; a tar that changed is scanned again."""
    ShardDataset(str(run), "clean", images=own)
    kept = set(cache_folder("indexes").iterdir())
    ShardDataset(str(run), "clean", images=own)
    assert set(cache_folder("indexes").iterdir()) == kept
    first = next(own.glob("*.tar"))
    first.write_bytes(first.read_bytes()[:700])
    with pytest.raises(UserError, match=str(first)):
        ShardDataset(str(run), "clean", images=own)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("place", ["local", "s3", "memory"])
def test_the_layout_does_not_matter(
    make_run: MakeRun, tmp_path: Path, request: pytest.FixtureRequest, kind: str, place: str
) -> None:
    """The same images under the same keys, wherever they lie: read at random, by several readers, and from the kept
    join.
    """
    if place == "s3":
        request.getfixturevalue("object_store")
    root = {"local": str(tmp_path), "s3": f"s3://bucket/{tmp_path.name}", "memory": f"memory://{tmp_path.name}"}[place]
    names = [f"s{shard}-{n:02d}" for shard, size in enumerate(SIZES) for n in range(size)]
    pictures = [jpeg(picture[:, :, :24]) for picture in draw_pictures(len(names))]
    # A class folder is a part of its images' keys, as in a run that was made from class folders
    folder = "n1-" if kind == "folders" else ""
    samples = [(name, data, 0) for name, data in zip(names, pictures, strict=True)]
    where = write_layout(f"{root}/own", kind, samples[::-1], ["n1"], "jpg")
    run = make_run(tmp_path / "run", sizes=SIZES, images=False, prefix=folder)
    expected = {folder + name: load_canvas(data, 8) for name, data in zip(names, pictures, strict=True)}
    for _ in range(2):
        dataset = ShardDataset(str(run), "clean", images=where)
        assert len(dataset) > 15
        for n in reversed(range(len(dataset))):
            assert torch.equal(dataset[n].image, expected[dataset[n].key])  # type: ignore[arg-type]
    if place != "memory":  # which another process would not see
        batches = TrainingReader(str(run), batch_size=5, streams=("clean",), images=where).batches(0, workers=1)
        for batch in batches:
            for key, image in zip(batch["clean"].keys, batch["clean"].images, strict=True):
                assert torch.equal(image, expected[key])


def test_what_holds_no_images(run: Path, tmp_path: Path) -> None:
    """One line that repeats what was given, and says what would do."""
    (tmp_path / "empty" / "ant").mkdir(parents=True)
    with pytest.raises(UserError, match=f"^images: {tmp_path}/empty: holds no images; expected WebDataset tars"):
        ShardDataset(str(run), "clean", images=tmp_path / "empty")
    with pytest.raises(UserError, match=f"^images: {tmp_path}/none: no such file or folder$"):
        ShardDataset(str(run), "clean", images=tmp_path / "none")
    with pytest.raises(UserError, match=r"^images: pipe:cat a\.tar: images are read at random"):
        ShardDataset(str(run), "clean", images="pipe:cat a.tar")


@pytest.mark.parametrize("kind", ["folders", "parquet"])
def test_files_that_change_while_they_are_read(make_run: MakeRun, tmp_path: Path, kind: str) -> None:
    samples = [(f"s0-{n:02d}", jpeg(picture), 0) for n, picture in enumerate(draw_pictures(9))]
    where = write_layout(tmp_path / "own", kind, samples, ["n1"], "jpg")
    run = make_run(tmp_path / "run", sizes=(9,), images=False, prefix="n1-" if kind == "folders" else "")
    dataset = ShardDataset(str(run), "clean", images=where)
    if kind == "folders":
        (tmp_path / "own" / "n1" / "s0-02.jpg").unlink()
        with pytest.raises(UserError, match=rf"^{where}/n1/s0-02\.jpg: cannot read the file: No such file"):
            dataset[2]
    else:
        write_layout(where, kind, samples[::-1], ["n1"], "jpg")
        with pytest.raises(UserError, match=rf"^{where}/set-0\.parquet: s0-02 is no longer where it was"):
            dataset[2]


def test_a_run_without_names(run: Path, own: Path) -> None:
    """Keys that are places in the source are nobody's: said before a tar is read, rather than that none of the
    images is here.
    """
    tree = json.loads((run / "run.json").read_text())
    tree["identity"]["source.keys"] = "place"
    (run / "run.json").write_text(json.dumps(tree))
    info, manifest = RunDir(run).info(), pq.read_table(run / "manifest.parquet")
    data = encode_table(manifest, json.loads(manifest.schema.metadata[b"dad"]) | {"run": info.fingerprint})
    (run / "manifest.parquet").write_bytes(data)
    (run / "run.json").write_text(json.dumps(tree | {"manifest_sha256": hashlib.sha256(data).hexdigest()}))
    with pytest.raises(UserError, match=r"source\.keys=place.*make it anew with source\.keys=name"):
        ShardDataset(str(run), "clean", images=own)


def test_images_that_nobody_needs(plain_run: Path, own: Path) -> None:
    """Not taken and not looked at: a user who gives them believes that they are trained on."""
    with pytest.raises(
        UserError, match=f"^images: the clean shards of {plain_run} hold images themselves; leave images out"
    ):
        ShardDataset(str(plain_run), "clean", images=own)


def test_images_that_are_not_there(run: Path, own: Path) -> None:
    for path in own.glob("mine-[01].tar"):
        path.unlink()
    with pytest.raises(UserError, match=r"\d+ of \d+ images of the run are not here, the first is s\d-\d\d"):
        ShardDataset(str(run), "clean", images=own)


def test_an_unreadable_image_is_named(run: Path, own: Path) -> None:
    path = own / "mine-0.tar"
    with open(path, "rb") as file:
        members = [(f"{s.key}.jpg", s.members["jpg"][:50]) for _, s in iterate_tar(file, str(path))]
    write_tar(path, members)
    reader = TrainingReader(str(run), batch_size=5, streams=("clean",), images=own)
    with pytest.raises(UserError, match=rf"{path}: s\d-\d\d: unreadable image"):
        list(reader.batches(0))


def test_a_key_that_occurs_twice(run: Path, own: Path) -> None:
    """In the tars of two sets: no telling which image the label is for. A key that the run does not know may occur
    as often as it likes.
    """
    pictures = draw_pictures(2)
    write_tar(own / "other.tar", [("extra.jpg", jpeg(pictures[0]))])
    ShardDataset(str(run), "clean", images=own)
    write_tar(own / "val.tar", [("s0-00.jpg", jpeg(pictures[1]))])
    with pytest.raises(
        UserError, match=rf"^images: s0-00 is in {own}/mine-\d\.tar and again in {own}/val\.tar; name a source"
    ):
        ShardDataset(str(run), "clean", images=own)


def test_a_run_whose_own_keys_repeat(own: Path) -> None:
    """Two labels cannot share one image, even where the user has but one of that name."""
    with pytest.raises(
        UserError, match=r"^images: 2 samples of the run have the key of another, .*output\.clean_images=true"
    ):
        OwnImages(own, pa.array(["s0-00", "s0-01", "s0-00", "s0-00"]), "four keys")


@pytest.mark.parametrize("change", ["rotated", "shorter"])
def test_a_tar_that_is_rewritten_while_it_is_read(run: Path, own: Path, change: str) -> None:
    """Where one image lay, another lies now, or none: named, never shown under the wrong label."""
    dataset = ShardDataset(str(run), "clean", images=own)
    path = own / "mine-0.tar"
    with open(path, "rb") as file:
        members = [(f"{s.key}.jpg", s.members["jpg"]) for _, s in iterate_tar(file, str(path))]
    keys = {name.removesuffix(".jpg") for name, _ in members}
    write_tar(path, members[1:] + members[:1] if change == "rotated" else members[:1])
    index = max(n for n in range(len(dataset)) if dataset.key(n) in keys)
    with pytest.raises(
        UserError, match=rf"^{path}: {dataset.key(index)} is no longer where it was|^{path}: not a readable tar"
    ):
        dataset[index]
