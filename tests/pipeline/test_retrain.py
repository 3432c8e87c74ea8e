"""A model trained again from its lineage alone is the same model; where it cannot be, one line says why."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from operator import getitem
from pathlib import Path
from typing import Any

import pytest

from jobs import models
from pipeline.checkpoint import newest_step
from pipeline.config import TrainConfig
from pipeline.errors import ConfigError, DataError, Interrupted
from pipeline.export import export_model, read_run
from pipeline.manifest import open_manifest
from pipeline.model import read_model
from pipeline.storage import canonical_json, open_storage
from pipeline.train import run
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


def learned(**changes: str) -> Change:
    """Another last attempt."""
    return lambda lineage: lineage["attempts"][-1].update(changes)


def told(*path: str, **changes: object) -> Change:
    """Other settings of the last attempt, under `path`."""
    return lambda lineage: functools.reduce(getitem, path, lineage["attempts"][-1]["config"]).update(changes)


def test_the_lineage_alone_comes_to_the_same_artifact(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert models.main(["verify", str(model), "--retrain"]) == 0
    first, *_, last = capsys.readouterr().out.splitlines()
    assert last == f"trained again: artifact {first.split()[1].rstrip(':')}, bit-equal"


def taught(folder: Path, images: int, schedule: int = 96, **optim: Any) -> TrainConfig:
    """Train the tiny run's settings in another folder until `images`, of `schedule`; going on where it stands."""
    base = read_run(open_storage(str(trained().run))).config
    changed = replace(base.optim, **optim)
    config = replace(base, storage=str(folder), optim=changed, schedule=replace(base.schedule, images=schedule))
    config = replace(config, allow_change=tuple(f"optim.{name}" for name in optim))
    batches = itertools.count(1)
    started = newest_step(open_storage(str(folder)).sub(config.name))
    with contextlib.suppress(Interrupted):
        run(config, stop=lambda: next(batches) == images // config.schedule.batch - started)
    return config


def exported(folder: Path, config: TrainConfig) -> Path:
    """The model of a run that is gone."""
    found = open_storage(str(folder)).sub(config.name)
    export_model(read_run(found), open_manifest(open_storage(str(trained().data))))
    return Path(shutil.move(folder / config.name / "model", folder / "model"))


def test_a_model_taken_before_its_schedule_ended_is_trained_that_far(tmp_path: Path) -> None:
    model = exported(tmp_path, taught(tmp_path, 64, decay="cosine"))
    assert read_model(open_storage(str(model))).lineage["images"] == 64
    assert models.main(["verify", str(model), "--retrain"]) == 0


def test_a_run_of_several_jobs_and_a_longer_schedule_is_one_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for job, images in (("faces-1", 48), ("faces-2", 80)):
        monkeypatch.setenv("GLOW_JOB", job)
        config = taught(tmp_path, images, schedule=images)
    model = exported(tmp_path, config)
    attempts = json.loads((model / "lineage.json").read_bytes())["attempts"]
    assert [(attempt["job"], attempt["images"]) for attempt in attempts] == [("faces-1", 0), ("faces-2", 48)]
    assert models.main(["verify", str(model), "--retrain"]) == 0


def test_what_changed_on_the_way_is_named_before_anything_is_trained(tmp_path: Path) -> None:
    taught(tmp_path, 48)
    model = exported(tmp_path, taught(tmp_path, 80, lr=1e-3))
    with pytest.raises(ConfigError, match=r"from image 48 on optim\.lr was 0\.002 and is 0\.001"):
        models.main(["verify", str(model), "--retrain"])


def test_another_seed_is_another_model(model: Path) -> None:
    change(model, told(seed=1))
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
        (lambda lineage: lineage.pop("attempts"), "does not say by what all of it was learned"),
        (lambda lineage: lineage["attempts"].insert(0, {}), "does not say by what all of it was learned"),
        (learned(code="0" * 64), "learned with code 000000000000, here is .*git checkout"),
        (learned(torch="1.0.0"), r"torch 1\.0\.0, here is .*pip install torch==1\.0\.0"),
        (learned(processor="mips"), "learned with processor mips, here is"),
        (lambda lineage: lineage["export"].update(code="0" * 64), "exported with code 000000000000, here is"),
        (told("schedule", reduction="overlap"), "rounding"),
        (told("memory", anchor_every="plan"), "memory that was free"),
        (told("cluster", gpu=True), "on GPUs"),
        (told(sead=1), "no setting sead; did you mean seed"),
    ],
    ids=["none", "older", "code", "torch", "processor", "export", "overlap", "plan", "gpu", "unknown"],
)
def test_what_cannot_come_to_the_same_bits_is_refused(model: Path, edit: Change, said: str) -> None:
    change(model, edit)
    with pytest.raises(ConfigError, match=said):
        models.main(["verify", str(model), "--retrain"])
