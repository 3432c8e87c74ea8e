"""A review: open a run or a model, evaluate it on held-out images, draw it, and keep what was found.

What was found about a run lies in RUN/eval/SPLIT.html and SPLIT.json; promotion uses it where it is about the very same
weights and images, and evaluates anew where not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from glow import Flow, FlowConfig
from pipeline.bayes import Recognition, recognition
from pipeline.conditioning import Obedience, obedience
from pipeline.config import DataConfig, TrainConfig
from pipeline.errors import ConfigError, UsageError
from pipeline.evaluate import NOISE_SEED, Evaluation, codec_figures, evaluate
from pipeline.export import lineage_of, natural_stream, read_run
from pipeline.grids import attribute_columns, grid, sample_grid, temperature_columns
from pipeline.judge import Judge
from pipeline.learner import Examples
from pipeline.manifest import Manifest, open_manifest
from pipeline.model import LoadedModel, weights_of
from pipeline.neighbours import Neighbours, nearest
from pipeline.page import as_html
from pipeline.recipe import known_of
from pipeline.registry import load_model
from pipeline.report import Picture, Report, as_json, loss_curves
from pipeline.sampling import Condition, sample
from pipeline.spool import Row, parse_rows
from pipeline.storage import MissingError, Storage, canonical_json, open_storage, sha256_hex
from pipeline.stream import Stream
from pipeline.uniformity import own_samples
from pipeline.world import World

OWN_SEEDS, NEIGHBOUR_SEEDS = 64, 32


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is judged: one model with one or two sets of weights, and the data it is judged on."""

    title: str
    config: TrainConfig
    manifest: Manifest
    models: Mapping[str, Flow]
    """By the name of their weights; the first is what ships."""
    run: Storage | None = None
    """The run's folder, where there is one."""
    lineage: Mapping[str, str] = field(default_factory=dict)

    @property
    def main(self) -> Flow:
        """The model that ships."""
        return next(iter(self.models.values()))


def open_subject(target: str, data: str = "", uri: str = "") -> Subject:
    """Open a run's folder, or a model (folder, s3:// prefix, models:/ address); `data` says where the dataset is."""
    if target.startswith("models:/") or open_storage(target).exists("model.json"):
        return subject_of_model(load_model(target, uri), data)
    run = read_run(open_storage(target))
    config = replace(run.config, data=replace(run.config.data, prefix=data or run.config.data.prefix))
    manifest = open_manifest(open_storage(config.data.prefix))
    _refuse_unfit(config.model, manifest)
    found = known_of(lineage_of(run, manifest))
    told = ("run", "step", "images", "fingerprint", "commit", "torch", "time")
    lineage = {key: str(found[key]) for key in told if key in found}
    return Subject(
        title=run.config.name,
        config=config,
        manifest=manifest,
        models={"ema": run.model("ema"), "raw": run.model("raw")},
        run=run.storage,
        lineage=lineage | {"dataset": manifest.digest, "weights": sha256_hex(weights_of(run.model("ema")))},
    )


def subject_of_model(loaded: LoadedModel, data: str = "", title: str = "") -> Subject:
    """A loaded model as a subject, judged on the dataset under `data`, or on the very one it learned from."""
    prefix = data or loaded.lineage.get("data", {}).get("prefix", "")
    if not prefix:
        raise UsageError("the model does not say where its dataset is", where=loaded.where, cure="give --data PREFIX")
    manifest = open_manifest(open_storage(prefix))
    if not data and manifest.digest != loaded.config.data["digest"]:
        found = f"this dataset is {manifest.digest[:12]}, the model learned from {loaded.config.data['digest'][:12]}"
        raise ConfigError(found, where=prefix, cure="give --data PREFIX to judge on it all the same")
    known = loaded.config
    _refuse_unfit(known.model, manifest, known.editable)
    settings = DataConfig(
        prefix=prefix, bits=known.bits, train=known.data["train"], validation=known.data["validation"]
    )
    return Subject(
        title=title or loaded.where.rstrip("/").rpartition("/")[2],
        config=TrainConfig(data=settings, model=known.model),
        manifest=manifest,
        models={"ema": loaded.model},
        lineage={"artifact": loaded.digest, "dataset": manifest.digest, "weights": loaded.files["weights.safetensors"]},
    )


def _refuse_unfit(model: FlowConfig, manifest: Manifest, editable: Sequence[str] | None = None) -> None:
    """ConfigError where the model cannot judge these images; of `editable` the names count, too."""
    wanted = tuple(manifest.editable if editable is None else editable)
    if (
        (model.size, model.channels) != (manifest.size, manifest.channels)
        or (model.attributes > 0 and (model.attributes, wanted) != (len(manifest.editable), tuple(manifest.editable)))
        or (model.classes > 0 and len(manifest.labels) not in (0, model.classes))
    ):
        what = "this dataset's images, attributes or classes do not fit the model"
        raise ConfigError(what, where=manifest.storage.url, cure="give --data with one that does")


def refuse_unlike(subject: Subject, beside: LoadedModel) -> None:
    """ConfigError for a model that cannot draw the subject's seeds under its conditions beside it."""
    mine, other = subject.config.model, beside.config.model
    if any(getattr(mine, name) != getattr(other, name) for name in ("size", "channels", "classes", "attributes")):
        raise ConfigError("its images or conditions are not those of what is evaluated", where=beside.where,
                          cure="--beside a model of the same kind of data")  # fmt: skip


def evaluate_subject(
    subject: Subject, stream: Stream, images: int = 0, world: World | None = None
) -> dict[str, Evaluation]:
    """Evaluate every set of weights on the first `images` (0: all) of a stream; collective."""
    inputs = Examples(subject.config, subject.manifest, torch.device("cpu"))
    bits, names = subject.config.data.bits, subject.manifest.labels
    return {
        name: evaluate(model, inputs, stream, world or World(), bits=bits, labels=names, images=images)
        for name, model in subject.models.items()
    }


def evaluate_model(loaded: LoadedModel, data: str, split: str, digest: str) -> Evaluation:
    """Evaluate a model on all images of a split of the dataset under `data`, which must have this digest."""
    subject = subject_of_model(loaded, data)
    if subject.manifest.digest != digest:
        found = f"this dataset is {subject.manifest.digest[:12]}, expected {digest[:12]}"
        raise ConfigError(found, where=data, cure="give --data with a dataset to compare on")
    with natural_stream(subject.manifest, split, subject.config.data) as stream:
        return evaluate_subject(subject, stream)["ema"]


def evaluated(subject: Subject, split: str, images: int = 0, world: World | None = None) -> dict[str, Evaluation]:
    """Every set of weights on the first images of a split; collective, every rank gets all of it."""
    with natural_stream(subject.manifest, split, subject.config.data) as stream:
        return evaluate_subject(subject, stream, images, world)


def review(
    subject: Subject,
    split: str,
    images: int = 0,
    temperature: float = 0.7,
    evaluations: Mapping[str, Evaluation] | None = None,
    beside: LoadedModel | None = None,
    judge: Judge | None = None,
) -> Report:
    """Everything a reviewer is shown about a subject.

    `evaluations`: what others found already (workers); `beside`: a model, the champion say, whose samples of the same
    seeds and conditions are shown too; `judge`: says whether samples show what they were asked for.
    """
    data = subject.config.data
    with (
        natural_stream(subject.manifest, split, data) as stream,
        natural_stream(subject.manifest, data.train, data) as training,
    ):
        found, picture = _memorised(subject, stream, training, temperature)
        return Report(
            title=subject.title,
            split=split,
            samples=stream.samples,
            data=subject.manifest.digest,
            lossless=subject.manifest.lossless,
            evaluations=evaluations or evaluate_subject(subject, stream, images),
            codecs=codec_figures(stream, data.bits, images),
            own_samples=own_samples(subject.main, range(OWN_SEEDS), _conditions(subject, stream, OWN_SEEDS)),
            neighbours=found,
            conditioning=_conditioning(subject, stream, judge, temperature),
            recognition=_recognition(subject, stream),
            curves=loss_curves(_rows(subject.run)),
            pictures=[*_pictures(subject, stream, temperature, beside), picture],
            lineage=subject.lineage,
        )


def _conditions(subject: Subject, stream: Stream, count: int) -> Condition:
    """The conditions of the first images of a stream, over and over."""
    inputs = Examples(subject.config, subject.manifest, torch.device("cpu"))
    rows = np.arange(count) % stream.samples
    return inputs.of(stream.fetch(rows), NOISE_SEED)[1:]


def _conditioning(subject: Subject, stream: Stream, judge: Judge | None, heat: float) -> dict[str, Obedience]:
    if judge is None:
        return {}
    base = _conditions(subject, stream, OWN_SEEDS)
    return obedience(subject.main, subject.config.data.bits, subject.manifest.editable, judge, base, heat)


def _recognition(subject: Subject, stream: Stream) -> dict[str, Recognition]:
    """What the model's likelihoods tell about the first held-out images."""
    inputs = Examples(subject.config, subject.manifest, torch.device("cpu"))
    batch = stream.fetch(np.arange(min(OWN_SEEDS, stream.samples)))
    x, *condition = inputs.of(batch, NOISE_SEED)
    x, _ = subject.main.dequantized(x, subject.config.data.bits)
    return recognition(subject.main, x, (condition[0], condition[1]), subject.manifest.editable)


def _memorised(subject: Subject, stream: Stream, training: Stream, heat: float) -> tuple[Neighbours, Picture]:
    """The nearest training images of samples under held-out conditions, as figures and as a picture."""
    count = min(NEIGHBOUR_SEEDS, stream.samples)
    held_out = stream.fetch(np.arange(count)).pixels
    samples = sample(subject.main, subject.config.data.bits, range(count), heat, _conditions(subject, stream, count))
    found = nearest(samples, held_out, training)
    shown = min(8, count)
    beneath = training.fetch(np.asarray(found.nearest[:shown])).pixels
    columns = [torch.stack(pair) for pair in zip(samples[:shown], beneath, strict=True)]
    note = (
        f"Above, samples; beneath each the nearest of {found.searched} training images. Samples lie {found.ratio:.2f} "
        "times as far from them as held-out images do (medians); copies would lie near 0."
    )
    return found, Picture("Nearest training images", note, grid(columns, [], ["sample", "nearest"]))


def keep_review(run: Storage, report: Report) -> None:
    """Write RUN/eval/SPLIT.html and SPLIT.json."""
    run.write(f"eval/{report.split}.html", as_html(report).encode())
    run.write(f"eval/{report.split}.json", canonical_json(as_json(report)))


def _rows(run: Storage | None) -> list[Row]:
    try:
        return parse_rows(run.read("metrics.jsonl")) if run else []
    except MissingError:
        return []


def _pictures(subject: Subject, stream: Stream, temperature: float, beside: LoadedModel | None) -> Sequence[Picture]:
    model, bits = subject.main, subject.config.data.bits
    seeds = range(min(4, stream.samples))
    base = _conditions(subject, stream, len(seeds))
    editable = subject.manifest.editable
    asked = ["", *(f"+{name}" for name in editable[:6])] if subject.config.model.attributes > 0 else [""]
    columns = attribute_columns(subject.config.model, editable, base, asked)
    heats = temperature_columns((0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0), base)
    pictures = [
        Picture(
            "Samples",
            f"Rows: fixed seeds, conditions of held-out images. Columns: one attribute asked for. T = {temperature:g}.",
            sample_grid(model, bits, seeds, columns, temperature),
        ),
        Picture(
            "Temperature",
            "The same seeds and conditions; latents are scaled by T before they are decoded.",
            sample_grid(model, bits, seeds[:2], heats, temperature),
        ),
    ]
    if beside is not None:
        note = f"The same seeds, conditions and temperature by {beside.digest[:12]}, for comparison with the samples."
        other = sample_grid(beside.model, beside.config.bits, seeds, columns, temperature)
        pictures.insert(1, Picture("Beside", note, other))
    return pictures
