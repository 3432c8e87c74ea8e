"""The sqlite database MLflow keeps is there whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from pipeline.mlflow_server import connect
from tests.mlflow_db import MLFLOW_NOISE

pytestmark = MLFLOW_NOISE
CONNECT = "import sys; from pipeline.mlflow_server import connect; connect(sys.argv[1]).search_experiments()"


def test_a_kill_while_the_database_is_made_leaves_none_or_a_whole_one(tmp_path: Path) -> None:
    """Killed when the first byte of it is written, half a second later, and when it has appeared."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    for moment in ("draft", "later", "there"):
        process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", CONNECT, uri], start_new_session=True)
        pattern = "mlflow.db" if moment == "there" else ".mlflow-*/made.db"
        before = set(tmp_path.glob(pattern))
        while process.poll() is None and set(tmp_path.glob(pattern)) <= before:
            time.sleep(0.005)
        time.sleep(0.5 * (moment == "later"))
        process.kill()
        process.wait()
        assert (moment == "there") == (tmp_path / "mlflow.db").exists()
    assert [each.name for each in connect(uri).search_experiments()] == ["Default"]


def test_two_who_make_it_at_once_share_one(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    command = [sys.executable, "-W", "ignore", "-c", CONNECT, uri]
    both = [subprocess.Popen(command), subprocess.Popen(command)]
    assert [process.wait(120) for process in both] == [0, 0]
    assert os.listdir(tmp_path) == ["mlflow.db"]
