"""Inverses computed together: those of each alone, never stale, and a step that never waits for its device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from glow import Bijection, Chain, Glow, GlowConfig
from glow.inverses import Inverses, Matrix
from glow.mixing import Mixing, MixingKind, make_mixing
from tests.glow.table import MIXINGS, perturbed


def chain_of(kind: MixingKind, steps: int = 3) -> Chain:
    torch.manual_seed(0)
    return Chain(*(perturbed(make_mixing(kind, 6)) for _ in range(steps)))


def round_trip(chain: Bijection) -> float:
    x = torch.randn(2, 6, 3, 3).to(next(iter(chain.state_dict().values())))
    with torch.no_grad():
        return (chain.inverse(chain(x)[0]) - x).abs().max().item()


@pytest.mark.parametrize("kind", MIXINGS)
def test_inverses_computed_together_are_those_computed_alone(kind: MixingKind) -> None:
    chain = chain_of(kind)
    mixings = [part for part in chain.modules() if isinstance(part, Mixing)]
    inverses = Inverses([chain])
    for mixing in reversed(mixings):
        assert torch.equal(inverses.of(mixing), torch.inverse(mixing.matrix().detach().double()).float())


@pytest.mark.parametrize("kind", ["lu", "dense"])
def test_no_inverse_outlives_a_fused_optimisers_step(kind: MixingKind) -> None:
    """A fused optimiser does not raise its parameters' versions: nothing could notice that they moved."""
    chain = chain_of(kind)
    optimizer = torch.optim.Adam(chain.parameters(), lr=0.1, fused=True)
    chain.anchor_every = 3
    x = torch.randn(2, 6, 3, 3)
    for _ in range(3):
        optimizer.zero_grad()
        y, log_det = chain(x)
        (y.square().mean() - log_det.mean() / x[0].numel()).backward()
        assert chain.inversion_error is not None
        assert chain.inversion_error < 1e-4
        assert round_trip(chain) < 1e-4
        optimizer.step()


def test_matrices_of_many_sizes_are_batched_by_size() -> None:
    class Fake(Matrix):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.size, self.asked = size, 0

        def matrix(self) -> Tensor:
            self.asked += 1
            return torch.diag(torch.arange(1.0, self.size + 1))

    fakes = [Fake(size) for size in (4, 4, 2, 2, 4)]
    inverses = Inverses(fakes)
    for fake in reversed(fakes):
        assert torch.equal(inverses.of(fake).diagonal(), 1 / torch.arange(1.0, fake.size + 1))
    assert [fake.asked for fake in fakes] == [2, 2, 1, 1, 1]


def test_inverting_is_differentiable_in_the_matrix() -> None:
    chain = chain_of("lu", 1).double()
    chain.inverse(torch.randn(1, 6, 2, 2, dtype=torch.float64)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in chain.parameters())


def test_a_permutation_is_inverted_exactly() -> None:
    assert round_trip(chain_of("shuffle")) == 0


class Waits(TorchDispatchMode):
    """Notes every operation that makes a host wait for its device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        waits = func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "masked_select", "equal")
        # The states of random generators, uint8, lie on the host.
        if waits and not all(a.dtype == torch.uint8 for a in args if isinstance(a, Tensor)):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("anchors", [0, 2])
def test_a_training_step_never_waits_for_the_device(anchors: int) -> None:
    glow = Glow(GlowConfig(size=8, channels=3, levels=2, steps=2, width=8, classes=-1, attributes=-1))
    glow.set_anchors([anchors])
    with Waits() as waits:
        glow.log_prob(torch.rand(2, 3, 8, 8) - 0.5).mean().backward()
    assert waits.seen == []
    assert next(glow.parameters()).grad is not None
