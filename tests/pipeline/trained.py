"""A tiny run, trained once a session on toy faces, for the tests of everything that comes after training."""

from __future__ import annotations

import atexit
import functools
import io
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from webdataset.writer import TarWriter

from glow import GlowConfig
from pipeline.config import DataConfig, EvaluateConfig, OptimConfig, ScheduleConfig, TrainConfig
from pipeline.export import natural_stream
from pipeline.in_place import survey
from pipeline.manifest import open_manifest, write_manifest
from pipeline.prepare import Options, build, make_plan
from pipeline.sources import open_source
from pipeline.storage import open_storage
from pipeline.toy import write_toy
from pipeline.train import run


@dataclass(frozen=True)
class Trained:
    """Where things are."""

    data: Path
    run: Path


@functools.cache
def trained() -> Trained:
    """Train two levels on 64 faces of 16 px for 96 images."""
    folder = Path(tempfile.mkdtemp(prefix="glow-test-trained-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    write_toy(folder / "source", images=80, size=16, seed=0)
    source = open_source(str(folder / "source"))
    plan = make_plan(source, Options(split="random:0:0.25", samples_per_shard=8), map, report=lambda images: None)
    build(plan, open_storage(str(folder / "data")), mapped=map, restart=False, report=lambda images: None)
    config = TrainConfig(
        name="tiny",
        storage=str(folder / "runs"),
        data=DataConfig(prefix=str(folder / "data"), bits=5, cache=str(folder / "cache"), cache_gb=0.1),
        model=GlowConfig(levels=2, steps=2, width=8, condition_splits=True, condition_steps=True),
        optim=OptimConfig(algorithm="adam", lr=2e-3, warmup=32, ema_halflife=64),
        schedule=ScheduleConfig(images=96, batch=16, leaf=8, init_images=64, status_every=32, checkpoint_every=96),
        evaluate=EvaluateConfig(every=48, images=16, temperatures=(0.7,), rows=1),
    )
    run(config)
    return Trained(folder / "data", folder / "runs" / "tiny")


def lossy_twin(folder: Path, size: int = 16) -> Path:
    """The run's images, or smaller ones, as JPEGs of somebody else's, taken in place."""
    manifest = open_manifest(open_storage(str(trained().data)))
    folder.mkdir()
    for name in manifest.splits:
        with natural_stream(manifest, name, DataConfig(cache=str(folder.parent / "cache"))) as stream:
            batch = stream.fetch(np.arange(stream.samples))
        with TarWriter(str(folder / f"{name}-000000.tar")) as tar:
            for number, (pixels, signs) in enumerate(zip(batch.pixels, batch.attributes.tolist(), strict=True)):
                file = io.BytesIO()
                Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize((size, size)).save(file, "jpeg")
                row = dict(zip(manifest.attributes, signs, strict=True))
                tar.write({"__key__": f"{number:04d}", "jpg": file.getvalue(), "json": row})
    storage = open_storage(str(folder))
    write_manifest(storage, *survey(storage, "auto", 0, "CC0-1.0", map, lambda images: None))
    return folder


def copy_of_run(folder: Path) -> Path:
    """A copy of the trained run that a test may write to."""
    return Path(shutil.copytree(trained().run, folder / "tiny"))
