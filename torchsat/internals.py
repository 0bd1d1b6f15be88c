"""The private names of torch that torchsat uses, and every walk over the Python stack, each with its reason.

A private name can change with any release of torch. They all stand here, behind functions whose names say what they answer, so that a new release
breaks this file and no other; those that concern training on several ranks stand in the second part of it, internals_distributed.py. Each docstring
says why no public name serves and which public name to use once there is one. `./dev matrix` runs the tests on the oldest and on the newest torch; it
is the check of both files.

Some questions have no answer in torch at all, private or public: which optimizer is stepping, which GradScaler called it, whether a function made by
torch.compile is running. They are answered from the frames of the stack, by `frames` and the functions after it.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from types import CodeType, FrameType
from typing import Any, cast

import torch
import torch._dynamo.config
from torch import Tensor, nn
from torch._dynamo import eval_frame, external_utils
from torch._subclasses import FakeTensor
from torch.autograd.graph import Node
from torch.nn.modules.conv import _ConvNd as Convolution
from torch.nn.modules.conv import _ConvTransposeNd as TransposedConvolution
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.overrides import __file__ as _overrides_file
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["Convolution", "TransposedConvolution", "tree_leaves", "tree_map"]
"""Names that are passed on as they are.

Convolution, TransposedConvolution: the base classes of all convolutions, lazy ones included. The public classes would have to be listed one by one.
tree_leaves, tree_map: the tensors in nested tuples, lists and dicts. There is no public module for this; `torch.utils.pytree` is announced.
"""

WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""What torch.compile, checkpoint_wrapper and FSDP1 call the module that they wrap. The names stand in paths of modules; no public name gives them."""

CLAMP_PASSES_ITS_BOUNDS = torch.torch_version.TorchVersion(torch.__version__) < "2.15"
"""Whether the derivative of torch.clamp is 1 where its input is exactly a bound. From torch 2.15 on it is 0 there, as that of a ReLU is at 0."""


def frames(skip: int = 1) -> Iterator[FrameType]:
    """The frames of the Python stack, innermost first, without the innermost `skip` ones and this function's own."""
    frame: FrameType | None = sys._getframe(1)
    for _ in range(skip):
        frame = frame.f_back if frame is not None else None
    while frame is not None:
        yield frame
        frame = frame.f_back


def caller_of_hook() -> object | None:
    """The `self` of the method that called the function which calls this one. None where that is no method.

    For libraries that call a callback without saying who they are.
    """
    return cast("object | None", sys._getframe(2).f_locals.get("self"))


def inside_compiled_code() -> bool:
    """Whether a function made by torch.compile is on the stack.

    torch.compiler.is_compiling answers only while torch traces. The wrapper of a compiled function is called compile_wrapper, in older versions _fn.
    """
    return any(frame.f_code.co_name in ("compile_wrapper", "_fn") and frame.f_code.co_filename == eval_frame.__file__ for frame in frames())


def steps_on_stack() -> list[Optimizer]:
    """The optimizers whose `step` is running, outermost first. torch wraps every step in a function called `wrapper`."""
    found = [frame.f_locals.get("self") for frame in frames() if frame.f_code.co_name == "wrapper"]
    return [each for each in reversed(found) if isinstance(each, Optimizer)]


def gradient_scale(optimizer: Optimizer) -> tuple[Tensor | None, Tensor | None]:
    """The factor that a GradScaler multiplied the loss with, and the flag of an overflow that the optimizer itself acts on; None where there is none.

    A scaler leaves no trace on model or optimizer before the step, but it is the scaler that calls `step`. `get_scale()` would wait for the device.
    """
    for frame in frames():
        caller = frame.f_locals.get("self") if frame.f_code.co_name in ("step", "_maybe_opt_step") else None
        if isinstance(caller, torch.amp.GradScaler):
            # The scaler changes its own tensor in place, so a copy is returned.
            scale = caller._scale.clone() if caller.is_enabled() and caller._scale is not None else None
            return scale, getattr(optimizer, "found_inf", None)
    return None, None


_CALL: CodeType = nn.Module._call_impl.__code__


def runs_twice(module: nn.Module) -> bool:
    """Whether two calls of this module are on the stack: it calls itself."""
    calls = (frame for frame in frames() if frame.f_code is _CALL and frame.f_locals.get("self") is module)
    return next(calls, None) is not None and next(calls, None) is not None


def caller_without_hooks(frame: FrameType | None) -> FrameType | None:
    """The frame that called this one, without the frame that torch adds to the call of a module that has hooks."""
    frame = None if frame is None else frame.f_back
    return frame.f_back if frame is not None and frame.f_code in _CALL.co_consts else frame


def called_module(frame: FrameType) -> nn.Module | None:
    """The module that is called, if this frame is nn.Module's own call of a forward; None for every other frame."""
    return cast("nn.Module", frame.f_locals["self"]) if frame.f_code is _CALL else None


def caller_of_torch(house: str) -> FrameType | None:
    """The innermost frame outside of this folder from which a function of torch was called that a function mode has been given instead.

    A function of torch that is written in Python has begun by then: it has handed itself to `torch.overrides.handle_torch_function`, and so its own
    frame and those of torch.overrides lie between.
    """
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.startswith(house):
        frame = frame.f_back
    if frame is not None and frame.f_code.co_filename == _overrides_file:
        while frame is not None and frame.f_code.co_filename == _overrides_file:
            frame = frame.f_back
        frame = None if frame is None else frame.f_back
    return frame


def is_shallow_copy() -> bool:
    """Whether the function that calls this one was called by `copy.copy`, which asks a module for its parts in the same way as `pickle` does."""
    return sys._getframe(2).f_code is copy.copy.__code__


def modules_of(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of a model whose hooks run. Those inside a scripted module are left out, and so are those that nn.DataParallel copies."""
    met, waiting = set[int](), [model]
    while waiting:
        module = waiting.pop()
        if id(module) in met or runs_no_hooks(module):
            continue
        met.add(id(module))
        yield module
        waiting.extend(child for child in vars(module).get("_modules", {}).values() if isinstance(child, nn.Module))


def runs_no_hooks(module: nn.Module) -> bool:
    """Whether no Python hook runs that is put on a module inside this one: it is scripted, or other modules run in their place."""
    return isinstance(module, torch.jit.ScriptModule) or (isinstance(module, nn.DataParallel) and len(module.device_ids) > 1)


MODULE_HOOK = "BackwardHookFunctionBackward"
"""The name of the node through which torch passes the inputs of a module on that has full backward hooks. It changes no number."""


def next_node_number() -> int:
    """The number of the autograd node that this thread makes next. Nodes are numbered in the order in which they are made.

    No public name tells which nodes a piece of code has made: they are those with this number or a higher one.
    """
    return int(torch._C._autograd._get_sequence_nr())


def node_number(node: Node) -> int:
    """The number of this node; that of a leaf is higher than any other. See next_node_number."""
    return int(node._sequence_nr())


def backward_number() -> int | None:
    """The number of the backward pass that runs on this thread; None outside of one. No public name tells a backward from a forward."""
    number = torch._C._current_graph_task_id()
    return None if number == -1 else number


def in_backward() -> bool:
    """Whether a backward pass runs on this thread."""
    return torch._C._current_graph_task_id() != -1


def objectives() -> list[Node]:
    """Inside a backward pass: the nodes that computed what is differentiated, such as the loss. Empty where that is not known.

    Nothing in torch leads from a node to those that were computed from it. The call of `backward` or `torch.autograd.grad` stands on the stack of the
    thread that made it, and on a GPU the backward runs on another thread, so all are looked at. What other threads differentiate at the same time is
    found too.
    """
    given: list[Any] = []
    for innermost in sys._current_frames().values():
        frame: FrameType | None = innermost
        while frame is not None:
            if frame.f_code in _DIFFERENTIATED:
                given.append(frame.f_locals.get(_DIFFERENTIATED[frame.f_code]))
            frame = frame.f_back
    tensors = [each for one in given for each in (one if isinstance(one, (tuple, list)) else (one,))]
    return [each.grad_fn for each in tensors if isinstance(each, Tensor) and each.grad_fn is not None]


_BEGINS = ((torch.autograd.backward, "tensors"), (torch.autograd.grad, "outputs"))
_DIFFERENTIATED = {function.__code__: name for function, name in _BEGINS if hasattr(function, "__code__")}
"""The functions that begin a backward, and how they call what is differentiated. What another library has put in their place may be no function."""


class Accumulation(Enum):
    """What a backward does with the gradients of a model's parameters."""

    ADDS = "adds"
    """It adds them to `.grad`."""
    GIVES = "gives"
    """torch.autograd.grad returns them."""
    NEITHER = "neither"
    """It computes none of them."""


def accumulation(parameters: Iterable[Tensor]) -> Accumulation:
    """Inside a backward pass: what it does with the gradients of these parameters; what is found first decides.

    torch.autograd.grad runs the same engine as `backward()`; no public name tells the two apart.
    """
    for parameter in parameters:
        with torch.enable_grad():
            node = parameter.view_as(parameter).grad_fn
        leaf = node.next_functions[0][0] if node is not None else None
        try:
            if leaf is not None and torch._C._will_engine_execute_node(leaf):
                return Accumulation.ADDS
        except RuntimeError:
            # It is raised for a leaf whose gradient is returned instead of added.
            return Accumulation.GIVES
    return Accumulation.NEITHER


def after_backward(call: Callable[[], None]) -> None:
    """Inside a backward pass: have a function called when it has ended. It is not called if the backward raises an error.

    Nothing public tells the end of a backward. The function is queued from a function that is queued, so that it comes after what data parallelism
    queues while the backward runs, which sets `.grad`.
    """
    queue = torch.autograd.Variable._execution_engine.queue_callback
    queue(lambda: queue(call))


_BACKWARD: CodeType = torch.autograd.function.BackwardCFunction.apply.__code__


def is_nested_backward() -> bool:
    """Inside a backward pass: whether a backward that is written in Python runs it, as that of a reentrant checkpoint does."""
    return any(frame.f_code is _BACKWARD for frame in frames())


def version(tensor: Tensor) -> int:
    """The number of in-place changes of a tensor so far. `Tensor._version` is documented but private."""
    return tensor._version


def graph_keeps_less() -> bool:
    """Whether hooks decide now what a graph keeps of the tensors that its backward needs, as under a checkpoint or where they are moved to the host.

    No public name tells whether `torch.autograd.graph.saved_tensors_hooks` are in force. A torch without this private name does not tell it at all.
    """
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is not None and top(True) is not None


def stored(tensor: Tensor) -> Tensor:
    """The elements that a tensor stores: of a sparse one those that may differ from zero. The public `values` demands that it is coalesced."""
    return tensor._values() if tensor.is_sparse else tensor


def node_key(node: Node) -> int | tuple[int]:
    """What tells a node of a graph from all others that this thread makes: its number, or the tensor that a leaf stands for, since leaves have no
    number of their own. `Node._sequence_nr` is private; a node itself, as a key, would be kept alive."""
    number: int = node._sequence_nr()
    return number if number < _LEAF else (id(getattr(node, "variable", None)),)


_LEAF = 2**64 - 1
"""The number that torch gives to all leaves."""


def makes_number(node: Node) -> bool:
    """Whether a node has computed a single number, a tensor without axes. No public name tells the shape of what a node has computed."""
    made = getattr(node, "_input_metadata", None)
    return made is not None and len(made) == 1 and tuple(made[0].shape) == ()


def forward_class(node: Node) -> type | None:
    """The user's autograd.Function that made this node, or torch's class of a compiled function; None for every other node."""
    return getattr(node, "_forward_cls", None)


def output_shape(node: Node, output: int) -> tuple[int, ...] | None:
    """The shape of one of the tensors that this node has computed; None where it is not known. Nothing public tells the shapes in a graph."""
    known: Any = getattr(node, "_input_metadata", ())
    return tuple(int(size) for size in known[output].shape) if output < len(known) and not known[output].is_nested_tensor else None


def base_of(tensor: Tensor) -> Tensor | None:
    """The tensor that this one is a view of; None where it is no view. `Tensor._base` is documented but private."""
    return tensor._base


is_tracing: Callable[[], bool] = torch._C._is_tracing
"""Whether torch.jit.trace runs now. torch.jit.is_tracing does the same through two more Python functions, and every hook asks."""


_fx_traces: Callable[[], bool] = getattr(torch.fx._symbolic_trace, "_get_is_fx_tracing", lambda: torch.fx._symbolic_trace._is_fx_tracing_flag)
"""Whether torch.fx traces now; every hook asks. The public function logs a warning. torch 2.15 keeps the answer for each thread, earlier ones in a
global flag."""


_PRETENDING = tuple(getattr(torch._C._TorchDispatchModeKey, name) for name in ("PROXY", "FAKE", "FUNCTIONAL"))


def is_traced() -> bool:
    """Whether torch compiles or traces now, or runs the model only to learn shapes, so that nothing of ours may run.

    torch.jit.is_tracing is slower than `is_tracing` and does the same. Nothing public tells of make_fx and of fake tensors, which are dispatch modes
    of torch's own.
    """
    if torch.compiler.is_compiling() or is_tracing() or _fx_traces():
        return True
    return open_dispatch_modes() > 0 and any(torch._C._get_dispatch_mode(key) is not None for key in _PRETENDING)


def why_unusable() -> str | None:
    """Why hooks cannot work with this torch: a private name is gone that they ask for before anything could catch the error. None where all answer.

    It is asked before any hook is put on, so that a torch which is newer than this file never stops a training.
    """
    try:
        for ask in (is_traced, is_transformed, in_backward, backward_number, next_node_number, open_dispatch_modes):
            ask()
        with without_function_modes(), without_dispatch_modes():
            set_grad_enabled(torch.is_grad_enabled())
        next(frames(), None)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def is_transformed() -> bool:
    """Whether this runs inside a transform of torch.func (grad, vmap, jvp), whose tensors stand for others. There is no public name."""
    return torch._C._functorch.peek_interpreter_stack() is not None


without_function_modes: Callable[[], contextlib.AbstractContextManager[Any, Any]] = torch._C.DisableTorchFunction
"""Hides calls of torch from modes of other monitors and of the user. `torch.overrides` has no public context manager for this."""

set_grad_enabled: Callable[[bool], None] = torch._C._set_grad_enabled
"""torch.set_grad_enabled without the object that it makes, since every hook calls this twice. Function modes see both alike."""

open_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
"""How many TorchDispatchModes are open, which would see what we compute. There is no public name."""


def without_dispatch_modes() -> contextlib.AbstractContextManager[Any]:
    """A context in which the user's TorchDispatchModes are closed, so that they count only what the model does. There is no public name."""
    return _disable_current_modes()


@contextlib.contextmanager
def hidden_from_modes() -> Iterator[None]:
    """A context whose calls of torch neither a TorchFunctionMode nor a TorchDispatchMode of the user's sees: they count and change what the user
    computes, and not what we do."""
    with without_function_modes(), without_dispatch_modes() if open_dispatch_modes() else contextlib.nullcontext():
        yield


def function_modes() -> list[TorchFunctionMode]:
    """The open TorchFunctionModes, outermost first."""
    modes: list[TorchFunctionMode] = _get_current_function_mode_stack()
    return modes


def modes_of_the_users() -> list[TorchFunctionMode]:
    """The open TorchFunctionModes, without the one that `torch.set_default_device` leaves open."""
    context = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
    return [mode for mode in function_modes() if mode is not context]


def compiles() -> bool:
    """Whether torch.compile has been used in this process, so that there may be compiled functions. torch keeps each backend that it was given; under
    None it keeps an entry of its own. Nothing public says it."""
    return any(backend is not None for backend in eval_frame.cached_backends.values())


def close_function_mode(mode: TorchFunctionMode) -> None:
    """Close one open mode wherever it lies in the stack. A mode's own `__exit__` closes the innermost, whichever that is."""
    above: list[TorchFunctionMode] = []
    while (innermost := cast(TorchFunctionMode, _pop_mode())) is not mode:
        above.append(innermost)
    for each in reversed(above):
        _push_mode(each)


def is_real(tensor: Tensor) -> bool:
    """Whether the tensor holds numbers: it is no meta or fake tensor, which has only a shape, and no wrapper inside a transform of torch.func."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor) or torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def stands_for_others(tensor: Tensor) -> bool:
    """Whether the tensor is a wrapper inside a transform of torch.func, which holds no numbers of its own."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def compiled_inside(module: nn.Module) -> nn.Module | None:
    """The module that torch.compile wrapped; None where this is no such wrapper."""
    children = vars(module).get("_modules")
    # The table of a scripted module is no dictionary.
    inner = children.get("_orig_mod") if isinstance(children, dict) else None
    return inner if isinstance(inner, nn.Module) else None


def is_compiled(module: nn.Module) -> bool:
    """Whether this module runs through torch.compile: wrapped by it, compiled in place, or with a compiled `forward` of its own."""
    own_forward = vars(module).get("forward")
    wrapped, in_place = compiled_inside(module) is not None, vars(module).get("_compiled_call_impl") is not None
    return wrapped or in_place or hasattr(own_forward, "_torchdynamo_orig_callable")


def uncompiled(function: Any) -> Any:
    """The function that torch.compile was given, or the function of a method; any other value as it is."""
    return getattr(function, "_torchdynamo_orig_callable", getattr(function, "__func__", function))


def forget_graphs(model: nn.Module) -> None:
    """Drop the compiled graphs of this model's modules, so that they are compiled again. torch.compiler.reset would drop those of every model."""
    # Where forward is torch's own, as in a Sequential, torch compiles a wrapper around the call.
    around = (external_utils.wrap_inline(model.forward), nn.Module._call_impl, nn.Module._wrapped_call_impl)
    for code in {function.__code__ for function in (*around, *(type(each).forward for each in model.modules())) if hasattr(function, "__code__")}:
        eval_frame.remove_from_cache(code)


def can_guard_hooks() -> bool:
    """Whether this torch has a setting that makes it check the hooks of modules before it runs a graph."""
    return hasattr(torch._dynamo.config, "skip_nnmodule_hook_guards")


def skips_hook_guards(skips: bool | None = None) -> bool:
    """Whether torch.compile ignores that a module's hooks have changed. If a value is given, it is set first. There is no public setting."""
    if skips is not None:
        torch._dynamo.config.skip_nnmodule_hook_guards = skips
    return bool(torch._dynamo.config.skip_nnmodule_hook_guards)


def stance() -> object:
    """The stance of torch.compile now: whether compiled functions run compiled or eager. torch.compiler.set_stance sets it; nothing public reads
    it."""
    return eval_frame._stance


def ordered_effect() -> Callable[[Any], Any] | None:
    """A function that forbids the compiler to drop an operator or to move it past another one; None where this torch has no such thing."""
    try:
        from torch._higher_order_ops.effects import _EffectType, _register_effectful_op
    except ImportError:
        return None
    return lambda operator: _register_effectful_op(operator, _EffectType.ORDERED)


def keep_out_of_cuda_graphs(operator: str) -> None:
    """Have the compiler run this operator (`namespace::name`) between the CUDA graphs that it records, if it records any.

    The public way is the tag `torch.Tag.cudagraph_unsafe`. The compiler does not see it on an operator with an ordered effect.
    """
    import torch._inductor.config as config

    known = getattr(config, "custom_should_partition_ops", None)
    if known is not None:
        config.custom_should_partition_ops = [*known, operator]


def twin(module: nn.Module) -> nn.Module:
    """A module with the same attributes, whose parameters are in float64 on the CPU, without gradients.

    It is no deep copy, since an activation may hold a reference to a whole model. torch has no shallow copy of a module: parameters that are set by
    name must be leaves of the type nn.Parameter, and buffers and children would be set in the tables that the copy shares with the original.
    """
    made = object.__new__(type(module))
    vars(made).update(vars(module))
    plain = vars(module)["_parameters"]
    vars(made)["_parameters"] = {name: None if value is None else value.detach().cpu().double() for name, value in plain.items()}
    vars(made)["_buffers"] = {name: None if value is None else value.detach().cpu().clone() for name, value in vars(module)["_buffers"].items()}
    vars(made)["_modules"] = {name: None if child is None else twin(child) for name, child in vars(module)["_modules"].items()}
    return made


def flat_weights(module: nn.RNNBase) -> dict[str, Tensor] | None:
    """The weights and biases that the last forward of a recurrent layer has used, by name; None where it keeps none.

    The layer hands this list to its kernel. Reading the weights by name would compute those again that are computed from others.
    """
    names, weights = (vars(module).get(name) for name in ("_flat_weights_names", "_flat_weights"))
    if names is None or weights is None or len(names) != len(weights) or not all(isinstance(each, Tensor) for each in weights):
        return None
    return dict(zip(names, weights, strict=True))
