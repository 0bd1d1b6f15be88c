"""How a model that torch.compile has compiled is observed.

Hooks that are added after a model was compiled never run or, worse, are compiled into it. So an observed step runs eager. The *stance* of torch's
compiler is a setting of the whole process that says whether compiled functions run compiled or eager. It is set to "force_eager" from the start of an
observation until the model is called, because torch has chosen between graph and eager by then. It is held no longer than that, since it affects
other models too. Functions that are compiled inside the model stay compiled; only compiled submodules, which could hide sites, run eager as well.

With `compiled="in_graph"` the measurement itself is compiled into the graph (observe/ingraph.py). A model with flex_attention is never run eager,
since the attention would then build the T x T matrices that it exists to avoid.

How a model is observed is its `Mode`. It changes when the model is *entered* (its forward begins) during an observation, and when an observation ends
without a training pass or without a report from the compiled graph:

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
from torchsat.attributes import stored_or
from torchsat.observe.ingraph import GraphHooks, why_not_in_graph
from torchsat.observe.observation import Execution, Retry
from torchsat.sites import Sites
from torchsat.structure import Found

log = logging.getLogger("torchsat")

REFUSED = "compiled, with flex_attention: it is not run eager, where the attention would take T x T memory"
_SILENT = 2
"""After this many observations in a row in which the compiled graph reported nothing, the model is observed in eager execution."""
_MISSES = 3
"""After this many observations in a row without a training pass the user is told, and no further step is observed for that reason."""


class Mode(Enum):
    """How the model runs, and so how it is observed; see the table in the module's docstring."""

    UNKNOWN = "unknown"
    """It has not been called in an observation yet."""
    EAGER = "eager"
    """It is not compiled: hooks are enough."""
    COMPILED = "compiled"
    """It is called from compiled code, or was not seen where it should have been: observed steps are forced to run eager."""
    IN_GRAPH = "in_graph"
    """Operators inside its compiled graph measure it."""
    REFUSED = "refused"
    """It is called from compiled code and uses flex_attention: it is not run eager, and so not seen."""


class Compilation:
    """Decides how one model is observed, and sets the compiler accordingly.

    Args:
        key: stands for this monitor where it asks for settings of the compiler (compile_settings.py).
    """

    def __init__(self, key: object) -> None:
        self._key = key
        self.mode = Mode.UNKNOWN
        self.graph_hooks: GraphHooks | None = None
        """The hooks that are compiled with the model; None where the user has not asked for them, or where they reported nothing."""
        self._missed = 0
        """Number of observations in a row in eager execution without a training pass."""
        self._silent = 0
        """Number of observations in a row in which the graph reported nothing."""
        self._uses_flex: bool | None = None
        """Whether the model uses flex_attention; None: it has not been looked for yet."""

    @property
    def hides_model(self) -> bool:
        """Whether the model is known to be unseen because it uses flex_attention and is not run eager."""
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
        """Take the graph hooks off the model."""
        if self.graph_hooks is not None:
            self.graph_hooks.take_off()
            self.graph_hooks = None
            compile_settings.ignore_hooks(self._key)

    def prepare(self, found: Found, sites: Sites) -> Execution:
        """Called before an observation opens: put the graph hooks on, and decide whether it measures in eager execution or in the graph."""
        if self.graph_hooks is None:
            return Execution.EAGER
        self.graph_hooks.put_on(found)
        # Which layers feed which sites can be seen in eager execution only, so the first observations are eager, unless flex_attention forbids that.
        # While another monitor forces eager execution, no graph runs.
        if self.mode is not Mode.UNKNOWN and not compile_settings.forces_eager() and (self._uses_flex or sites.knows(found)):
            return Execution.GRAPH
        return Execution.EAGER

    def opened(self, model: nn.Module, is_first: bool) -> None:
        """Called when an observation in eager execution has opened.

        Args:
            is_first: whether the model is expected to be called next, although it is not known yet whether it is compiled.
        """
        # A model that was never called is idle. Other models need not run eager because of it.
        if self.mode in (Mode.COMPILED, Mode.IN_GRAPH, Mode.REFUSED) or (self.mode is Mode.UNKNOWN and is_first):
            self.force_eager(model)

    def entered(self, model: nn.Module, training: bool) -> None:
        """Called when the model's forward begins. torch has chosen between graph and eager by then, so the stance is no longer needed."""
        if internals.inside_compiled_code():
            self._becomes_compiled(model)
        else:
            self._becomes(Mode.EAGER)
        compile_settings.release(self._key)
        if training and any(internals.is_compiled(module) for module in model.modules()):
            self.force_eager(model)

    def left(self, model: nn.Module, training: bool, observes: bool) -> None:
        """Called when the model's forward ends.

        Args:
            observes: whether the observation is still open.
        """
        compile_settings.release(self._key)
        if self.mode not in (Mode.COMPILED, Mode.IN_GRAPH, Mode.REFUSED):
            return
        # A validation may run its compiled graph, although the observation may then miss its training pass. After one such miss eager stays forced.
        if (training or self._missed) and observes:
            self.force_eager(model)
        else:
            compile_settings.linger()

    def force_eager(self, model: nn.Module) -> None:
        """Make compiled code run eager, unless the model uses flex_attention."""
        if not self._finds_flex(model):
            compile_settings.force_eager(self._key)

    def saw_pass(self) -> None:
        """Note that an observation has seen a training pass."""
        self._missed = self._silent = 0

    def missed_pass(self, model: nn.Module | None, speaks: bool) -> Retry | None:
        """Note that an observation has seen no training pass. If this happens again and again the user is told, so that there is no silent gap.

        Args:
            speaks: whether this rank is the one that logs.

        Returns:
            The reason to observe the next step; None where that would not help.
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
        """Observe in eager execution from now on, since the graph reported nothing."""
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
    """Whether a method or attribute of a module of this model, or a function that one of them calls by name, is flex_attention, compiled or not."""
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
    configured = any(getattr(stored_or(module, "config", None), "_attn_implementation", None) == "flex_attention" for module in model.modules())
    attributes = [value for module in model.modules() for value in vars(module).values() if callable(value)]
    return configured or any(is_flex(value, 3) for value in (*attributes, *(value for kind in kinds for value in vars(kind).values())))


def _names_flex(code: types.CodeType) -> bool:
    """Whether this code object, or one that is nested in it, uses flex_attention as a global name or an attribute, or imports it."""
    return "flex_attention" in code.co_names or any(isinstance(inner, types.CodeType) and _names_flex(inner) for inner in code.co_consts)


_EMPTY_CELL = types.CellType()
