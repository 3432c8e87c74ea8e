"""The planner: its bytes are those autograd keeps, its choice is the best there is, and what it allows is enough."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from glow import Glow, GlowConfig
from glow.budget import LevelCost, cheapest, level_costs, plan_of, plans
from tests.glow.test_memory import counting_saved

CONFIG = GlowConfig(size=32, channels=3, levels=3, steps=4, width=16, classes=-1, attributes=-1)


def saved(config: GlowConfig, anchors: tuple[int, ...], batch: int, nets: torch.dtype = torch.float32) -> int:
    glow = Glow(config)
    glow.set_anchors(anchors)
    with torch.autocast("cpu", torch.bfloat16, enabled=nets is torch.bfloat16), counting_saved() as kept:
        glow.log_prob(torch.rand(batch, 3, config.size, config.size) - 0.5)
    own = {t.untyped_storage().data_ptr() for t in glow.state_dict().values()}
    return sum(size for address, size in kept.storages.items() if address not in own)


@pytest.mark.parametrize("nets", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("coupling", ["additive", "affine"])
def test_what_a_setting_keeps_is_foretold(coupling: str, nets: torch.dtype) -> None:
    config = replace(CONFIG, coupling=coupling)  # type: ignore[arg-type]
    costs = level_costs(config, 8, nets)
    for dial in ((0, 0, 0), (1, 1, 1), (4, 4, 4), (2, 0, 0)):
        foretold = plan_of(costs, dial).bytes - max(cost.working for cost in costs)
        assert 0.75 < foretold / saved(config, dial, 8, nets) < 1.25


def test_the_choice_is_the_cheapest_of_all_that_fit() -> None:
    costs = level_costs(CONFIG, 4)
    everything = [plan_of(costs, dial) for dial in itertools.product((0, 1, 2, 4), repeat=3)]
    for budget in sorted({plan.bytes for plan in everything}):
        fitting = [plan for plan in everything if plan.bytes <= budget]
        found = cheapest(costs, budget)
        assert found.bytes <= budget
        assert found.cost == pytest.approx(min(plan.cost for plan in fitting))


def test_room_for_everything_inverts_nothing() -> None:
    costs = level_costs(CONFIG, 4)
    plan = cheapest(costs, 2**40)
    assert plan.anchor_every == (0, 0, 0)
    assert plan.cost == 1


def test_anchors_are_as_many_as_fit() -> None:
    costs = [LevelCost(steps=8, beside=5, step=100, state=10, working=7, macs=1)]
    found = [cheapest(costs, 12 + budget).anchor_every for budget in (800, 799, 89, 49, 29)]
    assert found == [(0,), (1,), (2,), (4,), (8,)]


def test_settings_worth_a_look_fall_in_bytes_and_rise_in_cost() -> None:
    found = plans(level_costs(CONFIG, 4))
    assert [plan.bytes for plan in found] == sorted((plan.bytes for plan in found), reverse=True)
    assert [plan.cost for plan in found] == sorted(plan.cost for plan in found)
    assert found[-1].anchor_every == (4, 4, 4)


def test_a_budget_below_one_step_is_refused_with_both_figures() -> None:
    with pytest.raises(ValueError, match=r"pure inversion works on \d+ MiB; 0 are free"):
        cheapest(level_costs(CONFIG, 4), 1000)
