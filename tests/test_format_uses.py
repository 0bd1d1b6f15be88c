"""What number formats do to a model: which tensors are counted, how their numbers merge, and what is told of them."""

import copy
import io
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torchsat
from torchsat.columns import FORMATS as COLUMNS
from torchsat.columns import FORMATS_OF_WEIGHTS
from torchsat.forecast import forecasts
from torchsat.formats import count
from torchsat.number_formats import FORMATS, OF_SITE, FormatUse
from torchsat.observe.ingraph import why_not_in_graph
from torchsat.parts import Parts, SitePart, TallyPart
from torchsat.record import Snapshot
from torchsat.report import report
from torchsat.rows import to_formats

from .facts import site_facts
from .test_formats import KINDS, columns
from .test_packing import row, sent, together


class Scaled(nn.Module):
    """A model whose output is multiplied, so that its gradients have a size that a test chooses."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.first, self.act, self.second, self.last, self.scale = nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.GELU(), scale

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.last(self.second(self.act(self.first(x)))).float() * self.scale
        return output


def trained(model: nn.Module, steps: int = 1, dtype: torch.dtype | None = None, **options: Any) -> torchsat.Monitor:
    """A monitor of a few steps, each of them observed."""
    optimizer, torch_state = torch.optim.SGD(model.parameters(), lr=0.01), torch.Generator().manual_seed(7)
    with torchsat.watch(model, every=1, errors="raise", **{"extras": ("formats",), **options}) as monitor:
        for _ in range(steps):
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                loss = model(torch.randn(32, 64, generator=torch_state)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return monitor


def use(snapshot: Snapshot | None, place: str, tensor: str, name: str) -> FormatUse:
    assert snapshot is not None
    (found,) = [each for each in snapshot.formats_at[place] if (each.tensor, each.format) == (tensor, name)]
    return found


def test_each_tensor_of_a_site_and_of_a_layer_is_counted_as_it_is() -> None:
    model, kept = Scaled(0.1), dict[str, Tensor]()
    model.act.register_forward_hook(lambda module, args, a: kept.update(z=args[0].detach().clone(), a=a.detach().clone()))

    def keep(module: nn.Module, given: Any, grad: Any) -> None:
        kept.update(grad_z=given[0].clone(), grad_a=grad[0].clone())

    model.act.register_full_backward_hook(keep)
    model.first.weight.register_post_accumulate_grad_hook(lambda p: kept.update(weight=p.detach().clone(), grad=torch.clone(p.grad)))
    latest = trained(model).latest
    assert latest is not None
    for place, tensors in (("act", OF_SITE), ("first", ("weight", "grad"))):
        assert {each.tensor for each in latest.formats_at[place]} == set(tensors)
        for tensor in tensors:
            expected = columns(kept[tensor])
            for known in FORMATS:
                found = use(latest, place, tensor, known.name)
                assert (found.n, found.in_use) == (kept[tensor].numel(), False)
                for kind in (*KINDS, "zero"):
                    assert getattr(found, kind) == pytest.approx(expected[known.name][kind] / found.n, abs=1e-12)
    assert (use(latest, "act", "grad_z", "fp16").subnormal or 0.0) > 0.9


@pytest.mark.parametrize(("dtype", "name"), [(torch.float16, "fp16"), (torch.bfloat16, "bf16")])
def test_the_format_in_use_is_that_of_the_tensor(dtype: torch.dtype, name: str) -> None:
    latest = trained(Scaled(), dtype=dtype).latest
    assert latest is not None
    for tensor in OF_SITE:
        found = [each for each in latest.formats_at["act"] if each.tensor == tensor]
        assert [each.format for each in found if each.in_use] == [name]
        mine = use(latest, "act", tensor, name)
        assert (mine.flushed, mine.clamped) == (None, None)
        assert mine.subnormal is not None
    assert not any(each.in_use for each in latest.formats_at["first"])


def test_a_gradient_is_counted_with_the_factor_of_a_grad_scaler() -> None:
    shares = []
    for factor in (1.0, 2.0**16):
        torch.manual_seed(0)
        model = Scaled(0.1)
        scaler, optimizer = torch.amp.GradScaler("cpu", factor), torch.optim.SGD(model.parameters(), lr=0.01)
        with torchsat.watch(model, extras="formats", errors="raise") as monitor:
            scaler.scale(model(torch.randn(32, 64)).square().mean()).backward()
            scaler.step(optimizer)
        shares.append([use(monitor.latest, place, tensor, "fp16").subnormal for place, tensor in (("act", "grad_a"), ("first", "grad"))])
    assert (shares[0][0] or 0.0) > 0.9
    assert shares[1][0] is not None
    assert shares[1][0] < 0.01
    # The optimizer gets gradients of weights without the factor.
    assert shares[0][1] == shares[1][1]


def test_training_is_bit_for_bit_the_same() -> None:
    weights = []
    for options in ({"extras": ()}, {"extras": ("formats",)}):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(inplace=True), nn.Dropout(0.1), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 64))
        trained(model, steps=3, dtype=torch.bfloat16, **options)
        weights.append([*(value.clone() for value in model.state_dict().values()), torch.get_rng_state()])
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


def test_nothing_is_measured_unless_it_is_asked_for() -> None:
    latest = trained(Scaled(), extras=()).latest
    assert latest is not None
    assert latest.formats == ()
    assert latest.formats_at == {}
    assert "formats" not in latest.as_dict()


def test_micro_batches_and_calls_of_one_site_merge() -> None:
    linear, parts = nn.Linear(64, 64, bias=False), (torch.randn(8, 64), 1e-4 * torch.randn(24, 64))
    model = nn.Sequential(linear, nn.Tanh())
    optimizer, expected = torch.optim.SGD(model.parameters(), lr=0.0), dict.fromkeys(KINDS, 0.0)
    with torchsat.watch(model, extras="formats", errors="raise") as monitor:
        for x in parts:
            model(x).sum().backward()
            found = columns(linear(x).detach())["fp16"]
            expected = {kind: expected[kind] + found[kind] for kind in KINDS}
        optimizer.step()
    mine = use(monitor.latest, "1", "z", "fp16")
    assert mine.n == 32 * 64
    assert [getattr(mine, kind) for kind in KINDS] == [expected[kind] / mine.n for kind in KINDS]
    assert mine.subnormal is not None
    assert 0.4 < mine.subnormal < 0.8


def test_a_checkpoint_is_counted_once() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(64, 64), nn.Tanh())

        def forward(self, x: Tensor) -> Any:
            return checkpoint(self.body, x, use_reentrant=False)

    latest = trained(Checkpointed()).latest
    assert [use(latest, "body.1", tensor, "fp16").n for tensor in OF_SITE] == [32 * 64] * 4


def test_a_softmax_is_counted_and_gates_inside_a_kernel_are_not() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.scores = nn.LSTM(64, 32, batch_first=True), nn.Linear(32, 16)

        def forward(self, x: Tensor) -> Tensor:
            return torch.softmax(self.scores(self.rnn(x[:, None])[0]), -1)

    latest = trained(Reader()).latest
    assert latest is not None
    assert {each.tensor for each in latest.formats_at["softmax"]} == set(OF_SITE)
    assert not any(place.startswith("rnn.l0/") for place in latest.formats_at)
    assert {each.tensor for each in latest.formats_at["rnn.weight_ih_l0"]} == {"weight", "grad"}


def of_rank(x: Tensor, weight: Tensor) -> Parts:
    """What one rank has counted of its rows of z, and of a weight that every rank holds."""
    block = torch.nn.functional.pad(count(x, None, 0), (0, 3 * len(FORMATS)))
    held = torch.nn.functional.pad(count(weight, None, 0), (0, len(FORMATS)))
    tallies = {
        (COLUMNS.name, "act"): TallyPart({"z": "float16"}, block.shape[1], block),
        (FORMATS_OF_WEIGHTS.name, "layer"): TallyPart({"weight": "float32"}, held.shape[1], held.new_empty(0, held.shape[1]), held),
    }
    return Parts({"act": SitePart(site_facts(), row(n=1, read=1, elements=1))}, {}, tallies)


def test_ranks_merge_to_what_one_process_counts() -> None:
    # Blocks of nvfp4 depend on the largest element of the tensor, which each rank takes of its own.
    x, weight = torch.randn(24, 64) * torch.exp2(3 * torch.randn(24, 64)), torch.randn(16, 32)
    x[0, 0] = x[12, 0] = 1e6
    alone = to_formats(sent(of_rank(x, weight)).tallies)
    merged = to_formats(together(of_rank(x[:12], weight), of_rank(x[12:], weight)).tallies)
    assert merged == alone
    assert {(each.place, each.n) for each in merged} == {("act", 24 * 64), ("layer", 16 * 32)}
    assert [each.format for each in merged if each.in_use] == ["fp16"]
    assert any(each.flushed for each in merged if each.place == "act")


def test_a_rank_without_a_place_changes_nothing() -> None:
    x, weight = torch.randn(8, 64), torch.randn(4, 32)
    one = of_rank(x, weight)
    idle = Parts(one.sites, {}, {key: TallyPart(part.facts, part.width) for key, part in one.tallies.items()})
    assert to_formats(together(one, idle).tallies) == to_formats(sent(one).tallies)


def test_files_hold_what_was_measured(tmp_path: Any) -> None:
    latest = trained(Scaled(), 2, torch.bfloat16, log_dir=tmp_path).latest
    assert latest is not None
    (_, read) = torchsat.read(tmp_path)
    assert read.formats == latest.formats != ()
    assert Snapshot.from_dict(json.loads(json.dumps(read.as_dict()))).formats == latest.formats
    told = {form: io.StringIO() for form in ("text", "markdown", "json", "html")}
    for form, out in told.items():
        report(tmp_path, out, form)  # type: ignore[arg-type]
    sentences = forecasts(latest.formats)
    document = json.loads(told["json"].getvalue())["runs"][0]
    assert document["forecasts"] == sentences
    assert len(document["last"]["formats"]) == len(latest.formats)
    assert "What number formats would do" in told["text"].getvalue()
    assert "Forecast: " in told["text"].getvalue()
    assert "What number formats would do" in told["markdown"].getvalue()
    assert "Forecast: " in told["html"].getvalue()


def one_use(place: str, name: str, tensor: str = "grad_z", **shares: float) -> FormatUse:
    known = {"zero": 0.0, "flushed": 0.0, "clamped": 0.0, "subnormal": 0.0, "smallest": 0.0}
    return FormatUse(place, tensor, name, False, 4096, **{**known, **shares})


def test_forecasts_name_the_worst_place_of_each_format() -> None:
    uses = [
        one_use("layers.3", "nvfp4", flushed=0.06),
        one_use("layers.17", "nvfp4", flushed=0.12),
        one_use("layers.17", "mxfp8", "z", clamped=0.02, flushed=0.001),
        one_use("layers.17", "bf16"),
        FormatUse("layers.3", "z", "fp16", True, 4096, 0.0, None, None, 0.9, 0.5),
    ]
    assert forecasts(uses) == [
        "layers.17 would clamp 2.0 % of z in mxfp8",
        "layers.17 would flush 12 % of dL/dz in nvfp4, and 1 more place would lose 5.0 % or more of a tensor",
        "no place would lose 1.0 % of a tensor in bf16",
    ]
    assert forecasts([]) == []


@pytest.mark.parametrize(("scale", "fires"), [(0.03, True), (1.0, False)])
def test_a_gradient_that_underflows_is_told_with_its_cause(scale: float, fires: bool) -> None:
    torch.manual_seed(0)
    monitor = trained(Scaled(scale), 6, torch.float16)
    alerts = [alert for alert in monitor.alerts if alert.rule == "underflow"]
    assert bool(alerts) == fires
    if fires:
        (alert,) = alerts
        lost = use(monitor.latest, alert.site, "grad_z", "fp16").lost
        assert lost is not None
        assert 0.05 < alert.value <= 1 / 3
        (cause,) = alert.causes
        assert cause.name == "numeric_range"
        assert "the smallest number of fp16" in cause.evidence
        assert "GradScaler" in cause.advice
        assert "its gradient underflows" in alert.message


def test_a_gradient_that_is_zero_everywhere_in_fp16_may_have_been_flushed() -> None:
    (alert,) = trained(Scaled(1e-8), 4, torch.float16).alerts
    assert alert.rule == "vanishing_gradient"
    assert [cause.name for cause in alert.causes] == ["numeric_range", "activation_choice"]
    assert "3e-08 or smaller is 0" in alert.causes[0].evidence


def test_a_probe_takes_it_and_leaves_no_trace() -> None:
    model = Scaled()
    before = copy.deepcopy(model.state_dict())
    snapshot = torchsat.probe(model, torch.randn(32, 64), extras=("formats",))
    assert {each.tensor for each in snapshot.formats_at["act"]} == set(OF_SITE)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.skipif(why_not_in_graph() is not None, reason=f"nothing is measured in a graph: {why_not_in_graph()}")
def test_a_compiled_graph_gives_the_same_numbers() -> None:
    x, found = torch.randn(32, 64), []
    for compiles in (False, True):
        torch.manual_seed(4)
        model = Scaled()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with torchsat.watch(model, every=1, extras="formats", compiled="in_graph" if compiles else "eager", errors="raise") as monitor:
            called = torch.compile(model, backend="eager") if compiles else model
            for _ in range(2):
                called(x).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        assert monitor.latest is not None
        found.append(set(monitor.latest.formats))
    torch.compiler.reset()
    assert found[0] == found[1] != set()
