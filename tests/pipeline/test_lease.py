"""Laws of the lease (promise R20): one holder at a time, a dead one is no obstacle, a former one cannot commit."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from pipeline.checkpoint import accepting, load_latest, newest_step
from pipeline.config import ClusterConfig
from pipeline.errors import ConflictError
from pipeline.lease import Beat, Holder, held
from pipeline.saver import Saver
from pipeline.storage import Storage, canonical_json, open_storage
from pipeline.world import World
from tests.reliability import measured

SECONDS = 0.6


@pytest.fixture
def run(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "run"))


def take(run: Storage, owner: str = "me", events: list[str] | None = None, seconds: float = SECONDS) -> int:
    """Take the run and give it back."""
    with held(World(), run, lambda: newest_step(run), owner, seconds, (events or []).append) as token:
        return token


def left_by(run: Storage, **changes: object) -> Holder:
    """What a holder leaves that never released, changed as told."""
    take(run)
    holder = Holder(**(json.loads(run.read("leases/00000001.json")) | changes))
    run.write("leases/00000001.json", canonical_json(asdict(holder)))
    run.write("leases/00000001.beat", b"1")
    return holder


def test_tokens_rise_and_a_released_run_is_free(run: Storage) -> None:
    assert [take(run), take(run, "you"), take(run)] == [1, 2, 3]
    assert [key for key in run.list("leases") if key.endswith("beat")] == ["leases/00000003.beat"]


def test_a_living_holder_is_not_disturbed(run: Storage) -> None:
    with (
        held(World(), run, lambda: 0, "me", 60, print),
        pytest.raises(ConflictError, match=r"process \d+ on .* is training this run"),
    ):
        take(run, "you")
    assert take(run, "you") == 2


HOLDS = """
import sys, time
from pipeline.lease import held
from pipeline.storage import open_storage
from pipeline.world import World
with held(World(), open_storage(sys.argv[1]), lambda: 0, "other", 60, print):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_killed_holder_is_no_obstacle(run: Storage) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDS, run.url], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            with pytest.raises(ConflictError, match=f"process {process.pid}"):
                take(run)
        finally:
            process.kill()
    events: list[str] = []
    with held(World(), run, lambda: 0, "me", 60, events.append) as token:
        assert token == 2
    assert events == [f"process {process.pid} on {events[0].split()[3]} is gone: its run is taken over"]


def test_a_silent_holder_elsewhere_is_given_its_time(run: Storage) -> None:
    assert ClusterConfig().lease_s == 60
    left_by(run, host="elsewhere/boot/pid")
    events, asked = list[str](), time.monotonic()
    with held(World(), run, lambda: 0, "you", SECONDS, events.append) as token:
        waited = time.monotonic() - asked
        assert token == 2
    measured("R20", f"a silent holder of a lease of {SECONDS} s (60 unless told): taken over after", waited, "s")
    assert waited >= SECONDS
    assert ["watching" in events[0], "silent" in events[1], len(events)] == [True, True, 2]


def test_a_beating_holder_elsewhere_keeps_the_run(run: Storage) -> None:
    left_by(run, host="elsewhere/boot/pid")
    beat = Beat(run, 1, SECONDS / 10)
    try:
        with pytest.raises(ConflictError, match="on elsewhere is training this run"):
            take(run, "you", seconds=30)
    finally:
        beat.release()


def test_attempts_of_one_job_follow_at_once(run: Storage) -> None:
    left_by(run, host="elsewhere/boot/pid")
    events: list[str] = []
    with held(World(), run, lambda: 0, "me", 60, events.append) as token:
        assert (token, events) == (2, [])


def test_of_many_at_once_one_holds_it(run: Storage) -> None:
    tokens: list[int] = []
    ready = threading.Barrier(6)

    def compete(owner: str) -> None:
        ready.wait()
        try:
            with held(World(), run, lambda: 0, owner, 60, lambda text: None) as token:
                tokens.append(token)
                done.wait()
        except ConflictError:
            refused.release()

    done, refused = threading.Event(), threading.Semaphore(0)
    threads = [threading.Thread(target=compete, args=(f"job {index}",)) for index in range(6)]
    for thread in threads:
        thread.start()
    try:
        assert all(refused.acquire(timeout=60) for _ in range(5))
        assert tokens == [1]
        measured("R20", "six jobs at once: refused", len(threads) - len(tokens), "of 6")
    finally:
        done.set()
        for thread in threads:
            thread.join()


def commit(run: Storage, step: int, token: int) -> None:
    saver = Saver(run, World(), "print", token=token)
    try:
        saver.begin(step, step * 16, {"model/w": torch.full((2,), float(token))}, {})
        saver.finish()
    finally:
        saver.close()


def loaded(run: Storage, events: list[str] | None = None) -> tuple[int, float] | None:
    found = load_latest(run, World(), accepting("print"), (events if events is not None else []).append)
    return None if found is None else (found.step, float(found.tensors["model/w"][0]))


def test_a_former_holder_cannot_commit(run: Storage) -> None:
    first = take(run)
    commit(run, 1, first)
    second = take(run)
    with pytest.raises(ConflictError, match="taken over by"):
        commit(run, 2, first)
    assert loaded(run) == (1, first)
    commit(run, 2, second)
    assert loaded(run) == (2, second)


def test_a_commit_that_a_former_holder_had_under_way_is_void(run: Storage) -> None:
    """Between its last look at the lease and its commit the run was taken: no reader takes that commit."""
    first = take(run)
    commit(run, 1, first)
    other = open_storage(f"{run.url}-other")
    commit(other, 2, first)
    second = take(run)
    for key in other.list("checkpoints"):
        run.write(key, other.read(key))
    events: list[str] = []
    assert loaded(run, events) == (1, first)
    assert "had lost the run" in events[0]
    measured("R20", "commits of a former holder that a reader takes", loaded(run)[0] - 1, "of 1")
    commit(run, 2, second)
    assert loaded(run) == (2, second)


def test_a_holder_is_named_by_more_than_its_number(run: Storage) -> None:
    """A process that got the number of a dead one is another."""
    holder = left_by(run)
    run.write("leases/00000001.json", canonical_json(asdict(replace(holder, started=holder.started - 1000))))
    assert take(run, "you") == 2
