"""What learns: a model, its optimiser, averaged weights and guard, moved one global batch at a time.

Everything that must survive a restart is in `tensors()` and `state()`; noise is keyed by seed, epoch and sample, so
there is no generator to save, and the position in the stream is the only other state of a run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from glow import Flow, bits_per_dim, dequantize, keyed_uniform, make_flow, sample_keys
from pipeline.anchors import Anchors, nets_dtype
from pipeline.config import TrainConfig
from pipeline.errors import DivergedError
from pipeline.gradients import Gradients
from pipeline.manifest import Manifest
from pipeline.optim import (
    Ema,
    Guard,
    learning_rate,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    set_rate,
)
from pipeline.spool import Means
from pipeline.stream import Batch, Stream
from pipeline.world import World, any_rank, gather_ordered

WORST = 4
"""Parameters and samples named where a gradient is refused."""

INIT_LEAF = 32
"""Images whose moments are added up at a time in data-dependent initialisation."""


def build_model(config: TrainConfig) -> Flow:
    """The model of a resolved configuration with its initial weights: a function of the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return make_flow(config.model)


class Examples:
    """Turns stored batches into what the model is given: dequantised pixels, label, attributes it is conditioned on."""

    def __init__(self, config: TrainConfig, manifest: Manifest, device: torch.device) -> None:
        self._bits, self._device = config.data.bits, device
        self._columns = [manifest.attributes.index(name) for name in manifest.editable]
        self._labelled, self._described = config.model.classes > 0, config.model.attributes > 0

    def of(self, batch: Batch, seed: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(x [b, c, h, w] in [-1/2, 1/2), label [b] or None, attributes [b, A] or None) of some rows."""
        pixels = batch.pixels[rows].to(self._device, non_blocking=True)
        keys = sample_keys(seed, batch.epochs[rows], batch.samples[rows]).to(self._device)
        x = dequantize(pixels, self._bits, keyed_uniform(keys, tuple(pixels.shape[1:])))
        label = batch.labels[rows].to(self._device) if self._labelled else None
        attributes = batch.attributes[rows][:, self._columns].to(self._device) if self._described else None
        return x, label, attributes


class Learner:
    """One worker's share of learning; after every step all workers hold the same weights."""

    def __init__(self, config: TrainConfig, world: World, examples: Examples) -> None:
        self.config, self.world, self._examples = config, world, examples
        self.model = build_model(config).to(world.device)
        parameters = list(self.model.parameters())
        schedule = config.schedule
        leaves, moments = schedule.batch // schedule.leaf, len(self.model.moments())
        self._gradients = Gradients(parameters, world, leaves, schedule.reduction, moments)
        self.optimizer = make_optimizer(parameters, config.optim)
        self.ema = Ema(self.model, config.optim.ema_halflife, schedule.batch)
        self.guard = Guard(config.optim)
        self.anchors = Anchors(config, self.model, world)
        self.images, self.step = 0, 0
        self.means = Means()
        self._losses: list[Tensor] = []

    @property
    def rows(self) -> slice:
        """This worker's rows of every global batch."""
        own, leaf = self._gradients.own, self.config.schedule.leaf
        return slice(own.start * leaf, own.stop * leaf)

    def initialize(self, stream: Stream) -> None:
        """Set activation norms and running moments from the first images of the stream, the same for any world."""
        leaves = max(1, self.config.schedule.init_images // INIT_LEAF)
        own = range(self.world.rank * leaves // self.world.size, (self.world.rank + 1) * leaves // self.world.size)
        rows = [self._examples.of(batch, self.config.seed) for batch in _microbatches(stream, own)]
        xs, labels, attributes = zip(*rows, strict=True) if rows else ((), (), ())
        bits, world = self.config.data.bits, self.world
        self.model.initialize(xs, labels, attributes, gather=lambda table: gather_ordered(world, table), bits=bits)
        self.ema.reset(self.model)

    def learn(self, batch: Batch) -> dict[str, Any]:
        """Take one step; `batch` holds this worker's rows of the global batch. What was wrong, where it was refused."""
        config, refused = self.config, dict[str, Any]()
        self._losses.clear()
        gradient = self._gradients.of(lambda leaf: self._loss(batch, leaf))
        self._draw_scales()
        norm = float(torch.linalg.vector_norm(gradient))
        rate = learning_rate(config.optim, self.images, config.schedule.images)
        if self.guard.check(norm):
            if 0 < config.optim.clip < norm:
                gradient.mul_(config.optim.clip / norm)
            set_rate(self.optimizer, rate)
            self.optimizer.step()
            self.model.absorb(self._gradients.moments())
            self.ema.update(self.model)
        else:
            refused = self._findings(batch, norm)
        self.images += config.schedule.batch
        self.step += 1
        self.means.add({"train/grad_norm": norm, "train/lr": rate} if math.isfinite(norm) else {})
        return refused

    def sound(self, last: bool = False) -> bool:
        """Whether every weight, and the last gradient, is a number; DivergedError where the run would `last` end so."""
        broken = not self.guard.finite or any(not bool(p.isfinite().all()) for p in self.model.parameters())
        (broken,) = any_rank(self.world, broken)
        if broken and last:
            raise DivergedError("the last updates left weights that are no numbers", cure="lower optim.lr")
        return not broken

    def _findings(self, batch: Batch, norm: float) -> dict[str, Any]:
        """Where a refused gradient comes from: the worst parameters and samples; equal on all ranks, collective."""
        named = self.model.named_parameters()
        norms = {name: float(torch.linalg.vector_norm(p.grad)) for name, p in named if p.grad is not None}
        rows = torch.stack([batch.epochs, batch.samples, torch.cat(self._losses).cpu()], dim=1).double()
        table = gather_ordered(self.world, rows).tolist()
        return {
            "norm": f"{norm:.4g}",
            "parameters": sorted(norms, key=lambda name: -_badness(norms[name]))[:WORST],
            "samples": [
                {"epoch": int(epoch), "sample": int(sample), "bits_per_dim": f"{loss:.4g}"}
                for epoch, sample, loss in sorted(table, key=lambda row: -_badness(row[2]))[:WORST]
            ],
        }

    def _loss(self, batch: Batch, leaf: int) -> Tensor:
        """A leaf's share of the batch's mean bits per dimension."""
        size = self.config.schedule.leaf
        start = (leaf - self._gradients.own.start) * size
        x, label, attributes = self._examples.of(batch, self.config.seed, slice(start, start + size))
        bits, dims = self.config.data.bits, self.model.dims
        nets = nets_dtype(self.config)
        with torch.autocast(x.device.type, nets, enabled=nets != torch.float32):
            terms = self.model.bound(x, bits, label, attributes)
        loss = bits_per_dim(terms.log_prob, dims, bits)
        self._losses.append(loss.detach())
        per_dim = -1 / (dims * math.log(2))
        figures = {
            "train/bits_per_dim": loss.detach().mean(),
            "train/log_det_bpd": terms.log_det.detach().mean() * per_dim,
            "train/prior_bpd": (terms.log_prob - terms.log_det).detach().mean() * per_dim,
        }
        if terms.dequantization is not None:
            freedom = terms.dequantization.detach().mean() * per_dim
            figures |= {"train/dequantization_bpd": freedom, "train/prior_bpd": figures["train/prior_bpd"] - freedom}
        if terms.logits is not None and label is not None:
            surprise = class_bits(terms.logits, label)
            figures["train/class_bits"] = surprise.detach().mean()
            loss = loss + self.config.model.classifier_weight * surprise
        self.means.add(figures)
        self._gradients.note(self.model.moments())
        unit = dims * math.log(2) if self.config.optim.loss == "nats" else 1.0
        return unit * loss.sum() / self.config.schedule.batch

    @torch.no_grad()
    def _draw_scales(self) -> None:
        """Add the gradient of l2 * sum of squares; it belongs to no leaf."""
        if self.config.optim.l2:
            for scale in self.model.scales():
                assert scale.grad is not None
                scale.grad.add_(scale, alpha=2 * self.config.optim.l2)

    def figures(self) -> dict[str, float]:
        """Means since the last call over all workers; collective."""
        own = self.means.take()
        names = sorted(own)
        table = gather_ordered(self.world, torch.tensor([[own[name] for name in names]], dtype=torch.float64))
        means = dict(zip(names, table.mean(0).tolist(), strict=True))
        return means | self.anchors.figures() | {"ft/skipped": float(self.guard.skipped)}

    def tensors(self) -> dict[str, Tensor]:
        """Everything large a checkpoint keeps: weights, averaged weights, optimiser moments."""
        things = {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optim": optimizer_tensors(self.optimizer, self.model),
        }
        return {f"{thing}/{name}": tensor for thing, named in things.items() for name, tensor in named.items()}

    def state(self) -> dict[str, Any]:
        """Everything small a checkpoint keeps."""
        own = {"guard": self.guard.state_dict(), "anchors": self.anchors.state()}
        return {"images": self.images, "step": self.step, **own}

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Continue exactly where `tensors()` and `state()` were taken."""
        self.model.load_state_dict(_below(tensors, "model/"))
        self.ema.load_state_dict(_below(tensors, "ema/"))
        load_optimizer_tensors(self.optimizer, self.model, _below(tensors, "optim/"))
        self.guard.load_state_dict(state["guard"])
        self.anchors.restore(state["anchors"])
        self.images, self.step = state["images"], state["step"]


def class_bits(logits: Tensor, label: Tensor) -> Tensor:
    """Bits a classifier is surprised by [b, classes] about labels [b]; 0 where the label is unknown (-1)."""
    return F.cross_entropy(logits, label, ignore_index=-1, reduction="none") / math.log(2)


def _microbatches(stream: Stream, own: Sequence[int]) -> Iterator[Batch]:
    for index in own:
        yield stream.fetch(torch.arange(index * INIT_LEAF, (index + 1) * INIT_LEAF).numpy())


def _badness(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
