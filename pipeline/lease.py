"""The lease of a run: one job at a time writes its folder, and a writer that lost the run cannot commit to it.

    RUN/leases/00000007.json   canonical JSON {"after", "host", "owner", "pid", "schema", "started", "token"},
                               created conditionally and kept
    RUN/leases/00000007.beat   what its holder changes every few seconds; "released" at the end

The highest token holds the run. Its holder is gone when it released, when its process on this machine is dead, or when
its beat did not change for `seconds` of the watcher's own clock: no time of another machine is ever read. `after` is
the newest step that was committed when the token was taken. A commit names its writer's token, so one that a former
holder made later, for a step beyond the `after` of a higher token, is no checkpoint: no reader takes it.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from pipeline.errors import ConflictError, PipelineError
from pipeline.storage import Storage, canonical_json
from pipeline.world import World, on_first

RELEASED = b"released"
TOKEN = re.compile(r"(\d{8})\.json")
BEATS = 6
"""Beats in the time after which a silent holder is taken for dead."""

CLOCK_STEP = 5.0
"""Seconds by which a machine's clock may be set without its processes being taken for others."""

Event = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who took a token."""

    schema: int = 1
    token: int
    owner: str
    """Chosen by whoever started the job: attempts of one job follow each other without waiting."""
    host: str
    pid: int
    started: float
    """When the process started, by its own machine's clock: with the pid it names a process for ever."""
    after: int
    """The newest committed step when the token was taken."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host.split('/')[0]}"


@contextlib.contextmanager
def held(
    world: World, run: Storage, newest: Callable[[], int], owner: str, seconds: float, on_event: Event
) -> Iterator[int]:
    """Hold the run inside the block and give the token; collective, rank 0 does it.

    `newest` tells the newest committed step. `ConflictError` where another job holds the run and lives; where its
    holder is gone, or silent for `seconds`, the run is taken over.
    """
    token = on_first(world, lambda: _taken(run, newest, owner, seconds, on_event))
    beating = Beat(run, token, seconds / BEATS) if world.rank == 0 else None
    try:
        yield token
    finally:
        if beating:
            beating.release()


def refuse_lost(run: Storage, token: int) -> None:
    """ConflictError where somebody took the run after this token; 0 is nobody's token and holds for ever."""
    highest = max(_tokens(run), default=0)
    if token and highest > token:
        what = f"the run was taken over by {_holder(run, highest)}: nothing more is committed here"
        raise ConflictError(what, where=run.url, cure="let one job at a time train a run")


class Fence:
    """Which commits stand: those made by whoever held the run at their step."""

    def __init__(self, run: Storage) -> None:
        self._run, self._tokens, self._after = run, _tokens(run), dict[int, int]()

    def stands(self, attempt: str, step: int) -> bool:
        """Whether the writer of this attempt still held the run when it committed this step."""
        later = [token for token in self._tokens if token > token_of(attempt)]
        return not token_of(attempt) or all(step <= self._taken_after(token) for token in later)

    def _taken_after(self, token: int) -> int:
        if token not in self._after:
            self._after[token] = _holder(self._run, token).after
        return self._after[token]


def attempt_name(token: int) -> str:
    """A name never used before that carries its writer's token."""
    return f"{token:08d}-{secrets.token_hex(8)}"


def token_of(attempt: str) -> int:
    """The token in an attempt's name; 0 where it carries none."""
    head, dash, _ = attempt.partition("-")
    return int(head) if dash and head.isdigit() else 0


class Beat(threading.Thread):
    """Says every few seconds that the holder lives; where storage does not answer, the next beat tries again."""

    def __init__(self, run: Storage, token: int, interval: float) -> None:
        super().__init__(name="lease", daemon=True)
        self._run, self._key, self._interval = run, _beat_key(token), interval
        self._ended = threading.Event()
        self.start()

    def run(self) -> None:
        count = 0
        while not self._ended.wait(self._interval):
            count += 1
            with contextlib.suppress(PipelineError):
                self._run.write(self._key, str(count).encode())

    def release(self) -> None:
        """Let the next job take the run at once."""
        self._ended.set()
        self.join()
        with contextlib.suppress(PipelineError):  # then the next job waits until the beat has been silent long enough
            self._run.write(self._key, RELEASED)


def _taken(run: Storage, newest: Callable[[], int], owner: str, seconds: float, on_event: Event) -> int:
    """Wait until nobody else holds the run, then take the next token."""
    while True:
        highest = max(_tokens(run), default=0)
        if highest:
            _await_end(run, _holder(run, highest), owner, seconds, on_event)
        mine = Holder(token=highest + 1, owner=owner, host=_host(), pid=os.getpid(), started=_started(), after=newest())
        with contextlib.suppress(ConflictError):  # somebody was quicker: look at that one
            run.create(f"leases/{mine.token:08d}.json", canonical_json(asdict(mine)))
            run.remove(_beat_key(highest or mine.token))
            return mine.token


def _await_end(run: Storage, holder: Holder, owner: str, seconds: float, on_event: Event) -> None:
    """Return once a holder is gone; ConflictError as soon as it shows that it lives."""
    last = _beat(run, holder)
    if last == RELEASED or holder.owner == owner:
        return
    here = holder.host == _host()
    if here and not _lives(holder):
        on_event(f"{holder} is gone: its run is taken over")
        return
    if not here:
        on_event(f"{holder} held this run last: watching for up to {seconds:.0f} s whether it still does")
        end = time.monotonic() + seconds
        while time.monotonic() < end and _beat(run, holder) == last:
            time.sleep(min(1.0, seconds / BEATS))
        beat = _beat(run, holder)
        if beat in (last, RELEASED):
            on_event(f"{holder} is silent: its run is taken over")
            return
    cure = "wait for its end or stop it, or train under another name"
    raise ConflictError(f"{holder} is training this run", where=run.url, cure=cure)


def _tokens(run: Storage) -> list[int]:
    return sorted(int(match[1]) for key in run.sub("leases").list() if (match := TOKEN.fullmatch(key)))


def _holder(run: Storage, token: int) -> Holder:
    return Holder(**json.loads(run.read(f"leases/{token:08d}.json")))


def _beat_key(token: int) -> str:
    return f"leases/{token:08d}.beat"


def _beat(run: Storage, holder: Holder) -> bytes:
    key = _beat_key(holder.token)
    return run.read(key) if run.exists(key) else b""


def _host() -> str:
    """This machine since its last start; a container with processes of its own is another."""
    boot, processes = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    since = boot.read_text().strip() if boot.exists() else ""
    return f"{platform.node()}/{since}/{processes.readlink() if processes.is_symlink() else ''}"


def _started() -> float:
    return psutil.Process().create_time()


def _lives(holder: Holder) -> bool:
    try:
        process = psutil.Process(holder.pid)
        return abs(process.create_time() - holder.started) < CLOCK_STEP and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
