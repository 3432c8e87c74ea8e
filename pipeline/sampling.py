"""Sampling by seed: seed, temperature and condition decide the pixels, whatever else is sampled beside them."""

from __future__ import annotations

import contextlib
import difflib
import json
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from glow import Flow, FlowConfig, latents_of_seeds, to_pixels
from pipeline.bounds import refuse_odd
from pipeline.errors import DataError, UsageError

Temperature = float | Sequence[float]
"""Of all levels, or one a level."""

Condition = tuple[Tensor | None, Tensor | None]
"""(label int64 [b] or None, attributes int8 [b, A] or None)"""


@torch.no_grad()
def sample(
    model: Flow, bits: int, seeds: Sequence[int], temperature: Temperature = 0.7, condition: Condition = (None, None)
) -> Tensor:
    """Images uint8 [n, c, h, w] of seeds at a temperature; a seed gives the same pixels in whatever company.

    On a CPU images are therefore decoded one by one and on one thread: rounding of convolutions depends on the batch
    and the threads, and a value at the edge of a bin would fall to either side. On a GPU they are decoded together.
    """
    device = next(model.parameters()).device
    refuse_odd(temperature=temperature)
    chunk = 1 if device.type == "cpu" else 64
    label, attributes = (None if part is None else part.to(device) for part in condition)
    pixels = []
    with one_thread():
        for start in range(0, len(seeds), chunk):
            rows = slice(start, start + chunk)
            numbers = torch.tensor(list(seeds[rows]), dtype=torch.int64, device=device)
            latents = latents_of_seeds(numbers, model.latent_shapes(), temperature)
            x = model.decode(latents, _rows(label, rows), _rows(attributes, rows))
            if not torch.isfinite(x).all():
                raise DataError(f"samples of seeds {list(seeds[rows])} are not finite", cure="lower the temperature")
            pixels.append(to_pixels(x, bits).cpu())
    return torch.cat(pixels)


def condition_of(
    config: FlowConfig, editable: Sequence[str], base: Condition, attributes: str | Sequence[str] = "", label: int = -1
) -> Condition:
    """Lay "+Smiling,-Eyeglasses" (or a list of such) and a class number over the conditions `base` of some images.

    `editable` names the positions of the attribute vector. UsageError for a name or a class the model was not
    conditioned on; None where it was conditioned on none.
    """
    labels, signs = base
    labelled, described = config.classes > 0, config.attributes > 0
    if label != -1 and not (labelled and 0 <= label < config.classes):
        known = f"0 to {config.classes - 1}" if labelled else "none: the model knows no classes"
        raise UsageError(f"no class {label}", cure=f"classes here: {known}")
    if labels is not None and label != -1:
        labels = torch.full_like(labels, label)
    for name, sign in _signed_names(attributes):
        if signs is None or not described or name not in editable:
            raise _unknown_attribute(name, editable if described else ())
        signs = signs.clone()
        signs[:, editable.index(name)] = sign
    return labels if labelled else None, signs if described else None


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread: sums of floats then have one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _rows(tensor: Tensor | None, rows: slice) -> Tensor | None:
    return None if tensor is None else tensor[rows]


def _signed_names(attributes: str | Sequence[str]) -> list[tuple[str, int]]:
    """Split "+Smiling, -Eyeglasses", a JSON list or a list of such into (name, sign); no sign means +."""
    if isinstance(attributes, str) and attributes.lstrip().startswith("["):
        try:
            attributes = [str(name) for name in json.loads(attributes)]
        except ValueError as error:
            raise UsageError(f"attributes are no JSON list: {error}", where=str(attributes)) from error
    names = attributes.split(",") if isinstance(attributes, str) else attributes
    names = [name.strip() for name in names if name.strip()]
    return [(name.lstrip("+-"), -1 if name.startswith("-") else 1) for name in names]


def _unknown_attribute(name: str, known: Sequence[str]) -> UsageError:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    cure = f"did you mean {near[0]}?" if near else f"attributes here: {', '.join(known) or 'none'}"
    return UsageError(f"no attribute {name}", cure=cure)
