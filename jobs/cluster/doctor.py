"""What is wrong, one line a thing, each with its cure: versions, job server, S3, MLflow, disk, memory, GPUs.

Every check is made from this machine.
"""

from __future__ import annotations

import base64
import importlib.metadata
import os
import platform
import secrets
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import psutil

from pipeline.errors import ConfigError, ConflictError, DataError, PipelineError, RemoteError
from pipeline.storage import open_storage

PINNED = ("ray", "mlflow", "torch", "s3fs")
DISK_GB, MEMORY_GB = 5.0, 1.0
"""Below these a node cannot hold a shard cache, or a worker."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a check came to."""

    name: str
    text: str
    code: int = 0
    """Exit code of what is wrong; 0 where nothing is."""

    def __str__(self) -> str:
        return f"{'ok ' if not self.code else 'BAD'} {self.name:12} {self.text}"


def findings(address: str, storage: str, uri: str) -> Iterator[Finding]:
    """Check what this machine sees, whatever was found before."""
    yield checked("versions", versions)
    yield checked("disk", disk)
    yield checked("memory", memory)
    yield checked("gpus", gpus)
    yield checked("ray", lambda: ray(address))
    if storage:
        yield (found := checked("s3", lambda: write_and_read(storage)))
        if not found.code:
            yield checked("s3 create", lambda: create_once(storage))
    if uri:
        yield checked("mlflow", lambda: mlflow(uri))


def checked(name: str, check: Callable[[], str]) -> Finding:
    """The finding of one check, whatever it raises."""
    try:
        return Finding(name=name, text=check())
    except PipelineError as error:
        return Finding(name=name, text=str(error), code=error.exit_code)
    except Exception as error:  # noqa: BLE001 - a doctor that falls ill helps nobody
        return Finding(name=name, text=f"{type(error).__name__}: {error}".splitlines()[0], code=1)


def versions() -> str:
    """Python and the packages whose versions must be the same everywhere."""
    known = [f"{name} {importlib.metadata.version(name)}" for name in PINNED]
    return f"python {platform.python_version()}, {', '.join(known)}"


def disk() -> str:
    """Room for temporary files and the shard cache."""
    free = shutil.disk_usage(tempfile.gettempdir()).free / 1e9
    if free < DISK_GB:
        raise ConfigError(f"{free:.1f} GB free", where=tempfile.gettempdir(),
                          cure=f"{DISK_GB:.0f} GB are needed: remove files, or set TMPDIR")  # fmt: skip
    return f"{free:.0f} GB free in {tempfile.gettempdir()}"


def memory() -> str:
    """Memory that can be had."""
    free = psutil.virtual_memory().available / 1e9
    if free < MEMORY_GB:
        raise ConfigError(f"{free:.1f} GB available", cure=f"a worker needs {MEMORY_GB:.0f} GB: end other programs")
    return f"{free:.0f} GB available"


def gpus() -> str:
    """GPUs and NCCL as torch sees them."""
    import torch
    from torch.cuda import nccl

    if not torch.cuda.is_available():
        return "none; training runs on the CPU"
    names = ", ".join(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count()))
    if not torch.distributed.is_nccl_available():
        raise ConfigError(f"{names}, and torch has no NCCL", cure="install a CUDA build of torch")
    return f"{names}; NCCL {'.'.join(map(str, nccl.version()))}"


def ray(address: str) -> str:
    """The job server: reached, with our token, of our version."""
    from jobs.cluster.jobs import connect

    client = connect(address)
    theirs, ours = client.version(), importlib.metadata.version("ray")
    if theirs != ours:
        raise ConfigError(f"the cluster runs Ray {theirs}, this is {ours}", where=client.address,
                          cure=f"pip install 'ray[default,train]=={theirs}'")  # fmt: skip
    return f"{client.address} runs Ray {theirs} and lets us in"


def write_and_read(prefix: str) -> str:
    """An object comes back as it went."""
    storage, key, data = open_storage(prefix), f"doctor/{secrets.token_hex(8)}", secrets.token_bytes(1 << 16)
    storage.write(key, data)
    try:
        if storage.read(key) != data:
            raise DataError("an object comes back changed", where=storage.where(key), cure="do not use this store")
    finally:
        storage.remove(key)
    return f"{storage.url} can be written and read"


def create_once(prefix: str) -> str:
    """A second conditional write of a key is refused; commits and promotions stand on it."""
    storage, key = open_storage(prefix), f"doctor/{secrets.token_hex(8)}"
    try:
        storage.create(key, b"first")
        try:
            storage.create(key, b"second")
        except ConflictError:
            return f"{storage.url} refuses to create what exists"
    finally:
        storage.remove(key)
    raise ConfigError("the store ignores If-None-Match", where=storage.url,
                      cure="use one that honours it (S3, Ceph 16 or newer), or writers undo one another")  # fmt: skip


def mlflow(uri: str) -> str:
    """The tracking server: reached, of our version, and we may log in."""
    if not uri.startswith("http"):
        return f"{uri.partition(':')[0]} here, no server"
    theirs, ours = _get(uri, "/version").decode(), importlib.metadata.version("mlflow")
    _get(uri, "/api/2.0/mlflow/experiments/get-by-name?experiment_name=Default")
    if theirs.split(".")[:2] != ours.split(".")[:2]:
        raise ConfigError(f"the server is MLflow {theirs}, this is {ours}", where=uri,
                          cure=f"pip install 'mlflow=={theirs}'")  # fmt: skip
    return f"{uri} runs MLflow {theirs} and lets us in"


def _get(uri: str, path: str) -> bytes:
    login = f"{os.environ.get('MLFLOW_TRACKING_USERNAME', '')}:{os.environ.get('MLFLOW_TRACKING_PASSWORD', '')}"
    headers = {"Authorization": "Basic " + base64.b64encode(login.encode()).decode()} if login != ":" else {}
    try:
        request = urllib.request.Request(uri.rstrip("/") + path, headers=headers)
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.read()
    except urllib.error.HTTPError as error:
        cures = {401: "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
                 403: "add this host to the server's --allowed-hosts, or check the password"}  # fmt: skip
        cure = cures.get(error.code, "check the address")
        raise RemoteError(f"answers {error.code}", where=uri, cure=cure) from error
    except (OSError, ValueError) as error:
        raise RemoteError("does not answer", where=uri, cure="start it, or correct MLFLOW_TRACKING_URI") from error
