"""A RealNVP through the whole pipeline: workers change nothing, its running moments are kept, averaged and shipped."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from glow import RealNVP, RealNVPConfig
from glow.norm import batch_norms
from pipeline.checkpoint import accepting, load_latest
from pipeline.config import MemoryConfig, OptimConfig, TrainConfig, decisive, fingerprint, read_config, write_config
from pipeline.errors import ConfigError
from pipeline.export import export_model, read_run
from pipeline.golden import verify_model
from pipeline.manifest import open_manifest
from pipeline.model import read_model
from pipeline.storage import open_storage
from pipeline.train import resolved, run
from pipeline.world import World
from tests.pipeline.group import run_group
from tests.pipeline.trained import trained

MODEL = RealNVPConfig(levels=2, width=4, residuals=1)


def settings(folder: Path, name: str) -> TrainConfig:
    """A short run on the toy faces of the session, four leaves a batch."""
    base = read_config(trained().run / "config.toml")
    optim = OptimConfig(algorithm="adam", warmup=0, loss="nats", l2=5e-5, clip=1e4, guard_factor=1e6, ema_halflife=32)
    schedule = replace(base.schedule, leaf=4, images=64, checkpoint_every=64)
    data = replace(base.data, digest="")
    return replace(base, name=name, storage=str(folder), data=data, model=MODEL, optim=optim, schedule=schedule)


def worker(world: World, config: TrainConfig) -> None:
    os.environ |= {"RANK": str(world.rank), "WORLD_SIZE": str(world.size), "LOCAL_RANK": str(world.rank)}
    run(config)


def test_two_workers_end_in_the_bits_of_one_running_moments_included(tmp_path: Path) -> None:
    alone, shared = settings(tmp_path, "alone"), settings(tmp_path, "shared")
    figures = run(alone)
    assert figures["val/bits_per_dim"] < 8
    run_group(2, worker, shared)
    manifest = open_manifest(open_storage(alone.data.prefix))
    digests: list[str] = []
    tensors: list[dict[str, torch.Tensor]] = []
    for config in (alone, shared):
        settings_of, digest = resolved(config, manifest), manifest.digest
        accepted = accepting(fingerprint(settings_of, digest), decisive(settings_of, digest))
        loaded = load_latest(open_storage(config.storage).sub(config.name), World(), accepted)
        assert loaded is not None
        tensors.append(loaded.tensors)
        digests.append(export_model(read_run(open_storage(f"{config.storage}/{config.name}")), manifest))
    assert [name for name in tensors[0] if not torch.equal(tensors[0][name], tensors[1][name])] == []
    assert digests[0] == digests[1]
    moved = [n for n in tensors[0] if n.startswith("model/") and n.endswith(("norm.mean", "norm.var"))]
    assert len(moved) == 2 * len(batch_norms(RealNVP(resolved(alone, manifest).model)))  # type: ignore[arg-type]
    assert all(f"ema/{name.removeprefix('model/')}" in tensors[0] for name in moved)
    model = read_model(open_storage(f"{alone.storage}/{alone.name}/model"))
    assert isinstance(model.model, RealNVP)
    assert model.config.family == model.config.model.family == "realnvp"
    assert verify_model(model).passed
    assert model.sample([0, 1]).shape == (2, 3, 16, 16)


def final(config: TrainConfig) -> dict[str, torch.Tensor]:
    """The model in the last checkpoint of a run: parameters and running moments."""
    manifest = open_manifest(open_storage(config.data.prefix))
    settings_of, digest = resolved(config, manifest), manifest.digest
    accepted = accepting(fingerprint(settings_of, digest), decisive(settings_of, digest))
    loaded = load_latest(open_storage(config.storage).sub(config.name), World(), accepted)
    assert loaded is not None
    return {name: tensor for name, tensor in loaded.tensors.items() if name.startswith("model/")}


def test_overlapped_inverted_and_in_bfloat16_it_learns_the_same_up_to_rounding(tmp_path: Path) -> None:
    """Two workers, reductions while backward inverts: running moments are summed beside the gradients."""
    alone = settings(tmp_path, "alone")
    figures = run(alone)
    shared = replace(alone, name="shared", memory=MemoryConfig(anchor_every=(2,)))
    shared = replace(shared, schedule=replace(alone.schedule, reduction="overlap"))
    run_group(2, worker, shared)
    plain, overlapped = final(alone), final(shared)
    for name in plain:
        torch.testing.assert_close(overlapped[name], plain[name], rtol=1e-2, atol=1e-3)
    rough = run(replace(alone, name="rough", memory=MemoryConfig(anchor_every=(2,), nets="bfloat16")))
    assert abs(rough["val/bits_per_dim"] - figures["val/bits_per_dim"]) < 0.05
    assert 0 < rough["train/inversion_error"] < 0.1


def test_a_file_may_change_the_family(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text('[model]\nfamily = "realnvp"\nresiduals = 3\n')
    config = read_config(tmp_path / "own.toml", TrainConfig())
    assert config.model == RealNVPConfig(residuals=3)
    (tmp_path / "again.toml").write_text(write_config(config))
    assert read_config(tmp_path / "again.toml") == config
    assert fingerprint(config, "x") != fingerprint(TrainConfig(), "x")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('family = "nice"', "model.family: no 'nice'"),
        ('family = "realnvp"\nsteps = 3', "no setting model.steps"),
        ('family = "realnvp"\nprior = "cubic"', "model.prior: input should be 'standard' or 'learned'"),
    ],
)
def test_what_a_family_does_not_know_is_refused_in_a_line(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "own.toml").write_text(f"[model]\n{text}\n")
    with pytest.raises(ConfigError) as caught:
        read_config(tmp_path / "own.toml")
    assert says in str(caught.value)
