"""The services of a stack: how each is started and how one knows that it is well.

Secrets go to services through their environment or through files their owner alone may read, never through a command
line. Everything listens on the loopback, except Ray's nodes: they talk to one another by the machine's address, where
they answer the holder of the token alone.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

from jobs.stack import ceph, postgres
from jobs.stack.processes import Process, fate, listening, spawn
from jobs.stack.state import RAY_PORTS, Stack, write_private
from pipeline.errors import ConfigError, PipelineError, RemoteError
from pipeline.storage import checked_endpoint

START_SECONDS = 180


def refuse_missing(stack: Stack) -> None:
    """ConfigError naming the first thing that is not installed, and the command that installs it."""
    if not sys.platform.startswith("linux"):
        raise ConfigError("the stack needs Linux", cure="use containers or a virtual machine")
    if stack.state.options.s3:
        _refuse_silent(stack.state.options.s3)
    else:
        ceph.refuse_missing()
    postgres.program("initdb")
    if any(importlib.util.find_spec(module) is None for module in ("psycopg2", "flask_wtf")):
        raise ConfigError("MLflow's server lacks its database driver or its logins",
                          cure="pip install 'glow-pipeline[stack]'  (here: pip install -e '.[stack]')")  # fmt: skip


def _refuse_silent(endpoint: str) -> None:
    if not ceph.answers(checked_endpoint(endpoint, "--s3")):
        raise RemoteError("nobody answers", where=endpoint, cure="check the endpoint given as --s3")


def start_s3(stack: Stack) -> None:
    """Ceph, its data in memory."""
    known = stack.credentials

    def start(name: str, command: Sequence[str | Path]) -> Process:
        return _spawn(stack, name, command, {})

    folder = stack.scratch / "s3"
    folder.mkdir(mode=0o700)
    ceph.start(folder, stack.state.ports["s3"], known["s3_access_key"], known["s3_secret_key"], start)


def start_faults(stack: Stack) -> None:
    """The proxy in front of S3 that makes it fail to order."""
    script = Path(__file__).with_name("faults.py")
    # -P: the folder of a script would otherwise come first among the places modules are found in.
    command = [sys.executable, "-P", script, str(stack.state.ports["faults"]), stack.s3]
    _until_well(stack, "faults", _spawn(stack, "faults", command, {}))


def start_postgres(stack: Stack) -> None:
    """PostgreSQL with MLflow's two databases; on the data there is, or on new."""
    data, port, password = stack.scratch / "postgres", stack.state.ports["postgres"], _password(stack)
    postgres.initialise(data, password)
    _until_well(stack, "postgres", _spawn(stack, "postgres", postgres.server(data, port), {}, user=postgres.owner()))
    for database in ("mlflow", "mlflow_auth"):
        postgres.create(database, port, password)


def start_mlflow(stack: Stack) -> None:
    """MLflow on PostgreSQL and S3: artifacts go through it, and everyone logs in."""
    port, base = stack.state.ports["mlflow"], f"postgresql+psycopg2://{postgres.USER}:{_password(stack)}@127.0.0.1"
    database = f"{base}:{stack.state.ports['postgres']}"
    settings = stack.folder / "mlflow-auth.ini"
    # To check a password costs 0.1 s of CPU: without the cache that is what most requests would do.
    lines = ["[mlflow]", "default_permission = NO_PERMISSIONS", "admin_username = admin", "auth_cache_ttl_seconds = 60"]
    write_private(settings, "\n".join([*lines, f"database_uri = {database}/mlflow_auth", ""]))
    extra = {
        **stack.access["s3"],
        "MLFLOW_BACKEND_STORE_URI": f"{database}/mlflow",
        "MLFLOW_AUTH_CONFIG_PATH": str(settings),
        "MLFLOW_AUTH_ADMIN_PASSWORD": stack.credentials["mlflow_password"],
        "MLFLOW_FLASK_SERVER_SECRET_KEY": stack.credentials["mlflow_key"],
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "GIT_PYTHON_REFRESH": "quiet",
    }
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--app-name", "basic-auth", "--artifacts-destination", f"s3://{stack.state.options.bucket}/mlflow",
        "--allowed-hosts", f"127.0.0.1:{port},localhost:{port}",
    ]  # fmt: skip
    _until_well(stack, "mlflow", _spawn(stack, "mlflow", command, extra))


def start_ray(stack: Stack) -> None:
    """Ray's head and the worker nodes; the head does no work itself."""
    ports = stack.state.ports
    (stack.scratch / "ray").mkdir(mode=0o700, exist_ok=True)  # Ray lets everyone into its own folders
    nodes = [name for name in stack.state.options.services if name.startswith("ray-node")]
    head = [
        "--head", "--num-cpus=0", f"--port={ports['gcs']}", f"--ray-client-server-port={ports['client']}",
        "--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={ports['dashboard']}",
    ]  # fmt: skip
    leader = _ray_node(stack, "ray-head", head)
    # Who joins asks for the head's own node, and gives up when that is long in coming.
    _wait(lambda: listening(ports["ray-head.node-manager"]), leader, "ray-head", stack)
    joining = ["--num-cpus=1", f"--address=127.0.0.1:{ports['gcs']}"]
    members = {name: _ray_node(stack, name, joining) for name in nodes}
    _until_well(stack, "ray-head", leader)
    for name, member in members.items():
        _until_well(stack, name, member)


MAKE_BUCKET = """
import sys
from pipeline.errors import PipelineError
from pipeline.storage import make_bucket
try:
    make_bucket(sys.argv[1])
except PipelineError as error:
    sys.exit(str(error))
"""


def make_bucket(stack: Stack) -> None:
    """The bucket, past the proxy, by a process of its own: this one's environment is not the stack's."""
    environment = {**stack.environment("s3"), "AWS_ENDPOINT_URL": stack.s3}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", MAKE_BUCKET, stack.state.options.bucket]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise RemoteError(f"no bucket: {said}", where=stack.s3)


STARTS: dict[str, Callable[[Stack], None]] = {
    "s3": start_s3,
    "faults": start_faults,
    "bucket": make_bucket,
    "postgres": start_postgres,
    "mlflow": start_mlflow,
    "ray": start_ray,
}
"""What is started as a whole."""


def part_of(service: str) -> str:
    """The part of the stack a service is started with."""
    return {"ceph": "s3", "ray": "ray"}.get(service.partition("-")[0], service)


def well(stack: Stack, service: str) -> bool:
    """Whether a service's own process runs and does what it is there for."""
    process, ports = stack.state.processes.get(service), stack.state.ports
    if process is None or not process.alive:
        return False
    if service == "s3":
        return ceph.answers(stack.url("s3"))
    if service == "faults":
        return listening(ports["faults"])
    if service == "postgres":
        return postgres.answers(ports["postgres"])
    if service == "mlflow":
        return _status(stack.url("mlflow") + "/health") == 200
    if service == "ray-head":
        bearer = {"Authorization": f"Bearer {stack.credentials['ray_token']}"}
        return _status(stack.url("dashboard") + "/api/version", bearer) == 200
    return listening(ports[f"{service}.dashboard-agent-listen"]) if service.startswith("ray-") else True


def ray_folder(stack: Stack, name: str) -> Path:
    """Where a Ray node keeps its sockets and its own logs; short, for the sockets' sake."""
    return stack.scratch / "ray" / name.removeprefix("ray-")


def _ray_node(stack: Stack, name: str, extra: Sequence[str]) -> Process:
    from jobs.cluster import ENVIRONMENT

    ports = [f"--{port}-port={stack.state.ports[f'{name}.{port}']}" for port in RAY_PORTS]
    common = ["--node-ip-address=127.0.0.1", "--object-store-memory=100000000", "--disable-usage-stats", "--block"]
    environment = {
        # A job is `python -m jobs ...`: the Python that runs the cluster is the one that runs its jobs.
        "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",
        **stack.access["s3"],
        **stack.access["mlflow"],
        **stack.access["ray"],
        **ENVIRONMENT,
        # A broken node is gone after seconds, not half a minute.
        "RAY_health_check_failure_threshold": "3",
    }
    # Nodes of one folder that start at the same time choose the same names for their sockets, and one dies of it.
    place = f"--temp-dir={ray_folder(stack, name)}"
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", *common, place, *ports, *extra]
    return _spawn(stack, name, command, environment)


def _spawn(stack: Stack, name: str, command: Sequence[str | Path], extra: dict[str, str], user: str = "") -> Process:
    process = spawn(command, stack.logs / f"{name}.log", {**stack.environment(), **extra}, user=user)
    stack.record(name, process)
    return process


def _until_well(stack: Stack, name: str, process: Process) -> None:
    _wait(lambda: well(stack, name), process, name, stack)


def _wait(ready: Callable[[], bool], process: Process, name: str, stack: Stack) -> None:
    end = time.monotonic() + START_SECONDS
    while not ready():
        log = stack.logs / f"{name}.log"
        if not process.alive:
            ended = f"{name} ended at once {fate(process)}".rstrip()
            raise PipelineError(f"{ended}: {_last_word(stack, name)}", where=str(log))
        if time.monotonic() > end:
            raise PipelineError(f"{name} is not well after {START_SECONDS} s", where=str(log))
        time.sleep(0.2)


def _last_word(stack: Stack, name: str) -> str:
    """The last error of a service's log, or its last line; a Ray node may have said more in one of Ray's own."""
    logs = [stack.logs / f"{name}.log"]
    if name.startswith("ray-"):
        own = ray_folder(stack, name).glob("session_2*/logs/*")
        own = (log for log in own if log.suffix == ".err" or log.name == "ray_process_exit.log")
        logs += sorted(own, key=lambda log: log.stat().st_mtime, reverse=True)
    said = [_last_error(lines) for log in logs if (lines := log.read_text(errors="replace").strip().splitlines())]
    return " | ".join(said[:2]) or "it said nothing"


def _last_error(lines: Sequence[str]) -> str:
    errors = [line for line in lines if re.search("error|exception", line, re.IGNORECASE)]
    return (errors or lines)[-1].strip()[:200]


def _status(url: str, headers: dict[str, str] | None = None) -> int:
    """HTTP status of a GET; 0 where nobody answers."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers or {}), timeout=5) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def _password(stack: Stack) -> str:
    return stack.credentials["postgres_password"]
