"""Softmax and attention that are called as functions. Fused attention is listed as unseen, and it keeps its fused path."""

import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchsat
from tests.models import Calling, Everything
from tests.truth import known, one_step
from torchsat.compiling import uses_flex_attention


def test_a_frozen_encoder_keeps_its_fused_path() -> None:
    """torch leaves the fused path while a TorchFunctionMode is active, and the other path rounds differently."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval().requires_grad_(False)
    model = nn.Sequential(encoder, nn.Linear(32, 4), nn.Tanh())
    x = torch.randn(8, 20, 32)
    expected = model(x)
    monitor = torchsat.watch(model, errors="raise")
    output = model(x)
    assert torch.equal(output, expected)
    output.sum().backward()
    assert ("0", "it is frozen and in evaluation mode, where torch runs it as one kernel") in monitor.coverage.unseen


def test_flex_attention_is_listed() -> None:
    flex = pytest.importorskip("torch.nn.attention.flex_attention")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                out: Tensor = self.layer(flex.flex_attention(x, x, x))
                return out

    model = Net()
    monitor = torchsat.watch(model, errors="raise")
    model(torch.randn(1, 1, 128, 16))
    assert dict(monitor.coverage.unseen)["flex_attention"].startswith("fused attention")


def test_softmax_without_a_derivative_writes_and_reads(tmp_path: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 1))
    monitor = torchsat.watch(model, tmp_path, errors="raise")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model(torch.randn(4, 5, 8)).sum().backward()
    optimizer.step()
    monitor.close()
    (snapshot,) = torchsat.read(tmp_path)
    record, written = snapshot["1.self_attn/softmax"], known(monitor.latest)["1.self_attn/softmax"]
    assert (record.kind, record.tails, record.saturated, record.derivative, record.peak, record.histogram) == ("softmax", "unknown", *[None] * 4)
    assert record.heads is not None
    assert written.heads is not None
    assert [head.rows for head in record.heads] == [20, 20]
    assert record.heads[1].entropy == pytest.approx(written.heads[1].entropy)
    assert record.entropy_min == pytest.approx(min(known(head.entropy) for head in written.heads))
    assert record.log_keys == pytest.approx(math.log(5))


def test_a_compiled_model_with_flex_attention_is_not_run_eager(caplog: pytest.LogCaptureFixture) -> None:
    from torch._dynamo import eval_frame
    from torch.nn.attention.flex_attention import flex_attention

    compiled_flex = torch.compile(flex_attention, backend="eager")

    def attend(q: Tensor) -> Tensor:
        out: Tensor = compiled_flex(q, q, q)
        return out

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.layer(attend(x)))

    assert uses_flex_attention(Net())
    assert not uses_flex_attention(Everything())
    model = Net()
    monitor = torchsat.watch(model, every=1, errors="raise")
    assert eval_frame._stance.stance == "default"
    compiled = torch.compile(model, backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(3):
            compiled(torch.randn(1, 1, 128, 16)).sum().backward()
            optimizer.step()
            assert eval_frame._stance.stance == "default"
    (message,) = [message for message in caplog.messages if message.startswith("torchsat")]
    assert "flex_attention" in message
    assert monitor.coverage.unseen[0][0] == "(model)"


def test_odd_attention_calls_end_nothing() -> None:
    class Net(nn.Module):
        keys = 0

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.layer(x)
            torch.tensor(1.0).softmax(0)
            return x + F.scaled_dot_product_attention(x, x[:, :, : self.keys], x[:, :, : self.keys])

    model = Net()
    monitor = torchsat.watch(model, every=1, errors="raise")
    x = torch.randn(2, 2, 5, 8)
    model(x).sum().backward()
    monitor.step()
    model.keys = 5
    model(x).sum().backward()
    monitor.step()
    monitor.flush()
    assert known(known(monitor.latest)["softmax_1"].heads)[0].rows == 10


def test_softmax_has_a_gradient_and_softmin_a_sign() -> None:
    x = torch.randn(32, 16)
    model = Calling(lambda z: torch.softmax(z, -1))
    record = one_step(model, x=x)["softmax"]
    z = model.layer(x).detach().double().requires_grad_()
    p = torch.softmax(z, -1)
    (grad_z,) = torch.autograd.grad(p.square().sum(), z)
    assert record.grad_z_rms == pytest.approx(grad_z.square().mean().sqrt().item(), rel=1e-5)
    assert record.grad_a_rms == pytest.approx((2 * p).square().mean().sqrt().item(), rel=1e-5)
    assert record.attenuation == pytest.approx((grad_z.norm() / (2 * p).norm()).item(), rel=1e-5)
    assert record.jacobian == pytest.approx((1 - p.square().sum(-1)).mean().item(), rel=1e-5)
    negative = Calling(lambda z: F.softmin(z, -1))
    negative.layer = model.layer
    assert one_step(negative, x=x)["softmax"].z_max == pytest.approx(-z.min().item(), rel=1e-6)


def test_a_map_with_four_axes_has_no_heads() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            q, k = (layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (self.q, self.k))
            out: Tensor = ((q @ k.transpose(-1, -2)) / 2 + 0.1).softmax(-1)
            return out

    heat = one_step(nn.Sequential(nn.Conv2d(1, 8, 1), nn.Softmax(-1)), x=torch.randn(4, 1, 5, 6))["1/softmax"]
    assert (len(known(heat.heads)), known(heat.heads)[0].rows) == (1, 4 * 8 * 5)
    assert len(known(one_step(Attention(), x=torch.randn(4, 5, 8))["softmax"].heads)) == 2


def test_flex_attention_is_found_however_it_is_written() -> None:
    import torch.nn.attention.flex_attention as fa

    class Dotted(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            out: Tensor = torch.utils.checkpoint.checkpoint(lambda: torch.nn.attention.flex_attention.flex_attention(q, q, q))
            return out

    class Aliased(nn.Module):
        @staticmethod
        def attend(q: Tensor) -> Tensor:
            return fa.flex_attention(q, q, q)

        def forward(self, q: Tensor) -> Tensor:
            return self.attend(q)

    assert uses_flex_attention(Dotted())
    assert uses_flex_attention(Aliased())


class Attending(nn.Module):
    """Attention as a fused call, as nn.MultiheadAttention, or as a softmax of logits that the model computes itself."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.q, self.k = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
        self.attention = nn.MultiheadAttention(16, 4, bias=False, batch_first=True)
        with torch.no_grad():
            self.attention.in_proj_weight[:16] = self.q.weight
            self.attention.in_proj_weight[16:32] = self.k.weight

    def heads(self, x: Tensor, layer: nn.Module) -> Tensor:
        out: Tensor = layer(x).unflatten(-1, (4, 4)).transpose(1, 2)
        return out

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "module":
            out: Tensor = self.attention(x, x, x, need_weights=False)[0]
            return out
        q, k = self.heads(x, self.q), self.heads(x, self.k)
        if self.kind == "fused":
            return F.scaled_dot_product_attention(q, k, k, is_causal=True)
        return torch.softmax(q @ k.transpose(-1, -2) / 2, -1) @ k


@pytest.mark.parametrize("kind", ["fused", "module", "softmax"])
def test_one_outlier_token_is_seen_in_the_largest_logits(kind: str) -> None:
    torch.manual_seed(0)
    model = Attending(kind)
    x = torch.randn(4, 96, 16)
    x[2, 71] *= 40
    (record,) = (each for each in one_step(model, lambda _: model(x), sample=2000).records if each.kind == "softmax")
    with torch.no_grad():
        z = model.heads(x, model.q) @ model.heads(x, model.k).transpose(-1, -2) / 2
        visible = torch.ones(96, 96, dtype=torch.bool).tril() if kind == "fused" else torch.ones(96, 96, dtype=torch.bool)
        # The first row of a causal attention sees one key, and does not count.
        visible = visible & (visible.sum(-1, keepdim=True) > 1)
    assert record.n < 4 * 4 * 96 * 96 / 10
    assert [known(head.logit_max) for head in known(record.heads)] == pytest.approx(
        z.masked_fill(~visible, -math.inf).amax((0, 2, 3)).tolist(), rel=1e-5
    )
    assert record.z_max == pytest.approx(z[..., visible].max().item(), rel=1e-5)
    assert record.z_min == pytest.approx(z[..., visible].min().item(), rel=1e-5)
    assert (record.nonfinite, record.inspected) == (0, 4 * 4 * 96 * 96)
    if kind == "softmax":
        assert record.a_max == pytest.approx(torch.softmax(z, -1).max().item(), rel=1e-5)
