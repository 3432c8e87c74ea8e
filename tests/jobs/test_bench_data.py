"""The benches of the data path run, and say what they say they measure."""

from __future__ import annotations

import json

import pytest

from jobs import bench
from tests.running import jobs

TINY = ("--batch", "8", "--rounds", "1", "--json")
Rows = dict[str, dict[str, float | str]]


def rows(*words: str) -> Rows:
    done = jobs("bench", *words, *TINY)
    assert done.returncode == 0, done.stderr
    return {row["row"]: row for row in json.loads(done.stdout)["rows"]}


def test_three_ways_an_encoding_and_memory_that_stays() -> None:
    """A stream that kept what it read would grow by 26 MiB over the eight epochs after the second."""
    found = rows("data", "--images", "300", "--size", "64", "--encodings", "raw")
    assert list(found) == ["raw, bare loop", "raw, webdataset", "raw, ours"]
    assert all(float(row["per_core"]) > 0 for row in found.values())
    assert (found["raw, bare loop"]["x_loop"], found["raw, webdataset"]["x_wds"]) == (1, 1)
    first, *_, last = map(int, str(found["raw, ours"]["resident"]).split())
    assert last - first < 4


def test_a_lossy_form_on_s3(s3: str) -> None:
    found = rows("data", "--images", "40", "--size", "8", "--encodings", "jpg", "--to", f"{s3}/bench")
    assert list(found) == ["jpg, bare loop", "jpg, webdataset", "jpg, ours"]


def test_faults_are_repeated(s3: str) -> None:
    found = rows("faults", "--images", "600", "--size", "8", "--to", f"{s3}/bench", "--pause", "1")
    assert found["as it is"]["repeated"] == 0
    assert int(found["faults"]["repeated"]) > 0


@pytest.mark.parametrize("words", [("data", "--encodings", "tiff"), ("data", "--images", "0"), ("faults",)])
def test_flags_that_make_no_sense(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        bench.main(words)
    assert caught.value.code == 2
    assert "error: --" in capsys.readouterr().err
