"""What the parts share: sizes, the check of a tensor's axes, and the precision to compute in.

Axes are checked, values never: reading a value would make a GPU wait.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cyclekd.integrations.tokenpose.errors import PoseError

Size = tuple[int, int]
"""Height and width in pixels."""


def check_shape(what: str, tensor: Tensor, *axes: str | int, hint: str = "") -> None:
    """Raises PoseError unless `tensor` has these axes: a number must be met, a name stands for any size."""
    fits = tensor.ndim == len(axes) and all(
        isinstance(axis, str) or axis == size for axis, size in zip(axes, tensor.shape, strict=True)
    )
    if not fits:
        single = tensor.ndim == len(axes) - 1
        raise PoseError(
            f"{what} takes [{', '.join(map(str, axes))}], and this tensor is {list(tensor.shape)}: "
            + (hint or ("a single one is a batch of one, tensor[None]" if single else "pass one of that shape"))
        )


def check_sigmas(what: str, sigmas: Sequence[float], keypoints: int) -> None:
    """Raises PoseError unless there is one sigma per key point."""
    if len(sigmas) != keypoints:
        raise PoseError(
            f"{what} got {len(sigmas)} sigmas for {keypoints} key points: pass the skeleton's own, such as COCO.sigmas "
            "for 17 or CROWDPOSE.sigmas for 14"
        )


def full_precision(tensor: Tensor) -> Tensor:
    """The tensor in float32, or as it is in float64; half precision cannot tell pixels of a large image."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
