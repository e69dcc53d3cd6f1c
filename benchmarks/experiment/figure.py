"""One picture of an experiment: every run, the paired differences, and the way there over compute."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.experiment.results import EQUAL, PLAIN, Row, all_cycles, by_arm, difference, one_pass

COLORS = {PLAIN: "#767676", EQUAL: "#d55e00"}
FURTHER = ("#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#882255")

Arms = dict[str, dict[int, Row]]


def draw(path: Path, rows: Sequence[Row], title: str, metric: str) -> None:
    arms = by_arm(rows)
    further = (name for name in arms if name not in COLORS)
    colors = COLORS | {name: FURTHER[i % len(FURTHER)] for i, name in zip(count(), further)}
    figure = Figure(figsize=(15, 4.8), layout="constrained")
    runs, differences, curves = figure.subplots(1, 3, width_ratios=(3, 3, 4))
    draw_runs(runs, arms, colors)
    draw_differences(differences, arms, colors)
    draw_curves(curves, arms, colors)
    runs.set(title=f"Every run, {metric}", ylabel=f"{metric}, %")
    differences.set(title="Difference to plain, same seed", ylabel="percentage points, 95 % t-interval")
    curves.set(
        title="One pass over compute, mean and standard deviation",
        xlabel="training passes over the data",
        ylabel=f"{metric}, %",
    )
    for axes in (runs, differences, curves):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def draw_runs(axes: Axes, arms: Arms, colors: dict[str, str]) -> None:
    """A dot per seed and a line through each seed's dots; hollow where all cycles were run."""
    for seed in sorted({seed for runs in arms.values() for seed in runs}):
        places = [(x, runs[seed].one_pass) for x, runs in enumerate(arms.values()) if seed in runs]
        axes.plot(*zip(*places, strict=True), color="#cccccc", linewidth=0.8, zorder=1)
    for x, (arm, runs) in enumerate(arms.items()):
        axes.scatter([x] * len(runs), [row.one_pass for row in runs.values()], color=colors[arm], zorder=2)
        every = [row.all_cycles for row in runs.values() if row.all_cycles is not None]
        axes.scatter([x + 0.2] * len(every), every, facecolors="none", edgecolors=colors[arm], zorder=2)
    axes.scatter([], [], color="black", label="one pass")
    axes.scatter([], [], facecolors="none", edgecolors="black", label="all cycles")
    axes.legend(frameon=False)
    name_arms(axes, list(arms))


def draw_differences(axes: Axes, arms: Arms, colors: dict[str, str]) -> None:
    others = [arm for arm in arms if arm != PLAIN]
    axes.axhline(0, color=COLORS[PLAIN], linewidth=1)
    for x, arm in enumerate(others):
        for shift, value, fill in ((0.0, one_pass, colors[arm]), (0.2, all_cycles, "none")):
            found = difference(arms, arm, PLAIN, value)
            if found is None:
                continue
            bar = {"yerr": found.half} if found.count > 1 else {}
            axes.errorbar(x + shift, found.mean, **bar, fmt="o", color=colors[arm], markerfacecolor=fill, capsize=4)
    name_arms(axes, others)


def draw_curves(axes: Axes, arms: Arms, colors: dict[str, str]) -> None:
    finals = []
    for arm, runs in arms.items():
        curves = np.array([row.curve for row in runs.values()])  # [seeds, points, 2]
        passes, values = curves[0, :, 0], curves[:, :, 1]
        axes.plot(passes, values.mean(0), color=colors[arm], label=arm, linewidth=2, marker=".")
        if len(values) > 1:
            spread = values.std(0, ddof=1)
            low, high = values.mean(0) - spread, values.mean(0) + spread
            axes.fill_between(passes, low, high, color=colors[arm], alpha=0.12, linewidth=0)
        finals += list(values[:, -1])
    room = 0.25 * max(finals)  # the start is alike for all and would flatten the rest
    lowest = max(0.0, min(finals) - room)
    axes.set_ylim(lowest, min(100, max(finals) + 0.1 * room + 0.5))
    axes.set_xlim(left=0)
    axes.legend(loc="lower right", frameon=False)


def name_arms(axes: Axes, arms: list[str]) -> None:
    names = [arm.replace(" ", "\n", 1).replace("self-", "self-\n") for arm in arms]
    axes.set_xticks(range(len(arms)), names, fontsize="small")
    axes.set_xlim(-0.5, max(len(arms) - 0.3, 0.5))
