"""Sources: what people have is recognised, and what does not fit together is refused by name."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.errors import DataError, UsageError
from pipeline.pictures import Target, inspect, load
from pipeline.sources import Item, open_source
from pipeline.splits import assign, subset
from tests.pipeline.test_shards import chunk, png_that_claims


def picture(path: Path, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, "white" if mode not in ("I;16",) else 40000).save(path)
    return path


def folder_of(root: Path, *names: str) -> Path:
    for name in names:
        picture(root / name)
    return root


def celeba(root: Path, rows: str = "", images: int = 3) -> Path:
    folder_of(root / "CelebA-HQ-img", *(f"{number}.jpg" for number in range(images)))
    default = "3\nSmiling Young\n0.jpg  1 -1\n1.jpg -1 -1\n2.jpg  1  1\n"
    (root / "CelebAMask-HQ-attribute-anno.txt").write_bytes((rows or default).encode())
    return root


def test_a_flat_folder(tmp_path: Path) -> None:
    source = open_source(str(folder_of(tmp_path, "b.png", "a.JPG", ".hidden.png", ".cache/x.png")))
    assert (source.kind, source.attributes, source.labels) == ("folder", (), ())
    assert source.items == (
        Item(file=tmp_path / "a.JPG", source="a.JPG"),
        Item(file=tmp_path / "b.png", source="b.png"),
    )
    assert (source.license, source.redistribution) == ("unknown", False)


def test_class_folders_and_splits(tmp_path: Path) -> None:
    folder_of(tmp_path, "train/cat/deep/1.png", "train/dog/2.png", "validation/cat/3.png")
    (tmp_path / "notes.txt").write_text("x")
    source = open_source(str(tmp_path))
    assert source.labels == ("cat", "dog")
    found = [(item.source, item.label, item.split) for item in source.items]
    assert found == [
        ("train/cat/deep/1.png", "cat", "train"),
        ("train/dog/2.png", "dog", "train"),
        ("validation/cat/3.png", "cat", "val"),
    ]
    assert source.notes == ("left aside 1 files that are not images, e.g. notes.txt",)


def test_a_csv_of_attributes(tmp_path: Path) -> None:
    folder_of(tmp_path, "a.png", "x/b.png")
    (tmp_path / "attributes.csv").write_text("file_name,Smiling,Old,label\na.png,1,0,cat\nx/b.png,0,,\n")
    source = open_source(str(tmp_path))
    assert source.attributes == ("Smiling", "Old")
    assert [(item.attributes, item.label) for item in source.items] == [((1, -1), "cat"), ((-1, 0), "x")]


def test_a_jsonl_of_signed_attributes(tmp_path: Path) -> None:
    folder_of(tmp_path, "a.png", "b.png")
    rows = [{"image": "a.png", "Smiling": 1, "Old": 0}, {"image": "b.png", "Smiling": -1, "Old": True, "Hat": 1}]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = open_source(str(tmp_path))
    assert source.attributes == ("Smiling", "Old", "Hat")
    assert [item.attributes for item in source.items] == [(1, 0, 0), (-1, 1, 1)]


@pytest.mark.parametrize("nested", [False, True])
def test_celebamask_hq(tmp_path: Path, nested: bool) -> None:
    celeba(tmp_path / "CelebAMask-HQ" if nested else tmp_path)
    source = open_source(str(tmp_path))
    assert (source.kind, source.attributes) == ("celebamask-hq", ("Smiling", "Young"))
    assert [(item.source, item.attributes) for item in source.items] == [
        ("CelebA-HQ-img/0.jpg", (1, -1)),
        ("CelebA-HQ-img/1.jpg", (-1, -1)),
        ("CelebA-HQ-img/2.jpg", (1, 1)),
    ]
    assert "non-commercial" in source.license
    assert not source.redistribution


def test_celebamask_hq_as_seen_in_the_wild(tmp_path: Path) -> None:
    celeba(tmp_path, "\ufeff3\r\nSmiling Young \r\n2.jpg   1  1\r\n\r\n0.jpg  1 -1 \r\n1.jpg -1 -1")
    assert [item.attributes for item in open_source(str(tmp_path)).items] == [(1, -1), (-1, -1), (1, 1)]


def test_celebamask_hq_with_labels(tmp_path: Path) -> None:
    celeba(tmp_path)
    (tmp_path / "labels.csv").write_text("image,label\n0.jpg,day\n1.jpg,night\n2.jpg,day\n")
    source = open_source(str(tmp_path))
    assert source.labels == ("day", "night")
    assert [item.label for item in source.items] == ["day", "night", "day"]
    (tmp_path / "labels.csv").write_text("image,label\n0.jpg,day\n1.jpg,night\n")
    with pytest.raises(DataError, match=r"labels\.csv: 0 rows without image, 1 images without row: no row for 2\.jpg"):
        open_source(str(tmp_path))


TABLE = "Smiling Young\n0.jpg 1 -1\n1.jpg -1 -1\n"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("3\n" + TABLE, "2 rows, its first line says 3"),
        ("2\n" + TABLE, r"1 images without row: no row for 2\.jpg"),
        ("4\n" + TABLE + "2.jpg 1 1\n3.jpg 1 1\n", r"1 rows without image, 0 images without row: no image 3\.jpg"),
        ("3\n" + TABLE + "2.jpg 1\n", r"row 3 \(2\.jpg\): 1 values, expected 2"),
        ("3\n" + TABLE + "2.jpg 1 2\n", r"row 3 \(2\.jpg\)"),
        ("3\n" + TABLE + "1.jpg 1 1\n", r"row 3 \(1\.jpg\)"),
        ("Smiling Young\n", "expected a count"),
        ("3\nSmiling Smiling\n0.jpg 1 1\n1.jpg 1 1\n2.jpg 1 1\n", "an attribute is named twice"),
    ],
)
def test_broken_celeba_tables_are_refused(tmp_path: Path, rows: str, message: str) -> None:
    celeba(tmp_path, rows)
    with pytest.raises(DataError, match=message) as caught:
        open_source(str(tmp_path))
    assert "CelebAMask-HQ-attribute-anno.txt" in str(caught.value)


def add(name: str, text: str) -> Callable[[Path], object]:
    return lambda root: (root / name).write_text(text)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda root: None, "no images here"),
        (lambda root: folder_of(root, "train/a.png", "stray.png"), r"stray\.png: in no split, and others are"),
        (lambda root: folder_of(root, "a.png", "b\udce9.png"), r"odd name 'b.udce9\.png'; rename it"),
        (lambda root: folder_of(root, "CelebA-HQ-img/0.jpg"), "CelebAMask-HQ is not complete"),
        (lambda root: (folder_of(root, "a.png"), add("attributes.csv", "file,A\na.png,1,2\n")(root)), "more or fewer"),
        (lambda root: (folder_of(root, "a.png"), add("attributes.csv", "file,A\na.png,7\n")(root)), "'7' is not 1"),
        (lambda root: (folder_of(root, "a.png"), add("attributes.csv", "file,A\nb.png,1\n")(root)), "no image b"),
        (lambda root: (folder_of(root, "a.png"), add("attributes.csv", "name,A\na.png,1\n")(root)), "no column names"),
        (lambda root: (folder_of(root, "a.png"), add("attributes.csv", "file,A,A\na.png,1,0\n")(root)), "one name"),
        (
            lambda root: (folder_of(root, "a.png"), add("metadata.csv", "file,A\na.png,1\na.png,1\n")(root)),
            r"two rows for a\.png",
        ),
        (lambda root: (folder_of(root, "a.png"), add("metadata.jsonl", "{\n")(root)), "line 1 is not JSON"),
        (lambda root: (folder_of(root, "a.png"), add("metadata.jsonl", "[" * 200_000)(root)), "line 1 is not JSON"),
        (
            lambda root: (folder_of(root, "a.png"), add("metadata.jsonl", '{"image": "a.png"}\n{"A": 1}\n')(root)),
            r"metadata\.jsonl: row 2 has no image",
        ),
        (
            lambda root: (folder_of(root, "a.png"), add("metadata.csv", "file,A\na.png," + "1" * 200_000)(root)),
            r"metadata\.csv: no CSV \(field larger",
        ),
        (
            lambda root: (folder_of(root, "a.png"), add("metadata.jsonl", "")(root), add("metadata.csv", "")(root)),
            "more than one attribute table",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(tmp_path: Path, prepare: Callable, message: str) -> None:
    prepare(tmp_path)
    with pytest.raises(DataError, match=message):
        open_source(str(tmp_path))


@pytest.mark.parametrize("where", ["/no/such/folder", "s3://bucket/a"])
def test_what_is_no_folder_is_refused(where: str) -> None:
    with pytest.raises(UsageError, match="not a local folder"):
        open_source(where)


def test_the_format_can_be_forced(tmp_path: Path) -> None:
    celeba(tmp_path)
    assert open_source(str(tmp_path), "folder").labels == ("CelebA-HQ-img",)
    with pytest.raises(UsageError, match="formats: auto, celeba, celeba-tfr, celebamask-hq, cifar10, folder, npz"):
        open_source(str(tmp_path), "nine")
    with pytest.raises(DataError, match="this is no parquet; --format auto"):
        open_source(str(tmp_path), "parquet")


def test_the_license_file_says_what_may_be_done(tmp_path: Path) -> None:
    folder_of(tmp_path, "a.png")
    (tmp_path / "LICENSE").write_text("CC-BY-4.0\nlong text\n")
    source = open_source(str(tmp_path))
    assert (source.license, source.redistribution) == ("CC-BY-4.0", True)


def items(count: int) -> list[Item]:
    return [Item(file=Path(f"{number}.png"), source=f"{number}.png") for number in range(count)]


@settings(max_examples=30)
@given(st.integers(10, 400), st.integers(0, 3), st.randoms())
def test_splits_depend_on_paths_alone(count: int, seed: int, random) -> None:
    """A partition, of the sizes asked for, whatever order the items come in."""
    listed = items(count)
    splits = assign(listed, "glow-like", seed)
    assert len(splits["val"]) == round(count / 10)
    assert sorted(item.source for own in splits.values() for item in own) == sorted(item.source for item in listed)
    random.shuffle(listed)
    assert assign(listed, "glow-like", seed) == splits
    fewer = subset(listed, count // 2, seed)
    assert set(fewer) < set(listed)
    assert {item.source for item in assign(listed, "glow-like", seed + 1)["val"]} == {
        item.source for item in splits["val"]
    }


def test_split_rules(tmp_path: Path) -> None:
    assert {name: len(own) for name, own in assign(items(100), "random:3:0.25", 0).items()} == {"train": 75, "val": 25}
    assert assign(items(100), "random:3:0.25", 0)["val"] != assign(items(100), "random:4:0.25", 0)["val"]
    table = tmp_path / "splits.csv"
    table.write_text("image,split\n" + "".join(f"{n}.png,{'test' if n < 3 else 'train'}\n" for n in range(10)))
    assert {item.source for item in assign(items(10), str(table), 0)["test"]} == {"0.png", "1.png", "2.png"}
    own = [Item(file=Path("a"), source="train/a", split="train"), Item(file=Path("b"), source="val/b", split="val")]
    assert {name: len(chosen) for name, chosen in assign(own, "auto", 0).items()} == {"train": 1, "val": 1}
    with pytest.raises(UsageError, match="brings its own splits"):
        assign(own, "glow-like", 0)
    with pytest.raises(DataError, match="11 images without split"):
        assign([Item(file=Path("x"), source=f"x{n}.png") for n in range(11)], str(table), 0)
    for text, message in (
        (table.read_text() + "0.png,val\n", r"splits\.csv: 0\.png is listed twice"),
        ("image,split\n\xe9.png,train\n", r"splits\.csv: not UTF-8"),
        ("image,split\n0.png,a/b\n", r"splits\.csv: split 'a/b'"),
    ):
        table.write_bytes(text.encode("latin-1"))
        with pytest.raises(DataError, match=message):
            assign(items(10), str(table), 0)
    for wrong in ("random:x:1", "random:1", "random:1:2", "nine"):
        with pytest.raises(UsageError, match="no split"):
            assign(items(10), wrong, 0)
    with pytest.raises(DataError, match="leave a split empty"):
        assign(items(2), "auto", 0)


def encoded(image: Image.Image, **settings: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **settings)
    return buffer.getvalue()


def with_chunk(png: bytes, kind: bytes, data: bytes) -> bytes:
    """A PNG with a chunk more at its end."""
    return png[:-12] + chunk(kind, data) + png[-12:]


def gradient(width: int, height: int) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 7 % 256, y * 5 % 256, (x + y) % 256], -1).astype(np.uint8))


def test_pixels_pass_unchanged_at_their_size() -> None:
    image = gradient(16, 16)
    data = encoded(image, format="PNG")
    header = inspect(data, "x")
    assert (header.width, header.height, header.mode, header.plain) == (16, 16, "RGB", True)
    assert np.array_equal(load(data, Target(size=16, channels=3), "x"), np.asarray(image))


def test_crop_is_central_and_resize_is_lanczos() -> None:
    image = gradient(60, 32)
    data = encoded(image, format="PNG")
    assert np.array_equal(load(data, Target(size=32, channels=3), "x"), np.asarray(image)[:, 14:46])
    expected = image.crop((14, 0, 46, 32)).resize((8, 8), Image.Resampling.LANCZOS)
    assert np.array_equal(load(data, Target(size=8, channels=3), "x"), np.asarray(expected))


def test_photographs_are_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = gradient(20, 10)
    plain = encoded(image, format="PNG")
    data = encoded(image, format="PNG", exif=exif)
    assert (inspect(data, "x").width, inspect(data, "x").height) == (10, 20)
    turned = np.asarray(image.transpose(Image.Transpose.ROTATE_270))[5:15]
    assert np.array_equal(load(data, Target(size=10, channels=3), "x"), turned)
    late = with_chunk(plain, b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    assert np.array_equal(load(late, Target(size=10, channels=3), "x"), turned)


@pytest.mark.parametrize(
    ("image", "settings", "pixel"),
    [
        (Image.new("RGBA", (4, 4), (200, 0, 0, 0)), {"format": "PNG"}, (255, 255, 255)),
        (Image.new("LA", (4, 4), (200, 255)), {"format": "PNG"}, (200, 200, 200)),
        (Image.new("CMYK", (4, 4), (0, 0, 0, 0)), {"format": "JPEG"}, (255, 255, 255)),
        (Image.fromarray(np.full((4, 4), 40000, np.uint16)), {"format": "PNG"}, (156, 156, 156)),
        (Image.new("P", (4, 4), 0), {"format": "PNG", "transparency": 0}, (255, 255, 255)),
    ],
)
def test_what_must_be_converted_is_said_and_done(image: Image.Image, settings: dict, pixel: tuple) -> None:
    data = encoded(image, **settings)
    assert not inspect(data, "x").plain
    assert tuple(load(data, Target(size=4, channels=3), "x")[0, 0]) == pixel


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"a\.png: not a picture"),
        (b"<svg/>", r"a\.png: not a picture"),
        (encoded(Image.new("L", (4, 4)), format="TIFF"), r"a\.png: not a picture"),
        (encoded(Image.new("1", (9000, 9000)), format="PNG"), "9000x9000"),
        (png_that_claims(13300, 13300), r"a\.png: 13300x13300 px, more than"),
        (
            encoded(Image.new("L", (4, 4)), format="WEBP", save_all=True, append_images=[Image.new("L", (4, 4), 9)]),
            "2 frames",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_picture_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        inspect(data, "a.png")


@pytest.mark.parametrize(
    "data",
    [
        encoded(gradient(32, 32), format="PNG")[:-40],
        with_chunk(encoded(gradient(32, 32), format="PNG"), b"pHYs", b"0"),
        encoded(gradient(32, 32), format="JPEG")[:-40],
    ],
    ids=["cut PNG", "short chunk", "cut JPEG"],
)
def test_a_cut_or_damaged_picture_shows_its_header_and_is_refused(data: bytes) -> None:
    """Nothing is decoded to look at it: a folder is scanned by headers."""
    assert inspect(data, "a.png").width == 32
    with pytest.raises(DataError, match=r"a\.png: does not decode"):
        load(data, Target(size=32, channels=3), "a.png")
