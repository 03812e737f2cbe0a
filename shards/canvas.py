"""From the bytes of any image file to the canvas: uint8 [3, S, S], the centre square resized to S pixels a side."""

from __future__ import annotations

import io
import warnings

import numpy as np
import torch
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from manifests.errors import one_line

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "ppm", "bmp", "tif", "tiff", "gif")
FORMATS = ("JPEG", "PNG", "WEBP", "PPM", "BMP", "TIFF", "GIF")  # no other formats: PIL's EPS decoder runs Ghostscript
MAX_PIXELS = 256 << 20  # largest source image; decoding a larger one takes gigabytes
ORIENTATION = 0x0112  # EXIF's tag
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PngImagePlugin.MAX_TEXT_CHUNK = 16 << 20  # PIL refuses images with more than 1 MiB of text in one chunk
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # PIL raises beyond twice this, before decoding
# Silence PIL's remarks on odd metadata: they would tear the progress bar once per image. The filter is set here, not
# around each image, because threads share filters.
warnings.filterwarnings("ignore", module=r"PIL\.")


class BadImage(Exception):
    """A source image that cannot be used; the message says why and ends up in the manifest."""


def load_canvas(data: bytes, side: int) -> torch.Tensor:
    """Decode, orient by EXIF, convert to RGB (transparent pixels on white), crop, resize: uint8 [3, side, side].

    The crop is the centre square; resizing is bicubic. Raises BadImage.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            picture.draft("RGB", (2 * side, 2 * side))  # decodes a far larger JPEG at a fraction of its size
            image = _to_rgb(_upright(picture))
    except UnidentifiedImageError as error:  # its own text holds a memory address, which would differ between runs
        raise BadImage(
            f"unreadable image: no {', '.join(FORMATS[:-1])} or {FORMATS[-1]}, or its header is damaged"
        ) from error
    except Exception as error:  # damaged data makes decoders raise almost anything
        raise BadImage(f"unreadable image: {one_line(error)}") from error
    width, height = image.size
    if min(width, height) < 2:
        raise BadImage(f"image of {width} x {height} pixels")
    shorter = min(width, height)
    # crop before scaling: a long thin image would become huge
    left, top = (width - shorter) / 2, (height - shorter) / 2
    if (width, height) != (side, side):
        image = image.resize((side, side), Image.Resampling.BICUBIC, box=(left, top, left + shorter, top + shorter))
    pixels = np.array(image)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _upright(image: Image.Image) -> Image.Image:
    """Turn an image as its EXIF orientation says. Metadata that cannot be read is passed over: pixels count.

    Not `ImageOps.exif_transpose`, which fails where it writes the rest of damaged metadata back.
    """
    image.load()  # first: PIL reads a PNG's pixels with its metadata, and damage to those must show
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # PIL raises almost anything
        return image
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    # PIL's own conversion of 16-bit and float images clips instead of scaling
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        if not np.isfinite(values).all():
            raise ValueError("some of its pixels are not finite")
        top = 65535.0 if image.mode.startswith("I;16") or values.max() > 255 else 255.0
        if image.mode == "F" and values.max() <= 1:
            top = 1.0
        return Image.fromarray((values / top * 255).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")
