"""`mlflow models serve`, as it comes with MLflow, answers with the champion's images."""

from __future__ import annotations

import json
import os
import signal
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from jobs.stack.processes import belonging, end, free_ports, inherited, listening, spawn
from pipeline.registry import ModelRegistry, load_model
from tests.mlflow_db import MLFLOW_NOISE, fresh_database
from tests.pipeline.test_tracking import wait_for
from tests.pipeline.versions import promoted, register, saying

pytestmark = MLFLOW_NOISE


@pytest.mark.nightly
def test_mlflow_models_serve_answers_with_the_champions_images(tmp_path: Path) -> None:
    registry = ModelRegistry(fresh_database(tmp_path))
    register(registry, tmp_path / "m")
    promoted(registry, 1, saying(2.0, 2.1))
    (port,) = free_ports(1)
    command = [
        sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/faces@champion",
        "--env-manager", "local", "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip
    known = {"MLFLOW_TRACKING_URI": registry.uri, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    environment = {**inherited(), **known, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    server = spawn(command, tmp_path / "server.out", environment, end_with_parent=True)
    try:
        wait_for(lambda: listening(port))
        params = {"attributes": "+Smiling,-Eyeglasses", "temperature": 0.9, "seed": 5, "count": 3, "label": 1}
        asked = json.dumps({"inputs": [], "params": params}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations", asked, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=240) as answer:
            images = np.array(json.load(answer)["predictions"], dtype=np.uint8)
    finally:
        end(belonging([server], ""), signal.SIGKILL, 10)
    expected = load_model(str(tmp_path / "m")).sample([5, 6, 7], 0.9, "+Smiling,-Eyeglasses", 1)
    assert (images == expected.permute(0, 2, 3, 1).numpy()).all()
