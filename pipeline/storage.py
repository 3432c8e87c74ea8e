"""Bytes under keys, in a folder or in S3: read, replace atomically, create conditionally, list.

A key is a relative path with forward slashes. Whoever reads sees a whole object or none; of many who `create` one key
exactly one wins. Names that start with a dot are temporary files: never keys, never listed. Credentials come from the
usual AWS chain and never appear in a message.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import random
import secrets
import shutil
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pipeline.errors import ConfigError, ConflictError, DataError, PipelineError, RemoteError, UsageError

T = TypeVar("T")
Keys = list[str]

ATTEMPTS = 3
"""Tries of one S3 operation here, on top of the client's own retries of single requests."""

GREETING_SECONDS, GREETINGS = 2.5, 2
"""How long, and how often, a process that first turns to an S3 server waits for anybody to be there."""


class MissingError(DataError):
    """There is no object under this key."""


def canonical_json(value: Any) -> bytes:
    """Serialize in the one form whose digest means anything: sorted keys, no blanks, UTF-8, no NaN, one newline."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"


def sha256_hex(data: bytes) -> str:
    """Hexadecimal sha256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hexadecimal sha256 of a local file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Storage(ABC):
    """A prefix under which keys live. Cheap, picklable, connects when first used."""

    url: str

    @property
    def local(self) -> Path | None:
        """The folder, where this is one."""
        return None

    @property
    def retries(self) -> int:
        """How often this process had to repeat a request to the service so far."""
        return 0

    def sub(self, path: str) -> Storage:
        """Return the storage below `path`."""
        return type(self)(f"{self.url}/{checked_key(path)}")

    def where(self, key: str) -> str:
        """Name an object in a message."""
        return f"{self.url}/{key}"

    @abstractmethod
    def read(self, key: str) -> bytes:
        """Return the whole object; `MissingError` if there is none."""

    @abstractmethod
    def size(self, key: str) -> int:
        """Return the length in bytes; `MissingError` if there is no such object."""

    @abstractmethod
    def list(self, prefix: str = "") -> Keys:
        """Return every key below the folder `prefix`, at any depth, relative to this storage, sorted."""

    @abstractmethod
    def write(self, key: str, data: bytes) -> None:
        """Put `data` under `key`, replacing what is there; readers see the old or the new object, whole."""

    @abstractmethod
    def create(self, key: str, data: bytes) -> None:
        """Put `data` under `key` if nothing is there, else `ConflictError`; of many callers one wins.

        On S3 an answer lost on the way back makes the retry find the caller's own object: after a conflict compare
        contents where that matters.
        """

    @abstractmethod
    def download(self, key: str, path: Path) -> None:
        """Copy an object to a local file without holding it in memory."""

    @abstractmethod
    def upload(self, path: Path, key: str) -> None:
        """Copy a local file to `key` without holding it in memory, atomically like `write`."""

    @abstractmethod
    def remove(self, key: str) -> None:
        """Remove one object; one that is not there is fine."""

    def exists(self, key: str) -> bool:
        """Say whether there is an object under `key`."""
        try:
            self.size(key)
        except MissingError:
            return False
        return True

    def remove_tree(self, prefix: str) -> None:
        """Remove every object below the folder `prefix`."""
        for key in self.list(prefix):
            self.remove(key)


def open_storage(url: str) -> Storage:
    """Open a folder (a plain path or file://...) or an S3 prefix (s3://bucket/prefix)."""
    scheme, separator, rest = url.partition("://")
    if not url.strip():
        raise UsageError("an empty storage address", cure="give a folder or s3://bucket/prefix")
    if not separator:
        return Folder(str(Path(url).expanduser().absolute()))
    if scheme == "file" and rest.startswith("/"):
        return Folder(str(Path(urllib.parse.unquote(rest))))
    bucket = rest.partition("/")[0]
    if scheme == "s3" and bucket and not any(mark in bucket for mark in "@:?"):
        return Bucket("s3://" + "/".join(part for part in rest.split("/") if part))
    shown = f"{scheme}://..." if "@" in rest else url
    raise UsageError("not a storage address", where=shown, cure="give a folder, file:///folder or s3://bucket/prefix")


def make_bucket(name: str) -> None:
    """Make an S3 bucket; one there is stays."""
    _retried(f"s3://{name}", lambda: _filesystem().exists(name) or _filesystem().mkdir(name))


def checked_key(key: str) -> str:
    """Return `key`, or refuse one that could leave its prefix or name a temporary file."""
    parts = key.split("/")
    if any(part == "" or part.startswith(".") for part in parts) or "\\" in key or not key.isprintable():
        raise DataError("not a storage key", where=repr(key), cure="keys are relative, without '..' and dot names")
    return key


class Folder(Storage):
    """Storage in a folder of this machine or of a shared file system."""

    @property
    def local(self) -> Path:
        return Path(self.url)

    def read(self, key: str) -> bytes:
        with self._translated(key):
            return self._path(key).read_bytes()

    def size(self, key: str) -> int:
        path = self._path(key)
        with self._translated(key):
            if path.is_dir():
                raise IsADirectoryError
            return path.stat().st_size

    def list(self, prefix: str = "") -> Keys:
        top = self._path(prefix) if prefix else self.local
        keys = []
        for folder, names, files in os.walk(top):
            names[:] = [name for name in names if not name.startswith(".")]
            keys += [Path(folder, file).relative_to(self.local) for file in files if not file.startswith(".")]
        return sorted(key.as_posix() for key in keys)

    def write(self, key: str, data: bytes) -> None:
        with self._translated(key), self._temporary(key) as temporary:
            _write_durably(temporary, data)
            self._publish(temporary, key)

    def create(self, key: str, data: bytes) -> None:
        with self._translated(key), self._temporary(key) as temporary:
            _write_durably(temporary, data)
            os.link(temporary, self._path(key))
            _sync_folder(temporary.parent)

    def download(self, key: str, path: Path) -> None:
        with self._translated(key):
            shutil.copyfile(self._path(key), path)

    def upload(self, path: Path, key: str) -> None:
        with self._translated(key), self._temporary(key) as temporary:
            with path.open("rb") as source, temporary.open("xb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
                target.flush()
                os.fsync(target.fileno())
            self._publish(temporary, key)

    def remove(self, key: str) -> None:
        with self._translated(key):
            self._path(key).unlink(missing_ok=True)

    def remove_tree(self, prefix: str) -> None:
        with self._translated(prefix):
            shutil.rmtree(self._path(prefix), ignore_errors=not self._path(prefix).exists())

    def _path(self, key: str) -> Path:
        return self.local / checked_key(key)

    def _publish(self, temporary: Path, key: str) -> None:
        temporary.replace(self._path(key))
        _sync_folder(temporary.parent)

    @contextlib.contextmanager
    def _temporary(self, key: str) -> Iterator[Path]:
        """Name a file beside `key` that is gone afterwards, whatever happens."""
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
        try:
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _translated(self, key: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, IsADirectoryError) as error:
            raise MissingError("no such object", where=self.where(key)) from error
        except FileExistsError as error:
            raise ConflictError("exists already", where=self.where(key)) from error
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise ConfigError(reason, where=self.where(key), cure="check the folder's rights and free space") from error


class Bucket(Storage):
    """Storage in an S3 bucket, through s3fs."""

    @property
    def retries(self) -> int:
        return _connection().failed

    def read(self, key: str) -> bytes:
        def attempt(filesystem: Any, path: str) -> bytes:
            data: bytes = filesystem.cat_file(path)
            # The client takes a body that was cut short but is consistent in itself for whole.
            _same_length(len(data), filesystem.info(path)["size"])
            return data

        return self._call(key, attempt)

    def size(self, key: str) -> int:
        def attempt(filesystem: Any, path: str) -> int:
            info = filesystem.info(path)
            if info["type"] != "file":
                raise FileNotFoundError
            return int(info["size"])

        return self._call(key, attempt)

    def list(self, prefix: str = "") -> Keys:
        root = self.url.removeprefix("s3://")
        top = f"{root}/{checked_key(prefix)}" if prefix else root
        paths = _retried(self.url, lambda: _filesystem().find(top))
        keys = [path.removeprefix(root + "/") for path in paths if path.startswith(top + "/")]
        return sorted(key for key in keys if not any(part.startswith(".") for part in key.split("/")))

    def write(self, key: str, data: bytes) -> None:
        self._call(key, lambda filesystem, path: filesystem.pipe_file(path, data))

    def create(self, key: str, data: bytes) -> None:
        self._call(key, lambda filesystem, path: filesystem.pipe_file(path, data, mode="create"))

    def download(self, key: str, path: Path) -> None:
        def attempt(filesystem: Any, remote: str) -> None:
            filesystem.get_file(remote, str(path))
            _same_length(path.stat().st_size, filesystem.info(remote)["size"])

        self._call(key, attempt)

    def upload(self, path: Path, key: str) -> None:
        self._call(key, lambda filesystem, remote: filesystem.put_file(str(path), remote))

    def remove(self, key: str) -> None:
        self._call(key, lambda filesystem, path: filesystem.rm_file(path))

    def _call(self, key: str, attempt: Callable[[Any, str], T]) -> T:
        path = f"{self.url.removeprefix('s3://')}/{checked_key(key)}"
        return _retried(self.where(key), lambda: attempt(_filesystem(), path))


def _retried(where: str, attempt: Callable[[], T]) -> T:
    """Run an S3 operation with bounded retries and full jitter, and translate what it raises."""
    from aiohttp import ClientError
    from botocore.exceptions import BotoCoreError

    for left in reversed(range(ATTEMPTS)):
        try:
            return attempt()
        except (OSError, ClientError, BotoCoreError, TimeoutError) as error:
            final = _final(error, where)
            if final is not None:
                raise final from error
            if left == 0:
                what = f"no success in {ATTEMPTS} attempts ({type(error).__name__})"
                raise RemoteError(what, where=where, cure="check the endpoint, network and credentials") from error
            _connection().failed += _broke_off(error)
        time.sleep(random.random() * 2 ** (ATTEMPTS - left))
    raise AssertionError("unreachable")


def _broke_off(error: BaseException) -> bool:
    """Whether a body did not come whole: the one failure that the client does not tell `_Connection.heard`."""
    from botocore.exceptions import BotoCoreError, ReadTimeoutError, ResponseStreamingError

    streamed = isinstance(error, (ReadTimeoutError, ResponseStreamingError))
    return streamed or not (_codes(error) or isinstance(error, BotoCoreError))


def _final(error: BaseException, where: str) -> PipelineError | None:
    """Translate what no further attempt would change."""
    codes = _codes(error)
    if "NoSuchBucket" in codes:
        return RemoteError("no such bucket", where=where, cure="create it, or correct its name")
    if isinstance(error, FileNotFoundError):
        return MissingError("no such object", where=where)
    if isinstance(error, FileExistsError) or codes & LOST_RACE:
        return ConflictError("exists already", where=where)
    if isinstance(error, PermissionError):
        return RemoteError("access refused", where=where, cure="check the AWS credentials and policy")
    return None


def _codes(error: BaseException | None) -> set[str]:
    """S3's own error codes along a chain of exceptions."""
    codes = set()
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            codes.add(str(response.get("Error", {}).get("Code")))
        error = error.__cause__
    return codes


LOST_RACE = {"PreconditionFailed", "ConditionalRequestConflict", "412", "409"}
"""S3's refusals of a conditional write: it exists, or two were under way at once."""


def _same_length(found: int, expected: int) -> None:
    if found != expected:
        raise OSError(f"{found} bytes of {expected}")


def _filesystem() -> Any:
    return _connection().filesystem


@dataclass(kw_only=True)
class _Connection:
    """A client, and how many of its requests failed and were repeated."""

    filesystem: Any = None
    failed: int = 0

    def heard(self, parsed_response: dict[str, Any] | None, exception: Exception | None, **_: object) -> None:
        """Note the answer to one request, before the client repeats it or not."""
        status = (parsed_response or {}).get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        self.failed += exception is not None or status == 429 or status >= 500


def _connection() -> _Connection:
    """Return this process's connection; another process or endpoint gets its own, for it carries an event loop."""
    return _connect(os.getpid(), os.environ.get("AWS_ENDPOINT_URL", ""))


@functools.lru_cache(maxsize=4)
def _connect(process: int, endpoint: str) -> _Connection:
    import s3fs
    from aiobotocore.session import AioSession

    config = {
        "retries": {"mode": "standard", "max_attempts": 3},
        "connect_timeout": 5,
        "read_timeout": 15,
        "max_pool_connections": 32,
    }
    connection, session = _Connection(), AioSession()
    session.register("response-received.s3", connection.heard)
    filesystem: Any = s3fs.S3FileSystem(
        skip_instance_cache=True, use_listings_cache=False, config_kwargs=config, session=session
    )
    filesystem.retries = 1  # the client below repeats requests, `_retried` above whole operations
    try:
        filesystem.connect()
    except ValueError as error:
        raise ConfigError(str(error), cure="AWS_ENDPOINT_URL is like https://host:port") from error
    _greet(filesystem.s3.meta.endpoint_url)
    connection.filesystem = filesystem
    return connection


class _Stay(urllib.request.HTTPRedirectHandler):
    """Where a server sends us is none of a greeting's business."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _greet(endpoint: str) -> None:
    """RemoteError within seconds where nobody listens: an address that never answered is rather wrong than busy.

    Whatever else may be amiss is left to the first operation and to the patience it has.
    """
    request, opener = urllib.request.Request(endpoint, method="HEAD"), urllib.request.build_opener(_Stay)
    for left in reversed(range(GREETINGS)):
        try:
            opener.open(request, timeout=GREETING_SECONDS).close()
        except urllib.error.HTTPError:
            return
        except urllib.error.URLError as error:
            if isinstance(error.reason, (ConnectionResetError, ssl.SSLError)):
                return
            if left == 0:
                raise RemoteError("no S3 server answers", where=endpoint,
                                  cure="start it, or correct AWS_ENDPOINT_URL") from error  # fmt: skip
            time.sleep(1)
        except OSError:
            return
        else:
            return


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make a rename durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
