"""The stream: shards fetched and proven ahead of need, decoded in threads, given as batches that know their position.

Its only state is the position. The order says which samples the coming batches need; a few threads fetch their shards
through the cache, others decode (Pillow lets go of the interpreter while it inflates), and neither their number nor
how far they run ahead changes what a batch holds. A shard stays open while a batch ahead needs it, no longer.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.cache import ShardCache
from pipeline.errors import ConfigError, DataError
from pipeline.manifest import Manifest, Split
from pipeline.open_shards import OpenShards, allow_open_files
from pipeline.order import Ints, Sequential
from pipeline.quarantine import Opened, Policy, Shelf
from pipeline.shards import decode, described
from pipeline.storage import Storage

DEPTH = 2
"""Batches decoded before they are asked for."""
PLANNED = 64
"""Batches located at a time."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Consecutive samples of the stream, or a rank's rows of them; tensors on the CPU, pinned where there is a GPU."""

    pixels: Tensor
    """uint8 [b, c, h, w]."""
    labels: Tensor
    """int64 [b]; -1 where unknown."""
    attributes: Tensor
    """int8 [b, A] in {-1, 0, 1}, all of the manifest's."""
    epochs: Tensor
    """int64 [b]: how often the split was read before."""
    samples: Tensor
    """int64 [b]: index in the split."""
    stand_ins: Tensor
    """bool [b]: the sample's shard is damaged, and a sample of another shard is here in its place."""
    position: int
    """Global position of the first row of the whole batch."""

    def __len__(self) -> int:
        return len(self.pixels)


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """Where the rows of a coming batch lie."""

    position: int
    epochs: Ints
    shards: Ints
    rows: Ints
    needs: list[int]


@dataclass(kw_only=True)
class _Pending:
    """A batch being decoded."""

    plan: _Plan
    batch: Batch
    parts: list[Future[None]] = field(default_factory=list)


class Stream:
    """A split of a dataset in some order. For one thread at a time; `close` it, or use it as a context.

    So many processes of this node read other rows through the same cache: `beside`, this one among them.
    """

    def __init__(
        self,
        storage: Storage,
        manifest: Manifest,
        split: Split,
        order: Sequential,
        cache: Path,
        cache_bytes: int,
        threads: int = 0,
        damaged: Policy = "fail",
        beside: int = 1,
    ) -> None:
        if (order.shards, order.size) != (len(split.shards), split.samples):
            raise ValueError(f"an order of {order.size} samples for a split of {split.samples}")
        self._manifest, self._split, self._order = manifest, split, order
        self._storage, self._limit, self._pin = storage, cache_bytes, torch.cuda.is_available()
        self._cache = ShardCache(storage, cache, cache_bytes, manifest.foreign)
        self._shelf = Shelf(self._cache, split.shards, damaged)
        self._shards = OpenShards(self._shelf, order.window)
        self._beside = beside
        self._threads = threads or min(4, len(os.sched_getaffinity(0)))
        self._decoders = ThreadPoolExecutor(self._threads, thread_name_prefix="stream-decode")

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def samples(self) -> int:
        """Samples in an epoch."""
        return self._split.samples

    def figures(self) -> dict[str, float]:
        """Counts so far: shards fetched, requests to the service repeated, samples of damaged shards."""
        return {
            "data/shards_fetched": float(self._cache.fetches),
            "data/requests_repeated": float(self._storage.retries),
            "data/samples_quarantined": float(self._shelf.quarantined),
        }

    @property
    def damaged(self) -> list[int]:
        """Numbers of the shards that others stand in for."""
        return self._shelf.damaged

    def told(self, damaged: Iterable[int]) -> None:
        """Count what other ranks found damaged; `DataError` where it is too much together, the same on every rank."""
        self._shelf.told(damaged)

    def fetch(self, positions: Ints) -> Batch:
        """The samples at these global positions [n]. Raises as `batches` does."""
        (plan,) = self._located(np.asarray(positions, dtype=np.int64)[None])
        self._shards.make_way(plan.needs, len(plan.needs))
        self._shards.take(plan.needs)
        pending = self._started(plan)
        try:
            return _finished(pending)
        finally:
            self._drop([pending], [])

    def batches(self, start: int, batch: int, rows: slice = slice(None), stop: int | None = None) -> Generator[Batch]:
        """Global batches k = 0, 1, ... at positions [start + k * batch, start + (k + 1) * batch), `rows` of each.

        Goes on for ever, or to position `stop`, where the last batch may be short or hold none of the rows; every rank
        gets equally many. Raises `DataError` naming the shard where bytes are not what the manifest says, `RemoteError`
        where it cannot be fetched, `ConfigError` where the cache cannot hold what is open at a time.
        """
        own = range(batch)[rows]
        ahead, most = self._prepared(batch, own)
        plans = self._plans(start, batch, own, start + (1 << 62) if stop is None else stop, min(ahead, PLANNED))
        coming = next(plans, None)
        waiting: deque[_Plan] = deque()
        ready: deque[_Pending] = deque()
        try:
            while coming or waiting or ready:
                while coming and len(waiting) + len(ready) < ahead:
                    if not self._shards.make_way(coming.needs, most) and (waiting or ready):
                        break
                    self._shards.take(coming.needs)
                    waiting.append(coming)
                    coming = next(plans, None)
                while waiting and len(ready) < DEPTH:
                    ready.append(self._started(waiting.popleft()))
                found = _finished(ready[0])
                self._shards.give(ready.popleft().plan.needs)
                yield found
        finally:
            self._drop(ready, waiting)

    def close(self) -> None:
        """Stop all threads and let every shard go; what is being fetched is finished, or fails, first."""
        self._shards.close()
        self._decoders.shutdown(cancel_futures=True)

    def _prepared(self, batch: int, own: range) -> tuple[int, int]:
        """How many batches to run ahead, about a window, and how many shards may be open: two windows of every lane."""
        first, last = (place * self._order.lanes // batch for place in (own.start, max(own.start, own.stop - 1)))
        shards = min(2 * self._order.window * (last - first + 1), len(self._split.shards))
        needed = self._largest(shards)
        if needed > self._limit:
            found = f"{self._limit / 1e9:.3g} GB of cache for {shards} shards read at a time"
            raise ConfigError(found, where=self._split.name, cure=f"set data.cache_gb to {needed / 1e9:.3g} or more")
        on_node = min(shards * self._beside, 2 * self._order.window * self._order.lanes)
        self._cache.refuse_small_disk(self._largest(on_node))
        allow_open_files(shards)
        window = self._order.window * self._order.lanes * self.samples // len(self._split.shards)
        return max(DEPTH + 1, window // batch), shards

    def _largest(self, count: int) -> int:
        """Bytes of the largest shards."""
        return int(np.sort(self._split.shards.bytes)[-count:].sum())

    def _plans(self, start: int, batch: int, own: range, stop: int, count: int) -> Iterator[_Plan]:
        while start < stop:
            firsts = start + batch * np.arange(min(count, -(-(stop - start) // batch)), dtype=np.int64)
            positions = firsts[:, None] + np.arange(own.start, own.stop)
            plans = self._located(positions, firsts)
            if start + batch * len(firsts) > stop:
                plans[-1:] = self._located(positions[-1:, positions[-1] < stop], firsts[-1:])
            yield from plans
            start += batch * len(firsts)

    def _located(self, positions: Ints, firsts: Ints | None = None) -> list[_Plan]:
        """Locate the rows of some batches [batches, rows] at once."""
        firsts = positions[:, 0] if firsts is None else firsts
        found = [part.reshape(positions.shape) for part in self._order.locate(positions.reshape(-1))]
        return [
            _Plan(position=int(first), epochs=epochs, shards=shards, rows=rows, needs=np.unique(shards).tolist())
            for first, epochs, shards, rows in zip(firsts, *found, strict=True)
        ]

    def _drop(self, ready: deque[_Pending] | list[_Pending], waiting: deque[_Plan] | list[_Plan]) -> None:
        for pending in ready:
            wait([part for part in pending.parts if not part.cancel()])  # a cancelled one may never be notified
            self._shards.give(pending.plan.needs)
        for plan in waiting:
            self._shards.give(plan.needs)

    def _started(self, plan: _Plan) -> _Pending:
        count, size, channels = len(plan.shards), self._manifest.size, self._manifest.channels
        batch = Batch(
            pixels=self._empty(torch.uint8, count, channels, size, size),
            labels=self._empty(torch.int64, count),
            attributes=self._empty(torch.int8, count, len(self._manifest.attributes)),
            epochs=torch.from_numpy(plan.epochs.copy()),
            samples=torch.from_numpy(self._order.sample(plan.shards, plan.rows)),
            stand_ins=torch.zeros(count, dtype=torch.bool),
            position=plan.position,
        )
        pending = _Pending(plan=plan, batch=batch)
        indices = {shard: self._shards[shard] for shard in plan.needs}
        cuts = [count * part // self._threads for part in range(self._threads + 1)]
        for begin, end in itertools.pairwise(cuts):
            if begin < end:
                pending.parts.append(self._decoders.submit(self._decode, plan, indices, batch, begin, end))
        return pending

    def _empty(self, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=self._pin)

    def _decode(self, plan: _Plan, indices: dict[int, Future[Opened]], batch: Batch, begin: int, end: int) -> None:
        pixels, labels, attributes = batch.pixels.numpy(), batch.labels.numpy(), batch.attributes.numpy()
        form, stand_ins = self._manifest.image, batch.stand_ins.numpy()
        shards, rows = plan.shards[begin:end].tolist(), plan.rows[begin:end].tolist()
        for place, shard, row in zip(range(begin, end), shards, rows, strict=True):
            opened = indices[shard].result()
            data, meta = opened.read(row)
            stand_ins[place] = opened.damaged
            try:
                pixels[place] = decode(data, form.size, form.channels, form.encoding)
                label, attributes[place] = described(meta, self._manifest.labels, self._manifest.attributes)
                labels[place] = -1 if label is None else label
            except DataError as error:
                where = f"{self._storage.where(self._split.shards[shard].file)} row {row}"
                raise DataError(error.what, where=where, cure=error.cure) from error


def _finished(pending: _Pending) -> Batch:
    for part in pending.parts:
        part.result()
    return pending.batch
