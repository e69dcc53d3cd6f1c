"""Augmentation on the device against timm's on the host: operations, distributions, and what a plan promises."""

import io
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from timm.data import RandomResizedCropAndInterpolation, auto_augment, create_transform
from timm.data.random_erasing import RandomErasing
from torchvision.transforms.functional import pil_to_tensor

from cyclekd.integrations.deit import augment as parts
from cyclekd.integrations.deit.augment import (
    AugmentSettings,
    DeviceAugment,
    EvaluationTransform,
    HostAugment,
    PlanAugment,
    crop_on_device,
    draw_plans,
    normalise,
)
from cyclekd.integrations.deit.decoding import UnreadableImage
from cyclekd.integrations.deit.randaugment import OPERATIONS, argument_of, rand_augment
from cyclekd.integrations.runs.errors import RunError
from cyclekd.integrations.runs.seeds import seeded

FILL = (124, 116, 104)
DRAWS = 2000
OFF = AugmentSettings(size=64, scale=(1, 1), ratio=(1, 1), hflip=0, rand_augment=None, erase=0)


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(load_sample_image("china.jpg")).resize((128, 96), Image.Resampling.BICUBIC)


def as_tensor(image: Image.Image) -> torch.Tensor:
    return pil_to_tensor(image).int()


def square(photo: Image.Image, size: int) -> Image.Image:
    return photo.resize((size, size))


def plans_of(settings: AugmentSettings, count: int, seed: int = 0) -> torch.Tensor:
    return draw_plans(settings, count, torch.Generator().manual_seed(seed))


def assert_same_mean(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Within four standard errors of the difference, column by column."""
    ours, theirs = np.asarray(ours, float), np.asarray(theirs, float)
    error = np.sqrt(ours.var(0) / len(ours) + theirs.var(0) / len(theirs))
    assert np.all(abs(ours.mean(0) - theirs.mean(0)) <= 4 * error), (ours.mean(0), theirs.mean(0), error)


# -- RandAugment: operations -------------------------------------------------------------------------------------------


def timms(name: str, image: Image.Image, argument: float) -> Image.Image:
    """timm's operation; thresholds and bits are integers there, and three operations take no argument."""
    if name in ("AutoContrast", "Equalize", "Invert"):
        return auto_augment.NAME_TO_OP[name](image)
    if name == "PosterizeIncreasing":
        return parts.posterize(image, int(argument))
    if name.startswith("Solarize"):
        return auto_augment.NAME_TO_OP[name](image, int(argument))
    return auto_augment.NAME_TO_OP[name](image, argument, fillcolor=FILL, resample=Image.Resampling.BICUBIC)


# the largest difference of a pixel and of the mean, in grey levels; exact where nothing stands here
TOLERANCE = {"AutoContrast": (1, 0.01)} | {
    name: (16, 1.0) for name in ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
}


@pytest.mark.parametrize("number", range(len(OPERATIONS)), ids=[operation.name for operation in OPERATIONS])
def test_device_operation_gives_timms_pixels(number: int, photo: Image.Image) -> None:
    name = OPERATIONS[number].name
    largest, mean = TOLERANCE.get(name, (0, 0))
    for level in (0.0, 0.35, 0.9, 1.0):
        for side in (0.25, 0.75):
            argument = argument_of(np.array([number]), np.array([level]), np.array([side]))[0]
            operations = torch.tensor([[[number, argument]]], dtype=torch.float32)
            ours = rand_augment(pil_to_tensor(photo).unsqueeze(0), operations, FILL, "bicubic")[0].int()
            distance = (ours - as_tensor(timms(name, photo, argument))).abs()
            assert distance.max() <= largest and distance.double().mean() <= mean, (level, argument)
            if argument_matters(name, level):
                assert (ours != as_tensor(photo)).any(), "the operation did nothing"


def argument_matters(name: str, level: float) -> bool:
    return level > 0 and name != "AutoContrast"  # the photo may have its full contrast already


def test_bilinear_motions_are_within_one_grey_level(photo: Image.Image) -> None:
    for number, argument in ((10, 17.0), (11, -0.21), (12, 0.3), (13, 0.333), (14, -0.41)):
        operations = torch.tensor([[[number, argument]]])
        ours = rand_augment(pil_to_tensor(photo).unsqueeze(0), operations, FILL, "bilinear")[0].int()
        timm_operation = auto_augment.NAME_TO_OP[OPERATIONS[number].name]
        theirs = timm_operation(photo, argument, fillcolor=FILL, resample=Image.Resampling.BILINEAR)
        distance = (ours - as_tensor(theirs)).abs()
        assert distance.max() <= 1 and distance.double().mean() < 0.1


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_argument_follows_timms_magnitude(operation, monkeypatch: pytest.MonkeyPatch) -> None:
    number = np.array([OPERATIONS.index(operation)])
    of_level = auto_augment.LEVEL_TO_ARG[operation.name]
    for side in (0.25, 0.75):
        monkeypatch.setattr(random, "random", lambda side=side: side)
        for level in (0.0, 2.5, 5.0, 8.3, 9.0, 10.0):
            theirs = of_level(level, {})[0] if of_level else 0.0
            assert argument_of(number, np.array([level / 10]), np.array([side]))[0] == pytest.approx(theirs)


def test_layers_are_applied_in_order_and_only_to_their_images(photo: Image.Image) -> None:
    images = pil_to_tensor(photo).repeat(3, 1, 1, 1)
    names = [operation.name for operation in OPERATIONS]
    invert, brighter = [names.index("Invert"), 0.0], [names.index("BrightnessIncreasing"), 1.5]
    nothing = [-1.0, 0.0]
    operations = torch.tensor([[invert, brighter], [nothing, nothing], [brighter, invert]])
    ours = rand_augment(images, operations, FILL, "bicubic")
    bright = lambda image: auto_augment.brightness(image, 1.5)  # noqa: E731
    assert torch.equal(ours[0].int(), as_tensor(bright(auto_augment.invert(photo))))
    assert torch.equal(ours[1], images[1]) and torch.equal(images[0], images[1])
    assert torch.equal(ours[2].int(), as_tensor(auto_augment.invert(bright(photo))))


# -- distributions -----------------------------------------------------------------------------------------------------


def test_operations_are_drawn_as_often_and_as_strongly_as_timms() -> None:
    config, names = "rand-m9-n2-mstd0.5-inc1", [operation.name for operation in OPERATIONS]
    transform = auto_augment.rand_augment_transform(config, {"img_mean": FILL})
    drawn: list[tuple[int, float]] = []
    for operation in transform.ops:
        number = names.index(operation.name)
        operation.aug_fn = lambda image, *args, number=number, **_: drawn.append((number, *args, 0.0)[:2])
    with seeded(0):
        for _ in range(DRAWS):
            transform(None)
    plans = plans_of(AugmentSettings(rand_augment=config), DRAWS)[:, parts.OPERATIONS].reshape(-1, 2).numpy()
    ours, theirs = plans[plans[:, 0] >= 0], np.array(drawn)

    assert len(ours) / len(plans) == pytest.approx(0.5, abs=0.035)
    assert len(theirs) / len(plans) == pytest.approx(0.5, abs=0.035)
    for number in range(len(OPERATIONS)):
        assert_same_mean(plans[:, 0] == number, np.pad(theirs[:, 0] == number, (0, len(plans) - len(theirs))))
        strength = [chosen[chosen[:, 0] == number, 1] for chosen in (ours, theirs)]
        assert_same_mean(*strength)
    ours, theirs = (levels_of(chosen[chosen[:, 0] >= 6]) for chosen in (ours, theirs))  # those with fractions and signs
    assert_same_mean(ours, theirs)
    assert_same_mean(abs(ours), abs(theirs))
    assert_same_mean((abs(ours) - 0.9) ** 2, (abs(theirs) - 0.9) ** 2)
    assert_same_mean(abs(ours) > 0.9999, abs(theirs) > 0.9999)
    assert abs(ours).max() == pytest.approx(1)


def levels_of(drawn: np.ndarray) -> np.ndarray:
    """The signed level, -1 to 1, behind each drawn number and argument."""
    offset, gain = np.array([operation[2:4] for operation in OPERATIONS]).T[:, drawn[:, 0].astype(int)]
    return (drawn[:, 1] - offset) / gain


def test_crop_boxes_are_distributed_as_timms() -> None:
    settings = AugmentSettings()
    for width, height in ((500, 375), (224, 224), (64, 180)):
        image = Image.new("RGB", (width, height))
        with seeded(1):
            get = RandomResizedCropAndInterpolation.get_params
            theirs = np.array([get(image, settings.scale, settings.ratio) for _ in range(DRAWS)])
        ours = parts.crop_boxes(plans_of(settings, DRAWS).numpy(), settings, height, width)
        assert (ours >= 0).all() and (ours[:, 0] + ours[:, 2]).max() <= height
        assert (ours[:, 1] + ours[:, 3]).max() <= width
        assert_same_mean(ours, theirs)
        assert_same_mean(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3])
        assert_same_mean(np.log(ours[:, 3] / ours[:, 2]), np.log(theirs[:, 3] / theirs[:, 2]))


@pytest.mark.parametrize("size", [(400, 20), (20, 400)])
def test_where_no_box_fits_it_is_timms_central_one(size: tuple[int, int]) -> None:
    settings = AugmentSettings(scale=(0.9, 1.0))
    ours = parts.crop_boxes(plans_of(settings, 5).numpy(), settings, size[1], size[0])
    theirs = RandomResizedCropAndInterpolation.get_params(Image.new("RGB", size), settings.scale, settings.ratio)
    assert ours.tolist() == [list(theirs)] * 5


def test_flips_and_erased_boxes_are_distributed_as_timms() -> None:
    settings = AugmentSettings(size=64, rand_augment=None, erase=1.0)
    erasing = RandomErasing(1.0, mode="pixel", device="cpu")
    with seeded(2):
        theirs = np.array([measure_box(erasing(torch.zeros(1, 64, 64))[0]) for _ in range(DRAWS)])
    ours = plans_of(settings, 10 * DRAWS)[:, parts.ERASED].numpy()
    assert (ours[:, :2] + ours[:, 2:]).max() == 64 and ours[:, 2:].max() > 60
    assert_same_mean(ours, theirs)
    assert_same_mean(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3])
    assert_same_mean(abs(np.log(ours[:, 2] / ours[:, 3])), abs(np.log(theirs[:, 2] / theirs[:, 3])))
    plans = plans_of(AugmentSettings(hflip=0.3), 5 * DRAWS)
    assert (plans[:, parts.ERASED][:, 2] > 0).double().mean() == pytest.approx(0.25, abs=0.018)
    assert plans[:, parts.FLIP].mean() == pytest.approx(0.3, abs=0.018)


def measure_box(image: torch.Tensor) -> tuple[int, int, int, int]:
    """Top, left, height, width of what is not zero."""
    rows, columns = image.any(1).nonzero(), image.any(0).nonzero()
    if not len(rows):
        return 0, 0, 0, 0
    return int(rows[0]), int(columns[0]), len(rows), len(columns)


# -- the two paths -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crop", ["random-resized", "pad"])
def test_with_everything_off_both_paths_give_the_same_pixels(photo: Image.Image, crop: str) -> None:
    image = square(photo, 96)
    settings = replace(OFF, crop=crop, size=64 if crop == "random-resized" else 96)
    sample = PlanAugment(settings)(image, 5)
    if crop == "pad":
        sample["image"] = pil_to_tensor(image)  # where the window lies is random and its own test
        theirs = normalise(pil_to_tensor(image).unsqueeze(0), settings.mean, settings.std)[0]
    else:
        theirs = HostAugment(settings)(image, 5)["image"]
    ours = DeviceAugment(settings)(sample["image"].unsqueeze(0), sample["plan"].unsqueeze(0))[0]
    levels = (ours - theirs).abs() * torch.tensor(settings.std).view(3, 1, 1) * 255
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype == torch.float32
    assert levels.max() <= 1


@pytest.mark.parametrize("size", [(500, 375), (501, 373)], ids=str)
def test_a_reduced_decode_of_a_jpeg_crops_the_same_part(size: tuple[int, int]) -> None:
    file, settings = jpeg(size), AugmentSettings(size=64)
    distances, reduced = [], 0
    for seed in range(20):
        image, whole = Image.open(file), Image.open(file)
        ours = PlanAugment(settings)(image, seed)
        whole.load()
        box = parts.crop_boxes(ours["plan"].unsqueeze(0).numpy(), settings, size[1], size[0])[0].tolist()
        theirs = parts.resized_crop(whole, box, settings)
        distances.append((ours["image"] - as_tensor(theirs)).abs().double().mean())
        assert min(box[2] * image.height / size[1], box[3] * image.width / size[0]) >= min(64, *box[2:])
        reduced += image.width < size[0]
    assert reduced > 12
    assert sum(distances) / 20 < 2.5  # half a pixel beside it would be 5


def jpeg(size: tuple[int, int]) -> io.BytesIO:
    file = io.BytesIO()
    Image.fromarray(load_sample_image("china.jpg")).resize(size).save(file, "JPEG", quality=92)
    return file


def test_an_image_that_is_not_of_its_headers_size_is_unreadable(photo: Image.Image) -> None:
    class Other(Image.Image):
        def load(self) -> None:
            self._size = (100, 90)

    image = Other()
    image._mode, image._size = "RGB", (128, 96)
    with pytest.raises(UnreadableImage, match=r"\(100, 90\) pixels, where the header says \(128, 96\)"):
        PlanAugment(OFF)(image, 0)


def test_pad_crops_lie_where_the_plan_says_and_everywhere(photo: Image.Image) -> None:
    settings = replace(OFF, size=32, crop="pad")
    image = pil_to_tensor(square(photo, 32)) + (pil_to_tensor(square(photo, 32)) == 0)  # no black of its own
    plans = plans_of(settings, 300)
    shifts = (plans[:, [parts.TOP, parts.LEFT]] * 9).int()
    padded = torch.zeros(3, 40, 40, dtype=torch.uint8)
    padded[:, 4:36, 4:36] = image
    ours = crop_on_device(image.repeat(300, 1, 1, 1), plans, settings)
    for (top, left), crop in zip(shifts.tolist(), ours, strict=True):
        assert torch.equal(crop, padded[:, top : top + 32, left : left + 32])
    assert {tuple(shift) for shift in shifts.tolist()} >= {(0, 0), (8, 8), (4, 4)}


def test_host_pads_as_the_device_does(photo: Image.Image) -> None:
    settings = replace(OFF, size=32, crop="pad", mean=(0, 0, 0), std=(1, 1, 1))
    image = square(photo, 32)
    possible = crop_on_device(pil_to_tensor(image).repeat(3000, 1, 1, 1), plans_of(settings, 3000), settings)
    possible = {crop.numpy().tobytes() for crop in possible}
    assert len(possible) == 81
    theirs = [HostAugment(settings)(image, seed)["image"].mul(255).round().byte() for seed in range(10)]
    theirs = {crop.numpy().tobytes() for crop in theirs}
    assert theirs <= possible and len(theirs) > 5


def test_host_erases_with_standard_normal_noise(photo: Image.Image) -> None:
    plain, erased = (HostAugment(replace(OFF, erase=erase))(square(photo, 64), 3)["image"] for erase in (0.0, 1.0))
    noise = erased[plain != erased]
    assert 0.02 < len(noise) / erased.numel() < 0.34
    assert noise.mean().abs() < 0.15 and noise.std() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_crop_on_device_is_pillows_resize_of_the_box(photo: Image.Image, interpolation: str) -> None:
    settings = AugmentSettings(size=40, interpolation=interpolation)  # boxes of 96 x 128 shrink and grow
    plans, image = plans_of(settings, 40), pil_to_tensor(photo)
    ours = crop_on_device(image.repeat(40, 1, 1, 1), plans, settings).int()
    filters = Image.Resampling.BILINEAR if interpolation == "bilinear" else Image.Resampling.BICUBIC
    for box, crop in zip(parts.crop_boxes(plans.numpy(), settings, 96, 128).tolist(), ours, strict=True):
        top, left, height, width = box
        theirs = photo.crop((left, top, left + width, top + height)).resize((40, 40), filters)
        assert (crop - as_tensor(theirs)).abs().max() <= 2
        assert (crop - as_tensor(theirs)).abs().double().mean() <= 0.3


def test_planned_flips_and_no_others_happen(photo: Image.Image) -> None:
    settings = replace(OFF, hflip=0.5)
    images, plans = pil_to_tensor(square(photo, 64)).repeat(20, 1, 1, 1), plans_of(settings, 20)
    ours = DeviceAugment(settings)(images, plans)
    straight = normalise(images, settings.mean, settings.std)
    assert 0 < plans[:, parts.FLIP].sum() < 20
    for flipped, result, image in zip(plans[:, parts.FLIP], ours, straight, strict=True):
        assert torch.equal(result, image.flip(-1) if flipped else image)


def test_erased_boxes_hold_standard_normal_noise_and_nothing_else_changes(photo: Image.Image) -> None:
    settings = replace(OFF, erase=1.0)
    images, plans = pil_to_tensor(square(photo, 64)).repeat(64, 1, 1, 1), plans_of(settings, 64)
    ours, clean = DeviceAugment(settings)(images, plans), normalise(images, settings.mean, settings.std)
    noise = []
    for result, plan in zip(ours, plans, strict=True):
        top, left, height, width = plan[parts.ERASED].int().tolist()
        box = torch.zeros(64, 64, dtype=torch.bool)
        box[top : top + height, left : left + width] = True
        assert torch.equal(result[:, ~box], clean[0][:, ~box])
        noise.append(result[:, box])
    values = torch.cat([part.flatten() for part in noise]).double()
    of_normal = {0.5: 0.0, 0.8413: 1.0, 0.9772: 2.0, 0.0228: -2.0}
    assert values.mean().abs() < 4 / math.sqrt(len(values)) and values.std() == pytest.approx(1, abs=0.01)
    for share, quantile in of_normal.items():
        assert values.quantile(share) == pytest.approx(quantile, abs=0.03)
    together = torch.stack([part[:, :80].flatten() for part in noise])  # 64 images, other seeds, other noise
    assert (torch.corrcoef(together) - torch.eye(64)).abs().max() < 0.4
    assert torch.corrcoef(torch.cat(noise, dim=1)).sub(torch.eye(3)).abs().max() < 0.03  # nor between colours


# -- what a plan promises ----------------------------------------------------------------------------------------------


def test_a_sample_follows_from_its_seed_alone(photo: Image.Image) -> None:
    for make in (HostAugment, PlanAugment):
        augment = make(AugmentSettings(size=32))
        torch.manual_seed(1), random.seed(1), np.random.seed(1)
        first = augment(photo, 2**62 + 3)
        before = torch.get_rng_state(), random.getstate()
        torch.rand(3), random.random(), np.random.rand()
        again, other = augment(photo, 2**62 + 3), augment(photo, 4)
        assert all(torch.equal(first[key], again[key]) for key in first)
        assert not torch.equal(first["image"], other["image"])
        torch.manual_seed(1), random.seed(1)
        augment(photo, 7)
        assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]


def test_an_image_comes_out_the_same_alone_and_in_a_batch(photo: Image.Image) -> None:
    settings = AugmentSettings(size=48, erase=0.7)
    resident = torch.stack([pil_to_tensor(photo).roll(shift, dims=2) for shift in range(48)])
    plans, device = plans_of(settings, 48), DeviceAugment(settings)
    cropped = crop_on_device(resident, plans, settings)
    batch = device(cropped, plans)
    assert torch.isfinite(batch).all()
    for row in range(48):
        one = slice(row, row + 1)
        assert torch.equal(crop_on_device(resident[one], plans[one], settings), cropped[one])
        assert torch.equal(device(cropped[one], plans[one]), batch[one])


def test_the_callers_images_stay_as_they_were(photo: Image.Image) -> None:
    settings = AugmentSettings(size=64)
    images = pil_to_tensor(square(photo, 64)).repeat(16, 1, 1, 1)
    DeviceAugment(settings)(images, plans_of(settings, 16))
    assert torch.equal(images, pil_to_tensor(square(photo, 64)).repeat(16, 1, 1, 1))


def test_evaluation_is_timms_on_the_fully_decoded_image() -> None:
    file, settings = jpeg((500, 375)), AugmentSettings(size=56, crop_pct=0.8)
    theirs = create_transform((3, 56, 56), interpolation="bicubic", crop_pct=0.8)(Image.open(file).convert("RGB"))
    ours = EvaluationTransform(settings)(Image.open(file))["image"]
    assert ours.dtype == torch.uint8
    torch.testing.assert_close(normalise(ours.unsqueeze(0), settings.mean, settings.std)[0], theirs)


def test_host_survives_magnitude_ten(photo: Image.Image) -> None:
    augment = HostAugment(AugmentSettings(size=32, erase=0, rand_augment="rand-m10-n2-inc1"))
    for transform in augment.transforms:  # only the operation that Pillow 13 refuses
        if ops := getattr(transform, "ops", None):
            transform.ops = [operation for operation in ops if operation.name == "PosterizeIncreasing"]
    assert any((augment(photo, seed)["image"].std((1, 2)) == 0).all() for seed in range(8))


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting",
    [
        {"size": 0},
        {"scale": (0.0, 1.0)},
        {"scale": (0.5, 0.2)},
        {"ratio": (2.0, 1.0)},
        {"hflip": 1.5},
        {"erase": -0.1},
        {"crop_pct": 0.0},
        {"interpolation": "nearest"},
        {"crop": "center"},
        {"std": (1.0, 0.0, 1.0)},
    ],
    ids=str,
)
def test_senseless_settings_are_refused_by_name(setting: dict) -> None:
    with pytest.raises(RunError, match=next(iter(setting))):
        AugmentSettings(**setting)


@pytest.mark.parametrize(
    "config",
    ["rand-m9-n2-mstd0.5", "rand-m9-mmax20-inc1", "rand-m9-mstd101-inc1", "rand-m9-inc1-tweights", "augmix-m3-w3"],
)
def test_what_only_timm_can_do_is_refused_on_the_device_and_done_on_the_host(config: str, photo: Image.Image) -> None:
    settings = AugmentSettings(size=32, rand_augment=config)
    for make in (PlanAugment, DeviceAugment):
        with pytest.raises(RunError, match=r"Supported are the sections m, n, p and mstd .* host takes every"):
            make(settings)
    assert HostAugment(settings)(photo, 0)["image"].shape == (3, 32, 32)


@pytest.mark.parametrize("config", ["rand-z9-inc1", "magic", "rand-m9-mstdx0.5.5-inc1", "rand-m9-p0..5-inc1"])
def test_what_timm_cannot_do_either_is_refused_everywhere(config: str) -> None:
    settings = AugmentSettings(rand_augment=config)
    for make in (HostAugment, PlanAugment, DeviceAugment):
        with pytest.raises(RunError, match=config):
            make(settings)


@pytest.mark.parametrize("make", [PlanAugment, HostAugment])
def test_an_image_too_small_for_pad_is_enlarged(make: type[PlanAugment] | type[HostAugment]) -> None:
    settings = AugmentSettings(size=32, crop="pad", hflip=0, rand_augment=None, erase=0)
    sample = make(settings)(Image.new("RGB", (24, 20), (255, 0, 0)), 0)
    assert sample["image"].shape == (3, 32, 32)
    centre = sample["image"][:, 14:18, 14:18].float()
    assert (centre == centre[:, :1, :1]).all()
