"""Inverses of the small matrices along a chain, many at a time.

A chain walked backwards needs the inverse of every mixing's matrix. On a GPU a small inverse costs its launches, not
its arithmetic, so as many as fit a few megabytes are computed in one call. They live as long as the walk does: a cache
kept from step to step would have to notice every update, and fused optimisers do not raise a tensor's version.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

TOGETHER = 2**20
"""Values of float64 matrices that are inverted in one call, at most: 8 MB."""


class Matrix(nn.Module):
    """A module with a square matrix that may be inverted together with those of others."""

    size: int
    """Rows of the matrix (c)."""
    lender: Inverses | None = None
    """Who computes the inverse while a chain is walked."""

    def matrix(self) -> Tensor:
        """[c, c]."""
        raise NotImplementedError

    def inverse_matrix(self) -> Tensor:
        """The inverse, [c, c]; differentiable where gradients are asked of the matrix."""
        lender = self.lender
        if lender is None or (torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())):
            return inverted(self.matrix())
        return lender.of(self)


class Inverses:
    """The inverses of the matrices in some modules, last first, computed when they are needed."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        found = (part for module in modules for part in module.modules() if isinstance(part, Matrix))
        self._owners = list(dict.fromkeys(found))
        self._ready: dict[Matrix, Tensor] = {}

    @torch.no_grad()
    def of(self, owner: Matrix) -> Tensor:
        """The inverse of one owner's matrix; the next few in line are computed with it."""
        found = self._ready.get(owner)
        if found is None:
            batch = self._batch(owner)
            self._ready = dict(zip(batch, inverted(torch.stack([one.matrix() for one in batch])), strict=True))
            found = self._ready[owner]
        return found

    def _batch(self, owner: Matrix) -> Sequence[Matrix]:
        """The owner and those before it of the same size, as many as are inverted together."""
        end = self._owners.index(owner) + 1
        count = max(1, TOGETHER // owner.size**2)
        return [one for one in self._owners[max(0, end - count) : end] if one.size == owner.size]

    @contextmanager
    def lent(self) -> Generator[None]:
        """Have the owners ask here inside the block."""
        for owner in self._owners:
            owner.lender = self
        try:
            yield
        finally:
            for owner in self._owners:
                owner.lender = None


def inverted(matrix: Tensor) -> Tensor:
    """The inverse of [..., c, c], computed in float64: round-trip error is then that of the product alone."""
    # inv_ex does not wait for the device to say that a matrix is singular: infinities say it, and the guard sees them.
    return torch.linalg.inv_ex(matrix.double()).inverse.to(matrix.dtype)  # pyright: ignore
