"""Recognition by Bayes' rule: what the likelihoods say, no more and no less."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from glow import latents_of_seeds
from pipeline.bayes import recognition
from tests.pipeline.models import NAMES, conditions, tiny_config, tiny_model


def test_it_is_the_ratio_of_two_likelihoods() -> None:
    model, (label, attributes) = tiny_model(tiny_config()), conditions(12)
    x = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(1)) - 0.5
    found = recognition(model, x, (label, attributes), NAMES)
    assert list(found) == ["class", *NAMES]
    shares = []
    for number in range(12):
        one = slice(number, number + 1)
        both = []
        for sign in (-1, 1):
            asked = attributes[one].clone()
            asked[:, 1] = sign
            both.append(float(model.log_prob(x[one], label[one], asked).detach().double()))
        truth = int(attributes[number, 1] > 0)
        shares.append(torch.tensor(both, dtype=torch.float64).softmax(0)[truth])
    assert found["Eyeglasses"].bits == pytest.approx(float(-torch.stack(shares).log2().mean()), abs=1e-4)
    assert found["Eyeglasses"].chance == 0.5


def test_samples_are_recognised_as_often_as_the_posterior_says() -> None:
    """A law of conditional densities: on a model's own samples, being right is as frequent as it is probable."""
    model = tiny_model(tiny_config())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".condition." in name:
                parameter.mul_(4)
    label, attributes = (part.repeat(40, *[1] * (part.dim() - 1)) for part in conditions())
    with torch.no_grad():
        x = model.decode(latents_of_seeds(torch.arange(400), model.latent_shapes(), 1.0), label, attributes)
        sure = model.posterior(x, attributes).amax(1).double()
    found = recognition(model, x, (label, attributes), NAMES)["class"]
    assert 0.5 < found.right < 1.0
    assert abs(found.right - float(sure.mean())) < 4 * (0.25 / 400) ** 0.5


def test_what_never_varies_or_is_not_known_is_left_out() -> None:
    config = tiny_config()
    model, (label, attributes) = tiny_model(config), conditions(4)
    attributes[:, 2] = 1
    found = recognition(model, torch.zeros(4, 3, 8, 8), (torch.full_like(label, -1), attributes), NAMES)
    assert list(found) == ["Smiling", "Eyeglasses"]
    plain = tiny_model(dataclasses.replace(config, model=dataclasses.replace(config.model, classes=-1, attributes=-1)))
    assert recognition(plain, torch.zeros(4, 3, 8, 8), (None, None), NAMES) == {}
