"""The demo teacher's CLIP: model config, tokenizer and prompts, in the folder layout of open_clip's ``local-dir:``."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import yaml

from .glyphs import ASSETS
from .styles import CLASSES, display_name

TEACHER_DIR = ASSETS / "teacher"
TEMPLATES = (
    "a {}.",
    "a picture of a {}.",
    "an emoji of a {}.",
    "an icon of the {}.",
    "a drawing of a {}.",
    "a sketch of a {}.",
    "line art of a {}.",
    "a cartoon {}.",
    "a rendition of the {}.",
    "a small {}.",
)
MERGES = 400


def write_clip_dir(folder: Path = TEACHER_DIR) -> None:
    """Write ``open_clip_config.json``, ``bpe.txt.gz`` (open_clip SimpleTokenizer merges) and ``prompts.yaml``."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [display_name(name) for name in CLASSES]
    merges = learn_bpe([t.format(n) for t in TEMPLATES for n in names], MERGES)
    with gzip.GzipFile(folder / "bpe.txt.gz", "wb", mtime=0) as file:
        file.write("\n".join(["#version: renditions", *(" ".join(pair) for pair in merges)]).encode())
    config = {
        "model_cfg": {
            "embed_dim": 256,
            "vision_cfg": {
                "timm_model_name": "resnet10t",
                "timm_model_pretrained": False,
                "timm_pool": "avg",
                "timm_proj": "linear",
                "image_size": 64,
            },
            "text_cfg": {
                "context_length": 24,
                "vocab_size": 512 + len(merges) + 2,  # bytes, bytes at a word's end, merges, start and end of text
                "width": 128,
                "heads": 4,
                "layers": 2,
            },
        },
        "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "interpolation": "bicubic"},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    prompts = {"classes": names, "templates": list(TEMPLATES)}
    (folder / "prompts.yaml").write_text(yaml.safe_dump(prompts, sort_keys=False))


def learn_bpe(sentences: list[str], merges: int) -> list[tuple[str, str]]:
    """Learn a byte-pair encoding: merge the most frequent pair (Sennrich et al., 2016); ties break alphabetically."""
    words = Counter(word for s in sentences for word in s.replace(".", " ").split())
    spelled = {word: (*word[:-1], word[-1] + "</w>") for word in words}
    learned: list[tuple[str, str]] = []
    while len(learned) < merges:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, symbols in spelled.items():
            for pair in pairwise(symbols):
                pairs[pair] += words[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        learned.append(best)
        spelled = {word: _merge(symbols, best) for word, symbols in spelled.items()}
    return learned


def _merge(symbols: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    merged: list[str] = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return tuple(merged)
