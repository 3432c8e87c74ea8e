"""The judge tells what can be told, refuses what it cannot, and is trained once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.config import DataConfig
from pipeline.errors import GateError
from pipeline.judge import judge_for
from pipeline.manifest import Manifest, open_manifest
from pipeline.prepare import Options, build, make_plan
from pipeline.sources import open_source
from pipeline.storage import open_storage

NAMES = ("Bright", "Coin", "Never")
TRAINING = 1_600


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, DataConfig]:
    """Noise, bright or dark; a coin that nothing shows; and what no image has."""
    folder = tmp_path_factory.mktemp("judged")
    rng, rows = np.random.default_rng(0), ["file,Bright,Coin,Never"]
    for split, count in (("train", 96), ("val", 64)):
        (folder / "source" / split).mkdir(parents=True)
        for index in range(count):
            bright, coin = index % 2, rng.integers(2)
            noise = rng.integers(0, 128, (8, 8, 3)) + 96 * bright
            Image.fromarray(noise.astype(np.uint8)).save(folder / "source" / split / f"{index}.png")
            rows.append(f"{split}/{index}.png,{bright},{coin},0")
    (folder / "source" / "attributes.csv").write_text("\n".join(rows) + "\n")
    plan = make_plan(open_source(str(folder / "source")), Options(samples_per_shard=16), map, report=lambda n: None)
    build(plan, open_storage(str(folder / "data")), mapped=map, restart=False, report=lambda n: None)
    config = DataConfig(prefix=str(folder / "data"), bits=5, cache=str(folder / "cache"), cache_gb=0.1)
    return open_manifest(open_storage(str(folder / "data"))), config


def test_it_judges_what_it_can_tell_and_refuses_the_rest(data: tuple[Manifest, DataConfig], tmp_path: Path) -> None:
    said: list[str] = []
    cache = open_storage(str(tmp_path / "judge"))
    judge = judge_for(*data, cache, TRAINING, said.append)
    assert judge.able == ("Bright",)
    assert judge.accuracy["Coin"] < 0.75
    pixels = torch.tensor([40, 190], dtype=torch.uint8)[:, None, None, None].expand(2, 3, 8, 8)
    assert judge.shows(pixels, ["Bright"]).tolist() == [[False], [True]]
    with pytest.raises(GateError, match=r"cannot tell Coin: \d\d\.\d% right, 97% asked"):
        judge.shows(pixels, ["Bright", "Coin"])
    with pytest.raises(GateError, match="cannot tell Bald: never seen"):
        judge.shows(pixels, ["Bald"])
    again = judge_for(*data, cache, TRAINING, said.append)
    assert len(said) == 1
    assert again.accuracy == judge.accuracy
    assert torch.equal(again.shows(pixels, ["Bright"]), judge.shows(pixels, ["Bright"]))


def test_a_kept_judge_that_is_another_or_harmed_is_trained_anew(
    data: tuple[Manifest, DataConfig], tmp_path: Path
) -> None:
    said: list[str] = []
    cache = open_storage(str(tmp_path / "judge"))
    judge_for(*data, cache, 64, said.append)
    judge_for(*data, cache, 128, said.append)
    assert len(said) == 2
    cache.write("judge.safetensors", cache.read("judge.safetensors")[:-1] + b"!")
    judge_for(*data, cache, 128, said.append)
    assert len(said) == 3
