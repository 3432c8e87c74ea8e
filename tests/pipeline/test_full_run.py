"""Promise R13: a disk that fills up while a run trains ends it in one line; what was committed stays, and goes on."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.spool import Spool
from tests.faulty import cannot_mount, with_small_disk
from tests.jobs.runs import settings, tensors_of
from tests.reliability import measured

IMAGES = 960


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    folder = tmp_path / "disk"
    if reason := cannot_mount(folder):
        pytest.skip(f"no disk can be made small here: {reason}")
    return folder


def script(*commands: str) -> str:
    """Commands whose output, both streams, is one text with every exit code in it."""
    return "\n".join(f"{command} 2>&1; echo exit $?" for command in commands)


def outputs(command: list[str]) -> list[str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_full_disk_ends_a_run_in_a_line_and_room_lets_it_go_on(disk: Path, tmp_path: Path) -> None:
    words = settings(tmp_path, IMAGES)
    train = " ".join([sys.executable, "-m", "jobs", "train", *words, "--storage", str(disk)])
    newest = f"ls {disk}/toy32/checkpoints/*/commit.json | wc -l"
    again = f"rm {disk}/filler; {train}"
    keep = f"cp -r {disk}/toy32 {tmp_path}/kept"
    during = FILLING.format(train=train, disk=disk)
    lines = outputs(with_small_disk(disk, 4096, ["sh", "-c", script(during, newest, again, keep)]))
    first = lines[: lines.index("exit 3")]
    assert first[-1].startswith(f"error: {disk}/toy32/checkpoints/step-")
    assert "No space left on device; " in first[-1]
    assert "Traceback" not in "".join(lines)
    assert int(lines[len(first) + 1]) >= 1, "the last good one stays"
    assert lines.count("exit 0") == 3, "and the run goes on from it"
    kept = int(lines[len(first) + 1])
    measured("R13", "a run whose disk fills up, exit 3: checkpoints that stayed", kept, "from which it goes on")
    unbroken = " ".join([sys.executable, "-m", "jobs", "train", *words, "--storage", str(tmp_path / "whole")])
    assert outputs(["sh", "-c", script(unbroken)])[-1] == "exit 0"
    assert tensors_of(tmp_path / "kept") == tensors_of(tmp_path / "whole" / "toy32")


FILLING = """(
{train} &
while ! ls {disk}/toy32/checkpoints/*/commit.json >/dev/null 2>&1; do sleep 0.1; done
dd if=/dev/zero of={disk}/filler bs=4k 2>/dev/null
wait $!)"""
"""Trains, and takes all the room there is as soon as a checkpoint is there."""


def test_a_disk_that_is_too_small_is_told_before_anything_starts(disk: Path, tmp_path: Path) -> None:
    train = " ".join([sys.executable, "-m", "jobs", "train", *settings(tmp_path, IMAGES), "--storage", str(disk)])
    told, code, left, _ = outputs(with_small_disk(disk, 900, ["sh", "-c", script(train, f"ls -A {disk} | wc -l")]))
    assert re.fullmatch(r"error: no room: disk for checkpoints 1\.2 MB of \d+\.\d kB free; make room, .*", told)
    assert (code, left) == ("exit 3", "0")


SPOOL = """
import sys
from pathlib import Path
from pipeline.spool import Spool
spool = Spool(Path(sys.argv[1]) / "metrics.jsonl")
added = 0
while spool.append({"images": added, "text": "x" * 1000}):
    added += 1
print(added, len(list(spool.rows())), spool.append({"images": added, "text": "x" * 1000}))
"""


def test_a_spool_on_a_full_disk_drops_rows_and_keeps_whole_lines(disk: Path, tmp_path: Path) -> None:
    program = tmp_path / "spool.py"
    program.write_text(SPOOL)
    run = f"{sys.executable} {program} {disk}"
    more = f"mount -o remount,size=1m tmpfs {disk}"
    lines = outputs(with_small_disk(disk, 64, ["sh", "-c", script(run, more, f"cp {disk}/* {tmp_path}")]))
    added, rows, again = lines[0].split()
    assert int(added) == int(rows) > 10
    measured("R13", "a spool of 64 kB on a full disk: rows that are whole", int(rows), f"of {added} it took")
    assert again == "False"
    spool = Spool(tmp_path / "metrics.jsonl")
    assert len(list(spool.rows())) == int(added)
    assert spool.append({"images": 0})
    spool.close()
