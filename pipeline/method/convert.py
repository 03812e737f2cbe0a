"""Published VQGAN checkpoints as safetensors: weights only, whatever else the file holds."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save

from manifests import Store, UserError, load_weights

PARTS = ("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv.")
CODEBOOK = "quantize.embedding.weight"


def convert_vqgan(source: Path, target: Path) -> tuple[int, int]:
    """Write the VQGAN's tensors of a checkpoint to a safetensors file; returns (tensors kept, left out).

    It knows every layout that loading knows. Nothing in the checkpoint is run: callbacks and settings are passed over,
    and the loss network is left out. Raises UserError when the file is no checkpoint or holds no VQGAN.
    """
    if target.suffix != ".safetensors":
        raise UserError(f"{target}: name the output OUT.safetensors")
    tensors = load_weights(source, [CODEBOOK])
    kept = {name: tensor.contiguous() for name, tensor in tensors.items() if name.startswith(PARTS)}
    if CODEBOOK not in kept:
        raise UserError(f"{source}: holds no VQGAN (no {CODEBOOK} among its {len(tensors)} tensors)")
    Store(target.parent).write(target.name, save(kept))
    return len(kept), len(tensors) - len(kept)
