"""Who does which leaf of a global batch, and sums that do not depend on how many workers do them.

A global batch is cut into leaves (microbatches); a rank owns a contiguous range of them. `TreeSum` adds one flat tensor
a leaf in a fixed binary tree over the leaf indices, so its result has the same bits for every world size. Work that may
fail on one rank goes through `on_first` and `on_all`, which raise the same error on every rank instead of leaving the
others waiting.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.errors import ConfigError, PeerLostError, PipelineError

T = TypeVar("T")
Node = tuple[int, int]
"""(level, index): the subtree over leaves [index << level, (index + 1) << level), as far as they exist."""


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among its peers; the default is alone on the CPU."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    """Processes of this node."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def from_environment(cls, gpu: bool = False) -> World:
        """Read what torchrun and Ray Train set: RANK, WORLD_SIZE and so on; ConfigError where a GPU is missing."""
        rank, size, local, beside = (int(os.environ.get(key, default)) for key, default in _VARIABLES)
        if gpu and local >= torch.cuda.device_count():
            found = f"rank {rank} needs GPU {local}, this machine shows {torch.cuda.device_count()}"
            raise ConfigError(found, cure="start fewer workers a machine, or train on the CPU with --cluster.no-gpu")
        device = torch.device("cuda", local) if gpu else torch.device("cpu")
        return cls(rank=rank, size=size, local_rank=local, local_size=beside, device=device)


_VARIABLES = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1"))


@contextmanager
def joined(world: World, rendezvous: str = "env://", timeout: float = 300) -> Iterator[None]:
    """Be in a process group: nothing to do when alone or when a launcher (Ray Train) has joined already.

    `timeout` (seconds) bounds every collective, so that a dead peer is an error and never a hang. What torch raises
    inside is told `in_words` where it can be.
    """
    try:
        with _group(world, rendezvous, timeout):
            yield
    except Exception as error:
        if told := in_words(error):
            raise told from error
        raise


@contextmanager
def _group(world: World, rendezvous: str, timeout: float) -> Iterator[None]:
    if world.size == 1 or dist.is_initialized():
        yield
        return
    cuda = world.device.type == "cuda"
    if cuda:
        torch.cuda.set_device(world.device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        init_method=rendezvous,
        rank=world.rank,
        world_size=world.size,
        timeout=timedelta(seconds=timeout),
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def in_words(error: Exception) -> PipelineError | None:
    """What a person can do about an error of torch: no memory, which comes again, or a peer that is gone."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and _NO_MEMORY.search(text)
    ):
        found = ". ".join(text.splitlines()[0].split(". ")[:2]) if text else "out of memory"
        return ConfigError(found, cure="a smaller schedule.leaf, or --memory.anchor-every plan")
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and _BROKEN.search(text)):
        cure = "its own line says why; the same command goes on from the last checkpoint"
        return PeerLostError("another worker is gone", cure=cure)
    return None


_NO_MEMORY = re.compile("out of memory|can't allocate memory")
_BROKEN = re.compile(r"gloo/transport|Connection (closed|reset) by peer")


def leaf_range(world: World, leaves: int) -> range:
    """The contiguous leaves of this rank; sizes differ by at most one. ConfigError where a rank would have none."""
    return _leaf_range(world.rank, world.size, leaves)


def _leaf_range(rank: int, size: int, leaves: int) -> range:
    if size > leaves:
        raise ConfigError(
            f"{size} workers for {leaves} leaves of a batch", cure="use fewer workers, a larger batch or a smaller leaf"
        )
    return range(rank * leaves // size, (rank + 1) * leaves // size)


def barrier(world: World) -> None:
    """Wait for every rank."""
    if world.size > 1:
        dist.barrier()


def any_rank(world: World, *flags: bool) -> tuple[bool, ...]:
    """Which of the flags are set on any rank; the same answer on every rank."""
    if world.size == 1:
        return flags
    box = torch.tensor(flags, dtype=torch.uint8, device=world.device)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return tuple(bool(flag) for flag in box.tolist())


def broadcast_object(world: World, value: T) -> T:
    """Rank 0's value on every rank (small things: it is serialised)."""
    if world.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_first(world: World, work: Callable[[], T]) -> T:
    """Do `work` on rank 0 and give its value, or raise its error, on every rank."""
    outcome = _attempt(world, work) if world.rank == 0 else None
    return _settle([cast("T | _Failure", broadcast_object(world, outcome))])[0]


def on_all(world: World, work: Callable[[], T]) -> list[T]:
    """Do `work` on every rank and give all values in rank order; the first error by rank is raised on every rank."""
    outcome = _attempt(world, work)
    outcomes = [outcome] * world.size
    if world.size > 1:
        dist.all_gather_object(outcomes, outcome)
    return _settle(outcomes)


def _attempt(world: World, work: Callable[[], T]) -> T | _Failure:
    try:
        return work()
    except PipelineError as error:
        return _Failure(error)
    except Exception as error:  # whatever it is, the other ranks wait for an answer
        if world.size == 1:
            raise
        return _Failure(PipelineError(f"{type(error).__name__}: {error}", where=f"rank {world.rank}"))


@dataclass(frozen=True)
class _Failure:
    error: PipelineError


def _settle(outcomes: list[T | _Failure]) -> list[T]:
    for outcome in outcomes:
        if isinstance(outcome, _Failure):
            raise outcome.error
    return outcomes  # type: ignore[return-value]


def gather_ordered(world: World, tensor: Tensor) -> Tensor:
    """Concatenate every rank's [n, ...] along the first axis in rank order; n may differ. The same on every rank."""
    if world.size == 1:
        return tensor
    mine = tensor.detach().to(world.device).contiguous()
    counts = [torch.zeros(1, dtype=torch.int64, device=world.device) for _ in range(world.size)]
    dist.all_gather(counts, torch.tensor([len(mine)], dtype=torch.int64, device=world.device))
    rows = [int(count) for count in counts]
    padded = mine.new_zeros((max(rows), *mine.shape[1:]))
    padded[: len(mine)] = mine
    parts = [torch.empty_like(padded) for _ in rows]
    dist.all_gather(parts, padded)
    return torch.cat([part[:n] for part, n in zip(parts, rows, strict=True)]).to(tensor.device)


def _combine(nodes: dict[Node, T], leaves: int, add: Callable[[T, T], T]) -> dict[Node, T]:
    """Merge siblings bottom up as far as the nodes reach; a right sibling beyond the last leaf counts as nothing."""
    nodes = dict(nodes)
    for level in range((leaves - 1).bit_length()):
        for index in sorted(i for lev, i in nodes if lev == level and i % 2 == 0):
            right = nodes.pop((level, index + 1), None)
            if right is None and (index + 1) << level < leaves:
                continue  # the sibling is with another rank
            left = nodes.pop((level, index))
            nodes[level + 1, index // 2] = left if right is None else add(left, right)
    return nodes


class TreeSum:
    """The sum of one flat tensor a leaf, in a fixed binary tree over leaf indices: bit-identical for any world size.

    A rank adds its leaves in order; complete subtrees merge at once as in a binary counter, so it holds at most
    log2(leaves) + 1 buffers, which it keeps between sums. `result` exchanges subtree sums so that every rank finishes
    the tree for one slice of the vector, then gathers the slices.
    """

    def __init__(self, world: World, leaves: int) -> None:
        self._world, self._leaves = world, leaves
        self._range = leaf_range(world, leaves)
        shares = [_leaf_range(rank, world.size, leaves) for rank in range(world.size)]
        self._layout = [sorted(_combine(dict.fromkeys(((0, i) for i in r), True), leaves, bool.__or__)) for r in shares]
        self._held: list[tuple[Node, Tensor]] = []
        self._spare: list[Tensor] = []
        self._received: dict[int, Tensor] = {}
        self._given: Tensor | None = None
        self._next, self._length = self._range.start, 0

    @torch.no_grad()
    def add(self, leaf: int, flat: Tensor) -> None:
        """Add a leaf's tensor [n]; leaves come in order. `flat` is read, never kept: it may be reused at once."""
        if leaf != self._next or leaf >= self._range.stop:
            raise ValueError(f"leaf {leaf} is not the next of {self._range} (expected {self._next})")
        if self._given is not None:
            self._spare.append(self._given)
            self._given = None
        self._next, self._length = leaf + 1, flat.numel()
        node, value = (0, leaf), flat
        while self._held and node[1] % 2 == 1 and self._held[-1][0] == (node[0], node[1] - 1):
            _, left = self._held.pop()
            left[: value.numel()].add_(value)
            if value is not flat:
                self._spare.append(value)
            node, value = (node[0] + 1, node[1] // 2), left
        self._held.append((node, self._copied(flat) if value is flat else value))

    @torch.no_grad()
    def result(self) -> Tensor:
        """The sum over all leaves of all ranks [n]; valid until the next `add`, which reuses its memory."""
        if self._next != self._range.stop:
            raise ValueError(f"leaves {self._next} to {self._range.stop - 1} were not added")
        nodes = _combine(dict(self._held), self._leaves, self._merge)
        self._held, self._next = [], self._range.start
        if self._world.size > 1:
            total = self._exchange([nodes[node] for node in sorted(nodes)])
        else:
            (total,) = nodes.values()
        self._given = total
        return total[: self._length]

    def _exchange(self, mine: list[Tensor]) -> Tensor:
        size, width = self._world.size, len(mine[0]) // self._world.size
        slices: dict[Node, Tensor] = {}
        for turn in range(max(map(len, self._layout))):
            senders = [rank for rank in range(size) if turn < len(self._layout[rank])]
            received = self._landing(turn, len(senders) * width, mine[0])
            sent = mine[turn] if turn < len(mine) else mine[0][:0]
            splits = [len(sent) // size] * size
            dist.all_to_all_single(received, sent, [width if rank in senders else 0 for rank in range(size)], splits)
            slices |= {self._layout[rank][turn]: row for rank, row in zip(senders, received.split(width), strict=True)}
        (total,) = _combine(slices, self._leaves, Tensor.add_).values()
        self._spare += mine[1:]
        dist.all_gather(list(mine[0].split(width)), total)
        return mine[0]

    def _merge(self, left: Tensor, right: Tensor) -> Tensor:
        self._spare.append(right)
        return left.add_(right)

    def _copied(self, flat: Tensor) -> Tensor:
        """A copy in a kept buffer whose length is a whole number of equal slices, zero beyond the tensor's own end."""
        size = self._world.size
        length = max(1, -(-flat.numel() // size)) * size
        fits = self._spare and (self._spare[-1].numel(), self._spare[-1].dtype) == (length, flat.dtype)
        buffer = self._spare.pop() if fits else flat.new_zeros(length)
        buffer[: flat.numel()] = flat
        return buffer

    def _landing(self, turn: int, length: int, like: Tensor) -> Tensor:
        kept = self._received.get(turn)
        if kept is None or (kept.numel(), kept.dtype) != (length, like.dtype):
            kept = self._received[turn] = like.new_empty(length)
        return kept
