"""The networks of docs/architectures.py: what each of them computes, in its smallest form."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Inputs = tuple[Tensor, ...]


class Lambda(nn.Module):
    """A network whose layers are named and whose forward is a function of them and the input."""

    def __init__(self, forward: Callable[..., Any], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)
            else:
                self.register_parameter(name, nn.Parameter(part))
        self._function = forward

    def forward(self, *inputs: Tensor) -> Any:
        return self._function(self, *inputs)


def dense(*sizes: int, act: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers with an activation between each two."""
    layers: list[nn.Module] = []
    for first, second in itertools.pairwise(sizes):
        layers += [nn.Linear(first, second), act()]
    return nn.Sequential(*layers[:-1])


def rows(*shape: int, scale: float = 2.0) -> Callable[[], Inputs]:
    return lambda: (scale * torch.randn(*shape),)


def graph() -> Inputs:
    """Features of 12 nodes, and an adjacency matrix."""
    edges = (torch.rand(12, 12) > 0.6).float()
    return 2 * torch.randn(12, 6), ((edges + edges.T + torch.eye(12)) > 0).float()


class Spike(torch.autograd.Function):
    """A step, with the slope of a fast sigmoid in the backward."""

    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        ctx.save_for_backward(v)
        return (v > 0).to(v.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (v,) = ctx.saved_tensors
        slope: Tensor = 1 / (1 + 5 * v.abs()).square()
        return grad * slope


class Straight(torch.autograd.Function):
    """The sign, with the gradient of a clamp in the backward."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z.sign()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        inside: Tensor = z.abs() <= 1
        return grad * inside


class Jump(torch.autograd.Function):
    """JumpReLU, with a gradient of its threshold."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, theta: Tensor) -> Tensor:
        ctx.save_for_backward(z, theta)
        return z * (z > theta)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        z, theta = ctx.saved_tensors
        near = ((z - theta).abs() < 0.05).to(z.dtype) / 0.1
        return grad * (z > theta), -(theta * near * grad).sum(0)


class JumpReLU(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.full((size,), 0.3))

    def forward(self, z: Tensor) -> Tensor:
        out: Tensor = Jump.apply(z, self.theta)  # type: ignore[no-untyped-call]
        return out


class Sine(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return torch.sin(30 * z)


class Snake(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return z + torch.sin(0.8 * z).square() / 0.8


def siren() -> nn.Module:
    net = dense(2, 16, 16, 1, act=Sine)
    with torch.no_grad():
        for layer in list(net)[2::2]:
            assert isinstance(layer, nn.Linear)
            layer.weight.uniform_(-math.sqrt(6 / 16) / 30, math.sqrt(6 / 16) / 30)
    return net


def nerf(m: Any, x: Tensor) -> Tensor:
    waves = x[..., None] * 2 ** torch.arange(4.0)
    h = m.body(torch.cat([waves.sin(), waves.cos()], -1).flatten(1))
    density = F.softplus(m.density(h)) * 0.1
    opacity = 1 - torch.exp(-density)
    through = torch.cumprod(1 - opacity + 1e-6, 0)
    out: Tensor = torch.sigmoid(m.colour(h)) * opacity * through
    return out


def pinn(m: Any, x: Tensor) -> Tensor:
    """A network of Fourier features with learned frequencies, which multiply the input."""
    h = torch.cat([torch.sin(m.waves(x)), torch.cos(m.waves(x))], -1)
    out: Tensor = m.body(h)
    return out


def conv_stack(*channels: int, act: Callable[[], nn.Module], transposed: bool = False) -> nn.Sequential:
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    layers: list[nn.Module] = []
    for first, second in itertools.pairwise(channels):
        layers += [kind(first, second, 4, 2, 1), nn.BatchNorm2d(second), act()]
    return nn.Sequential(*layers)


def spiking(m: Any, x: Tensor) -> Tensor:
    v = torch.zeros(len(x), 16)
    total = torch.zeros(len(x), 4)
    for _ in range(4):
        v = 0.9 * v + m.first(x)
        spike = Spike.apply(v - 1)  # type: ignore[no-untyped-call]
        v = v - spike.detach()
        total = total + m.last(spike)
    return total


def gcn(m: Any, x: Tensor, edges: Tensor) -> Tensor:
    mean = edges / edges.sum(1, keepdim=True)
    out: Tensor = mean @ m.last(F.relu(mean @ m.first(x)))
    return out


def gat(m: Any, x: Tensor, edges: Tensor) -> Tensor:
    h = m.project(x)
    logits = F.leaky_relu(m.source(h) + m.target(h).T, 0.2).masked_fill(edges == 0, -math.inf)
    out: Tensor = m.last(F.elu(torch.softmax(logits, -1) @ h))
    return out


def gin(m: Any, x: Tensor, edges: Tensor) -> Tensor:
    for layer in (m.first, m.last):
        x = layer((1 + m.epsilon) * x + edges @ x)
    return x


def ode(m: Any, x: Tensor) -> Tensor:
    for _ in range(2):
        k1 = m.field(x)
        k2 = m.field(x + 0.25 * k1)
        k3 = m.field(x + 0.25 * k2)
        k4 = m.field(x + 0.5 * k3)
        x = x + (k1 + 2 * k2 + 2 * k3 + k4) / 12
    return x


def top_k(m: Any, x: Tensor) -> Tensor:
    found = F.relu(m.encoder(x)).topk(4, -1)
    out: Tensor = m.decoder(torch.zeros(len(x), 24).scatter(-1, found.indices, found.values))
    return out


def routed(m: Any, x: Tensor, weights: Tensor) -> Tensor:
    best = weights.topk(2, -1)
    shares = torch.zeros_like(weights).scatter(-1, best.indices, best.values / best.values.sum(-1, keepdim=True))
    out: Tensor = sum((shares[:, at, None] * expert(x) for at, expert in enumerate(m.experts)), torch.zeros(()))
    return out


def moe(*, sigmoid: bool) -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        logits = m.router(x)
        return routed(m, x, torch.sigmoid(logits) if sigmoid else torch.softmax(logits, -1))

    return Lambda(forward, router=nn.Linear(6, 3), experts=nn.ModuleList(dense(6, 12, 6, act=nn.GELU) for _ in range(3)))


def unet(m: Any, x: Tensor, t: Tensor) -> Tensor:
    waves = t[:, None] * torch.exp(-torch.arange(4.0))
    time = m.time(torch.cat([waves.sin(), waves.cos()], -1))
    down = F.silu(m.norm(m.down(x)) + time[:, :, None, None])
    b, c, h, w = down.shape
    q, k, v = m.qkv(down).flatten(2).transpose(1, 2).chunk(3, -1)
    mixed = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(c), -1) @ v
    out: Tensor = m.out(F.interpolate(down + mixed.transpose(1, 2).reshape(b, c, h, w), scale_factor=2))
    return out


def mamba(m: Any, x: Tensor) -> Tensor:
    signal, gate = m.entry(x).chunk(2, -1)
    signal = F.silu(signal)
    delta, write, read = F.softplus(m.delta(signal)), m.write(signal), m.read(signal)
    keep = -torch.exp(m.log_a)
    state, out = torch.zeros(len(x), 8, 4), []
    for at in range(x.shape[1]):
        state = state * torch.exp(delta[:, at, :, None] * keep) + (delta[:, at] * signal[:, at])[..., None] * write[:, at, None]
        out.append((state * read[:, at, None]).sum(-1))
    y: Tensor = m.last(torch.stack(out, 1) * F.silu(gate))
    return y


def rwkv(m: Any, x: Tensor) -> Tensor:
    key, value, receive = m.key(x), m.value(x), torch.sigmoid(m.receive(x))
    above = below = torch.zeros(len(x), 6)
    out = []
    for at in range(x.shape[1]):
        weight = torch.exp(key[:, at])
        above, below = above * 0.9 + weight * value[:, at], below * 0.9 + weight
        out.append(above / (below + 1e-6))
    mixed = torch.stack(out, 1) * receive
    y: Tensor = m.down(torch.square(torch.relu(m.up(mixed))))
    return y


def mlstm(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).chunk(3, -1)
    gates = m.gates(x)
    state, norm, top = torch.zeros(len(x), 6, 6), torch.zeros(len(x), 6), torch.zeros(len(x), 1)
    out = []
    for at in range(x.shape[1]):
        enter, leave = gates[:, at, :1], F.logsigmoid(gates[:, at, 1:])
        new = torch.maximum(leave + top, enter)
        keep, write = torch.exp(leave + top - new), torch.exp(enter - new)
        state = keep[..., None] * state + write[..., None] * v[:, at, :, None] * k[:, at, None]
        norm, top = keep * norm + write * k[:, at], new
        below = (norm * q[:, at]).sum(-1, keepdim=True).abs().clamp(min=1.0)
        out.append((state @ q[:, at, :, None])[..., 0] / below)
    y: Tensor = torch.sigmoid(m.open(x)) * torch.stack(out, 1)
    return y


def gru(m: Any, x: Tensor) -> Tensor:
    h = torch.zeros(len(x), 8)
    for at in range(x.shape[1]):
        reset, update = torch.sigmoid(m.gates(torch.cat([x[:, at], h], -1))).chunk(2, -1)
        h = update * h + (1 - update) * torch.tanh(m.new(torch.cat([x[:, at], reset * h], -1)))
    out: Tensor = m.last(h)
    return out


def wavenet(m: Any, x: Tensor) -> Tensor:
    total = torch.zeros(())
    for filters, gates, skip in zip(m.filters, m.gates, m.skips, strict=True):
        h = torch.tanh(filters(x)) * torch.sigmoid(gates(x))
        x, total = x + h, total + skip(h)
    out: Tensor = m.last(F.relu(total))
    return out


def capsules(m: Any, x: Tensor) -> Tensor:
    votes = m.votes(x).reshape(len(x), 4, 3, 5)
    logits, v = torch.zeros(len(x), 4, 3), torch.zeros(())
    for _ in range(2):
        s = (torch.softmax(logits, -1)[..., None] * votes).sum(1)
        size = s.square().sum(-1, keepdim=True)
        v = size / (1 + size) * s / (size + 1e-8).sqrt()
        logits = logits + (votes * v[:, None]).sum(-1)
    return v


def vae(m: Any, x: Tensor) -> Tensor:
    mean, log_variance = m.encoder(x).chunk(2, -1)
    out: Tensor = torch.sigmoid(m.decoder(mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)))
    return out


def vq_vae(m: Any, x: Tensor) -> Tensor:
    z = m.encoder(x)
    nearest = torch.cdist(z.detach(), m.codes.detach()).argmin(-1)
    found = z + (m.codes[nearest] - z).detach()
    out: Tensor = m.decoder(found)
    return out


def real_nvp(m: Any, x: Tensor) -> Tensor:
    for at, net in enumerate(m.nets):
        first, second = x.chunk(2, -1)[:: 1 - 2 * (at % 2)]
        scale, shift = net(first).chunk(2, -1)
        x = torch.cat([second * torch.exp(torch.tanh(scale)) + shift, first], -1)
    return x


def hopfield(m: Any, x: Tensor) -> Tensor:
    state = m.query(x)
    for _ in range(2):
        state = torch.softmax(2.0 * state @ m.patterns.T, -1) @ m.patterns
    out: Tensor = m.last(state)
    return out


def kan(m: Any, x: Tensor) -> Tensor:
    for base, splines in ((m.base, m.splines), (m.base_2, m.splines_2)):
        hats = F.relu(1 - (x[..., None] - torch.linspace(-2, 2, 5)).abs())
        x = base(F.silu(x)) + splines(hats.flatten(1))
    return x


def mixer(m: Any, x: Tensor) -> Tensor:
    x = x + m.tokens(m.norm(x).transpose(1, 2)).transpose(1, 2)
    out: Tensor = x + m.channels(m.norm_2(x))
    return out


def g_mlp(m: Any, x: Tensor) -> Tensor:
    u, v = F.gelu(m.entry(m.norm(x))).chunk(2, -1)
    gated = u * (m.spatial(m.gate_norm(v).transpose(1, 2)).transpose(1, 2) + 1)
    out: Tensor = x + m.last(gated)
    return out


def residual(m: Any, x: Tensor) -> Tensor:
    out: Tensor = F.relu(x + m.second(m.norm_2(m.act(m.norm(m.first(x))))))
    return m.head(out.mean((2, 3)))  # type: ignore[no-any-return]


def dense_net(m: Any, x: Tensor) -> Tensor:
    for layer in m.layers:
        x = torch.cat([x, layer(x)], 1)
    return x


def squeeze(m: Any, x: Tensor) -> Tensor:
    h = m.act(m.norm(m.conv(x)))
    weights = torch.sigmoid(m.up(F.relu(m.down(h.mean((2, 3))))))
    out: Tensor = h * weights[:, :, None, None]
    return out


def highway(m: Any, x: Tensor) -> Tensor:
    for plain, gate in zip(m.plain, m.gates, strict=True):
        carry = torch.sigmoid(gate(x))
        x = carry * F.relu(plain(x)) + (1 - carry) * x
    return x


def attend(m: Any, q: Tensor, x: Tensor) -> Tensor:
    out: Tensor = m(q, x, x, need_weights=False)[0]
    return out


def tab_net(m: Any, x: Tensor) -> Tensor:
    out, prior = torch.zeros(()), torch.ones_like(x)
    for step in m.steps:
        z = step(x) * prior
        ordered = z.sort(-1, descending=True).values
        sums, counts = ordered.cumsum(-1) - 1, torch.arange(1.0, 7.0)
        size = (counts * ordered > sums).sum(-1, keepdim=True)
        mask = F.relu(z - sums.gather(-1, size - 1) / size)
        prior = prior * (1.3 - mask)
        out = out + F.glu(m.features(mask * x), -1)
    return out


def primer(m: Any, x: Tensor) -> Tensor:
    x = x + attend(m.attention, x, x)
    out: Tensor = x + m.down(F.relu(m.up(x)) ** 2)
    return out


def gpt_oss(m: Any, x: Tensor) -> Tensor:
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * m.scale
    gate, up = m.entry(x).chunk(2, -1)
    gate, up = gate.clamp(max=2.0), up.clamp(-2.0, 2.0)
    out: Tensor = m.last((up + 1) * gate * torch.sigmoid(1.702 * gate))
    return out


def soft_cap(m: Any, x: Tensor) -> Tensor:
    logits = m.query(x) @ m.key(x).T
    weights = torch.softmax(5 * torch.tanh(logits / 5), -1)
    return 30 * torch.tanh(m.last(weights @ x) / 30)


def gumbel(m: Any, x: Tensor) -> Tensor:
    out: Tensor = m.decoder(F.gumbel_softmax(m.encoder(x), tau=0.7, dim=-1))
    return out


def maxout(m: Any, x: Tensor) -> Tensor:
    out: Tensor = m.last(m.first(x).reshape(len(x), 8, 3).amax(-1))
    return out


def dueling(m: Any, x: Tensor) -> Tensor:
    h = m.body(x)
    gain = m.advantage(h)
    out: Tensor = m.value(h) + gain - gain.mean(-1, keepdim=True)
    return out


def world_model(m: Any, x: Tensor) -> Tensor:
    """The ends of a network that works on numbers of any size: symlog before it, symexp behind it."""
    z = m.entry(x)
    h = m.body(torch.sign(z) * torch.log1p(z.abs()))
    out: Tensor = torch.sign(h) * torch.expm1(h.abs())
    return out


def recurrent(m: Any, x: Tensor) -> Tensor:
    out: Tensor = m.head(m.rnn(x)[0][:, -1])
    return out


def snake_vocoder() -> nn.Module:
    return nn.Sequential(nn.Conv1d(2, 8, 3, padding=1), Snake(), nn.Conv1d(8, 4, 3, padding=1), Snake(), nn.Conv1d(4, 1, 3, padding=1), nn.Tanh())


def image() -> Inputs:
    return (2 * torch.randn(4, 3, 8, 8),)


def binarised(m: Any, x: Tensor) -> Tensor:
    out: Tensor = m.last(Straight.apply(m.first(x)))  # type: ignore[no-untyped-call]
    return out
