"""ARD (Goldblum et al., 2020) as in the DAD paper's tables 1 to 3: stored DAD images replace attacks on the student.

The original attacks the student itself: alpha T^2 KL(teacher(x) || student(x'); T) + (1 - alpha) CE(student(x), y).
Here x'' is the stored image, and its target is the teacher's soft label of the *clean* image with the same key. The
paper gives no weights; T and a are DAD's.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from manifests import recipe_dataclass

from .method import Needs, Passes, Step, Term
from .parts.losses import cross_entropy, distillation_kl, partner_logits


@recipe_dataclass
class ARD:
    """CE(student(x), y) + a T^2 KL(teacher(x) || student(x''); T).

    A clean image without a verified x'' keeps its cross-entropy.
    """

    name: Literal["ard"] = "ard"
    temperature: Annotated[float, Field(gt=0)] = 4.0
    """T, the temperature of the distillation term."""
    weight: Annotated[float, Field(ge=0)] = 0.5
    """a, the weight of the distillation term."""
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Label smoothing of the cross-entropy."""

    title: ClassVar[str] = "ARD on DAD images"
    needs: ClassVar[Needs] = Needs(streams=("clean", "dad"), partners=True)

    @property
    def passes(self) -> Passes:
        return Passes(train=2)

    def terms(self, step: Step) -> dict[str, Term]:
        clean, dad = step.images["clean"], step.images["dad"]
        on_clean, on_dad = step.student(clean.x, dad.x)
        return {
            "ce": cross_entropy(on_clean, clean, self.smoothing),
            "kl_dad": self.weight * distillation_kl(on_dad, partner_logits(dad), dad, self.temperature),
        }
