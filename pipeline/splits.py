"""Which pictures go where, in what order: by hash of their paths, so that it depends on nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from pipeline.errors import DataError, UsageError
from pipeline.sources import Item
from pipeline.sources.tables import read_pairs

CURE = "splits: auto, glow-like, celeba, random:SEED:FRACTION (of the images to val), or a CSV file image,split"


def subset(items: Iterable[Item], limit: int, seed: int) -> tuple[Item, ...]:
    """Keep `limit` items (0: all), the same for everybody."""
    chosen = sorted(items, key=_hashed(f"subset/{seed}"))
    return tuple(chosen[:limit] if limit else chosen)


def assign(items: Iterable[Item], split: str, seed: int) -> dict[str, list[Item]]:
    """Cut items into named splits, each in shard order: that of sha256(seed, source path).

    `auto` keeps the splits a source brings, else is `glow-like`: a tenth to val (27 000 / 3 000 of CelebA-HQ); `celeba`
    is CelebA's own partition. A split without images is refused.
    """
    items = list(items)
    if named_rule(items, split) == "source":
        named = {item.source: item.split for item in items}
    else:
        named = _named(items, split)
    splits: dict[str, list[Item]] = {}
    for item in sorted(items, key=_hashed(str(seed))):
        splits.setdefault(named[item.source], []).append(item)
    if "train" not in splits or (len(splits) < 2 and split in ("auto", "glow-like")):
        raise DataError(f"{len(items)} images leave a split empty", cure="give more images, or --split FILE")
    return dict(sorted(splits.items()))


def named_rule(items: Sequence[Item], split: str) -> str:
    """The rule that `split` stands for: source (its own), glow-like, celeba, random:SEED:FRACTION or file."""
    if any(item.split for item in items) and split != "celeba":
        if split != "auto":
            raise UsageError(f"the source brings its own splits, not {split}", cure="leave --split out")
        return "source"
    if split in ("auto", "glow-like"):
        return "glow-like"
    return split if split == "celeba" or split.startswith("random:") else "file"


def _named(items: list[Item], split: str) -> dict[str, str]:
    """Name the split of every source path."""
    kind, _, rest = split.partition(":")
    if split in ("auto", "glow-like"):
        return _share(items, "glow-like", 0.1)
    if kind == "celeba":
        return _celeba(items)
    if kind == "random":
        seed, _, fraction = rest.partition(":")
        try:
            share = float(fraction)
        except ValueError:
            share = -1.0
        if not seed.isdigit() or not 0 <= share < 1:
            raise UsageError(f"no split {split!r}", cure=CURE)
        return _share(items, f"random/{seed}", share)
    if Path(split).is_file():
        return _listed(items, Path(split))
    raise UsageError(f"no split {split!r}", cure=CURE)


def _share(items: list[Item], salt: str, fraction: float) -> dict[str, str]:
    validation = round(len(items) * fraction)
    ranked = sorted(items, key=_hashed(salt))
    return {item.source: "val" if rank < validation else "train" for rank, item in enumerate(ranked)}


def _celeba(items: list[Item]) -> dict[str, str]:
    """CelebA's own partition: train, val, test."""
    lost = [item.source for item in items if not item.partition]
    if lost:
        what = f"CelebA's partition of {len(lost)} images is not known, e.g. {lost[0]}"
        raise DataError(what, cure="it comes with CelebA-HQ-to-CelebA-mapping.txt or list_eval_partition.txt")
    return {item.source: item.partition for item in items}


def _listed(items: list[Item], path: Path) -> dict[str, str]:
    """Read a CSV image,split: every image once, by its path in the source or its name."""
    listed = read_pairs(path, "image", "split")
    odd = next((word for word in listed.values() if not word.isalnum()), None)
    if odd is not None:
        raise DataError(f"split {odd!r}, expected letters and digits", where=str(path))
    named = {item.source: listed.get(item.source) or listed.get(item.source.rpartition("/")[2], "") for item in items}
    lost = [source for source, split in named.items() if not split]
    if lost:
        raise DataError(f"{len(lost)} images without split, e.g. {lost[0]}", where=str(path), cure="list every image")
    return named


def _hashed(salt: str) -> Callable[[Item], bytes]:
    return lambda item: hashlib.sha256(f"{salt}/{item.source}".encode()).digest()
