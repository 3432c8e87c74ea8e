"""The judge: a small classifier that says which attributes an image shows, where it has proven that it can.

It learns from the training split of a dataset, quantised as the model sees it, and is examined on the held-out split.
An attribute counts as known where at least 97 % of the images with it and of those without it are told right (the mean
of the two shares, so that a rare attribute is not passed by always saying no); asked for any other, it refuses. It
judges samples and edits: does an image asked to smile smile?

    judge = judge_for(manifest, config.data, cache=run.sub("judge"))
    judge.able                                     # names it may judge
    judge.shows(pixels, ["Smiling", "Bangs"])      # bool [b, 2] of uint8 [b, c, h, w]
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glow import quantize
from pipeline.config import DataConfig
from pipeline.errors import GateError
from pipeline.export import natural_stream
from pipeline.manifest import Manifest
from pipeline.order import Order
from pipeline.sampling import one_thread
from pipeline.storage import MissingError, Storage, canonical_json, sha256_hex
from pipeline.stream import Stream

PASS = 0.97
"""Share told right, held out, from which on an attribute may be judged."""

IMAGES, BATCH, RATE = 30_000, 64, 2e-3
SHIFT = 2
"""Pixels that training images are moved by at most: samples do not sit as exactly as data do."""

EXAMINED = 2_000
"""Held-out images it is examined on, at most."""

VERSION = 1

Say = Callable[[str], None]


@dataclass(frozen=True)
class Judge:
    """A trained and examined classifier."""

    model: nn.Module
    bits: int
    accuracy: Mapping[str, float]
    """Of every editable attribute: mean of the shares told right among images with it and without it."""

    @property
    def able(self) -> tuple[str, ...]:
        """The attributes it may judge."""
        return tuple(name for name, share in self.accuracy.items() if share >= PASS)

    @torch.no_grad()
    def shows(self, pixels: Tensor, names: Sequence[str]) -> Tensor:
        """Whether images uint8 [b, c, h, w] show attributes, bool [b, len(names)]; GateError for one it cannot tell."""
        for name in names:
            if self.accuracy.get(name, 0.0) < PASS:
                share = f"{self.accuracy[name]:.1%} right" if name in self.accuracy else "never seen"
                raise GateError(f"the judge cannot tell {name}: {share}, {PASS:.0%} asked", cure="ask for others")
        columns = [list(self.accuracy).index(name) for name in names]
        return torch.cat([self.model(_seen(part, self.bits)) for part in pixels.split(BATCH)])[:, columns] > 0


def judge_for(
    manifest: Manifest,
    data: DataConfig,
    cache: Storage | None = None,
    images: int = IMAGES,
    say: Say = lambda text: None,
) -> Judge:
    """The judge of a dataset: kept in `cache`, or trained now (a minute for small images) and kept there.

    The same for the same dataset digest, splits, bits and budget of images, on one kind of machine.
    """
    names = tuple(manifest.editable)
    key = {"version": VERSION, "data": manifest.digest, "splits": [data.train, data.validation], "bits": data.bits}
    key |= {"names": names, "images": images}
    if cache is not None and (kept := _kept(cache, key, manifest)) is not None:
        return kept
    say(f"training a judge of {len(names)} attributes on {images} images")
    with one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _learned(_network(manifest), manifest, data, images)
        judge = Judge(model, data.bits, dict(zip(names, _examined(model, manifest, data), strict=True)))
    if cache is not None:
        weights = safetensors.torch.save(model.state_dict())
        cache.write("judge.safetensors", weights)
        cache.write("judge.json", canonical_json({**key, "accuracy": judge.accuracy, "sha256": sha256_hex(weights)}))
    return judge


def _kept(cache: Storage, key: Mapping[str, object], manifest: Manifest) -> Judge | None:
    """The judge in `cache`, if it is this one and whole."""
    try:
        found, weights = json.loads(cache.read("judge.json")), cache.read("judge.safetensors")
    except (MissingError, ValueError):
        return None
    if json.loads(canonical_json(dict(key))) != {name: found.get(name) for name in key}:
        return None
    if found["sha256"] != sha256_hex(weights):
        return None
    model = _network(manifest)
    model.load_state_dict(safetensors.torch.load(weights))
    accuracy = {name: found["accuracy"][name] for name in found["names"]}
    return Judge(model.eval(), found["bits"], accuracy)


def _network(manifest: Manifest) -> nn.Module:
    """Four convolutions, pooled to 4 x 4, so that it knows where in an aligned picture something is."""
    widths = (manifest.channels, 24, 48, 96, 96)
    strides = (1 if manifest.size <= 32 else 2, 2, 2, 1)
    layers: list[nn.Module] = []
    for before, after, stride in zip(widths, widths[1:], strides, strict=False):
        layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * 96, len(manifest.editable)))


def _learned(model: nn.Module, manifest: Manifest, data: DataConfig, images: int) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    steps = -(-images // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps + 1)
    for pixels, signs in _shuffled(manifest, data, steps * BATCH):
        logits = model(_disturbed(_seen(pixels, data.bits), data.bits))
        loss = F.binary_cross_entropy_with_logits(logits, (signs > 0).float(), weight=(signs != 0).float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def _examined(model: nn.Module, manifest: Manifest, data: DataConfig) -> list[float]:
    """Held-out accuracy of every attribute; 0 where one side never occurs."""
    right, seen = torch.zeros(2, len(manifest.editable)), torch.zeros(2, len(manifest.editable))
    with natural_stream(manifest, data.validation, data) as stream:
        for batch in stream.batches(0, BATCH, stop=min(EXAMINED, stream.samples)):
            signs = batch.attributes[:, _columns(manifest)]
            told = torch.where(model(_seen(batch.pixels, data.bits)) > 0, 1, -1)
            sides = torch.stack([signs > 0, signs < 0])
            seen += sides.sum(1)
            right += (sides & (told == signs)).sum(1)
    return (right / seen.clamp_min(1)).mean(0).tolist()


def _shuffled(manifest: Manifest, data: DataConfig, images: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(pixels, attributes [b, A]) of the training split in shuffled order, so many images."""
    split = manifest.split(data.train)
    order = Order([shard.samples for shard in split.shards], BATCH, 0, manifest.window)
    place = Path(data.cache) if data.cache else Path.home() / ".cache" / "glow-pipeline"
    with Stream(manifest.storage, manifest, split, order, place, int(data.cache_gb * 1e9)) as stream:
        for batch in stream.batches(0, BATCH, stop=images):
            yield batch.pixels, batch.attributes[:, _columns(manifest)]


def _columns(manifest: Manifest) -> list[int]:
    return [manifest.attributes.index(name) for name in manifest.editable]


def _seen(pixels: Tensor, bits: int) -> Tensor:
    """uint8 -> float at the middle of each bin, in (-1, 1)."""
    return (quantize(pixels, bits) + 0.5) / 2 ** (bits - 1) - 1


def _disturbed(x: Tensor, bits: int) -> Tensor:
    """Moved by a few pixels and with noise of a bin or a thirtieth: what samples differ in and faces do not."""
    side = x.shape[-1]
    padded = F.pad(x, (SHIFT,) * 4, mode="replicate")
    dy, dx = torch.randint(0, 2 * SHIFT + 1, (2,)).tolist()
    noise = max(2.0 ** (1 - bits), 1 / 15) * torch.rand(len(x), 1, 1, 1) * torch.randn_like(x)
    return padded[:, :, dy : dy + side, dx : dx + side] + noise
