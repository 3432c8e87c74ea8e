"""Shards: golden bytes, standard readers, and the strictness standard readers lack."""

from __future__ import annotations

import base64
import io
import json
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import DataError
from pipeline.shards import Record, decode, encode_png, open_shard, pack
from pipeline.storage import sha256_hex

# A 2x2 RGB PNG as bytes, so that the golden shard does not depend on Pillow or zlib.
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAIAAAACCAIAAAD91JpzAAAAFklEQVR4nGP4z8DA8J+BkYHh////DAAe9gT9Ce00PgAAAABJRU5ErkJggg=="
)
GOLDEN = "fa225988a29c9b0786ceeb44f3398581d36ee5aedbf7c8da0ad55584ffc905f1"


def record(number: int, image: bytes = PNG) -> Record:
    return Record(
        key=f"{number:08d}",
        image=image,
        attributes=(1, 0, -1),
        label=None if number % 2 else number,
        source=f"Bilder/ä {number}.jpg",
        source_sha256=f"{number:064x}",
    )


def shard(samples: int) -> bytes:
    return pack(record(number) for number in range(samples))


def test_golden_bytes() -> None:
    """These bytes are the format: a change here is a new schema."""
    data = shard(3)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        members = archive.getmembers()
        meta = archive.extractfile(members[0])
        assert meta is not None
        text = meta.read().decode()
    assert text == f'{{"attributes":[1,0,-1],"label":0,"source":"Bilder/ä 0.jpg","source_sha256":"{0:064x}"}}\n'
    assert [m.name for m in members] == [f"{n:08d}.{field}" for n in range(3) for field in ("json", "png")]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o444)}
    assert len(data) == 10240
    assert sha256_hex(data) == GOLDEN


def test_a_round_trip(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for channels, shape in ((3, (16, 16, 3)), (1, (16, 16))):
        pixels = [rng.integers(0, 256, shape, dtype=np.uint8) for _ in range(20)]
        path = tmp_path / "x.tar"
        path.write_bytes(pack(record(number, encode_png(image)) for number, image in enumerate(pixels)))
        with open_shard(path, 20) as index:
            path.unlink()
            for row in (7, 0, 19):
                image, meta = index.read(row)
                expected = pixels[row].reshape(16, 16, channels).transpose(2, 0, 1)
                assert np.array_equal(decode(image, 16, channels), expected)
                assert meta["source"] == f"Bilder/ä {row}.jpg"


READER = """
import json, sys, webdataset
samples = webdataset.WebDataset(sys.argv[1], shardshuffle=False, empty_check=False).decode("rgb8")
print(json.dumps([[s["__key__"], s["json"]["attributes"], s["png"].tolist()] for s in samples]))
"""


def test_webdataset_reads_our_shards(tmp_path: Path) -> None:
    # In its own process: webdataset leaves closing its files to the garbage collector.
    path = tmp_path / "train-000000.tar"
    path.write_bytes(shard(5))
    done = subprocess.run([sys.executable, "-c", READER, path], capture_output=True, check=True)
    pixels = [[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]]
    assert json.loads(done.stdout) == [[f"{number:08d}", [1, 0, -1], pixels] for number in range(5)]


def test_tar_lists_and_unpacks_our_shards(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(shard(2))
    done = subprocess.run(["tar", "tf", path], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["00000000.json", "00000000.png", "00000001.json", "00000001.png"]
    assert done.stderr == ""
    subprocess.run(["tar", "xf", path, "-C", tmp_path], check=True)
    assert (tmp_path / "00000001.png").read_bytes() == PNG
    assert json.loads((tmp_path / "00000001.json").read_bytes())["attributes"] == [1, 0, -1]


@pytest.mark.parametrize("keys", [("1", "1"), ("1", "2", "1"), ("1.2",), ("",)])
def test_duplicate_and_dotted_keys_are_not_written(keys: tuple[str, ...]) -> None:
    records = [Record(**{**vars(record(0)), "key": key}) for key in keys]
    with pytest.raises(DataError, match="duplicate or dotted key"):
        pack(records)


@pytest.mark.parametrize("length", [0, 100, 512, 700, 1024, 3072, 6144, 9216, 10239])
def test_a_cut_shard_is_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(shard(3)[:length])
    with pytest.raises(DataError, match=r"train-7\.tar: .*fetch the shard again"):
        open_shard(path, 3, "train-7.tar")


@pytest.mark.parametrize("header", range(6))
@pytest.mark.parametrize("position", [0, 100, 130, 150, 156, 257])
def test_a_flipped_header_byte_is_refused(tmp_path: Path, header: int, position: int) -> None:
    data = bytearray(shard(3))
    data[1024 * header + position] ^= 0x41
    path = tmp_path / "x.tar"
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"x\.tar"):
        open_shard(path, 3)


@pytest.mark.parametrize("header", range(6))
def test_a_zeroed_header_is_refused(tmp_path: Path, header: int) -> None:
    data = bytearray(shard(3))
    data[1024 * header : 1024 * header + 512] = bytes(512)
    path = tmp_path / "x.tar"
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"cut or damaged|not a tar archive"):
        open_shard(path, 3)


def rewritten(change: Callable[[list[tuple[str, bytes]]], list[tuple[str, bytes]]]) -> bytes:
    """A well-formed archive whose members are changed."""
    with tarfile.open(fileobj=io.BytesIO(shard(3))) as archive:
        members = [(m.name, (archive.extractfile(m) or io.BytesIO()).read()) for m in archive.getmembers()]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in change(members):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m[:4], "2 samples, expected 3"),
        (lambda m: [*m, ("00000003.json", b"{}"), ("00000003.png", PNG)], "4 samples, expected 3"),
        (lambda m: m[:5], "sample '00000002' has .'json'."),
        (lambda m: m[1:], "sample '00000000' has .'png'."),
        (lambda m: m + m[:1], "duplicate key"),
        (lambda m: m[:1] + m, "duplicate key"),
        (lambda m: [*m[:5], ("00000002.seg.png", PNG)], "must not hold dots"),
        (lambda m: [*m, ("00000002.cls", b"1")], "has .'cls', 'json', 'png'."),
        (lambda m: [*m, ("00000002.jpg", PNG)], "has .'jpg', 'json', 'png'."),
    ],
)
def test_wrong_members_are_refused(tmp_path: Path, change: Callable, message: str) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(rewritten(change))
    with pytest.raises(DataError, match=message):
        open_shard(path, 3)


def described(attributes: object, label: object = None) -> bytes:
    return json.dumps({"attributes": attributes, "label": label, "source": "a", "source_sha256": "b"}).encode()


@pytest.mark.parametrize(
    "meta",
    [
        *(b"{", b"[]", b"{}", b"[" * 200_000, json.dumps({"attributes": [], "label": 1}).encode()),
        *(described([[1]]), described([2]), described([1.0]), described(7), described([1], [2]), described([1], 1.5)),
    ],
    ids=lambda meta: meta[:40],
)
def test_wrong_metadata_is_refused(tmp_path: Path, meta: bytes) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(rewritten(lambda m: [(m[0][0], meta), *m[1:]]))
    with open_shard(path, 3) as index, pytest.raises(DataError, match="row 0: "):
        index.read(0)


def encoded(pixels: np.ndarray, **settings: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, **settings)
    return buffer.getvalue()


def png_that_claims(width: int, height: int) -> bytes:
    """A tiny file that says it is huge."""
    return PNG[:8] + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + PNG[33:]


def png_of_16_bits(side: int) -> bytes:
    """A coloured PNG of 16 bits a channel, which Pillow opens as RGB."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 16, 2, 0, 0, 0))
    return PNG[:8] + header + chunk(b"IDAT", zlib.compress(bytes(side * (1 + 6 * side)))) + chunk(b"IEND", b"")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


GREY = np.zeros((4, 4), dtype=np.uint8)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "does not decode"),
        (b"no image", "does not decode"),
        (encoded(GREY, format="GIF"), "does not decode"),
        (encoded(GREY, format="TIFF"), "does not decode"),
        (encoded(GREY, format="PNG"), "4x4 L, expected 4x4 RGB"),
        (encoded(np.zeros((4, 4, 4), np.uint8), format="PNG"), "4x4 RGBA, expected"),
        (encoded(np.zeros((5, 4, 3), np.uint8), format="PNG"), "4x5 RGB, expected"),
        (encoded(np.zeros((4, 4, 3), np.uint8), format="PNG")[:-30], "does not decode"),
        (png_that_claims(4, 100_000_000), "4x100000000 RGB, expected|does not decode"),
        (png_that_claims(4, 4), "does not decode"),
        (png_of_16_bits(4), r"16 bits a channel, expected 8.*data prepare SOURCE DEST --convert"),
    ],
)
def test_images_that_are_not_what_they_should_be_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        decode(data, 4, 3)
