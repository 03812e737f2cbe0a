"""A directory that holds another run, or that cannot be written, is refused; what does not count may change."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from manifests import UserError
from pipeline.generate import make_shards

from .test_resuming import times


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
    """A directory that holds another run is refused, naming the field, before anything is written."""
    import re

    before = times(run_copy)
    options = [part for override in overrides for part in ("--set", override)]
    assert re.search(named, cli("generate", "--recipe", world.recipe, "--out", run_copy, *options).error)
    assert times(run_copy) == before


def test_other_content_under_the_same_names_is_refused(world, run_copy: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Paths may change, contents may not: another teacher, discretizer, class list or source is refused by name."""
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
    """A comment or an unread field in the class list's file, and templates that the teacher's own replace."""
    lists = yaml.safe_load((world.clip / "prompts.yaml").read_text())
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump({"templates": lists["templates"]}))
    (tmp_path / "prompts.yaml").write_text(
        "# a comment\n" + yaml.safe_dump(lists | {"templates": ["not used: {}"], "more": 1})
    )
    make_shards(world.load(f"source.classes={tmp_path / 'prompts.yaml'}", f"teacher.templates={own}"), str(run_copy))


def test_a_command_s_secrets_are_not_published(world, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """A token in a `pipe:` command is in no file of the run and in no message; with another token the run goes on."""
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


def test_places_that_cannot_be_written(world, cli, small_disk, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """OUT is a file, lies below one, or on a read-only disk: one line that names it."""
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        assert str(out) in cli("generate", "--recipe", world.recipe, "--out", out).error
    disk = small_disk("size=64k")
    small_disk("remount,ro")
    assert "cannot write here" in cli("generate", "--recipe", world.recipe, "--out", disk / "run").error


def test_a_place_is_looked_at_first(world, cli, small_disk, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """OUT is checked before the models are read: those of this recipe are missing."""
    disk = small_disk("size=64k")
    small_disk("remount,ro")
    (tmp_path / "paper").mkdir()
    (tmp_path / "paper" / "README.md").write_text("mine")
    for out, line in (
        (disk / "run", "cannot write here"),
        (tmp_path / "paper", "README.md: is in the way of a new run"),
        ("", "OUT: the name is empty"),
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


@pytest.mark.parametrize(("kind", "place"), [("images", ""), ("images", "dad"), ("images", "a/b"), ("tars", "")])
def test_an_out_in_the_source_is_refused(world, cli, tmp_path: Path, kind: str, place: str) -> None:  # type: ignore[no-untyped-def]
    """Before anything is written: the next start would take the shards for a part of the source."""
    source = Path(shutil.copytree(getattr(world, kind), tmp_path / "source"))
    before = sorted(source.rglob("*"))
    told = cli("generate", "--recipe", world.recipe, "--data", source, "--out", source / place)
    assert f"lies in the source ({source}), and would become a part of it; choose another OUT" in told.error
    assert sorted(source.rglob("*")) == before


def test_a_link_hides_no_source(world, cli, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    source = Path(shutil.copytree(world.images, tmp_path / "source"))
    (tmp_path / "link").symlink_to(source)
    told = cli("generate", "--recipe", world.recipe, "--data", source, "--out", tmp_path / "link" / "x")
    assert "lies in the source" in told.error


def test_namesakes_are_told_once(world, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    """A class list with a name twice works: images of the second are verified, and one note says which classes."""
    prompts = yaml.safe_load((world.clip / "prompts.yaml").read_text())
    prompts["classes"][2] = prompts["classes"][0].upper()
    (tmp_path / "classes.yaml").write_text(yaml.safe_dump(prompts))
    make_shards(world.load(f"source.classes={tmp_path / 'classes.yaml'}"), str(tmp_path / "run"))
    told = capsys.readouterr().err
    name = prompts["classes"][0]
    assert told.count(f"the teacher cannot tell namesakes apart; a tie counts as the label: {name!r} (0, 2)") == 1
