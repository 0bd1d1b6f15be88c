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
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import pack_padded_sequence
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

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


def mlp(act: Callable[[], nn.Module] = nn.Tanh) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), act(), nn.Linear(16, 16), act(), nn.Linear(16, 1))


class Norm(nn.Module):
    """A normalisation that the user has written, as a module without children."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class Own(nn.Module):
    """An activation that no table knows, as a module without children."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha, self.runs = nn.Parameter(torch.ones(16)), 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return x + torch.sin(self.alpha * x).square() / self.alpha


class Hooked(nn.Module):
    """A model that keeps a hidden tensor with its gradient, and counts the calls of its tensor hooks, in front of and behind own modules."""

    def __init__(self, leaf: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first, self.leaf, self.head = nn.Linear(8, 16), leaf(), nn.Linear(16, 1)
        self.heard: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        self.hidden = self.first(x)
        self.hidden.retain_grad()
        self.hidden.register_hook(lambda grad: self.heard.append(float(grad.norm())))
        inside = self.leaf(self.hidden)
        inside.register_hook(lambda grad: self.heard.append(float(grad.norm())))
        out: Tensor = self.head(inside)
        return out


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


class Recomputing(nn.Module):
    """A module without children that checkpoints its own computation, which has running statistics."""

    mean: Tensor
    var: Tensor

    def __init__(self, reentrant: bool = False) -> None:
        super().__init__()
        self.runs, self.reentrant = 0, reentrant
        self.register_buffer("mean", torch.zeros(16))
        self.register_buffer("var", torch.ones(16))

    def compute(self, x: Tensor) -> Tensor:
        self.runs += 1
        return torch.tanh(F.dropout(F.batch_norm(x, self.mean, self.var, training=True), 0.2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.compute, x, use_reentrant=self.reentrant)
        return out


class Last(nn.Module):
    """The last output of a recurrent layer, and a head."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn, self.head = rnn, nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.rnn, nn.RNNBase):
            hidden = self.rnn(x)[0][-1]
        else:
            hidden = c = torch.zeros(x.shape[1], 8)
            for each in x:
                hidden, c = self.rnn(each, (hidden, c)) if isinstance(self.rnn, nn.LSTMCell) else (self.rnn(each, hidden), c)
        out: Tensor = self.head(hidden)
        return out


class Drop(nn.Module):
    """A parametrization that draws random numbers each time the weight is read."""

    def forward(self, weight: Tensor) -> Tensor:
        return F.dropout(weight, 0.5, self.training)


def _parametrized(layer: nn.Module, name: str, how: str) -> nn.Module:
    if how == "spectral_norm":
        return parametrizations.spectral_norm(layer, name)
    if how == "weight_norm":
        return parametrizations.weight_norm(layer, name)
    if how == "old weight_norm":
        return torch.nn.utils.weight_norm(layer, name)  # type: ignore[no-any-return]
    if how == "old spectral_norm":
        return torch.nn.utils.spectral_norm(layer, name)  # type: ignore[no-any-return]
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


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)
        self.lstm, self.head = nn.LSTM(8, 8, 2, dropout=0.3, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(F.rrelu(self.first(x), training=True), 0.1)
        x = self.lstm(self.encoder(x))[0]
        x = F.scaled_dot_product_attention(x, x, x, dropout_p=0.1, is_causal=True)
        out: Tensor = self.head(F.glu(x + F.gumbel_softmax(x, dim=-1)))
        return out


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
        weights = dict(model.named_parameters())
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
    optimizer, average, keys, files = torch.optim.SGD(model.parameters(), lr=0.05), None, [], []
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
    model, moves = nn.Sequential(nn.Linear(8, 16), nn.GELU(), Own(), Norm(), nn.Linear(16, 1)), []
    watch(model)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (moves.append(tuple(x.shape)), x)[1], lambda x: (moves.append("back"), x)[1]):
        losses = steps(model, lambda: torch.randn(8, 8), 3)
    return state(model, losses=losses, moves=moves)


def anomalous(watch: Watch) -> Mapping[str, Any]:
    model = mlp()
    watch(model)
    with torch.autograd.detect_anomaly(check_nan=True):
        losses = steps(model, lambda: torch.randn(8, 8), 3)
    return state(model, losses=losses)


class Backwards(nn.Module):
    """Module backward hooks of the user's, which change gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.heard = mlp(), list[float]()
        self.net[1].register_full_backward_hook(self._scale)
        self.net[3].register_full_backward_pre_hook(lambda module, grad: tuple(2 * each for each in grad))
        self.net[2].register_forward_hook(lambda module, args, out: out + 0.1)

    def _scale(self, module: nn.Module, grad_in: Any, grad_out: Any) -> Any:
        self.heard.append(float(grad_out[0].norm()))
        return tuple(0.5 * each for each in grad_in)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


def backwards(watch: Watch) -> Mapping[str, Any]:
    model = Backwards()
    watch(model)
    losses = steps(model, lambda: torch.randn(8, 8))
    return state(model, losses=losses, heard=model.heard)


class Array(torch.Tensor):
    """A tensor subclass that holds plain data."""


def subclassed(watch: Watch) -> Mapping[str, Any]:
    model = mlp(nn.ReLU)
    watch(model)
    losses = steps(model, lambda: torch.randn(8, 8).as_subclass(Array))
    return state(model, losses=losses)


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.net = nn.Linear(8, 8, dtype=torch.complex64), nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(torch.view_as_real(self.mix(torch.fft.fft(x))).flatten(1))
        return out


class Stochastic(nn.Module):
    """Layers that are skipped at random."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.blocks, self.head = (
            nn.Linear(8, 16),
            nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.GELU()) for _ in range(4)),
            nn.Linear(16, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for each in self.blocks:
            if float(torch.rand(())) < 0.7:
                x = x + each(x)
        out: Tensor = self.head(x)
        return out


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), nn.SiLU(inplace=True))
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.drop(self.body(x).flatten(1)))
        return out


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
