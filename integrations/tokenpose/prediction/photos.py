"""Photographs as arrays, whether they come as files, Pillow images or arrays.

Files are turned upright, as their camera noted it, so that boxes and key points are those of the picture that a viewer
shows.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from cyclekd.integrations.tokenpose.errors import PoseError

ImageSource = str | Path | Image.Image | np.ndarray


def load_image(source: ImageSource) -> np.ndarray:
    """uint8 [H, W, 3], RGB, turned upright. Errors: PoseError for files that are no image, and other arrays."""
    if isinstance(source, np.ndarray):
        return _as_rgb(source)
    try:
        if isinstance(source, Image.Image):
            return _upright(source)
        with Image.open(source) as opened:
            return _upright(opened)
    # Pillow has no class of its own for what is wrong in a file
    except (OSError, SyntaxError, ValueError, TypeError, Image.DecompressionBombError) as error:
        raise PoseError(f"{name_of(source)} cannot be read as an image: {first_line(error)}") from error


def name_of(source: ImageSource) -> str:
    """What an error calls this image."""
    return str(source) if isinstance(source, str | Path) else "this image"


def first_line(error: Exception) -> str:
    """What went wrong, in one line."""
    said = getattr(error, "strerror", None) or str(error).strip()
    return next(iter(said.splitlines()), type(error).__name__)


def _as_rgb(array: np.ndarray) -> np.ndarray:
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels not in (1, 3, 4) or not array.size:
        raise PoseError(
            f"an image is an array uint8 [H, W, 3], and this one is {array.dtype} {list(array.shape)}: values from 0 "
            "to 1 become (255 * image).astype('uint8'), and channels go last"
        )
    if channels == 3:
        return np.ascontiguousarray(array)
    return np.array(Image.fromarray(array.reshape(array.shape[:2]) if channels == 1 else array).convert("RGB"))


def _upright(image: Image.Image) -> np.ndarray:
    return np.array(ImageOps.exif_transpose(image).convert("RGB"))
