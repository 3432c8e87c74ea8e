"""The demo: killed anywhere and run again it ends in the same artifact, and a second run makes nothing anew."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from jobs.showcase import artifact_in, artifact_of
from pipeline.photos import photographs, write_crops
from pipeline.registry import load_model
from tests.jobs.runs import followed, jobs, started
from tests.mlflow_db import MLFLOW_NOISE
from tests.pipeline.test_model import LOADER, ROOT, seen

STAGES = 6
pytestmark = MLFLOW_NOISE


def command(folder: Path) -> list[str]:
    return [sys.executable, "-m", "tests.jobs.tiny_demo", str(folder)]


def artifact(output: str) -> str:
    """The champion's digest, as the demo says it."""
    found = re.search(r"@champion: artifact ([0-9a-f]{64})", output)
    assert found, output
    return found[1]


def state(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file with its size and time, but for what reading a database touches."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith("mlflow.db") and path.parent.name != "cache"
    }


def kill(process: psutil.Process) -> None:
    """SIGKILL a command and everything it started, in no gentle order."""
    for each in [process, *process.children(recursive=True)]:
        if each.is_running():
            each.send_signal(signal.SIGKILL)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A demo nobody disturbed: (folder, output)."""
    folder = tmp_path_factory.mktemp("demo") / "demo"
    code, output = followed(command(folder))
    assert code == 0, output
    return folder, output


def test_it_makes_what_it_says(unbroken: tuple[Path, str]) -> None:
    folder, output = unbroken
    for told in ("bits/dim on held-out images; PNG", "WEBP", "samples.png", "report.html", "try next:"):
        assert told in output
    assert len(re.findall(r"^  \S*python -m ", output.partition("try next:")[2], re.MULTILINE)) == 3
    assert artifact_in(folder / "samples.png") == artifact_of(folder / "report.json") == artifact(output)
    page = (folder / "report.html").read_text()
    assert "bits/dim" in page
    assert "finite_samples" in page, "the gates are in the report"
    with Image.open(folder / "samples.png") as picture:
        assert picture.width > 8 * 128
    assert {path.name for path in folder.iterdir()} == {
        "artifacts", "cache", "data", "mlflow.db", "registry", "report.html", "report.json", "runs", "samples.png",
    }  # fmt: skip


def test_a_second_run_says_what_is_there_and_makes_nothing(unbroken: tuple[Path, str]) -> None:
    folder, first = unbroken
    before = state(folder)
    code, output = followed(command(folder))
    assert code == 0, output
    assert "is there already" in output
    assert "images 80/480" not in output
    assert artifact(output) == artifact(first)
    assert state(folder) == before


def test_killed_at_every_stage_it_ends_in_the_same_artifact(unbroken: tuple[Path, str], tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    for number in range(1, STAGES + 1):

        def stop(process: psutil.Process, line: str, number: int = number) -> None:
            if line.startswith(f"[{number}/{STAGES}]"):
                kill(process)

        code, output = followed(command(folder), stop)
        assert code == -signal.SIGKILL, output
    code, output = followed(command(folder))
    assert code == 0, output
    assert artifact(output) == artifact(unbroken[1])
    assert artifact_in(folder / "samples.png") == artifact(output)


def test_killed_at_random_it_ends_in_the_same_artifact(unbroken: tuple[Path, str], tmp_path: Path) -> None:
    folder, moments = tmp_path / "demo", random.Random(0)
    for _ in range(3):
        with started(command(folder)) as process:
            time.sleep(moments.uniform(2, 12))
            if process.poll() is None:
                kill(psutil.Process(process.pid))
            process.communicate(timeout=60)
    code, output = followed(command(folder))
    assert code == 0, output
    assert artifact(output) == artifact(unbroken[1])


def test_half_written_pictures_are_made_again(unbroken: tuple[Path, str]) -> None:
    folder, first = unbroken
    (folder / "report.json").unlink()
    (folder / "samples.png").unlink()
    (folder / "runs" / "tiny" / "eval" / "val.json").unlink()
    code, output = followed(command(folder))
    assert code == 0, output
    assert artifact_in(folder / "samples.png") == artifact_of(folder / "report.json") == artifact(first)


def test_other_settings_are_refused_with_the_cure(unbroken: tuple[Path, str]) -> None:
    folder, _ = unbroken
    code = f"""
import sys
from dataclasses import replace
from pathlib import Path
from jobs.__main__ import main
from jobs.demo import Demo
from tests.jobs.tiny_demo import tiny
from pipeline.errors import ConflictError
demo = tiny(Path({str(folder)!r}))
other = Demo(replace(demo.config, seed=1), demo.pictures, demo.folder, 0)
try:
    other.train()
except ConflictError as error:
    sys.exit("--again trains it anew" in str(error) and 6)
"""
    assert followed([sys.executable, "-c", code])[0] == 6


def test_crops_of_the_validation_split_share_no_pixel_with_training(tmp_path: Path) -> None:
    assert write_crops(tmp_path / "crops", size=32, train=40, val=20)
    assert not write_crops(tmp_path / "crops", size=32, train=40, val=20)
    again = tmp_path / "again"
    write_crops(again, size=32, train=40, val=20)
    for name, photo in photographs().items():
        border = photo.shape[1] * 4 // 5
        left, right = photo[:, :border], photo[:, border:]
        for split, count, there in (("train", 20, left), ("val", 10, right)):
            files = sorted((tmp_path / "crops" / split / name).iterdir())
            assert len(files) == count
            for file in files:
                assert file.read_bytes() == (again / file.relative_to(tmp_path / "crops")).read_bytes()
                assert occurs(np.asarray(Image.open(file)), there)


def occurs(crop: np.ndarray, photo: np.ndarray) -> bool:
    """Whether a crop is a part of a photograph."""
    corners = np.argwhere((photo[: -crop.shape[0] + 1, : -crop.shape[1] + 1] == crop[0, 0]).all(axis=2))
    return any((photo[y : y + len(crop), x : x + crop.shape[1]] == crop).all() for y, x in corners)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_the_real_demo_survives_kills_too(tmp_path: Path) -> None:
    """toy32 on two Ray workers, killed in every stage and at three random moments: the artifact of two, and of one."""
    words = jobs("demo", "toy32", "--folder")
    code, unbroken = followed([*words, str(tmp_path / "a")])
    assert code == 0, unbroken
    code, alone = followed([*words, str(tmp_path / "c"), "--workers", "0"])
    assert code == 0, alone
    assert artifact(alone) == artifact(unbroken)
    moments = random.Random(0)
    for number in [0, 0, 0, *range(1, STAGES + 1)]:
        with started([*words, str(tmp_path / "b")]) as process:
            assert process.stdout is not None
            if number:
                next(line for line in process.stdout if line.startswith(f"[{number}/"))
            else:
                time.sleep(moments.uniform(5, 60))
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate(timeout=60)
    code, output = followed([*words, str(tmp_path / "b")])
    assert code == 0, output
    assert artifact(output) == artifact(unbroken)


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_the_champion_loads_by_path_in_a_fresh_environment_without_ray_and_mlflow(tmp_path: Path) -> None:
    """toy32's champion, its golden grid to the bit, with what the README says to install for it and nothing else."""
    code, output = followed(jobs("demo", "toy32", "--folder", str(tmp_path / "demo")))
    assert code == 0, output
    champion = load_model("models:/toy32@champion", f"sqlite:///{tmp_path}/demo/mlflow.db")
    (held,) = [path.parent for path in (tmp_path / "demo" / "artifacts").rglob("model.json")]
    model = shutil.copytree(held, tmp_path / "elsewhere" / "model")
    left_out = shutil.ignore_patterns(".*", "build", "demo*", "*.egg-info")
    source = shutil.copytree(ROOT, tmp_path / "code", ignore=left_out)
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    for line in re.findall(r"^pip (install .*)$", (Path(ROOT) / "README.md").read_text(), re.MULTILINE):
        words = [python, "-m", "pip", *line.split(), "--quiet", "--constraint", "constraints.txt"]
        subprocess.run(words, check=True, cwd=source)
    listed = subprocess.run([python, "-m", "pip", "list"], check=True, capture_output=True, text=True).stdout
    assert "glow-pipeline" in listed
    assert not re.search(r"^(ray|mlflow) ", listed, re.MULTILINE)
    bare = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    loading = [python, "-c", LOADER, str(model)]
    done = subprocess.run(loading, capture_output=True, text=True, env=bare, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == seen(champion)
    print(listed, done.stdout)
