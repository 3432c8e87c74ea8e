"""Variational dequantisation: inside the bin, uniform at the start, a density, a bound below the likelihood."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from glow import Dequantizer, Glow, GlowConfig, bits_per_dim, dequantize, keyed_uniform, sample_keys, to_pixels
from tests.glow.pictures import toy_pictures
from tests.glow.table import perturbed


def model(dequantization: str = "variational", **changes: object) -> Glow:
    """A small Glow whose dequantiser is away from its start."""
    torch.manual_seed(0)
    config = {"size": 4, "channels": 1, "levels": 1, "steps": 2, "width": 8, "dequantizer_width": 8, **changes}
    return perturbed(Glow(GlowConfig(dequantization=dequantization, **config)), 0.2)  # type: ignore[arg-type]


def pictures(count: int, glow: Glow, seed: int = 0) -> Tensor:
    """uint8 images of any values."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, glow.config.channels, glow.config.size, glow.config.size)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def noised(pixels: Tensor, bits: int, epoch: int = 0) -> Tensor:
    """Pixels under the keyed noise of an epoch."""
    samples = torch.arange(len(pixels))
    keys = sample_keys(0, torch.full_like(samples, epoch), samples)
    return dequantize(pixels, bits, keyed_uniform(keys, tuple(pixels.shape[1:])))


@pytest.mark.parametrize("bits", [1, 5, 8])
def test_noise_stays_in_its_bin(bits: int) -> None:
    """Also where it is pushed as hard as couplings can."""
    glow = perturbed(model(), 0.5)
    pixels = pictures(64, glow)
    moved, freedom = glow.dequantized(noised(pixels, bits), bits)
    shift = 8 - bits
    assert torch.equal(to_pixels(moved, bits), pixels >> shift << shift)
    assert freedom.isfinite().all()


@pytest.mark.parametrize("bits", [5, 8])
def test_a_new_dequantizer_is_uniform(bits: int) -> None:
    """Four reversals are the identity: the noise is what it was, up to the cell it stood for the middle of."""
    glow = Glow(GlowConfig(size=8, channels=3, levels=1, steps=1, width=4, dequantization="variational"))
    x = toy_pictures(4, 8, 0)
    x = (x + 0.5).mul(2**24).floor() / 2**24 - 0.5
    moved, freedom = glow.dequantized(x, bits)
    assert (moved - x).abs().max() <= 2.0**-23
    assert freedom.abs().max() < 1e-3
    assert (glow.bound(x, bits).log_prob - glow.log_prob(x)).abs().max() < 1e-2


def test_uniform_noise_is_the_bound_itself() -> None:
    glow = model("uniform")
    x = noised(pictures(3, glow), 5)
    bound, terms = glow.bound(x, 5), glow.terms(x)
    assert torch.equal(bound.log_prob, terms.log_prob)
    assert bound.dequantization is None
    assert torch.equal(glow.dequantized(x, 5)[0], x)


def test_its_log_det_is_the_jacobians() -> None:
    glow = model(size=2).double()
    assert glow.dequantizer is not None
    x = torch.rand(1, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) - 0.5
    dequantizer = glow.dequantizer
    jacobian = torch.autograd.functional.jacobian(lambda flat: dequantizer(flat, 3)[0], x).view(4, 4)
    # Noise is moved given its bins, so the derivative of the bins is none.
    assert torch.linalg.slogdet(jacobian).logabsdet.item() == pytest.approx(dequantizer(x, 3)[1].item(), abs=1e-6)


def test_the_bound_is_a_bound() -> None:
    """log P(pixels) by quadrature over the bin: E[exp(bound)] is P, so the mean bound is below."""
    bits, count = 2, 2**13
    glow = model(size=2, steps=3).double()
    pixels = pictures(3, glow).repeat_interleave(count, dim=0)
    points = torch.quasirandom.SobolEngine(4, scramble=True, seed=0).draw(count, dtype=torch.float64)
    noise = points.view(count, 1, 2, 2).repeat(3, 1, 1, 1)
    x = dequantize(pixels, bits, noise)
    with torch.no_grad():
        under_uniform = glow.log_prob(x).view(3, count)
        under_flow = glow.bound(x, bits).log_prob.view(3, count)
    exact = under_uniform.exp().mean(1).log()
    assert torch.allclose(under_flow.exp().mean(1).log(), exact, atol=0.1)
    assert (under_flow.mean(1) < exact).all()
    assert (under_uniform.mean(1) < exact).all()


def test_training_its_flow_alone_raises_the_bound() -> None:
    """A density that is steep inside a bin: the flow learns where in the bin to stand."""
    glow = model(size=4)
    assert glow.dequantizer is not None
    glow.dequantizer = Dequantizer(1, 4, 16)
    with torch.no_grad():
        next(iter(next(iter(glow)).steps)).mix.norm.log_scale.add_(0.6)
    pixels = pictures(32, glow)
    optimizer = torch.optim.Adam(glow.dequantizer.parameters(), lr=1e-2)

    def bits_of(epoch: int) -> Tensor:
        return bits_per_dim(glow.bound(noised(pixels, 2, epoch), 2).log_prob, glow.dims, 2).mean()

    before = bits_of(10_000).item()
    for epoch in range(40):
        optimizer.zero_grad()
        bits_of(epoch).backward()
        optimizer.step()
    assert bits_of(10_000).item() < before - 0.02


def test_noise_of_a_sample_does_not_depend_on_its_batch() -> None:
    glow = model().double()
    x = noised(pictures(5, glow), 5).double()
    together = glow.dequantized(x, 5)[0]
    alone = torch.cat([glow.dequantized(x[i : i + 1], 5)[0] for i in range(5)])
    assert torch.allclose(together, alone, atol=1e-12)


@pytest.mark.parametrize("anchors", [1, 4])
def test_memory_by_inversion_changes_no_gradient(anchors: int) -> None:
    glow = model(classes=2, condition_steps=True).double()
    x, label = noised(pictures(3, glow), 5).double(), torch.tensor([0, 1, -1])

    def gradients(every: int) -> list[Tensor]:
        glow.set_anchors([every])
        glow.zero_grad()
        glow.bound(x, 5, label).log_prob.mean().backward()
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in glow.parameters()]

    plain = gradients(0)
    assert any(bool(g.any()) for g in plain)
    for ours, theirs in zip(gradients(anchors), plain, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-8, atol=1e-10)
    assert glow.inversion_error() is not None


def test_the_terms_of_the_bound_add_up() -> None:
    glow = model()
    found = glow.bound(noised(pictures(3, glow), 5), 5)
    assert found.dequantization is not None
    assert torch.allclose(found.log_prob, found.log_det + sum(found.priors) + found.dequantization, rtol=1e-5)
    assert math.isfinite(found.log_prob.sum().item())
