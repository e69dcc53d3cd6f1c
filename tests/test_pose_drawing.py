"""Skeletons on images: only where limbs are, left and right told apart, and nothing for what was not found."""

import numpy as np
import pytest

from cyclekd.integrations.tokenpose import COCO, CROWDPOSE, PoseError, Skeleton
from cyclekd.integrations.tokenpose.prediction.drawing import contact_sheet, draw_poses

GREY = np.full((120, 90, 3), 128, np.uint8)
STICK = Skeleton(("left_end", "right_end", "middle"), ((0, 1),), (0.1,) * 3, (), ((0, 2), (2, 1)))
LINE = np.array([[[20.0, 60.0], [70.0, 60.0], [45.0, 60.0]]])  # left end, right end, middle
SURE = np.ones((1, 3))


def changed(drawn, image=GREY):
    return (drawn != image).any(-1)


def distance_to_line(start, end, shape):
    """[H, W]: of every pixel to the segment between two points."""
    y, x = np.mgrid[: shape[0], : shape[1]].astype(float)
    along = np.subtract(end, start)
    share = ((x - start[0]) * along[0] + (y - start[1]) * along[1]) / max(along @ along, 1e-9)
    share = share.clip(0, 1)
    return np.hypot(x - start[0] - share * along[0], y - start[1] - share * along[1])


def person(center, height):
    """COCO's key points of a standing person."""
    places = [(0, -50), (3, -53), (-3, -53), (6, -51), (-6, -51), (14, -35), (-14, -35), (20, -15), (-20, -15)]
    places += [(22, 2), (-22, 2), (9, 3), (-9, 3), (10, 27), (-10, 27), (10, 50), (-10, 50)]
    return np.array(center) + np.array(places) * height / 100


def test_only_pixels_near_a_limb_change_and_the_image_given_does_not():
    before = GREY.copy()
    keypoints = person((45, 60), 90)[None]
    drawn = draw_poses(GREY, keypoints, np.ones((1, 17)), COCO)
    nearest = np.min([distance_to_line(*keypoints[0, list(limb)], GREY.shape) for limb in COCO.limbs], axis=0)
    assert drawn.dtype == np.uint8 and drawn.shape == GREY.shape and np.array_equal(GREY, before)
    assert changed(drawn)[nearest < 0.5].all() and not changed(drawn)[nearest > 4].any()


def test_a_joint_is_drawn_round_its_pixels_centre():
    skeleton = Skeleton(("only",), (), (0.1,), (), ())
    image = np.zeros((21, 21, 3), np.uint8)
    drawn = draw_poses(image, np.array([[[10.0, 10.0]]]), np.ones((1, 1)), skeleton).astype(float)
    weights = drawn.sum(-1)
    y, x = np.mgrid[:21, :21]
    assert weights.sum() > 0
    assert np.allclose([(weights * x).sum() / weights.sum(), (weights * y).sum() / weights.sum()], 10, atol=0.15)


def test_left_is_warm_and_right_is_cool():
    drawn = draw_poses(GREY, LINE, SURE, STICK).astype(int)
    (red, _, blue), (other_red, _, other_blue) = drawn[60, 32], drawn[60, 58]  # between two key points
    assert red - blue > 80 and other_blue - other_red > 80


def test_every_limb_of_a_side_has_its_familys_colours_and_those_between_sides_have_neither():
    for skeleton in (COCO, CROWDPOSE):
        for a, b in skeleton.limbs:
            keypoints, scores = np.zeros((1, len(skeleton.names), 2)), np.zeros((1, len(skeleton.names)))
            keypoints[0, [a, b]], scores[0, [a, b]] = [(20, 60), (70, 60)], 1
            red, green, blue = draw_poses(GREY, keypoints, scores, skeleton)[60, 45].astype(int)
            sides = {name.split("_")[0] for name in (skeleton.names[a], skeleton.names[b])} & {"left", "right"}
            assert (red > blue + 40) == (sides == {"left"}), (a, b)
            assert (blue > red + 40) == (sides == {"right"}), (a, b)
            assert (green > max(red, blue) + 40) == (len(sides) != 1), (a, b)


def test_what_scores_below_the_threshold_is_left_out_with_its_limbs():
    scores = np.array([[0.9, 0.29, 0.9]])
    drawn = draw_poses(GREY, LINE, scores, STICK)
    assert changed(drawn)[:, :40].any() and not changed(drawn)[:, 52:].any()
    assert changed(draw_poses(GREY, LINE, scores, STICK, threshold=0.2))[:, 52:].any()
    assert not changed(draw_poses(GREY, LINE, np.zeros((1, 3)), STICK)).any()


def test_nobody_and_coordinates_that_are_no_number_or_far_outside_draw_nothing():
    assert not changed(draw_poses(GREY, np.zeros((0, 17, 2)), np.zeros((0, 17)), COCO)).any()
    for value in (np.nan, np.inf, -np.inf, 1e9, -1e9):
        assert not changed(draw_poses(GREY, np.full((1, 17, 2), value), np.ones((1, 17)), COCO)).any(), value
    assert not changed(draw_poses(GREY, LINE - np.array([89, 0]), SURE, STICK)).any()  # near, but wholly outside


def test_limbs_that_leave_the_image_are_drawn_up_to_its_border():
    drawn = draw_poses(GREY, LINE + np.array([40, 0]), SURE, STICK)
    assert changed(drawn)[60, 60:].all()


def test_larger_people_have_thicker_limbs():
    image = np.full((400, 300, 3), 128, np.uint8)
    widths = [changed(draw_poses(image, LINE * size, SURE, STICK), image)[:, 32 * size].sum() for size in (1, 4)]
    assert widths[1] > 1.5 * widths[0] > 0


def test_edges_are_smooth():
    slanted = np.array([[[20.0, 20.0], [70.0, 100.0], [45.0, 60.0]]])
    drawn = draw_poses(GREY, slanted, SURE, STICK)
    assert len(np.unique(drawn[changed(drawn)].reshape(-1, 3), axis=0)) > 12  # 5 without


def test_shapes_that_do_not_fit_are_said():
    with pytest.raises(PoseError, match=r"takes an image uint8 \[H, W, 3\], and got float64"):
        draw_poses(GREY / 255, LINE, SURE, STICK)
    with pytest.raises(PoseError, match=r"keypoints \[N, 17, 2\].*one person alone is keypoints\[None\]"):
        draw_poses(GREY, np.zeros((17, 2)), np.zeros(17), COCO)
    with pytest.raises(PoseError, match="needs its own skeleton"):
        draw_poses(GREY, np.zeros((1, 14, 2)), np.zeros((1, 14)), COCO)


def test_a_contact_sheet_has_every_image_whole_in_rows_of_its_columns():
    colors = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0), (0, 200, 200)]
    sizes = [(40, 30), (30, 60), (50, 50), (20, 80), (90, 30)]
    images = [np.full((*size, 3), color, np.uint8) for size, color in zip(sizes, colors, strict=True)]
    sheet = contact_sheet(images, 2, side=100)
    assert sheet.dtype == np.uint8 and sheet.shape[1] == 200
    tops = []
    for (height, width), color in zip(sizes, colors, strict=True):
        rows, columns = np.nonzero((sheet == color).all(-1))
        shown = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert len(rows) == shown[0] * shown[1]  # nothing lies over it
        assert shown[1] / shown[0] == pytest.approx(width / height, rel=0.1)
        tops.append(rows.min())
    assert tops[0] == tops[1] < tops[2] == tops[3] < tops[4]


def test_a_contact_sheet_of_nothing_is_refused():
    with pytest.raises(PoseError, match="needs at least one of both"):
        contact_sheet([], 3)
    with pytest.raises(PoseError, match="columns=0"):
        contact_sheet([GREY], 0)
