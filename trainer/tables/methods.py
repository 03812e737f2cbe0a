"""The list of training methods, as `python -m trainer methods` prints it."""

from __future__ import annotations

from ..methods import METHODS, Method, Passes


def methods_table() -> str:
    """A row for each method: its name in recipes, its title, what it needs, its passes per clean image, the paper's count."""
    rows = [("method", "title", "needs", "passes per clean image", "paper"), *(_row(method()) for method in METHODS)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    note = (
        "Passes are those of each method's default settings, with as many DAD images as clean ones. A training pass computes\n"
        "the gradient of the weights; an attack pass that of the images alone, at about two thirds of the cost."
    )
    return "\n".join([*lines, "", note])


def _row(method: Method) -> tuple[str, ...]:
    return method.name, method.title, _needs(method), passes_in_words(method.passes), _paper(method)


def _needs(method: Method) -> str:
    needs = method.needs
    wanted = [f"{stream} shards" for stream in needs.streams]
    wanted += ["pairs"] * needs.partners + [f"{needs.copies} copies"] * (needs.copies > 1)
    wanted += [f"the run's {name}" for name in sorted(needs.models)]
    return ", ".join(wanted + [f"{needs.norms} sets of batch norms"] * (needs.norms > 1))


def passes_in_words(passes: Passes) -> str:
    """For people: "2 training, 1 attack, 2 discretizer"."""
    counts = {
        "training": passes.train,
        "attack": passes.attack,
        "teacher": passes.teacher,
        "discretizer": passes.discretizer,
    }
    return ", ".join(f"{count:.3g} {name}" for name, count in counts.items() if count)


def _paper(method: Method) -> str:
    return "" if method.passes.paper is None else f"{method.passes.paper:g}"
