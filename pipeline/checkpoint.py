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
import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import safetensors.torch
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from pipeline.errors import ConflictError, DataError, PipelineError
from pipeline.storage import Storage, canonical_json, sha256_hex
from pipeline.world import World, broadcast_object, on_all, on_first

SCHEMA = 1
PART_BYTES = 256 << 20
"""Parts are filled up to about this; a larger tensor is a part of its own."""

STEP = re.compile(r"step-(\d{8,})/")
STRICT = {"extra": "forbid"}
Event = Callable[[str], None]


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


def _quiet(text: str) -> None:
    """Tell nobody."""


def save(
    run: Storage,
    world: World,
    step: int,
    images: int,
    fingerprint: str,
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    keep: int = 3,
    attempt: str = "",
) -> None:
    """Commit a checkpoint of `run` at `step` and retire old ones; collective, equal arguments on every rank.

    Every rank writes its share of the parts; rank 0 commits. An error on any rank is raised on all, and the checkpoints
    before stay. `ConflictError` where another writer committed something else at this step.
    """
    folder = run.sub("checkpoints")
    attempt = broadcast_object(world, attempt or secrets.token_hex(8))
    home = folder.sub(_name(step))
    files = {
        f"{attempt}/part-{index:03d}.safetensors": names for index, names in enumerate(shares(tensors, world.size))
    }
    own = [file for index, file in enumerate(files) if index % world.size == world.rank]
    try:
        written = on_all(world, lambda: [_write_part(home, file, files[file], tensors) for file in own])
    except PipelineError:
        if world.rank == 0:
            home.remove_tree(attempt)
        raise
    parts = tuple(sorted((part for some in written for part in some), key=lambda part: part.file))
    commit = Commit(step=step, images=images, fingerprint=fingerprint, attempt=attempt, parts=parts, state=state)
    on_first(world, lambda: _commit(folder, commit, tensors))
    on_first(world, lambda: _retire(folder, step, keep))


def load_latest(run: Storage, world: World, fingerprint: str, on_event: Event = _quiet) -> Loaded | None:
    """The newest checkpoint of `run` that verifies, on every rank; None where none was ever committed. Collective.

    A damaged one is told to `on_event` (on rank 0) and the one before is taken. `DataError` where all are damaged:
    there is no silent fresh start. `ConflictError` where the run belongs to another fingerprint.
    """
    folder = run.sub("checkpoints")
    steps = on_first(world, lambda: _committed(folder.list()))
    for step in reversed(steps):
        try:
            return _load(folder, world, step, fingerprint)
        except DataError as error:
            if world.rank == 0:
                on_event(f"checkpoint of step {step} is damaged and passed over: {error}")
    if steps:
        cure = "restore one of them, or train under another name"
        raise DataError(f"none of {len(steps)} checkpoints is whole", where=folder.url, cure=cure)
    return None


def shares(tensors: dict[str, Tensor], ranks: int) -> list[list[str]]:
    """The names of each part: largest tensor first to the least filled part. Equal on all ranks; none is empty."""
    total = sum(tensor.nbytes for tensor in tensors.values())
    filled = [0] * max(ranks, -(-total // PART_BYTES))
    names: list[list[str]] = [[] for _ in filled]
    for name in sorted(tensors, key=lambda name: (-tensors[name].nbytes, name)):
        least = filled.index(min(filled))
        filled[least] += max(1, tensors[name].nbytes)
        names[least].append(name)
    return [sorted(some) for some in names if some]


def _write_part(home: Storage, file: str, names: list[str], tensors: dict[str, Tensor]) -> Part:
    # Copies: safetensors refuses tensors that share memory, and parameters may be views of one vector.
    content = {name: tensors[name].detach().cpu().clone(memory_format=torch.contiguous_format) for name in names}
    data = safetensors.torch.save(content)
    home.write(file, data)
    return Part(file=file, bytes=len(data), sha256=sha256_hex(data))


def _commit(folder: Storage, commit: Commit, tensors: dict[str, Tensor]) -> None:
    key, data = f"{_name(commit.step)}/commit.json", commit.to_bytes()
    try:
        folder.create(key, data)
    except ConflictError:
        if not _stands(folder, commit, tensors):
            folder.remove(key)
            folder.create(key, data)


def _stands(folder: Storage, commit: Commit, tensors: dict[str, Tensor]) -> bool:
    """Whether this checkpoint is there already, whole; False where a damaged one is, ConflictError where another is."""
    stored: dict[str, Tensor] = {}
    try:
        found = _read_commit(folder, commit.step)
        for part in found.parts:
            stored.update(_read_part(folder, found, part))
    except DataError:
        return False
    mine, theirs = ((c.images, c.fingerprint, c.state) for c in (commit, found))
    if mine == theirs and stored.keys() == tensors.keys() and all(_equal(tensors[k], stored[k]) for k in stored):
        return True
    folder.remove_tree(f"{_name(commit.step)}/{commit.attempt}")
    where, cure = folder.where(_name(commit.step)), "let one job at a time write a run, then resume it"
    raise ConflictError("another writer committed this step", where=where, cure=cure)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.detach().cpu(), other)


def _load(folder: Storage, world: World, step: int, fingerprint: str) -> Loaded:
    commit = on_first(world, lambda: _read_commit(folder, step))
    if commit.fingerprint != fingerprint:
        found = f"the run was trained as {commit.fingerprint[:12]}, this configuration is {fingerprint[:12]}"
        cure = "train under another name, or with the configuration beside the checkpoints (config.toml)"
        raise ConflictError(found, where=folder.where(_name(step)), cure=cure)
    tensors: dict[str, Tensor] = {}

    def read() -> None:
        for part in commit.parts:
            tensors.update(_read_part(folder, commit, part))

    on_all(world, read)
    return Loaded(step=commit.step, images=commit.images, tensors=tensors, state=commit.state)


def _read_commit(folder: Storage, step: int) -> Commit:
    key = f"{_name(step)}/commit.json"
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


def _read_part(folder: Storage, commit: Commit, part: Part) -> dict[str, Tensor]:
    key = f"{_name(commit.step)}/{part.file}"
    data = folder.read(key)
    found = (len(data), sha256_hex(data))
    if found != (part.bytes, part.sha256):
        told = f"{found[0]} bytes, sha256 {found[1][:12]}; expected {part.bytes} bytes, sha256 {part.sha256[:12]}"
        raise DataError(told, where=folder.where(key))
    try:
        return safetensors.torch.load(data)
    except SafetensorError as error:
        raise DataError(f"not safetensors: {error}", where=folder.where(key)) from error


def _retire(folder: Storage, newest: int, keep: int) -> None:
    """Remove checkpoints before the last `keep`, and attempts that were never committed, up to the newest step.

    Later steps are left alone: they are damaged ones that were passed over, or another writer's.
    """
    keys = folder.list()
    steps = [step for step in _committed(keys) if step <= newest]
    kept = {newest, *steps[-max(1, keep) :]}
    present = {int(match[1]) for key in keys if (match := STEP.match(key))}
    for step in sorted(step for step in present if step <= newest):
        if step in kept:
            _drop_attempts(folder, step, keys)
        else:
            folder.remove(f"{_name(step)}/commit.json")  # first, so that no commit stands over missing parts
            folder.remove_tree(_name(step))


def _drop_attempts(folder: Storage, step: int, keys: list[str]) -> None:
    """Remove the attempts of a kept step that its commit does not name; those of a damaged one stay."""
    inside = [key.split("/") for key in keys if key.startswith(_name(step) + "/")]
    attempts = {parts[1] for parts in inside if len(parts) == 3}
    if len(attempts) < 2:
        return
    try:
        committed = _read_commit(folder, step).attempt
    except DataError:
        return
    for attempt in sorted(attempts - {committed}):
        folder.remove_tree(f"{_name(step)}/{attempt}")


def _committed(keys: list[str]) -> list[int]:
    """The steps with a commit file, by number."""
    return sorted(int(match[1]) for key in keys if (match := STEP.match(key)) and key == f"{match[0]}commit.json")


def _name(step: int) -> str:
    return f"step-{step:08d}"
