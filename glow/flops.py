"""How much arithmetic a training step is, and how much a GPU can do: together its utilisation (MFU)."""

from __future__ import annotations

from glow.budget import level_macs
from glow.config import GlowConfig

PEAKS = {
    # name      float32  bfloat16, dense TFLOP/s as the maker states them
    "H100 PCIe": (51.0, 756.0),
    "H100":      (67.0, 989.0),
    "H200":      (67.0, 989.0),
    "A100":      (19.5, 312.0),
    "A10G":      (31.2, 70.0),
    "L40S":      (91.6, 362.0),
    "L4":        (30.3, 121.0),
    "RTX 4090":  (82.6, 165.0),
    "RTX 3090":  (35.6, 71.0),
}  # fmt: skip


def peak_tflops(device_name: str, bfloat16: bool) -> float | None:
    """What a GPU can do without tensor cores (float32) or with them (bfloat16); None where it is not in the table."""
    names = [name for name in PEAKS if name in device_name]
    return PEAKS[max(names, key=len)][int(bfloat16)] if names else None


def step_flops(config: GlowConfig, images: int) -> int:
    """Of a training step that stores its activations; what is computed again for memory's sake does not count."""
    return 6 * sum(level_macs(config, images))
