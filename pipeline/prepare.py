"""From a source to a dataset prefix: scan, plan, pack, publish.

The plan is all that determines the result: every picture's path, digest, attributes, class and split, and the options.
It is claimed in `building/plan.json` before the first shard. A build that died goes on by hash; two builds of one plan
write the same bytes. The manifest comes last, conditionally.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import PIL
from PIL import features

from pipeline.errors import ConflictError, DataError
from pipeline.manifest import (
    ELSEWHERE,
    Counts,
    Image,
    Manifest,
    Origin,
    Root,
    Shard,
    Tool,
    open_manifest,
    write_manifest,
)
from pipeline.pictures import Header, Target, common_form, inspect, load
from pipeline.shards import ENCODERS, Record, pack
from pipeline.sources import Item, Source
from pipeline.splits import assign, named_rule, subset
from pipeline.storage import MissingError, Storage, canonical_json, sha256_hex
from pipeline.verify import problems
from pipeline.workers import OrderedMap

VERSION = "1"
"""Raised by hand when the same plan would give other bytes."""

BUILDING = "building"
CLAIM = f"{BUILDING}/plan.json"
SHARD_SAMPLES = 512
SHARD_BYTES = 256 * 2**20
MAX_SHARDS = 20_000
SCANNED = 32
"""Pictures that are looked at in one piece of work."""

Report = Callable[[int], None]
Picture = tuple[Item, str]
"""An item and the sha256 of its file."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a person chooses; all of it is part of the plan."""

    size: int = 0
    split: str = "auto"
    seed: int = 0
    max_images: int = 0
    samples_per_shard: int = 0
    convert: bool = False
    encoding: str = "png"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that determines a dataset; `splits` holds the pictures in shard order."""

    root: Root
    splits: Mapping[str, tuple[Picture, ...]]
    shard_samples: int

    @property
    def images(self) -> int:
        return sum(map(len, self.splits.values()))

    @property
    def claim(self) -> bytes:
        """What an unfinished build says of itself: equal claims write equal bytes."""
        return canonical_json({"inputs": self.root.origin.inputs, "tool": asdict(self.root.tool)})

    def shards(self, split: str) -> list[tuple[Picture, ...]]:
        """The pictures of a split, shard by shard."""
        pictures, step = self.splits[split], self.shard_samples
        return [pictures[start : start + step] for start in range(0, len(pictures), step)]


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """One shard to be packed, wherever."""

    storage: Storage
    claim: str
    name: str
    first: int
    pictures: tuple[Picture, ...]
    target: Target
    labels: tuple[str, ...]
    encoding: str


def make_plan(source: Source, options: Options, mapped: OrderedMap, report: Report) -> Plan:
    """Read every picture's header and digest, refuse what does not fit together, fix splits and order."""
    items = subset(source.items, options.max_images, options.seed)
    headers = []
    for found in mapped(_scan, [items[start : start + SCANNED] for start in range(0, len(items), SCANNED)]):
        headers += found
        report(len(found))
    files = {item.where: header for item, header in zip(items, headers, strict=True)}
    image = replace(common_form(files, options.size, convert=options.convert), encoding=options.encoding)
    digests = {item.source: header.sha256 for item, header in zip(items, headers, strict=True)}
    splits = {
        name: tuple((item, digests[item.source]) for item in chosen)
        for name, chosen in assign(items, options.split, options.seed).items()
    }
    origin = Origin(kind=source.kind, inputs="", split=named_rule(items, options.split), seed=options.seed)
    root = Root(
        image=image,
        attributes=source.attributes,
        labels=source.labels,
        license=source.license,
        redistribution=source.redistribution,
        origin=origin,
        tool=tool(),
    )
    samples = options.samples_per_shard or shard_samples(len(items), image)
    inputs = _inputs(root, splits, samples, options)
    root = replace(root, origin=replace(origin, inputs=inputs))
    return Plan(root=root, splits=splits, shard_samples=samples)


def built_already(plan: Plan, storage: Storage) -> Manifest | None:
    """Return the finished dataset of this very plan; `ConflictError` if another one is there."""
    try:
        manifest = open_manifest(storage)
    except MissingError:
        return None
    if manifest.origin.inputs != plan.root.origin.inputs:
        raise ConflictError("another dataset is here", where=storage.url, cure=ELSEWHERE)
    for problem in problems(manifest):
        raise problem
    return manifest


def build(plan: Plan, storage: Storage, *, mapped: OrderedMap, restart: bool, report: Report) -> Manifest:
    """Write the dataset of a plan, or what is missing of it.

    `ConflictError` where anything else is under the prefix: an unfinished build of another plan (unless `restart`),
    files of another origin, another dataset.
    """
    _take(plan, storage, restart)
    shards: dict[str, list[Shard]] = {name: [] for name in plan.splits}
    for task, shard in zip(_tasks(plan, storage), mapped(pack_shard, _tasks(plan, storage)), strict=True):
        shards[task.name.rpartition("-")[0]].append(shard)
        report(shard.samples)
    manifest = write_manifest(storage, plan.root, {name: (_count(plan, name), own) for name, own in shards.items()})
    storage.remove_tree(BUILDING)
    return manifest


def pack_shard(task: ShardTask) -> Shard:
    """Pack one shard and note it under building/; one that is noted, and whose bytes have the noted digest, is kept."""
    note = f"{BUILDING}/{task.name}.json"
    kept = _kept(task, note)
    if kept is not None:
        return kept
    data = pack(_records(task), task.encoding)
    shard = Shard(file=task.name, bytes=len(data), sha256=sha256_hex(data), samples=len(task.pictures))
    task.storage.write(task.name, data)
    task.storage.write(note, canonical_json({"claim": task.claim, **asdict(shard)}))
    return shard


def shard_samples(images: int, image: Image) -> int:
    """Samples a shard: 512, or as many as make 256 MB of pixels where that would be too many shards."""
    if images <= SHARD_SAMPLES * MAX_SHARDS:
        return SHARD_SAMPLES
    return max(SHARD_SAMPLES, SHARD_BYTES // (image.size**2 * image.channels))


def tool() -> Tool:
    """Name what determines the bytes beside the plan."""
    return Tool(
        name="glow-pipeline data prepare",
        version=VERSION,
        pillow=PIL.__version__,
        zlib=str(features.version("zlib")),
        webdataset=importlib.metadata.version("webdataset"),
    )


def _scan(items: Sequence[Item]) -> list[Header]:
    return [inspect(item.read(), item.where) for item in items]


def _inputs(root: Root, splits: Mapping[str, tuple[Picture, ...]], samples: int, options: Options) -> str:
    """Digest of everything but the tool."""
    facts = asdict(root)
    del facts["tool"], facts["splits"]
    pictures = {
        name: [[item.source, digest, item.attributes, item.label] for item, digest in own]
        for name, own in splits.items()
    }
    facts |= {"pictures": pictures, "samples": samples, "convert": options.convert}
    return sha256_hex(canonical_json(facts))


def _take(plan: Plan, storage: Storage, restart: bool) -> None:
    """Claim the prefix for this plan, or find it claimed for it."""
    try:
        found = storage.read(CLAIM)
    except MissingError:
        _claim_empty(plan, storage)
        return
    if found == plan.claim:
        return
    if not restart:
        cure = "prepare with the same options, or --restart to drop it"
        raise ConflictError("an unfinished build of other pictures or options is here", where=storage.url, cure=cure)
    for key in storage.list():
        if key != CLAIM:
            storage.remove(key)
    storage.write(CLAIM, plan.claim)


def _claim_empty(plan: Plan, storage: Storage) -> None:
    if storage.list():
        raise ConflictError("the prefix is not empty, and no dataset of ours", where=storage.url, cure=ELSEWHERE)
    try:
        storage.create(CLAIM, plan.claim)
    except ConflictError:
        if storage.read(CLAIM) != plan.claim:
            raise


def _tasks(plan: Plan, storage: Storage) -> Iterator[ShardTask]:
    for split in sorted(plan.splits):
        for number, pictures in enumerate(plan.shards(split)):
            yield ShardTask(
                storage=storage,
                claim=sha256_hex(plan.claim),
                name=f"{split}-{number:06d}.tar",
                first=number * plan.shard_samples,
                pictures=pictures,
                target=Target(size=plan.root.size, channels=plan.root.channels),
                labels=plan.root.labels,
                encoding=plan.root.image.encoding,
            )


def _records(task: ShardTask) -> Iterator[Record]:
    for number, (item, digest) in enumerate(task.pictures, start=task.first):
        data = item.read()
        if sha256_hex(data) != digest:
            raise DataError("changed while it was being prepared", where=item.where, cure="prepare again")
        yield Record(
            key=f"{number:08d}",
            image=ENCODERS[task.encoding](load(data, task.target, item.where)),
            attributes=item.attributes,
            label=None if item.label is None else task.labels.index(item.label),
            source=item.source,
            source_sha256=digest,
        )


def _kept(task: ShardTask, note: str) -> Shard | None:
    """Return the shard if an earlier attempt at this plan finished it and its bytes are still the same."""
    try:
        facts = json.loads(task.storage.read(note))
        if facts.pop("claim") != task.claim:
            return None
        shard = Shard(**facts)
        return shard if sha256_hex(task.storage.read(task.name)) == shard.sha256 else None
    except MissingError:
        return None


def _count(plan: Plan, split: str) -> Counts:
    items = [item for item, _ in plan.splits[split]]
    columns = list(zip(*(item.attributes for item in items), strict=True)) or [()] * len(plan.root.attributes)
    return Counts(
        positive=tuple(column.count(1) for column in columns),
        negative=tuple(column.count(-1) for column in columns),
        labels=tuple(sum(item.label == label for item in items) for label in plan.root.labels),
    )
