"""Promotion: gates, then the ledger, then the alias; rollback is a promotion to a version that was champion before.

The ledger decides. MLflow's alias follows it, and whoever promotes next puts right what a crash in between left.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pipeline.errors import DataError, UsageError
from pipeline.gates import Evidence, Limits, Result, as_json, golden, judge, refuse_failures
from pipeline.ledger import Entry, Ledger, current, refuse_unconditional
from pipeline.model import LoadedModel
from pipeline.registry import DIGEST_TAG, ModelRegistry, checked_name

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Promotion:
    """What came of a promotion."""

    entry: Entry | None
    """The ledger entry of the alias now; None when nothing was to be written (a dry run)."""
    results: tuple[Result, ...]
    """The gate table; empty where the version already stood there."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What somebody wants: `alias` of the registered model `name` to stand for `version`."""

    name: str
    version: int
    alias: str = "champion"
    reason: str = ""
    forced: tuple[str, ...] = ()
    """Gates that need not pass."""
    dry_run: bool = False

    def __post_init__(self) -> None:
        if not re.fullmatch(r"(?!latest$|v\d+$)[a-z][a-z0-9-]{0,99}", self.alias):  # the ledger keeps it for ever
            cure = "lower case, for champion and Champion would be two; latest and v1, v2 ... are MLflow's own"
            raise UsageError(f"alias {self.alias!r}", cure=cure)
        if self.forced and not self.reason:
            raise UsageError("--force-gate without --reason", cure="say why; it is written into the ledger")
        checked_name(self.name)


def promote(
    registry: ModelRegistry,
    request: Request,
    evidence: Callable[[LoadedModel, str], Evidence],
    limits: Limits | None = None,
    announce: Callable[[Sequence[Result]], None] = lambda results: None,
) -> Promotion:
    """Reconcile, gates, ledger, alias, in this order.

    `evidence` evaluates a model on a split, that of `version` for both sides; `announce` is told the gate table before
    anything follows from it. Raises GateError where a gate fails that is not in `request.forced`, ConflictError where
    another promotion came in between; either leaves everything as it was.
    """
    ledger, entries = _opened(registry, request)
    before = current(entries, request.alias)
    loaded = registry.load(request.name, request.version)
    if before is not None and (before.version, before.digest) == (request.version, loaded.digest):
        return Promotion(before, ())
    split = loaded.config.data["validation"]
    champion = evidence(registry.load(request.name, before.version, before.digest), split) if before else None
    results = tuple(judge(evidence(loaded, split), champion, limits or Limits()))
    announce(results)
    failed = refuse_failures(results, request.forced, f"models:/{request.name}/{request.version}")
    return _decided(registry, request, ledger, entries, loaded.digest, results, failed)


def rollback(registry: ModelRegistry, request: Request) -> Promotion:
    """Let the alias stand for a version it stood for before; 0 is the one the present version replaced.

    It passed its gates then, so nothing is evaluated: its bytes are compared with the digest in the ledger, and its
    golden pixels with what it decodes here.
    """
    ledger, entries = _opened(registry, request)
    now = current(entries, request.alias)
    version = request.version or (now.replaces if now else 0)
    earlier = current([entry for entry in entries if entry.version == version], request.alias)
    if now is None or earlier is None:
        what = f"was never version {version}" if version else "replaced nothing"
        where, cure = f"models:/{request.name}@{request.alias}", "python -m jobs models history shows what it was"
        raise UsageError(what, where=where, cure=cure)
    if now.version == version:
        return Promotion(now, ())
    loaded = registry.load(request.name, version, earlier.digest)
    results = (golden(loaded),)
    failed = refuse_failures(results, request.forced, f"models:/{request.name}/{version}")
    wanted = Request(**{**vars(request), "version": version, "reason": request.reason or f"back from {now.version}"})
    return _decided(registry, wanted, ledger, entries, loaded.digest, results, failed)


def reconcile(registry: ModelRegistry, name: str, ledger: Ledger) -> None:
    """Set every alias, and the text beside its version, to what the ledger says, until that did not change meanwhile.

    This finishes a promotion that a crash cut off between ledger and alias, and puts right an alias set late by a
    slower promoter. An alias whose version somebody deleted in MLflow stays as it is.
    """
    seen: list[Entry] | None = None
    while (entries := ledger.entries()) != seen:
        standing = _standing(registry, name, entries)
        registry.set_aliases(name, {alias: entry.version for alias, entry in standing.items()})
        for entry in standing.values():
            registry.describe(name, entry.version, entry.markdown())
        seen = entries


def verify_ledger(registry: ModelRegistry, name: str, known: Mapping[str, str]) -> int:
    """Entries of a model's ledger; DataError where its chain is broken, or an alias or its artifact is another.

    `known`: digests of artifacts that were read, by alias or version; of the others the versions' tags are compared.
    """
    entries, where, aliases = registry.ledger(name).entries(), f"models:/{name}", registry.aliases(name)
    for alias, entry in sorted(_standing(registry, name, entries).items()):
        found = aliases.get(alias, 0)
        if entry.version != found:
            what = f"{alias} is {f'version {found}' if found else 'no version'}, the ledger says {entry.version}"
            raise DataError(what, where=where, cure="the next promotion or rollback puts it right")
        digest = known.get(alias) or known.get(str(found)) or registry.tags(name, found).get(DIGEST_TAG, "")
        if entry.digest != digest:
            what = f"{alias}, version {found}, is artifact {digest[:12]}, the ledger says {entry.digest[:12]}"
            raise DataError(what, where=where, cure="somebody changed the version: register the model again")
    return len(entries)


def _standing(registry: ModelRegistry, name: str, entries: Sequence[Entry]) -> dict[str, Entry]:
    """The last entry of every alias whose version MLflow still has; of the others it is said that it has not."""
    last, there = {entry.alias: entry for entry in entries}, registry.versions(name)
    for alias, entry in sorted(last.items()):
        if entry.version not in there:
            log.warning("models:/%s@%s: version %s is gone from MLflow", name, alias, entry.version)
    return {alias: entry for alias, entry in last.items() if entry.version in there}


def _opened(registry: ModelRegistry, request: Request) -> tuple[Ledger, list[Entry]]:
    """The ledger, ready to be written to, and what it says."""
    ledger = registry.ledger(request.name)
    if not request.dry_run:
        refuse_unconditional(ledger.registry)
        reconcile(registry, request.name, ledger)
    return ledger, ledger.entries()


def _decided(
    registry: ModelRegistry,
    request: Request,
    ledger: Ledger,
    entries: Sequence[Entry],
    digest: str,
    results: tuple[Result, ...],
    failed: tuple[str, ...],
) -> Promotion:
    """Write the entry, then set the alias."""
    if request.dry_run:
        return Promotion(None, results)
    before = current(entries, request.alias)
    entry = Entry(
        model=request.name,
        alias=request.alias,
        version=request.version,
        digest=digest,
        replaces=before.version if before else 0,
        reason=request.reason,
        forced=failed,
        gates=as_json(results),
    )
    entry = ledger.append(entries, entry)
    reconcile(registry, request.name, ledger)
    return Promotion(entry, results)
