"""The anchored chain under DistributedDataParallel: two processes' gradients are one process's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import multiprocessing

from tests.glow.two_processes import Likelihood, batch, gradients_of_rank, model


@pytest.mark.parametrize("anchors", [3])
def test_two_processes_give_one_processes_gradients(tmp_path: Path, anchors: int) -> None:
    likelihood = Likelihood(model(0))
    likelihood(*batch()).backward()
    wanted = [p.grad for p in likelihood.parameters()]
    multiprocessing.spawn(gradients_of_rank, args=(2, tmp_path, anchors), nprocs=2)
    for rank in range(2):
        found = torch.load(tmp_path / f"gradients-{rank}.pt", weights_only=True)
        for a, b in zip(found, wanted, strict=True):
            assert b is not None
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-11)
