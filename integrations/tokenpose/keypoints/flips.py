"""Averaging with the mirrored image: mirror the output back, exchange left and right, take the mean.

Where the map's pixel is the input's divided by the stride s, mirroring both leaves a key point 1 - 1 / s pixels too far
left: W - 1 - x stands at w - 1 / s - x / s, and that mirrored at x / s - (1 - 1 / s). Hence the shift by one, which
models in mmpose's convention need; those trained by TokenPose's own code, with maps aligned at both ends, do not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import index

import torch
from torch import Tensor

from cyclekd.integrations.tokenpose.errors import PoseError
from cyclekd.integrations.tokenpose.keypoints.decoding import Keypoints, decode_regression
from cyclekd.integrations.tokenpose.shapes import check_shape

Pairs = Sequence[tuple[int, int]]
"""(left, right) indices of key points, such as COCO.flip_pairs."""


@torch.no_grad()
def predict_flipped(model: Callable[[Tensor], Tensor], images: Tensor, pairs: Pairs, *, shift: bool = True) -> Tensor:
    """Heat maps [B, K, h, w] of images [B, 3, H, W], averaged with those of the mirrored images; no gradient.

    The model is used in the mode that it is in: call `model.eval()` before, as for any evaluation.
    """
    return average_flipped(model(images), model(images.flip(-1)), pairs, shift=shift)


@torch.no_grad()
def predict_flipped_regression(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    pairs: Pairs,
    *,
    decode: Callable[[Tensor], Keypoints] = decode_regression,
    image_width: int | None = None,
) -> Keypoints:
    """Regressed key points of images [B, 3, H, W], averaged with those of the mirrored images; no gradient.

    `decode` is `decode_regression` or `decode_token_regression`. Decoded values are averaged, since the published
    evaluation averages sigmas after their sigmoid; `image_width` as in `flip_back_regression`.
    """
    plain = decode(model(images))
    mirrored = decode(flip_back_regression(model(images.flip(-1)), pairs, image_width=image_width))
    return Keypoints((plain.coordinates + mirrored.coordinates) / 2, (plain.scores + mirrored.scores) / 2)


def average_flipped(heatmaps: Tensor, heatmaps_of_mirrored: Tensor, pairs: Pairs, *, shift: bool = True) -> Tensor:
    """Mean of heat maps [B, K, h, w] and, flipped back, those of the mirrored images. PoseError where shapes differ."""
    check_shape("average_flipped: heatmaps", heatmaps, "B", "K", "h", "w")
    check_shape("average_flipped: heatmaps_of_mirrored", heatmaps_of_mirrored, *heatmaps.shape)
    return (heatmaps + flip_back(heatmaps_of_mirrored, pairs, shift=shift)) / 2


def flip_back(heatmaps_of_mirrored: Tensor, pairs: Pairs, *, shift: bool = True) -> Tensor:
    """Heat maps [B, K, h, w] of mirrored images as maps of the images: mirrored, with left and right exchanged.

    `shift` moves them right by one pixel, the first column staying as it is (mmpose); without it, TokenPose's own
    evaluation. PoseError for pairs that do not fit K.
    """
    check_shape("flip_back: heatmaps", heatmaps_of_mirrored, "B", "K", "h", "w")
    heatmaps = exchange_sides(heatmaps_of_mirrored.flip(-1), pairs)
    return torch.cat((heatmaps[..., :1], heatmaps[..., :-1]), -1) if shift else heatmaps


def flip_back_regression(output_of_mirrored: Tensor, pairs: Pairs, *, image_width: int | None = None) -> Tensor:
    """Regressed (x, y, ...) [B, K, C] of mirrored images as those of the images: x becomes 1 - x, sides exchanged.

    Everything after x and y moves with its key point: DistilPose's own evaluation leaves the confidences unexchanged.
    With `image_width`, x becomes 1 - 1 / image_width - x, which mirrors pixel to pixel (mmpose's own RLE settings).
    """
    check_shape("flip_back_regression: output", output_of_mirrored, "B", "K", "C")
    output = exchange_sides(output_of_mirrored, pairs)
    right = 1.0 if image_width is None else 1 - 1 / image_width
    return torch.cat((right - output[..., :1], output[..., 1:]), -1)


def exchange_sides(output: Tensor, pairs: Pairs) -> Tensor:
    """The output [B, K, ...] with the key points of every pair exchanged; PoseError for pairs that do not fit K."""
    order = _exchanged(output.shape[1], pairs)
    # not output[:, order], for which a GPU would wait until the list has arrived
    return torch.stack([output[:, keypoint] for keypoint in order], 1)


def _exchanged(keypoints: int, pairs: Pairs) -> list[int]:
    order = list(range(keypoints))
    try:
        plain = [tuple(index(keypoint) for keypoint in pair) for pair in pairs]  # of a tensor or an array, too
    except TypeError:  # no pairs, or no whole numbers
        plain = [()]
    named = [keypoint for pair in plain for keypoint in pair]
    if any(len(pair) != 2 for pair in plain) or len(set(named)) < len(named) or not set(named) <= set(order):
        raise PoseError(
            f"the pairs {pairs} do not fit {keypoints} key points: every index is from 0 to {keypoints - 1} and "
            "in one pair at most; pass the skeleton's own, COCO.flip_pairs for 17 or CROWDPOSE.flip_pairs for 14"
        )
    for left, right in plain:
        order[left], order[right] = right, left
    return order
