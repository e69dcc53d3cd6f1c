"""Synthetic data: drawn figures with exact key points in COCO's layout, for a pose training without a download.

A figure is a skeleton in space, turned to the viewer its front, back or a side, and drawn flat. Which side is left
follows from face, chest and what covers what: not from the side of the image, and not from a colour.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from cyclekd.integrations.runs.folder import settings_that_differ, write_json, write_text_atomically
from cyclekd.integrations.runs.progress import Log
from cyclekd.integrations.runs.seeds import derive_seed
from cyclekd.integrations.tokenpose.errors import PoseError
from cyclekd.integrations.tokenpose.figures.body import ANY, CALM
from cyclekd.integrations.tokenpose.figures.canvas import (
    OVERSAMPLING,
    Canvas,
    draw_figure,
    draw_occluder,
    draw_surroundings,
    expose,
    gradient,
    label_of,
)
from cyclekd.integrations.tokenpose.figures.parts import PARTS, Figure, make_figure, places
from cyclekd.integrations.tokenpose.shapes import Size
from cyclekd.integrations.tokenpose.skeletons import COCO

VERSION = 1
"""Of the drawings: a folder written by another version is not taken for this one's."""

MOST_PEOPLE = 8
SMALLEST_SIDE = 64

Annotation = dict[str, object]

SHOWS = {
    "shoulder": ("torso", "{side}_upper_arm"),
    "elbow": ("{side}_upper_arm", "{side}_forearm"),
    "wrist": ("{side}_forearm", "{side}_hand"),
    "hip": ("torso", "skirt", "{side}_thigh"),
    "knee": ("{side}_thigh", "{side}_shin"),
    "ankle": ("{side}_shin", "{side}_foot"),
}
"""Key point to the parts on which it can be seen; those of the face are on the head."""


def draw_figures(
    seed: int, size: Size = (240, 320), people: tuple[int, int] = (1, 3), calm: bool = False
) -> tuple[np.ndarray, list[Annotation]]:
    """A synthetic image, uint8 [height, width, 3], and COCO's annotation of every figure; the same for the same seed.

    Another version of NumPy may draw other random numbers from a seed, one of Pillow fill other pixels at an edge.
    `people` are the fewest and the most figures; `calm` ones are stout, stand or walk and face the viewer, arms mostly
    down, which is learned sooner. Visibility is 2 where the key point can be seen, 1 where something is before it, 0
    (with coordinates 0) outside the image. The box encloses the whole figure as far as it is in the image, hidden parts
    too; the area is of what can be seen. A figure of which nothing can be seen is not annotated. PoseError
    for a negative seed, sides below 64 pixels, and other than 1 to 8 people.
    """
    _check(seed, size, people)
    rng = np.random.Generator(np.random.PCG64(seed))
    figures = [make_figure(rng, size, place, CALM if calm else ANY) for place in places(rng, people)]
    figures.sort(key=lambda figure: figure.height)  # those nearer to the viewer look taller
    canvas = Canvas(gradient(rng, size))
    draw_surroundings(canvas, rng, figures)
    for person, figure in enumerate(figures):
        draw_figure(canvas, figure, person)
        if rng.random() < 0.3:
            draw_occluder(canvas, rng, figure)
    annotations = [_annotate(canvas, figure, person) for person, figure in enumerate(figures)]
    return expose(canvas, rng), [annotation for annotation in annotations if annotation["area"]]


def write_figures(
    folder: Path,
    *,
    train: int,
    val: int,
    seed: int,
    size: Size = (240, 320),
    people: tuple[int, int] = (1, 3),
    calm: bool = False,
) -> Path:
    """`train` and `val` synthetic images in `folder`, as COCO lays them out; the folder comes back.

    A folder that has them already is used as it is, one left half-way is completed: after a kill, figures that were
    drawn stay. Training and validation figures follow from different seeds. Of several processes, one may write. 100
    images take a processor's core about a second.
    PoseError for counts below 1, where `folder` holds anything else, and what `draw_figures` refuses.
    """
    folder = Path(folder)
    _check(seed, size, people)
    if min(train, val) < 1:
        raise PoseError(f"write_figures(train={train}, val={val}): each is at least 1 image, as in train=4000, val=400")
    settings = _Settings(VERSION, train, val, seed, size, people, calm)
    _claim(folder, settings)
    splits = {"train2017": range(1, train + 1), "val2017": range(train + 1, train + val + 1)}
    with _Bar(total=train + val, desc="drawing synthetic figures", unit=" images", disable=None, delay=1.0) as bar:
        for split, image_ids in splits.items():
            _write_split(folder, split, image_ids, settings, bar)
    return folder


# -- annotations --------------------------------------------------------------------------------------------------


def _annotate(canvas: Canvas, figure: Figure, person: int) -> Annotation:
    seen = np.asarray(canvas.map)
    keypoints: list[float] = []
    for name, point, facing in zip(COCO.names, figure.keypoints, figure.facing, strict=True):
        x, y = (round(float(value), 2) for value in point)
        if not (0 <= x <= canvas.size[1] - 1 and 0 <= y <= canvas.size[0] - 1):
            keypoints += [0, 0, 0]
            continue
        column, row = canvas.to_canvas(point)
        shown = facing and seen[row, column] in [label_of(person, part) for part in _parts_showing(name)]
        keypoints += [x, y, 2 if shown else 1]
    pixels = sum(canvas.map.histogram()[label_of(person, PARTS[0]) : label_of(person, PARTS[-1]) + 1])
    return {
        "category_id": 1,
        "iscrowd": 0,
        "keypoints": keypoints,
        "num_keypoints": sum(visibility > 0 for visibility in keypoints[2::3]),
        "bbox": _box(canvas, figure),
        "area": pixels / OVERSAMPLING**2,
    }


def _box(canvas: Canvas, figure: Figure) -> list[float]:
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
    calm: bool


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
    instead = "name another folder"
    _make(folder)
    names = (path.name for path in folder.iterdir())
    content = sorted(name for name in names if not (name.startswith(".") and name.endswith(".tmp")))
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
        raise PoseError(
            f"write_figures: {folder} holds other synthetic figures, with {listed}: {instead}, or delete this one"
        )


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        next(folder.iterdir(), None)  # or it may not be read
    except OSError as error:
        raise PoseError(f"write_figures: cannot use {folder}: {error.strerror}; name another folder") from error


def _write_split(folder: Path, split: str, image_ids: range, settings: _Settings, bar: tqdm) -> None:
    """Images, a line of annotations after each; when all are there, the annotation file in their place."""
    annotation_file = folder / "annotations" / f"person_keypoints_{split}.json"
    log = Log(folder / f"{split}.jsonl")
    for each in (annotation_file.parent, folder / split):
        _make(each)
    complete = annotation_file.is_file()
    log.truncate(image_ids[-1])  # of a line that was cut off
    drawn = image_ids if complete else {record["step"] for record in log.read()}
    for image_id in image_ids:
        path = folder / split / _file_name(image_id)
        if image_id not in drawn or not path.is_file():
            seed = derive_seed("figures", settings.seed, split, image_id)
            pixels, annotations = draw_figures(seed, settings.size, settings.people, settings.calm)
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
