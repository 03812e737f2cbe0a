"""AdvProp (Xie et al., 2020): clean images use one set of batch norms, their adversarial images another.

The attack uses the auxiliary norms with their running statistics. Students without batch norms, such as ViTs, use the
same weights for both kinds of images.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from manifests import recipe_dataclass
from manifests.recipe import Positive

from .method import Needs, Passes, Step, Term
from .parts.losses import cross_entropy, targets

PAPER = {5: 7.0, 1: 3.0}  # by steps; the paper counts Fast AdvProp as AdvProp with one step


@recipe_dataclass
class AdvProp:
    """CE(student(x), y) + CE(auxiliary(x'), y), x' = PGD, L-infinity, uniform start."""

    name: Literal["advprop"] = "advprop"
    steps: Positive = 5
    """Steps of the attack."""
    eps: Annotated[float, Field(ge=0)] = 4 / 255
    """Radius of the ball around x, in units of pixel values."""
    alpha: Annotated[float, Field(ge=0)] = 1 / 255
    """Length of a step."""
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Label smoothing of both terms."""

    title: ClassVar[str] = "AdvProp"
    needs: ClassVar[Needs] = Needs(norms=2)

    @property
    def passes(self) -> Passes:
        return Passes(train=2, attack=self.steps, paper=PAPER.get(self.steps))

    def terms(self, step: Step) -> dict[str, Term]:
        clean = step.images["clean"]
        y = targets(clean)
        adversarial = step.attack(clean.x, y, steps=self.steps, eps=self.eps, alpha=self.alpha, norms=1)
        (on_clean,), (on_adversarial,) = step.student(clean.x), step.student(adversarial, norms=1)
        return {
            "ce": cross_entropy(on_clean, clean, self.smoothing),
            "ce_adversarial": cross_entropy(on_adversarial, clean, self.smoothing),
        }
