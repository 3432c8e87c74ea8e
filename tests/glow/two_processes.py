"""Runs a gradient computation under DistributedDataParallel in two gloo processes; importable by what it spawns."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from glow import Glow, GlowConfig

CONFIG = GlowConfig(size=8, channels=1, levels=2, steps=3, width=6, classes=2, condition_splits=True)


def model(anchors: int) -> Glow:
    """The same small model in every process."""
    torch.manual_seed(0)
    glow = Glow(CONFIG).double()
    with torch.no_grad():
        for parameter in glow.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    glow.set_anchors([anchors])
    return glow


def batch(count: int = 8) -> tuple[Tensor, Tensor]:
    """Images and labels of the whole batch."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(count, 1, 8, 8, generator=generator, dtype=torch.float64) - 0.5
    return x, torch.arange(count) % 2


class Likelihood(torch.nn.Module):
    """What DistributedDataParallel wraps: a forward that is the mean negative log-likelihood."""

    def __init__(self, glow: Glow) -> None:
        super().__init__()
        self.glow = glow

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return -self.glow.log_prob(x, label).mean()


def gradients_of_rank(rank: int, size: int, folder: Path, anchors: int) -> None:
    """Process `rank` of `size`: its rows of the batch, gradients averaged by DDP, written to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    try:
        parallel = DistributedDataParallel(Likelihood(model(anchors)), bucket_cap_mb=0.01)
        x, label = batch()
        rows = slice(rank * len(x) // size, (rank + 1) * len(x) // size)
        parallel(x[rows], label[rows]).backward()
        torch.save([p.grad for p in parallel.parameters()], folder / f"gradients-{rank}.pt")
    finally:
        dist.destroy_process_group()
