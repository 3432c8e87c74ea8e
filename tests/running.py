"""The stack for tests: raised by the command people use, and proven gone afterwards."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from jobs.stack.life import raised, razed
from jobs.stack.processes import belonging, listening
from jobs.stack.state import ENV, Options, Stack

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True)
class RunningStack:
    """A stack that is up."""

    stack: Stack

    @property
    def folder(self) -> Path:
        return self.stack.folder

    @property
    def environment(self) -> dict[str, str]:
        """What somebody has who sourced `env`."""
        lines = [shlex.split(line)[1] for line in (self.folder / ENV).read_text().splitlines()]
        return dict(line.split("=", 1) for line in lines)

    @property
    def s3_environment(self) -> dict[str, str]:
        """By what AWS clients reach the S3 server itself, past the proxy."""
        return {**self.stack.access["s3"], "AWS_ENDPOINT_URL": self.stack.s3}

    def jobs(self, *words: str, check: int | None = 0, **more: str) -> subprocess.CompletedProcess[str]:
        """Run `python -m jobs WORDS` as that somebody; `check` is the exit code it must end with, None for any."""
        done = jobs(*words, environment={**self.environment, **more})
        assert check is None or done.returncode == check, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def python(self, program: str) -> subprocess.CompletedProcess[str]:
        """Run a Python program as that somebody."""
        return _run("-c", program, environment=self.environment)


def jobs(*words: str, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run `python -m jobs WORDS` from the repository with these variables besides this process's own."""
    return _run("-m", "jobs", *words, environment=environment or {})


def _run(*words: str, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip


@contextmanager
def running_stack(folder: Path, **options: object) -> Iterator[RunningStack]:
    """A stack with a fault proxy; afterwards no process, port or file of it is left."""
    stack = raised(folder, Options(**{"fault_proxy": True, **options}), print)  # type: ignore[arg-type]
    try:
        yield RunningStack(stack=stack)
    finally:
        razed(folder)
        refuse_traces(stack)


def refuse_traces(stack: Stack) -> None:
    """AssertionError if anything of a stack is left."""
    state = stack.state
    assert not belonging(state.processes.values(), state.mark)
    assert not [path for path in Path("/proc").glob("[0-9]*/cmdline") if state.scratch.encode() in _bytes(path)]
    assert not [port for port in state.ports.values() if listening(port)]
    assert not Path(state.scratch).exists()
    assert not stack.folder.exists()


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
