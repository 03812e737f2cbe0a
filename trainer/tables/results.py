"""Results of students: seeds grouped into rows, means with standard errors, differences between methods."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..evaluation.score import Score
from ..methods import rank_of

REFERENCE = Path(__file__).parents[1] / "reference" / "demo-table.json"  # committed output of `make demo-table`


@dataclass(frozen=True, kw_only=True)
class Result:
    """The scores of one student, by image set."""

    student: str
    method: str
    seed: int
    scores: Mapping[str, Score]
    recipe: str = ""  # fingerprint of the recipe without its seed; students that share it are seeds of one row
    reference: bool = False  # from the committed table, not from a student on this machine


@dataclass(frozen=True)
class Cell:
    """Mean top-1 in percent, its standard error in points, and the number of students."""

    mean: float
    error: float
    count: int

    def __str__(self) -> str:
        if not self.count:
            return "–"
        return f"{self.mean:.1f}" + ("" if math.isnan(self.error) else f" ± {self.error:.1f}")


def summarize(results: Sequence[Result], name: str) -> Cell:
    """Mean over seeds and its standard error; for a single student, the binomial error."""
    scores = [result.scores[name] for result in results if name in result.scores]
    if not scores:
        return Cell(math.nan, math.nan, 0)
    values = [score.top1 for score in scores]
    if len(values) == 1:
        return Cell(values[0], scores[0].error, 1)
    return Cell(statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values)), len(values))


def groups(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Results by row of the table, sorted by architecture, then by method in the registry's order.

    Seeds of one recipe share a row. If a method has several recipes or shards, each gets a row with the recipe's
    fingerprint.
    """
    found: dict[str, list[Result]] = {}
    recipes: dict[tuple[str, str], set[str]] = {}
    for result in results:
        if not result.reference:
            recipes.setdefault((result.student, result.method), set()).add(result.recipe)
    for result in sorted(results, key=lambda r: (r.student, rank_of(r.method), r.reference, r.recipe, r.seed)):
        label = f"{result.student} {result.method}"
        if result.reference:
            label += " (reference)"
        elif len(recipes[result.student, result.method]) > 1:
            label += f" [{result.recipe[:6]}]"
        found.setdefault(label, []).append(result)
    return found


def set_names(results: Sequence[Result]) -> list[str]:
    """Names of all image sets, in the order of their first result."""
    names: dict[str, None] = {}
    for result in results:
        names |= dict.fromkeys(result.scores)
    return list(names)


def difference(results: Sequence[Result], better: str, worse: str, name: str) -> Cell:
    """Mean and standard error of the differences between two methods on a set, paired by seed, in points."""
    by_seed = {(r.method, r.seed): r.scores[name].top1 for r in results}
    gaps = [
        by_seed[better, seed] - by_seed[worse, seed]
        for method, seed in by_seed
        if method == better and (worse, seed) in by_seed
    ]
    error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan
    return Cell(statistics.mean(gaps), error, len(gaps))


def to_json(results: Sequence[Result]) -> str:
    """Results as `from_json` reads them, without recipes."""
    rows = [
        {
            "student": r.student,
            "method": r.method,
            "seed": r.seed,
            "scores": {name: asdict(score) for name, score in r.scores.items()},
        }
        for r in results
    ]
    return json.dumps(rows, indent=1) + "\n"


def from_json(text: str, *, reference: bool) -> list[Result]:
    """Read what `to_json` wrote. reference: see `Result`."""
    return [
        Result(
            student=row["student"],
            method=row.get("method") or row["objective"],  # the field of older tables
            seed=row["seed"],
            scores={name: Score(**score) for name, score in row["scores"].items()},
            reference=reference,
        )
        for row in json.loads(text)
    ]


def with_reference(results: Sequence[Result]) -> list[Result]:
    """Add the committed rows of the demo for the same students and other methods.

    They are added only if the image sets agree by name and number of images.
    """
    have = {(r.student, r.method) for r in results}
    students = {r.student for r in results}
    sets = {name: score.images for result in results for name, score in result.scores.items()}
    known = from_json(REFERENCE.read_text(), reference=True) if REFERENCE.exists() else []
    comparable = [r for r in known if {name: score.images for name, score in r.scores.items()} == sets]
    return [*results, *(r for r in comparable if r.student in students and (r.student, r.method) not in have)]
