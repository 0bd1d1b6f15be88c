"""The rules of other projects, which benchmarks/faults.py holds beside those of torchsat."""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor, nn

OTHERS = ("SageMaker Debugger", "DeepDiagnosis", "TheDeepChecker", "|a| > 0.95")
"""The names of the rule sets."""
OTHER_SITES: tuple[type[nn.Module], ...] = (
    *(nn.Tanh, nn.Sigmoid, nn.Softsign, nn.Hardtanh, nn.Hardsigmoid),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.ELU, nn.SELU, nn.Softplus),
)
"""The activation modules that the rule sets judge. None of them sees a function call."""


class Others:
    """The rules of other projects, with their published thresholds, applied to inputs and outputs of activation modules and to gradients.

    - SageMaker Debugger fires if more than 50 % of the units of a layer are inactive, that is active in at most 1 % of their samples. A ReLU is
      active above 0, a tanh between -9.4999 and 9.4999, a sigmoid between -23 and 17. It also fires if the mean |gradient| of a weight is below 1e-7,
      and on NaN or infinite values.
    - DeepDiagnosis fires if 70 % of the outputs of a ReLU are 0, if |z| >= 5 in more than 50 % of the elements of a tanh or a sigmoid, if the mean
      |gradient| of a weight is below 1e-7, if the variance of a weight is outside 1e-5..10, and if lr |gradient| / |weight| is outside 1e-5..1e-1.
    - TheDeepChecker looks at the observed steps from step 10 on, and fires if one of these holds five times in a row: the 95th percentile of |a| is
      below 1e-5, or the saturation measure rho is above 0.85, for more than 50 % of the units; the standard deviation of an activation is outside
      0.5..2; the update is outside 1e-4..1e-1; the mean |gradient| is below 1e-6.
    - |a| > 0.95 fires if that holds for more than 70 % of the outputs of an activation.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, activations: tuple[type[nn.Module], ...] = OTHER_SITES) -> None:
        self.model, self.activations = model, activations
        self.optimizer = optimizer
        self.first: dict[str, int] = {}
        self.streaks: dict[tuple[str, str], int] = defaultdict(int)
        self.values: dict[str, tuple[nn.Module, Tensor, Tensor]] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    @property
    def rate(self) -> float:
        """The learning rate of the optimizer's first group."""
        return float(self.optimizer.param_groups[0]["lr"])

    def begin(self, step: int) -> None:
        """Observe this step: keep what every activation module gets and gives, and judge it when the optimizer is about to step."""
        self._handles = [
            module.register_forward_hook(
                lambda module, args, output, name=name: self.values.__setitem__(name, (module, args[0].detach(), output.detach()))
            )
            for name, module in self.model.named_modules()
            if isinstance(module, self.activations)
        ]
        self._handles.append(self.optimizer.register_step_pre_hook(lambda *_: self._judge_before_step(step)))

    def end(self) -> None:
        """End the observation of a step."""
        for handle in self._handles:
            handle.remove()
        self._handles, self.values = [], {}

    @torch.no_grad()
    def _judge_before_step(self, step: int) -> None:
        self.judge(step)

    def fire(self, rules: str, step: int) -> None:
        """Keep the step at which a rule set fires for the first time."""
        self.first.setdefault(rules, step)

    def judge(self, step: int) -> None:
        """Apply all rules after the backward pass of an observed step."""
        for name, (module, z, a) in self.values.items():
            z, a = (_by_unit(each) for each in (z, a))
            if not torch.isfinite(a).all():
                self.fire("SageMaker Debugger", step)
                continue
            if isinstance(module, nn.ReLU):
                active = (a > 0).float().mean(0)
                if (a <= 0).float().mean() >= 0.7:
                    self.fire("DeepDiagnosis", step)
            elif isinstance(module, nn.Tanh):
                active = (z.abs() < 9.4999).float().mean(0)
            elif isinstance(module, nn.Sigmoid):
                active = ((z > -23) & (z < 16.99999)).float().mean(0)
            else:
                active = torch.ones(a.shape[1])
            if (active <= 0.01).float().mean() > 0.5:
                self.fire("SageMaker Debugger", step)
            if isinstance(module, (nn.Tanh, nn.Sigmoid)) and (z.abs() >= 5).float().mean() > 0.5:
                self.fire("DeepDiagnosis", step)
            if (a.abs() > 0.95).float().mean() > 0.7:
                self.fire("|a| > 0.95", step)
            if step >= 10:
                dead = torch.quantile(a.abs().float(), 0.95, dim=0) < 1e-5
                self._streak(name + " dead", bool(dead.float().mean() > 0.5), step)
                if isinstance(module, (nn.Tanh, nn.Sigmoid, nn.Softsign, nn.Hardtanh)):
                    scaled = 2 * a - 1 if isinstance(module, nn.Sigmoid) else a
                    self._streak(name + " saturated", bool((_rho(scaled) > 0.85).float().mean() > 0.5), step)
                else:
                    self._streak(name + " std", not 0.5 <= float(a.std()) <= 2, step)
        for name, parameter in self.model.named_parameters():
            if parameter.grad is None or parameter.ndim < 2:
                continue
            size, gradient = float(parameter.detach().abs().mean()), float(parameter.grad.abs().mean())
            if not math.isfinite(gradient):
                self.fire("SageMaker Debugger", step)
                self.fire("DeepDiagnosis", step)
                continue
            if gradient < 1e-7:
                self.fire("SageMaker Debugger", step)
                self.fire("DeepDiagnosis", step)
            ratio = self.rate * float(parameter.grad.norm()) / max(float(parameter.detach().norm()), 1e-30)
            if not 1e-5 <= float(parameter.detach().var()) <= 10 or not 1e-5 <= ratio <= 1e-1:
                self.fire("DeepDiagnosis", step)
            if step >= 10:
                update = self.rate * gradient / max(size, 1e-30)
                self._streak(name + " update", not 1e-4 <= update <= 1e-1, step)
                self._streak(name + " gradient", gradient < 1e-6, step)

    def _streak(self, what: str, beyond: bool, step: int) -> None:
        """Let TheDeepChecker fire if a value is beyond its limit for the fifth time in a row."""
        key = ("TheDeepChecker", what)
        self.streaks[key] = self.streaks[key] + 1 if beyond else 0
        if self.streaks[key] >= 5:
            self.fire("TheDeepChecker", step)


def _by_unit(x: Tensor) -> Tensor:
    """The samples of each unit: [samples, units]. The units of images lie along axis 1, those of all else along the last axis."""
    if x.ndim == 4:
        x = x.transpose(1, -1)
    return x.reshape(-1, x.shape[-1]) if x.ndim != 2 else x


def _rho(a: Tensor, bins: int = 50) -> Tensor:
    """The saturation measure of Rakitianskaia and Engelbrecht for outputs in [-1, 1], of shape [samples, units]: one number for each unit.

    It is the mean over the bins of a histogram of |mean of the outputs in the bin|, weighted by the number of outputs in the bin.
    """
    a = a.float()
    place = ((a.clamp(-1, 1) + 1) / 2 * bins).long().clamp(max=bins - 1)
    count = torch.zeros(bins, a.shape[1]).scatter_add_(0, place, torch.ones_like(a))
    total = torch.zeros(bins, a.shape[1]).scatter_add_(0, place, a)
    return total.abs().sum(0) / count.sum(0)
