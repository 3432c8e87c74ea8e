"""`bench reduction`: what `tree` costs beside `overlap`, by whole steps of learning on real gloo workers.

Every worker holds a learner of each kind and takes their steps in turn, so that a busy machine disturbs both alike.
A step is forward and backward of every leaf, the sum over workers, Adam and the averaged weights.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Literal

import torch

from glow import Glow, GlowConfig, bits_per_dim
from jobs.bench.rows import Measurement, Row
from pipeline.config import OptimConfig
from pipeline.gradients import Gradients
from pipeline.optim import Ema, make_optimizer
from pipeline.scratch import scratch
from pipeline.world import World, barrier, joined

Reduction = Literal["overlap", "tree"]
REDUCTIONS: tuple[Reduction, ...] = ("overlap", "tree")
Times = dict[str, list[tuple[float, float]]]
"""(seconds of CPU, seconds) of every round."""


@dataclass(frozen=True, kw_only=True)
class Batching:
    """A batch, how it is cut, and who shares it."""

    batch: int
    leaf: int
    workers: int
    rounds: int


def reduction(options: argparse.Namespace) -> Measurement:
    """Time of a step of learning, tree beside overlap."""
    if options.batch % options.leaf or options.workers > options.batch // options.leaf:
        raise ValueError("--leaf divides --batch, and there are at most so many --workers as leaves")
    names = ("size", "levels", "steps", "width", "coupling")
    config = GlowConfig(channels=3, classes=-1, attributes=-1, **{name: getattr(options, name) for name in names})

    def work() -> list[Row]:
        shares = {name: getattr(options, name) for name in ("batch", "leaf", "workers", "rounds")}
        return measure_reductions(config, Batching(**shares))

    model = f"{config.size} px, L{config.levels} K{config.steps} width {config.width} {config.coupling}"
    share = f"batch {options.batch} in leaves of {options.leaf} on {options.workers} workers"
    return {"headline": f"{model}, {share}, CPU, 1 thread each, torch {torch.__version__}"}, work


def measure_reductions(config: GlowConfig, batching: Batching) -> list[Row]:
    """A row a reduction: medians over rounds, and of the ratios to `overlap` round by round."""
    context = multiprocessing.get_context("spawn")
    with (
        scratch() as folder,
        ProcessPoolExecutor(batching.workers, mp_context=context) as pool,
    ):
        store = f"file://{folder}/store"
        ranks = [pool.submit(_rank, rank, store, config, batching) for rank in range(batching.workers)]
        times = [rank.result() for rank in ranks]
    cpu = {name: [sum(seconds) for seconds in _by_round(times, name, 0)] for name in REDUCTIONS}
    wall = {name: [max(seconds) for seconds in _by_round(times, name, 1)] for name in REDUCTIONS}
    return [
        {
            "row": name,
            "step_cpu_ms": 1e3 * statistics.median(cpu[name]),
            "cpu_ratio": _ratio(cpu[name], cpu["overlap"]),
            "wall_ms": 1e3 * statistics.median(wall[name]),
            "wall_ratio": _ratio(wall[name], wall["overlap"]),
        }
        for name in REDUCTIONS
    ]


def _by_round(times: list[Times], name: str, kind: int) -> list[tuple[float, ...]]:
    return list(zip(*[[seconds[kind] for seconds in rank[name]] for rank in times], strict=True))


def _ratio(times: list[float], baseline: list[float]) -> float:
    return statistics.median(one / other for one, other in zip(times, baseline, strict=True))


def _rank(rank: int, store: str, config: GlowConfig, batching: Batching) -> Times:
    torch.set_num_threads(1)
    world = World(rank=rank, size=batching.workers, local_rank=rank)
    with joined(world, store):
        steps = {name: _step(config, batching, world, name) for name in REDUCTIONS}
        times: Times = {name: [] for name in REDUCTIONS}
        for number in range(batching.rounds + 1):
            for name in REDUCTIONS[:: 1 if number % 2 else -1]:
                barrier(world)
                start = time.process_time(), time.perf_counter()
                steps[name]()
                times[name].append((time.process_time() - start[0], time.perf_counter() - start[1]))
    return {name: found[1:] for name, found in times.items()}  # the first round does not count


def _step(config: GlowConfig, batching: Batching, world: World, reduction: Reduction) -> Callable[[], None]:
    """A step of learning on this worker's rows of a batch of noise."""
    torch.manual_seed(0)
    model, leaf = Glow(config), batching.leaf
    x = torch.rand(batching.batch, config.channels, config.size, config.size) - 0.5
    model.initialize([x])
    parameters = list(model.parameters())
    gradients = Gradients(parameters, world, batching.batch // leaf, reduction)
    optimizer, ema = make_optimizer(parameters, OptimConfig(algorithm="adam")), Ema(model, 50_000, batching.batch)

    def loss(index: int) -> torch.Tensor:
        log_prob = model.log_prob(x[index * leaf : (index + 1) * leaf])
        return bits_per_dim(log_prob, model.dims, 8).sum() / batching.batch

    def step() -> None:
        float(torch.linalg.vector_norm(gradients.of(loss)))
        optimizer.step()
        ema.update(model)

    return step
