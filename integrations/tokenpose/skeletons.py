"""The key points of COCO and CrowdPose: names, which are left and right, how exactly people place them, and limbs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Skeleton:
    """A data set's key points, in the order of its annotations."""

    names: tuple[str, ...]
    flip_pairs: tuple[tuple[int, int], ...]
    """(left, right) indices, exchanged in a mirrored image."""
    sigmas: tuple[float, ...]
    """Spread of the annotators' clicks per key point, relative to the square root of the person's area; for OKS."""
    upper_body: tuple[int, ...]
    """What half-body augmentation keeps as the upper half."""
    limbs: tuple[tuple[int, int], ...]
    """Indices joined by a line in a drawing."""


def _sided(*parts: str) -> tuple[str, ...]:
    return tuple(f"{side}_{part}" for part in parts for side in ("left", "right"))


def _twice(*values: float) -> tuple[float, ...]:
    return tuple(value for value in values for _ in range(2))


# fmt: off
COCO = Skeleton(
    names=("nose", *_sided("eye", "ear", "shoulder", "elbow", "wrist", "hip", "knee", "ankle")),
    flip_pairs=tuple((left, left + 1) for left in range(1, 17, 2)),
    sigmas=(0.026, *_twice(0.025, 0.035, 0.079, 0.072, 0.062, 0.107, 0.087, 0.089)),
    upper_body=tuple(range(11)),
    limbs=((15, 13), (13, 11), (16, 14), (14, 12), (11, 12), (5, 11), (6, 12), (5, 6), (5, 7), (6, 8), (7, 9), (8, 10),
           (1, 2), (0, 1), (0, 2), (1, 3), (2, 4), (3, 5), (4, 6)),
)
"""COCO's 17 key points (https://cocodataset.org/#keypoints-eval)."""

CROWDPOSE = Skeleton(
    names=(*_sided("shoulder", "elbow", "wrist", "hip", "knee", "ankle"), "top_head", "neck"),
    flip_pairs=tuple((left, left + 1) for left in range(0, 12, 2)),
    sigmas=(*_twice(0.079, 0.072, 0.062, 0.107, 0.087, 0.089), 0.079, 0.079),
    upper_body=(0, 1, 2, 3, 4, 5, 12, 13),
    limbs=((12, 13), (13, 0), (13, 1), (0, 2), (2, 4), (1, 3), (3, 5), (0, 6), (1, 7), (6, 7), (6, 8), (8, 10), (7, 9),
           (9, 11)),
)
"""CrowdPose's 14 key points (arXiv:1812.00324)."""
# fmt: on
