"""Training through the command: plain, torchrun and Ray end in the same bits, killed or not, and leave nothing."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from glow import GlowConfig
from jobs.__main__ import main
from jobs.preflight import gpu_room, refuse_full, worker_bytes
from pipeline.config import MemoryConfig, TrainConfig
from pipeline.errors import ConfigError
from pipeline.spool import parse_rows
from pipeline.storage import open_storage
from tests.jobs.runs import (
    Traces,
    config_of,
    dataset,
    followed,
    jobs,
    left_processes,
    place,
    settings,
    tensors_of,
    upload,
)
from tests.reliability import measured
from tests.running import RunningStack

IMAGES = 2400


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process, which every other way of running must equal."""
    folder = tmp_path_factory.mktemp("plain")
    code, output = followed(jobs("train", *settings(folder, IMAGES), "--name", "plain"))
    assert code == 0, output
    assert f"images {IMAGES}/{IMAGES}" in output
    return folder / "runs" / "plain"


def resumed(run: Path | str) -> list[int]:
    """Where a run went on, time and again."""
    events = parse_rows(open_storage(str(run)).read("events.jsonl"))
    return [event["images"] for event in events if event["kind"] == "resumed"]


@pytest.fixture
def traces() -> Traces:
    return Traces()


def test_a_run_leaves_its_settings_beside_it(plain: Path) -> None:
    config = config_of(plain)
    assert config.name == "plain"
    assert config.model.size == 16
    assert config.data.digest


def test_torchrun_on_two_processes_learns_the_same(plain: Path, tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "jobs"]
    code, output = followed([*launcher, "train", *settings(tmp_path, IMAGES), "--name", "two"])
    assert code == 0, output
    assert output.count(f"images {IMAGES}/{IMAGES}") == 1, "rank 0 alone speaks"
    assert tensors_of(tmp_path / "runs" / "two") == tensors_of(plain)


def torchrun(workers: int, words: list[str], kill: tuple[str, str] = ("never", "")) -> tuple[int, str]:
    """Train on so many real ranks; at a line with the one word SIGKILL for the rank of the other."""

    def strike(launcher: psutil.Process, line: str) -> None:
        if kill[0] in line:
            (rank,) = (each for each in launcher.children() if each.environ().get("RANK") == kill[1])
            rank.kill()

    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers), "-m", "jobs"]
    return followed([sys.executable, *launcher, "train", *words], strike)


@pytest.mark.nightly
def test_the_loop_learns_each_sample_once_over_kills_and_other_numbers_of_ranks(
    stack: RunningStack, s3: str, tmp_path: Path
) -> None:
    """Promise R7, from the stack's S3 and into it: 2 ranks, kill -9, 3 ranks, kill -9 of the first, 1 rank.

    What the loop learned shows in its tensors: noise and gradient are those of the samples of each batch, so a sample
    left out, learned twice or in another batch gives other bits than the run of one rank that nobody stopped.
    """
    assert stack.s3_environment["AWS_ENDPOINT_URL"] == os.environ["AWS_ENDPOINT_URL"]
    images, runs = 960, f"{s3}/ranks/runs"
    words = [*settings(tmp_path, images), "--schedule.leaf", "4", "--cluster.lease-s", "5"]
    words += ["--data.prefix", upload(f"{s3}/ranks/data"), "--storage", runs]
    code, output = torchrun(1, [*words, "--name", "calm"])
    assert code == 0, output
    words += ["--name", "killed"]
    for workers, line, rank in ((2, "images 320/", "1"), (3, "images 640/", "0")):
        code, output = torchrun(workers, words, (line, rank))
        assert code != 0, output
    code, output = torchrun(1, words)
    assert code == 0, output
    first, second = resumed(f"{runs}/killed")
    assert 160 <= first <= 320 < 480 <= second <= 640, "at most an interval lost"
    rows = parse_rows(open_storage(f"{runs}/killed").read("metrics.jsonl"))
    places = [row["images"] for row in rows if "train/bits_per_dim" in row["metrics"]]
    assert places == list(range(160, images + 1, 160)), "a line of positions without gap or step back"
    assert tensors_of(f"{runs}/killed") == tensors_of(f"{runs}/calm")


def test_two_ray_workers_and_a_kill_learn_the_same(plain: Path, tmp_path: Path, traces: Traces) -> None:
    """Promise R1: SIGKILL of a worker, back from the last checkpoint, final tensors bit-equal to an unbroken run."""
    killed: list[float] = []

    def kill(process: psutil.Process, line: str) -> None:
        if line.startswith("images 480/") and not killed:
            workers = [p for p in process.children(recursive=True) if p.name().startswith("ray::RayTrainWo")]
            assert len(workers) == 2
            # A worker on another host never saw the folder of Ray Train's notes (docs/decisions/0015).
            (notes,) = place().glob("glow-tmp-*/f/train")
            shutil.rmtree(notes)
            killed.append(time.monotonic())
            workers[1].send_signal(signal.SIGKILL)
        if line.startswith("2 workers at work") and killed:
            measured("R1", "from SIGKILL of a worker to two at work (Ray)", time.monotonic() - killed[0], "s")

    words = settings(tmp_path, IMAGES)
    code, output = followed(jobs("train", *words, "--name", "two", "--cluster.workers", "2"), kill)
    assert code == 0, output
    assert killed
    assert "all go on from the last checkpoint" in output
    assert not [line for line in output.splitlines() if "pid=" in line or "Traceback" in line], output
    assert [images >= 320 for images in resumed(tmp_path / "runs" / "two")] == [True], "at most an interval lost"
    assert tensors_of(tmp_path / "runs" / "two") == tensors_of(plain)
    traces.check("a run of which a worker was killed")


def test_a_refusal_on_a_worker_is_final_and_keeps_its_exit_code(tmp_path: Path, traces: Traces) -> None:
    words = [*settings(tmp_path, IMAGES), "--data.digest", "0" * 64, "--cluster.workers", "2"]
    code, output = followed(jobs("train", *words))
    assert code == 3, output
    last = output.splitlines()[-1]
    assert last.startswith("error: ")
    assert "the run is pinned to 000000000000" in last
    assert "go on from the last checkpoint" not in output, "not tried again"
    traces.check("a refusal on a worker")


ENDS = ((signal.SIGTERM, 143), (signal.SIGINT, 130))


@pytest.mark.parametrize(("number", "code"), ENDS)
def test_a_signal_ends_a_plain_run_after_a_checkpoint_with_its_own_exit_code(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    def stop(process: psutil.Process, line: str) -> None:
        if line.startswith("images 160/"):
            process.send_signal(number)

    found, output = followed(jobs("train", *settings(tmp_path, IMAGES), "--name", "stopped"), stop)
    assert found == code, output
    assert "stopped after a checkpoint at" in output.splitlines()[-1]


@pytest.mark.parametrize(("number", "expected"), [ENDS[0], pytest.param(*ENDS[1], marks=pytest.mark.nightly)])
def test_a_signal_ends_a_ray_run_and_the_same_command_goes_on(
    plain: Path, tmp_path: Path, traces: Traces, number: signal.Signals, expected: int
) -> None:
    words = jobs("train", *settings(tmp_path, IMAGES), "--name", "stopped", "--cluster.workers", "2")

    def stop(process: psutil.Process, line: str) -> None:
        if line.startswith("images 480/"):
            process.send_signal(number)

    code, output = followed(words, stop)
    assert code == expected, output
    stopped = re.search(r"stopped after a checkpoint at (\d+) images", output.splitlines()[-1])
    assert stopped
    traces.check("a run that was stopped by a signal")
    # One process goes on where two stopped.
    assert followed(jobs("train", *settings(tmp_path, IMAGES), "--name", "stopped"))[0] == 0
    (images,) = resumed(tmp_path / "runs" / "stopped")
    measured("R4", "two Ray workers stopped by a signal: lost", int(stopped[1]) - images, "images")
    assert images == int(stopped[1]), "0 steps lost"
    assert tensors_of(tmp_path / "runs" / "stopped") == tensors_of(plain)


def test_a_dry_run_tells_the_plan_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = settings(tmp_path, IMAGES)
    before = sorted(tmp_path.rglob("*")), sorted(dataset().rglob("*"))
    assert main(["train", *words, "--dry-run"]) == 0
    assert (sorted(tmp_path.rglob("*")), sorted(dataset().rglob("*"))) == before
    plan = capsys.readouterr().out
    for told in (
        "a new run", "2 leaves of 8", "2 400 images in 150 steps of 16", "144 images of 16 px", "9 shards in 1",
        "L2 K2 width 16", "latents      6x8x8, 24x4x4", "anchor_every by level", "checkpoint",
    ):  # fmt: skip
        assert told in plan, plan


@pytest.mark.nightly
def test_a_killed_driver_leaves_no_process_and_the_next_start_no_folder(
    plain: Path, tmp_path: Path, traces: Traces
) -> None:
    """Promise R2: the driver killed, the same command goes on; what Ray left ends by itself or is swept."""
    words = jobs("train", *settings(tmp_path, IMAGES), "--name", "orphaned", "--cluster.workers", "2")

    def kill(process: psutil.Process, line: str) -> None:
        if line.startswith("images 480/"):
            process.send_signal(signal.SIGKILL)

    assert followed(words, kill)[0] == -signal.SIGKILL
    deadline = time.monotonic() + 120
    while left_processes() and time.monotonic() < deadline:
        time.sleep(1)
    assert left_processes() == []
    code, output = followed(words)
    assert code == 0, output
    traces.check("a run whose driver was killed")
    assert tensors_of(tmp_path / "runs" / "orphaned") == tensors_of(plain)


def test_preflight_refuses_in_a_line_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before a worker is asked for: a prefix that cannot be written, memory and disk that do not suffice."""
    (tmp_path / "file").write_text("in the way")
    words = settings(tmp_path, IMAGES)
    before = sorted(tmp_path.rglob("*"))
    for changed, said in (
        (["--storage", str(tmp_path / "file" / "runs")], "Not a directory; check the folder's rights"),
        (["--schedule.batch", "4194304", "--schedule.leaf", "4194304"], "no room: memory of the workers"),
        (["--data.prefix", str(tmp_path)], "no dataset here"),
        (["--model.levels", "5"], "size 16 is not divisible by 2^5"),
    ):
        code = main(["train", *words, *changed])
        told = capsys.readouterr().err
        assert (code in (3, 4), told.count("\n"), said in told) == (True, 1, True), told
    assert set(tmp_path.rglob("*")) - {tmp_path / "runs"} == set(before)


def test_a_plan_that_a_gpu_cannot_hold_is_refused_in_a_line() -> None:
    model = GlowConfig(size=32, channels=3, levels=3, steps=8, width=64, classes=0, attributes=0)
    stored = TrainConfig(name="wide", model=model, memory=MemoryConfig(anchor_every=(0,)))
    inverted = replace(stored, memory=MemoryConfig(anchor_every="plan"))
    needed = worker_bytes(stored)
    refuse_full([gpu_room(stored, needed), gpu_room(inverted, 2 * needed // 3)])
    with pytest.raises(ConfigError, match=r"^no room: memory of a GPU [\d.]+ MB of .* free; --memory.anchor"):
        refuse_full([gpu_room(stored, needed - 1)])
