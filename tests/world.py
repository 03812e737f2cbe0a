"""A small world for stage 1: a CLIP that open_clip loads, a VQGAN of taming's blocks, labelled images, a recipe.

Nothing here is a mock: the weights are random, the code that loads and runs them is the project's.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from safetensors.torch import save_file

SIDE = 32  # pixels, of images and canvas
CLASSES = ("wolf", "ant", "pine tree", "bus", "clock")  # on purpose not in the order of their folders' names
FOLDERS = ("n09", "n01", "n05", "n02", "n07")
TEMPLATES = ("a photo of a {}.", "art of the {}.")
BROKEN = 17  # of the 36 source images: cut off in the middle
WRONG = (2, 9, 20, 30)  # labelled with a class that the teacher does not see


@dataclass(frozen=True)
class World:
    """The paths of one small, complete set of inputs, and its recipe."""

    folder: Path
    clip: Path  # open_clip's local-dir layout, with prompts.yaml: the class list
    vqgan: Path
    tars: Path  # 3 WebDataset tars of 12 samples
    images: Path  # the same as an ImageFolder
    recipe: Path
    labels: dict[str, int]  # by key, of all 36

    def load(self, *overrides: str):  # type: ignore[no-untyped-def]
        """The recipe, with overrides."""
        from pipeline.recipe import load

        return load(str(self.recipe), overrides)


def build_world(folder: Path) -> World:
    """Teacher, discretizer, sources and recipe. Most labels are such that the teacher verifies the attack."""
    pictures = draw_pictures(36)
    jpegs = [jpeg(picture) for picture in pictures]
    clip, vqgan = folder / "clip", folder / "vqgan.safetensors"
    write_vqgan(vqgan, pictures)
    write_clip(clip, vqgan, pictures)
    labels = settle_labels(clip, vqgan, jpegs)
    named = {sample_key(label, n): label for n, label in enumerate(labels)}
    jpegs[BROKEN] = jpegs[BROKEN][: len(jpegs[BROKEN]) // 2]
    tars, images = folder / "tars", folder / "images"
    tars.mkdir()
    samples = list(zip(named, jpegs, strict=True))
    for number in range(3):
        members = [
            (f"{key}.{extension}", data)
            for key, image in samples[12 * number : 12 * number + 12]
            for extension, data in (("jpg", image), ("cls", str(named[key]).encode()))
        ]
        write_tar(tars / f"source-{number}.tar", members)
    for key, data in samples:
        (images / key).parent.mkdir(parents=True, exist_ok=True)
        (images / f"{key}.jpg").write_bytes(data)
    recipe = folder / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(recipe_tree(tars, clip, vqgan), sort_keys=False))
    return World(
        folder, clip, vqgan, tars, images, recipe, {key.replace("/", "-"): label for key, label in named.items()}
    )


def recipe_tree(data: Path, clip: Path, vqgan: Path) -> dict[str, object]:
    """A recipe that makes 3 shards in a second."""
    return {
        "source": {"data": str(data), "classes": str(clip / "prompts.yaml"), "shard_size": 12},
        "teacher": {"kind": "open_clip", "model": f"local-dir:{clip}"},
        "discretizer": {"kind": "vqgan", "weights": str(vqgan), "config": VQGAN_CONFIG},
        "attack": RECIPE_ATTACK,
        "output": {"image": RECIPE_IMAGE, "codes": True, "attacked_loss": True},
        "canvas": SIDE,
        "batch": 5,
        "precision": "fp32",
        "seed": RECIPE_SEED,
        "max_errors": 0.1,
        "device": "cpu",
        "threads": 1,
    }


RECIPE_ATTACK = {"norm": "l2", "eps": 1.0, "alpha": 1.0, "steps": 1, "random_start": 0.8}
RECIPE_IMAGE = {"format": "jpg", "quality": 95}
RECIPE_SEED = 3
VQGAN_CONFIG = {
    "ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [16], "resolution": 32,
    "z_channels": 4, "embed_dim": 3, "n_embed": 64,
}  # fmt: skip


def draw_pictures(count: int) -> torch.Tensor:
    """Smooth random colour fields, uint8 [count, 3, 32, 32]."""
    generator = torch.Generator().manual_seed(5)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    smooth = F.interpolate(coarse, size=(SIDE, SIDE), mode="bicubic", align_corners=False)
    return (smooth.clamp(0, 1) * 255).round().to(torch.uint8)


def jpeg(image: torch.Tensor) -> bytes:
    """uint8 [3, H, W] -> JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=97, subsampling=0)
    return buffer.getvalue()


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> None:
    """A plain tar by the standard library, as other people's tools make them."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_vqgan(path: Path, pictures: torch.Tensor) -> None:
    """A VQGAN with random blocks. Its codebook holds latents of the pictures: different images get different codes."""
    from pipeline.method.discretizer import VQGAN, VQGANConfig

    torch.manual_seed(1)
    vqgan = VQGAN(VQGANConfig(**VQGAN_CONFIG)).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        vqgan.decoder.conv_out.weight *= 4
        latents = vqgan.latents(pictures.float() / 255).permute(0, 2, 3, 1).reshape(-1, VQGAN_CONFIG["embed_dim"])
        vqgan.codebook.copy_(latents[torch.randperm(len(latents))[: VQGAN_CONFIG["n_embed"]]])
    save_file(vqgan.state_dict(), path)


def write_clip(folder: Path, vqgan: Path, pictures: torch.Tensor, seed: int = 2) -> None:
    """A CLIP of one-block towers with random weights, in the layout of open_clip's ``local-dir:``.

    Random towers see everything alike. Moving the biases of their last layer norms until features have mean zero lets
    all five classes occur.
    """
    import open_clip

    config = {
        "model_cfg": {
            "embed_dim": 16,
            "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
            "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
        },
        "preprocess_cfg": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]},
    }
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    prompts = {"classes": list(CLASSES), "folders": list(FOLDERS), "templates": list(TEMPLATES)}
    (folder / "prompts.yaml").write_text(yaml.safe_dump(prompts, sort_keys=False))
    torch.manual_seed(seed)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False).eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(
        [template.format(name) for name in CLASSES for template in TEMPLATES]
    )
    ends = tokens.argmax(1)  # where the end-of-text token is: its feature is the sentence's
    seen: dict[str, torch.Tensor] = {}
    model.visual.ln_post.register_forward_hook(
        lambda _m, _i, out: seen.update(image=out if out.ndim == 2 else out[:, 0])
    )
    model.ln_final.register_forward_hook(lambda _m, _i, out: seen.update(text=out[torch.arange(len(out)), ends]))
    mean, std = (torch.tensor(config["preprocess_cfg"][name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        model.encode_image((discretize(vqgan, pictures) - mean) / std)
        model.encode_text(tokens)
        model.visual.ln_post.bias -= seen["image"].mean(0)
        model.ln_final.bias -= seen["text"].mean(0)
    save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )


def discretize(vqgan: Path, pictures: torch.Tensor) -> torch.Tensor:
    """Q of uint8 pictures: float [B, 3, H, W] in [0, 1]."""
    from pipeline.method.discretizer import VQGANConfig, load_discretizer

    with torch.no_grad():
        images: torch.Tensor = load_discretizer(VQGANConfig(**VQGAN_CONFIG), str(vqgan))(pictures.float() / 255)[0]  # type: ignore[arg-type]
    return images


def settle_labels(clip: Path, vqgan: Path, jpegs: Sequence[bytes]) -> list[int]:
    """For each image the label whose attack is verified most clearly; for the `WRONG` ones the one verified least.

    A random VQGAN is not idempotent: what the teacher sees on Q(x) does not tell what it sees on x''. So all labels are
    tried.
    """
    from pipeline.method.attack import AttackSettings, attack, draw_noise
    from pipeline.method.discretizer import VQGANConfig, load_discretizer
    from pipeline.method.teacher import Teacher, load_teacher
    from shards import ImageFormat, decode_image, encode_image
    from shards.canvas import load_canvas
    from shards.codec import to_float, to_uint8
    from shards.sources.classes import load_classes

    stored = ImageFormat(**RECIPE_IMAGE)  # type: ignore[arg-type]
    teacher = load_teacher(Teacher(kind="open_clip", model=f"local-dir:{clip}"), load_classes(clip / "prompts.yaml"))
    vqgan_model = load_discretizer(VQGANConfig(**VQGAN_CONFIG), str(vqgan))  # type: ignore[arg-type]
    settings = AttackSettings(**RECIPE_ATTACK)  # type: ignore[arg-type]
    x = to_float(torch.stack([decode_image(encode_image(load_canvas(data, SIDE), stored)) for data in jpegs]))
    margins = []
    for label in range(len(CLASSES)):
        y = torch.full((len(x),), label)
        noise = draw_noise(
            [sample_key(label, n).replace("/", "-") for n in range(len(x))], x.shape[1:], settings, RECIPE_SEED
        )
        made = to_uint8(attack(x, y, teacher, vqgan_model, settings, noise).adversarial)
        with torch.no_grad():
            logits = teacher(to_float(torch.stack([decode_image(encode_image(image, stored)) for image in made])))
        others = logits.clone()
        others[:, label] = -torch.inf
        margins.append(logits[:, label] - others.amax(1))
    best, worst = torch.stack(margins).argmax(0).tolist(), torch.stack(margins).argmin(0).tolist()
    return [worst[n] if n in WRONG else label for n, label in enumerate(best)]


def sample_key(label: int, number: int) -> str:
    """Name of a source sample without its extension; the same in the tars and in the ImageFolder."""
    return f"{FOLDERS[label]}/img_{number:03d}"


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every tar and Parquet file below a folder, by relative name."""
    files = [path for path in sorted(folder.rglob("*")) if path.suffix in (".tar", ".parquet")]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
