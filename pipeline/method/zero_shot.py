"""The zero-shot head: class names and prompt templates as a linear classifier's weights, computed once and kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from manifests import Store, UserError
from manifests.files.cache import cache_folder
from manifests.files.weights import tensors_sha256
from manifests.notes import note
from manifests.progress import progress
from manifests.recipe import fingerprint

WORTH_KEEPING = 5000  # prompts; fewer are embedded anew every time


def zero_shot_head(model: nn.Module, tokenizer: Any, classes: Sequence[str], templates: Sequence[str]) -> torch.Tensor:
    """Mean text embedding of each class over all templates, as unit vectors: [D, classes] (CLIP, sec. 3.1.4)."""
    device = next(model.parameters()).device
    columns = []
    with (
        torch.no_grad(),
        progress(
            len(classes), "embedding class names", "class", hidden=len(classes) * len(templates) < WORTH_KEEPING
        ) as bar,
    ):
        for name in classes:
            tokens = tokenizer([template.format(name) for template in templates]).to(device)
            embedded = F.normalize(model.encode_text(tokens).float(), dim=1).mean(0)  # type: ignore[operator]
            columns.append(F.normalize(embedded, dim=0))
            bar.update()
    return torch.stack(columns, dim=1)


def cached_head(
    model: nn.Module, tokenizer: Any, classes: Sequence[str], templates: Sequence[str], function: Mapping[str, Any]
) -> torch.Tensor:
    """`zero_shot_head`, kept in the user's cache folder (XDG_CACHE_HOME) by a fingerprint of all that it is made from.

    function: what, beside the weights, makes the model and the tokenizer the functions that they are; JSON values.
    """
    if len(classes) * len(templates) < WORTH_KEEPING:
        return zero_shot_head(model, tokenizer, classes, templates).cpu()
    name = f"{fingerprint([_text_weights(model), list(classes), list(templates), function])}.safetensors"
    if (kept := _kept_head(name)) is not None:
        return kept
    head = zero_shot_head(model, tokenizer, classes, templates).cpu()
    try:
        tensors = {"head": head.contiguous()}
        data = save(tensors, metadata={"sha256": tensors_sha256(tensors)})
        Store(cache_folder("heads")).write(name, data)
    except (OSError, UserError) as error:
        note(f"the embedded class names are not kept for the next time ({error}); DAD_CACHE may name a folder")
    return head


def _kept_head(name: str) -> torch.Tensor | None:
    """The kept head; None if it is missing, out of reach, or damaged: one flipped bit could name every image alike."""
    try:
        with safe_open(cache_folder("heads") / name, "pt") as file:
            tensors = {"head": file.get_tensor("head")}
            written = (file.metadata() or {}).get("sha256")
    except (OSError, UserError, SafetensorError, KeyError):
        return None
    return tensors["head"] if written == tensors_sha256(tensors) else None


def _text_weights(model: nn.Module) -> str:
    return tensors_sha256({name: value for name, value in model.state_dict().items() if not name.startswith("visual.")})
