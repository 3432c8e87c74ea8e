"""Promise R14: what is not a number, or a spike, on one rank moves no rank, and its sample is named; clipping clips."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config import TrainConfig, read_config
from pipeline.learner import Examples, Learner
from pipeline.manifest import open_manifest
from pipeline.storage import open_storage
from pipeline.stream import Batch
from pipeline.train import opened
from pipeline.world import World
from tests.pipeline.group import run_group
from tests.pipeline.trained import trained
from tests.reliability import measured

BAD_POSITION = 16 + 11
"""Second batch, a row of the second rank."""


class Spoilt(Examples):
    """The examples with one sample replaced by a value."""

    spoilt, value = (-1, -1), 0.0

    def of(self, batch: Batch, seed: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor | None, Tensor | None]:
        x, *condition = super().of(batch, seed, rows)
        hit = (batch.epochs[rows] == self.spoilt[0]) & (batch.samples[rows] == self.spoilt[1])
        x[hit] = self.value
        return x, condition[0], condition[1]


def digest(learner: Learner) -> str:
    """Of everything a checkpoint would hold."""
    found = hashlib.sha256()
    for name, tensor in sorted(learner.tensors().items()):
        found.update(name.encode() + tensor.detach().numpy().tobytes())
    return found.hexdigest()


def three_steps(world: World, config: TrainConfig, value: float) -> tuple[list[str], list[dict[str, Any]], int]:
    """(digests before and after every step, what was refused, the sample that was spoilt)."""
    manifest = open_manifest(open_storage(config.data.prefix))
    examples = Spoilt(config, manifest, world.device)
    learner = Learner(config, world, examples)
    digests, refused = [], []
    with opened(config, manifest, world) as (stream, _):
        learner.initialize(stream)
        bad = stream.fetch(torch.arange(BAD_POSITION, BAD_POSITION + 1).numpy())
        examples.spoilt, examples.value = (int(bad.epochs[0]), int(bad.samples[0])), value
        for batch in stream.batches(0, config.schedule.batch, learner.rows, stop=48):
            digests.append(digest(learner))
            refused.append(learner.learn(batch))
        return [*digests, digest(learner)], refused, examples.spoilt[1]


@pytest.fixture(scope="module")
def config() -> TrainConfig:
    return read_config(trained().run / "config.toml")


@pytest.mark.parametrize(("value", "norm"), [(float("nan"), "nan"), (float("inf"), "nan"), (300.0, "")])
def test_one_bad_sample_on_one_rank_moves_no_rank_and_is_named(config: TrainConfig, value: float, norm: str) -> None:
    (digests, refused, sample), second = run_group(2, three_steps, config, value)
    assert second == (digests, refused, sample), "both ranks say the same"
    assert [bool(found) for found in refused] == [False, True, False]
    assert digests[1] == digests[2], "nothing moved: weights, averages, moments"
    assert len(set(digests)) == 3
    measured("R14", "NaN, infinity, a spike on one of two ranks: updates by it", digests[1] != digests[2], "updates")
    assert refused[1]["samples"][0]["sample"] == sample
    assert refused[1]["norm"] == norm or float(refused[1]["norm"]) > 20
    assert refused[1]["parameters"]


def test_a_gradient_above_the_clip_is_scaled_down_to_it(config: TrainConfig) -> None:
    """Adam's first moment after one step is (1 - beta1) times the gradient it was given."""

    def moment(clip: float) -> Tensor:
        manifest = open_manifest(open_storage(config.data.prefix))
        clipped = replace(config, optim=replace(config.optim, clip=clip))
        learner = Learner(clipped, World(), Examples(clipped, manifest, torch.device("cpu")))
        with opened(config, manifest, World()) as (stream, _):
            learner.initialize(stream)
            learner.learn(next(stream.batches(0, config.schedule.batch)))
        moments = learner.optimizer.state.values()
        return torch.cat([state["exp_avg"].flatten() for state in moments]) / (1 - config.optim.beta1)

    free = moment(0.0)
    norm = float(torch.linalg.vector_norm(free))
    torch.testing.assert_close(moment(norm / 10), free / 10)
    assert torch.equal(moment(norm * 10), free)
