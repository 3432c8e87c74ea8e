"""The ledger: who promoted which version when and why, append-only, hash-chained, one writer a number.

REGISTRY/NAME/00000001.json, 00000002.json, ...: canonical JSON, each with the sha256 of the one before, each created
by a conditional write, so that of racing promoters one wins. It is the truth about aliases; MLflow's follow it.
"""

from __future__ import annotations

import dataclasses
import getpass
import os
import platform
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from pydantic import TypeAdapter, ValidationError

from pipeline.errors import ConfigError, ConflictError, DataError
from pipeline.storage import Storage, canonical_json, sha256_hex

GAP = "&ensp;"
"""Stands between the columns of a table: MLflow's page leaves no room there."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One promotion."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    schema: int = 1
    sequence: int = 0
    """1, 2, 3, ...; set when it is appended, like `previous`."""
    previous: str = ""
    """sha256 of the bytes of the entry before; empty for the first."""
    model: str
    alias: str
    version: int
    digest: str
    """Artifact digest of the version."""
    replaces: int
    """The version the alias stood for before; 0 for none."""
    reason: str
    forced: tuple[str, ...]
    """Gates that did not pass and were overruled."""
    gates: tuple[Mapping[str, Any], ...]
    """Results of the gates."""
    actor: str = field(default_factory=lambda: _actor())
    time: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    """UTC, ISO 8601; for people, nothing is ordered by it."""
    attempt: str = field(default_factory=lambda: secrets.token_hex(8))
    """Random; tells apart entries that would otherwise be equal."""

    def line(self) -> str:
        """For people: when, what, by whom, why, and the gates."""
        failed = [str(gate["gate"]) for gate in self.gates if not gate["passed"]]
        gates = f"{len(self.gates) - len(failed)} of {len(self.gates)} gates"
        forced = f", forced {', '.join(self.forced)}" if self.forced else ""
        change = f"{self.alias} {self.replaces or '-'} -> {self.version}"
        return f"{self.sequence:4}  {self.time}  {change}  {self.actor}  {gates}{forced}  {self.reason}".rstrip()

    def markdown(self) -> str:
        """For people who look at the version: what was decided, and the gates as a table."""
        rows = [
            f"| {gate['gate']}{GAP} | {verdict}{GAP} | {value}{GAP} | {gate['limit']:.4g}{GAP} | {detail} |"
            for gate in self.gates
            for verdict in ["passed" if gate["passed"] else "failed"]
            for detail in [str(gate["detail"]).replace("|", "\\|")]
            for value in ["" if gate["value"] is None else f"{gate['value']:.4g}"]
        ]
        decided = f"Entry {self.sequence} of the ledger: {self.alias} since {self.time}, by {self.actor}"
        why = f", because: {self.reason}" if self.reason else ""
        forced = f" Overruled: {', '.join(self.forced)}." if self.forced else ""
        head = [f"| gate | | value{GAP} | limit{GAP} | |", "|---|---|--:|--:|---|"]
        return "\n".join([f"{decided}{why}.{forced}", "", *head, *rows])

    def __str__(self) -> str:
        return f"version {self.version} to {self.alias} by {self.actor} at {self.time}"


class Ledger:
    """The entries of one registered model under a registry prefix."""

    def __init__(self, registry: Storage, model: str) -> None:
        self.registry, self.storage, self.model = registry, registry.sub(model), model

    def entries(self) -> list[Entry]:
        """All of them, oldest first; DataError where the chain is broken."""
        found: list[Entry] = []
        previous = ""
        for number, key in enumerate(self.storage.list(), start=1):
            data = self.storage.read(key)
            entry = _parsed(data, self.storage.where(key))
            expected = (f"{number:08d}.json", number, previous, self.model)
            if (key, entry.sequence, entry.previous, entry.model) != expected or canonical_json(_tree(entry)) != data:
                cure = "somebody changed the ledger: restore it from a copy"
                raise DataError("the chain of entries is broken here", where=self.storage.where(key), cure=cure)
            found.append(entry)
            previous = sha256_hex(data)
        return found

    def append(self, after: Sequence[Entry], entry: Entry) -> Entry:
        """Append `entry` right behind the entries `after` that the decision was based on; returns it as written.

        Raises ConflictError, naming who won, if others were appended since.
        """
        previous = sha256_hex(canonical_json(_tree(after[-1]))) if after else ""
        entry = dataclasses.replace(entry, sequence=len(after) + 1, previous=previous)
        key = f"{entry.sequence:08d}.json"
        try:
            self.storage.create(key, canonical_json(_tree(entry)))
        except ConflictError as error:
            winner = _parsed(self.storage.read(key), self.storage.where(key))
            if winner.attempt != entry.attempt:  # else our own write, whose answer was lost
                where, cure = self.storage.where(key), "look at what was promoted, then promote again"
                raise ConflictError(f"{winner} came first", where=where, cure=cure) from error
        return entry


def refuse_unconditional(registry: Storage) -> None:
    """ConfigError where the store lets a second writer overwrite what only the first may write."""
    for _ in range(2):
        try:
            registry.create("conditional-writes", b"written once: two promotions never share a number\n")
        except ConflictError:
            return
    cure = "use S3 with If-None-Match (AWS, Ceph, MinIO do), or a folder"
    raise ConfigError("this store knows no conditional writes", where=registry.url, cure=cure)


def current(entries: Sequence[Entry], alias: str) -> Entry | None:
    """The last entry of an alias."""
    return next((entry for entry in reversed(entries) if entry.alias == alias), None)


def _actor() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container without a user database
        user = str(os.getuid())
    return f"{user}@{platform.node()}"


def _tree(entry: Entry) -> dict[str, Any]:
    return dataclasses.asdict(entry)


def _parsed(data: bytes, where: str) -> Entry:
    try:
        return TypeAdapter(Entry).validate_json(data, strict=True)
    except ValidationError as error:
        raise DataError(f"not a ledger entry: {error.errors()[0]['msg'].lower()}", where=where) from error
