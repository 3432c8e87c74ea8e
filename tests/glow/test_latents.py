"""Latents by seed, and attribute directions over a stream."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glow import attribute_directions, latents_of_seeds

SHAPES = [(2, 4, 4), (8, 2, 2)]


@settings(max_examples=20, deadline=None)
@given(seeds=st.lists(st.integers(0, 2**62), min_size=1, max_size=5))
def test_a_seed_draws_the_same_latents_in_any_batch(seeds: list[int]) -> None:
    together = latents_of_seeds(torch.tensor(seeds), SHAPES)
    assert [tuple(z.shape[1:]) for z in together] == SHAPES
    for i, seed in enumerate(seeds):
        for level, z in enumerate(latents_of_seeds(torch.tensor([seed]), SHAPES)):
            assert torch.equal(z[0], together[level][i])


def test_temperature_scales_latents() -> None:
    warm, cool = (latents_of_seeds(torch.arange(3), SHAPES, heat) for heat in (1.0, 0.5))
    assert all(torch.equal(0.5 * a, b) for a, b in zip(warm, cool, strict=True))


def test_levels_do_not_share_their_noise() -> None:
    first, second = latents_of_seeds(torch.arange(4), [(1, 4, 4), (1, 4, 4)])
    assert not torch.isclose(first, second).any()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), cuts=st.lists(st.integers(1, 39), max_size=3))
def test_directions_are_differences_of_means_however_streamed(seed: int, cuts: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    latents = [torch.randn(40, *shape, generator=generator) for shape in SHAPES]
    signs = torch.randint(-1, 2, (40, 3), generator=generator)
    bounds = [0, *sorted(set(cuts)), 40]
    pieces = [([z[a:b] for z in latents], signs[a:b]) for a, b in pairwise(bounds)]
    for z, direction in zip(latents, attribute_directions(pieces, 3), strict=True):
        for a in range(3):
            wanted = z[signs[:, a] > 0].double().mean(0) - z[signs[:, a] < 0].double().mean(0)
            assert torch.allclose(direction[a], wanted.float(), atol=1e-6)


def test_an_attribute_never_seen_on_both_sides_has_no_direction() -> None:
    latents = [torch.randn(6, 2, 4, 4)]
    signs = torch.tensor([[1, 0], [1, -1], [1, 0], [1, -1], [1, 0], [1, 0]])
    assert not attribute_directions([(latents, signs)], 2)[0].any()
