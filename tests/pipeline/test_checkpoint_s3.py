"""Promises R8 and R9 on a real S3 server: a death before or after any request, and damage of any object."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest

from pipeline.storage import Bucket, Storage, open_storage
from tests.pipeline.test_checkpoint import check, latest, put, run_of_two_parts
from tests.reliability import measured


class Died(BaseException):
    """The process is as good as dead: nothing it would still do reaches the server."""


class Dying(Bucket):
    """A bucket whose user dies at a request: every change of the store has a moment before and one after."""

    left: ClassVar[int]

    def _moment(self) -> None:
        Dying.left -= 1
        if Dying.left < 0:
            raise Died

    def _around(self, change: Callable[[], None]) -> None:
        self._moment()
        change()
        self._moment()

    def write(self, key: str, data: bytes) -> None:
        self._around(lambda: super(Dying, self).write(key, data))

    def create(self, key: str, data: bytes) -> None:
        self._around(lambda: super(Dying, self).create(key, data))

    def remove(self, key: str) -> None:
        self._around(lambda: super(Dying, self).remove(key))


def test_a_death_around_any_request_loses_at_most_the_step_being_saved(s3: str) -> None:
    moments = 0
    while True:
        run = open_storage(f"{s3}/{uuid.uuid4().hex}")
        put(run, 1)
        put(run, 2, keep=2)
        Dying.left = moments
        try:
            put(Dying(run.url), 3, keep=2)
        except Died:
            moments += 1
        else:
            break
        survives(run)
    assert moments == 2 * CHANGES
    measured("R8", "moments around requests of a save on S3, a death at each: the last one loads", moments, "deaths")


CHANGES = 4
"""Of a save with one old checkpoint to retire: a part, the commit, and the old one's commit and part."""


def survives(run: Storage) -> None:
    """The last commit loads in silence, training goes on from it, and soon nothing is left of the death."""
    events: list[str] = []
    loaded = latest(run, events)
    assert loaded is not None
    assert loaded.step in (2, 3)
    check(loaded, loaded.step)
    assert not events
    for step in range(loaded.step + 1, 5):
        put(run, step, keep=2)
    check(latest(run), 4)
    assert sorted(key.split("/")[1] for key in run.list() if key.endswith("commit.json")) == STEPS
    assert len(run.list()) == 2 * len(STEPS)


STEPS = ["step-00000003", "step-00000004"]


@pytest.fixture
def two(s3: str, tmp_path: Path) -> Storage:
    """Two checkpoints of two parts each."""
    written = open_storage(str(tmp_path / "run"))
    for step in (1, 2):
        run_of_two_parts(written, step)
    run = open_storage(f"{s3}/{uuid.uuid4().hex}")
    for key in written.list():
        run.write(key, written.read(key))
    check(latest(run), 2)
    return run


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "flip": flipped,
    "truncate": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "longer": lambda data: data + b"\0",
}


def test_damage_of_any_object_costs_one_step_loudly(two: Storage) -> None:
    keys = list(two.list("checkpoints/step-00000002"))
    for key in keys:
        whole = two.read(key)
        for damage in DAMAGES.values():
            two.write(key, damage(whole))
            refused(two)
        two.remove(key)
        refused(two, events=not key.endswith("commit.json"))  # without one it was never a checkpoint
        two.write(key, whole)
    check(latest(two), 2)
    cases = len(keys) * (len(DAMAGES) + 1)
    measured("R9", "objects flipped, cut, emptied, longer, removed: one step back", cases, f"of {cases}")


def test_swapped_objects_are_seen(two: Storage) -> None:
    first, second = [key for key in two.list("checkpoints/step-00000002") if "part" in key]
    contents = two.read(first), two.read(second)
    two.write(first, contents[1])
    two.write(second, contents[0])
    refused(two)
    two.write(first, contents[0])
    two.write(second, contents[1])
    two.write("checkpoints/step-00000002/commit.json", two.read("checkpoints/step-00000001/commit.json"))
    refused(two)


def refused(run: Storage, events: int = 1) -> None:
    """The newest checkpoint is passed over for the one before, with an event."""
    told: list[str] = []
    check(latest(run, told), 1)
    assert len(told) == events
    assert all("step 2 is damaged" in text for text in told)
