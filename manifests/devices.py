"""Device and number format: where a model computes, whether its matrix products run in bfloat16, and when its memory runs out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .errors import UserError, one_line


def choose_device(name: str) -> torch.device:
    """The device a recipe names; ``auto`` is the GPU when there is one. Raises UserError for one that is not there.

    One GPU of several becomes the current one: torch's thread that pins memory would else open a context on the first.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is not None and torch.cuda.is_available():
            torch.cuda.set_device(device)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device: {name!r} is not usable here ({one_line(error)}); set device=auto, or cpu") from error
    return device


def use_bf16(precision: str, device: torch.device) -> bool:
    """Whether to compute in bf16: as told, or for ``auto`` where the hardware has it."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # torch has no public name for this; where a build lacks the private one, float32 is the safe answer
    return torch.backends.mkldnn.is_available() and bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())


def repeatable() -> None:
    """Let a GPU give the same bits for the same inputs: gradients of attention and convolutions are otherwise summed in any order."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Nothing here reads memory that it has not written
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = True


def out_of_memory(error: Exception) -> str | None:
    """What is said, in one line, when memory has run out on a GPU or the CPU; None for any other error."""
    what = str(error).partition("\n")[0][:160] or type(error).__name__  # Python's own MemoryError says nothing
    full = isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in what
    )
    return what if full else None


@contextmanager
def must_fit(advice: str) -> Iterator[None]:
    """Turns memory that runs out inside the block into a UserError that begins with ``advice``."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if what := out_of_memory(error):
            raise UserError(f"{advice} ({what})") from error
        raise


def usable_cores() -> int:
    """CPU cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    return len(affinity(0)) if affinity else os.cpu_count() or 1
