"""Published VQGAN checkpoints as safetensors: weights only, whatever else the file holds."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save

from manifests import Store, UserError
from manifests.files.archive import read_tensors

PARTS = ("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv.")


def convert_vqgan(source: Path, target: Path) -> tuple[int, int]:
    """Write the VQGAN's tensors of a CompVis/Lightning checkpoint to a safetensors file; returns (tensors kept, left out).

    Nothing in the checkpoint is executed: its callbacks and hyper-parameters are passed over, its loss network is left out.
    Raises UserError when the file is no torch archive or holds no VQGAN.
    """
    if target.suffix != ".safetensors":
        raise UserError(f"{target}: name the output OUT.safetensors")
    tensors = read_tensors(source)
    kept = {name: tensor.contiguous() for name, tensor in tensors.items() if name.startswith(PARTS)}
    if "quantize.embedding.weight" not in kept:
        raise UserError(f"{source}: holds no VQGAN (no quantize.embedding.weight among its {len(tensors)} tensors)")
    Store(target.parent).write(target.name, save(kept))
    return len(kept), len(tensors) - len(kept)
