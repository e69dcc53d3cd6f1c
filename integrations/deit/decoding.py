"""From an opened image to RGB pixels, and the one error for files that cannot be.

PIL reads the header when it opens a file and the pixels only when they are asked for, so a truncated file is noticed
late, in the middle of an augmentation. `decode` is the one place where pixels are read: what goes wrong in it is the
file's fault, what goes wrong elsewhere is a bug and stays one.
"""

from __future__ import annotations

import struct
import zlib
from io import BytesIO

import numpy as np
from PIL import Image

# what PIL's readers raise for bytes that are no image, or not all of one
BROKEN = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    LookupError,
    ArithmeticError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class UnreadableImage(Exception):
    """An image that is missing, empty, truncated, no image at all or too large to be one; the message says why."""


def open_image(data: bytes) -> Image.Image:
    """The image in an encoded file's bytes, header read and pixels not."""
    if not data:
        raise UnreadableImage("zero bytes")
    try:
        return Image.open(BytesIO(data))
    except BROKEN as error:
        raise UnreadableImage(reason(error)) from error


def decode(image: Image.Image, at_least: tuple[int, int] | None = None) -> Image.Image:
    """The image as RGB with its pixels loaded; UnreadableImage where they cannot be.

    `at_least` is (width, height): a JPEG larger than that is decoded at 1/2, 1/4 or 1/8 of its size as long as both
    sides stay at least so long, which saves most of the time. Sizes of other formats stay. Alpha is dropped, 16-bit
    grey scaled to 8 bits, and an EXIF rotation not applied; the first and the last as torchvision's loader does.
    """
    try:
        if at_least is not None:
            image.draft("RGB", at_least)  # does something to JPEG only, and only before its pixels are loaded
        image.load()
        return as_rgb(image)
    except BROKEN as error:
        raise UnreadableImage(reason(error)) from error


def as_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # 16-bit grey: PIL's own conversion would clip all above 255 to white
        grey = np.asarray(image).clip(0, 65535) // 257
        image = Image.fromarray(grey.astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours as without, and no warning
    return image.convert("RGB")


def reason(error: Exception) -> str:
    """The first line of PIL's message, without the address of the buffer it read from."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "no image format that PIL knows"
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
