"""Measure stage 1's parts on this machine: seconds, floating-point operations, and the rate of its matrix units."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.utils.flop_counter import FlopCounterMode

from shards.codec import to_float

from ..job.models import Models
from ..method.attack import attack, draw_noise, loss_gradient
from ..recipe import Recipe


@dataclass(frozen=True)
class Part:
    """One kind of model call of the method."""

    name: str
    times: int  # number of calls for an image
    call: Callable[[], object]  # runs it on a whole batch


@dataclass(frozen=True)
class TrialBatch:
    """Images to measure with; speed does not depend on their content."""

    x: torch.Tensor  # [B, 3, S, S] in [0, 1]
    y: torch.Tensor  # [B]
    noise: torch.Tensor

    @classmethod
    def of(cls, pixels: torch.Tensor, recipe: Recipe, models: Models) -> TrialBatch:
        """Make a batch on the models' device. pixels: uint8 [B, 3, S, S] on the CPU."""
        keys = [f"trial-{i}" for i in range(len(pixels))]
        noise = draw_noise(keys, pixels.shape[1:], recipe.attack, recipe.seed)
        return cls(
            models.send(to_float(pixels)), models.send(torch.zeros(len(pixels), dtype=torch.long)), models.send(noise)
        )

    def __len__(self) -> int:
        return len(self.x)


def model_parts(batch: TrialBatch, recipe: Recipe, models: Models) -> list[Part]:
    """The model calls that the method makes for every image."""

    def forward() -> None:
        with torch.no_grad():
            models.teacher(batch.x)

    def discretize() -> None:
        with torch.no_grad():
            models.discretizer(batch.x)

    return [
        Part("Q", 2, discretize),
        Part("teacher forward", teacher_forwards(recipe), forward),
        Part("teacher gradient", recipe.attack.steps, lambda: loss_gradient(batch.x, batch.y, models.teacher)),
    ]


def teacher_forwards(recipe: Recipe) -> int:
    """Teacher forwards per image: on x and x'', on views of both, and on the attacked image if its loss is recorded."""
    views = recipe.views.count if recipe.views.count > 1 else 0
    return 2 + 2 * views + recipe.output.attacked_loss


def bare_calls(batch: TrialBatch, recipe: Recipe, models: Models) -> None:
    """Run all model calls of one batch, and nothing else."""
    attacked = attack(batch.x, batch.y, models.teacher, models.discretizer, recipe.attack, batch.noise)
    with torch.no_grad():
        for _ in range(teacher_forwards(recipe)):
            models.teacher(attacked.adversarial)


def count_flops(call: Callable[[], object]) -> int:
    """Floating-point operations (a multiply-add is two) of the matrix products and convolutions of a call."""
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def matrix_rate(device: torch.device, *, bf16: bool, seconds: float = 2.0) -> float:
    """FLOP/s of large square matrix products on this device: what its matrix units reach in practice."""
    side = 8192 if device.type == "cuda" else 2048
    dtype = torch.bfloat16 if bf16 else torch.float32
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    once = min(timed(lambda: a @ b, device) for _ in range(3))
    repeats = max(1, round(seconds / once))

    def many() -> None:
        for _ in range(repeats):
            torch.mm(a, b)

    return 2 * side**3 * repeats / timed(many, device)


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds that a call takes, including all work that it starts on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def busy_share(call: Callable[[], object], device: torch.device) -> float | None:
    """Share of a call's time in which at least one kernel ran on the GPU; None on a CPU."""
    if device.type != "cuda":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        seconds = timed(call, device)
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type == DeviceType.CUDA
    )
    return covered(spans) / (1e6 * seconds)  # the profiler counts microseconds


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals that are sorted by their beginnings."""
    total, reached = 0.0, float("-inf")
    for begin, end in spans:
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
