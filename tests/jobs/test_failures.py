"""How many failures a run bears: `max_failures` between two checkpoints, and any number with one after each."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest

from jobs.cluster.training import Patience
from jobs.cluster.worker import Report, Row, Stop
from pipeline.config import ClusterConfig, TrainConfig
from pipeline.errors import PipelineError, RemoteError
from tests.jobs.runs import ENDLESS, NOTHING, Traces, followed, jobs, settings

FAILURE = {"failed": "ActorDiedError: gone", "trace": "rank 0\nall of it"}


def config_in(folder: Path) -> TrainConfig:
    return TrainConfig(name="tried", storage=str(folder), cluster=ClusterConfig(workers=1, max_failures=2))


def test_failures_count_between_checkpoints(tmp_path: Path) -> None:
    patience = Patience(config_in(tmp_path))
    for checkpoint in range(1, 30):  # a month with a lost machine a day
        patience.note({"images": checkpoint + 0.5, "ft/checkpoint": float(checkpoint)})
        patience.note({"event": "worker 0 failed"})
        patience.note(FAILURE)
    patience.note({"images": 29.5, "ft/checkpoint": 29.0})
    patience.note(FAILURE)
    with pytest.raises(PipelineError, match="failed 3 times without a new checkpoint, last ActorDiedError: gone"):
        patience.note(FAILURE)
    assert (tmp_path / "tried" / "logs" / "workers.txt").read_text() == "rank 0\nall of it"
    away = RemoteError("nobody answers")
    with pytest.raises(RemoteError, match="nobody answers"):
        patience.note(FAILURE | {"own": away})


FAILING = """
import sys
from pathlib import Path
from jobs.cluster.training import train
from pipeline.errors import PipelineError
from tests.jobs.test_failures import attempt, config_in

kind = sys.argv[2]
try:
    print(train(config_in(Path(sys.argv[1])), print, lambda *words: attempt(kind, *words)))
except PipelineError as error:
    print(error)
"""


def attempt(kind: str, config: TrainConfig, report: Report, stop: Stop) -> Row:
    """A loop that fails five times, after a checkpoint or without."""
    count = Path(config.storage, "count")
    number = int(count.read_text()) + 1 if count.exists() else 1
    count.write_text(str(number))
    report({"images": number, "ft/checkpoint": float(number if kind == "moving" else 1)})
    if number <= 5:
        raise RemoteError("nobody answers") if kind == "away" else OSError("a cable")
    return {"attempts": number}


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("kind", "end"),
    [
        ("moving", "{'attempts': 6}"),
        ("stuck", "the workers failed 3 times without a new checkpoint, last OSError"),
        ("away", "nobody answers"),
    ],
    ids=["moving", "stuck", "away"],
)
def test_ray_restarts_workers_as_often_as_they_get_further(tmp_path: Path, kind: str, end: str) -> None:
    traces = Traces()
    code, output = followed([sys.executable, "-c", FAILING, str(tmp_path), kind])
    assert code == 0, output
    assert end in output.splitlines()[-1], output
    assert "Traceback" not in output
    assert (tmp_path / "tried" / "logs" / "workers.txt").exists() == (kind != "moving")
    assert traces.left() == NOTHING


@pytest.mark.nightly
def test_a_controller_that_dies_alone_is_a_line(tmp_path: Path) -> None:
    """As where a head goes bit by bit: what `fit` ran on is gone while the driver's mailbox still answers."""

    def kill(process: psutil.Process, line: str) -> None:
        if line.startswith("images 160/"):
            (controller,) = [p for p in process.children(recursive=True) if p.name().startswith("ray::TrainCont")]
            controller.kill()

    traces = Traces()
    code, output = followed(jobs("train", *settings(tmp_path, ENDLESS), "--cluster.workers", "2"), kill)
    assert (code, "Traceback" in output) == (7, False), output
    assert output.splitlines()[-1].startswith("error: this machine: Ray's head is gone; start the cluster again")
    assert traces.left() == NOTHING
