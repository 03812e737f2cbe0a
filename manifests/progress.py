"""Progress bars with rate and ETA: redrawn on a terminal, one line every few seconds in a log file."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress(
    total: int, label: str, unit: str, *, initial: int = 0, hidden: bool = False, quick: bool = False
) -> tqdm[Any]:
    """A tqdm bar on standard error.

    initial: units that earlier runs have done; they do not count in the rate.
    quick: for work that mostly takes a moment; the bar appears after 2 seconds and disappears at the end.
    """
    lively = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=initial,
        desc=label,
        unit=unit,
        mininterval=0.2 if lively else 10.0,
        maxinterval=10.0,
        dynamic_ncols=lively,
        ncols=None if lively else 100,
        leave=not quick,
        delay=2.0 if quick else 0.0,
        disable=hidden,
    )
