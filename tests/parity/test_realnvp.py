"""RealNVP against its restatement in numpy, through golden arrays: whole models, and every part where it differs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from glow import BatchNorm, OrderedSqueeze, RealNVP, RealNVPConfig
from glow.residual import ResidualNet
from tests.parity import realnvp
from tests.parity.make_golden import REALNVP_CASES, packed, realnvp_weights, unpacked
from tests.parity.restatement import Array, squeezed
from tests.parity.test_parity import arrays, close, part

__all__ = ["arrays"]

names = pytest.mark.parametrize("name", REALNVP_CASES)


def state(name: str, wanted: dict[str, Array]) -> dict[str, Array]:
    """The golden weights and running moments of a case by name."""
    return unpacked(wanted["w"], realnvp_weights(*REALNVP_CASES[name], np.random.default_rng(0)))


def model(name: str, wanted: dict[str, Array]) -> tuple[RealNVP, Tensor | None]:
    """The small RealNVP of a case with its golden state (strict: every name and shape is pinned), and attributes."""
    condition, residuals = REALNVP_CASES[name]
    shape = {"size": 4, "channels": 1, "levels": 2, "width": 2, "residuals": residuals}
    flow = RealNVP(RealNVPConfig(**shape, classes=-1, attributes=condition or -1)).double()
    flow.load_state_dict({key: torch.tensor(value) for key, value in state(name, wanted).items()})
    return flow, torch.tensor(wanted["condition"]) if condition else None


@names
@pytest.mark.parametrize("training", [False, True])
def test_a_small_realnvp(name: str, training: bool, arrays: dict[str, Array]) -> None:
    """log_prob and latents by running moments and by the batch's; images of cooled latents."""
    wanted = part(arrays, f"{name}/")
    flow, given = model(name, wanted)
    x, at = torch.tensor(wanted["x"]), "trained/" if training else ""
    flow.train(training)
    assert close(flow.log_prob(x, attributes=given), wanted[at + "log_prob"])
    for level, latent in enumerate(flow.encode(x, attributes=given)):
        assert close(latent, wanted[f"{at}latents.{level}"])
    if not training:
        latents = [torch.tensor(wanted[f"latents.{level}"]) for level in range(2)]
        assert close(flow.decode([0.7 * latent for latent in latents], attributes=given), wanted["decoded"])
        assert close(flow.decode(latents, attributes=given), wanted["x"])


@names
def test_every_norm_sees_the_same_moments_and_takes_a_tenth_of_them(name: str, arrays: dict[str, Array]) -> None:
    """Checkerboards count the fields that stay as zeros; one call to `absorb` moves running moments by .1."""
    wanted = part(arrays, f"{name}/")
    flow, given = model(name, wanted)
    flow.log_prob(torch.tensor(wanted["x"]), attributes=given)
    w, seen = state(name, wanted), {}
    realnvp.encoded(wanted["x"], w, 2, wanted.get("condition"), seen)
    assert np.allclose(packed(seen), wanted["seen"])
    flow.absorb(flow.moments())
    norms = {f"{at}.": module for at, module in flow.named_modules() if isinstance(module, BatchNorm)}
    assert set(norms) == set(seen)
    for at, norm in norms.items():
        assert norm.last is not None
        assert close(norm.last, seen[at]), at
        for found, place, now in ((norm.mean, "mean", seen[at][0]), (norm.var, "var", seen[at][1])):
            assert close(found, 0.9 * w[at + place] + 0.1 * now), at


@names
def test_every_coupling_of_a_scale(name: str, arrays: dict[str, Array]) -> None:
    """One by one, so that a difference has a place: checkerboards of both colours, both halves of the channels."""
    wanted = part(arrays, f"{name}/")
    flow, given = model(name, wanted)
    w, condition = state(name, wanted), wanted.get("condition")
    steps = dict(next(iter(flow.eval())).steps.named_children())
    image = realnvp.opened(wanted["x"])[0]
    for i in range(3):
        at, odd = f"levels.0.steps.fields_{i}.", i % 2 == 1
        moved, log_det = realnvp.moved_fields(image, w, at, odd, condition)
        y, found = steps[f"fields_{i}"](OrderedSqueeze()(torch.tensor(image))[0], given)
        assert close(y, realnvp.squeezed_in_order(moved))
        assert close(found, log_det)
        assert np.allclose(realnvp.moved_fields_back(moved, w, at, odd, condition), image)
        stream = squeezed(image)
        at = f"levels.0.steps.channels_{i}."
        moved, log_det = realnvp.moved_channels(stream, w, at, odd, condition)
        y, found = steps[f"channels_{i}"](torch.tensor(stream), given)
        assert close(y, moved)
        assert close(found, log_det)
        assert np.allclose(realnvp.moved_channels_back(moved, w, at, odd, condition), stream)


@names
def test_the_weight_normalised_residual_net(name: str, arrays: dict[str, Array]) -> None:
    wanted = part(arrays, f"{name}/")
    flow, given = model(name, wanted)
    at = "levels.1.steps.fields_0.conditioner.net"
    net = flow.eval().get_submodule(at)
    assert isinstance(net, ResidualNet)
    x = np.random.default_rng(0).standard_normal((3, 5, 2, 2))
    told = np.concatenate(realnvp.network(x, state(name, wanted), at + ".", wanted.get("condition"), None), axis=1)
    assert close(net(torch.tensor(x), given), told)
