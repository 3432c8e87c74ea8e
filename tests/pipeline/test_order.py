"""Laws of the order: every sample once an epoch, the same batches for any world, resume anywhere, few fetches."""

from __future__ import annotations

import itertools
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import DataError
from pipeline.order import LANE_SHARDS, Order, Sequential, lanes

sizes = st.one_of(
    st.lists(st.integers(1, 9), min_size=1, max_size=60),
    st.builds(lambda shards, full, last: [full] * shards + [last], st.integers(0, 90), st.integers(1, 12), st.just(1)),
)
orders = st.builds(Order, sizes, st.integers(1, 64), st.integers(-5, 2**64))


def read(order: Sequential, start: int, stop: int) -> np.ndarray:
    """[n, 3] of (epoch, shard, row)."""
    return np.stack(order.locate(np.arange(start, stop)), axis=1)


@given(orders, st.integers(0, 3))
def test_every_epoch_is_a_permutation(order: Order, epoch: int) -> None:
    found = read(order, epoch * order.size, (epoch + 1) * order.size)
    assert set(found[:, 0].tolist()) == {epoch}
    samples = order.sample(found[:, 1], found[:, 2])
    assert sorted(samples.tolist()) == list(range(order.size))


@given(sizes, st.integers(1, 64), st.sampled_from([1, 2, 3, 4, 5, 7, 8, 16]), st.integers(0, 400))
def test_any_world_reads_the_same_batches(samples: list[int], batch: int, world: int, first: int) -> None:
    positions = first * batch + np.arange(batch)
    whole = np.stack(Order(samples, batch, 1).locate(positions), axis=1)
    cuts = [rank * batch // world for rank in range(world + 1)]
    shares = [Order(samples, batch, 1).locate(positions[a:b]) for a, b in itertools.pairwise(cuts)]
    assert np.array_equal(whole, np.concatenate([np.stack(share, axis=1) for share in shares]))


@given(orders, st.integers(0, 500), st.integers(1, 100))
def test_resuming_anywhere_equals_not_stopping(order: Order, start: int, count: int) -> None:
    whole = read(order, 0, start + count)
    again = Order(np.diff(order._starts).tolist(), order.batch, order.seed)
    assert np.array_equal(read(again, start, start + count), whole[start:])
    shuffled = np.random.default_rng(start).permutation(start + count)
    assert np.array_equal(np.stack(order.locate(shuffled), axis=1), whole[shuffled])


@given(sizes, st.integers(1, 96), st.integers(0, 2))
def test_a_machine_with_its_own_columns_fetches_few_shards_twice(samples: list[int], batch: int, epoch: int) -> None:
    order = Order(samples, batch, 7)
    positions = epoch * order.size + np.arange(order.size)
    _, shard, _ = order.locate(positions)
    for machines in (n for n in range(1, order.lanes + 1) if order.lanes % n == 0):
        machine = positions % batch * machines // batch
        assert len(set(zip(machine.tolist(), shard.tolist(), strict=True))) <= order.shards + machines - 1


@given(sizes, st.integers(1, 96))
def test_a_lane_reads_one_window_at_a_time(samples: list[int], batch: int) -> None:
    order = Order(samples, batch, 3)
    positions = np.arange(order.size)
    _, shard, _ = order.locate(positions)
    lane = positions % batch * order.lanes // batch
    for value in range(order.lanes):
        visited = shard[lane == value]
        first, last = {}, {}
        for place, seen in enumerate(visited.tolist()):
            first.setdefault(seen, place)
            last[seen] = place
        open_at_once = [sum(first[s] <= place <= last[s] for s in first) for place in range(len(visited))]
        assert max(open_at_once, default=0) <= order.window


@given(st.integers(1, 2000), st.integers(1, 600))
def test_lanes_divide_the_batch_and_keep_eight_shards(shards: int, batch: int) -> None:
    count = lanes(shards, batch)
    assert batch % count == 0
    assert count == 1 or shards // count >= LANE_SHARDS
    larger = [c for c in range(count + 1, batch + 1) if batch % c == 0 and shards // c >= LANE_SHARDS]
    assert not larger


def test_lanes_of_known_sets() -> None:
    celebahq256, imagenet32, toy = lanes(53, 40), lanes(2503, 512), lanes(4, 16)
    assert (celebahq256, imagenet32, toy) == (5, 256, 1)


def test_the_order_is_this_one_for_ever() -> None:
    order = Order([3, 2, 3, 1] * 5, 6, 42)
    assert order.lanes == 2
    found = order.sample(*order.locate(np.arange(order.size - 6, order.size + 6))[1:])
    assert found.tolist() == [16, 15, 14, 5, 2, 1, 30, 18, 17, 11, 10, 28]


def test_epochs_and_seeds_differ() -> None:
    order, other = Order([50] * 20, 10, 0), Order([50] * 20, 10, 1)
    first, second = read(order, 0, 1000)[:, 1:], read(order, 1000, 2000)[:, 1:]
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, read(other, 0, 1000)[:, 1:])


def test_a_window_mixes_its_shards() -> None:
    _, shard, _ = Order([500] * 8, 16, 0).locate(np.arange(16 * 8))
    assert len(set(shard.tolist())) == 4
    assert all(len(set(shard[at : at + 16].tolist())) >= 3 for at in range(0, 128, 16))


@given(sizes)
def test_the_natural_order_is_natural(samples: list[int]) -> None:
    order = Sequential(samples)
    epoch, shard, row = order.locate(np.arange(2 * order.size))
    assert order.sample(shard, row).tolist() == 2 * list(range(order.size))
    assert epoch.tolist() == [0] * order.size + [1] * order.size
    assert all(r < samples[s] for s, r in zip(shard.tolist(), row.tolist(), strict=True))


@pytest.mark.parametrize("samples", [[], [3, 0, 2]])
def test_a_split_without_samples_is_refused(samples: list[int]) -> None:
    with pytest.raises(DataError, match="without"):
        Order(samples, 4, 0)


def test_a_hundred_million_samples_cost_bytes_per_shard_and_resume_at_once() -> None:
    tracemalloc.start()
    order = Order([512] * 200_000, 512, 0)
    order.locate(10**12 + np.arange(512))
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 200_000 * 24 + 512 * 4 * 2048 * 1.2
    start = time.perf_counter()
    order.locate(10**12 + 512 + np.arange(512))
    assert time.perf_counter() - start < 0.5
