"""The model folder: a trained model as files that can be checked before anything in them is parsed.

    model.json               {"files": {name: {"bytes", "sha256"}}, "schema": 1} of the four files below;
                             the sha256 of its own bytes is the artifact digest
    config.json              what the model is: family, its configuration, bits, attribute and class names, data
    weights.safetensors      averaged weights
    directions.safetensors   per level [A, c, h, w]: mean latent with an attribute minus without it
    golden.safetensors       latents of a few seeds, their conditions, and the pixels they decode to
    card.md, lineage.json    for people: names, runs, times; not covered, so equal training gives an equal digest

JSON is canonical, tensors are safetensors, and there is no pickle.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from pydantic import TypeAdapter
from torch import Tensor

from glow import Flow, make_flow
from pipeline.bounds import refuse_odd
from pipeline.config import ModelSettings
from pipeline.errors import DataError
from pipeline.golden import make_golden
from pipeline.sampling import Condition, condition_of, sample
from pipeline.storage import MissingError, Storage, canonical_json, sha256_hex

COVERED = ("config.json", "directions.safetensors", "golden.safetensors", "weights.safetensors")
"""The files whose digests make the artifact digest."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The content of config.json."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    model: ModelSettings
    bits: int
    attributes: tuple[str, ...]
    """Attribute names of the dataset."""
    editable: tuple[str, ...]
    """Those the model is conditioned on and has directions for, in the order of its condition vector."""
    labels: tuple[str, ...]
    data: Mapping[str, Any]
    """Digest, splits and licence of what it learned from; no place, so that copies of a dataset give one digest."""
    family: str = "glow"
    schema: int = 1


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model read from its folder, every byte checked."""

    model: Flow
    config: ModelConfig
    digest: str
    where: str
    directions: tuple[Tensor, ...]
    golden: Mapping[str, Tensor]
    files: Mapping[str, str]
    """sha256 of every covered file."""
    lineage: Mapping[str, Any]
    """lineage.json as it lies there: a hint for people and defaults, not covered by the digest."""

    def sample(
        self, seeds: Sequence[int], temperature: float = 0.7, attributes: str | Sequence[str] = "", label: int = -1
    ) -> Tensor:
        """Images uint8 [n, c, h, w] of seeds; what `attributes` and `label` leave open is as in `condition`."""
        return sample(self.model, self.config.bits, seeds, temperature, self.condition(seeds, attributes, label))

    def condition(self, seeds: Sequence[int], attributes: str | Sequence[str] = "", label: int = -1) -> Condition:
        """The condition of images of seeds: "+Smiling,-Eyeglasses" and a class, the rest as in a real image.

        The real image is number `seed mod 64` of the training split, so a seed keeps its other attributes, and
        combinations are ones that occur; a model has never seen an image with nothing known about it.
        """
        refuse_odd(seed=seeds)
        rows = torch.tensor(list(seeds), dtype=torch.int64) % len(self.golden["labels"])
        base = self.golden["labels"][rows], self.golden["attributes"][rows]
        return condition_of(self.config.model, self.config.editable, base, attributes, label)


def write_model(
    folder: Storage,
    model: Flow,
    config: ModelConfig,
    *,
    directions: Sequence[Tensor],
    examples: Condition,
    lineage: Mapping[str, Any],
    card: str,
) -> str:
    """Write a model folder and return its artifact digest; model.json comes last, so half a folder is not a model.

    `examples`: labels and attributes of the first (at most 64) images of the training split.
    """
    contents = {
        "config.json": canonical_json(dataclasses.asdict(config) | {"model": config.model.settings()}),
        "weights.safetensors": weights_of(model),
        "directions.safetensors": _tensors({f"level.{i}": part for i, part in enumerate(directions)}),
        "golden.safetensors": _tensors(make_golden(model, config, examples)),
    }
    listing = {name: {"bytes": len(data), "sha256": sha256_hex(data)} for name, data in contents.items()}
    root = canonical_json({"schema": 1, "files": listing})
    for name, data in contents.items():
        folder.write(name, data)
    folder.write("card.md", card.encode())
    folder.write("lineage.json", canonical_json(dict(lineage)))
    folder.write("model.json", root)
    return sha256_hex(root)


def read_model(folder: Storage, digest: str = "") -> LoadedModel:
    """Load a model folder; DataError names the file, what was expected and what was found.

    Every covered file is checked against model.json, and model.json against `digest` where one is given, before any
    of them is parsed.
    """
    root = _present(folder, "model.json")
    _same("sha256", folder.where("model.json"), digest or sha256_hex(root), sha256_hex(root))
    listing = _listing(root, folder.where("model.json"))
    contents = {name: _checked(folder, name, entry) for name, entry in listing.items()}
    config = _model_config(contents["config.json"], folder.where("config.json"))
    with _parsing(folder.where("config.json")):
        model = make_flow(config.model)
    with _parsing(folder.where("weights.safetensors")):
        model.load_state_dict(safetensors.torch.load(contents["weights.safetensors"]))
    with _parsing(folder.where("directions.safetensors")):
        directions = safetensors.torch.load(contents["directions.safetensors"])
        levels = tuple(directions[f"level.{index}"] for index in range(config.model.levels))
    with _parsing(folder.where("golden.safetensors")):
        golden = safetensors.torch.load(contents["golden.safetensors"])
    return LoadedModel(
        model=model.eval(),
        config=config,
        digest=sha256_hex(root),
        where=folder.url,
        directions=levels,
        golden=golden,
        files={name: entry["sha256"] for name, entry in listing.items()},
        lineage=_lineage(folder),
    )


def weights_of(model: Flow) -> bytes:
    """The bytes of weights.safetensors: a function of the weights alone."""
    return _tensors(model.state_dict())


def _listing(root: bytes, where: str) -> dict[str, Mapping[str, Any]]:
    """The entries of model.json, or DataError unless it is exactly of the known form."""
    try:
        listing = json.loads(root)["files"]
        shaped = json.loads(root)["schema"] == 1 and all(
            set(entry) == {"bytes", "sha256"} and type(entry["bytes"]) is int and type(entry["sha256"]) is str
            for entry in listing.values()
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"not a model.json: {error!r}", where=where) from error
    if not shaped or tuple(sorted(listing)) != COVERED:
        raise DataError("not a model.json of schema 1", where=where, cure=f"it lists {', '.join(COVERED)}")
    return listing


def _checked(folder: Storage, name: str, entry: Mapping[str, Any]) -> bytes:
    where = folder.where(name)
    data = _present(folder, name)
    _same("length", where, entry["bytes"], len(data))
    _same("sha256", where, entry["sha256"], sha256_hex(data))
    return data


def _same(what: str, where: str, expected: object, found: object) -> None:
    if expected != found:
        raise DataError(
            f"{what}: expected {expected}, found {found}", where=where, cure="restore or write the model again"
        )


def _present(folder: Storage, name: str) -> bytes:
    try:
        return folder.read(name)
    except MissingError as error:
        cure = "a model is a folder with model.json and the files it lists"
        raise DataError("missing from the model folder", where=folder.where(name), cure=cure) from error


def _lineage(folder: Storage) -> Mapping[str, Any]:
    try:
        with _parsing(folder.where("lineage.json")):
            return dict(json.loads(folder.read("lineage.json")))
    except MissingError:
        return {}


def _model_config(data: bytes, where: str) -> ModelConfig:
    with _parsing(where):
        config = TypeAdapter(ModelConfig).validate_json(data, strict=True)
    if (config.family, config.schema) != (config.model.family, 1):
        raise DataError(f"family {config.family}, schema {config.schema}: not known to this version", where=where)
    return config


@contextlib.contextmanager
def _parsing(where: str) -> Iterator[None]:
    """Turn what a parser raises over whole but meaningless content into a DataError."""
    try:
        yield
    except (ValueError, KeyError, TypeError, RuntimeError, safetensors.SafetensorError) as error:
        raise DataError(f"cannot be read: {error}", where=where) from error


def _tensors(tensors: Mapping[str, Tensor]) -> bytes:
    """safetensors bytes: a function of names and values alone."""
    # Copies: safetensors refuses tensors that share memory, and parameters may be views of one vector.
    return safetensors.torch.save(
        {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    )
