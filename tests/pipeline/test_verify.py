"""`problems` names every damaged file of a run directory; `reinfer` finds logits that the teacher does not give."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from manifests import RunDir, UserError
from manifests.rows import TarRecord, encode_part, encode_table
from manifests.rundir import part_name
from pipeline.generate import make_shards
from pipeline.job.models import Models
from pipeline.verify import _infer, problems, reinfer, summary
from shards import ShardDataset, TarWriter, iterate_tar
from shards.codec import encode_array


def named(run: Path) -> list[str]:
    """All problems of a run; each is one line that begins with a path below the run."""
    lines = list(problems(str(run)))
    assert all("\n" not in line and line.startswith(str(run)) for line in lines)
    return lines


def flip(path: Path, at: int, bit: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= bit
    path.write_bytes(data)


def member_start(path: Path, n: int) -> int:
    """First byte of the data of the n-th member."""
    with tarfile.open(path) as tar:
        return tar.getmembers()[n].offset_data


def test_a_good_run_has_no_problem(finished_run: Path) -> None:
    assert named(finished_run) == []
    told = summary(str(finished_run))
    assert "as recorded" in told and "1 error" in told


PLACES: dict[str, Callable[[Path], int]] = {
    "name in the first header": lambda path: 0,
    "checksum of a header": lambda path: member_start(path, 3) - 512 + 150,
    "unused bytes of a header": lambda path: member_start(path, 3) - 5,
    "image": lambda path: member_start(path, 0) + 200,
    "label": lambda path: member_start(path, 1),
    "logits": lambda path: member_start(path, 2) + 130,
    "padding": lambda path: member_start(path, 1) + 300,
    "trailing zeros": lambda path: path.stat().st_size - 1,
    "first zero block": lambda path: len(path.read_bytes().rstrip(b"\0")) + 700,
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("stream", ["clean", "dad"])
def test_one_flipped_bit(run_copy: Path, stream: str, place: str) -> None:
    """One bit anywhere in a tar, in what matters and in what does not: the tar is named, and no other."""
    path = run_copy / stream / f"{stream}-000001.tar"
    flip(path, PLACES[place](path))
    (line,) = named(run_copy)
    assert line.startswith(f"{path}: ") and "sha256" in line


def cut_at_member(path: Path) -> None:
    """Cut the tar exactly between two samples: what is left is a well-formed tar."""
    data = path.read_bytes()
    path.write_bytes(data[: member_start(path, 3) - 512])


def cut_and_close(path: Path) -> None:
    """As before, with a proper end of archive, filled up to the old size: only the checksum can tell."""
    size = path.stat().st_size
    cut_at_member(path)
    path.write_bytes(path.read_bytes().ljust(size, b"\0"))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.unlink(), "missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "truncated"),
        (lambda path: path.write_bytes(b""), "truncated"),
        (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "the manifest says"),
        (cut_at_member, "truncated"),
        (cut_and_close, "sha256"),
    ],
)
def test_a_tar_that_is_not_whole(run_copy: Path, damage: Callable[[Path], object], reason: str) -> None:
    path = run_copy / "dad" / "dad-000002.tar"
    damage(path)
    (line,) = named(run_copy)
    assert line.startswith(f"{path}: ") and reason in line


def test_swapped_tars(run_copy: Path) -> None:
    """Two whole tars under each other's names: both are named."""
    first, second = run_copy / "dad" / "dad-000000.tar", run_copy / "dad" / "dad-000001.tar"
    first.rename(run_copy / "x")
    second.rename(first)
    (run_copy / "x").rename(second)
    assert [line.partition(": ")[0] for line in named(run_copy)] == [str(first), str(second)]


@pytest.mark.parametrize("stream", ["clean", "dad"])
def test_an_extra_tar(run_copy: Path, stream: str) -> None:
    """A tar that no row knows of would be read by whoever lists the folder."""
    path = run_copy / stream / f"{stream}-000003.tar"
    shutil.copy(run_copy / stream / f"{stream}-000001.tar", path)
    (line,) = named(run_copy)
    assert line.startswith(f"{path}: not in the manifest")


def test_a_part_file_of_another_run(world, run_copy: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """A part of a run with another seed, of another shard, a missing and a broken one: each named."""
    make_shards(world.load("seed=4"), str(tmp_path / "other"))
    part = run_copy / part_name(1)
    whole = part.read_bytes()
    cases: list[tuple[bytes | None, str]] = [
        ((tmp_path / "other" / part_name(1)).read_bytes(), "belongs to another run or shard"),
        ((run_copy / part_name(0)).read_bytes(), "belongs to another run or shard"),
        (None, "missing"),
        (whole[:-20], "damaged"),
        (b"", "damaged"),
    ]
    for content, reason in cases:
        part.unlink() if content is None else part.write_bytes(content)
        (line,) = named(run_copy)
        assert line.startswith(f"{part}: ") and reason in line
        part.write_bytes(whole)
    assert named(run_copy) == []


def test_an_edited_part_file(run_copy: Path) -> None:
    """A well-formed part with one number changed no longer fits the sealed manifest."""
    part = run_copy / part_name(1)
    table = pq.read_table(part)
    probabilities = table.column("clean_prob").to_pylist()
    probabilities[0] = 0.123
    index = table.schema.get_field_index("clean_prob")
    pq.write_table(table.set_column(index, "clean_prob", pa.array(probabilities, pa.float32())), part)
    (line,) = named(run_copy)
    assert "rows are not those of the part files" in line


def test_any_flipped_bit_of_a_part_file(run_copy: Path) -> None:
    """A bit flipped anywhere in a part is named, unless its content stays the same; Parquet has no checksum itself."""
    part = run_copy / part_name(0)
    whole = part.read_bytes()
    rows, record = RunDir(run_copy).part(0)
    rng = np.random.default_rng(0)
    for at in [4, 5, len(whole) - 1, len(whole) - 6, *rng.integers(0, len(whole), 60).tolist()]:
        flip(part, at, 1 << int(rng.integers(8)))
        if not named(run_copy):
            again, record_again = RunDir(run_copy).part(0)
            assert again.equals(rows) and record_again == record, f"byte {at} of {len(whole)}"
        part.write_bytes(whole)


EDITS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "class names": (lambda run: run["classes"].reverse(), "its class names are not those that were sealed"),
    "canvas": (lambda run: run["recipe"].update(canvas=64), "was edited (recipe.canvas is 64, identity says 32)"),
    "eps": (lambda run: run["recipe"]["attack"].update(eps=9.0), "was edited (recipe.attack.eps is 9.0, identity says"),
    "identity": (lambda run: run["identity"].update(seed=99), "was edited (recipe.seed is"),
    "teacher": (lambda run: run["fingerprints"].update(teacher="0" * 16), "belongs to another run"),
    "counts": (lambda run: run["counts"].update(verified=5000), "says 5,000 verified, "),
    "samples": (lambda run: run.update(samples=5000), "holds 36 rows, run.json says 5000 samples"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_run_json_is_bound_to_the_shards(
    run_copy: Path, edit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever an edit invents, verify names it; but for the counts, so does whoever reads the shards."""
    monkeypatch.setenv("DAD_CACHE", str(tmp_path / "cache"))
    assert len(ShardDataset(str(run_copy), "dad"))  # the index of the true run is in the cache
    change, told = EDITS[edit]
    tree = json.loads((run_copy / "run.json").read_text())
    change(tree)
    (run_copy / "run.json").write_text(json.dumps(tree))
    try:
        lines = named(run_copy)
    except UserError as error:
        lines = [str(error)]
    assert any(told in line for line in lines), lines
    if edit != "counts":
        with pytest.raises(UserError, match=re.escape(told)):
            ShardDataset(str(run_copy), "dad")


def test_an_edited_manifest(run_copy: Path) -> None:
    """manifest.parquet with a label changed is named; also when run.json is made to agree with it."""
    path = run_copy / "manifest.parquet"
    table = pq.read_table(path)
    labels = table.column("label").to_pylist()
    labels[0] = (labels[0] + 1) % 5
    index = table.schema.get_field_index("label")
    pq.write_table(table.set_column(index, "label", pa.array(labels, pa.int32())), path)
    (line,) = named(run_copy)
    assert line.startswith(f"{path}: is not the one that was sealed")
    info = json.loads((run_copy / "run.json").read_text())
    info["manifest_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (run_copy / "run.json").write_text(json.dumps(info))
    (line,) = named(run_copy)
    assert line.startswith(f"{path}: its rows are not those of the part files")


def test_a_manifest_with_other_tars(run_copy: Path) -> None:
    """The list of tars in the manifest is compared too."""
    run = RunDir(run_copy)
    table, tars = run.manifest()
    data = encode_table(table, {"run": run.info().fingerprint, "tars": [dataclasses.asdict(tar) for tar in tars[:-1]]})
    (run_copy / "manifest.parquet").write_bytes(data)
    run.write_info(dataclasses.replace(run.info(), manifest_sha256=hashlib.sha256(data).hexdigest()))
    assert any("list of tars" in line for line in named(run_copy))


def test_not_sealed_and_no_run(run_copy: Path, tmp_path: Path) -> None:
    """Without manifest.parquet the run is not complete; without run.json, or with a broken one, there is no run."""
    (run_copy / "manifest.parquet").unlink()
    (line,) = named(run_copy)
    assert "not complete yet" in line
    for content, reason in (
        (b"{", "damaged"),
        (b"[]", "damaged"),
        (b'{"format": 99}', "format 99"),
        (b'{"format": 1}', "damaged"),
    ):
        (run_copy / "run.json").write_bytes(content)
        with pytest.raises(UserError, match=reason):
            list(problems(str(run_copy)))
    with pytest.raises(UserError, match="no run directory here"):
        list(problems(str(tmp_path / "nothing")))


def rewrite(run: Path, shard: int, change: Callable[[str, dict[str, bytes]], None]) -> None:
    """Change samples of a dad tar and make everything agree with it: extents, checksums, part, manifest, run.json."""
    directory = RunDir(run)
    info = directory.info()
    table, record = directory.part(shard)
    rows = {row["key"]: row for row in table.to_pylist()}
    name = f"dad/dad-{shard:06d}.tar"
    writer = TarWriter()
    with open(run / name, "rb") as file:
        for _, sample in iterate_tar(file, name):
            change(sample.key, sample.members)
            extent = writer.add(sample.key, sample.members)
            rows[sample.key] |= {"dad_offset": extent.offset, "dad_size": extent.size, "dad_crc32": extent.crc32}
    data = writer.close()
    (run / name).write_bytes(data)
    ours = TarRecord(name=name, size=len(data), sha256=hashlib.sha256(data).hexdigest(), samples=writer.samples)
    tars = tuple(ours if tar.name == name else tar for tar in record.tars)
    (run / part_name(shard)).write_bytes(encode_part(list(rows.values()), dataclasses.replace(record, tars=tars)))
    directory.seal(info, range(info.shards))


def test_reinference_of_a_good_run(finished_run: Path) -> None:
    """The teacher, asked again about every sample in batches of other samples, agrees with what is stored."""
    assert list(reinfer(str(finished_run), 100, 0, ())) == []


def test_logits_altered_consistently(run_copy: Path) -> None:
    """Soft labels changed and every checksum adapted: the teacher finds exactly these samples."""
    changed = []

    def shift(key: str, members: dict[str, bytes]) -> None:
        logits = np.load(io.BytesIO(members["logits.npy"]))
        if len(changed) < 3:
            logits[logits.argmin()] += np.float16(0.1 * abs(logits).max())
            changed.append(key)
        members["logits.npy"] = encode_array(logits)

    rewrite(run_copy, 1, shift)
    assert named(run_copy) == []
    lines = list(reinfer(str(run_copy), 100, 0, ()))
    assert len(lines) == 3 and all(any(f"dad sample {key}: logits differ" in line for line in lines) for key in changed)


def test_an_image_exchanged_consistently(run_copy: Path) -> None:
    """Another picture under a key, checksums made to fit: the teacher does not see what was stored."""
    first: list[bytes] = []

    def exchange(_key: str, members: dict[str, bytes]) -> None:
        first.append(members["jpg"])
        if len(first) == 2:
            members["jpg"] = first[0]

    rewrite(run_copy, 0, exchange)
    assert named(run_copy) == [] and len(list(reinfer(str(run_copy), 100, 0, ()))) >= 1


def test_a_label_altered_consistently(run_copy: Path) -> None:
    """A label in a tar that is not the manifest's is named, with every checksum made to fit."""

    def relabel(_key: str, members: dict[str, bytes]) -> None:
        members["cls"] = str((int(members["cls"]) + 1) % 5).encode()

    rewrite(run_copy, 0, relabel)
    assert any("dad-000000.tar: sample" in line and "has label" in line for line in named(run_copy))


def test_a_rejected_sample_among_the_verified(run_copy: Path) -> None:
    """A row turned to 'rejected' whose sample lies in dad/: named."""
    directory = RunDir(run_copy)
    info = directory.info()
    table, record = directory.part(0)
    rows = table.to_pylist()
    next(row for row in rows if row["status"] == "verified")["status"] = "rejected"
    (run_copy / part_name(0)).write_bytes(encode_part(rows, record))
    directory.seal(info, range(info.shards))
    (line,) = named(run_copy)
    assert "dad-000000.tar: sample" in line and "only verified samples belong here" in line


def test_another_teacher(world, finished_run: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Verifying with another teacher is refused, naming the field; the same teacher at another place is accepted."""
    from safetensors.torch import load_file, save_file

    clip = Path(shutil.copytree(world.clip, tmp_path / "clip"))
    assert list(reinfer(str(finished_run), 5, 0, (f"teacher.model=local-dir:{clip}",))) == []
    weights = load_file(clip / "open_clip_model.safetensors")
    weights["visual.proj"][0] += 1
    save_file(weights, clip / "open_clip_model.safetensors")
    with pytest.raises(UserError, match=r"teacher\.model: this is not the teacher that labelled"):
        list(reinfer(str(finished_run), 5, 0, (f"teacher.model=local-dir:{clip}",)))


def test_only_the_teacher_is_asked(finished_run: Path, models: Models) -> None:
    """No VQGAN is needed; and a CPU looks at the samples that were asked for, however large the batches of the run."""
    assert list(reinfer(str(finished_run), 5, 0, ("discretizer.weights=gone.safetensors",))) == []
    seen: list[int] = []
    hook = models.teacher_model.register_forward_pre_hook(lambda _model, images: seen.append(len(images[0])))
    _infer([torch.zeros(3, 32, 32, dtype=torch.uint8)] * 3, models, 512)
    hook.remove()
    assert seen == [3]
