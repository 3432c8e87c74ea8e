"""An ordered map: the builtin `map`, or over processes that end with their parent, however that ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Protocol, TypeVar

from pipeline.errors import PipelineError

A = TypeVar("A")
B = TypeVar("B")


class OrderedMap(Protocol):
    """Whoever does the work: `function(item)` in the order of the items, the first exception at its place."""

    def __call__(self, function: Callable[[A], B], items: Iterable[A], /) -> Iterator[B]: ...


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ordered_map(function: Callable[[A], B], items: Iterable[A], workers: int) -> Iterator[B]:
    """Yield `function(item)` in the order of the items, from `workers` spawned processes, or here when that is one.

    The first exception is raised at its place; work that has not begun is dropped. Nothing is forked: S3 connections
    and their event loops belong to the process that opened them.
    """
    if workers <= 1:
        yield from map(function, items)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent) as pool:
        try:
            yield from pool.map(function, items)
        except BrokenProcessPool as error:
            raise PipelineError("a worker process died", cure="is memory short? try fewer workers") from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _end_with_parent() -> None:
    """Leave when the parent is gone: a killed one closes no queue, and its children would wait for ever.

    Ctrl-C reaches the whole group; the parent alone answers it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
