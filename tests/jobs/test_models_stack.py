"""From a run in S3 to a champion on the real stack, and what is refused on the way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from jobs import evaluate, models, train
from pipeline.config import TrackingConfig
from pipeline.errors import DataError, GateError
from pipeline.export import export_model, read_run
from pipeline.manifest import open_manifest
from pipeline.mlflow_run import found_or_made
from pipeline.model import write_model
from pipeline.registry import ModelRegistry, load_model
from pipeline.storage import Storage, open_storage
from tests.jobs.runs import dataset, settings
from tests.pipeline.test_tracking import history
from tests.pipeline.test_tracking_stack import hung
from tests.pipeline.trained import trained
from tests.running import RunningStack

pytestmark = pytest.mark.timeout(900)

STABLE = {
    "train/bits_per_dim", "train/log_det_bpd", "train/prior_bpd", "train/grad_norm", "train/inversion_error",
    "val/bits_per_dim", "perf/images_per_s", "perf/data_wait_pct", "perf/mfu", "perf/peak_gb",
    "ft/restarts", "ft/skipped",
}  # fmt: skip
"""Names that dashboards may rely on, besides val/bpd_class/NAME."""


@pytest.fixture
def registry(stack: RunningStack, s3: str, monkeypatch: pytest.MonkeyPatch) -> ModelRegistry:
    for name, value in stack.stack.access["mlflow"].items():
        monkeypatch.setenv(name, value)
    return ModelRegistry(stack.stack.url("mlflow"), f"{s3}/registry")


def moved(run: Path, to: Storage) -> None:
    """Copy a run to S3."""
    for file in run.rglob("*"):
        if file.is_file():
            to.upload(file, str(file.relative_to(run)))


def register_noisy(registry: ModelRegistry, good: str, name: str, noise: float, folder: Path) -> int:
    """Register the model with noise on its weights: the more noise, the worse it is."""
    loaded = load_model(good)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    examples = loaded.golden["labels"], loaded.golden["attributes"]
    write_model(open_storage(str(folder)), loaded.model, loaded.config, directions=loaded.directions,
                examples=examples, lineage={}, card="# noisy\n")  # fmt: skip
    run, _ = found_or_made(registry.client, TrackingConfig(uri=registry.uri), "noisy", f"noisy-{noise}")
    return registry.register(name, folder, run, {"data.digest": loaded.config.data["digest"]})


def test_the_worse_is_refused_the_better_promoted_the_forced_on_record_and_the_way_back_open(
    registry: ModelRegistry, s3: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = open_storage(f"{s3}/champions/tiny")
    moved(trained().run, run)
    export_model(read_run(run), open_manifest(open_storage(str(trained().data))))
    data, name = ["--data", str(trained().data)], "faces-stack"
    noisy = [register_noisy(registry, f"{run.url}/model", name, noise, tmp_path / f"{noise}") for noise in (0.01, 0.02)]
    lineage = ["--force-gate", "lineage", "--reason", "made by hand"]
    assert models.main(["promote", name, str(noisy[0]), *data, *lineage]) == 0
    assert models.main(["register", run.url, "--name", name, "--registry", f"{s3}/registry"]) == 0
    assert models.main(["promote", name, "3", *data, "--reason", "better"]) == 0
    assert "is now version 3 (ledger entry 2)" in capsys.readouterr().out
    with pytest.raises(GateError, match="bits_per_dim") as caught:
        models.main(["promote", name, str(noisy[1]), *data, *lineage])
    assert caught.value.exit_code == 5
    assert "FAILED  bits_per_dim" in capsys.readouterr().out
    every = [word for gate in ("bits_per_dim", "worst_class", "saturated") for word in ("--force-gate", gate)]
    assert models.main(["promote", name, str(noisy[1]), *data, *every, *lineage]) == 0
    assert models.main(["rollback", name, "--reason", "seen"]) == 0
    entries = registry.ledger(name).entries()
    assert [(entry.version, entry.reason) for entry in entries] == [
        (noisy[0], "made by hand"), (3, "better"), (noisy[1], "made by hand"), (3, "seen")
    ]  # fmt: skip
    assert set(entries[2].forced) >= {"bits_per_dim", "lineage"}
    assert registry.resolve(name, "champion") == 3
    described = registry.client.get_model_version(name, "3").description
    assert described
    assert "Entry 4 of the ledger: champion" in described
    assert described.count("## Promotion") == 1
    capsys.readouterr()
    assert models.main(["verify", f"models:/{name}@champion"]) == 0
    assert "ledger: 4 entries, their chain is whole" in capsys.readouterr().out
    refuse_harm(registry, name, s3)


def refuse_harm(registry: ModelRegistry, name: str, s3: str) -> None:
    """Harm the champion's artifact in S3 in every way; expect each to be refused with exit 4."""
    source = registry.client.get_model_version(name, "3").source
    assert source
    artifact = open_storage(f"{s3.rpartition('/')[0]}/glow/mlflow").sub(source.partition("mlflow-artifacts:/")[2])
    weights, described = artifact.read("data/glow/weights.safetensors"), artifact.read("MLmodel")
    for file, harmed, whole in (
        ("data/glow/weights.safetensors", weights[:-1] + b"?", weights),
        ("MLmodel", described.replace(b"pipeline.pyfunc", b"mlflow.sklearn"), described),
        ("code/evil.py", b"print('here')", b""),
    ):
        artifact.write(file, harmed)
        with pytest.raises(DataError) as caught:
            models.main(["promote", name, "3", "--alias", "challenger"])
        assert caught.value.exit_code == 4
        with pytest.raises(DataError):
            load_model(f"models:/{name}@champion")
        artifact.write(file, whole) if whole else artifact.remove(file)
    assert load_model(f"models:/{name}@champion").digest


def test_what_an_offline_run_recorded_is_delivered_by_the_next_command(
    registry: ModelRegistry, stack: RunningStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    assert dataset().exists()
    with hung(stack):
        words = [*settings(tmp_path, 320), "--name", "offline", "--tracking.uri", registry.uri, "--offline"]
        assert train.main([*words, "--cluster.peak-tflops", "0.1"]) == 0
    run = open_storage(str(tmp_path / "runs" / "offline"))
    assert b'"kind":"unsent"' in run.read("events.jsonl")
    assert f"of {run.where('metrics.jsonl')} and" in capsys.readouterr().err
    assert evaluate.main([run.url]) == 0
    assert "MLflow may lack" not in capsys.readouterr().err
    run_id = json.loads(run.read("run.json"))["run_id"]
    recorded = [json.loads(line) for line in run.read("metrics.jsonl").splitlines()]
    expected = [row["images"] for row in recorded if "train/bits_per_dim" in row["metrics"]]
    assert [step for step, _ in history(registry.uri, run_id, "train/bits_per_dim")] == expected
    assert len(expected) > 1
    metrics = set(registry.client.get_run(run_id).data.metrics)
    assert STABLE - metrics == set()
    classes = {key.removeprefix("val/bpd_class/") for key in metrics if key.startswith("val/bpd_class/")}
    assert set() < classes <= {*open_manifest(open_storage(str(dataset()))).labels}
    for key in STABLE:
        steps = [step for step, _ in history(registry.uri, run_id, key)]
        assert steps == sorted({*steps} & {0, *expected}), f"{key}: the x-axis is images seen"
