"""`watch` and the `Monitor`: the public face of one watched model. What happens while it trains is in loop.py."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from torchsat import schedule
from torchsat.loop import Loop
from torchsat.options import Directory, Options, WatchOptions, options_of
from torchsat.record import Alert, Coverage, Snapshot
from torchsat.schedule import Clock
from torchsat.statistics import trust_kernels
from torchsat.structure import Stages, stages_of, unwrap

if TYPE_CHECKING:
    from torch.distributed.pipelining import PipelineStage
    from typing_extensions import Unpack

log = logging.getLogger("torchsat")


def watch(
    model: nn.Module | PipelineStage | Sequence[PipelineStage],
    log_dir: Directory | None = None,
    **options: Unpack[WatchOptions],
) -> Monitor:
    """Watch the activations of a model while it trains; the one line.

    Args:
        model: any nn.Module; before or after the optimizer is made, before or after torch.compile or DistributedDataParallel. Or a stage of
            torch.distributed.pipelining, or a list of those that this rank runs.
        log_dir: TensorBoard's directory of this run; written is the sub-run `<log_dir>/torchsat`. None: nothing is written.
        writer: instead of `log_dir`, a torch.utils.tensorboard.SummaryWriter to write through.
        every: observe step 0, the powers of two below this, and its multiples. 50 by default.
        budget: the share of training time that observing may take from step `every` on: where it would take more, the interval is stretched, which
            is logged. None: any. 0.02 by default.
        epsilon: an element is saturated where |f'| stays below this share of its peak. 0.05 by default.
        sample: the most elements read per call of a site, spread evenly over it; None: all. "auto", the default: 65536, and all where a kernel on the
            GPU reads them anyway.
        include, exclude: patterns of site names (as in a shell), one or several.
        calls: hear function calls too (`F.relu(x)`, `x.tanh()`, softmax, attention), not only modules and recurrent layers.
        compiled: how a compiled model is observed: "eager" runs observed steps without the compiler; "in_graph" compiles the measurement of its
            modules into the graph (to be called before the first compiled step; that first step still runs eager).
        activations: the table that says which module or function computes which activation.
        rules: when to alert.
        sinks: functions of a Snapshot, called after TensorBoard's; `flush` and `close` are called too where they exist.
        on_alert: function of an Alert, called when one fires, worsens or clears.
        group: the ranks that observe together: "auto" is all of torch.distributed, if it is in use when training begins; None: each by itself.
        start: the number of the first step: of a resumed run, the optimizer steps that it has taken. Alerts that fired then in `log_dir` go on with
            their `since`. "resume": the step after the last one in `log_dir`. A checkpoint can hold more: `monitor.state_dict()`.
        errors: "raise" lets faults of the monitor through, for developers of torchsat.

    Raises:
        TypeError: the model cannot be watched (not an nn.Module, nn.DataParallel, TorchScript), or there is no option of that name.
        ValueError: an argument is out of its range.
    """
    return Monitor(model, options_of({**options, "log_dir": log_dir}), schedule.CLOCK)


class _Name(str):
    """Shown without quotes: the name of a long default."""

    __slots__ = ()
    __repr__ = str.__str__


def _signature() -> inspect.Signature:
    """What `help(torchsat.watch)` shows: every option with its default, as Options has them."""
    long = {"activations": _Name("torchsat.ACTIVATIONS"), "rules": _Name("torchsat.RULES")}
    given = list(inspect.signature(watch).parameters.values())[:2]
    named = [each for name, each in inspect.signature(Options).parameters.items() if name != "log_dir"]
    named = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY, default=long.get(each.name, each.default)) for each in named]
    return inspect.Signature([*given, *named], return_annotation="Monitor")


watch.__signature__ = _signature()  # type: ignore[attr-defined]


class Monitor:
    """What `watch` returns. A context manager: leaving it closes it.

    Args:
        clock: of the host and the device.
    """

    def __init__(self, model: nn.Module | PipelineStage | Sequence[PipelineStage], options: Options, clock: Clock) -> None:
        stages = stages_of(model)
        modules = {name: unwrap(stage.submod) for name, stage in stages.items()}
        watched = Stages(modules) if modules else unwrap(model)
        self._loop = loop = Loop(watched, stages, options, clock)
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
    def overhead(self) -> float | None:
        """The measured share of training time that observing took lately, from step `every` on; None before it is known."""
        return self._loop.observer.schedule.overhead

    @property
    def coverage(self) -> Coverage:
        """What is seen and what is not, as of the last observation."""
        return self._loop.observer.delivery.coverage

    def step(self) -> None:
        """End a step by hand, in a loop without a torch optimizer. From then on optimizers are no longer listened to.

        Update ratios are not known in such a loop, and a GradScaler's factor is not taken out.
        """
        if not self._loop.is_closed:
            self._loop.end_step()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint should hold, in plain types: the number of steps taken, and what rules and diagnosis remember."""
        loop, observer = self._loop, self._loop.observer
        observer.drain(loop.step)
        return {"step": loop.step, "interval": observer.schedule.interval, "turn": observer.turn, **observer.delivery.history()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another monitor was when it gave its `state_dict`; to be called before training goes on.

        Raises:
            ValueError: it is no such state.
        """
        missing = {"step", "interval", "turn", "stuck", "judge", "diagnosis"} - set(state)
        if missing:
            raise ValueError(f"the state lacks {', '.join(sorted(missing))}; allowed is what monitor.state_dict() gave")
        try:
            step, turn, interval = (int(state[name]) for name in ("step", "turn", "interval"))
            self._loop.observer.delivery.take_up(state)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"the state cannot be understood ({type(error).__name__}: {error}); allowed is what monitor.state_dict() gave"
            ) from error
        self._loop.resume(step, turn, interval)

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
        """A copy of a model that holds its monitor holds none."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def __repr__(self) -> str:
        state = "closed" if self._loop.is_closed else f"step {self._loop.step}"
        return f"<torchsat.Monitor: {len(self._loop.observer.sites.ran)} sites, {len(self.alerts)} alerts, {state}>"


def _trust_kernels(model: nn.Module) -> None:
    """Before training, since it waits for the devices; on one that a model moves to later, plain torch measures."""
    for device in {parameter.device for parameter in model.parameters() if parameter.is_cuda}:
        why_not = trust_kernels(device)
        if why_not is not None:
            log.warning("torchsat: its kernels are not used on %s, where plain torch measures samples: %s", device, why_not)
