"""The seven laws every bijection signs (`glow/bijection.py`), over the table of constructors."""

from __future__ import annotations

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glow import Bijection
from tests.glow.heatmaps import checked_jacobian, jacobian
from tests.glow.table import ROWS, Row

TIGHT = 1e-9
"""Float64 through a few layers of condition number up to 1e3."""

rows = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name.replace(" ", "-"))
few = settings(max_examples=4, deadline=None)
seeds = st.integers(0, 2**31 - 1)


class Inverse(torch.nn.Module):
    """The inverse of a bijection as a function."""

    def __init__(self, bijection: Bijection) -> None:
        super().__init__()
        self.bijection = bijection

    def forward(self, y: Tensor, condition: Tensor | None = None) -> Tensor:
        return self.bijection.inverse(y, condition)


def assert_round_trip(found: Tensor, wanted: Tensor, through: Tensor) -> None:
    """Equal up to rounding of the largest number met: an affine inverse may reach 1e6."""
    reach = max(1.0, through.abs().max().item(), wanted.abs().max().item())
    assert torch.allclose(found, wanted, rtol=0, atol=TIGHT * reach)


@rows
@few
@given(seed=seeds, batch=st.integers(1, 3))
def test_inverse_undoes_forward(row: Row, seed: int, batch: int) -> None:
    bijection = row.build(seed)
    x, condition = row.inputs(batch, seed)
    y, log_det = bijection(x, condition)
    assert log_det.shape == (batch,)
    assert log_det.dtype == x.dtype
    assert_round_trip(bijection.inverse(y, condition), x, through=y)


@rows
@few
@given(seed=seeds, batch=st.integers(1, 3))
def test_forward_undoes_inverse(row: Row, seed: int, batch: int) -> None:
    bijection = row.build(seed)
    x, condition = row.inputs(batch, seed)
    y = torch.randn_like(bijection(x, condition)[0])
    x = bijection.inverse(y, condition)
    assert_round_trip(bijection(x, condition)[0], y, through=x)


@rows
def test_log_det_is_that_of_the_jacobian(row: Row) -> None:
    bijection = row.build()
    x, condition = row.inputs(1)
    exact = torch.linalg.slogdet(jacobian(bijection, x, condition)).logabsdet
    assert bijection(x, condition)[1].item() == pytest.approx(exact.item(), abs=TIGHT)


@rows
def test_samples_of_a_batch_do_not_see_each_other(row: Row) -> None:
    bijection = row.build().eval()
    x, condition = row.inputs(3)
    x.requires_grad_()
    y, log_det = bijection(x, condition)
    for i in range(3):
        alone, alone_log_det = bijection(x[i : i + 1], None if condition is None else condition[i : i + 1])
        assert torch.allclose(alone[0], y[i], rtol=1e-12, atol=1e-12)
        assert torch.allclose(alone_log_det[0], log_det[i], rtol=1e-12, atol=1e-12)
        seen = torch.autograd.grad(y[i].sum() + log_det[i], x, retain_graph=True)[0]
        assert not seen[[j for j in range(3) if j != i]].any()


@rows
def test_a_state_dict_round_trip_changes_nothing(row: Row) -> None:
    bijection, other = row.build(seed=0), row.build(seed=1)
    x, condition = row.inputs(2)
    file = io.BytesIO()
    torch.save(bijection.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for before, after in zip(bijection(x, condition), other(x, condition), strict=True):
        assert torch.equal(before, after)
    y = torch.randn_like(bijection(x, condition)[0])
    assert torch.equal(bijection.inverse(y, condition), other.inverse(y, condition))


@rows
def test_the_inverse_has_the_inverse_determinant(row: Row) -> None:
    bijection = row.build()
    x, condition = row.inputs(1)
    y, log_det = bijection(x, condition)
    back = torch.linalg.slogdet(jacobian(Inverse(bijection), y.detach(), condition)).logabsdet
    assert back.item() == pytest.approx(-log_det.item(), abs=TIGHT)


@rows
def test_the_jacobian_has_its_declared_pattern(row: Row) -> None:
    checked_jacobian(row)
