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
import json
import platform
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from glow import FlowConfig, GlowConfig, RealNVPConfig
from jobs.bench_rows import table, variants_of, without_impossible
from jobs.numerics import FIT_FROM, drift_rows, log_det_rows, slope
from jobs.workload import Setup, maps_a_step, measure_memory, measure_steps

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
REALNVP_MEMBERS = 8
"""Of a level's chain: six couplings and a change of layout on each side of the last three."""
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
COMMANDS: dict[str, tuple[str, Flags]] = {
    "step": ("time of a training step", MODEL + ROUNDS),
    "memory": ("peak memory of a training step", MODEL),
    "depth": (
        "peak memory of a training step against steps a level",
        MODEL + PLOT + (("--depths", "4,16,32", "steps a level (K) in turn"),),
    ),
    "drift": (
        "round-trip and gradient error of trained stacks by depth, precision and anchor",
        (("--depths", "8,16,32,64", "steps (K) in turn"), ("--training", 100, "steps of Adam before")),
    ),
    "reduction": (
        "time of a step of learning on gloo workers, tree beside overlap",
        (
            *SHAPE,
            ("--batch", 32, "images a step"),
            ("--leaf", 8, "images a leaf"),
            ("--workers", 2, "processes"),
            *ROUNDS,
        ),
    ),
    "kills": (
        "a run whose Ray workers are killed beside one left alone: losses, bits, seconds",
        (("--images", 2400, "images a run"), ("--kills", 5, "workers killed"), ("--workers", 2, "Ray workers"), *PLOT),
    ),
    "log-det": (
        "time of log-determinants, dense and LU, by channels",
        (("--channels", "12,24,48,96,192,384,768", "channels in turn"), *ROUNDS, *PLOT),
    ),
    "data": (
        "images a second a core through the stream, beside plain webdataset and a bare loop",
        (*FACES, ("--encodings", "png,raw,jpg,webp", "forms of the images in turn")),
    ),
    "tracking": (
        "time of a training step while MLflow is up, killed, hung or failing",
        (*ROUNDS, ("--steps", 10, "training steps a turn")),
    ),
    "faults": (
        "time of a batch through a proxy in front of S3 that refuses, resets, stalls and cuts",
        (*FACES, ("--pause", 50, "ms in the place of a training step")),
    ),
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    purpose = "What a training step costs in time and memory, how far inversion drifts, what log-determinants cost."
    prog, names = "python -m jobs bench", "|".join(COMMANDS)
    root = argparse.ArgumentParser(prog=prog, usage=f"{prog} [-h] {names} ...", description=purpose)
    commands = root.add_subparsers(dest="command", required=True, metavar=names, prog=prog)
    shape = argparse.ArgumentDefaultsHelpFormatter
    for name, (purpose, flags) in COMMANDS.items():
        command = commands.add_parser(name, help=purpose, description=purpose, formatter_class=shape)
        for flag, default, meaning in flags + EVERYWHERE:
            if isinstance(default, bool):
                command.add_argument(flag, action="store_true", help=meaning)
            else:
                command.add_argument(flag, type=type(default), default=default, help=meaning)
    return root


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


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 0, or 2 where the flags make no sense."""
    root = parser()
    options = root.parse_args(argv)
    measure = MEASURES.get(options.command, _steps)
    try:
        about, work = measure(options)
    except ValueError as error:
        root.error(str(error))
    if options.dry_run:
        print(f"would measure {options.command} of {about['headline']}")
        return 0
    rows = work()
    print(json.dumps({**about, "rows": rows}) if options.json else f"{about['headline']}\n{table(rows)}")
    return 0


Measurement = tuple[dict[str, Any], Callable[[], list[dict[str, Any]]]]
"""What is measured (its "headline" is a line of text), and how."""


def _steps(options: argparse.Namespace) -> Measurement:
    """step, memory and depth."""
    if options.command == "depth":
        return _depth(options)
    setup, variants = setup_of(options), variants_of(options.rows, options.anchors, depth_of(options))
    about = describe(setup) | {"headline": headline(setup)}
    if options.dry_run:
        return about | {"headline": "\n  ".join([about["headline"] + ":", *(v.name for v in variants)])}, list
    kept = without_impossible(setup, variants)
    if options.command == "step":
        return about, lambda: measure_steps(setup, kept, options.rounds)
    return about, lambda: measure_memory(setup, kept)


def depth_of(options: argparse.Namespace) -> int:
    """K: the members of a level's chain that pure inversion walks."""
    return options.steps if options.family == "glow" else REALNVP_MEMBERS


def _depth(options: argparse.Namespace) -> Measurement:
    if options.family != "glow":
        raise ValueError("depth counts a Glow's steps; a RealNVP has as many couplings as it has")
    depths = numbers(options.depths, "--depths")
    setups = {depth: setup_of(argparse.Namespace(**{**vars(options), "steps": depth})) for depth in depths}
    first = setups[depths[0]]

    def work() -> list[dict[str, Any]]:
        rows = []
        for depth, setup in setups.items():
            kept = without_impossible(setup, variants_of(options.rows, options.anchors, depth))
            rows += [{**row, "K": depth} for row in measure_memory(setup, kept)]
        for row in rows:
            row["row"] = re.sub(r"anchor \d+ \(K\)", "anchor K", row["row"])
        for row in rows:
            row["maps_a_step"] = maps_a_step([other for other in rows if other["row"] == row["row"]], first)
        if options.plot:
            from jobs.plots import memory_plot

            memory_plot(Path(options.plot), rows, headline(first).replace(f" K{depths[0]}", "").split(", float32")[0])
        return rows

    return describe(first) | {"headline": f"{headline(first)}; K = {', '.join(map(str, depths))}"}, work


def _data(options: argparse.Namespace) -> Measurement:
    from jobs import bench_data, bench_faults

    return bench_data.data(options) if options.command == "data" else bench_faults.faults(options)


def _tracking(options: argparse.Namespace) -> Measurement:
    from jobs import bench_tracking

    return bench_tracking.tracking(options)


def _drift(options: argparse.Namespace) -> Measurement:
    depths = numbers(options.depths, "--depths")
    stacks = f"stacks of K = {', '.join(map(str, depths))} after {options.training} steps of Adam"
    return {"headline": f"{stacks}, CPU, torch {torch.__version__}"}, lambda: list(drift_rows(depths, options.training))


def _reduction(options: argparse.Namespace) -> Measurement:
    if options.batch % options.leaf or options.workers > options.batch // options.leaf:
        raise ValueError("--leaf divides --batch, and there are at most so many --workers as leaves")
    names = ("size", "levels", "steps", "width", "coupling")
    config = GlowConfig(channels=3, classes=-1, attributes=-1, **{name: getattr(options, name) for name in names})

    def work() -> list[dict[str, Any]]:
        from jobs.reductions import Batching, measure_reductions

        shares = {name: getattr(options, name) for name in ("batch", "leaf", "workers", "rounds")}
        return measure_reductions(config, Batching(**shares))

    model = f"{config.size} px, L{config.levels} K{config.steps} width {config.width} {config.coupling}"
    share = f"batch {options.batch} in leaves of {options.leaf} on {options.workers} workers"
    return {"headline": f"{model}, {share}, CPU, 1 thread each, torch {torch.__version__}"}, work


def _kills(options: argparse.Namespace) -> Measurement:
    def work() -> list[dict[str, Any]]:
        from jobs.kills import measure_kills

        return measure_kills(options.images, options.kills, options.workers, options.plot)

    return {"headline": f"{options.images} images on {options.workers} Ray workers, {options.kills} killed"}, work


def _log_det(options: argparse.Namespace) -> Measurement:
    channels = numbers(options.channels, "--channels")

    def work() -> list[dict[str, Any]]:
        torch.set_num_threads(1)
        rows = log_det_rows(channels, options.rounds)
        slopes = {name: slope(rows, name) for name in ("dense", "lu")}
        if options.plot:
            from jobs.plots import log_det_plot

            log_det_plot(Path(options.plot), rows, slopes)
        return [*rows, {"channels": f"exponent from {FIT_FROM}", **slopes}]

    return {"headline": f"log|det W| and its gradient, CPU ms, 1 thread, torch {torch.__version__}"}, work


def numbers(words: str, flag: str) -> list[int]:
    """Numbers of 2 or more from "4,16,32"."""
    found = [int(word) if word.strip().isdecimal() else 0 for word in words.split(",")]
    if min(found) < 2:
        raise ValueError(f"{flag} takes numbers of 2 or more, separated by commas: {words!r}")
    return found


MEASURES = {
    "drift": _drift,
    "log-det": _log_det,
    "data": _data,
    "faults": _data,
    "tracking": _tracking,
    "reduction": _reduction,
    "kills": _kills,
}
"""Of the commands that are not `_steps`."""


if __name__ == "__main__":
    sys.exit(main())
