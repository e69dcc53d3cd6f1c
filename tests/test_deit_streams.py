"""Streamed training images: every image once, the same samples after a resume, and what is refused."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, Value
from PIL import Image as PILImage
from torch import Tensor
from torch.utils.data import DataLoader

from cyclekd.integrations.deit.data import load_data
from cyclekd.integrations.deit.decoding import decode
from cyclekd.integrations.deit.streams import StreamedImages
from cyclekd.integrations.runs.errors import RunError

SHARDS, IMAGES = 4, 24
KINDS = Features(image=Image(), label=ClassLabel(names=["even", "odd"]))


def encode(grey: int) -> bytes:
    buffer = io.BytesIO()
    PILImage.new("RGB", (4, 4), (grey, grey, grey)).save(buffer, "png")
    return buffer.getvalue()


def write_shards(folder, broken: tuple[int, ...] = (), kinds: Features = KINDS, label=lambda i: i % 2) -> str:
    """24 images in 4 parquet files, image i with grey value i; one validation image."""
    folder.mkdir()
    images = [{"bytes": b"" if i in broken else encode(i), "path": None} for i in range(IMAGES)]
    for shard, part in enumerate(np.array_split(np.arange(IMAGES), SHARDS)):
        table = {"image": [images[i] for i in part], "label": [label(int(i)) for i in part]}
        Dataset.from_dict(table, kinds).to_parquet(folder / f"train-{shard:05}-of-{SHARDS:05}.parquet")
    validation = {"image": [{"bytes": encode(0), "path": None}], "label": [0]}
    Dataset.from_dict(validation, kinds).to_parquet(folder / "test.parquet")
    return str(folder)


def with_seed(image: PILImage.Image, seed: int) -> dict[str, Tensor]:
    return {"grey": torch.tensor(decode(image).getpixel((0, 0))[0]), "seed": torch.tensor(seed)}


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    """`datasets` sleeps for 5 seconds at the end of every pass over parquet files."""
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)


@pytest.fixture
def split(tmp_path):
    return load_data(write_shards(tmp_path / "data"), streaming=True, cache_dir=str(tmp_path / "cache")).train


def batches(split, workers: int = 0, **options) -> list[dict[str, Tensor]]:
    settings = {"classes": 2, "images_per_epoch": IMAGES, "batch": 2, "epochs": 2, "seed": 5, "shuffle_buffer": 6}
    stream = StreamedImages(split, with_seed, **{**settings, **options})
    return list(DataLoader(stream, batch_size=stream.batch, num_workers=workers))


def values(batches: list[dict[str, Tensor]], name: str = "grey") -> list[int]:
    return [int(value) for batch in batches for value in batch[name]]


def assert_equal(ours: list[dict[str, Tensor]], theirs: list[dict[str, Tensor]]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys() == {"grey", "seed", "label", "index", "skipped"}
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_only_the_training_split_is_streamed(tmp_path):
    data = load_data(write_shards(tmp_path / "data"), streaming=True, cache_dir=str(tmp_path / "cache"))
    assert isinstance(data.train.rows, IterableDataset)
    assert len(data.validation) == 1 and data.classes == ["even", "odd"]


@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (2, 0), (1, 2), (2, 2), (3, 0)])
def test_an_epoch_has_every_image_once_over_all_processes_and_workers(processes, workers, split):
    shared = {"processes": processes, "workers": workers, "epochs": 1}
    seen = [batch for rank in range(processes) for batch in batches(split, rank=rank, **shared)]
    assert sorted(values(seen)) == list(range(IMAGES))
    assert sorted(values(seen, "index")) == list(range(IMAGES))
    assert len(set(values(seen, "seed"))) == IMAGES
    assert all(label == grey % 2 for grey, label in zip(values(seen), values(seen, "label"), strict=True))


def test_epochs_and_seeds_are_in_different_orders(split):
    both = values(batches(split))
    first, second = both[:IMAGES], both[IMAGES:]
    assert first != second != sorted(second) and sorted(first) == sorted(second)
    assert values(batches(split, seed=6)) != both
    assert len(set(values(batches(split), "seed"))) == 2 * IMAGES


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [1, 2, 5, 6, 7])
def test_a_stream_started_at_a_step_goes_on_like_an_undisturbed_one(start, workers, split):
    shared = {"workers": workers, "accumulate": 2, "batch": 2}  # 6 steps an epoch
    assert_equal(batches(split, start=start, **shared), batches(split, **shared)[2 * start :])


def test_a_start_is_exact_where_the_workers_do_not_divide_the_batches_of_an_epoch(split):
    shared = {"workers": 2, "batch": 8}  # 3 batches an epoch: worker 0 has two of the first and one of the second
    whole = batches(split, **shared)
    for start in (1, 2, 4, 5):
        assert_equal(batches(split, start=start, **shared), whole[start:])


def test_skipped_rows_are_not_decoded(split):
    decoded = []

    def counting(image, seed):
        decoded.append(seed)
        return with_seed(image, seed)

    stream = StreamedImages(split, counting, classes=2, images_per_epoch=IMAGES, batch=4, epochs=1, seed=0, start=4)
    assert len(list(stream)) == len(stream) == len(decoded) == 8


def test_a_part_that_ends_early_starts_over(split):
    seen = values(batches(split, images_per_epoch=2 * IMAGES, epochs=1))
    assert sorted(seen) == sorted([*range(IMAGES), *range(IMAGES)])


def test_unreadable_images_are_replaced_reported_and_do_not_move_the_others(tmp_path):
    clean, broken = tmp_path / "clean", tmp_path / "broken"
    sources = write_shards(clean), write_shards(broken, broken=(3, 4, 17))
    expected, seen = (
        batches(load_data(source, streaming=True, cache_dir=str(tmp_path / "cache")).train) for source in sources
    )
    for one, other, skipped in zip(values(expected), values(seen), values(seen, "skipped"), strict=True):
        assert (skipped >= 0) == (one in (3, 4, 17))
        assert other == one or skipped >= 0
    start = batches(load_data(sources[1], streaming=True, cache_dir=str(tmp_path / "cache")).train, start=5)
    assert_equal(start, seen[5:])


def test_a_stream_without_readable_images_ends_in_an_error(tmp_path):
    source = write_shards(tmp_path / "data", broken=tuple(range(IMAGES)))
    split = load_data(source, streaming=True, cache_dir=str(tmp_path / "cache")).train
    with pytest.raises(RunError, match="nothing readable in 100 images; the last: zero bytes"):
        batches(split)


def test_labels_out_of_range_end_in_an_error(tmp_path):
    kinds = Features(image=Image(), label=Value("int64"))
    source = write_shards(tmp_path / "data", kinds=kinds, label=lambda i: i % 3)
    with pytest.raises(RunError, match="labels are bare numbers; with --streaming, say how many with --num-classes"):
        load_data(source, streaming=True, cache_dir=str(tmp_path / "cache"))
    data = load_data(source, streaming=True, cache_dir=str(tmp_path / "cache"), num_classes=2)
    with pytest.raises(RunError, match=r"label 2 lies outside of 0 \.\. 1"):
        batches(data.train)


def test_an_epoch_below_one_global_batch_is_refused(split):
    with pytest.raises(RunError, match="24 images per epoch are less than one global batch of 32"):
        batches(split, batch=16, processes=2)


def test_the_embedded_digits_can_be_streamed():
    data = load_data(None, streaming=True)
    assert len(batches(data.train, classes=10, images_per_epoch=64, batch=16)) == 8
