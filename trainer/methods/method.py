"""The interface of a training method: its settings, needs and cost, and the terms of its loss.

A new method takes one file in this folder, one line in `METHODS`, and a recipe. Everything else reads the method
object: the recipe, the preparation of a run, the training step, the cost ledger, tables, model cards, the command line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import torch

from shards.dataset import StreamName

from .parts.terms import Images, Term

__all__ = ["ATTACK_PASS", "Images", "Method", "Needs", "Passes", "Step", "Term", "passes_of", "total"]
ATTACK_PASS = 2 / 3  # cost in training passes: forward and the gradient of the input, not the gradient of the weights


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Demands of a method on the reader, the run and the student."""

    streams: tuple[StreamName, ...] = ("clean",)
    partners: bool = False
    """Whether each DAD image comes with the teacher's logits on the clean image with the same key."""
    copies: int = 1
    """Number of independently augmented copies of each clean image."""
    models: frozenset[str] = frozenset()
    """Frozen models of the run that every step uses: ``teacher``, ``discretizer``."""
    norms: int = 1
    """Number of sets of batch norms in the student. Evaluation and export use the first set."""
    temperature: float | None = None
    """Temperature of the stored soft labels, for a method without a field `temperature`. None: any will do."""
    smallest: int = 1
    """Fewest clean images that a part of a batch may hold on each rank."""


@dataclass(frozen=True, kw_only=True)
class Passes:
    """Passes through models per clean image. A method that reads DAD images counts as many of them as clean ones.

    A training pass computes the gradient of weights and input; an attack pass computes the gradient of the input alone.
    """

    train: float = 1
    attack: float = 0
    teacher: float = 0
    discretizer: float = 0
    paper: float | None = None
    """The paper's count (table 7), where an attack pass weighs as much as a training pass."""

    @property
    def forward(self) -> float:
        """Forward passes of the student."""
        return self.train + self.attack

    @property
    def times_plain(self) -> float:
        """The student's cost relative to plain training. Teacher and discretizer passes are not counted."""
        return self.train + ATTACK_PASS * self.attack


@dataclass(frozen=True)
class Step:
    """Everything that a method may use in one step."""

    images: Mapping[str, Images]
    student: Callable[..., tuple[torch.Tensor, ...]]
    """``student(*x, norms=0)``: float32 logits [B, classes] of each group of images, in train mode. norms: which set of
    batch norms to use."""
    attack: Callable[..., torch.Tensor]
    """`trainer.methods.parts.attacks.adversarial_images` on the unwrapped student, with this step's generator."""
    frozen: Mapping[str, Any] = field(default_factory=dict)
    """The models in `Needs.models`: ``teacher(x) -> logits``, ``discretizer(x) -> (images, codes)``; no gradients."""
    generator: torch.Generator = field(default_factory=torch.Generator)
    """Generator of random numbers on the device, seeded by (seed, step, rank)."""


class Method(Protocol):
    """A frozen recipe dataclass. Its fields are its settings: ``method: {name: dad, temperature: 4, weight: 0.5}``."""

    title: ClassVar[str]
    needs: ClassVar[Needs]

    @property
    def name(self) -> str:
        """The tag of the method in recipes: a field ``name: Literal["dad"] = "dad"``."""

    @property
    def passes(self) -> Passes:
        """The cost of one clean image in passes."""

    def terms(self, step: Step) -> dict[str, Term]:
        """The terms of the loss by name. A cross-entropy on clean images comes first."""


def total(terms: Mapping[str, Term], totals: Mapping[str, int]) -> torch.Tensor:
    """The loss of a part of a batch, the weighted sum of all terms. totals: samples per stream in the global batch."""
    return torch.stack([term.weight * term.mean(totals) for term in terms.values()]).sum()


def passes_of(method: Method, verified: float) -> Passes:
    """The passes of a method, given ``verified`` DAD images per clean image."""
    passes = method.passes
    missing = 1 - verified if "dad" in method.needs.streams else 0
    asked = (
        missing if "teacher" in method.needs.models else 0
    )  # a live teacher is asked about each image of each stream
    return replace(passes, train=passes.train - missing, teacher=passes.teacher - asked)
