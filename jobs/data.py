"""From what people have to a verified dataset, and a look at it."""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from jobs.progress import progress
from pipeline.errors import DataError, UsageError
from pipeline.scratch import scratch
from pipeline.storage import open_storage
from pipeline.workers import cores, ordered_map

if TYPE_CHECKING:
    from pipeline.manifest import Manifest
    from pipeline.prepare import Options, Plan
    from pipeline.sources import Source
    from pipeline.storage import Storage
    from pipeline.workers import OrderedMap

Kind = Literal["auto", "folder", "celebamask-hq", "celeba", "celeba-tfr", "parquet", "cifar10", "npz", "webdataset"]

Folder = Annotated[str, tyro.conf.arg(metavar="SOURCE")]
Dest = Annotated[str, tyro.conf.arg(metavar="DEST")]
Prefix = Annotated[str, tyro.conf.arg(metavar="PREFIX")]


def main(argv: Sequence[str]) -> int:
    """Run one of toy, prepare, verify, show."""
    if argv[:1] == ["prepare"] and any(word.partition("=")[0] == "--address" for word in argv):
        from jobs.cluster.tasks import sent
        from jobs.train import taken

        addresses, words = taken(list(argv), "--address", "an address")
        if addresses[-1].startswith(("http://", "https://")):
            return sent(addresses[-1], ["data", *words])
    commands = {"toy": toy, "prepare": prepare, "verify": verify, "show": show}
    return tyro.extras.subcommand_cli_from_dict(
        commands,
        prog="python -m jobs data",
        description=__doc__,
        args=list(argv),
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def toy(dest: Dest, /, images: int = 2000, size: int = 64, seed: int = 0, workers: int = 0) -> int:
    """Draw procedural faces in the CelebAMask-HQ layout, with attributes, class labels and the renderer's truth.

    Args:
        dest: Folder to write.
        images: How many.
        size: Height and width in pixels, up to 1024.
        seed: Image n of a seed is always the same.
        workers: Processes; 0 takes one a core.
    """
    from pipeline.toy import write_toy

    _refuse_below(0, seed=seed, workers=workers)
    start = time.perf_counter()
    with progress("draw", images) as report:
        done = write_toy(Path(dest), images=images, size=size, seed=seed, workers=workers or cores(), report=report)
    if done:
        print(f"{dest}: {images} faces of {size} px in {time.perf_counter() - start:.1f} s, CC0-1.0")
    else:
        print(f"{dest} holds these {images} faces already")
    return 0


def prepare(
    source: Folder,
    dest: Annotated[str, tyro.conf.arg(metavar="DEST")] = "",
    /,
    kind: Annotated[Kind, tyro.conf.arg(name="format")] = "auto",
    in_place: bool = False,
    size: int = 0,
    split: str = "auto",
    seed: int = 0,
    max_images: int = 0,
    samples_per_shard: int = 0,
    encoding: Literal["png", "raw"] = "png",
    licence: Annotated[str, tyro.conf.arg(name="license")] = "",
    convert: bool = False,
    workers: int = 0,
    address: str = "",
    restart: bool = False,
    dry_run: bool = False,
) -> int:
    """Pack pictures into verified WebDataset shards with a manifest. The same command again goes on where it stopped.

    Args:
        source: Folder of images, CelebAMask-HQ, CelebA, TFRecords, parquet, CIFAR-10, npz batches, or a WebDataset.
        dest: Folder or s3://bucket/prefix to write.
        kind: What the source is; auto looks.
        in_place: SOURCE is a folder or s3://bucket/prefix of WebDataset shards; write a manifest beside them, no DEST.
        size: Crop to a square and resize to this many pixels; 0 takes images as they are.
        split: auto (the source's own, else glow-like), glow-like (a tenth to val), celeba, random:SEED:FRACTION, a CSV.
        seed: Of the order of samples.
        max_images: Take only so many, chosen by hash; 0 takes all.
        samples_per_shard: 0 takes 512.
        encoding: png, or raw values: larger, and no work to decode.
        licence: Licence of the pictures; empty takes the source's LICENSE file, or what its kind is known for.
        convert: Accept alpha, CMYK, 16 bits and grey among colour, and convert them.
        workers: Processes; 0 takes one a core.
        address: Let a Ray cluster do it, whose nodes see SOURCE as it is named here: the job server http://HOST:8265,
            which gets this very command, or auto, the cluster this machine is part of.
        restart: Drop an unfinished build that had other options.
        dry_run: Look at every file, say what would be written, write nothing.
    """
    from pipeline.prepare import Options
    from pipeline.sources import open_source

    _refuse_below(0, size=size, max_images=max_images, samples_per_shard=samples_per_shard, workers=workers)
    if in_place and (dest or size or max_images or samples_per_shard or convert or restart or encoding != "png"):
        raise UsageError("--in-place changes no shard", cure="it takes --split, --seed, --license, --workers")
    if not in_place and not dest:
        raise UsageError("no DEST", cure="python -m jobs data prepare SOURCE DEST")
    if in_place:
        with working(workers, address) as mapped:
            return _adopt(source, split, seed, licence, mapped, dry_run)
    options = Options(
        size=size,
        split=split,
        seed=seed,
        max_images=max_images,
        samples_per_shard=samples_per_shard,
        convert=convert,
        encoding=encoding,
    )
    with scratch() as folder, working(workers, address) as mapped:
        found = open_source(source, kind, folder).licensed(licence)
        return _pack(found, options, open_storage(dest), mapped, restart=restart, dry_run=dry_run)


@contextlib.contextmanager
def working(workers: int, address: str) -> Iterator[OrderedMap]:
    """Who does the work: processes of this machine, or a cluster."""
    if address:
        from jobs.cluster.tasks import connected

        with connected(address, workers) as mapped:
            yield mapped
    else:
        yield functools.partial(ordered_map, workers=workers or cores())


def _pack(
    found: Source, options: Options, storage: Storage, mapped: OrderedMap, *, restart: bool, dry_run: bool
) -> int:
    """Plan, say what is planned, and build."""
    from pipeline.prepare import BUILDING, build, built_already, make_plan

    start = time.perf_counter()
    with progress("look", min(options.max_images or len(found.items), len(found.items))) as report:
        plan = make_plan(found, options, mapped, report)
    _print_plan(found, plan)
    manifest = built_already(plan, storage)
    if manifest is not None:
        if not dry_run:
            storage.remove_tree(BUILDING)
        print(f"{storage.url} holds exactly this dataset already, digest {manifest.digest}")
        return 0
    if dry_run:
        print(f"dry run: nothing written to {storage.url}")
        return 0
    with progress("pack", plan.images) as report:
        manifest = build(plan, storage, mapped=mapped, restart=restart, report=report)
    seconds = time.perf_counter() - start
    print(f"{storage.url}: {plan.images} images in {seconds:.1f} s, digest {manifest.digest}")
    return 0


def _adopt(where: str, split: str, seed: int, licence: str, mapped: OrderedMap, dry_run: bool) -> int:
    """Write a manifest for shards of others, or say what it would say."""
    from pipeline.in_place import survey
    from pipeline.manifest import write_manifest

    start, storage = time.perf_counter(), open_storage(where)
    with progress("read", 0) as report:
        root, splits = survey(storage, split, seed, licence, mapped, report)
    for name, (_, shards) in splits.items():
        print(f"  {name}: {sum(shard.samples for shard in shards)} images in {len(shards)} shards")
    form = (
        f"{root.size}x{root.size}, {root.image.encoding}, {len(root.attributes)} attributes, {len(root.labels)} classes"
    )
    if dry_run:
        print(f"dry run: {form}; nothing written to {storage.url}")
        return 0
    manifest = write_manifest(storage, root, splits)
    print(f"{storage.url}: {form}, read in {time.perf_counter() - start:.1f} s, digest {manifest.digest}")
    return 0


def verify(prefix: Prefix, /, deep: bool = False, workers: int = 0) -> int:
    """Check a dataset against its manifest; exit 4 with every damaged shard named.

    Args:
        prefix: Folder or s3://bucket/prefix of a dataset.
        deep: Hash every shard again and decode every image; otherwise lengths are compared.
        workers: Processes; 0 takes one a core.
    """
    from pipeline.verify import problems

    _refuse_below(0, workers=workers)
    manifest = _open(prefix)
    samples = sum(split.samples for split in manifest.splits.values())
    found = 0
    with progress("verify", samples) as report:
        for problem in problems(manifest, deep=deep, workers=(workers or cores()) if deep else 1, report=report):
            found += 1
            print(f"error: {problem}", file=sys.stderr)
    if found:
        raise DataError(f"{found} problems", where=prefix, cure="prepare the dataset again, or fetch the named shards")
    how = "bytes, digests, structure, images and counts" if deep else "manifest and shard lengths"
    print(f"{prefix}: {samples} samples, {how} are as the manifest says; digest {manifest.digest}")
    return 0


def show(prefix: Prefix, /, split: str = "train", sheet: str = "", images: int = 64) -> int:
    """Print a dataset's card, and draw a contact sheet of its first images.

    Args:
        prefix: Folder or s3://bucket/prefix of a dataset.
        split: Split on the sheet.
        sheet: PNG file to write; empty draws none.
        images: Images on the sheet.
    """
    from pipeline.card import card

    _refuse_below(1, images=images)
    manifest = _open(prefix)
    print(card(manifest), end="")
    print(f"\ndigest {manifest.digest}")
    if sheet:
        _draw_sheet(manifest, split, images, Path(sheet))
        print(f"contact sheet: {sheet}")
    return 0


def _refuse_below(least: int, **options: int) -> None:
    """UsageError for the first option below its minimum."""
    for name, value in options.items():
        if value < least:
            raise UsageError(f"--{name.replace('_', '-')} {value}", cure=f"give {least} or more")


def _open(prefix: str) -> Manifest:
    from pipeline.manifest import open_manifest

    return open_manifest(open_storage(prefix))


def _print_plan(source: Source, plan: Plan) -> None:
    root = plan.root
    color, labels = "grey" if root.channels == 1 else "RGB", f", {len(root.labels)} classes" if root.labels else ""
    attributes = f", {len(root.attributes)} attributes" if root.attributes else ""
    print(f"{source.kind}: {plan.images} images, {root.size}x{root.size} {color}{labels}{attributes}, {root.license}")
    for name, pictures in plan.splits.items():
        print(f"  {name}: {len(pictures)} images in {len(plan.shards(name))} shards")
    for note in source.notes:
        print(f"  note: {note}")


def _draw_sheet(manifest: Manifest, split: str, images: int, path: Path) -> None:
    from pipeline.card import contact_sheet
    from pipeline.shard_lines import refuse_changed
    from pipeline.shards import decode, open_shard

    pixels = []
    for shard in manifest.split(split).shards:
        if len(pixels) >= images:
            break
        with scratch() as folder:
            local = folder / "shard.tar"
            where = manifest.storage.where(shard.file)
            manifest.storage.download(shard.file, local)
            refuse_changed(local, shard, where)
            with open_shard(local, shard.samples, where, manifest.foreign) as index:
                rows, form = range(min(len(index), images - len(pixels))), manifest.image.encoding
                pixels += [decode(index.read(row)[0], manifest.size, manifest.channels, form) for row in rows]
    drawn = contact_sheet(manifest, manifest.splits[split].counts, pixels)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn.save(path, format="PNG")
    except OSError as error:
        raise UsageError(error.strerror or "cannot be written", where=str(path), cure="name another file") from error
