"""A stack's life: raised part by part, looked at, razed to the ground."""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import psutil

from jobs.stack.processes import Process, belonging, end
from jobs.stack.services import STARTS, make_bucket, part_of, refuse_missing, well
from jobs.stack.state import CREDENTIALS, ENV, LOCK, STATE, Options, Stack, locked, new_stack, open_stack
from pipeline.errors import ConfigError, ConflictError, PipelineError

NEEDS = {"bucket": ("s3",), "mlflow": ("postgres",)}
IPC_RMID = 0
POLITE_SECONDS = 3.0

Say = Callable[[str], None]


def raised(folder: Path, options: Options, say: Say) -> Stack:
    """The stack of `folder`, with everything in it well; what runs already is left alone.

    A start that fails ends what it started and leaves the logs.
    """
    with locked(folder):
        stack = open_stack(folder) or _fresh(folder, options)
        _refuse_other(stack, options)
        broken = {part_of(name) for name in stack.state.options.services if not well(stack, name)}
        if not stack.state.processes:
            broken.add("bucket")
        if not broken:
            say("everything is there already")
            return stack
        _refuse_lost(stack, broken)
        fresh = not stack.state.processes
        try:
            _start(stack, broken, say)
        except BaseException:
            if fresh:
                _keep_logs(stack)
                _clear(stack)
            raise
    return stack


def razed(folder: Path) -> str:
    """End what belongs to the stack of `folder` and remove all it wrote; a line that says so."""
    if not folder.exists():
        return f"{folder}: there is no stack"
    with locked(folder):
        stack = open_stack(folder)
        if stack is None:
            _refuse_foreign(folder)
            shutil.rmtree(folder)
            return f"{folder}: there was no stack"
        ended = _clear(stack)
        shutil.rmtree(folder)
    return f"{folder}: {ended} processes ended, data and folder removed"


def lines(stack: Stack) -> list[str]:
    """A line a service: how it is, where, its process, its memory with all it started."""
    return [_line(stack, name) for name in stack.state.options.services]


def _line(stack: Stack, name: str) -> str:
    process, state = stack.state.processes.get(name), "up" if well(stack, name) else "DOWN"
    address = "dashboard" if name == "ray-head" else name
    where = stack.url(address) if address in stack.state.ports else ""
    if name == "postgres":
        where = where.removeprefix("http://")
    pid = f"pid {process.pid}" if process else "never started"
    used = f"{memory(process) / 1e6:.0f} MB" if process and process.alive else ""
    return f"{name:12} {state:5} {where:24} {pid:14} {used}".rstrip()


def memory(process: Process) -> int:
    """Bytes of a process and its descendants, shared pages counted once (proportional set size)."""
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        leader = psutil.Process(process.pid)
        for each in (leader, *leader.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                total += each.memory_full_info().pss
    return total


def _fresh(folder: Path, options: Options) -> Stack:
    _refuse_foreign(folder)
    shutil.rmtree(folder / "logs", ignore_errors=True)
    stack = new_stack(folder, options)
    try:
        refuse_missing(stack)
        if options.s3:
            make_bucket(stack)  # a server that lets nobody in is known before anything is started
    except PipelineError:
        _clear(stack)
        raise
    return stack


def _start(stack: Stack, parts: set[str], say: Say) -> None:
    """Start parts side by side, each after what it needs; the first error is raised when all have ended."""
    begun = time.monotonic()
    for part in parts:
        _end_all(stack, [stack.state.processes[name] for name in _services(stack, part) & stack.state.processes.keys()])

    def start(part: str, needs: list[Future[None]]) -> None:
        for need in needs:
            need.result()
        STARTS[part](stack)
        say(f"{part}: up after {time.monotonic() - begun:.0f} s")

    order = [part for part in STARTS if part in parts]
    with ThreadPoolExecutor(len(order)) as pool:
        running: dict[str, Future[None]] = {}
        for part in order:
            needs = [running[need] for need in NEEDS.get(part, ()) if need in running]
            running[part] = pool.submit(start, part, needs)
    for future in running.values():
        future.result()


def _services(stack: Stack, part: str) -> set[str]:
    return {name for name in stack.state.options.services if part_of(name) == part}


def _keep_logs(stack: Stack) -> None:
    """Ray's and Ceph's own logs, to where the others are."""
    sessions = stack.scratch.glob("ray/*/session_2*/logs")
    for folder in (*sessions, stack.scratch / "s3"):
        for log in (*folder.glob("*.log"), *folder.glob("*.out"), *folder.glob("*.err")):
            shutil.copy(log, stack.logs / "-".join([*folder.relative_to(stack.scratch).parts[:2], log.name]))


def _clear(stack: Stack) -> int:
    """End every process of the stack and remove what lies outside its folder; how many there were."""
    segment = _segment(stack)
    ended = _end_all(stack, list(stack.state.processes.values()), stack.state.mark)
    if segment is not None:
        ctypes.CDLL(None).shmctl(segment, IPC_RMID, None)
    shutil.rmtree(stack.scratch, ignore_errors=True)
    for name in (STATE, CREDENTIALS, ENV, "token"):
        (stack.folder / name).unlink(missing_ok=True)
    return ended


def _end_all(stack: Stack, leaders: list[Process], mark: str = "") -> int:
    """End processes and all that came of them, politely for some seconds; how many there were.

    PostgreSQL takes SIGINT for what others take SIGTERM for; it would wait for its clients.
    """
    first = belonging(leaders, mark)
    database = stack.state.processes.get("postgres")
    end({process for process in first if process == database}, signal.SIGINT, 0)
    left = end({process for process in first if process != database}, signal.SIGTERM, POLITE_SECONDS)
    for _ in range(20):  # what is being killed may have started more
        left |= belonging(leaders, mark)
        if not left:
            return len(first)
        left = end(left, signal.SIGKILL, 5)
    raise PipelineError(f"{len(left)} processes do not end: {sorted(process.pid for process in left)}")


def _segment(stack: Stack) -> int | None:
    """The System V shared memory that a killed PostgreSQL leaves, from the seventh line of its lock file."""
    try:
        lines = (stack.scratch / "postgres" / "postmaster.pid").read_text().splitlines()
        return int(lines[6].split()[1])
    except (OSError, IndexError, ValueError):
        return None


def _refuse_other(stack: Stack, options: Options) -> None:
    if stack.state.options != options:
        raise ConflictError("the stack there was made with other options", where=str(stack.folder),
                            cure="python -m jobs stack down, then up")  # fmt: skip


def _refuse_lost(stack: Stack, parts: set[str]) -> None:
    """What a dead server held in memory cannot be started again."""
    if "s3" in parts and "s3" in stack.state.processes:
        raise ConflictError("S3 has died, and its data was in memory", where=str(stack.folder),
                            cure="python -m jobs stack down, then up")  # fmt: skip


def _refuse_foreign(folder: Path) -> None:
    """A folder is removed whole by `down`: it must be empty, or of a stack whose start failed."""
    found = {path.name for path in folder.iterdir()} - {LOCK, "logs", "mlflow-auth.ini"}
    if found:
        what = f"holds {sorted(found)[0]}, which is no stack's"
        raise ConfigError(what, where=str(folder), cure="name another folder")
