"""DAD images as mere augmentation (paper, table 6): hard labels on clean and DAD images, no distillation."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from manifests import recipe_dataclass

from .method import Needs, Passes, Step, Term
from .parts.losses import cross_entropy


@recipe_dataclass
class DADImages:
    """CE(student(x), y) + CE(student(x''), y). No soft label is used; the teacher only verified x''."""

    name: Literal["dad_images"] = "dad_images"
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Label smoothing of both terms."""

    title: ClassVar[str] = "DAD images with hard labels"
    needs: ClassVar[Needs] = Needs(streams=("clean", "dad"))

    @property
    def passes(self) -> Passes:
        return Passes(train=2)

    def terms(self, step: Step) -> dict[str, Term]:
        clean, dad = step.images["clean"], step.images["dad"]
        on_clean, on_dad = step.student(clean.x, dad.x)
        return {
            "ce": cross_entropy(on_clean, clean, self.smoothing),
            "ce_dad": cross_entropy(on_dad, dad, self.smoothing),
        }
