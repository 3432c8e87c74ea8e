"""glow/ against the plain reference: the same latents, likelihoods and gradients on a table of configurations."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from glow import Glow, GlowConfig
from jobs import plain
from jobs.plain import PlainGlow, translated

CONDITIONS: dict[str, dict[str, object]] = {
    "none": {},
    "labels": {"classes": 3},
    "attributes everywhere": {"attributes": 3, "condition_splits": True, "condition_steps": True},
}
COUPLINGS: dict[str, dict[str, object]] = {
    "additive": {"coupling": "additive"},
    "sigmoid": {"clamp": "sigmoid"},
    "two_sigmoid": {"clamp": "two_sigmoid"},
    "soft_exp": {"clamp": "soft_exp"},
}
MIXINGS = ("lu", "dense", "reverse", "shuffle")
PRIORS: dict[str, dict[str, object]] = {"learned": {}, "fixed top": {"learned_top": False}}

CONFIGS: dict[str, dict[str, object]] = {
    f"{coupling}, {mixing}, {condition}, {prior}": {**moved, "mixing": mixing, **given, **PRIORS[prior]}
    for coupling, moved in COUPLINGS.items()
    for mixing in MIXINGS
    for condition, given in CONDITIONS.items()
    for prior in PRIORS
} | {
    "one level": {"levels": 1},
    "three levels": {"levels": 3, "steps": 1},
    "grey": {"channels": 1, "size": 16},
    "no border": {"border": False},
    "no border, fixed top": {"border": False, "learned_top": False, "classes": 2},
    "attributes in splits": {"attributes": 4, "condition_splits": True},
    "everything": {"classes": 2, "attributes": 3, "condition_splits": True, "condition_steps": True},
}
"""Coupling x mixing x condition x prior, and what stands beside the product."""


def pair(**changes: object) -> tuple[Glow, PlainGlow]:
    """A Glow away from its start and the plain reference with the same parameters, float64."""
    torch.manual_seed(0)
    config = GlowConfig(**{"size": 8, "channels": 3, "levels": 2, "steps": 2, "width": 6, **changes})  # type: ignore[arg-type]
    glow = Glow(config).double()
    with torch.no_grad():
        for parameter in glow.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    reference = PlainGlow(config).double()
    reference.load_from(glow.state_dict())
    return glow, reference


def inputs(glow: Glow) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Images, labels and attributes for a model."""
    generator = torch.Generator().manual_seed(1)
    x = (
        torch.rand(4, *([glow.config.channels] + 2 * [glow.config.size]), generator=generator, dtype=torch.float64)
        - 0.5
    )
    label = torch.tensor([0, 1, -1, 1]) if glow.config.classes > 0 else None
    size = glow.config.attributes
    return x, label, torch.randint(-1, 2, (4, size), generator=generator) if size > 0 else None


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CONFIGS)
def test_values_and_gradients_are_equal(name: str) -> None:
    glow, reference = pair(**CONFIGS[name])
    x, label, attributes = inputs(glow)
    latents, log_prob = reference(x, glow.condition(len(x), label, attributes, x))
    log_prob.mean().backward()
    theirs = gradients(reference)
    assert close(glow.log_prob(x, label, attributes), log_prob)
    for ours, theirs_too in zip(glow.encode(x, label, attributes), latents, strict=True):
        assert close(ours, theirs_too)
    for anchors in (0, 2):
        glow.set_anchors([anchors])
        glow.zero_grad()
        glow.log_prob(x, label, attributes).mean().backward()
        ours = translated(gradients(glow))
        assert set(ours) == set(theirs)
        for parameter, gradient in theirs.items():
            assert close(ours[parameter], gradient), (parameter, anchors)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}


def test_checkpointing_changes_nothing() -> None:
    glow, reference = pair(classes=2, condition_steps=True)
    x, label, _ = inputs(glow)
    condition = glow.condition(len(x), label, None, x)
    parameters = list(reference.parameters())
    wanted = torch.autograd.grad(reference(x, condition)[1].sum(), parameters, allow_unused=True)
    reference.checkpointed = True
    found = torch.autograd.grad(reference(x, condition)[1].sum(), parameters, allow_unused=True)
    for a, b in zip(found, wanted, strict=True):
        assert (a is None and b is None) or close(a, b)  # type: ignore[arg-type]


def test_initialisation_is_carried_over() -> None:
    """Norms set from data in glow are norms of the unfolded reference."""
    glow, reference = pair()
    x, *_ = inputs(glow)
    glow.initialize([x])
    reference.load_from(glow.state_dict())
    assert close(glow.log_prob(x), reference(x)[1])


def test_the_reference_knows_nothing_of_glow() -> None:
    tree = ast.parse(Path(plain.__file__).read_text(encoding="utf-8"))
    names = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    names += [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    assert {name.split(".")[0] for name in names} <= {"__future__", "collections", "math", "re", "typing", "torch"}
