"""Latents by seed, attribute directions over a stream, and the laws of moving, mixing and resampling."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glow import attribute_directions, heat, interpolate, keep_levels, latents_of_seeds, move, project

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


def draw(count: int, seed: int) -> list[torch.Tensor]:
    """Float64 latents, so that laws are exact to 1e-9."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, *shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def joined(latents: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([z.flatten(1) for z in latents], dim=1)


NUMBERS = st.integers(0, 2**31)
SLIDERS = st.lists(st.floats(-2, 2), min_size=3, max_size=3)


@settings(max_examples=20)
@given(seed=NUMBERS, heats=st.tuples(st.floats(0, 2), st.floats(0, 2)))
def test_every_level_has_its_own_temperature(seed: int, heats: tuple[float, float]) -> None:
    latents = draw(2, seed)
    assert all(torch.equal(h * z, hot) for h, z, hot in zip(heats, latents, heat(latents, heats), strict=True))
    with pytest.raises(ValueError, match="3 temperatures for 2 levels"):
        heat(latents, [1.0, *heats])


@settings(max_examples=30)
@given(seed=NUMBERS, first=SLIDERS, second=SLIDERS)
def test_moves_add_up_and_go_back(seed: int, first: list[float], second: list[float]) -> None:
    latents, directions = draw(2, seed), draw(3, seed + 1)
    a, b = (torch.tensor([sliders, [0.0, 0.0, 0.0]]) for sliders in (first, second))
    twice = move(move(latents, directions, a), directions, b)
    assert torch.allclose(joined(twice), joined(move(latents, directions, a + b)), atol=1e-5)
    assert torch.equal(joined(twice)[1], joined(latents)[1])


@settings(max_examples=30)
@given(seed=NUMBERS, slider=st.floats(-2, 2), scale=st.floats(0.1, 3))
def test_a_move_moves_the_projection_by_the_slider(seed: int, slider: float, scale: float) -> None:
    latents, (direction, *_) = draw(2, seed), [d[:1] for d in draw(1, seed + 1)]
    directions = [direction, torch.zeros(1, *SHAPES[1])]
    before = project(latents, directions, scale)
    after = project(move(latents, directions, torch.full((2, 1), slider), scale), directions, scale)
    assert torch.allclose(after - before, torch.full((2, 1), slider), atol=1e-5)


def test_along_no_direction_everybody_stands_at_0() -> None:
    assert not project(draw(3, 0), [torch.zeros(2, *shape) for shape in SHAPES]).any()


@settings(max_examples=30)
@given(seed=NUMBERS, weight=st.floats(0, 1), spherical=st.booleans())
def test_interpolation_ends_exactly_and_reads_the_same_backwards(seed: int, weight: float, spherical: bool) -> None:
    a, b = draw(1, seed), draw(1, seed + 1)
    there = interpolate(a, b, torch.tensor([0.0, weight, 1.0]), spherical)
    assert torch.equal(joined(there)[:1], joined(a))
    assert torch.equal(joined(there)[2:], joined(b))
    back = interpolate(b, a, 1 - torch.tensor([weight]), spherical)
    assert torch.allclose(joined(there)[1:2], joined(back), atol=1e-5)


@settings(max_examples=30)
@given(seed=NUMBERS, weight=st.floats(0, 1), length=st.floats(0.1, 10))
def test_an_arc_keeps_the_length_and_a_line_the_mean(seed: int, weight: float, length: float) -> None:
    a, b = draw(1, seed), draw(1, seed + 1)
    a, b = ([z * length / joined(latents).norm() for z in latents] for latents in (a, b))
    weights = torch.tensor([weight], dtype=torch.float64)
    arc, line = (joined(interpolate(a, b, weights, spherical)) for spherical in (True, False))
    assert torch.allclose(arc.norm(), torch.tensor(length, dtype=torch.float64), rtol=1e-6)
    assert torch.allclose(line, (1 - weight) * joined(a) + weight * joined(b), atol=1e-9)


@settings(max_examples=20)
@given(seed=NUMBERS, factor=st.sampled_from([0.0, -1.0, 1.0, 2.5]))
def test_without_one_arc_the_way_is_straight(seed: int, factor: float) -> None:
    a = draw(1, seed)
    b, weights = [factor * z for z in a], torch.tensor([0.25, 0.75])
    pairs = zip(interpolate(a, b, weights, True), interpolate(a, b, weights, False), strict=True)
    assert all(torch.equal(arc, line) for arc, line in pairs)


@settings(max_examples=20)
@given(seed=NUMBERS, first=st.integers(0, 2))
def test_levels_are_kept_from_one_on_and_fresh_below(seed: int, first: int) -> None:
    kept, fresh = draw(2, seed), draw(2, seed + 1)
    for level, z in enumerate(keep_levels(kept, fresh, first)):
        assert torch.equal(z, kept[level] if level >= first else fresh[level])
    with pytest.raises(ValueError, match="levels from 3 on, of 2"):
        keep_levels(kept, fresh, 3)
