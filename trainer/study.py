"""Studies: many students, side by side."""

from __future__ import annotations

from collections.abc import Sequence

import click

from manifests import Store

from .loop import train
from .recipe import load
from .tables.compare import result_of, write_report
from .tables.results import difference, to_json

METHODS = ("plain", "kd", "dad")  # rows of the demo table


def demo_table(recipe: str, seeds: int, out: str, data: str, overrides: Sequence[str]) -> None:
    """Train plain, KD and DAD students, ``seeds`` of each, and report means, standard errors and paired differences."""
    results = []
    for seed in range(seeds):
        for method in METHODS:
            settings = load(recipe, [*overrides, f"seed={seed}", f"method.name={method}"])
            results.append(result_of(train(settings, f"{out}/{settings.student}-{method}-s{seed}"), data))
    lines = [
        "| difference, paired by seed | " + " | ".join(results[0].scores) + " |",
        "|---" * (len(results[0].scores) + 1) + "|",
    ]
    for better, worse in (("dad", "plain"), ("dad", "kd"), ("kd", "plain")):
        cells = " | ".join(str(difference(results, better, worse, name)) for name in results[0].scores)
        lines.append(f"| {better} − {worse} | {cells} |")
    extra = "\n" + "\n".join(lines) + "\n"
    click.echo(write_report(results, out, f"Demo table: {seeds} seeds", extra) + extra)
    Store(out).write("demo-table.json", to_json(results).encode())
    click.echo(f"written to {out}/report.md, report.png and demo-table.json")
