"""Lineage recomputed: whether what a version says about its origin is still what one finds there."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.errors import PipelineError
from pipeline.export import TrainedRun, read_run
from pipeline.fingerprint import fingerprint
from pipeline.manifest import open_manifest
from pipeline.model import LoadedModel, weights_of
from pipeline.storage import open_storage, sha256_hex


def findings(loaded: LoadedModel, tags: Mapping[str, str]) -> tuple[str, ...]:
    """What does not agree, best nothing: dataset digest, the run's fingerprint, the weights of its checkpoint.

    `tags` are those of the version. A run that has learned on since is compared by its fingerprint alone.
    """
    try:
        run = read_run(open_storage(tags["glow.run"]))
        manifest = open_manifest(open_storage(tags["data.prefix"]))
    except KeyError as error:
        return (f"no {error.args[0]} is recorded",)
    except PipelineError as error:
        return (str(error),)
    known = loaded.config.data["digest"]
    expected = {
        "the dataset's digest": (known, manifest.digest),
        "the dataset's digest in the tags": (known, tags.get("data.digest", "")),
        "the run's fingerprint": (tags.get("fingerprint", ""), fingerprint(run.config, manifest.digest)),
        "the weights of its checkpoint": (loaded.files["weights.safetensors"], _weights(run, loaded, tags)),
    }
    return tuple(f"{name}: recorded {said[:12] or 'nothing'}, found {found[:12]}"
                 for name, (said, found) in expected.items() if said != found)  # fmt: skip


def _weights(run: TrainedRun, loaded: LoadedModel, tags: Mapping[str, str]) -> str:
    if tags.get("step") != str(run.step):
        return loaded.files["weights.safetensors"]
    return sha256_hex(weights_of(run.model()))
