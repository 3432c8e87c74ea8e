"""Laws of processes that outlive their starter: ours are found whoever has died, strangers are never touched."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.stack.processes import MARK, Process, belonging, end, free_ports, inherited, listening, spawn

BROOD = """
import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
open(sys.argv[1], "w").close()
time.sleep(600)
"""
"""A service with a child in its session and one in a session of its own."""


@pytest.fixture
def brood(tmp_path: Path) -> Iterator[Process]:
    leader = spawn([sys.executable, "-c", BROOD, tmp_path / "ready"], tmp_path / "log", {**inherited(), MARK: "brood"})
    until((tmp_path / "ready").exists)
    yield leader
    end(belonging([leader], "brood"), signal.SIGKILL, 10)


def until(ready: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_all_that_came_of_a_service_is_found_and_ended(brood: Process) -> None:
    assert len(belonging([brood], "")) == 3
    assert not end(belonging([brood], ""), signal.SIGTERM, 10)
    assert not belonging([brood], "brood")


def test_orphans_of_a_killed_service_are_found(brood: Process) -> None:
    end([brood], signal.SIGKILL, 10)
    assert len(belonging([brood], "")) == 1  # by its session
    assert len(belonging([brood], "brood")) == 2  # and by the mark


def test_a_stranger_with_the_same_pid_is_not_touched(brood: Process) -> None:
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    try:
        recycled = replace(brood, pid=stranger.pid)
        assert not recycled.alive
        assert not belonging([recycled], "")
        assert not end([recycled], signal.SIGKILL, 1)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_a_process_of_another_boot_is_nobody(brood: Process) -> None:
    before = replace(brood, boot="another")
    assert not before.alive
    assert not belonging([before], "")


def test_a_service_sees_little_of_our_environment(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CANARY_SECRET", "7f3a")
        process = spawn([sys.executable, "-c", "import os; print(dict(os.environ))"], tmp_path / "log", inherited())
        until(lambda: not process.alive)
    assert "PATH" in (tmp_path / "log").read_text()
    assert "7f3a" not in (tmp_path / "log").read_text()
    assert os.environ.get("CANARY_SECRET") is None


def test_free_ports_are_free_and_different() -> None:
    ports = free_ports(40)
    assert len(set(ports)) == 40
    assert not any(map(listening, ports))
