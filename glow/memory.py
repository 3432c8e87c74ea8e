"""Inversion in backward: the anchored chain.

Plain autograd keeps every hidden map of every step. A chain of bijections need not: the input of a step is recovered by
inverting its output, so backward walks the chain from its end and keeps the state at anchors alone (one every `every`
steps, the chain's own input and output among them).

Each step is one autograd node that takes its parameters as explicit inputs, so gradients leave as backward proceeds
and hooks, `torch.autograd.grad` and DistributedDataParallel see them. All that forward keeps goes through
`save_for_backward`: `torch.autograd.graph.saved_tensors_hooks` counts every byte. A coupling recovers its input from
the same conditioner evaluation that its gradient needs, so backward costs one evaluation a step, not two.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from glow.inverses import Inverses

if TYPE_CHECKING:
    from glow.bijection import Bijection


class Tape:
    """What backward hands from one node to the node before it; empty outside backward."""

    def __init__(self, members: Sequence[Bijection], note_error: Callable[[Tensor], None]) -> None:
        self.members, self.note_error = members, note_error
        self.start()

    def start(self) -> None:
        """Open a backward pass: one that stopped half-way (gradients of late parameters alone) left its state here."""
        self.state: Tensor | None = None
        self.condition: Tensor | None = None
        self.error: Tensor | None = None
        self.inverses = Inverses(self.members)

    def compare(self, kept: Tensor) -> None:
        """Measure the recovered state against the kept one, without waiting for the device."""
        if self.state is not None:
            error = (self.state - kept).abs().amax()
            self.error = error if self.error is None else torch.maximum(self.error, error)

    def finish(self, kept_input: Tensor) -> None:
        """Close a backward pass: the recovered input meets the kept one."""
        self.compare(kept_input)
        if self.error is not None:
            self.note_error(self.error)
        self.start()


class Unit(NamedTuple):
    """A part of a member and its trained parameters, found once: to walk modules again would cost backward more."""

    part: Bijection
    trained: list[nn.Parameter]


class Place(NamedTuple):
    """What a member of a chain is made of, and where it stands."""

    units: list[Unit]
    first: bool
    last: bool
    keep: bool
    """Its output is an anchor."""


def anchored(
    members: Sequence[Bijection],
    x: Tensor,
    condition: Tensor | None,
    every: int,
    note_error: Callable[[Tensor], None],
) -> tuple[Tensor, Tensor]:
    """Apply members in order, [b, c, h, w] -> ([b, c, h, w], log_det [b]), keeping the state every `every` members."""
    tape = Tape(members, note_error)
    log_det = x.new_zeros(x.shape[0])
    last = len(members) - 1
    for index, member in enumerate(members):
        units = [Unit(part, _trained(part)) for part in part_list(member)]
        place = Place(units, first=index == 0, last=index == last, keep=(last - index) % every == 0)
        trained = dict.fromkeys(p for unit in units for p in unit.trained)
        linked = _Link.apply(tape, place, x, log_det, condition, *trained)  # pyright: ignore
        x, log_det = cast("tuple[Tensor, Tensor]", linked)
    return x, log_det


class _Link(torch.autograd.Function):
    """One member of an anchored chain: an autograd node that keeps its output, or nothing."""

    @staticmethod
    def forward(
        ctx: Any,
        tape: Tape,
        place: Place,
        x: Tensor,
        log_det: Tensor,
        condition: Tensor | None,
        *trained: Tensor,
    ) -> tuple[Tensor, Tensor]:
        y, term, kept, draws = _applied(place.units, x, condition)
        ctx.tape, ctx.place, ctx.versions = tape, place, tuple(p._version for p in trained)
        ctx.autocast = _autocast_of(x)
        ctx.save_for_backward(*kept, *draws, *([y, condition] if place.keep else ()), *([x] if place.first else ()))
        return y, log_det + term

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore
        grad_y, grad_log_det = grad_outputs
        tape, units, everything = ctx.tape, ctx.place.units, ctx.saved_tensors
        count = len(units)
        kept, draws, saved = everything[:count], everything[count : 2 * count], everything[2 * count :]
        trained = dict.fromkeys(p for unit in units for p in unit.trained)
        if ctx.versions != tuple(p._version for p in trained):
            raise RuntimeError("a parameter changed between forward and backward: its step can no longer be inverted")
        if ctx.place.last:
            tape.start()
        if ctx.place.keep:
            tape.compare(saved[0])
            tape.state, tape.condition = saved[0], saved[1]
        with _restored(ctx.autocast), tape.inverses.lent():
            tape.state, grad_x, grad_condition, found = _pull_back(
                units, kept, draws, tape.state, tape.condition, grad_y, grad_log_det, ctx.needs_input_grad[4]
            )
        if ctx.place.first:
            tape.finish(saved[-1])
        return None, None, grad_x, grad_log_det, grad_condition, *(found.get(p) for p in trained)


def _applied(
    units: Sequence[Unit], x: Tensor, condition: Tensor | None
) -> tuple[Tensor, Tensor, list[Tensor | None], list[Tensor | None]]:
    """(y, log_det) of a member's parts in order, what each keeps, and the generators' state before each that drew."""
    log_det = x.new_zeros(x.shape[0])
    kept: list[Tensor | None] = []
    draws: list[Tensor | None] = []
    for part, _ in units:
        before = _random_state(x.device)
        x, term = part(x, condition)
        kept.append(part.kept())
        draws.append(None if torch.equal(before, _random_state(x.device)) else before)
        log_det = log_det + term
    return x, log_det, kept, draws


def _pull_back(
    units: Sequence[Unit],
    kept: Sequence[Tensor | None],
    draws: Sequence[Tensor | None],
    y: Tensor,
    condition: Tensor | None,
    grad_y: Tensor,
    grad_log_det: Tensor,
    wants_condition: bool,
) -> tuple[Tensor, Tensor, Tensor | None, dict[nn.Parameter, Tensor | None]]:
    """Recover a member's input and pull gradients back through it, part by part."""
    found: dict[nn.Parameter, Tensor | None] = {}
    grad_condition: Tensor | None = None
    leaf = condition.detach().requires_grad_() if wants_condition and condition is not None else condition
    for (part, trained), memo, draw in zip(reversed(units), reversed(kept), reversed(draws), strict=True):
        with torch.enable_grad(), _drawing_from(draw, y.device):
            leaves, again, log_det = part.recompute(y, leaf, memo)
        inputs = [*leaves, *trained, *([leaf] if wants_condition and leaf is not None else [])]
        outputs = [(o, g) for o, g in ((again, grad_y), (log_det, grad_log_det)) if o.requires_grad]
        found_here = torch.autograd.grad([o for o, _ in outputs], inputs, [g for _, g in outputs], allow_unused=True)
        grads = cast("tuple[Tensor | None, ...]", found_here)
        y = _join([block.detach() for block in leaves])
        grad_y = _join([g if g is not None else torch.zeros_like(b) for g, b in zip(grads, leaves, strict=False)])
        for parameter, grad in zip(trained, grads[len(leaves) :], strict=False):
            found[parameter] = _sum(found.get(parameter), grad)
        if wants_condition:
            grad_condition = _sum(grad_condition, grads[-1])
    return y, grad_y, grad_condition, found


def _trained(part: Bijection) -> list[nn.Parameter]:
    """The parameters of a part that get gradients."""
    return [p for p in part.parameters() if p.requires_grad]


def part_list(member: Bijection) -> list[Bijection]:
    """The units of a member that are inverted and differentiated one at a time."""
    return list(member.parts())


def _join(blocks: Sequence[Tensor]) -> Tensor:
    return blocks[0] if len(blocks) == 1 else torch.cat(list(blocks), dim=1)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The sum of two gradients, None standing for 0."""
    return a if b is None else b if a is None else a + b


def _autocast_of(x: Tensor) -> dict[str, Any]:
    kind = x.device.type
    on = torch.is_autocast_enabled(kind)
    return {"device_type": kind, "dtype": torch.get_autocast_dtype(kind) if on else None, "enabled": on}


def _restored(autocast: dict[str, Any]) -> AbstractContextManager[Any]:
    """Autocast as it was in forward, off where it was off: backward may be called inside another one."""
    return torch.autocast(**autocast)


def _random_state(device: torch.device) -> Tensor:
    """The states of the CPU's generator and, behind it, of the device's; reading them waits for nothing."""
    state = torch.get_rng_state()
    return state if device.type == "cpu" else torch.cat([state, _generator_of(device).get_state()])


def _generator_of(device: torch.device) -> torch.Generator:
    """The default generator of an accelerator."""
    module: Any = torch.get_device_module(device)
    return module.default_generators[device.index or 0]


def _set_random_state(state: Tensor, device: torch.device) -> None:
    own = len(torch.get_rng_state())
    torch.set_rng_state(state[:own])
    if device.type != "cpu":
        _generator_of(device).set_state(state[own:].clone())


@contextmanager
def same_draws(device: torch.device) -> Generator[None]:
    """Put the random generators back afterwards: what follows draws what was drawn inside."""
    before = _random_state(device)
    yield
    if not torch.equal(before, _random_state(device)):
        _set_random_state(before, device)


@contextmanager
def _drawing_from(state: Tensor | None, device: torch.device) -> Generator[None]:
    """Let what is inside draw from this state of the generators, None standing for wherever they are."""
    with nullcontext() if state is None else same_draws(device):
        if state is not None:
            _set_random_state(state, device)
        yield
