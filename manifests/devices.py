"""Device and number format: where a model computes, whether in bfloat16, and whether it fits the memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .errors import UserError, one_line


def choose_device(name: str) -> torch.device:
    """The device that a recipe names; ``auto`` is the GPU when there is one. Raises UserError when it is not there.

    The GPU becomes torch's current device; if not, torch's thread that pins memory opens a context on GPU 0.
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
    """Whether to compute in bf16: as ``precision`` says; with ``auto``, when the hardware has it."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # torch has no public name for this; if a build lacks the private one, float32 is the safe answer
    return torch.backends.mkldnn.is_available() and bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())


def repeatable() -> None:
    """Make a GPU repeat its bits; by default it sums gradients of attention and convolutions in any order."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # saves time: no code here reads memory that it has not written
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = True


def out_of_memory(error: Exception) -> str | None:
    """The error in one line if memory has run out on a GPU or the CPU; None for any other error."""
    what = str(error).partition("\n")[0][:160] or type(error).__name__  # Python's own MemoryError has no text
    full = isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in what
    )
    return what if full else None


@contextmanager
def must_fit(advice: str) -> Iterator[None]:
    """Raise UserError, beginning with ``advice``, when memory runs out inside the block."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if what := out_of_memory(error):
            raise UserError(f"{advice} ({what})") from error
        raise


def usable_cores() -> int:
    """Number of CPU cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # macOS has none
    return len(affinity(0)) if affinity else os.cpu_count() or 1
