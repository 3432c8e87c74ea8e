"""Secrets planted where a submitter keeps them, and a search of every place in which nobody may read them."""

from __future__ import annotations

import base64
import contextlib
import json
import subprocess
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from jobs.stack import postgres
from jobs.stack.processes import belonging, inherited
from jobs.stack.state import Stack
from tests.running import RunningStack

CANARY = "5ecre7-canary-d41d8cd98f"
DASHBOARD = (
    "/api/jobs/", "/api/version", "/api/cluster_status", "/api/component_activities", "/events",
    "/api/v0/actors?detail=true", "/api/v0/jobs?detail=true", "/api/v0/nodes?detail=true", "/api/v0/tasks?detail=true",
    "/api/v0/runtime_envs?detail=true", "/api/v0/workers?detail=true", "/api/v0/placement_groups?detail=true",
    "/api/v0/objects?detail=true", "/api/v0/tasks/timeline", "/logical/actors",
    "/nodes?view=summary",
)  # fmt: skip
"""What Ray's dashboard tells to who asks."""


def planted(home: Path) -> dict[str, str]:
    """Variables of somebody with secrets, and files in their home: all of it nobody's business."""
    files = {
        ".aws/credentials": f"[other]\naws_access_key_id=x\naws_secret_access_key={CANARY}-aws\n",
        ".mlflow/credentials": f"[mlflow]\nmlflow_tracking_username=me\nmlflow_tracking_password={CANARY}-mlflow\n",
        ".netrc": f"machine example.org login me password {CANARY}-netrc\n",
    }
    for name, text in files.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text)
        (home / name).chmod(0o600)
    return {name: f"{CANARY}-{name}" for name in ("HF_TOKEN", "WANDB_API_KEY", "RAY_AUTH_TOKEN_OF_OTHERS")}


def refuse_secrets(running: RunningStack, run: str) -> None:
    """AssertionError if a secret of the stack or of the submitter can be read where a run of it left traces."""
    secrets = {name: value for name, value in running.stack.credentials.items() if name != "s3_access_key"}
    login = f"admin:{secrets['mlflow_password']}".encode()
    sought = {"canary": CANARY.encode(), "login": base64.b64encode(login).rstrip(b"="),
              **{name: value.encode() for name, value in secrets.items()}}  # fmt: skip
    found, traces = [], set()
    for place, data in places(running):
        found += [(place, name) for name, secret in sought.items() if secret in data]
        if run.encode() in data:
            traces.add(place.partition(" ")[0])
    assert not found
    assert traces >= {"dashboard", "database", "files", "s3"}, "what has no trace of the run was not searched"


def places(running: RunningStack) -> Iterator[tuple[str, bytes]]:
    """(kind and name, content) of all that can be read of the stack and its jobs, but its own private files."""
    stack = running.stack
    yield from dashboard(stack)
    yield "database mlflow", dump(stack)
    for log in (*stack.logs.rglob("*"), *stack.scratch.glob("ray/*/session_2*/**/*")):
        if log.is_file() and not log.is_symlink():
            yield f"files {log}", read(log)
    for process in belonging(stack.state.processes.values(), stack.state.mark):
        yield f"commands {process.pid}", read(Path(f"/proc/{process.pid}/cmdline"))
    yield from bucket(running)


def read(path: Path) -> bytes:
    """A file, empty where it has gone meanwhile: what is searched is at work."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return path.read_bytes()
    return b""


def dashboard(stack: Stack) -> Iterator[tuple[str, bytes]]:
    """What the dashboard says of everything, and of each job: how it is, and its log."""
    jobs = [entry["submission_id"] for entry in json.loads(asked(stack, "/api/jobs/")) if entry["submission_id"]]
    assert jobs
    each = [path for job in jobs for path in (f"/api/jobs/{job}", f"/api/jobs/{job}/logs")]
    for path in (*DASHBOARD, *each):
        yield f"dashboard {path}", asked(stack, path)


def asked(stack: Stack, path: str) -> bytes:
    """What Ray's dashboard answers to who has the token."""
    bearer = {"Authorization": f"Bearer {stack.credentials['ray_token']}"}
    request = urllib.request.Request(stack.url("dashboard") + path, headers=bearer)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return answer.read()


def dump(stack: Stack) -> bytes:
    """MLflow's whole database: params, tags, metrics, models, and who may do what."""
    address = ["-h", "127.0.0.1", "-p", str(stack.state.ports["postgres"]), "-U", "glow"]
    environment = {**inherited(), "PGPASSWORD": stack.credentials["postgres_password"]}
    commands = [[str(postgres.program("pg_dump")), *address, name] for name in ("mlflow", "mlflow_auth")]
    done = [subprocess.run(words, env=environment, capture_output=True, check=True) for words in commands]
    return b"".join(each.stdout for each in done)


BUCKET = """
from pathlib import Path
from pipeline.storage import open_storage
storage = open_storage("s3://glow")
for key in storage.list():
    path = Path({folder!r}, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.download(key, path)
"""


def bucket(running: RunningStack) -> Iterator[tuple[str, bytes]]:
    """Every object in S3: run folders, registry, MLflow's artifacts."""
    with tempfile.TemporaryDirectory() as folder:
        done = running.python(BUCKET.format(folder=folder))
        assert done.returncode == 0, done.stderr
        for path in Path(folder).rglob("*"):
            if path.is_file():
                yield f"s3 {path.relative_to(folder)}", path.read_bytes()
