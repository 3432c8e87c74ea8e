"""Gradients: by slope (Taylor), and by inversion against plain autograd for every anchor setting."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from glow import Bijection, Chain, Glow, GlowConfig
from glow.level import Step
from tests.glow.pictures import toy_pictures
from tests.glow.table import MIXINGS, ROWS, Row, perturbed, step_config
from tests.reliability import measured


def objective(y: Tensor, log_det: Tensor) -> Tensor:
    """A scalar that every output moves, each by its own weight."""
    generator = torch.Generator().manual_seed(5)
    weights = torch.randn(y.shape, generator=generator, dtype=y.dtype)
    return (y * weights).sum() + (log_det * torch.arange(1, len(y) + 1)).sum() + 0.1 * y.square().sum()


def stacked(row: Row) -> Chain:
    """The row's bijection twice in a row where its shape allows it, as an anchored chain."""
    first = row.build(0)
    x, condition = row.inputs(2)
    twice = first(x, condition)[0].shape == x.shape and not row.bounded
    return (Chain(first, row.build(1)) if twice else Chain(first)).eval()


def gradients(chain: Bijection, x: Tensor, condition: Tensor | None) -> list[Tensor]:
    """Gradients of the objective for parameters, input and condition, 0 where there is none."""
    x = x.detach().requires_grad_()
    inputs = [x, *chain.parameters()]
    if condition is not None:
        condition = condition.detach().requires_grad_()
        inputs.append(condition)
    found = torch.autograd.grad(objective(*chain(x, condition)), inputs, allow_unused=True)
    return [torch.zeros_like(i) if g is None else g for i, g in zip(inputs, found, strict=True)]


def distance(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Norm of the difference over norm of the truth, all tensors together."""
    difference = torch.cat([(a - b).flatten() for a, b in zip(found, wanted, strict=True)]).norm()
    return (difference / torch.cat([b.flatten() for b in wanted]).norm()).item()


def worst(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest relative distance of a single tensor."""
    pairs = zip(found, wanted, strict=True)
    return max([((a - b).norm() / b.norm()).item() for a, b in pairs if b.norm() > 0], default=0.0)


@pytest.mark.parametrize("anchor_every", [0, 1, 2])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name.replace(" ", "-"))
def test_gradients_have_the_right_slope(row: Row, anchor_every: int) -> None:
    """The remainder f(p + h d) - f(p) - h <grad, d> of first order falls with the square of h."""
    chain = stacked(row)
    chain.anchor_every = anchor_every
    x, condition = row.inputs(2)
    points = [x, *chain.parameters(), *([] if condition is None or row.discrete else [condition])]
    starts = [p.detach().clone() for p in points]
    directions = [torch.randn_like(p) for p in starts]
    slope = sum((g * d).sum().item() for g, d in zip(gradients(chain, x, condition), directions, strict=False))
    start = objective(*chain(x, condition)).item()

    def remainder(h: float) -> float:
        with torch.no_grad():
            for point, before, direction in zip(points, starts, directions, strict=True):
                point.copy_(before + h * direction)
            return abs(objective(*chain(x, condition)).item() - start - h * slope)

    coarse, fine = remainder(2e-6), remainder(1e-6)  # small: a wider step crosses a kink of one ReLU of thousands
    assert fine < 1e-11 * abs(start) or 3.5 < coarse / fine < 4.5


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name.replace(" ", "-"))
def test_every_bijection_inverts_in_backward(row: Row) -> None:
    chain = stacked(row)
    x, condition = row.inputs(2)
    wanted = gradients(chain, x, condition)
    for chain.anchor_every in (1, 2):
        assert worst(gradients(chain, x, condition), wanted) < 1e-8


def stack(steps: int, dtype: torch.dtype = torch.float64, condition: int = 0, **changes: object) -> Chain:
    """So many steps over 4 channels, away from their start."""
    torch.manual_seed(steps)
    config = step_config(**changes, classes=condition, condition_steps=True)
    chain = Chain(*(Step(4, config) for _ in range(steps)))
    perturbed(chain, by=0.05)
    return chain.to(dtype)


def anchor_settings(steps: int) -> set[int]:
    return {1, 2, 3, max(steps // 2, 1), steps - 1, steps, steps + 5}


@pytest.mark.parametrize("condition", [0, 3])
@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("coupling", ["additive", "affine"])
@pytest.mark.parametrize("steps", [2, 8, 32])
def test_anchored_gradients_are_plain_autograds(steps: int, coupling: str, mixing: str, condition: int) -> None:
    chain = stack(steps, coupling=coupling, mixing=mixing, condition=condition)
    x = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    c = torch.randn(2, condition, dtype=torch.float64) if condition else None
    wanted = gradients(chain, x, c)
    for chain.anchor_every in anchor_settings(steps):
        found = gradients(chain, x, c)
        error = max(distance(found, wanted), worst(found, wanted))
        measured("R21", "float64, chains of 2, 8, 32 steps: worst error of a gradient", error, "of its norm")
        assert error <= 1e-8


@pytest.mark.parametrize("coupling", ["additive", "affine"])
def test_a_whole_models_anchored_gradients_are_plain_autograds(coupling: str) -> None:
    config = GlowConfig(size=8, channels=3, levels=2, steps=4, width=8, classes=3, attributes=2, coupling=coupling)  # type: ignore[arg-type]
    torch.manual_seed(0)
    glow = perturbed(Glow(config)).double()
    x = torch.rand(3, 3, 8, 8, dtype=torch.float64) - 0.5
    given = {"label": torch.tensor([0, 2, -1]), "attributes": torch.tensor([[1, -1], [0, 1], [0, 0]])}
    wanted = model_gradients(glow, x, **given)
    for anchors in ([1], [4], [2, 0], [0, 4], [3, 9]):
        glow.set_anchors(anchors)
        error = worst(model_gradients(glow, x, **given), wanted)
        measured("R21", "float64, whole models: worst error of a gradient", error, "of its norm")
        assert error <= 1e-8


def model_gradients(glow: Glow, x: Tensor, **given: Tensor) -> list[Tensor]:
    """Gradients of the mean log-likelihood."""
    parameters = list(glow.parameters())
    found = torch.autograd.grad(glow.log_prob(x, **given).mean(), parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


@pytest.fixture(scope="module", params=["additive", "affine"])
def trained(request: pytest.FixtureRequest) -> tuple[Glow, Callable[[int], Tensor]]:
    """A float32 model after 100 steps of Adam on toy pictures, and the pictures."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    glow = Glow(GlowConfig(size=16, channels=3, levels=2, steps=8, width=32, coupling=request.param))
    glow.initialize([toy_pictures(32, 16, seed=0)])
    optimizer = torch.optim.Adam(glow.parameters(), lr=1e-3)
    for step in range(100):
        optimizer.zero_grad()
        loss = -glow.log_prob(toy_pictures(8, 16, seed=step)).mean() / glow.dims
        loss.backward()
        optimizer.step()
    return glow, lambda seed: toy_pictures(8, 16, seed=seed)


@pytest.mark.parametrize("anchor_every", [1, 4])
def test_float32_gradients_of_a_trained_stack(trained: tuple[Glow, Callable[[int], Tensor]], anchor_every: int) -> None:
    glow, pictures = trained
    for seed in (1000, 1001):
        glow.set_anchors([0])
        wanted = model_gradients(glow, pictures(seed))
        glow.set_anchors([anchor_every])
        off = distance(model_gradients(glow, pictures(seed)), wanted)
        measured("R21", "float32, trained for 100 steps, anchors: error of all gradients", off, "of the total norm")
        assert off <= 1e-4
        error = glow.inversion_error()
        assert error is not None
        assert error < 1e-4
