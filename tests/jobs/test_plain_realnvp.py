"""RealNVP of glow/ against the plain reference: the same latents, likelihoods and gradients, trained and evaluated."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from torch import Tensor

from glow import RealNVP, RealNVPConfig
from jobs import plain_realnvp
from jobs.plain_realnvp import PlainRealNVP, translated
from tests.glow.table import perturbed

CONFIGS = {
    "two-scales": {},
    "one-scale": {"levels": 1, "residuals": 3},
    "grey": {"channels": 1, "levels": 3, "residuals": 2},
    "conditioned": {"classes": 2, "attributes": 3},
    "constrained": {"constraint": 0.5},
}


def pair(name: str, training: bool) -> tuple[RealNVP, PlainRealNVP]:
    """A RealNVP away from its start and the plain reference with the same state, float64."""
    torch.manual_seed(0)
    config = RealNVPConfig(**{"size": 8, "channels": 3, "levels": 2, "width": 4, "residuals": 1, **CONFIGS[name]})  # type: ignore[arg-type]
    flow = perturbed(RealNVP(config)).double().train(training)
    reference = PlainRealNVP(config).double().train(training)
    reference.load_from(flow.state_dict())
    return flow, reference


def inputs(flow: RealNVP) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Images, labels and attributes."""
    x = torch.rand(3, flow.config.channels, 8, 8, dtype=torch.float64) - 0.5
    size = flow.config.attributes
    label = torch.tensor([0, 1, -1]) if flow.config.classes > 0 else None
    return x, label, torch.randint(-1, 2, (3, size)) if size > 0 else None


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_values_and_gradients_are_equal(name: str, training: bool) -> None:
    flow, reference = pair(name, training)
    x, label, attributes = inputs(flow)
    latents, log_prob = reference(x, flow.condition(len(x), label, attributes, x))
    for ours, theirs in zip(flow.encode(x, label, attributes), latents, strict=True):
        assert close(ours, theirs)
    for anchors in (0, 4):
        flow.set_anchors([anchors])
        own = flow.log_prob(x, label, attributes)
        assert close(own, log_prob)
        parameters = dict(flow.named_parameters())
        gradients = torch.autograd.grad(own.mean(), list(parameters.values()))
        found = translated(dict(zip(parameters, gradients, strict=True)))
        named = dict(reference.named_parameters())
        wanted = torch.autograd.grad(log_prob.mean(), list(named.values()), retain_graph=True)
        assert set(found) == set(named)
        for parameter, gradient in zip(named, wanted, strict=True):
            assert close(found[parameter], gradient), parameter


def test_the_reference_knows_nothing_of_glow() -> None:
    tree = ast.parse(Path(plain_realnvp.__file__).read_text(encoding="utf-8"))
    names = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    names += [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    assert {name.split(".")[0] for name in names} <= {"__future__", "collections", "math", "re", "typing", "torch"}
