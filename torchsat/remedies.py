"""The changes that `try_remedies` makes to copies of a model, one function for each kind.

A remedy is a value: a name, a function that changes a model in place, and a factor for the learning rate. Users can write their own; the function
is given a `Context`, which tells what one batch showed about the model.

A remedy that replaces activations also draws the weights anew, with the initialisation that belongs to the new activation. With the old weights the
trial would judge the old gain and not the new activation.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from torchsat.internals import tree_leaves, tree_map
from torchsat.record import Record
from torchsat.transport.windows import DORMANT_SCORE
from torchsat.weights import is_layer


@dataclass(frozen=True)
class Context:
    """What one batch showed about the model that a remedy changes."""

    sites: tuple[Record, ...]
    """The records of the hidden activations that are modules, in the order of data flow. Only these can be replaced."""
    feeds: dict[str, tuple[str, ...]]
    """The names of the sites that each layer feeds, by the name of the layer."""
    shapes: dict[str, tuple[int, ...]]
    """The shape of the first input of each module that ran, by site name. At an activation this is the shape of z."""
    batches: Sequence[Any]
    """All batches that the trials train on."""
    paths: dict[str, str]
    """The path of each module as `named_modules` gives it, by site or layer name. The two differ where torch wraps a module."""
    input_leaf: int | None
    """The index, among the leaves of a batch, of the tensor that is the input of the model. None: the model is given no tensor of the batch."""
    heads: tuple[str, ...] = ()
    """The names of the linear and convolutional layers that feed no site, as those that make the output of the model do."""
    sizes: Mapping[str, Tensor] = field(default_factory=dict)
    """The mean |a| of each unit over some batches, by the name of the site; for sites that are modules, that a layer feeds, and whose number of units
    is fixed."""


@dataclass(frozen=True)
class Remedy:
    """One change of a model, of its training, or of both."""

    name: str
    apply: Callable[[nn.Module, Context], str]
    """Changes a copy of the model in place and returns a sentence that says what it did. It raises ValueError where it cannot be applied."""
    learning_rate: float = 1.0
    """The factor that the learning rate of every parameter group is multiplied by."""
    code: Callable[[Context], str] | None = None
    """Gives the change of the model as code that can be pasted, for a module `model`. None: there is none."""
    applies: Callable[[Context], bool] | None = None
    """Whether the default table has it for this model. None: for every model."""

    def as_code(self, context: Context) -> str:
        """The change of the model and of the learning rate as code; empty where the remedy has none."""
        parts = [*([self.code(context)] if self.code is not None else []), *([_slower(self.learning_rate)] if self.learning_rate != 1 else [])]
        code = "\n".join(parts)
        return f"from torch import nn\n\n{code}" if "nn." in code else code


def _slower(factor: float) -> str:
    return f'for group in optimizer.param_groups:\n    group["lr"] *= {factor:g}'


def _module(model: nn.Module, context: Context, name: str) -> nn.Module:
    return model.get_submodule(context.paths[name])


def _replace(model: nn.Module, context: Context, name: str, module: nn.Module) -> None:
    parent, _, attribute = context.paths[name].rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


def _layers(model: nn.Module, context: Context) -> list[nn.Module]:
    """The linear and convolutional layers that feed a hidden site and that are trained.

    Frozen layers are left out: with weights drawn anew they could not recover what they had learned.
    """
    sites = {record.site for record in context.sites}
    feeding = [_module(model, context, name) for name, feeds in context.feeds.items() if name in context.paths and sites & set(feeds)]
    return [layer for layer in feeding if is_layer(layer) and cast(Tensor, layer.weight).requires_grad]


_DRAW: dict[str, Callable[[Tensor], Any]] = {
    "Xavier": nn.init.xavier_normal_,
    "He": lambda weight: nn.init.kaiming_normal_(weight, nonlinearity="relu"),
    "LeCun": lambda weight: nn.init.kaiming_normal_(weight, nonlinearity="linear"),
}
"""How each initialisation draws a weight. LeCun's is Kaiming's with gain 1."""


def _initialise(model: nn.Module, context: Context, rule: str) -> str:
    """Draw the weights of all layers that feed hidden sites anew, and set their biases to zero."""
    layers = _layers(model, context)
    if not layers:
        raise ValueError("no linear or convolutional layer with a weight of its own that learns feeds a hidden activation")
    for layer in layers:
        _DRAW[rule](cast(Tensor, layer.weight))
        if isinstance(layer.bias, Tensor):
            nn.init.zeros_(layer.bias)
    return f"{len(layers)} layers drawn anew, {rule}"


_DRAW_CODE = {
    "Xavier": "nn.init.xavier_normal_(layer.weight)",
    "He": 'nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")',
    "LeCun": 'nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")',
}


def _initialise_code(context: Context, rule: str) -> str:
    """The code of `_initialise`. The layers and what they have are asked of the model, as `_layers` does."""
    sites = {record.site for record in context.sites}
    feeding = [context.paths[name] for name, feeds in context.feeds.items() if name in context.paths and sites & set(feeds)]
    return "\n".join(
        [
            f"for path in {_several(feeding)}:",
            "    layer = model.get_submodule(path)",
            "    if layer.weight.requires_grad:",
            f"        {_DRAW_CODE[rule]}",
            "        if layer.bias is not None:",
            "            nn.init.zeros_(layer.bias)",
        ]
    )


def _several(values: Sequence[str]) -> str:
    """A list of strings as Python, with a line for each where one line would be long."""
    line = f"[{', '.join(map(json.dumps, values))}]"
    return line if len(line) < 60 else "[\n" + "".join(f"    {json.dumps(value)},\n" for value in values) + "]"


def _activate(model: nn.Module, context: Context, kind: type[nn.Module]) -> str:
    """Replace every hidden activation by one of this kind, and draw the weights of the layers before them anew."""
    for record in context.sites:
        _replace(model, context, record.site, kind())
    return f"{len(context.sites)} activations are {kind.__name__}; {_initialise(model, context, 'He')}"


def _activate_code(context: Context, kind: type[nn.Module]) -> str:
    paths = [context.paths[record.site] for record in context.sites]
    replaced = f"for path in {_several(paths)}:\n    model.set_submodule(path, nn.{kind.__name__}())"
    return f"{replaced}\n{_initialise_code(context, 'He')}"


class TokenBatchNorm(nn.BatchNorm1d):
    """Batch normalisation of a tensor of shape [batch, tokens, features], over batch and tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, 1)).reshape(x.shape)


def _norm(shape: tuple[int, ...], layer_norm: bool) -> nn.Module:
    """The normalisation for z of this shape: [batch, features], [batch, tokens, features] or [batch, channels, height, width]."""
    if len(shape) == 4:
        return nn.GroupNorm(1, shape[1]) if layer_norm else nn.BatchNorm2d(shape[1])
    if layer_norm:
        return nn.LayerNorm(shape[-1])
    return nn.BatchNorm1d(shape[-1]) if len(shape) == 2 else TokenBatchNorm(shape[-1])


def _normalise(model: nn.Module, context: Context, layer_norm: bool) -> str:
    """Put a normalisation before every hidden activation."""
    device = next(model.parameters()).device
    for record in context.sites:
        shape = context.shapes.get(record.site, ())
        if len(shape) not in (2, 3, 4):
            raise ValueError(f"z of {record.site} has {len(shape)} axes; known are 2, 3 and 4")
        activation = _module(model, context, record.site)
        _replace(model, context, record.site, nn.Sequential(_norm(shape, layer_norm).to(device), activation))
    return f"{'LayerNorm' if layer_norm else 'BatchNorm'} before {len(context.sites)} activations"


def _norm_code(norm: nn.Module) -> str:
    """The expression that makes a norm which `_norm` has made."""
    if isinstance(norm, nn.GroupNorm):
        return f"nn.GroupNorm(1, {norm.num_channels})"
    if isinstance(norm, nn.LayerNorm):
        return f"nn.LayerNorm({norm.normalized_shape[0]})"
    name = "TokenBatchNorm" if isinstance(norm, TokenBatchNorm) else f"nn.{type(norm).__name__}"
    return f"{name}({cast(nn.BatchNorm1d, norm).num_features})"


def _normalise_code(context: Context, layer_norm: bool) -> str:
    lines = []
    for record in context.sites:
        norm, path = _norm_code(_norm(context.shapes[record.site], layer_norm)), json.dumps(context.paths[record.site])
        lines.append(f"model.set_submodule({path}, nn.Sequential({norm}, model.get_submodule({path})))")
    if any("(TokenBatchNorm" in line for line in lines):
        lines.insert(0, "from torchsat.remedies import TokenBatchNorm  # nn.BatchNorm1d over batch and tokens")
    return "\n".join([*lines, "model.to(next(model.parameters()).device)"])


def _standardise(model: nn.Module, context: Context) -> str:
    """Add a pre-hook to the copy that subtracts the mean of each feature over all batches and divides by its standard deviation."""
    if context.input_leaf is None:
        raise ValueError("no tensor of numbers reaches the model from the batch as it is")
    inputs = [tree_leaves(batch)[context.input_leaf] for batch in context.batches]
    if any(tensor.shape[1:] != inputs[0].shape[1:] for tensor in inputs):
        raise ValueError("the inputs in the batches are not of one shape")
    data = torch.cat([tensor.detach().double() for tensor in inputs])
    mean, std = data.mean(0), data.std(0, correction=0)
    # A feature that is constant, or nearly so, is only centred: to divide by its deviation would amplify rounding errors.
    std = torch.where(std < 1e-3 * std.max().clamp(min=1e-12), torch.ones_like(std), std)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def scaled(value: Any) -> Any:
            if isinstance(value, Tensor) and value.is_floating_point() and value.shape[1:] == mean.shape:
                return (value - mean.to(value)) / std.to(value)
            return value

        return tree_map(scaled, args), tree_map(scaled, kwargs)

    model.register_forward_pre_hook(hook, with_kwargs=True)
    return "inputs standardised per feature"


def _standardise_code(context: Context) -> str:
    return "\n".join(
        [
            "# x: the inputs of the training set; do the same, with this mean and std, to all others",
            "mean, std = x.mean(0), x.std(0, correction=0)",
            "std[std <= 1e-3 * std.max()] = 1  # features that are constant are only centred",
            "x = (x - mean) / std",
        ]
    )


def _dormant(sizes: Tensor) -> Tensor:
    """Which units of a layer with these mean |a| are dormant (transport/windows.py)."""
    return sizes <= DORMANT_SCORE * sizes.mean()


def _has_dormant(context: Context) -> bool:
    return any(bool(_dormant(sizes).any()) for sizes in context.sizes.values())


def _ways(context: Context, site: str) -> tuple[list[str], list[str]]:
    """The names of the layers that feed a site, and of those whose input comes from it: those that feed the sites behind it and, behind the last one,
    the layers that feed no site."""
    before = [name for name, feeds in context.feeds.items() if site in feeds and name in context.paths]
    behind = {record.site for record in context.sites if site in record.after}
    after = [name for name, feeds in context.feeds.items() if behind & set(feeds) and name in context.paths]
    last = next((record.last for record in context.sites if record.site == site), False)
    return before, after + [name for name in context.heads if last or not behind]


def _revive(model: nn.Module, context: Context) -> str:
    """Draw the incoming weights of dormant units anew, as torch draws them first, and set the outgoing ones to 0, so that the outputs of the model
    hardly change. The copy has a new optimizer, whose moments are empty."""
    count, layers = 0, 0
    for site, sizes in context.sizes.items():
        dormant, (before, after) = _dormant(sizes), _ways(context, site)
        incoming = [layer for layer in (_module(model, context, name) for name in before) if _gives(layer, len(sizes))]
        if not dormant.any() or not incoming:
            continue
        count, layers = count + int(dormant.sum()), layers + 1
        for layer in incoming:
            weight, fresh = cast(Tensor, layer.weight), torch.empty_like(cast(Tensor, layer.weight))
            nn.init.kaiming_uniform_(fresh, a=5**0.5)
            weight.data[dormant] = fresh[dormant]
            if isinstance(layer.bias, Tensor):
                layer.bias.data[dormant] = 0.0
        for layer in (_module(model, context, name) for name in after):
            if _takes(layer, len(sizes)):
                cast(Tensor, layer.weight).data[:, dormant] = 0.0
    if not count:
        raise ValueError("no unit of a hidden activation that a linear or convolutional layer feeds is dormant")
    return f"{count} dormant units of {layers} layer{'s' if layers > 1 else ''} drawn anew, their outgoing weights 0"


_OWN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _gives(layer: nn.Module, units: int) -> bool:
    """Whether each row of its weight makes one of so many units."""
    return isinstance(layer, _OWN) and layer.weight.requires_grad and layer.weight.shape[0] == units


def _takes(layer: nn.Module, units: int) -> bool:
    """Whether each column of its weight is that of one of so many units."""
    return isinstance(layer, _OWN) and layer.weight.shape[1] == units


def _revive_code(context: Context) -> str:
    """The code of `_revive`. It measures the units anew, on the inputs `x`."""
    rows = []
    for site, sizes in context.sizes.items():
        before, after = _ways(context, site)
        if _dormant(sizes).any() and before:
            rows.append(f"    {json.dumps(context.paths[site])}: ({_paths(context, before)}, {_paths(context, after)}),")
    return "\n".join(
        [
            "ways = {  # each activation, the layers before it, and those behind it",
            *rows,
            "}",
            "sizes = {}",
            "for name in ways:",
            "    model.get_submodule(name).register_forward_hook(lambda module, args, a, name=name: sizes.update({name: a.detach().abs()}))",
            "with torch.no_grad():",
            "    model(x)",
            "    for name, (before, behind) in ways.items():",
            "        model.get_submodule(name)._forward_hooks.popitem()",
            '        kernel = getattr(model.get_submodule(before[0]), "kernel_size", ())  # the features lie in front of its axes',
            "        mean = sizes[name].movedim(-1 - len(kernel), 0).flatten(1).mean(1)",
            f"        dormant = mean <= {DORMANT_SCORE} * mean.mean()",
            "        for layer in map(model.get_submodule, before):",
            "            fresh = torch.empty_like(layer.weight)",
            "            nn.init.kaiming_uniform_(fresh, a=5**0.5)",
            "            layer.weight[dormant] = fresh[dormant]",
            "            if layer.bias is not None:",
            "                layer.bias[dormant] = 0",
            "        for layer in map(model.get_submodule, behind):",
            "            if layer.weight.shape[1] == len(dormant):",
            "                layer.weight[:, dormant] = 0",
            "optimizer.state.clear()  # the moments of what has gone",
        ]
    )


def _paths(context: Context, names: Sequence[str]) -> str:
    return f"[{', '.join(json.dumps(context.paths[name]) for name in names)}]"


REMEDIES: tuple[Remedy, ...] = (
    *(
        Remedy(kind.__name__, partial(_activate, kind=kind), code=partial(_activate_code, kind=kind))
        for kind in (nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU)
    ),
    *(Remedy(f"{rule} init", partial(_initialise, rule=rule), code=partial(_initialise_code, rule=rule)) for rule in _DRAW),
    Remedy("revived units", _revive, code=_revive_code, applies=_has_dormant),
    Remedy("standardised inputs", _standardise, code=_standardise_code),
    Remedy("BatchNorm", partial(_normalise, layer_norm=False), code=partial(_normalise_code, layer_norm=False)),
    Remedy("LayerNorm", partial(_normalise, layer_norm=True), code=partial(_normalise_code, layer_norm=True)),
    Remedy("lower learning rate", lambda model, context: "a tenth of the learning rate", 0.1),
)
"""What `try_remedies` tries by default. Those that replace activations also draw the weights anew, by the rule of He."""
