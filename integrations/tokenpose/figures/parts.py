"""The parts of a synthetic figure: its limbs, torso and head as coloured polygons, in the image's pixels.

A part has a single depth, and the nearer of two parts is drawn over the whole of the other. The small constants added
to depths decide which one that is where limbs and torso are about as near.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cyclekd.integrations.tokenpose.figures.body import ANY, FACE_POINTS, SIDES, Body, Variety, pose, viewer_direction
from cyclekd.integrations.tokenpose.figures.shapes import CIRCLE, capsule, capsule_layers, hull, outlined, rgb
from cyclekd.integrations.tokenpose.shapes import Size
from cyclekd.integrations.tokenpose.skeletons import COCO

LIMB_PARTS = ("upper_arm", "forearm", "hand", "thigh", "shin", "foot")
PARTS = ("torso", "neck", "head", "hair", "skirt", *(f"{side}_{part}" for part in LIMB_PARTS for side, _ in SIDES))

# shares of the body's height
ARM_RADII, LEG_RADII = (0.036, 0.029, 0.022), (0.055, 0.041, 0.028)  # shoulder, elbow, wrist; hip, knee, ankle

SKINS = ((255, 224, 196), (241, 194, 160), (224, 172, 125), (198, 134, 96), (141, 85, 52), (92, 58, 40))
HAIRS = ((28, 24, 22), (74, 48, 30), (120, 78, 40), (205, 170, 95), (150, 60, 30), (165, 160, 155))

# on the unit sphere of the head
MOUTH = np.array([(-0.25, 0.6, 0.8), (0.25, 0.6, 0.8)])
FACE_CENTRE = np.array([0.0, 0.3, 1.0]) / np.hypot(0.3, 1.0)


@dataclass(frozen=True)
class Part:
    """Polygons [n, 2] in image pixels, each with its colour, the later ones over the earlier ones."""

    name: str
    depth: float
    """Towards the viewer."""
    layers: list[tuple[np.ndarray, tuple[int, ...]]]


@dataclass(frozen=True)
class Figure:
    keypoints: np.ndarray
    """[17, 2], image pixels."""
    facing: np.ndarray
    """[17], whether the key point is on a side of its part that is turned to the viewer."""
    parts: list[Part]
    """From the farthest to the nearest."""
    height: float
    """Of the upright body, in pixels."""
    colours: dict[str, np.ndarray]


def places(rng: np.random.Generator, people: tuple[int, int]) -> list[tuple[float, float]]:
    """(centre, width) of every figure's place as shares of the image's width, side by side."""
    count = int(rng.integers(people[0], people[1] + 1))
    return [((index + 0.5) / count, 1 / count) for index in rng.permutation(count)]


def make_figure(rng: np.random.Generator, size: Size, place: tuple[float, float], variety: Variety = ANY) -> Figure:
    """A posed and dressed figure at its place (see `places`) in an image of `size`."""
    body, colours = pose(rng, variety), _colours(rng)
    parts = sorted(_dress(rng, body, colours), key=lambda part: part.depth)
    height = size[0] * rng.uniform(0.5, 0.98) * (1 if place[1] > 0.3 else 0.75)
    keypoints = np.array([body.joints[name][:2] for name in COCO.names])
    facing = np.array([body.facing.get(name, True) for name in COCO.names])
    corners = np.concatenate([polygon for part in parts for polygon, _ in part.layers]) * height
    bounds = np.stack((corners.min(0), corners.max(0)))
    shift = _centre(rng, size, place, bounds[1] - bounds[0]) - bounds.mean(0)
    moved = [
        Part(part.name, part.depth, [(polygon * height + shift, colour) for polygon, colour in part.layers])
        for part in parts
    ]
    return Figure(keypoints * height + shift, facing, moved, height, colours)


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


def _dress(rng: np.random.Generator, body: Body, colours: dict[str, np.ndarray]) -> list[Part]:
    sleeve = 1.0 if rng.random() < 0.4 else rng.uniform(0.3, 0.7)
    legwear = rng.choice(["trousers", "shorts", "skirt"], p=[0.5, 0.3, 0.2])
    parts = [_torso(rng, body, colours), _neck(body, colours), *_head(rng, body, colours)]
    for side, _ in SIDES:
        parts += _arm(body, side, colours, sleeve) + _leg(body, side, colours, legwear)
    return [*parts, _skirt(rng, body, colours)] if legwear == "skirt" else parts


def _arm(body: Body, side: str, colours: dict[str, np.ndarray], sleeve: float) -> list[Part]:
    shoulder, elbow, wrist, fingers = (
        body.joints[f"{side}_{name}"] for name in ("shoulder", "elbow", "wrist", "fingers")
    )
    r = np.array(ARM_RADII) * body.widths
    forearm = colours["shirt"] if sleeve == 1 else colours["skin"]
    upper = capsule_layers(shoulder, elbow, r[0], r[1], forearm)
    if sleeve < 1:
        end = shoulder + sleeve * (elbow - shoulder)
        upper += capsule_layers(shoulder, end, r[0] * 1.04, r[0] * 1.04, colours["shirt"])
    # beside the torso, an arm is in front of it
    near = 0.012
    return [
        Part(f"{side}_upper_arm", _depth(shoulder, elbow) + near, upper),
        Part(f"{side}_forearm", _depth(elbow, wrist) + near, capsule_layers(elbow, wrist, r[1], r[2], forearm)),
        Part(
            f"{side}_hand",
            _depth(wrist, fingers) + near,
            capsule_layers(wrist, fingers, r[2] * 0.95, r[2] * 0.75, colours["skin"]),
        ),
    ]


def _leg(body: Body, side: str, colours: dict[str, np.ndarray], legwear: str) -> list[Part]:
    hip, knee, ankle, toes = (body.joints[f"{side}_{name}"] for name in ("hip", "knee", "ankle", "toes"))
    r = np.array(LEG_RADII) * body.widths
    bare, worn = colours["skin"], colours["legwear"]
    thigh = capsule_layers(hip, knee, r[0], r[1], worn if legwear == "trousers" else bare)
    if legwear == "shorts":
        thigh += capsule_layers(hip, hip + 0.7 * (knee - hip), r[0], r[1] * 1.12, worn)
    heel = ankle + 0.1 * (ankle - knee)
    shin = capsule_layers(knee, ankle, r[1], r[2], worn if legwear == "trousers" else bare)
    return [
        Part(f"{side}_thigh", _depth(hip, knee), thigh),
        Part(f"{side}_shin", _depth(knee, ankle), shin),
        Part(
            f"{side}_foot",
            _depth(heel, toes),
            capsule_layers(heel, toes + 0.1 * (ankle - knee), 0.027, 0.02, colours["shoes"]),
        ),
    ]


def _torso(rng: np.random.Generator, body: Body, colours: dict[str, np.ndarray]) -> Part:
    """A shirt with an opening, buttons, a jacket or a print on its front; a seam on its back."""
    j, w = body.joints, body.widths
    length = np.linalg.norm(j["neck"])
    discs = [(j[f"{side}_shoulder"], 0.03 * w) for side, _ in SIDES] + [
        (j[f"{side}_hip"], 0.05 * w) for side, _ in SIDES
    ]
    discs += [(body.torso @ (0, -0.72 * length, 0), 0.068 * w), (body.torso @ (0, -0.3 * length, 0), 0.062 * w)]
    layers = [(hull(discs, margin), shade) for margin, shade in outlined(colours["shirt"])]
    depth = _depth(j["neck"], j["pelvis"]) + 0.02  # over thighs that hang down

    def on(x: float, y: float, front: float) -> np.ndarray:
        return (body.torso @ (x * w, y * length, front * 0.05 * w))[:2]

    kind = rng.integers(3)
    if body.torso[2, 2] > 0.1:
        trim = rgb(colours["trim"])
        if kind == 0:
            layers.append(
                (np.array([on(-0.03, -0.95, 1), on(0.03, -0.95, 1), on(0.045, 0, 1), on(-0.045, 0, 1)]), trim)
            )
        elif kind == 1:
            layers.append((capsule(on(0, -0.7, 1), on(0, -0.05, 1), 0.011, 0.011), trim))
        else:
            layers.append((capsule(on(-0.03, -0.55, 1), on(0.03, -0.55, 1), 0.035, 0.035), trim))
        layers.append((np.array([on(-0.045, -0.99, 1), on(0.045, -0.99, 1), on(0, -0.74, 1)]), rgb(colours["skin"])))
    elif body.torso[2, 2] < -0.1:
        layers.append((capsule(on(-0.08, -0.8, -1), on(0.08, -0.8, -1), 0.006, 0.006), rgb(colours["shirt"] * 0.6)))
    return Part("torso", depth, layers)


def _neck(body: Body, colours: dict[str, np.ndarray]) -> Part:
    """Under the chin and the collar, whichever way the head leans."""
    neck, head, pelvis = (body.joints[name] for name in ("neck", "head", "pelvis"))
    depth = min(_depth(neck, pelvis), _depth(head)) - 0.001
    return Part("neck", depth, capsule_layers(neck, head, 0.036 * body.widths, 0.03 * body.widths, colours["skin"]))


def _head(rng: np.random.Generator, body: Body, colours: dict[str, np.ndarray]) -> list[Part]:
    """Hair all around but for the face, which is a cap of the head's ellipsoid; ears, eyes, nose and mouth on it."""
    centre, axes, viewer = body.joints["head"], body.head_axes, viewer_direction(body)
    radius = float(np.linalg.norm(axes[:, 1]))
    silhouette = CIRCLE @ np.linalg.cholesky((axes @ axes.T)[:2, :2]).T
    outline, hair = (shade for _, shade in outlined(colours["hair"]))
    layers = [(centre[:2] + silhouette * 1.07, outline), (centre[:2] + silhouette, hair)]
    skin, dark_skin = rgb(colours["skin"]), rgb(colours["skin"] * 0.72)
    face = _cap(viewer, np.radians(rng.uniform(60, 72)))
    if face is not None:
        layers.append((centre[:2] + face @ axes[:2].T, skin))
    seen = {name: body.joints[name][:2] for name in FACE_POINTS if body.facing[name]}
    for name, point in seen.items():
        if name.endswith("ear"):
            layers += [(point + CIRCLE * radius * r, colour) for r, colour in ((0.24, dark_skin), (0.17, skin))]
    if MOUTH.mean(0) @ viewer > 0.2:
        mouth = centre[:2] + MOUTH @ axes[:2].T
        layers.append((capsule(mouth[0], mouth[1], 0.06 * radius, 0.06 * radius), (150, 50, 50)))
    for name, point in seen.items():
        if name.endswith("eye"):
            layers += [
                (point + CIRCLE * radius * r, colour) for r, colour in ((0.2, (250, 250, 250)), (0.12, (25, 25, 30)))
            ]
    if "nose" in seen:
        bridge = centre[:2] + axes[:2] @ (0, -0.05, 0.98)
        layers.append((capsule(bridge, seen["nose"], 0.05 * radius, 0.13 * radius), dark_skin))
    parts = [Part("head", float(centre[2]), layers)]
    if rng.random() < 0.4:
        top, tips = (centre + axes @ point for point in ((0, 0.1, -0.45), (0, rng.uniform(1.0, 2.2), -0.75)))
        parts.append(
            Part("hair", _depth(top, tips), capsule_layers(top, tips, 0.8 * radius, 0.55 * radius, colours["hair"]))
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


def _skirt(rng: np.random.Generator, body: Body, colours: dict[str, np.ndarray]) -> Part:
    hem, flare = rng.uniform(0.5, 0.85), rng.uniform(1.0, 1.4)
    discs, depths = [], []
    for side, _ in SIDES:
        hip, knee = body.joints[f"{side}_hip"], body.joints[f"{side}_knee"]
        end = hip + hem * (knee - hip)
        discs += [(hip, 0.055 * body.widths), (end, 0.05 * flare * body.widths)]
        depths.append(_depth(hip, knee))
    layers = [(hull(discs, margin), shade) for margin, shade in outlined(colours["legwear"])]
    return Part("skirt", max(depths) + 0.01, layers)


def _depth(*points: np.ndarray) -> float:
    return float(np.mean([point[2] for point in points]))
