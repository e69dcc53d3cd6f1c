"""Skeletons on images: only where limbs are, left and right told apart, and nothing for what was not found."""

import numpy as np
import pytest

from cyclekd.integrations.tokenpose import COCO, CROWDPOSE, PoseError, Skeleton
from cyclekd.integrations.tokenpose.prediction.drawing import GAP, contact_sheet, draw_poses

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
    for end, drawn in ((170, True), (200, False)):  # the image is 90 px wide, and 120 high
        keypoints = np.array([[[20.0, 60.0], [end, 60.0], [45.0, 60.0]]])
        assert changed(draw_poses(GREY, keypoints, SURE, STICK))[:, 60:].any() == drawn


def test_limbs_that_leave_the_image_are_drawn_up_to_its_border():
    drawn = draw_poses(GREY, LINE + np.array([40, 0]), SURE, STICK)
    assert changed(drawn)[60, 60:].all()


def test_larger_people_have_thicker_limbs():
    image = np.full((400, 300, 3), 128, np.uint8)
    widths = [changed(draw_poses(image, LINE * size, SURE, STICK), image)[:, 32 * size].sum() for size in (1, 4)]
    assert widths[1] > 1.5 * widths[0] > 0


def test_smaller_people_lie_over_larger_ones_in_whatever_order_they_come():
    small = np.array([[[30.0, 52.0], [30.0, 68.0], [30.0, 60.0]]])  # its middle is on the larger one's left limb
    alone = draw_poses(GREY, small, SURE, STICK)[60, 30]
    for people in (np.concatenate((LINE, small)), np.concatenate((small, LINE))):
        assert np.array_equal(draw_poses(GREY, people, np.ones((2, 3)), STICK)[60, 30], alone)


def test_limbs_and_joints_have_a_dark_edge_and_joints_a_white_ring():
    image = np.full((400, 600, 3), 200, np.uint8)
    large = np.array([[[100.0, 200.0], [500.0, 200.0], [300.0, 200.0]]])  # 6 px wide
    drawn = draw_poses(image, large, SURE, STICK).astype(int)
    for column in (200, 300):  # a limb, a joint
        above = drawn[180:200, column]
        assert above.min() < 120 and not (above.max(1) < 200).all()
    assert (drawn[196, 300] == 255).all()
    alone = draw_poses(image, large, np.array([[0, 0, 1.0]]), STICK)
    assert alone[198, 300].max() < 180  # beside the ring of a single point


def test_a_joint_goes_with_the_limb_of_its_side_and_limbs_of_a_side_differ():
    image = np.full((1200, 900, 3), 128, np.uint8)
    keypoints = person((450, 600), 1000)
    drawn = draw_poses(image, keypoints[None], np.ones((1, 17)), COCO)

    def color_at(*indices):
        x, y = np.rint(keypoints[list(indices)].mean(0)).astype(int)
        return tuple(drawn[y, x].astype(int))

    for limbs in (((15, 13), (13, 11), (5, 11), (5, 7), (7, 9)), ((16, 14), (14, 12), (6, 12), (6, 8), (8, 10))):
        assert len({color_at(*limb) for limb in limbs}) == 5
    for wrist, elbow in ((9, 7), (10, 8)):
        assert np.allclose(color_at(wrist), color_at(wrist, elbow), atol=2)
    red, green, blue = color_at(0)
    assert green > max(red, blue) + 40  # the nose belongs to neither side, though all of its limbs do


def test_key_points_on_one_place_are_a_dot():
    place = np.full((1, 3, 2), 40.0)
    drawn = draw_poses(GREY, place, SURE, STICK)
    assert changed(drawn)[40, 40] and not changed(drawn)[:, 50:].any()


def test_edges_are_smooth():
    slanted = np.array([[[20.0, 20.0], [70.0, 100.0], [45.0, 60.0]]])
    drawn = draw_poses(GREY, slanted, SURE, STICK)
    assert len(np.unique(drawn[changed(drawn)].reshape(-1, 3), axis=0)) > 12  # 5 without


def test_shapes_that_do_not_fit_are_said():
    with pytest.raises(PoseError, match=r"takes an image uint8 \[H, W, 3\], and got float64 .*: load_image gives one"):
        draw_poses(GREY / 255, LINE, SURE, STICK)
    with pytest.raises(PoseError, match=r"keypoints \[N, 17, 2\].*one person alone is keypoints\[None\]"):
        draw_poses(GREY, np.zeros((17, 2)), np.zeros(17), COCO)
    with pytest.raises(PoseError, match="needs its own skeleton"):
        draw_poses(GREY, np.zeros((1, 14, 2)), np.zeros((1, 14)), COCO)
    with pytest.raises(PoseError, match=r"scores \[N, 3\] .*and got \[1, 3, 2\] and \[1, 2\]"):
        draw_poses(GREY, LINE, SURE[:, :2], STICK)


def test_a_contact_sheet_has_every_image_whole_in_rows_of_its_columns():
    colors = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0), (0, 200, 200)]
    sizes = [(40, 30), (30, 60), (50, 50), (20, 80), (90, 30)]
    images = [np.full((*size, 3), color, np.uint8) for size, color in zip(sizes, colors, strict=True)]
    sheet = contact_sheet(images, 2, side=100)
    assert sheet.dtype == np.uint8 and sheet.shape[1] == 200
    tops, found = [], []
    for (height, width), color in zip(sizes, colors, strict=True):
        rows, columns = np.nonzero((sheet == color).all(-1))
        shown = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert len(rows) == shown[0] * shown[1]  # nothing lies over it
        assert shown[1] / shown[0] == pytest.approx(width / height, rel=0.1)
        tops.append(rows.min())
        found.append((columns.min(), columns.max()))
    assert tops[0] == tops[1] < tops[2] == tops[3] < tops[4]
    for (start, end), (next_start, next_end) in (found[0:2], found[2:4]):
        assert start == GAP and next_start - end == GAP + 1 and next_end < 200 - GAP


def test_a_row_that_is_not_full_is_not_higher_than_one_and_a_half_sides():
    assert contact_sheet([GREY], 4, side=100).shape == (150 + 2 * GAP, 400, 3)


def test_a_contact_sheet_of_nothing_is_refused():
    with pytest.raises(PoseError, match="needs at least one of both"):
        contact_sheet([], 3)
    with pytest.raises(PoseError, match="columns=0"):
        contact_sheet([GREY], 0)
