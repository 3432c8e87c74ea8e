"""Training while nodes of the cluster, and its head, come and go: what is learned is what one process learns."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.jobs.nodes import Nodes, nodes
from tests.jobs.runs import CONSTANT, ENDLESS, followed, jobs, left_processes, settings, started, tensors_of
from tests.reliability import measured


@pytest.fixture
def cluster() -> Iterator[Nodes]:
    with nodes() as cluster:
        cluster.add()
        cluster.add()
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


@pytest.mark.timeout(1500)
def test_nodes_and_the_head_come_and_go(cluster: Nodes, tmp_path: Path) -> None:
    """Promises R2, R3, R4: a node is killed, then the head; elastic, a node leaves, one comes, one is killed."""
    words = [*settings(tmp_path, ENDLESS), "--name", "moved", *CONSTANT, "--cluster.address", cluster.address]

    fixed = Watched(jobs("train", *words, "--cluster.workers", "2"), cluster.environment)
    fixed.until("2 workers at work")
    fixed.further(2)
    cluster.kill("n2")
    _, seconds = fixed.until("waiting: 2 workers want a CPU each and the cluster has 1; add a node")
    measured("R3", "fixed: from a killed node to the line that says what is waited for", seconds, "s")
    cluster.kill("head")
    code, last = fixed.end()
    assert (code, last.count("\n")) == (7, 1), fixed.lines
    assert last.startswith(f"error: {cluster.address}: Ray's head is gone; start the cluster again")

    cluster.kill("n1")
    cluster.start_head()
    cluster.add()
    cluster.add()
    begun = time.monotonic()
    elastic = Watched(jobs("train", *words, "--elastic", "1:2"), cluster.environment)
    elastic.until("2 workers at work")
    measured("R2", "from the same command on a new head to two workers at work (Ray)", time.monotonic() - begun, "s")
    elastic.further(2)
    announced = time.monotonic()
    cluster.announce_end("n4", 15)
    left, _ = elastic.until(r"a node goes away: stopped after a checkpoint at (\d+) images; all go on from there")
    measured("R4", "from giving notice of a node's end to the checkpoint", time.monotonic() - announced, "s")
    _, seconds = elastic.until("1 worker at work")
    measured("R4", "from that checkpoint to one worker at work (Ray)", seconds, "s")
    elastic.further(2)

    cluster.pause_workers()  # or there would be no end of images before a node has come
    cluster.add()
    _, seconds = elastic.until("2 workers at work")
    measured("R3", "elastic: from a node that has joined to two workers at work (Ray)", seconds, "s")
    elastic.further(2)
    cluster.kill("n5")
    _, noticed = elastic.until(r"worker \d failed")
    _, ray = elastic.until("1 worker at work")
    _, ours = elastic.until(r"images \d+/")
    measured("R3", "elastic: from a killed node to the failure noticed", noticed, "s")
    measured("R3", "elastic: from there to one worker at work (Ray)", ray, "s")
    measured("R3", "elastic: from there to the next status line (ours, 10 steps included)", ours, "s")
    elastic.process.send_signal(signal.SIGTERM)
    code, last = elastic.end()
    assert code == 143, elastic.lines
    stopped = re.search(r"stopped after a checkpoint at (\d+) images", last)
    assert stopped

    run = tmp_path / "runs" / "moved"
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    resumed = [event["images"] for event in events if event["kind"] == "resumed"]
    assert int(left[1]) in resumed, "nothing was lost for the node that gave notice"
    code, output = followed(jobs("train", *settings(tmp_path, int(stopped[1])), "--name", "unmoved", *CONSTANT))
    assert code == 0, output
    assert tensors_of(run) == tensors_of(tmp_path / "runs" / "unmoved")
    assert left_processes() == []
