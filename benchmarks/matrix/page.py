"""The page that shows the matrix, written from the results files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.records import RESULTS, read_rows

PAGE = Path(__file__).parents[2] / "docs" / "coverage.md"
LIBRARIES = {"timm": "timm", "hf": "Hugging Face transformers"}
VERDICTS = ("exact", "defined", "refused", "wrong")

HEAD = """# What can be wrapped

Written by `python benchmarks/coverage.py page` from {sources}; the rows were judged by
`python benchmarks/coverage.py timm` and `... hf`, which anyone can run again.

Every row is a model with random weights, as small as it can be built without downloads. It is wrapped in one line and
run with three cycles, in evaluation and in training arithmetic (dropout and the like at rate 0), against a **truth**
that knows nothing of cyclekd: the same model whose list of blocks is really one, two and three times as long, or a
forward written by hand. Outputs, losses, tokens and the gradients of every parameter have to agree to 1e-5 of their
largest value, and the truth's cycles have to differ by more than 1e-3, with a gradient in every block.

| verdict | meaning |
|---|---|
| exact | equal to the model with the repeated list |
| defined | equal to a loop written by hand, which the row names: a longer list would do something else between rounds |
| refused | a `CycleError` says why, and what to write instead |
| wrong | anything else: no row may say this |
| (none) | not evaluated: not built, no stack, or no valid comparison; the reason is told |

{totals}

"Checkpointing": the gradients with the library's own activation checkpointing equal those without to 1e-6, and blocks
were seen to run again. "Hidden states": every cycle returns as many as the plain model, and the last one that its
repeated list has. "Cache": the same with `use_cache=True`, and a filled cache is refused. Where single precision
rounds too much to tell, the comparison is made in double, and the row says so.
"""


def write_page() -> Path:
    """The page, anew; returns where it lies."""
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page())
    return PAGE


def page() -> str:
    """Its text: totals first, then a table per library."""
    tables = {library: read_rows(newest(library)) for library in LIBRARIES}
    sources = " and ".join(f"[{newest(lib).name}](../benchmarks/results/{newest(lib).name})" for lib in LIBRARIES)
    head = HEAD.format(sources=sources, totals=_totals(tables))
    return "\n".join([head, *(_section(library, rows) for library, rows in tables.items())])


def newest(library: str) -> Path:
    """The results file with the latest date in it."""
    found = list(RESULTS.glob(f"coverage-{library}-*.csv"))
    return max(found, key=lambda path: (read_rows(path)[0]["date"], path.name))


def totals(rows: Sequence[Mapping[str, object]]) -> dict[str, int]:
    """Rows by verdict, and how many models and rows were evaluated."""
    evaluated = [row for row in rows if row["verdict"]]
    counts = Counter(row["verdict"] for row in evaluated)
    return {
        "rows": len(evaluated),
        "models": len({row["name"] for row in evaluated}),
        **{verdict: counts[verdict] for verdict in VERDICTS},
        "not evaluated": len(rows) - len(evaluated),
    }


def _totals(tables: dict[str, list[dict[str, str]]]) -> str:
    names = ["models", "rows", *VERDICTS, "not evaluated"]
    lines = [f"| | {' | '.join(names)} | exact or defined |", "|---" * (len(names) + 2) + "|"]
    for library, rows in tables.items():
        counts = totals(rows)
        right = (counts["exact"] + counts["defined"]) / counts["rows"]
        cells = [str(counts[name]) for name in names]
        lines.append(f"| {LIBRARIES[library]} | {' | '.join(cells)} | {right:.1%} |")
    return "\n".join(lines)


def _section(library: str, rows: list[dict[str, str]]) -> str:
    lines = [
        f"## {LIBRARIES[library]}\n",
        "| model | task | stack | blocks | verdict | checkpointing | hidden states | cache | reason |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_line(row) for row in sorted(rows, key=lambda row: (not row["verdict"], row["name"], row["task"]))]
    return "\n".join(lines) + "\n"


def _line(row: dict[str, str]) -> str:
    columns = ("task", "stack", "blocks", "verdict", "checkpointing", "hidden_states", "cache", "reason")
    cells = [row["name"], *(row[name].replace("|", "\\|") for name in columns)]
    return f"| {' | '.join(cells)} |"
