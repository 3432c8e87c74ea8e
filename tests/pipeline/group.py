"""Real process groups for tests: every rank its own process, joined by gloo through a file."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from pipeline.world import World, joined


def run_group(size: int, function: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
    """Call function(world, *args) on `size` joined processes and give their values in rank order."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipeline.world", "pipeline.checkpoint"])
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(size, mp_context=context) as pool:
        store = f"file://{Path(folder) / 'store'}"
        futures = [pool.submit(_rank, rank, size, store, function, args) for rank in range(size)]
        return [future.result(timeout) for future in futures]


def _rank(rank: int, size: int, store: str, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    torch.set_num_threads(1)
    world = World(rank=rank, size=size, local_rank=rank)
    with joined(world, store, timeout=60):
        return function(world, *args)
