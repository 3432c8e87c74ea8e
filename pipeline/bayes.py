"""Recognition: p(condition | image) by Bayes' rule from exact likelihoods, judged on held-out images.

A conditional density is a classifier: what is likelier with the attribute than without it has the attribute. It says
how much of a condition the model uses, with no other network involved. Beforehand both signs, and all classes, count as
equally probable; an image's other conditions are given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glow import Flow
from pipeline.sampling import Condition


@dataclass(frozen=True, kw_only=True)
class Recognition:
    """One attribute, or the class."""

    right: float
    """Share told right: the mean over what occurs, so that a rare attribute is not passed by always saying no."""
    chance: float
    """The share that guessing gets right."""
    bits: float
    """Mean surprise, -log2 p(truth | image); guessing is surprised by -log2 of `chance`."""
    images: int


@torch.no_grad()
def recognition(model: Flow, x: Tensor, condition: Condition, editable: Sequence[str]) -> dict[str, Recognition]:
    """By attribute, and "class"; of images x [b, c, h, w] with what is true of them. What never varies is left out.

    One pass a class and one an attribute.
    """
    label, attributes = condition
    found: dict[str, Recognition] = {}
    if label is not None and bool((label >= 0).all()):
        every = [model.log_prob(x, torch.full_like(label, each), attributes) for each in range(model.config.classes)]
        found["class"] = _told(torch.log_softmax(torch.stack(every, 1).double(), dim=1), label)
    if attributes is not None:
        known = model.log_prob(x, label, attributes).double()
        for column, name in enumerate(editable):
            truth = attributes[:, column]
            flipped = attributes.clone()
            flipped[:, column] = -truth
            other = model.log_prob(x, label, flipped).double()
            pair = torch.where(truth[:, None] > 0, torch.stack([other, known], 1), torch.stack([known, other], 1))
            keep = truth != 0
            found[name] = _told(torch.log_softmax(pair[keep], dim=1), (truth[keep] > 0).long())
    return {name: each for name, each in found.items() if each.images}


def _told(log_posterior: Tensor, truth: Tensor) -> Recognition:
    """log p(option | image) [b, options] and the option that is true [b] -> figures; none where only one occurs."""
    present = truth.unique()
    options, varied = log_posterior.shape[1], len(present) > 1
    right = (log_posterior.argmax(1) == truth).double()
    surprise = -log_posterior.gather(1, truth[:, None]).mean() / math.log(2) if varied else math.nan
    return Recognition(
        right=float(torch.stack([right[truth == each].mean() for each in present]).mean()) if varied else math.nan,
        chance=1 / options,
        bits=float(surprise),
        images=len(truth) if varied else 0,
    )
