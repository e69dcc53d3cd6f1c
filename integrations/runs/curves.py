"""The picture of a run, drawn from its log: loss terms and learning rate over steps, metrics over epochs."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from io import BytesIO
from itertools import cycle, product
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from cyclekd.integrations.runs.folder import write_atomically
from cyclekd.integrations.runs.progress import measure_and_cycles

COLORS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's, which the colour-blind can tell apart; their yellow is too light for a line."""
STYLES = ("-", "--", ":", "-.")
POINTS = 400
"""A line of more points shows the mean of neighbours, as its single steps would hide each other."""
LOG_FROM = 20
"""Losses that are so many times apart, and positive, get a logarithmic axis."""
MARKED = 30
"""Lines of up to so many points have each marked: a single point makes no line."""

NOT_DRAWN = {"epoch", "lr", "seconds", "time", "gradient_norm", "grad_norm"}
NOT_DRAWN_STARTS, NOT_DRAWN_ENDS = ("alpha_", "mse_", "memory"), ("_per_second", "_seconds")

Line = tuple[list[float], list[float]]  # x, y


def draw_curves(
    path: Path, records: list[dict[str, object]], title: str, measures: Collection[str] | None = None
) -> None:
    """Draw a PNG from `Log.read()`'s records; an earlier picture is replaced at once.

    Of records of kind "train": `lr`, and every float that is a loss term. Of kind "evaluation": every float, over
    `epoch` where the records have it; one colour per cycle; with `measures` only those. Integers are counts and not
    drawn.

    Errors: RunError where it cannot be written.
    """
    train = [record for record in records if record.get("kind") == "train"]
    evaluations = [record for record in records if record.get("kind") == "evaluation"]
    over = "epoch" if any("epoch" in record for record in evaluations) else "step"
    measured = {
        name: line
        for name, line in _lines(evaluations, over).items()
        if measures is None or measure_and_cycles(name)[0] in measures
    }
    losses = {name: line for name, line in measured.items() if name.startswith("loss")}  # of another scale
    metrics = {name: line for name, line in measured.items() if name not in losses}

    figure = Figure(figsize=(12, 6.4), layout="constrained")
    figure.suptitle(title, parse_math=False)
    layout = [["terms", "metrics"], ["lr", "losses" if losses else "metrics"]]
    panels = figure.subplot_mosaic(layout, height_ratios=(3, 1.4 if losses else 1))
    _draw_terms(panels["terms"], _lines(train, "step"))
    _draw_rate(panels["lr"], _lines(train, "step", only=("lr",)))
    _draw_metrics(panels["metrics"], metrics, over, "evaluation")
    if losses:
        _draw_metrics(panels["losses"], losses, over, "evaluation loss")
    for axes in panels.values():
        _finish(axes)
    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=130)
    write_atomically(path, picture.getvalue())


def _draw_terms(axes: Axes, lines: dict[str, Line]) -> None:
    lines = {name: line for name, line in lines.items() if any(line[1])}  # a term of weight zero says nothing
    for (name, line), (style, color) in zip(lines.items(), cycle(product(STYLES, COLORS)), strict=False):
        _draw(axes, line, name, color, style, width=1.8 if name == "loss" else 1.2)
    values = [value for _, y in lines.values() for value in y if math.isfinite(value)]
    if values and 0 < min(values) < max(values) / LOG_FROM:
        axes.set_yscale("log")
    axes.set(title="training loss and its terms", xlabel="step")
    _legend(axes, lines)


def _draw_rate(axes: Axes, lines: dict[str, Line]) -> None:
    for line in lines.values():
        _draw(axes, line, "lr", COLORS[1])
    axes.set(title="learning rate", xlabel="step")
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))


def _draw_metrics(axes: Axes, lines: dict[str, Line], over: str, title: str) -> None:
    """Colour tells the cycle, style the measure."""
    measures = list(dict.fromkeys(measure_and_cycles(name)[0] for name in lines))
    for name, line in lines.items():
        measure, cycles = measure_and_cycles(name)
        color = COLORS[cycles[0] % len(COLORS)] if cycles else COLORS[0]
        label = f"{measure}, cycle {cycles[0]}" if cycles else measure
        _draw(axes, line, label, color, STYLES[measures.index(measure) % len(STYLES)])
    axes.set(title=title, xlabel=over)
    _legend(axes, lines)


def _draw(axes: Axes, line: Line, label: str, color: str, style: str = "-", width: float = 1.5) -> None:
    x, y = _thinned(line)
    marker = "o" if len(x) <= MARKED else ""
    axes.plot(x, y, style, color=color, label=label, linewidth=width, marker=marker, markersize=3.5)


def _finish(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    if not axes.lines:
        axes.set(xticks=[], yticks=[], xlabel="")
        axes.text(0.5, 0.5, "nothing recorded yet", ha="center", va="center", transform=axes.transAxes, color="#767676")
        return
    axes.grid(alpha=0.25)
    axes.margins(x=0.02)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 300k


def _legend(axes: Axes, lines: dict[str, Line]) -> None:
    if lines:
        axes.legend(frameon=False, fontsize="small", ncols=1 + len(lines) // 7)


def _lines(records: list[dict[str, object]], over: str, only: Iterable[str] = ()) -> dict[str, Line]:
    """Name to its points, of the numbers in `records` that are drawn, or of `only` these."""
    lines: dict[str, Line] = {}
    for record in records:
        for name, value in record.items():
            # a whole number is a count (of samples, say) and no measure
            if over in record and isinstance(value, float) and (name in only if only else _is_drawn(name)):
                x, y = lines.setdefault(name, ([], []))
                x.append(record[over])
                y.append(value)
    return lines


def _is_drawn(name: str) -> bool:
    return name not in NOT_DRAWN and not name.startswith(NOT_DRAWN_STARTS) and not name.endswith(NOT_DRAWN_ENDS)


def _thinned(line: Line) -> Line:
    x, y = line
    y = [value if math.isfinite(value) else math.nan for value in y]  # a gap in the line
    if len(x) <= POINTS:
        return x, y
    return tuple([float(np.mean(part)) for part in np.array_split(values, POINTS)] for values in (x, y))
