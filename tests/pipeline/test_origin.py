"""Where a model says its program comes from."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.cluster.submission import pack
from pipeline.origin import revision

COMMIT = "d41d8cd98f00b204e9800998ecf8427e00000000"


PROGRAM = """
import os, sys
from pipeline.origin import revision
for told in sys.argv[1:]:
    os.environ["GLOW_REVISION"] = told
    print(revision())
"""


def test_without_git_the_environment_says_the_commit(tmp_path: Path) -> None:
    """As on a node of a cluster, which has the package that was sent and nothing more."""
    pack(tmp_path)
    known = {COMMIT: (COMMIT, False), f"{COMMIT}-dirty": (COMMIT, True), "": ("", False)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *known],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == [str(each) for each in known.values()]


def test_git_knows_better() -> None:
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("this is no clone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOW_REVISION", COMMIT)
        assert revision()[0] == done.stdout.strip()
