"""The posed skeleton in space from which a synthetic figure is drawn.

Lengths are in units of the body's height. Left and right are the body's own and are never mirrored: the view turns the
whole body, so that the image shows its front, back or a side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

SIDES = (("left", 1), ("right", -1))

# shares of the body's height
SHOULDER, HIP, TORSO, NECK, HEAD = 0.118, 0.062, 0.285, 0.05, 0.075  # half widths of the first two; a radius
ARM, LEG = (0.17, 0.15, 0.055), (0.24, 0.24, 0.1)  # upper, lower, hand or foot

# the head as a unit sphere of its own: x to the figure's left, y down, z to the front
FACE_POINTS = {
    "nose": (0.0, 0.2, 1.08),
    "left_eye": (0.4, -0.1, 0.9),
    "right_eye": (-0.4, -0.1, 0.9),
    "left_ear": (1.0, 0.05, -0.05),
    "right_ear": (-1.0, 0.05, -0.05),
}
SEEN_FROM = {"nose": -0.05, "eye": 0.02, "ear": -0.25}
"""How far such a point has to face the viewer, as a cosine; nose and ears stand out."""


@dataclass
class Body:
    """A posed body in units of its height: x to the right of the image, y down, z to the viewer; the pelvis at 0."""

    joints: dict[str, np.ndarray]
    torso: np.ndarray
    """[3, 3]: columns are where its left, down and front point."""
    head_axes: np.ndarray
    """[3, 3]: the same of the head, as long as the half axes of its ellipsoid."""
    widths: float
    facing: dict[str, bool] = field(default_factory=dict)
    """False for key points that their own part hides; a name that is missing counts as True."""


@dataclass(frozen=True)
class Variety:
    """How different bodies are: shares of all of them, then ranges."""

    views: tuple[float, float, float, float]
    """From the front, from behind, its left turned to the viewer, its right."""
    lying: float
    legs: tuple[float, float, float, float]
    """Standing, walking, sitting, each leg on its own."""
    hanging: float
    """Of arms, the others are raised or held out."""
    heads: tuple[float, float]
    """Smallest and largest, in units of `HEAD`."""
    widths: tuple[float, float]
    """Of limbs and torso, the least and the most."""


ANY = Variety(
    views=(0.4, 0.27, 0.165, 0.165),
    lying=0.08,
    legs=(0.4, 0.3, 0.12, 0.18),
    hanging=0.5,
    heads=(0.95, 1.3),
    widths=(0.85, 1.25),
)
CALM = Variety(
    views=(1.0, 0.0, 0.0, 0.0), lying=0.0, legs=(0.6, 0.4, 0.0, 0.0), hanging=0.7, heads=(1.2, 1.5), widths=(1.1, 1.4)
)


def pose(rng: np.random.Generator, variety: Variety = ANY) -> Body:
    """A body that stands, walks, sits or bends each leg on its own, in a random view."""
    view = rng.choice([0.0, 180.0, 90.0, -90.0], p=variety.views) + rng.normal(0, 22)
    tilt = rng.uniform(-90, 90) if rng.random() < variety.lying else rng.normal(0, 12)
    pelvis = _roll(tilt) @ _pitch(rng.normal(0, 8)) @ _yaw(view)
    torso = pelvis @ _pitch(rng.normal(6, 12)) @ _roll(rng.normal(0, 7)) @ _yaw(rng.normal(0, 12))
    head = torso @ _pitch(rng.normal(0, 10)) @ _roll(rng.normal(0, 8)) @ _yaw(rng.normal(0, 22))
    radius = HEAD * rng.uniform(*variety.heads)
    length = {name: rng.normal(1, 0.05) for name in ("shoulder", "hip", "torso", "arm", "leg")}

    neck = torso @ (0, -TORSO * length["torso"], 0)
    joints = {"pelvis": np.zeros(3), "neck": neck, "head": neck + torso @ (0, -NECK, 0) + head @ (0, -radius, 0)}
    legs = _leg_angles(rng, variety)
    for (side, sign), leg in zip(SIDES, legs, strict=True):
        shoulder = neck + torso @ (sign * SHOULDER * length["shoulder"], rng.normal(0, 0.008), 0)
        arm = [torso @ direction for direction in _arm_directions(rng, variety, sign)]
        names = [f"{side}_{name}" for name in ("shoulder", "elbow", "wrist", "fingers")]
        joints |= _chain(names, shoulder, arm, np.array(ARM) * length["arm"])
        hip = pelvis @ (sign * HIP * length["hip"], 0, 0)
        names = [f"{side}_{name}" for name in ("hip", "knee", "ankle", "toes")]
        joints |= _chain(names, hip, [pelvis @ d for d in _leg_directions(*leg, sign)], np.array(LEG) * length["leg"])
    axes = head @ np.diag(radius * np.array([0.8, 1.05, 0.92]))
    body = Body(joints, torso, axes, widths=rng.uniform(*variety.widths))
    _add_face(body)
    return body


def _chain(
    names: Sequence[str], start: np.ndarray, directions: Sequence[np.ndarray], lengths: np.ndarray
) -> dict[str, np.ndarray]:
    """Joints from `start` on, one segment after the other."""
    points = [start]
    for direction, length in zip(directions, lengths, strict=True):
        points.append(points[-1] + direction * length)
    return dict(zip(names, points, strict=True))


def _arm_directions(rng: np.random.Generator, variety: Variety, sign: int) -> list[np.ndarray]:
    """Of upper arm, forearm and hand, in the torso's frame; an elbow bends forwards, inwards or upwards."""
    if rng.random() < variety.hanging:
        outwards, forwards, bend = rng.normal(14, 8), rng.normal(5, 20), rng.uniform(0, 60)
    else:
        outwards, forwards, bend = rng.uniform(-5, 85), rng.uniform(-30, 160), rng.uniform(0, 130)
    upper = _limb_direction(outwards, forwards, sign)
    to = np.array([-sign * rng.uniform(0, 0.8), -rng.uniform(0, 1), 1.0])
    to -= (to @ upper) * upper
    to /= np.linalg.norm(to) + 1e-6
    lower = _along(upper, to, bend)
    return [upper, lower, lower]


def _leg_angles(rng: np.random.Generator, variety: Variety) -> list[tuple[float, float, float]]:
    """(outwards, forwards, bend of the knee) of both legs: standing, walking, sitting, or each leg on its own."""
    kind = rng.choice(4, p=variety.legs)
    stride = rng.choice([-1, 1]) * rng.uniform(10, 38)
    both = rng.uniform(50, 95)
    angles = []
    for sign in (1, -1):
        if kind == 0:
            angles.append((rng.uniform(1, 14), rng.normal(0, 6), abs(rng.normal(0, 8))))
        elif kind == 1:
            bend = rng.uniform(0, 25) if sign * stride > 0 else rng.uniform(5, 60)
            angles.append((rng.uniform(0, 8), sign * stride, bend))
        elif kind == 2:
            angles.append((rng.uniform(2, 30), both + rng.normal(0, 6), both + rng.normal(0, 15)))
        else:
            angles.append((rng.uniform(0, 50), rng.uniform(-20, 80), rng.uniform(0, 110)))
    return angles


def _leg_directions(outwards: float, forwards: float, bend: float, sign: int) -> list[np.ndarray]:
    """Of thigh, shin and foot, in the pelvis's frame."""
    thigh, shin = _limb_direction(outwards, forwards, sign), _limb_direction(outwards, forwards - bend, sign)
    return [thigh, shin, _along(shin, _limb_direction(0, forwards - bend + 90, sign), 78)]


def _limb_direction(outwards: float, forwards: float, sign: int) -> np.ndarray:
    a, f = np.radians((outwards, forwards))
    return np.array([sign * np.sin(a), np.cos(a) * np.cos(f), np.cos(a) * np.sin(f)])


def _along(start: np.ndarray, to: np.ndarray, degrees: float) -> np.ndarray:
    angle = np.radians(degrees)
    direction = np.cos(angle) * start + np.sin(angle) * to
    return direction / np.linalg.norm(direction)


def _add_face(body: Body) -> None:
    """Nose, eyes and ears, and which key points are turned away: hidden by the part that they lie on."""
    viewer = viewer_direction(body)
    for name, point in FACE_POINTS.items():
        body.joints[name] = body.joints["head"] + body.head_axes @ point
        body.facing[name] = bool(np.dot(point, viewer) > SEEN_FROM[name.split("_")[-1]])
    for side, _ in SIDES:
        for name, centre in (("shoulder", "neck"), ("hip", "pelvis")):
            out = body.joints[f"{side}_{name}"] - body.joints[centre]
            body.facing[f"{side}_{name}"] = bool(out[2] > -0.7 * np.linalg.norm(out))


def viewer_direction(body: Body) -> np.ndarray:
    """The viewer's direction on the head's unit sphere: what has a positive product with it is seen."""
    direction = np.linalg.inv(body.head_axes)[:, 2]
    return direction / np.linalg.norm(direction)


def _yaw(degrees: float) -> np.ndarray:
    """The front goes to the right of the image."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])


def _pitch(degrees: float) -> np.ndarray:
    """The top goes to the front."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[1, 0, 0], [0, c, s], [0, -s, c]])


def _roll(degrees: float) -> np.ndarray:
    """The top goes to the left side of the figure, or to the right of the image."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
