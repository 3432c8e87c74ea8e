"""Evaluation: exact bits per dimension of held-out images, image by image, beside what file formats need for them.

Every image has its own fixed dequantisation noise (seed 0, epoch 0, its number in the split), so two models are
compared pair by pair, and neither batch size nor the number of workers changes a figure by more than float rounding.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from glow import Flow, bits_per_dim, quantize, to_pixels
from pipeline.learner import Examples
from pipeline.stream import Batch, Stream
from pipeline.uniformity import COLUMNS, Uniformity, summarised, transform
from pipeline.world import World, gather_ordered

NOISE_SEED = 0

BATCH = 32
"""Images evaluated together."""


@dataclass(frozen=True)
class Figure:
    """A mean over images with its standard error."""

    mean: float
    stderr: float
    images: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure:
        """Mean and standard error of at least one independent value."""
        count = len(values)
        mean = math.fsum(values) / count
        variance = math.fsum((value - mean) ** 2 for value in values) / max(count - 1, 1)
        return cls(mean, math.sqrt(variance / count), count)

    def __str__(self) -> str:
        return f"{self.mean:.4f} ± {self.stderr:.4f}"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a model says about the images of a split. Bits per dimension throughout."""

    bits: int
    bits_per_dim: Figure
    log_det: float
    """Share of the volume term; with `bits` and the priors it adds up to bits_per_dim."""
    priors: tuple[float, ...]
    """Share of every level's prior, first level first."""
    class_names: tuple[str, ...]
    classes: Mapping[str, Figure]
    """Of the classes that occur."""
    round_trip: float
    """Largest |decode(encode(x)) - x| of the first images, x spanning 1; -1 where not taken, nan where broken."""
    exact: float = -1.0
    """Share of those images of which every n-bit pixel comes back as it was; -1 where not taken."""
    latent_round_trips: tuple[float, ...] = ()
    """Largest |encode(decode(z)) - z| of every level over those images' latents z."""
    pit: tuple[Uniformity, ...] = ()
    """Phi of every level's latents of those images; uniform where the model is right."""
    ends: float = 0.0
    """Share of the images' values in the lowest and the highest of the 2^bits bins: black and white cut off."""
    values: tuple[float, ...]
    """Of every image, in the order of the split."""
    dequantization: str = "uniform"
    """Whose noise `bits_per_dim` bounds with."""
    noise: float = 0.0
    """Share of variational noise: log q; with the others it adds up to bits_per_dim."""
    uniform_noise: Figure | None = None
    """The same model's bits per dimension under uniform noise; None where that is `bits_per_dim` itself."""
    labels: tuple[int, ...]

    def summary(self) -> dict[str, Any]:
        """Everything but the values of single images."""
        tree = asdict(self)
        return {key: tree[key] for key in tree if key not in ("values", "labels")}


def evaluate(
    model: Flow,
    examples: Examples,
    stream: Stream,
    world: World,
    *,
    bits: int,
    labels: Sequence[str] = (),
    images: int = 0,
    batch: int = BATCH,
    round_trip: int = 64,
) -> Evaluation:
    """Evaluate the first `images` (0: all) of a stream in natural order; collective, every rank gets the result.

    `labels` are the class names; images without a label count for no class. The first `round_trip` images are also
    encoded, decoded and encoded again: what rounding does there is a property of the model more than of the image.
    """
    count = min(images or stream.samples, stream.samples)
    parts = [_measured(model, examples, part, bits, round_trip) for part in _own_batches(stream, world, count, batch)]
    levels = len(model.latent_shapes())
    widths = (6 + levels, 2 + levels + COLUMNS * levels)
    none = [torch.zeros(0, width, dtype=torch.float64) for width in widths]
    whole, looked = (gather_ordered(world, torch.cat(rows)) for rows in zip(none, *parts, strict=True))
    return _summarised(whole, looked, model, bits, labels)


def validation_bits(model: Flow, examples: Examples, stream: Stream, world: World, images: int, bits: int) -> Tensor:
    """Bits per dimension of the first images of a stream, float64 [images] on every rank; collective."""
    found = evaluate(model, examples, stream, world, bits=bits, images=images, round_trip=0)
    return torch.tensor(found.values, dtype=torch.float64)


def codec_figures(stream: Stream, bits: int, images: int = 0, threads: int = 2) -> dict[str, Figure]:
    """Bits per dimension of "png" (optimised) and "webp" (lossless, method 6) files of the same quantised pixels.

    Whole files count, headers included; a "dimension" is one value of one pixel, as for the model.
    """
    sizes: dict[str, list[float]] = {name: [] for name in CODECS}
    with ThreadPoolExecutor(threads) as pool:
        for batch in stream.batches(0, BATCH, stop=min(images or stream.samples, stream.samples)):
            pictures = [_picture(image) for image in quantize(batch.pixels, bits).numpy()]
            for name, found in sizes.items():
                found += [8 * size / batch.pixels[0].numel() for size in pool.map(CODECS[name], pictures)]
    return {name: Figure.of(found) for name, found in sizes.items()}


def _png_bytes(picture: Image.Image) -> int:
    return _saved_bytes(picture, "png", optimize=True)


def _webp_bytes(picture: Image.Image) -> int:
    return _saved_bytes(picture, "webp", lossless=True, method=6, quality=100)


CODECS = {"png": _png_bytes, "webp": _webp_bytes}


def _saved_bytes(picture: Image.Image, kind: str, **options: Any) -> int:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return len(file.getvalue())


def _picture(pixels: np.ndarray) -> Image.Image:
    """uint8 [c, h, w] of 1 or 3 channels -> picture."""
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)).squeeze())


def _own_batches(stream: Stream, world: World, count: int, batch: int) -> Iterator[Batch]:
    """This rank's share of the first `count` images, in batches cut at the same places for every world size."""
    batches = math.ceil(count / batch)
    first, last = (rank * batches // world.size for rank in (world.rank, world.rank + 1))
    return stream.batches(first * batch, batch, stop=min(last * batch, count))


@torch.no_grad()
def _measured(model: Flow, examples: Examples, batch: Batch, bits: int, round_trip: int) -> tuple[Tensor, Tensor]:
    """Float64 tables of a batch: of every image its bound, log_det, every level's prior, -log q, bound under uniform
    noise (nats), share of values at the ends and label; and of those that go to the latents and back (none or all)
    what `_round_trips` says.
    """
    x, label, attributes = examples.of(batch, NOISE_SEED)
    terms = model.bound(x, bits, label, attributes)
    if terms.dequantization is None:
        freedom, uniform = torch.zeros_like(terms.log_prob), terms.log_prob
    else:
        freedom, uniform = terms.dequantization, model.log_prob(x, label, attributes)
    kept = quantize(batch.pixels, bits)
    ends = ((kept == 0) | (kept == 2**bits - 1)).double().flatten(1).mean(1)
    columns = [terms.log_prob, terms.log_det, *terms.priors, freedom, uniform, ends, batch.labels]
    table = torch.stack([column.double().cpu() for column in columns], dim=1)
    looked = min(len(x), max(0, round_trip - int(batch.samples[0])))
    part = [None if whole is None else whole[:looked] for whole in (label, attributes)]
    return table, _round_trips(model, x[:looked], batch.pixels[:looked], bits, *part)


def _round_trips(
    model: Flow, x: Tensor, pixels: Tensor, bits: int, label: Tensor | None, attributes: Tensor | None
) -> Tensor:
    """Float64 [b, 2 + levels + COLUMNS * levels]: error of x, whether every pixel is the same, of latents, PIT."""
    if len(x) == 0:
        levels = len(model.latent_shapes())
        return torch.zeros(0, 2 + levels + COLUMNS * levels, dtype=torch.float64)
    x, _ = model.dequantized(x, bits)
    latents = model.encode(x, label, attributes)
    again = model.decode(latents, label, attributes)
    pairs = zip(model.encode(again, label, attributes), latents, strict=True)
    errors = [_largest(again - x), *(_largest(back - there) for back, there in pairs)]
    same = (quantize(to_pixels(again, bits).cpu(), bits) == quantize(pixels, bits)).flatten(1).all(1)
    first = torch.stack([errors[0], same.to(x), *errors[1:]], dim=1)
    return torch.cat([first.double().cpu(), transform(latents)], dim=1)


def _largest(difference: Tensor) -> Tensor:
    return difference.abs().flatten(1).amax(1)


def _summarised(table: Tensor, looked: Tensor, model: Flow, bits: int, names: Sequence[str]) -> Evaluation:
    kind = model.config.dequantization
    values, uniform = (bits_per_dim(table[:, column], model.dims, bits).tolist() for column in (0, -3))
    labels = [int(label) for label in table[:, -1]]
    shares = (table[:, 1:-3].mean(0) / (-math.log(2) * model.dims)).tolist()
    by_class = {
        name: [v for v, label in zip(values, labels, strict=True) if label == i] for i, name in enumerate(names)
    }
    levels = len(shares) - 2
    return Evaluation(
        bits=bits,
        bits_per_dim=Figure.of(values),
        log_det=shares[0],
        priors=tuple(shares[1:-1]),
        dequantization=kind,
        noise=shares[-1],
        uniform_noise=Figure.of(uniform) if kind == "variational" else None,
        ends=float(table[:, -2].mean()),
        class_names=tuple(names),
        classes={name: Figure.of(found) for name, found in by_class.items() if found},
        values=tuple(values),
        labels=tuple(labels),
        round_trip=float(looked[:, 0].max()) if len(looked) else -1.0,
        exact=float(looked[:, 1].mean()) if len(looked) else -1.0,
        latent_round_trips=tuple(looked[:, 2 : 2 + levels].amax(0).tolist()) if len(looked) else (),
        pit=summarised(looked[:, 2 + levels :]) if len(looked) else (),
    )
