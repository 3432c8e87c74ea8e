"""Which checkpoints of a run stay, and the end of those that do not."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.checkpoint import STEP, read_commit, step_name
from pipeline.errors import DataError
from pipeline.storage import Storage


def pin(run: Storage, step: int) -> None:
    """Have a checkpoint stay for as long as RUN/pins names it."""
    run.write(f"pins/{step_name(step)}", b"")


def pinned(run: Storage) -> set[int]:
    """The steps that are to stay."""
    return {int(match[1]) for key in run.sub("pins").list() if (match := STEP.fullmatch(f"{key}/"))}


def milestones(images: Mapping[int, int], every: int) -> set[int]:
    """Of steps with their images, the first at or after each multiple of `every` images."""
    first: dict[int, int] = {}
    for step in sorted(images):
        first.setdefault(images[step] // every, step)
    return {step for number, step in first.items() if number > 0}


def images_at(folder: Storage, step: int) -> int:
    """Where a checkpoint stands; 0 where its commit cannot be read: it marks nothing."""
    try:
        return read_commit(folder, step).images
    except DataError:
        return 0


def retire(folder: Storage, keys: list[str], newest: int, kept: set[int]) -> None:
    """Remove checkpoints that are not `kept`, and attempts that were never committed, up to the newest step.

    Later steps are left alone: they are damaged ones that were passed over, or another writer's.
    """
    present = {int(match[1]) for key in keys if (match := STEP.match(key))}
    for step in sorted(step for step in present if step <= newest):
        if step in kept:
            _drop_attempts(folder, step, keys)
        else:
            folder.remove(f"{step_name(step)}/commit.json")  # first, so that no commit stands over missing parts
            folder.remove_tree(step_name(step))


def _drop_attempts(folder: Storage, step: int, keys: list[str]) -> None:
    """Remove the attempts of a kept step that its commit does not name; those of a damaged one stay."""
    inside = [key.split("/") for key in keys if key.startswith(step_name(step) + "/")]
    attempts = {parts[1] for parts in inside if len(parts) == 3}
    if len(attempts) < 2:
        return
    try:
        named = read_commit(folder, step).attempt
    except DataError:
        return
    for attempt in sorted(attempts - {named}):
        folder.remove_tree(f"{step_name(step)}/{attempt}")
