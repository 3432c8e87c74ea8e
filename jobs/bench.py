"""`python -m jobs bench`: what a training step costs in time and memory, beside the plainest PyTorch.

Rows: the plain reference (`jobs/plain.py`), the same with every step checkpointed, and `glow` by anchor setting. `step`
takes all rows in turn, round after round in one process, so that a busy machine disturbs them alike; on a CPU it counts
the process's own CPU time, on a GPU device time between events. `memory` gives every row a fresh process. Needs
argparse, torch and glow alone.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from glow import Glow, GlowConfig
from jobs.plain import PlainGlow

MIB = 2**20
M_MMAP_THRESHOLD = -3
"""Of malloc.h (glibc)."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The model, the batch and the machine a measurement is of."""

    config: GlowConfig
    batch: int
    device: str
    threads: int
    channels_last: bool

    @property
    def cuda(self) -> bool:
        return self.device.startswith("cuda")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A row: the plain reference, or glow with an anchor setting."""

    name: str
    plain: bool
    checkpointed: bool = False
    anchor_every: int = 0


class Workload:
    """Models with the same weights, and a training step (no optimiser) of each variant on the same batch."""

    def __init__(self, setup: Setup, variants: Sequence[Variant]) -> None:
        torch.set_num_threads(setup.threads)
        torch.manual_seed(0)
        config = setup.config
        layout = torch.channels_last if setup.channels_last else torch.contiguous_format
        x = torch.rand(setup.batch, config.channels, config.size, config.size) - 0.5
        self.x = x.to(setup.device, memory_format=layout)
        self.glow = Glow(config).to(setup.device, memory_format=layout)  # type: ignore[call-overload]
        self.glow.initialize([self.x])
        self.plain: PlainGlow | None = None
        if any(variant.plain for variant in variants):
            self.plain = PlainGlow(config)
            self.plain.load_from(self.glow.state_dict())
            self.plain.to(setup.device, memory_format=layout)  # type: ignore[call-overload]

    def loss(self, variant: Variant) -> Tensor:
        """Mean negative log-likelihood of the batch, ready for backward."""
        self.drop_gradients()
        if not variant.plain:
            self.glow.set_anchors([variant.anchor_every])
            return -self.glow.log_prob(self.x).mean()
        assert self.plain is not None
        self.plain.checkpointed = variant.checkpointed
        return -self.plain(self.x)[1].mean()

    def step(self, variant: Variant) -> None:
        """Forward and backward."""
        self.loss(variant).backward()

    def drop_gradients(self) -> None:
        for model in self.models():
            model.zero_grad(set_to_none=True)

    def models(self) -> list[nn.Module]:
        return [self.glow] if self.plain is None else [self.glow, self.plain]

    def saved_bytes(self, variant: Variant) -> int:
        """Bytes of storages that autograd saves for backward, parameters and buffers aside."""
        own = {t.untyped_storage().data_ptr() for m in self.models() for t in m.state_dict().values()}
        storages: dict[int, int] = {}
        alive: list[Tensor] = []

        def pack(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            alive.append(tensor)  # or its address could be given out again
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self.loss(variant)
        return sum(size for address, size in storages.items() if address not in own)


def measure_steps(setup: Setup, variants: Sequence[Variant], rounds: int) -> list[dict[str, Any]]:
    """Seconds of every variant, round after round, after one round that does not count."""
    workload = Workload(setup, variants)
    seconds = _seconds_on_gpu if setup.cuda else _seconds_on_cpu
    times: dict[str, list[float]] = {variant.name: [] for variant in variants}
    for _ in range(rounds + 1):
        for variant in variants:
            times[variant.name].append(seconds(lambda variant=variant: workload.step(variant)))
    baseline = times[variants[0].name][1:]
    return [
        {
            "row": variant.name,
            "ms": 1e3 * statistics.median(times[variant.name][1:]),
            "ms_least": 1e3 * min(times[variant.name][1:]),
            "ratio": statistics.median(t / b for t, b in zip(times[variant.name][1:], baseline, strict=True)),
            "images_per_s": setup.batch / statistics.median(times[variant.name][1:]),
            "saved_mib": workload.saved_bytes(variant) / MIB,
        }
        for variant in variants
    ]


def _seconds_on_cpu(step: Callable[[], None]) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def _seconds_on_gpu(step: Callable[[], None]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def measure_memory(setup: Setup, variants: Sequence[Variant]) -> list[dict[str, Any]]:
    """Peak memory of one step of every variant above what the model and the batch hold, each in a fresh process."""
    rows = []
    for variant in variants:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
            rows.append({"row": variant.name, **fresh.submit(_memory_of, setup, variant).result()})
    for row in rows:
        row["ratio"] = row["peak_mib"] / rows[0]["peak_mib"]
    return rows


def _memory_of(setup: Setup, variant: Variant) -> dict[str, float]:
    if not setup.cuda:
        # Blocks above 64 KiB go straight back to the system: glibc would keep freed ones in a heap that fragments (a
        # checkpointed step then looks up to three times as large), and the peak is to say what a step needs.
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 64 * 1024)
    workload = Workload(setup, [variant])
    trained = workload.plain if variant.plain else workload.glow
    assert trained is not None
    gradients = sum(p.numel() * p.element_size() for p in trained.parameters())
    saved = workload.saved_bytes(variant)
    workload.step(variant)  # loads what libraries load once
    workload.drop_gradients()
    peak = _peak_on_gpu if setup.cuda else _peak_on_cpu
    return {
        "peak_mib": peak(lambda: workload.step(variant)) / MIB,
        "gradients_mib": gradients / MIB,
        "saved_mib": saved / MIB,
    }


def _peak_on_gpu(step: Callable[[], None]) -> int:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _peak_on_cpu(step: Callable[[], None]) -> int:
    """Growth of the peak resident size over the resident size before (Linux with glibc)."""
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew from here
    step()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith(field))


COLUMNS = {
    "row": "",
    "ms": "ms/step",
    "ms_least": "least",
    "peak_mib": "peak MiB",
    "ratio": "x plain",
    "images_per_s": "images/s",
    "gradients_mib": "gradients",
    "saved_mib": "saved MiB",
}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as aligned text."""
    names = [name for name in COLUMNS if name in rows[0]]
    cells = [[COLUMNS[name] for name in names]]
    cells += [[_cell(name, row[name]) for name in names] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in cells
    )


def _cell(name: str, value: str | float) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.2f}" if name == "ratio" or value < 100 else f"{value:.0f}"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    root = argparse.ArgumentParser(prog="python -m jobs bench", description="Step time and memory in one table.")
    commands = root.add_subparsers(dest="command", required=True, metavar="step|memory")
    for name, purpose in (("step", "time of a training step"), ("memory", "peak memory of a training step")):
        command = commands.add_parser(
            name, help=purpose, description=purpose, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        command.add_argument("--size", type=int, default=64, help="image side in pixels")
        command.add_argument("--levels", type=int, default=4, help="levels (L)")
        command.add_argument("--steps", type=int, default=6, help="steps of flow a level (K)")
        command.add_argument("--width", type=int, default=64, help="hidden channels of the couplings' networks")
        command.add_argument("--batch", type=int, default=8, help="images a step")
        command.add_argument("--coupling", choices=["additive", "affine"], default="additive", help="coupling layers")
        command.add_argument("--anchors", default="0,4,K", help="anchor settings of ours; K is pure inversion")
        command.add_argument("--device", default="cpu", help="cpu or cuda")
        command.add_argument("--threads", type=int, default=1, help="CPU threads")
        command.add_argument("--channels-last", action="store_true", help="pixel-major memory layout, in all rows")
        command.add_argument("--json", action="store_true", help="JSON instead of a table")
        command.add_argument("--dry-run", action="store_true", help="say what would be measured, and stop")
        if name == "step":
            command.add_argument("--rounds", type=int, default=9, help="times every row is measured")
    return root


def variants_of(anchors: str, steps: int) -> list[Variant]:
    """The rows for `--anchors`, plain first."""
    words = [word.strip() for word in anchors.split(",")]
    if any(word != "K" and not word.isdecimal() for word in words):
        raise ValueError(f"--anchors takes numbers and K, separated by commas: {anchors!r}")
    settings = dict.fromkeys(steps if word == "K" else int(word) for word in words)
    ours = [
        Variant(name=f"ours, anchor {n}{' (K)' if n == steps else ''}", plain=False, anchor_every=n) for n in settings
    ]
    checkpointed = Variant(name="plain, checkpointed", plain=True, checkpointed=True)
    return [Variant(name="plain", plain=True), checkpointed, *ours]


def setup_of(options: argparse.Namespace) -> Setup:
    """What the flags say; ValueError where no model can be built of them."""
    names = ("size", "levels", "steps", "width", "coupling")
    config = GlowConfig(channels=3, classes=-1, attributes=-1, **{name: getattr(options, name) for name in names})
    with torch.device("meta"):
        Glow(GlowConfig(**{**asdict(config), "mixing": "reverse"}))  # LU needs numbers; the refusals are the same
    if options.device.startswith("cuda") and not torch.cuda.is_available() and not options.dry_run:
        raise ValueError("torch sees no GPU here")
    if min(options.batch, options.threads) < 1:
        raise ValueError("--batch and --threads must be 1 or more")
    return Setup(
        config=config,
        batch=options.batch,
        device=options.device,
        threads=options.threads,
        channels_last=options.channels_last,
    )


def describe(setup: Setup) -> dict[str, Any]:
    """What is measured on what, as JSON."""
    name = (
        torch.cuda.get_device_name(setup.device) if setup.cuda and torch.cuda.is_available() else platform.processor()
    )
    return {**asdict(setup), "device_name": name or platform.machine(), "torch": torch.__version__}


def headline(setup: Setup) -> str:
    """The same in one line."""
    config = setup.config
    model = f"{config.size} px, L{config.levels} K{config.steps} width {config.width} {config.coupling}"
    machine = setup.device if setup.cuda else f"{setup.device}, {setup.threads} thread(s)"
    layout = ", channels_last" if setup.channels_last else ""
    return f"{model}, batch {setup.batch}, float32{layout}, {machine}, torch {torch.__version__}"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 0, or 2 where the flags make no sense."""
    root = parser()
    options = root.parse_args(argv)
    try:
        setup, variants = setup_of(options), variants_of(options.anchors, options.steps)
    except ValueError as error:
        root.error(str(error))
    if options.dry_run:
        print(f"would measure {options.command} of {headline(setup)}:")
        print("\n".join(f"  {variant.name}" for variant in variants))
        return 0
    if options.command == "step":
        rows = measure_steps(setup, variants, options.rounds)
    else:
        rows = measure_memory(setup, variants)
    print(json.dumps({**describe(setup), "rows": rows}) if options.json else f"{headline(setup)}\n{table(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
