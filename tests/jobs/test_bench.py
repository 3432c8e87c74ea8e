"""The bench measures what it says: rows, ratios, bytes; and needs nothing but torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from jobs import bench

SMALL = ["--size", "8", "--levels", "1", "--steps", "8", "--width", "8", "--batch", "2"]


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, dict[str, float]]:
    """Rows by name."""
    assert bench.main([*arguments, "--json"]) == 0
    return {row["row"]: row for row in json.loads(capsys.readouterr().out)["rows"]}


@pytest.mark.parametrize("coupling", ["additive", "affine"])
def test_step_has_a_row_a_variant(capsys: pytest.CaptureFixture[str], coupling: str) -> None:
    rows = run_json(capsys, "step", *SMALL, "--rounds", "2", "--anchors", "0,2,K", "--coupling", coupling)
    assert list(rows) == ["plain", "plain, checkpointed", "ours, anchor 0", "ours, anchor 2", "ours, anchor 8 (K)"]
    assert rows["plain"]["ratio"] == 1
    assert all(row["ms"] >= row["ms_least"] > 0 for row in rows.values())
    saved = [rows[name]["saved_mib"] for name in ("plain", "ours, anchor 0", "ours, anchor 2", "ours, anchor 8 (K)")]
    assert saved == sorted(saved, reverse=True)
    assert saved[0] > 5 * saved[-1] > 0


def test_memory_takes_a_fresh_process_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    rows = run_json(capsys, "memory", "--size", "32", *SMALL[2:4], "--steps", "8", "--width", "64", "--anchors", "K")
    assert list(rows) == ["plain", "plain, checkpointed", "ours, anchor 8 (K)"]
    assert rows["plain"]["peak_mib"] > 1.5 * rows["ours, anchor 8 (K)"]["peak_mib"]
    assert rows["plain"]["peak_mib"] > 0.7 * rows["plain"]["saved_mib"]


def test_the_table_is_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["step", *SMALL, "--rounds", "1", "--anchors", "K"]) == 0
    headline, *lines = capsys.readouterr().out.splitlines()
    assert "8 px, L1 K8 width 8 additive, batch 2" in headline
    assert len(lines) == 4
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize("command", ["step", "memory"])
def test_a_dry_run_measures_nothing(capsys: pytest.CaptureFixture[str], command: str) -> None:
    arguments = ["--size", "1024", "--levels", "7", "--steps", "96", "--width", "2048", "--device", "cuda", "--dry-run"]
    assert bench.main([command, *arguments]) == 0
    said = capsys.readouterr().out
    assert "L7 K96 width 2048" in said
    assert "ours, anchor 96 (K)" in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--size", "63"], "not divisible"),
        (["--anchors", "x"], "numbers and K"),
        (["--anchors", "-1"], "numbers and K"),
        (["--batch", "0"], "1 or more"),
        (["--rounds", "0"], "1 or more"),
        (["--coupling", "cubic"], "additive or affine"),
    ],
)
def test_flags_that_make_no_sense(capsys: pytest.CaptureFixture[str], arguments: list[str], says: str) -> None:
    with pytest.raises(SystemExit) as refused:
        bench.main(["step", *arguments])
    assert refused.value.code == 2
    assert says in capsys.readouterr().err


def test_it_needs_torch_alone() -> None:
    script = f"""if True:
        import sys
        for name in ("ray", "mlflow", "tyro", "webdataset", "fsspec", "s3fs", "pydantic", "rich", "pipeline"):
            sys.modules[name] = None  # importing it fails
        from jobs.bench import main
        sys.exit(main(["step", *{SMALL}, "--rounds", "1"]))
    """
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, stdout=subprocess.DEVNULL)
