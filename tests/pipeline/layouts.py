"""Sources in the layout they are distributed in, written here without the code that reads them."""

from __future__ import annotations

import io
import json
import struct
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

NAMES = ("Smiling", "Young", "Bangs")


@dataclass(frozen=True)
class Expected:
    """What must come back of one picture."""

    pixels: np.ndarray
    attributes: tuple[int, ...] = ()
    label: str | None = None
    split: str = ""


Layout = Callable[[Path, int], list[Expected]]


def pixels_of(number: int, size: int = 32, channels: int = 3) -> np.ndarray:
    """A picture that no other number has."""
    rng = np.random.default_rng(number)
    return rng.integers(0, 256, (size, size, channels), dtype=np.uint8)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(buffer, format="PNG")
    return buffer.getvalue()


def signs(number: int, count: int = 3) -> tuple[int, ...]:
    return tuple(1 if (number >> bit) & 1 else -1 for bit in range(count))


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def class_folders(root: Path, count: int) -> list[Expected]:
    """SPLIT/CLASS/NAME.png with a parquet table of attributes."""
    import pyarrow
    import pyarrow.parquet

    expected, rows = [], []
    for number in range(count):
        split, label = ("train", "val")[number % 5 == 0], ("cat", "dog")[number % 2]
        file = f"{split}_64x64/{label}/{number}.png"
        write(root / file, png(pixels_of(number)))
        rows.append({"file_name": file, **dict(zip(NAMES, signs(number), strict=True))})
        expected.append(Expected(pixels_of(number), signs(number), label, split))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), root / "metadata.parquet")
    return expected


def attribute_table(rows: dict[str, tuple[int, ...]]) -> bytes:
    lines = [f"{name}  " + " ".join(f"{value:2d}" for value in values) for name, values in rows.items()]
    return "\n".join([str(len(rows)), " ".join(NAMES), *lines, ""]).encode()


ORIGINALS = (5, 170_000, 162_769, 162_770, 182_637, 200_000, 1)
"""CelebA numbers, from 0, on both sides of its partition's borders."""


def celebamask_hq(root: Path, count: int) -> list[Expected]:
    expected, mapping = [], ["idx\torig_idx\torig_file"]
    for number in range(count):
        write(root / f"CelebA-HQ-img/{number}.png", png(pixels_of(number)))
        original = ORIGINALS[number % len(ORIGINALS)]
        mapping.append(f"{number:8d}{original:16d}    {original + 1:06d}.jpg")
        split = "train" if original < 162_770 else "val" if original < 182_637 else "test"
        expected.append(Expected(pixels_of(number), signs(number), None, split))
    table = attribute_table({f"{number}.png": signs(number) for number in range(count)})
    write(root / "CelebAMask-HQ-attribute-anno.txt", table)
    write(root / "CelebA-HQ-to-CelebA-mapping.txt", "\n".join(mapping).encode())
    return expected


def aligned_celeba(root: Path, count: int) -> list[Expected]:
    """As shared: Anno/, Eval/, Img/; png here, jpg in the table, as in the lossless variant."""
    expected, partition = [], []
    for number in range(count):
        write(root / f"Img/img_align_celeba/{number + 1:06d}.png", png(pixels_of(number)))
        which = number % 3
        partition.append(f"{number + 1:06d}.jpg {which}")
        expected.append(Expected(pixels_of(number), signs(number), None, ("train", "val", "test")[which]))
    table = attribute_table({f"{number + 1:06d}.jpg": signs(number) for number in range(count)})
    write(root / "Anno/list_attr_celeba.txt", table)
    write(root / "Eval/list_eval_partition.txt", "\n".join(partition).encode())
    return expected


def crc32c(data: bytes) -> int:
    """Bit by bit, as the polynomial says."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def varint(number: int) -> bytes:
    number &= (1 << 64) - 1
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def field(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def example(pixels: np.ndarray, label: int, attributes: Iterable[int]) -> bytes:
    def integers(values: Iterable[int]) -> bytes:
        return field(3, field(1, b"".join(map(varint, values))))

    features = {
        "shape": integers(pixels.shape),
        "data": field(1, field(1, pixels.tobytes())),
        "label": integers([label]),
        "attr": integers(attributes),
    }
    entries = (field(1, field(1, name.encode()) + field(2, value)) for name, value in features.items())
    return field(1, b"".join(entries))


def record(data: bytes) -> bytes:
    def mask(crc: int) -> bytes:
        return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)

    head = struct.pack("<Q", len(data))
    return head + mask(crc32c(head)) + data + mask(crc32c(data))


def celeba_tfr(root: Path, count: int) -> list[Expected]:
    """train/train-r05-s-*-of-0003.tfrecords and validation/; a coarser level beside them."""
    files: dict[str, list[bytes]] = {"train/train-r04-s-0000-of-0001.tfrecords": [], "LICENSE.md": []}
    expected = []
    for number in range(count):
        held_out, attributes = number % 4 == 0, tuple(signs(number, 40))
        folder, total = ("validation", 1) if held_out else ("train", 3)
        name = f"{folder}/{folder}-r05-s-{number % 3 if total == 3 else 0:04d}-of-{total:04d}.tfrecords"
        files.setdefault(name, []).append(record(example(pixels_of(number), 0, attributes)))
        expected.append(Expected(pixels_of(number), attributes, None, "val" if held_out else "train"))
    for name, records in files.items():
        write(root / name, b"".join(records))
    return expected


def parquet(root: Path, count: int) -> list[Expected]:
    """data/SPLIT-00000-of-00002-HASH.parquet as the `datasets` library writes them."""
    import pyarrow
    import pyarrow.parquet

    names = ["cat", "dog"]
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    struct_type = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    schema = pyarrow.schema(
        [("image", struct_type), ("celeb_id", pyarrow.int64()), ("label", pyarrow.int64())]
        + [(name, pyarrow.bool_()) for name in NAMES],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    rows: dict[str, list[dict[str, Any]]] = {}
    expected = []
    for number in range(count):
        split, part = ("train", number % 2) if number % 4 else ("validation", 0)
        row = dict(zip(NAMES, (sign == 1 for sign in signs(number)), strict=True))
        image = {"bytes": png(pixels_of(number)), "path": f"{number}.png"}
        name = f"{split}-{part:05d}-of-00002-0123456789abcdef.parquet"
        rows.setdefault(name, []).append({"image": image, "celeb_id": 2 + number, "label": number % 2, **row})
        expected.append(Expected(pixels_of(number), signs(number), names[number % 2], ("val", "train")[number % 4 > 0]))
    (root / "data").mkdir(parents=True)
    for name, own in rows.items():
        table = pyarrow.Table.from_pylist(own, schema=schema)
        pyarrow.parquet.write_table(table, root / "data" / name, row_group_size=3)
    return expected


def cifar10(root: Path, count: int) -> list[Expected]:
    classes = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    files = {f"data_batch_{number}.bin": b"" for number in range(1, 6)} | {"test_batch.bin": b""}
    expected = []
    for number in range(max(count, 12)):
        name = list(files)[number % 6]
        files[name] += bytes([number % 10]) + pixels_of(number).transpose(2, 0, 1).tobytes()
        split = "test" if name.startswith("test") else "train"
        expected.append(Expected(pixels_of(number), (), classes[number % 10], split))
    for name, data in files.items():
        write(root / "cifar-10-batches-bin" / name, data)
    write(root / "cifar-10-batches-bin/batches.meta.txt", "\n".join([*classes, "", ""]).encode())
    return expected


def npz(root: Path, count: int, save: Callable[..., None] = np.savez) -> list[Expected]:
    """train_data_batch_1.npz, _2 and val_data.npz: data [n, 3072], labels from 1 on, mean."""
    files: dict[str, list[int]] = {}
    expected = []
    for number in range(count):
        name = ("val_data", "train_data_batch_1", "train_data_batch_2")[number % 3]
        files.setdefault(name, []).append(number)
        expected.append(Expected(pixels_of(number), (), str(number % 11 + 1), "train" if number % 3 else "val"))
    for name, numbers in files.items():
        root.mkdir(parents=True, exist_ok=True)
        data = np.stack([pixels_of(number).transpose(2, 0, 1).reshape(-1) for number in numbers])
        labels = np.array([number % 11 + 1 for number in numbers])
        save(root / f"{name}.npz", data=data, labels=labels, mean=data.mean(0))
    return expected


def compressed_npz(root: Path, count: int) -> list[Expected]:
    return npz(root, count, np.savez_compressed)


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mtime = len(data), 1234567890.125  # a broken second becomes a pax header
    archive.addfile(member, io.BytesIO(data))


def img2dataset(root: Path, count: int) -> list[Expected]:
    """00000.tar ...: KEY.png, KEY.json with much in it, KEY.txt; parquet and stats beside them."""
    root.mkdir(parents=True, exist_ok=True)
    expected = []
    for part in range(3):
        with tarfile.open(root / f"{part:05d}.tar", "w", format=tarfile.PAX_FORMAT) as archive:
            for number in range(part, count, 3):
                key = f"{part:05d}{number:04d}"
                row = {"caption": f"face {number}", "url": "http://example.org/1", "key": key, "width": 32}
                row |= {
                    "width": 32,
                    "height": 32,
                    "exif": "{}",
                    "smiling": bool(number & 1),
                    "young": (None, 1)[number & 1],
                }
                add(archive, f"{key}.json", json.dumps(row).encode())
                add(archive, f"{key}.png", png(pixels_of(number)))
                add(archive, f"{key}.txt", b"face")
                expected.append(Expected(pixels_of(number), (1 if number & 1 else -1, number & 1)))
        write(root / f"{part:05d}_stats.json", b"{}")
    return expected


def shard_writer(root: Path, count: int) -> list[Expected]:
    """What `webdataset.ShardWriter` makes of {"png", "cls"}."""
    from webdataset.writer import ShardWriter

    root.mkdir(parents=True, exist_ok=True)
    expected = []
    for split in ("train", "val"):
        with ShardWriter(str(root / f"{split}-%06d.tar"), maxcount=1000, verbose=0) as writer:
            for number in range(split == "val", count, 2):
                writer.write({"__key__": f"faces/{number:05d}", "png": png(pixels_of(number)), "cls": number % 11})
                expected.append(Expected(pixels_of(number), (), str(number % 11), split))
    return expected


LAYOUTS: dict[str, tuple[str, Layout]] = {
    "class folders": ("folder", class_folders),
    "CelebAMask-HQ": ("celebamask-hq", celebamask_hq),
    "aligned CelebA": ("celeba", aligned_celeba),
    "celeba-tfr": ("celeba-tfr", celeba_tfr),
    "parquet": ("parquet", parquet),
    "CIFAR-10": ("cifar10", cifar10),
    "npz": ("npz", npz),
    "compressed npz": ("npz", compressed_npz),
    "img2dataset": ("webdataset", img2dataset),
    "ShardWriter": ("webdataset", shard_writer),
}
"""By name: the kind it is recognised as, and who writes it."""
