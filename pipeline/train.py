"""THE loop: the same under plain python, torchrun and Ray Train.

To resume a run, run the same command again: the last committed checkpoint decides where it goes on. The loop is given
`report` and does not know who listens.
"""

from __future__ import annotations

import functools
import itertools
import secrets
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

from pipeline.checkpoint import accepting, load_latest, newest_step
from pipeline.config import TrainConfig, refuse_impossible, write_config
from pipeline.errors import ConfigError, DataError, DivergedError, interruption
from pipeline.evaluate import validation_bits
from pipeline.fingerprint import decisive, fingerprint
from pipeline.grids import training_grid
from pipeline.learner import Examples, Learner
from pipeline.lease import held
from pipeline.manifest import Manifest, open_manifest
from pipeline.order import Order, Sequential
from pipeline.origin import origin
from pipeline.pace import Pace
from pipeline.recipe import attempts_of
from pipeline.saver import Saver
from pipeline.storage import open_storage
from pipeline.stream import Stream
from pipeline.traces import traced
from pipeline.tracking import Tracker, flat_params
from pipeline.world import World, any_rank, joined, on_all, on_first

Report = Callable[[dict[str, Any]], None]
"""Told the figures of every status line, {"event": what happened} or {"warning": what to know}, on rank 0."""

Stop = Callable[[], bool]


def run(
    config: TrainConfig, report: Report = lambda figures: None, stop: Stop = lambda: False, owner: str = ""
) -> dict[str, float]:
    """Train as the worker the environment names (RANK, WORLD_SIZE as torchrun and Ray set them, or alone).

    `stop` is asked after every batch whether to end after a checkpoint, as SIGTERM does; one rank's yes is enough.
    Attempts with the same `owner` are one job and follow each other at once; any other waits for the run's lease.
    """
    refuse_impossible(config)
    torch.set_num_threads(config.cluster.threads)
    world = World.from_environment(config.cluster.gpu)
    with joined(world):
        manifest = open_manifest(open_storage(config.data.prefix))
        config = resolved(config, manifest)
        folder = open_storage(config.storage).sub(config.name)
        owner, tell = owner or secrets.token_hex(8), lambda text: report({"event": text})
        with held(world, folder, lambda: newest_step(folder), owner, config.cluster.lease_s, tell) as token:
            tracker = Tracker(
                folder, config.tracking, config.name, world.rank, warn=lambda text: report({"warning": text})
            )
            try:
                if world.rank == 0:
                    tracker.event("started", workers=world.size, torch=str(torch.__version__), **origin())
                return train_twice(config, manifest, world, tracker, report, stop, token)
            except BaseException as error:
                tracker.event("stopped", reason=f"{type(error).__name__}: {error}")
                tracker.close("FAILED")
                raise


IGNORABLE = {"classes": (-1,), "attributes": (-1,)}
"""What a model may leave aside of its data, and how its settings say so; that stays, so that they may be read again."""


def resolved(config: TrainConfig, manifest: Manifest) -> TrainConfig:
    """The configuration with everything that follows from the data filled in; ConfigError where the two disagree."""
    if config.data.digest not in ("", manifest.digest):
        found = f"the dataset's digest is {manifest.digest[:12]}, the run is pinned to {config.data.digest[:12]}"
        raise ConfigError(found, where=manifest.storage.url, cure="train under another name, or bring the dataset back")
    follows = {
        "size": manifest.size,
        "channels": manifest.channels,
        "classes": len(manifest.labels),
        "attributes": len(manifest.editable),
    }
    for name, value in follows.items():
        asked = getattr(config.model, name)
        if asked not in (0, value, *IGNORABLE.get(name, ())):
            raise ConfigError(f"model.{name} is {asked}, the data has {value}", cure=f"leave model.{name} at 0")
        follows[name] = asked or value
    model = replace(config.model, **follows)
    try:
        model.refuse_impossible()
    except ValueError as error:
        cure = "other settings of model, or other data"
        raise ConfigError(str(error), where=manifest.storage.url, cure=cure) from error
    return replace(config, model=model, data=replace(config.data, digest=manifest.digest))


def train_twice(
    config: TrainConfig, manifest: Manifest, world: World, tracker: Tracker, report: Report, stop: Stop, token: int
) -> dict[str, float]:
    """`train`, and once more from the last checkpoint where it diverges: a fault of the machine does not come again."""
    try:
        return train(config, manifest, world, tracker, report, stop, token)
    except DivergedError as error:
        tracker.event("rolled back", reason=str(error))
        if world.rank == 0:
            report({"event": f"diverged; once more from the last checkpoint ({error.what})"})
    return train(config, manifest, world, tracker, report, stop, token)


def train(
    config: TrainConfig,
    manifest: Manifest,
    world: World,
    tracker: Tracker,
    report: Report,
    stop: Stop = lambda: False,
    token: int = 0,
) -> dict[str, float]:
    """Learn until `schedule.images`; returns the last figures. Collective: every rank calls it with equal arguments.

    Raises `Interrupted` after a committed checkpoint on SIGTERM or SIGINT, `ConflictError` where the run folder belongs
    to another fingerprint or was taken by another job (`token` is our lease), `DivergedError` after too many skipped
    updates.
    """
    schedule, folder = config.schedule, open_storage(config.storage).sub(config.name)
    settings, identity = decisive(config, manifest.digest), fingerprint(config, manifest.digest)
    learner = Learner(config, world, examples := Examples(config, manifest, world.device))
    accepted = accepting(identity, settings, config.allow_change)
    loaded = load_latest(folder, world, accepted, on_event=lambda text: tracker.event("checkpoint", text=text))
    kept = {"settings": settings, "attempts": attempts_of(config, world, loaded)}
    keep_config = functools.partial(folder.write, "config.toml", write_config(for_next_time(config)).encode())
    if loaded is None or loaded.made_with(settings):
        on_first(world, keep_config)
    tracker.start(flat_params(config), inputs_of(manifest))
    tracker.artifact("config.toml")
    figures: dict[str, float] = {}
    keep = {"keep": schedule.keep, "keep_every": schedule.keep_every}
    saver = Saver(folder, world, identity, **keep, token=token, committed=[keep_config, tracker.sync])
    tracing = traced(config.tracking.profile, folder, world, tracker, lambda: learner.step)
    data = opened(config, manifest, world)
    with data as (stream, unseen), stop_asked() as asked, closing(saver), tracing as step_taken:
        if loaded is None:
            learner.initialize(stream)
            figures |= look(learner, examples, unseen, tracker)
        else:
            learner.restore(loaded.tensors, loaded.state)
            saver.images = loaded.images
            tracker.event("resumed", images=learner.images)
        tell(learner, tracker)
        pace = Pace(config, world, learner.images)
        if pace.unknown:
            tracker.event("mfu", value=None, reason=pace.unknown)
        end, owed = schedule.images + -schedule.images % schedule.batch, False
        for batch in pace.timed(stream.batches(learner.images, schedule.batch, learner.rows, stop=end)):
            refused = learner.learn(batch)
            last = learner.images >= schedule.images
            if refused:
                tracker.event("skipped", images=learner.images, **refused)
                owed |= saver.drop()  # weights whose first gradient is refused are none to go back to
                learner.guard.refuse_hopeless(refused, last)
            step_taken()
            stopping, writing = any_rank(world, bool(asked) or stop(), saver.writing)
            owed |= due(learner.images, schedule.checkpoint_every, schedule.batch)
            saving = (last or stopping or (owed and not refused)) and learner.sound(last)
            speaking = saving or last or stopping or due(learner.images, schedule.status_every, schedule.batch)
            if speaking:
                stream.told(itertools.chain(*on_all(world, lambda: stream.damaged)))
                figures |= speak(learner, pace, stream, tracker, saver.images, token)
            if last or due(learner.images, config.evaluate.every, schedule.batch):
                figures |= look(learner, examples, unseen, tracker)
            if not writing:
                saver.advance()
            if saving:
                owed = False
                saver.begin(learner.step, learner.images, learner.tensors(), learner.state() | kept)
            if last or stopping:
                saver.finish()
            if speaking and world.rank == 0:
                report({"images": float(learner.images)} | figures)
            if stopping and not last:
                cure = "run the same command again to go on"
                text = f"stopped after a checkpoint at {saver.images} images"
                raise interruption(asked)(text, where=folder.url, cure=cure)
    tracker.close()
    return {"images": float(learner.images)} | figures


def for_next_time(config: TrainConfig) -> TrainConfig:
    """The configuration without what was asked of this attempt alone."""
    return replace(config, allow_change=(), tracking=replace(config.tracking, profile=0))


def speak(learner: Learner, pace: Pace, stream: Stream, tracker: Tracker, saved: int, token: int) -> dict[str, float]:
    """Record how the run stands since the last call; its newest checkpoint is at `saved`, `token` counts its starts."""
    fresh = learner.figures() | pace.figures(learner.images) | stream.figures()
    fresh |= {"ft/checkpoint": float(saved), "ft/restarts": float(max(token - 1, 0))}
    tracker.log(learner.images, fresh)
    tell(learner, tracker)
    return fresh


def tell(learner: Learner, tracker: Tracker) -> None:
    """Record what happened to the run's anchors since the last call."""
    while learner.anchors.news:
        tracker.event("anchors", text=learner.anchors.news.pop(0), anchor_every=list(learner.anchors.anchor_every))


def inputs_of(manifest: Manifest) -> dict[str, Any]:
    """What MLflow is told of the dataset."""
    place = manifest.storage.url.rstrip("/")
    samples = {name: split.samples for name, split in manifest.splits.items()}
    told = {"name": place.rpartition("/")[2], "source": place, "digest": manifest.digest, "samples": samples}
    return told | {"license": manifest.license}


def due(images: int, every: int, batch: int) -> bool:
    """Whether the batch that ended at `images` passed a multiple of `every`."""
    return images // every > (images - batch) // every


def look(learner: Learner, examples: Examples, unseen: Stream, tracker: Tracker) -> dict[str, float]:
    """Judge the averaged weights on validation images and draw fixed seeds; collective over ranks."""
    config, model = learner.config, learner.model.eval()
    count = min(config.evaluate.images, unseen.samples)
    with learner.ema.swapped(model):
        bits = validation_bits(model, examples, unseen, learner.world, count, config.data.bits)
        if learner.world.rank == 0:
            _, *condition = examples.of(unseen.fetch(np.arange(8 * config.evaluate.rows)), config.seed)
            for temperature in config.evaluate.temperatures:
                try:
                    picture = training_grid(model, config, temperature, (condition[0], condition[1]))
                    tracker.image(f"t{temperature:.2f}", learner.images, picture)
                except DataError as error:  # a model on its way out; the guard is there to end the run, or not
                    tracker.event("no picture", images=learner.images, reason=str(error))
    model.train()
    figures = {"val/bits_per_dim": float(bits.mean())}
    tracker.log(learner.images, figures)
    return figures


@contextmanager
def opened(config: TrainConfig, manifest: Manifest, world: World) -> Iterator[tuple[Stream, Stream]]:
    """The training stream in its shuffled order and the validation stream in its natural one."""
    learned, held_out = manifest.split(config.data.train), manifest.split(config.data.validation)
    cache = Path(config.data.cache) if config.data.cache else Path.home() / ".cache" / "glow-pipeline"
    room = int(config.data.cache_gb * 1e9)
    shuffled = Order(learned.shards.samples, config.schedule.batch, config.seed, manifest.window)
    natural = Sequential(held_out.shards.samples)
    damaged, beside = config.data.damaged, world.local_size
    stream = Stream(manifest.storage, manifest, learned, shuffled, cache, room, damaged=damaged, beside=beside)
    unseen = Stream(manifest.storage, manifest, held_out, natural, cache, room)
    try:
        yield stream, unseen
    finally:
        stream.close()
        unseen.close()


@contextmanager
def stop_asked() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT instead of dying of them: the loop stops after a checkpoint. Main thread only."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def note(number: int, _: FrameType | None) -> None:
        asked.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
