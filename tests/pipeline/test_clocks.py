"""Promise R15: nothing is ordered by wall time; wall clocks are read where a person is told a time, nowhere else."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.reliability import measured

ROOT = Path(__file__).parents[2]
CLOCKS = {
    "time", "time_ns", "now", "utcnow", "today", "ctime", "localtime", "gmtime", "create_time",
    "st_mtime", "st_ctime", "st_atime", "st_mtime_ns", "getmtime", "getctime",
}  # fmt: skip
"""Attributes that read a wall clock, or a time that one has written."""

TOLD = {
    ("pipeline/ledger.py", "now"),  # of an entry; entries are chained by digest
    ("pipeline/ledger.py", "time"),  # the same, shown
    ("pipeline/export.py", "now"),  # of lineage.json, beside the digest
    ("pipeline/tracking.py", "time_ns"),  # of rows, whose order is that of images
    ("pipeline/lease.py", "create_time"),  # names a process, with its pid
    ("jobs/stack/services.py", "st_mtime"),  # which log of Ray's to show first
}


def readings(path: Path) -> set[tuple[str, str]]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)} & CLOCKS
    return {(path.relative_to(ROOT).as_posix(), name) for name in found}


def test_wall_clocks_are_read_where_a_time_is_told_and_nowhere_else() -> None:
    paths = [path for room in ("glow", "pipeline", "jobs") for path in (ROOT / room).rglob("*.py")]
    assert set().union(*map(readings, paths)) == TOLD
    measured("R15", "places that read a wall clock, to tell a time, never to order", len(TOLD), "places")
