"""The road from a run to a champion through the commands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from jobs import evaluate, models
from pipeline.errors import ConfigError, DataError, GateError, UsageError
from pipeline.export import export_model, read_run
from pipeline.lineage import findings
from pipeline.manifest import open_manifest
from pipeline.registry import ModelRegistry, load_model
from pipeline.retention import pinned
from pipeline.storage import canonical_json, open_storage
from tests.mlflow_db import MLFLOW_NOISE, fresh_database
from tests.pipeline.models import write_tiny
from tests.pipeline.trained import copy_of_run, lossy_twin, trained

pytestmark = MLFLOW_NOISE


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return fresh_database(tmp_path)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_run_becomes_champion(uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = copy_of_run(tmp_path)
    assert models.main(["register", str(run), "--name", "faces", "--uri", uri]) == 0
    assert models.main(["promote", "faces", "1", "--uri", uri, "--reason", "first"]) == 0
    out = capsys.readouterr().out
    loaded = load_model("models:/faces@champion", uri)
    assert loaded.digest in out
    assert "ok" in out
    assert "models:/faces@champion is now version 1 (ledger entry 1)" in out
    assert load_model(str(run / "model")).digest == loaded.digest

    registry = ModelRegistry(uri)
    tags = registry.tags("faces", 1)
    assert tags["data.prefix"] == str(trained().data)
    assert tags["data.digest"] == loaded.config.data["digest"]
    assert {"step", "images", "fingerprint", "glow.run", "glow.digest"} <= set(tags)
    assert {"code", "commit", "dirty", "device", "packages", "processor", "torch"} <= set(tags)
    assert pinned(open_storage(str(run))) == {int(tags["step"])}, "its checkpoint stays"
    (entry,) = registry.ledger("faces").entries()
    assert (entry.reason, entry.digest) == ("first", loaded.digest)

    assert models.main(["register", str(run), "--name", "faces", "--uri", uri]) == 0
    assert models.main(["promote", "faces", "1", "--uri", uri]) == 0
    assert "is already version 1" in capsys.readouterr().out
    assert len(registry.ledger("faces").entries()) == 1


def test_the_artifact_depends_on_neither_name_nor_place(uri: str, tmp_path: Path) -> None:
    first, second = copy_of_run(tmp_path / "a"), copy_of_run(tmp_path / "b")
    for run, name in ((first, "faces"), (second, "others")):
        assert models.main(["register", str(run), "--name", name, "--uri", uri]) == 0
    assert (first / "model" / "model.json").read_bytes() == (second / "model" / "model.json").read_bytes()
    assert (first / "model" / "lineage.json").read_bytes() != (second / "model" / "lineage.json").read_bytes()


def test_promotion_takes_the_kept_review_of_the_run(uri: str, tmp_path: Path) -> None:
    run = copy_of_run(tmp_path)
    assert evaluate.main([str(run)]) == 0
    assert models.main(["register", str(run), "--name", "faces", "--uri", uri]) == 0
    kept = json.loads((run / "eval" / "val.json").read_bytes())
    kept["evaluations"]["ema"]["bits_per_dim"]["mean"] = 1.2345  # to recognise it
    (run / "eval" / "val.json").write_bytes(canonical_json(kept))
    assert models.main(["promote", "faces", "1", "--uri", uri]) == 0
    assert "1.2345" in ModelRegistry(uri).ledger("faces").entries()[0].gates[0]["detail"]


def test_another_champion_is_compared_on_the_same_images(
    uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_of_run(tmp_path)
    assert models.main(["register", str(run), "--name", "faces", "--uri", uri]) == 0
    assert models.main(["promote", "faces", "1", "--uri", uri]) == 0
    worse = load_model(str(run / "model"))
    register_spoilt(worse.where, tmp_path / "spoilt", uri)
    capsys.readouterr()
    with pytest.raises(GateError, match="bits_per_dim"):
        models.main(["promote", "faces", "2", "--uri", uri, "--data", str(trained().data)])
    assert "FAILED" in capsys.readouterr().out
    gates = ["bits_per_dim", "worst_class", "lineage"]
    forced = [word for gate in gates for word in ("--force-gate", gate)] + ["--reason", "to see"]
    assert models.main(["promote", "faces", "2", "--uri", uri, "--data", str(trained().data), *forced]) == 0
    assert ModelRegistry(uri).resolve("faces", "champion") == 2
    capsys.readouterr()

    assert models.main(["compare", "faces", "champion", "champion", "--uri", uri, "--data", str(trained().data)]) == 0
    assert "difference   +0.00000 ± 0.00000  20 images  equal" in capsys.readouterr().out
    assert models.main(["compare", "faces", "1", "2", "--uri", uri, "--data", str(trained().data), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["one"], found["other"], found["bits_per_dim"]["images"]) == (1, 2, 20)
    assert found["bits_per_dim"]["mean"] > 2 * found["bits_per_dim"]["stderr"] > 0
    assert found["lossless"]
    lossy = ["compare", "faces", "1", "1", "--uri", uri, "--data", str(lossy_twin(tmp_path / "lossy"))]
    assert models.main(lossy) == 0
    assert capsys.readouterr().out.splitlines()[2] == "not comparable: lossy shards"
    assert models.main([*lossy, "--json"]) == 0
    assert not json.loads(capsys.readouterr().out)["lossless"]

    assert models.main(["rollback", "faces", "--uri", uri, "--reason", "seen"]) == 0
    assert "models:/faces@champion is now version 1 (ledger entry 3)" in capsys.readouterr().out
    assert models.main(["history", "faces", "--uri", uri]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2:6] for line in lines] == [
        ["champion", "-", "->", "1"], ["champion", "1", "->", "2"], ["champion", "2", "->", "1"]
    ]  # fmt: skip
    assert "forced bits_per_dim, worst_class, lineage  to see" in lines[1]
    assert lines[2].endswith("1 of 1 gates  seen")
    assert models.main(["history", "faces", "--uri", uri, "--json"]) == 0
    assert [json.loads(line)["reason"] for line in capsys.readouterr().out.splitlines()] == ["", "to see", "seen"]


def test_verify_checks_digests_golden_pixels_and_the_ledger(
    uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_of_run(tmp_path)
    assert models.main(["register", str(run), "--name", "faces", "--uri", uri]) == 0
    assert models.main(["promote", "faces", "1", "--uri", uri]) == 0
    capsys.readouterr()
    assert models.main(["verify", "models:/faces@champion", "--uri", uri]) == 0
    out = capsys.readouterr().out
    assert "golden pixels: bit-equal (the same torch build and processor)" in out
    assert "ledger: 1 entries, their chain is whole" in out
    ModelRegistry(uri).client.set_registered_model_alias("faces", "other", "1")  # nothing to the ledger
    ModelRegistry(uri).client.delete_registered_model_alias("faces", "champion")
    with pytest.raises(DataError, match="champion is no version, the ledger says 1; the next promotion"):
        models.main(["verify", "models:/faces/1", "--uri", uri])
    (run / "model" / "golden.safetensors").write_bytes(b"?")
    with pytest.raises(DataError, match=r"golden\.safetensors: length"):
        models.main(["verify", str(run / "model")])


def test_lineage_that_is_no_longer_so_is_a_failed_gate(uri: str, tmp_path: Path) -> None:
    run = copy_of_run(tmp_path)
    assert models.main(["register", str(run), "--name", "faces", "--uri", uri]) == 0
    registry = ModelRegistry(uri)
    loaded, tags = registry.load("faces", 1), registry.tags("faces", 1)
    assert findings(loaded, tags) == ()
    assert findings(loaded, {}) == ("no glow.run is recorded",)
    assert findings(loaded, tags | {"fingerprint": "0" * 64})[0].startswith("the run's fingerprint: recorded 000000")
    shutil.rmtree(run / "checkpoints")
    assert "no checkpoint yet" in findings(loaded, tags)[0]
    with pytest.raises(GateError, match="lineage"):
        models.main(["promote", "faces", "1", "--uri", uri])


def test_an_artifact_in_the_place_of_the_champions_is_noticed(uri: str, tmp_path: Path) -> None:
    """Put there by one who may write artifacts and tags, but not the ledger."""
    run = copy_of_run(tmp_path)
    assert models.main(["register", str(run), "--name", "faces", "--uri", uri]) == 0
    assert models.main(["promote", "faces", "1", "--uri", uri]) == 0
    register_spoilt(str(run / "model"), tmp_path / "spoilt", uri)
    client = ModelRegistry(uri).client
    places = [client.get_model_version_download_uri("faces", number).removeprefix("file://") for number in "12"]
    shutil.rmtree(places[0])
    shutil.copytree(places[1], places[0])
    client.set_model_version_tag("faces", "1", "glow.digest", ModelRegistry(uri).tags("faces", 2)["glow.digest"])
    for target in ("models:/faces@champion", "models:/faces/1", "models:/faces/2"):
        with pytest.raises(DataError, match=r"champion, version 1, is artifact \w{12}, the ledger says \w{12}"):
            models.main(["verify", target, "--uri", uri])
    with pytest.raises(DataError, match="sha256"):
        models.main(["promote", "faces", "2", "--uri", uri])


def register_spoilt(model: str, folder: Path, uri: str) -> None:
    """Register the model with noise on its weights as the next version of faces."""
    import torch

    from pipeline.config import TrackingConfig
    from pipeline.mlflow_run import found_or_made
    from pipeline.model import write_model

    loaded = load_model(model)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    examples = loaded.golden["labels"], loaded.golden["attributes"]
    storage = open_storage(str(folder))
    write_model(
        storage, loaded.model, loaded.config, directions=loaded.directions, examples=examples, lineage={}, card=""
    )
    registry = ModelRegistry(uri)
    run, _ = found_or_made(registry.client, TrackingConfig(uri=uri), "spoilt", "spoilt")
    registry.register("faces", folder, run, {"data.digest": loaded.config.data["digest"]})


def test_dry_runs_write_nothing(uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = copy_of_run(tmp_path)
    before = files(run)
    assert models.main(["register", str(run), "--name", "faces", "--uri", uri, "--dry-run"]) == 0
    assert evaluate.main([str(run), "--dry-run"]) == 0
    assert files(run) == before
    assert models.main(["register", str(run), "--name", "faces", "--uri", uri]) == 0
    before = files(tmp_path)
    assert models.main(["promote", "faces", "1", "--uri", uri, "--dry-run"]) == 0
    assert "dry run: models:/faces/1 would become champion" in capsys.readouterr().out
    assert files(tmp_path) == before


def test_evaluate_writes_a_report_for_runs_and_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = copy_of_run(tmp_path)
    report = tmp_path / "out" / "report.html"
    assert evaluate.main([str(run), "--max-images", "5", "--report", str(report)]) == 0
    out = capsys.readouterr().out
    assert "averaged and last weights on 5 images of split val" in out
    assert "model / png" in out
    assert {"eval/val.html", "eval/val.json"} <= files(run)
    assert b"bpd_class" not in (run / "metrics.jsonl").read_bytes()  # five images are not the split
    assert report.read_text().startswith("<!doctype html>")
    assert json.loads(report.with_suffix(".json").read_bytes())["split"] == "val"

    write_tiny(tmp_path / "model")
    with pytest.raises(UsageError, match="--data"):
        evaluate.main([str(tmp_path / "model")])
    assert models.main(["register", str(run), "--uri", fresh_database(tmp_path), "--dry-run"]) == 0
    export_model(read_run(open_storage(str(run))), open_manifest(open_storage(str(trained().data))))
    before = files(run)
    assert evaluate.main([str(run / "model"), "--max-images", "5"]) == 0
    out = capsys.readouterr().out
    assert "model: averaged weights on 5 images of split val" in out
    assert "not comparable" not in out + report.read_text()
    lossy = ["--data", str(lossy_twin(tmp_path / "lossy")), "--report", str(report)]
    assert evaluate.main([str(run / "model"), *lossy]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("model (ema)")]
    assert line.endswith(" bits/dim   not comparable: lossy shards")
    headline = report.read_text().partition("bits/dim, held out")[2].partition("</section>")[0]
    assert "not comparable: lossy shards" in headline
    assert json.loads(report.with_suffix(".json").read_bytes())["lossless"] is False
    for words, finding in (
        (["--data", str(lossy_twin(tmp_path / "small", size=8))], "do not fit the model"),
        (["--beside", str(tmp_path / "model")], "its images or conditions are not those"),
        (["--workers", "21"], "21 workers for 20 images"),
        (["--max-images", "1", "--workers", "2"], "2 workers for 1 images"),
        (["--split", "nope"], "no split named 'nope'; splits here: train, val"),
    ):
        with pytest.raises((ConfigError, UsageError), match=finding):
            evaluate.main([str(run), *words])
    assert files(run) == before


def test_a_registration_that_cannot_be_is_refused_before_anything_is_written(uri: str, tmp_path: Path) -> None:
    run = copy_of_run(tmp_path)
    assert models.main(["register", str(run), "--name", "faces", "--uri", uri]) == 0
    shutil.rmtree(run / "model")
    before = files(run)
    for words in (
        *(["--name", name] for name in ("a/b", "a@b", "a:b", "a'b", ".a", "a b", "a" * 300)),
        ["--name", "other", "--registry", "gs://other"],
        ["--name", "other", "--registry", str(run / "config.toml")],
        ["--name", "faces", "--registry", str(tmp_path / "elsewhere")],
    ):
        with pytest.raises((ConfigError, UsageError)):
            models.main(["register", str(run), "--uri", uri, *words])
    assert files(run) == before
    assert [model.name for model in ModelRegistry(uri).client.search_registered_models()] == ["faces"]


@pytest.mark.parametrize("command", ["", "register", "promote", "rollback", "history", "compare", "verify"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        models.main([*command.split(), "--help"])
    assert left.value.code == 0
    assert "usage: python -m jobs models" in capsys.readouterr().out
