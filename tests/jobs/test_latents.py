"""The latents' commands: samples, edits, ways between pictures, sweeps, latents files and scores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load

from jobs import latents
from jobs.__main__ import main
from pipeline.errors import UsageError
from pipeline.storage import open_storage
from tests.pipeline.models import write_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    write_tiny(folder)
    return str(folder)


def test_columns_are_what_is_asked_for(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "pictures" / "grid.png"
    asked = ["--attributes", "+Smiling,-Eyeglasses", "--attributes", "+Wearing_Hat"]
    assert latents.main(["sample", model, "--out", str(out), "--rows", "3", *asked]) == 0
    assert "3 rows, 3 columns of 8 px" in capsys.readouterr().out
    with Image.open(out) as picture:
        assert picture.width > 3 * 128
        assert picture.height > 3 * 128


def test_the_same_command_draws_the_same_bytes(model: str, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        assert latents.main(["sample", model, "--out", str(tmp_path / name), "--seeds", "5", "9"]) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert latents.main(["sample", model, "--out", str(tmp_path / "c.png"), "--seeds", "5", "10"]) == 0
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "c.png").read_bytes()


def test_several_temperatures_are_columns(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    heats = ["--temperatures", "0.3", "0.6", "0.9", "1.0", "--attributes", "+Smiling", "--label", "1"]
    assert latents.main(["sample", model, "--out", str(tmp_path / "t.png"), "--rows", "1", *heats]) == 0
    assert "1 rows, 4 columns" in capsys.readouterr().out


def test_a_dry_run_draws_nothing_but_checks_everything(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "no.png"
    assert latents.main(["sample", model, "--out", str(out), "--dry-run"]) == 0
    assert "dry run: would draw 4 rows, 1 columns" in capsys.readouterr().out
    with pytest.raises(UsageError, match="did you mean Smiling"):
        latents.main(["sample", model, "--out", str(out), "--attributes", "+Smilin", "--dry-run"])
    with pytest.raises(UsageError, match="classes here: 0 to 1"):
        latents.main(["sample", model, "--out", str(out), "--label", "7", "--dry-run"])
    assert not out.exists()


def test_every_level_can_have_its_own_temperature(model: str, tmp_path: Path) -> None:
    for name, heats in (("even", ["0.7", "0.7"]), ("odd", ["0.7", "0.1"])):
        out = str(tmp_path / f"{name}.png")
        assert latents.main(["sample", model, "--out", out, "--rows", "1", "--level-temperatures", *heats]) == 0
    assert latents.main(["sample", model, "--out", str(tmp_path / "one.png"), "--rows", "1"]) == 0
    assert (tmp_path / "even.png").read_bytes() == (tmp_path / "one.png").read_bytes()
    assert (tmp_path / "even.png").read_bytes() != (tmp_path / "odd.png").read_bytes()


@pytest.fixture
def pictures(tmp_path: Path) -> str:
    """A folder of three pictures of 8 px, each a colour."""
    (tmp_path / "pictures").mkdir()
    for name, colour in (("a", (200, 40, 40)), ("b", (40, 200, 40)), ("c", (40, 40, 200))):
        Image.new("RGB", (8, 8), colour).save(tmp_path / "pictures" / f"{name}.png")
    return str(tmp_path / "pictures")


def test_pictures_go_through_a_latents_file_and_back(model: str, pictures: str, tmp_path: Path) -> None:
    file, out = str(tmp_path / "latents.safetensors"), tmp_path / "back"
    assert latents.main(["encode", model, pictures, "--out", file]) == 0
    assert latents.main(["decode", model, file, "--out", str(out)]) == 0
    for number, name in enumerate("abc"):
        with Image.open(out / f"{number:04d}.png") as back, Image.open(f"{pictures}/{name}.png") as picture:
            assert [v >> 3 for v in back.tobytes()] == [v >> 3 for v in picture.tobytes()]
    assert latents.main(["decode", model, file, "--out", str(tmp_path / "grid.png")]) == 0
    assert (tmp_path / "grid.png").exists()


DRAWINGS = {
    "edit": ["edit", "PICTURES", "--attributes", "Smiling", "--attributes", "Wearing_Hat", "--sliders=-1", "0", "1"],
    "interpolate": ["interpolate", "PICTURES/a.png", "PICTURES/b.png", "--steps", "4"],
    "line": ["interpolate", "PICTURES/a.png", "seed:2", "--steps", "4", "--linear"],
    "temperatures": ["sweep", "PICTURES", "--temperatures", "0", "0.5", "1"],
    "levels": ["sweep", "PICTURES/a.png", "--over", "levels"],
}


@pytest.mark.parametrize("kind", ["png", "gif"])
@pytest.mark.parametrize("drawing", DRAWINGS)
def test_every_drawing_is_a_grid_or_a_film(drawing: str, kind: str, model: str, pictures: str, tmp_path: Path) -> None:
    command, *rest = [word.replace("PICTURES", pictures) for word in DRAWINGS[drawing]]
    out = tmp_path / f"out.{kind}"
    assert latents.main([command, model, *rest, "--out", str(out), "--dry-run"]) == 0
    assert not out.exists()
    assert latents.main([command, model, *rest, "--out", str(out)]) == 0
    with Image.open(out) as picture:
        assert getattr(picture, "n_frames", 1) == (1 if kind == "png" else 6 if "polate" in command else 4)


def test_scores_come_with_the_outlier_first(
    model: str, pictures: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert latents.main(["score", model, pictures, "seed:1", "--out", str(tmp_path / "scores.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = [float(line.split()[0]) for line in lines]
    assert found == sorted(found, reverse=True)
    kept = json.loads((tmp_path / "scores.json").read_text())["bits_per_dim"]
    assert {name: round(bits, 4) for name, bits in kept.items()} == {
        line.split()[-1]: float(line.split()[0]) for line in lines
    }


def test_models_pictures_and_latents_may_lie_on_s3(s3: str, model: str, pictures: str, tmp_path: Path) -> None:
    place = open_storage(s3).sub(f"latents-{tmp_path.name}")
    for name in sorted(path.name for path in Path(model).iterdir()):
        place.write(f"model/{name}", (Path(model) / name).read_bytes())
    place.write("pictures/a.png", Path(pictures, "a.png").read_bytes())
    file = place.where("latents.safetensors")
    assert latents.main(["encode", place.where("model"), place.where("pictures"), "--out", file]) == 0
    assert latents.main(["encode", model, f"{pictures}/a.png", "--out", str(tmp_path / "here")]) == 0
    there, here = load(place.read("latents.safetensors")), load((tmp_path / "here").read_bytes())
    assert all(torch.equal(there[level], here[level]) for level in here)
    assert latents.main(["decode", model, file, "--out", place.where("grid.png")]) == 0
    assert place.read("grid.png")[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["edit", "PICTURES", "--attributes", "Smilin"], "did you mean Smiling"),
        (["interpolate", "PICTURES", "seed:1"], "4 pictures; two: one"),
        (["sweep", "seed:1", "--out", "sweep.bmp"], "sweep.bmp is neither .png nor .gif"),
        (["sample", "--out", "s3://sample.png"], "s3://: not a storage address"),
        (["sample", "--out", "s3://sample.png", "--dry-run"], "s3://: not a storage address"),
        (["encode", "seed:1", "--out", "s3://latents"], "s3://: not a storage address"),
        (["decode", "s3://latents"], "s3://: not a storage address"),
        (["score", "s3://a.png"], "s3://: not a storage address"),
        (["score", "seed:1", "--out", "s3://scores.json"], "s3://: not a storage address"),
        (["score", "seed:1", "--out", "scores/"], "scores/: not a file"),
    ],
)
def test_a_mistake_is_refused_and_nothing_is_written(
    words: list[str], says: str, model: str, pictures: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.rglob("*"))
    command, *rest = [word.replace("PICTURES", pictures) for word in words]
    with pytest.raises(UsageError, match=says):
        latents.main([command, model, *rest])
    assert set(tmp_path.rglob("*")) == before


HUGE = str(10**20)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("sample --level-temperatures 0.7", "1 temperatures for 2 levels; one a level"),
        ("sample --level-temperatures 0.7 0.7 0.7", "3 temperatures for 2 levels"),
        ("sample --level-temperatures 0.7 nan", "temperature nan; 0 or more"),
        ("sample --level-temperatures 0.7 -1", "temperature -1.0; 0 or more"),
        ("sample --level-temperatures 0.7 0.7 --temperatures 0.5 0.9", "beside several --temperatures; columns"),
        ("sample --temperatures inf", "temperature inf; 0 or more"),
        ("sample --temperatures 0.7 -1", "temperature -1.0; 0 or more"),
        ("sample --temperatures", "nothing to draw"),
        (f"sample --seeds 1 {HUGE}", f"seed {HUGE}; 0 to 9223372036854775807"),
        ("sample --seeds -1", "seed -1; 0 to"),
        (f"sample --rows {HUGE}", f"rows {HUGE}; 1 to"),
        ("sample --rows -1", "rows -1; 1 to"),
        ("sweep seed:1 --temperatures nan", "temperature nan; 0 or more"),
        ("sweep seed:1 --temperatures", "nothing to draw"),
        (f"sweep seed:1 --over levels --seed {HUGE}", f"seed {HUGE}; 0 to"),
        ("sweep seed:1 --over levels --seed -1", "seed -1; 0 to"),
        (f"interpolate seed:1 seed:{HUGE}", f"seed {HUGE}; 0 to"),
        (f"interpolate seed:1 seed:2 --steps {HUGE}", f"steps {HUGE}; 2 to"),
        ("interpolate seed:1 seed:2 --steps 1", "steps 1; 2 to"),
        ("edit seed:1 --sliders nan", "slider nan; "),
        ("edit seed:1 --sliders 1e300", "slider 1e+300; "),
        ("edit seed:-1", "seed -1; 0 to"),
        (f"encode seed:{HUGE}", f"seed {HUGE}; 0 to"),
        (f"score seed:{HUGE}", f"seed {HUGE}; 0 to"),
        (f"score seed:1 --label {HUGE}", f"no class {HUGE}"),
    ],
)
def test_a_number_that_means_nothing_is_a_line_and_exit_2(
    words: str, says: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.rglob("*"))
    command, *rest = words.split()
    for dry_run in ([], ["--dry-run"]):
        assert main(["latents", command, model, *rest, *dry_run]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert says in line
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("arguments", [["sample", "--help"], ["--help"]])
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        latents.main(arguments)
    assert left.value.code == 0
    assert "usage: python -m jobs latents" in capsys.readouterr().out
