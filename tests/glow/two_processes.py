"""Runs a gradient computation under DistributedDataParallel in two gloo processes; importable by what it spawns."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from glow import Flow, FlowConfig, GlowConfig, RealNVPConfig, make_flow
from tests.glow.table import perturbed

CONFIGS: dict[str, FlowConfig] = {
    "glow": GlowConfig(size=8, channels=1, levels=2, steps=3, width=6, classes=2, condition_splits=True),
    "realnvp": RealNVPConfig(size=8, channels=1, levels=2, width=4, residuals=1, classes=2, prior="learned"),
}
"""Models of both families; a RealNVP trains on the moments of its own rows."""


class Likelihood(torch.nn.Module):
    """What DistributedDataParallel wraps: a forward that is the mean negative log-likelihood."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return -self.flow.log_prob(x, label).mean()


def likelihood(family: str, anchors: int) -> Likelihood:
    """The same small model in every process."""
    torch.manual_seed(0)
    flow = perturbed(make_flow(CONFIGS[family])).double()
    flow.set_anchors([anchors])
    return Likelihood(flow)


def rows(rank: int, size: int, count: int = 8) -> tuple[Tensor, Tensor]:
    """Images and labels of a rank: its part of the batch."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(count, 1, 8, 8, generator=generator, dtype=torch.float64) - 0.5
    own = slice(rank * count // size, (rank + 1) * count // size)
    return x[own], (torch.arange(count) % 2)[own]


def gradients_of_rank(rank: int, size: int, folder: Path, anchors: int) -> None:
    """Process `rank` of `size`: gradients of its rows averaged by DDP, and its batch moments, written to files."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    try:
        for family in CONFIGS:
            model = likelihood(family, anchors)
            parallel = DistributedDataParallel(model, bucket_cap_mb=0.01, broadcast_buffers=False)
            parallel(*rows(rank, size)).backward()
            found = {"gradients": [p.grad for p in parallel.parameters()], "moments": model.flow.moments()}
            torch.save(found, folder / f"{family}-{rank}.pt")
    finally:
        dist.destroy_process_group()
