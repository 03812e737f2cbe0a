"""Random access to one stream: written samples come back; altered ones are refused by name."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from manifests import RunDir, UserError
from manifests.rows import decode_table, encode_table
from shards import ShardDataset, decode_image, iterate_tar

MakeRun = Callable[..., Path]


@pytest.mark.parametrize("stream", ["clean", "dad"])
def test_the_samples_of_a_stream(plain_run: Path, stream: Any) -> None:
    """The dataset holds key, label, logits and image of every sample as the tars do, in the order of the source."""
    dataset = ShardDataset(str(plain_run), stream)
    expected = []
    for path in sorted((plain_run / stream).glob("*.tar")):
        with open(path, "rb") as file:
            expected += [sample for _, sample in iterate_tar(file, str(path))]
    assert len(dataset) == len(expected) > 25
    for n, sample in enumerate(expected):
        found = dataset[n]
        assert (
            found.key == dataset.key(n) == sample.key and found.label == int(sample.members["cls"]) == dataset.labels[n]
        )
        assert found.logits.dtype == torch.float16 and found.logits.shape == (5,)
        assert np.array_equal(found.logits.numpy(), np.load(io.BytesIO(sample.members["logits.npy"])))
        assert found.image is not None and torch.equal(found.image, decode_image(sample.members["png"]))
    for index in (len(dataset), -1):
        with pytest.raises(IndexError):
            dataset[index]
    assert [sample.key for sample in dataset] == [sample.key for sample in expected]  # type: ignore[attr-defined]


def test_class_names_come_along(finished_run: Path, world) -> None:  # type: ignore[no-untyped-def]
    """The three lines of the README: a label is an index into the run's own class list."""
    import yaml

    dataset = ShardDataset(str(finished_run), "dad")
    assert dataset.classes == yaml.safe_load((world.clip / "prompts.yaml").read_text())["classes"]
    sample = dataset[0]
    assert world.labels[sample.key] == sample.label and sample.logits.argmax() == sample.label
    assert sample.image is not None and sample.image.shape == (3, 32, 32)


def test_labels_only(make_run: MakeRun, tmp_path: Path) -> None:
    """A run without clean images has labels and logits; image is None."""
    dataset = ShardDataset(str(make_run(tmp_path / "run", images=False)), "clean")
    assert dataset[0].image is None and dataset[0].logits.shape == (5,)


def test_from_an_object_store(make_run: MakeRun, plain_run: Path) -> None:
    """A URL gives the same samples as a folder."""
    make_run("memory://dataset/run")
    near, far = ShardDataset(str(plain_run), "dad"), ShardDataset("memory://dataset/run", "dad")
    assert len(near) == len(far)
    for a, b in zip(near, far, strict=True):  # type: ignore[call-overload]
        assert a.key == b.key and torch.equal(a.image, b.image) and torch.equal(a.logits, b.logits)
    far.check()
    far.run.store.fs.rm_file(far.run.store._full("dad/dad-000002.tar"))
    with pytest.raises(UserError, match=r"memory://dataset/run/dad/dad-000002\.tar: missing"):
        list(far)  # type: ignore[call-overload]


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "header": (lambda path: flip(path, 1), "not the one that was written"),
    "image": (lambda path: flip(path, 600), "not the one that was written"),
    "padding": (lambda path: flip(path, 511), "not the one that was written"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:1000]), "truncated"),
    "emptied": (lambda path: path.write_bytes(b""), "truncated"),
    "removed": (lambda path: path.unlink(), "missing"),
    "swapped": (
        lambda path: shutil.copy(path.with_name("dad-000000.tar"), path),
        "not the one that was written|truncated",
    ),
}


@pytest.fixture
def copy(plain_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain_run, tmp_path / "run"))


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(copy: Path, damage: str) -> None:
    """Reading a damaged tar raises a UserError that names it; `check` finds it first; other tars still read."""
    act, reason = DAMAGE[damage]
    path = copy / "dad" / "dad-000003.tar"
    act(path)
    dataset = ShardDataset(str(copy), "dad")
    first = int(np.flatnonzero(dataset.shards == 3)[0])
    with pytest.raises(UserError, match=f"^{path}: .*({reason})") as caught:
        dataset[first]
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=f"^{path}: .*make shards"):
        dataset.check(progress=False)
    dataset[0]
    ShardDataset(str(copy), "clean").check(progress=False)


def test_a_flip_behind_the_samples(copy: Path) -> None:
    """Damage in the trailing zeros hurts no sample; `check` by content finds it, by size it cannot."""
    path = copy / "dad" / "dad-000001.tar"
    flip(path, path.stat().st_size - 1)
    dataset = ShardDataset(str(copy), "dad")
    assert len(list(dataset)) == len(dataset)  # type: ignore[call-overload]
    dataset.check(content=False, progress=False)
    with pytest.raises(UserError, match=f"^{path}: its sha256"):
        dataset.check(progress=False)


def test_a_repaired_tar_is_read_in_the_same_process(copy: Path) -> None:
    """After `make shards` has put a good tar in place of a damaged one, reading goes on without a restart."""
    path = copy / "dad" / "dad-000000.tar"
    good = path.read_bytes()
    flip(path, 600)
    dataset = ShardDataset(str(copy), "dad")
    with pytest.raises(UserError):
        dataset[0]
    (copy / "new").write_bytes(good)
    (copy / "new").rename(path)
    assert dataset[0].key == dataset.key(0)


@pytest.fixture
def new_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No index of any run is kept here yet."""
    monkeypatch.setenv("DAD_CACHE", str(tmp_path / "cache"))


def test_runs_that_are_not_there_or_not_sealed(copy: Path, tmp_path: Path, new_cache: None) -> None:
    with pytest.raises(UserError, match="no run directory here"):
        ShardDataset(str(tmp_path / "nothing"))
    (copy / "manifest.parquet").unlink()
    with pytest.raises(UserError, match="not complete yet"):
        ShardDataset(str(copy))


def test_an_edited_manifest(copy: Path, new_cache: None) -> None:
    """manifest.parquet must have the sha256 that run.json states."""
    flip(copy / "manifest.parquet", 100)
    with pytest.raises(UserError, match=r"manifest\.parquet: is not the one that was sealed"):
        ShardDataset(str(copy))


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def npy(array: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def archive() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros(5, np.float16))
    return buffer.getvalue()


HOSTILE: dict[str, Callable[[Path], dict[str, bytes]]] = {
    "label is no number": lambda target: {"cls": b"ant"},
    "label is empty": lambda target: {"cls": b""},
    "label outside the class list": lambda target: {"cls": b"5"},
    "label is negative": lambda target: {"cls": b"-1"},
    "logits are pickled objects": lambda target: {
        "logits.npy": npy(np.array([Trap(target)], dtype=object), allow_pickle=True)
    },
    "logits are a bare pickle": lambda target: {"logits.npy": pickle.dumps(Trap(target))},
    "logits are a zip": lambda target: {"logits.npy": archive()},
    "logits of another type": lambda target: {"logits.npy": npy(np.zeros(5, np.float32))},
    "logits of other classes": lambda target: {"logits.npy": npy(np.zeros(3, np.float16))},
    "logits of too many dimensions": lambda target: {"logits.npy": npy(np.zeros((2, 2, 5), np.float16))},
    "no image": lambda target: {"png": b"<html>"},
    "an image of a billion pixels": lambda target: {
        "png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes([0, 0, 255, 0] * 2) + b"\x08\2\0\0\0" + bytes(40)
    },
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_runs(make_run: MakeRun, tmp_path: Path, case: str) -> None:
    """A published run may hold anything under right checksums: the UserError names tar and key, and nothing runs."""
    target = tmp_path / "pwned"

    def edit(stream: str, key: str, members: dict[str, bytes]) -> dict[str, bytes]:
        return members | HOSTILE[case](target) if key == "s1-02" else members

    out = make_run(tmp_path / "run", edit=edit)
    dataset = ShardDataset(str(out), "dad")
    dataset.check(progress=False)
    index = next(n for n in range(len(dataset)) if dataset.key(n) == "s1-02")
    with pytest.raises(UserError, match=r"dad-000001\.tar: .*s1-02") as caught:
        dataset[index]
    assert "\n" not in str(caught.value) and not target.exists()
    dataset[index - 1]


@pytest.mark.parametrize("missing", ["cls", "logits.npy"])
def test_samples_without_label_or_logits(make_run: MakeRun, tmp_path: Path, missing: str) -> None:
    def edit(stream: str, key: str, members: dict[str, bytes]) -> dict[str, bytes]:
        return {name: data for name, data in members.items() if name != missing}

    with pytest.raises(UserError, match=r"dad-000000\.tar: s0-00: has no"):
        ShardDataset(str(make_run(tmp_path / "run", edit=edit)), "dad")[0]


def test_unknown_members_are_ignored(make_run: MakeRun, tmp_path: Path) -> None:
    """Reading ignores pickles, modules and texts beside the known members."""
    target = tmp_path / "pwned"
    extra = {
        "pkl": pickle.dumps(Trap(target)),
        "pyd": b"MZ",
        "pth": b"import os; os.mkdir('pwned')",
        "json": b"{",
        "codes.npy": b"?",
    }
    dataset = ShardDataset(str(make_run(tmp_path / "run", edit=lambda stream, key, members: extra | members)), "dad")
    assert len([sample.image for sample in dataset]) == len(dataset) and not target.exists()  # type: ignore[attr-defined]


def reseal(run: Path, edit: Callable[[dict[str, Any]], object], **columns: list[int | None]) -> None:
    """Edit the metadata of a run's manifest, replace some columns, and make run.json vouch for the result."""
    table, meta = decode_table((run / "manifest.parquet").read_bytes(), "manifest")
    edit(meta)
    for name, values in columns.items():
        table = table.set_column(
            table.schema.get_field_index(name),
            table.schema.field(name),
            pa.array(values, table.schema.field(name).type),
        )
    data = encode_table(table, meta)
    (run / "manifest.parquet").write_bytes(data)
    tree = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(tree | {"manifest_sha256": hashlib.sha256(data).hexdigest()}))


TARS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no tars": (lambda meta: meta.pop("tars"), "tars: input should be a valid list"),
    "no list": (lambda meta: meta.update(tars={"name": "a"}), "tars: input should be a valid list"),
    "no size": (lambda meta: meta["tars"][2].pop("size"), r"tars\.2\.size: field required"),
    "a size in words": (
        lambda meta: meta["tars"][0].update(size="big"),
        r"tars\.0\.size: input should be a valid integer",
    ),
}


@pytest.mark.parametrize("case", TARS)
def test_a_manifest_that_lacks_a_field(copy: Path, case: str) -> None:
    edit, reason = TARS[case]
    reseal(copy, edit)
    with pytest.raises(UserError, match=rf"^{copy}/manifest\.parquet: {reason}"):
        ShardDataset(str(copy))


@pytest.mark.parametrize("column", ["shard", "dad_offset", "dad_size"])
def test_a_manifest_of_negative_numbers(copy: Path, column: str) -> None:
    values = RunDir(copy).manifest([column])[0].column(column).to_pylist()
    reseal(copy, lambda meta: None, **{column: [-5, *values[1:]]})
    with pytest.raises(
        UserError, match=rf"^{copy}/manifest\.parquet: dad samples of negative {column.removeprefix('dad_')}"
    ):
        ShardDataset(str(copy))


@pytest.mark.parametrize("canvas", [None, 0, -8, "big", 8.0, True])
def test_a_run_without_a_canvas(copy: Path, canvas: object) -> None:
    """A run whose canvas is not a number of pixels is refused, for students take their input size from it."""
    tree = json.loads((copy / "run.json").read_text())
    tree["recipe"] = {"canvas": canvas} if canvas is not None else {}
    (copy / "run.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match=rf"^{copy}/run\.json: recipe\.canvas: {canvas!r} is not a number of pixels"):
        ShardDataset(str(copy))


def test_a_manifest_that_points_elsewhere(copy: Path) -> None:
    """A manifest re-made to name tars outside the run is refused: no other file is read."""
    shutil.copy(copy / "dad" / "dad-000000.tar", copy.parent / "secret-0.tar")
    reseal(
        copy,
        lambda meta: [
            tar.update(name="dad/../../secret-0.tar") for tar in meta["tars"] if tar["name"] == "dad/dad-000000.tar"
        ],
    )
    with pytest.raises(UserError, match=r"names 'dad/\.\./\.\./secret-0\.tar', which is no tar of a run directory"):
        ShardDataset(str(copy), "dad")
