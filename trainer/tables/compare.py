"""Evaluate student directories and write one report of them all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from manifests import Store, UserError
from manifests.recipe import fingerprint

from ..checkpoint import BEST, STUDENT_INFO, StudentDir
from ..evaluation.kept import evaluate_run
from ..evaluation.sets import image_set, set_in, sets_below
from .markdown import markdown
from .picture import picture
from .results import Result, with_reference


def result_of(directory: StudentDir, data: str | Path) -> Result:
    """The scores of a student on all image sets below ``data``, with the student's method, seed and recipe."""
    info = directory.info()
    identity = dict(info.identity)
    seed, method = identity.pop("seed"), identity["method.name"]
    recipe = fingerprint([identity, info.shards])
    return Result(student=info.student, method=method, seed=seed, scores=evaluate_run(directory, data), recipe=recipe)


def find_runs(paths: Sequence[str]) -> list[StudentDir]:
    """Student directories at or below these paths. Raises UserError when none has finished an epoch."""
    places: dict[Path, StudentDir] = {}  # by resolved path, so that a student counts once
    for path in (Path(path).expanduser() for path in paths):
        if not path.is_dir():
            what = "is a file, not a student's directory" if path.exists() else "no such folder"
            raise UserError(f"{path}: {what}; train a student first with `make train`")
        inside = [path] if (path / STUDENT_INFO).exists() else sorted(p.parent for p in path.rglob(STUDENT_INFO))
        for student in inside:
            places.setdefault(student.resolve(), StudentDir(student))
    found = list(places.values())
    if not found:
        raise UserError(f"{', '.join(map(str, paths))}: no students here; train one with `make train`")
    finished = [run for run in found if (run.path / BEST).exists()]
    for run in found:
        if run not in finished:
            click.echo(f"{run}: left out, it has not finished an epoch yet", err=True)
    if not finished:
        raise UserError(f"{', '.join(map(str, paths))}: no student has finished an epoch yet; run `make train` again")
    return finished


def write_report(results: Sequence[Result], out: str, title: str, extra: str = "") -> str:
    """Write report.md and report.png to the folder ``out``; returns the Markdown table."""
    table = markdown(results)
    store = Store(out)
    store.write("report.md", f"# {title}\n\n{table}{extra}\n![top-1 per set](report.png)\n".encode())
    store.write("report.png", picture(results))
    return table


def compare(paths: Sequence[str], data: str | Path, out: str) -> None:
    """Evaluate students and report them, together with the committed reference rows of the same architecture."""
    names = sets_below(data)
    results: dict[tuple[object, ...], Result] = {}
    for run in find_runs(paths):
        try:
            for name in names:
                image_set(set_in(data, name), run.info().classes)
            result = result_of(run, data)
            if (same := (result.student, result.method, result.recipe, result.seed)) in results:
                raise UserError(
                    "a student of this recipe, shards and seed is in the table; this one would count as a second seed"
                )
            results[same] = result
        except UserError as error:
            click.echo(f"{run}: left out: {error}", err=True)
    if not results:
        raise UserError(
            f"{data}: no student could be scored on these image sets, for the reasons above; "
            "set --data, or train them again"
        )
    click.echo(write_report(with_reference(list(results.values())), out, "Students compared"))
    click.echo(f"written to {out}/report.md and {out}/report.png")
