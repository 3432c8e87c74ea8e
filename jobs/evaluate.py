"""Evaluate a run or a model: exact bits/dim of held-out images beside PNG and WebP, as one HTML page and as JSON.

  python -m jobs evaluate runs/faces
  python -m jobs evaluate models:/faces@champion --data datasets/faces --report report.html
  python -m jobs evaluate runs/faces --beside models:/faces@champion --workers 2

For a run the review is kept in RUN/eval/, where promotion finds it, and shown in MLflow.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from pipeline.errors import ConflictError, UsageError

if TYPE_CHECKING:
    from pipeline.config import TrainConfig
    from pipeline.evaluate import Evaluation
    from pipeline.judge import Judge
    from pipeline.report import Report
    from pipeline.review import Subject
    from pipeline.storage import Storage

Target = Annotated[str, tyro.conf.arg(metavar="RUN_OR_MODEL")]


def main(argv: Sequence[str]) -> int:
    """Evaluate what is named on the command line."""
    return tyro.cli(evaluate, prog="python -m jobs evaluate", description=__doc__, args=list(argv))


def evaluate(
    target: Target,
    /,
    split: str = "",
    max_images: int = 0,
    data: str = "",
    report: str = "",
    temperature: float = 0.7,
    beside: str = "",
    workers: int = 0,
    judge: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    uri: str = "",
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
) -> int:
    """Evaluate a run's newest checkpoint, or a model.

    Args:
        target: A run's folder, a model's folder, an s3:// prefix of either, models:/NAME@alias or models:/NAME/3.
        split: Split to judge on; empty takes the run's validation split.
        max_images: Judge on the first so many images; 0 takes all.
        data: Prefix of the dataset; empty takes the one the run learned from. A model needs it.
        report: HTML file to write, with the same as JSON beside it.
        temperature: Of the sample grid.
        beside: A model, the champion say, whose samples of the same seeds the report shows too.
        workers: Ray workers that share the images; 0 evaluates in this process. The figures are the same.
        judge: Train a classifier of attributes (a minute for small images; kept beside a run) that says whether samples
            show what they were asked for.
        uri: MLflow address for models:/ names; empty takes MLFLOW_TRACKING_URI.
        dry_run: Open everything, say what would be evaluated, write nothing.
    """
    from pipeline.bounds import refuse_odd
    from pipeline.registry import load_model
    from pipeline.review import keep_review, open_subject, refuse_unlike, review

    refuse_odd(max_images=max_images, temperature=temperature, workers=workers)
    page = _page(report, dry_run)
    subject = open_subject(target, data, uri)
    split = split or subject.config.data.validation
    count = min(max_images or 1 << 62, subject.manifest.split(split).samples)
    if workers > count:
        raise UsageError(f"{workers} workers for {count} images", cure="at most one an image has work")
    places = [f"{subject.run.where('eval')}/{split}.html"] if subject.run else []
    places += [report] if report else []
    weights = " and ".join({"ema": "averaged", "raw": "last"}[name] for name in subject.models)
    print(
        f"{subject.title}: {weights} weights on {count} images of split {split}, dataset {subject.manifest.digest[:12]}"
    )
    if dry_run:
        print(f"dry run: would write {' and '.join(places) or 'nothing'}")
        return 0
    champion = load_model(beside, uri) if beside else None
    if champion:
        refuse_unlike(subject, champion)
    shared = _on_ray(subject, target, split, max_images, uri, workers) if workers else None
    seen = _judge(subject) if judge else None
    found = review(subject, split, max_images, temperature, shared, champion, seen)
    if subject.run:
        keep_review(subject.run, found)
        show_in_mlflow(subject, found)
    if page:
        _write(*page, found)
    _print(found)
    print("\n".join(f"report: {place}" for place in places))
    return 0


def _judge(subject: Subject) -> Judge:
    from pipeline.judge import judge_for

    kept = subject.run.sub("judge") if subject.run else None
    return judge_for(subject.manifest, subject.config.data, kept, say=print)


def _on_ray(subject: Subject, target: str, split: str, images: int, uri: str, workers: int) -> dict[str, Evaluation]:
    """The evaluation shared by Ray workers, each of which opens the target by itself."""
    from jobs import cluster

    config = replace(subject.config, cluster=replace(subject.config.cluster, workers=workers, min_workers=0))
    work = functools.partial(evaluate_share, target=target, split=split, images=images, uri=uri)
    return cluster.train(config, lambda row: print(row["event"]) if "event" in row else None, work)


def evaluate_share(
    config: TrainConfig, report: object, stop: object, *, target: str, split: str, images: int, uri: str
) -> dict[str, Evaluation]:
    """What one worker does; every one gets the figures of all."""
    import torch

    from pipeline.review import evaluated, open_subject
    from pipeline.world import World, joined

    torch.set_num_threads(config.cluster.threads)
    world = World.from_environment()
    with joined(world):
        return evaluated(open_subject(target, config.data.prefix, uri), split, images, world)


def _page(report: str, dry_run: bool) -> tuple[Storage, str] | None:
    """(where the page goes, its name), after a try to write there; what is wrong is known before anything is done."""
    from jobs.preflight import refuse_unwritable
    from pipeline.storage import MissingError, checked_key, open_storage

    if not report:
        return None
    folder, slash, name = report.rpartition("/")
    storage = open_storage(folder + slash if slash else ".")
    if not name or name.endswith(".json") or (storage.local and (storage.local / name).is_dir()):
        raise UsageError("no name for a page", where=report, cure="--report report.html; its JSON comes beside it")
    checked_key(name)
    try:
        if not dry_run:
            refuse_unwritable(storage)
    except (ConflictError, MissingError) as error:
        raise UsageError("no folder", where=storage.url, cure="--report FOLDER/report.html") from error
    return storage, name


def _write(storage: Storage, name: str, found: Report) -> None:
    from pipeline.page import as_html
    from pipeline.report import as_json
    from pipeline.storage import canonical_json

    storage.write(name, as_html(found).encode())
    storage.write(str(Path(name).with_suffix(".json")), canonical_json(as_json(found)))


def _print(found: Report) -> None:
    from pipeline.report import LOSSY

    figures = {f"model ({name})": evaluation.bits_per_dim for name, evaluation in found.evaluations.items()}
    if found.main.uniform_noise:
        figures["uniform noise"] = found.main.uniform_noise
    figures |= dict(found.codecs)
    mine = found.main.bits_per_dim.mean
    caveat = "" if found.lossless else f"   {LOSSY}"
    for name, figure in figures.items():
        beside = f"   model / {name} = {mine / figure.mean:.3f}" if name in found.codecs else caveat
        print(f"{name:12} {figure.mean:8.4f} ± {figure.stderr:.4f} bits/dim{beside}")
    print(f"{'noise':12} {found.main.dequantization}")
    print(f"{'round trip':12} {found.main.round_trip:8.1e}, {found.main.exact:.0%} of the images exact to the bit")
    least = min((level.p for level in found.own_samples), default=1.0)
    print(f"{'own samples':12} {least:8.2f} is the least p of a level against the standard normal")
    for name, each in found.conditioning.items():
        print(f"{name:20} there when asked {each.present:4.0%}, gone when asked {each.absent:4.0%}")
    if found.neighbours:
        print(f"{'memorised':12} {found.neighbours.ratio:8.2f} x the held-out distance to the nearest training image")


def show_in_mlflow(subject: Subject, found: Report) -> None:
    """Record the report with the run it is about, and the classes' figures where they are of the whole split."""
    from pipeline.tracking import Tracker, flat_params

    assert subject.run is not None
    config = subject.config
    tracker = Tracker(subject.run, config.tracking, config.name)
    tracker.start(flat_params(config), guest=True)
    if found.main.bits_per_dim.images == found.samples:
        figures = {f"{found.split}/bpd_class/{name}": figure.mean for name, figure in found.main.classes.items()}
        tracker.log(int(subject.lineage["images"]), figures)
    tracker.artifact(f"eval/{found.split}.html")
    tracker.close()
