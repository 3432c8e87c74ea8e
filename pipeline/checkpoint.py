"""Checkpoints: parts under a name never used before, then one commit file. A run resumes from the newest that verifies.

    RUN/checkpoints/step-00012000/commit.json
    RUN/checkpoints/step-00012000/ATTEMPT/part-000.safetensors ...

commit.json is canonical JSON {"attempt", "fingerprint", "images", "parts": [{"bytes", "file", "sha256"}], "schema",
"sha256", "state", "step"}, created conditionally after every part is in place; its own "sha256" is of the canonical
form without that key. Without a commit there is no checkpoint, whatever else lies there. Parts are safetensors; tensors
are named "<thing>/<tensor>", state is small JSON. Nothing is ordered by time: the newest has the highest step.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import safetensors.torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from pipeline.errors import ConflictError, DataError
from pipeline.lease import Fence
from pipeline.storage import Storage, canonical_json, sha256_hex
from pipeline.world import World, on_all, on_first

SCHEMA = 1
STEP = re.compile(r"step-(\d{8,})/")
STRICT = {"extra": "forbid"}
Event = Callable[[str], None]
Accepted = Callable[["Commit", str], None]
"""Given a commit and where it lies, raises `ConflictError` where training may not go on from it."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A file of tensors, relative to its step's folder."""

    __pydantic_config__ = STRICT
    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Commit:
    """What makes parts a checkpoint."""

    __pydantic_config__ = STRICT
    schema: int = SCHEMA
    step: int
    images: int
    fingerprint: str
    attempt: str
    parts: tuple[Part, ...]
    state: dict[str, Any]

    def to_bytes(self) -> bytes:
        """The content of commit.json."""
        content = asdict(self)
        return canonical_json({**content, "sha256": sha256_hex(canonical_json(content))})


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A verified checkpoint; tensors on the CPU."""

    step: int
    images: int
    tensors: dict[str, Tensor] = field(repr=False)
    state: dict[str, Any]

    def made_with(self, settings: Mapping[str, Any]) -> bool:
        """Whether it was learned with these very settings, as far as it tells."""
        return canonical_json(self.state.get("settings")) == canonical_json(dict(settings))


def _quiet(text: str) -> None:
    """Tell nobody."""


def newest_step(run: Storage) -> int:
    """The newest step with a commit file, whole or not; 0 where there is none."""
    return max(committed(run.sub("checkpoints").list()), default=0)


def accepting(fingerprint: str, settings: Mapping[str, Any] | None = None, allowed: Sequence[str] = ()) -> Accepted:
    """What to ask a checkpoint: was it made with these settings, but for the `allowed` ones? Else `ConflictError`."""
    now = json.loads(canonical_json(settings or {}))

    def accepted(commit: Commit, where: str) -> None:
        if commit.fingerprint == fingerprint:
            return
        before = commit.state.get("settings", {})
        names = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
        refused = [name for name in names if name not in allowed]
        if refused and before:
            told = ", ".join(f"{name} was {before.get(name)} and is {now.get(name)}" for name in refused)
            cure = f"--name ANOTHER for a new run, or --allow-change {' '.join(refused)} to go on with this one"
            raise ConflictError(f"the run was trained with other settings: {told}", where=where, cure=cure)
        if refused or not names:
            told = f"the run was trained as {commit.fingerprint[:12]}, this configuration is {fingerprint[:12]}"
            raise ConflictError(told, where=where, cure="train under another name, or with the run's config.toml")

    return accepted


def load_latest(run: Storage, world: World, accepted: Accepted, on_event: Event = _quiet) -> Loaded | None:
    """The newest checkpoint of `run` that verifies, on every rank; None where none was ever committed. Collective.

    A damaged one is told to `on_event` (on rank 0) and the one before is taken. `DataError` where all are damaged:
    there is no silent fresh start. `accepted` raises `ConflictError` where the run is another's.
    """
    folder = run.sub("checkpoints")
    steps, fence = on_first(world, lambda: (committed(folder.list()), Fence(run)))
    for step in reversed(steps):
        try:
            return _load(folder, world, step, accepted, fence)
        except DataError as error:
            if world.rank == 0:
                on_event(f"checkpoint of step {step} is damaged or void and passed over: {error}")
    if steps:
        cure = "restore one of them, or train under another name"
        raise DataError(f"none of {len(steps)} checkpoints is whole", where=folder.url, cure=cure)
    return None


def _load(folder: Storage, world: World, step: int, accepted: Accepted, fence: Fence) -> Loaded:
    commit = on_first(world, lambda: _standing(folder, step, fence))
    accepted(commit, folder.where(step_name(step)))
    tensors: dict[str, Tensor] = {}

    def read() -> None:
        for part in commit.parts:
            tensors.update(read_part(folder, commit, part))

    on_all(world, read)
    return Loaded(step=commit.step, images=commit.images, tensors=tensors, state=commit.state)


def _standing(folder: Storage, step: int, fence: Fence) -> Commit:
    commit = read_commit(folder, step)
    if not fence.stands(commit.attempt, step):
        raise DataError("committed by a writer that had lost the run", where=folder.where(step_name(step)))
    return commit


def read_commit(folder: Storage, step: int) -> Commit:
    """The commit file of a step below `folder` (RUN/checkpoints); `DataError` where it is not what was written."""
    key = f"{step_name(step)}/commit.json"
    data = folder.read(key)
    try:
        content = json.loads(data)
        del content["sha256"]
        commit = _COMMITS.validate_python(content)
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise DataError("not a commit file", where=folder.where(key)) from error
    if commit.to_bytes() != data or commit.step != step or commit.schema != SCHEMA:
        raise DataError("the commit file was changed, or is another step's", where=folder.where(key))
    return commit


_COMMITS = TypeAdapter(Commit)


def read_part(folder: Storage, commit: Commit, part: Part) -> dict[str, Tensor]:
    """The tensors of a part; `DataError` where its bytes are not the ones committed."""
    key = f"{step_name(commit.step)}/{part.file}"
    data = folder.read(key)
    found = (len(data), sha256_hex(data))
    if found != (part.bytes, part.sha256):
        told = f"{found[0]} bytes, sha256 {found[1][:12]}; expected {part.bytes} bytes, sha256 {part.sha256[:12]}"
        raise DataError(told, where=folder.where(key))
    try:
        return safetensors.torch.load(data)
    except SafetensorError as error:
        raise DataError(f"not safetensors: {error}", where=folder.where(key)) from error


def committed(keys: list[str]) -> list[int]:
    """The steps with a commit file, by number."""
    return sorted(int(match[1]) for key in keys if (match := STEP.match(key)) and key == f"{match[0]}commit.json")


def step_name(step: int) -> str:
    return f"step-{step:08d}"
