"""Toy faces: the same for everybody, attributes truly drawn and independent, the layout of the real thing."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import ConflictError, UsageError
from pipeline.faces import GRAIN, STYLES, Face, render
from pipeline.sources import open_source
from pipeline.toy import CELEBA_ATTRIBUTES, COINS, DRAWN, HAIR, attribute_row, draw_face, toy_image, write_toy


def test_an_image_is_a_function_of_seed_and_index() -> None:
    assert np.array_equal(toy_image(3, 7, 32), toy_image(3, 7, 32))
    others = [toy_image(3, 8, 32), toy_image(4, 7, 32)]
    assert not any(np.array_equal(toy_image(3, 7, 32), other) for other in others)


@pytest.mark.parametrize("size", [8, 32, 64, 100, 300])
def test_any_size(size: int) -> None:
    pixels = toy_image(0, 0, size)
    assert (pixels.shape, pixels.dtype) == ((size, size, 3), np.uint8)


def test_sizes_show_the_same_face() -> None:
    face = draw_face(0, 5)
    large, small = render(face, 256).astype(float), render(face, 64).astype(float)
    reduced = large.reshape(64, 4, 64, 4, 3).mean((1, 3))
    assert np.abs(reduced - small).mean() < 2.5


def test_the_grain_is_what_it_says() -> None:
    face = draw_face(0, 5)
    clean, grainy = render(face, 128), render(face, 128, np.random.default_rng(0))
    inside = (clean > 20) & (clean < 235)
    difference = grainy.astype(float)[inside] - clean[inside]
    assert abs(difference.mean()) < 0.05
    assert abs(difference.std() - GRAIN) < 0.1


def test_the_forty_names() -> None:
    assert len(CELEBA_ATTRIBUTES) == len(set(CELEBA_ATTRIBUTES)) == 40
    assert set(DRAWN) < set(CELEBA_ATTRIBUTES)
    rows = np.array([attribute_row(draw_face(0, index)) for index in range(200)])
    varying = {name for name, column in zip(CELEBA_ATTRIBUTES, rows.T, strict=True) if len(set(column)) == 2}
    assert varying == set(DRAWN)
    assert set(np.unique(rows)) == {-1, 1}


def test_attributes_and_style_are_independent() -> None:
    count = 3000
    faces = [draw_face(1, index) for index in range(count)]
    columns = {name: np.array([face.has(name) for face in faces], dtype=float) for name in DRAWN}
    columns |= {style: np.array([face.style == style for face in faces], dtype=float) for style in STYLES}
    exclusive = [set(filter(None, HAIR)), set(STYLES)]
    for first, second in combinations(columns, 2):
        if not any({first, second} <= group for group in exclusive):
            assert abs(np.corrcoef(columns[first], columns[second])[0, 1]) < 4.5 / count**0.5, (first, second)
    for name, chance in COINS.items():
        assert abs(columns[name].mean() - chance) < 4.5 * (chance * (1 - chance) / count) ** 0.5, name


def toggled(face: Face, attribute: str) -> Face:
    present = set(face.present) ^ {attribute}
    if attribute in HAIR:
        present -= set(HAIR) - {attribute}
    return replace(face, present=tuple(sorted(present)))


@pytest.mark.parametrize("attribute", sorted(set(COINS) - {"Pale_Skin"}))
def test_every_attribute_is_seen(attribute: str) -> None:
    """Toggling one changes some pixels much and most not at all."""
    for index in range(10):
        face = draw_face(2, index)
        difference = np.abs(render(face, 64).astype(int) - render(toggled(face, attribute), 64).astype(int)).max(-1)
        assert (difference > 0).mean() < 0.5, index
        if not (attribute == "Bangs" and face.has("Wearing_Hat")):
            assert difference.max() > 15, index


def test_a_set_in_the_layout_of_celebamask_hq(tmp_path: Path) -> None:
    folder = tmp_path / "toy"
    assert write_toy(folder, images=12, size=16, seed=5)
    source = open_source(str(folder))
    assert (source.kind, source.license, source.redistribution) == ("celebamask-hq", "CC0-1.0", True)
    assert source.attributes == CELEBA_ATTRIBUTES
    assert set(source.labels) <= set(STYLES)
    truth = [json.loads(line) for line in (folder / "truth.jsonl").read_text().splitlines()]
    by_name = {item.file.name: item for item in source.items}
    for index, row in enumerate(truth):
        face = draw_face(5, index)
        item = by_name[f"{index}.png"]
        assert (row["image"], row["style"], row["present"]) == (item.file.name, face.style, list(face.present))
        assert (list(item.attributes), item.label) == (attribute_row(face), face.style)
        assert np.array_equal(np.asarray(Image.open(item.file)), toy_image(5, index, 16))


def test_the_same_set_again_is_fine_another_is_a_conflict(tmp_path: Path) -> None:
    folder = tmp_path / "toy"
    assert write_toy(folder, images=3, size=16, seed=5)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")}
    assert not write_toy(folder, images=3, size=16, seed=5)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")} == before
    for changed in ({"images": 4}, {"size": 8}, {"seed": 6}):
        with pytest.raises(ConflictError, match="another toy set is here"):
            write_toy(folder, **{"images": 3, "size": 16, "seed": 5, **changed})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(ConflictError, match="not empty"):
        write_toy(tmp_path / "mine", images=3, size=16, seed=5)


@pytest.mark.parametrize("changed", [{"images": 0}, {"size": 4}, {"size": 2000}])
def test_nonsense_is_refused(tmp_path: Path, changed: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        write_toy(tmp_path / "toy", **{"images": 3, "size": 16, "seed": 5, **changed})
    assert not (tmp_path / "toy").exists()
