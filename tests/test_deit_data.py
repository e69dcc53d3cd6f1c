"""Every form of --data, what is refused before a training starts, and images that cannot be read."""

from __future__ import annotations

import io
import pickle
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage
from torch import Tensor
from torch.utils.data import DataLoader

from cyclekd.integrations.deit.data import EvaluationImages, ImageData, TrainingImages, load_data
from cyclekd.integrations.deit.decoding import UnreadableImage, decode, open_image
from cyclekd.integrations.runs.errors import RunError
from cyclekd.integrations.runs.sampling import PADDING, Draw

CLASSES = ["cat", "dog"]
COUNTS = {"train": 6, "test": 4}


# -- tiny data sets ----------------------------------------------------------------------------------------------------


def encode(grey: int, kind: str = "png", size: tuple[int, int] = (12, 8)) -> bytes:
    """One plain image in a file's bytes; its grey value says which one it is."""
    buffer = io.BytesIO()
    PILImage.new("RGB", size, (grey, grey, grey)).save(buffer, kind, lossless=True)  # which webp alone knows
    return buffer.getvalue()


def noise(size: tuple[int, int] = (64, 64), kind: str = "jpeg") -> bytes:
    """An image that does not compress, so that half of its bytes are half of its pixels."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    PILImage.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def grey_of(image: PILImage.Image) -> int:
    return decode(image).getpixel((0, 0))[0]


def columns(split: str, *, image: str = "image", label: str = "label") -> dict[str, list]:
    """Images 0, 10, 20, ... of alternating class; those of `test` are 5 brighter."""
    numbers = range(COUNTS["train" if split == "train" else "test"])
    images = [{"bytes": encode(10 * i + 5 * (split != "train")), "path": None} for i in numbers]
    return {image: images, label: [i % 2 for i in numbers]}


def features(names: list[str] | None = CLASSES, *, image: str = "image", label: str = "label") -> Features:
    return Features({image: Image(), label: ClassLabel(names=names) if names else Value("int64")})


def write_parquet(folder: Path, splits: tuple[str, ...] = ("train", "test"), names: list[str] | None = CLASSES) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split in splits:
        Dataset.from_dict(columns(split), features(names)).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def write_folders(folder: Path, splits: tuple[str, ...] = ("train", "val"), classes: list[str] = CLASSES) -> Path:
    for split in splits:
        for value, label in zip(*columns(split).values(), strict=True):
            place = folder / split / classes[label]
            place.mkdir(parents=True, exist_ok=True)
            grey = grey_of(open_image(value["bytes"]))
            (place / f"{grey:03}.png").write_bytes(value["bytes"])
    return folder


def write_tars(folder: Path, names: tuple[str, ...] = ("train-0000", "val-0000"), kind: str = "png") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            for i, (_, label) in enumerate(zip(*columns("train" if "train" in name else "val").values(), strict=True)):
                grey = 10 * i + 5 * ("train" not in name)
                for suffix, content in ((kind, encode(grey, kind)), ("cls", str(label).encode())):
                    info = tarfile.TarInfo(f"{i:05}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return folder


def write_saved(folder: Path) -> Path:
    splits = {split: Dataset.from_dict(columns(split), features()) for split in ("train", "validation")}
    DatasetDict(splits).save_to_disk(folder)
    return folder


@pytest.fixture
def load(tmp_path):
    return partial(load_data, cache_dir=str(tmp_path / "cache"))


def as_pairs(data: ImageData) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(grey value, label) of every training and every validation image, sorted."""
    tables = data.train, data.validation
    train, validation = (sorted((grey_of(t.read(i)), int(t.labels[i])) for i in range(len(t))) for t in tables)
    return train, validation


EXPECTED = [(10 * i, i % 2) for i in range(6)], [(10 * i + 5, i % 2) for i in range(4)]

# -- the forms of --data -----------------------------------------------------------------------------------------------


def test_without_data_the_digits_of_scikit_learn_are_split_the_same_way_every_time():
    data, again = load_data(None), load_data(None)
    assert (len(data.train), len(data.validation), data.classes) == (1397, 400, list("0123456789"))
    image = decode(data.train.read(0))
    assert image.mode == "RGB" and image.size == (8, 8) and np.asarray(image).max() > 200
    assert np.array_equal(data.train.labels, again.train.labels)
    assert data.train.read(7).tobytes() == again.train.read(7).tobytes()
    shares = np.bincount(data.validation.labels) / 400 - np.bincount(data.train.labels) / 1397
    assert abs(shares).max() < 0.005


def parquet_in_folders(folder: Path) -> Path:
    write_parquet(folder / "train", ("train",))
    write_parquet(folder / "test", ("test",))
    return folder


FORMS = {
    "class folders, val": write_folders,
    "class folders, validation": partial(write_folders, splits=("train", "validation")),
    "class folders, test": partial(write_folders, splits=("train", "test")),
    "parquet": write_parquet,
    "parquet, validation": partial(write_parquet, splits=("train", "validation", "test")),
    "parquet in data/": lambda folder: write_parquet(folder / "data").parent,
    "parquet in split folders": parquet_in_folders,
    "webdataset": write_tars,
    "webdataset, timm's names": partial(
        write_tars, names=("imagenet1k-train-0000", "imagenet1k-validation-00"), kind="webp"
    ),
    "save_to_disk": write_saved,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_images_and_labels(form, tmp_path, load):
    data = load(str(FORMS[form](tmp_path / "data set")))
    assert as_pairs(data) == EXPECTED
    assert data.classes == (["0", "1"] if "webdataset" in form else CLASSES)


def test_webdataset_shards_are_read_in_order_and_jpeg_is_an_image(tmp_path, load):
    folder = write_tars(tmp_path / "data", ("train-0001", "train-0000", "val-0000"), "jpeg")
    data = load(str(folder))
    assert len(data.train) == 12 and decode(data.train.read(11)).size == (12, 8)


def test_parquet_without_the_image_feature_works_where_it_has_bytes(tmp_path, load):
    for split in ("train", "test"):
        plain = {"img": [value["bytes"] for value in columns(split)["image"]], "cls": columns(split)["label"]}
        Dataset.from_dict(plain).to_parquet(tmp_path / f"{split}.parquet")
    assert as_pairs(load(str(tmp_path))) == EXPECTED
    for split in ("train", "test"):
        struct = Features({"image": {"bytes": Value("binary"), "path": Value("string")}, "label": Value("int32")})
        Dataset.from_dict(columns(split), struct).to_parquet(tmp_path / f"{split}.parquet")
    assert as_pairs(load(str(tmp_path))) == EXPECTED


def test_files_changed_since_the_last_time_are_read_anew(tmp_path, load):
    folder = write_folders(tmp_path / "data")
    assert len(load(str(folder)).train) == 6
    (folder / "train" / "cat" / "more.png").write_bytes(encode(99))
    assert len(load(str(folder)).train) == 7


def test_stray_images_beside_the_class_folders_are_no_class(tmp_path, load):
    folder = write_folders(tmp_path / "data")
    (folder / "train" / "contact-sheet.png").write_bytes(encode(99))
    assert as_pairs(load(str(folder))) == EXPECTED


def test_a_single_class_keeps_its_name(tmp_path, load):
    folder = write_folders(tmp_path / "data", classes=["cat", "cat"])
    assert load(str(folder)).classes == ["cat"]


# -- splits ------------------------------------------------------------------------------------------------------------


def test_validation_comes_before_test_and_test_takes_its_place(tmp_path, load):
    folder = write_parquet(tmp_path / "data", ("train", "test", "validation"))
    assert "'validation'" in load(str(folder)).validation.name
    assert "'test'" in load(str(folder), validation_split="test").validation.name
    (folder / "validation-00000-of-00001.parquet").unlink()
    assert "'test'" in load(str(folder)).validation.name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no split 'validation'; there are: train. Choose one with --validation-split"),
        ({"validation_split": "dev2"}, "no split 'dev2'; there are: train"),
        ({"train_split": "extra"}, "no split 'extra'; there are: train. Choose one with --train-split"),
        ({"validation_split": "train"}, "asked for as training and as validation data"),
    ],
)
def test_a_split_that_is_not_there_is_refused_with_those_there_are(options, message, tmp_path, load):
    with pytest.raises(RunError, match=message):
        load(str(write_parquet(tmp_path / "data", ("train",))), **options)


def test_a_split_may_have_any_name_that_is_asked_for(tmp_path, load):
    folder = write_parquet(tmp_path / "data", ("train", "matched_frequency"))
    assert as_pairs(load(str(folder), validation_split="matched_frequency")) == EXPECTED


# -- places that hold nothing ------------------------------------------------------------------------------------------


def test_a_missing_folder_is_refused_without_asking_the_hub(tmp_path):
    with pytest.raises(RunError, match=r"no such folder"):
        load_data(str(tmp_path / "nothing"))


def test_a_hub_name_ends_in_a_clear_error_when_offline():
    with pytest.raises(RunError, match=r"--data imagenet-1k: .* of the hub it cannot be opened: .*imagenet-1k"):
        load_data("imagenet-1k")


def test_a_file_an_empty_folder_and_one_without_splits_are_refused_with_what_was_seen(tmp_path, load):
    empty, file = tmp_path / "empty", tmp_path / "train.parquet"
    empty.mkdir()
    file.touch()
    with pytest.raises(RunError, match=r"Saw nothing: it is empty"):
        load(str(empty))
    with pytest.raises(RunError, match=r"is a file; name the folder"):
        load(str(file))
    with pytest.raises(RunError, match=r"has no splits.*Saw cat/, dog/"):
        load(str(write_folders(tmp_path / "data") / "train"))


def test_splits_without_images_are_refused(tmp_path, load):
    folder = write_folders(tmp_path / "data")
    for image in (folder / "val").rglob("*.png"):
        image.unlink()
    with pytest.raises(RunError, match=r"split 'validation' is empty: no images were found"):
        load(str(folder))
    for place in (folder / "val").iterdir():
        place.rmdir()
    with pytest.raises(RunError, match=r"val/ has neither .parquet nor .tar files nor a folder per class. Saw nothing"):
        load(str(folder))


def test_an_empty_split_is_refused(tmp_path, load):
    folder = write_parquet(tmp_path)
    Dataset.from_dict({"image": [], "label": []}, features()).to_parquet(folder / "test-00000-of-00001.parquet")
    with pytest.raises(RunError, match=r"split 'test' is empty"):
        load(str(folder))


def test_a_broken_shard_is_refused_by_name(tmp_path, load):
    folder = write_parquet(tmp_path / "data")
    (folder / "train-00000-of-00001.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(RunError, match=r"split 'train' cannot be opened: Arrow"):
        load(str(folder))


# -- columns, classes, labels ------------------------------------------------------------------------------------------


def write_columns(folder: Path, table: dict[str, list], kinds: Features) -> str:
    for split in ("train", "test"):
        Dataset.from_dict(table, kinds).to_parquet(folder / f"{split}.parquet")
    return str(folder)


def test_of_several_label_columns_one_has_to_be_named(tmp_path, load):
    kinds = Features({"image": Image(), "fine": ClassLabel(names=CLASSES), "coarse": ClassLabel(names=["pet"])})
    table = {"image": columns("test")["image"], "fine": [0, 1, 0, 1], "coarse": [0, 0, 0, 0]}
    folder = write_columns(tmp_path, table, kinds)
    with pytest.raises(RunError, match=r"several label columns: fine, coarse. Choose one with --label-column"):
        load(folder)
    assert load(folder, label_column="coarse").classes == ["pet"]
    with pytest.raises(RunError, match=r"there is no such column. Choose from: fine, coarse"):
        load(folder, label_column="medium")


def test_a_label_with_class_names_is_preferred_to_an_integer(tmp_path, load):
    kinds = Features({"image": Image(), "id": Value("int64"), "label": ClassLabel(names=CLASSES)})
    table = {"image": columns("test")["image"], "id": [7, 8, 9, 10], "label": [0, 1, 0, 1]}
    folder = write_columns(tmp_path, table, kinds)
    assert load(folder).train.labels.tolist() == [0, 1, 0, 1]
    assert load(folder, label_column="id").train.labels.tolist() == [7, 8, 9, 10]


def test_of_several_image_columns_one_has_to_be_named(tmp_path, load):
    kinds = Features({"left": Image(), "right": Image(), "label": ClassLabel(names=CLASSES)})
    images = columns("test")["image"]
    folder = write_columns(tmp_path, {"left": images, "right": images[::-1], "label": [0, 1, 0, 1]}, kinds)
    with pytest.raises(RunError, match=r"several image columns: left, right. Choose one with --image-column"):
        load(folder)
    assert grey_of(load(folder, image_column="right").train.read(0)) == 35


def test_a_table_without_images_or_labels_is_refused_with_its_columns(tmp_path, load):
    folder = write_columns(tmp_path, {"text": ["a"], "label": [0]}, Features(text=Value("string"), label=Value("int8")))
    with pytest.raises(RunError, match=r"no image column; its columns are: text \(string\), label \(int8\)"):
        load(folder)


def test_rows_without_an_image_are_refused(tmp_path, load):
    folder = write_columns(tmp_path, {"image": [columns("test")["image"][0], None], "label": [0, 1]}, features())
    with pytest.raises(RunError, match=r"1 of 2 rows have no image in column 'image'"):
        load(folder)


def test_differing_classes_are_refused_with_the_difference(tmp_path, load):
    folder = write_folders(tmp_path / "data")
    (folder / "val" / "dog").rename(folder / "val" / "fox")
    with pytest.raises(RunError, match=r"different classes: only .*'train' has 'dog'; only .*'validation' has 'fox'"):
        load(str(folder))


def test_the_same_classes_in_another_order_are_refused(tmp_path, load):
    write_parquet(tmp_path, ("train",))
    write_parquet(tmp_path, ("test",), CLASSES[::-1])
    with pytest.raises(RunError, match=r"the order differs: class 0 is 'cat' in one and 'dog' in the other"):
        load(str(tmp_path))


def test_labels_out_of_range_are_refused_with_count_and_first_row(tmp_path, load):
    train, test = columns("train"), columns("test")
    test["label"] = [0, -1, 1, -1]
    for split, table in (("train", train), ("test", test)):
        Dataset.from_dict(table, features(None)).to_parquet(tmp_path / f"{split}.parquet")
    with pytest.raises(RunError, match=r"2 of 4 labels lie outside of 0 .. 1; the first is -1 in row 1. A label of -1"):
        load(str(tmp_path))
    test["label"] = [0, 1, 1, 2]
    Dataset.from_dict(test, features(None)).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(RunError, match=r"1 of 4 labels lie outside of 0 .. 1; the first is 2 in row 3\.$"):
        load(str(tmp_path))
    assert load(str(tmp_path), num_classes=3).classes == ["0", "1", "2"]


def test_a_number_of_classes_that_contradicts_the_names_is_refused(tmp_path, load):
    with pytest.raises(RunError, match=r"has 2 classes, and --num-classes says 3"):
        load(str(write_parquet(tmp_path)), num_classes=3)


# -- decoding ----------------------------------------------------------------------------------------------------------


def roundtrip(image: PILImage.Image, kind: str) -> PILImage.Image:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return decode(open_image(buffer.getvalue()))


@pytest.mark.filterwarnings("error")
def test_every_kind_of_pixel_becomes_rgb():
    sixteen = PILImage.fromarray(np.full((4, 4), 40000, dtype=np.uint16))
    assert roundtrip(sixteen, "png").getpixel((0, 0)) == (155, 155, 155)
    assert roundtrip(PILImage.new("L", (4, 4), 9), "png").getpixel((0, 0)) == (9, 9, 9)
    assert roundtrip(PILImage.new("RGBA", (4, 4), (200, 100, 50, 0)), "png").getpixel((0, 0)) == (200, 100, 50)
    assert roundtrip(PILImage.new("1", (4, 4), 1), "png").getpixel((0, 0)) == (255, 255, 255)
    red, green, blue = roundtrip(PILImage.new("CMYK", (8, 8), (0, 255, 255, 0)), "jpeg").getpixel((0, 0))
    assert red > 240 and green < 15 and blue < 15
    palette = PILImage.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30, 255, 255, 255, 1, 1, 1])
    palette.info["transparency"] = bytes([0, 128, 255, 7])
    assert roundtrip(palette, "png").getpixel((0, 0)) == (10, 200, 30)


def test_a_jpeg_is_decoded_small_but_not_smaller_than_asked():
    jpeg = encode(50, "jpeg", (640, 480))
    assert decode(open_image(jpeg)).size == (640, 480)
    assert decode(open_image(jpeg), (160, 120)).size == (160, 120)
    assert decode(open_image(jpeg), (161, 120)).size == (320, 240)
    assert decode(open_image(encode(50, "png", (640, 480))), (160, 120)).size == (640, 480)


def test_a_huge_image_is_unreadable_and_not_decoded(monkeypatch):
    monkeypatch.setattr(PILImage, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UnreadableImage, match=r"DecompressionBomb"):
        open_image(encode(0, "png", (40, 40)))


BROKEN = {
    "truncated jpeg": noise()[:-800],
    "truncated png": noise(kind="png")[:-5000],
    "zero bytes": b"",
    "no image": b"<html>404</html>",
    "header only": noise()[:700],
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_unreadable_with_row_and_reason(kind, tmp_path, load):
    table = columns("test")
    table["image"][2] = {"bytes": BROKEN[kind], "path": None}
    broken = load(write_columns(tmp_path, table, features())).train
    with pytest.raises(UnreadableImage):
        decode(broken.read(2))
    assert "split 'train', row 2: " in broken.problem(2)
    assert broken.problem(1).endswith("row 1: readable now")


def test_a_file_that_vanished_is_unreadable_with_its_path(tmp_path, load):
    folder = write_folders(tmp_path / "data")
    table = load(str(folder)).train
    (folder / "train" / "cat" / "020.png").unlink()
    with pytest.raises(UnreadableImage, match=r"row 1 \(.*020.png\): No such file"):
        table.read(1)


# -- what a training and an evaluation get -----------------------------------------------------------------------------


def shift_by_seed(image: PILImage.Image, seed: int) -> dict[str, Tensor]:
    pixels = torch.from_numpy(np.array(decode(image).resize((4, 4))))
    return {"image": pixels.permute(2, 0, 1) + seed % 7}


def plain(image: PILImage.Image) -> dict[str, Tensor]:
    return shift_by_seed(image, 0)


@pytest.fixture
def broken(tmp_path, load) -> ImageData:
    """Six images, of which 2, 3 and 5 cannot be read."""
    table = columns("train")
    for row, kind in ((2, "truncated jpeg"), (3, "zero bytes"), (5, "no image")):
        table["image"][row] = {"bytes": BROKEN[kind], "path": None}
    return load(write_columns(tmp_path, table, features()))


def test_training_replaces_unreadable_images_by_the_next_and_says_so(broken):
    images = TrainingImages(broken.train, shift_by_seed)
    samples = [images[Draw(index, seed=3)] for index in range(6)]
    assert [sample["index"] for sample in samples] == [0, 1, 4, 4, 4, 0]
    assert [sample["skipped"] for sample in samples] == [-1, -1, 2, 3, -1, 5]
    assert [int(sample["label"]) for sample in samples] == [0, 1, 0, 0, 0, 0]
    assert samples[0]["label"].dtype == torch.int64
    assert [int(sample["image"][0, 0, 0]) for sample in samples] == [3, 13, 43, 43, 43, 3]


def test_the_seed_of_a_draw_reaches_the_transform(broken):
    images = TrainingImages(broken.train, shift_by_seed)
    assert not torch.equal(images[Draw(0, 1)]["image"], images[Draw(0, 2)]["image"])


def test_training_gives_up_where_nothing_is_readable(tmp_path, load):
    table = {"image": [{"bytes": b"", "path": None}] * 3, "label": [0, 1, 0]}
    images = TrainingImages(load(write_columns(tmp_path, table, features())).train, shift_by_seed)
    with pytest.raises(RunError, match=r"nothing readable in 3 images from row 1 on; the first: .*row 1: zero bytes"):
        images[Draw(1, 0)]


def test_a_bug_in_the_transform_is_not_taken_for_an_unreadable_image(broken):
    def faulty(image, seed):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match=r"a bug"):
        TrainingImages(broken.train, faulty)[Draw(0, 0)]


def test_evaluation_marks_unreadable_images_and_padding_as_not_counted(broken):
    images = EvaluationImages(broken.validation, plain)
    samples = [images[index] for index in (0, 1, 2, PADDING)]
    assert [sample["valid"] for sample in samples] == [True, True, False, False]
    assert [sample["index"] for sample in samples] == [0, 1, 2, -1]
    assert [int(sample["label"]) for sample in samples] == [0, 1, 0, 0]
    assert all(sample["image"].shape == (3, 4, 4) for sample in samples)
    assert samples[3]["image"].max() == 0


def test_workers_give_what_the_main_process_gives(broken):
    images = TrainingImages(broken.train, shift_by_seed)
    batches = [[Draw(index, 11 * index + part) for index in (part, part + 1)] for part in range(5)]
    here = list(DataLoader(images, batch_sampler=batches, num_workers=0))
    there = list(DataLoader(images, batch_sampler=batches, num_workers=2))
    for one, other in zip(here, there, strict=True):
        assert one.keys() == other.keys() == {"image", "label", "index", "skipped"}
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("form", ["parquet", "class folders, val", None])
def test_images_survive_being_sent_to_a_spawned_worker(form, tmp_path, load):
    data = load(str(FORMS[form](tmp_path / "data"))) if form else load(None)
    images = TrainingImages(data.train, shift_by_seed)
    sent = pickle.loads(pickle.dumps(images))
    assert len(sent) == len(images)
    assert torch.equal(sent[Draw(3, 1)]["image"], images[Draw(3, 1)]["image"])


def test_the_cifar_parquet_files_load_as_they_are(load):
    folder = Path(__file__).parents[2] / "shared/data/cifar100"
    if not folder.is_dir():
        pytest.skip("needs shared/data/cifar100")
    data = load(str(folder))
    assert (len(data.train), len(data.validation), len(data.classes)) == (50_000, 10_000, 100)
