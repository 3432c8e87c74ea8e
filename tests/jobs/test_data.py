"""`jobs data`: from toy faces and photographs to datasets, over kills, into S3."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import uuid
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from jobs.data import main
from pipeline.errors import ConflictError, DataError, PipelineError, UsageError
from pipeline.manifest import Manifest, open_manifest
from pipeline.shards import decode, open_shard
from pipeline.storage import Storage, open_storage, sha256_file, sha256_hex
from pipeline.toy import toy_image, write_toy
from pipeline.workers import ordered_map
from tests.pipeline.layouts import add, celebamask_hq, pixels_of, png, shard_writer, write
from tests.pipeline.test_shards import png_that_claims
from tests.running import RunningStack

COMMAND = [sys.executable, "-m", "jobs", "data"]


@pytest.fixture(scope="session")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faces") / "toy"
    assert write_toy(folder, images=120, size=16, seed=0)
    return folder


def prepared(source: Path, dest: str, *options: str) -> Manifest:
    assert main(["prepare", str(source), dest, "--workers", "1", *options]) == 0
    return open_manifest(open_storage(dest))


def contents(storage: Storage) -> dict[str, bytes]:
    return {key: storage.read(key) for key in storage.list()}


def test_toy_faces_become_a_dataset(faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = prepared(faces, str(tmp_path / "set"), "--samples-per-shard", "50")
    assert {name: split.samples for name, split in manifest.splits.items()} == {"train": 108, "val": 12}
    assert [shard.samples for shard in manifest.split("train").shards] == [50, 50, 8]
    assert (manifest.size, manifest.channels, len(manifest.attributes), len(manifest.editable)) == (16, 3, 40, 12)
    assert sum(manifest.splits["train"].counts.labels) == 108
    assert manifest.labels == ("gradient", "horizon", "spotlight", "stripes")
    assert "building" not in {key.split("/")[0] for key in manifest.storage.list()}
    truth = [json.loads(line) for line in (faces / "truth.jsonl").read_text().splitlines()]
    first, seen = 0, set()
    for shard in manifest.split("train").shards:
        path = tmp_path / "set" / shard.file
        assert (path.stat().st_size, sha256_file(path)) == (shard.bytes, shard.sha256)
        with open_shard(path, shard.samples) as index:
            for row in range(len(index)):
                image, meta = index.read(row)
                number = int(Path(meta["source"]).stem)
                assert np.array_equal(decode(image, 16, 3), toy_image(0, number, 16).transpose(2, 0, 1))
                assert manifest.labels[meta["label"]] == truth[number]["style"]
                assert meta["source_sha256"] == sha256_file(faces / meta["source"])
                seen.add(number)
        first += shard.samples
    assert len(seen) == first == 108
    assert manifest.digest in capsys.readouterr().out


def test_the_same_bytes_from_any_number_of_workers(faces: Path, tmp_path: Path) -> None:
    one = prepared(faces, str(tmp_path / "one"), "--samples-per-shard", "20")
    two = prepared(faces, str(tmp_path / "two"), "--samples-per-shard", "20", "--workers", "2")
    assert one.digest == two.digest
    assert contents(one.storage) == contents(two.storage)


def test_class_folders_do_not_become_one_class_shards(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for label in ("cat", "dog"):
        for number in range(40):
            path = tmp_path / "source" / label / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    manifest = prepared(tmp_path / "source", str(tmp_path / "set"), "--samples-per-shard", "18")
    for shard in manifest.split("train").shards:
        with open_shard(tmp_path / "set" / shard.file, shard.samples) as index:
            labels = [index.read(row)[1]["label"] for row in range(len(index))]
        assert 0 < sum(labels) < len(labels)


def test_again_says_so_and_changes_nothing(faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = prepared(faces, str(tmp_path / "set"))
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "set").iterdir()}
    capsys.readouterr()
    assert prepared(faces, str(tmp_path / "set")).digest == first.digest
    assert "holds exactly this dataset already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "set").iterdir()} == times


@pytest.mark.parametrize("options", [("--seed", "1"), ("--size", "8"), ("--max-images", "60"), ("--license", "MIT")])
def test_another_dataset_is_a_conflict(faces: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    before = contents(prepared(faces, str(tmp_path / "set")).storage)
    with pytest.raises(ConflictError, match="another dataset is here; choose another prefix"):
        prepared(faces, str(tmp_path / "set"), *options)
    assert contents(open_storage(str(tmp_path / "set"))) == before


def test_a_prefix_with_other_files_is_left_alone(faces: Path, tmp_path: Path) -> None:
    (tmp_path / "train-000000.tar").write_bytes(b"somebody else's")
    with pytest.raises(ConflictError, match="not empty"):
        prepared(faces, str(tmp_path), "--restart")
    assert [path.name for path in tmp_path.iterdir()] == ["train-000000.tar"]


def test_a_dry_run_writes_nothing(faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", str(faces), str(tmp_path / "set"), "--dry-run", "--max-images", "50"]) == 0
    said = capsys.readouterr().out
    assert "50 images, 16x16 RGB, 4 classes, 40 attributes" in said
    assert "train: 45 images in 1 shards" in said
    assert not (tmp_path / "set").exists()


def test_size_is_reached_and_recorded(faces: Path, tmp_path: Path) -> None:
    manifest = prepared(faces, str(tmp_path / "set"), "--size", "8", "--max-images", "30")
    assert (manifest.size, manifest.image.resize, manifest.image.crop) == (8, "lanczos", "none")


@pytest.mark.parametrize("option", ["--size", "--max-images", "--samples-per-shard", "--workers"])
def test_numbers_below_zero_are_refused(tmp_path: Path, option: str) -> None:
    source = images(tmp_path / "source", *[("RGB", (8, 8))] * 12)
    with pytest.raises(UsageError, match=f"{option} -3; give 0 or more"):
        main(["prepare", str(source), str(tmp_path / "set"), option, "-3"])
    assert not (tmp_path / "set").exists()


def images(root: Path, *forms: tuple[str, tuple[int, int]]) -> Path:
    for number, (mode, size) in enumerate(forms):
        root.mkdir(exist_ok=True)
        Image.new(mode, size).save(root / f"{number}.png")
    return root


@pytest.mark.parametrize(
    ("forms", "options", "message"),
    [
        ([("RGB", (8, 8)), ("RGB", (9, 9))], (), r"px, others differ; --size N"),
        ([("RGB", (8, 9))], (), r"0\.png: 8x9 px, not square; --size N"),
        ([("RGB", (8, 9))], ("--size", "10"), r"0\.png: 8x9 px is smaller than --size 10; choose at most 8"),
        ([("RGB", (8, 8)), ("RGBA", (8, 8))], (), r"1\.png: RGBA with alpha.*--convert"),
        ([("RGB", (8, 8)), ("L", (8, 8))], (), r"1\.png: grey, and others are in colour; --convert"),
    ],
)
def test_refusals_name_the_file_and_the_cure(
    tmp_path: Path, forms: list[tuple[str, tuple[int, int]]], options: tuple[str, ...], message: str
) -> None:
    source = images(tmp_path / "source", *forms)
    with pytest.raises(DataError, match=message):
        prepared(source, str(tmp_path / "set"), *options)


def test_convert_takes_them(tmp_path: Path) -> None:
    source = images(tmp_path / "source", *[("RGB", (8, 8)), ("RGBA", (9, 8)), ("L", (8, 8))] * 4)
    manifest = prepared(source, str(tmp_path / "set"), "--convert", "--size", "8")
    assert (manifest.channels, manifest.image.crop, manifest.image.resize) == (3, "center", "none")
    assert prepared(images(tmp_path / "grey", *[("L", (8, 8))] * 10), str(tmp_path / "grey-set")).channels == 1


def test_one_line_and_an_exit_code(faces: Path, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "broken.png").write_bytes(b"no picture")
    command = [*COMMAND, "prepare", str(tmp_path / "source"), str(tmp_path / "set")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 4
    assert len(done.stderr.splitlines()) == 1
    assert "broken.png: not a picture we read" in done.stderr


GOOD = png(pixels_of(0, 16))
DAMAGED = {
    "cut": GOOD[: len(GOOD) // 2],
    "flipped": GOOD[: len(GOOD) // 2] + bytes([GOOD[len(GOOD) // 2] ^ 255]) + GOOD[len(GOOD) // 2 + 1 :],
    "bomb": png_that_claims(13300, 13300),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_png_is_a_line_with_its_name(tmp_path: Path, name: str) -> None:
    found = r"13300x13300 px, more than" if name == "bomb" else r"does not decode"
    for number in range(12):
        write(tmp_path / "source" / f"{number}.png", DAMAGED[name] if number == 3 else png(pixels_of(number, 16)))
    with pytest.raises(DataError, match=rf"source/3\.png: {found}"):
        prepared(tmp_path / "source", str(tmp_path / "set"))
    with tarfile.open(tmp_path / "train-0.tar", "w") as archive:
        add(archive, "3.png", DAMAGED[name])
    with pytest.raises(DataError, match=rf"train-0\.tar/3: (image )?{found}"):
        main(["prepare", str(tmp_path), "--in-place", "--workers", "1"])


def test_verify_names_every_damaged_shard(faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = prepared(faces, str(tmp_path / "set"), "--samples-per-shard", "30")
    assert main(["verify", str(tmp_path / "set"), "--deep", "--workers", "1"]) == 0
    assert main(["verify", str(tmp_path / "set")]) == 0
    flipped, cut, lost = (tmp_path / "set" / shard.file for shard in manifest.split("train").shards[:3])
    flipped.write_bytes(flipped.read_bytes()[:5000] + b"\xff" + flipped.read_bytes()[5001:])
    assert main(["verify", str(tmp_path / "set")]) == 0
    cut.write_bytes(cut.read_bytes()[:10240])
    lost.unlink()
    capsys.readouterr()
    with pytest.raises(DataError, match="2 problems"):
        main(["verify", str(tmp_path / "set")])
    with pytest.raises(DataError, match="3 problems"):
        main(["verify", str(tmp_path / "set"), "--deep", "--workers", "2"])
    said = capsys.readouterr().err
    assert f"{flipped.name}: sha256 {sha256_file(flipped)[:12]}, expected" in said
    assert f"{cut.name}: 10240 bytes, expected" in said
    assert f"{lost.name}: no such object" in said
    with pytest.raises(DataError):
        prepared(faces, str(tmp_path / "set"), "--samples-per-shard", "30")


def test_verify_finds_what_digests_cannot(faces: Path, tmp_path: Path) -> None:
    """A manifest that agrees with its shards' bytes but not with what they hold."""
    manifest = prepared(faces, str(tmp_path / "set"))
    text = (tmp_path / "set" / "manifest.json").read_text()
    counts = manifest.splits["train"].counts.labels
    wrong = [counts[0] + 1, counts[1] - 1, *counts[2:]]
    old, new = (json.dumps(list(row), separators=(",", ":")) for row in (counts, wrong))
    (tmp_path / "set" / "manifest.json").write_text(text.replace(old, new))
    with pytest.raises(DataError, match="1 problems"):
        main(["verify", str(tmp_path / "set"), "--deep", "--workers", "1"])


def test_show(faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = prepared(faces, str(tmp_path / "set"))
    capsys.readouterr()
    sheet = tmp_path / "sheet.png"
    assert main(["show", str(tmp_path / "set"), "--sheet", str(sheet), "--images", "9"]) == 0
    said = capsys.readouterr().out
    assert "| train | 108 | 1 |" in said
    assert manifest.digest in said
    with Image.open(sheet) as image:
        assert image.width >= 3 * 64
        assert image.height > 3 * 64
    assert main(["show", str(tmp_path / "set"), "--sheet", str(tmp_path / "new" / "x.png"), "--images", "1"]) == 0
    with pytest.raises(UsageError, match=r"--images 0; give 1 or more"):
        main(["show", str(tmp_path / "set"), "--sheet", str(sheet), "--images", "0"])
    with pytest.raises(UsageError, match=r"sheet\.png/x\.png: "):
        main(["show", str(tmp_path / "set"), "--sheet", str(sheet / "x.png")])
    shard = tmp_path / "set" / "train-000000.tar"
    data = bytearray(shard.read_bytes())
    data[data.find(b"IDAT") + 20] ^= 255
    shard.write_bytes(data)
    with pytest.raises(DataError, match=r"train-000000\.tar: sha256 [0-9a-f]{12}, expected [0-9a-f]{12}; restore"):
        main(["show", str(tmp_path / "set"), "--sheet", str(sheet)])


def killed_while_building(command: list[str], dest: Path, shards: int) -> None:
    """Start a build in its own process and kill it once it has finished so many shards; its children end too."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while len(list(dest.glob("building/*.tar.json"))) < shards and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.005)
    children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert alive == []


@pytest.mark.parametrize("shards", [0, 1, 5])
def test_a_killed_build_goes_on(faces: Path, tmp_path: Path, shards: int) -> None:
    whole = prepared(faces, str(tmp_path / "whole"), "--samples-per-shard", "5")
    dest = tmp_path / "set"
    command = [*COMMAND, "prepare", str(faces), str(dest), "--samples-per-shard", "5", "--workers", "2"]
    killed_while_building(command, dest, shards)
    noted = [path.name.removesuffix(".json") for path in dest.glob("building/*.tar.json")]
    kept = {name: (dest / name).stat().st_mtime_ns for name in noted}
    again = prepared(faces, str(dest), "--samples-per-shard", "5")
    assert again.storage.list("building") == []
    assert again.digest == whole.digest
    assert contents(again.storage) == contents(whole.storage)
    assert {name: (dest / name).stat().st_mtime_ns for name in noted} == kept


@pytest.mark.nightly
def test_thirty_thousand_pictures_have_one_digest(tmp_path: Path) -> None:
    """One worker, two, and two that were killed: every byte the same; docs/data-format.md has the time."""
    source, many = tmp_path / "source", ("--workers", "2")
    celebamask_hq(source, 30_000)
    one = prepared(source, str(tmp_path / "one"))
    assert sum(split.samples for split in one.splits.values()) == 30_000
    two = prepared(source, str(tmp_path / "two"), *many)
    command = [*COMMAND, "prepare", str(source), str(tmp_path / "killed"), *many]
    killed_while_building(command, tmp_path / "killed", 20)
    assert not (tmp_path / "killed" / "manifest.json").exists()
    again = prepared(source, str(tmp_path / "killed"), *many)
    assert one.digest == two.digest == again.digest
    sums = [{key: sha256_hex(each.storage.read(key)) for key in each.storage.list()} for each in (one, two, again)]
    assert sums[0] == sums[1] == sums[2]


@pytest.fixture
def unfinished(faces: Path, tmp_path: Path) -> Path:
    """A build that was killed soon after it had claimed its prefix."""
    dest = tmp_path / "set"
    source = tmp_path / "source"
    source.mkdir()
    for index in range(20):
        Image.fromarray(toy_image(0, index, 16)).save(source / f"{index}.png")
    process = subprocess.Popen([*COMMAND, "prepare", str(source), str(dest), "--samples-per-shard", "2"])
    while not (dest / "building" / "plan.json").exists():
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (dest / "manifest.json").exists()
    return dest


def test_an_unfinished_build_of_another_plan_is_a_conflict(unfinished: Path, faces: Path) -> None:
    with pytest.raises(ConflictError, match=r"an unfinished build of other pictures or options is here.*--restart"):
        prepared(faces, str(unfinished))
    manifest = prepared(faces, str(unfinished), "--restart")
    shards = {shard.file for split in manifest.splits for shard in manifest.split(split).shards}
    parts = {part.file for split in manifest.splits.values() for part in split.parts}
    assert set(manifest.storage.list()) == shards | parts | {"README.md", "manifest.json"}


def test_a_shard_damaged_after_the_crash_is_packed_again(unfinished: Path, tmp_path: Path) -> None:
    for path in unfinished.glob("*.tar"):
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    options = ("--samples-per-shard", "2")
    manifest = prepared(tmp_path / "source", str(unfinished), *options)
    assert manifest.digest == prepared(tmp_path / "source", str(tmp_path / "clean"), *options).digest
    assert main(["verify", str(unfinished), "--deep", "--workers", "1"]) == 0


def test_into_s3(faces: Path, tmp_path: Path, s3: str) -> None:
    dest = f"{s3}/{uuid.uuid4().hex}/toy"
    local = prepared(faces, str(tmp_path / "set"), "--samples-per-shard", "40")
    remote = prepared(faces, dest, "--samples-per-shard", "40", "--workers", "2")
    assert remote.digest == local.digest
    assert contents(remote.storage) == contents(local.storage)
    assert main(["verify", dest, "--deep", "--workers", "2"]) == 0
    assert prepared(faces, dest, "--samples-per-shard", "40").digest == local.digest
    with pytest.raises(ConflictError):
        prepared(faces, dest, "--seed", "1")


def test_a_cluster_writes_the_same_bytes(faces: Path, tmp_path: Path, stack: RunningStack) -> None:
    """Tasks on the stack's nodes, straight to S3; a refusal of a task is the command's own."""
    local = prepared(faces, str(tmp_path / "set"), "--samples-per-shard", "20")
    address = stack.environment["RAY_API_SERVER_ADDRESS"]
    done = stack.jobs("data", "prepare", str(faces), "s3://glow/by-ray", "--samples-per-shard=20", "--address", address)
    assert local.digest in done.stdout
    with pytest.MonkeyPatch.context() as patch:
        for name, value in stack.s3_environment.items():
            patch.setenv(name, value)
        assert contents(open_storage("s3://glow/by-ray")) == contents(local.storage)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "broken.png").write_bytes(b"no picture")
    words = ["data", "prepare", str(tmp_path / "source"), "s3://glow/broken", "--address", address]
    refused = stack.jobs(*words, check=4).stdout
    assert "error: " in refused
    assert "broken.png: not a picture we read" in refused


def test_shards_of_others_get_a_manifest_in_place_on_s3(tmp_path: Path, s3: str) -> None:
    shard_writer(tmp_path, 10)
    dest, local = open_storage(f"{s3}/{uuid.uuid4().hex}"), open_storage(str(tmp_path))
    for key in local.list():
        dest.upload(tmp_path / key, key)
    shards = contents(dest)
    assert main(["prepare", dest.url, "--in-place", "--workers", "2"]) == 0
    assert main(["verify", dest.url, "--deep", "--workers", "1"]) == 0
    assert {key: data for key, data in contents(dest).items() if key.endswith(".tar")} == shards
    assert main(["prepare", str(tmp_path), "--in-place", "--workers", "1"]) == 0
    assert open_manifest(dest).digest == open_manifest(local).digest


def test_shards_of_others_get_a_manifest_in_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = shard_writer(tmp_path, 10)
    shards = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert main(["prepare", str(tmp_path), "--in-place", "--dry-run", "--workers", "1"]) == 0
    assert not (tmp_path / "manifest.json").exists()
    assert main(["prepare", str(tmp_path), "--in-place", "--workers", "1"]) == 0
    assert main(["verify", str(tmp_path), "--deep", "--workers", "1"]) == 0
    assert "32x32, png, 0 attributes, 10 classes" in capsys.readouterr().out
    manifest = open_manifest(open_storage(str(tmp_path)))
    assert sum(split.samples for split in manifest.splits.values()) == len(expected)
    assert {path: path.read_bytes() for path in shards} == shards
    for words in (["--in-place", "--size", "8"], [str(tmp_path / "x"), "--in-place"], []):
        with pytest.raises(UsageError):
            main(["prepare", str(tmp_path), *words])


@pytest.mark.parametrize("command", ["toy", "prepare", "verify", "show"])
def test_every_command_has_help(command: str) -> None:
    done = subprocess.run(
        [*COMMAND, command, "--help"], capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}
    )
    assert done.returncode == 0
    assert "usage: python -m jobs data" in done.stdout


def _half(number: int) -> int:
    if number == 7:
        raise DataError("seven", where="item 7")
    return number // 2


def _die(number: int) -> int:
    os._exit(1)


@pytest.mark.parametrize("workers", [1, 2])
def test_work_comes_back_in_order_and_so_do_refusals(workers: int) -> None:
    assert list(ordered_map(_half, range(7), workers)) == [0, 0, 1, 1, 2, 2, 3]
    with pytest.raises(DataError, match="item 7: seven"):
        list(ordered_map(_half, range(20), workers))


def test_a_worker_that_dies_is_a_refusal() -> None:
    with pytest.raises(PipelineError, match="a worker process died; is memory short"):
        list(ordered_map(_die, range(2), 2))
