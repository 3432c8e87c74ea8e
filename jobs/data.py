"""`python -m jobs data ...`: from what people have to a verified dataset, and a look at it."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import tyro


def main(argv: Sequence[str]) -> int:
    """Run one of toy, prepare, verify, show."""
    commands = {"toy": toy}
    return tyro.extras.subcommand_cli_from_dict(
        commands, prog="python -m jobs data", args=list(argv), description=__doc__
    )


def toy(
    dest: Annotated[str, tyro.conf.arg(metavar="DEST")],
    /,
    images: int = 2000,
    size: int = 64,
    seed: int = 0,
    workers: int = 0,
) -> int:
    """Draw procedural faces in the CelebAMask-HQ layout, with attributes, class labels and the renderer's truth.

    Args:
        dest: Folder to write.
        images: How many.
        size: Height and width in pixels, up to 1024.
        seed: Image n of a seed is always the same.
        workers: Processes; 0 takes one a core.
    """
    from pipeline.toy import write_toy

    start = time.perf_counter()
    with progress("draw faces", images) as report:
        done = write_toy(Path(dest), images=images, size=size, seed=seed, workers=workers or cores(), report=report)
    if not done:
        print(f"{dest} holds these {images} faces already")
        return 0
    print(f"{dest}: {images} faces of {size} px in {time.perf_counter() - start:.1f} s, CC0-1.0")
    return 0


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show how far a piece of work is: a bar on a terminal, a line every ten seconds elsewhere."""
    if sys.stderr.isatty():
        with _bar(what, total) as report:
            yield report
    else:
        yield _lines(what, total)


@contextlib.contextmanager
def _bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)


def _lines(what: str, total: int) -> Callable[[int], None]:
    done, last = 0, time.monotonic()

    def report(more: int) -> None:
        nonlocal done, last
        done += more
        if time.monotonic() - last >= 10:
            last = time.monotonic()
            print(f"{what}: {done} of {total}", file=sys.stderr, flush=True)

    return report
