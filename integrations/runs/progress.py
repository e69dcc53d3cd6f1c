"""What a training says while it runs: running means, a log with a JSON object per line, and a progress bar.

Nothing here waits for the device until means are asked for, so that a training step costs what it costs.
"""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from cyclekd.integrations.runs.errors import RunError
from cyclekd.integrations.runs.folder import from_plain, to_plain, write_text_atomically

SECONDS_BETWEEN_LINES = 30.0
"""Where stderr is a file there is no bar but a line, at most this often."""

BAR = "{desc} {percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
LINE = BAR.replace("|{bar:10}|", "")


class Log:
    """Records of a run in a file, one JSON object per line, each with its `kind` and `step`."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    def write(self, kind: str, step: int, **values: object) -> None:
        """Append a record, in the file when this returns; NaN and infinities become strings that `read` turns back.

        Errors: RunError where it cannot be written.
        """
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_as_line({"kind": kind, "step": step, **values}))
        except OSError as error:
            raise RunError(f"cannot write {self.path}: {error.strerror or error}. Earlier lines are whole") from error

    def read(self) -> list[dict[str, object]]:
        """All records, first one first; a last line that was cut off in writing is left out.

        Errors: RunError for any other line that is no record.
        """
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        records = [_as_record(line) for line in lines]
        if records and records[-1] is None:
            records.pop()
        if None in records:
            raise RunError(f"{self.path}, line {records.index(None) + 1}: is no record: repair or remove that line")
        return records

    def truncate(self, step: int, again: Collection[str] = ()) -> None:
        """Drop what was recorded after `step`, and a line cut off, so that a resumed run can say it again.

        Of `step` itself, records whose kind is in `again` are dropped too.
        """
        if self.path.exists():
            records = [record for record in self.read() if record["step"] <= step]
            kept = [record for record in records if record["step"] < step or record["kind"] not in again]
            write_text_atomically(self.path, "".join(_as_line(record) for record in kept))


class Meter:
    """Weighted means of named scalars since the last `reset`, of this process, in float64.

    Names may come and go: each name's mean is over the steps that had it.
    """

    def __init__(self) -> None:
        # of values that come together: names to ([number of names], sum of weights)
        self._sums: dict[tuple[str, ...], tuple[list[float], float]] = {}
        # not summed yet: a tensor of its values for each device, see `_together`, and their weight
        self._waiting: list[tuple[dict[tuple[str, ...], Tensor], float]] = []

    def add(self, values: Mapping[str, Tensor | float], weight: float = 1) -> None:
        """Count `values`, each a scalar, `weight` times (samples of the step, say).

        One copy on their device: sums are made when they are asked for, since a GPU may wait for what a step does here.
        """
        self._waiting.append((_together(values), weight))

    def means(self) -> dict[str, float]:
        """Name to mean, in one transfer from the device; waits for it."""
        totals: dict[str, float] = {}
        weights: dict[str, float] = {}
        for names, (sums, weight) in self._summed().items():
            for name, value in zip(names, sums, strict=True):
                totals[name] = totals.get(name, 0.0) + value
                weights[name] = weights.get(name, 0.0) + weight
        return {name: total / weights[name] if weights[name] else math.nan for name, total in totals.items()}

    def reset(self) -> None:
        self._sums.clear()
        self._waiting.clear()

    def state(self) -> list[dict[str, object]]:
        """All sums for JSON, as hexadecimal floats: a meter that loads them goes on bit for bit, NaN included."""
        return [
            {"names": list(names), "sums": [value.hex() for value in sums], "weight": float(weight).hex()}
            for names, (sums, weight) in self._summed().items()
        ]

    def load(self, state: list[dict[str, object]]) -> None:
        """Go on from what `state` gave."""
        self.reset()
        self._sums = {
            tuple(part["names"]): ([float.fromhex(value) for value in part["sums"]], float.fromhex(part["weight"]))
            for part in state
        }

    def _summed(self) -> dict[tuple[str, ...], tuple[list[float], float]]:
        """All sums, with one transfer per device; one after the other, so that it does not matter when this is done."""
        waiting, self._waiting = self._waiting, []
        tensors = [tensor for parts, _ in waiting for tensor in parts.values()]
        numbers = {
            device: iter(torch.cat([tensor for tensor in tensors if tensor.device == device]).tolist())
            for device in dict.fromkeys(tensor.device for tensor in tensors)
        }
        for parts, weight in waiting:
            for names, tensor in parts.items():
                sums, weights = self._sums.get(names, ([0.0] * len(names), 0.0))
                self._sums[names] = [each + next(numbers[tensor.device]) * weight for each in sums], weights + weight
        return self._sums


class Progress:
    """A bar over all steps of a run on the terminal; a line now and then where stderr is no terminal.

    `enabled` is true on the main process alone; elsewhere all calls do nothing.
    """

    def __init__(self, total_steps: int, start_step: int, steps_per_epoch: int, enabled: bool = True) -> None:
        self.total_steps, self.start_step, self.steps_per_epoch = total_steps, start_step, steps_per_epoch
        self.enabled = enabled
        self._step, self._text = start_step, ""
        self._start, self._last_line, self._line_step = time.monotonic(), -math.inf, None
        self._bar = _Bar(total=total_steps, initial=start_step) if enabled and sys.stderr.isatty() else None

    def update(
        self,
        step: int,
        values: Mapping[str, float] | None = None,
        lr: float | None = None,
        samples_per_second: float | None = None,
    ) -> None:
        """`step` steps are done; without `values` those shown last stay."""
        if not self.enabled:
            return
        self._step = step
        if values is not None:
            self._text = describe(values, lr, samples_per_second)
        if self._bar is not None:
            self._bar.set_description_str(self._epoch(), refresh=False)
            self._bar.set_postfix_str(self._text, refresh=False)
            self._bar.update(step - self._bar.n)
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._print_line()

    def message(self, text: str) -> None:
        """`text` on stdout, above the bar."""
        if self._bar is not None:
            self._bar.write(text)
        elif self.enabled:
            print(text, flush=True)

    def close(self) -> None:
        """The last state stays visible; a second call does nothing."""
        if self._bar is not None:
            self._bar.close()
        elif self.enabled and self._step not in (self.start_step, self._line_step):
            self._print_line()

    def _epoch(self) -> str:
        epochs = math.ceil(self.total_steps / self.steps_per_epoch)
        return f"epoch {min(max(self._step - 1, 0) // self.steps_per_epoch + 1, epochs)}/{epochs}"

    def _print_line(self) -> None:
        self._last_line, self._line_step = time.monotonic(), self._step
        seconds = self._last_line - self._start
        shown = {"prefix": self._epoch(), "postfix": self._text, "initial": self.start_step}
        line = tqdm.format_meter(self._step, self.total_steps, seconds, bar_format=LINE, **shown)
        print(line, file=sys.stderr, flush=True)


class _Bar(tqdm):
    monitor_interval = 0  # no thread of its own: a process with threads should not fork the workers of a data loader

    def __init__(self, total: int, initial: int) -> None:
        super().__init__(total=total, initial=initial, bar_format=BAR, dynamic_ncols=True, miniters=1, mininterval=0.2)


def describe(values: Mapping[str, float], lr: float | None = None, samples_per_second: float | None = None) -> str:
    """One short line: the values of a term's cycles stand together, as in `task 6.91 6.90`."""
    terms: dict[str, list[str]] = {}
    for name, value in values.items():
        terms.setdefault(measure_and_cycles(name)[0], []).append(f"{value:.3g}")
    parts = [f"{term} {' '.join(numbers)}" for term, numbers in terms.items()]
    parts += [f"lr {lr:.2e}"] if lr is not None else []
    parts += [f"{samples_per_second:,.0f} samples/s"] if samples_per_second is not None else []
    return ", ".join(parts)


def measure_and_cycles(name: str) -> tuple[str, tuple[int, ...]]:
    """Name and cycles of a value: `tokens_1_2` gives ("tokens", (1, 2)), `top1_2_ema` ("top1_ema", (2,)), `lr` none."""
    found = re.fullmatch(r"(.+?)((?:_\d+)+)((?:_[a-z]\w*)?)", name)
    if not found:
        return name, ()
    measure, cycles, variant = found.groups()
    return measure + variant, tuple(int(cycle) for cycle in cycles.split("_")[1:])


def _as_line(record: Mapping[str, object]) -> str:
    return json.dumps(to_plain(record), allow_nan=False) + "\n"  # in ASCII, which has one kind of line end


def _as_record(line: str) -> dict[str, object] | None:
    """None for what is no record; a JSON object that was cut off never parses."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return from_plain(record) if isinstance(record, dict) and "step" in record else None


def _together(values: Mapping[str, Tensor | float]) -> dict[tuple[str, ...], Tensor]:
    """Names to their values [number of names], on each device those that are there; copies, without the graph."""
    devices: dict[torch.device, dict[str, Tensor]] = {}
    for name, value in values.items():
        scalar = value.detach() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
        devices.setdefault(scalar.device, {})[name] = scalar.reshape(())
    return {tuple(here): torch.stack(list(here.values())) for here in devices.values()}


def duration(seconds: float) -> str:
    """As words, such as 3 min 07 s."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60:02} min" if hours else f"{rest // 60} min {rest % 60:02} s"
