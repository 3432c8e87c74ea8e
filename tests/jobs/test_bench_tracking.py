"""The bench of steps while MLflow is away: ratios within a round, every state measured, nothing waited for."""

from __future__ import annotations

import json

import pytest

from jobs import bench
from jobs.bench.tracking import STATES, _rows
from tests.reliability import measured
from tests.running import jobs


def test_a_state_is_compared_with_what_was_up_in_the_same_round() -> None:
    """A machine that gets slower from round to round changes no ratio; the first round does not count."""
    rounds = [{"up": (pace, 2 * pace), "hung": (pace, 3 * pace)} for pace in (1.0, 2.0, 8.0)]
    rounds[0]["hung"] = (99.0, 99.0)
    up, hung = _rows(rounds)
    assert up == {"row": "up", "ms": 5000, "x_up": 1, "cpu_ms": 10000, "x_up_cpu": 1}
    assert hung == {"row": "hung", "ms": 5000, "x_up": 1, "cpu_ms": 15000, "x_up_cpu": 1.5}


def test_its_dry_run_says_what_would_be_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["tracking", "--rounds", "3", "--steps", "4", "--dry-run"]) == 0
    assert "records itself in MLflow, 3 rounds of 4 steps" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        bench.main(["tracking", "--rounds", "0"])


@pytest.mark.nightly  # a server, and four processes that import MLflow: half a minute of CPU time
def test_no_state_makes_a_step_wait() -> None:
    """Promise R12: a step that waited for a hung MLflow would take its 30 s, one that cannot reach it some tries."""
    done = jobs("bench", "tracking", "--rounds", "5", "--steps", "4", "--json")
    assert done.returncode == 0, done.stderr
    rows = {row["row"]: row for row in json.loads(done.stdout)["rows"]}
    assert list(rows) == list(STATES)
    assert (rows["up"]["x_up"], rows["up"]["x_up_cpu"]) == (1, 1)
    times = max(row["x_up_cpu"] for state, row in rows.items() if state != "up")
    measured("R12", "`bench tracking`, 5 x 4 steps: CPU of a step, MLflow dead, hung, failing, over up", times, "times")
    assert times <= 1.1
    assert max(row["ms"] for row in rows.values()) < 10_000
