"""The manifest: what a dataset prefix holds, and the digests that prove it.

    README.md            the data card, for people
    manifest.json        the root, canonical JSON; its sha256 is the dataset digest, which everything downstream quotes
    shards-000.jsonl     one line a shard of one split, in order: {"bytes", "file", "samples", "sha256"}; 10 000 a part
    train-000000.tar ... the shards (pipeline/shards.py)

The root names every part with its length and digest and is written last, conditionally: a prefix without it is not a
dataset. It names nothing outside its prefix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

from pydantic import TypeAdapter, ValidationError

from pipeline.card import card
from pipeline.errors import ConflictError, DataError, UsageError
from pipeline.shard_lines import CURE, Shard, Shards, line_of
from pipeline.shards import Foreign
from pipeline.storage import MissingError, Storage, canonical_json, checked_key, parse_json, sha256_hex

ROOT = "manifest.json"
SCHEMA = 1
PART_SHARDS = 10_000
WINDOW = 4
IN_PLACE = "webdataset in place"
"""The kind of origin of shards that others wrote and nobody touched."""

STRICT = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True)
class Split:
    """The shards of a split, in order; sample number = samples of the shards before + row."""

    name: str
    samples: int
    shards: Shards


@dataclass(frozen=True, kw_only=True)
class Image:
    """What every image of the dataset is. `resize` and `crop` say how it came to be: they change likelihoods."""

    __pydantic_config__ = STRICT
    size: int
    channels: int
    encoding: str = "png"
    lossless: bool = True
    resize: str = "none"
    crop: str = "none"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where the images came from; `inputs` is the digest of every source file, attribute and option."""

    __pydantic_config__ = STRICT
    kind: str
    inputs: str
    split: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class Tool:
    """What wrote the shards: under the same versions the same input gives the same bytes."""

    __pydantic_config__ = STRICT
    name: str
    version: str
    pillow: str
    zlib: str
    webdataset: str


@dataclass(frozen=True, kw_only=True)
class Part:
    """A file of shard lines."""

    __pydantic_config__ = STRICT
    file: str
    bytes: int
    sha256: str
    shards: int


@dataclass(frozen=True, kw_only=True)
class Counts:
    """How often every attribute is 1 and -1, and every class occurs, over the samples of a split."""

    __pydantic_config__ = STRICT
    positive: tuple[int, ...]
    negative: tuple[int, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class SplitSummary:
    """What the root says about a split."""

    __pydantic_config__ = STRICT
    samples: int
    shards: int
    counts: Counts
    parts: tuple[Part, ...]


@dataclass(frozen=True, kw_only=True)
class Root:
    """The content of manifest.json."""

    __pydantic_config__ = STRICT
    schema: int = SCHEMA
    image: Image
    attributes: tuple[str, ...]
    labels: tuple[str, ...]
    license: str
    redistribution: bool
    window: int = WINDOW
    origin: Origin
    tool: Tool
    splits: Mapping[str, SplitSummary] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Height and width in pixels."""
        return self.image.size

    @property
    def channels(self) -> int:
        return self.image.channels

    @property
    def lossless(self) -> bool:
        """Whether pixel values are the source's own: bits/dim over lossy shards compare with nothing."""
        return self.image.lossless

    @property
    def foreign(self) -> Foreign | None:
        """How to read the shards, where others wrote them."""
        return Foreign(attributes=self.attributes, labels=self.labels) if self.origin.kind == IN_PLACE else None

    @property
    def editable(self) -> tuple[str, ...]:
        """Attributes that vary over the training split (over any, where there is none): the others teach nothing."""
        train = self.splits.get("train")
        summaries = [train] if train else list(self.splits.values())
        return tuple(
            name
            for index, name in enumerate(self.attributes)
            if any(summary.counts.positive[index] and summary.counts.negative[index] for summary in summaries)
        )


@dataclass(frozen=True, kw_only=True)
class Manifest(Root):
    """An opened manifest: the root, its digest, and splits on demand."""

    digest: str
    storage: Storage

    def split(self, name: str) -> Split:
        """Load the shards of a split; every part is checked against the root."""
        if name not in self.splits:
            known = ", ".join(sorted(self.splits))
            raise UsageError(f"no split named {name!r}", where=self.storage.url, cure=f"splits here: {known}")
        summary = self.splits[name]
        parts = [_read_part(self.storage, part) for part in summary.parts]
        shards = Shards(b"".join(parts), self.storage.where(ROOT))
        samples = int(shards.samples.sum())
        if (samples, len(shards)) != (summary.samples, summary.shards):
            found = f"{len(shards)} shards with {samples} samples, not {summary.shards} with {summary.samples}"
            raise DataError(f"split {name!r} has {found}", where=self.storage.where(ROOT), cure=CURE)
        return Split(name=name, samples=samples, shards=shards)


def open_manifest(storage: Storage) -> Manifest:
    """Read and check the root of a dataset prefix. Parts are read by `Manifest.split`."""
    try:
        data = storage.read(ROOT)
    except MissingError as error:
        cure = "`data prepare` writes it last: run it to its end"
        raise MissingError("no dataset here: no manifest.json", where=storage.url, cure=cure) from error
    root = _parse_root(data, storage.where(ROOT))
    return _opened(root, sha256_hex(data), storage)


def write_manifest(storage: Storage, root: Root, splits: Mapping[str, tuple[Counts, Sequence[Shard]]]) -> Manifest:
    """Write the parts, the data card, then the root, conditionally; the same dataset already there is left alone.

    `root` comes without splits. `ConflictError` where another dataset lives under this prefix.
    """
    parts: list[tuple[Part, bytes]] = []
    summaries = {}
    for name, (counts, shards) in sorted(splits.items()):
        own = _cut_parts(shards, first=len(parts))
        parts += own
        samples = sum(shard.samples for shard in shards)
        summaries[name] = SplitSummary(
            samples=samples, shards=len(shards), counts=counts, parts=tuple(part for part, _ in own)
        )
    whole = replace(root, splits=summaries)
    _check_counts(whole, storage.where(ROOT))
    data = canonical_json(asdict(whole))
    if not same_root(storage, data):
        for part, lines in parts:
            storage.write(part.file, lines)
        if not storage.exists("README.md"):  # beside shards of others it may be theirs
            storage.write("README.md", card(whole).encode())
        _create_root(storage, data)
    return _opened(whole, sha256_hex(data), storage)


def same_root(storage: Storage, data: bytes) -> bool:
    """Say whether this very manifest is there; `ConflictError` if another one is."""
    try:
        found = storage.read(ROOT)
    except MissingError:
        return False
    if found != data:
        raise ConflictError("another dataset is here", where=storage.where(ROOT), cure=ELSEWHERE)
    return True


ELSEWHERE = "choose another prefix, or remove this one"


def _create_root(storage: Storage, data: bytes) -> None:
    try:
        storage.create(ROOT, data)
    except ConflictError:
        # Another builder of the same dataset, or our own write whose answer was lost, is no conflict.
        same_root(storage, data)


def _opened(root: Root, digest: str, storage: Storage) -> Manifest:
    fields = {name: getattr(root, name) for name in Root.__dataclass_fields__}
    return Manifest(**fields, digest=digest, storage=storage)


def _parse_root(data: bytes, where: str) -> Root:
    try:
        value = parse_json(data)
    except ValueError as error:
        raise DataError("not JSON", where=where, cure=CURE) from error
    schema = value.get("schema") if isinstance(value, dict) else None
    if schema != SCHEMA:
        raise DataError(f"manifest schema {schema}, this program reads {SCHEMA}", where=where, cure="use its version")
    try:
        root = TypeAdapter(Root).validate_json(data, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(step) for step in first["loc"])
        raise DataError(f"malformed manifest: {place}: {first['msg']}", where=where, cure=CURE) from error
    if canonical_json(value) != data:
        raise DataError("not in canonical form: edited by hand?", where=where, cure=CURE)
    _check_counts(root, where)
    return root


def _check_counts(root: Root, where: str) -> None:
    """Refuse a root whose figures contradict one another."""
    if root.window < 1:
        raise DataError(f"a window of {root.window} shards", where=where, cure=CURE)
    for name, summary in root.splits.items():
        if not name or summary.samples < 1:
            raise DataError(f"split {name!r} with {summary.samples} samples", where=where, cure=CURE)
        lengths = (len(summary.counts.positive), len(summary.counts.negative), len(summary.counts.labels))
        if lengths != (len(root.attributes), len(root.attributes), len(root.labels)):
            raise DataError(f"counts of split {name!r} do not fit the names", where=where, cure=CURE)
        for part in summary.parts:
            checked_key(part.file)


def _cut_parts(shards: Sequence[Shard], first: int) -> list[tuple[Part, bytes]]:
    cut = []
    for start in range(0, len(shards), PART_SHARDS):
        own = shards[start : start + PART_SHARDS]
        lines = b"".join(map(line_of, own))
        name = f"shards-{first + len(cut):03d}.jsonl"
        cut.append((Part(file=name, bytes=len(lines), sha256=sha256_hex(lines), shards=len(own)), lines))
    return cut


def _read_part(storage: Storage, part: Part) -> bytes:
    where = storage.where(part.file)
    data = storage.read(part.file)
    if len(data) != part.bytes or sha256_hex(data) != part.sha256:
        found = f"{len(data)} bytes with sha256 {sha256_hex(data)[:12]}"
        raise DataError(f"{found}, expected {part.bytes} with {part.sha256[:12]}", where=where, cure=CURE)
    lines = data.count(b"\n")
    if lines != part.shards:
        raise DataError(f"{lines} shards, expected {part.shards}", where=where, cure=CURE)
    return data
