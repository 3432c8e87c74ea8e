"""`bench step`, `memory` and `depth`: a training step's time and memory, by variant. Needs torch and glow alone."""

from __future__ import annotations

import argparse
import platform
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from glow import FlowConfig, GlowConfig, RealNVPConfig
from jobs.bench.rows import Measurement, Row, numbers
from jobs.bench.workload import Setup, Variant, maps_a_step, measure_memory, measure_steps

REALNVP_MEMBERS = 8
"""Of a level's chain: six couplings and a change of layout on each side of the last three."""

KINDS = ("plain", "checkpointed", "compiled", "ours")


def step(options: argparse.Namespace) -> Measurement:
    """Time of a step, all variants in turn."""
    setup, about, variants = _asked(options)
    return about, lambda: measure_steps(setup, variants, options.rounds)


def memory(options: argparse.Namespace) -> Measurement:
    """Peak memory of a step, a process a variant."""
    setup, about, variants = _asked(options)
    return about, lambda: measure_memory(setup, variants)


def _asked(options: argparse.Namespace) -> tuple[Setup, dict[str, Any], list[Variant]]:
    setup, variants = setup_of(options), variants_of(options.rows, options.anchors, depth_of(options))
    about = describe(setup) | {"headline": headline(setup)}
    if options.dry_run:
        return setup, about | {"headline": "\n  ".join([about["headline"] + ":", *(v.name for v in variants)])}, []
    return setup, about, without_impossible(setup, variants)


def depth_of(options: argparse.Namespace) -> int:
    """K: the members of a level's chain that pure inversion walks."""
    return options.steps if options.family == "glow" else REALNVP_MEMBERS


def depth(options: argparse.Namespace) -> Measurement:
    """Peak memory of a step over steps a level."""
    if options.family != "glow":
        raise ValueError("depth counts a Glow's steps; a RealNVP has as many couplings as it has")
    depths = numbers(options.depths, "--depths")
    setups = {depth: setup_of(argparse.Namespace(**{**vars(options), "steps": depth})) for depth in depths}
    first = setups[depths[0]]

    def work() -> list[Row]:
        rows = []
        for depth, setup in setups.items():
            kept = without_impossible(setup, variants_of(options.rows, options.anchors, depth))
            rows += [{**row, "K": depth} for row in measure_memory(setup, kept)]
        for row in rows:
            row["row"] = re.sub(r"anchor \d+ \(K\)", "anchor K", row["row"])
        for row in rows:
            row["maps_a_step"] = maps_a_step([other for other in rows if other["row"] == row["row"]], first)
        if options.plot:
            from jobs.bench.plots import memory_plot

            memory_plot(Path(options.plot), rows, headline(first).replace(f" K{depths[0]}", "").split(", float32")[0])
        return rows

    return describe(first) | {"headline": f"{headline(first)}; K = {', '.join(map(str, depths))}"}, work


def config_of(options: argparse.Namespace) -> FlowConfig:
    """The model the flags ask for."""
    shape: dict[str, Any] = {"channels": 3, "classes": -1, "attributes": -1}
    shape |= {name: getattr(options, name) for name in ("size", "levels", "width")}
    if options.family == "realnvp":
        return RealNVPConfig(**shape, residuals=options.residuals)
    return GlowConfig(**shape, steps=options.steps, coupling=options.coupling)


def setup_of(options: argparse.Namespace) -> Setup:
    """What the flags say; ValueError where it cannot be measured."""
    if min(options.batch, options.threads, getattr(options, "rounds", 1)) < 1:
        raise ValueError("--batch, --threads and --rounds are 1 or more")
    if options.family not in ("glow", "realnvp") or options.coupling not in ("additive", "affine"):
        raise ValueError(
            f"--family is glow or realnvp, --coupling additive or affine: {options.family}, {options.coupling}"
        )
    config = config_of(options)
    config.refuse_impossible()
    names = ("batch", "device", "threads", "channels_last")
    setup = Setup(config=config, **{name: getattr(options, name) for name in names})
    if not options.dry_run and setup.cuda and not torch.cuda.is_available():
        raise ValueError("torch sees no GPU here")
    if not options.dry_run and options.command != "step" and not setup.cuda and platform.libc_ver()[0] != "glibc":
        raise ValueError("resident memory is measured on Linux with glibc")
    return setup


def describe(setup: Setup) -> dict[str, Any]:
    """What is measured on what, as JSON."""
    seen = setup.cuda and torch.cuda.is_available()
    name = torch.cuda.get_device_name(setup.device) if seen else platform.machine()
    return {**asdict(setup), "device_name": name, "torch": torch.__version__}


def headline(setup: Setup) -> str:
    """The same in one line."""
    config = setup.config
    if isinstance(config, GlowConfig):
        kind = f"L{config.levels} K{config.steps} width {config.width} {config.coupling}"
    else:
        kind = f"realnvp L{config.levels} width {config.width}"
    model = f"{config.size} px, {kind}"
    machine = setup.device if setup.cuda else f"{setup.device}, {setup.threads} thread(s)"
    layout = ", channels_last" if setup.channels_last else ""
    return f"{model}, batch {setup.batch}, float32{layout}, {machine}, torch {torch.__version__}"


def variants_of(asked: str, anchors: str, steps: int) -> list[Variant]:
    """The rows for `--rows` and `--anchors`, in the order asked for."""
    known = [f"{kind}{nets}" for nets in ("", "-bfloat16") for kind in KINDS]
    names = known if asked == "all" else [word.strip() for word in asked.split(",")]
    if strange := [name for name in names if name not in known]:
        raise ValueError(f"--rows knows {', '.join(known)} and all, not {strange[0]!r}")
    found: list[Variant] = []
    for name in names:
        kind, _, nets = name.partition("-")
        found += _ours(anchors, steps, bool(nets)) if kind == "ours" else [_plain(kind, bool(nets))]
    return found


def _plain(kind: str, bfloat16: bool) -> Variant:
    name = ("plain" if kind == "plain" else f"plain, {kind}") + (", bfloat16 channels_last" if bfloat16 else "")
    return Variant(
        name=name, plain=True, bfloat16=bfloat16, checkpointed=kind == "checkpointed", compiled=kind == "compiled"
    )


def _ours(anchors: str, steps: int, bfloat16: bool) -> list[Variant]:
    """A row an anchor setting."""
    words = [word.strip() for word in anchors.split(",")]
    if any(word != "K" and not word.isdecimal() for word in words):
        raise ValueError(f"--anchors takes numbers and K, separated by commas: {anchors!r}")
    settings = dict.fromkeys(steps if word == "K" else int(word) for word in words)
    nets = ", bfloat16 nets" if bfloat16 else ""
    return [
        Variant(
            name=f"ours, anchor {n}{' (K)' if n == steps else ''}{nets}",
            plain=False,
            bfloat16=bfloat16,
            anchor_every=n,
        )
        for n in settings
    ]


def without_impossible(setup: Setup, variants: Sequence[Variant]) -> list[Variant]:
    """Rows that can be measured here; says which are left out."""
    compiler = setup.cuda or any(shutil.which(name) for name in ("c++", "g++", "clang++"))
    kept = [variant for variant in variants if compiler or not variant.compiled]
    if len(kept) < len(variants):
        print("left out: compiled rows, torch.compile finds no c++, g++ or clang++ here", file=sys.stderr)
    if setup.steps is None and any(variant.checkpointed for variant in kept):
        print("left out: checkpointed rows, the plain RealNVP is not cut into steps", file=sys.stderr)
        kept = [variant for variant in kept if not variant.checkpointed]
    return kept
