"""How many failures a run bears: `max_failures` between two checkpoints, and any number with one after each."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from jobs.cluster.training import Patience
from jobs.cluster.worker import Report, Row, Stop, final, first_of, own_of
from pipeline.config import ClusterConfig, TrainConfig
from pipeline.errors import ConfigError, DataError, PeerLostError, PipelineError, RemoteError
from pipeline.world import in_words
from tests.jobs.runs import ENDLESS, HANG, Traces, followed, jobs, settings, started

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


GLOO = RuntimeError("[/x/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:5. This is")
NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of")


def test_no_memory_comes_again_and_a_lost_neighbour_does_not() -> None:
    told = in_words(NO_MEMORY)
    assert isinstance(told, ConfigError)
    assert final(told)
    assert str(told) == (
        "CUDA out of memory. Tried to allocate 20.00 GiB; a smaller schedule.leaf, or --memory.anchor-every plan"
    )
    for error in (
        RuntimeError("CUDA error: out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
    ):
        assert isinstance(in_words(error), ConfigError)
    for error in (GLOO, torch.distributed.DistBackendError("NCCL"), RuntimeError("Connection reset by peer")):
        told = in_words(error)
        assert isinstance(told, PeerLostError)
        assert not final(told)
    for error in (RuntimeError("another"), OSError("Connection reset by peer"), DataError("out of memory")):
        assert in_words(error) is None


def test_why_a_group_failed_is_told_by_the_rank_that_knows() -> None:
    from ray.exceptions import ActorDiedError  # not above: the scripts below set first what Ray reads when imported

    left, dead, refused = PeerLostError("gone"), ActorDiedError(), RemoteError("nobody answers")
    assert first_of({0: left, 1: dead}).startswith("ActorDiedError: ")
    assert own_of({0: left, 1: dead}) is None
    assert first_of({0: left, 1: OSError("a cable")}) == "OSError: a cable"
    assert own_of({0: left, 1: refused}) is refused
    assert first_of({0: left, 1: left}) == "PeerLostError: gone"


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
    traces.check("workers that failed time and again")


def child(process: psutil.Process, name: str) -> psutil.Process:
    (found,) = [each for each in process.children(recursive=True) if each.name().startswith(name)]
    return found


def controller_dies(driver: psutil.Process) -> None:
    """What `fit` runs on is gone, while the driver's mailbox still answers."""
    child(driver, "ray::TrainCont").kill()


def mailbox_is_silent(driver: psutil.Process) -> None:
    """What the driver has asked for never comes, and nobody tells it so: it looks itself whether there is a head."""
    child(driver, "ray::Mailbox").suspend()
    child(driver, "gcs_server").kill()


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("what", "strike"),
    [
        ("a controller that died alone", controller_dies),
        ("a head that went while the mailbox was silent", mailbox_is_silent),
    ],
    ids=["controller", "silent"],
)
def test_a_head_that_goes_bit_by_bit_is_a_line(
    tmp_path: Path, what: str, strike: Callable[[psutil.Process], None]
) -> None:
    struck = False

    def at_line(process: psutil.Process, line: str) -> None:
        nonlocal struck
        if line.startswith("images ") and not struck:
            struck = True
            strike(process)

    traces = Traces()
    code, output = followed(jobs("train", *settings(tmp_path, ENDLESS), "--cluster.workers", "1"), at_line)
    assert (code, "Traceback" in output) == (7, False), output
    assert output.splitlines()[-1].startswith("error: this machine: Ray's head is gone; start the cluster again")
    traces.check(what)


@pytest.mark.nightly
def test_a_mailbox_that_is_held_is_waited_for_and_it_is_said(tmp_path: Path) -> None:
    held: list[psutil.Process] = []

    def at_line(process: psutil.Process, line: str) -> None:
        if line.startswith("images ") and not held:
            held.append(child(process, "ray::Mailbox"))
            held[0].suspend()
        elif line.startswith("waiting: Ray does not answer on the driver's node"):
            held[0].resume()
            process.terminate()

    traces = Traces()
    code, output = followed(jobs("train", *settings(tmp_path, ENDLESS), "--cluster.workers", "1"), at_line)
    assert (code, "Traceback" in output) == (143, False), output
    assert "stopped after a checkpoint at" in output.splitlines()[-1], output
    traces.check("a mailbox that was held")


SLOW = """
import sys, time
from pathlib import Path
import psutil
from jobs.cluster.training import train
from pipeline.errors import PipelineError
from tests.jobs.test_failures import config_in, steady

def report(row):
    if "images" in row:
        (raylet,) = [each for each in psutil.Process().children(recursive=True) if each.name() == "raylet"]
        raylet.kill()
        time.sleep(15)

try:
    train(config_in(Path(sys.argv[1])), report, steady)
except PipelineError as error:
    print(error)
"""


def steady(config: TrainConfig, report: Report, stop: Stop) -> Row:
    """A loop that learns nothing."""
    for number in range(1000):
        report({"images": number})
        time.sleep(1)
    return {}


def test_a_driver_outlives_the_store_of_objects_on_its_node(tmp_path: Path) -> None:
    """Ray tells it that its node is dead; whatever it owns there Ray's core would look for, and exit without a word."""
    traces = Traces()
    quick = {"RAY_health_check_period_ms": "500", "RAY_health_check_failure_threshold": "2"}
    with started([sys.executable, "-c", SLOW, str(tmp_path)], quick) as process:
        output, _ = process.communicate(timeout=HANG)
    assert process.returncode == 0, output
    assert output.splitlines()[-1].startswith("this machine: Ray's head is gone; start the cluster again"), output
    traces.check("a head whose node went first")
