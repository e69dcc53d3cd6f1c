"""Where people are in an image: found by a detection model of Hugging Face, or read from a file.

A file's boxes belong to a file name, whatever folder is before it, so that a folder of images can move.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from cyclekd.integrations.tokenpose.errors import PoseError
from cyclekd.integrations.tokenpose.prediction.photos import ImageSource, first_line, load_image

PERSON = 1
"""COCO's category id."""

SIDES_PX = (1e-2, 1e6)
"""Of a box, the least and the most: beyond them, float32 cannot tell where a crop's pixels are."""


class Boxes(NamedTuple):
    """People in an image: boxes [N, 4] as (x, y, width, height) in its pixels, and scores [N] from 0 to 1."""

    boxes: np.ndarray
    scores: np.ndarray


Detector = Callable[[np.ndarray], Boxes]


class HFDetector:
    """People found by an object detection model of Hugging Face: `detector(image)` gives `Boxes`, the best first.

    `model` is a repository such as "facebook/detr-resnet-50" or "PekingU/rtdetr_r18vd", a folder, or such a model
    itself together with its `processor`. Boxes whose score is above `threshold` count, cut off at the image's border.
    Needs transformers. Errors: PoseError for a model that cannot be had, or that knows no label "person", and for a
    threshold that is no share.
    """

    def __init__(
        self,
        model: str | Path | nn.Module,
        threshold: float = 0.5,
        device: str | torch.device | None = None,
        *,
        processor: Any = None,
    ) -> None:
        if not 0 <= threshold <= 1:
            raise PoseError(f"HFDetector(threshold={threshold}): scores are from 0 to 1, and 0.5 is usual")
        if isinstance(model, str | Path):
            model, processor = _load_detector(model, processor)
        elif processor is None:
            raise PoseError(
                f"HFDetector({type(model).__name__}): pass its processor too, processor=AutoImageProcessor."
                "from_pretrained(...), or the name of a repository alone"
            )
        self.person = _person_labels(model)
        self.device, self.threshold, self.processor = find_device(device), threshold, processor
        self.model = model.to(self.device).eval()

    @torch.no_grad()
    def __call__(self, image: ImageSource) -> Boxes:
        pixels = load_image(image)
        height, width = pixels.shape[:2]
        inputs = self.processor(images=Image.fromarray(pixels), return_tensors="pt").to(self.device)
        found = self.processor.post_process_object_detection(
            self.model(**inputs), threshold=self.threshold, target_sizes=[(height, width)]
        )[0]
        scores, labels, corners = (found[name].float().cpu().numpy() for name in ("scores", "labels", "boxes"))
        corners = corners.clip(0, (width, height, width, height))
        boxes = np.concatenate((corners[:, :2], corners[:, 2:] - corners[:, :2]), 1)
        people = np.isin(labels, self.person) & (boxes[:, 2:] > 0).all(1)
        order = np.argsort(-scores[people], kind="stable")
        return Boxes(boxes[people][order].astype(np.float32), scores[people][order])


def check_boxes(name: str, image: np.ndarray, boxes: Boxes | Sequence[Any] | np.ndarray | None) -> Boxes:
    """`boxes` [N, 4] of an image as `Boxes`, with scores of 1 where it has none; for None the whole image as one.

    Errors: PoseError for other shapes, numbers that are not finite, and boxes with nothing of the image in them, which
    the message calls by `name`.
    """
    height, width = image.shape[:2]
    boxes, scores = boxes if isinstance(boxes, Boxes) else (boxes, None)
    try:
        given = np.asarray([(0, 0, width, height)] if boxes is None else boxes, np.float32)
        given = given if given.size else np.zeros((0, 4), np.float32)
        weights = np.ones(len(given), np.float32) if scores is None else np.asarray(scores, np.float32)
    except (ValueError, TypeError) as error:
        raise PoseError(f"{name}: boxes are [N, 4] as (x, y, width, height), and these {boxes!r}") from error
    if given.ndim != 2 or given.shape[1] != 4 or weights.shape != given.shape[:1]:
        raise PoseError(
            f"{name}: boxes are [N, 4] as (x, y, width, height) and scores [N], and these {list(given.shape)} and "
            f"{list(weights.shape)}; one box alone is [box]"
        )
    usable = np.isfinite(weights) & _is_seen(given, width, height)
    if not usable.all():
        row = int(np.flatnonzero(~usable)[0])
        raise PoseError(
            f"{name}: box {row} is {given[row].tolist()} with the score {weights[row]:g}: a box (x, y, width, height) "
            f"has sides from {SIDES_PX[0]:g} to {SIDES_PX[1]:g} px, a finite score, and in it some of the image, which "
            f"is {width} x {height} px; leave it out"
        )
    return Boxes(given, weights)


def read_boxes(path: str | Path) -> dict[str, Boxes]:
    """Boxes by file name out of a JSON file, for `predict_images`; people without a box in it are not looked for.

    Of one of these forms: {"photo.jpg": [[x, y, width, height], ...]}, with a score as a fifth number if there is one;
    a COCO annotation file, of which people who are no crowd count; a list of {"file_name", "bbox", "score"}, as
    `coco_results` gives it. Errors: PoseError for a file of another form, and one name in two folders.
    """
    return _parsed(path, lambda content: _grouped(_box_rows(content)))


def read_image_ids(path: str | Path) -> dict[str, int]:
    """COCO's image ids by file name out of such a file; of the form that has none, {}.

    Errors: PoseError as of `read_boxes`.
    """
    return _parsed(path, _image_ids)


def find_device(device: str | torch.device | None) -> torch.device:
    """A GPU where there is one for None. Errors: PoseError for a device that is not there."""
    try:
        return torch.empty(0, device=device or ("cuda" if torch.cuda.is_available() else "cpu")).device
    except (RuntimeError, AssertionError) as error:  # no such name, or not there
        raise PoseError(f"device={str(device)!r} cannot be used: {first_line(error)}") from error


def _load_detector(name: str | Path, processor: Any) -> tuple[nn.Module, Any]:
    try:
        from transformers import AutoImageProcessor, AutoModelForObjectDetection
    except ImportError as error:
        raise PoseError("HFDetector needs transformers: pip install transformers") from error
    try:
        model = AutoModelForObjectDetection.from_pretrained(str(name), use_safetensors=True)
        return model, processor or AutoImageProcessor.from_pretrained(str(name))
    except (OSError, ValueError, ImportError) as error:  # no such repository, another kind of model, timm missing
        raise PoseError(f"HFDetector({str(name)!r}) cannot be loaded: {first_line(error)}") from error


def _person_labels(model: nn.Module) -> list[int]:
    labels = {int(index): label for index, label in model.config.id2label.items()}
    person = [index for index, label in labels.items() if label.lower() == "person"]
    if not person:
        raise PoseError(
            f"HFDetector: none of the model's labels is 'person': {', '.join(list(labels.values())[:5])}, ...; choose "
            "one that was trained on COCO, such as facebook/detr-resnet-50"
        )
    return person


def _is_seen(boxes: np.ndarray, width: int, height: int) -> np.ndarray:
    """[N]: whether boxes [N, 4] have sides to cut a crop from, and some of the image in them; false for NaN."""
    x, y, w, h = boxes.T
    sides = ((boxes[:, 2:] >= SIDES_PX[0]) & (boxes[:, 2:] <= SIDES_PX[1])).all(1)
    return sides & (x < width) & (y < height) & (x + w > 0) & (y + h > 0)


def _parsed(path: str | Path, parse: Callable[[Any], Any]) -> Any:
    try:
        return parse(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"there is no {error}" if isinstance(error, KeyError) else first_line(error)
        raise PoseError(
            f"{path} cannot be read as boxes ({what}): write {{'photo.jpg': [[x, y, width, height], ...]}}, a COCO "
            "annotation file, or a list of {'file_name', 'bbox', 'score'}"
        ) from error


def _box_rows(content: Any) -> Iterator[tuple[str, Sequence[float] | None, float]]:
    """(file name, box, score) of every box, and (file name, None, 0) for an image without."""
    if isinstance(content, list):
        for row in content:
            yield row["file_name"], row["bbox"], float(row.get("score", 1.0))
    elif _is_annotations(content):
        names, people = {image["id"]: image["file_name"] for image in content["images"]}, _person_categories(content)
        yield from ((name, None, 0.0) for name in names.values())
        for row in content["annotations"]:
            if row.get("category_id", min(people)) in people and not row.get("iscrowd"):
                yield names[row["image_id"]], row["bbox"], 1.0
    else:
        for name, boxes in content.items():
            yield name, None, 0.0
            yield from ((name, box[:4], float(box[4]) if len(box) > 4 else 1.0) for box in boxes)


def _is_annotations(content: Mapping[str, Any]) -> bool:
    return "images" in content and "annotations" in content


def _person_categories(content: Mapping[str, Any]) -> set[int]:
    """Those with key points or called person; a file of one's own may count them from 0."""
    categories = content.get("categories", [])
    people = {each["id"] for each in categories if each.get("keypoints") or each.get("name") == "person"}
    return people or {PERSON}


def _image_ids(content: Any) -> dict[str, int]:
    if isinstance(content, list):
        return {Path(row["file_name"]).name: int(row["image_id"]) for row in content if "image_id" in row}
    if _is_annotations(content):
        return {Path(image["file_name"]).name: int(image["id"]) for image in content["images"]}
    return {}


def _grouped(rows: Iterable[tuple[str, Sequence[float] | None, float]]) -> dict[str, Boxes]:
    found: dict[str, list[tuple[Sequence[float], float]]] = {}
    paths: dict[str, str] = {}
    for path, box, score in rows:
        name = Path(path).name
        if paths.setdefault(name, path) != path:
            raise ValueError(f"it has both {paths[name]} and {path}, and names count without their folders")
        people = found.setdefault(name, [])
        if box is not None:
            people.append((box, score))
    return {name: _stacked(people) for name, people in found.items()}


def _stacked(people: list[tuple[Sequence[float], float]]) -> Boxes:
    boxes, scores = ([each[field] for each in people] for field in (0, 1))
    return Boxes(np.array(boxes, np.float32).reshape(len(boxes), 4), np.array(scores, np.float32))
