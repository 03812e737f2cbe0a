"""Loading open_clip's models and tokenizers: by name with weights, from a `local-dir:`, or from the `hf-hub:`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from manifests import UserError, find_file, one_line
from manifests.files.archive import is_torchscript, read_tensors
from manifests.files.weights import files_fingerprint
from manifests.recipe import nearest

from .open_clip_config import NAME, read_config

LOCAL, HUB = "local-dir:", "hf-hub:"
RANDOM = "random"  # as weights: for trying out and measuring, without a file
_IN_ARCHIVES = ("input_resolution", "context_length", "vocab_size")  # numbers beside the weights in OpenAI's files
_OF_THE_HUB = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")  # the weights, best first


def load_open_clip(name: str, weights: str | None) -> tuple[Any, Any, dict[str, Any]]:
    """(model, tokenizer, what decides the function beside the weights) of `teacher.model` and `teacher.weights`.

    With random weights there is no tokenizer, which may be a download.
    Raises UserError for unknown names, missing or unreadable weights, and a config that would run code.
    """
    architecture: Any = name
    vocabulary: str | None = None
    if name.startswith(LOCAL):
        folder = find_file(name.removeprefix(LOCAL), "teacher.model")
        model, tokenizer, architecture, vocabulary = _from_folder(folder)
    elif name.startswith(HUB):
        model, tokenizer = _from_hub(name)
    else:
        model, tokenizer = _by_name(name, weights)
    model.eval()
    return model, tokenizer, {"model": architecture, "quick_gelu": _has_quick_gelu(model), "tokenizer": vocabulary}


def embed_dim(architecture: str | Mapping[str, Any]) -> int:
    """Width of the features that images and texts share, of a model's name or `model_cfg`."""
    import open_clip

    config: Any = open_clip.get_model_config(architecture) if isinstance(architecture, str) else architecture
    return int(config["embed_dim"])


def pretrained_tags(name: str) -> list[str]:
    """The tags of weights that open_clip downloads for a model; none for an unknown one."""
    import open_clip

    return list(open_clip.list_pretrained_tags_by_model(name))


def _has_quick_gelu(model: nn.Module) -> bool:
    """The same weights are another function with the other activation, and the model's name does not tell which."""
    return any(type(module).__name__ == "QuickGELU" for module in model.modules())


def _from_folder(folder: Path) -> tuple[Any, Any, dict[str, Any], str | None]:
    """(model, tokenizer, model_cfg, fingerprint of its own vocabulary) of open_clip's ``local-dir:`` layout."""
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")) and not any(folder.glob("*.p*t*")):
        raise UserError(f"teacher.model: {folder}: holds no weights (open_clip_model.safetensors)")
    config = read_config(folder)
    vocabulary = folder / "bpe.txt.gz"
    options, own = (
        ({"bpe_path": str(vocabulary)}, files_fingerprint([vocabulary])) if vocabulary.exists() else ({}, None)
    )
    return *_create(f"{LOCAL}{folder}", None, tokenizer=options), config, own


def _from_hub(name: str) -> tuple[Any, Any]:
    """A model of the Hub through the folder of one revision, whose config is checked before open_clip reads it."""
    from huggingface_hub import hf_hub_download

    repository = name.removeprefix(HUB)
    try:
        folder = Path(hf_hub_download(repository, NAME)).parent
        for file in _OF_THE_HUB:  # folder.name: the revision
            try:
                hf_hub_download(repository, file, revision=folder.name)
                break
            except Exception:
                if file == _OF_THE_HUB[-1]:
                    raise
    except Exception as error:  # whatever the Hub and the network raise
        raise UserError(f"teacher.model: cannot fetch {name}: {one_line(error, 300)}") from error
    text = read_config(folder, hugging_face=True)["text_cfg"]
    if "hf_tokenizer_name" not in text:
        return _create(f"{LOCAL}{folder}", None)
    model, _ = _create(f"{LOCAL}{folder}", RANDOM)  # without open_clip's choice of a tokenizer
    return model, _hugging_face_tokenizer(name, text)


def _hugging_face_tokenizer(name: str, text: Mapping[str, Any]) -> Any:
    from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH, HFTokenizer

    options = {
        "context_length": text.get("context_length", DEFAULT_CONTEXT_LENGTH),
        **(text.get("tokenizer_kwargs") or {}),
    }
    try:
        return HFTokenizer(text["hf_tokenizer_name"], **options, trust_remote_code=False)
    except Exception as error:  # whatever transformers or a download raises
        raise UserError(f"teacher.model: {name}: cannot load its tokenizer: {one_line(error, 300)}") from error


def _by_name(name: str, weights: str | None) -> tuple[Any, Any]:
    """(model, tokenizer) of a name that open_clip knows, with a pretrained tag, a file, or random weights."""
    import open_clip

    if name not in open_clip.list_models():
        raise UserError(f"teacher.model: open_clip knows no model {name!r}{nearest(name, open_clip.list_models())}")
    if weights is None:
        raise UserError("teacher.weights: name a checkpoint file or a pretrained tag such as openai")
    if weights == RANDOM:
        return _create(name, RANDOM)
    if weights in pretrained_tags(name):
        # open_clip itself would only warn of the wrong activation
        quick = bool(open_clip.get_pretrained_cfg(name, weights).get("quick_gelu"))
        return _create(name, weights, force_quick_gelu=quick)
    path = find_file(weights, "teacher.weights")
    if not is_torchscript(path):
        return _create(name, str(path), force_preprocess_cfg=_normalisation(name))
    # these are OpenAI's own files; its models use QuickGELU throughout
    model, tokenizer = _create(name, None, force_quick_gelu=True)
    state = {name: value for name, value in read_tensors(path).items() if name not in _IN_ARCHIVES}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"teacher.weights: {path}: does not fit {name}: {one_line(error)}") from error
    return model, tokenizer


def _normalisation(name: str) -> dict[str, Any] | None:
    """Mean and deviation that all of open_clip's own weights of a model share; None if they differ.

    A file does not say which it was trained with, and open_clip would take OpenAI's.
    """
    import open_clip

    configs = [open_clip.get_pretrained_cfg(name, tag) for tag in pretrained_tags(name)]
    found = {
        (tuple(config["mean"]), tuple(config["std"])) for config in configs if config.get("mean") and config.get("std")
    }
    return dict(zip(("mean", "std"), found.pop(), strict=True)) if len(found) == 1 else None


def _create(
    name: str, weights: str | None, *, tokenizer: Mapping[str, Any] | None = None, **options: Any
) -> tuple[Any, Any]:
    """open_clip's model (options: of its `create_model`) and tokenizer; no tokenizer with random weights.

    Raises UserError for whatever open_clip or a download raises.
    """
    import open_clip

    before = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)  # open_clip logs every step of loading to the root logger
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = open_clip.create_model(name, pretrained=None if weights == RANDOM else weights, **options)
        return model, None if weights == RANDOM else open_clip.get_tokenizer(name, **(tokenizer or {}))
    except Exception as error:
        raise UserError(f"teacher: cannot load {name} with weights {weights}: {one_line(error, 300)}") from error
    finally:
        logging.getLogger().setLevel(before)
