"""Recipes and runs of a stranger name locations and models; wherever they are read, nothing of theirs is run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from .conftest import Told
from .manifests.files.test_locations import attack, touched  # noqa: F401  # a fixture

BRACES = "reference:{:file://A,:file://B}"


def cli_of_trainer(*arguments: str | Path) -> Told:
    from trainer.__main__ import main

    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return Told(result.exit_code, result.stdout, result.stderr)


def refused(outcome: Told, marker: Path, field: str) -> None:
    assert outcome.status == 2 and field in outcome.error and outcome.error.count("\n") == 0
    assert not marker.exists()


@pytest.mark.parametrize("spelling", ["chained", "data", "braces"])
def test_stage_one(world, cli, touched: Path, tmp_path: Path, spelling: str) -> None:  # type: ignore[no-untyped-def]  # noqa: F811
    """`source.data` of a recipe, `--data` and `--out`, in what makes, plans and looks at a run."""
    bad = BRACES.replace("A", str(tmp_path / "a.tar")) if spelling == "braces" else attack(touched, spelling)
    text = world.recipe.read_text().replace(str(world.tars), f"'{bad}'")
    (tmp_path / "evil.yaml").write_text(text)
    for command in ("generate", "plan"):
        refused(cli(command, "--recipe", tmp_path / "evil.yaml", "--out", tmp_path / "o"), touched, "source.data")
        refused(cli(command, "--recipe", world.recipe, "--data", bad, "--out", tmp_path / "o"), touched, "source.data")
        if spelling != "braces":
            refused(cli(command, "--recipe", world.recipe, "--out", bad), touched, bad[:40])
    if spelling != "braces":
        for command in ("status", "verify"):
            refused(cli(command, bad), touched, bad[:40])


@pytest.mark.parametrize("field", ["shards", "images", "validation"])
def test_stage_two(touched: Path, tmp_path: Path, field: str) -> None:  # noqa: F811
    """The fields of a recipe that say where something lies, and the same from the command line."""
    bad = attack(touched)
    (tmp_path / "evil.yaml").write_text(json.dumps({field: bad}))
    for arguments in (("--recipe", tmp_path / "evil.yaml"), ("--recipe", "demo", "--set", f"{field}={bad}")):
        refused(cli_of_trainer("train", *arguments, "--out", tmp_path / "o"), touched, field)
    refused(
        cli_of_trainer("train", "--recipe", "demo", "--shards", bad, "--out", tmp_path / "o"), touched, "reference::"
    )
