"""Writing checkpoints (format: `pipeline.checkpoint`): parts in the background, then the commit, last of all.

`begin` copies a rank's share of the tensors and returns; a thread writes them while training goes on. Nothing is ever
waited for but at the end: `advance`, called after any batch once no rank is writing, gathers what was written and lets
rank 0 commit, in its thread again. So a checkpoint costs the loop one copy and two small messages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from pipeline.checkpoint import Commit, Part, committed, read_commit, read_part, step_name
from pipeline.errors import ConflictError, DataError, PipelineError
from pipeline.lease import Fence, attempt_name, refuse_lost, token_of
from pipeline.retention import images_at, milestones, pinned, retire
from pipeline.storage import Storage, sha256_hex
from pipeline.world import World, broadcast_object, on_all, on_first

PART_BYTES = 256 << 20
"""Parts are filled up to about this; a larger tensor is a part of its own."""

Parts = list[Part]


@dataclass
class _Flight:
    """A checkpoint under way: its head, this rank's parts being written, then rank 0's commit."""

    step: int
    images: int
    state: dict[str, Any]
    attempt: str
    parts: Future[Parts]
    commit: Future[None] | None = None

    @property
    def writing(self) -> bool:
        return not (self.commit or self.parts).done()


class Saver:
    """Commits checkpoints of one run, one at a time; every method but `writing` is collective.

    `token` is the writer's lease; all of `committed` is called on rank 0 after every commit, in the background. What is
    kept: the last `keep`, the first at or after each `keep_every` images (0 none), and the steps in RUN/pins.
    """

    def __init__(
        self,
        run: Storage,
        world: World,
        fingerprint: str,
        *,
        keep: int = 3,
        keep_every: int = 0,
        token: int = 0,
        committed: Sequence[Callable[[], None]] = (),
    ) -> None:
        self._run, self._world, self._fingerprint = run, world, fingerprint
        self._keep, self._keep_every, self._token, self._committed = keep, keep_every, token, committed
        self._seen: dict[int, int] = {}
        self._folder = run.sub("checkpoints")
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._flight: _Flight | None = None
        self.images = 0
        """Position of the newest checkpoint."""

    @property
    def writing(self) -> bool:
        """Whether this rank is still busy with the checkpoint under way."""
        return self._flight is not None and self._flight.writing

    def begin(
        self, step: int, images: int, tensors: dict[str, Tensor], state: dict[str, Any], attempt: str = ""
    ) -> None:
        """Copy what is to be saved and start writing; waits for the checkpoint before, if that is not done."""
        self.finish()
        world = self._world
        attempt = broadcast_object(world, attempt or attempt_name(self._token))
        own = {
            f"{attempt}/part-{index:03d}.safetensors": {name: _copied(tensors[name]) for name in names}
            for index, names in enumerate(shares(tensors, world.size))
            if index % world.size == world.rank
        }
        home = self._folder.sub(step_name(step))
        parts = self._thread.submit(lambda: [_write_part(home, file, content) for file, content in own.items()])
        self._flight = _Flight(step, images, state, attempt, parts)

    def advance(self) -> None:
        """Take the checkpoint under way one stage on, where there is one: call when no rank is writing.

        An error on any rank is raised on all, and the checkpoints before stay. `ConflictError` where another writer
        committed something else at this step, or took the run.
        """
        flight = self._flight
        if flight is None:
            return
        if flight.commit is None:
            flight.commit = self._thread.submit(self._commit, flight, self._gathered(flight))
            return
        self._flight = None
        on_first(self._world, flight.commit.result)
        self.images = flight.images

    def drop(self) -> bool:
        """Give up the checkpoint under way, where there is one whose commit has not begun; whether there was."""
        flight = self._flight
        if flight is None or flight.commit is not None:
            return False
        self._gathered(flight)
        self._flight = None
        on_first(self._world, lambda: self._folder.sub(step_name(flight.step)).remove_tree(flight.attempt))
        return True

    def finish(self) -> None:
        """Wait until the checkpoint under way is committed, where there is one."""
        while self._flight is not None:
            self.advance()

    def close(self) -> None:
        """Stop the thread; a checkpoint that was not finished is none. Not collective."""
        self._thread.shutdown(cancel_futures=True)

    def _gathered(self, flight: _Flight) -> Parts:
        try:
            written = on_all(self._world, flight.parts.result)
        except PipelineError:
            self._flight = None
            if self._world.rank == 0:
                self._folder.sub(step_name(flight.step)).remove_tree(flight.attempt)
            raise
        return sorted((part for some in written for part in some), key=lambda part: part.file)

    def _commit(self, flight: _Flight, parts: Parts) -> None:
        if self._world.rank > 0:
            return
        refuse_lost(self._run, token_of(flight.attempt))
        commit = Commit(
            step=flight.step,
            images=flight.images,
            fingerprint=self._fingerprint,
            attempt=flight.attempt,
            parts=tuple(parts),
            state=flight.state,
        )
        _commit(self._run, self._folder, commit)
        keys = self._folder.list()
        retire(self._folder, keys, flight.step, self._kept(flight, committed(keys)))
        for told in self._committed:
            told()

    def _kept(self, flight: _Flight, steps: list[int]) -> set[int]:
        """The committed steps that stay, up to the newest; also damaged ones, while they are among the last."""
        steps = [step for step in steps if step <= flight.step]
        kept = {flight.step, *steps[-self._keep :], *pinned(self._run)}
        if self._keep_every:
            self._seen[flight.step] = flight.images
            for step in steps:
                if step not in self._seen:
                    self._seen[step] = images_at(self._folder, step)
            kept |= milestones({step: self._seen[step] for step in steps}, self._keep_every)
        return kept


def save(
    run: Storage,
    world: World,
    step: int,
    images: int,
    fingerprint: str,
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    keep: int = 3,
    keep_every: int = 0,
    attempt: str = "",
) -> None:
    """Commit a checkpoint of `run` at `step` and retire old ones; collective, equal arguments on every rank."""
    saver = Saver(run, world, fingerprint, keep=keep, keep_every=keep_every)
    try:
        saver.begin(step, images, tensors, state, attempt)
        saver.finish()
    finally:
        saver.close()


def shares(tensors: dict[str, Tensor], ranks: int) -> list[list[str]]:
    """The names of each part: largest tensor first to the least filled part. Equal on all ranks; none is empty."""
    total = sum(tensor.nbytes for tensor in tensors.values())
    filled = [0] * max(ranks, -(-total // PART_BYTES))
    names: list[list[str]] = [[] for _ in filled]
    for name in sorted(tensors, key=lambda name: (-tensors[name].nbytes, name)):
        least = filled.index(min(filled))
        filled[least] += max(1, tensors[name].nbytes)
        names[least].append(name)
    return [sorted(some) for some in names if some]


def _copied(tensor: Tensor) -> Tensor:
    """Contiguous host memory of its own: training goes on, and safetensors refuses tensors that share memory."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())


def _write_part(home: Storage, file: str, content: dict[str, Tensor]) -> Part:
    data = safetensors.torch.save(content)
    home.write(file, data)
    return Part(file=file, bytes=len(data), sha256=sha256_hex(data))


def _commit(run: Storage, folder: Storage, commit: Commit) -> None:
    key, data = f"{step_name(commit.step)}/commit.json", commit.to_bytes()
    try:
        folder.create(key, data)
    except ConflictError:
        if not _stands(run, folder, commit):
            folder.remove(key)
            folder.create(key, data)


def _stands(run: Storage, folder: Storage, commit: Commit) -> bool:
    """Whether the same stands there, whole; False where a damaged or void one does, ConflictError: another."""
    try:
        found = read_commit(folder, commit.step)
        if not Fence(run).stands(found.attempt, found.step):
            return False
        theirs = _tensors(folder, found)
    except DataError:
        return False
    mine = _tensors(folder, commit)
    same = (commit.images, commit.fingerprint, commit.state) == (found.images, found.fingerprint, found.state)
    if same and mine.keys() == theirs.keys() and all(_equal(mine[name], theirs[name]) for name in mine):
        return True
    folder.remove_tree(f"{step_name(commit.step)}/{commit.attempt}")
    where, cure = folder.where(step_name(commit.step)), "let one job at a time write a run, then resume it"
    raise ConflictError("another writer committed this step", where=where, cure=cure)


def _tensors(folder: Storage, commit: Commit) -> dict[str, Tensor]:
    """All a checkpoint holds; however many writers cut it into parts."""
    return {name: tensor for part in commit.parts for name, tensor in read_part(folder, commit, part).items()}


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)
