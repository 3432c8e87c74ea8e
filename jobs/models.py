"""Models: register what a run learned, and promote a version to champion once it passes the gates.

  python -m jobs models register runs/faces --name faces
  python -m jobs models promote faces 3
  python -m jobs models rollback faces
  python -m jobs models history faces
  python -m jobs models compare faces champion 3
  python -m jobs models verify models:/faces@champion [--retrain]

Registering the same artifact twice gives the same version. Promotions are written to a ledger; of racing ones one wins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

if TYPE_CHECKING:
    from pipeline.gates import Evidence, Result
    from pipeline.model import LoadedModel
    from pipeline.promotion import Promotion, Request
    from pipeline.registry import ModelRegistry

Run = Annotated[str, tyro.conf.arg(metavar="RUN")]
Name = Annotated[str, tyro.conf.arg(metavar="NAME")]
Version = Annotated[int, tyro.conf.arg(metavar="VERSION")]
Which = Annotated[str, tyro.conf.arg(metavar="VERSION_OR_ALIAS")]
Target = Annotated[str, tyro.conf.arg(metavar="MODEL")]


def main(argv: Sequence[str]) -> int:
    """Run one of register, promote, rollback, history, compare, verify."""
    commands = (register, promote, rollback, history, compare, verify)
    return tyro.extras.subcommand_cli_from_dict(
        {command.__name__: command for command in commands},
        prog="python -m jobs models",
        description=__doc__,
        args=list(argv),
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def register(
    run: Run, /, name: str = "", data: str = "", uri: str = "", registry: str = "", dry_run: bool = False
) -> int:
    """Write RUN/model from the newest checkpoint's averaged weights, and register it as a version.

    Args:
        run: The run's folder or s3:// prefix.
        name: Registered model; empty takes the run's name.
        data: Prefix of the dataset; empty takes the one the run learned from.
        uri: MLflow address; empty takes the run's, or MLFLOW_TRACKING_URI where it has none.
        registry: Prefix of the ledger, fixed by the first registration; empty takes a folder beside a sqlite database.
        dry_run: Say what would be registered, write nothing.
    """
    from pipeline.errors import redact
    from pipeline.export import export_model, read_run
    from pipeline.manifest import open_manifest
    from pipeline.mlflow_server import default_uri
    from pipeline.registry import ModelRegistry
    from pipeline.storage import open_storage

    trained = read_run(open_storage(run))
    name = name or trained.config.name
    versions = ModelRegistry(uri or trained.config.tracking.uri or default_uri(), registry)
    versions.refuse(name)
    manifest = open_manifest(open_storage(data or trained.config.data.prefix))
    if dry_run:
        print(f"dry run: would write {trained.storage.url}/model from step {trained.step} and register it as {name}")
        return 0
    digest = export_model(trained, manifest)
    version = versions.register_run(name, trained.storage, trained.config.tracking)
    print(f"models:/{name}/{version}: artifact {digest}")
    print(f"next: python -m jobs models promote {name} {version} --uri {redact(versions.uri)}")
    return 0


def promote(
    name: Name,
    version: Version,
    /,
    alias: str = "champion",
    uri: str = "",
    data: str = "",
    limits: str = "",
    force_gate: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    reason: str = "",
    dry_run: bool = False,
) -> int:
    """Let an alias stand for a version, if it passes the gates against the one the alias stands for now.

    Args:
        name: Registered model.
        version: Its version.
        alias: The alias.
        uri: MLflow address; empty takes MLFLOW_TRACKING_URI.
        data: Prefix of the dataset to compare on; empty takes the one the version learned from.
        limits: TOML file of gate limits; what it leaves out keeps its default.
        force_gate: A gate that need not pass (repeat for more); needs --reason and is recorded.
        reason: Why; recorded in the ledger.
        dry_run: Evaluate and show the gates, write nothing.
    """
    from pipeline.gates import Limits, read_limits
    from pipeline.mlflow_server import default_uri
    from pipeline.promotion import Request
    from pipeline.promotion import promote as decide
    from pipeline.registry import ModelRegistry

    request = Request(name=name, version=version, alias=alias, reason=reason, forced=tuple(force_gate), dry_run=dry_run)
    asked = read_limits(Path(limits)) if limits else Limits()
    registry = ModelRegistry(uri or default_uri())
    evidence = evidence_of(registry, name, version, data)
    promotion = decide(registry, request, evidence, asked, print_gates)
    _print_promotion(promotion, request)
    return 0


def rollback(
    name: Name,
    /,
    version: int = 0,
    alias: str = "champion",
    uri: str = "",
    force_gate: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    reason: str = "",
    dry_run: bool = False,
) -> int:
    """Let an alias stand for a version again that it stood for before, by a new entry in the ledger.

    Args:
        name: Registered model.
        version: Which; 0 takes the one that the present version replaced.
        alias: The alias.
        uri: MLflow address; empty takes MLFLOW_TRACKING_URI.
        force_gate: golden, where it need not pass; needs --reason and is recorded.
        reason: Why; recorded in the ledger.
        dry_run: Check and show, write nothing.
    """
    from pipeline.mlflow_server import default_uri
    from pipeline.promotion import Request
    from pipeline.promotion import rollback as go_back
    from pipeline.registry import ModelRegistry

    request = Request(name=name, version=version, alias=alias, reason=reason, forced=tuple(force_gate), dry_run=dry_run)
    promotion = go_back(ModelRegistry(uri or default_uri()), request)
    print_gates(promotion.results)
    _print_promotion(promotion, request)
    return 0


def history(name: Name, /, uri: str = "", json: bool = False) -> int:
    """Show who promoted what when and why, oldest first, after checking that nothing in it was changed.

    Args:
        name: Registered model.
        uri: MLflow address; empty takes MLFLOW_TRACKING_URI.
        json: One entry a line as JSON, gate tables included.
    """
    from dataclasses import asdict

    from pipeline.mlflow_server import default_uri
    from pipeline.registry import ModelRegistry
    from pipeline.storage import canonical_json

    for entry in ModelRegistry(uri or default_uri()).ledger(name).entries():
        print(canonical_json(asdict(entry)).decode().rstrip() if json else entry.line())
    return 0


def compare(name: Name, one: Which, other: Which, /, uri: str = "", data: str = "", json: bool = False) -> int:
    """Compare two versions image by image under the same noise: the difference in bits/dim with its standard error.

    Args:
        name: Registered model.
        one: A version or an alias.
        other: A version or an alias; the difference is what it needs more than the first.
        uri: MLflow address; empty takes MLFLOW_TRACKING_URI.
        data: Prefix of the dataset to compare on; empty takes the one the first learned from.
        json: JSON instead of a table.
    """
    from dataclasses import asdict

    from pipeline import comparison
    from pipeline.manifest import open_manifest
    from pipeline.mlflow_server import default_uri
    from pipeline.registry import ModelRegistry
    from pipeline.report import LOSSY
    from pipeline.storage import canonical_json, open_storage

    registry = ModelRegistry(uri or default_uri())
    first, second = (int(word) if word.isdecimal() else registry.resolve(name, word) for word in (one, other))
    evidence = evidence_of(registry, name, first, data)
    models = [registry.load(name, version) for version in (first, second)]
    split = models[0].config.data["validation"]
    old, new = (evidence(loaded, split).evaluation for loaded in models)
    found = comparison.compare(new, old)
    lossless = open_manifest(open_storage(data)).lossless if data else models[0].config.data.get("lossless", True)
    if json:
        print(canonical_json({"one": first, "other": second, "lossless": lossless, **asdict(found)}).decode().rstrip())
        return 0
    print(f"version {first:<4} {old.bits_per_dim} bits/dim\nversion {second:<4} {new.bits_per_dim} bits/dim")
    print("\n".join([*([] if lossless else [LOSSY]), *comparison.lines(found)]))
    return 0


def verify(target: Target, /, uri: str = "", retrain: bool = False, data: str = "") -> int:
    """Check a model: its digests, golden pixels decoded here, and for a registered one its artifact and ledger.

    Args:
        target: A model's folder or s3:// prefix, models:/NAME@alias or models:/NAME/3.
        uri: MLflow address for models:/ names; empty takes MLFLOW_TRACKING_URI.
        retrain: Train it again from its lineage alone, in this process, and compare the artifacts to the bit.
        data: With --retrain, where the dataset lies now; empty takes the place that is recorded.
    """
    from pipeline.errors import DataError
    from pipeline.golden import verify_model
    from pipeline.mlflow_server import default_uri
    from pipeline.promotion import verify_ledger
    from pipeline.registry import ModelRegistry, load_model

    loaded = load_model(target, uri)
    print(f"artifact {loaded.digest}: {len(loaded.files)} files are what it names")
    check = verify_model(loaded)
    print(check)
    if not check.passed:
        raise DataError(str(check), where=target, cure="use the torch build in its lineage.json; or restore the model")
    if target.startswith("models:/"):
        name, _, here = target.removeprefix("models:/").replace("@", "/").partition("/")
        count = verify_ledger(ModelRegistry(uri or default_uri()), name, {here: loaded.digest})
        print(f"ledger: {count} entries, their chain is whole, aliases are as it says")
    if retrain:
        print(f"trained again: artifact {_retrained(loaded, data)}, bit-equal")
    return 0


def _retrained(loaded: LoadedModel, data: str) -> str:
    from jobs.train import following
    from pipeline.retrain import retrained

    with following(loaded.lineage.get("images", 0)) as report:
        return retrained(loaded, data, report)


def _print_promotion(promotion: Promotion, request: Request) -> None:
    where = f"models:/{request.name}@{request.alias}"
    if promotion.entry is None:
        target = f"models:/{request.name}/{request.version}" if request.version else "the version before"
        print(f"dry run: {target} would become {request.alias}")
    else:
        done = "is now" if promotion.results else "is already"
        print(f"{where} {done} version {promotion.entry.version} (ledger entry {promotion.entry.sequence})")


def evidence_of(
    registry: ModelRegistry, name: str, version: int, data: str = ""
) -> Callable[[LoadedModel, str], Evidence]:
    """What models say about a split of a version's dataset: as a run's review says, or evaluated now."""
    from pipeline.gates import Evidence
    from pipeline.lineage import findings
    from pipeline.manifest import open_manifest
    from pipeline.registry import RUN_TAG
    from pipeline.report import kept_review
    from pipeline.review import evaluate_model
    from pipeline.storage import open_storage

    tags = registry.tags(name, version)
    prefix = data or tags.get("data.prefix", "")
    digest = open_manifest(open_storage(data)).digest if data else tags.get("data.digest", "")
    said: dict[tuple[str, str], Evidence] = {}

    def evidence(loaded: LoadedModel, split: str) -> Evidence:
        if (loaded.digest, split) not in said:
            own = registry.tags_of_digest(name, loaded.digest)
            weights = loaded.files["weights.safetensors"]
            kept = kept_review(open_storage(run), split, weights, digest) if (run := own.get(RUN_TAG)) else None
            found = kept.main if kept else evaluate_model(loaded, prefix, split, digest)
            said[loaded.digest, split] = Evidence(loaded, found, findings(loaded, own))
        return said[loaded.digest, split]

    return evidence


def print_gates(results: Sequence[Result]) -> None:
    """Show the gate table."""
    from pipeline.gates import table

    if results:
        print(table(results))
