"""RSLAD (Zi et al., 2021) as in the DAD paper's tables 1 to 3: stored DAD images replace attacks on the student.

The target of both terms is the teacher's soft label of the clean image; hard labels are not used. The original has the
weights 5/6 and 1/6, and T = 1.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from manifests import recipe_dataclass
from manifests.recipe import Share

from .method import Needs, Passes, Step, Term
from .parts.losses import distillation_kl, partner_logits


@recipe_dataclass
class RSLAD:
    """b KL(teacher(x) || student(x'')) + (1 - b) KL(teacher(x) || student(x)), both at temperature 1.

    A clean image without a verified x'' keeps its own term.
    """

    name: Literal["rslad"] = "rslad"
    balance: Share = 5 / 6
    """b, the share of the adversarial term."""

    title: ClassVar[str] = "RSLAD on DAD images"
    needs: ClassVar[Needs] = Needs(streams=("clean", "dad"), partners=True, temperature=1.0)

    @property
    def passes(self) -> Passes:
        return Passes(train=2)

    def terms(self, step: Step) -> dict[str, Term]:
        clean, dad = step.images["clean"], step.images["dad"]
        on_clean, on_dad = step.student(clean.x, dad.x)
        return {
            "kl_clean": (1 - self.balance) * distillation_kl(on_clean, clean.logits, clean, 1.0),
            "kl_dad": self.balance * distillation_kl(on_dad, partner_logits(dad), dad, 1.0),
        }
