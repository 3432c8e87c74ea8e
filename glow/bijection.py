"""The contract every layer signs: invertible maps with a log-determinant, and chains of them.

`forward(x, condition) -> (y, log_det)` with one `log_det` a sample, always; `inverse(y, condition) -> x`. There is no
flag that turns one into the other and no state set by a first call. `x`, `y`: float [b, c, h, w]; `condition`: float
[b, k] (one-hot label beside attributes) or None; `log_det`: float [b], in nats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from glow.inverses import Inverses
from glow.memory import anchored, same_draws

Gather = Callable[[Tensor], Tensor]
"""Takes this worker's [n, ...] rows and returns the rows of all workers, in order."""


class Recomputed(NamedTuple):
    """A forward pass rebuilt from its output, ready to be differentiated.

    `leaves` are channel blocks of the recovered input, each requires grad; `y` and `log_det` depend on them.
    """

    leaves: tuple[Tensor, ...]
    y: Tensor
    log_det: Tensor


def full_precision(like: Tensor) -> AbstractContextManager[Any]:
    """Keep what follows out of autocast: only conditioners may run in a lower precision than the stream."""
    return torch.autocast(like.device.type, enabled=False)


class Bijection(nn.Module):
    """An invertible map of [b, c, h, w] with a tractable Jacobian determinant."""

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map x to (y, log_det), log_det = log|det dy/dx| of every sample, [b]."""
        raise NotImplementedError

    def inverse(self, y: Tensor, condition: Tensor | None = None) -> Tensor:
        """Map y back to x."""
        raise NotImplementedError

    def parts(self) -> Sequence[Bijection]:
        """Bijections that, applied in order, are this one: the units inversion in backward works on."""
        return (self,)

    def kept(self) -> Tensor | None:
        """What `recompute` needs beside the output, read right after forward: batch moments, or nothing."""
        return None

    def recompute(self, y: Tensor, condition: Tensor | None = None, kept: Tensor | None = None) -> Recomputed:
        """Recover x from y and run forward again under autograd (see `glow.memory`)."""
        with torch.no_grad(), same_draws(y.device):
            x = self.inverse(y, condition)
        leaf = x.detach().requires_grad_()
        return Recomputed((leaf,), *self.forward(leaf, condition))

    def initialize(self, xs: Sequence[Tensor], conditions: Sequence[Tensor | None], gather: Gather) -> list[Tensor]:
        """Set data-dependent parameters from microbatches and return their images under forward.

        `gather` joins the moments of all workers; every worker ends with the same parameters.
        """
        return [self(x, condition)[0] for x, condition in zip(xs, conditions, strict=True)]


class Chain(Bijection):
    """Bijections one after the other, with backward's memory on one dial.

    `anchor_every`: 0 is plain autograd; n keeps the state every n members and recovers the others by inverting; the
    number of members or more is pure inversion. `inversion_error` is the largest |recovered - kept| of every backward
    since it was last set to None.
    """

    def __init__(self, *members: Bijection, **named: Bijection) -> None:
        super().__init__()
        for name, member in {**{str(i): m for i, m in enumerate(members)}, **named}.items():
            self.add_module(name, member)
        self.anchor_every = 0
        self.inversion_error: Tensor | None = None

    def __iter__(self) -> Iterator[Bijection]:
        return iter(self._modules.values())  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self._modules)

    def parts(self) -> Sequence[Bijection]:
        return tuple(part for member in self for part in member.parts())

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.anchor_every and torch.is_grad_enabled():
            return anchored(tuple(self), x, condition, self.anchor_every, self._note_error)
        log_det = x.new_zeros(x.shape[0])
        for member in self:
            x, term = member(x, condition)
            log_det = log_det + term
        return x, log_det

    def inverse(self, y: Tensor, condition: Tensor | None = None) -> Tensor:
        parts = self.parts()
        with Inverses(parts).lent():
            for part in reversed(parts):
                y = part.inverse(y, condition)
        return y

    def initialize(self, xs: Sequence[Tensor], conditions: Sequence[Tensor | None], gather: Gather) -> list[Tensor]:
        states = list(xs)
        for member in self:
            states = member.initialize(states, conditions, gather)
        return states

    def _note_error(self, error: Tensor) -> None:
        self.inversion_error = error if self.inversion_error is None else torch.maximum(self.inversion_error, error)
