"""Pixels to densities and back; noise keyed by sample; bits per dimension."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glow import bits_per_dim, dequantize, keyed_normal, keyed_uniform, quantize, sample_keys, to_pixels

EVERY_PIXEL = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
ALMOST_ONE = 1 - 2.0**-24
depths = st.integers(1, 8)
noises = st.one_of(
    st.floats(0, ALMOST_ONE, width=32), st.sampled_from([0.0, 2.0**-149, 0.5, ALMOST_ONE, 1 - 2.0**-23, 1 - 2.0**-12])
)


@settings(max_examples=300, deadline=None)
@given(bits=depths, noise=noises)
def test_every_pixel_survives_every_noise(bits: int, noise: float) -> None:
    x = dequantize(EVERY_PIXEL, bits, torch.full(EVERY_PIXEL.shape, noise))
    assert x.dtype == torch.float32
    assert x.min() >= -0.5
    assert x.max() < 0.5
    shift = 8 - bits
    assert torch.equal(to_pixels(x, bits), EVERY_PIXEL >> shift << shift)


@pytest.mark.parametrize("bits", range(1, 9))
def test_dequantised_values_fill_their_bin(bits: int) -> None:
    pixels = EVERY_PIXEL.repeat(64, 1, 1, 1)
    noise = keyed_uniform(torch.arange(64), (1, 16, 16))
    position = (dequantize(pixels, bits, noise) + 0.5) * 2**bits - quantize(pixels, bits)
    assert position.min() >= 0
    assert position.max() < 1
    assert torch.allclose(position, noise, atol=2.0 ** (bits - 24))


def test_quantisation_keeps_the_upper_bits() -> None:
    assert quantize(torch.tensor([0, 7, 8, 255], dtype=torch.uint8), 5).tolist() == [0, 0, 1, 31]
    assert to_pixels(torch.tensor([-0.5, -0.5 + 1 / 32, 0.4999]), 5).tolist() == [0, 8, 248]


def test_pixels_are_clipped() -> None:
    assert to_pixels(torch.tensor([-3.0, 0.5, 7.0]), 8).tolist() == [0, 255, 255]


@given(bits=depths, dims=st.integers(1, 10**6))
def test_a_uniform_density_costs_exactly_its_bits(bits: int, dims: int) -> None:
    assert bits_per_dim(torch.zeros(3), dims, bits).tolist() == [bits] * 3


@given(bits=depths, dims=st.integers(1, 3000))
def test_bits_per_dim_counts_the_bin(bits: int, dims: int) -> None:
    """A density that puts all mass in the right bins, 2^bits in each dimension, costs nothing."""
    sure = torch.tensor([bits * math.log(2) * dims], dtype=torch.float64)
    assert bits_per_dim(sure, dims, bits).item() == pytest.approx(0, abs=1e-12)


def test_keyed_noise_is_uniform() -> None:
    u = keyed_uniform(sample_keys(0, torch.zeros(500, dtype=torch.long), torch.arange(500)), (3, 16, 16)).flatten()
    n = len(u)
    assert u.min() >= 0
    assert u.max() < 1
    assert u.mean().item() == pytest.approx(0.5, abs=4 / math.sqrt(12 * n))
    assert u.var().item() == pytest.approx(1 / 12, rel=0.01)
    counts = torch.histc(u, 256, 0, 1)
    chi_square = ((counts - n / 256).square() / (n / 256)).sum().item()
    assert 255 - 5 * math.sqrt(510) < chi_square < 255 + 5 * math.sqrt(510)


def test_keyed_noise_has_no_neighbours() -> None:
    """Neither the next value of a sample nor the next sample knows the one before."""
    u = keyed_uniform(sample_keys(0, torch.zeros(400, dtype=torch.long), torch.arange(400)), (400,)) - 0.5
    for a, b in ((u[:, 1:], u[:, :-1]), (u[1:], u[:-1])):
        correlation = (a * b).mean() * 12
        assert abs(correlation.item()) < 5 / 400
    for bit in range(24):
        share = ((((u + 0.5) * 2**24).long() >> bit) & 1).double().mean().item()
        assert share == pytest.approx(0.5, abs=5 * 0.5 / 400)


@settings(max_examples=30, deadline=None)
@given(
    samples=st.lists(st.integers(0, 2**40), min_size=1, max_size=6, unique=True),
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 10**6),
)
def test_noise_belongs_to_the_sample_not_to_the_batch(samples: list[int], seed: int, epoch: int) -> None:
    ids = torch.tensor(samples)
    epochs = torch.full_like(ids, epoch)
    together = keyed_uniform(sample_keys(seed, epochs, ids), (2, 3))
    back = keyed_uniform(sample_keys(seed, epochs.flip(0), ids.flip(0)), (2, 3)).flip(0)
    assert torch.equal(together, back)
    for i in range(len(samples)):
        alone = keyed_uniform(sample_keys(seed, epochs[i : i + 1], ids[i : i + 1]), (2, 3))
        assert torch.equal(alone[0], together[i])
    assert len(set(sample_keys(seed, epochs, ids).tolist())) == len(samples)


@given(key=st.integers(-(2**63), 2**63 - 1))
def test_a_shorter_draw_begins_a_longer_one(key: int) -> None:
    keys = torch.tensor([key])
    assert torch.equal(keyed_uniform(keys, (5,)), keyed_uniform(keys, (9,))[:, :5])


def test_seed_epoch_and_sample_all_count() -> None:
    def keys(seed: int, epoch: int, sample: int) -> int:
        return int(sample_keys(seed, torch.tensor([epoch]), torch.tensor([sample])).item())

    assert len({keys(s, e, n) for s in range(8) for e in range(8) for n in range(8)}) == 512


def splitmix64(z: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014) on unsigned 64-bit integers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return z ^ (z >> 31)


@given(seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 2**31), sample=st.integers(0, 2**62))
def test_noise_is_splitmix64(seed: int, epoch: int, sample: int) -> None:
    """Restated in Python's integers: noise is part of what a run learns from and must never change."""
    key = splitmix64((splitmix64((splitmix64(seed) + epoch) % 2**64) + sample) % 2**64)
    keys = sample_keys(seed, torch.tensor([epoch]), torch.tensor([sample]))
    assert keys.item() % 2**64 == key
    wanted = [splitmix64((key + i * 0x9E3779B97F4A7C15) % 2**64) >> 40 for i in (1, 2, 3)]
    assert (keyed_uniform(keys, (3,)) * 2**24).long().tolist() == [wanted]


def test_keyed_normal_is_normal() -> None:
    z = keyed_normal(torch.arange(300), (300,)).double()
    n = z.numel()
    assert z.dtype == torch.float64
    assert z.isfinite().all()
    assert z.mean().item() == pytest.approx(0, abs=4 / math.sqrt(n))
    assert z.var().item() == pytest.approx(1, abs=4 * math.sqrt(2 / n))
    assert (z**4).mean().item() == pytest.approx(3, abs=0.15)
