"""Mixtures of experts: the choices of routers, compared with counts by hand, and what is told of routers that use few experts."""

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchsat
from tests.test_packing import together
from tests.truth import known
from torchsat.columns import EXPERTS, ROUTER
from torchsat.experts import Experts, is_idle
from torchsat.parts import Parts, TallyPart
from torchsat.record import Snapshot
from torchsat.report import report
from torchsat.rows import experts_of


class Mixture(nn.Module):
    """Eight experts, of which each token goes to two."""

    bias: Tensor

    def __init__(self, kind: str = "softmax", width: int = 16, experts: int = 8, k: int = 2) -> None:
        super().__init__()
        self.kind, self.k = kind, k
        self.router = nn.Linear(width, experts)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, width)) for _ in range(experts))
        self.register_buffer("bias", torch.zeros(experts))

    def scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The probabilities, and the numbers by which is chosen."""
        logits = self.router(x)
        if self.kind == "logits":
            return torch.softmax(logits, -1), logits
        p = torch.softmax(logits, -1) if self.kind == "softmax" else torch.sigmoid(logits)
        return p, p + self.bias if self.kind == "biased" else p

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "logits":
            values, chosen = self.router(x).topk(self.k, dim=-1)
            weights = torch.softmax(values, -1)
        else:
            p, by = self.scores(x)
            if self.kind == "switch":
                chosen, weights = torch.argmax(by, -1, keepdim=False).unsqueeze(-1), torch.max(by, dim=-1).values.unsqueeze(-1)
            else:
                chosen = torch.topk(by, self.k).indices
                weights = p.gather(-1, chosen)
        out = torch.zeros_like(x)
        for at, expert in enumerate(self.experts):
            rows, places = torch.where(chosen.reshape(-1, self.k) == at)
            out.view(-1, x.shape[-1]).index_add_(0, rows, expert(x.reshape(-1, x.shape[-1])[rows]) * weights.reshape(-1, self.k)[rows, places, None])
        return out


def observed(model: nn.Module, *batches: Tensor, **options: Any) -> Snapshot:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with torchsat.watch(model, errors="raise", **options) as monitor:
        for batch in batches:
            model(batch).square().mean().backward()
        optimizer.step()
    assert monitor.latest is not None
    return monitor.latest


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "biased", "logits", "switch"])
@pytest.mark.parametrize("shape", [(300, 16), (3, 100, 16)])
def test_load_entropy_and_margin_are_those_counted_by_hand(kind: str, shape: tuple[int, ...]) -> None:
    model = Mixture(kind, k=1 if kind == "switch" else 2)
    with torch.no_grad():
        model.bias.copy_(torch.randn(8) / 10)
    x = torch.randn(shape)
    (found,) = observed(model, x).experts
    with torch.no_grad():
        p, by = (each.reshape(300, 8).double() for each in model.scores(x))
    ordered, p = by.sort(-1, descending=True), p / p.sum(-1, keepdim=True)
    counts = [int((ordered.indices[:, : model.k] == at).sum()) for at in range(8)]
    assert (found.site, found.k, found.tokens, found.experts) == ("experts", model.k, 300, 8)
    assert found.load == pytest.approx([count / (300 * model.k) for count in counts], rel=1e-12)
    assert sum(found.load) == pytest.approx(1)
    assert found.busiest == pytest.approx(max(counts) * 8 / (300 * model.k))
    assert found.entropy == pytest.approx(float(-(p * p.log()).sum(-1).mean()) / math.log(8), rel=1e-5)
    values = ordered.values if kind == "biased" else p.sort(-1, descending=True).values
    assert found.margin == pytest.approx(float((values[:, model.k - 1] - values[:, model.k]).mean()), rel=1e-5)


def test_micro_batches_and_repeated_calls_are_counted_together() -> None:
    model, batches = Mixture(), torch.randn(3, 200, 16)
    parts = [observed(model, batch).experts[0] for batch in batches]
    (whole,) = observed(model, *batches).experts
    assert whole.tokens == 600
    assert whole.load == pytest.approx([sum(part.load[at] for part in parts) / 3 for at in range(8)], rel=1e-12)
    assert whole.entropy == pytest.approx(sum(part.entropy or 0.0 for part in parts) / 3, rel=1e-6)


def test_the_choices_of_ranks_add_up() -> None:
    """Each rank routes tokens of its own. The collapse of a router that all have is that of their choices together, whichever rank makes them."""

    def part(*choices: float) -> Parts:
        tokens = sum(choices) / 2
        router = torch.tensor([[tokens], [tokens], [tokens / 2], [tokens], [tokens / 4]], dtype=torch.float64)
        blocks = {EXPERTS.name: torch.tensor([choices], dtype=torch.float64), ROUTER.name: router}
        return Parts(tallies={(kind, "moe/experts"): TallyPart({"k": 2}, sums.shape[1], sums) for kind, sums in blocks.items()})

    (found,) = experts_of(together(part(900.0, 100.0, 0.0, 0.0), part(100.0, 700.0, 200.0, 0.0)).tallies)
    assert found == Experts("moe/experts", 2, 1000, (0.5, 0.4, 0.1, 0.0), 0.5, 0.25)
    assert found.dead == 1


def test_the_router_of_mixtral() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 50}
    config = transformers.MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True)
    model, tokens = transformers.MixtralForCausalLM(config), torch.randint(0, 50, (4, 8))
    optimizer, logits = torch.optim.SGD(model.parameters(), lr=0.0), []
    with torchsat.watch(model, errors="raise") as monitor:
        answer = model(input_ids=tokens, labels=tokens)
        answer.loss.backward()
        logits = [each.detach() for each in answer.router_logits]
        optimizer.step()
    assert monitor.latest is not None
    # The loss that balances the load chooses once more, from all layers together. That is not the choice of a router.
    assert [each.site for each in monitor.latest.experts] == [f"model.layers.{at}.mlp.gate/experts" for at in range(2)]
    for found, router in zip(monitor.latest.experts, logits, strict=True):
        p = torch.softmax(router, -1)
        chosen = p.topk(2).indices
        assert (found.k, found.tokens) == (2, 32)
        assert found.load == tuple(float((chosen == at).sum()) / 64 for at in range(4))
        assert found.entropy == pytest.approx(float(torch.special.entr(p).sum(-1).mean()) / math.log(4), rel=1e-5)


def test_of_many_tokens_all_choices_are_counted_and_the_entropy_is_read_at_some() -> None:
    model, x = Mixture(), torch.randn(20000, 16)
    (found,) = observed(model, x).experts
    with torch.no_grad():
        p = model.scores(x)[0]
    assert found.tokens == 20000
    assert found.load[3] == float((p.topk(2).indices == 3).sum()) / 40000
    assert found.entropy == pytest.approx(float(torch.special.entr(p).sum(-1).mean()) / math.log(8), abs=0.01)


class Chooser(nn.Module):
    """Chooses the best of eight values, and holds no eight experts."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.conv, self.parts = nn.Linear(16, 8), nn.Conv1d(1, 8, 3), nn.ModuleList(nn.Tanh() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        z = torch.softmax(self.layer(x), -1)
        for part in self.parts:
            z = part(z)
        out: Tensor = z.topk(2).values + self.conv(x.unsqueeze(1)).mean((1, 2)).unsqueeze(1)
        return out


def test_other_choices_are_no_routers() -> None:
    assert observed(Chooser(), torch.randn(50, 16)).experts == ()


class Slices(nn.Module):
    """Experts as slices of parameters, with a router that is a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = Gate(), Stacked()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.experts(x, *self.gate(x))
        return out


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 16))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = F.linear(x, self.weight).sigmoid()
        # The best two of each group, as DeepSeek-V3 masks groups; of one group none is masked.
        groups = scores.view(-1, 1, 6).topk(2, dim=-1)[0].sum(-1)
        chosen = torch.topk((scores + 0 * groups).masked_fill(torch.zeros(6, dtype=torch.bool), -math.inf), k=3, dim=-1, sorted=False)[1]
        return scores.gather(1, chosen), chosen


class Stacked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 16, 16) / 4)

    def forward(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        return torch.einsum("tki,tk->ti", torch.einsum("ti,tkij->tkj", x, self.weight[chosen]), weights)


def test_a_router_of_its_own_and_experts_in_one_parameter() -> None:
    mixture, x = Slices(), torch.randn(40, 16)
    model = nn.Sequential(mixture, nn.Linear(16, 1))
    (found,) = observed(model, x).experts
    with torch.no_grad():
        chosen = F.linear(x, mixture.gate.weight).topk(3).indices
    assert (found.site, found.k, found.tokens) == ("0.gate/experts", 3, 40)
    assert found.load == pytest.approx([float((chosen == at).sum()) / 120 for at in range(6)])
    # 20 choices per expert are too few to tell which are dead.
    assert found.dead is None


def test_a_pass_that_does_not_count_and_a_place_that_is_not_wanted_have_no_mixture() -> None:
    model, x = Mixture(), torch.randn(100, 16)
    assert observed(model, x, exclude="experts").experts == ()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with torchsat.watch(model, errors="raise") as monitor:
        with torch.no_grad():
            model(x)
        model(x[:7]).sum().backward()
        optimizer.step()
    assert monitor.latest is not None
    assert [each.tokens for each in monitor.latest.experts] == [7]


def test_numbers_that_are_known_by_hand() -> None:
    found = Experts("e", 2, 1000, (0.5, 0.3, 0.15, 0.005, 0.045), 0.5, 0.1)
    assert (found.experts, found.dead, found.busiest) == (5, 1, 2.5)
    # Even is 1, and at most 5 / 2.
    assert found.concentration == 1.0
    assert Experts("e", 1, 1000, (0.25,) * 4, None, None).concentration == 0
    assert Experts("e", 2, 159, (0.5, 0.3, 0.15, 0.005, 0.045), None, None).dead is None
    assert Experts("e", 2, 160, (0.5, 0.3, 0.15, 0.005, 0.045), None, None).dead == 1


class Masked(Mixture):
    """Runs all experts on all tokens, and multiplies what was not chosen by zero."""

    def forward(self, x: Tensor) -> Tensor:
        p, _ = self.scores(x)
        weights, chosen = torch.topk(p, self.k)
        parts = [expert(x) * (weights * (chosen == at)).sum(-1, keepdim=True) for at, expert in enumerate(self.experts)]
        return torch.stack(parts).sum(0)


class Tower(nn.Module):
    def __init__(self, depth: int = 2, mixture: type[Mixture] = Mixture) -> None:
        super().__init__()
        self.mixtures = [mixture() for _ in range(depth)]
        self.blocks, self.head = nn.ModuleList(self.mixtures), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = F.layer_norm(x + block(x), (16,))
        out: Tensor = self.head(x)
        return out


def trained(model: Tower, steps: int, log_dir: Path | None = None, balance: float = 0.0) -> torchsat.Monitor:
    """A classification of 256 tokens at a time, with a part of the loss that balances the load if that is wanted."""
    torch.manual_seed(1)
    teacher = torch.randn(16, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    with torchsat.watch(model, log_dir, every=5, budget=None, errors="raise") as monitor:
        for _ in range(steps):
            x = torch.randn(256, 16)
            loss = F.cross_entropy(model(x), (x @ teacher).argmax(1))
            for block in model.mixtures if balance else ():
                p = torch.softmax(block.router(x), -1)
                load = F.one_hot(p.topk(2).indices, 8).float().mean((0, 1))
                loss = loss + balance * 8 * (load * p.mean(0)).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return monitor


@pytest.mark.parametrize(
    ("place", "idle"),
    [
        ("blocks.0.experts.3.up", True),
        ("blocks.0.experts.2.up", False),
        ("blocks.0.experts.9.up", False),  # there is no such expert
        ("blocks.1.experts.3.up", False),  # of another mixture
        ("blocks.0.layers.3.up", False),  # no expert
        ("blocks.0.gate", False),
    ],
)
@pytest.mark.parametrize("router", ["blocks.0", "blocks.0.gate"])
def test_what_lies_in_an_idle_expert_is_known_by_its_name(router: str, place: str, idle: bool) -> None:
    mixture = Experts(f"{router}/experts", 1, 400, (0.5, 0.25, 0.25, 0.0), 0.5, 0.1)
    assert is_idle(place, [mixture]) is idle
    assert is_idle(place, []) is False


def test_an_idle_expert_is_told_of_its_router_and_not_of_its_layers() -> None:
    """Its layers get no gradient, which no initialisation and no activation is to blame for."""
    torch.manual_seed(0)
    model = Tower(mixture=Masked)
    with torch.no_grad():
        for block in model.mixtures:
            block.router.bias[:2] += 20
    monitor = trained(model, 40)
    assert {each.rule for each in monitor.alerts} == {"expert_collapse"}
    latest = known(monitor.latest)
    idle = [each.grad_norm for each in latest.weights if ".experts.5." in each.name]
    assert idle == [0.0] * len(idle)
    assert idle


class Classifier(nn.Module):
    """As many blocks as classes, and the argmax of the logits beside them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.stem, self.head = kind, nn.Linear(8, 16), nn.Linear(16, 4)
        self.blocks = nn.ModuleList(nn.Linear(16, 16) if kind == "functions" else nn.Sequential(nn.Linear(16, 16), nn.GELU()) for _ in range(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        for block in self.blocks:
            x = x + (F.relu(block(x)) if self.kind == "functions" else block(x))
        logits = self.head(x)
        return logits, (logits.detach() if self.kind == "detached" else logits).argmax(-1)


@pytest.mark.parametrize("kind", ["modules", "functions", "detached"])
def test_the_answer_of_a_classifier_is_no_choice_of_experts(kind: str) -> None:
    model = Classifier(kind)
    snapshot = torchsat.probe(model, torch.randn(64, 8), loss=lambda out: F.cross_entropy(out[0], torch.zeros(64, dtype=torch.long)))
    assert snapshot.experts == ()


class Careful(Mixture):
    """Takes the maximum of the logits before the softmax, or of the probabilities for a log."""

    def forward(self, x: Tensor) -> Tensor:
        logits = self.router(x)
        p = torch.softmax(logits - logits.max(-1, keepdim=True)[0] if self.kind == "stable" else logits, -1)
        if self.kind == "logged before":
            self.sure = p.max(-1).values.mean()
        weights, chosen = torch.topk(p, self.k)
        if self.kind == "logged behind":
            self.sure = p.max(-1).values.mean()
        parts = [expert(x) * (weights * (chosen == at)).sum(-1, keepdim=True) for at, expert in enumerate(self.experts)]
        return torch.stack(parts).sum(0)


@pytest.mark.parametrize("kind", ["stable", "logged before", "logged behind"])
def test_a_maximum_beside_topk_is_no_choice(kind: str) -> None:
    model = Careful(kind)
    x = torch.randn(200, 16)
    counts = torch.bincount(model.router(x).topk(2).indices.flatten(), minlength=8)
    (found,) = torchsat.probe(model, x, loss=lambda out: out.square().mean()).experts
    assert found.k == 2
    assert found.tokens == 200
    assert list(found.load) == pytest.approx((counts.double() / 400).tolist(), abs=1e-12)
    assert 0 < known(found.entropy) < 1


@pytest.mark.parametrize("offset", [10.0, 30.0])
def test_a_router_that_has_collapsed_is_not_told_as_attention(offset: float) -> None:
    torch.manual_seed(0)
    model = Tower(mixture=Masked)
    with torch.no_grad():
        for block in model.mixtures:
            block.router.bias[5] += offset
    monitor = trained(model, 60)
    assert monitor.alerts[0].rule == "expert_collapse"
    assert not {"attention_collapse", "logit_growth"} & {each.rule for each in monitor.alerts}


def test_routers_that_learn_and_are_balanced_are_healthy() -> None:
    torch.manual_seed(0)
    monitor = trained(Tower(), 60, balance=0.01)
    assert monitor.alerts == ()
    assert monitor.latest is not None
    assert all(each.dead == 0 and each.alert_level is not None and each.alert_level < 0.5 for each in monitor.latest.experts)


def test_routers_that_send_all_tokens_to_the_same_experts_are_told_once_with_the_cause_and_are_written(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Tower()
    with torch.no_grad():
        for block in model.mixtures:
            block.router.bias[:2] += 20
    monitor = trained(model, 30, tmp_path)
    (alert,) = [each for each in monitor.alerts if each.rule == "expert_collapse"]
    assert (alert.site, alert.severity, alert.value, alert.also) == ("blocks.0/experts", "critical", 0.75, ("blocks.1/experts",))
    assert alert.causes[0].name == "router_collapse"
    assert "6 of 8 experts" in alert.causes[0].evidence
    latest = monitor.latest
    assert latest is not None
    read = torchsat.read(tmp_path)
    assert read[-1].experts == latest.experts
    assert latest.experts[0].load[:2] == pytest.approx((0.5, 0.5))
    assert Snapshot.from_dict(json.loads(json.dumps(latest.as_dict()))).experts == latest.experts
    printed, document = io.StringIO(), io.StringIO()
    report(tmp_path, printed)
    report(tmp_path, document, "json")
    text = printed.getvalue()
    assert "2 of 2 mixtures of experts are using few experts since step 0, worst blocks.0/experts" in " ".join(text.split())
    assert "Mixtures of experts" in text
    (run,) = json.loads(document.getvalue())["runs"]
    assert run["last"]["experts"][0]["load"] == list(latest.experts[0].load)
