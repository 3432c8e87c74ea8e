"""What can be wrong on a machine, a client or a node: versions, disk, memory, GPUs, S3, MLflow; each with its cure."""

from __future__ import annotations

import base64
import contextlib
import importlib.metadata
import os
import platform
import secrets
import shutil
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from jobs.cluster.submission import digest
from pipeline.errors import ConfigError, ConflictError, DataError, PipelineError, RemoteError
from pipeline.storage import open_storage

PACKAGES = ("ray", "torch", "mlflow", "s3fs")
"""What must have one version everywhere, beside Python."""

DISK_GB, MEMORY_GB = 5.0, 1.0
"""Below these a machine cannot hold a shard cache, or a worker."""

CHECK_SECONDS = 45.0
"""What takes longer is stuck."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a check came to."""

    place: str
    name: str
    text: str
    code: int = 0
    """Exit code of what is wrong; 0 where nothing is."""
    made: bool = True
    """Whether the check was made at all."""

    def __str__(self) -> str:
        mark = "BAD" if self.code else "ok " if self.made else "-- "
        return f"{mark} {self.place:9} {self.name:9} {self.text}"


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked of a machine."""

    storage: str
    uri: str
    versions: dict[str, str]
    """The client's: every place is to have them."""
    code: str
    """Digest of the client's glow, pipeline and jobs."""


def question(storage: str, uri: str) -> Question:
    """What every machine is asked, by the measure of this one."""
    return Question(storage=storage, uri=uri, versions=versions(), code=digest())


def examined(place: str, asked: Question, gpus_offered: int = 0) -> Iterator[Finding]:
    """Check the machine this runs on, whatever was found before."""

    def check(name: str, ask: Callable[[], str]) -> Finding:
        return checked(place, name, ask)

    yield check("versions", lambda: same_versions(asked.versions))
    yield check("code", lambda: same_code(asked.code))
    yield check("disk", disk)
    yield check("memory", memory)
    yield check("gpus", lambda: gpus(gpus_offered))
    if asked.storage:
        yield (found := check("s3", lambda: write_and_read(asked.storage)))
        if not found.code:
            yield check("s3 create", lambda: create_once(asked.storage))
    else:
        yield Finding(place=place, name="s3", text="not checked: --storage s3://... or GLOW_STORAGE", made=False)
    if asked.uri:
        yield check("mlflow", lambda: mlflow(asked.uri))
    else:
        yield Finding(place=place, name="mlflow", text="not checked: --uri or MLFLOW_TRACKING_URI", made=False)


def checked(place: str, name: str, check: Callable[[], str], seconds: float = CHECK_SECONDS) -> Finding:
    """The finding of one check, whatever it raises, and if it says nothing."""
    found: list[Finding] = []
    thread = threading.Thread(target=lambda: found.append(_tried(place, name, check)), daemon=True)
    thread.start()
    thread.join(seconds)
    silent = RemoteError(f"no answer within {seconds:.0f} s", cure="look at the load there, and at the network")
    return found[0] if found else Finding(place=place, name=name, text=str(silent), code=silent.exit_code)


def _tried(place: str, name: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(place=place, name=name, text=check())
    except PipelineError as error:
        return Finding(place=place, name=name, text=str(error), code=error.exit_code)
    except Exception as error:  # noqa: BLE001 - a doctor that falls ill helps nobody
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        return Finding(place=place, name=name, text=text, code=1)


def versions() -> dict[str, str]:
    """Python's version and those of the packages that must agree; torch's without its build."""
    known = {name: importlib.metadata.version(name).partition("+")[0] for name in PACKAGES}
    return {"python": platform.python_version(), **known}


def same_versions(wanted: dict[str, str]) -> str:
    """Packages as the client has them, Python up to its last number."""
    found = versions()
    for name, version in wanted.items():
        if name == "python" and version.rpartition(".")[0] != found[name].rpartition(".")[0]:
            raise ConfigError(f"python {found[name]}, and the client has {version}",
                              cure="the same minor version everywhere")  # fmt: skip
        if name != "python" and version != found[name]:
            raise ConfigError(f"{name} {found[name]}, and the client has {version}",
                              cure=f"pip install '{name}=={version}' here, or {found[name]} there")  # fmt: skip
    return ", ".join(f"{name} {version}" for name, version in found.items())


def same_code(wanted: str) -> str:
    """This project as Python finds it here is the client's, byte for byte."""
    if (found := digest()) != wanted:
        raise ConfigError(f"imports glow, pipeline, jobs {found[:12]}, and the client has {wanted[:12]}",
                          cure="take other copies out of PYTHONPATH and site-packages")  # fmt: skip
    return f"glow-pipeline {found[:12]}"


def disk() -> str:
    """Room for temporary files and for the shard cache."""
    # A full TMPDIR is passed over by tempfile without a word.
    wanted = (os.environ.get("TMPDIR") or tempfile.gettempdir(), Path.home() / ".cache")
    room = {str(folder): shutil.disk_usage(folder).free / 1e9 for folder in map(_existing, map(Path, wanted))}
    for folder, free in room.items():
        if free < DISK_GB:
            cure = f"{DISK_GB:.0f} GB are needed: remove files, or set TMPDIR and --data.cache"
            raise ConfigError(f"{free:.1f} GB free", where=folder, cure=cure)
    return ", ".join(f"{free:.0f} GB free in {folder}" for folder, free in room.items())


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    return next(each for each in (folder, *folder.parents) if each.exists())


def memory() -> str:
    """Memory that can be had, of the machine and of this process's control group."""
    free = min(psutil.virtual_memory().available, _granted()) / 1e9
    if free < MEMORY_GB:
        cure = f"a worker needs {MEMORY_GB:.0f} GB: end other programs, or raise the pod's limit"
        raise ConfigError(f"{free:.1f} GB available", cure=cure)
    return f"{free:.0f} GB available"


def _granted() -> float:
    """Bytes a container's limit leaves (control groups, version 2); infinite without one."""
    root = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError, StopIteration):
        own = next(line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
        group = root / own.strip("/")
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return limit - used + int(counts["inactive_file"])
    return float("inf")


def gpus(offered: int) -> str:
    """GPUs as torch sees them, at least as many as Ray offers on this node, and NCCL."""
    import torch
    from torch.cuda import nccl

    seen = torch.cuda.device_count()
    if seen < offered:
        cure = "install NVIDIA's driver and a CUDA build of torch, or start the node with --num-gpus=0"
        raise ConfigError(f"Ray offers {offered} and torch {torch.__version__} sees {seen}", cure=cure)
    if not seen:
        return "none; training runs on the CPU"
    names = ", ".join(torch.cuda.get_device_name(number) for number in range(seen))
    if not torch.distributed.is_nccl_available():
        raise ConfigError(f"{names}, and torch has no NCCL", cure="install a CUDA build of torch")
    return f"{names}; NCCL {'.'.join(map(str, nccl.version()))}"


def write_and_read(prefix: str) -> str:
    """An object comes back as it went."""
    if not prefix.startswith("s3://"):
        raise ConfigError("a folder, which nodes may not see", where=prefix, cure="--storage s3://BUCKET/PREFIX")
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
