"""Photographs as arrays, whether they come as files, Pillow images or arrays.

Files are turned upright, as their camera noted it, so that boxes and key points are those of the picture that a viewer
shows.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from cyclekd.integrations.tokenpose.errors import PoseError

ImageSource = str | Path | Image.Image | np.ndarray

READ_AHEAD = min(4, os.cpu_count() or 1)
"""Threads that decode images."""


def load_image(source: ImageSource) -> np.ndarray:
    """uint8 [H, W, 3], RGB, turned upright; of an animation the first picture, and without its transparency.

    Errors: PoseError for files that are no image, those with more than 8 bits for a colour, and other arrays.
    """
    if isinstance(source, np.ndarray):
        return _as_rgb(source)
    try:
        if isinstance(source, Image.Image):
            return _upright(source)
        with Image.open(source) as opened:
            return _upright(opened)
    except Exception as error:  # Pillow has no class of its own for what is wrong in a file
        raise PoseError(f"{name_of(source)} cannot be read as an image: {first_line(error)}") from error


def read_ahead(
    sources: Iterable[ImageSource], on_unreadable: Callable[[ImageSource, PoseError], None]
) -> Iterator[tuple[ImageSource, np.ndarray]]:
    """Sources in order, each with its pixels; a few are always being decoded. `on_unreadable` gets the others."""
    coming, reading = iter(sources), deque[tuple[ImageSource, Future[np.ndarray]]]()
    with ThreadPoolExecutor(READ_AHEAD) as pool:
        while True:
            for source in islice(coming, 2 * READ_AHEAD - len(reading)):
                reading.append((source, pool.submit(load_image, source)))
            if not reading:
                return
            source, future = reading.popleft()
            try:
                pixels = future.result()
            except PoseError as error:
                on_unreadable(source, error)
            else:
                yield source, pixels


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
        return array
    return np.array(Image.fromarray(array.reshape(array.shape[:2]) if channels == 1 else array).convert("RGB"))


def _upright(image: Image.Image) -> np.ndarray:
    if image.mode.startswith(("I", "F")):  # Pillow cuts these off at 255, and a photograph comes out white
        raise ValueError(
            f"it has more than 8 bits per pixel (Pillow's mode {image.mode}), and does not say which value is white: "
            "save it with 8"
        )
    return np.array(ImageOps.exif_transpose(image).convert("RGB"))
