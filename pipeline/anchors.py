"""A run's anchor setting: asked for or planned, recorded, and tightened where inversion drifts.

Every backward measures, at no extra pass, how far a recovered state is from the one kept at an anchor. Where the
largest of them since the last status line exceeds an eighth of a bin (2^-bits / 8), every level's n is halved.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from glow import Chain, Flow, GlowConfig
from glow.budget import Plan, cheapest, level_costs
from pipeline.config import TrainConfig
from pipeline.errors import ConfigError
from pipeline.world import World, gather_ordered, on_all

SHARE_OF_FREE = 0.8
"""Of free memory a plan may count on: allocators round, and libraries keep workspaces."""

COPIES_TO_COME = 3
"""Of every parameter, after the model is there: two moments and what an update works with."""


class Anchors:
    """Sets the model's anchors, watches the inversion and tightens."""

    def __init__(self, config: TrainConfig, model: Flow, world: World) -> None:
        self._model, self._world = model, world
        self._asked = config.memory.anchor_every
        self._alarm = 2.0**-config.data.bits / 8
        self.tightened = 0
        """How often n was halved."""
        self.news: list[str] = []
        """What happened and has not been told yet."""
        self._set(self._asked if self._asked != "plan" else self._planned(config))

    def _planned(self, config: TrainConfig) -> tuple[int, ...]:
        parameters = sum(parameter.numel() for parameter in self._model.parameters())
        free = on_all(self._world, lambda: budget(config, parameters, self._world.device))
        found = planned(config, min(free))
        self.news.append(f"anchor_every planned: {list(found.anchor_every)}, {found.bytes / 1e9:.2f} GB a leaf")
        return found.anchor_every

    def _set(self, anchor_every: tuple[int, ...]) -> None:
        self.anchor_every = anchor_every
        self._model.set_anchors(anchor_every)

    def figures(self) -> dict[str, float]:
        """The largest inversion error since the last call on any rank; tightens where it is too large. Collective."""
        chains = [chain for chain in self._model.modules() if isinstance(chain, Chain)]
        found = [chain.inversion_error for chain in chains if chain.inversion_error is not None]
        for chain in chains:
            chain.inversion_error = None
        own = torch.stack(found).amax().double().cpu().reshape(1) if found else torch.zeros(0, dtype=torch.float64)
        errors = gather_ordered(self._world, own)
        if not len(errors):
            return {}
        error = float(errors.amax())
        if not error <= self._alarm:  # also where it is not a number
            self._tighten(error)
        halvings = {"memory/tightened": float(self.tightened)} if self.tightened else {}
        return {"train/inversion_error": error} | halvings

    def _tighten(self, error: float) -> None:
        tighter = tuple(min(every, max(every // 2, 1)) for every in self.anchor_every)
        what = f"inversion error {error:.1e} is above {self._alarm:.1e}, an eighth of a bin"
        if tighter == self.anchor_every:
            self.news.append(f"{what}, with an anchor at every step: memory.anchor_every 0 stores everything instead")
            return
        self.tightened += 1
        self.news.append(f"{what}: anchor_every {list(self.anchor_every)} -> {list(tighter)}")
        self._set(tighter)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"asked": self._asked, "anchor_every": self.anchor_every, "tightened": self.tightened}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on with the setting of the checkpoint, unless another one is asked for by now."""
        asked = state["asked"]
        if (asked if isinstance(asked, str) else tuple(asked)) == self._asked:
            self.tightened = state["tightened"]
            self._set(tuple(state["anchor_every"]))


def nets_dtype(config: TrainConfig) -> torch.dtype:
    """The precision of the couplings' networks."""
    return torch.bfloat16 if config.memory.nets == "bfloat16" else torch.float32


def planned(config: TrainConfig, free: int) -> Plan:
    """The cheapest setting for a leaf of a resolved configuration in so many bytes; ConfigError where none fits."""
    if not isinstance(config.model, GlowConfig):
        raise ConfigError('memory.anchor_every is "plan"', cure="numbers: only a Glow's steps can be planned for")
    try:
        return cheapest(level_costs(config.model, config.schedule.leaf, nets_dtype(config)), free)
    except ValueError as error:
        raise ConfigError(str(error), where="memory.anchor_every", cure="a smaller schedule.leaf") from error


def budget(config: TrainConfig, parameters: int, device: torch.device) -> int:
    """Bytes backward may keep: as configured, or what is free less what so many parameters are still to take."""
    if config.memory.budget_gb > 0:
        return int(config.memory.budget_gb * 1e9)
    return max(0, int(SHARE_OF_FREE * free_bytes(device)) - 4 * COPIES_TO_COME * parameters)


def free_bytes(device: torch.device) -> int:
    """Memory a device has free: a GPU's own, or what the system (and its control group) has available."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    group = Path("/sys/fs/cgroup")
    limit, used = (_number_in(group / name) for name in ("memory.max", "memory.current"))
    return free if limit is None or used is None else min(free, max(0, limit - used))


def _number_in(path: Path) -> int | None:
    """The number in a file of the system; None where it says there is none ("max") or there is no such file."""
    text = path.read_text(encoding="ascii").strip() if path.exists() else ""
    return int(text) if text.isdecimal() else None
