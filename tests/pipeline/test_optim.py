"""Laws of the optimiser: the released Adamax restated in numpy, the rate in images, averages, the guard, resuming."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pipeline.config import OptimConfig
from pipeline.errors import DataError, DivergedError
from pipeline.optim import (
    Ema,
    GlowAdamax,
    Guard,
    learning_rate,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    set_rate,
)


class Small(nn.Module):
    """Parameters of several shapes, a float buffer and a buffer of indices."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.inner = nn.Linear(3, 4)
        self.gain = nn.Parameter(torch.randn(()))
        self.register_buffer("moment", torch.rand(5))
        self.register_buffer("order", torch.arange(4))

    def loss(self, step: int) -> torch.Tensor:
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        return (self.gain * self.inner(x).sin()).square().mean()


def train(model: Small, optimizer: torch.optim.Optimizer, steps: range, ema: Ema | None = None) -> None:
    for step in steps:
        optimizer.zero_grad()
        model.loss(step).backward()
        set_rate(optimizer, 1e-2 * step / 10)
        optimizer.step()
        if ema is not None:
            ema.update(model)


def test_adamax_is_the_released_one() -> None:
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(4, 3))
    parameter = nn.Parameter(torch.tensor(weights))
    optimizer = GlowAdamax([parameter], lr=0.0, betas=(0.9, 0.99), eps=1e-8)
    moment, largest = np.zeros_like(weights), np.zeros_like(weights)
    for t in range(1, 40):
        gradient = rng.normal(size=weights.shape) * 10.0 ** rng.integers(-9, 2)
        rate = 1e-2 * (t - 1) / 10
        moment = 0.9 * moment + 0.1 * gradient
        largest = np.maximum(0.99 * largest, abs(gradient))
        weights = weights - rate * math.sqrt(1 - 0.99**t) / (1 - 0.9**t) * moment / (largest + 1e-8)
        parameter.grad = torch.tensor(gradient)
        set_rate(optimizer, rate)
        optimizer.step()
        assert np.abs(parameter.detach().numpy() - weights).max() <= 1e-6


def test_a_rate_of_zero_moves_the_state_alone() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = GlowAdamax([parameter], lr=0.0)
    parameter.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(parameter.detach(), torch.ones(3))
    assert optimizer.state[parameter]["step"] == 1
    assert torch.equal(optimizer.state[parameter]["exp_inf"], torch.ones(3))


def test_a_parameter_without_gradient_stays() -> None:
    moved, left = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = GlowAdamax([moved, left])
    moved.grad = torch.ones(2)
    optimizer.step()
    assert left not in optimizer.state
    assert torch.equal(left.detach(), torch.ones(2))
    assert moved.detach().max() < 1


@pytest.mark.parametrize("algorithm", ["adamax", "adam"])
def test_resuming_equals_not_stopping(algorithm: Any) -> None:
    config = OptimConfig(algorithm=algorithm)
    whole, part = Small(), Small()
    first, second = make_optimizer(whole.parameters(), config), make_optimizer(part.parameters(), config)
    first_ema, second_ema = Ema(whole, 30, 8), Ema(part, 30, 8)
    train(whole, first, range(10), first_ema)
    train(part, second, range(6), second_ema)
    resumed = Small(seed=1)
    resumed.load_state_dict(part.state_dict())
    third, third_ema = make_optimizer(resumed.parameters(), config), Ema(resumed, 30, 8)
    load_optimizer_tensors(third, resumed, optimizer_tensors(second, part))
    third_ema.load_state_dict(second_ema.state_dict())
    train(resumed, third, range(6, 10), third_ema)
    for mine, other in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(mine, other)
    for name, tensor in first_ema.state.items():
        assert torch.equal(tensor, third_ema.state[name])
    for name, tensor in optimizer_tensors(first, whole).items():
        assert torch.equal(tensor, optimizer_tensors(third, resumed)[name])


@pytest.mark.parametrize("algorithm", ["adamax", "adam"])
def test_torch_state_dicts_round_trip(algorithm: Any) -> None:
    config = OptimConfig(algorithm=algorithm)
    one, two = Small(), Small()
    first, second = make_optimizer(one.parameters(), config), make_optimizer(two.parameters(), config)
    train(one, first, range(4))
    two.load_state_dict(one.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(one, first, range(4, 7))
    train(two, second, range(4, 7))
    for mine, other in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_optimiser_state_of_another_model_is_refused() -> None:
    model = Small()
    optimizer = make_optimizer(model.parameters(), OptimConfig())
    train(model, optimizer, range(1))
    tensors = optimizer_tensors(optimizer, model)
    assert sorted(tensors)[:3] == ["gain/exp_avg", "gain/exp_inf", "gain/step"]
    with pytest.raises(DataError, match="another model"):
        load_optimizer_tensors(optimizer, model, {**tensors, "gain/exp_avg": torch.zeros(3)})
    with pytest.raises(DataError, match="gone"):
        load_optimizer_tensors(optimizer, model, {"gone/exp_avg": torch.zeros(3)})


rates = st.builds(
    OptimConfig,
    lr=st.floats(1e-6, 1),
    warmup=st.integers(1, 10_000),
    decay=st.sampled_from(["constant", "cosine"]),
)


@given(rates, st.integers(1, 100_000))
def test_the_rate_rises_linearly_from_zero_and_never_above(config: OptimConfig, more: int) -> None:
    total = config.warmup + more
    assert learning_rate(config, 0, total) == 0
    middle = learning_rate(config, config.warmup // 2, total)
    assert middle == pytest.approx(config.lr * (config.warmup // 2) / config.warmup)
    assert learning_rate(config, config.warmup, total) == pytest.approx(config.lr)
    seen = [learning_rate(config, config.warmup + more * i // 20, total) for i in range(21)]
    assert all(a >= b for a, b in itertools.pairwise(seen))
    last = 0 if config.decay == "cosine" else config.lr
    assert seen[-1] == pytest.approx(last, abs=1e-12)
    assert learning_rate(config, total + 1, total) == pytest.approx(last, abs=1e-12)


def test_the_cosine_is_half_way_down_in_the_middle() -> None:
    config = OptimConfig(lr=1.0, warmup=100, decay="cosine")
    assert learning_rate(config, 600, 1100) == pytest.approx(0.5)
    assert learning_rate(OptimConfig(lr=1.0, warmup=0), 0, 10) == 1.0


def test_half_of_an_image_is_forgotten_after_a_halflife() -> None:
    model = nn.Linear(1, 1, bias=False)
    ema = Ema(model, 800, 8)
    with torch.no_grad():
        model.weight.fill_(1.0)
        for _ in range(1000):  # 10 half-lives: as good as steady
            ema.update(model)
        model.weight.fill_(0.0)
        for _ in range(100):
            ema.update(model)
    assert float(ema.state["weight"]) == pytest.approx(0.5, rel=2e-3)


def test_the_average_owes_nothing_to_the_weights_of_construction() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 100.0)
    ema = Ema(model, 1e9, 8)
    for value in (1.0, 2.0, 6.0):
        nn.init.constant_(model.weight, value)
        ema.update(model)
    assert float(ema.state["weight"]) == pytest.approx(3.0, rel=1e-4)


def test_swapping_lends_the_average_and_gives_back_every_bit() -> None:
    model = Small()
    ema = Ema(model, 100, 10)
    assert sorted(ema.state) == ["gain", "inner.bias", "inner.weight", "moment"]
    train(model, make_optimizer(model.parameters(), OptimConfig()), range(5), ema)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with contextlib.suppress(KeyError), ema.swapped(model):
        for name, tensor in ema.state.items():
            assert torch.equal(model.state_dict()[name], tensor)
        assert not torch.equal(model.inner.weight, before["inner.weight"])
        raise KeyError
    for name, tensor in before.items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_an_average_started_again_forgets() -> None:
    model, other = Small(), Small(seed=1)
    ema = Ema(other, 100, 10)
    ema.update(other)
    ema.reset(model)
    assert ema.updates == 0
    for name, tensor in ema.state.items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_averages_of_another_model_are_refused() -> None:
    ema = Ema(Small(), 100, 10)
    with pytest.raises(DataError, match="weight"):
        Ema(nn.Linear(3, 4), 100, 10).load_state_dict(ema.state_dict())


@pytest.mark.parametrize("bad", [math.nan, math.inf, 21.0])
def test_the_guard_skips_counts_and_forgives(bad: float) -> None:
    guard = Guard(OptimConfig(guard_factor=20.0, guard_skips=3))
    assert all(guard.check(norm) for norm in (1.0, 1.0, 1.0))
    for _ in range(4):
        assert not guard.check(bad)
        assert not guard.check(bad)
        assert guard.check(1.0)
    assert (guard.skipped, guard.consecutive, guard.running) == (8, 0, 1.0)


def test_the_guard_stops_a_run_that_has_diverged() -> None:
    guard = Guard(OptimConfig(guard_skips=3))
    assert guard.check(2.0)
    found = {"norm": "nan", "samples": [{"epoch": 2, "sample": 17, "bits_per_dim": "nan"}], "parameters": ["a.w"]}
    for _ in range(2):
        assert not guard.check(math.nan)
        guard.refuse_hopeless(found)
    assert not guard.check(math.nan)
    with pytest.raises(DivergedError, match=r"3 gradients in a row.*samples 17 of epoch 2.*parameters a\.w.*optim\.lr"):
        guard.refuse_hopeless(found)


def test_the_first_norm_only_has_to_be_finite() -> None:
    guard = Guard(OptimConfig())
    assert not guard.check(math.inf)
    assert guard.check(1e6)
    assert not guard.check(2.1e7)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=30), st.lists(st.floats(0, 100), min_size=1, max_size=30))
def test_the_guard_goes_on_exactly_through_json(before: list[float], after: list[float]) -> None:
    config = OptimConfig(guard_skips=1000)
    guard, resumed = Guard(config), Guard(config)
    for norm in before:
        guard.check(norm)
    resumed.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert [guard.check(norm) for norm in after] == [resumed.check(norm) for norm in after]
    assert guard.state_dict() == resumed.state_dict()
