"""A connection to Ray, or Ray itself for as long as it is needed; nothing of it stays.

Ray is imported inside functions: its core reads the variables of `_environment` once, when it is first imported.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import logging
import os
import secrets
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

import psutil

from pipeline.config import ClusterConfig
from pipeline.errors import ConfigError, Interrupted, RemoteError
from pipeline.scratch import scratch

SIGNALS = (signal.SIGTERM, signal.SIGINT)

ENVIRONMENT = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # How long Ray looks for room for as many workers as there were before it counts the nodes again.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": "300",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # a relative path means the same on a worker as here
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_JOB_STOP_WAIT_TIME_S": "120",  # between SIGTERM and SIGKILL of a stopped job: it commits a checkpoint
}
"""What Ray reads at start; every variable is put back afterwards."""

KNOCK_SECONDS = 5.0
"""How long a head may take to be connected to, and again to answer."""

CURE = "start the cluster, or name its head: --cluster.address HOST:PORT"

HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
"""What a client of HTTP/2, so of gRPC, says first; the answer is a frame of settings (type 4) as well."""


class HeadLostError(RemoteError):
    """Ray's head was there and is gone."""


@contextlib.contextmanager
def started(cluster: ClusterConfig) -> Iterator[Path]:
    """Ray, connected or started here, and a folder for what it writes; all of it gone afterwards."""
    knock(os.environ.get("RAY_ADDRESS", "auto") if cluster.address == "auto" else cluster.address)
    others = set(psutil.Process().children(recursive=True))
    quiet = contextlib.redirect_stdout(io.StringIO())
    with _signals_kept(), scratch(short_folder()) as folder, _environment(cluster, folder), quiet:
        import ray

        try:
            _connect(cluster, folder)
            _unwind_on_signals()
            yield folder / "train"
        finally:
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)  # what is being torn down is torn down
            ours = set(psutil.Process().children(recursive=True)) - others
            if cluster.address and isinstance(error := sys.exception(), HeadLostError):
                # Without its head Ray's core takes 5 s to shut down, may end this process with 1 meanwhile, and
                # left alone faults in its destructors: so this process is to end without them.
                atexit.register(_leave, error.exit_code)
            else:
                ray.shutdown()
            _reap(ours)


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def knock(address: str, seconds: float = KNOCK_SECONDS) -> None:
    """RemoteError where no head answers: `ray.init` would wait for one for ever, and has no limit to set."""
    if address in ("", "auto"):
        return  # Ray is started here, or looks itself for one that runs here
    try:
        place = urlsplit(address if "://" in address else f"ray://{address}")
        host, port = place.hostname, place.port
    except ValueError:
        host = port = None
    if not host or not port:
        raise ConfigError("not the address of a Ray head", where=address, cure="HOST:PORT, or auto")
    try:
        with socket.create_connection((host, port), seconds) as connection:
            if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
                return  # what listens is left to Ray
            connection.sendall(HELLO)
            answer = connection.recv(9)
    except OSError as error:
        raise RemoteError(f"no Ray head answers ({error})", where=address, cure=CURE) from error
    if answer[3:4] != b"\4":
        raise RemoteError("what answers is no Ray head", where=address, cure=CURE)


def refused(address: str, seconds: float = KNOCK_SECONDS) -> bool:
    """Whether nothing listens there any more; a head that is slow, or far away and silent, is none that is gone."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), seconds).close()
    except OSError as error:
        return isinstance(error, ConnectionRefusedError)
    return False


def _connect(cluster: ClusterConfig, folder: Path) -> None:
    import ray

    try:
        ray.init(**_place(cluster, folder), log_to_driver=False, logging_level=logging.CRITICAL)
    except ConnectionError as error:
        raise RemoteError("no Ray cluster found", where=cluster.address, cure=CURE) from error


def _place(cluster: ClusterConfig, folder: Path) -> dict[str, Any]:
    if cluster.address:
        return {"address": cluster.address}
    return {
        "address": "local",  # and never one that RAY_ADDRESS happens to name
        "num_cpus": max(cluster.workers, os.cpu_count() or 1),
        "include_dashboard": False,
        "object_store_memory": 100_000_000,
        "_node_ip_address": "127.0.0.1",
        "_temp_dir": str(folder),
    }


@contextlib.contextmanager
def _environment(cluster: ClusterConfig, folder: Path) -> Iterator[None]:
    """The variables Ray and its workers start with."""
    before = dict(os.environ)
    os.environ.update(ENVIRONMENT)
    # Without byte code every worker would parse torch anew: half a minute on two cores.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["OMP_NUM_THREADS"] = str(cluster.threads)
    if not cluster.address:
        os.environ["RAY_AUTH_TOKEN"] = _token()
        (folder / "tmp").mkdir()
        os.environ["TMPDIR"] = str(folder / "tmp")  # what a killed worker leaves goes with the rest
    known = "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ
    # Left to itself Ray decides one way in the head and another in who connects.
    os.environ.setdefault("RAY_AUTH_MODE", "token" if known else "disabled")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@functools.cache
def _token() -> str:
    """The secret of the clusters this process starts; Ray's core reads it once a process."""
    return secrets.token_hex(32)


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Whatever Ray does to signal handlers, and we after it, is undone."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _unwind_on_signals() -> None:
    """The first SIGTERM or SIGINT becomes an error that unwinds; more of them change nothing."""

    def stop(number: int, frame: FrameType | None) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise Interrupted("stopped by SIGTERM", cure="the same command goes on from the last checkpoint")

    for number in SIGNALS:
        signal.signal(number, stop)


def _reap(processes: set[psutil.Process]) -> None:
    """Wait for the processes Ray started; end by pid those it left."""
    _, left = psutil.wait_procs(processes, timeout=5)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=5)


def short_folder() -> str:
    """The folder for temporary files, or /tmp where that is too long: of a socket's 107 bytes Ray takes 64."""
    usual = tempfile.gettempdir()
    return usual if len(usual) <= 23 else "/tmp"
