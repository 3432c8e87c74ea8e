"""A RealNVP through the whole pipeline: workers change nothing, its running moments are kept, averaged and shipped."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from glow import RealNVP, RealNVPConfig
from glow.norm import batch_norms
from pipeline.checkpoint import accepting, load_latest
from pipeline.config import MemoryConfig, OptimConfig, TrainConfig, read_config, write_config
from pipeline.errors import ConfigError
from pipeline.export import export_model, read_run
from pipeline.fingerprint import decisive, fingerprint
from pipeline.golden import verify_model
from pipeline.gradients import Gradients
from pipeline.manifest import open_manifest
from pipeline.model import read_model
from pipeline.storage import open_storage
from pipeline.train import resolved, run
from pipeline.world import World
from tests.glow.pictures import toy_pictures
from tests.glow.table import perturbed
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


LEAVES = 4


def leaf_loss(flow: RealNVP, leaf: int) -> torch.Tensor:
    return -flow.log_prob(toy_pictures(3, 8, seed=leaf).double()).sum()


def small(anchors: int) -> RealNVP:
    torch.manual_seed(0)
    flow = perturbed(RealNVP(RealNVPConfig(size=8, channels=3, levels=2, width=4, residuals=1))).double()
    flow.set_anchors([anchors])
    return flow


def reduced(world: World, reduction: Literal["tree", "overlap"]) -> tuple[torch.Tensor, torch.Tensor]:
    """(gradient of all leaves, mean of their moments) by pure inversion."""
    flow = small(anchors=9)
    moments = flow.moments().numel()
    gradients = Gradients(list(flow.parameters()), world, LEAVES, reduction, moments)

    def loss(leaf: int) -> torch.Tensor:
        found = leaf_loss(flow, leaf)
        gradients.note(flow.moments())
        return found

    return gradients.of(loss).clone(), gradients.moments().clone()


@pytest.mark.parametrize("reduction", ["tree", "overlap"])
def test_gradients_and_moments_are_reduced_while_backward_inverts(reduction: str) -> None:
    flow = small(anchors=0)
    gradients: list[torch.Tensor] = []
    moments: list[torch.Tensor] = []
    for leaf in range(LEAVES):
        found = torch.autograd.grad(leaf_loss(flow, leaf), list(flow.parameters()))
        gradients.append(torch.cat([gradient.flatten() for gradient in found]))
        moments.append(flow.moments())
    for found, mean in run_group(2, reduced, reduction):
        wanted = torch.stack(gradients).sum(0)
        assert (found - wanted).norm() < 1e-8 * wanted.norm()
        assert torch.allclose(mean, torch.stack(moments).mean(0), rtol=1e-12, atol=1e-12)


def test_a_run_inverts_with_networks_in_bfloat16(tmp_path: Path) -> None:
    memory = MemoryConfig(anchor_every=(2,), nets="bfloat16")
    figures = run(replace(settings(tmp_path, "rough"), memory=memory))
    assert figures["val/bits_per_dim"] < 8
    assert 0 < figures["train/inversion_error"] < 0.1


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
