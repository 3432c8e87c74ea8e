"""Training while nodes of the cluster, and its head, come and go: what is learned is what one process learns."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.export import export_model, read_run
from pipeline.manifest import open_manifest
from pipeline.storage import open_storage
from tests.jobs.nodes import Nodes, nodes
from tests.jobs.runs import (
    CONSTANT,
    ENDLESS,
    HANG,
    dataset,
    followed,
    jobs,
    left_processes,
    settings,
    started,
    tensors_of,
    upload,
)
from tests.reliability import measured

WAITS = "waiting: 2 workers want a CPU each and the cluster has 1; add a node"
AT_WORK = "from the same command on a new head to two workers at work (Ray)"
SUBMITTED_AT_WORK = "from the same submission on a new head to two workers at work (Ray)"


@pytest.fixture
def cluster() -> Iterator[Nodes]:
    """A head, and as yet no nodes."""
    with nodes() as cluster:
        cluster.start_head()
        yield cluster


class Watched:
    """A command whose output is read as far as something is said."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.process, self.lines = started(command, environment), list[str]()

    def until(self, said: str) -> tuple[re.Match[str], float]:
        """Read on to a line that begins so; what matched, and the seconds from here to there."""
        start = time.monotonic()
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if found := re.match(said, line):
                return found, time.monotonic() - start
        raise AssertionError(f"never said {said!r}: {''.join(self.lines)}")

    def further(self, count: int) -> None:
        """Read on until this many more status lines have come."""
        for _ in range(count):
            self.until(r"images \d+/")

    def end(self) -> tuple[int, str]:
        """(exit code, last line)."""
        assert self.process.stdout is not None
        self.lines += self.process.stdout
        self.process.stdout.close()
        return self.process.wait(), self.lines[-1]


def moved(folder: Path, cluster: Nodes) -> list[str]:
    """The words of a run without an end on a cluster."""
    return [*settings(folder, ENDLESS), "--name", "moved", *CONSTANT, "--cluster.address", cluster.address]


def stopped(run: Watched) -> int:
    """End a run as SIGTERM does; the images it has learned."""
    run.process.send_signal(signal.SIGTERM)
    code, last = run.end()
    assert code == 143, run.lines
    return stopped_at(last)


def stopped_at(line: str) -> int:
    found = re.search(r"stopped after a checkpoint at (\d+) images", line)
    assert found, line
    return int(found[1])


def assert_learned_as_one_process_does(run: str, images: int, folder: Path) -> None:
    code, output = followed(jobs("train", *settings(folder, images), "--name", "unmoved", *CONSTANT))
    assert code == 0, output
    assert tensors_of(run) == tensors_of(folder / "runs" / "unmoved")
    manifest = open_manifest(open_storage(str(dataset())))
    one, other = (read_run(open_storage(str(place))) for place in (run, folder / "runs" / "unmoved"))
    assert export_model(one, manifest) == export_model(other, manifest), "the same artifact"
    assert left_processes() == []


@pytest.mark.timeout(900)
def test_a_node_is_lost_then_the_head_and_a_node_gives_notice(cluster: Nodes, tmp_path: Path) -> None:
    """Promises R2, R3, R4: fixed, a node is killed, then the head; the same command, elastic: a node leaves."""
    words = moved(tmp_path, cluster)
    cluster.add(2)
    fixed = Watched(jobs("train", *words, "--cluster.workers", "2"), cluster.environment)
    fixed.until("2 workers at work")
    fixed.further(2)
    cluster.kill("n2")
    _, seconds = fixed.until(WAITS)
    measured("R3", "fixed: from a killed node to the line that says what is waited for", seconds, "s")
    assert seconds < 60, "never silent for longer"
    cluster.kill("head")
    code, last = fixed.end()
    assert (code, last.count("\n")) == (7, 1), "".join(fixed.lines[-40:])
    assert last.startswith(f"error: {cluster.address}: Ray's head is gone; start the cluster again")
    assert "Traceback" not in "".join(fixed.lines)

    cluster.kill("n1")
    cluster.start_head()
    cluster.add(2)
    begun = time.monotonic()
    elastic = Watched(jobs("train", *words, "--elastic", "1:2"), cluster.environment)
    elastic.until("2 workers at work")
    measured("R2", AT_WORK, time.monotonic() - begun, "s")
    elastic.further(2)
    announced = time.monotonic()
    cluster.announce_end("n4", 15)
    left, _ = elastic.until(r"a node goes away: stopped after a checkpoint at (\d+) images; all go on from there")
    seconds = time.monotonic() - announced
    measured("R4", "from giving notice of a node's end to the checkpoint", seconds, "s")
    assert seconds < 15
    _, seconds = elastic.until("1 worker at work")
    measured("R4", "from that checkpoint to one worker at work (Ray)", seconds, "s")
    elastic.further(1)
    images, run = stopped(elastic), tmp_path / "runs" / "moved"
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    resumed = [event["images"] for event in events if event["kind"] == "resumed"]
    assert int(left[1]) in resumed, "nothing was lost for the node that gave notice"
    assert_learned_as_one_process_does(str(run), images, tmp_path)


@pytest.mark.nightly
@pytest.mark.timeout(1500)
def test_an_elastic_run_grows_by_a_node_and_loses_it(cluster: Nodes, tmp_path: Path) -> None:
    """Promise R3: on one node, one more comes, and is killed."""
    cluster.add()
    elastic = Watched(jobs("train", *moved(tmp_path, cluster), "--elastic", "1:2"), cluster.environment)
    elastic.until("1 worker at work")
    elastic.further(2)
    cluster.pause_workers()  # or there would be no end of images before a node has come
    cluster.add()
    _, seconds = elastic.until("2 workers at work")
    measured("R3", "elastic: from a node that has joined to two workers at work (Ray)", seconds, "s")
    elastic.further(2)
    cluster.kill("n2")
    _, noticed = elastic.until(r"worker \d failed")
    _, ray = elastic.until("1 worker at work")
    _, ours = elastic.until(r"images \d+/")
    measured("R3", "elastic: from a killed node to the failure noticed", noticed, "s")
    measured("R3", "elastic: from there to one worker at work (Ray)", ray, "s")
    measured("R3", "elastic: from there to the next status line (ours, 10 steps included)", ours, "s")
    assert_learned_as_one_process_does(str(tmp_path / "runs" / "moved"), stopped(elastic), tmp_path)


@pytest.mark.nightly
@pytest.mark.timeout(1500)
def test_a_job_whose_head_is_lost_is_submitted_again(s3: str, tmp_path: Path) -> None:
    """Promises R2, R3 under the job server: node and head killed, the same submission goes on; `stop` commits."""
    data, runs = upload(f"{s3}/submitted/data"), f"{s3}/submitted/runs"
    settings(tmp_path, ENDLESS)
    places = ["--data.prefix", data, "--storage", runs, "--data.cache", str(tmp_path / "cache"), "--name", "moved"]
    words = ["toy32", "--config", str(tmp_path / "tiny.toml"), *places, *CONSTANT, "--cluster.workers", "2"]
    with nodes({name: value for name, value in os.environ.items() if name.startswith("AWS_")}) as cluster:
        submit = jobs("cluster", "submit", *words, "--follow", "--address", cluster.job_server)
        cluster.start_head(job_server=True)
        cluster.add(2)
        first = Watched(submit, cluster.environment)
        first.until("moved-1: submitted to")
        first.until("2 workers at work")
        first.further(2)
        cluster.kill("n2")
        first.until(WAITS)
        cluster.kill("head")
        code, last = first.end()
        assert code == 7, first.lines
        assert last.startswith("error: "), first.lines

        cluster.kill("n1")
        cluster.start_head(job_server=True)
        cluster.add(2)
        begun = time.monotonic()
        second = Watched(submit, cluster.environment)
        second.until("moved-2: submitted to")
        second.until("2 workers at work")
        measured(
            "R2", "from the same submission on a new head to two workers at work (Ray)", time.monotonic() - begun, "s"
        )
        second.further(2)
        stop = started(jobs("cluster", "stop", "moved", "--address", cluster.job_server), cluster.environment)
        said, _ = stop.communicate(timeout=HANG)
        code, last = second.end()
        assert (stop.returncode, code) == (0, 143), (said, second.lines)
    attempts = read_run(open_storage(f"{runs}/moved")).attempts
    assert [attempt["job"] for attempt in attempts] == ["moved-1", "moved-2"]
    assert_learned_as_one_process_does(f"{runs}/moved", stopped_at(last), tmp_path)
