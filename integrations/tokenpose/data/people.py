"""The persons of one split as tensors: boxes, key points and where their images lie; and reading those images.

A person that cannot be used is left out and counted; a file that cannot be used is refused, before any training.
Nothing opens an image here: that it exists is seen in a listing of the folder, and that it is whole by `read_image`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cyclekd.integrations.tokenpose.data.annotations import (
    AnnotationFile,
    Record,
    area_of,
    numbers,
    read_annotations,
    read_json,
    require_sigmas,
)
from cyclekd.integrations.tokenpose.errors import PoseError
from cyclekd.integrations.tokenpose.keypoints.geometry import clean_boxes
from cyclekd.integrations.tokenpose.skeletons import Skeleton

GROUND_TRUTH, DETECTOR = "ground truth", "detector"


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
    """N persons in M images, on the CPU in float32 and int64; lengths are in pixels of the images as stored."""

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
        """The persons of these rows, in this order; the images stay."""
        rows = torch.as_tensor(rows, dtype=torch.long)
        names = ("image_index", "boxes", "keypoints", "areas", "annotation_ids", "box_scores")
        return replace(self, **{name: getattr(self, name)[rows] for name in names})


def read_people(
    annotations: Path,
    images: Path,
    *,
    boxes: Path | None = None,
    for_training: bool,
    sigmas: Sequence[float] | None = None,
) -> People:
    """The persons of an annotation file in COCO's layout, their images being in the folder `images`.

    For training: those with a labelled key point, crowds left out. For evaluation: all persons' boxes, crowds left out,
    or with `boxes` those of a detector, a JSON list of {image_id, category_id, bbox, score} as detectors write for
    COCO. `sigmas` takes the place of the file's own. `People.skipped` counts who was left out and why; images that are
    missing are so counted in training, and refused in evaluation, which would count their persons as not found.
    Errors: PoseError for files or folders that cannot be used, and where nobody is left.
    """
    if for_training and boxes is not None:
        raise PoseError(f"read_people: boxes={boxes} have no key points to train on; leave them out, or for_training")
    file = read_annotations(annotations)
    reader = _Reader(file, _Folder(Path(images)), for_training)
    if boxes is not None:
        reader.read_detections(Path(boxes))
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
    images/; "train" is its trainval and "val" its test set, as published figures are, or train and val without those.
    Errors: PoseError for another split, or where there is no such layout.
    """
    if split not in ("train", "val"):
        raise PoseError(f'find_split(split={split!r}): there are "train" and "val"')
    data = Path(data)
    for year in ("2017", ""):
        found = data / f"annotations/person_keypoints_{split}{year}.json", data / f"{split}{year}"
        if found[0].is_file():
            return found
    published = {"train": "trainval", "val": "test"}
    for folder, prefix in ((folder, prefix) for folder in ("annotations", "json") for prefix in ("mmpose_", "")):
        names = (*published.values(), *published)
        files = {name: data / folder / f"{prefix}crowdpose_{name}.json" for name in names}
        complete = all(files[name].is_file() for name in published.values())
        chosen = files[published[split] if complete else split]
        if chosen.is_file():
            return chosen, data / "images"
    raise PoseError(
        f"{data} has no {split} split: neither annotations/person_keypoints_{split}2017.json beside {split}2017/ as "
        f"COCO has, nor annotations/crowdpose_{published[split]}.json beside images/ as CrowdPose has"
    )


def read_image(path: Path, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """The image as [H, W, 3], RGB.

    An EXIF orientation is ignored: COCO's annotations, and the heights and widths in its files, are of the pixels as
    they are stored. With `size`, (height, width), another one is refused, as key points would be in other pixels.
    Errors: PoseError for a file that is missing, truncated, no image or of another size.
    """
    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB"))
    except FileNotFoundError as error:
        raise PoseError(f"the image {path} is missing") from error
    # Pillow reports broken files as any of these
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise PoseError(f"the image {path} is truncated or no image ({error}): fetch it again") from error
    if size is not None and pixels.shape[:2] != tuple(size):
        height, width = pixels.shape[:2]
        raise PoseError(
            f"the image {path} is {height} pixels high and {width} wide, and its annotations are of {size[0]} x "
            f"{size[1]}: use the images that were annotated. Where the two are exchanged, the file may be meant turned "
            "by its EXIF orientation, which is ignored: store it turned (Pillow: ImageOps.exif_transpose)"
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
            raise PoseError(
                f"{self.file.path} has no persons: the split is empty"
                + ("" if self.for_training else "; a list of images alone is evaluated with a detector's boxes=")
            )
        if self.file.others:
            self.skipped.add("of another category", self.file.path.name, self.file.others)
        for person in self.file.persons:
            self._take(f"annotation {person['id']}", self._person(person))

    def read_detections(self, path: Path) -> None:
        detections = read_json(path)
        if not isinstance(detections, list) or not detections or not all(isinstance(d, dict) for d in detections):
            raise PoseError(f"{path}: a detector's boxes are a list of {{image_id, category_id, bbox, score}}")
        for place, detection in enumerate(detections):
            # detectors for COCO list all its categories
            if detection.get("category_id", self.file.category_id) == self.file.category_id:
                self._take(f"box {place} of {path.name}", self._detection(detection, place))

    def people(self, source: str) -> People:
        self._check_missing()
        if not self.persons:
            wanted = "labelled person" if self.for_training else "person's box"
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
        if not _finite(keypoints):
            return "with NaN or infinity in key points"
        if self.for_training and not any(visibility > 0 for visibility in keypoints[2::3]):
            return "without a labelled key point"
        area = area_of(person, box)
        if not area > 0:
            return "without area"
        return _Person(person["image_id"], box, keypoints, area, person["id"], 1.0)

    def _detection(self, detection: Record, place: int) -> _Person | str:
        box, score = detection.get("bbox"), detection.get("score")
        if wrong := self._wrong_box(detection.get("image_id"), box):
            return wrong
        if not isinstance(score, int | float) or not isfinite(score):
            return "without a score"
        nothing = [0] * (3 * len(self.file.skeleton.names))
        return _Person(detection["image_id"], box, nothing, area_of({}, box), place, score)

    def _wrong_box(self, image_id: object, box: object) -> str | None:
        if not isinstance(image_id, int) or image_id not in self.file.images:
            return "of an unknown image id"
        if numbers(box, 4) is None:
            return "without a box of four numbers"
        if not _finite(box):
            return "with NaN or infinity in the box"
        x, y, width, height = box
        if width <= 0 or height <= 0:
            return "with a box of no area"
        image = self.file.images[image_id]
        if x + width <= 0 or y + height <= 0 or x >= image["width"] - 1 or y >= image["height"] - 1:
            return "with a box outside the image"
        return None


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
            except OSError:  # no such folder
                self.listings[folder] = set()
        return file in self.listings[folder]


def _finite(values: Sequence[float]) -> bool:
    return isfinite(sum(values))
