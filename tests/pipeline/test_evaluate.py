"""Evaluation: exact, fixed noise, independent of batch and world; the report says it without asking anybody."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from glow import dequantize, keyed_uniform, sample_keys
from pipeline.evaluate import Evaluation, Figure, codec_figures, evaluate, validation_bits
from pipeline.export import natural_stream, read_run
from pipeline.gates import Result
from pipeline.learner import Examples
from pipeline.manifest import open_manifest
from pipeline.page import as_html
from pipeline.report import Report, as_json, kept_review
from pipeline.review import Subject, keep_review, open_subject, review
from pipeline.storage import canonical_json, open_storage
from pipeline.stream import Stream
from pipeline.world import World
from tests.pipeline.group import run_group
from tests.pipeline.trained import copy_of_run, trained


@pytest.fixture(scope="module")
def subject() -> Subject:
    return open_subject(str(trained().run))


@pytest.fixture
def stream(subject: Subject) -> Iterator[Stream]:
    with natural_stream(subject.manifest, "val", subject.config.data) as stream:
        yield stream


def examples(subject: Subject) -> Examples:
    return Examples(subject.config, subject.manifest, torch.device("cpu"))


def judged(
    subject: Subject, stream: Stream, world: World | None = None, batch: int = 32, images: int = 0
) -> Evaluation:
    labels, inputs = subject.manifest.labels, examples(subject)
    return evaluate(subject.main, inputs, stream, world or World(), bits=5, labels=labels, batch=batch, images=images)


def test_bits_per_dim_is_the_likelihood_under_the_noise_of_every_image(subject: Subject, stream: Stream) -> None:
    found = judged(subject, stream)
    batch = stream.fetch(np.arange(3))
    keys = sample_keys(0, torch.zeros(3, dtype=torch.int64), torch.arange(3))
    x = dequantize(batch.pixels, 5, keyed_uniform(keys, (3, 16, 16)))
    signs = batch.attributes[:, [subject.manifest.attributes.index(name) for name in subject.manifest.editable]]
    with torch.no_grad():
        log_prob = subject.main.log_prob(x, batch.labels, signs)
    expected = 5 - log_prob / (math.log(2) * 3 * 16 * 16)
    assert found.values[:3] == pytest.approx(expected.tolist(), abs=1e-5)


def test_terms_add_up_and_classes_cover_the_split(subject: Subject, stream: Stream) -> None:
    found = judged(subject, stream)
    assert found.bits + found.log_det + sum(found.priors) == pytest.approx(found.bits_per_dim.mean, abs=1e-5)
    assert found.bits_per_dim.images == stream.samples == len(found.values)
    assert sum(figure.images for figure in found.classes.values()) == stream.samples
    mean = sum(figure.mean * figure.images for figure in found.classes.values()) / stream.samples
    assert mean == pytest.approx(found.bits_per_dim.mean)
    assert set(found.classes) <= set(found.class_names) == set(subject.manifest.labels)
    assert 0 <= found.round_trip < 1e-4


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_batches_change_nothing_beyond_rounding(subject: Subject, stream: Stream, batch: int) -> None:
    assert judged(subject, stream, batch=batch).values == pytest.approx(judged(subject, stream).values, abs=1e-5)


def worker(world: World, run: str) -> Evaluation:
    subject = open_subject(run)
    with natural_stream(subject.manifest, "val", subject.config.data) as stream:
        return judged(subject, stream, world, batch=4)


@pytest.mark.parametrize("size", [2, 3])
def test_workers_change_nothing_and_all_get_the_result(subject: Subject, stream: Stream, size: int) -> None:
    alone = judged(subject, stream, batch=4)
    for found in run_group(size, worker, str(trained().run)):
        assert found == alone, "bit by bit: batches are cut at the same places"


def test_the_first_images_are_the_first_of_all(subject: Subject, stream: Stream) -> None:
    some = judged(subject, stream, images=5)
    assert some.values == pytest.approx(judged(subject, stream).values[:5], abs=1e-5)
    bits = validation_bits(subject.main, examples(subject), stream, World(), 5, 5)
    assert bits.dtype == torch.float64
    assert bits.tolist() == pytest.approx(some.values, abs=1e-5)


def test_averaged_and_last_weights_are_both_judged(subject: Subject) -> None:
    assert list(subject.models) == ["ema", "raw"]
    pairs = zip(subject.models["ema"].parameters(), subject.models["raw"].parameters(), strict=True)
    assert not all(torch.equal(one, other) for one, other in pairs)


def test_figures_are_means_with_standard_errors() -> None:
    values = [1.0, 2.0, 4.0]
    figure = Figure.of(values)
    assert figure == Figure(pytest.approx(7 / 3), pytest.approx(np.std(values, ddof=1) / 3**0.5), 3)
    assert Figure.of([5.0]) == Figure(5.0, 0.0, 1)


def test_codecs_count_whole_files_of_the_quantised_pixels(stream: Stream) -> None:
    found = codec_figures(stream, 5, 4)
    sizes = []
    for image in stream.fetch(np.arange(4)).pixels.numpy():
        file = io.BytesIO()
        Image.fromarray((image >> 3).transpose(1, 2, 0)).save(file, "png", optimize=True)
        sizes.append(8 * len(file.getvalue()) / image.size)
        assert (np.asarray(Image.open(file)) == (image >> 3).transpose(1, 2, 0)).all()
    assert found["png"] == Figure.of(sizes)
    assert found["webp"].mean < found["png"].mean
    assert codec_figures(stream, 8, 4)["png"].mean > found["png"].mean


class Requests(HTMLParser):
    """Collects what a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data") and value]


def test_the_report_needs_nothing_else(subject: Subject) -> None:
    found = review(subject, "val", images=6)
    gates = (Result("round_trip", False, None, 0.001, "<b>not finite</b>"),)
    page = as_html(dataclasses.replace(found, gates=gates, title="faces & <script>"))
    parser = Requests()
    parser.feed(page)
    assert parser.found
    assert all(value.startswith("data:image/png;base64,") for value in parser.found)
    assert not re.search(r"url\(|@import|<script|<link", page)
    for words in ("PNG, optimised", "WebP, lossless", "prior of level 2", "&lt;b&gt;not finite", "failed", "<svg"):
        assert words in page
    assert f"{found.main.bits_per_dim.mean:.3f}" in page
    assert subject.manifest.digest in page


def test_the_report_as_json_holds_every_value_and_null_for_what_is_not_finite(subject: Subject) -> None:
    found = review(subject, "val", images=6)
    tree = json.loads(canonical_json(as_json(found)))
    assert tree["evaluations"]["ema"]["values"] == list(found.main.values)
    assert tree["codecs"]["png"]["mean"] == found.codecs["png"].mean
    assert set(tree["curves"]) == {"train", "val"}
    broken = dataclasses.replace(found.main, values=(math.nan, 1.0), round_trip=math.inf)
    tree = json.loads(canonical_json(as_json(dataclasses.replace(found, evaluations={"ema": broken}))))
    assert tree["evaluations"]["ema"]["values"] == [None, 1.0]
    assert as_html(dataclasses.replace(found, evaluations={"ema": broken}))


def test_a_kept_review_speaks_for_the_same_weights_and_all_of_the_same_images(subject: Subject, tmp_path: Path) -> None:
    run = open_storage(str(copy_of_run(tmp_path)))
    weights, data = subject.lineage["weights"], subject.manifest.digest
    assert kept_review(run, "val", weights, data) is None
    some = review(subject, "val", images=6)
    keep_review(run, some)
    assert kept_review(run, "val", weights, data) is None
    whole = review(subject, "val")
    keep_review(run, whole)
    kept = kept_review(run, "val", weights, data)
    assert kept is not None
    assert (kept.main, kept.codecs, kept.neighbours) == (whole.main, whole.codecs, whole.neighbours)
    assert kept_review(run, "val", "0" * 64, data) is None
    assert kept_review(run, "val", weights, "0" * 64) is None
    assert kept_review(run, "train", weights, data) is None


def test_directions_point_from_without_to_with(subject: Subject) -> None:
    from pipeline.export import directions

    with natural_stream(subject.manifest, "train", subject.config.data) as stream:
        found = directions(subject.main, stream, examples(subject), subject.manifest, 5)
        batch = stream.fetch(np.arange(stream.samples))
        x = examples(subject).of(batch, 0)[0]
    with torch.no_grad():
        latents = subject.main.encode(x)
    column = subject.manifest.attributes.index(subject.manifest.editable[0])
    has = batch.attributes[:, column] > 0
    for level, latent in enumerate(latents):
        expected = latent[has].mean(0) - latent[~has].mean(0)
        torch.testing.assert_close(found[level][0], expected, rtol=1e-3, atol=1e-4)


def test_reading_a_run_needs_a_run(tmp_path: Path) -> None:
    from pipeline.errors import UsageError

    with pytest.raises(UsageError, match=r"no config\.toml"):
        read_run(open_storage(str(tmp_path)))
    (tmp_path / "config.toml").write_bytes((trained().run / "config.toml").read_bytes())
    with pytest.raises(UsageError, match="no checkpoint yet"):
        read_run(open_storage(str(tmp_path)))


def test_a_report_without_classes_curves_or_pictures_is_drawn(subject: Subject, stream: Stream) -> None:
    bare = evaluate(subject.main, examples(subject), stream, World(), bits=5, images=1)
    report = Report(title="bare", split="val", samples=1, data="ab", evaluations={"ema": bare}, codecs={})
    assert "bare" in as_html(report)
    assert open_manifest(open_storage(str(trained().data))).digest == subject.manifest.digest
