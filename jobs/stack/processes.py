"""Processes that outlive the command that started them, found again and ended without ever touching a stranger's.

A process is its pid together with the tick it started at and the boot it belongs to: a pid given anew to somebody else
does not match. Every process of a stack also carries the stack's mark in its environment and in its session, so that
what a killed parent has orphaned is found, too.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pwd
import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MARK = "GLOW_STACK"
"""Environment variable that names the stack a process belongs to."""

INHERITED = (
    "PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "TZ", "TMPDIR", "VIRTUAL_ENV", "LD_LIBRARY_PATH",
    "CUDA_VISIBLE_DEVICES", "SSL_CERT_FILE", "SSL_CERT_DIR", "AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE",
    "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy",
)  # fmt: skip
"""All that a service sees of the environment `up` was called in: no secret that lies around there."""

PORTS = range(20_000, 32_768)
"""Where free ports are looked for: above Ray's workers, below what the kernel gives to outgoing connections."""

PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, kw_only=True)
class Process:
    """A process as it can be recognised later."""

    pid: int
    started: int
    """Clock ticks between the boot and its start."""
    boot: str

    @property
    def alive(self) -> bool:
        """Whether this very process runs (one that is dead and not yet reaped does not)."""
        stat = _stat(self.pid)
        return stat is not None and stat.started == self.started and stat.state not in "ZX" and self.boot == _boot()


@dataclass(frozen=True)
class _Stat:
    state: str
    parent: int
    session: int
    started: int


def spawn(
    command: Sequence[str | Path],
    log: Path,
    environment: Mapping[str, str],
    *,
    user: str = "",
    end_with_parent: bool = False,
) -> Process:
    """Start a service in a session of its own with `log` as its output and only this environment.

    `user`: run it as that user, where this process is root. `end_with_parent`: ask the kernel to kill it when the
    calling thread is gone.
    """
    with log.open("ab") as output:
        child = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=dict(environment),
            cwd="/" if user else log.parent,
            start_new_session=True,
            preexec_fn=_end_with_parent if end_with_parent else None,
            **as_user(user),
        )
    stat = _stat(child.pid)
    child.returncode = 0  # it outlives this process on purpose; without this Popen warns and waits for it
    return Process(pid=child.pid, started=stat.started if stat else 0, boot=_boot())


def as_user(user: str) -> dict[str, Any]:
    """What makes subprocess run a command as that user; nothing where there is none."""
    if not user:
        return {}
    return {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []}


def inherited() -> dict[str, str]:
    """The few variables every service gets from here."""
    return {name: os.environ[name] for name in INHERITED if name in os.environ}


def belonging(leaders: Iterable[Process], mark: str) -> set[Process]:
    """Every live process of a stack: what its leaders started, in their sessions or below them, and what has its mark.

    A leader's session is known by the leader's pid, which the kernel gives to nobody while the session lives.
    """
    boot = _boot()
    table = {pid: stat for pid in _pids() if (stat := _stat(pid)) is not None}
    sessions = {
        leader.pid: leader.started
        for leader in leaders
        if leader.boot == boot and (leader.pid not in table or table[leader.pid].started == leader.started)
    }
    ours = {pid for pid, stat in table.items() if stat.started >= sessions.get(stat.session, stat.started + 1)}
    ours |= {pid for pid in table if pid not in ours and _marked(pid, mark)}
    while more := {pid for pid, stat in table.items() if stat.parent in ours} - ours:
        ours |= more
    ours -= {os.getpid()}
    return {Process(pid=pid, started=table[pid].started, boot=boot) for pid in ours if table[pid].state not in "ZX"}


def end(processes: Iterable[Process], number: signal.Signals, seconds: float) -> set[Process]:
    """Signal processes and wait for them; those that are still there."""
    signalled = left = set(processes)
    for process in left:
        with contextlib.suppress(ProcessLookupError):
            if process.alive:
                os.kill(process.pid, number)
    until = time.monotonic() + seconds
    while (left := {process for process in left if process.alive}) and time.monotonic() < until:
        time.sleep(0.05)
    _reap(signalled - left)
    return left


def fate(process: Process) -> str:
    """How a child of this process that is no longer alive ended; empty where nobody knows."""
    with contextlib.suppress(ChildProcessError):
        _, status = os.waitpid(process.pid, os.WNOHANG)
        code = os.waitstatus_to_exitcode(status)
        return f"by signal {-code}" if code < 0 else f"with exit code {code}"
    return ""


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that nobody listens on."""
    found: list[int] = []
    start = PORTS.start + int.from_bytes(os.urandom(2), "big") % (len(PORTS) // 2)
    for port in (*range(start, PORTS.stop), *range(PORTS.start, start)):
        if len(found) == count:
            return found
        if _free(port):
            found.append(port)
    raise OSError("no free ports")


def listening(port: int) -> bool:
    """Whether anybody answers at a port of the loopback."""
    with socket.socket() as probe:
        probe.settimeout(2)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a connection winding down does not matter
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _marked(pid: int, mark: str) -> bool:
    if not mark:
        return False
    try:
        return f"{MARK}={mark}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _stat(pid: int) -> _Stat | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name before it may hold anything
    return _Stat(fields[0], int(fields[1]), int(fields[3]), int(fields[19]))


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _reap(processes: Iterable[Process]) -> None:
    """Collect those that are our own children; others have another parent that does."""
    for process in processes:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(process.pid, os.WNOHANG)


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
