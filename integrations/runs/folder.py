"""The folder of one run: where each file lies, and writing that leaves either the old file or the new one.

A run never writes into a folder that holds something else. Of several processes, only the main one makes a `RunFolder`
that writes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Mapping
from contextlib import suppress
from itertools import chain, count
from pathlib import Path
from typing import Any

from cyclekd.integrations.runs.errors import RunError

RUNS = Path("runs")
"""Where runs without a folder of their own choosing go, below the working folder."""

NUMBERS_WITHOUT_A_WORD = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
"""JSON has no word for these three; they are written as strings of these names."""


class RunFolder:
    """The paths of one run."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.environment = self.path / "environment.json"
        self.log = self.path / "log.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.best = self.path / "best"
        self.final = self.path / "model"
        self.curves = self.path / "curves.png"
        self.card = self.path / "README.md"

    @classmethod
    def create(cls, path: Path | None, name: str) -> RunFolder:
        """A new, empty folder at `path`; without one, the first that is free of runs/<name>, runs/<name>-2, ...

        Errors: RunError where `path` holds something or cannot be made.
        """
        if path is None:
            return cls(_make_free_folder(RUNS / name))
        try:
            Path(path).mkdir(parents=True, exist_ok=True)
            require_empty(path)
        except OSError as error:
            raise RunError(f"--out {path}: cannot make this folder: {error.strerror}. Choose another --out") from error
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """The folder of an earlier run, to continue it. Errors: RunError where there is no config.json."""
        folder = cls(path)
        if not folder.config.is_file():
            seen = "holds no config.json" if folder.path.is_dir() else "is no folder"
            raise RunError(f"--resume: {path} {seen}, so there is no run to continue: name the folder of one")
        return folder

    def write_config(self, settings: Mapping[str, object]) -> None:
        """Settings as `read_config` will return them: tuples as lists, paths as strings."""
        write_json(self.config, settings)

    def read_config(self) -> dict[str, object]:
        """Errors: RunError for a file that is no JSON."""
        try:
            return from_plain(json.loads(self.config.read_text(encoding="utf-8")))
        except ValueError as error:
            raise RunError(f"{self.config}: is no JSON ({error}): restore it, or start a new run") from error

    def files(self) -> list[Path]:
        """What there is, relative to the run folder, for a closing summary; of a checkpoint its folder alone."""
        paths = sorted(path.relative_to(self.path) for path in self.path.rglob("*") if path.is_file())
        shown = [path for path in paths if not any(part.startswith(".") for part in path.parts)]
        folded = [Path(*path.parts[:2]) if path.parts[0] == self.checkpoints.name else path for path in shown]
        return list(dict.fromkeys(folded))


def require_empty(path: Path) -> None:
    """Errors: RunError for a folder that holds something; where there is none, none is made."""
    names = (each.name for each in Path(path).iterdir()) if Path(path).is_dir() else ()
    content = sorted(name for name in names if not (name.startswith(".") and name.endswith(".tmp")))
    if "config.json" in content:
        raise RunError(f"--out {path}: holds a run: continue it with --resume, or choose another --out")
    if content:
        raise RunError(f"--out {path}: holds {_some(content)}, which are no run: choose another --out")


def settings_that_differ(
    saved: Mapping[str, object], now: Mapping[str, object], free: Collection[str]
) -> dict[str, tuple[object, object]]:
    """Name to (saved, now) of the settings that a resumed run would change, those in `free` left out.

    Compared as JSON would keep them: a tuple equals a list, a path its string. A name that is missing counts as None.
    """
    saved, now = to_plain(saved), to_plain(now)
    pairs = {name: (saved.get(name), now.get(name)) for name in chain(saved, now) if name not in free}
    return {name: (before, after) for name, (before, after) in pairs.items() if before != after}


def write_json(path: Path, value: object) -> None:
    """Indented JSON, atomically."""
    write_text_atomically(path, json.dumps(to_plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text_atomically(path: Path, text: str) -> None:
    """`write_atomically` of UTF-8 text."""
    write_atomically(path, text.encode())


def write_atomically(path: Path, data: bytes) -> None:
    """Whatever happens, `path` holds the old content or the new one, whole.

    Errors: RunError where it cannot be written, a full disk for one; nothing of the attempt stays.
    """
    path = Path(path)
    # in the same folder, as a rename is atomic within one file system only
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}. What it held before is untouched") from error
    finally:
        with suppress(OSError):  # after a rename there is none
            temporary.unlink()


def to_plain(value: object) -> Any:
    """`value` in what JSON has: tuples and sets as lists, arrays as numbers, NaN and infinities as strings."""
    if isinstance(value, Mapping):
        return {str(name): to_plain(each) for name, each in value.items()}
    if isinstance(value, set | frozenset):
        return sorted((to_plain(each) for each in value), key=str)
    if isinstance(value, list | tuple):
        return [to_plain(each) for each in value]
    if hasattr(value, "tolist"):  # tensors and arrays
        return to_plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value if value is None or isinstance(value, str | int | float) else str(value)


def from_plain(value: object) -> Any:
    """What `to_plain` made strings of NaN and infinities, as numbers again."""
    if isinstance(value, dict):
        return {name: from_plain(each) for name, each in value.items()}
    if isinstance(value, list):
        return [from_plain(each) for each in value]
    return NUMBERS_WITHOUT_A_WORD.get(value, value) if isinstance(value, str) else value


def _make_free_folder(path: Path) -> Path:
    for folder in chain([path], (path.with_name(f"{path.name}-{i}") for i in count(2))):
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise RunError(f"cannot make the folder {folder}: {error.strerror}. Choose one with --out") from error
        return folder
    raise AssertionError("count() does not end")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
