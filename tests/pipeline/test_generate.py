"""Stage 1 as a whole: the same recipe gives the same bytes, and no sample is lost in silence."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from manifests import RunDir
from pipeline.generate import make_shards, near_chance, prepare_job
from pipeline.job.worker import Work, work_through
from pipeline.verify import problems
from shards import ShardDataset

from ..conftest import write_tar
from .test_resuming import Digests, leftovers


def test_same_recipe_same_bytes(world, finished_run: Path, run_digests: Digests, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Two runs of a recipe in different places have the same bytes: tars, parts, manifest, card and gallery."""
    out = tmp_path / "again"
    make_shards(world.load(), str(out))
    assert run_digests(out) == run_digests(finished_run) and len(run_digests(out)) == 10
    for name in ("README.md", "gallery.png", "run.json"):
        assert (out / name).read_bytes() == (finished_run / name).read_bytes()
    assert not leftovers(out) and not leftovers(finished_run)


def test_where_things_lie_does_not_matter(world, finished_run: Path, run_digests: Digests, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Source, models and class list may move, because they have fingerprints: the bytes stay the same."""
    moved = Path(shutil.copytree(world.folder, tmp_path / "moved"))
    recipe = world.load(
        f"source.data={moved / 'tars'}", f"source.classes={moved / 'clip' / 'prompts.yaml'}",
        f"teacher.model=local-dir:{moved / 'clip'}", f"discretizer.weights={moved / 'vqgan.safetensors'}",
    )  # fmt: skip
    make_shards(recipe, str(tmp_path / "run"))
    assert run_digests(tmp_path / "run") == run_digests(finished_run)


def test_another_seed_is_another_run(world, finished_run: Path, run_digests: Digests, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """The seed moves the random starts and thereby the DAD images; the clean stream stays as it is."""
    make_shards(world.load("seed=4"), str(tmp_path / "run"))
    ours, theirs = run_digests(tmp_path / "run"), run_digests(finished_run)
    for shard in range(3):
        assert ours[f"clean/clean-{shard:06d}.tar"] == theirs[f"clean/clean-{shard:06d}.tar"]
        assert ours[f"dad/dad-{shard:06d}.tar"] != theirs[f"dad/dad-{shard:06d}.tar"]


def test_an_image_folder_gives_the_same_samples(world, finished_run: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """The same images as class folders give, by key, the same images and labels and nearly the same logits."""
    make_shards(world.load(f"source.data={world.images}"), str(tmp_path / "run"))
    ours, theirs = ({s.key: s for s in map(d.__getitem__, range(len(d)))} for d in (
        ShardDataset(str(tmp_path / "run"), "clean"), ShardDataset(str(finished_run), "clean")))  # fmt: skip
    assert set(ours) == set(theirs) and len(ours) == 35
    for key, sample in ours.items():
        assert (sample.image == theirs[key].image).all() and sample.label == theirs[key].label  # type: ignore[union-attr]
        np.testing.assert_allclose(sample.logits.numpy(), theirs[key].logits.numpy(), atol=2e-2, rtol=2e-3)


def test_into_an_object_store(world, finished_run: Path, run_digests: Digests) -> None:  # type: ignore[no-untyped-def]
    """OUT may be any fsspec URL: the same bytes in memory:// as on disk, and running it again changes nothing."""
    url = "memory://made/run"
    for _ in range(2):
        make_shards(world.load(), url)
        run = RunDir(url)
        assert {name: run.store.sha256(name) for name in run_digests(finished_run)} == run_digests(finished_run)
    assert list(problems(url)) == []


def test_too_many_errors(world, cli, finished_run: Path, run_digests: Digests, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """More unreadable images than max_errors: all others are made, sealed and sound; exit status 2 with the reason."""
    told = cli("generate", "--recipe", world.recipe, "--out", tmp_path / "run", "--set", "max_errors=0.01")
    last = told.err.splitlines()[-1]
    assert told.status == 2 and last.startswith("error: ") and "Traceback" not in told.err
    assert "1 of 36 samples failed" in last and "img_017" in last and "truncated" in last and "max_errors" in last
    assert run_digests(tmp_path / "run") == run_digests(finished_run)
    assert list(problems(str(tmp_path / "run"))) == []
    assert cli("generate", "--recipe", world.recipe, "--out", tmp_path / "run", "--set", "max_errors=0.01").status == 2


def test_a_few_errors(world, cli, run_copy: Path) -> None:  # type: ignore[no-untyped-def]
    """Fewer than max_errors: status 0, and a note that names the first."""
    told = cli("generate", "--recipe", world.recipe, "--out", run_copy)
    assert told.status == 0 and "note: 1 of 36 samples failed, the first" in told.err and "img_017" in told.err
    assert "30 verified, 5 rejected, 1 error" in told.out or "1 error" in told.out


def test_nothing_verified(world, finished_run: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """A run of which the teacher verifies nothing is sealed, says so, and reads as an empty DAD stream."""
    rejected = [s.key for s in rows_of(finished_run) if s.status == "rejected"]
    for key in rejected[:2]:
        folder, _, name = key.partition("-")
        (tmp_path / "images" / folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(world.images / folder / f"{name}.jpg", tmp_path / "images" / folder)
    out = tmp_path / "run"
    make_shards(world.load(f"source.data={tmp_path / 'images'}", "batch=1"), str(out))
    counts = RunDir(out).info().counts
    assert counts == {"rejected": 2}, "batches of one changed the verdict: choose clearer samples"
    assert (
        list(problems(str(out))) == []
        and len(ShardDataset(str(out), "dad")) == 0
        and len(ShardDataset(str(out), "clean")) == 2
    )


class Record:
    """One row with attributes."""

    def __init__(self, row: dict[str, Any]) -> None:
        self.__dict__.update(row)
        self.key: str = row["key"]
        self.status: str = row["status"]


def rows_of(run: Path) -> list[Record]:
    return [Record(row) for row in RunDir(run).manifest()[0].to_pylist()]


def test_labels_that_are_not_the_teachers_are_told(
    world, finished_run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    """72 images labelled with the next class, as by a list in another order: one line at the end; else no line."""
    table, _ = RunDir(finished_run).manifest(["key", "clean_pred"])
    sees = {row["key"]: row["clean_pred"] for row in table.to_pylist() if row["clean_pred"] is not None}
    images = {
        str(path.relative_to(world.images).with_suffix("")).replace("/", "-"): path.read_bytes()
        for path in world.images.rglob("*.jpg")
    }
    for shift in (0, 1):
        source = tmp_path / f"{shift}.tar"
        samples = [
            (f"{again}-{key}", images[key], (label + shift) % 5) for again in range(2) for key, label in sees.items()
        ]
        write_tar(
            source,
            [m for key, image, label in samples for m in ((f"{key}.jpg", image), (f"{key}.cls", str(label).encode()))],
        )
        make_shards(world.load(f"source.data={source}", "attack.steps=0"), str(tmp_path / f"run{shift}"))
        said = [line for line in capsys.readouterr().err.splitlines() if "guessing" in line]
        assert len(said) == shift
    assert said[0].startswith("note: the teacher sees the label on 0.0% of the clean images; guessing would on 20.0%.")


def test_few_samples_raise_no_doubt_about_the_labels() -> None:
    """With 1000 classes, 250 samples without a hit prove nothing; 1.2 % right of 1.28 million (12 right classes) do."""
    assert not near_chance(0, 250, 1000) and near_chance(0, 400, 1000)
    assert near_chance(15_360, 1_280_000, 1000) and not near_chance(100_000, 1_280_000, 1000)
    assert not near_chance(0, 0, 1000) and not near_chance(40, 100, 2) and near_chance(5_000, 10_000, 2)


def test_codes_change_without_an_attack(world, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Q is not idempotent: `codes_changed` is no measure of the attack, and the card says so where there are codes."""
    for kind, without in (("vqgan", False), ("identity", True)):
        out = tmp_path / kind
        make_shards(world.load("attack.eps=0", f"discretizer.kind={kind}", "output.codes=false"), str(out))
        table, _ = RunDir(out).manifest()
        assert max(table.column("delta_l2").drop_null().to_pylist()) == 0
        assert (table.column("codes_changed").null_count == table.num_rows) == without
        assert ("Q is not idempotent" in (out / "README.md").read_text()) != without
    changed = RunDir(tmp_path / "vqgan").manifest()[0].column("codes_changed").drop_null().to_pylist()
    assert sum(changed) / len(changed) > 0.1


def test_the_gallery_never_stands_in_the_way(world, models, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    """Images that cannot be read any more are left out; where the source has gone altogether, a note says so."""
    source, out = Path(shutil.copytree(world.tars, tmp_path / "source")), tmp_path / "run"
    recipe = world.load(f"source.data={source}")
    make_shards(recipe, str(out))
    drawn = (out / "gallery.png").read_bytes()
    job = prepare_job(recipe, str(out))
    row = next(row for row in job.out.part(0)[0].to_pylist() if row["status"] == "verified")
    tar, data = source / "source-0.tar", bytearray((source / "source-0.tar").read_bytes())
    with tarfile.open(tar) as members:
        image = next(member for member in members if member.name.replace("/", "-") == f"{row['key']}.jpg")
    data[image.offset_data + 100 : image.offset_data + image.size] = bytes(
        image.size - 100
    )  # keeps names, labels and sizes
    tar.write_bytes(data)
    for name in ("gallery.png", "manifest.parquet"):
        (out / name).unlink()
    make_shards(recipe, str(out))
    assert (out / "manifest.parquet").exists() and 10_000 < len((out / "gallery.png").read_bytes()) != len(drawn)

    (out / "gallery.png").unlink()
    tars = Path(shutil.copytree(world.tars, tmp_path / "tars"))
    pieces = prepare_job(world.load(f"source.data={tars}"), str(tmp_path / "other")).source.pieces
    shutil.rmtree(tars)
    work_through(Work(recipe=recipe, out=str(out), run=job.info.fingerprint, todo=(), pieces=pieces), models=models)
    told = capsys.readouterr()
    assert f"note: {out}/gallery.png could not be drawn: {tars}/source-0.tar: no such file" in told.err
    assert not (out / "gallery.png").exists() and not (out / "work").exists()


def test_card_and_gallery(finished_run: Path) -> None:
    """The card has Hugging Face's YAML header and the numbers of the run; the gallery is a picture to look at."""
    _, header, text = (finished_run / "README.md").read_text().split("---\n", 2)
    tree = yaml.safe_load(header)
    assert tree["task_categories"] == ["image-classification"] and tree["size_categories"] == ["n<1K"]
    assert [config["data_files"] for config in tree["configs"]] == ["clean/*.tar", "dad/*.tar"]
    info = json.loads((finished_run / "run.json").read_text())
    assert (
        f"| {info['counts']['verified']:,} (" in text
        and "eps: 1.0" in text
        and all(p in text for p in info["fingerprints"].values())
    )
    image = Image.open(io.BytesIO((finished_run / "gallery.png").read_bytes()))
    assert image.format == "PNG" and image.width > 800 and np.asarray(image.convert("L")).std() > 10
