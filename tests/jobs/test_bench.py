"""The bench measures what it says: rows, ratios, bytes; and needs nothing but torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from glow.flops import peak_tflops
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


def test_a_realnvp_is_measured_beside_its_plain_form(capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["--family", "realnvp", "--size", "16", "--levels", "2", "--width", "8", "--residuals", "1", "--batch", "2"]
    assert bench.main(["step", *shape, "--rounds", "1", "--anchors", "0,K", "--json"]) == 0
    printed = capsys.readouterr()
    rows = {row["row"]: row for row in json.loads(printed.out)["rows"]}
    assert list(rows) == ["plain", "ours, anchor 0", "ours, anchor 8 (K)"]
    assert rows["ours, anchor 8 (K)"]["saved_mib"] < 0.2 * rows["plain"]["saved_mib"]
    assert "left out: checkpointed rows" in printed.err


def test_memory_takes_a_fresh_process_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    rows = run_json(capsys, "memory", "--size", "32", *SMALL[2:4], "--steps", "8", "--width", "64", "--anchors", "K")
    assert list(rows) == ["plain", "plain, checkpointed", "ours, anchor 8 (K)"]
    assert rows["plain"]["peak_mib"] > 1.5 * rows["ours, anchor 8 (K)"]["peak_mib"]
    assert rows["plain"]["peak_mib"] > 0.7 * rows["plain"]["saved_mib"]


def test_pure_inversion_needs_one_step_however_deep(capsys: pytest.CaptureFixture[str]) -> None:
    """Peak resident size in fresh processes: at most 6 hidden maps beside what is saved, at any depth."""
    shape = ["--size", "128", "--levels", "1", "--width", "64", "--batch", "4", "--coupling", "affine"]
    assert bench.main(["depth", *shape, "--depths", "4,20", "--rows", "ours", "--anchors", "K", "--json"]) == 0
    hidden = 4 * 64 * 64**2 * 4 / 2**20
    for row in json.loads(capsys.readouterr().out)["rows"]:
        assert row["maps_a_step"] < 0.05
        assert row["peak_mib"] - row["gradients_mib"] - row["saved_mib"] < 6 * hidden


def test_bfloat16_rows_are_measured_beside_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    asked = "plain,plain-bfloat16,ours-bfloat16"
    rows = run_json(capsys, "step", *SMALL, "--rounds", "1", "--rows", asked, "--anchors", "0")
    assert list(rows) == ["plain", "plain, bfloat16 channels_last", "ours, anchor 0, bfloat16 nets"]
    assert rows["ours, anchor 0, bfloat16 nets"]["saved_mib"] < rows["plain"]["saved_mib"]


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_the_compiled_row(capsys: pytest.CaptureFixture[str]) -> None:
    rows = run_json(capsys, "step", *SMALL, "--rounds", "1", "--rows", "plain,compiled")
    assert list(rows) == ["plain", "plain, compiled"]


@pytest.mark.nightly
def test_an_image_of_1024_pixels_trains(capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["--size", "1024", "--levels", "7", "--steps", "8", "--width", "64", "--batch", "1", "--coupling", "affine"]
    rows = run_json(capsys, "memory", *shape, "--rows", "ours", "--anchors", "K")
    assert rows["ours, anchor 8 (K)"]["peak_mib"] < 1024


def test_drift_has_a_row_a_stack_precision_and_anchor(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["drift", "--depths", "8", "--training", "2", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert len(rows) == 2 * 2 * 3
    errors = {(row["coupling"], row["nets"], row["n"]): row for row in rows}
    assert errors["additive", "float32", 8]["round_trip"] < 1e-4
    assert errors["affine", "bfloat16", 8]["round_trip"] > errors["affine", "float32", 8]["round_trip"]


def test_log_determinants_are_timed_fitted_and_drawn(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "log-det.png"
    arguments = ["--channels", "96,384", "--rounds", "1", "--plot", str(picture)]
    assert bench.main(["log-det", *arguments]) == 0
    assert "exponent from 96" in capsys.readouterr().out
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_peaks_are_looked_up_by_the_longest_name() -> None:
    assert peak_tflops("NVIDIA H100 80GB HBM3", True) == 989
    assert peak_tflops("NVIDIA H100 PCIe", True) == 756
    assert peak_tflops("Some Other GPU", False) is None


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
        (["--family", "nice"], "glow or realnvp"),
        (["--rows", "plain,ours-int8"], "not 'ours-int8'"),
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
        names = "ray mlflow tyro webdataset fsspec s3fs pydantic rich matplotlib pipeline"
        for name in names.split():
            sys.modules[name] = None  # importing it fails
        from jobs.bench import main
        sys.exit(main(["step", *{SMALL}, "--rounds", "1"]))
    """
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, stdout=subprocess.DEVNULL)


def test_both_sums_are_timed_on_real_workers(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--size", "8", "--levels", "1", "--steps", "1", "--width", "4", "--batch", "4", "--leaf", "2"]
    assert bench.main(["reduction", *small, "--rounds", "1", "--json"]) == 0
    overlap, tree = json.loads(capsys.readouterr().out)["rows"]
    assert (overlap["row"], overlap["cpu_ratio"], overlap["wall_ratio"]) == ("overlap", 1, 1)
    assert min(tree["cpu_ratio"], tree["wall_ratio"]) > 0
    with pytest.raises(SystemExit):
        bench.main(["reduction", *small, "--workers", "3"])


@pytest.mark.nightly
def test_a_run_with_kills_is_the_run_without(tmp_path: Path) -> None:
    words = ["--images", "960", "--kills", "2", "--plot", str(tmp_path / "kills.png"), "--json"]
    command = [sys.executable, "-m", "jobs", "bench", "kills", *words]  # Ray's own warnings are no errors of ours
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [row["row"] for row in json.loads(done.stdout)["rows"]] == ["kill 1", "kill 2"]
    assert (tmp_path / "kills.png").stat().st_size > 10_000
