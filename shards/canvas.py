"""From the bytes of any image file to the canvas: uint8 [3, S, S], shorter side resized to S, then centre-cropped."""

from __future__ import annotations

import io
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from manifests.errors import one_line

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "ppm", "bmp", "tif", "tiff", "gif")
FORMATS = ("JPEG", "PNG", "WEBP", "PPM", "BMP", "TIFF", "GIF")  # no others: PIL's EPS runs Ghostscript
MAX_PIXELS = 256 << 20  # of a source image; a larger one would need gigabytes to decode
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # PIL raises beyond twice this, before decoding
# PIL's remarks on odd metadata would tear the progress bar, once an image. Here and not around each image: threads share the filters.
warnings.filterwarnings("ignore", module=r"PIL\.")


class BadImage(Exception):
    """A source image that cannot be used; the message says why and ends up in the manifest."""


def load_canvas(data: bytes, side: int) -> torch.Tensor:
    """Decode, orient by EXIF, convert to RGB (transparent pixels on white), resize bicubically and crop: uint8 [3, side, side].

    Raises BadImage.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            picture.draft("RGB", (2 * side, 2 * side))  # JPEG only: decode at a fraction when far larger than needed
            image = _to_rgb(ImageOps.exif_transpose(picture))
    except UnidentifiedImageError as error:  # whose own text holds an address in memory: two runs would differ
        raise BadImage(
            f"unreadable image: no {', '.join(FORMATS[:-1])} or {FORMATS[-1]}, or its header is damaged"
        ) from error
    except Exception as error:  # decoders raise whatever damaged data leads them to
        raise BadImage(f"unreadable image: {one_line(error)}") from error
    width, height = image.size
    if min(width, height) < 2:
        raise BadImage(f"image of {width} x {height} pixels")
    shorter = min(width, height)
    left, top = (
        (width - shorter) / 2,
        (height - shorter) / 2,
    )  # the centre square, before scaling: a long thin image stays small
    if (width, height) != (side, side):
        image = image.resize((side, side), Image.Resampling.BICUBIC, box=(left, top, left + shorter, top + shorter))
    pixels = np.array(image)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _to_rgb(image: Image.Image) -> Image.Image:
    if (
        image.mode.startswith("I") or image.mode == "F"
    ):  # 16-bit and float: PIL's own conversion clips instead of scaling
        values = np.asarray(image, dtype=np.float64)
        if not np.isfinite(values).all():
            raise ValueError("some of its pixels are no finite numbers")
        top = 65535.0 if image.mode.startswith("I;16") or values.max() > 255 else 255.0
        if image.mode == "F" and values.max() <= 1:
            top = 1.0
        return Image.fromarray((values / top * 255).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")
