"""`python -m jobs bench`: what a training step costs in time and memory, beside the plainest PyTorch.

Rows: the plain reference (`jobs/plain.py`), the same checkpointed, compiled, in bfloat16, and `glow` by anchor setting.
`step` takes all rows in turn, round after round in one process, so that a busy machine disturbs them alike; on a CPU it
counts the process's own CPU time, on a GPU device time between events. `memory` gives every row a fresh process,
`depth` every row and number of steps. `drift` trains small stacks and says how far inversion drifts; `log-det` times
log-determinants. All of these need argparse, torch and glow alone; `--plot` matplotlib. `reduction` times the two sums
of gradients on real workers, `kills` compares a run whose workers are killed with one left alone.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Sequence

from jobs.bench.rows import table

Flags = tuple[tuple[str, int | str | bool, str], ...]

MODEL: Flags = (
    ("--size", 64, "image side in pixels"),
    ("--levels", 4, "levels (L)"),
    ("--family", "glow", "glow or realnvp"),
    ("--steps", 6, "steps of flow a level (K) of a Glow; a RealNVP's level has 8 members, its last 4"),
    ("--residuals", 2, "residuals of a RealNVP's networks"),
    ("--width", 64, "hidden channels of the couplings' networks"),
    ("--batch", 8, "images a step"),
    ("--coupling", "additive", "additive or affine coupling layers"),
    ("--anchors", "0,4,K", "anchor settings of ours; K is pure inversion"),
    ("--rows", "plain,checkpointed,ours", "plain, checkpointed, compiled, ours, each also NAME-bfloat16; or all"),
    ("--device", "cpu", "cpu or cuda"),
    ("--threads", 1, "CPU threads"),
    ("--channels-last", False, "pixel-major memory layout, in all rows"),
)
ROUNDS: Flags = (("--rounds", 9, "times everything is measured"),)
PLOT: Flags = (("--plot", "", "draw it into this file (PNG or SVG)"),)
SHAPE: Flags = tuple(flag for flag in MODEL if flag[0] in ("--size", "--levels", "--steps", "--width", "--coupling"))
FACES: Flags = (
    ("--size", 64, "image side in pixels"),
    ("--images", 2000, "toy faces, nine tenths of which are read"),
    ("--batch", 32, "images a batch"),
    ("--rounds", 5, "epochs read by every way"),
    ("--to", "", "prefix of S3 for the shards; they are removed afterwards"),
)
EVERYWHERE: Flags = (
    ("--json", False, "JSON instead of a table"),
    ("--dry-run", False, "say what would be measured, and stop"),
)
DEPTH: Flags = (*MODEL, *PLOT, ("--depths", "4,16,32", "steps a level (K) in turn"))
DRIFT: Flags = (("--depths", "8,16,32,64", "steps (K) in turn"), ("--training", 100, "steps of Adam before"))
LOG_DET: Flags = (("--channels", "12,24,48,96,192,384,768", "channels in turn"), *ROUNDS, *PLOT)
SHARES: Flags = (("--batch", 32, "images a step"), ("--leaf", 8, "images a leaf"), ("--workers", 2, "processes"))
REDUCTION: Flags = (*SHAPE, *SHARES, *ROUNDS)
KILLS: Flags = (
    ("--images", 2400, "images a run"),
    ("--kills", 5, "workers killed"),
    ("--workers", 2, "Ray workers"),
    *PLOT,
)
DATA: Flags = (*FACES, ("--encodings", "png,raw,jpg,webp", "forms of the images in turn"))
TRACKING: Flags = (*ROUNDS, ("--steps", 10, "training steps a turn"))
FAULTS: Flags = (*FACES, ("--pause", 50, "ms in the place of a training step"))

COMMANDS: dict[str, tuple[str, str, Flags]] = {
    "step":      ("step", "time of a training step", (*MODEL, *ROUNDS)),
    "memory":    ("step", "peak memory of a training step", MODEL),
    "depth":     ("step", "peak memory of a training step against steps a level", DEPTH),
    "drift":     ("numerics", "round-trip and gradient error of trained stacks by depth, precision and anchor", DRIFT),
    "log-det":   ("numerics", "time of log-determinants, dense and LU, by channels", LOG_DET),
    "reduction": ("reduction", "time of a step of learning on gloo workers, tree beside overlap", REDUCTION),
    "kills":     ("kills", "a run whose Ray workers are killed beside one left alone: losses, bits, seconds", KILLS),
    "data":      ("data", "images a second a core through the stream, beside plain webdataset and a bare loop", DATA),
    "tracking":  ("tracking", "time of a training step while MLflow is up, killed, hung or failing", TRACKING),
    "faults":    ("faults", "time of a batch through a proxy before S3 that refuses, resets, stalls and cuts", FAULTS),
}  # fmt: skip
"""By name: the module of this package whose function of that name measures it, what it is, its flags."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    purpose = "What a training step costs in time and memory, how far inversion drifts, what log-determinants cost."
    prog, names = "python -m jobs bench", "|".join(COMMANDS)
    root = argparse.ArgumentParser(prog=prog, usage=f"{prog} [-h] {names} ...", description=purpose)
    commands = root.add_subparsers(dest="command", required=True, metavar=names, prog=prog)
    shape = argparse.ArgumentDefaultsHelpFormatter
    for name, (_, purpose, flags) in COMMANDS.items():
        command = commands.add_parser(name, help=purpose, description=purpose, formatter_class=shape)
        for flag, default, meaning in flags + EVERYWHERE:
            if isinstance(default, bool):
                command.add_argument(flag, action="store_true", help=meaning)
            else:
                command.add_argument(flag, type=type(default), default=default, help=meaning)
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 0, or 2 where the flags make no sense."""
    root = parser()
    options = root.parse_args(argv)
    module = importlib.import_module(f"jobs.bench.{COMMANDS[options.command][0]}")
    try:
        about, work = getattr(module, options.command.replace("-", "_"))(options)
    except ValueError as error:
        root.error(str(error))
    if options.dry_run:
        print(f"would measure {options.command} of {about['headline']}")
        return 0
    rows = work()
    print(json.dumps({**about, "rows": rows}) if options.json else f"{about['headline']}\n{table(rows)}")
    return 0
