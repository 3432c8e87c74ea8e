"""What the bench measures: a training step of each variant on the same weights and batch; its seconds and its bytes."""

from __future__ import annotations

import ctypes
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from glow import FlowConfig, GlowConfig, RealNVPConfig, make_flow
from glow.flops import peak_tflops, step_flops
from jobs.plain import PlainGlow
from jobs.plain_realnvp import PlainRealNVP

MIB = 2**20
M_MMAP_THRESHOLD = -3
"""Of malloc.h (glibc)."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The model, the batch and the machine a measurement is of."""

    config: FlowConfig
    batch: int
    device: str
    threads: int
    channels_last: bool

    @property
    def steps(self) -> int | None:
        """Steps a level of a Glow; None for a RealNVP."""
        return self.config.steps if isinstance(self.config, GlowConfig) else None

    @property
    def cuda(self) -> bool:
        return self.device.startswith("cuda")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A row: the plain reference, or glow with an anchor setting."""

    name: str
    plain: bool
    checkpointed: bool = False
    compiled: bool = False
    bfloat16: bool = False
    """Networks in bfloat16 (autocast); a plain model then lies channels_last, as one would run it."""
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
        self._modules: list[nn.Module] = []
        self.flow = make_flow(config).to(setup.device, memory_format=layout)  # type: ignore[call-overload]
        self.flow.initialize([self.x])
        self.device = setup.device
        layouts = {variant.name: torch.channels_last if variant.bfloat16 else layout for variant in variants}
        self._plain = {v.name: self._plain_model(config, v, layouts[v.name]) for v in variants if v.plain}

    def _plain_model(self, config: FlowConfig, variant: Variant, layout: torch.memory_format) -> Callable[..., Any]:
        """The plain reference with the same weights, as the variant runs it."""
        plain = PlainRealNVP(config) if isinstance(config, RealNVPConfig) else PlainGlow(config)
        plain.load_from(self.flow.state_dict())
        plain.to(self.device, memory_format=layout)  # type: ignore[call-overload]
        if isinstance(plain, PlainGlow):
            plain.checkpointed = variant.checkpointed
        self._modules.append(plain)
        return torch.compile(plain) if variant.compiled else plain

    def loss(self, variant: Variant) -> Tensor:
        """Mean negative log-likelihood of the batch, ready for backward."""
        self.drop_gradients()
        kind = torch.device(self.device).type
        with torch.autocast(kind, torch.bfloat16, enabled=variant.bfloat16):
            if variant.plain:
                return -self._plain[variant.name](self.x)[1].mean()
            self.flow.set_anchors([variant.anchor_every])
            return -self.flow.log_prob(self.x).mean()

    def step(self, variant: Variant) -> None:
        """Forward and backward."""
        self.loss(variant).backward()

    def drop_gradients(self) -> None:
        for model in self.models():
            model.zero_grad(set_to_none=True)

    def models(self) -> list[nn.Module]:
        return [self.flow, *self._modules]

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
            "mfu": _utilisation(setup, variant, statistics.median(times[variant.name][1:])),
            "peak_mib": _peak_of_row(workload, variant) / MIB if setup.cuda else None,
            "saved_mib": workload.saved_bytes(variant) / MIB,
        }
        for variant in variants
    ]


def _peak_of_row(workload: Workload, variant: Variant) -> int:
    """Bytes a step of a variant takes on the GPU above all models and the batch, its gradients among them."""
    workload.drop_gradients()
    return _peak_on_gpu(lambda: workload.step(variant))


def _utilisation(setup: Setup, variant: Variant, seconds: float) -> float | None:
    """Model FLOPs over what the GPU could have done in the time; None where either is not known."""
    peak = peak_tflops(torch.cuda.get_device_name(setup.device), variant.bfloat16) if setup.cuda else None
    if peak is None or not isinstance(setup.config, GlowConfig):
        return None
    return step_flops(setup.config, setup.batch) / seconds / (1e12 * peak)


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


def maps_a_step(rows: Sequence[dict[str, Any]], setup: Setup) -> float:
    """By how many hidden maps (one of every level together) the peak less gradients rises with every step a level."""
    config = setup.config
    pixels = sum((config.size // 2**level) ** 2 for level in range(1, config.levels + 1))
    hidden = 4 * setup.batch * config.width * pixels / MIB
    points = [(row["K"], row["peak_mib"] - row["gradients_mib"]) for row in rows]
    if len(points) < 2:
        return float("nan")
    return statistics.linear_regression(*zip(*points, strict=True)).slope / hidden


def _memory_of(setup: Setup, variant: Variant) -> dict[str, float]:
    if not setup.cuda:
        # Blocks above 64 KiB go straight back to the system: glibc would keep freed ones in a heap that fragments (a
        # checkpointed step then looks up to three times as large), and the peak is to say what a step needs.
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 64 * 1024)
    workload = Workload(setup, [variant])
    trained = workload.models()[-1]
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
