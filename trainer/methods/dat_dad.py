"""DAT and DAD together (paper, appendix C): eq. 9, plus a term on discrete adversarial images of the student."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from manifests import recipe_dataclass
from manifests.recipe import Positive

from .method import Needs, Passes, Step, Term
from .parts.attacks import discrete_images
from .parts.losses import cross_entropy, distillation_kl, targets


@recipe_dataclass
class DATDAD:
    """DAD's loss + a CE(student(x''s), y), x''s = Q(one L2 step on the student from Q(x))."""

    name: Literal["dat_dad"] = "dat_dad"
    temperature: Annotated[float, Field(gt=0)] = 4.0
    """T, the temperature of both distillation terms."""
    weight: Annotated[float, Field(ge=0)] = 0.5
    """a, the weight of both distillation terms and of the term on the student's own adversarial images."""
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Label smoothing of both cross-entropies."""
    steps: Positive = 1
    """Steps of the attack on the student."""
    eps: Annotated[float, Field(ge=0)] = 0.1
    """Radius of the L2 ball around Q(x), in units of pixel values."""
    alpha: Annotated[float, Field(ge=0)] = 0.1
    """Length of a step."""
    attacked: Literal["train", "eval"] = "train"
    """Mode of the student during the attack. train: batch norm's running statistics follow the attack."""

    title: ClassVar[str] = "DAT and DAD"
    needs: ClassVar[Needs] = Needs(streams=("clean", "dad"), models=frozenset({"discretizer"}))

    @property
    def passes(self) -> Passes:
        return Passes(train=3, attack=self.steps, discretizer=2)

    def terms(self, step: Step) -> dict[str, Term]:
        clean, dad = step.images["clean"], step.images["dad"]
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
        on_clean, on_dad, on_adversarial = step.student(clean.x, dad.x, adversarial)
        return {
            "ce": cross_entropy(on_clean, clean, self.smoothing),
            "kl_clean": self.weight * distillation_kl(on_clean, clean.logits, clean, self.temperature),
            "kl_dad": self.weight * distillation_kl(on_dad, dad.logits, dad, self.temperature),
            "ce_adversarial": self.weight * cross_entropy(on_adversarial, clean, self.smoothing),
        }
