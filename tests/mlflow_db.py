"""A real MLflow database for a test: made once a session (it costs seconds), copied for each test."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import pytest

from pipeline.mlflow_server import connect

MLFLOW_NOISE = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")
"""What MLflow 3.17 itself raises under SQLAlchemy 2.1."""


def fresh_database(folder: Path) -> str:
    """Tracking URI of an empty MLflow in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(_template(), folder / "mlflow.db")
    return f"sqlite:///{folder}/mlflow.db"


@functools.cache
def _template() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="glow-test-mlflow-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    connect(f"sqlite:///{folder}/mlflow.db").search_experiments()
    return folder / "mlflow.db"
