"""Each function of internals.py and internals_distributed.py answers what its docstring says, and no other file uses private names of torch."""

import ast
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import torchsat
from tests.models import Double
from torchsat import internals, internals_distributed
from torchsat.internals import Accumulation

PACKAGE = Path(torchsat.__file__).parent


def test_what_decides_what_a_graph_keeps() -> None:
    assert not internals.graph_keeps_less()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        assert internals.graph_keeps_less()
    assert not internals.graph_keeps_less()


def private_names(source: str) -> list[str]:
    """The private names of torch in a file, and the walks over the stack, each with its line.

    A name is private if a part of it begins with a single underscore. What cannot be seen in this way are private attributes of values of which only
    the running program knows that they are torch's, such as `tensor._base`, and names given as strings.
    """
    tree = ast.parse(source)
    imported = {"torch", "dist", "nn"}
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [each for each in node.names if each.name.split(".")[0] == "torch"]
            imported |= {each.asname for each in names if each.asname}
            found += [(node.lineno, each.name) for each in names if is_private(each.name)]
        elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "torch":
            imported |= {each.asname or each.name for each in node.names}
            found += [(node.lineno, f"{node.module}.{each.name}") for each in node.names if is_private(f"{node.module}.{each.name}")]
    parents = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and id(node) not in parents:
            head, *rest = dotted(node)
            if [head, *rest[:1]] == ["sys", "_getframe"] or (head in imported and is_private(".".join(rest))):
                found.append((node.lineno, ".".join([head, *rest])))
    return [f"line {line}: {name}" for line, name in sorted(found)]


def dotted(node: ast.expr) -> list[str]:
    """The parts of a dotted name, such as torch.nn.Module. What is no name at its beginning, such as a call, has the part ""."""
    if isinstance(node, ast.Attribute):
        return [*dotted(node.value), node.attr]
    return [node.id if isinstance(node, ast.Name) else ""]


def is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def test_only_internals_uses_private_names() -> None:
    found = {path.relative_to(PACKAGE).as_posix(): private_names(path.read_text()) for path in PACKAGE.rglob("*.py")}
    assert found.pop("internals.py")
    assert found.pop("internals_distributed.py")
    assert {name: names for name, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import torch._dynamo",
        "import torch._dynamo.config as settings",
        "from torch._C import Graph",
        "from torch.overrides import _pop_mode",
        "torch.autograd.graph._current",
        "nn.Module._call_impl.__code__",
        "dist.distributed_c10d._get_default_store()",
        "from torch import Tensor\nTensor._make_subclass",
        "import torch.nn.functional as F\nF._canonical_mask(x)",
        "torch._C._current_graph_task_id().bit_length()",
        "import sys\nsys._getframe(1)",
    ],
)
def test_a_private_name_is_found(source: str) -> None:
    assert private_names(source)


@pytest.mark.parametrize(
    "source", ["nn.Module.__call__", "torch.nn.functional.relu", "self._model", "mine._x", "torch.tanh(self._x).mean()", "sys.path"]
)
def test_a_public_name_is_not_found(source: str) -> None:
    assert private_names(f"import torch\nfrom torch import nn\n{source}") == []


def outer(ask: Callable[[], Any]) -> Any:
    return ask()


def test_frames_start_above_the_function_that_asks() -> None:
    def ask() -> list[str]:
        found = []
        for frame in internals.frames():
            found.append(frame.f_code.co_name)
        return found

    assert outer(ask)[:2] == ["outer", "test_frames_start_above_the_function_that_asks"]


def test_the_caller_of_a_hook() -> None:
    class Library:
        def call(self, hook: Callable[[], object | None]) -> object | None:
            return hook()

    library = Library()

    def hook() -> object | None:
        return internals.caller_of_hook()

    assert library.call(hook) is library
    assert outer(hook) is None


def test_inside_compiled_code() -> None:
    answers = []

    def ask(x: Tensor) -> Tensor:
        answers.append(internals.inside_compiled_code())
        return x

    ask(torch.ones(1))
    # A function that is excluded from compilation runs as it is, called by the compiled one.
    excluded = torch.compiler.disable(ask)
    torch.compile(lambda x: excluded(x + 1) * 2, backend="eager")(torch.ones(1))
    torch.compiler.reset()
    assert answers == [False, True]


class Outer(torch.optim.SGD):
    """An optimizer that steps another one inside its own step, and asks before that."""

    inner: torch.optim.Optimizer
    ask: Callable[[], None]

    def step(self, closure: Any = None) -> Any:
        self.ask()
        self.inner.step()
        return super().step(closure)


def test_steps_on_the_stack() -> None:
    weights = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    outer_one, inner_one = Outer([weights[0]], lr=0.1), torch.optim.SGD([weights[1]], lr=0.1)
    found: list[list[torch.optim.Optimizer]] = []
    outer_one.inner, outer_one.ask = inner_one, lambda: found.append(internals.steps_on_stack())
    inner_one.register_step_pre_hook(lambda *_: found.append(internals.steps_on_stack()))
    outer_one.step()
    assert found == [[outer_one], [outer_one, inner_one]]
    assert internals.steps_on_stack() == []


def test_the_scale_of_a_grad_scaler() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    found = []
    optimizer.register_step_pre_hook(lambda *_: found.append(internals.gradient_scale(optimizer)))
    for enabled in (True, False):
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=enabled)
        scaler.scale(weight.sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    optimizer.step()
    (scale, overflow), disabled, without = found
    assert scale is not None
    assert scale.item() == 64.0
    assert overflow is None
    assert disabled == without == (None, None)


def test_the_overflow_that_an_optimizer_acts_on_itself() -> None:
    weight = nn.Parameter(torch.ones(3))
    # A fused optimizer is handed the scale and the flag of an overflow, and skips the step itself.
    optimizer = torch.optim.SGD([weight], lr=0.1, fused=True)
    found = []
    optimizer.register_step_pre_hook(lambda *_: found.append(internals.gradient_scale(optimizer)))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale((weight * torch.tensor([1.0, 1.0, float("inf")])).sum()).backward()
    scaler.step(optimizer)
    ((scale, overflow),) = found
    assert scale is not None
    assert overflow is not None
    assert (scale.item(), overflow.item()) == (2.0, 1.0)


def test_a_module_that_calls_itself_runs_twice() -> None:
    answers = []

    class Nested(nn.Module):
        def forward(self, x: Tensor, depth: int) -> Tensor:
            answers.append(internals.runs_twice(self))
            return self(x, depth - 1) if depth else x

    Nested()(torch.ones(1), 1)
    assert answers == [False, True]


@pytest.mark.parametrize(("name", "expected"), [("_shape_inference", True), ("forward_one_chunk", False)])
def test_a_pipeline_that_learns_its_shapes_rehearses(name: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module of pipelines takes seconds to import, so an empty one of its name stands for it."""
    monkeypatch.setitem(sys.modules, internals_distributed.PIPELINES, ModuleType(internals_distributed.PIPELINES))
    namespace: dict[str, Any] = {"__name__": internals_distributed.PIPELINES}
    exec(f"def {name}(ask): return ask()", namespace)
    assert namespace[name](internals_distributed.rehearses) is expected
    assert not internals_distributed.rehearses()


def test_nothing_is_a_stage_before_pipelines_are_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, internals_distributed.PIPELINES, raising=False)
    assert not internals_distributed.is_stage(nn.Linear(1, 1))
    assert not internals_distributed.rehearses()


def test_nodes_are_numbered_in_the_order_in_which_they_are_made() -> None:
    x = torch.ones(1, requires_grad=True)
    before = (x * 2).grad_fn
    began = internals.next_node_number()
    with torch.no_grad():
        torch.tanh(x)
    made = [torch.tanh(x).grad_fn, Double.apply(x).grad_fn]  # type: ignore[no-untyped-call]
    assert before is not None
    assert [internals.node_number(node) - began for node in (before, *made)] == [-1, 0, 1]
    assert internals.node_number(made[0].next_functions[0][0]) > internals.node_number(made[1])


def test_the_node_of_the_hooks_of_a_module() -> None:
    module = nn.Tanh()
    module.register_full_backward_hook(lambda module, grad_input, grad_output: None)
    entered: list[Any] = []
    module.register_forward_hook(lambda module, args, output: entered.append(output.grad_fn.next_functions[0][0]))
    module(torch.ones(1, requires_grad=True) * 2)
    assert entered[0].name() == internals.MODULE_HOOK


def in_backward_of(value: Tensor, ask: Callable[[], object], run: Callable[[Tensor], object] = Tensor.backward) -> list[Any]:
    """What is answered in a hook of the gradient of this value."""
    answers: list[Any] = []
    value.register_hook(lambda _: answers.append(ask()))
    run(value.sum())
    return answers


def test_the_number_of_a_backward() -> None:
    weight = torch.ones(2, requires_grad=True)
    numbers = [*in_backward_of(weight * 2, internals.backward_number), *in_backward_of(weight * 2, internals.backward_number)]
    assert all(isinstance(number, int) for number in numbers)
    assert len(set(numbers)) == 2
    assert internals.backward_number() is None
    assert in_backward_of(weight * 2, internals.in_backward) == [True]
    assert not internals.in_backward()


def test_what_a_backward_does_with_the_gradients_of_parameters() -> None:
    weight, other = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)

    def ask() -> tuple[Accumulation, Accumulation, Accumulation]:
        return internals.accumulation([weight]), internals.accumulation([other]), internals.accumulation([other, weight])

    adds, gives, neither = Accumulation
    assert in_backward_of(weight * 2, ask) == [(adds, neither, adds)]
    assert in_backward_of(weight * 2, ask, lambda loss: torch.autograd.grad(loss, weight)) == [(gives, neither, gives)]
    x = torch.ones(2, requires_grad=True)
    assert in_backward_of(weight * x, ask, lambda loss: torch.autograd.grad(loss, x)) == [(neither, neither, neither)]
    assert in_backward_of(weight * x, ask, lambda loss: loss.backward(inputs=[x])) == [(neither, neither, neither)]


def test_a_function_is_called_after_what_was_queued_during_a_backward() -> None:
    weight, order = torch.ones(2, requires_grad=True), list[tuple[str, bool]]()

    def note(name: str) -> None:
        order.append((name, weight.grad is not None))

    def begin() -> None:
        note("begins")
        internals.after_backward(lambda: note("over"))

    weight.register_hook(lambda grad: torch.autograd.Variable._execution_engine.queue_callback(lambda: note("queued")))
    in_backward_of(weight * 2, begin)
    assert order == [("begins", False), ("queued", True), ("over", True)]


def test_the_version_and_the_stored_elements_of_a_tensor() -> None:
    x = torch.zeros(3)
    before = internals.version(x)
    x.add_(1)
    assert internals.version(x) > before
    assert internals.stored(x) is x
    assert internals.stored(torch.eye(3)[:2].to_sparse()).tolist() == [1.0, 1.0]


def test_the_class_of_a_node() -> None:
    x = torch.ones(1, requires_grad=True)
    mine, plain = Double.apply(x).grad_fn, (2 * x).grad_fn  # type: ignore[no-untyped-call]
    assert isinstance(mine, Node)
    assert isinstance(plain, Node)
    assert internals.forward_class(mine) is Double
    assert internals.forward_class(plain) is None


def test_the_base_of_a_view() -> None:
    x = torch.ones(2, 3)
    assert internals.base_of(x.view(6)) is x
    assert internals.base_of(x) is None


def test_is_traced() -> None:
    answers = []

    def ask(x: Tensor) -> Tensor:
        answers.append(internals.is_traced())
        return x

    ask(torch.ones(1))
    torch.jit.trace(ask, torch.ones(1), check_trace=False)
    assert answers == [False, True]


class Seen(TorchFunctionMode):
    """Keeps the names of the functions of torch that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


class Dispatched(TorchDispatchMode):
    """Counts the operators that are run."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_function_modes_do_not_see_hidden_calls() -> None:
    x = torch.ones(1)
    with Seen() as seen:
        torch.exp(x)
        with internals.without_function_modes():
            torch.sin(x)
        torch.cos(x)
    assert seen.names == ["exp", "cos"]


def test_gradients_are_switched_off_and_on() -> None:
    internals.set_grad_enabled(False)
    off = torch.is_grad_enabled()
    internals.set_grad_enabled(True)
    assert not off
    assert torch.is_grad_enabled()


def test_dispatch_modes_do_not_see_hidden_operators() -> None:
    x = torch.ones(1)
    assert not internals.open_dispatch_modes()
    with Dispatched() as seen:  # type: ignore[no-untyped-call]
        assert internals.open_dispatch_modes()
        torch.exp(x)
        with internals.without_dispatch_modes():
            assert not internals.open_dispatch_modes()
            torch.sin(x)
        torch.cos(x)
    assert seen.count == 2


def test_a_function_mode_is_closed_from_under_two_others() -> None:
    lowest, middle, top = Seen(), Seen(), Seen()
    lowest.__enter__()  # type: ignore[no-untyped-call]
    with middle, top:
        assert internals.function_modes() == [lowest, middle, top]
        internals.close_function_mode(lowest)
        assert internals.function_modes() == [middle, top]
        torch.exp(torch.ones(1))
    assert internals.function_modes() == []
    assert "exp" in middle.names
    assert "exp" in top.names
    assert "exp" not in lowest.names


def test_which_tensors_are_real() -> None:
    from torch._subclasses import FakeTensorMode

    answers = []

    def ask(x: Tensor) -> Tensor:
        answers.append(internals.is_real(x))
        return x

    assert internals.is_real(torch.ones(1))
    assert not internals.is_real(torch.ones(1, device="meta"))
    with FakeTensorMode():
        assert not internals.is_real(torch.ones(1))
    torch.func.vmap(ask)(torch.ones(3))
    assert answers == [False]


def test_compiled_modules() -> None:
    plain, in_place, own_forward = nn.Tanh(), nn.Tanh(), nn.Tanh()
    wrapped = torch.compile(plain, backend="eager")
    in_place.compile(backend="eager")
    assert isinstance(wrapped, nn.Module)
    own_forward.forward = torch.compile(own_forward.forward, backend="eager")  # type: ignore[method-assign]
    assert [internals.is_compiled(module) for module in (plain, wrapped, in_place, own_forward)] == [False, True, True, True]
    assert [internals.compiled_inside(module) for module in (plain, wrapped, in_place)] == [None, plain, None]


def test_what_was_compiled() -> None:
    def double(x: Tensor) -> Tensor:
        return 2 * x

    compiled = torch.compile(double, backend="eager")
    module = nn.Tanh()
    assert internals.uncompiled(compiled) is double
    assert internals.uncompiled(double) is double
    assert internals.uncompiled(module.forward) is nn.Tanh.forward
    assert internals.uncompiled(3) == 3


def test_graphs_are_forgotten() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    class Other(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 3 * x

    count = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        nonlocal count
        count += 1
        return graph.forward

    net, other = Net(), Other()
    compiled, also = (torch.compile(module, backend=backend) for module in (net, other))

    def run() -> int:
        compiled(torch.ones(1))
        also(torch.ones(1))
        return count

    try:
        assert [run(), run()] == [2, 2]
        internals.forget_graphs(net)
        assert run() == 3
    finally:
        torch.compiler.reset()


def test_the_guards_on_hooks() -> None:
    if not internals.can_guard_hooks():
        pytest.skip("this torch has no setting for guards on hooks")
    before = internals.skips_hook_guards()
    try:
        assert internals.skips_hook_guards(not before) is not before
        assert internals.skips_hook_guards() is not before
    finally:
        assert internals.skips_hook_guards(before) is before


def test_the_stance() -> None:
    before = internals.stance()
    with torch.compiler.set_stance("force_eager"):
        ours = internals.stance()
        assert ours is not before
        assert internals.stance() is ours
    assert internals.stance() is before


def test_an_ordered_effect_can_be_declared() -> None:
    declare = internals.ordered_effect()
    assert declare is None or callable(declare)


def test_nothing_is_distributed_here() -> None:
    model = nn.Linear(1, 1)
    assert internals_distributed.wrapped_by_data_parallel() is None
    assert not internals_distributed.is_flattened(model)
    assert internals_distributed.finished(model.weight) is model.weight


def test_a_twin_shares_neither_parameters_nor_buffers_nor_children() -> None:
    child = nn.PReLU()
    child.register_buffer("count", torch.zeros(1))
    module = nn.Sequential(child)
    module.note = [1]  # type: ignore[assignment]
    twin = internals.twin(module)
    assert twin.note is module.note
    assert twin(torch.ones(2, 1, dtype=torch.float64)).dtype == torch.float64
    assert [parameter.requires_grad for parameter in twin.parameters()] == [False]
    assert [value.dtype for value in twin.state_dict().values()] == [torch.float64, torch.float32]
    assert not {value.data_ptr() for value in twin.state_dict().values()} & {value.data_ptr() for value in module.state_dict().values()}
    assert module[0] is child
    assert child.weight.dtype == torch.float32


def test_convolutions_and_trees() -> None:
    assert issubclass(nn.Conv2d, internals.Convolution)
    assert issubclass(nn.LazyConv1d, internals.Convolution)
    assert issubclass(nn.ConvTranspose3d, internals.TransposedConvolution)
    assert not issubclass(nn.Conv2d, internals.TransposedConvolution)
    values = {"a": (1, [2, 3])}
    assert internals.tree_leaves(values) == [1, 2, 3]
    assert internals.tree_map(lambda value: value + 1, values) == {"a": (2, [3, 4])}
