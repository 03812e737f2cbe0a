"""Scores, errors and tables say what they claim."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from manifests import UserError
from trainer.evaluation.kept import scores_from_json, scores_to_json
from trainer.evaluation.score import Score, score_set
from trainer.evaluation.sets import image_set, sets_below
from trainer.tables import results
from trainer.tables.markdown import markdown
from trainer.tables.picture import picture
from trainer.tables.results import Result, difference, from_json, groups, summarize, to_json

from ..conftest import CLASSES, NAMES, SIDE, write_image_set


class Constant(nn.Module):
    """Always says class 1."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.one_hot(torch.ones(len(images), dtype=torch.long), CLASSES).float()


def _results() -> list[Result]:
    rights = {("plain", 0): 40, ("plain", 1): 50, ("plain", 2): 45, ("dad", 0): 60, ("dad", 1): 66, ("dad", 2): 69}
    return [
        Result(student="resnet18", method=method, seed=seed, scores={"val": Score(right=right, images=100)})
        for (method, seed), right in rights.items()
    ]


def test_top1_counts_and_binomial_error(tmp_path: Path) -> None:
    folder = write_image_set(tmp_path / "set", images=23)
    score = score_set(Constant(), image_set(folder, NAMES), SIDE, torch.device("cpu"), bf16=False, batch=7)
    assert (score.right, score.images) == (5, 23)
    assert score.error == pytest.approx(100 * math.sqrt(5 / 23 * 18 / 23 / 23))
    kept = scores_to_json({"set": score}, made_from="a", weights="w").encode()
    assert scores_from_json(kept, made_from="a") == scores_from_json(kept, weights="w") == {"set": score}
    assert scores_from_json(kept, made_from="b") is None  # of other weights or sets
    assert scores_from_json(b"torn", made_from="a") is None


def test_mean_and_standard_error_between_seeds() -> None:
    cell = summarize([r for r in _results() if r.method == "plain"], "val")
    assert (cell.mean, cell.count) == (45.0, 3)
    assert cell.error == pytest.approx(5 / math.sqrt(3))


def test_differences_are_paired_by_seed() -> None:
    cell = difference(_results(), "dad", "plain", "val")
    assert cell.mean == pytest.approx((20 + 16 + 24) / 3)
    assert cell.error == pytest.approx(4 / math.sqrt(3))


def test_table_has_a_row_per_method_plain_first() -> None:
    lines = markdown(_results()).splitlines()
    assert lines[2].startswith("| resnet18 plain | 3 | 45.0 ± 2.9 |")
    assert lines[3].startswith("| resnet18 dad | 3 | 65.0 ± 2.6 |")
    assert picture(_results()).startswith(b"\x89PNG")


def test_results_survive_json() -> None:
    assert from_json(to_json(_results()), reference=False) == _results()


def test_missing_sets_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        sets_below(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no evaluation sets"):
        sets_below(tmp_path)


def test_runs_of_different_recipes_are_not_seeds_of_one() -> None:
    score = {"val": Score(right=50, images=100)}
    runs = [
        Result(student="resnet18", method="dad", seed=seed, scores=score, recipe=recipe)
        for seed in (0, 1)
        for recipe in "ab"
    ]
    assert {label: len(group) for label, group in groups(runs).items()} == {
        "resnet18 dad [a]": 2,
        "resnet18 dad [b]": 2,
    }


def test_reference_rows_join_only_the_same_image_sets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    reference = tmp_path / "demo-table.json"
    reference.write_text(to_json(_results()))
    monkeypatch.setattr(results, "REFERENCE", reference)
    mine = Result(student="resnet18", method="dad", seed=0, scores={"val": Score(right=1, images=100)})
    assert [r.method for r in results.with_reference([mine]) if r.reference] == ["plain"] * 3
    other = Result(student="resnet18", method="dad", seed=0, scores={"val": Score(right=1, images=99)})
    assert results.with_reference([other]) == [other]
