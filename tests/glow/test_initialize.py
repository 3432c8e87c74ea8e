"""Data-dependent initialisation: unit moments after it, and the same parameters however the data is spread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glow import ActNorm, Glow, GlowConfig
from glow.conditioner import ConvConditioner, padded_with_border
from glow.norm import MIN_STD
from tests.glow.pictures import toy_pictures

CONFIG = GlowConfig(size=8, channels=3, levels=2, steps=2, width=8, classes=2, condition_steps=True)


class Exchange:
    """Workers in threads that give each other their rows, in worker order: a real gather on one machine."""

    def __init__(self, workers: int) -> None:
        self.rows: list[Tensor | None] = [None] * workers
        self.meeting = threading.Barrier(workers, timeout=60)

    def gather_of(self, worker: int) -> Callable[[Tensor], Tensor]:
        def gather(mine: Tensor) -> Tensor:
            self.rows[worker] = mine
            self.meeting.wait()
            everyone = torch.cat([rows for rows in self.rows if rows is not None])
            self.meeting.wait()
            return everyone

        return gather


def initialized(microbatches: Sequence[Tensor], labels: Sequence[Tensor], cuts: Sequence[int]) -> list[Glow]:
    """The models of workers that hold the microbatches between the cuts."""
    bounds = [0, *cuts, len(microbatches)]
    exchange = Exchange(len(bounds) - 1)

    def work(worker: int) -> Glow:
        mine = slice(bounds[worker], bounds[worker + 1])
        model = models[worker]
        model.initialize(microbatches[mine], labels[mine], None, exchange.gather_of(worker))
        return model

    models = [fresh() for _ in bounds[1:]]
    with ThreadPoolExecutor(len(models)) as pool:
        return list(pool.map(work, range(len(models))))


def fresh() -> Glow:
    torch.manual_seed(0)
    return Glow(CONFIG)


@settings(max_examples=6, deadline=None)
@given(cuts=st.lists(st.integers(0, 5), min_size=1, max_size=3).map(sorted))
def test_any_split_of_microbatches_gives_the_same_parameters(cuts: list[int]) -> None:
    microbatches = [toy_pictures(4, 8, seed) for seed in range(5)]
    labels = [torch.tensor([0, 1, -1, 1])] * 5
    alone, *_ = initialized(microbatches, labels, [])
    for model in initialized(microbatches, labels, cuts):
        for name, value in alone.state_dict().items():
            assert torch.equal(model.state_dict()[name], value), name


def test_every_norm_of_a_model_ends_with_unit_moments() -> None:
    """Outputs of every step's norm and of both hidden norms have mean 0 and variance 1 a channel over the data."""
    torch.manual_seed(0)
    glow = Glow(CONFIG).double()
    x = toy_pictures(64, 8, 0).double()
    glow.initialize(list(x.split(16)))
    for level in glow:
        h = level.squeeze(x)[0]
        for step in level.steps:
            assert_unit(step.mix.norm(h)[0])
            h = step.mix(h)[0]
            for normed in hidden_norms(step.coupling.conditioner, h.chunk(2, 1)[0]):
                assert_unit(normed)
            h = step.coupling(h)[0]
        x = level.divide(h)[0]


def hidden_norms(conditioner: ConvConditioner, x: Tensor) -> tuple[Tensor, Tensor]:
    """Both normalised hidden maps, unfolded: convolution, then norm."""
    first = conditioner.norm_first(F.conv2d(padded_with_border(x), conditioner.first))[0]
    second = conditioner.norm_second(F.conv2d(F.relu(first), conditioner.second))[0]
    return first, second


def assert_unit(h: Tensor) -> None:
    assert torch.allclose(h.mean((0, 2, 3)), torch.zeros(()).to(h), atol=1e-9)
    assert torch.allclose(h.var((0, 2, 3), correction=0), torch.ones(()).to(h), atol=1e-9)


def test_initialising_again_changes_nothing() -> None:
    glow = fresh()
    pictures = [toy_pictures(16, 8, 0)]
    glow.initialize(pictures)
    before = {name: value.clone() for name, value in glow.state_dict().items()}
    glow.initialize(pictures)
    for name, value in glow.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_dead_channel_is_not_blown_up() -> None:
    norm = ActNorm(2)
    x = torch.randn(8, 2, 4, 4)
    x[:, 1] = 0.25
    norm.initialize([x], [None], lambda rows: rows)
    y = norm(x)[0]
    assert y[:, 1].abs().max() < 1e-3
    assert norm.scale_and_shift()[0][1].item() == pytest.approx(1 / MIN_STD, rel=1e-5)


def test_forward_initialises_nothing() -> None:
    glow = fresh()
    before = {name: value.clone() for name, value in glow.state_dict().items()}
    glow.log_prob(toy_pictures(4, 8, 0))
    for name, value in glow.state_dict().items():
        assert torch.equal(value, before[name]), name
