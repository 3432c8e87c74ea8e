"""The registry: one version an artifact, gates before aliases, the ledger as the truth, and no pickle anywhere."""

from __future__ import annotations

import os
import pickletools
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config import TrackingConfig
from pipeline.errors import ConfigError, DataError, UsageError
from pipeline.mlflow_run import found_or_made
from pipeline.registry import ModelRegistry, load_model
from tests.mlflow_db import MLFLOW_NOISE, fresh_database
from tests.pipeline.models import write_tiny
from tests.pipeline.versions import promoted, register, saying

pytestmark = MLFLOW_NOISE


@pytest.fixture
def registry(tmp_path: Path) -> ModelRegistry:
    return ModelRegistry(fresh_database(tmp_path))


def test_registering_twice_is_one_version(registry: ModelRegistry, tmp_path: Path) -> None:
    assert [register(registry, tmp_path / f"m{index}", seed) for index, seed in enumerate((0, 0, 1, 0))] == [1, 1, 2, 1]
    versions = registry.client.search_model_versions("name = 'faces'")
    assert sorted(version.version for version in versions) == [1, 2]
    assert registry.tags("faces", 1)["step"] == "12"
    assert versions[0].description == "# run-1\n"
    assert "models history" in registry.client.get_registered_model("faces").description


@pytest.mark.filterwarnings("ignore")  # catching MLflow's own warnings is not a thing threads can do at once
def test_registering_at_once_is_one_version(registry: ModelRegistry, tmp_path: Path) -> None:
    write_tiny(tmp_path / "m")
    run, _ = found_or_made(registry.client, TrackingConfig(uri=registry.uri), "run", "key")
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: registry.register("faces", tmp_path / "m", run, {}), range(8)))
    assert set(found) == {1}
    assert [version.version for version in registry.client.search_model_versions("name = 'faces'")] == [1]


def test_load_model_takes_folders_and_registry_addresses(registry: ModelRegistry, tmp_path: Path) -> None:
    register(registry, tmp_path / "m")
    promoted(registry, 1, saying(2.0, 2.1))
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


@pytest.mark.parametrize(
    "craft", ["loader", "code key", "code folder", "flavor", "pickle", "no MLmodel", "a word", "a number"]
)
def test_an_artifact_that_would_run_other_code_is_refused(registry: ModelRegistry, tmp_path: Path, craft: str) -> None:
    register(registry, tmp_path / "m")
    (described,) = (tmp_path / "artifacts").rglob("MLmodel")
    text = described.read_text()
    if craft == "loader":
        described.write_text(text.replace("loader_module: pipeline.pyfunc", "loader_module: mlflow.sklearn"))
    elif craft == "code key":
        described.write_text(text.replace("    loader_module:", "    code: code\n    loader_module:"))
    elif craft == "flavor":
        described.write_text(text.replace("flavors:\n", "flavors:\n  sklearn:\n    pickled_model: model.pkl\n"))
    elif craft in ("a word", "a number"):
        odd = {
            "a word": "flavors: {python_function: x}\n",
            "a number": text.replace("flavors:\n", "flavors:\n  5: {}\n"),
        }
        described.write_text(odd[craft])
    elif craft == "no MLmodel":
        described.unlink()
    else:
        extra = described.parent / ("code/evil.py" if craft == "code folder" else "data/glow/model.pkl")
        extra.parent.mkdir(exist_ok=True)
        extra.write_text("print('here')")
    for use in (lambda: load_model("models:/faces/1", registry.uri), lambda: promoted(registry, 1, saying(2.0))):
        with pytest.raises(DataError) as caught:
            use()
        assert caught.value.exit_code == 4
        assert re.search(r"MLmodel|does not belong", caught.value.what)


@pytest.mark.parametrize("version", [10**22, 2**31, 0, -1])
def test_a_number_that_no_version_has_is_a_usage_error(registry: ModelRegistry, version: int) -> None:
    for ask in (registry.tags, registry.load):
        with pytest.raises(UsageError, match=f"no version {version}; 1 or more") as refusal:
            ask("faces", version)
        assert refusal.value.where == "models:/faces"


def test_a_version_nobody_registered_here_is_refused(registry: ModelRegistry, tmp_path: Path) -> None:
    register(registry, tmp_path / "m")
    source = registry.client.get_model_version("faces", "1").source
    assert source
    registry.client.create_model_version("faces", source)
    with pytest.raises(DataError, match="the version has no digest"):
        load_model("models:/faces/2", registry.uri)


def test_a_stock_client_samples_in_a_fresh_interpreter_without_pickle(registry: ModelRegistry, tmp_path: Path) -> None:
    register(registry, tmp_path / "m")
    promoted(registry, 1, saying(2.0, 2.1))
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


def test_the_ledger_stays_where_the_first_registration_put_it(registry: ModelRegistry, tmp_path: Path) -> None:
    elsewhere = ModelRegistry(registry.uri, str(tmp_path / "elsewhere"))
    register(elsewhere, tmp_path / "m")
    promoted(registry, 1, saying(2.0, 2.1))
    assert (tmp_path / "elsewhere" / "faces" / "00000001.json").exists()
    with pytest.raises(ConfigError, match="the ledger of faces is at"):
        register(ModelRegistry(registry.uri, str(tmp_path / "third")), tmp_path / "n", seed=1)
