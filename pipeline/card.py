"""The dataset card of a run directory, in the Hugging Face format."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc
import yaml

from manifests import RunInfo
from manifests.rows import TarRecord
from manifests.rundir import GALLERY


def dataset_card(info: RunInfo, table: pa.Table, tars: list[TarRecord]) -> str:
    """Markdown with a YAML header: what the set is, how it was made, how to read it, what its attack did."""
    counts = info.counts or {}
    kept = counts.get("verified", 0)
    judged = max(counts.get("verified", 0) + counts.get("rejected", 0), 1)
    verified = table.filter(pc.equal(table.column("status"), "verified"))
    header = {
        "task_categories": ["image-classification"],
        "tags": ["knowledge-distillation", "robustness", "adversarial", "webdataset"],
        "size_categories": [_size_category(info.samples)],
        "configs": [{"config_name": name, "data_files": f"{name}/*.tar"} for name in ("clean", "dad")],
    }
    size = {name: sum(tar.size for tar in tars if tar.name.startswith(name)) for name in ("clean", "dad")}
    extension = info.recipe["output"]["image"]["format"]
    recipe = yaml.safe_dump(info.recipe, sort_keys=False).strip()
    prints = "\n".join(f"| {name} | `{value}` |" for name, value in info.fingerprints.items())
    versions = ", ".join(f"{name} {version}" for name, version in info.versions.items())
    return f"""---
{yaml.safe_dump(header, sort_keys=False).strip()}
---
# Discrete adversarial images with a teacher's soft labels

![clean, discretized, adversarial and difference]({GALLERY})

The source had {info.samples:,} labelled images of {len(info.classes)} classes. Each was attacked against a teacher,
discretized by a VQGAN, and kept only if the teacher still classifies it correctly (Discrete Adversarial Distillation,
NeurIPS 2023).

| | samples | bytes |
|---|---|---|
| `clean/` images, labels, teacher logits | {table.num_rows - counts.get("error", 0):,} | {size["clean"]:,} |
| `dad/` verified adversarial images, labels, teacher logits | {kept:,} ({kept / judged:.1%}) | {size["dad"]:,} |
| rejected by the teacher (in the manifest only) | {counts.get("rejected", 0):,} | |
| unusable source samples (in the manifest, with the reason) | {counts.get("error", 0):,} | |

Verified images: mean teacher loss {_mean(verified, "loss_clean")} on the clean image,
{_mean(verified, "loss_attacked")} after the attack,
{_mean(verified, "loss_dad")} after discretization.{_codes(verified)}

## Reading it
```python
from shards import ShardDataset

dataset = ShardDataset("path/to/this/folder", "dad")  # or "clean"
sample = dataset[0]  # .key .image (uint8 [3, H, W]) .label .logits (float16 [classes])
```
The tars are plain WebDataset: members `KEY.{extension}`, `KEY.cls` (ASCII integer), `KEY.logits.npy` (float16;
with views, one row for each crop in `KEY.views.npy`; with top-k, `KEY.topk.npy` instead).
`manifest.parquet` has one row per source sample and the size and sha256 of every tar.
Logits are stored, not probabilities: choose the temperature when training.

## How it was made
| fingerprint of | |
|---|---|
{prints}

```yaml
{recipe}
```
Made with {versions}.

The images derive from the source images and stand under the source's licence.
"""


def _codes(table: pa.Table) -> str:
    """A sentence on changed codes; empty for a discretizer without codes."""
    if pc.mean(table.column("codes_changed")).as_py() is None:
        return ""
    return (
        f" x″ differs from Q(x) in {_mean(table, 'codes_changed')} of the codes;\n"
        "this does not measure the attack: Q is not idempotent, and Q(Q(x)) differs from Q(x) even without one."
    )


def _mean(table: pa.Table, column: str) -> str:
    value = pc.mean(table.column(column)).as_py()
    return "n/a" if value is None else f"{value:.3f}"


def _size_category(samples: int) -> str:
    bounds = [
        (1_000, "n<1K"),
        (10_000, "1K<n<10K"),
        (100_000, "10K<n<100K"),
        (1_000_000, "100K<n<1M"),
        (10_000_000, "1M<n<10M"),
    ]
    return next((name for bound, name in bounds if samples < bound), "10M<n<100M")
