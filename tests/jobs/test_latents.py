"""Sampling through the command: grids of seeds by attributes or temperatures."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from jobs import latents
from pipeline.errors import UsageError
from tests.pipeline.models import write_tiny


@pytest.fixture
def model(tmp_path: Path) -> str:
    write_tiny(tmp_path / "model")
    return str(tmp_path / "model")


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


@pytest.mark.parametrize("arguments", [["sample", "--help"], ["--help"]])
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        latents.main(arguments)
    assert left.value.code == 0
    assert "usage: python -m jobs latents" in capsys.readouterr().out
