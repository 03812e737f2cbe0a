"""Plain training: cross-entropy on clean images."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from manifests import recipe_dataclass

from .method import Needs, Passes, Step, Term
from .parts.losses import cross_entropy


@recipe_dataclass
class Plain:
    """CE(student(x), y). No soft label is used."""

    name: Literal["plain"] = "plain"
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Label smoothing."""

    title: ClassVar[str] = "plain training"
    needs: ClassVar[Needs] = Needs()

    @property
    def passes(self) -> Passes:
        return Passes(paper=1)

    def terms(self, step: Step) -> dict[str, Term]:
        clean = step.images["clean"]
        (output,) = step.student(clean.x)
        return {"ce": cross_entropy(output, clean, self.smoothing)}
