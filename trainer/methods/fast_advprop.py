"""Fast AdvProp (Mei et al., 2022), decoupled: one part of a batch stays clean, the other is attacked with one step.

The published code also adds the attack pass's gradient of the weights to the update. Here the attack computes the
gradient of the input alone.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from manifests import recipe_dataclass

from .method import Needs, Passes, Step, Term
from .parts.losses import cross_entropy, targets


@recipe_dataclass
class FastAdvProp:
    """CE(student(x), y) on one part of the batch, CE(auxiliary(x'), y) on the other, each sample weighing the same."""

    name: Literal["fast_advprop"] = "fast_advprop"
    share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of the batch that is attacked. The published configuration has 4 clean images to 1."""
    eps: Annotated[float, Field(ge=0)] = 1 / 255
    """Radius of the ball around x, in units of pixel values."""
    alpha: Annotated[float, Field(ge=0)] = 1 / 255
    """Length of the single step."""
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Label smoothing of both terms."""

    title: ClassVar[str] = "Fast AdvProp"
    needs: ClassVar[Needs] = Needs(norms=2, smallest=10)

    @property
    def passes(self) -> Passes:
        return Passes(attack=self.share, paper=3)

    def terms(self, step: Step) -> dict[str, Term]:
        clean = step.images["clean"]
        y = targets(clean)
        attacked = min(max(2, round(self.share * len(clean))), len(clean) - 2)  # batch norm needs two in each part
        x = step.attack(clean.x[:attacked], y[:attacked], steps=1, eps=self.eps, alpha=self.alpha, norms=1)
        (on_clean,), (on_adversarial,) = step.student(clean.x[attacked:]), step.student(x, norms=1)
        return {
            "ce": cross_entropy(on_clean, clean, self.smoothing, slice(attacked, None)),
            "ce_adversarial": cross_entropy(on_adversarial, clean, self.smoothing, slice(attacked)),
        }
