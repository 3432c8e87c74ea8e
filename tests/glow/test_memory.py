"""The anchored chain: what it keeps, what it evaluates, when gradients leave, and what it refuses."""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from glow import ActNorm, Bijection, Chain, DenseMixing, Glow, GlowConfig
from glow.conditioner import ConvConditioner
from tests.glow.deep import three_steps
from tests.glow.table import ROWS, Row, perturbed
from tests.glow.test_gradients import distance, gradients, objective, stack, worst
from tests.reliability import measured

STEPS = (2, 8, 32)


@dataclass
class Saved:
    """Bytes autograd saved: of every tensor as if it stood alone, and of the storages that hold them."""

    naive: int = 0
    storages: dict[int, int] = field(default_factory=dict)

    @property
    def unique(self) -> int:
        return sum(self.storages.values())


@contextmanager
def counting_saved() -> Iterator[Saved]:
    """Count what autograd saves for backward."""
    saved, alive = Saved(), []

    def pack(tensor: Tensor) -> Tensor:
        saved.naive += tensor.numel() * tensor.element_size()
        saved.storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        alive.append(tensor)  # or its address could be given out again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved
    alive.clear()


def tensor_bytes() -> int:
    """Bytes of all tensors Python can see: nothing may hide beside the saved ones."""
    gc.collect()
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in gc.get_objects()
        if issubclass(type(t), Tensor) and not isinstance(t, nn.Parameter)
    }
    return sum(storages.values())


def saved_by(chain: Chain, x: Tensor, condition: Tensor | None = None) -> tuple[int, int, int]:
    """(naive bytes, unique bytes, bytes alive in Python) that forward leaves for backward."""
    before = tensor_bytes()
    with counting_saved() as saved:
        y, log_det = chain(x, condition)
        outputs = y.untyped_storage().nbytes() + log_det.untyped_storage().nbytes()
    alive = tensor_bytes() - before - outputs
    return saved.naive, saved.unique, alive


@pytest.mark.parametrize("coupling", ["additive", "affine"])
@pytest.mark.parametrize("condition", [0, 3])
def test_pure_inversion_saves_the_same_for_any_number_of_steps(coupling: str, condition: int) -> None:
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    c = torch.randn(2, condition, requires_grad=True) if condition else None
    found = set()
    for steps in STEPS:
        chain = stack(steps, torch.float32, condition=condition, coupling=coupling)
        chain.anchor_every = steps
        found.add(saved_by(chain, x, c))
    most_over_least = max(found)[1] / min(found)[1]
    measured("R22", "bytes saved for backward by 2, 8 and 32 steps: most over least", most_over_least, "times")
    assert len(found) == 1
    naive, unique, _ = found.pop()
    kept = 2 * x.untyped_storage().nbytes() + (0 if c is None else c.untyped_storage().nbytes())
    assert naive == unique == kept


def test_a_model_saves_the_same_for_any_number_of_steps() -> None:
    found = set()
    for steps in STEPS:
        glow = Glow(GlowConfig(size=16, channels=3, levels=3, steps=steps, width=8, classes=2))
        glow.set_anchors([steps])
        with counting_saved() as saved:
            loss = glow.log_prob(torch.rand(2, 3, 16, 16) - 0.5, torch.tensor([0, 1])).mean()
        found.add((saved.naive, saved.unique))
        loss.backward()
    assert len(found) == 1


def test_plain_autograd_saves_in_proportion_to_steps() -> None:
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    few, many = (saved_by(stack(steps, torch.float32), x)[1] for steps in (8, 32))
    assert many > 3.9 * few


@pytest.mark.parametrize("every", [1, 2, 4])
def test_anchors_cost_one_state_each(every: int) -> None:
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    chain = stack(8, torch.float32)
    chain.anchor_every = every
    assert saved_by(chain, x)[1] == (8 // every + 1) * x.untyped_storage().nbytes()


@pytest.mark.parametrize("every", [1, 3, 8])
def test_backward_evaluates_every_conditioner_once(every: int) -> None:
    chain = stack(8)
    chain.anchor_every = every
    calls: list[nn.Module] = []
    for module in chain.modules():
        if isinstance(module, ConvConditioner):
            module.register_forward_hook(lambda module, _in, _out: calls.append(module))
    loss = objective(*chain(torch.randn(2, 4, 4, 4, dtype=torch.float64)))
    forward = list(calls)
    assert len(forward) == len(set(map(id, forward))) == 8
    calls.clear()
    loss.backward()
    assert list(map(id, calls)) == list(map(id, reversed(forward)))


def test_gradients_leave_while_backward_proceeds() -> None:
    """The last step's gradients are there before the step before it is even evaluated: reductions can overlap."""
    chain = stack(6)
    chain.anchor_every = 6
    happened: list[int] = []
    for index, step in enumerate(chain):
        for parameter in step.parameters():
            parameter.register_post_accumulate_grad_hook(lambda _, index=index: happened.append(index))
    evaluated: list[tuple[int, int]] = []
    loss = objective(*chain(torch.randn(2, 4, 4, 4, dtype=torch.float64)))
    for index, step in enumerate(chain):
        step.coupling.conditioner.register_forward_hook(
            lambda *_, index=index: evaluated.append((index, len(happened)))
        )
    loss.backward()
    each = len(list(next(iter(chain)).parameters()))
    assert happened == [index for index in reversed(range(6)) for _ in range(each)]
    assert evaluated == [(index, (5 - index) * each) for index in reversed(range(6))]


def test_the_last_levels_gradients_leave_first() -> None:
    """Levels near the top hold most of the bytes: they are on their way before the first level is evaluated again."""
    glow = Glow(GlowConfig(size=16, channels=3, levels=3, steps=2, width=8, classes=-1, attributes=-1))
    glow.set_anchors([2])
    happened: list[int] = []
    for index, level in enumerate(glow):
        for parameter in level.parameters():
            parameter.register_post_accumulate_grad_hook(lambda _, index=index: happened.append(index))
    evaluated: list[tuple[int, int]] = []
    loss = glow.log_prob(torch.rand(2, 3, 16, 16) - 0.5).mean()
    counts = [len(list(level.parameters())) for level in glow]
    for index, level in enumerate(glow):
        for step in level.steps:
            step.coupling.conditioner.register_forward_hook(
                lambda *_, index=index: evaluated.append((index, len([i for i in happened if i > index])))
            )
    loss.backward()
    assert happened == [index for index in (2, 1, 0) for _ in range(counts[index])]
    assert evaluated == [(index, sum(counts[index + 1 :])) for index in (2, 1, 0) for _ in range(2)]


@pytest.mark.parametrize("wanted", [0, 3, 7])
def test_gradients_of_some_parameters_alone(wanted: int) -> None:
    """Backward may stop half-way, and a later one through the same graph is not confused by it."""
    chain = stack(8)
    x = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    some = list(list(chain)[wanted].parameters())
    plain = torch.autograd.grad(objective(*chain(x)), some)
    everything = gradients(chain, x, None)
    chain.anchor_every = 3
    loss = objective(*chain(x))
    assert worst(torch.autograd.grad(loss, some, retain_graph=True), plain) < 1e-8
    again = torch.autograd.grad(loss, list(chain.parameters()))
    assert worst(again, everything[1:]) < 1e-8
    assert chain.inversion_error is not None
    assert chain.inversion_error < 1e-9


def test_frozen_parameters_get_no_gradient_and_change_none() -> None:
    chain = stack(4)
    x = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    for parameter in next(iter(chain)).parameters():
        parameter.requires_grad_(False)
    free = [p for p in chain.parameters() if p.requires_grad]
    plain = torch.autograd.grad(objective(*chain(x)), free)
    chain.anchor_every = 4
    assert worst(torch.autograd.grad(objective(*chain(x)), free), plain) < 1e-8


def test_a_parameter_shared_by_steps_collects_all_its_gradients() -> None:
    mixing = DenseMixing(4)
    chain = Chain(mixing, ActNorm(4), Chain(mixing, ActNorm(4), mixing)).double()
    perturbed(chain)
    x = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    wanted = gradients(chain, x, None)
    chain.anchor_every = 3
    assert worst(gradients(chain, x, None), wanted) < 1e-8


def test_backward_twice_gives_the_same() -> None:
    chain = stack(5)
    chain.anchor_every = 2
    loss = objective(*chain(torch.randn(2, 4, 4, 4, dtype=torch.float64)))
    parameters = list(chain.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, parameters), strict=True):
        assert torch.equal(a, b)


def test_interleaved_passes_do_not_meet() -> None:
    chain = stack(5)
    xs = torch.randn(2, 2, 4, 4, 4, dtype=torch.float64)
    wanted = [gradients(chain, x, None) for x in xs]
    chain.anchor_every = 5
    losses = [objective(*chain(x)) for x in xs]
    for loss, truth in zip(losses, wanted, strict=True):
        assert worst(torch.autograd.grad(loss, list(chain.parameters())), truth[1:]) < 1e-8


def test_a_parameter_changed_between_forward_and_backward_is_refused() -> None:
    chain = stack(3)
    chain.anchor_every = 3
    loss = objective(*chain(torch.randn(2, 4, 4, 4, dtype=torch.float64)))
    with torch.no_grad():
        next(iter(chain)).mix.norm.bias.add_(1.0)
    with pytest.raises(RuntimeError, match="a parameter changed between forward and backward"):
        loss.backward()


def test_an_input_changed_between_forward_and_backward_is_refused() -> None:
    chain = stack(3)
    chain.anchor_every = 3
    x = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    loss = objective(*chain(x))
    x.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_second_derivatives_are_refused_rather_than_wrong() -> None:
    chain = stack(3)
    chain.anchor_every = 3
    x = torch.randn(2, 4, 4, 4, dtype=torch.float64, requires_grad=True)
    slope = torch.autograd.grad(objective(*chain(x)), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_saved_tensors_may_be_moved_elsewhere() -> None:
    chain = stack(4)
    x = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    wanted = gradients(chain, x, None)
    chain.anchor_every = 2
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().numpy().copy(), torch.from_numpy):
        assert worst(gradients(chain, x, None), wanted) < 1e-8


def test_autocast_of_forward_is_restored_in_backward() -> None:
    chain = stack(4, torch.float32)
    perturbed(chain)
    seen: list[tuple[bool, torch.dtype]] = []
    for module in chain.modules():
        if isinstance(module, ConvConditioner):
            module.register_forward_hook(
                lambda *_: seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
            )
    x = torch.randn(2, 4, 4, 4)
    wanted = bfloat16_gradients(chain, x)
    chain.anchor_every = 4
    seen.clear()
    found = bfloat16_gradients(chain, x)
    assert seen == [(True, torch.bfloat16)] * 8
    assert not torch.is_autocast_enabled("cpu")
    truth = torch.cat([g.flatten() for g in wanted])
    assert (torch.cat([g.flatten() for g in found]) - truth).norm() < 0.02 * truth.norm()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name.replace(" ", "-"))
def test_under_autocast_networks_alone_lose_precision(row: Row) -> None:
    """What a bfloat16 network says is applied, summed and undone in float32: the round trip is as good as without."""
    bijection = row.build(dtype=torch.float32)
    x, condition = row.inputs(2, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, log_det = bijection(x, condition)
        back = bijection.inverse(y, condition)
    assert y.dtype == log_det.dtype == back.dtype == torch.float32
    if "glow" not in row.name and "chain" not in row.name:  # one network's input is recovered to the last bit, not many
        assert torch.allclose(back, x, atol=1e-5)


def bfloat16_gradients(chain: Chain, x: Tensor) -> tuple[Tensor, ...]:
    """Gradients with networks in bfloat16; the stream stays float32."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, log_det = chain(x)
    assert y.dtype == log_det.dtype == torch.float32
    return torch.autograd.grad(objective(y, log_det), list(chain.parameters()))


def test_the_alarm_tells_how_far_inversion_drifts() -> None:
    """A mixing of growing condition number is planted: the recovered state leaves the kept one, and is seen to."""
    x = torch.randn(4, 4, 8, 8)
    errors = []
    for condition_number in (1.0, 1e2, 1e4):
        chain = stack(4, torch.float32, coupling="additive", mixing="dense")
        chain.anchor_every = 4
        u, _, v = torch.linalg.svd(torch.randn(4, 4))
        stretch = torch.diag(condition_number ** torch.linspace(-0.5, 0.5, 4))
        with torch.no_grad():
            list(chain)[1].mix.mixing.weight.copy_(u @ stretch @ v)
        objective(*chain(x)).backward()
        assert chain.inversion_error is not None
        errors.append(chain.inversion_error.item())
    healthy, ill, worse = errors
    assert healthy < 1e-5
    assert ill > 5 * healthy
    assert worse > 20 * ill


def test_a_model_without_inversion_reports_no_error() -> None:
    glow = Glow(GlowConfig(size=4, channels=1, levels=1, steps=2, width=4))
    glow.log_prob(torch.zeros(1, 1, 4, 4)).sum().backward()
    assert glow.inversion_error() is None
    glow.set_anchors([2])
    glow.log_prob(torch.zeros(1, 1, 4, 4)).sum().backward()
    assert glow.inversion_error() is not None


class Noisy(nn.Module):
    """A conditioner that drops half of what another says."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        return nn.functional.dropout(self.inner(x, condition))


def noisy_stack(steps: int) -> Chain:
    chain = stack(steps)
    for step in chain:
        step.coupling.conditioner = Noisy(step.coupling.conditioner)
    return chain


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@pytest.mark.parametrize("every", [1, 2, 4])
@pytest.mark.parametrize("device", DEVICES)
def test_random_numbers_of_forward_are_drawn_again_in_backward(every: int, device: str) -> None:
    """Those of the device's generator and of the CPU's, which go on as after plain autograd."""
    chain = noisy_stack(4).to(device)
    parameters = list(chain.parameters())
    x = torch.randn(2, 4, 4, 4, dtype=torch.float64).to(device)

    def seeded(anchor_every: int) -> tuple[list[Tensor], Tensor, Tensor]:
        chain.anchor_every = anchor_every
        torch.manual_seed(7)
        y, log_det = chain(x)
        found = torch.autograd.grad(y.square().sum() + log_det.sum(), parameters, allow_unused=True)
        return [g for g in found if g is not None], torch.rand(3), torch.rand(3, device=device)

    wanted, *following = seeded(0)
    found, *after = seeded(every)
    assert worst(found, wanted) < 1e-8
    assert all(torch.equal(a, b) for a, b in zip(following, after, strict=True))


def test_a_bijection_that_draws_in_both_directions_is_inverted_with_the_same_draws() -> None:
    class Shaken(Bijection):
        """Adds what the generator says."""

        def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
            return x + torch.rand_like(x), x.new_zeros(len(x))

        def inverse(self, y: Tensor, condition: Tensor | None = None) -> Tensor:
            return y - torch.rand_like(y)

    chain = Chain(ActNorm(4), Shaken(), ActNorm(4)).double()
    chain.anchor_every = 3
    objective(*chain(torch.randn(2, 4, 4, 4, dtype=torch.float64))).backward()
    assert chain.inversion_error is not None
    assert chain.inversion_error < 1e-12


def test_backward_inside_another_autocast_computes_as_forward_did() -> None:
    chain = perturbed(stack(4, torch.float32))
    x = torch.randn(2, 4, 4, 4)
    wanted = gradients(chain, x, None)
    chain.anchor_every = 4
    loss = objective(*chain(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(loss, list(chain.parameters()))
    assert distance(found, wanted[1:]) < 1e-4


@pytest.mark.nightly
def test_an_image_of_1024_pixels_trains_within_24_gib() -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
        losses, peak = fresh.submit(three_steps).result()
    assert losses[2] < losses[1] < losses[0]
    assert peak < 24
