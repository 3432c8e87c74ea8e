"""Training on Ray: the one file that knows it.

`train` runs the ordinary loop on Ray Train workers and gives back what the loop returns. Ray holds no checkpoint of
ours: every attempt has a new name under a folder that goes away, because Ray takes a known name for the same run and
would skip it; what resumes is the run folder, by the loop itself. Without an address Ray is started here and goes when
the work is done, with every process and file it made. Ray is imported inside functions: its core reads the variables
of `_environment` once, when it is first imported.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import re
import secrets
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import psutil

from pipeline.config import ClusterConfig, TrainConfig
from pipeline.errors import ConfigError, Interrupted, PipelineError, RemoteError
from pipeline.storage import open_storage

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

Row = dict[str, Any]
Report = Callable[[Row], None]
Work = Callable[[TrainConfig, Report], Row]
SIGNALS = (signal.SIGTERM, signal.SIGINT)

ENVIRONMENT = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "120",
    "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": "300",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # a relative path means the same on a worker as here
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""What Ray reads at start; every variable is put back afterwards."""

TRANSIENT = (RemoteError, Interrupted, OSError, RuntimeError)
"""What another attempt may cure beside Ray's own errors (a process or node gone)."""


def train(config: TrainConfig, report: Report, work: Work | None = None) -> Row:
    """Run the loop on `config.cluster.workers` Ray workers; rank 0's rows reach `report`, its summary is returned.

    Failures another attempt may cure restart all workers, at most `cluster.max_failures` times; a PipelineError that
    would come again is raised here at once, as itself.
    """
    for _ in range(config.cluster.max_failures):
        try:
            return _attempt(config, report, work or _loop)
        except _NeverStarted as error:
            report({"event": f"{error}; starting Ray again"})
    return _attempt(config, report, work or _loop)


class _NeverStarted(PipelineError):
    """The group of workers broke while it was being started: Ray then gives up, and keeps what it had reserved."""


def _attempt(config: TrainConfig, report: Report, work: Work) -> Row:
    with _started(config.cluster) as folder:
        import ray
        from ray.train import TrainingFailedError

        _refuse_too_few(config.cluster)
        mailbox = ray.remote(_Mailbox).options(num_cpus=0).remote()
        try:
            return _followed(_trainer(config, mailbox, work, folder), mailbox, report)
        except TrainingFailedError as error:
            raise _cause(error, config) from error


class _Mailbox:
    """What rank 0 has said and the driver has not yet read."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def put(self, row: Row) -> None:
        self.rows.append(row)

    def take(self) -> list[Row]:
        rows, self.rows = self.rows, []
        return rows


def _final(error: Exception) -> bool:
    """Whether the same error would come again."""
    return not isinstance(error, TRANSIENT) and not type(error).__module__.startswith("ray.")


def _loop(config: TrainConfig, report: Report) -> Row:
    from pipeline.train import run

    return run(config, report)


def _worker(settings: dict[str, Any]) -> Row:
    """What every Ray worker runs."""
    mailbox = settings["mailbox"]
    return settings["work"](settings["config"], lambda row: mailbox.put.remote(row))


def _trainer(config: TrainConfig, mailbox: Any, work: Work, folder: Path) -> TorchTrainer:
    from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
    from ray.train.torch import TorchConfig, TorchTrainer

    class FailFast(UserCallback):
        """Ends the run on an error that would come again; Ray alone would restart the workers for it."""

        def after_exception(self, run_context: object, worker_exceptions: dict[int, Exception]) -> None:
            """Raise a final error (here, in the controller, it stops the run); tell of the others."""
            for rank, error in sorted(worker_exceptions.items()):
                if _final(error):
                    raise error
                event = f"worker {rank} failed ({type(error).__name__}); all go on from the last checkpoint"
                mailbox.put.remote({"event": event})

    cluster = config.cluster
    return TorchTrainer(
        _worker,
        train_loop_config={"config": config, "mailbox": mailbox, "work": work},
        torch_config=TorchConfig(backend="nccl" if cluster.gpu else "gloo", timeout_s=300),
        scaling_config=ScalingConfig(num_workers=cluster.workers, use_gpu=cluster.gpu),
        run_config=RunConfig(
            name=f"{config.name}-{secrets.token_hex(4)}",
            storage_path=str(folder),
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            callbacks=[FailFast()],
        ),
    )


def _followed(trainer: TorchTrainer, mailbox: Any, report: Report) -> Row:
    """`fit` in a thread, so that signals and rows are ours meanwhile (Ray's own Ctrl-C handler exits with 0)."""
    outcome: dict[str, Any] = {}

    def fit() -> None:
        try:
            outcome["result"] = trainer.fit()
        except BaseException as error:  # noqa: BLE001 - raised again by the thread that waits
            outcome["error"] = error

    import ray

    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.5)
        for row in ray.get(mailbox.take.remote()):
            report(row)
    if "error" in outcome:
        raise outcome["error"]
    return outcome["result"].return_value


def _cause(error: Exception, config: TrainConfig) -> Exception:
    """The one error a person can act on, out of what Ray wraps around it."""
    by_rank = getattr(error, "worker_failures", {})
    failures = [failure for _, failure in sorted(by_rank.items())] or [getattr(error, "controller_failure", error)]
    own = [failure for failure in failures if isinstance(failure, PipelineError) or _final(failure)]
    if own:
        return own[0]
    # A dead process is the cause; the broken collectives of its neighbours are what it caused.
    first = next((failure for failure in failures if type(failure).__module__.startswith("ray.")), failures[0])
    what = f"{type(first).__name__}: {str(first).strip().splitlines()[0]}"
    run = open_storage(config.storage).sub(config.name)
    run.write("logs/workers.txt", str(error).encode())
    if not by_rank:
        return _NeverStarted(f"the workers did not start, {what}", where=run.url, cure="see logs/workers.txt there")
    cure = "logs/workers.txt there has it all; the same command goes on from the last checkpoint"
    return PipelineError(f"the workers failed {config.cluster.max_failures + 1} times, last {what}",
                         where=run.url, cure=cure)  # fmt: skip


def _refuse_too_few(cluster: ClusterConfig) -> None:
    """Ray would wait for ever for workers that cannot come."""
    import ray

    kind = "GPU" if cluster.gpu else "CPU"
    there = int(ray.cluster_resources().get(kind, 0))
    if there < cluster.workers:
        raise ConfigError(f"{cluster.workers} workers want a {kind} each and the cluster has {there}",
                          cure="--cluster.workers fewer")  # fmt: skip


@contextlib.contextmanager
def _started(cluster: ClusterConfig) -> Iterator[Path]:
    """Ray, connected or started here, and a folder for what it writes; all of it gone afterwards."""
    _sweep()
    folder = Path(tempfile.mkdtemp(prefix=f"glow-{os.getpid()}-", dir=_short_folder()))
    others = set(psutil.Process().children(recursive=True))
    with _environment(cluster), _signals_kept(), contextlib.redirect_stdout(io.StringIO()):
        import ray

        try:
            ray.init(**_place(cluster, folder), log_to_driver=False, logging_level=logging.CRITICAL)
            _unwind_on_signals()
            yield folder / "train"
        finally:
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)  # what is being torn down is torn down
            ours = set(psutil.Process().children(recursive=True)) - others
            ray.shutdown()
            _reap(ours)
            shutil.rmtree(folder, ignore_errors=True)


def _place(cluster: ClusterConfig, folder: Path) -> dict[str, Any]:
    if cluster.address:
        return {"address": cluster.address}
    return {
        "address": "local",  # and never one that RAY_ADDRESS happens to name
        "num_cpus": max(cluster.workers, os.cpu_count() or 1),
        "include_dashboard": False,
        "object_store_memory": 100_000_000,
        "_node_ip_address": "127.0.0.1",
        "_temp_dir": str(folder),
    }


@contextlib.contextmanager
def _environment(cluster: ClusterConfig) -> Iterator[None]:
    """The variables Ray and its workers start with."""
    before = dict(os.environ)
    os.environ.update(ENVIRONMENT)
    # Without byte code every worker would parse torch anew: half a minute on two cores.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["OMP_NUM_THREADS"] = str(cluster.threads)
    if not cluster.address:
        os.environ["RAY_AUTH_TOKEN"] = _token()
    known = "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ
    # Left to itself Ray decides one way in the head and another in who connects.
    os.environ.setdefault("RAY_AUTH_MODE", "token" if known else "disabled")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@functools.cache
def _token() -> str:
    """The secret of the clusters this process starts; Ray's core reads it once a process."""
    return secrets.token_hex(32)


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Whatever Ray does to signal handlers, and we after it, is undone."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _unwind_on_signals() -> None:
    """The first SIGTERM or SIGINT becomes an error that unwinds; more of them change nothing."""

    def stop(number: int, frame: FrameType | None) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise Interrupted("stopped by SIGTERM", cure="the same command goes on from the last checkpoint")

    for number in SIGNALS:
        signal.signal(number, stop)


def _reap(processes: set[psutil.Process]) -> None:
    """Wait for the processes Ray started; end by pid those it left."""
    _, left = psutil.wait_procs(processes, timeout=5)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=5)


def _short_folder() -> str:
    """The folder for temporary files, or /tmp where that is too long for a socket's name (107 bytes in all)."""
    usual = tempfile.gettempdir()
    return usual if len(usual) < 30 else "/tmp"


def _sweep() -> None:
    """Remove what a killed driver of this user left."""
    for folder in Path(_short_folder()).glob("glow-*-*"):
        owner = re.fullmatch(r"glow-(\d+)-\w+", folder.name)
        if owner and not Path(f"/proc/{owner[1]}").exists() and folder.stat().st_uid == os.getuid():
            shutil.rmtree(folder, ignore_errors=True)
