"""Writes docs/architectures.md: what torchsat sees in architectures outside of Hugging Face transformers. `python docs/architectures.py`

Every architecture is a tiny network that is built here, with what its family is known for: its activations, gates, routers and normalisations. It is
trained for one step on random input. Beside torchsat a dispatch mode hears every operator of aten that runs on a tensor with a gradient, below
autograd; `unaccounted` compares. Each operator that is not linear must be a site of its module, or be named there. What a network normalises by hand
or computes of parameters alone is no activation: these operators are listed for each architecture, by hand.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from marks import filled, named
from networks import (
    Inputs,
    JumpReLU,
    Lambda,
    attend,
    binarised,
    capsules,
    conv_stack,
    dense,
    dense_net,
    dueling,
    g_mlp,
    gat,
    gcn,
    gin,
    gpt_oss,
    graph,
    gru,
    gumbel,
    highway,
    hopfield,
    image,
    kan,
    mamba,
    maxout,
    mixer,
    mlstm,
    moe,
    nerf,
    ode,
    pinn,
    primer,
    real_nvp,
    recurrent,
    residual,
    rows,
    rwkv,
    siren,
    snake_vocoder,
    soft_cap,
    spiking,
    squeeze,
    tab_net,
    top_k,
    unet,
    vae,
    vq_vae,
    wavenet,
    world_model,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import torchsat

PAGE = Path(__file__).parent / "architectures.md"


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    Args:
        known_for: what it is known for.
        build: makes the network, in training mode.
        inputs: makes its inputs.
        normalises: the operators by which it normalises, or that act on parameters alone.
    """

    name: str
    known_for: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    normalises: frozenset[str] = frozenset()


NORM = frozenset({"sqrt", "rsqrt", "pow", "div", "square", "reciprocal"})
ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture("SIREN", "sines of 30 z", siren, rows(32, 2)),
    Architecture("NeRF", "waves of the position, density, transmittance", lambda: Lambda(
        nerf, body=dense(24, 16, 16), density=nn.Linear(16, 1), colour=nn.Linear(16, 3)), rows(32, 3)),
    Architecture("PINN of Fourier features", "learned frequencies", lambda: Lambda(
        pinn, waves=nn.Linear(2, 8), body=dense(16, 16, 1, act=nn.Tanh)), rows(32, 2)),
    Architecture("DCGAN generator", "transposed convolutions, tanh", lambda: nn.Sequential(
        conv_stack(6, 8, 4, act=nn.ReLU, transposed=True), nn.ConvTranspose2d(4, 3, 3, 1, 1), nn.Tanh()), rows(8, 6, 2, 2)),
    Architecture("DCGAN discriminator", "leaky rectifiers, sigmoid", lambda: nn.Sequential(
        conv_stack(3, 4, 8, act=lambda: nn.LeakyReLU(0.2)), nn.Flatten(), nn.Linear(32, 1), nn.Sigmoid()), image),
    Architecture("WGAN-GP critic", "no normalisation", lambda: dense(6, 16, 16, 1, act=lambda: nn.LeakyReLU(0.2)), rows(32, 6)),
    Architecture("Spiking network", "leaky integrate and fire, surrogate gradient", lambda: Lambda(
        spiking, first=nn.Linear(6, 16), last=nn.Linear(16, 4)), rows(16, 6)),
    Architecture("GCN", "mean over neighbours", lambda: Lambda(gcn, first=nn.Linear(6, 12), last=nn.Linear(12, 3)), graph),
    Architecture("GAT", "attention over neighbours", lambda: Lambda(
        gat, project=nn.Linear(6, 12), source=nn.Linear(12, 1), target=nn.Linear(12, 1), last=nn.Linear(12, 3)), graph),
    Architecture("GIN", "sums over neighbours", lambda: Lambda(gin, first=dense(6, 12, 12), last=dense(12, 12, 3), epsilon=torch.zeros(())), graph),
    Architecture("Neural ODE", "fixed steps of Runge and Kutta", lambda: Lambda(ode, field=dense(6, 16, 6, act=nn.Tanh)), rows(16, 6)),
    Architecture("Sparse autoencoder", "ReLU", lambda: dense(6, 24, 6), rows(32, 6)),
    Architecture("Sparse autoencoder, top-k", "top-k", lambda: Lambda(top_k, encoder=nn.Linear(6, 24), decoder=nn.Linear(24, 6)), rows(32, 6)),
    Architecture("Sparse autoencoder, JumpReLU", "a learned threshold", lambda: nn.Sequential(
        nn.Linear(6, 24), JumpReLU(24), nn.Linear(24, 6)), rows(32, 6)),
    Architecture("Mixture of experts", "softmax router", lambda: moe(sigmoid=False), rows(32, 6), NORM),
    Architecture("Mixture of experts, sigmoid", "sigmoid router", lambda: moe(sigmoid=True), rows(32, 6), NORM),
    Architecture("Diffusion U-Net", "time embedding, attention", lambda: Lambda(
        unet, time=dense(8, 16, 8, act=nn.SiLU), down=nn.Conv2d(3, 8, 4, 2, 1), norm=nn.GroupNorm(2, 8), qkv=nn.Conv2d(8, 24, 1),
        out=nn.Conv2d(8, 3, 3, padding=1)), lambda: (*image(), torch.rand(4))),
    Architecture("Mamba", "selective scan", lambda: Lambda(
        mamba, entry=nn.Linear(6, 16), delta=nn.Linear(8, 8), write=nn.Linear(8, 4), read=nn.Linear(8, 4), last=nn.Linear(8, 6),
        log_a=torch.log(torch.arange(1.0, 5.0)).repeat(8, 1)), rows(4, 6, 6)),
    Architecture("RWKV", "exponential weights, squared ReLU", lambda: Lambda(
        rwkv, key=nn.Linear(6, 6), value=nn.Linear(6, 6), receive=nn.Linear(6, 6), up=nn.Linear(6, 12), down=nn.Linear(12, 6)), rows(4, 6, 6)),
    Architecture("xLSTM (mLSTM)", "exponential gates with a stabiliser", lambda: Lambda(
        mlstm, qkv=nn.Linear(6, 18), gates=nn.Linear(6, 2), open=nn.Linear(6, 6)), rows(4, 5, 6)),
    Architecture("GRU, as a loop", "gates", lambda: Lambda(gru, gates=nn.Linear(14, 16), new=nn.Linear(14, 8), last=nn.Linear(8, 2)), rows(8, 5, 6)),
    Architecture("LSTM", "nn.LSTM", lambda: Lambda(recurrent, rnn=nn.LSTM(6, 8, batch_first=True), head=nn.Linear(8, 2)), rows(8, 5, 6)),
    Architecture("TCN", "dilated convolutions", lambda: nn.Sequential(
        nn.Conv1d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv1d(8, 8, 3, padding=2, dilation=2), nn.ReLU(), nn.Conv1d(8, 1, 1)), rows(8, 2, 12)),
    Architecture("WaveNet", "tanh times sigmoid", lambda: Lambda(
        wavenet, filters=nn.ModuleList(nn.Conv1d(4, 4, 3, padding=1) for _ in range(2)), last=nn.Conv1d(6, 1, 1),
        gates=nn.ModuleList(nn.Conv1d(4, 4, 3, padding=1) for _ in range(2)), skips=nn.ModuleList(nn.Conv1d(4, 6, 1) for _ in range(2))),
        rows(8, 4, 10)),
    Architecture("Capsules", "squash, routing by agreement", lambda: Lambda(capsules, votes=nn.Linear(6, 60)), rows(8, 6), NORM),
    Architecture("VAE", "exp of a log-variance", lambda: Lambda(vae, encoder=dense(6, 16, 8), decoder=dense(4, 16, 6)), rows(32, 6)),
    Architecture("VQ-VAE", "straight-through codes", lambda: Lambda(
        vq_vae, encoder=dense(6, 16, 4), decoder=dense(4, 16, 6), codes=torch.randn(8, 4)), rows(32, 6)),
    Architecture("RealNVP", "coupling by exp(tanh(s))", lambda: Lambda(real_nvp, nets=nn.ModuleList(dense(3, 12, 6) for _ in range(2))), rows(32, 6)),
    Architecture("Modern Hopfield network", "softmax over patterns", lambda: Lambda(
        hopfield, query=nn.Linear(6, 8), patterns=torch.randn(10, 8), last=nn.Linear(8, 2)), rows(16, 6)),
    Architecture("KAN", "splines and SiLU", lambda: Lambda(
        kan, base=nn.Linear(3, 4), splines=nn.Linear(15, 4), base_2=nn.Linear(4, 1), splines_2=nn.Linear(20, 1)), rows(32, 3, scale=1.0)),
    Architecture("MLP-Mixer", "GELU over tokens and channels", lambda: Lambda(
        mixer, norm=nn.LayerNorm(8), tokens=dense(5, 12, 5, act=nn.GELU), norm_2=nn.LayerNorm(8), channels=dense(8, 16, 8, act=nn.GELU)),
        rows(4, 5, 8)),
    Architecture("gMLP", "spatial gate", lambda: Lambda(
        g_mlp, norm=nn.LayerNorm(8), entry=nn.Linear(8, 24), gate_norm=nn.LayerNorm(12), spatial=nn.Linear(5, 5), last=nn.Linear(12, 8)),
        rows(4, 5, 8)),
    Architecture("ConvNeXt", "depth-wise convolution, GELU", lambda: nn.Sequential(
        nn.Conv2d(3, 8, 2, 2), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.GroupNorm(1, 8), nn.Conv2d(8, 16, 1), nn.GELU(), nn.Conv2d(16, 8, 1)),
        image),
    Architecture("ResNet", "residual block", lambda: Lambda(
        residual, first=nn.Conv2d(3, 3, 3, padding=1), norm=nn.BatchNorm2d(3), act=nn.ReLU(inplace=True), second=nn.Conv2d(3, 3, 3, padding=1),
        norm_2=nn.BatchNorm2d(3), head=nn.Linear(3, 2)), image),
    Architecture("DenseNet", "concatenated layers", lambda: Lambda(dense_net, layers=nn.ModuleList(
        nn.Sequential(nn.BatchNorm2d(3 + 2 * at), nn.ReLU(), nn.Conv2d(3 + 2 * at, 2, 3, padding=1)) for at in range(2))), image),
    Architecture("SE-Net", "squeeze and excitation", lambda: Lambda(
        squeeze, conv=nn.Conv2d(3, 8, 3, padding=1), norm=nn.BatchNorm2d(8), act=nn.ReLU(), down=nn.Linear(8, 4), up=nn.Linear(4, 8)), image),
    Architecture("MobileNetV3", "hard swish", lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Hardswish(), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Hardswish(), nn.Conv2d(8, 4, 1)),
        image),
    Architecture("EfficientNet", "SiLU, squeeze and excitation", lambda: Lambda(
        squeeze, conv=nn.Conv2d(3, 8, 3, padding=1), norm=nn.BatchNorm2d(8), act=nn.SiLU(), down=nn.Linear(8, 4), up=nn.Linear(4, 8)), image),
    Architecture("Highway network", "carry gates", lambda: Lambda(
        highway, plain=nn.ModuleList(nn.Linear(6, 6) for _ in range(2)), gates=nn.ModuleList(nn.Linear(6, 6) for _ in range(2))), rows(16, 6)),
    Architecture("PointNet", "maximum over points", lambda: Lambda(
        lambda m, x: m.head(m.points(x).amax(1)), points=dense(3, 12, 16), head=dense(16, 8, 2)), rows(4, 10, 3)),
    Architecture("Set Transformer", "attention to learned seeds", lambda: Lambda(
        lambda m, x: m.feed(attend(m.attention, m.seeds.expand(len(x), -1, -1), x)), attention=nn.MultiheadAttention(8, 2, batch_first=True),
        seeds=torch.randn(1, 3, 8), feed=dense(8, 16, 8)), rows(4, 6, 8)),
    Architecture("Perceiver", "attention to latents, twice", lambda: Lambda(
        lambda m, x: attend(m.inner, *[attend(m.cross, m.latents.expand(len(x), -1, -1), x)] * 2),
        cross=nn.MultiheadAttention(8, 2, batch_first=True), inner=nn.MultiheadAttention(8, 2, batch_first=True), latents=torch.randn(1, 3, 8)),
        rows(4, 6, 8)),
    Architecture("Deep Sets", "sum over elements", lambda: Lambda(
        lambda m, x: m.head(m.each(x).sum(1)), each=dense(3, 12, 8, act=nn.ELU), head=dense(8, 8, 1, act=nn.ELU)), rows(8, 5, 3)),
    Architecture("TabNet", "sparsemax masks, GLU", lambda: Lambda(
        tab_net, steps=nn.ModuleList(nn.Linear(6, 6) for _ in range(2)), features=nn.Linear(6, 8)), rows(16, 6)),
    Architecture("Binarised network", "sign with a straight-through gradient", lambda: Lambda(
        binarised, first=nn.Linear(6, 12), last=nn.Linear(12, 2)), rows(16, 6)),
    Architecture("Primer", "squared ReLU", lambda: Lambda(
        primer, attention=nn.MultiheadAttention(8, 2, batch_first=True), up=nn.Linear(8, 16), down=nn.Linear(16, 8)), rows(4, 6, 8)),
    Architecture("gpt-oss block", "clamped SwiGLU, RMS norm by hand", lambda: Lambda(
        gpt_oss, scale=torch.ones(8), entry=nn.Linear(8, 24), last=nn.Linear(12, 8)), rows(16, 8), NORM),
    Architecture("Soft caps", "tanh caps of logits", lambda: Lambda(
        soft_cap, query=nn.Linear(6, 6), key=nn.Linear(6, 6), last=nn.Linear(6, 9)), rows(12, 6)),
    Architecture("Gumbel-softmax VAE", "relaxed samples", lambda: Lambda(gumbel, encoder=dense(6, 16, 5), decoder=dense(5, 16, 6)), rows(32, 6)),
    Architecture("Maxout", "maximum over pieces", lambda: Lambda(maxout, first=nn.Linear(6, 24), last=nn.Linear(8, 2)), rows(16, 6)),
    Architecture("Dueling DQN", "value and advantage", lambda: Lambda(
        dueling, body=dense(6, 16, 16), value=nn.Linear(16, 1), advantage=nn.Linear(16, 4)), rows(16, 6)),
    Architecture("World model", "symlog and symexp", lambda: Lambda(
        world_model, entry=nn.Linear(6, 8), body=dense(8, 16, 4, act=nn.SiLU)), rows(16, 6)),
    Architecture("Vocoder", "Snake", snake_vocoder, rows(8, 2, 12)),
)  # fmt: skip

LINEAR = re.compile(
    r"(add|sub|rsub|mul|neg|mm|bmm|addmm|addmv|mv|dot|convolution|baddbmm|_unsafe_view|view|reshape|_reshape_alias|t|transpose|permute|expand|slice|"
    r"select|split|split_with_sizes|unbind|cat|stack|squeeze|unsqueeze|clone|_to_copy|copy|detach|alias|index|index_put|gather|scatter|scatter_add|"
    r"embedding|sum|mean|cumsum|as_strided|repeat|flip|roll|tril|triu|masked_fill|where|sort|upsample_\w+|constant_pad_nd|new_\w+|zeros_like|ones_like|"
    r"empty_like|fill|zero|bernoulli|native_dropout|exponential|normal|randn_like|rand_like|unsafe_split|amax|amin|max|min|max_pool\w+|"
    r"\w*layer_norm|\w*batch_norm\w*|\w*group_norm\w*|lift_fresh|diagonal|_unsafe_index|isfinite|gt|lt|ge|le|eq|ne|argmin|argmax|is_same_size|rsub)_?"
)
"""What passes a gradient like a linear function, normalises, or gives each gradient to one input; the test's own list, not that of torchsat."""
ALIKE = {
    "pow": {"pow", "square"},
    "_softmax": {"softmax", "gumbel_softmax"},
    "_log_softmax": {"log_softmax"},
    "log_sigmoid_forward": {"log_sigmoid", "logsigmoid"},
    "prod": {"prod"},
    "special_erfcx": {"erfcx"},
    "clamp_min": {"clamp"},
    "clamp_max": {"clamp"},
    "glu": {"glu", "sigmoid"},
    "hardtanh": {"clamp", "relu6", "hardtanh"},
}
"""The places at which an operator of aten may be found that has another name there."""


CUSTOM = "custom function"


class Operators(TorchDispatchMode):
    """(path of the innermost module, operator) of what runs on a tensor with a gradient and is not linear."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stack: list[str] = [""]
        self.met: set[tuple[str, str]] = set()
        for path, module in model.named_modules():
            module.register_forward_pre_hook(lambda module, args, path=path: self.stack.append(path))
            module.register_forward_hook(lambda module, args, output: (self.stack.pop(), None)[1])

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function).split(".")[1]
        signals = [each for each in args if isinstance(each, Tensor) and each.requires_grad and torch.is_grad_enabled()]
        is_division = name == "div" and not (len(args) > 1 and isinstance(args[1], Tensor) and args[1].requires_grad)
        if signals and not is_division and not LINEAR.fullmatch(name):
            self.met.add((self.stack[-1], name))
        if not torch.is_grad_enabled() and any(isinstance(each, Tensor) and each.requires_grad for each in args):
            # Only in the forward of a custom function is autograd off here.
            self.met.add((self.stack[-1], CUSTOM))
        return function(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Seen:
    """What one observed step of an architecture shows."""

    snapshot: torchsat.Snapshot | None
    coverage: torchsat.Coverage
    operators: tuple[tuple[str, str], ...]
    """What is not linear and ran: its module, and the operator of aten."""
    unaccounted: tuple[tuple[str, str], ...]
    """Those of them that are neither a site nor named."""


def observe(architecture: Architecture, **options: Any) -> Seen:
    """One observed step, and one without torchsat, in which the operators are heard."""
    torch.manual_seed(0)
    model, inputs = architecture.build().train(), architecture.inputs()
    operators, state = Operators(model), torch.get_rng_state()
    with operators, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output = model(*inputs)
    custom = _custom(output)
    torch.manual_seed(0)
    model, inputs = architecture.build().train(), architecture.inputs()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    torch.set_rng_state(state)
    with torchsat.watch(model, errors="raise", **options) as monitor, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(*inputs).square().mean().backward()
        optimizer.step()
    places = {*monitor.coverage.seen, *(place for place, _ in monitor.coverage.unseen)}
    # The choice of a router is measured with the experts beside it.
    mixtures = monitor.latest.experts if monitor.latest is not None else ()
    places |= {f"{experts.site.rpartition('.')[0]}/topk".lstrip("/") for experts in mixtures}
    met = sorted(each for each in operators.met if each[1] not in architecture.normalises)
    missing = [each for each in met if not any(_accounts(place, *each, custom) for place in places)]
    return Seen(monitor.latest, monitor.coverage, tuple(met), tuple(missing))


def _accounts(place: str, path: str, operator: str, custom: set[str]) -> bool:
    """Whether a place is this operator in this module, the module itself, or a module around it that is measured as a whole."""
    module, inside, what = place.rpartition("/")
    if not inside and path and (place == path or path.startswith(f"{place}.")):
        return True
    name = re.sub(r"_\d+$", "", what)
    alike = {operator.strip("_"), *ALIKE.get(operator, ())}
    if operator == CUSTOM:
        return module == path and what in custom
    if "rnn" in operator or operator in ("lstm", "gru"):
        return module.startswith(f"{path}.")
    attention = operator.startswith("_scaled_dot_product") and name == "softmax"
    return module == path and (name in alike or attention)


def _custom(output: Tensor) -> set[str]:
    """The names of the custom autograd functions in a graph."""
    queue, met, found = [output.grad_fn], set[Any](), set[str]()
    while queue:
        node = queue.pop()
        if node is None or node in met:
            continue
        met.add(node)
        if re.fullmatch(r"[A-Za-z]+Backward", node.name()):
            found.add(node.name().removesuffix("Backward"))
        queue += [before for before, _ in node.next_functions]
    return found


def row(architecture: Architecture, seen: Seen) -> str:
    """One line of the table."""
    records = seen.snapshot.records if seen.snapshot is not None else ()
    activations = ", ".join(f"{kind} {count}" for kind, count in sorted(Counter(record.activation for record in records).items()))
    return (
        f"| {architecture.name} | {architecture.known_for} | {seen.coverage.described} | {activations or '-'} | {named(seen.coverage)} | "
        f"{len(seen.operators)} | {len(seen.unaccounted)} |"
    )


def table() -> str:
    lines = ["| architecture | known for | sites | activations | named | nonlinear operators | unaccounted for |", "|---|---|---|---|---|---|---|"]
    return "\n".join([*lines, *(row(each, observe(each)) for each in ARCHITECTURES), "", versions()])


def versions() -> str:
    """With what the table was made: another version of torch may compute otherwise."""
    return f"{len(ARCHITECTURES)} architectures, torch {torch.__version__.partition('+')[0]}"


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE, {"architectures": table}))
