"""The registry: one version an artifact, gates before aliases, the ledger as the truth, and no pickle anywhere."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import pickletools
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config import TrackingConfig
from pipeline.errors import ConfigError, ConflictError, DataError, GateError, UsageError
from pipeline.evaluate import Evaluation, Figure
from pipeline.gates import Evidence, Limits, judge, read_limits
from pipeline.mlflow_run import find_run
from pipeline.model import LoadedModel
from pipeline.registry import ModelRegistry, load_model
from tests.mlflow_db import MLFLOW_NOISE, fresh_database
from tests.pipeline.models import write_tiny

pytestmark = MLFLOW_NOISE

LIMITS = Limits(finite_seeds=4)


@pytest.fixture
def registry(tmp_path: Path) -> ModelRegistry:
    return ModelRegistry(fresh_database(tmp_path))


def evaluation(values: list[float], round_trip: float = 1e-6) -> Evaluation:
    labels = tuple(index % 2 for index in range(len(values)))
    names = ("left", "right")
    by_class = {
        name: [v for v, label in zip(values, labels, strict=True) if label == i] for i, name in enumerate(names)
    }
    return Evaluation(
        bits=5,
        bits_per_dim=Figure.of(values),
        log_det=-3.0,
        priors=(0.5, 0.5),
        class_names=names,
        classes={name: Figure.of(found) for name, found in by_class.items()},
        round_trip=round_trip,
        values=tuple(values),
        labels=labels,
    )


def saying(*values: float, **rest: float) -> Callable[[LoadedModel], Evidence]:
    """Evidence with these bits/dim for every model."""
    return lambda loaded: Evidence(loaded, evaluation(list(values), **rest))


def by_digest(found: dict[str, list[float]]) -> Callable[[LoadedModel], Evidence]:
    """Evidence with these bits/dim by artifact digest."""
    return lambda loaded: Evidence(loaded, evaluation(found[loaded.digest]))


def register(registry: ModelRegistry, folder: Path, seed: int = 0, name: str = "faces") -> int:
    write_tiny(folder, seed)
    run = find_run(registry.client, TrackingConfig(uri=registry.uri), "run", f"key-{seed}")
    return registry.register(name, folder, run, {"step": "12"})


def test_registering_twice_is_one_version(registry: ModelRegistry, tmp_path: Path) -> None:
    assert [register(registry, tmp_path / f"m{index}", seed) for index, seed in enumerate((0, 0, 1, 0))] == [1, 1, 2, 1]
    versions = registry.client.search_model_versions("name = 'faces'")
    assert sorted(version.version for version in versions) == [1, 2]
    assert registry.tags("faces", 1)["step"] == "12"
    assert versions[0].description == "# run-1\n"


@pytest.mark.filterwarnings("ignore")  # catching MLflow's own warnings is not a thing threads can do at once
def test_registering_at_once_is_one_version(registry: ModelRegistry, tmp_path: Path) -> None:
    write_tiny(tmp_path / "m")
    run = find_run(registry.client, TrackingConfig(uri=registry.uri), "run", "key")
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: registry.register("faces", tmp_path / "m", run, {}), range(8)))
    assert set(found) == {1}
    assert [version.version for version in registry.client.search_model_versions("name = 'faces'")] == [1]


def test_load_model_takes_folders_and_registry_addresses(registry: ModelRegistry, tmp_path: Path) -> None:
    register(registry, tmp_path / "m")
    registry.promote("faces", 1, saying(2.0, 2.1), limits=LIMITS)
    expected = load_model(str(tmp_path / "m"))
    for where in ("models:/faces@champion", "models:/faces/1", f"file://{tmp_path}/m"):
        found = load_model(where, registry.uri)
        assert found.digest == expected.digest
        assert torch.equal(found.sample([7]), expected.sample([7]))
    with pytest.raises(UsageError, match="models:/NAME@champion"):
        load_model("models:/faces", registry.uri)
    with pytest.raises(UsageError, match="challenger"):
        load_model("models:/faces@challenger", registry.uri)


def test_a_tampered_artifact_is_refused(registry: ModelRegistry, tmp_path: Path) -> None:
    register(registry, tmp_path / "m")
    (weights,) = (tmp_path / "artifacts").rglob("weights.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(DataError, match=r"weights.safetensors.*expected .* found"):
        load_model("models:/faces/1", registry.uri)


def test_a_whole_other_model_in_the_artifact_is_refused(registry: ModelRegistry, tmp_path: Path) -> None:
    register(registry, tmp_path / "m")
    (root,) = (tmp_path / "artifacts").rglob("model.json")
    write_tiny(root.parent, seed=5)
    with pytest.raises(DataError, match=r"model\.json: sha256: expected .* found"):
        load_model("models:/faces/1", registry.uri)


def test_a_stock_client_samples_in_a_fresh_interpreter_without_pickle(registry: ModelRegistry, tmp_path: Path) -> None:
    register(registry, tmp_path / "m")
    registry.promote("faces", 1, saying(2.0, 2.1), limits=LIMITS)
    program = """
import json, sys, mlflow, numpy, pandas
model = mlflow.pyfunc.load_model("models:/faces@champion")
params = {"attributes": "+Smiling,-Eyeglasses", "temperature": 0.9, "seed": 5, "count": 3, "label": 1}
images = model.predict(pandas.DataFrame(), params=params)
numpy.save(sys.argv[1], images)
assert (model.predict(None, params=params) == images).all()
assert model.predict(None).shape == (1, 8, 8, 3)
"""
    environment = os.environ | {
        "MLFLOW_TRACKING_URI": registry.uri,
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "PYTHONPATH": os.getcwd(),
    }
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "x.npy")], check=True, env=environment, cwd=tmp_path)
    images = np.load(tmp_path / "x.npy")
    assert images.dtype == np.uint8
    expected = load_model(str(tmp_path / "m")).sample([5, 6, 7], 0.9, "+Smiling,-Eyeglasses", 1)
    assert (images == expected.permute(0, 2, 3, 1).numpy()).all()


def test_no_pickle_is_written(registry: ModelRegistry, tmp_path: Path) -> None:
    register(registry, tmp_path / "m")
    files = [path for path in (tmp_path / "artifacts").rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"MLmodel", "requirements.txt", "weights.safetensors", "model.json"}
    for path in files:
        assert path.suffix not in (".pkl", ".pickle", ".pt", ".pth", ".bin", ".joblib")
        assert not is_pickle(path.read_bytes())
    requirements = next(path for path in files if path.name == "requirements.txt").read_text().split()
    assert {line.partition("==")[0] for line in requirements} == {
        "glow-pipeline",
        "mlflow",
        "numpy",
        "safetensors",
        "torch",
    }


def is_pickle(data: bytes) -> bool:
    """Whether bytes are a pickle from their first opcode to STOP, or a zip as torch.save writes."""
    if data[:4] == b"PK\x03\x04":
        return True
    try:
        opcodes = [opcode.name for opcode, _, _ in pickletools.genops(data)]
    except (ValueError, IndexError, UnicodeDecodeError, OverflowError):
        return False
    return opcodes[-1] == "STOP"


def test_promotion_writes_the_ledger_then_the_alias(registry: ModelRegistry, tmp_path: Path) -> None:
    register(registry, tmp_path / "m")
    promotion = registry.promote("faces", 1, saying(2.0, 2.1), limits=LIMITS, reason="the first")
    (stored,) = (tmp_path / "registry" / "faces").iterdir()
    entry = json.loads(stored.read_bytes())
    assert promotion.entry is not None
    assert (entry["version"], entry["reason"], entry["forced"], entry["replaces"]) == (1, "the first", [], 0)
    assert entry["digest"] == load_model(str(tmp_path / "m")).digest
    assert [gate["passed"] for gate in entry["gates"]] == [True] * 5
    assert registry.resolve("faces", "champion") == 1
    again = registry.promote("faces", 1, saying(9.0, 9.0), limits=LIMITS)
    assert again.entry == promotion.entry
    assert len(registry.ledger("faces").entries()) == 1


def test_a_worse_version_is_refused_and_nothing_changes(registry: ModelRegistry, tmp_path: Path) -> None:
    register(registry, tmp_path / "a")
    register(registry, tmp_path / "b", seed=1)
    registry.promote("faces", 1, saying(2.0, 2.1), limits=LIMITS)
    digests = {load_model(str(tmp_path / name)).digest: name for name in "ab"}
    values = {digest: [2.0, 2.1] if name == "a" else [2.3, 2.4] for digest, name in digests.items()}
    shown: list[str] = []
    with pytest.raises(GateError, match="bits_per_dim") as caught:
        registry.promote("faces", 2, by_digest(values), limits=LIMITS, announce=lambda r: shown.extend(map(str, r)))
    assert caught.value.exit_code == 5
    assert len(shown) == 5
    assert shown[0].startswith("FAILED")
    assert registry.resolve("faces", "champion") == 1
    assert len(registry.ledger("faces").entries()) == 1

    with pytest.raises(UsageError, match="say why"):
        registry.promote("faces", 2, by_digest(values), limits=LIMITS, forced=["bits_per_dim"])
    forced = registry.promote(
        "faces", 2, by_digest(values), limits=LIMITS, forced=["bits_per_dim", "worst_class"], reason="better looking"
    )
    assert forced.entry is not None
    assert (forced.entry.forced, forced.entry.reason) == (("bits_per_dim", "worst_class"), "better looking")
    assert registry.resolve("faces", "champion") == 2


def test_a_dry_run_changes_nothing(registry: ModelRegistry, tmp_path: Path) -> None:
    register(registry, tmp_path / "m")
    assert registry.promote("faces", 1, saying(2.0, 2.1), limits=LIMITS, dry_run=True).entry is None
    assert registry.ledger("faces").entries() == []
    with pytest.raises(UsageError):
        registry.resolve("faces", "champion")


def test_a_promotion_cut_off_after_the_ledger_is_finished_by_the_next(registry: ModelRegistry, tmp_path: Path) -> None:
    for seed in (0, 1):
        register(registry, tmp_path / f"m{seed}", seed)
    registry.promote("faces", 1, saying(2.0, 2.1), limits=LIMITS)
    registry.promote("faces", 2, saying(2.0, 2.1), limits=LIMITS)
    registry.client.set_registered_model_alias("faces", "champion", "1")  # as a crash, or a slower promoter, leaves it
    registry.promote("faces", 2, saying(2.0, 2.1), limits=LIMITS)
    assert registry.resolve("faces", "champion") == 2


def test_a_promotion_overtaken_during_its_gates_loses(registry: ModelRegistry, tmp_path: Path) -> None:
    for seed in (0, 1):
        register(registry, tmp_path / f"m{seed}", seed)

    def slow(loaded: LoadedModel) -> Evidence:
        ModelRegistry(registry.uri).promote("faces", 2, saying(2.0, 2.1), limits=LIMITS)
        return saying(2.0, 2.1)(loaded)

    with pytest.raises(ConflictError, match="version 2 to champion by"):
        registry.promote("faces", 1, slow, limits=LIMITS)
    assert registry.resolve("faces", "champion") == 2


def promote_in_process(uri: str, number: int) -> str:
    """Race for one alias; returns what came of it."""
    try:
        entry = ModelRegistry(uri).promote("faces", number, saying(2.0, 2.1), limits=LIMITS).entry
        assert entry is not None
        return f"version {entry.version}"
    except ConflictError as error:
        return error.what.split(" to ")[0]


def test_four_processes_promoting_one_version_leave_one_entry(registry: ModelRegistry, tmp_path: Path) -> None:
    register(registry, tmp_path / "m")
    with multiprocessing.get_context("forkserver").Pool(4) as pool:
        found = pool.starmap(promote_in_process, [(registry.uri, 1)] * 4, chunksize=1)
    assert found == ["version 1"] * 4
    assert len(registry.ledger("faces").entries()) == 1
    assert registry.resolve("faces", "champion") == 1


def test_the_ledger_stays_where_the_first_registration_put_it(registry: ModelRegistry, tmp_path: Path) -> None:
    elsewhere = ModelRegistry(registry.uri, str(tmp_path / "elsewhere"))
    register(elsewhere, tmp_path / "m")
    registry.promote("faces", 1, saying(2.0, 2.1), limits=LIMITS)
    assert (tmp_path / "elsewhere" / "faces" / "00000001.json").exists()
    with pytest.raises(ConfigError, match="the ledger of faces is at"):
        register(ModelRegistry(registry.uri, str(tmp_path / "third")), tmp_path / "n", seed=1)


@pytest.mark.parametrize("alias", ["Champion", "best one", ""])
def test_aliases_are_lower_case_words(registry: ModelRegistry, alias: str) -> None:
    with pytest.raises(UsageError, match="alias"):
        registry.promote("faces", 1, saying(2.0), alias=alias)


def test_gates_compare_pair_by_pair_beyond_chance(tmp_path: Path) -> None:
    write_tiny(tmp_path / "m")
    loaded = load_model(str(tmp_path / "m"))

    def passed(new: list[float], old: list[float], **rest: float) -> dict[str, bool]:
        results = judge(Evidence(loaded, evaluation(new, **rest)), Evidence(loaded, evaluation(old)), LIMITS)
        return {result.gate: result.passed for result in results}

    old = [1.0, 3.0, 1.5, 3.5]
    assert all(passed(old, old).values())
    assert all(passed([v + 0.004 for v in old], old).values())  # within the limit
    worse = passed([v + 0.006 for v in old], old)  # small, but the same for every image: no chance
    assert not worse["bits_per_dim"]
    assert worse["worst_class"]
    assert passed([1.3, 2.8, 1.6, 3.3], old)["bits_per_dim"]  # better or worse by chance
    assert not passed([v + 0.05 * (index % 2) for index, v in enumerate(old)], old)["worst_class"]
    assert not passed([float("nan"), 1.0], [1.0, 1.0])["bits_per_dim"]
    assert not passed(old, old, round_trip=2e-3)["round_trip"]
    assert not passed(old, old, round_trip=float("nan"))["round_trip"]
    assert not passed(old, old, round_trip=-1.0)["round_trip"]
    with torch.no_grad():
        next(p for name, p in loaded.model.named_parameters() if name.startswith("levels.0")).fill_(float("inf"))
    broken = passed(old, old)
    assert not broken["finite_samples"]
    assert not broken["golden"]


def test_limits_are_a_table(tmp_path: Path) -> None:
    (tmp_path / "limits.toml").write_text("bits_per_dim = 0.01\nfinite_temperatures = [0.5]\n")
    assert read_limits(tmp_path / "limits.toml") == dataclasses.replace(
        Limits(), bits_per_dim=0.01, finite_temperatures=(0.5,)
    )
    (tmp_path / "limits.toml").write_text("bits = 1")
    with pytest.raises(ConfigError, match="limits are bits_per_dim"):
        read_limits(tmp_path / "limits.toml")
