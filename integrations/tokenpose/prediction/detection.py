"""Where people are in an image: found by a detection model of Hugging Face, or read from a file.

A file's boxes belong to a file name, whatever folder is before it, so that a folder of images can move.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
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


class Boxes(NamedTuple):
    """People in an image: boxes [N, 4] as (x, y, width, height) in its pixels, and scores [N] from 0 to 1."""

    boxes: np.ndarray
    scores: np.ndarray


Detector = Callable[[np.ndarray], Boxes]


class HFDetector:
    """People found by an object detection model of Hugging Face: `detector(image)` gives `Boxes`, the best first.

    `model` is a repository such as "facebook/detr-resnet-50" or "PekingU/rtdetr_r18vd", a folder, or such a model
    itself together with its `processor`. Boxes whose score is above `threshold` count, cut off at the image's border.
    Needs transformers. Errors: PoseError for a model that cannot be had, or that knows no label "person".
    """

    def __init__(
        self,
        model: str | Path | nn.Module,
        threshold: float = 0.5,
        device: str | torch.device | None = None,
        *,
        processor: Any = None,
    ) -> None:
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


def read_boxes(path: str | Path) -> dict[str, Boxes]:
    """Boxes by file name out of a JSON file, for `predict_images`; people without a box in it are not looked for.

    Of one of these forms: {"photo.jpg": [[x, y, width, height], ...]}, with a score as a fifth number if there is one;
    a COCO annotation file, of which people who are no crowd count; a list of {"file_name", "bbox", "score"}, as
    `coco_results` gives it. Errors: PoseError for a file of another form.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        return _grouped(_box_rows(content))
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        what = f"there is no {error}" if isinstance(error, KeyError) else first_line(error)
        raise PoseError(
            f"{path} cannot be read as boxes ({what}): write {{'photo.jpg': [[x, y, width, height], ...]}}, a COCO "
            "annotation file, or a list of {'file_name', 'bbox', 'score'}"
        ) from error


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


def _box_rows(content: Any) -> Iterator[tuple[str, Sequence[float] | None, float]]:
    """(file name, box, score) of every box, and (file name, None, 0) for an image without."""
    if isinstance(content, list):
        for row in content:
            yield row["file_name"], row["bbox"], float(row.get("score", 1.0))
    elif "images" in content and "annotations" in content:
        names = {image["id"]: image["file_name"] for image in content["images"]}
        yield from ((name, None, 0.0) for name in names.values())
        for row in content["annotations"]:
            if row.get("category_id", PERSON) == PERSON and not row.get("iscrowd"):
                yield names[row["image_id"]], row["bbox"], 1.0
    else:
        for name, boxes in content.items():
            yield name, None, 0.0
            yield from ((name, box[:4], float(box[4]) if len(box) > 4 else 1.0) for box in boxes)


def _grouped(rows: Iterable[tuple[str, Sequence[float] | None, float]]) -> dict[str, Boxes]:
    found: dict[str, list[tuple[Sequence[float], float]]] = {}
    for name, box, score in rows:
        people = found.setdefault(Path(name).name, [])
        if box is not None:
            people.append((box, score))
    return {name: _stacked(people) for name, people in found.items()}


def _stacked(people: list[tuple[Sequence[float], float]]) -> Boxes:
    boxes, scores = ([each[field] for each in people] for field in (0, 1))
    return Boxes(np.array(boxes, np.float32).reshape(-1, 4), np.array(scores, np.float32))
