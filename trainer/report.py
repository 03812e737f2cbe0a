"""Comparing runs: one Markdown table and one picture for any number of students, seeds of one method grouped together."""

from __future__ import annotations

import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from .evaluate import Score

REFERENCE = Path(__file__).parent / "reference" / "demo-table.json"  # a copy of what `make demo-table` wrote
ORDER = ("plain", "kd", "dad")


@dataclass(frozen=True, kw_only=True)
class Result:
    """One student's scores."""

    student: str
    objective: str
    seed: int
    scores: Mapping[str, Score]
    recipe: str = ""  # fingerprint of everything but the seed; only runs that share it are seeds of one thing
    reference: bool = False  # from the committed table, not from this machine's runs


@dataclass(frozen=True)
class Cell:
    """Mean top-1 in percent, its standard error in points, and how many students it speaks of."""

    mean: float
    error: float
    count: int

    def __str__(self) -> str:
        if not self.count:
            return "–"
        return f"{self.mean:.1f}" + ("" if math.isnan(self.error) else f" ± {self.error:.1f}")


def summarize(results: Sequence[Result], name: str) -> Cell:
    """Mean over seeds with the standard error between them; for one student, its binomial error."""
    scores = [result.scores[name] for result in results if name in result.scores]
    if not scores:
        return Cell(math.nan, math.nan, 0)
    values = [score.top1 for score in scores]
    if len(values) == 1:
        return Cell(values[0], scores[0].error, 1)
    return Cell(statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values)), len(values))


def groups(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Results by row of the table; students of one architecture stand together, plain before KD before DAD.

    Seeds of one recipe share a row; students of other recipes or shards get rows of their own, marked by the recipe's fingerprint.
    """
    found: dict[str, list[Result]] = {}
    known = {objective: i for i, objective in enumerate(ORDER)}
    recipes: dict[tuple[str, str], set[str]] = {}
    for result in results:
        if not result.reference:
            recipes.setdefault((result.student, result.objective), set()).add(result.recipe)
    for result in sorted(results, key=lambda r: (r.student, known.get(r.objective, 9), r.reference, r.recipe, r.seed)):
        label = f"{result.student} {result.objective}"
        if result.reference:
            label += " (reference)"
        elif len(recipes[result.student, result.objective]) > 1:
            label += f" [{result.recipe[:6]}]"
        found.setdefault(label, []).append(result)
    return found


def set_names(results: Sequence[Result]) -> list[str]:
    names: dict[str, None] = {}
    for result in results:
        names |= dict.fromkeys(result.scores)
    return list(names)


def markdown(results: Sequence[Result]) -> str:
    """The table; the errors are explained below it."""
    names = set_names(results)
    lines = ["| student | seeds | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for label, group in groups(results).items():
        cells = " | ".join(str(summarize(group, name)) for name in names)
        lines.append(f"| {label} | {len(group)} | {cells} |")
    lines += ["", "Top-1 in percent ± standard error: between seeds, or binomial over the images for a single student."]
    if any(result.reference for result in results):
        lines.append("Rows marked (reference) are the committed results of `make demo-table`, not students of this machine.")
    return "\n".join(lines) + "\n"


def difference(results: Sequence[Result], better: str, worse: str, name: str) -> Cell:
    """How far one objective stands above another on a set, paired by seed: mean and standard error of the differences."""
    by_seed = {(r.objective, r.seed): r.scores[name].top1 for r in results}
    gaps = [by_seed[better, seed] - by_seed[worse, seed] for o, seed in by_seed if o == better and (worse, seed) in by_seed]
    error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan
    return Cell(statistics.mean(gaps), error, len(gaps))


def picture(results: Sequence[Result]) -> bytes:
    """PNG: one group of bars per set, one bar per row of the table, with error bars."""
    from matplotlib.figure import Figure

    names, rows = set_names(results), groups(results)
    figure = Figure(figsize=(max(7.0, 1.5 * len(names)), 3.8), dpi=100, layout="constrained")
    axis = figure.subplots()
    width = 0.8 / max(len(rows), 1)
    for i, (label, group) in enumerate(rows.items()):
        cells = [summarize(group, name) for name in names]
        places = [k + (i - (len(rows) - 1) / 2) * width for k in range(len(names))]
        axis.bar(places, [c.mean for c in cells], width * 0.92, yerr=[c.error for c in cells], capsize=2, label=label)
    axis.set_xticks(range(len(names)), names, rotation=15)
    axis.set_ylabel("top-1 (%)")
    axis.set_ylim(0, 100)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.3)
    axis.legend(ncols=min(len(rows), 4), fontsize=8, frameon=False, loc="upper right", bbox_to_anchor=(1, 1.15))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def to_json(results: Sequence[Result]) -> str:
    rows = [
        {
            "student": r.student,
            "objective": r.objective,
            "seed": r.seed,
            "scores": {name: asdict(score) for name, score in r.scores.items()},
        }
        for r in results
    ]
    return json.dumps(rows, indent=1) + "\n"


def from_json(text: str, *, reference: bool) -> list[Result]:
    return [
        Result(
            student=row["student"],
            objective=row["objective"],
            seed=row["seed"],
            scores={name: Score(**score) for name, score in row["scores"].items()},
            reference=reference,
        )
        for row in json.loads(text)
    ]


def with_reference(results: Sequence[Result]) -> list[Result]:
    """Add the committed rows of the demo for every (student, objective) that these results compare with but do not hold.

    Only when the image sets are the same ones, by name and number of images.
    """
    have = {(r.student, r.objective) for r in results}
    students = {r.student for r in results}
    sets = {name: score.images for result in results for name, score in result.scores.items()}
    known = from_json(REFERENCE.read_text(), reference=True) if REFERENCE.exists() else []
    comparable = [r for r in known if {name: score.images for name, score in r.scores.items()} == sets]
    return [*results, *(r for r in comparable if r.student in students and (r.student, r.objective) not in have)]
