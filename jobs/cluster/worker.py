"""What a Ray Train worker does: the ordinary loop, while threads beside it listen for an end and watch the nodes."""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from pipeline.config import TrainConfig
from pipeline.errors import Interrupted, PeerLostError, PipelineError, RemoteError

Row = dict[str, Any]
Report = Callable[[Row], None]
Stop = Callable[[], bool]
Work = Callable[[TrainConfig, Report, Stop], Row]

STOP_POLL_SECONDS = 0.5
PREEMPTION_POLL_SECONDS = 1.0
TRANSIENT = (RemoteError, Interrupted, OSError, RuntimeError)
"""What another attempt may cure beside Ray's own errors (a process or node gone)."""


class Mailbox:
    """What rank 0 has said and the driver has not yet read, and whether the driver wants an end."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.stopping = False

    def stop(self) -> None:
        self.stopping = True

    def stopped(self) -> bool:
        return self.stopping

    def put(self, row: Row) -> None:
        self.rows.append(row)

    def take(self) -> list[Row]:
        rows, self.rows = self.rows, []
        return rows


class ByValue:
    """A function that is sent as it is, where Ray Train would keep it in the object store of the driver's node.

    Ray's core ends a driver with 1, without a word, when that node's store is gone and the driver owns anything in it.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def get(self) -> Callable[..., Any]:
        return self._function


def final(error: Exception) -> bool:
    """Whether the same error would come again."""
    return not isinstance(error, TRANSIENT) and not _of_ray(error)


def first_of(errors: Mapping[int, Exception]) -> str:
    """What went wrong, of several ranks: a dead process, before the broken collectives of its neighbours."""
    first = min((errors[rank] for rank in sorted(errors)), key=lambda error: (_follows(error), not _of_ray(error)))
    return f"{type(first).__name__}: {(str(first).strip() or 'no word').splitlines()[0]}"


def own_of(errors: Mapping[int, Exception]) -> PipelineError | None:
    """The error of ours that says why, where there is one: not that of a rank whose neighbour is gone."""
    own = [errors[rank] for rank in sorted(errors) if not _follows(errors[rank])]
    return next((error for error in own if isinstance(error, PipelineError)), None)


def _follows(error: Exception) -> bool:
    """Whether it came of what another rank met."""
    return isinstance(error, PeerLostError)


def _of_ray(error: Exception) -> bool:
    return type(error).__module__.startswith("ray.")


def traces_of(errors: Mapping[int, Exception]) -> str:
    """All that is known of every rank's."""
    return "\n".join(f"rank {rank}\n{''.join(traceback.format_exception(errors[rank]))}" for rank in sorted(errors))


def loop(config: TrainConfig, report: Report, stop: Stop, *, owner: str) -> Row:
    from pipeline import train

    return train.run(config, report, stop, owner)


def train_worker(settings: dict[str, Any]) -> Row:
    """What every Ray worker runs. An end that was asked for is a result: as an error Ray would start it again."""
    mailbox = settings["mailbox"]
    asked, leaving = threading.Event(), threading.Event()
    threading.Thread(target=_watch_nodes, args=(leaving,), daemon=True).start()
    if os.environ["RANK"] == "0":
        threading.Thread(target=_listen, args=(mailbox, asked), daemon=True).start()
        mailbox.put.remote({"event": f"{counted(os.environ['WORLD_SIZE'])} at work", "workers": True})

    def stop() -> bool:
        return asked.is_set() or leaving.is_set()

    try:
        return settings["work"](settings["config"], lambda row: mailbox.put.remote(row), stop)
    except Interrupted as error:
        return {"interrupted" if asked.is_set() else "preempted": error}


def counted(workers: str) -> str:
    return "1 worker" if workers == "1" else f"{workers} workers"


def _listen(mailbox: Any, asked: threading.Event) -> None:
    """Ask now and then whether the driver wants an end; a signal does not reach a worker's loop."""
    import ray

    while not ray.get(mailbox.stopped.remote()):
        time.sleep(STOP_POLL_SECONDS)
    asked.set()


def _watch_nodes(leaving: threading.Event) -> None:
    """Ask now and then whether a node of the group is about to go; every rank asks, the answer is one."""
    from ray.train import get_preemption_info

    while get_preemption_info() is None:
        time.sleep(PREEMPTION_POLL_SECONDS)
    leaving.set()
