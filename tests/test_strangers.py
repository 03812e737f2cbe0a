"""Recipes and runs of a stranger name locations and models; wherever they are read, nothing of theirs is run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from manifests import UserError
from pipeline.job.gallery import _draw, _Panel
from trainer.evaluation.score import Score
from trainer.tables.picture import picture
from trainer.tables.results import Result

from .conftest import Told
from .manifests.test_locations import attack, touched  # noqa: F401  # a fixture
from .processes import ROOT

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


@pytest.mark.parametrize("option", ["setup", "teardown", "srun_args", "additional_parameters"])
def test_slurm_options_are_no_programs(world, option: str) -> None:  # type: ignore[no-untyped-def]
    """submitit writes them into the script of the job: `srun_args: w` would start the program w."""
    with pytest.raises(UserError, match=rf"launch\.slurm: .*{option} is not taken"):
        world.load(f"launch.slurm.{option}=w")


def test_dollar_signs_in_names_are_no_formulas() -> None:
    """matplotlib would parse what stands between two of them, and fail on what is no mathematics."""
    name = r"$\frac{$ bill"
    panel = _Panel(label=name, pictures=[np.zeros((8, 8, 3), np.uint8)] * 4, verdicts=[(name, 0.5)] * 3, rejected=True)
    assert _draw([panel]).startswith(b"\x89PNG")
    result = Result(student=name, method="dad", seed=0, scores={name: Score(right=1, images=2)})
    assert picture([result]).startswith(b"\x89PNG")


def test_each_door_of_the_list_is_there() -> None:
    """docs/trust.md names, for every door, files and tests that exist."""
    text = (ROOT / "docs" / "trust.md").read_text()
    named = re.findall(r"`([\w/]+\.py)(?:::(\w+))?`", text)
    assert len(named) > 20
    for path, test in named:
        assert (ROOT / path).is_file(), path
        assert not test or f"def {test}(" in (ROOT / path).read_text(), (path, test)
