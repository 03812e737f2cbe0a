"""The table of a report in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from .results import Result, groups, set_names, summarize


def markdown(results: Sequence[Result]) -> str:
    """The table, with a line below that explains the errors."""
    names = set_names(results)
    lines = ["| student | seeds | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for label, group in groups(results).items():
        cells = " | ".join(str(summarize(group, name)) for name in names)
        lines.append(f"| {label} | {len(group)} | {cells} |")
    lines += ["", "Top-1 in percent ± standard error: between seeds, or binomial over the images for a single student."]
    if any(result.reference for result in results):
        lines.append(
            "Rows marked (reference) are the committed results of `make demo-table`, not students of this machine."
        )
    return "\n".join(lines) + "\n"
