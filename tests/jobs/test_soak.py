"""Soak: a run under faults at random ends in the artifact of a run that nobody disturbed, and leaves nothing behind."""

from __future__ import annotations

import os
import shutil
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.export import export_model, read_run
from pipeline.manifest import open_manifest
from pipeline.storage import open_storage
from tests.faulty import cannot_mount
from tests.jobs.runs import (
    CONSTANT,
    ENDLESS,
    TINY,
    followed,
    jobs,
    left_processes,
    settings,
    started,
    tensors_of,
    upload,
)
from tests.jobs.soak import Soak, memory, on_small_disk, soak, worker_sizes
from tests.mlflow_db import MLFLOW_NOISE
from tests.pipeline.test_tracking import history, only_run
from tests.reliability import measured

pytestmark = MLFLOW_NOISE

SEED = 6

EXPECTED = {-signal.SIGKILL, 3, 6, 7}
"""How the command may end under faults: killed; disk full; the last attempt not dead yet; S3 or MLflow away."""


class Attempt:
    """The command once, its lines read by a thread."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.process, self.lines = started(command, environment), list[str]()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
        self.process.stdout.close()

    @property
    def images(self) -> list[str]:
        return [line for line in self.lines if line.startswith("images ")]

    def calm(self, seconds: float) -> list[int]:
        """Bytes of one worker, the longest there, after every status line while nothing is made to fail."""
        sizes, end = dict[int, list[int]](), time.monotonic() + seconds
        while time.monotonic() < end and self.goes_on(1):
            for pid, size in worker_sizes().items():
                sizes.setdefault(pid, []).append(size)
        return max(sizes.values(), key=len, default=[])

    def goes_on(self, count: int) -> bool:
        """Wait for so many more status lines; False where the command ends before."""
        wanted = len(self.images) + count
        while len(self.images) < wanted and self._reader.is_alive():
            time.sleep(0.2)
        return len(self.images) >= wanted

    def end(self) -> int:
        """The exit code, once it has ended."""
        code = self.process.wait()
        self._reader.join()
        return code


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder with a short name for the temporary files of what runs."""
    folder = Path(tempfile.mkdtemp(prefix="gs-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    ("minutes", "calm"), [pytest.param(3, 0, marks=pytest.mark.soak), pytest.param(25, 5, marks=pytest.mark.nightly)]
)
def test_faults_at_random_change_nothing(s3: str, place: Path, tmp_path: Path, minutes: int, calm: int) -> None:
    """Workers and driver killed, S3 and MLflow away, the disk full, in an order a seed decides; then minutes of calm.

    Under faults a worker lives half a minute: that it does not grow shows in one that is left alone.
    """
    if why := cannot_mount(tmp_path / "disk"):
        pytest.skip(why)
    data, runs = upload(f"{s3}/soak-{minutes}/data"), f"{s3}/soak-{minutes}/runs"
    (tmp_path / "tiny.toml").write_text(TINY.format(images=ENDLESS))
    places = ["--data.prefix", data, "--storage", runs, "--name", "soak"]
    words = ["toy32", "--config", str(tmp_path / "tiny.toml"), *places, *CONSTANT,
             "--cluster.workers", "2", "--cluster.max-failures", "1000", "--cluster.lease-s", "20"]  # fmt: skip
    with soak(tmp_path, os.environ["AWS_ENDPOINT_URL"], SEED) as trouble:
        words += ["--tracking.uri", trouble.mlflow.uri, "--data.cache", str(trouble.disk / "cache")]
        environment = {"AWS_ENDPOINT_URL": trouble.proxy, "TMPDIR": str(place)}
        command = on_small_disk(trouble.disk, jobs("train", *words))
        sizes, calm_sizes, codes = endured(trouble, command, environment, 60.0 * minutes, 60.0 * calm)
        steps = [step for step, _ in history(trouble.mlflow.uri, only_run(trouble.mlflow.uri), "train/bits_per_dim")]
    print(f"struck {trouble.struck}, ended with {codes}, workers of {[size >> 20 for size in sizes]} MB")
    print(f"then one left alone: {[size >> 20 for size in calm_sizes]} MB")
    assert set(trouble.struck) == set(trouble.kinds)
    assert set(codes[:-1]) <= EXPECTED
    assert steps == sorted(set(steps)), "one MLflow run, each row once and in order"
    assert growth(sizes) < 1.25, "workers that follow one another do not grow"
    if calm:
        assert len(calm_sizes) >= 20
        assert growth(calm_sizes) < 1.03, "memory is flat"
    assert left_processes() == []
    assert [path.name for path in place.iterdir() if "torchinductor" not in path.name] == []

    trained = read_run(open_storage(f"{runs}/soak"))
    code, output = followed(jobs("train", *settings(tmp_path, trained.images), "--name", "soak", *CONSTANT))
    assert code == 0, output
    undisturbed = tmp_path / "runs" / "soak"
    assert tensors_of(undisturbed) == tensors_of(f"{runs}/soak")
    manifest = open_manifest(open_storage(data))
    assert export_model(trained, manifest) == export_model(read_run(open_storage(str(undisturbed))), manifest)
    name = f"soak of {minutes + calm} min"
    measured("R1", f"{name}: faults of which the result knows nothing", sum(trouble.struck.values()), "faults")
    if calm:
        what = f"{name}: memory of a worker left alone for the last {calm}, second half over first"
        measured("R22", what, growth(calm_sizes), "times")


def growth(sizes: list[int]) -> float:
    """The median of the second half over that of the first."""
    middle = len(sizes) // 2
    return statistics.median(sizes[middle:]) / statistics.median(sizes[:middle])


def endured(
    trouble: Soak, command: list[str], environment: dict[str, str], seconds: float, calm: float
) -> tuple[list[int], list[int], list[int]]:
    """Give the command again and again under faults, leave it alone, stop it; sizes of workers then, exit codes."""
    sizes, calm_sizes, codes = list[int](), list[int](), list[int]()
    order, end = trouble.order(), time.monotonic() + seconds
    while not codes or codes[-1] != 143:
        attempt = Attempt(command, environment)
        trouble.pid = attempt.process.pid
        while attempt.goes_on(3) and (time.monotonic() < end or set(trouble.struck) < set(trouble.kinds)):
            sizes.append(memory())
            trouble.strike(next(order))
        if attempt.process.poll() is None:
            calm_sizes = attempt.calm(calm)
            attempt.process.send_signal(signal.SIGTERM)
        codes.append(attempt.end())
        print(f"exit {codes[-1]}: {attempt.lines[-1].strip() if attempt.lines else ''}", flush=True)
    return sizes, calm_sizes, codes
