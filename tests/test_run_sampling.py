"""Which samples a training sees, in which order, from which seeds: the same for every split and every start."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from timm.data import Mixup
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from cyclekd.integrations.runs.errors import RunError
from cyclekd.integrations.runs.loading import load_batches, load_stream, on_device
from cyclekd.integrations.runs.sampling import PADDING, Draw, EvaluationBatches, TrainingBatches, epoch_order
from cyclekd.integrations.runs.seeds import derive_seed, seed_all, seeded

CPU = torch.device("cpu")
LENGTH, GLOBAL_BATCH, EPOCHS = 29, 8, 3
STEPS_PER_EPOCH = 3
SPLITS = [(8, 1, 1), (4, 1, 2), (4, 2, 1), (2, 2, 2), (2, 1, 4)]
"""(batch, accumulated, processes): ways to share out 8 samples."""


def order(batch: int = GLOBAL_BATCH, accumulate: int = 1, processes: int = 1, **options: Any) -> TrainingBatches:
    options = {"epochs": EPOCHS, "seed": 1} | options
    return TrainingBatches(LENGTH, batch=batch, accumulate=accumulate, processes=processes, **options)


def indices(batches: list[list[Draw]]) -> list[int]:
    return [draw.index for batch in batches for draw in batch]


# -- training ------------------------------------------------------------------------------------------------


def test_an_epoch_has_every_sample_once_up_to_the_last_incomplete_batch() -> None:
    batches = list(order())
    assert len(batches) == len(order()) == order().steps == EPOCHS * STEPS_PER_EPOCH
    for epoch in range(EPOCHS):
        seen = indices(batches[epoch * STEPS_PER_EPOCH : (epoch + 1) * STEPS_PER_EPOCH])
        assert len(set(seen)) == len(seen) == STEPS_PER_EPOCH * GLOBAL_BATCH
        assert set(seen) < set(range(LENGTH))


def test_data_that_divides_evenly_is_seen_whole() -> None:
    batches = TrainingBatches(24, batch=8, epochs=1, seed=0)
    assert sorted(indices(list(batches))) == list(range(24))


def test_repeated_images_meet_in_one_global_batch_and_a_third_of_the_images_makes_an_epoch() -> None:
    batches = list(TrainingBatches(48, batch=6, epochs=2, seed=0, repeats=3))
    assert all(set(Counter(indices([batch])).values()) == {3} for batch in batches)
    for epoch in (batches[:8], batches[8:]):
        assert len(set(indices(epoch))) == 48 // 3
    assert set(indices(batches[:8])) != set(indices(batches[8:]))


def test_copies_of_a_repeated_image_have_seeds_of_their_own() -> None:
    draws = [draw for batch in TrainingBatches(48, batch=6, epochs=2, seed=0, repeats=3) for draw in batch]
    assert len({draw.seed for draw in draws}) == len(draws) == 96


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_a_run_that_starts_later_sees_the_tail_of_the_undisturbed_order(split: tuple[int, ...], repeats: int) -> None:
    _, accumulate, processes = split
    for rank in range(processes):
        whole = list(order(*split, rank=rank, repeats=repeats))
        for start in range(EPOCHS * STEPS_PER_EPOCH + 1):
            tail = order(*split, rank=rank, repeats=repeats, start=start)
            assert list(tail) == whole[start * accumulate :]
            assert len(tail) == len(whole) - start * accumulate


def test_the_start_can_be_set_after_the_order_was_made() -> None:
    late = order(4, 2)
    late.start = 5
    assert list(late) == list(order(4, 2, start=5))


@pytest.mark.parametrize("split", SPLITS[1:], ids=str)
def test_all_ranks_and_parts_together_see_the_global_batch_of_one_process(split: tuple[int, ...]) -> None:
    _, accumulate, processes = split
    shares = [list(order(*split, rank=rank)) for rank in range(processes)]
    for step, expected in enumerate(order()):
        parts = [share[step * accumulate + part] for share in shares for part in range(accumulate)]
        assert all(len(part) == split[0] for part in parts)
        assert sorted(draw for part in parts for draw in part) == sorted(expected)


@pytest.mark.parametrize("split", SPLITS[1:], ids=str)
def test_a_place_and_its_mirror_in_a_batch_are_a_pair_of_the_global_batch(split: tuple[int, ...]) -> None:
    """timm's mixup mixes image j with image -1 - j of its batch, so the pairs have to be those of one process."""
    whole = list(order())
    for rank in range(split[2]):
        for number, batch in enumerate(order(*split, rank=rank)):
            expected = whole[number // split[1]]
            partner = dict(zip(expected, reversed(expected), strict=True))
            assert [partner[draw] for draw in batch] == batch[::-1]


@pytest.mark.parametrize("split", SPLITS[1:], ids=str)
@pytest.mark.parametrize("mode", ["batch", "pair"])
def test_timm_mixes_the_images_of_one_process_whatever_the_split(mode: str, split: tuple[int, ...]) -> None:
    def mixed(batch: list[Draw]) -> dict[int, list[float]]:
        images = torch.eye(LENGTH)[[draw.index for draw in batch]].reshape(-1, 1, 1, LENGTH)
        with seeded(3):
            result, _ = Mixup(mixup_alpha=0.8, mode=mode, num_classes=2)(images, torch.zeros(len(batch), dtype=int))
        return {draw.index: image.nonzero()[:, -1].tolist() for draw, image in zip(batch, result, strict=True)}

    whole = next(iter(order()))
    expected = mixed(whole)
    assert any(len(each) == 2 for each in expected.values())
    for rank in range(split[2]):
        for number, batch in enumerate(order(*split, rank=rank)):
            if number < split[1]:  # the first step
                assert mixed(batch).items() <= expected.items()


def test_an_odd_batch_is_shared_out_too() -> None:
    shares = [list(order(3, 2, 2, rank=rank, epochs=1)) for rank in range(2)]
    seen = [draw for share in shares for batch in share for draw in batch]
    assert sorted(seen) == sorted(draw for batch in order(12, epochs=1) for draw in batch)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    first, second, other = epoch_order(LENGTH, 1, 0), epoch_order(LENGTH, 1, 1), epoch_order(LENGTH, 2, 0)
    for one in (first, second, other):
        assert sorted(one.tolist()) == list(range(LENGTH))
    assert not torch.equal(first, second) and not torch.equal(first, other)
    assert first.tolist() != sorted(first.tolist())


def test_an_image_is_augmented_anew_in_every_epoch_and_run() -> None:
    seeds = [draw.seed for seed in (1, 2) for batch in order(seed=seed) for draw in batch]
    assert len(set(seeds)) == len(seeds)


def test_the_order_leaves_the_generators_of_the_training_alone() -> None:
    before = torch.get_rng_state()
    list(order())
    assert torch.equal(torch.get_rng_state(), before)


def test_data_smaller_than_a_global_batch_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(RunError, match=r"30 samples \(5 per process x 3 processes x 2 accumulated\).*29 to train on"):
        order(5, 2, 3)


# -- evaluation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 7, 16, 29])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_evaluation_sees_every_index_once_in_equal_numbers_of_equal_batches(length: int, processes: int) -> None:
    shares = [EvaluationBatches(length, batch=4, processes=processes, rank=rank) for rank in range(processes)]
    batches = [list(share) for share in shares]
    assert {len(share) for share in batches} == {len(shares[0])}
    assert {len(batch) for share in batches for batch in share} == {4}
    seen = Counter(index for share in batches for batch in share for index in batch)
    padding = seen.pop(PADDING, 0)
    assert seen == Counter(range(length))
    assert padding < 4 * processes, "no batch of padding alone on all processes"


# -- seeds ---------------------------------------------------------------------------------------------------


def test_a_derived_seed_is_the_same_on_every_machine_and_differs_by_part_order_and_type() -> None:
    assert derive_seed(0, "sample", 3, 14) == 8262821816987050744
    parts = [(0,), (1,), ("0",), (0, 1), (1, 0), (0, "1"), ("a", "b"), ("ab",)]
    seeds = {derive_seed(*each) for each in parts}
    assert len(seeds) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), torch.rand(()).item()


def test_seeding_reaches_python_numpy_and_torch() -> None:
    seed_all(derive_seed("large"))
    first = draws()
    draws()
    seed_all(derive_seed("large"))
    assert draws() == first
    seed_all(derive_seed("other"))
    assert all(a != b for a, b in zip(draws(), first, strict=True))


def test_seeding_reaches_the_device_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch, "get_device_module", lambda: SimpleNamespace(manual_seed=seeds.append))
    seed_all(5)
    assert seeds == [5]


def test_a_seeded_block_draws_the_same_and_leaves_no_trace() -> None:
    seed_all(5)
    expected = draws(), draws()
    seed_all(5)
    first = draws()
    with seeded(9):
        inside = draws()
    with pytest.raises(ZeroDivisionError), seeded(9):
        assert draws() == inside
        raise ZeroDivisionError
    assert (first, draws()) == expected
    assert inside not in expected


# -- loading -------------------------------------------------------------------------------------------------


class Noisy(Dataset[dict[str, Tensor]]):
    """Sample `index` with noise of its seed, and what its process does with Ctrl-C and SIGTERM."""

    def __getitem__(self, draw: Draw) -> dict[str, Tensor]:
        ignored = [signal.getsignal(each) == signal.SIG_IGN for each in (signal.SIGINT, signal.SIGTERM)]
        with seeded(draw.seed):
            noise = torch.rand(3) + float(np.random.rand()) + random.random()
        return {"index": torch.tensor(draw.index), "noise": noise, "ignored": torch.tensor(ignored)}


def loaded(workers: int) -> list[dict[str, Tensor]]:
    return list(load_batches(Noisy(), order(4, 2), workers, CPU))


@pytest.fixture
def heeds_ctrl_c() -> Iterator[None]:
    """A shell lets what it runs in the background ignore SIGINT: not here."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_workers_load_the_batches_of_the_training_process_and_leave_signals_to_it() -> None:
    alone, helped = loaded(workers=0), loaded(workers=2)
    assert len(alone) == len(helped) == 2 * EPOCHS * STEPS_PER_EPOCH
    assert [batch["index"].tolist() for batch in alone] == [[d.index for d in batch] for batch in order(4, 2)]
    for one, other in zip(alone, helped, strict=True):
        assert torch.equal(one["index"], other["index"]) and torch.equal(one["noise"], other["noise"])
        assert not one["ignored"].any() and other["ignored"].all()


def test_a_loader_draws_nothing_from_the_generator_of_the_training() -> None:
    before = torch.get_rng_state()
    loaded(workers=0)
    assert torch.equal(torch.get_rng_state(), before)


CRASH = """
import torch
from cyclekd.integrations.runs.loading import load_batches, on_device
from cyclekd.integrations.runs.sampling import EvaluationBatches

class Numbers(torch.utils.data.Dataset):
    def __getitem__(self, index):
        if index == {unreadable}:
            raise ValueError("a crash")
        return {{"number": torch.tensor(index)}}

def train():
    cpu = torch.device("cpu")
    stream = on_device(load_batches(Numbers(), EvaluationBatches(9, batch=1), 1, cpu), cpu)
    assert next(stream)["number"].item() == 0
    next(stream)
    raise ValueError("a crash")

try:
    train()
except {caught} as error:
    raise SystemExit(2)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("unreadable", "caught", "code"),
    [(None, "OSError", 1), (1, "OSError", 1), (1, "ValueError", 2)],
    ids=["in the training", "in a worker", "in a worker, and is told"],
)
def test_a_training_with_workers_that_fails_does_end(unreadable: int | None, caught: str, code: int) -> None:
    """Until a process has ended, the traceback that it ends with keeps the loader and its workers."""
    command = [sys.executable, "-c", CRASH.format(unreadable=unreadable, caught=caught)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code
    assert code == 2 or ("ValueError: " in done.stderr and "a crash" in done.stderr)


class Counting(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(10))


def test_a_stream_comes_in_batches() -> None:
    batches = [batch.tolist() for batch in load_stream(Counting(), 4, 0, CPU)]
    assert batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_batches_move_to_the_device_but_for_what_stays() -> None:
    meta = torch.device("meta")  # a device that any machine has
    batches = [{"image": torch.zeros(2), "index": torch.tensor([number])} for number in range(3)]
    moved = list(on_device(batches, meta, stay=("index",)))
    assert [batch["image"].device.type for batch in moved] == ["meta"] * 3
    assert [batch["index"].tolist() for batch in moved] == [[0], [1], [2]]


def test_a_batch_is_handed_on_before_the_next_one_is_asked_for() -> None:
    asked = []

    def batches() -> Iterator[dict[str, Tensor]]:
        for number in range(3):
            asked.append(number)
            yield {"image": torch.tensor([number])}

    assert next(on_device(batches(), CPU))["image"].tolist() == [0]
    assert asked == [0]
