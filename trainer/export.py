"""Export: a student as a folder for timm and the Hugging Face hub, with a model card, and as ONNX."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save
from torch import nn

from manifests import Store, UserError
from manifests.recipe import fingerprint

from .checkpoint import BEST, StudentDir, StudentInfo
from .evaluation.kept import RESULTS, scores_from_json
from .evaluation.score import Score
from .methods import title_of
from .student import Student, fixed_size, weights_of

# the Hugging Face hub expects these names
CONFIG, WEIGHTS, CARD, ONNX = "config.json", "model.safetensors", "README.md", "model.onnx"
OPSET = 18


def export(run: StudentDir, out: str, *, onnx: bool = False) -> list[str]:
    """Write a student's best weights to a directory for ``timm.create_model("local-dir:OUT")``.

    Returns the names of the files. Raises UserError when the run has no finished epoch, when the directory holds other
    files of these names, or when ONNX is asked for and not installed.
    """
    info, student, store = run.info(), run.load_student(), Store(out)
    made_from = {"made_from": fingerprint([info.identity, info.shards])}  # timm ignores this field
    _refuse_foreign(store, made_from)
    files = {
        CONFIG: (json.dumps(timm_config(info, student.model) | made_from, indent=2) + "\n").encode(),
        WEIGHTS: save(weights_of(student.model), metadata={"format": "pt"}),
    }
    if onnx:
        files[ONNX] = to_onnx(student, info.side)
    # last, so that a directory with a card is complete
    files[CARD] = model_card(info, read_scores(run), onnx=onnx).encode()
    for name, data in files.items():
        store.write(name, data)
    return list(files)


def _refuse_foreign(store: Store, made_from: dict[str, str]) -> None:
    taken = [name for name in (CONFIG, WEIGHTS, CARD, ONNX) if store.exists(name)]
    if not taken:
        return
    try:
        config = json.loads(store.read(CONFIG))
        own = isinstance(config, dict) and config.items() >= made_from.items()
    except (FileNotFoundError, ValueError):
        own = False
    if not own:
        raise UserError(
            f"{store.where(taken[0])}: was not exported from this student by this version; choose an empty folder"
        )


def timm_config(info: StudentInfo, model: nn.Module) -> dict[str, Any]:
    """``config.json`` in timm's format: architecture, class names and preprocessing."""
    source: dict[str, Any] = dict(model.pretrained_cfg)  # type: ignore[arg-type]
    preprocessing = {
        "input_size": [3, info.side, info.side],
        "fixed_input_size": fixed_size(info.student),
        "mean": info.mean,
        "std": info.std,
        "interpolation": "bicubic",  # with the next two: as `shards.canvas.load_canvas` does
        "crop_pct": 1.0,
        "crop_mode": "center",
        "num_classes": len(info.classes),
        "classifier": source.get("classifier"),
        "first_conv": source.get("first_conv"),
    }
    config = {
        "architecture": info.student.split(".")[0],
        "num_classes": len(info.classes),
        "num_features": model.num_features,
        "label_names": info.classes,
        "pretrained_cfg": preprocessing,
    }
    return config | ({"model_args": {"img_size": info.side}} if fixed_size(info.student) else {})


def to_onnx(student: Student, side: int) -> bytes:
    """The student as ONNX: ``images`` float32 [B, 3, side, side] in [0, 1] -> ``logits`` [B, classes], any B.

    The normalisation is inside. Raises UserError when ONNX is not installed.
    """
    try:
        import onnxscript  # noqa: F401  # torch's exporter fails late without it, in many lines
    except ImportError as error:
        raise UserError("--onnx: onnxscript is not installed; pip install '.[onnx]', or leave out --onnx") from error
    images = torch.rand(2, 3, side, side)
    batch = torch.export.Dim("batch", min=1)
    program = torch.onnx.export(
        student.eval(),
        (images,),
        dynamo=True,
        opset_version=OPSET,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes={"images": {0: batch}},
        verbose=False,
    )
    data: bytes = program.model_proto.SerializeToString()  # type: ignore[union-attr]
    return data


def read_scores(run: StudentDir) -> dict[str, Score]:
    """Scores of these very weights; empty when ``make eval`` has not measured them."""
    if not run.store.exists(RESULTS):
        return {}
    return scores_from_json(run.store.read(RESULTS), weights=run.store.sha256(BEST)) or {}


def model_card(info: StudentInfo, scores: dict[str, Score], *, onnx: bool) -> str:
    """README.md in the hub's format: what the student is, its scores, how to load it, its recipe."""
    front = {"library_name": "timm", "pipeline_tag": "image-classification", "tags": ["image-classification", "timm"]}
    rows = [f"| {name} | {score.top1:.1f} ± {score.error:.1f} | {score.images:,} |" for name, score in scores.items()]
    numbers = ["Not evaluated yet (`make eval`)."]
    if rows:
        numbers = ["| image set | top-1 (%) ± binomial standard error | images |", "|---|---|---|", *rows]
    loading = [
        "```python",
        "import timm",
        "",
        "# after an upload: hf-hub:USER/NAME",
        'model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()',
        "transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))",
        "```",
    ]
    if onnx:
        shape = f"[B, 3, {info.side}, {info.side}]"
        loading += ["", f"`{ONNX}` has the normalisation inside: `images` float32 {shape} in [0, 1] -> `logits`."]
    return "\n".join(
        [
            "---",
            yaml.safe_dump(front, sort_keys=False).rstrip(),
            "---",
            f"# {info.student}, {title_of(info.recipe['method']['name'])}",
            "",
            f"{len(info.classes)} classes, {info.side} x {info.side} pixels, trained on shards {info.shards}. "
            "Shards and method: [Discrete Adversarial Distillation, NeurIPS 2023](https://arxiv.org/abs/2311.01441).",
            "",
            "## Numbers",
            *numbers,
            "",
            "## Use",
            *loading,
            "",
            "## Recipe",
            "```yaml",
            yaml.safe_dump({name: _public(value) for name, value in info.identity.items()}, sort_keys=False).rstrip(),
            "```",
            "",
        ]
    )


def _public(value: Any) -> Any:
    """Shorten an absolute path to its last part: a card names no folders of this machine."""
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
