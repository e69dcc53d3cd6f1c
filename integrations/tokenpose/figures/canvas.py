"""The picture that synthetic figures are drawn on: background, figures, what is before them, and the light.

Every polygon is drawn twice, in its colour and as the label of its part: what is seen at a key point is read from the
labels, which are never smoothed.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from cyclekd.integrations.tokenpose.figures.parts import PARTS, Figure
from cyclekd.integrations.tokenpose.figures.shapes import CIRCLE, capsule, rgb
from cyclekd.integrations.tokenpose.shapes import Size

OVERSAMPLING = 2
NEAREST = Image.Resampling.NEAREST


class Canvas:
    """The picture at twice its size, and a map of which part of which figure is seen at each of its pixels."""

    def __init__(self, background: Image.Image) -> None:
        self.size = (background.height, background.width)
        self.image = background.resize((background.width * OVERSAMPLING, background.height * OVERSAMPLING), NEAREST)
        self.map = Image.new("L", self.image.size)
        self.draw, self.map_draw = ImageDraw.Draw(self.image), ImageDraw.Draw(self.map)

    def polygon(self, points: np.ndarray, colour: tuple[int, ...], label: int) -> None:
        """`points` [n, 2] in image pixels; `label` 0 is no figure."""
        corners = self.to_canvas(points).ravel().tolist()
        self.draw.polygon(corners, fill=colour)
        self.map_draw.polygon(corners, fill=label)

    def to_canvas(self, points: np.ndarray) -> np.ndarray:
        """A pixel of the image is the mean of 2 x 2 of the canvas, so its centre lies half a pixel further on there."""
        return np.rint(points * OVERSAMPLING + (OVERSAMPLING - 1) / 2).astype(int)


def label_of(person: int, part: str) -> int:
    """Never 0, which is no figure; the parts of 8 figures fit into a byte."""
    return 1 + person * len(PARTS) + PARTS.index(part)


def draw_figure(canvas: Canvas, figure: Figure, person: int) -> None:
    """Its parts, the nearest ones last."""
    for part in figure.parts:
        for polygon, colour in part.layers:
            canvas.polygon(polygon, colour, label_of(person, part.name))


def gradient(rng: np.random.Generator, size: Size) -> Image.Image:
    """A background between four random colours in the corners."""
    corners = rng.integers(0, 256, (2, 2, 3), dtype=np.uint8)
    return Image.fromarray(corners).resize(size[::-1], Image.Resampling.BILINEAR)


def draw_surroundings(canvas: Canvas, rng: np.random.Generator, figures: list[Figure]) -> None:
    """At times stripes, then things in any colour and limb-like strokes in those of the figures."""
    extent = np.array(canvas.size[::-1])
    if rng.random() < 0.35:
        _draw_stripes(canvas, rng)
    for _ in range(rng.integers(3, 10)):
        _draw_thing(
            canvas, rng, rng.uniform(0, 1, 2) * extent, rng.uniform(0.05, 0.4) * extent.min(), rng.uniform(0, 255, 3)
        )
    for _ in range(rng.integers(0, 7)):
        colours = list(figures[rng.integers(len(figures))].colours.values())
        start = rng.uniform(0, 1, 2) * extent
        end = start + rng.normal(0, 0.16, 2) * extent.min()
        radii = rng.uniform(0.01, 0.04, 2) * extent.min()
        canvas.polygon(capsule(start, end, *radii), rgb(colours[rng.integers(len(colours))]), 0)


def _draw_stripes(canvas: Canvas, rng: np.random.Generator) -> None:
    extent = np.array(canvas.size[::-1])
    angle, width, colour = rng.uniform(0, np.pi), rng.uniform(0.02, 0.08) * extent.max(), rgb(rng.uniform(0, 255, 3))
    along = np.array([np.cos(angle), np.sin(angle)])
    across = np.array([-along[1], along[0]])
    reach = extent.max()
    for offset in np.arange(-reach, reach, 2 * width):
        middle = extent / 2 + across * offset
        corners = [middle + a * along * reach + b * across * width / 2 for a, b in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
        canvas.polygon(np.array(corners), colour, 0)


def _draw_thing(
    canvas: Canvas, rng: np.random.Generator, centre: np.ndarray, size_px: float, colour: np.ndarray
) -> None:
    """A turned ellipse or rectangle."""
    angle, radii = rng.uniform(0, np.pi), size_px * np.array([1, rng.uniform(0.3, 1)]) / 2
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    shape = CIRCLE if rng.random() < 0.5 else np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
    canvas.polygon(centre + shape * radii @ turn, rgb(colour), 0)


def draw_occluder(canvas: Canvas, rng: np.random.Generator, figure: Figure) -> None:
    """A thing before a figure, at one of its key points."""
    centre = figure.keypoints[rng.integers(len(figure.keypoints))] + rng.normal(0, 0.04, 2) * figure.height
    _draw_thing(canvas, rng, centre, rng.uniform(0.12, 0.32) * figure.height, rng.uniform(0, 255, 3))


def expose(canvas: Canvas, rng: np.random.Generator) -> np.ndarray:
    """The picture at its size, uint8 [height, width, 3], with a light of its own, contrast and noise."""
    gain, offset = rng.uniform(0.7, 1.2) * rng.uniform(0.92, 1.08, 3), rng.uniform(-10, 15)
    table = np.clip(np.arange(256) * gain[:, None] + offset, 0, 255).astype(np.uint8)
    pixels = np.asarray(canvas.image.reduce(OVERSAMPLING).point(table.ravel().tolist())).astype(np.int16)
    noise = rng.standard_normal(canvas.size, dtype=np.float32) * np.float32(rng.uniform(1, 8))
    # repeated, as adding [height, width, 1] takes several times as long
    pixels += noise.astype(np.int16).repeat(3).reshape(pixels.shape)
    return np.clip(pixels, 0, 255).astype(np.uint8)
