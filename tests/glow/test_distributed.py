"""The anchored chain under DistributedDataParallel: two processes' gradients are the mean of plain autograd's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, multiprocessing

from tests.glow.two_processes import CONFIGS, gradients_of_rank, likelihood, rows


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes found for every family, by pure inversion."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(gradients_of_rank, args=(2, folder, 9), nprocs=2)
    return folder


@pytest.mark.parametrize("family", CONFIGS)
def test_two_processes_give_the_mean_of_their_rows_gradients(written: Path, family: str) -> None:
    """A RealNVP's moments are those of a process's own rows and stay with it."""
    gradients: list[list[Tensor]] = []
    moments: list[Tensor] = []
    for rank in range(2):
        model = likelihood(family, anchors=0)
        gradients.append(list(torch.autograd.grad(model(*rows(rank, 2)), list(model.parameters()))))
        moments.append(model.flow.moments())
    for rank in range(2):
        found = torch.load(written / f"{family}-{rank}.pt", weights_only=True)
        for ours, *theirs in zip(found["gradients"], *gradients, strict=True):
            assert torch.allclose(ours, sum(theirs) / 2, rtol=1e-9, atol=1e-11)
        assert torch.allclose(found["moments"], moments[rank], rtol=1e-12, atol=1e-12)
