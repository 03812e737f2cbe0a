"""The picture of a report: a bar chart with a group of bars per image set."""

from __future__ import annotations

import io
from collections.abc import Sequence

from .results import Result, groups, set_names, summarize


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
    axis.set_xticks(range(len(names)), names, rotation=15, parse_math=False)  # a name with dollar signs is no formula
    axis.set_ylabel("top-1 (%)")
    axis.set_ylim(0, 100)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.3)
    legend = axis.legend(
        ncols=min(len(rows), 4), fontsize=8, frameon=False, loc="upper right", bbox_to_anchor=(1, 1.15)
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
