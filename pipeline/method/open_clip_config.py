"""Which settings of an `open_clip_config.json` are taken: those that shape open_clip's own towers.

The file may come with a stranger's model. open_clip hands `tokenizer_kwargs` to transformers as they are, where
`trust_remote_code` runs Python from the folder, and lets transformers resolve names of text towers and tokenizers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from manifests import UserError, one_line
from manifests.recipe import nearest

NAME = "open_clip_config.json"
_SHARED = {
    "width", "layers", "mlp_ratio", "ls_init_value", "output_tokens", "pool_type", "final_ln_after_pool",
    "act_kwargs", "norm_kwargs", "block_type", "qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner",
    "scale_attn", "scale_fc",
}  # fmt: skip
_VISION = _SHARED | {
    "head_width", "patch_size", "image_size", "patch_dropout", "attentional_pool", "attn_pooler_queries",
    "attn_pooler_heads", "no_ln_pre", "pos_embed_type",
    "timm_model_name", "timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias", "timm_drop",
    "timm_drop_path",
}  # fmt: skip
_TEXT = _SHARED | {
    "context_length", "vocab_size", "heads", "embed_cls", "pad_id", "eos_id", "no_causal_mask", "proj_bias",
    "proj_type",
    "tokenizer_kwargs",
}  # fmt: skip
_HUGGING_FACE = {"hf_tokenizer_name", "hf_model_name", "hf_model_pretrained", "hf_proj_type", "hf_pooler_type"}
_MULTIMODAL = _TEXT - {"tokenizer_kwargs"} | {"dim_head", "n_queries", "attn_pooler_heads"}
_MODEL = {
    "embed_dim", "vision_cfg", "text_cfg", "multimodal_cfg", "quick_gelu", "custom_text",
    "init_logit_scale", "init_logit_bias", "nonscalar_logit_scale",
}  # fmt: skip
_KEYWORDS = {
    "tokenizer_kwargs": {"clean", "strip_sep_token"},
    "act_kwargs": {"approximate", "inplace"},
    "norm_kwargs": {"eps"},
}


def read_config(folder: Path, *, hugging_face: bool = False) -> dict[str, Any]:
    """The `model_cfg` of a folder's open_clip_config.json, after checking every setting.

    hugging_face: allow a tokenizer or text tower of transformers, if open_clip's own models use one of that name.
    Raises UserError for a file that is missing or damaged, and for a setting that is not known to be harmless.
    """
    path = folder / NAME
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"teacher.model: {path}: cannot be read ({one_line(error)})") from error
    model = tree.get("model_cfg") if isinstance(tree, dict) else None
    if not isinstance(model, dict):
        raise UserError(f"teacher.model: {path}: describes no model of open_clip (no model_cfg)")
    _check(model, _MODEL, f"{path}: model_cfg")
    text = _TEXT | (_HUGGING_FACE if hugging_face else set())
    for part, known in (("vision_cfg", _VISION), ("text_cfg", text), ("multimodal_cfg", _MULTIMODAL)):
        if part in model:
            _check_part(model[part], known, f"{path}: {part}")
    return model


def _check_part(part: Any, known: Set[str], where: str) -> None:
    if not isinstance(part, dict):
        raise UserError(f"teacher.model: {where} must be a mapping")
    _check(part, known, where)
    for keywords, allowed in _KEYWORDS.items():
        if part.get(keywords) is not None:
            if not isinstance(part[keywords], dict):
                raise UserError(f"teacher.model: {where}.{keywords} must be a mapping")
            _check(part[keywords], allowed, f"{where}.{keywords}")
    if (name := part.get("timm_model_name")) is not None:
        import timm

        if not isinstance(name, str) or set(name) & set(":/\\") or not timm.is_model(name):
            raise UserError(
                f"teacher.model: {where}.timm_model_name: timm knows no model {name!r}; name one of its own"
            )
    for key in ("hf_tokenizer_name", "hf_model_name"):
        if part.get(key) and part[key] not in _known_names():
            raise UserError(
                f"teacher.model: {where}.{key}: {part[key]!r} is used by none of open_clip's own models, "
                "and may be a stranger's; it is not loaded"
            )


def _check(settings: Mapping[str, Any], known: Set[str], where: str) -> None:
    for name, value in settings.items():
        if name in known:
            continue
        if name in _HUGGING_FACE | {"tokenizer_mode"} or name == "trust_remote_code":
            mend = "name the model by open_clip's own name, with teacher.weights=FILE"
            raise UserError(f"teacher.model: {where}.{name}: {value!r} may run code of the model's maker; {mend}")
        raise UserError(f"teacher.model: {where}.{name} is not taken from a file{nearest(name, sorted(known))}")


def _known_names() -> set[str]:
    """Tokenizers and text towers of transformers that open_clip's own, installed configurations name."""
    import open_clip

    parts = [(open_clip.get_model_config(name) or {}).get("text_cfg", {}) for name in open_clip.list_models()]
    return {part[key] for part in parts for key in ("hf_tokenizer_name", "hf_model_name") if part.get(key)}
