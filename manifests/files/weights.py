"""Reading model weights from files that may come from anywhere: tensors only, nothing is unpickled into code."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError, one_line

if TYPE_CHECKING:
    import torch  # else where it is needed: a command line that reads no weights need not wait for it

WRAPPERS = ("state_dict", "model", "model_state_dict")  # where training scripts keep the weights in a checkpoint


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file or a torch checkpoint (also below ``state_dict`` or ``model``), on the CPU.

    Raises UserError for a file that is neither, or that holds pickled code.
    """
    import torch
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tree = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if path.read_bytes()[:1] not in (b"P", b"\x80"):  # neither a zip nor a pickle: an error page, a pointer file
            raise UserError(f"{path}: not a readable checkpoint") from error
        raise UserError(
            f"{path}: holds more than tensors (pickled code); it is not loaded. Take its tensors out, without running anything, with "
            f"`python -m pipeline convert-vqgan {path} OUT.safetensors`, or re-save its state_dict alone"
        ) from error
    except Exception as error:  # torch and safetensors raise whatever their parsers stumble over
        raise UserError(f"{path}: not a readable checkpoint ({one_line(error)})") from error
    for name in WRAPPERS:
        if isinstance(tree, dict) and isinstance(tree.get(name), dict):
            tree = tree[name]
            break
    if not isinstance(tree, dict) or not all(isinstance(value, torch.Tensor) for value in tree.values()):
        raise UserError(f"{path}: expected a state dict of tensors")
    if tree and all(name.startswith("module.") for name in tree):  # saved from DistributedDataParallel
        tree = {name.removeprefix("module."): value for name, value in tree.items()}
    return tree


def tensors_sha256(tensors: Mapping[str, torch.Tensor], header: bytes = b"") -> str:
    """sha256 (hex) over ``header``, then the name and the bytes of every tensor in the order of their names."""
    import torch

    digest = hashlib.sha256(header)
    for name, value in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def files_fingerprint(paths: list[Path]) -> str:
    """sha256 (first 16 hex digits) over the contents of files, in the given order."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]
