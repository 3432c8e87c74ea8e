"""Promoters that race, and promoters that are killed: real processes on whatever a registry stands on."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerContext
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from types import FrameType

from pipeline.errors import ConflictError
from pipeline.gates import Evidence
from pipeline.model import LoadedModel
from pipeline.registry import ModelRegistry
from tests.pipeline.versions import promoted, register, saying

HANG = 240

BOUNDARIES = ("append", "create", "reconcile", "set_aliases", "set_registered_model_alias")
"""Functions at whose calls and returns a promotion is killed: all that it does from the entry to the alias."""


def processes() -> ForkServerContext:
    """Makes processes that have imported everything; the fork server may be older than this environment."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipeline.promotion", "mlflow", "s3fs"])
    return context


def once_all_are_here(wanted: str, start: Barrier, loaded: LoadedModel, split: str) -> Evidence:
    """Say something about a model; of the one to be promoted, not of the champion, when everybody is asked."""
    if loaded.digest == wanted:
        start.wait(HANG)
    return saying(2.0, 2.1)(loaded, split)


def race(
    environment: Mapping[str, str],
    uri: str,
    name: str,
    rounds: Sequence[int],
    start: Barrier,
    said: Queue[tuple[int, str]],
) -> None:
    """Promote one version a round, everybody having decided on the same ledger; the others of a round lose."""
    os.environ.update(environment)
    registry = ModelRegistry(uri)
    for number, version in enumerate(rounds):
        wanted = registry.tags(name, version)["glow.digest"]
        try:
            entry = promoted(registry, version, functools.partial(once_all_are_here, wanted, start), name=name).entry
            said.put((number, f"won {entry.attempt}" if entry else "nothing"))
        except ConflictError as error:
            said.put((number, error.what))
        start.wait(HANG)


def race_of(registry: ModelRegistry, folder: Path, racers: int, rounds: int, name: str = "faces") -> None:
    """Let processes race; expect one winner a round, named by the others, and a line of entries the alias follows."""
    for seed in (0, 1):
        register(registry, folder / f"m{seed}", seed, name)
    # A version that is champion already is not promoted again: rounds take turns.
    versions = [1 + number % 2 for number in range(rounds)]
    context = processes()
    start, said, began = context.Barrier(racers), context.Queue(), time.monotonic()
    words = (dict(os.environ), registry.uri, name, versions, start, said)
    racing = [context.Process(target=race, args=words) for _ in range(racers)]
    for process in racing:
        process.start()
    found = [said.get(timeout=HANG) for _ in range(racers * rounds)]
    for process in racing:
        process.join(60)
    entries = registry.ledger(name).entries()
    assert [entry.version for entry in entries] == versions
    for number, entry in enumerate(entries):
        words = sorted(word for each, word in found if each == number)
        assert words == sorted([f"won {entry.attempt}", *[f"{entry} came first"] * (racers - 1)])
    assert registry.resolve(name, "champion") == versions[-1]
    won = sum(word.startswith("won") for _, word in found)
    print(f"{racers} promoters, {rounds} rounds: {won} winners, {len(entries)} entries,", end=" ")
    print(f"{time.monotonic() - began:.0f} s")


def promote_until(
    environment: Mapping[str, str], uri: str, name: str, version: int, last: int, survived: Queue[int]
) -> None:
    """Promote, and kill this process at its boundary number `last`; tell how many there were if it survives."""
    os.environ.update(environment)
    registry = ModelRegistry(uri)
    passed = 0

    def profiled(frame: FrameType, event: str, _: object) -> None:
        nonlocal passed
        ours = "/pipeline/" in frame.f_code.co_filename or "/mlflow/" in frame.f_code.co_filename
        if ours and event in ("call", "return") and frame.f_code.co_name in BOUNDARIES:
            passed += 1
            if passed == last:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(profiled)
    promoted(registry, version, saying(2.0, 2.1), name=name)
    sys.setprofile(None)
    survived.put(passed)


def kill_at_boundaries(registry: ModelRegistry, folder: Path, stride: int, name: str = "faces") -> int:
    """Kill promotions at every `stride`-th boundary; expect the next one to put all right. How many boundaries."""
    for seed in (0, 1):
        register(registry, folder / f"m{seed}", seed, name)
    context = processes()
    survived = context.Queue()
    for last in range(1, 100, stride):
        before = registry.ledger(name).entries()
        version = 2 if before and before[-1].version == 1 else 1
        words = (dict(os.environ), registry.uri, name, version, last, survived)
        process = context.Process(target=promote_until, args=words)
        process.start()
        process.join(HANG)
        after = registry.ledger(name).entries()
        assert after[: len(before)] == before
        assert len(after) - len(before) in (0, 1)
        promoted(registry, version, saying(2.0, 2.1), name=name)
        assert [entry.version for entry in registry.ledger(name).entries()][len(before) :] == [version]
        assert registry.resolve(name, "champion") == version
        if process.exitcode == 0:
            break
    boundaries = survived.get(timeout=10)
    assert 10 < boundaries < last
    return boundaries
