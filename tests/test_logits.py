"""The logits of the loss as a site: where they are found, and what is measured of them, against a direct computation in float64."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchsat
from tests.conftest import record
from tests.training import train
from tests.truth import known
from torchsat.causes import Scene, explain
from torchsat.record import Alert, Record, Snapshot

CLASSES = 7
Loss = Callable[[Any, Tensor], Tensor]


def targets(*shape: int) -> Tensor:
    return torch.randint(CLASSES, shape)


class Giving(nn.Module):
    """Gives the output of a layer in some structure."""

    def __init__(self, give: Callable[[Tensor], Any] = lambda z: z) -> None:
        super().__init__()
        self.act, self.layer, self.give = nn.Tanh(), nn.Linear(5, CLASSES), give

    def forward(self, x: Tensor) -> Any:
        return self.give(4 * self.layer(self.act(x)))


def steps_of(model: nn.Module, loss: Loss, x: Tensor, count: int = 2, **options: Any) -> list[tuple[Snapshot, Tensor]]:
    """Each snapshot of a training, with the logits of its step as [rows, classes] in float64."""
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.3), list[tuple[Snapshot, Tensor]]()
    with torchsat.watch(model, every=1, errors="raise", **{"extras": ("logits",), **options}) as monitor:
        for _ in range(count):
            optimizer.zero_grad()
            with torch.no_grad():
                z = 4 * F.linear(x.tanh().double(), *(each.double() for each in model.get_submodule("layer").parameters()))
            loss(model(x), x).backward()
            optimizer.step()
            found.append((known(monitor.latest), z.reshape(-1, CLASSES)))
    return found


def check(snapshot: Snapshot, z: Tensor, name: str = "logits") -> None:
    """Compare the record of logits with these."""
    (found,) = (each for each in snapshot.records if each.activation == "log_softmax")
    assert (found.site, found.kind, found.output, found.elements) == (name, "softmax", True, z.numel())
    log_z, p = z.logsumexp(1), torch.softmax(z, 1)
    expected = {
        "z_max": z.max(),
        "z_min": z.min(),
        "log_z": log_z.mean(),
        "log_z_rms": log_z.square().mean().sqrt(),
        "entropy": -torch.special.xlogy(p, p).sum(1).mean() / math.log(CLASSES),
        "logit_std": z.var(1, correction=0).mean().sqrt(),
    }
    for field, value in expected.items():
        assert getattr(found, field) == pytest.approx(value.item(), rel=1e-5), field
    assert found.entropy_min is None


@pytest.mark.parametrize(
    ("give", "shape", "loss"),
    [
        (lambda z: z, (6,), lambda out, x: F.cross_entropy(out, targets(6))),
        (lambda z: {"state": z.square(), "logits": z}, (6,), lambda out, x: F.nll_loss(F.log_softmax(out["logits"], -1), targets(6))),
        (lambda z: (z.new_zeros(3), z), (4, 3), lambda out, x: F.cross_entropy(out[1].view(-1, CLASSES), targets(12))),
        (lambda z: z, (4, 3), lambda out, x: F.cross_entropy(out.transpose(1, 2), targets(4, 3))),
        (lambda z: z.transpose(1, 2), (4, 3), lambda out, x: F.cross_entropy(out, targets(4, 3))),
        (lambda z: z.permute(0, 3, 1, 2), (2, 3, 4), lambda out, x: F.cross_entropy(out, targets(2, 3, 4), label_smoothing=0.1)),
    ],
    ids=["cross_entropy", "a dict", "tokens", "transposed in the loss", "transposed in the model", "images"],
)
def test_the_logits_that_a_model_returns_are_measured(give: Callable[[Tensor], Any], shape: tuple[int, ...], loss: Loss) -> None:
    found = steps_of(Giving(give), loss, torch.randn(*shape, 5), count=3)
    # A tensor [samples, classes, length] is only known for one when its loss has been seen: from the second observation on.
    late = len(shape) == 2 and isinstance(out := give(torch.zeros(4, 3, CLASSES)), Tensor) and out.shape[1] == CLASSES
    assert ("logits" in found[0][0]) is not late
    for snapshot, z in found[late:]:
        check(snapshot, z)


def test_a_cross_entropy_inside_the_model_is_measured_once() -> None:
    class Own(Giving):
        def forward(self, x: Tensor) -> Any:
            z = 4 * self.layer(self.act(x))
            return {"loss": F.cross_entropy(z, torch.arange(len(x)) % CLASSES), "logits": z}

    for snapshot, z in steps_of(Own(), lambda out, x: out["loss"], torch.randn(8, 5)):
        check(snapshot, z)


def test_what_is_no_logits_is_not_measured() -> None:
    def names(loss: Loss, **options: Any) -> set[str]:
        return {each.site for snapshot, _ in steps_of(Giving(), loss, torch.randn(6, 5), **options) for each in snapshot.records}

    assert names(lambda out, x: out.square().mean()) == {"act"}
    # Logits that the loss scales are others than those that the model returns.
    assert names(lambda out, x: F.cross_entropy(out / 3, targets(6))) == {"act"}
    assert names(lambda out, x: F.cross_entropy(out, targets(6)), extras=()) == {"act"}
    assert names(lambda out, x: F.cross_entropy(out, targets(6)), exclude="logits") == {"act"}


def test_micro_batches_merge_and_evaluation_is_left_out() -> None:
    model = Giving()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    batches = [torch.randn(rows, 5) for rows in (6, 10, 3)]
    with torchsat.watch(model, every=1, errors="raise", extras=("logits",)) as monitor:
        for x in batches:
            F.cross_entropy(model(x), targets(len(x))).backward()
            with torch.no_grad():
                model(100 * x)
        optimizer.step()
        with torch.no_grad():
            z = 4 * F.linear(torch.cat(batches).tanh().double(), *(each.double() for each in model.layer.parameters()))
        check(known(monitor.latest), z)


def test_training_is_bit_for_bit_the_same() -> None:
    def run(watched: bool) -> list[float]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 3))
        if not watched:
            return train(model)
        with torchsat.watch(model, every=1, errors="raise", extras=("logits",)) as monitor:
            losses = train(model)
            assert "logits" in known(monitor.latest)
        return losses

    assert run(True) == run(False)


def test_a_classifier_that_is_sure_raises_no_alert() -> None:
    x, alerts = 3 * torch.eye(CLASSES), list[Alert]()
    model = nn.Linear(CLASSES, CLASSES)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.5)
    with torchsat.watch(model, every=1, errors="raise", extras=("logits",), on_alert=alerts.append) as monitor:
        for _ in range(120):
            optimizer.zero_grad()
            F.cross_entropy(model(x), torch.arange(CLASSES)).backward()
            optimizer.step()
        assert known(known(monitor.latest)["logits"].entropy) < 0.01
    assert alerts == []


def test_drifted_logits_before_a_nan_are_told_with_a_z_loss() -> None:
    def logits(log_z: float) -> Record:
        return record("logits", kind="softmax", activation="log_softmax", output=True, log_z=log_z, log_z_rms=abs(log_z), log_keys=2.0)

    broken = record("act", nonfinite=3)
    alert = Alert("act", "nonfinite", "critical", 3.0, 1.0, 9, 9, True, "")

    def told(log_z: float) -> str:
        first = Snapshot(0, 0.0, (replace(broken, nonfinite=0), logits(2.0)))
        before = Snapshot(8, 0.0, (replace(broken, nonfinite=0), logits(log_z)))
        (cause,) = explain(alert, Scene(Snapshot(9, 0.0, (broken, logits(log_z))), first, before))
        assert cause.name == "numeric_range"
        return cause.remedy

    assert told(-300.0).startswith("add a z-loss")
    assert "z-loss" not in told(3.0)
