"""What a run costs while it runs: images a second, waiting for data, utilisation, memory, time to go."""

from __future__ import annotations

import resource
import time
from collections.abc import Generator, Iterator
from contextlib import closing

import torch

from glow import GlowConfig
from glow.flops import peak_tflops, step_flops
from pipeline.config import TrainConfig
from pipeline.stream import Batch
from pipeline.world import World


class Pace:
    """How fast images go by, how much of that is waiting for data, and when the last one is due.

    `config` is resolved; a run goes on from `images`. Rank 0's memory and waiting stand for all ranks'.
    """

    def __init__(self, config: TrainConfig, world: World, images: int) -> None:
        self._device, self._total, self._images = world.device, config.schedule.images, images
        self._since, self._waited = time.monotonic(), 0.0
        self._full_speed, self.unknown = full_speed(config, world)
        """Images a second at full utilisation; None for the reason in `unknown`."""

    def timed(self, batches: Generator[Batch]) -> Iterator[Batch]:
        """The same batches; time spent waiting for them is counted."""
        with closing(batches):
            while True:
                start = time.monotonic()
                batch = next(batches, None)
                self._waited += time.monotonic() - start
                if batch is None:
                    return
                yield batch

    def figures(self, images: int) -> dict[str, float]:
        """Since the last call: images a second, share of time waiting for data; seconds to go; the peak of memory."""
        spent = max(time.monotonic() - self._since, 1e-9)
        speed, wait = (images - self._images) / spent, 100 * self._waited / spent
        self._images, self._since, self._waited = images, time.monotonic(), 0.0
        figures = {"perf/images_per_s": speed, "perf/data_wait_pct": wait}
        figures["perf/peak_gb"] = peak_bytes(self._device) / 1e9
        if speed:
            figures["perf/eta_s"] = max(0, self._total - images) / speed
        return figures | ({"perf/mfu": speed / self._full_speed} if self._full_speed else {})


def full_speed(config: TrainConfig, world: World) -> tuple[float | None, str]:
    """(images a second if every device did all it can, "") or (None, why that is not known); never a guess."""
    if not isinstance(config.model, GlowConfig):
        return None, "a RealNVP's multiply-adds are not counted"
    peak = config.cluster.peak_tflops
    if not peak and world.device.type != "cuda":
        return None, "a CPU's peak is not known; --cluster.peak-tflops says it"
    name = "" if peak else torch.cuda.get_device_name(world.device)
    peak = peak or peak_tflops(name, config.memory.nets == "bfloat16")
    if peak is None:
        return None, f"the peak of {name} is not in glow/flops.py; --cluster.peak-tflops says it"
    return world.size * peak * 1e12 / step_flops(config.model, 1), ""


def peak_bytes(device: torch.device) -> int:
    """The most memory this process has had so far: of its GPU, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
