"""The list of training methods, as `python -m trainer methods` prints it."""

from __future__ import annotations

from ..methods import METHODS, Method, Passes


def methods_table() -> str:
    """A row per method: its name in recipes, title, needs, passes per clean image, and the paper's count of passes."""
    rows = [("method", "title", "needs", "passes per clean image", "paper"), *(_row(method()) for method in METHODS)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    note = (
        "needs   clean, dad: streams of the shards. pairs: the clean image's soft label beside each DAD image.\n"
        "        teacher, discretizer: models of the run, loaded for training. 2 norms: two sets of batch norms.\n"
        "passes  with default settings and as many DAD images as clean ones. A training pass computes the gradient of\n"
        "        the weights, an attack pass only that of the image, at about two thirds of the cost.\n"
        "paper   the count in the paper's table 7, where both kinds of passes weigh the same."
    )
    return "\n".join([*lines, "", note])


def _row(method: Method) -> tuple[str, ...]:
    return method.name, method.title, _needs(method), passes_in_words(method.passes), _paper(method)


def _needs(method: Method) -> str:
    needs = method.needs
    wanted = [*needs.streams, *["pairs"] * needs.partners, *[f"{needs.copies} copies"] * (needs.copies > 1)]
    return ", ".join([*wanted, *sorted(needs.models), *[f"{needs.norms} norms"] * (needs.norms > 1)])


def passes_in_words(passes: Passes) -> str:
    """Passes in words, such as "2 training, 1 attack, 2 discretizer"."""
    counts = {
        "training": passes.train,
        "attack": passes.attack,
        "teacher": passes.teacher,
        "discretizer": passes.discretizer,
    }
    return ", ".join(f"{count:.3g} {name}" for name, count in counts.items() if count)


def _paper(method: Method) -> str:
    return "" if method.passes.paper is None else f"{method.passes.paper:g}"
