"""Build and read the raw drawings of the demo: one RGBA glyph per (style, class), in one tar.

``python -m pipeline.renditions glyphs`` fetches the icon packages with ``npm pack``, renders each SVG with
resvg (extra ``[assets]``) and writes ``assets/glyphs.tar`` and ``assets/NOTICE``. Users need not run it, because the
tar is committed.
"""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .styles import CLASSES, PACKAGES, STYLES

ASSETS = Path(__file__).parent / "assets"
GLYPH_SIZE = 64  # pixels; equal to the canvas, so that a glyph at scale 1 is not resampled up


def load_glyphs(path: Path = ASSETS / "glyphs.tar") -> dict[str, dict[int, torch.Tensor]]:
    """Read the glyph tar.

    Returns ``{style: {class index: uint8 RGBA tensor [4, 64, 64], straight alpha}}``. A style lacks the classes
    that its set does not draw.
    """
    index = {name: i for i, name in enumerate(CLASSES)}
    glyphs: dict[str, dict[int, torch.Tensor]] = {style: {} for style in STYLES}
    with tarfile.open(path) as tar:
        for member in tar:
            style, name = member.name.removesuffix(".png").split("/")
            data = tar.extractfile(member)
            assert data is not None
            rgba = np.array(Image.open(io.BytesIO(data.read())).convert("RGBA"))
            glyphs[style][index[name]] = torch.from_numpy(rgba).permute(2, 0, 1).contiguous()
    return glyphs


def build_glyphs(out: Path = ASSETS) -> dict[str, int]:
    """Fetch the packages of `PACKAGES` and render every class of every style; returns {style: number of glyphs}."""
    counts = {}
    notice = [
        "The glyphs in glyphs.tar were rendered at 64x64 pixels from the emoji sets below, unchanged otherwise.",
        "Images composed from them (data/renditions) are derived works under the same licences; those of the",
        "share-alike sets (openmoji, emojione-v1) must be shared under CC BY-SA 4.0.",
        "",
    ]
    with tempfile.TemporaryDirectory() as tmp, tarfile.open(out / "glyphs.tar", "w") as tar:
        for style in STYLES:
            package = _npm_pack(PACKAGES[style], Path(tmp))
            icons, info = package["icons"], package["info"]
            notice.append(
                f"{style}: {info['name']} by {info['author']['name']} ({info['author']['url']}), "
                f"{info['license']['title']} <{info['license']['url']}>; from npm {PACKAGES[style]}"
            )
            drawn = [name for name in CLASSES if (svg := _svg(icons, style, name)) and _add(tar, style, name, svg)]
            counts[style] = len(drawn)
    (out / "NOTICE").write_text("\n".join(notice) + "\n")
    return counts


def _npm_pack(spec: str, folder: Path) -> dict[str, Any]:
    done = subprocess.run(["npm", "pack", "--silent", spec], cwd=folder, check=True, capture_output=True, text=True)
    with tarfile.open(folder / done.stdout.strip()) as tar:
        return {part: json.load(tar.extractfile(f"package/{part}.json")) for part in ("icons", "info")}  # type: ignore[arg-type]


def _svg(icons: dict[str, Any], style: str, name: str) -> str | None:
    """The SVG of one icon of an iconify set, or of its plain alias; None when the set lacks it."""
    if style == "fxemoji":  # only this set drops the hyphens of its names
        name = name.replace("-", "")
    alias = icons.get("aliases", {}).get(name, {})
    if set(alias) - {"parent"}:
        return None  # a flipped or rotated alias is another drawing
    icon = icons["icons"].get(alias.get("parent", name))
    if icon is None:
        return None
    left, top = icon.get("left", 0), icon.get("top", 0)
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    body = icon["body"].replace("currentColor", "#000")
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{body}</svg>'
    )


def _add(tar: tarfile.TarFile, style: str, name: str, svg: str) -> bool:
    import resvg_py  # extra [assets]; only needed to rebuild the committed tar

    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=GLYPH_SIZE, height=GLYPH_SIZE, skip_system_fonts=True))
    image = Image.open(io.BytesIO(png)).convert("RGBA").resize((GLYPH_SIZE, GLYPH_SIZE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    member = tarfile.TarInfo(f"{style}/{name}.png")
    member.size = buffer.tell()
    tar.addfile(member, io.BytesIO(buffer.getvalue()))
    return True
