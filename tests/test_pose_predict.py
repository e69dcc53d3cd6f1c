"""Predictions on a user's pictures: key points in pixels of the picture, whatever the box, and files in and out."""

import importlib.util
import json
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

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
from cyclekd.integrations.tokenpose.prediction.detection import Boxes, HFDetector, read_boxes
from cyclekd.integrations.tokenpose.prediction.photos import load_image
from cyclekd.integrations.tokenpose.prediction.predictor import PosePredictor, Poses, coco_results
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
    expected = predict_flipped_regression(model, crops, COCO.flip_pairs, decode=decode) if flip else plain
    found = PosePredictor(model, flip=flip)(image, [(5, 8, 50, 60)])
    np.testing.assert_allclose(found.keypoints, to_image(expected.coordinates, center, scale, (1, 1)), atol=0.05)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-3)


def test_a_person_scores_their_box_times_their_sure_key_points(predictor):
    found = predictor(picture(3), Boxes([(0, 0, 40, 60), (9, 9, 40, 60)], [0.5, 0.25]))
    expected = rescore(torch.from_numpy(found.scores), torch.tensor([0.5, 0.25]))
    np.testing.assert_allclose(found.person_scores, expected)
    assert found.person_scores[1] != found.person_scores[0] > 0


def test_bf16_moves_key_points_by_little():
    image = spots([(171.3, 120.6), (190.0, 150.25), (186.8, 105.5)])
    model = nn.Sequential(Beacons(), nn.Conv2d(3, 3, 1, bias=False))  # a convolution, for autocast to show
    model[1].weight.data = torch.eye(3)[..., None, None]
    model.config = model[0].config
    exact, half = (PosePredictor(model, skeleton=THREE, precision=each)(image) for each in ("fp32", "bf16"))
    assert exact.keypoints.dtype == half.keypoints.dtype == np.float32
    assert 0 < np.abs(exact.scores - half.scores).max() < 0.01 and np.abs(exact.keypoints - half.keypoints).max() < 3


def test_a_model_in_training_of_several_cycles_is_used_in_evaluation():
    model = lively().train()
    PosePredictor(model)(picture(4))
    assert not model.training


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
        ([(1, 1, -5, 5)], "box 0.*size above 0"),
        ([(90, 0, 5, 5)], "some of the image in it"),
        ([(-5, 0, 5, 5)], "some of the image in it"),
        ([(float("nan"), 0, 5, 5)], "box 0 is .nan"),
        ([(0, 0, float("inf"), 5)], "box 0"),
        ((1, 2, 3, 4), r"these \[4\].*one box alone is \[box\]"),
        ([(1, 2, 3, 4, 5)], r"these \[1, 5\]"),
        ([(1, 2, 3, 4), (1, 2)], "boxes are .N, 4."),
        (Boxes([(1, 2, 3, 4)], [0.5, 0.5]), r"scores \[N\], and these \[1, 4\] and \[2\]"),
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
    assert len(taken) < 20


def test_one_unreadable_image_stops_unless_it_is_taken_care_of(predictor, photos):
    photos[1].write_bytes(photos[1].read_bytes()[:99])
    with pytest.raises(PoseError, match=r"1\.png cannot be read"):
        list(predictor.predict_images(photos))
    left_out = []
    found = list(predictor.predict_images(photos, on_unreadable=lambda *what: left_out.append(what)))
    assert [each.source for each in found] == [photos[0], *photos[2:]]
    assert left_out[0][0] == photos[1] and isinstance(left_out[0][1], PoseError) and len(left_out) == 1


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


# -- detectors --------------------------------------------------------------------------------------------------


class StandIn(nn.Module):
    """A detector and its processor, which finds what it was made with: (score, label, x1, y1, x2, y2)."""

    def __init__(self, *found, labels=("N/A", "Person", "dog")):
        super().__init__()
        self.found = torch.tensor(found)
        self.config = SimpleNamespace(id2label=dict(enumerate(labels)))

    def forward(self, pixel_values):
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


@pytest.mark.parametrize("content", ["{", "3", '[{"bbox": [1, 2, 3, 4]}]', '{"a.jpg": 3}', '{"a.jpg": [[1, 2]]}'])
def test_files_that_are_no_boxes_are_said(tmp_path, content):
    path = tmp_path / "boxes.json"
    path.write_text(content)
    with pytest.raises(PoseError, match=r"boxes\.json cannot be read as boxes.*a COCO annotation file"):
        read_boxes(path)


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
    with pytest.raises(PoseError, match=r"name it \.mp4"):
        write_video(tmp_path / "film.gif", film(), 25)
    with pytest.raises(PoseError, match="no frame"):
        write_video(tmp_path / "empty.mp4", [], 25)
    with pytest.raises(PoseError, match="cannot be written"):
        write_video(tmp_path / "nowhere/film.mp4", film(), 25)


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


def test_flip_and_no_flip_differ(start, photos, tmp_path):
    for option in ("--flip", "--no-flip"):
        assert start(photos[0], tmp_path / option, option)[0] == 0
    one, other = (json.loads((tmp_path / name / "predictions.json").read_text()) for name in ("--flip", "--no-flip"))
    assert one[0]["keypoints"] != other[0]["keypoints"]


def test_an_unreadable_photo_is_left_out_and_counted(start, photos, tmp_path):
    photos[1].write_bytes(b"no picture")
    code, printed, errors = start(photos[0].parent, tmp_path / "found")
    assert code == 0 and "3 images, 1 that could not be read, 3 people" in printed
    assert "left out" in errors and "1.png cannot be read" in errors


def test_a_film_gets_skeletons_as_a_film_or_as_frames(start, tmp_path):
    pytest.importorskip("av")
    write_video(tmp_path / "film.mp4", film(), 12.5)
    code, printed, _ = start(tmp_path / "film.mp4", tmp_path / "found", "--threshold", -9)
    assert code == 0 and "5 frames, 5 people" in printed and "frames/s on cpu" in printed
    drawn = Video(tmp_path / "found/film.mp4")
    assert (drawn.fps, drawn.count) == (12.5, 5)
    difference = np.abs(next(iter(drawn)).astype(int) - next(iter(Video(tmp_path / "film.mp4"))))
    assert difference.max() > 50
    rows = json.loads((tmp_path / "found/predictions.json").read_text())
    assert [row["image_id"] for row in rows] == [1, 2, 3, 4, 5]
    assert start(tmp_path / "film.mp4", tmp_path / "frames", "--frames")[0] == 0
    assert sorted(path.name for path in (tmp_path / "frames").glob("*.jpg")) == [f"{n:06}.jpg" for n in range(1, 6)]
    code, _, errors = start(tmp_path / "film.mp4", tmp_path / "no", "--boxes", "boxes.json")
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
    }
    for words, arguments in wrong.items():
        code, printed, errors = start(*arguments)
        assert code == 2 and errors.startswith("error: ") and errors.count("\n") == 1 and not printed, words
        assert words in errors, errors
    assert (full / "0.png").read_text() == "mine" and len(list(full.iterdir())) == 1
    code, _, errors = start(photos[0], tmp_path / "h", model=tmp_path / "nowhere")
    assert code == 2 and "nowhere" in errors
    photos[0].write_text("no picture")
    assert "none of the 1 files" in start(photos[0], tmp_path / "i")[2]
