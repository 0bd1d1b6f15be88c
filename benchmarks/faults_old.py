"""How often the alerts are right, in networks with faults that were put in on purpose and in healthy networks that are trained to convergence.

    python benchmarks/faults.py             all runs; the table shows the half of them that no limit was tuned on
    python benchmarks/faults.py --quick     one run in ten

A case is an architecture, an activation, a fault with its severity, and a seed. The true cause is known, because the fault was put in. The rules of
other projects judge the same tensors at the same steps, with their published thresholds. The data are the digits of scikit-learn (8 x 8 pixels) and a
synthetic classification of 64 Gaussian features.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import pickle
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from other_rules import OTHERS, Others
from sklearn.datasets import load_digits
from torch import Tensor, nn

import torchsat
from torchsat.diagnosis import Diagnosis
from torchsat.judge import Judge
from torchsat.schedule import Schedule

STEPS, EVERY = 120, 10
HEALTHY_STEPS = 600
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softsign": nn.Softsign,
    "hardtanh": nn.Hardtanh,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "selu": nn.SELU,
}
BOUNDED = ("tanh", "sigmoid", "softsign", "hardtanh")
RECTIFIERS = ("relu", "gelu", "silu")


@dataclass(frozen=True)
class Case:
    """One run. A healthy network has no fault: `fault` is None."""

    architecture: str
    activation: str
    fault: str | None
    severity: int
    seed: int
    data: str

    @property
    def held_out(self) -> bool:
        """Whether the case is in the half that no limit was tuned on, and which the tables show."""
        return (self.seed + self.severity) % 2 == 1


@dataclass
class Result:
    case: Case
    snapshots: list[torchsat.Snapshot]
    others: dict[str, int] = field(default_factory=dict)
    """The first step at which each rule set of another project fired, by the name of the rule set. Those that never fired are missing."""
    accuracy: float = math.nan
    """The share of right answers on the batches of the last 20 steps."""


class Residual(nn.Module):
    def __init__(self, width: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.norm, self.first, self.act, self.second = nn.BatchNorm1d(width), nn.Linear(width, width), activation(), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.act(self.first(self.norm(x))))  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    """A recurrent network that reads an image row by row."""

    def __init__(self, kind: Callable[..., nn.RNNBase]) -> None:
        super().__init__()
        self.rnn, self.head = kind(8, 48, batch_first=True), nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x.reshape(-1, 8, 8))[0][:, -1])  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """A transformer encoder whose tokens are the rows of an image."""

    def __init__(self, norm_first: bool, activation: str) -> None:
        super().__init__()
        self.embed, self.position = nn.Linear(8, 32), nn.Parameter(0.1 * torch.randn(8, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 64, 0.0, activation, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.encoder(self.embed(x.reshape(-1, 8, 8)) + self.position)).mean(1))  # type: ignore[no-any-return]


def build(architecture: str, activation: str) -> nn.Module:
    """A healthy network, with the initialisation that suits its activation."""
    act = ACTIVATIONS.get(activation, nn.ReLU)
    kind, _, size = architecture.partition("-")
    if kind == "mlp":
        depth, width = (int(number) for number in size.split("x"))
        layers = [module for k in range(depth) for module in (nn.Linear(64 if k == 0 else width, width), act())]
        model: nn.Module = nn.Sequential(*layers, nn.Linear(width, 10))
    elif kind == "cnn":
        norm: list[Callable[[int], nn.Module]] = [lambda channels: nn.BatchNorm2d(channels)] if size == "bn" else []
        blocks = [
            module
            for before, after in ((1, 16), (16, 32), (32, 32))
            for module in (nn.Conv2d(before, after, 3, padding=1), *(make(after) for make in norm), act())
        ]
        model = nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *blocks, nn.Flatten(), nn.Linear(32 * 64, 10))
    elif kind == "resnet":
        model = nn.Sequential(nn.Linear(64, 64), *(Residual(64, act) for _ in range(4)), nn.BatchNorm1d(64), act(), nn.Linear(64, 10))
    elif kind in ("lstm", "gru"):
        return Recurrent({"lstm": nn.LSTM, "gru": nn.GRU}[kind])
    else:
        return Transformer(size == "pre", activation)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            if activation in ("relu", "gelu", "silu"):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            elif activation == "selu":
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            else:
                nn.init.xavier_normal_(module.weight)
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    return model


SEVERITIES: dict[str, tuple[float, ...]] = {
    "inputs_uncentred": (8.0, 16.0, 32.0, 64.0),
    "inputs_unscaled": (10.0, 30.0, 100.0, 300.0),
    "init_too_large": (6.0, 10.0, 20.0, 40.0),
    "init_too_small": (0.4, 0.3, 0.2, 0.1),
    "weight_growth": (1.0, 2.0, 4.0, 8.0),
    "activation_choice": (1.0, 1.0, 1.0, 1.0),
    "dead_units": (3.0, 4.0, 6.0, 10.0),
    "numeric_range": (0.0, 1.0, 2.0, 3.0),
    "softmax_logits": (6.0, 8.0, 12.0, 16.0),
}
"""The strengths of each fault, by its severity from 0 to 3. `break_model`, `batches` and `run` say what a strength means."""


WIDER: dict[tuple[str, str], float] = {
    ("init_too_large", "sigmoid"): 2.5,
    ("init_too_large", "softsign"): 1.5,
    ("init_too_large", "lstm"): 3.0,
    ("init_too_large", "gru"): 3.0,
    ("inputs_unscaled", "lstm"): 10.0,
    ("inputs_unscaled", "gru"): 10.0,
}
"""Factors of the strength for activations with a wider linear range. A sigmoid, for example, saturates at twice the z of a tanh."""


def strength(case: Case) -> float:
    """The strength of the fault, in units that depend on the fault: a factor, an offset, or a multiple of a learning rate. 0 without a fault."""
    return SEVERITIES[case.fault][case.severity] * WIDER.get((case.fault, case.activation), 1.0) if case.fault else 0.0


def hidden_weights(model: nn.Module) -> list[Tensor]:
    """The weights of all linear and convolutional layers but the last, and of recurrent layers, whose gates are stacked in one tensor."""
    layers = [module.weight for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    recurrent = [
        weight for module in model.modules() if isinstance(module, nn.RNNBase) for name, weight in module.named_parameters() if "weight" in name
    ]
    return [*recurrent, *layers[:-1]]


@torch.no_grad()
def break_model(model: nn.Module, fault: str, amount: float) -> None:
    """Put a fault that concerns the weights into a healthy network. Other faults change the batches or the optimizer."""
    if fault in ("init_too_large", "init_too_small"):
        for weight in hidden_weights(model):
            weight *= amount
    elif fault == "dead_units":
        # Most units get a bias far below zero, as one step that was too large would leave them.
        for module in list(model.modules()):
            if isinstance(module, (nn.Linear, nn.Conv2d)) and module.weight.shape[0] != 10:
                chosen = torch.rand(module.bias.shape) < 0.75  # type: ignore[union-attr]
                module.bias[chosen] -= amount * 3  # type: ignore[index]
    elif fault == "softmax_logits":
        for module in model.modules():
            if isinstance(module, nn.MultiheadAttention):
                module.in_proj_weight[: 2 * module.embed_dim] *= amount


def batches(case: Case, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of standardised inputs and labels. Faults that concern the inputs are put in here."""
    inputs, labels = dataset(case.data)
    generator = torch.Generator().manual_seed(case.seed + 1)
    amount = strength(case)
    for _ in range(steps):
        chosen = torch.randint(len(inputs), (64,), generator=generator)
        x = inputs[chosen]
        if case.fault == "inputs_uncentred":
            x = x + amount
        elif case.fault == "inputs_unscaled":
            x = x * amount
        elif case.fault == "numeric_range":
            x = x.clone()
            x[0, 0] = math.inf if case.severity % 2 else math.nan
        yield x, labels[chosen]


_DATA: dict[str, tuple[Tensor, Tensor]] = {}


def dataset(name: str) -> tuple[Tensor, Tensor]:
    if name not in _DATA:
        if name == "digits":
            pixels, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
            inputs = pixels.float()
        else:
            generator = torch.Generator().manual_seed(0)
            labels = torch.randint(10, (1797,), generator=generator)
            inputs = torch.randn(1797, 64, generator=generator) + 1.2 * torch.randn(10, 64, generator=generator)[labels]
        inputs = (inputs - inputs.mean(0)) / (inputs.std(0) + 1e-3)
        _DATA[name] = inputs.clamp(-5, 5), labels
    return _DATA[name]


def run(case: Case) -> Result:
    """Train the network of one case while torchsat and the rules of the other projects watch it."""
    torch.manual_seed(case.seed)
    torch.set_num_threads(1)
    model = build(case.architecture, case.activation)
    amount = strength(case)
    if case.fault:
        break_model(model, case.fault, amount)
    rate = 0.01 if case.architecture in ("mlp-6x64", "mlp-10x48") or case.activation == "selu" else 0.05
    if case.architecture.startswith(("transformer", "lstm", "gru")):
        optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), lr=(rate := 3e-3))
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    if case.fault == "weight_growth":
        optimizer = torch.optim.Adam(model.parameters(), lr=(rate := 0.1 * amount))
    result = Result(case, [])
    others = Others(model, rate, tuple(ACTIVATIONS.values()))
    steps, plan = STEPS if case.fault else HEALTHY_STEPS, Schedule(EVERY, None)
    correct: list[float] = []
    with torchsat.watch(model, every=EVERY, budget=None, sinks=[result.snapshots.append], rules=()), warnings.catch_warnings():
        for step, (x, y) in enumerate(batches(case, steps)):
            observed = plan.due(step)
            handles = others.watch() if observed else []
            output = model(x)
            loss = nn.functional.cross_entropy(output, y)
            optimizer.zero_grad()
            loss.backward()
            if observed:
                with torch.no_grad():
                    others.judge(step)
                for handle in handles:
                    handle.remove()
            optimizer.step()
            if step >= steps - 20:
                correct.append((output.argmax(1) == y).float().mean().item())
    result.others, result.accuracy = others.first, statistics.mean(correct)
    return result


def cases() -> list[Case]:
    """All cases: each network without a fault, and with every fault that harms a network of its kind."""
    mlps = ("mlp-3x64", "mlp-6x64", "mlp-3x256")
    plain: dict[str, tuple[str, ...]] = {
        **dict.fromkeys(mlps, tuple(ACTIVATIONS)),
        "mlp-10x48": ("tanh", "relu", "softsign", "selu"),
        "cnn-plain": ("tanh", "relu", "gelu"),
        "cnn-bn": ("tanh", "relu", "silu"),
        "resnet": ("relu", "tanh", "gelu"),
        "lstm": ("lstm",),
        "gru": ("gru",),
        "transformer-pre": ("gelu", "relu"),
        "transformer-post": ("gelu", "relu"),
    }
    plain["mlp-6x64"] = tuple(name for name in plain["mlp-6x64"] if name != "sigmoid")
    found: list[Case] = []

    def add(architecture: str, activation: str, fault: str | None, seeds: int = 2) -> None:
        for severity in range(4 if fault else 2):
            for seed in range(seeds):
                data = "digits" if (seed + severity // 2) % 2 == 0 or architecture.startswith(("cnn", "lstm", "gru", "transformer")) else "synthetic"
                found.append(Case(architecture, activation, fault, severity, 10 * severity + seed if not fault else seed, data))

    for architecture, activations in plain.items():
        for activation in activations:
            add(architecture, activation, None)
            mlp, bounded = architecture.startswith("mlp"), activation in BOUNDED
            if mlp or architecture == "cnn-plain":
                if bounded:
                    for fault in ("inputs_uncentred", "inputs_unscaled", "init_too_large", "weight_growth"):
                        add(architecture, activation, fault)
                elif activation in ("relu", "gelu"):
                    add(architecture, activation, "dead_units")
                    if activation == "relu":
                        add(architecture, activation, "inputs_uncentred")
                        add(architecture, activation, "weight_growth")
                add(architecture, activation, "numeric_range", 1)
            if architecture == "mlp-10x48":
                add(architecture, activation, "init_too_small")
            if architecture == "mlp-6x64" and not bounded:
                add(architecture, activation, "init_too_large")
            if architecture in ("lstm", "gru"):
                for fault in ("inputs_unscaled", "init_too_large"):
                    add(architecture, activation, fault)
            if architecture.startswith("transformer"):
                add(architecture, activation, "softmax_logits")
                add(architecture, activation, "numeric_range", 1)
            if architecture == "resnet" and bounded:
                add(architecture, activation, "weight_growth")
    for architecture in ("mlp-6x64", "mlp-10x48"):
        add(architecture, "sigmoid", "activation_choice", 4)
    return found


def verdicts(snapshots: Sequence[torchsat.Snapshot]) -> list[torchsat.Alert]:
    """The alerts that a monitor with the default rules would raise in a run."""
    judge, diagnosis = Judge(), Diagnosis()
    told = [diagnosis.judge(judge.judge(snapshot), judge.firing, snapshot) for snapshot in snapshots]
    return [alert for alerts in told for alert in alerts if alert.firing]


@dataclass
class Score:
    """How well the faults of one kind, or in one architecture, were found."""

    runs: int = 0
    found: int = 0
    """The number of runs with an alert."""
    first: int = 0
    """The number of runs whose first alert names the true cause as the most likely one."""
    second: int = 0
    """The number of runs whose first alert names the true cause as one of the two most likely ones."""
    steps: list[int] = field(default_factory=list)
    """The step of the first alert, for each run with an alert."""

    def add(self, case: Case, told: list[torchsat.Alert]) -> None:
        self.runs += 1
        if told:
            names = [cause.name for cause in told[0].causes]
            self.found += 1
            self.first += names[:1] == [case.fault]
            self.second += case.fault in names[:2]
            self.steps.append(told[0].step)

    def __str__(self) -> str:
        if not self.found:
            return f"{self.runs:5} {self.found / max(1, self.runs):7.3f}"
        ranks = f"{self.first / self.found:11.3f} {self.second / self.found:11.3f}"
        return f"{self.runs:5} {self.found / self.runs:7.3f} {ranks} {statistics.median(self.steps):13.0f}"


def evaluate(results: Sequence[Result]) -> None:
    """Print the tables for these runs, with the recall and the causes first and the false alarms last."""
    faulty = [result for result in results if result.case.fault]
    healthy = [result for result in results if not result.case.fault and result.accuracy >= 0.9]
    failed = sum(not result.case.fault for result in results) - len(healthy)
    scores: dict[str, Score] = defaultdict(Score)
    for result in faulty:
        told = verdicts(result.snapshots)
        for name in (str(result.case.fault), result.case.architecture.partition("-")[0], "all"):
            scores[name].add(result.case, told)
    print("fault or architecture   runs  recall  right first  within two  steps to tell")
    for name, score in sorted(scores.items(), key=lambda pair: (pair[0] == "all", pair[0] not in SEVERITIES, pair[0])):
        print(f"{name:22} {score}")
    false = [(result.case, verdicts(result.snapshots)) for result in healthy]
    alarms = sum(len(told) for _, told in false)
    print(f"\nrules                  recall  false alarms per healthy run ({len(healthy)} runs; {failed} more did not learn and are left out)")
    print(f"{'torchsat':22} {scores['all'].found / scores['all'].runs:6.3f}  {alarms / len(healthy):.3f}")
    for name in OTHERS:
        recall = sum(name in result.others for result in faulty) / len(faulty)
        print(f"{name:22} {recall:6.3f}  {sum(name in result.others for result in healthy) / len(healthy):.3f} (of runs with any)")
    for case, told in false:
        for alert in told:
            print(f"false: {case}: {alert.rule} at {alert.site}, {alert.value:.3g} against {alert.threshold:.3g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one run in ten")
    parser.add_argument("--keep", help="keep the runs in this file, or take them from it if it exists")
    parser.add_argument("--tuned", action="store_true", help="show the half that the limits were tuned on")
    options = parser.parse_args()
    chosen = cases()[:: 10 if options.quick else 1]
    start = time.perf_counter()
    if options.keep and Path(options.keep).exists():
        results = pickle.loads(Path(options.keep).read_bytes())
    else:
        with multiprocessing.get_context("spawn").Pool() as pool:
            results = pool.map(run, chosen, chunksize=4)
        if options.keep:
            Path(options.keep).write_bytes(pickle.dumps(results))
    print(f"torch {torch.__version__}, {len(results)} runs in {time.perf_counter() - start:.0f} s, of which one half is shown\n")
    evaluate([result for result in results if result.case.held_out != options.tuned])


if __name__ == "__main__":
    main()
