"""The command line: every user error is one line on stderr and status 2; no stack trace unless asked for."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from ..patience import PATIENCE, wait_for

COMMANDS = ("generate", "status", "verify", "recipe")


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], *([name, "--help"] for name in COMMANDS)])
def test_help(cli, arguments: list[str]) -> None:  # type: ignore[no-untyped-def]
    """Help exits with status 0, prints nothing on stderr and, at the top, lists every command."""
    told = cli(*arguments)
    assert told.status == 0 and told.err == "" and "Usage: python -m pipeline" in told.out
    if len(arguments) == 1:
        assert all(f"\n  {name} " in told.out for name in COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--seed", "3"], ["--seed"]),  # an option that belongs to no command
        (["generate", "--recipe", "RECIPE", "--out", "OUT", "--set", "attack.epz=1"], ["attack.epz", "'eps'"]),
        (
            ["generate", "--recipe", "RECIPE", "--out", "OUT", "--set", "attack.eps=much"],
            ["attack.eps", "number", "much"],
        ),
        (
            ["generate", "--recipe", "RECIPE", "--out", "OUT", "--set", "attack.eps=-1"],
            ["attack.eps", "greater than or equal to 0"],
        ),
        (["generate", "--recipe", "RECIPE", "--out", "OUT", "--set", "attack.eps=.inf"], ["attack.eps", "inf"]),
        (["generate", "--recipe", "RECIPE", "--out", "OUT", "--set", "attack"], ["attack", "field=value"]),
        (["generate", "--recipe", "RECIPE", "--out", "OUT", "--set", "attack.eps=[1"], ["attack.eps", "YAML"]),
        (["generate", "--recipe", "RECIPE", "--out", "OUT", "--set", "attack.norm=l3"], ["attack.norm", "l2"]),
        (
            ["generate", "--recipe", "RECIPE", "--out", "OUT", "--set", "batch=-1"],
            ["batch", "greater than or equal to 0"],
        ),
        (
            ["generate", "--recipe", "RECIPE", "--out", "OUT", "--set", "source.classes=gone.yaml"],
            ["source.classes", "gone.yaml"],
        ),
        (["generate", "--recipe", "RECIPE", "--out", "OUT", "--data", "gone"], ["source.data", "gone", "no such"]),
        (
            ["generate", "--recipe", "RECIPE", "--out", "OUT", "--set", "teacher.model=ViT-B-33"],
            ["teacher.model", "'ViT-B-32'"],
        ),
        (["generate", "--recipe", "RECIPE", "--out", "OUT", "--set", "teacher.kind=timm"], ["teacher.model", "timm"]),
        (
            ["generate", "--recipe", "RECIPE", "--out", "OUT", "--set", "discretizer.weights=gone"],
            ["discretizer.weights", "gone"],
        ),
        (
            ["generate", "--recipe", "RECIPE", "--out", "OUT", "--set", "discretizer.config.n_embed=9"],
            ["discretizer", "does not fit"],
        ),
        (["generate", "--recipe", "RECIPE", "--out", "OUT", "--set", "device=tpu9"], ["device", "tpu9"]),
        (["generate", "--recipe", "RECIPE", "--out", "OUT", "--set", "canvas=33"], ["canvas", "33"]),
        (["generate", "--recipe", "dem"], ["dem", "'demo'"]),
        (["recipe", "demmo"], ["demmo", "'demo'"]),
        (["recipe", "RECIPE", "--set", "teecher.kind=timm"], ["teecher", "'teacher'"]),
        (["status", "OUT"], ["OUT", "no run directory"]),
        (["verify", "OUT"], ["OUT", "no run directory"]),
        (["stattus", "OUT"], ["stattus"]),
        (["status"], ["OUT"]),
        (["generate", "--outt", "OUT"], ["--outt"]),
    ],
)
def test_user_errors(world, cli, tmp_path: Path, arguments: list[str], words: list[str]) -> None:  # type: ignore[no-untyped-def]
    """An error names the fault, the place and the nearest right name: one line, status 2, no stdout, no file."""
    out = tmp_path / "run"
    line = cli(*({"OUT": str(out), "RECIPE": str(world.recipe)}.get(a, a) for a in arguments)).error
    assert all(word in line or word == "OUT" for word in words), line
    assert not out.exists()


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("a: [1", "not a plain YAML"),
        ("- a", "mapping"),
        ("", "mapping"),
        ("sauce: {}", "'source'"),
        ("attack: 3", "attack"),
        ("seed: 3", "source"),  # lacks what has no default
        ("1: 2", "'1'"),
        ("!!python/object/apply:os.mkdir [pwned]", "not a plain YAML"),
        ("{? [x] : 1}", "not a plain YAML"),
        ("&a [*a]", "aliases (*name) are not read"),
        ("seed: &a {b: *a}", "mine.yaml: not a plain YAML file: line 1: aliases"),
        ("seed: 2020-01-01", "seed"),
        ("seed: !!binary aGVsbG8=", "seed"),
        ("seed: !!set {a}", "seed"),
        (b"\xff\xfe\x00", "not a plain YAML"),
        (b"seed: \x00", "not a plain YAML"),
    ],
)
def test_broken_recipes(cli, tmp_path: Path, content: str | bytes, word: str, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """A recipe file that is no recipe is named, in one line; nothing in it is run."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    line = cli("recipe", path).error
    assert word in line and "mine.yaml" in line
    assert [file.name for file in tmp_path.iterdir()] == ["mine.yaml"]


@pytest.mark.parametrize("debug", [False, True])
def test_a_real_process(world, start: Callable[..., subprocess.Popen[str]], tmp_path: Path, debug: bool) -> None:  # type: ignore[no-untyped-def]
    """The whole output, libraries' included: one line and no stack trace; with --debug the trace and the line."""
    flags = ["--debug"] if debug else []
    override = "discretizer.weights=gone.safetensors"  # found out after open_clip and the teacher were loaded
    process = start(*flags, "generate", "--recipe", world.recipe, "--out", tmp_path / "run", "--set", override)
    out, err = process.communicate(timeout=PATIENCE)
    lines = err.splitlines()
    assert process.returncode == 2 and out == ""
    assert lines[-1].startswith("error: discretizer.weights: gone.safetensors: no such file")
    assert ("Traceback" in err) == debug and (debug or len(lines) == 1), err


def test_recipe_is_printed_whole_and_loads_again(world, cli, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """`recipe` prints every field; what it prints is a recipe, the same one."""
    from manifests.recipe import as_tree, flatten
    from pipeline.recipe import load

    told = cli("recipe", world.recipe, "--set", "attack.eps=0.25")
    assert told.status == 0 and told.err == ""
    (tmp_path / "again.yaml").write_text(told.out)
    assert load(str(tmp_path / "again.yaml")) == world.load("attack.eps=0.25")
    assert flatten(yaml.safe_load(told.out)).keys() == flatten(as_tree(world.load())).keys()
    assert yaml.safe_load(cli("recipe").out)["canvas"] == 64  # the demo is the default


def test_generate_status_verify(world, cli, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """The three commands of a run, one after the other, with --data for the source."""
    out = tmp_path / "run"
    recipe = tmp_path / "recipe.yaml"
    tree = yaml.safe_load(world.recipe.read_text())
    tree["source"]["data"] = "somewhere/else"
    recipe.write_text(yaml.safe_dump(tree))
    told = cli("generate", "--recipe", recipe, "--data", world.tars, "--out", out)
    assert told.status == 0 and "sealed, 36 samples" in told.out
    told = cli("status", out, "--content")
    assert told.status == 0 and "3 of 3 shards done" in told.out and "sealed" in told.out
    told = cli("verify", out)
    assert told.status == 0 and "as recorded" in told.out and "the teacher agrees" in told.out
    assert cli("verify", out, "--samples", "0").status == 0


def test_verify_of_fewer_than_no_samples(cli, finished_run: Path) -> None:  # type: ignore[no-untyped-def]
    assert "-1" in cli("verify", finished_run, "--samples", "-1").error


def test_verify_fails_with_status_1(cli, run_copy: Path) -> None:  # type: ignore[no-untyped-def]
    """Damage is printed line by line on stdout, and the status is 1."""
    (run_copy / "dad" / "dad-000001.tar").unlink()
    shutil.copy(run_copy / "clean" / "clean-000001.tar", run_copy / "clean" / "clean-000000.tar")
    told = cli("verify", run_copy)
    failed = [line for line in told.out.splitlines() if line.startswith("FAILED ")]
    assert told.status == 1 and len(failed) == 2 and "Traceback" not in told.err
    assert "clean-000000.tar" in failed[0] and "dad-000001.tar: missing" in failed[1]


def test_ctrl_c_in_the_first_second(world, start: Callable[..., subprocess.Popen[str]]) -> None:  # type: ignore[no-untyped-def]
    """While torch is being imported: one line and status 130, no stack trace."""
    process = start("recipe", world.recipe, fresh=True)
    wait_for(lambda: "libtorch" in Path(f"/proc/{process.pid}/maps").read_text(), process, pause=0.001)
    process.send_signal(signal.SIGINT)
    assert (
        process.communicate(timeout=PATIENCE) == ("", "\ninterrupted before anything was done\n")
        and process.returncode == 130
    )


IMPORTING = """
import sys
import click
from manifests.command import ProjectGroup

@click.group(cls=ProjectGroup)
def main(): ...

@main.command()
def go():
    sys.path.insert(0, sys.argv[1])
    import confused

main(["go"])
"""


def test_ctrl_c_in_an_import(python: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    """A library that turns an interruption of its import into another error does not show it."""
    module = (
        "import os, signal\ntry:\n  os.kill(os.getpid(), signal.SIGINT)\n"
        "except BaseException:\n  raise ImportError('half there')\n"
    )
    (tmp_path / "confused.py").write_text(module)
    told = python(IMPORTING, tmp_path)
    assert told.returncode == 130 and told.stderr.startswith("\ninterrupted; ") and "Traceback" not in told.stderr


def test_a_reader_that_leaves(world, start: Callable[..., subprocess.Popen[str]]) -> None:  # type: ignore[no-untyped-def]
    """`python -m pipeline recipe … | head -0`: no stack trace."""
    process = start("recipe", world.recipe)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert "Traceback" not in process.stderr.read()
    assert process.wait(PATIENCE) in (0, 1)
