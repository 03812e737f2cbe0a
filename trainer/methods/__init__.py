"""Training methods, one file each. Tables list them in the order of `METHODS`.

A new method takes a file in this folder, a line here, and a recipe. `method` defines what a method is; `parts` holds
its building blocks: losses, attacks on the student, sets of batch norms, frozen models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Union

from pydantic import Field

from .advprop import AdvProp
from .ard import ARD
from .at import AT
from .dad import DAD
from .dad_images import DADImages
from .dat import DAT
from .dat_dad import DATDAD
from .fast_advprop import FastAdvProp
from .kd import KD
from .live import LiveDAD, LiveKD
from .method import Method, Needs, Passes, Step, Term
from .plain import Plain
from .rslad import RSLAD

METHODS: tuple[type[Method], ...] = (
    Plain,
    KD,
    DAD,
    DADImages,
    ARD,
    RSLAD,
    LiveKD,
    LiveDAD,
    AT,
    AdvProp,
    FastAdvProp,
    DAT,
    DATDAD,
)
NAMES: tuple[str, ...] = tuple(method().name for method in METHODS)
BY_NAME: Mapping[str, type[Method]] = dict(zip(NAMES, METHODS, strict=True))

if TYPE_CHECKING:
    AnyMethod = Method
else:
    AnyMethod = Annotated[Union[METHODS], Field(discriminator="name")]  # noqa: UP007  # built from a tuple, not written out

__all__ = ["BY_NAME", "DAD", "METHODS", "NAMES", "AnyMethod", "Method", "Needs", "Passes", "Step", "Term"]


def rank_of(name: str) -> int:
    """The place of a method in tables. A method of a later version, unknown here, comes last."""
    return NAMES.index(name) if name in NAMES else len(NAMES)


def title_of(name: str) -> str:
    """The title of a method in model cards; its name if a later version made it."""
    return BY_NAME[name].title if name in BY_NAME else name
