"""What training reads of an image: the part round a person, cut from photographs or out of a cache of them."""

from __future__ import annotations

import errno
import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cyclekd.integrations.tokenpose import PoseError
from cyclekd.integrations.tokenpose.data import contexts as module
from cyclekd.integrations.tokenpose.data.contexts import CachedContexts, Contexts, cached, cut_context
from cyclekd.integrations.tokenpose.data.people import People, read_people
from cyclekd.integrations.tokenpose.figures.draw import write_figures
from cyclekd.integrations.tokenpose.keypoints.geometry import center_and_scale

SIZE = (64, 48)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Eight photographs of one or two figures, in COCO's layout."""
    return write_figures(tmp_path / "data", train=8, val=1, seed=3, size=(96, 128), people=(1, 2))


def people_of(data: Path) -> People:
    return read_people(data / "annotations/person_keypoints_train2017.json", data / "train2017", for_training=True)


def contexts_of(data: Path, most: int = 64) -> Contexts:
    people = people_of(data)
    centers, scales = center_and_scale(people.boxes, SIZE)
    return Contexts(people, centers.numpy(), scales.numpy(), reach=1.2, most=most)


def gradient(height: int, width: int) -> np.ndarray:
    """An image whose red is the column and whose green is the row."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([columns, rows, 0 * rows], -1).astype(np.uint8)


# -- cutting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("center", "side"), [((50.0, 40.0), 30.0), ((3.5, 98.2), 41.0), ((-40.0, 50.0), 20.0)])
def test_every_pixel_of_a_context_is_where_its_matrix_puts_it(center: tuple[float, float], side: float) -> None:
    context = cut_context(gradient(100, 120), np.array(center), side, most=1000)
    for row, column in ((0, 0), (context.image.shape[0] - 1, context.image.shape[1] - 1)):
        red, green, _ = context.image[row, column]
        assert (context.matrix @ [red, green, 1]).tolist() == [column, row]


def test_a_context_contains_its_square_and_a_pixel_more_to_interpolate_with() -> None:
    context = cut_context(gradient(100, 120), np.array([50.3, 40.6]), 30.0, most=1000)
    left, top = -context.matrix[:, 2]
    assert left <= 35.3 and top <= 25.6
    assert left + context.image.shape[1] - 1 >= 65.3 and top + context.image.shape[0] - 1 >= 55.6


def test_a_large_context_is_made_smaller_and_its_matrix_with_it() -> None:
    photo = gradient(200, 240)
    context = cut_context(photo, np.array([120.0, 100.0]), 160.0, most=40)
    assert max(context.image.shape[:2]) == 40
    x, y = np.linalg.solve(context.matrix[:, :2], [20, 17] - context.matrix[:, 2])
    assert context.image[17, 20, :2].tolist() == pytest.approx([x, y], abs=0.6)  # of grey levels, and of pixels


def test_a_photograph_of_another_size_than_annotated_is_refused(data: Path) -> None:
    contexts = contexts_of(data)
    Image.fromarray(gradient(50, 60)).save(contexts.people.images[0])
    with pytest.raises(PoseError, match="96 x 128"):
        contexts.read(0)


# -- the cache ----------------------------------------------------------------------------------------------------


def test_a_cache_gives_back_what_was_cut(data: Path, tmp_path: Path) -> None:
    contexts = contexts_of(data)
    contexts.people = contexts.people.subset(list(range(len(contexts)))[::-1])  # images in another order than rows
    contexts.centers, contexts.sides = contexts.centers[::-1], contexts.sides[::-1]
    cache = cached(contexts, tmp_path / "cache")
    assert len(cache) == len(contexts) > 8
    for row in range(len(contexts)):
        one, other = contexts.read(row), cache.read(row)
        assert (one.matrix == other.matrix).all() and one.image.shape == other.image.shape
        assert np.abs(one.image.astype(int) - other.image).mean() < 3  # a JPEG file of a noisy picture


def test_a_cache_of_pixels_is_exact_and_another_than_that_of_jpeg_files(data: Path, tmp_path: Path) -> None:
    contexts = contexts_of(data)
    cached(contexts, tmp_path / "cache")
    pixels = cached(contexts, tmp_path / "cache", compress=False)
    assert len(list((tmp_path / "cache").glob("*.arrow"))) == 2
    for row in range(len(contexts)):
        one, other = contexts.read(row), pixels.read(row)
        assert np.array_equal(one.image, other.image) and np.array_equal(one.matrix, other.matrix)


def test_a_cache_is_made_once_and_decodes_each_photograph_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, original = [], module.read_image
    monkeypatch.setattr(module, "read_image", lambda path, size: read.append(path.name) or original(path, size))
    for _ in range(2):
        cached(contexts_of(data), tmp_path / "cache", workers=2)
    assert sorted(read) == sorted(path.name for path in (data / "train2017").iterdir())


@pytest.mark.parametrize("change", ["annotations", "input size", "photograph", "folder of photographs"])
def test_other_data_get_another_cache(data: Path, tmp_path: Path, change: str) -> None:
    cached(contexts_of(data), tmp_path / "cache")
    most, people = 64, people_of(data)
    if change == "annotations":
        people.annotations.write_text(people.annotations.read_text() + " ")
    elif change == "input size":
        most = 32
    elif change == "photograph":
        Image.fromarray(gradient(96, 128)).save(people.images[0])
    else:
        (data / "train2017").rename(data / "other")
        (data / "train2017").symlink_to(data / "other")
        elsewhere = data / "other"
        contexts = contexts_of(data)
        contexts.people = read_people(people.annotations, elsewhere, for_training=True)
        cached(contexts, tmp_path / "cache")
        assert len(list((tmp_path / "cache").glob("*.arrow"))) == 2
        return
    cached(contexts_of(data, most), tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("*.arrow"))) == 2


def test_a_data_folder_that_is_moved_keeps_its_cache(data: Path, tmp_path: Path) -> None:
    cached(contexts_of(data), data / "cache")
    data.rename(tmp_path / "moved")
    cached(contexts_of(tmp_path / "moved"), tmp_path / "moved/cache")
    assert len(list((tmp_path / "moved/cache").glob("*.arrow"))) == 1


def test_an_unreadable_photograph_is_refused_until_it_is_mended(data: Path, tmp_path: Path) -> None:
    contexts = contexts_of(data)
    row, photo = 3, contexts.people.images[int(contexts.people.image_index[3])]
    whole = photo.read_bytes()
    photo.write_bytes(whole[:200])
    cache = cached(contexts, tmp_path / "cache")
    with pytest.raises(PoseError, match=photo.name):
        cache.read(row)
    photo.write_bytes(whole)
    assert (cache.read(row).image == contexts.read(row).image).all()


# -- when it goes wrong --------------------------------------------------------------------------------------------


def fails_after(monkeypatch: pytest.MonkeyPatch, rows: int, error: BaseException) -> None:
    original, written = module.ArrowWriter.write, []

    def write(self: Any, row: Any) -> None:
        if len(written) == rows:
            raise error
        written.append(row)
        original(self, row)

    monkeypatch.setattr(module.ArrowWriter, "write", write)


def test_a_full_disk_is_told_and_nothing_of_the_attempt_stays(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/mine").write_text("kept")
    with monkeypatch.context() as patch:
        fails_after(patch, 5, OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(PoseError, match=r"No space left on device.*--cache-dir, or do without by --no-cache"):
            cached(contexts_of(data), tmp_path / "cache")
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {"", ".lock"}
    assert (tmp_path / "cache/mine").read_text() == "kept"
    assert cached(contexts_of(data), tmp_path / "cache").read(0)


def test_an_interrupted_cache_ends_at_once_and_is_made_again(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, original = [], module.read_image
    with monkeypatch.context() as patch:
        patch.setattr(module, "read_image", lambda path, size: read.append(path) or original(path, size))
        fails_after(patch, 1, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            cached(contexts_of(data), tmp_path / "cache")
    assert len(read) < 8, "photographs were read that nobody waited for"
    assert len(cached(contexts_of(data), tmp_path / "cache")) == len(contexts_of(data))


def test_what_a_killed_process_left_is_no_cache(data: Path, tmp_path: Path) -> None:
    (path,) = made(data, tmp_path / "cache")
    whole = path.read_bytes()
    path.rename(path.with_name(f".{path.name}.partial"))
    path.with_name(f".{path.name}.partial").write_bytes(whole[: len(whole) // 2])
    assert made(data, tmp_path / "cache") == [path] and len(path.read_bytes()) == len(whole)


def test_a_damaged_cache_is_refused_with_what_to_do(data: Path, tmp_path: Path) -> None:
    (path,) = made(data, tmp_path / "cache")
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(PoseError, match=f"{path.name}.*delete it"):
        cached(contexts_of(data), tmp_path / "cache")


def test_a_folder_that_cannot_be_made_is_told(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PoseError, match="--cache-dir"):
        cached(contexts_of(data), tmp_path / "file/cache")


def made(data: Path, folder: Path) -> list[Path]:
    cached(contexts_of(data), folder)
    return list(folder.glob("people-*.arrow"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="starts its processes by fork")
def test_of_two_processes_one_makes_the_cache_while_the_other_waits(data: Path, tmp_path: Path) -> None:
    context, both = multiprocessing.get_context("fork"), []
    barrier, written = context.Barrier(2), context.Value("i", 0)

    def process() -> None:
        original = module._write

        def write(*args: Any) -> None:
            with written.get_lock():
                written.value += 1
            original(*args)

        module._write = write
        barrier.wait()
        assert isinstance(cached(contexts_of(data), tmp_path / "cache"), CachedContexts)

    for _ in range(2):
        both.append(context.Process(target=process))
        both[-1].start()
    for each in both:
        each.join(60)
    assert [each.exitcode for each in both] == [0, 0] and written.value == 1
