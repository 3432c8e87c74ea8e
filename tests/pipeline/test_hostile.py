"""Archives and pictures made to harm: refused clearly, without a crash, a hang or a growth of memory."""

from __future__ import annotations

import gc
import io
import resource
import tarfile
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.errors import DataError
from pipeline.shards import Foreign, decode, open_shard
from tests.pipeline.test_shards import PNG, png_that_claims, shard

FOREIGN = Foreign(attributes=("a",), labels=("x",))
GROWTH_MIB, SECONDS = 50, 5.0
CPU_SECONDS = 1.0
"""Of the process, which a busy machine does not stretch as it does the clock."""


def header(name: bytes, size: bytes = b"00000000000", kind: bytes = b"0", link: bytes = b"") -> bytes:
    """A ustar header with a right checksum, whatever its fields say."""
    block = bytearray(512)
    fields = ((0, name[:100]), (100, b"0000444\0"), (124, size[:12]), (136, b"0" * 11), (148, b" " * 8), (156, kind))
    for place, value in (*fields, (157, link[:100]), (257, b"ustar\x0000")):
        block[place : place + len(value)] = value
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def archive(*blocks: bytes) -> bytes:
    data = b"".join(block + bytes(-len(block) % 512) for block in blocks) + bytes(1024)
    return data + bytes(-len(data) % 10240)


def pax(*records: bytes, size: int = 0) -> bytes:
    body = b"".join(b"%d %s\n" % (len(record) + 4, record) for record in records)
    return header(b"p", b"%011o" % (size or len(body)), b"x") + body + bytes(-len(body) % 512)


JSON = header(b"1.json", b"00000000002") + b"{}" + bytes(510)
IMAGE = header(b"1.png", b"%011o" % len(PNG)) + PNG
BASE_256 = b"\x80" + bytes(7)

HOSTILE = {
    "leaves the folder": header(b"../../etc/x.png"),
    "is absolute": header(b"/etc/x.png"),
    "leaves it midway": header(b"a/../../x.png"),
    "backslashes": header(b"..\\x.png"),
    "control characters": header(b"a\x1b[2J.png"),
    "not UTF-8": header(b"\xff\xfe.png"),
    "no name": header(b""),
    "symbolic link": header(b"1.png", kind=b"2", link=b"/etc/passwd"),
    "hard link": header(b"1.png", kind=b"1", link=b"1.json"),
    "character device": header(b"1.png", kind=b"3"),
    "block device": header(b"1.png", kind=b"4"),
    "pipe": header(b"1.png", kind=b"6"),
    "contiguous": header(b"1.png", kind=b"7"),
    "sparse": header(b"1.png", kind=b"S"),
    "long name": header(b"././@LongLink", b"00000001000", b"L") + b"a" * 512,
    "global pax": header(b"g", b"00000000000", b"g"),
    "negative size": header(b"1.png", b"\xff" * 12),
    "size of 2^63": header(b"1.png", b"\x80" + bytes(3) + b"\x7f" + b"\xff" * 7),
    "size beyond the end": header(b"1.png", b"77777777777"),
    "size of no number": header(b"1.png", b"-0000000001"),
    "size with a sign": header(b"1.png", b"+0000000001"),
    "pax size": pax(b"size=99999999999999") + IMAGE,
    "pax sparse": pax(b"GNU.sparse.realsize=99999999999999") + IMAGE,
    "pax path out": pax(b"path=../../x.png") + IMAGE,
    "pax of a gigabyte": pax(b"path=x", size=1 << 30) + IMAGE,
    "pax that loops": header(b"p", b"00000000010", b"x") + b"0 path=\n" + bytes(504) + IMAGE,
    "pax without end": header(b"p", b"00000000010", b"x") + b"99 path=" + bytes(504) + IMAGE,
    "dotted key": JSON + header(b"1.seg.png", b"%011o" % len(PNG)) + PNG,
    "the same twice": JSON + JSON,
    "a key again": JSON + IMAGE + bytes(-len(IMAGE) % 512) + header(b"2.json") + header(b"1.cls"),
    "two images": JSON + IMAGE + bytes(-len(IMAGE) % 512) + header(b"1.jpg"),
}


@pytest.mark.parametrize("foreign", [None, FOREIGN])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archives_are_refused(tmp_path: Path, name: str, foreign: Foreign | None) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(archive(HOSTILE[name]))
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=r"x\.tar") as caught:
        open_shard(path, 1, foreign=foreign)
    assert str(caught.value).isprintable()
    assert time.monotonic() - start < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GROWTH_MIB << 10


def test_a_sparse_file_of_a_terabyte_costs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(archive(JSON, header(b"1.png", b"77777777777")))
    with path.open("r+b") as file:
        file.truncate(1 << 33)
    start = time.monotonic()
    with pytest.raises(DataError, match="cut or damaged"):
        open_shard(path, 1)
    assert time.monotonic() - start < SECONDS


def bomb_in_text() -> bytes:
    """A PNG whose compressed text unpacks to 1 GB."""
    packer = zlib.compressobj(9)
    packed = b"".join([packer.compress(bytes(1 << 20)) for _ in range(64)]) + packer.flush()
    chunk = b"zTXt" + b"k\0\0" + packed
    return PNG[:33] + (len(chunk) - 4).to_bytes(4) + chunk + zlib.crc32(chunk).to_bytes(4) + PNG[33:]


def fits() -> bytes:
    """A FITS file, whatever its name."""
    return b"SIMPLE  =                    T".ljust(80) + b"BITPIX  =                    8".ljust(80) + bytes(2720)


@pytest.mark.parametrize(
    "data",
    [
        fits(),
        png_that_claims(2, 2**31 - 1),
        png_that_claims(2**31 - 1, 2**31 - 1),
        bomb_in_text()[:-20],
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 2 2\n",
        b"RIFF\xff\xff\xff\xffWEBPVP8X",
        b"\xff\xd8\xff" + b"\xff" * 4096,
    ],
)
def test_hostile_pictures_are_refused(data: bytes) -> None:
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=r"does not decode|expected"):
        decode(data, 2, 3)
    assert time.monotonic() - start < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GROWTH_MIB << 10


GOOD = shard(2)
edits = st.lists(
    st.tuples(
        st.integers(0, 4607), st.one_of(st.binary(min_size=1, max_size=12), st.sampled_from([bytes(512), b"\xff" * 12]))
    ),
    min_size=1,
    max_size=5,
)


def mended(data: bytearray) -> bytes:
    """Right checksums over wrong fields, so that the checks behind them are reached."""
    for block in range(0, 4096, 1024):
        if data[block + 257 : block + 262] == b"ustar":
            data[block + 148 : block + 156] = b" " * 8
            data[block + 148 : block + 156] = b"%06o\0 " % sum(data[block : block + 512])
    return bytes(data)


def refused_or_read(changes: list[tuple[int, bytes]], cut: int, mend: bool) -> None:
    """A damaged shard is read or refused, in time and in memory."""
    start, spent, before = time.monotonic(), time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read_or_refuse(changes, cut, mend)
    assert time.process_time() - spent < CPU_SECONDS
    assert time.monotonic() - start < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GROWTH_MIB << 10


def read_or_refuse(changes: list[tuple[int, bytes]], cut: int, mend: bool) -> None:
    data = bytearray(GOOD[: len(GOOD) - cut])
    for place, value in changes:
        data[place : place + len(value)] = value
    with tempfile.NamedTemporaryFile(suffix=".tar") as file:
        file.write(mended(data) if mend else data)
        file.flush()
        for foreign in (None, FOREIGN):
            try:
                with open_shard(Path(file.name), 2, foreign=foreign) as index:
                    for row in range(len(index)):
                        decode(index.read(row)[0], 2, 3)
            except DataError as error:
                assert str(error).isprintable()  # noqa: PT017


@settings(max_examples=2000, suppress_health_check=list(HealthCheck))
@given(edits, st.sampled_from([0, 0, 0, 1, 512, 5000]), st.booleans())
def test_two_thousand_tars_are_read_or_refused(changes: list[tuple[int, bytes]], cut: int, mend: bool) -> None:
    refused_or_read(changes, cut, mend)


@pytest.mark.nightly
def test_a_hundred_thousand_tars_are_read_or_refused() -> None:
    """None takes long, none takes memory, and after the first tenth, which warms up, nothing stays behind."""
    resident = []
    for part in range(10):

        @seed(part)
        @settings(max_examples=10_000, database=None, suppress_health_check=list(HealthCheck))
        @given(edits, st.sampled_from([0, 0, 0, 1, 512, 5000]), st.booleans())
        def tenth(changes: list[tuple[int, bytes]], cut: int, mend: bool) -> None:
            refused_or_read(changes, cut, mend)

        tenth()
        gc.collect()
        resident.append(psutil.Process().memory_info().rss >> 20)
    assert max(resident) - resident[0] < GROWTH_MIB, resident


def test_gnu_tar_writes_what_we_take_from_others(tmp_path: Path) -> None:
    """Folders and names that `tar` writes of its own."""
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as out:
        folder = tarfile.TarInfo("./faces")
        folder.type = tarfile.DIRTYPE
        out.addfile(folder)
        buffer = io.BytesIO()
        Image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(buffer, format="PNG")
        member = tarfile.TarInfo("./faces/1.png")
        member.size = len(buffer.getvalue())
        out.addfile(member, io.BytesIO(buffer.getvalue()))
    with open_shard(path, 1, foreign=Foreign(attributes=(), labels=())) as index:
        assert decode(index.read(0)[0], 2, 3).shape == (3, 2, 2)
    with pytest.raises(DataError, match="type b'5'"):
        open_shard(path, 1)
