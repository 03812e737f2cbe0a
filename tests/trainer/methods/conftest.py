"""Small real parts of a training step: batches without shards, a teacher, a discretizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from shards import Batch, StreamBatch, seeded_generator
from trainer.methods import Method, Step
from trainer.methods.parts.attacks import adversarial_images
from trainer.methods.parts.frozen import as_quantizer, without_gradient
from trainer.recipe import Recipe, load
from trainer.step import Learner, student_logits, to_device
from trainer.student import create_student

CLASSES, SIDE, BATCH = 5, 16, 10
CPU = torch.device("cpu")


class Coarse(nn.Module):
    """A discretizer with eight levels a channel."""

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (images * 7).round() / 7, torch.zeros(0)


def student_of(name: str = "test_resnet", side: int = SIDE, seed: int = 0) -> nn.Module:
    """A student in train mode; ``test_resnet`` has batch norms, ``test_vit`` has none."""
    torch.manual_seed(seed)
    return create_student(name, CLASSES, side).train()


def batch_of(streams: Sequence[str] = ("clean", "dad"), size: int = BATCH) -> Batch:
    """As many images of each stream, with labels and a teacher's logits."""
    generator = torch.Generator().manual_seed(1)
    batch: Batch = {}
    for stream in streams:
        images = torch.randint(0, 256, (size, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
        labels = torch.randint(CLASSES, (size,), generator=generator)
        logits = 3 * torch.randn(size, CLASSES, generator=generator)
        partner = 3 * torch.randn(size, CLASSES, generator=generator) if stream == "dad" else None
        keys = [f"{stream}-{n}" for n in range(size)]
        batch[stream] = StreamBatch(keys=keys, images=images, labels=labels, logits=logits.half(), partner=partner)
    return batch


def settings(method: Method, *overrides: str) -> Recipe:
    """The demo's recipe with a method, in float32."""
    return replace(load("demo", ["precision=fp32", "optimizer.clip=null", *overrides]), method=method)


def learner_of(student: nn.Module, side: int = SIDE) -> tuple[Learner, dict[str, nn.Module]]:
    """What a step works with, and its frozen models as modules: for hooks."""
    models = {"teacher": student_of("test_resnet", side, seed=5).eval(), "discretizer": Coarse()}
    frozen = {"teacher": without_gradient(models["teacher"]), "discretizer": as_quantizer(models["discretizer"])}
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    return Learner(student, student, optimizer, CPU, bf16=False, frozen=frozen), models


def step_of(learner: Learner, batch: Batch, recipe: Recipe, **attack: Any) -> Step:
    """The step that the trainer makes of a batch. attack: options of the attack that win over the method's."""
    mixing = seeded_generator("mixing")
    images = {stream: to_device(some, stream, recipe, CPU, mixing) for stream, some in batch.items()}
    generator = seeded_generator("method")

    def attacked(*given: Any, **options: Any) -> torch.Tensor:
        return adversarial_images(learner.student, *given, **{"generator": generator, **options, **attack})

    student = partial(student_logits, learner, recipe.forward)
    return Step(images=images, student=student, attack=attacked, frozen=learner.frozen, generator=generator)


def totals_of(batch: Batch) -> Mapping[str, int]:
    return {stream: len(some.keys) for stream, some in batch.items()}


def count_images(model: nn.Module) -> list[int]:
    """Grows by the batch size of every forward pass."""
    seen: list[int] = []
    model.register_forward_pre_hook(lambda _module, inputs: seen.append(len(inputs[0])))
    return seen
