"""Fixtures every room shares."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from pipeline.errors import ConfigError
from tests.running import RunningStack, running_stack
from tests.s3server import s3_server

settings.register_profile("laws", deadline=None)  # a law is true on a busy machine too
settings.load_profile("laws")


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """Prefix of a bucket on a real S3 server; the environment points AWS clients, children's too, at it."""
    from pipeline.storage import make_bucket

    try:
        with s3_server() as server, pytest.MonkeyPatch.context() as patch:
            for name, value in server.environment.items():
                patch.setenv(name, value)
            make_bucket("tests")
            yield "s3://tests"
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def stack() -> Iterator[RunningStack]:
    """The whole system, once a session; torn down as if somebody had killed all of it before."""
    folder = Path(tempfile.mkdtemp(prefix="glow-test-"))
    try:
        with running_stack(folder / "stack") as running:
            yield running
            for process in running.stack.state.processes.values():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
    except ConfigError as error:
        pytest.skip(str(error))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
