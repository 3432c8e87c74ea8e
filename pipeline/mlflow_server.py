"""An MLflow server, or a database in its place: how it is reached, where it keeps things, its errors in a line."""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import queue
import shutil
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import ConfigError, RemoteError, UsageError, redact

if TYPE_CHECKING:
    from mlflow import MlflowClient

SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")
"""How addresses begin at which MLflow keeps runs and models."""

PATIENCE = 5.0
"""Seconds an MLflow may take to say that it is there, before a run is begun."""


def connect(uri: str) -> MlflowClient:
    """A client whose calls give up after seconds; MLflow's own defaults wait for four minutes."""
    for name, value in (("MAX_RETRIES", "2"), ("TIMEOUT", "30"), ("BACKOFF_FACTOR", "1")):
        os.environ.setdefault(f"MLFLOW_HTTP_REQUEST_{name}", value)  # MLflow offers no other way
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    refuse_odd(uri)
    from mlflow import MlflowClient

    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in ("urllib3.connectionpool", "mlflow.system_metrics.system_metrics_monitor"):
        logging.getLogger(name).setLevel(logging.ERROR)  # an outage is an event of the run, said once
    uri = absolute_uri(uri)
    _lay_database(uri)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def refuse_odd(uri: str) -> None:
    """UsageError for what MLflow takes for no address, or for a folder of files, which it no longer writes."""
    if uri.partition("://")[0].partition("+")[0] not in SCHEMES:
        raise UsageError("not an MLflow address", where=uri, cure="http://HOST:PORT or sqlite:///FILE")


def _lay_database(uri: str) -> None:
    """Make a missing sqlite database aside, then put it in place: MLflow cannot open one whose making was cut off."""
    from mlflow import MlflowClient

    path = Path(uri.removeprefix("sqlite:///"))
    if not uri.startswith("sqlite:////") or path.exists():
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot be made ({error.strerror})", where=uri, cure="name another file") from error
    with tempfile.TemporaryDirectory(prefix=".mlflow-", dir=path.parent) as draft:
        MlflowClient(tracking_uri=f"sqlite:///{draft}/made.db", registry_uri=f"sqlite:///{draft}/made.db")
        shutil.copyfile(f"{draft}/made.db", f"{draft}/whole.db")
        with contextlib.suppress(FileExistsError):
            os.link(f"{draft}/whole.db", path)


def default_uri() -> str:
    """Where MLFLOW_TRACKING_URI points, as for every MLflow client."""
    return os.environ.get("MLFLOW_TRACKING_URI", "")


def absolute_uri(uri: str) -> str:
    """A sqlite URI with a path relative to here -> with an absolute one; others as they are."""
    path = uri.removeprefix("sqlite:///")
    return uri if path == uri or path.startswith("/") else f"sqlite:///{Path(path).absolute()}"


def database_folder(uri: str) -> Path | None:
    """The folder of a sqlite database, which also takes artifacts and the registry's ledger; None for servers."""
    uri = absolute_uri(uri)
    return Path(uri.removeprefix("sqlite:///")).parent if uri.startswith("sqlite:") else None


def refuse_silent(uri: str) -> None:
    """RemoteError if no MLflow answers at an http address; what it thinks of our password is told when it is used.

    A limit on all of it: a name server and one who answers byte by byte have patience of their own.
    """
    if uri:
        refuse_odd(uri)
    if not uri.startswith("http"):
        return
    said: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=lambda: said.put(_fault(uri)), daemon=True).start()
    try:
        fault = said.get(timeout=PATIENCE)
    except queue.Empty:
        fault = f"nothing within {PATIENCE:.0f} s"
    if fault:
        cure = "start it, or go on with --offline: what it missed is sent by the next run or command that reaches it"
        raise RemoteError(f"MLflow does not answer ({fault})", where=uri, cure=cure)


def _fault(uri: str) -> str:
    """What is wrong with whoever should answer, in a word; nothing where it answers."""
    try:
        urllib.request.urlopen(redact(uri).rstrip("/") + "/health", timeout=PATIENCE).close()
    except urllib.error.HTTPError as error:
        return f"status {error.code}" if error.code >= 500 else ""
    except (OSError, ValueError, http.client.HTTPException) as error:
        return type(getattr(error, "reason", error)).__name__
    return ""


PLAIN = (
    # what MLflow says         what it means                what to do
    ("Max retries exceeded", "MLflow does not answer", "start it, or correct MLFLOW_TRACKING_URI"),
    ("error code 401", "MLflow does not let us in", "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
)  # fmt: skip
"""Messages that are pages of machinery around one fact."""


@contextlib.contextmanager
def translated(uri: str) -> Iterator[None]:
    """Turn MLflow's exceptions into ours: what does not exist is a usage error, the rest a remote one."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        message = redact(str(error)).splitlines()[0][:300]
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise UsageError(message, where=uri) from error
        for sign, what, cure in PLAIN:
            if sign in message:
                raise RemoteError(what, where=uri, cure=cure) from error
        raise RemoteError(message, where=uri, cure="check the MLflow address and server") from error
