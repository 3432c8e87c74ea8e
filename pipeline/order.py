"""Which sample stands at which position of the stream: a pure function of (seed, position), with no state and no I/O.

The global position g counts samples over all epochs; epoch g // N reads every sample once. Batch b is the positions
[b * B, (b + 1) * B), so batches cross epoch boundaries. The slots j = g mod B of a batch fall into C equal columns, and
every column reads a lane of its own: an epoch's shuffled sequence of shards is cut into C segments, and inside a lane
the samples are permuted within windows of a few shards. A machine that takes C / n neighbouring columns of every batch
therefore reads C / n lanes and no others: each shard is fetched by one machine, or by two where a cut falls inside it.

A lane is exactly as long as its column (equal segments up to one batch's share), so that none ends before another. C is
the largest divisor of B that leaves at least `LANE_SHARDS` shards a lane, else 1; it never depends on world size.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DataError

Ints = NDArray[np.int64]
T = TypeVar("T")

LANE_SHARDS = 8
WINDOW = 4
"""Shards of a lane among which samples are permuted."""

_SHARDS, _WINDOWS = 1, 2
"""What a random key is for: the two kinds of permutation never share one."""


class Sequential:
    """The natural order: every epoch reads the shards and their rows as they are stored."""

    lanes = 1
    window = 1

    def __init__(self, samples: Sequence[int] | Ints) -> None:
        counts = np.asarray(samples, dtype=np.int64)
        if counts.size == 0 or counts.min() < 1:
            raise DataError("a split without shards, or a shard without samples", cure="prepare the dataset again")
        self._starts = _starts(counts)

    @property
    def size(self) -> int:
        """Samples in an epoch."""
        return int(self._starts[-1])

    @property
    def shards(self) -> int:
        """Number of shards."""
        return len(self._starts) - 1

    def sample(self, shard: Ints, row: Ints) -> Ints:
        """The index in the split of a shard's row."""
        return self._starts[shard] + row

    def locate(self, positions: Ints) -> tuple[Ints, Ints, Ints]:
        """(epoch, shard, row) of global positions [n]; any order, O(1) in the position."""
        epoch, position = np.divmod(np.asarray(positions, dtype=np.int64), self.size)
        shard, row = _find(self._starts, position)
        return epoch, shard, row


class Order(Sequential):
    """The shuffled order of training.

    `samples` are the counts of the shards, `batch` the global batch, `seed` any integer. Holds 8 bytes a shard, 16 more
    for each epoch in use (two at most) and the permutations of the windows in use; never an index of samples.
    """

    def __init__(self, samples: Sequence[int] | Ints, batch: int, seed: int, window: int = WINDOW) -> None:
        super().__init__(samples)
        self.batch, self.seed, self.window = batch, seed, window
        self.lanes = lanes(self.shards, batch)
        self._epochs: OrderedDict[Hashable, tuple[Ints, Ints, Ints]] = OrderedDict()
        self._windows: OrderedDict[Hashable, NDArray[np.int32]] = OrderedDict()

    def locate(self, positions: Ints) -> tuple[Ints, Ints, Ints]:
        """(epoch, shard, row) of global positions [n]; any order, O(1) in the position."""
        positions = np.asarray(positions, dtype=np.int64)
        epoch = positions // self.size
        shard, row = np.empty_like(positions), np.empty_like(positions)
        for value in np.unique(epoch).tolist():
            chosen = epoch == value
            shard[chosen], row[chosen] = self._locate(value, positions[chosen])
        return epoch, shard, row

    def _locate(self, epoch: int, positions: Ints) -> tuple[Ints, Ints]:
        shards, starts, cuts = _kept(self._epochs, 2, epoch, lambda: self._epoch(epoch))
        lane = positions % self.batch * self.lanes // self.batch
        read = self._read(positions, lane) - self._read(epoch * self.size, lane)
        place = cuts[lane] + read
        first, _ = _find(starts, cuts[lane])
        window = (_find(starts, place)[0] - first) // self.window
        begin = np.maximum(starts[first + window * self.window], cuts[lane])
        stop = np.minimum(starts[np.minimum(first + (window + 1) * self.window, self.shards)], cuts[lane + 1])
        key = lane * self.shards + window
        by_window = np.argsort(key, kind="stable")
        for group in np.split(by_window, np.flatnonzero(np.diff(key[by_window])) + 1):
            one = group[0]
            permutation = self._window(epoch, int(lane[one]), int(window[one]), int(stop[one] - begin[one]))
            place[group] = begin[one] + permutation[place[group] - begin[one]]
        rank, row = _find(starts, place)
        return shards[rank], row

    def _read(self, position: Ints | int, lane: Ints) -> Ints:
        """How many of the positions before `position`, counted over all epochs, read the column of `lane`."""
        share = self.batch // self.lanes
        whole, slot = np.divmod(position, self.batch)
        return whole * share + np.clip(slot - lane * share, 0, share)

    def _epoch(self, epoch: int) -> tuple[Ints, Ints, Ints]:
        """The shuffled shards [S], where each begins in the epoch's sequence [S + 1], where each lane does [C + 1]."""
        shards = _permutation(self.seed, _SHARDS, self.shards, epoch)
        every = np.arange(self.lanes)
        lengths = self._read((epoch + 1) * self.size, every) - self._read(epoch * self.size, every)
        return shards, _starts(np.diff(self._starts)[shards]), _starts(lengths)

    def _window(self, epoch: int, lane: int, window: int, length: int) -> NDArray[np.int32]:
        def make() -> NDArray[np.int32]:
            return _permutation(self.seed, _WINDOWS, length, epoch, lane, window).astype(np.int32)

        return _kept(self._windows, 2 * self.lanes + 2, (epoch, lane, window), make)


def lanes(shards: int, batch: int) -> int:
    """C: the largest divisor of the batch that leaves at least 8 shards a lane, else 1."""
    most = max(1, min(batch, shards // LANE_SHARDS))
    return next(count for count in range(most, 0, -1) if batch % count == 0)


def _permutation(seed: int, purpose: int, length: int, *key: int) -> Ints:
    """A permutation keyed by counters: no state, and raw Philox bits, which numpy promises never to change."""
    counter = [0, *key, *[0] * (3 - len(key))]
    words = np.array([seed % 2**64, purpose], dtype=np.uint64)
    bits = np.random.Philox(key=words, counter=np.array(counter, dtype=np.uint64)).random_raw(length)
    return np.argsort(bits, kind="stable")


def _starts(lengths: Ints) -> Ints:
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths, dtype=np.int64)])


def _find(starts: Ints, places: Ints) -> tuple[Ints, Ints]:
    """(segment, offset in it) of places [n] in consecutive segments; the last segment also takes its own end."""
    segment = np.minimum(np.searchsorted(starts, places, side="right") - 1, len(starts) - 2)
    return segment, places - starts[segment]


def _kept(cache: OrderedDict[Hashable, T], most: int, key: Hashable, make: Callable[[], T]) -> T:
    """The value of a key, made when it is not among the `most` used last."""
    if key not in cache:
        cache[key] = make()
        while len(cache) > most:
            cache.popitem(last=False)
    cache.move_to_end(key)
    return cache[key]
