"""torch's profiler over a few steps, when asked: RUN/traces/step-N.json for Perfetto, and what took longest as text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch.profiler import ProfilerActivity, profile, schedule

from pipeline.scratch import scratch
from pipeline.storage import Storage
from pipeline.tracking import Tracker
from pipeline.world import World

ROWS = 30
"""Lines of the table."""


@contextmanager
def traced(
    steps: int, run: Storage, world: World, tracker: Tracker, step: Callable[[], int]
) -> Iterator[Callable[[], None]]:
    """Give a function to call after every step; after two steps so many are traced, on rank 0, once.

    `step` tells how many steps the run has taken, for the name of the file.
    """
    if not steps or world.rank:
        yield lambda: None
        return

    def write(found: profile) -> None:
        name = f"traces/step-{step():08d}"
        with scratch() as folder:
            path = folder / "trace.json"
            found.export_chrome_trace(str(path))
            run.upload(path, f"{name}.json")
        run.write(f"{name}.txt", found.key_averages().table(sort_by=longest, row_limit=ROWS).encode())
        tracker.artifact(f"{name}.txt")

    cuda = world.device.type == "cuda"
    longest = "self_device_time_total" if cuda else "self_cpu_time_total"
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    plan = schedule(wait=1, warmup=1, active=steps, repeat=1)
    with profile(activities=kinds, schedule=plan, on_trace_ready=write) as profiler:
        yield profiler.step
