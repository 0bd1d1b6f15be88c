"""Sites: which places of a model become one, how they are named, and what the coverage says about places that are not seen."""

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchsat
from tests.models import Calling, Everything, compiled, mlp
from tests.training import train


def test_what_cannot_be_measured_is_said() -> None:
    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = torch.ops.aten.sigmoid(x) * x.mean()
            return out

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.gru, self.attention, self.own = nn.LSTM(8, 8), nn.GRU(8, 8), nn.MultiheadAttention(8, 2), Own()
            self.softmax, self.never, self.act = nn.Softmax(-1), nn.Tanh(), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.softmax(self.own(self.act(self.lstm(x)[0])))
            return out

    model = Net()
    monitor = torchsat.watch(model, errors="raise")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(5, 8)).sum().backward()
    optimizer.step()
    unseen = dict(monitor.coverage.unseen)
    assert monitor.coverage.seen == (*(f"lstm.l0/{gate}" for gate in ("input", "forget", "cell", "output", "hidden")), "act", "softmax/softmax")
    assert set(unseen) == {"gru", "attention/softmax", "own/Sigmoid", "never"}
    assert unseen["gru"] == unseen["never"] == unseen["attention/softmax"] == "it has not run in an observed training pass"
    assert unseen["own/Sigmoid"].startswith("called where no hook of torch is heard: in a compiled or scripted function, in torch.ops")
    assert monitor.coverage.kinds == (("recurrent", 5), ("module", 1), ("softmax", 1))
    assert str(monitor.coverage).startswith("7 sites (5 gates, 1 module, 1 softmax) seen; not seen, or seen in part:\n  own/Sigmoid: called")


def test_include_and_exclude_choose_sites() -> None:
    def sites(**options: Any) -> tuple[str, ...]:
        model = nn.ModuleDict({"encoder": mlp(), "decoder": mlp()})
        monitor = torchsat.watch(model, **options)
        names = tuple(place for place, _ in monitor.coverage.unseen)
        monitor.close()
        return names

    assert sites() == ("encoder.1", "encoder.3", "decoder.1", "decoder.3")
    assert sites(include="encoder.*") == ("encoder.1", "encoder.3")
    assert sites(include=["*.1"], exclude=("decoder.*",)) == ("encoder.1",)
    model = nn.Sequential(nn.LSTM(3, 3))
    monitor = torchsat.watch(model, exclude="0.*", errors="raise")
    model(torch.randn(2, 3))[0].sum().backward()
    monitor.step()
    assert monitor.coverage == torchsat.Coverage((), ())


def test_site_names_hold_no_markup_and_no_wrappers() -> None:
    model = nn.ModuleDict({"<img src=x>": nn.Sequential(nn.Tanh()), "ok": compiled(nn.Sequential(nn.ReLU()))})
    monitor = torchsat.watch(model)
    assert [place for place, _ in monitor.coverage.unseen] == ["_img_src_x_.0", "ok.0"]


def test_a_model_without_activations_is_said(caplog: pytest.LogCaptureFixture) -> None:
    monitor = torchsat.watch(nn.Sequential(nn.Linear(3, 3), nn.MultiheadAttention(4, 2)), calls=False)
    assert "Sequential: no activation was found, nothing is watched" in caplog.text
    model = mlp()
    torchsat.watch(model, include="nope*", every=1)
    train(model, 2)
    assert caplog.text.count("nothing is watched") == 2
    assert "of its activations, include= and exclude= leave none" in caplog.text
    assert monitor.coverage.unseen[0][0] == "1/softmax"


def test_the_first_observation_is_announced(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    model = nn.Sequential(mlp(), nn.Softmax(-1))
    model[1].spare = nn.Tanh()
    torchsat.watch(model, errors="raise")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(4, 64))[0, 0].backward()
    optimizer.step()
    assert caplog.messages[0] == "torchsat: watching 3 sites (2 modules, 1 softmax) and 3 layers; not seen: 1 (1.spare), see monitor.coverage"


def test_what_is_heard_but_not_measured_is_listed() -> None:
    model = Everything()
    monitor = torchsat.watch(model, errors="raise")
    model(torch.randn(4, 5, 8)).sum().backward()
    assert monitor.coverage.unseen == (("log_softmax", "its derivative does not vanish: there is nothing to saturate"),)


def test_a_site_that_stops_is_said_once_and_forgotten_when_it_runs_again(caplog: pytest.LogCaptureFixture) -> None:
    class Net(Calling):
        both = True

        def forward(self, x: Tensor) -> Tensor:
            z = self.layer(x)
            return F.relu(z) + F.elu(z) if self.both else F.relu(z)

    model = Net(F.relu)
    monitor = torchsat.watch(model, every=1, errors="raise")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def train(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(4, 16)).sum().backward()
            optimizer.step()

    def unseen() -> tuple[tuple[str, str], ...]:
        return monitor.coverage.unseen

    train(2)
    model.both = False
    train(4)
    assert unseen() == ()
    train(4)
    assert unseen() == (("elu", "it ran before, but not in the last 5 observations"),)
    assert caplog.messages == ["torchsat: step 6: elu ran before, but not in the last observations."]
    model.both = True
    train(1)
    assert unseen() == ()
