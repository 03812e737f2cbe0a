"""DAT (Mao et al., 2022): every step makes discrete adversarial images of the student itself."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from manifests import recipe_dataclass
from manifests.recipe import Positive

from .method import Needs, Passes, Step, Term
from .parts.attacks import discrete_images
from .parts.losses import cross_entropy, targets


@recipe_dataclass
class DAT:
    """CE(student(x), y) + CE(student(x''), y), x'' = Q(one L2 step on the student from Q(x)).

    As published: x is the mixed image, and both terms and the attack use its mixed labels.
    """

    name: Literal["dat"] = "dat"
    steps: Positive = 1
    """Steps of the attack."""
    eps: Annotated[float, Field(ge=0)] = 0.1
    """Radius of the L2 ball around Q(x), in units of pixel values."""
    alpha: Annotated[float, Field(ge=0)] = 0.1
    """Length of a step."""
    attacked: Literal["train", "eval"] = "train"
    """Mode of the student during the attack. train, as published: batch norm's running statistics follow the attack."""
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Label smoothing of both terms."""

    title: ClassVar[str] = "DAT"
    needs: ClassVar[Needs] = Needs(models=frozenset({"discretizer"}))

    @property
    def passes(self) -> Passes:
        return Passes(train=2, attack=self.steps, discretizer=2, paper=3.5 if self.steps == 1 else None)

    def terms(self, step: Step) -> dict[str, Term]:
        clean = step.images["clean"]
        adversarial = discrete_images(
            step.attack,
            step.frozen["discretizer"],
            clean.x,
            targets(clean),
            steps=self.steps,
            eps=self.eps,
            alpha=self.alpha,
            training=self.attacked == "train",
        )
        on_clean, on_adversarial = step.student(clean.x, adversarial)
        return {
            "ce": cross_entropy(on_clean, clean, self.smoothing),
            "ce_adversarial": cross_entropy(on_adversarial, clean, self.smoothing),
        }
