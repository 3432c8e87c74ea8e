"""`bench data`: what the stream costs, in images a second a core.

Every way reads an epoch of the same shards in turn, round after round in one process, whose CPU time counts, so that
a busy machine disturbs them alike. Ours is the stream of training with one decoding thread and an empty cache: shards
are fetched, hashed and taken apart strictly, and samples come shuffled, in batches, with labels and attributes. The
others prove nothing: webdataset reads the tars in a row, from files or out of what our own S3 client brings, and
batches; the bare loop has the encoded images in memory and decodes them into a batch. All decode by Pillow, to planes.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import io
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from jobs.bench.rows import Measurement, Row
from pipeline.in_place import survey
from pipeline.manifest import Manifest, open_manifest, write_manifest
from pipeline.order import Order
from pipeline.prepare import Options, build, built_already, make_plan
from pipeline.scratch import scratch
from pipeline.shards import RAW, open_shard
from pipeline.sources import open_source
from pipeline.storage import Storage, open_storage
from pipeline.stream import Stream
from pipeline.toy import write_toy

CACHE_BYTES, EPOCHS = 1 << 40, 10
LOSSY: dict[str, dict[str, Any]] = {"jpg": {"format": "JPEG", "quality": 90}, "webp": {"format": "WEBP", "quality": 90}}


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to read an epoch; `epoch` answers how many images came."""

    row: str
    epoch: Callable[[], int]


def data(options: argparse.Namespace) -> Measurement:
    """Images a second a core by every way, and the memory of ours."""
    encodings = [word.strip() for word in options.encodings.split(",")]
    if strange := set(encodings) - {"png", RAW, *LOSSY}:
        raise ValueError(f"--encodings knows png, raw, jpg, webp, not {strange.pop()!r}")
    if min(options.images, options.batch, options.rounds) < 1:
        raise ValueError("--images, --batch and --rounds are 1 or more")

    def work() -> list[Row]:
        rows = []
        for manifest in faces(options, encodings):
            rows += compared(ways(manifest, options.batch), options.rounds)
            rows[-1]["resident"] = resident(manifest, options.batch)
        return rows

    what = f"{options.images} toy faces of {options.size} px, batch {options.batch}"
    return {"headline": f"{what}, {options.to or 'file'}; {versions()}"}, work


def versions() -> str:
    return ", ".join(f"{name} {version(name)}" for name in ("pillow", "webdataset", "torch"))


def faces(options: argparse.Namespace, encodings: Sequence[str]) -> Generator[Manifest]:
    """A dataset of the same toy faces an encoding, in a folder that goes away, or below the prefix `--to`."""
    with scratch() as folder:
        write_toy(folder / "source", images=options.images, size=options.size, seed=0, workers=1, report=_silent)
        for encoding in encodings:
            made = _prepared(folder, encoding)
            elsewhere = f"{options.to}/bench-{os.getpid()}-{encoding}"
            with _copied(made, elsewhere) if options.to else contextlib.nullcontext(made) as manifest:
                yield manifest


@contextlib.contextmanager
def _copied(made: Manifest, prefix: str) -> Iterator[Manifest]:
    """The same dataset elsewhere, for a while."""
    copy = open_storage(prefix)
    try:
        for key in made.storage.list():
            copy.write(key, made.storage.read(key))
        yield open_manifest(copy)
    finally:
        for key in copy.list():
            copy.remove(key)


def _silent(done: int) -> None:
    """Nobody waits for these."""


def _prepared(folder: Path, encoding: str) -> Manifest:
    """Shards of the faces: our own, or, for lossy forms, such as others write, taken in place."""
    own = encoding if encoding not in LOSSY else "png"
    plan = make_plan(open_source(str(folder / "source")), Options(encoding=own, samples_per_shard=128), map, _silent)
    storage = open_storage(str(folder / f"own-{own}"))
    manifest = built_already(plan, storage) or build(plan, storage, mapped=map, restart=False, report=_silent)
    return manifest if encoding == own else _in_place(manifest, open_storage(str(folder / encoding)), encoding)


def _in_place(manifest: Manifest, storage: Storage, encoding: str) -> Manifest:
    from webdataset.writer import TarWriter

    for name in manifest.splits:
        for shard in manifest.split(name).shards:
            buffer = io.BytesIO()
            with TarWriter(buffer, encoder=False) as out:
                for number, (image, meta) in enumerate(_samples(manifest, shard.file, shard.samples)):
                    picture = io.BytesIO()
                    Image.open(io.BytesIO(image)).save(picture, **LOSSY[encoding])
                    row = dict(zip(manifest.attributes, meta["attributes"], strict=True)) | {"label": meta["label"]}
                    key = f"{number:06d}"
                    out.write({"__key__": key, encoding: picture.getvalue(), "json": json.dumps(row).encode()})
            storage.write(shard.file, buffer.getvalue())
    return write_manifest(storage, *survey(storage, "auto", 0, "CC0-1.0", map, _silent))


def _samples(manifest: Manifest, file: str, count: int) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Encoded images and metadata of a shard."""
    with scratch() as folder:
        path = folder / "shard.tar"
        manifest.storage.download(file, path)
        with open_shard(path, count, foreign=manifest.foreign) as index:
            yield from (index.read(row) for row in range(len(index)))


def ways(manifest: Manifest, batch: int) -> list[Way]:
    """The bare loop, plain webdataset and ours over the training split."""
    split, encoding = manifest.split("train"), manifest.image.encoding
    images = [image for shard in split.shards for image, _ in _samples(manifest, shard.file, shard.samples)]
    shape = (manifest.channels, manifest.size, manifest.size)

    def bare(image: bytes) -> np.ndarray:
        if encoding == RAW:
            return np.frombuffer(image, np.uint8).reshape(shape).copy()
        return np.ascontiguousarray(
            np.asarray(Image.open(io.BytesIO(image))).reshape(*shape[1:], -1).transpose(2, 0, 1)
        )

    def loop() -> int:
        into = np.empty((batch, *shape), np.uint8)
        for number, image in enumerate(images):
            into[number % batch] = bare(image)
        return len(images)

    return [
        Way(row=f"{encoding}, bare loop", epoch=loop),
        Way(row=f"{encoding}, webdataset", epoch=lambda: _webdataset(manifest, batch, bare)),
        Way(row=f"{encoding}, ours", epoch=lambda: _ours(manifest, batch)),
    ]


def _webdataset(manifest: Manifest, batch: int, bare: Callable[[bytes], np.ndarray]) -> int:
    """An epoch of plain webdataset, as its documentation has it."""
    from webdataset.filters import batched, map_dict, to_tuple
    from webdataset.pipeline import DataPipeline
    from webdataset.shardlists import SimpleShardList
    from webdataset.tariterators import group_by_keys, tar_file_expander, tarfile_to_samples

    encoding, folder = manifest.image.encoding, manifest.storage.local
    files = [shard.file if folder is None else str(folder / shard.file) for shard in manifest.split("train").shards]
    opened = [_opener(manifest.storage), tar_file_expander, group_by_keys] if folder is None else [tarfile_to_samples()]
    decoded = map_dict(**{encoding: bare, "json": json.loads}), to_tuple(encoding, "json"), batched(batch)
    return sum(len(pixels) for pixels, _ in DataPipeline(SimpleShardList(files), *opened, *decoded))


def _opener(storage: Storage) -> Callable[[Iterator[dict[str, Any]]], Iterator[dict[str, Any]]]:
    """A stage that brings shards by our own S3 client."""

    def opened(urls: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for url in urls:
            yield url | {"stream": io.BytesIO(storage.read(url["url"]))}

    return opened


def _ours(manifest: Manifest, batch: int) -> int:
    """An epoch of the stream with an empty cache."""
    with opened_stream(manifest, batch) as stream:
        return sum(len(found) for found in stream.batches(0, batch, stop=stream.samples))


@contextlib.contextmanager
def opened_stream(manifest: Manifest, batch: int, threads: int = 1) -> Iterator[Stream]:
    """The stream of training, with a cache that goes away."""
    split = manifest.split("train")
    order = Order(split.shards.samples, batch, 0, manifest.window)
    with (
        scratch() as cache,
        Stream(manifest.storage, manifest, split, order, cache, CACHE_BYTES, threads) as stream,
    ):
        yield stream


def compared(every: list[Way], rounds: int) -> list[Row]:
    """Median images a second of CPU time of each way, after a round that is not counted."""
    spent: dict[str, list[float]] = {way.row: [] for way in every}
    for _ in range(rounds + 1):
        for way in every:
            start = time.process_time()
            count = way.epoch()
            spent[way.row].append((time.process_time() - start) / count)
    speeds = {row: 1 / statistics.median(seconds[1:]) for row, seconds in spent.items()}
    loop, plain, _ = speeds.values()
    return [{"row": row, "per_core": v, "x_loop": v / loop, "x_wds": v / plain} for row, v in speeds.items()]


def resident(manifest: Manifest, batch: int) -> str:
    """MiB of memory after every second of ten epochs of ours, in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return " ".join(f"{mib:.0f}" for mib in pool.submit(epochs, manifest.storage, batch).result()[1::2])


def epochs(storage: Storage, batch: int) -> list[float]:
    """MiB in use after each epoch, without what malloc keeps in reserve: that depends on which thread asked when."""
    found = []
    with opened_stream(open_manifest(storage), batch) as stream:
        for epoch in range(EPOCHS):
            for _ in stream.batches(epoch * stream.samples, batch, stop=(epoch + 1) * stream.samples):
                pass  # that it comes is all that is wanted
            ctypes.CDLL(None).malloc_trim(0)
            found.append(psutil.Process().memory_info().rss / 2**20)
    return found
