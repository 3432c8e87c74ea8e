"""Pictures of latents: samples, edits, the way between two pictures, and what single levels hold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from jobs.latents.ways import Model, Pictures, Several, draw, opened, refuse_other_pictures, write_picture
from pipeline.errors import UsageError

if TYPE_CHECKING:
    from pipeline.grids import Column
    from pipeline.model import LoadedModel


def sample(
    model: Model,
    /,
    out: str = "samples.png",
    rows: int = 4,
    seeds: tuple[int, ...] = (),
    attributes: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    temperatures: tuple[float, ...] = (0.7,),
    level_temperatures: tuple[float, ...] = (),
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
        level_temperatures: One a level, finest first, instead of one.
        label: Class number; -1 takes a real image's.
        uri: MLflow address for models:/ names; empty takes MLFLOW_TRACKING_URI.
        dry_run: Load and check everything, say what would be drawn, write nothing.
    """
    from pipeline.bounds import refuse_odd
    from pipeline.grids import sample_grid
    from pipeline.registry import load_model

    refuse_other_pictures(out)
    refuse_odd(rows=rows)
    _refuse_odd_heats(temperatures, level_temperatures)
    chosen = list(seeds or range(rows))
    loaded = load_model(model, uri)
    if len(level_temperatures) not in (0, levels := loaded.config.model.levels):
        raise UsageError(f"{len(level_temperatures)} temperatures for {levels} levels", cure="one a level")
    columns = _columns(loaded, chosen, attributes, temperatures, label)
    what = f"{len(chosen)} rows, {len(columns)} columns of {loaded.config.model.size} px, artifact {loaded.digest[:12]}"
    if dry_run:
        print(f"dry run: would draw {what} to {out}")
        return 0
    heat = level_temperatures or temperatures[0]
    write_picture(out, [sample_grid(loaded.model, loaded.config.bits, chosen, columns, heat)], what)
    return 0


def _refuse_odd_heats(columns: Sequence[float], levels: Sequence[float] = ()) -> None:
    from pipeline.bounds import refuse_odd

    refuse_odd(temperature=[*columns, *levels])
    if not columns:
        raise UsageError("nothing to draw", cure="one --temperatures at least")
    if len(columns) > 1 and levels:
        raise UsageError("--level-temperatures beside several --temperatures", cure="columns differ in it, or levels")


def _columns(
    loaded: LoadedModel, seeds: Sequence[int], attributes: Sequence[str], temperatures: Sequence[float], label: int
) -> list[Column]:
    from pipeline.grids import attribute_columns, temperature_columns

    if len(temperatures) > 1:
        return temperature_columns(temperatures, loaded.condition(seeds, ",".join(attributes), label))
    base = loaded.condition(seeds, "", label)
    return attribute_columns(loaded.config.model, loaded.config.editable, base, ["", *attributes])


def edit(
    model: Model,
    pictures: Pictures,
    /,
    attributes: Several = (),
    sliders: tuple[float, ...] = (-1.0, -0.5, 0.0, 0.5, 1.0),
    out: str = "edits.png",
    uri: str = "",
    dry_run: bool = False,
) -> int:
    """Move pictures along the directions of attributes: a row a picture and attribute, a column a place of the slider.

    Args:
        model: A model's folder, an s3:// prefix, models:/NAME@alias or models:/NAME/3.
        pictures: Files, s3:// addresses, folders of either, or seed:7.
        attributes: A direction, as Smiling; repeat for more rows. None takes all.
        sliders: Places, -1 to 1 as a rule; 0 is the picture itself. Beside every row stands where the picture is.
        out: PNG file, or GIF with a frame a place.
        uri: MLflow address for models:/ names; empty takes MLFLOW_TRACKING_URI.
        dry_run: Load and check everything, write nothing.
    """
    import torch

    from pipeline import workbench
    from pipeline.bounds import refuse_odd

    refuse_other_pictures(out)
    refuse_odd(slider=sliders)
    loaded, names, pixels = opened(model, pictures, uri)
    asked = list(attributes or loaded.config.editable)
    places = [workbench.attribute_of(loaded, name) for name in asked]
    if not asked or not sliders:
        raise UsageError("nothing to edit", cure="this model has no directions" if sliders else "give --sliders")
    what = f"{len(names)} pictures, {len(asked)} attributes, {len(sliders)} places, artifact {loaded.digest[:12]}"
    if dry_run:
        print(f"dry run: would draw {what} to {out}")
        return 0
    latents = workbench.encode(loaded, pixels)
    stands = workbench.places(loaded, latents)[:, places]
    edits = [workbench.edited(loaded, latents, name, sliders) for name in asked]
    # Rows go picture by picture, so that the attributes of one face stand together.
    columns = [torch.stack([one[place] for one in edits], dim=1).flatten(0, 1) for place in range(len(sliders))]
    rows = [f"{name.replace('_', ' ')} ({at:+.2f})" for stand in stands for name, at in zip(asked, stand, strict=True)]
    draw(out, columns, [f"{slider:+g}" if slider else "as it is" for slider in sliders], rows, what)
    return 0


def interpolate(
    model: Model,
    first: Annotated[str, tyro.conf.arg(metavar="FIRST")],
    second: Annotated[str, tyro.conf.arg(metavar="SECOND")],
    /,
    steps: int = 9,
    linear: bool = False,
    out: str = "between.png",
    uri: str = "",
    dry_run: bool = False,
) -> int:
    """Draw the way between two pictures in latent space, along the great arc that keeps the latents' length.

    Args:
        model: A model's folder, an s3:// prefix, models:/NAME@alias or models:/NAME/3.
        first: Picture at the start.
        second: Picture at the end.
        steps: Pictures, both ends included.
        linear: Along the straight line instead.
        out: PNG strip, or GIF.
        uri: MLflow address for models:/ names; empty takes MLFLOW_TRACKING_URI.
        dry_run: Load and check everything, write nothing.
    """
    import torch

    from glow import interpolate as between
    from pipeline import workbench
    from pipeline.bounds import refuse_odd

    refuse_other_pictures(out)
    refuse_odd(steps=steps)
    loaded, names, pixels = opened(model, (first, second), uri)
    if len(names) != 2:
        raise UsageError(f"{len(names)} pictures", cure="two: one to begin with, one to end with")
    what = f"{steps} steps {'on a line' if linear else 'on an arc'}, artifact {loaded.digest[:12]}"
    if dry_run:
        print(f"dry run: would draw {what} to {out}")
        return 0
    a, b = ([z[[end]] for z in workbench.encode(loaded, pixels)] for end in (0, 1))
    weights = torch.linspace(0, 1, steps)
    drawn = workbench.decode(loaded, between(a, b, weights, spherical=not linear))
    draw(out, [image[None] for image in drawn], [f"{weight:.2f}" for weight in weights], [], what)
    return 0


def sweep(
    model: Model,
    pictures: Pictures,
    /,
    over: Literal["temperature", "levels"] = "temperature",
    temperatures: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25),
    seed: int = 0,
    out: str = "sweep.png",
    uri: str = "",
    dry_run: bool = False,
) -> int:
    """Draw what the latents of pictures hold: scaled by temperatures, or with ever fewer levels kept.

    Args:
        model: A model's folder, an s3:// prefix, models:/NAME@alias or models:/NAME/3.
        pictures: Files, s3:// addresses, folders of either, or seed:7.
        over: temperature scales all latents; levels keeps those from a level on and draws the finer ones anew.
        temperatures: Factors of the latents, over temperature.
        seed: Of the fresh latents, at temperature 0.7, over levels.
        out: PNG file, or GIF with a frame a column.
        uri: MLflow address for models:/ names; empty takes MLFLOW_TRACKING_URI.
        dry_run: Load and check everything, write nothing.
    """
    from pipeline import workbench
    from pipeline.bounds import refuse_odd

    refuse_other_pictures(out)
    refuse_odd(seed=seed)
    _refuse_odd_heats(temperatures)
    loaded, names, pixels = opened(model, pictures, uri)
    what = f"{len(names)} pictures over {over}, artifact {loaded.digest[:12]}"
    if dry_run:
        print(f"dry run: would draw {what} to {out}")
        return 0
    latents = workbench.encode(loaded, pixels)
    swept = (
        workbench.over_temperatures(latents, temperatures)
        if over == "temperature"
        else workbench.over_levels(latents, seed)
    )
    columns = [workbench.decode(loaded, found) for found in swept.values()]
    draw(out, columns, list(swept), [Path(name).name for name in names], what)
    return 0
