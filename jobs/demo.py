"""Everything at once: data, training on two Ray workers, evaluation, registration, promotion, pictures, a report.

  python -m jobs demo [toy64 | toy32 | photos32] [--folder demo] [--again] [--dry-run]

Stopped anywhere, the same command goes on where it was: a stage is done when what it makes is there and whole (the
manifest, the checkpoint of the last image, the alias on these very weights, the artifact's digest in the picture).
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from jobs.material import DATA, Pictures, pack
from pipeline.errors import ConflictError, UsageError

if TYPE_CHECKING:
    from pipeline.config import TrainConfig
    from pipeline.export import TrainedRun
    from pipeline.manifest import Manifest
    from pipeline.model import LoadedModel
    from pipeline.report import Report
    from pipeline.storage import Storage

Preset = Annotated[Literal["toy64", "toy32", "photos32"], tyro.conf.Positional]


def main(argv: Sequence[str]) -> int:
    """Run the demo."""
    return tyro.cli(demo, prog="python -m jobs demo", description=__doc__, args=list(argv))


def demo(
    preset: Preset = "toy64",
    folder: str = "demo",
    workers: int = 2,
    again: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
) -> int:
    """Make a champion and its pictures.

    Args:
        preset: What to learn from and how.
        folder: Where everything goes: data, runs, registry, mlflow.db, pictures.
        workers: Ray Train workers; 0 trains in this process. The artifact is the same for any number.
        again: Train once more, though a champion is there.
        dry_run: Say what is there and what would be made, write nothing.
    """
    from jobs import presets

    work = Demo(presets.preset(preset).config, DATA[preset], Path(folder), workers)
    if dry_run:
        print(work.outlook(again))
        return 0
    if again:
        work.runs.remove_tree(preset)
    run(work)
    return 0


def run(work: Demo) -> None:
    """Go through the stages, saying what each found or made."""
    start = time.monotonic()
    for number, (name, stage) in enumerate(work.stages.items(), 1):
        began = time.monotonic()
        print(f"[{number}/{len(work.stages)}] {name}", flush=True)
        print(f"      {stage()}  ({time.monotonic() - began:.0f} s)", flush=True)
    print(work.closing(time.monotonic() - start))


class Demo:
    """The demo of one configuration in one folder. Every stage returns a line about what is there now."""

    def __init__(self, config: TrainConfig, pictures: Pictures, folder: Path, workers: int) -> None:
        self.folder, self.pictures, self.name = folder, pictures, config.name
        self.uri, self.made = f"sqlite:///{folder / 'mlflow.db'}", False
        self.dataset = folder / "data" / config.name
        self.config = replace(
            config,
            storage=str(folder / "runs"),
            data=replace(config.data, prefix=str(self.dataset), cache=str(folder / "cache")),
            tracking=replace(config.tracking, uri=self.uri),
            cluster=replace(config.cluster, workers=workers),
        )

    @property
    def stages(self) -> dict[str, Callable[[], str]]:
        """By name, in order."""
        return {
            "data": self.prepare,
            "train": self.train,
            "evaluate": self.evaluate,
            "register": self.register,
            "promote": self.promote,
            "pictures and report": self.show,
        }

    @property
    def runs(self) -> Storage:
        """The folder of runs."""
        from pipeline.storage import open_storage

        return open_storage(str(self.folder / "runs"))

    @cached_property
    def manifest(self) -> Manifest:
        """The dataset; MissingError before it is prepared."""
        from pipeline.manifest import open_manifest
        from pipeline.storage import open_storage

        return open_manifest(open_storage(str(self.dataset)))

    def prepare(self) -> str:
        """Pictures into verified shards."""
        from pipeline.storage import MissingError

        try:
            splits = self.manifest.splits
        except MissingError:
            pack(self.pictures, self.dataset)
            splits = self.manifest.splits
        counts = ", ".join(f"{split.samples} {name}" for name, split in splits.items())
        return f"{self.dataset}: {counts} images of {self.manifest.size} px, digest {self.manifest.digest[:12]}"

    def train(self) -> str:
        """The preset on Ray workers, unless the checkpoint of the last image is there."""
        from jobs.train import launch

        if self.trained() is None:
            launch(self.config)
            self.made = True
        run = self.trained()
        assert run is not None, "training returned before its last checkpoint"
        return f"{run.storage.url}: {run.images} images, step {run.step}"

    def trained(self) -> TrainedRun | None:
        """The finished run of this very configuration; None where there is none, or it has not come to its end."""
        from pipeline.export import read_run
        from pipeline.fingerprint import fingerprint
        from pipeline.train import resolved

        config = resolved(self.config, self.manifest)
        try:
            run = read_run(self.runs.sub(self.name))
        except UsageError:
            return None
        if fingerprint(run.config, run.config.data.digest) != fingerprint(config, self.manifest.digest):
            cure = "--again trains it anew, or give another --folder"
            raise ConflictError("the run here was made with other settings", where=run.storage.url, cure=cure)
        return run if run.images >= config.schedule.images else None

    @cached_property
    def run(self) -> TrainedRun:
        """The finished run."""
        run = self.trained()
        assert run is not None, "stages run in order"
        return run

    @cached_property
    def weights(self) -> str:
        """sha256 of the weights that ship."""
        from pipeline.model import weights_of
        from pipeline.storage import sha256_hex

        return sha256_hex(weights_of(self.run.model()))

    @cached_property
    def review(self) -> Report:
        """The review of the run; costs an evaluation."""
        from jobs.showcase import TEMPERATURE
        from pipeline.review import open_subject, review

        return review(open_subject(self.run.storage.url), self.config.data.validation, temperature=TEMPERATURE)

    def evaluate(self) -> str:
        """bits/dim of all held-out images, kept beside the run."""
        from jobs.evaluate import show_in_mlflow
        from pipeline.report import kept_review
        from pipeline.review import keep_review, open_subject

        split = self.config.data.validation
        kept = kept_review(self.run.storage, split, self.weights, self.manifest.digest)
        if kept is None:
            keep_review(self.run.storage, self.review)
            show_in_mlflow(open_subject(self.run.storage.url), self.review)
        figure = (kept or self.review).main.bits_per_dim
        return f"{figure.mean:.3f} ± {figure.stderr:.3f} bits/dim on {figure.images} held-out images"

    def champion(self) -> LoadedModel | None:
        """What the alias stands for, loaded by it, if it has this run's weights."""
        from pipeline.registry import load_model

        if not (self.folder / "mlflow.db").exists():
            return None
        try:
            loaded = load_model(self.address, self.uri)
        except UsageError:
            return None
        return loaded if loaded.files["weights.safetensors"] == self.weights else None

    @property
    def address(self) -> str:
        """The champion's address."""
        return f"models:/{self.name}@champion"

    def register(self) -> str:
        """The model folder, as a version in MLflow."""
        if self.champion() is None:
            self._version()
        return f"{self.run.storage.url}/model in {self.uri}"

    def _version(self) -> int:
        from pipeline.export import export_model
        from pipeline.registry import ModelRegistry

        export_model(self.run, self.manifest)
        return ModelRegistry(self.uri).register_run(self.name, self.run.storage, self.config.tracking)

    def promote(self) -> str:
        """The alias champion, past the gates."""
        from jobs.models import evidence_of, print_gates
        from pipeline.promotion import Request, promote
        from pipeline.registry import ModelRegistry

        if self.champion() is None:
            registry, version = ModelRegistry(self.uri), self._version()
            request = Request(name=self.name, version=version, reason="demo")
            promote(registry, request, evidence_of(registry, self.name, version), announce=print_gates)
        loaded = self.champion()
        assert loaded is not None, "promotion leaves the alias on these weights"
        return f"{self.address}: artifact {loaded.digest}"

    def show(self) -> str:
        """samples.png and report.html, from the champion loaded by its alias."""
        from jobs.showcase import artifact_in, artifact_of, keep_picture, keep_report
        from pipeline.registry import ModelRegistry

        champion = self.champion()
        assert champion is not None, "stages run in order"
        picture, report = self.folder / "samples.png", self.folder / "report.html"
        if artifact_in(picture) != champion.digest:
            keep_picture(picture, champion)
        if artifact_of(report.with_suffix(".json")) != champion.digest:
            keep_report(report, champion, self.review, ModelRegistry(self.uri).ledger(self.name).entries())
        return f"{picture} and {report}"

    def outlook(self, again: bool) -> str:
        """What is there and what a run of the demo would make."""
        from jobs.plan import plan

        if not (self.dataset / "manifest.json").exists():
            pictures = self.pictures
            return f"would draw {pictures.images} {pictures.kind} of {pictures.size} px into {self.dataset}, then train"
        known = None if again else self.trained()
        if known is None:
            return f"{self.dataset} is there; would train:\n{plan(self.config)}"
        there = "is there" if self.champion() else "would be made of it"
        return f"{known.storage.url} is trained; {self.address} {there}"

    def closing(self, seconds: float) -> str:
        """What was made, what it is worth, and what to try next."""
        kept = json.loads((self.folder / "report.json").read_bytes())
        mine = next(iter(kept["evaluations"].values()))["bits_per_dim"]["mean"]
        codecs = {name: figure["mean"] for name, figure in kept["codecs"].items()}
        beside = ", ".join(f"{name.upper()} {mean:.2f} ({mine / mean:.2f}x)" for name, mean in codecs.items())
        ask = "" if not self.manifest.editable else " --attributes=+Smiling --attributes=+Wearing_Hat"
        python = _python()
        how = f"made in {seconds:.0f} s" if self.made else "is there already (--again trains once more)"
        return (
            f"\n{self.address} {how}: {mine:.3f} bits/dim on held-out images; {beside}\n"
            f"  {self.folder / 'samples.png'}   samples\n"
            f"  {self.folder / 'report.html'}   the report; the same as JSON beside it\n"
            f"  {self.folder}/              data, runs, registry, mlflow.db\n"
            f"try next:\n"
            f"  {python} -m jobs latents sample {self.address} --uri {self.uri} --out more.png{ask}\n"
            f"  {python} -m jobs train {self.name} --data.prefix {self.dataset} --name longer --schedule.images 40000\n"
            f"  {python} -m mlflow server --backend-store-uri {self.uri} --port 5000"
        )


def _python() -> str:
    """How this interpreter is called from here: python where it is the first, else by its place."""
    if shutil.which("python") == sys.executable:
        return "python"
    place = os.path.relpath(sys.executable)
    return sys.executable if place.startswith("..") else place
