"""`jobs evaluate` as people run it: shared by Ray workers it finds the very same figures."""

from __future__ import annotations

import json
from pathlib import Path

from tests.jobs.runs import followed, jobs
from tests.pipeline.trained import copy_of_run


def test_two_ray_workers_find_the_very_same_figures(tmp_path: Path) -> None:
    run = copy_of_run(tmp_path)
    found = {}
    for workers in (0, 2):
        page = tmp_path / f"{workers}.html"
        code, output = followed(jobs("evaluate", str(run), "--workers", str(workers), "--report", str(page)))
        assert code == 0, output
        found[workers] = json.loads(page.with_suffix(".json").read_bytes())
    assert found[2]["evaluations"] == found[0]["evaluations"]
    for tree in found.values():
        del tree["lineage"]["time"]
    assert found[2] == found[0]
    assert len(found[0]["evaluations"]["ema"]["values"]) == 20
