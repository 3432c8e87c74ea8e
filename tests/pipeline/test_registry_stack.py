"""The registry where it is meant to stand: MLflow on PostgreSQL behind a login, artifacts and ledger in S3."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from types import FrameType

import pytest
from mlflow import MlflowClient

from pipeline.config import TrackingConfig
from pipeline.registry import ModelRegistry
from pipeline.storage import open_storage
from pipeline.tracking import run_key
from tests.pipeline.models import write_tiny
from tests.pipeline.races import HANG, kill_at_boundaries, processes, race_of
from tests.running import RunningStack


@pytest.fixture
def registry(stack: RunningStack, s3: str, monkeypatch: pytest.MonkeyPatch) -> ModelRegistry:
    for name, value in stack.stack.access["mlflow"].items():
        monkeypatch.setenv(name, value)
    return ModelRegistry(stack.stack.url("mlflow"), f"{s3}/registry")


def test_of_racing_promoters_one_wins_a_round(registry: ModelRegistry, tmp_path: Path) -> None:
    race_of(registry, tmp_path, racers=4, rounds=3, name="race")


@pytest.mark.nightly
def test_of_sixteen_racing_promoters_one_wins_each_of_twenty_rounds(registry: ModelRegistry, tmp_path: Path) -> None:
    race_of(registry, tmp_path, racers=16, rounds=20, name="great-race")


@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.nightly)])
def test_a_kill_at_a_boundary_is_put_right_by_the_next_promotion(
    registry: ModelRegistry, tmp_path: Path, stride: int
) -> None:
    print(kill_at_boundaries(registry, tmp_path, stride, name=f"killed-{stride}"), "boundaries")


def register_run(
    environment: Mapping[str, str], uri: str, prefix: str, run: str, start: Barrier, said: Queue[int]
) -> None:
    """Register a run's model when everybody has seen that MLflow does not know the run and is about to make it."""
    os.environ.update(environment)
    registry = ModelRegistry(uri, prefix)

    def profiled(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code is MlflowClient.create_run.__code__:
            sys.setprofile(None)
            start.wait(HANG)

    sys.setprofile(profiled)
    said.put(registry.register_run("at-once", open_storage(run), TrackingConfig(uri=uri)))


def test_of_eight_who_register_an_untracked_run_at_once_there_are_one_version_and_one_run(
    registry: ModelRegistry, s3: str, tmp_path: Path
) -> None:
    write_tiny(tmp_path / "model")
    run = open_storage(f"{s3}/at-once")
    for file in (tmp_path / "model").iterdir():
        run.sub("model").upload(file, file.name)
    lineage = b'{"data":{"digest":"abab","prefix":"s3://somewhere"},"name":"at-once","step":12}'
    run.write("model/lineage.json", lineage)
    context = processes()
    start, said = context.Barrier(8), context.Queue()
    words = (dict(os.environ), registry.uri, f"{s3}/registry", run.url, start, said)
    registering = [context.Process(target=register_run, args=words) for _ in range(8)]
    for process in registering:
        process.start()
    found = [said.get(timeout=HANG) for _ in registering]
    for process in registering:
        process.join(60)
    (version,) = registry.client.search_model_versions("name = 'at-once'")
    assert found == [int(version.version)] * 8
    experiment = registry.client.get_experiment_by_name(TrackingConfig().experiment)
    assert experiment
    (kept,) = registry.client.search_runs([experiment.experiment_id], f"tags.`glow.run` = '{run_key(run)}'")
    assert kept.info.run_id == version.run_id
