"""Studies: what a choice is worth, measured. Stopped, the same command goes on; started twice, two share the work.

  python -m jobs studies [mixing | families | dequantization | conditioning | edits] [--folder studies] [--dry-run]

Every training of a study is kept as a result file in the folder; the table and the plot are made of those. Budgets
count images, so that a busy machine changes nothing but the time it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from jobs.studies.cells import Cell, Result, Workshop
    from jobs.studies.plans import Measure, Outcome, Scale

Name = Annotated[Literal["all", "mixing", "families", "dequantization", "conditioning", "edits"], tyro.conf.Positional]


def main(argv: Sequence[str]) -> int:
    """Run studies."""
    return tyro.cli(studies, prog="python -m jobs studies", description=__doc__, args=list(argv))


def studies(
    name: Name = "all",
    folder: str = "studies",
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
) -> int:
    """Make the table and the plot of a study.

    Args:
        name: Which one, or all of them.
        folder: Where everything goes: FOLDER/NAME.md, FOLDER/NAME.png, data, runs and results.
        dry_run: Train nothing: show how far every study is, and the tables of what is there.
    """
    from jobs.material import DATA
    from jobs.studies.cells import Workshop
    from jobs.studies.plans import Scale

    workshop = Workshop(Path(folder), DATA, lambda text: print(text, flush=True))
    every = known(workshop)
    chosen = every if name == "all" else {name: every[name]}
    for title, plan in chosen.items():
        show(workshop, title, plan, Scale(), dry_run)
    return 0


def known(workshop: Workshop) -> dict[str, Callable[[Measure, Scale], Outcome]]:
    """The studies by name, in the order of the documents."""
    from jobs.studies import plans
    from jobs.studies.costs import dequantization, families
    from jobs.studies.edits import edits

    return {
        "mixing": plans.mixing,
        "families": families,
        "dequantization": dequantization,
        "conditioning": plans.conditioning,
        "edits": partial(edits, workshop),
    }


def show(
    workshop: Workshop, title: str, plan: Callable[[Measure, Scale], Outcome], scale: Scale, dry_run: bool
) -> None:
    """Make a study, or with `dry_run` say how far it is; print its table."""
    from pipeline.storage import open_storage

    asked: list[Cell] = []

    def measure(cells: Sequence[Cell]) -> list[Result]:
        asked.extend(cells)
        return workshop.results(cells) if dry_run else workshop.measure(cells)

    outcome = plan(measure, scale)
    done = len(workshop.results(asked))
    print(f"{title}: {done} of {len(asked)} trainings are there\n{outcome.markdown()}", end="", flush=True)
    if not dry_run:
        home = open_storage(str(workshop.folder))
        home.write(f"{title}.md", outcome.markdown().encode())
        outcome.draw(workshop.folder / f"{title}.png")
        print(f"{home.where(title)}.md and .png")
