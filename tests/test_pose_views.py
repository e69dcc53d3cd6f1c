"""Random views: mmpose's order of steps done one by one on a mirrored image, what is drawn, and half bodies."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from cyclekd.integrations.tokenpose.data.views import (
    Numbers,
    View,
    ViewSettings,
    numbers_of,
    plain_views,
    random_views,
    view_keypoints,
    view_matrices,
)
from cyclekd.integrations.tokenpose.data.warp import warp_exact
from cyclekd.integrations.tokenpose.errors import PoseError
from cyclekd.integrations.tokenpose.keypoints.geometry import crop_matrices, crop_matrices_aligned, transform_points
from cyclekd.integrations.tokenpose.skeletons import COCO, CROWDPOSE, Skeleton

SIZE, WIDTH = (256, 192), 640
CENTER, SCALE = torch.tensor([310.5, 205.0]).double(), torch.tensor([0.9, 1.2]).double()
NOTHING = ViewSettings(shift_probability=0, flip=0, half_body=0, scale=0, rotation_probability=0)
SMALL = View(torch.tensor([[14.3, 21.0]]), torch.tensor([[0.12, 0.16]]), torch.tensor([25.0]), torch.tensor([True]))


def person(skeleton: Skeleton = COCO, unlabelled: tuple[int, ...] = (), x: float = 3, y: float = 6) -> Tensor:
    """Key points [K, 3] on a spiral round the centre; those not labelled are (0, 0, 0), as in COCO's files."""
    k = torch.arange(len(skeleton.names)).double()
    points = torch.stack((310 + x * k * torch.cos(k), 205 + y * k * torch.sin(1.3 * k), 1 + k % 2), 1)
    points[list(unlabelled)] = 0
    return points


def views(settings: ViewSettings, seeds: range, keypoints: Tensor | None = None, skeleton: Skeleton = COCO) -> View:
    """Of one person as often as there are seeds."""
    keypoints = (person() if keypoints is None else keypoints).expand(len(seeds), -1, -1)
    boxes = CENTER.expand(len(seeds), 2), SCALE.expand(len(seeds), 2)
    return random_views(*boxes, keypoints, skeleton, settings, numbers_of(seeds))


# -- mmpose's steps, one by one, on an image that is mirrored on the way ----------------------------------------------


def step_by_step(
    keypoints: list[list[float]], skeleton: Skeleton, settings: ViewSettings, state: torch.Generator
) -> tuple[Tensor, list[list[float]], list[str]]:
    """The crop's matrix from the (mirrored) image, the key points in that image, and what was done."""
    uniform, normal = torch.rand(6, generator=state, dtype=torch.float64), torch.randn(3, generator=state).double()
    done = []
    center, scale = CENTER.tolist(), SCALE.tolist()
    if uniform[0] < settings.shift_probability:
        center = [
            c + (2 * float(u) - 1) * settings.shift * s * 200
            for c, u, s in zip(center, uniform[1:3], scale, strict=True)
        ]
        done.append("shift")
    if uniform[3] < settings.flip:
        keypoints = [[WIDTH - 1 - x, y, visible] for x, y, visible in keypoints]
        for left, right in skeleton.flip_pairs:
            keypoints[left], keypoints[right] = keypoints[right], keypoints[left]
        center[0] = WIDTH - 1 - center[0]
        done.append("flip")
    labelled = [i for i, point in enumerate(keypoints) if point[2] > 0]
    if len(labelled) > settings.half_body_keypoints and uniform[4] < settings.half_body:
        upper = [keypoints[i] for i in labelled if i in skeleton.upper_body]
        lower = [keypoints[i] for i in labelled if i not in skeleton.upper_body]
        if normal[0] < 0.5 and len(upper) > 2:
            half = upper
        elif len(lower) > 2:
            half = lower
        else:
            half = upper
        if len(half) >= 2:
            center = [sum(point[axis] for point in half) / len(half) for axis in (0, 1)]
            w, h = (max(p[axis] for p in half) - min(p[axis] for p in half) for axis in (0, 1))
            if w > 0.75 * h:
                h = w / 0.75
            else:
                w = h * 0.75
            scale = [1.5 * w / 200, 1.5 * h / 200]
            done.append("upper" if half is upper else "lower")
    factor = np.clip(1 + settings.scale * float(normal[1]), 1 - settings.scale, 1 + settings.scale)
    degrees = 0.0
    if uniform[5] < settings.rotation_probability:
        degrees = np.clip(settings.rotation * float(normal[2]), -2 * settings.rotation, 2 * settings.rotation)
        done.append("rotation")
    scale = torch.tensor(scale).double() * factor
    matrix = crop_matrices(torch.tensor([center]).double(), scale[None], torch.tensor([degrees]).double(), SIZE)
    return matrix, keypoints, done


@pytest.mark.parametrize(
    ("keypoints", "skeleton", "settings"),
    [
        (person(COCO, (4, 9)), COCO, ViewSettings()),
        (person(COCO, (4, 9), x=9, y=2), COCO, ViewSettings()),
        (person(COCO, (11, 12, 14)), COCO, ViewSettings()),
        (person(COCO, tuple(range(8))), COCO, ViewSettings()),
        (person(CROWDPOSE, (4, 9)), CROWDPOSE, ViewSettings.crowdpose()),
    ],
    ids=["coco", "wide", "three of the lower half", "three of the upper half", "crowdpose"],
)
def test_views_equal_mmposes_steps_on_a_mirrored_image(
    keypoints: Tensor, skeleton: Skeleton, settings: ViewSettings
) -> None:
    seeds, seen = range(150), set()
    drawn = views(settings, seeds, keypoints, skeleton)
    points, visible = view_keypoints(keypoints.expand(150, -1, -1), drawn, skeleton, view_matrices(drawn, SIZE))
    for seed in seeds:
        state = torch.Generator().manual_seed(seed)
        matrix, moved, done = step_by_step(keypoints.tolist(), skeleton, settings, state)
        moved = torch.tensor(moved).double()
        assert torch.equal(visible[seed], moved[:, 2])
        labelled = visible[seed] > 0
        expected = transform_points(matrix, moved[None, :, :2])[0]
        torch.testing.assert_close(points[seed, labelled], expected[labelled], rtol=0, atol=1e-3)
        seen.update(done)
    assert seen == {"shift", "flip", "upper", "lower", "rotation"}


# -- what is drawn ----------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_view_whoever_else_is_in_the_batch_and_another_gives_another() -> None:
    """So that a run can go on with other batches; the numbers are those of runs begun with earlier versions."""
    people = torch.stack([person(unlabelled=tuple(range(first))) for first in range(12)])
    sizes = torch.stack((torch.linspace(0.5, 2, 12), torch.linspace(1.5, 1, 12)), 1)  # each with its own aspect
    center, scale = CENTER + torch.arange(24).view(12, 2), SCALE * sizes
    settings = ViewSettings(half_body=0.8)

    def drawn(rows: list[int], seeds: list[int]) -> View:
        return random_views(center[rows], scale[rows], people[rows], COCO, settings, numbers_of(seeds))

    together = drawn(list(range(12)), list(range(12)))
    for row in range(12):
        for field, alone in zip(together, drawn([row], [row]), strict=True):
            assert torch.equal(field[row], alone[0])
    assert not torch.equal(drawn([5], [5]).scale, drawn([5], [6]).scale)
    state = torch.Generator().manual_seed(7)
    uniform, normal = (each(n, generator=state, dtype=torch.float64) for each, n in ((torch.rand, 6), (torch.randn, 3)))
    assert torch.equal(numbers_of([3, 7]).uniform[1], uniform) and torch.equal(numbers_of([3, 7]).normal[1], normal)


def test_a_step_that_is_turned_off_leaves_the_others_as_they_were() -> None:
    usual = views(ViewSettings(half_body=0), range(40))
    without_rotation = views(ViewSettings(half_body=0, rotation_probability=0), range(40))
    assert torch.equal(usual.center, without_rotation.center) and torch.equal(usual.flip, without_rotation.flip)
    assert torch.equal(usual.scale, without_rotation.scale) and not without_rotation.rotation.any()
    without_shift = views(ViewSettings(half_body=0, shift_probability=0), range(40))
    assert torch.equal(usual.rotation, without_shift.rotation) and torch.equal(usual.flip, without_shift.flip)


def test_every_step_is_as_frequent_and_as_large_as_in_the_paper() -> None:
    drawn = views(ViewSettings(half_body=0), range(2000))
    shift = (drawn.center - CENTER) / (200 * SCALE)
    zoom = drawn.scale[:, 0] / SCALE[0]
    assert shift.ne(0).any(1).double().mean() == pytest.approx(0.3, abs=0.04)
    assert drawn.flip.double().mean() == pytest.approx(0.5, abs=0.04)
    assert drawn.rotation.ne(0).double().mean() == pytest.approx(0.6, abs=0.04)
    assert shift.abs().amax(0).tolist() == pytest.approx([0.16, 0.16], abs=0.002) and shift.abs().max() <= 0.16
    assert (zoom.min(), zoom.max()) == (pytest.approx(0.65), pytest.approx(1.35))
    assert (drawn.rotation.min(), drawn.rotation.max()) == (-90, 90)
    # of a normal draw, a share of 0.317 lies beyond its deviation, and 0.046 beyond twice that
    assert (zoom - 1).abs().gt(0.3499).double().mean() == pytest.approx(0.317, abs=0.04)
    turned = drawn.rotation[drawn.rotation != 0]
    assert turned.abs().eq(90).double().mean() == pytest.approx(0.046, abs=0.02)
    assert turned.clamp(-45, 45).abs().eq(45).double().mean() == pytest.approx(0.317, abs=0.04)


def test_nothing_drawn_is_the_plain_view() -> None:
    plain = plain_views(CENTER.expand(3, 2), SCALE.expand(3, 2))
    for settings in (NOTHING, ViewSettings(shift=0, flip=0, half_body=0, scale=0, rotation=0)):
        assert all(torch.equal(a, b) for a, b in zip(views(settings, range(3)), plain, strict=True))
    matrices = crop_matrices(CENTER[None], SCALE[None], torch.zeros(1), SIZE)
    assert torch.equal(view_matrices(plain, SIZE)[:1], matrices)
    aligned = crop_matrices_aligned(CENTER[None], SCALE[None], torch.zeros(1), SIZE)
    assert torch.equal(view_matrices(plain, SIZE, aligned=True)[:1], aligned)


# -- half bodies ------------------------------------------------------------------------------------------------

ALWAYS_HALF = replace(NOTHING, half_body=1.0)


def test_a_half_body_is_centred_on_its_labelled_keypoints_and_contains_them() -> None:
    keypoints = person(unlabelled=(2, 13))
    drawn = views(ALWAYS_HALF, range(2000), keypoints)
    halves = [[i for i in range(11) if i != 2], [11, 12, 14, 15, 16]]
    centers = [keypoints[half, :2].mean(0) for half in halves]
    is_upper = torch.isclose(drawn.center, centers[0]).all(1)
    assert (is_upper | torch.isclose(drawn.center, centers[1]).all(1)).all()
    assert is_upper.double().mean() == pytest.approx(0.69, abs=0.04)
    for half, rows in zip(halves, (is_upper, ~is_upper), strict=True):
        scale = drawn.scale[rows][0]
        width, height = (keypoints[half, :2].amax(0) - keypoints[half, :2].amin(0)).tolist()
        assert scale[0] / scale[1] == pytest.approx(0.75)
        assert (200 * scale / 1.5).tolist() == pytest.approx([max(width, height * 0.75), max(height, width / 0.75)])


def test_a_half_with_too_few_keypoints_gives_way_to_the_other() -> None:
    no_legs, no_head = person(unlabelled=(11, 12, 13, 14)), person(unlabelled=tuple(range(9)))
    assert torch.allclose(views(ALWAYS_HALF, range(30), no_legs).center, no_legs[:11, :2].mean(0))
    settings = replace(ALWAYS_HALF, half_body_keypoints=7)
    assert torch.allclose(views(settings, range(30), no_head).center, no_head[11:, :2].mean(0))


@pytest.mark.parametrize("labelled", [0, 1, 8])
def test_too_few_labelled_keypoints_leave_the_box_as_it_is(labelled: int) -> None:
    drawn = views(ALWAYS_HALF, range(20), person(unlabelled=tuple(range(labelled, 17))))
    assert torch.equal(drawn.center, CENTER.expand(20, 2)) and torch.equal(drawn.scale, SCALE.expand(20, 2))


def test_keypoints_on_one_spot_leave_the_box_as_it_is() -> None:
    drawn = views(ALWAYS_HALF, range(20), torch.tensor([[50.0, 60.0, 2.0]]).expand(17, 3))
    assert torch.equal(drawn.scale, SCALE.expand(20, 2))


# -- mirroring --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aligned", [False, True])
def test_a_mirrored_view_is_a_view_of_the_mirrored_image(aligned: bool) -> None:
    y, x, channel = np.meshgrid(np.arange(40), np.arange(30), np.arange(3), indexing="ij")
    image = (120 + 60 * np.sin(0.7 * x + channel) + 60 * np.cos(0.5 * y + 0.2 * x)).astype(np.uint8)
    in_mirrored = torch.tensor([29.0, 0.0]) + torch.tensor([-1.0, 1.0]) * SMALL.center
    matrix = (crop_matrices_aligned if aligned else crop_matrices)(in_mirrored, SMALL.scale, SMALL.rotation, (32, 24))
    expected = warp_exact(np.ascontiguousarray(image[:, ::-1]), matrix[0], (32, 24))
    found = warp_exact(image, view_matrices(SMALL, (32, 24), aligned=aligned)[0], (32, 24))
    assert expected.std() > 20
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_left_and_right_are_exchanged_in_mirrored_views_alone() -> None:
    plain = plain_views(torch.tensor([[100.0, 60.0]] * 2), torch.tensor([[0.96, 1.28]] * 2))  # lengths stay
    batch = plain._replace(flip=torch.tensor([False, True]))
    keypoints = person().float().expand(2, 17, 3).clone()
    keypoints[:, 5] = torch.tensor([110.0, 50.0, 2.0])  # the left shoulder, 10 px right of the centre
    keypoints[:, 6] = torch.tensor([85.0, 52.0, 0.0])
    points, visible = view_keypoints(keypoints, batch, COCO, view_matrices(batch, SIZE))
    torch.testing.assert_close(points[0, 5:7], torch.tensor([[106.0, 118.0], [81.0, 120.0]]))
    torch.testing.assert_close(points[1, 5:7], torch.tensor([[111.0, 120.0], [86.0, 118.0]]))
    assert visible[:, 5:7].tolist() == [[2, 0], [0, 2]]
    assert torch.equal(visible[:, 0], keypoints[:, 0, 2])


# -- batches and errors -----------------------------------------------------------------------------------------


def test_views_matrices_and_keypoints_read_no_value_of_a_device() -> None:
    two, keypoints = torch.ones(2, 2, device="meta"), torch.ones(2, 17, 3, device="meta")
    numbers = Numbers(torch.ones(2, 6, device="meta"), torch.ones(2, 3, device="meta"))
    view = random_views(two, two, keypoints, COCO, ViewSettings(), numbers)
    points, visible = view_keypoints(keypoints, view, COCO, view_matrices(view, SIZE))
    assert points.shape == (2, 17, 2) and visible.shape == (2, 17)


def test_views_have_the_precision_of_the_boxes_and_at_least_float32() -> None:
    for given, expected in (
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.half, torch.float32),
    ):
        box = torch.ones(1, 2, dtype=given)
        drawn = random_views(box, box, person()[None], COCO, ViewSettings(), numbers_of([0]))
        for view in (drawn, plain_views(box, box)):
            assert {field.dtype for field in view} == {expected, torch.bool}


def test_crowdposes_settings_are_mmposes() -> None:
    assert ViewSettings.crowdpose() == ViewSettings(
        shift=0.16,
        shift_probability=0.3,
        flip=0.5,
        half_body=0.3,
        half_body_keypoints=6,
        scale=0.5,
        rotation=40.0,
        rotation_probability=0.6,
    )


@pytest.mark.parametrize("name", ["shift_probability", "flip", "half_body", "rotation_probability"])
@pytest.mark.parametrize("value", [-0.1, 1.5, math.nan])
def test_a_probability_beyond_0_and_1_is_refused(name: str, value: float) -> None:
    with pytest.raises(PoseError, match=rf"ViewSettings\({name}={value}\): a probability is from 0 to 1"):
        ViewSettings(**{name: value})


@pytest.mark.parametrize("wrong", [{"scale": 1.0}, {"scale": -0.1}, {"rotation": -1.0}, {"shift": math.nan}])
def test_a_spread_that_no_view_can_have_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(PoseError, match=r"none is negative and scale is below 1"):
        ViewSettings(**wrong)


def test_other_shapes_are_refused() -> None:
    one, box = numbers_of([0]), (CENTER[None], SCALE[None])
    with pytest.raises(PoseError, match=r"random_views: keypoints takes \[1, 17, 3\].*\[1, 14, 3\]"):
        random_views(*box, person(CROWDPOSE)[None], COCO, ViewSettings(), one)
    with pytest.raises(PoseError, match=r"random_views: center takes \[1, 2\].*\[2\]"):
        random_views(CENTER, SCALE, person()[None], COCO, ViewSettings(), one)
    with pytest.raises(PoseError, match=r"random_views: center takes \[2, 2\].*\[1, 2\]"):
        random_views(*box, person()[None], COCO, ViewSettings(), numbers_of([0, 1]))
    with pytest.raises(PoseError, match=r"plain_views: scale takes \[1, 2\].*\[2\]"):
        plain_views(CENTER[None], SCALE)
    with pytest.raises(PoseError, match=r"view_matrices: view.flip takes \[N\]"):
        view_matrices(View(*(field[0] for field in SMALL)), SIZE)
    with pytest.raises(PoseError, match=r"view_keypoints: keypoints takes \[1, 17, 3\].*\[2, 17, 3\]"):
        view_keypoints(torch.ones(2, 17, 3), SMALL, COCO, view_matrices(SMALL, SIZE))
