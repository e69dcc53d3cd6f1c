"""Synthetic data: drawn figures with exact key points in COCO's layout, for a pose training without a download.

A figure is a skeleton in space, turned to the viewer its front, back or a side, and drawn flat. Which side is left
follows from face, chest and what covers what: not from the side of the image, and not from a colour.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from cyclekd.integrations.runs.folder import settings_that_differ, write_json, write_text_atomically
from cyclekd.integrations.runs.progress import Log
from cyclekd.integrations.runs.seeds import derive_seed
from cyclekd.integrations.tokenpose.errors import PoseError
from cyclekd.integrations.tokenpose.skeletons import COCO

VERSION = 1
"""Of the drawings: a folder written by another version is not taken for this one's."""

MOST_PEOPLE = 8
SMALLEST_SIDE = 64

Size = tuple[int, int]
Annotation = dict[str, object]

SIDES = (("left", 1), ("right", -1))
LIMB_PARTS = ("upper_arm", "forearm", "hand", "thigh", "shin", "foot")
PARTS = ("torso", "neck", "head", "hair", "skirt", *(f"{side}_{part}" for part in LIMB_PARTS for side, _ in SIDES))
SHOWS = {
    "shoulder": ("torso", "{side}_upper_arm"),
    "elbow": ("{side}_upper_arm", "{side}_forearm"),
    "wrist": ("{side}_forearm", "{side}_hand"),
    "hip": ("torso", "skirt", "{side}_thigh"),
    "knee": ("{side}_thigh", "{side}_shin"),
    "ankle": ("{side}_shin", "{side}_foot"),
}
"""Key point to the parts on which it can be seen; those of the face are on the head."""

# shares of the body's height
SHOULDER, HIP, TORSO, NECK, HEAD = 0.118, 0.062, 0.285, 0.05, 0.075  # half widths of the first two; a radius
ARM, LEG = (0.17, 0.15, 0.055), (0.24, 0.24, 0.1)  # upper, lower, hand or foot
ARM_RADII, LEG_RADII = (0.036, 0.029, 0.022), (0.055, 0.041, 0.028)  # shoulder, elbow, wrist; hip, knee, ankle

SKINS = ((255, 224, 196), (241, 194, 160), (224, 172, 125), (198, 134, 96), (141, 85, 52), (92, 58, 40))
HAIRS = ((28, 24, 22), (74, 48, 30), (120, 78, 40), (205, 170, 95), (150, 60, 30), (165, 160, 155))

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
MOUTH = np.array([(-0.25, 0.6, 0.8), (0.25, 0.6, 0.8)])
FACE_CENTRE = np.array([0.0, 0.3, 1.0]) / np.hypot(0.3, 1.0)

TURNS = np.linspace(0, 2 * np.pi, 24, endpoint=False)
CIRCLE = np.stack((np.cos(TURNS), np.sin(TURNS)), 1)
HALF_TURNS = np.linspace(-np.pi / 2, np.pi / 2, 9)
HALF_CIRCLE = np.stack((np.cos(HALF_TURNS), np.sin(HALF_TURNS)), 1)
OVERSAMPLING = 2
NEAREST = Image.Resampling.NEAREST


def draw_figures(
    seed: int, size: Size = (240, 320), people: tuple[int, int] = (1, 3)
) -> tuple[np.ndarray, list[Annotation]]:
    """A synthetic image, uint8 [height, width, 3], and COCO's annotation of every figure; the same for the same seed.

    `people` are the fewest and the most figures. Visibility is 2 where the key point can be seen, 1 where something is
    before it, 0 (with coordinates 0) outside the image. The box encloses the whole figure as far as it is in the image,
    hidden parts too; the area is of what can be seen. A figure of which nothing can be seen is not annotated. PoseError
    for a negative seed, sides below 64 pixels, and other than 1 to 8 people.
    """
    _check(seed, size, people)
    rng = np.random.Generator(np.random.PCG64(seed))
    figures = [_figure(rng, size, place) for place in _places(rng, people)]
    figures.sort(key=lambda figure: figure.height)  # those nearer to the viewer look taller
    canvas = _Canvas(_gradient(rng, size))
    _draw_surroundings(canvas, rng, figures)
    for person, figure in enumerate(figures):
        _draw_figure(canvas, figure, person)
        if rng.random() < 0.3:
            _draw_occluder(canvas, rng, figure)
    annotations = [_annotate(canvas, figure, person) for person, figure in enumerate(figures)]
    return _expose(canvas, rng), [annotation for annotation in annotations if annotation["area"]]


def write_figures(
    folder: Path,
    *,
    train: int,
    val: int,
    seed: int,
    size: Size = (240, 320),
    people: tuple[int, int] = (1, 3),
) -> Path:
    """`train` and `val` synthetic images in `folder`, as COCO lays them out; the folder comes back.

    A folder that has them already is used as it is, one left half-way is completed: after a kill, figures that were
    drawn stay. Training and validation figures follow from different seeds. Of several processes, one may write.
    PoseError for counts below 1, where `folder` holds anything else, and what `draw_figures` refuses.
    """
    folder = Path(folder)
    _check(seed, size, people)
    if min(train, val) < 1:
        raise PoseError(f"write_figures(train={train}, val={val}): each is at least 1 image, as in train=4000, val=400")
    settings = _Settings(VERSION, train, val, seed, size, people)
    _claim(folder, settings)
    splits = {"train2017": range(1, train + 1), "val2017": range(train + 1, train + val + 1)}
    with _Bar(total=train + val, desc="drawing synthetic figures", unit=" images", disable=None, delay=1.0) as bar:
        for split, image_ids in splits.items():
            _write_split(folder, split, image_ids, settings, bar)
    return folder


# -- the body -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """Polygons [n, 2] in image pixels, each with its colour, the later ones over the earlier ones."""

    name: str
    depth: float
    """Towards the viewer."""
    layers: list[tuple[np.ndarray, tuple[int, ...]]]


@dataclass(frozen=True)
class _Figure:
    keypoints: np.ndarray
    """[17, 2], image pixels."""
    facing: np.ndarray
    """[17], whether the key point is on a side of its part that is turned to the viewer."""
    parts: list[_Part]
    """From the farthest to the nearest."""
    height: float
    """Of the upright body, in pixels."""
    colours: dict[str, np.ndarray]


@dataclass
class _Body:
    """A posed body in units of its height: x to the right of the image, y down, z to the viewer; the pelvis at 0."""

    joints: dict[str, np.ndarray]
    torso: np.ndarray
    """[3, 3]: columns are where its left, down and front point."""
    head_axes: np.ndarray
    """[3, 3]: the same of the head, as long as the half axes of its ellipsoid."""
    widths: float
    facing: dict[str, bool] = field(default_factory=dict)
    """False for key points that their own part hides; a name that is missing counts as True."""


def _pose(rng: np.random.Generator) -> _Body:
    view = rng.choice([0.0, 180.0, 90.0, -90.0], p=[0.4, 0.27, 0.165, 0.165]) + rng.normal(0, 22)
    tilt = rng.uniform(-90, 90) if rng.random() < 0.08 else rng.normal(0, 12)
    pelvis = _roll(tilt) @ _pitch(rng.normal(0, 8)) @ _yaw(view)
    torso = pelvis @ _pitch(rng.normal(6, 12)) @ _roll(rng.normal(0, 7)) @ _yaw(rng.normal(0, 12))
    head = torso @ _pitch(rng.normal(0, 10)) @ _roll(rng.normal(0, 8)) @ _yaw(rng.normal(0, 22))
    radius = HEAD * rng.uniform(0.95, 1.3)
    length = {name: rng.normal(1, 0.05) for name in ("shoulder", "hip", "torso", "arm", "leg")}

    neck = torso @ (0, -TORSO * length["torso"], 0)
    joints = {"pelvis": np.zeros(3), "neck": neck, "head": neck + torso @ (0, -NECK, 0) + head @ (0, -radius, 0)}
    legs = _leg_angles(rng)
    for (side, sign), leg in zip(SIDES, legs, strict=True):
        shoulder = neck + torso @ (sign * SHOULDER * length["shoulder"], rng.normal(0, 0.008), 0)
        arm = [torso @ direction for direction in _arm_directions(rng, sign)]
        names = [f"{side}_{name}" for name in ("shoulder", "elbow", "wrist", "fingers")]
        joints |= _chain(names, shoulder, arm, np.array(ARM) * length["arm"])
        hip = pelvis @ (sign * HIP * length["hip"], 0, 0)
        names = [f"{side}_{name}" for name in ("hip", "knee", "ankle", "toes")]
        joints |= _chain(names, hip, [pelvis @ d for d in _leg_directions(*leg, sign)], np.array(LEG) * length["leg"])
    axes = head @ np.diag(radius * np.array([0.8, 1.05, 0.92]))
    body = _Body(joints, torso, axes, widths=rng.uniform(0.85, 1.25))
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


def _arm_directions(rng: np.random.Generator, sign: int) -> list[np.ndarray]:
    """Of upper arm, forearm and hand, in the torso's frame; an elbow bends forwards, inwards or upwards."""
    if rng.random() < 0.5:
        outwards, forwards, bend = rng.normal(14, 8), rng.normal(5, 20), rng.uniform(0, 60)
    else:
        outwards, forwards, bend = rng.uniform(-5, 85), rng.uniform(-30, 160), rng.uniform(0, 130)
    upper = _limb_direction(outwards, forwards, sign)
    to = np.array([-sign * rng.uniform(0, 0.8), -rng.uniform(0, 1), 1.0])
    to -= (to @ upper) * upper
    to /= np.linalg.norm(to) + 1e-6
    lower = _along(upper, to, bend)
    return [upper, lower, lower]


def _leg_angles(rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """(outwards, forwards, bend of the knee) of both legs: standing, walking, sitting, or each leg on its own."""
    kind = rng.choice(4, p=[0.4, 0.3, 0.12, 0.18])
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


def _add_face(body: _Body) -> None:
    """Nose, eyes and ears, and which key points are turned away: hidden by the part that they lie on."""
    viewer = _viewer(body)
    for name, point in FACE_POINTS.items():
        body.joints[name] = body.joints["head"] + body.head_axes @ point
        body.facing[name] = bool(np.dot(point, viewer) > SEEN_FROM[name.split("_")[-1]])
    for side, _ in SIDES:
        for name, centre in (("shoulder", "neck"), ("hip", "pelvis")):
            out = body.joints[f"{side}_{name}"] - body.joints[centre]
            body.facing[f"{side}_{name}"] = bool(out[2] > -0.7 * np.linalg.norm(out))


def _viewer(body: _Body) -> np.ndarray:
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


# -- its clothes --------------------------------------------------------------------------------------------------


def _places(rng: np.random.Generator, people: tuple[int, int]) -> list[tuple[float, float]]:
    """(centre, width) of every figure's place as shares of the image's width, side by side."""
    count = int(rng.integers(people[0], people[1] + 1))
    return [((index + 0.5) / count, 1 / count) for index in rng.permutation(count)]


def _figure(rng: np.random.Generator, size: Size, place: tuple[float, float]) -> _Figure:
    body, colours = _pose(rng), _colours(rng)
    parts = sorted(_dress(rng, body, colours), key=lambda part: part.depth)
    height = size[0] * rng.uniform(0.5, 0.98) * (1 if place[1] > 0.3 else 0.75)
    keypoints = np.array([body.joints[name][:2] for name in COCO.names])
    facing = np.array([body.facing.get(name, True) for name in COCO.names])
    corners = np.concatenate([polygon for part in parts for polygon, _ in part.layers]) * height
    bounds = np.stack((corners.min(0), corners.max(0)))
    shift = _centre(rng, size, place, bounds[1] - bounds[0]) - bounds.mean(0)
    moved = [
        _Part(part.name, part.depth, [(polygon * height + shift, colour) for polygon, colour in part.layers])
        for part in parts
    ]
    return _Figure(keypoints * height + shift, facing, moved, height, colours)


def _centre(rng: np.random.Generator, size: Size, place: tuple[float, float], extent: np.ndarray) -> np.ndarray:
    """Where the middle of a figure goes: mostly inside the image, at times a part of the figure outside."""
    whole = np.array([size[1], size[0]])
    x = (place[0] + rng.uniform(-0.33, 0.33) * place[1]) * size[1]
    centre = np.array([x, size[0] * rng.uniform(0.4, 0.6)])
    room = np.maximum(whole / 2 - extent / 2, 0)
    centre = np.clip(centre, whole / 2 - room, whole / 2 + room)
    if rng.random() < 0.2:
        centre += rng.choice([-1, 1], 2) * rng.uniform(0.1, 0.3) * extent * rng.permutation([1.0, 0.0])
    return centre


def _colours(rng: np.random.Generator) -> dict[str, np.ndarray]:
    names = ("shirt", "legwear", "shoes", "trim")
    colours = {name: rng.uniform(15, 240, 3) for name in names}
    colours["skin"] = np.array(SKINS[rng.integers(len(SKINS))]) + rng.normal(0, 6, 3)
    colours["hair"] = np.array(HAIRS[rng.integers(len(HAIRS))]) + rng.normal(0, 8, 3)
    return colours


def _dress(rng: np.random.Generator, body: _Body, colours: dict[str, np.ndarray]) -> list[_Part]:
    sleeve = 1.0 if rng.random() < 0.4 else rng.uniform(0.3, 0.7)
    legwear = rng.choice(["trousers", "shorts", "skirt"], p=[0.5, 0.3, 0.2])
    parts = [_torso(rng, body, colours), _neck(body, colours), *_head(rng, body, colours)]
    for side, _ in SIDES:
        parts += _arm(body, side, colours, sleeve) + _leg(body, side, colours, legwear)
    return [*parts, _skirt(rng, body, colours)] if legwear == "skirt" else parts


def _arm(body: _Body, side: str, colours: dict[str, np.ndarray], sleeve: float) -> list[_Part]:
    shoulder, elbow, wrist, fingers = (
        body.joints[f"{side}_{name}"] for name in ("shoulder", "elbow", "wrist", "fingers")
    )
    r = np.array(ARM_RADII) * body.widths
    forearm = colours["shirt"] if sleeve == 1 else colours["skin"]
    upper = _capsule_layers(shoulder, elbow, r[0], r[1], forearm)
    if sleeve < 1:
        end = shoulder + sleeve * (elbow - shoulder)
        upper += _capsule_layers(shoulder, end, r[0] * 1.04, r[0] * 1.04, colours["shirt"])
    # beside the torso, an arm is in front of it
    near = 0.012
    return [
        _Part(f"{side}_upper_arm", _depth(shoulder, elbow) + near, upper),
        _Part(f"{side}_forearm", _depth(elbow, wrist) + near, _capsule_layers(elbow, wrist, r[1], r[2], forearm)),
        _Part(
            f"{side}_hand",
            _depth(wrist, fingers) + near,
            _capsule_layers(wrist, fingers, r[2] * 0.95, r[2] * 0.75, colours["skin"]),
        ),
    ]


def _leg(body: _Body, side: str, colours: dict[str, np.ndarray], legwear: str) -> list[_Part]:
    hip, knee, ankle, toes = (body.joints[f"{side}_{name}"] for name in ("hip", "knee", "ankle", "toes"))
    r = np.array(LEG_RADII) * body.widths
    bare, worn = colours["skin"], colours["legwear"]
    thigh = _capsule_layers(hip, knee, r[0], r[1], worn if legwear == "trousers" else bare)
    if legwear == "shorts":
        thigh += _capsule_layers(hip, hip + 0.7 * (knee - hip), r[0], r[1] * 1.12, worn)
    heel = ankle + 0.1 * (ankle - knee)
    shin = _capsule_layers(knee, ankle, r[1], r[2], worn if legwear == "trousers" else bare)
    return [
        _Part(f"{side}_thigh", _depth(hip, knee), thigh),
        _Part(f"{side}_shin", _depth(knee, ankle), shin),
        _Part(
            f"{side}_foot",
            _depth(heel, toes),
            _capsule_layers(heel, toes + 0.1 * (ankle - knee), 0.027, 0.02, colours["shoes"]),
        ),
    ]


def _torso(rng: np.random.Generator, body: _Body, colours: dict[str, np.ndarray]) -> _Part:
    """A shirt with an opening, buttons, a jacket or a print on its front; a seam on its back."""
    j, w = body.joints, body.widths
    length = np.linalg.norm(j["neck"])
    discs = [(j[f"{side}_shoulder"], 0.03 * w) for side, _ in SIDES] + [
        (j[f"{side}_hip"], 0.05 * w) for side, _ in SIDES
    ]
    discs += [(body.torso @ (0, -0.72 * length, 0), 0.068 * w), (body.torso @ (0, -0.3 * length, 0), 0.062 * w)]
    layers = [(_hull(discs, margin), shade) for margin, shade in _outlined(colours["shirt"])]
    depth = _depth(j["neck"], j["pelvis"]) + 0.02  # over thighs that hang down

    def on(x: float, y: float, front: float) -> np.ndarray:
        return (body.torso @ (x * w, y * length, front * 0.05 * w))[:2]

    kind = rng.integers(3)
    if body.torso[2, 2] > 0.1:
        trim = _tuple(colours["trim"])
        if kind == 0:
            layers.append(
                (np.array([on(-0.03, -0.95, 1), on(0.03, -0.95, 1), on(0.045, 0, 1), on(-0.045, 0, 1)]), trim)
            )
        elif kind == 1:
            layers.append((_capsule(on(0, -0.7, 1), on(0, -0.05, 1), 0.011, 0.011), trim))
        else:
            layers.append((_capsule(on(-0.03, -0.55, 1), on(0.03, -0.55, 1), 0.035, 0.035), trim))
        layers.append((np.array([on(-0.045, -0.99, 1), on(0.045, -0.99, 1), on(0, -0.74, 1)]), _tuple(colours["skin"])))
    elif body.torso[2, 2] < -0.1:
        layers.append((_capsule(on(-0.08, -0.8, -1), on(0.08, -0.8, -1), 0.006, 0.006), _tuple(colours["shirt"] * 0.6)))
    return _Part("torso", depth, layers)


def _neck(body: _Body, colours: dict[str, np.ndarray]) -> _Part:
    """Under the chin and the collar, whichever way the head leans."""
    neck, head, pelvis = (body.joints[name] for name in ("neck", "head", "pelvis"))
    depth = min(_depth(neck, pelvis), _depth(head)) - 0.001
    return _Part("neck", depth, _capsule_layers(neck, head, 0.036 * body.widths, 0.03 * body.widths, colours["skin"]))


def _head(rng: np.random.Generator, body: _Body, colours: dict[str, np.ndarray]) -> list[_Part]:
    """Hair all around but for the face, which is a cap of the head's ellipsoid; ears, eyes, nose and mouth on it."""
    centre, axes, viewer = body.joints["head"], body.head_axes, _viewer(body)
    radius = float(np.linalg.norm(axes[:, 1]))
    silhouette = CIRCLE @ np.linalg.cholesky((axes @ axes.T)[:2, :2]).T
    outline, hair = (shade for _, shade in _outlined(colours["hair"]))
    layers = [(centre[:2] + silhouette * 1.07, outline), (centre[:2] + silhouette, hair)]
    skin, dark_skin = _tuple(colours["skin"]), _tuple(colours["skin"] * 0.72)
    face = _cap(viewer, np.radians(rng.uniform(60, 72)))
    if face is not None:
        layers.append((centre[:2] + face @ axes[:2].T, skin))
    seen = {name: body.joints[name][:2] for name in FACE_POINTS if body.facing[name]}
    for name, point in seen.items():
        if name.endswith("ear"):
            layers += [(point + CIRCLE * radius * r, colour) for r, colour in ((0.24, dark_skin), (0.17, skin))]
    if MOUTH.mean(0) @ viewer > 0.2:
        mouth = centre[:2] + MOUTH @ axes[:2].T
        layers.append((_capsule(mouth[0], mouth[1], 0.06 * radius, 0.06 * radius), (150, 50, 50)))
    for name, point in seen.items():
        if name.endswith("eye"):
            layers += [
                (point + CIRCLE * radius * r, colour) for r, colour in ((0.2, (250, 250, 250)), (0.12, (25, 25, 30)))
            ]
    if "nose" in seen:
        bridge = centre[:2] + axes[:2] @ (0, -0.05, 0.98)
        layers.append((_capsule(bridge, seen["nose"], 0.05 * radius, 0.13 * radius), dark_skin))
    parts = [_Part("head", float(centre[2]), layers)]
    if rng.random() < 0.4:
        top, tips = (centre + axes @ point for point in ((0, 0.1, -0.45), (0, rng.uniform(1.0, 2.2), -0.75)))
        parts.append(
            _Part("hair", _depth(top, tips), _capsule_layers(top, tips, 0.8 * radius, 0.55 * radius, colours["hair"]))
        )
    return parts


def _cap(viewer: np.ndarray, radius: float) -> np.ndarray | None:
    """The seen part of the face on the unit sphere, [n, 3]: its rim as far as it is seen, and the horizon inside it."""
    across = np.array([1.0, 0.0, 0.0])
    rim = np.cos(radius) * FACE_CENTRE + np.sin(radius) * _circle_along(across, np.cross(FACE_CENTRE, across))
    right = np.cross((0.0, 1.0, 0.0), viewer)
    right /= np.linalg.norm(right)
    up = np.cross(viewer, right)
    horizon = _circle_along(right, up)
    points = np.concatenate((rim[rim @ viewer > 0], horizon[horizon @ FACE_CENTRE > np.cos(radius)]))
    if len(points) < 3:
        return None
    x, y = (points @ axis - (points @ axis).mean() for axis in (right, up))
    return points[np.argsort(np.arctan2(y, x))]  # it is convex as seen by the viewer


def _circle_along(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return CIRCLE @ np.stack((first, second))


def _skirt(rng: np.random.Generator, body: _Body, colours: dict[str, np.ndarray]) -> _Part:
    hem, flare = rng.uniform(0.5, 0.85), rng.uniform(1.0, 1.4)
    discs, depths = [], []
    for side, _ in SIDES:
        hip, knee = body.joints[f"{side}_hip"], body.joints[f"{side}_knee"]
        end = hip + hem * (knee - hip)
        discs += [(hip, 0.055 * body.widths), (end, 0.05 * flare * body.widths)]
        depths.append(_depth(hip, knee))
    layers = [(_hull(discs, margin), shade) for margin, shade in _outlined(colours["legwear"])]
    return _Part("skirt", max(depths) + 0.01, layers)


def _depth(*points: np.ndarray) -> float:
    return float(np.mean([point[2] for point in points]))


# -- shapes -------------------------------------------------------------------------------------------------------


def _capsule_layers(
    start: np.ndarray, end: np.ndarray, start_radius: float, end_radius: float, colour: np.ndarray
) -> list[tuple[np.ndarray, tuple[int, ...]]]:
    return [
        (_capsule(start[:2], end[:2], start_radius + margin, end_radius + margin), shade)
        for margin, shade in _outlined(colour)
    ]


def _outlined(colour: np.ndarray) -> list[tuple[float, tuple[int, ...]]]:
    """(margin, colour): a darker line around, which tells limbs of one colour apart."""
    return [(0.005, _tuple(colour * 0.55)), (0.0, _tuple(colour))]


def _capsule(start: np.ndarray, end: np.ndarray, start_radius: float, end_radius: float) -> np.ndarray:
    """[18, 2]: two half circles and the lines between them."""
    along = end - start
    distance = np.hypot(*along)
    along = along / distance if distance > 1e-9 else np.array([1.0, 0.0])
    turn = np.stack((along, (-along[1], along[0])))
    return np.concatenate((end + end_radius * HALF_CIRCLE @ turn, start - start_radius * HALF_CIRCLE @ turn))


def _hull(discs: list[tuple[np.ndarray, float]], margin: float) -> np.ndarray:
    """[24, 2]: around all discs, each direction's point on the disc that reaches farthest there."""
    centres, radii = np.array([centre[:2] for centre, _ in discs]), np.array([radius for _, radius in discs])
    farthest = (centres @ CIRCLE.T + radii[:, None]).argmax(0)
    return centres[farthest] + (radii[farthest, None] + margin) * CIRCLE


def _tuple(colour: np.ndarray) -> tuple[int, ...]:
    return tuple(int(min(max(value, 0), 255)) for value in colour)


# -- the image ----------------------------------------------------------------------------------------------------


class _Canvas:
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


def _label(person: int, part: str) -> int:
    return 1 + person * len(PARTS) + PARTS.index(part)


def _draw_figure(canvas: _Canvas, figure: _Figure, person: int) -> None:
    for part in figure.parts:
        for polygon, colour in part.layers:
            canvas.polygon(polygon, colour, _label(person, part.name))


def _gradient(rng: np.random.Generator, size: Size) -> Image.Image:
    corners = rng.integers(0, 256, (2, 2, 3), dtype=np.uint8)
    return Image.fromarray(corners).resize(size[::-1], Image.Resampling.BILINEAR)


def _draw_surroundings(canvas: _Canvas, rng: np.random.Generator, figures: list[_Figure]) -> None:
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
        canvas.polygon(_capsule(start, end, *radii), _tuple(colours[rng.integers(len(colours))]), 0)


def _draw_stripes(canvas: _Canvas, rng: np.random.Generator) -> None:
    extent = np.array(canvas.size[::-1])
    angle, width, colour = rng.uniform(0, np.pi), rng.uniform(0.02, 0.08) * extent.max(), _tuple(rng.uniform(0, 255, 3))
    along = np.array([np.cos(angle), np.sin(angle)])
    across = np.array([-along[1], along[0]])
    reach = extent.max()
    for offset in np.arange(-reach, reach, 2 * width):
        middle = extent / 2 + across * offset
        corners = [middle + a * along * reach + b * across * width / 2 for a, b in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
        canvas.polygon(np.array(corners), colour, 0)


def _draw_thing(
    canvas: _Canvas, rng: np.random.Generator, centre: np.ndarray, size_px: float, colour: np.ndarray
) -> None:
    """A turned ellipse or rectangle."""
    angle, radii = rng.uniform(0, np.pi), size_px * np.array([1, rng.uniform(0.3, 1)]) / 2
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    shape = CIRCLE if rng.random() < 0.5 else np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
    canvas.polygon(centre + shape * radii @ turn, _tuple(colour), 0)


def _draw_occluder(canvas: _Canvas, rng: np.random.Generator, figure: _Figure) -> None:
    """A thing before a figure, at one of its key points."""
    centre = figure.keypoints[rng.integers(len(figure.keypoints))] + rng.normal(0, 0.04, 2) * figure.height
    _draw_thing(canvas, rng, centre, rng.uniform(0.12, 0.32) * figure.height, rng.uniform(0, 255, 3))


def _expose(canvas: _Canvas, rng: np.random.Generator) -> np.ndarray:
    """The picture at its size, uint8 [height, width, 3], with a light of its own, contrast and noise."""
    gain, offset = rng.uniform(0.7, 1.2) * rng.uniform(0.92, 1.08, 3), rng.uniform(-10, 15)
    table = np.clip(np.arange(256) * gain[:, None] + offset, 0, 255).astype(np.uint8)
    pixels = np.asarray(canvas.image.reduce(OVERSAMPLING).point(table.ravel().tolist())).astype(np.int16)
    noise = rng.standard_normal(canvas.size, dtype=np.float32) * np.float32(rng.uniform(1, 8))
    # repeated, as adding [height, width, 1] takes several times as long
    pixels += noise.astype(np.int16).repeat(3).reshape(pixels.shape)
    return np.clip(pixels, 0, 255).astype(np.uint8)


# -- annotations --------------------------------------------------------------------------------------------------


def _annotate(canvas: _Canvas, figure: _Figure, person: int) -> Annotation:
    seen = np.asarray(canvas.map)
    keypoints: list[float] = []
    for name, point, facing in zip(COCO.names, figure.keypoints, figure.facing, strict=True):
        x, y = (round(float(value), 2) for value in point)
        if not (0 <= x <= canvas.size[1] - 1 and 0 <= y <= canvas.size[0] - 1):
            keypoints += [0, 0, 0]
            continue
        column, row = canvas.to_canvas(point)
        shown = facing and seen[row, column] in [_label(person, part) for part in _parts_showing(name)]
        keypoints += [x, y, 2 if shown else 1]
    pixels = sum(canvas.map.histogram()[_label(person, PARTS[0]) : _label(person, PARTS[-1]) + 1])
    return {
        "category_id": 1,
        "iscrowd": 0,
        "keypoints": keypoints,
        "num_keypoints": sum(visibility > 0 for visibility in keypoints[2::3]),
        "bbox": _box(canvas, figure),
        "area": pixels / OVERSAMPLING**2,
    }


def _box(canvas: _Canvas, figure: _Figure) -> list[float]:
    """x, y, width and height of the figure drawn alone, as nothing is before it then."""
    alone = Image.new("L", canvas.image.size)
    draw = ImageDraw.Draw(alone)
    for part in figure.parts:
        for polygon, _ in part.layers:
            draw.polygon(canvas.to_canvas(polygon).ravel().tolist(), fill=1)
    left, top, right, bottom = (max(edge - 1, 0) / OVERSAMPLING for edge in alone.getbbox() or (0, 0, 0, 0))
    return [left, top, right - left, bottom - top]


def _parts_showing(keypoint: str) -> tuple[str, ...]:
    side, _, joint = keypoint.rpartition("_")
    return tuple(part.format(side=side) for part in SHOWS.get(joint, ("head",)))


# -- files --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Settings:
    version: int
    train: int
    val: int
    seed: int
    size: Size
    people: tuple[int, int]


class _Bar(tqdm):
    monitor_interval = 0  # no thread of its own: a process with threads should not fork the workers of a data loader


def _check(seed: int, size: Size, people: tuple[int, int]) -> None:
    if seed < 0:
        raise PoseError(f"synthetic figures of seed {seed}: write a seed of 0 or more")
    if min(size) < SMALLEST_SIDE:
        raise PoseError(
            f"synthetic figures of size {tuple(size)}: write (height, width) of {SMALLEST_SIDE} pixels or more"
        )
    if not 1 <= people[0] <= people[1] <= MOST_PEOPLE:
        raise PoseError(
            f"synthetic figures with people={tuple(people)}: write the fewest and the most in an image, from 1 to "
            f"{MOST_PEOPLE}, as in (1, 3)"
        )


def _claim(folder: Path, settings: _Settings) -> None:
    """Make the folder these settings' own, or refuse one that is not."""
    record = folder / "figures.json"
    instead = "name another folder, or delete this one"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = (path.name for path in folder.iterdir())
        content = sorted(name for name in names if not (name.startswith(".") and name.endswith(".tmp")))
    except OSError as error:
        raise PoseError(f"write_figures: cannot use {folder}: {error.strerror}; name another folder") from error
    if not content:
        write_json(record, asdict(settings))
        return
    if not record.is_file():
        raise PoseError(
            f"write_figures: {folder} holds {', '.join(content[:3])}, which are no synthetic figures: {instead}"
        )
    try:
        saved = json.loads(record.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PoseError(f"write_figures: {record} is no JSON ({error}): {instead}") from error
    if not isinstance(saved, dict):
        raise PoseError(f"write_figures: {record} holds no settings: {instead}")
    different = settings_that_differ(saved, asdict(settings), ())
    if different:
        listed = ", ".join(f"{name} {before} (asked for: {now})" for name, (before, now) in different.items())
        raise PoseError(f"write_figures: {folder} holds other synthetic figures, with {listed}: {instead}")


def _write_split(folder: Path, split: str, image_ids: range, settings: _Settings, bar: tqdm) -> None:
    """Images, a line of annotations after each; when all are there, the annotation file in their place."""
    annotation_file = folder / "annotations" / f"person_keypoints_{split}.json"
    log = Log(folder / f"{split}.jsonl")
    for each in (annotation_file.parent, folder / split):
        each.mkdir(exist_ok=True)
    complete = annotation_file.is_file()
    log.truncate(image_ids[-1])  # of a line that was cut off
    drawn = image_ids if complete else {record["step"] for record in log.read()}
    for image_id in image_ids:
        path = folder / split / _file_name(image_id)
        if image_id not in drawn or not path.is_file():
            seed = derive_seed("figures", settings.seed, split, image_id)
            pixels, annotations = draw_figures(seed, settings.size, settings.people)
            _write_image(path, pixels)
            if image_id not in drawn:
                log.write("image", image_id, annotations=annotations)
        bar.update()
    if not complete:
        content = _coco(image_ids, {record["step"]: record["annotations"] for record in log.read()}, settings)
        write_text_atomically(annotation_file, json.dumps(content))
    log.path.unlink(missing_ok=True)


def _file_name(image_id: int) -> str:
    return f"{image_id:012}.jpg"


def _write_image(path: Path, pixels: np.ndarray) -> None:
    """Whole or not at all after a kill; not flushed to the disk one by one, which would take longer than drawing."""
    data = BytesIO()
    Image.fromarray(pixels).save(data, "jpeg", quality=92, subsampling=0)
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_bytes(data.getvalue())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise PoseError(f"write_figures: cannot write {path}: {error.strerror}; what was drawn before stays") from error


def _coco(image_ids: range, annotations: dict[int, list[Annotation]], settings: _Settings) -> dict[str, object]:
    height, width = settings.size
    images = [{"id": each, "file_name": _file_name(each), "height": height, "width": width} for each in image_ids]
    numbered = [
        {"id": image_id * 10 + index, "image_id": image_id, **annotation}
        for image_id in image_ids
        for index, annotation in enumerate(annotations[image_id])
    ]
    category = {
        "id": 1,
        "name": "person",
        "supercategory": "person",
        "keypoints": list(COCO.names),
        "skeleton": [[start + 1, end + 1] for start, end in COCO.limbs],
    }
    info = {"description": "synthetic figures, drawn by cyclekd", "synthetic": True, "settings": asdict(settings)}
    return {"info": info, "licenses": [], "images": images, "annotations": numbered, "categories": [category]}
