"""Studies: what is stopped goes on, what is done is not done again, and what is drawn is what was measured."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from jobs.material import Pictures
from jobs.studies import costs, edits, plans, show
from jobs.studies.cells import Workshop, key, locked
from jobs.studies.plans import Scale
from pipeline.export import natural_stream
from pipeline.judge import judge_for
from tests.jobs.runs import dataset

PICTURES = {name: Pictures("faces", 16, 160) for name in ("photos32", "toy32")}
TINY = Scale(images=32, seeds=1, levels=1, steps=1, width=8, judged=8, init_images=32, edited=6, judge_images=128)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workshop's folder with its datasets and nothing else."""
    folder = tmp_path_factory.mktemp("workshop")
    for name in PICTURES:
        shutil.copytree(dataset(), folder / "data" / name)
    return folder


class Stopped(Exception):
    """Somebody stopped the study."""


def test_a_study_that_is_stopped_goes_on_and_comes_to_the_same_table(data: Path, tmp_path: Path) -> None:
    lines: list[str] = []

    def say(text: str) -> None:
        lines.append(text)
        if len(lines) == 6:
            raise Stopped

    folder = Path(shutil.copytree(data, tmp_path / "broken"))
    with pytest.raises(Stopped):
        plans.mixing(Workshop(folder, PICTURES, say).measure, TINY)
    kept = {path: path.read_bytes() for path in folder.glob("runs/*/result.json")}
    assert len(kept) == 3
    broken = plans.mixing(Workshop(folder, PICTURES, say).measure, TINY)
    assert {path: path.read_bytes() for path in kept} == kept
    assert len(lines) == 2 * 12
    whole = plans.mixing(Workshop(Path(shutil.copytree(data, tmp_path / "whole")), PICTURES, print).measure, TINY)
    assert broken.markdown() == whole.markdown()
    assert "not yet run" not in whole.markdown()


def test_a_dry_run_trains_nothing_and_shows_what_is_there(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(data, tmp_path / "studies"))
    workshop = Workshop(folder, PICTURES, print)
    show(workshop, "conditioning", plans.conditioning, TINY, dry_run=True)
    assert "0 of 5 trainings are there" in capsys.readouterr().out
    show(workshop, "conditioning", plans.conditioning, TINY, dry_run=False)
    show(workshop, "conditioning", plans.conditioning, TINY, dry_run=True)
    assert "5 of 5 trainings are there" in capsys.readouterr().out
    assert (folder / "conditioning.md").read_text().count("(one seed)") == 5
    with Image.open(folder / "conditioning.png") as plot:
        assert plot.width > 300
    show(Workshop(tmp_path / "nothing", PICTURES, print), "mixing", plans.mixing, TINY, dry_run=True)
    assert not (tmp_path / "nothing").exists()


def test_what_another_process_trains_is_left_to_it(data: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(data, tmp_path / "studies"))
    cell = plans.cell(TINY, "shared", "toy32", 0)
    with locked(folder / f"{key(cell)}.lock"), locked(folder / f"{key(cell)}.lock", wait=False) as mine:
        assert not mine
        assert not Workshop(folder, PICTURES, print)._trained_here(cell)
    (result,) = Workshop(folder, PICTURES, print).measure([cell])
    assert result.images == 32
    assert result.cpu_seconds > 0
    assert [images for images, _ in result.curve] == [0, 16, 32]


def test_equal_time_is_more_images_for_the_cheaper(data: Path, tmp_path: Path) -> None:
    workshop = Workshop(Path(shutil.copytree(data, tmp_path / "studies")), PICTURES, print)
    assert costs.dequantization(workshop.results, TINY).markdown().count("not yet run") == 2
    rows = costs.dequantization(workshop.measure, TINY).table[1:]
    assert [row[0] for row in rows[:2]] == ["uniform", "variational (bound)"]
    longer = costs.lasting(plans.cell(TINY, "uniform", "photos32", 0), 1.6)
    assert longer.config.schedule.images == 48
    assert "as long as" in rows[2][0]
    assert int(rows[2][3]) >= 32


def test_families_have_about_equal_parameters(data: Path, tmp_path: Path) -> None:
    workshop = Workshop(Path(shutil.copytree(data, tmp_path / "studies")), PICTURES, print)
    glow = plans.cell(replace(TINY, width=24), "glow", "toy32", 0)
    width = costs.realnvp_width(glow, TINY)
    (one,) = workshop.measure([costs.realnvp_cell(TINY, "realnvp", 0, width)])
    (other,) = workshop.measure([glow])
    assert 0.5 < one.parameters / other.parameters < 2
    assert one.bits_per_dim is not None


def test_a_cell_is_named_by_its_settings_and_not_by_its_places() -> None:
    cell = plans.cell(TINY, "some", "toy32", 0)
    assert key(cell) != key(replace(cell, config=replace(cell.config, seed=1)))
    assert key(cell) != key(plans.cell(replace(TINY, images=64), "some", "toy32", 0))
    assert key(cell) == key(plans.cell(TINY, "some", "toy32", 0, mixing="lu"))


def test_edits_are_judged_and_kept(data: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(data, tmp_path / "studies"))
    workshop, cell = Workshop(folder, PICTURES, print), plans.cell(TINY, "edits", "toy32", 0)
    assert edits.edits(workshop, workshop.results, TINY, cell).markdown().count("\n") == 2
    first = edits.edits(workshop, workshop.measure, TINY, cell).markdown()
    assert first.count("not judged (below 97%)") == len(workshop.manifest("toy32").editable)
    (kept,) = folder.glob("runs/*/edits-6.json")
    kept.write_bytes(kept.read_bytes().replace(b"0.", b"1."))
    assert edits.edits(workshop, workshop.measure, TINY, cell).markdown() != first


def test_an_edit_counts_what_the_judge_sees_change(data: Path, tmp_path: Path) -> None:
    """By a judge that claims to know everything, and a direction of 0, then one that turns every picture white."""
    workshop = Workshop(Path(shutil.copytree(data, tmp_path / "studies")), PICTURES, print)
    cell, manifest = plans.cell(TINY, "edits", "toy32", 0), workshop.manifest("toy32")
    workshop.measure([cell])
    run = workshop.trained(cell)
    judge = judge_for(manifest, run.config.data, images=64)
    judge = replace(judge, accuracy=dict.fromkeys(judge.accuracy, 1.0))
    with natural_stream(manifest, "val", run.config.data) as stream:
        faces = next(stream.batches(0, 6))
    shapes, name = run.model().latent_shapes(), judge.able[0]
    still = edits.judged(run, judge, {name: [torch.zeros(1, *shape) for shape in shapes]}, faces, name, 1.0)
    assert not any((still.added, still.removed, still.changed, *still.others.values()))
    far = edits.judged(run, judge, {name: [torch.full((1, *shape), 50.0) for shape in shapes]}, faces, name, 1.0)
    assert any(far.others.values())
    assert set(far.others) == set(judge.able[1:])
    table = edits.outcome({"accuracy": judge.accuracy, "edits": {name: {"0.5": asdict(far), "1.0": asdict(far)}}})
    assert table.markdown().splitlines()[2].startswith(f"| {name} | 100.0% |")
    table.draw(tmp_path / "bars.png")
    with Image.open(tmp_path / "bars.png") as plot:
        assert plot.width > 300
