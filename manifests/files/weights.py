"""Reading model weights from files that may come from anywhere: tensors only, nothing is unpickled into code."""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError, one_line
from ..notes import note
from ..recipe import find_file

if TYPE_CHECKING:
    import torch  # else where it is needed: a command line that reads no weights need not wait for it

# where training scripts keep the weights in a checkpoint, the first that is there counts; the rest are averages
WRAPPERS = ("state_dict", "model", "model_state_dict", "state_dict_ema", "model_ema", "ema_state_dict")
PREFIXES = ("module.", "_orig_mod.", "model.", "first_stage_model.")  # DDP, torch.compile, Lightning, latent diffusion
_ALWAYS = ("module.", "_orig_mod.")  # no model of its own has a part of this name
PART = "#"  # FILE#state_dict_ema: another part of a checkpoint


def find_weights(name: str, field: str) -> Path:
    """A checkpoint that a recipe names, perhaps with the part to take (``FILE#state_dict_ema``).

    Raises UserError naming the field.
    """
    file, mark, part = name.rpartition(PART)
    if not mark or Path(name).expanduser().exists():
        return find_file(name, field)
    found = find_file(file, field)
    return found.with_name(f"{found.name}{PART}{part}")


def load_weights(path: Path, like: Collection[str] = ()) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file or a torch checkpoint, on the CPU; nothing in it is run.

    path: may end in ``#PART``, see `find_weights`. like: the target's names, which tell what prefixes to take off.
    A note says what was taken where the file holds other weights, such as an average, too.
    Raises UserError for a file that is neither, or whose tensors cannot be read without running it.
    """
    from .archive import named_tensors  # not at the top, as torch

    part = None
    if not path.exists() and PART in path.name:
        name, _, part = path.name.rpartition(PART)
        path = path.with_name(name)
    tree = _read(path)
    parts = [name for name in WRAPPERS if isinstance(tree, Mapping) and isinstance(tree.get(name), Mapping)]
    if part is not None and part not in parts:
        raise UserError(f"{path}{PART}{part}: holds no such weights; it has {', '.join(parts) or 'one set alone'}")
    if parts:
        taken = part or parts[0]
        if others := [name for name in parts if name != taken]:
            note(f"{path}: the weights of {taken} are taken; {others[0]} is there too: {path.name}{PART}{others[0]}")
        tree = tree[taken]
    tensors = dict(named_tensors(tree)) if isinstance(tree, Mapping) else {}
    if not tensors:
        raise UserError(f"{path}: expected a state dict of tensors")
    return _without_prefixes(tensors, like)


def _without_prefixes(tensors: dict[str, torch.Tensor], like: Collection[str]) -> dict[str, torch.Tensor]:
    """Take off a known prefix if more names are then the target's; tensors that lack the prefix are left out."""
    wanted = set(like)
    while True:
        for prefix in PREFIXES:
            inner = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            everywhere = (
                bool(inner) and len(inner) == len(tensors) and prefix in _ALWAYS and not wanted & tensors.keys()
            )
            if everywhere or len(wanted & inner.keys()) > len(wanted & tensors.keys()):
                tensors = inner
                break
        else:
            return tensors


def _read(path: Path) -> Any:
    """The tree of a file, as it was saved; objects that are no tensors stand in it as inert shells."""
    import torch
    from safetensors.torch import load_file

    from .archive import is_torchscript, read_root

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if is_torchscript(path):
            return read_root(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if zipfile.is_zipfile(path):
            return read_root(path)
        if path.read_bytes()[:1] != b"\x80":  # neither a zip nor a pickle: an error page, a pointer file
            raise UserError(f"{path}: not a readable checkpoint") from error
        raise UserError(
            f"{path}: holds more than tensors (pickled code) in torch's old format; it is not loaded. Where you trust "
            "it, save its state_dict alone with a torch since 1.6"
        ) from error
    except UserError:
        raise
    except Exception as error:  # torch and safetensors raise whatever their parsers stumble over
        raise UserError(f"{path}: not a readable checkpoint ({one_line(error)})") from error


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
