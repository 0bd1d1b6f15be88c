"""Dormant units that are revived as a remedy: which ones, and what becomes of the model."""

import copy

import torch
from torch import Tensor, nn

import torchsat
from tests.test_diagnosis import stack
from tests.test_trial import loss
from torchsat import REMEDIES
from torchsat.trial import _context, _Plan


def data() -> list[tuple[Tensor, Tensor]]:
    """Eight batches of 32 samples."""
    return [(x, x[:, :10].argmax(1)) for x in torch.randn(8, 32, 64)]


def with_dormant_units() -> nn.Sequential:
    """Of the 32 units of its first layer 12 are dead, and 4 are dormant but alive; of the 16 of its second one 6 are dead."""
    first, second = nn.Linear(64, 32), nn.Linear(32, 16)
    with torch.no_grad():
        first.bias[:12] = -1e4
        first.weight[12:16] *= 1e-5
        first.bias[12:16] = 0.0
        second.bias[:6] = -1e4
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Linear(16, 10))


def weights_of(model: nn.Sequential) -> list[Tensor]:
    """The weights of its three layers."""
    return [parameter for parameter in model.parameters() if parameter.ndim == 2]


def test_dormant_units_are_revived_without_a_change_of_what_the_model_computes() -> None:
    model, batches = with_dormant_units(), data()
    (remedy,) = [each for each in REMEDIES if each.name == "revived units"]
    context, _ = _context(_Plan(model, batches, loss, None, 1, 1, 1, {}))
    assert {site: int((sizes <= 0.025 * sizes.mean()).sum()) for site, sizes in context.sizes.items()} == {"1": 16, "3": 6}
    before, revived, x = copy.deepcopy(model), copy.deepcopy(model), batches[0][0]
    assert remedy.apply(revived, context) == "22 dormant units of 2 layers drawn anew, their outgoing weights 0"
    # What was dead gave nothing; what was nearly silent gave next to nothing.
    assert torch.allclose(before(x), revived(x), atol=1e-3)
    alive = revived[1](revived[0](x))
    assert (alive > 0).any(0).all()
    (one, two, three), (old_one, old_two, _) = weights_of(revived), weights_of(before)
    # What feeds a unit that was revived too is drawn anew, whichever units it comes from.
    assert not two[6:, :16].any()
    assert not three[:, :6].any()
    assert torch.equal(two[6:, 16:], old_two[6:, 16:])
    assert torch.equal(one[16:], old_one[16:])


def test_the_code_that_revives_units_does_what_the_trial_did() -> None:
    model, batches = with_dormant_units(), data()
    trials = torchsat.try_remedies(
        model, batches, loss, steps=8, progress=False, remedies=[each for each in REMEDIES if each.name == "revived units"]
    )
    code = trials["revived units"].code
    x, optimizer = torch.cat([x for x, _ in batches]), torch.optim.Adam(model.parameters(), lr=0.0)
    loss(model, batches[0]).backward()
    optimizer.step()
    exec(code, {"torch": torch, "model": model, "x": x, "optimizer": optimizer})
    assert not optimizer.state
    assert not any(module._forward_hooks for module in model)
    assert (model[:2](x) > 0).any(0).all()
    _, two, three = weights_of(model)
    # What feeds a unit that was revived too is drawn anew, whichever units it comes from.
    assert not two[6:, :16].any()
    assert not three[:, :6].any()


def test_the_units_of_a_convolution_are_its_channels_however_many_axes_it_has() -> None:
    """Conv1d gives [samples, channels, positions], where a linear layer on sequences gives [samples, positions, features]."""
    first, second = nn.Conv1d(4, 16, 3, padding=1), nn.Conv1d(16, 8, 3, padding=1)
    assert first.bias is not None
    assert second.bias is not None
    with torch.no_grad():
        first.bias[:6] = -1e4
        second.bias[:] = 1.0
    model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(160, 10))
    batches = [(torch.randn(8, 4, 20), torch.randint(0, 10, (8,))) for _ in range(2)]
    (remedy,) = [each for each in REMEDIES if each.name == "revived units"]
    context, _ = _context(_Plan(model, batches, loss, None, 1, 1, 1, {}))
    assert {site: len(sizes) for site, sizes in context.sizes.items()} == {"1": 16, "3": 8}
    revived, x = copy.deepcopy(model), batches[0][0]
    assert remedy.apply(revived, context) == "6 dormant units of 1 layer drawn anew, their outgoing weights 0"
    exec(remedy.as_code(context), {"torch": torch, "nn": nn, "model": model, "x": x, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)})
    for each in (revived, model):
        assert (each[:2](x) > 0).any(0).any(1).all()
        assert not next(each[2].parameters())[:, :6].any()


def test_a_model_without_dormant_units_is_not_revived() -> None:
    model = stack(nn.Tanh)
    trials = torchsat.try_remedies(model, data(), loss, steps=1, progress=False)
    assert "revived units" not in [trial.remedy for trial in trials.trials]
    (remedy,) = [each for each in REMEDIES if each.name == "revived units"]
    trials = torchsat.try_remedies(model, data(), loss, steps=1, progress=False, remedies=[remedy])
    assert trials["revived units"].change == "no unit of a hidden activation that a linear or convolutional layer feeds is dormant"
