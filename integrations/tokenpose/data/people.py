"""The persons of one split as tensors: boxes, key points and where their images lie; and reading those images.

A person that cannot be used is left out and counted; a file that cannot be used is refused, before any training.
Nothing opens an image here: that it exists is seen in a listing of the folder, and that it is whole by `read_image`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from cyclekd.integrations.tokenpose.data.annotations import (
    AnnotationFile,
    Record,
    are_lengths,
    area_of,
    is_area,
    is_id,
    numbers,
    read_annotations,
    read_json,
    require_sigmas,
)
from cyclekd.integrations.tokenpose.errors import PoseError
from cyclekd.integrations.tokenpose.keypoints.geometry import clean_boxes
from cyclekd.integrations.tokenpose.shapes import Size
from cyclekd.integrations.tokenpose.skeletons import Skeleton

GROUND_TRUTH, DETECTOR = "ground truth", "detector"

LEAST_SIDE = 1.0
"""Of a box within its image, in pixels. Less shows nobody; boxes from 0 to 1 are shares of the image by mistake."""


@dataclass
class Skipped:
    """How many persons were left out, by reason, with the first few of each; prints as a sentence."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, who: str, count: int = 1) -> None:
        """Count `who`, such as "annotation 7"; the first three of each reason are kept."""
        self.counts[reason] += count
        examples = self.examples.setdefault(reason, [])
        if len(examples) < 3:
            examples.append(who)

    @property
    def total(self) -> int:
        return self.counts.total()

    def __str__(self) -> str:
        parts = [
            f"{count} {reason} ({', '.join(self.examples[reason])}{', ...' if count > 3 else ''})"
            for reason, count in self.counts.most_common()
        ]
        return f"skipped {self.total}: {'; '.join(parts)}" if parts else "skipped none"


@dataclass(frozen=True, eq=False)  # tensors have no single truth value
class People:
    """N persons in M images, on the CPU in float32 and int64; lengths are in pixels of the images as annotated."""

    skeleton: Skeleton
    """K key points; `sigmas` is empty where the file gives none."""
    images: tuple[Path, ...]
    """The M images that have a person here."""
    image_ids: Tensor
    """[M]"""
    image_sizes: Tensor
    """[M, 2], (height, width)"""
    image_index: Tensor
    """[N], each person's image among the M."""
    boxes: Tensor
    """[N, 4], (x, y, width, height); ground truth is within the image (`clean_boxes`)."""
    keypoints: Tensor
    """[N, K, 3], (x, y, visibility): 0 where not labelled, 1 hidden, 2 visible. All 0 for a detector's boxes."""
    areas: Tensor
    """[N], as annotated, or 0.53 of the box where there is none."""
    annotation_ids: Tensor
    """[N]; for a detector's boxes their places in its list."""
    box_scores: Tensor
    """[N]; 1 for ground truth."""
    source: str
    """Whose boxes these are: "ground truth" or "detector"."""
    annotations: Path
    """The file of the ground truth."""
    category_id: int = 1
    """What the file calls a person."""
    skipped: Skipped = field(default_factory=Skipped)
    """Who was left out in reading."""

    def __len__(self) -> int:
        return len(self.boxes)

    def subset(self, rows: Tensor | Sequence[int]) -> People:
        """The persons of these rows, in this order, or of those where a mask [N] is true; the images stay."""
        rows = torch.as_tensor(rows)
        rows = rows if rows.dtype == torch.bool else rows.long()
        names = ("image_index", "boxes", "keypoints", "areas", "annotation_ids", "box_scores")
        return replace(self, **{name: getattr(self, name)[rows] for name in names})


def read_people(
    annotations: Path,
    images: Path,
    *,
    boxes: Path | None = None,
    least_score: float = 0.0,
    for_training: bool,
    sigmas: Sequence[float] | None = None,
) -> People:
    """The persons of an annotation file in COCO's layout, their images being in the folder `images`.

    They are those with a labelled key point, crowds left out, for evaluation too, as published figures with
    ground-truth boxes have it. With `boxes`, for evaluation alone, they are a detector's: a JSON list of {image_id,
    category_id, bbox, score} as detectors write for COCO, of which those with `least_score` count, the paper's all.
    `sigmas` takes the place of the file's own. `People.skipped` counts who was left out and why; images that are
    missing are so counted in training, and refused in evaluation, which would count their persons as not found.
    Errors: PoseError for files or folders that cannot be used, and where nobody is left.
    """
    if for_training and boxes is not None:
        raise PoseError(f"read_people: boxes={boxes} have no key points to train on; leave them out, or for_training")
    file = read_annotations(annotations)
    reader = _Reader(file, _Folder(Path(images)), for_training)
    if boxes is not None:
        reader.read_detections(Path(boxes), least_score)
    else:
        reader.read_persons()
    people = reader.people(GROUND_TRUTH if boxes is None else DETECTOR)
    if sigmas is None:
        return people
    sigmas = require_sigmas(people.skeleton, sigmas, "read_people")
    return replace(people, skeleton=replace(people.skeleton, sigmas=sigmas))


def find_split(data: Path, split: str) -> tuple[Path, Path]:
    """(annotation file, folder of images) of the split "train" or "val" in a data folder.

    COCO's layout: annotations/person_keypoints_{train2017,val2017}.json beside train2017/ and val2017/, also without
    the year. CrowdPose's: crowdpose_{trainval,test}.json, also with the prefix mmpose_, in annotations/ or json/ beside
    images/; "train" is its trainval and "val" its test set, as published figures are; without both of those, its train
    and val sets, or test where there is no val.
    Errors: PoseError for another split, or where there is no such layout.
    """
    if split not in ("train", "val"):
        raise PoseError(f'find_split(split={split!r}): there are "train" and "val"')
    data = Path(data)
    for year in ("2017", ""):
        found = data / f"annotations/person_keypoints_{split}{year}.json", data / f"{split}{year}"
        if found[0].is_file():
            return found
    for folder, prefix in ((folder, prefix) for folder in ("annotations", "json") for prefix in ("mmpose_", "")):
        if file := _crowdpose_file(data / folder, prefix, split):
            return file, data / "images"
    published = {"train": "trainval", "val": "test"}
    raise PoseError(
        f"{data} has no {split} split: neither annotations/person_keypoints_{split}2017.json beside {split}2017/ as "
        f"COCO has, both also without the year, nor annotations/crowdpose_{published[split]}.json beside images/ as "
        "CrowdPose has"
    )


def read_image(path: Path, size: Size | None = None) -> NDArray[np.uint8]:
    """The image as [H, W, 3], RGB, in the pixels that annotations with this height and width, `size`, are of.

    COCO's are of the pixels as they are stored. Some programs annotate a photograph as viewers show it, turned by its
    EXIF orientation: where `size` is of that and not of the stored pixels, it is turned. Where it is of both, as of
    squares and of half turns, and without `size`, pixels stay as they are stored, as in TokenPose's own training.
    Errors: PoseError for a file that is missing, truncated, no image, of another size or with more than 8 bits.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):  # Pillow cuts these off at 255, and a photograph comes out white
                raise PoseError(f"the image {path} has more than 8 bits per pixel (mode {image.mode}): save it with 8")
            annotated = image if size in (None, image.size[::-1]) else ImageOps.exif_transpose(image)
            pixels = np.array(annotated.convert("RGB"))
    except FileNotFoundError as error:
        raise PoseError(f"the image {path} is missing") from error
    # Pillow reports broken files as any of these
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise PoseError(f"the image {path} is truncated or no image ({error}): fetch it again") from error
    if size not in (None, pixels.shape[:2]):
        height, width = pixels.shape[:2]
        raise PoseError(
            f"the image {path} is {height} pixels high and {width} wide, and its annotations are of {size[0]} x "
            f"{size[1]}: use the images that were annotated"
        )
    return pixels


# -- one person after the other ---------------------------------------------------------------------------------


class _Person(NamedTuple):
    image_id: int
    box: Sequence[float]
    keypoints: Sequence[float]
    area: float
    id: int
    score: float


class _Reader:
    """Gathers usable persons, and counts the others."""

    def __init__(self, file: AnnotationFile, folder: _Folder, for_training: bool) -> None:
        self.file, self.folder, self.for_training = file, folder, for_training
        self.persons: list[_Person] = []
        self.skipped = Skipped()
        self.missing: dict[int, Path] = {}  # image id to where it should be

    def read_persons(self) -> None:
        if not self.file.persons:
            others = f" of category_id {self.file.category_id} among its {self.file.others} annotations"
            raise PoseError(
                f"{self.file.path} has no persons{others if self.file.others else ''}: the split is empty"
                + ("" if self.for_training else "; a list of images alone is evaluated with a detector's boxes=")
            )
        if self.file.others:
            self.skipped.add("of another category", self.file.path.name, self.file.others)
        for person in self.file.persons:
            self._take(f"annotation {person['id']}", self._person(person))

    def read_detections(self, path: Path, least_score: float) -> None:
        detections = read_json(path)
        if not isinstance(detections, list) or not detections or not all(isinstance(d, dict) for d in detections):
            raise PoseError(f"{path}: a detector's boxes are a list of {{image_id, category_id, bbox, score}}")
        for place, detection in enumerate(detections):
            self._take(f"box {place} of {path.name}", self._detection(detection, place, least_score))

    def people(self, source: str) -> People:
        self._check_missing()
        if not self.persons:
            wanted = "labelled person" if source == GROUND_TRUTH else "person's box"
            raise PoseError(f"{self.file.path}: no usable {wanted} in {self.folder.path}; {self.skipped}")
        ids = list(dict.fromkeys(person.image_id for person in self.persons))
        place = {image_id: index for index, image_id in enumerate(ids)}
        records = [self.file.images[image_id] for image_id in ids]
        keypoints = np.array([person.keypoints for person in self.persons], dtype=np.float32)
        sizes = torch.tensor([(record["height"], record["width"]) for record in records])
        index = torch.tensor([place[person.image_id] for person in self.persons])
        boxes = torch.tensor([person.box for person in self.persons], dtype=torch.float32)
        return People(
            skeleton=self.file.skeleton,
            images=tuple(self.folder.path / record["file_name"] for record in records),
            image_ids=torch.tensor(ids),
            image_sizes=sizes,
            image_index=index,
            boxes=clean_boxes(boxes, sizes[index]) if source == GROUND_TRUTH else boxes,
            keypoints=torch.from_numpy(keypoints).reshape(len(self.persons), -1, 3),
            areas=torch.tensor([person.area for person in self.persons], dtype=torch.float32),
            annotation_ids=torch.tensor([person.id for person in self.persons]),
            box_scores=torch.tensor([person.score for person in self.persons], dtype=torch.float32),
            source=source,
            annotations=self.file.path,
            category_id=self.file.category_id,
            skipped=self.skipped,
        )

    def _take(self, who: str, person: _Person | str) -> None:
        if isinstance(person, str):
            self.skipped.add(person, who)
        elif not self.folder.has(name := self.file.images[person.image_id]["file_name"]):
            self.missing[person.image_id] = self.folder.path / name
            self.skipped.add("whose image is missing", f"{who}: {name}")
        else:
            self.persons.append(person)

    def _check_missing(self) -> None:
        if self.missing and (not self.for_training or not self.persons):
            examples = ", ".join(path.name for path in list(self.missing.values())[:3])
            hint = "AP would count their persons as not found" if self.persons else "is it the right folder?"
            raise PoseError(
                f"{self.folder.path} lacks {len(self.missing)} of the images in {self.file.path.name}, such as "
                f"{examples}: {hint}"
            )

    def _person(self, person: Record) -> _Person | str:
        """The person, or why it cannot be used."""
        box, count = person.get("bbox"), len(self.file.skeleton.names)
        keypoints = person.get("keypoints", [0] * (3 * count))
        if person.get("iscrowd"):
            return "that are crowds"
        if wrong := self._wrong_box(person.get("image_id"), box):
            return wrong
        if numbers(keypoints, 3 * count) is None:
            return f"without {count} key points of three numbers each"
        if not are_lengths(keypoints):
            return "with NaN, infinite or immense numbers in key points"
        if not any(visibility > 0 for visibility in keypoints[2::3]):
            return "without a labelled key point"
        area = area_of(person, box)
        if area == 0 or not is_area(area):
            return "without area"
        return _Person(person["image_id"], box, keypoints, area, person["id"], 1.0)

    def _detection(self, detection: Record, place: int, least_score: float) -> _Person | str:
        box, score = detection.get("bbox"), numbers([detection.get("score")], 1)
        if detection.get("category_id", self.file.category_id) != self.file.category_id:
            return "of another category"  # detectors for COCO list them all
        if wrong := self._wrong_box(detection.get("image_id"), box):
            return wrong
        if score is None or not are_lengths(score) or score[0] < 0:
            return "without a score of 0 or more"
        if score[0] < least_score:
            return f"with a score below {least_score:g}"
        nothing = [0] * (3 * len(self.file.skeleton.names))
        return _Person(detection["image_id"], box, nothing, area_of({}, box), place, score[0])

    def _wrong_box(self, image_id: object, box: object) -> str | None:
        if not is_id(image_id):
            return "whose image_id is no whole number"
        if not self.file.has_image(image_id):
            return "of an unknown image id"
        if numbers(box, 4) is None:
            return "without a box of four numbers"
        if not are_lengths(box):
            return "with NaN, infinite or immense numbers in the box"
        x, y, width, height = box
        if min(width, height) < LEAST_SIDE:
            return "with a box of less than a pixel"
        image = self.file.images[image_id]
        right, bottom = image["width"] - 1 - LEAST_SIDE, image["height"] - 1 - LEAST_SIDE  # where ground truth ends
        if x + width <= 0 or y + height <= 0 or x > right or y > bottom:
            return "with a box outside the image"
        return None


# -- folders ----------------------------------------------------------------------------------------------------


def _crowdpose_file(folder: Path, prefix: str, split: str) -> Path | None:
    names = ("train", "trainval", "val", "test")
    train, trainval, val, test = (folder / f"{prefix}crowdpose_{name}.json" for name in names)
    choice = {"train": [train], "val": [val, test]}
    if trainval.is_file() and test.is_file():  # trainval holds val, which is no other split beside it
        choice = {"train": [trainval], "val": [test]}
    return next((file for file in choice[split] if file.is_file()), None)


class _Folder:
    """Which files there are, by one listing per folder: asking for each of 100,000 takes minutes on a network disk."""

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise PoseError(f"{path} is no folder: name the one that holds the images")
        self.path, self.listings = path, {}

    def has(self, name: str) -> bool:
        folder, file = os.path.split(name)
        if folder not in self.listings:
            try:
                self.listings[folder] = set(os.listdir(self.path / folder))
            except (OSError, ValueError):  # no such folder, or nothing that can be one
                self.listings[folder] = set()
        return file in self.listings[folder]
