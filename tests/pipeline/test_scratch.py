"""Temporary folders: gone with their block, kept while their owner lives, removed after one that was killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

OWNER = """
import sys
from pipeline.scratch import scratch
with scratch() as first, scratch() as second:
    (first / "data").write_text("kept")
    print(first, flush=True)
    sys.stdin.read()
    assert (first / "data").read_text() == "kept"
"""


def owner(place: Path) -> tuple[subprocess.Popen[str], Path]:
    """A process that has two folders there until it is told to end; it, and one of them."""
    command = [sys.executable, "-c", OWNER]
    environment = {**os.environ, "TMPDIR": str(place)}
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


@pytest.mark.parametrize("killed", [True, False])
def test_folders_go_with_their_owner_or_after_it_and_never_before(tmp_path: Path, killed: bool) -> None:
    """Promise R23."""
    living, kept = owner(tmp_path)
    with living:
        dead, left = owner(tmp_path)
        with dead:
            if killed:
                dead.kill()
        assert left.exists() == killed
        (tmp_path / "glow-tmp-half-made").mkdir()
        with owner(tmp_path)[0]:
            assert not left.exists()
            assert not (tmp_path / "glow-tmp-half-made").exists()
            assert kept.exists()
        assert len(list(tmp_path.iterdir())) == 2
    assert living.returncode == 0
    assert list(tmp_path.iterdir()) == []
