"""One training step: forward, loss, backward, update. Nothing in it waits for the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import nn

from shards import Batch, StreamBatch, seeded_generator
from shards.codec import to_float

from .images.mixing import draw_mixing, mix_images
from .methods.losses import student_loss
from .ranks.distributed import rank, unshared, world
from .recipe import Recipe

Forward = Callable[[torch.Tensor], torch.Tensor]  # images [B, 3, H, W] in [0, 1] -> logits [B, classes]
Losses = dict[str, torch.Tensor]  # "loss", its terms and "grad_norm", scalars on the device


def train_step(
    forward: Forward,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    recipe: Recipe,
    *,
    totals: Mapping[str, int],
    rate: float,
    step: int,
    device: torch.device,
    bf16: bool,
) -> Losses:
    """One update of the student; returns loss, terms and the gradient's norm, still on the device. `Meter` finds what is not finite.

    totals: samples of each stream in the whole global batch, of which ``batch`` may be a part; losses are sums over the samples here
    divided by them, so that those of all parts add up.
    """
    torch.manual_seed(
        recipe.seed * 1_000_003 + step + (rank() << 40)
    )  # dropout and the like; no generator state to save
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
    optimizer.zero_grad(set_to_none=True)
    generator = seeded_generator("mixing", recipe.seed, step, rank())
    losses: Losses = {}
    for number, part in enumerate(split_batch(batch, recipe.accumulate), 1):
        with nullcontext() if number == recipe.accumulate else unshared(forward):
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss, terms = batch_loss(forward, part, recipe, totals, generator, device)
            (loss * world()).backward()  # the ranks' gradients are averaged, their losses add up
        for name, value in {"loss": loss, **terms}.items():
            losses[name] = losses[name] + value.detach() if name in losses else value.detach()
    weights = [weight for group in optimizer.param_groups for weight in group["params"] if weight.grad is not None]
    if recipe.optimizer.clip is not None:
        norm = nn.utils.clip_grad_norm_(weights, recipe.optimizer.clip)
    else:
        norm = nn.utils.get_total_norm([weight.grad for weight in weights if weight.grad is not None])
    losses["grad_norm"] = norm.detach() / world()  # alike on all ranks, where the meter adds up
    optimizer.step()
    return losses


def batch_loss(
    forward: Forward,
    batch: Batch,
    recipe: Recipe,
    totals: Mapping[str, int],
    generator: torch.Generator,
    device: torch.device,
) -> tuple[torch.Tensor, Losses]:
    """The recipe's loss on a batch, or a part of one, and its terms. Images of each stream are mixed among themselves."""
    halves = list(batch.values())
    settings = recipe.augmentation
    mixing, images = [], []
    for half in halves:
        side = half.images.shape[-1]
        drawn = draw_mixing(len(half.keys), side, mixup=settings.mixup, cutmix=settings.cutmix, generator=generator)
        mixing.append(drawn.to(device) if drawn is not None else None)
        pixels = to_float(half.images.to(device, non_blocking=True))
        images.append(mix_images(pixels, mixing[-1]).contiguous(memory_format=torch.channels_last))
    return student_loss(
        recipe.loss.objective,
        halves[0].labels.to(device, non_blocking=True),
        [logits.float() for logits in forward_halves(forward, images, recipe.forward)],
        [half.logits.to(device, non_blocking=True) for half in halves],
        temperature=recipe.loss.temperature,
        weight=recipe.loss.weight,
        smoothing=recipe.loss.smoothing,
        mixing=mixing,
        shares=[len(half.keys) / totals[stream] for stream, half in batch.items()],
    )


def forward_halves(forward: Forward, images: Sequence[torch.Tensor], how: str) -> Sequence[torch.Tensor]:
    """Logits of the clean images and, if any, of the DAD images: in one joint batch, or one after the other."""
    if how == "separate":
        return [forward(half) for half in images]
    return forward(torch.cat(list(images))).split([len(half) for half in images])


def split_batch(batch: Batch, parts: int) -> Iterator[Batch]:
    """Cut both halves of a batch into ``parts`` parts that differ by at most one sample."""
    for part in range(parts):
        yield {stream: _cut(half, part, parts) for stream, half in batch.items()}


def _cut(half: StreamBatch, part: int, parts: int) -> StreamBatch:
    place = slice(len(half.keys) * part // parts, len(half.keys) * (part + 1) // parts)
    return StreamBatch(
        keys=half.keys[place], images=half.images[place], labels=half.labels[place], logits=half.logits[place]
    )
