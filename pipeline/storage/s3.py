"""Storage in S3, through s3fs: the only file that knows S3.

Three layers repeat what fails: the client single requests, `_retried` whole operations, the caller what it likes. A
process has one client an endpoint, for it carries an event loop.
"""

from __future__ import annotations

import functools
import itertools
import os
import random
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pipeline.errors import ConfigError, ConflictError, PipelineError, RemoteError
from pipeline.storage.base import Keys, MissingError, Storage, checked_key, room_for

T = TypeVar("T")

ATTEMPTS, BODIES = 3, 6
"""Tries of one S3 operation here, on top of the client's own retries of single requests; and where bodies break off."""

GREETING_SECONDS, GREETINGS = 2.5, 2
"""How long, and how often, a process that first turns to an S3 server waits for anybody to be there."""


def make_bucket(name: str) -> None:
    """Make an S3 bucket; one there is stays."""
    _retried(f"s3://{name}", lambda: filesystem().exists(name) or filesystem().mkdir(name))


class Bucket(Storage):
    """Storage in an S3 bucket, through s3fs."""

    @property
    def retries(self) -> int:
        return _connection().failed

    def read(self, key: str) -> bytes:
        def attempt(client: Any, path: str) -> bytes:
            data: bytes = client.cat_file(path)
            # The client takes a body that was cut short but is consistent in itself for whole.
            _same_length(len(data), client.info(path)["size"])
            return data

        return self._call(key, attempt)

    def size(self, key: str) -> int:
        def attempt(client: Any, path: str) -> int:
            info = client.info(path)
            if info["type"] != "file":
                raise FileNotFoundError
            return int(info["size"])

        return self._call(key, attempt)

    def list(self, prefix: str = "") -> Keys:
        root = self.url.removeprefix("s3://")
        top = f"{root}/{checked_key(prefix)}" if prefix else root
        paths = _retried(self.url, lambda: filesystem().find(top))
        keys = [path.removeprefix(root + "/") for path in paths if path.startswith(top + "/")]
        return sorted(key for key in keys if not any(part.startswith(".") for part in key.split("/")))

    def write(self, key: str, data: bytes) -> None:
        self._call(key, lambda client, path: client.pipe_file(path, data))

    def create(self, key: str, data: bytes) -> None:
        self._call(key, lambda client, path: client.pipe_file(path, data, mode="create"))

    def download(self, key: str, path: Path) -> None:
        def attempt(client: Any, remote: str) -> None:
            with room_for(path):
                client.get_file(remote, str(path))
            _same_length(path.stat().st_size, client.info(remote)["size"])

        self._call(key, attempt)

    def upload(self, path: Path, key: str) -> None:
        self._call(key, lambda client, remote: client.put_file(str(path), remote))

    def remove(self, key: str) -> None:
        self._call(key, lambda client, path: client.rm_file(path))

    def _call(self, key: str, attempt: Callable[[Any, str], T]) -> T:
        path = f"{self.url.removeprefix('s3://')}/{checked_key(key)}"
        return _retried(self.where(key), lambda: attempt(filesystem(), path))


def _retried(where: str, attempt: Callable[[], T]) -> T:
    """Run an S3 operation with bounded retries and full jitter, and translate what it raises."""
    from aiohttp import ClientError
    from botocore.exceptions import BotoCoreError

    for number in itertools.count(1):
        try:
            return attempt()
        except (OSError, ClientError, BotoCoreError, TimeoutError) as error:
            final = _final(error, where)
            if final is not None:
                raise final from error
            broken = _broke_off(error)
            if number >= (BODIES if broken and not _silent(error) else ATTEMPTS):
                what = f"no success in {number} attempts ({type(error).__name__})"
                raise RemoteError(what, where=where, cure="check the endpoint, network and credentials") from error
            _connection().failed += broken
        time.sleep(random.random() * 2 ** min(number, 2))
    raise AssertionError("unreachable")


def _silent(error: BaseException) -> bool:
    """Whether nothing came for so long that waiting again is no use."""
    from botocore.exceptions import ReadTimeoutError

    return isinstance(error, (TimeoutError, ReadTimeoutError))


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


def filesystem() -> Any:
    """This process's client."""
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
    client: Any = s3fs.S3FileSystem(
        skip_instance_cache=True, use_listings_cache=False, config_kwargs=config, session=session
    )
    client.retries = 1  # the one below repeats requests, `_retried` above whole operations
    try:
        client.connect()
    except ValueError as error:
        if "endpoint" in str(error):
            checked_endpoint("")  # botocore's words repeat it
        raise ConfigError(str(error), cure="check the AWS configuration") from error
    _greet(checked_endpoint(client.s3.meta.endpoint_url))
    connection.filesystem = client
    return connection


def checked_endpoint(endpoint: str, setting: str = "AWS_ENDPOINT_URL") -> str:
    """The endpoint, or a ConfigError that does not repeat it: what is no plain address may hold a password."""
    if re.fullmatch(r"https?://([\w.-]+|\[[\da-fA-F:]+\])(:\d+)?(/[^@?#\s]*)?", endpoint):
        return endpoint
    raise ConfigError("not an S3 endpoint", cure=f"{setting} is like https://host:port, no user or password") from None


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
