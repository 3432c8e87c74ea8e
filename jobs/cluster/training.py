"""Training on Ray workers.

`train` runs the ordinary loop on Ray Train workers and gives back what the loop returns. Ray holds no checkpoint of
ours: every attempt has a new name under a folder that goes away, because Ray takes a known name for the same run and
would skip it; what resumes is the run folder, by the loop itself. That folder is on the driver's host alone: no worker
touches it (docs/decisions/0015). Without an address Ray is started here and goes when
the work is done, with every process and file it made. Ray is imported inside functions: its core reads the variables
of `_environment` once, when it is first imported.
"""

from __future__ import annotations

import contextlib
import functools
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.cluster.start import SIGNALS, HeadLostError, refused, started
from jobs.cluster.worker import (
    ByValue,
    Mailbox,
    Report,
    Row,
    Work,
    counted,
    final,
    first_of,
    loop,
    own_of,
    traces_of,
    train_worker,
)
from pipeline.config import ClusterConfig, TrainConfig
from pipeline.errors import ConfigError, PipelineError, interruption
from pipeline.storage import open_storage

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

RESIZE_SECONDS = 30.0
"""How often an elastic run that is well looks for room for more workers."""

WAITING_SECONDS = 20.0
"""How long nobody may train before it is said why, and said again."""

ANSWER_SECONDS = 2.0
"""How long the mailbox may take to answer before it is asked whether there is a head: Ray's core, left to wait for
what went with its head, ends this process with 1 after 60 s, without a word."""

STOP_SECONDS = 100.0
"""How long the workers may take to commit a last checkpoint; less than the job server's patience with a stopped job."""


def train(config: TrainConfig, report: Report, work: Work | None = None) -> Row:
    """Run the loop on `config.cluster.workers` Ray workers; rank 0's rows reach `report`, its summary is returned.

    With `cluster.min_workers` it is any number from that to `workers`: as many as the nodes there are have room for.
    Failures another attempt may cure restart all workers, at most `cluster.max_failures` times between two checkpoints;
    a node that announces its end costs no failure; a PipelineError that would come again is raised here at once, as
    itself.
    """
    work = work or functools.partial(loop, owner=secrets.token_hex(8))
    patience, preflight = Patience(config), _refuse_too_few
    while True:
        try:
            return _attempt(config, report, work, preflight, patience)
        except _Preempted as error:
            report({"event": f"a node goes away: {error.what}; all go on from there"})
        except _NeverStarted as error:
            patience.note({"failed": error.what})
            report({"event": f"{error}; starting Ray again"})
        preflight = _take_any  # a run under way waits for nodes


class _NeverStarted(PipelineError):
    """The group of workers broke while it was being started: Ray then gives up, and keeps what it had reserved."""


class _Preempted(PipelineError):
    """The workers stopped after a checkpoint, because a node of theirs was about to go."""


class Patience:
    """What a run's failures are measured by: those since its last checkpoint, for days are never without one."""

    def __init__(self, config: TrainConfig) -> None:
        self._config, self._failures, self._checkpoint = config, 0, 0.0

    def note(self, row: Row) -> None:
        """Take a row on its way to the driver; PipelineError, a worker's own if it has one, at a failure too many."""
        if row.get("ft/checkpoint", 0.0) > self._checkpoint:
            self._checkpoint, self._failures = row["ft/checkpoint"], 0
        self._failures += "failed" in row
        if self._failures > self._config.cluster.max_failures:
            run = open_storage(self._config.storage).sub(self._config.name)
            if "trace" in row:
                run.write("logs/workers.txt", row["trace"].encode())
            what = f"the workers failed {self._failures} times without a new checkpoint, last {row['failed']}"
            cure = "logs/workers.txt there has it all; the same command goes on from the last checkpoint"
            raise row.get("own") or PipelineError(what, where=run.url, cure=cure)


def _attempt(
    config: TrainConfig, report: Report, work: Work, preflight: Callable[[ClusterConfig], None], patience: Patience
) -> Row:
    with started(config.cluster) as folder:
        import ray
        from ray.exceptions import RayError
        from ray.train import TrainingFailedError
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        preflight(config.cluster)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        mailbox = ray.remote(Mailbox).options(num_cpus=0, scheduling_strategy=here).remote()
        try:
            return _followed(_trainer(config, mailbox, work, folder), mailbox, report, config.cluster, patience)
        except TrainingFailedError as error:
            raise _cause(error, config) from error
        except RayError as error:  # what `fit` ran on went before the mailbox did
            raise _headless(config.cluster) from error


def _trainer(config: TrainConfig, mailbox: Any, work: Work, folder: Path) -> TorchTrainer:
    from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api import data_parallel_trainer

    setattr(data_parallel_trainer, "ObjectRefWrapper", ByValue)  # noqa: B010 - for the type checker another class

    class FailFast(UserCallback):
        """Ends the run on an error that would come again; Ray alone would restart the workers for it."""

        def after_exception(self, run_context: object, worker_exceptions: dict[int, Exception]) -> None:
            """Raise a final error (here, in the controller, it stops the run); tell of the others."""
            for rank, error in sorted(worker_exceptions.items()):
                if final(error):
                    raise error
                event = f"worker {rank} failed ({type(error).__name__}); all go on from the last checkpoint"
                mailbox.put.remote({"event": event, "workers": False})
            failed, trace = first_of(worker_exceptions), traces_of(worker_exceptions)
            mailbox.put.remote({"failed": failed, "trace": trace, "own": own_of(worker_exceptions)})

    cluster = config.cluster
    return TorchTrainer(
        train_worker,
        train_loop_config={"config": config, "mailbox": mailbox, "work": work},
        torch_config=TorchConfig(backend="nccl" if cluster.gpu else "gloo", timeout_s=300),
        scaling_config=ScalingConfig(
            num_workers=(cluster.min_workers, cluster.workers) if cluster.min_workers else cluster.workers,
            elastic_resize_monitor_interval_s=RESIZE_SECONDS,
            use_gpu=cluster.gpu,
        ),
        run_config=RunConfig(
            name=f"{config.name}-{secrets.token_hex(4)}",
            storage_path=str(folder),
            failure_config=FailureConfig(max_failures=-1),  # Ray counts from a run's beginning; Patience does not
            callbacks=[FailFast()],
        ),
    )


def _followed(trainer: TorchTrainer, mailbox: Any, report: Report, cluster: ClusterConfig, patience: Patience) -> Row:
    """`fit` in a thread, so that signals and rows are ours meanwhile (Ray's own Ctrl-C handler exits with 0)."""
    outcome: dict[str, Any] = {}

    def fit() -> None:
        try:
            outcome["result"] = trainer.fit()
        except BaseException as error:  # noqa: BLE001 - raised again by the thread that waits
            outcome["error"] = error

    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    with _signals_noted() as asked:
        told, waiting = 0.0, _Waiting(cluster)
        while thread.is_alive():
            thread.join(0.5)
            for row in _taken(mailbox, cluster, report):
                waiting.note(row)
                patience.note(row)
                if "failed" not in row:
                    report(row)
            if why := waiting.why():
                report({"event": why})
            if asked and not told:
                mailbox.stop.remote()
                told = time.monotonic()
                report({"event": "stopping after a checkpoint"})
            if len(asked) > 1 or (told and time.monotonic() > told + STOP_SECONDS):
                cure = "the same command goes on from the last one"
                raise interruption(asked)("stopped before a checkpoint", cure=cure)
    if "error" in outcome:
        raise outcome["error"]
    row = outcome["result"].return_value
    if error := row.get("interrupted"):
        raise interruption(asked)(error.what, where=error.where, cure=error.cure)
    if "preempted" in row:
        raise _Preempted(row["preempted"].what)
    return row


def _taken(mailbox: Any, cluster: ClusterConfig, report: Report) -> list[Row]:
    """What rank 0 said since the last call; the mailbox lives where the driver does, so without it the head is gone."""
    import ray
    from ray.exceptions import GetTimeoutError, RayError

    rows, head, said = mailbox.take.remote(), ray.get_runtime_context().gcs_address, time.monotonic()
    while True:
        try:
            return ray.get(rows, timeout=ANSWER_SECONDS)
        except GetTimeoutError as error:
            if refused(head):
                raise _headless(cluster) from error
            if time.monotonic() > said + WAITING_SECONDS:
                said = time.monotonic()
                report({"event": "waiting: Ray does not answer on the driver's node"})
        except RayError as error:
            raise _headless(cluster) from error


def _headless(cluster: ClusterConfig) -> HeadLostError:
    cure = "start the cluster again; the same command goes on from the last checkpoint"
    return HeadLostError("Ray's head is gone", where=cluster.address or "this machine", cure=cure)


class _Waiting:
    """Says now and then why nobody trains, from a start or a failure until workers report."""

    def __init__(self, cluster: ClusterConfig) -> None:
        self._cluster, self._training, self._said = cluster, False, time.monotonic()

    def note(self, row: Row) -> None:
        """Take a row on its way to the driver."""
        if row.get("workers", self._training) != self._training:
            self._training, self._said = row["workers"], time.monotonic()

    def why(self) -> str:
        """The reason, when it is time to tell it; else nothing."""
        if self._training or time.monotonic() < self._said + WAITING_SECONDS:
            return ""
        self._said = time.monotonic()
        kind, there, fewest = _room(self._cluster)
        if there < fewest:
            cure = "add a node" if self._cluster.min_workers else "add a node, or stop and go on with --elastic"
            return f"waiting: {counted(str(fewest))} want a {kind} each and the cluster has {there}; {cure}"
        return "waiting for Ray to start the workers"


@contextlib.contextmanager
def _signals_noted() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT instead of unwinding: the workers are to commit a checkpoint first."""
    asked: list[int] = []
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, lambda number, _: asked.append(number))
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _cause(error: Exception, config: TrainConfig) -> Exception:
    """The one error a person can act on, out of what Ray wraps around it."""
    failures = getattr(error, "worker_failures", {}) or {0: getattr(error, "controller_failure", error)}
    own = [failure for _, failure in sorted(failures.items()) if isinstance(failure, PipelineError) or final(failure)]
    if own:
        return own[0]
    run = open_storage(config.storage).sub(config.name)
    run.write("logs/workers.txt", str(error).encode())
    what = f"the workers did not start, {first_of(failures)}"
    return _NeverStarted(what, where=run.url, cure="see logs/workers.txt there")


def _room(cluster: ClusterConfig) -> tuple[str, int, int]:
    """(kind, how many of it the cluster has, how many are the fewest to train with)."""
    import ray

    kind = "GPU" if cluster.gpu else "CPU"
    return kind, int(ray.cluster_resources().get(kind, 0)), cluster.min_workers or cluster.workers


def _refuse_too_few(cluster: ClusterConfig) -> None:
    """Ray would wait for ever for workers that cannot come."""
    kind, there, fewest = _room(cluster)
    if there < fewest:
        raise ConfigError(f"{fewest} workers want a {kind} each and the cluster has {there}",
                          cure="--cluster.workers fewer")  # fmt: skip


def _take_any(cluster: ClusterConfig) -> None:
    """Take the cluster as it is."""
