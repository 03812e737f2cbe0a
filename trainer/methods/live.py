"""KD and DAD with the teacher in every step, as in the paper's code. They show the cost that stored soft labels save.

The teacher sees each augmented, mixed image itself, so its soft label needs no mixing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from manifests import recipe_dataclass

from .method import Images, Needs, Passes, Step, Term
from .parts.losses import cross_entropy, distillation_kl


@recipe_dataclass
class LiveKD:
    """KD (paper, eq. 7): the teacher labels the clean images in every step."""

    name: Literal["kd_live"] = "kd_live"
    temperature: Annotated[float, Field(gt=0)] = 4.0
    """T, the temperature of the distillation term."""
    weight: Annotated[float, Field(ge=0)] = 0.5
    """a, the weight of the distillation term."""
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Label smoothing of the cross-entropy."""

    title: ClassVar[str] = "KD with a live teacher"
    needs: ClassVar[Needs] = Needs(models=frozenset({"teacher"}))

    @property
    def passes(self) -> Passes:
        return Passes(teacher=1)

    def terms(self, step: Step) -> dict[str, Term]:
        clean = step.images["clean"]
        (soft,) = _asked(step, clean)
        (output,) = step.student(clean.x)
        return {
            "ce": cross_entropy(output, clean, self.smoothing),
            "kl_clean": self.weight * distillation_kl(output, soft, replace(clean, mixing=None), self.temperature),
        }


@recipe_dataclass
class LiveDAD:
    """DAD (paper, eq. 9) on stored images: the teacher labels clean and DAD images in every step."""

    name: Literal["dad_live"] = "dad_live"
    temperature: Annotated[float, Field(gt=0)] = 4.0
    """T, the temperature of both distillation terms."""
    weight: Annotated[float, Field(ge=0)] = 0.5
    """a, the weight of both distillation terms."""
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Label smoothing of the cross-entropy."""

    title: ClassVar[str] = "DAD with a live teacher"
    needs: ClassVar[Needs] = Needs(streams=("clean", "dad"), models=frozenset({"teacher"}))

    @property
    def passes(self) -> Passes:
        return Passes(train=2, teacher=2)

    def terms(self, step: Step) -> dict[str, Term]:
        clean, dad = step.images["clean"], step.images["dad"]
        soft_clean, soft_dad = _asked(step, clean, dad)
        on_clean, on_dad = step.student(clean.x, dad.x)
        return {
            "ce": cross_entropy(on_clean, clean, self.smoothing),
            "kl_clean": self.weight
            * distillation_kl(on_clean, soft_clean, replace(clean, mixing=None), self.temperature),
            "kl_dad": self.weight * distillation_kl(on_dad, soft_dad, replace(dad, mixing=None), self.temperature),
        }


def _asked(step: Step, *groups: Images) -> tuple[torch.Tensor, ...]:
    """The teacher's logits on the images of each group, from one call."""
    logits: torch.Tensor = step.frozen["teacher"](torch.cat([images.x for images in groups]))
    return logits.split([len(images) for images in groups])
