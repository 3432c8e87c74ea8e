"""Latents: sample a model under attributes, classes and temperatures. A seed always gives the same pixels.

python -m jobs latents sample models:/faces@champion --out samples.png --attributes +Smiling --attributes +Wearing_Hat
python -m jobs latents sample runs/faces/model --out strip.png --rows 2 --temperatures 0.3 0.5 0.7 1.0
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from pipeline.errors import UsageError

if TYPE_CHECKING:
    from pipeline.grids import Column
    from pipeline.model import LoadedModel

Model = Annotated[str, tyro.conf.arg(metavar="MODEL")]


def main(argv: Sequence[str]) -> int:
    """Run sample."""
    return tyro.extras.subcommand_cli_from_dict(
        {"sample": sample},
        prog="python -m jobs latents",
        description=__doc__,
        args=list(argv),
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def sample(
    model: Model,
    /,
    out: str = "samples.png",
    rows: int = 4,
    seeds: tuple[int, ...] = (),
    attributes: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    temperatures: tuple[float, ...] = (0.7,),
    label: int = -1,
    uri: str = "",
    dry_run: bool = False,
) -> int:
    """Draw a grid: a row a seed, a column a request for attributes or a temperature.

    Args:
        model: A model's folder, an s3:// prefix, models:/NAME@alias or models:/NAME/3.
        out: PNG file to write.
        rows: Seeds 0, 1, ... so many.
        seeds: These seeds instead.
        attributes: What a column asks for, as +Smiling,-Eyeglasses; repeat for more columns (--attributes=-X where it
            starts with a minus). The rest is a real image's.
        temperatures: One; or several, then columns differ in temperature, and every image is asked for all attributes.
        label: Class number; -1 takes a real image's.
        uri: MLflow address for models:/ names; empty takes MLFLOW_TRACKING_URI.
        dry_run: Load and check everything, say what would be drawn, write nothing.
    """
    from pipeline.grids import sample_grid
    from pipeline.registry import load_model

    chosen = list(seeds or range(rows))
    if not chosen or not temperatures:
        raise UsageError("nothing to draw", cure="give --rows or --seeds, and a temperature")
    loaded = load_model(model, uri)
    columns = _columns(loaded, chosen, attributes, temperatures, label)
    what = f"{len(chosen)} rows, {len(columns)} columns of {loaded.config.model.size} px, artifact {loaded.digest[:12]}"
    if dry_run:
        print(f"dry run: would draw {what} to {out}")
        return 0
    picture = sample_grid(loaded.model, loaded.config.bits, chosen, columns, temperatures[0])
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    picture.save(out)
    print(f"{out}: {what}")
    return 0


def _columns(
    loaded: LoadedModel, seeds: Sequence[int], attributes: Sequence[str], temperatures: Sequence[float], label: int
) -> list[Column]:
    from pipeline.grids import attribute_columns, temperature_columns

    if len(temperatures) > 1:
        return temperature_columns(temperatures, loaded.condition(seeds, ",".join(attributes), label))
    base = loaded.condition(seeds, "", label)
    return attribute_columns(loaded.config.model, loaded.config.editable, base, ["", *attributes])
