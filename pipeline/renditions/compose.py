"""Compose the demo's image sets from the glyphs: WebDataset tars of JPEG + class index, like those of a user.

Every image has a seed made from its key, so the sets are the same in every order (and on every machine of one kind).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from manifests import Store
from shards import ImageFormat, TarWriter, encode_image, seeded_generator
from shards.codec import to_uint8

from .glyphs import load_glyphs
from .scene import PAPER, TRAIN, V2, Scenes, SceneStyle, draw_scenes, render_scenes
from .styles import CLASSES, CLEAN, RELATED, SEEN, SKETCH_SEEN, SKETCH_UNSEEN, UNSEEN, display_name

TAR_SAMPLES = 500
FORMAT = ImageFormat(format="jpg", quality=95)


@dataclass(frozen=True, kw_only=True)
class SetSpec:
    """One image set: its styles, the number of images of each (style, class) glyph, its scenes."""

    styles: tuple[str, ...]
    repeats: int
    scene: SceneStyle
    about: str


SETS: dict[str, SetSpec] = {
    "train": SetSpec(styles=CLEAN, repeats=20, scene=TRAIN, about="clean styles, the students' training set"),
    "val": SetSpec(styles=CLEAN, repeats=5, scene=TRAIN, about="clean styles, as train"),
    "v2": SetSpec(styles=CLEAN, repeats=5, scene=V2, about="clean styles, other poses and backgrounds"),
    "rendition-seen": SetSpec(
        styles=SEEN, repeats=5, scene=TRAIN, about="styles that the teacher has seen and students have not"
    ),
    "rendition-unseen": SetSpec(styles=UNSEEN, repeats=10, scene=TRAIN, about="styles that neither has seen"),
    "rendition-3d": SetSpec(
        styles=RELATED, repeats=10, scene=TRAIN, about="a 3-D style related to a clean one, seen by neither"
    ),
    "sketch-seen": SetSpec(styles=SKETCH_SEEN, repeats=15, scene=PAPER, about="line art that the teacher has seen"),
    "sketch-unseen": SetSpec(styles=SKETCH_UNSEEN, repeats=15, scene=PAPER, about="line art that neither has seen"),
}
EVALUATION = tuple(name for name in SETS if name != "train")


def compose(out: Path, names: tuple[str, ...] = tuple(SETS)) -> None:
    """Write ``out/SET/SET-000000.tar …`` for every set without a ``done`` file; interrupted sets are made again."""
    glyphs = load_glyphs()
    store = Store(out)
    store.remove_stale_temporaries()
    todo = [name for name in names if not store.exists(f"{name}/done")]
    store.write("classes.json", (json.dumps([display_name(name) for name in CLASSES]) + "\n").encode())
    with tqdm(
        total=sum(len(_members(glyphs, SETS[name])) for name in todo), desc="composing", unit="img", disable=None
    ) as bar:
        for name in todo:
            tar, count = TarWriter(), 0
            for key, label, image in compose_set(name, glyphs):
                tar.add(key, {"jpg": encode_image(image, FORMAT), "cls": str(label).encode()})
                if tar.samples == TAR_SAMPLES:
                    store.write(f"{name}/{name}-{count:06d}.tar", tar.close())
                    tar, count = TarWriter(), count + 1
                bar.update()
            if tar.samples:
                store.write(f"{name}/{name}-{count:06d}.tar", tar.close())
            store.write(f"{name}/done", f"{SETS[name].about}\n".encode())


def compose_set(name: str, glyphs: dict[str, dict[int, torch.Tensor]]) -> Iterator[tuple[str, int, torch.Tensor]]:
    """Compose a set, classes interleaved: (key, class index, uint8 image [3, 64, 64]) of every image."""
    spec = SETS[name]
    members = _members(glyphs, spec)
    for start in range(0, len(members), 256):
        part = members[start : start + 256]
        keys = [f"{name}-{CLASSES[label]}-{style}-{repeat:02d}" for repeat, label, style in part]
        scenes = Scenes.concatenate([draw_scenes(1, spec.scene, seeded_generator("renditions", key)) for key in keys])
        images = to_uint8(render_scenes(torch.stack([glyphs[style][label] for _, label, style in part]), scenes))
        yield from zip(keys, (label for _, label, _ in part), images, strict=True)


def _members(glyphs: dict[str, dict[int, torch.Tensor]], spec: SetSpec) -> list[tuple[int, int, str]]:
    """(repeat, label, style) of every image, in an order that puts all classes and styles into every tar."""
    return [
        (repeat, label, style)
        for repeat in range(spec.repeats)
        for label in range(len(CLASSES))
        for style in spec.styles
        if label in glyphs[style]
    ]
