"""A clean end on Ctrl-C and SIGTERM: the signal asks, the training stops at the next step with a checkpoint."""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType

import torch
from accelerate import Accelerator


class Stopping:
    """Notices Ctrl-C, SIGTERM and the end of `minutes`; a second signal of the same kind acts at once, as ever."""

    def __init__(self, minutes: float | None = None) -> None:
        self.signal: int | None = None
        self.deadline = None if minutes is None else time.monotonic() + 60 * minutes

    def __enter__(self) -> Stopping:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        signal.signal(number, self._before[signal.Signals(number)])

    @property
    def asked(self) -> bool:
        """Whether this process was asked to stop."""
        return self.signal is not None or (self.deadline is not None and time.monotonic() >= self.deadline)

    def agreed(self, accelerator: Accelerator) -> bool:
        """Whether any process was asked to stop; every process has to ask at the same step."""
        if accelerator.num_processes == 1:
            return self.asked
        here = torch.tensor([[self.signal or 0, int(self.asked)]], device=accelerator.device)
        number, asked = accelerator.gather(here).amax(0).tolist()
        self.signal = number or None  # so that all give the same reason and exit code
        return bool(asked)

    @property
    def why(self) -> str:
        return signal.Signals(self.signal).name if self.signal is not None else "the time limit"

    @property
    def exit_code(self) -> int:
        """128 + the signal, as shells count; 0 where time was up."""
        return 0 if self.signal is None else 128 + self.signal


def leave_signals_to_the_parent(worker: int) -> None:
    """For DataLoader workers: terminals and Slurm signal all processes, and to its parent a dead worker is an error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
