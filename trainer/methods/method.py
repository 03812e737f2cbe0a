"""What a training method is: settings, what it needs, what it costs, and its loss as terms of a step.

Adding a method takes one file of this folder, one line in `METHODS`, and a recipe. Everything else asks the method: the recipe,
the preparation of a run, the training step, the cost ledger, tables, model cards and the command line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import torch

from shards.dataset import StreamName

from ..images.mixing import Mixing

ATTACK_PASS = 2 / 3  # of a training pass: forward, and the gradient of the input without that of the weights


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a method asks of the reader, the run and the student."""

    streams: tuple[StreamName, ...] = ("clean",)
    partners: bool = False
    """Beside each DAD image, the teacher's logits on the clean image of the same key."""
    copies: int = 1
    """Independently augmented copies of each clean image."""
    models: frozenset[str] = frozenset()
    """Frozen models of the run that every step asks: ``teacher``, ``discretizer``."""
    norms: int = 1
    """Sets of batch norms in the student. The first set is the one that is evaluated and exported."""
    smallest: int = 1
    """Clean images that a part of a batch must hold on each rank, at least."""


@dataclass(frozen=True, kw_only=True)
class Passes:
    """Passes through a model per clean image. Where a method reads DAD images, `train` counts as many of them as clean ones.

    A training pass computes the gradient of weights and input; an attack pass computes the gradient of the input alone.
    """

    train: float = 1
    attack: float = 0
    teacher: float = 0
    discretizer: float = 0
    paper: float | None = None
    """The paper's own count (table 7), which weighs an attack pass like a training pass."""

    @property
    def forward(self) -> float:
        """Forward passes of the student."""
        return self.train + self.attack

    @property
    def times_plain(self) -> float:
        """The student's own cost beside plain training, an attack pass at two thirds; without teacher and discretizer."""
        return self.train + ATTACK_PASS * self.attack


@dataclass(frozen=True)
class Images:
    """One stream's part of a step, on the device."""

    x: torch.Tensor  # [B, 3, H, W] in [0, 1], augmented and mixed
    labels: torch.Tensor  # int64 [B]
    logits: torch.Tensor  # [B, classes], the teacher's on this stream's images, as stored
    stream: StreamName = "clean"
    mixing: Mixing | None = None  # how `x` was blended; soft and hard labels are blended alike
    partner: torch.Tensor | None = None  # [B, classes], the teacher's logits on the clean image of the same key
    copies: tuple[torch.Tensor, ...] = ()  # further augmented copies, each like `x`

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Term:
    """One summand of a loss, sample by sample, so that parts of a batch and ranks add up exactly, whoever cuts them."""

    values: torch.Tensor  # [B] float32
    stream: StreamName  # whose number of samples in the global batch divides the sum
    weight: float = 1.0

    def __rmul__(self, factor: float) -> Term:
        return replace(self, weight=factor * self.weight)

    def mean(self, totals: Mapping[str, int]) -> torch.Tensor:
        """The unweighted sum of the values here, divided by the samples of the stream in the whole batch."""
        return self.values.sum() / totals[self.stream]


@dataclass(frozen=True)
class Step:
    """What a method may use in one step."""

    images: Mapping[str, Images]
    student: Callable[..., tuple[torch.Tensor, ...]]
    """``student(*x, norms=0)``: float32 logits [B, classes] of each group of images, through one set of batch norms, for training."""
    attack: Callable[..., torch.Tensor]
    """`trainer.methods.attacks.adversarial_images` of the bare student, with this step's generator."""
    frozen: Mapping[str, Any] = field(default_factory=dict)
    """The models that `Needs.models` names: ``teacher(x) -> logits``, ``discretizer(x) -> (images, codes)``, both without gradient."""
    generator: torch.Generator = field(default_factory=torch.Generator)
    """Random numbers on the device, seeded by (seed, step, rank)."""


class Method(Protocol):
    """A frozen recipe dataclass; its fields are its settings: ``method: {name: dad, temperature: 4, weight: 0.5}``."""

    title: ClassVar[str]
    needs: ClassVar[Needs]

    @property
    def name(self) -> str:
        """The tag of the method in recipes: a field ``name: Literal["dad"] = "dad"``."""

    @property
    def passes(self) -> Passes:
        """What one clean image costs."""

    def terms(self, step: Step) -> dict[str, Term]:
        """The loss, term by term; the first stream's term of hard labels comes first, if there is one."""


def total(terms: Mapping[str, Term], totals: Mapping[str, int]) -> torch.Tensor:
    """The loss of a part of a batch: the weighted sum of all terms. totals: samples of each stream in the whole global batch."""
    return torch.stack([term.weight * term.mean(totals) for term in terms.values()]).sum()


def passes_of(method: Method, verified: float) -> Passes:
    """The passes of a method where ``verified`` DAD images come with each clean one."""
    passes = method.passes
    return replace(passes, train=passes.train - (1 - verified)) if "dad" in method.needs.streams else passes
