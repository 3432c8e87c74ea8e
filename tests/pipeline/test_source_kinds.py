"""Every source kind, from its true layout into shards and back: the same pixels, attributes, classes and splits."""

from __future__ import annotations

import io
import json
import resource
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import DataError
from pipeline.in_place import survey
from pipeline.manifest import Manifest, open_manifest, write_manifest
from pipeline.order import Sequential
from pipeline.prepare import Options, build, make_plan
from pipeline.sources import open_source
from pipeline.sources.crc import crc32c
from pipeline.storage import canonical_json, open_storage
from pipeline.stream import Stream
from pipeline.verify import problems
from tests.pipeline import layouts
from tests.pipeline.layouts import LAYOUTS, Expected
from tests.pipeline.test_shards import png_of_16_bits

HQ = "CelebAMask-HQ"


def prepared(source: Path, dest: Path, options: Options, kind: str = "auto") -> Manifest:
    scratch = dest.with_name("scratch")
    scratch.mkdir(exist_ok=True)
    plan = make_plan(open_source(str(source), kind, scratch), options, map, report=lambda images: None)
    return build(plan, open_storage(str(dest)), mapped=map, restart=False, report=lambda images: None)


def read_back(manifest: Manifest, cache: Path) -> list[Expected]:
    """Every sample, through the stream."""
    found = []
    for name, summary in manifest.splits.items():
        split = manifest.split(name)
        order = Sequential([shard.samples for shard in split.shards])
        with Stream(manifest.storage, manifest, split, order, cache, 1 << 30) as stream:
            for batch in stream.batches(0, 16, stop=summary.samples):
                for row in range(len(batch)):
                    label = int(batch.labels[row])
                    found.append(
                        Expected(
                            batch.pixels[row].permute(1, 2, 0).numpy(),
                            tuple(batch.attributes[row].tolist()),
                            None if label < 0 else manifest.labels[label],
                            name,
                        )
                    )
    return found


def key(expected: Expected) -> tuple:
    return expected.pixels.tobytes(), expected.attributes, expected.label, expected.split


def same(found: list[Expected], expected: list[Expected]) -> None:
    assert sorted(map(key, found)) == sorted(map(key, expected))


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("encoding", ["png", "raw"])
def test_pictures_come_back_as_they_were(tmp_path: Path, name: str, encoding: str) -> None:
    kind, layout = LAYOUTS[name]
    expected = layout(tmp_path / "source", 600 if (name, encoding) == (HQ, "png") else 24)
    split = "celeba" if name == HQ else "auto"
    manifest = prepared(
        tmp_path / "source",
        tmp_path / "set",
        Options(samples_per_shard=len(expected) // 4, encoding=encoding, split=split),
    )
    assert manifest.origin.kind == kind
    assert (manifest.image.encoding, manifest.lossless) == (encoding, True)
    assert list(problems(manifest, deep=True)) == []
    found = read_back(manifest, tmp_path / "cache")
    if not expected[0].split:
        assert {one.split for one in found} == {"train", "val"}
        found = [replace(one, split="") for one in found]
    same(found, expected)


@pytest.mark.nightly
def test_thirty_thousand_images(tmp_path: Path) -> None:
    """CelebA-HQ's own number, at 32 px; docs/data-format.md has the time."""
    layouts.celebamask_hq(tmp_path / "source", 30_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    manifest = prepared(tmp_path / "source", tmp_path / "set", Options())
    assert {name: split.samples for name, split in manifest.splits.items()} == {"train": 27_000, "val": 3_000}
    assert {name: split.shards for name, split in manifest.splits.items()} == {"train": 53, "val": 6}
    assert list(problems(manifest, deep=True)) == []
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 << 10


@pytest.mark.parametrize("name", ["img2dataset", "ShardWriter"])
def test_shards_of_others_are_read_in_place_untouched(tmp_path: Path, name: str) -> None:
    expected = LAYOUTS[name][1](tmp_path, 24)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    storage = open_storage(str(tmp_path))
    root, splits = survey(storage, "auto", 0, "CC0-1.0", map, lambda images: None)
    manifest = write_manifest(storage, root, splits)
    assert {path: path.read_bytes() for path in before} == before
    assert open_manifest(storage) == manifest
    assert list(problems(manifest, deep=True)) == []
    same(read_back(manifest, tmp_path / "cache"), [replace(one, split=one.split or "train") for one in expected])


def test_our_own_shards_are_a_source(tmp_path: Path) -> None:
    expected = layouts.class_folders(tmp_path / "source", 24)
    for encoding in ("png", "raw"):
        first = prepared(tmp_path / "source", tmp_path / encoding, Options(samples_per_shard=7, encoding=encoding))
        again = prepared(tmp_path / encoding, tmp_path / f"{encoding}-again", Options(samples_per_shard=5))
        assert (first.attributes, first.labels) == (again.attributes, again.labels)
        same(read_back(again, tmp_path / "cache"), expected)


def spoil(path: Path, change: Callable[[bytearray], object]) -> None:
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def first(root: Path, pattern: str) -> Path:
    return sorted(root.rglob(pattern))[0]


def flipped(position: int) -> Callable[[bytearray], object]:
    def change(data: bytearray) -> None:
        data[position] ^= 1

    return change


def overstated(path: Path) -> None:
    """An npz whose labels say they are more than there are: what follows them in the file would be read."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, values in (("data", np.zeros((2, 3), np.uint8)), ("labels", np.ones(2, np.int64))):
            buffer = io.BytesIO()
            np.save(buffer, values)
            archive.writestr(f"{name}.npy", buffer.getvalue().replace(b"(2,)", b"(9,)"))


def renamed_column(path: Path) -> None:
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    pyarrow.parquet.write_table(table.rename_columns(["picture", *table.column_names[1:]]), path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("celeba-tfr", lambda r: spoil(first(r, "train-r05*"), flipped(500)), "crc32c .*, expected .*fetch the file"),
        ("celeba-tfr", lambda r: spoil(first(r, "train-r05*"), flipped(0)), "cut or damaged record at byte 0"),
        ("celeba-tfr", lambda r: spoil(first(r, "train-r05*"), lambda d: d.pop()), "cut or damaged record at byte"),
        ("celeba-tfr", lambda r: first(r, "train-r05*").unlink(), "2 of 3 files of train"),
        ("parquet", lambda r: spoil(first(r, "train-*"), lambda d: d.pop()), "not a parquet file"),
        ("CIFAR-10", lambda r: spoil(first(r, "data_batch_1.bin"), lambda d: d.pop()), "not rows of 3073"),
        ("CIFAR-10", lambda r: first(r, "data_batch_3.bin").unlink(), "no data_batch_3.bin"),
        ("npz", lambda r: spoil(first(r, "train*1.npz"), flipped(2000)), "not an npz batch.*CRC"),
        ("npz", lambda r: np.savez(r / "train_x.npz", data=np.zeros((2, 9)), labels=np.ones(2)), "expected uint8"),
        (
            "npz",
            lambda r: np.savez(r / "train_x.npz", data=np.array([{}, 1], object), labels=np.ones(2)),
            "not an npz batch .*object",
        ),
        ("npz", lambda r: np.savez(r / "train_x.npz", data=np.uint8(3), labels=np.int64(2)), "expected uint8"),
        ("npz", lambda r: overstated(r / "train_x.npz"), r"labels says \[9\], and is 144 bytes"),
        ("celeba-tfr", lambda r: first(r, "train-r05*").write_bytes(b""), "an empty file"),
        ("celeba-tfr", lambda r: first(r, "train-r05*").write_bytes(layouts.record(b"\x0b")), "no raw picture"),
        ("celeba-tfr", lambda r: first(r, "train-r05*").write_bytes(layouts.record(b"\xff" * 99)), "no raw picture"),
        ("celeba-tfr", lambda r: first(r, "train-r05*").write_bytes(layouts.record(b"\n\x7f")), "no raw picture"),
        ("parquet", lambda r: renamed_column(first(r, "train-*1-of*")), "columns .*'picture'.*, and train-00000.*same"),
        ("img2dataset", lambda r: spoil(first(r, "*.tar"), lambda d: d.clear()), "cut or damaged"),
        ("aligned CelebA", lambda r: first(r, "000003.png").unlink(), "1 rows without image"),
        ("aligned CelebA", lambda r: spoil(first(r, "list_eval*"), lambda d: d.extend(b"\n7 9")), r"FILE 0\|1\|2"),
    ],
)  # fmt: skip
def test_what_is_damaged_is_refused_by_name(
    tmp_path: Path, name: str, change: Callable[[Path], object], message: str
) -> None:
    LAYOUTS[name][1](tmp_path, 24)
    change(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        open_source(str(tmp_path), "auto", tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("tar", "suffix", "data", "message"),
    [
        ("train-9.tar", "json", b"[" * 200_000, r"train-9\.tar: sample 'x': the metadata is not JSON"),
        ("train-9.tar", "cls", b"1" * 5000, r"train-9\.tar: sample 'x': a class of 5000 letters"),
        ("train-9.tar", "json", b'{"label": "\\ud800"}', r"odd name '.ud800'; rename it"),
        ("train-9.tar", "cls", b"a\n|b", r"odd name 'a.n\|b'"),
        ("more-9.tar", "cls", b"1", r"more-9\.tar.*: in no split, and others are \(e\.g\. train-0\.tar"),
    ],
    ids=["nested", "digits", "surrogate", "newline", "stray"],
)
def test_odd_shards_of_others_are_a_line_on_both_roads(
    tmp_path: Path, tar: str, suffix: str, data: bytes, message: str
) -> None:
    for name, own in (("train-0.tar", b""), ("val-0.tar", b""), (tar, data)):
        with tarfile.open(tmp_path / name, "w") as archive:
            layouts.add(archive, "x.png", layouts.png(layouts.pixels_of(1)))
            layouts.add(archive, f"x.{suffix}", own)
    with pytest.raises(DataError, match=message):
        open_source(str(tmp_path))
    with pytest.raises(DataError, match=message):
        survey(open_storage(str(tmp_path)), "auto", 0, "", map, lambda images: None)


def test_a_parquet_file_in_no_split_is_refused(tmp_path: Path) -> None:
    layouts.parquet(tmp_path, 8)
    first(tmp_path, "train-*").rename(tmp_path / "data" / "extra.parquet")
    with pytest.raises(DataError, match=r"data/extra\.parquet/000000: in no split"):
        open_source(str(tmp_path), "auto", tmp_path)


def test_our_own_shards_with_classes_beyond_the_manifest_are_refused(tmp_path: Path) -> None:
    layouts.class_folders(tmp_path / "source", 12)
    prepared(tmp_path / "source", tmp_path / "set", Options())
    root = json.loads((tmp_path / "set/manifest.json").read_bytes())
    root["labels"].pop()
    for split in root["splits"].values():
        split["counts"]["labels"].pop()
    (tmp_path / "set/manifest.json").write_bytes(canonical_json(root))
    with pytest.raises(DataError, match=r"train-000000\.tar: row \d: label 1, the manifest names 1 classes"):
        open_source(str(tmp_path / "set"))


def test_only_celeba_knows_its_partition(tmp_path: Path) -> None:
    layouts.celebamask_hq(tmp_path / "source", 24)
    (tmp_path / "source" / "CelebA-HQ-to-CelebA-mapping.txt").unlink()
    with pytest.raises(DataError, match=r"partition of 24 images is not known.*mapping"):
        prepared(tmp_path / "source", tmp_path / "set", Options(split="celeba"))


def test_shards_that_no_batch_can_hold_are_not_taken_in_place(tmp_path: Path) -> None:
    layouts.shard_writer(tmp_path, 4)
    storage = open_storage(str(tmp_path))
    other = layouts.png(np.zeros((8, 8, 3), np.uint8))
    with tarfile.open(tmp_path / "train-000001.tar", "w") as archive:
        layouts.add(archive, "1.png", other)
    with pytest.raises(DataError, match=r"train-000001\.tar: holds png of 8 px.*data prepare SOURCE DEST --size"):
        survey(storage, "auto", 0, "", map, lambda images: None)
    with tarfile.open(tmp_path / "train-000001.tar", "w") as archive:
        layouts.add(archive, "1.png", layouts.png(layouts.pixels_of(1)))
        layouts.add(archive, "2.png", other)
    with pytest.raises(DataError, match=r"train-000001\.tar.*2: image is 8x8 RGB, expected 32x32 RGB"):
        survey(storage, "auto", 0, "", map, lambda images: None)
    for before in ([layouts.png(layouts.pixels_of(1))], []):
        with tarfile.open(tmp_path / "train-000001.tar", "w") as archive:
            for number, data in enumerate([*before, png_of_16_bits(32)]):
                layouts.add(archive, f"{number}.png", data)
        with pytest.raises(DataError, match=r"train-000001\.tar.*16 bits.*--convert"):
            survey(storage, "auto", 0, "", map, lambda images: None)


def test_crc32c_of_known_strings() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(bytes(range(256)) * 200) == layouts.crc32c(bytes(range(256)) * 200)


@given(st.binary(max_size=9000))
def test_crc32c_is_the_plain_loop(data: bytes) -> None:
    assert crc32c(data) == layouts.crc32c(data)
