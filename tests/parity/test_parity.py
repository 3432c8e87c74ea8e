"""glow/ and the optimiser against the restatement, through golden arrays that neither can change on its own."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from glow import Coupling, Glow, GlowConfig, Squeeze, bits_per_dim, dequantize
from glow.conditioner import padded_with_border
from pipeline.optim import GlowAdamax, set_rate
from tests.parity import make_golden, restatement
from tests.parity.make_golden import CASES, GOLDEN, Case, golden
from tests.parity.restatement import Array

TOLERANCE = 1e-6
BITS = 5


@pytest.fixture(scope="module")
def arrays() -> dict[str, Array]:
    with np.load(GOLDEN, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def part(arrays: dict[str, Array], prefix: str) -> dict[str, Array]:
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


def close(found: Tensor, wanted: Array) -> bool:
    return np.allclose(found.detach().numpy(), wanted, rtol=TOLERANCE, atol=TOLERANCE)


def model(case: Case, arrays: dict[str, Array]) -> Glow:
    """The small Glow of a case with its golden weights; strict: every name and shape of the state is pinned."""
    config = GlowConfig(
        size=case.size, channels=case.channels, levels=case.levels, steps=case.steps, width=case.width,
        coupling="affine" if case.affine else "additive", mixing="lu" if case.lu else "dense",
        classes=case.classes or -1, attributes=case.attributes or -1,
        condition_splits=case.everywhere, condition_steps=case.everywhere,
    )  # fmt: skip
    glow = Glow(config).double()
    glow.load_state_dict({name: torch.tensor(value) for name, value in part(arrays, "w/").items()})
    return glow


def given(case: Case, arrays: dict[str, Array]) -> tuple[Tensor | None, Tensor | None]:
    label = torch.tensor(arrays["label"]).long() if case.classes else None
    return label, torch.tensor(arrays["attributes"]) if case.attributes else None


def test_the_restatement_gives_the_golden_arrays(arrays: dict[str, Array]) -> None:
    again = golden()
    assert again.keys() == arrays.keys()
    for name, value in again.items():
        assert np.allclose(value, arrays[name], rtol=1e-9, atol=1e-9), name


@pytest.mark.parametrize("name", CASES)
def test_a_small_glow(name: str, arrays: dict[str, Array]) -> None:
    """Dequantisation, log_prob, bits/dim, latents of every level, and images of cooled latents."""
    case, wanted = CASES[name], part(arrays, f"{name}/")
    glow, condition = model(case, wanted), given(case, wanted)
    noise = torch.tensor(wanted["noise"])
    x = dequantize(torch.tensor(wanted["pixels"]).byte(), BITS, noise)
    assert close(x, wanted["x"])
    log_prob = glow.log_prob(x, *condition)
    assert close(log_prob, wanted["log_prob"])
    assert close(bits_per_dim(log_prob, glow.dims, BITS), wanted["bits_per_dim"])
    latents = [torch.tensor(wanted[f"latents.{level}"]) for level in range(case.levels)]
    for found, latent in zip(glow.encode(x, *condition), latents, strict=True):
        assert close(found, latent.numpy())
    assert close(glow.decode([0.7 * latent for latent in latents], *condition), wanted["decoded"])
    assert close(glow.decode(latents, *condition), wanted["x"])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.condition])
def test_initialisation_from_data(name: str, arrays: dict[str, Array]) -> None:
    """From one microbatch or from each image by itself."""
    case, wanted = CASES[name], part(arrays, f"{name}/")
    for size in (1, 3):
        glow = model(case, wanted)
        glow.initialize(list(torch.tensor(wanted["x"]).split(size)))
        state = glow.state_dict()
        for parameter, value in part(wanted, "initialized/").items():
            assert close(state[parameter], value), parameter


def test_squeeze_order_and_border_channel(arrays: dict[str, Array]) -> None:
    wanted = part(arrays, "pieces/")
    x = torch.tensor(wanted["x"])
    assert torch.equal(Squeeze()(x)[0], torch.tensor(wanted["squeezed"]))
    assert torch.equal(Squeeze().inverse(torch.tensor(wanted["squeezed"])), x)
    assert torch.equal(padded_with_border(x), torch.tensor(wanted["bordered"]))


@pytest.mark.parametrize("name", CASES)
def test_every_layer_of_a_level(name: str, arrays: dict[str, Array]) -> None:
    """Layer by layer, so that a difference has a place: norm, mixing, coupling, prior; values and log_dets."""
    case, wanted = CASES[name], part(arrays, f"{name}/")
    glow, w = model(case, wanted), part(wanted, "w/")
    condition = wanted["condition"]
    level = next(iter(glow))
    step = next(iter(level.steps))
    norm_and_mixing, coupling = step
    assert isinstance(coupling, Coupling)
    x = restatement.squeezed(wanted["x"])
    normed, log_det_norm = restatement.normed(x, w, "levels.0.steps.0.mix.norm.")
    mixed, log_det_mixing = restatement.mixed(normed, w, "levels.0.steps.0.mix.mixing.")
    moved, log_det = restatement.coupled(mixed, w, "levels.0.steps.0.coupling.", condition)
    kept, out = np.split(moved, 2, axis=1)
    mean, log_std = restatement.prior(kept, w, "levels.0.prior.", condition)

    y, found = norm_and_mixing(torch.tensor(x))
    assert close(y, mixed)
    assert close(found, np.full(len(x), log_det_norm + log_det_mixing))
    y, found = coupling(torch.tensor(mixed), torch.tensor(condition))
    assert close(y, moved)
    assert close(found, log_det)
    assert close(coupling.inverse(torch.tensor(moved), torch.tensor(condition)), mixed)
    eps, log_prior = level.prior.normalize(torch.tensor(out), torch.tensor(kept), torch.tensor(condition))
    assert close(eps, (out - mean) / np.exp(log_std))
    assert close(log_prior, restatement.gaussian_log_prob(out, mean, log_std))


def test_adamax_as_released(arrays: dict[str, Array]) -> None:
    """Warm-up's first rate of 0 moves the moments alone; a gradient of 0 lets the maximum fade."""
    wanted = part(arrays, "pieces/")
    parameter = torch.nn.Parameter(torch.tensor(wanted["start"]))
    optimizer = GlowAdamax([parameter])
    for gradient, rate in zip(wanted["gradients"], wanted["rates"], strict=True):
        parameter.grad = torch.tensor(gradient)
        set_rate(optimizer, float(rate))
        optimizer.step()
    assert close(parameter, wanted["moved"])


@pytest.mark.parametrize("module", [restatement, make_golden])
def test_the_restatement_knows_nothing_of_glow(module: object) -> None:
    tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))  # type: ignore[attr-defined]
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    allowed = {"__future__", "collections", "dataclasses", "math", "numpy", "pathlib", "tests"}
    assert {name.split(".")[0] for name in names} <= allowed
