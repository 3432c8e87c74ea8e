"""The model as MLflow serves it: a pyfunc around the model folder, loaded by this module, with no pickle in it."""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.bounds import refuse_odd
from pipeline.errors import DataError
from pipeline.model import COVERED, LoadedModel, read_model
from pipeline.storage import open_storage

if TYPE_CHECKING:
    from mlflow.models import ModelSignature

FOLDER = "glow"
"""Name of the model folder inside the MLflow artifact (below data/)."""

LOADER = "pipeline.pyfunc"

WRAPPING = {"MLmodel", "conda.yaml", "python_env.yaml", "requirements.txt"}
"""What MLflow writes around the model folder."""


def save_pyfunc(loaded: LoadedModel, folder: Path, target: Path) -> None:
    """Write an MLflow pyfunc around a model folder: its requirements and its parameters, and no pickle."""
    with warnings.catch_warnings():
        # MLflow 3.17 warns about its own type hints on import, and wants an example of the input there is none of.
        warnings.simplefilter("ignore")
        import mlflow.pyfunc

        mlflow.pyfunc.save_model(
            path=str(target),
            loader_module=LOADER,
            data_path=str(folder),
            signature=_signature(loaded),
            pip_requirements=_requirements(),
        )


def _requirements() -> list[str]:
    """The packages a server of the model needs, as they are here; this one only where it is installed."""
    packages = ("glow-pipeline", "mlflow", "numpy", "safetensors", "torch")
    installed = {name: importlib.metadata.Distribution.discover(name=name) for name in packages}
    found = {name: next(iter(each), None) for name, each in installed.items()}
    return [f"{name}=={package.version}" for name, package in found.items() if package]


def _signature(loaded: LoadedModel) -> ModelSignature:
    from mlflow.models import ModelSignature
    from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec

    model = loaded.config.model
    params = [
        ParamSpec("attributes", "string", ""),
        ParamSpec("label", "long", -1),
        ParamSpec("temperature", "double", 0.7),
        ParamSpec("seed", "long", 0),
        ParamSpec("count", "long", 1),
    ]
    outputs = Schema([TensorSpec(np.dtype("uint8"), (-1, model.size, model.size, model.channels), "images")])
    return ModelSignature(outputs=outputs, params=ParamSchema(params))


def refuse_foreign(artifact: Path) -> None:
    """DataError where an artifact would make an MLflow client run code other than this module's.

    The model folder has its own digest; what lies around it (the loader's name, a `code/` folder) has none.
    """
    import yaml

    cure = "somebody changed the artifact: register the model again, and find out who"
    inside = {f"data/{FOLDER}/{name}" for name in (*COVERED, "model.json", "card.md", "lineage.json")}
    files = {path.relative_to(artifact).as_posix() for path in artifact.rglob("*") if not path.is_dir()}
    if extra := sorted(files - inside - WRAPPING):
        raise DataError(f"{extra[0]} does not belong to a model", where=str(artifact), cure=cure)
    try:
        described = yaml.safe_load((artifact / "MLmodel").read_text(encoding="utf-8"))
        flavors = described["flavors"]
        flavor = flavors["python_function"]
        found = (sorted(map(str, flavors)), flavor.get("loader_module"), flavor.get("data"), flavor.get("code"))
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"not an MLmodel: {error!r}", where=str(artifact), cure=cure) from error
    if found != (["python_function"], LOADER, f"data/{FOLDER}", None):
        what = f"MLmodel names flavors {', '.join(found[0])}, loader {found[1]}, data {found[2]}, code {found[3]}"
        raise DataError(what, where=str(artifact), cure=cure)


class Sampler:
    """What mlflow.pyfunc serves: images of the seeds seed, seed + 1, ... seed + count - 1."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> np.ndarray:
        """uint8 [count, h, w, c]; `model_input` is not looked at, everything is in `params` (see the signature)."""
        asked = {"attributes": "", "label": -1, "temperature": 0.7, "seed": 0, "count": 1} | dict(params or {})
        refuse_odd(count=int(asked["count"]))
        seeds = range(int(asked["seed"]), int(asked["seed"]) + int(asked["count"]))
        pixels = self.loaded.sample(seeds, float(asked["temperature"]), asked["attributes"], int(asked["label"]))
        return pixels.permute(0, 2, 3, 1).contiguous().numpy()


def _load_pyfunc(data_path: str) -> Sampler:
    """Load the sampler; MLflow calls this by name."""
    return Sampler(read_model(open_storage(data_path)))
