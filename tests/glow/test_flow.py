"""The model: its likelihood is one, its terms add up, its latents are standard, its refusals say why."""

from __future__ import annotations

import math
from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glow import Chain, Glow, GlowConfig, bits_per_dim
from glow.level import Step
from glow.prior import standard_normal_log_prob
from tests.glow.pictures import toy_pictures
from tests.glow.table import perturbed, step_config


def small(**changes: object) -> Glow:
    """A small model away from its start."""
    torch.manual_seed(0)
    config = {"size": 8, "channels": 1, "levels": 2, "steps": 2, "width": 8, **changes}
    return perturbed(Glow(GlowConfig(**config)))  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("coupling", ["additive", "affine"])
def test_the_density_of_a_plane_integrates_to_one(coupling: str) -> None:
    """Six steps over two values, integrated on a grid over all the plane that ever gets a sample."""
    torch.manual_seed(3)
    chain = perturbed(Chain(*(Step(2, step_config(coupling=coupling, width=8)) for _ in range(6)))).double()
    with torch.no_grad():
        samples = chain.inverse(torch.randn(50_000, 2, 1, 1, dtype=torch.float64)).flatten(1)
        reach = 1.2 * samples.abs().amax(0)
        sides = [torch.linspace(-r, r, 400, dtype=torch.float64) for r in reach.tolist()]
        z, log_det = chain(torch.cartesian_prod(*sides)[:, :, None, None])
    cell = (2 * reach / 399).prod()
    assert ((standard_normal_log_prob(z) + log_det).exp().sum() * cell).item() == pytest.approx(1, abs=0.01)


def test_the_density_of_a_whole_model_integrates_to_one() -> None:
    """Four pixels, conditioned; integrated with quasi-random points of a wider density."""
    glow = small(size=2, levels=1, steps=4, classes=2, condition_steps=True).double()
    assert glow.dims == 4
    label = torch.ones(2**13, dtype=torch.long)
    points = torch.quasirandom.SobolEngine(4, scramble=True, seed=0).draw(2**13, dtype=torch.float64)
    z = torch.special.ndtri(points.clamp(1e-12, 1 - 1e-12))
    with torch.no_grad():
        samples = glow.sample(2**13, label=label).flatten(1)
        spread = 1.4 * torch.linalg.cholesky(torch.cov(samples.T))
        x = samples.mean(0) + z @ spread.T
        log_prob = glow.log_prob(x.view(-1, 1, 2, 2), label)
    proposal = standard_normal_log_prob(z) - spread.diagonal().log().sum()
    assert (log_prob - proposal).exp().mean().item() == pytest.approx(1, abs=0.01)


def test_samples_follow_the_density() -> None:
    """As many samples fall into a box as the density's integral over it says."""
    glow = small(size=2, levels=1, steps=3).double()
    count = 40_000
    with torch.no_grad():
        samples = glow.sample(count, generator=torch.Generator().manual_seed(0)).flatten(1)
        centre, side = samples.mean(0), 1.4 * samples.std(0)
        points = torch.quasirandom.SobolEngine(4, scramble=True, seed=0).draw(2**13, dtype=torch.float64)
        density = glow.log_prob((centre + (points - 0.5) * side).view(-1, 1, 2, 2)).exp()
    wanted = (density.mean() * side.prod()).item()
    found = ((samples - centre).abs() < side / 2).all(1).double().mean().item()
    assert found == pytest.approx(wanted, abs=4 * math.sqrt(wanted * (1 - wanted) / count))
    assert wanted > 0.02


def test_terms_add_up() -> None:
    glow = small(levels=2)
    terms = glow.terms(toy_pictures(3, 8, 0, channels=1))
    assert len(terms.priors) == 2
    assert torch.allclose(terms.log_prob, terms.log_det + sum(terms.priors), rtol=1e-6)
    assert terms.log_prob.shape == terms.log_det.shape == terms.priors[0].shape == (3,)


@settings(max_examples=12, deadline=None)
@given(levels=st.integers(1, 3), channels=st.integers(1, 3), multiple=st.integers(1, 3))
def test_latents_hold_every_dimension(levels: int, channels: int, multiple: int) -> None:
    size = multiple * 2**levels
    glow = Glow(GlowConfig(size=size, channels=channels, levels=levels, steps=1, width=4))
    shapes = glow.latent_shapes()
    assert sum(math.prod(shape) for shape in shapes) == glow.dims == channels * size**2
    x = torch.rand(2, channels, size, size) - 0.5
    latents = glow.encode(x)
    assert [tuple(z.shape[1:]) for z in latents] == shapes
    assert torch.allclose(glow.decode(latents), x, atol=1e-5)


def test_shapes_of_the_papers_model() -> None:
    with torch.device("meta"):
        config = GlowConfig(size=256, channels=3, levels=6, steps=1, width=4, mixing="reverse")
        shapes = Glow(config).latent_shapes()
    assert shapes == [(6, 128, 128), (12, 64, 64), (24, 32, 32), (48, 16, 16), (96, 8, 8), (384, 4, 4)]
    assert sum(math.prod(shape) for shape in shapes) == 196_608


def test_a_new_model_is_a_rotated_standard_normal() -> None:
    """Zero-initialised networks: log_det 0, latents as long as the data."""
    glow = Glow(GlowConfig(size=8, channels=3, levels=2, steps=3, width=8, coupling="additive")).double()
    x = toy_pictures(4, 8, 0).double()
    terms = glow.terms(x)
    assert torch.allclose(terms.log_det, torch.zeros(4, dtype=torch.float64), atol=1e-4)
    assert torch.allclose(terms.log_prob, standard_normal_log_prob(x), atol=1e-4)


def test_training_lowers_bits_per_dim() -> None:
    torch.manual_seed(0)
    glow = Glow(GlowConfig(size=8, channels=3, levels=2, steps=3, width=16))
    glow.initialize([toy_pictures(64, 8, 0)])
    optimizer = torch.optim.Adam(glow.parameters(), lr=2e-3)
    held_out = toy_pictures(64, 8, 10**6)

    def evaluate() -> float:
        with torch.no_grad():
            return bits_per_dim(glow.log_prob(held_out), glow.dims, 5).mean().item()

    before = evaluate()
    for step in range(60):
        optimizer.zero_grad()
        (-glow.log_prob(toy_pictures(16, 8, 1 + step)).mean() / glow.dims).backward()
        optimizer.step()
    assert evaluate() < before - 0.3


def test_sampling_is_reproducible_and_scaled_by_temperature() -> None:
    glow = small()

    def draw(temperature: float | list[float]) -> Tensor:
        return glow.sample(3, temperature=temperature, generator=torch.Generator().manual_seed(1))

    assert torch.equal(draw(0.7), draw(0.7))
    assert torch.equal(draw(0.7), draw([0.7, 0.7]))
    assert not torch.equal(draw(0.7), draw([0.7, 0.6]))
    cold = draw(0.0)
    assert torch.equal(cold[0], cold[1])
    with pytest.raises(ValueError, match="3 temperatures for 2 levels"):
        draw([1.0, 1.0, 1.0])


@pytest.mark.parametrize("where", ["condition_splits", "condition_steps"])
def test_conditions_enter_where_they_are_asked_for(where: str) -> None:
    glow = small(classes=2, attributes=3, **{where: True})
    x = toy_pictures(2, 8, 0, channels=1)
    attributes = torch.tensor([[1, -1, 0], [0, 0, 0]], dtype=torch.int8)
    label = torch.tensor([1, -1])
    given = glow.terms(x, label, attributes)
    unknown = glow.terms(x)
    assert given.log_prob[0] != unknown.log_prob[0]
    assert torch.allclose(given.log_prob[1], unknown.log_prob[1], rtol=1e-6)
    assert (given.priors[0][0] != unknown.priors[0][0]).item()
    assert (given.log_det[0] != unknown.log_det[0]).item() == (where == "condition_steps")


def test_a_condition_starts_without_effect() -> None:
    torch.manual_seed(0)
    config = GlowConfig(size=4, channels=1, levels=1, steps=2, width=4, attributes=2, condition_steps=True)
    glow = Glow(config)
    x = torch.rand(2, 1, 4, 4) - 0.5
    assert torch.equal(glow.log_prob(x), glow.log_prob(x, None, torch.ones(2, 2)))


def test_the_condition_vector() -> None:
    glow = small(classes=3, attributes=2)
    like = torch.zeros(1)
    found = glow.condition(2, torch.tensor([2, -1]), torch.tensor([[1, -1], [0, 1]], dtype=torch.int8), like)
    assert found is not None
    assert found.tolist() == [[0, 0, 1, 1, -1], [0, 0, 0, 0, 1]]
    assert glow.condition(1, None, None, like).tolist() == [[0] * 5]  # type: ignore[union-attr]
    assert small(classes=-1, attributes=-1).condition(2, None, None, like) is None


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"size": 12, "levels": 3}, "size 12 is not divisible by 2\\^3"),
        ({"size": 0}, "must be given"),
        ({"channels": 0}, "must be given"),
        ({"levels": 0}, "1 or more"),
        ({"steps": 0}, "1 or more"),
        ({"width": 0}, "1 or more"),
        ({"dequantizer_steps": 0}, "1 or more"),
        ({"classifier_weight": 0.01}, "wants classes"),
        ({"classifier_weight": -1.0, "classes": 2}, "0 or more"),
    ],
)
def test_impossible_models_are_refused(changes: dict[str, float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        small(**changes)


def test_wrong_inputs_are_refused() -> None:
    glow = small(classes=2, attributes=3)
    x = torch.zeros(2, 1, 8, 8)
    with pytest.raises(ValueError, match=r"images of shape \(3, 8, 8\)"):
        glow.log_prob(torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"images of shape \(1, 16, 16\)"):
        glow.encode(torch.zeros(2, 1, 16, 16))
    with pytest.raises(ValueError, match="latents of shapes"):
        glow.decode([torch.zeros(2, 2, 4, 4), torch.zeros(2, 8, 4, 4)])
    for label, attributes in (
        (torch.zeros(3, dtype=torch.long), None),
        (None, torch.zeros(2, 4)),
        (None, torch.zeros(3, 3)),
        (None, torch.zeros(3)),
    ):
        with pytest.raises(ValueError, match="condition of shapes"):
            glow.log_prob(x, label, attributes)
    for values in ([0, 2], [-2, 0]):
        with pytest.raises(ValueError, match=r"labels of 2 classes are -1 \(unknown\) to 1, not"):
            glow.log_prob(x, torch.tensor(values))
    with pytest.raises(ValueError, match="attributes are -1, 0"):
        glow.log_prob(x, None, torch.full((2, 3), 2.0))
    bare = small()
    with pytest.raises(ValueError, match="knows no classes"):
        bare.log_prob(x, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="condition of shapes"):
        bare.log_prob(x, None, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="no posterior"):
        bare.posterior(x)
    for prior in (torch.ones(3), torch.tensor([1.0, -1.0])):
        with pytest.raises(ValueError, match="one probability each"):
            glow.posterior(x, prior=prior)


def planted() -> tuple[Glow, float]:
    """A model whose classes differ by the mean of one top channel alone, and by how much."""
    glow = Glow(GlowConfig(size=4, channels=1, levels=1, steps=1, width=4, classes=3)).double()
    shift = 0.5
    linear = next(iter(glow)).prior.condition
    assert linear is not None
    with torch.no_grad():
        linear.weight[0] = shift * torch.tensor([-1.0, 0.0, 1.0])
    return glow, shift


def test_the_posterior_is_bayes() -> None:
    """Three Gaussians with means -d, 0, d in 4 values: the posterior is the softmax of n (m z - m^2 / 2)."""
    glow, shift = planted()
    x = torch.randn(7, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    means = shift * torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    with torch.no_grad():
        seen = glow.encode(x)[0][:, 0].sum((1, 2))
    evidence = seen[:, None] * means - 2 * means.square()
    for prior in (None, torch.tensor([0.2, 0.7, 0.1])):
        beforehand = torch.ones(3) if prior is None else prior
        wanted = torch.softmax(evidence + beforehand.double().log(), dim=1)
        for chunk in (2, 32):
            assert torch.allclose(glow.posterior(x, prior=prior, chunk=chunk), wanted, atol=1e-6)
    assert glow.posterior(x[:0]).shape == (0, 3)


def test_the_posterior_finds_the_class_of_samples() -> None:
    glow, _ = planted()
    next(iter(glow)).prior.condition.weight.data[0] *= 6  # type: ignore[union-attr]
    label = torch.arange(3).repeat(20)
    x = glow.sample(60, label=label, generator=torch.Generator().manual_seed(0))
    assert (glow.posterior(x).argmax(1) == label).double().mean() > 0.9


def test_the_classifier_reads_the_mean_of_the_top_latent() -> None:
    glow = small(classes=3, classifier_weight=0.01, levels=1)
    assert glow.classifier is not None
    x = toy_pictures(4, 8, 0, channels=1)
    terms = glow.terms(x)
    top, _ = next(iter(glow)).steps(next(iter(glow)).squeeze(x)[0])
    assert terms.logits is not None
    assert torch.allclose(terms.logits, glow.classifier(top.mean((2, 3))), atol=1e-5)
    assert small(classes=3).terms(x).logits is None


def test_options_that_came_later_change_no_digest_of_an_older_model() -> None:
    assert set(GlowConfig().settings()) & set(GlowConfig.later) == set()
    assert GlowConfig(clamp="soft_exp").settings()["clamp"] == "soft_exp"
    assert set(GlowConfig.later) < set(asdict(GlowConfig()))


def test_anchors_are_set_a_level() -> None:
    glow = small(levels=3)
    glow.set_anchors([4, 0])
    assert [level.steps.anchor_every for level in glow] == [4, 0, 0]
    for refused in ([], [-1], [2, -2]):
        with pytest.raises(ValueError, match="anchor_every needs values"):
            glow.set_anchors(refused)


def test_an_odd_coupling_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot halve 3"):
        Step(3, step_config())
