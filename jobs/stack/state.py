"""What a stack is made of and where it stands, in its folder: `stack.json`, `credentials.json`, `env`.

`stack.json` names processes, ports and options and holds no secret; the other two can be read by their owner alone.
The folder belongs to the stack, with all in it: `down` removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shlex
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from jobs.stack.processes import MARK, Process, free_ports, inherited
from pipeline.errors import ConfigError, ConflictError

STATE, CREDENTIALS, ENV, LOCK = "stack.json", "credentials.json", "env", ".lock"

RAY_PORTS = ("object-manager", "node-manager", "dashboard-agent-listen", "dashboard-agent-grpc", "runtime-env-agent",
             "metrics-export")  # fmt: skip
"""Ports of every Ray node; the head has more."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What was asked for."""

    s3: str = ""
    """Endpoint of an S3 server there is; empty starts one."""
    bucket: str = "glow"
    nodes: int = 2
    """Ray worker nodes beside the head; 0 with `ray` off."""
    fault_proxy: bool = False
    ray: bool = True

    @property
    def services(self) -> tuple[str, ...]:
        """Names in the order they depend on each other."""
        own = () if self.s3 else ("ceph-mon", "ceph-osd", "s3")
        proxy = ("faults",) if self.fault_proxy else ()
        ray = ("ray-head", *(f"ray-node-{n}" for n in range(1, self.nodes + 1))) if self.ray else ()
        return (*own, *proxy, "postgres", "mlflow", *ray)


@dataclass(frozen=True, kw_only=True)
class State:
    """Everything `down` needs to know, whatever has died meanwhile."""

    mark: str
    scratch: str
    """Folder with a short name, for sockets and the database."""
    options: Options
    ports: dict[str, int]
    processes: dict[str, Process] = field(default_factory=dict)


class Stack:
    """A stack's folder, opened; services started from several threads are recorded one by one."""

    def __init__(self, folder: Path, state: State, credentials: Mapping[str, str]) -> None:
        self.folder, self.state, self.credentials = folder, state, dict(credentials)
        self._writing = threading.Lock()

    @property
    def scratch(self) -> Path:
        return Path(self.state.scratch)

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    def url(self, service: str) -> str:
        """Address of an HTTP service of the stack."""
        return f"http://127.0.0.1:{self.state.ports[service]}"

    @property
    def s3(self) -> str:
        """The S3 server itself."""
        return self.state.options.s3 or self.url("s3")

    def record(self, name: str, process: Process) -> None:
        """Remember a process, in the file before anything else happens."""
        with self._writing:
            self.state = replace(self.state, processes={**self.state.processes, name: process})
            write_private(self.folder / STATE, json.dumps(asdict(self.state), indent=1))

    def environment(self, *kinds: str) -> dict[str, str]:
        """What a service is started with: the little it inherits, the mark, and the credentials of these kinds."""
        chosen = {name: value for kind in kinds for name, value in self.access[kind].items()}
        # What a killed service leaves among temporary files goes with the stack.
        return {**inherited(), "TMPDIR": str(self.scratch / "tmp"), MARK: self.state.mark, **chosen}

    @property
    def access(self) -> dict[str, dict[str, str]]:
        """By kind (s3, mlflow, ray): the variables by which clients reach the stack."""
        known, options = self.credentials, self.state.options
        endpoint = self.url("faults") if options.fault_proxy else self.s3
        kinds = {
            "s3": aws_environment(endpoint, known["s3_access_key"], known["s3_secret_key"]),
            "mlflow": {
                "MLFLOW_TRACKING_URI": self.url("mlflow"),
                "MLFLOW_TRACKING_USERNAME": "admin",
                "MLFLOW_TRACKING_PASSWORD": known["mlflow_password"],
            },
            "ray": {},
        }
        if options.ray:
            token = str(self.folder / "token")
            kinds["ray"] = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": token}
        return kinds

    def write_access(self) -> None:
        """Write `env`, to be sourced, and Ray's token."""
        lines = {name: value for kind in self.access.values() for name, value in kind.items()}
        lines["GLOW_STORAGE"] = f"s3://{self.state.options.bucket}"
        if self.state.options.ray:
            write_private(self.folder / "token", self.credentials["ray_token"])
            lines["RAY_API_SERVER_ADDRESS"] = self.url("dashboard")
        text = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in lines.items())
        write_private(self.folder / ENV, text)


def aws_environment(endpoint: str, access_key: str, secret_key: str) -> dict[str, str]:
    """The variables by which AWS clients find a server that is not Amazon's and an account on it."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": access_key,
        "AWS_SECRET_ACCESS_KEY": secret_key,
        "AWS_DEFAULT_REGION": os.environ.get("AWS_DEFAULT_REGION", "us-east-1"),
        "AWS_REQUEST_CHECKSUM_CALCULATION": "WHEN_REQUIRED",  # newer clients' checksums are unknown to many servers
        "AWS_RESPONSE_CHECKSUM_VALIDATION": "WHEN_REQUIRED",
    }


def open_stack(folder: Path) -> Stack | None:
    """The stack of a folder, or None where there is none."""
    try:
        raw = json.loads((folder / STATE).read_bytes())
        credentials = json.loads((folder / CREDENTIALS).read_bytes())
    except FileNotFoundError:
        return None
    raw["options"] = Options(**raw["options"])
    raw["processes"] = {name: Process(**process) for name, process in raw["processes"].items()}
    return Stack(folder, State(**raw), credentials)


def new_stack(folder: Path, options: Options) -> Stack:
    """Choose ports, make secrets, write them down; nothing runs yet."""
    names = ["s3", "faults", "postgres", "mlflow", "gcs", "dashboard", "client"]
    hosts = ["ray-head", *(f"ray-node-{n}" for n in range(1, options.nodes + 1))]
    names += [f"{host}.{port}" for host in hosts for port in RAY_PORTS]
    scratch = tempfile.mkdtemp(prefix="glow-stack-", dir="/tmp")
    Path(scratch, "tmp").mkdir(mode=0o700)
    os.chmod(scratch, 0o711)  # the database's user passes through; the folders in it are private
    state = State(
        mark=secrets.token_hex(8),
        scratch=scratch,
        options=options,
        ports=dict(zip(names, free_ports(len(names)), strict=True)),
    )
    stack = Stack(folder, state, _new_credentials(options))
    write_private(folder / CREDENTIALS, json.dumps(stack.credentials, indent=1))
    write_private(folder / STATE, json.dumps(asdict(state), indent=1))
    stack.logs.mkdir(exist_ok=True)
    stack.write_access()
    return stack


def _new_credentials(options: Options) -> dict[str, str]:
    made = {
        "s3_access_key": secrets.token_hex(10).upper(),
        "s3_secret_key": secrets.token_hex(20),
        "postgres_password": secrets.token_hex(20),
        "mlflow_password": secrets.token_hex(12),
        "mlflow_key": secrets.token_hex(32),
        "ray_token": secrets.token_hex(32),
    }
    if options.s3:
        made["s3_access_key"] = os.environ.get("AWS_ACCESS_KEY_ID", "")
        made["s3_secret_key"] = os.environ.get("AWS_SECRET_ACCESS_KEY", "")
        if not made["s3_access_key"] or not made["s3_secret_key"]:
            raise ConfigError("no credentials for the S3 endpoint", where=options.s3,
                              cure="export AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")  # fmt: skip
    return made


def write_private(path: Path, text: str) -> None:
    """Write a file only its owner may read, whole or not at all."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".")  # mkstemp makes it 600
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    Path(temporary).replace(path)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One `up` or `down` of a folder at a time; the folder is made, and must be empty or a stack's."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConflictError("another `stack up` or `down` is at work", where=str(folder)) from None
        yield
