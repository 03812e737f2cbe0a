"""One training step: images to the device, the method's terms, backward, update. Nothing in it waits for the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from shards import Batch, StreamBatch, seeded_generator
from shards.codec import to_float

from .images.mixing import draw_mixing, mix_images
from .methods import Step
from .methods.method import Images, Term, total
from .methods.parts.attacks import adversarial_images
from .methods.parts.frozen import Frozen
from .methods.parts.norms import through
from .ranks.distributed import rank, share_buffers, unshared, world
from .recipe import Recipe

Forward = Callable[[torch.Tensor], torch.Tensor]  # images [B, 3, H, W] in [0, 1] -> logits [B, classes]
Losses = dict[str, torch.Tensor]  # "loss", the terms without their weights, and "grad_norm": scalars on the device


@dataclass(frozen=True)
class Learner:
    """The student, its optimizer, and the frozen models that the method uses."""

    student: nn.Module  # holds the weights; attacks use it directly
    forward: Forward  # the student, wrapped for several ranks, and compiled if the recipe asks for it
    optimizer: torch.optim.Optimizer
    device: torch.device
    bf16: bool
    frozen: Mapping[str, Frozen] = field(default_factory=dict)


def train_step(
    learner: Learner, batch: Batch, recipe: Recipe, *, totals: Mapping[str, int], rate: float, step: int
) -> Losses:
    """Update the student once; returns its losses, still on the device. `Meter` checks that they are finite.

    totals: samples of each stream in the global batch, of which ``batch`` is this rank's part. Losses are sums over the
    samples here, divided by ``totals``, so that the losses of all parts add up.
    """
    # for dropout and the like; a seed per step, so that checkpoints need no generator state
    torch.manual_seed(recipe.seed * 1_000_003 + step + (rank() << 40))
    for group in learner.optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
    learner.optimizer.zero_grad(set_to_none=True)
    mixing = seeded_generator("mixing", recipe.seed, step, rank())
    drawn = seeded_generator("method", recipe.seed, step, rank())
    generator = torch.Generator(learner.device).manual_seed(drawn.initial_seed())  # on the device: noise needs no copy
    if recipe.method.passes.attack:  # an attack may use running statistics, of which checkpoints hold rank 0's alone
        share_buffers(learner.student)
    losses: Losses = {}
    for number, part in enumerate(split_batch(batch, recipe.accumulate), 1):
        with nullcontext() if number == recipe.accumulate else unshared(learner.forward):
            with torch.autocast(learner.device.type, torch.bfloat16, enabled=learner.bf16):
                terms = terms_of(learner, part, recipe, mixing, generator)
            loss = total(terms, totals)
            (loss * world()).backward()  # DDP averages gradients, but the ranks' losses add up
        for name, value in {"loss": loss, **{name: term.mean(totals) for name, term in terms.items()}}.items():
            losses[name] = losses[name] + value.detach() if name in losses else value.detach()
    weights = [weight for group in learner.optimizer.param_groups for weight in group["params"]]
    weights = [weight for weight in weights if weight.grad is not None]
    if recipe.optimizer.clip is not None:
        norm = nn.utils.clip_grad_norm_(weights, recipe.optimizer.clip)
    else:
        norm = nn.utils.get_total_norm([weight.grad for weight in weights if weight.grad is not None])
    losses["grad_norm"] = norm.detach() / world()  # equal on all ranks; the meter sums over ranks, so divide here
    learner.optimizer.step()
    return losses


def terms_of(
    learner: Learner, batch: Batch, recipe: Recipe, mixing: torch.Generator, generator: torch.Generator
) -> dict[str, Term]:
    """The terms of the recipe's method on a batch, or on a part of one.

    mixing: generator of Mixup and CutMix. generator: for the method's own random numbers, on the device.
    """
    step = Step(
        images={stream: to_device(some, stream, recipe, learner.device, mixing) for stream, some in batch.items()},
        student=partial(student_logits, learner, recipe.forward),
        attack=partial(adversarial_images, learner.student, generator=generator),
        frozen=learner.frozen,
        generator=generator,
    )
    return recipe.method.terms(step)


def student_logits(learner: Learner, how: str, *groups: torch.Tensor, norms: int = 0) -> tuple[torch.Tensor, ...]:
    """Float32 logits of each group of images. how: "joint", all groups in one batch, or "separate"."""
    with through(learner.student, norms):
        if how == "separate":
            return tuple(learner.forward(x).float() for x in groups)
        return learner.forward(torch.cat(groups)).float().split([len(x) for x in groups])


def to_device(
    some: StreamBatch, stream: str, recipe: Recipe, device: torch.device, generator: torch.Generator
) -> Images:
    """One stream's images, labels and soft labels on the device. Mixing happens within the stream."""
    settings, side = recipe.augmentation, some.images.shape[-1]
    drawn = draw_mixing(len(some.keys), side, mixup=settings.mixup, cutmix=settings.cutmix, generator=generator)
    mixing = drawn.to(device) if drawn is not None else None

    def mixed(pixels: torch.Tensor) -> torch.Tensor:
        images = mix_images(to_float(pixels.to(device, non_blocking=True)), mixing)
        return images.contiguous(memory_format=torch.channels_last)

    def sent(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device, non_blocking=True)

    return Images(
        x=mixed(some.images),
        labels=sent(some.labels),
        logits=sent(some.logits),
        stream=stream,  # type: ignore[arg-type]
        mixing=mixing,
        partner=None if some.partner is None else sent(some.partner),
        copies=() if some.more is None else tuple(mixed(pixels) for pixels in some.more),
    )


def split_batch(batch: Batch, parts: int) -> Iterator[Batch]:
    """Cut every stream of a batch into ``parts`` parts that differ by at most one sample."""
    for part in range(parts):
        yield {stream: some.cut(part, parts) for stream, some in batch.items()}
