"""RealNVP: its batch norm in training and evaluation, its inversion in backward, its shapes and conditions."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from glow import BatchNorm, Chain, RealNVP, RealNVPConfig
from glow.norm import BATCH_NORM_DECAY, BATCH_NORM_EPS
from tests.glow.pictures import toy_pictures
from tests.glow.table import channel_coupling, field_coupling, perturbed
from tests.glow.test_gradients import distance, gradients, model_gradients
from tests.glow.test_initialize import Exchange
from tests.glow.test_memory import counting_saved

CONFIG = RealNVPConfig(size=8, channels=3, levels=2, width=4, residuals=1, classes=2, attributes=3)
GIVEN = {"label": torch.tensor([0, 1, -1]), "attributes": torch.tensor([[1, -1, 0], [0, 1, 1], [0, 0, 0]])}


def model(**changes: object) -> RealNVP:
    """A float64 model away from its start."""
    torch.manual_seed(0)
    return perturbed(RealNVP(replace(CONFIG, **changes))).double()  # type: ignore[arg-type]


def images(count: int = 3, seed: int = 0, size: int = 8) -> Tensor:
    return toy_pictures(count, size, seed).double()


@pytest.mark.parametrize("zeros", [False, True])
def test_training_normalises_by_the_batch_and_evaluation_by_what_was_absorbed(zeros: bool) -> None:
    norm = BatchNorm(2, zeros=zeros).double()
    x = 3 * torch.randn(5, 4, 6, 6, dtype=torch.float64) + 1
    y, log_det = norm(x)
    phases = x.reshape(5, 2, 2, 6, 6).transpose(0, 2).flatten(1)
    seen = torch.cat([phases, torch.zeros_like(phases)], dim=1) if zeros else phases
    mean, var = seen.mean(1), seen.var(1, correction=0)
    assert norm.last is not None
    assert torch.allclose(norm.last, torch.stack([mean, var]))
    std = (var + BATCH_NORM_EPS).sqrt()
    assert torch.allclose(y, ((x.reshape(5, 2, 2, 6, 6) - mean[:, None, None]) / std[:, None, None]).reshape(x.shape))
    assert torch.allclose(log_det, -2 * 36 * std.log().sum().expand(5))
    assert torch.equal(norm.mean, torch.zeros(2, dtype=torch.float64))
    norm.absorb(norm.last)
    assert torch.allclose(norm.mean, BATCH_NORM_DECAY * mean)
    assert torch.allclose(norm.var, 1 - BATCH_NORM_DECAY * (1 - var))
    norm.absorb(torch.stack([mean, var]), share=1.0)
    assert torch.allclose(norm.eval()(x)[0], y)
    assert torch.allclose(norm.inverse(y), x)


def test_forward_and_backward_move_no_running_moment() -> None:
    flow = model()
    before = {name: buffer.clone() for name, buffer in flow.named_buffers()}
    flow.set_anchors([2])
    flow.log_prob(images(), **GIVEN).mean().backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in flow.named_buffers())
    flow.absorb(flow.moments())
    assert not any(torch.equal(buffer, before[name]) for name, buffer in flow.named_buffers())


def test_recomputing_in_backward_finds_the_moments_of_forward() -> None:
    flow = model()
    flow.set_anchors([9])
    log_prob = flow.log_prob(images(), **GIVEN)
    moments = flow.moments()
    log_prob.mean().backward()
    assert torch.allclose(flow.moments(), moments, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cut", [0, 1, 4])
def test_initialisation_fits_the_running_moments_for_any_split_over_workers(cut: int) -> None:
    parts, alone = [images(4, seed) for seed in range(4)], model(classes=0, attributes=0)
    alone.initialize(parts)
    exchange, workers = Exchange(2), [model(classes=0, attributes=0) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        shares = parts[:cut], parts[cut:]
        list(pool.map(lambda i: workers[i].initialize(shares[i], gather=exchange.gather_of(i)), range(2)))
    for worker in workers:
        assert all(torch.equal(a, b) for a, b in zip(worker.buffers(), alone.buffers(), strict=True))
    latents = torch.cat([z.flatten() for z in alone.eval().encode(torch.cat(parts))])
    assert 0.3 < latents.std() < 3


@pytest.mark.parametrize("condition", [0, 3])
@pytest.mark.parametrize("steps", [2, 8, 16])
def test_anchored_gradients_in_training_are_plain_autograds(steps: int, condition: int) -> None:
    torch.manual_seed(steps)
    kinds = (
        lambda i: field_coupling(1, odd=i % 2 == 1, condition=condition),
        lambda i: channel_coupling(4, swapped=i % 2 == 1, condition=condition),
    )
    chain = perturbed(Chain(*(kinds[i // 2 % 2](i) for i in range(steps)))).double().train()
    x = torch.randn(3, 4, 3, 4, dtype=torch.float64)
    c = torch.randn(3, condition, dtype=torch.float64) if condition else None
    wanted = gradients(chain, x, c)
    for chain.anchor_every in {1, 3, steps}:
        assert distance(gradients(chain, x, c), wanted) < 1e-8


@pytest.mark.parametrize("training", [True, False])
def test_a_whole_models_anchored_gradients_are_plain_autograds(training: bool) -> None:
    flow = model(prior="learned", condition_splits=True).train(training)
    x = images()
    wanted = model_gradients(flow, x, **GIVEN)
    for anchors in ([1], [4], [9, 2], [0, 4]):
        flow.set_anchors(anchors)
        assert distance(model_gradients(flow, x, **GIVEN), wanted) < 1e-8


def test_networks_in_bfloat16_are_inverted_to_their_own_precision() -> None:
    """The stream stays float32; the recovered half is off by what a bfloat16 network makes of its last bit."""
    flow = model(classes=0, attributes=0).float()
    x = images().float()

    def found(anchors: int) -> list[Tensor]:
        flow.set_anchors([anchors])
        with torch.autocast("cpu", torch.bfloat16):
            log_prob = flow.log_prob(x)
        assert log_prob.dtype == torch.float32
        return list(torch.autograd.grad(log_prob.mean(), list(flow.parameters())))

    wanted = found(0)
    for anchors in (1, 9):
        assert distance(found(anchors), wanted) < 0.05
        error = flow.inversion_error()
        assert error is not None
        assert error < 0.05


def test_inversion_saves_two_vectors_a_coupling_and_no_map() -> None:
    def saved(steps: int) -> int:
        chain = Chain(*(field_coupling(3, odd=i % 2 == 1) for i in range(steps)))
        chain.anchor_every = steps
        x = torch.randn(2, 12, 8, 8)
        parameters = {p.untyped_storage().data_ptr() for p in chain.parameters()}
        with counting_saved() as found:
            y, log_det = chain(x)
        del y, log_det
        return sum(size for at, size in found.storages.items() if at not in parameters)

    assert saved(16) - saved(8) == 8 * (2 * 3 * 4)


def test_float32_gradients_of_a_trained_model() -> None:
    torch.manual_seed(0)
    flow = RealNVP(RealNVPConfig(size=16, channels=3, levels=2, width=8, residuals=1))
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3)
    losses: list[float] = []
    for step in range(40):
        loss = -flow.log_prob(toy_pictures(8, 16, seed=step)).mean() / flow.dims
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        flow.absorb(flow.moments())
    assert losses[-1] < losses[0] - 0.5
    x = toy_pictures(8, 16, seed=1000)
    wanted = model_gradients(flow, x)
    for every in (2, 9):
        flow.set_anchors([every])
        assert distance(model_gradients(flow, x), wanted) < 1e-4
    flow.eval()
    assert -flow.log_prob(x).mean() / flow.dims < losses[0] - 0.5
    assert (flow.decode(flow.encode(x)) - x).abs().max() < 1e-4
    assert ((flow.sample(4, temperature=0.5) + 0.5).abs() < 2).all()


def test_latents_hold_every_dimension() -> None:
    flow = model(size=32, levels=4)
    assert flow.latent_shapes() == [(6, 16, 16), (12, 8, 8), (24, 4, 4), (96, 2, 2)]
    assert sum(c * h * w for c, h, w in flow.latent_shapes()) == flow.dims


def test_widths_double_with_every_scale_and_over_channels() -> None:
    """Released code: base width 32 at 64 px has 32, 64, ... 512 in checkerboards, twice that over channels."""
    flow = RealNVP(RealNVPConfig(size=16, channels=3, levels=3, width=8, residuals=1))
    widths = {name: len(p) for name, p in flow.named_parameters() if name.endswith("net.first.direction")}
    assert [widths[f"levels.{i}.steps.fields_0.conditioner.net.first.direction"] for i in range(3)] == [8, 16, 32]
    assert [widths[f"levels.{i}.steps.channels_0.conditioner.net.first.direction"] for i in range(2)] == [16, 32]


@pytest.mark.parametrize("prior", ["standard", "learned"])
def test_a_condition_starts_without_effect_and_may_have_one(prior: str) -> None:
    torch.manual_seed(0)
    flow = RealNVP(replace(CONFIG, prior=prior)).double().eval()  # type: ignore[arg-type]
    x = images()
    assert torch.allclose(flow.log_prob(x, **GIVEN), flow.log_prob(x))
    flow = model(prior=prior).eval()
    moved = flow.log_prob(x, **GIVEN) != flow.log_prob(x)
    assert moved.tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"size": 12, "levels": 3}, "not divisible"),
        ({"residuals": 0}, "residuals"),
        ({"constraint": 1.0}, "constraint"),
        ({"condition_steps": False}, "must enter"),
        ({"size": 0}, "size and channels"),
    ],
)
def test_impossible_models_are_refused(changes: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        RealNVP(replace(CONFIG, **changes))  # type: ignore[arg-type]
