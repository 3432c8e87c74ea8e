"""docs/model.md points at code that is there."""

from __future__ import annotations

import importlib
import re
from functools import reduce
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "model.md"
POINTERS = re.findall(r"`glow/(\w+)\.py: ([\w.]+)`", PAGE.read_text(encoding="utf-8"))


@pytest.mark.parametrize(("module", "name"), POINTERS)
def test_the_page_points_at_code(module: str, name: str) -> None:
    assert reduce(getattr, name.split("."), importlib.import_module(f"glow.{module}"))


def test_every_room_of_the_model_is_on_the_page() -> None:
    rooms = {path.stem for path in (PAGE.parents[1] / "glow").glob("[a-z]*.py")}
    assert rooms == {module for module, _ in POINTERS}
