"""The situations of identity.py: models and loops of users in which a monitor could change the training.

A situation is a function that is given `watch`, calls it with its model where a user would call `torchsat.watch`, trains, and returns what the
training left behind. It draws all its numbers from torch's generator, which is seeded before it is called.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from identity_models import Array, Attending, Backwards, Complex, Drop, Hooked, Images, Last, Norm, Own, Recomputing, Stochastic, mlp
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import pack_padded_sequence
from torch.overrides import TorchFunctionMode

Watch = Callable[[nn.Module], None]
Situation = Callable[[Watch], Mapping[str, Any]]


def state(model: nn.Module, **more: Any) -> dict[str, Any]:
    """All parameters, buffers and gradients of a model, and what else a situation has kept."""
    return {
        "state": {name: each.detach().clone() for name, each in model.state_dict().items() if isinstance(each, Tensor)},
        "grads": {name: None if each.grad is None else each.grad.clone() for name, each in model.named_parameters()},
        "attributes": [sorted(vars(each)) for each in model.modules()],
        **more,
    }


def steps(model: nn.Module, batch: Callable[[], Tensor], count: int = 5, optimizer: torch.optim.Optimizer | None = None) -> list[float]:
    """An ordinary training loop. Returns its losses."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = model(batch()).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses


def simple(make: Callable[[], nn.Module], *shape: int) -> Situation:
    """An ordinary loop over a model that is not ordinary."""

    def train(watch: Watch) -> Mapping[str, Any]:
        model = make()
        watch(model)
        losses = steps(model, lambda: torch.randn(*shape))
        return state(model, losses=losses)

    return train


def hooked(leaf: Callable[[], nn.Module]) -> Situation:
    def train(watch: Watch) -> Mapping[str, Any]:
        model = Hooked(leaf)
        optimizer, kept = torch.optim.SGD(model.parameters(), lr=0.1), []
        watch(model)
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.randn(32, 8)).square().mean().backward()
            assert model.hidden.grad is not None
            kept.append(model.hidden.grad.clone())
            for each in model.parameters():
                assert each.grad is not None
                each.grad /= model.hidden.grad.norm()
            optimizer.step()
        del model.hidden
        return state(model, kept=kept, heard=model.heard, runs=getattr(model.leaf, "runs", 0))

    return train


def _parametrized(layer: nn.Module, name: str, how: str) -> nn.Module:
    if how == "spectral_norm":
        return parametrizations.spectral_norm(layer, name)
    if how == "weight_norm":
        normalised: nn.Module = parametrizations.weight_norm(layer, name)
        return normalised
    if how == "old weight_norm":
        return torch.nn.utils.weight_norm(layer, name)
    if how == "old spectral_norm":
        return torch.nn.utils.spectral_norm(layer, name)
    if how == "prune":
        prune.random_unstructured(layer, name, amount=0.3)
        return layer
    parametrize.register_parametrization(layer, name, Drop())
    return layer


def parametrized(make: Callable[[], nn.Module], name: str, how: str) -> Situation:
    def made() -> nn.Module:
        layer = _parametrized(make(), name, how)
        return Last(layer) if isinstance(layer, (nn.RNNBase, nn.RNNCellBase)) else nn.Sequential(layer, nn.Tanh(), nn.Linear(16, 1))

    recurrent = isinstance(make(), (nn.RNNBase, nn.RNNCellBase))
    return simple(made, *((5, 12, 6) if recurrent else (32, 8)))


def packed(watch: Watch) -> Mapping[str, Any]:
    """A recurrent layer on packed sequences with dropout between its layers."""
    model = nn.LSTM(6, 8, 2, dropout=0.4)
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    watch(model)
    for _ in range(4):
        x = pack_padded_sequence(torch.randn(7, 5, 6), torch.tensor([7, 2, 5, 1, 4]), enforce_sorted=False)
        optimizer.zero_grad()
        loss = model(x)[0].data.square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return state(model, losses=losses)


def in_backward(watch: Watch) -> Mapping[str, Any]:
    """An optimizer for each parameter, which steps within the backward."""
    model = mlp()
    optimizers = {each: torch.optim.SGD([each], lr=0.1) for each in model.parameters()}

    def step(parameter: Tensor) -> None:
        optimizers[parameter].step()  # type: ignore[index]
        optimizers[parameter].zero_grad()  # type: ignore[index]

    for each in model.parameters():
        each.register_post_accumulate_grad_hook(step)
    watch(model)
    for _ in range(5):
        model(torch.randn(32, 8)).square().mean().backward()
    return state(model)


def penalised(watch: Watch) -> Mapping[str, Any]:
    """A gradient penalty, whose backward goes through a backward."""
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    watch(model)
    for _ in range(4):
        x = torch.randn(16, 8, requires_grad=True)
        (grad,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        optimizer.zero_grad()
        (model(x).mean() + (grad.norm(dim=1) - 1).square().mean()).backward()
        optimizer.step()
    return state(model)


def maml(watch: Watch) -> Mapping[str, Any]:
    """An inner step by functional_call, and an outer one through it."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    watch(model)
    for _ in range(3):
        weights: dict[str, Tensor] = dict(model.named_parameters())
        loss = torch.func.functional_call(model, weights, (torch.randn(8, 8),)).square().mean()
        grads = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        fast = {name: each - 0.1 * grad for (name, each), grad in zip(weights.items(), grads, strict=True)}
        optimizer.zero_grad()
        torch.func.functional_call(model, fast, (torch.randn(8, 8),)).square().mean().backward()
        optimizer.step()
    return state(model)


def per_sample(watch: Watch) -> Mapping[str, Any]:
    """Gradients of each sample by vmap, summed by hand."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    watch(model)

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(model, weights, (x[None],)).square().mean()
        return out

    for _ in range(3):
        weights = {name: each.detach() for name, each in model.named_parameters()}
        grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, torch.randn(6, 8))
        for name, each in model.named_parameters():
            each.grad = grads[name].mean(0)
        optimizer.step()
    return state(model)


def sharpness(watch: Watch) -> Mapping[str, Any]:
    """Sharpness-aware minimisation: two backwards a step, and weights that move between them."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    watch(model)
    for _ in range(4):
        x = torch.randn(16, 8)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        with torch.no_grad():
            moves = [0.05 * each.grad.sign() for each in model.parameters() if each.grad is not None]
            for each, move in zip(model.parameters(), moves, strict=True):
                each.add_(move)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        with torch.no_grad():
            for each, move in zip(model.parameters(), moves, strict=True):
                each.sub_(move)
        optimizer.step()
    return state(model)


def lbfgs(watch: Watch) -> Mapping[str, Any]:
    model, x = mlp(), torch.randn(32, 8)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=30, line_search_fn="strong_wolfe")
    calls: list[float] = []
    watch(model)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = (model(x) - x[:, :1]).square().mean()
        loss.backward()
        calls.append(float(loss))
        return loss

    for _ in range(3):
        optimizer.step(closure)
    return state(model, calls=calls)


def scaled(watch: Watch) -> Mapping[str, Any]:
    """A GradScaler that overflows at first, under autocast."""
    model = mlp()
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.05), torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=2)
    scales = []
    watch(model)
    for at in range(6):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(torch.randn(16, 8) * (1e30 if at == 1 else 1)).float().square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return state(model, scales=scales)


def private(watch: Watch) -> Mapping[str, Any]:
    """Gradients in a buffer, with noise, as differentially private training has them."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    watch(model)
    for _ in range(3):
        kept = [torch.zeros_like(each) for each in model.parameters()]
        for x in torch.randn(4, 2, 8):
            model(x).square().mean().backward()
            for buffer, each in zip(kept, model.parameters(), strict=True):
                assert each.grad is not None
                buffer += each.grad
                each.grad = None
        for buffer, each in zip(kept, model.parameters(), strict=True):
            each.grad = buffer + 0.01 * torch.randn_like(buffer)
        optimizer.step()
    return state(model)


def saved(watch: Watch) -> Mapping[str, Any]:
    """A model that is saved, loaded and copied within each step, and an average of copies."""
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), Norm(), Own(), nn.Linear(16, 1))
    optimizer, average, keys, files = torch.optim.SGD(model.parameters(), lr=0.05), None, list[Any](), []
    watch(model)
    for _ in range(4):
        loss = model(torch.randn(16, 8)).square().mean()
        loss.backward()
        keys.append(list(model.state_dict()))
        keys.append([sorted(vars(each)) for each in copy.deepcopy(model).modules()])
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        with torch.serialization.safe_globals([nn.Sequential, nn.Linear, nn.Tanh, Norm, Own]):
            loaded = torch.load(file)
        files.append(float(loaded(torch.ones(1, 8))))
        average = copy.deepcopy(model) if average is None else average
        files.append(float(average(torch.ones(1, 8))))
        optimizer.step()
        optimizer.zero_grad()
    return state(model, keys=keys, files=files)


def traced(watch: Watch) -> Mapping[str, Any]:
    """Traces of the model by torch.fx and torch.jit between steps."""
    model, kept = mlp(), []
    watch(model)
    losses = steps(model, lambda: torch.randn(8, 8), 1)
    for _ in range(2):
        kept.append(str(torch.fx.symbolic_trace(model).graph))
        kept.append(torch.jit.trace(model, torch.ones(2, 8)).code)
        losses += steps(model, lambda: torch.randn(8, 8), 1)
    return state(model, losses=losses, kept=kept)


class Counting(TorchFunctionMode):
    """A mode of the user's that counts the functions of torch that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "?")
        self.calls[name] = self.calls.get(name, 0) + 1
        return function(*args, **(kwargs or {}))


def counted(watch: Watch) -> Mapping[str, Any]:
    """A function mode of the user's is open around the training."""
    model = mlp()
    watch(model)
    with Counting() as mode:
        losses = steps(model, lambda: torch.randn(8, 8), 3)
    return state(model, losses=losses, calls=mode.calls)


def moved(watch: Watch) -> Mapping[str, Any]:
    """What autograd saves goes through the user's hooks, as with offloading, and is counted there."""
    model, moves = nn.Sequential(nn.Linear(8, 16), nn.GELU(), Own(), Norm(), nn.Linear(16, 1)), list[tuple[int, ...] | str]()

    def away(x: Tensor) -> Tensor:
        moves.append(tuple(x.shape))
        return x

    def back(x: Tensor) -> Tensor:
        moves.append("back")
        return x

    watch(model)
    with torch.autograd.graph.saved_tensors_hooks(away, back):
        losses = steps(model, lambda: torch.randn(8, 8), 3)
    return state(model, losses=losses, moves=moves)


def anomalous(watch: Watch) -> Mapping[str, Any]:
    model = mlp()
    watch(model)
    with torch.autograd.detect_anomaly(check_nan=True):
        losses = steps(model, lambda: torch.randn(8, 8), 3)
    return state(model, losses=losses)


def backwards(watch: Watch) -> Mapping[str, Any]:
    model = Backwards()
    watch(model)
    losses = steps(model, lambda: torch.randn(8, 8))
    return state(model, losses=losses, heard=model.heard)


def subclassed(watch: Watch) -> Mapping[str, Any]:
    model = mlp(nn.ReLU)
    watch(model)
    losses = steps(model, lambda: torch.randn(8, 8).as_subclass(Array))
    return state(model, losses=losses)


def adversaries(watch: Watch) -> Mapping[str, Any]:
    """Two networks against each other, the watched one frozen in the step of the other."""
    d, g = mlp(nn.LeakyReLU), nn.Linear(4, 8)
    od, og = torch.optim.Adam(d.parameters()), torch.optim.Adam(g.parameters())
    watch(d)
    for _ in range(4):
        fake = g(torch.randn(16, 4))
        d.requires_grad_(True)
        od.zero_grad()
        (F.softplus(-d(torch.randn(16, 8))).mean() + F.softplus(d(fake.detach())).mean()).backward()
        od.step()
        d.requires_grad_(False)
        og.zero_grad()
        F.softplus(-d(fake)).mean().backward()
        og.step()
    return {**state(d), "generator": state(g)}


def quantised(watch: Watch) -> Mapping[str, Any]:
    """Modules are exchanged for others while the model is watched."""
    model = mlp(nn.ReLU)
    watch(model)
    losses = steps(model, lambda: torch.randn(8, 8), 2)
    model[1] = nn.Tanh()
    model[0] = parametrizations.weight_norm(model[0])
    losses += steps(model, lambda: torch.randn(8, 8), 3)
    return state(model, losses=losses)


def _recurrent_situations() -> Iterator[tuple[str, Situation]]:
    hows = ("spectral_norm", "weight_norm", "old weight_norm", "prune", "weight drop")
    for how in hows:
        yield f"nn.LSTM, {how}", parametrized(lambda: nn.LSTM(6, 8), "weight_hh_l0", how)
    for how in ("spectral_norm", "weight drop"):
        yield f"nn.LSTMCell, {how}", parametrized(lambda: nn.LSTMCell(6, 8), "weight_hh", how)
        yield f"nn.GRU, {how}", parametrized(lambda: nn.GRU(6, 8), "weight_ih_l0", how)
        yield f"nn.GRUCell, {how}", parametrized(lambda: nn.GRUCell(6, 8), "weight_ih", how)
    for how in (*hows, "old spectral_norm"):
        yield f"nn.Linear, {how}", parametrized(lambda: nn.Linear(8, 16), "weight", how)


SITUATIONS: Mapping[str, Situation] = {
    "tensor hooks and retain_grad around an own normalisation": hooked(Norm),
    "tensor hooks and retain_grad around an own activation": hooked(Own),
    "an own module that checkpoints itself": hooked(Recomputing),
    "an own module that checkpoints itself, reentrant": hooked(lambda: Recomputing(reentrant=True)),
    **dict(_recurrent_situations()),
    "attention, dropout, random activations": simple(Attending, 4, 6, 8),
    "convolutions, batch normalisation, in-place activations": simple(Images, 4, 1, 8, 8),
    "layers that are skipped at random": simple(Stochastic, 8, 8),
    "a complex layer": simple(Complex, 16, 8),
    "packed sequences, dropout between layers": packed,
    "an optimizer in the backward": in_backward,
    "a gradient penalty": penalised,
    "an inner step by functional_call": maml,
    "gradients of each sample by vmap": per_sample,
    "sharpness-aware minimisation": sharpness,
    "LBFGS": lbfgs,
    "a GradScaler that overflows": scaled,
    "gradients in a buffer, with noise": private,
    "saved, loaded and copied within a step": saved,
    "traced between steps": traced,
    "a function mode of the user's": counted,
    "hooks on what autograd saves": moved,
    "detect_anomaly": anomalous,
    "module backward hooks that change gradients": backwards,
    "a tensor subclass": subclassed,
    "two networks against each other": adversaries,
    "modules that are exchanged": quantised,
}
