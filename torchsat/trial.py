"""Judging and treating a model beside its training: `probe` judges it by one batch, `try_remedies` measures what each remedy does to it.

Both work on copies. The model, its gradients, the optimizer and the random numbers stay bit for bit as they were.

Every trial starts from a copy of the model as it is, sees the same batches in the same order and draws the same random numbers. So it differs from
the untouched copy in one remedy only. The remedies themselves are in remedies.py.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import logging
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from torchsat.internals import tree_leaves, tree_map
from torchsat.monitor import Monitor, watch
from torchsat.notebook import Bar, is_kernel
from torchsat.options import MeasureOptions
from torchsat.record import Snapshot
from torchsat.remedies import REMEDIES, Context, Remedy
from torchsat.rules import RULES
from torchsat.structure import clean
from torchsat.transport.windows import SAMPLES_FROM_START
from torchsat.trials import Trial, Trials
from torchsat.weights import feature_axis, is_layer

if TYPE_CHECKING:
    from typing_extensions import Unpack

log = logging.getLogger("torchsat")

Loss = Callable[[nn.Module, Any], Tensor]
MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]

_PLAIN = Remedy("as it is", lambda model, context: "nothing")
"""The untouched copy, which every other trial is compared with."""


def probe(model: nn.Module, *inputs: Any, loss: Callable[[Any], Tensor] | None = None, extras: str | Iterable[str] = (), **keywords: Any) -> Snapshot:
    """Judge a model by one batch before it is trained. `torchsat.report.report(snapshot)` prints the verdict.

    Args:
        model: any nn.Module that can be deep-copied. It stays bit for bit as it is, and so do the random numbers.
        inputs, keywords: what the model is called with.
        loss: a function from the model's output to a scalar tensor. None: the attribute `.loss` of the output if it has one, else the sum, over the
            floating-point tensors in the output, of the mean of their squares.
        extras: as in `torchsat.watch`.

    Raises:
        TypeError: the model cannot be copied or watched, or the loss is no scalar tensor.
        ValueError: no activation ran.
    """
    rules = tuple(replace(rule, patience=1) for rule in RULES)
    with _random_numbers_kept():
        twin = _copy(model)
        inputs, keywords = _detached(inputs), _detached(keywords)
        with _quiet(), watch(twin, sample=None, rules=rules, extras=extras, group=None, errors="raise") as monitor:
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
    """A loss for any output, so that gradients flow through the whole model."""
    given = getattr(output, "loss", None)
    if isinstance(given, Tensor):
        return given
    values = output
    if isinstance(output, dict):
        # The outputs of transformers are subclasses of dict, which tree_leaves would take for one leaf.
        values = dict(output)
    elif hasattr(output, "__dict__") and not isinstance(output, Tensor):
        values = vars(output)
    leaves = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return sum((leaf.square().mean() for leaf in leaves), torch.zeros((), device=leaves[0].device if leaves else None))


@dataclass(frozen=True)
class _Plan:
    """What all trials of one `try_remedies` have in common."""

    model: nn.Module
    batches: Sequence[Any]
    loss: Loss
    optimizer: Optimizer | MakeOptimizer | None
    steps: int
    every: int
    seeds: int
    options: MeasureOptions


def try_remedies(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss,
    *,
    optimizer: Optimizer | MakeOptimizer | None = None,
    steps: int = 100,
    remedies: Sequence[Remedy] | None = None,
    every: int = 10,
    seeds: int = 1,
    apply: bool = False,
    progress: bool = True,
    **options: Unpack[MeasureOptions],
) -> Trials:
    """Apply each remedy to a copy of a model and train the copies for a few steps, together with an untouched copy.

    Args:
        model: any nn.Module that can be deep-copied. Activations that are modules can be replaced; the others are named in `Trials.notes`.
        batches: a list, a DataLoader, or anything else that can be iterated over more than once. The trials take the batches in order, and begin
            again with the first one where there are fewer than `steps`.
        loss: a function from (model, batch) to a scalar tensor. It calls the model.
        optimizer: the optimizer of the model, whose kind and options are used for the copies, or a function that makes an optimizer of parameters.
            None: Adam with a learning rate of 1e-3.
        steps: the number of steps of each trial.
        remedies: the remedies to try. None: `REMEDIES`.
        every: the number of steps between two observations.
        seeds: how often each remedy is tried. The first time the batches come in their order and the random numbers are those of now; each further
            time the batches come in another order, and other numbers are drawn: the weights that a remedy draws anew, dropout, whatever the loss
            draws. The untouched copy begins with the same weights each time. `Trial.loss` is then a mean and `Trial.spread` a standard deviation.
        apply: whether to print what to apply: the change of the best trial as code, below a comment that says how much it helped. Where none helped,
            the comment says so, and no code is printed. The model itself is not changed.
        progress: whether to show a progress bar where stderr is a terminal, or in a notebook.
        options: those of `torchsat.watch` that say what is measured, such as `include` or `activations`.

    Returns:
        The trials: `print` shows them as a table, `plot` draws them, and `code` gives the best change as code, or that of any other.

    Raises:
        TypeError: an argument is of a wrong type, the loss is no scalar tensor, or the model cannot be copied.
        ValueError: `steps` or `seeds` is below 1, `batches` is empty, the optimizer holds no parameter of the model, or no hidden activation is a
            module.
    """
    _check(batches, loss, optimizer, steps, seeds)
    with _random_numbers_kept():
        restore = _random_state()
        taken = [_detached(batch) for batch in itertools.islice(batches, steps)]
        if not taken:
            raise ValueError("batches is empty; at least one batch is needed")
        plan = _Plan(model, taken, loss, optimizer, steps, every, seeds, options)
        context, notes = _context(plan)
        chosen = [each for each in REMEDIES if each.applies is None or each.applies(context)] if remedies is None else tuple(remedies)
        with _bar(progress, (len(chosen) + 1) * steps * seeds) as advance:
            trials = [_try_seeds(plan, remedy, context, restore, advance) for remedy in (_PLAIN, *chosen)]
    found = Trials(tuple(trials), notes)
    if apply:
        print(found.cure)  # noqa: T201
    return found


def _check(batches: object, loss: object, optimizer: object, steps: object, seeds: object) -> None:
    """Raise TypeError or ValueError for arguments of try_remedies that cannot be used."""
    if not callable(loss):
        raise TypeError(f"loss is {loss!r}; allowed is a function of (model, batch) that gives a scalar")
    if optimizer is not None and not isinstance(optimizer, Optimizer) and not callable(optimizer):
        raise TypeError(f"optimizer is {optimizer!r}; allowed are an optimizer, a function of parameters, and None")
    if not isinstance(batches, Iterable):
        raise TypeError(f"batches is {batches!r}; allowed are a list, a DataLoader, or anything that can be iterated again")
    for name, count in (("steps", steps), ("seeds", seeds)):
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"{name} is {count!r}; allowed are whole numbers from 1 up")
    if isinstance(batches, Iterator):
        raise TypeError("batches is an iterator, which can be read only once; give a list or a DataLoader, or list(itertools.islice(batches, 100))")


def _try_seeds(plan: _Plan, remedy: Remedy, context: Context, restore: Callable[[], None], advance: Callable[[int], None]) -> Trial:
    """Try a remedy with each seed. All remedies meet the same random numbers and the same orders of batches."""
    restore()
    first, repeats = _try(plan, remedy, context, advance), []
    for seed in range(1, plan.seeds):
        if not first.tried:
            advance(plan.steps)
            continue
        _seed(seed)
        again = _try(replace(plan, batches=random.sample(plan.batches, len(plan.batches))), remedy, context, advance)
        if again.tried:
            repeats.append(again.losses)
        else:
            first = again
    return replace(first, repeats=tuple(repeats)) if first.tried else first


def _seed(seed: int) -> None:
    """Set all generators of random numbers."""
    random.seed(seed)
    torch.manual_seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed)


def _try(plan: _Plan, remedy: Remedy, context: Context, advance: Callable[[int], None]) -> Trial:
    """Apply a remedy to a new copy of the model and train it.

    An error in the training of a changed copy ends its trial and not the others: the change may not fit the model. An error in the training of the
    untouched copy is raised, since it would meet every copy.
    """
    twin = _copy(plan.model)
    try:
        change = remedy.apply(twin, context)
        code = remedy.as_code(context)
    except ValueError as error:
        advance(plan.steps)
        return Trial(remedy.name, str(error))
    stepper = _optimizer(plan.optimizer, plan.model, twin)
    for group in stepper.param_groups:
        group["lr"] = group["lr"] * remedy.learning_rate
    losses: list[float] = []
    snapshots: list[Snapshot] = []
    try:
        with torch.enable_grad(), _quiet(), _watch(plan, twin, plan.every, snapshots):
            for value in _losses(plan, twin, stepper):
                losses.append(value)
                advance(1)
    except Exception as error:
        if remedy is _PLAIN:
            raise
        advance(plan.steps - len(losses))
        return Trial(remedy.name, f"could not be run: {type(error).__name__}: {error}")
    return Trial(remedy.name, change, tuple(losses), tuple(snapshots), code=code)


def _watch(plan: _Plan, twin: nn.Module, every: int, snapshots: list[Snapshot]) -> Monitor:
    """Watch a copy, at every so many steps whatever that costs, and collect its snapshots."""
    return watch(twin, every=every, budget=None, sinks=[snapshots.append], group=None, **plan.options)


def _losses(plan: _Plan, twin: nn.Module, stepper: Optimizer) -> Iterator[float]:
    """Train a copy and give the loss of each step."""

    def backward(batch: Any) -> Tensor:
        stepper.zero_grad()
        value = plan.loss(twin, batch)
        value.backward()
        return value

    # An optimizer such as LBFGS evaluates the loss itself, through a closure that its `step` requires.
    needs_closure = inspect.signature(type(stepper).step).parameters["closure"].default is inspect.Parameter.empty
    for batch in itertools.islice(itertools.cycle(plan.batches), plan.steps):
        if needs_closure:
            value = cast(Tensor, stepper.step(partial(backward, batch)))  # type: ignore[arg-type]
        else:
            value = backward(batch)
            stepper.step()
        yield float(value.detach())


def _context(plan: _Plan) -> tuple[Context, tuple[str, ...]]:
    """What one batch shows about the model, and sentences that name the activations which cannot be replaced."""
    twin = _copy(plan.model)
    snapshots: list[Snapshot] = []
    shapes: dict[str, tuple[int, ...]] = {}
    paths = {clean(path): path for path, _ in twin.named_modules()}
    leaves, reached = tree_leaves(plan.batches[0]), list[int]()

    def find_input(module: nn.Module, args: Any, kwargs: Any) -> None:
        floats = {id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim > 1}
        reached.extend(at for at, leaf in enumerate(leaves) if id(leaf) in floats)

    with torch.enable_grad(), _quiet(), _watch(plan, twin, 1, snapshots) as monitor:
        handles = [_note_shape(module, name, shapes) for name, module in ((clean(path), module) for path, module in twin.named_modules())]
        handles.append(twin.register_forward_pre_hook(find_input, with_kwargs=True))
        value = plan.loss(twin, plan.batches[0])
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
    feeds = {weight.name: weight.feeds for weight in snapshots[-1].weights}
    heads = tuple(name for name, path in paths.items() if is_layer(twin.get_submodule(path)) and name not in feeds)
    layers = {site: twin.get_submodule(paths[name]) for name, fed in reversed(feeds.items()) if name in paths for site in fed}
    measured = [record.site for record in sites if record.units and record.site in layers]
    sizes = _sizes(plan, twin, {name: (twin.get_submodule(paths[name]), layers[name]) for name in measured})
    return Context(sites, feeds, shapes, plan.batches, paths, next(iter(reached), None), heads, sizes), notes


def _sizes(plan: _Plan, twin: nn.Module, sites: Mapping[str, tuple[nn.Module, nn.Module]]) -> dict[str, Tensor]:
    """The mean |a| of each unit, over the batches until each unit has enough samples.

    Args:
        sites: for each site its module, and the layer that feeds it: the units lie where its features do.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def add(name: str, layer: nn.Module, module: nn.Module, args: Any, a: Tensor) -> None:
        units = a.detach().double().abs().movedim(feature_axis(layer, a.ndim), 0).flatten(1)
        sums[name] = sums.get(name, torch.zeros_like(units[:, 0])) + units.sum(1)
        counts[name] = counts.get(name, 0) + units.shape[1]

    handles = [module.register_forward_hook(partial(add, name, layer)) for name, (module, layer) in sites.items()]
    for batch in plan.batches:
        plan.loss(twin, batch)
        if min(counts.values(), default=SAMPLES_FROM_START) >= SAMPLES_FROM_START:
            break
    for handle in handles:
        handle.remove()
    return {name: total / counts[name] for name, total in sums.items() if counts[name] >= SAMPLES_FROM_START}


def _note_shape(module: nn.Module, name: str, shapes: dict[str, tuple[int, ...]]) -> RemovableHandle:
    """Keep the shape of the module's first positional argument under this name, from its first call."""

    def note(module: nn.Module, args: Any) -> None:
        if args and isinstance(args[0], Tensor):
            shapes.setdefault(name, tuple(args[0].shape))

    return module.register_forward_pre_hook(note)


def _copy(model: nn.Module) -> nn.Module:
    """A deep copy of the model. It is put into training mode where the whole model is in evaluation mode, since only training is observed."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; allowed is a torch.nn.Module")
    try:
        twin = copy.deepcopy(model)
    except Exception as error:
        raise TypeError(f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}); a trial needs a copy") from error
    return twin if any(module.training for module in twin.modules()) else twin.train()


def _detached(values: Any) -> Any:
    """Replace each tensor by one that shares its memory but not its graph, so that a trial adds nothing to the `.grad` of the user's tensors."""
    return tree_map(lambda value: value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value, values)


def _optimizer(given: Optimizer | MakeOptimizer | None, model: nn.Module, twin: nn.Module) -> Optimizer:
    """An optimizer for a copy, of the same kind and with the same options as the given one.

    Parameters that a remedy has added to the copy join the first group. Parameters that the given optimizer does not train stay untrained.
    """
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
    # Some optimizers keep values in `defaults` that their constructor does not accept. Nothing is lost, as the groups hold every option too.
    accepted = inspect.signature(type(given).__init__).parameters
    return type(given)(groups, **{key: value for key, value in given.defaults.items() if key in accepted})


@contextmanager
def _random_numbers_kept() -> Iterator[None]:
    """Leave the random number generators at the end as they were at the beginning."""
    restore = _random_state()
    try:
        yield
    finally:
        restore()


def _random_state() -> Callable[[], None]:
    """Read the states of the random number generators of Python, torch and NumPy, and return a function that sets them again."""
    python_state, cpu_state = random.getstate(), torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy is not None else None

    def restore() -> None:
        random.setstate(python_state)
        torch.set_rng_state(cpu_state)
        if cuda_states:
            torch.cuda.set_rng_state_all(cuda_states)
        if numpy is not None:
            numpy.random.set_state(numpy_state)

    return restore


@contextmanager
def _quiet() -> Iterator[None]:
    """Log nothing meanwhile. The alerts of a trial belong to its result and must not look like alerts about the user's own training."""
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        log.setLevel(level)


@contextmanager
def _bar(shown: bool, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr or in the cell of a notebook, removed at the end. It gives the function that advances it by a number of steps."""
    if shown and is_kernel():
        with closing(Bar("trying remedies", total)) as cell:
            yield cell.advance
        return
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True, force_jupyter=False)
    with Progress(console=console, transient=True, disable=not (shown and console.is_terminal)) as bar:
        task = bar.add_task("trying remedies", total=total)
        yield lambda steps: bar.advance(task, steps)
