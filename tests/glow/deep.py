"""Trains one image of 1024 px for three steps; importable by the fresh process that is measured."""

from __future__ import annotations

import resource

import torch

from glow import Glow, GlowConfig
from tests.glow.pictures import toy_pictures


def three_steps() -> tuple[list[float], float]:
    """(bits per dim, up to a constant, before every step; the process's peak resident GiB)."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    glow = Glow(GlowConfig(size=1024, channels=3, levels=7, steps=8, width=64, classes=-1, attributes=-1))
    glow.set_anchors([8])
    x = toy_pictures(1, 1024, seed=0)
    glow.initialize([x])
    optimizer = torch.optim.Adam(glow.parameters(), lr=1e-4)  # 1e-3 without warm-up is too much for one picture
    losses: list[float] = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = -glow.log_prob(x).mean() / glow.dims
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
