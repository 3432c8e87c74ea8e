"""The road from pictures to a champion on the whole system, by the commands of the README; and what must not go it."""

from __future__ import annotations

import http.server
import json
import re
import threading
import time
import urllib.request
from pathlib import Path
from socket import AF_INET

import psutil
import pytest

from tests.running import RunningStack, jobs

SUBMIT = [
    "cluster", "submit", "toy32", "--name", "road", "--storage", "s3://glow/runs", "--data.prefix", "s3://glow/faces",
    "--cluster.workers", "2", "--model.levels", "2", "--model.steps", "2", "--model.width", "8",
    "--optim.decay", "constant", "--schedule.status-every", "160", "--schedule.checkpoint-every", "1000000",
    "--evaluate.every", "1000000", "--evaluate.images", "16",
]  # fmt: skip
FOR_EVER = ["--schedule.images", "1000000"]
CANARY = "5ecre7-canary-d41d8cd98f"


@pytest.fixture(scope="module")
def road(stack: RunningStack, tmp_path_factory: pytest.TempPathFactory) -> RunningStack:
    """The stack with a dataset in its S3."""
    faces = str(tmp_path_factory.mktemp("road") / "faces")
    stack.jobs("data", "toy", faces, "--images", "120", "--size", "16", "--workers", "1")
    stack.jobs("data", "prepare", faces, "s3://glow/faces", "--samples-per-shard", "32", "--workers", "1")
    return stack


def said(stack: RunningStack, job: str, words: str, seconds: float = 240) -> str:
    """The log of a job, as soon as `words` are in it."""
    deadline = time.monotonic() + seconds
    while words not in (log := stack.jobs("cluster", "logs", job).stdout):
        assert time.monotonic() < deadline, log
        time.sleep(1)
    return log


def dashboard(stack: RunningStack, path: str) -> str:
    bearer = {"Authorization": f"Bearer {stack.stack.credentials['ray_token']}"}
    with urllib.request.urlopen(urllib.request.Request(stack.stack.url("dashboard") + path, headers=bearer)) as answer:
        return answer.read().decode()


@pytest.mark.road
@pytest.mark.timeout(900)
def test_from_pictures_to_a_champion(road: RunningStack, tmp_path: Path) -> None:
    first = road.jobs(*SUBMIT, *FOR_EVER, CANARY=CANARY).stdout
    assert first.startswith("road-1: submitted")
    said(road, "road", "images 160/")
    assert "road-1 is at work" in road.jobs(*SUBMIT, *FOR_EVER, check=6).stderr
    stopped = re.search(r"stopped after a checkpoint at (\d+) images", road.jobs("cluster", "stop", "road").stdout)
    assert stopped
    assert "STOPPED   exit 143" in road.jobs("cluster", "status", "road").stdout
    images = int(stopped[1]) + 320
    again = road.jobs(*SUBMIT, "--schedule.images", str(images), "--follow").stdout
    assert "road-2: submitted" in again
    assert "images 160/" not in again, "it goes on from the checkpoint"
    assert f"images {images}/{images}" in again
    road.jobs("evaluate", "s3://glow/runs/road")
    road.jobs("models", "register", "s3://glow/runs/road", "--registry", "s3://glow/registry")
    road.jobs("models", "promote", "road", "1")
    road.jobs("latents", "sample", "models:/road@champion", "--out", str(tmp_path / "s.png"), "--rows", "1")
    assert (tmp_path / "s.png").stat().st_size > 0
    refuse_secrets(road)


def refuse_secrets(road: RunningStack) -> None:
    """No secret, and nothing of the submitter's environment, is anywhere it could be read."""
    secrets = [value for name, value in road.stack.credentials.items() if name != "s3_access_key"]
    listing = json.loads(dashboard(road, "/api/jobs/"))
    seen = {"jobs": json.dumps(listing)}
    for job in ("road-1", "road-2"):
        seen |= {job: road.jobs("cluster", "logs", job).stdout, f"{job} info": dashboard(road, f"/api/jobs/{job}")}
    program = "from pipeline.storage import open_storage as o\ns = o('s3://glow/runs/road')\n"
    program += "for k in s.list(): print(k, s.read(k))"
    seen["run"] = road.python(program).stdout
    for log in (*road.stack.logs.glob("*"), *road.stack.scratch.glob("ray/t/session_2*/logs/**/*")):
        if log.is_file():
            seen[str(log)] = log.read_text(errors="replace")
    found = [(place, index) for place, text in seen.items() for index, s in enumerate([*secrets, CANARY]) if s in text]
    assert not found
    assert len(seen["run"]) > 1000
    assert {entry["metadata"]["run"] for entry in listing if entry["submission_id"]} == {"road"}


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"RAY_AUTH_TOKEN_PATH": ""}, 3, "wants a token"),
        ({"RAY_AUTH_TOKEN": "0" * 64}, 7, "token is refused"),
        ({"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9"}, 7, "nobody answers"),
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, 7, "access refused"),
        ({"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}, 7, "MLflow does not answer"),
        ({"MLFLOW_TRACKING_URI": f"http://admin:{CANARY}@127.0.0.1:9"}, 3, "tracking.uri holds a password"),
    ],
)
def test_what_cannot_work_is_one_line_and_its_exit_code(
    road: RunningStack, change: dict[str, str], code: int, words: str
) -> None:
    start = time.monotonic()
    refused = road.jobs(*SUBMIT, check=code, **change)
    assert time.monotonic() < start + 50  # 10 s on a machine that does nothing else
    assert words in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert CANARY not in refused.stderr


def test_an_open_ray_elsewhere_is_refused(tmp_path: Path) -> None:
    """A job server without a token, at an address that is not this machine's loopback."""
    every = (entry for entries in psutil.net_if_addrs().values() for entry in entries)
    known = [entry.address for entry in every if entry.family == AF_INET]
    here = next((address for address in known if not address.startswith("127.")), "")
    if not here:
        pytest.skip("this machine has no address but the loopback")
    server = http.server.HTTPServer((here, 0), http.server.SimpleHTTPRequestHandler)
    (tmp_path / "api").mkdir()
    (tmp_path / "api" / "version").write_text("{}")
    server.RequestHandlerClass = lambda *args: http.server.SimpleHTTPRequestHandler(*args, directory=str(tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        refused = jobs("cluster", "status", "--address", f"http://{here}:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()
    assert refused.returncode == 3
    assert "takes jobs from anybody" in refused.stderr
