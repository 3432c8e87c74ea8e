"""Ray's job server: reached with the token, listened to, told to stop.

A server that takes jobs from anybody is refused unless it is on this machine: a job is any command at all.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import logging
import os
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError, ConflictError, Interrupted, PipelineError, RemoteError, UsageError, redact

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
TIMEOUT_SECONDS = 5.0
RECONNECT_SECONDS = 60.0
START_SECONDS = 60.0
"""How long a head that answers may take to have somebody who starts jobs: it comes up in two steps."""

STOP_SECONDS = 180.0
"""How long `stop` waits; the cluster kills a stopped job after its RAY_JOB_STOP_WAIT_TIME_S."""


class Client:
    """A job server that lets us in."""

    def __init__(self, address: str, token: str) -> None:
        self.address, self._token = address, token
        self._connected: JobSubmissionClient | None = None

    @property
    def ray(self) -> JobSubmissionClient:
        """Ray's own client; imported late, for it takes a second."""
        if self._connected is None:
            os.environ.setdefault("RAY_AUTH_MODE", "token" if self._token else "disabled")
            from ray.job_submission import JobSubmissionClient

            with translated(self.address):
                self._connected = JobSubmissionClient(self.address, headers=_bearer(self._token))
            for name in ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
                logging.getLogger(name).setLevel(logging.ERROR)  # what it says of packages and sockets is no news
        return self._connected

    def version(self) -> str:
        """Ray's version there."""
        request = urllib.request.Request(f"{self.address}/api/version", headers=_bearer(self._token))
        with translated(self.address), urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
            return str(json.load(answer)["ray_version"])

    def jobs(self) -> list[JobDetails]:
        """Every job that was submitted, oldest first."""
        with translated(self.address):
            found = [job for job in self.ray.list_jobs() if job.submission_id]
        return sorted(found, key=lambda job: job.start_time or 0)

    def info(self, job: str) -> JobDetails:
        """What the server knows of a job."""
        with translated(self.address):
            return self.ray.get_job_info(job)

    def logs(self, job: str) -> str:
        """All a job has said."""
        with translated(self.address):
            return self.ray.get_job_logs(job)


def send(client: Client, job: str, **what: Any) -> None:
    """Hand a job over, also to a head that has only just started."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            with translated(client.address):
                client.ray.submit_job(submission_id=job, **what)
            return
        except RemoteError as error:
            if "No available agent" not in error.what or time.monotonic() > deadline:
                raise
            time.sleep(1)


def connect(address: str = "") -> Client:
    """The job server at `address` or where RAY_API_SERVER_ADDRESS says, proven to answer us and not just anybody."""
    address = (address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS).rstrip("/")
    plain = redact(address) == address and address.startswith(("http://", "https://"))
    if not plain or not urllib.parse.urlsplit(address).hostname:
        raise UsageError(
            "not the address of a job server", where=address, cure="http://HOST:8265, no password: there is a token"
        )
    code = _knock(address, "")
    if code == 200:
        if not _loopback(address):
            raise ConfigError("this Ray takes jobs from anybody who reaches it", where=address,
                              cure="start it with RAY_AUTH_MODE=token, or forward its port to here")  # fmt: skip
        return Client(address, "")
    if code == 0:
        raise RemoteError("nobody answers", where=address, cure="is the cluster up? RAY_API_SERVER_ADDRESS names it")
    if code not in (401, 403):
        raise RemoteError(f"answers {code}, which is not Ray's job server", where=address, cure="check the address")
    token = _token()
    if not token:
        raise ConfigError("wants a token and there is none here", where=address,
                          cure="set RAY_AUTH_TOKEN_PATH (the stack's env file does)")  # fmt: skip
    if _knock(address, token) != 200:
        raise RemoteError("the token is refused", where=address, cure="check RAY_AUTH_TOKEN_PATH")
    return Client(address, token)


def resolve(client: Client, job: str) -> str:
    """The submission of that id, or the newest of that run."""
    known = client.jobs()
    mine = [entry.submission_id for entry in known if job in (entry.submission_id, (entry.metadata or {}).get("run"))]
    if not mine or mine[-1] is None:
        there = ", ".join(str(entry.submission_id) for entry in known[-5:]) or "none"
        raise UsageError(f"no job {job!r}", where=client.address, cure=f"there are: {there}")
    return mine[-1]


def followed(client: Client, job: str) -> int:
    """Print what a job says until it ends; its exit code. Leaving does not end the job."""
    said = _Said()
    deadline = time.monotonic() + RECONNECT_SECONDS
    try:
        while True:
            try:
                asyncio.run(_tail(client, job, said))
            except (RuntimeError, OSError) as error:
                if time.monotonic() > deadline:
                    raise RemoteError(f"the log broke off ({type(error).__name__})", where=client.address,
                                      cure=f"python -m jobs cluster logs {job} -f") from error  # fmt: skip
            if ended(client, job):
                said.more(client.logs(job), 0)
                return exit_code(client.info(job))
            deadline = time.monotonic() + RECONNECT_SECONDS
            time.sleep(0.5)
    except KeyboardInterrupt:
        print(f"{job} goes on; to see more: python -m jobs cluster logs {job} -f", file=sys.stderr)
        return 130


class _Said:
    """Prints a text that grows, each part once, though it may be handed over from its start again."""

    def __init__(self) -> None:
        self.length = 0

    def more(self, text: str, start: int) -> int:
        """Take the text from `start` on; where it ends."""
        end = start + len(text)
        if end > self.length:
            print(text[max(self.length - start, 0) :], end="", flush=True)
            self.length = end
        return end


async def _tail(client: Client, job: str, said: _Said) -> None:
    at = 0
    async for text in client.ray.tail_job_logs(job):
        at = said.more(text, at)


def ended(client: Client, job: str) -> bool:
    """Whether a job has come to an end."""
    return client.info(job).status.is_terminal()


def exit_code(info: Any) -> int:
    """The exit code of a job's command; Ray's own client says 1 whatever it was."""
    if info.driver_exit_code is not None and info.driver_exit_code >= 0:
        return info.driver_exit_code
    if info.driver_exit_code is not None:
        return 128 - info.driver_exit_code
    return {"SUCCEEDED": 0, "STOPPED": Interrupted.exit_code}.get(str(info.status), 1)


def stopped(client: Client, job: str) -> str:
    """Ask a job to stop and wait until it has; a line that says so."""
    if ended(client, job):
        return f"{job}: had ended already ({client.info(job).status})"
    with translated(client.address):
        client.ray.stop_job(job)
    deadline = time.monotonic() + STOP_SECONDS
    while not ended(client, job):
        if time.monotonic() > deadline:
            raise RemoteError(f"has not stopped within {STOP_SECONDS:.0f} s", where=job, cure="look at its logs")
        time.sleep(0.5)
    return f"{job}: stopped; {_last(client, job)}"


def lines(client: Client, job: str = "") -> list[str]:
    """A line a job: submission, status, exit code, last words."""
    found = [entry for entry in client.jobs() if job in ("", entry.submission_id, (entry.metadata or {}).get("run"))]
    return [_line(client, entry) for entry in found]


def _line(client: Client, entry: JobDetails) -> str:
    job, code = str(entry.submission_id), f"exit {exit_code(entry)}" if entry.status.is_terminal() else ""
    return f"{job:24} {entry.status.value:9} {code:8} {_last(client, job)}".rstrip()


def _last(client: Client, job: str) -> str:
    """What a job said last, or why it did not start."""
    words = [line for line in client.logs(job).splitlines() if line.strip()]
    return words[-1].strip() if words else (client.info(job).message or "").strip()


def refuse_second(client: Client, run: str, url: str) -> None:
    """ConflictError while another attempt at the run is under way."""
    for entry in client.jobs():
        if (entry.metadata or {}).get("url") == url and not entry.status.is_terminal():
            raise ConflictError(f"{entry.submission_id} is at work on it ({entry.status.value})", where=url,
                                cure=f"python -m jobs cluster logs {run} -f, or stop {run}")  # fmt: skip


def _knock(address: str, token: str) -> int:
    """HTTP status of asking for the version; 0 where nobody answers."""
    request = urllib.request.Request(f"{address}/api/version", headers=_bearer(token))
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, ValueError):
        return 0


def _bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"} if token else {}


def _token() -> str:
    """The token, as Ray itself looks for it: in the environment, in the file named there."""
    if token := os.environ.get("RAY_AUTH_TOKEN", ""):
        return token
    path = os.environ.get("RAY_AUTH_TOKEN_PATH", "")
    if not path:
        return ""
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(f"no token there: {error.strerror}", where=path, cure="check RAY_AUTH_TOKEN_PATH") from error


def _loopback(address: str) -> bool:
    host = urllib.parse.urlsplit(address).hostname or ""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


@contextlib.contextmanager
def translated(address: str) -> Iterator[None]:
    """Turn what Ray's client raises into ours, in a line."""
    try:
        yield
    except PipelineError:
        raise
    except (RuntimeError, ConnectionError, OSError) as error:
        said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise RemoteError(said[:300], where=address, cure="python -m jobs cluster status tells how jobs are") from error
