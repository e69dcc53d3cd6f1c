"""From photographs and video to people's key points in their pixels, and the files that go in and come out.

The model sees crops as its evaluation cuts them. Photographs are turned upright first, as their camera noted it, so
that boxes and key points are those of the picture that a viewer shows.
"""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from fractions import Fraction
from itertools import islice
from operator import length_hint
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from tqdm import tqdm

from cyclekd.integrations.tokenpose.config import PoseConfig
from cyclekd.integrations.tokenpose.decoding import (
    PIXELS_PER_SCALE,
    Keypoints,
    decode_heatmaps,
    decode_regression,
    decode_token_regression,
    to_image,
)
from cyclekd.integrations.tokenpose.errors import PoseError
from cyclekd.integrations.tokenpose.flips import predict_flipped, predict_flipped_regression
from cyclekd.integrations.tokenpose.geometry import (
    center_and_scale,
    compose_matrices,
    crop_matrices,
    invert_matrices,
    transform_points,
)
from cyclekd.integrations.tokenpose.scoring import oks_nms, rescore
from cyclekd.integrations.tokenpose.shapes import full_precision
from cyclekd.integrations.tokenpose.skeletons import COCO, Skeleton
from cyclekd.integrations.tokenpose.warp import normalize, warp_batch

PERSON = 1
"""COCO's category id."""

READ_AHEAD = min(4, os.cpu_count() or 1)
"""Images that are decoded while the model works, each in a thread of its own."""

MOST_WAITING = 2**28
"""Bytes of images that wait for a batch of people to be full."""

ImageSource = str | Path | Image.Image | np.ndarray
Precision = Literal["fp32", "bf16"]


class Boxes(NamedTuple):
    """People in an image: boxes [N, 4] as (x, y, width, height) in its pixels, and scores [N] from 0 to 1."""

    boxes: np.ndarray
    scores: np.ndarray


class Poses(NamedTuple):
    """People found in an image, as float32 arrays on the host.

    A key point with a score of 0 or less was not found; its coordinates mean nothing. A person's score is their box's
    times the mean of those key point scores that are above 0.2.
    """

    keypoints: np.ndarray
    """[N, K, 2], (x, y) in pixels of the image."""
    scores: np.ndarray
    """[N, K]"""
    boxes: np.ndarray
    """[N, 4], (x, y, width, height), as they were given."""
    person_scores: np.ndarray
    """[N]"""


class Prediction(NamedTuple):
    """One image of several: what was asked for, its pixels uint8 [H, W, 3], and the people in it."""

    source: ImageSource
    image: np.ndarray
    poses: Poses


Detector = Callable[[np.ndarray], Boxes]


class PosePredictor:
    """A pose model with all that belongs round it: `predictor(image, boxes)` gives `Poses` in pixels of the image.

    `image` is a path, a Pillow image or an array uint8 [H, W, 3]; grey and transparent ones are converted. `boxes`
    [N, 4] are (x, y, width, height) in its pixels, and may reach beyond it; None stands for the whole image as one.
    With a detector it is `predictor(image, detector(image))`.

    `flip` averages with the mirrored image, as the papers report it, and takes twice the time; `method` is that of
    `decode_heatmaps`. The model is moved to `device` (a GPU where there is one) and put into evaluation mode.
    Errors: PoseError for a skeleton with another number of key points, images that cannot be read, and boxes that are
    not finite, empty or wholly outside of the image.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        skeleton: Skeleton = COCO,
        device: str | torch.device | None = None,
        batch_size: int = 32,
        flip: bool = True,
        method: str = "dark",
        precision: Precision = "fp32",
    ) -> None:
        _check_settings(model, skeleton, batch_size, precision)
        self.device = _device(device)
        self.model, self.skeleton = model.to(self.device).eval(), skeleton
        self.config: PoseConfig = model.config
        self.batch_size, self.flip, self.method, self.precision = batch_size, flip, method, precision

    def __call__(self, image: ImageSource, boxes: Boxes | Sequence[Any] | np.ndarray | None = None) -> Poses:
        pixels = load_image(image)
        return self._poses([pixels], [_check_boxes(_name(image), pixels, boxes)])[0]

    def predict_images(
        self,
        images: Iterable[ImageSource],
        boxes: Mapping[str, Boxes | Sequence[Any] | np.ndarray] | None = None,
        *,
        detector: Detector | None = None,
        progress: bool = True,
        on_unreadable: Callable[[ImageSource, PoseError], None] | None = None,
    ) -> Iterator[Prediction]:
        """A `Prediction` for each image, in order and as they come, so that any number of images takes little memory.

        `boxes` are by file name (`read_boxes`); an image without people has none, as in `{"empty.jpg": []}`. With a
        detector, of people who are the same to 0.9 OKS the best one is left. Neither of both: the whole images. People
        of several images share batches. `on_unreadable` is called for images that cannot be read, which are then left
        out; without it they raise PoseError.
        """
        if boxes is not None and detector is not None:
            raise PoseError("predict_images got both boxes and a detector: leave out one of them")
        waiting: list[tuple[ImageSource, np.ndarray, Boxes]] = []
        with tqdm(total=length_hint(images) or None, unit=" images", disable=None if progress else True) as bar:
            for source, pixels in _read_ahead(images, on_unreadable):
                waiting.append((source, pixels, _boxes_of(source, pixels, boxes, detector)))
                people = sum(len(each.boxes) for *_, each in waiting)
                if people >= self.batch_size or sum(each.nbytes for _, each, _ in waiting) >= MOST_WAITING:
                    yield from self._predictions(waiting, bar, detector is not None)
                    waiting = []
            if waiting:
                yield from self._predictions(waiting, bar, detector is not None)

    def _predictions(
        self, waiting: list[tuple[ImageSource, np.ndarray, Boxes]], bar: tqdm, detected: bool
    ) -> Iterator[Prediction]:
        found = self._poses([pixels for _, pixels, _ in waiting], [people for *_, people in waiting])
        for (source, pixels, _), poses in zip(waiting, found, strict=True):
            bar.update()
            yield Prediction(source, pixels, self._distinct(poses) if detected else poses)

    @torch.no_grad()
    def _poses(self, images: list[np.ndarray], people: list[Boxes]) -> list[Poses]:
        counts = [len(each.boxes) for each in people]
        owner = np.repeat(np.arange(len(images)), counts)  # row -> image
        boxes = np.concatenate([each.boxes for each in people])
        box_scores = np.concatenate([each.scores for each in people])
        keypoints = Keypoints(torch.zeros(0, len(self.skeleton.names), 2), torch.zeros(0, len(self.skeleton.names)))
        if len(boxes):
            keypoints = self._keypoints([images[index] for index in owner], torch.from_numpy(boxes))
        person_scores = rescore(keypoints.scores, torch.from_numpy(box_scores))
        columns = (keypoints.coordinates.numpy(), keypoints.scores.numpy(), boxes, person_scores.numpy())
        ends = np.cumsum(counts)[:-1]
        return [Poses(*rows) for rows in zip(*(np.split(column, ends) for column in columns), strict=True)]

    def _keypoints(self, images: list[np.ndarray], boxes: Tensor) -> Keypoints:
        """Of boxes [N, 4] and the image of each, on the host."""
        center, scale = center_and_scale(boxes, self.config.input_size)
        matrices = crop_matrices(center, scale, torch.zeros(len(boxes)), self.config.input_size)
        grid = self.config.feature_size if self.config.head == "heatmap" else (1, 1)
        found = []
        for start in range(0, len(boxes), self.batch_size):
            rows = range(start, min(start + self.batch_size, len(boxes)))
            crops = torch.cat([self._crop(images[row], matrices[row]) for row in rows])
            coordinates, scores = self._read(normalize(crops))
            batch = slice(rows.start, rows.stop)
            coordinates = to_image(coordinates, center[batch].to(coordinates), scale[batch].to(coordinates), grid)
            found.append((coordinates.float().cpu(), scores.float().cpu()))
        return Keypoints(*(torch.cat(column) for column in zip(*found, strict=True)))

    def _crop(self, image: np.ndarray, matrix: Tensor) -> Tensor:
        """uint8 [1, 3, H, W] on the device, where no more of the image is brought than the crop shows."""
        part, matrix = _visible_part(image, matrix, self.config.input_size)
        pixels = torch.from_numpy(part).to(self.device).permute(2, 0, 1)[None]
        return warp_batch(pixels, matrix.to(self.device), self.config.input_size)

    def _read(self, crops: Tensor) -> Keypoints:
        """Key points on the grid of the model's output."""
        pairs = self.skeleton.flip_pairs
        if self.config.head == "heatmap":
            maps = predict_flipped(self._forward, crops, pairs) if self.flip else self._forward(crops)
            return decode_heatmaps(maps, self.method)
        decode = decode_regression if self.config.head == "rle" else decode_token_regression
        if self.flip:
            return predict_flipped_regression(self._forward, crops, pairs, decode=decode)
        return decode(self._forward(crops))

    def _forward(self, crops: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return full_precision(self.model(crops))

    def _distinct(self, poses: Poses) -> Poses:
        """Without people who are the same as a better one; the best first."""
        if len(poses.boxes) < 2:
            return poses
        _, scale = center_and_scale(torch.from_numpy(poses.boxes), self.config.input_size)
        areas = (scale * PIXELS_PER_SCALE).prod(-1).float()  # of padded boxes, as in the published evaluation
        keypoints, scores = torch.from_numpy(poses.keypoints), torch.from_numpy(poses.person_scores)
        kept = oks_nms(keypoints, scores, areas, sigmas=self.skeleton.sigmas).numpy()
        return Poses(*(column[kept] for column in poses))


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
        self.device, self.threshold, self.processor = _device(device), threshold, processor
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


def load_image(source: ImageSource) -> np.ndarray:
    """uint8 [H, W, 3], RGB, turned upright. Errors: PoseError for files that are no image, and other arrays."""
    if isinstance(source, np.ndarray):
        return _as_rgb(source)
    try:
        if isinstance(source, Image.Image):
            return _upright(source)
        with Image.open(source) as opened:
            return _upright(opened)
    # Pillow has no class of its own for what is wrong in a file
    except (OSError, SyntaxError, ValueError, TypeError, Image.DecompressionBombError) as error:
        raise PoseError(f"{_name(source)} cannot be read as an image: {_first_line(error)}") from error


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
        what = f"there is no {error}" if isinstance(error, KeyError) else _first_line(error)
        raise PoseError(
            f"{path} cannot be read as boxes ({what}): write {{'photo.jpg': [[x, y, width, height], ...]}}, a COCO "
            "annotation file, or a list of {'file_name', 'bbox', 'score'}"
        ) from error


def coco_results(poses: Poses, image_id: int, file_name: str) -> list[dict[str, Any]]:
    """Rows of a COCO result file, one for each person; `keypoints` is x, y and score of each key point in turn."""
    rows = []
    for keypoints, scores, box, score in zip(*poses, strict=True):
        triples = np.concatenate((keypoints, scores[:, None]), 1)
        rows.append(
            {
                "image_id": image_id,
                "file_name": file_name,
                "category_id": PERSON,
                "keypoints": [round(float(value), 4) for value in triples.flatten()],
                "score": round(float(score), 6),
                "bbox": [round(float(value), 3) for value in box],
            }
        )
    return rows


class Video:
    """Frames of a video, uint8 [H, W, 3] each, as they come; `fps`, and `count`, 0 where the file does not say.

    Needs PyAV. Errors: PoseError where it is missing, and for files that are no video.
    """

    def __init__(self, path: str | Path) -> None:
        self.path, av = Path(path), _av()
        try:
            with av.open(str(path)) as file:
                stream = file.streams.video[0]
                self.fps = float(stream.average_rate or stream.guessed_rate or 25)
                self.count = stream.frames
        except (av.FFmpegError, IndexError) as error:
            raise PoseError(f"{path} cannot be read as a video: {_no_stream(error)}") from error

    def __length_hint__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[np.ndarray]:
        av = _av()
        try:
            with av.open(str(self.path)) as file:
                file.streams.video[0].thread_type = "AUTO"
                for frame in file.decode(video=0):
                    turns = round(getattr(frame, "rotation", 0) / 90)  # telephones note how they were held
                    yield np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns))
        except av.FFmpegError as error:
            raise PoseError(f"{self.path} cannot be read on: {_no_stream(error)}") from error


def write_video(path: str | Path, frames: Iterable[np.ndarray], fps: float) -> int:
    """Write frames, uint8 [H, W, 3], as H.264 in .mp4, as they come; how many there were.

    The file appears when it is whole. Odd sizes lose their last row or column, which the format has no place for.
    Needs PyAV. Errors: PoseError where it is missing, and where `path` exists, cannot be written or is no .mp4.
    """
    path, av = Path(path), _av()
    if path.suffix.lower() != ".mp4" or path.exists():
        raise PoseError(f"write_video({str(path)!r}): " + ("this file exists" if path.exists() else "name it .mp4"))
    partial = path.with_name(f".{path.stem}.partial.mp4")
    count = 0
    try:
        with av.open(str(partial), "w") as file:
            stream = file.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": "20"})
            stream.pix_fmt = "yuv420p"
            for frame in frames:
                height, width = (size - size % 2 for size in frame.shape[:2])
                if not count:
                    stream.width, stream.height = width, height
                pixels = np.ascontiguousarray(frame[:height, :width])
                file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
                count += 1
            if not count:
                raise PoseError(f"write_video({str(path)!r}): there is no frame to write")
            file.mux(stream.encode())
        partial.rename(path)
    except (av.FFmpegError, OSError) as error:
        raise PoseError(f"{path} cannot be written: {_first_line(error)}") from error
    finally:
        partial.unlink(missing_ok=True)
    return count


def _check_settings(model: nn.Module, skeleton: Skeleton, batch_size: int, precision: str) -> None:
    keypoints = getattr(getattr(model, "config", None), "num_keypoints", None)
    if keypoints is None:
        raise PoseError(
            f"PosePredictor takes a model of create_model or from_pretrained, and got a {type(model).__name__}"
        )
    if keypoints != len(skeleton.names):
        raise PoseError(
            f"PosePredictor: the model has {keypoints} key points, and the skeleton {len(skeleton.names)}: pass "
            "skeleton=COCO for 17, CROWDPOSE for CrowdPose's 14, or a Skeleton of your own"
        )
    if batch_size < 1:
        raise PoseError(f"PosePredictor(batch_size={batch_size}) needs at least one person in a batch")
    if precision not in ("fp32", "bf16"):
        raise PoseError(f"PosePredictor(precision={precision!r}): there are 'fp32' and 'bf16'")


def _device(device: str | torch.device | None) -> torch.device:
    try:
        return torch.empty(0, device=device or ("cuda" if torch.cuda.is_available() else "cpu")).device
    except (RuntimeError, AssertionError) as error:  # no such name, or not there
        raise PoseError(f"device={str(device)!r} cannot be used: {_first_line(error)}") from error


def _as_rgb(array: np.ndarray) -> np.ndarray:
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels not in (1, 3, 4) or not array.size:
        raise PoseError(
            f"an image is an array uint8 [H, W, 3], and this one is {array.dtype} {list(array.shape)}: values from 0 "
            "to 1 become (255 * image).astype('uint8'), and channels go last"
        )
    if channels == 3:
        return np.ascontiguousarray(array)
    return np.array(Image.fromarray(array.reshape(array.shape[:2]) if channels == 1 else array).convert("RGB"))


def _upright(image: Image.Image) -> np.ndarray:
    return np.array(ImageOps.exif_transpose(image).convert("RGB"))


def _name(source: ImageSource) -> str:
    return str(source) if isinstance(source, str | Path) else "this image"


def _first_line(error: Exception) -> str:
    said = getattr(error, "strerror", None) or str(error).strip()
    return next(iter(said.splitlines()), type(error).__name__)


def _check_boxes(name: str, image: np.ndarray, boxes: Boxes | Sequence[Any] | np.ndarray | None) -> Boxes:
    """The whole image where `boxes` is None; scores of 1 where there are none."""
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
    x, y, w, h = given.T
    usable = np.isfinite(given).all(1) & (w > 0) & (h > 0) & (x < width) & (y < height) & (x + w > 0) & (y + h > 0)
    if not usable.all():
        row = int(np.flatnonzero(~usable)[0])
        raise PoseError(
            f"{name}: box {row} is {given[row].tolist()}, and a box (x, y, width, height) has a size above 0 and some "
            f"of the image in it, which is {width} x {height} px; leave it out"
        )
    return Boxes(given, weights)


def _boxes_of(
    source: ImageSource, image: np.ndarray, boxes: Mapping[str, Any] | None, detector: Detector | None
) -> Boxes:
    if detector is not None:
        return _check_boxes(_name(source), image, detector(image))
    if boxes is None:
        return _check_boxes(_name(source), image, None)
    name = Path(source).name if isinstance(source, str | Path) else "an image that is no file"
    if name not in boxes:
        raise PoseError(f"there are no boxes for {name}: where there is nobody they are []")
    return _check_boxes(_name(source), image, boxes[name])


def _visible_part(image: np.ndarray, matrix: Tensor, size: tuple[int, int]) -> tuple[np.ndarray, Tensor]:
    """The part of the image that a crop of this size shows, and the matrix [1, 2, 3] from its pixels to the crop's."""
    height, width = size
    corners = torch.tensor([[[0, 0], [width, 0], [0, height], [width, height]]])
    corners = transform_points(invert_matrices(matrix[None]), corners)[0]
    # two pixels more, as the outermost of the crop are interpolated between them
    left, top = (max(0, math.floor(low) - 2) for low in corners.amin(0).tolist())
    right, bottom = (math.ceil(high) + 2 for high in corners.amax(0).tolist())
    shift = torch.tensor([[[1.0, 0.0, left], [0.0, 1.0, top]]])
    return np.ascontiguousarray(image[top:bottom, left:right]), compose_matrices(matrix[None], shift)


def _read_ahead(
    images: Iterable[ImageSource], on_unreadable: Callable[[ImageSource, PoseError], None] | None
) -> Iterator[tuple[ImageSource, np.ndarray]]:
    """Images in order, of which a few are always being decoded."""
    sources, reading = iter(images), deque[tuple[ImageSource, Future[np.ndarray]]]()
    with ThreadPoolExecutor(READ_AHEAD) as pool:
        while True:
            for source in islice(sources, 2 * READ_AHEAD - len(reading)):
                reading.append((source, pool.submit(load_image, source)))
            if not reading:
                return
            source, future = reading.popleft()
            try:
                pixels = future.result()
            except PoseError as error:
                if on_unreadable is None:
                    raise
                on_unreadable(source, error)
            else:
                yield source, pixels


def _load_detector(name: str | Path, processor: Any) -> tuple[nn.Module, Any]:
    try:
        from transformers import AutoImageProcessor, AutoModelForObjectDetection
    except ImportError as error:
        raise PoseError("HFDetector needs transformers: pip install transformers") from error
    try:
        model = AutoModelForObjectDetection.from_pretrained(str(name), use_safetensors=True)
        return model, processor or AutoImageProcessor.from_pretrained(str(name))
    except (OSError, ValueError, ImportError) as error:  # no such repository, another kind of model, timm missing
        raise PoseError(f"HFDetector({str(name)!r}) cannot be loaded: {_first_line(error)}") from error


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


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise PoseError("video needs PyAV: pip install av") from error
    return av


def _no_stream(error: Exception) -> str:
    return "there are no pictures in it" if isinstance(error, IndexError) else _first_line(error)
