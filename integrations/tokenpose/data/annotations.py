"""Annotation files in COCO's layout: COCO keypoints, CrowdPose, and any other with its own key points.

What makes a file unusable as a whole is refused here; single persons are judged by who uses them. The file says what
its key points are. CrowdPose's images carry a `crowdIndex`, and its persons no area.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import hypot
from pathlib import Path
from typing import Any

from cyclekd.integrations.tokenpose.errors import PoseError
from cyclekd.integrations.tokenpose.skeletons import COCO, CROWDPOSE, Skeleton

Record = dict[str, Any]

AREA_PER_BOX = 0.53
"""Area of a person per area of its box, where a file gives no area; CrowdPose's evaluation always uses it."""

IMMENSE = 1e9
"""No length in pixels is longer; float32, in which they are kept, ends later."""

OTHER_SIDE = {"left": "right", "right": "left", "l": "r", "r": "l"}
"""Words in the names of key points that a mirrored image exchanges."""

UPPER_BODY = ("nose", "eye", "ear", "mouth", "head", "neck", "shoulder", "elbow", "wrist", "hand", "chest", "thorax")
"""Words in the names of key points that half-body augmentation counts to the upper half."""


@dataclass(frozen=True)
class AnnotationFile:
    """What one file holds, with image and annotation ids checked to be whole numbers and there once."""

    path: Path
    images: dict[int, Record]
    """Image id to its record; every one has a file_name, height and width."""
    persons: list[Record]
    """Annotations of the category that has key points, crowds included."""
    others: int
    """How many annotations are of other categories."""
    category_id: int
    skeleton: Skeleton

    @property
    def is_crowdpose(self) -> bool:
        """Whether images say how crowded they are, so that AP is split by it."""
        return any("crowdIndex" in image for image in self.images.values())

    def has_image(self, image_id: object) -> bool:
        return is_id(image_id) and image_id in self.images


def read_annotations(path: Path) -> AnnotationFile:
    """The file at `path`. Errors: PoseError for one that cannot be read, or that cannot be used as a whole."""
    content = read_json(path)
    if not isinstance(content, dict) or "images" not in content or "categories" not in content:
        kind = type(content).__name__
        seen = f"has {', '.join([*content][:5]) or 'nothing'}" if isinstance(content, dict) else f"is a {kind}"
        raise PoseError(f"{path} {seen}: a file of key points in COCO's layout has images, annotations and categories")
    images = _by_id(path, "images", _records(path, content, "images"))
    annotations = list(_by_id(path, "annotations", _records(path, content, "annotations")).values())
    categories = list(_by_id(path, "categories", _records(path, content, "categories")).values())
    if not images:
        raise PoseError(f"{path} has no images: the split is empty")
    _check_images(path, images)
    category = _category(path, categories, annotations)
    persons = [each for each in annotations if each.get("category_id", category["id"]) == category["id"]]
    skeleton = _skeleton(path, category, images, persons)
    return AnnotationFile(Path(path), images, persons, len(annotations) - len(persons), category["id"], skeleton)


def read_json(path: Path) -> Any:
    """The content, without outlines. Errors: PoseError where there is no such file, or it is no JSON."""
    try:
        return json.loads(Path(path).read_bytes(), object_hook=_without_outline)
    except OSError as error:
        raise PoseError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise PoseError(f"{path} is no JSON ({error}): was it cut off in a download? Fetch it again") from error


def numbers(value: object, count: int) -> list[float] | None:
    """`value` where it is a list of `count` numbers, NaN and infinity included; else None."""
    return value if isinstance(value, list) and len(value) == count and set(map(type, value)) <= {int, float} else None


def are_lengths(values: Sequence[float]) -> bool:
    """Whether none is NaN, infinite or IMMENSE."""
    try:
        return hypot(*values) < IMMENSE
    except OverflowError:  # JSON's whole numbers have no end, and floats do
        return False


def is_id(value: object) -> bool:
    """Whether it is a whole number that fits into int64."""
    return type(value) is int and abs(value) < 2**63  # True is an int too


def area_of(person: Mapping[str, Any], box: Sequence[float]) -> float:
    """The annotated area, or where there is none AREA_PER_BOX times that of the box."""
    area = person.get("area")
    return area if type(area) in (int, float) else AREA_PER_BOX * box[2] * box[3]


def is_area(area: float) -> bool:
    """Whether it is neither NaN, infinite or immense nor below 0."""
    return 0 <= area < IMMENSE**2


def require_sigmas(skeleton: Skeleton, sigmas: Sequence[float] | None, what: str) -> tuple[float, ...]:
    """K sigmas: `sigmas`, or where it is None the skeleton's. PoseError where there are none, or not K."""
    chosen, count = tuple(skeleton.sigmas if sigmas is None else sigmas), len(skeleton.names)
    if len(chosen) == count and all(0 < sigma < IMMENSE for sigma in chosen):
        return chosen
    if sigmas is None:
        raise PoseError(
            f"{what}: these {count} key points have no sigmas, the spread of annotators' clicks that OKS measures in. "
            f'Add "sigmas" to the category in the annotations, or pass sigmas=[0.05] * {count} to treat all alike'
        )
    raise PoseError(f"{what}: sigmas are {count} numbers above 0, one per key point, and these are {list(chosen)}")


# -- images and annotations -------------------------------------------------------------------------------------


def _without_outline(record: Record) -> Record:
    """Outlines are most of COCO's files, and nothing here reads them: half the memory."""
    record.pop("segmentation", None)
    return record


def _records(path: Path, content: Mapping[str, Any], name: str) -> list[Record]:
    records = content.get(name, [])  # an image list without annotations, as COCO's test-dev, is a file too
    if not isinstance(records, list) or not all(isinstance(each, dict) for each in records):
        raise PoseError(f'{path}: "{name}" has to be a list of objects, as in COCO\'s layout, and is not')
    return records


def _by_id(path: Path, name: str, records: list[Record]) -> dict[int, Record]:
    by_id: dict[int, Record] = {}
    for number, record in enumerate(records):
        key = record.get("id")
        if not is_id(key):
            raise PoseError(
                f"{path}: number {number} of its {name} has the id {key!r}: ids are whole numbers, such as 7, and not "
                '7.0 or "7"; where other records name this one, change it there too'
            )
        if key in by_id:
            raise PoseError(f"{path}: two of its {name} have the id {key}: every id stands for one, so renumber them")
        by_id[key] = record
    return by_id


def _check_images(path: Path, images: Mapping[int, Record]) -> None:
    for key, image in images.items():
        name, height, width = (image.get(field) for field in ("file_name", "height", "width"))
        if not isinstance(name, str) or not name:
            raise PoseError(f"{path}: image {key} has no file_name")
        if os.path.isabs(name) or ".." in re.split(r"[/\\]", name):
            raise PoseError(f"{path}: image {key} is at {name}, outside the folder of images: name it relative to that")
        if not all(type(size) is int and 0 < size < IMMENSE for size in (height, width)):
            raise PoseError(
                f"{path}: image {key} ({name}) has height {height!r} and width {width!r}: both are needed, as whole "
                "numbers of pixels (Pillow: width, height = Image.open(file).size)"
            )


# -- what the key points are ------------------------------------------------------------------------------------


def _category(path: Path, categories: list[Record], annotations: list[Record]) -> Record:
    """The one with key points that annotations are of, the only one or the person."""
    named = [each for each in categories if each.get("keypoints")]
    used = [each for each in named if any(annotation.get("category_id") == each["id"] for annotation in annotations)]
    candidates = used or named or categories
    persons = [each for each in candidates if each.get("name") == "person"]
    if len(persons) == 1 or len(candidates) == 1:
        return (persons or candidates)[0]
    if not named:
        raise PoseError(f"{path}: no category has key points, as COCO's person has, or is called person")
    raise PoseError(
        f"{path}: several categories have key points, {', '.join(str(each.get('name')) for each in candidates[:5])}: "
        "give all whose key points are the same one category, and the others a file of their own"
    )


def _skeleton(path: Path, category: Record, images: Mapping[int, Record], persons: list[Record]) -> Skeleton:
    names = category.get("keypoints")
    if not names:
        return _unnamed(path, images, persons)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len({*names}) < len(names):
        raise PoseError(f"{path}: the category's keypoints are names, each there once, and these are {names!r}")
    sigmas = _sigmas(path, category, len(names))
    known = _known(tuple(names))
    pairs = _flip_pairs(path, category, names)
    if known is not None:
        return replace(known, sigmas=sigmas or known.sigmas)
    upper = tuple(index for index, name in enumerate(names) if any(word in name.lower() for word in UPPER_BODY))
    return Skeleton(tuple(names), pairs, sigmas, upper, _limbs(path, category, len(names)))


def _unnamed(path: Path, images: Mapping[int, Record], persons: list[Record]) -> Skeleton:
    """COCO's or CrowdPose's, where the file names no key points but has as many as they."""
    counts = {len(each["keypoints"]) / 3 for each in persons if isinstance(each.get("keypoints"), list)}
    if counts <= {len(COCO.names)}:  # or none at all: COCO's list of test images
        return COCO
    if counts == {len(CROWDPOSE.names)} and any("crowdIndex" in image for image in images.values()):
        return CROWDPOSE
    raise PoseError(
        f'{path}: no category has "keypoints", the names of the key points, of which persons here have '
        f"{', '.join(f'{count:g}' for count in sorted(counts))}: add the list to the person's category"
    )


def _known(names: tuple[str, ...]) -> Skeleton | None:
    if names == COCO.names:
        return COCO
    # published under either name; CrowdPose's file also carries the limbs of COCO's 17 key points
    is_crowdpose = tuple("top_head" if name == "head" else name for name in names) == CROWDPOSE.names
    return CROWDPOSE if is_crowdpose else None


def _sigmas(path: Path, category: Record, count: int) -> tuple[float, ...]:
    given = category.get("sigmas")
    if given is None:
        return ()
    found = numbers(given, count)
    if found is None or not all(0 < sigma < IMMENSE for sigma in found):
        raise PoseError(f"{path}: sigmas are {count} numbers above 0, one per key point, and are {given}")
    return tuple(map(float, found))


def _flip_pairs(path: Path, category: Record, names: list[str]) -> tuple[tuple[int, int], ...]:
    """(left, right) by the names; where they name no sides, the file's own, counted from 0."""
    by_name, alone = _sides(names)
    given = category.get("flip_pairs")
    if given is None:
        if alone or (not by_name and len(names) > 1):
            seen = f"{alone[0]} has no other side" if alone else "no name has the word left or right, or l or r"
            raise PoseError(
                f'{path}: which key points a mirrored image exchanges is not known: {seen}. Add "flip_pairs" to the '
                "category, pairs of indices from 0 such as [[1, 2], [3, 4]], or [] where it exchanges none"
            )
        return by_name
    pairs = _index_pairs(given, 0, len(names))
    flat = [index for pair in pairs or () for index in pair]
    if pairs is None or len({*flat}) < len(flat):
        raise PoseError(f"{path}: flip_pairs are pairs of indices from 0 to {len(names) - 1}, and are {given}")
    if not by_name or alone:
        return pairs
    if {frozenset(pair) for pair in pairs} != {frozenset(pair) for pair in by_name}:
        raise PoseError(
            f"{path}: flip_pairs are {given}, and by the names they would be {[list(pair) for pair in by_name]}, "
            "counted from 0: correct one of the two"
        )
    return by_name


def _sides(names: list[str]) -> tuple[tuple[tuple[int, int], ...], list[str]]:
    """Pairs (left, right) of indices, and the names that have a side but no partner."""
    words = [_words(name) for name in names]
    pairs, alone = [], []
    for here, mine in enumerate(words):
        sides = [word for word in mine if word in OTHER_SIDE]
        theirs = tuple(OTHER_SIDE.get(word, word) for word in mine)
        if sides and (words.count(theirs) != 1 or words.count(mine) != 1):
            alone.append(names[here])
        elif sides and sides[0] in ("left", "l"):
            pairs.append((here, words.index(theirs)))
    return tuple(pairs), alone


def _words(name: str) -> tuple[str, ...]:
    """In lower case, of a name such as left_eye, eye-l, "Left Eye", leftEye or LEye."""
    return tuple(word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+", name))


def _limbs(path: Path, category: Record, count: int) -> tuple[tuple[int, int], ...]:
    limbs = _index_pairs(category.get("skeleton") or [], 1, count + 1)
    if limbs is None:
        raise PoseError(
            f"{path}: the category's skeleton joins pairs of key points counted from 1 to {count}, as COCO's does, "
            f"and is {category['skeleton']}"
        )
    return tuple((a - 1, b - 1) for a, b in limbs)


def _index_pairs(pairs: object, first: int, end: int) -> tuple[tuple[int, int], ...] | None:
    if not isinstance(pairs, list):
        return None
    found = [pair for each in pairs if (pair := numbers(each, 2)) is not None]
    if len(found) < len(pairs) or not all(index in range(first, end) for pair in found for index in pair):
        return None
    return tuple((int(a), int(b)) for a, b in found)
