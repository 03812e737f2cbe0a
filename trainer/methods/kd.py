"""Knowledge distillation (Hinton et al., 2015; paper, eq. 7)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from manifests import recipe_dataclass

from .method import Needs, Passes, Step, Term
from .parts.losses import cross_entropy, distillation_kl


@recipe_dataclass
class KD:
    """CE(student(x), y) + a T^2 KL(teacher(x) || student(x); T), with soft labels from the shards."""

    name: Literal["kd"] = "kd"
    temperature: Annotated[float, Field(gt=0)] = 4.0
    """T, the temperature of the distillation term."""
    weight: Annotated[float, Field(ge=0)] = 0.5
    """a, the weight of the distillation term."""
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Label smoothing of the cross-entropy. Soft labels stay as they are."""

    title: ClassVar[str] = "knowledge distillation"
    needs: ClassVar[Needs] = Needs()

    @property
    def passes(self) -> Passes:
        return Passes()

    def terms(self, step: Step) -> dict[str, Term]:
        clean = step.images["clean"]
        (output,) = step.student(clean.x)
        return {
            "ce": cross_entropy(output, clean, self.smoothing),
            "kl_clean": self.weight * distillation_kl(output, clean.logits, clean, self.temperature),
        }
