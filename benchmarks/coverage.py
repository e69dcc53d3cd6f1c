"""What happens to every timm architecture and Hugging Face model type when it is wrapped.

    python benchmarks/coverage.py timm          # all rows over two processes
    python benchmarks/coverage.py hf
    python benchmarks/coverage.py hf bert vit   # these names alone; prints, writes no results file
    python benchmarks/coverage.py page          # docs/coverage.md, from the newest results

Every row builds a small random model, wraps it in one line and compares three cycles with the same model whose block
list is really repeated (benchmarks/matrix/judge.py): outputs, tokens, losses and the gradients of all parameters. A run
that was stopped goes on where it was when the same command is given again.
"""

from __future__ import annotations

import argparse
import csv
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, fields
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import timm
import torch
import transformers
from tqdm import tqdm

if not __package__:  # run as a script: the folder in which `benchmarks` lies is where imports start
    sys.path[0] = str(Path(__file__).parents[1])

from benchmarks.matrix import hf_models, timm_models
from benchmarks.matrix.judge import Judgement, OutOfTime, judge
from benchmarks.matrix.page import VERDICTS, totals, write_page
from benchmarks.matrix.row import Row
from benchmarks.records import RESULTS, free_path, origin, read_rows, write_rows

LIBRARIES = {"timm": (timm_models, timm), "hf": (hf_models, transformers)}
Key = tuple[str, str]
"""Name and task: what tells the rows of one library apart."""

BATCH = 200
"""Rows after which the processes are replaced, since libraries keep some of what is built in them."""


def main() -> None:
    args = parse_arguments()
    if args.library == "page":
        print(f"written to {write_page()}")
        return
    source = origin()  # before the run, whose code may be worked on meanwhile
    rows = rows_of(args.library)
    wanted = [key for key in rows if not args.names or key[0] in args.names]
    partial = None if args.names else results_path(args.library).with_suffix(".partial")
    judged = judge_all(args.library, wanted, partial, args)
    print_summary(args.library, judged, details=bool(args.names))
    if partial is not None:
        path = free_path(results_path(args.library))
        write_rows(path, [row | source for row in judged])
        partial.unlink()
        print(f"written to {path}")
    sys.exit(any(row["verdict"] == "wrong" for row in judged))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", choices=[*LIBRARIES, "page"], help="whose models, or the page about both")
    parser.add_argument("names", nargs="*", help="these models alone (default: all of them)")
    parser.add_argument("--processes", type=int, default=2, help="each on one thread; the default is 2")
    parser.add_argument("--timeout", type=int, default=180, help="seconds after which a row is given up")
    args = parser.parse_args()
    if args.processes < 1 or args.timeout < 1:
        parser.error("--processes and --timeout are at least 1")
    known = {name for name, _ in rows_of(args.library)} if args.names else set()
    if unknown := set(args.names) - known:
        parser.error(f"no model of {args.library} in the matrix: {', '.join(sorted(unknown))}")
    return args


def rows_of(library: str) -> dict[Key, Row]:
    """All rows of a library; models are built later, one by one."""
    rows, _ = LIBRARIES[library]
    return {(row.name, row.task): row for row in rows.rows()}


def results_path(library: str) -> Path:
    """With the versions in its name, since another version has other models."""
    _, package = LIBRARIES[library]
    return RESULTS / f"coverage-{library}-{package.__version__}-torch{torch.__version__}.csv"


# -- the run -----------------------------------------------------------------------------------------------------------


def judge_all(
    library: str, wanted: list[Key], partial: Path | None, args: argparse.Namespace
) -> list[dict[str, object]]:
    """The judgements in the order of the rows, those of an earlier run that was stopped among them."""
    done = {(row["name"], row["task"]): row for row in read_rows(partial)} if partial and partial.exists() else {}
    waiting = [key for key in wanted if key not in done]
    if done:
        print(f"going on after {len(done)} rows in {partial}")
    with tqdm(total=len(waiting), unit="model", desc=library) as bar:
        for start in range(0, len(waiting), BATCH):
            for key, row in judge_batch(library, waiting[start : start + BATCH], args):
                done[key] = row
                bar.update()
                if partial is not None:
                    append(partial, row)
    return [done[key] for key in wanted]


def judge_batch(library: str, keys: list[Key], args: argparse.Namespace) -> Iterator[tuple[Key, dict[str, object]]]:
    """Each row as soon as it is judged; in processes of their own, which end with the batch."""
    with ProcessPoolExecutor(args.processes, get_context("spawn"), initializer=be_quiet) as pool:
        futures = {pool.submit(judge_by_name, library, key, args.timeout): key for key in keys}
        for future in as_completed(futures):
            yield futures[future], result_of(future, futures[future])


def judge_by_name(library: str, key: Key, timeout: int) -> Judgement:
    """In a process of its own, which finds the row by its name."""
    with time_limit(timeout):
        return judge(library, rows_of(library)[key])


def be_quiet() -> None:
    """One thread per process, and no words from the libraries between the lines of the progress bar."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise OutOfTime(f"gave up after {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def result_of(future: Future[Judgement], key: Key) -> dict[str, object]:
    try:
        return asdict(future.result())
    except BrokenProcessPool:
        sys.exit(
            f"a process died, maybe for want of memory, while {key} was waited for: run the command again to go on"
        )


def append(path: Path, row: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Judgement)])
        if fresh:
            writer.writeheader()
        writer.writerow(row)


# -- what came out -----------------------------------------------------------------------------------------------------


def print_summary(library: str, judged: list[dict[str, object]], details: bool) -> None:
    for row in judged:
        if details or row["verdict"] in ("wrong", "refused"):
            print(f"{row['name']} {row['task']}: {row['verdict'] or 'not evaluated'} {row['reason']}")
    counts = totals(judged)
    right = (counts["exact"] + counts["defined"]) / max(counts["rows"], 1)
    print(
        f"{library}: {len(judged)} rows, {counts['models']} models in {counts['rows']} rows evaluated: "
        f"{', '.join(f'{counts[verdict]} {verdict}' for verdict in VERDICTS)}; {right:.1%} exact or defined"
    )


if __name__ == "__main__":
    main()
