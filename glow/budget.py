"""What backward keeps and costs by anchor setting, level by level; and the cheapest setting that fits a budget.

Bytes and costs are per level: anchor 0 keeps what plain autograd keeps and computes nothing again; n keeps a state
every n steps and evaluates every conditioner of the level once more, whatever n is. So a plan inverts as few
multiply-adds as the budget forces it to, and keeps as many anchors as then still fit.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from glow.flow import Glow, GlowConfig

WORKING_MAPS = 6
"""Hidden maps one step's backward works with, at most (`tests/glow/test_budget.py`)."""


@dataclass(frozen=True, kw_only=True)
class LevelCost:
    """A level on a batch: bytes and multiply-adds."""

    steps: int
    beside: int
    """Bytes kept whatever the setting: the prior's."""
    step: int
    """Bytes plain autograd keeps of a step."""
    state: int
    """Bytes of the stream's state at an anchor."""
    working: int
    """Bytes of one step's backward while its level is inverted."""
    macs: int
    """Multiply-adds of all conditioners, forward."""

    def kept(self, every: int) -> int:
        """Bytes kept for backward: anchors and the level's own input."""
        steps = self.steps * self.step if every == 0 else (-(-self.steps // every) + 1) * self.state
        return self.beside + steps


@dataclass(frozen=True, kw_only=True)
class Plan:
    """An anchor setting and what it comes to."""

    anchor_every: tuple[int, ...]
    bytes: int
    """Kept for backward, and the largest step's working set."""
    cost: float
    """Multiply-adds of a training step over those of plain autograd."""


def level_costs(config: GlowConfig, batch: int, nets: torch.dtype = torch.float32) -> list[LevelCost]:
    """Every level on so many images; stored bytes are measured on small images and few steps, where they are linear."""
    hidden = 2 if nets is torch.bfloat16 else 4
    return [
        LevelCost(
            steps=config.steps,
            beside=batch * beside,
            step=batch * step,
            state=batch * 4 * channels * pixels,
            working=batch * WORKING_MAPS * hidden * config.width * pixels,
            macs=macs,
        )
        for (beside, step), (channels, pixels), macs in zip(
            stored_bytes(config, nets), _shapes(config), level_macs(config, batch), strict=True
        )
    ]


def level_macs(config: GlowConfig, images: int) -> list[int]:
    """Multiply-adds of every level's conditioners on so many images, forward."""
    return [images * config.steps * pixels * _macs_a_pixel(config, channels) for channels, pixels in _shapes(config)]


def plan_of(costs: Sequence[LevelCost], anchor_every: Sequence[int]) -> Plan:
    """What a setting comes to; its last value repeats."""
    dial = tuple(anchor_every[min(index, len(anchor_every) - 1)] for index in range(len(costs)))
    kept = sum(cost.kept(every) for cost, every in zip(costs, dial, strict=True))
    working = max(cost.working for cost in costs)
    again = sum(cost.macs for cost, every in zip(costs, dial, strict=True) if every)
    return Plan(anchor_every=dial, bytes=kept + working, cost=1 + again / (3 * sum(cost.macs for cost in costs)))


def plans(costs: Sequence[LevelCost]) -> list[Plan]:
    """Settings worth a look, dearer and smaller one after the other: nothing else is as cheap in as few bytes."""
    best: list[Plan] = []
    for found in sorted((plan_of(costs, dial) for dial in _dials(costs)), key=_preference):
        if not best or found.bytes < best[-1].bytes:
            best.append(found)
    return best


def cheapest(costs: Sequence[LevelCost], budget: int) -> Plan:
    """The cheapest setting whose bytes fit the budget, with the most anchors among equals; ValueError if none does."""
    known = plans(costs)
    for found in known:
        if found.bytes <= budget:
            return found
    raise ValueError(f"even pure inversion works on {known[-1].bytes / 2**20:.0f} MiB; {budget / 2**20:.0f} are free")


def _preference(plan: Plan) -> tuple[float, int]:
    return round(plan.cost, 9), max(plan.anchor_every)


def _dials(costs: Sequence[LevelCost]) -> Iterator[tuple[int, ...]]:
    """Every subset of levels inverted, with anchors every 1, 2, 4, ... steps or none within a level."""
    steps = costs[0].steps
    settings = sorted({2**power for power in range(steps.bit_length()) if 2**power < steps} | {steps})
    for inverted in itertools.product((False, True), repeat=len(costs)):
        for every in settings if any(inverted) else (0,):
            yield tuple(every if yes else 0 for yes in inverted)


def _shapes(config: GlowConfig) -> list[tuple[int, int]]:
    """(channels, pixels) of every level."""
    levels = range(1, config.levels + 1)
    return [(2 * config.channels * 2**level, (config.size // 2**level) ** 2) for level in levels]


def _macs_a_pixel(config: GlowConfig, channels: int) -> int:
    out = channels if config.coupling == "affine" else channels // 2
    return 9 * (channels // 2 + 1) * config.width + config.width**2 + 9 * config.width * out


@functools.cache
def stored_bytes(config: GlowConfig, nets: torch.dtype = torch.float32) -> list[tuple[int, int]]:
    """(beside the steps, of a step): bytes plain autograd keeps for one image, by level.

    They are linear in pixels and steps, so a few small models are measured.

    What does not grow with the image (folded weights) is kept once a batch and left out.
    """
    side = 2**config.levels
    by_steps: list[list[int]] = []
    for steps in (1, 2):
        small, larger = (_kept(Glow(replace(config, size=size, steps=steps)), nets) for size in (side, 2 * side))
        by_steps.append([(b - a) * config.size**2 // (3 * side**2) for a, b in zip(small, larger, strict=True)])
    return [(2 * one - two, two - one) for one, two in zip(*by_steps, strict=True)]


def _kept(model: Glow, nets: torch.dtype) -> list[int]:
    """Bytes autograd saves in one forward pass of one image, by level."""
    own = {parameter.data_ptr() for parameter in model.parameters()}
    x = torch.zeros(1, model.config.channels, model.config.size, model.config.size, requires_grad=True)
    condition = model.condition(1, None, None, x)
    sizes: list[int] = []
    for level in model:
        kept: dict[int, int] = {}
        alive: list[Tensor] = []

        def keep(tensor: Tensor, kept: dict[int, int] = kept, alive: list[Tensor] = alive) -> Tensor:
            if tensor.data_ptr() not in own:
                kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
                alive.append(tensor)  # or its address could be given out again
            return tensor

        counted = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with torch.autocast("cpu", torch.bfloat16, enabled=nets is torch.bfloat16), counted:
            following = level(x, condition)[0]
        sizes.append(sum(kept.values()))
        x = following.detach().requires_grad_()
    return sizes
