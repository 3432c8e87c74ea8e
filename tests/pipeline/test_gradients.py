"""Laws of the flat gradient: both reductions give autograd's gradient, tree with the same bits for every world size."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch import nn

from pipeline.gradients import Gradients
from pipeline.world import World
from tests.pipeline.group import run_group

LEAVES = 6


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def leaf_loss(model: nn.Module, leaf: int) -> torch.Tensor:
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(leaf))
    return model(x).square().sum() * 10.0 ** (leaf - 3)


def gradient(world: World, reduction: str) -> torch.Tensor:
    model = network()
    gradients = Gradients(list(model.parameters()), world, LEAVES, reduction)  # type: ignore[arg-type]
    for _ in range(2):
        flat = gradients.of(lambda leaf: leaf_loss(model, leaf))
    shown = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert torch.equal(shown, flat)
    return flat.clone()


def expected() -> torch.Tensor:
    model = network()
    total = torch.stack([leaf_loss(model, leaf) for leaf in range(LEAVES)]).sum()
    return torch.cat([g.flatten() for g in torch.autograd.grad(total, list(model.parameters()))])


@pytest.mark.parametrize("reduction", ["tree", "overlap"])
@pytest.mark.parametrize("size", [1, 3, 4])
def test_sum_over_leaves_and_ranks_is_the_gradient_of_the_sum(reduction: str, size: int) -> None:
    ranks = [gradient(World(), reduction)] if size == 1 else run_group(size, gradient, reduction)
    for found in ranks:
        torch.testing.assert_close(found, expected(), rtol=1e-5, atol=1e-5)
        assert torch.equal(found, ranks[0])


def test_tree_has_the_same_bits_for_every_number_of_workers() -> None:
    def digest(flat: torch.Tensor) -> str:
        return hashlib.sha256(flat.numpy().tobytes()).hexdigest()

    found = {digest(gradient(World(), "tree"))}
    found |= {digest(flat) for size in (2, 4) for flat in run_group(size, gradient, "tree")}
    assert len(found) == 1
