"""Work that is no training on a Ray cluster: an ordered map over tasks, and a command sent to where they can run."""

from __future__ import annotations

import contextlib
import itertools
import logging
import secrets
import shlex
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from pipeline.errors import PipelineError, RemoteError
from pipeline.scratch import scratch
from pipeline.workers import OrderedMap

A = TypeVar("A")
B = TypeVar("B")

AHEAD = 2
"""Tasks a core that are under way or wait for one."""


def sent(address: str, words: Sequence[str]) -> int:
    """Have a job server run `python -m jobs WORDS --address auto` with the code installed here; its exit code."""
    from jobs.cluster.jobs import connect, followed, send
    from jobs.cluster.submission import pack, refuse_password

    for word in words:
        refuse_password("the command", word)
    client = connect(address)
    job = f"{'-'.join(words[:2])}-{secrets.token_hex(4)}"
    with scratch() as folder:
        pack(folder)
        command = shlex.join(["python", "-m", "jobs", *words, "--address", "auto"])
        send(client, job, entrypoint=f"exec {command}", runtime_env={"working_dir": str(folder)})
    print(f"{job}: submitted to {client.address}", flush=True)
    return followed(client, job)


@contextlib.contextmanager
def connected(address: str, workers: int) -> Iterator[OrderedMap]:
    """An ordered map over tasks of the cluster at `address`, `workers` at a time; 0 takes a task a core."""
    import ray

    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL)
    except (ConnectionError, ValueError) as error:
        cure = "run this on a node of the cluster, or give its job server: --address http://HOST:8265"
        raise RemoteError("no Ray cluster to join", where=address, cure=cure) from error
    try:
        yield _Tasks(AHEAD * (workers or int(ray.cluster_resources().get("CPU", 1))))
    finally:
        ray.shutdown()


class _Tasks:
    """Items become tasks in order, so many ahead of the one that is waited for; Ray repeats those of a lost node."""

    def __init__(self, ahead: int) -> None:
        self._ahead = ahead

    def __call__(self, function: Callable[[A], B], items: Iterable[A], /) -> Iterator[B]:
        import ray

        task: Any = ray.remote(_called).options(num_cpus=1)
        coming = (task.remote(function, item) for item in items)
        waiting = deque(itertools.islice(coming, self._ahead))
        while waiting:
            found = _result(waiting.popleft())
            waiting.extend(itertools.islice(coming, 1))
            yield found


def _called(function: Callable[[A], B], item: A) -> B:
    return function(item)


def _result(task: Any) -> Any:
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        return ray.get(task)
    except RayTaskError as error:
        if isinstance(error.cause, PipelineError):
            raise error.cause from None
        raise
    except RayError as error:
        said = str(error).strip().splitlines()[0]
        cure = "the same command goes on where it stopped"
        raise PipelineError(f"a task failed for good ({said})", cure=cure) from error
