"""A model trained again from its lineage alone is the same model; where it cannot be, one line says why."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs import models
from pipeline.errors import ConfigError, DataError
from pipeline.export import export_model, read_run
from pipeline.manifest import open_manifest
from pipeline.storage import canonical_json, open_storage
from tests.pipeline.trained import copy_of_run, trained

Change = Callable[[dict[str, Any]], None]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """An exported model whose run is gone."""
    run = copy_of_run(tmp_path)
    export_model(read_run(open_storage(str(run))), open_manifest(open_storage(str(trained().data))))
    return Path(shutil.move(run / "model", tmp_path / "model"))


def change(model: Path, edit: Change) -> None:
    lineage = json.loads((model / "lineage.json").read_bytes())
    edit(lineage)
    (model / "lineage.json").write_bytes(canonical_json(lineage))


def test_the_lineage_alone_comes_to_the_same_artifact(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert models.main(["verify", str(model), "--retrain"]) == 0
    first, *_, last = capsys.readouterr().out.splitlines()
    assert last == f"trained again: artifact {first.split()[1].rstrip(':')}, bit-equal"


def test_a_model_taken_before_its_schedule_ended_is_trained_that_far(model: Path) -> None:
    change(model, lambda lineage: lineage["recipe"]["config"]["schedule"].update(images=960))
    assert models.main(["verify", str(model), "--retrain"]) == 0


def test_another_seed_is_another_model(model: Path) -> None:
    change(model, lambda lineage: lineage["recipe"]["config"].update(seed=1))
    with pytest.raises(DataError, match=r"trained again it comes to artifact .*weights\.safetensors differ"):
        models.main(["verify", str(model), "--retrain"])


def moved(lineage: dict[str, Any]) -> None:
    lineage["data"]["prefix"] = "/nowhere"


def test_a_dataset_that_moved_is_named(model: Path) -> None:
    change(model, moved)
    with pytest.raises(ConfigError, match=r"^/nowhere.*: the dataset is gone: .*; give --data"):
        models.main(["verify", str(model), "--retrain"])
    assert models.main(["verify", str(model), "--retrain", "--data", str(trained().data)]) == 0


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda lineage: lineage.pop("recipe"), "holds no recipe"),
        (lambda lineage: lineage["recipe"].update(algorithm=1), r"ALGORITHM_VERSION 1, here is \d.*git checkout"),
        (lambda lineage: lineage["recipe"].update(code="0" * 64), "learned with code 000000000000, here is"),
        (lambda lineage: lineage.update(torch="1.0.0"), r"torch 1\.0\.0, here is .*pip install torch==1\.0\.0"),
        (lambda lineage: lineage.update(processor="mips"), "processor mips, here is"),
        (lambda lineage: lineage["recipe"]["config"]["schedule"].update(reduction="overlap"), "rounding"),
        (lambda lineage: lineage["recipe"]["config"]["memory"].update(anchor_every="plan"), "memory that was free"),
        (lambda lineage: lineage["recipe"]["config"]["cluster"].update(gpu=True), "on GPUs"),
        (lambda lineage: lineage["recipe"]["config"].update(sead=1), "no setting sead; did you mean seed"),
    ],
    ids=["recipe", "algorithm", "code", "torch", "processor", "overlap", "plan", "gpu", "unknown"],
)
def test_what_cannot_come_to_the_same_bits_is_refused(model: Path, edit: Change, said: str) -> None:
    change(model, edit)
    with pytest.raises(ConfigError, match=said):
        models.main(["verify", str(model), "--retrain"])
