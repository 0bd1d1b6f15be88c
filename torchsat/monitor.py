"""The public interface: `watch`, and the `Monitor` of one model that it returns. What happens while the model trains is in loop.py."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from torchsat import internals, process, schedule
from torchsat.cards import STRIP, State, card
from torchsat.claims import claim_of
from torchsat.coverage import Coverage
from torchsat.loop import Loop
from torchsat.notebook import Live, is_kernel
from torchsat.options import Directory, Options, WatchOptions, options_of
from torchsat.percent import percent
from torchsat.plotting import Source, draw
from torchsat.record import Alert, Snapshot
from torchsat.schedule import Account, Clock
from torchsat.structure import Stages, stages_of, unwrap
from torchsat.trust import trust_kernels
from torchsat.verdict import Verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.distributed.pipelining import PipelineStage
    from typing_extensions import Unpack

log = logging.getLogger("torchsat")


def watch(
    model: nn.Module | PipelineStage | Sequence[PipelineStage],
    log_dir: Directory | None = None,
    **options: Unpack[WatchOptions],
) -> Monitor:
    """Watch the activations of a model while it trains. This one line is all that is added to a training loop.

    A model has one monitor, and a directory one run: a second `watch` of the same model, or into the same directory, closes the first monitor with a
    line in the log, as where a cell of a notebook is run again. A model and a part of it can be watched side by side, each into its own directory.

    Args:
        model: any nn.Module; before or after the optimizer is made, before or after torch.compile or DistributedDataParallel. Or a stage of
            torch.distributed.pipelining, or a list of those that this rank runs.
        log_dir: TensorBoard's directory of this run. torchsat writes the sub-run `<log_dir>/torchsat`. None: nothing is written.
        writer: instead of `log_dir`, a torch.utils.tensorboard.SummaryWriter to write through.
        every: observe step 0, the powers of two, and the multiples of this. 50 by default.
        budget: the share of training time that observing may take beyond an allowance of 2 s. As long as all observations together have taken less,
            exactly the steps are observed that `every` names; from then on as many of its multiples as the budget pays for, and a log line says so.
            Powers of two are always observed. None: any share. 0.02 by default.
        epsilon: an element is saturated where |f'| stays below this share of its peak. 0.05 by default.
        sample: the most elements that are read per call of a site (a place where an activation is computed), spread evenly over the tensor; None:
            all. "auto", the default: 65536, or all where a kernel on the GPU reads all of them as quickly.
        include, exclude: patterns of site names (as in a shell), one or several.
        calls: measure function calls too (`F.relu(x)`, `x.tanh()`, softmax, attention), not only modules and recurrent layers.
        compiled: how a compiled model is observed: "eager" runs observed steps without the compiler; "in_graph" compiles the measurement of its
            modules into the graph (to be called before the first compiled step; that first step still runs eager).
        activations: the table that says which module or function computes which activation.
        extras: what costs more than the rest and is measured only where its name is given, one or several: "formats" (what of the numbers of a site
            lower number formats would clamp or flush to zero: `Snapshot.formats`), "logits" (what a cross-entropy takes, as the site `logits`),
            "rank" (the effective rank of its features). None by default.
        rules: the rules that decide when to alert.
        sinks: functions that are called with each Snapshot, after it was written for TensorBoard. Their `flush` and `close` are called too, where
            they exist.
        on_alert: a function that is called with an Alert when it fires, worsens or clears.
        group: the ranks that observe together. "auto": all ranks of torch.distributed, if it is in use when training begins. None: each rank by
            itself.
        start: the number of the first step; for a resumed run, the number of optimizer steps that it has taken. Alerts that were firing at that step,
            as `log_dir` shows, keep their `since`. "resume": the step after the last one in `log_dir`. To keep more than the files show, save
            `monitor.state_dict()` in the checkpoint.
        errors: "raise" raises faults of the monitor instead of logging them, for developers of torchsat.

    Raises:
        TypeError: the model cannot be watched (not an nn.Module, nn.DataParallel, TorchScript), or there is no option of that name.
        ValueError: an argument is out of its range.
    """
    return Monitor(model, options_of({**options, "log_dir": log_dir}), schedule.CLOCK)


class _Name(str):
    """A string that is shown without quotes: it stands for a default value that is too long to show."""

    __slots__ = ()
    __repr__ = str.__str__


def _signature() -> inspect.Signature:
    """The signature that `help(torchsat.watch)` shows: every option with its default from Options."""
    long = {"activations": _Name("torchsat.ACTIVATIONS"), "rules": _Name("torchsat.RULES")}
    given = list(inspect.signature(watch).parameters.values())[:2]
    named = [each for name, each in inspect.signature(Options).parameters.items() if name != "log_dir"]
    named = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY, default=long.get(each.name, each.default)) for each in named]
    return inspect.Signature([*given, *named], return_annotation="Monitor")


watch.__signature__ = _signature()  # type: ignore[attr-defined]


class Monitor:
    """Watches one model; this is what `watch` returns. As a context manager it closes itself at the end of the block.

    Args:
        clock: the clocks of the host and the device.
    """

    def __init__(self, model: nn.Module | PipelineStage | Sequence[PipelineStage], options: Options, clock: Clock) -> None:
        stages = stages_of(model)
        modules = {name: unwrap(stage.submod) for name, stage in stages.items()}
        watched = Stages(modules) if modules else unwrap(model)
        claim = claim_of(modules.values() or (watched,), options)
        process.make_way(claim)
        self._loop = loop = Loop(watched, stages, options, clock, claim)
        if not _knows_torch(options):
            return
        _trust_kernels(watched)
        loop.start()
        sites = loop.observer.sites
        if not options.calls and not sites.has_modules and not sites.has_recurrent:
            loop.observer.delivery.say_nothing_watched()

    @property
    def latest(self) -> Snapshot | None:
        """The newest snapshot that has reached the host."""
        return self._loop.observer.delivery.latest

    @property
    def alerts(self) -> tuple[Alert, ...]:
        """The alerts that fire now, worst first."""
        return self._loop.observer.delivery.alerts

    @property
    def verdict(self) -> Verdict:
        """What is wrong with the run so far: `print(monitor.verdict)`. Without rules, and before the first observation, it is "not judged"."""
        return self._loop.observer.delivery.remembered.verdict(self.alerts)

    @property
    def overhead(self) -> float | None:
        """The measured share of training time that the last observations took, from step `every` on; None before it is known. It may lie above the
        budget as long as the allowance of 2 s lasts. With `every=1` on a GPU it is the time of our own code on the host."""
        return self._loop.observer.schedule.overhead

    @property
    def coverage(self) -> Coverage:
        """What is measured and what is not, as of the last observation."""
        return self._loop.observer.delivery.coverage

    def plot(self, metric: str = "alert_level", *, site: str | None = None) -> Figure:
        """Draw the run so far with matplotlib: a metric of all sites over the steps, or one site alone; `torchsat.plot` explains the arguments.

        The figure shows what this monitor has observed, 400 observations at most, with or without a directory. What an earlier session wrote is in
        the figure of the directory: `torchsat.plot("runs/exp1")`.
        """
        return draw([self._drawn()], metric, site)

    def _drawn(self) -> tuple[str, Source]:
        """The name of the run and what its figures are drawn from."""
        self._settle()
        return self._loop.observer.delivery.model, self._loop.observer.delivery.remembered

    def live(self) -> None:
        """Show a card of this monitor in the cell that runs now, which follows the training: `monitor.live()` before the loop, in the same cell.

        It is replaced at each observation, twice a second at most, and shows the end of the run when the monitor is closed. Outside a notebook
        nothing is shown, and a line in the log says so.
        """
        if is_kernel():
            self._loop.observer.delivery.add_sink(Live(self._card, self.__repr__))
        else:
            log.warning("torchsat: monitor.live() shows nothing here, since this is no notebook; print(monitor.verdict) after the loop instead.")

    def _settle(self) -> None:
        """Wait for observations in flight, so that what is shown is complete. Ranks that observe together see them at the same step of the loop and
        not earlier, or a loop that ends on an alert would not end on all of them."""
        if not self._loop.observer.route.together:
            self.flush()

    def step(self) -> None:
        """End a step by hand, in a loop without a torch optimizer. From then on the steps of optimizers are ignored.

        In such a loop update ratios are not known, and gradients keep the factor of a GradScaler.
        """
        if not self._loop.is_closed:
            self._loop.end_step()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint should hold, in plain types: the number of steps taken, what observing has cost, and what rules and diagnosis remember of
        earlier observations."""
        loop, observer = self._loop, self._loop.observer
        observer.drain(loop.step)
        observing = asdict(observer.schedule.account(loop.step - 1))
        return {"step": loop.step, "turn": observer.turn, "observing": observing, **observer.delivery.history()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where another monitor was when its `state_dict` was taken. Call this before training continues.

        Raises:
            ValueError: `state` does not come from `state_dict`.
        """
        missing = {"step", "turn", "stuck", "judge", "diagnosis"} - set(state)
        if missing:
            raise ValueError(f"the state lacks {', '.join(sorted(missing))}; allowed is what monitor.state_dict() gave")
        try:
            step, turn = int(state["step"]), int(state["turn"])
            # A state of an earlier version does not say what observing has cost.
            account = Account(**{name: float(value) for name, value in state.get("observing", {}).items()})
            self._loop.observer.delivery.take_up(state)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"the state cannot be understood ({type(error).__name__}: {error}); allowed is what monitor.state_dict() gave"
            ) from error
        self._loop.resume(step, turn, account)

    def flush(self) -> None:
        """Wait for every observation in flight, and for the sinks."""
        self._loop.flush()

    def close(self) -> None:
        """Stop watching, and leave nothing behind: no hook, thread or open file. Calling it again does nothing."""
        self._loop.close()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Return None, so that a copy of a model that holds its monitor as an attribute holds no monitor."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def __repr__(self) -> str:
        verdict = "nothing observed yet" if self.latest is None else str(self.verdict)
        return f"<torchsat.Monitor: {verdict}; {len(self._loop.observer.sites.ran)} sites, {self._extent}>"

    @property
    def _extent(self) -> str:
        return f"step {self._loop.step}{', closed' if self._loop.is_closed else ''}"

    def _repr_html_(self) -> str:
        self._settle()
        return self._card()

    def _card(self) -> str:
        overhead = "" if self.overhead is None else f", observing takes {percent(self.overhead)} of the training time"
        delivery = self._loop.observer.delivery
        levels = delivery.remembered.levels(STRIP)
        return card(State(self.verdict, self.alerts, self.latest, self.coverage, levels, f"{self._extent}{overhead}"))


def _knows_torch(options: Options) -> bool:
    """Whether hooks can work with this torch. Where they cannot, nothing is watched, and a warning says so."""
    why_not = internals.why_unusable()
    if why_not is None:
        return True
    told = f"torchsat: this version does not know torch {torch.__version__} ({why_not}), so nothing is watched: update torchsat-monitor"
    if options.raises:
        raise RuntimeError(told)
    log.warning("%s", told)
    return False


def _trust_kernels(model: nn.Module) -> None:
    """Check our kernels on the GPUs that the model is on, and use them where they compute the right numbers.

    This is done before training, since it waits for the devices. On a GPU that the model moves to later, plain torch measures instead.
    """
    # A subclass of Tensor may run code of the user's where an attribute is read.
    with internals.without_function_modes():
        devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    for device in devices:
        why_not = trust_kernels(device)
        if why_not is not None:
            log.warning("torchsat: its kernels are not used on %s, where plain torch measures samples: %s", device, why_not)
