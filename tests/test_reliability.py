"""The page of promises says what is true: every promise has tests, and they exist."""

from __future__ import annotations

import re

import pytest

from tests.reliability import FIGURES, PAGE, PROMISES, Promise, newest, page, rows
from tests.running import ROOT


def test_every_promise_of_runs_is_on_the_page_with_a_figure() -> None:
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if re.match(r"\| R\d", line)]
    names = [f"R{number}" for number in (*range(1, 16), *range(19, 24))]
    assert [line.split("|")[1].strip() for line in lines] == [promise.name for promise in PROMISES] == names
    assert [line for line in lines if not re.search(r"\d\d\d\d-\d\d-\d\d\) \|$", line)] == []


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.name)
def test_its_tests_exist(promise: Promise) -> None:
    assert promise.tests
    for name in promise.tests:
        file, _, test = name.partition("::")
        assert re.search(rf"^def {test}\(", (ROOT / "tests" / file).read_text(encoding="utf-8"), re.MULTILINE), name


def test_the_page_is_made_of_what_is_known() -> None:
    """`python -m tests.reliability` makes it again."""
    assert page(newest(rows(FIGURES))) == PAGE.read_text(encoding="utf-8")
