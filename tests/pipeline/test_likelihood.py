"""What evaluation says is true: an independent likelihood, a source of known entropy, normal latents."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from glow import Glow, GlowConfig
from pipeline.conditioning import Obedience, obedience
from pipeline.config import DataConfig, TrainConfig
from pipeline.evaluate import Evaluation, evaluate
from pipeline.export import natural_stream
from pipeline.judge import Judge
from pipeline.learner import Examples
from pipeline.manifest import Manifest, open_manifest
from pipeline.neighbours import nearest
from pipeline.prepare import Options, build, make_plan
from pipeline.sources import open_source
from pipeline.storage import open_storage
from pipeline.stream import Stream
from pipeline.uniformity import kolmogorov, own_samples
from pipeline.world import World
from tests.pipeline.models import conditions, tiny_config, tiny_model

MEAN, SPREAD, SIZE, IMAGES = 128.0, 24.0, 8, 200
"""Every value of every pixel of the source is round(N(MEAN, SPREAD)), cut off at 0 and 255."""

CONFIG = TrainConfig(
    model=GlowConfig(size=SIZE, channels=3, levels=2, steps=1, width=8, coupling="additive", classes=-1, attributes=-1),
)


def gaussian_pixels(seed: int, count: int) -> np.ndarray:
    """uint8 [count, SIZE, SIZE, 3]."""
    values = np.random.default_rng(seed).normal(MEAN, SPREAD, (count, SIZE, SIZE, 3))
    return np.clip(np.round(values), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """A dataset of such images."""
    folder = tmp_path_factory.mktemp("gaussian")
    (folder / "images").mkdir()
    for number, pixels in enumerate(gaussian_pixels(0, IMAGES)):
        Image.fromarray(pixels).save(folder / "images" / f"{number:03d}.png")
    options = Options(split="random:0:0.8", samples_per_shard=80)
    plan = make_plan(open_source(str(folder / "images")), options, map, report=lambda images: None)
    build(plan, open_storage(str(folder / "data")), mapped=map, restart=False, report=lambda images: None)
    return open_manifest(open_storage(str(folder / "data")))


@pytest.fixture
def stream(source: Manifest, tmp_path: Path) -> Iterator[Stream]:
    with natural_stream(source, "val", DataConfig(cache=str(tmp_path), cache_gb=0.1)) as stream:
        yield stream


def judged(model: Glow, source: Manifest, stream: Stream, bits: int = 8) -> Evaluation:
    config = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, bits=bits))
    return evaluate(model, Examples(config, source, torch.device("cpu")), stream, World(), bits=bits)


def fitted() -> Glow:
    """A flow that knows such pixels: its data-dependent initialisation alone makes them standard normal."""
    torch.manual_seed(0)
    model = Glow(CONFIG.model)
    known = torch.from_numpy(gaussian_pixels(1, 1024)).permute(0, 3, 1, 2)
    model.initialize([(known.float() + 0.5) / 256 - 0.5])
    return model.eval()


def test_a_source_of_known_entropy_is_scored_as_its_true_density_scores_it(source: Manifest, stream: Stream) -> None:
    found = judged(fitted(), source, stream)
    pixels = stream.fetch(np.arange(stream.samples)).pixels.numpy()
    edge = np.array([math.erf((k - MEAN) / (SPREAD * math.sqrt(2))) for k in np.arange(257) - 0.5])
    edge[0], edge[-1] = -1.0, 1.0
    share = np.diff(edge) / 2
    truth = -np.log2(share[pixels]).reshape(len(pixels), -1).mean(1)
    assert abs(found.bits_per_dim.mean - truth.mean()) < 3 * found.bits_per_dim.stderr
    assert abs(found.bits_per_dim.mean - truth.mean()) < 0.01  # the same pixels: their chance is common to both
    assert all(level.p > 0.01 for level in own_samples(fitted(), range(32), (None, None)))
    assert all(abs(level.mean - 0.5) < 0.02 and abs(12 * level.variance - 1) < 0.05 for level in found.pit)
    assert found.exact == 1.0


def test_bits_per_dim_agrees_with_an_evaluation_from_the_latents_alone(source: Manifest, stream: Stream) -> None:
    """numpy on the latents, and the volume by the Jacobian of `encode`, which nothing in the model computes."""
    model = tiny_model(tiny_config())
    plain = dataclasses.replace(tiny_config(), model=dataclasses.replace(CONFIG.model, coupling="affine", steps=2))
    model = tiny_model(plain)
    values = judged(model, source, stream, bits=5).values[:3]
    x, _, _ = Examples(dataclasses.replace(CONFIG, data=DataConfig(bits=5)), source, torch.device("cpu")).of(
        stream.fetch(np.arange(3)), 0
    )
    exact = model.double()
    for number in range(3):
        image = x[number : number + 1].double()

        def flat(image: Tensor) -> Tensor:
            return torch.cat([latent.flatten() for latent in exact.encode(image)])

        jacobian = torch.autograd.functional.jacobian(flat, image).reshape(192, 192).numpy()
        latents = flat(image).detach().numpy()
        nats = -0.5 * (latents**2).sum() - 96 * np.log(2 * np.pi) + np.linalg.slogdet(jacobian)[1]
        assert values[number] == pytest.approx(5 - nats / (192 * np.log(2)), abs=1e-5)


def test_own_samples_are_standard_normal_at_every_level_and_a_planted_wrong_scale_is_caught() -> None:
    model = tiny_model(tiny_config())
    label, attributes = (part.repeat(20, *[1] * (part.dim() - 1))[:128] for part in conditions())
    found = own_samples(model, range(128), (label, attributes))
    assert [level.values for level in found] == [128 * 96, 128 * 96]
    assert all(level.p > 0.01 for level in found)

    class Crooked(Glow):
        """Its inverse takes the top latents for 10 % wider than they are."""

        def decode(self, latents, label=None, attributes=None):
            return super().decode([*latents[:-1], 1.1 * latents[-1]], label, attributes)

    crooked = Crooked(model.config)
    crooked.load_state_dict(model.state_dict())
    caught = own_samples(crooked.eval(), range(128), (label, attributes))
    assert caught[0].p > 0.01
    assert caught[1].p < 0.01


def test_kolmogorov_knows_uniform_from_nearly_uniform() -> None:
    normal = torch.special.ndtri((torch.arange(1000, dtype=torch.float64) + 0.5) / 1000)
    assert kolmogorov(normal).statistic == pytest.approx(0.0005)
    assert kolmogorov(normal).p == 1.0
    # 1.36 / sqrt(n) is the well-known 5 % point.
    shifted = torch.special.ndtri(((torch.arange(1000, dtype=torch.float64) + 0.5) / 1000 * (1 - 0.0425)).clamp(1e-9))
    assert kolmogorov(shifted).p == pytest.approx(0.05, abs=0.01)
    assert kolmogorov(torch.tensor([math.nan, 0.0])).p == 0.0


def test_copies_of_training_images_are_noticed(stream: Stream) -> None:
    training = stream.fetch(np.array([3, 150, 7])).pixels
    other = torch.from_numpy(gaussian_pixels(5, 16)).permute(0, 3, 1, 2)
    copied = nearest(training, other, stream)
    assert (copied.nearest, copied.searched) == ((3, 150, 7), stream.samples)
    assert copied.ratio < 0.01
    assert nearest(torch.from_numpy(gaussian_pixels(6, 16)).permute(0, 3, 1, 2), other, stream).ratio == pytest.approx(
        1, abs=0.05
    )


class Always(torch.nn.Module):
    """Sees the first attribute wherever it looks, and never the others."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor([1.0, -1.0, -1.0]).expand(len(x), 3)


def test_conditioning_is_what_the_judge_sees_of_what_was_asked() -> None:
    config = tiny_config()
    judge = Judge(Always(), config.bits, dict(zip(config.editable, (0.99, 0.98, 0.5), strict=True)))
    found = obedience(tiny_model(config), config.bits, config.editable, judge, conditions(4), 0.7)
    assert found == {
        "Smiling": Obedience(present=1.0, absent=0.0, seeds=4, judge=0.99),
        "Eyeglasses": Obedience(present=0.0, absent=1.0, seeds=4, judge=0.98),
    }
