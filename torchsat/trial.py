"""Before training and beside it: `probe` judges a model by one batch, `try_remedies` measures what each remedy does.

Both work on copies. The model, its gradients, the optimizer and the random numbers stay bit for bit as they were.

Every trial starts from a copy of the model as it is, sees the same batches in the same order and the same random numbers, and differs from the
untouched copy in one remedy. Activations are changed with the initialisation that belongs to them: a swap alone would judge the old gain.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import logging
import math
import os
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map

from torchsat.monitor import watch
from torchsat.record import Record, Snapshot
from torchsat.rules import RULES
from torchsat.weights import is_layer

log = logging.getLogger("torchsat")


def probe(model: nn.Module, *inputs: Any, loss: Callable[[Any], Tensor] | None = None, **keywords: Any) -> Snapshot:
    """The verdict on a model before it is trained, from one batch: `torchsat.report.report(snapshot)` prints it.

    Args:
        model: any nn.Module that can be deep-copied; it is left bit for bit as it is, and so are the random numbers.
        inputs, keywords: what the model is called with.
        loss: from the model's output to a scalar. None: the output's `.loss` if it has one, else the mean of the squares of what it gives.

    Raises:
        TypeError: the model cannot be copied or watched, or the loss is no scalar tensor.
        ValueError: no activation ran.
    """
    rules = tuple(replace(rule, patience=1) for rule in RULES)
    with _random_numbers_kept():
        twin = _copy(model)
        inputs, keywords = _detached(inputs), _detached(keywords)
        with _quiet(), watch(twin, sample=None, rules=rules, group=None, errors="raise") as monitor:
            with torch.enable_grad():
                value = (loss or _some_loss)(twin(*inputs, **keywords))
                if not isinstance(value, Tensor) or value.numel() != 1:
                    raise TypeError(
                        f"the loss is {type(value).__name__ if not isinstance(value, Tensor) else tuple(value.shape)}; a scalar tensor is needed"
                    )
                if value.requires_grad:
                    value.backward()
            monitor.step()
            monitor.flush()
            if monitor.latest is None:
                raise ValueError(f"no activation ran in this pass. {monitor.coverage}")
            return monitor.latest


def _some_loss(output: Any) -> Tensor:
    given = getattr(output, "loss", None)
    if isinstance(given, Tensor):
        return given
    values = (
        vars(output)
        if hasattr(output, "__dict__") and not isinstance(output, (Tensor, dict))
        else dict(output)
        if isinstance(output, dict)
        else output
    )
    leaves = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return sum((leaf.square().mean() for leaf in leaves), torch.zeros((), device=leaves[0].device if leaves else None))


_PLAIN = "as it is"


@dataclass(frozen=True)
class Context:
    """What a remedy knows of the model it changes."""

    sites: tuple[Record, ...]
    """The hidden activations that are modules, in the order of data flow."""
    feeds: dict[str, tuple[str, ...]]
    """The sites that each layer feeds."""
    shapes: dict[str, tuple[int, ...]]
    """Of z, by site."""
    batches: Sequence[Any]
    paths: dict[str, str]
    """The module path of each site and layer."""
    input_leaf: int | None
    """Which tensor of a batch the model is given."""


@dataclass(frozen=True)
class Remedy:
    """One change. `apply` changes a copy of the model in place and says what it did; it raises ValueError where it cannot."""

    name: str
    apply: Callable[[nn.Module, Context], str]
    learning_rate: float = 1.0
    """What the learning rate is multiplied with."""


@dataclass(frozen=True)
class Trial:
    """What became of one copy."""

    remedy: str
    change: str
    """What was changed, or why nothing could be."""
    losses: tuple[float, ...] = ()
    snapshots: tuple[Snapshot, ...] = ()

    @property
    def tried(self) -> bool:
        return bool(self.losses)

    @property
    def loss(self) -> float:
        """The mean loss of the last tenth of the steps."""
        last = self.losses[-max(1, len(self.losses) // 10) :]
        return sum(last) / len(last) if last else math.nan

    def worst(self, name: str, at: int = -1) -> float | None:
        """The worst of a metric over the hidden sites at an observation: the largest saturated share, else the smallest."""
        hidden = [record for record in self.snapshots[at].records if not (record.output or record.gate)] if self.snapshots else []
        values = [value for record in hidden if (value := getattr(record, name)) is not None]
        return None if not values else max(values) if name in ("saturated", "stuck") else min(values)

    def first_gradient(self, at: int = -1) -> float | None:
        """The gradient norm of the first layer that has one."""
        weights = self.snapshots[at].weights if self.snapshots else ()
        return next((weight.grad_norm for weight in weights if weight.grad_norm is not None), None)


@dataclass(frozen=True)
class Trials:
    """The untouched copy first, then each remedy."""

    trials: tuple[Trial, ...]
    notes: tuple[str, ...] = ()
    """What no remedy could change."""

    def __getitem__(self, remedy: str) -> Trial:
        for trial in self.trials:
            if trial.remedy == remedy:
                return trial
        raise KeyError(f"no remedy {remedy!r}; there are: {', '.join(trial.remedy for trial in self.trials)}")

    @property
    def best(self) -> Trial:
        """The trial with the lowest loss at its end."""
        return min(self.trials, key=lambda trial: trial.loss if math.isfinite(trial.loss) else math.inf)

    def sentence(self, remedy: str) -> str:
        """What the numbers say of a remedy, against the untouched copy."""
        plain, trial = self.trials[0], self[remedy]
        if not trial.tried:
            return f"{remedy} was not tried: {trial.change}"
        if not math.isfinite(trial.loss):
            verdict = "makes it diverge"
        else:
            ratio = trial.loss / plain.loss if plain.loss else math.inf
            verdict = "helps" if not math.isfinite(plain.loss) or ratio < 0.9 else "makes it worse" if ratio > 1.1 else "changes little"
        slopes = [f"{value:.3g}" if (value := each.worst("relative_derivative")) is not None else "?" for each in (plain, trial)]
        return (
            f"{remedy} {verdict}: loss {plain.loss:.3g} without, {trial.loss:.3g} with it; E|f'|/peak at the worst site {slopes[0]} and {slopes[1]}"
        )

    def __str__(self) -> str:
        from torchsat.report import trials_table

        return trials_table(self)

    def picture(self, path: str | os.PathLike[str]) -> None:
        """Draw loss, saturated share, m, attenuation and the first layer's gradient over the steps into a file, with matplotlib."""
        try:
            import matplotlib as mpl
        except ModuleNotFoundError:
            raise ModuleNotFoundError("a picture needs matplotlib: pip install matplotlib") from None
        _draw(mpl, self, os.fspath(path))


def try_remedies(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    *,
    optimizer: Optimizer | Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
    steps: int = 100,
    remedies: Sequence[Remedy] | None = None,
    every: int = 10,
    progress: bool = True,
) -> Trials:
    """Apply each remedy to a copy of a model and train it for a few steps beside an untouched copy.

    Args:
        model: any nn.Module that can be deep-copied; activations that are modules can be changed, others are named in `notes`.
        batches: a list, a DataLoader, or anything that can be iterated again; used in order, and from the start again where it is short.
        loss: from (model, batch) to a scalar; it calls the model.
        optimizer: the optimizer of the model, whose kind and options are used, or a function of parameters. None: Adam with lr 1e-3.
        steps: of each trial.
        remedies: None: `REMEDIES`.
        every: observe every so many steps.
        progress: show a bar on a terminal.

    Raises:
        TypeError, ValueError: an argument is not as said above, or no hidden activation is a module.
    """
    if not callable(loss):
        raise TypeError(f"loss is {loss!r}; allowed is a function of (model, batch) that gives a scalar")
    if optimizer is not None and not isinstance(optimizer, Optimizer) and not callable(optimizer):
        raise TypeError(f"optimizer is {optimizer!r}; allowed are an optimizer, a function of parameters, and None")
    if not isinstance(batches, Iterable):
        raise TypeError(f"batches is {batches!r}; allowed are a list, a DataLoader, or anything that can be iterated again")
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"steps is {steps!r}; allowed are whole numbers from 1 up")
    if isinstance(batches, Iterator):
        raise TypeError("batches is an iterator, which can be read only once; give a list or a DataLoader, or list(itertools.islice(batches, 100))")
    chosen = REMEDIES if remedies is None else tuple(remedies)
    with _random_numbers_kept():
        restore = _random_state()
        taken = [_detached(batch) for batch in itertools.islice(batches, steps)]
        if not taken:
            raise ValueError("batches is empty; at least one batch is needed")
        context, notes = _context(model, taken, loss)
        trials = []
        with _bar(progress, (len(chosen) + 1) * steps) as advance:
            for remedy in (Remedy(_PLAIN, lambda model, context: "nothing"), *chosen):
                restore()
                trials.append(_try(model, taken, loss, optimizer, steps, remedy, context, every, advance))
    return Trials(tuple(trials), notes)


def _try(
    model: nn.Module,
    batches: Sequence[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    optimizer: Optimizer | Callable[[Iterable[nn.Parameter]], Optimizer] | None,
    steps: int,
    remedy: Remedy,
    context: Context,
    every: int,
    advance: Callable[[int], None],
) -> Trial:
    twin = _copy(model)
    try:
        change = remedy.apply(twin, context)
    except ValueError as error:
        advance(steps)
        return Trial(remedy.name, str(error))
    stepper = _optimizer(optimizer, model, twin)
    for group in stepper.param_groups:
        group["lr"] = group["lr"] * remedy.learning_rate
    losses: list[float] = []
    snapshots: list[Snapshot] = []
    needs_closure = inspect.signature(type(stepper).step).parameters["closure"].default is inspect.Parameter.empty

    def backward(batch: Any) -> Tensor:
        stepper.zero_grad()
        value = loss(twin, batch)
        value.backward()
        return value

    try:
        with torch.enable_grad(), _quiet(), watch(twin, every=every, budget=None, sinks=[snapshots.append], group=None):
            for batch in itertools.islice(itertools.cycle(batches), steps):
                if needs_closure:
                    value = cast(Tensor, stepper.step(partial(backward, batch)))  # type: ignore[arg-type]
                else:
                    value = backward(batch)
                    stepper.step()
                losses.append(float(value.detach()))
                advance(1)
    except Exception as error:
        if remedy.name == _PLAIN:
            raise
        advance(steps - len(losses))
        return Trial(remedy.name, f"could not be run: {type(error).__name__}: {error}")
    return Trial(remedy.name, change, tuple(losses), tuple(snapshots))


def _context(model: nn.Module, batches: Sequence[Any], loss: Callable[[nn.Module, Any], Tensor]) -> tuple[Context, tuple[str, ...]]:
    """Which sites can be changed, and what cannot."""
    twin = _copy(model)
    snapshots: list[Snapshot] = []
    shapes: dict[str, tuple[int, ...]] = {}
    paths = {_clean(path): path for path, _ in twin.named_modules()}
    leaves, reached = tree_leaves(batches[0]), list[int]()

    def look(module: nn.Module, args: Any, kwargs: Any) -> None:
        floats = {id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim > 1}
        reached.extend(at for at, leaf in enumerate(leaves) if id(leaf) in floats)

    with torch.enable_grad(), _quiet(), watch(twin, every=1, budget=None, sinks=[snapshots.append], group=None) as monitor:
        handles = [
            module.register_forward_pre_hook(
                lambda module, args, path=path: shapes.setdefault(_clean(path), tuple(args[0].shape)) and None if args else None
            )
            for path, module in twin.named_modules()
        ]
        handles.append(twin.register_forward_pre_hook(look, with_kwargs=True))
        value = loss(twin, batches[0])
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise TypeError(f"loss gave {type(value).__name__}; a scalar tensor is needed: loss=lambda model, batch: ...")
        value.backward()
        monitor.step()
        for handle in handles:
            handle.remove()
    if not snapshots:
        raise ValueError(f"no activation ran. {monitor.coverage}")
    records = snapshots[-1].records
    sites = tuple(record for record in records if record.kind == "module" and not (record.output or record.gate) and record.site in paths)
    others = [record.site for record in records if record not in sites and not (record.output or record.gate)]
    if not sites:
        raise ValueError(f"no hidden activation of this model is a module that could be changed; seen were: {', '.join(others) or 'none'}")
    notes = (f"not changed, since they are no modules: {', '.join(others)}",) if others else ()
    return Context(sites, {weight.name: weight.feeds for weight in snapshots[-1].weights}, shapes, batches, paths, next(iter(reached), None)), notes


def _clean(path: str) -> str:
    from torchsat.taps import clean

    return clean(path)


def _module(model: nn.Module, context: Context, name: str) -> nn.Module:
    return model.get_submodule(context.paths[name])


def _set(model: nn.Module, context: Context, name: str, module: nn.Module) -> None:
    parent, _, attribute = context.paths[name].rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


def _layers(model: nn.Module, context: Context) -> list[nn.Module]:
    """The layers that feed the hidden sites."""
    names = {record.site for record in context.sites}
    return [
        _module(model, context, name)
        for name, feeds in context.feeds.items()
        if name in context.paths and names & set(feeds) and is_layer(_module(model, context, name)) and _learns(_module(model, context, name))
    ]


def _learns(layer: nn.Module) -> bool:
    """A frozen layer is not drawn anew: it could not recover."""
    return cast(Tensor, layer.weight).requires_grad


def _initialise(model: nn.Module, context: Context, rule: str) -> str:
    layers = _layers(model, context)
    if not layers:
        raise ValueError("no linear or convolutional layer with a weight of its own that learns feeds a hidden activation")
    draw: dict[str, Callable[[Tensor], Any]] = {
        "Xavier": nn.init.xavier_normal_,
        "He": lambda weight: nn.init.kaiming_normal_(weight, nonlinearity="relu"),
        "LeCun": lambda weight: nn.init.kaiming_normal_(weight, nonlinearity="linear"),
    }
    for layer in layers:
        draw[rule](cast(Tensor, layer.weight))
        if isinstance(layer.bias, Tensor):
            nn.init.zeros_(layer.bias)
    return f"{len(layers)} layers drawn anew, {rule}"


def _activate(model: nn.Module, context: Context, kind: type[nn.Module]) -> str:
    for record in context.sites:
        _set(model, context, record.site, kind())
    return f"{len(context.sites)} activations are {kind.__name__}; {_initialise(model, context, 'He')}"


def _normalise(model: nn.Module, context: Context, layer_norm: bool) -> str:
    device = next(model.parameters()).device
    for record in context.sites:
        shape = context.shapes.get(record.site, ())
        if len(shape) not in (2, 3, 4):
            raise ValueError(f"z of {record.site} has {len(shape)} axes; known are 2, 3 and 4")
        width = shape[1] if len(shape) == 4 else shape[-1]
        if len(shape) == 4:
            norm: nn.Module = nn.GroupNorm(1, width) if layer_norm else nn.BatchNorm2d(width)
        else:
            norm = nn.LayerNorm(width) if layer_norm else nn.BatchNorm1d(width) if len(shape) == 2 else _TokenBatchNorm(width)
        _set(model, context, record.site, nn.Sequential(norm.to(device), _module(model, context, record.site)))
    return f"{'LayerNorm' if layer_norm else 'BatchNorm'} before {len(context.sites)} activations"


class _TokenBatchNorm(nn.BatchNorm1d):
    """Batch norm of [batch, tokens, features]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, 1)).reshape(x.shape)


def _standardise(model: nn.Module, context: Context) -> str:
    """A pre-hook on the copy: mean and spread of each feature, over the batches of the trial."""
    if context.input_leaf is None:
        raise ValueError("no tensor of numbers reaches the model from the batch as it is")
    given = [tree_leaves(batch)[context.input_leaf] for batch in context.batches]
    if any(tensor.shape[1:] != given[0].shape[1:] for tensor in given):
        raise ValueError("the inputs in the batches are not of one shape")
    data = torch.cat([tensor.detach().double() for tensor in given])
    mean, std = data.mean(0), data.std(0, correction=0)
    std = torch.where(std < 1e-3 * std.max().clamp(min=1e-12), torch.ones_like(std), std)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def scaled(value: Any) -> Any:
            if isinstance(value, Tensor) and value.is_floating_point() and value.shape[1:] == mean.shape:
                return (value - mean.to(value)) / std.to(value)
            return value

        return tree_map(scaled, args), tree_map(scaled, kwargs)

    model.register_forward_pre_hook(hook, with_kwargs=True)
    return "inputs standardised per feature"


REMEDIES: tuple[Remedy, ...] = (
    *(Remedy(kind.__name__, partial(_activate, kind=kind)) for kind in (nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU)),
    *(Remedy(f"{rule} init", partial(_initialise, rule=rule)) for rule in ("Xavier", "He", "LeCun")),
    Remedy("standardised inputs", _standardise),
    Remedy("BatchNorm", partial(_normalise, layer_norm=False)),
    Remedy("LayerNorm", partial(_normalise, layer_norm=True)),
    Remedy("lower learning rate", lambda model, context: "a tenth of the learning rate", 0.1),
)
"""What `try_remedies` tries. Activations come with He initialisation."""


def _copy(model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; allowed is a torch.nn.Module")
    try:
        twin = copy.deepcopy(model)
    except Exception as error:
        raise TypeError(f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}); a trial needs a copy") from error
    return twin if any(module.training for module in twin.modules()) else twin.train()


def _detached(values: Any) -> Any:
    """The same tensors, so that no gradient of a trial reaches the user's own."""
    return tree_map(lambda value: value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value, values)


def _optimizer(given: Optimizer | Callable[[Iterable[nn.Parameter]], Optimizer] | None, model: nn.Module, twin: nn.Module) -> Optimizer:
    """An optimizer of the same kind and options for a copy; parameters that the copy has besides join the first group."""
    if given is None:
        return torch.optim.Adam(twin.parameters(), lr=1e-3)
    if not isinstance(given, Optimizer):
        return given(twin.parameters())
    group_of = {id(parameter): at for at, group in enumerate(given.param_groups) for parameter in group["params"]}
    names = {name: group_of.get(id(parameter)) for name, parameter in model.named_parameters()}
    groups: list[dict[str, Any]] = [{**{key: value for key, value in group.items() if key != "params"}, "params": []} for group in given.param_groups]
    for name, parameter in twin.named_parameters():
        at = names.get(name, 0)
        if at is not None:
            groups[at]["params"].append(parameter)
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError("the optimizer holds no parameter of this model; give the one that trains it, or a function of parameters")
    # Defaults that are no arguments are set by the kind itself; the groups carry every option anyhow.
    accepted = inspect.signature(type(given).__init__).parameters
    return type(given)(groups, **{key: value for key, value in given.defaults.items() if key in accepted})


@contextmanager
def _random_numbers_kept() -> Iterator[None]:
    restore = _random_state()
    try:
        yield
    finally:
        restore()


def _random_state() -> Callable[[], None]:
    """What sets the generators of torch, Python and NumPy back to where they are now."""
    mine, cpu = random.getstate(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    numpy = sys.modules.get("numpy")
    theirs = numpy.random.get_state() if numpy is not None else None

    def restore() -> None:
        random.setstate(mine)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        if numpy is not None:
            numpy.random.set_state(theirs)

    return restore


@contextmanager
def _quiet() -> Iterator[None]:
    """The alerts of a trial are its result, not news."""
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        log.setLevel(level)


@contextmanager
def _bar(shown: bool, total: int) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not (shown and console.is_terminal)) as bar:
        task = bar.add_task("trying remedies", total=total)
        yield lambda steps: bar.advance(task, steps)


def _draw(mpl: Any, trials: Trials, path: str) -> None:
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    panels: tuple[tuple[str, str], ...] = (
        ("loss", "loss"),
        ("saturated", "saturated share, worst site"),
        ("relative_derivative", "E|f'| / peak, worst site"),
        ("attenuation", "attenuation, worst site"),
        ("gradient", "gradient norm, first layer"),
    )
    tried = [trial for trial in trials.trials if trial.tried]
    figure, axes = plt.subplots(1, len(panels), figsize=(3.6 * len(panels), 4.2), layout="constrained")
    colours = [plt.get_cmap("tab20")(number) for number in range(20)]
    for axis, (name, title) in zip(axes, panels, strict=True):
        for at, trial in enumerate(tried):
            steps = [snapshot.step for snapshot in trial.snapshots]
            if name == "loss":
                values: Sequence[float | None] = trial.losses
                steps = list(range(len(trial.losses)))
            elif name == "gradient":
                values = [trial.first_gradient(index) for index in range(len(steps))]
            else:
                values = [trial.worst(name, index) for index in range(len(steps))]
            known = [(step, value) for step, value in zip(steps, values, strict=True) if value is not None and math.isfinite(value)]
            style = {"color": "black", "linewidth": 2.2} if at == 0 else {"color": colours[(at - 1) % 20], "linewidth": 1.2}
            axis.plot(*zip(*known, strict=True), label=trial.remedy, **style) if known else axis.plot([], [], label=trial.remedy, **style)
        if name in ("gradient", "attenuation", "loss"):
            axis.set_yscale("log")
        axis.set(title=title, xlabel="step")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=7, frameon=False)
    figure.savefig(path, dpi=100)
    plt.close(figure)
