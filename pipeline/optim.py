"""How parameters move: Adamax as released with Glow or Adam, the rate in images, averaged weights, the gradient guard.

Everything here is elementwise on values that are equal on every rank, so ranks stay equal without talking.
"""

# pyright: reportPrivateImportUsage=false
# torch documents its _foreach functions under these names.

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from pipeline.errors import DataError, DivergedError

if TYPE_CHECKING:
    from pipeline.config import OptimConfig

GUARD_MEMORY = 0.99
"""Share of the running gradient norm that a new norm leaves in place: it remembers about 100 steps."""


class GlowAdamax(Optimizer):
    """Adamax as released with Glow (openai/glow, optim.py), which is not the textbook's.

    m = b1 m + (1 - b1) g;  u = max(b2 u, |g|);  w -= lr sqrt(1 - b2^t) / (1 - b1^t) * m / (u + eps). The factor of
    b2 is Adam's, though a maximum needs no bias correction: with b2 = .999 the first steps are some 30 times smaller.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move every parameter that has a gradient; a rate of 0 still moves the moments."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moved = [parameter for parameter in group["params"] if parameter.grad is not None]
            if moved:
                self._move(moved, group)
        return loss

    def _move(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        states = [self._state(parameter) for parameter in parameters]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        first, largest = [s["exp_avg"] for s in states], [s["exp_inf"] for s in states]
        steps = [s["step"] for s in states]
        beta1, beta2 = group["betas"]
        torch._foreach_add_(steps, 1.0)
        torch._foreach_mul_(first, beta1)
        torch._foreach_add_(first, gradients, alpha=1 - beta1)
        torch._foreach_mul_(largest, beta2)
        torch._foreach_maximum_(largest, torch._foreach_abs(gradients))
        bottoms = torch._foreach_add(largest, group["eps"])
        counts = [float(step) for step in steps]
        rates = {t: -group["lr"] * math.sqrt(1 - beta2**t) / (1 - beta1**t) for t in set(counts)}
        torch._foreach_addcdiv_(parameters, first, bottoms, [rates[t] for t in counts])

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_inf"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state


def make_optimizer(parameters: Iterable[Tensor], config: OptimConfig) -> Optimizer:
    """The optimiser a configuration names; the rate is set before every step with `set_rate`."""
    betas = (config.beta1, config.beta2)
    if config.algorithm == "adam":
        return Adam(parameters, lr=config.lr, betas=betas, eps=config.eps, fused=True)
    return GlowAdamax(parameters, lr=config.lr, betas=betas, eps=config.eps)


def learning_rate(config: OptimConfig, images_seen: int, total_images: int) -> float:
    """The rate of the step after `images_seen` images: linear from 0 over the warm-up, then constant or a half cosine.

    The first step under warm-up has rate 0, as released: it moves the moments alone. The cosine is 0 at the last image.
    """
    if images_seen < config.warmup:
        return config.lr * images_seen / config.warmup
    if config.decay == "constant":
        return config.lr
    share = (images_seen - config.warmup) / max(1, total_images - config.warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """Give every parameter this rate from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def optimizer_tensors(optimizer: Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimiser's whole state as tensors named "<parameter>/<moment>"; the rate is the schedule's, not state."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}/{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def load_optimizer_tensors(optimizer: Optimizer, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Restore what `optimizer_tensors` gave, exactly; DataError where it belongs to other parameters."""
    by_name = dict(model.named_parameters())
    states: dict[str, dict[str, Tensor]] = {}
    for path, value in tensors.items():
        name, _, key = path.rpartition("/")
        states.setdefault(name, {})[key] = value
    for name, state in states.items():
        shapes = {tuple(value.shape) for key, value in state.items() if key != "step"}
        if name not in by_name or shapes != {tuple(by_name[name].shape)}:
            found = f"optimiser state of another model ({sorted(shapes)})"
            raise DataError(found, where=name, cure="resume with the code and configuration that wrote it")
        here = by_name[name].device
        steps_here = (
            here if isinstance(optimizer, Adam) else torch.device("cpu")
        )  # a fused kernel reads its count there
        optimizer.state[by_name[name]] = {
            key: value.to(steps_here if key == "step" else here, copy=True) for key, value in state.items()
        }


class Ema:
    """Weights averaged with a half-life in images, without bias towards the start (as released: zero_debias).

    After k updates the average is sum_i d^(k-i) w_i / sum_i d^(k-i) with d = 2^(-batch / halflife): the first update
    takes the weights as they are. Float buffers are averaged like parameters; others are the model's.
    """

    def __init__(self, model: nn.Module, halflife: float, batch: int) -> None:
        self._decay = 0.5 ** (batch / halflife)
        self._average = {name: tensor.detach().clone() for name, tensor in _float_tensors(model).items()}
        self.updates = 0

    def reset(self, model: nn.Module) -> None:
        """Start again from the model's present weights, as after data-dependent initialisation."""
        _copy(_float_tensors(model), self._average)
        self.updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the model's present weights; call once a batch."""
        self.updates += 1
        weight = (1 - self._decay) / (1 - self._decay**self.updates)
        torch._foreach_lerp_(list(self._average.values()), list(_float_tensors(model).values()), weight)

    @property
    def state(self) -> dict[str, Tensor]:
        """The averages under the model's own names; before the first update the weights it started from."""
        return self._average

    @contextmanager
    def swapped(self, model: nn.Module) -> Iterator[None]:
        """Let `model` have the averaged weights inside the block, its own again afterwards, bit for bit."""
        live = _float_tensors(model)
        own = {name: tensor.detach().clone() for name, tensor in live.items()}
        _copy(self._average, live)
        try:
            yield
        finally:
            _copy(own, live)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages under the model's own names, and "updates", how many there were."""
        return {**self._average, "updates": torch.tensor(self.updates)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore exactly; DataError where names or shapes are another model's."""
        expected = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
        found = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if found != expected:
            name, _ = sorted(set(found.items()) ^ set(expected.items()))[0]
            raise DataError("averaged weights of another model", where=name, cure="resume with the model of the run")
        self.updates = int(state["updates"])
        _copy(state, self._average)


def _float_tensors(model: nn.Module) -> dict[str, Tensor]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor for name, tensor in named if tensor.is_floating_point()}


@torch.no_grad()
def _copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    for name, tensor in target.items():
        tensor.copy_(source[name])


class Guard:
    """Refuses steps whose gradient is not finite or far above its running norm; all ranks see the same norm."""

    def __init__(self, config: OptimConfig) -> None:
        self._factor, self._limit = config.guard_factor, config.guard_skips
        self.running, self.accepted, self.consecutive, self.skipped = 0.0, 0, 0, 0
        self.finite = True
        """Whether the last norm was."""

    def check(self, norm: float) -> bool:
        """True: take the step. False: skip it."""
        self.finite = math.isfinite(norm)
        if self.finite and (self.running == 0 or norm <= self._factor * self.running):
            self.accepted += 1
            weight = (1 - GUARD_MEMORY) / (1 - GUARD_MEMORY**self.accepted)
            self.running += weight * (norm - self.running)
            self.consecutive = 0
            return True
        self.consecutive += 1
        self.skipped += 1
        return False

    def refuse_hopeless(self, found: Mapping[str, Any], last: bool = False) -> None:
        """DivergedError once `guard_skips` steps in a row were skipped, or the run would end with a gradient that is no
        number; `found` is what was wrong with the last step.
        """
        if self.consecutive < self._limit and (self.finite or not last):
            return
        samples = ", ".join(f"{one['sample']} of epoch {one['epoch']}" for one in found["samples"])
        what = f"{self.consecutive} gradients in a row refused, the last of norm {found['norm']} against a running"
        raise DivergedError(
            f"{what} {self.running:.4g}; worst samples {samples}; worst parameters {', '.join(found['parameters'])}",
            cure="lower optim.lr, a longer optim.warmup, or a look at these samples",
        )

    def state_dict(self) -> dict[str, float | int]:
        """Plain numbers, exact through JSON."""
        return {key: getattr(self, key) for key in ("running", "accepted", "consecutive", "skipped")}

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        """Restore exactly."""
        self.running = float(state["running"])
        self.accepted, self.consecutive, self.skipped = (
            int(state[key]) for key in ("accepted", "consecutive", "skipped")
        )
