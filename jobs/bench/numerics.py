"""What the bench measures of numbers: how far inversion drifts in trained stacks, and what a log-determinant costs."""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from glow import Chain, DenseMixing, Glow, GlowConfig, LUMixing
from glow.coupling import CouplingKind
from jobs.bench.rows import Measurement, Row, numbers

SIZE, BATCH, WIDTH = 16, 8, 32
COUPLINGS: tuple[CouplingKind, ...] = ("additive", "affine")
FIT_FROM = 96
"""Channels from which a slope is fitted: below, a call costs more than its arithmetic."""


def drift(options: argparse.Namespace) -> Measurement:
    """Round-trip and gradient error of trained stacks."""
    depths = numbers(options.depths, "--depths")
    stacks = f"stacks of K = {', '.join(map(str, depths))} after {options.training} steps of Adam"
    return {"headline": f"{stacks}, CPU, torch {torch.__version__}"}, lambda: list(drift_rows(depths, options.training))


def drift_rows(depths: Sequence[int], training: int) -> Iterator[dict[str, Any]]:
    """Round-trip and gradient error of one-level stacks of so many steps after so many steps of Adam, by anchor.

    `round_trip`: largest |recovered - kept| at any anchor; `gradient`: |g - g0| / |g0| over all parameters, g0 by plain
    autograd in the same precision.
    """
    for coupling in COUPLINGS:
        for depth in depths:
            glow = trained(coupling, depth, training)
            for nets in (torch.float32, torch.bfloat16):
                truth = gradient_of(glow, 0, nets)[0]
                for every in dict.fromkeys((depth, 4, 1)):
                    found, error = gradient_of(glow, every, nets)
                    gradient = float((found - truth).norm() / truth.norm())
                    name = str(nets).removeprefix("torch.")
                    row = {"coupling": coupling, "K": depth, "nets": name, "n": every}
                    yield row | {"round_trip": error, "gradient": gradient}


def trained(coupling: CouplingKind, depth: int, training: int) -> Glow:
    """A stack of steps that has learned smooth pictures for a while."""
    torch.manual_seed(0)
    glow = Glow(GlowConfig(size=SIZE, channels=3, levels=1, steps=depth, width=WIDTH, coupling=coupling))
    glow.initialize([pictures(seed) for seed in range(4)])
    optimizer = torch.optim.Adam(glow.parameters(), lr=1e-3)
    for seed in range(training):
        optimizer.zero_grad()
        (-glow.log_prob(pictures(seed)).mean() / glow.dims).backward()
        optimizer.step()
    return glow


def pictures(seed: int) -> Tensor:
    """Smooth colour fields in [-1/2, 1/2) with the noise of 8-bit values, [8, 3, 16, 16]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(BATCH, 3, 4, 4, generator=generator)
    smooth = F.interpolate(coarse, SIZE, mode="bilinear")
    return smooth - 0.5 + torch.rand(smooth.shape, generator=generator) / 256


def gradient_of(glow: Glow, every: int, nets: torch.dtype) -> tuple[Tensor, float]:
    """(gradient of a held-out batch as one vector, largest inversion error; 0 where nothing is inverted)."""
    glow.set_anchors([every])
    chains = [module for module in glow.modules() if isinstance(module, Chain)]
    for chain in chains:
        chain.inversion_error = None
    glow.zero_grad()
    with torch.autocast("cpu", nets, enabled=nets != torch.float32):
        log_prob = glow.log_prob(pictures(10_000))
    log_prob.mean().backward()
    gradients = [p.grad.flatten() for p in glow.parameters() if p.grad is not None]
    error = glow.inversion_error()
    return torch.cat(gradients).clone(), 0.0 if error is None else float(error)


def log_det(options: argparse.Namespace) -> Measurement:
    """Time of log-determinants, by channels."""
    channels = numbers(options.channels, "--channels")

    def work() -> list[Row]:
        torch.set_num_threads(1)
        rows = log_det_rows(channels, options.rounds)
        slopes = {name: slope(rows, name) for name in ("dense", "lu")}
        if options.plot:
            from jobs.bench.plots import log_det_plot

            log_det_plot(Path(options.plot), rows, slopes)
        return [*rows, {"channels": f"exponent from {FIT_FROM}", **slopes}]

    return {"headline": f"log|det W| and its gradient, CPU ms, 1 thread, torch {torch.__version__}"}, work


def log_det_rows(channels: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of the log-determinant and its gradient, dense and LU, by channels."""
    rows = []
    for count in channels:
        mixings = {"dense": DenseMixing(count), "lu": LUMixing(count)}
        times: dict[str, list[float]] = {name: [] for name in mixings}
        for _ in range(rounds + 1):
            for name, mixing in mixings.items():
                times[name].append(_milliseconds(lambda mixing=mixing: mixing.log_det_per_pixel().backward()))
        rows.append({"channels": count} | {name: statistics.median(taken[1:]) for name, taken in times.items()})
    return rows


def slope(rows: Sequence[dict[str, Any]], name: str) -> float:
    """The exponent of a power law fitted to a column over channels (least squares of logarithms)."""
    points = [(math.log(row["channels"]), math.log(row[name])) for row in rows if row["channels"] >= FIT_FROM]
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def _milliseconds(work: Callable[[], object]) -> float:
    """CPU time of one call, repeated until it can be told from 0."""
    count = 1
    while True:
        start = time.process_time()
        for _ in range(count):
            work()
        spent = time.process_time() - start
        if spent > 5e-3:
            return 1e3 * spent / count
        count *= 4
