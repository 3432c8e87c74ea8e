"""The workbench: pictures through a model and back, exactly; what is not a picture or not of this model is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from glow import bits_per_dim, quantize
from pipeline import workbench
from pipeline.errors import DataError, UsageError
from pipeline.model import LoadedModel, read_model
from pipeline.storage import open_storage
from tests.pipeline.models import write_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("model")
    write_tiny(folder)
    return read_model(open_storage(str(folder)))


def pixels_of(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)


@settings(max_examples=10)
@given(seed=st.integers(0, 2**31))
def test_what_is_encoded_decodes_to_its_own_pixels_in_whatever_company(model: LoadedModel, seed: int) -> None:
    pixels = pixels_of(3, seed)
    latents = workbench.encode(model, pixels)
    assert torch.equal(quantize(workbench.decode(model, latents), 5), quantize(pixels, 5))
    alone = workbench.encode(model, pixels[1:2])
    assert all(torch.equal(z[1:2], one) for z, one in zip(latents, alone, strict=True))


def test_a_slider_at_0_changes_no_byte_and_elsewhere_it_does(model: LoadedModel) -> None:
    latents = workbench.encode(model, pixels_of(2, 0))
    still, moved = workbench.edited(model, latents, "Smiling", [0.0, 1.0])
    assert torch.equal(still, workbench.decode(model, latents))
    assert (moved != still).any()
    assert workbench.places(model, latents).shape == (2, 3)
    with pytest.raises(UsageError, match="no direction Smilin; did you mean Smiling"):
        workbench.attribute_of(model, "Smilin")


def test_scores_are_bits_per_dim_under_what_is_known(model: LoadedModel) -> None:
    pixels = pixels_of(3, 1)
    together = workbench.score(model, pixels)
    assert torch.equal(together[1:2], workbench.score(model, pixels[1:2]))
    known = workbench.score(model, pixels, workbench.known(model, 3, "+Smiling", label=1))
    assert (known != together).all()
    x = workbench._middle(pixels, 5)
    near = bits_per_dim(model.model.log_prob(x).double(), model.model.dims, 5)
    assert torch.allclose(together, near.detach(), atol=0.2)


def test_levels_are_dropped_from_the_finest_on(model: LoadedModel) -> None:
    latents = workbench.encode(model, pixels_of(2, 2))
    swept = workbench.over_levels(latents, seed=5)
    assert list(swept) == ["all levels", "levels 2 up", "none"]
    assert [[torch.equal(a, b) for a, b in zip(latents, kept, strict=True)] for kept in swept.values()] == [
        [True, True], [False, True], [False, False]
    ]  # fmt: skip


def test_pictures_are_found_cropped_and_named(model: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    Image.new("L", (12, 9), 40).save(tmp_path / "deep" / "grey.png")
    Image.new("RGB", (8, 8), (0, 8, 16)).save(tmp_path / "small.png")
    (tmp_path / "notes.txt").write_text("no picture")
    names, pixels = workbench.read_pictures(model, [str(tmp_path), str(tmp_path / "small.png"), "seed:3"])
    assert [Path(name).name for name in names] == ["grey.png", "small.png", "small.png", "seed:3"]
    assert pixels.shape == (4, 3, 8, 8)
    assert pixels[0].unique().tolist() == [40]
    assert torch.equal(pixels[3], model.sample([3])[0])


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("tiny.png", "4x4 px, the model's images have 8; give a larger picture"),
        ("broken.png", "not a picture we read"),
        ("missing.png", "missing.png"),
        ("nothing", "no pictures here; files that end in .png"),
    ],
)
def test_what_is_no_picture_is_refused_by_name(model: LoadedModel, tmp_path: Path, place: str, says: str) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "tiny.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    (tmp_path / "nothing").mkdir()
    with pytest.raises((DataError, UsageError)) as refused:
        workbench.read_pictures(model, [str(tmp_path / place)])
    assert says in str(refused.value)
    assert place in str(refused.value)


def test_a_seed_that_is_none_is_refused(model: LoadedModel) -> None:
    with pytest.raises(UsageError, match="not a seed: seed:x"):
        workbench.read_pictures(model, ["seed:x"])
    with pytest.raises(UsageError, match="no picture"):
        workbench.read_pictures(model, [])


def test_latents_files_belong_to_their_model(model: LoadedModel, tmp_path: Path) -> None:
    latents = workbench.encode(model, pixels_of(2, 3))
    data = workbench.latents_bytes(model, ["a", "b"], latents)
    names, again = workbench.read_latents(model, data, "x")
    assert names == ["a", "b"]
    assert all(torch.equal(z, back) for z, back in zip(latents, again, strict=True))
    write_tiny(tmp_path, seed=1)
    other = read_model(open_storage(str(tmp_path)))
    with pytest.raises(DataError, match=f"latents of model {model.digest[:12]}, given to {other.digest[:12]}"):
        workbench.read_latents(other, data, "x")
    with pytest.raises(DataError, match="shapes do not fit"):
        workbench.read_latents(model, workbench.latents_bytes(model, ["a"], latents), "x")
    for harmed in (b"", b"no safetensors at all", data[:-4]):
        with pytest.raises(DataError, match="x: not a latents file"):
            workbench.read_latents(model, harmed, "x")
