"""From photographs and video to people's key points in pixels of the picture.

The model sees crops as its evaluation cuts them, and the next images are decoded while it works.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import length_hint
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from cyclekd.integrations.tokenpose.data.warp import normalize, warp_batch
from cyclekd.integrations.tokenpose.errors import PoseError
from cyclekd.integrations.tokenpose.evaluation.scoring import oks_nms, rescore
from cyclekd.integrations.tokenpose.keypoints.decoding import (
    PIXELS_PER_SCALE,
    Keypoints,
    decode_heatmaps,
    decode_regression,
    decode_token_regression,
    to_image,
)
from cyclekd.integrations.tokenpose.keypoints.flips import predict_flipped, predict_flipped_regression
from cyclekd.integrations.tokenpose.keypoints.geometry import (
    center_and_scale,
    compose_matrices,
    crop_matrices,
    invert_matrices,
    transform_points,
)
from cyclekd.integrations.tokenpose.models.config import PoseConfig
from cyclekd.integrations.tokenpose.prediction.detection import Boxes, Detector, check_boxes, find_device
from cyclekd.integrations.tokenpose.prediction.photos import ImageSource, load_image, name_of, read_ahead
from cyclekd.integrations.tokenpose.shapes import full_precision
from cyclekd.integrations.tokenpose.skeletons import COCO, Skeleton

MOST_WAITING = 2**28
"""Bytes of images that wait for a batch of people to be full."""

Precision = Literal["fp32", "bf16"]


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


class PosePredictor:
    """A pose model with all that belongs round it: `predictor(image, boxes)` gives `Poses` in pixels of the image.

    `image` is a path, a Pillow image or an array uint8 [H, W, 3]; grey and transparent ones are converted. `boxes`
    [N, 4] are (x, y, width, height) in its pixels, and may reach beyond it; None stands for the whole image as one.
    With a detector it is `predictor(image, detector(image))`.

    `flip` averages with the mirrored image, as the papers report it, and takes twice the time; `method` is that of
    `decode_heatmaps`. Crops are those of mmpose's convention, in which this library trains. The model is moved to
    `device` (a GPU where there is one), and put into evaluation mode at every call.
    Errors: PoseError for a skeleton with another number of key points, a model in half precision, images that cannot be
    read, and boxes that are not finite, empty or wholly outside of the image.
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
        self.device = find_device(device)
        self.model, self.skeleton = model.to(self.device), skeleton
        self.config: PoseConfig = model.config
        self.batch_size, self.flip, self.method, self.precision = batch_size, flip, method, precision

    def __call__(self, image: ImageSource, boxes: Boxes | Sequence[Any] | np.ndarray | None = None) -> Poses:
        pixels = load_image(image)
        return self._poses([pixels], [check_boxes(name_of(image), pixels, boxes)])[0]

    def predict_images(
        self,
        images: Iterable[ImageSource],
        boxes: Mapping[str, Boxes | Sequence[Any] | np.ndarray] | None = None,
        *,
        detector: Detector | None = None,
        progress: bool = True,
        on_left_out: Callable[[ImageSource, PoseError], None] | None = None,
    ) -> Iterator[Prediction]:
        """A `Prediction` for each image, in order and as they come, so that any number of images takes little memory.

        `boxes` are by file name (`read_boxes`); an image without people has none, as in `{"empty.jpg": []}`. With a
        detector, of people who are the same to 0.9 OKS the best one is left. Neither of both: the whole images. People
        of several images share batches. `on_left_out` is called for an image that cannot be read, or that has a box
        which cannot be used, and why; without it that raises PoseError.
        """
        if boxes is not None and detector is not None:
            raise PoseError("predict_images got both boxes and a detector: leave out one of them")
        if detector is not None:
            _check_sigmas(self.skeleton)

        def leave_out(source: ImageSource, error: PoseError) -> None:
            if on_left_out is None:
                raise error
            bar.update()
            on_left_out(source, error)

        waiting: list[tuple[ImageSource, np.ndarray, Boxes]] = []
        with tqdm(total=length_hint(images) or None, unit=" images", disable=None if progress else True) as bar:
            for source, pixels in read_ahead(images, leave_out):
                wanted = _boxes_of(source, pixels, boxes, detector)
                try:
                    waiting.append((source, pixels, check_boxes(name_of(source), pixels, wanted)))
                except PoseError as error:
                    leave_out(source, error)
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
        self.model.eval()  # a training that goes on in between has put it back
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
            width = self.config.input_size[1] if self.config.head == "rle" else None  # as an evaluation has it
            return predict_flipped_regression(self._forward, crops, pairs, decode=decode, image_width=width)
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


def _check_settings(model: nn.Module, skeleton: Skeleton, batch_size: int, precision: str) -> None:
    keypoints = getattr(getattr(model, "config", None), "num_keypoints", None)
    if keypoints is None:
        raise PoseError(
            f"PosePredictor takes a model of create_model or from_pretrained, and got a {type(model).__name__}"
        )
    if keypoints != len(skeleton.names):
        raise PoseError(
            f"PosePredictor: the model has {keypoints} key points, and the skeleton {len(skeleton.names)}: pass "
            "skeleton=COCO for 17, CROWDPOSE for CrowdPose's 14, or a Skeleton of your own (--skeleton of the example)"
        )
    half = {weight.dtype for weight in model.parameters()} & {torch.float16, torch.bfloat16}
    if half:
        raise PoseError(
            f"PosePredictor: the model's weights are {half.pop()}: pass model.float(), and precision='bf16' to compute "
            "in half precision"
        )
    if batch_size < 1:
        raise PoseError(f"PosePredictor(batch_size={batch_size}) needs at least one person in a batch")
    if precision not in ("fp32", "bf16"):
        raise PoseError(f"PosePredictor(precision={precision!r}): there are 'fp32' and 'bf16'")


def _check_sigmas(skeleton: Skeleton) -> None:
    count = len(skeleton.names)
    if len(skeleton.sigmas) != count:
        raise PoseError(
            f"predict_images with a detector tells people apart by the {count} sigmas of their key points, and this "
            f'skeleton has {len(skeleton.sigmas)}: add "sigmas" to the category of its annotation file, such as '
            f"[0.05] * {count}"
        )


def _boxes_of(
    source: ImageSource, image: np.ndarray, boxes: Mapping[str, Any] | None, detector: Detector | None
) -> Boxes | Sequence[Any] | np.ndarray | None:
    if detector is not None:
        return detector(image)
    if boxes is None:
        return None
    name = Path(source).name if isinstance(source, str | Path) else "an image that is no file"
    if name not in boxes:
        raise PoseError(f"there are no boxes for {name}: where there is nobody they are []")
    return boxes[name]


def _visible_part(image: np.ndarray, matrix: Tensor, size: tuple[int, int]) -> tuple[np.ndarray, Tensor]:
    """The part of the image that a crop of this size shows, and the matrix [1, 2, 3] from its pixels to the crop's."""
    height, width = size
    corners = torch.tensor([[[0, 0], [width, 0], [0, height], [width, height]]])
    corners = transform_points(invert_matrices(matrix[None]), corners)[0]
    # two pixels more, as the outermost of the crop are interpolated between them
    left, top = (max(0, math.floor(low) - 2) for low in corners.amin(0).tolist())
    right, bottom = (math.ceil(high) + 2 for high in corners.amax(0).tolist())
    shift = torch.tensor([[[1.0, 0.0, left], [0.0, 1.0, top]]])
    return image[top:bottom, left:right].copy(), compose_matrices(matrix[None], shift)
