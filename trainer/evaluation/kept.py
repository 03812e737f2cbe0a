"""The file of a student's scores, which holds until its weights or the image sets change."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from manifests.devices import choose_device, must_fit, use_bf16
from manifests.recipe import fingerprint

from ..checkpoint import BEST, StudentDir
from .score import Score, evaluate
from .sets import image_set, set_in, sets_below

RESULTS = "eval.json"


def evaluate_run(directory: StudentDir, data: str | Path, device: str = "auto") -> dict[str, Score]:
    """Score the best checkpoint of a student on every set in the folder ``data``, local or a URL.

    The scores stay in eval.json until the weights or the sets change.
    """
    info = directory.info()
    found = [
        (f"{name}/{file}", size, version)
        for name in sets_below(data)
        for file, size, version in image_set(set_in(data, name), info.classes).stamps()
    ]
    weights = directory.store.sha256(BEST)
    made_from = fingerprint([weights, found])
    kept = directory.path / RESULTS
    if kept.exists() and (scores := scores_from_json(kept.read_bytes(), made_from=made_from)) is not None:
        return scores
    where = choose_device(device)
    bf16, threads = use_bf16(info.recipe["precision"], where), info.recipe["workers"]  # as in training
    student, label = directory.load_student(), directory.path.name
    with must_fit(
        "the student does not fit into memory to be scored; free some, or leave out the GPU with CUDA_VISIBLE_DEVICES="
    ):
        scores = evaluate(
            student.to(where), data, info.classes, info.side, where, bf16=bf16, threads=threads, label=label
        )
    directory.store.write(RESULTS, scores_to_json(scores, made_from=made_from, weights=weights).encode())
    return scores


def scores_to_json(scores: Mapping[str, Score], *, made_from: str, weights: str) -> str:
    """``made_from``: fingerprint of the weights and the sets that were scored. ``weights``: sha256 of the weights."""
    tree = {
        "made_from": made_from,
        "weights": weights,
        "scores": {name: asdict(score) for name, score in scores.items()},
    }
    return json.dumps(tree, indent=2) + "\n"


def scores_from_json(text: bytes, **expected: str) -> dict[str, Score] | None:
    """The scores, or None, which asks for another measurement: unreadable, or made from other weights or sets."""
    try:
        tree = json.loads(text)
        return (
            {name: Score(**score) for name, score in tree["scores"].items()}
            if expected.items() <= tree.items()
            else None
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
