"""Commands as people run them, in processes of their own, and what a run leaves behind."""

from __future__ import annotations

import atexit
import functools
import hashlib
import os
import secrets
import shutil
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
from tests.reliability import measured

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
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    write_toy(folder / "source", images=160, size=16, seed=0)
    options, source = Options(samples_per_shard=16), open_source(str(folder / "source"))
    plan = make_plan(source, options, map, report=lambda images: None)
    build(plan, open_storage(str(folder / "data")), mapped=map, restart=False, report=lambda images: None)
    return folder / "data"


def upload(prefix: str) -> str:
    """The dataset of the tests at another place; the place."""
    target = open_storage(prefix)
    for path in dataset().rglob("*"):
        if path.is_file():
            target.upload(path, str(path.relative_to(dataset())))
    return prefix


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


@functools.cache
def place() -> Path:
    """The folder for temporary files of every command of this session; its name is short enough for Ray's sockets."""
    folder = Path(tempfile.mkdtemp(prefix="gt-", dir="/tmp"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


SHARED_MEMORY = Path("/dev/shm")


class Traces:
    """What commands leave from now on: processes, temporary files, shared memory."""

    def __init__(self) -> None:
        self._files, self._shared = set(place().iterdir()), set(SHARED_MEMORY.iterdir())

    def left(self) -> tuple[list[psutil.Process], set[Path]]:
        """Nothing, where all is well: what torch keeps for its compiler, and others' semaphores, are not ours."""
        found = (set(place().iterdir()) - self._files) | (set(SHARED_MEMORY.iterdir()) - self._shared)
        return left_processes(), {path for path in found if not path.name.startswith(("torchinductor", "sem."))}

    def check(self, after: str) -> None:
        """Promise R23: nothing is left."""
        found = self.left()
        measured("R23", f"left by {after}", sum(map(len, found)), "processes and files")
        assert found == ([], set())


def started(command: list[str], more: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Start a command in a process group of its own, with `more` variables; its output is one stream of lines."""
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "PYTHONUNBUFFERED": "1", "TMPDIR": str(place()), MARK: "1"}
    environment |= more or {}
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
    """A digest over every tensor of a run's newest checkpoint: weights, averages, moments, in whatever parts."""
    trained = read_run(open_storage(str(run)))
    assert {name.partition("/")[0] for name in trained.tensors} == {"model", "ema", "optim"}
    digest = hashlib.sha256(str((trained.step, trained.images)).encode())
    for name in sorted(trained.tensors):
        digest.update(name.encode() + trained.tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def config_of(run: Path) -> TrainConfig:
    """The configuration beside a run."""
    return read_config(run / "config.toml")
