"""A signal asks a training to stop, a second one stops it; the exit code says which."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from cyclekd.integrations.runs.stopping import Stopping, leave_signals_to_the_parent

SIGNALS = [signal.SIGINT, signal.SIGTERM]


class Received(Exception):
    pass


@pytest.fixture(autouse=True)
def before() -> Iterator[None]:
    """A way with signals that a test can see, in place of the end of the tests."""

    def raise_it(number: int, frame: Any) -> None:
        raise Received(number)

    handlers = {number: signal.signal(number, raise_it) for number in SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


class Processes:
    """An accelerator whose other process was given this signal, or none (0)."""

    device, num_processes = torch.device("cpu"), 2

    def __init__(self, others: int) -> None:
        self.others = others

    def gather(self, value: Tensor) -> Tensor:
        return torch.cat([value, torch.tensor([[self.others, int(self.others > 0)]])])


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_a_second_one_acts_at_once(number: int) -> None:
    with Stopping() as stopping:
        assert not stopping.asked
        signal.raise_signal(number)
        assert stopping.asked
        with pytest.raises(Received):
            signal.raise_signal(number)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_exit_code_and_the_reason_are_those_of_the_signal(number: int, code: int) -> None:
    with Stopping() as stopping:
        signal.raise_signal(number)
    assert (stopping.exit_code, stopping.why) == (code, signal.Signals(number).name)


def test_one_signal_leaves_the_other_to_be_noted() -> None:
    with Stopping() as stopping:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
    assert stopping.asked


@pytest.mark.parametrize("number", SIGNALS)
def test_afterwards_signals_do_what_they_did_before(number: int) -> None:
    with Stopping():
        pass
    with pytest.raises(Received):
        signal.raise_signal(number)
    with pytest.raises(ZeroDivisionError), Stopping():
        raise ZeroDivisionError
    with pytest.raises(Received):
        signal.raise_signal(number)


def test_the_end_of_the_time_asks_to_stop_and_is_no_failure() -> None:
    stopping = Stopping(minutes=0.02 / 60)
    assert not stopping.asked
    time.sleep(0.03)
    assert stopping.asked
    assert (stopping.exit_code, stopping.why) == (0, "the time limit")


def test_without_a_limit_time_does_not_end() -> None:
    assert not Stopping().asked
    assert not Stopping(minutes=60).asked


@pytest.mark.parametrize(("others", "here", "expected"), [(0, False, False), (15, False, True), (0, True, True)])
def test_processes_agree_to_stop_when_any_was_asked(others: int, here: bool, expected: bool) -> None:
    with Stopping() as stopping:
        if here:
            signal.raise_signal(signal.SIGTERM)
        assert stopping.agreed(Processes(others)) is expected
        assert stopping.exit_code == (143 if expected else 0), "all give the same reason"


def test_workers_leave_both_signals_to_the_training() -> None:
    leave_signals_to_the_parent(0)
    for number in SIGNALS:
        signal.raise_signal(number)
