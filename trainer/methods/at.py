"""Adversarial training (Madry et al., 2018): cross-entropy on PGD images alone.

The DAD paper's eq. 4 adds a clean term. Its table 7 counts 11 passes, which leave no room for one: ten attack passes
and one training pass.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from manifests import recipe_dataclass
from manifests.recipe import Positive

from .method import Needs, Passes, Step, Term
from .parts.losses import cross_entropy, targets


@recipe_dataclass
class AT:
    """CE(student(x'), y), x' = PGD on the student in eval mode, L-infinity, uniform start."""

    name: Literal["at"] = "at"
    steps: Positive = 10
    """Steps of the attack."""
    eps: Annotated[float, Field(ge=0)] = 4 / 255
    """Radius of the ball around x, in units of pixel values."""
    alpha: Annotated[float, Field(ge=0)] = 1 / 255
    """Length of a step."""
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Label smoothing."""

    title: ClassVar[str] = "adversarial training"
    needs: ClassVar[Needs] = Needs()

    @property
    def passes(self) -> Passes:
        return Passes(attack=self.steps, paper=11 if self.steps == 10 else None)

    def terms(self, step: Step) -> dict[str, Term]:
        clean = step.images["clean"]
        y = targets(clean)
        adversarial = step.attack(clean.x, y, steps=self.steps, eps=self.eps, alpha=self.alpha)
        (output,) = step.student(adversarial)
        return {"ce": cross_entropy(output, clean, self.smoothing)}
