"""Discrete Adversarial Distillation (paper, eq. 9)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from manifests import recipe_dataclass

from .method import Needs, Passes, Step, Term
from .parts.losses import cross_entropy, distillation_kl


@recipe_dataclass
class DAD:
    """CE(student(x), y) + a T^2 KL(teacher(x) || student(x); T) + a T^2 KL(teacher(x'') || student(x''); T).

    There is no cross-entropy on x''.
    """

    name: Literal["dad"] = "dad"
    temperature: Annotated[float, Field(gt=0)] = 4.0
    """T, the temperature of both distillation terms."""
    weight: Annotated[float, Field(ge=0)] = 0.5
    """a, the weight of both distillation terms."""
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Label smoothing of the cross-entropy. Soft labels stay as they are."""

    title: ClassVar[str] = "Discrete Adversarial Distillation"
    needs: ClassVar[Needs] = Needs(streams=("clean", "dad"))

    @property
    def passes(self) -> Passes:
        return Passes(train=2, paper=2)

    def terms(self, step: Step) -> dict[str, Term]:
        clean, dad = step.images["clean"], step.images["dad"]
        on_clean, on_dad = step.student(clean.x, dad.x)
        return {
            "ce": cross_entropy(on_clean, clean, self.smoothing),
            "kl_clean": self.weight * distillation_kl(on_clean, clean.logits, clean, self.temperature),
            "kl_dad": self.weight * distillation_kl(on_dad, dad.logits, dad, self.temperature),
        }
