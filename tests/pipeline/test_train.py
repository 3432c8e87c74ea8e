"""Laws of the loop: stopping changes nothing, the number of workers changes nothing, another run is refused."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from glow import GlowConfig
from glow.budget import level_macs
from jobs.data import prepare
from pipeline.checkpoint import accepting, load_latest
from pipeline.config import (
    ClusterConfig,
    DataConfig,
    EvaluateConfig,
    MemoryConfig,
    OptimConfig,
    ScheduleConfig,
    TrackingConfig,
    TrainConfig,
    read_config,
    write_config,
)
from pipeline.errors import ConfigError, ConflictError, DivergedError, Interrupted
from pipeline.evaluate import BATCH as BATCH_OF_EVALUATION
from pipeline.evaluate import validation_bits
from pipeline.export import export_model, natural_stream, read_run
from pipeline.fingerprint import fingerprint
from pipeline.golden import verify_model
from pipeline.learner import Examples
from pipeline.manifest import open_manifest
from pipeline.model import read_model
from pipeline.review import evaluate_subject, open_subject
from pipeline.spool import parse_rows
from pipeline.storage import canonical_json, open_storage
from pipeline.toy import write_toy
from pipeline.train import due, resolved, run
from pipeline.world import World
from tests.pipeline.group import run_group
from tests.reliability import measured

IMAGES = 96
BATCH = 16


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    write_toy(folder / "source", images=128, size=16, seed=0)
    assert (
        prepare(str(folder / "source"), str(folder / "data"), split="random:0:0.5", samples_per_shard=8, workers=1) == 0
    )
    return folder / "data"


@pytest.fixture
def config(dataset: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        name="tiny",
        storage=str(tmp_path / "runs"),
        data=DataConfig(prefix=str(dataset), bits=5, cache=str(tmp_path / "cache"), cache_gb=0.1),
        model=GlowConfig(levels=2, steps=2, width=8, condition_splits=True, condition_steps=True),
        optim=OptimConfig(algorithm="adam", lr=2e-3, warmup=32, decay="cosine", ema_halflife=64),
        memory=MemoryConfig(anchor_every=(2, 0)),
        schedule=ScheduleConfig(
            images=IMAGES, batch=BATCH, leaf=4, init_images=64, status_every=32, checkpoint_every=32
        ),
        evaluate=EvaluateConfig(every=48, images=16, temperatures=(0.7,), rows=1),
    )


def weights(config: TrainConfig, images: int = IMAGES) -> dict[str, torch.Tensor]:
    """Everything the newest checkpoint of a run holds, which is at so many images."""
    manifest = open_manifest(open_storage(config.data.prefix))
    identity = fingerprint(resolved(config, manifest), manifest.digest)
    loaded = load_latest(open_storage(config.storage).sub(config.name), World(), accepting(identity))
    assert loaded is not None
    assert loaded.images == images
    return loaded.tensors


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> int:
    """How many tensors that is."""
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    return len(one)


def worker(world: World, config: TrainConfig) -> None:
    os.environ |= {"RANK": str(world.rank), "WORLD_SIZE": str(world.size), "LOCAL_RANK": str(world.rank)}
    run(config)


def test_killed_and_run_again_ends_in_the_same_bits(config: TrainConfig) -> None:
    run(config)
    again = replace(config, name="killed")
    path = Path(config.storage) / "killed.toml"
    path.write_text(write_config(again))
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    process.kill()
    process.wait()
    process.stdout.close()
    scramble_times(Path(config.storage) / "killed")
    run(again)
    equal = assert_same(weights(config), weights(again))
    measured("R5", "killed, gone on: parameters, averages, moments bit-equal", equal, f"of {equal} tensors")
    rows = [json.loads(line) for line in (Path(config.storage) / "killed" / "metrics.jsonl").read_text().splitlines()]
    places = [(key, row["images"]) for row in rows for key in row["metrics"]]
    assert len(places) == len(set(places))


def scramble_times(folder: Path) -> None:
    """Let every file and row be of another time (promise R15)."""
    clock = random.Random(0)
    for spool in (folder / "metrics.jsonl", folder / "events.jsonl"):
        rows = parse_rows(spool.read_bytes())
        spool.write_bytes(b"".join(canonical_json({**row, "time": clock.randrange(2**41)}) for row in rows))
    for path in folder.rglob("*"):
        os.utime(path, (clock.randrange(2**31),) * 2)


KILLED = """
import sys
from pipeline.config import read_config
from pipeline.train import run
run(read_config(sys.argv[1]), lambda row: print(row, flush=True))
"""


def test_what_a_run_says_of_itself(config: TrainConfig) -> None:
    """Pace, memory, checkpoint, restarts, origin, a trace; and no MFU that is made up."""
    figures = run(replace(config, tracking=TrackingConfig(profile=2)))
    assert figures["ft/checkpoint"] in (IMAGES - 64, IMAGES - 32), "the last but one may still be under way"
    assert figures["ft/restarts"] == 0
    assert 0.05 < figures["perf/peak_gb"] < 100
    assert 0 <= figures["perf/data_wait_pct"] <= 100
    assert "perf/mfu" not in figures
    folder = Path(config.storage) / "tiny"
    events = [json.loads(row) for row in (folder / "events.jsonl").read_text().splitlines()]
    (mfu,) = [event for event in events if event["kind"] == "mfu"]
    assert (mfu["value"], mfu["reason"]) == (None, "a CPU's peak is not known; --cluster.peak-tflops says it")
    (started,) = [event for event in events if event["kind"] == "started"]
    assert (started["workers"], started["torch"]) == (1, torch.__version__)
    assert len(started["code"]) == 64
    (trace,) = folder.glob("traces/*.json")
    assert len(json.loads(trace.read_bytes())["traceEvents"]) > 100
    assert "aten::" in trace.with_suffix(".txt").read_text()
    assert read_config(folder / "config.toml").tracking.profile == 0, "asked of one attempt alone"

    longer = replace(config, schedule=replace(config.schedule, images=112), allow_change=("schedule.images",))
    figures = run(replace(longer, cluster=ClusterConfig(peak_tflops=0.1)))
    flops = 3 * 2 * sum(level_macs(resolved(config, open_manifest(open_storage(config.data.prefix))).model, 1))
    assert figures["perf/mfu"] == pytest.approx(figures["perf/images_per_s"] * flops / 1e11)
    assert figures["ft/restarts"] == 1


def test_any_number_of_workers_one_after_the_other_ends_in_the_same_bits(config: TrainConfig) -> None:
    """Promise R6: 1, 2, 3, 4, then 1 worker, each stopped by a signal and followed by the next.

    Every number of them judges the averaged weights on two batches, the second a part of one: the figures are equal.
    """
    config = replace(config, evaluate=replace(config.evaluate, every=BATCH, images=48))
    assert config.evaluate.images > BATCH_OF_EVALUATION
    run(config)
    shared = replace(config, name="shared")
    for size in (1, 2, 3, 4):
        run_group(size, stopped_worker, shared)
    run(shared)
    equal = assert_same(weights(config), weights(shared))
    measured("R6", "`tree`, 1, 2, 3, 4, 1 workers: bit-equal to one worker's", equal, f"of {equal} tensors")
    events = (Path(config.storage) / "shared" / "events.jsonl").read_text().splitlines()
    resumed = [row["images"] for row in map(json.loads, events) if row["kind"] == "resumed"]
    assert resumed == [BATCH, 2 * BATCH, 3 * BATCH, 4 * BATCH]
    assert validated(shared) == validated(config), "bit by bit: batches are cut alike for every number of ranks"
    assert len(validated(config)) == 2 + IMAGES // BATCH


def stopped_worker(world: World, config: TrainConfig) -> None:
    """A batch as one rank of several; the last rank is told to stop."""
    os.environ |= {"RANK": str(world.rank), "WORLD_SIZE": str(world.size), "LOCAL_RANK": str(world.rank)}
    with pytest.raises(Interrupted, match="stopped after a checkpoint"):
        run(config, stop=lambda: world.rank == world.size - 1)


def validated(config: TrainConfig) -> list[float]:
    """Validation figures of a run in their order; the last is of its averaged weights, taken anew."""
    folder = open_storage(config.storage).sub(config.name)
    rows = [json.loads(line)["metrics"] for line in folder.read("metrics.jsonl").splitlines()]
    found = [row["val/bits_per_dim"] for row in rows if "val/bits_per_dim" in row]
    trained = read_run(folder)
    manifest = open_manifest(open_storage(config.data.prefix))
    inputs = Examples(trained.config, manifest, torch.device("cpu"))
    with natural_stream(manifest, "val", trained.config.data) as stream:
        ema, raw = (
            float(validation_bits(trained.model(kind), inputs, stream, World(), config.evaluate.images, 5).mean())
            for kind in ("ema", "raw")
        )
    assert found[-1] == pytest.approx(ema, abs=1e-6)
    assert abs(ema - raw) > 1e-4
    return [*found, ema]


def until_third_batch(world: World, config: TrainConfig) -> None:
    """Train as one of a group, and end as if asked to after three batches."""
    batches = itertools.count(1)
    os.environ |= {"RANK": str(world.rank), "WORLD_SIZE": str(world.size), "LOCAL_RANK": str(world.rank)}
    with contextlib.suppress(Interrupted):
        run(config, stop=lambda: next(batches) == 3)


def trained_by(size: int, config: TrainConfig) -> dict[str, torch.Tensor]:
    """Everything at the end of a run on so many workers."""
    if size == 1:
        run(config)
    else:
        run_group(size, worker, config)
    return weights(config)


def assert_near(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Equal weights up to the rounding of six steps."""
    names = [name for name in one if name.startswith("model/")]
    for name in names:
        torch.testing.assert_close(other[name], one[name], rtol=1e-3, atol=1e-4)
    furthest = max((other[name] - one[name]).abs().max().item() for name in names)
    measured("R6", "`overlap`, 1 to 4 workers: a weight after six steps, beside `tree`'s", furthest, "apart at most")


def test_overlap_learns_the_same_up_to_rounding_on_any_number_of_workers(config: TrainConfig) -> None:
    """Promise R6: on 1, 2, 3 and 4 from the start, and started on 2 and gone on with 1 and with 4."""
    tree = trained_by(1, config)
    loose = replace(config, name="loose", schedule=replace(config.schedule, reduction="overlap"))
    for size in (1, 2, 3, 4):
        assert_near(tree, trained_by(size, replace(loose, name=f"loose-{size}")))
    run_group(2, until_third_batch, loose)
    home = Path(config.storage)
    for size in (1, 4):
        shutil.copytree(home / "loose", home / f"on-{size}")
        assert_near(tree, trained_by(size, replace(loose, name=f"on-{size}")))


def test_a_finished_run_is_not_trained_again(config: TrainConfig) -> None:
    run(config)
    commits = sorted(Path(config.storage).rglob("commit.json"))
    stamps = [path.stat().st_mtime_ns for path in commits]
    assert run(config)["images"] == IMAGES
    assert [path.stat().st_mtime_ns for path in sorted(Path(config.storage).rglob("commit.json"))] == stamps


def test_other_settings_under_the_same_name_are_refused_by_name(config: TrainConfig) -> None:
    """Promise R19."""
    run(config)
    slower = replace(config, optim=replace(config.optim, lr=1e-3), schedule=replace(config.schedule, images=2 * IMAGES))
    with pytest.raises(ConflictError) as caught:
        run(slower)
    assert caught.value.exit_code == 6
    assert "optim.lr was 0.002 and is 0.001, schedule.images was 96 and is 192" in str(caught.value)
    assert "--allow-change optim.lr schedule.images" in str(caught.value)
    named = str(caught.value).count(" and is ")
    measured("R19", "settings that were changed: in the refusal, as they were and are", named, "of 2")
    with pytest.raises(ConflictError, match=r"settings: schedule\.images was 96 and is 192"):
        run(replace(slower, allow_change=("optim.lr",)))
    assert run(replace(slower, allow_change=("optim.lr", "schedule.images")))["images"] == 2 * IMAGES
    assert run(slower)["images"] == 2 * IMAGES, "from its next checkpoint on it is a run of these settings"


def test_two_jobs_do_not_train_one_run(config: TrainConfig) -> None:
    """Promise R20."""
    refused: list[ConflictError] = []

    def intrude(row: dict[str, Any]) -> None:
        if not refused:
            with pytest.raises(ConflictError, match="is training this run") as caught:
                run(config)
            refused.append(caught.value)

    assert run(config, intrude)["images"] == IMAGES
    assert len(refused) == 1
    measured("R20", "a second job beside a living one: refused", len(refused), "of 1")
    events = (Path(config.storage) / "tiny" / "events.jsonl").read_text()
    assert "stopped" not in events, "a refused job leaves no trace"


def diverging(world: World, config: TrainConfig) -> str:
    with pytest.raises(DivergedError, match=r"2 gradients in a row.*samples \d+ of epoch \d.*parameters") as caught:
        worker(world, config)
    assert caught.value.exit_code == 8
    return str(caught.value)


def test_a_run_that_diverges_goes_back_once_and_names_what_it_met(config: TrainConfig) -> None:
    """Promise R14."""
    one, other = run_group(2, diverging, replace(config, optim=replace(config.optim, lr=1e6, warmup=48, guard_skips=2)))
    assert one == other, "on every rank alike"
    events = [json.loads(row) for row in (Path(config.storage) / "tiny" / "events.jsonl").read_text().splitlines()]
    kinds = [event["kind"] for event in events]
    assert kinds.count("rolled back") == 1
    skipped = next(event for event in events if event["kind"] == "skipped")
    assert len(skipped["samples"]) == 4
    skips = kinds.count("skipped")
    measured("R14", "diverging: batches skipped, samples named, 1 rollback, exit 8", skips, "batches")
    assert kinds[-1] == "stopped"


def too_fast(config: TrainConfig, **changes: Any) -> TrainConfig:
    """A rate that ruins the weights at the second step, with a checkpoint at every step."""
    schedule = replace(config.schedule, checkpoint_every=BATCH, status_every=BATCH, images=30 * BATCH)
    ruinous = OptimConfig(algorithm="adam", lr=1e6, warmup=2 * BATCH, guard_skips=6)
    return replace(config, optim=ruinous, schedule=replace(schedule, **changes))


def test_no_checkpoint_holds_weights_whose_gradient_is_refused(config: TrainConfig) -> None:
    """Promise R14: what a diverged run goes back to is sound, and the cure it names works."""
    fast = too_fast(config)
    with pytest.raises(DivergedError, match="6 gradients in a row"):
        run(fast)
    left = weights(fast, BATCH)
    assert all(bool(tensor.isfinite().all()) for tensor in left.values())
    assert max(float(tensor.abs().max()) for name, tensor in left.items() if name.startswith("model/")) < 100
    cured = replace(fast, optim=replace(fast.optim, lr=1e-4), allow_change=("optim.lr",))
    assert run(cured)["images"] == fast.schedule.images
    skipped = [row["kind"] for row in parse_rows(open_storage(f"{config.storage}/tiny").read("events.jsonl"))]
    assert skipped.count("skipped") == 12, "none after the cure"


def test_a_run_does_not_end_with_weights_that_are_no_numbers(config: TrainConfig) -> None:
    """Its schedule is over before the guard has refused its fill."""
    short = too_fast(config, images=5 * BATCH)
    with pytest.raises(DivergedError):
        run(short)
    assert all(bool(tensor.isfinite().all()) for tensor in weights(short, BATCH).values())


def test_settings_are_written_beside_checkpoints_that_have_them(config: TrainConfig) -> None:
    """A finished run given again with another rate learns nothing, and stays one that can be read."""
    run(config)
    other = replace(config, optim=replace(config.optim, lr=5e-4), allow_change=("optim.lr",))
    run(other)
    kept = read_run(open_storage(f"{config.storage}/tiny"))
    assert kept.config.optim.lr == config.optim.lr
    change = ("optim.lr", "schedule.images")
    longer = replace(other, allow_change=change, schedule=replace(other.schedule, images=IMAGES + BATCH))
    run(longer)
    assert read_run(open_storage(f"{config.storage}/tiny")).config.optim.lr == 5e-4


@pytest.mark.parametrize(("name", "value"), [("size", 32), ("channels", 1), ("classes", 3), ("attributes", 7)])
def test_a_model_that_does_not_fit_the_data_is_refused(config: TrainConfig, name: str, value: int) -> None:
    with pytest.raises(ConfigError, match=rf"model\.{name} is {value}"):
        run(replace(config, model=replace(config.model, **{name: value})))


@pytest.mark.parametrize(
    ("changes", "finding"),
    [
        ({"levels": 5}, r"size 16 is not divisible by 2\^5"),
        ({"steps": 0}, "1 or more"),
        ({"classes": -1, "classifier_weight": 0.01}, "wants classes"),
    ],
)
def test_a_model_the_data_does_not_fit_is_refused(config: TrainConfig, changes: dict[str, Any], finding: str) -> None:
    with pytest.raises(ConfigError, match=finding):
        run(replace(config, model=replace(config.model, **changes)))
    assert not (Path(config.storage) / config.name / "config.toml").exists()


def varied(config: TrainConfig) -> TrainConfig:
    """The same run with variational noise, a classifier, clipping, bfloat16 networks, and inversion everywhere."""
    model = replace(config.model, dequantization="variational", dequantizer_width=4, classifier_weight=0.01)
    memory = MemoryConfig(anchor_every=(2,), nets="bfloat16")
    return replace(config, model=model, memory=memory, optim=replace(config.optim, clip=1.0))


def test_every_way_of_learning_is_learned_alike_by_any_number_of_workers(config: TrainConfig, tmp_path: Path) -> None:
    """Noise, classifier, clipping, bfloat16 networks: the same bits on two workers as on one, figures for each part."""
    alone, two = varied(config), varied(replace(config, storage=str(tmp_path / "two")))
    figures = run(alone)
    run_group(2, worker, two)
    one, other = weights(alone), weights(two)
    assert {name for name in one if name.startswith("model/dequantizer.")}
    assert {name for name in one if name.startswith("model/classifier.")}
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
    parts = figures["train/log_det_bpd"] + figures["train/prior_bpd"] + figures["train/dequantization_bpd"]
    assert config.data.bits + parts == pytest.approx(figures["train/bits_per_dim"], abs=1e-4)
    assert 0 < figures["train/class_bits"] < 10


def test_a_variational_model_is_judged_under_both_noises_and_handed_on(config: TrainConfig) -> None:
    run(varied(config))
    folder = open_storage(config.storage).sub(config.name)
    subject = open_subject(folder.url)
    with natural_stream(subject.manifest, "val", subject.config.data) as stream:
        found = evaluate_subject(subject, stream)["ema"]
    assert found.dequantization == "variational"
    assert found.uniform_noise is not None
    assert found.uniform_noise.mean != found.bits_per_dim.mean
    parts = found.bits + found.log_det + sum(found.priors) + found.noise
    assert parts == pytest.approx(found.bits_per_dim.mean, abs=1e-5)
    export_model(read_run(folder), subject.manifest)
    loaded = read_model(folder.sub("model"))
    assert loaded.config.model.dequantization == "variational"
    assert verify_model(loaded).levels == 0


def test_a_pinned_digest_must_be_the_datasets(config: TrainConfig) -> None:
    with pytest.raises(ConfigError, match="pinned"):
        run(replace(config, data=replace(config.data, digest="0" * 64)))


def test_conditions_can_be_left_out(config: TrainConfig) -> None:
    manifest = open_manifest(open_storage(config.data.prefix))
    plain = resolved(replace(config, model=replace(config.model, classes=-1, attributes=-1)), manifest)
    assert plain.model.condition_size == 0
    assert plain.model.settings()["classes"] == plain.model.settings()["attributes"] == 0
    assert resolved(plain, manifest) == plain  # settings of an unconditional run, read again, are unconditional
    assert run(replace(config, model=replace(config.model, classes=-1, attributes=-1)))["images"] == IMAGES


def test_due_once_an_interval() -> None:
    passed = [images for images in range(BATCH, 200, BATCH) if due(images, 50, BATCH)]
    assert passed == [64, 112, 160]


def test_signals_are_given_back(config: TrainConfig) -> None:
    before = signal.getsignal(signal.SIGTERM)
    run(config)
    assert signal.getsignal(signal.SIGTERM) is before
