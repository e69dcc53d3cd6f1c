"""Skeletons on images: a person's left in warm colours, their right in cool ones, what belongs to neither in green.

Drawn twice as large on a transparent layer of each person's own, which is then made smaller and laid over the image:
edges are smooth, and pixels without a limb stay as they were.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from cyclekd.integrations.tokenpose.errors import PoseError
from cyclekd.integrations.tokenpose.skeletons import Skeleton

Color = tuple[int, int, int]
Point = tuple[float, float]

LEFT, RIGHT, MIDDLE = ((255, 94, 58), (255, 196, 61)), ((45, 108, 255), (64, 224, 255)), ((88, 214, 120),) * 2
"""First and last limb of each family; those between them are shades between these."""

EDGE, JOINT = (16, 18, 24, 150), (255, 255, 255, 255)
SUPERSAMPLING = 2
WIDTH_PER_HEIGHT, THINNEST = 1 / 66, 1.6
"""A limb's width over the extent of the person, and what it is at least, in pixels."""

BACKGROUND, GAP = (255, 255, 255), 6


def draw_poses(
    image: np.ndarray, keypoints: np.ndarray, scores: np.ndarray, skeleton: Skeleton, *, threshold: float = 0.3
) -> np.ndarray:
    """A copy of the image, uint8 [H, W, 3], with people's key points [N, K, 2] in its pixels and their limbs.

    Key points whose score [N, K] is below `threshold` are left out with the limbs that end there, and so are NaN and
    what lies further outside than the image is large. Larger people have thicker limbs, and are drawn first.
    Errors: PoseError for other shapes, or a skeleton with another K.
    """
    people = _people(image, keypoints, scores, skeleton, threshold)
    canvas = Image.fromarray(image)
    for person in sorted(people, key=_extent, reverse=True):
        _draw_person(canvas, person, skeleton)
    return np.array(canvas)


def contact_sheet(images: Sequence[np.ndarray], columns: int, *, side: int = 320) -> np.ndarray:
    """Images, uint8 [H, W, 3] of any sizes, in rows of `columns`, as one such image `columns` x `side` pixels wide.

    Those of a row are made equally high, so that together they fill it, up to 1.5 `side`. Errors: PoseError for no
    image, or less than one column.
    """
    if not len(images) or columns < 1:
        raise PoseError(f"contact_sheet({len(images)} images, columns={columns}) needs at least one of both")
    rows = [_row(images[start : start + columns], columns, side) for start in range(0, len(images), columns)]
    height = GAP + sum(row[0].height + GAP for row in rows)
    sheet, top = Image.new("RGB", (columns * side, height), BACKGROUND), GAP
    for row in rows:
        left = GAP
        for each in row:
            sheet.paste(each, (left, top))
            left += each.width + GAP
        top += row[0].height + GAP
    return np.array(sheet)


class _Stroke(NamedTuple):
    start: Point
    end: Point
    color: Color


def _people(
    image: np.ndarray, keypoints: np.ndarray, scores: np.ndarray, skeleton: Skeleton, threshold: float
) -> list[dict[int, Point]]:
    """For each person with any, the key points to draw, by index."""
    keypoints, scores = np.asarray(keypoints, float), np.asarray(scores, float)
    count = len(skeleton.names)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise PoseError(
            f"draw_poses takes an image uint8 [H, W, 3], and got {image.dtype} {list(image.shape)}: load_image gives "
            "one"
        )
    if keypoints.ndim != 3 or keypoints.shape[1:] != (count, 2) or scores.shape != keypoints.shape[:2]:
        raise PoseError(
            f"draw_poses takes keypoints [N, {count}, 2] and scores [N, {count}] for this skeleton, and got "
            f"{list(keypoints.shape)} and {list(scores.shape)}: one person alone is keypoints[None], and another "
            "number of key points needs its own skeleton"
        )
    size = np.array(image.shape[1::-1])
    near = ((keypoints >= -size) & (keypoints <= 2 * size)).all(-1)  # false for NaN
    shown = near & (scores >= threshold)
    people = [
        {index: (float(x), float(y)) for index, (x, y) in enumerate(person) if seen[index]}
        for person, seen in zip(keypoints, shown, strict=True)
    ]
    return [person for person in people if person]


def _draw_person(canvas: Image.Image, person: dict[int, Point], skeleton: Skeleton) -> None:
    width = max(THINNEST, WIDTH_PER_HEIGHT * _extent(person))
    xs, ys = zip(*person.values(), strict=True)
    margin = math.ceil(2 * width) + 1
    left, top = max(math.floor(min(xs)) - margin, 0), max(math.floor(min(ys)) - margin, 0)
    right, bottom = min(math.ceil(max(xs)) + margin, canvas.width), min(math.ceil(max(ys)) + margin, canvas.height)
    if left >= right or top >= bottom:
        return  # wholly outside
    # 0.5: a coordinate is that of a pixel's centre, and Pillow counts from edges
    points = {
        index: ((x + 0.5 - left) * SUPERSAMPLING, (y + 0.5 - top) * SUPERSAMPLING) for index, (x, y) in person.items()
    }
    layer = Image.new("RGBA", ((right - left) * SUPERSAMPLING, (bottom - top) * SUPERSAMPLING))
    _draw_strokes(ImageDraw.Draw(layer), points, skeleton, width * SUPERSAMPLING)
    layer = layer.reduce(SUPERSAMPLING)  # premultiplies by itself, so that edges do not darken
    canvas.paste(layer, (left, top), layer)


def _draw_strokes(draw: ImageDraw.ImageDraw, points: dict[int, Point], skeleton: Skeleton, width: float) -> None:
    colors = _limb_colors(skeleton)
    strokes = [_Stroke(points[a], points[b], colors[a, b]) for a, b in skeleton.limbs if a in points and b in points]
    edge = 0.3 * width
    for stroke in strokes:
        _line(draw, stroke, width + 2 * edge, EDGE)
    for point in points.values():
        _dot(draw, point, 0.85 * width + edge, EDGE)
    for stroke in strokes:
        _line(draw, stroke, width, (*stroke.color, 255))
    joints = _joint_colors(skeleton)
    for index, point in points.items():
        _dot(draw, point, 0.85 * width, JOINT)
        _dot(draw, point, 0.55 * width, (*joints[index], 255))


def _line(draw: ImageDraw.ImageDraw, stroke: _Stroke, width: float, color: tuple[int, ...]) -> None:
    """A polygon, since Pillow's own thick lines have whole pixels for a width; dots cover its ends."""
    (x, y), (u, v) = stroke.start, stroke.end
    length = math.hypot(u - x, v - y)
    if length > 0:
        dx, dy = -(v - y) / length * width / 2, (u - x) / length * width / 2
        draw.polygon([(x + dx, y + dy), (u + dx, v + dy), (u - dx, v - dy), (x - dx, y - dy)], fill=color)


def _dot(draw: ImageDraw.ImageDraw, center: Point, radius: float, color: tuple[int, ...]) -> None:
    x, y = center
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)


def _extent(person: dict[int, Point]) -> float:
    xs, ys = zip(*person.values(), strict=True)
    return math.hypot(max(xs) - min(xs), max(ys) - min(ys))


def _family(skeleton: Skeleton, *keypoints: int) -> tuple[Color, Color]:
    """Warm for the left alone, or the left and the middle; cool likewise; else green."""
    sides = {side for pair in skeleton.flip_pairs for side, index in enumerate(pair) if index in keypoints}
    if len(sides) != 1:
        return MIDDLE
    return RIGHT if 1 in sides else LEFT


def _limb_colors(skeleton: Skeleton) -> dict[tuple[int, int], Color]:
    families = {limb: _family(skeleton, *limb) for limb in skeleton.limbs}
    colors: dict[tuple[int, int], Color] = {}
    for family in (LEFT, RIGHT, MIDDLE):
        limbs = [limb for limb, own in families.items() if own == family]
        colors |= {limb: _shade(family, rank / max(len(limbs) - 1, 1)) for rank, limb in enumerate(limbs)}
    return colors


def _joint_colors(skeleton: Skeleton) -> list[Color]:
    """That of the first limb of its own side which ends there, so that a joint goes with its arm or leg."""
    limbs, colors = _limb_colors(skeleton), []
    for index in range(len(skeleton.names)):
        family = _family(skeleton, index)
        own = [color for limb, color in limbs.items() if index in limb and _family(skeleton, *limb) == family]
        colors.append(own[0] if own else family[0])
    return colors


def _shade(family: tuple[Color, Color], share: float) -> Color:
    red, green, blue = (round(first + share * (last - first)) for first, last in zip(*family, strict=True))
    return red, green, blue


def _row(images: Sequence[np.ndarray], columns: int, side: int) -> list[Image.Image]:
    """The images at the height at which they fill a row."""
    aspects = [image.shape[1] / image.shape[0] for image in images]
    height = max(1, int(min((columns * side - GAP * (len(images) + 1)) / sum(aspects), 1.5 * side)))
    sizes = [(max(1, int(height * aspect)), height) for aspect in aspects]
    pairs = zip(images, sizes, strict=True)
    return [Image.fromarray(image).resize(size, Image.Resampling.LANCZOS) for image, size in pairs]
