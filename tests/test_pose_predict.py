"""Predictions on a user's pictures: key points in pixels of the picture, whatever the box, and files in and out."""

import importlib.util
import json
import struct
import sys
import wave
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

from cyclekd import wrap_multicycle
from cyclekd.integrations.tokenpose import (
    COCO,
    CROWDPOSE,
    PoseError,
    Skeleton,
    create_model,
    decode_heatmaps,
    save_pretrained,
)
from cyclekd.integrations.tokenpose.data.warp import normalize, warp_exact
from cyclekd.integrations.tokenpose.evaluation.scoring import rescore
from cyclekd.integrations.tokenpose.keypoints.decoding import decode_regression, decode_token_regression, to_image
from cyclekd.integrations.tokenpose.keypoints.flips import average_flipped, predict_flipped_regression
from cyclekd.integrations.tokenpose.keypoints.geometry import center_and_scale, crop_matrices
from cyclekd.integrations.tokenpose.models.config import config_for
from cyclekd.integrations.tokenpose.prediction.detection import Boxes, HFDetector, read_boxes, read_image_ids
from cyclekd.integrations.tokenpose.prediction.photos import load_image
from cyclekd.integrations.tokenpose.prediction.predictor import PosePredictor, Poses
from cyclekd.integrations.tokenpose.prediction.results import ResultFile, coco_results
from cyclekd.integrations.tokenpose.prediction.video import Video, write_video

ROOT = Path(__file__).parents[1]
SIZE = {"input_size": (64, 48), "num_keypoints": 17}
THREE = Skeleton(("red", "green", "blue"), (), (0.05,) * 3, (), ((0, 1), (1, 2)))
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])  # ImageNet's


class Beacons(nn.Module):
    """Stands in for a trained model: finds the red, the green and the blue spot of a crop."""

    def __init__(self, keypoints=3):
        super().__init__()
        self.config = config_for("tokenpose_s_v1", input_size=(64, 48), num_keypoints=keypoints)
        self.seen = []

    def forward(self, images):
        self.seen.append(images)
        colors = images * STD[:, None, None] + MEAN[:, None, None]
        return colors[..., ::4, ::4]  # heat map pixel (u, v) is the input's (4 u, 4 v)


def spots(places, size=(300, 400), sigma=22.0):
    """A black image with a red, a green and a blue spot at these (x, y)."""
    y, x = np.mgrid[: size[0], : size[1]].astype(float)
    spots = [np.exp(-((x - px) ** 2 + (y - py) ** 2) / (2 * sigma**2)) for px, py in places]
    return (255 * np.stack(spots, -1)).round().astype(np.uint8)


def picture(seed, size=(70, 90)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def lively(name="sdpose_s_v1", **overrides):
    """A tiny model whose output follows the image."""
    model = create_model(name, depth=2, **SIZE | overrides)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return model


@pytest.fixture(scope="module")
def predictor():
    torch.manual_seed(0)
    return PosePredictor(lively(), flip=False, method="argmax", device="cpu")


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


# -- where key points are ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "box, to_right",
    [
        ((60, 40, 250, 210), True),
        ((100.3, 51.7, 133.1, 169.9), True),
        ((200, 90, 12, 100), True),
        ((-20, -15, 150, 200), True),
        ((270.5, 115, 150, 200), False),
    ],
    ids=["wide", "odd", "thin", "beyond the left and upper border", "beyond the right and lower border"],
)
def test_key_points_come_back_to_the_pixels_of_the_image(box, to_right):
    x, y, width, height = box
    pixel = 1.25 * max(width, height * 48 / 64) / 12  # of the heat map, in the image's
    steps = np.array([(0.6, 0.3), (1.37, -0.8), (1.9, 1.21)]) * (1 if to_right else -1)
    places = np.array((x + width / 2, y + height / 2)) + pixel * steps
    found = PosePredictor(Beacons(), skeleton=THREE, flip=False)(spots(places, sigma=1.1 * pixel), [box])
    np.testing.assert_allclose(found.keypoints, [places], atol=0.02 * pixel)
    assert (found.scores > 0.8).all() and found.boxes.tolist() == [pytest.approx(box, abs=1e-4)]


def test_without_boxes_the_whole_image_is_one():
    places = [(180, 120), (230, 160), (190, 155)]
    predict = PosePredictor(Beacons(), skeleton=THREE, flip=False)
    found = predict(spots(places, sigma=40))
    np.testing.assert_allclose(found.keypoints, [places], atol=0.02 * 500 / 12)
    assert_same(found, predict(spots(places, sigma=40), [(0, 0, 400, 300)]))


def test_the_model_sees_the_crops_of_its_evaluation():
    image, model = picture(0, (200, 300)), Beacons()
    boxes = [(10, 20, 60, 90), (250, 150, 49.5, 70.25), (0, 0, 300, 200), (120.7, 33.3, 5, 9)]
    PosePredictor(model, skeleton=THREE, flip=False, batch_size=3)(image, boxes)
    seen = torch.cat(model.seen)
    center, scale = center_and_scale(torch.tensor(boxes), (64, 48))
    matrices = crop_matrices(center, scale, torch.zeros(len(boxes)), (64, 48))
    exact = torch.stack([torch.from_numpy(warp_exact(image, matrix, (64, 48))) for matrix in matrices])
    difference = 255 * STD * (seen - normalize(exact.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
    assert [len(each) for each in model.seen] == [3, 1]
    assert difference.abs().max() < 1.01 and difference.abs().mean() < 0.05


def test_flip_averages_with_the_mirrored_image():
    image, model = picture(1), lively().eval()
    center, scale = center_and_scale(torch.tensor([[5.0, 8.0, 50.0, 60.0]]), (64, 48))
    crop = warp_exact(image, crop_matrices(center, scale, torch.zeros(1), (64, 48))[0], (64, 48))
    crops = normalize(torch.from_numpy(crop).permute(2, 0, 1)[None])
    with torch.no_grad():
        plain = model(crops)
        maps = average_flipped(plain, model(crops.flip(-1)), COCO.flip_pairs)
    for flip, heatmaps in ((True, maps), (False, plain)):
        expected = decode_heatmaps(heatmaps, "quarter")
        found = PosePredictor(model, flip=flip, method="quarter")(image, [(5, 8, 50, 60)])
        expected_px = to_image(expected.coordinates, center, scale, (16, 12))
        np.testing.assert_allclose(found.keypoints, expected_px, atol=1e-3)
        np.testing.assert_allclose(found.scores, expected.scores, atol=1e-3)
    assert (maps - plain).abs().max() > 0.1


@pytest.mark.parametrize("name, decode", [("sdpose_reg", decode_regression), ("tokenreg_s", decode_token_regression)])
@pytest.mark.parametrize("flip", [True, False])
def test_regression_models_work_alike(name, decode, flip):
    image, model = picture(2), lively(name).eval()
    center, scale = center_and_scale(torch.tensor([[5.0, 8.0, 50.0, 60.0]]), (64, 48))
    crop = warp_exact(image, crop_matrices(center, scale, torch.zeros(1), (64, 48))[0], (64, 48))
    crops = normalize(torch.from_numpy(crop).permute(2, 0, 1)[None])
    with torch.no_grad():
        plain = decode(model(crops))
    width = 48 if name == "sdpose_reg" else None
    both = predict_flipped_regression(model, crops, COCO.flip_pairs, decode=decode, image_width=width)
    expected = both if flip else plain
    found = PosePredictor(model, flip=flip)(image, [(5, 8, 50, 60)])
    np.testing.assert_allclose(found.keypoints, to_image(expected.coordinates, center, scale, (1, 1)), atol=0.05)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-3)


def test_a_person_scores_their_box_times_their_sure_key_points(predictor):
    found = predictor(picture(3), Boxes([(0, 0, 40, 60), (9, 9, 40, 60)], [0.5, 0.25]))
    expected = rescore(torch.from_numpy(found.scores), torch.tensor([0.5, 0.25]))
    np.testing.assert_allclose(found.person_scores, expected)
    assert found.person_scores[1] != found.person_scores[0] > 0
    assert predictor(picture(3), [(0, 0, 40, 60)]).person_scores[0] == pytest.approx(2 * found.person_scores[0])


def test_bf16_moves_key_points_by_little():
    image = spots([(171.3, 120.6), (190.0, 150.25), (186.8, 105.5)])
    model = nn.Sequential(Beacons(), nn.Conv2d(3, 3, 1, bias=False))  # a convolution, for autocast to show
    model[1].weight.data = torch.eye(3)[..., None, None]
    model.config = model[0].config
    exact, half = (PosePredictor(model, skeleton=THREE, precision=each)(image) for each in ("fp32", "bf16"))
    assert exact.keypoints.dtype == half.keypoints.dtype == np.float32
    assert 0 < np.abs(exact.scores - half.scores).max() < 0.01 and np.abs(exact.keypoints - half.keypoints).max() < 3
    averaged = torch.from_numpy(half.scores)
    assert (averaged != averaged.bfloat16().float()).any()  # with the mirrored image's, in float32


def test_a_model_in_training_of_several_cycles_is_used_in_evaluation():
    model = lively().train()
    predict = PosePredictor(model)
    expected = predict(picture(4))
    assert not model.training
    model.train()  # as a training does that goes on
    assert_same(predict(picture(4)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_is_refused(dtype):
    with pytest.raises(PoseError, match=rf"weights are {dtype}: pass model.float\(\), and precision='bf16'"):
        PosePredictor(lively().to(dtype))


def test_the_model_goes_to_the_device():
    assert next(PosePredictor(lively(), device="meta").model.parameters()).is_meta


def test_an_image_that_must_not_be_written_to_is_read_without_a_warning(predictor, recwarn):
    image = picture(5)
    image.flags.writeable = False
    predictor(image)
    assert not recwarn.list


def test_a_model_that_runs_several_cycles_in_use_gives_its_last_ones_key_points():
    model = lively("tokenpose_s_v1")
    one = PosePredictor(model)(picture(4))
    two = PosePredictor(wrap_multicycle(model, 2, inference_cycles=2))(picture(4))
    assert one.keypoints.shape == two.keypoints.shape and (one.scores != two.scores).any()


def test_boxes_of_every_size_are_cut_out_of_the_image(predictor):
    boxes = [(3, 4, 0.01, 0.02), (-4e5, -4e5, 1e6, 1e6), (89.9, 69.9, 0.5, 0.5)]
    found = predictor(picture(5), boxes)
    assert np.isfinite(found.scores).all() and found.keypoints.shape == (3, 17, 2)


# -- boxes ------------------------------------------------------------------------------------------------------


def test_people_in_batches_equal_people_alone(predictor):
    image = picture(5)
    boxes = [(x, x / 2, 40 - x, 50) for x in range(5)]
    together = predictor(image, boxes)
    predictor.batch_size = 2
    in_parts = predictor(image, boxes)
    predictor.batch_size = 32
    alone = [predictor(image, [box]) for box in boxes]
    assert_same(in_parts, together)
    assert_same([np.concatenate(column) for column in zip(*alone, strict=True)], together)
    assert len(np.unique(together.scores[:, 0])) == 5  # boxes tell


@pytest.mark.parametrize("nobody", [[], np.zeros((0, 4)), Boxes([], [])], ids=["list", "array", "Boxes"])
def test_nobody_to_look_for_gives_nobody(predictor, nobody):
    found = predictor(picture(6), nobody)
    assert [column.shape for column in found] == [(0, 17, 2), (0, 17), (0, 4), (0,)]


@pytest.mark.parametrize(
    "boxes, words",
    [
        ([(1, 1, 5, 5), (3, 4, 0, 9)], r"box 1 is \[3.0, 4.0, 0.0, 9.0\].*90 x 70 px; leave it out"),
        ([(1, 1, -5, 5)], "box 0.*sides from 0.01"),
        ([(90, 0, 5, 5)], "in it some of the image"),
        ([(-5, 0, 5, 5)], "in it some of the image"),
        ([(0, 70, 5, 5)], "in it some of the image"),
        ([(0, -5, 5, 5)], "in it some of the image"),
        ([(float("nan"), 0, 5, 5)], "box 0 is .nan"),
        ([(0, 0, float("inf"), 5)], "box 0"),
        ((1, 2, 3, 4), r"these \[4\].*one box alone is \[box\]"),
        ([(1, 2, 3, 4, 5)], r"these \[1, 5\]"),
        ([(1, 2, 3, 4), (1, 2)], "boxes are .N, 4."),
        (Boxes([(1, 2, 3, 4)], [0.5, 0.5]), r"scores \[N\], and these \[1, 4\] and \[2\]"),
        (Boxes([(1, 2, 3, 4)], [float("nan")]), "with the score nan.*a finite score"),
        ([(1, 2, 3, 1e-30)], "sides from 0.01 to 1e.06 px"),
        ([(1, 2, 1e30, 4)], "sides from 0.01"),
    ],
)
def test_boxes_that_cannot_be_used_are_said(predictor, boxes, words):
    with pytest.raises(PoseError, match=words):
        predictor(picture(6), boxes)


def test_settings_that_do_not_fit_are_said(predictor):
    with pytest.raises(PoseError, match=r"has 17 key points, and the skeleton 14: pass skeleton=COCO for 17"):
        PosePredictor(predictor.model, skeleton=CROWDPOSE)
    with pytest.raises(PoseError, match="takes a model of create_model or from_pretrained, and got a Linear"):
        PosePredictor(nn.Linear(1, 1))
    with pytest.raises(PoseError, match="at least one person"):
        PosePredictor(predictor.model, batch_size=0)
    with pytest.raises(PoseError, match="there are 'fp32' and 'bf16'"):
        PosePredictor(predictor.model, precision="fp16")
    with pytest.raises(PoseError, match="device='nowhere' cannot be used"):
        PosePredictor(predictor.model, device="nowhere")


# -- images -----------------------------------------------------------------------------------------------------


def test_paths_pillow_images_and_arrays_are_the_same(tmp_path):
    image, path = picture(7), tmp_path / "a.png"
    Image.fromarray(image).save(path)
    for source in (path, str(path), Image.fromarray(image), image, np.asfortranarray(image)):
        assert np.array_equal(load_image(source), image)
    with Image.open(path) as opened:
        assert np.array_equal(load_image(opened), image)


def test_grey_and_transparent_images_become_rgb(tmp_path):
    grey, opaque = picture(8)[..., 0], np.dstack((picture(8), np.full((70, 90), 255, np.uint8)))
    for name, image, expected in (("L", grey, np.stack((grey,) * 3, -1)), ("RGBA", opaque, opaque[..., :3])):
        Image.fromarray(image).save(tmp_path / f"{name}.png")
        for source in (tmp_path / f"{name}.png", image, Image.fromarray(image)):
            assert np.array_equal(load_image(source), expected)
    assert np.array_equal(load_image(grey[..., None]), load_image(grey))
    palette = Image.fromarray(picture(8)).quantize(16)
    assert np.array_equal(load_image(palette), np.array(palette.convert("RGB")))


def test_photographs_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera turned: show it turned by 90 degrees clockwise
    Image.fromarray(picture(9)).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(load_image(tmp_path / "turned.png"), np.rot90(picture(9), -1))


def test_cmyk_and_one_bit_images_become_rgb_and_an_animation_its_first_picture(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "print.jpg")
    assert load_image(tmp_path / "print.jpg")[4, 4].tolist() == [255, 0, 0]
    Image.new("1", (8, 8), 1).save(tmp_path / "bit.png")
    assert (load_image(tmp_path / "bit.png") == 255).all()
    first, second = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    first.save(tmp_path / "moving.png", save_all=True, append_images=[second])
    assert load_image(tmp_path / "moving.png")[4, 4].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    "dtype, ending", [(np.uint16, "png"), (np.uint16, "tif"), (np.int32, "tif"), (np.float32, "tif")]
)
def test_pictures_with_more_than_8_bits_are_refused_not_made_white(dtype, ending, tmp_path):
    path = tmp_path / f"deep.{ending}"
    Image.fromarray(np.arange(0, 4096 * 16, 1024).astype(dtype).reshape(8, 8)).save(path)
    with pytest.raises(PoseError, match=rf"deep\.{ending} cannot be read.*more than 8 bits per pixel.*save it with 8"):
        load_image(path)


def test_whatever_pillow_stumbles_over_is_said(tmp_path, monkeypatch):
    Image.fromarray(picture(0)).save(tmp_path / "a.png")

    def broken(image):
        raise struct.error("unpack requires a buffer of 2 bytes")  # of a broken note on how the camera was held

    monkeypatch.setattr("PIL.ImageOps.exif_transpose", broken)
    with pytest.raises(PoseError, match=r"a\.png cannot be read as an image: unpack requires"):
        load_image(tmp_path / "a.png")


def test_files_that_are_no_image_are_said(tmp_path):
    broken = tmp_path / "broken.jpg"
    Image.fromarray(picture(0)).save(broken)
    broken.write_bytes(broken.read_bytes()[:900])
    (tmp_path / "text.png").write_text("no picture")
    cut = tmp_path / "cut.png"
    Image.fromarray(picture(0)).save(cut)
    cut.write_bytes(cut.read_bytes()[:40] + b"\0" * 40)
    for name in ("broken.jpg", "text.png", "cut.png", "missing.jpg"):
        with pytest.raises(PoseError, match=rf"{name} cannot be read as an image: \w"):
            load_image(tmp_path / name)
    with pytest.raises(PoseError, match=r"uint8 \[H, W, 3\], and this one is float64 \[4, 5, 3\]: values from 0 to 1"):
        load_image(np.zeros((4, 5, 3)))
    for shape in ((3, 4, 5), (4,), (2, 4, 5, 3), (0, 5, 3)):
        with pytest.raises(PoseError, match="channels go last"):
            load_image(np.zeros(shape, np.uint8))


# -- many images ------------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(4):
        Image.fromarray(picture(number, (60 + 5 * number, 80))).save(folder / f"{number}.png")
    return sorted(folder.iterdir())


def test_many_images_equal_each_alone(predictor, photos):
    boxes = {"0.png": [(0, 0, 40, 50), (9, 9, 40, 50)], "1.png": [], "2.png": Boxes([(3, 3, 50, 40)], [0.5])}
    boxes["3.png"] = [(x, 0, 30, 40) for x in range(5)]
    for size in (1, 4, 32):
        predictor.batch_size = size
        found = list(predictor.predict_images(photos, boxes))
        assert [each.source for each in found] == photos
        for path, image, poses in found:
            assert np.array_equal(image, load_image(path))
            assert_same(poses, predictor(path, boxes[path.name]))
    assert_same(next(predictor.predict_images(iter(photos))).poses, predictor(photos[0]))
    assert list(predictor.predict_images([])) == []


def test_images_are_read_as_they_are_needed(predictor, photos):
    taken = []

    def endless():
        while True:
            taken.append(len(taken))
            yield picture(len(taken))

    stream = predictor.predict_images(endless())
    predictor.batch_size = 2
    for _ in range(4):
        next(stream)
    stream.close()
    assert 4 < len(taken) < 20  # some are decoded ahead


def test_one_unreadable_image_stops_unless_it_is_taken_care_of(predictor, photos):
    photos[1].write_bytes(photos[1].read_bytes()[:99])
    with pytest.raises(PoseError, match=r"1\.png cannot be read"):
        list(predictor.predict_images(photos))
    left_out = []
    found = list(predictor.predict_images(photos, on_left_out=lambda *what: left_out.append(what)))
    assert [each.source for each in found] == [photos[0], *photos[2:]]
    assert left_out[0][0] == photos[1] and isinstance(left_out[0][1], PoseError) and len(left_out) == 1


def test_an_image_with_a_box_that_cannot_be_used_is_left_out_like_one_that_cannot_be_read(predictor, photos):
    boxes = {path.name: [(0, 0, 40, 50)] for path in photos} | {"2.png": [(0, 0, 40, 50), (0, 0, 0, 9)]}
    with pytest.raises(PoseError, match=r"2\.png: box 1 is"):
        list(predictor.predict_images(photos, boxes))
    left_out = []
    found = list(predictor.predict_images(photos, boxes, on_left_out=lambda *what: left_out.append(what)))
    assert [each.source for each in found] == [*photos[:2], photos[3]]
    assert left_out[0][0] == photos[2] and "box 1 is" in str(left_out[0][1]) and len(left_out) == 1


def test_images_of_nobody_do_not_wait_for_ever(predictor, monkeypatch):
    monkeypatch.setattr("cyclekd.integrations.tokenpose.prediction.predictor.MOST_WAITING", 5 * 70 * 90 * 3)
    predictor.batch_size, taken = 32, []
    images = (taken.append(seed) or picture(0) for seed in range(60))
    first = next(predictor.predict_images(images, detector=lambda image: Boxes([], [])))
    assert first.poses.keypoints.shape == (0, 17, 2) and len(taken) < 30


def test_the_progress_bar_counts_images_of_people_and_those_left_out(predictor, photos, monkeypatch):
    updates = []

    class Bar(tqdm):
        def update(self, n=1):
            updates.append(n)

    monkeypatch.setattr("cyclekd.integrations.tokenpose.prediction.predictor.tqdm", Bar)
    photos[1].write_text("no picture")
    list(predictor.predict_images(photos, on_left_out=lambda *_: None))
    assert updates == [1] * 4


def test_boxes_and_detector_exclude_each_other_and_every_image_needs_its_boxes(predictor, photos):
    with pytest.raises(PoseError, match="both boxes and a detector"):
        list(predictor.predict_images(photos, {}, detector=lambda image: Boxes([], [])))
    with pytest.raises(PoseError, match=r"no boxes for 1\.png: where there is nobody they are \[\]"):
        list(predictor.predict_images(photos, {"0.png": []}))
    with pytest.raises(PoseError, match=r"2\.png: box 0 is"):
        list(predictor.predict_images(photos[2:], {"2.png": [(0, 0, 0, 0)], "3.png": []}))


def test_people_found_twice_by_a_detector_are_given_once():
    places = [(120, 120), (130, 150), (125, 105)]
    predict = PosePredictor(Beacons(), skeleton=THREE, flip=False)
    boxes = Boxes([(60, 40, 150, 210), (62, 41, 150, 210), (250, 40, 150, 210)], [0.6, 0.9, 0.8])
    given = next(predict.predict_images([spots(places)], detector=lambda image: boxes)).poses
    assert given.boxes.tolist() == [[62, 41, 150, 210], [250, 40, 150, 210]]
    assert len(predict(spots(places), boxes).boxes) == 3


def test_people_are_not_told_apart_without_sigmas(predictor, photos):
    without = PosePredictor(predictor.model, skeleton=replace(COCO, sigmas=()))
    assert len(list(without.predict_images(photos))) == 4
    with pytest.raises(PoseError, match=r'17 sigmas.*this skeleton has 0: add "sigmas".*\[0\.05\] \* 17'):
        list(without.predict_images(photos, detector=lambda image: Boxes([], [])))


# -- detectors --------------------------------------------------------------------------------------------------


class StandIn(nn.Module):
    """A detector and its processor, which finds what it was made with: (score, label, x1, y1, x2, y2)."""

    def __init__(self, *found, labels=("N/A", "Person", "dog")):
        super().__init__()
        self.found = torch.tensor(found)
        self.config = SimpleNamespace(id2label=dict(enumerate(labels)))

    def forward(self, pixel_values):
        assert not self.training
        return pixel_values

    def processor(self, images, return_tensors):
        class Inputs(dict):
            def to(self, device):
                return self

        return Inputs(pixel_values=torch.tensor(images.size))

    def post_process_object_detection(self, outputs, threshold, target_sizes):
        assert outputs.tolist() == [*target_sizes[0]][::-1]
        found = self.found[self.found[:, 0] > threshold]
        return [{"scores": found[:, 0], "labels": found[:, 1].long(), "boxes": found[:, 2:]}]


def detector(*found, threshold=0.5, **options):
    model = StandIn(*found, **options)
    processor = model.processor
    calling = type("Processor", (), {"__call__": lambda self, **inputs: processor(**inputs)})()
    calling.post_process_object_detection = model.post_process_object_detection
    return HFDetector(model, threshold, processor=calling)


def test_a_detectors_people_come_best_first_as_boxes_within_the_image():
    found = detector(
        (0.6, 1, 10, 20, 40, 60), (0.9, 1, -5, 5, 300, 50), (0.95, 2, 1, 1, 9, 9), (0.4, 1, 1, 1, 9, 9),
        (0.8, 1, 95, 10, 120, 20),
    )(picture(0))  # fmt: skip
    assert found.boxes.tolist() == [[0, 5, 90, 45], [10, 20, 30, 40]]
    assert found.scores.tolist() == pytest.approx([0.9, 0.6])


def test_what_a_detector_finds_goes_into_the_predictor(predictor):
    find = detector((0.5, 1, 10, 20, 40, 60), threshold=0.25)
    found = predictor(picture(0), find(picture(0)))
    assert_same(found, predictor(picture(0), Boxes([(10, 20, 30, 40)], [0.5])))


def test_a_detector_that_knows_no_people_or_cannot_be_had_is_refused(tmp_path):
    with pytest.raises(PoseError, match="none of the model's labels is 'person': cat, dog"):
        detector((0.9, 1, 0, 0, 9, 9), labels=("cat", "dog"))
    with pytest.raises(PoseError, match="pass its processor too"):
        HFDetector(StandIn((0.9, 1, 0, 0, 9, 9)))
    for threshold in (50, -0.1, float("nan")):
        with pytest.raises(PoseError, match=r"scores are from 0 to 1"):
            detector((0.9, 1, 0, 0, 9, 9), threshold=threshold)


def test_a_detector_without_transformers_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(PoseError, match="pip install transformers"):
        HFDetector("facebook/detr-resnet-50")


@pytest.mark.slow  # importing transformers takes seconds
def test_a_detector_is_loaded_by_name(tmp_path, predictor):
    transformers = pytest.importorskip("transformers")
    labels = {0: "N/A", 1: "person"}
    tiny = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    config = transformers.YolosConfig(
        **tiny, image_size=[32, 32], patch_size=16, num_detection_tokens=3, id2label=labels, label2id={"person": 1}
    )
    model = transformers.YolosForObjectDetection(config)
    model.class_labels_classifier.layers[-1].bias.data = torch.tensor([-4.0, 4.0, -4.0])
    model.save_pretrained(tmp_path / "detector")
    processor = transformers.YolosImageProcessor(size={"shortest_edge": 32, "longest_edge": 64})
    processor.save_pretrained(tmp_path / "detector")
    for name in (tmp_path / "detector", str(tmp_path / "detector")):
        found = HFDetector(name)(picture(0))
        assert found.boxes.shape == (3, 4) and (found.scores > 0.9).all()
        assert len(predictor(picture(0), found).keypoints) == 3
    assert not len(HFDetector(tmp_path / "detector", threshold=0.999999)(picture(0)).boxes)
    (tmp_path / "other").mkdir()
    for name in (tmp_path / "other", "nobody/has-this"):
        with pytest.raises(PoseError, match=r"HFDetector\('.*'\) cannot be loaded: \w"):
            HFDetector(name)


# -- files ------------------------------------------------------------------------------------------------------


def poses():
    scores = np.array([[0.5, 0.25, 1.0], [0.0, 0.125, 0.75]], np.float32)
    keypoints = np.arange(12, dtype=np.float32).reshape(2, 3, 2) + 0.12341
    return Poses(keypoints, scores, np.array([(1, 2, 3, 4), (5, 6, 7, 8)], np.float32), np.array([0.9, 0.2]))


def test_result_rows_are_cocos(tmp_path):
    rows = coco_results(poses(), 139, "000000000139.jpg")
    assert rows == json.loads(json.dumps(rows)) and [row["image_id"] for row in rows] == [139, 139]
    first = rows[0]
    assert first["keypoints"] == [0.1234, 1.1234, 0.5, 2.1234, 3.1234, 0.25, 4.1234, 5.1234, 1.0]
    assert first["category_id"] == 1 and first["score"] == 0.9 and first["bbox"] == [1, 2, 3, 4]
    assert first["file_name"] == "000000000139.jpg"
    assert coco_results(Poses(*(column[:0] for column in poses())), 1, "a.jpg") == []


def test_boxes_are_read_from_every_form_that_is_promised(tmp_path):
    named = {"a.jpg": [[1, 2, 3, 4], [5, 6, 7, 8, 0.5]], "b.jpg": []}
    annotations = {
        "images": [{"id": 1, "file_name": "train/a.jpg"}, {"id": 2, "file_name": "b.jpg"}],
        "annotations": [
            {"image_id": 1, "bbox": [1, 2, 3, 4], "category_id": 1},
            {"image_id": 1, "bbox": [5, 6, 7, 8]},
            {"image_id": 1, "bbox": [9, 9, 9, 9], "category_id": 1, "iscrowd": 1},
            {"image_id": 1, "bbox": [9, 9, 9, 9], "category_id": 18},
        ],
    }
    results = [*coco_results(poses(), 1, "a.jpg")]
    expected = {"named": [1, 0.5], "annotations": [1, 1], "results": pytest.approx([0.9, 0.2])}
    for name, content in {"named": named, "annotations": annotations, "results": results}.items():
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(content))
        boxes = read_boxes(path)
        assert boxes["a.jpg"].boxes.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
        assert boxes["a.jpg"].scores.tolist() == expected[name]
        if name != "results":
            assert boxes["b.jpg"].boxes.shape == (0, 4)


def test_people_of_a_file_are_those_of_its_own_category(tmp_path):
    images, boxes = [{"id": 1, "file_name": "a.jpg"}], [[1, 2, 3, 4], [5, 6, 7, 8], [9, 9, 9, 9]]
    annotations = [{"image_id": 1, "bbox": box, "category_id": number} for number, box in enumerate(boxes)]
    path = tmp_path / "boxes.json"
    for people, expected in (
        ([{"id": 0, "name": "player", "keypoints": ["nose"]}, {"id": 2, "name": "ball"}], [boxes[0]]),
        ([{"id": 2, "name": "person"}, {"id": 1, "name": "ball"}], [boxes[2]]),
        ([], [boxes[1]]),
    ):
        path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": people}))
        assert read_boxes(path)["a.jpg"].boxes.tolist() == expected


def test_image_ids_are_read_from_every_form_that_has_them(tmp_path):
    path = tmp_path / "boxes.json"
    images = [{"id": 17, "file_name": "train/a.jpg"}, {"id": 4, "file_name": "b.jpg"}]
    rows = [*coco_results(poses(), 17, "a.jpg"), {"file_name": "c.jpg", "bbox": [1, 2, 3, 4]}]
    for content, expected in (
        ({"images": images, "annotations": []}, {"a.jpg": 17, "b.jpg": 4}),
        (rows, {"a.jpg": 17}),
        ({"a.jpg": [[1, 2, 3, 4]]}, {}),
    ):
        path.write_text(json.dumps(content))
        assert read_image_ids(path) == expected


def test_one_name_in_two_folders_is_refused(tmp_path):
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps({"one/a.jpg": [[1, 2, 3, 4]], "two/a.jpg": []}))
    with pytest.raises(PoseError, match=r"has both one/a\.jpg and two/a\.jpg, and names count without their folders"):
        read_boxes(path)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "3",
        '"a.jpg"',
        '[{"bbox": [1, 2, 3, 4]}]',
        '{"a.jpg": 3}',
        '{"a.jpg": [[1, 2]]}',
        '{"a.jpg": [[1, 2], [3, 4]]}',
    ],
)
def test_files_that_are_no_boxes_are_said(tmp_path, content):
    path = tmp_path / "boxes.json"
    path.write_text(content)
    with pytest.raises(PoseError, match=r"boxes\.json cannot be read as boxes.*a COCO annotation file"):
        read_boxes(path)


def test_a_result_file_is_written_row_by_row_and_appears_when_it_is_whole(tmp_path):
    path, rows = tmp_path / "found.json", coco_results(poses(), 1, "a.jpg")
    with ResultFile(path) as file:
        file.write(rows)
        assert not path.exists()
        file.write([])
        file.write([{"score": float("nan")}])
    assert file.count == 3 and json.loads(path.read_text()) == [*rows, {"score": "NaN"}]
    assert len(path.read_text().splitlines()) == 3 + 2  # and the brackets
    with ResultFile(tmp_path / "empty.json"):
        pass
    assert json.loads((tmp_path / "empty.json").read_text()) == []
    with pytest.raises(KeyboardInterrupt), ResultFile(tmp_path / "half.json") as file:
        file.write(rows)
        raise KeyboardInterrupt
    assert {each.name for each in tmp_path.iterdir()} == {"found.json", "empty.json"}
    with pytest.raises(PoseError, match=r"cannot write .*nowhere.*No such file"), ResultFile(tmp_path / "nowhere/a"):
        pass


# -- video ------------------------------------------------------------------------------------------------------


def film(frames=5, size=(64, 48)):
    """A white square that moves to the right, on grey."""
    images = [np.full((*size, 3), 90, np.uint8) for _ in range(frames)]
    for number, image in enumerate(images):
        image[20:40, 4 + 4 * number : 24 + 4 * number] = 250
    return images


def test_a_film_comes_back_as_it_was_written(tmp_path):
    pytest.importorskip("av")
    assert write_video(tmp_path / "film.mp4", iter(film()), 12.5) == 5
    video = Video(tmp_path / "film.mp4")
    assert (video.fps, video.count) == (12.5, 5)
    for _ in range(2):  # as often as one likes
        frames = list(video)
        assert len(frames) == 5 and all(frame.dtype == np.uint8 for frame in frames)
        assert np.mean([np.abs(a.astype(int) - b) for a, b in zip(frames, film(), strict=True)]) < 4
    assert [path.name for path in tmp_path.iterdir()] == ["film.mp4"]
    write_video(tmp_path / "ntsc.MP4", film(), 30000 / 1001)
    assert Video(tmp_path / "ntsc.MP4").fps == pytest.approx(30000 / 1001)


def test_frames_of_odd_sizes_lose_their_last_row_or_column(tmp_path):
    pytest.importorskip("av")
    stripes = np.zeros((65, 47, 3), np.uint8)
    stripes[:, np.arange(47) // 2 % 2 == 1] = 255
    write_video(tmp_path / "film.mp4", [stripes], 25)
    written = next(iter(Video(tmp_path / "film.mp4")))
    assert written.shape == (64, 46, 3)
    assert np.abs(written.astype(int) - stripes[:64, :46]).mean() < 20  # what is left stays where it was


def test_a_film_from_a_turned_telephone_is_upright(tmp_path):
    pytest.importorskip("av")
    path = tmp_path / "film.mp4"
    write_video(path, film(), 25)
    upright = np.rot90(next(iter(Video(path))), -1)
    content = bytearray(path.read_bytes())
    one, unity = 1 << 16, 1 << 30  # fixed point, in the track header's matrix
    start = content.index(struct.pack(">9i", one, 0, 0, 0, one, 0, 0, 0, unity), content.index(b"tkhd"))
    content[start : start + 36] = struct.pack(">9i", 0, one, 0, -one, 0, 0, 64 * one, 0, unity)
    path.write_bytes(content)
    assert np.array_equal(next(iter(Video(path))), upright)


def test_no_film_is_written_over_and_half_a_film_is_not_left(tmp_path, predictor):
    pytest.importorskip("av")

    def interrupted():
        yield from film(80)  # some of which are on the disk by then
        raise PoseError("enough")

    with pytest.raises(PoseError, match="enough"):
        write_video(tmp_path / "film.mp4", interrupted(), 25)
    assert not list(tmp_path.iterdir())
    (tmp_path / "film.mp4").write_text("mine")
    with pytest.raises(PoseError, match="this file exists"):
        write_video(tmp_path / "film.mp4", film(), 25)
    assert (tmp_path / "film.mp4").read_text() == "mine"
    with pytest.raises(PoseError, match=r"film\.mp4 cannot be read as a video"):
        Video(tmp_path / "film.mp4")
    with wave.open(str(tmp_path / "sound.mp4"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(4000))
    with pytest.raises(PoseError, match=r"sound\.mp4 cannot be read as a video: there are no pictures in it"):
        Video(tmp_path / "sound.mp4")
    with pytest.raises(PoseError, match=r"name it \.mp4"):
        write_video(tmp_path / "film.gif", film(), 25)
    with pytest.raises(PoseError, match="no frame"):
        write_video(tmp_path / "empty.mp4", [], 25)
    with pytest.raises(PoseError, match="cannot be written"):
        write_video(tmp_path / "nowhere/film.mp4", film(), 25)
    for fps in (0, -5, float("nan"), float("inf")):
        with pytest.raises(PoseError, match="a number above 0, such as 25"):
            write_video(tmp_path / "b.mp4", film(), fps)
    for frame in (film()[0][..., 0], film()[0] / 255, film()[0][:1]):
        with pytest.raises(PoseError, match=r"frames are uint8 \[H, W, 3\] of 2 x 2 pixels or more, and this one"):
            write_video(tmp_path / "b.mp4", [frame], 25)
    assert not list(tmp_path.glob("*b*.mp4"))


def test_a_film_that_breaks_off_says_where_and_what_to_do(tmp_path):
    pytest.importorskip("av")
    write_video(tmp_path / "film.mp4", [picture(number, (64, 48)) for number in range(40)], 25)
    content = bytearray((tmp_path / "film.mp4").read_bytes())
    middle = len(content) // 2
    content[middle : middle + 3000] = bytes(3000)
    (tmp_path / "film.mp4").write_bytes(content)
    with pytest.raises(PoseError, match=r"film\.mp4 cannot be read on after frame [1-9]\d*: .*ffmpeg -i"):
        list(Video(tmp_path / "film.mp4"))


def test_a_pyav_that_cannot_tell_rotation_or_write_h264_is_refused(tmp_path, monkeypatch):
    old = SimpleNamespace(VideoFrame=object, __version__="12.3.0")
    monkeypatch.setitem(sys.modules, "av", old)
    with pytest.raises(PoseError, match=r"PyAV 14 or later, and this is 12\.3\.0"):
        Video(tmp_path / "film.mp4")
    without = SimpleNamespace(VideoFrame=SimpleNamespace(rotation=0), codecs_available={"mpeg4"})
    monkeypatch.setitem(sys.modules, "av", without)
    with pytest.raises(PoseError, match=r"cannot write H\.264 \(libx264\); the one of pip install av can"):
        write_video(tmp_path / "film.mp4", film(), 25)


def test_frames_are_predicted_like_images(tmp_path, predictor):
    pytest.importorskip("av")
    write_video(tmp_path / "film.mp4", film(), 25)
    video = Video(tmp_path / "film.mp4")
    found = list(predictor.predict_images(video))
    assert len(found) == 5
    for frame, (_, image, each) in zip(video, found, strict=True):
        assert np.array_equal(frame, image)
        assert_same(each, predictor(frame))


def test_a_video_without_pyav_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(PoseError, match="pip install av"):
        Video(tmp_path / "film.mp4")
    with pytest.raises(PoseError, match="pip install av"):
        write_video(tmp_path / "film.mp4", film(), 25)


# -- the command ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("predict_pose", ROOT / "examples/predict_pose.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    return save_pretrained(lively(), tmp_path_factory.mktemp("run") / "model")


@pytest.fixture
def start(example, saved, capsys):
    """Run the example; exit code, what it printed and its errors."""

    def run(source, out, *options, model=saved):
        code = example.main([str(model), str(source), "--out", str(out), "--device", "cpu", *map(str, options)])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def test_photos_get_skeletons_results_and_a_summary(start, saved, photos, tmp_path):
    folder, out = photos[0].parent, tmp_path / "found"
    for path in photos[2:]:
        path.unlink()
    (folder / "notes.txt").write_text("no photo")
    code, printed, _ = start(folder, out, "--threshold", -9)
    assert code == 0 and {path.name for path in out.iterdir()} == {"0.png", "1.png", "predictions.json"}
    rows = json.loads((out / "predictions.json").read_text())
    expected = [
        coco_results(PosePredictor(lively_of(saved))(path), int(path.stem), path.name)[0] for path in photos[:2]
    ]
    assert [row["file_name"] for row in rows] == ["0.png", "1.png"] and [row["image_id"] for row in rows] == [0, 1]
    for row, other in zip(rows, expected, strict=True):
        # DARK divides by little in the flat maps of random weights
        assert row["keypoints"] == pytest.approx(other["keypoints"], abs=0.1, rel=0.05) and row["bbox"] == other["bbox"]
    for path in photos[:2]:
        assert load_image(out / path.name).shape == load_image(path).shape
        assert (load_image(out / path.name) != load_image(path)).any()
    assert "2 images, 2 people" in printed and "images/s on cpu" in printed and str(out) in printed


def lively_of(folder):
    from cyclekd.integrations.tokenpose import from_pretrained

    return from_pretrained(folder)


def test_a_run_folder_a_single_photo_and_boxes_from_a_file(start, saved, photos, tmp_path):
    boxes = tmp_path / "boxes.json"
    boxes.write_text(json.dumps({"0.png": [[1, 2, 30, 40], [5, 6, 30, 40]]}))
    code, printed, _ = start(photos[0], tmp_path / "one", "--boxes", boxes, "--threshold", 99, model=saved.parent)
    assert code == 0 and "1 images, 2 people" in printed
    assert np.array_equal(load_image(tmp_path / "one/0.png"), load_image(photos[0]))  # no key point scores 99
    rows = json.loads((tmp_path / "one/predictions.json").read_text())
    assert [row["bbox"] for row in rows] == [[1, 2, 30, 40], [5, 6, 30, 40]]
    code, printed, _ = start(photos[0].parent, tmp_path / "all", "--boxes", tmp_path / "one/predictions.json")
    assert code == 0 and "4 images, 2 people" in printed  # those that are not named have nobody
    assert len(list((tmp_path / "all").glob("*.png"))) == 4


def test_flip_no_flip_and_bf16_differ(start, photos, tmp_path):
    found = []
    for name, options in {"flip": ["--flip"], "plain": ["--no-flip"], "half": ["--precision", "bf16"]}.items():
        assert start(photos[0], tmp_path / name, *options)[0] == 0
        found.append(json.loads((tmp_path / name / "predictions.json").read_text())[0]["keypoints"])
    assert found[0] != found[1] and found[0] != found[2]


def test_a_photo_may_be_called_in_capitals_and_a_full_disk_is_said(start, photos, tmp_path, monkeypatch):
    photos[0].rename(tmp_path / "A.PNG")
    assert start(tmp_path / "A.PNG", tmp_path / "found")[0] == 0 and (tmp_path / "found/A.PNG").is_file()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("PIL.Image.Image.save", full)
    code, _, errors = start(tmp_path / "A.PNG", tmp_path / "full")
    assert code == 2 and "No space left on device" in errors and not list((tmp_path / "full").iterdir())


def test_an_unreadable_photo_is_left_out_and_counted(start, photos, tmp_path):
    photos[1].write_bytes(b"no picture")
    code, printed, errors = start(photos[0].parent, tmp_path / "found")
    assert code == 0 and "3 images, 1 left out, 3 people" in printed
    assert "left out" in errors and "1.png cannot be read" in errors


def test_a_photo_with_a_bad_box_is_left_out_and_counted(start, photos, tmp_path):
    boxes = tmp_path / "boxes.json"
    boxes.write_text(json.dumps({"0.png": [[0, 0, 9, 9]], "1.png": [[0, 0, 9, 9], [500, 0, 9, 9]]}))
    code, printed, errors = start(photos[0].parent, tmp_path / "found", "--boxes", boxes)
    assert code == 0 and "3 images, 1 left out, 1 people" in printed and "1.png: box 1 is" in errors


def test_results_carry_the_image_ids_of_the_annotation_file(start, photos, tmp_path):
    file = tmp_path / "annotations.json"
    images = [{"id": 70 + number, "file_name": f"{number}.png"} for number in range(3)]
    annotations = [{"image_id": image["id"], "bbox": [0, 0, 30, 40], "category_id": 1} for image in images]
    file.write_text(json.dumps({"images": images, "annotations": annotations}))
    assert start(photos[0].parent, tmp_path / "found", "--boxes", file)[0] == 0
    rows = json.loads((tmp_path / "found/predictions.json").read_text())
    assert [(row["file_name"], row["image_id"]) for row in rows] == [(f"{n}.png", 70 + n) for n in range(3)]


@pytest.mark.parametrize("name", ["holiday", "03"], ids=["a name", "an id that another has"])
def test_photos_that_are_not_named_by_ids_are_counted(name, start, photos, tmp_path):
    photos[1].rename(photos[1].with_name(f"{name}.png"))
    assert start(photos[0].parent, tmp_path / "found")[0] == 0
    rows = json.loads((tmp_path / "found/predictions.json").read_text())
    assert [row["image_id"] for row in rows] == [1, 2, 3, 4]
    assert [row["file_name"] for row in rows] == sorted(["0.png", "2.png", "3.png", f"{name}.png"])


def test_the_commands_detector_is_asked_about_every_picture(start, example, photos, tmp_path, monkeypatch):
    def detector(*settings):
        assert settings == ("some/detector", 0.25, "cpu")
        return lambda image: Boxes([(1, 2, 30, 40), (20, 20, 40, 30)], [0.9, 0.8])

    monkeypatch.setattr(example, "HFDetector", detector)
    options = ("--detector", "some/detector", "--detector-threshold", 0.25)
    assert "4 images, 8 people" in start(photos[0].parent, tmp_path / "found", *options)[1]
    pytest.importorskip("av")
    write_video(tmp_path / "film.mp4", film(), 25)
    assert "5 frames, 10 people" in start(tmp_path / "film.mp4", tmp_path / "frames", *options, "--frames")[1]


def test_the_help_says_what_a_model_may_be(example, capsys):
    with pytest.raises(SystemExit) as end:
        example.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0 and "MODEL is the folder of a training" in text and "without sound" in text


def test_a_film_gets_skeletons_as_a_film_or_as_frames(start, tmp_path):
    pytest.importorskip("av")
    write_video(tmp_path / "film.mp4", film(), 12.5)
    (tmp_path / "film.mp4").rename(tmp_path / "film.MP4")
    code, printed, _ = start(tmp_path / "film.MP4", tmp_path / "found", "--threshold", -9)
    assert code == 0 and "5 frames, 5 people" in printed and "frames/s on cpu" in printed
    drawn = Video(tmp_path / "found/film.mp4")
    assert (drawn.fps, drawn.count) == (12.5, 5)
    difference = np.abs(next(iter(drawn)).astype(int) - next(iter(Video(tmp_path / "film.MP4"))))
    assert difference.max() > 50
    rows = json.loads((tmp_path / "found/predictions.json").read_text())
    assert [row["image_id"] for row in rows] == [1, 2, 3, 4, 5]
    assert start(tmp_path / "film.MP4", tmp_path / "frames", "--frames", "--threshold", 99)[0] == 0
    difference = np.abs(
        load_image(tmp_path / "frames/000001.jpg").astype(int) - next(iter(Video(tmp_path / "film.MP4")))
    )
    assert difference.max() < 50  # no key point scores 99
    assert sorted(path.name for path in (tmp_path / "frames").glob("*.jpg")) == [f"{n:06}.jpg" for n in range(1, 6)]
    code, _, errors = start(tmp_path / "film.MP4", tmp_path / "no", "--boxes", "boxes.json")
    assert code == 2 and "--boxes is for photographs" in errors


def test_what_a_user_can_put_right_is_one_line_and_exit_code_2(start, photos, tmp_path):
    full, text = tmp_path / "full", tmp_path / "notes.txt"
    full.mkdir()
    (full / "0.png").write_text("mine")
    text.write_text("{}")
    empty = tmp_path / "empty"
    empty.mkdir()
    wrong = {
        "holds 0.png": (photos[0], full),
        "does not exist": (tmp_path / "nowhere.jpg", tmp_path / "a"),
        "has no photograph in it": (empty, tmp_path / "b"),
        "is neither": (text, tmp_path / "c"),
        "names none of the photographs": (photos[0], tmp_path / "d", "--boxes", text),
        "and the skeleton 14": (photos[0], tmp_path / "e", "--skeleton", "crowdpose"),
        "at least one person in a batch": (photos[0], tmp_path / "f", "--batch", 0),
        "has nothing: a file of key points": (photos[0], tmp_path / "g", "--skeleton", text),
        "no such file; write coco, crowdpose, or an annotation file": (photos[0], tmp_path / "j", "--skeleton", "hand"),
    }
    for words, arguments in wrong.items():
        code, printed, errors = start(*arguments)
        assert code == 2 and errors.startswith("error: ") and errors.count("\n") == 1 and not printed, words
        assert words in errors, errors
    assert (full / "0.png").read_text() == "mine" and len(list(full.iterdir())) == 1
    code, _, errors = start(photos[0], tmp_path / "h", model=tmp_path / "nowhere")
    assert code == 2 and "nowhere" in errors
    photos[0].write_text("no picture")
    assert "none of the 1 files in" in start(photos[0], tmp_path / "i")[2]
