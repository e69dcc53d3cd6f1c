"""The model card of a run: Markdown with the front matter that the Hugging Face hub reads.

Numbers are those of the run; none is taken from elsewhere.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Mapping, Sequence

from cyclekd.integrations.runs.progress import measure_and_cycles

ON_THE_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
TAGS = ["cyclekd", "self-distillation"]


def model_card(
    title: str,
    *,
    library: str,
    base_model: str | None,
    datasets: Sequence[str],
    metrics: Mapping[str, float],
    settings: Mapping[str, object],
    environment: Mapping[str, object],
    usage: str,
    notes: Sequence[str],
) -> str:
    """The text of a README.md.

    `metrics` by cycle (`top1_1`, `top1_2_ema`) become a table with a column per cycle. `usage` is Python code, `notes`
    are paragraphs of a list. `base_model` and `datasets` enter the front matter where they are written as on the hub,
    owner/name; others, such as folders, stand in the text alone.
    """
    name = _one_line(title)
    parts = [
        _front_matter(library, base_model, datasets),
        f"# {name}",
        _origin(library, base_model, datasets),
        "## Results",
        "Every number was measured in this run.",
        _results(metrics),
        "## Use",
        f"```python\n{usage.strip()}\n```",
        "## Training",
        _table(("setting", "value"), [(setting, _code(value)) for setting, value in settings.items()]),
        "## Environment",
        _table(("what", "which"), [(what, _code(which)) for what, which in _flat(environment)]),
    ]
    if notes:
        parts += ["## Notes", "\n".join(f"* {_one_line(note)}" for note in notes)]
    return "\n\n".join(part for part in parts if part) + "\n"


def settings_given(args: argparse.Namespace) -> dict[str, object]:
    """Arguments as a card's settings, without those that were left out; 0 is a value."""
    return {
        name: value
        for name, value in vars(args).items()
        if name != "resume" and value is not None and value is not False and value not in ([], {})
    }


def _front_matter(library: str, base_model: str | None, datasets: Sequence[str]) -> str:
    on_the_hub = [name for name in datasets if ON_THE_HUB.fullmatch(name)]
    lines = [f"library_name: {_quoted(library)}"]
    if base_model and ON_THE_HUB.fullmatch(base_model):
        lines.append(f"base_model: {_quoted(base_model)}")
    if on_the_hub:
        lines.append(f"datasets: {_quoted(on_the_hub)}")
    lines.append(f"tags: {_quoted(list(dict.fromkeys([library, *TAGS])))}")
    return "\n".join(["---", *lines, "---"])


def _origin(library: str, base_model: str | None, datasets: Sequence[str]) -> str:
    model = [f"Model: `{base_model}`."] if base_model else []
    data = [f"Data: {', '.join(f'`{name}`' for name in datasets)}."] if datasets else []
    return " ".join([*model, f"Library: {library}.", *data])


def _results(metrics: Mapping[str, float]) -> str:
    """Measures that have cycles in one table, the others in a second."""
    by_cycle: dict[str, dict[int, float]] = {}
    single: dict[str, float] = {}
    for name, value in metrics.items():
        measure, cycles = measure_and_cycles(name)
        if len(cycles) == 1:
            by_cycle.setdefault(measure, {})[cycles[0]] = value
        else:
            single[name] = value
    if not metrics:
        return "No evaluation was run."
    tables = []
    if by_cycle:
        cycles = sorted({cycle for values in by_cycle.values() for cycle in values})
        header = ("measure", *(f"cycle {cycle}" for cycle in cycles))
        rows = [
            (measure, *(_number(values[cycle]) if cycle in values else "" for cycle in cycles))
            for measure, values in by_cycle.items()
        ]
        tables += [_table(header, rows), "Cycle 1 is the saved model as it is used: one pass through its blocks."]
    if single:
        tables.append(_table(("measure", "value"), [(name, _number(value)) for name, value in single.items()]))
    return "\n\n".join(tables)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(each) for each in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return _one_line(text).replace("|", "\\|")


def _code(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return f"`{text.replace('`', chr(39))}`" if text else ""


def _flat(values: Mapping[str, object]) -> list[tuple[str, object]]:
    """Name to value, those of inner mappings directly; what is None or empty left out."""
    rows: list[tuple[str, object]] = []
    for name, value in values.items():
        rows += list(value.items()) if isinstance(value, Mapping) else [(name, value)]
    return [(name, ", ".join(map(str, value)) if isinstance(value, list) else value) for name, value in rows if value]


def _number(value: float) -> str:
    return f"{value:.5g}"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _quoted(value: object) -> str:
    """JSON, which is YAML too."""
    return json.dumps(value, ensure_ascii=False)
