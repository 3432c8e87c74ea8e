"""Fixtures every room shares."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from pipeline.errors import ConfigError
from tests.running import RunningStack, jobs, running_stack
from tests.s3server import s3_server

SERVERS = {"stack", "s3"}
"""Fixtures of which a session has one each, and so one worker."""

settings.register_profile("laws", deadline=None)  # a law is true on a busy machine too
settings.load_profile("laws")


def pytest_configure() -> None:
    """One thread for torch, here and in every process a test starts: workers share the cores; this Python's programs.

    Jobs of a cluster and MLflow's servers call `python` and `uvicorn` by name, as after `source .venv/bin/activate`.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


def servers(item: pytest.Item) -> set[str]:
    """Which servers a test uses, by a fixture or by a parameter that names one."""
    assert isinstance(item, pytest.Function)
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return SERVERS & {*item.fixturenames, *(value for value in parameters if isinstance(value, str))}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Parts of the work for several workers: what uses the servers, then every file; the longest first.

    A file's tests stay together, for the fixtures they share.
    """
    for item in items:
        group = "servers" if servers(item) else item.path.relative_to(Path(__file__).parent).with_suffix("").as_posix()
        item.add_marker(pytest.mark.xdist_group(group))
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: (not servers(item), item.path.parent.name != "jobs"))


@pytest.fixture(scope="session")
def s3(request: pytest.FixtureRequest) -> Iterator[str]:
    """Prefix of a bucket on a real S3 server; the environment points AWS clients, children's too, at it.

    It is the stack's server where some test of the session wants the stack, and one of its own where none does.
    """
    from pipeline.storage import make_bucket

    shared = any("stack" in servers(item) for item in request.session.items)
    try:
        with contextlib.ExitStack() as left, pytest.MonkeyPatch.context() as patch:
            stack = request.getfixturevalue("stack") if shared else None
            environment = stack.s3_environment if stack else left.enter_context(s3_server()).environment
            for name, value in environment.items():
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
            refused = jobs("stack", "up", "--folder", str(running.folder), "--fault-proxy")
            assert (refused.returncode, "in memory" in refused.stderr) == (6, True), refused.stderr
    except ConfigError as error:
        pytest.skip(str(error))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
