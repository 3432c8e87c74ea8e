"""Tracking: rows once and in order over kills, outages and lost spools; training never waits."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from pipeline.config import DataConfig, TrackingConfig, TrainConfig
from pipeline.errors import RemoteError, redact
from pipeline.mlflow_run import Description, MlflowRun
from pipeline.mlflow_server import connect
from pipeline.spool import Cursor, Means, Row, Spool, parse_rows
from pipeline.storage import open_storage
from pipeline.tracking import Tracker, flat_params, run_key
from tests.mlflow_db import MLFLOW_NOISE, fresh_database

pytestmark = MLFLOW_NOISE

INPUTS = {"name": "toy", "digest": "ab" * 32, "source": "s3://user:secret@bucket/toy", "samples": {"train": 64}}

WRITER = """
import sys, time
from pipeline.config import TrackingConfig
from pipeline.storage import open_storage
from pipeline.tracking import Tracker
run, uri, first = sys.argv[1:]
tracker = Tracker(open_storage(run), TrackingConfig(uri=uri), "killed")
tracker.start({"seed": "0"})
for images in range(int(first), 100_000, 8):
    tracker.log(images, {"train/bits_per_dim": 1 / (images + 1), "train/grad_norm": images})
    tracker.log(images, {"val/bits_per_dim": images / 3})
    time.sleep(0.002)
"""


def history(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    """A metric's history as MLflow stored it, in the order of recording."""
    return [(point.step, point.value) for point in connect(uri).get_metric_history(run_id, key)]


def only_run(uri: str) -> str:
    """Id of the one run there is."""
    client = connect(uri)
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert len(runs) == 1
    return runs[0].info.run_id


def rows_of(path: Path) -> list[Row]:
    """Rows of a spool nobody writes any more."""
    with contextlib.closing(Spool(path)) as spool:
        return spool.rows()


def wait_for(found: Callable[[], bool], seconds: float = 240.0) -> None:
    """Wait until `found()` is true."""
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end, "did not happen"
        time.sleep(0.05)


def write_until_killed(folder: Path, uri: str, first: int, delay: float) -> None:
    """Let another process write from position `first` on, and kill it `delay` s after rows begin to reach MLflow."""
    before = sent(uri)
    command = [sys.executable, "-c", WRITER, str(folder), uri, str(first)]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.getcwd()})
    try:
        wait_for(lambda: sent(uri) > before)
        time.sleep(delay)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def sent(uri: str) -> int:
    """Metric values in the database, whatever their run."""
    with contextlib.closing(sqlite3.connect(uri.removeprefix("sqlite:///"))) as database:
        return database.execute("select count(*) from metrics where key not like 'system/%'").fetchone()[0]


def test_a_run_is_recorded_with_params_inputs_pictures_and_artifacts(tmp_path: Path) -> None:
    uri = fresh_database(tmp_path)
    run = open_storage(str(tmp_path / "run"))
    tracker = Tracker(run, TrackingConfig(uri=uri), "faces")
    tracker.start({"model.levels": "3"}, INPUTS)
    tracker.log(16, {"train/bits_per_dim": 4.5})
    tracker.image("t0.70", 16, Image.new("RGB", (8, 8), "red"))
    run.write("eval/report.html", b"<p>")
    tracker.artifact("eval/report.html")
    tracker.close()

    client, run_id = connect(uri), only_run(uri)
    stored = client.get_run(run_id)
    assert stored.info.status == "FINISHED"
    assert stored.info.run_name == "faces"
    assert stored.data.params == {"model.levels": "3"}
    assert stored.data.tags["data.digest"] == "ab" * 32
    dataset = stored.inputs.dataset_inputs[0].dataset
    assert (dataset.name, dataset.digest) == ("toy", ("ab" * 32)[:36])
    assert "secret" not in dataset.source
    assert history(uri, run_id, "train/bits_per_dim") == [(16, 4.5)]
    assert [file.path.startswith("images/t0.70+step+16+") for file in client.list_artifacts(run_id, "images")] == [
        True
    ] * 2
    assert [file.path for file in client.list_artifacts(run_id, "eval")] == ["eval/report.html"]
    assert run.list() == [
        "eval/report.html",
        "events.jsonl",
        "metrics.jsonl",
        "run.json",
        "samples/images-00000016-t0.70.png",
    ]


def test_no_name_and_no_number_of_classes_keeps_other_rows_from_mlflow(tmp_path: Path) -> None:
    uri = fresh_database(tmp_path)
    odd = ["tench, Tinca tinca", "tench; Tinca tinca", "a(b)", "50%", "../up", "a//b", "it's", "x" * 300, "é:", "\0"]
    names = ["plain", *odd]
    tracker = Tracker(open_storage(str(tmp_path / "run")), TrackingConfig(uri=uri), "odd")
    tracker.start({})
    tracker.log(8, {f"val/bpd_class/{name}": index for index, name in enumerate(names)})
    tracker.log(8, {f"val/bpd_class/{number}": number for number in range(1100)})
    tracker.log(16, {"train/bits_per_dim": 1.0, "val/bpd_class/tench, Tinca tinca": 0.5})
    tracker.close(timeout=60)

    run_id = only_run(uri)
    assert history(uri, run_id, "train/bits_per_dim") == [(16, 1.0)]
    kept = connect(uri).get_run(run_id).data.metrics
    assert len([name for name in kept if not name.startswith("system/")]) == len(names) + 1100 + 1
    assert kept["val/bpd_class/plain"] == 0
    (tench,) = [name for name in kept if "tench_ Tinca tinca" in name and kept[name] == 0.5]
    assert history(uri, run_id, tench) == [(8, 1.0), (16, 0.5)]


def test_a_file_that_somebody_removed_keeps_nothing_else_from_mlflow(tmp_path: Path) -> None:
    uri, run = fresh_database(tmp_path), open_storage(str(tmp_path / "run"))
    tracker = Tracker(run, TrackingConfig(uri=uri), "tidied")
    tracker.image("t0.70", 8, Image.new("RGB", (4, 4)))
    tracker.artifact("never.html")
    run.write("eval/val.html", b"<p>")
    tracker.artifact("eval/val.html")
    run.remove("samples/images-00000008-t0.70.png")
    tracker.start({})
    tracker.close(timeout=60)

    client, run_id = connect(uri), only_run(uri)
    assert [file.path for file in client.list_artifacts(run_id, "eval")] == ["eval/val.html"]
    assert client.get_run(run_id).info.status == "FINISHED"
    assert run.read("events.jsonl").count(b'"kind":"file gone"') == 2


def test_who_only_adds_to_a_run_leaves_its_state_and_its_times(tmp_path: Path) -> None:
    """An evaluation beside the training, and one after it."""
    uri = fresh_database(tmp_path)
    run = open_storage(str(tmp_path / "run"))
    config = TrackingConfig(uri=uri)

    def evaluate(images: int) -> None:
        guest = Tracker(run, config, "faces")
        guest.start({}, guest=True)
        guest.log(images, {"val/bpd_class/young": 3.0})
        guest.close()

    trainer = Tracker(run, config, "faces")
    trainer.start({})
    trainer.log(16, {"train/bits_per_dim": 4.5})
    wait_for(lambda: sent(uri) == 1)
    client, run_id = connect(uri), only_run(uri)
    evaluate(16)
    assert (client.get_run(run_id).info.status, client.get_run(run_id).info.end_time) == ("RUNNING", None)
    trainer.close()
    ended = client.get_run(run_id).info
    evaluate(32)
    after = client.get_run(run_id).info
    assert (after.status, after.start_time, after.end_time) == ("FINISHED", ended.start_time, ended.end_time)
    assert [images for images, _ in history(uri, run_id, "val/bpd_class/young")] == [16, 32]


def test_a_guest_of_a_run_that_mlflow_does_not_know_makes_it_and_ends_it(tmp_path: Path) -> None:
    uri = fresh_database(tmp_path)
    tracker = Tracker(open_storage(str(tmp_path / "run")), TrackingConfig(uri=uri), "faces")
    tracker.start({}, guest=True)
    tracker.close()
    assert connect(uri).get_run(only_run(uri)).info.status == "FINISHED"


def test_a_killed_and_resumed_run_has_every_row_once_and_in_order(tmp_path: Path) -> None:
    uri = fresh_database(tmp_path)
    for first, delay in ((0, 0.0), (160, 0.21), (0, 0.07)):  # resumed from positions before those already recorded
        write_until_killed(tmp_path / "run", uri, first, delay)
    tracker = Tracker(open_storage(str(tmp_path / "run")), TrackingConfig(uri=uri), "killed")
    tracker.start({"seed": "0"})
    tracker.log(10**6, {"val/bits_per_dim": 0.5})
    tracker.close(timeout=60)

    run_id = only_run(uri)
    steps = [step for step, _ in history(uri, run_id, "train/bits_per_dim")]
    assert steps == list(range(0, steps[-1] + 1, 8))
    assert len(steps) > 100
    assert history(uri, run_id, "train/grad_norm") == [(step, float(step)) for step in steps]
    validation = history(uri, run_id, "val/bits_per_dim")
    assert [step for step, _ in validation] == [*range(0, validation[-2][0] + 1, 8), 10**6]
    assert len(open_storage(str(tmp_path / "run")).read("metrics.jsonl").splitlines()) == int(
        connect(uri).get_run(run_id).data.tags["spool.rows"]
    )


def test_rows_already_sent_are_not_sent_again_after_the_spool_is_lost(tmp_path: Path) -> None:
    uri = fresh_database(tmp_path)
    run = open_storage(str(tmp_path / "run"))
    for upto in (5, 8):
        tracker = Tracker(run, TrackingConfig(uri=uri), "lost")
        tracker.start({})
        for images in range(upto):
            tracker.log(images, {"train/bits_per_dim": images})
            tracker.image("t1", images, Image.new("RGB", (4, 4)))
        tracker.close(timeout=60)
        run.remove("metrics.jsonl")
        run.remove("events.jsonl")
    assert history(uri, only_run(uri), "train/bits_per_dim") == [(step, float(step)) for step in range(8)]
    pictures = connect(uri).list_artifacts(only_run(uri), "images")
    assert len([file for file in pictures if file.path.endswith(".png")]) == 8


def test_a_run_on_s3_goes_on_from_what_was_synced(s3: str, tmp_path: Path) -> None:
    uri, run = fresh_database(tmp_path), open_storage(f"{s3}/tracking")
    tracker = Tracker(run, TrackingConfig(uri=uri), "far")
    tracker.start({})
    for images in range(8):
        tracker.log(images, {"train/bits_per_dim": images})
        if images == 4:
            tracker.sync()
            tracker.image("t1", images, Image.new("RGB", (4, 4)))
    wait_for(lambda: sent(uri) == 8)  # and now this machine is gone, with what was not synced
    again = Tracker(run, TrackingConfig(uri=uri), "far")
    again.start({})
    for images in range(5, 10):
        again.log(images, {"train/bits_per_dim": images})
    again.close(timeout=60)
    assert history(uri, only_run(uri), "train/bits_per_dim") == [(step, float(step)) for step in range(10)]
    assert [row["images"] for row in parse_rows(run.read("metrics.jsonl"))] == list(range(10))
    assert run.exists("samples/images-00000004-t1.png")
    tracker.close()


def test_a_batch_whose_answer_was_lost_is_recorded_once(tmp_path: Path) -> None:
    uri = fresh_database(tmp_path)
    run = open_storage(str(tmp_path / "run"))
    tracker = Tracker(run, TrackingConfig(uri=uri), "again")
    tracker.start({})
    tracker.log(8, {"a": 1.0, "b": 2.0})
    tracker.close()
    description = Description(name="again", key=run_key(run), params={}, inputs={})
    connection = MlflowRun(TrackingConfig(uri=uri), description)
    connection._last = {}  # what it would have known had the run been opened before the batch
    connection.send(rows_of(tmp_path / "run" / "metrics.jsonl"), 1)
    assert history(uri, connection.run_id, "a") == [(8, 1.0)]


def test_mlflow_unreachable_costs_training_nothing_and_rows_arrive_later(tmp_path: Path) -> None:
    template = fresh_database(tmp_path / "template")
    folder = tmp_path / "later"
    folder.write_text("in the way of the database's folder")
    uri = f"sqlite:///{folder}/mlflow.db"
    run = open_storage(str(tmp_path / "run"))
    tracker = Tracker(run, TrackingConfig(uri=uri), "patient")
    tracker.start({})
    for images in range(100):
        tracker.log(images, {"train/bits_per_dim": images})
    events = tmp_path / "run" / "events.jsonl"
    wait_for(lambda: b"mlflow unreachable" in events.read_bytes())
    assert len(run.read("metrics.jsonl").splitlines()) == 100

    folder.unlink()
    folder.mkdir()
    Path(template.removeprefix("sqlite:///")).rename(folder / "mlflow.db")
    wait_for(lambda: b'"run_id"' in run.read("run.json"))
    tracker.log(100, {"train/bits_per_dim": 100.0})
    tracker.close(timeout=60)
    assert [step for step, _ in history(uri, only_run(uri), "train/bits_per_dim")] == list(range(101))


def test_closing_is_bounded_and_says_what_was_not_sent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = open_storage(str(tmp_path / "run"))
    tracker = Tracker(run, TrackingConfig(uri="http://127.0.0.1:9"), "alone")
    tracker.start({})
    tracker.log(1, {"train/bits_per_dim": 1.0})
    tracker.image("t0.70", 1, Image.new("RGB", (4, 4)))
    tracker.artifact("config.toml")
    tracker.close(timeout=0.2)
    assert b'"files":2,"kind":"unsent","rows":1' in run.read("events.jsonl")
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"warning: MLflow may lack 1 rows of {tmp_path}/run/metrics.jsonl and 2 files; the same command again sends "
        f"them, or: python -m jobs evaluate {tmp_path}/run"
    )
    assert run.read("metrics.jsonl").startswith(b'{"images":1,"metrics":{"train/bits_per_dim":1.0},"time":')


def test_a_torn_last_line_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"images":1,"metrics":{"a":1.0},"time":5}\n{"images":2,"metr')
    tracker = Tracker(open_storage(str(tmp_path)), TrackingConfig(), "torn")
    tracker.log(1, {"a": 9.0})
    tracker.log(2, {"a": 2.0})
    tracker.close()
    assert [(row["images"], row["metrics"]) for row in rows_of(path)] == [(1, {"a": 1.0}), (2, {"a": 2.0})]


def test_a_cursor_does_not_see_a_line_still_being_written(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "rows.jsonl")
    cursor = Cursor(spool)
    spool.append({"n": 1})
    with spool.path.open("ab") as other:
        other.write(b'{"n":')
    assert cursor.pending() == [{"n": 1}]
    cursor.advance(cursor.pending())
    with spool.path.open("ab") as other:
        other.write(b"2}\n")
    assert cursor.pending() == [{"n": 2}]
    spool.close()


def test_non_finite_values_become_events(tmp_path: Path) -> None:
    run = open_storage(str(tmp_path))
    tracker = Tracker(run, TrackingConfig(), "nan")
    tracker.log(4, {"train/grad_norm": float("inf"), "train/bits_per_dim": 2.0})
    tracker.close()
    assert b"Infinity" not in run.read("metrics.jsonl")
    assert b'"images":4,"key":"train/grad_norm","kind":"nonfinite"' in run.read("events.jsonl")


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    tracker = Tracker(open_storage(str(tmp_path / "run")), TrackingConfig(uri="http://127.0.0.1:9"), "one", rank=1)
    tracker.start({})
    tracker.log(1, {"a": 1.0})
    tracker.event("x")
    tracker.image("t", 1, Image.new("RGB", (2, 2)))
    tracker.artifact("x")
    tracker.sync()
    tracker.close()
    assert not (tmp_path / "run").exists()


def test_a_param_that_may_not_change_in_mlflow_becomes_a_tag(tmp_path: Path) -> None:
    uri = fresh_database(tmp_path)
    for rate in ("0.001", "0.002"):
        tracker = Tracker(open_storage(str(tmp_path / "run")), TrackingConfig(uri=uri), "run")
        tracker.start({"optim.lr": rate})
        tracker.close()
    stored = connect(uri).get_run(only_run(uri)).data
    assert stored.params == {"optim.lr": "0.001"}
    assert stored.tags["changed.optim.lr"] == "0.002"


def test_params_hold_neither_addresses_nor_secrets() -> None:
    config = TrainConfig(
        storage="s3://user:secret@host/runs",
        data=DataConfig(prefix="s3://user:secret@host/data", digest="ab", cache="/home/somebody"),
        tracking=TrackingConfig(uri="http://user:secret@host"),
    )
    params = flat_params(config)
    assert params["data.digest"] == "ab"
    assert params["model.levels"] == "6"
    assert not [value for value in params.values() if "secret" in value or "somebody" in value]


@pytest.mark.parametrize(
    ("told", "shown"),
    [
        ("http://user:secret@host/x and s3://k:secret@b", "http://host/x and s3://b"),
        ("http://user:se/cr@secret@host:5000/x", "http://host:5000/x"),
        ("at https://host:5000/x?token=secret, answers 500", "at https://host:5000/x answers 500"),
        ("postgresql://u@host/db?password=secret", "postgresql://host/db"),
        ("http://host:5000/a@b models:/faces@champion s3://b/a:1@2 a@b?c", None),
    ],
)
def test_an_address_is_told_without_its_secrets(told: str, shown: str | None) -> None:
    assert redact(told) == (shown or told)
    error = RemoteError(told, where=told, cure=told)
    assert "secret" not in f"{error} {error.where} {error.args}"


def test_means_are_means_since_the_last_take() -> None:
    means = Means()
    means.add({"a": 1.0, "b": 5.0})
    means.add({"a": 3.0})
    assert means.take() == {"a": 2.0, "b": 5.0}
    assert means.take() == {}


def test_a_full_spool_is_said_once_and_training_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spool = Spool(tmp_path / "rows.jsonl", limit=100)
    taken = [spool.append({"n": number}) for number in range(20)]
    assert taken == [True] * 12 + [False] * 8
    assert spool.path.stat().st_size <= 100
    assert [row["n"] for row in spool.rows()] == list(range(12))
    spool.close()
    tracker = Tracker(open_storage(str(tmp_path / "run")), TrackingConfig(), "full", room=200)
    for images in range(1, 50):
        tracker.log(images, {"a": 1.0})
    tracker.close()
    assert (tmp_path / "run" / "metrics.jsonl").stat().st_size <= 200
    assert capsys.readouterr().err.count("metrics.jsonl is full; what follows is not recorded") == 1


def test_a_long_backlog_is_read_in_portions(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "rows.jsonl")
    for number in range(3000):
        spool.append({"n": number, "text": "x" * 200})
    cursor = Cursor(spool)
    assert cursor.left() == 3000
    assert 0 < len(cursor.pending()) < 1500
    assert [row["n"] for row in spool.rows()] == list(range(3000))
    spool.append({"n": 0, "text": "y" * (1 << 19)})
    assert len(list(spool.rows())) == 3001
    spool.close()
