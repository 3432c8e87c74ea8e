"""Models: register what a run learned, and promote a version to champion once it passes the gates.

  python -m jobs models register runs/faces --name faces
  python -m jobs models promote faces 3

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
    from pipeline.registry import ModelRegistry

Run = Annotated[str, tyro.conf.arg(metavar="RUN")]
Name = Annotated[str, tyro.conf.arg(metavar="NAME")]
Version = Annotated[int, tyro.conf.arg(metavar="VERSION")]


def main(argv: Sequence[str]) -> int:
    """Run one of register, promote."""
    return tyro.extras.subcommand_cli_from_dict(
        {"register": register, "promote": promote},
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
        uri: MLflow address; empty takes the run's.
        registry: Prefix of the ledger, fixed by the first registration; empty takes a folder beside a sqlite database.
        dry_run: Say what would be registered, write nothing.
    """
    from pipeline.export import export_model, read_run
    from pipeline.manifest import open_manifest
    from pipeline.registry import ModelRegistry
    from pipeline.storage import open_storage

    trained = read_run(open_storage(run))
    name = name or trained.config.name
    manifest = open_manifest(open_storage(data or trained.config.data.prefix))
    versions = ModelRegistry(uri or trained.config.tracking.uri, registry)
    if dry_run:
        print(f"dry run: would write {trained.storage.url}/model from step {trained.step} and register it as {name}")
        return 0
    digest = export_model(trained, manifest)
    version = versions.register_run(name, trained.storage, trained.config.tracking)
    print(f"models:/{name}/{version}: artifact {digest}")
    print(f"next: python -m jobs models promote {name} {version} --uri {versions.uri}")
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
    from pipeline.mlflow_run import default_uri
    from pipeline.registry import ModelRegistry

    registry = ModelRegistry(uri or default_uri())
    promotion = registry.promote(
        name,
        version,
        evidence_of(registry, name, version, data),
        alias=alias,
        limits=read_limits(Path(limits)) if limits else Limits(),
        forced=force_gate,
        reason=reason,
        dry_run=dry_run,
        announce=print_gates,
    )
    if promotion.entry is None:
        print(f"dry run: models:/{name}/{version} would become {alias}")
    else:
        done = "is already" if not promotion.results else "is now"
        print(f"models:/{name}@{alias} {done} version {version} (ledger entry {promotion.entry.sequence})")
    return 0


def evidence_of(registry: ModelRegistry, name: str, version: int, data: str = "") -> Callable[[LoadedModel], Evidence]:
    """What models say about the held-out images of a version's dataset: as a run's review says, or evaluated now."""
    from pipeline.gates import Evidence
    from pipeline.manifest import open_manifest
    from pipeline.registry import RUN_TAG
    from pipeline.review import evaluate_model, kept_evaluation
    from pipeline.storage import open_storage

    tags = registry.tags(name, version)
    prefix = data or tags.get("data.prefix", "")
    digest = open_manifest(open_storage(data)).digest if data else tags.get("data.digest", "")

    def evidence(loaded: LoadedModel) -> Evidence:
        run = registry.tags_of_digest(name, loaded.digest).get(RUN_TAG, "")
        split, weights = loaded.config.data["validation"], loaded.files["weights.safetensors"]
        kept = kept_evaluation(open_storage(run), split, weights, digest) if run else None
        return Evidence(loaded, kept or evaluate_model(loaded, prefix, split, digest))

    return evidence


def print_gates(results: Sequence[Result]) -> None:
    """Show the gate table."""
    from pipeline.gates import table

    print(table(results))
