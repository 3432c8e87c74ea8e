"""Laws of the world: shares of leaves, agreement about failure, and sums that do not see the number of workers."""

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ConfigError, DataError, PeerLostError, PipelineError
from pipeline.world import (
    TreeSum,
    World,
    any_rank,
    barrier,
    broadcast_object,
    gather_ordered,
    joined,
    leaf_range,
    on_all,
    on_first,
)
from tests.pipeline.group import run_group


@given(st.integers(1, 40), st.integers(1, 300))
def test_leaves_are_shared_contiguously_and_evenly(size: int, leaves: int) -> None:
    if size > leaves:
        with pytest.raises(ConfigError, match="fewer workers"):
            leaf_range(World(size=size), leaves)
        return
    shares = [leaf_range(World(rank=rank, size=size), leaves) for rank in range(size)]
    assert [leaf for share in shares for leaf in share] == list(range(leaves))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def leaf_tensor(leaf: int, length: int) -> torch.Tensor:
    """Values of many magnitudes, so that any other order of addition changes bits."""
    generator = torch.Generator().manual_seed(leaf)
    return torch.randn(length, generator=generator) * 10 ** (6 * torch.rand(length, generator=generator) - 3)


def plain_tree(leaves: list[torch.Tensor]) -> torch.Tensor:
    """The definition: pair neighbours, level by level; an odd one out goes up alone."""
    while len(leaves) > 1:
        pairs = [leaves[i : i + 2] for i in range(0, len(leaves), 2)]
        leaves = [pair[0] + pair[1] if len(pair) == 2 else pair[0] for pair in pairs]
    return leaves[0]


def tree_digests(world: World, cases: list[tuple[int, int]]) -> list[str]:
    """sha256 of the sum for every (leaves, length), each taken twice with the same buffers."""
    digests = []
    for leaves, length in cases:
        tree = TreeSum(world, leaves)
        for _ in range(2):
            for leaf in leaf_range(world, leaves):
                tree.add(leaf, leaf_tensor(leaf, length))
            digests.append(hashlib.sha256(tree.result().numpy().tobytes()).hexdigest())
    return digests


CASES = [(4, 1), (4, 1000), (5, 17), (6, 64), (7, 3), (8, 1001), (11, 10), (16, 129), (21, 40)]


@given(st.integers(1, 40), st.integers(1, 9))
def test_alone_the_tree_sum_is_its_definition(leaves: int, length: int) -> None:
    tensors = [leaf_tensor(leaf, length) for leaf in range(leaves)]
    tree = TreeSum(World(), leaves)
    for leaf, tensor in enumerate(tensors):
        tree.add(leaf, tensor)
    assert torch.equal(tree.result(), plain_tree(tensors))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_tree_sum_has_the_same_bits_for_any_world(size: int) -> None:
    alone = tree_digests(World(), CASES)
    assert all(digests == alone for digests in run_group(size, tree_digests, CASES))


def test_a_plain_sum_would_differ() -> None:
    tensors = [leaf_tensor(leaf, 1000) for leaf in range(16)]
    halves = plain_tree(tensors[:8]) + plain_tree(tensors[8:])
    in_order = torch.stack(tensors).cumsum(0)[-1]
    assert torch.equal(halves, plain_tree(tensors))
    assert not torch.equal(in_order, plain_tree(tensors))


def test_memory_of_the_tree_is_logarithmic() -> None:
    tree = TreeSum(World(), 64)
    flat = torch.ones(8)
    for leaf in range(64):
        tree.add(leaf, flat)
        flat.fill_(1.0)  # read, never kept
    assert torch.equal(tree.result(), torch.full((8,), 64.0))
    assert len(tree._spare) <= 6


def test_leaves_come_in_order_and_all_of_them() -> None:
    tree = TreeSum(World(), 2)
    with pytest.raises(ValueError, match="expected 0"):
        tree.add(1, torch.ones(1))
    with pytest.raises(ValueError, match="not added"):
        tree.result()
    tree.add(0, torch.ones(1))
    tree.add(1, torch.ones(1))
    with pytest.raises(ValueError, match="not the next"):
        tree.add(2, torch.ones(1))


def gathered(world: World) -> tuple[list[int], list[int], int]:
    uneven = gather_ordered(world, torch.arange(world.rank + 1) + 10 * world.rank)
    rows = gather_ordered(world, torch.full((0 if world.rank else 2, 2, 3), world.rank, dtype=torch.uint8))
    barrier(world)
    return (
        uneven.tolist(),
        list(rows.shape),
        broadcast_object(world, 7 if world.rank == 0 else -1),
    )


def test_gathering_keeps_rank_order_with_uneven_shares() -> None:
    assert run_group(3, gathered) == [([0, 10, 11, 20, 21, 22], [2, 2, 3], 7)] * 3
    assert gathered(World()) == ([0], [2, 2, 3], 7)


def asked(world: World) -> list[bool]:
    return list(any_rank(world, world.rank == 1, False))


def test_one_rank_asking_is_heard_by_all() -> None:
    assert run_group(3, asked) == [[True, False]] * 3
    assert asked(World()) == [False, False]


def waiting_for_who_left(world: World) -> None:
    if world.rank == 1:
        raise ConfigError("no room")
    barrier(world)


def test_a_peer_that_leaves_is_a_line_to_those_who_wait() -> None:
    with pytest.raises(PeerLostError, match=r"^another worker is gone; its own line"):
        run_group(2, waiting_for_who_left)


def raise_for(rank: int, error: Exception) -> int:
    if rank == 1:
        raise error
    return rank


def failures(world: World) -> list[str]:
    found = []
    for agree, rank, error in [
        (on_all, world.rank, DataError("cut short", where="shard 3", cure="fetch it again")),
        (on_all, world.rank, OSError("disk full")),
        (on_first, 1, DataError("no commit")),
    ]:
        try:
            agree(world, lambda rank=rank, error=error: raise_for(rank, error))
        except PipelineError as caught:
            found.append(f"{type(caught).__name__} {caught}")
    return [*found, str(on_all(world, lambda: world.rank * 2)), str(on_first(world, lambda: world.rank + 5))]


def test_an_error_on_one_rank_is_raised_on_all() -> None:
    everywhere = [
        "DataError shard 3: cut short; fetch it again",
        "PipelineError rank 1: OSError: disk full",
        "DataError no commit",
        "[0, 2]",
        "5",
    ]
    assert run_group(2, failures) == [everywhere] * 2


def test_the_environment_names_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(key, value)
    world = World.from_environment()
    assert (world.rank, world.size, world.local_rank, world.device.type) == (3, 8, 1, "cpu")
    if torch.cuda.device_count() < 2:
        with pytest.raises(ConfigError, match="GPU 1"):
            World.from_environment(gpu=True)


def test_alone_nothing_is_joined() -> None:
    with joined(World()):
        assert not torch.distributed.is_initialized()
    assert on_all(World(), lambda: 1) == [1]
    with pytest.raises(ZeroDivisionError):
        on_first(World(), lambda: 1 // 0)
