"""The ledger: its bytes, its chain, and one winner of many."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from pipeline.errors import ConflictError, DataError
from pipeline.ledger import Entry, Ledger, current
from pipeline.storage import open_storage, sha256_hex
from tests.pipeline.races import processes

ENTRY = Entry(
    sequence=0,
    previous="",
    model="faces",
    alias="champion",
    version=3,
    digest="cd" * 32,
    replaces=0,
    actor="ada@host",
    time="2026-11-22T15:00:00+00:00",
    reason="",
    forced=(),
    gates=({"gate": "round_trip", "passed": True, "value": 1e-6, "limit": 0.001, "detail": "as it should"},),
    attempt="00ff",
)


def ledger(folder: Path) -> Ledger:
    return Ledger(open_storage(str(folder)), "faces")


def test_an_entry_has_these_bytes_under_this_name(tmp_path: Path) -> None:
    ledger(tmp_path).append([], ENTRY)
    assert (tmp_path / "faces" / "00000001.json").read_bytes() == (
        b'{"actor":"ada@host","alias":"champion","attempt":"00ff","digest":"' + b"cd" * 32 + b'","forced":[],"gates":'
        b'[{"detail":"as it should","gate":"round_trip","limit":0.001,"passed":true,"value":1e-06}],"model":"faces",'
        b'"previous":"","reason":"","replaces":0,"schema":1,"sequence":1,"time":"2026-11-22T15:00:00+00:00",'
        b'"version":3}\n'
    )


def test_entries_are_chained_by_the_digest_of_the_one_before(tmp_path: Path) -> None:
    book = ledger(tmp_path)
    for version in (3, 4, 3):
        book.append(book.entries(), dataclasses.replace(ENTRY, version=version, attempt=f"{version}"))
    first = (tmp_path / "faces" / "00000001.json").read_bytes()
    entries = book.entries()
    assert [(entry.sequence, entry.version) for entry in entries] == [(1, 3), (2, 4), (3, 3)]
    assert entries[1].previous == sha256_hex(first)
    assert current(entries, "champion") == entries[2]
    assert current(entries, "challenger") is None


def test_the_gates_are_a_table_whatever_their_details_say() -> None:
    gates = ({"gate": "round_trip", "passed": False, "value": 1.0, "limit": 0.001, "detail": "max |x - y|"},)
    text = dataclasses.replace(ENTRY, sequence=4, gates=gates, forced=("round_trip",), reason="to see").markdown()
    assert "Entry 4 of the ledger: champion since 2026-11-22T15:00:00+00:00, by ada@host, because: to see." in text
    assert "Overruled: round_trip." in text
    assert text.endswith("| round_trip&ensp; | failed&ensp; | 1&ensp; | 0.001&ensp; | max \\|x - y\\| |")


@pytest.mark.parametrize("harm", ["changed", "removed", "swapped", "foreign"])
def test_a_changed_history_is_noticed(tmp_path: Path, harm: str) -> None:
    book = ledger(tmp_path)
    for version in (1, 2, 3):
        book.append(book.entries(), dataclasses.replace(ENTRY, version=version))
    first, second = (tmp_path / "faces" / f"0000000{number}.json" for number in (1, 2))
    if harm == "changed":
        first.write_bytes(first.read_bytes().replace(b'"version":1', b'"version":7'))
    elif harm == "removed":
        second.unlink()
    elif harm == "swapped":
        one, two = first.read_bytes(), second.read_bytes()
        first.write_bytes(two)
        second.write_bytes(one)
    else:
        second.write_bytes(b'{"hello":1}\n')
    with pytest.raises(DataError):
        book.entries()


def test_a_decision_based_on_an_old_ledger_loses_and_names_the_winner(tmp_path: Path) -> None:
    book = ledger(tmp_path)
    seen = book.entries()
    book.append(seen, dataclasses.replace(ENTRY, version=5, actor="grace@host", attempt="aa"))
    with pytest.raises(ConflictError, match="version 5 to champion by grace@host") as caught:
        book.append(seen, ENTRY)
    assert caught.value.exit_code == 6
    assert len(book.entries()) == 1


def test_an_own_write_whose_answer_was_lost_has_won(tmp_path: Path) -> None:
    book = ledger(tmp_path)
    book.append([], ENTRY)
    assert book.append([], ENTRY).sequence == 1


def race(environment: Mapping[str, str], url: str, number: int, start: Barrier) -> str:
    """One racer: everybody has read the same ledger before anybody writes."""
    os.environ.update(environment)
    book = Ledger(open_storage(url), "faces")
    seen = book.entries()
    start.wait()
    try:
        book.append(seen, dataclasses.replace(ENTRY, version=number, attempt=f"{number}"))
    except ConflictError as error:
        return error.what.split(" to ")[0]
    return "won"


def race_eight(url: str) -> None:
    """Let eight processes race, and expect one entry, whose winner the seven others name."""
    context = processes()
    with context.Manager() as manager, ProcessPoolExecutor(8, mp_context=context) as pool:
        start = manager.Barrier(8)
        found = list(pool.map(race, [dict(os.environ)] * 8, [url] * 8, range(1, 9), [start] * 8))
    (entry,) = Ledger(open_storage(url), "faces").entries()
    assert found[entry.version - 1] == "won"
    assert sorted(found) == sorted(["won", *[f"version {entry.version}"] * 7])


def test_of_eight_racing_processes_one_wins_and_the_others_name_it(tmp_path: Path) -> None:
    race_eight(str(tmp_path))


def test_of_eight_racing_processes_one_wins_on_s3(s3: str) -> None:
    race_eight(f"{s3}/ledger")
