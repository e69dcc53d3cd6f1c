"""The shapes of a drawn figure as polygons: capsules, and hulls around discs.

A contour is no line of its own: it is the rim of a larger, darker polygon under the one in the shape's colour.
"""

from __future__ import annotations

import numpy as np

TURNS = np.linspace(0, 2 * np.pi, 24, endpoint=False)
CIRCLE = np.stack((np.cos(TURNS), np.sin(TURNS)), 1)
HALF_TURNS = np.linspace(-np.pi / 2, np.pi / 2, 9)
HALF_CIRCLE = np.stack((np.cos(HALF_TURNS), np.sin(HALF_TURNS)), 1)


def capsule_layers(
    start: np.ndarray, end: np.ndarray, start_radius: float, end_radius: float, colour: np.ndarray
) -> list[tuple[np.ndarray, tuple[int, ...]]]:
    """A limb with its contour; of points in space, what the viewer sees."""
    return [
        (capsule(start[:2], end[:2], start_radius + margin, end_radius + margin), shade)
        for margin, shade in outlined(colour)
    ]


def outlined(colour: np.ndarray) -> list[tuple[float, tuple[int, ...]]]:
    """(margin in heights of the body, colour): a darker line around, which tells limbs of one colour apart."""
    return [(0.005, rgb(colour * 0.55)), (0.0, rgb(colour))]


def capsule(start: np.ndarray, end: np.ndarray, start_radius: float, end_radius: float) -> np.ndarray:
    """[18, 2]: two half circles and the lines between them."""
    along = end - start
    distance = np.hypot(*along)
    along = along / distance if distance > 1e-9 else np.array([1.0, 0.0])
    turn = np.stack((along, (-along[1], along[0])))
    return np.concatenate((end + end_radius * HALF_CIRCLE @ turn, start - start_radius * HALF_CIRCLE @ turn))


def hull(discs: list[tuple[np.ndarray, float]], margin: float) -> np.ndarray:
    """[24, 2]: around all discs, each direction's point on the disc that reaches farthest there."""
    centres, radii = np.array([centre[:2] for centre, _ in discs]), np.array([radius for _, radius in discs])
    farthest = (centres @ CIRCLE.T + radii[:, None]).argmax(0)
    return centres[farthest] + (radii[farthest, None] + margin) * CIRCLE


def rgb(colour: np.ndarray) -> tuple[int, ...]:
    """As whole numbers from 0 to 255."""
    return tuple(int(min(max(value, 0), 255)) for value in colour)
