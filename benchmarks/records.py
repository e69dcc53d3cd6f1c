"""Results files: CSV, with what they were measured on, and never written over."""

from __future__ import annotations

import csv
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def origin() -> dict[str, str]:
    """Commit, date and command of this run."""
    return {
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "command": shlex.join(["python", *sys.argv]),
    }


def commit() -> str:
    """`git describe` of the working folder; "unknown" without git."""
    try:
        command = ["git", "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_rows(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """A new file with a header; FileExistsError where there is one."""
    rows = list(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("x", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def print_rows(rows: Sequence[Mapping[str, object]]) -> None:
    """A table on the screen, columns to the right."""
    widths = {key: max(len(key), *(len(str(row[key])) for row in rows)) for key in rows[0]}
    for row in [{key: key for key in rows[0]}, *rows]:
        print("  ".join(f"{row[key]!s:>{width}}" for key, width in widths.items()))


def free_path(path: Path) -> Path:
    """`path`, or the first numbered neighbour that does not exist yet; earlier results stay."""
    numbered = (path.with_stem(f"{path.stem}-{i}") for i in range(2, 10**6))
    return path if not path.exists() else next(each for each in numbered if not each.exists())
