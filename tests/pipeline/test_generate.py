"""Stage 1 as a whole: the same bytes however often it is killed, nothing done twice, nothing lost in silence."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from manifests import RunDir, UserError
from pipeline.generate import make_shards, near_chance, prepare_job
from pipeline.job.worker import Work, work_through
from pipeline.verify import problems
from shards import ShardDataset

from ..conftest import write_tar
from ..patience import PATIENCE

Digests = Callable[[Path], dict[str, str]]


def leftovers(out: Path) -> list[Path]:
    """Temporary files below a folder."""
    return [path for path in out.rglob("*") if path.name.endswith(".tmp") or path.name.startswith(".")]


def times(out: Path) -> dict[str, int]:
    return {str(path.relative_to(out)): path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}


def test_same_recipe_same_bytes(world, finished_run: Path, run_digests: Digests, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Two runs of a recipe in different places are the same to the byte: every tar, every part, the manifest, card and gallery."""
    out = tmp_path / "again"
    make_shards(world.load(), str(out))
    assert run_digests(out) == run_digests(finished_run) and len(run_digests(out)) == 10
    for name in ("README.md", "gallery.png", "run.json"):
        assert (out / name).read_bytes() == (finished_run / name).read_bytes()
    assert not leftovers(out) and not leftovers(finished_run)


def test_where_things_lie_does_not_matter(world, finished_run: Path, run_digests: Digests, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Source, models and class list moved elsewhere: the same bytes. What has a fingerprint may move."""
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
    """The same images as an ImageFolder: the same clean images, labels and nearly the same logits by key, in other shards."""
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


def test_a_finished_run_is_left_alone(world, run_copy: Path) -> None:  # type: ignore[no-untyped-def]
    """Running it again writes no file."""
    before = times(run_copy)
    make_shards(world.load(), str(run_copy))
    assert times(run_copy) == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda run: (run / "dad" / "dad-000001.tar").unlink(),
        lambda run: (run / "clean" / "clean-000001.tar").write_bytes(
            (run / "clean" / "clean-000001.tar").read_bytes()[:-512]
        ),
        lambda run: (run / "manifest" / "part-000001.parquet").unlink(),
        lambda run: (run / "manifest" / "part-000001.parquet").write_bytes(b"PAR1 no more"),
        lambda run: shutil.copy(run / "manifest" / "part-000000.parquet", run / "manifest" / "part-000001.parquet"),
    ],
)
def test_only_what_is_damaged_is_made_anew(
    world,
    run_copy: Path,
    finished_run: Path,
    run_digests: Digests,
    damage: Callable[[Path], object],
    capsys: pytest.CaptureFixture[str],
) -> None:  # type: ignore[no-untyped-def]
    """A damaged shard comes back with the same bytes; the files of the others are not touched."""
    damage(run_copy)
    before = times(run_copy)
    make_shards(world.load(), str(run_copy))
    assert run_digests(run_copy) == run_digests(finished_run) and not leftovers(run_copy)
    changed = {name for name, at in times(run_copy).items() if before.get(name) != at}
    assert {name for name in changed if "-000000" in name or "-000002" in name} == set()
    assert "1 of 3 shards to make" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["manifest.parquet", "README.md", "gallery.png"])
def test_sealing_again(world, run_copy: Path, finished_run: Path, name: str) -> None:  # type: ignore[no-untyped-def]
    """Whatever sealing makes is made again when it is missing, without touching a shard."""
    (run_copy / name).unlink()
    before = times(run_copy)
    make_shards(world.load(), str(run_copy))
    assert (run_copy / name).read_bytes() == (finished_run / name).read_bytes()
    after = times(run_copy)
    assert all(after[tar] == before[tar] for tar in before if tar.endswith(".tar") or "part-" in tar)


def test_an_edited_manifest_is_sealed_again(world, run_copy: Path, finished_run: Path, run_digests: Digests) -> None:  # type: ignore[no-untyped-def]
    data = bytearray((run_copy / "manifest.parquet").read_bytes())
    data[len(data) // 2] ^= 1
    (run_copy / "manifest.parquet").write_bytes(data)
    make_shards(world.load(), str(run_copy))
    assert run_digests(run_copy) == run_digests(finished_run)


def test_a_shard_made_after_sealing_without_it(world, run_copy: Path, finished_run: Path, cli) -> None:  # type: ignore[no-untyped-def]
    """Sealed without shard 1; a later command made it and was killed before it sealed: not called sealed, and the next one seals it."""
    run = RunDir(run_copy)
    (run_copy / "manifest" / "part-000001.parquet").unlink()
    run.seal(run.info(), [0, 2], {1: "out of reach"})
    for name in ("clean/clean-000001.tar", "dad/dad-000001.tar", "manifest/part-000001.parquet"):
        shutil.copy(finished_run / name, run_copy / name)
    assert "not sealed yet" in cli("status", run_copy).out
    make_shards(world.load(), str(run_copy))
    for name in ("run.json", "manifest.parquet", "README.md"):
        assert (run_copy / name).read_bytes() == (finished_run / name).read_bytes()


def test_a_shard_made_anew_after_sealing(world, run_copy: Path) -> None:  # type: ignore[no-untyped-def]
    """Shard 1 was made with other bytes, or other rows, by a command that was killed before it sealed: the next one seals it again."""
    run = RunDir(run_copy)
    table, record = run.part(1)
    for rows, padding in ((table.to_pylist(), 10240), ([row | {"clean_prob": 0.5} for row in table.to_pylist()], 0)):
        tars = {
            tar.name.partition("/")[0]: (run.store.read(tar.name) + bytes(padding), tar.samples) for tar in record.tars
        }
        run.commit(1, rows, tars, source=record.source, run=record.run)
        assert list(problems(str(run_copy)))
        make_shards(world.load(), str(run_copy))
        assert list(problems(str(run_copy))) == []


def test_other_versions(world, run_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    """A run that goes on with another torch: a note, once, and both in run.json and on the card. Where nothing is made, nothing changes."""
    run, now = RunDir(run_copy), RunDir(run_copy).info().versions
    run.write_info(replace(run.info(), versions=now | {"torch": "2.5.1", "pillow": "10.2.0"}))
    make_shards(world.load(), str(run_copy))
    assert (
        run.info().versions == now | {"torch": "2.5.1", "pillow": "10.2.0"}
        and "began with" not in capsys.readouterr().err
    )
    both = {"torch": f"2.5.1 and {now['torch']}", "pillow": f"10.2.0 and {now['pillow']}"}
    for notes in (1, 0):
        run.withdraw(1)
        make_shards(world.load(), str(run_copy))
        assert run.info().versions == now | both and f"torch {both['torch']}" in (run_copy / "README.md").read_text()
        assert (
            capsys.readouterr().err.count(
                f"began with torch 2.5.1, now {now['torch']}, pillow 10.2.0, now {now['pillow']}: "
            )
            == notes
        )


def wait_until(
    condition: Callable[[], bool], process: subprocess.Popen[str] | multiprocessing.Process, seconds: float = PATIENCE
) -> None:
    """Look every millisecond until the condition holds or the process has ended."""
    end = time.monotonic() + seconds
    alive = (
        process.is_alive if isinstance(process, multiprocessing.process.BaseProcess) else lambda: process.poll() is None
    )
    while not condition() and alive():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.001)


@pytest.mark.slow
def test_killed_runs_end_in_the_same_bytes(
    world, finished_run: Path, run_digests: Digests, start, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    """kill -9 in the first shard, between shards and while sealing; run to the end: the bytes of a run that was never killed."""
    out = tmp_path / "run"
    moments = [
        lambda: (out / "clean").exists(),
        lambda: (out / "manifest" / "part-000000.parquet").exists(),
        lambda: (out / "manifest" / "part-000002.parquet").exists(),
    ]
    for moment in moments:
        process = start("generate", "--recipe", world.recipe, "--out", out)
        wait_until(moment, process)
        time.sleep(random.random() * 0.08)
        process.kill()
        process.communicate()
        assert process.returncode in (-signal.SIGKILL, 0)
    process = start("generate", "--recipe", world.recipe, "--out", out)
    told = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, told
    assert run_digests(out) == run_digests(finished_run) and not leftovers(out)
    assert (out / "run.json").read_bytes() == (finished_run / "run.json").read_bytes()
    assert list(problems(str(out))) == []


@pytest.mark.slow
def test_killed_often_at_random_moments(world, finished_run: Path, run_digests: Digests, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """A dozen kills at any moment (forks of this process, which has the libraries loaded): no complete-looking wrong file at any time."""
    out, recipe = tmp_path / "run", world.load()
    context, whole = multiprocessing.get_context("fork"), run_digests(finished_run)
    for _ in range(12):
        process = context.Process(target=make_shards, args=(recipe, str(out)))
        process.start()
        wait_until((out / "run.json").exists, process)  # type: ignore[arg-type]
        time.sleep(random.random() * 0.5)
        process.kill()
        process.join()
        for name, digest in run_digests(out).items():
            assert whole[name] == digest, f"{name} stands under its final name with other bytes"
    make_shards(recipe, str(out))
    assert run_digests(out) == whole and not leftovers(out)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_polite_end(world, start, cli, tmp_path: Path, number: signal.Signals) -> None:  # type: ignore[no-untyped-def]
    """SIGTERM or SIGUSR1, as clusters send them: status 130, one line, no stack trace, no temporary file; finished shards are kept."""
    out = tmp_path / "run"
    process = start("generate", "--recipe", world.recipe, "--out", out, "--set", "attack.steps=60")
    wait_until((out / "manifest" / "part-000000.parquet").exists, process)
    process.send_signal(number)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130 and "Traceback" not in err
    assert err.splitlines()[-1] == "interrupted; what was finished is kept, and the same command goes on from there"
    assert not leftovers(out)
    assert "1 of 3 shards done, 2 missing" in cli("status", out).out


def test_stale_temporaries_are_removed(world, run_copy: Path) -> None:  # type: ignore[no-untyped-def]
    """What a killed process of this host left is removed; what a living one is writing is not."""
    from manifests.files import store

    dead = subprocess.Popen(["true"])
    dead.wait()
    stale = run_copy / "dad" / f".dad-000001.tar.{store.HOST}.{dead.pid}.tmp"
    living = run_copy / "dad" / f".dad-000002.tar.{store.HOST}.{os.getppid()}.tmp"
    foreign = run_copy / "dad" / ".dad-000002.tar.another-host.1.tmp"
    for path in (stale, living, foreign):
        path.write_bytes(b"half")
    make_shards(world.load(), str(run_copy))
    assert not stale.exists() and living.exists() and foreign.exists()


def test_too_many_errors(world, cli, finished_run: Path, run_digests: Digests, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """More unreadable images than max_errors: everything else is made, sealed and sound, and the exit status is 2, with the reason."""
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


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["seed=4"], r"seed was 3, now 4"),
        (["attack.eps=2.0"], r"attack\.eps was 1\.0, now 2\.0"),
        (["output.codes=false"], r"output\.codes was True, now False"),
        (["batch=6"], r"batch was 5, now 6"),
        (["source.shard_size=6"], r"source\.shard_size was 12, now 6"),
        (["discretizer.kind=identity"], r"discretizer\.kind was 'vqgan', now 'identity'"),
    ],
)
def test_another_recipe_is_refused(world, cli, run_copy: Path, overrides: list[str], named: str) -> None:  # type: ignore[no-untyped-def]
    """Into a directory that holds another run: refused, naming the field, before anything is written."""
    import re

    before = times(run_copy)
    options = [part for override in overrides for part in ("--set", override)]
    assert re.search(named, cli("generate", "--recipe", world.recipe, "--out", run_copy, *options).error)
    assert times(run_copy) == before


def test_other_content_under_the_same_names_is_refused(world, run_copy: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Paths may change, contents may not: another teacher, discretizer, class list or source is refused, naming which."""
    from safetensors.torch import load_file, save_file

    weights = load_file(world.vqgan)
    weights["quantize.embedding.weight"][0] += 1
    save_file(weights, tmp_path / "other.safetensors")
    clip = Path(shutil.copytree(world.clip, tmp_path / "clip"))
    tower = load_file(clip / "open_clip_model.safetensors")
    tower["logit_scale"] += 1
    tower["visual.proj"][0] += 1
    save_file(tower, clip / "open_clip_model.safetensors")
    lists = yaml.safe_load((world.clip / "prompts.yaml").read_text())
    lists["folders"].reverse()
    (tmp_path / "prompts.yaml").write_text(yaml.safe_dump(lists))
    fewer = Path(shutil.copytree(world.tars, tmp_path / "tars"))
    (fewer / "source-2.tar").unlink()
    before = times(run_copy)
    for field, name in (
        (f"discretizer.weights={tmp_path / 'other.safetensors'}", "discretizer"),
        (f"teacher.model=local-dir:{clip}", "teacher"),
        (f"source.classes={tmp_path / 'prompts.yaml'}", "classes"),
        (f"source.data={fewer}", "source"),
    ):
        with pytest.raises(UserError, match=f"already holds shards made with another recipe: the {name} "):
            make_shards(world.load(field), str(run_copy))
    assert times(run_copy) == before


def test_what_changes_nothing_may_change(world, run_copy: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """A comment or a field that nobody reads in the file of the class list; templates that are not used, for the teacher has its own."""
    lists = yaml.safe_load((world.clip / "prompts.yaml").read_text())
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump({"templates": lists["templates"]}))
    (tmp_path / "prompts.yaml").write_text(
        "# a comment\n" + yaml.safe_dump(lists | {"templates": ["not used: {}"], "more": 1})
    )
    make_shards(world.load(f"source.classes={tmp_path / 'prompts.yaml'}", f"teacher.templates={own}"), str(run_copy))


def test_a_command_s_secrets_are_not_published(world, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """A token in a `pipe:` command is in no file of the run, neither when it fails, and with another token the run goes on."""
    out, work = tmp_path / "run", f"TOKEN=%s; cat {world.tars}/source-0.tar"
    for token in ("s3cret-one", "s3cret-two"):
        make_shards(world.load(f"source.data=pipe:{work % token}", "source.keys=place"), str(out))
    with pytest.raises(UserError) as caught:
        make_shards(world.load(f"source.data=pipe:{work % 's3cret-three'}; exit 3"), str(tmp_path / "other"))
    assert "s3cret" not in str(caught.value) and "pipe: command 000000" in str(caught.value)
    assert not [path for path in out.rglob("*") if path.is_file() and b"s3cret" in path.read_bytes()]


def test_how_it_is_run_may_change(world, run_copy: Path) -> None:  # type: ignore[no-untyped-def]
    """Device, threads and max_errors are not part of what a run is."""
    make_shards(world.load("threads=2", "max_errors=0.5", "device=auto"), str(run_copy))
    make_shards(world.load("threads=1"), str(run_copy))


def test_disk_full(world, cli, finished_run: Path, run_digests: Digests, small_disk, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """A real full disk: status 2 and one line that says so, no half files, finished shards kept; with room again the same bytes."""
    whole = sum(path.stat().st_size for path in finished_run.rglob("*.tar"))
    out = small_disk(f"size={whole // 2 // 4096 * 4}k") / "run"
    told = cli("generate", "--recipe", world.recipe, "--out", out)
    assert (
        told.status == 2
        and "the disk is full" in told.err.splitlines()[-1]
        and told.err.splitlines()[-1].startswith("error: ")
    )
    made = run_digests(out)
    assert made and made.items() <= run_digests(finished_run).items() and not leftovers(out)
    small_disk("remount,size=16m")
    assert cli("generate", "--recipe", world.recipe, "--out", out).status == 0
    assert run_digests(out) == run_digests(finished_run)


def test_places_that_cannot_be_written(world, cli, small_disk, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """OUT is a file, lies below one, or on a read-only disk: one line that names it."""
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        assert str(out) in cli("generate", "--recipe", world.recipe, "--out", out).error
    disk = small_disk("size=64k")
    small_disk("remount,ro")
    assert "cannot write here" in cli("generate", "--recipe", world.recipe, "--out", disk / "run").error


def test_a_place_is_looked_at_first(world, cli, small_disk, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Before the models are read: those of this recipe are not there."""
    disk = small_disk("size=64k")
    small_disk("remount,ro")
    (tmp_path / "paper").mkdir()
    (tmp_path / "paper" / "README.md").write_text("mine")
    for out, line in (
        (disk / "run", "cannot write here"),
        (tmp_path / "paper", "README.md: is in the way of a new run"),
        ("", "OUT: is empty"),
    ):
        command = ("generate", "--recipe", world.recipe, "--out", out, "--set", "discretizer.weights=gone")
        assert line in cli(*command).error
    assert (tmp_path / "paper" / "README.md").read_text() == "mine" and len(list((tmp_path / "paper").iterdir())) == 1


@pytest.mark.parametrize("url", ["s3://bucket/run", "nonsense://x/run"])
def test_urls_that_cannot_be_opened(world, cli, url: str) -> None:  # type: ignore[no-untyped-def]
    """A protocol that fsspec does not know, or whose package is not installed: one line that names the URL."""
    if url.startswith("s3"):
        try:
            import s3fs  # noqa: F401
        except ImportError:
            pass
        else:
            pytest.skip("s3fs is installed: the URL could be opened")
    assert url in cli("generate", "--recipe", world.recipe, "--out", url).error


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
    """72 images under the next class's number, as a class list in another order gives: one line at the end; with the right ones none."""
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
    assert said[0].startswith(
        "note: on 0.0% of the clean images the teacher sees the label; guessing sees it on 20.0%."
    )


def test_few_samples_raise_no_doubt_about_the_labels() -> None:
    """Of 1000 classes, 250 samples without a hit say nothing yet; of 1.28 million, 1.2 % right (12 of 1000 classes in place) say it."""
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
    )  # names, labels and sizes stay as they were
    tar.write_bytes(data)
    for name in ("gallery.png", "manifest.parquet"):
        (out / name).unlink()
    make_shards(recipe, str(out))
    assert (out / "manifest.parquet").exists() and 10_000 < len((out / "gallery.png").read_bytes()) != len(drawn)

    (out / "gallery.png").unlink()
    tars = Path(shutil.copytree(world.tars, tmp_path / "tars"))
    pieces = prepare_job(world.load(f"source.data={tars}"), str(tmp_path / "other")).plan.pieces
    shutil.rmtree(tars)
    work_through(Work(recipe=recipe, out=str(out), run=job.info.fingerprint, todo=(), pieces=pieces), models=models)
    told = capsys.readouterr()
    assert f"note: {out}/gallery.png could not be drawn: source.data: {tars}/source-0.tar: no such file" in told.err
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
