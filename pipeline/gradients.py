"""The gradient of a global batch as one flat vector, summed over leaves and ranks in one of two ways.

Every parameter's `.grad` is a view of the vector, so backward writes it in place and nothing is copied together.
`tree` adds leaf gradients in a fixed binary tree (`pipeline.world.TreeSum`): the same bits for every number of workers.
`overlap` lets backward accumulate a rank's leaves and all-reduces buckets of the vector while the last leaf's backward
still runs: equal up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.world import TreeSum, World, leaf_range

BUCKET_BYTES = 8 << 20
"""Least size of an all-reduce under `overlap`."""


class Gradients:
    """Collects the gradient of a batch cut into `leaves` microbatches; ranks own contiguous ranges of them."""

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        world: World,
        leaves: int,
        reduction: Literal["tree", "overlap"],
        moments: int = 0,
    ) -> None:
        self.own = leaf_range(world, leaves)
        self._leaves = leaves
        first, count = parameters[0], sum(p.numel() for p in parameters)
        self._flat = torch.zeros(count + moments, dtype=first.dtype, device=first.device)
        self._gradient, self._moments = self._flat[:count], self._flat[count:]
        offset = 0
        for parameter in parameters:
            parameter.grad = self._flat[offset : offset + parameter.numel()].view_as(parameter)
            offset += parameter.numel()
        self._tree = TreeSum(world, leaves) if reduction == "tree" else None
        self._buckets = Buckets(parameters, self._gradient) if reduction == "overlap" and world.size > 1 else None

    def of(self, loss: Callable[[int], Tensor]) -> Tensor:
        """The sum over all leaves of all ranks of the gradient of `loss(leaf)`, [n]; every `.grad` shows its part."""
        self._flat.zero_()
        for leaf in self.own:
            if self._buckets and leaf == self.own[-1]:
                self._buckets.arm()
            loss(leaf).backward()
            if self._tree:
                self._tree.add(leaf, self._flat)
                self._flat.zero_()
        if self._tree:
            self._flat.copy_(self._tree.result())
        if self._buckets:
            self._buckets.finish()
            if len(self._moments):
                dist.all_reduce(self._moments)
        return self._gradient

    def note(self, moments: Tensor) -> None:
        """Add a leaf's batch moments [m] to what is summed beside its gradient; call it inside `loss`."""
        self._moments.add_(moments)

    def moments(self) -> Tensor:
        """The mean over all leaves of what was noted, [m]: the same bits for every number of workers under `tree`."""
        return self._moments / self._leaves


class Buckets:
    """All-reduces slices of the flat gradient, last parameters first, as soon as backward has filled them."""

    def __init__(self, parameters: Sequence[nn.Parameter], flat: Tensor) -> None:
        self._slices: list[Tensor] = []
        self._members: list[int] = []
        end = stop = flat.numel()
        members = 0
        for index in range(len(parameters) - 1, -1, -1):
            parameters[index].register_post_accumulate_grad_hook(self._hook(len(self._slices)))
            stop -= parameters[index].numel()
            members += 1
            if (end - stop) * flat.element_size() >= BUCKET_BYTES or index == 0:
                self._slices.append(flat[stop:end])
                self._members.append(members)
                end, members = stop, 0
        self._missing: list[int] = []
        self._pending: list[dist.Work] = []
        self._sent = len(self._slices)

    def arm(self) -> None:
        """The next backward is the last of this batch: its gradients may leave."""
        self._missing, self._sent = list(self._members), 0

    def finish(self) -> None:
        """Send what backward did not reach and wait for every sum."""
        self._missing = [0] * len(self._slices)
        self._send()
        for work in self._pending:
            work.wait()
        self._pending = []

    def _hook(self, bucket: int) -> Callable[[Tensor], None]:
        def filled(_: Tensor) -> None:
            if self._sent < len(self._slices):
                self._missing[bucket] -= 1
                self._send()

        return filled

    def _send(self) -> None:
        """Launch every bucket that is complete; in one fixed order, which all ranks must share."""
        while self._sent < len(self._slices) and self._missing[self._sent] == 0:
            work = dist.all_reduce(self._slices[self._sent], async_op=True)
            assert work is not None
            self._pending.append(work)
            self._sent += 1
