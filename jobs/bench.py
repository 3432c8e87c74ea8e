"""`python -m jobs bench`: what a training step costs in time and memory, beside the plainest PyTorch.

Rows: the plain reference (`jobs/plain.py`), the same with every step checkpointed, and `glow` by anchor setting. `step`
takes all rows in turn, round after round in one process, so that a busy machine disturbs them alike; on a CPU it counts
the process's own CPU time, on a GPU device time between events. `memory` gives every row a fresh process. Needs
argparse, torch and glow alone.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from glow import Glow, GlowConfig
from jobs.workload import Setup, Variant, measure_memory, measure_steps

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


FLAGS: tuple[tuple[str, int | str | bool, str], ...] = (
    ("--size", 64, "image side in pixels"),
    ("--levels", 4, "levels (L)"),
    ("--steps", 6, "steps of flow a level (K)"),
    ("--width", 64, "hidden channels of the couplings' networks"),
    ("--batch", 8, "images a step"),
    ("--coupling", "additive", "additive or affine coupling layers"),
    ("--anchors", "0,4,K", "anchor settings of ours; K is pure inversion"),
    ("--device", "cpu", "cpu or cuda"),
    ("--threads", 1, "CPU threads"),
    ("--rounds", 9, "times every row is measured (step)"),
    ("--channels-last", False, "pixel-major memory layout, in all rows"),
    ("--json", False, "JSON instead of a table"),
    ("--dry-run", False, "say what would be measured, and stop"),
)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    root = argparse.ArgumentParser(prog="python -m jobs bench", description="Step time and memory in one table.")
    commands = root.add_subparsers(dest="command", required=True, metavar="step|memory")
    shape = argparse.ArgumentDefaultsHelpFormatter
    for name, purpose in (("step", "time of a training step"), ("memory", "peak memory of a training step")):
        command = commands.add_parser(name, help=purpose, description=purpose, formatter_class=shape)
        for flag, default, meaning in FLAGS:
            if isinstance(default, bool):
                command.add_argument(flag, action="store_true", help=meaning)
            else:
                command.add_argument(flag, type=type(default), default=default, help=meaning)
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
    """What the flags say; ValueError where it cannot be measured."""
    if options.coupling not in ("additive", "affine"):
        raise ValueError(f"--coupling is additive or affine, not {options.coupling}")
    if min(options.batch, options.threads, options.rounds) < 1:
        raise ValueError("--batch, --threads and --rounds are 1 or more")
    names = ("size", "levels", "steps", "width", "coupling")
    config = GlowConfig(channels=3, classes=-1, attributes=-1, **{name: getattr(options, name) for name in names})
    with torch.device("meta"):
        Glow(GlowConfig(**{**asdict(config), "mixing": "reverse"}))  # LU needs numbers; the refusals are the same
    names = ("batch", "device", "threads", "channels_last")
    setup = Setup(config=config, **{name: getattr(options, name) for name in names})
    if not options.dry_run and setup.cuda and not torch.cuda.is_available():
        raise ValueError("torch sees no GPU here")
    if not options.dry_run and options.command == "memory" and not setup.cuda and platform.libc_ver()[0] != "glibc":
        raise ValueError("resident memory is measured on Linux with glibc")
    return setup


def describe(setup: Setup) -> dict[str, Any]:
    """What is measured on what, as JSON."""
    name = torch.cuda.get_device_name(setup.device) if setup.cuda else platform.machine()
    return {**asdict(setup), "device_name": name, "torch": torch.__version__}


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
    timed = options.command == "step"
    rows = measure_steps(setup, variants, options.rounds) if timed else measure_memory(setup, variants)
    print(json.dumps({**describe(setup), "rows": rows}) if options.json else f"{headline(setup)}\n{table(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
