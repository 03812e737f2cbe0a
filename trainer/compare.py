"""Evaluate student directories and write the report that sets them side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from manifests import Store, UserError
from manifests.devices import choose_device, must_fit, use_bf16
from manifests.recipe import fingerprint

from .checkpoint import BEST, STUDENT_INFO, StudentDir
from .evaluate import RESULTS, Score, check_set, evaluate, scores_from_json, scores_to_json, set_tars, sets_below
from .loop import train
from .recipe import load
from .report import ORDER, Result, difference, markdown, picture, to_json, with_reference


def evaluate_run(directory: StudentDir, data: Path, device: str = "auto") -> dict[str, Score]:
    """Score the best checkpoint of a student on every set below ``data``; kept in eval.json until the weights or the sets change."""
    info = directory.info()
    tars = [tar for name in sets_below(data) for tar in set_tars(data / name)]
    found = [(str(tar.relative_to(data)), tar.stat().st_size, tar.stat().st_mtime_ns) for tar in tars]
    weights = directory.store.sha256(BEST)
    made_from = fingerprint([weights, found])
    kept = directory.path / RESULTS
    if kept.exists() and (scores := scores_from_json(kept.read_bytes(), made_from=made_from)) is not None:
        return scores
    where = choose_device(device)
    bf16, threads = use_bf16(info.recipe["precision"], where), info.recipe["workers"]  # as in training
    student, label = directory.load_student(), directory.path.name
    with must_fit("the student does not fit into memory to be scored; free some, or leave out the GPU with CUDA_VISIBLE_DEVICES="):
        scores = evaluate(student.to(where), data, len(info.classes), info.side, where, bf16=bf16, threads=threads, label=label)
    directory.store.write(RESULTS, scores_to_json(scores, made_from=made_from, weights=weights).encode())
    return scores


def result_of(directory: StudentDir, data: Path) -> Result:
    info = directory.info()
    identity = dict(info.identity)
    seed, objective = identity.pop("seed"), identity["loss.objective"]
    recipe = fingerprint([identity, info.shards])
    return Result(student=info.student, objective=objective, seed=seed, scores=evaluate_run(directory, data), recipe=recipe)


def find_runs(paths: Sequence[str]) -> list[StudentDir]:
    """Student directories: those named, or below folders that are named. Raises UserError when there are none."""
    places: dict[Path, StudentDir] = {}  # each once, also when it is named twice
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
    """Write report.md and report.png into ``out``; returns the Markdown table."""
    table = markdown(results)
    store = Store(out)
    store.write("report.md", f"# {title}\n\n{table}{extra}\n![top-1 per set](report.png)\n".encode())
    store.write("report.png", picture(results))
    return table


def compare(paths: Sequence[str], data: Path, out: str) -> None:
    """Evaluate runs and report them, beside the committed reference rows of the same architecture."""
    names = sets_below(data)
    results: dict[tuple[object, ...], Result] = {}
    for run in find_runs(paths):
        try:
            for name in names:
                check_set(data / name, run.info().classes)
            result = result_of(run, data)
            if (same := (result.student, result.objective, result.recipe, result.seed)) in results:
                raise UserError("a student of this recipe, shards and seed is in the table; as a second seed it would count twice")
            results[same] = result
        except UserError as error:
            click.echo(f"{run}: left out: {error}", err=True)
    if not results:
        raise UserError(f"{data}: no student could be scored on these image sets, for the reasons above; set --data, or train them again")
    click.echo(write_report(with_reference(list(results.values())), out, "Students compared"))
    click.echo(f"written to {out}/report.md and {out}/report.png")


def demo_table(recipe: str, seeds: int, out: str, data: Path, overrides: Sequence[str]) -> None:
    """Train plain, KD and DAD students with ``seeds`` seeds each, and report means, standard errors and paired differences."""
    results = []
    for seed in range(seeds):
        for objective in ORDER:
            settings = load(recipe, [*overrides, f"seed={seed}", f"loss.objective={objective}"])
            results.append(result_of(train(settings, f"{out}/{settings.student}-{objective}-s{seed}"), data))
    lines = ["| difference, paired by seed | " + " | ".join(results[0].scores) + " |", "|---" * (len(results[0].scores) + 1) + "|"]
    for better, worse in (("dad", "plain"), ("dad", "kd"), ("kd", "plain")):
        cells = " | ".join(str(difference(results, better, worse, name)) for name in results[0].scores)
        lines.append(f"| {better} − {worse} | {cells} |")
    extra = "\n" + "\n".join(lines) + "\n"
    click.echo(write_report(results, out, f"Demo table: {seeds} seeds", extra) + extra)
    Store(out).write("demo-table.json", to_json(results).encode())
    click.echo(f"written to {out}/report.md, report.png and demo-table.json")
