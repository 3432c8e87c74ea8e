"""Commands as people run them, in processes of their own, and what a run leaves behind."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

from pipeline.config import TrainConfig, read_config
from pipeline.export import read_run
from pipeline.prepare import Options, build, make_plan
from pipeline.sources import open_source
from pipeline.storage import open_storage
from pipeline.toy import write_toy

HANG = 240
"""Seconds after which a command is taken to hang: five times what it needs on two busy cores."""

TINY = """
[model]
levels = 2
steps = 2
width = 16
[schedule]
images = {images}
status_every = 160
checkpoint_every = 160
init_images = 64
[evaluate]
every = 640
images = 16
rows = 1
"""


ENDLESS = 10_000_000
CONSTANT = ("--optim.decay", "constant")
"""With it a run that was stopped anywhere is the run that was asked for no more images than that."""


@functools.cache
def dataset() -> Path:
    """Shards of 160 toy faces of 16 px."""
    folder = Path(tempfile.mkdtemp(prefix="glow-test-runs-"))
    write_toy(folder / "source", images=160, size=16, seed=0)
    options, source = Options(samples_per_shard=16), open_source(str(folder / "source"))
    plan = make_plan(source, options, map, report=lambda images: None)
    build(plan, open_storage(str(folder / "data")), mapped=map, restart=False, report=lambda images: None)
    return folder / "data"


def settings(folder: Path, images: int) -> list[str]:
    """The words of a tiny toy32 run in a folder."""
    (folder / "tiny.toml").write_text(TINY.format(images=images))
    cache = str(dataset().with_name("cache"))
    places = ["--data.prefix", str(dataset()), "--data.cache", cache, "--storage", str(folder / "runs")]
    return ["toy32", "--config", str(folder / "tiny.toml"), *places]


def jobs(*words: str) -> list[str]:
    """The command line of a job."""
    return [sys.executable, "-m", "jobs", *words]


MARK = f"GLOW_TEST_{secrets.token_hex(8)}"
"""In the environment of every process a test of this session started, however far down."""


def left_processes() -> list[psutil.Process]:
    """Living processes that descend from a command of this session's tests."""
    return [process for process in psutil.process_iter() if _is_ours(process)]


def _is_ours(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and MARK in process.environ()
    except psutil.Error:  # gone meanwhile, or somebody else's
        return False


def left_folders() -> list[Path]:
    """Folders of Ray whose owner is gone."""
    folders = Path(tempfile.gettempdir()).glob("glow-*-*")
    owned = [(folder, re.fullmatch(r"glow-(\d+)-\w+", folder.name)) for folder in folders]
    return [folder for folder, owner in owned if owner and not psutil.pid_exists(int(owner[1]))]


def started(command: list[str], more: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Start a command in a process group of its own, with `more` variables; its output is one stream of lines."""
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "PYTHONUNBUFFERED": "1", MARK: "1"} | dict(more or {})
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )


def followed(
    command: list[str], at_line: Callable[[psutil.Process, str], None] = lambda process, line: None
) -> tuple[int, str]:
    """Run a command to its end, showing every line to `at_line`; (exit code, output)."""
    lines = []
    with started(command) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            at_line(psutil.Process(process.pid), line)
        return process.wait(HANG), "".join(lines)


def tensors_of(run: Path | str) -> str:
    """A digest over every tensor of a run's newest checkpoint, whatever parts it is cut into."""
    trained = read_run(open_storage(str(run)))
    digest = hashlib.sha256(str((trained.step, trained.images)).encode())
    for name in sorted(trained.tensors):
        digest.update(name.encode() + trained.tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def config_of(run: Path) -> TrainConfig:
    """The configuration beside a run."""
    return read_config(run / "config.toml")
