"""How a model that torch.compile has compiled is observed.

Hooks that are added after a model was compiled never run, or worse, are compiled into it. So an observed step runs eager: the stance "force_eager" of
torch's compiler holds from the start of an observation until the model is entered, which is when torch has decided between graph and eager. The
stance belongs to the whole process, hence so short. What is compiled inside the model stays compiled, unless it is a submodule and hides sites.

With `compiled="in_graph"` the measurement itself is compiled into the graph (observe/ingraph.py). A model with flex_attention is never run eager:
there the attention would build the matrices of T x T that it exists to avoid.

    from \\ event   entered, not compiled   entered, compiled   a step without a pass   graph silent twice
    UNKNOWN        EAGER                   COMPILED            COMPILED                -
    EAGER          EAGER                   COMPILED            COMPILED                -
    COMPILED       EAGER                   COMPILED            COMPILED                -
    REFUSED        EAGER                   REFUSED             REFUSED                 -
    IN_GRAPH       IN_GRAPH                IN_GRAPH            IN_GRAPH                COMPILED, without the graph's hooks

Where hooks are in the graph, the first three rows lead to IN_GRAPH instead. Where the model uses flex_attention, they lead to REFUSED instead of
COMPILED.
"""

from __future__ import annotations

import inspect
import logging
import types
from enum import Enum
from typing import Any

from torch import nn

from torchsat import compile_settings, internals
from torchsat.observe.ingraph import GraphHooks, why_not_in_graph
from torchsat.observe.observation import Execution, Retry
from torchsat.sites import Sites
from torchsat.structure import Found

log = logging.getLogger("torchsat")

REFUSED = "compiled, with flex_attention: it is not run eager, where the attention would take T x T memory"
_SILENT = 2
"""Observations in a row in which the compiled graph may tell nothing."""
_MISSES = 3
"""Observations in a row without a training pass before that is said, and no further step is observed for that reason."""


class Mode(Enum):
    """How the model runs, and so how it is observed; see the table above."""

    UNKNOWN = "unknown"
    """It has not been entered in an observation yet."""
    EAGER = "eager"
    """It is not compiled: hooks are enough."""
    COMPILED = "compiled"
    """It is called from compiled code, or was not seen where it should have been: observed steps are forced to run eager."""
    IN_GRAPH = "in_graph"
    """Its compiled graph measures."""
    REFUSED = "refused"
    """It is called from compiled code and uses flex_attention: it is not run eager, and so not seen."""


class Compilation:
    """How one model is observed where it may be compiled.

    Args:
        key: under which the settings of the compiler are asked for.
    """

    def __init__(self, key: object) -> None:
        self._key = key
        self.mode = Mode.UNKNOWN
        self.graph_hooks: GraphHooks | None = None
        """The hooks that are compiled with the model; None where the user has not asked for them, or they told nothing."""
        self._missed = 0
        """Observations in a row in eager execution without a training pass."""
        self._silent = 0
        """Observations in a row in which the graph told nothing."""
        self._uses_flex: bool | None = None
        """Whether the model uses flex_attention; None: it has not been looked for yet."""

    @property
    def hides_model(self) -> bool:
        """Whether the model is known not to be seen because it is not run eager."""
        return self.mode is Mode.REFUSED and self._missed > 0

    def use_graph(self, model: nn.Module) -> None:
        """Get ready to measure inside the compiled graph, or say why that is not possible."""
        reason = why_not_in_graph()
        if reason is not None:
            log.warning('torchsat: compiled="in_graph" is not possible, observed steps run eager: %s.', reason)
            return
        compile_settings.heed_hooks(self._key)
        internals.forget_graphs(model)
        self.graph_hooks = GraphHooks()

    def take_off(self) -> None:
        """Take the hooks off that are compiled with the model."""
        if self.graph_hooks is not None:
            self.graph_hooks.take_off()
            self.graph_hooks = None
            compile_settings.ignore_hooks(self._key)

    def prepare(self, found: Found, sites: Sites) -> Execution:
        """An observation is about to open: hook the graph, and decide where it is made."""
        if self.graph_hooks is None:
            return Execution.EAGER
        self.graph_hooks.put_on(found)
        # What feeds what is seen in eager execution; a model that cannot run eager does without. While another monitor makes all run eager, so it is.
        if self.mode is not Mode.UNKNOWN and not compile_settings.forces_eager() and (self._uses_flex or sites.knows(found)):
            return Execution.GRAPH
        return Execution.EAGER

    def opened(self, model: nn.Module, is_first: bool) -> None:
        """An observation in eager execution has opened.

        Args:
            is_first: nobody knows yet whether the model will be compiled, and it is expected to be entered next.
        """
        # A model that was never entered is idle, and left alone.
        if self.mode in (Mode.COMPILED, Mode.IN_GRAPH, Mode.REFUSED) or (self.mode is Mode.UNKNOWN and is_first):
            self.force_eager(model)

    def entered(self, model: nn.Module, training: bool) -> None:
        """The model is entered: torch has decided between graph and eager, so the stance has done its work."""
        if internals.inside_compiled_code():
            self._becomes_compiled(model)
        else:
            self._becomes(Mode.EAGER)
        compile_settings.release(self._key)
        if training and any(internals.is_compiled(module) for module in model.modules()):
            self.force_eager(model)

    def left(self, model: nn.Module, training: bool, observes: bool) -> None:
        """The model is left.

        Args:
            observes: the observation is still open.
        """
        compile_settings.release(self._key)
        if self.mode not in (Mode.COMPILED, Mode.IN_GRAPH, Mode.REFUSED):
            return
        # A validation runs its graph, even if that means to miss this observation; the next one then holds on.
        if (training or self._missed) and observes:
            self.force_eager(model)
        else:
            compile_settings.linger()

    def force_eager(self, model: nn.Module) -> None:
        """Run the model eager, unless it uses flex_attention."""
        if not self._finds_flex(model):
            compile_settings.force_eager(self._key)

    def saw_pass(self) -> None:
        """An observation has seen a training pass."""
        self._missed = self._silent = 0

    def missed_pass(self, model: nn.Module | None, speaks: bool) -> Retry | None:
        """An observation has seen no training pass, which must not be a silent gap; why to observe the next step, if that may help.

        Args:
            speaks: whether this rank is the one that logs.
        """
        if self.mode is Mode.IN_GRAPH:
            self._silent += 1
            if self._silent == _SILENT and model is not None:
                self._fall_back(model)
            return Retry.SILENT_GRAPH
        self._missed += 1
        if self._missed == _MISSES and model is not None and speaks:
            log.warning("torchsat: three steps were to be observed, but no training pass of %s was seen: %s.", type(model).__name__, self._why(model))
        if model is not None:
            self._becomes_compiled(model)
        return Retry.NO_PASS if self._missed < _MISSES else None

    def _becomes(self, mode: Mode) -> None:
        self.mode = Mode.IN_GRAPH if self.graph_hooks is not None else mode

    def _becomes_compiled(self, model: nn.Module) -> None:
        self._becomes(Mode.REFUSED if self._finds_flex(model) else Mode.COMPILED)

    def _fall_back(self, model: nn.Module) -> None:
        """The graph tells nothing: observe in eager execution."""
        self.take_off()
        self._silent = 0
        self._becomes_compiled(model)
        log.warning(
            'torchsat: no compiled graph of %s was heard: it was compiled before torchsat.watch(compiled="in_graph"), or it does not run '
            "compiled. Observed steps run eager.",
            type(model).__name__,
        )

    def _why(self, model: nn.Module) -> str:
        """Why no training pass was seen, as far as one can tell."""
        if self._finds_flex(model):
            return "it uses flex_attention and runs compiled; torchsat does not run it eager, where the attention would take T x T memory"
        if not any(module.training for module in model.modules()):
            return "it is in evaluation mode; call model.train() for training"
        return "its activations did not run, or only without gradients, or in a compiled function torchsat did not find"

    def _finds_flex(self, model: nn.Module) -> bool:
        if self._uses_flex is None:
            self._uses_flex = uses_flex_attention(model)
        return self._uses_flex


def uses_flex_attention(model: nn.Module) -> bool:
    """Whether a method of a module of this model, or a function that it calls by name, is flex_attention, as it is or compiled."""
    met: set[int] = set()

    def is_flex(value: Any, depth: int) -> bool:
        value = internals.uncompiled(value)
        if getattr(value, "__module__", None) == "torch.nn.attention.flex_attention":
            return getattr(value, "__name__", "") == "flex_attention"
        if not inspect.isfunction(value) or id(value) in met or (value.__module__ or "").split(".")[0] == "torch":
            return False
        met.add(id(value))
        if _names_flex(value.__code__):
            return True
        cells = [cell.cell_contents for cell in value.__closure__ or () if cell != _EMPTY_CELL]
        named = [value.__globals__.get(name) for name in value.__code__.co_names]
        return depth > 0 and any(is_flex(each, depth - 1) for each in (*cells, *named))

    kinds = {kind for module in model.modules() for kind in type(module).__mro__ if kind.__module__.split(".")[0] != "torch"}
    configured = any(getattr(getattr(module, "config", None), "_attn_implementation", None) == "flex_attention" for module in model.modules())
    attributes = [value for module in model.modules() for value in vars(module).values() if callable(value)]
    return configured or any(is_flex(value, 3) for value in (*attributes, *(value for kind in kinds for value in vars(kind).values())))


def _names_flex(code: types.CodeType) -> bool:
    """Whether a piece of code, or one inside it, speaks of flex_attention as an attribute or imports it."""
    return "flex_attention" in code.co_names or any(isinstance(inner, types.CodeType) and _names_flex(inner) for inner in code.co_consts)


_EMPTY_CELL = types.CellType()
